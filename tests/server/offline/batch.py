"""Batch files for tests: lines to write, and answers to read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def completion(custom_id: str, **body: Any) -> dict[str, Any]:
    """A line that asks for the continuation of a prompt."""
    whole = {"prompt": "Hello", "temperature": 0, "max_tokens": 4} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": whole}


def write_lines(path: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    """Writes a batch file; what is text already stays as it is."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The lines of an output file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(answers: Sequence[dict[str, Any]]) -> dict[str, str]:
    """custom_id -> text of the first choice."""
    return {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in answers}
