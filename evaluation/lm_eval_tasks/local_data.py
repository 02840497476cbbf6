"""Readers of the tasks in this folder: files of the user's as data sets for lm-eval.

lm-eval runs this file by its path, wherever it lies, so it needs lm-eval's own requirements and nothing of this
project. README.md says which files are read, and what a line of them may be.
"""

import bz2
import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from datasets import Dataset, DatasetInfo


# How a file of JSON lines may end, and what opens it.
ENDINGS = {".jsonl": open, ".jsonl.bz2": bz2.open, ".jsonl.gz": gzip.open}
BLIMP_ARCHIVE = "BLiMP.zip"
DAMAGE = (OSError, EOFError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error)
# The beginning of a last sentence that is still to be ended, where it is no capital.
UNFINISHED_SENTENCE = re.compile(r"(?<=[.!?] )[a-z][^.!?]*$")

Sample = dict[str, str | int | list[str]]


def read_arc_easy(task_data: str | None = None, **metadata) -> dict[str, Dataset]:
    """
    ARC-easy's questions.

    Args:
        task_data (`str`): The folder.
        metadata: Other fields that lm-eval passes about the task and the model.

    Raises:
        `ValueError`: If the file is not there, or damaged.
    """
    return _read(task_data, ("arc_easy", "ARC-Easy-Test"), _arc_sample)


def read_hellaswag(task_data: str | None = None, **metadata) -> dict[str, Dataset]:
    """HellaSwag's contexts; as [`read_arc_easy`]."""
    return _read(task_data, ("hellaswag", "hellaswag_val", "hellaswag_val_10042"), _hellaswag_sample)


def read_lambada_openai(task_data: str | None = None, **metadata) -> dict[str, Dataset]:
    """LAMBADA's passages in OpenAI's version; as [`read_arc_easy`]."""
    return _read(task_data, ("lambada_openai", "lambada_test"), _lambada_sample)


def read_blimp(paradigm: str, task_data: str | None = None, **metadata) -> dict[str, Dataset]:
    """A paradigm of BLiMP, which is the name of its file; as [`read_arc_easy`]."""
    return _read(task_data, (paradigm,), _blimp_sample, BLIMP_ARCHIVE)


def _read(
    task_data: str | None,
    stems: tuple[str, ...],
    to_sample: Callable[[dict], Sample | None],
    archive: str | None = None,
) -> dict[str, Dataset]:
    folder = _folder(task_data)
    path = _find(folder, stems, archive)
    samples = [_sample(line, to_sample, place) for place, line in _lines(path, f"{stems[0]}.jsonl")]
    if not samples:
        raise ValueError(f"{path} holds no sample.")
    info = DatasetInfo(description=path.relative_to(folder).as_posix())
    return {"test": Dataset.from_list(samples, info=info)}


def _folder(task_data: str | None) -> Path:
    if task_data is None:
        raise ValueError(
            "The local tasks read files of yours. Name their folder: --task-data FOLDER (entropy-gpt), "
            """--metadata '{"task_data": "FOLDER"}' (lm_eval), metadata={"task_data": "FOLDER"} (Python)."""
        )
    folder = Path(task_data).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{task_data} is no folder: the local tasks read the files of one.")
    return folder


def _find(folder: Path, stems: tuple[str, ...], archive: str | None) -> Path:
    """The one file of these names in the folder or below."""
    names = {stem + ending for stem in stems for ending in ENDINGS} | {archive}
    found = sorted(path for path in folder.rglob("*") if path.name in names and path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ValueError(f"{folder} has several files that could be meant: {listed}. Name a folder with one of them.")
    wanted = [f"{stem}.jsonl" for stem in stems] + ([archive] if archive else [])
    raise ValueError(
        f"Neither {folder} nor a folder below it has {' or '.join(wanted)}; .jsonl may be followed by .bz2 or .gz."
    )


def _lines(path: Path, member: str) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, each after its place in words. In an archive, those of the member."""
    try:
        content = _unpack(path, member) if path.suffix == ".zip" else _decompress(path)
    except DAMAGE as error:
        raise ValueError(f"{path} can't be read: {error}.") from error
    where = f"{member} in {path}" if path.suffix == ".zip" else str(path)
    for number, line in enumerate(content.split("\n"), start=1):  # JSON's texts may hold what else ends lines
        if line.strip():
            yield f"{where}, line {number}", line


def _decompress(path: Path) -> str:
    opener = next(opener for ending, opener in ENDINGS.items() if path.name.endswith(ending))
    with opener(path, "rb") as file:
        return file.read().decode("utf-8")


def _unpack(path: Path, member: str) -> str:
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if PurePosixPath(name).name == member]
        if len(members) != 1:
            raise ValueError(f"{path} has {len(members)} files of the name {member}, where one is read.")
        return archive.read(members[0]).decode("utf-8")


def _sample(line: str, to_sample: Callable[[dict], Sample | None], place: str) -> Sample:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}.") from error
    sample = to_sample(record)
    if sample is None:
        raise ValueError(
            f"{place} is no sample of this task: {line[:100]}. README.md next to the tasks shows what a line may be."
        )
    return sample


def _arc_sample(record: dict) -> Sample | None:
    match record:
        case {"query": str(query), "choices": list(choices), "gold": int(gold)} if query.startswith("Question: "):
            return _choice(f"{query}\nAnswer:", choices, gold)
        case {"question": {"stem": str(question), "choices": list(options)}, "answerKey": answer}:
            pairs = [(option.get("text"), option.get("label")) for option in options if isinstance(option, dict)]
        case {"question": str(question), "choices": {"text": list(texts), "label": list(labels)}, "answerKey": answer}:
            pairs = list(zip(texts, labels, strict=False))
        case _:
            return None
    choices, labels = [text for text, _ in pairs], [label for _, label in pairs]
    return _choice(f"Question: {question}\nAnswer:", choices, labels.index(answer)) if answer in labels else None


def _hellaswag_sample(record: dict) -> Sample | None:
    match record:
        case {"query": str(query), "choices": list(endings)}:
            label = record.get("gold", record.get("label"))
        case {"activity_label": str(activity), "ctx_a": str(first), "ctx_b": str(last), "endings": list(endings)}:
            query, label = f"{activity}: {first} {last.capitalize()}", record.get("label")
        case _:
            return None
    if not all(isinstance(ending, str) for ending in endings) or not str(label).isdigit():
        return None
    query = UNFINISHED_SENTENCE.sub(lambda sentence: sentence[0].capitalize(), _without_markup(query))
    return _choice(query, [_without_markup(ending) for ending in endings], int(label))


def _lambada_sample(record: dict) -> Sample | None:
    match record:
        case {"context": str(context), "continuation": str(word)}:
            pass
        case {"text": str(text)}:
            context, _, word = text.rpartition(" ")
        case _:
            return None
    return {"context": context, "target": f" {word}"} if context and word and " " not in word else None


def _blimp_sample(record: dict) -> Sample | None:
    match record:
        case {"sentence_good": str(good), "sentence_bad": str(bad)}:
            return _choice("", [good, bad], 0)
    return None


def _choice(context: str, choices: list, gold: int) -> Sample | None:
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        return None
    return {"context": context, "choices": choices, "gold": gold} if 0 <= gold < len(choices) else None


def _without_markup(text: str) -> str:
    """WikiHow's headings become sentences, its other marks in brackets go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
