"""
Writes the study's pages, their pictures, its cards and the README's table from the committed records:

    python -m entropy_gpt.programs.study.page
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from entropy_gpt.evaluation.origin import ROOT
from entropy_gpt.evaluation.records.conditions import describe_origins, describe_windows
from entropy_gpt.evaluation.records.results import load_results
from entropy_gpt.evaluation.showing.markdown import fold_away, replace_block
from entropy_gpt.evaluation.showing.model_card import model_card

from .ladder import is_drawn, ladder_text, plot_ladder
from .pictures import plot_conversion, plot_heads, plot_others, plot_pareto, plot_tolerance
from .records import Study, StudyRun
from .scaling import Scaling, plot_scaling, scaling_text
from .tables import (
    BASELINE,
    FUSED,
    LADDER,
    OTHERS,
    PAPER_GAIN,
    PRIVATE,
    PROPOSAL,
    UNREGULARIZED,
    WARM,
    above,
    by_notation,
    conversion_table,
    error_of,
    ladder_table,
    larger_table,
    list_trained,
    order_table,
    others_table,
    parts_table,
    private_table,
    rates_table,
    readme_table,
    same_seeds,
    settings_table,
    ways_table,
)


RECORD = ROOT / "model_cards" / "results" / "study.json"
SCALING_RECORD = ROOT / "model_cards" / "results" / "scaling.json"
LADDER_RECORD = ROOT / "model_cards" / "results" / "ladder.json"
MODELS = ROOT / "model_cards" / "results" / "study_models.json"
CARDS = ROOT / "model_cards" / "study"
PAGE = ROOT / "docs" / "study.md"
README = ROOT / "README.md"
PICTURES = ROOT / "docs" / "study"
LADDER_PAGE = ROOT / "docs" / "ladder.md"
# What is generated of the page and of the README stands between comments of this name; the rest is written by hand.
BLOCK, SCALING_BLOCK, LADDER_BLOCK = "study", "scaling", "ladder"
# Pictures, and the groups of which one has to have more than one run for there to be something to draw.
PLOTS = {
    "pareto": (plot_pareto, (WARM,)),
    "heads": (plot_heads, (WARM,)),
    "others": (plot_others, OTHERS),
    "tolerance": (plot_tolerance, ("tolerance",)),
    "conversion": (plot_conversion, ("conversion",)),
}
# Groups that show what each part of the proposal does, and those compared with the ladder of the longer warm-up.
PARTS = ("parts", "parts_by_head", "parts_with_norm", "stability")
CAUSES = ("causes_with_norm", "causes", "threshold_rate_warm")
COLUMNS = (
    "Perplexities are per token: the geometric mean over seeds, with the standard deviation.",
    "The learning rate was chosen on validation with the first seed, among the same values for all. Nothing was "
    "chosen on the test text.",
    '"Above GPT-2" is how far the test perplexity is above that of SM+LN+G, here and in the paper (GPT-2 small, 2.1 '
    "billion tokens of CodeParrot).",
    "Overloaded heads have a mean entropy of at least three quarters of that of uniform attention.",
    "Seconds per step were measured with other runs on the same machine.",
    "Private MB were measured between two processes, for one answer to 128 tokens. GPT-2 small's are predicted, for a "
    "WAN.",
)
# Groups that vary how the same conversion is done.
WAYS = ("conversion_ways", "conversion_rate")
# Groups that vary one setting of the proposal, and which.
VARIED = {
    "tolerance": "entropy_tolerance",
    "maximum": "entropy_maximum",
    "penalty": "entropy_penalty",
    "penalty_sum": "entropy_penalty",
    "coefficient": "entropy_coefficient",
    "threshold_rate": "threshold_lr_multiplier",
    "temperature_init": "temperature_init",
}


def study_page(study: Study) -> str:
    """
    What the page shows, in Markdown; of what is not measured yet, it says so.

    Raises:
        `ValueError`: If the baseline or the proposal, which all is held against, is not trained.
    """
    for group in (LADDER, WARM):
        trained = {run.notation for run in list_trained(study.group(group))}
        if lacking := sorted({BASELINE, PROPOSAL} - trained):
            raise ValueError(
                f"There is no trained model of {lacking[0]}, which all others are held against: run --only {group}."
            )
    missing = ", ".join(
        f"{group} ({count})" for group, count in study.missing.items() if not group.startswith("smoke")
    )
    parts = [
        fold_away("Conditions", (f"Protocol: {study.protocol}.", *list_conditions(study, LADDER, study.runs.values())))
        + "\n",
        f"Not measured yet, rows of each group: {missing}.\n" if missing else "",
        *(text(study) for groups, text in SECTIONS.items() if _is_shown(study, groups)),
    ]
    return "\n".join(filter(None, parts))


def _is_shown(study: Study, groups: Sequence[str]) -> bool:
    return any(len(study.group(group)) > 1 for group in groups)


def _main(study: Study) -> str:
    causes = f"""LayerNorm without an activation in the FFN. The proposal with FFNs of two layers, with and without an
