"""Inputs of an evaluation: options, models, windows and text. All are checked before anything is measured."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from pydantic import BeforeValidator, Field
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.measuring.perplexity import Windows, check_windows
from entropy_gpt.evaluation.measuring.text_diagnostics import check_head, encode_text
from entropy_gpt.evaluation.measuring.tokenized_text import count_tokens, tokenize
from entropy_gpt.evaluation.origin import hash_weights
from entropy_gpt.evaluation.records.measurement import BATCH_TOKENS, HEAD_TOKENS, KEPT_APART, MeasuredText
from entropy_gpt.training.arguments import STANDARD_LIBRARY, DataArguments
from entropy_gpt.training.errors import CorpusError
from entropy_gpt.training.model_tokenizer import hash_vocabulary, load_model_tokenizer
from entropy_gpt.training.sources import Source, open_source
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .options import Head, LocalPath, Place, as_tuple, option_name


LONGEST_BLOCK = 1024
# The value of `frequency_text` that means the part of the text that is not evaluated.
TRAINING = "training"


def _join(tasks: str | Iterable[str] | None) -> str | None:
    return None if tasks is None else ",".join(as_tuple(tasks))


@pydantic.dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """The options of an evaluation. [`~entropy_gpt.evaluate`] takes them as keyword arguments and describes each."""

    models: Annotated[tuple[Place, ...], BeforeValidator(as_tuple)]
    text: Place | None = None
    held_out: bool = False
    split: str = "train"
    config: str | None = None
    text_column: str = "text"
    tokenizer: Place | None = None
    eos_token: str | None = None
    context: int | None = None
    stride: int | None = None
    separate: bool = False
    bos: bool = False
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    per_position: bool = False
    frequency_text: Place | None = None
    head_tokens: Annotated[int, Field(ge=0)] = HEAD_TOKENS
    prompt: str | None = None
    head: Head = None
    tasks: Annotated[str | None, BeforeValidator(_join)] = None
    task_data: LocalPath | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_tokens: Annotated[int, Field(ge=1)] = BATCH_TOKENS
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def evaluates_a_part(self) -> bool:
        """Whether only the part of the text that training keeps for validation is evaluated."""
        return self.held_out or self.text is None

    @property
    def task_names(self) -> list[str]:
        """The names in `tasks`, which has commas between them."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


@dataclass(frozen=True)
class Candidate:
    """
    A model to measure.

    Args:
        name (`str`): Its name in results.
        source (`str`): Its folder, or its repository on the Hub.
        config ([`EntropyGPTConfig`]): Its configuration.
        weights (`str`): The hash of its weights as they are stored, before they are converted to another dtype.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
    """

    name: str
    source: str
    config: EntropyGPTConfig
    weights: str
    tokenizer: PreTrainedTokenizerFast

    @functools.cached_property
    def vocabulary(self) -> str:
        """A hash of the vocabulary: models with the same hash share the tokenised text."""
        return hash_vocabulary(self.tokenizer, self.config.vocab_size)


def check_options(options: EvaluationOptions):
    """
    Refuses options that would have no effect or can't be followed.

    Raises:
        `UserError`: If there is such an option.
    """
    if not options.models:
        raise UserError("There is no model to evaluate. Give at least one folder or repository.")
    if options.held_out and options.text is None:
        raise UserError(
            "--held-out has no effect without --text: only the held-out part of the default text is evaluated."
        )
    if options.frequency_text == TRAINING and not options.evaluates_a_part:
        raise UserError(
            "--frequency-text training means the part of --text that is not evaluated, but all of it is evaluated: "
            "add --held-out, or name another text."
        )
    if options.head is not None and options.prompt is None:
        raise UserError("--head has no effect without --prompt: give the text to draw the head's attention to.")
    for name in ("task_data", "limit"):
        if getattr(options, name) is not None and not options.task_names:
            raise UserError(f"{option_name(name)} has no effect without --tasks: add --tasks.")
    if options.tasks is not None and not options.task_names:
        raise UserError("--tasks names no task: give names separated by commas, or 'list' to see some.")
    find_device(options)


def find_device(options: EvaluationOptions) -> torch.device:
    """
    The device to measure on: the one that was named, or a GPU if there is one.

    Raises:
        `UserError`: If there is no such device.
    """
    if options.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device} can't be used: {str(error).splitlines()[0]}") from error
    return device


def load_model(source: str, options: EvaluationOptions) -> EntropyGPTForCausalLM:
    """
    Loads a model on the device and in the dtype that it is measured in.

    Raises:
        `ConversionError`: If it can't be loaded.
    """
    model = load_language_model(source).to(find_device(options), getattr(torch, options.dtype))
    model.config.use_cache = False
    return model.eval()


