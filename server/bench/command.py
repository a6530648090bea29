"""`persimmon bench`: from arguments to loads, tables and files.

Knows OpenAI's endpoints and nothing else of the server.
"""

import asyncio
import datetime
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop

from persimmon.progress import progress_bar
from persimmon.server.bench.answer import RequestFailedError
from persimmon.server.bench.http_client import Endpoint, Response
from persimmon.server.bench.load import ClosedLoop, Exchange, Limits, Load, OpenLoop, Run, drive
from persimmon.server.bench.plot import MISSING, Point, can_plot, plot
from persimmon.server.bench.probe import refusal_of_token_ids, served_model
from persimmon.server.bench.report import Report, read_exchanges, remarks, summarize, table_head, table_row
from persimmon.server.bench.workload import FileWorkload, Prompt, RandomWorkload, Request, Workload, request
from persimmon.server.console import interruptible

DEFAULT_REQUESTS = 128
DEFAULT_STREAMS = 8
FIRST_CONTACT_SECONDS = 10.0
"""How long a server may take to list its models; a host that drops packets would hold a person for minutes."""


class BenchError(Exception):
    """Nothing can be measured; the message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """Everything that the arguments say.

    Attributes:
        endpoint: the server.
        model: the name in requests; None for the first that the server lists.
        workload: what is sent.
        ignore_eos: whether answers have exactly their length.
        loads: one after the other.
        limits: of each.
        warm_up: requests before the first load; None for one a stream.
        seed: of prompts and arrivals.
        out: where the figures go, if anywhere.
        plot: where the plot goes, if anywhere.
    """

    endpoint: Endpoint
    model: str | None
    workload: Workload
    ignore_eos: bool
    loads: tuple[Load, ...]
    limits: Limits
    warm_up: int | None
    seed: int
    out: Path | None
    plot: Path | None

    @property
    def warm_up_streams(self) -> int:
        """Most warm-up requests in flight."""
        return max((load.streams for load in self.loads if isinstance(load, ClosedLoop)), default=DEFAULT_STREAMS)

    @property
    def sends_twice(self) -> bool:
        """Whether a measured prompt may be sent more than once."""
        if not isinstance(self.workload, FileWorkload):
            return False
        most = self.limits.requests
        return len(self.loads) > 1 or most is None or most > len(self.workload.lines)

    def requests(self, model: str, load_number: int) -> Iterator[Request]:
        """Measured requests without end, others for each load."""
        return self._requests(model, self.workload.prompts(f"{self.seed} {load_number}"))

    def warm_up_requests(self, model: str) -> Iterator[Request]:
        """Requests that are like the measured ones and none of them, without end."""
        return self._requests(model, self.workload.warm_up_prompts(self.seed))

    def _requests(self, model: str, prompts: Iterator[Prompt]) -> Iterator[Request]:
        return (request(model, prompt, self.ignore_eos) for prompt in prompts)


def read_plan(arguments: Namespace) -> Plan:
    """Makes sense of the arguments.

    Raises:
        BenchError: they make none, or a file cannot be read or written.
    """
    key = os.environ.get("OPENAI_API_KEY", "") if arguments.api_key is None else arguments.api_key
    try:
        workload = _workload(arguments)
        plan = Plan(
            endpoint=Endpoint.from_url(arguments.base_url, key),
            model=arguments.model,
            workload=workload,
            ignore_eos=arguments.prompts is None if arguments.ignore_eos is None else arguments.ignore_eos,
            loads=_loads(arguments),
            limits=Limits(_most_requests(arguments, workload), arguments.duration, arguments.timeout),
            warm_up=arguments.warm_up,
            seed=arguments.seed,
            out=arguments.out,
            plot=arguments.plot,
        )
    except ValueError as error:
        raise BenchError(str(error)) from None
    if plan.warm_up is not None and plan.warm_up < 0:
        raise BenchError(f"--warm-up is {plan.warm_up}; expected at least 0")
    for path in (plan.out, plan.plot):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise BenchError(f"{path} cannot be written: it is a folder, or its folder does not exist")
    if plan.plot is not None and len(plan.loads) < 2:
        raise BenchError("--plot draws latency against load and needs several loads, for example --rates 1,2,4,8")
    if plan.plot is not None and not can_plot():
        raise BenchError(MISSING)
    return plan


def _loads(arguments: Namespace) -> tuple[Load, ...]:
    if arguments.rates:
        return tuple(OpenLoop(rate, f"{arguments.seed} {rate:g}") for rate in arguments.rates)
    return tuple(ClosedLoop(streams) for streams in arguments.streams or (DEFAULT_STREAMS,))


def _most_requests(arguments: Namespace, workload: Workload) -> int | None:
    if arguments.num_requests is not None or arguments.duration is not None:
        most: int | None = arguments.num_requests
        return most
    return len(workload.lines) if isinstance(workload, FileWorkload) else DEFAULT_REQUESTS


def _workload(arguments: Namespace) -> Workload:
    random = RandomWorkload(
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        prefix_len=arguments.prefix_len,
        prefixes=arguments.prefixes,
        token_ids=arguments.token_ids,
        form="chat" if arguments.endpoint == "chat" else "ids",
    )
    if arguments.prompts is None:
        return random
    return FileWorkload.read(arguments.prompts, arguments.output_len[1], arguments.endpoint)


def bench(arguments: Namespace, print_line: Callable[[str], None]) -> int:
    """Runs one command line and prints its table.

    Args:
        arguments: as `persimmon.server.bench.arguments` reads them.
        print_line: prints a line on the console that is not a result.

    Returns:
        The exit code: 0, 1 when a request failed, 2 when nothing could be measured, 130 when interrupted.
    """
    try:
        with interruptible():
            return uvloop.run(_bench(read_plan(arguments), print_line))
    except (BenchError, OSError) as error:
        print_line(f"persimmon: error: {error}")
        return 2
    except KeyboardInterrupt:
        print_line("persimmon: stopped; no file was written")
        return 130


async def _bench(plan: Plan, print_line: Callable[[str], None]) -> int:
    started = _now()
    model, refusal = await _first_contact(plan)
    if refusal is not None and isinstance(plan.workload, RandomWorkload):
        print_line(f"Prompts are words, because the server does not accept these token ids: {refusal}")
        plan = replace(plan, workload=replace(plan.workload, form="text"))
    print(f"{model} at {plan.endpoint.url}: {plan.workload}", flush=True)
    if plan.sends_twice:
        print_line(
            "Prompts of the file are sent more than once, so prefix caching makes the server faster than new prompts "
            "would."
        )
    warm_up = plan.warm_up_streams if plan.warm_up is None else plan.warm_up
    if warm_up:
        limits = Limits(requests=warm_up, timeout_s=plan.limits.timeout_s)
        await drive(plan.endpoint, plan.warm_up_requests(model), ClosedLoop(plan.warm_up_streams), limits)
    print(table_head(plan.loads[0]), flush=True)
    reports = []
    for number, load in enumerate(plan.loads):
        run = await _drive_watched(plan, plan.requests(model, number), load)
        report = summarize(asdict(load), run, read_exchanges(run.exchanges))
        reports.append(report)
        print("\n".join([table_row(load, report), *(f"{'':9}{line}" for line in remarks(report))]), flush=True)
    if plan.out is not None:
        result = {"started": started, "ended": _now(), **_facts(plan, model)}
        result["loads"] = [asdict(report) for report in reports]
        plan.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if plan.plot is not None:
        plot(_points(plan.loads, reports), plan.loads[0].unit, f"{model}: {plan.workload}", plan.plot)
    return 1 if any(report.failed for report in reports) else 0


async def _first_contact(plan: Plan) -> tuple[str, str | None]:
    """The model's name, and what the server says against token ids if the workload has any."""
    endpoint, workload = plan.endpoint, plan.workload
    try:
        async with asyncio.timeout(FIRST_CONTACT_SECONDS):
            listed = await served_model(endpoint)
    except TimeoutError:
        raise BenchError(f"{endpoint.url} cannot be reached: no answer within {FIRST_CONTACT_SECONDS:g} s") from None
    except OSError as error:
        raise BenchError(f"{endpoint.url} cannot be reached: {error}") from None
    except RequestFailedError as error:
        if plan.model is None:
            raise BenchError(f"{endpoint.url}: {error}") from None
        listed = plan.model  # not every server lists its models
    model = plan.model or listed
    if not (isinstance(workload, RandomWorkload) and workload.form == "ids"):
        return model, None
    try:
        async with asyncio.timeout(plan.limits.timeout_s):
            return model, await refusal_of_token_ids(endpoint, model, workload.token_ids)
    except TimeoutError:
        raise BenchError(f"{endpoint.url}: no answer to the first prompt within {plan.limits.timeout_s:g} s") from None
    except OSError as error:
        raise BenchError(f"{endpoint.url}: the first prompt failed: {error}") from None


