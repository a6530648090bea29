"""Requests that have killed, hung or corrupted other servers, and their relatives.

Only data: what is sent, and with which status it may be answered.  Where a request is known from a report, the
report is named: its repository on GitHub, and its number there.
"""

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"
EMBEDDINGS = "/v1/embeddings"
CLASSIFY = "/classify"
ADEPT = "/api"

SERVED = frozenset({200})
REFUSED = frozenset({400})
EITHER = SERVED | REFUSED
NOT_FOUND = frozenset({404})
TOO_LARGE = frozenset({413})

VOCABULARY = 4096
"""Of the demo checkpoint, whose context is 2,048 tokens."""


@dataclass(frozen=True)
class Killer:
    """One request.

    Attributes:
        name: unique, for people.
        path: the endpoint.
        content: makes the body; some are too large to keep.
        statuses: the answers that are allowed.  EITHER is for what a server may honour or refuse as it likes.
        headers: beside those that every client sends.
        source: a server that such a request has harmed.
        method: the HTTP method.
    """

    name: str
    path: str
    content: Callable[[], bytes]
    statuses: frozenset[int]
    headers: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    method: str = "POST"


def _raw(
    name: str,
    content: bytes,
    statuses: frozenset[int] = REFUSED,
    *,
    path: str = COMPLETIONS,
    source: str = "",
    **headers: str,
) -> Killer:
    sent = {key.replace("_", "-"): value for key, value in headers.items()}
    return Killer(name, path, lambda: content, statuses, sent, source)


def _json(name: str, path: str, body: object, statuses: frozenset[int], source: str = "") -> Killer:
    # json writes NaN and Infinity as no JSON has them, and lone surrogates as escapes: as careless clients do.
    return Killer(name, path, lambda: json.dumps(body).encode(), statuses, source=source)


def _completion(name: str, statuses: frozenset[int] = REFUSED, *, source: str = "", **fields: object) -> Killer:
    return _json(name, COMPLETIONS, {"prompt": "Hello", "max_tokens": 4} | fields, statuses, source)


def _field(name: str, value: object) -> dict[str, Any]:
    """One field of a body, for names that are no Python names or come from a list."""
    return {name: value}


def _chat(name: str, statuses: frozenset[int] = REFUSED, *, source: str = "", **fields: object) -> Killer:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    return _json(f"chat: {name}", CHAT, body | fields, statuses, source)


def _message(name: str, message: object, statuses: frozenset[int] = REFUSED, source: str = "") -> Killer:
    return _chat(name, statuses, source=source, messages=[message])


def _schema(name: str, schema: object, source: str = "") -> Killer:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return _chat(f"schema: {name}", EITHER, source=source, response_format=form)


def _outputs(name: str, statuses: frozenset[int] = EITHER, **constraint: object) -> Killer:
    return _completion(f"structured_outputs: {name}", statuses, structured_outputs=constraint)


def _tools(name: str, tools: object, statuses: frozenset[int] = EITHER, source: str = "", **fields: object) -> Killer:
    return _chat(f"tools: {name}", statuses, source=source, tools=tools, **fields)


def _embedding(name: str, statuses: frozenset[int] = REFUSED, **fields: object) -> Killer:
    return _json(f"embeddings: {name}", EMBEDDINGS, {"input": "Hello"} | fields, statuses)


def _adept(name: str, statuses: frozenset[int] = REFUSED, **fields: object) -> Killer:
    killer = _json(f"Adept's: {name}", ADEPT, {"prompts": ["Hello"], "tokens_to_generate": 4} | fields, statuses)
    return replace(killer, method="PUT")


def _function(parameters: object, name: object = "look_up") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": parameters}}]


def _call(arguments: str, name: str = "look_up") -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _laughs(depth: int) -> dict[str, Any]:
    """A schema of a few hundred bytes that is 2**depth schemas once its references are followed."""
    definitions: dict[str, Any] = {"laugh0": {"type": "string"}}
    for level in range(1, depth + 1):
        both = [{"$ref": f"#/$defs/laugh{level - 1}"}] * 2
        definitions[f"laugh{level}"] = {"type": "array", "prefixItems": both, "items": False, "minItems": 2}
    return {"$ref": f"#/$defs/laugh{depth}", "$defs": definitions}


