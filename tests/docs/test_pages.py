"""Pages that people read: short where they must be, and every link, file and module that they name exists."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FOLDERS = "server|model|kernels|persimmon|tests|benchmarks|deploy|tools|docs|examples"


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links() -> Iterator[Any]:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]*)\)", prose(page)):
            if not target.startswith(("http://", "https://")):
                yield pytest.param(page, target, id=f"{page.relative_to(ROOT)}: {target}")


def modules() -> set[str]:
    """The names, without folders, of every Python and C file."""
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS.split("|") for file in (ROOT / folder).rglob("*"))]
    return {file.name for file in files if file.suffix in (".py", ".c", ".h")}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize(("page", "target"), list(links()))
def test_links_lead_somewhere(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    linked = page.parent / name if name else page
    assert linked.exists()
    if anchor:
        assert anchor in anchors(linked)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    text = prose(page)
    paths = re.findall(rf"(?<![\w/.~-])(?:{FOLDERS})(?:/[\w.-]*\w)+", text)
    # Capitals stand for a part of the name that differs: gpu_DEVICE.json.
    assert [path for path in paths if not re.search("[A-Z]{2}", path) and not (ROOT / path).exists()] == []
    named = re.findall(r"(?<![\w/.*-])\w+\.(?:py|c|h)\b", text)
    assert [name for name in named if name not in modules()] == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if page != "README.md" and f"({page})" not in index] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, open_pages = set[Path](), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop().resolve()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        open_pages += [page.parent / target.partition("#")[0] for target in re.findall(r"\]\(([^)]*)\)", prose(page))]
    assert [page.name for page in PAGES if page.resolve() not in seen] == []
