"""Attention to one text: of every architecture and of any GPT-2, equal to a naive computation; and what is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2DoubleHeadsModel, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaModel

import entropy_gpt
from entropy_gpt.evaluation.measuring.text_diagnostics import diagnose_text
from entropy_gpt.training.tokenizer import train_tokenizer
from tests.architectures import ARCHITECTURES, make_model


TEXT = "def main(x):\n    return 日本 x"
SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 64}
FLAGS = {
    "plain": {},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "both": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "not scaled": {"scale_attn_weights": False},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def main(x):\n    return x\n"] * 3, 280)


def make_gpt2(model_class=GPT2LMHeadModel, **flags):
    torch.manual_seed(0)
    return model_class(GPT2Config(vocab_size=280, initializer_range=0.5, **SIZES, **flags))


def naive_entropies(model, input_ids):
    """From the outputs of the attention's own projection, row by row."""
    entropies, kept = [], []
    body = model.base_model
    for block in body.h:
        block.attn.c_attn.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
    body.eval()(input_ids)
    for index, projected in enumerate(kept):
        query, key, _ = projected.split(16, dim=-1)
        rows = []
        for head in range(2):
            q, k = query[:, head * 8 : head * 8 + 8], key[:, head * 8 : head * 8 + 8]
            scale = 8**-0.5 if model.config.scale_attn_weights else 1.0
            if model.config.scale_attn_by_inverse_layer_idx:
                scale /= index + 1
            logits = [(q[i] @ k[: i + 1].T) * scale for i in range(len(q))]
            rows.append([-(row.softmax(0) * row.log_softmax(0)).sum().item() for row in logits])
        entropies.append(rows)
    return torch.tensor(entropies)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_any_gpt2_of_transformers(flags, tokenizer):
    model = make_gpt2(**flags)
    diagnostics = diagnose_text(model, tokenizer, TEXT, weights=True)
    input_ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    torch.testing.assert_close(diagnostics.entropies, naive_entropies(model, input_ids), atol=1e-5, rtol=1e-4)
    assert diagnostics.weights.shape == (3, 2, *[input_ids.shape[1]] * 2)
    torch.testing.assert_close(diagnostics.weights.sum(-1), torch.ones(diagnostics.entropies.shape))
    torch.testing.assert_close(torch.special.entr(diagnostics.weights).sum(-1), diagnostics.entropies)


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_every_architecture_and_its_own_entropies(notation, tokenizer):
    model = make_model(notation, vocab_size=280).train()
    model.config._attn_implementation = "sdpa"
    before = copy.deepcopy(model.state_dict())
    diagnostics = diagnose_text(model, tokenizer, TEXT)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert diagnostics.weights is None
    input_ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        outputs = model.eval()(input_ids, output_entropies=True)
    torch.testing.assert_close(diagnostics.entropies, torch.cat(outputs.attention_entropies), atol=1e-5, rtol=1e-4)
    assert (diagnostics.entropies <= diagnostics.uniform + 1e-5).all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT
def test_heads_and_wrappers_do_not_matter(tokenizer):
    body = make_gpt2(GPT2Model)
    expected = diagnose_text(body, tokenizer, TEXT).entropies
    for model in (GPT2LMHeadModel(body.config), GPT2DoubleHeadsModel(body.config)):
        model.transformer = body
        torch.testing.assert_close(diagnose_text(model, tokenizer, TEXT).entropies, expected)
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    torch.testing.assert_close(diagnose_text(adapted, tokenizer, TEXT).entropies, expected)


def test_half_precision(tokenizer):
    model = make_gpt2()
    expected = diagnose_text(model, tokenizer, TEXT).entropies
    torch.testing.assert_close(
        diagnose_text(model.bfloat16(), tokenizer, TEXT).entropies, expected, atol=0.1, rtol=0.1
    )


def test_a_folder_has_model_and_tokenizer(tokenizer, tmp_path, capfd):
    model = make_gpt2(scale_attn_by_inverse_layer_idx=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    diagnostics = entropy_gpt.diagnose_text(tmp_path, None, TEXT)
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(diagnostics.entropies, diagnose_text(model, tokenizer, TEXT).entropies)
    assert diagnose_text(str(tmp_path), tmp_path, TEXT).tokens == diagnostics.tokens


def test_tokens_are_readable(tokenizer):
    tokens = diagnose_text(make_gpt2(), tokenizer, " a 日 \ufffd<|endoftext|>").tokens
    parts = [token for token in tokens if "日" in token]
    assert [part.strip() for part in parts] == ["日[1/3]", "日[2/3]", "日[3/3]"]
    assert tokens[-1] == "<|endoftext|>"
    assert "".join(token for token in tokens if token not in parts).startswith(" a ")


def test_the_most_focused_head(tokenizer):
    diagnostics = diagnose_text(make_gpt2(), tokenizer, TEXT)
    layer, head = diagnostics.most_focused_head
    assert diagnostics.entropies[layer, head].mean() == diagnostics.entropies.mean(-1).min()


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "The text has no tokens"), ("x" * 500, r"The text has \d+ tokens, and the model sees 64")],
)
def test_texts_without_an_answer(text, message, tokenizer):
    with pytest.raises(entropy_gpt.UserError, match=message):
        diagnose_text(make_gpt2(), tokenizer, text)


def test_what_is_no_gpt2(tokenizer, tmp_path):
    llama = LlamaModel(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(entropy_gpt.UserError, match="LlamaModel is no GPT-2"):
        diagnose_text(llama, tokenizer, TEXT)
    with pytest.raises(entropy_gpt.UserError, match="can't be loaded"):
        diagnose_text(tmp_path, tokenizer, TEXT)
    with pytest.raises(entropy_gpt.UserError, match="give its tokenizer too"):
        diagnose_text(make_gpt2(), None, TEXT)
    small = GPT2Model(GPT2Config(vocab_size=10, **SIZES))
    with pytest.raises(entropy_gpt.UserError, match=r"makes a token .* the model knows 0 to 9"):
        diagnose_text(small, tokenizer, TEXT)
