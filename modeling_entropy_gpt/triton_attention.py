# SPDX-License-Identifier: Apache-2.0
"""Attention with row entropies on a GPU: the loops of flash attention (arXiv 2307.08691) with one more sum a row.

A row's running maximum m, its sum l of exp(s - m) and that of exp(s - m) v are flash attention's. Another sum, e of
exp(s - m) (s - m), gives the entropy. When a block of scores raises the maximum to m', with a = exp(m - m'),

    e <- a (e + l (m - m')) + sum exp(s - m') (s - m')        at the end    H = log l - e / l

where both terms have H's own size, so that nothing cancels. The backward pass is that of blockwise_attention.py, in
one kernel for queries and one for keys and values, each of which adds in a fixed order. All sums are in float32,
scores to base 2. Imported where a device needs it, since the model does without triton.
"""

import torch

from .attention_functions import POWERS, row_floors


try:
    import triton
    import triton.language as tl
except ImportError:  # transformers asks users for what a file imports, except for what such a block does
    raise


LN_2, LOG2_E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)
# As in blockwise_attention.py: the score of a masked pair, and the maximum of a row that has seen nothing else.
MASKED, NOTHING_VISIBLE = tl.constexpr(-1e20), tl.constexpr(-1e19)
# As in attention_functions.py: the range of `clamped`, and the largest number that is raised to a power.
LOWEST, HIGHEST, LARGEST_BASE = tl.constexpr(-7.4), tl.constexpr(3.0), tl.constexpr(1e6)


