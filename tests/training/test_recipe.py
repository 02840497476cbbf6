"""Recipes: those that come along, overrides, and what is refused."""

import json
import subprocess

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from entropy_gpt.training.errors import RecipeError
from entropy_gpt.training.recipe import ARGUMENT_FIELDS, CONFIG_FIELDS, read_recipe
from entropy_gpt.training.recipe_file import RECIPES, argument_names, config_names, list_recipes, read_override
from modeling_entropy_gpt import EntropyGPTConfig


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def read_with(source, *words):
    """A recipe with settings as a command line has them."""
    return read_recipe(source, dict(map(read_override, words)))


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_can_be_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(name, {"use_cpu": True, "fp16": False, "bf16": False})
    assert recipe.model.notation == ("Pow4(t_h)+ScFuFFN" if "power4" in name else "EReg(SM(t)+ScFuFFN)")
    assert recipe.training.output_dir == f"runs/{name}"
    assert recipe.training.weight_decay > 0
    fields = {key: value for key, value in recipe.config_fields.items() if key != "n_positions"}
    config = EntropyGPTConfig.from_notation(recipe.model.notation, **fields)
    assert config.entropy_regularization or config.log_sum_coefficient
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")
    assert not list(tmp_path.iterdir())


def test_names_in_the_sources_are_those_of_the_classes():
    assert argument_names() == ARGUMENT_FIELDS.keys()
    assert config_names() == CONFIG_FIELDS.keys()


def test_recipes_are_the_papers():
    """Figures of arXiv 2501.03489; a step of CodeParrot is 512 sequences."""
    for name, layers, context in (
        ("codeparrot-128", 12, 128),
        ("codeparrot-256", 12, 256),
        ("codeparrot-128-18layers", 18, 128),
        ("languini-512", 12, 512),
    ):
        recipe = read_recipe(name, {"use_cpu": True, "fp16": False})
        is_code = name.startswith("codeparrot")
        assert (recipe.config_fields["n_layer"], recipe.data.context) == (layers, context)
        assert recipe.config_fields["n_embd"] == 64 * recipe.config_fields["n_head"] == 768
        assert recipe.config_fields["temperature_init"] == (0.01 if is_code else 0.1)
        # The public code's weight is of a sum over one part of an optimiser step; here it is over all of them.
        parts = recipe.training.gradient_accumulation_steps
        assert recipe.config_fields["entropy_coefficient"] * parts == pytest.approx(1e-5 if is_code else 5e-5)
        assert [recipe.config_fields[f"{place}_pdrop"] for place in ("embd", "resid", "attn")] == [0.1, 0.0, 0.0]
        assert (recipe.training.learning_rate, recipe.training.warmup_steps) == (1e-3, 0.05)
        assert recipe.training.lr_scheduler_type == "polynomial"
        if is_code:
            assert (recipe.training.per_device_train_batch_size, parts) == (128, 4)


