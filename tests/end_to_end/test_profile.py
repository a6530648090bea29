"""`--profile-steps` records the first steps of an engine in a file of trace events."""

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.serving import START_SECONDS, Start, serving
from tests.end_to_end.test_processes import answers


@pytest.mark.parametrize("more", [(), ("--async-scheduling", "on")], ids=["one at a time", "overlapping"])
def test_a_profile_has_the_first_steps_with_their_parts(tmp_path: Path, more: tuple[str, ...]) -> None:
    folder = tmp_path / "new" / "profiles"
    with serving(
        "--kv-cache-memory", "26MB", "--log-format", "json", "--profile-steps", "3", "--profile-dir", str(folder), *more
    ) as server:
        assert answers(server)
        recorded = server.wait_for_line(re.compile(r"first steps are recorded in (\S+\.json\.gz),"), 60)
        assert answers(server)
        assert all(json.loads(line) for line in server.lines)
    (path,) = folder.iterdir()
    assert path == Path(recorded[1])
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    ranges = [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["ph"] == "X"
    ]
    steps = [each for each in ranges if each[0].startswith("step ")]
    assert sorted(name for name, _, _ in steps) == sorted(
        f"step {n}: {part}" for n in (1, 2, 3) for part in ("launch", "wait")
    )
    launches = [(begin, end) for name, begin, end in steps if name.endswith("launch")]
    for begin, end in launches:
        within = [each for each in ranges if begin <= each[1] <= each[2] <= end and each[0] in ("network", "sample")]
        assert [name for name, _, _ in sorted(within, key=lambda each: each[1])] == ["network", "sample"]


def test_a_folder_that_cannot_be_made_ends_the_start_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    start = Start("--kv-cache-memory", "26MB", "--profile-steps", "1", "--profile-dir", str(tmp_path / "file"))
    start.wait_for_line(re.compile(r"error: --profile-dir \S+file is not a folder"), START_SECONDS)
    assert start.wait() == 2
