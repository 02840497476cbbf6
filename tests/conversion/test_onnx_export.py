"""Graphs of every architecture: the model's logits in onnxruntime, and no non-linear operator but the model's own."""

import copy
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from entropy_gpt.conversion import onnx_export
from entropy_gpt.conversion.errors import ConversionError, NotFiniteError
from entropy_gpt.conversion.onnx_export import (
    GRAPH,
    OPSET,
    REPORT,
    ExportReport,
    export_onnx,
    find_nonlinear,
    run_graph,
)
from entropy_gpt.evaluation.measuring.operation_counts import count_operations
from tests.architectures import SIZES, make_config, make_model, make_tokens

from .test_folding import FOLDED, make_asymmetric


# What the exporter writes for what the operation counts call so.
OPERATORS = {
    "softmax": ["Softmax"],
    "power4 attention": ["Clip", "Pow", "Log", "Softmax"],
    "power2 attention": ["Clip", "Pow", "Log", "Softmax"],
    "clamped softmax": ["Clip", "Exp", "Log", "Softmax"],
    "LayerNorm": ["LayerNormalization"],
    "final LayerNorm": ["LayerNormalization"],
    "GELU": ["Pow", "Tanh"],
    "ReLU": ["Relu"],
    "leaky ReLU": ["LeakyRelu"],
}
OF_A_LEARNABLE_SLOPE = ["Max", "Min"]
# An export takes seconds: every part of an architecture is in one of these, with a final norm and with a cache or not.
EXPORTED = (
    ("SM+LN+G", "none", True),
    ("SM+LN+R", "layernorm", False),
    ("SM", "static", True),
    ("EReg(SM(t_h)+StaticLN+LearnableLeakyR+ScFFN)", "layernorm", True),
    ("SM+LN+LeakyR+FFNi[0]", "none", False),
    ("SM+ScFuFFN+SN(QKVO+FFN)", "static", True),
    ("EReg(SM(t_h)+LN+G+WN(QK+FFN))", "layernorm", False),
    ("EReg(Pow4(t_h)+ScFuFFN)", "layernorm", True),
    ("ClSM(t)+LN+G", "static", False),
)
PARTS = ("activation_function", "normalization", "ffn_type", "ffn_residual_scaling", "weight_normalization")
PARTS += ("attention_function", "attention_temperature", "entropy_regularization")


def expected_nonlinear(config) -> dict[str, int]:
    """From the configuration alone; an operator of attention is one node for all heads of its layer."""
    counted = count_operations(config, 8)
    found = {}
    for operation in [*counted.nonlinear, *counted.apart]:
        names = OPERATORS.get(operation.name, [])
        if config.activation_function == "learnable_leaky_relu" and operation.name == "leaky ReLU":
            names = OF_A_LEARNABLE_SLOPE
        for name in names:
            nodes = operation.count // config.n_head if "Softmax" in names else operation.count
            found[name] = found.get(name, 0) + nodes
    return found


def count_gates(nonlinear: dict[str, int]) -> dict[str, int]:
    return {"Mul": nonlinear["Tanh"]} if "Tanh" in nonlinear else {}


def check_graph(report: ExportReport, folder: Path, model, cached: bool):
    # Other sizes than those it was checked with; each sequence of the batch as if it were alone.
    session = onnxruntime.InferenceSession(folder / GRAPH)
    sequences = [make_tokens(1, length) for length in (9, 33, 2, 1, 33)]
    with torch.no_grad():
        exact = torch.cat([model.double()(tokens).logits[0] for tokens in sequences])
        rounded = torch.cat([model.float()(tokens).logits[0] for tokens in sequences])
    # Or what float32 itself rounds off, folded or not.
    allowed = max(1e-5 * exact.abs().max(), 4 * (rounded - exact).abs().max())
    for steps in (0, 7) if cached else (0,):
        assert (run_graph(session, sequences, steps) - exact).abs().max() < allowed

    assert report.nonlinear == expected_nonlinear(model.config)
    # Queries and keys, maps and values, and x * (1 + tanh(...)) of each GELU.
    assert report.products == {"MatMul": 2 * model.config.n_layer} | count_gates(report.nonlinear)
    assert all(report.operators[name] >= count for name, count in report.nonlinear.items())  # masks have a Max too


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What the tests that are always run share: a model, its report and its folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    model = make_asymmetric("SM(t)+ScFuFFN", final_normalization="none", n_layer=1)
    model.generation_config.max_new_tokens = 7
    model.train()
    return model, export_onnx(model, folder, cached=True), folder


