"""Run by `test_training.py` on some ranks: three steps on eight sequences, however many ranks share them."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from entropy_gpt.training.packing import collate_blocks
from tests.architectures import NO_DROPOUT, make_model, make_tokens
from tests.fsdp_on_cpu import allow_fsdp_on_cpu


def main():
    folder, notation, fields, arguments = sys.argv[1:]
    torch.manual_seed(0)
    allow_fsdp_on_cpu()
    model = make_model(notation, **NO_DROPOUT, entropy_coefficient=0.1, **json.loads(fields))
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
        logging_steps=1,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **json.loads(arguments),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate_blocks)
    trainer.train()
    trainer.save_model(folder)
    if arguments.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        sharded = [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)]
        (Path(folder) / "record.json").write_text(json.dumps({"losses": losses, "sharded": sharded}))
    # Not by the interpreter's end, nor by trainer.end(): gloo's threads abort the one, and when a group is destroyed,
    # torch waits for them with the lock that they need to drop the last exchange's tensors, now and then for ever.
    os._exit(0)


if __name__ == "__main__":
    main()
