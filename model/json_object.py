"""JsonObject: an object in a checkpoint's JSON file, whose wrong values are errors that name file and key.

Knows no key of any file.
"""

import json
import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon.model.errors import CheckpointError
from persimmon.model.regular_file import MAX_SMALL_FILE, read_small


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
    def read(cls, path: Path, limit: int = MAX_SMALL_FILE) -> "JsonObject | None":
        """The object that a file of at most `limit` bytes holds; None where there is no such file."""
        content = read_small(path, limit)
        return None if content is None else cls.parse(path, content)

    @classmethod
    def parse(cls, path: Path, content: bytes) -> "JsonObject":
        """The object that the content of a file is."""
        try:
            values = json.loads(content.decode())
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        except RecursionError:
            raise CheckpointError(f"{path} is not valid here: its JSON is nested too deeply") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds a JSON {type(values).__name__}; expected an object")
        return cls(path, values)

    def error(self, key: str, expected: str) -> CheckpointError:
        """What to raise when a key's value is not what is expected."""
        return CheckpointError(f"{self.path}: {self.prefix}{key} is {shown(self.values.get(key))}; expected {expected}")

    def positive_integer(self, key: str, limit: int = 2**31 - 1) -> int:
        """An integer from 1 to a limit, which has to be there."""
        value = self.values.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: {self.prefix}{key} is missing")
        if not _is_integer(value) or value < 1:
            raise self.error(key, "a positive integer")
        if value > limit:
            raise self.error(key, f"at most {limit:,}")
        return int(value)

    def positive_number(self, key: str) -> float | None:
        """A finite number above zero, None where it is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        # Integers may be larger than any float.
        if not (isinstance(value, float) or _is_integer(value)) or not (0 < value <= sys.float_info.max):
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


def shown(value: Any) -> str:
    """A value for an error message: its beginning, where it is long or deeply nested."""
    return _REPR.repr(value)


def _short_repr() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist = 3, 8, 16
    short.maxstring = short.maxlong = short.maxother = 120
    return short


_REPR = _short_repr()


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
