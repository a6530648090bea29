"""What the GPU suite found: rows and checks, printed as they come and kept in a JSON file that is always whole.

Knows nothing of kernels or GPUs.
"""

import datetime
import json
import math
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SAVE_INTERVAL_S = 2.0


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class ResultFile:
    """The JSON file of a run: what describes it, and its sections by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def save(self) -> None:
        """Writes the file atomically: readers see the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(beside, self.path)

    def section(self, name: str) -> dict[str, Any]:
        """What a section has found; made when there is none."""
        found: dict[str, Any] = self.content.setdefault("sections", {}).setdefault(name, {})
        return found

    @property
    def figures(self) -> dict[str, float]:
        """The figures that sections have named, by name: ceilings, and what targets are compared with."""
        merged: dict[str, float] = {}
        for section in self.content.get("sections", {}).values():
            merged |= section.get("figures", {})
        return merged


class Report:
    """A section's findings.

    Args:
        file: where they go.
        name: the section's; what the file has under it is replaced.
    """

    def __init__(self, file: ResultFile, name: str) -> None:
        self._file = file
        self._columns: tuple[str, ...] = ()
        self._started = self._saved = time.monotonic()
        self._section = file.section(name)
        self._section.clear()
        self._section |= {"started": now(), "figures": {}, "rows": [], "checks": [], "errors": []}
        print(f"\n== {name}", flush=True)
        file.save()

    def row(self, table: str, **values: Any) -> None:
        """A line of a table."""
        self._section["rows"].append({"table": table} | {key: _short(value) for key, value in values.items()})
        if (columns := (table, *values)) != self._columns:
            self._columns = columns
            print(" ".join([f"{table:<20}", *(_cell(key, value) for key, value in values.items())]))
        print(" ".join([" " * 20, *(_cell(_shown(value), value) for value in values.values())]), flush=True)
        self._save_now_and_then()

    def check(self, name: str, passed: bool, **details: Any) -> None:
        """Whether something that must hold does."""
        self._columns = ()
        self._section["checks"].append({"name": name, "passed": passed} | {k: _short(v) for k, v in details.items()})
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in details.items())
        print(f"{'ok  ' if passed else 'FAIL'} {name}{': ' if shown else ''}{shown}", flush=True)
        self._save_now_and_then()

    def figure(self, name: str, value: float) -> None:
        """A figure that later sections or the targets ask for by name."""
        self._section["figures"][name] = _short(value)
        self._save_now_and_then()

    def figures(self) -> dict[str, float]:
        """All named figures, those of other sections included."""
        return self._file.figures

    def note(self, text: str) -> None:
        """Something a reader of the figures should know."""
        self._columns = ()
        self._section.setdefault("notes", []).append(text)
        print(f"     {text}", flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Goes on after an error in what it encloses, once that is written down."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is belongs in the report
            self._columns = ()
            self._section["errors"].append({"in": what, "traceback": traceback.format_exc()})
            print(f"ERROR in {what}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            self._file.save()

    def end(self) -> None:
        """Closes the section."""
        self._section["seconds"] = round(time.monotonic() - self._started, 1)
        print(f"     {self._section['seconds']} s", flush=True)
        self._file.save()

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self._saved > SAVE_INTERVAL_S:
            self._file.save()
            self._saved = time.monotonic()


def _short(value: Any) -> Any:
    """Five digits are more than any measurement has; JSON has no infinity and no NaN."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)


def _cell(text: str, value: Any) -> str:
    """Words to the left, in wide columns; numbers to the right."""
    return f"{text:<24}" if isinstance(value, str) else f"{text:>11}"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return str(value)
