"""A model's folder as others get it: put together out of what is known of the model, and looked through."""

import re
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast
from yaml import YAMLError

import modeling_entropy_gpt
from entropy_gpt.conversion.tokenizer_files import VOCABULARY, save_tokenizer
from entropy_gpt.evaluation.errors import PublicationError
from entropy_gpt.evaluation.measuring.remote_loading import RemoteLoadingError, load_in_fresh_process, save_reference
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult, save_results
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .model_card import PROMPT, model_card


CARD, PICTURE, FOLDED = "README.md", "headwise_entropy.png", "folded"
# All that such a folder may hold; the folded model's folder has weights and configurations alone.
WEIGHTS = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
TOKENIZER = (*VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
PAYLOAD = tuple(
    path.name for path in Path(modeling_entropy_gpt.__file__).parent.glob("*.py") if path.name != "__init__.py"
)
PUBLIC = (RESULTS, CARD, PICTURE, *WEIGHTS, *TOKENIZER, *PAYLOAD, *(f"{FOLDED}/{name}" for name in WEIGHTS))
# What only binary files hold is not read.
BINARY = (".safetensors", ".png")

SECRETS = {
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{20,}",
    "a token of GitHub": r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
# Not looked for among the words of a tokenizer, which may be such pieces of text.
PATHS = {"a path of somebody's home": r"(?<![\w.])(/home/|/Users/|/root/|[A-Za-z]:\\+Users\\+)[\w.-]+"}
CHECKED_TOKENS = 64
LARGEST_DIFFERENCE = 1e-5
# Part of the largest logit, by the rounding of weights that were multiplied with others.
LARGEST_FOLDED_SHARE = {torch.float64: 1e-10, torch.float32: 1e-4}
HALF_PRECISION_SHARE = 0.05


def assemble(
    model: EntropyGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    result: ModelResult,
    folder: Path,
    licence: str | None = None,
    repository: str | None = None,
    shard_size: str = "5GB",
    folded: EntropyGPTForCausalLM | None = None,
    folded_from: str | None = None,
):
    """
    Writes all that others need of a model: code, configuration, weights, tokenizer, results, picture, card.

    Args:
        model ([`EntropyGPTForCausalLM`]): The model.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
        result ([`ModelResult`]): What is known of it.
        folder (`Path`): An empty one.
        licence (`str`, *optional*): Licence of the weights.
        repository (`str`, *optional*): Where the folder will be found.
        shard_size (`str`): The most that a file of weights may hold, such as "5GB".
        folded ([`EntropyGPTForCausalLM`], *optional*): The model folded for inference, for a folder in it.
        folded_from (`str`, *optional*): Title of the model that this is the folded one of.

    Raises:
        `ValueError`: If the results lack what a card shows.
    """
    card = model_card(result, licence, repository, PICTURE, None if folded is None else FOLDED, folded_from)
    model.save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(tokenizer, folder)
    if folded is not None:
        folded.save_pretrained(folder / FOLDED, max_shard_size=shard_size)
        for path in (folder / FOLDED).glob("*.py"):  # loading takes the code from the folder around it
            path.unlink()
    save_results([result], folder / RESULTS)
    from .head_plots import compare_models  # checks of a folder do without matplotlib

    compare_models([result]).savefig(folder / PICTURE, format="png")
    card.save(folder / CARD)


def check(folder: Path, model: EntropyGPTForCausalLM, folded: EntropyGPTForCausalLM | None = None):
    """
    Makes sure that a folder can be published: nothing in it should stay here, its card can be read, and a process
    that has nothing but the folder computes the same logits with it, with its folded model too.

    Raises:
        `PublicationError`: If not.
    """
    for complaint in find_private(folder):
        raise PublicationError(f"{complaint}. Nothing was sent.")
    check_card(folder / CARD)
    check_loading(folder, model)
    if folded is not None:
        check_loading(folder, folded, FOLDED)


def is_published(name: str) -> bool:
    """Whether a file of this name, with its folder, is one of a published model."""
    return any(fnmatchcase(name, pattern) for pattern in PUBLIC)


def find_private(folder: Path) -> Iterator[str]:
    """What should not be public, a sentence each: files that belong to no model, tokens, keys, and paths of here."""
    here = {str(place) for place in (Path.home(), Path.cwd(), Path(tempfile.gettempdir())) if len(place.parts) > 2}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        if not is_published(name):
            yield f"{name} is no file of a published model"
        elif path.suffix not in BINARY:
            text = path.read_text(encoding="utf-8")
            forbidden = SECRETS if name in VOCABULARY else {**SECRETS, **PATHS}
            for what, pattern in forbidden.items():
                if found := re.search(pattern, text):
                    yield f"{name} holds {what}, {_shorten(found[0])}"
            for place in here:
                if place in text:
                    yield f"{name} holds a path of this machine, {place}"


def check_card(path: Path):
    """
    Makes sure that the Hub can read a card.

    Raises:
        `PublicationError`: If not, or if it names no scores.
    """
    try:
        data = ModelCard.load(path).data
    except (OSError, ValueError, YAMLError) as error:
        raise PublicationError(f"{path.name} can't be read by the Hub: {error}") from error
    if not data.eval_results:
        raise PublicationError(f"{path.name} names no finite score: measure the model anew with entropy-gpt evaluate.")


@torch.no_grad()
def check_folding(model: EntropyGPTForCausalLM, folded: EntropyGPTForCausalLM):
    """
    Makes sure that a folded model computes what the model does, but for rounding.

    Raises:
        `PublicationError`: If not.
    """
    tokens = _draw_tokens(model)
    logits, found = (each.eval()(tokens, use_cache=False).logits.double() for each in (model, folded))
    share = (logits - found).abs().max() / logits.abs().max()
    if not share <= LARGEST_FOLDED_SHARE.get(model.dtype, HALF_PRECISION_SHARE):  # NaN neither
        raise PublicationError(
            f"The folded model's logits differ by {share:.1e} of the largest: send the model alone."
        )


@torch.no_grad()
def check_loading(folder: Path, model: EntropyGPTForCausalLM, subfolder: str = ""):
    """
    Makes sure that a process with nothing but the folder computes the same logits.

    Raises:
        `PublicationError`: If not.
    """
    tokens = _draw_tokens(model)
    with tempfile.TemporaryDirectory() as temporary:
        reference = Path(temporary) / "reference.safetensors"
        save_reference(tokens, model.eval()(tokens, use_cache=False).logits, reference)
        try:
            loaded = load_in_fresh_process(folder, reference, PROMPT, subfolder)
        except RemoteLoadingError as error:
            raise PublicationError(f"The folder does not load without this project: {error}") from error
    if not loaded.max_difference <= LARGEST_DIFFERENCE:  # NaN neither
        raise PublicationError(
            f"A fresh process computes other logits with {subfolder or 'the model'}: they differ by "
            f"{loaded.max_difference:.2e}, and {LARGEST_DIFFERENCE:.0e} is allowed."
        )


def _draw_tokens(model: EntropyGPTForCausalLM) -> torch.Tensor:
    """Two sequences, the same each time."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, min(CHECKED_TOKENS, config.n_positions)), generator=generator)


def _shorten(secret: str) -> str:
    return f"{secret[:8]}..."
