"""Every file of examples/ runs against a real server, and prints what the pages that show it say."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.serving import Server, serving
from tools import docs

EXAMPLES = sorted(path for path in (docs.ROOT / "examples").iterdir() if path.suffix in (".py", ".sh"))
PAGES = [docs.ROOT / "README.md", *sorted((docs.ROOT / "docs" / "guides").glob("*.md"))]
OUTPUT = re.compile(docs.EXAMPLE.pattern + r"(?:\n[^`\n][^\n]*\n)?\n```(?:json)?\n(?P<output>.*?)```\n", re.DOTALL)
DIFFERENT_EACH_TIME = frozenset({"id", "created", "system_fingerprint"})
MERGED = frozenset({"content"})
"""In events of a stream: tokens that come together share one."""


def outputs(example: Path) -> list[str]:
    """What pages say that an example prints."""
    return [
        shown["output"]
        for page in PAGES
        for shown in OUTPUT.finditer(page.read_text())
        if shown["file"] == f"examples/{example.name}"
    ]


def holds(whole: Any, part: Any, ignored: frozenset[str] = DIFFERENT_EACH_TIME) -> bool:
    """Whether some JSON has everything that a page shows of it; the values of ignored keys may differ."""
    if isinstance(part, dict):
        return all(key in whole and (key in ignored or holds(whole[key], part[key], ignored)) for key in part)
    if isinstance(part, list):
        return len(whole) == len(part) and all(holds(*both, ignored) for both in zip(whole, part, strict=True))
    return bool(whole == part)


def events(text: str) -> list[Any]:
    """The JSON of server-sent events."""
    return [json.loads(line) for line in re.findall(r"^data: (\{.*)$", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def vision_demo() -> Iterator[Server]:
    with serving("--model", "demo-vision", "--kv-cache-memory", "32MB") as server:
        yield server


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_prints_what_pages_say(request: pytest.FixtureRequest, example: Path, tmp_path: Path) -> None:
    if example.suffix == ".sh" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = example.read_text()
    server: Server = request.getfixturevalue("vision_demo" if "demo-vision" in text else "demo")
    script = tmp_path / example.name
    script.write_text(text.replace("http://127.0.0.1:8000", server.url))
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = [sys.executable, "-P"] if example.suffix == ".py" else ["sh"]
    ran = subprocess.run(
        [*program, str(script)],
        cwd=tmp_path,
        env=os.environ | {"PATH": commands},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    shown = outputs(example)
    assert shown
    for output in shown:
        if output.startswith("data: "):
            printed = iter(events(ran.stdout))
            assert all(
                any(holds(event, part, DIFFERENT_EACH_TIME | MERGED) for event in printed) for part in events(output)
            )
            assert ran.stdout.endswith("data: [DONE]\n\n")
        elif output.startswith("{"):
            assert holds(json.loads(ran.stdout), json.loads(output))
        else:
            assert ran.stdout == output


# test_embedded.py runs the code of embedding.md.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "embedding.md"], ids=lambda page: page.name)
def test_code_in_guides_is_an_example(page: Path) -> None:
    text = page.read_text()
    assert text.count("```python\n") + text.count("```sh\n") == len(docs.EXAMPLE.findall(text))
