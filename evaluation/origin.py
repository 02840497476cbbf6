"""The origin of a result: versions of packages, the commit, the machine, and a hash of the weights."""

import hashlib
import platform
import resource
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from .json_records import RECORD


# The working tree of this code, if it runs from one.
ROOT = Path(__file__).resolve().parents[1]
RECORDED_VERSIONS = ("entropy-gpt", "torch", "transformers", "datasets", "tokenizers")


@dataclass(config=RECORD, kw_only=True)
class Origin:
    """
    The three fields with which a record says what computed it, as a base of it.

    Args:
        versions (`dict[str, str]`): Versions of Python and of the packages that compute.
        git_revision (`str`, *optional*): Commit of this project, with "+changes" if there were uncommitted ones.
        machine (`str`): Processor and number of threads, or the GPU.
    """

    versions: dict[str, str]
    git_revision: str | None
    machine: str


def collect_origin(device: torch.device, versions: dict[str, str] | None = None) -> dict:
    """
    Collects the fields of [`Origin`].

    Args:
        device (`torch.device`): The device that computed.
        versions (`dict[str, str]`, *optional*): Versions of other packages than those of [`recorded_versions`].

    Returns:
        `dict`: `versions`, `git_revision` and `machine`, as keyword arguments of a record.
    """
    return {
        "versions": recorded_versions() if versions is None else versions,
        "git_revision": git_revision(),
        "machine": machine_name(device),
    }


def recorded_versions(*others: str) -> dict[str, str]:
    """Versions of Python, of the packages that every result depends on, and of the other packages that are named."""
    return {"python": platform.python_version(), **{name: version(name) for name in (*RECORDED_VERSIONS, *others)}}


def hash_weights(model: PreTrainedModel) -> str:
    """Hashes a model's parameters and saved buffers: their names, shapes, types and values."""
    digest, saved = hashlib.sha256(), model.state_dict().keys()
    buffers = [(name, tensor) for name, tensor in model.named_buffers() if name in saved]
    for name, tensor in sorted([*model.named_parameters(), *buffers]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()[:16]}"


def git_revision() -> str | None:
    """
    The commit of this project's working tree, with "+changes" at its end if tracked files have changed. `None` if the
    code does not run from a working tree, or git is not installed.
    """
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    commit = _git("rev-parse", "HEAD")
    return f"{commit}+changes" if _git("status", "--porcelain", "--untracked-files=no") else commit


def machine_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")  # on Linux, `platform` knows only the architecture
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory() -> int:
    """The peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _git(*arguments: str) -> str:
    # Git refuses the working tree of another user, which is common in containers. Whoever runs this code trusts it.
    command = ["git", "-C", ROOT, "-c", f"safe.directory={ROOT}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
