"""The penalty against Algorithm 1 and against the formula of the public code, and what it must not depend on."""

import copy
import math

import pytest
import torch

from modeling_entropy_gpt import EntropyGPTForTokenClassification
from modeling_entropy_gpt.entropy_regularization import (
    count_visible_keys,
    entropy_penalty,
    number_sequences,
    penalized_share,
    reduce_over_batch,
)
from tests.architectures import NO_DROPOUT, SIZES, make_model, make_tokens
from tests.slow import slow_cases


LAYERS, BATCH, HEADS, LENGTH = 3, 4, 2, 9
REDUCTIONS = ("head_mean", "row_mean", "row_sum")
MAXIMA = ("context", "causal")
TOLERANCE = 0.2


def make_entropies():
    """Entropies anywhere between 0 and what a causal mask allows, and different thresholds everywhere."""
    visible = torch.arange(1, LENGTH + 1)
    entropies = torch.rand(LAYERS, BATCH, HEADS, LENGTH, dtype=torch.float64) * visible.log()
    return entropies, torch.rand(LAYERS, HEADS, dtype=torch.float64), visible.expand(BATCH, -1)


def algorithm_1(entropies, thresholds, tolerance):
    """arXiv 2501.03489, Algorithm 1, for one sequence: loops over layers and heads, as it is printed."""
    maximum = math.log(entropies.shape[-1])
    layers = []
    for layer in range(entropies.shape[0]):
        heads = []
        for head in range(entropies.shape[1]):
            delta = entropies[layer, head].mean() - thresholds[layer, head] * maximum
            heads.append(delta**2 if abs(delta) > tolerance * maximum else 0 * delta)
        layers.append(sum(heads) / len(heads))
    return sum(layers) / len(layers)


def test_head_mean_is_algorithm_1():
    entropies, thresholds, visible = make_entropies()
    got = entropy_penalty(entropies, thresholds, visible, TOLERANCE, "context", "head_mean")
    expected = torch.stack([algorithm_1(entropies[:, b], thresholds, TOLERANCE) for b in range(BATCH)])
    torch.testing.assert_close(got, expected)
    assert got.min() > 0


@pytest.mark.parametrize("maximum", MAXIMA)
def test_rows_are_penalised_one_by_one(maximum):
    entropies, thresholds, visible = make_entropies()
    expected = torch.zeros(BATCH, dtype=torch.float64)
    for layer, b, head, row in torch.cartesian_prod(*(torch.arange(n) for n in entropies.shape)).tolist():
        largest = math.log(LENGTH if maximum == "context" else row + 1)
        delta = entropies[layer, b, head, row] - thresholds[layer, head] * largest
        if abs(delta) > TOLERANCE * largest:
            expected[b] += delta**2 / (LAYERS * HEADS)
    got = {p: entropy_penalty(entropies, thresholds, visible, TOLERANCE, maximum, p) for p in REDUCTIONS}
    torch.testing.assert_close(got["row_sum"], expected)
    torch.testing.assert_close(got["row_mean"], expected / LENGTH)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_row_sum_of_a_model_is_the_formula_of_the_public_code(implementation):
    """
    Deviations of all rows squared where they leave the margin, summed over batch and rows, averaged over heads and
    layers; thresholds from the first block; entropies from attention matrices with 1e-9 in the logarithm, which is
    all the difference that is left.
    """
    model = make_model("EReg(SM+ScFuFFN)", **NO_DROPOUT, entropy_penalty="row_sum", entropy_coefficient=1e-3).double()
    thresholds = model.transformer.h[0].attn.threshold.entropy_threshold
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.threshold.entropy_threshold.copy_(thresholds)
    tokens = make_tokens(3, 16)
    model.set_attn_implementation("eager")
    attentions = model(tokens, output_attentions=True).attentions

    layers = []
    for probabilities in attentions:
        entropies = -(probabilities * torch.log(probabilities + 1e-9)).sum(dim=-1)
        deviation = entropies - thresholds[None, :, None] * math.log(16)
        outside = (deviation.abs() > TOLERANCE * math.log(16)).double()
        layers.append((deviation**2 * outside).sum(dim=(0, 2)).mean())
    expected = sum(layers) / len(layers)

    model.set_attn_implementation(implementation)
    outputs = model.train()(tokens, labels=tokens)
    torch.testing.assert_close(outputs.entropy_loss, expected, rtol=1e-7, atol=0)
    assert outputs.loss.item() == pytest.approx((outputs.cross_entropy_loss + 1e-3 * outputs.entropy_loss).item())