activation. The proposal with thresholds that learn ten times as fast. Each has the rate of the architecture that it is
closest to.

{parts_table(study, CAUSES, WARM)}
"""
    return f"""## The main architectures

{_warm_up(study, WARM)}

{ladder_table(study, WARM)}

{fold_away("What the columns mean", COLUMNS)}

![Test perplexity against private bytes](study/pareto.png)

{gain_text(study, WARM)}

![Mean entropy of every head](study/heads.png)

Validation perplexity of the first seed, by which the rate was chosen. "Diverged": the guard ended the training because
the loss or the gradient exploded.

{rates_table(study, "warm_rates")}

Architectures in the paper's order, from best to worst, each compared with the next. "Undecided" is a difference below
twice its standard error. That error is from the seeds alone; it says nothing about other texts or rates.

{order_table(study, (WARM,))}

{causes if study.group(*CAUSES) else ""}"""


def _ladder(study: Study) -> str:
    return f"""## With the paper's warm-up

{_warm_up(study, LADDER)}
This is what the protocol asked for before the first run. Everything below is trained like this too.

{ladder_table(study, LADDER)}

{gain_text(study, LADDER)}

{rates_table(study, "learning_rates")}

{order_table(study, (*OTHERS, LADDER))}
"""


def _warm_up(study: Study, group: str) -> str:
    runs = study.group(group)
    seeds = len(by_notation(runs)[PROPOSAL])
    return f"{seeds} seeds each, and {runs[0].settings['warmup_steps']:.0%} of the steps to warm up."


def _parts(study: Study) -> str:
    return f"""## Temperatures and penalty apart

Parts of the proposal alone, and with LayerNorm and GELU. Then models without the penalty, at a learning rate that
works for the proposal. "Above GPT-2" refers to {BASELINE} of the last section, with the same seeds.

{parts_table(study, PARTS, LADDER)}
"""


def _others(study: Study) -> str:
    picture = "![Test perplexity against private bytes, of these and of what was converted](study/others.png)\n"
    return f"""## Other architectures

One seed each: a direction and no more. The price of a pruned model is that of GPT-2 small with the same share of its
FFNs pruned. Normalised weights (WN, SN) are folded into plain ones. They cost what SM does and are not in the
picture.

{others_table(study, OTHERS)}

{picture}"""


def _penalty(study: Study) -> str:
    picture = "![Test perplexity and entropy against the tolerance](study/tolerance.png)\n"
    return f"""## What the penalty and its settings do

{PROPOSAL} of the ladder with one setting changed, one seed each.

{settings_table(study, VARIED)}

{picture if len(study.group("tolerance")) > 1 else ""}"""


def _larger(study: Study) -> str:
    return f"""## Deeper, and with a longer context

{larger_table(study, ("deeper", "longer"))}
"""


def _conversion(study: Study) -> str:
    title = f"What distilling, fitting and the learning rate of healing are worth, one seed, {PROPOSAL}:"
    ways = f"{title}\n\n{ways_table(study, WAYS)}\n"
    return f"""## Converting and training from scratch

Each model was converted from the {BASELINE} of the same seed and healed with distillation. "Own tokens" are those it
was trained or healed with; the next column adds those of its teacher's training. Neither counts what the teacher reads
during distillation. Training from scratch has the rate that is best for 1,000 steps.

{conversion_table(study)}

![Test perplexity against tokens](study/conversion.png)

{ways if _is_shown(study, WAYS) else ""}"""


def _private(study: Study) -> str:
    return f"""## Private answers

