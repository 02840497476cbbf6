"""Pages of text, tables and pictures, written as one HTML file that needs nothing else, or as Markdown."""

import base64
import hashlib
import itertools
import re
import struct
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


# Pictures are drawn with this many dots for one of the page's pixels, which are 96 an inch.
DOTS_PER_PIXEL = 150 / 96
# What Markdown or GitHub takes for markup.
MARKDOWN_SIGNS = re.compile(r"[\\`*_\[\]<>|~$&#]")
# The paper's way to write the shape of a tensor.
SHAPE = re.compile(r"R\^\(([0-9×]+)\)")


@dataclass(frozen=True)
class Cell:
    """
    What stands in a table.

    Args:
        text (`str`): The number or name; nothing where there is none.
        detail (`str`): What stands smaller next to it, such as a standard error.
        is_best (`bool`): Whether it is the best of those that it is compared with.
        note (`str`): The letter of the table's note about it, if there is one.
    """

    text: str
    detail: str = ""
    is_best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Column:
    """
    A column of a table.

    Args:
        title (`str`): Its heading.
        group (`str`): The heading above it, shared with the columns next to it that have the same.
        is_text (`bool`): Whether it holds words, which begin at the left.
    """

    title: str
    group: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """
    A table; the first cell of each row is its heading.

    Args:
        caption (`str`): What it shows.
        columns (`list[Column]`): Its columns.
        rows (`list[list[Cell]]`): Its rows, a cell for each column.
        notes (`dict[str, str]`): By the letter that cells have.
        remarks (`dict[str, str]`): What is to be said below it, by what it is about.
    """

    caption: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    kind = "table"

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The headings above those of the columns, and how many columns each spans; none if no column has one."""
        groups = [
            (group, len(list(columns))) for group, columns in itertools.groupby(self.columns, lambda each: each.group)
        ]
        return groups if any(group for group, _ in groups) else []


@dataclass(frozen=True)
class Picture:
    """
    A picture.

    Args:
        name (`str`): Small letters, digits and hyphens; other pictures of the page have others.
        alt (`str`): What is to be seen, for those who do not see it.
        caption (`str`): What it shows.
        png (`bytes`): The file.
    """

    name: str
    alt: str
    caption: str
    png: bytes

    kind = "picture"

    @property
    def width(self) -> int:
        """In the page's pixels."""
        return round(self._dots[0] / DOTS_PER_PIXEL)

    @property
    def height(self) -> int:
        """In the page's pixels."""
        return round(self._dots[1] / DOTS_PER_PIXEL)

    @property
    def url(self) -> str:
        """The picture itself, as an address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"

    @property
    def file_name(self) -> str:
        """A name that no other picture has, whatever is on it."""
        return f"{self.name}-{hashlib.sha256(self.png).hexdigest()[:8]}.png"

    @property
    def _dots(self) -> tuple[int, int]:
        return struct.unpack(">II", self.png[16:24])


@dataclass(frozen=True)
class Paragraph:
    """Sentences."""

    text: str

    kind = "paragraph"


@dataclass(frozen=True)
class Section:
    """
    A part of a page.

    Args:
        title (`str`): Its heading; no other section has the same.
        blocks (`list[Paragraph | Table | Picture]`): What is in it.
    """

    title: str
    blocks: list[Paragraph | Table | Picture]

    @property
    def anchor(self) -> str:
        """What it is called in addresses."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """
    A page.

    Args:
        title (`str`): Its heading.
        summary (`str`): What it says, in short.
        sections (`list[Section]`): Its parts.
    """

    title: str
    summary: str
    sections: list[Section]

    @property
    def pictures(self) -> list[Picture]:
        """All of them, in order."""
        return [block for section in self.sections for block in section.blocks if block.kind == "picture"]


def page_html(page: Page) -> str:
    """The page as HTML that loads nothing: style and pictures are in it, and it forbids all else."""
    environment = _environment(autoescape=True)
    environment.filters["shapes"] = lambda text: _raise_shapes(str(escape(text)))
    return environment.get_template("page.html").render(page=page)


def page_markdown(page: Page, folder: str) -> str:
    """
    The page as Markdown of GitHub's kind.

    Args:
        page ([`Page`]): The page.
        folder (`str`): Where its pictures lie, under their `file_name`, as part of an address.
    """
    environment = _environment(finalize=escape_markdown)
    environment.filters["shapes"] = lambda text: _raise_shapes(escape_markdown(text))
    return environment.get_template("page.md").render(page=page, folder=Markup(folder))


def escape_markdown(value: object) -> str:
    """Text that shows as it is; `Markup` is left alone."""
    return value if isinstance(value, Markup) else MARKDOWN_SIGNS.sub(r"\\\g<0>", " ".join(str(value).split()))


def _environment(**options) -> Environment:
    return Environment(
        loader=PackageLoader("entropy_gpt.evaluation.showing"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def _raise_shapes(escaped: str) -> Markup:
    """Shapes of tensors written the way mathematicians do."""
    return Markup(SHAPE.sub(r"ℝ<sup>\1</sup>", escaped))
