"""What sending a request away costs: processor time of an API worker whose server is full.

    python -m benchmarks.refusals --requests 20000 --out benchmarks/results/NAME.json

A real API worker, on a core of its own, in front of an engine without a model that keeps the only place there is
occupied.  Requests come one at a time on kept connections, so the worker sleeps before each of them, as it does when
they come at random; in a burst they cost less.  Knows nothing of models.
"""

import argparse
import contextlib
import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from pydantic import SecretStr

from benchmarks.api import MODEL, Bench, serving
from benchmarks.machine import device
from persimmon.server.bench.http_client import Endpoint
from persimmon.server.bench.report import Distribution
from persimmon.server.bench.workload import COMPLETIONS
from persimmon.server.config import Settings

WARM_UP_REQUESTS = 2000
CONNECTIONS = 16
PROMPT_TOKENS = 64
REFUSED = b"HTTP/1.1 429 "

KINDS = {
    "plain": Settings(max_num_queued_reqs=1, access_log=False),
    "access log": Settings(max_num_queued_reqs=1, access_log=True),
    "keys": Settings(max_num_queued_reqs=1, access_log=False, api_key=(SecretStr("bench"),)),
}
"""What a worker does for each request besides.  The access log goes to /dev/null."""


@dataclass(frozen=True)
class Refusals:
    """Requests that were sent away.

    Attributes:
        kind: a key of KINDS.
        requests: how many.
        worker_user_us: processor time of the worker for each, in Python and its libraries.
        worker_system_us: the same, in the operating system.
        client_us: processor time of the client for each, which is as simple as can be.
        answer_ms: from a request's departure to its answer's arrival.
    """

    kind: str
    requests: int
    worker_user_us: float
    worker_system_us: float
    client_us: float
    answer_ms: Distribution

    @property
    def worker_us(self) -> float:
        """All processor time of the worker for one refusal."""
        return self.worker_user_us + self.worker_system_us


def message(prompt_tokens: int, key: str = "bench") -> bytes:
    """A whole HTTP request for a stream.

    Args:
        prompt_tokens: token ids of its prompt.
        key: of the API.
    """
    prompt = list(range(300, 300 + prompt_tokens))
    body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 64, "stream": True}).encode()
    return Endpoint("bench", 80, api_key=key).request("POST", COMPLETIONS, body)


def measure(bench: Bench, kind: str, requests: int, warm_up: int = WARM_UP_REQUESTS) -> Refusals:
    """Fills the server and is sent away again and again.

    Args:
        bench: serving, with room for one sequence.
        kind: a key of KINDS.
        requests: how many to count.
        warm_up: how many before them.

    Raises:
        ConnectionError: an answer is not a 429.
    """
    asking = message(PROMPT_TOKENS)
    with socket.create_connection(bench.address) as admitted:
        admitted.sendall(asking)
        bench.control.recv_bytes()  # the engine has it, and gives it no token
        connections = [socket.create_connection(bench.address) for _ in range(CONNECTIONS)]
        _send(connections, asking, warm_up)
        worker = psutil.Process(bench.workers[0].pid)
        before, own_before = worker.cpu_times(), time.process_time()
        took = _send(connections, asking, requests)
        after, own = worker.cpu_times(), time.process_time() - own_before
        for connection in connections:
            connection.close()
    answer = Distribution.of(took)
    if answer is None:
        raise ValueError("it needs at least one request")
    user, system = after.user - before.user, after.system - before.system
    user_us, system_us, client_us = (round(1e6 * seconds / requests, 1) for seconds in (user, system, own))
    return Refusals(
        kind=kind,
        requests=requests,
        worker_user_us=user_us,
        worker_system_us=system_us,
        client_us=client_us,
        answer_ms=answer,
    )


def _send(connections: Sequence[socket.socket], asking: bytes, requests: int) -> list[float]:
    took = []
    for number in range(requests):
        connection = connections[number % len(connections)]
        sent = time.perf_counter()
        connection.sendall(asking)
        answer = connection.recv(65536)  # head and body are one write of the worker's
        took.append(time.perf_counter() - sent)
        if not answer.startswith(REFUSED):
            raise ConnectionError(f"the server answered {answer[:200]!r}")
    return took


@contextlib.contextmanager
def _silenced_errors() -> Iterator[None]:
    # Of this process and those that it starts: the access log would fill the console.
    console = os.dup(sys.stderr.fileno())
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
        yield
    finally:
        os.dup2(console, sys.stderr.fileno())
        os.close(console)


def table(measured: Sequence[Refusals]) -> str:
    """The figures as Markdown."""
    lines = [
        "| | worker, CPU us | of that in the system | client, CPU us | answered in: median, ms | p99, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {each.kind} | {each.worker_us:.0f} | {each.worker_system_us:.0f} | {each.client_us:.0f} | "
        f"{each.answer_ms.median:.2f} | {each.answer_ms.p99:.2f} |"
        for each in measured
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refusals", description="Measure what refusals cost.")
    parser.add_argument("--requests", type=int, default=20_000, help="of each kind [default: %(default)s]")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="[default: all]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if arguments.requests < 1:
        parser.error("--requests is at least 1")
    cores = sorted(os.sched_getaffinity(0))
    measured = []
    try:
        for kind in arguments.kinds:
            with _silenced_errors(), serving(1, KINDS[kind]) as bench:
                measured.append(measure(bench, kind, arguments.requests))
    except (ValueError, ConnectionError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(table(measured))
    if arguments.out:
        result = {
            "started": started,
            "device": device(),
            "cores": {"worker": cores[0], "client": cores[-1]},
            "refusals": [asdict(each) | {"worker_us": round(each.worker_us, 1)} for each in measured],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
