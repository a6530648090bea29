"""What the person at the console sees: a start that explains itself, or one line that says what to do."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path

import httpx
import pytest

from persimmon import model
from tests.end_to_end.serving import serving

DEMO = Path(model.__path__[0]) / "demo"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "persimmon.server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def copy_of_demo(folder: Path) -> Path:
    shutil.copytree(DEMO, folder / "checkpoint", ignore=shutil.ignore_patterns("*.py", "LICENSE*"))
    return folder / "checkpoint"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_such_path(folder: Path) -> str:
    return str(folder / "nothing-here")


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return str(folder)


def another_architecture(folder: Path) -> str:
    change_config(folder, architectures=["LlamaForCausalLM"], model_type="llama")
    return str(folder)


def truncated_weights(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5_000_000])
    return str(folder)


def ids_beyond_the_embedding(folder: Path) -> str:
    change_config(folder, vocab_size=4000)
    return str(folder)


def no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").unlink()
    return str(folder)


def damaged_tokenizer_json(folder: Path) -> str:
    (folder / "tokenizer.json").write_text('{"model": ')
    return str(folder)


def damaged_chat_template(folder: Path) -> str:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    return str(folder)


# The engine finds the truncated weights; tests/model/test_checkpoint.py has the other faults of tensors.
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (no_such_path, "nothing-here"),
        (no_config, "config.json"),
        (another_architecture, "LlamaForCausalLM"),
        (truncated_weights, "model.safetensors"),
        (ids_beyond_the_embedding, "4096"),
        (no_tokenizer, "tokenizer.model"),
        (damaged_tokenizer_json, "tokenizer.json"),
        (damaged_chat_template, "chat_template.jinja"),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_exit_code_2(damage, named, tmp_path):
    ended = run("serve", "--port", "0", "--model", damage(copy_of_demo(tmp_path)))
    errors = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert len(errors) == 1
    assert errors[0].startswith("persimmon: error: ")
    assert named in errors[0]


# The first is refused by the engine's memory plan, whose other errors are in tests/model/test_memory.py.
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--kv-cache-memory", "900TB"], ["--kv-cache-memory", "available", "give at most"]),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "32"], ["--max-num-batched-tokens", "--max-num-seqs"]),
        (["--dtype", "int8"], ["--dtype", "int8", "float16"]),
        (["--block-size", "17"], ["--block-size", "17"]),
        (["--port", "70000"], ["--port", "65535", "70000"]),
        (["--host", "203.0.113.1"], ["203.0.113.1", "--host"]),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_with_the_numbers(arguments, named):
    ended = run("serve", "--port", "0", *arguments)
    errors = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert len(errors) == 1
    for text in named:
        assert text in errors[0]


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("serve", "--port", str(port))
    assert ended.returncode == 2
    assert f"127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_environment_variable_is_read_and_checked(monkeypatch):
    monkeypatch.setenv("PERSIMMON_BLOCK_SIZE", "17")
    ended = run("serve", "--port", "0")
    assert ended.returncode == 2
    assert "PERSIMMON_BLOCK_SIZE" in ended.stderr


def test_the_console_tells_each_phase_the_memory_plan_and_where_to_go(demo):
    if not any(line.startswith("  curl ") for line in demo.lines):  # the last line of a start may be on its way yet
        demo.wait_for_line(re.compile(r"^  curl "), 60)
    console = "\n".join(demo.lines)
    assert "demo checkpoint" in demo.lines[0]
    for phase in ("checkpoint", "weights", "KV cache", "warm-up"):
        assert re.search(rf"^  {phase} +\d+\.\d\d s$", console, flags=re.MULTILINE), phase
    buffers = r"( step buffers \d+\.\d MiB,)?"  # the C kernels' own
    assert re.search(rf"weights \d\d\.\d MiB, activations \d+\.\d MiB,{buffers} KV cache 2\d\.\d MiB", console)
    assert re.search(r"\d+ KV blocks of 32 hold [\d,]+ tokens", console)
    assert f"curl {demo.url}/v1/chat/completions" in console


def test_a_server_without_c_kernels_says_so_and_answers_the_same(demo, tmp_path):
    # As it is installed where there is no C compiler.
    project = Path(__file__).parents[2]
    package = tmp_path / "persimmon"
    package.mkdir()
    shutil.copy(project / "persimmon" / "__init__.py", package)
    for folder in ("server", "model"):
        (package / folder).symlink_to(project / folder)
    shutil.copytree(project / "kernels", package / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    asked = {"messages": [{"role": "user", "content": "What does galaxy mean?"}], "temperature": 0}
    # Python looks there first, and not in the folder that it is started in.
    with serving("--kv-cache-memory", "26MB", PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1") as server:
        answers = [
            httpx.post(f"{each.url}/v1/chat/completions", json=asked, timeout=60).json() for each in (demo, server)
        ]
    reported = r"^Serving .* \(float32, cpu \(\d+ threads, plain torch, no C kernels\)\)"
    assert re.search(reported, "\n".join(server.lines), re.MULTILINE)
    assert answers[0]["choices"] == answers[1]["choices"]


def test_the_printed_curl_works(demo):
    command = next(line.strip() for line in demo.lines if line.strip().startswith("curl "))
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    answer = json.loads(ended.stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_a_terminal_shows_a_progress_bar_for_the_weights():
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
    command = [sys.executable, "-m", "persimmon.server.cli", "serve", "--port", "0", "--kv-cache-memory", "64MB"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while b"Serving" not in shown:
            shown += os.read(master, 4096)
        process.terminate()
    os.close(master)
    assert re.search(rb"\r  weights: +\d+%\|", shown)


def test_a_log_file_gets_no_progress_bar(demo):
    assert not any("%|" in line for line in demo.lines)


def test_a_log_that_is_not_read_any_more_stops_no_request():
    with serving("--kv-cache-memory", "26MB") as server:
        server.reading.clear()
        assert server.process.stderr is not None
        fcntl.fcntl(server.process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for _ in range(400):  # of which the pipe and the reader's buffer take some 80 lines
                assert client.get("/v1/models").status_code == 200
        server.reading.set()
        assert server.stop() == 0
        assert sum("path=/v1/models" in line for line in server.lines) == 400


def test_a_server_whose_standard_error_is_closed_serves(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f"exec {sys.executable} -m persimmon.server.cli serve --kv-cache-memory 26MB --port {port} 2>&-"
    with subprocess.Popen(["sh", "-c", command]) as process:
        try:
            answered = False
            while not answered:
                assert process.poll() is None
                with contextlib.suppress(httpx.TransportError):
                    answered = httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
        finally:
            process.terminate()
        assert process.wait(60) == 0


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_a_place_for_temporary_files_that_cannot_hold_sockets_is_one_line(command, tmp_path, monkeypatch):
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "Hello"}) + "\n")
    arguments = {"serve": ["--port", "0"], "generate": [str(source), str(tmp_path / "out.jsonl")]}
    ended = run(command, *arguments[command])
    assert ended.returncode == 2
    (error,) = [line for line in ended.stderr.splitlines() if "error" in line]
    assert error.startswith(f"persimmon: error: the path {long} is too long for unix sockets")


@pytest.mark.parametrize(
    ("limit", "shown"),
    [
        ("ulimit -n 12", "Too many open files"),
        ("ulimit -f 0", "No usable temporary directory"),
        ("ulimit -v 450000", "failed to map segment|[Cc]annot allocate memory"),
    ],
)
def test_a_limit_that_allows_no_start_is_one_line(limit, shown):
    command = f"{limit}; exec {sys.executable} -m persimmon.server.cli serve --port 0 --kv-cache-memory 26MB"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    (error,) = [line for line in ended.stderr.splitlines() if "error" in line]
    assert error.startswith("persimmon: error: ")
    assert re.search(shown, error)
