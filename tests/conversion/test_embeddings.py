"""Embeddings are read from checkpoints without the rest of their files, and from safetensors alone."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_gpt.conversion import weight_files
from entropy_gpt.conversion.embeddings import read_embeddings
from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.conversion.gpt2_checkpoint import load_gpt2
from entropy_gpt.conversion.weight_files import has_safetensors


SIZES = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 50}
ROOT = Path(__file__).parents[2]
READ = """
import sys
from entropy_gpt.conversion.embeddings import read_embeddings
print(vars(read_embeddings(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "gpt2"
    GPT2LMHeadModel(GPT2Config(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(gpt2, tmp_path) -> Path:
    return Path(shutil.copytree(gpt2, tmp_path / "copy"))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def is_that_of(folder: Path, weights: dict[str, torch.Tensor]) -> bool:
    """In single precision, whatever the checkpoint has."""
    tables = read_embeddings(folder).tables
    assert {table.dtype for table in tables.values()} == {np.dtype(np.float32)}
    assert (tables["wte"].shape, tables["wpe"].shape) == ((50, 16), (8, 16))
    return all(np.array_equal(tables[name], weights[f"transformer.{name}.weight"].float()) for name in ("wte", "wpe"))


def test_of_a_gpt2_and_of_what_becomes_of_it(gpt2, tmp_path):
    assert is_that_of(gpt2, read_weights(gpt2))
    load_gpt2(gpt2).save_pretrained(tmp_path)
    assert is_that_of(tmp_path, read_weights(gpt2))
    assert (read_embeddings(gpt2).name, read_embeddings(gpt2).revision) == ("gpt2", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_names_without_a_prefix_and_half_precision(dtype, gpt2, copy):
    """As the Hub has GPT-2."""
    weights = {name: tensor.to(dtype) for name, tensor in read_weights(gpt2).items()}
    save_file({name.removeprefix("transformer."): w for name, w in weights.items()}, copy / "model.safetensors")
    assert is_that_of(copy, weights)


def test_of_shards(gpt2, tmp_path):
    GPT2LMHeadModel.from_pretrained(gpt2).save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert is_that_of(tmp_path, read_weights(gpt2))


def test_a_shard_less_is_noticed(gpt2, tmp_path):
    GPT2LMHeadModel.from_pretrained(gpt2).save_pretrained(tmp_path, max_shard_size="4KB")
    assert has_safetensors(tmp_path) and has_safetensors(gpt2)
    next(tmp_path.glob("*.safetensors")).unlink()
    assert not has_safetensors(tmp_path)


def test_nothing_else_is_read(gpt2, monkeypatch):
    """Tensors of a mapped file are read as they are asked for."""
    read = []

    class Recorder:
        def __init__(self, file, **options):
            self.content = safe_open(file, **options)

        def __enter__(self):
            self.content.__enter__()
            return self

        def __exit__(self, *exception):
            return self.content.__exit__(*exception)

        def keys(self):
            return self.content.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.content.get_tensor(name)

    monkeypatch.setattr(weight_files, "safe_open", Recorder)
    read_embeddings(gpt2)
    assert sorted(read) == ["transformer.wpe.weight", "transformer.wte.weight"]


def test_a_cached_commit_has_its_name_and_revision(gpt2, tmp_path):
    commit = tmp_path / "models--openai-community--gpt2" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(gpt2, commit)
    found = read_embeddings(commit)
    assert (found.name, found.revision) == ("openai-community/gpt2", "0123456789" * 4)


def test_weights_that_are_no_safetensors_are_not_unpickled(gpt2, copy):
    torch.save(read_weights(gpt2), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"has pytorch_model\.bin, and only safetensors are read in part"):
        read_embeddings(copy)


def test_what_has_no_embeddings_is_refused(gpt2, copy):
    weights = {name: w for name, w in read_weights(gpt2).items() if not name.endswith("wpe.weight")}
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(ConversionError, match=r"has no wpe: give the folder of a GPT-2"):
        read_embeddings(copy)
    (copy / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{ this is no json")
    with pytest.raises(ConversionError, match="is damaged"):
        read_embeddings(copy)


@pytest.mark.slow
def test_what_the_cache_has_is_not_looked_up_on_the_hub(gpt2, hub, tmp_path):
    commit = hub.put_folder("ada/small", gpt2)
    environment = hub.environment(tmp_path / "home", token=None)

    def read(name: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", READ, name]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)

    first = read("ada/small")
    assert f"'name': 'ada/small', 'revision': '{commit}'" in first.stdout, first.stderr
    hub.fail(".*", times=float("inf"))
    assert read("ada/small").stdout == first.stdout
    assert "ada/another is neither a folder here nor a repository" in read("ada/another").stderr
    hub.mend()
    GPT2LMHeadModel.from_pretrained(gpt2).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    hub.put_folder("ada/shards", tmp_path / "shards")
    whole = read("ada/shards").stdout
    # As an interrupted download of an older huggingface_hub leaves it, which keeps no list of files.
    (shard,) = (tmp_path / "home").rglob("snapshots/*/model-00001-of-*.safetensors")
    shard.unlink()
    shutil.rmtree(shard.parents[2] / "trees")
    assert read("ada/shards").stdout == whole != ""
