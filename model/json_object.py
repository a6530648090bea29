"""JsonObject: an object in a checkpoint's JSON file, whose wrong values are errors that name file and key.

Knows no key of any file.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import CheckpointError


@dataclass(frozen=True)
class JsonObject:
    """An object in a JSON file.  A key that is null reads like an absent one, as it does in Transformers.

    Each method raises CheckpointError where a value is not of its kind.

    Attributes:
        path: the file.
        values: what the object holds.
        prefix: where in the file it lies, like "rope_parameters."; empty for the whole file.
    """

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    @classmethod
    def read(cls, path: Path) -> "JsonObject | None":
        """The object that a file holds; None where there is no such file."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        return cls.parse(path, content)

    @classmethod
    def parse(cls, path: Path, content: bytes) -> "JsonObject":
        """The object that the content of a file is."""
        try:
            values = json.loads(content.decode())
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds a JSON {type(values).__name__}, needed is an object")
        return cls(path, values)

    def error(self, key: str, needed: str) -> CheckpointError:
        """What to raise when a key's value is not what is needed."""
        value = repr(self.values.get(key))
        if len(value) > 200:
            value = f"{value[:200]}…"
        return CheckpointError(f"{self.path}: {self.prefix}{key} is {value}, needed is {needed}")

    def positive_integer(self, key: str) -> int:
        """A key that has to be there."""
        value = self.values.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: {self.prefix}{key} is missing")
        if not _is_integer(value) or value < 1:
            raise self.error(key, "a positive integer")
        return int(value)

    def positive_number(self, key: str) -> float | None:
        """A finite number above zero, None where it is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not (isinstance(value, float) or _is_integer(value)) or not (0 < value < math.inf):
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """A string, None where it is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def table(self, key: str) -> "JsonObject | None":
        """An object within this one, None where it is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return JsonObject(self.path, value, prefix=f"{self.prefix}{key}.")

    def token_ids(self, key: str) -> list[int]:
        """One token id or a list of them; empty where it is absent."""
        value = self.values.get(key)
        token_ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(_is_integer(token_id) and token_id >= 0 for token_id in token_ids):
            raise self.error(key, "a token id or a list of them")
        return token_ids


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
