"""A model on the Hub, in the hands of strangers: fresh processes with what they download, and without this project."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from entropy_gpt.evaluation.measuring.remote_loading import load_in_fresh_process, save_reference
from entropy_gpt.training.tokenizer import train_tokenizer
from tests.architectures import make_model
from tests.evaluation.task_files import make_passages, write_lines
from tests.hub_server import HubServer
from tests.strangers import do, run_stranger


pytestmark = pytest.mark.slow  # processes of their own, with cold caches
NOTATION = "EReg(SM(t)+ScFuFFN)"
MODEL, SHARDED = "somebody/model", "somebody/sharded"
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{continuation}}}}"
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""


def hash_tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash and its times, and every folder."""
    return {
        str(path.relative_to(folder)): f"{path.stat().st_mtime_ns} "
        + (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder")
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """A model on the Hub, whole and in shards, whose branch has moved on to other weights since; and their answers."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["def main():\n    return 1\n"] * 3, vocab_size=300)
    tokens = torch.randint(2, len(tokenizer), (2, 17))
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    commits = []
    for name in ("reference", "other_reference"):
        model = make_model(NOTATION, **ids)
        for place, options in {MODEL: {}, SHARDED: {"max_shard_size": "50KB"}}.items():
            model.save_pretrained(folder / name / place, **options)
            tokenizer.save_pretrained(folder / name / place)
        with torch.no_grad():
            save_reference(tokens, model(tokens).logits, folder / f"{name}.safetensors")
        commits.append(hub.put_folder(MODEL, folder / name / MODEL))
        if name == "reference":
            hub.put_folder(SHARDED, folder / name / SHARDED)
    return SimpleNamespace(
        folder=folder,
        pinned=commits[0],
        references={name: folder / f"{name}.safetensors" for name in ("reference", "other_reference")},
    )


@pytest.fixture(scope="module")
def used(hub, published, tmp_path_factory):
    """What a stranger with a cold cache found, and the folder with the model that it saved again."""
    folder = tmp_path_factory.mktemp("used")
    latest = published.references["other_reference"]
    answer = do(
        "use",
        folder,
        hub.environment(folder / "home", token=None),
        model=MODEL,
        sharded=SHARDED,
        reference=latest,
        sharded_reference=published.references["reference"],
        saved=folder / "saved",
    )
    return folder / "saved", answer


def test_code_of_the_hub_is_run_only_if_trusted(used):
    _, answer = used
    for refusal in answer["refusals"]:
        assert f"The repository {MODEL} contains custom code" in refusal["message"]
        assert "trust_remote_code=True" in refusal["message"]
        assert refusal["seconds"] < 10  # nobody waits for an answer


def test_every_auto_class_loads_from_a_cold_cache(used):
    _, answer = used
    assert answer["notation"] == NOTATION
    assert answer["difference"] <= 1e-6
    assert answer["sharded_difference"] <= 1e-6
    assert answer["base_difference"] <= 1e-6
    assert answer["classes"] == [2, 3]


def test_text_is_generated(used):
    _, answer = used
    assert answer["generated"] == answer["generated_without_cache"]
    assert answer["pipeline"]["generated_text"] == answer["decoded"]
    assert answer["decoded"].startswith("def main")


def test_what_a_stranger_saves_loads_again_from_a_folder_that_stays_as_it_is(used, published):
    folder, _ = used
    assert {path.name for path in folder.iterdir()} >= {
        path.name for path in (published.folder / "reference" / MODEL).iterdir()
    }
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert len(auto_map) == 6
    assert not any("--" in reference for reference in auto_map.values())  # the code is here, and not in a repository
    before = hash_tree(folder)
    for path in (*folder.iterdir(), folder):  # root writes all the same
        path.chmod(0o555 if path.is_dir() else 0o444)
    loaded = load_in_fresh_process(folder, published.references["other_reference"], prompt="def ")
    assert loaded.max_difference <= 1e-6
    assert hash_tree(folder) == before


def test_a_pinned_revision_an_adapter_and_the_same_offline(hub, published, tmp_path):
    arguments = {"model": MODEL, "pinned": published.pinned, **published.references, "adapter": tmp_path / "adapter"}
    online = do("adapt", tmp_path, hub.environment(tmp_path / "home"), **arguments)
    assert online["pinned_difference"] <= 1e-6
    assert online["latest_difference"] <= 1e-6
    assert online["logits"] != online["logits_before"]
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not any(name.endswith(".py") for name in names)

    asked = len(hub.requests)
    offline = do("go_offline", tmp_path, hub.environment(tmp_path / "home", HF_HUB_OFFLINE="1"), **arguments)
    assert len(hub.requests) == asked
    assert offline["pinned_difference"] <= 1e-6
    assert offline["latest_difference"] <= 1e-6
    torch.testing.assert_close(torch.tensor(offline["logits"]), torch.tensor(online["logits"]))


def test_lm_eval_scores_it(hub, published, tmp_path):
    write_lines(tmp_path / "data.jsonl", make_passages(6))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    options = {
        "model": "hf",
        "model_args": f"pretrained={MODEL},trust_remote_code=True",
        "device": "cpu",
        "tasks": "tiny",
        "include_path": tmp_path,
        "output_path": tmp_path / "output",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    run_stranger(tmp_path, hub.environment(tmp_path / "home"), "-m", "lm_eval", "run", *words)
    (path,) = (tmp_path / "output").rglob("results_*.json")
    scores = json.loads(path.read_text())["results"]["tiny"]
    assert 0 <= scores["acc,none"] <= 1
    assert scores["perplexity,none"] > 1
