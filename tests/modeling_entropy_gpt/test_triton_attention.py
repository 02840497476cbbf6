"""
The kernel for GPUs. Without one, it runs in Triton's interpreter against the definition with whole matrices, and is
compiled for devices that are not there. On one, the same comparisons run on it.
"""

import importlib.util
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from modeling_entropy_gpt import blockwise_attention as operators
from modeling_entropy_gpt import entropy_attention, row_entropies
from modeling_entropy_gpt.attention_functions import FUNCTIONS, entropies_of, whole_attention
from tests.architectures import ARCHITECTURES, make_model, make_tokens
from tests.slow import slow_but, slow_cases

from .test_entropy_attention import HEADS, SCALING, causal, masks, naive


pytest.importorskip("triton")
BLOCKS = {"ROWS": 32, "KEYS": 16}
ON_DEVICES = []  # the function that chooses the blocks on devices
LENGTH = 40  # a whole block of rows and a part of one
KERNELS = ("forward", "backward_query", "backward_key")
NAMES = ("query", "key", "value")
SIZES_OF_HEADS = [(20, 5), (64, 64), (128, 128), (256, 256)]
# Names of parts that a mutation leaves out, and what stands in their place.
MUTATIONS = {
    "the raised maximum": (" + total * (maximum - raised)", ""),
    "the gradient of the entropy": (" - slopes[:, None] * (LN_2 * scores)", ""),
    "the gradient of the entropy for keys": (" - slopes[None, :] * (LN_2 * scores)", ""),
    "the entropy's constant": ("constant += slopes * ", "constant += 0 * "),
}


def interpret():
    """Makes this process compute attention with entropies by the kernel, in Triton's interpreter."""
    from triton.runtime import interpreter

    from modeling_entropy_gpt import triton_attention

    def call(function, *arguments, **options):
        if function.fn.__module__ not in patched:  # once, where Triton does it in each call, which takes most time
            patched.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **options)

    patched = set()
    interpreter.InterpretedFunction.__call__ = call
    operators.obstacle_to_kernel = lambda *_: None
    ON_DEVICES.append(triton_attention.block_sizes)
    triton_attention.block_sizes = lambda *_: BLOCKS
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreter():
    """A process in which Triton interprets: it decides when it is imported, as torch has done here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), interpret) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(int).result()  # starts the process
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


def make_states(query_length, key_length, head_dim, value_dim, dtype, deviation=1.0, heads=1):
    """Queries, keys and values as parts of one matrix product's result, and the same in float64."""
    torch.manual_seed(0)
    widths = (head_dim, head_dim, value_dim)
    length = max(query_length, key_length)
    whole = torch.randn(2, length, heads, sum(widths)).to(dtype)
    query, key, value = (part.transpose(1, 2) for part in whole.split(widths, dim=-1))
    states = [query[:, :, :query_length] * deviation, key[:, :, :key_length], value[:, :, :key_length]]
    states = [state.detach().requires_grad_() for state in states]
    return states, [state.detach().double().requires_grad_() for state in states]


def compare(
    kind: str | None = None,
    is_causal: bool = True,
    lengths: tuple[int, int] = (LENGTH, LENGTH),
    dims: tuple[int, int] = (20, 5),
    dtype: torch.dtype = torch.float32,
    deviation: float = 1.0,
    heads: int = 1,
    alone: bool = False,
    offset: float = 0.0,
) -> dict[str, float]:
    """
    Errors against float64: the largest of both results; of gradients the norm, as a part of the gradient's. On request
    those of `row_entropies` too.
    """
    states, wide = make_states(*lengths, *dims, dtype, deviation, heads)
    with torch.no_grad():
        states[1] += offset
        wide[1].copy_(states[1])
    mask = None
    visible = causal(*lengths) if is_causal else torch.ones(lengths, dtype=torch.bool)
    if kind is not None:
        mask, is_causal, visible = masks(lengths[0])[kind]
    scaling = dims[0] ** -0.5
    got = entropy_attention(*states, mask, is_causal=is_causal, scaling=scaling)
    expected = naive(*wide, visible, scaling)
    errors = {"output": largest(got[0], expected[0]), "entropies": largest(got[1], expected[1])}
    assert got[1].min() >= 0
    upstream = [torch.randn_like(result) for result in got]
    errors |= gradient_errors(got, states, upstream, expected, wide)
    if alone:
        entropies = row_entropies(*states[:2], mask, is_causal, scaling)
        errors["entropies alone"] = largest(entropies, expected[1])
        theirs = naive(*wide, visible, scaling)[1]
        more = gradient_errors([entropies], states[:2], upstream[1:], [theirs], wide[:2])
        errors |= {f"{name} through entropies alone": error for name, error in more.items()}
    return errors


