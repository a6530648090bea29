from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

ERROR = {"$ref": "#/components/schemas/answer.ErrorBody"}


async def document(http: httpx.AsyncClient) -> dict[str, Any]:
    return (await http.get("/openapi.json")).json()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(reference := node.get("$ref"), str):
            yield reference
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from references(child)


async def test_every_reference_leads_to_a_schema(http: httpx.AsyncClient) -> None:
    described = await document(http)
    found = set(references(described))
    assert "#/components/schemas/request.ChatMessage" in found
    assert "#/components/schemas/answer.ChatMessage" in found
    for reference in found:
        names = reference.removeprefix("#/").split("/")
        node = described
        for name in names:
            node = node[name]
        assert node["type"] == "object"


async def test_every_answer_has_a_schema_and_every_error_openais_shape(http: httpx.AsyncClient) -> None:
    for name, operation in operations(await document(http)):
        for status, response in operation["responses"].items():
            schemas = [media.get("schema") or media["itemSchema"] for media in response["content"].values()]
            assert all(schemas), (name, status)
            if status.startswith("4"):
                assert schemas == [ERROR], (name, status)


async def test_every_endpoint_with_a_body_documents_it_and_the_errors_it_may_bring(http: httpx.AsyncClient) -> None:
    with_body = {name: operation for name, operation in operations(await document(http)) if not name.startswith("get ")}
    assert "post /v1/completions" in with_body
    for name, operation in with_body.items():
        assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"], name
        assert {"200", "400", "401", "404", "408", "413", "429", "500", "503"} <= operation["responses"].keys(), name
        assert "422" not in operation["responses"], name


async def test_streams_are_documented_event_by_event(http: httpx.AsyncClient) -> None:
    described = await document(http)
    answer = described["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert answer["application/json"]["schema"] == {"$ref": "#/components/schemas/answer.ChatCompletion"}
    done, chunk = answer["text/event-stream"]["itemSchema"]["properties"]["data"]["anyOf"]
    assert done == {"const": "[DONE]"}
    assert chunk["contentSchema"]["anyOf"] == [{"$ref": "#/components/schemas/answer.ChatCompletionChunk"}, ERROR]


async def test_there_is_a_page_for_people(http: httpx.AsyncClient) -> None:
    assert (await http.get("/docs")).status_code == 200
