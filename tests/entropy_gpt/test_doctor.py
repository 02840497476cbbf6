"""`entropy-gpt doctor`: here, in environments that lack or break something, and with Hubs of several kinds."""

import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from entropy_gpt.terminal import doctor as doctor_job
from entropy_gpt.terminal.doctor import (
    CORE,
    EXTRAS,
    Finding,
    Mark,
    Section,
    ask_hub,
    describe_torch,
    is_failure,
    list_modules,
    list_requirements,
    look_at_disk,
    look_at_engine,
    look_at_folder,
    look_at_hub,
    look_at_machine,
    look_at_packages,
    try_gpu,
)
from entropy_gpt.terminal.separate_process import Reported, in_process
from tests.hub_server import TOKEN, USER, WRONG_TOKEN
from tests.slow import slow_cases

from .forks import run_command


COMMAND = Path(sys.executable).with_name("entropy-gpt")
ROOT = Path(__file__).parents[2]
# What a command may not need to tell that it is missing.
EXTRA_MODULES = ("datasets", "peft", "accelerate", "evaluate", "jinja2", "lm_eval", "matplotlib", "spu", "jax", "onnx")
INSTALL_EVAL = 'pip install "entropy-gpt[eval]"'
SECONDS = 60


def run(*arguments, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([COMMAND, "doctor", *arguments], capture_output=True, text=True, env=environment)


def install(folder: Path, name: str, version: str, code: str | None = "", requirements: tuple[str, ...] = ()):
    """Puts a distribution into a folder, with a module of its name unless its code is `None`."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Requires-Python: >=3.11"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    (information / "METADATA").write_text("\n".join(lines) + "\n")
    if code is not None:
        (folder / f"{name}.py").write_text(code)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Callable:
    """Makes another project of this one's name be found, here and by all processes, which needs what it is told."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)

    def make(*requirements: str):
        install(tmp_path, "entropy_gpt", "9.9", code=None, requirements=requirements)

    return make


def marks(section: Section) -> dict[str, Mark]:
    return {finding.subject: finding.mark for finding in section.findings}


def found(section: Section, subject: str) -> str:
    return next(finding.found for finding in section.findings if finding.subject == subject)


@pytest.mark.slow
@pytest.mark.private
def test_all_is_well_here(hub, tmp_path):
    pytest.importorskip("spu")
    required = [word for part in ("train", "eval", "private", "onnx", "hub") for word in ("--require", part)]
    result = run(*required, environment=hub.environment(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "Everything works."
    assert {line.split()[0] for line in lines if line[:1].islower() and "   " in line} == {"ok"}
    for requirement in requirements_of_the_project():
        assert any(line.startswith(f"ok      {requirement.name} ") for line in lines), requirement
    assert any(line.startswith("ok      two processes answered in ") for line in lines)
    assert any(line == f"ok      {hub.endpoint} reached" for line in lines)
    assert any(line.split() == ["ok", "token", "of", USER] for line in lines)
    assert TOKEN not in result.stdout + result.stderr


def requirements_of_the_project() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]

    def read(lines: list[str]) -> Iterator[Requirement]:
        for requirement in map(Requirement, lines):
            if requirement.name == project["name"]:  # it brings what others of its extras bring
                yield from (part for extra in requirement.extras for part in read(optional[extra]))
            else:
                yield requirement

    return [
        requirement for group in (project["dependencies"], *map(optional.get, EXTRAS)) for requirement in read(group)
    ]


def test_what_is_needed_is_what_the_project_declares():
    ours = [requirement for group in (CORE, *EXTRAS) for requirement in list_requirements(group)]
    declared = requirements_of_the_project()
    held = [requirement for requirement in declared if not requirement.marker or requirement.marker.evaluate()]
    assert [(one.name, one.specifier) for one in ours] == [(one.name, one.specifier) for one in held]
    assert len(ours) > 10


@pytest.mark.slow
class TestWithTheCoreAlone:
    """As a command, where no package of an extra can be imported and there is no network."""

    @pytest.fixture
    def environment(self, project, tmp_path, hub) -> dict[str, str]:
        project("here>=1", 'gone>=2; extra == "eval"')
        install(tmp_path, "here", "1.5")
        for module in EXTRA_MODULES:
            (tmp_path / f"{module}.py").write_text("raise ImportError('not here')")
        return hub.environment(tmp_path / "home", HF_ENDPOINT=closed_endpoint())

    def test_what_is_missing_is_a_note(self, environment):
        result = run(environment=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stderr == ""
        lines = result.stdout.splitlines()
        assert lines[-1].startswith("Everything installed works. Missing: ")
        assert {"eval", "private", "hub"} <= {*lines[-1].removesuffix(".").replace(",", "").split()}
        assert "ok      here          1.5 (>=1)" in lines
        assert "missing gone          not installed (>=2)" in lines
        assert f"        {INSTALL_EVAL}" in lines
        assert any("not tried: private missing" in line for line in lines)

    def test_what_is_required_and_missing_is_a_failure(self, environment):
        result = run("--require", "hub", "--require", "eval", environment=environment)
        assert result.returncode == 1
        assert result.stdout.splitlines()[-1] == "Failed: eval, hub. The remedies are above."


def test_an_unknown_part_is_refused_with_what_is_allowed():
    result = run_command("doctor", "--require", "gpu")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert all(f"'{part}'" in line for part in ("gpu", "train", "eval", "private", "onnx", "hub"))


def test_help_shows_an_example():
    result = run_command("doctor", "--help")
    assert result.returncode == 0
    assert "Example: entropy-gpt doctor --require train" in result.stdout


class TestPackages:
    def test_in_range(self, project, tmp_path):
        project('one<2,>=1; extra == "eval"', 'two; extra == "train"')
        install(tmp_path, "one", "1.9.dev3+local")
        section = look_at_packages("eval")
        assert section == Section("eval", [Finding(Mark.ok, "one", "1.9.dev3+local (<2,>=1)")], [], "eval")

    def test_out_of_range_in_an_extra_that_is_there(self, project, tmp_path):
        project('one>=2; extra == "eval"', 'two>=2; extra == "eval"')
        install(tmp_path, "one", "1.9")
        install(tmp_path, "two", "2.0")
        section = look_at_packages("eval")
        assert marks(section) == {"one": Mark.failed, "two": Mark.ok}
        assert found(section, "one") == "1.9, which is not >=2"
        assert section.remedies == [INSTALL_EVAL]
        assert is_failure(section, [])

    def test_of_another_version_in_an_extra_that_nobody_installed(self, project, tmp_path):
        project('one>=2; extra == "eval"', 'two>=2; extra == "eval"')
        install(tmp_path, "one", "1.9")
        section = look_at_packages("eval")
        assert marks(section) == {"one": Mark.missing, "two": Mark.missing}
        assert section.remedies == [INSTALL_EVAL]
        assert not is_failure(section, [])
        assert is_failure(section, ["eval"])

    def test_missing_or_out_of_range_in_the_core(self, project, tmp_path):
        project("one>=2", "two>=2", 'three>=2; extra == "eval"')
        install(tmp_path, "one", "1.9")
        section = look_at_packages(CORE)
        assert marks(section) == {
            "Python": Mark.ok,
            "entropy-gpt": Mark.ok,
            "one": Mark.failed,
            "two": Mark.failed,
        }
        assert found(section, "entropy-gpt").startswith("9.9, ")
        assert section.remedies == ['pip install "entropy-gpt"']

    def test_a_shadow_of_what_is_installed(self, project, tmp_path):
        project('numpy<2; extra == "eval"')
        install(tmp_path, "numpy", "2.1.0")
        assert found(look_at_packages("eval"), "numpy") == "2.1.0, which is not <2"

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
            ("raise ValueError('two\\nlines \\x1b[31m')", "ValueError: two lines [31m"),
            ("import os; os.kill(os.getpid(), 11)", "it crashed (SIGSEGV)"),
            *slow_cases(
                ("raise SystemExit('no')", "SystemExit: no"),
                ("import os; os._exit(0)", "it ended Python"),
                ("import os; os._exit(3)", "it ended with status 3"),
                ("import time; time.sleep(60)", "not done after 4 s"),
            ),
        ],
    )
    def test_broken_on_import(self, code, message, project, tmp_path, monkeypatch):
        project(*(f'{name}>=1; extra == "eval"' for name in ("before", "broken", "behind")))
        install(tmp_path, "before", "1.0", "print('[1]')")
        install(tmp_path, "broken", "1.0", code)
        install(tmp_path, "behind", "1.0", "import os; os.write(1, b'{}\\n')")
        monkeypatch.setattr(doctor_job, "IMPORT_SECONDS", 4 if "sleep" in code else SECONDS)
        section = look_at_packages("eval")
        assert marks(section) == {"before": Mark.ok, "broken": Mark.failed, "behind": Mark.ok}
        assert found(section, "broken") == f"1.0 (>=1), can't be imported: {message}"
        assert section.remedies == ['pip install --force-reinstall "broken>=1"']
        assert is_failure(section, [])

    def test_an_extra_that_is_for_no_such_python(self, project):
        project('spu==0.9.5; python_version < "3.11" and extra == "private"')
        section = look_at_packages("private")
        assert marks(section) == {"Python": Mark.missing}
        assert section.remedies == ['in an environment of Python 3.11: pip install "entropy-gpt[private]"']
        assert is_failure(section, ["private"])

    def test_modules_by_their_own_names(self):
        modules = {"torch": ["torch"], "pyyaml": ["yaml"], "lm-eval": ["lm_eval"], "jinja2": ["jinja2"]}
        assert {package: list_modules(package) for package in modules} == modules


def closed_endpoint() -> str:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


class TestHub:
    @pytest.fixture
    def ask(self, hub, tmp_path, monkeypatch) -> Callable:
        """What is found in an environment of which this Hub is a part."""

        def look(**options) -> dict[str, Section]:
            environment = hub.environment(tmp_path, **options)
            for name in {*os.environ} - {*environment}:
                monkeypatch.delenv(name)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            sections = {section.title: section for section in look_at_hub(in_process(ask_hub, seconds=SECONDS))}
            shown = str(sections)
            assert not any(token in shown for token in (TOKEN, WRONG_TOKEN))
            return sections

        return look

    def test_reached_by_somebody(self, ask, hub):
        sections = ask()
        assert sections["hub"].findings == [Finding(Mark.ok, hub.endpoint, "reached")]
        assert sections["token"].findings == [Finding(Mark.ok, "token", f"of {USER}")]

    def test_reached_by_nobody(self, ask):
        sections = ask(token=None)
        assert sections["hub"].mark is Mark.ok
        assert sections["token"].mark is Mark.missing
        assert sections["token"].remedies == ["hf auth login"]

    def test_a_wrong_token(self, ask):
        sections = ask(token=WRONG_TOKEN)
        assert sections["hub"].mark is Mark.ok
        assert "The token from HF_TOKEN environment variable is invalid" in found(sections["token"], "token")
        assert is_failure(sections["token"], [])

    def test_a_token_that_can_not_be_sent_is_not_shown(self, ask):
        token = "hf_ünspeakable"
        sections = ask(token=token)
        assert sections["hub"].mark is Mark.ok
        assert "speakable" not in str(sections)

    def test_nobody_there(self, ask):
        endpoint = closed_endpoint()
        sections = ask(HF_ENDPOINT=endpoint)
        assert "Connection refused" in found(sections["hub"], endpoint)
        assert not is_failure(sections["hub"], [])
        assert is_failure(sections["hub"], ["hub"])
        assert found(sections["token"], "token") == "present; its owner is unknown"

    @pytest.mark.slow
    def test_silence(self, ask):
        with socket.create_server(("127.0.0.1", 0)) as server:
            endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
            section = ask(HF_ENDPOINT=endpoint)["hub"]
        assert section.mark is Mark.missing
        assert "Timeout" in found(section, endpoint)

    def test_out_of_order(self, ask, hub):
        hub.fail("GET /api/whoami", 503, times=9)
        assert ask()["hub"].findings == [Finding(Mark.missing, hub.endpoint, "answers with status 503")]

    def test_offline(self, ask, hub):
        section = ask(HF_HUB_OFFLINE="1")["hub"]
        assert section.findings == [Finding(Mark.missing, hub.endpoint, "not checked, because HF_HUB_OFFLINE is set")]
        assert hub.requests == []
        assert is_failure(section, ["hub"])


class TestEngine:
    @pytest.mark.parametrize(
        ("reported", "mark"),
        [
            (Reported([{"seconds": 1.0, "error": 0.001}]), Mark.ok),
            (Reported([{"seconds": 1.0, "error": 1.0}]), Mark.failed),
            (Reported([{"seconds": 1.0, "error": float("nan")}]), Mark.failed),
            (Reported([], "not done after 120 s"), Mark.failed),
            (Reported([], "ModuleNotFoundError: No module named 'datasets'"), Mark.missing),
        ],
    )
    def test_is_judged_by_its_answer(self, reported, mark):
        assert doctor_job.judge_answer(reported).mark is mark

    def test_is_not_tried_where_it_can_not_work(self):
        absent = Section("private", [Finding(Mark.missing, "spu", "not installed")])
        section = look_at_engine([Section(CORE, [Finding(Mark.ok, "torch", "2")]), absent])
        assert section.findings == [Finding(Mark.missing, "two processes", "not tried: private missing")]
        assert is_failure(section, ["private"])


class TestGpu:
    DEVICE = {"device": "NVIDIA H200, 150.1 GB", "obstacle": None}

    @pytest.mark.parametrize(
        ("reported", "mark", "words"),
        [
            (Reported(), Mark.failed, "none visible to torch"),
            (Reported([], "ModuleNotFoundError: No module named 'torch'"), Mark.failed, "No module named 'torch'"),
            (Reported([{**DEVICE, "obstacle": "triton is not installed"}]), Mark.failed, "triton is not installed"),
            (Reported([DEVICE], "RuntimeError: Failed to find C compiler"), Mark.failed, "Failed to find C compiler"),
            (Reported([DEVICE, {"error": 0.1, "seconds": 2.0}]), Mark.failed, "1.0e-01 nats"),
            (Reported([DEVICE, {"error": float("nan"), "seconds": 2.0}]), Mark.failed, "nan nats"),
            (Reported([DEVICE, {"error": 1e-6, "seconds": 2.0}]), Mark.ok, "1.0e-06 nats from float64; 2.0 s"),
        ],
    )
    def test_is_judged_by_what_it_computes(self, reported, mark, words):
        section = doctor_job.judge_gpu(reported)
        assert section.mark is mark
        assert is_failure(section, []) == (mark is Mark.failed)
        assert words in str(section.findings)

    def test_what_its_tests_need_is_named(self, monkeypatch):
        monkeypatch.setattr(doctor_job, "find_version", lambda name: None if name == "hypothesis" else "1")
        section = doctor_job.judge_gpu(Reported([self.DEVICE, {"error": 1e-6, "seconds": 2.0}]))
        assert section.findings[-1] == Finding(Mark.failed, "for tests", "not installed: hypothesis")
        assert section.remedies == ["pip install hypothesis"]

    def test_the_machine_says_how_entropies_are_computed(self):
        values = [{"threads": 2, "capability": "AVX2", "devices": []}, {"entropies": "computed in blocks"}]
        assert found(look_at_machine(Reported(values)), "entropies") == "computed in blocks"

    def test_this_machine(self):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        (_, told) = describe_torch()
        assert told == {"entropies": "computed in blocks, not by the kernel: there is none for cpu"}
        assert [*try_gpu()] == []


def test_the_machine_where_torch_is_broken():
    assert [*marks(look_at_machine(Reported()))] == ["processor", "instructions", "memory"]


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """To anybody, for whom no permissions hold too."""
    folder = Path("/proc")
    if not folder.is_dir():
        pytest.skip("needs Linux")
    yield folder


def test_folders(tmp_path, unwritable, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "not" / "there"
    section = look_at_disk(Reported([{"home": str(cache)}]))
    assert marks(section) == {"this folder": Mark.ok, "Hub's cache": Mark.ok}
    assert found(section, "Hub's cache").startswith(f"{cache}, ")
    assert [*tmp_path.iterdir()] == []
    finding = look_at_folder("this folder", unwritable / "none")
    assert finding.mark is Mark.missing
    assert "can't be written to" in finding.found


def test_too_little_memory_and_disk_are_warned_of(tmp_path, monkeypatch):
    assert doctor_job.judge_memory(int(16e9), int(8e9)).mark is Mark.ok
    scarce = doctor_job.judge_memory(int(8e9), int(1e9))
    assert (scarce.mark, scarce.found) == (Mark.missing, "8.0 GB, 1.0 GB available; the quickstart takes up to 4.0 GB")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1e8)))
    full = look_at_folder("this folder", tmp_path)
    assert full.mark is Mark.missing
    assert full.found.endswith("100.0 MB free; models and checkpoints take 2.0 GB")
