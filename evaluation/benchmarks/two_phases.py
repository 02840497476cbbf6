"""Private inference in one phase and in two: bytes, rounds, seconds and memory of GPT-2 small, on one commit.

python -m entropy_gpt.evaluation.benchmarks.two_phases  what is left of the record, then the page
python -m entropy_gpt.evaluation.benchmarks.two_phases --quick  a narrow model, nothing written
python -m entropy_gpt.evaluation.benchmarks.two_phases --redraw  the page anew from the record
"""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import psutil
import typer
from pydantic.dataclasses import dataclass
from rich.console import Console

from entropy_gpt.evaluation.benchmarks.private_inference import measure_once
from entropy_gpt.evaluation.json_records import RECORD as CONFIG
from entropy_gpt.evaluation.json_records import StoredRecord
from entropy_gpt.evaluation.origin import ROOT, git_revision
from entropy_gpt.evaluation.private_inference.costs.cost_plots import draw_costs
from entropy_gpt.evaluation.private_inference.costs.measured_inference import make_config, make_random_model
from entropy_gpt.evaluation.private_inference.inference import NETWORKS, TIMEOUT_SECONDS, TWO_PARTY, serve_on_loopback
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.session import Outcome
from entropy_gpt.evaluation.private_inference.parties.terms import Offer, Terms
from entropy_gpt.evaluation.private_inference.program.cost import (
    MEGA,
    InferenceCost,
    by_operation,
)
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from entropy_gpt.evaluation.records.conditions import list_settings
from entropy_gpt.evaluation.showing.markdown import markdown_table


RECORD = ROOT / "model_cards" / "results" / "two_phases.json"
PAGE = ROOT / "docs" / "two_phases.md"
PICTURE = ROOT / "docs" / "two_phases.png"
# Parts of a record that is not whole yet, and the halves of the preparation.
PARTS = ROOT / "runs" / "two_phases"
NOTATION, LENGTH = "SM+ScFuFFN", 128
SIZES = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
QUICK_SIZES = {"n_layer": 2, "n_embd": 192, "n_head": 3, "vocab_size": 512}
ONE, BEFORE, AFTER = "one phase", "before the prompt", "after it"
GIGA = 1e9

console = Console()


@dataclass(config=CONFIG)
class Part:
    """
    What one of the phases took.

    Args:
        cost ([`InferenceCost`]): Its steps.
        peak_bytes (`list[int]`): Of memory, of the server's engine and of the client's.
        logits (`list[float]`): The answer, if it is one; not kept in the record.
        half_bytes (`list[int]`): On disk when it ended, of the server's halves of preparations and of the client's.
    """

    cost: InferenceCost
    peak_bytes: list[int]
    logits: list[float]
    half_bytes: list[int]


@dataclass(config=CONFIG)
class Record(StoredRecord):
    """
    The same prompt answered in one phase and in two, between two processes.

    Args:
        parts (`dict[str, Part]`): "one phase", "before the prompt" and "after it".
        half_bytes (`list[int]`): What the preparation took on disk, of the server and of the client.
        difference, largest_logit (`float`): The largest difference of the two answers, and the first one's largest.
        same_token (`bool`): Whether their most likely tokens are the same.
        git_revision (`str`, *optional*): Commit of this project.
        remark (`str`, *optional*): What else is to be known.
    """

    KIND: ClassVar[str] = "the benchmark of two phases"
    SCHEMA_VERSION: ClassVar[int] = 1

    parts: dict[str, Part]
    half_bytes: list[int]
    difference: float
    largest_logit: float
    same_token: bool
    git_revision: str | None
    remark: str | None = None


def measure(offer: Offer, folder: Path | None, act: Callable[[Client, Callable], Outcome]) -> Part:
    """
    One phase, in engines of its own.

    Args:
        offer ([`Offer`]): Of the server.
        folder (`Path`, *optional*): Of both sides' halves.
        act (`Callable`): What the client does; given a callback of events too.
    """
    engines = {process.pid for process in psutil.Process().children()}
    peaks: list[int] = []

    def note(event: dict):
        if event["event"] == "done":
            found = [process for process in psutil.Process().children() if process.pid not in engines]
            peaks.extend(sorted(map(peak_memory, found), reverse=True))

    with (
        serve_on_loopback(offer, prepared=folder) as address,
        contextlib.closing(Client(*address, None, TIMEOUT_SECONDS, prepared=folder)) as client,
    ):
        outcome = act(client, note)
    terms = Terms(offer.config, offer.notation, offer.settings, "")
    cost = outcome.cost(terms, LENGTH, 1, NETWORKS[TWO_PARTY])
    stores = [(folder or PARTS).glob(f"*-{rank}.half") for rank in (SERVER, CLIENT)]
    halves = [sum(path.stat().st_size for path in store) for store in stores]
    return Part(cost, peaks, [float(number) for row in outcome.logits for number in row[-1]], halves)


