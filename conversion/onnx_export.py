"""A language model as an ONNX graph for inference: folded, with eager attention, for batches of any size and length.

The graph is written by torch's exporter, compared in onnxruntime with the model it comes from, and searched for
what is not linear in it. Left-padded batches are right with the mask and the positions that `generate` gives.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxscript import ir
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerFast

from modeling_entropy_gpt import EntropyGPTForCausalLM

from .errors import ConversionError, NotFiniteError
from .folding import fold
from .tokenizer_files import save_tokenizer


GRAPH, REPORT = "model.onnx", "export_report.json"
# The oldest that torch's exporter writes: what runs newer ones runs this too.
OPSET = 18
# Sizes that the model is traced with. Those of a run may be others: 1 or 0 alone would be taken for constants here.
TRACED_BATCH, TRACED_LENGTH, TRACED_PAST = 2, 5, 3
PAST = "past_key_values."
# Operators that are linear in all inputs together, or move numbers.
LINEAR = ("Add", "Sub", "Neg", "Concat", "Identity")
# Those that are so in their first input alone, and not in a divisor, an index or a size.
LINEAR_IN_THE_FIRST = ("Div", "Expand", "Gather", "ReduceMean", "ReduceSum", "Reshape", "Slice", "Split", "Squeeze")
LINEAR_IN_THE_FIRST += ("Transpose", "Unsqueeze")
# Those that are linear in each of their first two inputs, and multiply them.
PRODUCTS = ("Mul", "MatMul", "Gemm")
# Operators that read a tensor's shape alone; shapes are public.
OF_SHAPES = ("Shape", "Size")
LONGEST_CHECKED, STEPS_CHECKED = 64, 4
# The largest difference, as a share of the largest logit.
LARGEST_SHARE = 1e-4
GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")

# Sequences, each of shape (1, length), and the logits of all their tokens, (tokens, vocab_size).
Reference = tuple[list[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """
    One run of the graph, compared with the model.

    Args:
        lengths (`list[int]`): Tokens of each sequence of the batch; shorter ones are padded on the left.
        steps (`int`): How many of the last tokens were given one by one, on the cache of those before.
        difference (`float`): Largest difference of logits, as a share of the largest logit.
    """

    lengths: list[int]
    steps: int
    difference: float


@dataclass(frozen=True)
class ExportReport:
    """
    What an export holds.

    Args:
        notation (`str`): Notation of the model that was given.
        folded_notation (`str`): Notation of the folded model in the graph.
        parameters (`int`): Number of parameters of the folded model.
        opset (`int`): Version of ONNX's operators.
        inputs (`dict[str, list]`): The shape of each, whose sizes are numbers, or names where they may differ.
        outputs (`dict[str, list]`): The same of what comes out.
        operators (`dict[str, int]`): How many nodes of each kind there are.
        nonlinear (`dict[str, int]`): Those that are not linear in what descends from the embeddings of the tokens,
            but for products.
        products (`dict[str, int]`): Those that multiply two tensors that descend from the embeddings.
        comparisons (`list[Comparison]`): How the graph was checked.
        files (`dict[str, int]`): Bytes of each file next to this report.
        versions (`dict[str, str]`): Versions of the packages that took part.
    """

    notation: str
    folded_notation: str
    parameters: int
    opset: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    operators: dict[str, int]
    nonlinear: dict[str, int]
    products: dict[str, int]
    comparisons: list[Comparison]
    files: dict[str, int]
    versions: dict[str, str]

    @property
    def largest_difference(self) -> float:
        """Of all comparisons."""
        return max(comparison.difference for comparison in self.comparisons)

    def save(self, path: Path):
        """Writes it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def export_onnx(
    model: EntropyGPTForCausalLM, folder: Path, cached: bool = False, tokenizer: PreTrainedTokenizerFast | None = None
) -> ExportReport:
    """
    Writes a model's graph, its configurations and a report into a folder, once the graph computes what the model does.

    Inputs of the graph are `input_ids` and `position_ids` of shape `(batch_size, sequence_length)` and
    `attention_mask` of shape `(batch_size, total_length)`, 0 at padding, all int64. Its output is `logits`, float32,
    of shape `(batch_size, sequence_length, vocab_size)`. With a cache, keys and values of each layer come and go as
    `past_key_values.0.key` and `present.0.key`, of shape `(batch_size, heads, past_length, head_dim)`; the past of a
    prompt has length 0.

    Args:
        model ([`EntropyGPTForCausalLM`]): Any architecture, in float32, on the CPU; it is not changed.
        folder (`Path`): An empty one. Weights beyond ONNX's limit of 2 GB lie next to the graph.
        cached (`bool`): Whether the graph takes and gives keys and values.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): A tokenizer to write next to it.

    Raises:
        `ValueError`: If the model has another dtype.
        `ConversionError`: If it can't be folded, or the logits, folded or of the graph, are not the model's.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"The model is in {model.dtype}, and the graph computes in float32: give model.float().")
    references = _references(model)
    folded = fold(model)
    folded.set_attn_implementation("eager")
    _check_folding(folded, references)
    path = folder / GRAPH
    _write_graph(folded, path, cached)
    onnx.checker.check_model(str(path), full_check=True)
    comparisons = list(_compare(path, references, cached))
    folded.config.save_pretrained(folder)
    folded.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)

    written = onnx.load(path, load_external_data=False)
    nonlinear, products = find_nonlinear(written.graph)
    report = ExportReport(
        notation=model.config.notation,
        folded_notation=folded.config.notation,
        parameters=folded.num_parameters(),
        opset=written.opset_import[0].version,
        inputs={value.name: _shape(value) for value in written.graph.input},
        outputs={value.name: _shape(value) for value in written.graph.output},
        operators=_by_name(node.op_type for node in written.graph.node),
        nonlinear=_by_name(nonlinear),
        products=_by_name(products),
        comparisons=comparisons,
        files={file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        versions={package: version(package) for package in PACKAGES},
    )
    report.save(folder / REPORT)
    return report


def find_nonlinear(graph: onnx.GraphProto) -> tuple[list[str], list[str]]:
    """
    Looks for what is not linear in the data, which are the embeddings of the tokens, cached keys and values, and what
    descends from them. What is computed from positions, masks and shapes alone is not looked at.

    Returns:
        The kind of each node that is not linear in the data, and of each that is a product of two such tensors. What
        is not known to be linear is not; neither is a node with a graph of its own, which may use any tensor.
    """
    nonlinear, products = [], []
    descended = {value.name for value in graph.input if value.name.startswith(PAST)}
    for node in graph.node:
        places = {place for place, name in enumerate(node.input) if name in descended}
        is_embedding = node.op_type == "Gather" and node.input[1] == "input_ids"
        has_graph = any(attribute.type in GRAPHS for attribute in node.attribute)
        if not (is_embedding or has_graph) and (not places or node.op_type in OF_SHAPES):
            continue
        descended.update(node.output)
        if node.op_type in PRODUCTS and {0, 1} <= places:
            products.append(node.op_type)
        elif has_graph or not (is_embedding or _is_linear(node.op_type, places)):
            nonlinear.append(node.op_type)
    assert graph.output[0].name in descended, "the logits do not descend from the embeddings"
    return nonlinear, products


def _is_linear(kind: str, places: set[int]) -> bool:
    """Whether an operator is linear in its inputs at these places, which are not both factors of a product."""
    if kind == "Where":
        return 0 not in places  # its condition
    return kind in LINEAR or kind in PRODUCTS or (kind in LINEAR_IN_THE_FIRST and places == {0})


class _BetweenTensors(nn.Module):
    """The model with tensors for a cache."""

    def __init__(self, model: EntropyGPTForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None):
        cache = None
        if past_key_values is not None:
            cache = DynamicCache(config=self.model.config)
            for layer, (keys, values) in enumerate(past_key_values):
                cache.update(keys, values, layer)
        outputs = self.model(
            input_ids,
            cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=cache is not None,
        )
        return outputs.logits, [] if cache is None else [(layer.keys, layer.values) for layer in cache.layers]


def _write_graph(model: EntropyGPTForCausalLM, path: Path, cached: bool):
    # Each input has a tensor of its own: of one that is given twice, the exporter makes one input.
    shape = (TRACED_BATCH, TRACED_LENGTH)
    total = TRACED_LENGTH + (TRACED_PAST if cached else 0)
    example = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.ones(TRACED_BATCH, total, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    sizes = {name: {0: "batch_size", 1: "sequence_length"} for name in example}
    inputs, outputs = [*example], ["logits"]
    if cached:
        config = model.config
        shape = (TRACED_BATCH, config.n_head, TRACED_PAST, config.n_embd // config.n_head)
        past_sizes = {0: "batch_size", 2: "past_length"}
        example["past_key_values"] = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.n_layer)]
        sizes["past_key_values"] = [(past_sizes, past_sizes)] * config.n_layer
        sizes["attention_mask"] = {0: "batch_size", 1: "total_length"}
        names = [f"{layer}.{kind}" for layer in range(config.n_layer) for kind in ("key", "value")]
        inputs += [f"{PAST}{name}" for name in names]
        outputs += [f"present.{name}" for name in names]
    with warnings.catch_warnings():
        # torch's, of its own ways: inputs share their sizes, as they should, and it calls what it will give up.
        warnings.filterwarnings("ignore", "# The axis name")
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        program = torch.onnx.export(
            _BetweenTensors(model).eval(),
            kwargs=example,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=sizes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # lines of code, with the paths of this machine
    program.save(path)


def _references(model: EntropyGPTForCausalLM) -> list[Reference]:
    """Batches of sequences, and the logits of all their tokens by the model, which sees each sequence alone."""
    generator, longest = torch.Generator().manual_seed(0), min(LONGEST_CHECKED, model.config.n_positions)
    references = []
    for lengths in ([1], [longest], [longest, (longest + 1) // 2, 1]):
        sequences = [torch.randint(model.config.vocab_size, (1, length), generator=generator) for length in lengths]
        references.append((sequences, _run(model, sequences)))
    if not all(logits.isfinite().all() for _, logits in references):
        raise NotFiniteError("The model's own logits are not finite: there is nothing to export.")
    return references


@torch.no_grad()
def _run(model: EntropyGPTForCausalLM, sequences: list[torch.Tensor]) -> torch.Tensor:
    was_training = model.training
    logits = torch.cat([model.eval()(tokens, use_cache=False).logits[0] for tokens in sequences])
    model.train(was_training)
    return logits


def _check_folding(folded: EntropyGPTForCausalLM, references: list[Reference]):
    for sequences, expected in references:
        difference = _share(_run(folded, sequences), expected)
        if not difference <= LARGEST_SHARE:  # NaN neither
            raise ConversionError(
                f"Folded, the model's logits differ by {difference:.1e} of the largest, where {LARGEST_SHARE:.0e} is "
                "allowed: its weights, once folded, are too coarse in float32. Use the model in torch, not folded."
            )


def _compare(path: Path, references: list[Reference], cached: bool) -> Iterator[Comparison]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for sequences, expected in references:
        lengths = [tokens.shape[1] for tokens in sequences]
        for steps in sorted({0, min(STEPS_CHECKED, max(lengths) - 1)}) if cached else [0]:
            difference = _share(run_graph(session, sequences, steps), expected)
            if not difference <= LARGEST_SHARE:
                raise ConversionError(
                    f"In onnxruntime, logits of sequences of {lengths} tokens ({steps} of them one by one) differ by "
                    f"{difference:.1e} of the largest from the model's, where {LARGEST_SHARE:.0e} is allowed. Folded, "
                    "the model is right in torch: the graph computes something else. Try other releases of torch, "
                    "onnxscript and onnxruntime."
                )
            yield Comparison(lengths, steps, difference)


def _share(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest logit expected."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def run_graph(session: onnxruntime.InferenceSession, sequences: list[torch.Tensor], steps: int = 0) -> torch.Tensor:
    """
    The logits that a graph gives for a batch, padded on the left.

    Args:
        session (`onnxruntime.InferenceSession`): The session that runs the graph.
        sequences (`list[torch.Tensor]`): Tokens of each, of shape `(1, length)`.
        steps (`int`): How many of the last tokens are given one by one; with them, the graph needs a cache.

    Returns:
        `torch.Tensor` of shape `(tokens of all sequences, vocab_size)`.
    """
    longest = max(tokens.shape[1] for tokens in sequences)
    tokens = np.concatenate([np.pad(each.numpy(), ((0, 0), (longest - each.shape[1], 0))) for each in sequences])
    mask = np.stack([np.arange(longest) >= longest - each.shape[1] for each in sequences]).astype(np.int64)
    positions = (mask.cumsum(axis=1) - 1).clip(min=0)
    past = {
        value.name: np.zeros((len(sequences), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith(PAST)
    }
    logits, start = [], 0
    for end in range(longest - steps, longest + 1):
        inputs = {"input_ids": tokens[:, start:end], "position_ids": positions[:, start:end]}
        found, *present = session.run(None, {**inputs, "attention_mask": mask[:, :end], **past})
        past, start = dict(zip(past, present, strict=True)), end
        logits.append(found)
    return torch.from_numpy(np.concatenate(logits, axis=1)[mask.astype(bool)])


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def _by_name(kinds: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(kinds).items()))
