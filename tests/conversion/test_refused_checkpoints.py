"""What is no checkpoint of GPT-2, or a damaged one: named for what it is."""

import argparse
import errno
import io
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, GPT2Config

from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.conversion.gpt2_checkpoint import from_gpt2, load_gpt2

from .gpt2_checkpoints import SIZES, change_config, change_weights, make_gpt2


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 548118077\n"
LLM_C = (20240326).to_bytes(4, "little") + (3).to_bytes(4, "little") + bytes(1016)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", r"index\.json can't be read"),
        ("[]", r"index\.json holds a list"),
        ("{}", "no 'weight_map'"),
        ('{"weight_map": ["model-1.safetensors"]}', "no 'weight_map'"),
        ('{"weight_map": {"wte.weight": 1}}', "no 'weight_map'"),
        ('{"weight_map": {"wte.weight": "model-7.safetensors"}}', r"not there: model-7\.safetensors"),
    ],
)
def test_damaged_indices_are_named(index, message, tmp_path):
    make_gpt2().save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConversionError, match=message):
        load_gpt2(tmp_path)


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "/secret.safetensors", "..\\\\secret.safetensors", "C:secret"]
)
def test_an_index_that_points_outside_of_its_folder_is_refused(outside, tmp_path):
    make_gpt2().save_pretrained(tmp_path / "model", max_shard_size="40KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = next(iter(content["weight_map"].values()))
    if outside.startswith("/"):
        outside = str(tmp_path / outside[1:])
    (tmp_path / "model" / shard).rename(tmp_path / "secret.safetensors")
    content["weight_map"] = {name: outside if file == shard else file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(ConversionError, match=r"index\.json lists files outside of its folder: .*secret"):
        load_gpt2(tmp_path / "model")


def test_a_tensor_that_comes_twice_is_named(tmp_path):
    make_gpt2().save_pretrained(tmp_path / "spellings")
    change_weights(tmp_path / "spellings", lambda t: t.update({"ln_f.bias": t["transformer.ln_f.bias"].clone()}))
    with pytest.raises(ConversionError, match=r"transformer\.ln_f\.bias twice"):
        load_gpt2(tmp_path / "spellings")
    make_gpt2().save_pretrained(tmp_path / "files", max_shard_size="40KB")
    first, second, *_ = sorted((tmp_path / "files").glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(ConversionError, match=f"{name} twice"):
        load_gpt2(tmp_path / "files")


def pickled(content) -> bytes:
    file = io.BytesIO()
    torch.save({"model": {}, "model_args": {}, "more": content}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ckpt.pt", LFS_POINTER, "is a Git LFS pointer"),
        ("model.onnx", b"\x08\x08\x12\x07pytorch", "is an ONNX graph"),
        ("gpt2_124M.bin", LLM_C, r"is a checkpoint of llm\.c"),
        ("model.gguf", b"GGUF\3\0\0\0", "is a GGUF file"),
        ("ckpt.pt", pickled(np.float64(0.5)), "holds a number or array of numpy"),
        ("ckpt.pt", pickled(np.ones(2)), "holds a number or array of numpy"),
        ("ckpt.pt", pickled(argparse.Namespace()), r"holds argparse\.Namespace"),
        ("ckpt.pt", pickle.dumps({"model": {}}), r"not written by torch\.save"),
        ("ckpt.pt", b"", "is an empty file"),
    ],
    ids=["LFS", "ONNX", "llm.c", "GGUF", "numpy scalar", "numpy array", "namespace", "pickle", "empty"],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_what_is_no_checkpoint_is_named_for_what_it_is(name, content, message, in_folder, tmp_path):
    GPT2Config(**SIZES).save_pretrained(tmp_path)
    path = tmp_path / ("pytorch_model.bin" if in_folder else name)
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=message) as caught:
        load_gpt2(tmp_path if in_folder else path)
    assert not re.search("weights_only|safe_globals|arbitrary code", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_without_permission_is_not_called_damaged(name, tmp_path, monkeypatch):
    make_gpt2().save_pretrained(tmp_path)
    is_open = Path.open

    def deny(path, *arguments, **options):  # root may read everything
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(ConversionError, match=rf"{name} can't be read \(Permission denied\)\. Make it readable"):
        load_gpt2(tmp_path)


def nan_in_both_embeddings(tensors):
    """Of a tied model whose head was saved too."""
    tensors["transformer.wte.weight"][3, 4] = math.nan
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.0.mlp.c_fc.bias"), r"missing: transformer\.h\.0\.mlp\.c_fc\.bias\."),
        (lambda t: t.update({"transformer.h.2.ln_1.bias": torch.ones(32)}), r"unexpected: .*h\.2\.ln_1\.bias"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.ones(31)}), r"ln_f\.bias \(31,\), not \(32,\)"),
        (lambda t: t["transformer.ln_f.bias"].fill_(math.nan), r"not finite: transformer\.ln_f\.bias"),
        (nan_in_both_embeddings, r"not finite: lm_head\.weight, transformer\.wte\.weight"),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.ones(32).char()}),
            r"of another dtype than .*ln_f\.bias torch\.int8",
        ),
        (lambda t: t.update({"lm_head.weight": torch.ones(101, 32)}), "head of .* differs from its token embeddings"),
        (lambda t: t.update({"transformer.h.0.crossattention.c_attn.bias": torch.ones(2)}), "has cross-attention"),
    ],
    ids=["missing", "unexpected", "shape", "nan", "nan in both", "int8", "head", "cross-attention"],
)
def test_wrong_weights_are_named(change, message, tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ConversionError, match=message):
        load_gpt2(tmp_path)


