"""The stages of the quickstart. Each leaves its result whole in the output folder, and is skipped if it is there."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerFast, PrinterCallback, set_seed

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.conversion.planning import target_config
from entropy_gpt.conversion.tokenizer_files import save_tokenizer
from entropy_gpt.evaluation.measuring.remote_loading import RemoteLoadingError, load_in_fresh_process, save_reference
from entropy_gpt.evaluation.origin import collect_origin
from entropy_gpt.evaluation.records.measurement import (
    KEPT_APART,
    MeasuredText,
    describe_config,
    measure_model,
    read_text,
)
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult, TrainingResult, load_results, save_results
from entropy_gpt.evaluation.showing.comparison import COLUMNS, comparison_rows, conditions_text
from entropy_gpt.evaluation.showing.head_plots import compare_models
from entropy_gpt.evaluation.showing.model_card import model_card
from entropy_gpt.terminal.progress import progress_display
from entropy_gpt.terminal.tables import make_table
from entropy_gpt.training.arguments import (
    PAPER_HYPERPARAMETERS,
    STANDARD_LIBRARY,
    DataArguments,
    EntropyTrainingArguments,
)
from entropy_gpt.training.callbacks import StepObserver, Stopwatch, find_callback
from entropy_gpt.training.checkpoints import last_checkpoint
from entropy_gpt.training.claims import claimed
from entropy_gpt.training.errors import CorpusError
from entropy_gpt.training.files import delete, written_whole
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.packing import collate_blocks, pack, spread_blocks
from entropy_gpt.training.progress import Progress
from entropy_gpt.training.sources import Source, open_source
from entropy_gpt.training.tokenizer import train_tokenizer
from entropy_gpt.training.trainer import EntropyTrainer
from entropy_gpt.workflows.convert import Conversion, convert_with_text
from entropy_gpt.workflows.convert_inputs import ConversionOptions, Text, spread
from entropy_gpt.workflows.output_folder import QUICKSTART
from entropy_gpt.workflows.report import write_page
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .private_stage import answer_privately, private_costs
from .stages import Stages


# The architectures, and what each sets in addition to its notation: the paper's initial temperature.
ARCHITECTURES = {"SM+LN+G": {}, "SM+ScFuFFN": {}, "EReg(SM(t)+ScFuFFN)": {"temperature_init": 0.01}}
# What the first of them is converted to, and healed for this part of the steps.
TARGET = "EReg(SM(t)+ScFuFFN)"
HEALING_SHARE = 1 / 4
# Those that answer under secure computation: what people run, and the paper's proposal.
PRIVATE = ("SM+LN+G", "EReg(SM(t)+ScFuFFN)")
DATA, CONVERTED = "data", "converted"  # the names of their folders
SIZES = {"n_layer": 4, "n_embd": 128, "n_head": 4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
VOCAB_SIZE = 1024
CONTEXT = 128
BATCH_SIZE = 8
# The paper's recipe, AdamW with linear decay, but for twice its learning rate, four times its warm-up, and thresholds
# that learn ten times as fast: of what docs/study.md compares, the best for the softmax-only ones, and near to the
# best for GPT-2.
HYPERPARAMETERS = {"learning_rate": 2e-3, **PAPER_HYPERPARAMETERS}
THRESHOLD_LR_MULTIPLIER = 10.0
WARMUP_SHARE = 0.2
CHECKPOINTS = 15
EVALUATED_BLOCKS = 512
# The stages besides those of the architectures.
TEXT, CONVERSION, LOADING, ANSWERS = "text", "conversion", "loading in a fresh process", "private answers"
REPORT = "report.html"
PROMPT = "def __init__(self, "
LARGEST_DIFFERENCE = 1e-5

console = Console()


@dataclasses.dataclass(frozen=True)
class Data:
    """The text as a model sees it."""

    source: Source
    tokenizer: PreTrainedTokenizerFast
    training: Dataset
    validation: Dataset

    @functools.cached_property
    def measured(self) -> MeasuredText:
        """All that is kept for validation."""
        source = self.source
        return read_text(source.name + KEPT_APART, source.identity, source.validation, self.tokenizer, CONTEXT)


@library_bars_hidden()
def run(steps: int, corpus_path: Path | None, output: Path, seed: int):
    """
    Runs all stages.

    Args:
        steps (`int`): Training steps of each model.
        corpus_path (`Path`, *optional*): Text to train on; the standard library without.
        output (`Path`): Folder for everything.
        seed (`int`): Seed of weights and data order.

    Raises:
        `UserError`: If the text can't be used, the folder holds something else, or a model diverges or does not
            load in a fresh process.
    """
    QUICKSTART.is_in(output)
    with claimed(output, lambda: (output / DATA).exists()):
        _run(steps, corpus_path, output, seed)


def _run(steps: int, corpus_path: Path | None, output: Path, seed: int):
    stages = Stages(console, _list_work(steps, output))
    with progress_display(console, whole=stages) as progress:
        stages.begin(TEXT)
        data = _prepare(steps, corpus_path, output, seed, progress)
        for notation in ARCHITECTURES:
            if not (output / "models" / slug(notation)).exists():
                stages.begin(notation)
                _train_and_save(notation, data, steps, seed, output, progress, stages)
        if not (output / "models" / CONVERTED).exists():
            stages.begin(CONVERSION)
            _convert_and_save(data, steps, seed, output, progress)
    names = [*map(slug, ARCHITECTURES), CONVERTED]
    try:
        results = [result for name in names for result in load_results(output / "models" / name / RESULTS)]
    except ValueError as error:
        raise UserError(f"{error} Delete the folder that it lies in, and run again.") from error
    _draw(results, output)
    _save_all(results, output)
    _print_table(results)
    with progress_display(console, transient=True, whole=stages) as progress:
        stages.begin(LOADING)
        for name, result in zip(names, results, strict=True):
            _load_back(name, result.title, output, progress)
        stages.begin(ANSWERS)
        answer_privately({title: output / "models" / slug(title) for title in PRIVATE}, PROMPT, output, progress)
        with progress.stage("drawing the report"):
            write_page(_save_all(results, output), [], output / REPORT)
    _print_where(output)


def _list_work(steps: int, output: Path) -> dict[str, float]:
    """The stages, and about how many training steps take as long as each; 0 if it is done already."""
    models = dict.fromkeys(ARCHITECTURES, steps + 150) | {CONVERSION: 2 * HEALING_SHARE * steps + 450}
    folders = [*map(slug, ARCHITECTURES), CONVERTED]
    missing = [not (output / "models" / folder).exists() for folder in folders]
    training = {name: work * wanted for (name, work), wanted in zip(models.items(), missing, strict=True)}
    return {TEXT: 0, **training, LOADING: 300, ANSWERS: 500}


def slug(notation: str) -> str:
    """The notation as a name that needs no quotes: `EReg(SM(t)+ScFuFFN)` is `ereg-smt-scfuffn`."""
    return re.sub(r"[^a-z0-9-]", "", re.sub(r"[+]|(?<=ereg)[(]", "-", notation.lower()))


def _prepare(steps: int, corpus_path: Path | None, output: Path, seed: int, progress: Progress) -> Data:
    """Reads and tokenises the text. Nothing is written before all of it is known to be good."""
    with progress.stage("reading the text") as line:
        dataset = STANDARD_LIBRARY if corpus_path is None else str(corpus_path.absolute())
        source = open_source(DataArguments(dataset=dataset), without=output)
        line.say(f"{source.documents:,} documents")
    settings = {
        "steps": steps,
        "seed": seed,
        "corpus": f"{source.name} ({source.identity})",
        **collect_origin(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    _check_output(output, settings)
    folder = output / DATA
    if not folder.exists():
        data = _tokenize(source, progress)
        with written_whole(output / QUICKSTART.record) as path:
            path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        with written_whole(folder) as temporary:
            save_tokenizer(data.tokenizer, temporary / "tokenizer")
            data.training.save_to_disk(temporary / "training")
            data.validation.save_to_disk(temporary / "validation")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return Data(source, tokenizer, load_from_disk(folder / "training"), load_from_disk(folder / "validation"))


def _check_output(output: Path, settings: dict):
    """Refuses a folder that holds something else than an earlier part of this very run."""
    if not QUICKSTART.is_in(output):
        return
    remedy, record = "give another --output, or delete it", output / QUICKSTART.record
    try:
        earlier = dict(json.loads(record.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{record} is damaged ({error}): {remedy}.") from error
    changed = [
        f"{name} {earlier.get(name)} then, {now} now" for name, now in settings.items() if earlier.get(name) != now
    ]
    if changed:
        raise UserError(f"{output} holds a quickstart with other settings ({'; '.join(changed)}): {remedy}.")


def _tokenize(source: Source, progress: Progress) -> Data:
    with progress.stage("training the tokenizer") as line:
        tokenizer = train_tokenizer(source.training, VOCAB_SIZE)
        line.say(f"{len(tokenizer):,} tokens")
    with progress.stage("tokenising", source.documents) as line:
        training = pack(source.training, tokenizer, CONTEXT, line.advance)
        try:
            validation = pack(source.validation, tokenizer, CONTEXT, line.advance)
        except CorpusError as error:
            raise CorpusError(f"In the part kept for validation: {error}") from error
        line.say(f"{len(training) + len(validation):,} blocks of {CONTEXT} tokens")
    return Data(source, tokenizer, training, spread_blocks(validation, EVALUATED_BLOCKS))


def _train_and_save(
    notation: str, data: Data, steps: int, seed: int, output: Path, progress: Progress, stages: Stages
):
    """Leaves the folder of a trained and measured model, and what it answers to a block of text."""
    checkpoints = output / "checkpoints" / slug(notation)
    set_seed(seed)
    model = EntropyGPTForCausalLM(_make_config(notation, data.tokenizer))
    seconds = _train(model, data, steps, seed, checkpoints, progress, stages)
    training = _describe_training(model, data, steps, seconds)
    result = measure_model(model, slug(notation), data.measured, training, seed, progress)
    _save(model, result, data, output)
    delete(checkpoints)


def _convert_and_save(data: Data, steps: int, seed: int, output: Path, progress: Progress):
    """Converts the first model, as `entropy-gpt convert` does, and leaves it as those that were trained."""
    source = output / "models" / slug(next(iter(ARCHITECTURES)))
    original = load_language_model(source)
    heal_steps = max(1, round(HEALING_SHARE * steps))
    options = ConversionOptions(
        source=str(source),
        to=TARGET,
        output=output / "conversion",
        heal_steps=heal_steps,
        distill=True,
        batch_size=BATCH_SIZE,
        learning_rate=HYPERPARAMETERS["learning_rate"],
        seed=seed,
    )
    text = Text(
        data.source.name,
        data.source.identity,
        data.tokenizer,
        data.training,
        spread(data.training, options.calibration_tokens),
        spread(data.validation, options.evaluation_tokens),
    )
    conversion = Conversion(options, original, target_config(original.config, TARGET))
    report = convert_with_text(conversion, text, progress)
    model = load_language_model(options.output)
    training = _describe_training(model, data, heal_steps, report.healing.seconds)
    training.converted_from = report.source_notation
    of_healing = ("learning_rate", "warmup_share", "kl_weight", "schedule")
    training.hyperparameters.update({name: report.healing.settings[name] for name in of_healing})
    of_thresholds = {"entropy_threshold_init": "each head's measured entropy", "threshold_lr_multiplier": 1.0}
    training.hyperparameters.update(of_thresholds)
    result = measure_model(model, CONVERTED, data.measured, training, seed, progress)
    _save(model, result, data, output)


def _save(model: EntropyGPTForCausalLM, result: ModelResult, data: Data, output: Path):
    model.cpu().eval()
    with torch.no_grad(), written_whole(output / "references" / f"{result.name}.safetensors") as path:
        input_ids = data.validation.with_format("torch")[:1]["input_ids"]
        save_reference(input_ids, model(input_ids).logits, path)
    with written_whole(output / "models" / result.name) as folder:
        model.save_pretrained(folder)
        save_tokenizer(data.tokenizer, folder)
        save_results([result], folder / RESULTS)
        model_card(result).save(folder / "README.md")


def _make_config(notation: str, tokenizer: PreTrainedTokenizerFast) -> EntropyGPTConfig:
    return EntropyGPTConfig.from_notation(
        notation,
        **SIZES,
        **NO_DROPOUT,
        **ARCHITECTURES[notation],
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _train(
    model: EntropyGPTForCausalLM,
    data: Data,
    steps: int,
    seed: int,
    checkpoints: Path,
    progress: Progress,
    stages: Stages,
) -> float:
    """Trains from the last whole checkpoint on, and returns the seconds that all of training took."""
    arguments = EntropyTrainingArguments(
        output_dir=checkpoints,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        warmup_steps=round(WARMUP_SHARE * steps),
        threshold_lr_multiplier=THRESHOLD_LR_MULTIPLIER,
        **HYPERPARAMETERS,
        seed=seed,
        logging_steps=max(1, steps // 100),
        save_steps=max(1, steps // CHECKPOINTS),
        report_to=[],
        disable_tqdm=True,
    )
    with progress.stage(f"training {model.config.notation}", steps) as line:
        trainer = EntropyTrainer(
            model=model,
            args=arguments,
            train_dataset=data.training,
            data_collator=collate_blocks,
            callbacks=[Stopwatch(), StepObserver(stages.follow(line), line.say)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    if (reason := trainer.guard.diverged) is not None:
        raise UserError(f"{model.config.notation}: training diverged, and was {reason}.")
    return find_callback(trainer, Stopwatch).seconds


def _describe_training(model: EntropyGPTForCausalLM, data: Data, steps: int, seconds: float) -> TrainingResult:
    has_thresholds = model.config.entropy_regularization
    return TrainingResult(
        steps=steps,
        tokens=steps * BATCH_SIZE * CONTEXT,
        seconds=seconds,
        hyperparameters={
            **HYPERPARAMETERS,
            "warmup_share": WARMUP_SHARE,
            "batch_size": BATCH_SIZE,
            **describe_config(model.config),
            **({"threshold_lr_multiplier": THRESHOLD_LR_MULTIPLIER} if has_thresholds else {}),
        },
        text=f"{data.source.name} ({data.source.identity})",
    )


def _draw(results: list[ModelResult], output: Path):
    """Redrawn in every run: it takes a second."""
    for result in results:
        with written_whole(output / "pictures" / f"entropy_{result.name}.png") as path:
            compare_models([result]).savefig(path, format="png")
    with written_whole(output / "pictures" / "entropy_comparison.png") as path:
        compare_models(results).savefig(path, format="png")


def _save_all(results: list[ModelResult], output: Path) -> list[ModelResult]:
    """Saves and returns the results with what private answers cost, as far as there are any."""
    results = [dataclasses.replace(result, costs=private_costs(result.name, output)) for result in results]
    with written_whole(output / RESULTS) as path:
        save_results(results, path)
    return results


def _load_back(name: str, title: str, output: Path, progress: Progress):
    folder = output / "models" / name
    with progress.stage(f"loading {name}"):
        try:
            loaded = load_in_fresh_process(folder, output / "references" / f"{name}.safetensors", PROMPT)
        except RemoteLoadingError as error:
            raise UserError(str(error)) from error
    if loaded.max_difference > LARGEST_DIFFERENCE:
        raise UserError(
            f"{folder} gives other logits in a fresh process: they differ by {loaded.max_difference:.2e}, and "
            f"{LARGEST_DIFFERENCE:.0e} is allowed. Delete {output} and run again."
        )
    console.print(
        f"[bold]{escape(title)}[/] loads in a fresh process from its folder alone (largest difference of logits: "
        f"{loaded.max_difference:.0e}), and completes: [green]{escape(loaded.completion)}[/]",
        soft_wrap=True,
    )


def _print_table(results: list[ModelResult]):
    rows = [[cell.replace(" from ", "\n  from ") for cell in row] for row in comparison_rows(results)]
    console.print(make_table([column.narrow for column in COLUMNS], rows, text_columns=2))
    console.print(escape(conditions_text(results)), style="dim")


def _print_where(output: Path):
    places = {
        "models, ready for the Hub": "models",
        "pictures of headwise entropy, and of where private bytes go": "pictures",
        "the cost of each step of the conversion": "conversion/conversion_report.md",
        "all numbers": RESULTS,
        "a page of all this, for a browser": REPORT,
    }
    for what, place in places.items():
        console.print(f"{what}: {output / place}", markup=False, soft_wrap=True)
