#!/usr/bin/env bash
# Runs an image as the strictest hosts do (a user id that it does not know, nothing writable but /tmp, no network, no
# capabilities), asks it how it is and one chat turn, and says what it weighs.
#
#   deploy/smoke_test.sh [IMAGE [FLAG OF `docker run`]...]
#
# IMAGE is `persimmon` if not given.  RUNNER names docker or podman if both are there.
set -euo pipefail

image=${1:-persimmon}
runner=${RUNNER:-}
for candidate in docker podman; do
    [[ -n $runner ]] || ! command -v "$candidate" >/dev/null || runner=$candidate
done
if [[ -z $runner ]]; then
    echo "smoke_test.sh: install docker or podman, or name one: RUNNER=/path/to/podman" >&2
    exit 2
fi

started=$(date +%s.%N)
container=$("$runner" run --detach --user 12345:0 --read-only --tmpfs /tmp:exec --network none --cap-drop ALL \
    --security-opt no-new-privileges "${@:2}" "$image")
end() {
    code=$?
    [[ $code == 0 ]] || "$runner" logs "$container" >&2
    "$runner" rm --force "$container" >/dev/null
    exit $code
}
trap end EXIT

"$runner" exec --interactive --env "STARTED=$started" "$container" python - <<'PYTHON'
import http.client, json, os, sys, time

def ask(method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ["PERSIMMON_PORT"]), timeout=60)
    connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())

def health():
    try:
        return ask("GET", "/health")[0]
    except OSError:
        return 0

deadline = time.monotonic() + 300
while health() != 200:
    if time.monotonic() > deadline:
        sys.exit("not healthy after 300 s")
    time.sleep(0.1)
print(f"healthy {time.time() - float(os.environ['STARTED']):.1f} s after `run`, as user {os.getuid()}")

from persimmon.kernels.cpu import library
print("C kernels for this processor:", ", ".join(library.builds()) or "none")
messages = [{"role": "user", "content": "What is a persimmon?"}]
status, answer = ask("POST", "/v1/chat/completions", {"messages": messages, "temperature": 0})
if status != 200 or not answer["choices"][0]["message"]["content"]:
    sys.exit(f"a chat turn was answered with {status}: {answer}")
print("a chat turn:", answer["choices"][0]["message"]["content"])
PYTHON

case $(basename "$runner") in
    podman) "$runner" healthcheck run "$container" ;;
    *) until [[ $("$runner" inspect --format '{{.State.Health.Status}}' "$container") == healthy ]]; do sleep 1; done ;;
esac
echo "HEALTHCHECK: healthy"
"$runner" stop --time 60 "$container" >/dev/null
code=$("$runner" inspect --format '{{.State.ExitCode}}' "$container")
[[ $code == 0 ]] || { echo "smoke_test.sh: exit code $code after SIGTERM" >&2; exit 1; }
echo "ended with exit code 0 after SIGTERM"
"$runner" image inspect --format '{{.Size}}' "$image" | awk '{ printf "size: %.2f GB uncompressed\n", $1 / 1e9 }'
