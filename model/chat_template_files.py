"""Where a checkpoint keeps its chat templates: files of their own, or tokenizer_config.json.

Knows nothing of what a template says, and does not load Jinja2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject
from persimmon.model.tokenizer_settings import SETTINGS_FILE

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"

DEFAULT, TOOL_USE = "default", "tool_use"
"""The names of the template of any conversation, and of the one for conversations with tools."""

_MAX_SOURCE_BYTES = 2**20


class ChatTemplateError(ValueError):
    """A conversation that the template cannot render. The message is the end of a sentence for the client."""


@dataclass(frozen=True)
class TemplateSources:
    """The templates of a checkpoint.

    Attributes:
        texts: by name, always with DEFAULT; of the others only TOOL_USE is used.
        place: the file, for messages.
    """

    texts: Mapping[str, str]
    place: Path

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """The templates of a checkpoint folder; None where it has none.

        Separate files take precedence over "chat_template" in tokenizer_config.json, as in Transformers.

        Raises:
            CheckpointError: a file cannot be read, or there are templates and none of them is the default.
        """
        place, texts = folder / TEMPLATE_FILE, {}
        if place.exists():
            texts[DEFAULT] = _read(place)
        if (folder / TEMPLATE_FOLDER).is_dir():
            texts |= {path.stem: _read(path) for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
        if not texts:
            settings = JsonObject.read(folder / SETTINGS_FILE)
            if settings is None or settings.values.get("chat_template") is None:
                return None
            place, texts = settings.path, _named_texts(settings)
        if DEFAULT not in texts:
            raise CheckpointError(
                f"{place}: none of the chat templates ({', '.join(sorted(texts))}) is named 'default'"
            )
        return cls({name: text for name, text in texts.items() if name in (DEFAULT, TOOL_USE)}, place)


def _read(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        if path.stat().st_size > _MAX_SOURCE_BYTES:
            raise CheckpointError(
                f"{path}: has {path.stat().st_size} bytes; a template has at most {_MAX_SOURCE_BYTES}"
            )
        return path.read_text("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None


def _named_texts(settings: JsonObject) -> dict[str, str]:
    """The value of "chat_template": one template, or several with names."""
    value = settings.values["chat_template"]
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        value = {each.get("name"): each.get("template") for each in value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for entry in value.items() for text in entry):
        raise settings.error("chat_template", "a template, or a list of objects with a name and a template")
    return value
