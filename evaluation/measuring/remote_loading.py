"""Loads a saved model as a stranger would: in a new process, from the folder alone, by `trust_remote_code`.

The process is this very file, run by path and isolated; it refuses to import any package of this project, even where
one is installed, so only the code in the model's folder can serve.
"""

import importlib.abc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


# Largest difference of logits with a cache, as a part of the largest logit.
LARGEST_ROUNDING = 1e-3
PROJECT_PACKAGES = ("modeling_entropy_gpt", "entropy_gpt")


@dataclass(frozen=True)
class RemoteLoading:
    """
    What the stranger saw.

    Args:
        max_difference (`float`): Largest absolute difference between its logits and those expected.
        completion (`str`): The prompt, completed greedily to the end of the line.
    """

    max_difference: float
    completion: str


class RemoteLoadingError(RuntimeError):
    """The folder can't be loaded without this project; the message is what the other process said."""


def save_reference(input_ids: torch.Tensor, logits: torch.Tensor, path: Path):
    """Keeps what a model answers, to hold a loaded copy against it."""
    save_file({"input_ids": input_ids.contiguous(), "logits": logits.contiguous()}, path)


def load_in_fresh_process(folder: Path, reference: Path, prompt: str, subfolder: str = "") -> RemoteLoading:
    """
    Loads a causal language model and its tokenizer in a new process that can't import this project.

    Args:
        folder (`Path`): The saved model.
        reference (`Path`): What [`save_reference`] wrote for it.
        prompt (`str`): The beginning of a line.
        subfolder (`str`, *optional*): Where in the folder the weights are; code and tokenizer are not.

    Raises:
        `RemoteLoadingError`: If the other process fails, or generates with a cache what it does not without.
    """
    with tempfile.TemporaryDirectory() as cache:
        answer = Path(cache) / "answer.json"
        process = subprocess.run(
            [sys.executable, "-I", __file__, folder.resolve(), reference.resolve(), prompt, subfolder, answer],
            cwd=cache,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise RemoteLoadingError(f"Loading {folder} in a fresh process failed:\n{process.stderr.strip()}")
        return RemoteLoading(**json.loads(answer.read_text(encoding="utf-8")))


class _ProjectBlocker(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in PROJECT_PACKAGES:
            raise ModuleNotFoundError(f"{fullname} must not be needed: only the files in the model's folder are there")


def _answer(folder: str, reference: str, prompt: str, subfolder: str) -> RemoteLoading:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, subfolder=subfolder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    expected = load_file(reference)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    inputs = tokenizer(prompt, return_tensors="pt")
    room = model.config.n_positions - inputs["input_ids"].shape[1]
    new_tokens = {"max_new_tokens": min(32, max(1, room)), "do_sample": False}
    options = {**new_tokens, "stop_strings": "\n", "tokenizer": tokenizer}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    model.float()  # in half precision, rounding alone may change a token
    cached, uncached = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    if not torch.equal(cached.sequences, uncached.sequences) or not _are_close(cached.logits, uncached.logits):
        raise RuntimeError(
            "generate() gives something else with a cache than without: "
            f"{cached.sequences.tolist()} and {uncached.sequences.tolist()}, by logits that differ"
        )
    output = cached.sequences
    return RemoteLoading(
        max_difference=(logits - expected["logits"]).abs().max().item(),
        completion=tokenizer.decode(output[0], skip_special_tokens=True).partition("\n")[0],
    )


def _are_close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Whether logits are the same but for rounding."""
    found, expected = torch.stack(found), torch.stack(expected)
    return (found - expected).abs().max().item() <= LARGEST_ROUNDING * expected.abs().max().item()


if __name__ == "__main__":
    sys.meta_path.insert(0, _ProjectBlocker())
    *arguments, answer = sys.argv[1:]
    Path(answer).write_text(json.dumps(vars(_answer(*arguments))), encoding="utf-8")
