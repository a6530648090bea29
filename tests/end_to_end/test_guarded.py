"""A server as it stands in the open: HTTPS, keys, two API workers, JSON logs, traces."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import openai
import pytest
import trustme
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.end_to_end.serving import Server, serving
from tests.end_to_end.test_processes import LONG, stopped
from tests.end_to_end.test_workers import clients

LONG_PROMPT = "human: " + "What does galaxy mean? " * 40 + "\n\nadept:"
KEYS = {"alice": "correct-horse", "bob": "battery-staple", "carol": "carols-key", "dave": "daves-key"}


class Collector:
    """Takes what an OTLP exporter sends over HTTP."""

    def __init__(self) -> None:
        received: Queue[bytes] = Queue()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.put(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.received = received
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self, name: str, part: str) -> dict[str, dict[str, Any]]:
        """The attributes of the spans that come, by their names, when some of that name have this in an attribute."""
        reported: dict[str, dict[str, Any]] = {}
        while part not in str(reported.get(name)):
            for resource in ExportTraceServiceRequest.FromString(self.received.get(timeout=60)).resource_spans:
                for span in (own for scope in resource.scope_spans for own in scope.spans):
                    reported[span.name] = {own.key: own.value for own in span.attributes}
        return reported


@dataclass
class Guarded:
    """The server, and what a client needs to reach it."""

    server: Server
    trust: ssl.SSLContext
    keys: Path
    authority: trustme.CA
    chain: Path
    key: Path

    def client(self, name: str | None = None) -> httpx.Client:
        headers = {} if name is None else {"Authorization": f"Bearer {KEYS[name]}"}
        return httpx.Client(base_url=self.server.url, verify=self.trust, headers=headers, timeout=60)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.server.lines)]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Guarded]:
    folder: Path = tmp_path_factory.mktemp("guarded")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain, key, keys = folder / "chain.pem", folder / "key.pem", folder / "keys"
    certificate.private_key_pem.write_to_path(key)
    for part in certificate.cert_chain_pems:
        part.write_to_path(chain, append=True)
    keys.write_text("".join(f"{name}:{KEYS[name]}\n" for name in ("alice", "carol")))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    with serving(
        *("--kv-cache-memory", "26MB", "--max-num-seqs", "8", "--api-workers", "2", "--log-format", "json"),
        *("--ssl-certfile", str(chain), "--ssl-keyfile", str(key), "--api-key-file", str(keys), "--tracing"),
        *("--requests-per-minute-per-key", "30", "--read-timeout", "2"),
        PERSIMMON_API_KEY=KEYS["bob"],
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server.server_port}",
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as server:
        yield Guarded(server=server, trust=trust, keys=keys, authority=authority, chain=chain, key=key)


def test_openais_client_is_let_in_with_a_key_alone(guarded):
    assert guarded.server.url.startswith("https://")
    for key, allowed in ((KEYS["alice"], True), (KEYS["bob"], True), ("wrong", False)):
        with openai.OpenAI(
            base_url=f"{guarded.server.url}/v1",
            api_key=key,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(verify=guarded.trust),
        ) as client:
            if allowed:
                assert [each.id for each in client.models.list()] == [guarded.server.name]
            else:
                with pytest.raises(openai.AuthenticationError) as raised:
                    client.models.list()
                assert raised.value.code == "invalid_api_key"


def test_probes_are_answered_without_a_key_and_only_over_https(guarded):
    with guarded.client() as client:
        assert client.get("/health").json() == {"status": "ready"}
        assert client.get("/metrics").status_code == 200
    plain = httpx.post(guarded.server.url.replace("https:", "http:") + "/health", timeout=30, json={"a": "b" * 10**5})
    assert (plain.status_code, plain.json()["error"]["code"]) == (400, "https_required")
    assert "Use https://" in plain.json()["error"]["message"]


def test_headers_that_do_not_end_are_refused_and_those_that_do_not_come_are_hung_up_on(guarded):
    url = httpx.URL(guarded.server.url)
    for sent, expected in ((b"GET /" + b"a" * 70_000, b"HTTP/1.1 414 "), (b"GET /health HTTP/1.1\r\nHost: a\r\n", b"")):
        with (
            socket.create_connection((url.host, url.port), timeout=60) as plain,
            guarded.trust.wrap_socket(plain, server_hostname=url.host) as connection,
        ):
            connection.sendall(sent)
            assert connection.recv(13) == expected  # the second after --read-timeout


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_a_handshake_that_does_not_come_to_its_end_is_hung_up_on(guarded, sent):
    url = httpx.URL(guarded.server.url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(sent)
        assert connection.recv(1) == b""


def test_a_client_that_leaves_over_https_has_its_blocks_back(guarded):
    url, body = httpx.URL(guarded.server.url), json.dumps(LONG | {"max_tokens": 1000, "ignore_eos": True}).encode()
    for stream in (True, False):
        plain = socket.create_connection((url.host, url.port), timeout=60)
        with guarded.trust.wrap_socket(plain, server_hostname=url.host) as connection:
            content = body if stream else body.replace(b'"stream": true', b'"stream": false')
            head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS['bob']}\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            if stream:
                assert connection.recv(12) == b"HTTP/1.1 200"
        with guarded.client() as client:
            while "persimmon_open_streams 0.0" not in client.get("/metrics").text.splitlines():
                pass


def test_nobody_finds_what_another_has_asked_in_the_prefix_cache(guarded):
    def cached(name: str, **more: str) -> int:
        with guarded.client(name) as client:
            answer = client.post("/v1/completions", json={"prompt": LONG_PROMPT, "max_tokens": 1} | more)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached("alice") > 0, cached("alice") > 0] == [False, True]
    assert [cached("bob") > 0, cached("bob") > 0] == [False, True]
    assert [cached("bob", cache_salt="mine") > 0, cached("bob", cache_salt="mine") > 0] == [False, True]


def test_the_flood_of_one_key_leaves_another_its_place(guarded):
    flood = {"prompt": [[300 + number, 301] for number in range(500)], "max_tokens": 1000, "ignore_eos": True}
    with (
        guarded.client("alice") as hog,
        guarded.client("bob") as client,
        hog.stream("POST", "/v1/completions", json=flood | {"stream": True}) as streaming,
    ):
        lines = streaming.iter_lines()  # kept, because its end would close the stream
        assert "data:" in next(lines)
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4, "ignore_eos": True})
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 4)
        urgent = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4, "priority": -1})
        assert (urgent.status_code, urgent.json()["error"]["param"]) == (400, "priority")
        metrics = client.get("/metrics").text.splitlines()
        (waiting,) = [float(line.split()[1]) for line in metrics if line.startswith("persimmon_requests_waiting{")]
        assert waiting > 400


def test_both_workers_count_the_requests_of_a_key_together(guarded):
    statuses = []
    for _ in range(36):
        with guarded.client("carol") as client:  # a connection each: they go to both workers
            response = client.get("/v1/models")
            statuses.append(response.status_code)
            if response.status_code == 429:
                assert 1 <= int(response.headers["retry-after"]) <= 2
    # The allowance of a minute, and what is added to it in some seconds.
    assert 30 <= statuses.count(200) < 36
    assert set(statuses) == {200, 429}


def test_every_line_of_every_process_is_json_and_none_tells_a_key_or_a_prompt(guarded):
    with guarded.client("bob") as client:
        client.post("/v1/completions", json={"prompt": "the-prompt", "max_tokens": 3}, headers={"X-Request-Id": "mine"})
    guarded.server.wait_for_line(re.compile('"request_id": "mine"'), 60)
    lines = guarded.lines()
    assert {"supervisor", "engine", "api worker 0", "api worker 1"} <= {line["process"] for line in lines}
    assert all({"time", "level", "process", "message"} <= line.keys() for line in lines)
    (mine,) = [line for line in lines if line.get("request_id") == "mine"]
    assert (mine["status"], mine["key"], mine["output_tokens"]) == (200, "key-1", 3)
    assert mine["duration"] > mine["ttft"] > mine["queued"] > 0
    everything = "\n".join(guarded.server.lines)
    assert not any(secret in everything for secret in ("the-prompt", *KEYS.values()))


def test_requests_are_exported_as_spans(guarded, collector):
    with guarded.client("bob") as client:
        client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3}, headers={"X-Request-Id": "traced"})
    reported = collector.spans("POST /v1/completions", "traced")
    assert {"POST /v1/completions", "queue", "prefill", "decode"} <= reported.keys()


@pytest.fixture
def keys(guarded):
    """The server's file of keys, to be changed: it is restored, and read again."""
    before = guarded.keys.read_text()
    yield guarded.keys
    guarded.keys.write_text(before)
    guarded.server.process.send_signal(signal.SIGHUP)
    with clients(guarded.server, guarded.client) as workers:
        for worker in workers:
            while status(worker, "alice") != 200:
                pass


