"""Saved models with a tokenizer, as tools of strangers find them, and what the page of the tools does with them."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.architectures import SIZES, make_model
from tests.pages import BLOCKS

from .environments import Environment


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    """Saves a model of the tests' sizes, with a tokenizer that reads `w0 w1 ... w100`; returns the folder."""
    words = {f"w{token}": token for token in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "w0", "eos_token": "w0", "pad_token": "w1"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def run_page(tool: str, environment: Environment, folder: Path) -> str:
    """Runs the code that docs/interoperability.md has for a tool, in a folder; returns what it printed."""
    (block,) = (block for block in BLOCKS if block.language == f"python {tool}")
    (folder / "page.py").write_text(block.text, encoding="utf-8")
    save_with_tokenizer(make_model("EReg(SM(t)+ScFuFFN)"), folder / "path/to/folder")
    return environment.run("page.py", cwd=folder, HF_HOME=str(folder / "home"))
