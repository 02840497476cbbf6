"""EntropyGPT: a GPT-2 family without most of its non-linearities, for private inference (arXiv 2501.03489)."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

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
# `register_for_auto_class` makes `save_pretrained` write these files beside the weights, for `trust_remote_code`.
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
