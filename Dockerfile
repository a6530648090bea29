# The server with its demo checkpoint, run by any user on a root that may be read-only; it holds no other weights.
#
#   docker build -t persimmon .          (or deploy/build_image.sh, which also knows podman and buildah)
#   docker run --rm -p 8000:8000 persimmon
#   docker run --rm -p 8000:8000 --user 12345:0 --read-only --tmpfs /tmp:exec persimmon
#   docker run --rm -p 8000:8000 -v /path/to/checkpoint:/model:ro persimmon serve --model /model
#
# Every flag of `persimmon serve` is also a variable (-e PERSIMMON_MAX_NUM_SEQS=64).  /tmp is all that the server writes
# to.  Docker mounts a tmpfs noexec by default, where kernels that Triton has compiled cannot be loaded: hence `exec`.
#
# Which torch pip finds decides what the image is for.  PyPI's is the CUDA build: the image then also has the C compiler
# that Triton needs when it runs.  A CPU image, a fifth of the size, needs the address of PyTorch's CPU wheels (the one
# that PyTorch's own page of installation commands gives): --build-arg TORCH_INDEX=ADDRESS.  A pip.conf (a mirror) may
# come as a secret, which leaves nothing behind in the image: --secret id=pip.conf,src=pip.conf
#
# BASE_IMAGE is any Debian with Python 3.11 or 3.12, or with one of them among its packages.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
RUN python3 -c 'import ensurepip' 2>/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/* /var/cache/apt/*)

FROM base AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
WORKDIR /source
ENV PATH=/opt/persimmon/bin:$PATH PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/persimmon
# The dependencies are a layer of their own: a change of code does not fetch torch again.
COPY pyproject.toml constraints.txt ./
ARG TORCH_INDEX=
RUN --mount=type=secret,id=pip.conf \
    python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > requirements.txt \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt --requirement requirements.txt
# What no server reads: torch's headers, static libraries and test programs, other packages' tests, symbol tables.
# Only torch's own libraries are stripped, because strip damages those that auditwheel has patched, like NumPy's.
RUN cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && rm -rf torch/include torch/test torch/bin/test_* torch/bin/*Test torch/bin/protoc* torch/bin/upgrader_models \
        torch/lib/libtorchbind_test.so torch/lib/libjitbackend_test.so torch/lib/libbackend_with_compiler.so \
    && find torch -name '*.a' -delete \
    && find mpmath networkx numpy sympy -type d -name tests -prune -exec rm -rf {} + \
    && strip --strip-unneeded torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so torch/lib/libc10.so
COPY README.md LICENSE setup.py ./
COPY kernels kernels
COPY model model
COPY server server
COPY persimmon persimmon
# An installation without the C kernels works, slowly; an image must have them.
RUN --mount=type=secret,id=pip.conf pip install --no-deps . && cd / && python -c 'import platform, sys; \
from persimmon.kernels.cpu.library import BUILDS, library_path; \
missing = [build for build in BUILDS if not library_path(build).exists()]; \
sys.exit(f"C kernels that gcc did not compile: {missing}" if missing and platform.machine() == "x86_64" else 0)' \
    && pip uninstall --yes pip

FROM base
COPY --from=build /opt/persimmon /opt/persimmon
# Triton compiles what launches its kernels, for which it needs a C compiler and Python's headers.
RUN if ls -d /opt/persimmon/lib/python3*/site-packages/triton >/dev/null 2>&1; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
        && if [ ! -e "$(/opt/persimmon/bin/python -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')/Python.h" ]; \
           then apt-get install -y --no-install-recommends python3-dev; fi \
        && rm -rf /var/lib/apt/lists/* /var/cache/apt/*; fi
ARG BASE_IMAGE
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="Persimmon server" \
    org.opencontainers.image.description="A high-throughput inference server for Adept's Persimmon models" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE_IMAGE}" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
# USER is the name that libraries ask for where the user's id has no entry in /etc/passwd.
ENV PATH=/opt/persimmon/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp USER=persimmon TRITON_CACHE_DIR=/tmp/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility PERSIMMON_HOST=0.0.0.0 PERSIMMON_PORT=8000
USER 10001:0
WORKDIR /
EXPOSE 8000
# Loading a large checkpoint takes minutes; a failed check counts only after the start period.  Whose name is in a
# certificate does not matter to who asks the machine that he is on.
HEALTHCHECK --start-period=15m --interval=10s --timeout=6s CMD ["python", "-c", "\
import http.client, os, ssl, sys; \
address = ('127.0.0.1', int(os.environ['PERSIMMON_PORT'])); \
plain = not os.environ.get('PERSIMMON_SSL_CERTFILE'); \
connection = http.client.HTTPConnection(*address, timeout=5) if plain else \
http.client.HTTPSConnection(*address, timeout=5, context=ssl._create_unverified_context()); \
connection.request('GET', '/health'); sys.exit(connection.getresponse().status != 200)"]
ENTRYPOINT ["persimmon"]
CMD ["serve"]