def test_a_graph_computes_what_its_model_does(exported):
    model, report, folder = exported
    assert model.training
    check_graph(report, folder, copy.deepcopy(model).eval(), cached=True)


def test_every_part_of_an_architecture_is_exported():
    folded, exported = (
        {(part, getattr(make_config(notation), part)) for notation in notations for part in PARTS}
        for notations in (FOLDED, (notation for notation, *_ in EXPORTED))
    )
    assert folded <= exported


@pytest.mark.slow
@pytest.mark.parametrize(("notation", "final", "cached"), EXPORTED)
def test_graphs_of_every_part(notation, final, cached, tmp_path):
    model = make_asymmetric(notation, final_normalization=final, n_layer=2)
    before = copy.deepcopy(model.state_dict())
    model.train()
    report = export_onnx(model, tmp_path, cached)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model.config._attn_implementation, model.training) == ("sdpa", True)
    check_graph(report, tmp_path, model.eval(), cached)


def test_the_report_tells_what_is_in_the_folder(exported):
    _, report, folder = exported
    told = json.loads((folder / REPORT).read_text())
    assert (told["notation"], told["folded_notation"]) == ("SM(t)+ScFuFFN", "SM(t)+FuFFN")
    assert told["opset"] == OPSET
    assert (told["nonlinear"], told["products"]) == ({"Softmax": 1}, {"MatMul": 2})
    assert told["inputs"] == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": ["batch_size", 4, "past_length", 12],
        "past_key_values.0.value": ["batch_size", 4, "past_length", 12],
    }
    assert list(told["outputs"]) == ["logits", "present.0.key", "present.0.value"]
    assert {comparison["steps"] for comparison in told["comparisons"]} == {0, 4}
    assert [1] in [comparison["lengths"] for comparison in told["comparisons"]]
    there = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != REPORT}
    assert told["files"] == there
    assert json.loads((folder / "config.json").read_text())["n_positions"] == SIZES["n_positions"]
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 7
    # A tied head is written once, and no line of code with its path on this machine.
    content = (folder / GRAPH).read_bytes()
    assert there[GRAPH] < 4 * report.parameters + 50_000
    assert b".py" not in content
    assert b"stack_trace" not in content


