"""What can't be written is said in one line, whichever library wanted to."""

import errno
import os
import resource
import signal
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from entropy_gpt.training.files import written_whole
from entropy_gpt.training.run_log import RunLogWriter
from entropy_gpt.training.storage import StorageError, check_file, check_folder, storing

from ..disks import mount, small_disk


MANY = 2**20


def save_arrow(path: Path):
    with pa.OSFile(str(path), "wb") as file:
        file.write(bytes(MANY))


def save_tokenizer(path: Path):
    Tokenizer(models.WordLevel({f"word {number}": number for number in range(MANY // 20)}, "word 0")).save(str(path))


WRITERS = {
    "text": lambda path: path.write_text("x" * MANY),
    "torch": lambda path: torch.save(torch.zeros(MANY), path),
    "tokenizers": save_tokenizer,
    "pyarrow": save_arrow,
    "matplotlib": lambda path: Figure().savefig(path, format="png"),
}
# These make files of other names first.
WRITERS_TO_FOLDERS = {
    "safetensors": lambda path: save_file({"a": torch.zeros(MANY)}, path),
    "datasets": lambda path: Dataset.from_dict({"a": range(MANY)}).save_to_disk(path),
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_said_in_one_line(library, tmp_path):
    with pytest.raises(StorageError) as caught, written_whole(tmp_path / "new" / "file") as path:
        path.symlink_to("/dev/full")
        WRITERS[library](path)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'new' / 'file'} can't be written: the disk is full")
    assert "and try again" in line and "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("library", [*WRITERS, *WRITERS_TO_FOLDERS])
def test_a_disk_that_becomes_full_keeps_what_it_had(library, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "before").write_bytes(bytes(2**20))
        full = pytest.raises(StorageError, match="file can't be written: the disk is full")
        with full, written_whole(disk / "file") as path:
            {**WRITERS, **WRITERS_TO_FOLDERS}[library](path)
        assert [path.name for path in disk.iterdir()] == ["before"]
        mount("-o", "remount,size=64m", disk)
        with written_whole(disk / "file") as path:
            {**WRITERS, **WRITERS_TO_FOLDERS}[library](path)
        assert (disk / "file").exists()


@pytest.mark.slow
@pytest.mark.parametrize("library", [*WRITERS, *WRITERS_TO_FOLDERS])
def test_a_limit_of_the_size_of_files_is_named(library, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match="ulimit -f"), written_whole(tmp_path / "file") as path:
            {**WRITERS, **WRITERS_TO_FOLDERS}[library](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_read_only_disk_is_refused_beforehand_and_said_afterwards(tmp_path):
    with small_disk(tmp_path / "disk", "1m", "ro") as disk:
        with pytest.raises(StorageError, match=r"disk is not a writable folder. Give another --output"):
            check_folder(disk / "new" / "model")
        with pytest.raises(StorageError, match="the file system is read-only"), written_whole(disk / "file"):
            pass


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_other_ends_of_room_say_what_to_do(number, tmp_path):
    with pytest.raises(StorageError, match=r"file can't be written: .*\. [A-Z].*\.$"), storing(tmp_path / "file"):
        raise OSError(number, os.strerror(number))


def test_the_cause_is_found_behind_the_error_of_a_library(tmp_path):
    with pytest.raises(StorageError, match="disk is full"), storing(tmp_path / "file"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ValueError("An error occurred while generating the dataset") from error


def test_errors_of_reading_stay_as_they_are(tmp_path):
    with pytest.raises(PermissionError), storing(tmp_path / "output" / "file"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/text.txt")
    with pytest.raises(FileNotFoundError), storing(tmp_path / "file"):
        (tmp_path / "missing").read_text()


def test_a_log_that_can_t_be_written_is_said_and_ends_quietly(tmp_path, capfd):
    log = RunLogWriter(tmp_path, {})
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: PTH123, SIM115
    with pytest.raises(StorageError, match="the disk is full"):
        log.write("training", 1, loss=2.0)
    log.close()
    del log
    assert capfd.readouterr().err == ""


def test_places_that_can_t_be_written_are_refused_beforehand(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    check_folder(tmp_path / "new" / "folder")
    check_file(tmp_path / "new" / "file")
    check_file(tmp_path / "file")
    for folder in ("file", "file/new", "link", "link/new"):
        with pytest.raises(StorageError, match=r"is not a writable folder. Give another output_dir\."):
            check_folder(tmp_path / folder, "output_dir")
    with pytest.raises(StorageError, match=r"is a folder. Give the name of a file\."):
        check_file(tmp_path)
