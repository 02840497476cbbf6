"""Runs what the study's protocol asks for, some runs side by side, and keeps what they found."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from evaluation.results import RESULTS, load_results, save_results
from evaluation.study.records import ANSWERED, Study, StudyRun
from training.errors import CorpusError
from training.files import written_whole
from training.tokenizer import train_tokenizer

from .errors import CommandError
from .progress import progress_display, stage
from .study_protocol import Protocol, Row, Run, read_protocol, resolve
from .study_run import RESULT, RUNS, TOKENIZER, Place, load_text, write_plan
from .tables import make_table


RECORD, MODELS, LOG = "study.json", "models.json", "log.txt"
# Seconds between two looks at the processes.
PAUSE = 0.5

console = Console()


@dataclass
class _Worker:
    """A process that does a run."""

    run: Run
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)


def run(protocol_path: Path, only: str | None, output: Path, workers: int, dry_run: bool):
    """
    Does the runs that are missing.

    Args:
        protocol_path (`Path`): The protocol.
        only (`str`, *optional*): How the names of the groups wanted begin; what they depend on is done too.
        output (`Path`): The study's folder.
        workers (`int`): Runs side by side.
        dry_run (`bool`): Whether to show only what would be done.

    Raises:
        `CommandError`: If the protocol or the folder can't be used, or a run failed.
    """
    protocol = read_protocol(protocol_path)
    rows = protocol.select(only)
    finished = _load_finished(output)
    if dry_run:
        _print_plan(rows, finished, output)
        return
    _prepare(protocol, output)
    failed: dict[str, str] = {}
    with progress_display(console) as progress, stage(progress, "study") as line:
        started, done_before = time.monotonic(), None
        for running in _work(protocol, rows, output, workers, finished, failed):
            runs = resolve(rows, finished)
            done = sum(run is not None and run.name in finished for run in runs)
            if done_before is None:
                done_before = done
            line.reach(done, len(rows))
            line.say(_describe(done, done_before, len(rows), time.monotonic() - started, running))
    _save(protocol, finished, output)
    _save_models(finished, output)
    if failed:
        raise CommandError(
            f"{len(failed)} runs failed: {'; '.join(f'{name}: {reason}' for name, reason in failed.items())}. Their "
            f"logs are in {output / RUNS}/*/{LOG}; the same command tries again."
        )
    runs = resolve(rows, finished)
    missing = sum(run is None or run.name not in finished for run in runs)
    without = f", {missing} of them not, since what they start from diverged" if missing else ""
    console.print(f"{len(rows)} rows are measured{without}: {output / RECORD}")


def _load_finished(output: Path) -> dict[str, StudyRun]:
    """Runs that are measured, here or in a record that was put here."""
    try:
        known = Study.load(output / RECORD).runs if (output / RECORD).exists() else {}
        found = [StudyRun.load(path) for path in sorted((output / RUNS).glob(f"*/{RESULT}"))]
    except ValueError as error:
        raise CommandError(str(error)) from error
    return {**known, **{run.name: run for run in found}}


def _prepare(protocol: Protocol, output: Path):
    """The tokenizer that all runs share."""
    place = output / TOKENIZER
    if place.exists():
        return
    try:
        with console.status("training the tokenizer"), written_whole(place) as folder:
            texts = (document.text for document in load_text(protocol.dataset).training)
            train_tokenizer(texts, protocol.vocabulary).save_pretrained(folder)
    except CorpusError as error:
        raise CommandError(str(error)) from error


def _work(
    protocol: Protocol,
    rows: list[Row],
    output: Path,
    workers: int,
    finished: dict[str, StudyRun],
    failed: dict[str, str],
) -> Iterator[list[_Worker]]:
    """Starts what can be started, and waits; yields what is running after each look, and fills what is given."""
    running: list[_Worker] = []
    try:
        while True:
            names = {worker.run.name for worker in running}
            ready = [run for run in _list_ready(rows, output, finished) if run.name not in {*names, *failed}]
            while ready and len(running) < workers:
                running.append(_start(ready.pop(0), protocol, output, workers))
            yield running
            if not running:
                return
            time.sleep(PAUSE)
            for worker in [worker for worker in running if worker.process.poll() is not None]:
                running.remove(worker)
                _collect(worker, output, finished, failed)
                _save(protocol, finished, output)
    finally:
        for worker in running:
            worker.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=30)


def _list_ready(rows: list[Row], output: Path, finished: dict[str, StudyRun]) -> list[Run]:
    """What is not done, and depends on nothing that is not done; sources whose models are not here any more too."""
    runs = {run.name: run for run in resolve(rows, finished) if run is not None}
    missing = [run for run in runs.values() if run.name not in finished]
    ready: dict[str, Run] = {}
    for run in missing:
        if run.source is None:
            ready[run.name] = run
        elif finished.get(run.source) is not None and finished[run.source].diverged is not None:
            continue  # there is nothing to convert
        elif Place(output, run.source).model is not None and Place(output, run.source).result.exists():
            ready[run.name] = run
        else:
            source = runs[run.source]
            if source.source is None or Place(output, source.source).model is not None:
                ready[source.name] = source
    # The longest first, so that the last ones end together; answers last, which take more than one process.
    return sorted(ready.values(), key=lambda run: (run.kind == ANSWERED, -run.steps))


def _start(run: Run, protocol: Protocol, output: Path, workers: int) -> _Worker:
    place = Place(output, run.name)
    write_plan(place, run, protocol.test)
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    with (place.folder / LOG).open("ab") as log:
        command = [sys.executable, "-m", "command_line.study_run", str(output), run.name]
        return _Worker(run, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))


def _collect(worker: _Worker, output: Path, finished: dict[str, StudyRun], failed: dict[str, str]):
    place = Place(output, worker.run.name)
    seconds = time.monotonic() - worker.started
    if worker.process.returncode != 0:
        lines = (place.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        failed[worker.run.name] = next((line for line in reversed(lines) if line.strip()), "no word")[:300]
        console.print(f"{worker.run.name} [red]failed[/] after {seconds:.0f} s: {escape(failed[worker.run.name])}")
        return
    result = finished[worker.run.name] = StudyRun.load(place.result)
    console.print(f"{worker.run.name}, {seconds:.0f} s: {escape(_summarize(result))}", soft_wrap=True)


def _summarize(result: StudyRun) -> str:
    if result.diverged is not None:
        return f"{result.notation} diverged: {result.diverged}"
    if result.cost is not None:
        cost, agreement = result.cost, result.agreement
        agree = f"{agreement.agreeing} of {agreement.positions} tokens agree"
        return f"{result.notation}: {cost.total_bytes / 1e6:.1f} MB, {cost.seconds:.1f} s, {agree}"
    likelihood = result.validation.likelihood
    return f"{result.notation}: perplexity {likelihood.perplexity:.2f}, mean entropy {result.heads.mean:.2f} nats"


def _describe(done: int, done_before: int, rows: int, seconds: float, running: list[_Worker]) -> str:
    text = f"{done} of {rows} rows"
    if done > done_before:
        left = timedelta(seconds=round((rows - done) * seconds / (done - done_before)))
        text += f", about {left} left"
    return "; ".join([text, *(worker.run.name for worker in running)])


def _save(protocol: Protocol, finished: dict[str, StudyRun], output: Path):
    """The record of all finished runs of the protocol, and which groups they are of."""
    study = Study(protocol.hash)
    for row, run in zip(protocol.rows, resolve(protocol.rows, finished), strict=True):
        names = study.groups.setdefault(row.group, [])
        if run is None or run.name not in finished:
            study.missing[row.group] = study.missing.get(row.group, 0) + 1
        elif run.name not in names:
            names.append(run.name)
            study.runs[run.name] = finished[run.name]
    with written_whole(output / RECORD) as path:
        study.save(path)


def _save_models(finished: dict[str, StudyRun], output: Path):
    """What is known of the models that answered privately, for their cards."""
    answered = [run for run in finished.values() if run.cost is not None and Place(output, run.source).model]
    models = []
    for run in sorted(answered, key=lambda run: run.source):
        (result,) = load_results(Place(output, run.source).model / RESULTS)
        models.append(replace(result, costs=[run.cost]))
    with written_whole(output / MODELS) as path:
        save_results(models, path)


def _print_plan(rows: list[Row], finished: dict[str, StudyRun], output: Path):
    runs = resolve(rows, finished)
    groups: dict[str, list[Run | None]] = {}
    for row, run in zip(rows, runs, strict=True):
        groups.setdefault(row.group, []).append(run)
    table = [
        (
            group,
            f"{len(members):,}",
            f"{sum(run is not None and run.name in finished for run in members):,}",
            f"{sum(run is None for run in members):,}",
        )
        for group, members in groups.items()
    ]
    console.print(make_table(("group", "rows", "measured", "wait for a choice"), table))
    known = {run.name: run for run in runs if run is not None and run.name not in finished}
    steps = sum(run.steps for run in known.values())
    console.print(f"{len(known):,} runs are known and missing, with {steps:,} steps of training. Nothing was written.")
    console.print(f"They go to {output}.")
