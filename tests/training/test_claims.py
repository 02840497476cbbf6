"""One command at a time in a folder, however the one before ended."""

import errno
import os
import signal
import subprocess
import sys

import filelock
import pytest

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.training import claims
from entropy_gpt.training.claims import GOES_ON, claimed, refuse_claimed
from entropy_gpt.training.storage import StorageError


HOLDER = """
import sys, time
from pathlib import Path
from entropy_gpt.training.claims import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has claimed a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_command_is_told_of_the_first_until_that_is_killed(holder, tmp_path):
    for refused in (lambda: refuse_claimed(tmp_path / "run"), claimed(tmp_path / "run").__enter__):
        with pytest.raises(UserError, match=rf"at work in .*run: process {holder.pid}, since 20\d\d-.*\. Wait until"):
            refused()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    refuse_claimed(tmp_path / "run")
    with claimed(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())


def test_threads_of_one_process_are_kept_apart_too(tmp_path):
    with claimed(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), claimed(tmp_path):
        pass


def test_a_failure_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="wrong"), claimed(tmp_path / "new" / "run"):
        raise ValueError("wrong")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [StorageError("the disk is full."), KeyboardInterrupt()])
@pytest.mark.parametrize("goes_on", [True, False])
def test_what_can_be_continued_gets_a_note(error, goes_on, tmp_path):
    error = type(error)(*error.args)
    with pytest.raises(type(error)) as caught, claimed(tmp_path, lambda: goes_on):
        raise error
    assert getattr(caught.value, "__notes__", []) == [GOES_ON] * goes_on


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def refuse(self):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with claimed(tmp_path):
        assert (tmp_path / claims.HOLDER).exists()
    assert "has no locks: start no second command there" in caplog.text


def test_a_folder_that_can_t_be_claimed_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a part of this path is a file"), claimed(tmp_path / "file" / "run"):
        pass
