"""The protocol of the study: groups of runs, each of them what its settings give when lists are crossed."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.training.arguments import NAMED_TEXTS, PACKAGES
from entropy_gpt.training.errors import RecipeError
from entropy_gpt.training.package_corpus import hash_pins
from entropy_gpt.training.recipe_file import read_yaml

from .records import ANSWERED, CONVERTED, TIMED, TRAINED, StudyRun


# Beside settings, a group says where its learning rate or its models come from, in these words.
BEST_IN, GROUP = "best_in", "group"
SOURCES = {"convert": CONVERTED, "answer": ANSWERED}
# A list of settings that go together, each of them one of the values that are crossed; steps that are only timed.
CASES, TIME = "cases", "time"
# What two runs have in common if the learning rate of the one is good for the other.
COMPARED = ("notation", "n_layer", "context")
# What a run has in common with the row whose model it takes, if nothing else is said.
OF_A_SOURCE = ("notation", "seed")
DATASET, TRANSFER, THREADS = "dataset", "transfer", "threads"
KINDS_WITH_SETTINGS = (TRAINED, CONVERTED, ANSWERED)
SECTIONS = {*KINDS_WITH_SETTINGS, DATASET, "vocabulary", "test", "groups"}
# What the duration of a training step does not depend on.
NOT_TIMED = ("learning_rate", "max_steps", "seed")


@dataclass(frozen=True)
class Reference:
    """Rows of another group: those whose settings are these."""

    group: str
    settings: dict[str, Any]

    def matches(self, row: "Row") -> bool:
        return row.group == self.group and all(row.settings.get(name) == self.settings[name] for name in self.settings)


@dataclass(frozen=True)
class Run:
    """
    What is done once, however many groups want it.

    Args:
        kind (`str`): One of `KINDS`.
        settings (`dict`): All its settings.
        source (`str`, *optional*): Name of the run whose model it takes.
    """

    kind: str
    settings: dict[str, Any]
    source: str | None = None

    @property
    def name(self) -> str:
        """Tells it from all others: the same settings give the same name, and others another."""
        content = json.dumps([self.kind, self.settings, self.source], sort_keys=True)
        words = [
            self.settings.get("notation", self.source),
            self.kind,
            hashlib.sha256(content.encode()).hexdigest()[:8],
        ]
        return "-".join(re.sub(r"[^a-z0-9]+", "-", str(word).lower()).strip("-") for word in words)

    @property
    def steps(self) -> int:
        """Of training."""
        return _steps(self.kind, self.settings)


@dataclass(frozen=True)
class Row:
    """
    One combination of a group's settings.

    Args:
        group (`str`): Its group.
        kind (`str`): One of `KINDS`.
        settings (`dict`): As far as they are known beforehand.
        best_in ([`Reference`], *optional*): Rows of which the best has the learning rate.
        source ([`Reference`], *optional*): The row whose model is taken.
    """

    group: str
    kind: str
    settings: dict[str, Any]
    best_in: Reference | None = None
    source: Reference | None = None

    @property
    def steps(self) -> int:
        """Of training."""
        return _steps(self.kind, self.settings)

    @property
    def timed(self) -> Run:
        """The run that times a step of this training, if the protocol has it."""
        return Run(TIMED, timed_settings(self.settings))

    @property
    def references(self) -> list[Reference]:
        return [reference for reference in (self.best_in, self.source) if reference is not None]


@dataclass(frozen=True)
class Protocol:
    """
    Args:
        hash (`str`): A hash of what the file says, whatever its comments.
        dataset (`str`): What all runs are trained and validated on: `python-stdlib`, or a file or folder of text.
        vocabulary (`int`): Tokens of the tokenizer, which all runs share.
        test (`dict[str, dict]`): Installed packages whose code is tested on: their version, and how many characters.
        transfer (`dict[str, dict]`): Other text that is tested on, apart from that: a hash, and how many characters.
        threads (`int`, *optional*): Threads of each run, so that results don't depend on how many run side by side.
        rows (`list[Row]`): Rows of all groups, in the file's order.
    """

    hash: str
    dataset: str
    vocabulary: int
    test: dict[str, dict[str, Any]]
    transfer: dict[str, dict[str, Any]]
    threads: int | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def pins(self) -> str | None:
        """A hash of the list that pins the packages' code, if that is the text."""
        return hash_pins() if self.dataset == PACKAGES else None

    @property
    def shared(self) -> dict[str, Any]:
        """What all runs of a study have to have in common."""
        names = (DATASET, "vocabulary", "test", *(name for name in (TRANSFER, "pins") if getattr(self, name)))
        return {name: getattr(self, name) for name in names}

    def select(self, only: Sequence[str] = ()) -> list[Row]:
        """
        The rows of the groups whose name begins with one of these, and all that they depend on.

        Raises:
            `UserError`: If there is no such group.
        """
        groups = dict.fromkeys(row.group for row in self.rows)
        for beginning in only:
            if not any(group.startswith(beginning) for group in groups):
                raise UserError(
                    f"--only {beginning}: no group's name begins like that. There are {', '.join(groups)}."
                )
        if only:
            chosen = [row for row in self.rows if row.group.startswith(tuple(only))]
        else:
            chosen = [row for row in self.rows if not row.group.startswith("smoke")]
        found: list[Row] = []
        while chosen:
            found += [row for row in chosen if row not in found]
            wanted = [reference for row in chosen for reference in row.references]
            chosen = [
                row for row in self.rows if row not in found and any(reference.matches(row) for reference in wanted)
            ]
        return [row for row in self.rows if row in found]


