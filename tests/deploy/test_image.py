"""What builds the image gets all that it needs, and the image's health check is correct."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.deploy.files import DEPLOY, ROOT

DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
"""With its continued lines joined."""

SCRIPTS = ("build_image.sh", "smoke_test.sh")


def test_what_the_image_copies_is_there_and_not_ignored():
    copied = [
        name
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
        for name in sources.split()
    ]
    assert {"setup.py", "kernels", "model", "server"} <= set(copied)  # without setup.py there are no C kernels
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert all((ROOT / name).exists() for name in copied)
    assert {f"!{name}" for name in copied} == {line for line in sent if line.startswith("!")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_to_install_where_nothing_can_build_or_run(script: str, tmp_path: Path):
    for tool in ("dirname", "sed"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    ended = _run(script, PATH=str(tmp_path))
    assert ended.returncode == 2
    assert f"{script}: install docker" in ended.stderr


def test_the_builder_is_told_what_the_variables_say(tmp_path: Path):
    podman = tmp_path / "podman"
    podman.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    podman.chmod(0o755)
    (tmp_path / "pip.conf").touch()
    ended = _run(
        "build_image.sh",
        "name:1",
        "--no-cache",
        BUILDER=str(podman),
        BASE_IMAGE="debian:13",
        TORCH_INDEX="https://wheels.example/cpu",
        PIP_CONFIG_FILE=str(tmp_path / "pip.conf"),
    )
    assert ended.returncode == 0, ended.stderr
    reported = ended.stdout.splitlines()
    assert reported[:4] == ["build", "--tag", "name:1", "--no-cache"]
    assert reported[-1] == "."
    assert {"BASE_IMAGE=debian:13", "TORCH_INDEX=https://wheels.example/cpu", "VERSION=0.1.0"} <= set(reported)
    assert f"id=pip.conf,src={tmp_path}/pip.conf" in reported
    assert reported[reported.index("--format") + 1] == "docker"


def test_an_argument_that_the_script_passes_is_one_of_the_dockerfile():
    passed = set(re.findall(r"for argument in (.+); do|--build-arg \"(\w+)=", (DEPLOY / "build_image.sh").read_text()))
    names = {name for groups in passed for group in groups for name in group.split()} - {"argument"}
    assert names == set(re.findall(r"^ARG (\w+)", DOCKERFILE, flags=re.MULTILINE))


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_images_check_of_its_health_is_that_of_the_server(status: int, code: int):
    (command,) = re.findall(r"^HEALTHCHECK .*CMD (\[.+\])$", DOCKERFILE, flags=re.MULTILINE)
    _, *arguments = json.loads(command)
    with _answering(status) as port:
        environment = os.environ | {"PERSIMMON_PORT": str(port)}
        ended = subprocess.run([sys.executable, *arguments], env=environment, timeout=60, check=False)
    assert ended.returncode == code


@contextmanager
def _answering(status: int) -> Iterator[int]:
    """The port of a server whose /health has a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def _run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/bash", str(DEPLOY / script), *arguments]
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60, check=False)
