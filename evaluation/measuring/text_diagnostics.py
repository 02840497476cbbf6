"""What attention heads do on one text: the entropy of every row (arXiv 2501.03489, section 3), and the rows."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import modeling_entropy_gpt  # noqa: F401  registers the architecture
from entropy_gpt.evaluation.errors import TextError
from entropy_gpt.training.library_bars import library_bars_hidden

from .modes import eager_attention, evaluation_mode


MODEL_TYPES = ("entropy_gpt", "gpt2")
# What decoding makes of a part of a letter.
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class TextDiagnostics:
    """
    What attention heads do on one text.

    Args:
        tokens (`list[str]`):
            The tokens as text. A token that is a part of a letter is that letter with a number, such as "日[1/3]".
        entropies (`torch.Tensor` of shape `(layers, heads, tokens)`):
            Entropy of each head's row at each token, in nats. The row at token i sees i + 1 keys, so that its entropy
            is at most log(i + 1).
        weights (`torch.Tensor` of shape `(layers, heads, tokens, tokens)`, *optional*):
            The rows themselves: what each token (next to last dimension) attends to. The sum of a row is 1.
    """

    tokens: list[str]
    entropies: torch.Tensor
    weights: torch.Tensor | None = None

    @property
    def uniform(self) -> torch.Tensor:
        """Entropies of uniform attention in nats, of shape `(tokens,)`: the largest possible ones."""
        return torch.arange(1, len(self.tokens) + 1, dtype=self.entropies.dtype).log()

    def find_head(self, head: tuple[int, int] | None) -> tuple[int, int]:
        """
        Layer and head that were asked for, or the most focused head.

        Raises:
            `TextError`: If there is no such head.
        """
        if head is None:
            return self.most_focused_head
        layers, heads, _ = self.entropies.shape
        check_head(head, layers, heads)
        return head

    @property
    def most_focused_head(self) -> tuple[int, int]:
        """Layer and head whose rows have the lowest mean entropy; NaN counts as high."""
        means = self.entropies.mean(dim=-1).nan_to_num(nan=torch.inf)
        layer, head = divmod(int(means.argmin()), means.shape[1])
        return layer, head


def diagnose_text(
    model: PreTrainedModel | str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None,
    text: str,
    *,
    weights: bool = False,
) -> TextDiagnostics:
    """
    Looks at every head's attention to one text, of any GPT-2 that transformers loads and of every EntropyGPT.

    The model computes its attention as it always does, with its own scaling and temperatures. It stays as it was.
    Memory is that of one layer's attention matrices, and that of all layers with `weights`.

    Args:
        model (`PreTrainedModel`, `str` or `PathLike`):
            A model with any head or wrapper, such as PEFT's; or a folder, or a repository on the Hub.
        tokenizer (`PreTrainedTokenizerBase`, `str` or `PathLike`, *optional*):
            Its tokenizer, or where it is. `None` if it lies with the model.
        text (`str`): The text. Names of special tokens in it are these tokens, as the tokenizer has it.
        weights (`bool`): Whether to keep the attention matrices.

    Returns:
        [`TextDiagnostics`]: The tokens, every head's entropies and, on request, its attention matrices.

    Raises:
        `TextError`: If model or tokenizer can't be loaded or are no GPT-2's, or the text has no tokens or too many.

    Example:

    ```python
    import entropy_gpt

    diagnostics = entropy_gpt.diagnose_text("model_cards/models/converted", None, "def main(")
    print(diagnostics.tokens, diagnostics.entropies.mean(dim=-1))
    ```
    """
    if tokenizer is None:
        if isinstance(model, PreTrainedModel):
            raise TextError("A model in memory has no tokenizer: give its tokenizer too.")
        tokenizer = model
    if not isinstance(model, torch.nn.Module):
        model = _load(AutoModel, model)
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = _load(AutoTokenizer, tokenizer)
    body = _find_body(model)
    input_ids, tokens = encode_text(text, tokenizer, body.config)
    rows = []
    with evaluation_mode(model), eager_attention(body), _watched(body, rows, weights):
        body(torch.tensor([input_ids], device=body.wte.weight.device), use_cache=False)
    entropies, matrices = zip(*rows, strict=True)
    return TextDiagnostics(tokens, torch.stack(entropies), torch.stack(matrices) if weights else None)


def _load(auto_class: type, place: str | os.PathLike):
    try:
        with library_bars_hidden():
            return auto_class.from_pretrained(os.fspath(place))
    except Exception as error:  # readers raise whatever a damaged file makes them
        missing = "" if Path(place).exists() else "there is no such folder; "
        raise TextError(f"{place} can't be loaded: {missing}{' '.join(str(error).split())}") from error


def _find_body(model: torch.nn.Module) -> PreTrainedModel:
    """The blocks with their embeddings, whatever head or wrapper is around them."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "model_type", None) in MODEL_TYPES and hasattr(module, "wte"):
            return module
    raise TextError(f"{type(model).__name__} is no GPT-2: give a GPT-2 of transformers or an EntropyGPT.")


