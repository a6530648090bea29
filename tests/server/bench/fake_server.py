"""A scripted server with OpenAI's streams, and the pieces that its answers are made of."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from persimmon.server.bench.http_client import Endpoint, Response


def sse(*chunks: dict[str, Any] | str) -> bytes:
    return b"".join(
        b"data: %s\n\n" % (chunk if isinstance(chunk, str) else json.dumps(chunk)).encode() for chunk in chunks
    )


def text_chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}]}


def chat_chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def usage_chunk(completion_tokens: int, prompt_tokens: int = 3) -> dict[str, Any]:
    return {
        "choices": [],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }


def response(body: bytes, status: int = 200) -> Response:
    return Response(started=1.0, finished=3.0, status=status, pieces=[(2.0, body)])


class FakeServer:
    """Answers completions with two chunks of text for four tokens, after a turn of the event loop."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.requests: list[dict[str, Any]] = []
        self.prompts: list[tuple[int, ...]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.connections = 0
        self.answer: Callable[[dict[str, Any]], bytes] = self.completion

    @staticmethod
    def completion(request: dict[str, Any]) -> bytes:
        chunk = chat_chunk if "messages" in request else text_chunk
        usage = usage_chunk(request["max_tokens"], len(request.get("prompt", "")))
        events = sse(chunk("one two"), chunk(" three four"), usage, "[DONE]")
        return http_response(events)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head)
                length = int(head.lower().split(b"content-length:")[1].split()[0])
                body = await reader.readexactly(length)
                if head.startswith(b"GET /v1/models"):
                    writer.write(http_response(json.dumps({"data": [{"id": "fake"}]}).encode()))
                    continue
                request = json.loads(body)
                self.requests.append(request)
                self.prompts.append(tuple(request.get("prompt", ())))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                await asyncio.sleep(0)
                self.in_flight -= 1
                writer.write(self.answer(request))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def http_response(body: bytes, status: str = "200 OK") -> bytes:
    # In chunks that cut lines and characters anywhere, as a network does.
    pieces = [body[start : start + 7] for start in range(0, len(body), 7)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"


@asynccontextmanager
async def fake_server() -> AsyncIterator[tuple[FakeServer, Endpoint]]:
    fake = FakeServer()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    try:
        yield fake, Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


@contextmanager
def fake_server_in_a_thread() -> Iterator[tuple[FakeServer, str]]:
    """The fake server and its URL, for tests of what runs an event loop of its own."""
    ready, stop = threading.Event(), threading.Event()
    found: list[tuple[FakeServer, str]] = []

    async def run() -> None:
        async with fake_server() as (fake, endpoint):
            found.append((fake, endpoint.url))
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    ready.wait()
    try:
        yield found[0]
    finally:
        stop.set()
        thread.join()
