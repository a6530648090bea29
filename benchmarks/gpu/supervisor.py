"""Runs sections in processes of their own and continues in a new one where one has died.

A kernel that hangs, crashes or breaks the device costs only its own attempt: the next process continues after it.  The
failed attempt runs once more by itself with CUDA_LAUNCH_BLOCKING=1, so that the launch that caused
the error reports it.  Imports no torch.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import DEVICE_LOST, ResultFile
from benchmarks.gpu.sections import ATTEMPT_LIMIT_S, START_S
from benchmarks.gpu.worker import Job, has_ended, work

GRACE_S = 5.0
"""A process that has not ended this long after its time is killed: its own watchdog should have ended it."""


def run_sections(job: Job) -> None:
    """Runs all sections of a job, or those that time allows, whatever happens to processes."""
    with tempfile.TemporaryDirectory() as folder:
        stacks = Path(folder) / "stacks"
        job = replace(job, stacks=stacks)
        while True:
            ended = _process(job)
            if ended is None:
                return
            lost = _blame(job, ended, stacks)
            if lost is None:
                return
            if lost[1] and job.ends_at - time.monotonic() > START_S + ATTEMPT_LIMIT_S:
                _retry(job, lost, Path(folder) / "retry.json")
            if job.ends_at - time.monotonic() < START_S:
                return


def _process(job: Job) -> str | None:
    """Runs a job in a new process; returns how that failed, or None."""
    context: Any = multiprocessing.get_context(job.start_method)
    process = context.Process(target=work, args=(job,))
    process.start()
    finite = job.ends_at < float("inf")
    process.join(max(0.0, job.ends_at - time.monotonic()) + GRACE_S if finite else None)
    if process.is_alive():
        process.kill()
        process.join()
        return "killed: it had not ended when the time was over"
    if process.exitcode == 0:
        return None
    if process.exitcode == DEVICE_LOST:
        return "the device answers every call with this error"
    return f"its process ended with code {process.exitcode}"


def _blame(job: Job, ended: str, stacks: Path) -> tuple[str, str] | None:
    """Writes down which attempt a process died in, so that the next one continues after it.

    Returns:
        The section and the attempt; the attempt is empty where the section cannot be continued.  None when every
        section has ended.
    """
    file = ResultFile(job.out)
    name = next((name for name in job.sections if not has_ended(file, name)), None)
    if name is None:
        return None
    section = file.section(name)
    what = section.pop("under_way", "")
    where = stacks.read_text(errors="replace") if stacks.exists() else ""
    stacks.unlink(missing_ok=True)
    known = [error for error in section["errors"] if error["in"] == what]
    if not known and time.monotonic() > job.ends_at - 1:
        section.setdefault("left_out", []).append(what or name)
        print(f"     {what or name}: ended, the time is over", flush=True)
        file.save()
        return None
    if known:
        known[-1]["ended"] = ended
    else:
        section["errors"].append({"in": what or name, "traceback": f"{ended}\n{where}".strip()})
    print(f"ERROR in {what or name}: {ended}\n{where}", flush=True)
    continues = bool(what) and not section.pop("preparing", False)
    if continues:
        section["attempts"][what] = None
    else:
        section["seconds"] = None
    file.save()
    return name, what if continues else ""


def _retry(job: Job, lost: tuple[str, str], out: Path) -> None:
    """Runs one attempt again with blocking launches; what it finds goes to the attempt's error."""
    name, what = lost
    print(f"     {what}: once more with CUDA_LAUNCH_BLOCKING=1", flush=True)
    again = ResultFile(out)
    again.content = {"sections": {"ceilings": ResultFile(job.out).section("ceilings")}}
    again.content["sections"].pop(name, None)
    again.save()
    stacks = out.with_suffix(".stacks")
    deadline = min(job.ends_at, time.monotonic() + START_S + ATTEMPT_LIMIT_S)
    with _environment(CUDA_LAUNCH_BLOCKING="1"):
        ended = _process(
            replace(job, out=out, stacks=stacks, ends_at=deadline, only=lost, sections={name: job.sections[name]})
        )
    found: dict[str, Any] = ResultFile(out).section(name)
    errors = [error["traceback"] for error in found["errors"]]
    if ended is not None and not errors:
        errors = [ended + "\n" + (stacks.read_text(errors="replace") if stacks.exists() else "")]
    out.unlink()
    stacks.unlink(missing_ok=True)
    file = ResultFile(job.out)
    error = next(error for error in reversed(file.section(name)["errors"]) if error["in"] == what)
    error["with launches blocking"] = "\n".join(errors) or "no error"
    print(f"     with launches blocking: {error['with launches blocking']}", flush=True)
    file.save()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables that processes started meanwhile find set."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
