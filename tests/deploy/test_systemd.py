"""The systemd unit: its command and variables exist, and the server has the time that its drain takes."""

import configparser
import re
import shutil
import signal
import socket
import subprocess
import sys
from configparser import SectionProxy
from pathlib import Path

import pytest

from persimmon.server.config import Settings, environment_variable
from persimmon.server.supervisor import FINAL_ERROR_SECONDS, FLUSH_SECONDS
from tests.deploy.files import DEPLOY
from tests.end_to_end.serving import SERVING, Start

UNIT = DEPLOY / "systemd" / "persimmon.service"


@pytest.fixture(scope="module")
def service() -> SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return parser["Service"]


def test_the_server_has_the_time_that_its_drain_takes(service):
    drain = Settings.model_fields["drain_timeout"].default
    assert drain + FINAL_ERROR_SECONDS + FLUSH_SECONDS < float(service["TimeoutStopSec"])


def test_variables_are_settings_of_the_server():
    known = {environment_variable(name) for name in Settings.model_fields}
    assert set(re.findall(r"PERSIMMON_\w+", UNIT.read_text())) <= known


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_no_fault_in_it(tmp_path: Path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/persimmon/bin/persimmon", sys.executable))
    ended = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert [line for line in ended.stderr.splitlines() if UNIT.name in line] == []


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_learns_when_the_server_serves_and_when_it_stops(abstract, tmp_path):
    address = f"@persimmon-test-{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0", 1))
        manager.settimeout(120)
        start = Start("--kv-cache-memory", "26MB", NOTIFY_SOCKET=address)
        try:
            assert manager.recv(100) == b"READY=1"
            start.wait_for_line(SERVING, 60)
            start.signal_all(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
        finally:
            assert start.stop() == 0
