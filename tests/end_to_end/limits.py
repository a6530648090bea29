"""Requests at this server's own limits, and one step beyond them.

Only data: what is sent, the status it gets, and what the message of an error must contain, which is the limit or the
field.  Limits are those of docs/reference/fields.md and of the constants that are imported here.
"""

import gzip
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from persimmon.server.http.endpoints.preparation import MAX_ECHOED
from persimmon.server.http.endpoints.service import MAX_CHOICES
from persimmon.server.http.generation.prompt_encoder import MAX_CHARACTERS
from persimmon.server.http.schemas.adept import MAX_PROMPTS
from persimmon.server.http.schemas.chat_message import MAX_CALLS_OF_A_MESSAGE, MAX_MESSAGES
from persimmon.server.http.schemas.field_types import (
    MAX_BIASED_TOKENS,
    MAX_SALT_LENGTH,
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)
from persimmon.server.http.schemas.generation import MAX_SAMPLES
from persimmon.server.http.schemas.parsing import MAX_OBJECTS, MAX_VALUES
from persimmon.server.http.schemas.tool_fields import MAX_TOOLS
from persimmon.server.settings.engine import MAX_BODY_BYTES
from tests.end_to_end.limit_case import (
    ADEPT,
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    HALF_PAIR,
    NOT_JSON,
    TOKENIZE,
    Case,
    raw,
    refused,
    served,
)
from tests.end_to_end.limits_of_grammars import GRAMMARS

# Of the demo checkpoint.
VOCABULARY = 4096
CONTEXT = 2048
HIDDEN_SIZE = 256

