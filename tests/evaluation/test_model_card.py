"""Cards of models: what is on record is in them, what is not is said to be missing, and the Hub can read them."""

import dataclasses
import math

import pytest
from huggingface_hub import ModelCard

from entropy_gpt.evaluation.records.results import AnswerCheck, TrainingResult
from entropy_gpt.evaluation.showing.model_card import describe_architecture, describe_training, model_card
from entropy_gpt.programs.quickstart.page import CARDS, write_cards
from modeling_entropy_gpt.releases import TESTED

from .example_results import (
    example_cost,
    example_heads,
    example_likelihood,
    example_result,
    example_results,
    example_tasks,
    example_training,
)


@pytest.fixture
def result():
    return example_result(
        "proposal",
        "EReg(SM(t)+ScFuFFN)",
        training=dataclasses.replace(example_training(10), text="my texts (sha256:12)"),
        likelihood=example_likelihood(71.264),
        heads=example_heads(),
        tasks=example_tasks(),
        costs=[example_cost(0.0125, context=8, answers=2, check=AnswerCheck(2, 2, 21.5, 0.0123))],
    )


def read(card: ModelCard) -> ModelCard:
    """As the Hub would."""
    return ModelCard(card.content, ignore_metadata_errors=False)


def test_what_is_on_record_is_in_the_card(result):
    text = model_card(result).text
    for words in (
        "trust_remote_code=True",
        "| perplexity per token | 71.26 |",
        "On Python standard library, the part kept apart (Python 3.11.7 sha256:69801485bf096206): 65,024 tokens",
        "windows of 128 tokens, 64 tokens further each time",
        f"| mean entropy (nats) | {result.heads.heads.entropy.mean:.2f} |",
        "| softmax | 144 × R^(128×128) |",
        r"| local\_blimp, acc | ",
        "From scratch, on my texts (sha256:12): 10 steps, 10,240 tokens",
        "| cheetah | 8 | 2 | 12.5 |",
        "2 of 2 tokens are the same; logits differ by 0.0123 at most, of up to 21.5.",
        "Measured with spu 0.9.5; commit 000000000000; a machine, 2 threads.",
        TESTED,
        "keeps nothing secret",
    ):
        assert words in text


def test_the_metadata_are_what_the_hub_reads(result):
    data = read(model_card(result, "apache-2.0", "somebody/proposal")).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.model_name == "somebody/proposal"
    scores = {(score.dataset_name, score.metric_type): score.metric_value for score in data.eval_results}
    likelihood = result.likelihood.likelihood
    text = "Python standard library, the part kept apart"
    assert scores[text, "perplexity"] == likelihood.perplexity
    assert scores[text, "bits_per_byte"] == likelihood.bits_per_byte
    for score in result.tasks.scores:
        assert scores[score.task, score.metric] == score.value
    assert len(scores) == 3 + len(result.tasks.scores)


def test_what_is_not_on_record_is_said_to_be_missing(result):
    result = dataclasses.replace(result, training=None, tasks=None, costs=[])
    text = model_card(result).text
    assert "How it was trained\n\nThis is not on record." in text
    assert "Private inference\n\nNot measured." in text
    assert "lm-eval" not in text
    assert "The weights: no licence was stated." in text
    assert read(model_card(result)).data.license is None
    assert read(model_card(result)).data.base_model is None


def test_an_answer_that_was_not_compared_is_said_to_be(result):
    result = dataclasses.replace(result, costs=[example_cost()])
    assert "It was not compared with the clear." in model_card(result).text


@pytest.mark.parametrize("part", ["likelihood", "heads"])
def test_a_card_needs_what_was_measured(result, part):
    with pytest.raises(ValueError, match=rf"proposal: {part} are not in its results.*entropy-gpt evaluate"):
        model_card(dataclasses.replace(result, **{part: None}))


def test_numbers_that_are_not_finite_are_shown_but_no_scores(result):
    result.likelihood.likelihood.nats = math.inf
    card = read(model_card(result))
    assert "| perplexity per token | ∞ |" in card.text
    assert {score.dataset_name for score in card.data.eval_results} == {score.task for score in result.tasks.scores}


def test_names_can_not_break_the_card(result):
    """A text is called what its file is called."""
    name = "a | b\n# <script>`{{ 7 * 7 }}`: [x](y)\n---"
    conditions = dataclasses.replace(result.likelihood.conditions, corpus=name)
    result = dataclasses.replace(result, likelihood=dataclasses.replace(result.likelihood, conditions=conditions))
    card = read(model_card(result))
    assert card.data.eval_results[0].dataset_name == name
    assert r"On a \| b \# \<script\>\`{{ 7 \* 7 }}\`: \[x\](y) ---" in card.text
    plain = model_card(example_results()[0]).text
    assert card.text.count("\n#") == plain.count("\n#")


@pytest.mark.parametrize(
    ("training", "words"),
    [
        (
            TrainingResult(3, 30, 1.5, {"learning_rate": 0.1}, "SM+LN+G"),
            "Converted from a trained SM+LN+G, and healed: 3",
        ),
        (TrainingResult(3, 30, 1.5, {}, started_from="a/b", text="mine"), "Going on from a/b, on mine: 3 steps"),
        (TrainingResult(3, 30, 1.5, {}, "SM", "t", "a/b"), "Converted from a trained SM (a/b), and healed, on t: 3"),
        (TrainingResult(0, 0, 0.0, {}, "SM+LN+G"), "Converted from a trained SM+LN+G, and not trained since."),
    ],
)
def test_training_that_went_on_is_not_called_from_scratch(training, words):
    assert describe_training(training).startswith(words)


@pytest.mark.parametrize(
    ("notation", "words"),
    [
        (
            "SM+LN+G",
            "softmax attention; LayerNorm in the blocks, LayerNorm before the head; FFNs of two linear maps with GELU "
            "between them",
        ),
        (
            "EReg(SM(t)+ScFuFFN)",
            "softmax attention with a learnable temperature for each head and position; no norm in the blocks, "
            "LayerNorm before the head; FFNs of one linear map, with learnable scales in their residual sum; trained "
            "with a penalty on the entropies of its attention heads, with a learnable threshold each",
        ),
        (
            "SM(t_h)+StaticLN+ScFFNi10+SN(QK+FFN)",
            "softmax attention with a learnable temperature for each head; a norm that divides by a measured constant "
            "in the blocks, LayerNorm before the head; FFNs of two linear maps with nothing between them, with "
            "learnable scales in their residual sum, in all but layers 2, 3, 4, 5, 6, 7, 8, 9, 10, 11; spectral "
            "normalisation of q, k, ffn",
        ),
        ("SM+FFNi12", "softmax attention; no norm in the blocks, LayerNorm before the head; no FFN"),
    ],
)
def test_architectures_in_words(notation, words):
    assert describe_architecture(example_result(notation=notation).architecture) == words


def test_a_folded_model_beside_it_and_in_its_place(result):
    assert 'loads by `subfolder="folded"`' in model_card(result, folded="folded").text
    assert "This is SM+LN+G, folded for inference" in model_card(result, folded_from="SM+LN+G").text
    assert "folded" not in model_card(result).text


def test_the_committed_cards_are_those_of_the_committed_results(tmp_path):
    write_cards(tmp_path)
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in CARDS.glob("*.md")}
    assert committed == fresh, "run: python -m entropy_gpt.programs.quickstart.page"
