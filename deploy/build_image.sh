#!/usr/bin/env bash
# Builds the image with docker, podman or buildah, whichever is installed; deploy/smoke_test.sh then tries it.
#
#   deploy/build_image.sh [TAG [FLAG OF THE BUILDER]...]
#
# TAG is `persimmon` if not given.  Variables: BUILDER names one of the three; BASE_IMAGE is any Debian with Python 3.11
# or 3.12; TORCH_INDEX is the address of PyTorch's CPU wheels, for an image without CUDA; PIP_CONFIG_FILE is a pip.conf
# only for the build (a mirror); the image keeps nothing of it.
set -euo pipefail

tag=${1:-persimmon}
flags=("${@:2}")
pip_config=${PIP_CONFIG_FILE:+$(realpath "$PIP_CONFIG_FILE")}
cd "$(dirname "$0")/.."
for argument in BASE_IMAGE TORCH_INDEX; do
    [[ -z ${!argument:-} ]] || flags+=(--build-arg "$argument=${!argument}")
done
[[ -z $pip_config ]] || flags+=(--secret "id=pip.conf,src=$pip_config")
flags+=(--build-arg "VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)")
flags+=(--build-arg "REVISION=$(git describe --always --dirty --abbrev=40 2>/dev/null || true)")

builder=${BUILDER:-}
for candidate in docker podman buildah; do
    [[ -n $builder ]] || ! command -v "$candidate" >/dev/null || builder=$candidate
done
if [[ -z $builder ]]; then
    echo "build_image.sh: install docker, podman or buildah, or name one: BUILDER=/path/to/podman" >&2
    exit 2
fi
# OCI's own image format has no HEALTHCHECK; docker's has, and docker knows no other.
[[ $(basename "$builder") == docker ]] || flags+=(--format docker)

exec "$builder" build --tag "$tag" "${flags[@]}" .
