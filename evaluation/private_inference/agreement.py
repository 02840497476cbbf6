"""How well a model's private answers agree with those in the clear."""

import numpy as np
import torch
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .inference import PLAINTEXT, PrivateModel
from .program.settings import PrivateSettings


@dataclass(config=RECORD)
class Agreement:
    """
    A trained model's private answers compared with those in the clear.

    Args:
        name (`str`): Architecture.
        runs (`int`): Sequences.
        positions (`int`): Number of positions, over all sequences.
        agreeing (`int`): At which the most likely token is the same.
        largest_error (`float`): Largest error of a logit.
        largest_logit (`float`): In the clear, in magnitude.
        perplexity, private_perplexity (`float`): Perplexities of the same tokens.
        out_of_range (`int`): Runs whose logits were beyond twice the largest in the clear.
    """

    name: str
    runs: int
    positions: int
    agreeing: int
    largest_error: float
    largest_logit: float
    perplexity: float
    private_perplexity: float
    out_of_range: int


def measure_agreement(
    model: EntropyGPTForCausalLM, prompts: np.ndarray, mode: str, settings: PrivateSettings | None = None
) -> Agreement:
    """
    Asks for the logits of all positions in the clear and in another mode.

    Args:
        model ([`EntropyGPTForCausalLM`]): A trained model.
        prompts (`np.ndarray`): Tokens, `(sequences, length)`.
        mode (`str`): As [`PrivateModel.infer`] knows it.
        settings ([`PrivateSettings`], *optional*): The defaults without.

    Raises:
        `PrivateInferenceError`: As [`PrivateModel.infer`].
    """
    asked = PrivateModel(model, settings)
    clear, private = (
        torch.from_numpy(np.stack(asked.infer(prompts, each, prompts.shape[1]).answers)) for each in (PLAINTEXT, mode)
    )
    largest = clear.abs().max().item()
    return Agreement(
        name=model.config.notation,
        runs=len(prompts),
        positions=prompts.size,
        agreeing=int((private.argmax(-1) == clear.argmax(-1)).sum()),
        largest_error=(private - clear).abs().max().item(),
        largest_logit=largest,
        perplexity=_perplexity(clear, prompts),
        private_perplexity=_perplexity(private, prompts),
        out_of_range=int((private.abs().amax(dim=(1, 2)) > 2 * largest).sum()),
    )


def _perplexity(logits: torch.Tensor, tokens: np.ndarray) -> float:
    targets = torch.from_numpy(tokens)[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), targets).exp().item()
