"""A half of a preparation with one share, and a store that has it."""

import time
from pathlib import Path

from spu import libspu

from entropy_gpt.evaluation.private_inference.parties.preparations import Header, describe_shares
from entropy_gpt.evaluation.private_inference.parties.store import Store
from entropy_gpt.evaluation.private_inference.program.settings import SERVER


MADE = time.time()


def make_half(name: str = "0" * 32, **fields) -> tuple[Header, bytes, dict]:
    share = libspu.Share()
    share.meta, share.share_chunks = b"meta\x00", [b"first", b"second part"]
    given = {"rank": SERVER, "terms": "t", "weights": "w", "store": "", "length": 8, "new_tokens": 2, "answers": 1}
    given |= {"owner": "one", "made": MADE, "costs": [], **fields}
    shares = {"product": share}
    return Header(name=name, shares=describe_shares(shares), **given), b"s" * 32, shares


def make_store(folder: Path, rank: int = SERVER) -> Store:
    store = Store(folder, rank)
    store.put(*make_half(rank=rank))
    return store
