"""A client that holds a prompt: it opens all connections to a server (`server.py`), and asks."""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import EmbeddingsError, PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.cost import StepCost
from entropy_gpt.evaluation.private_inference.program.program import weight_shapes
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, TRUST

from .channel import TLSFiles, clean, connect
from .drafts import ACCEPTED, NOT_PREPARED, Keep, least_positions, needed_positions
from .job import Job, Request
from .preparations import LostHalfError, hash_terms, is_lost
from .question import Question, check_request
from .session import Outcome, Session, free_port
from .store import Store
from .tables import PublicTables, TableCache, Tables, check_public, count_bytes, decode_table, read_public
from .terms import HANDSHAKE_SECONDS, PROTOCOL_VERSION, read_terms
from .tunnel import ClientTunnel


# What this side is to the other.
CLIENT_NAME = "client"
SEED_BITS = 63


class Client:
    """
    One connection to a server: first its terms, then one question after another. Close it in the end.

    Args:
        host (`str`), port (`int`): The server.
        tls ([`TLSFiles`], *optional*): As the server's.
        timeout_seconds (`int`): For which nothing may happen.
        protocol (`str`): What the client agrees to; a server's word alone must not choose one that protects less.
        prepared (`Path`, *optional*): Folder for its halves of preparations; without it there are none.
        public_checkpoint (`str` or `Path`, *optional*): This side's copy of a checkpoint with public embeddings.

    Raises:
        `PrivateInferenceError`: If there is no server, it breaks rules, offers another protocol, or has public
            embeddings of which this side has no copy.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: TLSFiles | None,
        timeout_seconds: int = 600,
        protocol: str = "cheetah",
        prepared: Path | None = None,
        public_checkpoint: str | Path | None = None,
    ):
        self.store = None if prepared is None else Store(prepared, CLIENT)
        # Before the connection: a server waits for no download.
        public = None if public_checkpoint is None else read_public(public_checkpoint)
        self._connect = lambda: connect(host, port, tls)
        self.timeout_seconds = timeout_seconds
        self._tunnel: ClientTunnel | None = None
        self._session: Session | None = None
        self._accepted = False  # the last request
        self.channel = self._connect()
        try:
            with self.channel.telling(CLIENT_NAME):
                self.channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
                self.terms = read_terms(self.channel.receive(HANDSHAKE_SECONDS, ("terms",)))
                self._check_protocol(protocol)
                self._tables = self._find_tables(public_checkpoint, public)
        except BaseException:
            self.channel.close()
            raise

    def _check_protocol(self, protocol: str):
        offered = self.terms.settings.protocol
        if offered != protocol:
            raise PrivateInferenceError(
                f"the server offers the protocol {offered}, and {protocol} is asked for: {offered} means "
                f"{TRUST[offered]}. Ask for it with --protocol, if that will do."
            )

    def _find_tables(self, public_checkpoint: str | Path | None, public: PublicTables | None) -> Tables | None:
        """What embeddings are looked up in; `None` if the server has to send it."""
        terms = self.terms
        shapes = {name: weight_shapes(terms.config)[name] for name in terms.tables}
        if terms.checkpoint is None:
            if public is not None:
                raise EmbeddingsError(
                    f"--public-checkpoint {public_checkpoint} has no effect, since this server's embeddings are not "
                    "public: leave it out."
                )
            return TableCache().load(terms.tables, shapes)
        if public is None:
            raise EmbeddingsError(
                f"the server has the public embeddings of {terms.checkpoint}, and its word alone loads nothing: name "
                "a copy with --public-checkpoint, a folder or a repository on the Hub."
            )
        check_public(public, public_checkpoint, terms.checkpoint, terms.tables, shapes)
        return public.tables

    def check_tokenizer(
        self,
        own_hash: str,
        what: str = "the tokenizer",
        remedy: str = "Name the server's tokenizer with --tokenizer.",
    ):
        """
        Args:
            own_hash (`str`): Hash of a tokenizer of this side.
            what (`str`), remedy (`str`): What the error calls it, and what to do then.

        Raises:
            `PrivateInferenceError`: If it is not the server's.
        """
        with self.channel.telling(CLIENT_NAME):
            if own_hash != self.terms.tokenizer_hash:
                raise PrivateInferenceError(
                    f"{what} is not the server's, so its tokens would have other meanings. {remedy}"
                )

    def ask(
        self,
        question: Question,
        on_event: Callable[[dict], None] = lambda event: None,
        preparation: str | None = None,
        require_prepared: bool = False,
    ) -> Outcome:
        """
        Asks for the continuation of a prompt. The connection and the engine are kept for the next one; a server waits
        for that no longer than `KEPT_SECONDS`.

        Args:
            question ([`Question`]): The prompt, and what is wanted.
            on_event (`Callable`): Told what happens, for progress.
            preparation (`str`, *optional*): Name of the one to use up. Default: that of [`Client.find_preparation`].
            require_prepared (`bool`): Whether to fail if there is none.

        Raises:
            `PrivateInferenceError`: As [`Session.answer`] and [`Question.check`]. The connection has ended then.
            `UserError`: If no preparation fits and one is required, or the server grants too few positions for drafts.
        """
        try:
            question.check(self.terms)
            asked, own = question.public, {"prompt": question.prompt, "sampling": question.sampling}
            if asked["drafts"]:  # whose passes no preparation is made for
                if require_prepared:
                    raise UserError(NOT_PREPARED)
                own |= self._begin_drafts(question)
            elif preparation is None:
                preparation = self.find_preparation(len(question.prompt), question.new_tokens, question.answers)
            if preparation is None and require_prepared:
                raise UserError(
                    f"no preparation fits {len(question.prompt)} tokens and {question.new_tokens} new ones of this "
                    "server: make one (entropy-gpt private prepare)."
                )
            if preparation is None:
                if self.store is not None:
                    on_event({"event": "one phase" if asked["drafts"] else "unprepared"})
                return self._request(asked, {}, on_event, **own)
            with self._taken(preparation) as taken:
                return self._request(asked, {"preparation": preparation}, on_event, preparation=str(taken), **own)
        except BaseException:
            self.close()
            raise

    def prepare(
        self,
        length: int,
        new_tokens: int = 1,
        answers: int = 1,
        on_event: Callable[[dict], None] = lambda event: None,
    ) -> Outcome:
        """
        Does with the server all of an answer that needs no prompt; each side keeps its half.

        Args:
            length (`int`): The most tokens of the prompt.
            new_tokens (`int`): The most tokens in the answer.
            answers (`int`): The most last positions of the prompt whose logits are wanted.
            on_event (`Callable`): Told what happens, for progress.

        Returns:
            [`Outcome`]: With the preparation's name.

        Raises:
            `UserError`: If this side has no folder for its half.
            `PrivateInferenceError`: As [`Client.ask`].
        """
        try:
            if self.store is None:
                raise UserError("a preparation needs a folder: give prepared, or --prepared DIR.")
            check_request(self.terms.config, self.terms.settings, length, new_tokens, answers)
            asked = {"length": length, "new_tokens": new_tokens, "answers": answers}
            return self._request(asked, {"prepares": True}, on_event, prepares=True)
        except BaseException:
            self.close()
            raise

    def _begin_drafts(self, question: Question) -> dict:
        """What drafts need on this side; they are drawn with the noise of the answer."""
        sampling = question.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(SEED_BITS))
        draft = question.drafts.drafter.begin(question.prompt, sampling, self.terms.config.vocab_size)
        return {"sampling": sampling, "keep": question.drafts.keep, "draft": draft}

    def find_preparation(self, length: int, new_tokens: int = 1, answers: int = 1) -> str | None:
        """The name of the smallest preparation here that serves such a request, if there is one."""
        if self.store is None or self.terms.store is None:
            return None
        terms = hash_terms(self.terms.config, self.terms.settings)
        for header in self.store.headers():
            of_server = (header.terms, header.store) == (terms, self.terms.store)
            if of_server and header.serves(length, new_tokens, answers):
                return header.name
        return None

    @contextlib.contextmanager
    def _taken(self, preparation: str) -> Iterator[Path]:
        """A half, for one request. It stays in the store if the server accepts none: nothing of it was used then."""
        taken, self._accepted = self.store.take(preparation), False
        try:
            yield taken
        except BaseException as error:
            undo = self.store.drop if self._accepted or is_lost(error) else self.store.put_back
            undo(taken)
            raise
        self.store.drop(taken)

    def _request(
        self,
        asked: dict[str, int],
        also: dict,
        on_event: Callable[[dict], None],
        draft: Callable[[list[int], int], list[int]] | None = None,
        **own,
    ) -> Outcome:
        """Has a request answered, of which the server is shown a part."""
        with self.channel.telling(CLIENT_NAME):
            self.channel.send({"kind": "request", **asked, **also, "tables": self._tables is None})
            if self._session is None:
                accepted = self._open(on_event)
            else:
                accepted = self._session.events.expect(HANDSHAKE_SECONDS, "peer's accepted")
            self._accepted = True
            if draft is not None:
                own["positions"] = _read_positions(accepted, asked, own["keep"])
            if "preparation" in own:
                self.store.spend(Path(own["preparation"]))
            on_event({"event": "accepted"})
            request = Request(**asked, **own)
            with contextlib.ExitStack() as taken:

                def take_another(index: int) -> str | None:
                    return self._take_another(request, index, taken)

                return self._session.answer(request, on_event, draft=draft, take_another=take_another)

    def _take_another(self, request: Request, index: int, taken: contextlib.ExitStack) -> str | None:
        """
        This side's half of a preparation for what is left of an answer from a token on, if both sides have one; it is
        dropped when `taken` closes.
        """
        left = (request.length + index, request.new_tokens - index, request.answers)
        while (name := self.find_preparation(*left)) is not None:
            try:
                half = self.store.take(name)
            except LostHalfError:  # another process was first
                continue
            taken.callback(self.store.drop, half)
            self.channel.send({"kind": "another", "preparation": name})
            if self._session.hear_of_another() == name:
                self.store.spend(half)
                return str(half)
        self.channel.send({"kind": "another", "preparation": None})
        return None

    def _open(self, on_event: Callable[[dict], None]) -> dict:
        while (answer := self.channel.receive(HANDSHAKE_SECONDS, ("accepted", "waiting")))["kind"] == "waiting":
            before, seconds = (clean(answer.get(name), most=10) for name in ("before", "seconds"))
            on_event({"event": "waiting", "before": before, "seconds": seconds})
        token = answer.get("session")
        job = Job(
            rank=CLIENT,
            config=self.terms.config,
            settings=self.terms.settings,
            timeout_seconds=self.timeout_seconds,
            store=None if self.store is None else str(self.store.folder),
            peer_store=self.terms.store or "",
        )
        set_up = [] if self._tables is not None else [self._receive_tables(on_event)]
        own_port = free_port()
        self._tunnel = ClientTunnel(self._connect, str(token), own_port)
        self._session = Session(job, self._tables, self.channel, self._tunnel, own_port, set_up)
        return answer

    def _receive_tables(self, on_event: Callable[[dict], None]) -> StepCost:
        """Takes the server's tables, and keeps them for further connections; what that took."""
        on_event({"event": "tables"})
        started, size, tables = time.perf_counter(), 0, {}
        for name, table in self.terms.tables.items():
            shape = weight_shapes(self.terms.config)[name]
            content = self.channel.receive_bytes(count_bytes(shape, table.precision), self.timeout_seconds)
            tables[name], size = decode_table(content, table, shape), size + len(content)
        TableCache().keep(tables, self.terms.tables)
        self._tables = tables
        return StepCost("tables", None, 0, size, 0, 1, 0.0, time.perf_counter() - started)

    def close(self):
        """Ends the connection and the engine."""
        self.channel.close()  # first: an end on purpose
        if self._session is not None:
            self._session.close()
        if self._tunnel is not None:
            self._tunnel.close()


def _read_positions(accepted: dict, asked: dict[str, int], keep: Keep) -> int:
    """
    How many positions passes over drafts may verify.

    Raises:
        `PrivateInferenceError`: If a server grants fewer than it needs for what it has accepted.
        `UserError`: If what is kept may take more than it grants.
    """
    positions, least = accepted.get("positions"), least_positions(**asked)
    if type(positions) is not int or positions < least:
        raise PrivateInferenceError(f"the server grants less than the {least} positions of an answer with drafts.")
    if positions < (needed := needed_positions(**asked, keep=keep)):
        raise UserError(
            f"the server grants {positions} positions, and {asked['new_tokens']} tokens with --draft-keep {keep} may "
            f"need {needed}: ask with --draft-keep {ACCEPTED}, or for fewer tokens (--max-new-tokens)."
        )
    return positions
