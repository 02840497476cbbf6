"""Pages: what is written is what shows, in HTML and in Markdown."""

import io
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from entropy_gpt.evaluation.showing.page import (
    Cell,
    Column,
    Page,
    Paragraph,
    Picture,
    Section,
    Table,
    page_html,
    page_markdown,
)


STRANGE = "<script>alert(1)</script> & \"x\" 'y' a|b *c* _d_ `e` [f](g) ![h](i) ~~j~~ $k$ \\ # l <b> http://m.n"
SHAPE = "144 × R^(128×128)"


def png(width=300, height=150):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def page():
    table = Table(
        caption=STRANGE,
        columns=[
            Column("model", is_text=True),
            Column(STRANGE, "group"),
            Column("b", "group"),
            Column(STRANGE, "", True),
        ],
        rows=[
            [Cell(STRANGE, STRANGE), Cell("1.5", "± 0.1", is_best=True), Cell("2.5", note="A"), Cell(STRANGE)],
            [Cell("second"), Cell(""), Cell(SHAPE), Cell("")],
        ],
        notes={"A": STRANGE},
        remarks={"Signs": f"{STRANGE} {SHAPE}"},
    )
    blocks = [Paragraph(STRANGE), table, Picture("a-picture", STRANGE, STRANGE, png())]
    return Page(STRANGE, STRANGE, [Section("First part", blocks), Section("Second", [Paragraph("end")])])


class Elements(HTMLParser):
    """The elements of a page, each with its attributes, and the text outside of the style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        self._open.pop()
        while self._open and self._open[-1] in ("meta", "link", "img"):
            self._open.pop()

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_strange_names_are_text_and_nothing_else(page):
    html = Elements(page_html(page))
    tags = {tag for tag, _ in html.elements}
    assert not tags & {"script", "b", "em", "code", "del"}
    # Summary, heading, title, paragraph, caption, headings of columns, cells, note, remark, caption of the picture.
    assert sum(text.count(STRANGE) for text in html.texts) == 13
    (image,) = html.all("img")
    assert image["alt"] == STRANGE


def test_nothing_is_loaded_and_all_else_is_forbidden(page):
    html = Elements(page_html(page))
    policy = next(each["content"] for each in html.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    addresses = [value for _, each in html.elements for name, value in each.items() if name in ("src", "href")]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "url(" not in page_html(page)
    assert "@import" not in page_html(page)


def test_every_place_that_is_linked_to_is_there(page):
    html = Elements(page_html(page))
    ids = [each["id"] for _, each in html.elements if "id" in each]
    assert len(ids) == len(set(ids))
    references = [each["href"].removeprefix("#") for each in html.all("a")]
    references += [each["aria-labelledby"] for _, each in html.elements if "aria-labelledby" in each]
    assert set(references) <= set(ids)
    assert {"first-part", "second"} <= set(references)


def test_tables_can_be_read_aloud(page):
    html = Elements(page_html(page))
    scopes = [each.get("scope") for each in html.all("th")]
    assert scopes == ["colgroup", "col", "col", "col", "col", "row", "row"]
    assert html.all("th")[0]["colspan"] == "2"
    assert len(html.all("caption")) == len(html.all("table")) == 1
    assert " (best)" in html.texts
    (note,) = [each for each in html.all("a") if each.get("class") == "note"]
    assert note["aria-label"] == "note A: other conditions"
    assert note["href"] == "#block-1-2-A"


def test_headings_do_not_skip_a_level(page):
    levels = [int(tag[1]) for tag, _ in Elements(page_html(page)).elements if re.fullmatch(r"h\d", tag)]
    assert levels == [1, 2, 2]


def test_shapes_are_written_as_powers(page):
    assert page_html(page).count("144 × ℝ<sup>128×128</sup>") == 2
    assert page_markdown(page, "p").count("144 × ℝ<sup>128×128</sup>") == 2


def test_pictures_have_the_size_that_they_show_in():
    picture = Picture("a", "b", "c", png(300, 150))
    assert (picture.width, picture.height) == (192, 96)


def test_other_pictures_have_other_file_names():
    first, second = (Picture("a", "b", "c", png(size)) for size in (10, 11))
    assert first.file_name != second.file_name
    assert first.file_name == Picture("a", "", "", png(10)).file_name
    assert re.fullmatch(r"a-[0-9a-f]{8}\.png", first.file_name)


def rendered_markdown(text):
    """As GitHub does it, as far as tables, strikethrough and HTML go."""
    return Elements(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))


def test_markdown_shows_strange_names_as_they_are(page):
    html = rendered_markdown(page_markdown(page, "pictures"))
    tags = [tag for tag, _ in html.elements]
    assert not set(tags) & {"script", "b", "em", "code", "del"}
    assert tags.count("tr") == 3
    assert tags.count("td") == 8
    (image,) = html.all("img")
    assert image["alt"] == STRANGE
    assert image["src"] == f"pictures/{page.pictures[0].file_name}"
    text = "".join(html.texts)
    assert text.count(STRANGE) == 12
    assert tags.count("strong") == 2  # the best, and the name of the remark


def test_markdown_keeps_sections_and_notes_apart(page):
    html = rendered_markdown(page_markdown(page, "pictures"))
    assert [tag for tag, _ in html.elements if re.fullmatch(r"h\d", tag)] == ["h1", "h2", "h2"]
    assert len(html.all("li")) == 1
