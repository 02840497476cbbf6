"""
transformers' own tests of a model, on GPT-2 and on EntropyGPT: pytest runs this file in the unpacked source package of
a release.

What the source package leaves out is stood in for: the tests of generation, by some of this project's own; the values
with which a configuration is made; and the tests of exporters, by nothing.
"""

import sys
import types
import unittest

import torch
from transformers import (
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    set_seed,
)
from transformers.models.auto import modeling_auto

from modeling_entropy_gpt import (
    EntropyGPTConfig,
    EntropyGPTForCausalLM,
    EntropyGPTForQuestionAnswering,
    EntropyGPTForSequenceClassification,
    EntropyGPTForTokenClassification,
    EntropyGPTModel,
)
from modeling_entropy_gpt.forward_keywords import CACHE


def _stand_in(name: str, **contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


class ExportTesterMixin:
    pass


class GenerationTesterMixin:
    """Generation leads to the same tokens in every way, as it does with GPT-2."""

    def make_generator(self):
        """A model with large weights and a head of its own, so that it does not repeat one token."""
        set_seed(0)
        config = self.get_config()
        config.tie_word_embeddings = False
        model = self.all_model_classes[1](config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(5 if weight.ndim > 1 else 1)
        model.generation_config.eos_token_id = None
        return model

    def test_greedy_generation_is_the_same_in_every_way(self):
        model = self.make_generator()
        assistant = self.all_model_classes[1](self.get_config()).eval()
        prompt = ids_tensor([1, 7], SIZES["vocab_size"] - 1)
        options = {"do_sample": False, "max_new_tokens": 12}
        expected = model.generate(prompt, **options, use_cache=False)[0].tolist()
        self.assertGreater(len(set(expected[7:])), 3)

        padding = torch.full((1, 3), TOKENS["pad_token_id"])
        padded = torch.cat([padding, prompt], dim=1)
        mask = (padded != TOKENS["pad_token_id"]).long()
        begun = model.generate(prompt, do_sample=False, max_new_tokens=5, return_dict_in_generate=True)
        ways = {
            "cache": model.generate(prompt, **options),
            "static cache": model.generate(prompt, **options, cache_implementation="static"),
            "left padding": model.generate(padded, **options, attention_mask=mask),
            "assistant": model.generate(prompt, **options, assistant_model=assistant),
            "lookup": model.generate(prompt, **options, prompt_lookup_num_tokens=3),
            "continued": model.generate(
                begun.sequences,
                do_sample=False,
                max_new_tokens=7,
                attention_mask=torch.ones_like(begun.sequences),  # what was generated may look like padding
                **{CACHE: getattr(begun, CACHE)},
            ),
            "embeddings": model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **options),
        }
        for name, tokens in ways.items():
            with self.subTest(name):
                self.assertEqual(tokens[0, -12:].tolist(), expected[-12:])

    def test_what_generation_returns_is_what_one_pass_computes(self):
        model = self.make_generator()
        model.set_attn_implementation("eager")
        prompts = ids_tensor([2, 7], SIZES["vocab_size"] - 1)
        asked = {"output_hidden_states": True, "output_attentions": True}
        generated = model.generate(
            prompts, do_sample=False, max_new_tokens=5, return_dict_in_generate=True, output_logits=True, **asked
        )
        with torch.no_grad():
            outputs = model(generated.sequences[:, :-1], **asked)
        torch.testing.assert_close(torch.stack(generated.logits, dim=1), outputs.logits[:, 6:])
        for layer, hidden_states in enumerate(outputs.hidden_states):
            steps = [step[layer] for step in generated.hidden_states]
            torch.testing.assert_close(torch.cat(steps, dim=1), hidden_states)
        for layer, attentions in enumerate(outputs.attentions):
            torch.testing.assert_close(generated.attentions[-1][layer][:, :, 0], attentions[:, :, -1])


_stand_in("tests.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
_stand_in("tests.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
_stand_in(
    "tests.utils.test_configuration_utils",
    config_common_kwargs={
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["EntropyGPTModel"],
        "finetuning_task": "translation",
        "id2label": {0: "label"},
        "label2id": {"label": 0},
        "problem_type": "regression",
        "pad_token_id": 7,
        "bos_token_id": 8,
        "eos_token_id": 9,
        "sep_token_id": 10,
    },
)
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402


# The list by which the tests know a model without a head; transformers' own are in there.
modeling_auto.MODEL_MAPPING_NAMES[EntropyGPTConfig.model_type] = EntropyGPTModel.__name__

SIZES = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
TOKENS = {"bos_token_id": 98, "eos_token_id": 98, "pad_token_id": 98}


class ModelTester:
    """Makes the small models and inputs that the tests take; its attributes are named as they are read there."""

    batch_size = 13
    seq_length = 7
    is_training = True
    num_hidden_layers = SIZES["n_layer"]
    num_attention_heads = SIZES["n_head"]
    hidden_size = SIZES["n_embd"]

    def __init__(self, get_config, causal_lm_class):
        self.get_config = get_config
        self.causal_lm_class = causal_lm_class

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], SIZES["vocab_size"] - 1),
            "token_type_ids": ids_tensor([self.batch_size, self.seq_length], 2),
            "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.long),
        }
        return self.get_config(), inputs


class SuiteMixin(ModelTesterMixin, TrainingTesterMixin, GenerationTesterMixin):
    model_tester = None

    def setUp(self):
        self.model_tester = ModelTester(self.get_config, self.all_model_classes[1])

    def test_config(self):
        ConfigTester(self, config_class=type(self.get_config())).run_common_tests()


class GPT2Test(SuiteMixin, unittest.TestCase):
    all_model_classes = (
        GPT2Model,
        GPT2LMHeadModel,
        GPT2ForSequenceClassification,
        GPT2ForTokenClassification,
        GPT2ForQuestionAnswering,
    )

    def get_config(self):
        return GPT2Config(**SIZES, **TOKENS)


class EntropyGPTMixin(SuiteMixin):
    all_model_classes = (
        EntropyGPTModel,
        EntropyGPTForCausalLM,
        EntropyGPTForSequenceClassification,
        EntropyGPTForTokenClassification,
        EntropyGPTForQuestionAnswering,
    )
    test_can_init_all_missing_weights_before_2023 = True  # else it is left out, as for GPT-2
    notation = None

    def get_config(self):
        return EntropyGPTConfig.from_notation(self.notation, **SIZES, **TOKENS)


class GPT2ArchitectureTest(EntropyGPTMixin, unittest.TestCase):
    notation = "SM+LN+G"


class SoftmaxOnlyTest(EntropyGPTMixin, unittest.TestCase):
    notation = "EReg(SM(t)+ScFuFFN)"


class StaticNormTest(EntropyGPTMixin, unittest.TestCase):
    notation = "EReg(SM(t_h)+StaticLN+LearnableLeakyR+ScFFN+WN(QK+FFN))"


class SpectralNormTest(EntropyGPTMixin, unittest.TestCase):
    notation = "SM+LN+ScFFN+SN(QK+FFN)"

    @unittest.skip("it takes buffers for constants, and singular vectors follow from the random weights")
    def test_init_weights_can_init_buffers(self):
        pass
