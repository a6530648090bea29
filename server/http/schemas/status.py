"""What the server says of itself, as JSON."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class Health(Struct, frozen=True):
    """The answer of the probes."""

    status: Literal["alive", "ready", "loading", "dead", "hung", "draining"]
    reason: str | UnsetType = UNSET

    @property
    def ready(self) -> bool:
        """Whether requests are served."""
        return self.status == "ready"


class Version(Struct, frozen=True):
    """The answer of GET /version."""

    version: str
