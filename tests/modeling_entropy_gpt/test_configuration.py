"""The configuration: GPT-2 by default, and every mistake named with its remedy."""

import json
import math
import tempfile

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, GenerationConfig, GPT2Config, LlamaConfig

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM, configuration_entropy_gpt
from modeling_entropy_gpt.configuration_entropy_gpt import CODE_VERSION
from tests.architectures import ARCHITECTURES, make_config


def test_defaults_are_those_of_gpt2():
    ours, theirs = EntropyGPTConfig().to_dict(), GPT2Config().to_dict()
    names = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "use_cache"]
    names += ["resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range", "bos_token_id"]
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_saves_and_loads(notation, tmp_path):
    config = make_config(notation, num_labels=5)
    config.save_pretrained(tmp_path)
    assert EntropyGPTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert AutoConfig.from_pretrained(tmp_path).notation == notation


def test_canonical_names_stand_for_those_of_gpt2():
    config = EntropyGPTConfig(num_hidden_layers=3, hidden_size=48, num_attention_heads=4, max_position_embeddings=32)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (3, 48, 4, 32)
    assert EntropyGPTConfig.from_notation("SM+ScFFNi2", num_hidden_layers=3).pruned_ffn_layers == [1, 2]


def test_reads_the_config_of_a_gpt2_checkpoint():
    fields = {**GPT2Config(n_layer=3).to_dict(), "n_ctx": 1024, "torch_dtype": "float32"}
    fields.pop("model_type")
    assert EntropyGPTConfig(**fields).notation == "SM+LN+G"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_head": 5, "n_embd": 48}, ["n_head=5", "n_embd=48", "4"]),
        ({"n_layer": 0}, ["n_layer=0", "at least 1"]),
        ({"n_head": 0}, ["n_head=0", "at least 1"]),
        ({"num_attention_heads": 0}, ["n_head=0", "at least 1"]),
        ({"n_layer": True}, ["n_layer", "int", "True"]),
        ({"pruned_ffn_layers": [True]}, ["pruned_ffn_layers", "index 0"]),
        ({"resid_pdrop": True}, ["resid_pdrop", "float", "True"]),
        ({"code_version": -1}, ["code_version=-1", "whole number from 1"]),
        ({"code_version": 0}, ["code_version=0", "whole number from 1"]),
        ({"scale_attn_weights": False}, ["scale_attn_weights=False is not supported", "True"]),
        ({"n_inner": 0}, ["n_inner=0", "None"]),
        ({"attn_pdrop": 1.5}, ["attn_pdrop=1.5", "between 0 and 1"]),
        ({"ffn_type": "fused", "activation_function": "relu"}, ["fused", "'relu'", "activation_function='identity'"]),
        ({"activation_function": "gelu_neww"}, ["gelu_neww", "did you mean 'gelu_new'?", "learnable_leaky_relu"]),
        ({"activation_function": "qqqq"}, ["'qqqq' is unknown. Known are"]),
        ({"pruned_ffn_layers": [1, 12]}, ["[12]", "0 to 11"]),
        ({"pruned_ffn_layers": [1, 1]}, ["[1, 1]", "twice"]),
        ({"ffn_alpha_init": 0.0}, ["ffn_alpha_init=0", "alpha"]),
        ({"weight_normalization": "weight", "weight_normalization_targets": ["qk"]}, ["'qk'", "q, k, v, o, ffn"]),
        ({"weight_normalization": "weight"}, ["no targets", "weight_normalization_targets"]),
        ({"weight_normalization_targets": ["q"]}, ["no effect", "spectral"]),
        ({"weight_normalization": "weight", "weight_normalization_targets": ["q", "q"]}, ["twice"]),
        ({"temperature_init": 0.0}, ["temperature_init=0.0", "above 0"]),
        ({"entropy_tolerance": -0.1}, ["entropy_tolerance=-0.1", "at least 0"]),
        ({"entropy_threshold_init": 7}, ["entropy_threshold_init=7", "between 0 and 1"]),
        ({"layer_norm_epsilon": -1e-5}, ["layer_norm_epsilon=-1e-05", "at least 0"]),
        ({"initializer_range": -0.02}, ["initializer_range=-0.02", "at least 0"]),
        ({"temperature_init": math.nan}, ["temperature_init=nan", "finite"]),
        ({"entropy_coefficient": math.inf}, ["entropy_coefficient=inf", "finite"]),
        ({"entropy_coefficient": -1}, ["entropy_coefficient=-1", "at least 0"]),
        ({"normalization": "batchnorm"}, ["normalization", "batchnorm", "static"]),
        ({"entropy_penalty": "mean"}, ["entropy_penalty", "mean", "row_sum"]),
        ({"n_embd": "768"}, ["n_embd", "int", "str"]),
        ({"entropy_regularization": "yes"}, ["entropy_regularization", "bool"]),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(fields, words):
    with pytest.raises((StrictDataclassError, ValueError)) as error:
        EntropyGPTConfig(**fields)
    message = f"{error.value} {error.value.__cause__ or ''}"
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("entropy_regularisation", "entropy_regularization"),
        ("attention_temprature", "attention_temperature"),
        ("ffn_alpha_int", "ffn_alpha_init"),
        ("num_hidden_layer", "num_hidden_layers"),
        ("n_heads", "n_head"),
        ("n_layers", "n_layer"),
        ("dropout", "resid_pdrop, embd_pdrop and attn_pdrop"),
        ("attention_dropout", "attn_pdrop"),
        ("activation", "activation_function"),
        ("hidden_act", "activation_function"),
        ("intermediate_size", "n_inner"),
        ("layer_norm_eps", "layer_norm_epsilon"),
    ],
)
def test_misspelt_fields_are_refused_with_the_right_name(misspelt, meant):
    with pytest.raises(ValueError, match=f"{misspelt}.*{meant}"):
        EntropyGPTConfig(**{misspelt: 1})
    with pytest.raises(ValueError, match=f"{misspelt}.*{meant}"):
        EntropyGPTConfig.from_dict({}, **{misspelt: 1})


