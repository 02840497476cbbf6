"""Operation counts: the paper's own figures, and what a forward pass really does."""

import operator

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conversion.folding import fold_weight_normalization
from evaluation.operation_counts import count_operations
from modeling_entropy_gpt import EntropyGPTConfig
from tests.architectures import ARCHITECTURES, SIZES, make_config, make_model, make_tokens


GPT2_SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
T = 24


def count(notation: str, context: int, **fields):
    config = EntropyGPTConfig.from_notation(notation, **{**GPT2_SMALL, "final_normalization": "layernorm", **fields})
    return count_operations(config, context)


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ("SM+LN+G", ["144 × R^(128×128)", "24 × R^(128×768)", "12 × R^(128×3072)"]),
        ("SM+LN+R", ["144 × R^(128×128)", "24 × R^(128×768)", "12 × R^(128×3072)"]),
        ("SM+LN", ["144 × R^(128×128)", "24 × R^(128×768)"]),
        ("SM+G", ["144 × R^(128×128)", "12 × R^(128×3072)"]),
        ("SM+ScFuFFN", ["144 × R^(128×128)"]),
        ("EReg(SM(t)+ScFuFFN)", ["144 × R^(128×128)"]),
    ],
)
def test_non_linear_operations_of_the_papers_tables(notation, expected):
    assert [operation.text for operation in count(notation, 128).nonlinear] == expected


@pytest.mark.parametrize(
    ("layers", "context", "mlp", "fused", "attention"),
    [
        (12, 128, "14.5", "1.8", "7.7"),
        (12, 256, "29.0", "3.6", "16.3"),
        (12, 512, "58.0", "7.3", "36.2"),
        (18, 128, "21.7", "2.7", "11.6"),
    ],
)
def test_flops_of_the_papers_tables(layers, context, mlp, fused, attention):
    stock, proposal = (count(notation, context, n_layer=layers) for notation in ("SM+LN+G", "SM+ScFuFFN"))
    assert f"{stock.ffn_flops / 1e9:.1f}" == mlp
    assert f"{proposal.ffn_flops / 1e9:.1f}" == fused
    assert f"{stock.attention_flops / 1e9:.1f}" == f"{proposal.attention_flops / 1e9:.1f}" == attention


def test_what_the_paper_leaves_out_stands_apart():
    counts = count("SM+LN+G", 128, vocab_size=50257)
    assert [(operation.name, operation.text) for operation in counts.apart] == [
        ("embedding", "1 × R^(128×50257)"),
        ("final LayerNorm", "1 × R^(128×768)"),
        ("argmax", "1 × R^(128×50257)"),
    ]
    assert counts.head_flops == 2 * 128 * 768 * 50257
    without = count("SM+LN+G", 128, final_normalization="static")
    assert [operation.name for operation in without.apart] == ["embedding", "argmax"]
    assert counts.nonlinear[0].elements == 144 * 128 * 128


@pytest.mark.parametrize("context", [0, -1, 1025])
def test_contexts_that_can_not_be(context):
    with pytest.raises(ValueError, match=f"context={context} is not possible: the model has positions for 1 to 1024"):
        count("SM", context)


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_flops_are_those_that_torch_counts(notation):
    # Weights are normalised once and for all before inference.
    model, counts = make_model(notation, attn_implementation="eager"), count_operations(make_config(notation), T)
    fold_weight_normalization(model)
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        model(make_tokens(1, T), use_cache=False)
    by_module = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}

    def total(part: str) -> int:
        return sum(flops for name, flops in by_module.items() if name.split(".")[-1] == part)

    assert total("attn") == counts.computed_attention_flops
    scales = 2 * T * SIZES["n_embd"] * len(model.transformer.h) if model.config.ffn_residual_scaling else 0
    scales -= scales * len(model.config.pruned_ffn_layers) // len(model.transformer.h)
    assert total("mlp") == counts.ffn_flops - scales  # torch counts products of matrices alone
    assert total("lm_head") == counts.head_flops
    assert by_module["Global"] == counts.computed_attention_flops + counts.ffn_flops - scales + counts.head_flops


