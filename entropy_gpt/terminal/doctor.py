"""
Checks this environment and machine, and prints what works.

Checks that may crash or hang run in separate processes, which report their findings as lines of JSON.
"""

import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from importlib.metadata import PackageNotFoundError, distribution, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.markup import escape

from .extras import Part
from .progress import format_bytes, progress_display
from .separate_process import Reported, in_process, shorten


PROJECT = "entropy-gpt"
CORE = "core"
EXTRAS = (Part.train, Part.eval, Part.tasks, Part.private, Part.onnx)
# Time limits of separate processes, long enough for a slow disk with an empty cache.
IMPORT_SECONDS, HUB_SECONDS, ENGINE_SECONDS, GPU_SECONDS = 120, 30, 120, 300
# Bytes that the quickstart takes with its private answers, and that a conversion of GPT-2 small leaves and downloads.
NEEDED_MEMORY, NEEDED_DISK = 4e9, 2e9
# How long the Hub may take to reply.
ANSWER_SECONDS = 5
# The instruction sets that torch uses, by their names in Linux.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "bf16", "i8mm", "sve")
# The tolerated difference between private logits and those in the clear, whose magnitude is a few units.
TOLERATED_ERROR = 0.05
# The tolerated difference, in nats, between entropies of the kernel in bfloat16 and those in float64.
TOLERATED_NATS = 1e-3
# What the tests that need a GPU are run with.
TESTING = ("pytest", "hypothesis", "accelerate", "datasets")

console = Console()


class Mark(IntEnum):
    """The state of something; a worse one is larger."""

    ok = 0
    missing = 1
    failed = 2


STYLES = {Mark.ok: "green", Mark.missing: "yellow", Mark.failed: "bold red"}


@dataclass(frozen=True)
class Finding:
    """
    One line of the output.

    Args:
        mark ([`Mark`]): The state of the subject.
        subject (`str`): What was checked.
        found (`str`): What was found.
    """

    mark: Mark
    subject: str
    found: str


@dataclass(frozen=True)
class Section:
    """
    The findings about one topic.

    Args:
        title (`str`): The topic.
        findings (`list[Finding]`): At least one.
        remedies (`Sequence[str]`): Commands that fix what is missing or has failed.
        part ([`Part`], *optional*): The part of the project that needs the whole section.
    """

    title: str
    findings: list[Finding]
    remedies: Sequence[str] = ()
    part: Part | None = None

    @property
    def mark(self) -> Mark:
        """The worst mark of the findings."""
        return max(finding.mark for finding in self.findings)


def run(required: Sequence[Part], gpu: bool = False) -> bool:
    """
    Checks everything, and prints the findings.

    Args:
        required (`Sequence[Part]`): The parts that must not be missing.
        gpu (`bool`): Whether to check also what `make gpu` needs, which must not be missing either.

    Returns:
        `bool`: Whether nothing failed and no required part is missing.
    """
    sections = []
    for section in look(gpu):
        show(section)
        sections.append(section)
    failed = [section for section in sections if is_failure(section, required)]
    missing = [section for section in sections if section.mark is Mark.missing and section not in failed]
    console.print()
    if failed:
        console.print(f"Failed: {_titles(failed)}. The remedies are above.", style=STYLES[Mark.failed], soft_wrap=True)
    elif missing:
        console.print(
            f"Everything installed works. Missing: {_titles(missing)}.", style=STYLES[Mark.missing], soft_wrap=True
        )
    else:
        console.print("Everything works.", style=STYLES[Mark.ok])
    return not failed


def is_failure(section: Section, required: Sequence[Part]) -> bool:
    return section.mark is Mark.failed or (section.mark is Mark.missing and section.part in required)


def look(gpu: bool) -> Iterator[Section]:
    """Runs all checks, and yields each section as soon as it and those before it are complete."""
    with progress_display(console, transient=True) as progress:
        with progress.stage("importing the installed packages"), ThreadPoolExecutor(usable_cores() + 1) as pool:
            hub = pool.submit(in_process, ask_hub, seconds=HUB_SECONDS)
            torch = pool.submit(in_process, describe_torch, seconds=IMPORT_SECONDS)
            packages = {}
            for section in pool.map(look_at_packages, (CORE, *EXTRAS)):
                packages[section.title] = section
                yield section
            yield look_at_machine(torch.result())
            yield look_at_disk(hub.result())
            yield from look_at_hub(hub.result())
        with progress.stage("two processes answer a secret prompt"):
            yield look_at_engine([packages[CORE], packages[Part.private]])
        if gpu:
            with progress.stage("the GPU computes entropies"):
                yield judge_gpu(in_process(try_gpu, seconds=GPU_SECONDS))


