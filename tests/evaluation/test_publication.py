"""A folder for the Hub: it holds what it should, nothing that should stay here, and loads elsewhere as it is here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from entropy_gpt.conversion.folding import fold
from entropy_gpt.evaluation.records.results import RESULTS, load_results
from entropy_gpt.evaluation.showing.head_plots import compare_models
from entropy_gpt.evaluation.showing.publication import (
    CARD,
    FOLDED,
    PAYLOAD,
    PICTURE,
    PublicationError,
    assemble,
    check,
    check_card,
    check_loading,
    find_private,
)
from entropy_gpt.training.tokenizer import train_tokenizer
from tests.architectures import make_model

from .example_results import example_heads, example_likelihood, example_result


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def main():\n    return 1\n"] * 3, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model("EReg(SM(t)+ScFuFFN)", vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def result():
    return example_result("mine", "EReg(SM(t)+ScFuFFN)", likelihood=example_likelihood(), heads=example_heads())


@pytest.fixture(scope="module")
def assembled(model, tokenizer, result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled") / "model"
    assemble(model, tokenizer, result, folder, "mit", "somebody/mine", "20KB", folded=fold(model))
    return folder


@pytest.fixture
def folder(assembled, tmp_path):
    return shutil.copytree(assembled, tmp_path / "model")


@pytest.mark.slow
def test_the_folder_is_whole_and_passes(folder, model, result):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert names - shards == {
        *(RESULTS, CARD, PICTURE, "config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", *PAYLOAD),
        *(f"{FOLDED}/{name}" for name in ("config.json", "generation_config.json", "model.safetensors.index.json")),
    }
    assert load_results(folder / RESULTS) == [result]
    card = (folder / CARD).read_text()
    for words in ("license: mit", 'place = "somebody/mine"', f"]({PICTURE})", f'subfolder="{FOLDED}"'):
        assert words in card
    config = json.loads((folder / "config.json").read_text())
    assert {"AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"} <= config["auto_map"].keys()
    check(folder, model, fold(model))


@torch.no_grad()
def test_the_folded_model_is_there_and_folded(folder, model):
    folded = AutoModelForCausalLM.from_pretrained(folder, subfolder=FOLDED)
    assert folded.config.notation == fold(model).config.notation != model.config.notation
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(folded(tokens).logits, model.eval()(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_another_folded_model_is_noticed(folder, model):
    other = fold(make_model("EReg(SM(t)+ScFuFFN)", vocab_size=model.config.vocab_size, initializer_range=0.5))
    other.save_pretrained(folder / FOLDED, max_shard_size="20KB")
    for path in (folder / FOLDED).glob("*.py"):
        path.unlink()
    with pytest.raises(PublicationError, match="computes other logits with folded"):
        check(folder, model, fold(model))


@pytest.mark.slow
def test_other_weights_are_noticed(folder, model):
    other = make_model("EReg(SM(t)+ScFuFFN)", vocab_size=model.config.vocab_size, initializer_range=0.5)
    with pytest.raises(PublicationError, match="computes other logits with the model"):
        check_loading(folder, other)


@pytest.mark.slow
def test_code_that_needs_this_project_is_noticed(folder, model):
    with (folder / "layers.py").open("a") as file:
        file.write("\nfrom modeling_entropy_gpt import layers\n")
    with pytest.raises(PublicationError, match="does not load without this project"):
        check(folder, model, fold(model))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "training_args.bin", "trainer_state.json", ".env", "notes.txt", "runs/log", "folded/a.py"]
)
def test_files_of_no_model_are_found(folder, name):
    assert not list(find_private(folder))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert list(find_private(folder)) == [f"{name} is no file of a published model"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf_" + "aB3" * 11, "a token of the Hub, hf_aB3aB..."),
        ("ghp_" + "aB3" * 12, "a token of GitHub, ghp_aB3a..."),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("/home/somebody/texts", "a path of somebody's home, /home/so..."),
        (r"C:\\Users\\somebody", "a path of somebody's home"),
    ],
)
def test_secrets_are_found_and_not_repeated(folder, text, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": text}))
    (complaint,) = find_private(folder)
    assert complaint.startswith(f"config.json holds {words}")
    assert len(text) < 30 or text not in complaint


def test_paths_of_this_machine_are_found(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in (Path.home(), Path.cwd()):
        (folder / RESULTS).write_text(json.dumps({"text": f"{place}/texts"}))
        assert f"{RESULTS} holds a path of this machine, {place}" in list(find_private(folder))


def test_words_of_a_tokenizer_are_no_paths(folder):
    (folder / "merges.txt").write_text("/home/ somebody\n/home/somebody\n")
    assert not list(find_private(folder))


@pytest.mark.parametrize("content", ["no metadata", "---\nlicense: [\n---\n", "---\nlicense: mit\n---\n"])
def test_cards_that_the_hub_would_not_read_are_noticed(tmp_path, content):
    (tmp_path / CARD).write_text(content)
    with pytest.raises(PublicationError, match=rf"{CARD} (can't be read by the Hub|names no finite score)"):
        check_card(tmp_path / CARD)


@pytest.mark.slow
def test_half_precision_survives(tokenizer, result, tmp_path):
    model = make_model("SM+ScFuFFN", vocab_size=len(tokenizer)).to(torch.bfloat16)
    assemble(model, tokenizer, result, tmp_path, folded=fold(model))
    check(tmp_path, model, fold(model))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_results_without_heads_make_no_folder(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="heads are not in its results"):
        assemble(model, tokenizer, example_result(likelihood=example_likelihood()), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_picture_is_that_of_the_heads(folder, result, tmp_path):
    compare_models([result]).savefig(tmp_path / "again.png")
    assert (folder / PICTURE).read_bytes() == (tmp_path / "again.png").read_bytes()
