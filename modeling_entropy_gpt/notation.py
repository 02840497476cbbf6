# SPDX-License-Identifier: Apache-2.0
"""The paper's notation of architectures (arXiv 2501.03489, Table 1), read and written.

A notation names what is left of a GPT-2 block: `SM+LN+G` is GPT-2 itself (softmax, LayerNorm, GELU), and
`EReg(SM(t)+ScFuFFN)` is the paper's proposal. The grammar, with what each token selects:

    notation      := "EReg(" architecture ")" | architecture         entropy_regularization
    architecture  := attention ("+" token)*
    attention     := function ["(t)" | "(t_h)"]                      attention_temperature: position, head (or none)
    function      := "SM" | "Pow4" | "Pow2" | "ClSM"                 attention_function: softmax, power4, power2,
                                                                     clamped
    token         := "LN" | "StaticLN"                               normalization (absent: none)
                   | "G" | "R" | "LeakyR" | "LearnableLeakyR" | "Act(" name ")"
                                                                     activation_function (absent: identity)
                   | ["Sc"] ["Fu"] "FFN" [pruning]                   ffn_residual_scaling, ffn_type
                   | "WN(" targets ")" | "SN(" targets ")"           weight_normalization
    pruning       := "i" k | "i[" k ("," k)* "]"                     pruned_ffn_layers: the deepest k, or those listed
    k             := "0" | one of "1" to "9", then any of "0" to "9"
    targets       := letters of "QKVO", in that order, and "FFN", joined by "+", such as "QK+FFN"

The paper itself uses everything but `Pow4`, `Pow2`, `ClSM`, `(t_h)`, `StaticLN`, `LeakyR`, `LearnableLeakyR`,
`Act(...)`, `FuFFN` and listed layers; these are there so that every configuration of this package has a notation.
`final_normalization`, the sizes, and numeric settings are no part of it.
"""

import difflib
import re


NORMALIZATION_TOKENS = {"LN": "layernorm", "StaticLN": "static"}
ACTIVATION_TOKENS = {"G": "gelu_new", "R": "relu", "LeakyR": "leaky_relu", "LearnableLeakyR": "learnable_leaky_relu"}
ATTENTION_TOKENS = {"SM": "softmax", "Pow4": "power4", "Pow2": "power2", "ClSM": "clamped"}
TEMPERATURE_TOKENS = {"": "none", "(t)": "position", "(t_h)": "head"}
WEIGHT_NORMALIZATION_TOKENS = {"WN": "weight", "SN": "spectral"}
FFN_TOKENS = ("FFN", "ScFFN", "FuFFN", "ScFuFFN")
EXAMPLE = "EReg(SM(t)+ScFuFFN)"

_ATTENTION_PATTERN = re.compile(r"(\w+)(\(.*\))?")
_FFN_PATTERN = re.compile(r"(Sc)?(Fu)?FFN(i.*)?")
# With no more digits than a number of layers has, so that it can be read at all.
_NUMBER = "(?:0|[1-9][0-9]{0,8})"
_PRUNING_PATTERN = re.compile(rf"i(?:({_NUMBER})|\[({_NUMBER}(?:,{_NUMBER})*)\])")
_ACTIVATION_PATTERN = re.compile(r"Act\((\w+)\)")
_WEIGHT_NORMALIZATION_PATTERN = re.compile(r"(WN|SN)\((.*)\)")
_TARGETS_PATTERN = re.compile(r"(?P<attention>Q?K?V?O?)(?P<plus>\+?)(?P<ffn>FFN)?")


def parse_notation(text: str, n_layer: int) -> dict:
    """
    Reads a notation into the fields of [`EntropyGPTConfig`] that it determines.

    Args:
        text (`str`): A notation, such as `"SM+ScFuFFNi6"`. White space is ignored.
        n_layer (`int`): Number of layers, to which the pruning of the deepest `k` refers.

    Returns:
        `dict`: One value for each field that a notation determines.

    Raises:
        `ValueError`: If a token is unknown (the message names the nearest known one) or given twice, or the model
            has fewer layers than it names.
    """
    if not isinstance(n_layer, int) or isinstance(n_layer, bool):
        raise ValueError(f"n_layer={n_layer!r}, given with the notation {text!r}, has to be a whole number.")
    compact = re.sub(r"\s+", "", text)
    regularized = compact.startswith("EReg(") and compact.endswith(")")
    tokens = _split_outside_brackets(compact[len("EReg(") : -1] if regularized else compact)

    fields = {
        **_parse_attention(tokens[0], text),
        "entropy_regularization": regularized,
        "normalization": "none",
        "activation_function": "identity",
        "ffn_type": "mlp",
        "ffn_residual_scaling": False,
        "pruned_ffn_layers": [],
        "weight_normalization": None,
        "weight_normalization_targets": [],
    }
    seen: set[str] = set()
    for token in tokens[1:]:
        subject, values = _parse_token(token, text, n_layer)
        if subject in seen:
            raise ValueError(f"The notation {text!r} says twice what its {subject} is, again with {token!r}.")
        seen.add(subject)
        fields.update(values)
    return fields