TOKEN_IDS = [
    _completion("a stop token outside the vocabulary", stop_token_ids=[VOCABULARY], source="vllm-project/vllm#54195"),
    _completion("the same, and min_tokens", stop_token_ids=[151645], min_tokens=1, source="gonka-ai/gonka#1170"),
    _completion("a negative stop token", stop_token_ids=[-1], source="vllm-project/vllm#44968"),
    _completion("a stop token of 31 bits", stop_token_ids=[2**31 - 1]),
    _completion("a stop token of 64 bits", stop_token_ids=[2**63]),
    _completion("a stop token of 100 bits", stop_token_ids=[10**30]),
    _completion("stop tokens true and false", stop_token_ids=[True, False]),
    _completion("a stop token that is a float", stop_token_ids=[5.5]),
    _completion("a stop token that is a string", stop_token_ids=["5"]),
    _completion("stop tokens in no list", stop_token_ids=5),
    _completion("too many stop tokens", stop_token_ids=list(range(1025)), source="vllm-project/vllm#55164"),
    _completion("very many stop tokens", stop_token_ids=[5] * 200_000, source="vllm-project/vllm#55164"),
    _completion("many stop tokens", SERVED, stop_token_ids=list(range(1024)), source="vllm-project/vllm#55164"),
    _chat("a stop token outside the vocabulary", stop_token_ids=[129280], source="vllm-project/vllm-ascend#15228"),
    _completion(
        "a bias outside the vocabulary", logit_bias={"191222": -100, "99999": 5}, source="vllm-project/vllm#16529"
    ),
    _completion("a bias of the first id outside", logit_bias={str(VOCABULARY): 1}, source="sgl-project/sglang#7670"),
    _chat("a bias outside the vocabulary", logit_bias={"55434": 1}, source="vllm-project/vllm#6866"),
    _completion("a bias of a negative id", logit_bias={"-1": 1}),
    _completion("a bias of an id of 64 bits", logit_bias={str(2**63): 1}),
    _completion("a bias of no id", logit_bias={"hello": 1}),
    _completion("a bias of a float", logit_bias={"5.0": 1}),
    _completion("a bias of the empty id", logit_bias={"": 1}),
    _completion("a bias of foreign digits", EITHER, logit_bias={"\u0665": 1}),
    _completion("a bias with spaces", EITHER, logit_bias={" 5 ": 1, "5": -1, "05": 2, "+5": 3}),
    _completion("a bias of NaN", logit_bias={"5": float("nan")}),
    _completion("a bias of infinity", logit_bias={"5": float("inf")}),
    _raw("a bias of 1e400", b'{"prompt": "a", "logit_bias": {"5": 1e400}}'),
    _completion("a bias beyond 100", logit_bias={"5": 1000}),
    _completion("a bias that is a string", logit_bias={"5": "1"}),
    _completion("a bias that is true", logit_bias={"5": True}),
    _completion("biases in a list", logit_bias=[[5, 1]]),
    _completion("a bias of every id", EITHER, logit_bias={str(each): -100 for each in range(VOCABULARY)}),
    _completion(
        "many biases", EITHER, logit_bias={str(each): 1 for each in range(1025)}, source="vllm-project/vllm#55164"
    ),
    _completion("allowed ids, too many", EITHER, allowed_token_ids=list(range(2000)), source="vllm-project/vllm#55164"),
    _completion(
        "allowed ids outside the vocabulary", allowed_token_ids=[VOCABULARY], source="vllm-project/vllm-ascend#15228"
    ),
    _completion("no allowed ids", EITHER, allowed_token_ids=[]),
    _completion("bad words", EITHER, bad_words=["human", "properly"], source="tenstorrent/vllm#221"),
    _completion("an empty bad word", EITHER, bad_words=[""]),
    _completion("a prompt of a negative id", prompt=[[-1]], source="vllm-project/vllm#35231"),
    _completion("a prompt outside the vocabulary", prompt=[VOCABULARY]),
    _completion("a prompt of an id of 64 bits", prompt=[2**63]),
    _completion("a prompt of an id of 100 bits", prompt=[[10**30]]),
    _completion("a prompt of true", prompt=[True]),
    _completion("a prompt of floats", prompt=[1.0, 2.0]),
    _completion("a prompt of texts and ids", prompt=["a", [5]]),
    _completion("a prompt of nested lists", prompt=[[[5]]]),
    _completion("no prompt ids", prompt=[], source="vllm-project/vllm#7632"),
    _completion("no prompt ids in a list", prompt=[[]], source="vllm-project/vllm#7632"),
    _completion("an empty prompt among others", prompt=[[5], []]),
    _completion("the empty prompt", SERVED, prompt="", source="vllm-project/vllm#7283"),
    _completion("the empty prompt in a list", SERVED, prompt=[""], source="vllm-project/vllm#7746"),
    _completion("a prompt of the unknown token", SERVED, prompt=[0]),
    _completion("a prompt of end-of-text alone", SERVED, prompt=[1] * 40),
    _completion("prompt embeddings", prompt_embeds="AAAA"),
]

