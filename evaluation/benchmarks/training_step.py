"""
What a training step takes compared with stock GPT-2's, what watching the entropies adds, how fast text comes in.

python -m entropy_gpt.evaluation.benchmarks.training_step  measures all (some minutes), and writes record and page
python -m entropy_gpt.evaluation.benchmarks.training_step --quick  a minute: small models, few runs, nothing written
python -m entropy_gpt.evaluation.benchmarks.training_step --redraw  the page anew from the record
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
import typer
from datasets import disable_progress_bars
from pydantic.dataclasses import dataclass
from rich.console import Console
from torch.utils.data import DataLoader, RandomSampler
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_gpt.evaluation.json_records import RECORD as CONFIG
from entropy_gpt.evaluation.json_records import StoredRecord
from entropy_gpt.evaluation.origin import ROOT, Origin, collect_origin
from entropy_gpt.evaluation.records.conditions import describe_origin
from entropy_gpt.training.arguments import DataArguments
from entropy_gpt.training.entropy_callback import measure_heads
from entropy_gpt.training.packing import collate_blocks
from entropy_gpt.training.preparation import prepare_data
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from ._turns import Timing, compare, format_ratio, take_turns


RECORD = ROOT / "model_cards" / "results" / "training_step.json"
PAGE = ROOT / "docs" / "training_step.md"

STOCK = "stock GPT-2"
PROPOSAL, REGULARIZED = "EReg(SM(t)+ScFuFFN)", "EReg(SM+LN+G)"
GPT2_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 512}
# The model of the recipe python-stdlib-small, and its batch.
SMALL = {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1024, "n_positions": 128}
SMALL_BATCH, EVERY = 8, 25
STEPS, WATCHING = f"{EVERY} steps", "a measurement of all heads"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LENGTHS = {128: 8, 512: 2}  # and sequences of a step

console = Console()


@dataclass(config=CONFIG)
class Pipeline:
    """
    How fast text comes in, and how fast it is trained on, in tokens a second.

    Args:
        tokens (`int`): Tokens of the text.
        prepared (`float`): From files to packed blocks on disk, the tokenizer's training not counted.
        batched (`float`): From there to shuffled batches.
        streamed (`float`): From files to shuffled batches, nothing kept.
        trained_small (`float`): By the model of the recipe python-stdlib-small.
        trained_gpt2_small (`float`): By a GPT-2 small of the proposed architecture.
    """

    tokens: int
    prepared: float
    batched: float
    streamed: float
    trained_small: float
    trained_gpt2_small: float


@dataclass(config=CONFIG)
class Record(StoredRecord, Origin):
    """All that was measured, and where."""

    KIND: ClassVar[str] = "the benchmark of training steps"
    SCHEMA_VERSION: ClassVar[int] = 1

    steps: list[Timing]
    watching: Timing
    pipeline: Pipeline


def training_step(name: str, sizes: dict, batch: int, length: int) -> Callable[[], None]:
    """A whole step, forward, backward and AdamW, on random tokens, attention by torch's own kernel."""
    torch.manual_seed(0)
    options = {**sizes, **NO_DROPOUT, "bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa"}
    if name == STOCK:
        model = GPT2LMHeadModel(GPT2Config(**options))
    else:
        model = EntropyGPTForCausalLM(EntropyGPTConfig.from_notation(name, **options))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    input_ids = torch.randint(sizes["vocab_size"], (batch, length))

    def run():
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure_steps(sizes: dict, length: int, batch: int, runs: int) -> Timing:
    """The proposal, and GPT-2 with the penalty, compared with stock GPT-2."""
    variants = {name: training_step(name, sizes, batch, length) for name in (STOCK, REGULARIZED, PROPOSAL)}
    timing = compare("training step", length, variants, PROPOSAL, runs)
    console.print(str(timing))
    return timing


def measure_watching(runs: int) -> Timing:
    """One measurement of all heads compared with the steps of the recipe python-stdlib-small between two of them."""
    length = SMALL["n_positions"]
    step = training_step(PROPOSAL, SMALL, SMALL_BATCH, length)
    model = EntropyGPTForCausalLM(EntropyGPTConfig.from_notation(PROPOSAL, **SMALL, eos_token_id=None))
    probe = torch.randint(SMALL["vocab_size"], (SMALL_BATCH, length))

    def train():
        for _ in range(EVERY):
            step()

    variants = {STEPS: train, WATCHING: lambda: measure_heads(model, probe)}
    timing = compare("watching", length, variants, WATCHING, runs)
    console.print(str(timing))
    return timing


def measure_pipeline(runs: int, gpt2_step: Timing) -> Pipeline:
    """Text of the standard library, from files to batches, and steps that take it."""
    context = SMALL["n_positions"]
    with tempfile.TemporaryDirectory() as folder:
        first = prepare_data(DataArguments(tokenizer_vocab_size=SMALL["vocab_size"], data_cache=folder), context, 0)
        first.tokenizer.save_pretrained(f"{folder}/tokenizer")
        tokens = first.training_tokens + first.validation_tokens
        prepared, batched, streamed = [], [], []
        for turn in range(runs):
            arguments = DataArguments(tokenizer=f"{folder}/tokenizer", data_cache=f"{folder}/{turn}")
            started = time.perf_counter()
            data = prepare_data(arguments, context, seed=turn)
            prepared.append(tokens / (time.perf_counter() - started))
            batched.append(tokens_per_second(data.training, tokens, sampler=RandomSampler(data.training)))
            arguments = dataclasses.replace(arguments, data_cache=None, streaming=True, validation_tokens=context)
            started = time.perf_counter()
            stream = prepare_data(arguments, context, seed=turn).training
            opened = time.perf_counter() - started
            streamed.append(tokens / (opened + tokens / tokens_per_second(stream, tokens)))
    step = training_step(PROPOSAL, SMALL, SMALL_BATCH, context)
    (seconds,) = take_turns({PROPOSAL: step}, 20 * runs).values()
    pipeline = Pipeline(
        tokens=tokens,
        prepared=statistics.median(prepared),
        batched=statistics.median(batched),
        streamed=statistics.median(streamed),
        trained_small=SMALL_BATCH * context / statistics.median(seconds),
        trained_gpt2_small=LENGTHS[128] * 128 / gpt2_step.milliseconds[PROPOSAL] * 1000,
    )
    console.print(str(pipeline))
    return pipeline