# What is linear in what the input decides; products of matrices also if it decides both, which the FLOPs count.
LINEAR = {
    *("linear", "addmm", "mm", "bmm", "matmul", "embedding", "add", "sub", "rsub", "neg", "mean", "sum"),
    *("view", "reshape", "transpose", "permute", "split", "split_with_sizes", "slice", "select", "expand", "t"),
    *("unsqueeze", "squeeze", "contiguous", "clone", "to", "_to_copy", "dropout", "getitem", "cat", "unbind", "alias"),
}


def nonlinear_nodes(model: nn.Module) -> list[torch.fx.Node]:
    """Nodes of the exported program that are non-linear in what depends on the tokens."""
    program = torch.export.export(model, (), {"input_ids": make_tokens(1, T), "use_cache": False}, strict=False)
    (tokens,) = program.graph_signature.user_inputs[:1]
    secret, found = set(), []
    for node in program.graph.nodes:
        of_secret = [argument for argument in node.all_input_nodes if argument in secret]
        if node.op == "placeholder" and node.name == tokens:
            secret.add(node)
        elif node.op == "call_function" and of_secret and node.meta["val"] is not None:  # others only assert
            secret.add(node)
            name = "getitem" if node.target is operator.getitem else node.target.__name__.partition(".")[0]
            secret_arguments = [argument for argument in node.args if argument in secret]
            is_scale = name == "mul" or (name == "div" and node.args[0] in secret)
            if name not in LINEAR and not (is_scale and len(secret_arguments) == 1):
                found.append(node)
    return found


def module_of(node: torch.fx.Node) -> str:
    path, _ = list(node.meta["nn_module_stack"].values())[-1]
    return path


def found_operations(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """For each module with a non-linear operation the shape that goes through, without the batch."""
    return {module_of(node): tuple(node.meta["val"].shape[1:]) for node in nonlinear_nodes(model)}


@pytest.mark.parametrize("notation", ARCHITECTURES)
@pytest.mark.parametrize("final", ["layernorm", "none"])
def test_non_linear_operations_are_those_of_the_exported_program(notation, final):
    config = make_config(notation, final_normalization=final)
    counts = count_operations(config, T)
    found = found_operations(make_model(notation, final_normalization=final, attn_implementation="eager"))
    expected = {}
    for operation in (*counts.nonlinear, *counts.apart):
        if operation.name not in ("embedding", "argmax"):  # which the program leaves to others
            expected[operation.name] = (tuple(operation.shape), operation.count)
    softmaxes = [shape for path, shape in found.items() if path.endswith(".attn")]
    heads, count_of_heads = expected.pop("softmax")
    assert softmaxes == [(SIZES["n_head"], *heads)] * (count_of_heads // SIZES["n_head"])
    norms = [shape for path, shape in found.items() if path.endswith((".ln_1", ".ln_2"))]
    assert norms == [expected["LayerNorm"][0]] * expected.pop("LayerNorm")[1] if norms else "LayerNorm" not in expected
    last = [shape for path, shape in found.items() if path.endswith(".ln_f")]
    assert last == ([expected.pop("final LayerNorm")[0]] if final == "layernorm" else [])
    activations = [shape for path, shape in found.items() if ".mlp" in path]
    assert len(expected) <= 1
    for shape, number in expected.values():
        assert activations == [shape] * number
    assert len(found) == len(softmaxes) + len(norms) + len(last) + len(activations)
    assert bool(activations) == bool(expected)


def test_the_walk_sees_what_does_not_belong_there():
    model = make_model("SM+ScFuFFN", attn_implementation="eager", final_normalization="none")
    before = set(found_operations(model))
    model.transformer.h[1].mlp = nn.Sequential(model.transformer.h[1].mlp, nn.Tanh())
    assert set(found_operations(model)) - before
    squared = make_model("SM+ScFuFFN", attn_implementation="eager", final_normalization="none")
    squared.transformer.ln_f = Square()
    assert set(found_operations(squared)) - before


class Square(nn.Module):
    def forward(self, hidden_states):
        return hidden_states * hidden_states
