"""
The process that holds one party's engine, apart from the command: a program that the engine can't run ends a process.

It reads a job and then the word to start from standard input, and writes events to standard output, one JSON a line.
It knows nothing of the network: the peer is a port on this machine, behind which `tunnel.py` is.
"""

import base64
import json
import math
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from safetensors.numpy import load_file

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD
from entropy_gpt.evaluation.private_inference.program.cost import StepCost
from entropy_gpt.evaluation.private_inference.program.program import (
    OUT_OF_RANGE,
    ProgramConfig,
    Span,
    tables_bytes,
    weight_shapes,
)
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.variables import answer_name, client_input

from .engine import EngineLog, compiled_digest
from .participant import Participant, compile_pass


REPEATS = 3
ALWAYS_OUT_OF_RANGE = f"numbers were out of range {REPEATS} times: see the audit of the model."
TABLE_PART_BYTES = 8 * 2**20


@dataclass(config=RECORD)
class Job:
    """
    What one party does.

    Args:
        rank (`int`): 0 the server, 1 the client.
        config ([`ProgramConfig`]): Configuration of the program, public.
        settings ([`PrivateSettings`]): Public.
        prompt_length (`int`): Public.
        new_tokens (`int`): Number of tokens in the answer, public.
        answers (`int`): Number of last positions whose logits are wanted; 1 where tokens are generated.
        timeout_seconds (`int`): For which a silent peer is waited for.
        weights (`Path`, *optional*): The server's alone.
        prompt (`list[int]`, *optional*): The client's alone.
        logits (`Path`, *optional*): Where the client writes them.
    """

    rank: int
    config: ProgramConfig
    settings: PrivateSettings
    prompt_length: int
    new_tokens: int
    answers: int
    timeout_seconds: int
    weights: Path | None = None
    prompt: list[int] | None = None
    logits: Path | None = None


def spans(job: Job) -> list[Span]:
    """The spans of the passes: the prompt, then each new token except the last."""
    first = Span(0, job.prompt_length, job.answers)
    return [first, *(Span(job.prompt_length + index, 1) for index in range(job.new_tokens - 1))]


