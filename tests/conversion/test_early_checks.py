"""What is found wrong with names and notations before torch and transformers are imported."""

import pytest
from huggingface_hub import constants

from entropy_gpt.conversion.early_checks import check_model, check_notation, check_path, check_place
from entropy_gpt.conversion.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    for folder in ("runs/baseline/model", "runs/tuned/adapter", "runs/tuned/model", "plain", "adapter_alone"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("runs/baseline/model/config.json", "runs/tuned/model/config.json", "recipe.yaml", "my_texts.txt"):
        (tmp_path / file).touch()
    for folder in ("runs/tuned/adapter", "adapter_alone"):
        (tmp_path / folder / "adapter_config.json").touch()
    (tmp_path / "runs/tuned/adapter/adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("runs/baseline", "runs/baseline holds no config.json; did you mean runs/baseline/model?"),
        ("runs/basline", "There is no runs/basline; did you mean runs/baseline/model?"),
        ("runs/basline/modle", "There is no runs/basline/modle; did you mean runs/baseline/model?"),
        ("./nowhere", "There is no ./nowhere. Check the path."),
        ("/no/where", "There is no /no/where. Check the path."),
        ("plain", "plain holds no config.json; give the folder of a model."),
        (
            "runs/tuned/adapter",
            "runs/tuned/adapter holds an adapter of gpt2, not a model; did you mean runs/tuned/model?",
        ),
        ("adapter_alone", "adapter_alone holds an adapter, not a model; give the folder of a model."),
    ],
)
def test_a_wrong_folder_of_a_model_is_refused_with_the_nearest_one(given, message, here):
    with pytest.raises(UserError) as refused:
        check_model(given)
    assert str(refused.value) == message


@pytest.mark.parametrize("given", ["runs/baseline/model", "gpt2", "openai-community/gpt2", "pln", "recipe.yaml"])
def test_models_and_what_may_be_on_the_hub_are_let_through(given, here):
    check_model(given)


@pytest.mark.parametrize("folder", ["my-orgs/model-v1", "my-org/model-v2"])
def test_a_repository_is_not_refused_for_a_folder_of_nearly_its_name(folder, here, monkeypatch):
    (here / folder).mkdir(parents=True)
    (here / "cache" / "models--my-org--model-v1").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    check_model("my-org/model-v1")
    check_place("my-org/model-v1")


def test_files_are_suggested_by_their_names(here):
    with pytest.raises(UserError, match=r"There is no my_text\.txt; did you mean my_texts\.txt\?"):
        check_place("my_text.txt")
    with pytest.raises(UserError, match=r"There is no recipe\.yml; did you mean recipe\.yaml\?"):
        check_path(here.relative_to(here) / "recipe.yml")
    with pytest.raises(UserError, match=r"There is no runs/basline; did you mean runs/baseline\?"):
        check_path(here.relative_to(here) / "runs/basline")
    check_place("python-stdlib")


def test_a_notation_is_refused_with_the_nearest_token():
    check_notation("EReg(SM(t)+ScFuFFNi3)")
    with pytest.raises(UserError, match="the nearest known one is 'ScFuFFN'"):
        check_notation("SM+ScFuFN")