def test_inside_the_margin_there_is_no_penalty():
    visible = torch.full((1, 4), 8)
    thresholds = torch.tensor([[0.5]])
    for part, penalised in ((0.31, False), (0.69, False), (0.29, True), (0.71, True)):
        entropies = torch.full((1, 1, 1, 4), part * math.log(8))
        for reduction in REDUCTIONS:
            penalty = entropy_penalty(entropies, thresholds, visible, TOLERANCE, "context", reduction)
            assert (penalty.item() > 0) == penalised, (part, reduction)


@pytest.mark.parametrize("maximum", MAXIMA)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_penalised_share_is_counted(reduction, maximum):
    """Against loops over what can be penalised, with padding of different lengths on the left."""
    entropies, thresholds, visible = make_entropies()
    padding = torch.arange(BATCH)[:, None]
    visible = (visible - padding).clamp(min=0)
    got = penalized_share(entropies, thresholds, visible, TOLERANCE, maximum, reduction)
    for b in range(BATCH):
        rows = range(b, LENGTH)
        largest = [math.log(LENGTH - b if maximum == "context" else row - b + 1) for row in rows]
        count, penalised = 0, 0
        for layer, head in torch.cartesian_prod(torch.arange(LAYERS), torch.arange(HEADS)).tolist():
            values, theta = entropies[layer, b, head, b:].tolist(), thresholds[layer, head].item()
            pairs = list(zip(values, largest, strict=True))
            if reduction == "head_mean":
                pairs = [(sum(values) / len(values), sum(largest) / len(largest))]
            count += len(pairs)
            penalised += sum(abs(value - theta * most) > TOLERANCE * most for value, most in pairs)
        assert got[b].item() == pytest.approx(penalised / count)
    assert got.max() > got.min() > 0


@pytest.mark.parametrize("maximum", MAXIMA)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_is_ignored(maximum, reduction):
    entropies, thresholds, visible = make_entropies()
    expected = entropy_penalty(entropies, thresholds, visible, TOLERANCE, maximum, reduction)
    padded_entropies = torch.cat([torch.full_like(entropies[..., :3], 7.0), entropies], dim=-1)
    padded_visible = torch.cat([torch.zeros_like(visible[:, :3]), visible], dim=-1)
    got = entropy_penalty(padded_entropies, thresholds, padded_visible, TOLERANCE, maximum, reduction)
    torch.testing.assert_close(got, expected)


def test_a_sequence_of_padding_alone_has_no_penalty_and_finite_gradients():
    entropies, thresholds, visible = make_entropies()
    thresholds.requires_grad_()
    for reduction in REDUCTIONS:
        for maximum in MAXIMA:
            penalty = entropy_penalty(entropies, thresholds, 0 * visible, TOLERANCE, maximum, reduction)
            assert penalty.eq(0).all()
            assert penalized_share(entropies, thresholds, 0 * visible, TOLERANCE, maximum, reduction).eq(0).all()
            assert torch.autograd.grad(penalty.sum(), thresholds)[0].isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parts_of_a_batch_add_up_to_the_whole(reduction):
    penalties, tokens = torch.rand(6), torch.tensor([3, 9, 1, 0, 7, 4])
    whole = reduce_over_batch(penalties, tokens, None, reduction)
    parts = [reduce_over_batch(penalties[s], tokens[s], 24, reduction) for s in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), whole)


def test_visible_keys_of_masks_and_packing():
    positions = torch.arange(5)[None]
    assert count_visible_keys(positions, None).tolist() == [[1, 2, 3, 4, 5]]
    assert count_visible_keys(torch.tensor([[0, 1, 0, 1, 2]]), None).tolist() == [[1, 2, 1, 2, 3]]
    assert count_visible_keys(positions[:, :2] + 3, None, past_length=3).tolist() == [[4, 5]]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert count_visible_keys(positions, mask).tolist() == [[0, 0, 1, 2, 3], [1, 2, 3, 0, 0]]
    assert count_visible_keys(positions[:, :2], mask, past_length=3).tolist() == [[2, 3], [0, 0]]
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    assert count_visible_keys(positions, causal).tolist() == [[1, 2, 3, 4, 5]]
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert count_visible_keys(positions, additive).tolist() == [[1, 2, 3, 4, 5]]


def padded_batch(lengths, total=16):
    tokens = make_tokens(len(lengths), total)
    mask = (torch.arange(total) >= total - torch.tensor(lengths)[:, None]).long()
    labels = tokens.masked_fill(mask == 0, -100)
    # The token before is padding: nothing predicts the first one of a sequence.
    labels[torch.arange(len(lengths)), total - torch.tensor(lengths)] = -100
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "labels": labels}


