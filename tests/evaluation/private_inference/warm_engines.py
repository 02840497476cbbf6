"""
Engines' processes as forks of one that has imported what they need, and with what others have compiled before. It
serves until nobody can ask for more. Each request is the pipes of a process, with one more: there it says the number
of the process, and in the end how that ended.
"""

import atexit
import contextlib
import fcntl
import functools
import hashlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from entropy_gpt.evaluation.private_inference.parties import engine, party_process


ROOT = Path(__file__).parents[3]
NUMBER = struct.Struct("i")
starting = threading.Lock()


class WarmProcess:
    """What [`EngineProcess`] uses of `subprocess.Popen`."""

    def __init__(self, command: list[str], **pipes: int):
        assert command[-1].endswith("party_process") and {*pipes.values()} == {subprocess.PIPE}
        (theirs_in, ours_in), (ours_out, theirs_out), (ours_err, theirs_err), (ours, theirs) = (
            os.pipe() for _ in range(4)
        )
        with starting:
            requests = start_warm_process()
        socket.send_fds(requests, [b"."], [theirs_in, theirs_out, theirs_err, theirs])
        for descriptor in (theirs_in, theirs_out, theirs_err, theirs):
            os.close(descriptor)
        self.stdin = os.fdopen(ours_in, "wb")
        self.stdout, self.stderr, self._reports = (os.fdopen(end, "rb") for end in (ours_out, ours_err, ours))
        (self.pid,) = NUMBER.unpack(self._reports.read(NUMBER.size))
        self._lock, self._status = threading.Lock(), None

    def wait(self) -> int:
        with self._lock:
            if self._status is None:
                (self._status,) = NUMBER.unpack(self._reports.read(NUMBER.size))
                self._reports.close()
        return self._status

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def warm_engines() -> Iterator:
    """Engines of sessions in this process are forks of a warm one, in the folders whose conftest has this."""
    from entropy_gpt.evaluation.private_inference.parties import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "subprocess", SimpleNamespace(PIPE=subprocess.PIPE, Popen=WarmProcess))
        yield


@functools.cache
def start_warm_process() -> socket.socket:
    """Starts the warm process, which lasts as long as this one; forks of this one may ask it, too."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen([sys.executable, "-m", __name__], cwd=ROOT, stdin=theirs)
    atexit.register(process.wait)
    atexit.register(ours.shutdown, socket.SHUT_RDWR)
    return ours


def compile_once(folder: Path):
    """Has each program compiled in one of the forks, and read by the others."""
    compile_here = engine._compile

    def read_or_compile(function: engine._Hashable, *conditions) -> bytes:
        try:
            content = pickle.dumps((function._key, conditions))
        except (AttributeError, pickle.PicklingError):  # a function within another one
            return compile_here(function, *conditions)
        path = folder / hashlib.sha256(content).hexdigest()
        with Path(f"{path}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the peer wants the same at the same time
            if not path.exists():
                part = Path(f"{path}.part")
                part.write_bytes(compile_here(function, *conditions))
                part.rename(path)
        return path.read_bytes()

    engine._compile = read_or_compile


class Warm:
    """
    The process whose forks become engines.

    Args:
        requests (`socket.socket`): Where they are asked for.
    """

    def __init__(self, requests: socket.socket):
        self._requests = requests
        self._running: dict[int, tuple[int, int]] = {}  # by what tells the end, the process and where to say so

    def serve(self):
        is_asked = True
        while is_asked or self._running:
            for ready in select.select([self._requests] * is_asked + [*self._running], [], [])[0]:
                if ready is self._requests:
                    is_asked = self._take_request() or self._end()
                else:
                    self._report(ready)

    def _take_request(self) -> bool:
        """Whether there was one."""
        _, descriptors, _, _ = socket.recv_fds(self._requests, 1, 4)
        if not descriptors:
            return False
        *pipes, report = descriptors
        if (process := os.fork()) == 0:
            for descriptor in (self._requests.detach(), *self._running, *(end for _, end in self._running.values())):
                os.close(descriptor)
            os.close(report)
            run(pipes)
        for descriptor in pipes:
            os.close(descriptor)
        self._running[os.pidfd_open(process)] = process, report
        _say(report, process)
        return True

    def _end(self) -> bool:
        """Nobody asks for more, and nobody would end what is left."""
        for process, _ in self._running.values():
            os.kill(process, signal.SIGKILL)
        return False

    def _report(self, ended: int):
        process, report = self._running.pop(ended)
        _say(report, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        os.close(report)
        os.close(ended)


def _say(report: int, number: int):
    with contextlib.suppress(BrokenPipeError):  # who asked was killed
        os.write(report, NUMBER.pack(number))


def run(pipes: list[int]):
    Path("/proc/self/comm").write_text("party_process")
    for number, descriptor in enumerate(pipes):
        os.dup2(descriptor, number)
        os.close(descriptor)
    try:
        party_process.main()
    finally:
        sys.stderr.flush()
        os._exit(1)


def main():
    engine.check_engine()
    import spu.api
    import spu.utils.frontend  # noqa: F401

    warm = Warm(socket.socket(fileno=os.dup(0)))
    with TemporaryDirectory() as folder:
        compile_once(Path(folder))
        warm.serve()


if __name__ == "__main__":
    main()
