"""Run by `test_trl.py` on some ranks: TRL's defaults, and eight texts a step however many ranks share them."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from entropy_gpt.training.sft import EntropySFTTrainer
from entropy_gpt.training.tokenizer import train_tokenizer
from tests.architectures import NO_DROPOUT, make_model


TRAINERS = {"SFTTrainer": SFTTrainer, "EntropySFTTrainer": EntropySFTTrainer}


def main():
    folder, notation, trainer, arguments = sys.argv[1:]
    torch.manual_seed(0)
    lines = [f"line {index}: the quick brown fox jumps over the lazy dog" for index in range(32)]
    tokenizer = train_tokenizer(lines, vocab_size=270)
    model = make_model(notation, vocab_size=len(tokenizer), entropy_coefficient=0.1, **NO_DROPOUT)
    arguments = SFTConfig(
        folder,
        use_cpu=True,
        bf16=False,
        max_steps=3,
        per_device_train_batch_size=8 // int(os.environ["WORLD_SIZE"]),
        learning_rate=1e-2,
        optim="sgd",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **json.loads(arguments),
    )
    run = TRAINERS[trainer](
        model=model, args=arguments, train_dataset=Dataset.from_dict({"text": lines}), processing_class=tokenizer
    )
    run.train()
    run.save_model(folder)
    if run.args.process_index == 0:
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        (Path(folder) / "record.json").write_text(json.dumps({"losses": losses}))
    os._exit(0)  # as in tests/modeling_entropy_gpt/train_on_ranks.py


if __name__ == "__main__":
    main()