@pytest.mark.parametrize("name", ["sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id"])
def test_token_ids_of_transformers_are_no_misspelling(name):
    assert getattr(EntropyGPTConfig(**{name: 7}), name) == 7


@pytest.mark.parametrize("name", ["n_layers", "eot_token_id", "vocab_sizes", "dropout", "activation", "hidden_act"])
def test_a_name_that_is_mistaken_in_a_file_is_kept_and_warned_of(name, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(configuration_entropy_gpt.logger, "warning_once", said.append)
    config = EntropyGPTConfig(n_layer=3)
    setattr(config, name, 5)
    config.save_pretrained(tmp_path)
    for load in (EntropyGPTConfig.from_pretrained, AutoConfig.from_pretrained):
        loaded = load(tmp_path, n_head=6)
        assert (getattr(loaded, name), loaded.n_layer, loaded.n_head) == (5, 3, 6)
    assert getattr(EntropyGPTConfig.from_json_file(tmp_path / "config.json"), name) == 5
    (hint,) = EntropyGPTConfig._mistaken_names([name]).values()
    assert said == [f"The configuration that is loaded has {name!r}, which has no effect{hint}"] * 3
    with pytest.raises(ValueError, match=f"'{name}' is no field"):
        EntropyGPTConfig.from_pretrained(tmp_path, **{name: 4})


def spelt_otherwise(name, index, letter):
    """A name with one letter more, less or another, or two that changed places."""
    start, end = name[: index % len(name)], name[index % len(name) :]
    return st.sampled_from(
        [start + letter + end, start + end[1:], start + letter + end[1:], start + end[1::-1] + end[2:]]
    )


OWN_NAMES = sorted({*EntropyGPTConfig().to_dict(), *EntropyGPTConfig.attribute_map})
KNOWN_NAMES = {*OWN_NAMES, *GPT2Config().to_dict(), *GenerationConfig().to_dict(), *LlamaConfig().to_dict()}
KNOWN_NAMES = sorted(KNOWN_NAMES - {"model_type"})  # every class has its own
TOKENS = ("bos", "eos", "pad", "sep", "cls", "mask", "unk", "eot", "eod", "boi", "image", "decoder_start")
names = (
    st.sampled_from(KNOWN_NAMES)
    | st.sampled_from(TOKENS).map(lambda name: f"{name}_token_id")
    | st.sampled_from(sorted(configuration_entropy_gpt.FOREIGN_NAMES))
    | st.tuples(st.sampled_from(OWN_NAMES), st.integers(0, 30), st.sampled_from("aes_2")).flatmap(
        lambda parts: spelt_otherwise(*parts)
    )
)
scalars = st.none() | st.booleans() | st.integers(0, 12) | st.floats(0, 1) | st.sampled_from(["relu", "eager", ""])


def saved_and_loaded(config, name, value):
    """What comes back of an attribute, or the error that one of the steps ends with, and which step."""
    step = "setting"
    try:
        setattr(config, name, value)
        step = "saving"
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            step = "loading"
            return step, getattr(type(config).from_pretrained(folder), name)
    except Exception as error:  # whatever transformers raises
        return step, type(error)


# Saving says anew where the code of a registered class is, whatever stood there.
@given(names.filter(str.isidentifier).filter("auto_map".__ne__), scalars | st.lists(scalars, max_size=2))
def test_what_can_be_set_and_saved_can_be_loaded(name, value):
    """Where GPT-2's configuration can't do it either, the name is transformers' own."""
    step, result = saved_and_loaded(EntropyGPTConfig(), name, value)
    if step == "loading" and result != value:
        assert saved_and_loaded(GPT2Config(), name, value) == (step, result)


def test_overrides_at_loading_are_checked(tmp_path):
    make_config("EReg(SM(t)+ScFuFFN)").save_pretrained(tmp_path)
    for load in (EntropyGPTConfig.from_pretrained, AutoConfig.from_pretrained):
        assert load(tmp_path, entropy_coefficient=0.5, device_map="cpu").entropy_coefficient == 0.5
        with pytest.raises(StrictDataclassError, match="activation_function='identity'"):
            load(tmp_path, activation_function="gelu_new")
        with pytest.raises(ValueError, match=r"entropy_regularisation.*entropy_regularization"):
            load(tmp_path, entropy_regularisation=False)


def test_a_model_of_a_broken_combination_is_refused():
    config = make_config("SM+ScFuFFN")
    config.activation_function = "relu"
    with pytest.raises(StrictDataclassError, match="activation_function='identity'"):
        EntropyGPTForCausalLM(config)


def test_fields_of_other_tools_pass():
    assert EntropyGPTConfig(my_experiment="a", task_specific_params={}).my_experiment == "a"


def test_a_value_set_later_is_checked_too():
    config = EntropyGPTConfig()
    with pytest.raises((StrictDataclassError, ValueError)):
        config.normalization = "batchnorm"


def test_what_gpt2_computes_otherwise_is_not_saved(tmp_path):
    config = EntropyGPTConfig()
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(StrictDataclassError, match="scale_attn_by_inverse_layer_idx=True is not supported"):
        config.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="scale_attn_by_inverse_layer_idx=True is not supported"):
        EntropyGPTForCausalLM(config)


