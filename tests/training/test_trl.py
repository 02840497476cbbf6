"""TRL's trainer trains the model as it is."""

import math

import pytest
import torch
from datasets import Dataset

from tests.architectures import NO_DROPOUT, make_model, make_tokens
from training.tokenizer import train_tokenizer


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # TRL still uses names that transformers deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("notation", ["SM+LN+G", "EReg(SM(t)+ScFuFFN)"])
def test_sft_trains_every_parameter_and_the_penalty(notation, packing, tmp_path):
    from trl import SFTConfig, SFTTrainer  # takes seconds to import

    lines = [f"line {index}: the quick brown fox jumps over the lazy dog" for index in range(32)]
    tokenizer = train_tokenizer(lines, vocab_size=270)
    model = make_model(notation, vocab_size=len(tokenizer), entropy_coefficient=0.1, **NO_DROPOUT)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tmp_path,
            max_steps=3,
            max_length=32,
            packing=packing,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": lines}),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
