"""Operation counts: the paper's own figures, and what a forward pass really does."""

import operator
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.activations import ACT2FN

from entropy_gpt.conversion.folding import fold_weight_normalization
from entropy_gpt.evaluation.measuring.operation_counts import ATTENTION_TITLES, count_operations
from modeling_entropy_gpt import EntropyGPTConfig, blocks
from modeling_entropy_gpt.blocks import EntropyGPTMLP, eager_attention_forward
from modeling_entropy_gpt.blockwise_attention import OPERATOR
from modeling_entropy_gpt.configuration_entropy_gpt import OWN_ACTIVATIONS
from tests.architectures import ARCHITECTURES, make_config, make_model, make_tokens
from tests.slow import slow_but, slow_cases


GPT2_SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
FORWARD = f"{OPERATOR.removeprefix('entropy_gpt::')}_forward"
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


def flash_flops(query_shape, key_shape, value_shape, *arguments, **options) -> int:
    """Of the CPU's kernel: torch counts those of GPUs alone."""
    return sdpa_flop_count(query_shape, key_shape, value_shape)


@pytest.mark.parametrize("notation", ARCHITECTURES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_flops_are_those_that_torch_counts(notation, implementation):
    model = make_model(notation, attn_implementation=implementation)
    counts, config = count_operations(model.config, T), model.config
    fold_weight_normalization(model)  # once and for all before inference
    blockwise = getattr(torch.ops.entropy_gpt, FORWARD)
    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash_flops,
        blockwise: flash_flops,  # of other functions than softmax
    }
    with FlopCounterMode(display=False, depth=None, custom_mapping=mapping) as counter, torch.no_grad():
        model(make_tokens(1, T), use_cache=False)
    by_module = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}

    def total(part: str) -> int:
        return sum(flops for name, flops in by_module.items() if name.split(".")[-1] == part)

    ffns = config.n_layer - len(config.pruned_ffn_layers)
    scales = 2 * T * config.n_embd * ffns if config.ffn_residual_scaling else 0  # torch counts products of matrices
    assert total("attn") == counts.computed_attention_flops
    assert total("mlp") == counts.ffn_flops - scales
    assert total("lm_head") == counts.head_flops
    assert by_module["Global"] == counts.computed_attention_flops + counts.ffn_flops - scales + counts.head_flops


# What is linear in what the input decides; products of matrices also if it decides both, which the FLOPs count.
LINEAR = {
    *("linear", "addmm", "mm", "bmm", "matmul", "embedding", "add", "sub", "rsub", "neg", "mean", "sum"),
    *("view", "reshape", "transpose", "permute", "split", "split_with_sizes", "slice", "select", "expand", "t"),
    *("unsqueeze", "squeeze", "contiguous", "clone", "to", "_to_copy", "dropout", "getitem", "cat", "unbind", "alias"),
    "wrap_with_autocast",  # queries times keys, in a precision of their own
}


def nonlinear_nodes(model: nn.Module, inputs: dict) -> list[torch.fx.Node]:
    """Nodes of the exported program that are non-linear in what depends on the first input."""
    program = torch.export.export(model, (), inputs, strict=False)
    first = program.graph_signature.user_inputs[0]
    secret, found = set(), []
    for node in program.graph.nodes:
        of_secret = [argument for argument in node.all_input_nodes if argument in secret]
        if node.op == "placeholder" and node.name == first:
            secret.add(node)
        elif node.op == "call_function" and of_secret and node.meta["val"] is not None:  # others only assert
            secret.add(node)
            secret_arguments = [argument for argument in node.args if argument in secret]
            is_scale = name_of(node) == "mul" or (name_of(node) == "div" and node.args[0] in secret)
            if name_of(node) not in LINEAR and not (is_scale and len(secret_arguments) == 1):
                found.append(node)
    return found


def name_of(node: torch.fx.Node) -> str:
    return "getitem" if node.target is operator.getitem else node.target.__name__.partition(".")[0]


# With each kind of operation; exports take a second each.
EXPORTED = ("SM+LN+G", "EReg(SM(t_h)+StaticLN+LearnableLeakyR+ScFFN)", "EReg(Pow4(t_h)+ScFuFFN)", "ClSM(t)+LN+G")
PARTS_OF_FUNCTIONS = {
    "power4": ("clamp", "pow", "log"),
    "power2": ("clamp", "pow", "log"),
    "clamped": ("clamp", "exp", "log"),
}


