# The server with its demo checkpoint, run by an ordinary user; it holds no other weights.
#
#   docker build -t persimmon .          (or deploy/build_image.sh, which also knows podman and buildah)
#   docker run --rm -p 8000:8000 persimmon
#   docker run --rm -p 8000:8000 -v /path/to/checkpoint:/model:ro persimmon serve --model /model
#
# Every flag of `persimmon serve` is also a variable (-e PERSIMMON_MAX_NUM_SEQS=64).  The root file system may be
# read-only where /tmp is writable: --read-only --tmpfs /tmp.  BASE_IMAGE is any Debian with Python 3.11 or 3.12 or
# with one of them among its packages.  A pip.conf (a mirror, a CPU-only torch) may come as a secret, which leaves
# nothing behind in the image: --secret id=pip.conf,src=pip.conf
#
# With a GPU: docker run --gpus all ... ; kernels are compiled at the first start and kept in /tmp/triton, so a volume
# there makes the next starts shorter.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
RUN python3 -c 'import ensurepip' 2>/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*)

FROM base AS build
WORKDIR /source
ENV PATH=/opt/persimmon/bin:$PATH PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/persimmon
# The dependencies are a layer of their own: a change of code does not fetch torch again.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip.conf \
    python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > requirements.txt && pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY kernels kernels
COPY model model
COPY server server
RUN --mount=type=secret,id=pip.conf pip install --no-deps .

FROM base
RUN useradd --uid 10001 --create-home persimmon
COPY --from=build /opt/persimmon /opt/persimmon
# A torch for GPUs brings Triton, which needs a C compiler and Python's headers to launch its kernels.
RUN if ls -d /opt/persimmon/lib/python3*/site-packages/triton >/dev/null 2>&1; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
        && if [ ! -e "$(/opt/persimmon/bin/python -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')/Python.h" ]; \
           then apt-get install -y --no-install-recommends python3-dev; fi \
        && rm -rf /var/lib/apt/lists/*; fi
USER 10001
WORKDIR /home/persimmon
ENV PATH=/opt/persimmon/bin:$PATH PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/tmp/triton PERSIMMON_HOST=0.0.0.0 PERSIMMON_PORT=8000
EXPOSE 8000
# Loading a large checkpoint takes minutes; a failed check counts only after the start period.
HEALTHCHECK --start-period=15m --interval=10s --timeout=6s CMD ["python", "-c", \
    "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PERSIMMON_PORT']), timeout=5); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["persimmon"]
CMD ["serve"]
