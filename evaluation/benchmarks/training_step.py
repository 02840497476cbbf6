"""
What a training step takes compared with stock GPT-2's, what watching the entropies adds, how fast text comes in.

python -m entropy_gpt.evaluation.benchmarks.training_step  measures all (three minutes), and writes record and page
python -m entropy_gpt.evaluation.benchmarks.training_step --quick  a minute: small models, few runs, nothing written
python -m entropy_gpt.evaluation.benchmarks.training_step --redraw  the page anew from the record
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from operator import truediv
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

from ._nano_gpt import NanoGPT
from ._turns import Timing, compare, format_ratio, take_turns


RECORD = ROOT / "model_cards" / "results" / "training_step.json"
PAGE = ROOT / "docs" / "training_step.md"

STOCK, STOCK_TANH, NANO_GPT = "stock GPT-2", "stock GPT-2, gelu_pytorch_tanh", "nanoGPT's model"
BASELINE, REGULARIZED, PROPOSAL = "SM+LN+G", "EReg(SM+LN+G)", "EReg(SM(t)+ScFuFFN)"
GPT2_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 512}
MEDIUM = {"n_layer": 8, "n_embd": 384, "n_head": 6, "vocab_size": 4096, "n_positions": 128}
# The model of the recipe python-stdlib-small, and its batch.
SMALL = {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1024, "n_positions": 128}
SMALL_BATCH, EVERY = 8, 25
STEPS, WATCHING = f"{EVERY} steps", "a measurement of all heads"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LENGTHS = {128: 8, 512: 2}  # and sequences of a step
EVERYTHING = (STOCK, STOCK_TANH, NANO_GPT, BASELINE, REGULARIZED, PROPOSAL)
LARGE = (STOCK, PROPOSAL)  # seconds a step; the penalty's price at this width is in entropy_attention.py

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
class Steps:
    """
    Training steps of one size, which took turns.

    Args:
        sizes (`dict[str, int]`): Sizes of the models, by their names in a configuration.
        batch (`int`): Sequences of a step.
        length (`int`): Tokens of a sequence.
        runs (`int`): Steps of each model.
        milliseconds (`dict[str, float]`): Median of each model.
        ratios (`dict[str, list[float]]`): Quartiles of each model's time to stock GPT-2's in the same turn.
    """

    sizes: dict[str, int]
    batch: int
    length: int
    runs: int
    milliseconds: dict[str, float]
    ratios: dict[str, list[float]]

    def __str__(self) -> str:
        ratios = ", ".join(f"{name} {format_ratio(quartiles)}" for name, quartiles in self.ratios.items())
        return f"width {self.sizes['n_embd']}, T={self.length}, to {STOCK}: {ratios}"


@dataclass(config=CONFIG)
class Record(StoredRecord, Origin):
    """All that was measured, and where."""

    KIND: ClassVar[str] = "the benchmark of training steps"
    SCHEMA_VERSION: ClassVar[int] = 2

    steps: list[Steps]
    watching: Timing
    pipeline: Pipeline

    @classmethod
    def migrate(cls, content: dict, version: int) -> dict:
        """Version 1 had steps of GPT-2 small alone, and quartiles of the proposal's ratio alone."""
        steps = [
            {
                "sizes": GPT2_SMALL,
                "batch": LENGTHS[step["length"]],
                **{name: step[name] for name in ("length", "runs", "milliseconds")},
                "ratios": {PROPOSAL: step["ratios"][STOCK]},
            }
            for step in content["steps"]
        ]
        return {**content, "steps": steps}


