"""Packed sequences, the penalty of heads that label whole sequences, and configurations that are refused."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DataCollatorWithFlattening, DynamicCache

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM, EntropyGPTForSequenceClassification
from modeling_entropy_gpt.forward_keywords import CACHE


SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64, "bos_token_id": None, "eos_token_id": None}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0}


def make_config(notation="EReg(SM+LN+G)", **options):
    return EntropyGPTConfig.from_notation(notation, **{**SIZES, **NO_DROPOUT, "initializer_range": 0.3, **options})


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
def test_packed_sequences_are_computed_as_if_alone_with_the_default_cache(implementation):
    model = EntropyGPTForCausalLM(make_config(n_positions=16)).eval()
    input_ids = torch.randint(64, (1, 20))  # longer together than n_positions
    position_ids = torch.cat([torch.arange(12), torch.arange(8)])[None]
    expected = [model(part, output_entropies=True) for part in input_ids.split([12, 8], dim=1)]
    # Entropies don't come from the kernel, so flash attention is as good as installed here.
    model.config._attn_implementation_internal = implementation
    packed = model(input_ids, position_ids=position_ids, output_entropies=True)
    torch.testing.assert_close(packed.logits, torch.cat([part.logits for part in expected], dim=1), rtol=0, atol=1e-4)
    for layer, entropies in enumerate(packed.attention_entropies):
        alone = torch.cat([part.attention_entropies[layer] for part in expected], dim=-1)
        torch.testing.assert_close(entropies, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("maximum", ["context", "causal"])
@pytest.mark.parametrize("penalty", ["head_mean", "row_mean", "row_sum"])
def test_flattened_documents_have_the_loss_that_they_have_one_by_one(penalty, maximum):
    config = make_config(
        entropy_penalty=penalty, entropy_maximum=maximum, entropy_coefficient=1.0, entropy_tolerance=0.05
    )
    model = EntropyGPTForCausalLM(config).train()
    documents = [torch.randint(64, (length,)).tolist() for length in (12, 3, 8)]
    batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    assert batch["input_ids"].shape == (1, 23)
    outputs = model(**batch)
    items = sum(map(len, documents)) - len(documents)
    alone = [model(torch.tensor([each]), labels=torch.tensor([each]), num_items_in_batch=items) for each in documents]
    for name in ("loss", "entropy_loss", "penalized_share"):
        expected = sum(each[name] for each in alone)
        torch.testing.assert_close(outputs[name], expected)
    assert outputs.entropy_loss > 0


@pytest.mark.parametrize("penalty", ["head_mean", "row_mean", "row_sum"])
def test_the_loss_of_a_batch_of_labelled_sequences_is_the_mean_over_its_parts(penalty):
    config = make_config(entropy_penalty=penalty, entropy_coefficient=1.0, pad_token_id=0)
    model = EntropyGPTForSequenceClassification(config).train()
    input_ids, labels = torch.randint(1, 64, (8, 10)), torch.randint(2, (8,))
    whole = model(input_ids, labels=labels).loss
    parts = [model(input_ids[i : i + 2], labels=labels[i : i + 2]).loss for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_spectral_normalisation_allows_two_forward_passes_before_a_backward_pass():
    model = EntropyGPTForCausalLM(make_config("SM+LN+G+SN(QK+FFN)")).train()
    input_ids = torch.randint(64, (2, 10))
    (model(input_ids, labels=input_ids).loss + model(input_ids, labels=input_ids).loss).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("option", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_what_gpt2_would_compute_otherwise_is_refused(option):
    with pytest.raises(StrictDataclassError, match=f"{next(iter(option))}=.*is not supported"):
        EntropyGPTConfig(**option)
    EntropyGPTConfig(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)


@pytest.mark.parametrize("text", ["SM+G+ScFuFFN", "SM+ScFFNi[99]", "SM+Act(foo)"])
def test_a_notation_that_contradicts_itself_is_named(text):
    with pytest.raises(ValueError, match=r"The notation .* can't be had"):
        EntropyGPTConfig.from_notation(text)


@pytest.mark.parametrize("maximum", ["context", "causal"])
@pytest.mark.parametrize("penalty", ["head_mean", "row_mean", "row_sum"])
def test_a_model_of_one_position_has_no_entropy_to_penalise(penalty, maximum):
    """The largest entropy is log 1 = 0, of which every share is 0: no division by it."""
    model = EntropyGPTForSequenceClassification(
        make_config(n_positions=1, num_labels=2, pad_token_id=0, entropy_penalty=penalty, entropy_maximum=maximum)
    )
    input_ids, labels = torch.randint(1, 64, (3, 1)), torch.tensor([0, 1, 1])
    outputs = model.eval()(input_ids, labels=labels, output_entropies=True)
    assert not torch.stack(outputs.attention_entropies).any()
    in_training = model.train()(input_ids, labels=labels)
    torch.testing.assert_close(in_training.loss, outputs.loss, rtol=0, atol=0)
    in_training.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


def penalty_of(model, tokens, **inputs):
    return model(tokens, labels=tokens, output_entropies=True, **inputs).entropy_loss


def test_masks_of_one_row_and_of_all_rows_have_the_same_penalty():
    model = EntropyGPTForCausalLM(make_config(entropy_tolerance=0.0)).eval()
    tokens = torch.randint(64, (2, 12))
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    mask[0, ..., 7:] = False
    torch.testing.assert_close(
        penalty_of(model, tokens, attention_mask=mask),
        penalty_of(model, tokens, attention_mask=mask.expand(-1, -1, 12, -1)),
    )


def test_the_penalty_takes_no_mask_of_each_head():
    model = EntropyGPTForCausalLM(make_config()).eval()
    mask = torch.ones(2, 4, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="one mask for all heads"):
        penalty_of(model, torch.randint(64, (2, 12)), attention_mask=mask)


def test_positions_that_restart_are_no_packing_beside_a_cache():
    """transformers then lets every position see all before it."""
    model = EntropyGPTForCausalLM(make_config(entropy_tolerance=0.0)).eval()
    tokens = torch.randint(64, (1, 12))
    positions = (torch.arange(12) % 6)[None]
    outputs = model(tokens, position_ids=positions, output_entropies=True, **{CACHE: DynamicCache()})
    assert outputs.visible_keys.tolist() == [list(range(1, 13))]
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    torch.testing.assert_close(
        penalty_of(model, tokens, position_ids=positions, **{CACHE: DynamicCache()}),
        penalty_of(model, tokens, position_ids=positions, attention_mask=mask),
    )
