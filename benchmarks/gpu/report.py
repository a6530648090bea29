"""What the GPU suite found: rows and checks, printed as they come and kept in a JSON file that is always whole.

Also how a section's attempts are run: only while there is time, watched, and with the device's errors reported where
they happened.  Knows nothing of kernels or GPUs.
"""

import datetime
import faulthandler
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SAVE_INTERVAL_S = 2.0
DEVICE_LOST = 70
"""Exit code of a process whose device answers every call with an error."""

Result = TypeVar("Result")


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
        for key, kind in {"attempts": dict, "figures": dict, "rows": list, "checks": list, "errors": list}.items():
            found.setdefault(key, kind())
        return found

    @property
    def figures(self) -> dict[str, float]:
        """The figures that sections have named, by name: ceilings, and what targets are compared with."""
        merged: dict[str, float] = {}
        for section in self.content.get("sections", {}).values():
            merged |= section.get("figures", {})
        return merged


@dataclass(frozen=True, slots=True)
class Terms:
    """How a process runs attempts.

    Attributes:
        ends_at: on `time.monotonic`; no attempt starts that would not fit before it.
        limit_s: seconds after which an attempt that has not ended ends the process, twice as many for what attempts
            need; None for never.
        killed_at: on `time.monotonic`; an attempt under way ends the process then, too.
        stacks: file descriptor that gets the stacks of all threads then.
        synchronize: waits for the device; raises the errors of what ran on it.
        only: the one attempt to run; None for all.
    """

    ends_at: float = math.inf
    limit_s: float | None = None
    killed_at: float = math.inf
    stacks: int = 2
    synchronize: Callable[[], None] = lambda: None
    only: str | None = None


class PreparationError(Exception):
    """The preparation of a section's attempts failed; the report has the error."""


class Report:
    """A section's findings.

    Args:
        file: where they go.  What it already holds of this section stays: attempts listed there do not run again.
        name: the section's.
        terms: how attempts are run.
    """

    def __init__(self, file: ResultFile, name: str, terms: Terms = Terms()) -> None:
        self._file = file
        self._terms = terms
        self._columns: tuple[str, ...] = ()
        self._started = self._saved = time.monotonic()
        self._section = file.section(name)
        self._section.setdefault("started", now())
        print(f"\n== {name}", flush=True)
        file.save()

    def attempt(self, what: str, call: Callable[[], Result], *, seconds: float = 1.0) -> Result | None:
        """Runs one part of the section, waits for the device, and continues after an error, which it records.

        Args:
            what: the part's name, unique in the section.
            call: does it.  It must not make attempts of its own.
            seconds: about what it takes; where less is left it is not started.

        Returns:
            What the call returned; None where it did not run or failed.
        """
        if what in self._section["attempts"] or self._terms.only not in (None, what):
            return None
        if time.monotonic() + seconds > self._terms.ends_at:
            self._section.setdefault("left_out", []).append(what)
            self.note(f"{what}: left out, {seconds:g} s do not fit")
            return None
        result, failed = self._run(what, call)
        return None if failed else result

    def prepare(self, what: str, call: Callable[[], Result]) -> Result:
        """Makes what the attempts after it need; runs again in a process that continues the section.

        Raises:
            PreparationError: it failed, or no time is left.
        """
        if time.monotonic() > self._terms.ends_at:
            self.note(f"{what}: left out, no time is left")
            raise PreparationError(what)
        self._section["preparing"] = True
        result, failed = self._run(what, call, patience=2.0)
        del self._section["preparing"]
        if failed or result is None:
            raise PreparationError(what)
        return result

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

    def figure(self, name: str, value: float, about: str = "") -> None:
        """A figure that later sections or the targets ask for by name.

        Args:
            name: one of the constants of `benchmarks.gpu.targets`.
            value: the figure.
            about: what it was computed from, for people.
        """
        self._section["figures"][name] = _short(value)
        if about:
            self._section.setdefault("about", {})[name] = about
        self._save_now_and_then()

    def figures(self) -> dict[str, float]:
        """All named figures, those of other sections included."""
        return self._file.figures

    def note(self, text: str) -> None:
        """Something a reader of the figures should know."""
        self._columns = ()
        self._section.setdefault("notes", []).append(text)
        print(f"     {text}", flush=True)

    def error(self, what: str, error: Exception) -> None:
        """Records an error in a part of the section."""
        self._columns = ()
        trace = "".join(traceback.format_exception(error))
        self._section["errors"].append({"in": what, "traceback": trace})
        print(f"ERROR in {what}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)

    def end(self) -> None:
        """Closes the section."""
        self._section["seconds"] = round(time.monotonic() - self._started, 1)
        print(f"     {self._section['seconds']} s", flush=True)
        self._file.save()

    def _run(self, what: str, call: Callable[[], Result], patience: float = 1.0) -> tuple[Result | None, bool]:
        """What a call returned, and whether it failed; exits where the device no longer works."""
        self._section["under_way"] = what
        self._file.save()
        began, result, failed = time.monotonic(), None, False
        with self._watched(patience):
            try:
                result = call()
                self._terms.synchronize()
            except Exception as error:  # noqa: BLE001 - whatever it is belongs in the report
                failed = True
                self.error(what, error)
                self._leave_a_lost_device()
        del self._section["under_way"]
        self._section["attempts"][what] = round(time.monotonic() - began, 2)
        self._file.save()
        return result, failed

    def _leave_a_lost_device(self) -> None:
        """A CUDA error such as an illegal address stays: every later call of the process fails with it."""
        try:
            self._terms.synchronize()
        except Exception:  # noqa: BLE001 - the same error again
            self._file.save()
            os._exit(DEVICE_LOST)

    @contextmanager
    def _watched(self, patience: float) -> Iterator[None]:
        """Ends the process if what it encloses takes too long; works while another thread holds the interpreter."""
        if self._terms.limit_s is None:
            yield
            return
        limit = max(1.0, min(patience * self._terms.limit_s, self._terms.killed_at - time.monotonic()))
        faulthandler.dump_traceback_later(limit, exit=True, file=self._terms.stacks)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

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
