"""Prediction of the cost of private inference from architectures, without weights or engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from entropy_gpt.conversion.early_checks import is_model
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_model import (
    SET_UP_BYTES,
    PredictedStep,
    predict_passes,
    predict_phases,
)
from entropy_gpt.evaluation.private_inference.parties.drafts import ACCEPTED, expected_passes, most_drafts
from entropy_gpt.evaluation.private_inference.program.networks import WAN
from entropy_gpt.evaluation.private_inference.program.program import tables_bytes
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from modeling_entropy_gpt import EntropyGPTConfig

from .options import as_tuple, check_positive, read_options, with_argument_names
from .private_drafts import DraftOptions


HEAD_SIZE = 64
# GPT-2 small, for architectures whose sizes are not given.
DEFAULT_SIZES = {"n_layer": 12, "n_embd": 768, "vocab_size": 50257}


@dataclass(frozen=True)
class PredictedCost:
    """
    The predicted cost of one architecture.

    Args:
        title (`str`): The architecture, or the model, as it was given.
        config ([`EntropyGPTConfig`]): Its architecture and sizes.
        steps (`list[PredictedStep]`): The steps of the inference.
        key_bytes (`float`): Bytes of the keys, sent once per connection.
        table_bytes (`int`): Bytes of the embeddings, sent once to each client with "client_table".
        before (`list[PredictedStep]`): Steps that are done before the prompt comes, in no other number here.
        passes (`float`): How often the model is computed; with drafts, how often that is to be expected.
        plain ([`PredictedCost`], *optional*): With drafts, the same answer without them.
    """

    title: str
    config: EntropyGPTConfig
    steps: list[PredictedStep]
    key_bytes: float
    table_bytes: int
    before: list[PredictedStep]
    passes: float
    plain: "PredictedCost | None" = None

    @property
    def first_phase(self) -> "PredictedCost":
        """What is done before the prompt comes."""
        return replace(self, steps=self.before, before=[])

    @property
    def by_operation(self) -> dict[str, float]:
        """Bytes that both parties send, by operation."""
        totals: dict[str, float] = {}
        for step in self.steps:
            totals[step.operation] = totals.get(step.operation, 0) + step.total_bytes
        return totals

    @property
    def total_bytes(self) -> float:
        """Bytes that both parties send, without the set-up of their connection."""
        return sum(step.total_bytes for step in self.steps)

    @property
    def round_trips(self) -> float:
        """The round trips of all steps."""
        return sum(step.round_trips for step in self.steps)

    @property
    def seconds(self) -> float:
        """About how long two processes on two cores take, without a network between them."""
        return sum(step.seconds for step in self.steps)


@with_argument_names
def private_cost(
    architectures: str | Path | Sequence[str | Path],
    *,
    n_layer: int | None = None,
    n_embd: int | None = None,
    n_head: int | None = None,
    vocab_size: int | None = None,
    kept: int = 0,
    length: int = 128,
    max_new_tokens: int = 1,
    draft_acceptance: float | None = None,
    draft_tokens: int | None = None,
    draft_keep: str = ACCEPTED,
    all_positions: bool = False,
    embedding: str = "one_hot",
    network: str = WAN.name,
    prepared: bool = False,
) -> list[PredictedCost]:
    """
    Predicts the traffic and the round trips of private inference under Cheetah.

    Args:
        architectures (`str`, `Path` or a sequence of them):
            Architectures in the paper's notation, and models: folders, or repositories on the Hub.
        n_layer, n_embd, n_head, vocab_size (`int`, *optional*):
            The sizes of architectures that are given by their notation. Default: those of the first model, or of GPT-2
            small; heads of about 64 dimensions.
        kept (`int`): Earlier tokens, whose keys and values are cached.
        length (`int`): Tokens of the prompt.
        max_new_tokens (`int`): Tokens of the answer.
        draft_acceptance (`float`, *optional*):
            Predicts an answer with drafts, each of which is right with this probability if those before it are.
        draft_tokens (`int`, *optional*), draft_keep (`str`): As of [`PrivateClient`].
        all_positions (`bool`): Whether the logits of all positions are computed, not only those of the last one.
        embedding (`str`): "one_hot", "client_table" or "public", as in [`PrivateSettings`].
        network (`str`): What operations take their forms for: "LAN", "WAN", or such as "300Mbps,20ms".
        prepared (`bool`): Whether what needs no prompt is done before it comes.

    Returns:
        `list[PredictedCost]`: The cost of each architecture, in order.

    Raises:
        `UserError`: If an architecture is not known, a model can't be loaded, or the sizes do not fit.

    Example:

    ```python
    from entropy_gpt.workflows.private_cost import private_cost

    baseline, proposal = private_cost(["SM+LN+G", "EReg(SM(t)+ScFuFFN)"], length=256)
    print(baseline.total_bytes / proposal.total_bytes)
    ```
    """
    given = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "vocab_size": vocab_size}
    given = {name: size for name, size in given.items() if size is not None}
    check_positive(**given, seq=length, max_new_tokens=max_new_tokens)
    if kept < 0:
        raise UserError(f"--kept {kept}: give a number of at least 0.")
    settings = read_options(PrivateSettings, embedding=embedding, network=network)
    if all_positions and max_new_tokens > 1:
        raise UserError("--all-positions is for the prompt alone: leave out --max-new-tokens.")
    prompt = Span(kept, length, length if all_positions else 1)
    plain = expected_passes(prompt, max_new_tokens, 0, ACCEPTED, 0.0)
    options = read_options(DraftOptions, draft_tokens=draft_tokens, draft_keep=draft_keep)
    drafted = _expect_passes(prompt, max_new_tokens, draft_acceptance, options)
    if drafted and prepared:
        raise UserError("--prepared is not possible with --draft-acceptance: drafts are verified in one phase.")
    titles = [str(architecture) for architecture in as_tuple(architectures)]
    models = {title: load_language_model(title).config for title in titles if is_model(title)}
    of_model = {name: getattr(model, name) for model in [*models.values()][:1] for name in (*DEFAULT_SIZES, "n_head")}
    sizes = {**DEFAULT_SIZES, **of_model, **given}
    if n_head is None and (n_embd is not None or not models):
        sizes["n_head"] = count_heads(sizes["n_embd"])
    costs = []
    for title in titles:
        config = models.get(title) or _make_config(title, sizes, kept + length + max_new_tokens - 1)
        cost = _predict(title, config, settings, plain, prepared)
        costs.append(replace(_predict(title, config, settings, drafted, False), plain=cost) if drafted else cost)
    return costs


def count_heads(n_embd: int) -> int:
    """The number of heads that divides this width and gives heads of nearly 64 dimensions."""
    divisors = (heads for heads in range(1, n_embd + 1) if n_embd % heads == 0)
    return min(divisors, key=lambda heads: abs(n_embd / heads - HEAD_SIZE))


def _expect_passes(
    prompt: Span, new_tokens: int, acceptance: float | None, options: DraftOptions
) -> dict[Span, float] | None:
    """The passes of an answer with drafts, if there are to be any."""
    if acceptance is None:
        if options != DraftOptions():
            raise UserError(
                "--draft-tokens and --draft-keep are for drafts: give --draft-acceptance too, the share of drafts "
                "that are right."
            )
        return None
    if not 0 <= acceptance <= 1:
        raise UserError(f"--draft-acceptance {acceptance:g}: give a share from 0 to 1.")
    if new_tokens == 1:
        raise UserError("--draft-acceptance is for answers of several tokens: give --max-new-tokens of at least 2.")
    most = most_drafts(options.tokens, options.draft_keep, new_tokens)
    first = Span(prompt.start, prompt.length + most, 1 + most)
    return expected_passes(first, new_tokens, most, options.draft_keep, acceptance)


def _predict(
    title: str, config: EntropyGPTConfig, settings: PrivateSettings, passes: dict[Span, float], prepared: bool
) -> PredictedCost:
    end = max(span.end for span in passes)
    if end > config.n_positions:
        raise UserError(
            f"{title} has {config.n_positions} positions, and {end} are asked for: lower --seq or --max-new-tokens."
        )
    try:
        if prepared:
            before, steps = predict_phases(config, settings, [*passes])
        else:
            before, steps = [], predict_passes(config, settings, passes)
    except PrivateInferenceError as error:
        raise UserError(f"{title}: {error}") from error
    by_client = settings.embedding == "client_table"
    tables = tables_bytes(config.vocab_size, end, config.n_embd) if by_client else 0
    return PredictedCost(title, config, steps, SET_UP_BYTES, tables, before, sum(passes.values()))


def _make_config(notation: str, sizes: dict, positions: int) -> EntropyGPTConfig:
    tokens = {"bos_token_id": None, "eos_token_id": None, "n_positions": positions}
    try:
        config = EntropyGPTConfig.from_notation(notation, **sizes, **tokens)
        config.validate()
    except ValueError as error:
        raise UserError(f"{notation}: {error}") from error
    return config
