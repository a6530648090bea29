#!/bin/sh
# ray 2.60.0, Ray Serve: a stream is computed to its end, and kept in memory, however slowly its client reads.
#
# Guess, before running it: as with uvicorn by itself, `await send(...)` in an ASGI application waits while the client
# does not read, so of a stream of 256 MiB only what fits into the buffers of sockets is made: a few MiB.
#
# Seen: with a client that reads the first bytes and then nothing, uvicorn makes 4 MiB and waits; behind Ray's proxy all
# 256 MiB are made, and lie in the memory of replica and proxy: `send` only puts a message into a queue.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install 'ray[serve]==2.60.0' psutil==7.2.2
cat > "$folder/slow.py" <<'PYTHON'
import socket
import sys
import threading
import time

import psutil
import ray
import uvicorn
from fastapi import FastAPI
from ray import serve
from starlette.responses import StreamingResponse

MIB = 1 << 20
PARTS = 256
app = FastAPI()
made = []


async def parts():
    for _ in range(PARTS):
        yield b"x" * MIB
        made.append(1)


@app.get("/stream")
async def stream():
    return StreamingResponse(parts())


@app.get("/made")
async def count():
    return len(made)


@serve.deployment
@serve.ingress(app)
class Streaming:
    pass


def answer(port, path, bytes_read=0):
    """A connection that has got the beginning of an answer."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
    if bytes_read:
        connection.recv(bytes_read)
        return connection
    with connection:
        return b"".join(iter(lambda: connection.recv(4096), b""))


def made_for_a_client_that_does_not_read(port):
    connection = answer(port, "/stream", 100)
    counts = [-1, 0]
    while counts[-1] != counts[-2] and counts[-1] < PARTS:
        time.sleep(3)
        counts.append(int(answer(port, "/made").splitlines()[-1]))
    held = {
        process.name(): process.memory_info().rss // MIB for process in psutil.Process().children(recursive=True)
    }
    connection.close()
    return counts[-1], {name: held[name] for name in sorted(held, key=held.get)[-2:]}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


port = free_port()
server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    time.sleep(0.1)
by_uvicorn, _ = made_for_a_client_that_does_not_read(port)
server.should_exit = True

port = free_port()
ray.init(include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(Streaming.bind())
by_ray, held = made_for_a_client_that_does_not_read(port)
serve.shutdown()
ray.shutdown()
print("ray", ray.__version__)
print(f"  uvicorn: {by_uvicorn} of {PARTS} MiB made for a client that reads nothing")
print(f"  Ray Serve: {by_ray} of {PARTS} MiB; then hold most: {held} MiB")
raise SystemExit(not (by_uvicorn < PARTS // 4 and by_ray == PARTS))
PYTHON
RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 "$folder/venv/bin/python" "$folder/slow.py" "$folder/ray"