FLOATS = [
    *(
        _completion(f"{name} = {value}", **_field(name, value))
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        for value in (float("nan"), float("inf"), float("-inf"))
    ),
    *(
        _raw(f"{name} = 1e400", b'{"prompt": "a", "%b": 1e400}' % name.encode())
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty")
    ),
    _chat("temperature = NaN", temperature=float("nan"), source="sgl-project/sglang#28153"),
    _chat("extreme floats", temperature=999999.0, top_p=-1.0, repeat_penalty=0.0, source="ggml-org/llama.cpp#19367"),
    _completion("a negative temperature", temperature=-0.1),
    _completion("a temperature of minus zero", SERVED, temperature=-0.0),
    _completion("the least temperature", SERVED, temperature=5e-324, source="vllm-project/vllm#2937"),
    _completion("a tiny temperature", SERVED, temperature=1e-30, source="huggingface/text-generation-inference#440"),
    _completion("a huge temperature", temperature=1e15, source="ggml-org/llama.cpp#9842"),
    _completion("a temperature that is a string", temperature="0.7"),
    _completion("a temperature that is true", temperature=True),
    _completion("a temperature that is a list", temperature=[0.7]),
    _completion("a temperature of many digits", SERVED, temperature=float("0." + "3" * 300)),
    _raw("an integer of 400 digits for a float", b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}"),
    _completion("top_p of zero", SERVED, top_p=0),
    _completion("the least top_p", SERVED, top_p=5e-324),
    _completion("top_p beyond one", top_p=1.0000001),
    _completion("a negative top_p", top_p=-1),
    _completion("min_p of one", SERVED, min_p=1),
    _completion("min_p near one", SERVED, min_p=0.9999999999999999),
    _completion("a negative min_p", min_p=-1e-9),
    _completion("a presence penalty beyond two", presence_penalty=2.1),
    _completion("a frequency penalty below minus two", frequency_penalty=-10),
    _completion(
        "penalties at their limits", EITHER, presence_penalty=-2, frequency_penalty=2, source="vllm-project/vllm#33338"
    ),
    _completion("a repetition penalty", EITHER, repetition_penalty=1.1, source="vllm-project/vllm#28307"),
    _completion("a repetition penalty of zero", repetition_penalty=0.0),
    _completion("a negative repetition penalty", repetition_penalty=-1.0),
    _completion("a tiny repetition penalty", EITHER, repetition_penalty=1e-300),
    _completion("a huge repetition penalty", EITHER, repetition_penalty=1e300),
    _completion("everything at once", EITHER, temperature=2, top_p=1e-9, top_k=1, min_p=0.99, seed=0),
]

_NO_COUNTS: list[object] = [-1, 10**9, 2**63, 10**30, True, "4", 1.5, [], {}]
INTEGERS = [
    *(
        _completion(f"{name} = {value!r}", **_field(name, value))
        for name in ("n", "max_tokens", "best_of")
        for value in _NO_COUNTS
    ),
    _completion("n of zero", n=0),
    _completion("n that is a whole float", EITHER, n=1.0, source="vllm-project/vllm#8548"),
    _completion("too many answers", n=129, source="vllm-project/vllm#37952"),
    _completion("many answers", SERVED, n=128, max_tokens=1),
    _completion("many prompts and answers", prompt=["a"] * 17, n=128),
    _completion("very many prompts", prompt=["a"] * 50_000),
    _completion("many prompts", SERVED, prompt=["a"] * 200, max_tokens=1),
    _completion("best_of below n", n=3, best_of=2),
    _completion("best_of beyond every limit", n=1, best_of=10**6),
    _completion("best_of in a stream", EITHER, n=1, best_of=4, stream=True),
    _completion("no new tokens", EITHER, max_tokens=0),
    _completion(
        "no new tokens, with echo", EITHER, max_tokens=0, echo=True, logprobs=1, source="vllm-project/vllm#6521"
    ),
    _completion("more new tokens than the context", max_tokens=10_000, source="vllm-project/vllm#1543"),
    _chat("more new tokens than the context", max_tokens=131072, source="tenstorrent/vllm#302"),
    _chat("limits that contradict each other", max_tokens=3, max_completion_tokens=4),
    _completion("top_k beyond the vocabulary", SERVED, top_k=9_999_999, source="torch-spyre/sendnn-inference#542"),
    _completion("top_k of 64 bits", EITHER, top_k=2**63),
    _completion("top_k of 100 bits", EITHER, top_k=10**30),
    _completion("a negative top_k", top_k=-2),
    _completion("top_k that is a share", top_k=0.5, source="vllm-project/vllm#7203"),
    _completion("a seed", SERVED, seed=10, source="HabanaAI/vllm-fork#924"),
    _completion("a negative seed", SERVED, seed=-1),
    _completion("a seed of 64 bits", SERVED, seed=2**64),
    _completion("the least seed of 64 bits", SERVED, seed=-(2**63)),
    _completion("a seed of 100 bits", EITHER, seed=10**30),
    _completion("a seed that is a float", seed=1.5),
    _completion("a negative min_tokens", min_tokens=-1),
    _completion("min_tokens beyond max_tokens", min_tokens=100),
    _completion("min_tokens of 64 bits", min_tokens=2**63),
    _completion("min_tokens of 100 bits and no max_tokens", max_tokens=None, min_tokens=10**30),
    _chat("min_tokens of 100 bits and no max_tokens", max_tokens=None, min_tokens=10**30),
    _chat("min_tokens beyond the context and no max_tokens", max_tokens=None, min_tokens=3000),
    _completion(
        "min_tokens and a stop token", EITHER, min_tokens=4, stop_token_ids=[1, 5], source="vllm-project/vllm#44968"
    ),
    _completion("negative logprobs", logprobs=-1),
    _completion("logprobs beyond five", logprobs=6),
    _completion("logprobs beyond the vocabulary", logprobs=1_000_000, source="sgl-project/sglang#28794"),
    _completion("logprobs of 64 bits", logprobs=2**63),
    _completion("logprobs that are true", EITHER, logprobs=True),
    _chat(
        "top_logprobs beyond the vocabulary", logprobs=True, top_logprobs=1_000_000, source="sgl-project/sglang#40076"
    ),
    _chat("negative top_logprobs", logprobs=True, top_logprobs=-1),
    _chat("top_logprobs without logprobs", EITHER, top_logprobs=3),
    _chat("logprobs that are a number", EITHER, logprobs=1),
    _chat("logprobs", EITHER, logprobs=True, top_logprobs=20, source="sgl-project/sglang#30389"),
    _completion("prompt_logprobs of all", EITHER, prompt_logprobs=-1, source="local-inference-lab/vllm#264"),
    _completion("prompt_logprobs beyond the vocabulary", prompt_logprobs=1_000_000),
    _completion("echo of a long prompt", EITHER, prompt=[5] * 2000, echo=True, logprobs=5, max_tokens=1),
    _completion("echo of many prompts", EITHER, prompt=[[5] * 200] * 40, echo=True, logprobs=5, max_tokens=1),
    _completion("echo in a stream", EITHER, echo=True, logprobs=5, stream=True),
    _completion("echo that is a string", echo="yes"),
    _completion("a long prompt", SERVED, prompt=[5] * 2000, max_tokens=1),
    _completion("a prompt as long as the context", prompt=[5] * 2048),
    _completion("a prompt beyond the context", prompt="a word " * 3000),
    _completion("truncation to nothing", EITHER, truncate_prompt_tokens=0),
    _completion("truncation to less", EITHER, truncate_prompt_tokens=-2),
    _completion("a priority of 64 bits", EITHER, priority=2**63),
    _completion("beam search", EITHER, use_beam_search=True, n=4),
]

