"""GPT-2 checkpoints to EntropyGPT and back, without a change to what they compute.

EntropyGPT keeps GPT-2's parameter names and layout, so between the two a name is mapped to itself. What differs is how
checkpoints are written: with or without the prefix of the base model, with constants of old versions, in the layout of
nanoGPT, or with LayerNorms that were made linear by an enormous epsilon.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
    PreTrainedConfig,
)
from transformers.activations import ACT2FN

from modeling_entropy_gpt import (
    EntropyGPTConfig,
    EntropyGPTForCausalLM,
    EntropyGPTForQuestionAnswering,
    EntropyGPTForSequenceClassification,
    EntropyGPTForTokenClassification,
    EntropyGPTModel,
    EntropyGPTPreTrainedModel,
)
from modeling_entropy_gpt.configuration_entropy_gpt import GPT2_CONSTANTS

from .assembly import assemble
from .errors import ConversionError


# Each head of GPT-2 and its twin here. The parameters of both have the same names.
TWINS = {
    GPT2LMHeadModel: EntropyGPTForCausalLM,
    GPT2Model: EntropyGPTModel,
    GPT2ForSequenceClassification: EntropyGPTForSequenceClassification,
    GPT2ForTokenClassification: EntropyGPTForTokenClassification,
    GPT2ForQuestionAnswering: EntropyGPTForQuestionAnswering,
}
HEAD_OF_PARAMETER = {
    "score.": GPT2ForSequenceClassification,
    "classifier.": GPT2ForTokenClassification,
    "qa_outputs.": GPT2ForQuestionAnswering,
    "lm_head.": GPT2LMHeadModel,
}
PREFIX = "transformer."
# Causal masks that old versions of transformers and nanoGPT saved with the weights.
CONSTANT = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")
CROSS_ATTENTION = re.compile(r"\.(crossattention|ln_cross_attn)\.")
# Linear maps, which nanoGPT keeps as (outputs, inputs) and GPT-2 as (inputs, outputs).
LINEAR_WEIGHT = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
# An epsilon beyond any row's variance: the LayerNorm is a static one in disguise (published LayerNorm-free GPT-2s).
EPSILON_OF_STATIC_NORM = 1e6
NORM_WEIGHT = re.compile(r"(ln_1|ln_2|ln_f)\.weight$")
# Fields that both configurations have, but for what belongs to a file rather than to a model.
SHARED_FIELDS = {f.name for f in fields(EntropyGPTConfig)} & {f.name for f in fields(GPT2Config)}
SHARED_FIELDS -= {"architectures", "transformers_version", "dtype"}
# What an import reads beside them: GPT-2's constants are refused by the configuration if they differ.
READ_FIELDS = SHARED_FIELDS | {*GPT2_CONSTANTS, "classifier_dropout"}
MOST_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """
    A GPT-2 as it was read.

    Args:
        config (`dict`): The fields of its `config.json`, or what stands for them.
        tensors (`dict[str, torch.Tensor]`): Its weights by GPT-2's names, in GPT-2's layout.
        model_class (`type`): The class of transformers that they belong to.
    """

    config: dict
    tensors: dict[str, torch.Tensor]
    model_class: type[GPT2PreTrainedModel]


def load_gpt2(source: str | Path) -> EntropyGPTPreTrainedModel:
    """
    Makes an EntropyGPT of a GPT-2 checkpoint: the same logits, and the head that the checkpoint has.

    Args:
        source (`str` or `Path`):
            A folder with `config.json` and weights (safetensors, in shards too, or an old `pytorch_model.bin`), a
            repository on the Hub, or a checkpoint file of nanoGPT (`.pt`).

    Raises:
        `ConversionError`: If it is no GPT-2, parameters are unexpected, missing, of a wrong shape or not finite.
    """
    checkpoint = read_nanogpt(Path(source)) if Path(source).is_file() else _read_folder(_find_folder(source))
    return _build(checkpoint, str(source))


def load_language_model(source: str | Path) -> EntropyGPTForCausalLM:
    """
    Loads what a conversion begins with: a GPT-2 of any kind that [`load_gpt2`] takes, or an EntropyGPT, as it is.

    Raises:
        `ConversionError`: As for [`load_gpt2`], and if it is no language model.
    """
    folder = None if Path(source).is_file() else _find_folder(source)
    if folder is not None and _read_config(folder).get("model_type") == EntropyGPTConfig.model_type:
        try:
            model = EntropyGPTForCausalLM.from_pretrained(folder).eval()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConversionError(f"{source} can't be loaded: {error}") from error
        _check_tensors(model.state_dict(), type(model), model.config, str(source))
    else:
        model = load_gpt2(source if folder is None else folder)
    if not isinstance(model, EntropyGPTForCausalLM):
        raise ConversionError(
            f"{source} is no language model (it is loaded as {type(model).__name__}), and what a conversion loses is "
            "measured by the language that a model predicts: give the checkpoint with its language modelling head."
        )
    return model


def from_gpt2(model: GPT2PreTrainedModel) -> EntropyGPTPreTrainedModel:
    """
    Makes an EntropyGPT of a GPT-2 in memory, with the same parameters (shared, not copied).

    Raises:
        `ConversionError`: As for [`load_gpt2`].
    """
    if type(model) not in TWINS:
        raise ConversionError(f"{type(model).__name__} can't be converted: {_known_classes()}.")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    converted = _build(Checkpoint(model.config.to_dict(), tensors, type(model)), type(model).__name__)
    return converted.train(model.training)


def to_gpt2(model: EntropyGPTPreTrainedModel) -> GPT2PreTrainedModel:
    """
    Makes a plain GPT-2 of an EntropyGPT that computes what a GPT-2 can, with the same parameters (shared, not copied).
    Entropy thresholds, which act in training alone, stay behind.

    Raises:
        `ConversionError`: If the architecture has what GPT-2 has not.
    """
    config = model.config
    if obstacles := _obstacles_to_gpt2(config):
        raise ConversionError(
            f"{config.notation} can't be written as a GPT-2, which has no {', no '.join(obstacles)}. Save it as it is."
        )
    twins = {ours: theirs for theirs, ours in TWINS.items()}
    activation = "linear" if config.activation_function == "identity" else config.activation_function
    shared = {name: getattr(config, name) for name in SHARED_FIELDS}
    gpt2_config = GPT2Config(**{**shared, "activation_function": activation})
    tensors = {name: t.detach() for name, t in model.state_dict().items() if not name.endswith("entropy_threshold")}
    return assemble(twins[type(model)], gpt2_config, tensors).train(model.training)


def read_nanogpt(path: Path) -> Checkpoint:
    """
    Reads a checkpoint file of nanoGPT, whose linear maps are transposed and may lack biases; its GELU is the exact
    one. Nothing but tensors and plain values is unpickled.

    Raises:
        `ConversionError`: If it is no such file.
    """
    content = _load_pickled_tensors(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ConversionError(
            f"{path} is no checkpoint of nanoGPT: it has no 'model' and 'model_args'. Give that, a folder with a "
            "config.json, or a repository on the Hub."
        )
    sizes = content["model_args"]
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in content["model"].items()}
    for name in filter(LINEAR_WEIGHT.search, tensors):
        tensors[name] = tensors[name].mT.contiguous()
    config = {
        **{name: sizes[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "n_positions": sizes["block_size"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), sizes.get("dropout", 0.0)),
        "activation_function": "gelu",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not sizes.get("bias", True):
        for name, tensor in list(tensors.items()):
            if LINEAR_WEIGHT.search(name) or NORM_WEIGHT.search(name):
                tensors[name.removesuffix("weight") + "bias"] = tensor.new_zeros(tensor.shape[-1])
    return Checkpoint(config, tensors, GPT2LMHeadModel)


def _find_folder(source: str | Path) -> Path:
    """The folder itself, or what the Hub has under that name."""
    if Path(source).is_dir():
        return Path(source)
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=patterns))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=["config.json", "pytorch_model*.bin"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConversionError(
            f"{source} is neither a file or folder here nor a repository that the Hub hands out: {error}"
        ) from error
    return folder


def _read_config(folder: Path) -> dict:
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} has no config.json, so it is no GPT-2 that transformers saved.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(folder)
    except OSError as error:
        raise ConversionError(f"{folder / 'config.json'} can't be read: {error}") from error
    return config


def _read_folder(folder: Path) -> Checkpoint:
    config = _read_config(folder)
    if config.get("model_type") != "gpt2":
        raise ConversionError(f"{folder} holds a model of type {config.get('model_type')!r}, and only 'gpt2' is read.")
    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        tensors.update(_load_tensors(file))
    return Checkpoint(config, tensors, _find_class(config, tensors))


def _weight_files(folder: Path) -> list[Path]:
    """All shards, safetensors where there are any."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise ConversionError(f"{folder} has no weights: neither model.safetensors (or shards) nor pytorch_model.bin.")


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix != ".safetensors":
        return _load_pickled_tensors(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ConversionError(f"{file} is damaged: {error}. Download or save it again.") from error


def _load_pickled_tensors(file: Path) -> dict:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes make it
        raise ConversionError(f"{file} can't be read as weights alone: {type(error).__name__}: {error}") from error


def _find_class(config: dict, tensors: Iterable[str]) -> type[GPT2PreTrainedModel]:
    """The class that the config names, or without one, that the names of the parameters tell."""
    by_name = {model_class.__name__: model_class for model_class in TWINS}
    if named := config.get("architectures"):
        if named[0] not in by_name:
            raise ConversionError(f"The checkpoint is a {named[0]}, which can't be converted: {_known_classes()}.")
        return by_name[named[0]]
    for prefix, model_class in HEAD_OF_PARAMETER.items():
        if any(name.startswith(prefix) for name in tensors):
            return model_class
    return GPT2LMHeadModel


def _known_classes() -> str:
    return f"those of {', '.join(model_class.__name__ for model_class in TWINS)} can"


def _build(checkpoint: Checkpoint, source: str) -> EntropyGPTPreTrainedModel:
    names = [name for name in checkpoint.tensors if CROSS_ATTENTION.search(name)]
    if names:
        raise ConversionError(f"{source} has cross-attention ({_shorten(names)}), which an EntropyGPT has not.")
    model_class = TWINS[checkpoint.model_class]
    tensors = _with_our_names(checkpoint.tensors, has_prefix=model_class is not EntropyGPTModel)
    known = {name: value for name, value in checkpoint.config.items() if name in READ_FIELDS}
    if checkpoint.config.get("layer_norm_epsilon", 0) >= EPSILON_OF_STATIC_NORM:
        tensors = _with_static_norms(tensors, known.pop("layer_norm_epsilon"))
        known.update(normalization="static", final_normalization="static")
    tensors = _with_head(tensors, known, model_class, source)
    try:
        config = EntropyGPTConfig(**known)
    except (StrictDataclassError, ValueError) as error:
        reason = error.__cause__ or error
        raise ConversionError(f"The configuration of {source} can't be converted: {reason}") from error
    _check_tensors(tensors, model_class, config, source)
    return assemble(model_class, config, tensors).eval()


def _with_our_names(tensors: dict[str, torch.Tensor], has_prefix: bool) -> dict[str, torch.Tensor]:
    """With the prefix of the base model, or without it, and without constants."""
    renamed = {}
    for name, tensor in tensors.items():
        if CONSTANT.search(name):
            continue
        bare = name.removeprefix(PREFIX)
        is_head = bare.startswith(tuple(HEAD_OF_PARAMETER))
        renamed[PREFIX + bare if has_prefix and not is_head else bare] = tensor
    return renamed


def _with_static_norms(tensors: dict[str, torch.Tensor], epsilon: float) -> dict[str, torch.Tensor]:
    """(x - mean) / sqrt(variance + epsilon) * gain, the variance being nothing beside epsilon, as true numbers."""
    converted = {}
    for name, tensor in tensors.items():
        if NORM_WEIGHT.search(name):
            tensor = (tensor.double() / epsilon**0.5).to(tensor.dtype)
            converted[name.removesuffix("weight") + "standard_deviation"] = tensor.new_ones(())
        converted[name] = tensor
    return converted


def _with_head(tensors, known: dict, model_class: type, source: str) -> dict[str, torch.Tensor]:
    """A language modelling head where it is tied, and the config's word on whether it is."""
    if model_class is EntropyGPTModel:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    embedding, head = tensors.get("transformer.wte.weight"), tensors.get("lm_head.weight")
    if model_class is not EntropyGPTForCausalLM or embedding is None:
        return tensors
    if not known.setdefault("tie_word_embeddings", True):
        return tensors
    if head is not None and not torch.equal(head, embedding):
        raise ConversionError(
            f"The head of {source} differs from its token embeddings, while its config ties them: set "
            "tie_word_embeddings to false in its config.json if the head is to be kept, or remove lm_head.weight."
        )
    return {**tensors, "lm_head.weight": embedding}


def _check_tensors(tensors: dict[str, torch.Tensor], model_class: type, config: EntropyGPTConfig, source: str):
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"missing: {_shorten(missing)}")
    if unexpected := tensors.keys() - expected.keys():
        problems.append(f"unexpected: {_shorten(unexpected)}")
    common = sorted(expected.keys() & tensors.keys())
    shapes = {name: tuple(tensors[name].shape) for name in common}
    if wrong := [f"{name} {shapes[name]}, not {expected[name]}" for name in common if shapes[name] != expected[name]]:
        problems.append(f"of a wrong shape: {_shorten(wrong)}")
    if bad := [name for name in common if not tensors[name].isfinite().all()]:
        problems.append(f"not finite: {_shorten(bad)}")
    if problems:
        raise ConversionError(f"The weights of {source} are not those of its config. {'; '.join(problems)}.")


def _obstacles_to_gpt2(config: EntropyGPTConfig) -> list[str]:
    found = {
        f"normalization={config.normalization!r}": config.normalization != "layernorm",
        f"final_normalization={config.final_normalization!r}": config.final_normalization != "layernorm",
        f"activation_function={config.activation_function!r}": config.activation_function not in {*ACT2FN, "identity"},
        f"ffn_type={config.ffn_type!r}": config.ffn_type != "mlp",
        f"pruned_ffn_layers={config.pruned_ffn_layers}": bool(config.pruned_ffn_layers),
        "head_bias": config.head_bias,
        "ffn_residual_scaling": config.ffn_residual_scaling,
        f"weight_normalization={config.weight_normalization!r}": config.weight_normalization is not None,
        f"attention_temperature={config.attention_temperature!r}": config.attention_temperature != "none",
    }
    return [obstacle for obstacle, is_there in found.items() if is_there]


def _shorten(names: Iterable[str]) -> str:
    names = sorted(names)
    rest = len(names) - MOST_NAMES_SHOWN
    return ", ".join(names[:MOST_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
