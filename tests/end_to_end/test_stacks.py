"""What the threads of a server's processes are doing, in its log."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.serving import Server, serving
from tests.end_to_end.test_processes import LONG, answers, is_healthy, wait_until

HANG = """
import ctypes, os, sys, threading

def hang_when_asked(fifo):
    open(fifo).close()  # returns when the test opens it
    if core := sys.modules.get("persimmon.server.engine.core"):
        def stuck_in_c(engine, outputs):
            ctypes.PyDLL(None).sleep(3600)  # which keeps the interpreter's lock, as a hung kernel launch may
        core.Engine._step = stuck_in_c

if fifo := os.environ.get("HANG_AFTER"):
    threading.Thread(target=hang_when_asked, args=(fifo,), daemon=True).start()
"""
"""A sitecustomize.py that lets the next step of a running engine never end."""


@pytest.fixture(scope="module")
def fifo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The next step of an engine hangs once this has been opened to write."""
    fifo: Path = tmp_path_factory.mktemp("hang") / "fifo"
    os.mkfifo(fifo)
    return fifo


@pytest.fixture(scope="module")
def server(fifo: Path) -> Iterator[Server]:
    (fifo.parent / "sitecustomize.py").write_text(HANG)
    with serving(
        *("--kv-cache-memory", "64MB", "--step-timeout", "3", "--log-format", "json"),
        PYTHONPATH=os.pathsep.join(filter(None, [str(fifo.parent), os.environ.get("PYTHONPATH")])),
        HANG_AFTER=str(fifo),
    ) as server:
        yield server


def stacks(server: Server, of: str) -> list[str]:
    """What the log has of a process's stacks."""
    messages = [json.loads(line)["message"] for line in list(server.lines)]
    return [message for message in messages if message.startswith(f"persimmon: stacks of {of} (pid ")]


def test_sigusr1_logs_the_stacks_of_engine_and_worker_and_streams_go_on(server: Server) -> None:
    processes = server.children()
    body = LONG | {"max_tokens": 400, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: bool(stacks(server, "the engine process") and stacks(server, "the API process")))
        events = [line for line in lines if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert '"completion_tokens":400' in events[-2]
    (engine,), (worker,) = stacks(server, "the engine process"), stacks(server, "the API process")
    assert f"(pid {processes['engine']})" in engine
    assert re.search(r'core\.py", line \d+ in serve_forever', engine)
    assert re.search(r"core\.py\", line \d+ in turn", engine)
    assert re.search(r'worker\.py", line \d+ in run_api_worker', worker)
    assert "in wait" in worker  # of the thread that follows the supervisor
    assert answers(server)
    assert server.children() == processes


def test_sigusr1_to_one_process_or_to_all_is_as_good(server: Server) -> None:
    processes, before = server.children(), len(stacks(server, "the engine process"))
    os.kill(processes["engine"], signal.SIGUSR1)
    wait_until(lambda: len(stacks(server, "the engine process")) == before + 1)
    server.signal_all(signal.SIGUSR1)
    wait_until(lambda: len(stacks(server, "the engine process")) > before + 1)
    assert answers(server)
    assert server.children() == processes


def test_stacks_of_an_engine_that_hangs_are_in_the_log_before_it_is_killed(server: Server, fifo: Path) -> None:
    engine = server.children()["engine"]
    fifo.open("w").close()
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi", "max_tokens": 3}, timeout=60)
    assert refused.json()["error"]["code"] == "engine_dead"
    wait_until(lambda: is_healthy(server))
    messages = [json.loads(line)["message"] for line in server.lines]
    (noticed,) = [place for place, message in enumerate(messages) if "has not finished a step" in message]
    (ended,) = [place for place, message in enumerate(messages) if "the engine process ended with code -9" in message]
    # Stacks that an earlier signal asked for may come while the engine hangs, too.
    hung = [stack for stack in stacks(server, "the engine process") if stack in messages[noticed:ended]]
    assert any("in stuck_in_c" in stack for stack in hung)
    assert all(f"(pid {engine})" in stack for stack in hung)
    assert answers(server)


def test_a_stopped_engine_writes_no_stacks_and_is_killed_all_the_same(server: Server) -> None:
    os.kill(server.children()["engine"], signal.SIGSTOP)
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi", "max_tokens": 3}, timeout=60)
    assert refused.json()["error"]["code"] == "engine_dead"
    assert any("the engine process wrote no stacks" in line for line in server.lines)
    wait_until(lambda: is_healthy(server))
    assert answers(server)
