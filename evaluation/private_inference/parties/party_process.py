"""
The process that holds one party's engine, apart from the command: a program that the engine can't run ends a process.

It reads a job, a first request, the word to start and what this party has (weights, or tables) from standard input,
then further requests, and writes events to standard output, one JSON a line. It knows nothing of the network: the peer
is a port on this machine, behind which `tunnel.py` is. It writes no files but the halves of preparations, where it is
asked to keep some.
"""

import itertools
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import TypeAdapter

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.cost import StepCost
from entropy_gpt.evaluation.private_inference.program.program import OUT_OF_RANGE
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation
from entropy_gpt.evaluation.private_inference.program.variables import answer_name, client_inputs, held_shapes

from .channel import may_be_told, one_line
from .drafts import ACCEPTED, next_span, read_next, write_next
from .engine import CompiledStep, EngineLog, compiled_digest, make_link
from .job import ALWAYS_OUT_OF_RANGE, REPEATS, Job, Request, read_arrays, write_array
from .memory import forbid_core_dumps, limit_address_space
from .participant import Participant, compile_pass, compile_preparation, compile_prepared_pass
from .preparations import (
    Header,
    describe_shares,
    draw_bytes,
    draw_name,
    hash_terms,
    hash_weights,
    read_half,
)
from .sampling import Noise, choose
from .shares import RING_BYTES, join_share, read_share
from .store import Store


WORDS_BYTES = 2**16
MAX_REASON_CHARACTERS = 300


