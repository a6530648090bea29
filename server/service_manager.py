"""Tells systemd, or whatever else started the server, that it serves or stops (sd_notify(3))."""

import contextlib
import os
import socket
from typing import Literal


def notify(state: Literal["READY=1", "STOPPING=1"]) -> None:
    """Sends a state to the socket that NOTIFY_SOCKET names; without one, does nothing.

    Args:
        state: in sd_notify's words.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    # A manager that does not listen changes nothing for the server's clients.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setblocking(False)
        manager.sendto(state.encode(), address)
