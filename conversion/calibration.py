"""Statistics of a model's activations over real text: what the steps of a conversion are fitted to.

Text streams through the model once, and sums are kept: what they take depends on the model, not on the text. Every
fifth block is kept apart, so that what is fitted to the others can be tried on rows it has not seen.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from modeling_entropy_gpt import EntropyGPTForCausalLM
from modeling_entropy_gpt.blocks import EntropyGPTAttention, EntropyGPTMLP
from modeling_entropy_gpt.layers import build_activation

from .errors import ConversionError


# Rows of the residual stream that differ from others, and so are kept apart: in trained GPT-2s the first position is
# several times as large as the rest (arXiv 2409.13710, 2507.02559).
FIRST_POSITION, END_OF_TEXT, OTHERS = range(3)
# One block in this many is held out of the fit.
HELD_OUT_EVERY = 5
# A least squares fit wants several rows for each feature; below this, it follows chance.
LEAST_ROWS_PER_FEATURE = 4
# Higher whenever other statistics are collected, so that those kept before are not taken for these.
STATISTICS_VERSION = 3
# Fields of the configuration that statistics do not depend on: the final norm's, the head's, and the dtype, which the
# weights have.
HEAD_FIELDS = ("final_normalization", "tie_word_embeddings", "head_bias", "dtype")


@dataclass(frozen=True)
class Calibration:
    """
    Sums over the rows (tokens) of a text, by name.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            - `<norm>.rows`, float64 of shape `(3, 3)`: for the first position, for end-of-text tokens and for others
              the number of rows, the sum of their standard deviations, and that of the squares of these;
            - `<block>.scale`, float64 of shape `(2,)`: number of rows, sum of the mean squares of the residual stream
              after the block;
            - `<block>.attn.entropies`, float64 of shape `(heads,)`: sum of the entropies of attention rows, in nats;
            - `<block>.attn.largest`, float32 of shape `(heads, context)`, on request: the median over sequences of
              the largest score that each position's query has, temperatures included;
            - `<block>.attn.log_sums`, the same of log-sum-exp of the scores;
            - `<ffn>.fit` and `<ffn>.held_out`, float32 of shape `(1 + features, 1 + features + n_embd)`: the second
              moments `sum [1, u]^T [1, u, y]` of what a linear map reads and what the FFN writes;
            - `keys`, float64 of shape `(2,)`: number of attention rows, sum of the logarithms of their keys' numbers.
        context (`int`): Length of a sequence in tokens.
    """

    tensors: dict[str, torch.Tensor]
    context: int

    @property
    def rows(self) -> int:
        """Number of tokens seen."""
        return int(self.tensors["keys"][0])

    def norm_constant(self, name: str, group: int = OTHERS) -> float:
        """
        The constant c for which `1 / c` is nearest to `1 / std(x)` over a norm's input rows x, in least squares
        weighted by their lengths (as arXiv 2602.10408 scales): the mean of the squared standard deviations over the
        mean of the deviations.
        """
        _, total, squares = self.row_deviations(name)[group].tolist()
        return squares / total

    def row_deviations(self, name: str) -> torch.Tensor:
        """`<norm>.rows`; where a group has no row, the sums of the others stand for it."""
        sums = self.tensors[f"{name}.rows"]
        return sums.where(sums[:, :1] > 0, sums[OTHERS])

    def residual_scale(self, name: str) -> float:
        """Root of the mean square of the residual stream after a block."""
        count, squares = self.tensors[f"{name}.scale"].tolist()
        return math.sqrt(squares / count)

    def threshold(self, name: str, maximum: str) -> torch.Tensor:
        """
        The mean row entropy of each head of an attention, as a part of the largest (Algorithm 1's theta).

        Args:
            name (`str`): The attention's name.
            maximum (`str`): `"context"`: of log T; `"causal"`: of the mean of log i over rows with i keys.

        Returns:
            `torch.Tensor` of shape `(heads,)`, between 0 and 1.
        """
        count, log_keys = self.tensors["keys"].tolist()
        largest = math.log(self.context) if maximum == "context" else log_keys / count
        return (self.tensors[f"{name}.entropies"] / count / largest).clamp(0, 1).float()

    def shift(self, name: str, positions: int, function: str) -> torch.Tensor:
        """
        Shifts of the scores of an attention, each a median over sequences: of the largest score of a row, or for
        softmax of its log-sum-exp, which the penalty on log-sums draws to the shift.

        Args:
            name (`str`): The attention's name.
            positions (`int`): Number of positions; those behind the context have the shift of the last one in it.
            function (`str`): The attention function.

        Returns:
            `torch.Tensor` of shape `(heads, positions)`. It needs a calibration with the largest scores.
        """
        medians = self.tensors[f"{name}.log_sums" if function == "softmax" else f"{name}.largest"]
        last = medians[:, -1:].expand(-1, max(0, positions - medians.shape[1]))
        return torch.cat([medians[:, :positions], last], dim=1)

    def save(self, path: Path):
        """Writes the statistics as safetensors."""
        save_file(self.tensors, path, metadata={"context": str(self.context)})

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """
        Reads what [`Calibration.save`] wrote.

        Raises:
            `ConversionError`: If the file is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
                return cls(tensors, int(file.metadata()["context"]))
        except (SafetensorError, KeyError, TypeError) as error:
            raise ConversionError(f"{path} holds no statistics of a calibration ({error}): delete it.") from error


@torch.no_grad()
def calibrate(
    model: EntropyGPTForCausalLM,
    batches: Iterable[torch.Tensor],
    hidden_activation: str | None = None,
    largest_scores: bool = False,
    on_blocks: Callable[[int], None] = lambda count: None,
) -> Calibration:
    """
    Streams text through a model once, without dropout, and sums up what the steps of a conversion need.

    Args:
        model ([`EntropyGPTForCausalLM`]): Any architecture.
        batches (`Iterable[torch.Tensor]`): Blocks of tokens, `(batch, context)`; all of one length.
        hidden_activation (`str`, *optional*):
            If given, the moments of the FFNs are those of their hidden features under this activation; without, those
            of their inputs.
        largest_scores (`bool`, *optional*, defaults to `False`):
            Whether to collect the largest scores and the log-sums, which takes whole matrices of scores: as much time
            again or more.
        on_blocks: Called with the number of blocks after each batch, for progress.

    Raises:
        `ConversionError`: If there is too little text for a fit, blocks have one token, or activations are not finite.
    """
    was_training = model.training
    model.eval()
    sums = _Sums(model, hidden_activation, largest_scores)
    context = 0
    try:
        for input_ids in batches:
            context = input_ids.shape[1]
            sums.begin_batch(input_ids.to(model.device))
            outputs = model.transformer(sums.input_ids, use_cache=False, output_entropies=True)
            sums.add_entropies(outputs)
            on_blocks(len(input_ids))
    finally:
        sums.remove_hooks()
        model.train(was_training)
    sums.take_medians()
    calibration = Calibration({name: tensor.cpu() for name, tensor in sums.tensors.items()}, context)
    _check(calibration)
    return calibration


def group_rows(input_ids: torch.Tensor, end_of_text: int | list[int] | None) -> torch.Tensor:
    """Which group each token of `(batch, length)` belongs to: first position, end of text, or the others."""
    groups = torch.full_like(input_ids, OTHERS)
    tokens = [] if end_of_text is None else end_of_text
    groups[torch.isin(input_ids, torch.as_tensor(tokens, dtype=input_ids.dtype, device=input_ids.device))] = (
        END_OF_TEXT
    )
    groups[:, 0] = FIRST_POSITION
    return groups


def fingerprint(
    model: EntropyGPTForCausalLM,
    batches: Iterable[torch.Tensor],
    hidden_activation: str | None,
    largest_scores: bool = False,
    with_head: bool = False,
) -> str:
    """
    A name for the statistics of this model over this text; another for any other weights, settings or text. The final
    norm and the head, which statistics do not depend on, count on request alone.
    """
    config = {name: value for name, value in model.config.to_dict().items() if with_head or name not in HEAD_FIELDS}
    kinds = f"{STATISTICS_VERSION}\0{json.dumps(config, sort_keys=True)}\0{hidden_activation}\0{largest_scores}\0"
    digest = hashlib.sha256(kinds.encode())
    for name, tensor in model.state_dict().items():
        if with_head or not name.startswith(("transformer.ln_f.", "lm_head.")):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    for input_ids in batches:
        digest.update(f"{tuple(input_ids.shape)}".encode())
        digest.update(input_ids.contiguous().numpy())
    return digest.hexdigest()[:32]


def least_rows(model: EntropyGPTForCausalLM, hidden_activation: str | None = None) -> int:
    """
    The least number of tokens that a calibration takes, those that are held out included; in no fewer than
    `HELD_OUT_EVERY` blocks.
    """
    features = model.config.n_embd if hidden_activation is None else model.config.inner_size
    return math.ceil(LEAST_ROWS_PER_FEATURE * features * HELD_OUT_EVERY / (HELD_OUT_EVERY - 1))


class _Sums:
    """The sums, and the hooks that add to them."""

    def __init__(self, model: EntropyGPTForCausalLM, hidden_activation: str | None, largest_scores: bool):
        self.tensors: dict[str, torch.Tensor] = {}
        self.epsilon = model.config.layer_norm_epsilon
        self.end_of_text = model.config.eos_token_id
        self.activation = None if hidden_activation is None else build_activation(hidden_activation).to(model.device)
        self.blocks_before = 0
        self.row_numbers: dict[str, list[torch.Tensor]] = {}
        self.handles = [self._watch_norm("transformer.ln_f", model.transformer.ln_f)]
        for index, block in enumerate(model.transformer.h):
            name = f"transformer.h.{index}"
            self.handles.append(self._watch_norm(f"{name}.ln_1", block.ln_1))
            self.handles.append(block.register_forward_hook(self._scale_hook(name)))
            if largest_scores:
                scores_hook = self._scores_hook(f"{name}.attn", block.attn)
                self.handles.append(block.attn.c_attn.register_forward_hook(scores_hook))
            if block.mlp is None:
                continue
            self.handles.append(self._watch_norm(f"{name}.ln_2", block.ln_2))
            if self.activation is None:
                self.handles.append(block.mlp.register_forward_hook(self._moments_hook(f"{name}.mlp")))
            elif isinstance(block.mlp, EntropyGPTMLP):
                self.handles += self._watch_hidden_features(f"{name}.mlp", block.mlp)

    def begin_batch(self, input_ids: torch.Tensor):
        """Tells the rows of the next forward pass apart."""
        self.input_ids = input_ids
        self.group = group_rows(input_ids, self.end_of_text)
        index = self.blocks_before + torch.arange(len(input_ids), device=input_ids.device)
        self.is_held_out = index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        self.blocks_before += len(input_ids)

    def add_entropies(self, outputs):
        keys = outputs.visible_keys.double().log().expand(self.input_ids.shape)
        self._add("keys", torch.tensor([keys.numel(), keys.sum()], dtype=torch.double, device=keys.device))
        for layer, entropies in enumerate(outputs.attention_entropies):
            self._add(f"transformer.h.{layer}.attn.entropies", entropies.double().sum(dim=(0, 2)))

    def take_medians(self):
        """Of the largest scores and of log-sums, over all sequences."""
        for name, numbers in self.row_numbers.items() if self.blocks_before else ():
            self.tensors[name] = torch.cat(numbers).median(dim=0).values

    def remove_hooks(self):
        for handle in self.handles:
            handle.remove()

    def _add(self, name: str, value: torch.Tensor):
        if name in self.tensors:
            self.tensors[name] += value
        else:
            self.tensors[name] = value

    def _watch_norm(self, name: str, norm: nn.Module):
        def add_deviations(module, arguments, output):
            deviations = (arguments[0].double().var(dim=-1, unbiased=False) + self.epsilon).sqrt().flatten()
            sums = deviations.new_zeros(3, 3)
            values = torch.stack([torch.ones_like(deviations), deviations, deviations.square()], dim=1)
            self._add(f"{name}.rows", sums.index_add_(0, self.group.flatten(), values))

        return norm.register_forward_hook(add_deviations)

    def _scale_hook(self, name: str):
        def add_scale(module, arguments, output):
            squares = output[0].double().square().mean(dim=-1)
            self._add(f"{name}.scale", torch.stack([torch.full_like(squares.sum(), squares.numel()), squares.sum()]))

        return add_scale

    def _scores_hook(self, name: str, attention: EntropyGPTAttention):
        largest, log_sums = (self.row_numbers.setdefault(f"{name}.{kind}", []) for kind in ("largest", "log_sums"))

        def add_numbers(module, arguments, output):
            length = output.shape[1]
            query, key, _ = (
                states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for states in output.chunk(3, dim=-1)
            )
            if attention.temperature is not None:
                query = query * attention.temperature(torch.arange(length, device=output.device)[None])
            later = torch.ones(length, length, dtype=torch.bool, device=output.device).triu(1)
            for queries, keys in zip(query, key, strict=True):  # one sequence's matrices at a time
                scores = (torch.matmul(queries, keys.mT) * attention.scaling).masked_fill(later, -math.inf)
                largest.append(scores.amax(dim=-1)[None].float().cpu())
                log_sums.append(scores.logsumexp(dim=-1)[None].float().cpu())

        return add_numbers

    def _moments_hook(self, name: str):
        def add_moments(module, arguments, output):
            self._add_moments(name, arguments[0], output)

        return add_moments

    def _watch_hidden_features(self, name: str, mlp: nn.Module):
        features = {}

        def keep(module, arguments, output):
            features["hidden"] = self.activation(output)

        def add_moments(module, arguments, output):
            self._add_moments(name, features.pop("hidden"), output)

        return [mlp.c_fc.register_forward_hook(keep), mlp.register_forward_hook(add_moments)]

    def _add_moments(self, name: str, read: torch.Tensor, written: torch.Tensor):
        for split, rows in (("fit", ~self.is_held_out), ("held_out", self.is_held_out)):
            u, y = read[rows].flatten(0, 1).float(), written[rows].flatten(0, 1).float()
            u = torch.cat([u.new_ones(len(u), 1), u], dim=1)
            self._add(f"{name}.{split}", u.mT @ torch.cat([u, y], dim=1))


def _check(calibration: Calibration):
    if not calibration.tensors:
        raise ConversionError("There is no calibration text: give at least some thousand tokens.")
    if calibration.context < 2:
        raise ConversionError("Blocks of 1 token have no row with a choice between keys: give at least 2.")
    if (blocks := calibration.rows // calibration.context) < HELD_OUT_EVERY:
        raise ConversionError(
            f"Too little calibration text: {blocks} blocks of {calibration.context:,} tokens, and at least "
            f"{HELD_OUT_EVERY} are taken, of which one is held out to choose between fits. Give more text, or shorter "
            "blocks."
        )
    for name, tensor in calibration.tensors.items():
        if not tensor.isfinite().all():
            raise ConversionError(f"Activations are not finite at {name.rpartition('.')[0] or name}: wrong weights?")
        if name.endswith(".fit"):
            rows, features = int(tensor[0, 0]), len(tensor) - 1
            if rows < LEAST_ROWS_PER_FEATURE * features:
                raise ConversionError(
                    f"Too little calibration text: {rows:,} tokens to fit {features:,} features to, without the one "
                    f"block in {HELD_OUT_EVERY} that is held out. Each feature takes at least "
                    f"{LEAST_ROWS_PER_FEATURE}: give more text."
                )
