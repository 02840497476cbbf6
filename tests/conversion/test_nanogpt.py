"""Checkpoints of nanoGPT: the same function in GPT-2's names, and what is refused."""

import pytest
import torch
from torch import nn

from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.conversion.gpt2_checkpoint import load_gpt2, load_language_model
from tests.architectures import make_tokens

from .gpt2_checkpoints import SIZES, make_gpt2


NANOGPT_ARGUMENTS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 101, "block_size": 64}
NANOGPT_ARGUMENTS |= {"bias": True, "dropout": 0.1}


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


@pytest.mark.parametrize("sizes", [None, {}, {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 101}])
def test_a_nanogpt_without_sizes_is_refused(sizes, tmp_path):
    torch.save({"model": {}, "model_args": sizes}, tmp_path / "ckpt.pt")
    with pytest.raises(ConversionError, match=r"lacks the sizes of a model: .*block_size have to be"):
        load_gpt2(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_nanogpt_of_wrong_shapes_is_named(shape, tmp_path):
    tensors = {name: torch.ones(shape) for name in NanoGPT(bias=False).state_dict()}
    torch.save({"model": tensors, "model_args": NANOGPT_ARGUMENTS | {"bias": False}}, tmp_path / "ckpt.pt")
    with pytest.raises(ConversionError, match="of a wrong shape"):
        load_gpt2(tmp_path / "ckpt.pt")
