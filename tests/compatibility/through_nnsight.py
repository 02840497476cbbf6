"""
What nnsight gives of two saved models, one of transformers and one that is remote code, by the same lines: prints the
differences as JSON. Run by path, in an environment with nnsight and without this project.
"""

import json
import sys

import torch
from nnsight.modeling.transformers import TransformersModel


PROMPTS = ("w5 w6 w7 w8 w9 w10", "w11 w12 w13")
LAYER, HEAD_SIZE = 1, 12
NEW_TOKENS = 6


def load(folder: str) -> TransformersModel:
    options = {"trust_remote_code": True, "attn_implementation": "eager", "dispatch": True}
    return TransformersModel(folder, task="text-generation", **options)


def trace(model) -> dict[str, torch.Tensor]:
    """Two prompts of different lengths, each on its own."""
    seen = {}
    for number, prompt in enumerate(PROMPTS):
        with model.trace(prompt):
            block = model.transformer.h[LAYER]
            attention = block.attn.output
            seen[f"attention outputs {number}"] = attention[0].save()
            seen[f"attention patterns {number}"] = attention[1].save()
            seen[f"FFN outputs {number}"] = block.mlp.output.save()
            seen[f"hidden states {number}"] = block.output.save()
            seen[f"logits {number}"] = model.output.logits.save()
    return seen


def trace_batch(model) -> dict[str, torch.Tensor]:
    """Both prompts as one batch, padded on the left by nnsight."""
    seen = {}
    with model.trace() as tracer:
        for number, prompt in enumerate(PROMPTS):
            with tracer.invoke(prompt):
                seen[f"hidden states in a batch {number}"] = model.transformer.h[LAYER].output.save()
    return seen


def intervene(model) -> dict[str, torch.Tensor]:
    """The logits with hidden states doubled, a position set to zero, and a head taken out."""
    logits = {}
    with model.trace(PROMPTS[0]):
        model.transformer.h[LAYER].output = model.transformer.h[LAYER].output * 2
        logits["logits, hidden states doubled"] = model.output.logits.save()
    with model.trace(PROMPTS[0]):
        model.transformer.h[LAYER].output[:, 3] = 0
        logits["logits, hidden states set to zero"] = model.output.logits.save()
    with model.trace(PROMPTS[0]):
        model.transformer.h[LAYER].attn.c_proj.input[..., :HEAD_SIZE] = 0
        logits["logits, a head ablated"] = model.output.logits.save()
    return logits


def generate(model, steering: float = 0.0) -> list[int]:
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with model.generate(PROMPTS[0], **options) as tracer:
        for _ in tracer.iter[:NEW_TOKENS]:
            model.transformer.h[LAYER].output = model.transformer.h[LAYER].output + steering
        tokens = tracer.result.save()
    return tokens.tolist()


@torch.no_grad()
def main(*folders: str):
    torch.set_num_threads(1)
    stock, ours = (load(folder) for folder in folders)
    assert type(ours._module).__module__.startswith("transformers_modules.")
    figures = {}
    for look in (trace, trace_batch, intervene):
        theirs, own = look(stock), look(ours)
        figures |= {name: (own[name] - wanted).abs().max().item() for name, wanted in theirs.items()}
    changed, plain = intervene(ours), trace(ours)["logits 0"]
    figures["what interventions do"] = min((logits - plain).abs().max().item() for logits in changed.values())
    steered = torch.linspace(-40, 40, 48)
    generated = [[generate(model), generate(model, steered)] for model in (stock, ours)]
    figures["generated as stock"] = generated[0] == generated[1]
    figures["steering changes tokens"] = generated[1][0] != generated[1][1]
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
