"""GPT-2 checkpoints of every kind to EntropyGPT and back, and what is refused."""

import argparse
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
)

from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.conversion.gpt2_checkpoint import TWINS, from_gpt2, load_gpt2, load_language_model, to_gpt2
from modeling_entropy_gpt import EntropyGPTForCausalLM, EntropyGPTForSequenceClassification, EntropyGPTModel
from tests.architectures import ARCHITECTURES, make_model, make_tokens
from tests.slow import in_turn


SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 101, "n_positions": 64, "pad_token_id": 1}
HEADS = list(TWINS)


def make_gpt2(model_class=GPT2LMHeadModel, **fields):
    """A GPT-2 with weights so large that a wrong one shows in the logits."""
    config = GPT2Config(**{**SIZES, "bos_token_id": 0, "eos_token_id": 0, "num_labels": 3, **fields})
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def answer(model, tokens):
    """All floating point results of a forward pass, one after the other."""
    outputs = model(tokens, use_cache=False)
    return torch.cat([value.flatten() for value in outputs.to_tuple() if torch.is_tensor(value)])


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def write_pickled_shards(model, folder):
    """As old versions of transformers did: half of the parameters in each file, and an index."""
    names = list(model.state_dict())
    weight_map = {name: f"pytorch_model-{1 + index % 2}.bin" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: model.state_dict()[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same_function(converted, original):
    tokens = make_tokens()
    torch.testing.assert_close(answer(converted, tokens), answer(original, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_class", HEADS)
def test_a_saved_checkpoint_computes_the_same_and_comes_back_bit_for_bit(model_class, tmp_path):
    original = make_gpt2(model_class)
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    converted = load_gpt2(tmp_path)
    assert type(converted) is TWINS[model_class]
    assert converted.config.notation == "SM+LN+G"
    assert_same_function(converted, original)

    back = to_gpt2(converted)
    assert type(back) is model_class
    assert back.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert_same_function(back, original)
    names = ["n_layer", "n_positions", "activation_function", "tie_word_embeddings", "id2label", "pad_token_id"]
    assert [getattr(back.config, name) for name in names] == [getattr(original.config, name) for name in names]


@pytest.mark.parametrize("model_class", HEADS)
def test_a_model_in_memory_shares_its_parameters(model_class):
    original = make_gpt2(model_class)
    converted = from_gpt2(original)
    assert_same_function(converted, original)
    pairs = zip(converted.parameters(), original.parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() and ours.requires_grad for ours, theirs in pairs)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_tied_and_not(tied, tmp_path):
    original = make_gpt2(tie_word_embeddings=tied)
    original.save_pretrained(tmp_path)
    converted = load_gpt2(tmp_path)
    assert (converted.lm_head.weight is converted.get_input_embeddings().weight) == tied
    assert_same_function(converted, original)
    assert to_gpt2(converted).config.tie_word_embeddings == tied


def test_only_the_files_of_the_checkpoint_are_read(tmp_path):
    """Not others beside them, and shards by their index; safetensors before pickled files."""
    original, other = make_gpt2(), make_gpt2()
    original.save_pretrained(tmp_path)
    for name in ("model_old", "model-best", "model-00001-of-00002"):
        save_file({"transformer.ln_f.bias": other.transformer.ln_f.bias.detach()}, tmp_path / f"{name}.safetensors")
    write_pickled_shards(other, tmp_path)
    assert_same_function(load_gpt2(tmp_path), original)
    (tmp_path / "model.safetensors").unlink()
    assert_same_function(load_gpt2(tmp_path), other)
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save({"transformer.ln_f.bias": torch.ones(32)}, tmp_path / "pytorch_model_old.bin")
    assert_same_function(load_gpt2(tmp_path), original)


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


def test_old_files_without_prefix_with_masks_and_pickled(tmp_path):
    """As the first GPT-2 on the Hub was saved."""
    original = make_gpt2()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in original.state_dict().items()}
    del tensors["lm_head.weight"]
    for layer in range(SIZES["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "config.json").write_text(json.dumps({**original.config.to_dict(), "n_ctx": 64}))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_same_function(load_gpt2(tmp_path), original)


def test_half_precision_stays(tmp_path):
    make_gpt2().to(torch.bfloat16).save_pretrained(tmp_path)
    converted = load_gpt2(tmp_path)
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}
    converted.save_pretrained(tmp_path / "ours")
    assert EntropyGPTForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16


class NanoGPTBlock(nn.Module):
    """Written from nanoGPT's parameter names: linear maps of torch, the exact GELU, biases or none."""

    def __init__(self, width, heads, bias, approximate="none"):
        super().__init__()
        self.heads, self.approximate = heads, approximate
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        inner = 4 * width
        outer = 3 * width
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, outer, bias), "c_proj": nn.Linear(width, width, bias)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner, bias), "c_proj": nn.Linear(inner, width, bias)})

    def forward(self, x):
        states = self.attn["c_attn"](self.ln_1(x)).chunk(3, dim=-1)
        query, key, value = (state.unflatten(-1, (self.heads, -1)).transpose(1, 2) for state in states)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn["c_proj"](attended.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate=self.approximate))


