"""Lets lm-eval load and score saved models in a process that can't import this project; run by path, isolated."""

import json
import runpy
import sys
from pathlib import Path


def score(folder: str, manager, tasks: list[str]) -> dict:
    from lm_eval import evaluate
    from lm_eval.api.registry import get_model

    lm = get_model("hf").create_from_arg_string(
        f"pretrained={folder},trust_remote_code=True", {"device": "cpu", "batch_size": 4}
    )
    return evaluate(lm=lm, task_dict=manager.load(tasks), bootstrap_iters=0, log_samples=False)["results"]


if __name__ == "__main__":
    remote_loading, task_folder, task_data, tasks, answer, *folders = sys.argv[1:]
    sys.meta_path.insert(0, runpy.run_path(remote_loading)["_ProjectBlocker"]())

    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=task_folder, include_defaults=False, metadata={"task_data": task_data})
    scores = {folder: score(folder, manager, tasks.split(",")) for folder in folders}
    Path(answer).write_text(json.dumps(scores), encoding="utf-8")
