"""TRL's trainers take the steps that they take with GPT-2 of the same weights, at their defaults and beside them."""

import json
import math
import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification

from entropy_gpt.training.tokenizer import train_tokenizer
from modeling_entropy_gpt import EntropyGPTForSequenceClassification
from tests.architectures import make_model
from tests.ranks import run_on_ranks
from tests.slow import slow_but
from tests.strangers import do
from tests.twins import make_twins

from . import sft_on_ranks


LINES = [f"line {index}: the quick brown fox jumps over the lazy dog" for index in range(32)]
TEXTS = {"text": LINES}
COMPLETIONS = {"prompt": [line[:12] for line in LINES], "completion": [line[12:] for line in LINES]}
PREFERENCES = {
    "prompt": COMPLETIONS["prompt"],
    "chosen": COMPLETIONS["completion"],
    "rejected": [line[::-1] for line in COMPLETIONS["completion"]],
}
OPTIONS = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": []}
OPTIONS |= {"use_cpu": True, "bf16": False, "disable_tqdm": True}
LORA = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}

pytestmark = [  # TRL still uses names that transformers deprecates
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES, vocab_size=270)


@pytest.fixture
def folders(tokenizer, tmp_path):
    """Where the twins are, for trainers that load a model again."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    folders = []
    for model in make_twins(vocab_size=len(tokenizer), **special):
        folders.append(tmp_path / type(model).__name__)
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


def load(folder, **options):
    """
    transformers counts the tokens that a loss is over one too few for each row if it shifts them, and knows that by
    the name of a class, which is another for GPT-2 than for all causal language models since.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.loss_type = "ForCausalLM"
    return model


def steps_of(trainer, key="loss") -> list[float]:
    trainer.train()
    steps = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert all(map(math.isfinite, steps))
    return steps


def fine_tune(folder, tokenizer, data, attn_implementation="sdpa", **options):
    from trl import SFTConfig, SFTTrainer  # takes seconds to import

    torch.manual_seed(0)
    arguments = SFTConfig(folder / "run", **{**OPTIONS, "max_length": 32, **options})
    return steps_of(
        SFTTrainer(
            model=load(folder, attn_implementation=attn_implementation),
            args=arguments,
            train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer,
        )
    )


FINE_TUNING = {
    "defaults": (TEXTS, {}),
    "completions alone": (COMPLETIONS, {}),
    "prompts and completions": (COMPLETIONS, {"completion_only_loss": False}),
    "packing": (TEXTS, {"packing": True}),
    "packing, eager attention": (TEXTS, {"packing": True, "attn_implementation": "eager"}),
    "packing in chunks": (TEXTS, {"packing": True, "packing_strategy": "wrapped"}),
    "padding-free": (TEXTS, {"padding_free": True, "max_length": None}),
    "accumulation": (TEXTS, {"gradient_accumulation_steps": 2}),
    "without checkpointing": (TEXTS, {"gradient_checkpointing": False}),
    "dft": (TEXTS, {"loss_type": "dft"}),
    "label smoothing": (TEXTS, {"label_smoothing_factor": 0.1}),
    "noise on embeddings": (TEXTS, {"neftune_noise_alpha": 5.0}),
}


@pytest.mark.parametrize("kind", slow_but(["defaults"], FINE_TUNING))
def test_fine_tuning(kind, folders, tokenizer, compared):
    data, options = FINE_TUNING[kind]
    theirs, ours = (fine_tune(folder, tokenizer, data, **options) for folder in folders)
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, rel=1e-4)
    difference = max(abs(own - their) / their for own, their in zip(ours, theirs, strict=True))
    compared("trl", f"losses of SFTTrainer, {kind}", f"equal within {difference:.0e} of each")


def prefer(folder, tokenizer, with_reference=False, adapted=False, **options):
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    return steps_of(
        DPOTrainer(
            model=load(folder),
            ref_model=load(folder) if with_reference else None,
            args=DPOConfig(folder / "run", **{**OPTIONS, **options}),
            train_dataset=Dataset.from_dict(PREFERENCES),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA) if adapted else None,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"with_reference": True}, {"adapted": True}, {"padding_free": True}, {"precompute_ref_log_probs": True}],
    ids=str,
)
def test_preferences(options, folders, tokenizer, compared):
    theirs, ours = (prefer(folder, tokenizer, **options) for folder in folders)
    assert ours[0] == pytest.approx(math.log(2), abs=1e-6)
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-3)
    how = ", ".join(options) or "defaults"
    compared("trl", f"losses of DPOTrainer, {how}", "equal within 1e-3 of each")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notation", "reference"),
    [
        ("SM+LN+G", "loaded again"),
        ("SM+LN+G", "given"),
        ("SM+LN+G", "without the adapter"),
        ("EReg(SM(t)+ScFuFFN)", "loaded again"),
    ],
)
def test_preferences_do_not_move_at_rate_0(notation, reference, tokenizer, tmp_path, compared):
    """
    By a process that can't import this project, of remote code with every dropout in its configuration: model and
    reference are the same, so each loss is the logarithm of 2.
    """
    dropout = {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}
    model = tmp_path / "model"
    make_model(notation, vocab_size=len(tokenizer), **dropout).save_pretrained(model)
    tokenizer.save_pretrained(model)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    answer = do(
        "prefer",
        tmp_path,
        environment,
        model=model,
        reference=reference,
        preferences=PREFERENCES,
        lora={**LORA, "target_modules": ["c_attn", "c_proj"]},
        options={**OPTIONS, "learning_rate": 0.0},
    )
    assert answer["came_along"]
    assert answer["losses"] == pytest.approx([math.log(2)] * 3, abs=1e-6)
    if notation == "SM+LN+G":
        what = f"DPOTrainer at learning rate 0 of remote code with dropout, reference {reference}"
        compared("trl", what, "ln 2 in each step")