def peak_memory(process: psutil.Process) -> int:
    """The most that a process has had in memory, by the kernel's count."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def measure_all(sizes: dict[str, int], parts: Path, revision: str | None) -> Record:
    """Part after part; those that an interrupted run of the same revision has measured are taken from `parts`."""
    model = make_random_model(make_config(NOTATION, LENGTH, **sizes))
    offer = Offer(*prepare_weights(model), NOTATION, PrivateSettings(), "")
    prompt = np.random.default_rng(0).integers(0, sizes["vocab_size"], LENGTH).tolist()
    folder = parts / "prepared"
    if not [*folder.glob("*.half")] and not (parts / f"{AFTER}.json").exists():
        (parts / f"{BEFORE}.json").unlink(missing_ok=True)  # it was used, and the answer did not come
    acts = {
        ONE: (None, lambda client, note: client.ask(prompt, on_event=note)),
        BEFORE: (folder, lambda client, note: client.prepare(LENGTH, on_event=note)),
        AFTER: (folder, lambda client, note: client.ask(prompt, on_event=note, require_prepared=True)),
    }
    found = {}
    for name, (store, act) in acts.items():
        found[name] = measure_once(parts, name, Part, lambda store=store, act=act: measure(offer, store, act))
        cost = found[name].cost
        console.print(f"{name}: {cost.total_bytes / MEGA:,.1f} MB, {cost.seconds:,.1f} s")
    one, two = (np.array(found[name].logits) for name in (ONE, AFTER))
    return Record(
        {name: replace(part, logits=[]) for name, part in found.items()},
        found[BEFORE].half_bytes,
        float(np.abs(one - two).max()),
        float(np.abs(one).max()),
        bool(one.argmax() == two.argmax()),
        revision,
    )


def page(record: Record) -> str:
    """The page of the documentation that shows the record."""
    one, before, after = (record.parts[name] for name in (ONE, BEFORE, AFTER))
    costs = [part.cost for part in (one, before, after)]
    model = costs[0]
    operations = [{part.name: part.total_bytes for part in by_operation(cost)} for cost in costs]
    seconds = [{part.name: part.seconds for part in by_operation(cost)} for cost in costs]
    rows = [
        (
            name,
            *(f"{found.get(name, 0) / MEGA:,.1f}" for found in operations),
            *(f"{found.get(name, 0):,.1f}" for found in seconds),
        )
        for name in dict.fromkeys(name for found in operations for name in found)
    ]
    rows.append(
        ("all", *(f"{cost.total_bytes / MEGA:,.1f}" for cost in costs), *(f"{cost.seconds:,.1f}" for cost in costs))
    )
    headings = ("operation", *(f"{name}, MB" for name in record.parts), *(f"{name}, s" for name in record.parts))
    totals = [
        ("MB", *(f"{cost.total_bytes / MEGA:,.0f}" for cost in costs)),
        ("round trips", *(f"{cost.round_trips:,.0f}" for cost in costs)),
        ("seconds", *(f"{cost.seconds:,.0f}" for cost in costs)),
        ("memory, server, GB", *(f"{part.peak_bytes[SERVER] / GIGA:.1f}" for part in (one, before, after))),
        ("memory, client, GB", *(f"{part.peak_bytes[CLIENT] / GIGA:.1f}" for part in (one, before, after))),
        ("half a preparation on disk, MB", "", "", " / ".join(f"{size / MEGA:,.0f}" for size in record.half_bytes)),
    ]
    both_bytes, both_seconds = (
        sum(getattr(cost, name) for cost in costs[1:]) / getattr(costs[0], name) for name in ("total_bytes", "seconds")
    )
    return f"""# Private inference in two phases

Generated by `python -m entropy_gpt.evaluation.benchmarks.two_phases`; the figures are in
`{RECORD.relative_to(ROOT).as_posix()}`. [How it works](private_inference.md#two-phases).

{model.notation} of {model.n_layer} blocks, width {model.n_embd}, {model.n_head} heads and a vocabulary of
{model.vocab_size:,}, with random weights: the logits of one token after {model.context}. Two processes on one machine,
under {model.settings.protocol}. MB are 10^6 bytes, sent by both parties together; the set-up of a connection is apart.

{markdown_table(("", *record.parts), totals)}

- After the prompt: **{costs[2].total_bytes / costs[0].total_bytes:.2f} of the bytes** and
  **{costs[2].seconds / costs[0].seconds:.2f} of the seconds** of one phase.
- Both phases together: {both_bytes:.3f} of the bytes and {both_seconds:.2f} of the seconds.
- The answers differ by at most {record.difference:.4f}, of logits up to {record.largest_logit:.1f}. The most likely
  token is {"the same" if record.same_token else "another one"}.

![Bytes of one phase, and of two]({PICTURE.name})

{markdown_table(headings, rows)}

Measured with {list_settings(model.versions)}; commit {record.git_revision}; {model.machine}.
{record.remark or ""}
"""


def write(record: Record):
    PAGE.write_text(page(record), encoding="utf-8")
    draw_costs({name: part.cost for name, part in record.parts.items()}).savefig(PICTURE, format="png")


def main(
    quick: Annotated[bool, typer.Option(help="A narrow model; writes nothing.")] = False,
    remark: Annotated[str | None, typer.Option(help="A sentence for the page: what else is to be known.")] = None,
    redraw: Annotated[bool, typer.Option(help="Measure nothing; the page anew from the record.")] = False,
):
    """Measure an inference in one phase and in two."""
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            console.print(page(measure_all(QUICK_SIZES, Path(folder), None)), markup=False, soft_wrap=True)
        return
    if redraw:
        record = Record.load(RECORD)
        record.remark = remark or record.remark
    else:
        revision = git_revision()
        if revision is None or revision.endswith("+changes"):
            raise ValueError(f"revision {revision}: commit first, so that the record can name what was measured.")
        record = replace(measure_all(SIZES, PARTS / revision, revision), remark=remark)
    record.save(RECORD)
    write(record)
    console.print(f"written: {RECORD}, {PAGE}, {PICTURE}")


if __name__ == "__main__":
    typer.run(main)
