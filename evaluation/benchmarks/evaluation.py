"""
What evaluating takes: perplexity compared with lm-eval's, head diagnostics with a plain forward pass, memory.

python -m entropy_gpt.evaluation.benchmarks.evaluation  measures all (some minutes), and writes record and page
python -m entropy_gpt.evaluation.benchmarks.evaluation --quick  a minute: small models, few runs, nothing written
python -m entropy_gpt.evaluation.benchmarks.evaluation --redraw  the page anew from the record
"""

import itertools
from collections.abc import Callable
from typing import Annotated, ClassVar

import numpy as np
import torch
import typer
from datasets import Dataset, disable_progress_bars
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from pydantic.dataclasses import dataclass
from rich.console import Console
from transformers.utils import logging

from entropy_gpt.evaluation.json_records import RECORD as CONFIG
from entropy_gpt.evaluation.json_records import StoredRecord
from entropy_gpt.evaluation.measuring.entropy_diagnostics import diagnose_heads
from entropy_gpt.evaluation.measuring.perplexity import Windows, measure_likelihood
from entropy_gpt.evaluation.measuring.tokenized_text import tokenize
from entropy_gpt.evaluation.origin import ROOT, Origin, collect_origin, recorded_versions
from entropy_gpt.evaluation.records.conditions import describe_origin
from entropy_gpt.training.corpus import load_standard_library
from entropy_gpt.training.tokenizer import train_tokenizer
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from ._memory import mebibytes_of, peak_mebibytes
from ._turns import Timing, compare, format_ratio


RECORD = ROOT / "model_cards" / "results" / "evaluation.json"
PAGE = ROOT / "docs" / "evaluation.md"

OURS, THEIRS, ONE_BY_ONE = "ours", "lm-eval, as many windows at once", "lm-eval, one window at once"
DIAGNOSTICS, PLAIN = "head diagnostics", "a plain forward pass"
GPT2_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 2048}
QUICK = {**GPT2_SMALL, "n_layer": 2}
BATCH_TOKENS = 2048
PERPLEXITY_LENGTHS, HEAD_LENGTHS = (128, 512, 1024), (128, 256, 512, 1024, 2048)
MEMORY_LENGTHS = (256, 512, 1024, 2048)
NOTATION = "SM+LN+G"
# As far as two ways of summing may be apart.
TOLERANCE = 1e-5

console = Console()


@dataclass(config=CONFIG)
class Record(StoredRecord, Origin):
    """
    All that was measured, and where.

    Args:
        perplexity (`list[Timing]`): Both read the same text in the same windows.
        largest_difference (`float`): How far the two log-likelihoods differ, as a part of them.
        heads (`list[Timing]`): Both read the same batch.
        memory (`dict[int, float]`): Peak memory in MiB of the diagnostics of a sequence without the model, by length.
    """

    KIND: ClassVar[str] = "the benchmark of evaluation"
    SCHEMA_VERSION: ClassVar[int] = 1

    perplexity: list[Timing]
    largest_difference: float
    heads: list[Timing]
    memory: dict[int, float]


def make_model(sizes: dict) -> EntropyGPTForCausalLM:
    """GPT-2's architecture, which both sides know, with random weights."""
    torch.manual_seed(0)
    config = EntropyGPTConfig.from_notation(NOTATION, **sizes, attn_implementation="sdpa", eos_token_id=0)
    return EntropyGPTForCausalLM(config).eval()


