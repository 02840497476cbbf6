"""TransformerLens, by the adapter that the installed project brings, with models that are remote code."""

import json
from pathlib import Path

import pytest
import torch

from tests.architectures import ARCHITECTURES, make_model
from tests.wheel import build_wheel

from .environments import Environment
from .folders import run_page


pytestmark = pytest.mark.releases
TOOL = "transformer-lens"
SCRIPT = Path(__file__).with_name("through_transformer_lens.py")
WITHOUT_NORMS = {"final_normalization": "none"}
UNTIED = {"tie_word_embeddings": False, "head_bias": True}
MODELS = {
    **{notation: (notation, {}) for notation in (*ARCHITECTURES, "SM(t)+LN+G+ScFFN")},
    **{
        f"{notation} without the last norm": (notation, WITHOUT_NORMS | (UNTIED if "Fu" in notation else {}))
        for notation in ARCHITECTURES
        if "LN" not in notation
    },
    "SM+StaticLN, the last norm too": ("SM+StaticLN", {"final_normalization": "static"}),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    environment = Environment.with_tool(TOOL, "4.3.0")
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    environment.run("-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    return environment


@pytest.fixture(scope="module")
def version(environment):
    return f"{environment.version_of(TOOL)}, transformers {environment.version_of('transformers')}"


@pytest.fixture(scope="module")
def figures(environment, tmp_path_factory):
    """What the script found, by the model's name; of this project, it can import what is installed alone."""
    folders = {}
    for name, (notation, fields) in MODELS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("model")
        make_model(notation, **fields).save_pretrained(folders[name])
    output = environment.run(SCRIPT, *folders.values(), HF_HOME=str(tmp_path_factory.mktemp("home")))
    found = {line.pop("folder"): line for line in map(json.loads, output.splitlines())}
    return {name: found[folder.name] for name, folder in folders.items()}


def largest(figures, *kinds: str) -> float:
    return max(found[kind] for found in figures.values() for kind in kinds)


def test_activations(figures, version, compared):
    kinds = {
        "attention patterns": ["attn.hook_pattern"],
        "head outputs": ["attn.hook_result"],
        "residual stream": [
            "hook_embed",
            "hook_resid_mid",
            "hook_resid_post",
            "ln_final.hook_in",
            "ln_final.hook_out",
        ],
        "outputs of attention, FFNs and the last norm": ["hook_attn_out", "mlp.hook_out", "ln_final.hook_out"],
        "logits": ["logits"],
    }
    for what, names in kinds.items():
        difference = largest(figures, *names)
        assert difference < 1e-9, what
        compared(TOOL, f"{what} of {len(MODELS)} models", f"equal within {difference:.0e}, in float64", version)


def test_direct_logit_attribution(figures, version, compared):
    assert largest(figures, "sum of attributions") < 1e-9
    assert largest(figures, "sum of attributions, float32") < 1e-5
    assert min(found["of which heads"] for found in figures.values()) > 0.05
    without_norms = {
        name: found for name, found in figures.items() if MODELS[name][1].items() >= WITHOUT_NORMS.items()
    }
    assert len(without_norms) > 9
    for which, found in (("without norms", without_norms), ("with the last norm held fixed", figures)):
        difference, single = (largest(found, f"sum of attributions{dtype}") for dtype in ("", ", float32"))
        compared(
            TOOL,
            f"sum of direct logit attributions beside the logits, {which}",
            f"equal within {difference:.0e}, in float32 {single:.0e}",
            version,
        )


def test_interventions_and_gradients(figures, version, compared):
    assert min(found["what the head does"] for found in figures.values()) > 0.05
    assert largest(figures, "an FFN ablated") < 1e-9
    for kind in ("a head ablated", "gradients of patterns", "left padding"):
        difference = largest(figures, kind)
        assert difference < 1e-9, kind
        compared(TOOL, kind, f"equal within {difference:.0e}, in float64", version)


def test_generation(figures, version, compared):
    assert all(found["generated"] for found in figures.values())
    compared(TOOL, "greedy tokens with a cache beside the model's without one", "the same", version)


def test_weights_are_processed_where_norms_are_left_alone(figures, version, compared):
    """Centred weights are the same model to a LayerNorm, and another one without."""
    processed = {name: found["weights processed"] for name, found in figures.items()}
    taken = {name for name, difference in processed.items() if difference is not None}
    assert taken == {name for name in MODELS if "+LN" in name}
    difference = max(processed[name] for name in taken)
    assert difference < 1e-6  # TransformerLens processes them in float32
    what = f"probabilities with processed weights, of the {len(taken)} models with LayerNorms alone"
    compared(TOOL, what, f"equal within {difference:.0e}; the others refuse", version)


def test_the_page(environment, tmp_path):
    said = run_page(TOOL, environment, tmp_path)
    assert all(f"'{part}'" in said for part in ("L0H0", "2_mlp_out", "embed", "pos_embed", "bias"))
