#!/usr/bin/env bash
# Builds the image with docker, podman or buildah, whichever is installed.
#
#   deploy/build_image.sh [TAG [FLAG OF THE BUILDER]...]
#
# TAG is `persimmon` if not given.  Variables: BUILDER names one of the three; BASE_IMAGE is any Debian with Python 3.11
# or 3.12; PIP_CONFIG_FILE is a pip.conf for the build alone (a mirror, a CPU-only torch), of which the image keeps
# nothing.
set -euo pipefail

tag=${1:-persimmon}
flags=("${@:2}")
[[ -z ${BASE_IMAGE:-} ]] || flags+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
[[ -z ${PIP_CONFIG_FILE:-} ]] || flags+=(--secret "id=pip.conf,src=$(realpath "$PIP_CONFIG_FILE")")

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

cd "$(dirname "$0")/.."
exec "$builder" build --tag "$tag" "${flags[@]}" .