class PartyProcess:
    """
    One party at work.

    Args:
        job ([`Job`]): What it does.
        tell (`Callable`): Receives its events.
    """

    def __init__(self, job: Job, tell: Callable[[dict], None]):
        self.job, self.tell = job, tell
        self.log = EngineLog()
        self.chosen: list[int] = []
        self.drafted: list[int] = []
        self._compiler = ThreadPoolExecutor(1)

    def prepare(self, request: Request):
        """Compiles the first pass of a request; its hash is what both parties have to have in common."""
        self.request, self.chosen, self.drafted, self.positions = request, [], [], 0
        self._noise = Noise(request.sampling, self.job.config.vocab_size)
        self._take_up(request.preparation, 0)
        if request.prepares:
            self._preparation = Preparation(self.job.config, self.job.settings, request.spans())
        self._program = self._compile_preparation() if request.prepares else self._compile(0, request.spans()[0])
        program, passes = self._program.result(), 1 if request.prepares or request.drafts else request.new_tokens
        self.tell({"event": "program", "digest": self._digest(program), "steps": len(program) * passes})

    def start(self, own_port: int, peer_port: int, held: dict[str, np.ndarray]):
        """Meets the peer, and pays the set-up; `held` are a server's weights, or a client's tables."""
        limit_address_space()
        job = self.job
        weights, self.tables = (held, {}) if job.rank == SERVER else (None, held)
        self._weights_hash = hash_weights(weights, job.config, job.settings) if weights and job.store else ""
        self.link = make_link(job.rank, own_port, peer_port, job.timeout_seconds)
        self.participant = Participant(self.link, job.config, job.settings, weights, self.log)
        for cost in self.participant.set_up():
            self.tell({"event": "set-up", "cost": asdict(cost)})

    def answer(self, hear: Callable[[], bytes]):
        """
        Answers the request that was prepared; each pass is compiled while the one before runs, if that is known then.

        Args:
            hear (`Callable`): Waits for the next line of standard input: drafts, or another preparation.
        """
        self._hear = hear
        if self.request.prepares:
            self._prepare()
        elif self.request.drafts:
            self._verify_drafts()
        else:
            self._load()
            self._run_passes()
            self._forget()
        self.tell({"event": "done"})

    def _take_up(self, preparation: str | None, index: int):
        """Reads this party's half of a preparation that the rest of an answer is to use, from a token on, if any."""
        self._half, self._first = None, index
        if preparation is not None:
            self._half = header, _, _ = read_half(Path(preparation))
            self._preparation = Preparation(self.job.config, self.job.settings, header.spans())

    def _load(self):
        if self._half is not None:
            header, seed, shares = self._half
            self.tell({"event": "prepared before", "costs": [asdict(cost) for cost in header.costs]})
            self.participant.load(self._preparation, seed, shares)

    def _forget(self):
        if self._half is not None:
            self.participant.forget(self._preparation)

    def _run_passes(self):
        spans = self.request.spans()
        for index, span in enumerate(spans):
            program = self._program.result()
            if span.start:
                self._compare(program)
            self._compile_next(index)
            self._answer(index, span, program)

    def _compile_next(self, index: int):
        if further := self.request.spans()[index + 1 :]:
            self._program = self._compile(index + 1, further[0])

    def _verify_drafts(self):
        """Passes over drafts, until all tokens are known; the client says where each one begins."""
        (span,), is_client = self.request.spans(), self.job.rank == CLIENT
        for index in itertools.count():
            if is_client:  # as many each time, so that the time does not show how many are known
                self.tell({"event": "draft", "known": self.chosen, "count": self.request.drafts})
            program = self._program.result()
            if index:
                self._compare(program)
            if is_client:
                self.drafted = json.loads(self._hear())[: span.end - self.request.length - len(self.chosen)]
            self._answer(index, span, program)
            kept, span = span.end, self._agree_on_next(span.end)
            if span is None:
                return
            self._program = self._compiler.submit(compile_pass, self.job.config, self.job.settings, span, kept)

    def _agree_on_next(self, kept: int) -> Span | None:
        request = self.request
        if self.job.rank == SERVER:
            content = self.link.recv(CLIENT)
            return read_next(content, request.length, request.new_tokens, request.drafts, kept)
        known, drafts = len(self.chosen), request.drafts
        if request.keep == ACCEPTED:  # no more than leave a position for each token if all are wrong
            drafts = max(0, min(drafts, request.positions - self.positions - (request.new_tokens - known)))
        span = next_span(request.length, request.new_tokens, known, drafts, request.keep)
        self.link.send(SERVER, write_next(span))
        return span

    def _prepare(self):
        """The first phase; this party's half goes to its store."""
        program, request, costs, seed = self._program.result(), self.request, [], draw_bytes()

        def note(cost: StepCost):
            costs.append(cost)
            self._tell_step(cost)

        own, peer = draw_bytes(), 1 - self.job.rank
        self.link.send(peer, own)
        theirs = self.link.recv(peer)
        name = draw_name((own, theirs) if self.job.rank == SERVER else (theirs, own))
        self._tell_pass(program)
        shares = self.participant.prepare(program, self._preparation, seed, note)
        header = Header(
            name=name,
            rank=self.job.rank,
            terms=hash_terms(self.job.config, self.job.settings),
            weights=self._weights_hash,
            store=self.job.peer_store,
            length=request.length,
            new_tokens=request.new_tokens,
            answers=request.answers,
            shares=describe_shares(shares),
            costs=costs,
            owner=self.job.owner,
            made=time.time(),
        )
        Store(Path(self.job.store), self.job.rank).put(header, seed, shares, self._agree)
        self.tell({"event": "prepared", "name": name})

    def _agree(self):
        """That both have written their halves: one alone would be of no use."""
        self.link.send(1 - self.job.rank, b"written")
        self.link.recv(1 - self.job.rank)

    def _compile(self, index: int, span: Span) -> Future[list[CompiledStep]]:
        if self._half is None:
            return self._compiler.submit(compile_pass, self.job.config, self.job.settings, span)
        number = index - self._first
        return self._compiler.submit(compile_prepared_pass, self.job.settings, self._preparation, number, span)

    def _compile_preparation(self) -> Future[list[CompiledStep]]:
        return self._compiler.submit(compile_preparation, self.job.config, self.job.settings, self._preparation)

    def _digest(self, program: list[CompiledStep]) -> str:
        return compiled_digest(program, self.job.settings)

    def _compare(self, program: list[CompiledStep]):
        """
        Raises:
            `PrivateInferenceError`: If the peer has another program for the same pass.
        """
        digest = bytes.fromhex(self._digest(program))
        self.link.send(1 - self.job.rank, digest)
        if self.link.recv(1 - self.job.rank) != digest:
            raise PrivateInferenceError("the two sides made different programs of the same terms.")

    def _answer(self, index: int, span: Span, program: list[CompiledStep]):
        noise = self._draw_noise(span)
        for repeat in range(REPEATS):
            if repeat:  # what is kept of the tokens before may be what is wrong
                span = Span(0, span.end, span.answers)
                program = self._begin_anew(index, span)
            self._count(span)
            self._tell_pass(program, span.answers)
            self.participant.infer(program, span, self._inputs(span, noise), self._tell_step)
            if not self._was_out_of_range(index):
                self._exchange(span)
                return
        raise PrivateInferenceError(ALWAYS_OUT_OF_RANGE)

    def _begin_anew(self, index: int, span: Span) -> list[CompiledStep]:
        """
        The program of a pass over all tokens. Nothing prepared serves twice: this pass and those after it have another
        preparation, if both sides have one, or none.
        """
        if self._half is not None:
            self._forget()
            self.tell({"event": "another", "index": index})
            self._take_up(json.loads(self._hear()), index)
            self._load()
        program = self._compile(index, span).result()
        self._compare(program)
        self._compile_next(index)
        return program

    def _count(self, span: Span):
        """A client that makes the check fail holds the engine for longer than it has asked for."""
        self.positions += span.answers
        most = self.request.most_positions
        if most is not None and self.positions > most:
            raise PrivateInferenceError(
                f"this answer would take {self.positions} positions: {most} is the most here, with those of wrong "
                f"drafts and those that are computed again, out of range ({self.request.limit})."
            )

    def _tell_pass(self, program: list[CompiledStep], answers: int = 0):
        """What is about to be sent: by each step, and as the peer's share of the answers with the words around it."""
        steps, share = [round(step.total_bytes) for step in program], RING_BYTES * answers * self.job.config.vocab_size
        self.tell({"event": "pass", "bytes": steps, "answers": answers, "answer_bytes": share + WORDS_BYTES})

    def _tell_step(self, cost):
        self.tell({"event": "step", "cost": asdict(cost)})

    def _draw_noise(self, span: Span) -> np.ndarray | None:
        """The client's, once for each answer, so that a seed means the same whether it is repeated or not."""
        if self.job.rank != CLIENT or self.job.settings.answer != "sampled":
            return None
        return self._noise.rows(max(0, self._first_answer(span)), span.answers)

    def _first_answer(self, span: Span) -> int:
        """Which new token the first answer of a pass is; below 0 it is one of the prompt's."""
        return span.end - span.answers + 1 - self.request.length

    def _inputs(self, span: Span, noise: np.ndarray | None) -> dict[str, np.ndarray]:
        if self.job.rank != CLIENT:
            return {}
        tokens = [*self.request.prompt, *self.chosen, *self.drafted][span.start : span.end]
        return client_inputs(self.job.config, self.job.settings, span, tokens, self.tables, noise)

    def _was_out_of_range(self, index: int) -> bool:
        """
        The one bit that both sides learn. The client's share goes first: who claims it gets no answer. The server
        reports what it found before the client can know, and end.
        """
        share, peer = self.participant.party.share(OUT_OF_RANGE), 1 - self.job.rank
        if self.job.rank == CLIENT:
            self.link.send(peer, join_share(share))
        theirs = read_share(self.link.recv(peer), share)
        found = bool(self.participant.party.reconstruct([share, theirs]))
        if found:
            self.tell({"event": "repeat", "index": index})
        if self.job.rank == SERVER:
            self.link.send(peer, join_share(share))
        return found

    def _exchange(self, span: Span):
        """The server's share of the answer goes to the client."""
        share = self.participant.party.share(answer_name(self.job.settings))
        if self.job.rank == SERVER:
            self.link.send(CLIENT, join_share(share))
        else:
            answer = self.participant.party.reconstruct([read_share(self.link.recv(SERVER), share), share])
            if self.request.drafts:
                self._keep_right(answer, self._first_answer(span))
            else:
                self._keep(answer)

    def _keep_right(self, answers: np.ndarray, first: int):
        """What is said after right tokens: those that are known, and drafts up to the first that is wrong."""
        read, known = [*self.chosen, *self.drafted], len(self.chosen)
        for place in range(known, first + len(answers)):
            self._keep(answers[place - first][None])
            if place < len(read) and read[place] != self.chosen[place]:
                break
        right = sum(token == draft for token, draft in zip(self.chosen[known:], self.drafted, strict=False))
        self.tell({"event": "verified", "drafts": len(self.drafted), "right": right})

    def _keep(self, answer: np.ndarray):
        if self.job.settings.answer != "logits":
            token, told = int(answer[-1]), {}
            if not 0 <= token < self.job.config.vocab_size:
                raise PrivateInferenceError("the answer is no token of the model.")
        else:
            noise = self._noise.rows(len(self.chosen), 1)
            token = choose(answer[-1], self.request.sampling, noise[0])
            told = {"logits": write_array(answer)}
        self.chosen.append(token)
        self.tell({"event": "token", "token": token, **told})