def format_notation(config) -> str:
    """Writes the notation of an [`EntropyGPTConfig`]; [`parse_notation`] reads it back to the same fields."""
    temperature = _key_of(TEMPERATURE_TOKENS, config.attention_temperature)
    tokens = [_key_of(ATTENTION_TOKENS, config.attention_function) + temperature]
    if config.normalization != "none":
        tokens.append(_key_of(NORMALIZATION_TOKENS, config.normalization))
    if config.activation_function in ACTIVATION_TOKENS.values():
        tokens.append(_key_of(ACTIVATION_TOKENS, config.activation_function))
    elif config.activation_function != "identity":
        tokens.append(f"Act({config.activation_function})")

    ffn = ("Sc" if config.ffn_residual_scaling else "") + ("Fu" if config.ffn_type == "fused" else "") + "FFN"
    pruning = _format_pruning(sorted(config.pruned_ffn_layers), config.n_layer)
    if ffn != "FFN" or pruning:
        tokens.append(ffn + pruning)

    if config.weight_normalization is not None:
        targets = config.weight_normalization_targets
        groups = ["".join(letter.upper() for letter in "qkvo" if letter in targets), "FFN" if "ffn" in targets else ""]
        token = _key_of(WEIGHT_NORMALIZATION_TOKENS, config.weight_normalization)
        tokens.append(f"{token}({'+'.join(filter(None, groups))})")

    architecture = "+".join(tokens)
    return f"EReg({architecture})" if config.entropy_regularization else architecture


def _parse_attention(token: str, text: str) -> dict:
    match = _ATTENTION_PATTERN.fullmatch(token)
    function, temperature = (match[1], match[2] or "") if match else (token, "")
    if function not in ATTENTION_TOKENS or temperature not in TEMPERATURE_TOKENS:
        raise ValueError(
            f"The notation {text!r} has to begin with its attention, one of SM, SM(t), SM(t_h), or with one of "
            f"{', '.join(ATTENTION_TOKENS)} in place of SM (or with 'EReg(' before it), not with {token!r}. "
            f"Example: {EXAMPLE}"
        )
    return {
        "attention_function": ATTENTION_TOKENS[function],
        "attention_temperature": TEMPERATURE_TOKENS[temperature],
    }


def _parse_token(token: str, text: str, n_layer: int) -> tuple[str, dict]:
    """Reads one token into what it is about and the fields it sets."""
    if token in NORMALIZATION_TOKENS:
        return "normalization", {"normalization": NORMALIZATION_TOKENS[token]}
    if token in ACTIVATION_TOKENS:
        return "activation function", {"activation_function": ACTIVATION_TOKENS[token]}
    if match := _ACTIVATION_PATTERN.fullmatch(token):
        return "activation function", {"activation_function": match[1]}
    if match := _FFN_PATTERN.fullmatch(token):
        scaled, fused, pruning = match.groups()
        return "FFN", {
            "ffn_type": "fused" if fused else "mlp",
            "ffn_residual_scaling": bool(scaled),
            "pruned_ffn_layers": _parse_pruning(pruning, text, n_layer) if pruning else [],
        }
    if match := _WEIGHT_NORMALIZATION_PATTERN.fullmatch(token):
        return "weight normalization", {
            "weight_normalization": WEIGHT_NORMALIZATION_TOKENS[match[1]],
            "weight_normalization_targets": _parse_targets(match[2], text),
        }
    known = [*NORMALIZATION_TOKENS, *ACTIVATION_TOKENS, *FFN_TOKENS, "WN(QK)", "SN(QK)", "Act(silu)"]
    by_lower_case = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(token.lower(), by_lower_case, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"Unknown token {token!r} in the notation {text!r}; the nearest known one is {by_lower_case[nearest]!r}. "
        f"Known are {', '.join(known)}, and FFN tokens followed by i<k> (the deepest k pruned) or i[<layer>,...]. "
        f"Example: {EXAMPLE}"
    )


def _parse_pruning(pruning: str, text: str, n_layer: int) -> list[int]:
    match = _PRUNING_PATTERN.fullmatch(pruning)
    if match is None:
        raise ValueError(
            f"Unknown pruning {pruning!r} in the notation {text!r}: i<k> for the deepest k layers, or i[<layer>,...] "
            "for those listed, in digits 0 to 9 without leading zeros, such as FFNi6 or FFNi[0,2]."
        )
    deepest, listed = match.groups()
    if deepest is not None:
        if int(deepest) > n_layer:
            raise ValueError(f"The notation {text!r} prunes the deepest {deepest} layers, but n_layer={n_layer}.")
        return list(range(n_layer - int(deepest), n_layer))
    layers = [int(layer) for layer in listed.split(",")]
    if len(set(layers)) != len(layers):
        raise ValueError(f"The notation {text!r} lists a layer twice in {pruning!r}.")
    return sorted(layers)


def _format_pruning(layers: list[int], n_layer: int) -> str:
    if not layers:
        return ""
    if layers == list(range(n_layer - len(layers), n_layer)):
        return f"i{len(layers)}"
    return f"i[{','.join(map(str, layers))}]"


def _parse_targets(targets: str, text: str) -> list[str]:
    match = _TARGETS_PATTERN.fullmatch(targets)
    if not targets or match is None or bool(match["plus"]) != bool(match["attention"] and match["ffn"]):
        raise ValueError(
            f"Unknown targets {targets!r} in the notation {text!r}: letters of 'QKVO' in that order, and 'FFN', "
            "joined by '+', such as QK, FFN, QK+FFN, QKV+FFN, QKVO+FFN."
        )
    return [letter.lower() for letter in match["attention"]] + (["ffn"] if match["ffn"] else [])


def _split_outside_brackets(text: str) -> list[str]:
    """Splits at each "+" that stands in no bracket."""
    tokens, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "+" and depth == 0:
            tokens.append("")
        else:
            tokens[-1] += character
    return tokens


def _key_of(mapping: dict, value: str) -> str:
    return next(key for key, candidate in mapping.items() if candidate == value)
