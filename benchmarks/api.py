"""What the API side costs: streamed tokens a second of one core, and milliseconds that it adds to the first token.

    python -m benchmarks.api --streams 1 8 64 256 --out benchmarks/results/NAME.json

Real API workers, each a process on a core of its own, in front of an engine without a model: it speaks the engine's
protocol and has the next token for each stream at once, as soon as the last one has reached the client: a step before
that would be merged into the same event, and look fast.  So every token is an event of its own, and workers are idle
while client and engine, which share another core, have their turn: tokens a second are what one gets at least, tokens
a second of processor time what a busy core gives.  Knows nothing of models.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop

import persimmon.model.demo
from benchmarks.machine import device
from benchmarks.scripted_engine import EngineReport, run_scripted_engine
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.bench.http_client import Endpoint
from persimmon.server.bench.report import Distribution
from persimmon.server.config import Settings
from persimmon.server.http.transport.siblings import WorkerPlace
from persimmon.server.http.worker import run_api_worker
from persimmon.server.listening import listen

CHECKPOINT = Path(next(iter(persimmon.model.demo.__path__)))
MODEL = "bench"
PATIENCE_SECONDS = 60.0
ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def run_pinned_worker(core: int, *arguments: Any) -> None:
    """Entry point of an API worker's process; the other arguments are those of `run_api_worker`."""
    os.sched_setaffinity(0, {core})
    run_api_worker(*arguments)


class Counter:
    """Counts a word in bytes that come in pieces, wherever they are cut."""

    def __init__(self, word: bytes) -> None:
        self._word = word
        self._tail = b""

    def feed(self, data: bytes) -> int:
        """Takes the next piece; the words that it completes."""
        whole = self._tail + data
        # Shorter than the word, so what was counted is not counted again.
        self._tail = whole[len(whole) - len(self._word) + 1 :] if len(whole) >= len(self._word) else whole
        return whole.count(self._word)


class StreamReader(asyncio.Protocol):
    """A connection that asks for one stream at a time and counts what comes.

    Args:
        word: the text of the engine's token.
        took: called with the tokens and events of each read.
    """

    def __init__(self, word: bytes, took: Callable[[int, int], None]) -> None:
        self._word = word
        self._took = took
        self.ask(b"")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self.transport = transport

    def ask(self, request: bytes) -> None:
        """Sends a request; `ended` is the future of its stream's end."""
        self._tokens, self._events, self._end = Counter(self._word), Counter(b"data: {"), Counter(b"\r\n0\r\n\r\n")
        self.ended = asyncio.get_running_loop().create_future()
        self.first_at: float | None = None
        if request:
            self.sent_at = time.perf_counter()
            self.transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Counts what has come."""
        tokens = self._tokens.feed(data)
        if tokens and self.first_at is None:
            self.first_at = time.perf_counter()
        if not data.startswith(b"HTTP/1.1 200") and self.first_at is None:
            self._fail(f"the server answered {data[:200]!r}")
        self._took(tokens, self._events.feed(data))
        if self._end.feed(data) and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """The server has closed the connection, which it should not."""
        self._fail(f"a connection was lost: {error}")

    def _fail(self, message: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(message))


@dataclass(frozen=True)
class Throughput:
    """Streams at full speed.

    Attributes:
        endpoint: a key of ENDPOINTS.
        workers: API workers.
        streams: at the same time.
        tokens: streamed in all.
        events: in which they came, those without text included.
        wall_s: from the first step to the last event's arrival.
        worker_cpu_s: processor time of all workers meanwhile.
        client_cpu_s: processor time of the client meanwhile.
    """

    endpoint: str
    workers: int
    streams: int
    tokens: int
    events: int
    wall_s: float
    worker_cpu_s: float
    client_cpu_s: float

    @property
    def per_core_second(self) -> float:
        """Tokens a second for each worker's core."""
        return self.tokens / self.wall_s / self.workers

    @property
    def per_cpu_second(self) -> float:
        """Tokens for each second of a worker's processor time."""
        return self.tokens / self.worker_cpu_s


@dataclass(frozen=True)
class FirstToken:
    """What an idle server adds to the engine's own time to the first token.

    Attributes:
        endpoint: a key of ENDPOINTS.
        prompt_tokens: about how many, as text.
        requests: one after the other.
        added_ms: from the request's departure to the first token's arrival, less the engine's own time.
    """

    endpoint: str
    prompt_tokens: int
    requests: int
    added_ms: Distribution


def request(endpoint: str, prompt: str, max_tokens: int) -> bytes:
    """A whole HTTP request for one stream.

    Args:
        endpoint: a key of ENDPOINTS.
        prompt: a text.
        max_tokens: of the answer.
    """
    asked = {"prompt": prompt} if endpoint == "completions" else {"messages": [{"role": "user", "content": prompt}]}
    body = json.dumps(asked | {"model": MODEL, "max_tokens": max_tokens, "stream": True}).encode()
    return Endpoint("bench", 80).request("POST", ENDPOINTS[endpoint], body)


