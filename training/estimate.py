"""What a run will take of memory, time and disk, estimated before it begins."""

import copy
import time
from dataclasses import dataclass

import torch

from modeling_entropy_gpt import EntropyGPTForCausalLM

from .adapters import attach_lora
from .recipe import Recipe
from .start import Start


# Numbers that a block keeps of each token for the backward pass, as multiples of the width: around attention (inputs
# of norm and map, queries, keys, values, output), and around an FFN, with the inner size twice.
KEPT_BY_ATTENTION, KEPT_BY_FFN = 8, 2
# Bytes of a token's logits, their logarithms and their gradients, for each word of the vocabulary.
LOGIT_BYTES = 12
PROBE_SIZE, PROBE_SECONDS = 1024, 0.2


@dataclass(frozen=True)
class Estimate:
    """
    What a run takes.

    Args:
        memory (`int`): Bytes of weights, gradients, AdamW's state and activations, in each process, none shared out.
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
    if recipe.model.model_name_or_path is None and "vocab_size" not in recipe.config_fields:
        config.vocab_size = min(config.vocab_size, recipe.data.tokenizer_vocab_size)
    with torch.device("meta"):
        model = EntropyGPTForCausalLM(config)
        if recipe.lora.lora_r is not None:
            model = attach_lora(model, recipe.lora)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    checkpoint = 4 * trained + 8 * trained  # weights and AdamW's moments, in float32 under autocast too

    inner = config.n_embd if config.ffn_type == "fused" else 2 * config.inner_size
    ffns = config.n_layer - len(config.pruned_ffn_layers)
    kept = KEPT_BY_ATTENTION * config.n_layer * config.n_embd + ffns * (KEPT_BY_FFN * config.n_embd + inner)
    is_half = training.bf16 or training.fp16
    kept_bytes = (2 if is_half else 4) * kept + LOGIT_BYTES * config.vocab_size
    activations = training.train_batch_size * start.context * kept_bytes

    dtype = torch.float32 if not is_half else torch.bfloat16 if training.bf16 else torch.float16
    speed = measure_speed(training.device, dtype)
    # Forward once, backward twice; products of queries and keys, and of probabilities and values, under a causal mask.
    operations = 6 * numbers + 6 * config.n_layer * config.n_embd * start.context
    tokens = training.max_steps * training.sequences_per_step * start.context
    seconds = tokens * operations / (speed * training.world_size) if training.max_steps > 0 else None
    return Estimate(4 * numbers + 12 * trained + activations, checkpoint, 4 * numbers, seconds, speed)


def measure_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in products of square matrices, by the fastest of some tenths of a second."""
    left, right = (torch.randn(PROBE_SIZE, PROBE_SIZE, device=device, dtype=dtype) for _ in range(2))
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < PROBE_SECONDS:
        started = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * PROBE_SIZE**3 / fastest