@pytest.mark.parametrize("maximum", MAXIMA)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_do_not_depend_on_how_a_batch_is_split(reduction, maximum):
    model = make_model(
        "EReg(SM(t)+ScFuFFN)",
        **NO_DROPOUT,
        entropy_penalty=reduction,
        entropy_maximum=maximum,
        entropy_coefficient=0.5,
    ).train()
    batch = padded_batch([16, 3, 9, 12, 5, 16, 2, 7])
    items = (batch["labels"][:, 1:] != -100).sum()
    gradients, shares = {}, {}
    for size in (8, 2, 1):
        model.zero_grad()
        shares[size] = 0.0
        for start in range(0, 8, size):
            part = {name: tensor[start : start + size] for name, tensor in batch.items()}
            outputs = model(**part, num_items_in_batch=items)
            outputs.loss.backward()
            shares[size] += outputs.penalized_share.item()
        gradients[size] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    assert not outputs.penalized_share.requires_grad
    assert 0 < outputs.penalized_share < 1
    assert list(shares.values()) == pytest.approx([outputs.penalized_share.item()] * 3)
    gradients["whole"] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for name, expected in gradients["whole"].items():
        assert expected.abs().max() > 0, name
        for size in (8, 2, 1):
            scale = expected.abs().max().item()
            torch.testing.assert_close(gradients[size][name], expected, rtol=1e-3, atol=1e-5 * scale, msg=name)


def block_diagonal(position_ids):
    """The 4D mask of documents packed in rows."""
    documents = (position_ids == 0).cumsum(dim=-1)
    causal = torch.ones(2 * position_ids.shape[-1:], dtype=torch.bool).tril()
    return ((documents[:, :, None] == documents[:, None]) & causal)[:, None]


@pytest.mark.parametrize("told_by", ["positions", "mask"])
@pytest.mark.parametrize("maximum", MAXIMA)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_documents_have_the_penalty_that_they_have_apart(reduction, maximum, told_by):
    """Loss, penalty, share and every gradient, with all in one row and in two, against a batch with padding."""
    fields = {"entropy_penalty": reduction, "entropy_maximum": maximum, "entropy_coefficient": 0.5}
    model = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT, **fields).train()
    apart = padded_batch([16, 3, 5, 9, 1, 14])
    is_token = apart["attention_mask"].bool()
    packed = {name: tensor[is_token] for name, tensor in apart.items() if name != "attention_mask"}

    def train(inputs, **options):
        model.zero_grad()
        outputs = model(**inputs, **options)
        outputs.loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        return [outputs.loss, outputs.entropy_loss, outputs.penalized_share, *gradients]

    expected = train(apart)
    assert 0 < expected[2] < 1
    for rows in (1, 2):
        inputs = {name: tensor.view(rows, -1) for name, tensor in packed.items()}
        options = {"attention_mask": block_diagonal(inputs["position_ids"])} if told_by == "mask" else {}
        torch.testing.assert_close(train(inputs, **options), expected, rtol=1e-4, atol=1e-5)
        # As one part of a larger batch, of twice as many tokens.
        if reduction != "row_sum":
            doubled = [2 * value for value in train(inputs, **options, num_items_in_batch=84)]
            torch.testing.assert_close(doubled, expected, rtol=1e-4, atol=1e-5)


def test_documents_packed_in_a_row_are_labelled_one_by_one():
    """A head's penalty is the mean over documents, however many of them a row holds."""
    model = make_model("EReg(SM(t)+ScFuFFN)", EntropyGPTForTokenClassification, **NO_DROPOUT, num_labels=2)
    model.config.entropy_coefficient = 0.5
    apart = padded_batch([16, 3, 5, 9, 1, 14])
    is_token = apart["attention_mask"].bool()
    labels = torch.where(is_token, apart["input_ids"] % 2, -100)
    packed = {name: apart[name][is_token].view(2, -1) for name in ("input_ids", "position_ids")}
    expected = model.train()(**{**apart, "labels": labels}).loss
    plain = model.eval()(**{**apart, "labels": labels}).loss
    assert expected - plain > 1e-3
    torch.testing.assert_close(model.train()(**packed, labels=labels[is_token].view(2, -1)).loss, expected)


