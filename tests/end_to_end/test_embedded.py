"""`persimmon.EmbeddedServer` in other programs: as its guide shows it, and when things go wrong."""

import asyncio
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

import persimmon
from persimmon.server.cli import main as command_line

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "embedding.md"
SMALL = {"kv_cache_memory": "64MB", "max_num_seqs": 4}
PROMPT = "human: What does galaxy mean?\n\nadept:"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


def engines() -> list[psutil.Process]:
    """The engine processes of this process."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture
def temporary(monkeypatch) -> Iterator[Path]:
    """Where this process makes temporary files: a short path, because sockets' paths are."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@contextlib.asynccontextmanager
async def calling(app) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client


def complete(client: httpx.AsyncClient, max_tokens: int = 3, path: str = "/v1/completions"):
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    return asyncio.ensure_future(client.post(path, json=body))


async def until_submitted(server: persimmon.EmbeddedServer) -> None:
    """Returns when the engine has a request."""
    while server._running is None or not server._running.client.open_streams:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def until_unhealthy(server: persimmon.EmbeddedServer) -> None:
    """Raises what `check_health` raises, as soon as it does."""
    while True:
        server.check_health()
        await asyncio.sleep(0)


def test_the_example_of_the_guide_answers(tmp_path):
    program = tmp_path / "program.py"  # without a guard: the engine process must not run it again
    program.write_text(examples()[0])
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, timeout=120)
    assert "galaxy" in ended.stdout.lower()
    assert ended.stdout.count("\n") == 1
    assert "Traceback" not in ended.stderr
    assert "leaked" not in ended.stderr


def test_a_server_that_is_mounted_in_another_application_answers_and_drains(temporary):
    names: dict = {}
    exec(compile(examples()[1], str(GUIDE), "exec"), names)
    server, app = names["server"], names["app"]

    async def main() -> None:
        await server.start()
        [engine] = engines()
        async with calling(app) as client:
            refused = await complete(client, path="/persimmon/v1/completions")
            assert refused.status_code == 503
            assert "loading" in refused.json()["error"]["message"]
            await server.ready()
            assert (await client.get("/persimmon/v1/models")).json()["data"][0]["id"] == "persimmon-demo"
            assert (await client.get("/persimmon/health")).status_code == 200
            request = complete(client, 200, "/persimmon/v1/completions")
            await until_submitted(server)
            draining = asyncio.create_task(server.drain())
            await asyncio.sleep(0)
            assert (await complete(client, path="/persimmon/v1/completions")).status_code == 503
            assert not draining.done()
            assert (await request).json()["usage"]["completion_tokens"] == 200
            assert await draining
            await server.stop()
            await server.stop()
            assert (await complete(client, path="/persimmon/v1/completions")).status_code == 503
        assert not engine.is_running()
        with pytest.raises(RuntimeError, match="started before"):
            await server.start()

    asyncio.run(main())
    assert not list(temporary.iterdir())


def test_an_engine_that_dies_fails_open_requests_and_later_ones():
    async def main() -> None:
        async with persimmon.EmbeddedServer(**SMALL) as server, calling(server.app) as client:
            request = complete(client, 2000)
            await until_submitted(server)
            server.check_health()
            engines()[0].kill()
            failure = await server.engine_failed()
            assert failure.exit_code == -9
            assert str(failure) == "the engine process ended with code -9"
            with pytest.raises(persimmon.EngineFailedError, match="ended with code -9"):
                server.check_health()
            response = await request
            assert response.status_code == 503
            assert "engine" in response.json()["error"]["message"]
            assert (await complete(client)).status_code == 503
            with pytest.raises(persimmon.EngineFailedError, match="ended with code -9"):
                await server.ready()

    asyncio.run(main())
    assert not engines()


def test_an_engine_that_hangs_fails_the_health_check(monkeypatch):
    monkeypatch.setenv("PERSIMMON_STEP_TIMEOUT", "0.1")

    async def main() -> None:
        async with persimmon.EmbeddedServer(**SMALL) as server, calling(server.app) as client:
            names = {family.name for family in server.metrics()}
            assert {"persimmon_requests_running", "persimmon_http_requests"} <= names
            assert server.kv_cache_tokens > 0
            request = complete(client, 500)
            await until_submitted(server)
            engines()[0].suspend()
            with pytest.raises(persimmon.EngineFailedError, match="has work but has not finished a step"):
                await until_unhealthy(server)
            engines()[0].resume()
            assert (await request).status_code == 200
            server.check_health()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"max_model_len": 4096}, r"^--max-model-len is 4096 .*2048"),
        ({"profile_steps": 1, "profile_dir": Path(__file__)}, r"^--profile-dir \S+ is not a folder"),
    ],
)
def test_what_only_the_engine_finds_out_is_the_message_of_its_error(given, reason, temporary):
    async def main() -> None:
        async with persimmon.EmbeddedServer(**SMALL, **given):
            pass

    with pytest.raises(persimmon.EngineFailedError, match=reason) as raised:
        asyncio.run(main())
    assert raised.value.exit_code == 2
    assert not engines()
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"block_size": 17}, ["--block-size", "17"]),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, ["--max-num-seqs", "8", "--max-num-batched-tokens", "4"]),
        ({"model": Path("/nothing/here")}, ["--model", "/nothing/here"]),
    ],
)
def test_a_bad_setting_is_a_value_error_with_the_sentence_of_the_command_line(given, flags, tmp_path, capsys):
    with pytest.raises(ValueError) as raised:
        persimmon.EmbeddedServer(**given)
    assert isinstance(raised.value, persimmon.SettingsError | persimmon.CheckpointError)
    assert command_line(["generate", *flags, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err == f"persimmon: error: {raised.value}\n"


def test_a_setting_that_it_does_not_have_is_named():
    with pytest.raises(
        persimmon.SettingsError, match="port is not a setting of EmbeddedServer; expected one of model, "
    ):
        persimmon.EmbeddedServer(port=8000)


def test_a_server_that_was_not_started_says_so():
    server = persimmon.EmbeddedServer()
    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        asyncio.run(server.ready())
    asyncio.run(server.stop())


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(0)"])
def test_no_engine_outlives_the_program_around_it(end):
    program = f"""
import asyncio, os, signal, persimmon
async def main():
    server = persimmon.EmbeddedServer(kv_cache_memory="64MB")
    await server.start()
    print(server._running.engine.pid, flush=True)
    {end}
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        engine = int(host.stdout.readline())
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(engine).wait(60)
        assert host.wait(60) == (-9 if "SIGKILL" in end else 0)
