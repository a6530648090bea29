"""Starts the real server in its own processes, as a person would, and knows where it listens."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from queue import Empty, Queue

import httpx
import psutil

START_SECONDS = 120.0
STOP_SECONDS = 60.0
SERVING = re.compile(r"Serving (?P<name>\S+) on (?P<url>\S+) ")


class Start:
    """A `persimmon serve` that may not serve yet, in a session of its own, and everything it printed."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "persimmon.server.cli", "serve", "--port", "0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.reading = threading.Event()
        self.reading.set()
        self._arrived: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.reading.wait()
            self.lines.append(line.rstrip("\n"))
            self._arrived.put(self.lines[-1])

    def wait_for_line(self, pattern: re.Pattern[str], seconds: float) -> re.Match[str]:
        """The first line from now on that matches."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(Empty):
                if match := pattern.search(self._arrived.get(timeout=0.2)):
                    return match
            if self.process.poll() is not None and self._arrived.empty():
                break
        raise AssertionError(f"no line like {pattern.pattern!r} from the server:\n" + "\n".join(self.lines))

    def signal_all(self, number: signal.Signals) -> None:
        """Sends a signal to every process of the server, as a terminal and a service manager do."""
        os.killpg(self.process.pid, number)

    def processes(self) -> set[int]:
        """Process ids of all that have not ended, whatever their parent is."""
        return {int(entry) for entry in os.listdir("/proc") if entry.isdigit() and self._is_ours(int(entry))}

    def _is_ours(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self.process.pid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and waits; the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Waits for the end; the exit code."""
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(STOP_SECONDS)
        return code


class Server(Start):
    """A running `persimmon serve`."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        super().__init__(*arguments, **environment)
        serving = self.wait_for_line(SERVING, START_SECONDS)
        self.url, self.name = serving["url"], serving["name"]

    def children(self) -> dict[str, int]:
        """Process ids of the engines ("engine", "engine-1" …) and the API workers ("api", "api-1" …), distinguished by
        the modules they have loaded; each kind in the order of its ids."""
        ids = sorted(self.spawned())
        engines = [pid for pid in ids if _has_torch(pid)]
        kinds = {"engine": engines, "api": [pid for pid in ids if pid not in engines]}
        return {
            f"{kind}-{index}" if index else kind: pid for kind, own in kinds.items() for index, pid in enumerate(own)
        }

    def spawned(self) -> list[int]:
        """Process ids of engine and API workers, also of those that have loaded nothing yet."""
        return [
            int(entry)
            for entry in os.listdir("/proc")
            if entry.isdigit() and _parent(int(entry)) == self.process.pid and "spawn_main" in _command(int(entry))
        ]

    def metrics(self) -> dict[str, float]:
        """Every series whose only label is the engine's number, if it has one: the sum over the engines."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        sums: dict[str, float] = {}
        for name, value in re.findall(r'^(persimmon_\w+)(?:{engine="\d+"})? (\S+)$', text, flags=re.MULTILINE):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def wait_until_idle(self, seconds: float = 60.0) -> dict[str, float]:
        """The metrics once nothing runs, nothing waits and every block is free."""
        deadline = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            # A worker that has just started has none of the engine's series until the engine has answered it.
            if "persimmon_requests_running" in metrics and (
                metrics["persimmon_requests_running"] == metrics["persimmon_requests_waiting"] == 0
                and metrics["persimmon_open_streams"] == 0
                and metrics["persimmon_kv_blocks_free"] == metrics["persimmon_kv_blocks"]
            ):
                return metrics
            if time.monotonic() > deadline:
                raise AssertionError(f"not idle after {seconds} s: {metrics}")


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Server]:
    """A server for the length of a block."""
    server = Server(*arguments, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:  # it has ended
        return 0


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


def _has_torch(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/maps") as file:
            return "libtorch" in file.read()
    except OSError:  # it has ended
        return False