def test_a_broken_combination_is_not_saved(tmp_path):
    config = EntropyGPTConfig()
    config.ffn_type = "fused"
    with pytest.raises((StrictDataclassError, ValueError), match="identity"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("fields", [{"attention_function": "power4"}, {"log_sum_coefficient": 0.1}])
def test_what_older_code_would_compute_otherwise_is_saved_with_the_version_that_knows_it(tmp_path, fields):
    older = {"code_version": 1}
    assert EntropyGPTConfig.from_dict(older).code_version == 1
    assert EntropyGPTConfig.from_dict(older, **fields).code_version == 2
    config = EntropyGPTConfig(**older)
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["code_version"] == 2


def test_a_configuration_of_newer_code_says_so_first(tmp_path):
    """It may have values that this code does not know, which would be complained of otherwise."""
    EntropyGPTConfig(code_version=CODE_VERSION).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    newer = json.loads(path.read_text()) | {"code_version": CODE_VERSION + 1, "normalization": "unheard-of"}
    path.write_text(json.dumps(newer))
    with pytest.raises(ValueError, match=rf"code_version={CODE_VERSION + 1}: .* newer EntropyGPT"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="newer EntropyGPT"):
        EntropyGPTConfig(code_version=CODE_VERSION + 1)
    for version in (-1, 0, True, "1", None, 1.5):
        with pytest.raises(ValueError, match=rf"code_version={version!r} has to be a whole number from 1"):
            EntropyGPTConfig.from_dict({"code_version": version})
