"""How requests begin when many come at once: a few in each turn of the event loop, in turn by client, probes first."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Receive, Scope, Send

from persimmon.server.http.middleware.pace import BEGIN_PER_TURN, Pace

pytestmark = pytest.mark.anyio


class Recorder:
    """An application that records in which order requests begin, and in which turn of the event loop."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.turn = 0
        self.turns: list[int] = []
        self.pace = Pace(self, at_once=("/health",))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.append(scope["name"])
        self.turns.append(self.turn)

    def ask(self, name: str, path: str = "/v1/completions", key: str | None = None) -> "asyncio.Task[None]":
        headers = [] if key is None else [(b"authorization", key.encode())]
        scope = {"type": "http", "path": path, "headers": headers, "name": name}
        request: Callable[..., Awaitable[None]] = self.pace
        return asyncio.ensure_future(request(scope, None, None))

    async def finish(self, *tasks: "asyncio.Task[None]") -> None:
        """Turns the loop until they have ended."""
        async with asyncio.timeout(20):
            while not all(task.done() for task in tasks):
                self.turn += 1
                await asyncio.sleep(0)


async def test_a_few_requests_begin_in_each_turn() -> None:
    recorder = Recorder()
    await recorder.finish(*[recorder.ask(str(number)) for number in range(50)])
    assert recorder.begun == [str(number) for number in range(50)]
    assert max(recorder.turns.count(turn) for turn in recorder.turns) <= BEGIN_PER_TURN


async def test_a_probe_waits_for_no_other_request() -> None:
    recorder = Recorder()
    waiting = [recorder.ask(str(number)) for number in range(50)]
    await recorder.finish(waiting[0])
    await recorder.finish(recorder.ask("probe", "/health"))
    assert recorder.begun.index("probe") <= 3 * BEGIN_PER_TURN
    await recorder.finish(*waiting)


async def test_a_client_with_one_request_does_not_wait_behind_one_with_many() -> None:
    recorder = Recorder()
    many = [recorder.ask(f"many-{number}", key="Bearer many") for number in range(50)]
    one = recorder.ask("one", key="Bearer one")
    await recorder.finish(*many, one)
    assert recorder.begun.index("one") <= 2 * BEGIN_PER_TURN


async def test_requests_that_are_cancelled_while_they_wait_hold_nobody_up() -> None:
    recorder = Recorder()
    tasks = [recorder.ask(str(number)) for number in range(50)]
    await recorder.finish(tasks[0])
    for task in tasks[10:40]:
        task.cancel()
    await recorder.finish(*tasks)
    assert recorder.begun == [str(number) for number in range(50) if not 10 <= number < 40]
    await recorder.finish(recorder.ask("later"))
    assert recorder.begun[-1] == "later"
