"""The trainer, its checkpoints and its callbacks."""

import copy
import json
import math
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, default_data_collator

from entropy_gpt.training import callbacks
from entropy_gpt.training.arguments import EntropyTrainingArguments
from entropy_gpt.training.callbacks import StepObserver, Stopwatch
from entropy_gpt.training.checkpoints import find_damage, last_checkpoint, list_checkpoints
from entropy_gpt.training.divergence import DivergenceGuard
from entropy_gpt.training.files import delete
from entropy_gpt.training.packing import collate_blocks
from entropy_gpt.training.trainer import LOGGED, EntropyTrainer
from modeling_entropy_gpt import EntropyGPTForSequenceClassification
from tests.architectures import NO_DROPOUT, make_model, make_tokens
from tests.ranks import run_on_ranks

from . import diverge_on_ranks


ROWS = [{"input_ids": row} for row in make_tokens(32, 16).tolist()]


def make_trainer(model, folder, callbacks=(), model_init=None, **arguments):
    return EntropyTrainer(
        model=model,
        model_init=model_init,
        args=EntropyTrainingArguments(
            output_dir=folder,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **{"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, **arguments},
        ),
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        data_collator=collate_blocks,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("norm", ["LN", "StaticLN"])
def test_weight_decay_spares_what_it_would_pull_from_its_meaning(norm, tmp_path):
    """Only plain weights decay: neither biases nor norms, nor any parameter that this family adds."""
    model = make_model(f"EReg(SM(t)+{norm}+LearnableLeakyR+ScFFN+WN(QK))")
    decayed = set(make_trainer(model, tmp_path).get_decay_parameter_names(model))
    names = {name for name, _ in model.named_parameters()}
    spared = {name.rpartition(".")[2] for name in names - decayed}
    assert spared == {
        *("log_temperature", "entropy_threshold", "ffn_alpha", "ffn_beta", "gain", "negative_slope", "bias", "weight")
    }
    assert {name for name in names - decayed if name.endswith("weight")} == {
        name for name in names if "ln_" in name and name.endswith("weight")
    }


def test_a_loss_that_would_lack_the_penalty_is_refused(tmp_path):
    def make(notation):
        arguments = EntropyTrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[])
        options = {"args": arguments, "train_dataset": ROWS, "compute_loss_func": lambda *_, **__: 0.0}
        return EntropyTrainer(model=make_model(notation), **options)

    make("SM+ScFuFFN")
    with pytest.raises(ValueError, match=r"compute_loss_func.*entropy penalty"):
        make("EReg(SM(t)+ScFuFFN)")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_embeddings_stay_as_they_are_and_a_tied_head_with_them(freeze, tied, tmp_path):
    model = make_model("EReg(SM(t)+ScFuFFN)", tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model, tmp_path, freeze_embeddings=freeze, activation_checkpointing=True)
    trainer.train()
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    frozen = {"transformer.wte.weight", "transformer.wpe.weight", *(["lm_head.weight"] if tied else [])}
    assert same & {*frozen, "lm_head.weight"} == (frozen if freeze else set())
    assert "transformer.h.0.attn.c_attn.weight" not in same
    # AdamW keeps nothing of them either.
    moments = sum(state["exp_avg"].numel() for state in trainer.optimizer.state.values())
    trained = sum(parameter.numel() for parameter in model.parameters())
    untrained = sum(before[name].numel() for name in frozen - {"lm_head.weight"}) if freeze else 0
    assert moments == trained - untrained


def test_a_model_that_is_made_in_training_has_frozen_embeddings_too(tmp_path):
    made = []

    def make() -> torch.nn.Module:
        made.append(make_model("SM+ScFuFFN"))
        return made[-1]

    trainer = make_trainer(None, tmp_path, model_init=make, freeze_embeddings=True, max_steps=1, save_strategy="no")
    trainer.train()
    assert trainer.model is made[-1] is not made[0]
    assert [model.transformer.wte.weight.requires_grad for model in made] == [False, False]
    assert [model.transformer.wpe.weight.requires_grad for model in made] == [False, False]


def test_scalars_have_multiples_of_the_learning_rate(tmp_path):
    model = make_model("EReg(SM(t)+LN+ScFFN+WN(QK))", entropy_coefficient=0.1)
    multipliers = {"temperature": 2.0, "threshold": 3.0, "residual_scale": 0.0, "gain": 5.0}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = {f"{name}_lr_multiplier": value for name, value in multipliers.items()}
    trainer = make_trainer(
        model, tmp_path, max_steps=1, learning_rate=0.01, lr_scheduler_type="constant", optim="sgd", **arguments
    )
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: gradients.update({name: gradient.clone()}))
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    leaves = {
        "log_temperature": 2.0,
        "entropy_threshold": 3.0,
        "ffn_alpha": 0.0,
        "ffn_beta": 0.0,
        "gain": 5.0,
    }
    for name, parameter in model.named_parameters():
        moved = 0.01 * leaves.get(name.rpartition(".")[2], 1.0) * gradients[name]
        torch.testing.assert_close(parameter, before[name] - moved, rtol=1e-5, atol=1e-7, msg=name)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("penalty", ["head_mean", "row_mean", "row_sum"])
