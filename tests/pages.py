"""The pages that tell readers what to run, and the code and commands on them."""

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, ROOT / "evaluation/lm_eval_tasks/README.md"]


@dataclass(frozen=True)
class Block:
    """
    What a page has between two fences.

    Args:
        page (`str`): Relative to the project's root.
        line (`int`): Of the first fence.
        language (`str`): What is said after it.
        text (`str`): What is between them.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Each as it is typed; a server and who asks it are one."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        commands = [line for line in lines if line.strip()]
        for index, command in enumerate(commands):
            if command.startswith("entropy-gpt private serve"):
                commands[index : index + 2] = ["\n".join(commands[index : index + 2])]
        return commands


def read_blocks(page: Path) -> list[Block]:
    name, blocks, opened = page.relative_to(ROOT).as_posix(), [], None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            if opened is None:
                opened = number
            else:
                language = lines[opened].strip().removeprefix("```")
                blocks.append(Block(name, opened + 1, language, "\n".join(lines[opened + 1 : number]) + "\n"))
                opened = None
    assert opened is None, f"{name}:{opened + 1} is never closed"
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
