"""What must be known of a server before it is measured: its model's name, and whether prompts may be token ids."""

import json

from persimmon.server.bench.answer import RequestFailedError, error_message
from persimmon.server.bench.http_client import Connection, Endpoint
from persimmon.server.bench.workload import COMPLETIONS


async def served_model(endpoint: Endpoint) -> str:
    """The name of the first model that the server lists.

    Raises:
        OSError: the server cannot be reached.
        RequestFailedError: it lists no model.
    """
    async with Connection(endpoint) as connection:
        response = await connection.get("/v1/models")
    try:
        return str(json.loads(response.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        message = f"{error_message(response.body)} (HTTP {response.status}); name one with --model"
        raise RequestFailedError("/v1/models lists no model", message) from None


async def refusal_of_token_ids(endpoint: Endpoint, model: str, token_ids: tuple[int, int]) -> str | None:
    """What the server says against a prompt of token ids; None where it takes them.

    Args:
        endpoint: the server.
        model: the name to put into the request.
        token_ids: (first, last + 1) of the ids.

    Raises:
        OSError: the server cannot be reached.
    """
    prompt = [token_ids[0], token_ids[1] - 1]
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    async with Connection(endpoint) as connection:
        response = await connection.post(COMPLETIONS, json.dumps(body).encode())
    # Anything else, like a missing key, would be the same with words, and is seen in the measured requests.
    return error_message(response.body) if response.status in (400, 422) else None
