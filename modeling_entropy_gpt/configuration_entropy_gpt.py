# SPDX-License-Identifier: Apache-2.0
"""EntropyGPT configuration: GPT-2's fields, and one field for each departure from it."""

# The version check in `releases` stands before the imports that fail on an older release.
from .releases import TESTED  # noqa: F401


# isort: split

import difflib
import math
from collections.abc import Iterable
from dataclasses import field, fields
from typing import Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .notation import format_notation, parse_notation


logger = logging.get_logger(__name__)

# Higher whenever a configuration may say what the code before does not know.
CODE_VERSION = 2
# The first version that knows attention functions and shifts: older code would compute such a model as softmax.
SHIFTS_CODE_VERSION = 2

OWN_ACTIVATIONS = ("identity", "leaky_relu", "learnable_leaky_relu")
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout")
WEIGHT_NORMALIZATION_TARGETS = ("q", "k", "v", "o", "ffn")
AUTO_MAP = {
    "AutoConfig": "configuration_entropy_gpt.EntropyGPTConfig",
    "AutoModel": "modeling_entropy_gpt.EntropyGPTModel",
    "AutoModelForCausalLM": "modeling_entropy_gpt.EntropyGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_entropy_gpt.EntropyGPTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_entropy_gpt.EntropyGPTForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_entropy_gpt.EntropyGPTForQuestionAnswering",
}

# What transformers itself, or a GPT-2 config.json, hands to `__post_init__` in addition to the declared fields.
INHERITED_FIELDS = frozenset(
    {
        *PreTrainedConfig().to_dict(),
        "attn_implementation",
        "auto_map",
        "code_revision",
        "n_ctx",
        "num_labels",
        "torch_dtype",
    }
)
# Fields of GPT-2's configuration with which it computes something else, and the only values that are computed here.
GPT2_CONSTANTS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
# Token ids that transformers' tools set in addition to the declared ones, which are no misspelling of those.
TOKEN_IDS = frozenset({"sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id"})
# What other models call fields of this one.
FOREIGN_NAMES = {
    "dropout": "resid_pdrop, embd_pdrop and attn_pdrop",
    "hidden_dropout": "resid_pdrop",
    "hidden_dropout_prob": "resid_pdrop",
    "embedding_dropout": "embd_pdrop",
    "attention_dropout": "attn_pdrop",
    "attention_probs_dropout_prob": "attn_pdrop",
    "activation": "activation_function",
    "hidden_act": "activation_function",
    "hidden_activation": "activation_function",
    "intermediate_size": "n_inner",
    "ffn_dim": "n_inner",
    "d_model": "n_embd",
    "block_size": "n_positions",
    "context_length": "n_positions",
    "max_seq_len": "n_positions",
    "hidden_dim": "n_inner",
    "d_ff": "n_inner",
    "n_blocks": "n_layer",
    "num_blocks": "n_layer",
    "rms_norm_eps": "layer_norm_epsilon",
    "layer_norm_eps": "layer_norm_epsilon",
}


