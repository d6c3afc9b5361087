"""Files, functions and sections that the documents name are there."""

import ast
import re

import pytest

from minitron.stages.compress import STAGES
from tests.docs.blocks import FENCED, PAGES, ROOT

FOLDERS = (ROOT, ROOT / "minitron", ROOT / "benchmarks")
FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|sh|sbatch|yaml|md|svg)")
# what a run leaves, or a reader has, is called so too
OTHERS = {"config.yaml", "hf/README.md"}


def text_of(page):
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def found(name, page):
    """The file that a page means: from the root, the package, the benchmarks or the page's own folder; of a bare name, anywhere in the package."""
    near = [folder / name for folder in (*FOLDERS, page.parent)]
    return next((path for path in (*near, *(ROOT / "minitron").rglob(name)) if path.is_file()), None)


def names_in(path):
    """Everything that a file of Python defines or assigns, at any depth; `Class.method` by its last part."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_functions_are_there(page):
    missing = []
    for span in re.findall(r"`([^`\n]+)`", text_of(page)):
        name, _, member = span.partition(": ")
        if not FILE.fullmatch(name) or name in OTHERS or "VERB" in name:
            continue
        path = found(name, page)
        if path is None:
            missing.append(name)
        elif re.fullmatch(r"[\w.]+", member) and member.split(".")[-1] not in {*names_in(path)}:
            missing.append(span)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    missing = []
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page)):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(target)
    assert not missing


def test_the_picture_has_every_folder_and_stages_that_there_are():
    texts = re.findall(r"<text ([^>]*)>([^<]+)</text>", (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8"))
    folders = {path.name for path in (ROOT / "minitron").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= {text.removesuffix("/") for _, text in texts if text.endswith("/")}
    drawn = [text for style, text in texts if 'y="60"' in style]  # the boxes of the first row
    assert drawn[-1] == "report"
    assert drawn[:-1] == [stage for stage in STAGES if stage in drawn]
