"""Attention within the model: dropout, masks in four dimensions under every backend, graphs for every length."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask

from tests.architectures import NO_DROPOUT, SIZES, make_model, make_tokens


BACKENDS = ("eager", "sdpa", "flex_attention")
LENGTH = 17

pytestmark = pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers sets it


def set_to_0(dropout: nn.Dropout):
    dropout.p = 0.0


@pytest.mark.parametrize("switch_off", [set_to_0, nn.Dropout.eval])
@pytest.mark.parametrize("with_entropies", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_in_training_without_its_dropout_modules_a_model_computes_as_in_evaluation(
    implementation, with_entropies, switch_off
):
    model = make_model("EReg(SM(t)+ScFuFFN)", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.5)
    model.set_attn_implementation(implementation)
    tokens = make_tokens()
    expected = model(tokens, output_entropies=with_entropies)
    model.train()
    dropped = model(tokens, output_entropies=with_entropies)
    assert (dropped.logits - expected.logits).abs().max() > 0.01
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            switch_off(module)
    got = model(tokens, output_entropies=with_entropies)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=0)
    if with_entropies:
        torch.testing.assert_close(got.attention_entropies, expected.attention_entropies, rtol=0, atol=0)


@pytest.mark.parametrize("with_entropies", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_of_attention_alone_acts_in_evaluation_too(implementation, with_entropies):
    """As uncertainty is estimated: the model in evaluation, its dropout modules in training."""
    model = make_model("SM+LN+G", attn_pdrop=0.5)
    model.set_attn_implementation(implementation)
    tokens = make_tokens()
    expected = model(tokens, output_entropies=with_entropies).logits
    for block in model.transformer.h:
        block.attn.attn_dropout.train()
    assert (model(tokens, output_entropies=with_entropies).logits - expected).abs().max() > 0.01


def packed(length: int = LENGTH) -> torch.Tensor:
    """Two documents one after the other, of which neither sees the other nor what is to come: `(length, length)`."""
    document = torch.arange(length) // 9
    return (document[:, None] == document) & torch.ones(length, length, dtype=torch.bool).tril()


def additive(visible: torch.Tensor, lowest: float = torch.finfo(torch.float32).min) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, lowest)


def masks() -> dict[str, torch.Tensor]:
    """The same in every form that a mask in four dimensions has."""
    visible = packed()[None, None]
    return {
        "boolean": visible.expand(2, 1, -1, -1),
        "boolean, of one sequence": visible,
        "boolean, for each head": visible.expand(2, SIZES["n_head"], -1, -1),
        "additive": additive(visible).expand(2, 1, -1, -1),
        "additive, of one sequence": additive(visible),
        "additive, minus infinity": additive(visible, -math.inf),
    }


def documents_apart(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and entropies of the two documents of [`packed`], each computed alone."""
    parts = [model(part, output_entropies=True) for part in tokens.split([9, LENGTH - 9], dim=1)]
    entropies = torch.cat([torch.stack(part.attention_entropies) for part in parts], dim=-1)
    return torch.cat([part.logits for part in parts], dim=1), entropies


def check_packed(model: nn.Module, tokens: torch.Tensor, mask, with_entropies: bool):
    position_ids = (torch.arange(LENGTH) % 9)[None]
    model.set_attn_implementation("sdpa")
    expected_logits, expected_entropies = documents_apart(model, tokens)
    for implementation in BACKENDS:
        model.set_attn_implementation(implementation)
        got = model(tokens, attention_mask=mask, position_ids=position_ids, output_entropies=with_entropies)
        torch.testing.assert_close(got.logits, expected_logits, rtol=1e-4, atol=2e-4)
        if with_entropies:
            torch.testing.assert_close(torch.stack(got.attention_entropies), expected_entropies, rtol=0, atol=1e-4)
            assert (got.visible_keys == position_ids + 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", masks())
@torch.no_grad()
def test_masks_in_four_dimensions_mean_the_same_to_every_backend(kind):
    check_packed(make_model("SM(t)+ScFuFFN"), make_tokens(), masks()[kind], with_entropies=False)


@pytest.mark.parametrize("kind", masks())
@torch.no_grad()
def test_with_entropies_masks_mean_the_same_to_every_backend(kind):
    check_packed(make_model("SM(t)+ScFuFFN"), make_tokens(), masks()[kind], with_entropies=True)


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_hides_what_is_to_come(implementation, kind):
    model = make_model("SM+LN+G")
    model.set_attn_implementation(implementation)
    tokens = make_tokens()
    changed = tokens.clone()
    changed[:, -1] = 2 + (tokens[:, -1] - 1) % 99
    for with_entropies in (False, True):
        before, after = (
            model(ids, attention_mask=masks()[kind], output_entropies=with_entropies).logits
            for ids in (tokens, changed)
        )
        torch.testing.assert_close(before[:, :-1], after[:, :-1], rtol=0, atol=1e-6)
        assert (before[:, -1] - after[:, -1]).abs().max() > 0.01


@torch.no_grad()
def test_a_block_mask_is_taken_with_entropies():
    model = make_model("SM+LN+G")
    tokens = make_tokens()
    expected = model(tokens, output_entropies=True)
    model.set_attn_implementation("flex_attention")
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, LENGTH, LENGTH, "cpu")
    got = model(tokens, attention_mask=mask, output_entropies=True)
    torch.testing.assert_close(got.logits, expected.logits)
    assert torch.equal(got.visible_keys, expected.visible_keys)


