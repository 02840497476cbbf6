"""`entropy-gpt diagnose` from end to end, and misused."""

import sys

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_gpt.commands.main import main
from entropy_gpt.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GPT-2 that no conversion takes."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["def main(x):"], 270)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def enter(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def enter(*words):
        monkeypatch.setattr(sys, "argv", ["entropy-gpt", "diagnose", *map(str, words)])
        capsys.readouterr()
        status = main()
        return status, capsys.readouterr()

    return enter


def test_two_pictures_and_a_table(model, enter, tmp_path):
    status, (output, errors) = enter(model, "def main(", "--head", "1,0")
    assert (status, errors) == (0, "")
    assert "mean entropy" in output
    assert "attention of head 0 in layer 1: attention/attention_1_0.png" in output
    for name in ("entropies.png", "attention_1_0.png"):
        assert (tmp_path / "attention" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["def", "--head", "2,0"], "no head 0 in a layer 2: give layer and head, from 0,0 to 1,1"),
        (["def", "--head", "1"], "--head 1: give the numbers of a layer and a head, such as 2,1."),
        (["def", "--head", "1,-1"], "--head 1,-1: give the numbers"),
        ([""], "The text has no tokens"),
        (["x" * 40], "The text has 40 tokens, and the model sees 32"),
        (["def", "--tokenizer", "nowhere/at/all"], "There is no nowhere/at/all. Check the path."),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(words, message, model, enter, tmp_path):
    status, (output, errors) = enter(model, *words)
    assert (status, output) == (1, "")
    (line,) = errors.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
