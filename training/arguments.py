"""What a training run is told: model, data, training, adapters. Recipes and the command line fill these in."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


STANDARD_LIBRARY = "python-stdlib"


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
            "help": "'python-stdlib' (this interpreter's own source), a text file, a folder of text files, a JSON, "
            "JSON lines, CSV or Parquet file or a folder of such, a folder of `Dataset.save_to_disk`, or a data set on "
            "the Hub."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    text_column: str = field(default="text", metadata={"help": "Column with the documents' text."})
    validation_dataset: str | None = field(
        default=None, metadata={"help": "Another data set to evaluate on. Else documents are kept apart."}
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Else documents are kept apart."}
    )
    validation_share: float = field(
        default=0.05, metadata={"help": "Part of the documents that is kept for evaluation, if there is no other."}
    )
    validation_tokens: int | None = field(
        default=None, metadata={"help": "Evaluate on at most so many tokens. Streaming data sets need it."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read, tokenise and pack while training, in constant memory, without anything on disk."},
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Documents among which a streaming data set is shuffled."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or repository of the tokenizer. Else that of the model, or one trained on the text."
        },
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
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["c_attn"], metadata={"help": "Linear maps that get adapters, or all-linear."}
    )
    train_temperatures: bool = field(
        default=True, metadata={"help": "Whether learnable temperatures are trained beside adapters."}
    )
    train_thresholds: bool = field(
        default=True, metadata={"help": "Whether entropy thresholds are trained beside adapters."}
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
    residual_scale_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the FFN's alpha and beta, as a multiple of learning_rate."}
    )
    gain_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the gains of normalised weights, as a multiple."}
    )
    entropy_logging_steps: int = field(
        default=50,
        metadata={"help": "Write entropies, thresholds, temperatures and scales every so many steps; 0: never."},
    )
    on_divergence: Literal["stop", "rollback"] = field(
        default="stop",
        metadata={
            "help": "When the loss is not finite or explodes: stop and report it, or go back to the last checkpoint's "
            "state at half the learning rate (which keeps a copy of it in memory)."
        },
    )
