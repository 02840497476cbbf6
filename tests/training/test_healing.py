"""Healing: gates, schedules, parts of the loss, the guard, and runs that go on where they stopped."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PrinterCallback, TrainingArguments

from conversion.calibration import OTHERS, calibrate
from conversion.simplification import plan_conversion, target_config
from modeling_entropy_gpt.layers import EntropyGPTStaticLayerNorm
from tests.architectures import NO_DROPOUT, make_model, make_tokens
from training.data import collate_blocks
from training.distillation import hidden_state_distance, logits_divergence, residual_scale_distance
from training.healing import MOST_ROLLBACKS, HealingLoss, HealingTrainer
from training.removal_schedule import (
    GatedFFN,
    GatedNorm,
    RemovalSchedule,
    insert_gates,
    list_removals,
    remove_gates,
)
from training.trainer import last_checkpoint


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
        calibration = calibrate(simplified, batches, None) if step.calibrated and not step.hidden_activation else None
        simplified = step.apply(simplified, calibration)
    return original, simplified, calibrate(original, batches)


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
def test_gates_only_close(kind, clocks):
    removals = []
    for clock in sorted(clocks):
        schedule = RemovalSchedule(GATED, kind)
        schedule.set_clock(clock)
        removals.append([r.gate.gate for r in schedule.removals if r.gate] + [schedule.norms[0].apartness])
    assert all(0 <= later <= earlier <= 1 for earlier, later in zip(*removals, strict=True))
    assert schedule.set_clock(1.0) == len(schedule.removals)


torch.manual_seed(0)
GATED = insert_gates(*make_pair("SM+ScFuFFN"))


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


def make_trainer(folder, kind="staircase", loss=None, pair=None, gated=True, **arguments):
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
        args=TrainingArguments(output_dir=folder, **settings),
        train_dataset=Dataset.from_dict({"input_ids": blocks.tolist()}),
        data_collator=collate_blocks,
        healing_loss=loss or HealingLoss(logits=0.5, hidden_states=0.1, residual_scale=0.1),
        original=original,
        residual_scale=calibration.norm_constant("transformer.ln_f"),
        removal_steps=8,
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


def test_the_guard_goes_back_and_slows_down(tmp_path):
    trainer = make_trainer(tmp_path, "gate", gated=True)
    good = None
    close = trainer._close_gates

    def disturb():
        nonlocal good
        close()
        if trainer.state.global_step == 5 and trainer.progress.rollbacks == 0:
            good = {name: tensor.clone() for name, tensor in trainer._good_state["model"].items()}
            with torch.no_grad():
                trainer.model.transformer.wte.weight.mul_(100)
        elif trainer.state.global_step == 6:
            # Nothing but the good state, of which the step of the rollback changed nothing.
            assert all(torch.equal(good[name], t) for name, t in trainer.model.state_dict().items())

    trainer._close_gates = disturb
    trainer.train()
    progress = trainer.progress
    assert progress.rollbacks == 1
    assert progress.slowdown == 0.5
    assert [event for _, event in progress.events if event.startswith("back to the last good state")]
    assert progress.clock == 1.0  # slower, yet in time
    assert all(gate == 0 for gate in (r.gate.gate for r in trainer.schedule.removals if r.gate))
    assert trainer.lr_scheduler.lr_lambdas[0](0) == 0.5


@pytest.mark.parametrize("detect", [True, False])
def test_a_run_that_runs_away_again_and_again_ends_with_a_reason(detect, tmp_path):
    original, simplified, calibration = make_pair("SM+ScFuFFN")
    simplified.config.detect_divergence = detect
    trainer = make_trainer(tmp_path, pair=(original, simplified, calibration), gated=False, max_steps=30)
    close = trainer._close_gates

    def disturb():
        close()
        with torch.no_grad():
            trainer.model.transformer.wte.weight.fill_(math.nan)

    trainer._close_gates = disturb
    with pytest.raises(FloatingPointError, match=f"ran away {MOST_ROLLBACKS + 1} times.*Lower the learning rate"):
        trainer.train()


def test_the_original_is_not_trained(tmp_path):
    pair = make_pair("SM+ScFuFFN")
    before = copy.deepcopy([model.state_dict() for model in pair[:2]])
    trainer = make_trainer(tmp_path, pair=pair)
    trainer.train()
    for model, state in zip(pair[:2], before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, GatedNorm | GatedFFN) for module in pair[1].modules())
