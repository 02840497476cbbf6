"""What a run will take of memory, time and disk, estimated before it begins."""

import copy
import time
from dataclasses import dataclass

import torch

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .adapters import attach_lora
from .recipe import Recipe
from .start import Start, fit_vocabulary
from .tokenizer import load_tokenizer
from .trainer import freeze_embeddings


# Numbers that a block keeps of each token for the backward pass, as multiples of the width: around attention (the
# map's input, queries, keys, values, output), around an FFN, with the inner size twice, and a norm's input.
KEPT_BY_ATTENTION, KEPT_BY_FFN, KEPT_BY_NORM = 7, 1, 1
# Matrices of probabilities that dropout on them keeps, where torch's own attention runs on the processor (measured).
KEPT_BY_ATTENTION_DROPOUT = 2.5
# Bytes of a token's logits, their logarithms and their gradients, for each word of the vocabulary.
LOGIT_BYTES = 12
PROBE_SIZE, PROBE_SECONDS = 1024, 0.2


@dataclass(frozen=True)
class Estimate:
    """
    What a run takes.

    Args:
        memory (`int`):
            Bytes of weights, gradients, AdamW's state (whatever the optimizer) and activations, in each process, none
            shared out.
        checkpoint (`int`): Bytes of a checkpoint.
        model (`int`): Bytes of the trained model.
        seconds (`float`, *optional*): Time of the matrix products of all steps; `None` if their number is unknown.
        speed (`float`): The speed at which these are counted, in operations a second.
    """

    memory: int
    checkpoint: int
    model: int
    seconds: float | None
    speed: float


def estimate(recipe: Recipe, start: Start) -> Estimate:
    """Memory and disk from what a step keeps; time from its matrix products and a short probe of this device."""
    config, training = copy.deepcopy(start.config), recipe.training
    if recipe.data.tokenizer is not None:
        fit_vocabulary(config, recipe, load_tokenizer(recipe.data.tokenizer, recipe.data.eos_token))
    elif recipe.model.model_name_or_path is None and "vocab_size" not in recipe.config_fields:
        config.vocab_size = min(config.vocab_size, recipe.data.tokenizer_vocab_size)
    with torch.device("meta"):
        model = EntropyGPTForCausalLM(config)
        if recipe.lora.lora_r is not None:
            model = attach_lora(model, recipe.lora)
    if training.freeze_embeddings:
        freeze_embeddings(model)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = numbers if recipe.lora.lora_r is None else trained
    checkpoint = 4 * saved + 8 * trained  # weights and AdamW's moments, in float32 under autocast too
    size = 2 if training.bf16 or training.fp16 else 4
    kept_bytes = kept_by_blocks(config, start.context, size, training.device.type, training.gradient_checkpointing)
    activations = int(training.train_batch_size * start.context * (kept_bytes + LOGIT_BYTES * config.vocab_size))

    dtype = torch.float32 if size == 4 else torch.bfloat16 if training.bf16 else torch.float16
    speed = measure_speed(training.device, dtype)
    # Forward, backward to the inputs, and to the weights that are trained; then products of queries and keys, and of
    # probabilities and values, forward once and backward twice under a causal mask.
    operations = 4 * numbers + 2 * trained + 6 * config.n_layer * config.n_embd * start.context
    tokens = training.max_steps * training.sequences_per_step * start.context
    seconds = tokens * operations / (speed * training.world_size) if training.max_steps > 0 else None
    return Estimate(4 * numbers + 12 * trained + activations, checkpoint, 4 * numbers, seconds, speed)


def kept_by_blocks(config: EntropyGPTConfig, context: int, size: int, device: str, checkpointing: bool) -> float:
    """
    Bytes that blocks keep of each token for the backward pass.

    Args:
        config ([`EntropyGPTConfig`]): The model's.
        context (`int`): Tokens of a sequence.
        size (`int`): Bytes of a number.
        device (`str`): The type of the device.
        checkpointing (`bool`): Whether blocks are computed again, so that all but one keep their inputs alone.
    """
    width, is_gpu = config.n_embd, device == "cuda"
    norm = KEPT_BY_NORM * (config.normalization != "none")
    mask = (1 if is_gpu else size) * width  # of dropout
    masks = mask * (config.resid_pdrop > 0)
    scaled_queries = config.attention_temperature != "none"
    attention = size * (KEPT_BY_ATTENTION + norm + scaled_queries) * width + masks
    if config.attn_pdrop and not is_gpu and config.attention_function == "softmax" and not config.penalty:
        attention += size * KEPT_BY_ATTENTION_DROPOUT * config.n_head * context
    inner = width if config.ffn_type == "fused" else 2 * config.inner_size
    ffn = size * ((KEPT_BY_FFN + norm) * width + inner) + masks
    kept = config.n_layer * attention + (config.n_layer - len(config.pruned_ffn_layers)) * ffn
    if checkpointing:
        kept = config.n_layer * size * width + attention + ffn
    return kept + mask * (config.embd_pdrop > 0)


def measure_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in products of square matrices, by the fastest of some tenths of a second."""
    left, right = (torch.randn(PROBE_SIZE, PROBE_SIZE, device=device, dtype=dtype) for _ in range(2))
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < PROBE_SECONDS:
        started = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * PROBE_SIZE**3 / fastest
