"""Trains with `push_to_hub` in a process of its own, whose variables say where the Hub is."""

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from entropy_gpt.training.arguments import EntropyTrainingArguments
from entropy_gpt.training.packing import collate_blocks
from entropy_gpt.training.trainer import EntropyTrainer
from tests.architectures import make_model, make_tokens


TRAINERS = {"hf": (Trainer, TrainingArguments), "ours": (EntropyTrainer, EntropyTrainingArguments)}
STRATEGIES = ("every_save", "end")
ROWS = [{"input_ids": row} for row in make_tokens(8, 16).tolist()]


def train(trainer_class, arguments_class, strategy: str, repository: str, folder: Path):
    arguments = arguments_class(
        output_dir=folder,
        push_to_hub=True,
        hub_model_id=repository,
        hub_strategy=strategy,
        hub_always_push=True,
        max_steps=4,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = make_model("EReg(SM(t)+ScFuFFN)")
    trainer = trainer_class(model=model, args=arguments, train_dataset=ROWS, data_collator=collate_blocks)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, classes in TRAINERS.items():
        for strategy in STRATEGIES:
            repository = f"somebody/{name}-{strategy}"
            train(*classes, strategy, repository, Path(sys.argv[1], f"{name}-{strategy}"))