async def _drive_watched(plan: Plan, requests: Iterable[Request], load: Load) -> Run:
    """Puts a load on the server under a progress bar, if there is a terminal for one."""
    name = f"{load.offered:g} {load.unit}"
    total = plan.limits.requests if plan.limits.duration_s is None else None
    with progress_bar(name, total, "req") as bar:
        failed = 0

        def watch(exchange: Exchange) -> None:
            nonlocal failed
            if not isinstance(exchange.outcome, Response) or exchange.outcome.status != 200:
                failed += 1
                bar.set_postfix(failed=failed, refresh=False)
            bar.update()

        return await drive(plan.endpoint, requests, load, plan.limits, watch)


def _facts(plan: Plan, model: str) -> dict[str, Any]:
    """What the result file says of the measurement; never the key."""
    workload = plan.workload
    lines = {"file": workload.source, "prompts": len(workload.lines)} if isinstance(workload, FileWorkload) else None
    return {
        "client": f"persimmon-server {version('persimmon-server')}",
        "server": plan.endpoint.url,
        "model": model,
        "workload": {"title": str(workload), **(lines or asdict(workload)), "ignore_eos": plan.ignore_eos},
        "seed": plan.seed,
        "limits": asdict(plan.limits),
    }


def _points(loads: Sequence[Load], reports: Sequence[Report[dict[str, Any]]]) -> list[Point]:
    """The plot's points, from the least load to the most."""
    points = [
        Point(load=load.offered, ttft=report.ttft_ms, itl=report.itl_ms, e2e=report.e2e_ms)
        for load, report in zip(loads, reports, strict=True)
    ]
    return sorted(points, key=lambda point: point.load)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