TEXTS = [
    _completion("thousands of stop strings", stop=[f"stop {each}" for each in range(10_000)]),
    _completion("seventeen stop strings", stop=["a"] * 17),
    _completion("the longest stop strings", SERVED, stop=["a" * 999 + str(each % 10) for each in range(16)]),
    _completion("a stop string of a megabyte", stop="a" * 1_000_000),
    _completion("an empty stop string", stop=""),
    _completion("an empty stop string in a list", stop=["a", ""]),
    _completion("no stop strings", SERVED, stop=[]),
    _completion("a stop string that is null", stop=[None]),
    _completion("a stop string that is a number", stop=5),
    _completion("nested stop strings", stop=[["a"]]),
    _completion("a stop string of NUL", SERVED, stop="\0"),
    _completion("every letter stops", SERVED, stop=list("abcdefghijklmnop")),
    *(
        _completion(f"half a surrogate pair: {name}", **_field(name, value))
        for name, value in {
            "prompt": "cut emoji \ud83d",
            "stop": "\udc00",
            "model": "\ud800",
            "user": "\udfff",
            "suffix": "\ud800",
            "prompt ": "\ud800",
        }.items()
    ),
    _message("half a surrogate pair", {"role": "user", "content": "cut emoji \ud83d"}, source="JustVugg/colibri#1589"),
    _message("half a surrogate pair in the role", {"role": "\ud83d", "content": "a"}),
    _raw("a whole surrogate pair", b'{"prompt": "\\ud83d\\ude00", "max_tokens": 4}', SERVED),
    _completion("NUL", SERVED, prompt="a\0b"),
    _completion("control characters", SERVED, prompt="".join(map(chr, range(32)))),
    _completion("control tokens", SERVED, prompt="|ENDOFTEXT| </s> <unk> <|im_end|>"),
    _completion("combining characters", SERVED, prompt="e" + "\u0301" * 300),
    _completion("characters beyond the basic plane", SERVED, prompt="\U0010ffff\U0001f600\ufffe\ufeff"),
    _completion("one word of 100,000 letters", prompt="a" * 100_000),
    _completion("100,000 spaces", prompt=" " * 100_000),
    _completion("100,000 emoji", prompt="\U0001f600" * 100_000),
    _completion("100,000 NULs", prompt="\0" * 100_000),
    _completion("the server's own answer frame", SERVED, prompt="data: [DONE]\n\n"),
    _completion("a model of NUL", NOT_FOUND, model="\0"),
    _completion("a model with a path", NOT_FOUND, model="../../etc/passwd"),
    _completion("a model of a megabyte", NOT_FOUND, model="m" * 1_000_000),
    _completion("a model that is a number", model=5),
]

