"""What forward passes do with keywords that they do not name."""

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, Trainer, TrainingArguments
from transformers.models.auto import modeling_auto

from modeling_entropy_gpt import (
    EntropyGPTForCausalLM,
    EntropyGPTForQuestionAnswering,
    EntropyGPTForSequenceClassification,
    EntropyGPTForTokenClassification,
    EntropyGPTModel,
)
from modeling_entropy_gpt.forward_keywords import CACHE
from tests.architectures import make_model, make_tokens


CLASSES = (
    EntropyGPTModel,
    EntropyGPTForCausalLM,
    EntropyGPTForSequenceClassification,
    EntropyGPTForTokenClassification,
    EntropyGPTForQuestionAnswering,
)
every_class = pytest.mark.parametrize("model_class", CLASSES)


@every_class
@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("atention_mask", "did you mean 'attention_mask'"),
        ("nonsense", "it takes input_ids"),
    ],
)
def test_an_unknown_keyword_is_refused(model_class, keyword, hint):
    model = make_model("SM+ScFuFFN", model_class)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'.*{hint}"):
        model(make_tokens(), **{keyword: None})


def test_the_class_that_was_called_is_named_with_what_it_takes():
    with pytest.raises(TypeError, match=r"EntropyGPTForCausalLM.forward\(\).*'lables'; did you mean 'labels'"):
        make_model("SM+ScFuFFN")(make_tokens(), lables=make_tokens())


def test_the_cache_of_the_other_releases_is_refused():
    model, tokens = make_model("SM+ScFuFFN"), make_tokens()
    if CACHE == "past_key_values":
        with pytest.raises(TypeError, match="unexpected keyword argument 'cache'"):
            model(tokens, cache=DynamicCache())
    else:
        assert model(tokens, past_key_values=DynamicCache(), use_cache=True).cache.get_seq_length() == 17


@pytest.mark.parametrize("keyword", ["block_table", "read_index", "write_index"])
def test_keywords_of_continuous_batching_are_refused_elsewhere(keyword):
    with pytest.raises(TypeError, match=keyword):
        make_model("SM+ScFuFFN")(make_tokens(), **{keyword: None})


@every_class
def test_keywords_of_transformers_change_nothing(model_class):
    model = make_model("SM+ScFuFFN", model_class)
    tokens = make_tokens()
    given = {"num_items_in_batch": torch.tensor(32), "output_router_logits": False, "cu_seq_lens_q": None}
    expected, (found, *_) = model(tokens), model(tokens, return_dict=False, **given)
    assert torch.equal(found, next(iter(expected.values())))


@every_class
def test_token_types_are_added_and_kept_by_the_trainer(model_class, tmp_path):
    model = make_model("SM+ScFuFFN", model_class)
    tokens, types = make_tokens(), make_tokens()
    embeddings = model.get_input_embeddings()
    expected = model(inputs_embeds=embeddings(tokens) + embeddings(types), output_entropies=True)
    found = model(tokens, token_type_ids=types, output_entropies=True)
    torch.testing.assert_close(torch.stack(found.attention_entropies), torch.stack(expected.attention_entropies))
    assert "token_type_ids" in inspect.signature(model.forward).parameters
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True))
    trainer._set_signature_columns_if_needed()
    assert "token_type_ids" in trainer._signature_columns


@every_class
def test_cross_attention_is_refused_unless_it_is_left_out(model_class):
    model = make_model("SM+ScFuFFN", model_class)
    model(make_tokens(), encoder_hidden_states=None)
    with pytest.raises(ValueError, match=r"encoder_hidden_states was given, but EntropyGPT.* has no cross-attention"):
        model(make_tokens(), encoder_hidden_states=torch.zeros(2, 3, 48))


@every_class
def test_every_head_hands_on_what_it_does_not_name(model_class):
    model, tokens = make_model("SM+ScFuFFN", model_class), make_tokens()
    cache = DynamicCache()
    model(tokens, use_cache=True, **{CACHE: cache})
    assert cache.get_seq_length() == tokens.shape[1]


def test_a_cache_given_twice_is_refused():
    if CACHE == "past_key_values":
        pytest.skip("this release of transformers has one name for it")
    model = make_model("SM+ScFuFFN")
    with pytest.raises(ValueError, match="Both `past_key_values` and `cache` are set"):
        model(make_tokens(), past_key_values=DynamicCache(), cache=DynamicCache())


@pytest.mark.parametrize("model_class", CLASSES[:3])
def test_the_cache_has_the_name_of_the_release(model_class):
    model = make_model("SM+ScFuFFN", model_class)
    assert list(inspect.signature(model.forward).parameters)[1] == CACHE
    assert next(iter(inspect.signature(type(model).forward).parameters)) == "self"


def test_entropies_of_attention_that_is_not_causal_are_refused():
    with pytest.raises(ValueError, match="is_causal=False"):
        make_model("SM+ScFuFFN")(make_tokens(), is_causal=False, output_entropies=True)


@pytest.mark.parametrize(
    ("model_class", "names"),
    [
        (EntropyGPTForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (EntropyGPTForSequenceClassification, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (EntropyGPTForTokenClassification, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
        (EntropyGPTForQuestionAnswering, modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    ],
)
def test_tools_that_ask_for_the_head_of_a_class_find_it(model_class, names):
    assert names["entropy_gpt"] == model_class.__name__


def test_shapes_are_computed_without_numbers():
    """As tools do that plan devices and memory."""
    model = make_model("EReg(SM(t)+ScFuFFN)")
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens = torch.zeros(2, 9, dtype=torch.long)
        mask = torch.zeros(2, 1, 9, 9)
        outputs = model(tokens, position_ids=torch.arange(9)[None], attention_mask=mask, output_entropies=True)
    assert outputs.logits.shape == (2, 9, 101)


def test_a_step_under_checkpointing_leaves_a_given_cache_alone():
    model = make_model("SM+ScFuFFN").train()
    model.activation_checkpointing_enable()
    cache = DynamicCache()
    tokens = make_tokens()
    model(tokens, labels=tokens, past_key_values=cache).loss.backward()
    assert cache.get_seq_length() == 0
