"""The loss that is the model's own, with its entropy penalty, under any trainer."""

from transformers import Trainer

from modeling_entropy_gpt import EntropyGPTForCausalLM


class ModelLoss:
    """
    To be inherited from before a kind of `Trainer`: the loss is the model's, whatever that kind computes. For a
    language model of this family, wrapped or not, it is that of labels smoothed by `label_smoothing_factor`, plus
    the penalty; of other models the `Trainer` smooths the labels. In evaluation a language model's loss is the
    cross-entropy alone, without smoothing as without penalty, so that it stands for a perplexity.

    Attributes:
        is_language_model (`bool`): Whether it is a language model of this family.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_language_model = any(isinstance(module, EntropyGPTForCausalLM) for module in self.model.modules())
        if self.is_language_model:
            self.label_smoother = None  # with which the `Trainer` would keep the labels from the model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.is_language_model and model.training and self.args.label_smoothing_factor:
            inputs = {**inputs, "smoothing": self.args.label_smoothing_factor}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