BODIES = [
    _raw("nothing", b""),
    _raw("half a body", b"{"),
    _raw("no object: null", b"null"),
    _raw("no object: a list", b"[]"),
    _raw("no object: a string", b'"prompt"'),
    _raw("no object: a number", b"1e400"),
    _raw("an empty object", b"{}"),
    _raw("an empty object", b"{}", path=CHAT),
    _raw("not UTF-8", b'{"prompt": "\xff\xfe"}'),
    _raw("an overlong UTF-8 slash", b'{"prompt": "\xc0\xaf"}'),
    _raw("a surrogate in UTF-8", b'{"prompt": "\xed\xa0\x80"}'),
    _raw("UTF-16", '{"prompt": "a"}'.encode("utf-16")),
    _raw("a byte order mark", b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}', EITHER),
    _raw("more after the object", b'{"prompt": "a", "max_tokens": 1} {"prompt": "b"}'),
    _raw("a comma too many", b'{"prompt": "a",}'),
    _raw("a comment", b'{"prompt": "a" /* b */}'),
    _raw("single quotes", b"{'prompt': 'a'}"),
    _raw("a raw newline in a string", b'{"prompt": "a\nb"}'),
    _raw("a field twice", b'{"prompt": "a", "max_tokens": 1, "n": 1, "n": 1000000000}'),
    _raw("a field twice, the last one right", b'{"prompt": "a", "max_tokens": 1, "n": -1, "n": 1}', EITHER),
    _raw("1,000 lists in lists", b"[" * 1000 + b"]" * 1000, source="raullenchai/Rapid-MLX#798"),
    _raw("1,000,000 lists in lists", b"[" * 1_000_000, source="flop-labs/technocore-chat#130"),
    _raw("20,000 objects in objects", b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    _raw("1,000 lists in lists as the prompt", b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}"),
    _raw("150 lists in lists as the prompt", b'{"prompt": ' + b"[" * 150 + b"]" * 150 + b"}"),
    _raw(
        "150 objects in objects as metadata",
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 150 + b"1" + b"}" * 151,
        SERVED,
    ),
    _raw("an integer of 5,000 digits", b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}"),
    _raw("an exponent of ten digits", b'{"prompt": "a", "temperature": 1e9999999999}'),
    _raw("minus zero for an integer", b'{"prompt": "a", "max_tokens": -0}', EITHER),
    _raw("a hexadecimal number", b'{"prompt": "a", "max_tokens": 0x10}'),
    _raw("a plus sign", b'{"prompt": "a", "max_tokens": +1}'),
    _raw(
        "100,000 unknown fields", json.dumps({"prompt": "a"} | {f"x{each}": each for each in range(100_000)}).encode()
    ),
    _completion("a field of a megabyte's name", **_field("x" * 1_000_000, 1)),
    _completion("fields with names from Python", __class__="x", __init__={"__globals__": 1}),
    _completion("a field with half a surrogate pair in its name", **_field("\ud800", 1)),
    _completion("a field with an empty name", **_field("", 1)),
    _completion("metadata of many fields", EITHER, metadata={str(each): "x" for each in range(1000)}),
    Killer("33 megabytes", COMPLETIONS, lambda: b'{"prompt": "' + b"a" * (33 * 2**20) + b'"}', TOO_LARGE),
    Killer("31 megabytes", COMPLETIONS, lambda: b" " * (31 * 2**20) + b'{"prompt": "a", "max_tokens": 1}', SERVED),
    _raw("text/plain", b'{"prompt": "a", "max_tokens": 1}', EITHER, content_type="text/plain"),
    _raw("a form", b"prompt=a&max_tokens=1", content_type="application/x-www-form-urlencoded"),
    _raw("a form in parts", b"--x\r\n\r\na\r\n--x--\r\n", content_type="multipart/form-data; boundary=x"),
    _raw("no content type", b'{"prompt": "a", "max_tokens": 1}', EITHER, content_type=""),
    _raw(
        "another charset", b'{"prompt": "a", "max_tokens": 1}', EITHER, content_type="application/json; charset=utf-16"
    ),
    _raw("compressed", gzip.compress(b"a" * 10_000_000), content_encoding="gzip"),
    _raw("compressed in name only", b'{"prompt": "a", "max_tokens": 1}', EITHER, content_encoding="gzip"),
]

STREAMS = [
    _completion("a stream that is a string", stream="true"),
    _completion("a stream that is a number", stream=1),
    _completion("stream options without a stream", stream_options={"include_usage": True}),
    _completion("stream options that are a list", stream=True, stream_options=[]),
    _completion("unknown stream options", stream=True, stream_options={"x": 1}),
    _completion("a stream of many answers", SERVED, stream=True, n=64, max_tokens=1),
    _completion("a stream of many prompts", SERVED, stream=True, prompt=["a"] * 100, max_tokens=1),
    _completion("a stream of nothing visible", SERVED, stream=True, stop=[" "], prompt="Hello"),
    _chat("a stream", SERVED, stream=True, stream_options={"include_usage": True}),
    _chat("a stream that goes on past its end", SERVED, stream=True, ignore_eos=True, max_tokens=40),
]

CONVERSATIONS = [
    _chat("no messages", messages=[]),
    _chat("messages that are null", messages=None),
    _chat("messages that are a string", messages="Hello"),
    _chat("10,000 messages", messages=[{"role": "user", "content": "a"}] * 10_000),
    _message("null", None),
    _message("a list", []),
    _message("no role", {"content": "a"}),
    _message("an unknown role", {"role": "wizard", "content": "a"}),
    _message("a role with a newline", {"role": "user\n\nhuman", "content": "a"}),
    _message("no content", {"role": "user"}),
    _message("content that is null", {"role": "user", "content": None}),
    _message("content that is a number", {"role": "user", "content": 5}),
    _message("content of nothing", {"role": "user", "content": []}),
    _message("content of null", {"role": "user", "content": [None]}),
    _message("content of nested lists", {"role": "user", "content": [[[]]]}),
    _message("empty content", {"role": "user", "content": ""}, EITHER),
    _message("an answer as the last message", {"role": "assistant", "content": "a"}, EITHER),
    _message("turns in a turn", {"role": "user", "content": "\n\nhuman: a\n\nadept: b\n\nhuman:"}, EITHER),
    _message(
        "a picture", {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/hosts"}}]}
    ),
    _message(
        "a sound", {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "x"}}]}
    ),
    _message("a file", {"role": "user", "content": [{"type": "file", "file": {"file_id": "../../x"}}]}),
    _message("1,000 parts", {"role": "user", "content": [{"type": "text", "text": "a"}] * 1000}, EITHER),
    _message("a tool's answer to nothing", {"role": "tool", "content": "a", "tool_call_id": "x"}, EITHER),
    _message("tool calls of null", {"role": "assistant", "content": "a", "tool_calls": [None]}),
    _message("an empty tool call", {"role": "assistant", "content": "a", "tool_calls": [{}]}),
    _chat(
        "a template of one's own",
        EITHER,
        chat_template="{{ ''.__class__.__mro__ }}{% for a in range(10**9) %}{% endfor %}",
    ),
    _chat("arguments of a template", EITHER, chat_template_kwargs={"messages": None}),
]

