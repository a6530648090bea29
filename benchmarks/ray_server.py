"""The server on a Ray cluster of this machine alone: on loopback, in a folder of its own, gone with this process.

    python -m benchmarks.ray_server --port 8000 num_replicas=1 max_num_seqs=64

Needs the extra `ray`.  Knows nothing of what is measured or tested.
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from deploy.ray import app

APPLICATION = "persimmon"
STOP_SECONDS = 30.0


@contextlib.contextmanager
def ray_cluster(port: int, arguments: Mapping[str, Any], cpus: int) -> Iterator[None]:
    """A cluster with the application on it, for the length of a block.

    Args:
        port: of Ray's proxy.
        arguments: of the application.
        cpus: that Ray believes in; each replica takes as many as it is given, whatever the machine has.

    Raises:
        RuntimeError: Ray has left processes behind, which have been killed.
    """
    app(dict(arguments))  # checks the arguments, and sets the environment of the cluster that starts next
    folder = tempfile.mkdtemp(prefix="ray")  # short, because sockets' paths are
    # Ray would otherwise write a token into the home directory.
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex())
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    # Where the tests' own needs are installed, jsonschema imports this, which takes seconds in each of Ray's processes.
    (Path(folder) / "rfc3987_syntax.py").write_text("raise ImportError")
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    started: list[psutil.Process] = []
    try:
        ray.init(
            num_cpus=cpus, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=folder
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy(arguments)
        yield
    finally:
        started = psutil.Process().children(recursive=True)
        if ray.is_initialized():  # otherwise the next call would start a cluster
            serve.shutdown()
        ray.shutdown()
        _, alive = psutil.wait_procs(started, timeout=STOP_SECONDS)
        for process in alive:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    if alive:
        raise RuntimeError(f"Ray has left {len(alive)} processes behind")


def deploy(arguments: Mapping[str, Any], **options: Any) -> None:
    """Deploys the application as `serve deploy` does, or changes it, and returns when it serves.

    Args:
        arguments: of the application.
        options: of its deployment, in place of what the application says; a change of them restarts no replica.

    Raises:
        RuntimeError: it could not be deployed.
    """
    application = ServeApplicationSchema(
        name=APPLICATION,
        import_path=f"{app.__module__}:{app.__name__}",
        args=dict(arguments),
        deployments=[DeploymentSchema(name=APPLICATION, **options)],
    )
    _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))
    while (status := serve.status().applications[APPLICATION]).status != ApplicationStatus.RUNNING:
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(status.message)
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_server", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True, help="of Ray's proxy, on 127.0.0.1")
    parser.add_argument("arguments", nargs="*", metavar="NAME=VALUE", help="of the application")
    given = parser.parse_args()
    arguments = dict(argument.split("=", 1) for argument in given.arguments)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with ray_cluster(given.port, arguments, cpus=psutil.cpu_count() or 1):
        stopping.wait()


if __name__ == "__main__":
    main()
