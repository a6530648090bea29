"""Turns prompts into token ids: short ones at once, long ones in a thread, and too long ones not at all.

Knows the tokenizer; nothing of requests but the names of their fields.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence

from persimmon.model.chat_prompt import ChatPrompt
from persimmon.model.coordinate_tags import CoordinateError
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.http.errors import bad_request

PromptInput = str | ChatPrompt | list[int]
"""A prompt as requests have it: a text, a conversation or token ids."""

Fit = Callable[[str, PromptInput, list[int]], list[int]]
"""From a prompt's field, the prompt and its token ids to the token ids that are kept; raises ApiError to refuse it."""

MAX_CHARACTERS = 1_000_000
"""Of one text.  Tokenizing a character takes about 50 bytes of memory, so 32 MiB of text would take 1.5 GiB."""

CHARACTERS_PER_TOKEN = 64
"""A model that reads more tokens than MAX_CHARACTERS allows for gets this many characters for each of them."""

# Tokenizing this many characters, or decoding this many tokens, takes about a millisecond; more would hold up the other
# streams.
_CHARACTERS_AT_ONCE = 16384
_TOKENS_AT_ONCE = 4096


class PromptEncoder:
    """Tokenizes prompts.

    Args:
        tokenizer: the served model's.
        context_length: tokens that the model reads at most.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_characters = max(MAX_CHARACTERS, CHARACTERS_PER_TOKEN * context_length)
        # One thread at a time: several would take several times the memory, and hardly less time.
        self._long_texts = asyncio.Semaphore(1)

    async def encode(
        self,
        names: Sequence[str],
        prompts: Sequence[PromptInput],
        add_bos: bool | None = None,
        fit: Fit = lambda name, prompt, token_ids: token_ids,
    ) -> list[list[int]]:
        """Texts and conversations as token ids; token ids stay as they are.

        Args:
            names: the field of each prompt.
            prompts: texts, conversations or token ids.
            add_bos: whether they begin with the beginning-of-sequence token; None does what the checkpoint says.
            fit: shortens or refuses a prompt, before the next ones are tokenized.

        Raises:
            ApiError: a text is too long for any model, a coordinate has no token, or `fit` refuses a prompt.
        """
        for name, prompt in zip(names, prompts, strict=True):
            self._check_length(name, prompt)

        def encode(indices: range) -> list[list[int]]:
            return [
                fit(names[index], prompts[index], self._ids(names[index], prompts[index], add_bos)) for index in indices
            ]

        encoded: list[list[int]] = []
        for indices, characters in _batches(prompts):
            if characters <= _CHARACTERS_AT_ONCE:
                encoded += encode(indices)
            else:
                async with self._long_texts:
                    encoded += await asyncio.to_thread(encode, indices)
        return encoded

    async def decode(self, token_ids: Sequence[int], check: Callable[[Sequence[int]], None]) -> str:
        """The text of token ids, long lists in a thread.

        Args:
            token_ids: from a request.
            check: raises ApiError for those that cannot be decoded.

        Raises:
            ApiError: as `check` does.
        """

        def decode() -> str:
            check(token_ids)
            return self._tokenizer.decode(token_ids, from_start=True)

        if len(token_ids) <= _TOKENS_AT_ONCE:
            return decode()
        async with self._long_texts:
            return await asyncio.to_thread(decode)

    def _ids(self, name: str, prompt: PromptInput, add_bos: bool | None) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt, add_bos)
        try:
            return prompt.token_ids(self._tokenizer, add_bos) if isinstance(prompt, ChatPrompt) else prompt
        except CoordinateError as error:
            raise bad_request(f"Invalid '{name}': {error}.", name, quotation=f": {error}") from None

    def _check_length(self, name: str, prompt: PromptInput) -> None:
        if not isinstance(prompt, list) and len(prompt) > self._max_characters:
            raise bad_request(
                f"Invalid '{name}': its text has {len(prompt):,} characters; at most {self._max_characters:,} are "
                f"allowed. Please shorten it.",
                name,
                "context_length_exceeded",
            )


def _batches(prompts: Sequence[PromptInput]) -> Iterator[tuple[range, int]]:
    """Prompts that are tokenized in one go, with the characters of their texts: MAX_CHARACTERS at most, or one text."""
    begin = characters = 0
    for index, prompt in enumerate(prompts):
        length = 0 if isinstance(prompt, list) else len(prompt)
        if index > begin and characters + length > MAX_CHARACTERS:
            yield range(begin, index), characters
            begin, characters = index, 0
        characters += length
    yield range(begin, len(prompts)), characters
