"""Run by `test_training.py` under torchrun: three steps on eight sequences, however many ranks share them."""

import os
import sys

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from tests.architectures import NO_DROPOUT, make_model, make_tokens
from training.data import collate_blocks


def main(result: str, folder: str, penalty: str):
    torch.manual_seed(0)
    model = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT, entropy_penalty=penalty, entropy_coefficient=0.1)
    dataset = Dataset.from_dict({"input_ids": make_tokens(8, 16).tolist()})
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=8 // int(os.environ["WORLD_SIZE"]),
        learning_rate=1e-2,
        optim="sgd",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate_blocks)
    trainer.train()
    if arguments.process_index == 0:
        torch.save(model.state_dict(), result)
    trainer.end()  # threads of the process group that outlive the interpreter abort it


if __name__ == "__main__":
    main(*sys.argv[1:])