def test_settings_go_where_they_belong_and_overrides_win(write):
    path = write(
        "notation: SM+R\nn_layer: 2\ndataset: a.txt\nlearning_rate: 1e-3\nlora_target_modules: [c_attn, c_fc]\n"
    )
    overrides = ["learning_rate=2.5e-4", "n_layer=3", "streaming=true", "lr_scheduler_kwargs={power: 2}"]
    recipe = read_with(path, *overrides, "report_to=[tensorboard, tensorboard]")
    assert recipe.config_fields == {"n_layer": 3}
    assert (recipe.model.notation, recipe.data.dataset, recipe.data.streaming) == ("SM+R", "a.txt", True)
    assert recipe.training.learning_rate == 2.5e-4
    assert recipe.training.lr_scheduler_kwargs == {"power": 2}
    assert recipe.lora.lora_target_modules == ["c_attn", "c_fc"]
    assert recipe.settings["learning_rate"] == 2.5e-4
    assert recipe.training.report_to == ["tensorboard", "tensorboard"]
    assert read_recipe(path, {}).training.report_to == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("lerning_rate=1", "no setting 'lerning_rate'; did you mean 'learning_rate'?"),
        ("n_layers=1", "no setting 'n_layers'; did you mean 'n_layer'?"),
        ("bos_token_id=1", "no setting 'bos_token_id'"),
        ("learning_rate=fast", "learning_rate=fast: 'fast' is not a number."),
        ("max_steps=1.5", "max_steps=1.5: 1.5 is not a whole number."),
        ("learning_rate=-1", "learning_rate=-1: give a number that is not below 0."),
        ("learning_rate=.nan", "learning_rate=nan: give a number that is not below 0."),
        ("per_device_train_batch_size=0", "per_device_train_batch_size=0: give a whole number above 0."),
        ("max_steps=0", "leave nothing to train"),
        ("num_train_epochs=0", "num_train_epochs=0: give a number above 0."),
        ("temperature_lr_multiplier=-2", "temperature_lr_multiplier=-2.0 has to be at least 0"),
        ("on_divergence=explode", "invalid choice: 'explode'"),
        ("streaming=maybe", "streaming: Truthy value expected"),
        ("learning_rate=", "learning_rate is empty"),
        ("n_layer", "'n_layer' is no setting: give key=value"),
        ("=3", "'=3' is no setting"),
        ("tokenizer=[", "is no YAML value"),
        ("tokenizer=!!python/object/apply:os.getcwd []", "is no YAML value"),
    ],
)
def test_what_can_not_be_is_named(settings, message, write):
    with pytest.raises(RecipeError) as error:
        read_with(write("notation: SM\nuse_cpu: true\n"), settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "name", "expected"),
    [
        ("eval_strategy=no", "eval_strategy", "no"),
        ("run_name=2024-01-01", "run_name", "2024-01-01"),
        ("run_name=1:30", "run_name", "1:30"),
        ("run_name=010", "run_name", "010"),
        ("learning_rate=1E-4", "learning_rate", 1e-4),
        ("report_to=[]", "report_to", []),
    ],
)
def test_texts_are_not_taken_for_something_else(setting, name, expected, write):
    assert getattr(read_with(write("notation: SM\nuse_cpu: true\n"), setting).training, name) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has to be a list of settings"),
        ("- notation", "has to be a list of settings"),
        ("1: 2", "has to be a list of settings"),
        ("notation: [", "is no YAML"),
        ("notation: SM\nnotation: SM+R", "'notation' is set twice"),
        ("notation: !!python/name:os.system", "is no YAML"),
        ("notation: SM\nmodel:\n  n_layer: 2", "no setting 'model'"),
    ],
)
def test_files_that_are_no_recipe_are_refused(text, message, write):
    with pytest.raises(RecipeError) as error:
        read_recipe(write(text), {})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(RecipeError, match=r"no recipe python-stdlib-smal; did you mean 'python-stdlib-small'\? Give"):
        read_recipe("python-stdlib-smal", {})


@given(
    st.floats(min_value=1e-12, max_value=1e3), st.integers(1, 10**6), st.text(st.characters(codec="ascii"), max_size=9)
)
def test_any_value_is_read_back(rate, steps, text):
    overrides = [
        f"learning_rate={rate!r}",
        f"max_steps={steps}",
        f"run_name={json.dumps(text or 'x')}",
        "use_cpu=true",
    ]
    recipe = read_with("python-stdlib-small", *overrides)
    assert recipe.training.learning_rate == rate
    assert recipe.training.max_steps == steps
    assert recipe.training.run_name == (text or "x")
    assert yaml.safe_load(json.dumps(recipe.settings)) is not None


def test_the_job_for_a_node_keeps_the_batch_of_its_recipe():
    """As a shell reads it, with eight processes in place of one."""
    script = RECIPES.parent / "accelerate" / "slurm.sh"
    program = 'torchrun() { printf \'%s\\n\' "$@"; }; which() { echo program; }; . "$1"'
    words = subprocess.check_output(["bash", "-c", program, "bash", script], text=True).split()
    processes, source, *settings = words[words.index("--nproc-per-node") + 1], *words[words.index("train") + 1 :]
    whole, job = (read_with(source, "use_cpu=true", *more).training for more in (["fp16=false"], settings))
    assert int(processes) * job.sequences_per_step == whole.sequences_per_step == 512
    assert job.bf16
    assert not job.fp16
