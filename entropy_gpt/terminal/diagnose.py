"""Draws what attention heads do on one text, and prints which are the most and the least focused."""

from pathlib import Path

from rich.console import Console

from entropy_gpt.workflows.diagnose import diagnose

from .progress import progress_display
from .tables import make_table


HEADINGS = ("layer", "head", "mean entropy\n(nats)", "part of that of\nuniform attention")
# Heads at each end of the table.
SHOWN = 3

console = Console()


def run(model: str, text: str, head: str | None, tokenizer: str | None, output: Path):
    """
    Measures, draws and prints.

    Args:
        model (`str`): A folder, or a repository on the Hub.
        text (`str`): The text.
        head (`str`, *optional*): Layer and head whose attention is drawn, with a comma between them.
        tokenizer (`str`, *optional*): Where the tokenizer is, if not with the model.
        output (`Path`): Folder for the pictures.

    Raises:
        `UserError`: If the model can't be loaded, or text or head do not suit it.
    """
    with progress_display(console, transient=True) as progress, progress.stage("measuring and drawing"):
        diagnosis = diagnose(model, text, head=head, tokenizer=tokenizer, output=output)
    means, uniform = diagnosis.diagnostics.entropies.mean(dim=-1), diagnosis.diagnostics.uniform.mean()
    order = means.flatten().argsort().tolist()
    shown = order if len(order) <= 2 * SHOWN else [*order[:SHOWN], *order[-SHOWN:]]
    rows = []
    for index in shown:
        layer, number = divmod(index, means.shape[1])
        mean = float(means[layer, number])
        rows.append((str(layer), str(number), f"{mean:.2f}", f"{mean / uniform:.0%}" if uniform else ""))
    console.print(make_table(HEADINGS, rows))
    for shows, path in diagnosis.pictures.items():
        console.print(f"{shows}: {path}", highlight=False, markup=False, soft_wrap=True)
