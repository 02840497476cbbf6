"""transformers' own tests of a model, from the source package of a release: EntropyGPT passes what GPT-2 passes."""

import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

import modeling_entropy_gpt

from .environments import Environment, newest_release


SUITE = Path(__file__).with_name("suite_of_transformers.py")

pytestmark = [pytest.mark.releases, pytest.mark.slow]


@pytest.mark.parametrize("release", ["5.23.0", "newest"])
def test_the_model_passes_the_tests_of_transformers_own_models(release, tmp_path, compared):
    release = newest_release("transformers") if release == "newest" else release
    environment = Environment(
        f"suite-of-transformers-{release}", f"transformers=={release}", "accelerate", "parameterized", "peft", "pytest"
    )
    report = tmp_path / "report.xml"
    source = unpack_source(environment, release, tmp_path)
    environment.run(
        *("-m", "pytest", "--quiet", "--override-ini=log_cli=0", "--disable-warnings", f"--junitxml={report}"),
        SUITE.name,
        cwd=source,
        PYTHONPATH=str(source),
        HF_HOME=str(tmp_path / "home"),
        HF_HUB_OFFLINE="1",
    )

    skips = read_skips(report)
    gpt2 = skips.pop("GPT2Test")
    for architecture, skipped in skips.items():
        assert skipped.keys() == gpt2.keys()
        assert skipped <= gpt2, f"{architecture} skips {skipped - gpt2}"
    ours, theirs = max(map(count_skipped, skips.values())), count_skipped(gpt2)
    compared(
        "transformers",
        f"its own tests of a model (test_modeling_common.py, test_training_mixin.py), {len(skips)} architectures",
        f"each: {len(gpt2) - ours} passed, {ours} skipped (GPT-2: {len(gpt2) - theirs} passed, {theirs} skipped)",
        version=release,
    )


def unpack_source(environment: Environment, release: str, folder: Path) -> Path:
    """The source package's folder, with this project's model and the suite beside its tests."""
    archive = environment.folder / f"transformers-{release}.tar.gz"
    if not archive.exists():
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary=:all:")
        environment.run("-m", "pip", "download", *options, f"--dest={archive.parent}", f"transformers=={release}")
    shutil.unpack_archive(archive, folder)
    source = folder / f"transformers-{release}"
    (source / "tests" / "__init__.py").touch()  # the package leaves it out, and a test imports the folder
    shutil.copytree(Path(modeling_entropy_gpt.__file__).parent, source / "modeling_entropy_gpt")
    shutil.copy(SUITE, source)
    return source


def read_skips(report: Path) -> dict[str, Counter]:
    """For each class of tests, how many parts of each test were skipped."""
    skips = {}
    for case in ElementTree.parse(report).iter("testcase"):
        architecture = case.get("classname").rpartition(".")[-1]
        skips.setdefault(architecture, Counter())[case.get("name")] = len(case.findall("skipped"))
    return skips


def count_skipped(skips: Counter) -> int:
    """How many tests were skipped, as a whole or in part."""
    return sum(map(bool, skips.values()))