class PartyProcess:
    """One party at work; `tell` receives its events."""

    def __init__(self, job: Job, tell):
        self.job, self.tell = job, tell
        self.config = job.config
        self.log = EngineLog()
        self.programs = []
        for span in spans(job):
            self.programs.append(compile_pass(self.config, job.settings, span))
            self.tell({"event": "compiled"})  # while it compiles for long, nobody should take it for hanging
        self.tables, self.chosen = {}, []

    def digest(self) -> str:
        return compiled_digest([step for program in self.programs for step in program], self.job.settings)

    def start(self, own_port: int, peer_port: int):
        """Meets the peer, pays the set-up, and answers."""
        job, weights = self.job, None
        if job.rank == SERVER:
            weights = load_file(job.weights)
            job.weights.unlink()  # nothing is left of it if this process is killed
        self.link = make_link(job.rank, own_port, peer_port, job.timeout_seconds)
        self.participant = Participant(self.link, self.config, job.settings, weights, self.log)
        set_up = [*self._share_tables(weights), *self.participant.set_up()]
        for cost in set_up:
            self.tell({"event": "set-up", "cost": asdict(cost)})
        for index, (span, program) in enumerate(zip(spans(job), self.programs, strict=True)):
            self._answer(index, span, program)
        # Before the link is taken down, which may wait for the peer: this process is ended when the peer is done too.
        self.tell({"event": "done"})
        self.link.stop_link()

    def _answer(self, index: int, span: Span, program):
        for repeat in range(REPEATS):
            if repeat:  # what is kept of the tokens before may be what is wrong: all anew
                span = Span(0, span.end, span.answers)
                program = compile_pass(self.config, self.job.settings, span)
            value = self._input(span) if self.job.rank == CLIENT else None
            self.participant.infer(program, span, value, self._tell_step)
            if not self._was_out_of_range():
                self._exchange(index)
                return
            self.tell({"event": "repeat", "index": index})
        raise PrivateInferenceError(ALWAYS_OUT_OF_RANGE)

    def _tell_step(self, cost):
        self.tell({"event": "step", "cost": asdict(cost)})

    def _input(self, span: Span) -> np.ndarray:
        tokens = [*self.job.prompt, *self.chosen][span.start : span.end]
        return client_input(self.config, self.job.settings, span, tokens, self.tables)

    def _was_out_of_range(self) -> bool:
        """The one bit that both sides learn. The client's share goes first: a lie about it gets no answer."""
        share = self.participant.party.share(OUT_OF_RANGE)
        if self.job.rank == SERVER:
            theirs = self._receive_share(share, CLIENT)
            self._send_share(share, CLIENT)
            return bool(self.participant.party.reconstruct([share, theirs]))
        self._send_share(share, SERVER)
        return bool(self.participant.party.reconstruct([self._receive_share(share, SERVER), share]))

    def _exchange(self, index: int):
        """The server's share of the answer goes to the client."""
        share = self.participant.party.share(answer_name(self.job.settings))
        if self.job.rank == SERVER:
            self._send_share(share, CLIENT)
        else:
            self._keep(index, self.participant.party.reconstruct([self._receive_share(share, SERVER), share]))

    def _send_share(self, share, peer: int):
        self.link.send(peer, json.dumps([base64.b64encode(part).decode() for part in share.share_chunks]))

    def _receive_share(self, own, peer: int):
        """The peer's share of the same variable as this side's own."""
        share = type(own)()
        share.meta = own.meta  # not the peer's word
        share.share_chunks = [base64.b64decode(part) for part in json.loads(self.link.recv(peer))]
        return share

    def _keep(self, index: int, answer: np.ndarray):
        if self.job.settings.answer == "token":
            token = int(answer[-1])
            if not 0 <= token < self.config.vocab_size:
                raise PrivateInferenceError("the answer is no token of the model.")
        else:
            token = int(answer[-1].argmax())
            if self.job.logits is not None:
                np.save(self.job.logits / f"{index}.npy", answer.astype(np.float32))
        self.chosen.append(token)
        self.tell({"event": "token", "token": token})

    def _share_tables(self, weights: dict | None) -> list[StepCost]:
        """With "client_table", the client gets the embeddings; what that took."""
        if self.job.settings.embedding != "client_table":
            return []
        started, messages, shapes = time.perf_counter(), 0, weight_shapes(self.config)
        for name in ("wte", "wpe"):
            parts = range(0, math.prod(shapes[name]) * np.dtype(np.float32).itemsize, TABLE_PART_BYTES)
            messages += len(parts)
            if self.job.rank == SERVER:
                content = np.ascontiguousarray(weights[name], np.float32).tobytes()
                for begin in parts:
                    part = content[begin : begin + TABLE_PART_BYTES]
                    self.link.send(CLIENT, base64.b64encode(part).decode())
            else:
                content = b"".join(base64.b64decode(self.link.recv(SERVER)) for _ in parts)
                self.tables[name] = np.frombuffer(content, np.float32).reshape(shapes[name])
        size = tables_bytes(self.config.vocab_size, self.config.n_positions, self.config.n_embd)
        seconds = time.perf_counter() - started
        if self.job.rank == SERVER:
            return [StepCost("tables", None, size, 0, messages, 0, 0.0, seconds)]
        return [StepCost("tables", None, 0, size, 0, messages, 0.0, seconds)]


def make_link(rank: int, own_port: int, peer_port: int, timeout_seconds: int):
    """SPU's link; both parties' engines listen on this machine's loopback alone."""
    from spu import libspu

    description = libspu.link.Desc()
    description.recv_timeout_ms = description.http_timeout_ms = 1000 * timeout_seconds
    ports = (own_port, peer_port) if rank == SERVER else (peer_port, own_port)
    for name, port in zip(("server", "client"), ports, strict=True):
        description.add_party(name, f"127.0.0.1:{port}")
    return libspu.link.create_brpc(description, rank)


def _end_with_parent():
    """Nobody else would end an engine whose command was killed."""
    sys.stdin.read()
    os._exit(1)


def main():
    # What libraries print must not be taken for an event.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: dict):
        print(json.dumps(event), file=events, flush=True)

    try:
        job = TypeAdapter(Job).validate_json(sys.stdin.readline())
        process = PartyProcess(job, tell)
        tell({"event": "program", "digest": process.digest(), "steps": sum(map(len, process.programs))})
        word = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        process.start(word["own_port"], word["peer_port"])
    except Exception as error:
        tell({"event": "error", "reason": f"{type(error).__name__}: {error}"})
        raise
    finally:
        events.flush()
        sys.stderr.flush()
    os._exit(0)  # the engine's threads need not be waited for


if __name__ == "__main__":
    main()
