"""What the child processes of a server run.  Each function imports what it needs only when it runs."""

import os
from typing import TYPE_CHECKING

from persimmon.server.settings import ENVIRONMENT_PREFIX

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

    from persimmon.server.engine_places import EnginePlace
    from persimmon.server.http.middleware.credentials import Credentials
    from persimmon.server.settings.engine import EngineSettings


def engine_main(settings: "EngineSettings", folder: "Path", place: "EnginePlace", report: "Connection") -> None:
    """Entry point of the engine process; see `persimmon.server.engine.process.run_engine` for its arguments."""
    # Its settings are among the arguments; the variables may hold API keys.
    for name in [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)]:
        del os.environ[name]
    # Read when torch is first imported.  Idle OpenMP threads spin for milliseconds by default, on cores that the API
    # worker or another program may need, and every parallel region then waits for a thread that is not running.
    # Some microseconds bridge the gap between two operations just as well.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    place.share.take()
    from persimmon.server.engine.process import run_engine

    run_engine(settings, folder, place, report)


def worker_main(credentials: "Credentials", *args: object) -> None:
    """Entry point of an API worker; see `persimmon.server.http.worker.run_api_worker` for its arguments.

    Args:
        keys: the supervisor's; its keys when the worker is started.
        args: the others.
    """
    # numpy would start a thread for each core, for matrices that an API worker never multiplies.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from persimmon.server.http.worker import run_api_worker

    run_api_worker(*args, credentials=credentials)  # type: ignore[arg-type]
