"""Healing: training a converted model, after its steps or while a schedule removes what they remove."""

import copy

import torch
from transformers import PrinterCallback, set_seed

from entropy_gpt.conversion.calibration import Calibration
from entropy_gpt.conversion.simplification import set_training_fields
from entropy_gpt.evaluation.records.conversion_report import HealingRecord
from entropy_gpt.training.arguments import PAPER_HYPERPARAMETERS, PAPER_WARMUP_SHARE, EntropyTrainingArguments
from entropy_gpt.training.callbacks import StepObserver, Stopwatch, find_callback
from entropy_gpt.training.checkpoints import last_checkpoint
from entropy_gpt.training.divergence import MOST_ROLLBACKS
from entropy_gpt.training.errors import DivergedError
from entropy_gpt.training.healing import HealingLoss, HealingTrainer
from entropy_gpt.training.packing import collate_blocks
from entropy_gpt.training.progress import Progress
from entropy_gpt.training.removal_schedule import RemovalSchedule, insert_gates, remove_gates
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .convert_inputs import CHECKPOINTS, ConversionOptions, Text


# How often healing evaluates the model, and how often it saves a checkpoint.
HEALING_EVALUATIONS, HEALING_CHECKPOINTS = 15, 10
# The share of the steps over which the schedule removes; the remaining steps train the target architecture.
REMOVAL_SHARE = 0.6
DISTILLATION_WEIGHT = 0.5


def heal(
    options: ConversionOptions,
    original: EntropyGPTForCausalLM,
    simplified: EntropyGPTForCausalLM,
    calibration: Calibration,
    text: Text,
    progress: Progress,
) -> tuple[EntropyGPTForCausalLM, HealingRecord]:
    """
    Trains a simplified model, from its last checkpoint if there is one. With a schedule, training starts from the
    original, which the schedule simplifies step by step.

    Args:
        options ([`ConversionOptions`]): Steps, losses, schedule and hyperparameters.
        original ([`EntropyGPTForCausalLM`]): The model before conversion, which teaches.
        simplified ([`EntropyGPTForCausalLM`]): The model after all steps but the last, exact ones.
        calibration ([`Calibration`]): Statistics of the original.
        text ([`Text`]): Text to train and evaluate on.
        progress (`Progress`): Shows steps and loss.

    Returns:
        The healed model, and the record of the training.

    Raises:
        `DivergedError`: If training diverges more often than it may go back.
    """
    from datasets import Dataset

    set_seed(options.seed)
    with_gates = options.schedule != "none"
    model = copy.deepcopy(simplified)
    if with_gates:
        model = insert_gates(set_training_fields(original, simplified.config), simplified, calibration)
    steps = options.heal_steps
    hyperparameters = {"learning_rate": options.learning_rate, **PAPER_HYPERPARAMETERS}
    loss = HealingLoss(
        logits=DISTILLATION_WEIGHT * options.distill,
        temperature=options.distill_temperature,
        hidden_states=options.hidden_state_weight,
        residual_scale=options.residual_scale_weight,
    )
    arguments = EntropyTrainingArguments(
        output_dir=options.work / CHECKPOINTS,
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        warmup_steps=round(PAPER_WARMUP_SHARE * steps),
        **hyperparameters,
        freeze_embeddings=options.freeze_embeddings,
        seed=options.seed,
        dataloader_drop_last=len(text.training) >= options.batch_size,
        eval_strategy="steps",
        eval_steps=max(1, steps // HEALING_EVALUATIONS),
        eval_on_start=True,
        prediction_loss_only=True,
        logging_steps=max(1, steps // 100),
        save_steps=max(1, steps // HEALING_CHECKPOINTS),
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
    )
    with progress.stage("healing", steps) as line:
        trainer = HealingTrainer(
            model=model,
            args=arguments,
            train_dataset=text.training,
            eval_dataset=Dataset.from_dict({"input_ids": torch.cat(text.validation).tolist()}),
            data_collator=collate_blocks,
            callbacks=[Stopwatch(), StepObserver(line.reach, line.say)],
            healing_loss=loss,
            original=original,
            residual_scale=calibration.norm_constant("transformer.ln_f"),
            removal_steps=max(1, round(REMOVAL_SHARE * steps)),
            schedule=RemovalSchedule(model, options.schedule) if with_gates else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last_checkpoint(options.work / CHECKPOINTS))
    if (reason := trainer.progress.diverged) is not None:
        raise DivergedError(
            f"{simplified.config.notation}: healing diverged {MOST_ROLLBACKS + 1} times, and was {reason}. Lower "
            "--learning-rate, or give it more steps."
        )
    of_shifts = {
        "log_sum_coefficient": simplified.config.log_sum_coefficient,
        "shift_lr_multiplier": arguments.shift_lr_multiplier,
    }
    record = HealingRecord(
        steps=steps,
        tokens=steps * min(options.batch_size, len(text.training)) * text.context,
        seconds=find_callback(trainer, Stopwatch).seconds,
        settings={
            **hyperparameters,
            "warmup_share": PAPER_WARMUP_SHARE,
            "batch_size": options.batch_size,
            **{name: getattr(simplified.config, name) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
            **(of_shifts if simplified.config.has_attention_shift else {}),
            "schedule": options.schedule,
            "kl_weight": loss.logits,
            "kl_temperature": loss.temperature,
            "hidden_state_weight": loss.hidden_states,
            "residual_scale_weight": loss.residual_scale,
            **({"freeze_embeddings": True} if options.freeze_embeddings else {}),
        },
        validation_nats=[
            [float(entry["step"]), entry["eval_loss"]] for entry in trainer.state.log_history if "eval_loss" in entry
        ],
        events=trainer.progress.events,
    )
    return remove_gates(model, simplified) if with_gates else model.eval(), record
