"""Statistics of activations: those that all activations at once would give, whatever the batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from entropy_gpt.conversion.calibration import (
    END_OF_TEXT,
    FIRST_POSITION,
    HELD_OUT_EVERY,
    OTHERS,
    Calibration,
    calibrate,
    fingerprint,
    group_rows,
    least_rows,
)
from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.conversion.simplification import make_final_norm_static, remove_final_static_norm
from tests.architectures import make_model, make_tokens


BLOCKS, LENGTH = 30, 24


def make_blocks(count=BLOCKS):
    """Some with an end of text in them."""
    blocks = make_tokens(count, LENGTH)
    blocks[::3, 7] = 0
    return blocks


def activations(model, module, blocks):
    """Inputs and outputs of a module for all blocks at once."""
    seen = {}

    def keep(module, arguments, output):
        seen.update(inputs=arguments[0], outputs=output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        model(blocks)
    handle.remove()
    return seen["inputs"].double(), seen["outputs"].double()


@pytest.mark.parametrize("batch_size", [1, 7, 30])
@torch.no_grad()
def test_sums_are_those_of_all_rows_at_once(batch_size):
    model, blocks = make_model("SM+LN+G"), make_blocks()
    calibration = calibrate(model, blocks.split(batch_size))
    assert calibration.rows == blocks.numel()
    assert not model.training

    inputs, _ = activations(model, model.transformer.h[1].ln_2, blocks)
    deviations = (inputs.var(dim=-1, unbiased=False) + model.config.layer_norm_epsilon).sqrt()
    masks = {FIRST_POSITION: torch.zeros_like(blocks, dtype=torch.bool), END_OF_TEXT: blocks == 0}
    masks[FIRST_POSITION][:, 0] = True
    masks[OTHERS] = ~(masks[FIRST_POSITION] | masks[END_OF_TEXT])
    assert masks[END_OF_TEXT].sum() == 10
    for group, mask in masks.items():
        chosen = deviations[mask]
        expected = torch.stack([torch.tensor(float(len(chosen))).double(), chosen.sum(), chosen.square().sum()])
        torch.testing.assert_close(calibration.row_deviations("transformer.h.1.ln_2")[group], expected)

    read, written = activations(model, model.transformer.h[2].mlp, blocks)
    held_out = torch.arange(BLOCKS) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    for split, rows in (("fit", ~held_out), ("held_out", held_out)):
        u = nn.functional.pad(read[rows].flatten(0, 1), (1, 0), value=1.0)
        y = written[rows].flatten(0, 1)
        found = calibration.tensors[f"transformer.h.2.mlp.{split}"].double()
        torch.testing.assert_close(found, u.mT @ torch.cat([u, y], dim=1), rtol=1e-5, atol=1e-3)

    _, stream = activations(model, model.transformer.h[0], blocks)
    assert math.isclose(calibration.residual_scale("transformer.h.0"), stream.square().mean().sqrt(), rel_tol=1e-6)
    entropies = model(blocks, output_entropies=True).attention_entropies[1].double().mean(dim=(0, 2))
    for maximum, largest in (
        ("context", math.log(LENGTH)),
        ("causal", torch.arange(1.0, LENGTH + 1).double().log().mean()),
    ):
        expected = (entropies / largest).float()
        torch.testing.assert_close(calibration.threshold("transformer.h.1.attn", maximum), expected)


@torch.no_grad()
def test_hidden_features_are_those_of_the_activation_asked_for():
    model, blocks = make_model("SM+LN+G"), make_blocks(40)
    calibration = calibrate(model, blocks.split(8), "relu")
    _, before = activations(model, model.transformer.h[0].mlp.c_fc, blocks)
    rows = torch.arange(len(blocks)) % HELD_OUT_EVERY != HELD_OUT_EVERY - 1
    hidden = before[rows].clamp(min=0).flatten(0, 1)
    sums = calibration.tensors["transformer.h.0.mlp.fit"][0, 1 : 1 + hidden.shape[1]]
    torch.testing.assert_close(sums.double(), hidden.sum(dim=0), rtol=1e-5, atol=1e-3)


def test_more_text_takes_no_more_memory_and_gives_the_same_again():
    model, blocks = make_model("SM+LN+G"), make_blocks()
    first, again = (calibrate(model, blocks.split(8)) for _ in range(2))
    more = calibrate(model, make_blocks(3 * BLOCKS).split(8))
    assert {name: t.shape for name, t in first.tensors.items()} == {name: t.shape for name, t in more.tensors.items()}
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())


def test_the_constant_is_the_least_squares_one():
    """`x / c` against `x / std(x)`: any other constant is further off."""
    model, blocks = make_model("SM+LN+G"), make_blocks()
    inputs, _ = activations(model, model.transformer.ln_f, blocks)
    rows = inputs[group_rows(blocks, 0) == OTHERS]
    centered = rows - rows.mean(dim=-1, keepdim=True)
    target = centered / (centered.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    constant = calibrate(model, blocks.split(8)).norm_constant("transformer.ln_f")

    def error(c):
        return (centered / c - target).square().sum()

    assert error(constant) < min(error(constant * 1.01), error(constant * 0.99))


def test_groups_without_rows_go_by_the_others():
    model = make_model("SM+LN+G")
    calibration = calibrate(model, make_tokens(BLOCKS, LENGTH).split(8))
    name = "transformer.h.0.ln_1"
    assert calibration.tensors[f"{name}.rows"][END_OF_TEXT].sum() == 0
    assert calibration.norm_constant(name, END_OF_TEXT) == calibration.norm_constant(name, OTHERS)
    assert calibration.norm_constant(name, FIRST_POSITION) != calibration.norm_constant(name, OTHERS)


@pytest.mark.parametrize("end_of_text", [0, [0, 3], None])
def test_rows_are_told_apart(end_of_text):
    groups = group_rows(torch.tensor([[0, 5, 0, 3]]), end_of_text)
    second = OTHERS if end_of_text is None else END_OF_TEXT
    third = END_OF_TEXT if end_of_text == [0, 3] else OTHERS
    assert groups.tolist() == [[FIRST_POSITION, OTHERS, second, third]]


def test_statistics_are_saved_and_read_again(tmp_path):
    calibration = calibrate(make_model("SM+LN+G"), make_blocks().split(8))
    calibration.save(tmp_path / "statistics.safetensors")
    loaded = Calibration.load(tmp_path / "statistics.safetensors")
    assert loaded.context == LENGTH
    assert loaded.tensors.keys() == calibration.tensors.keys()
    assert all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in calibration.tensors.items())
    (tmp_path / "statistics.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConversionError, match="holds no statistics"):
        Calibration.load(tmp_path / "statistics.safetensors")


def test_a_fingerprint_tells_weights_settings_and_text_apart():
    model, blocks = make_model("SM+LN+G"), make_blocks()
    names = {fingerprint(model, blocks.split(8), None), fingerprint(model, blocks.split(8), "relu")}
    names.add(fingerprint(model, make_blocks().split(8), None))
    names.add(fingerprint(model, blocks.split(8), None, largest_scores=True))
    assert len(names) == 4
    assert fingerprint(model, blocks.split(8), None) in names
    with torch.no_grad():
        model.transformer.h[1].ln_1.bias[3] += 1e-3
    assert fingerprint(model, blocks.split(8), None) not in names


def test_statistics_know_nothing_of_the_final_norm_and_the_head():
    """So steps that differ by them alone are fitted to one calibration; a conversion goes on with its own model."""
    model, batches = make_model("SM+LN+G"), make_blocks().split(8)
    before, whole = (fingerprint(model, batches, None, with_head=with_head) for with_head in (False, True))
    static = make_final_norm_static(model, calibrate(model, batches))
    headed = remove_final_static_norm(static)
    for changed in (static, headed):
        assert fingerprint(changed, batches, None) == before
        assert fingerprint(changed, batches, None, with_head=True) != whole
        expected, found = (calibrate(each, batches).tensors for each in (model, changed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_too_little_text_and_wrong_weights_are_refused():
    model = make_model("SM+LN+G")
    with pytest.raises(ConversionError, match="no calibration text"):
        calibrate(model, [])
    with pytest.raises(ConversionError, match=r"Too little calibration text: 4 blocks of 60 tokens, and at least 5"):
        calibrate(model, make_tokens(HELD_OUT_EVERY - 1, 60).split(1))
    with pytest.raises(ConversionError, match=r"Blocks of 1 token .* at least 2"):
        calibrate(model, [make_tokens(HELD_OUT_EVERY, 1)])
    with pytest.raises(ConversionError, match=r"Too little calibration text: 48 tokens to fit 48 features"):
        calibrate(model, [make_tokens(HELD_OUT_EVERY, 12)])
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(ConversionError, match=r"not finite at transformer\.h\.\d"):
        calibrate(model, make_blocks().split(8))


@given(length=st.integers(2, 40))
@settings(max_examples=10, deadline=None)
def test_the_least_text_is_enough(length):
    model = make_model("SM+LN+G", n_layer=1)
    blocks = math.ceil(least_rows(model) / length)
    calibrate(model, [make_tokens(math.ceil(blocks / HELD_OUT_EVERY) * HELD_OUT_EVERY, length)])


def test_shifts_are_the_median_of_the_largest_scores_or_log_sums_of_a_head_and_position():
    model, tokens = make_model("SM(t)+LN+G").double(), make_tokens(25, 12)
    calibration = calibrate(model, tokens.split(10), largest_scores=True)
    assert not any(name.endswith(".largest") for name in calibrate(model, tokens.split(10)).tensors)
    model.set_attn_implementation("eager")
    hidden = model.transformer.wte(tokens) + model.transformer.wpe.weight[:12]
    attention = model.transformer.h[0].attn
    query, key, _ = (
        part.unflatten(-1, (4, -1)).transpose(1, 2)
        for part in attention.c_attn(model.transformer.h[0].ln_1(hidden)).chunk(3, dim=-1)
    )
    query = query * attention.temperature(torch.arange(12)[None])
    scores = (query @ key.mT * attention.scaling).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    expected = scores.amax(dim=-1).median(dim=0).values.float()
    log_sums = scores.logsumexp(dim=-1).median(dim=0).values.float()
    for function, medians in {"power4": expected, "softmax": log_sums}.items():
        shift = calibration.shift("transformer.h.0.attn", 20, function)
        torch.testing.assert_close(shift[:, :12], medians)
        assert (shift[:, 12:] == medians[:, -1:]).all()
