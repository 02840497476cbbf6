"""What entropies cost: attention with them against torch's own without, and against keeping every attention matrix.

    python -m entropy_gpt.evaluation.benchmarks.entropy_attention  takes 3 min, writes record, table and figure
    python -m entropy_gpt.evaluation.benchmarks.entropy_attention --quick  a minute: short lengths, nothing written
    python -m entropy_gpt.evaluation.benchmarks.entropy_attention --redraw  table and figure anew from the record

Everything is measured side by side in one run: the variants take turns, and each turn gives a ratio.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import typer
from matplotlib.figure import Figure
from pydantic.dataclasses import dataclass
from rich.console import Console
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_gpt.evaluation.json_records import RECORD as CONFIG
from entropy_gpt.evaluation.json_records import StoredRecord
from entropy_gpt.evaluation.origin import ROOT, Origin, collect_origin
from entropy_gpt.evaluation.records.conditions import describe_origin
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM, entropy_attention, entropy_penalty

from ._memory import Memory, mebibytes_of, peak_mebibytes
from ._turns import Timing, compare, format_ratio


RECORD = ROOT / "model_cards" / "results" / "entropy_attention.json"
PAGE = ROOT / "docs" / "entropy_attention.md"
PICTURE = ROOT / "docs" / "entropy_attention.png"

STOCK, PUBLIC, OURS = "SDPA without entropy", "all matrices", "entropy attention"
HEADS, HEAD_DIM, BATCH = 12, 64, 8
# Batch, heads, length and head size of smaller models: the quickstart's and the study's first.
SMALLER = ((8, 4, 64, 32), (8, 4, 128, 32), (8, 6, 128, 64), (8, 4, 256, 32), (4, 12, 256, 64))
STEP_SIZES = {"n_layer": 4, "n_embd": 768, "n_head": 12, "vocab_size": 8192, "n_positions": 1024}
STEP_BATCH = 4
# At more tokens, what runs takes seconds and varies less: three turns. The matrices take longest, and are left out.
LONG, LONGEST_WITH_MATRICES = 512, {"attention": 1024, "training step": 512}
COMMON = {
    **STEP_SIZES,
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None},
}
COEFFICIENT = 1e-5

console = Console()


@dataclass(config=CONFIG)
class Record(StoredRecord, Origin):
    """All that was measured, and where."""

    KIND: ClassVar[str] = "the benchmark of entropy attention"
    SCHEMA_VERSION: ClassVar[int] = 1

    times: list[Timing]
    memory: list[Memory]


def attend_stock(query, key, value):
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True), None


def attend_public(query, key, value):
    """The method of the public code of arXiv 2501.03489: the matrix of probabilities is kept, and p log p is taken."""
    length = query.shape[2]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(later, torch.finfo(query.dtype).min)
    probabilities = scores.softmax(dim=-1)
    return probabilities @ value, matrix_entropies(probabilities)


def attend_ours(query, key, value):
    return entropy_attention(query, key, value, is_causal=True)


def matrix_entropies(probabilities: torch.Tensor) -> torch.Tensor:
    return -(probabilities * (probabilities + 1e-9).log()).sum(dim=-1)


ATTENTIONS = {STOCK: attend_stock, PUBLIC: attend_public, OURS: attend_ours}


def attention_pass(
    name: str, length: int, batch_size: int = BATCH, heads: int = HEADS, head_dim: int = HEAD_DIM
) -> Callable[[], None]:
    """Forward and backward pass of one attention, with upstream gradients for output and entropies."""
    # Laid out as in the model: queries, keys and values are parts of one matrix product's result.
    states = torch.randn(batch_size, length, 3 * heads * head_dim).split(heads * head_dim, dim=-1)
    states = [state.view(batch_size, length, heads, head_dim).transpose(1, 2).requires_grad_() for state in states]
    grad_output = torch.randn(batch_size, length, heads, head_dim).transpose(1, 2)
    grad_entropies = torch.randn(batch_size, heads, length)

    def run():
        output, entropies = ATTENTIONS[name](*states)
        if entropies is None:
            torch.autograd.grad(output, states, grad_output)
        else:
            torch.autograd.grad((output, entropies), states, (grad_output, grad_entropies))

    return run


def training_step(name: str, length: int) -> Callable[[], None]:
    """A whole step with AdamW: stock GPT-2; GPT-2 with the penalty on its matrices; or ours with the penalty."""
    torch.manual_seed(0)
    input_ids = torch.randint(STEP_SIZES["vocab_size"], (STEP_BATCH, length))
    if name == OURS:
        config = EntropyGPTConfig.from_notation("EReg(SM+LN+G)", **COMMON, attn_implementation="sdpa")
        model = EntropyGPTForCausalLM(config)
    else:
        implementation = "sdpa" if name == STOCK else "eager"
        model = GPT2LMHeadModel(GPT2Config(**COMMON, attn_implementation=implementation))
    model.train()
    thresholds = nn.Parameter(torch.full((STEP_SIZES["n_layer"], STEP_SIZES["n_head"]), 0.5))
    optimizer = torch.optim.AdamW([*model.parameters(), thresholds], lr=1e-4)
    visible_keys = torch.arange(1, length + 1)[None]

    def run():
        outputs = model(input_ids, labels=input_ids, use_cache=False, output_attentions=name == PUBLIC)
        loss = outputs.loss
        if name == PUBLIC:
            entropies = torch.stack([matrix_entropies(probabilities) for probabilities in outputs.attentions])
            penalties = entropy_penalty(entropies, thresholds, visible_keys, 0.2, penalty="row_sum")
            loss = loss + COEFFICIENT * penalties.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def diagnostic_forward(name: str, length: int) -> Callable[[], None]:
    """A forward pass for evaluation, without or with the entropies of every row."""
    config = EntropyGPTConfig(**COMMON, attn_implementation="sdpa")
    model = EntropyGPTForCausalLM(config).eval()
    input_ids = torch.randint(STEP_SIZES["vocab_size"], (STEP_BATCH, length))

    @torch.no_grad()
    def run():
        model(input_ids, use_cache=False, output_entropies=name == OURS)

    return run


def measure(kind: str, build: Callable, length: int, names: tuple[str, ...], runs: int) -> Timing:
    """Compares ours with others at a length."""
    if length > LONGEST_WITH_MATRICES.get(kind, length):
        names = tuple(name for name in names if name != PUBLIC)
    runs = runs if length <= LONG else min(runs, 3)
    timing = compare(kind, length, {name: build(name, length) for name in names}, OURS, runs)
    console.print(str(timing))
    return timing


def measure_memory(name: str, length: int) -> Memory:
    """Peak resident memory that forward and backward take in addition to the inputs, in a fresh process."""
    mebibytes = mebibytes_of("entropy_attention", "--memory-of", name, "--length", str(length))
    console.print(f"memory, T={length}: {mebibytes:.0f} MiB for {name}")
    return Memory(name, length, mebibytes)


def print_memory(name: str, length: int):
    attention_pass(name, length=256, batch_size=1)()  # what is loaded and allocated once for all
    run = attention_pass(name, length)
    print(peak_mebibytes(run))


def draw(record: Record, path: Path):
    """Time and memory against length, both axes logarithmic."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    attention = [entry for entry in record.times if entry.kind == "attention"]
    for name in ATTENTIONS:
        points = [(entry.length, entry.milliseconds[name]) for entry in attention if name in entry.milliseconds]
        time_axes.plot(*zip(*points, strict=True), marker="o", label=name)
        points = [(entry.length, entry.mebibytes) for entry in record.memory if entry.name == name]
        memory_axes.plot(*zip(*points, strict=True), marker="o", label=name)
    for axes, label in ((time_axes, "milliseconds, forward and backward"), (memory_axes, "peak memory, MiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({line for plotted in axes.get_lines() for line in plotted.get_xdata()})
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(xlabel="length T", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"One attention, batch {BATCH}, {HEADS} heads of {HEAD_DIM}, float32")
    figure.savefig(path, format="png")


def page(record: Record) -> str:
    """The page of the documentation that shows the record."""
    rows = []
    for entry in record.times:
        cells = [entry.kind, str(entry.length), f"{entry.milliseconds[OURS]:.1f}"]
        for name in (STOCK, PUBLIC):
            cells.append(format_ratio(entry.ratios[name]) if name in entry.ratios else "")
        rows.append(f"| {' | '.join(cells)} |")
    memory = {(entry.name, entry.length): entry.mebibytes for entry in record.memory}
    lengths = sorted({length for _, length in memory})
    memory_rows = [
        f"| {name} | {' | '.join(f'{memory[name, t]:.0f}' if (name, t) in memory else '' for t in lengths)} |"
        for name in ATTENTIONS
    ]
    table, memory_table = "\n".join(rows), "\n".join(memory_rows)
    return f"""# What entropies cost

Generated by `python -m entropy_gpt.evaluation.benchmarks.entropy_attention`; the figures are in
`{RECORD.relative_to(ROOT).as_posix()}`.

| name | what it is |
| --- | --- |
| {STOCK} | torch's `scaled_dot_product_attention`; in a training step, GPT-2 of transformers under sdpa |
| {PUBLIC} | the public code of arXiv 2501.03489: eager attention keeps all probabilities p, and p log p follows |
| {OURS} | this project's |

A ratio below 1 means that ours is faster.

![Time and memory against length]({PICTURE.name})

| what runs | T | {OURS} (ms) | ratio to {STOCK} | ratio to {PUBLIC} |
| --- | ---: | ---: | ---: | ---: |
{table}

Times are medians of runs that take turns, with quartiles in brackets.

- **Attention**: forward and backward, batch {BATCH}, {HEADS} heads of {HEAD_DIM}, float32.
- **Training step**: SM+LN+G with the entropy penalty, compared with stock GPT-2 without; AdamW included. Width
  {STEP_SIZES["n_embd"]}, {STEP_SIZES["n_layer"]} layers, {STEP_SIZES["n_head"]} heads, vocabulary
  {STEP_SIZES["vocab_size"]}, batch {STEP_BATCH}.
- **Diagnostics**: a forward pass of that model with entropies, compared with one without.

| peak memory without the inputs (MiB), T = | {" | ".join(map(str, lengths))} |
| --- | {" | ".join(["---:"] * len(lengths))} |
{memory_table}

Resident set, each in a fresh process; batch {BATCH}, {HEADS} heads of {HEAD_DIM}.

Measured with {describe_origin(record)}.
"""


def main(
    quick: Annotated[bool, typer.Option(help="Short lengths and few runs; writes nothing.")] = False,
    runs: Annotated[int, typer.Option(min=3, help="Turns of each comparison up to length 512; at more, 3.")] = 9,
    redraw: Annotated[bool, typer.Option(help="Measure nothing; table and figure anew from the record.")] = False,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
    length: Annotated[int, typer.Option(hidden=True)] = 0,
):
    """Measure what entropies cost compared with torch's own attention, in seconds and in memory."""
    if memory_of:
        print_memory(memory_of, length)
        return
    if redraw:
        publish(Record.load(RECORD))
        return
    origin = collect_origin(torch.device("cpu"))
    everything, pair = tuple(ATTENTIONS), (STOCK, OURS)
    runs = 3 if quick else runs
    lengths = (128, 256, 512) if quick else (128, 256, 512, 1024, 2048)
    times = [measure("attention", attention_pass, length, everything, runs) for length in lengths]
    for batch, heads, length, head_dim in SMALLER:
        build = partial(attention_pass, batch_size=batch, heads=heads, head_dim=head_dim)
        kind = f"attention, batch {batch}, {heads} heads of {head_dim}"
        times.append(measure(kind, build, length, everything, runs if quick else 5 * runs))
    times += [
        measure("training step", training_step, length, everything, 3) for length in ((128,) if quick else (512, 1024))
    ]
    times += [
        measure("diagnostics", diagnostic_forward, length, pair, 3) for length in ((128,) if quick else (512, 1024))
    ]
    lengths = (512,) if quick else (1024, 4096)
    memory = [measure_memory(name, length) for name in pair for length in lengths]
    memory.append(measure_memory(PUBLIC, lengths[0]))
    if quick:
        return
    record = Record(times, memory, **origin)
    record.save(RECORD)
    publish(record)
    console.print(f"written: {RECORD}, {PAGE}, {PICTURE}")


def publish(record: Record):
    """Writes the page and the figure of a record."""
    draw(record, PICTURE)
    PAGE.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
