"""Models that are sent to the Hub, and pushes that fail: one line, and nothing half done."""

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from entropy_gpt.evaluation.measuring.remote_loading import save_reference
from entropy_gpt.evaluation.records.measurement import measure_model, read_text
from entropy_gpt.evaluation.records.results import load_results, save_results
from entropy_gpt.training.progress import SILENT
from entropy_gpt.training.tokenizer import train_tokenizer
from tests.architectures import make_model
from tests.evaluation.example_results import example_training
from tests.hub_server import FIRST_FILES, TOKEN, WRONG_TOKEN, HubServer
from tests.strangers import do

from .forks import run_command
from .outcome import Outcome


COMMAND = Path(sys.executable).with_name("entropy-gpt")
ROOT = Path(__file__).resolve().parents[2]
NOTATION = "EReg(SM(t)+ScFuFFN)"
PAYLOAD = {path.name for path in (ROOT / "modeling_entropy_gpt").glob("*.py")} - {"__init__.py"}
PUBLISHED = {
    *PAYLOAD,
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("README.md", "results.json", "headwise_entropy.png"),
}
# What lies about in the folder of a model, and is nobody's business.
STRAY = {
    ".env": "HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz",
    "training_args.bin": "pickle",
    "notes.txt": "/home/somebody/notes",
    "checkpoint-2/optimizer.pt": "moments",
    "_unfinished-checkpoint/model.safetensors": "half",
}


def run(environment: dict[str, str], *arguments) -> Outcome:
    """A command in a process of its own."""
    process = subprocess.run([COMMAND, *arguments], env=environment, capture_output=True, text=True)
    return Outcome(process.returncode, process.stdout, process.stderr)


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(server):
    """The module's Hub, which works and has been asked nothing yet."""
    server.mend()
    server.requests.clear()
    return server


@pytest.fixture(scope="module")
def command(server, tmp_path_factory):
    """Runs commands in forks, whose Hub is the module's."""
    home = tmp_path_factory.mktemp("home")

    def run(*arguments, token: str | None = TOKEN, **variables: str) -> Outcome:
        process = run_command(*arguments, env=server.environment(home, token, **variables))
        return Outcome(process.returncode, process.stdout, process.stderr)

    return run


@pytest.fixture
def repository(request):
    """A name of its own for each test."""
    return "somebody/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[-80:].strip("-")


