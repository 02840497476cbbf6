"""What a trained model is worth, as a record: shared by the commands that train."""

from datasets import Dataset
from rich.progress import Progress
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from evaluation.entropy_diagnostics import measure_headwise_entropy
from evaluation.perplexity import measure_likelihood
from evaluation.results import Conditions, ModelResult, git_revision, machine_name, recorded_versions
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .progress import stage


SIZES = ("n_layer", "n_embd", "n_head")


def measure_model(
    model: EntropyGPTForCausalLM,
    blocks: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    corpus: tuple[str, str],
    training: dict,
    seed: int,
    progress: Progress,
) -> ModelResult:
    """
    Measures a model on validation text.

    Args:
        model ([`EntropyGPTForCausalLM`]): The model.
        blocks (`Dataset`): The text, as `training.packing.pack` makes it.
        tokenizer (`PreTrainedTokenizerFast`): What made the blocks.
        corpus (`tuple[str, str]`): Name and revision of the text.
        training (`dict`): What training took: `training_steps`, `training_tokens`, `training_seconds` and
            `hyperparameters` of the record.
        seed (`int`): Of weights and data order.
        progress (`Progress`): Where it shows.
    """
    with stage(progress, f"evaluating {model.config.notation}", 2 * len(blocks)) as line:
        is_byte_level = isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel)
        likelihood = measure_likelihood(model, blocks, tokenizer if is_byte_level else None, on_blocks=line.advance)
        entropy = measure_headwise_entropy(model, blocks, on_blocks=line.advance)
        line.say(f"perplexity {likelihood.perplexity:.2f}")
    name, revision = corpus
    return ModelResult(
        notation=model.config.notation,
        final_normalization=model.config.final_normalization,
        parameters=model.num_parameters(only_trainable=True),
        **training,
        perplexity_per_token=likelihood.perplexity,
        bits_per_byte=likelihood.bits_per_byte,
        headwise_entropy_nats=entropy.nats,
        maximum_entropy_nats=entropy.maximum,
        conditions=Conditions(
            corpus=name,
            corpus_revision=revision,
            vocab_size=len(tokenizer),
            context=len(blocks[0]["input_ids"]),
            evaluated_tokens=likelihood.tokens,
            dtype=str(model.dtype).removeprefix("torch."),
            seed=seed,
            versions=recorded_versions(),
            git_revision=git_revision(),
            machine=machine_name(model.device),
        ),
    )


def describe_config(config: EntropyGPTConfig) -> dict:
    """What a model was told beside its notation, of what has an effect on it."""
    names = [*SIZES]
    if config.attention_temperature != "none":
        names += ["temperature_init"]
    if config.entropy_regularization:
        names += ["entropy_penalty", "entropy_coefficient", "entropy_tolerance", "entropy_threshold_init"]
        names += ["entropy_maximum"]
    return {"dropout": config.resid_pdrop, **{name: getattr(config, name) for name in names}}
