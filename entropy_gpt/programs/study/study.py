"""Runs what the study's protocol asks for, some runs side by side, and keeps what they found."""

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.tokenizer_files import save_tokenizer
from entropy_gpt.evaluation.records.results import RESULTS, load_results, save_results
from entropy_gpt.terminal.progress import progress_display
from entropy_gpt.terminal.tables import make_table
from entropy_gpt.training.claims import claimed
from entropy_gpt.training.files import written_whole
from entropy_gpt.training.preparation import TOKENIZER_CHARACTERS, first_texts
from entropy_gpt.training.progress import Progress
from entropy_gpt.training.storage import check_folder
from entropy_gpt.training.tokenizer import train_tokenizer

from .protocol import Protocol, Row, Run, read_protocol, resolve
from .records import ANSWERED, TIMED, TRAINED, Study, StudyRun
from .run import RESULT, RUNS, TOKENIZER, TRAINING, Place, write_plan
from .texts import load_text, read_samples


RECORD, MODELS, SHARED, LOG = "study.json", "models.json", "shared.json", "log.txt"
# Seconds between two looks at the processes.
PAUSE = 0.5

console = Console()


@dataclass
class _Worker:
    """A process that does a run."""

    run: Run
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)


def run(
    protocol_path: Path,
    only: Sequence[str],
    output: Path,
    workers: int,
    dry_run: bool,
    hours: float | None = None,
    time_again: bool = False,
):
    """
    Does the runs that are missing.

    Args:
        protocol_path (`Path`): The protocol.
        only (`Sequence[str]`): How the names of the groups wanted begin, all but the trial if there are none; what
            they depend on is done too.
        output (`Path`): The study's folder.
        workers (`int`): Runs side by side.
        dry_run (`bool`): Whether to show only what would be done.
        hours (`float`, *optional*): When to stop, with the checkpoints of what is not finished.
        time_again (`bool`): Whether to time steps anew; what was timed counts until then.

    Raises:
        `UserError`: If the protocol or the folder can't be used, or a run failed.
    """
    deadline = time.monotonic() + 3600 * (math.inf if hours is None else hours)
    output = output.resolve()
    protocol = read_protocol(protocol_path)
    rows = protocol.select(only)
    _check_output(protocol, output)
    finished = _load_finished(output)
    again = {row.timed.name for row in rows if row.kind == TIMED} if time_again else set()
    outdated = {name: finished.pop(name) for name in again & finished.keys()}
    if dry_run:
        _print_plan(rows, finished, output)
        return
    failed: dict[str, str] = {}
    with claimed(output, lambda: _goes_on(output)):
        with progress_display(console) as progress, progress.stage("study") as line:
            _prepare(protocol, output, progress)
            if any(run.kind != TIMED for run in _list_ready(rows, output, finished)):
                read_samples(protocol.test, protocol.transfer)  # what is missing is said before hours of training
            work = _work(protocol, rows, output, workers, finished, outdated, failed, deadline)
            with contextlib.closing(work):
                for running in work:
                    line.reach(*_count_steps(rows, finished))
                    line.say(_describe_state(rows, finished, running))
        _save_models(_save(protocol, {**outdated, **finished}, output), output)
    if failed:
        raise UserError(
            f"{len(failed)} runs failed: {'; '.join(f'{name}: {reason}' for name, reason in failed.items())}. Their "
            f"logs are in {output / RUNS}/*/{LOG}; the same command tries again."
        )
    runs = resolve(rows, finished)
    missing = sum(run is None or run.name not in finished for run in runs)
    if _list_ready(rows, output, finished):
        console.print(
            f"Stopped after {hours:g} hours, with {missing} of {len(rows)} rows to go: the same command goes on."
        )
        return
    without = f", {missing} of them not, since what they start from diverged" if missing else ""
    console.print(f"{len(rows)} rows are measured{without}: {output / RECORD}", markup=False, soft_wrap=True)


def _count_steps(rows: list[Row], finished: dict[str, StudyRun]) -> tuple[int, int]:
    """Steps of training that are done, and all: at most that many, as several rows may turn out to be the same run."""
    runs = resolve(rows, finished)
    steps = {
        index if run is None else run.name: row.steps for index, (row, run) in enumerate(zip(rows, runs, strict=True))
    }
    return sum(count for name, count in steps.items() if name in finished), sum(steps.values())


