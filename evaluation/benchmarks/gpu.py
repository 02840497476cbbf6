"""What entropies and training cost on a GPU, compared with torch's own attention and stock GPT-2.

    python -m entropy_gpt.evaluation.benchmarks.gpu  measures all (minutes), and writes record and page
    python -m entropy_gpt.evaluation.benchmarks.gpu --redraw  the page anew from the record, or without one

Variants take turns, as in the other benchmarks. `make gpu` runs this after the tests that need a GPU.
"""

import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
import typer
from pydantic.dataclasses import dataclass
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_gpt.evaluation.json_records import RECORD as CONFIG
from entropy_gpt.evaluation.json_records import StoredRecord
from entropy_gpt.evaluation.origin import ROOT, Origin, collect_origin, recorded_versions
from entropy_gpt.evaluation.records.conditions import describe_origin
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM, entropy_attention

from ._memory import Memory
from ._turns import Timing, compare, format_ratio
from .entropy_attention import matrix_entropies


RECORD = ROOT / "model_cards" / "results" / "gpu.json"
PAGE = ROOT / "docs" / "performance.md"

OURS, FLASH, FLEX, PUBLIC = "entropy attention", "flash SDPA", "FlexAttention", "all matrices"
STOCK, REGULARIZED, PROPOSAL = "stock GPT-2", "EReg(SM+LN+G)", "EReg(SM(t)+ScFuFFN)"
STEP, COMPILED_STEP, GENERATION = "training step", "training step, compiled", "generation"
MEBIBYTE = 2**20
# Multiplications and additions of attention: two products forward and five backward, half of each under a causal mask.
PRODUCTS = 7

console = Console()


@dataclass(frozen=True)
class Sizes:
    """
    What is measured.

    Args:
        lengths (`tuple[int, ...]`): Lengths of attention alone.
        tokens (`int`): In a batch of attention alone, and of a training step.
        heads, head_dim (`int`): Sizes of attention alone.
        model (`dict[str, int]`): Fields of the models' configurations.
        new_tokens (`int`): That each of `sequences` is continued by, from prompts of as many tokens.
        sequences (`int`): Sequences of a generation.
        attentions (`tuple[str, ...]`): What our attention is compared with.
        compiles (`bool`): Whether models are also compiled.
        milliseconds (`float`): Time of a turn, in which short computations are repeated.
    """

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    tokens: int = 16_384
    heads: int = 12
    head_dim: int = 64
    model: dict[str, int] = dataclasses.field(
        default_factory=lambda: {
            "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024
        }
    )  # fmt: skip
    new_tokens: int = 128
    sequences: int = 8
    attentions: tuple[str, ...] = (FLASH, FLEX, PUBLIC)
    compiles: bool = True
    milliseconds: float = 20.0


@dataclass(config=CONFIG)
class Record(StoredRecord, Origin):
    """All that was measured, and where."""

    KIND: ClassVar[str] = "the benchmark on a GPU"
    SCHEMA_VERSION: ClassVar[int] = 1

    sizes: Sizes
    attention: list[Timing]
    memory: list[Memory]
    models: list[Timing]


def attend_flash(query, key, value):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return (nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True),)


def flex_attention_of(length: int, device: torch.device) -> Callable:
    mask = create_block_mask(lambda batch, head, query, key: query >= key, None, None, length, length, device)
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: (attend(query, key, value, block_mask=mask),)


def attend_public(query, key, value):
    """The method of the public code of arXiv 2501.03489."""
    later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(later, torch.finfo(query.dtype).min)
    probabilities = scores.softmax(dim=-1)
    return probabilities @ value, matrix_entropies(probabilities)


