"""Clients' grammars are checked in a thread, once, and never at the cost of other requests."""

import asyncio
import threading

import pytest

from persimmon.model.grammar import GrammarError, GrammarSpec
from persimmon.server.http.errors import ApiError
from persimmon.server.http.generation.grammars import MAX_REMEMBERED, MAX_WAITING, GrammarChecker
from persimmon.server.http.schemas.constraint import Constraint

pytestmark = pytest.mark.anyio


class Compiler:
    """Refuses what is called bad, and waits in between while `open` is not set."""

    def __init__(self) -> None:
        self.checked: list[str] = []
        self.threads: set[int] = set()
        self.open = threading.Event()
        self.open.set()

    def check(self, spec: GrammarSpec) -> None:
        self.checked.append(spec.text)
        self.threads.add(threading.get_ident())
        self.open.wait(20)
        if spec.text.startswith("bad"):
            raise GrammarError(f"{spec.text} is bad")
        if spec.text == "bug":
            raise ZeroDivisionError


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def checker(compiler: Compiler) -> GrammarChecker:
    return GrammarChecker(compiler)  # type: ignore[arg-type]  # what it needs of one


def constraint(text: str, *parts: Constraint) -> Constraint:
    return Constraint(f"field {text}", GrammarSpec("regex", text), parts)


async def test_a_grammar_is_checked_once_and_outside_the_event_loop(
    checker: GrammarChecker, compiler: Compiler
) -> None:
    await asyncio.gather(*(checker.check(constraint("good")) for _ in range(5)))
    await checker.check(constraint("good"))
    assert compiler.checked == ["good"]
    assert compiler.threads != {threading.get_ident()}


async def test_a_grammar_that_cannot_be_used_is_a_400_every_time_and_checked_once(
    checker: GrammarChecker, compiler: Compiler
) -> None:
    for _ in range(2):
        with pytest.raises(ApiError) as caught:
            await checker.check(constraint("bad"))
        assert caught.value.status == 400
        assert caught.value.body.error.message == "Invalid 'field bad': bad is bad."
        assert caught.value.body.error.param == "field bad"
    assert compiler.checked == ["bad"]


async def test_the_error_names_the_part_that_is_at_fault_or_else_the_whole(checker: GrammarChecker) -> None:
    parts = (constraint("good"), constraint("bad 1"), constraint("bad 2"))
    with pytest.raises(ApiError, match=r"^Invalid 'field bad 1': bad 1 is bad\.$"):
        await checker.check(constraint("bad whole", *parts))
    with pytest.raises(ApiError, match=r"^Invalid 'field bad whole': bad whole is bad\.$"):
        await checker.check(constraint("bad whole", constraint("good")))
    await checker.check(constraint("good whole", *parts))


async def test_a_request_that_is_cancelled_takes_nobody_elses_check_with_it(
    checker: GrammarChecker, compiler: Compiler
) -> None:
    compiler.open.clear()
    first = asyncio.create_task(checker.check(constraint("good")))
    second = asyncio.create_task(checker.check(constraint("good")))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    compiler.open.set()
    await second
    assert compiler.checked == ["good"]


async def test_too_many_grammars_at_once_are_a_503_and_known_ones_are_not(
    checker: GrammarChecker, compiler: Compiler
) -> None:
    await checker.check(constraint("known"))
    compiler.open.clear()
    waiting = [asyncio.create_task(checker.check(constraint(f"good {number}"))) for number in range(MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as caught:
        await checker.check(constraint("one more"))
    assert (caught.value.status, caught.value.body.error.code) == (503, "too_many_grammars")
    assert caught.value.retry_after is not None
    await checker.check(constraint("known"))
    compiler.open.set()
    await asyncio.gather(*waiting)
    await checker.check(constraint("one more"))


async def test_the_latest_used_grammars_are_remembered(checker: GrammarChecker, compiler: Compiler) -> None:
    await checker.check(constraint("first"))
    await checker.check(constraint("second"))
    for number in range(MAX_REMEMBERED - 1):
        await checker.check(constraint(f"good {number}"))
        await checker.check(constraint("first"))
    assert compiler.checked.count("first") == 1
    await checker.check(constraint("second"))
    assert compiler.checked.count("second") == 2


async def test_a_bug_is_no_verdict(checker: GrammarChecker, compiler: Compiler) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await checker.check(constraint("bug"))
    assert compiler.checked == ["bug", "bug"]
