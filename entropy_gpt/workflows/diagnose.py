"""Pictures of what attention heads do on one text."""

from dataclasses import dataclass
from pathlib import Path

import pydantic

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.evaluation.measuring.text_diagnostics import TextDiagnostics, diagnose_text
from entropy_gpt.evaluation.showing.text_plots import plot_text_attention, plot_text_entropies
from entropy_gpt.training.files import written_whole
from entropy_gpt.training.storage import check_folder

from .options import Head, read_options, with_argument_names


@pydantic.dataclasses.dataclass(frozen=True)
class DiagnosisOptions:
    """Options of [`diagnose`] that have a form of their own."""

    head: Head = None


@dataclass(frozen=True)
class Diagnosis:
    """
    What was measured and drawn.

    Args:
        diagnostics ([`TextDiagnostics`]): The measurements.
        pictures (`dict[str, Path]`): The pictures, by what they show.
    """

    diagnostics: TextDiagnostics
    pictures: dict[str, Path]


@with_argument_names
def diagnose(
    model: str | Path,
    text: str,
    *,
    head: tuple[int, int] | str | None = None,
    tokenizer: str | Path | None = None,
    output: str | Path = "attention",
) -> Diagnosis:
    """
    Measures and draws one text, as `entropy-gpt diagnose` does.

    Args:
        model (`str` or `Path`): A folder, or a repository on the Hub.
        text (`str`): The text.
        head (`tuple[int, int]`, *optional*):
            Layer and head whose attention is drawn. Default: the one with the lowest mean entropy.
        tokenizer (`str` or `Path`, *optional*): Where the tokenizer is, if not with the model.
        output (`str` or `Path`): Folder for the pictures.

    Raises:
        `UserError`: If the model can't be loaded, text or head do not suit it, or the folder can't be written to.
    """
    wanted = read_options(DiagnosisOptions, head=head).head
    folder = Path(expanded(output))
    check_folder(folder)
    tokenizer = None if tokenizer is None else expanded(tokenizer)
    diagnostics = diagnose_text(expanded(model), tokenizer, text, weights=True)
    layer, number = diagnostics.find_head(wanted)
    name = Path(model).resolve().name
    pictures = {
        "entropy of every head at every token": (folder / "entropies.png", plot_text_entropies(diagnostics, name)),
        f"attention of head {number} in layer {layer}": (
            folder / f"attention_{layer}_{number}.png",
            plot_text_attention(diagnostics, layer, number, name),
        ),
    }
    for place, figure in pictures.values():
        with written_whole(place) as path:
            figure.savefig(path, format="png")
    return Diagnosis(diagnostics, {shows: place for shows, (place, _) in pictures.items()})