@pytest.mark.slow
def test_rewards(folders, tokenizer, compared):
    from trl import RewardConfig, RewardTrainer

    steps = []
    kinds = (GPT2ForSequenceClassification, EntropyGPTForSequenceClassification)
    for folder, kind in zip(folders, kinds, strict=True):
        torch.manual_seed(0)
        model = kind.from_pretrained(folder, num_labels=1)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.score.weight, std=0.02)
        arguments = RewardConfig(folder / "run", **{**OPTIONS, "learning_rate": 1e-4})
        data = Dataset.from_dict(PREFERENCES)
        steps.append(steps_of(RewardTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)))
    theirs, ours = steps
    assert ours == pytest.approx(theirs, rel=1e-4)
    compared("trl", "losses of RewardTrainer", "equal within 1e-4 of each")


@pytest.mark.slow
def test_labelled_completions(folders, tokenizer, compared):
    from trl import KTOConfig, KTOTrainer

    data = {**COMPLETIONS, "label": [index % 2 == 0 for index in range(len(LINES))]}
    steps = []
    for folder in folders:
        torch.manual_seed(0)
        trainer = KTOTrainer(
            model=load(folder),
            args=KTOConfig(folder / "run", **OPTIONS),
            train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer,
        )
        steps.append(steps_of(trainer))
    theirs, ours = steps
    assert ours == pytest.approx(theirs, rel=1e-3)
    compared("trl", "losses of KTOTrainer", "equal within 1e-3 of each")


def count_letters(completions, **columns):
    return [completion.count("o") + 0.1 * len(completion) for completion in completions]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_reinforcement(method, folders, tokenizer, compared):
    """These generate, with sampling, between their steps."""
    import trl

    options = {"max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 10}
    runs = []
    for folder in folders:
        torch.manual_seed(0)
        trainer = getattr(trl, f"{method}Trainer")(
            model=str(folder),
            reward_funcs=count_letters,
            args=getattr(trl, f"{method}Config")(folder / "run", **{**OPTIONS, **options}),
            train_dataset=Dataset.from_dict({"prompt": COMPLETIONS["prompt"]}),
            processing_class=tokenizer,
        )
        losses = steps_of(trainer)
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        runs.append((losses, rewards))
    (losses, rewards), (our_losses, our_rewards) = runs
    assert len(our_rewards) == 2
    assert our_rewards == rewards
    assert our_losses == pytest.approx(losses, rel=1e-3, abs=1e-5)
    compared("trl", f"rewards and losses of {method}Trainer", "the same samples")


def fine_tune_on_ranks(folder, ranks, notation, trainer, **arguments):
    """In processes of their own; returns the weights that were saved and a record of the run."""
    folder = folder / f"ranks{ranks}"
    run_on_ranks(
        sft_on_ranks.__name__,
        folder,
        notation,
        trainer,
        json.dumps(arguments),
        ranks=ranks,
        configuration="ddp" if ranks > 1 else None,
    )
    return load_file(folder / "model.safetensors"), json.loads((folder / "record.json").read_text())["losses"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notation", "trainer"),
    [
        ("SM+LN+G", "SFTTrainer"),
        ("EReg(SM(t)+ScFuFFN)", "SFTTrainer"),
        ("EReg(SM(t)+ScFuFFN)", "EntropySFTTrainer"),
    ],
)
def test_two_ranks_with_the_defaults(notation, trainer, tmp_path, compared):
    """Gradient checkpointing, which is the default, and a loss that leaves thresholds without a gradient."""
    weights, losses = fine_tune_on_ranks(tmp_path, 2, notation, trainer)
    expected, expected_losses = fine_tune_on_ranks(tmp_path, 1, notation, trainer)
    assert len(losses) == 3
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5, msg=name)
    compared("trl", f"{trainer} of {notation} on two ranks and on one, defaults", "losses within 1e-3, weights 1e-5")