def make_folder(folder: Path, text: Path, seed: int) -> Path:
    """A model as the quickstart leaves it, with what lies about in it; beside it, what it answers."""
    torch.manual_seed(seed)
    texts = [path.read_text(encoding="utf-8") for path in sorted(text.iterdir())][:2]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = make_model(NOTATION, vocab_size=len(tokenizer), **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured = read_text("some code", "sha256:0", texts, tokenizer, 32, 1000)
    result = measure_model(model, "tiny", measured, example_training(), 0, SILENT)
    save_results([result], folder / "results.json")
    for name, content in STRAY.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    tokens = torch.randint(len(tokenizer), (2, 17))
    with torch.no_grad():
        save_reference(tokens, model(tokens).logits, folder.with_name(f"{folder.name}.safetensors"))
    return folder


@pytest.fixture(scope="module")
def model(text, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "model", text, seed=0)


@pytest.fixture(scope="module")
def other_model(text, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("other") / "model", text, seed=1)


def reference_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.safetensors")


def difference(hub, folder, home, repository, **options):
    """Between the logits of a folder's model and those of what a stranger downloads."""
    environment = hub.environment(home / "home", token=options.pop("token", None))
    models = [{"model": repository, "reference": reference_of(folder), **options}]
    return do("compare", home, environment, models=models)[0]


def copy(model: Path, folder: Path, without: str = "") -> Path:
    return shutil.copytree(model, folder, ignore=shutil.ignore_patterns(without))


def put_earlier(hub, repository, folder):
    """A repository with files of its own, before anything is sent there."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00001.safetensors").write_text("stale")
    return hub.put_folder(repository, folder)


# What arrives


@pytest.mark.slow
def test_a_model_is_sent_and_loads_from_a_cold_cache(hub, model, repository, tmp_path):
    """By the command itself, in a process of its own."""
    arguments = ["push", model, repository, "--license", "apache-2.0", "--message", "First"]
    outcome = run(hub.environment(tmp_path / "own"), *arguments).succeeded()
    sent = hub.repositories[repository]
    commit = sent.commits[sent.refs["main"]]
    assert commit.files.keys() == PUBLISHED | FIRST_FILES.keys()
    assert (len(sent.commits), commit.message, sent.private) == (2, "First", False)
    assert f"{hub.endpoint}/{repository}/commit/{commit.hash}" in outcome.output.replace("\n", "")
    for name, content in commit.files.items():
        for secret in (str(model), str(tmp_path), str(Path.home()), TOKEN):
            assert secret.encode() not in content, (name, secret)
    card = ModelCard(commit.files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    (result,) = load_results(model / "results.json")
    perplexity = result.likelihood.likelihood.perplexity
    assert any(math.isclose(score.metric_value, perplexity) for score in card.data.eval_results)
    assert repository in card.text
    assert len(json.loads(commit.files["config.json"])["auto_map"]) == 6
    assert difference(hub, model, tmp_path, repository) <= 1e-5


@pytest.mark.slow
def test_a_model_converted_from_the_hub_names_its_base_model(hub, command, model, text, repository, tmp_path):
    original = copy(model, tmp_path / "original", without="results.json")
    make_model("SM+LN+G", vocab_size=300, pad_token_id=None).save_pretrained(original)
    hub.put_folder(repository, original)
    converted, measured, heir = tmp_path / "converted", tmp_path / "measured", f"{repository}-heir"
    command("convert", repository, "--to", "SM+ScFuFFN", "--text", text, "--output", converted).succeeded()
    command("evaluate", converted, "--text", text, "--max-tokens", 200, "--output", measured).succeeded()
    command("push", converted, heir, "--results", measured).succeeded()
    assert ModelCard(hub.files(heir)["README.md"].decode()).data.base_model == repository


@pytest.mark.slow
def test_another_push_replaces_the_first_in_one_commit(hub, command, model, other_model, repository, tmp_path):
    first = command("push", model, repository, "--folded", "beside", "--max-shard-size", "100KB").succeeded()
    sent = hub.repositories[repository]
    earlier = sent.refs["main"]
    shards = {name for name in hub.files(repository) if name.endswith(".safetensors")}
    assert len(shards) > 4
    assert {name for name in hub.files(repository) if "/" in name} >= {"folded/config.json"}
    assert "folded/" in first.output
    whole = {"model": repository, "reference": reference_of(model)}
    models = [whole, {**whole, "subfolder": "folded"}]
    own, folded = do("compare", tmp_path, hub.environment(tmp_path / "first", token=None), models=models)
    assert own <= 1e-5
    assert folded <= 1e-3

    command("push", other_model, repository).succeeded()
    assert hub.files(repository).keys() == PUBLISHED | FIRST_FILES.keys()
    assert sent.commits[sent.refs["main"]].parent == earlier
    assert hub.files(repository, earlier).keys() >= shards
    assert difference(hub, other_model, tmp_path, repository) <= 1e-5

    command("push", other_model, repository).succeeded()
    assert len(sent.commits) == 3  # the same again is no commit


@pytest.mark.slow
def test_a_branch_of_a_new_private_repository(hub, command, model, repository):
    command("push", model, repository, "--revision", "variant/small", "--private").succeeded()
    sent = hub.repositories[repository]
    assert sent.private
    assert sent.refs.keys() == {"main", "variant/small"}
    assert hub.files(repository) == FIRST_FILES
    assert hub.files(repository, "variant/small").keys() == PUBLISHED | FIRST_FILES.keys()


@pytest.mark.slow
def test_a_pull_request_to_a_repository_of_others(hub, command, model, repository, tmp_path):
    repository = repository.replace("somebody", "others")
    earlier = put_earlier(hub, repository, tmp_path / "earlier")
    outcome = command("push", model, repository, "--create-pr").succeeded()
    sent = hub.repositories[repository]
    assert sent.refs.keys() == {"main", "refs/pr/1"}
    assert sent.refs["main"] == earlier
    assert hub.files(repository, "refs/pr/1").keys() == PUBLISHED | FIRST_FILES.keys()
    assert f"{repository}/discussions/1" in outcome.output


@pytest.mark.slow
def test_a_folded_model_takes_the_place_of_its_own(hub, command, model, repository, tmp_path):
    command("push", model, repository, "--folded", "instead").succeeded()
    assert hub.files(repository).keys() == PUBLISHED | FIRST_FILES.keys()
    assert difference(hub, model, tmp_path, repository) <= 1e-3


@pytest.mark.slow
def test_a_dry_run_with_results_from_elsewhere_sends_nothing(hub, command, model, other_model, repository, tmp_path):
    """Among those of other models; a folder and a file are both fine. No token is needed."""
    folder = copy(model, tmp_path / "model", "results.json")
    results = [load_results(place / "results.json")[0] for place in (other_model, model)]
    save_results(results, tmp_path / "results.json")
    places = ["--results", other_model, "--results", tmp_path / "results.json"]
    outcome = command("push", folder, repository, *places, "--dry-run", token=None).succeeded()
    assert "model.safetensors" in outcome.output
    assert hub.requests == []


# The Hub fails


@pytest.mark.slow
def test_what_fails_once_is_asked_again(hub, command, model, repository):
    for place in ("whoami", "repos/create", "tree", "preupload"):
        hub.fail(rf"/api/.*{place}")
    hub.drop("/commit/")
    command("push", model, repository).succeeded()
    assert hub.files(repository).keys() == PUBLISHED | FIRST_FILES.keys()
    assert len(hub.repositories[repository].commits) == 2


@pytest.mark.slow
def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, command, model, repository):
    hub.drop("/commit/", is_late=True)
    command("push", model, repository).succeeded()
    assert hub.files(repository).keys() == PUBLISHED | FIRST_FILES.keys()
    assert len(hub.repositories[repository].commits) == 2


@pytest.mark.slow
def test_a_pull_request_whose_answer_is_lost_is_not_made_twice(hub, command, model, repository, tmp_path):
    put_earlier(hub, repository, tmp_path / "earlier")
    hub.drop("POST .*/(commit|discussions)", is_late=True)
    complaint = command("push", model, repository, "--create-pr").complaint
    assert "whether the pull request was made" in complaint
    assert hub.repositories[repository].pull_requests == 1


@pytest.mark.slow
@pytest.mark.parametrize("status", [503, None], ids=["503", "dropped"])
def test_a_hub_that_fails_for_ever_keeps_its_old_revision(status, hub, command, model, repository, tmp_path):
    earlier = put_earlier(hub, repository, tmp_path / "earlier")
    if status is None:
        hub.drop("POST .*/commit/", times=math.inf)
    else:
        hub.fail("POST .*/commit/", status, times=math.inf)
    started = time.monotonic()
    complaint = command("push", model, repository).complaint
    assert hub.endpoint in complaint
    assert sum("/commit/" in request.path for request in hub.requests) == 3
    assert time.monotonic() - started < 300
    assert hub.repositories[repository].refs == {"main": earlier}


@pytest.mark.slow
def test_a_hub_that_fails_from_the_start(hub, command, model, repository):
    hub.fail(".*", 503, times=math.inf)
    started = time.monotonic()
    assert "503" in command("push", model, repository).complaint
    assert len(hub.requests) == 3
    assert time.monotonic() - started < 300


@pytest.mark.slow
def test_a_hub_that_is_not_there(model, repository, server, tmp_path):
    with socket.socket() as taken:  # and not listening
        taken.bind(("127.0.0.1", 0))
        place = f"http://127.0.0.1:{taken.getsockname()[1]}"
        environment = server.environment(tmp_path, HF_ENDPOINT=place)
        complaint = run(environment, "push", model, repository).complaint
    assert place in complaint


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["/api/whoami", "GET /api/models/", "/commit/"])
def test_a_hub_that_is_silent(pattern, hub, command, model, repository):
    hub.be_silent(pattern, times=math.inf)
    started = time.monotonic()
    assert "timed out, 3 times" in command("push", model, repository, "--timeout", "1").complaint
    assert time.monotonic() - started < 300


# The Hub refuses


@pytest.mark.parametrize(("token", "remedy"), [(None, "hf auth login"), (WRONG_TOKEN, "HF_TOKEN")])
def test_without_a_good_token(token, remedy, hub, command, model, repository):
    assert remedy in command("push", model, repository, token=token).complaint
    assert hub.changes == []


@pytest.mark.slow
def test_offline(hub, model, repository, tmp_path):
    assert "HF_HUB_OFFLINE" in run(hub.environment(tmp_path, HF_HUB_OFFLINE="1"), "push", model, repository).complaint
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["a/b/c", "no spaces", "somebody/-model", "somebody/mo--del", "", "somebody/" + "m" * 99]
)
def test_malformed_names(name, hub, command, model):
    assert repr(name) in command("push", model, name).complaint
    assert hub.requests == []


def test_a_namespace_of_others(hub, command, model):
    complaint = command("push", model, "others/model").complaint
    assert 'namespace "others"' in complaint
    assert "others/model" not in hub.repositories


@pytest.mark.slow
def test_a_repository_of_others(hub, command, model, tmp_path):
    earlier = put_earlier(hub, "others/theirs", tmp_path / "earlier")
    assert "--create-pr" in command("push", model, "others/theirs").complaint
    assert hub.repositories["others/theirs"].refs == {"main": earlier}


def test_a_pull_request_to_no_repository(hub, command, model, repository):
    assert "no such repository" in command("push", model, repository, "--create-pr").complaint
    assert hub.changes == []


# The folder will not do


def refuse(hub, command, folder, repository, *options) -> str:
    complaint = command("push", folder, repository, *options).complaint
    assert hub.changes == []
    return complaint


def test_a_folder_that_is_not_there(hub, command, repository, tmp_path):
    assert str(tmp_path / "nowhere") in refuse(hub, command, tmp_path / "nowhere", repository)


def test_a_folder_without_results(hub, command, model, repository, tmp_path):
    folder = copy(model, tmp_path / "model", "results.json")
    complaint = refuse(hub, command, folder, repository)
    assert "results.json" in complaint
    assert f"entropy-gpt evaluate {folder} --output evaluation_output" in complaint


def test_results_of_other_weights(hub, command, model, other_model, repository, tmp_path):
    folder = copy(model, tmp_path / "model", "results.json")
    results = other_model / "results.json"
    assert f"{results} describe other weights" in refuse(hub, command, folder, repository, "--results", results)


def test_results_that_are_none(hub, command, model, repository, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    assert str(tmp_path) in refuse(hub, command, model, repository, "--results", tmp_path)
    assert "nothing.json" in refuse(hub, command, model, repository, "--results", tmp_path / "nothing.json")


def test_a_folder_without_a_tokenizer(hub, command, model, repository, tmp_path):
    folder = copy(model, tmp_path / "model", "tokenizer*")
    assert str(folder) in refuse(hub, command, folder, repository)


def test_a_model_of_newer_code(hub, command, model, repository, tmp_path):
    folder = copy(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "code_version": 99}))
    complaint = refuse(hub, command, folder, repository)
    assert "code_version=99" in complaint
    assert "Upgrade entropy-gpt" in complaint


def test_results_that_tell_paths_of_this_machine(hub, command, model, repository, tmp_path):
    folder = copy(model, tmp_path / "model")
    (result,) = load_results(folder / "results.json")
    result.training.text = "/home/somebody/texts"
    save_results([result], folder / "results.json")
    assert "a path of somebody's home" in refuse(hub, command, folder, repository)


# The card alone


def test_a_card_is_written_into_the_folder(command, model, tmp_path):
    folder = copy(model, tmp_path / "model")
    command("card", folder, "--license", "mit").succeeded()
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert (folder / "headwise_entropy.png").stat().st_size > 5000


def test_a_licence_that_the_hub_does_not_know(command, model):
    assert "Did you mean apache-2.0" in command("card", model, "--license", "Apache 2.0").complaint
    push = command("push", model, "someone/something", "--license", "apache2", "--dry-run")
    assert "Did you mean apache-2.0" in push.complaint


def test_a_card_without_results(command, model, tmp_path):
    folder = copy(model, tmp_path / "model", "results.json")
    before = sorted(folder.rglob("*"))
    assert "results.json" in command("card", folder).complaint
    assert sorted(folder.rglob("*")) == before
