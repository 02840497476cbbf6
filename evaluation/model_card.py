"""The README.md of a model's folder."""

from huggingface_hub import ModelCardData

from .comparison import comparison_markdown
from .results import ModelResult


def model_card(result: ModelResult) -> str:
    """
    The README.md of a model's folder: what it is, how to load it, what was measured, what it is not for.

    Raises:
        `ValueError`: If training, likelihood or heads are missing.
    """
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["entropy-gpt", "private-inference", "custom_code"],
    )
    architecture = result.architecture
    return f"""---
{metadata.to_yaml()}
---

# EntropyGPT {result.title}

A GPT-2 of the architecture {architecture.notation} (final norm: {architecture.final_normalization}), with
{architecture.parameters:,} parameters: one of the architectures for private inference of "Entropy-Guided Attention for
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
