"""Healing: gates, schedules, parts of the loss, the guard, and runs that go on where they stopped."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PrinterCallback

from entropy_gpt.conversion.calibration import OTHERS, calibrate
from entropy_gpt.conversion.planning import plan_conversion, target_config
from entropy_gpt.training.arguments import EntropyTrainingArguments
from entropy_gpt.training.checkpoints import last_checkpoint
from entropy_gpt.training.distillation import hidden_state_distance, logits_divergence, residual_scale_distance
from entropy_gpt.training.divergence import MOST_ROLLBACKS
from entropy_gpt.training.healing import HealingLoss, HealingProgress, HealingTrainer
from entropy_gpt.training.packing import collate_blocks
from entropy_gpt.training.removal_schedule import (
    GatedFFN,
    GatedNorm,
    RemovalSchedule,
    insert_gates,
    list_removals,
    remove_gates,
)
from modeling_entropy_gpt.layers import EntropyGPTStaticLayerNorm
from tests.architectures import NO_DROPOUT, make_model, make_tokens


LENGTH = 16
TARGETS = ("EReg(SM(t)+ScFuFFN)", "SM+R+FFNi1", "SM+StaticLN+G", "SM+LN+ScFFN")


def make_pair(notation="EReg(SM(t)+ScFuFFN)", final="static"):
    """A model, what its steps before the finish make of it, and the model's statistics."""
    original = make_model("SM+LN+G", **NO_DROPOUT)
    for parameter in original.parameters():
        parameter.data.mul_(0.5)
    batches = make_tokens(80, LENGTH).split(16)
    simplified = original
    plan = plan_conversion(original.config, target_config(original.config, notation, final_normalization=final))
    for step in plan.simplifications:
        calibration = calibrate(simplified, batches) if step.calibrated and not step.hidden_activation else None
        simplified = step.apply(simplified, calibration)
    return original, simplified, calibrate(original, batches)


@pytest.fixture(scope="module")
def gated():
    """Gated models by the final norm of what they become; schedules set their gates anew."""
    torch.manual_seed(0)
    return {final: insert_gates(*make_pair("SM+ScFuFFN", final)) for final in ("layernorm", "static")}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("final", ["layernorm", "static"])
@pytest.mark.parametrize("notation", TARGETS)
def test_open_gates_are_the_original_and_closed_ones_the_simplified_model(notation, final):
    original, simplified, calibration = make_pair(notation, final)
    gated = insert_gates(original, simplified, calibration).eval()
    tokens = make_tokens(3, LENGTH)
    torch.testing.assert_close(logits(gated, tokens), logits(original, tokens), rtol=1e-4, atol=1e-4)
    schedule = RemovalSchedule(gated, "staircase")
    assert schedule.set_clock(1.0) == len(schedule.removals) > 0
    # Constants of the first norms are the same; those behind were measured on other rows, of the original.
    for name, module in simplified.named_modules():
        if isinstance(module, EntropyGPTStaticLayerNorm):
            module.standard_deviation.copy_(gated.get_submodule(name).make_static().standard_deviation)
    torch.testing.assert_close(logits(gated, tokens), logits(simplified, tokens), rtol=1e-4, atol=1e-4)
    left = remove_gates(gated, simplified)
    assert left.config.notation == notation if notation.count("LN") else left.config.normalization == "static"
    torch.testing.assert_close(logits(left, tokens), logits(gated, tokens), rtol=1e-4, atol=1e-4)
    assert left.state_dict().keys() == simplified.state_dict().keys()


def test_a_staircase_removes_in_the_published_order():
    gated = insert_gates(*make_pair("SM+ScFuFFN"))
    names = [removal.name for removal in list_removals(gated)]
    assert names == [
        *("h.0.ln_2", "h.1.ln_2", "h.2.ln_2", "h.0.ln_1", "h.1.ln_1", "h.2.ln_1"),
        *("h.2.mlp", "h.1.mlp", "h.0.mlp", "ln_f", "special rows"),
    ]
    schedule = RemovalSchedule(gated, "staircase")
    assert schedule.set_clock(0.0) == 0
    assert schedule.set_clock(4.5 / 11) == 4
    norms = [gated.transformer.h[0].ln_1, gated.transformer.h[1].ln_1]
    assert [norm.gate for norm in norms] == [0.0, 1.0]
    assert norms[0].apartness == 1.0


