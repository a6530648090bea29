from typing import Any

import httpx
import pytest

from persimmon.server.engine.client import EngineClient
from persimmon.server.http.schemas.chat import ChatCompletionRequest
from persimmon.server.http.schemas.completions import CompletionRequest
from tests.server.http.fake_engine import FakeEngine, says

pytestmark = pytest.mark.anyio

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO: dict[str, Any] = {"prompt": "Hello"}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PROMPT_FORMS = "it must be a string, a list of strings, a list of token ids or a list of such lists, not empty"
CONTENT_FORMS = 'it must be a string or a list of parts like {"type": "text", "text": "..."}'

BAD_PROMPTS: list[object] = [[], [[]], 5, {"text": "a"}, [1.5], [True], ["a", 5], ["a", [5]], [[5], []], [[[5]]]]


def messages(*contents: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content} for content in contents]}


def missing_part(field: str) -> tuple[str, str]:
    return f"Missing required parameter: 'messages[0].content[1].{field}'.", "missing_required_parameter"


def unknown_part(field: str) -> tuple[str, str]:
    return f"Unknown parameter: 'messages[0].content[1].{field}'.", "unknown_parameter"


BAD_REQUESTS: list[tuple[str, dict[str, Any], str, str | None, str | None]] = [
    (COMPLETIONS, {}, "Missing required parameter: 'prompt'.", "prompt", "missing_required_parameter"),
    (COMPLETIONS, {"prompt": None}, "Missing required parameter: 'prompt'.", "prompt", "missing_required_parameter"),
    (CHAT, {}, "Missing required parameter: 'messages'.", "messages", "missing_required_parameter"),
    *(
        (COMPLETIONS, {"prompt": prompt}, f"Invalid 'prompt': {PROMPT_FORMS}.", "prompt", None)
        for prompt in BAD_PROMPTS
    ),
    (
        COMPLETIONS,
        {"prompt": [4096]},
        "prompt contains the token id 4096; this model's token ids are 0 to 4095.",
        "prompt",
        None,
    ),
    (
        COMPLETIONS,
        {"prompt": [[5], [-1]]},
        "prompt[1] contains the token id -1; this model's token ids are 0 to 4095.",
        "prompt[1]",
        None,
    ),
    (
        CHAT,
        ASK | {"max_tokens": -1},
        "Invalid 'max_tokens': input should be greater than or equal to 0, not -1.",
        "max_tokens",
        None,
    ),
    (
        CHAT,
        ASK | {"min_tokens": 4, "max_completion_tokens": 3},
        "Invalid 'min_tokens': it is 4 but max_completion_tokens is 3.",
        "min_tokens",
        None,
    ),
    (
        COMPLETIONS,
        {"prompt": [5], "min_tokens": 17},
        "Invalid 'min_tokens': it is 17, but without max_tokens the answer to this prompt has at most 16 tokens.",
        "min_tokens",
        None,
    ),
    (
        CHAT,
        ASK | {"min_tokens": 10**30},
        f"Invalid 'min_tokens': it is {10**30}, but without max_tokens the answer to this prompt has at most 2037 "
        "tokens.",
        "min_tokens",
        None,
    ),
    *(
        (COMPLETIONS, HELLO | {"logit_bias": biases}, f"Invalid 'logit_bias': {reason}.", "logit_bias", None)
        for biases, reason in (
            ([5], 'it must be an object of token ids and biases, like {"71013": -100}'),
            ({"a": 1}, "'a' is not a token id"),
            ({"-1": 1}, "'-1' is not a token id"),
            ({"5": 101}, "the bias of token 5 must be a number from -100 to 100"),
            ({"5": True}, "the bias of token 5 must be a number from -100 to 100"),
            ({"5": "1"}, "the bias of token 5 must be a number from -100 to 100"),
            ({"5": 1, "05": 2}, "token 5 has two biases"),
            ({str(token): 0 for token in range(1025)}, "it has 1025 tokens; at most 1024 may have a bias"),
        )
    ),
    (
        COMPLETIONS,
        HELLO | {"logit_bias": {"4096": 1}},
        "logit_bias contains the token id 4096; this model's token ids are 0 to 4095.",
        "logit_bias",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"presence_penalty": -2.5},
        "Invalid 'presence_penalty': input should be greater than or equal to -2, not -2.5.",
        "presence_penalty",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"repetition_penalty": 0},
        "Invalid 'repetition_penalty': input should be greater than 0, not 0.",
        "repetition_penalty",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"max_tokens": 2.5},
        "Invalid 'max_tokens': input should be a valid integer, not 2.5.",
        "max_tokens",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"temperature": -0.1},
        "Invalid 'temperature': input should be greater than or equal to 0, not -0.1.",
        "temperature",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"temperature": 2.1},
        "Invalid 'temperature': input should be less than or equal to 2, not 2.1.",
        "temperature",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"temperature": "hot"},
        "Invalid 'temperature': input should be a valid number, not 'hot'.",
        "temperature",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"top_p": -0.5},
        "Invalid 'top_p': input should be greater than or equal to 0, not -0.5.",
        "top_p",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"top_k": -2},
        "Invalid 'top_k': input should be greater than or equal to -1, not -2.",
        "top_k",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"min_p": 1.5},
        "Invalid 'min_p': input should be less than or equal to 1, not 1.5.",
        "min_p",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"n": 0},
        "Invalid 'n': input should be greater than or equal to 1, not 0.",
        "n",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"n": 129},
        "Invalid 'n': input should be less than or equal to 128, not 129.",
        "n",
        None,
    ),
    (COMPLETIONS, HELLO | {"n": True}, "Invalid 'n': input should be a valid integer, not True.", "n", None),
    (COMPLETIONS, HELLO | {"seed": "x"}, "Invalid 'seed': input should be a valid integer, not 'x'.", "seed", None),
    (
        COMPLETIONS,
        HELLO | {"stop": ""},
        "Invalid 'stop[0]': string should have at least 1 character, not ''.",
        "stop[0]",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"stop": ["a", 5]},
        "Invalid 'stop[1]': input should be a valid string, not 5.",
        "stop[1]",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"stop": ["a"] * 17},
        "Invalid 'stop': expected at most 16 items, not 17.",
        "stop",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"stop": "a" * 1001},
        "Invalid 'stop[0]': string should have at most 1000 characters.",
        "stop[0]",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"stream": "yes"},
        "Invalid 'stream': input should be a valid boolean, not 'yes'.",
        "stream",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"stream_options": {"include_usage": True}},
        "Invalid 'stream_options': it is only allowed when stream is true.",
        "stream_options",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"stream": True, "stream_options": {"include_usage": 1}},
        "Invalid 'stream_options.include_usage': input should be a valid boolean, not 1.",
        "stream_options.include_usage",
        None,
    ),
    (
        COMPLETIONS,
        {"prompt": ["a"] * 17, "n": 128},
        "17 prompts with n = 128 make 2176 answers; one request may ask for at most 2048.",
        "n",
        None,
    ),
    (COMPLETIONS, HELLO | {"temprature": 1}, "Unknown parameter: 'temprature'.", "temprature", "unknown_parameter"),
    (
        COMPLETIONS,
        HELLO | {"logprobs": 6},
        "Invalid 'logprobs': input should be less than or equal to 5, not 6.",
        "logprobs",
        None,
    ),
    (
        CHAT,
        ASK | {"top_logprobs": 3},
        "Invalid 'top_logprobs': it is only allowed when logprobs is true.",
        "top_logprobs",
        None,
    ),
    (
        CHAT,
        ASK | {"logprobs": True, "top_logprobs": 21},
        "Invalid 'top_logprobs': input should be less than or equal to 20, not 21.",
        "top_logprobs",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"suffix": " the end"},
        "'suffix' is not supported by this server: the model was not trained to insert text; "
        'leave it out or send "".',
        "suffix",
        "unsupported_parameter",
    ),
    (
        COMPLETIONS,
        HELLO | {"best_of": 2, "n": 3},
        "Invalid 'best_of': it is 2 but n is 3; it must be at least n.",
        "best_of",
        None,
    ),
    (
        COMPLETIONS,
        HELLO | {"best_of": 2, "stream": True},
        "Invalid 'best_of': in a stream it must equal n, because the best answers are known only at the end.",
        "best_of",
        None,
    ),
    (
        COMPLETIONS,
        {"prompt": [[5] * 2000] * 3, "echo": True, "logprobs": 5, "n": 128, "max_tokens": 1},
        "echo with logprobs = 5 would report 4608000 log-probabilities of 6000 prompt tokens for n = 128; "
        "one request may ask for at most 1048576.",
        "echo",
        None,
    ),
    (
        COMPLETIONS,
        {"prompt": ["a"] * 17, "best_of": 128},
        "17 prompts with best_of = 128 make 2176 answers; one request may ask for at most 2048.",
        "best_of",
        None,
    ),
    (
        CHAT,
        ASK | {"max_tokens": 3, "max_completion_tokens": 4},
        "Invalid 'max_completion_tokens': it is 4 but max_tokens is 3; give one of the two.",
        "max_completion_tokens",
        None,
    ),
    (
        CHAT,
        {"messages": []},
        "Invalid 'messages': expected at least 1 item, not 0.",
        "messages",
        None,
    ),
    (CHAT, {"messages": "Hi"}, "Invalid 'messages': input should be a valid array, not 'Hi'.", "messages", None),
    (
        CHAT,
        {"messages": [{"role": "user"}]},
        "Missing required parameter: 'messages[0].content'.",
        "messages[0].content",
        "missing_required_parameter",
    ),
    *(
        (CHAT, messages(content), f"Invalid 'messages[0].content': {CONTENT_FORMS}.", "messages[0].content", None)
        for content in (5, [], ["a"], [{"type": "text", "text": "a"}, 5])
    ),
    *(
        (CHAT, messages([{"type": "text", "text": "a"}, part]), message, f"messages[0].content[1]{place}", code)
        for part, place, message, code in (
            ({"text": "a"}, ".type", *missing_part("type")),
            ({"type": "text"}, ".text", *missing_part("text")),
            ({"type": "refusal", "text": "a"}, ".text", *unknown_part("text")),
            ({"type": "text", "text": "a", "b": 1}, ".b", *unknown_part("b")),
            (
                {"type": "text", "text": 5},
                ".text",
                "Invalid 'messages[0].content[1].text': it must be a string.",
                None,
            ),
            (
                {"type": "poem", "text": "a"},
                ".type",
                "Invalid 'messages[0].content[1].type': 'poem' is not a supported content type; send 'text'.",
                None,
            ),
            (
                {"type": "image_url", "image_url": {"url": "x"}},
                ".type",
                "'messages[0].content[1].type' is not supported by this server: the model reads and writes text only; "
                "send parts of the type 'text'.",
                "unsupported_parameter",
            ),
        )
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "a", "audio": {"id": "b"}}]},
        "'messages[0].audio' is not supported by this server: the model does not process audio; leave it out.",
        "messages[0].audio",
        "unsupported_parameter",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "a", "refusal": "b"}]},
        "Invalid 'messages[0].refusal': only assistant messages may have it; this message's role is 'user'.",
        "messages[0].refusal",
        None,
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "a", "mood": "b"}]},
        "Unknown parameter: 'messages[0].mood'.",
        "messages[0].mood",
        "unknown_parameter",
    ),
    (
        CHAT,
        {"messages": [{"role": "function", "content": "a"}]},
        "Invalid 'messages': messages[0] has the role 'function', which this model's chat format lacks: "
        "allowed are system, developer, user, assistant, tool.",
        "messages",
        None,
    ),
    (
        COMPLETIONS,
        {"prompt": [5] * 2048},
        "This model's maximum context length is 2048 tokens. However, you requested 2049 tokens "
        "(2048 in the prompt, 1 for the completion). Please shorten the prompt or ask for fewer tokens.",
        "prompt",
        "context_length_exceeded",
    ),
    (
        COMPLETIONS,
        {"prompt": [5] * 2000, "max_tokens": 49},
        "This model's maximum context length is 2048 tokens. However, you requested 2049 tokens "
        "(2000 in the prompt, 49 for the completion). Please shorten the prompt or ask for fewer tokens.",
        "max_tokens",
        "context_length_exceeded",
    ),
]