def test_the_parts_of_the_loss_are_logged_whatever_the_accumulation(penalty, tmp_path):
    found = {}
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        torch.manual_seed(0)
        coefficients = {"entropy_coefficient": 0.05, "log_sum_coefficient": 1e-4}
        model = make_model("EReg(SM(t)+ScFuFFN)", entropy_penalty=penalty, **coefficients, **NO_DROPOUT)
        trainer = make_trainer(
            model,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            logging_steps=2,
            optim="sgd",
        )
        trainer.train()
        found[size] = [logged(trainer, name) for name in ("loss", *LOGGED)]
    loss, cross_entropy, penalty_loss, share, log_sum_loss = found[8]
    parts = zip(cross_entropy, penalty_loss, log_sum_loss, strict=True)
    assert loss == pytest.approx([a + 0.05 * b + 1e-4 * c for a, b, c in parts], rel=1e-5)
    assert all(0 < value < 1 for value in share)
    for size in (4, 2):
        assert found[size] == [pytest.approx(values, rel=1e-4) for values in found[8]]


def public_loss(model, tokens, coefficient):
    """
    The loss of the paper's public code for a part of a batch: deviations of rows from the first block's thresholds,
    squared outside of the margin, summed over sequences and rows, averaged over heads and layers.
    """
    model.set_attn_implementation("eager")
    outputs = model(tokens, labels=tokens, output_attentions=True)
    largest = math.log(tokens.shape[1])
    layers = []
    for probabilities in outputs.attentions:
        entropies = -(probabilities * torch.log(probabilities + 1e-9)).sum(dim=-1)
        deviations = entropies - model.transformer.h[0].attn.threshold.entropy_threshold[None, :, None] * largest
        layers.append((deviations.square() * (deviations.abs() > 0.2 * largest)).sum(dim=(0, 2)).mean())
    return outputs.cross_entropy_loss + coefficient * sum(layers) / len(layers)


@pytest.mark.parametrize(("size", "accumulation"), [(2, 4), (1, 8), (8, 1)])
def test_the_recipes_penalty_is_that_of_the_public_code(size, accumulation, tmp_path):
    """
    Its step is the mean over 4 parts of what each sums up, of 2 sequences here. At a fourth of its coefficient ours is
    the same, however the step is split.
    """
    coefficient = 0.02
    model = make_model("EReg(SM(t)+ScFuFFN)", entropy_penalty="row_sum", entropy_coefficient=0.005, **NO_DROPOUT)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.threshold.entropy_threshold.fill_(0.4)
    batches = []

    def collate(rows):
        batches.append(collate_blocks(rows))
        return batches[-1]

    before = copy.deepcopy(model)
    parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(model, tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **parts)
    trainer.args.lr_scheduler_type = "constant"
    trainer.data_collator = collate
    trainer.train()
    tokens = torch.cat([batch["input_ids"] for batch in batches])[:8]
    losses = [public_loss(before.train(), part, coefficient) for part in tokens.split(2)]
    (sum(losses) / 4).backward()
    assert logged(trainer, "loss") == pytest.approx([sum(losses).item() / 4], rel=1e-5)
    plain = sum(public_loss(before, part, 0.0).item() for part in tokens.split(2)) / 4
    assert sum(losses).item() / 4 > 1.01 * plain
    for (name, parameter), twin in zip(before.named_parameters(), model.parameters(), strict=True):
        if not name.endswith("entropy_threshold"):  # theirs are one block's
            torch.testing.assert_close(parameter - twin, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_without_a_penalty_there_is_no_such_log(tmp_path):
    trainer = make_trainer(
        make_model("SM+LN+G", **NO_DROPOUT), tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    assert logged(trainer, "cross_entropy_loss") == pytest.approx(logged(trainer, "loss"))
    assert not logged(trainer, "entropy_loss")
    assert logged(trainer, "eval_perplexity") == pytest.approx(
        [math.exp(loss) for loss in logged(trainer, "eval_loss")]
    )


class Poison(TrainerCallback):
    """Spoils a weight before a step, once."""

    def __init__(self, step, spoil):
        self.step, self.spoil, self.done = step, spoil, False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step and not self.done:
            self.done = True
            with torch.no_grad():
                self.spoil(model)


def spoil_layer_1(model):
    model.transformer.h[1].attn.c_proj.bias.fill_(math.nan)


def spoil_head(model):
    model.transformer.wte.weight.mul_(50)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_layer_1, "the loss is nan; values that are not finite first appear in the output of layer 1 (h.1)"),
        (spoil_head, "; every layer is finite"),
    ],
)
def test_a_run_that_diverges_is_stopped_and_says_where(spoil, message, tmp_path):
    model = make_model("SM+ScFuFFN", **NO_DROPOUT)
    trainer = make_trainer(model, tmp_path, [Poison(7, spoil)], max_steps=20)
    trainer.train()
    assert message in trainer.guard.diverged
    assert trainer.guard.events[-1][1] == trainer.guard.diverged == logged(trainer, "divergence")[-1]
    assert trainer.state.global_step < 20


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_diverges_says_where(rank, tmp_path):
    """Also where the other one, with a batch of its own, is healthy."""
    run_on_ranks(diverge_on_ranks.__name__, tmp_path, rank, ranks=2)
    found = {json.loads((tmp_path / f"rank{each}.json").read_text()) for each in (0, 1)}
    place = f"on rank {rank}, values that are not finite first appear in the output of layer 1 (h.1)"
    assert found == {f"stopped: the loss is nan; {place}"}


