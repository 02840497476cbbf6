"""What is told of attention heads, against attention matrices written out, and what it costs in memory."""

import math

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from conversion.gpt2_checkpoint import load_gpt2
from evaluation.entropy_diagnostics import (
    DIVERSITY_ROWS,
    ENTROPY_STEPS,
    QUANTILE_LEVELS,
    HeadwiseEntropy,
    diagnose_heads,
    logit_spectral_norms,
)
from modeling_entropy_gpt import EntropyGPTModel
from tests.architectures import ARCHITECTURES, make_model, make_tokens


def blocks_of(tokens: torch.Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def naive_heads(attentions: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """From attention probabilities, a `(batch, heads, T, T)` tensor for each layer."""
    probabilities = torch.stack(attentions).double()
    entropies = torch.special.entr(probabilities).sum(dim=-1)  # (layers, batch, heads, rows)
    length = entropies.shape[-1]
    count = min(DIVERSITY_ROWS, length)
    rows = ((torch.arange(count) + 0.5) * length / count).long()
    mixed = torch.special.entr(probabilities.mean(dim=2)).sum(dim=-1)
    levels = torch.tensor(QUANTILE_LEVELS).double()
    by_head = entropies.transpose(1, 2).flatten(2)
    return {
        "entropy": entropies.mean(dim=(1, 3)),
        "quantiles": by_head.quantile(levels, dim=2, interpolation="lower").permute(1, 2, 0),
        "sink": probabilities[:, :, :, 1:, 0].mean(dim=(1, 3)),
        "diversity": (mixed - entropies.mean(dim=2))[:, :, rows].mean(dim=(1, 2)),
    }


def check_against(heads, attentions):
    expected = naive_heads(attentions)
    resolution = math.log(attentions[0].shape[-1]) / ENTROPY_STEPS
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(torch.tensor(heads.entropy.nats), expected["entropy"], **close)
    torch.testing.assert_close(torch.tensor(heads.sink_share), expected["sink"], **close)
    torch.testing.assert_close(torch.tensor(heads.diversity), expected["diversity"], **close)
    got = torch.tensor(heads.entropy_quantiles).double()
    torch.testing.assert_close(got, expected["quantiles"], rtol=0, atol=0.51 * resolution)
    assert heads.rows == attentions[0].shape[0] * attentions[0].shape[2]


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_every_architecture_against_its_matrices(notation):
    model, tokens = make_model(notation, attn_implementation="eager"), make_tokens(5, 64)
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    seen = []
    heads = diagnose_heads(model, blocks_of(tokens), 2, seen.append)
    assert seen == [2, 2, 1]
    check_against(heads, attentions)
    assert heads.entropy.maximum == pytest.approx(sum(math.log(keys) for keys in range(1, 65)) / 64)
    assert heads.uniform_sink_share == pytest.approx(sum(1 / keys for keys in range(2, 65)) / 63)
    assert all(0 <= value <= math.log(4) for value in heads.diversity)


def test_uniform_heads_reach_the_maximum():
    model = make_model("SM+LN+G")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[:, : 2 * 48] = 0
        model.transformer.h[1].attn.c_attn.bias[: 2 * 48] = 0
    heads = diagnose_heads(model, blocks_of(make_tokens(2, 12)))
    assert heads.entropy.nats[1] == pytest.approx([heads.entropy.maximum] * 4, rel=1e-5)
    assert heads.sink_share[1] == pytest.approx([heads.uniform_sink_share] * 4, rel=1e-5)
    assert heads.diversity[1] == pytest.approx(0, abs=1e-6)


def test_a_stock_gpt2_checkpoint(tmp_path):
    config = GPT2Config(vocab_size=101, n_positions=32, n_embd=32, n_layer=2, n_head=2, attn_implementation="eager")
    gpt2, tokens = GPT2LMHeadModel(config).eval(), make_tokens(3, 32)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
        attentions = gpt2(tokens, output_attentions=True).attentions
    gpt2.save_pretrained(tmp_path)
    check_against(diagnose_heads(load_gpt2(tmp_path), blocks_of(tokens)), attentions)


@pytest.mark.parametrize("notation", ["EReg(SM(t)+ScFuFFN)", "SM+LN+G"])
def test_spectral_norms_are_largest_singular_values(notation):
    model, tokens, seen = make_model(notation), make_tokens(4, 40), []

    def keep(module, arguments, output):
        query, key, _ = output.view(4, 40, 3, 4, -1).permute(2, 0, 3, 1, 4)
        if module.temperature_of is not None:
            query = query * module.temperature_of(torch.arange(40)[None])
        logits = query @ key.mT * module.scaling_of
        seen.append(torch.linalg.svdvals(logits.double())[..., 0].mean(dim=0))

    for block in model.transformer.h:
        block.attn.c_attn.temperature_of, block.attn.c_attn.scaling_of = block.attn.temperature, block.attn.scaling
        block.attn.c_attn.register_forward_hook(keep)
    heads = diagnose_heads(model, blocks_of(tokens))
    torch.testing.assert_close(torch.tensor(heads.logit_spectral_norms).double(), torch.stack(seen), rtol=1e-3, atol=0)


def test_spectral_norms_of_close_and_of_no_singular_values():
    flat = torch.eye(64)[None]
    assert logit_spectral_norms(flat, flat, 0.125).item() == pytest.approx(0.125, rel=1e-3)
    assert logit_spectral_norms(torch.zeros(1, 5, 8), torch.zeros(1, 5, 8), 1.0).item() == 0
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 300, 64, generator=generator)
    expected = torch.linalg.svdvals((query @ key.mT).double())[..., 0]
    torch.testing.assert_close(logit_spectral_norms(query, key, 1.0), expected, rtol=1e-3, atol=0)
    huge = logit_spectral_norms(query * 1e4, key * 1e4, 1.0)
    torch.testing.assert_close(huge, expected * 1e8, rtol=1e-3, atol=0)


def test_batches_change_nothing():
    model, blocks = make_model("EReg(SM(t)+ScFuFFN)"), blocks_of(make_tokens(7, 33))
    one, many = (diagnose_heads(model, blocks, size) for size in (1, 7))
    assert torch.tensor(one.entropy.nats).allclose(torch.tensor(many.entropy.nats), rtol=1e-5)
    assert torch.tensor(one.entropy_quantiles).allclose(torch.tensor(many.entropy_quantiles), atol=1e-2)
    assert one.diversity == pytest.approx(many.diversity, rel=1e-4)


def test_the_base_model_alone_gives_the_same():
    model, blocks = make_model("SM"), blocks_of(make_tokens(2, 20))
    assert isinstance(model.transformer, EntropyGPTModel)
    assert diagnose_heads(model.transformer, blocks) == diagnose_heads(model, blocks)


def test_the_model_is_left_as_it_was():
    model, tokens = make_model("SM+LN+G", attn_implementation="sdpa").train(), make_tokens(2, 20)
    diagnose_heads(model, blocks_of(tokens))
    assert (model.training, model.config._attn_implementation) == (True, "sdpa")

    def fail(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose_heads(model, blocks_of(tokens), 2, fail)
    assert (model.training, model.config._attn_implementation) == (True, "sdpa")


class LargestTensor(TorchDispatchMode):
    """The most numbers in any tensor that an operation gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        sizes = [result.numel() for result in tree_leaves(results) if isinstance(result, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return results


def test_no_matrix_of_length_by_length_is_kept():
    largest = {}
    for length in (1024, 2048):
        model = make_model("SM", n_positions=length, n_layer=1)
        with LargestTensor() as mode:
            diagnose_heads(model, blocks_of(make_tokens(1, length)), 1)
        largest[length] = mode.numbers
    assert largest[2048] < 4 * 2048**2 / 8  # of the four heads together
    assert largest[2048] <= 2 * largest[1024]


def test_a_broken_model_has_no_numbers_and_says_so():
    model = make_model("SM+LN+G")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.fill_(math.nan)
    heads = diagnose_heads(model, blocks_of(make_tokens(2, 20)))
    for values in (heads.entropy.nats, heads.sink_share, heads.logit_spectral_norms):
        assert not any(math.isnan(value) for value in values[0])
        assert all(math.isnan(value) for value in values[1])
    assert math.isnan(heads.diversity[1])
    assert all(math.isnan(value) for head in heads.entropy_quantiles[1] for value in head)
    assert heads.entropy.range_shares()[0] < 1


def test_heads_that_look_at_one_key_alone():
    model = make_model("SM+LN+G", n_positions=16)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, :96].mul_(1e3)
    heads = diagnose_heads(model, blocks_of(make_tokens(2, 16)))
    assert max(heads.entropy.nats[0]) < 0.05
    assert heads.entropy.collapsed_share > 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "0 of"), ([[1, 2], [1]], r"2 of \[1, 2\] tokens"), ([[1]], "Blocks of 1 token")],
)
def test_blocks_that_can_not_be(rows, message):
    with pytest.raises(ValueError, match=message):
        diagnose_heads(make_model("SM"), Dataset.from_dict({"input_ids": rows}))


def test_ranges_of_entropy():
    entropy = HeadwiseEntropy([[0.0, 0.9, 1.0], [2.0, 3.0, 4.0]], 4.0)
    assert entropy.range_shares() == pytest.approx([2 / 6, 1 / 6, 1 / 6, 2 / 6])
    assert entropy.range_shares(8.0) == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])
    assert entropy.overloaded_share == pytest.approx(2 / 6)
    assert entropy.collapsed_share == pytest.approx(1 / 6)
    assert (entropy.largest, entropy.mean) == (4.0, pytest.approx(10.9 / 6))
    nothing = HeadwiseEntropy([[math.nan]], 4.0)
    assert math.isnan(nothing.largest)
    assert nothing.range_shares() == [0, 0, 0, 0]
