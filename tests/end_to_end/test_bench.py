"""`persimmon bench` measures the real server."""

import json
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.serving import Server


def test_the_demo_server_is_measured(demo: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ("--num-requests", "4", "--warm-up", "1", "--input-len", "8:16", "--output-len", "6", "--prefix-len", "32")
    command = [sys.executable, "-m", "persimmon.server.cli", "bench", "--base-url", demo.url, "--out", str(out), *sizes]
    ended = subprocess.run([*command, "--rates", "50"], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert ended.stdout.startswith(f"{demo.name} at {demo.url}: prompts of 8 to 16 token ids after a shared prefix")
    (load,) = json.loads(out.read_text())["loads"]
    assert (load["answered"], load["errors"], load["output_tokens"]) == (4, {}, 24)
    assert 4 * 40 <= load["prompt_tokens"] <= 4 * 48
    assert 0 < load["ttft_ms"]["median"] <= load["e2e_ms"]["median"]
