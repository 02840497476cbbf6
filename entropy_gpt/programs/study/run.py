"""
One run of the study, in a process of its own:

    python -m entropy_gpt.programs.study.run STUDY NAME
"""

import json
import os
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import AutoConfig, PreTrainedTokenizerFast

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.origin import Origin, collect_origin
from entropy_gpt.evaluation.private_inference.agreement import measure_agreement
from entropy_gpt.evaluation.private_inference.costs.published_cost import as_private_cost
from entropy_gpt.evaluation.private_inference.inference import EMULATED, PLAINTEXT, TWO_PARTY, PrivateModel
from entropy_gpt.evaluation.records.conversion_report import ConversionReport
from entropy_gpt.evaluation.records.measurement import KEPT_APART, measure_heads, measure_text, read_text
from entropy_gpt.evaluation.records.results import RESULTS, AnswerCheck, load_results, save_results
from entropy_gpt.evaluation.showing.model_card import model_card
from entropy_gpt.terminal.progress import progress_display
from entropy_gpt.training.arguments import STANDARD_LIBRARY
from entropy_gpt.training.checkpoints import list_checkpoints
from entropy_gpt.training.errors import DivergedError
from entropy_gpt.training.files import delete, written_whole
from entropy_gpt.training.progress import Progress
from entropy_gpt.training.recipe import read_recipe
from entropy_gpt.training.run_folder import MODEL
from entropy_gpt.training.start import find_start, fit_vocabulary, make_model
from entropy_gpt.workflows.convert import convert
from entropy_gpt.workflows.convert_inputs import ConversionOptions, find_target
from entropy_gpt.workflows.options import read_options
from entropy_gpt.workflows.output_folder import CONVERSION
from entropy_gpt.workflows.train import train
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .protocol import DATASET, Protocol, Run
from .records import ANSWERED, CONVERTED, TIMED, TRAINED, StudyRun
from .texts import load_text, read_samples


PLAN, RESULT, TOKENIZER, RUNS = "plan.json", "result.json", "tokenizer", "runs"
# Folders of a run, with what trained or converted it.
TRAINING, CONVERTING = "training", "conversion"
VALIDATION_TOKENS = "validation_tokens"
# Steps that are timed, and those before them that are not.
TIMED_STEPS, STEPS_BEFORE = 50, 3


@dataclass(frozen=True)
class Place:
    """Where a run of a study lies."""

    study: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.study / RUNS / self.name

    @property
    def result(self) -> Path:
        return self.folder / RESULT

    @property
    def model(self) -> Path | None:
        """Its model, if it has one."""
        last_files = (self.folder / TRAINING / MODEL / "config.json", self.folder / CONVERTING / CONVERSION.record)
        return next((file.parent for file in last_files if file.exists()), None)


def write_plan(place: Place, run: Run, protocol: Protocol):
    """Leaves what [`perform`] is to do."""
    plan = {"run": asdict(run), "test": protocol.test, "transfer": protocol.transfer}
    with written_whole(place.folder / PLAN) as path:
        path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


def perform(place: Place):
    """
    Does what the plan says, from where an earlier attempt ended, and leaves the result.

    Raises:
        `UserError`: If it can't be done.
    """
    plan = json.loads((place.folder / PLAN).read_text(encoding="utf-8"))
    run = Run(**plan["run"])
    act = {TRAINED: _train, CONVERTED: _convert, ANSWERED: _answer, TIMED: _time}[run.kind]
    with progress_display(Console()) as progress:
        result = act(place, run, progress)
        if run.kind in (TRAINED, CONVERTED) and result.diverged is None:
            _measure(place, run, plan, result, progress)
    with written_whole(place.result) as path:
        result.save(path)
    for checkpoint in list_checkpoints(place.folder / TRAINING):
        delete(checkpoint)


def _write_recipe(place: Place, run: Run) -> Path:
    settings = {
        **run.settings,
        "tokenizer": str(place.study / TOKENIZER),
        "data_cache": str(place.study / "data"),
        "output_dir": str(place.folder / TRAINING),
    }
    recipe = place.folder / "recipe.yaml"  # JSON is YAML
    recipe.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return recipe


def _train(place: Place, run: Run, progress: Progress) -> StudyRun:
    log = train(_write_recipe(place, run), progress=progress).log
    events = [f"step {event.step:,}: {event.text} ({event.action})" for event in log.divergences]
    events += [f"step {alarm.step:,}, layer {alarm.layer}: {alarm.text}" for alarm in log.alarms]
    found = _begin_record(run, log.description.notation, log.description.parameters)
    if place.model is None:
        tokens = log.last_step * log.description.tokens_per_step
        return replace(found, events=events, tokens=tokens, diverged=log.divergences[-1].text)
    training = load_results(place.model / RESULTS)[0].training
    return replace(
        found,
        events=events,
        tokens=training.tokens,
        seconds_per_step=training.seconds / training.steps,
        cpu_seconds_per_step=training.cpu_seconds and training.cpu_seconds / training.steps,
    )