The cost is of one answer to 128 tokens between two processes. The most likely tokens and the perplexity were computed
in the ring (emulated to the engine's last bit) and in the clear.

{private_table(study)}

{describe_origins(run.cost for run in study.group(*PRIVATE))}.
"""


# What is shown of which groups, as soon as one of them has two runs to compare.
SECTIONS = {
    (WARM,): _main,
    (LADDER,): _ladder,
    PARTS: _parts,
    OTHERS: _others,
    tuple(VARIED): _penalty,
    ("deeper", "longer"): _larger,
    ("conversion",): _conversion,
    PRIVATE: _private,
}


def list_conditions(study: Study, group: str, measured: Iterable[StudyRun]) -> list[str]:
    """What the runs of a ladder have in common, and what computed those that are shown; a sentence for each."""
    run = list_trained(study.group(group))[0]
    settings, validation = run.settings, run.validation
    common = validation.conditions
    tests = "; ".join(result.conditions.corpus_revision for result in run.test.values())
    origins = [other.validation.conditions for other in measured if other.validation is not None]
    return [
        f"Models: {settings['n_layer']} layers, {settings['n_head']} heads, width {settings['n_embd']}, "
        f"{common.vocab_size:,} tokens in the vocabulary, {settings['context']} positions.",
        f"Training: {run.tokens:,} tokens of {settings['dataset']} ({common.corpus_revision}), "
        f"{settings['max_steps']:,} steps of {settings['per_device_train_batch_size']} sequences.",
        f"Validation: {validation.likelihood.tokens:,} tokens of documents kept apart.",
        f"Test: {sum(result.likelihood.tokens for result in run.test.values()):,} tokens of other projects' code "
        f"({tests}).",
        f"Evaluation: {describe_windows(validation.likelihood.windows)}.",
        f"Measured with {describe_origins(origins)}.",
    ]


def gain_text(study: Study, group: str) -> str:
    """What temperatures and penalty are worth, here and in the paper; empty while one of them is not measured."""
    ladder = by_notation(study.group(group))
    if not {FUSED, UNREGULARIZED, PROPOSAL} <= ladder.keys():
        return ""
    pairs = {other: same_seeds(ladder[PROPOSAL], ladder[other]) for other in (FUSED, UNREGULARIZED)}
    if not all(proposal for proposal, _ in pairs.values()):
        return ""
    both, penalty = (above(*pairs[other]) for other in (FUSED, UNREGULARIZED))
    error = (1 + penalty) * math.hypot(*map(error_of, pairs[UNREGULARIZED]))
    diverged = len(study.group(group)) - len(list_trained(study.group(group)))
    return (
        "Each architecture has its own learning rate. Temperatures and penalty together change the test perplexity of "
        f"{FUSED} by {both:+.1%} (the paper: {-PAPER_GAIN:+.1%}). The penalty changes that of {UNREGULARIZED} by "
        f"{penalty:+.1%}"
        + ("." if math.isnan(error) else f", with a standard error of {error:.1%}.")
        + (" Seeds with which one of them diverged are left out." if diverged else "")
    )


def readme_text(study: Study) -> str:
    """What the README shows: the main architectures, their picture and the conditions."""
    run = list_trained(study.group(WARM))[0]
    return "\n\n".join(
        (
            readme_table(study, WARM),
            "![Test perplexity against private bytes](docs/study/pareto.png)",
            fold_away(
                "Conditions",
                (
                    f"{_warm_up(study, WARM)} ± is the standard deviation over seeds.",
                    *list_conditions(study, WARM, study.group(WARM))[:2],
                    f"Learning rates: the best of four for each architecture, on validation with seed "
                    f"{run.settings['seed']}.",
                    "Test: code of other projects. Paper: GPT-2 small, 2.1 billion tokens of CodeParrot.",
                    "Private GB: one answer of GPT-2 small to 128 tokens, predicted for a WAN.",
                ),
            ),
        )
    )


def write_cards(record: Path = RECORD, models: Path = MODELS, folder: Path = CARDS):
    """Writes the card of each model that answered privately, by the name of its run."""
    study = Study.load(record)
    answered = {run.source for run in study.group(*PRIVATE)}
    folder.mkdir(parents=True, exist_ok=True)
    for card in folder.glob("*.md"):
        card.unlink()
    for result in load_results(models):
        if result.name in answered:
            model_card(result).save(folder / f"{result.name}.md")


def write_scaling(record: Path = SCALING_RECORD, page: Path = PAGE, pictures: Path = PICTURES):
    """
    The same for what the protocol of scaling has measured so far.

    Raises:
        `ValueError`: If the record can't be read, or the page has no place for it.
    """
    study = Study.load(record)
    scaling = Scaling(study)
    if scaling.is_comparable:
        pictures.mkdir(parents=True, exist_ok=True)
        plot_scaling(scaling).savefig(pictures / "scaling.png", format="png")
    replace_block(page, SCALING_BLOCK, scaling_text(study))


def write_ladder(record: Path = LADDER_RECORD, page: Path = LADDER_PAGE):
    """
    The same for the functions without a maximum, on a page of their own, with its picture in the same folder.

    Raises:
        `ValueError`: If the record can't be read, or the page has no place for it.
    """
    study = Study.load(record)
    if is_drawn(study):
        plot_ladder(study).savefig(page.with_suffix(".png"), format="png")
    replace_block(page, LADDER_BLOCK, ladder_text(study))


def write(record: Path = RECORD, page: Path = PAGE, pictures: Path = PICTURES, readme: Path = README):
    """
    Draws the pictures, and replaces what is generated of the page and of the README.

    Raises:
        `ValueError`: If the record can't be read or shown, or one of them has no place for it.
    """
    study = Study.load(record)
    text = study_page(study)
    pictures.mkdir(parents=True, exist_ok=True)
    for name, (plot, groups) in PLOTS.items():
        if _is_shown(study, groups):
            plot(study).savefig(pictures / f"{name}.png", format="png")
    replace_block(page, BLOCK, text)
    replace_block(readme, BLOCK, readme_text(study))


if __name__ == "__main__":
    write()
    write_scaling()
    write_ladder()
    write_cards()
