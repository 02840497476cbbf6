"""Run by `test_trainer.py` on two ranks, of which one alone has a batch that goes wrong, from the third step on."""

import json
import math
import os
import sys
from pathlib import Path

import torch

from entropy_gpt.training.arguments import EntropyTrainingArguments
from entropy_gpt.training.packing import collate_blocks
from entropy_gpt.training.trainer import EntropyTrainer
from tests.architectures import NO_DROPOUT, make_model, make_tokens


def main():
    folder, rank = sys.argv[1:]
    torch.manual_seed(0)
    model = make_model("SM+ScFuFFN", **NO_DROPOUT)
    steps = [0]

    def spoil(module, arguments):
        steps[0] += 1
        return (arguments[0] * math.nan,) if steps[0] > 2 and os.environ["RANK"] == rank else None

    model.transformer.h[1].register_forward_pre_hook(spoil)
    arguments = EntropyTrainingArguments(
        output_dir=folder,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=4,
        per_device_train_batch_size=4,
    )
    rows = [{"input_ids": row} for row in make_tokens(32, 16).tolist()]
    trainer = EntropyTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate_blocks)
    trainer.train()
    (Path(folder) / f"rank{arguments.process_index}.json").write_text(json.dumps(trainer.guard.diverged))
    os._exit(0)  # as in `train_on_ranks.py`


if __name__ == "__main__":
    main()