def measure_perplexity(sizes: dict, length: int, runs: int) -> tuple[Timing, float]:
    """Text to log-likelihood on both sides, and by how much they differ."""
    model = make_model({**sizes, "n_positions": length})
    corpus = load_standard_library()
    tokenizer = train_tokenizer((document.text for document in corpus.validation), 1024)
    tokens = tokenizer("".join(document.text for document in corpus.validation))["input_ids"]
    text = tokenizer.decode(tokens[:BATCH_TOKENS])
    found = {}

    def run_ours():
        windows = Windows(length, length, separate=True, bos=True)
        documents = tokenize([text], tokenizer, separate=True, bos=True)
        found[OURS] = -measure_likelihood(model, documents, windows, BATCH_TOKENS).nats

    def make_theirs(name: str, batch_size: int) -> Callable[[], None]:
        judge = HFLM(model, tokenizer=tokenizer, batch_size=batch_size, max_length=length)
        request = Instance("loglikelihood_rolling", {}, (text,), 0)

        def run():
            (found[name],) = judge.loglikelihood_rolling([request], disable_tqdm=True)

        return run

    variants = {
        THEIRS: make_theirs(THEIRS, BATCH_TOKENS // length),
        ONE_BY_ONE: make_theirs(ONE_BY_ONE, 1),
        OURS: run_ours,
    }
    timing = compare("perplexity", length, variants, OURS, runs)
    difference = max(abs(found[OURS] / found[name] - 1) for name in (THEIRS, ONE_BY_ONE))
    if difference > TOLERANCE:
        raise AssertionError(f"The log-likelihoods differ: {found}.")
    console.print(f"{timing}; log-likelihoods differ by {difference:.1e} of them")
    return timing, difference


def measure_heads(sizes: dict, length: int, runs: int) -> Timing:
    """The diagnostics of a batch of random tokens, compared with the forward pass that a loss takes."""
    model, blocks = make_model(sizes), make_blocks(sizes, length, BATCH_TOKENS // length)
    input_ids = torch.tensor(blocks["input_ids"])

    @torch.no_grad()
    def forward():
        model(input_ids, use_cache=False)

    variants = {PLAIN: forward, DIAGNOSTICS: lambda: diagnose_heads(model, blocks, len(blocks))}
    timing = compare("heads", length, variants, DIAGNOSTICS, runs)
    console.print(str(timing))
    return timing


def make_blocks(sizes: dict, length: int, count: int) -> Dataset:
    tokens = np.random.default_rng(0).integers(0, sizes["vocab_size"], (count, length))
    return Dataset.from_dict({"input_ids": tokens})


def measure_memory(length: int) -> float:
    """Peak resident memory in MiB of the diagnostics of one sequence without the model, in a fresh process."""
    mebibytes = mebibytes_of("evaluation", "--memory-of", str(length))
    console.print(f"memory, T={length}: {mebibytes:.0f} MiB")
    return mebibytes


def print_memory(length: int):
    model = make_model(QUICK)
    diagnose_heads(model, make_blocks(QUICK, 64, 1), 1)  # what is loaded and allocated once for all
    blocks = make_blocks(QUICK, length, 1)
    print(peak_mebibytes(lambda: diagnose_heads(model, blocks, 1)))


def page(record: Record) -> str:
    """The page of the documentation that shows the record."""
    perplexity_rows = [timing_row(timing, OURS, (THEIRS, ONE_BY_ONE)) for timing in record.perplexity]
    head_rows = [timing_row(timing, DIAGNOSTICS, (PLAIN,)) for timing in record.heads]
    perplexity_table, head_table = "\n".join(perplexity_rows), "\n".join(head_rows)
    growth = ", ".join(
        f"{record.memory[long] / record.memory[short]:.2f} from {short} to {long}"
        for short, long in itertools.pairwise(record.memory)
    )
    memory = "\n".join(f"| {length} | {mebibytes:.0f} |" for length, mebibytes in record.memory.items())
    return f"""# What evaluating takes

Generated by `python -m entropy_gpt.evaluation.benchmarks.evaluation`; the figures are in
`{RECORD.relative_to(ROOT).as_posix()}`.

A model of GPT-2 small's sizes ({GPT2_SMALL["n_layer"]} layers, width {GPT2_SMALL["n_embd"]}, {GPT2_SMALL["n_head"]}
heads, vocabulary {GPT2_SMALL["vocab_size"]:,}) with random weights, in float32, {BATCH_TOKENS:,} tokens in a forward
pass. Medians of {record.perplexity[0].runs} runs that take turns; in brackets the quartiles of the ratio.

## Perplexity

`measure_likelihood` is compared with `loglikelihood_rolling` of lm-eval on the same text. Their log-likelihoods differ
by at most {record.largest_difference:.0e}, relative. T is the window and the stride.

"As many windows" means the batch size that ours uses. "One window" is lm-eval's default.

| T | {OURS} (ms) | {THEIRS} (ms) | ratio | {ONE_BY_ONE} (ms) | ratio |
| ---: | ---: | ---: | ---: | ---: | ---: |
{perplexity_table}

## Attention heads

`diagnose_heads` measures entropies and their quantiles, sinks, diversity and spectral norms of all heads. It is
compared with a plain forward pass of the same batch, up to the logits, which are not kept.

| T | {DIAGNOSTICS} (ms) | {PLAIN} (ms) | ratio |
| ---: | ---: | ---: | ---: |
{head_table}

Peak memory of the diagnostics of one sequence, without the model of {QUICK["n_layer"]} layers, each length in a fresh
process. If memory is linear in T, it at most doubles when T does. Here it grows by {growth}.

| T | MiB |
| ---: | ---: |
{memory}

Measured with {describe_origin(record)}.
"""


def timing_row(timing: Timing, ours: str, others: tuple[str, ...]) -> str:
    cells = [str(timing.length), f"{timing.milliseconds[ours]:.0f}"]
    for other in others:
        cells += [f"{timing.milliseconds[other]:.0f}", format_ratio(timing.ratios[other])]
    return f"| {' | '.join(cells)} |"


def main(
    quick: Annotated[bool, typer.Option(help="Small models and few runs; writes nothing.")] = False,
    runs: Annotated[int, typer.Option(min=3, help="Turns of each comparison.")] = 5,
    redraw: Annotated[bool, typer.Option(help="Measure nothing; the page anew from the record.")] = False,
    memory_of: Annotated[int | None, typer.Option(hidden=True)] = None,
):
    """Measure what evaluating takes: perplexity, head diagnostics, memory."""
    if memory_of:
        print_memory(memory_of)
        return
    if redraw:
        PAGE.write_text(page(Record.load(RECORD)), encoding="utf-8")
        return
    disable_progress_bars()
    logging.set_verbosity_error()
    origin = collect_origin(torch.device("cpu"), recorded_versions("lm_eval"))
    runs, sizes = 3 if quick else runs, QUICK if quick else GPT2_SMALL
    perplexities = [measure_perplexity(sizes, length, runs) for length in PERPLEXITY_LENGTHS]
    record = Record(
        perplexity=[timing for timing, _ in perplexities],
        largest_difference=max(difference for _, difference in perplexities),
        heads=[measure_heads(sizes, length, runs) for length in HEAD_LENGTHS],
        memory={length: measure_memory(length) for length in MEMORY_LENGTHS},
        **origin,
    )
    if quick:
        return
    record.save(RECORD)
    PAGE.write_text(page(record), encoding="utf-8")
    console.print(f"written: {RECORD}, {PAGE}")


if __name__ == "__main__":
    typer.run(main)
