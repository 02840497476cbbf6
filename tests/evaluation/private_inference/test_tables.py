"""Tables that a client looks embeddings up in: known by their hashes, sent as short as they are, kept, and refused."""

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entropy_gpt.evaluation.errors import EmbeddingsError, PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import may_be_told
from entropy_gpt.evaluation.private_inference.parties.tables import (
    MOST_KEPT,
    PublicCheckpoint,
    TableCache,
    TableTerms,
    check_public,
    count_bytes,
    decode_table,
    encode_table,
    read_public,
)
from tests.architectures import make_model


CHECKPOINT = PublicCheckpoint("openai-community/gpt2", "0123abc")
KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_tables(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"wte": (7, 4), "wpe": (3, 4)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def describe(tables: dict[str, np.ndarray]) -> tuple[dict[str, TableTerms], dict[str, tuple[int, ...]]]:
    terms = {name: TableTerms.of(table) for name, table in tables.items()}
    return terms, {name: table.shape for name, table in tables.items()}


def make_described() -> tuple[dict[str, np.ndarray], dict[str, TableTerms]]:
    tables = make_tables()
    return tables, describe(tables)[0]


def flip_bit(file: Path, name: str):
    """The lowest bit of the first number of a tensor, in place."""
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + json.loads(content[8:header])[name]["data_offsets"][0]] ^= 1
    file.write_bytes(content)


def are_equal(ours: dict[str, np.ndarray] | None, theirs: dict[str, np.ndarray]) -> bool:
    return ours is not None and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.sampled_from([*KINDS]))
def test_a_table_is_sent_as_short_as_it_is_and_arrives_to_the_last_bit(numbers, kind):
    table = torch.tensor(numbers).to(KINDS[kind]).float().numpy()[:, None]
    terms = TableTerms.of(table)
    content = encode_table(table, terms.precision)
    assert len(content) == count_bytes(table.shape, terms.precision) <= len(numbers) * KINDS[kind].itemsize
    assert decode_table(bytes(content), terms, table.shape).tobytes() == table.tobytes()


def test_a_hash_is_that_of_the_numbers_in_single_precision_row_by_row():
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    assert TableTerms.of(table).hash == TableTerms.of(np.asfortranarray(table)).hash == expected


def test_other_tables_than_those_named_are_refused():
    table = make_tables()["wte"]
    content = bytearray(encode_table(table, "float32"))
    content[-1] ^= 1
    with pytest.raises(PrivateInferenceError, match="sends other embeddings than those that its terms name"):
        decode_table(content, TableTerms.of(table), table.shape)


class TestPublicOnes:
    @pytest.fixture
    def copy(self, tmp_path) -> Path:
        make_model("SM+ScFuFFN").save_pretrained(tmp_path / "copy")
        return tmp_path / "copy"

    @pytest.fixture
    def own(self, copy) -> dict[str, np.ndarray]:
        body = make_model("SM").from_pretrained(copy).transformer
        return {name: getattr(body, name).weight.detach().numpy().copy() for name in ("wte", "wpe")}

    def test_a_copy_is_taken_if_it_is_the_same_whatever_its_name(self, copy, own):
        check_public(read_public(copy), copy, CHECKPOINT, *describe(own))

    @pytest.mark.parametrize("name", ["wte", "wpe"])
    def test_one_bit_is_enough_to_refuse_it_in_a_line(self, name, copy, own):
        own[name].view(np.uint32)[-1, -1] ^= 1
        with pytest.raises(EmbeddingsError, match="name a copy of these with --public-checkpoint") as refused:
            check_public(read_public(copy), copy, CHECKPOINT, *describe(own))
        said = str(refused.value)
        assert said.startswith(f"{name} of {copy} is not the server's")
        assert f"openai-community/gpt2 (revision 0123abc), {own[name].shape} numbers with the SHA-256" in said
        assert "\n" not in said and not may_be_told(refused.value)  # the server needs no paths of this machine

    def test_it_is_read_once_as_long_as_its_files_stay_as_they_are(self, copy, own):
        public = read_public(copy)
        assert read_public(str(copy)) is public
        flip_bit(copy / "model.safetensors", "transformer.wte.weight")
        # What was read and hashed is what is used, whatever becomes of the file; and a changed one is read anew.
        assert are_equal(public.tables, own)
        changed = read_public(copy)
        assert changed is not public
        with pytest.raises(EmbeddingsError, match="is not the server's"):
            check_public(changed, copy, CHECKPOINT, *describe(own))
        with pytest.raises(ValueError, match="read-only"):
            public.tables["wte"][0, 0] = 0.0

    def test_so_is_another_shape(self, copy, own):
        terms, shapes = describe(own)
        with pytest.raises(EmbeddingsError, match="wte of"):
            check_public(read_public(copy), copy, CHECKPOINT, terms, shapes | {"wte": shapes["wte"][::-1]})


