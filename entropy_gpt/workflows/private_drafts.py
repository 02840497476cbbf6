"""A client's own model, with which it drafts what a private server's model may say."""

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass as record
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from entropy_gpt.conversion.early_checks import check_model, expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.json_records import RECORD
from entropy_gpt.evaluation.private_inference.parties.draft_model import DraftModel
from entropy_gpt.evaluation.private_inference.parties.drafts import ACCEPTED, DRAFT_TOKENS, Drafts, Keep
from entropy_gpt.training.errors import CorpusError
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.tokenizer import load_tokenizer


@record(config=RECORD)
class DraftOptions:
    """How drafts are verified, by the options of the command."""

    draft_tokens: int | None = Field(None, ge=1)
    draft_keep: Keep = ACCEPTED

    @property
    def tokens(self) -> int:
        """
        The most drafts that a pass verifies.

        Raises:
            `UserError`: If the options contradict each other.
        """
        if self.draft_keep != ACCEPTED and self.draft_tokens is not None:
            raise UserError(
                f"--draft-tokens is for --draft-keep {ACCEPTED}: with {self.draft_keep}, all tokens of the answer are "
                "drafted."
            )
        return self.draft_tokens or DRAFT_TOKENS


@dataclass(frozen=True)
class LoadedDrafts:
    """Drafts of a model, and the tokenizer whose tokens they are."""

    drafts: Drafts
    tokenizer: PreTrainedTokenizerFast = field(repr=False)


def load_drafts(draft: str | Path, options: DraftOptions) -> LoadedDrafts:
    """
    Loads a draft model.

    Args:
        draft (`str` or `Path`): A causal language model with its tokenizer: a folder, or a repository on the Hub.
        options ([`DraftOptions`]): How its drafts are verified.

    Raises:
        `UserError`: If it can't be loaded, or the options contradict each other.
    """
    tokens = options.tokens
    check_model(draft)
    place = expanded(draft)
    try:
        with library_bars_hidden():
            model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False)
        tokenizer = load_tokenizer(place)
    except CorpusError as error:
        raise UserError(f"--draft needs a model with its tokenizer: {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--draft {draft} is no causal language model that can be loaded: {error}") from error
    return LoadedDrafts(Drafts(DraftModel(model), tokens, options.draft_keep), tokenizer)
