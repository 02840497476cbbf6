"""
What `make docs` adds to the pages of this folder: files of the repository that they link to, and the packages under
their installed names for the reference.
"""

import re
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
# Folders at the top of the repository that are installed below `entropy_gpt`.
PARTS = ("conversion", "training", "evaluation")
OUTSIDE = re.compile(r"(?<=\]\()(?:\.\./)+(?!\.)([^)#]+)")
# A type in the reference, marked up: in brackets, or with a mark at its beginning.
TYPE = re.compile(r"(?<=<code>)(?:[^<]*[`*][^<]*(?=</code>\))|`[^<]*(?=</code>))")
# Pages of the site that lie outside of docs/.
ADDED = ("CONTRIBUTING.md", "CHANGELOG.md")


@event_priority(100)  # mkdocstrings looks for the folder when its turn comes
def on_config(config):
    """Lays the packages out as they are installed, since the reference reads sources without importing them."""
    api = ROOT / "build" / "api"
    package = api / "entropy_gpt"
    package.mkdir(parents=True, exist_ok=True)
    links = {api / "modeling_entropy_gpt": ROOT / "modeling_entropy_gpt"}
    links |= {package / part: ROOT / part for part in PARTS}
    links |= {package / path.name: path for path in (ROOT / "entropy_gpt").iterdir() if path.name != "__pycache__"}
    for link, target in links.items():
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return config


def on_files(files, config):
    """Adds what pages link to outside of docs/, at its place in the repository."""
    linked = {
        target
        for page in (ROOT / "docs").rglob("*.md")
        for target in OUTSIDE.findall(page.read_text(encoding="utf-8"))
    }
    for name in sorted({*ADDED, *linked}):
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links out of docs/ lead to the files that were added."""
    if page.file.src_uri in ADDED:
        return re.sub(r"(?<=\]\()docs/", "", markdown)
    return OUTSIDE.sub(lambda found: found[1], markdown)


def on_page_content(html, page, config, files):
    """Docstrings mark up types and names as transformers' own do; the reference shows them plain."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    html = TYPE.sub(lambda found: re.sub("[`*]", "", found[0]), html)
    return re.sub(r"\[<code>~?([^<]*)</code>\]", r"<code>\1</code>", html)
