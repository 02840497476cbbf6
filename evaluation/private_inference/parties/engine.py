"""SecretFlow SPU, the engine: its configuration, the compilation of a program, and one party's runtime."""

import functools
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import BinaryIO

import numpy as np

from entropy_gpt.evaluation.errors import EngineError, PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.arithmetic import CheapArithmetic
from entropy_gpt.evaluation.private_inference.program.cost import StepCost
from entropy_gpt.evaluation.private_inference.program.counting import NUMBER, PUBLIC, RING, Shape, Stock, count_step
from entropy_gpt.evaluation.private_inference.program.prices import load_prices, price_of
from entropy_gpt.evaluation.private_inference.program.second_phase import show
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Step

from .shares import make_placeholder, read_content


# With one squaring the engine's exp(x) is (1 + x / 2)^2: the way to its square, at 0.65 of a product's traffic, to
# which no operation of JAX leads.
SQUARE_BY_EXP = 1
LOG_TRIES, LOG_WAIT_S, LOG_PART_BYTES = 500, 0.01, 2**20
SHOWN_PART_BYTES = 8 * 2**20
LINK_TOTALS = re.compile(
    r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)"
)


def check_engine():
    """
    Raises:
        `PrivateInferenceError`: If the engine is not installed, with what to install.
    """
    try:
        import jax  # noqa: F401
        import spu  # noqa: F401
    except ImportError as error:
        remedy = "pip install 'entropy-gpt[private]'"
        if sys.version_info >= (3, 12):
            remedy = (
                f"It has no release for Python {platform.python_version()}, and the extra [private] leaves it out "
                f"there. In an environment of Python 3.11: {remedy}"
            )
        raise PrivateInferenceError(f"the secure engine is not installed ({error}). {remedy}.") from error


