# SPDX-License-Identifier: Apache-2.0
"""Keywords of the forward passes: what they are called in each release of transformers, and which ones are refused."""

import difflib
import functools
import inspect
from collections.abc import Callable

import torch
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import TransformersKwargs
from transformers.utils.deprecation import deprecate_kwarg


# The name of keys and values for decoding among arguments and outputs; 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# What transformers itself hands down, in addition to the keywords that it declares.
OF_DECORATORS = ("return_dict", "debug_io", "debug_io_dir", "prune_layers")
OF_LOSSES = ("ignore_index", "shift_labels")
OF_EARLIER_RELEASES = ("cache_position",)  # tools still give it; transformers' own models do without it too
# `generate` hands its own down to each forward pass, unlike what it hands to the model.
OF_GENERATION = ("assistant_model", "assistant_tokenizer", "streamer", "synced_gpus", "tokenizer")
OF_CONTINUOUS_BATCHING = (
    "block_table",
    "cache",
    "logits_indices",
    "logits_processor_args",
    "max_seqlen_k",
    "max_seqlen_q",
    "read_index",
    "write_index",
)
KNOWN = frozenset(TransformersKwargs.__annotations__).union(
    OF_DECORATORS, OF_LOSSES, OF_EARLIER_RELEASES, OF_GENERATION
)
OF_CROSS_ATTENTION = ("encoder_hidden_states", "encoder_attention_mask")


def takes_cache(forward: Callable) -> Callable:
    """
    Gives the parameter `past_key_values` of a forward pass the release's name. Where that is `cache`, the old name is
    taken with a warning, as by transformers' own models, and both at once are a `ValueError`.
    """
    if CACHE == "past_key_values":
        return forward
    signature = inspect.signature(forward)
    parameters = [p.replace(name=CACHE) if p.name == "past_key_values" else p for p in signature.parameters.values()]

    @functools.wraps(forward)
    def renamed(self, *args, **kwargs):
        if CACHE in kwargs:
            kwargs["past_key_values"] = kwargs.pop(CACHE)
        return forward(self, *args, **kwargs)

    deprecated = deprecate_kwarg("past_key_values", "5.40.0", new_name=CACHE, raise_if_both_names=True)(renamed)

    @functools.wraps(forward)
    def with_one_name(self, *args, **kwargs):
        names = [name for name in (CACHE, "past_key_values") if name in kwargs]
        if len(names) == 2 and (missing := [name for name in names if kwargs[name] is None]):
            del kwargs[missing[0]]  # one of them was left out
        return deprecated(self, *args, **kwargs)

    with_one_name.__signature__ = signature.replace(parameters=parameters)
    return with_one_name


def is_paged(cache: Cache | None) -> bool:
    """Whether a cache is that of continuous batching, which is no [`Cache`] and keeps neither lengths nor masks."""
    return isinstance(cache, PagedAttentionCache)


def check_keywords(model: PreTrainedModel, keywords: dict, cache: Cache | None):
    """
    Checks what reached a forward pass's `**kwargs`.

    Args:
        model (`PreTrainedModel`): The model, whose forward pass names the keywords that it computes.
        keywords (`dict`): The others.
        cache (`Cache`, *optional*): The cache; before 5.24 that of continuous batching is among the keywords.

    Raises:
        `ValueError`: If cross-attention is asked for.
        `TypeError`: If a keyword is none that transformers hands to every model.
    """
    for name in OF_CROSS_ATTENTION:
        if keywords.pop(name, None) is not None:
            raise ValueError(f"{name} was given, but {type(model).__name__} has no cross-attention: leave it out.")
    known = KNOWN
    if is_paged(cache) or is_paged(keywords.get("cache")):
        known = KNOWN.union(OF_CONTINUOUS_BATCHING)
    for name in keywords.keys() - known:
        # A head hands on what it does not name itself.
        signatures = (inspect.signature(each.forward) for each in (model, model.base_model))
        parameters = {name: None for signature in signatures for name in signature.parameters}
        named = [name for name in parameters if name not in ("self", "kwargs")]
        if name in named:
            continue
        nearest = difflib.get_close_matches(name, [*named, *KNOWN], n=1)
        hint = f"did you mean {nearest[0]!r}? It" if nearest else "it"
        raise TypeError(
            f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}; {hint} takes "
            f"{', '.join(named)}, and what transformers hands to every model."
        )


def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states of the last `logits_to_keep` positions (0: all), or of the positions that a tensor names."""
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[:, kept]


__all__ = ["CACHE", "check_keywords", "is_paged", "slice_logits_to_keep", "takes_cache"]
