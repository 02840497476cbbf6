"""Where a result comes from: versions of packages, the commit, the machine, and a hash of the weights."""

import hashlib
import platform
import resource
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel


# The working tree that this code lies in, if there is one.
ROOT = Path(__file__).resolve().parents[1]
RECORDED_VERSIONS = ("entropy-gpt", "torch", "transformers", "datasets", "tokenizers")


def recorded_versions(*others: str) -> dict[str, str]:
    """Versions of Python and of the packages that take part in a result, and of others that do."""
    return {"python": platform.python_version(), **{name: version(name) for name in (*RECORDED_VERSIONS, *others)}}


def hash_weights(model: PreTrainedModel) -> str:
    """A hash of a model's parameters and of buffers that are saved with them: of names, shapes, types and values."""
    digest, saved = hashlib.sha256(), model.state_dict().keys()
    buffers = [(name, tensor) for name, tensor in model.named_buffers() if name in saved]
    for name, tensor in sorted([*model.named_parameters(), *buffers]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()[:16]}"


def git_revision() -> str | None:
    """The commit of this project's working tree, or `None` for an installation without one, or without git."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    commit = _git("rev-parse", "HEAD")
    return f"{commit}+changes" if _git("status", "--porcelain", "--untracked-files=no") else commit


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


def _git(*arguments: str) -> str:
    # Whoever runs this code trusts the tree that it lies in, whose owner may be another (in a container, say).
    command = ["git", "-C", ROOT, "-c", f"safe.directory={ROOT}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