def gradient_errors(got, states, upstream, expected, wide) -> dict[str, float]:
    gradients = torch.autograd.grad(got, states, upstream)
    truth = torch.autograd.grad(expected, wide, [each.double() for each in upstream])
    return {
        f"gradient of {name}": relative(*each)
        for name, *each in zip(NAMES[: len(truth)], gradients, truth, strict=True)
    }


def largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours.double() - theirs).abs().max().item()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.isfinite().all()
    return ((ours.double() - theirs).norm() / theirs.norm().clamp(min=0.1)).item()


def assert_small(errors: dict[str, float], bound: float = 1e-5):
    assert {name: error for name, error in errors.items() if not error < bound} == {}


@pytest.mark.parametrize("kind", slow_but(("packed", "padding"), masks(LENGTH)))
def test_masks(kind, interpreter):
    assert_small(interpreter(compare, kind, heads=HEADS if kind == "one for each head" else 1))


@pytest.mark.parametrize(
    ("lengths", "is_causal"),
    [
        ((7, 50), True),
        *slow_cases(((1, 50), True), ((16, 16), True), ((33, 64), True), ((65, 65), True)),
        *slow_cases(((1, 1), False), ((7, 50), False), ((64, 64), False)),
    ],
)
def test_lengths_and_cached_keys(lengths, is_causal, interpreter):
    assert_small(interpreter(compare, is_causal=is_causal, lengths=lengths, heads=2, alone=True))


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(1, 1), (17, 64), (100, 100), (200, 3), *SIZES_OF_HEADS])
def test_head_sizes(dims, interpreter):
    assert_small(interpreter(compare, dims=dims))


@pytest.mark.slow
def test_blocks_of_the_size_that_devices_have(interpreter):
    assert_small(interpreter(compare_with_sizes_of_devices))


def compare_with_sizes_of_devices():
    from modeling_entropy_gpt import triton_attention

    with mock.patch.object(triton_attention, "block_sizes", ON_DEVICES[0]):
        return compare(lengths=(150, 150), dims=(64, 64))


def compare_function(
    function: str, kind: str | None = None, dtype=torch.float32, length: int = LENGTH
) -> dict[str, float]:
    """Errors of another attention function against float64; rows at the edge of its range are left out."""
    states, wide = make_states(length, length, 20, 5, dtype, deviation=3.0, heads=HEADS)
    mask, is_causal, visible = masks(length)[kind] if kind else (None, True, causal(length, length))
    shift = torch.randn(HEADS, 2, length).transpose(0, 1)  # as the model's layer gives it
    states, wide = [*states, shift.requires_grad_()], [*wide, shift.detach().double().requires_grad_()]
    got = entropy_attention(*states[:3], mask, is_causal, SCALING, function=function, shift=states[3])
    output, _, logs = whole_attention(*wide[:3], visible.expand(2, 1, -1, -1), False, SCALING, 0.0, function, wide[3])
    expected = (output, entropies_of(logs)[0])
    upstream = [torch.randn_like(result) for result in got]
    unsure = logs.logsumexp(dim=-1) < -5  # a small sum, all of it near the edge
    for gradient in upstream:
        gradient[unsure] = 0.0
    pairs = zip(("output", "entropies"), got, expected, strict=True)
    errors = {name: largest(*(result[~unsure] for result in each)) for name, *each in pairs}
    gradients = torch.autograd.grad(got, states, upstream)
    truth = torch.autograd.grad(expected, wide, [each.double() for each in upstream])
    pairs = zip((*NAMES, "shift"), gradients, truth, strict=True)
    return errors | {f"gradient of {name}": relative(*each) for name, *each in pairs}


