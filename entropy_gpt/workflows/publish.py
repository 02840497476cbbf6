"""Puts a model's folder together for the Hub, checks it, and sends it."""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelInfo,
    constants,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, get_session, validate_repo_id
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.folding import fold
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.records.measurement import describe_model
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult, find_results, load_results
from entropy_gpt.evaluation.showing.head_plots import plot_headwise_entropy
from entropy_gpt.evaluation.showing.model_card import list_missing, model_card
from entropy_gpt.evaluation.showing.publication import (
    CARD,
    PICTURE,
    assemble,
    check,
    check_folding,
    is_published,
)
from entropy_gpt.terminal.tables import make_table
from entropy_gpt.training.files import written_whole
from entropy_gpt.training.model_tokenizer import load_model_tokenizer
from modeling_entropy_gpt import EntropyGPTForCausalLM


# A file of every EntropyGPT that was saved.
CODE = "modeling_entropy_gpt.py"
ATTEMPTS = 3
# After these, nothing can have been done. After others nobody knows; the same commit is not made twice, but the same
# pull request would be.
NOT_CONNECTED = (httpx2.ConnectError, httpx2.ConnectTimeout, OfflineModeIsEnabled)
WAIT_SECONDS = 2
Answer = TypeVar("Answer")

console = Console()


@dataclass(frozen=True)
class Target:
    """
    Where a model goes.

    Args:
        repository (`str`): Such as "my-name/my-model".
        private (`bool`): Whether a new repository is seen by its owner alone.
        revision (`str`, *optional*): The branch.
        create_pr (`bool`): Whether the commit is proposed as a pull request.
        message (`str`, *optional*): Of the commit.
    """

    repository: str
    private: bool
    revision: str | None
    create_pr: bool
    message: str | None


def run(
    source: Path,
    target: Target,
    results: list[Path],
    licence: str | None,
    folded: str | None,
    shard_size: str,
    timeout: int,
    dry_run: bool,
):
    """
    Sends a model, if it passes all checks.

    Args:
        source (`Path`): Its folder.
        target ([`Target`]): Where it goes.
        results (`list[Path]`): Files and folders with results, beside those in its folder.
        licence (`str`, *optional*): Of its weights.
        folded (`str`, *optional*): "beside" or "instead": whether it is sent folded too, or alone.
        shard_size (`str`): The most that a file of weights holds.
        timeout (`int`): Seconds for which the Hub may be silent.
        dry_run (`bool`): Whether all is done but sending.

    Raises:
        `UserError`: If something is missing or wrong, or the Hub refuses or does not answer. Nothing was sent then.
    """
    _be_quiet()
    try:
        validate_repo_id(target.repository)
    except HFValidationError as error:
        raise UserError(f"{target.repository!r} can't be the name of a repository: {error}") from error
    api = HfApi()
    if not dry_run:
        _limit_silence(timeout)
        target = _find_repository(api, target, _log_in(api), timeout)
    model, tokenizer, result = _read(source, results)
    before = None
    folded_model = None if folded is None else _fold(model)
    if folded == "instead":
        before, result = result, _as_folded(result, folded_model)
        model, folded_model = folded_model, None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        try:
            with console.status("putting it together"):
                assemble(
                    model,
                    tokenizer,
                    result,
                    folder,
                    licence,
                    target.repository,
                    shard_size,
                    folded=folded_model,
                    folded_from=before and before.title,
                )
            with console.status("loading it in a fresh process"):
                check(folder, model, folded_model)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
        _show_files(folder)
        if dry_run:
            console.print("It loads in a fresh process with the same logits. Nothing was sent.")
            return
        console.print(f"sending it to {target.repository}", highlight=False)
        commit = _send(api, folder, target, result)
    console.print(f"sent: {commit.pr_url or commit.commit_url}", soft_wrap=True, highlight=False)


def write_card(folder: Path, results: list[Path], licence: str | None):
    """
    Writes the card of a model's folder, and the picture that it shows.

    Raises:
        `UserError`: If the model or its results can't be read, or lack what a card tells.
    """
    _be_quiet()
    _, _, result = _read(folder, results)
    if not (folder / CODE).exists():
        raise UserError(
            f"{folder} holds weights without the code that a card tells of: entropy-gpt push puts both together, with "
            "a card."
        )
    card = model_card(result, licence, picture=PICTURE)
    with written_whole(folder / PICTURE) as path:
        plot_headwise_entropy(result, path)
    with written_whole(folder / CARD) as path:
        card.save(path)
    console.print(f"card: {folder / CARD}", markup=False, soft_wrap=True)


def _be_quiet():
    """What goes wrong is told in one line; bars of what is sent are for those who look."""
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()


def _read(folder: Path, places: list[Path]) -> tuple[EntropyGPTForCausalLM, PreTrainedTokenizerFast, ModelResult]:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give that of a trained model.")
    with console.status("loading the model"):
        model = load_language_model(folder).eval()
    tokenizer = load_model_tokenizer(None, str(folder), model.config.vocab_size)
    return model, tokenizer, _find_results(folder, places, model)


def _find_results(folder: Path, places: list[Path], model: EntropyGPTForCausalLM) -> ModelResult:
    known = describe_model(model, folder.name, Windows(1, 1, separate=False, bos=False))
    files = [place / RESULTS if place.is_dir() else place for place in places]
    if (own := folder / RESULTS).exists():
        files.append(own)
    result = find_results([result for file in files for result in load_results(file)], known)
    if result is not None and not (missing := list_missing(result)):
        return result
    if result is not None:
        looked = f"{' and '.join(missing)} are missing in {', '.join(map(str, files))}"
    else:
        looked = f"{', '.join(map(str, files))} tell of other weights" if files else f"{folder} has no {RESULTS}"
    raise UserError(
        f"The card of {folder} tells what was measured, and {looked}. Run entropy-gpt evaluate {folder} "
        "--output evaluation_output, and give --results evaluation_output."
    )


