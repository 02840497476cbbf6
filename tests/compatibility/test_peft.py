"""PEFT's methods train, save and merge as on GPT-2 of the same weights."""

import os

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import save_file

from modeling_entropy_gpt import EntropyGPTForCausalLM
from modeling_entropy_gpt.forward_keywords import CACHE
from tests.architectures import ARCHITECTURES, NO_DROPOUT, SIZES, make_model, make_tokens
from tests.slow import in_turn
from tests.strangers import do
from tests.twins import make_twins


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TRANSPOSED = {"fan_in_fan_out": True}  # as Conv1D keeps its weights
MAPS = ["c_attn", "c_proj", "c_fc"]
VIRTUAL = {"num_virtual_tokens": 4}
MERGED = {
    "LoRA": (peft.LoraConfig, {"target_modules": ["c_attn"], **TRANSPOSED}),
    "LoRA on all maps": (peft.LoraConfig, {"target_modules": MAPS, "use_rslora": True, **TRANSPOSED}),
    "LoRA on all-linear": (peft.LoraConfig, {"target_modules": "all-linear", **TRANSPOSED}),
    "LoRA on one layer": (
        peft.LoraConfig,
        {"target_modules": MAPS, "layers_to_transform": [1], "layers_pattern": "h", **TRANSPOSED},
    ),
    "LoRA and tokens": (
        peft.LoraConfig,
        {"target_modules": ["c_attn"], "trainable_token_indices": [5, 6], **TRANSPOSED},
    ),
    "DoRA": (peft.LoraConfig, {"target_modules": MAPS, "use_dora": True, **TRANSPOSED}),
    "PiSSA": (peft.LoraConfig, {"target_modules": ["c_attn"], "init_lora_weights": "pissa", **TRANSPOSED}),
    "AdaLoRA": (peft.AdaLoraConfig, {"target_modules": MAPS, "total_step": 10, **TRANSPOSED}),
    "VeRA": (peft.VeraConfig, {"target_modules": ["mlp.c_fc"], **TRANSPOSED}),
    "(IA)3": (
        peft.IA3Config,
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], **TRANSPOSED},
    ),
    "tuned norms": (peft.LNTuningConfig, {"target_modules": ["ln_1", "ln_2", "ln_f"]}),
}
BEFORE_THE_PROMPT = {
    "prefix tuning": (PrefixTuningConfig, VIRTUAL),
    "projected prefix tuning": (PrefixTuningConfig, {**VIRTUAL, "prefix_projection": True, "encoder_hidden_size": 16}),
    "prompt tuning": (PromptTuningConfig, VIRTUAL),
    "p-tuning": (peft.PromptEncoderConfig, {**VIRTUAL, "encoder_hidden_size": 16}),
}
DEFAULTS = {
    "LoRA": peft.LoraConfig,
    "AdaLoRA": peft.AdaLoraConfig,
    "(IA)3": peft.IA3Config,
    "VeRA": peft.VeraConfig,
    "tuned norms": peft.LNTuningConfig,
}
NEEDED = {peft.AdaLoraConfig: {"total_step": 10}}


