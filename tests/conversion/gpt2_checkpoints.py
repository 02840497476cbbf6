"""Checkpoints of GPT-2 for tests: how they are made, changed and compared."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_gpt.conversion.gpt2_checkpoint import TWINS
from tests.architectures import make_tokens


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
