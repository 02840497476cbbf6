"""The notation of architectures, in both directions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_entropy_gpt import EntropyGPTConfig
from tests.architectures import ARCHITECTURES, SIZES, TABLE_1


targets = st.lists(st.sampled_from(["q", "k", "v", "o", "ffn"]), unique=True, min_size=1)


@st.composite
def architectures(draw):
    """Every combination of architecture fields that is allowed."""
    ffn_type = draw(st.sampled_from(["mlp", "fused"]))
    activations = ["gelu_new", "relu", "identity", "leaky_relu", "learnable_leaky_relu", "silu"]
    weight_normalization = draw(st.sampled_from([None, "weight", "spectral"]))
    return {
        "normalization": draw(st.sampled_from(["layernorm", "static", "none"])),
        "activation_function": "identity" if ffn_type == "fused" else draw(st.sampled_from(activations)),
        "ffn_type": ffn_type,
        "ffn_residual_scaling": draw(st.booleans()),
        "pruned_ffn_layers": draw(st.lists(st.integers(0, 5), unique=True)),
        "attention_temperature": draw(st.sampled_from(["none", "head", "position"])),
        "entropy_regularization": draw(st.booleans()),
        "weight_normalization": weight_normalization,
        "weight_normalization_targets": [] if weight_normalization is None else draw(targets),
    }


@given(architectures())
def test_every_config_has_a_notation_that_reads_back_to_it(fields):
    config = EntropyGPTConfig(n_layer=6, **fields)
    again = EntropyGPTConfig.from_notation(config.notation, n_layer=6)
    for name, value in fields.items():
        expected = set(value) if isinstance(value, list) else value
        got = getattr(again, name)
        assert (set(got) if isinstance(got, list) else got) == expected, f"{name} in {config.notation}"


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_a_notation_reads_back_to_itself(notation):
    assert EntropyGPTConfig.from_notation(notation, **SIZES).notation == notation


@given(st.text(alphabet="0123456789,-+_ ١²３i[]", max_size=8))
def test_a_pruning_is_numbers_in_ascii_digits_each_written_in_one_way(text):
    """What is read is what is written: nothing is dropped, repeated or spelt otherwise."""
    compact = "".join(text.split())
    try:
        config = EntropyGPTConfig.from_notation(f"SM+FFN{text}", n_layer=6)
    except ValueError:
        return
    layers = config.pruned_ffn_layers
    listed = f"i[{','.join(map(str, layers))}]"
    assert compact in {"", "i0"} if not layers else sorted(compact) == sorted(listed) or compact == f"i{len(layers)}"


@given(st.permutations(["LN", "R", "ScFFNi2", "WN(QK+FFN)"]), st.booleans())
def test_order_and_white_space_do_not_matter(tokens, regularized):
    text = " + ".join(["SM(t)", *tokens])
    text = f"EReg( {text} )" if regularized else text
    expected = "SM(t)+LN+R+ScFFNi2+WN(QK+FFN)"
    assert EntropyGPTConfig.from_notation(text).notation == (f"EReg({expected})" if regularized else expected)


# Whole tokens, their parts, and numbers that int() takes and the grammar does not, or that it takes too long for.
tokens = "SM SM(t) EReg( ) + LN StaticLN G Act( relu Sc Fu FFN WN( SN( QK QKVO ſ ﬀ"
numbers = "i [ ] , 0 1 2 01 -1 +1 1_0 ١ ² ３"
pieces = st.sampled_from([*tokens.split(), *numbers.split(), " ", "9" * 5000])


@given(st.text(alphabet="SMLNGRtEeg()+ScFuFFNi0123[],WQKVO ", max_size=30) | st.lists(pieces).map("".join))
def test_any_text_is_read_or_refused_with_a_value_error(text):
    try:
        config = EntropyGPTConfig.from_notation(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert EntropyGPTConfig.from_notation(config.notation).notation == config.notation


def test_table_1_selects_what_the_paper_says():
    configs = {notation: EntropyGPTConfig.from_notation(notation) for notation in TABLE_1}
    assert EntropyGPTConfig().notation == "SM+LN+G"
    assert [c.normalization for c in configs.values()] == ["layernorm"] * 3 + ["none"] * 7
    assert [c.activation_function for c in configs.values()] == [
        *("gelu_new", "relu", "identity", "gelu_new", "relu"),
        *["identity"] * 5,
    ]
    assert [n for n, c in configs.items() if c.ffn_type == "fused"] == list(TABLE_1[7:])
    assert [n for n, c in configs.items() if c.ffn_residual_scaling] == list(TABLE_1[6:])
    assert [n for n, c in configs.items() if c.attention_temperature == "position"] == list(TABLE_1[8:])
    assert [n for n, c in configs.items() if c.entropy_regularization] == list(TABLE_1[9:])
    assert {c.final_normalization for c in configs.values()} == {"layernorm"}


def test_aero_prunes_the_deepest_layers():
    assert EntropyGPTConfig.from_notation("SM+ScFuFFNi6").pruned_ffn_layers == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("targets", ["QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN"])
@pytest.mark.parametrize(("token", "kind"), [("WN", "weight"), ("SN", "spectral")])
def test_static_weight_normalization(token, kind, targets):
    config = EntropyGPTConfig.from_notation(f"SM+{token}({targets})")
    assert config.weight_normalization == kind
    assert "".join(config.weight_normalization_targets).replace("ffn", "+ffn").strip("+").upper() == targets


@pytest.mark.parametrize(
    ("notation", "hint"),
    [
        ("SM+LM+G", "'LN'"),
        ("SM+ScFuFNN", "'ScFuFFN'"),
        ("SM+GG", "'G'"),
        ("SM+WN(KQ)", "QKVO"),
        ("LN+G", "SM"),
        ("SM+G+R", "twice"),
        ("SM+ScFFNi13", "deepest 13"),
        ("SM+FFNi[,]", "Unknown pruning 'i[,]'"),
        ("SM+FFNi[1,]", "Unknown pruning 'i[1,]'"),
        ("SM+FFNi[]", "Unknown pruning 'i[]'"),
        ("SM+FFNi", "Unknown pruning 'i'"),
        ("SM+FFNi01", "without leading zeros, such as FFNi6"),
        ("SM+FFNi[0,01]", "without leading zeros"),
        ("SM+FFNi٣", "in digits 0 to 9"),
        ("SM+FFNi[１]", "in digits 0 to 9"),
        ("SM+FFNi[2,2]", "lists a layer twice in 'i[2,2]'"),
        ("SM+FFNi[1,12]", "[12]"),
        ("EReg(SM", "SM"),
        ("", "SM"),
    ],
)
def test_mistakes_are_named_with_the_nearest_known_token(notation, hint):
    with pytest.raises(ValueError, match="notation") as error:
        EntropyGPTConfig.from_notation(notation)
    assert hint in str(error.value)


def test_a_keyword_that_contradicts_the_notation_is_refused():
    with pytest.raises(ValueError, match="activation_function"):
        EntropyGPTConfig.from_notation("SM+LN+G", activation_function="relu")


@pytest.mark.parametrize("n_layer", [True, "6", 6.0, None])
def test_a_number_of_layers_that_is_none_is_named(n_layer):
    with pytest.raises(
        ValueError, match=f"n_layer={n_layer!r}, given with the notation 'SM', has to be a whole number"
    ):
        EntropyGPTConfig.from_notation("SM", n_layer=n_layer)