def test_positions_that_do_not_restart_change_nothing():
    for reduction in REDUCTIONS:
        model = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT, entropy_penalty=reduction).train()
        tokens = make_tokens(3, 16)
        expected = model(tokens, labels=tokens)
        for positions in (torch.arange(16)[None], torch.arange(16).expand(3, -1)):
            outputs = model(tokens, labels=tokens, position_ids=positions)
            torch.testing.assert_close(outputs.entropy_loss, expected.entropy_loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(outputs.penalized_share, expected.penalized_share, rtol=1e-6, atol=0)


def test_packed_sequences_are_numbered():
    assert number_sequences(torch.tensor([[1, 2, 3, 1, 1, 2]]), None).tolist() == [[0, 0, 0, 1, 2, 2]]
    assert number_sequences(torch.tensor([[1, 2], [1, 1]]), None).tolist() == [[0, 0], [0, 1]]

    def numbers(mask):
        mask = torch.tensor(mask, dtype=torch.bool)[None, None]
        return number_sequences(mask.sum(dim=-1)[:, 0], mask).tolist()

    causal = torch.ones(5, 5).tril()
    assert numbers(causal.tolist()) == [[0, 0, 0, 0, 0]]
    assert numbers((causal * torch.ones(5, 5).triu(-1)).tolist()) == [[0, 0, 0, 0, 0]]  # a sliding window
    assert numbers((causal * torch.tensor([0, 0, 1, 1, 1])).tolist()) == [[0, 0, 0, 0, 0]]  # padding on the left
    assert numbers(torch.block_diag(torch.ones(2, 2), causal[:3, :3]).tolist()) == [[0, 0, 1, 1, 1]]
    # A row that attends to itself alone begins no sequence if a later one looks behind it.
    assert numbers([[1, 0, 0], [0, 1, 0], [1, 1, 1]]) == [[0, 0, 0]]


@pytest.mark.slow
def test_a_packed_batch_is_compiled_whole():
    model = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT).train()
    tokens = make_tokens(1, 16)
    inputs = {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(16)[None] % 6}
    expected = model(**inputs).loss
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).loss, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_is_exact(use_reentrant, implementation):
    model = make_model("EReg(SM(t)+ScFFN)", **NO_DROPOUT, entropy_coefficient=0.5, entropy_penalty="head_mean").train()
    model.set_attn_implementation(implementation)
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_activation_checkpointing
    batch = padded_batch([16, 9, 4])
    for twin in (model, checkpointed):
        twin(**batch).loss.backward()
    for (name, parameter), twin in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(twin.grad, parameter.grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_without_the_penalty_in_the_loss_thresholds_have_a_gradient_of_zero(use_reentrant):
    """So that ranks can wait for it; and whatever the thresholds are, they change nothing."""
    model = make_model("EReg(SM(t)+ScFFN)", **NO_DROPOUT)
    tokens = make_tokens(2, 16)
    expected = model(tokens).logits
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    thresholds = [block.attn.threshold.entropy_threshold for block in model.transformer.h]
    with torch.no_grad():
        thresholds[1].fill_(math.nan)
    for options in ({}, {"output_entropies": True}):
        model.zero_grad()
        logits = model.train()(tokens, **options).logits
        assert options or torch.equal(logits, expected)
        logits.logsumexp(dim=-1).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        assert all(threshold.grad.eq(0).all() for threshold in thresholds)


@pytest.mark.parametrize(("layers", "steps"), [(1, 80), *slow_cases((2, 120))])
def test_the_penalty_steers_entropy_towards_the_threshold(layers, steps):
    """Only the penalty is minimised; entropies that begin at the top and at the bottom have to meet the margin."""
    for temperature, threshold in ((30.0, 0.3), (0.02, 0.6)):
        model = make_model(
            "EReg(SM(t_h)+ScFuFFN)",
            **NO_DROPOUT,
            n_layer=layers,
            temperature_init=temperature,
            entropy_threshold_init=threshold,
            entropy_penalty="head_mean",
            entropy_maximum="causal",
        ).train()
        optimizer = torch.optim.Adam([block.attn.temperature.log_temperature for block in model.transformer.h], lr=0.1)
        tokens = make_tokens(4, SIZES["n_positions"])
        losses = []
        for _ in range(steps):
            losses.append(model(tokens, labels=tokens).entropy_loss)
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.1 * losses[0], (temperature, threshold)


def test_evaluation_reports_the_penalty_and_leaves_it_out_of_the_loss():
    model = make_model("EReg(SM(t)+ScFuFFN)")
    tokens = make_tokens()
    plain = model(tokens, labels=tokens)
    assert plain.entropy_loss is plain.penalized_share is None
    outputs = model(tokens, labels=tokens, output_entropies=True)
    assert outputs.entropy_loss > 0
    assert outputs.penalized_share > 0
    # The Trainer takes what is not to be ignored for predictions.
    ignored = {"loss", *model.config.keys_to_ignore_at_inference}
    assert {name for name in outputs if name not in ignored} == {"logits"}
    assert outputs.loss == outputs.cross_entropy_loss
    torch.testing.assert_close(outputs.loss, plain.loss)
