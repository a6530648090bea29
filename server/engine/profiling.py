"""Records what an engine's first steps with work take, with torch's profiler, in a file that Perfetto opens.

Stands between the engine and its model; costs nothing but a call a step once it has written its file.
"""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from persimmon.model.runner import Runner
from persimmon.model.step_outcome import StepOutcome
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_plan import StepPlan
from persimmon.server.engine.step_runner import LaunchedStep, StepRunner
from persimmon.server.logs import print_line

logger = logging.getLogger(__name__)


class ProfiledRunner:
    """Runs steps, and records the first of them.

    Each step has the ranges "step N: launch" and "step N: wait"; the network and the sampler are ranges within.

    Args:
        run: runs the steps.
        parts: what it runs them with.
        steps: how many to record.
        folder: where the file goes; it exists.
    """

    def __init__(self, run: StepRunner, parts: Runner, steps: int, folder: Path) -> None:
        self._run = run
        self._steps = steps
        self._folder = folder
        self._launched = 0
        # Now, because it takes a second or more, which no step should.
        self._recording: _Recording | None = _Recording(parts)

    def prepare(self, sequence: Sequence) -> "Future[Any] | None":
        """As the runner's."""
        return self._run.prepare(sequence)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """As the runner's."""
        if self._launched == self._steps:
            return self._run.launch(plan)
        self._launched += 1
        number = self._launched
        then = self._end if number == self._steps else None
        try:
            with record_function(f"step {number}: launch"):
                return _RecordedStep(self._run.launch(plan), number, then)
        except Exception:
            if then is not None:  # nothing waits for a step that was not launched
                then()
            raise

    def _end(self) -> None:
        if self._recording is None:
            return
        recording, self._recording = self._recording, None
        path = self._folder / f"steps-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json.gz"
        try:
            recording.write(path)
        except OSError as error:
            logger.error("the profile cannot be written to %s: %s", path, error.strerror or error)
            return
        print_line(f"persimmon: the first steps are recorded in {path}, which https://ui.perfetto.dev opens")


class _Recording:
    """A profile under way."""

    def __init__(self, parts: Runner) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes notes to standard error, between lines of the log
        self._unwrap = parts.wrap_parts(_as_range)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=activities)
        self._profile.start()

    def write(self, path: Path) -> None:
        """Ends it."""
        self._profile.stop()
        self._unwrap()
        self._profile.export_chrome_trace(str(path))


class _RecordedStep:
    def __init__(self, launched: LaunchedStep, number: int, then: Callable[[], None] | None) -> None:
        self._launched = launched
        self._number = number
        self._then = then

    def wait(self) -> StepOutcome:
        try:
            with record_function(f"step {self._number}: wait"):
                return self._launched.wait()
        finally:
            if self._then is not None:
                self._then()


def _as_range(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(*arguments: Any) -> Any:
        with record_function(name):
            return part(*arguments)

    return recorded
