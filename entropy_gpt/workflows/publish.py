"""Publication of a model on the Hub: the folder is put together, checked, and sent in one commit."""

import json
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import httpx2
import pydantic
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
from huggingface_hub.utils import (
    get_session,
    validate_repo_id,
)
from pydantic import BeforeValidator, Field
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.folding import fold
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.records.measurement import describe_model
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult, find_results, load_results
from entropy_gpt.evaluation.showing.licences import check_licence
from entropy_gpt.evaluation.showing.model_card import list_missing, model_card
from entropy_gpt.evaluation.showing.publication import (
    CARD,
    PICTURE,
    assemble,
    check,
    check_folding,
    is_published,
)
from entropy_gpt.training.files import written_whole
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.model_tokenizer import load_model_tokenizer
from entropy_gpt.training.progress import SILENT, Progress
from entropy_gpt.training.storage import check_file
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .options import LocalPath, as_tuple, read_arguments, with_argument_names


# A file of every saved EntropyGPT.
CODE = "modeling_entropy_gpt.py"
ATTEMPTS = 3
# After these errors, the Hub has certainly done nothing. After others nobody knows. A commit can be repeated without
# harm, but a pull request would be opened twice.
NOT_CONNECTED = (httpx2.ConnectError, httpx2.ConnectTimeout, OfflineModeIsEnabled)
WAIT_SECONDS = 2
DEFAULT_SHARD_SIZE, DEFAULT_TIMEOUT = "5GB", 60
Reply = TypeVar("Reply")


@pydantic.dataclasses.dataclass(frozen=True)
class PublicationOptions:
    """The options of a publication. [`~entropy_gpt.publish`] takes them as keyword arguments and describes each."""

    repository: str
    results: Annotated[tuple[LocalPath, ...], BeforeValidator(as_tuple)] = ()
    licence: str | None = None
    folded: Literal["beside", "instead"] | None = None
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None
    shard_size: str = DEFAULT_SHARD_SIZE
    timeout: Annotated[int, Field(ge=1)] = DEFAULT_TIMEOUT
    dry_run: bool = False


@dataclass(frozen=True)
class Publication:
    """
    A publication, finished or tried.

    Args:
        repository (`str`): The repository's name; with its namespace, if it was sent.
        files (`dict[str, int]`): The name and the size in bytes of each file.
        url (`str`, *optional*): The commit or the pull request; `None` after a dry run.
    """

    repository: str
    files: dict[str, int]
    url: str | None


