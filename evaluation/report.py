"""Tables and model cards, generated from result records.

`python -m evaluation.report` writes the README's table anew from the committed results of the quickstart.
"""

import re
from pathlib import Path

from huggingface_hub import ModelCardData

from .results import ModelResult, load_results


ROOT = Path(__file__).resolve().parent.parent
QUICKSTART_RESULTS = ROOT / "model_cards" / "results" / "quickstart.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- quickstart results: begin -->\n", "<!-- quickstart results: end -->"
README_BLOCK = re.compile(f"(?<={BEGIN}).*?(?={END})", re.DOTALL)

COLUMNS = (
    "architecture",
    "final norm",
    "parameters",
    "perplexity per token",
    "bits per byte",
    "mean entropy (nats)",
    "overloaded heads",
    "training (s)",
)


def comparison_rows(results: list[ModelResult]) -> list[tuple[str, ...]]:
    """One row of text for each model, in the order of `COLUMNS`."""
    return [
        (
            result.title,
            result.final_normalization,
            f"{result.parameters:,}",
            f"{result.perplexity_per_token:.2f}",
            "" if result.bits_per_byte is None else f"{result.bits_per_byte:.3f}",
            f"{result.headwise_entropy.mean:.2f}",
            f"{result.headwise_entropy.overloaded_share:.0%}",
            f"{result.training_seconds:.0f}",
        )
        for result in results
    ]


def comparison_markdown(results: list[ModelResult]) -> str:
    """
    The comparison as a Markdown table, followed by the conditions.

    Raises:
        `ValueError`: If the results were not measured under the same conditions.
    """
    rows = [COLUMNS, ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2), *comparison_rows(results)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{conditions_text(results)}\n"


def conditions_text(results: list[ModelResult]) -> str:
    """
    What all models have in common, and after it what each was told alone.

    Raises:
        `ValueError`: If the results were not measured under the same conditions.
    """
    _check_comparable(results)
    first, conditions = results[0], results[0].conditions
    told = [result.hyperparameters.items() for result in results]
    shared = {name: value for name, value in told[0] if all((name, value) in items for items in told)}
    alone = ""
    for result in results:
        if own := {name: value for name, value in result.hyperparameters.items() if name not in shared}:
            alone += f"{result.title} alone: {list_settings(own)}. "
    for result in results:
        if result.converted_from is not None:
            alone += (
                f"{result.title}: fitted step by step, then healed for {result.training_steps:,} steps, "
                f"{result.training_tokens:,} tokens, beside those of the model it comes from. "
            )
    origin = "Trained from scratch" if first.converted_from is None else "Converted and healed"
    return (
        f"{origin} on {conditions.corpus} ({conditions.corpus_revision}) for {first.training_steps:,} "
        f"steps, {first.training_tokens:,} tokens of a vocabulary of {conditions.vocab_size:,} "
        f"({list_settings(shared)}; seed {conditions.seed}, {conditions.dtype}). {alone}Evaluated on "
        f"{conditions.evaluated_tokens:,} tokens of text kept out of training, in blocks of {conditions.context} "
        f"tokens without overlap. Overloaded: a mean entropy of at least 3/4 of {first.maximum_entropy_nats:.2f} "
        f"nats, which uniform attention has. Versions: {list_settings(conditions.versions)}; commit "
        f"{conditions.git_revision or 'unknown'}; {conditions.machine}."
    )


def list_settings(settings: dict) -> str:
    """Names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _check_comparable(results: list[ModelResult]):
    """Numbers side by side were measured under the same conditions, from scratch with the same amount of training."""
    for result in results:
        names = ["conditions", "maximum_entropy_nats"]
        names += ["training_steps", "training_tokens"] if result.converted_from is None else []
        for name in names:
            if (value := getattr(result, name)) != (expected := getattr(results[0], name)):
                raise ValueError(
                    f"{result.title} and {results[0].title} can't be compared: their {name} differ, {value} and "
                    f"{expected}. Measure them in one run."
                )


def model_card(result: ModelResult) -> str:
    """The README.md of a model's folder: what it is, how to load it, what was measured, what it is not for."""
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["entropy-gpt", "private-inference", "custom_code"],
    )
    return f"""---
{metadata.to_yaml()}
---

# EntropyGPT {result.title}

A GPT-2 of the architecture {result.notation} (final norm: {result.final_normalization}), with
{result.parameters:,} parameters: one of the architectures for private inference of "Entropy-Guided Attention for
Private LLMs" (arXiv 2501.03489).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("import ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

`trust_remote_code=True` runs the Python files in this folder: read them first. They need torch and transformers alone.

## Measured

{comparison_markdown([result])}
## Limits

A small model, trained for a short time to compare architectures; its text is no use for anything else. Loading it this
way keeps nothing secret: privacy comes from running it under secure computation.
"""


def update_readme(readme: Path = README, results: Path = QUICKSTART_RESULTS):
    """
    Replaces the table in the README by one of the committed results.

    Raises:
        `ValueError`: If the README lacks the two comments that enclose the table.
    """
    text = readme.read_text(encoding="utf-8")
    if not README_BLOCK.search(text):
        raise ValueError(f"{readme} has no place for the table: a line {BEGIN.strip()}, and after it {END}.")
    table = comparison_markdown(load_results(results))
    readme.write_text(README_BLOCK.sub(lambda _: f"\n{table}\n", text), encoding="utf-8")


if __name__ == "__main__":
    update_readme()