@given(kind=st.sampled_from(["gate", "staircase"]), clocks=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_gates_only_close(gated, kind, clocks):
    removals = []
    for clock in sorted(clocks):
        schedule = RemovalSchedule(gated["static"], kind)
        schedule.set_clock(clock)
        removals.append([r.gate.gate for r in schedule.removals if r.gate] + [schedule.norms[0].apartness])
    assert all(0 <= later <= earlier <= 1 for earlier, later in zip(*removals, strict=True))
    assert schedule.set_clock(1.0) == len(schedule.removals)


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 30, 49, 1000, pytest.param(12345, marks=pytest.mark.slow)])
@pytest.mark.parametrize("final", ["static", "layernorm"])
@pytest.mark.parametrize("kind", ["gate", "staircase"])
def test_each_thing_is_removed_at_its_step(gated, kind, final, steps):
    """The last one, the final norm's or its special rows, after all steps of the schedule and not one later."""
    schedule = RemovalSchedule(gated[final], kind)
    names = [removal.name for removal in schedule.removals]
    assert ("ln_f" in names) == (final == "static")
    progress, removed_at = HealingProgress(first_pace=1 / steps), {}
    for step in range(steps + 1):
        for removal in schedule.removals[len(removed_at) : schedule.set_clock(progress.clock)]:
            removed_at[removal.name] = step
        progress.on_step_end(None, None, None)
    count = len(names)
    if kind == "staircase":
        assert removed_at == {name: -(-steps * (index + 1) // count) for index, name in enumerate(names)}
    else:
        assert removed_at == {name: steps if name == "special rows" else -(-steps * 4 // 5) for name in names}


@pytest.mark.parametrize("kind", ["gate", "staircase"])
def test_a_schedule_as_long_as_training_ends_with_it(kind, tmp_path):
    trainer = make_trainer(tmp_path, kind, max_steps=10, removal_steps=10)
    trainer.train()
    assert [event for _, event in trainer.progress.events] == [f"{r.name} removed" for r in trainer.schedule.removals]
    assert trainer.progress.events[-1][0] == 10
    assert all(removal.gate.gate == 0 for removal in trainer.schedule.removals if removal.gate)


def test_smoothed_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1: .*leave it out"):
        make_trainer(tmp_path, label_smoothing_factor=0.1)


def test_special_rows_have_constants_of_their_own_until_the_end():
    original, simplified, calibration = make_pair("SM+StaticLN+G")
    gated = insert_gates(original, simplified, calibration).eval()
    norm = gated.transformer.h[0].ln_1
    schedule = RemovalSchedule(gated, "gate")
    schedule.set_clock(0.8)
    assert (norm.gate, norm.apartness) == (0.0, 1.0)
    tokens = make_tokens(2, LENGTH)
    gated(tokens)
    states = torch.randn(2, LENGTH, 48)
    factors = norm(states) - norm.bias
    centered = (states - states.mean(dim=-1, keepdim=True)) * norm.weight
    constants = torch.stack([factors[:, i].norm() / centered[:, i].norm() for i in range(2)]).reciprocal()
    expected = torch.tensor([calibration.norm_constant("transformer.h.0.ln_1", group) for group in (0, OTHERS)])
    torch.testing.assert_close(constants, expected)
    schedule.set_clock(1.0)
    one_constant = norm(states) - norm.bias
    torch.testing.assert_close(one_constant, centered / expected[1])


def test_constants_follow_training_until_the_gate_is_closed():
    gated = insert_gates(*make_pair("SM+StaticLN+G"))
    norm = gated.transformer.h[1].ln_1
    before = norm.moments.clone()
    gated.eval()(make_tokens(2, LENGTH))
    assert torch.equal(norm.moments, before)
    gated.train()(make_tokens(2, LENGTH))
    assert not torch.equal(norm.moments, before)
    norm.gate, before = 0.0, norm.moments.clone()
    gated(make_tokens(2, LENGTH))
    assert torch.equal(norm.moments, before)


def test_gradients_reach_what_is_left_of_each_gate():
    gated = insert_gates(*make_pair("SM+ScFuFFN")).train()
    RemovalSchedule(gated, "gate").set_clock(0.4)
    tokens = make_tokens(2, LENGTH)
    gated(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in gated.named_parameters() if "wpe" not in name)


def test_parts_of_the_loss_are_those_of_every_token_alone():
    torch.manual_seed(1)
    found, expected, hidden, original = torch.randn(4, 2, 5, 7).double()
    predicted = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    rows = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    kl = 0.0
    for row in rows:
        p, q = (expected[row] / 2).softmax(-1), (found[row] / 2).softmax(-1)
        kl += 4 * (p * (p / q).log()).sum() / 10
    torch.testing.assert_close(
        logits_divergence(found, expected, predicted, 10, 2.0).double(), kl, rtol=1e-5, atol=1e-5
    )
    distance = sum((hidden[row] - original[row]).square().sum() / original[row].square().sum() for row in rows) / 10
    result = hidden_state_distance([hidden, hidden], [original, original], predicted, 10).double()
    torch.testing.assert_close(result, distance, rtol=1e-5, atol=1e-5)
    scale = sum((hidden[row].std(unbiased=False) / 3 - 1) ** 2 for row in rows if row[1]) / 10
    result = residual_scale_distance(hidden, 3.0, predicted, 10).double()
    torch.testing.assert_close(result, scale, rtol=1e-5, atol=1e-5)


def make_trainer(folder, kind="staircase", loss=None, pair=None, gated=True, removal_steps=8, **arguments):
    original, simplified, calibration = pair or make_pair("SM+ScFuFFN")
    model = insert_gates(original, simplified, calibration) if gated else copy.deepcopy(simplified)
    blocks = torch.randint(2, 101, (64, LENGTH), generator=torch.Generator().manual_seed(3))
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "restore_callback_states_from_checkpoint": True,
        **arguments,
    }
    trainer = HealingTrainer(
        model=model,
        args=EntropyTrainingArguments(output_dir=folder, **settings),
        train_dataset=Dataset.from_dict({"input_ids": blocks.tolist()}),
        data_collator=collate_blocks,
        healing_loss=loss or HealingLoss(logits=0.5, hidden_states=0.1, residual_scale=0.1),
        original=original,
        residual_scale=calibration.norm_constant("transformer.ln_f"),
        removal_steps=removal_steps,
        schedule=RemovalSchedule(model, kind) if gated else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize("kind", ["gate", "staircase"])
def test_a_run_resumed_in_mid_schedule_takes_the_same_course(kind, tmp_path):
    pair = make_pair("SM+ScFuFFN")
    whole = make_trainer(tmp_path / "whole", kind, pair=pair)
    whole.train()

    first = make_trainer(tmp_path / "parts", kind, pair=pair)

    def stop(*args, **kwargs):
        if first.state.global_step == 6:
            raise KeyboardInterrupt

    first._close_gates = stop_after(first._close_gates, stop)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    checkpoint = last_checkpoint(tmp_path / "parts")
    assert checkpoint.name == "checkpoint-4"
    second = make_trainer(tmp_path / "parts", kind, pair=pair)
    second.train(resume_from_checkpoint=checkpoint)

    assert second.progress.clock == whole.progress.clock == 1.0
    assert second.progress.events == whole.progress.events
    assert len(whole.progress.events) == len(whole.schedule.removals)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def stop_after(method, stop):
    def wrapped():
        method()
        stop()

    return wrapped


def test_batches_split_by_accumulation_give_the_same(tmp_path):
    pair = make_pair("SM+ScFuFFN")
    states = []
    for name, size, parts in (("whole", 8, 1), ("parts", 2, 4)):
        trainer = make_trainer(
            tmp_path / name,
            pair=pair,
            gated=False,
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            optim="sgd",
        )
        trainer.train()
        states.append(trainer.model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-6)


def test_distillation_draws_nearer_to_the_original(tmp_path):
    pair = make_pair("SM+LN+ScFFN")
    tokens = torch.randint(2, 101, (16, LENGTH), generator=torch.Generator().manual_seed(3))
    expected = logits(pair[0], tokens).log_softmax(dim=-1)

    def divergence(model):
        return torch.nn.functional.kl_div(
            logits(model.eval(), tokens).log_softmax(dim=-1), expected, log_target=True, reduction="batchmean"
        )

    distances = [divergence(pair[1])]
    for weight in (0.0, 1.0):
        loss = HealingLoss(logits=weight)
        trainer = make_trainer(tmp_path / str(weight), loss=loss, pair=pair, gated=False, max_steps=30)
        trainer.train()
        distances.append(divergence(trainer.model))
    assert distances[2] < 0.7 * distances[0]
    assert distances[2] < 0.7 * distances[1]


def run_disturbed(trainer, disturb):
    """Trains, and calls `disturb(step)` before every step, with what the weights are then."""
    close = trainer._close_gates

    def close_and_disturb():
        close()
        disturb(trainer.state.global_step)

    trainer._close_gates = close_and_disturb
    trainer.train()
    return trainer.progress


def test_the_guard_goes_back_and_slows_down(tmp_path):
    trainer = make_trainer(tmp_path, "gate", gated=True, max_steps=40, removal_steps=16)
    good = {}

    def disturb(step):
        if step == 10 and not trainer.progress.rollbacks:
            good.update({name: tensor.clone() for name, tensor in trainer._good_state["model"].items()})
            with torch.no_grad():
                trainer.model.transformer.wte.weight.mul_(100)
        elif step == 11:
            # Nothing but the good state, of which the step of the rollback changed nothing.
            assert all(torch.equal(good[name], t) for name, t in trainer.model.state_dict().items())
            # Slower, yet in time: from the good state's clock on, half as fast.
            assert trainer.progress.clock == 8 / 16 + 1 / 32

    progress = run_disturbed(trainer, disturb)
    assert progress.rollbacks == 1
    assert progress.slowdown == 0.5
    assert [event for _, event in progress.events if event.startswith("back to the last good state: the loss is")]
    assert progress.clock == 1.0
    assert all(gate == 0 for gate in (r.gate.gate for r in trainer.schedule.removals if r.gate))
    assert trainer.lr_scheduler.lr_lambdas[0](0) == 0.5


def test_the_guard_sees_a_residual_stream_that_runs_away(tmp_path):
    """Under a LayerNorm before the head, the loss does not tell."""
    trainer = make_trainer(tmp_path, pair=make_pair("SM+ScFuFFN", "layernorm"), gated=False, max_steps=40)

    def disturb(step):
        if step == 10 and not trainer.progress.rollbacks:
            with torch.no_grad():
                for block in trainer.model.transformer.h[-1:]:
                    block.residual_scaling.ffn_beta.mul_(1000)
                    block.residual_scaling.ffn_alpha.div_(1000)
                    block.attn.c_proj.weight.mul_(1000)

    progress = run_disturbed(trainer, disturb)
    assert progress.rollbacks >= 1
    assert "the residual stream's scale" in progress.events[0][1]


def test_the_guard_sees_a_slow_drift_and_bears_a_noisy_batch():
    progress = HealingProgress()

    def found(losses, scale=1.0):
        progress.scale = scale
        return next(filter(None, map(progress.observe, losses)), None)

    assert found([4.0, 3.8, 4.1, 4.2, 3.9, 4.0]) is None
    progress.keep()
    assert found([4.0, 6.5, 4.0, 4.0, 2.0, 4.1, 6.0, 4.0, 4.0]) is None
    assert "the loss is 5.0" in found([4.0 + step / 50 for step in range(200)])
    progress.mean_loss = 4.0
    assert "scale" in found([4.0] * 100, scale=40.0)


def test_a_gradient_that_is_not_finite_never_reaches_a_good_state(tmp_path):
    """At the step before a checkpoint, whose weights would be lost for good."""
    trainer = make_trainer(tmp_path, gated=False)
    weight = trainer.model.transformer.h[0].attn.c_attn.weight
    poison = weight.register_hook(lambda gradient: gradient * math.nan if trainer.state.global_step == 3 else gradient)
    progress = run_disturbed(trainer, lambda step: poison.remove() if step > 3 else None)
    assert [event for _, event in progress.events] == ["back to the last good state: a gradient is not finite"]
    assert all(tensor.isfinite().all() for tensor in trainer._good_state["model"].values())
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("part", ["hidden_states", "residual_scale", "logits"])
@pytest.mark.parametrize("final", ["layernorm", "static"])
def test_the_trainers_loss_is_made_of_its_parts(part, final, tmp_path):
    """The stream that counts is the one before the final norm, and the penalty keeps its weight."""
    pair = make_pair(final=final)
    pair[1].config.entropy_tolerance = 0.0  # heads that are as they were measured have a penalty then
    gated = final == "layernorm"
    trainer = make_trainer(tmp_path, loss=HealingLoss(**{part: 0.25}), pair=pair, gated=gated)
    if gated:
        trainer.schedule.set_clock(0.3)
    tokens = make_tokens(4, LENGTH)
    model, original = trainer.model.train(), pair[0]
    streams = []
    for module in (model, original):
        for place in (*module.transformer.h[1:], module.transformer.ln_f):
            place.register_forward_pre_hook(lambda _, arguments: streams.append(arguments[0]))
    predicted = torch.ones_like(tokens, dtype=torch.bool)
    predicted[:, -1] = False
    count = predicted.sum()
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    batch["attention_mask"][0, :3] = 0
    loss, outputs = trainer.compute_loss(model, {**batch, "labels": tokens}, True, num_items_in_batch=count)
    with torch.no_grad():
        expected = original(**batch)
    layers = len(model.transformer.h)
    mine, theirs = streams[:layers], streams[-layers:]
    parts = {
        "hidden_states": lambda: hidden_state_distance(mine, theirs, predicted, count),
        "residual_scale": lambda: residual_scale_distance(mine[-1], trainer.residual_scale, predicted, count),
        "logits": lambda: (
            logits_divergence(outputs.logits, expected.logits, predicted, count) - outputs.cross_entropy_loss
        ),
    }
    own = outputs.cross_entropy_loss + model.config.entropy_coefficient * outputs.entropy_loss
    assert outputs.entropy_loss > 0
    torch.testing.assert_close(loss, own + 0.25 * parts[part]())


@pytest.mark.parametrize("detect", [True, False])
def test_a_run_that_runs_away_again_and_again_ends_with_a_reason(detect, tmp_path):
    original, simplified, calibration = make_pair("SM+ScFuFFN")
    simplified.config.detect_divergence = detect
    trainer = make_trainer(tmp_path, pair=(original, simplified, calibration), gated=False, max_steps=30)

    def disturb(step):
        with torch.no_grad():
            trainer.model.transformer.wte.weight.fill_(math.nan)

    progress = run_disturbed(trainer, disturb)
    assert (progress.rollbacks, trainer.state.global_step) == (MOST_ROLLBACKS, MOST_ROLLBACKS + 1)
    assert "first appear in the output of the embeddings" in progress.diverged


def test_gated_norms_are_not_recomputed(tmp_path):
    with pytest.raises(ValueError, match="activation_checkpointing=True would take each row"):
        make_trainer(tmp_path, activation_checkpointing=True)


def test_the_original_is_not_trained(tmp_path):
    pair = make_pair("SM+ScFuFFN")
    before = copy.deepcopy([model.state_dict() for model in pair[:2]])
    trainer = make_trainer(tmp_path, pair=pair)
    trainer.train()
    for model, state in zip(pair[:2], before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, GatedNorm | GatedFFN) for module in pair[1].modules())