def found_operations(model: nn.Module) -> Counter:
    """How many there are of each non-linear operation in the exported program, by name and shape without the batch."""
    found, activations, function = Counter(), set(), model.config.attention_function
    for node in nonlinear_nodes(model, {"input_ids": make_tokens(1, T), "use_cache": False}):
        path, _ = list(node.meta["nn_module_stack"].values())[-1]
        value = node.meta["val"]
        shape = tuple((value[0] if isinstance(value, tuple) else value).shape[1:])
        if name_of(node) == FORWARD and path.endswith(".attn"):
            found[ATTENTION_TITLES[function], (T, T)] += shape[0]  # one for each head
        elif name_of(node) == "softmax" and path.endswith(".attn"):
            found[ATTENTION_TITLES[function], shape[1:]] += shape[0]  # one for each head
        elif name_of(node) in PARTS_OF_FUNCTIONS.get(function, ()) and path.endswith(".attn"):
            continue  # what the exponential of the softmax becomes another function with
        elif name_of(node) == "layer_norm":
            found["final LayerNorm" if path.endswith(".ln_f") else "LayerNorm", shape] += 1
        elif path.endswith(".mlp.act"):
            activations.add((path, shape))  # which may take several nodes
        else:
            found[f"{name_of(node)} in {path}", shape] += 1
    return found + Counter(("activation", shape) for _, shape in activations)


def counted_operations(config: EntropyGPTConfig) -> Counter:
    """The same, as they are counted from the configuration."""
    counts, norms = count_operations(config, T), (*ATTENTION_TITLES.values(), "LayerNorm", "final LayerNorm")
    return Counter(
        {
            (each.name if each.name in norms else "activation", tuple(each.shape)): each.count
            for each in (*counts.nonlinear, *counts.apart)
            if each.name not in ("embedding", "argmax")  # which the program leaves to others
        }
    )


@pytest.mark.parametrize(
    ("notation", "fields"),
    [
        *((notation, {}) for notation in EXPORTED),
        ("SM+ScFuFFN", {"final_normalization": "static"}),
        *slow_cases(
            *((notation, {}) for notation in ARCHITECTURES if notation not in EXPORTED),
            ("SM+LN+G", {"final_normalization": "none", "n_inner": 80}),
            ("SM+G+FFNi3", {}),
        ),
    ],
)
def test_non_linear_operations_are_those_of_the_exported_program(notation, fields):
    model = make_model(notation, attn_implementation="eager", **fields)
    assert found_operations(model) == counted_operations(model.config)


@pytest.mark.parametrize("name", sorted({*ACT2FN, *OWN_ACTIVATIONS}))
def test_activations_count_where_they_are_not_linear(name):
    config = make_config(f"SM+Act({name})")
    counts = count_operations(config, T).nonlinear
    is_counted = [each.shape for each in counts if each.name != "softmax"] == [[T, config.inner_size]]
    assert len(counts) == 1 + is_counted
    hidden_states = torch.randn(1, T, config.n_embd)
    assert is_counted == bool(nonlinear_nodes(EntropyGPTMLP(config), {"hidden_states": hidden_states}))


class Square(nn.Module):
    def forward(self, hidden_states):
        return hidden_states * hidden_states


def add_tanh(model, monkeypatch):
    model.transformer.h[1].mlp = nn.Sequential(model.transformer.h[1].mlp, nn.Tanh())


def add_square(model, monkeypatch):
    model.transformer.ln_f = Square()


def add_softmax(model, monkeypatch):
    model.transformer.h[0].attn.resid_dropout = nn.Softmax(dim=-1)


def cap_queries(model, monkeypatch):
    def attend(module, query, *arguments, **options):
        return eager_attention_forward(module, query.tanh(), *arguments, **options)

    monkeypatch.setattr(blocks, "eager_attention_forward", attend)


@pytest.mark.parametrize(
    "change",
    slow_but([add_square, cap_queries], [add_tanh, add_square, add_softmax, cap_queries]),
    ids=lambda change: change.__name__,
)
def test_the_walk_sees_what_does_not_belong_there(change, monkeypatch):
    model = make_model("SM+ScFuFFN", attn_implementation="eager", final_normalization="none")
    change(model, monkeypatch)
    assert found_operations(model) - counted_operations(model.config)