def _describe_state(rows: list[Row], finished: dict[str, StudyRun], running: list[_Worker]) -> str:
    done = sum(run is not None and run.name in finished for run in resolve(rows, finished))
    return "; ".join([f"{done} of {len(rows)} rows", *(worker.run.name for worker in running)])


def _check_output(protocol: Protocol, output: Path):
    """Refuses a folder whose runs have another text or tokenizer, or were tested on other code."""
    check_folder(output)
    record = output / RECORD
    if record.exists() and (pins := (known := Study.load(record)).pins) != protocol.pins and known.runs:
        raise UserError(
            f"The runs of {record} were trained on the packages of another list ({pins or 'none'}, and "
            f"{protocol.pins or 'none'} now): give another --output."
        )
    path = output / SHARED
    if not path.exists():
        return
    earlier, now = json.loads(path.read_text(encoding="utf-8")), protocol.shared
    if changed := [
        f"{name} {earlier.get(name)} then, {now[name]} now" for name in now if earlier.get(name) != now[name]
    ]:
        raise UserError(f"{output} holds a study of another kind ({'; '.join(changed)}): give another --output.")


def _goes_on(output: Path) -> bool:
    """Whether there is something that another attempt does not do again."""
    return any(True for name in (RESULT, f"{TRAINING}/checkpoint-*") for _ in (output / RUNS).glob(f"*/{name}"))


def _load_finished(output: Path) -> dict[str, StudyRun]:
    """Runs that are measured, here or in a record that was put here."""
    known = Study.load(output / RECORD).runs if (output / RECORD).exists() else {}
    found = [StudyRun.load(path) for path in sorted((output / RUNS).glob(f"*/{RESULT}"))]
    return {**known, **{run.name: run for run in found}}


def _prepare(protocol: Protocol, output: Path, progress: Progress):
    """The tokenizer that all runs share."""
    with written_whole(output / SHARED) as path:
        path.write_text(json.dumps(protocol.shared, indent=1) + "\n", encoding="utf-8")
    place = output / TOKENIZER
    if not place.exists():
        with progress.stage("training the tokenizer"), written_whole(place) as folder:
            texts = first_texts(load_text(protocol.dataset).training, TOKENIZER_CHARACTERS)
            save_tokenizer(train_tokenizer(texts, protocol.vocabulary), folder)
    known = Study.load(output / RECORD).tokenizer if (output / RECORD).exists() else None
    if known not in (None, _hash_tokenizer(output)):
        raise UserError(
            f"The runs of {output / RECORD} have another tokenizer than {place}, which was trained here: their "
            "perplexities can't be compared. Give another --output."
        )


def _hash_tokenizer(output: Path) -> str:
    return hashlib.sha256((output / TOKENIZER / "tokenizer.json").read_bytes()).hexdigest()[:16]


def _work(
    protocol: Protocol,
    rows: list[Row],
    output: Path,
    workers: int,
    finished: dict[str, StudyRun],
    outdated: dict[str, StudyRun],
    failed: dict[str, str],
    deadline: float,
) -> Iterator[list[_Worker]]:
    """
    Starts what can be started, and waits, until the deadline; yields what is running after each change, and fills what
    is given.
    """
    running: list[_Worker] = []
    try:
        while True:
            names = {worker.run.name for worker in running}
            ready = [run for run in _list_ready(rows, output, finished) if run.name not in {*names, *failed}]
            in_time = time.monotonic() < deadline
            while in_time and ready and len(running) < workers and _may_start(ready[0], running):
                running.append(_start(ready.pop(0), protocol, output, workers))
            yield running
            if not running:
                return
            while all(worker.process.poll() is None for worker in running):
                if time.monotonic() >= deadline:
                    return
                time.sleep(PAUSE)
            for worker in [worker for worker in running if worker.process.poll() is not None]:
                running.remove(worker)
                _collect(worker, output, finished, failed)
                _save(protocol, {**outdated, **finished}, output)
    finally:
        for worker in running:
            worker.process.kill()  # whatever it does can be cut off anywhere
        for worker in running:
            worker.process.wait()


def _may_start(run: Run, running: list[_Worker]) -> bool:
    """What is timed is alone."""
    return not running or not {ANSWERED, TIMED} & {run.kind, *(worker.run.kind for worker in running)}


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
    # In the protocol's order, and answers when all else is done.
    return sorted(ready.values(), key=lambda run: run.kind == ANSWERED)


