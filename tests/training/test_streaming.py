"""Streams: what they yield is what packing yields, in every pass, worker and process once."""

import itertools
import json
import multiprocessing
import operator
import os
import socket
import tracemalloc
from collections import Counter
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from entropy_gpt.training import packing
from entropy_gpt.training.packing import collate_blocks, pack
from entropy_gpt.training.streaming import PackedStream, Texts
from entropy_gpt.training.tokenizer import train_tokenizer
from tests.architectures import NO_DROPOUT, make_model
from tests.slow import slow_but


@pytest.fixture(scope="module")
def tokenizer():
    """One token for a byte, so that documents are told apart in any block."""
    return train_tokenizer([], vocab_size=257)


def make_texts(documents: int = 40, parts: int = 4) -> Texts:
    """Documents of seven letters: eight tokens with the end of text."""
    rows = Dataset.from_dict({"text": [f"text{index:03}" for index in range(documents)]})
    return Texts(rows.to_iterable_dataset(num_shards=parts), operator.itemgetter("text"))


def read(blocks, tokenizer) -> list[str]:
    """The documents in blocks that hold them whole, in their order."""
    joined = "".join(tokenizer.decode(block["input_ids"]) for block in blocks)
    return [text for text in joined.split(tokenizer.eos_token) if text]


def take(stream, count):
    iterator = iter(stream)
    return [next(iterator)["input_ids"].tolist() for _ in range(count)]


def test_a_pass_is_the_blocks_of_its_documents(tokenizer):
    texts = make_texts()
    blocks = [block["input_ids"].tolist() for block in PackedStream(texts, tokenizer, 5, seed=3, passes=1)]
    assert blocks == pack(texts.shuffle((3, 0), 10_000), tokenizer, 5)["input_ids"][:]


def test_passes_differ_in_order_and_not_in_content(tokenizer):
    stream = PackedStream(make_texts(), tokenizer, 8, seed=1, shuffle_buffer=10, passes=1)
    orders = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        orders.append(read(stream, tokenizer))
        assert read(stream, tokenizer) == orders[-1]
    assert sorted(orders[0]) == sorted(make_texts()) == sorted(orders[1]) == sorted(orders[2])
    assert len({*map(tuple, orders)}) == 3
    stream.passes = 3
    stream.set_epoch(0)
    assert read(stream, tokenizer) == [*itertools.chain(*orders)]


def test_seeds_give_other_orders_and_the_same_one_the_same(tokenizer):
    first, again, other = (
        read(PackedStream(make_texts(), tokenizer, 8, seed=seed, passes=1), tokenizer) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_stream_without_end_loses_nothing_between_passes(tokenizer):
    """13 is no divisor of the 320 tokens of a pass."""
    endless = PackedStream(make_texts(), tokenizer, 13)
    tokens = [token for block in take(endless, 70) for token in block]
    expected = []
    for number in range(3):
        for text in make_texts().shuffle((0, number), 10_000):
            expected += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert tokens == expected[: len(tokens)]


@pytest.mark.parametrize("workers", slow_but([2], [1, 2, 5]))
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_read_each_document_once(workers, tokenizer):
    """One of five workers has no part of the data set."""
    stream = PackedStream(make_texts(), tokenizer, 8, passes=2)
    loader = DataLoader(stream, batch_size=3, num_workers=workers, collate_fn=collate_blocks)
    batches = [batch["input_ids"].tolist() for batch in loader]
    documents = read([{"input_ids": block} for batch in batches for block in batch], tokenizer)
    assert Counter(documents) == Counter([*make_texts(), *make_texts()])
    assert batches == [batch["input_ids"].tolist() for batch in loader]


def test_workers_that_live_on_know_the_epoch(tokenizer):
    stream = PackedStream(make_texts(), tokenizer, 8, passes=1)
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        orders.append(read(loader, tokenizer))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_processes_that_read_for_themselves_share_the_blocks(tokenizer):
    """What accelerate makes of a stream with `dispatch_batches=False`."""
    stream = PackedStream(make_texts(), tokenizer, 8, passes=1)
    shards = [
        IterableDatasetShard(stream, batch_size=5, drop_last=True, num_processes=2, process_index=index)
        for index in range(2)
    ]
    documents = [document for shard in shards for document in read(shard, tokenizer)]
    assert sorted(documents) == sorted(make_texts())


@pytest.mark.usefixtures("fresh_accelerator")
def test_processes_that_are_handed_batches_share_the_documents(tokenizer, tmp_path):
    """What the `Trainer` makes of a stream if it is told nothing."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=read_as_rank, args=(rank, port, tokenizer, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [len(share) for share in shares] == [20, 20]
    assert sorted(itertools.chain(*shares)) == sorted(make_texts())


def read_as_rank(rank, port, tokenizer, folder):
    """Leaves the documents that one of two processes gets."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    accelerator = Accelerator(cpu=True)
    stream = PackedStream(make_texts(), tokenizer, 8, passes=1)
    loader = accelerator.prepare(DataLoader(stream, batch_size=2, collate_fn=collate_blocks))
    blocks = [{"input_ids": block} for batch in loader for block in batch["input_ids"]]
    (folder / f"{rank}.json").write_text(json.dumps(read(blocks, tokenizer)))
    accelerator.end_training()


def test_a_resumed_run_goes_on_with_the_next_batch_in_any_pass(tokenizer, tmp_path, monkeypatch):
    """A pass is 5 blocks: with 2 a step, the third step already reads of two passes."""
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 3)

    def train(folder, resume):
        model = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT, vocab_size=len(tokenizer))
        arguments = TrainingArguments(
            output_dir=tmp_path / folder,
            max_steps=8,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_steps=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        stream = PackedStream(make_texts(5), tokenizer, 8, shuffle_buffer=3)
        trainer = Trainer(model=model, args=arguments, train_dataset=stream, data_collator=collate_blocks)
        trainer.train(resume_from_checkpoint=resume)
        return dict(model.named_parameters())

    whole = train("whole", None)
    resumed = train("resumed", str(tmp_path / "whole" / "checkpoint-4"))
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name]), name


def test_memory_does_not_grow_with_the_documents(tokenizer):
    def write_rows(documents):
        for index in range(documents):
            yield {"text": f"text {index} " * 20}

    def peak(documents):
        rows = IterableDataset.from_generator(write_rows, gen_kwargs={"documents": documents})
        stream = PackedStream(Texts(rows, operator.itemgetter("text")), tokenizer, 64, shuffle_buffer=50, passes=1)
        tracemalloc.start()
        with mock.patch.object(packing, "BATCH_CHARACTERS", 1 << 14):
            blocks = sum(1 for _ in stream)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, blocks

    peak(100)
    (little, few), (much, many) = peak(200), peak(4000)
    assert many > 19 * few
    assert much < 1.2 * little
