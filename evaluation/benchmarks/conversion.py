"""What a conversion keeps: exact imports, steps compared with naive versions, and healing with training from scratch.

    python -m entropy_gpt.evaluation.benchmarks.conversion  measures all (45 minutes on two cores)
    python -m entropy_gpt.evaluation.benchmarks.conversion --quick  some minutes: one seed, nothing written
    python -m entropy_gpt.evaluation.benchmarks.conversion --redraw  redraws page and figure

It runs the commands that a user would type, in a folder of its own: interrupted, it goes on where it was.
"""

import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import typer
from matplotlib.figure import Figure
from pydantic.dataclasses import dataclass
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from entropy_gpt.conversion.gpt2_checkpoint import load_gpt2, to_gpt2
from entropy_gpt.evaluation.json_records import RECORD as CONFIG
from entropy_gpt.evaluation.json_records import StoredRecord
from entropy_gpt.evaluation.origin import ROOT, git_revision
from entropy_gpt.evaluation.records.conditions import describe_origin, list_settings
from entropy_gpt.evaluation.records.conversion_report import ConversionReport
from entropy_gpt.evaluation.records.results import Conditions, load_results
from entropy_gpt.evaluation.showing.markdown import fold_away, markdown_table


WORK = ROOT / "build" / "conversion_benchmark"
RECORD = ROOT / "model_cards" / "results" / "conversion.json"
PAGE = ROOT / "docs" / "conversion.md"
PICTURE = ROOT / "docs" / "conversion.png"
COMMAND = Path(sys.executable).with_name("entropy-gpt")

TARGET = "EReg(SM(t)+ScFuFFN)"
NORM_FREE = "SM+StaticLN+G"
CONTEXT, EVALUATION_TOKENS = 128, 32768
LARGE_CALIBRATION, LARGE_EVALUATION = 16384, 4096
SEEDS, STEPS = (0, 1, 2), 1500
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
FINE_TUNING_SHARE = 1 / 4
SOURCE, SCRATCH, HEALED, DISTILLED = "the source, SM+LN+G", "from scratch", "converted", "converted, distilled"
FINE_TUNED = "SM+LN+G"
SCHEDULES = {"none": "all norms at once", "gate": "gates on a cosine", "staircase": "staircase"}
ONE_STEP = (  # targets, and what else leads to one step alone
    ("SM+StaticLN+G",),
    ("SM+LN+G", "--final-norm", "static"),
    ("SM+LN",),
    ("SM+LN+R",),
    ("SM+LN+G+FFNi1",),
)
IMPORTED = {
    "2 layers of 64, an untied head": {"n_layer": 2, "n_embd": 64, "n_head": 4, "tie_word_embeddings": False},
    "4 layers of 128": {"n_layer": 4, "n_embd": 128, "n_head": 4},
    "GPT-2 small": {},
}

console = Console()


@dataclass(config=CONFIG)
class Import:
    """A randomly initialised GPT-2, saved by transformers, read, and written back."""

    source: str
    parameters: int
    largest_difference: float
    is_bit_equal: bool


@dataclass(config=CONFIG)
class StepCost:
    """KL to the original (nats) that a step costs, fitted and naive (`None`: not finite)."""

    step: str
    seed: int
    kl: float
    naive_kl: float | None


@dataclass(config=CONFIG)
class Run:
    """A training run: its steps, and the negative log-likelihood of a token of validation text after it."""

    kind: str
    seed: int
    steps: int
    tokens: int
    nats: float


@dataclass(config=CONFIG)
class Record(StoredRecord):
    """All that was measured, and where."""

    KIND: ClassVar[str] = "the benchmark of conversions"
    SCHEMA_VERSION: ClassVar[int] = 2

    imports: list[Import]
    steps: list[StepCost]
    runs: list[Run]
    large_parameters: int
    large_seconds: float
    large_peak_bytes: int
    hyperparameters: dict[str, float]  # of the source, and of training from scratch
    conditions: Conditions

    def nats(self, kind: str, steps: int) -> list[float]:
        """By seed."""
        return [run.nats for run in self.runs if (run.kind, run.steps) == (kind, steps)]

    @property
    def training_steps(self) -> int:
        """Of the source, and of training from scratch."""
        return next(run.steps for run in self.runs if run.kind == SCRATCH)


