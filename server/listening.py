"""The TCP sockets that a server listens on, one for each API worker."""

import contextlib
import socket


class ListenError(OSError):
    """The address cannot be listened on.  One line for the person who gave it."""


def listen(host: str, port: int, count: int) -> list[socket.socket]:
    """Listening TCP sockets on one address: as many as there are API workers.

    With one shared socket, who wakes first takes all connections that wait: of 64 that came at once, one of two workers
    got 60 to 64.  With a socket each (SO_REUSEPORT) the kernel spreads connections by a hash of their addresses: it got
    26 to 38.

    Args:
        host: the address.
        port: 0 for a free one, the same for all.
        count: how many sockets.

    Raises:
        ListenError: the port is taken, or the address is not this machine's.
    """
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listeners: list[socket.socket] = []
            for _ in range(count):
                listener = stack.enter_context(socket.socket(family, kind, protocol))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if listeners:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener.bind(listeners[0].getsockname() if listeners else address)
                if not listeners and count > 1:
                    # Only after it is bound: another server of the same user with this option would not have been
                    # refused.
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listeners.append(listener)
            for listener in listeners:
                listener.listen(2048)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ListenError(
                f"cannot listen on {host}:{port}: {reason}; choose another address with --host and --port"
            ) from None
        stack.pop_all()
    return listeners
