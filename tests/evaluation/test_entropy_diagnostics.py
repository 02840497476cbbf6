"""What is told of attention heads, against attention matrices written out, and what it costs in memory."""

import importlib
import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from entropy_gpt.conversion.gpt2_checkpoint import load_gpt2
from entropy_gpt.evaluation.measuring.entropy_diagnostics import (
    DIVERSITY_ROWS,
    ENTROPY_STEPS,
    QUANTILE_LEVELS,
    HeadDiagnostics,
    HeadwiseEntropy,
    Rows,
    diagnose_heads,
    logit_spectral_norms,
)
from modeling_entropy_gpt.blocks import EntropyGPTAttention
from modeling_entropy_gpt.blockwise_attention import forward_pass
from tests.architectures import ARCHITECTURES, SIZES, make_model, make_tokens
from tests.slow import slow_but


# More rows than the diversity is taken from.
LENGTH = 100
HEADS = SIZES["n_head"]


def blocks_of(tokens: torch.Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def write_out(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and unmasked logits of a model with eager attention, both `(layers, batch, heads, T, T)`."""
    all_logits = []

    def keep(attention, linear, inputs, output):
        query, key, _ = (
            part.unflatten(-1, (model.config.n_head, -1)).transpose(1, 2) for part in output.double().chunk(3, dim=-1)
        )
        if isinstance(attention, EntropyGPTAttention) and attention.temperature is not None:
            query = query * attention.temperature(torch.arange(tokens.shape[1])[None])
        all_logits.append(query @ key.mT / query.shape[-1] ** 0.5)

    attentions = [block.attn for block in model.transformer.h]
    hooks = [attention.c_attn.register_forward_hook(partial(keep, attention)) for attention in attentions]
    with torch.no_grad():
        probabilities = torch.stack(model(tokens, output_attentions=True).attentions)
    for hook in hooks:
        hook.remove()
    return probabilities.double(), torch.stack(all_logits)


def naive_heads(probabilities: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    entropies = torch.special.entr(probabilities).sum(dim=-1)  # (layers, batch, heads, rows)
    length = entropies.shape[-1]
    count = min(DIVERSITY_ROWS, length)
    rows = ((torch.arange(count) + 0.5) * length / count).long()
    mixed = torch.special.entr(probabilities.mean(dim=2)).sum(dim=-1)
    levels = torch.tensor(QUANTILE_LEVELS).double()
    return {
        "entropy": entropies.mean(dim=(1, 3)),
        "quantiles": entropies.transpose(1, 2).flatten(2).quantile(levels, dim=2).permute(1, 2, 0),
        "sink": probabilities[:, :, :, 1:, 0].mean(dim=(1, 3)),
        "diversity": (mixed - entropies.mean(dim=2))[:, :, rows].mean(dim=(1, 2)),
        "norms": torch.linalg.svdvals(logits)[..., 0].mean(dim=1),
    }


def as_tensors(heads: HeadDiagnostics) -> dict[str, torch.Tensor]:
    named = {
        "entropy": heads.entropy.nats,
        "quantiles": heads.entropy_quantiles,
        "sink": heads.sink_share,
        "diversity": heads.diversity,
        "norms": heads.logit_spectral_norms,
    }
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in named.items()}


def check_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], steps: float, length: int = LENGTH):
    """All that is told; quantiles to so many steps."""
    for name in ("entropy", "sink", "diversity"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["norms"], expected["norms"], rtol=1e-3, atol=0)
    tolerance = steps * math.log(length) / ENTROPY_STEPS + 1e-5
    torch.testing.assert_close(got["quantiles"], expected["quantiles"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_every_architecture_against_its_matrices(notation):
    model = make_model(notation, n_positions=LENGTH, attn_implementation="eager")
    tokens, seen = make_tokens(5, LENGTH), []
    heads = diagnose_heads(model, blocks_of(tokens), 2, seen.append)
    check_close(as_tensors(heads), naive_heads(*write_out(model, tokens)), steps=0.5)
    assert seen == [2, 2, 1]
    assert (heads.rows, heads.diversity_rows) == (5 * LENGTH, 5 * DIVERSITY_ROWS)
    assert heads.entropy.maximum == pytest.approx(sum(math.log(keys) for keys in range(1, LENGTH + 1)) / LENGTH)
    assert heads.uniform_sink_share == pytest.approx(sum(1 / keys for keys in range(2, LENGTH + 1)) / (LENGTH - 1))
    assert all(0 <= value <= math.log(HEADS) for value in heads.diversity)


@pytest.mark.parametrize("length", [2, 3, 17, 64])
def test_short_sequences(length):
    model, tokens = make_model("SM(t)+ScFuFFN", attn_implementation="eager"), make_tokens(3, length)
    heads = diagnose_heads(model, blocks_of(tokens))
    check_close(as_tensors(heads), naive_heads(*write_out(model, tokens)), steps=0.5, length=length)
    assert heads.diversity_rows == 3 * length


def test_a_stock_gpt2_checkpoint(tmp_path):
    config = GPT2Config(vocab_size=101, n_positions=32, n_embd=32, n_layer=2, n_head=2, attn_implementation="eager")
    gpt2, tokens = GPT2LMHeadModel(config).eval(), make_tokens(3, 32)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    gpt2.save_pretrained(tmp_path)
    heads = diagnose_heads(load_gpt2(tmp_path), blocks_of(tokens))
    check_close(as_tensors(heads), naive_heads(*write_out(gpt2, tokens)), steps=0.5, length=32)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_neither_batches_nor_the_attention_implementation_change_anything(implementation):
    model, blocks = make_model("EReg(SM(t)+ScFuFFN)", n_positions=LENGTH), blocks_of(make_tokens(7, LENGTH))
    expected = as_tensors(diagnose_heads(model, blocks, 7))
    model.set_attn_implementation(implementation)
    for batch_size in (1, 3):
        check_close(as_tensors(diagnose_heads(model, blocks, batch_size)), expected, steps=1)


def test_the_base_model_alone_gives_the_same():
    model, blocks = make_model("SM"), blocks_of(make_tokens(2, 20))
    assert diagnose_heads(model.transformer, blocks) == diagnose_heads(model, blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype):
    model, blocks = make_model("SM(t)+LN+G"), blocks_of(make_tokens(4, 60))
    expected = as_tensors(diagnose_heads(model, blocks))
    got = as_tensors(diagnose_heads(model.to(dtype), blocks))
    for name, values in expected.items():
        torch.testing.assert_close(got[name], values, rtol=0.1, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_on_a_gpu(dtype):
    model, blocks = make_model("SM(t)+LN+G", n_positions=LENGTH).to(dtype), blocks_of(make_tokens(4, LENGTH))
    expected = as_tensors(diagnose_heads(model, blocks))
    got = as_tensors(diagnose_heads(model.cuda(), blocks))
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for name, values in expected.items():
        torch.testing.assert_close(got[name], values, rtol=tolerance, atol=tolerance)


def test_spectral_norms_of_close_and_of_no_singular_values():
    flat = torch.eye(64)[None]
    assert logit_spectral_norms(flat, flat, 0.125).item() == pytest.approx(0.125)
    assert logit_spectral_norms(torch.zeros(1, 5, 8), torch.zeros(1, 5, 8), 1.0).item() == 0
    for distance in torch.logspace(-5, -1, 50):  # all the others just below the largest
        close = torch.full((64,), 1 - distance).index_fill_(0, torch.tensor([5]), 1.0).diag()[None]
        assert logit_spectral_norms(close, flat, 1.0).item() == pytest.approx(1.0, rel=1e-3)
    query, key = torch.randn(2, 6, 300, 64)
    expected = torch.linalg.svdvals((query @ key.mT).double())[..., 0]
    for factor in (1e-8, 1.0, 1e8):
        got = logit_spectral_norms(query * factor, key * factor, 1.0)
        torch.testing.assert_close(got, expected * factor**2, rtol=1e-3, atol=0)


def test_spectral_norms_where_queries_and_keys_share_little():
    """Both have an offset a hundred times as large as the rest, and the two offsets are orthogonal."""
    query, key = torch.randn(2, 1, 200, 64)
    query[..., 0], key[..., 1] = 100.0, 100.0
    expected = torch.linalg.svdvals(query.double() @ key.double().mT)[..., 0]
    torch.testing.assert_close(logit_spectral_norms(query, key, 1.0), expected, rtol=1e-3, atol=0)


def test_uniform_heads_reach_the_maximum():
    model = make_model("SM+LN+G")
    attention = model.transformer.h[1].attn.c_attn
    with torch.no_grad():
        attention.weight[:, : 2 * SIZES["n_embd"]] = 0
        attention.bias[: 2 * SIZES["n_embd"]] = 0
    heads = diagnose_heads(model, blocks_of(make_tokens(2, 12)))
    assert heads.entropy.nats[1] == pytest.approx([heads.entropy.maximum] * HEADS, rel=1e-5)
    assert heads.sink_share[1] == pytest.approx([heads.uniform_sink_share] * HEADS, rel=1e-5)
    assert heads.logit_spectral_norms[1] == [0] * HEADS
    assert 0 <= heads.diversity[1] < 1e-6


def test_heads_that_look_at_one_key_alone_have_no_entropy():
    model = make_model("SM(t_h)+LN+G")
    with torch.no_grad():
        model.transformer.h[0].attn.temperature.log_temperature[2] = -20
    heads = diagnose_heads(model, blocks_of(make_tokens(2, 60)))
    assert 0 <= heads.entropy.nats[0][2] < 1e-6
    assert heads.entropy_quantiles[0][2] == [0] * len(QUANTILE_LEVELS)
    assert heads.entropy.nats[0][1] > 0.1
    assert heads.entropy.collapsed_share >= 1 / (HEADS * SIZES["n_layer"])


def test_a_broken_layer_has_no_numbers_and_those_before_it_have():
    model = make_model("SM+LN+G")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.fill_(math.nan)
    heads = diagnose_heads(model, blocks_of(make_tokens(2, 20)))
    for values in as_tensors(heads).values():
        assert values[0].isfinite().all()
        assert values[1:].isnan().all()
    assert sum(heads.entropy.range_shares()) == pytest.approx(1 / SIZES["n_layer"])
    assert math.isnan(heads.entropy.mean)


def test_a_broken_head_leaves_the_others_of_its_layer_alone():
    model, blocks = make_model("SM(t_h)+LN+G", n_layer=1), blocks_of(make_tokens(2, 20))
    whole = as_tensors(diagnose_heads(model, blocks))
    with torch.no_grad():
        model.transformer.h[0].attn.temperature.log_temperature[2] = math.nan
    broken = as_tensors(diagnose_heads(model, blocks))
    assert broken.pop("diversity").isnan().all()
    for name, values in broken.items():
        assert values[0, 2].isnan().all()
        torch.testing.assert_close(values[0, [0, 1, 3]], whole[name][0, [0, 1, 3]])


def test_the_model_is_left_as_it_was_whatever_happens():
    model, blocks = make_model("SM+LN+G", attn_implementation="sdpa").train(), blocks_of(make_tokens(2, 20))
    config, implementations = model.config.to_dict(), ALL_ATTENTION_FUNCTIONS.valid_keys()

    def interrupt(count):
        raise KeyboardInterrupt

    diagnose_heads(model, blocks)
    with pytest.raises(KeyboardInterrupt):
        diagnose_heads(model, blocks, on_blocks=interrupt)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == config
    assert ALL_ATTENTION_FUNCTIONS.valid_keys() == implementations
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_one_model_may_be_looked_at_while_another_is():
    models, blocks = [make_model("SM+LN+G"), make_model("SM(t)+ScFuFFN")], blocks_of(make_tokens(4, 20))
    alone, nested = [diagnose_heads(model, blocks, 2) for model in models], []
    outer = diagnose_heads(models[0], blocks, 2, lambda count: nested.append(diagnose_heads(models[1], blocks, 2)))
    assert outer == alone[0]
    assert nested == [alone[1]] * 2


class LargestTensor(TorchDispatchMode):
    """The most numbers in any tensor that an operation gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        sizes = [result.numel() for result in tree_leaves(results) if isinstance(result, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return results


@pytest.mark.parametrize("notation", slow_but(["SM(t)+ScFuFFN"], ["SM(t)+ScFuFFN", "Pow4(t_h)+ScFuFFN"]))
def test_no_matrix_of_length_by_length_is_ever_there(notation, monkeypatch):
    # The operator as a plain function, or what it allocates would not be seen.
    entropy_attention = importlib.import_module("modeling_entropy_gpt.entropy_attention")  # also a function's name
    monkeypatch.setattr(entropy_attention, "blockwise_attention", forward_pass)
    largest = {}
    for length in (512, 1024):
        model = make_model(notation, n_positions=length, n_layer=1, n_head=2)
        with LargestTensor() as mode:
            diagnose_heads(model, blocks_of(make_tokens(1, length)))
        largest[length] = mode.numbers
    assert largest[512] < 512**2
    assert largest[1024] <= 2 * largest[512]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "There are no blocks"),
        ([[1, 2], [1], [1, 2, 3]], "The blocks have 1 to 3 tokens: cut them to one length"),
        ([[1], [2]], "Blocks of 1 token have no row"),
    ],
)
def test_blocks_that_can_not_be_looked_at_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        diagnose_heads(make_model("SM"), Dataset.from_dict({"input_ids": rows}))


def test_blocks_may_be_chosen_ones_of_any_integers():
    model, tokens = make_model("SM"), make_tokens(5, 20)
    expected = diagnose_heads(model, blocks_of(tokens[[3, 1]]))
    packed = Dataset.from_dict({"input_ids": [*tokens.numpy().astype("uint16")]}).with_format("numpy")
    assert diagnose_heads(model, packed.select([3, 1])) == expected


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


def test_softmax_probabilities_do_not_depend_on_a_shift():
    query, key = torch.randn(2, 1, 2, 5, 4)
    log_sums = (query @ key.mT).logsumexp(dim=-1) / math.log(2)
    rows = Rows(query, key, log_sums, 1.0, "softmax", torch.full((1, 2, 5), 3.0))
    torch.testing.assert_close(rows.probabilities(torch.arange(5), slice(None)), (query @ key.mT).softmax(dim=-1))