def show(section: Section):
    console.print(f"\n[bold]{escape(section.title)}[/bold]")
    for finding in section.findings:
        mark = f"[{STYLES[finding.mark]}]{finding.mark.name:7}[/]"
        console.print(f"{mark} {escape(finding.subject):13} {escape(finding.found)}", highlight=False, soft_wrap=True)
    for remedy in section.remedies:
        console.print(f"        {escape(remedy)}", style="bold", highlight=False, soft_wrap=True)


def _titles(sections: list[Section]) -> str:
    return ", ".join(section.title for section in sections)


def look_at_packages(group: str) -> Section:
    """Checks the packages of an extra, or Python and the packages of the core."""
    needed = list_requirements(group)
    if group == CORE:
        return _judge_packages(CORE, needed, Mark.failed, f'pip install "{PROJECT}"', look_at_python())
    install = f'pip install "{PROJECT}[{group}]"'
    if not needed:
        finding = Finding(Mark.missing, "Python", f"{platform.python_version()}, for which this extra has no packages")
        return Section(group, [finding], [f"in an environment of Python 3.11: {install}"], Part(group))
    return _judge_packages(group, needed, Mark.missing, install, [])


def look_at_python() -> list[Finding]:
    """The versions and places of Python and of this project."""
    current, supported = platform.python_version(), metadata(PROJECT)["Requires-Python"]
    mark = Mark.ok if SpecifierSet(supported).contains(current, prereleases=True) else Mark.failed
    return [
        Finding(mark, "Python", f"{current} ({supported}), {sys.prefix}"),
        Finding(Mark.ok, PROJECT, f"{version(PROJECT)}, {Path(__file__).resolve().parents[2]}"),
    ]