def status(client: httpx.Client, name: str) -> int:
    return client.get("/v1/models", headers={"Authorization": f"Bearer {KEYS[name]}"}).status_code


def test_sighup_changes_keys_in_both_workers_and_streams_of_a_key_that_goes_run_to_their_end(guarded, keys):
    # Long enough that neither has ended when the engine is stopped, however busy the machine is.
    body = LONG | {"max_tokens": 1900, "stream_options": {"include_usage": True}}
    processes = guarded.server.children()
    with (
        clients(guarded.server, lambda: guarded.client("alice")) as streaming,
        clients(guarded.server, guarded.client) as asking,
        contextlib.ExitStack() as stack,
    ):
        streams = [stack.enter_context(each.stream("POST", "/v1/completions", json=body)) for each in streaming]
        lines = [stream.iter_lines() for stream in streams]
        for each in lines:
            assert next(each).startswith("data: ")
        with stopped(processes["engine"]):  # so that both are under way until it goes on
            keys.write_text("".join(f"{name}:{KEYS[name]}\n" for name in ("carol", "dave")))
            guarded.server.process.send_signal(signal.SIGHUP)
            os.kill(processes["engine"], signal.SIGHUP)  # as the end of a terminal would; it has nothing to read
            guarded.server.wait_for_line(re.compile("reloaded .*: 3 API keys"), 30)
            for worker in asking:
                while status(worker, "dave") != 200:
                    pass
                assert [status(worker, name) for name in ("alice", "bob")] == [401, 200]
            assert "persimmon_open_streams 2.0" in asking[0].get("/metrics").text.splitlines()
        for each in lines:
            events = [line for line in each if line.startswith("data: ")]
            assert events[-1] == "data: [DONE]"
            assert json.loads(events[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 1900
    assert guarded.server.children() == processes


def test_a_file_of_keys_that_cannot_be_used_changes_nothing_and_the_console_says_why(guarded, keys):
    keys.write_text(f"dave:{KEYS['dave']}\n{KEYS['alice']}\n")
    guarded.server.process.send_signal(signal.SIGHUP)
    reported = f"--api-key-file {keys}, line 2: expected name:key.*; API keys and certificates are unchanged"
    guarded.server.wait_for_line(re.compile(reported), 30)
    with clients(guarded.server, guarded.client) as workers:
        for worker in workers:
            assert [status(worker, name) for name in ("alice", "bob", "dave")] == [200, 200, 401]
    assert KEYS["alice"] not in "\n".join(guarded.server.lines)


def serial_number(guarded: Guarded) -> int:
    """Of the certificate that a new connection gets."""
    url = httpx.URL(guarded.server.url)
    with (
        socket.create_connection((url.host, url.port), timeout=60) as plain,
        guarded.trust.wrap_socket(plain, server_hostname=url.host) as connection,
    ):
        return int(connection.getpeercert()["serialNumber"], 16)  # type: ignore[index, arg-type]


def test_sighup_changes_the_certificate_of_new_connections_and_with_unusable_files_nothing(guarded):
    before = serial_number(guarded)
    renewed = guarded.authority.issue_cert("127.0.0.1")
    with clients(guarded.server, lambda: guarded.client("alice")) as workers:
        renewed.private_key_pem.write_to_path(guarded.key)  # which does not belong to the certificate yet
        guarded.server.process.send_signal(signal.SIGHUP)
        reported = "--ssl-certfile .* cannot be used: .*MISMATCH.*; API keys and certificates are unchanged"
        guarded.server.wait_for_line(re.compile(reported), 30)
        assert serial_number(guarded) == before
        guarded.chain.write_bytes(b"".join(part.bytes() for part in renewed.cert_chain_pems))
        guarded.server.process.send_signal(signal.SIGHUP)
        guarded.server.wait_for_line(re.compile("reloaded .*chain.pem"), 30)
        seen = 0
        while seen < 20:  # in a row, of whichever worker: each has it then
            seen = seen + 1 if serial_number(guarded) != before else 0
        # Open connections go on.
        assert [status(worker, "alice") for worker in workers] == [200, 200]
        # A worker that takes another's place has it too, whatever the files have by then.
        guarded.chain.write_bytes(b"")
        killed = guarded.server.children()["api"]
        os.kill(killed, signal.SIGKILL)
        while killed in guarded.server.children().values() or len(guarded.server.children()) < 3:
            serial_number_or_none(guarded)
        assert serial_number(guarded) != before
    guarded.chain.write_bytes(b"".join(part.bytes() for part in renewed.cert_chain_pems))


def serial_number_or_none(guarded: Guarded) -> int | None:
    with contextlib.suppress(OSError):  # the connection was that of the worker that has died
        return serial_number(guarded)
    return None


def test_a_worker_that_takes_anothers_place_has_its_keys_although_the_file_cannot_be_used_any_more(guarded, keys):
    keys.unlink()
    worker = guarded.server.children()["api"]
    os.kill(worker, signal.SIGKILL)
    with guarded.client() as client:
        while worker in guarded.server.children().values() or len(guarded.server.children()) < 3:
            with contextlib.suppress(httpx.TransportError):  # the connection was that of the one that has died
                client.get("/livez")
    with clients(guarded.server, guarded.client) as workers:
        assert [status(worker, "alice") for worker in workers] == [200, 200]


def test_a_server_whose_keys_cannot_be_read_does_not_start_and_says_why(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("alice:correct-horse\nbattery-staple\n")
    command = [sys.executable, "-m", "persimmon.server.cli", "serve", "--port", "0", "--api-key-file", str(keys)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"persimmon: error: --api-key-file {keys}, line 2: expected name:key")
    assert "battery" not in line
