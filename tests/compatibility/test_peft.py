"""PEFT by its own means, beside normalised weights and without target modules."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

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


def test_prepared_for_training_on_quantised_weights():
    model = make_model(SPECTRAL, **NO_DROPOUT).to(torch.bfloat16)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert {t.dtype for t in model.parameters()} != {t.dtype for t in model.buffers()}
    configuration = LoraConfig(target_modules=["attn.c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    tokens = make_tokens()
    loss = train(get_peft_model(model, configuration))(tokens, labels=tokens).loss
    assert loss.isfinite()
