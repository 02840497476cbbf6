"""The study's page, its pictures and the README's table of it: `python -m evaluation.study.page` writes them."""

import math
from pathlib import Path

from evaluation.conditions import describe_origin, describe_windows
from evaluation.readme import README, ROOT, replace_block

from .pictures import plot_conversion, plot_heads, plot_pareto, plot_tolerance
from .records import Study
from .tables import (
    BASELINE,
    FUSED,
    PAPER_GAIN,
    PROPOSAL,
    UNREGULARIZED,
    above,
    by_notation,
    conversion_table,
    ladder_table,
    order_table,
    others_table,
    private_table,
    settings_table,
    spread_of,
    ways_table,
)


RECORD = ROOT / "model_cards" / "results" / "study.json"
PAGE = ROOT / "docs" / "study.md"
PICTURES = ROOT / "docs" / "study"
README_BLOCK = "study"
# Pictures, and the group without which there is nothing to draw.
PLOTS = {
    "pareto": (plot_pareto, "ladder"),
    "heads": (plot_heads, "ladder"),
    "tolerance": (plot_tolerance, "tolerance"),
    "conversion": (plot_conversion, "conversion"),
}


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
    The page, in Markdown; of what is not measured yet, it says so.

    Raises:
        `ValueError`: If nothing of the main architectures is measured.
    """
    if not study.group("ladder"):
        raise ValueError("No run of the main architectures is there to show: entropy-gpt study --only ladder.")
    missing = ", ".join(
        f"{group} ({count})" for group, count in study.missing.items() if not group.startswith("smoke")
    )
    parts = [
        f"""# The study: quality against private cost

Generated from `model_cards/results/study.json` by `python -m evaluation.study.page`; `make study` measures anew, by
[the protocol](../evaluation/study/protocol.yaml), which was fixed before the first run.

{conditions(study)}
""",
        f"Not measured yet, rows of each group: {missing}.\n" if missing else "",
        *(text(study) for groups, text in SECTIONS.items() if any(map(study.group, groups))),
    ]
    return "\n".join(filter(None, parts))


def _main(study: Study) -> str:
    return f"""## The main architectures

{ladder_table(study)}

Perplexities per token: the mean over seeds, with the standard deviation. "Above GPT-2" is by how much the test
perplexity is above that of {BASELINE}, here and in the paper (GPT-2 small, 2.1 billion tokens of CodeParrot). Private
megabytes were measured between two processes, of one answer to 128 tokens; those of GPT-2 small are predicted.

![Test perplexity against private bytes](study/pareto.png)

{gain_text(study)}

![Mean entropy of every head](study/heads.png)

## Does the paper's order hold?

Architectures from best to worst as the paper has them, each with the next. "Undecided" is a difference of less than
twice the spread over seeds.

{order_table(study)}
"""


def _others(study: Study) -> str:
    return f"""## Other architectures

One seed each: a direction and no more.

{others_table(study, ("others_with_norm", "others", "static_weights"))}
"""


def _penalty(study: Study) -> str:
    return f"""## What the penalty and its settings do

{settings_table(study, VARIED)}

![Test perplexity and entropy against the tolerance](study/tolerance.png)
"""


def _larger(study: Study) -> str:
    return f"""## Deeper, and with a longer context

{others_table(study, ("deeper", "longer"))}
"""


def _conversion(study: Study) -> str:
    return f"""## Converting beside training from scratch

Each model was converted from the {BASELINE} of the same seed and healed. The first column of tokens is what it was
trained or healed with, the second counts its teacher's training too.

{conversion_table(study)}

![Test perplexity against tokens](study/conversion.png)

What distilling and fitting are worth, one seed, {PROPOSAL}:

{ways_table(study)}
"""


def _private(study: Study) -> str:
    return f"""## Private answers

One answer to 128 tokens between two processes, and the most likely tokens and the perplexity in the ring (emulated to
the engine's last bit) beside those in the clear.

{private_table(study)}
"""


# What is shown of which groups.
SECTIONS = {
    ("ladder",): _main,
    ("others_with_norm", "others", "static_weights"): _others,
    tuple(VARIED): _penalty,
    ("deeper", "longer"): _larger,
    ("conversion", "scratch"): _conversion,
    ("private",): _private,
}


def conditions(study: Study) -> str:
    """What all runs of the ladder have in common."""
    run = next(run for run in study.group("ladder") if run.diverged is None)
    told, validation = run.settings, run.validation
    measured = validation.conditions
    tests = "; ".join(result.conditions.corpus_revision for result in run.test.values())
    origin = describe_origin(measured.versions, measured.git_revision, measured.machine)
    return (
        f"Models of {told['n_layer']} layers, {told['n_head']} heads and width {told['n_embd']}, with "
        f"{measured.vocab_size:,} tokens in the vocabulary and {told['context']} positions, trained on "
        f"{run.tokens:,} tokens of {told['dataset']} ({measured.corpus_revision}): "
        f"{told['max_steps']:,} steps of {told['per_device_train_batch_size']} sequences. Validation on "
        f"{validation.likelihood.tokens:,} tokens of documents kept apart; test on other projects' code ({tests}), "
        f"{sum(result.likelihood.tokens for result in run.test.values()):,} tokens; "
        f"{describe_windows(validation.likelihood.windows)}. Several runs shared the machine. {origin}."
    )


def gain_text(study: Study) -> str:
    """What temperatures and penalty are worth, beside the paper; nothing as long as one of them is not measured."""
    ladder = by_notation(study.group("ladder"))
    if not {FUSED, UNREGULARIZED, PROPOSAL} <= ladder.keys():
        return ""
    spread = math.hypot(spread_of(ladder[PROPOSAL]), spread_of(ladder[UNREGULARIZED]))
    both, alone = (above(ladder[PROPOSAL], ladder[other]) for other in (FUSED, UNREGULARIZED))
    return (
        f"Temperatures and penalty together change the test perplexity of {FUSED} by {both:+.1%} (the paper: "
        f"{-PAPER_GAIN:+.1%}); the penalty alone, beside {UNREGULARIZED}, by {alone:+.1%}, with a spread over seeds "
        f"of {spread:.1%}."
    )


def readme_text(study: Study) -> str:
    """What the README shows: the main architectures, and what they are worth."""
    return "\n\n".join(
        filter(
            None,
            (
                ladder_table(study),
                conditions(study),
                gain_text(study),
                "![Test perplexity against private bytes](docs/study/pareto.png)",
            ),
        )
    )


def write(record: Path = RECORD, page: Path = PAGE, pictures: Path = PICTURES, readme: Path = README):
    """
    Writes page, pictures and the README's part.

    Raises:
        `ValueError`: If the record can't be read or shown, or the README has no place for it.
    """
    study = Study.load(record)
    text = study_page(study)
    pictures.mkdir(parents=True, exist_ok=True)
    for name, (plot, group) in PLOTS.items():
        if study.group(group):
            plot(study, pictures / f"{name}.png")
    page.write_text(text, encoding="utf-8")
    replace_block(readme, README_BLOCK, f"\n{readme_text(study)}\n")


if __name__ == "__main__":
    write()
