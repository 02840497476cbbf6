"""What a model is worth and what its heads do, as records: shared by the commands that measure."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from entropy_gpt.evaluation.measuring.entropy_diagnostics import diagnose_heads
from entropy_gpt.evaluation.measuring.operation_counts import count_operations
from entropy_gpt.evaluation.measuring.perplexity import Windows, measure_likelihood
from entropy_gpt.evaluation.measuring.tokenized_text import TokenizedText, tokenize
from entropy_gpt.evaluation.origin import git_revision, hash_weights, machine_name, recorded_versions
from entropy_gpt.training.progress import Progress
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .results import (
    Architecture,
    Conditions,
    HeadResult,
    LikelihoodResult,
    ModelResult,
    TrainingResult,
)


SIZES = ("n_layer", "n_embd", "n_head")
# Behind the name of a text of which a part was kept for validation.
KEPT_APART = ", the part kept apart"
# Tokens of a forward pass; speed and memory alone depend on it.
BATCH_TOKENS = 4096
# Tokens whose rows of attention are looked at, if nobody says otherwise.
HEAD_TOKENS = 65536


@dataclass(frozen=True)
class MeasuredText:
    """
    The text that a model is measured on.

    Args:
        name (`str`): What it is.
        revision (`str`): What tells it from any other.
        tokenizer (`PreTrainedTokenizerBase`): What made the tokens.
        documents (`list[TokenizedText]`): The documents, tokenised for the windows.
        windows ([`Windows`]): What the model sees at once.
    """

    name: str
    revision: str
    tokenizer: PreTrainedTokenizerBase
    documents: list[TokenizedText]
    windows: Windows

    @property
    def tokens(self) -> int:
        """Number of tokens, those between documents included."""
        return sum(len(document.input_ids) for document in self.documents)

    def blocks(self, length: int, most_tokens: int) -> Dataset:
        """Blocks of a length, or of the text's if that is shorter, evenly spread over it: column `input_ids`."""
        ends = [self.tokenizer.eos_token_id] if self.windows.separate else []
        stream = np.concatenate([ids for text in self.documents for ids in (text.input_ids, ends)]).astype(np.int64)
        length = min(length, len(stream))
        rows = stream[: len(stream) // length * length].reshape(-1, length)
        chosen = np.linspace(0, len(rows) - 1, min(len(rows), max(1, most_tokens // length))).round().astype(int)
        return Dataset.from_dict({"input_ids": rows[chosen]})


def read_text(
    name: str,
    revision: str,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    most_tokens: int | None = None,
) -> MeasuredText:
    """
    The text as `entropy-gpt evaluate` reads it if nobody says otherwise: windows that hold a block of the training,
    whose last token is predicted and not seen.
    """
    windows = Windows(block_size - 1, stride=block_size - 1, separate=False, bos=False)
    documents = [document.compact() for document in tokenize(texts, tokenizer, False, False, most_tokens)]
    return MeasuredText(name, revision, tokenizer, documents, windows)


def measure_model(
    model: EntropyGPTForCausalLM,
    name: str,
    text: MeasuredText,
    training: TrainingResult,
    seed: int,
    progress: Progress,
) -> ModelResult:
    """
    Measures a model that was trained here.

    Args:
        model ([`EntropyGPTForCausalLM`]): The model.
        name (`str`): What it is called.
        text ([`MeasuredText`]): What it is measured on.
        training ([`TrainingResult`]): What training took.
        seed (`int`): Of weights and data order.
        progress (`Progress`): Where it shows.
    """
    result = describe_model(model, name, text.windows)
    result.training = training
    result.likelihood = measure_text(model, text, progress, result.title, seed=seed)
    result.heads = measure_heads(model, text, progress, result.title, seed=seed)
    return result


def describe_model(
    model: EntropyGPTForCausalLM, name: str, windows: Windows, weights: str | None = None
) -> ModelResult:
    """
    What a model is, and what a forward pass over a window takes; nothing measured yet. The hash of its weights is
    given where they are known by that of another dtype.
    """
    config = model.config
    return ModelResult(
        name=name,
        weights=weights or hash_weights(model),
        architecture=Architecture(
            notation=config.notation,
            final_normalization=config.final_normalization,
            parameters=model.num_parameters(),
            **{size: getattr(config, size) for size in (*SIZES, "n_positions", "vocab_size")},
        ),
        operations=count_operations(config, _block_length(model, windows)),
    )


def measure_text(
    model: EntropyGPTForCausalLM,
    text: MeasuredText,
    progress: Progress,
    title: str,
    batch_tokens: int = BATCH_TOKENS,
    seed: int | None = None,
    **breakdown,
) -> LikelihoodResult:
    """
    Measures how well a model predicts a text.

    Args:
        model ([`EntropyGPTForCausalLM`]): The model.
        text ([`MeasuredText`]): The text.
        progress (`Progress`): Where it shows.
        title (`str`): What the model is called there.
        batch_tokens (`int`): Tokens of a forward pass.
        seed (`int`, *optional*): Of the model's training, if that belongs to the result.
        breakdown: What else [`measure_likelihood`] is to tell.
    """
    started = time.perf_counter()
    with progress.stage(f"{title}: perplexity", text.tokens) as line:
        likelihood = measure_likelihood(
            model, text.documents, text.windows, batch_tokens, on_tokens=line.advance, **breakdown
        )
        line.say(f"{likelihood.perplexity:.2f} per token")
    conditions = _conditions(model, text, text.windows.context, likelihood.tokens, seed)
    return LikelihoodResult(likelihood, conditions, time.perf_counter() - started)


def measure_heads(
    model: EntropyGPTForCausalLM,
    text: MeasuredText,
    progress: Progress,
    title: str,
    most_tokens: int = HEAD_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    seed: int | None = None,
) -> HeadResult:
    """Measures what the heads do on blocks of the text; arguments as for [`measure_text`]."""
    started = time.perf_counter()
    blocks = text.blocks(_block_length(model, text.windows), most_tokens)
    context = len(blocks[0]["input_ids"])
    with progress.stage(f"{title}: attention heads", len(blocks)) as line:
        heads = diagnose_heads(model, blocks, max(1, batch_tokens // context), line.advance)
        line.say(f"mean entropy {heads.entropy.mean:.2f} nats")
    conditions = _conditions(model, text, context, heads.rows, seed)
    return HeadResult(heads, conditions, time.perf_counter() - started)


def _block_length(model: EntropyGPTForCausalLM, windows: Windows) -> int:
    """Tokens of a window with the last one predicted, as far as the model has positions for them."""
    return min(windows.context + 1, model.config.n_positions)


def _conditions(
    model: EntropyGPTForCausalLM, text: MeasuredText, context: int, evaluated_tokens: int, seed: int | None
) -> Conditions:
    return Conditions(
        corpus=text.name,
        corpus_revision=text.revision,
        vocab_size=len(text.tokenizer),
        context=context,
        evaluated_tokens=evaluated_tokens,
        dtype=str(model.dtype).removeprefix("torch."),
        seed=seed,
        versions=recorded_versions(),
        git_revision=git_revision(),
        machine=machine_name(torch.device(model.device)),
    )


def describe_config(config: EntropyGPTConfig) -> dict:
    """What a model was told beside its notation, of what has an effect on it."""
    names = [*SIZES]
    if config.attention_temperature != "none":
        names += ["temperature_init"]
    if config.entropy_regularization:
        names += ["entropy_penalty", "entropy_coefficient", "entropy_tolerance", "entropy_threshold_init"]
        names += ["entropy_maximum"]
    dropouts = {name: getattr(config, name) for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")}
    told = dropouts if len({*dropouts.values()}) > 1 else {"dropout": config.resid_pdrop}
    return told | {name: getattr(config, name) for name in names}
