"""
What captum gives of saved models: of one of transformers and one that is remote code with the same weights, and of a
softmax-only one. Prints figures as JSON. Run by path, in an environment with captum and without this project.
"""

import json
import sys

import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    TextTokenInput,
)
from transformers import AutoModelForCausalLM, AutoTokenizer


LAYER, TARGET = 1, 7
TEXT, CONTINUATION = "w5 w6 w7 w8 w9", "w10 w11 w12"


def load(folder: str):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)

    def logit(tokens):
        return model(tokens, attention_mask=torch.ones_like(tokens)).logits[:, -1, TARGET]

    return model, logit


def attribute(folder: str, tokens: torch.Tensor, baseline: torch.Tensor) -> dict[str, torch.Tensor]:
    model, logit = load(folder)
    block = model.transformer.h[LAYER]
    embeddings = LayerIntegratedGradients(logit, model.transformer.wte)
    of_tokens = LLMAttribution(FeatureAblation(model), AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
    inputs = TextTokenInput(TEXT, of_tokens.tokenizer)
    found = {
        "integrated gradients of embeddings": embeddings.attribute(tokens, baselines=baseline, n_steps=50),
        "gradients times activations of a block": LayerGradientXActivation(logit, block).attribute(tokens),
        "gradients times activations of an FFN": LayerGradientXActivation(logit, block.mlp).attribute(tokens),
        "ablation of tokens, for a continuation": of_tokens.attribute(inputs, target=CONTINUATION).token_attr,
    }
    return {name: value.detach() for name, value in found.items()}


def completeness(folder: str, tokens: torch.Tensor, baseline: torch.Tensor) -> dict[str, float]:
    """Integrated gradients sum to the difference of logits."""
    model, logit = load(folder)
    of_embeddings = LayerIntegratedGradients(logit, model.transformer.wte)
    found = of_embeddings.attribute(tokens, baselines=baseline, n_steps=400)
    wanted = (logit(tokens) - logit(baseline)).detach()
    return {
        "completeness": (found.sum(dim=(1, 2)) - wanted).abs().max().item(),
        "difference of logits": wanted.abs().min().item(),
    }


def main(stock: str, ours: str, softmax_only: str):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randint(2, 101, (2, 9))
    baseline = torch.ones_like(tokens)
    theirs, own = (attribute(folder, tokens, baseline) for folder in (stock, ours))
    figures = {name: (own[name] - wanted).abs().max().item() for name, wanted in theirs.items()}
    figures["smallest attribution"] = min(value.abs().max().item() for value in own.values())
    print(json.dumps(figures | completeness(softmax_only, tokens, baseline)))


if __name__ == "__main__":
    main(*sys.argv[1:])
