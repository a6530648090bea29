"""A server of two engines of two ranks each: cores, answers, and the death of a rank.

It takes the machine to have four cores, whatever it has.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.test_data_parallel import complete, is_ready, of_engines, status, streams, wait_until
from tests.distributed.test_rank_failures import other_rank, wait_for_end
from tests.end_to_end.serving import Server, serving
from tests.engine_harness import Harness, load_model
from tests.model.checkpoints import DEMO
from tests.model.test_parity import dialogues

PROMPTS = list(dialogues())[:6]
NEW_TOKENS = 16
CORES = 4

FOUR_CORES = f"""
import os
from pathlib import Path

from persimmon.model import cores

own = set(range({CORES}))


def keep_to(process, cores):
    own.intersection_update(cores)
    Path(__file__).with_name(f"cores-of-{{os.getpid()}}").write_text(" ".join(map(str, own)))


cores.control_groups = lambda *arguments: []
os.sched_getaffinity = lambda process: set(own)
os.sched_setaffinity = keep_to
"""
"""What each process of the server runs first: the machine has four cores, and a file says which ones it keeps to."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four-cores")
    (folder / "sitecustomize.py").write_text(FOUR_CORES)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """At its end no process is left."""
    arguments = ("--data-parallel-size", "2", "--tensor-parallel-size", "2", "--kv-cache-memory", "64MB")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    with serving(*arguments, PYTHONPATH=path) as server:
        yield server
        assert server.stop() == 0
        wait_until(lambda: not server.processes())


def engines(server: Server) -> list[int]:
    return [pid for name, pid in server.children().items() if name.startswith("engine")]


def test_each_rank_has_a_core_next_to_those_of_its_engine(server: Server, folder: Path) -> None:
    def cores(pid: int) -> list[int]:
        return [int(core) for core in (folder / f"cores-of-{pid}").read_text().split()]

    parts = [cores(engine) + cores(other_rank(engine)) for engine in engines(server)]
    assert sorted(map(sorted, parts)) == [[0, 1], [2, 3]]


def test_answers_are_those_of_one_engine(server: Server) -> None:
    expected = Harness(load_model(DEMO), num_blocks=200).outputs(PROMPTS, NEW_TOKENS)
    before = of_engines(server, "persimmon_generated_tokens_total")
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: complete(server, prompt, NEW_TOKENS), PROMPTS))
    assert [answer["choices"][0]["token_ids"] for answer in answers] == expected
    after = of_engines(server, "persimmon_generated_tokens_total")
    assert all(after[number] > before[number] for number in (0, 1))


def test_a_killed_rank_ends_the_requests_of_its_engine_and_no_others(server: Server) -> None:
    with streams(server, 4, max_tokens=500) as opened:
        kept, ended = engines(server)
        rank = other_rank(kept)
        end = os.pidfd_open(ended)
        os.kill(other_rank(ended), signal.SIGKILL)
        wait_for_end(end)
        wait_until(lambda: status(server) == (200, "degraded"))
        complete(server, [600, 601])
        ends = [stream.rest()[-1] for stream in opened]
    failed = [json.loads(end.removeprefix("data: "))["error"]["code"] for end in ends if "error" in end]
    assert failed == ["engine_dead"] * 2
    assert ends.count("data: [DONE]") == 2
    wait_until(lambda: is_ready(server))
    assert any(re.search(r"rank 1 ended with code -9; the engine ends with it", line) for line in server.lines)
    assert other_rank(kept) == rank
    [successor] = set(engines(server)) - {kept}
    assert other_rank(successor) in server.processes()
    server.wait_until_idle()
