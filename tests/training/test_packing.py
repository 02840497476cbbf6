"""Packing, held against one token after the other."""

import copy
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from entropy_gpt.training import packing, text_pieces
from entropy_gpt.training.errors import CorpusError
from entropy_gpt.training.packing import collate_blocks, pack, spread_blocks
from entropy_gpt.training.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Path(__file__).with_name("test_corpus.py").read_text()], vocab_size=400)


def pack_naively(texts, tokenizer, block_size):
    """One document after the other, whole."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    stream = []
    for text in texts:
        stream += [*backend.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]
    return stream, [stream[start : start + block_size] for start in range(0, len(stream), block_size)]


def test_the_name_of_a_special_token_in_a_text_is_text(tokenizer):
    text = "print('<|endoftext|>')"
    (row,) = pack([text], tokenizer, 10)["input_ids"][:1]
    assert tokenizer.eos_token_id not in row
    tokens = pack([text], tokenizer, 1)["input_ids"]
    assert tokens[-1] == [tokenizer.eos_token_id]
    assert tokenizer.decode([token for (token,) in tokens[:-1]]) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id]


@given(st.lists(st.text(alphabet="ab\n ", max_size=60), max_size=6), st.integers(1, 9))
def test_packing_keeps_every_token_in_order(tokenizer, texts, block_size):
    stream = []
    for text in texts:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    seen = []
    if len(stream) < block_size:
        with pytest.raises(CorpusError, match=f"{len(stream)} tokens, and one block takes {block_size}"):
            pack(texts, tokenizer, block_size)
        return
    blocks = pack(texts, tokenizer, block_size, seen.append)["input_ids"]
    assert [token for block in blocks for token in block] == stream[: len(stream) // block_size * block_size]
    assert sum(seen) == len(texts)


# Of the letter, the combining mark and the signs, a cut at the wrong place would change the tokens.
TEXTS = st.lists(st.text(alphabet="abé\u0301.'_1\n\r\t 中", max_size=200), min_size=1, max_size=8)


@example(["a\nb\nc"], 1, 50, 3, 0)  # each line's end, and none of them twice
@given(TEXTS, st.integers(1, 9), st.integers(1, 50), st.integers(1, 3), st.integers(0, 20))
def test_blocks_do_not_depend_on_batches_and_pieces(tokenizer, texts, block_size, characters, documents, piece):
    stream, blocks = pack_naively(texts, tokenizer, block_size)
    if len(stream) < block_size:
        return
    sizes = {"BATCH_CHARACTERS": characters, "BATCH_DOCUMENTS": documents}
    with mock.patch.multiple(packing, **sizes), mock.patch.object(text_pieces, "PIECE_CHARACTERS", piece):
        packed = pack(texts, tokenizer, block_size)
        first = pack(texts, tokenizer, block_size, most_blocks=2)
    whole = blocks[: len(stream) // block_size]
    assert packed["input_ids"][:] == whole
    assert first["input_ids"][:] == whole[:2]


def test_a_long_document_is_tokenised_in_pieces(tokenizer):
    text = "".join(f"line {index}\n" for index in range(200))
    with mock.patch.object(text_pieces, "PIECE_CHARACTERS", 50):
        (pieces, are_ends) = next(packing._batches([text, "short"], can_be_cut=True))
    assert "".join(pieces) == text + "short"
    assert len(pieces) > 20
    assert sum(are_ends) == 2


@pytest.mark.parametrize("prefix_space", [False, True])
@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_other_tokenizers_see_whole_documents(kind, prefix_space):
    """Those that begin a text otherwise than they go on with it: no blank comes in where a piece would begin."""
    tokenizer = Tokenizer(models.BPE() if kind == "byte-level" else models.Unigram())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=prefix_space) if kind == "byte-level" else pre_tokenizers.Metaspace()
    )
    options = {"vocab_size": 400, "special_tokens": ["</s>", "<unk>"], "show_progress": False}
    trainer = (
        trainers.BpeTrainer(**options)
        if kind == "byte-level"
        else trainers.UnigramTrainer(**options, unk_token="<unk>")
    )
    text = "".join(f"some words of line {index}\n" for index in range(200))
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    expected, _ = pack_naively([text], fast, 1)
    with mock.patch.object(text_pieces, "PIECE_CHARACTERS", 50):
        assert [token for (token,) in pack([text], fast, 1)["input_ids"]] == expected


def test_truncation_and_padding_that_were_saved_with_a_tokenizer_are_not_applied(tokenizer, tmp_path):
    texts = ["a long text of many words, " * 20, "short"]
    expected, _ = pack_naively(texts, tokenizer, 1)
    spoilt = copy.deepcopy(tokenizer)
    spoilt(["a", "b c d"], truncation=True, max_length=4, padding=True)
    spoilt.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.backend_tokenizer.truncation is not None
    assert [token for (token,) in pack(texts, loaded, 1)["input_ids"]] == expected


def test_blocks_in_a_file_are_those_in_memory_and_small(tokenizer, tmp_path):
    texts = [f"def f{index}(x): return x + {index}\n" for index in range(500)]
    file = tmp_path / "blocks.arrow"
    filed, held = pack(texts, tokenizer, 16, path=file), pack(texts, tokenizer, 16)
    assert filed["input_ids"][:] == held["input_ids"][:]
    assert filed.cache_files == [{"filename": str(file)}]
    assert filed.features["input_ids"].feature.dtype == "uint16"
    assert filed.with_format("torch")[:2]["input_ids"].dtype == torch.int64
    for formatted in (filed, filed.with_format("numpy"), filed.with_format("torch")):
        assert collate_blocks([formatted[3], formatted[1]])["input_ids"].tolist() == filed["input_ids"][[3, 1]]


def test_a_large_vocabulary_takes_a_larger_type(tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<{index}>" for index in range((1 << 16) - len(tokenizer))])
    assert packing.token_type(larger) == np.uint16
    larger.add_tokens(["<one more>"])
    assert packing.token_type(larger) == np.int32
    assert pack(["some text"], larger, 3).features["input_ids"].feature.dtype == "int32"


def test_blocks_are_spread_evenly():
    blocks = Dataset.from_dict({"input_ids": [[index] for index in range(10)]})
    assert spread_blocks(blocks, 4)["input_ids"][:] == [[0], [2], [5], [7]]
    assert len(spread_blocks(blocks, 40)) == 10


def test_every_token_of_a_block_is_a_label():
    batch = collate_blocks([{"input_ids": [0, 5, 0]}, {"input_ids": [1, 2, 3]}])
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [[0, 5, 0], [1, 2, 3]]
    assert batch["input_ids"].dtype == torch.int64


def test_memory_does_not_grow_with_the_documents(tokenizer, tmp_path):
    def peak(documents):
        tracemalloc.start()
        with mock.patch.object(packing, "BATCH_CHARACTERS", 1 << 14):
            blocks = pack((f"text {index} " * 20 for index in range(documents)), tokenizer, 64, path=tmp_path / "a")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, len(blocks)

    peak(100)
    (little, few), (much, many) = peak(200), peak(4000)
    assert many > 19 * few
    assert much < 1.2 * little
