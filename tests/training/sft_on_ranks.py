"""Run by `test_trl.py` on two ranks: TRL's trainer with its defaults, whose loss leaves the penalty out."""

import os
import sys
from pathlib import Path

import torch
from trl import SFTTrainer

from tests.training.test_trl import train


def main(folder: str):
    torch.manual_seed(0)  # the same model on both, before one of them hands its own to the other
    _, unchanged = train(SFTTrainer, "EReg(SM(t)+ScFuFFN)", folder)
    (Path(folder) / f"rank{os.environ['RANK']}.txt").write_text("\n".join(sorted(unchanged)))
    os._exit(0)  # as in `tests/modeling_entropy_gpt/train_on_ranks.py`


if __name__ == "__main__":
    main(sys.argv[1])