def _start(run: Run, protocol: Protocol, output: Path, workers: int) -> _Worker:
    place = Place(output, run.name)
    write_plan(place, run, protocol)
    threads = protocol.threads or max(1, (os.cpu_count() or 1) // (1 if run.kind == ANSWERED else workers))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    with (place.folder / LOG).open("ab") as log:
        command = [sys.executable, "-P", "-m", "entropy_gpt.programs.study.run", str(output), run.name]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    return _Worker(run, process)


def _collect(worker: _Worker, output: Path, finished: dict[str, StudyRun], failed: dict[str, str]):
    place = Place(output, worker.run.name)
    seconds = time.monotonic() - worker.started
    if worker.process.returncode != 0:
        lines = (place.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        failed[worker.run.name] = next((line for line in reversed(lines) if line.strip()), "no word")[:300]
        reason = escape(failed[worker.run.name])
        console.print(f"{worker.run.name} [red]failed[/] after {seconds:.0f} s: {reason}", soft_wrap=True)
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
    if result.kind == TIMED:
        return f"{result.notation}: {result.cpu_seconds_per_step:.3f} s of the processor for a step"
    likelihood = result.validation.likelihood
    return f"{result.notation}: perplexity {likelihood.perplexity:.2f}, mean entropy {result.heads.mean:.2f} nats"


def _save(protocol: Protocol, finished: dict[str, StudyRun], output: Path) -> Study:
    """The record of all finished runs of the protocol, and which groups they are of."""
    study = Study(protocol.hash, tokenizer=_hash_tokenizer(output), pins=protocol.pins)
    for row, run in zip(protocol.rows, resolve(protocol.rows, finished), strict=True):
        names = study.groups.setdefault(row.group, [])
        if run is None or run.name not in finished:
            study.missing[row.group] = study.missing.get(row.group, 0) + 1
        elif run.name not in names:
            names.append(run.name)
            study.runs[run.name] = finished[run.name]
    with written_whole(output / RECORD) as path:
        study.save(path)
    return study


def _save_models(study: Study, output: Path):
    """What is known of the models that answered privately, here or in a file that was put here, for their cards."""
    earlier = load_results(output / MODELS) if (output / MODELS).exists() else []
    answered = {run.source: run.cost for run in study.runs.values() if run.cost is not None}
    known = {result.name: result for result in earlier if result.name in answered}
    for source, cost in answered.items():
        if model := Place(output, source).model:
            (result,) = load_results(model / RESULTS)
            known[source] = replace(result, costs=[cost])
    with written_whole(output / MODELS) as path:
        save_results([known[name] for name in sorted(known)], path)


def _print_plan(rows: list[Row], finished: dict[str, StudyRun], output: Path):
    runs = resolve(rows, finished)
    groups: dict[str, list[Run | None]] = {}
    for row, run in zip(rows, runs, strict=True):
        groups.setdefault(row.group, []).append(run)
    hours = _predict_hours(rows, runs, finished)
    table = [
        (
            group,
            f"{len(members):,}",
            f"{sum(run is not None and run.name in finished for run in members):,}",
            f"{sum(run is None for run in members):,}",
            f"{hours[group]:.2f}" if hours[group] else "",
        )
        for group, members in groups.items()
    ]
    console.print(make_table(("group", "rows", "measured", "wait for a choice", "hours"), table))
    known = {run.name: run for run in runs if run is not None and run.name not in finished}
    steps = sum(run.steps for run in known.values())
    console.print(f"{len(known):,} runs are known and missing, with {steps:,} steps of training. Nothing was written.")
    if total := sum(hours.values()):
        console.print(f"What is missing and was timed takes at most {total:.1f} hours of one core.")
    console.print(f"They go to {output}.", markup=False, soft_wrap=True)


def _predict_hours(rows: list[Row], runs: list[Run | None], finished: dict[str, StudyRun]) -> dict[str, float]:
    """
    Hours of one core that the missing training of each group takes, by the steps that were timed; none of what was
    not. A run that several rows want is counted with the first.
    """
    hours = dict.fromkeys((row.group for row in rows), 0.0)
    seen = {*finished}
    for row, run in zip(rows, runs, strict=True):
        timed = finished.get(row.timed.name)
        if row.kind == TRAINED and timed is not None and (run is None or run.name not in seen):
            hours[row.group] += row.steps * timed.cpu_seconds_per_step / 3600
            seen |= {run.name} if run is not None else set()
    return hours
