"""What every child process of the server does first."""

import os
import signal
import threading
from multiprocessing import connection, parent_process


def follow_supervisor() -> None:
    """Leaves Ctrl-C to the supervisor, and ends this process when the supervisor goes, however it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="follow-supervisor", daemon=True).start()