@pytest.mark.parametrize(("path", "body", "message", "param", "code"), BAD_REQUESTS)
async def test_a_bad_request_is_a_400_that_says_what_is_wrong_and_where(
    http: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    body: dict[str, Any],
    message: str,
    param: str | None,
    code: str | None,
) -> None:
    response = await http.post(path, json=body)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    assert response.json() == {"error": error}
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (b"\xff", None, "invalid_json"),
        (b'{"prompt": "\\ud800"}', None, "invalid_json"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", None, "invalid_json"),
        (b"[" * 1000 + b"]" * 1000, None, "invalid_json"),
        (b'"prompt"', None, None),
        (b"[1, 2]", None, None),
        (b'{"prompt": "a", "temperature": NaN}', "temperature", None),
        (b'{"prompt": "a", "top_p": Infinity}', "top_p", None),
        (b'{"prompt": "a", "min_p": -Infinity}', "min_p", None),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature", None),
        (b'{"prompt": [1e999]}', "prompt", None),
        (b'{"prompt": [99999999999999999999999999]}', "prompt", None),
    ],
)
async def test_a_body_that_no_client_should_send_is_a_400(
    http: httpx.AsyncClient, engine: FakeEngine, content: bytes, param: str | None, code: str | None
) -> None:
    response = await http.post(COMPLETIONS, content=content)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert engine.submitted == []


