"""The variables of a program: their names, shapes and owners, and the client's input."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from .arithmetic import Arithmetic
from .counting import Shape, make_shape
from .program import EMBEDDINGS, LOGITS, NOISE, TABLES, TOKEN, TOKENS, ProgramConfig, weight_shapes
from .settings import PARTIES, SERVER, PrivateSettings
from .steps import Span, Step


def client_rank(settings: PrivateSettings) -> int:
    """The client's; a third party, and the only one of "ref2k", has nothing of its own or everything."""
    return min(1, PARTIES[settings.protocol] - 1)


def input_shapes(config: ProgramConfig, settings: PrivateSettings, span: Span) -> dict[str, tuple[int, int]]:
    """The client's inputs: their variables and their shapes."""
    if settings.embeds_at_home:
        shapes = {EMBEDDINGS: (span.length, config.n_embd)}
    else:
        shapes = {TOKENS: (span.length, config.vocab_size)}
    return shapes | ({NOISE: (span.answers, config.vocab_size)} if settings.answer == "sampled" else {})


def held_shapes(config: ProgramConfig, settings: PrivateSettings, rank: int) -> dict[str, tuple[int, ...]]:
    """
    What a party has before any prompt: the server the weights of the program, and the client the tables, where it
    looks embeddings up.
    """
    of_client = TABLES if settings.embeds_at_home else ()
    return {name: shape for name, shape in weight_shapes(config).items() if (name in of_client) != (rank == SERVER)}


def kept_shapes(config: ProgramConfig, length: int) -> dict[str, Shape]:
    """The keys and values of the first tokens, as a pass finds them."""
    shape = make_shape((config.n_head, length, config.n_embd // config.n_head))
    layers = range(config.n_layer if length else 0)
    return {f"h.{layer}.{name}": shape for layer in layers for name in ("keys", "values")}


def cut_back(config: ProgramConfig, length: int) -> Step:
    """Leaves the keys and values of the first tokens alone; each party cuts its own shares."""
    names = tuple(kept_shapes(config, length))
    return Step("cut keys, values", None, partial(take_first, length=length), names, names)


def take_first(ops: Arithmetic, *kept, length: int):
    """Of keys and values `(heads, tokens, head size)`, those of the first tokens."""
    return tuple(tensor[:, :length] for tensor in kept)


def program_variables(config: ProgramConfig, settings: PrivateSettings, span: Span) -> dict[str, Shape]:
    """What there is before a pass, and whose it is."""
    variables = {name: make_shape(shape, SERVER) for name, shape in held_shapes(config, settings, SERVER).items()}
    for name, shape in input_shapes(config, settings, span).items():
        variables[name] = make_shape(shape, client_rank(settings))
    return variables | kept_shapes(config, span.start)


def answer_name(settings: PrivateSettings) -> str:
    return LOGITS if settings.answer == "logits" else TOKEN


def encode_tokens(tokens: Sequence[int], vocabulary: int) -> np.ndarray:
    """One-hot rows."""
    return (np.asarray(tokens)[:, None] == np.arange(vocabulary)).astype(np.float32)


def client_inputs(
    config: ProgramConfig,
    settings: PrivateSettings,
    span: Span,
    tokens: Sequence[int],
    tables: dict,
    noise: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """
    What the client gives.

    Args:
        config ([`ProgramConfig`]), settings ([`PrivateSettings`]): Configuration and settings of the program.
        span ([`Span`]): Where the tokens stand.
        tokens (`Sequence[int]`): As many.
        tables (`dict`): The embeddings "wte" and "wpe", where the client looks them up.
        noise (`np.ndarray`, *optional*): With "sampled", what is added to logits `(answers, vocabulary)`; or zeros.
    """
    shapes = input_shapes(config, settings, span)
    if settings.embeds_at_home:
        inputs = {EMBEDDINGS: tables["wte"][np.asarray(tokens)] + tables["wpe"][span.start : span.end]}
    else:
        inputs = {TOKENS: encode_tokens(tokens, config.vocab_size)}
    if NOISE in shapes:
        inputs[NOISE] = np.zeros(shapes[NOISE], np.float32) if noise is None else noise
    return inputs
