"""Lets lm-eval load and score saved models; run as a stranger."""

import json
import sys

from lm_eval import evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager


def score(folder: str, manager: TaskManager, tasks: list[str]) -> dict:
    lm = get_model("hf").create_from_arg_string(
        f"pretrained={folder},trust_remote_code=True", {"device": "cpu", "batch_size": 4}
    )
    return evaluate(lm=lm, task_dict=manager.load(tasks), bootstrap_iters=0, log_samples=False)["results"]


if __name__ == "__main__":
    task_folder, task_data, tasks, *folders = sys.argv[1:]
    manager = TaskManager(include_path=task_folder, include_defaults=False, metadata={"task_data": task_data})
    print(json.dumps({folder: score(folder, manager, tasks.split(",")) for folder in folders}))