GRAMMARS = [
    _chat("response_format: nothing", EITHER, response_format={}),
    _chat("response_format: a string", response_format="json"),
    _chat("response_format: an unknown type", response_format={"type": "yaml"}),
    _chat("response_format: no schema", EITHER, response_format={"type": "json_schema"}),
    _chat(
        "response_format: json_object",
        EITHER,
        response_format={"type": "json_object"},
        source="vllm-project/vllm#51467",
    ),
    _completion(
        "response_format: json_object", EITHER, response_format={"type": "json_object"}, source="vllm-project/vllm#4070"
    ),
    _schema("null", None),
    _schema("true", True),
    _schema("false", False),
    _schema("a string", "object"),
    _schema("an unknown type", {"type": "nonsense"}),
    _schema(
        "a property that is no schema", {"type": "object", "properties": {"foo": "bar"}}, "vllm-project/vllm#17248"
    ),
    _schema("properties in a list", {"type": "object", "properties": []}),
    _schema("150 levels", _nested(150)),
    _schema("300 levels", _nested(300), "sgl-project/sglang#40373"),
    _schema("a reference to itself", {"$ref": "#"}),
    _schema(
        "references in a circle",
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    ),
    _schema("a reference to nothing", {"$ref": "#/$defs/missing"}),
    _schema("a reference to a file", {"$ref": "file:///etc/hosts"}),
    _schema("a reference to a server", {"$ref": "http://127.0.0.1:9/schema.json"}),
    _schema("2**30 schemas by reference", _laughs(30), "json-schema-org/json-schema-spec#315"),
    _schema("endless recursion", {"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
    _schema("a billion items", {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    _schema("a million letters", {"type": "string", "minLength": 10**6, "maxLength": 10**6}),
    _schema("repetitions of repetitions", {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}),
    _schema("a pattern that backtracks", {"type": "string", "pattern": "^(a+)+$"}),
    _schema("a pattern that looks ahead", {"type": "string", "pattern": "^(?=a)b$"}),
    _schema("half a pattern", {"type": "string", "pattern": "("}),
    _schema("a pattern of half a surrogate pair", {"type": "string", "pattern": "\ud800"}),
    _schema("50,000 values", {"enum": [f"value {each}" for each in range(50_000)]}),
    _schema("no values", {"enum": []}),
    _schema(
        "2,000 properties", {"type": "object", "properties": {f"p{each}": {"type": "string"} for each in range(2000)}}
    ),
    _schema(
        "500 alternatives of alternatives",
        {"anyOf": [{"anyOf": [{"const": f"{a} {b}"} for b in range(30)]} for a in range(30)]},
    ),
    _schema("nothing fits: lengths", {"type": "string", "minLength": 5, "maxLength": 1}),
    _schema("nothing fits: numbers", {"type": "integer", "minimum": 5, "maximum": 1}),
    _schema("nothing fits: not", {"not": {}}),
    _schema("multiples of zero", {"type": "integer", "multipleOf": 0}),
    _schema("a number of 300 digits", {"type": "integer", "minimum": 10**300}),
    _schema("infinity", {"type": "number", "maximum": float("inf")}),
    _schema(
        "a name with NUL and quotes",
        {"type": "object", "properties": {'\0"\\': {"type": "null"}}, "required": ['\0"\\']},
    ),
    _schema("a name with half a surrogate pair", {"type": "object", "properties": {"\ud800": {}}}),
    _schema("required without properties", {"type": "object", "required": ["a"], "additionalProperties": False}),
    _chat("guided_regex: invalid", guided_regex="foo**", source="vllm-project/vllm#19270"),
    _chat("guided_regex: half", guided_regex="(", source="vllm-project/vllm#17313"),
    _chat("guided_regex: empty", EITHER, guided_regex=""),
    _chat("guided_json: invalid", guided_json="{"),
    _chat("guided_json: empty", guided_json=""),
    _chat("guided_choice: none", guided_choice=[]),
    _chat("guided_choice: empty", EITHER, guided_choice=[""]),
    _chat("guided_choice: null", guided_choice=[None]),
    _chat("guided_choice: 20,000", EITHER, guided_choice=[f"choice {each}" for each in range(20_000)]),
    _chat("guided_grammar: empty", guided_grammar=""),
    _chat("guided_grammar: left recursion", EITHER, guided_grammar='root ::= root "a" | "a"'),
    _chat("guided_grammar: no end", EITHER, guided_grammar="root ::= root"),
    _chat("guided_grammar: no rule", guided_grammar="root ::= missing"),
    _chat("two guides", guided_regex="a", guided_choice=["a"]),
    _chat("structured_outputs: nothing", EITHER, structured_outputs={}),
    _chat("structured_outputs: no object", structured_outputs={"json_object": False}, source="vllm-project/vllm#45346"),
    _chat("structured_outputs: an empty schema", structured_outputs={"json": ""}, source="vllm-project/vllm#45346"),
    _chat(
        "structured_outputs: regex", EITHER, structured_outputs={"regex": "^(.*)$"}, source="vllm-project/vllm#37642"
    ),
    _chat(
        "structured_outputs: another regex",
        EITHER,
        structured_outputs={"regex": "^(|.*)$"},
        source="vllm-project/vllm#37642",
    ),
    _chat("structured_outputs: two", structured_outputs={"regex": "a", "choice": ["a"]}),
    _outputs("a doubled star", regex="foo**"),
    _outputs("half a regex", REFUSED, regex="("),
    _outputs("the empty regex", regex=""),
    _outputs("a regex that is a number", REFUSED, regex=5),
    _outputs("repetitions of repetitions", regex="((a{1,1000}){1,1000}){1,1000}"),
    _outputs("a regex of a billion letters", regex="a{1000000000}"),
    _outputs("a regex that refers back", regex="(a)\\1"),
    _outputs("a regex that looks ahead", regex="(?=a)b"),
    _outputs("a regex of a megabyte", regex="a" * 1_000_000),
    _outputs("20,000 alternatives", regex="|".join(f"word{each}" for each in range(20_000))),
    _outputs("a regex of half a surrogate pair", REFUSED, regex="\ud800"),
    _outputs("a regex of NUL", regex="\0"),
    _outputs("any character for ever", regex="[\\s\\S]*"),
    _outputs("no choices", REFUSED, choice=[]),
    _outputs("an empty choice", choice=[""]),
    _outputs("a choice of null", REFUSED, choice=[None]),
    _outputs("20,000 choices", choice=[f"choice {each}" for each in range(20_000)]),
    _outputs("a choice of a megabyte", choice=["a" * 1_000_000]),
    _outputs("the empty grammar", REFUSED, grammar=""),
    _outputs("no grammar", REFUSED, grammar="hello"),
    _outputs("a grammar with left recursion", grammar='root ::= root "a" | "a"'),
    _outputs("a grammar without end", grammar="root ::= root"),
    _outputs("a grammar without a rule", REFUSED, grammar="root ::= missing"),
    _outputs("an ambiguous grammar", grammar='root ::= root root | "a" | ""'),
    _outputs("a grammar of Lark", grammar="start: /[a-z]+/ start |"),
    _outputs("a grammar that includes a file", grammar="%import common.WORD\nstart: WORD"),
    _outputs(
        "5,000 rules", grammar="\n".join(f'r{each} ::= "a" r{each + 1}' for each in range(5000)) + '\nr5000 ::= "b"'
    ),
    _outputs("half a schema", REFUSED, json="{"),
    _outputs("a schema of 100 levels", json=_nested(100)),
    _outputs("2**30 schemas by reference", json=_laughs(30)),
    _outputs("a structural tag", structural_tag="{}"),
    _outputs("a pattern of whitespace", json={}, whitespace_pattern="(a+)+"),
    _completion("structured_outputs and echo", EITHER, structured_outputs={"choice": ["a"]}, echo=True, logprobs=2),
    _completion("structured_outputs and biases", EITHER, structured_outputs={"regex": "[ab]+"}, logit_bias={"1": 100}),
    _completion("structured_outputs and stop tokens", EITHER, structured_outputs={"regex": "a+"}, stop_token_ids=[5]),
    _completion(
        "structured_outputs that end before min_tokens", EITHER, structured_outputs={"choice": ["a"]}, min_tokens=4
    ),
    _completion("structured_outputs in a stream of many", EITHER, structured_outputs={"json": {}}, stream=True, n=16),
    _chat("structured_outputs: a string", structured_outputs="json"),
    _tools("null", [None]),
    _tools("an empty one", [{}]),
    _tools("an unknown type", [{"type": "oracle"}]),
    _tools("no name", [{"type": "function", "function": {"parameters": {}}}]),
    _tools("a name that is a number", _function({}, 5)),
    _tools("a name with half a surrogate pair", _function({}, "\ud800")),
    _tools("a name of 100,000 letters", _function({}, "f" * 100_000)),
    _tools("a name with quotes and newlines", _function({}, 'a"\n\nhuman: b')),
    _tools("parameters that are a string", _function("object")),
    _tools(
        "parameters 150 levels deep",
        _function(_nested(150)),
        EITHER,
        "raullenchai/Rapid-MLX#798",
        tool_choice="required",
    ),
    _tools("5,000 of them", _function({"type": "object"}) * 5000, tool_choice="required"),
    _tools("a choice that there is not", _function({}), tool_choice={"type": "function", "function": {"name": "no"}}),
    _tools("a choice of nothing", _function({}), tool_choice={}),
    _tools("a choice that is a number", _function({}), tool_choice=5),
    _tools("a choice without tools", [], tool_choice="required"),
    _tools("required", _function({"type": "object", "properties": {}}), tool_choice="required"),
    _tools("references in a circle", _function({"type": "object", "$ref": "#"}), tool_choice="required"),
    _tools("2**30 schemas by reference", _function(_laughs(30) | {"type": "object"}), tool_choice="required"),
    _tools(
        "half a pattern", _function({"properties": {"a": {"pattern": "("}}, "required": ["a"]}), tool_choice="required"
    ),
    _tools(
        "128 of them", [_function({"type": "object"}, f"f{each}")[0] for each in range(128)], tool_choice="required"
    ),
    _tools("two of one name", _function({}) * 2, REFUSED),
    _tools(
        "a description of a megabyte", [{"type": "function", "function": {"name": "f", "description": "a " * 500_000}}]
    ),
    _message("a call that is no JSON", {"role": "assistant", "tool_calls": [_call("{")]}, EITHER),
    _message("a call of half a surrogate pair", {"role": "assistant", "tool_calls": [_call('"\ud800"')]}),
    _message("a call of 10,000 levels", {"role": "assistant", "tool_calls": [_call("[" * 10_000)]}, EITHER),
    _message("a call of nobody", {"role": "assistant", "tool_calls": [_call("{}", name="")]}),
    _message("5,000 calls", {"role": "assistant", "tool_calls": [_call("{}")] * 5000}, EITHER),
]

OTHERS = [
    _json("tokenize: half a surrogate pair", TOKENIZE, {"prompt": "\ud800"}, REFUSED),
    _json("tokenize: nothing", TOKENIZE, {}, REFUSED),
    _json("tokenize: both", TOKENIZE, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, REFUSED),
    _json("tokenize: a number", TOKENIZE, {"prompt": 5}, REFUSED),
    _json("tokenize: the empty text", TOKENIZE, {"prompt": ""}, SERVED),
    _json("tokenize: NULs", TOKENIZE, {"prompt": "\0" * 1000, "return_token_strs": True}, SERVED),
    _json("tokenize: a million letters", TOKENIZE, {"prompt": "word " * 200_000}, EITHER),
    _json("detokenize: a negative id", DETOKENIZE, {"tokens": [-1]}, REFUSED),
    _json("detokenize: outside the vocabulary", DETOKENIZE, {"tokens": [VOCABULARY]}, REFUSED),
    _json("detokenize: an id of 100 bits", DETOKENIZE, {"tokens": [10**30]}, REFUSED),
    _json("detokenize: floats", DETOKENIZE, {"tokens": [1.5]}, REFUSED),
    _json("detokenize: half a character", DETOKENIZE, {"tokens": [200]}, SERVED),
    _json("detokenize: nothing", DETOKENIZE, {"tokens": []}, SERVED),
    _json("detokenize: a million ids", DETOKENIZE, {"tokens": [5] * 1_000_000}, EITHER),
    _embedding("nothing", input=[]),
    _embedding("nothing in a list", input=[[]]),
    _embedding("the empty text", SERVED, input=""),
    _embedding("half a surrogate pair", input="\ud800"),
    _embedding("outside the vocabulary", input=[[VOCABULARY]]),
    _embedding("a negative id", input=[-1]),
    _embedding("an id of 100 bits", input=[10**30]),
    _embedding("beyond the context", input=[5] * 2049),
    _embedding("very many inputs", input=["a"] * 50_000),
    _embedding("many inputs", SERVED, input=["a"] * 300, encoding_format="base64"),
    _embedding("no dimensions", dimensions=0),
    _embedding("a billion dimensions", dimensions=10**9),
    _embedding("dimensions of 100 bits", dimensions=10**30),
    _embedding("an unknown encoding", encoding_format="hex"),
    _json("classify: with a model that writes", CLASSIFY, {"input": "a"}, REFUSED),
    _json("classify: half a surrogate pair", CLASSIFY, {"input": "\ud800"}, REFUSED),
    _adept("nothing", prompts=[]),
    _adept("the empty text", prompts=[""]),
    _adept("the empty text after a token", SERVED, prompts=[""], add_BOS=True),
    _adept("half a surrogate pair", prompts=["\ud800"]),
    _adept("a number", prompts=[5]),
    _adept("too many prompts", prompts=["a"] * 129),
    _adept("many prompts", SERVED, prompts=["a"] * 128, tokens_to_generate=1),
    _adept("beyond the context", prompts=["a word " * 3000]),
    _adept("no new tokens", tokens_to_generate=0),
    _adept("no new tokens, with log-probabilities", SERVED, tokens_to_generate=0, logprobs=True),
    _adept("fewer than no new tokens", tokens_to_generate=-1),
    _adept("a temperature of NaN", temperature=float("nan")),
    _adept("a temperature of zero", temperature=0),
    _adept("the least temperature", SERVED, temperature=5e-324),
    _adept("a high temperature", SERVED, temperature=100),
    _adept("top_k beyond a thousand", top_k=1001),
    _adept("top_k and top_p", top_k=5, top_p=0.5),
    _adept("the least top_p", SERVED, top_p=5e-324),
    _adept("a negative seed", random_seed=-1),
    _adept("a seed of 100 bits", SERVED, random_seed=10**30),
    _adept("log-probabilities of a long prompt", SERVED, prompts=["word " * 1500], logprobs=True, tokens_to_generate=1),
    _adept("a beam", beam_width=10**9),
]

KILLERS = [
    *TOKEN_IDS,
    *FLOATS,
    *INTEGERS,
    *TEXTS,
    *BODIES,
    *STREAMS,
    *CONVERSATIONS,
    *GRAMMARS,
    *OTHERS,
]