@triton.jit
def _tile(matrices, pair, heads, first, length, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to some rows of a head's matrix, and which lie inside; there may be more than 2^31 elements."""
    tensor = matrices[0] + _place(matrices, pair, heads) + tl.cast(first, tl.int64) * matrices[3]
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    return tensor + rows * matrices[3] + columns * matrices[4], (first + rows < length) & (columns < width)


@triton.jit
def _place(matrices, pair, heads):
    return (pair // heads).to(tl.int64) * matrices[1] + (pair % heads).to(tl.int64) * matrices[2]


@triton.jit
def _load(matrices, pair, heads, first, length, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    pointers, inside = _tile(matrices, pair, heads, first, length, width, BLOCK, WIDTH)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store(content, matrices, pair, heads, first, length, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    pointers, inside = _tile(matrices, pair, heads, first, length, width, BLOCK, WIDTH)
    tl.store(pointers, content.to(matrices[0].dtype.element_ty), mask=inside)


@triton.jit
def _dot(left, right):
    return tl.dot(left, right, input_precision="ieee")  # float32 stays float32


@triton.jit
def _hide(scores, mask, pair, heads, rows, keys, row_count, key_count, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr):
    """The scores, and MASKED where a row may not attend to a key; rows and keys lie along different dimensions."""
    visible = (rows < row_count) & (keys < key_count)
    if IS_CAUSAL:
        visible &= keys <= rows + (key_count - row_count)
    if MASK != "none":
        pointers = mask[0] + _place(mask, pair, heads) + keys.to(tl.int64) * mask[4]
        if MASK == "keys":
            visible &= tl.load(pointers, mask=keys < key_count, other=0) != 0
        else:
            visible &= tl.load(pointers + rows.to(tl.int64) * mask[3], mask=visible, other=0) != 0
    return tl.where(visible, scores, MASKED)


@triton.jit
def _log_function(products, shifts, floors, scaling, POWER: tl.constexpr):
    """
    log (f + floor) to base 2 of the scores, `products` times `scaling`, and its derivative by them, which nobody reads
    for softmax. `POWER` is 1 for softmax, 0 for `clamped`.
    """
    if POWER == 1:
        logs = products * (scaling * LOG2_E)
        derivative = logs
    elif POWER == 0:
        scores = products * scaling - shifts
        weights = tl.exp2(tl.clamp(scores, LOWEST, HIGHEST) * LOG2_E)
        logs = tl.log2(weights + floors)
        derivative = tl.where((scores >= LOWEST) & (scores <= HIGHEST), weights / (weights + floors), 0.0)
    else:
        base = tl.clamp(1 + (products * scaling - shifts) / POWER, 0.0, LARGEST_BASE)
        slope = base if POWER == 2 else base * base * base
        weights = slope * base + floors
        logs = tl.log2(weights)
        derivative = slope / weights
    return logs, derivative


@triton.jit
def _load_rows(numbers, place, inside, POWER: tl.constexpr):
    """The shifts or floors of some rows, of which softmax has none; 1 where there is no row."""
    return 0.0 if POWER == 1 else tl.load(numbers + place, mask=inside, other=1.0)


@triton.jit
def _ends(first_row, row_count, key_count, ROWS: tl.constexpr, KEYS, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr):
    """Where the keys end that any of some rows may see, and where the whole blocks end that all of the rows see."""
    end, whole = key_count, key_count
    if IS_CAUSAL:
        diagonal = first_row + key_count - row_count + 1
        end, whole = tl.minimum(key_count, diagonal + ROWS - 1), tl.minimum(key_count, diagonal)
    return end, whole // KEYS * KEYS if MASK == "none" else 0


@triton.jit
def _kept(seed, pair, rows, keys, dropout):
    """1 / (1 - dropout) where a probability is kept, else 0: by its place alone, the same in all kernels."""
    zeros = 0 * (rows + keys)
    random, _, _, _ = tl.philox(tl.load(seed), zeros + keys, zeros + rows, zeros + pair, zeros)
    return tl.where(tl.uint_to_uniform_float(random) >= dropout, 1 / tl.maximum(1 - dropout, 1e-9), 0.0)


@triton.jit(do_not_specialize=["row_count", "key_count"])
def forward_kernel(
    query, key, value, mask, seed, shift, floor, output, entropies, log_sum_exp,
    row_count, key_count, heads, scaling, dropout, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, POWER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(row_count, ROWS)
    pair = tl.program_id(0) // blocks
    # Under a causal mask the last rows take longest, and are begun first.
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    place, inside = pair.to(tl.int64) * row_count + rows, rows < row_count
    queries = _load(query, pair, heads, first_row, row_count, HEAD_DIM, ROWS, WIDTH)
    shifts = _load_rows(shift, place[:, None], inside[:, None], POWER)
    floors = _load_rows(floor, place[:, None], inside[:, None], POWER)
    maximum = tl.full([ROWS], NOTHING_VISIBLE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)

    end, whole = _ends(first_row, row_count, key_count, ROWS, KEYS, IS_CAUSAL, MASK)
    for EDGE in tl.static_range(2):  # first the keys that all rows see, then those that some may not
        for first_key in range(whole if EDGE else 0, end if EDGE else whole, KEYS):
            columns = (first_key + tl.arange(0, KEYS))[None, :]
            keys = _load(key, pair, heads, first_key, key_count, HEAD_DIM, KEYS, WIDTH)
            scores, _ = _log_function(_dot(queries, tl.trans(keys)), shifts, floors, scaling, POWER)
            if EDGE:
                scores = _hide(
                    scores, mask, pair, heads, rows[:, None], columns, row_count, key_count, IS_CAUSAL, MASK
                )
            raised = tl.maximum(maximum, tl.max(scores, 1))
            shrink = tl.exp2(maximum - raised)
            scores -= raised[:, None]
            exponentials = tl.exp2(scores)
            product = shrink * (product + total * (maximum - raised)) + tl.sum(exponentials * scores, 1)
            total = shrink * total + tl.sum(exponentials, 1)
            maximum = raised
            if DROPOUT:
                exponentials *= _kept(seed, pair, rows[:, None], columns, dropout)
            values = _load(value, pair, heads, first_key, key_count, VALUE_DIM, KEYS, VALUE_WIDTH)
            attended = attended * shrink[:, None] + _dot(exponentials.to(values.dtype), values)

    total = tl.where(total == 0, 1.0, total)  # of rows that see nothing
    entropy = LN_2 * (tl.log2(total) - product / total)
    tl.store(entropies + place, tl.where(entropy < 0, 0.0, entropy), mask=inside)  # negative by rounding
    tl.store(log_sum_exp + place, maximum + tl.log2(total), mask=inside)
    attended /= total[:, None]
    _store(attended, output, pair, heads, first_row, row_count, VALUE_DIM, ROWS, VALUE_WIDTH)


@triton.jit(do_not_specialize=["row_count", "key_count"])
def backward_query_kernel(
    query, key, value, mask, seed, shift, floor, log_sum_exp, grad_output, grad_entropies, constants,
    output, entropies, grad_sums, mean_keys, grad_query, grad_shift,
    row_count, key_count, heads, scaling, dropout, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, POWER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(row_count, ROWS)
    pair = tl.program_id(0) // blocks
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    queries = _load(query, pair, heads, first_row, row_count, HEAD_DIM, ROWS, WIDTH)
    outputs = _load(output, pair, heads, first_row, row_count, VALUE_DIM, ROWS, VALUE_WIDTH)
    upstream = _load(grad_output, pair, heads, first_row, row_count, VALUE_DIM, ROWS, VALUE_WIDTH)
    place, inside = pair.to(tl.int64) * row_count + rows, rows < row_count
    shifts = _load_rows(shift, place[:, None], inside[:, None], POWER)
    floors = _load_rows(floor, place[:, None], inside[:, None], POWER)
    log_sums = tl.load(log_sum_exp + place, mask=inside, other=0.0)
    slopes = tl.load(grad_entropies + place, mask=inside, other=0.0)
    # do . o + g H, less the gradient of the log-sum-exp, which all keys of a row share.
    sums = tl.load(grad_sums + place, mask=inside, other=0.0)
    constant = tl.sum(upstream.to(tl.float32) * outputs.to(tl.float32), 1)
    constant += slopes * tl.load(entropies + place, mask=inside, other=0.0) - sums
    tl.store(constants + place, constant, mask=inside)
    grad_queries = tl.zeros([ROWS, WIDTH], tl.float32)
    # A row's gradients of scores add up to that of its log-sum-exp, but not when rounded to half precision; and they
    # multiply what all keys have in common. So it is the keys' distances from their mean that are multiplied.
    mean_key = _load(mean_keys, pair, heads, 0, 1, HEAD_DIM, 1, WIDTH).to(tl.float32)
    excess, whole_sums = 0 - sums, sums
    if POWER != 1:  # of another function's scores, they add up to what they do
        excess, whole_sums = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)

    end, whole = _ends(first_row, row_count, key_count, ROWS, KEYS, IS_CAUSAL, MASK)
    for EDGE in tl.static_range(2):
        for first_key in range(whole if EDGE else 0, end if EDGE else whole, KEYS):
            columns = (first_key + tl.arange(0, KEYS))[None, :]
            keys = _load(key, pair, heads, first_key, key_count, HEAD_DIM, KEYS, WIDTH)
            values = _load(value, pair, heads, first_key, key_count, VALUE_DIM, KEYS, VALUE_WIDTH)
            scores, derivative = _log_function(_dot(queries, tl.trans(keys)), shifts, floors, scaling, POWER)
            if EDGE:
                scores = _hide(
                    scores, mask, pair, heads, rows[:, None], columns, row_count, key_count, IS_CAUSAL, MASK
                )
            scores -= log_sums[:, None]  # log2 of the probabilities
            grads = _dot(upstream, tl.trans(values))
            if DROPOUT:
                grads *= _kept(seed, pair, rows[:, None], columns, dropout)
            grads = tl.exp2(scores) * (grads - constant[:, None] - slopes[:, None] * (LN_2 * scores))
            if POWER != 1:
                grads *= derivative
                whole_sums += tl.sum(grads, 1)
            grads = grads.to(keys.dtype)
            excess += tl.sum(grads.to(tl.float32), 1)
            grad_queries += _dot(grads, keys)

    if POWER != 1:
        excess -= whole_sums
        tl.store(grad_shift + place, -whole_sums, mask=inside)
    grad_queries = (grad_queries - excess[:, None] * mean_key) * scaling
    _store(grad_queries, grad_query, pair, heads, first_row, row_count, HEAD_DIM, ROWS, WIDTH)


@triton.jit(do_not_specialize=["row_count", "key_count"])
def backward_key_kernel(
    query, key, value, mask, seed, shift, floor, log_sum_exp, grad_output, grad_entropies, constants,
    grad_key, grad_value,
    row_count, key_count, heads, scaling, dropout, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, POWER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    past = key_count - row_count
    blocks = tl.cdiv(key_count, KEYS)
    pair = tl.program_id(0) // blocks
    first_key = tl.program_id(0) % blocks * KEYS  # the first keys are seen by most rows
    columns = (first_key + tl.arange(0, KEYS))[:, None]
    keys = _load(key, pair, heads, first_key, key_count, HEAD_DIM, KEYS, WIDTH)
    values = _load(value, pair, heads, first_key, key_count, VALUE_DIM, KEYS, VALUE_WIDTH)
    grad_keys = tl.zeros([KEYS, WIDTH], tl.float32)
    grad_values = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)

    begin, whole = 0, 0
    if IS_CAUSAL:  # from the block with the first row that sees the first key, to the first row that sees the last
        begin = tl.maximum(0, first_key - past) // ROWS * ROWS
        whole = tl.minimum(row_count, tl.cdiv(tl.maximum(0, first_key + KEYS - 1 - past), ROWS) * ROWS)
    whole = whole if MASK == "none" else row_count
    for WHOLE in tl.static_range(2):  # first the rows that may not see all of the keys, then those that do
        for first_row in range(whole if WHOLE else begin, row_count if WHOLE else whole, ROWS):
            rows = first_row + tl.arange(0, ROWS)
            queries = _load(query, pair, heads, first_row, row_count, HEAD_DIM, ROWS, WIDTH)
            upstream = _load(grad_output, pair, heads, first_row, row_count, VALUE_DIM, ROWS, VALUE_WIDTH)
            place, inside = pair.to(tl.int64) * row_count + rows, rows < row_count
            log_sums = tl.load(log_sum_exp + place, mask=inside, other=0.0)  # rows lie along columns in what follows
            constant = tl.load(constants + place, mask=inside, other=0.0)
            slopes = tl.load(grad_entropies + place, mask=inside, other=0.0)
            shifts = _load_rows(shift, place[None, :], inside[None, :], POWER)
            floors = _load_rows(floor, place[None, :], inside[None, :], POWER)
            scores, derivative = _log_function(_dot(keys, tl.trans(queries)), shifts, floors, scaling, POWER)
            if not WHOLE:
                scores = _hide(
                    scores, mask, pair, heads, rows[None, :], columns, row_count, key_count, IS_CAUSAL, MASK
                )
            scores -= log_sums[None, :]
            probabilities = tl.exp2(scores)
            grads, used = _dot(values, tl.trans(upstream)), probabilities
            if DROPOUT:
                kept = _kept(seed, pair, rows[None, :], columns, dropout)
                grads, used = grads * kept, used * kept
            grad_values += _dot(used.to(upstream.dtype), upstream)
            grads = probabilities * (grads - constant[None, :] - slopes[None, :] * (LN_2 * scores))
            if POWER != 1:
                grads *= derivative
            grad_keys += _dot(grads.to(queries.dtype), queries)

    grad_keys *= scaling
    _store(grad_keys, grad_key, pair, heads, first_key, key_count, HEAD_DIM, KEYS, WIDTH)
    _store(grad_values, grad_value, pair, heads, first_key, key_count, VALUE_DIM, KEYS, VALUE_WIDTH)


def run_forward(
    query, key, value, visible, is_causal, scaling, dropout, seed, function, shift, output, entropies, log_sum_exp
):
    """Computes output, entropies and log-sum-exp of the operator [`blockwise_attention_forward`]."""
    if value is None:  # one column of values, whose output nobody takes
        value, output = key[..., :1], query.new_empty(*query.shape[:3], 1)
    launch = _Launch(query, key, value, visible, is_causal, scaling, dropout, seed, function, shift)
    launch(forward_kernel, _matrices(output), entropies, log_sum_exp)


def run_backward(
    query, key, value, visible, is_causal, scaling, dropout, seed, function, shift, output, entropies, log_sum_exp,
    grad_output, grad_entropies, grad_sums, grad_query, grad_key, grad_value, grad_shift,
):  # fmt: skip
    """
    Computes the gradients of the operator [`blockwise_attention_backward`], of which those that are not asked for are
    empty; `grad_sums` are those of the log-sum-exp in nats.
    """
    if value is None:
        value = key[..., :1]
        output = grad_output = query.new_zeros(1).expand(*query.shape[:3], 1)
    launch = _Launch(query, key, value, visible, is_causal, scaling, dropout, seed, function, shift)
    common = (log_sum_exp, _matrices(grad_output), grad_entropies.contiguous(), torch.empty_like(entropies))
    rows = (_matrices(output), entropies, grad_sums.contiguous(), _matrices(key.mean(dim=2, keepdim=True)))
    asks_for_keys = len(grad_key) or len(grad_value)
    grad_query, grad_key, grad_value = (
        gradient if len(gradient) else torch.empty_like(state)
        for gradient, state in ((grad_query, query), (grad_key, key), (grad_value, value))
    )
    launch(backward_query_kernel, *common, *rows, _matrices(grad_query), grad_shift)
    if asks_for_keys:
        launch(backward_key_kernel, *common, _matrices(grad_key), _matrices(grad_value))


class _Launch:
    """Runs kernels over all blocks of all heads."""

    def __init__(self, query, key, value, visible, is_causal, scaling, dropout, seed, function, shift):
        batch_size, heads, row_count, head_dim = query.shape
        mask = None if visible is None else visible.expand(batch_size, heads, -1, key.shape[2]).view(torch.uint8)
        seed = None if seed is None else seed.to(query.device, non_blocking=True)
        floor = None
        if function != "softmax":
            shift, floor = shift.contiguous(), row_floors(visible, is_causal, row_count, key.shape[2], query.device)
            floor = floor.expand(query.shape[:3]).contiguous()
        self.inputs = (*map(_matrices, (query, key, value, mask)), seed, shift, floor)
        self.query, self.pairs, self.lengths = query, batch_size * heads, (row_count, key.shape[2])
        self.numbers = (*self.lengths, heads, scaling, float(dropout))
        widths = [max(16, triton.next_power_of_2(dim)) for dim in (head_dim, value.shape[-1])]
        self.width = max(widths)
        self.options = {
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value.shape[-1],
            "IS_CAUSAL": is_causal,
            "MASK": "none" if visible is None else "keys" if visible.shape[2] == 1 else "pairs",
            "DROPOUT": dropout > 0,
            "POWER": {"softmax": 1, "clamped": 0, **POWERS}[function],
            "enable_fp_fusion": True,
            **dict(zip(("WIDTH", "VALUE_WIDTH"), widths, strict=True)),
        }

    def __call__(self, kernel, *tensors):
        sizes = block_sizes(kernel, self.width, self.query.dtype)
        over_keys = kernel is backward_key_kernel
        blocks = triton.cdiv(self.lengths[over_keys], sizes["KEYS" if over_keys else "ROWS"])
        if blocks * self.pairs:
            with torch.cuda.device_of(self.query):
                kernel[(blocks * self.pairs,)](*self.inputs, *tensors, *self.numbers, **self.options, **sizes)


def _matrices(tensor: torch.Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor, *tensor.stride())


def block_sizes(kernel, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and keys of a block, and the warps and stages it is spread over: what fits registers and shared memory."""
    if dtype == torch.float32:  # without tensor cores
        rows, keys, warps = (64, 32, 8) if width <= 64 else (16, 32, 8)
    elif width > 128:
        rows, keys, warps = (32, 32, 8) if kernel is backward_key_kernel else (64, 32, 8)
    elif width > 64:
        rows, keys, warps = (128, 64, 8) if kernel is forward_kernel else (64, 64, 8)
    else:
        rows, keys, warps = (64, 128, 8) if kernel is backward_key_kernel else (128, 64, 8)
    stages = 1 if dtype == torch.float32 or width > 128 else 2
    return {"ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}


__all__ = ["run_backward", "run_forward"]