class NanoGPT(nn.Module):
    def __init__(self, bias, approximate="none", tied=True):
        super().__init__()
        width = SIZES["n_embd"]
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(101, width), "wpe": nn.Embedding(64, width)})
        self.transformer["h"] = nn.ModuleList(
            [NanoGPTBlock(width, 4, bias, approximate) for _ in range(SIZES["n_layer"])]
        )
        self.transformer["ln_f"] = nn.LayerNorm(width, bias=bias)
        self.lm_head = nn.Linear(width, 101, bias=False)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)

    def forward(self, tokens):
        x = self.transformer["wte"](tokens) + self.transformer["wpe"].weight[: tokens.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


NANOGPT_ARGUMENTS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 101, "block_size": 64}
NANOGPT_ARGUMENTS |= {"bias": True, "dropout": 0.1}


def save_nanogpt(model, path, prefix="", **content):
    tensors = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": tensors, "model_args": NANOGPT_ARGUMENTS, "iter_num": 3} | content, path)
    return path


def assert_same_logits(converted, original):
    tokens = make_tokens()
    torch.testing.assert_close(converted(tokens).logits, original(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("bias", "tied", "prefix"),
    [
        (True, True, "_orig_mod."),
        (False, True, "module."),
        (True, False, "_orig_mod.module."),
        (False, False, "module._orig_mod."),
    ],
)
def test_checkpoints_of_nanogpt(bias, tied, prefix, tmp_path, caplog):
    original = NanoGPT(bias, tied=tied)
    path = save_nanogpt(original, tmp_path / "ckpt.pt", prefix, model_args=NANOGPT_ARGUMENTS | {"bias": bias})
    converted = load_gpt2(path)
    assert (converted.config.attn_pdrop, converted.config.tie_word_embeddings) == (0.1, tied)
    assert_same_logits(converted, original)
    assert not caplog.text


@pytest.mark.parametrize("proof", ["no bias among the arguments", "embeddings without decay"])
def test_nanogpt_from_before_june_2023_had_another_gelu(proof, tmp_path, caplog):
    original = NanoGPT(bias=True, approximate="tanh")
    content = {"model_args": {name: value for name, value in NANOGPT_ARGUMENTS.items() if name != "bias"}}
    if proof.startswith("embeddings"):
        content = {"optimizer": {"param_groups": [{"params": [*range(8)]}, {"params": [*range(8, 28)]}]}}
    path = save_nanogpt(original, tmp_path / "ckpt.pt", **content)
    assert_same_logits(load_gpt2(path), original)
    assert "is older than June 2023" in caplog.text
    assert "convert it with --activation gelu" in caplog.text
    caplog.clear()
    assert load_gpt2(path, activation="gelu").config.activation_function == "gelu"
    assert not caplog.text


def test_the_gelu_of_a_nanogpt_can_be_chosen(tmp_path):
    """Of a file between January and May 2023 without its optimizer, nothing proves the age."""
    original = NanoGPT(bias=True, approximate="tanh")
    path = save_nanogpt(original, tmp_path / "ckpt.pt", optimizer={"param_groups": [{"params": [*range(10)]}]})
    assert_same_logits(load_language_model(path, activation="gelu_new"), original)
    assert load_language_model(path).config.activation_function == "gelu"
    with pytest.raises(ConversionError, match="give gelu or gelu_new"):
        load_language_model(path, activation="relu")
    make_gpt2().save_pretrained(tmp_path / "folder")
    with pytest.raises(ConversionError, match="--activation gelu_new has no effect"):
        load_language_model(tmp_path / "folder", activation="gelu_new")


@pytest.mark.parametrize(
    ("argument", "named"),
    [({"use_relu": True}, "use_relu=True"), ({"n_kv_head": 2, "rope": 1}, "n_kv_head=2, rope=1")],
)
def test_a_variant_of_nanogpt_is_refused_by_name(argument, named, tmp_path):
    path = save_nanogpt(NanoGPT(bias=True), tmp_path / "ckpt.pt", model_args=NANOGPT_ARGUMENTS | argument)
    with pytest.raises(ConversionError, match=rf"variant of nanoGPT: its model_args have {named}"):
        load_gpt2(path)


def test_alias_names_of_a_configuration_are_read_as_transformers_reads_them(tmp_path):
    original = make_gpt2(GPT2LMHeadModel)
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for alias, name in GPT2Config.attribute_map.items():
        config[alias] = config.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_function(load_gpt2(tmp_path), original)
    load_gpt2(tmp_path).save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for alias, name in GPT2Config.attribute_map.items():
        config[alias] = config.pop(name)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    assert load_language_model(tmp_path / "ours").config.n_head == original.config.n_head


def test_what_holds_no_language_model_is_named_for_what_it_is(tmp_path):
    make_gpt2(GPT2Model).save_pretrained(tmp_path / "body")
    with pytest.raises(
        ConversionError, match=r"saved as GPT2Model, without a language modelling head.*GPT2LMHeadModel"
    ):
        load_language_model(tmp_path / "body")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(ConversionError, match="holds an adapter of a/b, not a model"):
        load_language_model(tmp_path / "adapter")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 548118077\n"
LLM_C = (20240326).to_bytes(4, "little") + (3).to_bytes(4, "little") + bytes(1016)


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


def test_published_models_without_layernorm_become_static(tmp_path):
    """They are stored with an epsilon beyond every variance, and gains as much larger."""
    original = make_gpt2(layer_norm_epsilon=1e12)
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.copy_((1 + 0.2 * torch.randn_like(parameter)) * 1e6)
    original.save_pretrained(tmp_path)
    converted = load_gpt2(tmp_path)
    assert (converted.config.normalization, converted.config.final_normalization) == ("static", "static")
    assert converted.config.layer_norm_epsilon < 1
    gains = converted.transformer.ln_f.weight / converted.transformer.ln_f.standard_deviation
    assert 0.1 < gains.abs().mean() < 10
    tokens = make_tokens()
    torch.testing.assert_close(converted(tokens).logits, original(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_architectures_that_gpt2_has_not_are_refused(notation):
    model = make_model(notation)
    if notation in ("SM+LN+G", "SM+LN+R", "SM+LN"):
        assert_same_function(to_gpt2(model), model)
        return
    with pytest.raises(ConversionError, match="can't be written as a GPT-2, which has no "):
        to_gpt2(model)


@pytest.mark.parametrize("notation", ["SM+LN+G", "SM+LN+R", "SM+LN"])
def test_an_architecture_that_gpt2_has_comes_back(notation, tmp_path):
    model = make_model(notation)
    model.generation_config.max_new_tokens = 7
    gpt2 = to_gpt2(model)
    gpt2.save_pretrained(tmp_path)
    assert load_gpt2(tmp_path).generation_config.max_new_tokens == 7
    assert from_gpt2(gpt2).config.notation == load_gpt2(tmp_path).config.notation == notation


def test_loose_settings_of_generation_are_kept_and_broken_ones_named(tmp_path):
    make_gpt2(GPT2LMHeadModel).save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.7, "top_k": 40}')  # without do_sample, as published models have it
    load_gpt2(tmp_path).save_pretrained(tmp_path / "converted")
    assert load_language_model(tmp_path / "converted").generation_config.temperature == 0.7
    for broken in ("{", '{"max_new_tokens": -1}', '{"max_new_tokens": "x"}'):
        file.write_text(broken)
        with pytest.raises(ConversionError, match=r"generation_config\.json can't be used"):
            load_gpt2(tmp_path)


@pytest.mark.parametrize(("notation", "tied"), in_turn(ARCHITECTURES, [True, False]))
def test_an_entropy_gpt_is_loaded_as_it_is(notation, tied, tmp_path):
    original = make_model(notation, tie_word_embeddings=tied, head_bias=not tied, use_cache=False).to(torch.bfloat16)
    original.generation_config.update(use_cache=True, max_new_tokens=7)
    original.save_pretrained(tmp_path)
    loaded = load_language_model(tmp_path)
    assert (loaded.generation_config.use_cache, loaded.generation_config.max_new_tokens) == (True, 7)
    assert not loaded.training
    assert loaded.config.to_diff_dict() == EntropyGPTForCausalLM.from_pretrained(tmp_path).config.to_diff_dict()
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    state = original.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.0.mlp.c_fc.bias"), r"missing: transformer\.h\.0\.mlp\.c_fc\.bias\."),
        (lambda t: t.pop("transformer.wte.weight"), r"missing: .*transformer\.wte\.weight"),
        (lambda t: t.update({"transformer.h.3.ln_1.bias": torch.ones(48)}), r"unexpected: .*h\.3\.ln_1\.bias"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.ones(47)}), r"ln_f\.bias \(47,\), not \(48,\)"),
        (lambda t: t["transformer.ln_f.bias"].fill_(math.nan), r"not finite: transformer\.ln_f\.bias"),
        (lambda t: t.update({"lm_head.weight": torch.ones(101, 48)}), "head of .* differs from its token embeddings"),
    ],
    ids=["missing", "no embedding", "unexpected", "shape", "nan", "head"],
)
def test_wrong_weights_of_an_entropy_gpt_are_named(change, message, tmp_path):
    make_model("EReg(SM(t)+LN+G)").save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ConversionError, match=message):
        load_language_model(tmp_path)