def spoken_token(tokenizer: Tokenizer) -> tuple[int, bytes]:
    """A token of the vocabulary that is a whole word, as most are, and that word, without the space before it."""
    for token_id in range(300, tokenizer.vocab_size):
        text = tokenizer.token_bytes(token_id)
        if text[:1] == b" " and len(text) >= 5 and text[1:].isalpha() and text.isascii():
            return token_id, text[1:]
    raise ValueError("the vocabulary has no word of four letters")


@dataclass
class Bench:
    """Processes that serve, and how to talk to them.

    Attributes:
        address: where the workers listen.
        control: the engine's.
        workers: the API workers.
        word: what the engine says.
        connections: those that are open.
        tokens: that have come, of the present measurement.
        events: in which they came.
        step_tokens: the engine may run its next step when this number of further tokens has arrived.
    """

    address: tuple[str, int]
    control: Connection
    workers: Sequence[SpawnProcess]
    word: bytes
    connections: list[StreamReader] = field(default_factory=list)
    tokens: int = 0
    events: int = 0
    step_tokens: int = 1

    async def connect(self, streams: int) -> list[StreamReader]:
        """Connections to the server, at least `streams` of them open."""
        loop = asyncio.get_running_loop()
        while len(self.connections) < streams:
            _, reader = await loop.create_connection(lambda: StreamReader(self.word, self._took), *self.address)
            self.connections.append(reader)
        return self.connections[:streams]

    async def throughput(self, endpoint: str, streams: int, max_tokens: int) -> Throughput:
        """Lets streams run to their end, all at once.

        Args:
            endpoint: a key of ENDPOINTS.
            streams: how many.
            max_tokens: of each.
        """
        readers = await self.connect(streams)
        self.tokens = self.events = 0
        self.step_tokens = streams
        for reader in readers:
            reader.ask(request(endpoint, "What is a persimmon?", max_tokens))
        while (await self._report()).live < streams:
            pass
        before, own_before, started = self._worker_cpu(), time.process_time(), time.perf_counter()
        self._grant(1)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.gather(*(reader.ended for reader in readers))
        wall, own, cpu = time.perf_counter() - started, time.process_time() - own_before, self._worker_cpu() - before
        if self.tokens != streams * max_tokens:
            raise ConnectionError(f"{self.tokens} tokens came of {streams * max_tokens}")
        await self._report()  # of the first step
        self._grant(-1)
        return Throughput(
            endpoint=endpoint,
            workers=len(self.workers),
            streams=streams,
            tokens=self.tokens,
            events=self.events,
            wall_s=wall,
            worker_cpu_s=cpu,
            client_cpu_s=own,
        )

    async def first_token(self, endpoint: str, prompt_tokens: int, requests: int) -> FirstToken:
        """Asks for one token again and again, of a server that has nothing else to do.

        Args:
            endpoint: a key of ENDPOINTS.
            prompt_tokens: about how many tokens the prompts have.
            requests: one after the other.
        """
        (reader,) = await self.connect(1)
        added = []
        self.step_tokens = 2**62  # steps are granted here
        for turn in range(requests):
            self._grant(1)
            # Another first word each time, so that nothing remembers the prompt.
            reader.ask(request(endpoint, f"{turn}" + f" {self.word.decode()}" * (prompt_tokens - 2), 1))
            async with asyncio.timeout(PATIENCE_SECONDS):
                await reader.ended
            while (own := (await self._report()).own_s) is None:
                pass
            if reader.first_at is None:
                raise ConnectionError("a stream ended without a token")
            added.append(reader.first_at - reader.sent_at - own)
        distribution = Distribution.of(added)
        if distribution is None:
            raise ValueError("it needs at least one request")
        return FirstToken(endpoint=endpoint, prompt_tokens=prompt_tokens, requests=requests, added_ms=distribution)

    def _took(self, tokens: int, events: int) -> None:
        steps = self.tokens // self.step_tokens
        self.tokens += tokens
        self.events += events
        if more := self.tokens // self.step_tokens - steps:
            self._grant(more)

    def _grant(self, steps: int) -> None:
        self.control.send_bytes(b"%d" % steps)

    async def _report(self) -> EngineReport:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self.control.fileno(), readable.set)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await readable.wait()
        finally:
            loop.remove_reader(self.control.fileno())
        return msgspec.msgpack.decode(self.control.recv_bytes(), type=EngineReport)

    def _worker_cpu(self) -> float:
        times = [psutil.Process(worker.pid).cpu_times() for worker in self.workers]
        return sum(own.user + own.system for own in times)