def attention_pass(name: str, length: int, sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """Forward and backward pass in bfloat16, with upstream gradients of all results."""
    batch, width = max(1, sizes.tokens // length), sizes.heads * sizes.head_dim
    states = torch.randn(batch, length, 3 * width, device=device, dtype=torch.bfloat16).split(width, dim=-1)
    states = [
        state.view(batch, length, sizes.heads, sizes.head_dim).transpose(1, 2).requires_grad_() for state in states
    ]
    attend = {
        OURS: lambda *states: entropy_attention(*states, is_causal=True),
        FLASH: attend_flash,
        PUBLIC: attend_public,
    }.get(name) or flex_attention_of(length, device)
    upstream = [torch.randn_like(result) for result in attend(*states)]
    return lambda: torch.autograd.grad(attend(*states), states, upstream)


def make_model(name: str, sizes: Sizes, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    options = {**sizes.model, "bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa"}
    options |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with device:
        if name == STOCK:
            return GPT2LMHeadModel(GPT2Config(**options))
        return EntropyGPTForCausalLM(EntropyGPTConfig.from_notation(name, **options))


def training_step(name: str, sizes: Sizes, device: torch.device, compiled: bool) -> Callable[[], None]:
    """Forward, backward and AdamW on random tokens, under autocast to bfloat16."""
    model, length = make_model(name, sizes, device).train(), sizes.model["n_positions"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    input_ids = torch.randint(sizes.model["vocab_size"], (max(1, sizes.tokens // length), length), device=device)
    forward = torch.compile(model) if compiled else model

    def run():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = forward(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def generation(name: str, sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """New tokens after a prompt, one by one, with a static cache and whatever transformers compiles for it."""
    model = make_model(name, sizes, device).to(torch.bfloat16).eval()
    prompt = torch.randint(sizes.model["vocab_size"], (sizes.sequences, sizes.new_tokens), device=device)
    options = {"max_new_tokens": sizes.new_tokens, "do_sample": False, "cache_implementation": "static"}
    options |= {"pad_token_id": 0, "disable_compile": not sizes.compiles}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def measure(sizes: Sizes, device: torch.device, runs: int) -> Record:
    """Measures everything on a device, and prints each comparison."""
    attention, memory = [], []
    for length in sizes.lengths:
        variants = {}
        for name in (OURS, *sizes.attentions):
            try:
                run = attention_pass(name, length, sizes, device)
                memory.append(Memory(name, length, peak_mebibytes(run, device)))
                variants[name] = run
            except torch.OutOfMemoryError:
                console.print(f"T={length}: not enough memory for {name}")
        attention.append(measure_turns("attention", length, variants, OURS, sizes, device, runs))
    models = []
    length = sizes.model["n_positions"]
    for kind in (STEP, COMPILED_STEP) if sizes.compiles else (STEP,):
        variants = {
            name: training_step(name, sizes, device, kind == COMPILED_STEP) for name in (STOCK, REGULARIZED, PROPOSAL)
        }
        models.append(measure_turns(kind, length, variants, PROPOSAL, sizes, device, runs))
    variants = {name: generation(name, sizes, device) for name in (STOCK, "SM+LN+G", "SM(t)+ScFuFFN")}
    models.append(measure_turns(GENERATION, 2 * sizes.new_tokens, variants, "SM(t)+ScFuFFN", sizes, device, runs))
    return Record(sizes, attention, memory, models, **collect_origin(device, device_versions(device)))


def measure_turns(
    kind: str,
    length: int,
    variants: dict[str, Callable[[], None]],
    ours: str,
    sizes: Sizes,
    device: torch.device,
    runs: int,
) -> Timing:
    """Milliseconds of one computation; a turn repeats it until it takes a while, and waits for the device."""
    repeats = {name: repeats_of(run, sizes.milliseconds, device) for name, run in variants.items()}
    most = max(repeats.values())

    def repeated(run: Callable[[], None]) -> Callable[[], None]:
        def turn():
            for _ in range(most):
                run()
            wait(device)

        return turn

    timing = compare(kind, length, {name: repeated(run) for name, run in variants.items()}, ours, runs)
    timing = dataclasses.replace(
        timing, milliseconds={name: value / most for name, value in timing.milliseconds.items()}
    )
    console.print(str(timing))
    return timing


def repeats_of(run: Callable[[], None], milliseconds: float, device: torch.device) -> int:
    """How often a computation has to run to take a time."""
    (took,) = compare("", 0, {"": lambda: (run(), wait(device))}, "", 3).milliseconds.values()
    return max(1, round(milliseconds / took))


def wait(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mebibytes(run: Callable[[], None], device: torch.device) -> float:
    """The most memory of the device during a run, beyond what there was before; 0 for a CPU."""
    run()
    if device.type != "cuda":
        return 0.0
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    wait(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MEBIBYTE


def device_versions(device: torch.device) -> dict[str, str]:
    """Packages, and the driver of the device."""
    if device.type != "cuda":
        return recorded_versions()
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.check_output(command, text=True).split()[0]
    return {**recorded_versions("triton"), "CUDA": str(torch.version.cuda or torch.version.hip), "driver": driver}


def page(record: Record | None) -> str:
    """The page of the documentation: the record, or that there is none."""
    return f"""# Performance on a GPU

Generated by `python -m entropy_gpt.evaluation.benchmarks.gpu`. `make gpu` runs it, after all tests that need a GPU. It
takes minutes and no network, with the torch and triton that are installed. `entropy-gpt doctor --gpu` says whether
this machine can run it. For CPUs, see [what entropies cost](entropy_attention.md) and
[what a training step takes](training_step.md).

{"This has not yet been run on a GPU, so there are no figures." if record is None else tables(record)}
"""


def tables(record: Record) -> str:
    sizes, memory = record.sizes, {(entry.name, entry.length): entry.mebibytes for entry in record.memory}
    names = (OURS, *sizes.attentions)
    rows = []
    for timing in record.attention:
        batch = max(1, sizes.tokens // timing.length)
        flops = PRODUCTS * batch * sizes.heads * sizes.head_dim * timing.length**2
        cells = [str(timing.length)]
        for name in names:
            taken = timing.milliseconds.get(name)
            cells.append(
                "" if taken is None else f"{taken:.2f} / {flops / taken / 1e9:.0f} / {memory[name, timing.length]:.0f}"
            )
        cells += [format_ratio(timing.ratios[name]) if name in timing.ratios else "" for name in sizes.attentions]
        rows.append(f"| {' | '.join(cells)} |")
    head = ["T", *names, *(f"ratio to {name}" for name in sizes.attentions)]
    model_rows = []
    for timing in record.models:
        length = timing.length
        tokens = sizes.sequences * sizes.new_tokens if timing.kind == GENERATION else sizes.tokens // length * length
        stock = timing.milliseconds[STOCK]
        for name, taken in timing.milliseconds.items():
            model_rows.append(
                f"| {timing.kind} | {name} | {taken:.1f} | {tokens / taken * 1000:,.0f} | {taken / stock:.2f} |"
            )
    model = ", ".join(f"{name} {value}" for name, value in sizes.model.items())
    return f"""## Attention

Forward and backward in bfloat16 under a causal mask: {sizes.heads} heads of {sizes.head_dim}, {sizes.tokens:,} tokens
in a batch. Only "{OURS}" and "{PUBLIC}" also compute entropies; the latter keeps all probabilities, as the public code
of arXiv 2501.03489 does. Cells hold milliseconds / TFLOP/s / peak memory in MiB.

| {" | ".join(head)} |
| {" | ".join(["---:"] * len(head))} |
{chr(10).join(rows)}

Ratios are those of our time, the median with quartiles in brackets.

## Models

Sizes: {model}. A training step has {sizes.tokens:,} tokens, in bfloat16 by autocast, and AdamW; "{STOCK}" runs under
sdpa. A generation continues {sizes.sequences} prompts by {sizes.new_tokens} tokens, with a static cache.

| what runs | model | ms | tokens a second | ratio to {STOCK} |
| --- | --- | ---: | ---: | ---: |
{chr(10).join(model_rows)}

Measured with {describe_origin(record)}."""


def main(
    runs: Annotated[int, typer.Option(min=3, help="Turns of each comparison.")] = 9,
    redraw: Annotated[bool, typer.Option(help="Measure nothing; the page anew from the record.")] = False,
):
    """Measure attention with entropies, training and generation on a GPU."""
    if not redraw:
        if not torch.cuda.is_available():
            console.print("torch sees no GPU: `entropy-gpt doctor --gpu` says more.")
            raise typer.Exit(1)
        measure(Sizes(), torch.device("cuda", torch.cuda.current_device()), runs).save(RECORD)
    PAGE.write_text(page(Record.load(RECORD) if RECORD.exists() else None), encoding="utf-8")
    console.print(f"written: {PAGE}")


if __name__ == "__main__":
    typer.run(main)
