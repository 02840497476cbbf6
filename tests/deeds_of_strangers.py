"""What strangers do with a model, each by a function's name; run by `strangers.py`. Answers are printed as JSON."""

import json
import sys
import time

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)


PROMPT = "def main"


def load_heads(model: str, names: list[str]) -> dict:
    """A model by the auto classes named: class, and whether it came with the model."""
    answer = {"notation": AutoConfig.from_pretrained(model, trust_remote_code=True).notation}
    for name in names:
        loaded = getattr(transformers, name).from_pretrained(model, trust_remote_code=True)
        came_along = type(loaded).__module__.startswith("transformers_modules.")
        answer[name] = [type(loaded).__name__, came_along]
    return answer


def compare(models: list[dict]) -> list[float]:
    """How far the logits of models are from their references; what else is told of one is for `from_pretrained`."""
    return [_compare(**model) for model in models]


def use(model: str, sharded: str, reference: str, sharded_reference: str, saved: str) -> dict:
    """The ways in which a model is used first; it is saved again at the end."""
    answer = {"refusals": [_refusal(auto, model) for auto in (AutoConfig, AutoModel, AutoModelForCausalLM)]}
    answer["notation"] = AutoConfig.from_pretrained(model, trust_remote_code=True).notation
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = load_file(reference)
    answer["difference"] = _difference(loaded, reference)
    answer["sharded_difference"] = _compare(sharded, sharded_reference)
    with torch.no_grad():
        base = AutoModel.from_pretrained(model, trust_remote_code=True)
        hidden = base(expected["input_ids"]).last_hidden_state
        answer["base_difference"] = (loaded.lm_head(hidden) - expected["logits"]).abs().max().item()
        classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3, trust_remote_code=True)
        answer["classes"] = list(classifier(expected["input_ids"]).logits.shape)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    answer["generated"], answer["generated_without_cache"] = (
        loaded.generate(**inputs, max_new_tokens=20, do_sample=False, use_cache=use_cache)[0].tolist()
        for use_cache in (True, False)
    )
    generator = pipeline("text-generation", model=model, trust_remote_code=True)
    (answer["pipeline"],) = generator(PROMPT, max_new_tokens=20, do_sample=False)
    answer["decoded"] = tokenizer.decode(answer["generated"])
    loaded.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    return answer


def adapt(model: str, pinned: str, reference: str, other_reference: str, adapter: str) -> dict:
    """Loads a model by its hash and at its branch, and trains an adapter on the former for one step."""
    from peft import LoraConfig, get_peft_model

    loaded = AutoModelForCausalLM.from_pretrained(model, revision=pinned, trust_remote_code=True)
    answer = {
        "pinned_difference": _difference(loaded, reference),
        "latest_difference": _compare(model, other_reference),
    }
    answer["logits_before"] = _sample(loaded, reference)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapted = get_peft_model(loaded, config)
    optimizer = torch.optim.SGD([tensor for tensor in adapted.parameters() if tensor.requires_grad], lr=1.0)
    tokens = load_file(reference)["input_ids"]
    adapted.train()
    adapted(tokens, labels=tokens).loss.backward()
    optimizer.step()
    adapted.save_pretrained(adapter)
    answer["logits"] = _sample(adapted.eval(), reference)
    return answer


def go_offline(model: str, pinned: str, reference: str, other_reference: str, adapter: str) -> dict:
    """Loads again what [`adapt`] loaded and saved."""
    from peft import PeftModel

    loaded = AutoModelForCausalLM.from_pretrained(model, revision=pinned, trust_remote_code=True)
    answer = {
        "pinned_difference": _difference(loaded, reference),
        "latest_difference": _compare(model, other_reference),
    }
    answer["logits"] = _sample(PeftModel.from_pretrained(loaded, adapter).eval(), reference)
    return answer


def reload_adapter(adapter: str, reference: str) -> dict:
    """An adapter and the model that it names, in one call."""
    from peft import AutoPeftModelForCausalLM

    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
    came_along = type(loaded.get_base_model()).__module__.startswith("transformers_modules.")
    return {"difference": _difference(loaded, reference), "came_along": came_along}


def prefer(model: str, reference: str, preferences: dict, lora: dict, options: dict) -> dict:
    """Trains on preferences; the reference is loaded again by the trainer, given, or the model without its adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    given = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True) if reference == "given" else None
    trainer = DPOTrainer(
        model=model,
        ref_model=given,
        args=DPOConfig("run", trust_remote_code=True, **options),
        train_dataset=Dataset.from_dict(preferences),
        peft_config=LoraConfig(**lora) if reference == "without the adapter" else None,
    )
    trainer.train()
    came_along = any(type(part).__module__.startswith("transformers_modules.") for part in trainer.model.modules())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "came_along": came_along}


def _compare(model: str, reference: str, **options) -> float:
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True, **options)
    return _difference(loaded, reference)


def _refusal(auto_class, model: str) -> dict:
    """How loading without `trust_remote_code` ends."""
    started = time.perf_counter()
    try:
        auto_class.from_pretrained(model)
    except ValueError as error:
        return {"message": str(error), "seconds": time.perf_counter() - started}
    raise AssertionError("code of a stranger was run")


@torch.no_grad()
def _difference(model, reference: str) -> float:
    expected = load_file(reference)
    return (model.eval()(expected["input_ids"]).logits - expected["logits"]).abs().max().item()


@torch.no_grad()
def _sample(model, reference: str) -> list[float]:
    """Some logits."""
    return model(load_file(reference)["input_ids"]).logits[0, -1, :10].tolist()


if __name__ == "__main__":
    deed, told = sys.argv[1:]
    answer = globals()[deed](**json.loads(told))
    print(f"\n{json.dumps(answer)}")  # questions that nobody answers stay on their line
