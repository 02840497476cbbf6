"""The layout: which room may import from which, and that each module has one name."""

import ast
from collections.abc import Iterator
from pathlib import Path

from .wheel import FOLDERS, ROOT


# Each room imports from itself and from those before it.
ROOMS = (
    "modeling_entropy_gpt",
    "entropy_gpt.conversion",
    "entropy_gpt.training",
    "entropy_gpt.evaluation",
    "entropy_gpt.evaluation.measuring",
    "entropy_gpt.evaluation.metrics.perplexity",
    "entropy_gpt.evaluation.lm_eval_tasks",
    "entropy_gpt.evaluation.records",
    "entropy_gpt.evaluation.showing",
    "entropy_gpt.evaluation.private_inference.program",
    "entropy_gpt.evaluation.private_inference.parties",
    "entropy_gpt.evaluation.private_inference",
    "entropy_gpt.evaluation.private_inference.costs",
    "entropy_gpt.workflows",
    "entropy_gpt.gateway",
    "entropy_gpt",
    "entropy_gpt.terminal",
    "entropy_gpt.programs",
    "entropy_gpt.programs.quickstart",
    "entropy_gpt.programs.study",
    "entropy_gpt.commands",
    "entropy_gpt.evaluation.benchmarks",
)
INSTALLED = ("conversion", "training", "evaluation")


def name_of(path: Path) -> str:
    """The name under which a file's module is installed; a package's ends with `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("entropy_gpt", *parts) if parts[0] in INSTALLED else parts)


MODULES = {name_of(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def imported(name: str) -> Iterator[str]:
    """Full names of modules of this project, and of names in them, that a module imports anywhere."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(full_name: str) -> str | None:
    """The room of what is imported: a module, or a name in one."""
    for place in (full_name, full_name.rpartition(".")[0]):
        if place in MODULES:
            return place.rpartition(".")[0]
        if f"{place}.__init__" in MODULES:
            return place
    return None


def test_every_module_lies_in_a_room():
    assert {room_of(name) for name in MODULES} <= {*ROOMS}


def test_imports_go_one_way():
    wrong = {}
    for name in MODULES:
        later = ROOMS[ROOMS.index(room_of(name)) + 1 :]
        if found := [other for other in imported(name) if room_of(other) in later]:
            wrong[name] = found
    assert not wrong


def test_each_module_has_one_name():
    """In a working tree the folders could be imported by their own names too, as modules of their own."""
    assert not [name for name in MODULES for other in imported(name) if other.partition(".")[0] in INSTALLED]
