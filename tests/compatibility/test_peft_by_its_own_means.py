"""PEFT by its own means, beside normalised weights and without target modules."""

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)

from modeling_entropy_gpt import EntropyGPTForCausalLM
from tests.architectures import NO_DROPOUT, make_model, make_tokens
from tests.modeling_entropy_gpt.test_layers import SPECTRAL, singular_vectors, stale, train


# PEFT asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_an_adapter_on_a_spectrally_normalised_model_loads_as_it_was_trained(tmp_path, compared):
    base = stale(make_model(SPECTRAL, **NO_DROPOUT))
    base.save_pretrained(tmp_path / "base")
    before, tokens = singular_vectors(base), make_tokens()
    configuration = LoraConfig(target_modules=["attn.c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapted = train(get_peft_model(base, configuration))
    torch.testing.assert_close([*singular_vectors(adapted).values()], [*before.values()], rtol=0, atol=0)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = EntropyGPTForCausalLM.from_pretrained(tmp_path / "base")
    original = loaded(tokens).logits
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    expected = adapted(tokens).logits
    assert not torch.allclose(original, expected, atol=1e-3)
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=0)
    compared("peft", "logits of a LoRA adapter on a spectrally normalised model, trained, saved and loaded", "equal")


def test_a_normalised_map_that_an_adapter_trains_whole_keeps_its_singular_vectors(tmp_path):
    """In `modules_to_save`: those of the copy follow it and are saved with it, those of the original stay."""
    base = stale(make_model(SPECTRAL, **NO_DROPOUT))
    base.save_pretrained(tmp_path / "base")
    configuration = LoraConfig(
        target_modules=["attn.c_proj"], modules_to_save=["c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    adapted, tokens = get_peft_model(base, configuration), make_tokens()
    before = singular_vectors(adapted)
    train(adapted)
    moved = {name for name, vectors in singular_vectors(adapted).items() if not torch.equal(vectors, before[name])}
    assert moved == {name for name in before if ".modules_to_save." in name}
    adapted.save_pretrained(tmp_path / "adapter")
    base = EntropyGPTForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(tokens).logits, adapted(tokens).logits, rtol=0, atol=0)


def test_prepared_for_training_with_weights_cast_up_and_buffers_in_half_precision():
    """As `prepare_model_for_kbit_training` leaves a model in bfloat16: its loss is about that of float32."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = make_model(SPECTRAL, **NO_DROPOUT).to(dtype)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        assert {t.dtype for t in model.parameters()} == {torch.float32}
        assert {t.dtype for t in model.buffers()} == {dtype}
        configuration = LoraConfig(target_modules=["attn.c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        adapted, tokens = get_peft_model(model, configuration), make_tokens()
        losses.append(train(adapted)(tokens, labels=tokens).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def adapt_weights(notation):
    """Stock PEFT's way to adapt normalised maps as well as plain ones."""
    names = ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
    configuration = LoraConfig(task_type="CAUSAL_LM", target_modules=[], target_parameters=names)
    adapted = get_peft_model(make_model(notation, **NO_DROPOUT).double(), configuration)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapted.eval()


@pytest.mark.parametrize("notation", [SPECTRAL, "SM+ScFFN+WN(QKV+FFN)", "SM+LN+G"])
def test_an_adapter_of_weights_before_they_are_normalised_can_be_merged(notation, tmp_path, compared):
    adapted, tokens = adapt_weights(notation), make_tokens()
    expected = train(adapted)(tokens).logits
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(tokens).logits, expected, atol=1e-2)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    merged = EntropyGPTForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-10)
    compared("peft", f"logits of {notation} with LoRA on all weights (target_parameters), merged and saved", "equal")


def test_all_linear_passes_normalised_maps_over():
    """What PEFT does by itself: a module of another class is none of its linear ones, and refused where named."""
    adapted = get_peft_model(
        make_model("SM+ScFFN+WN(QKV+FFN)"), LoraConfig(target_modules="all-linear", fan_in_fan_out=True)
    )
    assert {name.rpartition("h.")[2][2:] for name in adapted.base_model.targeted_module_names} == {"attn.c_proj"}
    with pytest.raises(ValueError, match=r"EntropyGPTNormalizedConv1D.* is not supported"):
        get_peft_model(make_model("SM+ScFFN+WN(QKV+FFN)"), LoraConfig(target_modules=["c_attn"]))
