"""TRL's trainer trains the model, and the penalty with the model's own loss."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from entropy_gpt.training.tokenizer import train_tokenizer
from tests.architectures import NO_DROPOUT, make_model
from tests.slow import in_turn


ROOT = Path(__file__).resolve().parents[2]
LINES = [f"line {index}: the quick brown fox jumps over the lazy dog" for index in range(32)]

pytestmark = [  # TRL still uses names that transformers deprecates
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]


def train(kind, notation, folder, **arguments):
    """Returns the losses, and the names of the parameters that changed."""
    from trl import SFTConfig  # takes seconds to import

    tokenizer = train_tokenizer(LINES, vocab_size=270)
    model = make_model(notation, vocab_size=len(tokenizer), entropy_coefficient=0.1, **NO_DROPOUT)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {"max_steps": 3, "max_length": 32, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    trainer = kind(
        model=model,
        args=SFTConfig(folder, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, **options, **arguments),
        train_dataset=Dataset.from_dict({"text": LINES}),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    return losses, before.keys() - changed


@pytest.mark.parametrize(("notation", "packing"), in_turn(["SM+LN+G", "EReg(SM(t)+ScFuFFN)"], [False, True]))
def test_every_parameter_is_trained(notation, packing, tmp_path):
    from entropy_gpt.training.sft import EntropySFTTrainer

    _, unchanged = train(EntropySFTTrainer, notation, tmp_path, packing=packing)
    assert unchanged == set()


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`")
def test_labels_are_smoothed_in_the_loss_of_the_model(tmp_path):
    from entropy_gpt.training.sft import EntropySFTTrainer

    found = []
    for factor in (0.0, 0.5):
        torch.manual_seed(0)
        losses, unchanged = train(EntropySFTTrainer, "EReg(SM(t)+ScFuFFN)", tmp_path, label_smoothing_factor=factor)
        assert unchanged == set()  # thresholds learn, so the penalty is there
        found.append(losses[0])
    assert found[0] != pytest.approx(found[1], rel=1e-2)


def test_the_original_trains_models_without_a_penalty_alike(tmp_path):
    from trl import SFTTrainer

    from entropy_gpt.training.sft import EntropySFTTrainer

    losses, unchanged = train(SFTTrainer, "SM+ScFuFFN", tmp_path)
    assert unchanged == set()
    torch.manual_seed(0)
    own, _ = train(EntropySFTTrainer, "SM+ScFuFFN", tmp_path)
    torch.manual_seed(0)
    theirs, _ = train(SFTTrainer, "SM+ScFuFFN", tmp_path)
    assert own == pytest.approx(theirs, rel=1e-4)
    assert len(losses) == 3


def test_the_original_loses_the_penalty_and_the_model_says_so(tmp_path, caplog):
    from transformers.utils import logging
    from trl import SFTTrainer

    logging.warning_once.cache_clear()
    logging.get_logger("transformers").addHandler(caplog.handler)
    _, unchanged = train(SFTTrainer, "EReg(SM(t)+ScFuFFN)", tmp_path)
    assert {name.rpartition(".")[2] for name in unchanged} == {"entropy_threshold"}
    assert "lacks the entropy penalty" in caplog.text
