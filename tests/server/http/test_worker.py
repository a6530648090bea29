"""The worker as a process of its own."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path

import httpx
import openai
import pytest

from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.server.children import blocking
from persimmon.server.config import Settings
from persimmon.server.engine.messages import SequenceOutput
from persimmon.server.http.transport.siblings import WorkerPlace
from persimmon.server.http.worker import READY, run_api_worker
from tests.server.http.conftest import DEMO
from tests.server.http.fake_engine import FakeEngine, says

pytestmark = pytest.mark.anyio

Tokens = Callable[[str], list[int]]
STREAM = {"prompt": "Hello", "stream": True, "max_tokens": 50}

SUPERVISOR = """
import multiprocessing, pathlib, signal, socket, sys
from persimmon.server.config import Settings
from persimmon.server.http.transport.siblings import WorkerPlace
from persimmon.server.http.worker import run_api_worker

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    listener = socket.create_server(("127.0.0.1", 0))
    arguments = (Settings(), pathlib.Path(sys.argv[1]), "demo", [sys.argv[2]], listener, WorkerPlace(), sender)
    spawn.Process(target=run_api_worker, args=arguments).start()
    receiver.recv()
    print(listener.getsockname()[1], flush=True)
    signal.pause()
"""


@contextlib.asynccontextmanager
async def worker(
    engine: FakeEngine,
    drain_seconds: float = 120,
    send_seconds: float = 60,
    key_file: Path | None = None,
    proxies: str = "127.0.0.1",
) -> AsyncIterator[tuple[SpawnProcess, httpx.AsyncClient]]:
    """A worker process that serves, and a client of it."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        settings = Settings(
            drain_timeout=drain_seconds,
            send_timeout=send_seconds,
            sse_ping_interval=0.05,
            api_key_file=key_file,
            forwarded_allow_ips=proxies,
        )
        arguments = (settings, DEMO, "demo", [engine.address], listener, WorkerPlace(), sender)
        process = spawn.Process(target=run_api_worker, args=arguments)
        with blocking({signal.SIGHUP}):  # as the supervisor starts it
            process.start()
        if key_file is not None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGHUP)  # too early for it to answer
    sender.close()  # so that a worker that cannot start is an EOFError here
    try:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            assert await asyncio.to_thread(receiver.recv) == READY
            assert (await client.get("/readyz")).status_code == 200
            yield process, client
    finally:
        process.kill()
        process.join()


async def test_a_stream_goes_on_after_sigterm_to_its_end(engine: FakeEngine, tokens: Tokens) -> None:
    async with worker(engine, drain_seconds=120) as (process, client):
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(client.post("/v1/completions", json=STREAM))
            [submit] = await engine.submissions(1)
            await engine.send(submit.sequence_id, tokens("one"))
            process.terminate()
            while (await client.get("/readyz")).status_code == 200:
                pass
            refused = await client.post("/v1/completions", json={"prompt": "Hello"})
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            await engine.send(submit.sequence_id, tokens("two"), "length")
        response = asking.result()
        await asyncio.to_thread(process.join)
    assert " one" in response.text
    assert " two" in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    assert process.exitcode == 0


async def test_a_stream_that_takes_too_long_after_sigterm_ends_with_an_error(
    engine: FakeEngine, tokens: Tokens
) -> None:
    async with worker(engine, drain_seconds=0.1) as (process, client):
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(client.post("/v1/completions", json=STREAM))
            [submit] = await engine.submissions(1)
            await engine.send(submit.sequence_id, tokens("one"))
            process.terminate()
        response = asking.result()
        await asyncio.to_thread(process.join)
    assert '"code":"engine_dead"' in response.text
    assert "the server is shutting down" in response.text
    assert process.exitcode == 0