def measure_import(source: str, sizes: dict) -> Import:
    """Through files, as a user has them."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    input_ids = torch.randint(model.config.vocab_size, (2, CONTEXT))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        converted = load_gpt2(folder)
        difference = (converted(input_ids).logits - model(input_ids).logits).abs().max().item()
        written = to_gpt2(converted).state_dict()
    expected = model.state_dict()
    is_equal = expected.keys() == written.keys() and all(
        torch.equal(expected[name], written[name]) for name in written
    )
    console.print(f"{source}: logits differ by {difference:.1e} at most")
    return Import(source, model.num_parameters(), difference, is_equal)


def entropy_gpt(*words):
    """Runs the command, which shows its own progress."""
    subprocess.run([COMMAND, *map(str, words)], check=True)


def convert(source: Path, target: str, output: Path, seed: int, *words) -> ConversionReport:
    """What a conversion reports, of this run of the benchmark or of an interrupted one at the same commit."""
    path = output / "conversion_report.json"
    if path.exists() and (report := ConversionReport.load(path)).conditions.git_revision == git_revision():
        return report
    sizes = ("--context", CONTEXT, "--evaluation-tokens", EVALUATION_TOKENS, "--seed", seed)
    entropy_gpt("convert", source, "--to", target, "--output", output, *sizes, "--overwrite", *words)
    return ConversionReport.load(path)


def measure_seed(seed: int, steps: int) -> tuple[list[StepCost], list[Run], dict[str, float], Conditions]:
    """Trains a GPT-2 and the target from scratch, and converts the GPT-2 in every way."""
    folder = WORK / f"steps-{steps}-seed-{seed}"
    entropy_gpt("quickstart", "--steps", steps, "--seed", seed, "--output", folder / "quickstart")
    source = folder / "quickstart" / "models" / "sm-ln-g"
    models = {
        SCRATCH: ("ereg-smt-scfuffn", TARGET),
        DISTILLED: ("converted", f"{TARGET} from SM+LN+G"),
    }
    results = {result.title: result for result in load_results(folder / "quickstart" / "results.json")}
    runs = []
    for kind, (name, title) in models.items():
        # A conversion to what it is already measures it on the text that all others are measured on.
        same = convert(folder / "quickstart" / "models" / name, TARGET, folder / f"same-{len(runs)}", seed)
        result = results[title]
        runs.append(Run(kind, seed, result.training.steps, result.training.tokens, same.original_nats))

    costs = []
    for target, *words in ONE_STEP:
        report = convert(source, target, folder / f"one-{len(costs)}", seed, *words)
        costs += [StepCost(step.title, seed, step.kl, step.naive_kl) for step in report.steps]
    runs.append(Run(SOURCE, seed, steps, runs[0].tokens, report.original_nats))

    trained = results[TARGET].training.hyperparameters
    hyperparameters = {name: trained[name] for name in ("learning_rate", "warmup_share")}
    rate = results[f"{TARGET} from SM+LN+G"].training.hyperparameters["learning_rate"]

    def train(kind: str, target: str, share: float, *words):
        heal_steps = max(1, round(share * steps))
        output = folder / f"run-{len(runs)}"
        report = convert(source, target, output, seed, "--heal-steps", heal_steps, "--learning-rate", rate, *words)
        runs.append(Run(kind, seed, heal_steps, report.healing.tokens, report.steps[-1].nats))

    for share in SHARES:
        train(HEALED, TARGET, share)
    train(FINE_TUNED, "SM+LN+G", FINE_TUNING_SHARE)
    for schedule, title in SCHEDULES.items():
        words = ("--schedule", schedule, "--final-norm", "static", "--residual-scale-weight", 0.1)
        train(title, NORM_FREE, FINE_TUNING_SHARE, *words)
    return costs, runs, hyperparameters, report.conditions


def measure_large(tokenizer: Path, source: Path) -> ConversionReport:
    """The conversion of a randomly initialised GPT-2 small, which says nothing about quality."""
    if not (source / "config.json").exists():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(source)
        PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(source)
    output = source.with_name("large-converted")
    path = output / "conversion_report.json"
    if not path.exists() or ConversionReport.load(path).conditions.git_revision != git_revision():
        words = ("--final-norm", "none", "--context", CONTEXT, "--overwrite")
        amounts = ("--calibration-tokens", LARGE_CALIBRATION, "--evaluation-tokens", LARGE_EVALUATION)
        entropy_gpt("convert", source, "--to", TARGET, "--output", output, *words, *amounts)
    return ConversionReport.load(path)


def spread(values: list[float], form: str = ".2f") -> str:
    """Median, with the smallest and the largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def step_table(record: Record) -> str:
    rows = []
    for step in dict.fromkeys(cost.step for cost in record.steps):
        costs = [cost for cost in record.steps if cost.step == step]
        naive = [cost.naive_kl for cost in costs if cost.naive_kl is not None]
        ratios = [cost.naive_kl / cost.kl for cost in costs if cost.naive_kl is not None]
        worse = (spread(naive, ".3f"), spread(ratios, ".1f")) if naive else ("not finite", "")
        rows.append((step, spread([cost.kl for cost in costs], ".4f"), *worse))
    return markdown_table(("step", "KL, fitted", "KL, naive", "naive to fitted"), rows)


