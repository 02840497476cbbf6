"""TRL's supervised fine-tuning, with the loss that is the model's own."""

from transformers import Trainer
from trl import SFTTrainer


class EntropySFTTrainer(SFTTrainer):
    """
    TRL's `SFTTrainer` for models with `entropy_regularization`. The original computes the cross-entropy itself, from
    the model without its head, so it trains without the entropy penalty; here the loss is the model's. What TRL
    computes on the way, accuracy and entropy of predictions, is not logged.

    Args: as for `SFTTrainer`, but for `loss_type`, which has no effect.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