@pytest.mark.parametrize("kind", slow_but([None], [None, "padding", "packed"]))
@pytest.mark.parametrize("function", slow_but(["power4"], FUNCTIONS[1:]))
def test_attention_functions(function, kind, interpreter):
    assert_small(interpreter(compare_function, function, kind), 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_attention_functions_in_half_precision(function, interpreter):
    errors = interpreter(compare_function, function, None, torch.float16)
    assert errors.pop("entropies") < 1e-5
    assert_small(errors, 3e-3)


def compare_what_is_asked_for(asked: list[int]) -> dict[str, float]:
    """Gradients of some states alone, against those of all."""
    states, _ = make_states(LENGTH, LENGTH, 20, 5, torch.float32)
    whole = torch.autograd.grad(sum(result.sum() for result in entropy_attention(*states, is_causal=True)), states)
    for index, state in enumerate(states):
        state.requires_grad_(index in asked)
    total = sum(result.sum() for result in entropy_attention(*states, is_causal=True))
    some = torch.autograd.grad(total, [states[index] for index in asked])
    return {NAMES[i]: relative(gradient, whole[i].double()) for i, gradient in zip(asked, some, strict=True)}


@pytest.mark.parametrize("asked", slow_but([[0]], [[0], [1], [2]]))
def test_gradients_that_nobody_asks_for(asked, interpreter):
    assert_small(interpreter(compare_what_is_asked_for, asked))


def shapes():
    """Any lengths, where a causal mask takes no more queries than keys, and any head sizes."""
    number = st.integers(1, 70)
    return st.tuples(number, number, st.integers(1, 40), st.integers(1, 40), st.booleans()).filter(
        lambda shape: not shape[-1] or shape[0] <= shape[1]
    )


@pytest.mark.parametrize("examples", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_any_shape(examples, interpreter):
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(shapes())
    def check(shape):
        *sizes, is_causal = shape
        assert_small(interpreter(compare, None, is_causal, sizes[:2], sizes[2:]))

    check()


def test_keys_that_share_an_offset(interpreter):
    """In half precision, whose rounding of a row's gradients it would multiply."""
    errors = interpreter(compare, offset=30.0, dtype=torch.float16, dims=(32, 32))
    assert errors["gradient of query"] < 3e-3


@pytest.mark.parametrize(("deviation", "bound"), [(20.0, 3e-5), pytest.param(200.0, 1e-2, marks=pytest.mark.slow)])
def test_large_logits(deviation, bound, interpreter):
    """No more can be asked than the rounding of the logits themselves; where rows are all but one-hot, it is much."""
    errors = interpreter(compare, deviation=deviation)
    assert_small({name: errors.pop(name) for name in ("output", "entropies")}, 1e-5 * deviation / 20)
    assert_small(errors, bound)


def compare_in_float16(deviation: float) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of the kernel, and of torch's own attention on the same inputs."""
    ours = compare(dims=(32, 32), dtype=torch.float16, deviation=deviation)
    states, wide = make_states(LENGTH, LENGTH, 32, 32, torch.float16, deviation)
    outputs = [scaled_dot_product_attention(*each, is_causal=True) for each in (states, wide)]
    upstream = torch.randn_like(outputs[0])
    stock = gradient_errors(outputs[:1], states, [upstream], outputs[1:], wide)
    return ours, {"output": largest(*outputs), **stock}


@pytest.mark.parametrize("deviation", [1.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_float16_is_as_exact_as_a_stock_kernel(deviation, interpreter):
    errors, stock = interpreter(compare_in_float16, deviation)
    assert errors.pop("entropies") < 1e-5
    assert errors.pop("output") <= 1.5 * stock.pop("output")
    assert_small(errors, 2 * max(stock.values()))


def attend_with_dropout(dropout: float) -> dict[str, float]:
    """The kernel's dropout, seen where values are a unit matrix, against matrices from which the same is dropped."""

    def attend(states):
        torch.manual_seed(3)
        return entropy_attention(*states, is_causal=True, dropout=dropout)

    states, wide = make_states(LENGTH, LENGTH, 8, LENGTH, torch.float32)
    probabilities = torch.softmax(
        (wide[0] @ wide[1].mT * 8**-0.5).masked_fill(~causal(LENGTH, LENGTH), -torch.inf), dim=-1
    )
    unit = torch.eye(LENGTH).expand(2, 1, LENGTH, LENGTH)
    kept = (attend([*states[:2], unit])[0] / probabilities.detach().clamp(min=1e-30)).double()
    kept = torch.where(kept > 0.5, 1 / (1 - dropout) if dropout < 1 else 0.0, 0.0)
    got = attend(states)
    expected = ((probabilities * kept) @ wide[2], naive(*wide, causal(LENGTH, LENGTH), 8**-0.5)[1])
    errors = {"output": largest(got[0], expected[0]), "entropies": largest(got[1], expected[1])}
    errors |= gradient_errors(got, states, [torch.randn_like(result) for result in got], expected, wide)
    seen = kept[causal(LENGTH, LENGTH).expand_as(kept)]
    share = (seen > 0).double().mean().item()
    assert abs(share - (1 - dropout)) < 0.06, share
    return errors


@pytest.mark.parametrize("dropout", slow_but([0.3], [0.3, 1.0]))
def test_dropout_is_the_same_forward_and_backward(dropout, interpreter):
    assert_small(interpreter(attend_with_dropout, dropout))


def attend_in_memory_of_any_layout() -> dict[str, float]:
    """Columns apart, heads that share keys, upstream gradients that are one number; and the same twice."""
    states, wide = make_states(LENGTH, LENGTH, 20, 20, torch.float32, heads=2)
    query = states[0].detach().mT.contiguous().mT
    key = states[1].detach()[:, :1].expand(-1, 2, -1, -1)
    strided = [query.requires_grad_(), key.requires_grad_(), states[2]]
    wide[1] = key.detach().double().requires_grad_()
    runs = []
    for _ in range(2):
        got = entropy_attention(*strided, is_causal=True)
        runs.append((*got, *torch.autograd.grad(got[0].sum() + got[1].sum(), strided)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    expected = naive(*wide, causal(LENGTH, LENGTH), 20**-0.5)
    truth = torch.autograd.grad(expected[0].sum() + expected[1].sum(), wide)
    errors = {"output": largest(runs[0][0], expected[0]), "entropies": largest(runs[0][1], expected[1])}
    return errors | {name: relative(*each) for name, *each in zip(NAMES, runs[0][2:], truth, strict=True)}


def test_layouts(interpreter):
    assert_small(interpreter(attend_in_memory_of_any_layout))


def attend_far_apart() -> dict[str, float]:
    """Two sequences more than 2^31 numbers apart, in memory that is reserved and mostly never touched."""
    reserved = torch.empty(2**31 + 2**20, dtype=torch.float16)
    states, wide = make_states(17, 17, 16, 16, torch.float16)
    far = [reserved[i * 2**17 :].as_strided(state.shape, (2**31, 1, 16, 1)) for i, state in enumerate(states)]
    for place, state in zip(far, states, strict=True):
        place.copy_(state.detach())
    got = entropy_attention(*far, is_causal=True)
    expected = naive(*wide, causal(17, 17), 0.25)
    return {"output": largest(got[0], expected[0]) / 100, "entropies": largest(got[1], expected[1])}


def test_more_elements_than_32_bits_count(interpreter):
    assert_small(interpreter(attend_far_apart))


def attend_to_what_is_no_number() -> list[list[bool]]:
    states, _ = make_states(6, 6, 8, 8, torch.float32)
    query = states[0].detach().clone()
    query[0, 0, 2] = torch.nan
    output, entropies = entropy_attention(query, *states[1:], is_causal=True)
    return [result.isnan().tolist() for result in (output[0, 0].mean(dim=-1), entropies[0, 0])]


def test_a_query_that_is_no_number_has_results_that_are_none(interpreter):
    assert interpreter(attend_to_what_is_no_number) == [[False, False, True, False, False, False]] * 2


def train_step(notation: str, uses_kernel: bool) -> dict[str, torch.Tensor]:
    """Loss, entropies and gradients of a model in training, on padded sequences."""
    torch.manual_seed(0)
    model = make_model(notation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, n_layer=2, n_head=2).train()
    tokens = make_tokens(length=17)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    attend_by_kernel, operators.obstacle_to_kernel = operators.obstacle_to_kernel, lambda *_: "not now"
    try:
        if uses_kernel:
            operators.obstacle_to_kernel = attend_by_kernel
        outputs = model(tokens, attention_mask=mask, labels=tokens.where(mask > 0, -100), output_entropies=True)
        outputs.loss.backward()
    finally:
        operators.obstacle_to_kernel = attend_by_kernel
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": outputs.loss.detach(), "entropies": torch.stack(outputs.attention_entropies).detach(), **gradients}


@pytest.mark.parametrize("notation", slow_but(["EReg(SM(t)+ScFuFFN)"], ARCHITECTURES))
def test_models_train_with_it(notation, interpreter):
    blocks, kernel = (interpreter(train_step, notation, uses_kernel) for uses_kernel in (False, True))
    assert any(not torch.equal(blocks[name], kernel[name]) for name in blocks), "both took the same way"
    assert_small({name: relative(kernel[name], expected.double()) for name, expected in blocks.items()}, 1e-4)


def compile_and_refuse() -> tuple[float, list[str]]:
    """Error of a captured graph, and what is said to derivatives that there are none of."""

    def attend(*states):
        output, entropies = entropy_attention(*states, is_causal=True)
        return output.square().sum() + entropies.sum()

    states, wide = make_states(17, 17, 16, 16, torch.float32)
    output, entropies = naive(*wide, causal(17, 17), 0.25)
    truth = torch.autograd.grad(output.square().sum() + entropies.sum(), wide)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    error = max(map(relative, torch.autograd.grad(compiled(*states), states), truth))
    said = []
    query, *others = (state.detach() for state in states)
    for derivative in (torch.func.jacfwd, lambda attend: torch.func.grad(lambda q: torch.func.grad(attend)(q).sum())):
        try:
            derivative(lambda query: attend(query, *others))(query)
        except (NotImplementedError, RuntimeError) as refusal:
            said.append(str(refusal))
    return error, said


@pytest.mark.slow
def test_graphs_are_whole_and_other_derivatives_are_refused(interpreter):
    error, said = interpreter(compile_and_refuse)
    assert error < 1e-5
    assert "forward mode AD" in said[0]
    assert "no second derivative" in said[1]


def compare_mutant(part: str) -> dict[str, float]:
    """What comes of the comparison when a part of the kernel is left out."""
    from modeling_entropy_gpt import triton_attention as kernel

    source = Path(kernel.__file__).read_text(encoding="utf-8")
    assert MUTATIONS[part][0] in source
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.py"
        path.write_text(source.replace(*MUTATIONS[part]), encoding="utf-8")
        specification = importlib.util.spec_from_file_location("modeling_entropy_gpt.mutant", path)
        mutant = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(mutant)
        mutant.block_sizes = kernel.block_sizes
        sys.modules[kernel.__name__] = mutant
        try:
            return compare()
        finally:
            sys.modules[kernel.__name__] = kernel


@pytest.mark.parametrize("part", slow_but([*MUTATIONS][:2], MUTATIONS))
def test_the_comparison_notices_what_is_left_out(part, interpreter):
    errors = interpreter(compare_mutant, part)
    assert max(errors.values()) > 1e-2


@pytest.fixture
def compile_for(monkeypatch, tmp_path) -> Callable:
    """A function that compiles all kernels for a device that need not be there, and gives what became of each."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def compile_instead(function, *arguments, **options):
        kernels.append(run(function, *arguments, **{**options, "warmup": True}))

    def compile_all(target: tuple, dtype, head_dim: int, kind="none", dropout=0.0, function="softmax"):
        machine = SimpleNamespace(
            get_current_target=lambda: GPUTarget(*target),
            get_current_device=lambda: str(target),
            get_current_stream=lambda device: 0,
        )
        monkeypatch.setattr(driver, "_active", machine)
        states = torch.zeros(1, LENGTH, 2, 3 * head_dim, dtype=dtype).transpose(1, 2).split(head_dim, dim=-1)
        rows, seed = torch.zeros(1, 2, LENGTH), torch.zeros(1, dtype=torch.long)
        visible = {"none": None, "keys": torch.ones(1, 1, 1, LENGTH), "pairs": torch.ones(1, 1, LENGTH, LENGTH)}[kind]
        visible = None if visible is None else visible.bool()
        shift = None if function == "softmax" else rows
        common = (*states, visible, True, 0.1, dropout, seed if dropout else None, function, shift)
        results = (states[0], rows, rows)
        triton_attention.run_forward(*common, *results)
        triton_attention.run_backward(*common, *results, *results, *states, shift)
        return kernels

    from modeling_entropy_gpt import triton_attention

    kernels, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", compile_instead)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    return compile_all


# With the shared memory of the least device of a kind, in bytes.
TARGETS = {
    "sm_80": (("cuda", 80, 32), 99 * 1024),
    "sm_90": (("cuda", 90, 32), 227 * 1024),
    "gfx942": (("hip", "gfx942", 64), 64 * 1024),
}


@pytest.mark.parametrize("name", slow_but(["sm_90"], TARGETS))
def test_compiles_for_devices_that_are_not_here(name, compile_for, monkeypatch):
    """The least blocks, which take the compiler least time."""
    from modeling_entropy_gpt import triton_attention

    monkeypatch.setattr(triton_attention, "block_sizes", lambda *_: {"ROWS": 16, "KEYS": 16, "num_warps": 1})
    kernels = compile_for(TARGETS[name][0], torch.bfloat16, 16)
    assert [kernel.metadata.name for kernel in kernels] == [f"{each}_kernel" for each in KERNELS]
    assert all(("hsaco" if name == "gfx942" else "cubin") in kernel.asm for kernel in kernels)


# One of each choice of blocks, with the options that take most shared memory; the functions take turns.
MOST_SHARED = [
    (torch.bfloat16, 64, "power4"),
    (torch.float16, 128, "power2"),
    (torch.bfloat16, 256, "clamped"),
    (torch.float32, 64, "power4"),
    (torch.float32, 256, "clamped"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "function"),
    # sm_90 has twice the memory of sm_80, of which the same blocks take a third more at most.
    [*((name, *case) for name in ("sm_80", "gfx942") for case in MOST_SHARED), ("sm_90", *MOST_SHARED[1])],
)
def test_blocks_fit_into_shared_memory(name, dtype, head_dim, function, compile_for):
    target, shared = TARGETS[name]
    kernels = compile_for(target, dtype, head_dim, kind="pairs", dropout=0.1, function=function)
    assert {
        kernel.metadata.name: kernel.metadata.shared for kernel in kernels if kernel.metadata.shared > shared
    } == {}


@pytest.mark.gpu
class TestOnADevice:
    @pytest.fixture(autouse=True)
    def device(self):
        with torch.device("cuda"):
            assert operators.obstacle_to_kernel(torch.empty(0).device, torch.float32, 64) is None
            yield

    @pytest.mark.parametrize(
        ("kind", "dims"), [*((kind, (64, 64)) for kind in masks(LENGTH)), *((None, dims) for dims in SIZES_OF_HEADS)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_agrees_with_float64(self, dtype, kind, dims):
        alone = dims == SIZES_OF_HEADS[0]  # each kernel that is compiled takes seconds
        errors = compare(kind, lengths=(300, 300), dims=dims, dtype=dtype, heads=HEADS, alone=alone)
        assert_small({name: errors.pop(name) for name in [*errors] if name.startswith("entropies")})
        assert_small(errors, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("lengths", [(1, 1), (1, 1000), (7, 130), (1025, 1025), (128, 4096)])
    def test_lengths_and_cached_keys(self, lengths):
        assert_small(compare(lengths=lengths, dims=(64, 64)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_large_logits(self, dtype):
        errors = compare(lengths=(500, 500), dims=(64, 64), dtype=dtype, deviation=20.0)
        assert errors["entropies"] < 1e-3
        assert_small(errors, 16 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_keys_that_share_an_offset(self, dtype):
        states, _ = make_states(200, 200, 32, 32, dtype)
        states[1] = (states[1].detach() + 3).requires_grad_()
        wide = [state.detach().double().requires_grad_() for state in states]
        got = entropy_attention(*states, is_causal=True)
        expected = naive(*wide, causal(200, 200), 32**-0.5)
        upstream = [torch.ones_like(result) for result in got]
        assert_small(gradient_errors(got, states, upstream, expected, wide), 0.02)

    def test_layouts(self):
        assert_small(attend_in_memory_of_any_layout())

    @pytest.mark.parametrize("function", FUNCTIONS[1:])
    def test_attention_functions(self, function):
        assert_small(compare_function(function, length=300), 3e-5)

    @pytest.mark.parametrize("dropout", [0.3, 1.0])
    def test_dropout(self, dropout):
        assert_small(attend_with_dropout(dropout))

    def test_more_elements_than_32_bits_count(self):
        assert_small(attend_far_apart())

    def test_graphs_are_whole(self):
        assert compile_and_refuse()[0] < 1e-5

    @pytest.mark.parametrize("notation", ARCHITECTURES)
    def test_models_train_with_it(self, notation):
        blocks, kernel = (train_step(notation, uses_kernel) for uses_kernel in (False, True))
        assert_small({name: relative(kernel[name], expected.double()) for name, expected in blocks.items()}, 1e-4)
