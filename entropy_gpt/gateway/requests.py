"""A request for a completion: OpenAI's fields, those that are possible here, and what they may be."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.question import check_prompt, check_sampling
from entropy_gpt.evaluation.private_inference.parties.sampling import Sampling
from entropy_gpt.workflows.private_answer import tokenize
from entropy_gpt.workflows.private_client import PrivateClient

from .errors import ProtocolError


MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS, MOST_DIGITS = 128, 5, 4, 100
# Fields of OpenAI's that have no private form, with the values that ask for nothing.
WITHOUT_EFFECT = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}

Token = Annotated[int, Field(ge=0)]
Stop = Annotated[str, StringConstraints(min_length=1)]


class StreamOptions(BaseModel):
    """What a stream holds besides text: the usage at its end, and while it goes on, what each step costs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_costs: bool = False


class CompletionRequest(BaseModel):
    """The body of a request; the fields are OpenAI's, and so are their defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: str | list[Token] | list[str] | list[list[Token]]
    max_tokens: int | None = Field(16, ge=0)
    temperature: float | None = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(1.0, ge=0, le=1)
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stop | list[Stop] | None = None
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """The texts before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, choice: int = 0, place: int = 0) -> Sampling:
        """How the tokens of one of the `n` answers are chosen, from a place in it on."""
        temperature, top_p = (1.0 if value is None else value for value in (self.temperature, self.top_p))
        seed = None
        if self.seed is not None:
            (seed,) = np.random.SeedSequence([self.seed % 2**64, choice, place]).generate_state(1, np.uint64).tolist()
        return Sampling(temperature, top_p=top_p, seed=seed)

    @property
    def new_tokens(self) -> int:
        """Those that are asked for."""
        return 16 if self.max_tokens is None else self.max_tokens


def read_request(body: bytes) -> CompletionRequest:
    """
    Raises:
        `ProtocolError`: If the body is no JSON, or a field is unknown, has no private form, or has a value that it
            can't have; the message names the field.
    """
    content = read_object(body)
    for name, values in WITHOUT_EFFECT.items():
        if name in content and content.pop(name) not in values:
            raise ProtocolError(
                400, f"{name} is not supported by a private model: leave it out.", name, "unsupported_field"
            )
    try:
        request = CompletionRequest.model_validate(content)
    except ValidationError as error:
        raise _describe(error) from error
    if request.stream_options is not None and not request.stream:
        raise ProtocolError(400, "stream_options needs stream=true.", "stream_options")
    if len(request.stops) > MOST_STOPS:
        raise ProtocolError(400, f"stop has {len(request.stops)} texts: {MOST_STOPS} is the most.", "stop")
    return request


def read_object(body: bytes) -> dict[str, Any]:
    """
    Raises:
        `ProtocolError`: If the body is no JSON object, or holds half of a pair of surrogates, which is no text.
    """
    try:
        content = json.loads(body, parse_constant=_refuse, parse_int=_read_integer)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ProtocolError(400, "a text has half of a pair of surrogates.", code="invalid_text") from error
    except (ValueError, RecursionError) as error:
        raise ProtocolError(400, f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(content, dict):
        raise ProtocolError(400, 'the body is no JSON object: send {"model": ..., "prompt": ...}', code="invalid_json")
    return content


def read_prompts(request: CompletionRequest, client: PrivateClient) -> list[list[int]]:
    """
    The prompts of a request in tokens.

    Raises:
        `ProtocolError`: If there is none, or the model can't answer one as asked.
    """
    prompt = request.prompt
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    given = prompt if several else [prompt]
    choices = len(given) * (request.n or 1)
    if choices > MOST_CHOICES:
        raise ProtocolError(400, f"{choices} answers are asked for at once: {MOST_CHOICES} is the most.", "n")
    prompts = [tokenize(each, client.tokenizer) if isinstance(each, str) and each else list(each) for each in given]
    for tokens in prompts:
        _check(request, tokens, client)
    return prompts


def _check(request: CompletionRequest, tokens: list[int], client: PrivateClient):
    if not tokens:
        raise ProtocolError(400, "the prompt is empty: give some text.", "prompt")
    config, settings = client.terms.config, client.terms.settings
    if settings.answer != "logits" and request.logprobs is not None:
        message = "logprobs are not possible: this server answers with tokens alone, not with logits."
        raise ProtocolError(400, message, "logprobs", "unsupported_field")
    needed = len(tokens) + max(0, request.new_tokens - 1)  # the last token is computed, and not read
    if needed > config.n_positions:
        raise ProtocolError(
            400,
            f"the prompt has {len(tokens)} tokens, and {request.new_tokens} more are asked for: this model has "
            f"{config.n_positions} positions. Shorten the prompt, or ask for a smaller max_tokens.",
            "prompt" if len(tokens) > config.n_positions else "max_tokens",
            "context_length_exceeded",
        )
    with _blaming("prompt"):
        check_prompt(tokens, config.vocab_size)
    with _blaming("temperature"):
        check_sampling(settings, replace(request.sampling(), top_p=1.0))
    with _blaming("top_p"):
        check_sampling(settings, request.sampling())


@contextlib.contextmanager
def _blaming(field: str) -> Iterator[None]:
    """Makes an answer to the request of what is wrong with one of its fields."""
    try:
        yield
    except PrivateInferenceError as error:
        raise ProtocolError(400, str(error), field) from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _read_integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _describe(error: ValidationError) -> ProtocolError:
    """The first field that is wrong; fields of several types have an entry for each, of which the last is kept."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))
        return ProtocolError(400, f"{name} is no field that is supported here: leave it out.", name, "unknown_field")
    if first["type"] == "missing":
        return ProtocolError(400, f"{name} is missing.", name, "missing_field")
    if name == "prompt":
        return ProtocolError(400, "prompt is not a text, a list of texts, or one or several lists of tokens.", name)
    if name == "stop":
        return ProtocolError(400, "stop is not a text or a list of texts that are not empty.", name)
    return ProtocolError(400, f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}.", name)
