"""What the engine needs of a model: it takes a plan and brings its outcome."""

from concurrent.futures import Future
from typing import Any, Protocol

from persimmon.model.step_outcome import StepOutcome
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_plan import StepPlan


class EngineBrokenError(RuntimeError):
    """A step failed in a way that no later step can succeed after."""


class NoRoomError(ValueError):
    """There is no room for a sequence now; a sentence for the client, who may try again."""


class LaunchedStep(Protocol):
    """A step that has been started."""

    def wait(self) -> StepOutcome:
        """What came of it, as soon as it has ended; an exception where it failed."""
        ...


class StepRunner(Protocol):
    """What the engine needs of a model."""

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Starts a step; the one before it may still be under way."""
        ...

    def prepare(self, sequence: Sequence) -> "Future[Any] | None":
        """Starts what a sequence and its forks need before they may run; None when that is nothing.

        Returns:
            Done when they may run; fails with a ValueError, a sentence for the client, when they cannot.

        Raises:
            ValueError: they cannot, as is known at once: a sentence for the client.
        """
        ...
