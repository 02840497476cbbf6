"""Measures a model's predictions and attention heads, as records that name their conditions."""

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from entropy_gpt.evaluation.measuring.entropy_diagnostics import diagnose_heads
from entropy_gpt.evaluation.measuring.operation_counts import count_operations
from entropy_gpt.evaluation.measuring.perplexity import Windows, measure_likelihood
from entropy_gpt.evaluation.measuring.text_diagnostics import diagnose_text
from entropy_gpt.evaluation.measuring.tokenized_text import TokenizedText, tokenize
from entropy_gpt.evaluation.origin import collect_origin, hash_weights
from entropy_gpt.training.progress import Progress
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from modeling_entropy_gpt.layers import LEARNED_SCALARS

from .results import (
    Architecture,
    AttentionResult,
    Conditions,
    HeadResult,
    LikelihoodResult,
    ModelResult,
    TrainingResult,
)


if TYPE_CHECKING:
    from datasets import Dataset


SIZES = ("n_layer", "n_embd", "n_head")
# Appended to a text's name if only the part kept for validation is measured.
KEPT_APART = ", the part kept apart"
# Tokens in one forward pass. They affect speed and memory, not results.
BATCH_TOKENS = 4096
# Default number of tokens whose rows of attention are measured.
HEAD_TOKENS = 65536


@dataclass(frozen=True)
class MeasuredText:
    """
    The text that a model is measured on.

    Args:
        name (`str`): Its name in records.
        revision (`str`): A version and a hash that identify its content.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer that made the tokens.
        documents (`list[TokenizedText]`): The documents, tokenised for the windows.
        windows ([`Windows`]): The windows in which the model reads the text.
    """

    name: str
    revision: str
    tokenizer: PreTrainedTokenizerBase
    documents: list[TokenizedText]
    windows: Windows

    @property
    def tokens(self) -> int:
        """Number of tokens, including those between documents."""
        return sum(len(document.input_ids) for document in self.documents)

    def blocks(self, length: int, most_tokens: int) -> "Dataset":
        """
        Cuts the text into blocks and takes some of them, evenly spaced.

        Args:
            length (`int`): Tokens of a block; a shorter text is one block.
            most_tokens (`int`): Tokens of all blocks together. At least one block is taken.

        Returns:
            `Dataset`: Column `input_ids`, of shape `(blocks, length)`.
        """
        from datasets import Dataset

        eos = self.tokenizer.eos_token_id
        ends = [eos] if self.windows.separate and eos is not None else []
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
    Tokenises a text for the default windows of `entropy-gpt evaluate`: each holds one block of training, whose last
    token is predicted and not seen.

    Args:
        name (`str`): The text's name in records.
        revision (`str`): A version and a hash that identify its content.
        texts (`Iterable[str]`): Its documents.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        block_size (`int`): Tokens of a block of training.
        most_tokens (`int`, *optional*): Stop after this many tokens.
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
    Measures the predictions and the heads of a model that was trained here.

    Args:
        model ([`EntropyGPTForCausalLM`]): The model.
        name (`str`): Its name in the result.
        text ([`MeasuredText`]): The text to measure it on.
        training ([`TrainingResult`]): The record of its training.
        seed (`int`): Seed of its weights and data order.
        progress (`Progress`): Receives both stages.
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
    The result of a model of which nothing is measured yet: its architecture, and the operations of a forward pass.

    Args:
        model ([`EntropyGPTForCausalLM`]): The model.
        name (`str`): Its name in the result.
        windows ([`Windows`]): The operations are counted for a window and the token after it.
        weights (`str`, *optional*): The hash of its weights, if they were loaded in another dtype. Computed otherwise.
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
        progress (`Progress`): Receives one stage.
        title (`str`): The model's name in the stage.
        batch_tokens (`int`): Tokens in one forward pass.
        seed (`int`, *optional*): Seed of the model's training, if it belongs to the result.
        breakdown: Further arguments of [`measure_likelihood`], such as `by_position`.
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
    """
    Measures the attention heads on blocks of a text.

    Args:
        model ([`EntropyGPTForCausalLM`]): The model.
        text ([`MeasuredText`]): The text.
        progress (`Progress`): Receives one stage.
        title (`str`): The model's name in the stage.
        most_tokens (`int`): Tokens whose rows of attention are measured, spread over the text.
        batch_tokens (`int`): Tokens in one forward pass.
        seed (`int`, *optional*): Seed of the model's training, if it belongs to the result.
    """
    started = time.perf_counter()
    blocks = text.blocks(_block_length(model, text.windows), most_tokens)
    context = len(blocks[0]["input_ids"])
    with progress.stage(f"{title}: attention heads", len(blocks)) as line:
        heads = diagnose_heads(model, blocks, max(1, batch_tokens // context), line.advance)
        line.say(f"mean entropy {heads.entropy.mean:.2f} nats")
    conditions = _conditions(model, text, context, heads.rows, seed)
    return HeadResult(heads, conditions, time.perf_counter() - started)


def measure_attention(
    model: EntropyGPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    head: tuple[int, int] | None,
    progress: Progress,
    title: str,
) -> AttentionResult:
    """
    Measures the attention heads on one text.

    Args:
        model ([`EntropyGPTForCausalLM`]): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        text (`str`): The text.
        head (`tuple[int, int]`, *optional*): Layer and head whose rows are kept. Default: the most focused head.
        progress (`Progress`): Receives one stage.
        title (`str`): The model's name in the stage.

    Raises:
        `TextError`: If the text does not suit the model, or there is no such head.
    """
    with progress.stage(f"{title}: attention to one text"):
        diagnostics = diagnose_text(model, tokenizer, text, weights=True)
        layer, number = diagnostics.find_head(head)
    count = len(diagnostics.tokens)
    measured = MeasuredText("one text", f"sha256:{_digest(text)}", tokenizer, [], _whole_window(count))
    return AttentionResult(
        tokens=diagnostics.tokens,
        entropies=diagnostics.entropies.tolist(),
        head=[layer, number],
        weights=diagnostics.weights[layer, number].tolist(),
        conditions=_conditions(model, measured, count, count, seed=None),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _whole_window(tokens: int) -> Windows:
    return Windows(tokens, stride=tokens, separate=True, bos=False)


def _block_length(model: EntropyGPTForCausalLM, windows: Windows) -> int:
    """Tokens of a window and the one predicted after it, limited by the model's positions."""
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
        **collect_origin(model.device),
    )


def describe_config(config: EntropyGPTConfig) -> dict:
    """The settings of a model that its notation does not show: sizes, dropout, temperature and penalty."""
    names = [*SIZES, *(scalar.start for scalar in LEARNED_SCALARS if scalar.start and scalar.is_in(config))]
    if config.has_attention_shift:
        names += ["log_sum_coefficient"]
    if config.entropy_regularization:
        names += ["entropy_penalty", "entropy_coefficient", "entropy_tolerance", "entropy_maximum"]
    dropouts = {name: getattr(config, name) for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")}
    dropout = dropouts if len({*dropouts.values()}) > 1 else {"dropout": config.resid_pdrop}
    return dropout | {name: getattr(config, name) for name in names}
