"""GPT-2 checkpoints to EntropyGPT and back, without a change to what they compute.

EntropyGPT keeps GPT-2's parameter names and layout, so between the two a name is mapped to itself. What differs is how
checkpoints are written: with or without the prefix of the base model, with constants of old versions, in the layout of
nanoGPT, or with LayerNorms that were made linear by an enormous epsilon.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.utils import GENERATION_CONFIG_NAME

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

from .assembly import assemble, inference_state
from .early_checks import ADAPTER_CONFIG, expanded
from .errors import ConversionError
from .weight_files import (
    WEIGHT_FILES,
    check_tensor_types,
    gather_tensors,
    read_json,
    read_weights,
    shorten_names,
    unpickle,
)


logger = logging.getLogger(__name__)

# Each head of GPT-2 and its twin here. The parameters of both have the same names.
TWINS = {
    GPT2LMHeadModel: EntropyGPTForCausalLM,
    GPT2Model: EntropyGPTModel,
    GPT2ForSequenceClassification: EntropyGPTForSequenceClassification,
    GPT2ForTokenClassification: EntropyGPTForTokenClassification,
    GPT2ForQuestionAnswering: EntropyGPTForQuestionAnswering,
}
HEAD_OF_PARAMETER = {
    "score.": EntropyGPTForSequenceClassification,
    "classifier.": EntropyGPTForTokenClassification,
    "qa_outputs.": EntropyGPTForQuestionAnswering,
    "lm_head.": EntropyGPTForCausalLM,
}
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
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
# What an import also reads: GPT-2's constants are refused by the configuration if they differ.
READ_FIELDS = SHARED_FIELDS | {*GPT2_CONSTANTS, *GPT2Config.attribute_map, "classifier_dropout"}
# Sizes by the names that a configuration and nanoGPT have for them.
NANOGPT_SIZES = {name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")} | {"n_positions": "block_size"}
NANOGPT_OPTIONS = frozenset({"bias", "dropout"})
# What DistributedDataParallel and torch.compile put before names, in whatever order.
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
# The exact GELU of nanoGPT, and the approximation by tanh that it had until 14 June 2023.
NANOGPT_ACTIVATIONS = (GELU, TANH_GELU) = ("gelu", "gelu_new")


@dataclass(frozen=True)
class Checkpoint:
    """
    A GPT-2, or an EntropyGPT, as it was read.

    Args:
        config (`dict`): The fields of its `config.json`, or what stands for them.
        tensors (`dict[str, torch.Tensor]`): Its weights by GPT-2's names, in GPT-2's layout.
        model_class (`type`): The class of this project that takes them.
        generation_config (`GenerationConfig`, *optional*): How it generates, if a file of its own says so.
    """

    config: dict
    tensors: dict[str, torch.Tensor]
    model_class: type[EntropyGPTPreTrainedModel]
    generation_config: GenerationConfig | None = None

    @property
    def is_gpt2(self) -> bool:
        """Whether it is still to be converted."""
        return self.config["model_type"] == GPT2Config.model_type


def load_gpt2(source: str | Path, activation: str | None = None) -> EntropyGPTPreTrainedModel:
    """
    Makes an EntropyGPT of a GPT-2 checkpoint: the same logits, and the head that the checkpoint has.

    Args:
        source (`str` or `Path`):
            A folder with `config.json` and weights (safetensors, in shards too, or an old `pytorch_model.bin`), a
            repository on the Hub, or a checkpoint file of nanoGPT (`.pt`).
        activation (`str`, *optional*):
            The activation function of a nanoGPT file, as of [`read_nanogpt`]. Any other checkpoint names its own.

    Raises:
        `ConversionError`: If it is no GPT-2, files are damaged, or parameters are unexpected, missing, there twice, of
            a wrong shape or dtype, or not finite.
    """
    return _build(_read(source, [GPT2Config.model_type], activation), str(source))


def load_language_model(source: str | Path, activation: str | None = None) -> EntropyGPTForCausalLM:
    """
    Loads what a conversion begins with: a GPT-2 of any kind that [`load_gpt2`] takes, or an EntropyGPT, as it is.

    Raises:
        `ConversionError`: As for [`load_gpt2`], and if it is no language model.
    """
    checkpoint = _read(source, [GPT2Config.model_type, EntropyGPTConfig.model_type], activation)
    if checkpoint.model_class is not EntropyGPTForCausalLM:
        saved_as = (checkpoint.config.get("architectures") or [checkpoint.model_class.__name__])[0]
        remedy = "Give the checkpoint with its language modelling head."
        if checkpoint.model_class is EntropyGPTModel:
            remedy += " If that is tied to the embeddings, load this one as GPT2LMHeadModel, and save it again."
        raise ConversionError(
            f"{source} is no language model: it was saved as {saved_as}, without a language modelling head. {remedy}"
        )
    return _build(checkpoint, str(source))


def from_gpt2(model: GPT2PreTrainedModel) -> EntropyGPTPreTrainedModel:
    """
    Makes an EntropyGPT of a GPT-2 in memory, with the same parameters (shared, not copied).

    Raises:
        `ConversionError`: As for [`load_gpt2`].
    """
    if type(model) not in TWINS:
        raise ConversionError(f"{type(model).__name__} can't be converted: {_known_classes(TWINS)}.")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    checkpoint = Checkpoint(model.config.to_dict(), tensors, TWINS[type(model)], _generation_config(model))
    converted = _build(checkpoint, type(model).__name__)
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
    tensors = {name: tensor.detach() for name, tensor in inference_state(model).items()}
    return assemble(twins[type(model)], gpt2_config, tensors, _generation_config(model)).train(model.training)


def read_nanogpt(path: Path, activation: str | None = None) -> Checkpoint:
    """
    Reads a checkpoint file of nanoGPT, whose linear maps are transposed and may lack biases. Nothing but tensors and
    plain values is unpickled.

    A file does not name its activation function: nanoGPT has the exact GELU since 14 June 2023, and had the
    approximation by tanh before (karpathy/nanoGPT#274).

    Args:
        path (`Path`): The file.
        activation (`str`, *optional*):
            `"gelu"` or `"gelu_new"`, the approximation. Without, the exact one, unless the file proves that it is
            older; a note is logged then.

    Raises:
        `ConversionError`: If it is no such file, or its arguments are not those of nanoGPT.
    """
    if path.suffix == ".safetensors":
        raise ConversionError(f"{path} holds weights alone. Give the folder that holds it and its config.json.")
    content = unpickle(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ConversionError(
            f"{path} is no checkpoint of nanoGPT: it has no 'model' and 'model_args'. Give that, a folder with a "
            "config.json, or a repository on the Hub."
        )
    sizes = content["model_args"]
    if not isinstance(sizes, dict) or not sizes.keys() >= {*NANOGPT_SIZES.values()}:
        raise ConversionError(
            f"model_args={sizes!r} in {path} lacks the sizes of a model: {', '.join(NANOGPT_SIZES.values())} "
            "have to be in it."
        )
    if unknown := sizes.keys() - {*NANOGPT_SIZES.values()} - NANOGPT_OPTIONS:
        named = ", ".join(f"{name}={sizes[name]!r}" for name in sorted(unknown, key=str))
        raise ConversionError(
            f"{path} is of a variant of nanoGPT: its model_args have {named}, which nanoGPT has not. What such a "
            "model computes is not known here."
        )
    named = check_tensor_types(content["model"], path).items()
    tensors = gather_tensors(((WRAPPERS.sub("", name), tensor) for name, tensor in named), path)
    for name in filter(LINEAR_WEIGHT.search, tensors):
        if tensors[name].ndim == 2:
            tensors[name] = tensors[name].mT.contiguous()
    config = {
        "model_type": GPT2Config.model_type,
        **{ours: sizes[theirs] for ours, theirs in NANOGPT_SIZES.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), sizes.get("dropout", 0.0)),
        "activation_function": activation or _find_activation(content, path),
        "tie_word_embeddings": not _has_own_head(tensors),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not sizes.get("bias", True):
        for name, tensor in list(tensors.items()):
            if LINEAR_WEIGHT.search(name) or NORM_WEIGHT.search(name):
                tensors[name.removesuffix("weight") + "bias"] = tensor.new_zeros(tensor.shape[-1:])
    return Checkpoint(config, tensors, EntropyGPTForCausalLM)


def _has_own_head(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a head differs from the embeddings, as nanoGPT's did until January 2023."""
    head, embedding = (tensors.get(name) for name in ("lm_head.weight", f"{PREFIX}wte.weight"))
    return head is not None and embedding is not None and not torch.equal(head, embedding)


def _find_activation(content: dict, path: Path) -> str:
    """The GELU of nanoGPT at the time of the file, as far as that can be known."""
    if (reason := _sign_of_age(content)) is None:
        return GELU
    logger.warning(
        "%s is older than June 2023 (%s), when nanoGPT approximated GELU by tanh: it is read with %s. If it has the "
        "exact GELU, convert it with --activation %s.",
        *(path, reason, TANH_GELU, GELU),
    )
    return TANH_GELU


def _sign_of_age(content: dict) -> str | None:
    """
    What proves that a file of nanoGPT is older than its exact GELU: `bias` in its arguments came in January 2023, and
    weight decay of the embeddings in May 2023.
    """
    sizes = content["model_args"]
    if "bias" not in sizes:
        return "its model_args have no bias"
    try:
        decayed = len(content["optimizer"]["param_groups"][0]["params"])
    except (KeyError, IndexError, TypeError):
        return None
    return "its optimizer does not decay the embeddings" if decayed == 4 * sizes["n_layer"] else None


def _read(source: str | Path, model_types: list[str], activation: str | None) -> Checkpoint:
    if activation is not None and activation not in NANOGPT_ACTIVATIONS:
        raise ConversionError(f"activation={activation!r}: give {' or '.join(NANOGPT_ACTIVATIONS)}.")
    source = expanded(source)
    if Path(source).is_file():
        return read_nanogpt(Path(source), activation)
    folder = _find_folder(source)
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
            raise ConversionError(
                f"{folder} holds an adapter of {base or 'a model'}, not a model. Give the model that it was merged "
                "into: in the folder of a run, that is the folder model."
            )
        raise ConversionError(f"{folder} has no config.json, so it is no model that transformers saved.")
    if activation is not None:
        raise ConversionError(
            f"--activation {activation} has no effect: the config.json of {source} names its activation. Leave it out."
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") not in model_types:
        allowed = " or ".join(map(repr, model_types))
        raise ConversionError(f"{folder} holds a model of type {config.get('model_type')!r}, not {allowed}.")
    tensors = read_weights(folder)
    model_class, generation_config = _find_class(config, tensors), None
    if model_class.can_generate() and (folder / GENERATION_CONFIG_NAME).is_file():
        generation_config = _read_generation_config(folder)
    return Checkpoint(config, tensors, model_class, generation_config)


def _read_generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConversionError(
            f"{folder / GENERATION_CONFIG_NAME} can't be used: {error}. Mend or remove it."
        ) from error


def _find_folder(source: str | Path) -> Path:
    """The folder itself, or what the Hub has under that name."""
    if Path(source).is_dir():
        return Path(source)
    try:
        for name in WEIGHT_FILES:  # with shards and index
            patterns = ["config.json", GENERATION_CONFIG_NAME, f"{name.replace('.', '*.')}*"]
            folder = Path(snapshot_download(str(source), allow_patterns=patterns))
            if list(folder.glob(f"{name}*")):
                break
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConversionError(
            f"{source} is neither a file or folder here nor a repository that the Hub hands out: {error}"
        ) from error
    return folder


def _find_class(config: dict, tensors: Iterable[str]) -> type[EntropyGPTPreTrainedModel]:
    """The class for what the config names, or without one, for the names of the parameters."""
    is_gpt2 = config["model_type"] == GPT2Config.model_type
    known = {theirs if is_gpt2 else ours: ours for theirs, ours in TWINS.items()}
    if named := config.get("architectures"):
        for model_class, ours in known.items():
            if named == [model_class.__name__]:
                return ours
        raise ConversionError(
            f"Its config has architectures={named!r}, which can't be converted: {_known_classes(known)}."
        )
    for prefix, model_class in HEAD_OF_PARAMETER.items():
        if any(name.startswith(prefix) for name in tensors):
            return model_class
    return EntropyGPTForCausalLM


def _generation_config(model: PreTrainedModel) -> GenerationConfig | None:
    return model.generation_config if model.can_generate() else None


def _known_classes(known: Iterable[type]) -> str:
    return f"those of {', '.join(model_class.__name__ for model_class in known)} can"


def _build(checkpoint: Checkpoint, source: str) -> EntropyGPTPreTrainedModel:
    names = [name for name in checkpoint.tensors if CROSS_ATTENTION.search(name)]
    if names:
        raise ConversionError(f"{source} has cross-attention ({shorten_names(names)}), which an EntropyGPT has not.")
    model_class, config = checkpoint.model_class, _make_config(checkpoint, source)
    tensors = _with_our_names(checkpoint.tensors, model_class, source)
    if checkpoint.is_gpt2 and config.layer_norm_epsilon >= EPSILON_OF_STATIC_NORM:
        tensors = _with_static_norms(tensors, config.layer_norm_epsilon)
        config.layer_norm_epsilon = EntropyGPTConfig.layer_norm_epsilon
        config.normalization = config.final_normalization = "static"
    is_tied = model_class is EntropyGPTForCausalLM and config.tie_word_embeddings
    if is_tied and "transformer.wte.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])
    _check_tensors(tensors, model_class, config, source)
    if is_tied and not torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"]):
        raise ConversionError(
            f"The head of {source} differs from its token embeddings, while its config ties them: set "
            "tie_word_embeddings to false in its config.json if the head is to be kept, or remove lm_head.weight."
        )
    return assemble(model_class, config, tensors, checkpoint.generation_config).eval()


def _make_config(checkpoint: Checkpoint, source: str) -> EntropyGPTConfig:
    known = checkpoint.config
    if checkpoint.is_gpt2:
        known = {name: value for name, value in known.items() if name in READ_FIELDS}
        if known.get("activation_function") == "linear":
            known["activation_function"] = "identity"
    try:
        return EntropyGPTConfig.from_dict(known)
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        reason = error.__cause__ or error
        raise ConversionError(f"The configuration of {source} can't be converted: {reason}") from error


def _with_our_names(tensors: dict[str, torch.Tensor], model_class: type, source: str) -> dict[str, torch.Tensor]:
    """With the prefix of the base model, or as the base model without it and a head; and without constants."""

    def rename():
        for name, tensor in tensors.items():
            bare = name.removeprefix(PREFIX)
            is_head = bare.startswith(tuple(HEAD_OF_PARAMETER))
            if CONSTANT.search(name) or (model_class is EntropyGPTModel and bare.startswith("lm_head.")):
                continue
            yield bare if is_head or model_class is EntropyGPTModel else PREFIX + bare, tensor

    return gather_tensors(rename(), source)


def _with_static_norms(tensors: dict[str, torch.Tensor], epsilon: float) -> dict[str, torch.Tensor]:
    """(x - mean) / sqrt(variance + epsilon) * gain, in exact arithmetic: the variance is
    negligible compared with epsilon."""
    converted = {}
    for name, tensor in tensors.items():
        if NORM_WEIGHT.search(name):
            tensor = (tensor.double() / epsilon**0.5).to(tensor.dtype)
            converted[name.removesuffix("weight") + "standard_deviation"] = tensor.new_ones(())
        converted[name] = tensor
    return converted


def _check_tensors(tensors: dict[str, torch.Tensor], model_class: type, config: EntropyGPTConfig, source: str):
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"missing: {shorten_names(missing)}")
    if unexpected := tensors.keys() - expected.keys():
        problems.append(f"unexpected: {shorten_names(unexpected)}")
    common = sorted(expected.keys() & tensors.keys())
    shapes = {name: tuple(tensors[name].shape) for name in common}
    if wrong := [f"{name} {shapes[name]}, not {expected[name]}" for name in common if shapes[name] != expected[name]]:
        problems.append(f"of a wrong shape: {shorten_names(wrong)}")
    kinds = {name: tensors[name].dtype for name in common}
    if other := [f"{name} {kind}" for name, kind in kinds.items() if kind not in WEIGHT_DTYPES]:
        problems.append(f"of another dtype than {', '.join(map(str, WEIGHT_DTYPES))}: {shorten_names(other)}")
    if bad := [name for name in common if kinds[name] in WEIGHT_DTYPES and not tensors[name].isfinite().all()]:
        problems.append(f"not finite: {shorten_names(bad)}")
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
        f"attention_function={config.attention_function!r}": config.attention_function != "softmax",
        f"attention_temperature={config.attention_temperature!r}": config.attention_temperature != "none",
    }
    return [obstacle for obstacle, is_there in found.items() if is_there]
