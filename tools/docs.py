"""Writes the parts of README.md and docs/ that are made from the code: `make docs`.

A generated part is between two comments.  An example follows a comment with its file's name.  The rest of a page is
written by hand.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from persimmon.server import config
from persimmon.server.http.endpoints.field_table import field_table
from persimmon.server.metrics import metrics_table

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- `make docs` writes what follows from the code. -->"
END = "<!-- Here the generated part ends. -->"

_PACKAGES = ("server", "model", "kernels")


def settings_tables() -> str:
    """Every setting, one Markdown table for each group."""
    groups: dict[str, list[str]] = {}
    for name, field in config.listed():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        shown = f"`{config.flag(name)} {extra['metavar']}`" if "metavar" in extra else f"`{config.flag(name)}`"
        if field.annotation is bool:
            shown += f", `{config.flag('no_' + name)}`"
        allowed = config.choices(field)
        values = f" One of {', '.join(f'`{value}`' for value in allowed)}." if allowed else ""
        default = config.default_text(field)
        shown_default = f"`{default}`" if default is not None else "see text"
        row = f"| {shown} | `{config.environment_variable(name)}` | {shown_default} | {field.description}{values} |"
        groups.setdefault(config.group(field), []).append(row)
    heading = "## {}\n\n| Flag | Environment | Default | |\n| --- | --- | --- | --- |\n"
    titles = {key: title[0].upper() + title[1:] for key, title in config.GROUPS.items()}
    return "\n\n".join(heading.format(titles[key]) + "\n".join(groups[key]) for key in titles if key in groups)


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


def roofline_table() -> str:
    """Predicted times of a decode step's launches, as `python -m benchmarks.roofline` wrote them."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "roofline_8b.json").read_text())
    cells: dict[str, dict[tuple[str, int], str]] = {}
    for row in recorded["predicted"]:
        times = " → ".join(f"{row[key]:,.1f}" for key in ("before_us", "us") if key in row)
        cells.setdefault(row["launch"], {})[row["card"], row["batch"]] = f"{times}, {row['share']:.0%}"
    return _table(cells, sorted({place for launch in cells.values() for place in launch}))


def fewer_bits_table() -> str:
    """Predicted times of steps with quantized weights, and of attention over 8-bit caches.

    As `python -m benchmarks.roofline_quantized` wrote them.
    """
    recorded = json.loads((ROOT / "benchmarks" / "results" / "roofline_quantized_8b.json").read_text())
    named = [(f"step, {row['launch'][6:] or 'dense'}, {row['weights']}", row) for row in recorded["predicted"]]
    named = [(name, row) for name, row in named if row["launch"].startswith("step")]
    named += [(f"attention, cache {row['cache']}", row) for row in recorded["attention"]]
    cells: dict[str, dict[tuple[str, int], str]] = {}
    for name, row in named:
        share = f", {row['floor_us'] / row['us']:.0%}" if "floor_us" in row else ""
        cells.setdefault(name, {})[row["card"], row["batch"]] = f"{row['us']:,.1f}{share}"
    return _table(cells, sorted({place for at in cells.values() for place in at}))


def _table(cells: Mapping[str, Mapping[tuple[str, int], str]], places: Sequence[tuple[str, int]]) -> str:
    heading = " | ".join(f"{card}, batch {batch}" for card, batch in places)
    lines = [f"| µs | {heading} |", f"| --- |{' ---: |' * len(places)}"]
    lines += [f"| {name} | {' | '.join(at.get(place, '') for place in places)} |" for name, at in cells.items()]
    return "\n".join(lines)


GENERATED: Mapping[str, Callable[[], str]] = {
    "reference/settings.md": settings_tables,
    "reference/metrics.md": metrics_table,
    "reference/fields.md": field_table,
    "design/files.md": file_list,
    "design/gpu-kernels.md": lambda: f"{roofline_table()}\n\n{fewer_bits_table()}",
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


EXAMPLE = re.compile(r"<!-- (?P<file>examples/\S+) -->\n```(?P<language>\w+)\n(?P<code>.*?)```\n", re.DOTALL)
"""A block of code in a page that shows a file of examples/."""


def with_examples(page: str) -> str:
    """A page with each block that shows an example replaced by the example's file."""

    def block(shown: re.Match[str]) -> str:
        code = (ROOT / shown["file"]).read_text()
        return f"<!-- {shown['file']} -->\n```{shown['language']}\n{code}```\n"

    return EXAMPLE.sub(block, page)


def pages() -> dict[Path, str]:
    """README.md and every page of docs/, each with the text that it should have."""
    current = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
    wanted = {path: with_examples(page) for path, page in current.items()}
    for name, make in GENERATED.items():
        path = ROOT / "docs" / name
        wanted[path] = updated(wanted[path], make())
    return wanted


def main() -> None:
    """Rewrites every page whose text should be another, and prints its name."""
    for path, page in pages().items():
        if path.read_text() != page:
            path.write_text(page)
            sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