TINY = 5e-324
"""The smallest number above zero that a float holds."""


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes.

    Attributes:
        path, name: of the field.
        served: numbers at its limits.
        refused: the first ones beyond them, each with the limit as the message writes it.
        others: fields that go with it.
    """

    path: str
    name: str
    served: tuple[float, ...]
    refused: tuple[tuple[float, str], ...]
    others: Mapping[str, object] = field(default_factory=dict)

    def cases(self) -> Iterable[Case]:
        """A request for each number."""
        for number in self.served:
            yield served(f"{self.name} = {number}", self.path, **{**self.others, self.name: number})
        for number, limit in self.refused:
            yield refused(f"{self.name} = {number}", limit, self.path, **{**self.others, self.name: number})


RANGES = (
    Range(COMPLETIONS, "temperature", (-0.0, TINY, 2), ((-TINY, "equal to 0"), (2.0000001, "equal to 2"))),
    Range(COMPLETIONS, "top_p", (0, TINY, 1), ((-TINY, "equal to 0"), (1.0000001, "equal to 1"))),
    Range(COMPLETIONS, "min_p", (0, TINY, 1), ((-TINY, "equal to 0"), (1.0000001, "equal to 1"))),
    Range(COMPLETIONS, "top_k", (-1, 0, VOCABULARY + 1, 2**63), ((-2, "equal to -1"),)),
    Range(COMPLETIONS, "presence_penalty", (-2, 2), ((-2.0000001, "equal to -2"), (2.0000001, "equal to 2"))),
    Range(COMPLETIONS, "frequency_penalty", (-2, 2), ((-2.0000001, "equal to -2"), (2.0000001, "equal to 2"))),
    Range(COMPLETIONS, "repetition_penalty", (TINY, 10), ((0, "greater than 0"), (10.0000001, "equal to 10"))),
    Range(COMPLETIONS, "seed", (-(2**63), -1, 2**64, 10**30), ()),
    Range(COMPLETIONS, "priority", (0, 2**31 - 1), ((-1, "lowest one that you may send is 0"), (2**31, f"{2**31}"))),
    Range(COMPLETIONS, "n", (1, MAX_SAMPLES), ((0, "equal to 1"), (MAX_SAMPLES + 1, f"equal to {MAX_SAMPLES}"))),
    Range(COMPLETIONS, "best_of", (2, MAX_SAMPLES), ((1, "at least n"), (MAX_SAMPLES + 1, f"{MAX_SAMPLES}")), {"n": 2}),
    Range(COMPLETIONS, "logprobs", (0, 5), ((-1, "equal to 0"), (6, "equal to 5"))),
    Range(COMPLETIONS, "min_tokens", (0, 2), ((-1, "equal to 0"), (3, "max_tokens is 2"))),
    Range(
        COMPLETIONS,
        "max_tokens",
        (0, CONTEXT - 2000),
        ((-1, "equal to 0"), (CONTEXT - 1999, str(CONTEXT)), (10**30, str(CONTEXT))),
        {"prompt": [5] * 2000, "stop_token_ids": list(range(1000))},
    ),
    Range(COMPLETIONS, "truncate_prompt_tokens", (-1, 1, CONTEXT - 2), ((-2, "-1"), (0, "1 to"), (CONTEXT, "1 to"))),
    Range(CHAT, "top_logprobs", (0, 20), ((-1, "equal to 0"), (21, "equal to 20")), {"logprobs": True}),
    Range(CHAT, "max_completion_tokens", (0, 1), ((-1, "equal to 0"), (CONTEXT, str(CONTEXT))), {"max_tokens": None}),
    Range(
        EMBEDDINGS,
        "dimensions",
        (HIDDEN_SIZE,),
        ((0, "equal to 1"), (HIDDEN_SIZE - 1, str(HIDDEN_SIZE)), (HIDDEN_SIZE + 1, str(HIDDEN_SIZE))),
    ),
    Range(EMBEDDINGS, "truncate_prompt_tokens", (-1, 1, CONTEXT), ((0, "1 to"), (CONTEXT + 1, f"1 to {CONTEXT}"))),
    Range(ADEPT, "tokens_to_generate", (1, CONTEXT), ((-1, "equal to 0"), (0, "logprobs")), {"top_k": 1}),
    Range(ADEPT, "temperature", (TINY, 100), ((0, "greater than 0"), (100.0000001, "equal to 100"))),
    Range(ADEPT, "top_k", (0, 1000), ((-1, "equal to 0"), (1001, "equal to 1000"))),
    Range(ADEPT, "top_p", (0, TINY, 1), ((-TINY, "equal to 0"), (1.0000001, "equal to 1"))),
    Range(ADEPT, "random_seed", (0, 10**30), ((-1, "equal to 0"),)),
)

_INTEGERS = (
    "n",
    "best_of",
    "max_tokens",
    "min_tokens",
    "top_k",
    "seed",
    "logprobs",
    "priority",
    "truncate_prompt_tokens",
)
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_SWITCHES = ("stream", "echo", "ignore_eos", "return_token_ids", "add_special_tokens")

_WRONG_VALUES: tuple[tuple[tuple[str, ...], tuple[object, ...]], ...] = (
    (_INTEGERS, (True, "4", 1.5, [1], {})),
    (_NUMBERS, (True, "1", [1], {}, float("nan"), float("inf"), float("-inf"))),
    (_SWITCHES, ("true", 1, [])),
    (("model", "cache_salt"), (5, True, [], {})),
)

VALUES = [
    *(case for each in RANGES for case in each.cases()),
    *(
        refused(f"{name} = {value!r}", f"'{name}'", **{name: value})
        for names, values in _WRONG_VALUES
        for name in names
        for value in values
    ),
    *(raw(f"{name} = 1e400", b'{"prompt": "a", "%b": 1e400}' % name.encode(), 400, f"'{name}'") for name in _NUMBERS),
    raw("an integer of 400 digits for a number", b'{"prompt": "a", "top_p": 1' + b"0" * 400 + b"}", 400, "'top_p'"),
    raw("an integer of 4,000 digits", b'{"prompt": "a", "max_tokens": 1, "seed": 1' + b"0" * 4000 + b"}", 200),
    refused("best_of of a stream", "best_of", best_of=2, stream=True),
    refused("stream_options without a stream", "stream is true", stream_options={"include_usage": True}),
    refused("two limits of a chat", "give one of the two", CHAT, max_tokens=1, max_completion_tokens=2),
    refused("top_logprobs without logprobs", "logprobs is true", CHAT, top_logprobs=1),
    refused("top_k and top_p of Adept's", "give one of the two", ADEPT, top_k=1, top_p=0.5),
]


def _pair(
    name: str,
    make: Callable[[int], object],
    most: int,
    says: str,
    path: str = COMPLETIONS,
    others: Mapping[str, object] | None = None,
) -> list[Case]:
    """The largest value of a field that is served, and the next one, which is refused.

    Args:
        name: the field's.
        make: the value of a size.
        most: the largest size.
        says: what the refusal contains.
        path: the endpoint.
        others: fields that go with it.
    """
    return [
        served(f"{name} of {most}", path, **{**(others or {}), name: make(most)}),
        refused(f"{name} of {most + 1}", says, path, **{**(others or {}), name: make(most + 1)}),
    ]


def _message(size: int) -> dict[str, object]:
    """An assistant's message with some calls."""
    call = {"id": "call", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    return {"role": "assistant", "tool_calls": [call] * size}


def _tool(name: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


def _tools(size: int) -> list[dict[str, object]]:
    return [_tool(f"f{number}") for number in range(size)]


_SHORT = [{"role": "user", "content": "a"}]

COUNTS = [
    *_pair("stop", lambda size: ["a"] * size, MAX_STOP_STRINGS, str(MAX_STOP_STRINGS)),
    *_pair("stop", lambda size: "a" * size, MAX_STOP_STRING_LENGTH, str(MAX_STOP_STRING_LENGTH)),
    refused("stop of no characters", "at least 1 character", stop=[""]),
    served("stop of no strings", stop=[]),
    *_pair("stop_token_ids", lambda size: [5] * size, MAX_STOP_TOKENS, str(MAX_STOP_TOKENS)),
    *_pair(
        "logit_bias", lambda size: {str(number): 1 for number in range(size)}, MAX_BIASED_TOKENS, f"{MAX_BIASED_TOKENS}"
    ),
    *_pair("cache_salt", lambda size: "s" * size, MAX_SALT_LENGTH, str(MAX_SALT_LENGTH)),
    refused("cache_salt of 0", "at least 1 character", cache_salt=""),
    *_pair("messages", lambda size: _SHORT * size, MAX_MESSAGES, str(MAX_MESSAGES), TOKENIZE),
    refused("messages of 0", "at least 1 item", CHAT, messages=[]),
    *_pair(
        "messages",
        lambda size: [*_SHORT, _message(size), {"role": "tool", "tool_call_id": "call", "content": "a"}],
        MAX_CALLS_OF_A_MESSAGE,
        str(MAX_CALLS_OF_A_MESSAGE),
        TOKENIZE,
    ),
    *_pair("tools", _tools, MAX_TOOLS, str(MAX_TOOLS), TOKENIZE, {"messages": _SHORT}),
    *_pair("prompts", lambda size: ["a"] * size, MAX_PROMPTS, str(MAX_PROMPTS), ADEPT, {"tokens_to_generate": 1}),
    refused("prompts of 0", "not empty", ADEPT, prompts=[]),
    served("300 prompts", prompt=["a"] * 300, max_tokens=1),
    refused("one answer too many", str(MAX_CHOICES), prompt=["a"] * (MAX_CHOICES // MAX_SAMPLES + 1), n=MAX_SAMPLES),
    refused("one prompt too many", str(MAX_CHOICES), prompt=["a"] * (MAX_CHOICES + 1)),
    served("300 inputs", EMBEDDINGS, input=["a"] * 300, encoding_format="base64"),
    refused("one input too many", str(MAX_CHOICES), EMBEDDINGS, input=["a"] * (MAX_CHOICES + 1)),
    served("echo of a long prompt", prompt=[5] * 2000, echo=True, logprobs=5),
    refused("echo of more than is written", str(MAX_ECHOED), prompt=[5] * 1366, echo=True, logprobs=5, n=128),
]

TOKENS = [
    *(
        case
        for path, name in (
            (COMPLETIONS, "prompt"),
            (COMPLETIONS, "stop_token_ids"),
            (CHAT, "stop_token_ids"),
            (EMBEDDINGS, "input"),
            (DETOKENIZE, "tokens"),
        )
        for case in (
            served(f"{name}: the last token id", path, **{name: [VOCABULARY - 1]}),
            *(
                refused(f"{name}: token id {wrong}", f"0 to {VOCABULARY - 1}", path, **{name: [wrong]})
                for wrong in (-1, VOCABULARY, 2**31, 2**63, 10**30)
            ),
            *(
                refused(f"{name}: {wrong!r}", name, path, **{name: wrong})
                for wrong in ([True], [1.5], [None], [[[1]]], {"1": 1})
            ),
        )
    ),
    served("logit_bias: the last token id", logit_bias={str(VOCABULARY - 1): 100}),
    *(
        refused(f"logit_bias: {key}: {bias}", says, logit_bias={key: bias})
        for key, bias, says in (
            (str(VOCABULARY), 1, f"0 to {VOCABULARY - 1}"),
            (str(10**17), 1, f"0 to {VOCABULARY - 1}"),
            (str(10**18), 1, "not a token id"),
            ("-1", 1, "not a token id"),
            ("5.0", 1, "not a token id"),
            (" 5", 1, "not a token id"),
            ("\u0665", 1, "not a token id"),
            ("", 1, "not a token id"),
            ("5", 100.0000001, "-100 to 100"),
            ("5", -100.0000001, "-100 to 100"),
            ("5", float("nan"), "-100 to 100"),
            ("5", True, "-100 to 100"),
            ("5", "1", "-100 to 100"),
        )
    ),
    refused("logit_bias: one token twice", "two biases", logit_bias={"5": 1, "05": 2}),
    served("prompt: no characters", prompt=""),
    refused("prompt: no token ids", "not empty", prompt=[]),
    refused("prompt: no token ids in a list", "not empty", prompt=[[5], []]),
    refused("prompt: texts and token ids", "list of token ids", prompt=["a", [5]]),
    served("prompt: the context but for one token", prompt=[5] * (CONTEXT - 1), max_tokens=1),
    refused("prompt: the context", str(CONTEXT), prompt=[5] * CONTEXT, max_tokens=1),
    refused("prompt: a text beyond the context", str(CONTEXT), prompt="a word " * CONTEXT),
    refused("messages: beyond the context", str(CONTEXT), CHAT, messages=[{"role": "user", "content": "a " * 3000}]),
    refused("min_tokens: beyond the context", "at most", CHAT, max_tokens=None, min_tokens=CONTEXT),
    served("input: the context", EMBEDDINGS, input=[5] * CONTEXT),
    refused("input: beyond the context", str(CONTEXT), EMBEDDINGS, input=[5] * (CONTEXT + 1)),
    served("input: no characters", EMBEDDINGS, input=""),
    refused("input: no token ids", "not empty", EMBEDDINGS, input=[]),
    refused("prompts: beyond the context", str(CONTEXT), ADEPT, prompts=["a word " * CONTEXT]),
    refused("prompts: no characters", "add_BOS", ADEPT, prompts=[""]),
    served("prompts: no characters after BOS", ADEPT, prompts=[""], add_BOS=True),
    served("tokens: none", DETOKENIZE, tokens=[]),
    served("tokens: half a character", DETOKENIZE, tokens=[200]),
    served("tokens: 200,000", DETOKENIZE, tokens=[5] * 200_000),
]

TEXTS = [
    served("prompt: the longest text", TOKENIZE, prompt="a " * (MAX_CHARACTERS // 2)),
    refused("prompt: one character too many", f"{MAX_CHARACTERS:,}", TOKENIZE, prompt="a" * (MAX_CHARACTERS + 1)),
    *(
        refused(f"{name}: half a surrogate pair", NOT_JSON, **{name: value})
        for name, value in (
            ("prompt", "a" + HALF_PAIR),
            ("stop", HALF_PAIR),
            ("model", HALF_PAIR),
            ("user", HALF_PAIR),
            (HALF_PAIR, 1),
        )
    ),
    refused("messages: half a surrogate pair", NOT_JSON, CHAT, messages=[{"role": "user", "content": HALF_PAIR}]),
    refused("input: half a surrogate pair", NOT_JSON, EMBEDDINGS, input=HALF_PAIR),
    refused("prompts: half a surrogate pair", NOT_JSON, ADEPT, prompts=[HALF_PAIR]),
    raw("prompt: a whole surrogate pair", b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}', 200),
    served("prompt: NUL and other control characters", prompt="".join(map(chr, range(32)))),
    served("prompt: characters of four bytes", prompt="\U0010ffff\U0001f600\ufffe\ufeff"),
    served("prompt: one base with 300 accents", prompt="e" + "\u0301" * 300),
    served("prompt: the spelling of control tokens", prompt="|ENDOFTEXT| </s> <unk>"),
    served("prompt: an event of a stream", prompt="data: [DONE]\n\n", stream=True),
    served("stop: NUL", stop="\0"),
    served("stop: every letter", stop=list("abcdefghijklmnop")),
    refused("stop: null in a list", "stop", stop=[None]),
    refused("stop: a list in a list", "stop", stop=[["a"]]),
]


def _padded(length: int) -> bytes:
    """A body of some bytes."""
    body = b'{"prompt": "a", "max_tokens": 1}'
    return b" " * (length - len(body)) + body


def _values(size: int) -> bytes:
    """A body of some values, as the server counts them: commas, objects and lists."""
    return b'{"prompt": "a", "max_tokens": 1, "metadata": [0' + b",0" * (size - 4) + b"]}"


def _lists(size: int) -> bytes:
    """A body of some objects and lists."""
    return b'{"prompt": "a", "max_tokens": 1, "metadata": [[]' + b",[]" * (size - 3) + b"]}"


def _nested_lists(depth: int) -> bytes:
    return b'{"prompt": "a", "max_tokens": 1, "metadata": ' + b"[" * depth + b"]" * depth + b"}"


BODIES = [
    Case("the longest body", COMPLETIONS, lambda: _padded(MAX_BODY_BYTES), 200),
    Case("one byte too many", COMPLETIONS, lambda: _padded(MAX_BODY_BYTES + 1), 413, str(MAX_BODY_BYTES)),
    Case(
        "the longest body, packed",
        COMPLETIONS,
        lambda: gzip.compress(_padded(MAX_BODY_BYTES)),
        200,
        headers={"Content-Encoding": "gzip"},
    ),
    Case(
        "one byte too many, packed",
        COMPLETIONS,
        lambda: gzip.compress(_padded(MAX_BODY_BYTES + 1)),
        413,
        str(MAX_BODY_BYTES),
        {"Content-Encoding": "gzip"},
    ),
    Case("as many values as are read", COMPLETIONS, lambda: _values(MAX_VALUES), 200),
    Case("one value too many", COMPLETIONS, lambda: _values(MAX_VALUES + 1), 400, f"{MAX_VALUES:,}"),
    Case("as many lists as are read", COMPLETIONS, lambda: _lists(MAX_OBJECTS), 200),
    Case("one list too many", COMPLETIONS, lambda: _lists(MAX_OBJECTS + 1), 400, f"{MAX_OBJECTS:,}"),
    Case("100 lists in lists", COMPLETIONS, lambda: _nested_lists(100), 200),
    Case("1,000 lists in lists", COMPLETIONS, lambda: _nested_lists(1000), 400, NOT_JSON),
    Case("as many lists in lists as are read", COMPLETIONS, lambda: _nested_lists(MAX_OBJECTS - 1), 400, NOT_JSON),
    raw("nothing", b"", 400, NOT_JSON),
    raw("half an object", b"{", 400, NOT_JSON),
    raw("null", b"null", 400, "must be a JSON object"),
    raw("a list", b"[]", 400, "must be a JSON object"),
    raw("a string", b'"prompt"', 400, "must be a JSON object"),
    raw("an empty object", b"{}", 400, "'prompt'"),
    raw("an empty object for a chat", b"{}", 400, "'messages'", CHAT),
    raw("bytes that are not UTF-8", b'{"prompt": "\xff"}', 400, NOT_JSON),
    raw("an overlong character", b'{"prompt": "\xc0\xaf"}', 400, NOT_JSON),
    raw("half a surrogate pair in UTF-8", b'{"prompt": "\xed\xa0\x80"}', 400, NOT_JSON),
    raw("UTF-16", '{"prompt": "a"}'.encode("utf-16"), 400, NOT_JSON),
    raw("two objects", b'{"prompt": "a"} {"prompt": "b"}', 400, NOT_JSON),
    raw("a comma too many", b'{"prompt": "a",}', 400, NOT_JSON),
    raw("single quotes", b"{'prompt': 'a'}", 400, NOT_JSON),
    raw("a line break in a string", b'{"prompt": "a\nb"}', 400, NOT_JSON),
    raw("a hexadecimal number", b'{"prompt": "a", "max_tokens": 0x1}', 400, NOT_JSON),
    refused("an unknown field", "'unknown'", unknown=1),
    refused("an unknown field with a name of 1 MB", "xxx", **{"x" * 2**20: 1}),
    refused("a field without a name", "''", **{"": 1}),
    raw("a form", b"prompt=a", 415, "application/json", content_type="application/x-www-form-urlencoded"),
    raw("a text", b'{"prompt": "a"}', 415, "application/json", content_type="text/plain"),
    raw("an empty type", b'{"prompt": "a"}', 415, "application/json", content_type=""),
    raw("another packing", b'{"prompt": "a"}', 415, "gzip", content_encoding="deflate"),
    raw("packed in name only", b'{"prompt": "a"}', 400, "not valid gzip", content_encoding="gzip"),
    raw("packed and cut off", gzip.compress(b'{"prompt": "a"}')[:-4], 400, "ends too early", content_encoding="gzip"),
]

STREAMS = [
    served("a stream of 64 answers", stream=True, n=64, max_tokens=1),
    served("a stream of 100 prompts", stream=True, prompt=["a"] * 100, max_tokens=1),
    served("a stream without text", stream=True, stop=[" "]),
    served("a stream with usage", CHAT, stream=True, stream_options={"include_usage": True}),
    served("a stream past the answer's end", CHAT, stream=True, ignore_eos=True, max_tokens=40),
    refused("stream options in a list", "'stream_options'", stream=True, stream_options=[]),
    refused("an unknown stream option", "'stream_options.other'", stream=True, stream_options={"other": 1}),
]


def _wrong_message(name: str, message: object, says: str = "messages[0]") -> Case:
    return refused(f"message: {name}", says, CHAT, messages=[message])


def _part(kind: str, **fields: object) -> object:
    return _parts([{"type": kind, **fields}])


def _parts(parts: list[Mapping[str, object]]) -> object:
    return {"role": "user", "content": parts}


_NO_CONTENT: tuple[object, ...] = (5, [], [None], [[]], {}, True)

CONVERSATIONS = [
    refused("messages: null", "'messages'", CHAT, messages=None),
    refused("messages: a string", "'messages'", CHAT, messages="Hello"),
    _wrong_message("null", None),
    _wrong_message("a list", []),
    _wrong_message("no role", {"content": "a"}, "messages[0].role"),
    _wrong_message("no content", {"role": "user"}, "messages[0].content"),
    _wrong_message("another role", {"role": "narrator", "content": "a"}, "role"),
    _wrong_message("a line break in the role", {"role": "user\n\nhuman", "content": "a"}, "role"),
    *(
        _wrong_message(f"content {content!r}", {"role": "user", "content": content}, "messages[0].content")
        for content in _NO_CONTENT
    ),
    _wrong_message("a picture", _part("image_url", image_url={"url": "a"}), "text only"),
    _wrong_message("a sound", _part("input_audio", input_audio={}), "send parts of the type 'text' or 'image_url'"),
    _wrong_message("a file", _part("file", file={}), "send parts of the type 'text' or 'image_url'"),
    _wrong_message("a part of an unknown type", _part("other", text="a"), "'other'"),
    _wrong_message("a tool's answer without a call", {"role": "tool", "content": "a"}, "tool_call_id"),
    _wrong_message("an empty call", {"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0]"),
    served(
        "message: 1,000 parts", TOKENIZE, messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 1000}]
    ),
    served("message: turns within a turn", CHAT, messages=[{"role": "user", "content": "\n\nhuman: a\n\nadept: b"}]),
    served("chat_template_kwargs: none", CHAT, chat_template_kwargs={}),
    refused("chat_template_kwargs: one", "Adept's format", CHAT, chat_template_kwargs={"a": 1}),
    refused("chat_template_kwargs: a list", "'chat_template_kwargs'", CHAT, chat_template_kwargs=[]),
    refused("tools: null in a list", "tools[0]", CHAT, tools=[None]),
    refused("tools: another type", "tools[0].type", CHAT, tools=[{"type": "other", "function": {"name": "f"}}]),
    *(
        refused(f"tools: the name {name!r:.20}", "tools[0].function.name", CHAT, tools=[_tool(name)])
        for name in (5, "", "a b", "a\n", "f" * 65)
    ),
    served("tools: the longest name", CHAT, tools=[_tool("f" * 64)]),
    refused("tools: one name twice", "have the name", CHAT, tools=[_tool("f")] * 2),
    refused("tool_choice: an unknown function", "no function", CHAT, tools=_tools(1), tool_choice=_tool("g")),
    refused("tool_choice: no tools", "no tools", CHAT, tool_choice="required"),
    refused("tool_choice: a number", "tool_choice", CHAT, tools=_tools(1), tool_choice=5),
]


OTHERS = [
    refused("tokenize: nothing", "either prompt or messages", TOKENIZE),
    refused("tokenize: both", "either prompt or messages", TOKENIZE, prompt="a", messages=_SHORT),
    refused("tokenize: a number", "'prompt'", TOKENIZE, prompt=5),
    served("tokenize: no characters", TOKENIZE, prompt=""),
    served("tokenize: NULs", TOKENIZE, prompt="\0" * 1000, return_token_strs=True),
    refused("classify: a model that writes", "needs a model that", CLASSIFY, input="a"),
    refused("embeddings: another encoding", "'encoding_format'", EMBEDDINGS, encoding_format="hex"),
    served("Adept's: log-probabilities of a long prompt", ADEPT, prompts=["word " * 1500], logprobs=True),
    served("Adept's: log-probabilities only", ADEPT, tokens_to_generate=0, logprobs=True),
    Case("another model", COMPLETIONS, lambda: b'{"prompt": "a", "model": "other"}', 404, "does not exist"),
    refused("beam search", "'use_beam_search'", use_beam_search=True),
    refused("text to insert", "'suffix'", suffix="a"),
]

CASES = [*VALUES, *COUNTS, *TOKENS, *TEXTS, *BODIES, *STREAMS, *CONVERSATIONS, *GRAMMARS, *OTHERS]
