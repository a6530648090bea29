"""What a setting is, and what the sections share."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class SettingsError(ValueError):
    """A setting has an invalid value.  The message is one line for the person who set it."""


class Section(BaseModel):
    """Settings that are used together."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


def setting(
    default: Any, help: str, group: str, metavar: str | None = None, *, several: bool = False, **constraints: Any
) -> Any:
    """A setting of a section.

    Args:
        default: its value where none is given.
        help: for people: what it does, and its unit.
        group: the key in `persimmon.server.config.GROUPS` that it is listed under.
        metavar: what stands for its value in the help text.
        several: whether its flag takes several values, and may come several times.
        constraints: of pydantic's `Field`.
    """
    extra: dict[str, Any] = {"group": group, "several": several} | ({"metavar": metavar} if metavar else {})
    return Field(default, description=help, json_schema_extra=extra, **constraints)
