"""EntropyGPT: a GPT-2 family without most of its non-linearities, for private inference (arXiv 2501.03489)."""

import importlib.metadata

from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
)
from transformers.utils import is_peft_available

from .configuration_entropy_gpt import EntropyGPTConfig
from .entropy_attention import entropy_attention, row_entropies
from .entropy_regularization import entropy_penalty
from .modeling_entropy_gpt import (
    EntropyGPTForCausalLM,
    EntropyGPTForQuestionAnswering,
    EntropyGPTForSequenceClassification,
    EntropyGPTForTokenClassification,
    EntropyGPTModel,
    EntropyGPTPreTrainedModel,
)


AutoConfig.register(EntropyGPTConfig.model_type, EntropyGPTConfig, exist_ok=True)
# `register_for_auto_class` makes `save_pretrained` write these files next to the weights, for `trust_remote_code`.
EntropyGPTConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, EntropyGPTModel),
    (AutoModelForCausalLM, EntropyGPTForCausalLM),
    (AutoModelForSequenceClassification, EntropyGPTForSequenceClassification),
    (AutoModelForTokenClassification, EntropyGPTForTokenClassification),
    (AutoModelForQuestionAnswering, EntropyGPTForQuestionAnswering),
):
    auto_class.register(EntropyGPTConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)

if is_peft_available() and Version(importlib.metadata.version("peft")) >= Version("0.18"):
    from peft.utils import constants

    # What PEFT adapts where no `target_modules` are given: what it does in GPT-2, whose names these are.
    for name, targets in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and GPT2Config.model_type in targets:
            targets.setdefault(EntropyGPTConfig.model_type, targets[GPT2Config.model_type])

__all__ = [
    "EntropyGPTConfig",
    "EntropyGPTForCausalLM",
    "EntropyGPTForQuestionAnswering",
    "EntropyGPTForSequenceClassification",
    "EntropyGPTForTokenClassification",
    "EntropyGPTModel",
    "EntropyGPTPreTrainedModel",
    "entropy_attention",
    "entropy_penalty",
    "row_entropies",
]
