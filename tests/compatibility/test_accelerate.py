"""accelerate places, offloads, saves and resumes models of every architecture without another result."""

import math

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.utils import compute_module_sizes
from torch.utils.data import DataLoader

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from tests.architectures import ARCHITECTURES, NO_DROPOUT, make_model, make_tokens
from tests.slow import slow_but
from tests.twins import make_twins


PROPOSAL = "EReg(SM(t)+ScFuFFN)"
# With all but the embeddings on the disk, and loose parameters apart from the maps beside them.
ON_DISK = {
    "transformer.wte": "cpu",
    "transformer.wpe": "cpu",
    "transformer.drop": "cpu",
    "lm_head": "cpu",
    "transformer.h.0": "cpu",
    "transformer.h.1": "disk",
    "transformer.h.2": "disk",
    "transformer.ln_f": "disk",
}


def empty(folder) -> EntropyGPTForCausalLM:
    with init_empty_weights():
        model = EntropyGPTForCausalLM(EntropyGPTConfig.from_pretrained(folder))
    model.tie_weights()
    return model


def load_by_accelerate(folder, offload_folder, device_map):
    """Without `offload_buffers`, accelerate leaves buffers at their initial values where modules are on the disk."""
    model = empty(folder)
    return load_checkpoint_and_dispatch(
        model,
        str(folder / "model.safetensors"),
        device_map=device_map,
        no_split_module_classes=model._no_split_modules,
        offload_folder=offload_folder,
        offload_buffers=True,
    )


def load_by_transformers(folder, offload_folder, device_map):
    return EntropyGPTForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=offload_folder)


def move_away(folder, offload_folder, device_map):
    model = EntropyGPTForCausalLM.from_pretrained(folder)
    if device_map == "disk":
        return disk_offload(model, offload_folder, execution_device=torch.device("cpu"))
    return cpu_offload(model, execution_device=torch.device("cpu"))


WAYS = {
    "load_checkpoint_and_dispatch, one device": (load_by_accelerate, {"": "cpu"}),
    "load_checkpoint_and_dispatch, auto": (load_by_accelerate, "auto"),
    "load_checkpoint_and_dispatch, disk": (load_by_accelerate, ON_DISK),
    "from_pretrained, cpu": (load_by_transformers, "cpu"),
    "from_pretrained, one device": (load_by_transformers, {"": "cpu"}),
    "from_pretrained, disk": (load_by_transformers, ON_DISK),
    "cpu_offload": (move_away, "cpu"),
    "disk_offload": (move_away, "disk"),
}


def make_calibrated(notation) -> EntropyGPTForCausalLM:
    """Static norms whose constants are not those at initialisation."""
    model = make_model(notation)
    for name, buffer in model.named_buffers():
        if name.endswith("standard_deviation"):
            buffer.fill_(1.7)
    return model


@torch.no_grad()
def answer(model, tokens):
    """Everything that a pass gives, and what is generated with and without entropies."""
    outputs = model.eval()(tokens, labels=tokens, output_entropies=True)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    generated = model.generate(tokens[:, :5], **options)
    assert torch.equal(model.generate(tokens[:, :5], use_cache=False, **options), generated)
    penalty = [] if outputs.entropy_loss is None else [outputs.entropy_loss, outputs.penalized_share]
    return [generated, outputs.logits, outputs.loss, *outputs.attention_entropies, *penalty]


# Of every kind of parameter; the others take their time.
KINDS = ("EReg(SM(t_h)+StaticLN+LearnableLeakyR+ScFFN)", "SM+ScFuFFN+SN(QKVO+FFN)")


@pytest.mark.parametrize("notation", slow_but(KINDS, ARCHITECTURES))
def test_placing_and_offloading_change_nothing(notation, tmp_path, compared):
    model, tokens = make_calibrated(notation), make_tokens()
    model.save_pretrained(tmp_path / "model")
    expected = answer(model, tokens)
    for number, (way, (load, device_map)) in enumerate(WAYS.items()):
        placed = load(tmp_path / "model", tmp_path / str(number), device_map)
        for got, wanted in zip(answer(placed, tokens), expected, strict=True):
            assert torch.equal(got, wanted), way
    if notation == PROPOSAL:
        compared("accelerate", f"loading and offloading: {'; '.join(WAYS)}", "identical logits, entropies, tokens")


def test_single_parameters_on_the_disk(tmp_path):
    """Temperatures, thresholds and scales are modules of their own, so each may lie elsewhere."""
    model, tokens = make_calibrated("EReg(SM(t_h)+StaticLN+LearnableLeakyR+ScFFN)"), make_tokens()
    model.save_pretrained(tmp_path / "model")
    device_map = {}
    for name, module in model.named_modules():
        if not list(module.children()) and list(module.state_dict()):
            small = name.endswith(("temperature", "threshold", "residual_scaling", "act", "ln_1", "ln_2", "ln_f"))
            device_map[name] = "disk" if small else "cpu"
    assert sum(place == "disk" for place in device_map.values()) == 6 * 3 + 1
    placed = load_by_accelerate(tmp_path / "model", tmp_path / "offloaded", device_map)
    assert placed.transformer.h[1].attn.threshold.entropy_threshold.is_meta
    for got, wanted in zip(answer(placed, tokens), answer(model, tokens), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_maps_are_those_of_gpt2(share, tmp_path):
    """Of a model for which there is not enough memory; blocks stay whole."""
    maps, models = [], make_twins(n_layer=6)
    for model in models:
        memory = {"cpu": int(share * compute_module_sizes(model)[""]), "disk": 10**9}
        maps.append(infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules))
    assert maps[0] == maps[1]
    assert set(maps[1].values()) == {"cpu", "disk"}
    tokens = make_tokens()
    expected = models[1](tokens).logits
    placed = dispatch_model(models[1], maps[1], main_device="cpu", offload_dir=tmp_path)
    assert torch.equal(placed(tokens).logits, expected)


def train(accelerator, model, optimizer, batches):
    losses = []
    for batch in batches:
        outputs = model(batch, labels=batch)
        accelerator.backward(outputs.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    return losses


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("safe_serialization", [True, False])
@pytest.mark.parametrize("notation", ["SM+LN+G", PROPOSAL, "SM+ScFuFFN+SN(QKVO+FFN)", "SM+ScFFN+WN(QKV+FFN)"])
def test_a_loop_of_ones_own_is_resumed(notation, safe_serialization, tmp_path, compared):
    """Of five steps, the last three are taken again from the state after two, in a new model."""
    accelerator = Accelerator(cpu=True)
    batches = DataLoader(make_tokens(10, 16), batch_size=2)

    def prepare():
        model = make_model(notation, **NO_DROPOUT, entropy_coefficient=0.1).train()
        return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), batches)

    model, optimizer, loader = prepare()
    batches_of_run = list(loader)
    train(accelerator, model, optimizer, batches_of_run[:2])
    accelerator.save_state(tmp_path, safe_serialization=safe_serialization)
    expected = train(accelerator, model, optimizer, batches_of_run[2:])
    assert all(map(math.isfinite, expected))

    accelerator.free_memory()
    other, optimizer, _ = prepare()
    accelerator.load_state(tmp_path)
    assert accelerator.unwrap_model(other) is not accelerator.unwrap_model(model)
    assert train(accelerator, other, optimizer, batches_of_run[2:]) == expected
    for name, tensor in accelerator.get_state_dict(other).items():
        assert torch.equal(tensor, accelerator.get_state_dict(model)[name]), name
    if notation == PROPOSAL and safe_serialization:
        compared("accelerate", "a loop resumed from `save_state`", "identical losses and weights")
