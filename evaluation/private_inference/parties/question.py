"""What a client asks of a server, and what is refused of it before anything is sent."""

from collections.abc import Sequence
from dataclasses import dataclass

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig, build_steps
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span

from .drafts import Drafts
from .sampling import GREEDY, MOST_TEMPERATURE, Sampling
from .terms import Terms


@dataclass(frozen=True)
class Question:
    """
    A prompt, and what is wanted of its continuation.

    Args:
        prompt (`list[int]`): Tokens; they stay with the client.
        new_tokens (`int`): Number of tokens in the answer; public.
        answers (`int`): Number of last positions of the prompt whose logits are wanted; public.
        sampling ([`Sampling`]): How tokens are chosen from the logits; it stays with the client.
        drafts ([`Drafts`], *optional*): How the client drafts tokens that are verified.
    """

    prompt: list[int]
    new_tokens: int = 1
    answers: int = 1
    sampling: Sampling = GREEDY
    drafts: Drafts | None = None

    @property
    def public(self) -> dict[str, int]:
        """What the server learns of it."""
        drafts = self.drafts.most(self.new_tokens) if self.drafts else 0
        return {
            "length": len(self.prompt),
            "new_tokens": self.new_tokens,
            "answers": self.answers,
            "drafts": drafts,
        }

    def check(self, terms: Terms):
        """
        Raises:
            `PrivateInferenceError`: If the model can't answer this, whatever becomes of the connection.
        """
        check_request(terms.config, terms.settings, **self.public)
        check_sampling(terms.settings, self.sampling)
        check_prompt(self.prompt, terms.config.vocab_size)


def check_request(
    config: ProgramConfig, settings: PrivateSettings, length: int, new_tokens: int, answers: int, drafts: int = 0
):
    """
    Raises:
        `PrivateInferenceError`: If the model can't answer so much.
    """
    build_steps(config, settings, Span(0, length + new_tokens - 1))
    if drafts > new_tokens - 1:
        raise PrivateInferenceError(f"{drafts} drafts are not possible in an answer of {new_tokens} tokens.")
    if answers > length or (answers > 1 and new_tokens > 1):
        raise PrivateInferenceError(f"answers={answers} positions are not possible with {length} tokens and more.")


def check_prompt(prompt: Sequence[int], vocab_size: int):
    """
    Raises:
        `PrivateInferenceError`: If a token is not one of the model's, for which an embedding of zeros would be taken.
    """
    if unknown := [token for token in prompt if not 0 <= token < vocab_size]:
        raise PrivateInferenceError(
            f"token {unknown[0]} is not one of the model's, which go from 0 to {vocab_size - 1}."
        )


def check_sampling(settings: PrivateSettings, sampling: Sampling):
    """
    Raises:
        `PrivateInferenceError`: If tokens would have to be drawn from logits that the client does not learn.
    """
    if settings.answer == "logits" or not sampling.temperature:
        return
    if settings.answer == "token":
        raise PrivateInferenceError(
            f"temperature={sampling.temperature:g} is not possible: this server answers with the most likely tokens "
            "alone, not with logits. Use temperature 0, or a server with --answer sampled."
        )
    if sampling.temperature > MOST_TEMPERATURE:
        raise PrivateInferenceError(
            f"temperature={sampling.temperature:g} is not possible: {MOST_TEMPERATURE:g} is the most with a server "
            "that answers with sampled tokens."
        )
    for name, value in (("top_k", sampling.top_k is not None), ("top_p", sampling.top_p < 1)):
        if value:
            raise PrivateInferenceError(
                f"{name}={getattr(sampling, name):g} is not possible: this server answers with sampled tokens alone, "
                "and which logits are largest is not known outside of them. Use the temperature alone."
            )
