"""Label smoothing, against stock GPT-2 with the same weights under the stock `Trainer`."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from entropy_gpt.training.arguments import EntropyTrainingArguments
from entropy_gpt.training.packing import collate_blocks
from entropy_gpt.training.trainer import EntropyTrainer
from modeling_entropy_gpt import EntropyGPTForSequenceClassification
from tests.architectures import NO_DROPOUT, make_model, make_tokens
from tests.twins import make_twins


SMOOTHING = 0.3
COEFFICIENT = 0.5
ROWS = [{"input_ids": row} for row in make_tokens(16, 16).tolist()]
BATCH = {"input_ids": make_tokens(4, 16), "labels": make_tokens(4, 16).masked_fill(torch.rand(4, 16) < 0.2, -100)}


def make_adapted(model):
    """With adapters whose numbers are other than zero, the same for each model."""
    configuration = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, configuration)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return adapted


def make_trainer(kind, model, folder, **arguments):
    arguments_class = EntropyTrainingArguments if issubclass(kind, EntropyTrainer) else TrainingArguments
    defaults = {"max_steps": 3, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    arguments = arguments_class(
        output_dir=folder,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **{"label_smoothing_factor": SMOOTHING, "per_device_train_batch_size": 8, **defaults, **arguments},
    )
    return kind(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:8], data_collator=collate)


def collate(rows):
    """Without the first labels, which nothing predicts: of GPT-2's class alone, the `Trainer` would count them."""
    batch = collate_blocks(rows)
    labels = batch["labels"].clone()
    labels[:, 0] = -100
    return {**batch, "labels": labels}


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def step(trainer, items):
    """The loss of one batch, and the gradients of the weights that stock GPT-2 has too."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model.train(), dict(BATCH), num_items_in_batch=items)
    loss.backward()
    gradients = {name.split("base_model.model.")[-1]: p.grad for name, p in trainer.model.named_parameters()}
    return loss, {name: gradient for name, gradient in gradients.items() if gradient is not None}


def assert_same_step(got, expected) -> float:
    """Of two losses with their gradients; returns the largest difference."""
    (loss, gradients), (expected_loss, expected_gradients) = got, expected
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    differences = [(gradients[name] - gradient).abs().max().item() for name, gradient in expected_gradients.items()]
    return max((loss - expected_loss).abs().item(), *differences)


@pytest.mark.parametrize("items", [None, 100])
@pytest.mark.parametrize("kind", [Trainer, EntropyTrainer])
def test_smoothed_labels_are_those_of_stock_gpt2(kind, items, tmp_path, compared):
    stock, model = make_twins()
    items = None if items is None else torch.tensor(items)
    got = step(make_trainer(kind, model, tmp_path), items)
    largest = assert_same_step(got, step(make_trainer(Trainer, stock, tmp_path), items))
    what = f"loss and gradients of smoothed labels, {kind.__name__} and stock GPT-2 under the Trainer"
    compared("transformers", what, f"equal within {largest:.0e}")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
def test_smoothed_labels_of_an_adapted_model_are_those_of_stock_gpt2(tmp_path, compared):
    stock, model = make_twins()
    plain, _ = step(make_trainer(Trainer, stock, tmp_path), None)
    expected_loss, expected = step(make_trainer(Trainer, make_adapted(stock), tmp_path), None)
    loss, gradients = step(make_trainer(Trainer, make_adapted(model), tmp_path), None)
    assert (plain - expected_loss).abs() > 0.01
    largest = assert_same_step((loss, gradients), (expected_loss, expected))
    assert all(".lora_" in name for name in expected)
    what = "loss and gradients of smoothed labels of an adapted model under the Trainer"
    compared("peft", what, f"equal within {largest:.0e}")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("items", [None, 100])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "LoRA"])
def test_the_penalty_is_added_to_smoothed_labels(adapted, items, tmp_path):
    stock, model = make_twins("EReg(SM+LN+G)", entropy_coefficient=COEFFICIENT, entropy_tolerance=0.0)
    items = None if items is None else torch.tensor(items)
    if adapted:
        stock, model = make_adapted(stock), make_adapted(model)
    outputs = copy.deepcopy(model).train()(**BATCH, num_items_in_batch=items)
    loss, _ = step(make_trainer(EntropyTrainer, model, tmp_path), items)
    smoothed, _ = step(make_trainer(Trainer, stock, tmp_path), items)
    assert outputs.entropy_loss > 0.01
    torch.testing.assert_close(loss, smoothed + COEFFICIENT * outputs.entropy_loss)
    assert (smoothed - outputs.cross_entropy_loss).abs() > 1e-3


def test_a_run_takes_the_course_of_stock_gpt2_whatever_the_accumulation(tmp_path):
    stock, model = make_twins()
    expected = losses(make_trainer(Trainer, copy.deepcopy(stock), tmp_path))
    assert expected[-1] < expected[0]
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(EntropyTrainer, copy.deepcopy(model), tmp_path, **parts)
        assert losses(trainer) == pytest.approx(expected, rel=1e-4)


def test_with_the_penalty_the_parts_of_a_batch_add_up(tmp_path):
    model = make_model("EReg(SM(t)+ScFuFFN)", entropy_coefficient=COEFFICIENT, **NO_DROPOUT)
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        found.append(losses(make_trainer(EntropyTrainer, copy.deepcopy(model), tmp_path, **parts)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_evaluation_is_of_the_cross_entropy(tmp_path):
    model = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT)
    smoothed, plain = (
        make_trainer(EntropyTrainer, model, tmp_path, label_smoothing_factor=factor).evaluate()
        for factor in (SMOOTHING, 0.0)
    )
    assert smoothed["eval_loss"] == plain["eval_loss"]
    assert smoothed["eval_perplexity"] == plain["eval_perplexity"]


def test_a_part_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"smoothing=1.5 has to be between 0 and 1"):
        make_model("SM")(**BATCH, smoothing=1.5)


def test_a_head_of_another_kind_would_lose_the_penalty(tmp_path):
    model = make_model("EReg(SM(t)+ScFuFFN)", EntropyGPTForSequenceClassification)
    with pytest.raises(ValueError, match=r"label_smoothing_factor.*entropy penalty"):
        make_trainer(EntropyTrainer, model, tmp_path)
    make_trainer(EntropyTrainer, make_model("SM", EntropyGPTForSequenceClassification), tmp_path)


def test_another_target_is_ignored():
    model, tokens = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT).train(), make_tokens()
    other, usual = tokens.clone(), tokens.clone()
    other[:, 5:8] = 7
    usual[other == 7] = -100
    other_losses = model(tokens, labels=other, smoothing=0.1, ignore_index=7)
    usual_losses = model(tokens, labels=usual, smoothing=0.1)
    for name in ("loss", "cross_entropy_loss", "entropy_loss"):
        torch.testing.assert_close(other_losses[name], usual_losses[name], msg=name)