def training_step(name: str, sizes: dict, batch: int, length: int) -> Callable[[], None]:
    """A whole step, forward, backward and AdamW, on random tokens, attention by torch's own kernel."""
    torch.manual_seed(0)
    input_ids = torch.randint(sizes["vocab_size"], (batch, length))
    model = build_model(name, sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run():
        loss = model(input_ids) if name == NANO_GPT else model(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def build_model(name: str, sizes: dict) -> torch.nn.Module:
    """A model of the table, by its name there."""
    if name == NANO_GPT:
        return NanoGPT(**sizes)
    options = {**sizes, **NO_DROPOUT, "bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa"}
    if name == STOCK_TANH:
        options["activation_function"] = "gelu_pytorch_tanh"
    if name in (STOCK, STOCK_TANH):
        return GPT2LMHeadModel(GPT2Config(**options))
    return EntropyGPTForCausalLM(EntropyGPTConfig.from_notation(name, **options))


def measure_steps(names: tuple[str, ...], sizes: dict, length: int, batch: int, runs: int) -> Steps:
    """Models of one size compared with stock GPT-2, the first of the names."""
    seconds = take_turns({name: training_step(name, sizes, batch, length) for name in names}, runs)
    steps = Steps(
        sizes=sizes,
        batch=batch,
        length=length,
        runs=runs,
        milliseconds={name: statistics.median(values) * 1000 for name, values in seconds.items()},
        ratios={
            name: statistics.quantiles(map(truediv, values, seconds[STOCK]), n=4)
            for name, values in seconds.items()
            if name != STOCK
        },
    )
    console.print(str(steps))
    return steps


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


def measure_pipeline(runs: int, gpt2_step: Steps) -> Pipeline:
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
        trained_gpt2_small=gpt2_step.batch * gpt2_step.length / gpt2_step.milliseconds[PROPOSAL] * 1000,
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
    models = ["n_layer", "n_embd", "n_head", "vocab_size"]
    rows = []
    for entry in record.steps:
        cells = [str(entry.sizes["n_embd"]), f"{entry.batch} x {entry.length}", f"{entry.milliseconds[STOCK]:.0f}"]
        rows.append(f"| {' | '.join(cells + [format_step(entry, name) for name in EVERYTHING[1:]])} |")
    sizes = {tuple(entry.sizes[name] for name in models) for entry in record.steps}
    model_rows = [
        f"| {width} | {layers} | {heads} | {vocabulary:,} |" for layers, width, heads, vocabulary in sorted(sizes)
    ]
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
    table, model_table, speed_table = ("\n".join(lines) for lines in (rows, model_rows, speed_rows))
    return f"""# What a training step takes

Generated by `python -m entropy_gpt.evaluation.benchmarks.training_step`; the figures are in
`{RECORD.relative_to(ROOT).as_posix()}`.

A step is a forward and a backward pass and AdamW, in float32. The time of {STOCK} is in milliseconds, that of others a
part of it.

| width | batch x T | {STOCK} (ms) | {" | ".join(EVERYTHING[1:])} |
| ---: | ---: | ---: | {" | ".join(["---:"] * len(EVERYTHING[1:]))} |
{table}

| width | layers | heads | vocabulary |
| ---: | ---: | ---: | ---: |
{model_table}

Ratios are medians of turns ({", ".join(sorted({str(step.runs) for step in record.steps}))}), with quartiles in
brackets. Attention is torch's own kernel or, with the penalty (EReg), [entropy attention](entropy_attention.md). The
proposal, {PROPOSAL}, has no FFN of two layers and no norm in its blocks.

- {STOCK}: `GPT2LMHeadModel` of transformers under sdpa. Its GELU, `gelu_new`, runs as eight operations. With
  `gelu_pytorch_tanh` the same function is one operation, as here.
- {NANO_GPT}: GPT-2 as in nanoGPT.

The recipe `python-stdlib-small` measures all heads every {EVERY} steps, on {SMALL_BATCH} sequences. That takes
{format_share(record.watching.ratios[STEPS])} of the time of these steps.

| how text comes in | tokens a second | to the small model's speed | to GPT-2 small's speed |
| --- | ---: | ---: | ---: |
{speed_table}

The text is the standard library's source, {pipeline.tokens:,} tokens. The small model, of the recipe
`python-stdlib-small`, trains on {pipeline.trained_small:,.0f} tokens a second. A GPT-2 small of the proposed
architecture trains on {pipeline.trained_gpt2_small:,.0f}. All are medians.

Measured with {describe_origin(record)}.
"""


def format_step(steps: Steps, name: str) -> str:
    """A model's time as a part of stock GPT-2's, with quartiles if there are any; empty if it was not measured."""
    if name in steps.ratios:
        return format_ratio(steps.ratios[name])
    return f"{steps.milliseconds[name] / steps.milliseconds[STOCK]:.2f}" if name in steps.milliseconds else ""


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
    large = {**GPT2_SMALL, "n_layer": 2, "vocab_size": 8192} if quick else GPT2_SMALL
    steps = [
        measure_steps(EVERYTHING, SMALL, 128, SMALL_BATCH, runs if quick else 9 * runs),
        measure_steps(EVERYTHING, MEDIUM, 128, SMALL_BATCH, runs if quick else 2 * runs),
        *(measure_steps(LARGE, large, length, batch, 3) for length, batch in LENGTHS.items()),
    ]
    watching = measure_watching(runs)
    record = Record(
        steps=steps,
        watching=watching,
        pipeline=measure_pipeline(3, steps[2]),
        **origin,
    )
    if quick:
        return
    record.save(RECORD)
    PAGE.write_text(page(record), encoding="utf-8")
    console.print(f"written: {RECORD}, {PAGE}")


if __name__ == "__main__":
    typer.run(main)