def test_rows_without_a_visible_key_disturb_no_others():
    mask = packed()[None, None].repeat(2, 1, 1, 1)
    mask[0, :, 4] = False
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, 4] = False
    model = make_model("SM+LN+G", n_layer=1)  # in a second layer, such a row's keys would be seen by others
    tokens = make_tokens()
    logits = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs = model(tokens, attention_mask=mask, output_entropies=True)
        logits += [outputs.logits[valid], model(tokens, attention_mask=mask).logits[valid]]
        assert (outputs.attention_entropies[0].transpose(1, 2)[~valid] == 0).all()
    for got in logits[1:]:
        torch.testing.assert_close(got, logits[0], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("implementation", "mask", "with_entropies", "message"),
    [
        ("flex_attention", additive(packed(), -3.0)[None, None], False, "holds -3: an additive mask has 0"),
        ("flash_attention_2", packed()[None, None], False, r"\(1, 1, 17, 17\).*set_attn_implementation\('sdpa'\)"),
        ("eager", packed()[None, None].long(), False, r"torch\.int64.*has to be boolean"),
        ("eager", packed()[None, None].long(), True, r"torch\.int64.*has to be boolean"),
        ("eager", additive(packed(), -3.0)[None, None], True, "holds -3: an additive mask has 0"),
        ("sdpa", additive(packed(), -3.0)[None, None], True, "holds -3: an additive mask has 0"),
    ],
)
def test_masks_that_a_backend_can_not_do_are_refused(implementation, mask, with_entropies, message):
    model = make_model("SM+LN+G")
    model.config._attn_implementation_internal = implementation  # as if flash attention were installed
    with pytest.raises(ValueError, match=message):
        model(make_tokens(), attention_mask=mask, output_entropies=with_entropies)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_layers_keep_one_mask_between_them(implementation):
    length = 64
    model = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT).train()
    tokens, mask = make_tokens(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, :20] = 0
    if implementation == "flex_attention":  # with entropies it does not compute itself, so there are gradients
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, "cpu")
    model.set_attn_implementation(implementation)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(tokens, attention_mask=mask, labels=tokens)
    visible = [tensor for tensor in kept if tensor.dtype == torch.bool and tensor.shape[-2:] == (length, length)]
    assert len(visible) == SIZES["n_layer"]
    assert len({tensor.untyped_storage().data_ptr() for tensor in visible}) == 1


@pytest.mark.parametrize("mask", [packed()[None, None], additive(packed()[None, None])], ids=["boolean", "additive"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_training_step_passes_on_a_device_without_numbers(implementation, mask):
    """With a mask in four dimensions: into others, transformers itself looks."""
    model = make_model("EReg(SM(t)+ScFuFFN)").to("meta").train()
    model.set_attn_implementation(implementation)
    tokens = make_tokens().to("meta")
    model(tokens, attention_mask=mask.to("meta"), labels=tokens).loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def make_inputs(batch_size: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    tokens = make_tokens(batch_size, length)
    if not padded:
        return {"input_ids": tokens}
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0)}


def assert_same(got, expected):
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.attention_entropies, expected.attention_entropies)
    assert torch.equal(got.visible_keys, expected.visible_keys)


every_graph = pytest.mark.parametrize(
    ("notation", "implementation"), [("SM+LN+G", "eager"), ("EReg(SM(t)+ScFuFFN)", "sdpa")]
)


@pytest.mark.slow
@every_graph
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_serves_every_length_with_entropies(notation, implementation, padded, training):
    torch._dynamo.reset()
    model = make_model(notation, **NO_DROPOUT).train(training)
    model.set_attn_implementation(implementation)
    cases = [make_inputs(2, length, padded) for length in (17, 29, 41)]
    cases = [{**inputs, "labels": inputs["input_ids"], "output_entropies": True} for inputs in cases]
    expected = [model(**inputs) for inputs in cases]
    parameters = list(model.parameters())  # in evaluation, thresholds are not used
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for inputs, ours in zip(cases, expected, strict=True):
        got = compiled(**inputs)
        assert_same(got, ours)
        # A captured graph gives zeros where there is no gradient.
        wanted, found = (
            torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            for loss in (ours.loss, got.loss)
        )
        torch.testing.assert_close(found, wanted)
    assert counter.frame_count < len(cases)  # not one graph for each length


@pytest.mark.slow
@every_graph
@pytest.mark.parametrize("padded", [False, True])
def test_exports_strictly_for_every_length_with_entropies(notation, implementation, padded):
    torch._dynamo.reset()
    model = make_model(notation)
    model.set_attn_implementation(implementation)
    model.config.use_cache = False
    inputs = make_inputs(2, 17, padded)
    sizes = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", min=3, max=SIZES["n_positions"])}
    shapes = {**dict.fromkeys(inputs, sizes), "output_entropies": None}
    program = torch.export.export(
        model, (), {**inputs, "output_entropies": True}, dynamic_shapes=shapes, strict=True
    ).module()
    inputs = {**make_inputs(3, 29, padded), "output_entropies": True}
    assert_same(program(**inputs), model(**inputs))
