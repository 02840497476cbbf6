"""Checkpoints: what counts as whole, and which one a run goes on from."""

import shutil

import pytest

from entropy_gpt.training.checkpoints import SEAL, find_damage, last_checkpoint, seal


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-8"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "deep" / "state.json").write_text("{}")
    seal(folder)
    return folder


def cut(folder):
    (folder / "model.safetensors").write_bytes(bytes(range(255)))


def alter(folder):
    (folder / "model.safetensors").write_bytes(bytes(255) + b"x")


def remove(folder):
    (folder / "deep" / "state.json").unlink()


def remove_seal(folder):
    (folder / SEAL).unlink()


def cut_seal(folder):
    (folder / SEAL).write_text((folder / SEAL).read_text()[:-20])


def empty_seal(folder):
    (folder / SEAL).write_text('["model.safetensors"]')


DAMAGES = {
    cut: "model.safetensors has 255 bytes, and had 256",
    alter: "model.safetensors was altered",
    remove: "deep/state.json is missing",
    remove_seal: "not written to its end",
    cut_seal: "is damaged",
    empty_seal: "is damaged",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_passed_over(damage, checkpoint, caplog):
    assert find_damage(checkpoint) is None
    for step in (9, 10, 100):
        shutil.copytree(checkpoint, checkpoint.with_name(f"checkpoint-{step}"))
    assert last_checkpoint(checkpoint.parent).name == "checkpoint-100"
    assert not caplog.records
    for step in (10, 100):
        damage(checkpoint.with_name(f"checkpoint-{step}"))
    assert DAMAGES[damage] in find_damage(checkpoint.with_name("checkpoint-10"))
    assert last_checkpoint(checkpoint.parent).name == "checkpoint-9"
    assert "checkpoint-100 is passed over" in caplog.messages[0]
    assert "checkpoint-10 is passed over" in caplog.messages[1]


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "_unfinished-checkpoint" / "checkpoint-3").mkdir(parents=True)
    assert last_checkpoint(tmp_path) is None