class TestRefusals:
    def test_half_precision(self, tmp_path):
        with pytest.raises(ValueError, match=r"torch.bfloat16, and the graph computes in float32: give model.float()"):
            export_onnx(make_model("SM").bfloat16(), tmp_path)

    def test_logits_that_are_not_finite(self, tmp_path):
        model = make_model("SM+LN+G")
        with torch.no_grad():
            model.lm_head.weight.fill_(1e38)
        with pytest.raises(NotFiniteError, match="The model's own logits are not finite"):
            export_onnx(model, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_what_float32_can_not_hold_once_folded(self, tmp_path):
        """A static norm takes off a mean that all embeddings share; its fold takes it off after the products."""
        model = make_model("SM+StaticLN", final_normalization="none")
        with torch.no_grad():
            model.transformer.wpe.weight.add_(1e5)
            model.lm_head.weight = torch.nn.Parameter(
                model.lm_head.weight - model.lm_head.weight.mean(1, keepdim=True)
            )
        model.config.tie_word_embeddings = False
        with pytest.raises(ConversionError, match=r"Folded, .* differ by \S+ of the largest, where 1e-04 is allowed"):
            export_onnx(model, tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_a_graph_of_something_else(self, tmp_path, monkeypatch):
        write, other = onnx_export._write_graph, make_model("SM", n_layer=1).eval()
        monkeypatch.setattr(onnx_export, "_write_graph", lambda folded, path, cached: write(other, path, cached))
        with pytest.raises(ConversionError, match=r"In onnxruntime, .* the graph computes something else"):
            export_onnx(make_model("SM", n_layer=1, final_normalization="none"), tmp_path)
        assert not (tmp_path / REPORT).exists()


class TestWhatIsNotLinear:
    """Graphs of a few nodes, whose data are the embeddings `x`."""

    @staticmethod
    def find(*nodes) -> tuple[list[str], list[str]]:
        nodes = (("Gather", ["table", "input_ids"], ["x"]), *nodes)
        made = [node if isinstance(node, onnx.NodeProto) else helper.make_node(*node) for node in nodes]
        names = ("input_ids", "attention_mask", "past_key_values.0.key", "logits")
        *inputs, logits = map(helper.make_empty_tensor_value_info, names)
        return find_nonlinear(helper.make_graph(made, "graph", inputs, [logits]))

    def test_sums_and_moves_and_products_with_constants_are_linear(self):
        assert self.find(
            ("Transpose", ["x"], ["y"]),
            ("MatMul", ["y", "weight"], ["z"]),
            ("Mul", ["scale", "z"], ["s"]),
            ("Gemm", ["s", "weight", "s"], ["t"]),
            ("Add", ["s", "t"], ["logits"]),
        ) == ([], [])

    def test_products_of_data_are_told_apart(self):
        assert self.find(
            ("Mul", ["x", "x"], ["y"]),
            ("Exp", ["y"], ["z"]),
            ("MatMul", ["x", "z"], ["s"]),
            ("Gemm", ["s", "x", "bias"], ["logits"]),
        ) == (["Exp"], ["Mul", "MatMul", "Gemm"])

    @pytest.mark.parametrize("used", ["x", "table"])
    def test_a_node_with_a_graph_of_its_own_is_not_linear(self, used):
        """Whatever it is given: its graph may use any tensor."""
        outputs = [helper.make_empty_tensor_value_info("inner")]
        branch = helper.make_graph([helper.make_node("Exp", [used], ["inner"])], "branch", [], outputs)
        condition = helper.make_node("If", ["attention_mask"], ["y"], then_branch=branch, else_branch=branch)
        assert self.find(condition, ("Neg", ["y"], ["logits"])) == (["If"], [])

    @pytest.mark.parametrize("kind", ["Softmax", "Relu", "Erf", "Exp", "Sqrt", "Cast", "SomethingNew"])
    def test_what_is_not_known_to_be_linear_is_not(self, kind):
        assert self.find((kind, ["x"], ["logits"])) == ([kind], [])

    def test_masks_and_shapes_are_public(self):
        assert self.find(
            ("Not", ["attention_mask"], ["hidden"]),
            ("Max", ["attention_mask", "attention_mask"], ["most"]),
            ("Shape", ["x"], ["size"]),
            ("Sqrt", ["size"], ["root"]),
            ("Where", ["hidden", "x", "most"], ["chosen"]),
            ("Div", ["chosen", "root"], ["logits"]),
        ) == ([], [])

    def test_a_condition_a_divisor_and_an_index_that_are_data(self):
        found = self.find(
            ("Greater", ["x", "table"], ["larger"]),
            ("Where", ["larger", "x", "table"], ["y"]),
            ("Div", ["table", "y"], ["z"]),
            ("Div", ["x", "y"], ["share"]),
            ("ArgMax", ["z"], ["index"]),
            ("Gather", ["table", "index"], ["logits"]),
        )
        assert found == (["Greater", "Where", "Div", "Div", "ArgMax", "Gather"], [])

    def test_the_cache_is_data(self):
        assert self.find(("Exp", ["past_key_values.0.key"], ["y"]), ("Add", ["x", "y"], ["logits"])) == (["Exp"], [])
