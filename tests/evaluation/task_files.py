"""Small data for the tasks of lm-eval, and a model that fits it."""

import bz2
import gzip
import json
import random
import zipfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from entropy_gpt.evaluation.measuring.task_scores import TASK_FOLDER
from entropy_gpt.training.tokenizer import train_tokenizer
from modeling_entropy_gpt import EntropyGPTForCausalLM
from tests.architectures import make_model


WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "house",
    "tree",
    "sees",
    "hears",
    "likes",
    "old",
    "green",
    "café",
    "3",
    "with",
    "not",
]
PARADIGMS = sorted(path.stem.removeprefix("local_blimp_") for path in (TASK_FOLDER / "blimp").glob("*.yaml"))


def make_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(WORDS)] * 2, vocab_size=300)


def make_model_with(tokenizer, notation="SM+LN+G", **fields) -> EntropyGPTForCausalLM:
    return make_model(notation, **{"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **fields})


def make_text(draws: random.Random, least=2, most=7) -> str:
    return " ".join(draws.choices(WORDS, k=draws.randint(least, most)))


def make_pairs(count, seed=0) -> list[dict]:
    draws = random.Random(seed)
    return [{"sentence_good": make_text(draws), "sentence_bad": make_text(draws), "UID": "x"} for _ in range(count)]


def make_questions(count, choices=4, query="Question: {}", gold="gold", seed=1) -> list[dict]:
    draws = random.Random(seed)
    return [
        {
            "query": query.format(make_text(draws)),
            "choices": [make_text(draws, 1) for _ in range(choices)],
            gold: draws.randrange(choices),
        }
        for _ in range(count)
    ]


def make_passages(count, seed=2) -> list[dict]:
    draws = random.Random(seed)
    return [{"context": make_text(draws, 4, 9), "continuation": make_text(draws, 1, 1)} for _ in range(count)]


def write_lines(path: Path, records: list[dict]):
    """As JSON lines, packed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes({".bz2": bz2.compress, ".gz": gzip.compress}.get(path.suffix, bytes)(content))


def write_blimp(path: Path, pairs=2):
    """All paradigms in an archive like the published one, which holds other files too."""
    with zipfile.ZipFile(path, "w") as archive:
        for seed, paradigm in enumerate(PARADIGMS):
            lines = "".join(json.dumps(pair) + "\n" for pair in make_pairs(pairs, seed))
            archive.writestr(f"data/{paradigm}.jsonl", lines)
            archive.writestr(f"__MACOSX/data/._{paradigm}.jsonl", b"\0\1")


def write_task_data(folder: Path):
    """All that the local tasks read."""
    (folder / "below").mkdir(parents=True)
    write_blimp(folder / "below" / "BLiMP.zip")
    write_lines(folder / "lambada_openai.jsonl", make_passages(8))
    write_lines(folder / "hellaswag_val.jsonl.bz2", make_questions(12, query="Cooking: {}", gold="label"))
    write_lines(folder / "arc_easy.jsonl.gz", make_questions(6, choices=3))
