"""What an evaluation is asked to do and works on: models, windows and text, refused before anything is measured."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.measuring.perplexity import Windows, check_windows
from entropy_gpt.evaluation.measuring.tokenized_text import count_tokens, tokenize
from entropy_gpt.evaluation.origin import hash_weights
from entropy_gpt.evaluation.records.measurement import KEPT_APART, MeasuredText
from entropy_gpt.training.arguments import STANDARD_LIBRARY, DataArguments
from entropy_gpt.training.errors import CorpusError
from entropy_gpt.training.model_tokenizer import hash_vocabulary, load_model_tokenizer
from entropy_gpt.training.sources import Source, open_source
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM


LONGEST_BLOCK = 1024
# What --frequency-text calls the other part of the text.
TRAINING = "training"


@dataclass(frozen=True)
class Job:
    """What the command was asked to measure; the fields are its options."""

    models: tuple[str, ...]
    text: str | None
    held_out: bool
    split: str
    config: str | None
    text_column: str
    tokenizer: str | None
    context: int | None
    stride: int | None
    separate: bool
    bos: bool
    max_tokens: int | None
    per_position: bool
    frequency_text: str | None
    head_tokens: int
    tasks: str | None
    task_data: Path | None
    limit: int | None
    batch_tokens: int
    dtype: str
    device: str | None
    seed: int

    @property
    def evaluates_a_part(self) -> bool:
        """Whether only what training keeps apart is evaluated."""
        return self.held_out or self.text is None

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


@dataclass(frozen=True)
class Candidate:
    """A model that is to be measured, and how it is called."""

    name: str
    source: str
    config: EntropyGPTConfig
    weights: str  # their hash, before --dtype makes others of them
    tokenizer: PreTrainedTokenizerFast

    @functools.cached_property
    def vocabulary(self) -> str:
        """The same for models whose tokens are the same."""
        return hash_vocabulary(self.tokenizer, self.config.vocab_size)


def check_options(job: Job):
    """
    Refuses options that would do nothing.

    Raises:
        `UserError`: If there is such an option.
    """
    if job.held_out and job.text is None:
        raise UserError("--held-out is about --text; without that, only the part kept apart is evaluated anyway.")
    if job.frequency_text == TRAINING and not job.evaluates_a_part:
        raise UserError(
            "--frequency-text training is the part of --text that is not evaluated, and all of it is: give --held-out "
            "too, or another text."
        )
    for name in ("task_data", "limit"):
        if getattr(job, name) is not None and not job.task_names:
            raise UserError(f"--{name.replace('_', '-')} does nothing without --tasks: give that too.")
    if job.tasks is not None and not job.task_names:
        raise UserError("--tasks names no task: give names with commas between them, or 'list' to see some.")
    find_device(job)


def find_device(job: Job) -> torch.device:
    """
    The device to measure on.

    Raises:
        `UserError`: If there is no such device.
    """
    if job.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(job.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {job.device} can't be used: {str(error).splitlines()[0]}") from error
    return device


def load_model(source: str, job: Job) -> EntropyGPTForCausalLM:
    """Loads a model for measuring; `ConversionError` if it can't be."""
    model = load_language_model(source).to(find_device(job), getattr(torch, job.dtype))
    model.config.use_cache = False
    return model.eval()


def find_candidates(job: Job) -> Iterator[Candidate]:
    """
    Looks at each model once before any is measured, for its configuration and its tokenizer.

    Raises:
        `UserError`, `ConversionError`: If one can't be loaded, is given twice, or does not fit its tokenizer.
    """
    places = [Path(source).resolve() if Path(source).exists() else source for source in job.models]
    if twice := [place for index, place in enumerate(places) if place in places[:index]]:
        raise UserError(f"{twice[0]} is given twice. Give each model once.")
    for source, name in zip(job.models, short_names(job.models), strict=True):
        model = load_language_model(source)
        tokenizer = load_model_tokenizer(job.tokenizer, source, model.config.vocab_size)
        yield Candidate(name, source, model.config, hash_weights(model), tokenizer)


