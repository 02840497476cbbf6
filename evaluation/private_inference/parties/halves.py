"""A server's halves of preparations: who may take one, and how much room they have."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.cost import MEGA
from entropy_gpt.evaluation.private_inference.program.settings import SERVER
from entropy_gpt.evaluation.private_inference.program.steps import Span

from .preparations import (
    MOST_PRODUCTS,
    LostHalfError,
    hash_terms,
    hash_weights,
    is_name,
    measure_half,
    name_store,
    read_header,
)
from .store import Store
from .terms import Offer


# What they may take.
MOST_PREPARED_BYTES = 4_000_000_000
# The part of it that one client may fill.
CLIENT_SHARE = 0.5


class Halves:
    """
    The halves of one model with its settings; those of others are deleted.

    Args:
        offer ([`Offer`]): What the server offers.
        folder (`Path`): Where they are.
        most_bytes (`int`): That they may take.
    """

    def __init__(self, offer: Offer, folder: Path, most_bytes: int):
        self._offer, self._most_bytes, self.store = offer, most_bytes, Store(folder, SERVER)
        config, settings = offer.config, offer.settings
        self.of = hash_terms(config, settings), hash_weights(offer.weights, config, settings)
        self.name = name_store(self.store.used.identity, self.of[1])
        # Bytes of those that are being made, by client.
        self._rooms: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.store.delete_old(*self.of)

    @contextlib.contextmanager
    def reserved(self, client: str, spans: list[Span]) -> Iterator[None]:
        """
        Within, there is room for a preparation.

        Raises:
            `PrivateInferenceError`: If there is no room for it.
        """
        size, products = measure_half(self._offer.config, self._offer.settings, spans)
        if products > MOST_PRODUCTS:
            raise PrivateInferenceError("a preparation of so long an answer can't be kept: ask for fewer new tokens.")
        with self._lock:
            self.store.delete_old(*self.of)
            kept = self.store.sizes() + self._rooms
            for whose, total, most in (
                ("preparations", kept.total(), self._most_bytes),
                ("preparations of this client", kept[client], self._most_bytes * CLIENT_SHARE),
            ):
                if total + size > most:
                    raise PrivateInferenceError(
                        f"{whose} would take {(total + size) / MEGA:,.0f} MB here, and {most / MEGA:,.0f} is the most "
                        "(--prepared-mb): use some first."
                    )
            self._rooms[client] += size
        try:
            yield
        finally:
            with self._lock:
                self._rooms[client] -= size

    def take(self, name: object, client: str, taken: contextlib.ExitStack) -> Path:
        """
        The file of a half, out of the store until `taken` closes, which drops it.

        Raises:
            `PrivateInferenceError`: If it is not here, not for this model, or another client's.
        """
        if not is_name(name):
            raise PrivateInferenceError("no such preparation is kept here (serve --prepared).")
        path = self.store.take(name)
        try:
            header = read_header(path)
            if header.owner != client:
                raise PrivateInferenceError(
                    "this preparation was made with another client, by its certificate or address."
                )
            if (header.terms, header.weights) != self.of:
                raise LostHalfError(
                    "this preparation was made with another model, other settings or another version: prepare another "
                    "one."
                )
            self.store.spend(path)
        except BaseException as error:
            undo = self.store.drop if isinstance(error, LostHalfError) else self.store.put_back
            undo(path)
            raise
        taken.callback(self.store.drop, path)
        return path