@strict
class EntropyGPTConfig(PreTrainedConfig):
    r"""
    Configuration of an EntropyGPT model. The defaults are GPT-2 (124M) exactly; every departure from it is opted into.
    The architectures are those of "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489), and
    [`~EntropyGPTConfig.from_notation`] makes a configuration from the paper's name of it.

    Args:
        vocab_size (`int`, *optional*, defaults to 50257): Number of tokens.
        n_positions (`int`, *optional*, defaults to 1024): Longest sequence, in tokens.
        n_embd (`int`, *optional*, defaults to 768): Width of the residual stream.
        n_layer (`int`, *optional*, defaults to 12): Number of blocks.
        n_head (`int`, *optional*, defaults to 12): Attention heads in a block; has to divide `n_embd`.
        n_inner (`int`, *optional*): Width inside the FFN. `None` is `4 * n_embd`.
        activation_function (`str`, *optional*, defaults to `"gelu_new"`):
            Any activation of transformers, or `"identity"`, `"leaky_relu"`, `"learnable_leaky_relu"` (one slope a
            layer).
        resid_pdrop (`float`, *optional*, defaults to 0.1): Dropout after attention and FFN.
        embd_pdrop (`float`, *optional*, defaults to 0.1): Dropout after the embeddings.
        attn_pdrop (`float`, *optional*, defaults to 0.1):
            Dropout on attention probabilities. Entropies are those of the probabilities before dropout.
        classifier_dropout (`float`, *optional*, defaults to 0.1): Dropout before the token classification head.
        layer_norm_epsilon (`float`, *optional*, defaults to 1e-5): Epsilon of the LayerNorms.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of initial weights.
        use_cache (`bool`, *optional*, defaults to `True`): Whether to return keys and values for decoding.
        bos_token_id (`int`, *optional*, defaults to 50256): Beginning of text.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 50256): End of text.
        pad_token_id (`int`, *optional*): Padding.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`): Whether the head is the token embedding.
        head_bias (`bool`, *optional*, defaults to `False`):
            Whether the language modelling head has a bias, into which a static final norm can be folded.
        normalization (`"layernorm"`, `"static"` or `"none"`, *optional*, defaults to `"layernorm"`):
            The norms in the blocks. `"static"` is LayerNorm with a constant in place of each row's standard deviation.
        final_normalization (as `normalization`, *optional*, defaults to `"layernorm"`):
            The norm before the head. The public normalisation-free code keeps it, and the paper does not count it.
        ffn_type (`"mlp"` or `"fused"`, *optional*, defaults to `"mlp"`):
            Two linear maps with the activation between them, or one square linear map.
        pruned_ffn_layers (`list[int]`, *optional*): Layers without an FFN.
        ffn_residual_scaling (`bool`, *optional*, defaults to `False`):
            Whether the FFN's residual sum is `beta * x + FFN(x) / alpha`, with learnable scalars in each layer.
        ffn_alpha_init (`float`, *optional*, defaults to 1.0): Initial alpha.
        ffn_beta_init (`float`, *optional*, defaults to 1.0): Initial beta.
        weight_normalization (`"weight"` or `"spectral"`, *optional*):
            Normalisation of the weights of `weight_normalization_targets`: each output feature's weights to length
            one, times a learnable gain; or each matrix divided by its largest singular value.
        weight_normalization_targets (`list[str]`, *optional*): Some of `"q"`, `"k"`, `"v"`, `"o"`, `"ffn"`.
        attention_function (`"softmax"`, `"power4"`, `"power2"` or `"clamped"`, *optional*, defaults to `"softmax"`):
            What attention weights are proportional to, as a function of a score less a learned shift of its head and
            query position: the exponential, which needs no shift; `relu(1 + x / 4) ** 4`; `relu(1 + x / 2) ** 2`; or
            the exponential of x clamped to -7.4 to 3. All but the first add a small floor to each row's weights, and
            do without its maximum in private.
        attention_shift_init (`float`, *optional*, defaults to 0.0): Initial shift of every head and position.
        attention_temperature (`"none"`, `"head"` or `"position"`, *optional*, defaults to `"none"`):
            Learnable temperature by which attention logits are divided: one a head, or one for each head and query
            position (the paper's).
        temperature_init (`float`, *optional*, defaults to 1.0):
            Initial temperature. The paper starts at 1e-2 on CodeParrot and 1e-1 on Languini.
        entropy_regularization (`bool`, *optional*, defaults to `False`):
            Whether the training loss contains the penalty on attention entropies (Algorithm 1).
        entropy_coefficient (`float`, *optional*, defaults to 0.16):
            Lambda, the weight of the penalty. On a mean 0.16 is what 1e-5 is on the sum over the rows of a batch of
            the paper, 128 sequences of 128 tokens: it goes with `entropy_penalty`.
        entropy_tolerance (`float`, *optional*, defaults to 0.2): Gamma, the margin as a part of the largest entropy.
        entropy_threshold_init (`float`, *optional*, defaults to 0.5):
            Initial theta of every head, as a part of the largest entropy.
        entropy_maximum (`"context"` or `"causal"`, *optional*, defaults to `"context"`):
            The largest entropy: log T (the paper), or log i for row i, which is what a causal mask allows.
        entropy_penalty (`"head_mean"`, `"row_mean"` or `"row_sum"`, *optional*, defaults to `"head_mean"`):
            What is squared and how it is reduced: a head's mean entropy (Algorithm 1); each row's, averaged; or each
            row's, summed over all parts of an optimiser step, on all ranks. The paper's public code sums over each
            part and averages over accumulation steps and ranks: its lambda of 1e-5 at 128 sequences x 4 steps is
            2.5e-6 here.
        log_sum_coefficient (`float`, *optional*, defaults to 0.0):
            Weight in the training loss of the mean of `(log sum exp(scores) - shift) ** 2` over all attention rows,
            which keeps scores where the attention function works. Above 0, softmax has shifts too.
        detect_divergence (`bool`, *optional*, defaults to `False`):
            Whether training stops at the first non-finite value with an error that names the layer.
        code_version (`int`, *optional*):
            Version of the code that the configuration was written for: at least 2 where there are shifts.

    Raises:
        `StrictDataclassError`: If a value has the wrong type, is not allowed, or does not go with another.

    Example:

    ```python
    >>> from modeling_entropy_gpt import EntropyGPTConfig

    >>> config = EntropyGPTConfig.from_notation("EReg(SM(t)+ScFuFFN)", n_layer=6, temperature_init=0.01)
    >>> config.ffn_type, config.normalization, config.notation
    ('fused', 'none', 'EReg(SM(t)+ScFuFFN)')
    ```
    """

    model_type = "entropy_gpt"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "attention_entropies",
        "visible_keys",
        "entropy_thresholds",
        "log_sum_deviations",
        "packed_sequences",
        "cross_entropy_loss",
        "entropy_loss",
        "log_sum_loss",
        "penalized_share",
    ]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    classifier_dropout: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    head_bias: bool = False

    normalization: Literal["layernorm", "static", "none"] = "layernorm"
    final_normalization: Literal["layernorm", "static", "none"] = "layernorm"
    ffn_type: Literal["mlp", "fused"] = "mlp"
    pruned_ffn_layers: list[int] = field(default_factory=list)
    ffn_residual_scaling: bool = False
    ffn_alpha_init: float | int = 1.0
    ffn_beta_init: float | int = 1.0
    weight_normalization: Literal["weight", "spectral"] | None = None
    weight_normalization_targets: list[str] = field(default_factory=list)
    attention_function: Literal["softmax", "power4", "power2", "clamped"] = "softmax"
    attention_shift_init: float | int = 0.0
    attention_temperature: Literal["none", "head", "position"] = "none"
    temperature_init: float | int = 1.0
    entropy_regularization: bool = False
    entropy_coefficient: float | int = 0.16
    entropy_tolerance: float | int = 0.2
    entropy_threshold_init: float | int = 0.5
    entropy_maximum: Literal["context", "causal"] = "context"
    entropy_penalty: Literal["head_mean", "row_mean", "row_sum"] = "head_mean"
    log_sum_coefficient: float | int = 0.0
    detect_divergence: bool = False
    code_version: int = CODE_VERSION

    def __post_init__(self, **kwargs):
        self._reject_mistaken_names(kwargs)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """
        As every configuration's; what is given in place of the file's values is checked too, as `from_pretrained`
        hands it on. A name of the file that looks like another one of a field stays an attribute, with a warning.

        Raises:
            `ValueError`: If a keyword looks like a field's name misspelt, or the file was written by newer code.
            `StrictDataclassError`: If a value is not allowed, or does not go with the rest.
        """
        _check_code_version(config_dict.get("code_version", CODE_VERSION))  # before values that only it knows
        cls._reject_mistaken_names(kwargs)
        mistaken = cls._mistaken_names(config_dict)
        known = {name: value for name, value in config_dict.items() if name not in mistaken}
        result = super().from_dict(known, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        for name, hint in mistaken.items():
            logger.warning_once(f"The configuration that is loaded has {name!r}, which has no effect{hint}")
            setattr(config, name, config_dict[name])
        config.validate()
        return result

    @classmethod
    def from_json_file(cls, json_file) -> "EntropyGPTConfig":
        """As [`from_dict`], from the path of a file."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def from_notation(cls, text: str, **sizes) -> "EntropyGPTConfig":
        """
        Makes the configuration of an architecture from the paper's name of it (Table 1).

        Args:
            text (`str`):
                The architecture: SM+LN+G, SM+LN+R, SM+LN, SM+G, SM+R, SM, SM+ScFFN, SM+ScFuFFN, SM(t)+ScFuFFN,
                EReg(SM(t)+ScFuFFN); with Pow4, Pow2 or ClSM in place of SM for another attention function; with a
                suffix i<k> on the FFN for the deepest k layers without one; with
                +WN(QK+FFN) or +SN(QK+FFN) for weight or spectral normalisation.
            sizes: Every other field, such as `n_layer`, `n_embd`, `vocab_size`, `temperature_init`.

        Raises:
            `ValueError`: If the notation is not understood, or a keyword sets what the notation already says.
        """
        n_layer = sizes.get("n_layer", sizes.get("num_hidden_layers", cls.n_layer))
        architecture = parse_notation(text, n_layer)
        if clashes := sorted(architecture.keys() & sizes.keys()):
            raise ValueError(f"{', '.join(clashes)} can't be given with the notation {text!r}, which sets it.")
        try:
            return cls(**architecture, **sizes)
        except StrictDataclassClassValidationError as error:
            raise ValueError(f"The notation {text!r} can't be had: {error.__cause__}") from error

    @property
    def notation(self) -> str:
        """The architecture in the paper's notation; `from_notation` reads it back. Sizes are no part of it."""
        return format_notation(self)

    @property
    def has_attention_shift(self) -> bool:
        """Whether each head and position has a learned shift of its scores."""
        return self.attention_function != "softmax" or self.log_sum_coefficient > 0

    @property
    def penalty(self) -> str | None:
        """The penalty on attention rows that the training loss contains and the field with it, in words."""
        if self.entropy_regularization:
            return "entropy penalty that entropy_regularization=True"
        if self.log_sum_coefficient:
            return f"penalty on log-sums that log_sum_coefficient={self.log_sum_coefficient}"
        return None

    @property
    def inner_size(self) -> int:
        """Width inside the FFN."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def validate_architecture(self):
        """Part of `@strict`-powered validation: ranges, and rules between fields."""
        super().validate_architecture()
        _check_code_version(self.code_version)
        if self.has_attention_shift:
            self.code_version = max(self.code_version, SHIFTS_CODE_VERSION)
        self._check_constants()
        self._check_numbers()
        self._check_sizes()
        self._check_ffn()
        self._check_weight_normalization()

    def _check_constants(self):
        for name, value in GPT2_CONSTANTS.items():
            if (given := getattr(self, name, value)) != value:
                raise ValueError(f"{name}={given} is not supported: EntropyGPT has GPT-2's default, {value}.")

    def _check_numbers(self):
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value} has to be a finite number.")
        at_least_zero = ("entropy_coefficient", "entropy_tolerance", "log_sum_coefficient")
        for name in ("layer_norm_epsilon", "initializer_range", *at_least_zero):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 0.")
        for name in (*DROPOUTS, "entropy_threshold_init"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be between 0 and 1.")
        if self.temperature_init <= 0:
            raise ValueError(f"temperature_init={self.temperature_init} has to be above 0: logits are divided by it.")

    def _check_sizes(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 1.")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"n_inner={self.n_inner} has to be at least 1, or None for 4 * n_embd.")
        if self.n_embd % self.n_head:
            divisors = [heads for heads in range(1, self.n_embd + 1) if self.n_embd % heads == 0]
            nearest = min(divisors, key=lambda heads: abs(heads - self.n_head))
            raise ValueError(
                f"n_head={self.n_head} does not divide n_embd={self.n_embd}; the nearest number of heads that does is "
                f"{nearest}."
            )

    def _check_ffn(self):
        if self.activation_function not in ACT2FN and self.activation_function not in OWN_ACTIVATIONS:
            names = sorted({*ACT2FN, *OWN_ACTIVATIONS})
            hint = _did_you_mean(self.activation_function, names) or "."
            raise ValueError(
                f"activation_function={self.activation_function!r} is unknown{hint} Known are {', '.join(names)}."
            )
        if self.ffn_type == "fused" and self.activation_function != "identity":
            raise ValueError(
                f"ffn_type='fused' is one linear map and has no place for activation_function="
                f"{self.activation_function!r}: set activation_function='identity', or ffn_type='mlp'."
            )
        outside = [layer for layer in self.pruned_ffn_layers if not 0 <= layer < self.n_layer]
        if outside:
            raise ValueError(
                f"pruned_ffn_layers names {outside}, but the layers are 0 to {self.n_layer - 1}: take these out, or "
                "raise n_layer."
            )
        if len(set(self.pruned_ffn_layers)) != len(self.pruned_ffn_layers):
            raise ValueError(f"pruned_ffn_layers={self.pruned_ffn_layers} names a layer twice.")
        if self.ffn_alpha_init == 0:
            raise ValueError("ffn_alpha_init=0 divides by zero: the FFN's output is multiplied by 1 / alpha.")

    def _check_weight_normalization(self):
        for target in self.weight_normalization_targets:
            if target not in WEIGHT_NORMALIZATION_TARGETS:
                raise ValueError(
                    f"weight_normalization_targets names {target!r}, which does not exist; the targets are "
                    f"{', '.join(WEIGHT_NORMALIZATION_TARGETS)}."
                )
        if len(set(self.weight_normalization_targets)) != len(self.weight_normalization_targets):
            raise ValueError(f"weight_normalization_targets={self.weight_normalization_targets} names a target twice.")
        if self.weight_normalization is not None and not self.weight_normalization_targets:
            raise ValueError(
                f"weight_normalization={self.weight_normalization!r} has no targets: set weight_normalization_targets "
                f"to some of {', '.join(WEIGHT_NORMALIZATION_TARGETS)}."
            )
        if self.weight_normalization is None and self.weight_normalization_targets:
            raise ValueError(
                f"weight_normalization_targets={self.weight_normalization_targets} has no effect without a "
                "weight_normalization: set it to 'weight' or 'spectral', or leave the targets out."
            )

    @classmethod
    def _mistaken_names(cls, names: Iterable[str]) -> dict[str, str]:
        """Those that look as if they were to be a field's, which they are not, each with what was meant."""
        own_names = [*(f.name for f in fields(EntropyGPTConfig)), *cls.attribute_map]
        hints = {
            name: f"; here it is {FOREIGN_NAMES[name]}." if name in FOREIGN_NAMES else _did_you_mean(name, own_names)
            for name in set(names) - INHERITED_FIELDS - TOKEN_IDS - {*own_names}
        }
        return {name: hint for name, hint in sorted(hints.items()) if hint}

    @classmethod
    def _reject_mistaken_names(cls, keywords: dict):
        """transformers stores unknown keywords silently, whatever they were to do."""
        for name, hint in cls._mistaken_names(keywords).items():
            raise ValueError(f"{name!r} is no field of {cls.__name__}{hint}")


def _check_code_version(version: int):
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"code_version={version!r} has to be a whole number from 1, or be left out.")
    if version > CODE_VERSION:
        raise ValueError(
            f"code_version={version}: the model was saved by a newer EntropyGPT than this code, which is of version "
            f"{CODE_VERSION}. Upgrade entropy-gpt; where it is not installed, trust_remote_code=True runs the model's "
            "own code."
        )


def _did_you_mean(name: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"` if a known name is near, else nothing."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


__all__ = ["EntropyGPTConfig"]