async def test_every_supported_field_may_be_null(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = says([9])
    for path, kind, body in (
        (COMPLETIONS, CompletionRequest, HELLO),
        (CHAT, ChatCompletionRequest, ASK),
    ):
        nulls = dict.fromkeys(kind.model_fields.keys() - body.keys())
        response = await http.post(path, json=body | nulls)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, HELLO), (CHAT, ASK)])
async def test_another_model_is_a_404(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    response = await http.post(path, json=body | {"model": "gpt-4"})
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": "The model 'gpt-4' does not exist; this server serves 'demo'.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


async def test_an_unknown_url_is_a_404_of_the_same_shape(http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/images")
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": "Unknown URL: GET /v1/images. GET /docs lists all URLs.",
            "type": "invalid_request_error",
            "param": None,
            "code": "unknown_url",
        }
    }


async def test_a_wrong_method_is_a_405_of_the_same_shape(http: httpx.AsyncClient) -> None:
    response = await http.get(COMPLETIONS)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["message"] == "GET is not allowed on /v1/completions; use POST."


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_a_500_that_shows_no_insides(
    http: httpx.AsyncClient, engine_client: EngineClient, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(engine_client, "submit", broken)
    response = await http.post(COMPLETIONS, json=HELLO | {"stream": stream})
    assert response.status_code == 500
    assert response.json() == {
        "error": {
            "message": "Internal server error; see the server's log for details.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