def read_protocol(path: Path) -> Protocol:
    """
    Reads a protocol.

    Raises:
        `UserError`: If it can't be read, or a group is not understood.
    """
    try:
        content = read_yaml(path)
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    except (RecipeError, OSError) as error:
        raise UserError(f"--protocol {path} can't be read: {error}") from error
    if unknown := sorted((content.keys() - {TRANSFER, THREADS}) ^ SECTIONS):
        raise UserError(f"{path}: {unknown[0]} is missing or not known. It has {', '.join(sorted(SECTIONS))}.")
    rows: list[Row] = []
    content.setdefault(TRANSFER, {})
    for name in ("test", TRANSFER, "groups", *KINDS_WITH_SETTINGS):
        _check_mapping(content[name], name, path)
    if content[DATASET] not in NAMED_TEXTS:
        content[DATASET] = str(Path(expanded(content[DATASET])).resolve())
    for group, settings in content["groups"].items():
        rows += _read_group(group, dict(_check_mapping(settings, f"group {group}", path)), content, rows, path)
    shared = (content[name] for name in (DATASET, "vocabulary", "test", TRANSFER))
    return Protocol(f"sha256:{digest}", *shared, content.get(THREADS), rows)


def resolve(rows: list[Row], finished: dict[str, StudyRun]) -> list[Run | None]:
    """
    The run of each row; `None` as long as one that it depends on is not known.

    Args:
        rows (`list[Row]`): With all that they depend on.
        finished (`dict[str, StudyRun]`): What is measured already, by name.
    """
    runs: list[Run | None] = []
    for row in rows:
        runs.append(_resolve(row, list(zip(rows, runs, strict=False)), finished))
    return runs


def timed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What the duration of a step depends on."""
    return {name: value for name, value in settings.items() if name not in NOT_TIMED}


def _steps(kind: str, settings: dict[str, Any]) -> int:
    return settings.get({TRAINED: "max_steps", CONVERTED: "heal_steps"}.get(kind, ""), 0)


def _resolve(row: Row, before: list[tuple[Row, Run | None]], finished: dict[str, StudyRun]) -> Run | None:
    settings, source = dict(row.settings), None
    if row.best_in is not None:
        rivals = [run for other, run in before if row.best_in.matches(other)]
        if not all(run is not None and run.name in finished for run in rivals):
            return None
        best = min(rivals, key=lambda run: finished[run.name].validation_nats)
        settings["learning_rate"] = best.settings["learning_rate"]
    if row.source is not None:
        (run,) = (run for other, run in before if row.source.matches(other))
        if run is None:
            return None
        source = run.name
    return Run(row.kind, settings, source)


def _read_group(group: str, settings: dict, content: dict, before: list[Row], path: Path) -> Iterator[Row]:
    sources = settings.keys() & SOURCES
    kind = SOURCES[min(sources)] if sources else TRAINED
    source = settings.pop(min(sources)) if sources else None
    is_timed = settings.pop(TIME, False)
    best_in = settings.get("learning_rate")
    best_in = settings.pop("learning_rate") if isinstance(best_in, dict) else None
    settings = {DATASET: content[DATASET], **content[kind], **settings}
    cases = [_check_mapping(case, f"group {group}: {CASES}", path) for case in settings.pop(CASES, [{}])]
    compared = dict.fromkeys((*COMPARED, *(name for case in cases for name in case)))
    lists = {name: value for name, value in settings.items() if isinstance(value, list)}
    for *values, case in itertools.product(*lists.values(), cases):  # all cases of one value, then of the next
        crossed = {**settings, **dict(zip(lists, values, strict=True)), **case}
        row = Row(
            group,
            TIMED if is_timed else kind,
            timed_settings(crossed) if is_timed else crossed,
            best_in and _refer(best_in, BEST_IN, {name: crossed.get(name) for name in compared}, group, path),
            source and _refer(source, GROUP, {name: crossed.get(name) for name in OF_A_SOURCE}, group, path),
        )
        for reference in row.references:
            count = sum(map(reference.matches, before))
            if count == 0 or (reference is row.source and count > 1):
                raise UserError(
                    f"{path}, group {group}: {count} rows before it are in the group {reference.group!r} with "
                    f"{reference.settings}, which it takes {'its models' if reference is row.source else 'its rate'} "
                    "from."
                )
        yield row


def _refer(row: Any, word: str, own: dict[str, Any], group: str, path: Path) -> Reference:
    """What a row says itself goes before what a row shares with the rows that it refers to."""
    row = dict(_check_mapping(row, f"group {group}: {word}", path))
    if word not in row:
        raise UserError(f"{path}, group {group}: {row} lacks {word}, the group that it refers to.")
    return Reference(row.pop(word), {**own, **row})


def _check_mapping(value: Any, place: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {place} is {value!r}, and has to be settings with their values.")
    return value