@pytest.mark.parametrize("scaled", [False, True])
def test_a_run_that_diverges_goes_back_and_ends(scaled, tmp_path):
    """With half precision's scaler too, which keeps count of what it has seen of a step."""
    model = make_model("SM+ScFuFFN", **NO_DROPOUT)
    arguments = {"on_divergence": "rollback", "per_device_train_batch_size": 16, "max_steps": 12, "save_steps": 4}
    trainer = make_trainer(model, tmp_path, [Poison(7, spoil_layer_1)], **arguments)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu") if scaled else None
    trainer.train()
    assert (trainer.state.global_step, trainer.guard.rollbacks, trainer.guard.slowdown) == (12, 1, 0.5)
    assert trainer.guard.diverged is None
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert trainer.lr_scheduler.lr_lambdas[0](0) == 0.5


@pytest.mark.parametrize("detect", [False, True])
@pytest.mark.parametrize("step", [0, 2])
def test_with_a_scaler_a_run_that_diverges_is_stopped(step, detect, tmp_path):
    model = make_model("SM+ScFuFFN", detect_divergence=detect)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))  # which do not decay, so one group of parameters is empty
    trainer = make_trainer(model, tmp_path, [Poison(step, spoil_layer_1)])
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.train()
    assert trainer.guard.diverged
    assert trainer.state.global_step == step + 1


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_second_run_does_not_go_by_the_first(action, tmp_path):
    model = make_model("SM+ScFuFFN", **NO_DROPOUT)
    trainer = make_trainer(model, tmp_path, [Poison(3, spoil_layer_1)], on_divergence=action, learning_rate=1e-2)
    trainer.train()
    assert trainer.guard.events
    model.load_state_dict(make_model("SM+ScFuFFN", **NO_DROPOUT).state_dict())
    beginning = model.transformer.wte.weight.detach().clone()
    delete(tmp_path)
    trainer.add_callback(Poison(1, spoil_layer_1) if action == "rollback" else TrainerCallback())
    trainer.args.max_steps = 2
    trainer.train()
    assert trainer.guard.diverged is None
    assert len(list_checkpoints(tmp_path)) == 1
    if action == "rollback":
        assert trainer.guard.rollbacks == 1
        assert (model.transformer.wte.weight - beginning).abs().max() < 5e-3


def test_a_rollback_needs_a_schedule_that_can_be_slowed(tmp_path):
    schedule = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(make_model("SM+ScFuFFN"), tmp_path, on_divergence="rollback", **schedule)
    with pytest.raises(ValueError, match=r"lr_scheduler_type=.*take linear"):
        trainer.train()