def short_names(sources: Iterable[str]) -> list[str]:
    """As many of the last parts of each path as tell it from the others; `model` alone tells nothing."""
    parts = [[part for part in source.split("/") if part] or [source] for source in sources]
    names = []
    for own in parts:
        others = [other for other in parts if other is not own]
        count = 2 if own[-1] == "model" else 1
        while count < len(own) and any(other[-count:] == own[-count:] for other in others):
            count += 1
        names.append("/".join(own[-count:]))
    return names


def default_context(n_positions: int) -> int:
    """The last position of a model that was trained on blocks of its own length has never predicted anything."""
    return max(1, min(n_positions, LONGEST_BLOCK) - 1)


def find_windows(job: Job, candidates: list[Candidate]) -> Windows:
    """
    The windows for all models.

    Raises:
        `UserError`: If a model can't see so much, or tokens would be left out.
    """
    most = min(candidate.config.n_positions for candidate in candidates)
    context = default_context(most) if job.context is None else job.context
    windows = Windows(context, context if job.stride is None else job.stride, job.separate, job.bos)
    for candidate in candidates:
        try:
            check_windows(windows, candidate.config)
        except ValueError as error:
            raise UserError(f"{candidate.source}: {error}") from error
    return windows


def open_text(job: Job) -> Source:
    """
    Opens the text to evaluate; what is evaluated of it is its part for validation.

    Raises:
        `UserError`: If it can't be read.
    """
    share = DataArguments.validation_share if job.evaluates_a_part else 0.0
    arguments = DataArguments(
        dataset=job.text or STANDARD_LIBRARY,
        dataset_config=job.config,
        dataset_split=job.split,
        text_column=job.text_column,
        validation_share=share,
    )
    return open_source(arguments)


def tokenize_text(source: Source, candidate: Candidate, windows: Windows, job: Job, on_document) -> MeasuredText:
    """
    Tokenises the text for a model.

    Raises:
        `UserError`: If there is too little of it, or the tokenizer lacks a token that is needed.
    """
    digest = hashlib.sha256()
    texts = _digested(source.validation if job.evaluates_a_part else source.training, digest)
    try:
        documents = [
            document.compact()
            for document in tokenize(
                texts, candidate.tokenizer, windows.separate, windows.bos, job.max_tokens, on_document
            )
        ]
    except (ValueError, CorpusError) as error:
        raise UserError(f"{source.name}: {error}") from error
    part = KEPT_APART if job.evaluates_a_part else ""
    beginning = "" if job.max_tokens is None else f", at most {job.max_tokens:,} tokens"
    text = MeasuredText(
        f"{source.name}{part}{beginning}",
        f"{source.version} sha256:{digest.hexdigest()[:16]}".strip(),
        candidate.tokenizer,
        documents,
        windows,
    )
    if not any(len(document.input_ids) for document in documents):
        raise UserError(f"{source.name} is empty: there is no text to evaluate on. Give another --text.")
    if not any(len(document.input_ids) > 1 for document in documents) and (windows.separate or text.tokens < 2):
        raise UserError(
            f"{source.name} has no text of two tokens or more, and nothing is predicted from nothing: give more text, "
            "or --bos."
        )
    return text


def _digested(texts: Iterable[str], digest) -> Iterator[str]:
    for text in texts:
        digest.update(text.encode(errors="surrogatepass") + b"\0")
        yield text


def count_frequencies(source: Source, candidate: Candidate, job: Job) -> tuple[np.ndarray, str]:
    """How often each token is in the text that was named for it, and which that is."""
    if job.frequency_text == TRAINING:
        name, texts = f"{source.name}, the part trained on", source.training
    else:
        try:
            other = open_source(DataArguments(dataset=job.frequency_text, validation_share=0.0))
        except CorpusError as error:
            raise UserError(f"--frequency-text: {error}") from error
        name, texts = other.name, other.training
    return count_tokens(texts, candidate.tokenizer, candidate.config.vocab_size), name
