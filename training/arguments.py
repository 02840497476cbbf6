"""The settings of a training run: model, data, training, adapters. Recipes and the command line fill these in."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments


STANDARD_LIBRARY, PACKAGES = NAMED_TEXTS = ("python-stdlib", "python-packages")
# The recipe of the paper's public code, as far as it does not depend on sizes (arXiv 2501.03489); its polynomial decay
# of power 1 is the linear one.
PAPER_HYPERPARAMETERS = {"weight_decay": 0.1, "max_grad_norm": 1.0, "lr_scheduler_type": "linear"}
PAPER_WARMUP_SHARE = 0.05


@dataclass
class ModelArguments:
    """
    Where the model comes from. Beside these, every field of `EntropyGPTConfig` can be given by its name.
    """

    notation: str | None = field(
        default=None, metadata={"help": "The architecture in the paper's notation, such as 'EReg(SM(t)+ScFuFFN)'."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A folder or repository with a trained EntropyGPT or GPT-2 to start from. With another notation "
            "than its own, it is converted to that one first, fitted to the training text."
        },
    )


@dataclass
class DataArguments:
    """What is trained and evaluated on."""

    dataset: str = field(
        default=STANDARD_LIBRARY,
        metadata={
            "help": "'python-stdlib' (this interpreter's own source), 'python-packages' (code of the packages that "
            "this project pins), a text file, a folder of text files, a JSON, JSON lines, CSV, TSV or Parquet file or "
            "a folder of such, a folder of `Dataset.save_to_disk`, or a data set on the Hub."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a data set on the Hub, or of a folder of data files."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a data set on the Hub."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    text_column: str = field(default="text", metadata={"help": "Column with the documents' text."})
    validation_dataset: str | None = field(
        default=None, metadata={"help": "Another data set to evaluate on, of any kind. Else documents are kept apart."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on, of the other data set if there is one. Else documents are kept apart."
        },
    )
    validation_share: float = field(
        default=0.05,
        metadata={"help": "Part of the documents that is kept for evaluation, if no others are named. At most 0.5."},
    )
    validation_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate on at most N tokens: spread evenly over all, or the first ones of a stream, which "
            "needs it. What the trained model is worth is measured on the first ones."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read, tokenise and pack while training, in constant memory, with nothing tokenised on disk. "
            "Needs max_steps, since the length of the data set is not known."
        },
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Documents among which a streaming data set is shuffled."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or repository of the tokenizer. Else that of the model, or one trained on the first "
            "documents, up to 100 million characters."
        },
    )
    eos_token: str | None = field(
        default=None,
        metadata={"help": "The tokenizer's token for the end of a text, such as '[SEP]'. Else the one that it names."},
    )
    tokenizer_vocab_size: int = field(
        default=50257, metadata={"help": "Tokens of a tokenizer that is trained on the text."}
    )
    context: int | None = field(
        default=None, metadata={"help": "Tokens of a sequence. Else as many as the model has positions."}
    )
    data_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for tokenised data. Else one in the cache of datasets (HF_DATASETS_CACHE)."},
    )


@dataclass
class LoraArguments:
    """Low-rank adapters in place of training all weights."""

    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of the adapters; with it, only they are trained."}
    )
    lora_alpha: int = field(default=16, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapters; 0 for normalised weights."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["c_attn"], metadata={"help": "Linear maps that get adapters, or all-linear."}
    )
    train_temperatures: bool = field(
        default=True, metadata={"help": "Whether learnable temperatures are trained with adapters."}
    )
    train_thresholds: bool = field(
        default=True, metadata={"help": "Whether entropy thresholds are trained with adapters."}
    )
    train_shifts: bool = field(
        default=True, metadata={"help": "Whether shifts of attention scores are trained with adapters."}
    )


@dataclass
class EntropyTrainingArguments(TrainingArguments):
    """All of the Trainer's arguments, and those of this family's extra parameters, diagnostics and guard."""

    temperature_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of temperatures, as a multiple of learning_rate."}
    )
    threshold_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of entropy thresholds, as a multiple of learning_rate."}
    )
    shift_lr_multiplier: float = field(
        default=10.0,
        metadata={"help": "Learning rate of shifts of attention scores, as a multiple of learning_rate."},
    )
    residual_scale_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the FFN's alpha and beta, as a multiple of learning_rate."}
    )
    gain_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the gains of normalised weights, as a multiple."}
    )
    freeze_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Leave the embeddings of tokens and positions as they are, and with them a head that is tied to "
            "them. So they stay those of a public checkpoint (private serve --embedding public)."
        },
    )
    entropy_logging_steps: int = field(
        default=50,
        metadata={"help": "Write entropies, thresholds, temperatures and scales every N steps; 0: never."},
    )
    on_divergence: Literal["stop", "rollback"] = field(
        default="stop",
        metadata={
            "help": "When the loss is not finite or explodes: stop and report it, or go back to the last checkpoint's "
            "state at half the learning rate (which keeps a copy of it in memory)."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Log losses every N steps."})
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Who looks on: tensorboard, wandb and the like, or none."}
    )
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Whether batches lie where a GPU fetches them faster."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether data parallelism looks for parameters without a gradient."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Whether a resumed run goes on with what its guard and stopwatch knew."}
    )

    @property
    def sequences_per_step(self) -> int:
        """Sequences of an optimiser step, over accumulation, devices and processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def __post_init__(self):
        super().__post_init__()
        least = {
            **{"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1},
            **{"learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "entropy_logging_steps": 0},
            **{"seed": 0, "dataloader_num_workers": 0},
            **{name: 0 for name in vars(self) if name.endswith("_lr_multiplier")},
        }
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least {bound}.")
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise ValueError(
                f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs} leave nothing to train: set "
                "one of them above 0."
            )
