"""`entropy-gpt private cost`: predictions for architectures and for models, and the time on a network."""

import re

import pytest
from typer.testing import CliRunner

from entropy_gpt.commands.main import app
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.terminal.private_cost import run
from entropy_gpt.workflows.private_cost import count_heads, private_cost
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM


def show(capsys, *architectures, networks=(), **options):
    run([*map(str, architectures)], networks, kept=0, length=options.pop("length", 8), **options)
    return capsys.readouterr().out


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (200, 4), (64, 1), (32, 1), (1600, 25), (97, 1)])
def test_heads_divide_the_width_and_have_nearly_64_dimensions(width, heads):
    assert count_heads(width) == heads
    (cost,) = private_cost("SM", n_layer=1, n_embd=width, vocab_size=64, length=4)
    assert cost.config.n_head == heads


@pytest.fixture
def model(tmp_path):
    config = EntropyGPTConfig.from_notation(
        "SM+ScFuFFN", n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    EntropyGPTForCausalLM(config).save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def test_a_model_has_its_sizes_and_what_it_is_compared_with_has_them_too(model, capsys):
    shown = show(capsys, model, "SM+LN+G", networks=["100Mbps,80ms"])
    assert "2 layers, 2 heads, width 32, vocabulary of 64, prompt of 8 tokens" in shown
    assert "on 100Mbps,80ms" in shown and "on LAN" not in shown
    ours, gpt2 = private_cost([model, "SM+LN+G"], length=8)
    assert (ours.title, ours.config.notation) == (str(model), "SM+ScFuFFN")
    assert (gpt2.config.n_layer, gpt2.config.n_head, gpt2.config.n_embd) == (2, 2, 32)
    (wider,) = private_cost("SM+LN+G", n_embd=64, n_layer=1, vocab_size=64, length=8)
    assert wider.config.n_head == 1


def test_more_tokens_than_a_model_has_positions(model):
    with pytest.raises(UserError, match="has 16 positions, and 17 are asked for"):
        private_cost(model, length=17)


def test_drafts_have_passes_and_tokens_next_to_the_answer_without(capsys):
    sizes = {"n_layer": 1, "n_embd": 64, "vocab_size": 64, "max_new_tokens": 6}
    shown = show(capsys, "SM", networks=["WAN"], draft_acceptance=1.0, draft_tokens=2, **sizes)
    rows = [tuple(re.split(r"  +", line.strip())) for line in shown.splitlines()]
    rows = [row for row in rows if len(row) == 2]
    cells = dict(rows)
    assert cells["passes"] == "2.0"
    assert int(cells["round trips a token"]) == round(int(cells["round trips a pass"]) / 3)
    without = [value for name, value in rows if name == "without drafts"]
    assert len(without) == 3 and int(without[1]) > 2 * int(cells["round trips a token"])
    assert "answer of 6" in shown and "right with probability 1 " in shown
    assert "a token" not in show(capsys, "SM", **sizes)


def test_an_answer_is_the_sum_of_its_passes():
    sizes = {"n_layer": 1, "n_embd": 64, "vocab_size": 64}
    (answer,) = private_cost("SM", length=8, max_new_tokens=3, **sizes)
    alone = [private_cost("SM", kept=kept, length=length, **sizes)[0] for kept, length in ((0, 8), (8, 1), (9, 1))]
    assert answer.total_bytes == pytest.approx(sum(cost.total_bytes for cost in alone))
    assert answer.round_trips == sum(cost.round_trips for cost in alone)
    (never,) = private_cost("SM", length=8, max_new_tokens=3, draft_acceptance=0.0, draft_tokens=1, **sizes)
    assert (never.passes, never.plain) == (3, answer)
    assert never.total_bytes > answer.total_bytes
    (prepared,) = private_cost("SM", length=8, max_new_tokens=3, prepared=True, **sizes)
    assert prepared.total_bytes < answer.total_bytes and prepared.before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draft_keep": "prompt"}, "give --draft-acceptance too"),
        ({"draft_acceptance": 0.5}, "give --max-new-tokens of at least 2"),
        ({"draft_acceptance": 1.5, "max_new_tokens": 4}, "--draft-acceptance 1.5: give a share from 0 to 1"),
        ({"draft_acceptance": 0.5, "max_new_tokens": 4, "draft_tokens": 0}, "--draft-tokens 0: "),
        (
            {"draft_acceptance": 0.5, "max_new_tokens": 4, "draft_tokens": 2, "draft_keep": "prompt"},
            "--draft-tokens is for --draft-keep accepted",
        ),
        ({"draft_acceptance": 0.5, "max_new_tokens": 4, "prepared": True}, "--prepared is not possible with"),
        ({"max_new_tokens": 4, "all_positions": True}, "--all-positions is for the prompt alone"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: "),
    ],
)
def test_answers_that_can_not_be_predicted_are_refused(options, said):
    with pytest.raises(UserError, match=said) as refused:
        private_cost("SM", n_layer=1, n_embd=64, vocab_size=64, length=8, **options)
    assert "\n" not in str(refused.value)


