"""What a server offers, what a client learns of it, and which terms a client believes."""

import functools
import math
from dataclasses import asdict, dataclass, field

import numpy as np
from pydantic import TypeAdapter, ValidationError

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.program import TABLES, ProgramConfig, weight_shapes
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, RING_BITS, PrivateSettings
from modeling_entropy_gpt import EntropyGPTConfig

from .channel import clean, one_line
from .engine import engine_versions
from .memory import check_memory
from .tables import PublicCheckpoint, TableTerms


PROTOCOL_VERSION = 7
# For which either side may be silent until a request begins.
HANDSHAKE_SECONDS = 30
# The largest model that a client believes in, whatever memory it has.
LARGEST = {
    "n_layer": 1024,
    "n_head": 1024,
    "n_embd": 2**16,
    "inner_size": 2**18,
    "n_positions": 2**20,
    "vocab_size": 2**22,
}
MOST_ITERATIONS = 64


@dataclass(frozen=True)
class Offer:
    """
    What a server offers; its weights are its own, the rest is public.

    Args:
        config ([`EntropyGPTConfig`]), weights (`dict`): What [`prepare_weights`] made.
        notation (`str`): The architecture before that, in the paper's notation.
        settings ([`PrivateSettings`]): How it answers.
        tokenizer_hash (`str`): So that a client can compare its own.
        checkpoint ([`PublicCheckpoint`], *optional*): With public embeddings, whose they are.
    """

    config: EntropyGPTConfig
    weights: dict[str, np.ndarray]
    notation: str
    settings: PrivateSettings
    tokenizer_hash: str
    checkpoint: PublicCheckpoint | None = None

    @functools.cached_property
    def tables(self) -> dict[str, TableTerms]:
        """Of the embeddings that the client looks up, if it does."""
        names = TABLES if self.settings.embeds_at_home else ()
        return {name: TableTerms.of(self.weights[name]) for name in names}

    def terms(self) -> dict:
        """What a client learns."""
        return {
            "version": PROTOCOL_VERSION,
            "versions": engine_versions(),
            "notation": self.notation,
            "program": asdict(ProgramConfig.of(self.config)),
            "settings": asdict(self.settings),
            "tokenizer": self.tokenizer_hash,
            "tables": {name: asdict(table) for name, table in self.tables.items()},
            "checkpoint": None if self.checkpoint is None else asdict(self.checkpoint),
        }


@dataclass(frozen=True)
class Terms:
    """What a server sends a client at first, checked."""

    config: ProgramConfig
    notation: str
    settings: PrivateSettings
    tokenizer_hash: str
    store: str | None = None
    tables: dict[str, TableTerms] = field(default_factory=dict)
    checkpoint: PublicCheckpoint | None = None


def read_terms(message: dict) -> Terms:
    """
    Raises:
        `PrivateInferenceError`: If a server's terms are broken, too large, or of other versions.
    """
    if message.get("version") != PROTOCOL_VERSION or message.get("versions") != engine_versions():
        raise PrivateInferenceError(
            f"the server runs {clean(message.get('versions'))}, and this side {engine_versions()}: install the same."
        )
    try:
        settings = TypeAdapter(PrivateSettings).validate_python(message.get("settings"))
        config = TypeAdapter(ProgramConfig).validate_python(message.get("program"))
        store = TypeAdapter(str | None).validate_python(message.get("store"))
        notation = TypeAdapter(str).validate_python(message.get("notation"))
        tables = TypeAdapter(dict[str, TableTerms]).validate_python(message.get("tables"))
        checkpoint = TypeAdapter(PublicCheckpoint | None).validate_python(message.get("checkpoint"))
        _check_sizes(config, settings)
        _check_tables(settings, tables, checkpoint)
    except ValueError as error:  # those of pydantic too
        raise PrivateInferenceError(f"the server's terms are broken: {_describe(error)}") from error
    return Terms(config, clean(notation), settings, str(message.get("tokenizer")), store, tables, _cleaned(checkpoint))


def _describe(error: ValueError) -> str:
    """A broken value in a few words, without the value."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{clean('.'.join(map(str, first['loc'])), most=100)}: {one_line(first['msg'], 100)}"
    return one_line(error)


def _check_tables(settings: PrivateSettings, tables: dict[str, TableTerms], checkpoint: PublicCheckpoint | None):
    """
    Raises:
        `ValueError`: If the tables are not those that the client looks embeddings up in.
    """
    if {*tables} != ({*TABLES} if settings.embeds_at_home else set()):
        raise ValueError(f"embedding={settings.embedding} comes with other tables")
    if (checkpoint is None) != (settings.embedding != "public"):
        raise ValueError("a public checkpoint is named for public embeddings, and for no others")


def _cleaned(checkpoint: PublicCheckpoint | None) -> PublicCheckpoint | None:
    return checkpoint and PublicCheckpoint(
        clean(checkpoint.name, most=100), checkpoint.revision and clean(checkpoint.revision, most=100)
    )


def _check_sizes(config: ProgramConfig, settings: PrivateSettings):
    """
    Raises:
        `ValueError`: If there is no such model, or it is larger than a client believes.
    """
    for name, most in LARGEST.items():
        if not 1 <= getattr(config, name) <= most:
            raise ValueError(f"{name} is not from 1 to {most:,}")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} is no multiple of n_head={config.n_head}")
    pruned = config.pruned_ffn_layers
    if pruned != sorted({*pruned} & {*range(config.n_layer)}):
        raise ValueError(f"pruned_ffn_layers are not some of the {config.n_layer} layers in their order")
    if not 0 < config.layer_norm_epsilon < math.inf:
        raise ValueError(f"layer_norm_epsilon={config.layer_norm_epsilon} is no small positive number")
    check_memory(weight_shapes(config).values(), CLIENT)
    if not 1 <= settings.fraction_bits < RING_BITS // 2:
        raise ValueError(f"fraction_bits is not from 1 to {RING_BITS // 2 - 1}")
    for name in ("exponential_squarings", "reciprocal_iterations"):
        if not 0 <= getattr(settings, name) <= MOST_ITERATIONS:
            raise ValueError(f"{name} is not from 0 to {MOST_ITERATIONS}")
