"""onnxruntime beside transformers' GPT-2: an exported GPT-2 gives its logits, and generates its tokens."""

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_gpt.conversion.gpt2_checkpoint import from_gpt2
from entropy_gpt.conversion.onnx_export import GRAPH, export_onnx, run_graph
from tests.architectures import make_tokens


NEW_TOKENS = 8


@torch.no_grad()
def make_gpt2() -> GPT2LMHeadModel:
    """With weights so large that its most likely tokens are no accident of rounding."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=48, n_head=4, n_positions=64, vocab_size=101, **special))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(4)
    return model.eval()


def generate(session: onnxruntime.InferenceSession, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Greedy tokens, as somebody would write it who has nothing but the graph."""
    states = {
        value.name: np.zeros((len(tokens), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    inputs, generated = tokens, []
    for _ in range(NEW_TOKENS):
        positions = (mask.cumsum(axis=1) - 1).clip(min=0)[:, -inputs.shape[1] :]
        logits, *present = session.run(
            None, {"input_ids": inputs, "attention_mask": mask, "position_ids": positions, **states}
        )
        states = dict(zip(states, present, strict=True))
        inputs = logits[:, -1:].argmax(axis=-1)
        generated.append(inputs)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    return np.concatenate(generated, axis=1)


@pytest.mark.slow
@torch.no_grad()
def test_gpt2(tmp_path, compared):
    gpt2 = make_gpt2()
    export_onnx(from_gpt2(gpt2), tmp_path, cached=True)
    session = onnxruntime.InferenceSession(tmp_path / GRAPH)

    sequences = [make_tokens(1, length) for length in (12, 5, 1)]
    expected = torch.cat([gpt2(tokens).logits[0] for tokens in sequences])
    difference = (run_graph(session, sequences, steps=4) - expected).abs().max().item()
    assert difference < 1e-5 * expected.abs().max()

    prompts = [torch.nn.functional.pad(tokens, (12 - tokens.shape[1], 0), value=1) for tokens in sequences]
    tokens = torch.cat(prompts)
    mask = (tokens != 1).long()
    found = generate(session, tokens.numpy(), mask.numpy())
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    answers = gpt2.generate(tokens, attention_mask=mask, eos_token_id=-1, **settings)[:, 12:]
    assert answers.tolist() == found.tolist()
    assert len({*answers.flatten().tolist()}) > 3
    compared(
        "onnxruntime",
        "an exported GPT-2's logits and greedy tokens, left-padded, with its cache",
        f"tokens equal, logits within {difference:.0e}",
    )
