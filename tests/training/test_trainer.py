"""The trainer, its checkpoints and its callbacks."""

import json

import pytest
import torch
from transformers import TrainingArguments

from tests.architectures import make_model, make_tokens
from training.callbacks import StepObserver, Stopwatch
from training.data import collate_blocks
from training.trainer import EntropyTrainer, last_checkpoint


ROWS = [{"input_ids": row} for row in make_tokens(32, 16).tolist()]


def make_trainer(model, folder, callbacks=(), **arguments):
    return EntropyTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            restore_callback_states_from_checkpoint=True,
            **{"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, **arguments},
        ),
        train_dataset=ROWS,
        data_collator=collate_blocks,
        callbacks=list(callbacks),
    )


def test_weight_decay_spares_what_it_would_pull_from_its_meaning(tmp_path):
    """Only plain weights decay: neither biases nor norms, nor any parameter that this family adds."""
    model = make_model("EReg(SM(t)+LN+LearnableLeakyR+ScFFN+WN(QK))")
    decayed = set(make_trainer(model, tmp_path).get_decay_parameter_names(model))
    names = {name for name, _ in model.named_parameters()}
    spared = {name.rpartition(".")[2] for name in names - decayed}
    assert spared == {
        *("log_temperature", "entropy_threshold", "ffn_alpha", "ffn_beta", "gain", "negative_slope", "bias", "weight")
    }
    assert {name for name in names - decayed if name.endswith("weight")} == {
        name for name in names if "ln_" in name and name.endswith("weight")
    }


@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_losses_that_would_lack_the_penalty_are_refused(option, tmp_path):
    def make(notation):
        arguments = {"label_smoothing_factor": 0.1} if option == "label_smoothing_factor" else {}
        options = {"compute_loss_func": lambda *_, **__: 0.0} if option == "compute_loss_func" else {}
        arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[], **arguments)
        return EntropyTrainer(model=make_model(notation), args=arguments, train_dataset=ROWS, **options)

    make("SM+ScFuFFN")
    with pytest.raises(ValueError, match=f"{option}.*entropy penalty"):
        make("EReg(SM(t)+ScFuFFN)")


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

    interrupted = make_trainer(model(), tmp_path / "resumed", [Stopwatch(), StepObserver(stop, lambda loss: None)])
    with pytest.raises(Interruption):
        interrupted.train()
    checkpoint = last_checkpoint(tmp_path / "resumed")
    assert checkpoint.name == "checkpoint-4"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    seconds_before = state["stateful_callbacks"]["Stopwatch"]["attributes"]["seconds_before"]

    steps = []
    resumed = model()
    trainer = make_trainer(resumed, tmp_path / "resumed", [Stopwatch(), StepObserver(steps.append, lambda loss: None)])
    trainer.train(resume_from_checkpoint=checkpoint)
    assert steps == [4, 5, 6]
    for (name, parameter), twin in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin, rtol=0, atol=0, msg=name)
    stopwatch = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Stopwatch))
    assert stopwatch.seconds > seconds_before > 0


def test_losses_are_handed_on(tmp_path):
    losses = []
    observer = StepObserver(lambda step: None, losses.append)
    make_trainer(make_model("SM+LN+G"), tmp_path, [observer], max_steps=3).train()
    assert len(losses) == 3


def test_last_checkpoint_passes_over_what_a_killed_process_left(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step, state in ((8, "{}"), (9, "{}"), (10, "{"), (100, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-9"