def _read_lines(source: BinaryIO) -> queue.Queue[bytes]:
    """Further lines. At their end the process ends: nobody else would end an engine whose command was killed."""
    lines: queue.Queue[bytes] = queue.Queue()

    def read():
        for line in source:
            lines.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return lines


def work(source: BinaryIO, tell: Callable[[dict], None]):
    """Answers one request after another, until the process is ended."""
    job = TypeAdapter(Job).validate_json(source.readline())
    process = PartyProcess(job, tell)
    process.prepare(TypeAdapter(Request).validate_json(source.readline()))
    word = json.loads(source.readline())
    held = read_arrays(source, held_shapes(job.config, job.settings, job.rank))
    lines = _read_lines(source)
    process.start(word["own_port"], word["peer_port"], held)
    del held  # the engine has a server's weights
    while True:
        process.answer(lines.get)
        process.prepare(TypeAdapter(Request).validate_json(lines.get()))
        lines.get()  # the word that both have the same program


def main():
    # What libraries print must not be taken for an event.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: dict):
        print(json.dumps(event), file=events, flush=True)

    forbid_core_dumps()
    try:
        work(sys.stdin.buffer, tell)
    except Exception as error:
        told, reason = may_be_told(error), one_line(error, MAX_REASON_CHARACTERS)
        if not isinstance(error, PrivateInferenceError):
            reason = f"{type(error).__name__}: {reason}"
        tell({"event": "error", "reason": reason, "may_be_told": told})
        sys.stderr.flush()
        sys.stdin.buffer.read()  # the peer hears why before its engine sees this one end
        os._exit(1)  # the engine's threads need not be waited for


if __name__ == "__main__":
    main()
