"""The small files next to a tokenizer: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

Knows Transformers' keys and which file wins.  Knows nothing of vocabularies or of how text becomes tokens.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject

END_OF_TEXT = "|ENDOFTEXT|"
"""The piece that begins and ends a text in Adept's vocabularies."""

SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"

MAX_TOKEN_ID = 1 << 24
"""A larger one is a mistake in the file, found before a table is made for it."""

_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text by its spelling, whatever the model of the vocabulary makes of the rest.

    Attributes:
        token_id: its id.
        content: its spelling.
        special: whether it is left out of answers.
        normalized: whether it is looked for in the normalized text.
        lstrip: whether it takes the white space before it.
        rstrip: whether it takes the white space after it.
        single_word: whether it is found only where no word character stands next to it.
    """

    token_id: int
    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files say.

    Attributes:
        add_bos: whether texts begin with BOS; None where no file says.
        add_eos: whether texts end with EOS; None where no file says.
        bos_token: the piece that begins a text.
        eos_token: the piece that ends a text.
        boundaries: pieces that begin or end a text.
        special: other pieces that are not text.
        named: the tokens that have a name, like "bos_token", as chat templates see them.
        added: tokens added to the vocabulary, by id.
    """

    add_bos: bool | None = None
    add_eos: bool | None = None
    bos_token: str = END_OF_TEXT
    eos_token: str = END_OF_TEXT
    boundaries: frozenset[str] = frozenset({END_OF_TEXT})
    special: frozenset[str] = frozenset()
    named: Mapping[str, str] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The settings of a checkpoint folder, each of whose files is optional.

        Raises:
            CheckpointError: a file is damaged, or a value in it is not of its kind.
        """
        content = JsonObject.read(folder / SETTINGS_FILE) or JsonObject(folder / SETTINGS_FILE, {})
        older = JsonObject.read(folder / SPECIAL_TOKENS_FILE) or JsonObject(folder / SPECIAL_TOKENS_FILE, {})
        named = {**_named_tokens(older), **_named_tokens(content)}
        special = frozenset(special_tokens({**older.values, **content.values}))
        bos_token = named.get("bos_token", END_OF_TEXT)
        eos_token = named.get("eos_token", END_OF_TEXT)
        return cls(
            add_bos=_flag(content, "add_bos_token"),
            add_eos=_flag(content, "add_eos_token"),
            bos_token=bos_token,
            eos_token=eos_token,
            boundaries=frozenset({bos_token, eos_token, END_OF_TEXT}),
            special=special,
            named=named,
            added=_added_tokens(content, folder, special),
        )


def special_tokens(content: Mapping[str, Any]) -> Iterator[str]:
    """The tokens that Transformers keeps apart from text, in the places where its versions have put them.

    Args:
        content: of tokenizer_config.json, or of special_tokens_map.json.
    """
    for key, value in content.items():
        if key.endswith(("_token", "_special_tokens")) or key == "added_tokens_decoder":
            yield from _tokens_within(value)


def _tokens_within(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _tokens_within(item)
    elif isinstance(value, dict) and "content" not in value:
        yield from _tokens_within(list(value.values()))
    elif isinstance(value, dict) and value.get("special", True):
        yield from _tokens_within(value["content"])


def _flag(content: JsonObject, key: str) -> bool | None:
    return None if content.values.get(key) is None else content.flag(key, default=False)


def _named_tokens(content: JsonObject) -> dict[str, str]:
    names = [key for key in content.values if key.endswith("_token") and not key.startswith("add_")]
    tokens = {key: _token(content, key) for key in names}
    extra = content.values.get("extra_special_tokens")
    if isinstance(extra, dict):
        inner = JsonObject(content.path, extra, prefix="extra_special_tokens.")
        tokens |= {key: _token(inner, key) for key in extra}
    return {key: token for key, token in tokens.items() if token is not None}


def _token(content: JsonObject, key: str) -> str | None:
    value = content.values.get(key)
    token = value.get("content") if isinstance(value, dict) else value
    if value is None or isinstance(token, str):
        return token
    raise content.error(key, 'a string or an object with "content"')


def _added_tokens(content: JsonObject, folder: Path, special: frozenset[str]) -> tuple[AddedToken, ...]:
    """The tokens of "added_tokens_decoder"; where that key is absent, those of the older added_tokens.json."""
    decoder = content.table("added_tokens_decoder")
    if decoder is not None:
        tokens = [
            described_token(_entry(decoder, key), _checked_id(decoder, key, _number(key)), special)
            for key in decoder.values
        ]
    else:
        older = JsonObject.read(folder / ADDED_TOKENS_FILE) or JsonObject(folder / ADDED_TOKENS_FILE, {})
        tokens = [
            AddedToken(_checked_id(older, text, value), text, special=text in special, normalized=text not in special)
            for text, value in older.values.items()
        ]
    by_id = {token.token_id: token for token in tokens}
    if len(by_id) < len(tokens) or not all(token.content for token in tokens):
        raise CheckpointError(f"{content.path.parent}: two of its added tokens have the same id, or one is empty")
    return tuple(by_id[token_id] for token_id in sorted(by_id))


def _entry(content: JsonObject, key: str) -> JsonObject:
    table = content.table(key)
    if table is None:
        raise content.error(key, "an object that describes a token")
    return table


def described_token(
    token: JsonObject, token_id: int | None = None, special: Container[str] = frozenset()
) -> AddedToken:
    """A token as tokenizer.json and tokenizer_config.json describe it.

    Args:
        token: the description.
        token_id: its id, None where the description holds it.
        special: spellings of tokens that are special whatever the description says.

    Raises:
        CheckpointError: a value is missing or not of its kind.
    """
    text = token.text("content")
    if text is None:
        raise token.error("content", "the token's text")
    if token_id is None:
        token_id = _checked_id(token, "id", token.values.get("id"))
    flags = {flag: token.flag(flag, default=False) for flag in _FLAGS}
    return AddedToken(token_id, text, **flags | {"special": flags["special"] or text in special})


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 9 else None


def _checked_id(content: JsonObject, key: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_TOKEN_ID:
        place = f"{content.path}: {content.prefix}{key[:80]!r}"
        raise CheckpointError(f"{place} does not have a valid token id; expected an integer below {MAX_TOKEN_ID}")
    return value
