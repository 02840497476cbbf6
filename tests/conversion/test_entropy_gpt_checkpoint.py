"""Saved EntropyGPTs: loaded as they are, and what is refused."""

import json
import math

import pytest
import torch
from transformers import GPT2Model

from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from modeling_entropy_gpt import EntropyGPTForCausalLM, EntropyGPTForSequenceClassification, EntropyGPTModel
from tests.architectures import ARCHITECTURES, make_model
from tests.slow import in_turn

from .gpt2_checkpoints import HEADS, change_config, change_weights, make_gpt2


@pytest.mark.parametrize(("notation", "tied"), in_turn(ARCHITECTURES, [True, False]))
def test_an_entropy_gpt_is_loaded_as_it_is(notation, tied, tmp_path):
    original = make_model(notation, tie_word_embeddings=tied, head_bias=not tied, use_cache=False).to(torch.bfloat16)
    original.generation_config.update(use_cache=True, max_new_tokens=7)
    original.save_pretrained(tmp_path)
    loaded = load_language_model(tmp_path)
    assert (loaded.generation_config.use_cache, loaded.generation_config.max_new_tokens) == (True, 7)
    assert not loaded.training
    assert loaded.config.to_diff_dict() == EntropyGPTForCausalLM.from_pretrained(tmp_path).config.to_diff_dict()
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    state = original.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.0.mlp.c_fc.bias"), r"missing: transformer\.h\.0\.mlp\.c_fc\.bias\."),
        (lambda t: t.pop("transformer.wte.weight"), r"missing: .*transformer\.wte\.weight"),
        (lambda t: t.update({"transformer.h.3.ln_1.bias": torch.ones(48)}), r"unexpected: .*h\.3\.ln_1\.bias"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.ones(47)}), r"ln_f\.bias \(47,\), not \(48,\)"),
        (lambda t: t["transformer.ln_f.bias"].fill_(math.nan), r"not finite: transformer\.ln_f\.bias"),
        (lambda t: t.update({"lm_head.weight": torch.ones(101, 48)}), "head of .* differs from its token embeddings"),
    ],
    ids=["missing", "no embedding", "unexpected", "shape", "nan", "head"],
)
def test_wrong_weights_of_an_entropy_gpt_are_named(change, message, tmp_path):
    make_model("EReg(SM(t)+LN+G)").save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ConversionError, match=message):
        load_language_model(tmp_path)


def test_an_untied_head_has_to_be_there(tmp_path):
    make_model("SM+LN+G", tie_word_embeddings=False).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ConversionError, match=r"missing: lm_head\.weight"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("model_class", [EntropyGPTModel, EntropyGPTForSequenceClassification, *HEADS[1:]])
def test_what_is_no_language_model_is_refused(model_class, tmp_path):
    is_gpt2 = model_class in HEADS
    model = make_gpt2(model_class) if is_gpt2 else make_model("SM+LN+G", model_class)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=f"is no language model: it was saved as {model_class.__name__}"):
        load_language_model(tmp_path)
    if not is_gpt2 and model_class is not EntropyGPTModel:  # which is told by its head
        change_config(tmp_path, architectures=None)
        with pytest.raises(ConversionError, match="is no language model"):
            load_language_model(tmp_path)


def test_what_holds_no_language_model_is_named_for_what_it_is(tmp_path):
    make_gpt2(GPT2Model).save_pretrained(tmp_path / "body")
    with pytest.raises(
        ConversionError, match=r"saved as GPT2Model, without a language modelling head.*GPT2LMHeadModel"
    ):
        load_language_model(tmp_path / "body")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(ConversionError, match="holds an adapter of a/b, not a model"):
        load_language_model(tmp_path / "adapter")


def test_wrong_configurations_of_an_entropy_gpt_are_named(tmp_path):
    make_model("SM+LN+G").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"normalization": "batch"}, "normalization"),
        ({"n_head": 5}, "n_head=5 does not divide"),
        ({"id2label": [1]}, "configuration of .* can't be converted"),
        ({"architectures": "EntropyGPTForCausalLM"}, "architectures='EntropyGPTForCausalLM', which can't be"),
        ({"model_type": "bert"}, "type 'bert', not 'gpt2' or 'entropy_gpt'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConversionError, match=message):
            load_language_model(tmp_path)


def test_what_a_configuration_holds_beside_its_fields_stays_there(tmp_path):
    """As it does where transformers loads it, with a warning if it looks like a field's name misspelt."""
    model = make_model("SM+LN+G")
    model.config.sep_token_id, model.config.n_layers = 7, 12
    model.save_pretrained(tmp_path)
    loaded = load_language_model(tmp_path).config
    assert (loaded.sep_token_id, loaded.n_layers, loaded.n_layer) == (7, 12, 3)