@with_argument_names
def publish(
    folder: str | Path,
    repository: str,
    *,
    results: Sequence[str | Path] = (),
    licence: str | None = None,
    folded: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    shard_size: str = DEFAULT_SHARD_SIZE,
    timeout: int = DEFAULT_TIMEOUT,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Publication:
    """
    Sends a trained model to the Hub with its code, its tokenizer and a card, as `entropy-gpt push` does.

    Before anything is sent, the folder must load in a fresh process without this package and give the same logits, its
    card must be readable, and it must contain nothing private. The Hub is `HF_ENDPOINT`, and the token is that of
    `hf auth login` or `HF_TOKEN`.

    Args:
        folder (`str` or `Path`): Folder of a trained model with its tokenizer.
        repository (`str`): The repository's name, such as "my-name/my-model".
        results (`Sequence[str | Path]`): Files or folders with results of the model, besides those in `folder`.
        licence (`str`, *optional*): Licence of the weights, by the Hub's name for it, such as "apache-2.0".
        folded (`str`, *optional*): Send the model folded for inference: "beside" the model, or "instead" of it.
        private (`bool`): Create a new repository as private.
        revision (`str`, *optional*): Branch of the commit, created if it does not exist. Default: main.
        create_pr (`bool`): Propose the commit as a pull request to an existing repository.
        message (`str`, *optional*): The commit's message.
        shard_size (`str`): Largest size of a file of weights.
        timeout (`int`): Seconds without a reply after which the Hub is asked again. It stays the timeout of
            huggingface_hub in this process.
        dry_run (`bool`): Put the folder together and check it, but send nothing. Needs no token.
        progress (`Progress`): Receives each stage.

    Returns:
        [`Publication`]: The files, and where they were sent.

    Raises:
        `UserError`: If something is missing or wrong, or the Hub refuses or does not answer.

    Example:

    ```python
    import entropy_gpt

    publication = entropy_gpt.publish("runs/proposal/model", "my-name/my-model", licence="mit", dry_run=True)
    print(publication.files)
    ```
    """
    options = read_arguments(PublicationOptions, locals())
    with library_bars_hidden(), prepare_package(folder, options, progress) as package:
        url = None
        if not dry_run:
            with progress.stage(f"sending it to {package.options.repository}"):
                url = send_package(package)
        return Publication(package.options.repository, package.files, url)


@dataclass(frozen=True)
class Package:
    """
    A folder that was put together and checked, and can be sent.

    Args:
        folder (`Path`): A temporary folder.
        options ([`PublicationOptions`]): The options, with the repository's full name if it is to be sent.
        result ([`ModelResult`]): The model's result.
    """

    folder: Path
    options: PublicationOptions
    result: ModelResult

    @property
    def files(self) -> dict[str, int]:
        """The name and the size in bytes of each file."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}


@contextmanager
def prepare_package(source: str | Path, options: PublicationOptions, progress: Progress) -> Iterator[Package]:
    """
    Puts a model's folder together in a temporary folder and checks it. Unless it is a dry run, the Hub is asked first
    whether it would accept the model.

    Args:
        source (`str` or `Path`): Folder of a trained model with its tokenizer.
        options ([`PublicationOptions`]): The options.
        progress (`Progress`): Receives each stage.

    Raises:
        `UserError`: If something is missing or wrong, or the Hub refuses or does not answer.
    """
    source = Path(expanded(source))
    try:
        validate_repo_id(options.repository)
    except HFValidationError as error:
        raise UserError(f"{options.repository!r} can't be the name of a repository: {error}") from error
    check_licence(options.licence)
    if not options.dry_run:
        api = HfApi()
        _limit_silence(options.timeout)
        options = _find_repository(api, options, _log_in(api))
    model, tokenizer, result = _read(source, options.results, progress)
    unfolded = None
    folded = None if options.folded is None else _fold(model)
    if options.folded == "instead":
        unfolded, result = result, _as_folded(result, folded)
        model, folded = folded, None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        try:
            with progress.stage("putting it together"), library_bars_hidden():
                assemble(
                    model,
                    tokenizer,
                    result,
                    folder,
                    options.licence,
                    options.repository,
                    options.shard_size,
                    folded=folded,
                    folded_from=unfolded and unfolded.title,
                )
            with progress.stage("loading it in a fresh process"):
                check(folder, model, folded)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
        yield Package(folder, options, result)


def send_package(package: Package) -> str:
    """
    Sends a package in one commit, and returns the address of the commit or the pull request.

    Raises:
        `UserError`: If the Hub refuses or does not answer.
    """
    commit = _send(HfApi(), package)
    return commit.pr_url or commit.commit_url


def write_card(folder: str | Path, *, results: Sequence[str | Path] = (), licence: str | None = None) -> Path:
    """
    Writes the card of a model's folder and its picture, as `entropy-gpt card` does.

    Args:
        folder (`str` or `Path`): Folder of a trained model with its tokenizer.
        results (`Sequence[str | Path]`): Files or folders with results of the model, besides those in `folder`.
        licence (`str`, *optional*): Licence of the weights, by the Hub's name for it.

    Returns:
        `Path`: The card.

    Raises:
        `UserError`: If the model or its results can't be read, or lack what a card shows.

    Example:

    ```python
    from entropy_gpt.workflows.publish import write_card

    write_card("converted_model", results=["evaluation_output"], licence="apache-2.0")
    ```
    """
    folder = Path(expanded(folder))
    if folder.is_dir():
        check_file(folder / CARD, "DIR")
    check_licence(licence)
    _, _, result = _read(folder, results, SILENT)
    if not (folder / CODE).exists():
        raise UserError(
            f"{folder} holds weights without the code that a card describes: entropy-gpt push adds the code and makes "
            "the card."
        )
    card = model_card(result, licence, picture=PICTURE)
    from entropy_gpt.evaluation.showing.head_plots import compare_models

    with written_whole(folder / PICTURE) as path:
        compare_models([result]).savefig(path, format="png")
    with written_whole(folder / CARD) as path:
        card.save(path)
    return folder / CARD


def _read(
    folder: Path, places: Sequence[str | Path], progress: Progress
) -> tuple[EntropyGPTForCausalLM, PreTrainedTokenizerFast, ModelResult]:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give the folder of a trained model.")
    with progress.stage("loading the model"), library_bars_hidden():
        model = load_language_model(folder).eval()
    tokenizer = load_model_tokenizer(None, str(folder), model.config.vocab_size)
    return model, tokenizer, _find_results(folder, [Path(expanded(place)) for place in places], model)


def _find_results(folder: Path, places: list[Path], model: EntropyGPTForCausalLM) -> ModelResult:
    known = describe_model(model, folder.name, Windows(1, 1, separate=False, bos=False))
    files = [place / RESULTS if place.is_dir() else place for place in places]
    if (own := folder / RESULTS).exists():
        files.append(own)
    result = find_results([result for file in files for result in load_results(file)], known)
    if result is not None and not (missing := list_missing(result)):
        return result
    if result is not None:
        problem = f"{' and '.join(missing)} are missing in {', '.join(map(str, files))}"
    elif files:
        problem = f"{', '.join(map(str, files))} describe other weights"
    else:
        problem = f"{folder} has no {RESULTS}"
    raise UserError(
        f"The card of {folder} shows what was measured, but {problem}. Run entropy-gpt evaluate "
        f"{shlex.quote(str(folder))} --output evaluation_output, and add --results evaluation_output."
    )


def _log_in(api: HfApi) -> dict:
    """The owner of the token, as the Hub describes them."""
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be sent: unset it, or use --dry-run.")
    if get_token() is None:
        raise UserError("There is no token for the Hub: run hf auth login, or set HF_TOKEN. --dry-run needs no token.")
    user = _ask_hub(api.whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("The token has no write permission: make one with it on the Hub, and set HF_TOKEN to it.")
    return user


def _limit_silence(seconds: int):
    """Sets a timeout for all requests; the default client of huggingface_hub waits forever."""
    hooks = get_session().event_hooks
    set_client_factory(lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=seconds))


def _find_repository(api: HfApi, options: PublicationOptions, user: dict) -> PublicationOptions:
    """
    Adds the namespace to the repository's name.

    Raises:
        `UserError`: If the Hub would refuse the commit later.
    """
    namespace, _, name = options.repository.rpartition("/")
    namespace = namespace or user["name"]
    options = replace(options, repository=f"{namespace}/{name}")
    known = _ask_hub(_look_up, api, options.repository, options.timeout)
    if known is not None:
        if options.private and not known.private:
            raise UserError(
                f"{options.repository} exists and is public, and --private is only for new repositories: leave it "
                "out, or give another name."
            )
    elif options.create_pr:
        raise UserError(f"There is no such repository as {options.repository}: --create-pr needs an existing one.")
    elif namespace not in (user["name"], *(group["name"] for group in user.get("orgs", []))):
        raise UserError(
            f'The namespace "{namespace}" is neither {user["name"]}, the owner of this token, nor one of their '
            "groups: give a repository of your own."
        )
    return options


def _look_up(api: HfApi, repository: str, timeout: int) -> ModelInfo | None:
    try:
        return api.model_info(repository, timeout=timeout)
    except RepositoryNotFoundError:
        return None


def _send(api: HfApi, package: Package) -> CommitInfo:
    options = package.options
    _ask_hub(ModelCard.load(package.folder / CARD).validate)
    if not options.create_pr:
        # None stands for the default of the namespace.
        _ask_hub(api.create_repo, options.repository, private=options.private or None, exist_ok=True)
        if options.revision is not None:
            _ask_hub(api.create_branch, options.repository, branch=options.revision, exist_ok=True)
    message = options.message or f"EntropyGPT {package.result.title}"
    return _ask_hub(_commit, api, package, message, create_pr=options.create_pr)


def _commit(api: HfApi, package: Package, message: str, create_pr: bool) -> CommitInfo:
    """Makes one commit of any size. `upload_folder` may make several, of which only some may arrive."""
    options, files = package.options, package.files
    published = api.list_repo_files(options.repository, revision=options.revision)
    stale = [name for name in published if name not in files and is_published(name)]
    operations = [CommitOperationDelete(name) for name in stale]
    operations += [CommitOperationAdd(name, package.folder / name) for name in files]
    return api.create_commit(
        options.repository, operations, commit_message=message, revision=options.revision, create_pr=create_pr
    )


def _ask_hub(question: Callable[..., Reply], *args, **kwargs) -> Reply:
    """
    Calls a function that asks the Hub, again if the Hub or the connection fails.

    Raises:
        `UserError`: If the Hub refuses, or all attempts fail.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return question(*args, **kwargs)
        except (httpx2.TransportError, OfflineModeIsEnabled, ConnectionError) as error:
            failure, reason = error, f"{constants.ENDPOINT} can't be reached: {error or type(error).__name__}"
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise UserError(_explain(error)) from error
            failure, reason = error, f"{constants.ENDPOINT} failed with status {error.response.status_code}"
        except json.JSONDecodeError as error:  # from a gateway before the Hub
            failure, reason = error, f"{constants.ENDPOINT} did not answer as the Hub does"
        except (ValueError, RuntimeError) as error:  # an unreadable card, or a failed upload
            raise UserError(f"The Hub refuses: {error}") from error
        if kwargs.get("create_pr") and not isinstance(failure, NOT_CONNECTED):
            raise UserError(
                f"{reason}: check there whether the pull request was made before you try again."
            ) from failure
        if attempt < ATTEMPTS:
            time.sleep(WAIT_SECONDS * attempt)
    raise UserError(
        f"{reason}, {ATTEMPTS} times. Run the same command again: files that have arrived are not sent again."
    ) from failure


def _explain(error: HfHubHTTPError) -> str:
    match error:
        case RevisionNotFoundError():
            return "The Hub has no such revision of the repository: give an existing branch, or none."
        case RepositoryNotFoundError():
            return "The Hub has no such repository, or this token has no access to it: check its name."
    reason = error.server_message or str(error).splitlines()[0]
    match error.response.status_code:
        case 401:
            return f"The Hub does not accept this token ({reason}): run hf auth login, or set another HF_TOKEN."
        case 403:
            return f"This token has no permission ({reason}): use one that may write, or --create-pr."
    return f"The Hub refuses ({error.response.status_code}): {reason}"


def _fold(model: EntropyGPTForCausalLM) -> EntropyGPTForCausalLM:
    folded = fold(model)
    check_folding(model, folded)
    return folded


def _as_folded(result: ModelResult, folded: EntropyGPTForCausalLM) -> ModelResult:
    """The result of the folded model: the same measurements, with its architecture, operations and weights."""
    described = describe_model(folded, result.name, result.likelihood.likelihood.windows)
    return replace(
        result, weights=described.weights, architecture=described.architecture, operations=described.operations
    )