def _time(place: Place, run: Run, progress: Progress) -> StudyRun:
    """Times steps on random tokens: forward, backward and AdamW. The median is little moved by what else runs."""
    recipe = read_recipe(str(_write_recipe(place, run)), {"max_steps": TIMED_STEPS})
    start = find_start(recipe)
    fit_vocabulary(start.config, recipe, PreTrainedTokenizerFast.from_pretrained(place.study / TOKENIZER))
    model = make_model(start, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(start.config.vocab_size, (recipe.training.per_device_train_batch_size, start.context))
    clocks = [(time.perf_counter(), time.process_time())]
    with progress.stage(f"timing {run.settings['notation']}"):
        for _ in range(STEPS_BEFORE + TIMED_STEPS):
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            clocks.append((time.perf_counter(), time.process_time()))
    seconds, cpu_seconds = (np.diff(clock)[STEPS_BEFORE:] for clock in zip(*clocks, strict=True))
    return replace(
        _begin_record(run, start.config.notation, model.num_parameters()),
        seconds_per_step=statistics.median(seconds),
        cpu_seconds_per_step=statistics.median(cpu_seconds),
        origin=Origin(**collect_origin(model.device)),
    )


def _convert(place: Place, run: Run, progress: Progress) -> StudyRun:
    source = Place(place.study, run.source).model
    if place.model is None:
        settings = {name: value for name, value in run.settings.items() if name not in (DATASET, VALIDATION_TOKENS)}
        dataset = run.settings[DATASET]
        text = None if dataset == STANDARD_LIBRARY else dataset
        options = {"to": settings.pop("notation"), "output": place.folder / CONVERTING, "text": text, **settings}
        try:
            convert(source, **options, progress=progress)
        except DivergedError as error:
            target = find_target(
                AutoConfig.from_pretrained(source), read_options(ConversionOptions, source=source, **options)
            )
            with torch.device("meta"):
                parameters = EntropyGPTForCausalLM(target).num_parameters()
            return replace(_begin_record(run, target.notation, parameters), diverged=str(error))
    (result,) = load_results(place.model / RESULTS)
    found = _begin_record(run, result.architecture.notation, result.architecture.parameters)
    healing = ConversionReport.load(place.model / CONVERSION.record).healing
    if healing is None:
        return found
    events = [f"step {step:,.0f}: {text}" for step, text in healing.events]
    return replace(found, events=events, tokens=healing.tokens, seconds_per_step=healing.seconds / healing.steps)


def _answer(place: Place, run: Run, progress: Progress) -> StudyRun:
    model = load_language_model(Place(place.study, run.source).model).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place.study / TOKENIZER)
    length, sequences = run.settings["length"], run.settings["sequences"]
    text = tokenizer.eos_token.join(load_text(run.settings[DATASET]).validation)
    tokens = np.array(tokenizer(text)["input_ids"])
    starts = np.linspace(0, len(tokens) - length, sequences).astype(int)
    prompts = np.stack([tokens[start : start + length] for start in starts])
    agreement = measure_agreement(model, prompts, EMULATED)
    private = PrivateModel(model)
    (expected,), answered = private.infer(prompts[:1], PLAINTEXT).answers, private.infer(prompts[:1], TWO_PARTY)
    (answer,), (cost,) = answered.answers, answered.costs
    check = AnswerCheck(
        answers=1,
        same=int(answer.argmax() == expected.argmax()),
        largest_logit=float(np.abs(expected).max()),
        largest_error=float(np.abs(answer - expected).max()),
    )
    found = _begin_record(run, model.config.notation, model.num_parameters())
    return replace(found, cost=as_private_cost(cost, check), agreement=agreement)


def _begin_record(run: Run, notation: str, parameters: int) -> StudyRun:
    return StudyRun(run.name, run.kind, run.settings, run.source, notation, parameters)


def _measure(place: Place, run: Run, plan: dict[str, dict], result: StudyRun, progress: Progress):
    """Adds what the model is worth, and what its heads do, as far as its training has not measured it."""
    model = load_language_model(place.model).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place.study / TOKENIZER)
    context, seed = model.config.n_positions, run.settings["seed"]
    (known,) = load_results(place.model / RESULTS)
    result.validation, heads = known.likelihood, known.heads
    # A conversion's own evaluation has another number of tokens.
    if run.kind == CONVERTED or result.validation is None or heads is None:
        source = load_text(run.settings[DATASET])
        most_tokens = run.settings[VALIDATION_TOKENS]
        name = source.name + KEPT_APART
        text = read_text(name, source.identity, source.validation, tokenizer, context, most_tokens)
        result.validation = measure_text(model, text, progress, result.notation, seed=seed)
        heads = measure_heads(model, text, progress, result.notation, seed=seed)
    result.heads = heads.heads.entropy
    for field, found in read_samples(plan["test"], plan["transfer"]).items():
        measured = {}
        for name, corpus in found.items():
            text = read_text(corpus.name, corpus.revision, corpus.texts, tokenizer, context)
            measured[name] = measure_text(model, text, progress, name, seed=seed)
        setattr(result, field, measured)
    described = replace(known, name=run.name, likelihood=result.validation, heads=heads)
    with written_whole(place.model / RESULTS) as path:
        save_results([described], path)
    model_card(described).save(place.model / "README.md")


def _end_with_parent():
    """A run whose command was killed would go on next to the one that is started next."""
    while os.read(sys.stdin.fileno(), 1):  # without a lock that the interpreter would miss at its end
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        perform(Place(Path(sys.argv[1]), sys.argv[2]))
    except UserError as error:
        sys.exit(f"entropy-gpt: {error}")
