"""/tokenize and /detokenize: the ids that generation would begin with, and their text."""

import httpx
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.app import create_app
from tests.server.http.fake_engine import MAX_MODEL_LEN

pytestmark = pytest.mark.anyio

CHAT = [{"role": "user", "content": "Who are you?"}]


async def post(http: httpx.AsyncClient, path: str, body: dict) -> dict:
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_text_becomes_the_tokenizers_ids_and_back(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    text = "A persimmon, na\u00efve \u2603 \U0001f351.\n"
    ids = tokenizer.encode(text)
    assert await post(http, "/tokenize", {"prompt": text, "model": "demo"}) == {
        "count": len(ids),
        "max_model_len": MAX_MODEL_LEN,
        "tokens": ids,
    }
    assert await post(http, "/detokenize", {"tokens": ids}) == {"prompt": text}


async def test_a_conversation_becomes_the_ids_that_chat_begins_with(
    http: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    ids = (await post(http, "/tokenize", {"messages": CHAT}))["tokens"]
    assert ids == tokenizer.encode("human: Who are you?\n\nadept:")


async def test_pieces_come_on_request(http: httpx.AsyncClient) -> None:
    pieces = (await post(http, "/tokenize", {"prompt": "What is\n", "return_token_strs": True}))["token_strs"]
    assert pieces[0] == "|ENDOFTEXT|"
    assert "".join(pieces[1:]) == "\u2581What\u2581is<0x0A>"


async def test_the_first_token_is_begun_with_where_the_checkpoint_says_so(config: PersimmonConfig, engine) -> None:
    from tests.server.http.conftest import DEMO

    beginning = Tokenizer.from_folder(DEMO, add_bos=True)
    client = EngineClient(engine.address)
    transport = httpx.ASGITransport(create_app(client, beginning, config, "demo"))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        plain = beginning.encode("Hello", add_bos=False)
        assert (await post(http, "/tokenize", {"prompt": "Hello"}))["tokens"] == [beginning.bos_token_id, *plain]
        without = await post(http, "/tokenize", {"prompt": "Hello", "add_special_tokens": False})
        # The engine has not said yet how long a sequence may be.
        assert without == {"count": len(plain), "max_model_len": None, "tokens": plain}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "Invalid request: give either prompt or messages."),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "Invalid request: give either prompt or messages."),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}, "gpt-4"),
        ("/tokenize", {"prompt": ["a"]}, "Invalid 'prompt'"),
        (
            "/tokenize",
            {"messages": CHAT, "add_generation_prompt": False},
            "not supported",
        ),
        ("/tokenize", {"messages": [{"role": "assistant", "content": "a"}]}, "Invalid 'messages'"),
        ("/detokenize", {}, "Missing required parameter: 'tokens'."),
        (
            "/detokenize",
            {"tokens": [5, 4096]},
            "tokens contains the token id 4096; this model's token ids are 0 to 4095.",
        ),
        ("/detokenize", {"tokens": [-1]}, "tokens contains the token id -1; this model's token ids are 0 to 4095."),
        ("/detokenize", {"tokens": "5"}, "Invalid 'tokens'"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(http: httpx.AsyncClient, path: str, body: dict, message: str) -> None:
    response = await http.post(path, json=body)
    assert response.status_code in (400, 404)
    assert message in response.json()["error"]["message"]


async def test_a_lone_surrogate_is_a_400(http: httpx.AsyncClient) -> None:
    response = await http.post("/tokenize", content=rb'{"prompt": "\ud800"}')
    assert response.status_code == 400