@contextlib.contextmanager
def serving(workers: int, settings: Settings | None = None) -> Iterator[Bench]:
    """An engine and API workers for the length of a block; this process shares the engine's core meanwhile.

    Args:
        workers: API workers; there must be one core more.
        settings: of the server; None for the default ones.
    """
    *cores, own_core = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise ValueError(f"{workers} workers and the client need {workers + 1} cores; there are {len(cores) + 1}")
    spawn = multiprocessing.get_context("spawn")
    token_id, word = spoken_token(Tokenizer.from_folder(CHECKPOINT))
    processes: list[SpawnProcess] = []
    with tempfile.TemporaryDirectory(prefix="persimmon-api-") as scratch:
        address = f"ipc://{scratch}/engine"
        control, engine_end = spawn.Pipe()
        listeners = listen("127.0.0.1", 0, workers)
        reports = []
        try:
            processes.append(spawn.Process(target=run_scripted_engine, args=(own_core, address, token_id, engine_end)))
            for index, listener in enumerate(listeners):
                report, report_end = spawn.Pipe(duplex=False)
                reports.append(report)
                place = WorkerPlace(index, workers, Path(scratch))
                arguments = (
                    cores[index],
                    settings or Settings(),
                    CHECKPOINT,
                    MODEL,
                    [address],
                    listener,
                    place,
                    report_end,
                )
                processes.append(spawn.Process(target=run_pinned_worker, args=arguments))
            for process in processes:
                process.start()
            os.sched_setaffinity(0, {own_core})
            for report in reports:
                if not report.poll(PATIENCE_SECONDS):
                    raise ConnectionError("an API worker has not started")
            host, port = listeners[0].getsockname()
            yield Bench(address=(host, port), control=control, workers=processes[1:], word=word)
        finally:
            os.sched_setaffinity(0, {*cores, own_core})
            for listener in listeners:
                listener.close()
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()


async def measure(bench: Bench, arguments: argparse.Namespace) -> tuple[list[Throughput], list[FirstToken]]:
    """All figures, after a warm-up of each kind.

    Args:
        bench: serving.
        arguments: of the command line.
    """
    throughputs, first_tokens = [], []
    for endpoint in ENDPOINTS:
        for streams in arguments.streams:
            await bench.throughput(endpoint, streams, 16)
            throughputs.append(await bench.throughput(endpoint, streams, max(16, arguments.tokens // streams)))
        for prompt_tokens in arguments.prompts:
            requests = max(20, min(arguments.requests, arguments.requests * 64 // prompt_tokens))
            await bench.first_token(endpoint, prompt_tokens, 20)
            first_tokens.append(await bench.first_token(endpoint, prompt_tokens, requests))
    return throughputs, first_tokens


def table(throughputs: Sequence[Throughput], first_tokens: Sequence[FirstToken]) -> str:
    """The figures as Markdown."""
    lines = [
        "| endpoint | streams | tokens/s per core | tokens per CPU second | CPU us per token | events per token |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {each.endpoint} | {each.streams} | {each.per_core_second:,.0f} | {each.per_cpu_second:,.0f} | "
        f"{1e6 / each.per_cpu_second:.1f} | {each.events / each.tokens:.2f} |"
        for each in throughputs
    ]
    lines += ["", "| endpoint | prompt tokens | added to the first token: median, ms | p99, ms | most, ms |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for own in first_tokens:
        added = own.added_ms
        lines.append(
            f"| {own.endpoint} | {own.prompt_tokens} | {added.median:.2f} | {added.p99:.2f} | {added.max:.2f} |"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.api", description="Measure only the API side.")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="API workers [default: %(default)s]")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 8, 64, 256], metavar="N", help="[default: 1 8 64 256]"
    )
    parser.add_argument(
        "--tokens", type=int, default=50_000, help="of all streams of a measurement together [default: %(default)s]"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        nargs="+",
        default=[64, 16384],
        metavar="TOKENS",
        help="lengths of prompts of which the first token is timed [default: 64 16384]",
    )
    parser.add_argument(
        "--requests", type=int, default=500, help="first tokens to time, fewer of long prompts [default: %(default)s]"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if min(arguments.workers, *arguments.streams, arguments.tokens, arguments.requests) < 1:
        parser.error("numbers of workers, streams, tokens and requests are at least 1")
    if min(arguments.prompts) < 16:
        parser.error(f"--prompts has {min(arguments.prompts)}: expected at least 16")
    try:
        with serving(arguments.workers) as bench:
            throughputs, first_tokens = uvloop.run(measure(bench, arguments))
    except (ValueError, ConnectionError, TimeoutError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(table(throughputs, first_tokens))
    if arguments.out:
        result = {
            "started": started,
            "device": device(),
            "cores": {"workers": cores[: arguments.workers], "client and engine": cores[-1]},
            "throughput": [
                asdict(each)
                | {"tokens_per_core_s": round(each.per_core_second), "tokens_per_cpu_s": round(each.per_cpu_second)}
                for each in throughputs
            ],
            "first_token": [asdict(each) for each in first_tokens],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