def _log_in(api: HfApi) -> dict:
    """Whom the token belongs to, as the Hub tells it."""
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be sent: unset it, or try --dry-run.")
    if get_token() is None:
        raise UserError("There is no token for the Hub: run hf auth login, or set HF_TOKEN. --dry-run needs none.")
    user = _ask_hub(api.whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("The token may read and not write: make one on the Hub that may, and set HF_TOKEN to it.")
    return user


def _limit_silence(seconds: int):
    """Of its own, the client waits for ever."""
    hooks = get_session().event_hooks
    set_client_factory(lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=seconds))


def _find_repository(api: HfApi, target: Target, user: dict, timeout: int) -> Target:
    """The target by its full name; refused now, if the Hub would refuse it once all is put together."""
    namespace, _, name = target.repository.rpartition("/")
    namespace = namespace or user["name"]
    target = replace(target, repository=f"{namespace}/{name}")
    known = _ask_hub(_look_up, api, target.repository, timeout)
    if known is not None:
        if target.private and not known.private:
            raise UserError(
                f"{target.repository} is there already, and public: --private is for new ones. Leave it out, or give "
                "another name."
            )
    elif target.create_pr:
        raise UserError(f"There is no such repository as {target.repository}, to which --create-pr could propose.")
    elif namespace not in (user["name"], *(group["name"] for group in user.get("orgs", []))):
        raise UserError(
            f'The namespace "{namespace}" is neither {user["name"]}, whose token this is, nor a group of theirs: give '
            "a repository of your own."
        )
    return target


def _look_up(api: HfApi, repository: str, timeout: int) -> ModelInfo | None:
    try:
        return api.model_info(repository, timeout=timeout)
    except RepositoryNotFoundError:
        return None


def _send(api: HfApi, folder: Path, target: Target, result: ModelResult) -> CommitInfo:
    _ask_hub(ModelCard.load(folder / CARD).validate)
    if not target.create_pr:
        # None: as the namespace's owner has it by default.
        _ask_hub(api.create_repo, target.repository, private=target.private or None, exist_ok=True)
        if target.revision is not None:
            _ask_hub(api.create_branch, target.repository, branch=target.revision, exist_ok=True)
    message = target.message or f"EntropyGPT {result.title}"
    return _ask_hub(_commit, api, folder, target, message, create_pr=target.create_pr)


def _commit(api: HfApi, folder: Path, target: Target, message: str, create_pr: bool) -> CommitInfo:
    """One commit, whatever the sizes: `upload_folder` may make several, of which some arrive and others do not."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    there = api.list_repo_files(target.repository, revision=target.revision)
    stale = [name for name in there if name not in files and is_published(name)]
    operations = [CommitOperationDelete(name) for name in stale]
    operations += [CommitOperationAdd(name, path) for name, path in files.items()]
    return api.create_commit(
        target.repository, operations, commit_message=message, revision=target.revision, create_pr=create_pr
    )


def _ask_hub(question: Callable[..., Answer], *args, **kwargs) -> Answer:
    """Asks again where the Hub or the way to it fails; what it refuses becomes one line."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return question(*args, **kwargs)
        except (httpx2.TransportError, OfflineModeIsEnabled, ConnectionError) as error:
            failure, reason = error, f"{constants.ENDPOINT} can't be reached: {error or type(error).__name__}"
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise UserError(_explain(error)) from error
            failure, reason = error, f"{constants.ENDPOINT} failed with status {error.response.status_code}"
        except json.JSONDecodeError as error:  # of a gateway before it
            failure, reason = error, f"{constants.ENDPOINT} did not answer as the Hub does"
        except (ValueError, RuntimeError) as error:  # a card that can't be read; an upload that is given up
            raise UserError(f"The Hub refuses: {error}") from error
        if kwargs.get("create_pr") and not isinstance(failure, NOT_CONNECTED):
            raise UserError(
                f"{reason}: look there whether the pull request was made before you try again."
            ) from failure
        if attempt < ATTEMPTS:
            time.sleep(WAIT_SECONDS * attempt)
    raise UserError(
        f"{reason}, {ATTEMPTS} times. The same command can be repeated: what has arrived is not sent again."
    ) from failure


def _explain(error: HfHubHTTPError) -> str:
    match error:
        case RevisionNotFoundError():
            return "The Hub has no such revision of the repository: give a branch that is there, or none."
        case RepositoryNotFoundError():
            return "The Hub knows no such repository, or this token may not see it: check its name."
    said = error.server_message or str(error).splitlines()[0]
    match error.response.status_code:
        case 401:
            return f"The Hub does not accept this token ({said}): run hf auth login, or set another HF_TOKEN."
        case 403:
            return f"This token may not do that ({said}): take one that may write, or --create-pr for what is others'."
    return f"The Hub refuses ({error.response.status_code}): {said}"


def _fold(model: EntropyGPTForCausalLM) -> EntropyGPTForCausalLM:
    folded = fold(model)
    check_folding(model, folded)
    return folded


def _as_folded(result: ModelResult, folded: EntropyGPTForCausalLM) -> ModelResult:
    """What was measured holds for the folded model too, which has another architecture and other weights."""
    described = describe_model(folded, result.name, result.likelihood.likelihood.windows)
    return replace(
        result, weights=described.weights, architecture=described.architecture, operations=described.operations
    )


def _show_files(folder: Path):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [(path.relative_to(folder).as_posix(), f"{path.stat().st_size / 1e6:,.3f}") for path in files]
    console.print(make_table(("file", "MB"), rows))
