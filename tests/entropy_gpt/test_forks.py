"""The process whose forks run commands: who starts it, what it makes of variables, and how it ends."""

import json
import os
import signal
import subprocess
import sys

import pytest

from . import show_variables
from .forks import ROOT, Forks, shared_forks


def test_forks_read_variables_as_processes_of_their_own_do(tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_TOKEN": "mine"}
    (fork,) = shared_forks().run_together(show_variables.__name__, (), [environment])
    assert json.loads(fork.stdout) == {
        "endpoint": "http://127.0.0.1:9",
        "endpoint of the functions": "http://127.0.0.1:9",
        "endpoint of datasets": "http://127.0.0.1:9",
        "cache": str(tmp_path / "hub"),
        "modules": str(tmp_path / "modules"),
        "modules where they are loaded": str(tmp_path / "modules"),
        "data": str(tmp_path / "datasets"),
        "token": "mine",
    }


@pytest.mark.slow
def test_forks_are_like_processes():
    environment = {**os.environ, "HF_HOME": "/nowhere"}
    command = [sys.executable, "-c", f"import {show_variables.__name__} as module; module.main()"]
    own = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (fork,) = shared_forks().run_together(show_variables.__name__, (), [environment])
    assert json.loads(fork.stdout) == json.loads(own.stdout)


@pytest.mark.slow
def test_another_takes_the_place_of_one_that_was_killed(tmp_path):
    first = Forks(tmp_path / "forks")
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert (tmp_path / "forks").exists()
    assert Forks(tmp_path / "forks")("--version").returncode == 0


@pytest.mark.slow
def test_who_came_before_the_end_is_served(tmp_path):
    """Its starter has ended before anybody was accepted."""
    first = Forks(tmp_path / "forks")
    second = Forks(tmp_path / "forks")
    first.process.stdin.close()
    assert second("--version").returncode == 0
    assert first("--version").returncode == 0
    assert first.process.wait() == 0
    assert not (tmp_path / "forks").exists()


@pytest.mark.slow
def test_one_that_cannot_listen_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="The warm process ended with 1 before it listened"):
        Forks(tmp_path / "missing" / "forks")
