"""The model as remote code under other releases of transformers, each in an environment of its own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from entropy_gpt.conversion.tokenizer_files import save_tokenizer
from entropy_gpt.training.tokenizer import train_tokenizer
from modeling_entropy_gpt.releases import NEWEST_TESTED, OLDEST
from tests.architectures import make_model, make_tokens

from .environments import Environment, newest_release


DEEDS = Path(__file__).with_name("deeds_with_releases.py")
NOTATIONS = (
    "SM+LN+G",
    "SM+ScFuFFN",
    "EReg(SM(t)+ScFuFFN)",
    "EReg(SM(t_h)+StaticLN+LearnableLeakyR+ScFFN)",
    "SM+ScFFN+WN(QKV+FFN)",
    "SM+ScFuFFN+SN(QKVO+FFN)",
)
TOO_OLD = ("4.57.6", "5.0.0")
MIDDLE = "5.10.4"
BEFORE_THE_CACHE_WAS_RENAMED = "5.23.0"
TEXT = "def main():\n    return 1\n"

pytestmark = pytest.mark.releases


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, vocab_size=300)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> list[Path]:
    """Models saved with their code and the tokenizer, and what they compute here."""
    folders = []
    for place, notation in enumerate(NOTATIONS):
        torch.manual_seed(place)
        model, tokens = make_model(notation, vocab_size=len(tokenizer)), make_tokens(2, 24)
        folder = tmp_path_factory.mktemp("models") / f"model_{place}"
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        with torch.no_grad():
            outputs = model(tokens, output_entropies=True)
        reference = {
            "tokens": tokens,
            "logits": outputs.logits,
            "entropies": torch.stack(outputs.attention_entropies),
        }
        save_file(reference, folder / "reference.safetensors")
        folders.append(folder)
    return folders


def do(environment: Environment, deed: str, home: Path, **arguments) -> dict:
    """What comes of a deed in an environment, with a cold cache."""
    told = json.dumps(arguments, default=str)
    printed = environment.run(DEEDS, deed, told, cwd=home, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    return json.loads(printed.splitlines()[-1])


def environment_of(release: str) -> Environment:
    return Environment(f"transformers-{release}", f"transformers=={release}", "accelerate")


@pytest.mark.parametrize("release", [OLDEST, MIDDLE, BEFORE_THE_CACHE_WAS_RENAMED, "newest"])
def test_models_are_the_same_under_each_release(release, folders, tokenizer, tmp_path, compared):
    environment = environment_of(newest_release("transformers") if release == "newest" else release)
    answers = do(environment, "use", tmp_path, folders=folders, text=TEXT)
    assert answers.pop("deprecations") == []
    for notation, answer in zip(NOTATIONS, answers.values(), strict=True):
        assert answer["remote"], notation
        assert answer["logits"] <= 1e-5, notation
        assert answer["entropies"] <= 1e-5, notation
        for pair in ("greedy", "beam", "padded", "padding", "static cache"):
            found, expected = answer[pair]
            assert found == expected, f"{notation}: {pair}"
        assert answer["unchanged"] == [], notation
        assert answer["has_penalty"] == notation.startswith("EReg"), notation
        assert answer["saved"] <= 1e-5, notation
        assert answer["ids"] == tokenizer(TEXT).input_ids, notation
    compared(
        "transformers",
        f"{len(NOTATIONS)} architectures as remote code: logits, entropies, generation with and without cache "
        "(greedy, beam, left padding, static), a Trainer step, saving",
        f"the same, logits within {max(answer['logits'] for answer in answers.values()):.0e}",
        version=environment.version_of("transformers"),
    )


@pytest.mark.parametrize("release", TOO_OLD)
def test_an_older_release_is_refused_by_name_and_loads_the_tokenizer(release, folders, tokenizer, tmp_path):
    environment = environment_of(release)
    message = do(environment, "refuse", tmp_path, folder=folders[0])["message"]
    assert f"transformers>={OLDEST}" in message
    assert f"found transformers=={release}" in message
    assert f"pip install 'transformers>={OLDEST},<={NEWEST_TESTED}'" in message
    encoded = do(environment, "encode", tmp_path, folder=folders[0], text=TEXT)
    assert encoded["ids"] == tokenizer(TEXT).input_ids


def test_the_newest_release_is_tested():
    assert newest_release("transformers") == NEWEST_TESTED, "set NEWEST_TESTED once the tests above pass with it"
