"""Models as an evaluation might find them, for tests; nothing here was measured."""

import hashlib
import itertools
import math

import numpy as np

from entropy_gpt.evaluation.measuring.entropy_diagnostics import HeadDiagnostics, HeadwiseEntropy
from entropy_gpt.evaluation.measuring.operation_counts import count_operations
from entropy_gpt.evaluation.measuring.perplexity import Likelihood, Part, Windows
from entropy_gpt.evaluation.measuring.scores import TaskResult, TaskScore
from entropy_gpt.evaluation.records.results import (
    Architecture,
    AttentionResult,
    Conditions,
    HeadResult,
    LikelihoodResult,
    ModelResult,
    PrivateCost,
    TrainingResult,
)
from modeling_entropy_gpt import EntropyGPTConfig


VERSIONS = {"python": "3.11.7", "entropy-gpt": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
ORIGIN = {"versions": VERSIONS, "git_revision": "0" * 40, "machine": "a machine, 2 threads"}
LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]


def example_conditions(**changes) -> Conditions:
    plain = {
        "corpus": "Python standard library, the part kept apart",
        "corpus_revision": "Python 3.11.7 sha256:69801485bf096206",
        "vocab_size": 50257,
        "context": 128,
        "evaluated_tokens": 65024,
        "dtype": "float32",
        "seed": None,
        **ORIGIN,
    }
    return Conditions(**{**plain, **changes})


