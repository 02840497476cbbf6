"""What a stranger does with models under one release of transformers; run by `test_releases.py`. Prints JSON."""

import contextlib
import io
import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


PROMPT_LENGTH, NEW_TOKENS = 9, 8
PADDING = 1
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PADDING, "eos_token_id": None}


def use(folders: list[str], text: str) -> dict:
    """
    Loads each model and its tokenizer, generates, trains for a step, saves and loads again.

    Args:
        folders (`list[str]`): Models, each with `reference.safetensors`: tokens, logits, entropies.
        text (`str`): What the tokenizers encode.

    Returns:
        `dict`: What came of each model, by its folder's name.
    """
    return {Path(folder).name: _use(Path(folder)) | {"ids": _encode(folder, text)} for folder in folders}


def encode(folder: str, text: str) -> dict:
    """What a tokenizer makes of a text."""
    return {"ids": _encode(folder, text)}


def refuse(folder: str) -> dict:
    """How loading ends under a release that is too old."""
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    except ImportError as error:
        return {"message": str(error)}
    raise AssertionError(f"the model was loaded under transformers {transformers.__version__}")


def _use(folder: Path) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    reference = load_file(folder / "reference.safetensors")
    with torch.no_grad():
        outputs = model(reference["tokens"], output_entropies=True)
    answer = {
        "remote": type(model).__module__.startswith("transformers_modules."),
        "logits": _distance(outputs.logits, reference["logits"]),
        "entropies": _distance(torch.stack(outputs.attention_entropies), reference["entropies"]),
    }
    answer |= _generate(model, reference["tokens"])
    answer |= _train(model, reference["tokens"], folder)
    return answer


def _generate(model, tokens: torch.Tensor) -> dict:
    """Pairs of what has to be the same."""
    prompt = tokens[:, :PROMPT_LENGTH]
    seen = torch.ones_like(prompt)
    padded, mask = prompt.clone(), seen.clone()
    padded[0, :3], mask[0, :3] = PADDING, 0

    def generate(prompt, mask, **options):
        options = {**GREEDY, **options}
        return model.generate(prompt, attention_mask=mask, **options)[:, prompt.shape[1] :].tolist()

    return {
        "greedy": [generate(prompt, seen), generate(prompt, seen, use_cache=False)],
        "beam": [generate(prompt, seen, num_beams=3), generate(prompt, seen, num_beams=3, use_cache=False)],
        "padded": [generate(padded, mask), generate(padded, mask, use_cache=False)],
        "padding": [generate(padded, mask)[:1], generate(prompt[:1, 3:], seen[:1, 3:])],
        "static cache": [
            generate(prompt, seen, cache_implementation="static", disable_compile=True),
            generate(prompt, seen),
        ],
    }


def _train(model, tokens: torch.Tensor, folder: Path) -> dict:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        str(folder / "trainer"),
        max_steps=1,
        per_device_train_batch_size=len(rows),
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    with contextlib.redirect_stdout(io.StringIO()):
        loss = trainer.train().training_loss
    trained = model.train()(tokens, labels=tokens)
    model.save_pretrained(folder / "saved")
    again = AutoModelForCausalLM.from_pretrained(folder / "saved", trust_remote_code=True).eval()
    with torch.no_grad():
        distance = _distance(again(tokens).logits, model.eval()(tokens).logits)
    return {
        "loss": loss,
        "has_penalty": trained.loss.item() != trained.cross_entropy_loss.item(),
        "unchanged": [name for name, old in before.items() if torch.equal(old, model.get_parameter(name))],
        "saved": distance,
    }


def _encode(folder: str, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text).input_ids


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


class _Complaints(logging.Handler):
    """What transformers says in words of deprecation."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record: logging.LogRecord):
        if "deprecated" in record.getMessage():
            self.messages.append(record.getMessage())


if __name__ == "__main__":
    deed, told = sys.argv[1:]
    complaints = _Complaints()
    logging.getLogger("transformers").addHandler(complaints)
    warnings.filterwarnings("error", category=FutureWarning, module="transformers_modules")
    answer = globals()[deed](**json.loads(told))
    print(f"\n{json.dumps(answer | {'deprecations': complaints.messages})}")
