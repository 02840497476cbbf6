"""transformers' own tests of a model, from the source package of a release: EntropyGPT passes what GPT-2 passes."""

import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

import modeling_entropy_gpt

from .environments import Environment, newest_release


SUITE = Path(__file__).with_name("suite_of_transformers.py")

# Tests of the suite that are this project's.
OWN = {
    "test_greedy_generation_is_the_same_in_every_way",
    "test_what_generation_returns_is_what_one_pass_computes",
}
# What is skipped although it is not for GPT-2; the suite says why.
SKIPPED = {"SpectralNormTest": Counter(test_init_weights_can_init_buffers=1)}

pytestmark = pytest.mark.releases


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
        timeout=3600,
        PYTHONPATH=str(source),
        HF_HOME=str(tmp_path / "home"),
        HF_HUB_OFFLINE="1",
    )

    skips = read_skips(report)
    gpt2 = skips.pop("GPT2Test")
    assert gpt2.keys() >= OWN
    assert SKIPPED.keys() <= skips.keys()
    for architecture, skipped in skips.items():
        allowed = gpt2 + SKIPPED.get(architecture, Counter())
        assert skipped.keys() == gpt2.keys()
        assert skipped <= allowed, f"{architecture} skips {skipped - allowed}"
        assert not any(skipped[name] for name in OWN)
    ours, theirs, tests = max(map(count_skipped, skips.values())), count_skipped(gpt2), len(gpt2.keys() - OWN)
    compared(
        "transformers",
        f"its own tests of a model (test_modeling_common.py, test_training_mixin.py), {len(skips)} architectures; "
        "its source package has no tests of generation and exporters",
        f"each: at least {tests - ours} passed, at most {ours} skipped, one of them with SN alone "
        f"(GPT-2: {tests - theirs} passed, {theirs} skipped)",
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
