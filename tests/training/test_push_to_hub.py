"""Training that sends its model to the Hub: what arrives there, from the HF Trainer, from ours, and from a recipe."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from entropy_gpt.evaluation.measuring.remote_loading import save_reference
from modeling_entropy_gpt import EntropyGPTForCausalLM
from tests.architectures import make_tokens
from tests.hub_server import FIRST_FILES, HubServer
from tests.strangers import do

from . import push_while_training
from .push_while_training import STRATEGIES, TRAINERS


pytestmark = pytest.mark.slow  # processes of their own, with cold caches
ROOT = Path(__file__).resolve().parents[2]
REPOSITORIES = [f"somebody/{name}-{strategy}" for name in TRAINERS for strategy in STRATEGIES]
RECIPE = """
notation: EReg(SM(t)+ScFuFFN)
n_layer: 2
n_embd: 32
n_head: 2
n_positions: 32
dataset: {text}
tokenizer_vocab_size: 300
max_steps: 4
save_steps: 2
use_cpu: true
per_device_train_batch_size: 2
output_dir: {output}
push_to_hub: true
hub_model_id: somebody/recipe
"""


def run(*words, **options):
    process = subprocess.run(list(map(str, words)), capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two trainers with two strategies each, in one process."""
    folder = tmp_path_factory.mktemp("trained")
    with HubServer() as hub:
        environment = hub.environment(folder / "home")
        run(sys.executable, "-m", push_while_training.__name__, folder, cwd=ROOT, env=environment)
        yield SimpleNamespace(hub=hub, folder=folder)


def check_files(names: set[str]):
    """Nothing of the run but its model, its card and what the Trainer puts beside them."""
    assert names >= {"config.json", "model.safetensors", "modeling_entropy_gpt.py", "README.md"}
    for name in names:
        assert "checkpoint" not in name
        assert "unfinished" not in name
        assert "/" not in name
    assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_models_arrive_and_load(trained, tmp_path):
    """All of them in one process."""
    hub, tokens, models = trained.hub, make_tokens(), []
    for repository in REPOSITORIES:
        check_files(hub.files(repository).keys() - FIRST_FILES.keys())
        name = repository.partition("/")[2]
        model = EntropyGPTForCausalLM.from_pretrained(trained.folder / name).eval()
        models.append({"model": repository, "reference": tmp_path / f"{name}.safetensors"})
        with torch.no_grad():
            save_reference(tokens, model(tokens).logits, models[-1]["reference"])
    differences = do("compare", tmp_path, hub.environment(tmp_path / "home", token=None), models=models)
    assert max(differences) <= 1e-5


@pytest.mark.parametrize("name", TRAINERS)
def test_every_save_is_sent_whole(name, trained):
    commits = trained.hub.repositories[f"somebody/{name}-every_save"].commits.values()
    messages = [commit.message for commit in commits]
    assert [message for message in messages if "in progress" in message] == [
        f"Training in progress, step {step}" for step in (2, 4)
    ]
    for commit in commits:
        if "in progress" in commit.message:
            assert commit.files.keys() >= {"config.json", "model.safetensors"}
            assert not [path for path in commit.files if "checkpoint" in path]


def test_what_our_trainer_sends_at_a_save_has_its_code(trained):
    commits = trained.hub.repositories["somebody/ours-every_save"].commits.values()
    first = next(commit for commit in commits if commit.message == "Training in progress, step 2")
    assert "modeling_entropy_gpt.py" in first.files


def test_a_recipe_may_ask_for_it(hub, tmp_path):
    (tmp_path / "text").mkdir()
    for path in (ROOT / "modeling_entropy_gpt").glob("*.py"):
        (tmp_path / "text" / path.name).write_bytes(path.read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(text=tmp_path / "text", output=tmp_path / "run"))
    command = Path(sys.executable).with_name("entropy-gpt")
    run(command, "train", recipe, cwd=tmp_path, env=hub.environment(tmp_path / "home"))
    names = hub.files("somebody/recipe").keys() - FIRST_FILES.keys()
    assert not [name for name in names if "unfinished" in name or "checkpoint" in name]
    assert names >= {"config.json", "model.safetensors", "modeling_entropy_gpt.py"}
