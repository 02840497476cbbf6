"""The documentation's pages, and the code and commands on them."""

import re
from dataclasses import dataclass, replace
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS, ROOT / "evaluation/lm_eval_tasks/README.md"]

# The language of blocks that show what the block above them prints.
OUTPUT = "text"


@dataclass(frozen=True)
class Block:
    """
    The lines between two fences.

    Args:
        page (`str`): The page's path, relative to the project's root.
        line (`int`): The line number of the first fence.
        language (`str`): The words after the first fence.
        text (`str`): The lines between the fences.
        output (`str`, *optional*): The block of language `text` that follows: what the code prints.
    """

    page: str
    line: int
    language: str
    text: str
    output: str | None = None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Each as it is typed; a server and who asks it, also by a gateway, are one."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        commands = [line for line in lines if line.strip()]
        for index, command in enumerate(commands):
            if command.startswith("entropy-gpt private serve"):
                count = 3 if commands[index + 1].startswith("entropy-gpt private gateway") else 2
                commands[index : index + count] = ["\n".join(commands[index : index + count])]
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
                text = "\n".join(lines[opened + 1 : number]) + "\n"
                if language == OUTPUT:
                    blocks[-1] = replace(blocks[-1], output=text)
                else:
                    blocks.append(Block(name, opened + 1, language, text))
                opened = None
    assert opened is None, f"{name}:{opened + 1} is never closed"
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
