"""What the server says of itself and of its model, as JSON."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class Health(Struct, frozen=True):
    """The answer of the probes."""

    status: Literal["alive", "ready", "degraded", "loading", "dead", "hung", "draining"]
    reason: str | UnsetType = UNSET

    @property
    def ready(self) -> bool:
        """Whether requests are served: by all engines, or by some."""
        return self.status in ("ready", "degraded")


class Version(Struct, frozen=True):
    """The answer of GET /version."""

    version: str


class Model(Struct, frozen=True, tag_field="object", tag="model"):
    """A model that the server serves.

    `task` is its use, in addition to embeddings: "generate", "classify" or "token_classify".  The labels are a
    classifier's, in the order of its probabilities.  `input_modalities` has "image" if the model reads images.
    """

    id: str
    created: int
    task: str
    max_model_len: int | UnsetType = UNSET
    labels: list[str] | UnsetType = UNSET
    owned_by: str = "persimmon"
    input_modalities: tuple[str, ...] = ("text",)


class ModelList(Struct, frozen=True, tag_field="object", tag="list"):
    """The answer of GET /v1/models."""

    data: list[Model]
