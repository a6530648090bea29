"""Writes the parts of docs/ that are made from the code: `make docs`.

A page holds its generated part between two comments; the rest of the page is written by hand.
"""

import ast
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from persimmon.server.config import settings_table
from persimmon.server.http.endpoints.field_table import field_table
from persimmon.server.metrics import metrics_table

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- `make docs` writes what follows from the code. -->"
END = "<!-- Here the generated part ends. -->"

_PACKAGES = ("server", "model", "kernels")


def file_list() -> str:
    """Every file of the packages with the first sentence of its docstring, one Markdown table for each folder."""
    folders: dict[str, list[str]] = {}
    for package in _PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".c", ".h"):
                name = path.relative_to(ROOT)
                folders.setdefault(str(name.parent), []).append(f"| `{name}` | {_purpose(path)} |")
    heading = "## {}/\n\n| File | |\n| --- | --- |\n"
    return "\n\n".join(heading.format(folder) + "\n".join(rows) for folder, rows in folders.items())


def _purpose(path: Path) -> str:
    """The first paragraph of a file's docstring, or of the comment that begins a C file, in one line."""
    text = path.read_text()
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = text.removeprefix("/*").partition("*/")[0].splitlines()
        docstring = "\n".join(line.strip().removeprefix("*").strip() for line in lines)
    return " ".join(docstring.strip().partition("\n\n")[0].split()).replace("|", "\\|")


GENERATED: Mapping[str, Callable[[], str]] = {
    "reference/settings.md": settings_table,
    "reference/metrics.md": metrics_table,
    "reference/fields.md": field_table,
    "design/files.md": file_list,
}
"""Pages under docs/, and what makes their generated part."""


def updated(page: str, generated: str) -> str:
    """A page with its generated part replaced.

    Raises:
        ValueError: the page does not have exactly one generated part.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"expected one generated part, between {BEGIN!r} and {END!r}")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Rewrites every page whose generated part has changed, and prints its name."""
    for name, make in GENERATED.items():
        path = ROOT / "docs" / name
        page = path.read_text()
        new = updated(page, make())
        if new != page:
            path.write_text(new)
            sys.stdout.write(f"wrote docs/{name}\n")


if __name__ == "__main__":
    main()