def adapt(model, kind, options) -> PeftModel:
    """The same adapter for both twins, all of whose parameters are other than zero."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapted


def train(adapted, tokens, checkpointing=False) -> list[float]:
    if checkpointing:
        adapted.get_base_model().activation_checkpointing_enable()
        adapted.enable_input_require_grads()
    adapted.train()
    optimizer = torch.optim.SGD([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapted.eval()
    return losses


@torch.no_grad()
def use(adapted) -> list[torch.Tensor]:
    """Logits, and tokens generated after prompts with padding on the left, greedily and by beams."""
    torch.manual_seed(2)
    tokens = make_tokens(2, 9)
    mask = torch.ones_like(tokens)
    logits = adapted(input_ids=tokens, attention_mask=mask).logits
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    generated = [adapted.generate(input_ids=tokens, num_beams=beams, **options) for beams in (1, 2)]
    return [logits, *generated]


def assert_alike(kind, options, attention, checkpointing=False) -> tuple[PeftModel, PeftModel]:
    tokens, results, adapted = make_tokens(2, 9), [], []
    for model in make_twins(attn_implementation=attention):
        adapted.append(adapt(model, kind, options))
        before = use(adapted[-1])
        losses = train(adapted[-1], tokens, checkpointing)
        assert losses[0] != losses[-1]
        results.append((before, losses, use(adapted[-1])))
    (before, losses, after), (our_before, our_losses, our_after) = results
    assert our_losses == pytest.approx(losses, rel=1e-5)
    for got, expected in zip([*our_before, *our_after], [*before, *after], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    return tuple(adapted)


@pytest.mark.filterwarnings("ignore:.*`past_key_values`:FutureWarning")  # PEFT calls the cache by its old name
@pytest.mark.parametrize(("method", "attention"), in_turn([*BEFORE_THE_PROMPT], ["eager", "sdpa"]))
def test_methods_with_something_before_the_prompt(method, attention, compared):
    """It comes as a cache of keys and values, or as embeddings."""
    if CACHE == "cache" and "prefix" in method:
        # `generate` then has the prefix by the cache's old name beside an empty cache by the new one. Stock models
        # take the empty one, and lose the prefix.
        with pytest.raises(ValueError, match="Both `past_key_values` and `cache` are set"):
            assert_alike(*BEFORE_THE_PROMPT[method], attention)
        return
    assert_alike(*BEFORE_THE_PROMPT[method], attention)
    compared("peft", f"{method}: losses, logits and tokens, {attention} attention", "equal within 1e-4")


@pytest.mark.parametrize("method", MERGED)
def test_methods_that_change_weights(method, compared):
    _, ours = assert_alike(*MERGED[method], "sdpa")
    tokens = make_tokens()
    with torch.no_grad():
        expected = ours(tokens).logits
        merged = ours.merge_and_unload()
        assert type(merged) is EntropyGPTForCausalLM
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-4)
    compared("peft", f"{method}: losses, logits, tokens and merged logits", "equal within 1e-4")


@pytest.mark.parametrize("method", ["LoRA", "prompt tuning", "p-tuning"])
def test_with_checkpointing(method):
    assert_alike(*(MERGED | BEFORE_THE_PROMPT)[method], "sdpa", checkpointing=True)


@pytest.mark.parametrize("method", DEFAULTS)
def test_targets_are_those_that_peft_knows_for_gpt2(method, compared):
    (stock, ours), tokens = make_twins(), make_tokens()
    kind = DEFAULTS[method]
    with torch.no_grad():
        original = stock(tokens).logits
        theirs, own = (adapt(model, kind, NEEDED.get(kind, {})).eval() for model in (stock, ours))
        assert [name for name, _ in own.named_parameters()] == [name for name, _ in theirs.named_parameters()]
        expected = theirs(tokens).logits
        assert not torch.allclose(expected, original, atol=1e-3)
        torch.testing.assert_close(own(tokens).logits, expected)
    compared("peft", f"{method} without target_modules", "the same modules are adapted, logits equal")


@pytest.mark.parametrize("notation", ["SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)", "EReg(SM(t)+ScFuFFNi1)"])
def test_fused_maps_without_named_targets(notation):
    adapted = get_peft_model(make_model(notation), LoraConfig(task_type="CAUSAL_LM"))
    assert any("c_attn.lora_A" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("notation", ["SM+LN+G", "EReg(SM(t)+ScFuFFN)", "EReg(SM(t_h)+LN+G+WN(QK+FFN))"])
def test_entropies_behind_a_prefix(notation, kind, compared):
    """They are those of the rows of the attention matrices, virtual tokens among the keys."""
    tokens, entropies = make_tokens(2, 9), {}
    for attention in ("eager", "sdpa"):
        torch.manual_seed(3)
        model = make_model(notation, **NO_DROPOUT, attn_implementation=attention)
        adapted = adapt(model, kind, VIRTUAL)
        arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "output_entropies": True}
        arguments["output_attentions"] = attention == "eager"
        outputs = adapted(**arguments)
        assert len(outputs.attention_entropies) == SIZES["n_layer"]
        if attention == "eager":
            for matrices, rows in zip(outputs.attentions, outputs.attention_entropies, strict=True):
                torch.testing.assert_close(rows, torch.special.entr(matrices).sum(-1), rtol=0, atol=1e-4)
                assert matrices.shape[-1] == 9 + 4
        assert outputs.visible_keys[0, -1] == 9 + 4
        entropies[attention] = torch.stack(outputs.attention_entropies)
    torch.testing.assert_close(entropies["sdpa"], entropies["eager"], rtol=0, atol=1e-4)
    if kind is PrefixTuningConfig and notation.startswith("EReg(SM(t)"):
        compared("peft", "entropies of a model with a prefix against its attention matrices", "equal within 1e-4")


@pytest.mark.parametrize("notation", ["EReg(SM(t)+ScFuFFN)", "SM+ScFFN+WN(QKV+FFN)"])
@pytest.mark.parametrize("method", [PrefixTuningConfig, PromptTuningConfig])
def test_a_prefix_is_trained_with_the_penalty(notation, method):
    adapted = adapt(make_model(notation, **NO_DROPOUT, entropy_coefficient=0.1), method, VIRTUAL)
    losses = train(adapted, make_tokens(2, 9))
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LoraConfig, PrefixTuningConfig])
def test_reloading_with_the_code_that_came_along(kind, tmp_path, compared):
    """By a process that can't import this project; the adapter names where its model is."""
    make_model("EReg(SM(t)+ScFuFFN)").save_pretrained(tmp_path / "model")
    model = EntropyGPTForCausalLM.from_pretrained(tmp_path / "model")
    options = VIRTUAL
    if kind is LoraConfig:
        options = {
            "target_modules": ["c_attn", "c_fused"],
            "modules_to_save": ["temperature", "threshold"],
        } | TRANSPOSED
    adapted = adapt(model, kind, options).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = make_tokens()
    with torch.no_grad():
        save_file({"input_ids": tokens, "logits": adapted(tokens).logits}, tmp_path / "reference.safetensors")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    answer = do(
        "reload_adapter",
        tmp_path,
        environment,
        adapter=tmp_path / "adapter",
        reference=tmp_path / "reference.safetensors",
    )
    assert answer["difference"] <= 1e-5
    assert answer["came_along"]
    reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(tokens).logits, adapted(tokens).logits, rtol=0, atol=1e-5)
    what = f"AutoPeftModelForCausalLM of remote code, {kind.__name__}, in a fresh process"
    compared("peft", what, f"logits equal within {answer['difference']:.0e}")


@pytest.mark.slow
@pytest.mark.parametrize("notation", ARCHITECTURES)
@pytest.mark.parametrize("method", BEFORE_THE_PROMPT)
def test_every_architecture_takes_a_prefix(method, notation):
    adapted = adapt(make_model(notation, **NO_DROPOUT), *BEFORE_THE_PROMPT[method])
    losses = train(adapted, make_tokens(2, 9))
    assert losses[0] != losses[-1]
    assert torch.isfinite(use(adapted)[0]).all()