async def test_a_client_that_does_not_read_is_given_up_and_has_its_sequence_aborted(
    engine: FakeEngine, tokens: Tokens
) -> None:
    async with worker(engine, send_seconds=0.2) as (_, client):
        _reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port, limit=1)
        body = json.dumps(STREAM | {"max_tokens": 1500, "logprobs": 5}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        [submit] = await engine.submissions(1)
        top = TokenLogprobs(token_id=5, logprob=-1.0, top_ids=list(range(5, 10)), top_logprobs=[-1.0] * 5)
        while not engine.aborted:
            for _ in range(200):
                await engine.send_output(SequenceOutput(submit.sequence_id, [5] * 8, logprobs=[top] * 8))
            await asyncio.sleep(0)
        assert engine.aborted == [submit.sequence_id]
        writer.close()
        engine.script = says(tokens("yes"))
        assert (await client.post("/v1/completions", json={"prompt": "Hello"})).status_code == 200


async def test_a_quiet_stream_is_pinged_and_an_error_after_that_is_an_event(engine: FakeEngine, tokens: Tokens) -> None:
    async with worker(engine) as (_, client), client.stream("POST", "/v1/completions", json=STREAM) as response:
        lines = response.aiter_lines()
        assert response.status_code == 200
        assert await anext(lines) == ": ping"
        [submit] = await engine.submissions(1)
        await engine.send(submit.sequence_id, tokens("one"))
        while not (line := await anext(lines)).startswith("data: "):
            assert line in (": ping", "")
        while (await anext(lines)) != ": ping":  # it is quiet again
            pass
        await engine.send_output(SequenceOutput(submit.sequence_id, [], "error", error="It failed."))
        rest = [line async for line in lines if line.startswith("data: ")]
        assert len(rest) == 1
        assert json.loads(rest[0].removeprefix("data: "))["error"]["message"] == "It failed."


async def test_openais_client_does_not_see_pings(engine: FakeEngine, tokens: Tokens) -> None:
    async with worker(engine) as (_, http):
        client = openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
        asking = asyncio.create_task(client.completions.create(model="demo", prompt="Hello", stream=True))
        [submit] = await engine.submissions(1)
        stream = await asking  # it has its status line, with a ping, before any token
        await engine.send(submit.sequence_id, tokens("one"))
        await engine.send(submit.sequence_id, tokens("two"), "length")
        assert "".join([chunk.choices[0].text async for chunk in stream]) == " one two"
        await client.close()


async def test_an_idle_worker_ignores_ctrl_c_and_ends_at_sigterm(engine: FakeEngine, tokens: Tokens) -> None:
    engine.script = says(tokens("yes"))
    async with worker(engine, drain_seconds=120) as (process, client):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        answer = await client.post("/v1/completions", json={"prompt": "Hello"})
        assert answer.json()["choices"][0]["text"] == " yes"
        process.terminate()
        await asyncio.to_thread(process.join)
    assert process.exitcode == 0


async def test_sighup_changes_a_workers_keys_and_with_a_file_that_cannot_be_used_nothing(
    engine: FakeEngine, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:correct-horse\n")
    async with worker(engine, key_file=keys) as (process, client):
        assert process.pid is not None

        async def status(key: str) -> int:
            return (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code

        assert await status("correct-horse") == 200
        keys.write_text("bob:battery-staple\n")
        os.kill(process.pid, signal.SIGHUP)
        while await status("battery-staple") != 200:
            pass
        assert await status("correct-horse") == 401
        keys.write_text("bob\n")
        os.kill(process.pid, signal.SIGHUP)
        logged = ""
        while "API keys and certificates are unchanged" not in logged:
            assert await status("battery-staple") == 200
            logged += capfd.readouterr().err
        assert await status("battery-staple") == 200
    (line,) = [line for line in logged.splitlines() if " ERROR " in line]
    assert f"--api-key-file {keys}, line 1: expected name:key" in line


@pytest.mark.parametrize(
    ("proxies", "logged"), [("127.0.0.0/8", "10.1.2.3"), ("10.0.0.0/8", "127.0.0.1"), ("", "127.0.0.1")]
)
async def test_the_log_has_the_client_that_a_trusted_proxy_names(
    engine: FakeEngine, capfd: pytest.CaptureFixture[str], proxies: str, logged: str
) -> None:
    async with worker(engine, proxies=proxies) as (_, client):
        headers = {"X-Forwarded-For": "10.1.2.3", "X-Forwarded-Proto": "https", "X-Request-Id": "forwarded"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        lines = ""
        while "request_id=forwarded" not in lines:  # written by a thread
            lines += capfd.readouterr().err
            await asyncio.sleep(0)
    (line,) = [line for line in lines.splitlines() if "request_id=forwarded" in line]
    assert line.endswith(f"client={logged}")


async def test_a_worker_ends_when_its_supervisor_is_killed(engine: FakeEngine, tmp_path: Path) -> None:
    program = tmp_path / "supervisor.py"
    program.write_text(SUPERVISOR)
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, program, DEMO, engine.address, stdout=asyncio.subprocess.PIPE
    )
    assert supervisor.stdout is not None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(await supervisor.stdout.readline()))
        writer.write(b"GET /livez HTTP/1.1\r\nHost: server\r\n\r\n")
        assert b"200 OK" in await reader.readline()
        supervisor.kill()
        with contextlib.suppress(ConnectionError):
            await reader.read()  # to the end, which comes when the worker is gone
        writer.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            supervisor.kill()
        await supervisor.communicate()  # to the end of its output, which the worker has too


def test_a_worker_never_imports_torch() -> None:
    program = "import sys, persimmon.server.http.worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