def test_an_untied_head_has_to_be_there(tmp_path):
    make_model("SM+LN+G", tie_word_embeddings=False).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ConversionError, match=r"missing: lm_head\.weight"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("model_class", [EntropyGPTModel, EntropyGPTForSequenceClassification, *HEADS[1:]])
def test_what_is_no_language_model_is_refused(model_class, tmp_path):
    is_gpt2 = model_class in HEADS
    model = make_gpt2(model_class) if is_gpt2 else make_model("SM+LN+G", model_class)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=f"is no language model: it was saved as {model_class.__name__}"):
        load_language_model(tmp_path)
    if not is_gpt2 and model_class is not EntropyGPTModel:  # which is told by its head
        change_config(tmp_path, architectures=None)
        with pytest.raises(ConversionError, match="is no language model"):
            load_language_model(tmp_path)


def test_wrong_configurations_of_an_entropy_gpt_are_named(tmp_path):
    make_model("SM+LN+G").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"normalization": "batch"}, "normalization"),
        ({"n_head": 5}, "n_head=5 does not divide"),
        ({"id2label": [1]}, "configuration of .* can't be converted"),
        ({"architectures": "EntropyGPTForCausalLM"}, "architectures='EntropyGPTForCausalLM', which can't be"),
        ({"model_type": "bert"}, "type 'bert', not 'gpt2' or 'entropy_gpt'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConversionError, match=message):
            load_language_model(tmp_path)


def test_what_a_configuration_holds_beside_its_fields_stays_there(tmp_path):
    """As it does where transformers loads it, with a warning if it looks like a field's name misspelt."""
    model = make_model("SM+LN+G")
    model.config.sep_token_id, model.config.n_layers = 7, 12
    model.save_pretrained(tmp_path)
    loaded = load_language_model(tmp_path).config
    assert (loaded.sep_token_id, loaded.n_layers, loaded.n_layer) == (7, 12, 3)


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


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class LoopbackHub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as a download takes: what a repository holds, and its files."""

    folder: Path
    commit = "0" * 40

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        files = sorted(self.folder.iterdir())
        if self.path.startswith("/api/models/someone/gpt2/tree/"):
            entries = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": sha256(path.read_bytes())}
                for path in files
            ]
            body = json.dumps(entries).encode()
        elif self.path.startswith("/api/models/someone/gpt2"):
            names = [{"rfilename": path.name} for path in files]
            body = json.dumps({"id": "someone/gpt2", "sha": self.commit, "siblings": names}).encode()
        elif self.path.startswith(f"/someone/gpt2/resolve/{self.commit}/"):
            body = (self.folder / self.path.rpartition("/")[2]).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", sha256(body))
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


LOAD_FROM_HUB = """
import sys
from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.conversion.gpt2_checkpoint import load_gpt2
try:
    load_gpt2(sys.argv[1]).save_pretrained(sys.argv[2])
except ConversionError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["safetensors", "pickled", "pickled shards"])
def test_a_repository_of_the_hub(weights, tmp_path):
    original = make_gpt2()
    original.save_pretrained(tmp_path / "repository")
    if weights != "safetensors":
        (tmp_path / "repository" / "model.safetensors").rename(tmp_path / "repository" / "model_old.safetensors")
    if weights == "pickled":
        torch.save(original.state_dict(), tmp_path / "repository" / "pytorch_model.bin")
    elif weights == "pickled shards":
        write_pickled_shards(original, tmp_path / "repository")
    handler = type("Handler", (LoopbackHub,), {"folder": tmp_path / "repository"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }

    def load(name):
        command = [sys.executable, "-c", LOAD_FROM_HUB, name, str(tmp_path / "converted")]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    try:
        process = load("someone/gpt2")
        assert process.returncode == 0, process.stderr[-3000:]
        missing = load("someone/nothing")
    finally:
        server.shutdown()
    assert_same_function(EntropyGPTForCausalLM.from_pretrained(tmp_path / "converted").eval(), original)
    assert missing.returncode == 1
    assert "refused: someone/nothing is neither" in missing.stderr


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


@pytest.mark.parametrize("sizes", [None, {}, {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 101}])
def test_a_nanogpt_without_sizes_is_refused(sizes, tmp_path):
    torch.save({"model": {}, "model_args": sizes}, tmp_path / "ckpt.pt")
    with pytest.raises(ConversionError, match=r"lacks the sizes of a model: .*block_size have to be"):
        load_gpt2(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_nanogpt_of_wrong_shapes_is_named(shape, tmp_path):
    tensors = {name: torch.ones(shape) for name in NanoGPT(bias=False).state_dict()}
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 101, "block_size": 64, "bias": False}
    torch.save({"model": tensors, "model_args": sizes}, tmp_path / "ckpt.pt")
    with pytest.raises(ConversionError, match="of a wrong shape"):
        load_gpt2(tmp_path / "ckpt.pt")


def test_other_models_in_memory_are_refused():
    with pytest.raises(ConversionError, match="Linear can't be converted: those of GPT2LMHeadModel"):
        from_gpt2(nn.Linear(2, 2))
