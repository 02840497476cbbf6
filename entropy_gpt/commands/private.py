"""`entropy-gpt private`: a server keeps its weights secret, a client its prompt, and both compute the answer."""

import signal
import sys

import typer

from .private_ask import ask
from .private_benchmark import benchmark
from .private_certificates import certificates
from .private_cost import cost
from .private_demo import demo
from .private_gateway import gateway
from .private_prepare import prepare
from .private_serve import serve


private = typer.Typer(
    help="Answer a secret prompt with secret weights, by two-party computation, and measure the cost.",
    no_args_is_help=True,
)


@private.callback()
def end_in_order():
    """Lets a terminated party, or one whose terminal is closed, end what it has begun."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))


for command in (serve, ask, prepare, demo, cost, benchmark, gateway, certificates):
    private.command()(command)
