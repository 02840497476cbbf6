"""Result records: every number together with the conditions under which it was measured."""

import dataclasses
import json
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .entropy_diagnostics import HeadwiseEntropy


SCHEMA_VERSION = 1
RECORDED_VERSIONS = ("entropy-gpt", "torch", "transformers", "datasets", "tokenizers")


@strict
@dataclass
class Conditions:
    """
    What a number depends on beside the model.

    Args:
        corpus (`str`): Name of the text.
        corpus_revision (`str`): Its version and hash.
        vocab_size (`int`): Number of tokens of the tokenizer, which was trained on the training text.
        context (`int`): Length of a sequence in tokens, in training and evaluation; also the stride.
        evaluated_tokens (`int`): Number of validation tokens that were predicted.
        dtype (`str`): Of weights and computation.
        seed (`int`): Of the weights and of the order of the training data.
        versions (`dict[str, str]`): Of Python and of the packages that compute.
        git_revision (`str`, *optional*): Of this project, "+changes" at its end if the tree had uncommitted ones.
        machine (`str`): Processor and number of threads.
    """

    corpus: str
    corpus_revision: str
    vocab_size: int
    context: int
    evaluated_tokens: int
    dtype: str
    seed: int
    versions: dict[str, str]
    git_revision: str | None
    machine: str


@strict
@dataclass
class ModelResult:
    """
    What training a model took, from scratch or from a conversion, and what it gave.

    Args:
        notation (`str`): The architecture in the paper's notation.
        final_normalization (`str`): The norm before the head, which the notation does not tell.
        parameters (`int`): Number of trainable parameters; tied ones count once.
        training_steps (`int`): Optimiser steps.
        training_tokens (`int`): Tokens seen in training.
        training_seconds (`float`): Duration of training, with the evaluations in its course.
        hyperparameters (`dict`): What else training was told.
        perplexity_per_token (`float`): On the validation text.
        bits_per_byte (`float`, *optional*): On the validation text, if the tokenizer is byte-level.
        headwise_entropy_nats (`list[list[float]]`): Mean row entropy of each head of each layer.
        maximum_entropy_nats (`float`): The largest possible mean row entropy under a causal mask.
        conditions ([`Conditions`]): What the numbers depend on.
        converted_from (`str`, *optional*): Notation of the trained model that this one was converted from; training is
            then the healing after it.
    """

    notation: str
    final_normalization: str
    parameters: int
    training_steps: int
    training_tokens: int
    training_seconds: float
    hyperparameters: dict
    perplexity_per_token: float
    bits_per_byte: float | None
    headwise_entropy_nats: list[list[float]]
    maximum_entropy_nats: float
    conditions: Conditions
    converted_from: str | None = None

    @property
    def title(self) -> str:
        """The architecture, and what it was converted from."""
        return self.notation if self.converted_from is None else f"{self.notation} from {self.converted_from}"

    @property
    def headwise_entropy(self) -> HeadwiseEntropy:
        """The entropies, with what is derived from them."""
        return HeadwiseEntropy(self.headwise_entropy_nats, self.maximum_entropy_nats)


def save_results(results: list[ModelResult], path: Path):
    """Writes the records as JSON."""
    content = {"schema_version": SCHEMA_VERSION, "results": [dataclasses.asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load_results(path: Path) -> list[ModelResult]:
    """
    Reads what [`save_results`] wrote.

    Raises:
        `ValueError`: If the file is of another schema, or not one of results at all.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']}, where {SCHEMA_VERSION} is read")
        return [
            ModelResult(**{**record, "conditions": Conditions(**record["conditions"])})
            for record in content["results"]
        ]
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{path} is no file of results of this version: {error}. Measure again.") from error


def recorded_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in RECORDED_VERSIONS}}


def git_revision() -> str | None:
    """The commit of this project's working tree, or `None` for an installation without one, or without git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    commit = _git(root, "rev-parse", "HEAD")
    return f"{commit}+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit


def machine_name(device: torch.device) -> str:
    """The name of the processor that a model ran on, and for a CPU the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")  # Linux, where `platform` knows no more than the architecture
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _git(root: Path, *arguments: str) -> str:
    # Whoever runs this code trusts the tree that it lies in, whose owner may be another (in a container, say).
    command = ["git", "-C", root, "-c", f"safe.directory={root}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