def example_likelihood(perplexity=2.7, context=128, tokens=65024, by_position=True, by_frequency=True, **changes):
    windows = Windows(context, context // 2, separate=False, bos=False)
    nats = math.log(perplexity)
    edges = sorted({min(context + 1, math.ceil(2 ** (power / 2))) for power in range(20)})
    positions = [
        Part(begin, end, (end - begin) * 500, (end - begin) * 500 * (nats + 2.2 / (1 + begin) ** 0.6))
        for begin, end in itertools.pairwise(edges)
    ]
    classes = zip((0, 1, 10, 100, 1000), (1, 10, 100, 1000, None), (24, 900, 5100, 19000, 40000), strict=True)
    frequencies = [
        Part(begin, end, count, count * nats * (3.2 - 0.55 * index))
        for index, (begin, end, count) in enumerate(classes)
    ]
    likelihood = Likelihood(
        nats=nats * tokens,
        tokens=tokens,
        words=23000,
        bytes=250000,
        windows=windows,
        by_position=positions if by_position else None,
        by_frequency=frequencies if by_frequency else None,
        frequency_text="Python standard library, the part trained on" if by_frequency else None,
    )
    conditions = example_conditions(**{"context": context, "evaluated_tokens": tokens, **changes})
    return LikelihoodResult(likelihood, conditions, 41.5)


def example_heads(overloaded=0.3, layers=12, heads=12, context=128, seed=0, **changes):
    """About so many heads are overloaded."""
    random = np.random.default_rng(seed)
    maximum = math.lgamma(context + 1) / context
    spread = random.beta(1.4, 1.4, (layers, heads)) * 0.7
    spread = np.where(random.random((layers, heads)) < overloaded, random.uniform(0.76, 0.99, (layers, heads)), spread)
    entropies = spread * maximum
    factors = np.array([0.45, 0.8, 1.02, 1.2, 1.4])
    quantiles = np.minimum(entropies[:, :, None] * factors, math.log(context))
    diagnostics = HeadDiagnostics(
        entropy=HeadwiseEntropy(entropies.tolist(), maximum),
        quantile_levels=LEVELS,
        entropy_quantiles=quantiles.tolist(),
        sink_share=random.beta(1.2, 8, (layers, heads)).tolist(),
        uniform_sink_share=0.0343,
        diversity=random.uniform(0.2, 0.9, layers).tolist(),
        logit_spectral_norms=random.lognormal(3, 0.6, (layers, heads)).tolist(),
        rows=65024,
        diversity_rows=8128,
    )
    return HeadResult(diagnostics, example_conditions(context=context, **changes), 77.0)


def example_attention(tokens=("def", " main", "("), layers=2, heads=3, **changes) -> AttentionResult:
    """Uniform in one head, and somewhere between in all others."""
    random = np.random.default_rng(0)
    length = len(tokens)
    uniform = np.log(np.arange(1, length + 1))
    entropies = random.random((layers, heads, length)) * uniform
    weights = np.tri(length) / np.arange(1, length + 1)[:, None]
    entropies[1, 2] = uniform
    conditions = example_conditions(corpus="one text", context=length, evaluated_tokens=length, **changes)
    return AttentionResult([*tokens], entropies.tolist(), [1, 2], weights.tolist(), conditions)


def example_tasks(seed=0, **changes):
    random = np.random.default_rng(seed)
    accuracies = {
        ("local_blimp", "acc"): 67000,
        ("local_hellaswag", "acc"): 10042,
        ("local_hellaswag", "acc_norm"): 10042,
    }
    scores = [
        TaskScore(task, "1.0", metric, random.uniform(0.28, 0.72), 0.0046, samples, True, 0)
        for (task, metric), samples in accuracies.items()
    ]
    scores += [
        TaskScore("local_lambada_openai", "1.0", "perplexity", random.uniform(30, 90), 1.91, 5153, False, 0),
        TaskScore("local_lambada_openai", "1.0", "acc", random.uniform(0.2, 0.4), None, 5153, True, 0),
    ]
    plain = {
        "bos": "no beginning-of-text token but where there is no context",
        "context": 128,
        "limit": None,
        "data": "files sha256:1f2e3d4c5b6a7980",
        "dtype": "float32",
        "seed": 0,
        **ORIGIN,
        "versions": {**VERSIONS, "lm_eval": "0.4.13"},
        "seconds": 903.4,
    }
    return TaskResult(scores, **{**plain, **changes})


def example_cost(gigabytes=25.32, minutes=8.21, **changes):
    plain = {
        "protocol": "cheetah",
        "context": 128,
        "answers": 1,
        "total_bytes": round(gigabytes * 1e9),
        "rounds": round(1200 + 90 * gigabytes),
        "seconds": minutes * 60,
        "network": "100 Mbit/s, 80 ms",
        **ORIGIN,
        "versions": {"spu": "0.9.5"},
    }
    return PrivateCost(**{**plain, **changes})


def example_operations(notation="SM+LN+G", context=128):
    config = EntropyGPTConfig.from_notation(notation, n_layer=12, n_head=12, n_embd=768, n_positions=128)
    return count_operations(config, context)


def example_training(steps=1500, converted_from=None, **told):
    told = {"learning_rate": 1e-3, "batch_size": 8, "dropout": 0.0, **told}
    return TrainingResult(steps, steps * 1024, 0.058 * steps, told, converted_from)


def example_result(name="a model", notation="SM+LN+G", operations=None, **parts) -> ModelResult:
    architecture = Architecture(notation, "layernorm", 124439808, 12, 12, 768, 128, 50257)
    operations = operations or example_operations(notation)
    return ModelResult(
        name, f"sha256:{hashlib.sha256(name.encode()).hexdigest()[:16]}", architecture, operations, **parts
    )


def example_results(costs=True, tasks=True) -> list[ModelResult]:
    """Four models of the paper, with the perplexities and costs that it gives."""
    told = {
        "gpt2-small": ("SM+LN+G", 2.69, 0.58, 25.32, 8.21),
        "relu": ("SM+LN+R", 2.76, 0.61, 9.44, 6.06),
        "softmax-only": ("SM+ScFuFFN", 3.48, 0.72, 6.43, 4.76),
        "proposal": ("EReg(SM(t)+ScFuFFN)", 3.21, 0.12, 6.43, 4.76),
    }
    return [
        example_result(
            name,
            notation,
            training=example_training(),
            likelihood=example_likelihood(perplexity),
            heads=example_heads(overloaded, seed=index),
            tasks=example_tasks(index) if tasks else None,
            costs=[example_cost(gigabytes, minutes)] if costs else [],
        )
        for index, (name, (notation, perplexity, overloaded, gigabytes, minutes)) in enumerate(told.items())
    ]
