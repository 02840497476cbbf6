"""TRL's supervised fine-tuning, with the loss that is the model's own."""

from trl import SFTTrainer

from .model_loss import ModelLoss


class EntropySFTTrainer(ModelLoss, SFTTrainer):
    """
    TRL's `SFTTrainer` for models with `entropy_regularization`. The original computes the cross-entropy itself, from
    the model without its head, so it trains without the entropy penalty; here the loss is the model's ([`ModelLoss`]).
    What TRL computes on the way, accuracy and entropy of predictions, is not logged.

    Args: as for `SFTTrainer`, but for `loss_type`, which has no effect.
    """