def engine_versions() -> dict[str, str]:
    """Versions of the packages that decide what the compiled program is; "missing" for one not installed."""
    found = {}
    for package in ("entropy-gpt", "spu", "jax"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def runtime_config(settings: PrivateSettings):
    """SPU's configuration for the settings."""
    from spu import libspu

    protocols = {
        "cheetah": libspu.ProtocolKind.CHEETAH,
        "semi2k": libspu.ProtocolKind.SEMI2K,
        "aby3": libspu.ProtocolKind.ABY3,
        "ref2k": libspu.ProtocolKind.REF2K,
    }
    config = libspu.RuntimeConfig(protocols[settings.protocol], libspu.FieldType.FM64, settings.fraction_bits)
    config.fxp_exp_mode = libspu.RuntimeConfig.ExpMode.EXP_TAYLOR
    config.fxp_exp_iters = settings.exponential_squarings if settings.softmax != "efficient" else SQUARE_BY_EXP
    config.fxp_div_goldschmidt_iters = settings.reciprocal_iterations
    # What one party owns stays with it, and products with it cost half.
    config.experimental_enable_colocated_optimization = True
    return config


def make_link(rank: int, own_port: int, peer_port: int, timeout_seconds: int):
    """SPU's link; both parties' engines listen on this machine's loopback alone."""
    from spu import libspu

    description = libspu.link.Desc()
    description.recv_timeout_ms = description.http_timeout_ms = 1000 * timeout_seconds
    ports = (own_port, peer_port) if rank == SERVER else (peer_port, own_port)
    for name, port in zip(("server", "client"), ports, strict=True):
        description.add_party(name, f"127.0.0.1:{port}")
    return libspu.link.create_brpc(description, rank)


@dataclass(frozen=True)
class CompiledStep:
    """
    A step with the engine's code for it.

    Args:
        step ([`Step`]): The step.
        executable: The engine's code of it; `None` of [`show`].
        round_trips (`float`): That it waits for under Cheetah, as counted on its shapes.
        total_bytes (`float`): That both parties send under Cheetah, as predicted from its counts.
    """

    step: Step
    executable: object
    round_trips: float
    total_bytes: float


def compile_steps(steps: Iterable[Step], variables: dict[str, Shape], settings: PrivateSettings) -> list[CompiledStep]:
    """
    The engine's code of each step; equal steps on equal shapes are compiled once.

    Args:
        steps (`Iterable[Step]`): In the order in which they run.
        variables (`dict[str, Shape]`): Those that are there before the first.
        settings ([`PrivateSettings`]): As the runtime's.
    """
    from spu import libspu

    variables, stock, compiled = dict(variables), Stock(), []
    for step in steps:
        executable = None
        if step.function is not show:
            inputs = [variables[name] for name in step.inputs]
            given = tuple((tensor.shape, tensor.dtype, getattr(tensor, "owner", None) == PUBLIC) for tensor in inputs)
            code = _compile(_Hashable(step.function), given, settings)
            executable = libspu.Executable(step.operation, list(step.inputs), list(step.outputs), code)
        counts = count_step(step, variables, settings, stock)
        total_bytes = price_of(counts.parts, load_prices().bytes)
        compiled.append(CompiledStep(step, executable, counts.round_trips, total_bytes))
    return compiled


@functools.lru_cache(maxsize=512)
def _compile(
    function: "_Hashable", given: tuple[tuple[tuple[int, ...], np.dtype, bool], ...], settings: PrivateSettings
) -> bytes:
    from jax import ShapeDtypeStruct
    from jax.experimental import enable_x64
    from spu import libspu
    from spu.utils import frontend

    # Among integers of the ring numbers are named as wide as these, so that one can be taken for the other. The engine
    # has one ring for all of them; a conversion would make one party's number one that is shared.
    in_ring = any(dtype == RING for _, dtype, _ in given)
    number = np.float64 if in_ring else NUMBER

    def program(*tensors):
        return function.function(EngineArithmetic(settings), *tensors)

    with enable_x64(in_ring):
        executable, _ = frontend.compile(
            frontend.Kind.JAX,
            program,
            [ShapeDtypeStruct(shape, RING if dtype == RING else number) for shape, dtype, _ in given],
            {},
            [f"in{index}" for index in range(len(given))],
            [libspu.Visibility.VIS_PUBLIC if is_public else libspu.Visibility.VIS_SECRET for *_, is_public in given],
            lambda flat: [f"out{index}" for index in range(len(flat))],
        )
    return executable.code


class EngineArithmetic(CheapArithmetic):
    """
    What JAX has for the engine to run.

    Args:
        settings ([`PrivateSettings`]): The form of each operation.
    """

    def __init__(self, settings: PrivateSettings):
        import jax.numpy as jnp

        super().__init__(jnp, settings)

    def as_ring(self, tensor):
        import jax

        return jax.lax.bitcast_convert_type(tensor, RING)

    def append_checksum(self, tensor):
        """
        Where numbers are named as wide as integers of the ring (`_compile`), sums would get another type than what
        they are sums of, and could not stand next to it: they are taken of the integers.
        """
        import jax

        if tensor.dtype != np.float64:
            return super().append_checksum(tensor)
        return jax.lax.bitcast_convert_type(super().append_checksum(self.as_ring(tensor)), np.float64)

    def truncate(self, product):
        """By a product with the last bit, which is the integer 1."""
        import jax

        return self.scale(jax.lax.bitcast_convert_type(product, np.float64), 2.0**-self.settings.fraction_bits)

    def reveal(self, masked):
        from spu.experimental.reveal_impl import reveal

        return reveal(masked)


class _Hashable:
    """A function or `partial` by what it computes: partials of equal parts are not equal by themselves."""

    def __init__(self, function: Callable):
        self.function = function
        if isinstance(function, functools.partial):
            self._key = (function.func, function.args, tuple(sorted(function.keywords.items())))
        else:
            self._key = function

    def __eq__(self, other) -> bool:
        return self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def compiled_digest(compiled: list[CompiledStep], settings: PrivateSettings) -> str:
    """A hash of all that both parties have to have in common: code, order, variables, settings, versions."""
    digest = hashlib.sha256(json.dumps([asdict(settings), engine_versions()], sort_keys=True).encode())
    for entry in compiled:
        names = [entry.step.operation, entry.step.layer, entry.step.inputs, entry.step.outputs]
        digest.update(json.dumps(names).encode())
        digest.update(hashlib.sha256(entry.executable.code if entry.executable else b"").digest())
    return digest.hexdigest()


class EngineLog:
    """The engine's log of this process: the only source of what went over a link. One party a process may write it."""

    def __init__(self):
        from spu import libspu

        self._file = _unnamed_file()
        options = libspu.logging.LogOptions()
        options.enable_console_logger = False
        options.system_log_path = f"/dev/fd/{self._file.fileno()}"
        libspu.logging.setup_logging(options)
        self._read, self._rest = 0, ""

    def next_totals(self) -> tuple[int, ...]:
        """Bytes sent, bytes received, messages sent, messages received, of the run that just ended."""
        for _ in range(LOG_TRIES):
            while part := os.pread(self._file.fileno(), LOG_PART_BYTES, self._read):
                self._read += len(part)
                self._rest += part.decode(errors="replace")
            *lines, self._rest = self._rest.split("\n")
            if found := [match for line in lines if (match := LINK_TOTALS.search(line))]:
                return tuple(map(int, found[-1].groups()))
            time.sleep(LOG_WAIT_S)
        raise EngineError("the engine's log lacks the traffic of a step: its version is not known here.")


def _unnamed_file() -> BinaryIO:
    """A file of this process alone: in memory, or where there is no such thing, deleted at once."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("engine.log"), "rb")
    return tempfile.TemporaryFile()


class Party:
    """
    One party's runtime. Every party sets all variables, its own by their values and the others' by their shapes, and
    runs the same steps.

    Args:
        link: SPU's link to the other parties.
        settings ([`PrivateSettings`]): As the others'.
        log ([`EngineLog`], *optional*):
            Where the engine says what it sends. Without it bytes and messages are 0, but for what is shown.
    """

    def __init__(self, link, settings: PrivateSettings, log: "EngineLog | None" = None):
        from spu import api

        self.link, self.log = link, log
        self._is_cheetah = settings.protocol == "cheetah"
        self.config = runtime_config(settings)
        self.config.enable_pphlo_profile = log is not None
        self.runtime = api.Runtime(link, self.config)
        self.io = api.Io(link.world_size, self.config)

    def set_own(self, name: str, value: np.ndarray):
        """A variable that stays with this party: what is set is its encoding in the ring."""
        from spu import libspu

        shares = self.io.make_shares(np.ascontiguousarray(value), libspu.Visibility.VIS_SECRET, self.link.rank)
        self.runtime.set_var(name, shares[self.link.rank])

    def set_foreign(self, name: str, shape: tuple[int, ...], owner: int, dtype: type = NUMBER):
        """A placeholder for a variable of another party, made from its public shape."""
        chunk_bytes = self.config.share_max_chunk_size
        self.runtime.set_var(name, make_placeholder(self.io, shape, owner, self.link.rank, chunk_bytes, dtype))

    def run(self, step: CompiledStep) -> StepCost:
        """Runs a step together with the other parties; what it took, by this party's count."""
        started = time.perf_counter()
        if step.executable is None:
            traffic = self._show(*step.step.inputs, *step.step.outputs)
        else:
            self.runtime.run(step.executable)
            traffic = self.log.next_totals() if self.log else (0, 0, 0, 0)
        seconds = time.perf_counter() - started
        sent, received, messages_sent, messages_received = traffic
        return StepCost(
            operation=step.step.operation,
            layer=step.step.layer,
            sent_bytes=sent,
            received_bytes=received,
            sent_messages=messages_sent,
            received_messages=messages_received,
            round_trips=step.round_trips if self._is_cheetah else min(messages_sent, messages_received) / 2,
            seconds=seconds,
        )

    def _show(self, masked: str, shown: str) -> tuple[int, int, int, int]:
        """
        The client sends its share of a variable, and the server adds its own: it alone knows the sum then. Returns
        bytes and messages, as [`EngineLog.next_totals`].

        Raises:
            `PrivateInferenceError`: If the client sends more or less.
        """
        share = read_content(self.share(masked))
        places = range(0, share.nbytes, SHOWN_PART_BYTES)
        self.forget(masked)
        if self.link.rank != SERVER:
            content = memoryview(share).cast("B")
            for begin in places:
                self.link.send(SERVER, bytes(content[begin : begin + SHOWN_PART_BYTES]))
            self.set_foreign(shown, share.shape, SERVER, RING)
            return share.nbytes, 0, len(places), 0
        if self.link.world_size > 1:
            received = b"".join(self.link.recv(CLIENT) for _ in places)
            if len(received) != share.nbytes:
                raise PrivateInferenceError(f"the client shows {len(received):,} bytes instead of {share.nbytes:,}.")
            share = share + np.frombuffer(received, RING)
        self.set_own(shown, share)
        return 0, share.nbytes, 0, len(places)

    def share(self, name: str):
        """This party's share of a variable."""
        return self.runtime.get_var(name)

    def forget(self, name: str):
        self.runtime.del_var(name)

    def reconstruct(self, shares: list) -> np.ndarray:
        """The value of a variable from all parties' shares, in order of rank."""
        return self.io.reconstruct(shares)
