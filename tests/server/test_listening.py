import selectors
import socket

import pytest

from persimmon.server.listening import ListenError, listen


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_an_address_that_is_listened_on_is_refused_whatever_the_number_of_workers(first, second):
    listeners = listen("127.0.0.1", 0, first)
    port = listeners[0].getsockname()[1]
    with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        listen("127.0.0.1", port, second)
    for listener in listeners:
        listener.close()
    for listener in listen("127.0.0.1", port, second):
        listener.close()


def test_connections_to_one_port_reach_every_socket():
    listeners = listen("127.0.0.1", 0, 3)
    (address,) = {listener.getsockname() for listener in listeners}
    reached: set[socket.socket] = set()
    with selectors.DefaultSelector() as selector:
        for listener in listeners:
            selector.register(listener, selectors.EVENT_READ, listener)
        while len(reached) < len(listeners):
            with socket.create_connection(address):
                for key, _ in selector.select():
                    key.data.accept()[0].close()
                    reached.add(key.data)
    for listener in listeners:
        listener.close()