def test_the_command_predicts_drafts_as_it_is_asked():
    words = "private cost SM --n-layer 1 --n-embd 64 --vocab-size 64 --seq 8 --max-new-tokens 5 --draft-keep prompt"
    result = CliRunner().invoke(app, [*words.split(), "--draft-acceptance", "0"])
    assert result.exit_code == 0
    assert "passes" in result.output and "5.0" in result.output
    assert CliRunner().invoke(app, [*words.split(), "--draft-acceptance", "nan"]).exit_code == 2


def test_the_slower_the_network_the_more_time(capsys):
    sizes = {"n_layer": 1, "n_embd": 64, "vocab_size": 64}
    shown = show(capsys, "SM", networks=["1Gbps,1ms", "100Mbps,50ms"], **sizes)
    fast, slow = (line.split()[2:] for line in shown.splitlines() if line.strip().startswith("on "))
    assert fast[1] == slow[1] == "s" and int(fast[0]) < int(slow[0])
    with pytest.raises(UserError, match="network 'fast' is not known"):
        show(capsys, "SM", networks=["fast"])


def test_eight_architectures_are_readable_at_80_columns(capsys, monkeypatch):
    notations = ["SM+LN+G", "SM+LN+R", "SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)", "SM+StaticLN+LearnableLeakyR"]
    shown = show(capsys, *notations, "SM+ScFuFFNi6", "SM+LN", "SM+LN+G+WN(QKVO+FFN)")
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown


@pytest.mark.parametrize("prepared", [False, True])
def test_embeddings_at_home_take_no_steps_and_public_ones_no_bytes_either(prepared):
    def predict(embedding: str):
        (cost,) = private_cost("SM", n_layer=1, n_embd=64, vocab_size=64, embedding=embedding, prepared=prepared)
        return cost

    shared, sent, public = map(predict, ("one_hot", "client_table", "public"))
    saved = sum(cost.by_operation["embedding"] for cost in (shared, *([shared.first_phase] if prepared else [])))
    for cost in (sent, public):
        assert "embedding" not in cost.by_operation | cost.first_phase.by_operation
        after = cost.total_bytes + cost.first_phase.total_bytes
        assert after == pytest.approx(shared.total_bytes + shared.first_phase.total_bytes - saved, rel=1e-3)
        assert cost.round_trips < shared.round_trips
    assert (shared.table_bytes, public.table_bytes) == (0, 0) != sent.table_bytes


def test_both_phases_have_bytes_round_trips_and_seconds(capsys):
    sizes = {"n_layer": 1, "n_embd": 64, "vocab_size": 64}
    shown = show(capsys, "SM", networks=["100Mbps,50ms"], prepared=True, **sizes)
    rows = {" ".join(line.split()[:3]): line.split() for line in shown.splitlines()}
    assert {"before the prompt", "round trips before", "before, on 100Mbps,50ms"} <= {*rows}
    assert int(rows["round trips before"][3]) > 1
    assert "before" not in show(capsys, "SM", **sizes)
