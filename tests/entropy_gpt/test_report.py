"""`entropy-gpt report` from end to end, misused, and its pages in a browser."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.records.results import save_results
from entropy_gpt.terminal import report as report_command
from entropy_gpt.training.claims import claimed
from entropy_gpt.workflows import report as report_workflow
from entropy_gpt.workflows.report import merge_results, read_inputs
from tests.browser import Browser, find_browser
from tests.dots import save_dots
from tests.evaluation.example_results import (
    example_cost,
    example_heads,
    example_likelihood,
    example_result,
    example_results,
)
from tests.evaluation.test_run_log import (
    ALL_FIGURES,
    LOG_NAME,
    entropy_line,
    evaluation_line,
    loss_line,
    penalty_line,
    run_line,
    write_log,
)
from tests.slow import in_turn

from .forks import run_command


ATTACK = "<script>alert(1)</script>"
PHONE = 400
# One of perplexity against cost, two each of positions and frequencies for there are two contexts, entropies,
# quantiles, the heads of three models, and five of the run.
PICTURES = 15


def run(*arguments, folder):
    return run_command("report", *arguments, cwd=folder)


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_run(folder, notation="SM"):
    lines = [entropy_line(0, **ALL_FIGURES), penalty_line(20, 3.25), evaluation_line(20)]
    return write_log(folder, run_line(notation), *lines)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with results of models and a training run."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "evaluation").mkdir()
    other = example_result("other", likelihood=example_likelihood(2.0, context=64, vocab_size=1024))
    attack = example_result(ATTACK, heads=example_heads(layers=2, heads=2), costs=[example_cost(3)])
    results = [*example_results(), other, attack]
    for result, heads in zip(results, (None, None, *[example_heads(layers=4, heads=4)] * 2), strict=False):
        result.heads = heads
    save_results(results, folder / "evaluation" / "results.json")
    write_run(folder / "run")
    return folder


@pytest.fixture(scope="module")
def pages(inputs):
    """The pages of all that, and of counts alone, in HTML and Markdown."""
    save_results([example_result("a", "SM+LN+G"), example_result("b", "SM")], inputs / "counts.json")
    process = run("evaluation", "run", folder=inputs)
    assert process.returncode == 0, process.stderr
    assert (process.stdout, process.stderr) == ("page about 6 models and 1 training run: report.html\n", "")
    with pytest.MonkeyPatch.context() as patch:
        save_dots(patch)
        report_command.run([inputs / "evaluation", inputs / "run" / LOG_NAME], inputs / "page of all.md")
    report_command.run([inputs / "counts.json"], inputs / "counts.html")
    return inputs


def test_the_page_is_one_file(pages):
    html = (pages / "report.html").read_text()
    assert "Evaluation of 6 models" in html
    assert html.count("data:image/png;base64,") == html.count("<img ") == PICTURES
    assert ATTACK not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_the_markdown_page_has_its_pictures_beside_it(pages):
    markdown = (pages / "page of all.md").read_text()
    pictures = re.findall(r"\]\(page%20of%20all_pictures/([a-z0-9-]+\.png)\)", markdown)
    assert len(pictures) == len(set(pictures)) == PICTURES
    assert contents(pages / "page of all_pictures") == sorted(pictures)
    for name in pictures:
        with Image.open(pages / "page of all_pictures" / name) as picture:
            picture.verify()
    assert ATTACK not in markdown


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(find_browser(), tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.mark.parametrize(
    ("page", "width", "dark"), in_turn(["report.html", "counts.html"], [PHONE, 1200], [False, True])
)
def test_a_browser_shows_all_of_the_page_and_complains_of_nothing(page, width, dark, pages, browser, tmp_path):
    url = (pages / page).as_uri()
    browser.open(url, width, dark=dark)
    assert browser.requests() == [url]
    assert browser.complaints() == []
    widths = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == (PICTURES if page == "report.html" else 0)
    assert all(natural > 100 for natural in widths)
    shown, needed = browser.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    assert needed <= shown <= width
    inside = """[...document.querySelectorAll('h1, h2, p, dl, nav, figcaption, .scroll')].every(
        element => element.getBoundingClientRect().right <= document.documentElement.clientWidth)"""
    assert browser.evaluate(inside)
    assert browser.evaluate("document.querySelectorAll('script').length") == 0
    ink, ground = browser.evaluate(
        "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"
    )
    assert (sum(ink) > sum(ground)) == dark
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert len(picture.convert("L").getcolors()) > 50


def test_a_browser_would_complain(browser, tmp_path):
    """What the test above relies on."""
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    (tmp_path / "page.html").write_text(f"{policy}<img src='https://localhost:9/x.png'><script>alert(1)</script>")
    browser.open((tmp_path / "page.html").as_uri(), PHONE)
    assert len(browser.complaints()) >= 2
    (tmp_path / "page.html").write_text("<img src='missing.png'><div style='width: 999px'>x</div>")
    browser.open((tmp_path / "page.html").as_uri(), PHONE)
    assert len(browser.requests()) == 2
    assert browser.evaluate("document.images[0].naturalWidth") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") > PHONE


def test_the_page_is_printed_on_white(pages, browser, tmp_path):
    browser.open((pages / "report.html").as_uri(), 1200, dark=True)
    browser.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_a_page_that_fails_leaves_the_one_before(pages, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left")

    for name, function in (("report.html", "page_html"), ("report.md", "page_markdown")):
        output = tmp_path / name
        output.write_text("before")
        monkeypatch.setattr(report_workflow, function, fail)
        with pytest.raises(OSError, match="no space left"):
            report_command.run([pages / "counts.json"], output)
        assert output.read_text() == "before"
    assert [name for name in contents(tmp_path) if "unfinished" in name] == []


def test_one_process_at_a_time_writes_a_page(tmp_path):
    save_results([example_result("a", "SM")], tmp_path / "a.json")
    page = tmp_path / "page.html"
    with (
        claimed(tmp_path / ".writing-page.html", output=page),
        pytest.raises(UserError, match=r"Another command is at work in .*page\.html: process \d+"),
    ):
        report_command.run([tmp_path / "a.json"], page)
    report_command.run([tmp_path / "a.json"], page)
    assert contents(tmp_path) == ["a.json", "page.html"]


def test_pictures_of_an_earlier_page_are_deleted_and_nothing_else(tmp_path, undrawn):
    pictures = tmp_path / "report_pictures"
    results = example_results(tasks=False)
    for count in (3, 2):
        for result in results:
            result.heads = None
        save_results(results[:count], tmp_path / "results.json")
        report_command.run([tmp_path / "results.json"], tmp_path / "report.md")
        (pictures / "mine.png").write_bytes(b"")
    markdown = (tmp_path / "report.md").read_text()
    assert set(re.findall(r"\(report_pictures/(.+?)\)", markdown)) == set(contents(pictures)) - {"mine.png"}


def test_what_several_files_tell_of_one_model_becomes_one(tmp_path):
    predicted = example_result("model", likelihood=example_likelihood(), costs=[example_cost(1)])
    costs = example_result("model", costs=[example_cost(1), example_cost(2)])
    heads = example_result("model", heads=example_heads())
    (merged,) = merge_results({Path("a"): [predicted], Path("b"): [costs], Path("c"): [heads]})
    assert merged == dataclasses.replace(predicted, heads=heads.heads, costs=costs.costs)
    assert predicted.heads is None


def test_models_of_one_name_are_told_apart_by_their_files(tmp_path):
    first = example_result("model", likelihood=example_likelihood(2))
    otherwise = example_result("model", likelihood=example_likelihood(2, context=64))
    another = dataclasses.replace(first, weights="sha256:1")
    alone = example_result("alone")
    for second in (otherwise, another):
        results = merge_results({Path("a/results.json"): [first, alone], Path("b/results.json"): [second]})
        assert [result.name for result in results] == ["model (a)", "alone", "model (b)"]
    results = merge_results({Path("a/results.json"): [first], Path("a/others.json"): [another]})
    assert [result.name for result in results] == ["model (a/results.json)", "model (a/others.json)"]
    with pytest.raises(UserError, match="a calls two models 'model'"):
        merge_results({Path("a"): [first, another]})
    taken = dataclasses.replace(alone, name="model (b)")
    with pytest.raises(UserError, match=r"Two models would be called 'model \(b\)'"):
        merge_results({Path("a/x"): [first, taken], Path("b/x"): [another]})


def test_a_folder_may_hold_results_and_a_run(tmp_path):
    save_results(example_results(), write_run(tmp_path / "both") / "results.json")
    results, runs = read_inputs([tmp_path / "both"])
    assert (len(results), len(runs)) == (4, 1)


@pytest.mark.parametrize(
    ("given", "output", "message"),
    [
        (["nowhere"], "report.html", "There is no nowhere. Give files of results"),
        (["empty"], "report.html", r"empty holds neither results.json nor training_log.jsonl"),
        (["run"], "report.html", "run: no results of models"),
        (["none.json"], "report.html", "none.json: no results of models"),
        (["broken.json"], "report.html", "broken.json can't be read: it is no JSON"),
        (["field.json"], "report.html", r"field.json is broken: 0\.name"),
        (["schema.json"], "report.html", "schema.json is of schema version 1, where 2 is read"),
        (["kind.json"], "report.html", "kind.json holds a conversion, not results of models"),
        (["good.json", "good.json"], "report.html", "good.json is given twice"),
        (["good.json", "run", f"run/{LOG_NAME}"], "report.html", "training_log.jsonl is given twice"),
        (["good.json", "damaged"], "report.html", "line 2 is damaged"),
        (["good.json"], "report.pdf", "--output report.pdf: the name of a page ends in .html or .md"),
        (["good.json"], "report", "--output report: the name of a page ends in"),
        (["good.json"], "missing/report.html", "there is no folder missing"),
        (["good.json"], "folder.html", "--output folder.html is a folder"),
    ],
)
def test_what_can_not_be_done_is_told_and_nothing_is_written(given, output, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "folder.html"):
        Path(folder).mkdir()
    write_run(Path("run"))
    write_log(Path("damaged"), run_line(), '{"kind": "log', loss_line(1))
    save_results(example_results(), Path("good.json"))
    header = json.loads(Path("good.json").read_text())
    changes = {"none": {"content": []}, "field": {"content": [{}]}, "schema": {"schema_version": 1}}
    changes["kind"] = {"kind": "a conversion"}
    for name, change in changes.items():
        Path(f"{name}.json").write_text(json.dumps({**header, **change}))
    Path("broken.json").write_text("{")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        report_command.run([Path(path) for path in given], Path(output))
    assert contents(tmp_path) == before


def test_misuse_is_one_line(tmp_path):
    for arguments, status in ((["nowhere"], 1), ([], 2)):
        process = run(*arguments, folder=tmp_path)
        assert process.returncode == status
        (line,) = process.stderr.splitlines()
        assert line.startswith("entropy-gpt: ")
        assert process.stdout == ""
    assert contents(tmp_path) == []


def test_help_shows_an_example(tmp_path):
    process = run("--help", folder=tmp_path)
    assert process.returncode == 0
    assert "Example: entropy-gpt report evaluation_output" in process.stdout