def find_candidates(options: EvaluationOptions) -> Iterator[Candidate]:
    """
    Loads each model once, for its configuration, its hash and its tokenizer, so that errors show before any is
    measured.

    Raises:
        `ConversionError`: If a model can't be loaded.
        `UserError`: If a model is given twice, or does not fit its tokenizer or the prompt.
    """
    places = [Path(source).resolve() if Path(source).exists() else source for source in options.models]
    if twice := [place for index, place in enumerate(places) if place in places[:index]]:
        raise UserError(f"{twice[0]} is given twice. Give each model once.")
    for source, name in zip(options.models, short_names(options.models), strict=True):
        model = load_language_model(source)
        tokenizer = load_model_tokenizer(options.tokenizer, source, model.config.vocab_size, options.eos_token)
        if options.prompt is not None:
            encode_text(options.prompt, tokenizer, model.config)
        if options.head is not None:
            check_head(options.head, model.config.n_layer, model.config.n_head)
        yield Candidate(name, source, model.config, hash_weights(model), tokenizer)


def short_names(sources: Iterable[str]) -> list[str]:
    """
    The shortest end of each path that distinguishes it from the others, such as "a/model" and "b/model". A folder
    called "model" keeps its parent's name even if it is the only one.
    """
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
    """
    The default context of a model: one less than its positions, at most 1023. If it was trained on blocks of its own
    length, its last position has never predicted a token.
    """
    return max(1, min(n_positions, LONGEST_BLOCK) - 1)


def find_windows(options: EvaluationOptions, candidates: list[Candidate]) -> Windows:
    """
    The windows in which every model reads the text.

    Raises:
        `UserError`: If the context exceeds a model's positions, or the stride would skip tokens.
    """
    most = min(candidate.config.n_positions for candidate in candidates)
    context = default_context(most) if options.context is None else options.context
    windows = Windows(context, context if options.stride is None else options.stride, options.separate, options.bos)
    for candidate in candidates:
        try:
            check_windows(windows, candidate.config)
        except ValueError as error:
            raise UserError(f"{candidate.source}: {error}") from error
    return windows


def open_text(options: EvaluationOptions) -> Source:
    """
    Opens the text to evaluate.

    Raises:
        `UserError`: If it can't be read.
    """
    share = DataArguments.validation_share if options.evaluates_a_part else 0.0
    arguments = DataArguments(
        dataset=options.text or STANDARD_LIBRARY,
        dataset_config=options.config,
        dataset_split=options.split,
        text_column=options.text_column,
        validation_share=share,
    )
    return open_source(arguments)


def tokenize_text(
    source: Source,
    candidate: Candidate,
    windows: Windows,
    options: EvaluationOptions,
    on_document: Callable[[], None],
) -> MeasuredText:
    """
    Tokenises the text for a model.

    Args:
        source ([`Source`]): The text.
        candidate ([`Candidate`]): The model.
        windows ([`Windows`]): The windows in which it reads the text.
        options ([`EvaluationOptions`]): Which part of the text is evaluated, and how many tokens at most.
        on_document (`Callable`): Called after each document.

    Raises:
        `UserError`: If the text is too short, or the tokenizer lacks a token that is needed.
    """
    digest = hashlib.sha256()
    texts = _digested(source.validation if options.evaluates_a_part else source.training, digest)
    try:
        documents = [
            document.compact()
            for document in tokenize(
                texts, candidate.tokenizer, windows.separate, windows.bos, options.max_tokens, on_document
            )
        ]
    except (ValueError, CorpusError) as error:
        raise UserError(f"{source.name}: {error}") from error
    part = KEPT_APART if options.evaluates_a_part else ""
    beginning = "" if options.max_tokens is None else f", at most {options.max_tokens:,} tokens"
    text = MeasuredText(
        f"{source.name}{part}{beginning}",
        f"{source.version} sha256:{digest.hexdigest()[:16]}".strip(),
        candidate.tokenizer,
        documents,
        windows,
    )
    if not any(len(document.input_ids) for document in documents):
        raise UserError(f"{source.name} is empty: there is no text to evaluate. Give another --text.")
    if not any(document.bytes for document in documents):  # the first token is not predicted
        raise UserError(
            f"{source.name} has no document of two tokens or more, so there is no token to predict: give more text, "
            "or add --bos."
        )
    return text


def _digested(texts: Iterable[str], digest) -> Iterator[str]:
    for text in texts:
        digest.update(text.encode(errors="surrogatepass") + b"\0")
        yield text


def count_frequencies(source: Source, candidate: Candidate, options: EvaluationOptions) -> tuple[np.ndarray, str]:
    """
    Counts each token in the text that `frequency_text` names.

    Returns:
        `tuple[np.ndarray, str]`: The counts, of shape `(vocab_size,)`, and the text's name.

    Raises:
        `UserError`: If the text can't be read.
    """
    if options.frequency_text == TRAINING:
        name, texts = f"{source.name}, the part trained on", source.training
    else:
        try:
            other = open_source(DataArguments(dataset=options.frequency_text, validation_share=0.0))
        except CorpusError as error:
            raise UserError(f"--frequency-text: {error}") from error
        name, texts = other.name, other.training
    return count_tokens(texts, candidate.tokenizer, candidate.config.vocab_size), name