def healing_table(record: Record) -> str:
    scratch = record.nats(SCRATCH, record.training_steps)
    rows = []
    for kind in (SCRATCH, SOURCE, HEALED, DISTILLED):
        for steps in sorted({run.steps for run in record.runs if run.kind == kind}):
            nats = record.nats(kind, steps)
            above = [mine - theirs for mine, theirs in zip(nats, scratch, strict=True)]
            better = f"{sum(value <= 0 for value in above)} of {len(above)}"
            compared = ("", "") if kind == SCRATCH else (spread(above, "+.3f"), better)
            share = f"{steps / record.training_steps:.3g}"
            rows.append((kind, f"{steps:,}", share, spread([math.exp(n) for n in nats]), *compared))
    columns = ("trained", "steps", "share of tokens", "perplexity", "nats above from scratch", "seeds not above")
    return markdown_table(columns, rows)


def norm_table(record: Record) -> str:
    steps = next(run.steps for run in record.runs if run.kind == FINE_TUNED)
    reference = record.nats(FINE_TUNED, steps)
    rows = [(FINE_TUNED, "", spread([math.exp(n) for n in reference]), "")]
    for title in SCHEDULES.values():
        nats = record.nats(title, steps)
        above = [mine - theirs for mine, theirs in zip(nats, reference, strict=True)]
        rows.append((NORM_FREE, title, spread([math.exp(n) for n in nats]), spread(above, "+.3f")))
    return markdown_table((f"after {steps:,} steps", "norms removed", "perplexity", "nats above SM+LN+G"), rows)


def page(record: Record) -> str:
    """The page of the documentation that shows the record."""
    imports = markdown_table(
        ("GPT-2, randomly initialised", "parameters", "largest difference of logits", "written back bit for bit"),
        [
            (e.source, f"{e.parameters:,}", f"{e.largest_difference:.1e}", "yes" if e.is_bit_equal else "no")
            for e in record.imports
        ],
    )
    tokens = next(run.tokens for run in record.runs if run.kind == SCRATCH)
    return f"""# What a conversion keeps

Generated by `python -m entropy_gpt.evaluation.benchmarks.conversion`; the figures are in
`{RECORD.relative_to(ROOT).as_posix()}`. Medians over seeds, with the smallest and the largest in brackets.

The source of all conversions is a small GPT-2 (4 layers, width 128), one for each seed. The quickstart trained it for
{record.training_steps:,} steps ({tokens:,} tokens). A model this small and this briefly trained has fewer outliers in
its residual stream than a large one. It also gains more from further training than its conversion costs.

![Perplexity against the share of tokens, and KL of single steps]({PICTURE.name})

## Import

{imports}

## Steps alone

KL to the original in nats, on text that nothing was fitted to. "Naive" copies weights and fits nothing: norms divide
by 1, and maps stay as they are.

{step_table(record)}

## Healing and training from scratch

The target is {TARGET}, with the norm before the head kept.

- **Converted**: all steps, then the training steps of the row, with their own learning rate schedule.
- **Distilled**: half of the cross-entropy is replaced by the KL to the source. That holds the model near a source that
  it would otherwise outgrow.
- **Share of tokens** does not count those that the source was trained on.

{healing_table(record)}

## Norms removed, GELU kept

All norms are static, the final one too. For comparison, the same model is trained further with its LayerNorms, on the
same tokens.

{norm_table(record)}

## Size

Converting a randomly initialised GPT-2 small ({record.large_parameters:,} parameters) took
{record.large_seconds:.0f} s and at most {record.large_peak_bytes / 2**30:.2f} GiB. The target is {TARGET} without any
norm, not healed. Each step was fitted to {LARGE_CALIBRATION:,} tokens and measured on {LARGE_EVALUATION:,}.

{fold_away("Conditions", conditions_of(record))}
"""