def test_checkpoints_are_sealed_rotated_and_leave_nothing_behind(tmp_path):
    model = make_model("SM+LN+G", **NO_DROPOUT)
    trainer = make_trainer(
        model, tmp_path, save_total_limit=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    trainer.train()
    checkpoints = list_checkpoints(tmp_path)
    assert [path.name for path in checkpoints] == ["checkpoint-6", "checkpoint-4"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-4"}
    assert [find_damage(path) for path in checkpoints] == [None, None]
    state = json.loads((checkpoints[0] / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) in checkpoints


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_the_guard_sees_an_explosion_in_the_first_steps_and_one_after_a_long_fall(action):
    def found(losses):
        guard = DivergenceGuard(action)
        return next(filter(None, map(guard.observe, losses)), None)

    assert "the loss is" in found([5.7, 700.0, 1e7, 1e7, 1e7, 1e7])
    assert "the loss is" in found([10.0 - step / 50 for step in range(300)] + [8.0] * 20)
    assert found([7.0, 7.9, 6.2, 7.5, 6.8, 7.7, 6.4, 7.9, 7.0] + [6.5] * 50) is None


def test_a_step_diverges_in_one_part_of_its_batch_and_changes_nothing(tmp_path):
    model = make_model("SM+ScFuFFN", **NO_DROPOUT, detect_divergence=True)
    trainer = make_trainer(
        model, tmp_path, max_steps=4, gradient_accumulation_steps=4, on_divergence="rollback", save_steps=100
    )
    seen, states = [0], []

    def spoil(module, arguments):
        seen[0] += 1
        return (arguments[0] * math.nan,) if seen[0] == 9 else None

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(model.transformer.wte.weight.detach().clone())

    trainer.add_callback(Watch())
    beginning = model.transformer.wte.weight.detach().clone()
    model.transformer.h[1].register_forward_pre_hook(spoil)
    trainer.train()
    assert trainer.guard.rollbacks == 1
    assert torch.equal(states[2], beginning)  # the state that it went back to
    assert not torch.equal(states[3], states[2])


def test_other_heads_are_watched_too(tmp_path):
    rows = [{**row, "labels": index % 2} for index, row in enumerate(ROWS)]
    model = make_model("SM+ScFuFFN", EntropyGPTForSequenceClassification, num_labels=2, **NO_DROPOUT)
    trainer = make_trainer(model, tmp_path, [Poison(3, spoil_layer_1)], eval_strategy="steps", eval_steps=2)
    trainer.train_dataset = trainer.eval_dataset = rows
    trainer.data_collator = default_data_collator
    trainer.train()
    assert "layer 1 (h.1)" in trainer.guard.diverged
    assert logged(trainer, "eval_loss")
    assert not logged(trainer, "eval_perplexity")


class Interruption(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_weights_and_adds_up_its_time(tmp_path):
    def model():
        torch.manual_seed(0)
        return make_model("EReg(SM(t)+ScFuFFN)", entropy_coefficient=0.01)

    straight = model()
    make_trainer(straight, tmp_path / "straight").train()

    def stop(step):
        if step == 5:
            raise Interruption

    interrupted = make_trainer(
        model(),
        tmp_path / "resumed",
        [Stopwatch(), StepObserver(lambda step, steps: stop(step), print)],
    )
    with pytest.raises(Interruption):
        interrupted.train()
    checkpoint = last_checkpoint(tmp_path / "resumed")
    assert checkpoint.name == "checkpoint-4"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    seconds_before = state["stateful_callbacks"]["Stopwatch"]["attributes"]["seconds_before"]

    steps = []
    resumed = model()
    trainer = make_trainer(
        resumed,
        tmp_path / "resumed",
        [Stopwatch(), StepObserver(lambda *counts: steps.append(counts), print)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    assert steps == [(4, 6), (5, 6), (6, 6)]
    for (name, parameter), twin in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin, rtol=0, atol=0, msg=name)
    stopwatch = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Stopwatch))
    assert stopwatch.seconds > seconds_before > 0


def test_a_rollback_is_handed_on_too(tmp_path, monkeypatch):
    said = []
    observer = StepObserver(lambda step, steps: None, said.append)
    trainer = make_trainer(make_model("SM+ScFuFFN"), tmp_path, [observer], on_divergence="rollback", save_steps=100)
    observe, steps = DivergenceGuard.observe, iter(range(6))

    def observe_once_badly(guard, loss):
        return observe(guard, math.nan if next(steps) == 2 else loss)

    monkeypatch.setattr(DivergenceGuard, "observe", observe_once_badly)
    trainer.train()
    assert trainer.guard.rollbacks == 1
    assert len(said) == len(logged(trainer, "tokens_per_second")) == 6
    assert min(logged(trainer, "tokens_per_second")) > 0


def test_memory_is_left_out_where_it_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "resource", None)  # as on Windows
    trainer = make_trainer(make_model("SM+ScFuFFN"), tmp_path, max_steps=1)
    trainer.train()
    assert logged(trainer, "tokens_per_second")
    assert not logged(trainer, "peak_memory_mebibytes")


def test_losses_are_handed_on(tmp_path):
    said = []
    observer = StepObserver(lambda step, steps: None, said.append)
    trainer = make_trainer(make_model("SM+LN+G"), tmp_path, [observer], max_steps=3)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses, speeds = logged(trainer, "loss"), logged(trainer, "tokens_per_second")
    expected = [f"loss {loss:.3f}, {speed:,.0f} tokens/s" for loss, speed in zip(losses, speeds, strict=True)]
    assert said == expected
    a_step = trainer.args.sequences_per_step * len(trainer.train_dataset[0]["input_ids"])
    assert sum(a_step / speed for speed in speeds) <= seconds
    assert all(100 < peak < 2**17 for peak in logged(trainer, "peak_memory_mebibytes"))  # MiB, of torch at least
