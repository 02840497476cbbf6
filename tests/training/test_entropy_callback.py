"""Entropies of heads in the course of training: what is measured, where it goes, and what is said about it."""

import json
import math

import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

from entropy_gpt.training.entropy_callback import EntropyCallback, find_alarms, measure_heads
from entropy_gpt.training.packing import collate_blocks
from tests.architectures import ARCHITECTURES, NO_DROPOUT, make_model, make_tokens


TOKENS = make_tokens(2, 16)


def make_trainer(model, folder, callback, **arguments):
    """A plain Trainer."""
    options = {"max_steps": 5, "logging_steps": 1, "save_strategy": "no", "report_to": [], **arguments}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=folder, use_cpu=True, disable_tqdm=True, **options),
        train_dataset=Dataset.from_dict({"input_ids": make_tokens(32, 16).tolist()}),
        data_collator=collate_blocks,
        callbacks=[callback],
    )


def train(model, folder, callback, **arguments):
    make_trainer(model, folder, callback, **arguments).train()
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_heads_are_measured_as_a_naive_twin_does(notation):
    """From matrices of probabilities, in training mode and with dropout that must not show."""
    model = make_model(notation, resid_pdrop=0.5, attn_pdrop=0.5).train()
    record = measure_heads(model, TOKENS)
    assert model.training
    model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(TOKENS, output_attentions=True, output_hidden_states=True)
    for layer, probabilities in enumerate(outputs.attentions):
        rows = -torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
        torch.testing.assert_close(
            torch.tensor(record["entropies"][layer]), rows.mean(dim=(0, 2)), atol=1e-4, rtol=1e-4
        )
    scales = [states.std().item() for states in outputs.hidden_states[1:-1]]
    assert record["residual_scale"][:-1] == pytest.approx(scales, rel=1e-4)
    assert record["maximum"] == pytest.approx(sum(math.log(keys) for keys in range(1, 17)) / 16)
    assert record["context_maximum"] == pytest.approx(math.log(16))
    block = model.transformer.h[-1]
    if model.config.attention_temperature != "none":
        expected = block.attn.temperature.log_temperature.mean(dim=-1).exp().tolist()
        assert record["temperatures"][-1] == pytest.approx(expected)
    if model.config.entropy_regularization:
        assert record["thresholds"][-1] == pytest.approx(block.attn.threshold.entropy_threshold.tolist())
    for name in ("alpha", "beta"):
        assert (record[name] is None) == (not model.config.ffn_residual_scaling)
    has = {name: record[name] is not None for name in ("temperatures", "thresholds")}
    assert has == {
        "temperatures": model.config.attention_temperature != "none",
        "thresholds": model.config.entropy_regularization,
    }


def test_layers_without_an_ffn_have_no_scales():
    record = measure_heads(make_model("EReg(SM(t)+ScFuFFNi1)"), TOKENS)
    assert [value is None for value in record["alpha"]] == [False, False, True]


def test_it_is_written_at_the_beginning_the_end_and_in_between_and_changes_nothing(tmp_path):
    weights = []
    for every in (2, 0):
        torch.manual_seed(0)
        model = make_model("EReg(SM(t)+ScFuFFN)", resid_pdrop=0.1)
        records = train(model, tmp_path, EntropyCallback(TOKENS, every))
        steps = [record["step"] for record in records if record["kind"] == "entropy"]
        assert steps == ([0, 2, 4, 5] if every else [])
        assert [record["step"] for record in records if record["kind"] == "log"] == [1, 2, 3, 4, 5]
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert records[0]["kind"] == "run"
    assert records[0]["notation"] == "EReg(SM(t)+ScFuFFN)"
    assert records[0]["tokens_per_step"] == 8 * 16


def test_tensorboard_gets_it_layer_by_layer(tmp_path):
    records = train(make_model("EReg(SM(t)+ScFuFFN)"), tmp_path, EntropyCallback(TOKENS, 5), report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "runs" / "entropy"))
    events.Reload()
    (last,) = [r for r in records if r["kind"] == "entropy" and r["step"] == 5]
    for name, expected in (
        ("entropy/entropies/layer_1", sum(last["entropies"][1]) / 4),
        ("entropy/thresholds/layer_0", sum(last["thresholds"][0]) / 4),
        ("entropy/residual_scale/layer_2", last["residual_scale"][2]),
        ("entropy/beta/layer_2", last["beta"][2]),
    ):
        assert [event.step for event in events.Scalars(name)] == [0, 5]
        assert events.Scalars(name)[-1].value == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_after_training_is_no_part_of_the_log(tmp_path):
    trainer = make_trainer(make_model("SM+LN+G"), tmp_path, EntropyCallback(TOKENS, 2))
    trainer.train()
    before = (tmp_path / "training_log.jsonl").read_text()
    trainer.evaluate(trainer.train_dataset)
    assert (tmp_path / "training_log.jsonl").read_text() == before


def collapse(model):
    """Layer 1: three of four heads look at one key alone."""
    with torch.no_grad():
        model.transformer.h[1].attn.temperature.log_temperature[:3] = -12.0


def test_alarms_are_in_plain_words(caplog):
    model = make_model("SM(t)+ScFuFFN")
    assert find_alarms(measure_heads(model, TOKENS)) == {}
    collapse(model)
    with torch.no_grad():
        model.transformer.h[2].attn.temperature.log_temperature[:2] = 12.0
    assert find_alarms(measure_heads(model, TOKENS)) == {
        (1, "collapse"): "layer 1: 3 of 4 heads below 5 % of the maximum entropy (entropy collapse)",
        (2, "overload"): "layer 2: 2 of 4 heads above 95 % of the maximum entropy (entropy overload)",
    }


def test_alarms_are_raised_once_and_not_while_warming_up(tmp_path):
    model = make_model("SM(t)+ScFuFFN", **NO_DROPOUT)
    collapse(model)
    records = train(model, tmp_path, EntropyCallback(TOKENS, 1), max_steps=8, warmup_steps=3, learning_rate=1e-4)
    alarms = [record for record in records if record["kind"] == "alarm"]
    assert [(alarm["step"], alarm["layer"]) for alarm in alarms] == [(3, 1)]
    assert "3 of 4 heads" in alarms[0]["text"]
