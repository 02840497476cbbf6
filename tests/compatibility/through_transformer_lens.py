"""
What TransformerLens gives of saved models, beside what the models themselves give: for each folder one line of JSON.
Run by path, in an environment with TransformerLens and with this project as a wheel; the models are remote code.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoModelForCausalLM, PreTrainedModel


LAYER, HEAD = 1, 2


def load(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, attn_implementation="eager"
    )
    assert type(model).__module__.startswith("transformers_modules.")
    return model


def make_pair(folder: str, dtype: torch.dtype) -> tuple[PreTrainedModel, TransformerBridge]:
    """A model as it is, and a bridge around another copy of it."""
    model = load(folder, dtype)
    bridge = build_bridge_from_module(model, "EntropyGPTForCausalLM", hf_config=model.config)
    bridge.set_use_attn_result(True)
    return load(folder, dtype), bridge


class Watched:
    """A model as it is, with its activations under TransformerLens' names, from hooks of torch."""

    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor):
        self.model, self.cache = model, {}
        handles = [
            model.transformer.wte.register_forward_hook(self._keep("hook_embed")),
            model.transformer.ln_f.register_forward_pre_hook(self._keep_input("ln_final.hook_in")),
            model.transformer.ln_f.register_forward_hook(self._keep("ln_final.hook_out")),
        ]
        for i, block in enumerate(model.transformer.h):
            handles += [
                block.register_forward_hook(self._keep(f"blocks.{i}.hook_resid_post")),
                block.attn.register_forward_hook(self._keep(f"blocks.{i}.hook_attn_out")),
                block.attn.c_proj.register_forward_pre_hook(self._keep_heads(i, block.attn)),
            ]
            if block.mlp is not None:
                handles += [
                    block.ln_2.register_forward_pre_hook(self._keep_input(f"blocks.{i}.hook_resid_mid")),
                    block.mlp.register_forward_hook(self._keep(f"blocks.{i}.mlp.hook_out")),
                ]
        outputs = model(tokens, output_attentions=True)
        for handle in handles:
            handle.remove()
        self.logits = outputs.logits
        self.cache |= {f"blocks.{i}.attn.hook_pattern": pattern for i, pattern in enumerate(outputs.attentions)}

    def _keep(self, name: str):
        def hook(module, arguments, output):
            self.cache[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _keep_input(self, name: str):
        def hook(module, arguments):
            self.cache[name] = arguments[0]

        return hook

    def _keep_heads(self, layer: int, attention):
        """What each head adds to the residual stream, by the model's own linear map."""

        def hook(module, arguments):
            (z,) = arguments
            alone = z[..., None, :] * head_masks(attention, z)
            project = module.forward
            self.cache[f"blocks.{layer}.attn.hook_result"] = project(alone) - project(torch.zeros_like(alone))

        return hook


def head_masks(attention, z: torch.Tensor) -> torch.Tensor:
    """1 where a head's part of the concatenated heads is, of shape `(heads, width)`."""
    heads = z.shape[-1] // attention.head_dim
    return torch.eye(heads, dtype=z.dtype).repeat_interleave(attention.head_dim, dim=1)


def difference(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert given.shape == wanted.shape, (given.shape, wanted.shape)
    return ((given - wanted).abs().max() / wanted.abs().max()).item()


@torch.no_grad()
def compare_activations(model, bridge, tokens) -> dict[str, float]:
    watched = Watched(model, tokens)
    logits, cache = bridge.run_with_cache(tokens)
    differences = {"logits": difference(logits, watched.logits)}
    for name, wanted in watched.cache.items():
        kind = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        differences[kind] = max(differences.get(kind, 0.0), difference(cache[name], wanted))
    return differences


@torch.no_grad()
def compare_attribution(model, bridge, tokens) -> dict[str, float]:
    """The sum of what embeddings, heads, FFNs and biases are in the logits; a norm at the end is held fixed."""
    _, cache = bridge.run_with_cache(tokens)
    parts, labels = cache.get_full_resid_decomposition(expand_neurons=False, apply_ln=True, return_labels=True)
    heads = bridge.cfg.n_layers * bridge.cfg.n_heads
    assert len(labels) == heads + bridge.cfg.n_layers + len(("embed", "pos_embed", "bias"))
    shift = bridge.b_U
    if bridge.cfg.normalization_type is not None:
        parts, shift = parts * bridge.ln_final.w, shift + bridge.ln_final.b @ bridge.W_U
    logits, in_logits = model(tokens).logits, parts @ bridge.W_U
    return {
        "sum of attributions": difference(in_logits.sum(dim=0) + shift, logits),
        "of which heads": difference(in_logits[heads:].sum(dim=0) + shift, logits),
    }


@torch.no_grad()
def compare_interventions(model, bridge, tokens) -> dict[str, float]:
    """A head, and an FFN, that add nothing."""
    plain, attention = model(tokens).logits, model.transformer.h[LAYER].attn
    handle = attention.c_proj.register_forward_pre_hook(
        lambda module, arguments: (arguments[0] * (1 - head_masks(attention, arguments[0])[HEAD]),)
    )
    wanted = model(tokens).logits
    handle.remove()

    def without_head(z, hook):
        z = z.clone()
        z[:, :, HEAD] = 0
        return z

    given = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{LAYER}.attn.hook_z", without_head)])
    nothing = (f"blocks.{LAYER}.hook_mlp_out", lambda added, hook: torch.zeros_like(added))
    with bridge.hooks(fwd_hooks=[nothing]):
        _, cache = bridge.run_with_cache(tokens)
    return {
        "a head ablated": difference(given, wanted),
        "what the head does": difference(wanted, plain),
        "an FFN ablated": difference(cache["resid_post", LAYER], cache["resid_mid", LAYER]),
    }


def compare_gradients(model, bridge, tokens) -> dict[str, float]:
    """Of the loss by the patterns, as attribution patching asks for them."""
    outputs = model(tokens, output_attentions=True)
    loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, outputs.attentions)
    _, cache = bridge.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    given = [cache[f"blocks.{layer}.attn.hook_pattern_grad"] for layer in range(len(gradients))]
    return {"gradients of patterns": max(map(difference, given, gradients))}


@torch.no_grad()
def compare_padding(model, bridge, tokens) -> dict[str, float]:
    """A batch padded on the left."""
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    wanted = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    given = bridge(tokens, attention_mask=mask)
    return {"left padding": difference(given[mask.bool()], wanted[mask.bool()])}


@torch.no_grad()
def compare_generated(model, bridge, tokens) -> dict[str, bool]:
    """Greedy tokens, with a cache, beside those of the model without one."""
    prompt = wanted = tokens[:, :4]
    for _ in range(8):
        wanted = torch.cat([wanted, model(wanted, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "verbose": False}
    return {"generated": torch.equal(bridge.generate(prompt, return_type="tokens", **options), wanted)}


@torch.no_grad()
def compare_processed(model, bridge, tokens) -> dict[str, float | None]:
    """Weights processed as HookedTransformer's are: the same probabilities, or a refusal."""
    try:
        bridge.enable_compatibility_mode(disable_warnings=True)
    except RuntimeError as error:
        assert "does not support compatibility mode" in str(error)
        return {"weights processed": None}
    wanted = model(tokens).logits.log_softmax(-1)
    return {"weights processed": difference(bridge(tokens).log_softmax(-1), wanted)}


COMPARISONS = (
    compare_activations,
    compare_attribution,
    compare_interventions,
    compare_gradients,
    compare_padding,
    compare_generated,
    compare_processed,
)


def main(folders: list[str]):
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for folder in folders:
        tokens = torch.randint(2, 101, (2, 17))
        figures = {"folder": Path(folder).name}
        single, double = (make_pair(folder, dtype) for dtype in (torch.float32, torch.float64))
        figures["sum of attributions, float32"] = compare_attribution(*single, tokens)["sum of attributions"]
        for compare in COMPARISONS:
            figures |= compare(*double, tokens)
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