def test_what_is_no_gpt2_is_named(tmp_path):
    with pytest.raises(ConversionError, match=r"no config\.json"):
        load_gpt2(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json can't be read"):
        load_gpt2(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="type 'bert', not 'gpt2'"):
        load_gpt2(tmp_path)
    GPT2Config(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="has no weights"):
        load_gpt2(tmp_path)
    make_gpt2().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for change, message in (
        ({"architectures": ["GPT2DoubleHeadsModel"]}, r"architectures=\['GPT2DoubleHeadsModel'\], which can't be"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ({"layer_norm_epsilon": None}, "'layer_norm_epsilon' expected float, got NoneType"),
        ({"layer_norm_epsilon": "1e-5"}, "'layer_norm_epsilon' expected float, got str"),
        ({"id2label": ["good", "bad"]}, "configuration of .* can't be converted"),
    ):
        change_config(tmp_path, **change)
        with pytest.raises(ConversionError, match=message):
            load_gpt2(tmp_path)
        (tmp_path / "config.json").write_text(config)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConversionError, match=r"config\.json holds a list"):
        load_gpt2(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConversionError, match=r"model\.safetensors is damaged"):
        load_gpt2(tmp_path)
    with pytest.raises(ConversionError, match="neither a file or folder here nor a repository"):
        load_gpt2("no such: name")


def test_pickled_code_is_not_run(tmp_path):
    class Exploit:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"model": Exploit(), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ConversionError, match="can't be read as weights alone"):
        load_gpt2(tmp_path / "ckpt.pt")
    assert not (tmp_path / "owned").exists()
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ConversionError, match="no checkpoint of nanoGPT"):
        load_gpt2(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "a list for weights"),
        ({"wte.weight": [1.0]}, r"a list for 'wte\.weight'"),
        ({3: torch.ones(2)}, "a Tensor for 3"),
        ({"wte.weight": torch.eye(2).to_sparse()}, "not a dense tensor"),
    ],
)
def test_pickled_files_without_tensors_by_name_are_refused(content, message, tmp_path):
    GPT2Config(**SIZES).save_pretrained(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=message):
        load_gpt2(tmp_path)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 101, "block_size": 64}
    torch.save({"model": content, "model_args": sizes}, tmp_path / "ckpt.pt")
    with pytest.raises(ConversionError, match=message):
        load_gpt2(tmp_path / "ckpt.pt")


def test_other_models_in_memory_are_refused():
    with pytest.raises(ConversionError, match="Linear can't be converted: those of GPT2LMHeadModel"):
        from_gpt2(nn.Linear(2, 2))