def conditions_of(record: Record) -> list[str]:
    """What the figures depend on, a sentence each."""
    conditions = record.conditions
    return [
        f"Training of the sources: {list_settings(record.hyperparameters)}.",
        f"Text: {conditions.corpus} ({conditions.corpus_revision}), vocabulary {conditions.vocab_size:,}.",
        f"Evaluation: {conditions.evaluated_tokens:,} tokens kept out of training, in blocks of {conditions.context} "
        f"without overlap, {conditions.dtype}.",
        f"Measured with {describe_origin(conditions)}.",
    ]


def draw(record: Record, path: Path):
    """Left what healing reaches, right what steps cost."""
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    axes, bars = figure.subplots(1, 2)
    for seed in dict.fromkeys(run.seed for run in record.runs):
        color = f"C{seed}"
        (scratch,) = (run.nats for run in record.runs if (run.kind, run.seed) == (SCRATCH, seed))
        axes.axhline(math.exp(scratch), color=color, ls="--", lw=1, label=f"from scratch, seed {seed}")
        points = [
            (run.steps / record.training_steps, math.exp(run.nats))
            for run in record.runs
            if (run.kind, run.seed) == (HEALED, seed)
        ]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", ms=4, label=f"converted, seed {seed}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SHARES, [f"1/{round(1 / share)}" if share < 1 else "1" for share in SHARES])
    axes.set(xlabel="share of the tokens of training from scratch", ylabel="perplexity per token", title=TARGET)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    titles = [*dict.fromkeys(cost.step for cost in record.steps)]
    for offset, name, color in ((-0.2, "kl", "tab:blue"), (0.2, "naive_kl", "tab:orange")):
        heights = [
            statistics.median([getattr(cost, name) or math.nan for cost in record.steps if cost.step == title])
            for title in titles
        ]
        places = [index + offset for index in range(len(titles))]
        bars.bar(places, heights, 0.38, color=color, label="fitted to text" if name == "kl" else "naive")
    bars.set_yscale("log")
    bars.set_xticks(range(len(titles)), titles, rotation=15, fontsize=8)
    bars.set(ylabel="KL to the original (nats)", title="steps alone, median of seeds")
    bars.legend()
    figure.savefig(path, format="png")


def main(
    quick: Annotated[bool, typer.Option(help="One seed and hardly any training; writes nothing.")] = False,
    redraw: Annotated[bool, typer.Option(help="Measure nothing; redraws page and figure.")] = False,
):
    """Measure what conversions keep, compared with naive ones and with training from scratch."""
    if redraw:
        publish(Record.load(RECORD))
        return
    seeds, steps = ((0,), 64) if quick else (SEEDS, STEPS)
    imports = [measure_import(*entry) for entry in IMPORTED.items()]
    measured = [measure_seed(seed, steps) for seed in seeds]
    record = Record(
        imports=imports,
        steps=[cost for costs, *_ in measured for cost in costs],
        runs=[run for _, runs, *_ in measured for run in runs],
        large_parameters=0,
        large_seconds=0.0,
        large_peak_bytes=0,
        hyperparameters=measured[0][2],
        conditions=measured[0][3],
    )
    if not quick:
        tokenizer = WORK / f"steps-{steps}-seed-{seeds[0]}" / "quickstart" / "data" / "tokenizer"
        large = measure_large(tokenizer, WORK / "large")
        record.large_parameters, record.large_seconds = large.original_parameters, large.seconds
        record.large_peak_bytes = large.peak_memory_bytes
    for table in (step_table(record), healing_table(record), norm_table(record)):
        console.print(f"\n{table}", soft_wrap=True, markup=False)
    if quick:
        return
    record.save(RECORD)
    publish(record)
    console.print(f"written: {RECORD}, {PAGE}, {PICTURE}")


def publish(record: Record):
    """Writes the page and the figure of a record."""
    draw(record, PICTURE)
    PAGE.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
