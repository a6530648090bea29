"""What is sent: prompts made of random token ids or words, or read from a file, as request bodies.

Knows no server's tokenizer: a prompt is made of low token ids, which every vocabulary has, or of short common words,
which are about a token each; how many tokens it really was is the server's to say.
"""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work night point home water room mother area "
    "money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea body back"
)
WORDS = tuple(COMMON_WORDS.split())


class WorkloadError(ValueError):
    """A workload that makes no sense or cannot be read; the message says what to do."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        field: "prompt" or "messages", which decides the endpoint.
        value: of that field.
        max_tokens: maximum tokens of the answer.
    """

    field: str
    value: Any
    max_tokens: int


@dataclass(frozen=True)
class Request:
    """A request as it is sent.

    Attributes:
        path: of the endpoint.
        body: JSON.
        expected_tokens: how many tokens the answer must have; None where the model may end it.
    """

    path: str
    body: bytes
    expected_tokens: int | None


def request(model: str, prompt: Prompt, ignore_eos: bool) -> Request:
    """A streamed request for a greedy answer, with its usage.

    Args:
        model: the name to put into it.
        prompt: what is asked.
        ignore_eos: have an answer of exactly the prompt's max_tokens.
    """
    body = {
        "model": model,
        prompt.field: prompt.value,
        "max_tokens": prompt.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ignore_eos:
        body["ignore_eos"] = True  # vLLM's name; OpenAI's own API has no such field
    path = CHAT if prompt.field == "messages" else COMPLETIONS
    return Request(path, json.dumps(body).encode(), prompt.max_tokens if ignore_eos else None)


@dataclass(frozen=True)
class RandomWorkload:
    """Prompts of random tokens: of one length or mixed lengths, with or without a shared prefix.

    Attributes:
        input_len: (least, most) tokens of a prompt, drawn uniformly, after the shared beginning.
        output_len: (least, most) tokens of an answer, drawn uniformly.
        prefix_len: tokens of the beginning that prompts share; 0 for none.
        prefixes: how many such beginnings there are; a prompt takes one at random.
        token_ids: (first, last + 1) of the ids that prompts are made of.
        form: what a prompt is: "ids" or "text" for completions, "chat" for one user message of text.
    """

    input_len: tuple[int, int] = (64, 64)
    output_len: tuple[int, int] = (128, 128)
    prefix_len: int = 0
    prefixes: int = 1
    token_ids: tuple[int, int] = (300, 4000)
    form: str = "ids"

    def __post_init__(self) -> None:
        for name, (least, most) in {"prompt": self.input_len, "answer": self.output_len}.items():
            if not 1 <= least <= most:
                raise WorkloadError(f"{name} lengths {least}:{most}; expected 1 <= least <= most")
        if self.prefix_len < 0:
            raise WorkloadError(f"a shared prefix of {self.prefix_len} tokens; expected at least 0")
        if self.prefixes < 1:
            raise WorkloadError(f"{self.prefixes} shared prefixes; expected at least 1")
        if not 0 <= self.token_ids[0] < self.token_ids[1]:
            raise WorkloadError(f"token ids {self.token_ids[0]}:{self.token_ids[1]}; expected 0 <= first < end")

    def prompts(self, seed: int | str) -> Iterator[Prompt]:
        """Prompts without end, the same for the same seed."""
        dice = random.Random(seed)
        beginnings = [self._tokens(dice, self.prefix_len) for _ in range(self.prefixes if self.prefix_len else 1)]
        while True:
            tokens = dice.choice(beginnings) + self._tokens(dice, dice.randint(*self.input_len))
            yield self._prompt(tokens, dice.randint(*self.output_len))

    def warm_up_prompts(self, seed: int | str) -> Iterator[Prompt]:
        """The like from another seed: the measured ones must not be in a prefix cache already."""
        return self.prompts(f"warm-up {seed}")

    def __str__(self) -> str:
        unit = "token ids" if self.form == "ids" else "words"
        shared = ""
        if self.prefix_len:
            beginnings = f"one of {self.prefixes} shared prefixes" if self.prefixes > 1 else "a shared prefix"
            shared = f" after {beginnings} of {self.prefix_len}"
        return f"prompts of {_range(self.input_len)} {unit}{shared}, answers of {_range(self.output_len)} tokens"

    def _tokens(self, dice: random.Random, count: int) -> list[Any]:
        if self.form == "ids":
            return [dice.randrange(*self.token_ids) for _ in range(count)]
        return dice.choices(WORDS, k=count)

    def _prompt(self, tokens: list[Any], max_tokens: int) -> Prompt:
        if self.form == "ids":
            return Prompt("prompt", tokens, max_tokens)
        text = " ".join(tokens)
        if self.form == "text":
            return Prompt("prompt", text, max_tokens)
        return Prompt("messages", [{"role": "user", "content": text}], max_tokens)


@dataclass(frozen=True)
class FileWorkload:
    """The prompts of a file, in its order and from its start again when more are asked for.

    Attributes:
        source: the file's name, for reports.
        lines: its prompts.
        output_len: maximum tokens of a warm-up's answer.
    """

    source: str
    lines: tuple[Prompt, ...]
    output_len: int

    @classmethod
    def read(cls, path: Path, output_len: int, endpoint: str | None) -> "FileWorkload":
        """Reads JSON lines that have "prompt" or "messages", and perhaps "max_tokens"; other keys are not looked at.

        Args:
            path: the file.
            output_len: maximum tokens of an answer whose line sets none.
            endpoint: "completions", "chat", or None to let each line's field decide.  For chat a "prompt" of text
                becomes a user's message.

        Raises:
            WorkloadError: the file cannot be read, is empty, or a line is not such an object.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WorkloadError(f"{path} cannot be read as UTF-8 text: {error}") from None
        # Not splitlines: JSON strings may hold other line separators.
        rows = [(number, row) for number, row in enumerate(text.split("\n"), start=1) if row.strip()]
        if not rows:
            raise WorkloadError(f"{path} has no lines")
        try:
            prompts = tuple(_line(row, f"{path}:{number}", output_len, endpoint) for number, row in rows)
        except RecursionError:
            raise WorkloadError(f"{path} has a line that is nested too deeply") from None
        return cls(path.name, prompts, output_len)

    def prompts(self, seed: int | str) -> Iterator[Prompt]:
        """The lines, over and over."""
        return itertools.cycle(self.lines)

    def warm_up_prompts(self, seed: int | str) -> Iterator[Prompt]:
        """Random words, for the endpoint of the file's first line."""
        form = "chat" if self.lines[0].field == "messages" else "text"
        lengths = (self.output_len, self.output_len)
        return RandomWorkload(output_len=lengths, form=form).warm_up_prompts(seed)

    def __str__(self) -> str:
        return f"{len(self.lines)} prompts of {self.source}"


Workload = RandomWorkload | FileWorkload


def _range(bounds: tuple[int, int]) -> str:
    least, most = bounds
    return str(least) if least == most else f"{least} to {most}"


def _line(row: str, where: str, output_len: int, endpoint: str | None) -> Prompt:
    try:
        line = json.loads(row)
    except ValueError as error:
        raise WorkloadError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise WorkloadError(f'{where}: expected an object with either "prompt" or "messages"')
    field = "prompt" if "prompt" in line else "messages"
    value, max_tokens = line[field], line.get("max_tokens", output_len)
    if type(max_tokens) is not int or max_tokens < 1:
        raise WorkloadError(f'{where}: "max_tokens" is {max_tokens!r}; expected an integer of at least 1')
    if field == "prompt":
        is_ids = isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
        if not (isinstance(value, str) or is_ids):
            raise WorkloadError(f'{where}: "prompt" is not valid; expected a string or a list of token ids')
        if endpoint == "chat":
            if not isinstance(value, str):
                raise WorkloadError(f"{where}: token ids cannot be sent to --endpoint chat")
            return Prompt("messages", [{"role": "user", "content": value}], max_tokens)
    elif endpoint == "completions":
        raise WorkloadError(f'{where}: "messages" cannot be sent to --endpoint completions')
    elif not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        raise WorkloadError(f'{where}: "messages" is not valid; expected a list of messages')
    return Prompt(field, value, max_tokens)
