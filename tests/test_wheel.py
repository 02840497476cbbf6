"""The project as users have it: a wheel in an environment of its own, beside folders with the names of ours."""

import email
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from .wheel import ROOT, build_wheel


# Files for who works in a clone alone.
LEFT_OUT = {".gitignore", ".dockerignore"}
FOLDERS = ("training", "evaluation", "conversion")
SCRIPT = """
import conversion, evaluation.mine, training.trainer
import entropy_gpt.conversion.folding, entropy_gpt.evaluation.records.results, entropy_gpt.training.trainer
import modeling_entropy_gpt

assert training.trainer.MINE and evaluation.mine.MINE and conversion.MINE
print(entropy_gpt.training.trainer.EntropyTrainer.__module__, modeling_entropy_gpt.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, and this one's packages but for the project."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # A path in a .pth file is searched, and what its own .pth files say is not done: no editable installation.
    (Path(paths["purelib"]) / "shared.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--force-reinstall"]
    subprocess.run([*pip, "install", *options, wheel], check=True)
    return folder / "bin"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A user's folder, with packages and a module that are called as some of ours."""
    for name in FOLDERS[:2]:
        (tmp_path / name).mkdir()
    (tmp_path / "training" / "__init__.py").touch()
    (tmp_path / "training" / "trainer.py").write_text("MINE = True\n")
    (tmp_path / "evaluation" / "mine.py").write_text("MINE = True\n")
    (tmp_path / "conversion.py").write_text("MINE = True\n")
    return tmp_path


def run(*command, folder: Path) -> str:
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_wheel_takes_two_names_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"entropy_gpt", "modeling_entropy_gpt"}


def test_the_wheel_holds_every_module(wheel):
    wanted = {
        f"entropy_gpt/{path.relative_to(ROOT).as_posix()}"
        for name in FOLDERS
        for path in (ROOT / name).rglob("*.py")
        if "benchmarks" not in path.parts
    }
    wanted |= {
        path.relative_to(ROOT).as_posix()
        for name in ("entropy_gpt", "modeling_entropy_gpt")
        for path in (ROOT / name).rglob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
    assert held == wanted


@pytest.mark.slow
def test_the_sdist_holds_tests_and_documentation_and_makes_the_same_wheel(wheel, tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = {*filter(None, listed.split("\0"))}
    clone = tmp_path / "clone"
    for name in files:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    build = "from setuptools.build_meta import build_{0}; build_{0}('built')"
    subprocess.run([sys.executable, "-c", build.format("sdist")], cwd=clone, check=True, capture_output=True)
    (archive,) = (clone / "built").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    held = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert files - held <= LEFT_OUT
    subprocess.run([sys.executable, "-c", build.format("wheel")], cwd=source, check=True, capture_output=True)
    (again,) = (source / "built").glob("*.whl")
    assert {*zipfile.ZipFile(wheel).namelist()} == {*zipfile.ZipFile(again).namelist()}


def test_what_an_index_shows_of_the_project(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Programming Language :: Python :: 3.11" in metadata.get_all("Classifier")
    assert "Topic :: Scientific/Engineering :: Artificial Intelligence" in metadata.get_all("Classifier")
    assert {"train", "eval", "tasks", "private", "onnx", "tensorboard", "all"} <= {*metadata.get_all("Provides-Extra")}


@pytest.mark.slow
def test_a_script_beside_folders_with_our_names(environment, folder):
    (folder / "script.py").write_text(SCRIPT)
    module, payload = run(environment / "python", "script.py", folder=folder).split()
    assert module == "entropy_gpt.training.trainer"
    assert Path(payload).is_relative_to(environment.parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--version"], "entropy-gpt"),
        (["train"], "python-stdlib-small"),
        (["private", "cost", "SM+ScFuFFN", "--n-layer", "1"], "exponential"),
        (["study", "--dry-run"], "runs/study"),
        (["report", str(ROOT / "model_cards/results/quickstart.json"), "-o", "page.md"], "page.md"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_from_a_folder_with_our_names(environment, folder, words, said):
    assert said in run(environment / "entropy-gpt", *words, folder=folder)


@pytest.mark.slow
@pytest.mark.private
def test_private_answers_from_a_folder_with_our_names(environment, folder):
    """Its parties are processes of their own."""
    pytest.importorskip("spu")
    words = ["private", "demo", ROOT / "model_cards" / "models" / "converted", "--prompt", "def"]
    assert "in the clear" in run(environment / "entropy-gpt", *words, folder=folder)
