"""Perplexity as a metric of HuggingFace's `evaluate`, for models that need their own code too.

metric = evaluate.load("evaluation/metrics/perplexity")
metric.compute(predictions=texts, model_id="path/to/folder", trust_remote_code=True)
"""

import datasets
import evaluate
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_gpt.evaluation.measuring.perplexity import Windows, measure_likelihood
from entropy_gpt.evaluation.measuring.tokenized_text import tokenize


DESCRIPTION = """
Perplexity of texts under a causal language model: the exponential of the mean negative log-likelihood of their tokens.
The mean is taken over the tokens of all texts together, so that a long text counts for more than a short one, and no
padding token is needed. Texts longer than what the model sees at once are read in windows, and each token is predicted
once.
"""

INPUTS = """
Args:
    predictions (list of str): Texts.
    model_id (str): Folder or repository of a causal language model.
    tokenizer_id (str): Folder or repository of its tokenizer; the model's own without.
    context (int): Tokens that the model sees at once; as many as it has positions without.
    stride (int): Tokens predicted in each window after the first; as many as the context without.
    add_start_token (bool): Whether the beginning-of-text token stands before each text, so that its first token is
        predicted too. Without, a text of one token is left out.
    batch_tokens (int): Tokens of a forward pass; changes speed and memory alone.
    device (str): Such as "cpu" or "cuda"; a GPU if there is one without.
    trust_remote_code (bool): Whether code that lies with the model may be run.
Returns:
    perplexity (float): Per token; depends on the tokenizer.
    word_perplexity (float): Per word between white space.
    bits_per_byte (float): Bits for a byte of UTF-8.
    tokens, words, bytes (int): What was predicted.
"""


class Perplexity(evaluate.Metric):
    """Computes perplexity per token, per word and bits per byte."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model_id: str,
        tokenizer_id: str | None = None,
        context: int | None = None,
        stride: int | None = None,
        add_start_token: bool = True,
        batch_tokens: int = 4096,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> dict:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=trust_remote_code).to(device)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_id or model_id, trust_remote_code=trust_remote_code)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer):,} tokens, and {model_id} {model.config.vocab_size:,}: they do "
                "not belong together. Give the model's own as tokenizer_id."
            )
        context = model.config.max_position_embeddings if context is None else context
        windows = Windows(context, context if stride is None else stride, separate=True, bos=add_start_token)
        documents = tokenize(predictions, tokenizer, windows.separate, windows.bos)
        likelihood = measure_likelihood(model, documents, windows, batch_tokens)
        return {
            "perplexity": likelihood.perplexity,
            "word_perplexity": likelihood.word_perplexity,
            "bits_per_byte": likelihood.bits_per_byte,
            "tokens": likelihood.tokens,
            "words": likelihood.words,
            "bytes": likelihood.bytes,
        }
