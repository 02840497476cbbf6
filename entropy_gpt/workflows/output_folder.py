"""
Outputs: which folders and files may be written to, and what is never deleted there. All of this is found without the
seconds that importing torch and transformers takes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from entropy_gpt.conversion.early_checks import check_page as check_suffix
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.training.files import UNFINISHED, begun_move, is_finished
from entropy_gpt.training.storage import check_file, check_folder


@dataclass(frozen=True)
class OutputKind:
    """
    What a command leaves in a folder.

    Args:
        name (`str`): What messages call it, such as `"conversion"`.
        record (`str`): The name of a file or folder that all output of this kind has.
        making (`str`): What the work is called, if it has a folder of its own.
    """

    name: str
    record: str
    making: str = ""

    def work(self, output: Path) -> Path:
        """
        The folder of unfinished work: next to the output, or inside where nothing can be moved to it from there.

        Args:
            output (`Path`): The output folder.
        """
        output = output.resolve()
        if output.exists() and (output.is_mount() or not os.access(output.parent, os.W_OK | os.X_OK)):
            return output / f"{UNFINISHED}{self.name}"
        return output.with_name(f".{self.making}-{output.name}")

    def content(self, output: Path) -> Path:
        """The folder, in that of unfinished work, of all that the output is going to hold."""
        return self.work(output) / "whole"

    def is_in(self, output: Path) -> bool:
        """
        Whether a folder holds output of this kind, finished or not.

        Raises:
            `UserError`: If it can't be written to, or holds something else.
        """
        check_folder(output)
        if not output.exists() or not any(map(is_finished, output.iterdir())):
            return False
        if not (output / self.record).exists() and not begun_move(self.content(output)).exists():
            raise UserError(f"{output} exists and holds no {self.name}: give another --output.")
        return True

    def is_replaced_in(self, output: Path, overwrite: bool) -> bool:
        """
        Whether a folder holds output of this kind, which is about to be replaced as a whole.

        Raises:
            `UserError`: If it can't be written to, holds something else, or what it holds may not be replaced.
        """
        if not self.is_in(output):
            return False
        if (output / self.record).exists() and not overwrite:
            raise UserError(f"{output} holds an earlier {self.name}: give another --output, or --overwrite.")
        return True


CONVERSION = OutputKind("conversion", "conversion_report.json", "converting")
EVALUATION = OutputKind("evaluation", "settings.json")
EXPORT = OutputKind("export", "export_report.json", "exporting")
QUICKSTART = OutputKind("quickstart", "settings.json")
BENCHMARK = OutputKind("benchmark", "measured")


def check_page(page: Path):
    """
    Refuses a page that can't be written.

    Raises:
        `UserError`: If its name ends otherwise, its folder does not exist, or it is a folder.
    """
    check_suffix(page)
    if not page.parent.exists():
        raise UserError(f"--output {page}: there is no folder {page.parent}. Make it, or give another.")
    check_file(page)


def refuse_to_delete(paths: set[Path], kind: OutputKind):
    """
    Refuses to overwrite a folder in which there are files of somebody else.

    Args:
        paths (`set[Path]`): Those files; nothing happens if there are none.
        kind ([`OutputKind`]): The output that is replaced.

    Raises:
        `UserError`: If there are any.
    """
    if paths:
        raise UserError(f"--overwrite would delete {min(paths)}, which no {kind.name} wrote: move it elsewhere.")