def list_requirements(group: str) -> list[Requirement]:
    """The requirements that the installed project declares for this Python: those of the core, or of an extra."""

    def holds(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    needed = [Requirement(line) for line in requires(PROJECT)]
    core = [requirement for requirement in needed if holds(requirement, "")]
    if group == CORE:
        return core
    own, others = [], []
    for requirement in needed:
        if requirement not in core and holds(requirement, group):
            (own if canonicalize_name(requirement.name) == PROJECT else others).append(requirement)
    # An extra that asks for others of the project brings what they bring.
    return [part for each in own for extra in sorted(each.extras) for part in list_requirements(extra)] + others


def _judge_packages(
    group: str, needed: list[Requirement], absent: Mark, install: str, findings: list[Finding]
) -> Section:
    """Adds a finding for each package of a group. A package that is not installed gets the mark `absent`."""
    versions = {requirement.name: find_version(requirement.name) for requirement in needed}
    errors = import_packages([name for name, found in versions.items() if found])
    # If an extra is only partly installed, it counts as not requested: its packages may belong to something else.
    outside = absent if None in versions.values() else Mark.failed
    remedies = []
    for requirement in needed:
        name, supported, found = requirement.name, requirement.specifier, versions[requirement.name]
        if found is None:
            findings.append(Finding(absent, name, f"not installed ({supported})"))
            remedies.append(install)
        elif not supported.contains(found, prereleases=True):
            findings.append(Finding(outside, name, f"{found}, which is not {supported}"))
            remedies.append(install)
        elif name in errors:
            findings.append(Finding(Mark.failed, name, f"{found} ({supported}), can't be imported: {errors[name]}"))
            remedies.append(f'pip install --force-reinstall "{name}{supported}"')
        else:
            findings.append(Finding(Mark.ok, name, f"{found} ({supported})"))
    return Section(group, findings, [*dict.fromkeys(remedies)], Part(group) if group in EXTRAS else None)


def find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def import_packages(packages: list[str]) -> dict[str, str]:
    """Imports packages in separate processes, and returns the error of each one that can't be imported."""
    errors, left = {}, packages
    while left:
        reported = in_process(import_modules, [[name, *list_modules(name)] for name in left], seconds=IMPORT_SECONDS)
        said = dict(reported.values)
        left = [name for name in left if name not in said]
        if left:  # the first of them ended the process
            said[left.pop(0)] = reported.ending or "it ended Python"
        errors |= {name: error for name, error in said.items() if error}
    return errors


def list_modules(package: str) -> list[str]:
    """The modules of a package: the one with its name, or those that it declares."""
    own = canonicalize_name(package).replace("-", "_")
    declared = (distribution(package).read_text("top_level.txt") or own).split()
    return [own] if own in declared else [module for module in declared if not module.startswith("_")]


def import_modules(packages: list[list[str]]) -> Iterator[list[str]]:
    """Yields each package with the error of its import, which may be empty. Runs in a separate process."""
    for package, *modules in packages:
        error = ""
        try:
            for module in modules:
                importlib.import_module(module)
        except (Exception, SystemExit) as raised:
            error = shorten(f"{type(raised).__name__}: {raised}")
        yield [package, error]


def look_at_machine(torch: Reported) -> Section:
    """Processor, memory and GPU, as the system and torch report them."""
    cpu, memory = read_table(Path("/proc/cpuinfo")), read_table(Path("/proc/meminfo"))
    name = cpu.get("model name") or platform.processor() or platform.machine()
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    facts = {
        "processor": f"{name}, {usable_cores()} usable cores",
        "instructions": " ".join(feature for feature in FEATURES if feature in flags) or "unknown",
    }
    known = torch.facts
    if known:
        facts["torch"] = f"{known['threads']} threads, instruction set {known['capability']}"
        facts["GPU"] = ", ".join(known["devices"]) or "none visible to torch"
    if "entropies" in known:
        facts["entropies"] = known["entropies"]
    findings = [Finding(Mark.ok, subject, found) for subject, found in facts.items()]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = 1024 * int(memory["MemAvailable"].split()[0]) if "MemAvailable" in memory else total
    return Section("machine", [*findings, judge_memory(total, available)])


def judge_memory(total: int, available: int) -> Finding:
    found = f"{format_bytes(total)}, {format_bytes(available)} available"
    if available < NEEDED_MEMORY:
        return Finding(Mark.missing, "memory", f"{found}; the quickstart takes up to {format_bytes(NEEDED_MEMORY)}")
    return Finding(Mark.ok, "memory", found)


def usable_cores() -> int:
    """The number of cores that this process may use, where the system knows it; otherwise, all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def read_table(path: Path) -> dict[str, str]:
    """Reads a file of Linux with `name: value` lines. The first line of a name counts; other systems have no file."""
    if not path.exists():
        return {}
    pairs = (line.partition(":") for line in reversed(path.read_text(encoding="utf-8").splitlines()))
    return {name.strip(): value.strip() for name, _, value in pairs}


def describe_torch() -> Iterator[dict]:
    """Yields what torch knows about this machine. Runs in a separate process."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    devices += ["MPS"] * torch.backends.mps.is_available()
    capability = torch.backends.cpu.get_cpu_capability()
    yield {"capability": capability, "threads": torch.get_num_threads(), "devices": devices}

    from modeling_entropy_gpt.blockwise_attention import obstacle_to_kernel

    obstacle = obstacle_to_kernel(torch.device(_device()), torch.bfloat16, 64)
    yield {
        "entropies": "computed in one kernel, for every attention function"
        if obstacle is None
        else f"computed in blocks, not by the kernel: {obstacle}"
    }


def _device() -> str:
    """The kind of device that torch computes on where nothing is said."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def look_at_disk(hub: Reported) -> Section:
    """Checks the folders that are written to by default."""
    findings = [look_at_folder("this folder", Path.cwd())]
    findings += [look_at_folder("Hub's cache", Path(known["home"])) for known in hub.values[:1]]
    return Section("disk", findings)


def look_at_folder(subject: str, folder: Path) -> Finding:
    """Checks a folder's free space and whether it is writable; if it does not exist, its nearest parent's."""
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {format_bytes(free)} free"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(Mark.missing, subject, f"{found}, can't be written to: {error.strerror}")
    if free < NEEDED_DISK:
        return Finding(Mark.missing, subject, f"{found}; models and checkpoints take {format_bytes(NEEDED_DISK)}")
    return Finding(Mark.ok, subject, found)


def look_at_hub(reported: Reported) -> list[Section]:
    """Judges the Hub and its token."""
    facts = reported.facts
    sections = [Section("hub", [_judge_hub(facts, reported.ending)], part=Part.hub)]
    return [*sections, _judge_token(facts)] if facts else sections


def _judge_hub(facts: dict, ending: str) -> Finding:
    if not facts:
        return Finding(Mark.missing, "Hub", f"can't be checked: {ending}")
    endpoint = facts["endpoint"]
    if facts["offline"]:
        return Finding(Mark.missing, endpoint, "not checked, because HF_HUB_OFFLINE is set")
    if "status" not in facts:
        return Finding(Mark.missing, endpoint, f"not reached: {ending}")
    if facts["status"] >= 500:
        return Finding(Mark.missing, endpoint, f"answers with status {facts['status']}")
    return Finding(Mark.ok, endpoint, "reached")


def _judge_token(facts: dict) -> Section:
    if not facts["token"]:
        found = "none: public models can be loaded, but no model can be pushed"
        return Section("token", [Finding(Mark.missing, "token", found)], ["hf auth login"])
    if "refusal" in facts:
        return Section("token", [Finding(Mark.failed, "token", facts["refusal"])], ["hf auth login --force"])
    user = f"of {facts['user']}" if "user" in facts else "present; its owner is unknown"
    return Section("token", [Finding(Mark.ok, "token", user)])


def ask_hub() -> Iterator[dict]:
    """Yields the Hub's address, its reply, and the owner of the token. Runs in a separate process."""
    from huggingface_hub import constants, get_token, whoami
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    has_token, offline = get_token() is not None, constants.HF_HUB_OFFLINE
    yield {"endpoint": constants.ENDPOINT, "home": constants.HF_HOME, "offline": offline, "token": has_token}
    if offline:
        return
    # Without the token, which an error message could show.
    response = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", timeout=ANSWER_SECONDS)
    yield {"status": response.status_code}
    if not has_token:
        return
    try:
        yield {"user": whoami()["name"]}
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            yield {"refusal": shorten(str(error))}


def look_at_engine(needed: list[Section]) -> Section:
    """Runs a tiny inference between two processes, and compares it with the clear."""
    if lacking := [section for section in needed if section.mark is not Mark.ok]:
        finding = Finding(Mark.missing, "two processes", f"not tried: {_titles(lacking)} missing")
        return Section("private engine", [finding], part=Part.private)
    reported = in_process(answer_privately, seconds=ENGINE_SECONDS)
    remedies = [f'pip install "{PROJECT}[all]"'] if _lacks_a_module(reported) else []
    return Section("private engine", [judge_answer(reported)], remedies, Part.private)


def judge_answer(reported: Reported) -> Finding:
    if not reported.values:
        return Finding(Mark.missing if _lacks_a_module(reported) else Mark.failed, "two processes", reported.ending)
    (answer,) = reported.values
    found = f"answered in {answer['seconds']:.1f} s; logits differ by {answer['error']:.4f} from those in the clear"
    return Finding(Mark.ok if answer["error"] < TOLERATED_ERROR else Mark.failed, "two processes", found)


def _lacks_a_module(reported: Reported) -> bool:
    return reported.ending.startswith(ModuleNotFoundError.__name__)


def answer_privately() -> Iterator[dict]:
    """Yields the error and the seconds of a private inference. Runs in a separate process."""
    import numpy as np

    from entropy_gpt.evaluation.private_inference.costs.measured_inference import make_config, make_random_model
    from entropy_gpt.evaluation.private_inference.inference import PLAINTEXT, TWO_PARTY, PrivateModel

    config = make_config("SM+ScFuFFN", context=8, n_layer=1, n_embd=32, n_head=2, vocab_size=64)
    private = PrivateModel(make_random_model(config))
    clear, secret = (private.infer([range(8)], mode) for mode in (PLAINTEXT, TWO_PARTY))
    yield {"error": float(np.abs(secret.answers[0] - clear.answers[0]).max()), "seconds": secret.seconds}


def judge_gpu(reported: Reported) -> Section:
    """Whether `make gpu` can run."""
    facts = reported.facts
    if not facts.get("device"):
        finding = Finding(Mark.failed, "GPU", reported.ending or "none visible to torch")
        return Section("gpu", [finding], ["on a machine with a GPU and a torch built for it: make gpu"])
    findings, remedies = [Finding(Mark.ok, "GPU", facts["device"])], []
    if facts["obstacle"] is not None:
        findings.append(Finding(Mark.failed, "kernel", f"does not serve: {facts['obstacle']}"))
        remedies += ["pip install triton"] if "not installed" in facts["obstacle"] else []
    elif "error" not in facts:
        findings.append(Finding(Mark.failed, "kernel", reported.ending))
    else:
        found = f"entropies differ by {facts['error']:.1e} nats from float64; {facts['seconds']:.1f} s, compiled anew"
        mark = Mark.ok if facts["error"] < TOLERATED_NATS else Mark.failed
        findings.append(Finding(mark, "kernel", found))
    lacking = [name for name in TESTING if find_version(name) is None]
    mark, found = (Mark.failed, f"not installed: {', '.join(lacking)}") if lacking else (Mark.ok, "installed")
    remedies += [f"pip install {' '.join(lacking)}"] if lacking else []
    return Section("gpu", [*findings, Finding(mark, "for tests", found)], remedies)


def try_gpu() -> Iterator[dict]:
    """Yields the GPU, what keeps the kernel from it, and the error of its entropies. Runs in a separate process."""
    import time

    import torch

    from modeling_entropy_gpt import entropy_attention
    from modeling_entropy_gpt.blockwise_attention import obstacle_to_kernel

    if not torch.cuda.is_available():
        return
    states = [torch.randn(2, 3, 200, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    device, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    obstacle = obstacle_to_kernel(states[0].device, torch.bfloat16, 64)
    yield {"device": f"{device}, {format_bytes(memory)}", "obstacle": obstacle}
    if obstacle is None:
        started = time.perf_counter()
        output, entropies = entropy_attention(*states, is_causal=True)
        (output.float().sum() + entropies.sum()).backward()
        _, exact = entropy_attention(*(state.detach().double() for state in states), is_causal=True)
        error = (entropies - exact).abs().max().item()
        yield {"error": error, "seconds": time.perf_counter() - started}
