"""A real Ray cluster on this machine, on loopback and in a folder of its own, with the server deployed on it."""

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import psutil
import ray
from ray import serve

from benchmarks.ray_server import APPLICATION, deploy, ray_cluster

PATIENCE_SECONDS = 90.0
CPUS = 4
"""That Ray believes in: as many replicas, whatever the machine has."""

GAUGE = re.compile(r"^persimmon_(\w+)(?:\{engine=\S+\})? (\S+)$", re.MULTILINE)


class Cluster:
    """The server on a cluster.

    Args:
        port: of Ray's proxy.
        arguments: with which the application has been deployed.

    Attributes:
        url: of Ray's proxy.
    """

    def __init__(self, port: int, arguments: Mapping[str, Any]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._deployed: tuple[Mapping[str, Any], Mapping[str, Any]] = (arguments, {})

    def deploy(self, arguments: Mapping[str, Any], **options: Any) -> None:
        """Deploys the application in another form, unless it has this one, and returns when it serves.

        Args:
            arguments: of the application.
            options: of its deployment.
        """
        if (arguments, options) != self._deployed:
            deploy(arguments, **options)
            self._deployed = (arguments, options)

    def replicas(self) -> list[Any]:
        """The replicas that serve or start, as actors."""
        named = ray.util.list_named_actors(all_namespaces=True)
        names = [each for each in named if each["name"].startswith(f"SERVE_REPLICA::{APPLICATION}#")]
        return [ray.get_actor(each["name"], namespace=each["namespace"]) for each in names]

    def known_prefixes(self) -> list[set[str]]:
        """The keys of prompts' beginnings that each replica reports."""
        reports = ray.get([replica.record_routing_stats.remote() for replica in self.replicas()])
        return [set(report["prefixes"].split()) for report in reports]

    def gauges(self) -> dict[str, float]:
        """The gauges of a replica, whichever answers."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_SECONDS).text
        return {name: float(value) for name, value in GAUGE.findall(text)}

    def processes(self, title: str) -> list[psutil.Process]:
        """The processes of the cluster whose command line begins with a text."""
        children = psutil.Process().children(recursive=True)
        return [process for process in children if _command(process).startswith(title)]

    def replica_processes(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        return self.processes(f"ray::ServeReplica:{APPLICATION}:")

    def engines(self) -> list[psutil.Process]:
        """The engine processes."""
        return [child for replica in self.replica_processes() for child in spawned(replica)]

    def wait_for_replicas(self, number: int, without: psutil.Process | None = None) -> None:
        """Returns when this many replicas serve, and no others are left.

        Args:
            number: how many.
            without: the engine of a replica that is to be replaced.
        """

        def serving() -> bool:
            status = serve.status().applications[APPLICATION].deployments[APPLICATION]
            engines = self.engines()
            return status.replica_states == {"RUNNING": number} and len(engines) == number and without not in engines

        until(serving)

    def wait_until_idle(self) -> None:
        """Returns when no replica has a request, and every block is free."""

        def idle() -> bool:
            # Requests of no session are spread at random, so these reach all replicas.
            return all(_is_idle(self.gauges()) for _ in range(12))

        until(idle)


def spawned(process: psutil.Process) -> list[psutil.Process]:
    """The processes of the server that a process of it has started."""
    return [child for child in _children(process) if "spawn_main" in _command(child)]


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, even if its parent has not collected its exit code yet."""
    return not _command(process)


def _command(process: psutil.Process) -> str:
    """The command line of a process; empty if it has ended, even if its parent has not collected its exit code yet."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _children(process: psutil.Process) -> list[psutil.Process]:
    """What a process has started; nothing if it has ended."""
    try:
        return list(process.children())
    except psutil.NoSuchProcess:
        return []


def _is_idle(gauges: Mapping[str, float]) -> bool:
    return (
        not gauges["open_streams"]
        and not gauges["requests_running"]
        and not gauges["requests_waiting"]
        and gauges["kv_blocks_free"] == gauges["kv_blocks"]
    )


def until(condition: Callable[[], bool]) -> None:
    """Returns when a condition holds; fails when it takes too long.  Asking takes its time, so there is no pause."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{condition.__name__} has not come true"


@contextlib.contextmanager
def cluster(**arguments: Any) -> Iterator[Cluster]:
    """A cluster for the length of a block; nothing of it is left afterwards.

    Args:
        arguments: of the application.
    """
    port = free_port()
    with ray_cluster(port, arguments, CPUS):
        yield Cluster(port, arguments)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def client(cluster: Cluster) -> httpx.AsyncClient:
    """A client with as many connections as it needs."""
    return httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE_SECONDS, limits=httpx.Limits(max_connections=None))
