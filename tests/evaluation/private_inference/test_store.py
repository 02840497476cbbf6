"""Halves of preparations on disk: each is used once, by whom it belongs to."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("spu")

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import may_be_told
from entropy_gpt.evaluation.private_inference.parties.preparations import (
    FORMAT,
    NO_HALF,
    LostHalfError,
    draw_mask,
    draw_name,
    hash_weights,
    is_name,
    name_store,
    read_half,
)
from entropy_gpt.evaluation.private_inference.parties.store import Store
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings

from .example_half import make_half, make_store
from .phases import prepared_weights


def raising(error: Exception) -> Callable:
    def fail(*arguments, **options):
        raise error

    return fail


def test_a_half_is_taken_once(tmp_path):
    store = make_store(tmp_path / "halves")
    header, seed, shares = read_half(store.take("0" * 32))
    assert (header, seed) == make_half()[:2]
    assert (shares["product"].meta, shares["product"].share_chunks) == (b"meta\x00", [b"first", b"second part"])
    with pytest.raises(PrivateInferenceError, match="this preparation is not here: it was used"):
        store.take("0" * 32)
    assert [path.name for path in store.folder.iterdir()] == ["store-0"]


def test_nobody_else_may_read_it(tmp_path):
    store = make_store(tmp_path / "halves")
    for path in (store.folder, *store.folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_the_smallest_comes_first_and_what_is_damaged_is_left_out(tmp_path):
    store = Store(tmp_path, CLIENT)
    for number, length in enumerate((30, 10, 20)):
        store.put(*make_half(str(number) * 32, rank=CLIENT, length=length))
    store.path("9" * 32).write_bytes(b"{}\n")
    assert [header.length for header in store.headers()] == [10, 20, 30]
    assert not list(Store(tmp_path, SERVER).headers())


@pytest.mark.parametrize("cut", [-1, -40, 30])
def test_a_cut_off_half_is_not_chosen(cut, tmp_path):
    """Since the other one would be used up for nothing. The others are left alone."""
    store = Store(tmp_path, CLIENT)
    for name in ("0" * 32, "1" * 32):
        store.put(*make_half(name, rank=CLIENT))
    path = store.path("0" * 32)
    path.write_bytes(path.read_bytes()[:cut])
    assert [header.name for header in store.headers()] == ["1" * 32]


def test_what_the_other_side_has_not_written_is_not_kept(tmp_path):
    store = Store(tmp_path, SERVER)
    with pytest.raises(RuntimeError):
        store.put(*make_half(), raising(RuntimeError("the peer is gone")))
    assert [path.name for path in tmp_path.iterdir()] == ["store-0"]


@pytest.mark.parametrize("cut", [-1, -40, 30])
def test_a_damaged_half_is_refused_and_gone(cut, tmp_path):
    store = make_store(tmp_path)
    path = store.path("0" * 32)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(PrivateInferenceError, match="is damaged: prepare another one"):
        read_half(store.take("0" * 32))
    assert not list(tmp_path.glob("0*"))


def test_one_of_another_version_is_refused(tmp_path):
    store = Store(tmp_path, SERVER)
    store.put(*make_half(format=FORMAT + 1))
    with pytest.raises(PrivateInferenceError, match="is of another version of entropy-gpt"):
        read_half(store.take("0" * 32))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path, SERVER)
    monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
    with pytest.raises(PrivateInferenceError, match=r"can't be written to .*: No space left on device"):
        store.put(*make_half())
    assert [path.name for path in tmp_path.iterdir()] == ["store-0"]


def test_a_store_is_the_same_when_it_is_opened_again(tmp_path):
    first, second = (Store(tmp_path, SERVER).used.identity for _ in range(2))
    assert first == second != Store(tmp_path / "other", SERVER).used.identity


def test_what_killed_processes_left_is_cleared_and_what_is_in_use_is_not(tmp_path):
    store = make_store(tmp_path)
    taken = store.take("0" * 32)
    left = [tmp_path / f"{'1' * 32}-0{suffix}" for suffix in (".taken", ".part")]
    for path in left:
        path.touch()
    Store(tmp_path, SERVER)
    assert taken.exists() and not any(path.exists() for path in left)
    store.drop(taken)
    assert [path.name for path in tmp_path.iterdir()] == ["store-0"]


def test_what_a_copy_brings_back_is_not_used_again(tmp_path):
    store = make_store(tmp_path / "halves", CLIENT)
    copy = store.path("0" * 32).read_bytes()
    taken = store.take("0" * 32)
    store.spend(taken)
    store.drop(taken)
    store.path("0" * 32).write_bytes(copy)
    taken = store.take("0" * 32)
    with pytest.raises(LostHalfError, match="was used before, and has come back from a copy") as failed:
        store.spend(taken)
    assert failed.value.code == NO_HALF
    store.drop(taken)
    # The folder whole, and another process.
    store.path("0" * 32).write_bytes(copy)
    assert not list(Store(tmp_path / "halves", CLIENT).headers())


def test_what_was_taken_and_not_used_may_be_used(tmp_path):
    store = make_store(tmp_path / "halves", CLIENT)
    store.put_back(store.take("0" * 32))
    store.spend(store.take("0" * 32))


def test_a_list_that_was_cut_off_is_read(tmp_path):
    store = Store(tmp_path / "halves", CLIENT)
    with store.used.path.open("a") as file:
        file.write("0" * 20)
    for name in ("1" * 32, "2" * 32):
        store.put(*make_half(name, rank=CLIENT))
        taken = store.take(name)
        store.spend(taken)
        with pytest.raises(PrivateInferenceError, match="was used before"):
            store.spend(taken)
        store.drop(taken)


@pytest.mark.parametrize("moved", [False, True])
def test_a_copy_of_a_folder_uses_nothing_twice(moved, tmp_path):
    """Under another name beside it, both have one list; at another place there is none."""
    store = make_store(tmp_path / "halves", CLIENT)
    other = tmp_path / "elsewhere" / "copy" if moved else tmp_path / "copy"
    shutil.copytree(store.folder, other)
    store.spend(store.take("0" * 32))
    if moved:
        with pytest.raises(PrivateInferenceError, match=f"{store.used.path.name} is not there.*: bring it back, or"):
            Store(other, CLIENT)
    else:
        assert not list(Store(other, CLIENT).headers())


def test_a_folder_that_is_moved_takes_its_list_along(tmp_path):
    store = make_store(tmp_path / "halves", CLIENT)
    (tmp_path / "there").mkdir()
    for path in (store.folder, store.used.path):
        path.rename(tmp_path / "there" / path.name)
    assert list(Store(tmp_path / "there" / "halves", CLIENT).headers())


def test_a_list_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "halves").mkdir(mode=0o700)
    monkeypatch.setattr(Path, "touch", raising(PermissionError(13, "Permission denied")))
    with pytest.raises(PrivateInferenceError, match=r"\.used-0 can't be made, which is to list .*: Permission denied"):
        Store(tmp_path / "halves", SERVER)


def test_the_other_side_does_not_learn_of_places(tmp_path):
    store = make_store(tmp_path / "halves")
    taken = store.take("0" * 32)
    store.used.path.unlink()
    for act in (lambda: store.spend(taken), lambda: Store(store.folder, SERVER)):
        with pytest.raises(PrivateInferenceError, match=str(tmp_path)) as failed:
            act()
        assert not may_be_told(failed.value)


def test_nothing_is_used_where_that_cannot_be_noted(tmp_path, monkeypatch):
    store = make_store(tmp_path / "halves")
    taken = store.take("0" * 32)
    monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
    with pytest.raises(PrivateInferenceError, match="so nothing is used: No space left on device"):
        store.spend(taken)


def test_one_of_two_processes_takes_it(tmp_path):
    first, second = (Store(tmp_path, CLIENT) for _ in range(2))
    first.put(*make_half(rank=CLIENT))
    taken = first.take("0" * 32)
    with pytest.raises(PrivateInferenceError, match="is not here"):
        second.take("0" * 32)
    first.put_back(taken)
    second.drop(second.take("0" * 32))


def test_a_copy_that_comes_back_while_it_is_taken_is_used_once(tmp_path):
    first, second = (Store(tmp_path, CLIENT) for _ in range(2))
    first.put(*make_half(rank=CLIENT))
    copy = first.path("0" * 32).read_bytes()
    taken = first.take("0" * 32)
    first.path("0" * 32).write_bytes(copy)
    again = second.take("0" * 32)
    first.spend(taken)
    with pytest.raises(LostHalfError, match="was used before"):
        second.spend(again)


def test_what_fails_otherwise_is_not_said_to_be_used(tmp_path, monkeypatch):
    store = make_store(tmp_path)
    monkeypatch.setattr(os, "fsync", raising(OSError(5, "Input/output error")))
    with pytest.raises(PrivateInferenceError, match=r"can't be taken from .*: Input/output error") as failed:
        store.take("0" * 32)
    assert failed.value.code is None


def test_a_folder_that_cannot_be_synced_keeps_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path, SERVER)
    monkeypatch.setattr(f"{Store.__module__}.sync", raising(OSError(5, "Input/output error")))
    with pytest.raises(PrivateInferenceError, match="can't be written to"):
        store.put(*make_half())
    assert [path.name for path in tmp_path.iterdir()] == ["store-0"]


@pytest.mark.parametrize("content", ["", "0" * 31, "../" + "0" * 29])
def test_a_damaged_identity_is_refused(content, tmp_path):
    (tmp_path / "store-0").write_text(content)
    with pytest.raises(PrivateInferenceError, match=f"store-0 is damaged: delete {tmp_path}, and"):
        Store(tmp_path, SERVER)


def test_an_identity_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
    with pytest.raises(PrivateInferenceError, match="No space left"):
        Store(tmp_path, SERVER)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_multiplied_are_hashed_and_others_are_not():
    config, weights = prepared_weights("SM+ScFuFFN", n_layer=1)
    first = hash_weights(weights, config, PrivateSettings())
    for name, same in (("h.0.output.weight", False), ("head.weight", False), ("bounds.after", True)):
        changed = weights[name].copy()
        changed.flat[0] += 1
        changed_weights = weights | {name: changed}
        assert (hash_weights(changed_weights, config, PrivateSettings()) == first) is same
    assert name_store("store", first) != name_store("store", "other")


def test_files_that_are_not_the_stores_are_left_alone(tmp_path):
    names = {"film.mp4.part", f"{'0' * 32}-1.part", f"{'0' * 32}.taken", "store-0"}
    for name in names:
        (tmp_path / name).write_text("0" * 32)
    (tmp_path / "folder.part").mkdir()
    tmp_path.with_name(f"{'0' * 32}.used-0").touch()
    Store(tmp_path, SERVER)
    assert {path.name for path in tmp_path.iterdir()} == names | {"folder.part"}


@pytest.mark.parametrize("mode", [0o777, 0o750, 0o701])
def test_a_folder_that_others_can_use_is_refused(mode, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(PrivateInferenceError, match=r"others can use it \(chmod 700 "):
        Store(tmp_path / "open", SERVER)


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PrivateInferenceError, match="it is another user's"):
        Store(tmp_path, SERVER)


def test_names_are_drawn_by_both_and_never_paths():
    name = draw_name((b"a" * 32, b"b" * 32))
    assert is_name(name)
    assert name not in (draw_name((b"a" * 32, b"c" * 32)), draw_name((b"c" * 32, b"b" * 32)))
    assert not any(is_name(text) for text in ("../" + "0" * 29, "0" * 31, "0" * 32 + "\n", None, 5))


def test_masks_depend_on_seed_and_name():
    first = draw_mask(b"s" * 32, "a", (3, 4))
    assert np.array_equal(first, draw_mask(b"s" * 32, "a", (3, 4)))
    for seed, name in ((b"t" * 32, "a"), (b"s" * 32, "b")):
        assert not (first == draw_mask(seed, name, (3, 4))).any()


def test_a_header_that_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    store = Store(tmp_path, SERVER)
    monkeypatch.setattr("entropy_gpt.evaluation.private_inference.parties.preparations.MOST_HEADER_BYTES", 100)
    with pytest.raises(PrivateInferenceError, match="can't be written"):
        store.put(*make_half())
    assert [path.name for path in tmp_path.iterdir()] == ["store-0"]