def _check_tokens(input_ids: list[int], config: PreTrainedConfig):
    if not input_ids:
        raise TextError("The text has no tokens: give at least one.")
    if len(input_ids) > config.n_positions:
        raise TextError(
            f"The text has {len(input_ids):,} tokens, and the model sees {config.n_positions:,}: give a shorter one."
        )
    if max(input_ids) >= config.vocab_size:
        raise TextError(
            f"The tokenizer makes a token {max(input_ids)}, and the model knows 0 to {config.vocab_size - 1}: give "
            "the one that it was trained with."
        )


def check_head(head: tuple[int, int], layers: int, heads: int):
    """
    Refuses a layer and head that a model does not have.

    Args:
        head (`tuple[int, int]`): Layer and head, from 0.
        layers (`int`): The model's layers.
        heads (`int`): Heads of a layer.

    Raises:
        `TextError`: If there is no such head.
    """
    if not (0 <= head[0] < layers and 0 <= head[1] < heads):
        raise TextError(
            f"There is no head {head[1]} in a layer {head[0]}: give layer and head, from 0,0 to "
            f"{layers - 1},{heads - 1}."
        )


@contextmanager
def _watched(
    body: PreTrainedModel, rows: list[tuple[torch.Tensor, torch.Tensor | None]], keep: bool
) -> Iterator[None]:
    """Collects the entropies of each layer, and its matrices if they are to be kept, while the body runs."""

    def collect(attention, inputs, outputs):
        matrix = outputs[1][0].float()
        matrix = matrix / matrix.sum(dim=-1, keepdim=True)  # a sum is not quite 1 in half precision
        rows.append((torch.special.entr(matrix).sum(dim=-1).cpu(), matrix.cpu() if keep else None))

    handles = [block.attn.register_forward_hook(collect) for block in body.h]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encode_text(
    text: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> tuple[list[int], list[str]]:
    """
    The tokens of a text, and what each is called.

    Args:
        text (`str`): The text.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        config (`PreTrainedConfig`): The model's configuration.

    Raises:
        `TextError`: If the text has no tokens or too many for the model, or the model does not know one.
    """
    encoding = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    input_ids = encoding["input_ids"]
    pieces = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in input_ids]
    _check_tokens(input_ids, config)
    return input_ids, _name_parts(text, pieces, encoding["offset_mapping"]) if tokenizer.is_fast else pieces


def _name_parts(text: str, pieces: list[str], spans: list[tuple[int, int]]) -> list[str]:
    """Decoded tokens, in which those that are parts of a letter have its name, with their number."""
    is_part = [REPLACEMENT in piece and piece != text[slice(*span)] for piece, span in zip(pieces, spans, strict=True)]
    names = []
    for (part, end), group in itertools.groupby(
        range(len(pieces)), key=lambda index: (is_part[index], is_part[index] and spans[index][1])
    ):
        group = list(group)
        if part:
            letters = text[spans[group[0]][0] : end]
            names += [f"{letters}[{number}/{len(group)}]" for number in range(1, len(group) + 1)]
        else:
            names += [pieces[index] for index in group]
    return names
