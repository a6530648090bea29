"""The `tokenizers` library on a checkpoint's tokenizer.json: Transformers' tokens.

Knows nothing of SentencePiece's model file, and imports no torch.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from persimmon.model.errors import CheckpointError
from persimmon.model.token_backend import Frame
from persimmon.model.token_finder import Part
from persimmon.model.tokenizer_json import TokenizerJson, spelling
from persimmon.model.tokenizer_settings import AddedToken, TokenizerSettings


class TokenizersBackend:
    """See `TokenBackend`.

    The library finds special tokens in any text, and some of its models give them for text too.  So that a prompt's
    text cannot become one, they are loaded under other, random names, which are put into a text where the token is
    meant.

    Args:
        file: the checkpoint's tokenizer.json.
        settings: what the files next to it say.

    Raises:
        CheckpointError: the library cannot use the file, or the files do not agree on a token's id.
    """

    def __init__(self, file: TokenizerJson, settings: TokenizerSettings) -> None:
        added = _all_added(file, settings)
        self.base_size = max(file.vocab.values()) + 1
        self.frame: Frame | None = file.frame
        self.specials: Mapping[str, AddedToken] = {token.content: token for token in added if token.special}
        self._ids = {**file.vocab, **{token.content: token.token_id for token in added}}
        size = max(self._ids.values()) + 1
        self._names = [f"token_id:{token_id}" for token_id in range(size)]
        for text, token_id in self._ids.items():
            self._names[token_id] = text
        nonce = secrets.token_hex(8)
        self._hidden = {token.token_id: f"<{nonce}:{token.token_id}>" for token in self.specials.values()}
        self._tokenizer = _loaded(file, added, self._hidden)
        for token in added:
            if token.normalized:  # the library reads and writes such a token in its normalized form, like "▁word"
                self._names[token.token_id] = self._tokenizer.id_to_token(token.token_id)
        spelled = spelling(file)
        self._strips_space = spelled.strips_space
        self.token_bytes = [b""] * size
        for text, token_id in self._ids.items():
            self.token_bytes[token_id] = b"" if text in self.specials else spelled.text(self._names[token_id])
        self.unknown_ids = _unknown_ids(file)

    def encode(self, parts: Sequence[Part]) -> list[int]:
        """See `TokenBackend`."""
        text = "".join([self._hidden[part] if isinstance(part, int) else part for part in parts])
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def name(self, token_id: int) -> str:
        """See `TokenBackend`."""
        return self._names[token_id] if 0 <= token_id < len(self._names) else f"token_id:{token_id}"

    def token_id(self, name: str) -> int | None:
        """See `TokenBackend`."""
        return self._ids.get(name)

    def begins_with_prefix(self, token_id: int) -> bool:
        """See `TokenBackend`."""
        return self._strips_space and self.token_bytes[token_id].startswith(b" ")


def _all_added(file: TokenizerJson, settings: TokenizerSettings) -> list[AddedToken]:
    """The added tokens of all files, as Transformers puts them together: specials by name, new ones at the end."""
    names = settings.special | settings.boundaries
    tokens = {token.content: token for token in file.added}
    for token in settings.added:
        known = tokens.get(token.content)
        own_id = file.vocab.get(token.content) if known is None else known.token_id
        if own_id is not None and own_id != token.token_id:
            raise CheckpointError(
                f"{file.path}: the added token {token.content[:80]!r} has the id {own_id}, but {token.token_id} in the "
                "files next to it; save the tokenizer again with Transformers"
            )
        tokens[token.content] = token
    for name in settings.boundaries:
        if name in file.vocab and name not in tokens:
            tokens[name] = AddedToken(file.vocab[name], name, special=True)
    # Special tokens are looked for in the text itself: a normalizer would change the names that they are loaded under.
    return [
        replace(token, special=True, normalized=False) if token.special or token.content in names else token
        for token in sorted(tokens.values(), key=lambda token: token.token_id)
    ]


def _unknown_ids(file: TokenizerJson) -> frozenset[int]:
    found = file.model.get("unk_id") if file.kind == "Unigram" else file.vocab.get(str(file.model.get("unk_token")))
    return frozenset() if found is None else frozenset({found})


def _loaded(file: TokenizerJson, added: Sequence[AddedToken], hidden: Mapping[int, str]) -> Any:
    """The library's tokenizer, with some tokens under other names and nothing put around a text."""
    from tokenizers import Tokenizer  # of no use to the many checkpoints whose tokens are SentencePiece's

    entries = [_entry(token, hidden.get(token.token_id, token.content)) for token in added]
    content = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": entries,
            "normalizer": file.normalizer,
            "pre_tokenizer": file.pre_tokenizer,
            "post_processor": None,
            "decoder": None,
            "model": _with_hidden_names(file, hidden),
        },
        ensure_ascii=False,
    )
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # noqa: BLE001 - the library has no class of its own for its errors
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file.path}: the tokenizers library cannot load this file: {reason}") from None
    for entry in entries:
        if tokenizer.token_to_id(entry["content"]) != entry["id"]:
            name = next(token.content for token in added if token.token_id == entry["id"])
            raise CheckpointError(
                f"{file.path}: the added token {name[:80]!r} has the id {entry['id']}, but the tokenizers library "
                f"gives it {tokenizer.token_to_id(entry['content'])}; ids of added tokens must be consecutive"
            )
    return tokenizer


def _entry(token: AddedToken, content: str) -> dict[str, Any]:
    entry = asdict(token)
    return {"id": entry.pop("token_id"), **entry, "content": content}


def _with_hidden_names(file: TokenizerJson, hidden: Mapping[int, str]) -> dict[str, Any]:
    """The file's model, in which the special tokens have their other names."""
    renamed = {text: hidden[token_id] for text, token_id in file.vocab.items() if token_id in hidden}
    if file.kind == "Unigram":
        vocab = list(file.model["vocab"])
        for text, name in renamed.items():
            token_id = file.vocab[text]
            vocab[token_id] = (name, vocab[token_id][1])
        return {**file.model, "vocab": vocab}
    model = {**file.model, "vocab": {renamed.get(text, text): token_id for text, token_id in file.vocab.items()}}
    if file.model.get("unk_token") in renamed:
        model["unk_token"] = renamed[file.model["unk_token"]]
    merges = file.model.get("merges")
    if isinstance(merges, list):
        model["merges"] = [merge for merge in merges if renamed.keys().isdisjoint(_spellings(merge))]
    return model


def _spellings(merge: Any) -> tuple[Any, ...]:
    """What a merge of a BPE model is about: its two parts and the whole."""
    left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[-1])
    return left, right, left + right