def tokens_per_second(blocks, most: int, **options) -> float:
    """How fast batches of blocks come in, up to a number of tokens."""
    seen, started = 0, time.perf_counter()
    for batch in DataLoader(blocks, SMALL_BATCH, collate_fn=collate_blocks, **options):
        seen += batch["input_ids"].numel()
        if seen >= most:
            break
    return seen / (time.perf_counter() - started)


def page(record: Record) -> str:
    """The page of the documentation that shows the record."""
    rows = []
    for entry in record.steps:
        regularized = entry.milliseconds[REGULARIZED] / entry.milliseconds[STOCK]
        cells = [str(entry.length), *(f"{entry.milliseconds[name]:.0f}" for name in (STOCK, REGULARIZED, PROPOSAL))]
        rows.append(f"| {' | '.join([*cells, f'{regularized:.2f}', format_ratio(entry.ratios[STOCK])])} |")
    pipeline = record.pipeline
    speeds = {
        "from files to packed blocks on disk": pipeline.prepared,
        "from packed blocks to shuffled batches": pipeline.batched,
        "from files to shuffled batches, streamed": pipeline.streamed,
    }
    trained = (pipeline.trained_small, pipeline.trained_gpt2_small)
    speed_rows = [
        f"| {name} | {speed:,.0f} | {' | '.join(f'{speed / taken:,.0f}' for taken in trained)} |"
        for name, speed in speeds.items()
    ]
    table, speed_table = "\n".join(rows), "\n".join(speed_rows)
    return f"""# What a training step takes

Generated by `python -m entropy_gpt.evaluation.benchmarks.training_step`; the figures are in
`{RECORD.relative_to(ROOT).as_posix()}`.

A step is a forward and a backward pass and AdamW, in float32. Attention is torch's own kernel or, with the penalty,
[entropy attention](entropy_attention.md). Sizes are those of GPT-2 small: {GPT2_SMALL["n_layer"]} layers, width
{GPT2_SMALL["n_embd"]}, {GPT2_SMALL["n_head"]} heads, vocabulary {GPT2_SMALL["vocab_size"]:,}. A batch has
{" and ".join(f"{batch} sequences at T={length}" for length, batch in LENGTHS.items())}.

| T | {STOCK} (ms) | {REGULARIZED} (ms) | {PROPOSAL} (ms) | {REGULARIZED} to {STOCK} | {PROPOSAL} to {STOCK} |
| ---: | ---: | ---: | ---: | ---: | ---: |
{table}

Times are medians of {record.steps[0].runs} runs that take turns; quartiles of the ratio are in brackets. "{STOCK}" is
`GPT2LMHeadModel` of transformers under sdpa. The proposal has fewer operations: no FFN of two layers, and no norm in
its blocks.

The recipe `python-stdlib-small` measures all heads every {EVERY} steps, on {SMALL_BATCH} sequences. That takes
{format_share(record.watching.ratios[STEPS])} of the time of these steps.

| how text comes in | tokens a second | to the small model's speed | to GPT-2 small's speed |
| --- | ---: | ---: | ---: |
{speed_table}

The text is the standard library's source, {pipeline.tokens:,} tokens. The small model, of the recipe
`python-stdlib-small`, trains on {pipeline.trained_small:,.0f} tokens a second. A GPT-2 small of the proposed
architecture trains on {pipeline.trained_gpt2_small:,.0f}. All are medians.

Measured with {describe_origin(record.versions, record.git_revision, record.machine)}.
"""


def format_share(quartiles: list[float]) -> str:
    """The median in percent, and the quartiles around it in brackets."""
    low, middle, high = quartiles
    return f"{middle:.1%} ({low:.1%} to {high:.1%})"


def main(
    quick: Annotated[bool, typer.Option(help="Small models and few runs; writes nothing.")] = False,
    runs: Annotated[int, typer.Option(min=3, help="Turns of each comparison.")] = 7,
    redraw: Annotated[bool, typer.Option(help="Measure nothing; the page anew from the record.")] = False,
):
    """Measure what a training step takes, what watching it adds, and how fast text comes in."""
    if redraw:
        PAGE.write_text(page(Record.load(RECORD)), encoding="utf-8")
        return
    disable_progress_bars()
    origin = collect_origin(torch.device("cpu"))
    runs = 3 if quick else runs
    sizes = {**GPT2_SMALL, "n_layer": 2, "vocab_size": 8192} if quick else GPT2_SMALL
    steps = [measure_steps(sizes, length, batch, runs) for length, batch in LENGTHS.items()]
    watching = measure_watching(runs)
    record = Record(
        steps=steps,
        watching=watching,
        pipeline=measure_pipeline(runs, steps[0]),
        **origin,
    )
    if quick:
        return
    record.save(RECORD)
    PAGE.write_text(page(record), encoding="utf-8")
    console.print(f"written: {RECORD}, {PAGE}")


if __name__ == "__main__":
    typer.run(main)