class TestCache:
    @pytest.fixture
    def cache(self, tmp_path) -> TableCache:
        return TableCache(tmp_path / "cache" / "tables")

    def test_what_is_kept_is_found_again_and_nobody_else_can_read_it(self, cache):
        tables = make_tables()
        assert cache.load(*describe(tables)) is None
        cache.keep(tables, describe(tables)[0])
        assert are_equal(cache.load(*describe(tables)), tables)
        assert cache.load(*describe(make_tables(1))) is None
        assert len(files := list(cache.folder.iterdir())) == len(tables)
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
        assert cache.folder.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("change", ["cut", "cut within a number", "one bit"])
    def test_what_is_damaged_is_not_taken_and_replaced(self, change, cache):
        tables = make_tables()
        cache.keep(tables, describe(tables)[0])
        path = cache.folder / TableTerms.of(tables["wte"]).hash
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes({"cut": content[:-4], "cut within a number": content[:-3], "one bit": content}[change])
        assert cache.load(*describe(tables)) is None
        cache.keep(tables, describe(tables)[0])
        assert are_equal(cache.load(*describe(tables)), tables)

    def test_a_hash_of_other_sizes_finds_nothing(self, cache):
        tables = make_tables()
        cache.keep(tables, describe(tables)[0])
        terms, shapes = describe(tables)
        assert cache.load(terms, shapes | {"wte": (7, 5)}) is None

    def test_those_go_that_were_not_used_for_the_longest_time(self, cache):
        kept = [make_tables(seed) for seed in range(MOST_KEPT)]
        for number, tables in enumerate(kept):
            cache.keep(tables, describe(tables)[0])
            for table in tables.values():
                if (path := cache.folder / TableTerms.of(table).hash).exists():
                    os.utime(path, (number, number))
            if number >= 1:
                assert cache.load(*describe(kept[0])) is not None
        assert len(list(cache.folder.iterdir())) == MOST_KEPT
        assert cache.load(*describe(kept[1])) is None

    def test_where_nothing_can_be_kept_a_line_says_so(self, cache, caplog):
        cache.folder.parent.mkdir()
        cache.folder.write_text("a file")
        with caplog.at_level(logging.WARNING):
            cache.keep(*make_described())
        assert f"can't be kept ([Errno 17] File exists: '{cache.folder}')" in caplog.text

    def test_without_a_home_nothing_is_kept_and_nothing_fails(self, monkeypatch, caplog):
        def fail():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", fail)
        assert TableCache().load({}, {}) == {}
        assert TableCache().load(*describe(make_tables())) is None
        with caplog.at_level(logging.WARNING):
            TableCache().keep(*make_described())
        assert "can't be kept (there is no home directory" in caplog.text

    def test_a_write_that_fails_leaves_nothing(self, cache, monkeypatch):
        def fail(file):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        cache.keep(*make_described())
        assert not list(cache.folder.iterdir())

    def test_it_lies_where_a_users_caches_are(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert TableCache().folder == tmp_path / "entropy_gpt" / "tables"
        monkeypatch.setenv("HOME", str(tmp_path))
        for not_absolute in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", not_absolute)
            assert TableCache().folder == tmp_path / ".cache" / "entropy_gpt" / "tables"
