#!/bin/sh
# httptools 0.9.0 ends a request that offers an upgrade at its headers, and leaves its body in the stream.
#
# Guess, before running it: for a POST with `Connection: Upgrade`, `Upgrade: h2c` and a Content-Length, on_body gets the
# body and on_message_complete follows; then HttpParserUpgrade is raised, for what comes after the request.
# RFC 9110, 7.8: a server may ignore an Upgrade header; the request with its body stands.
#
# Seen: on_message_complete comes directly after on_headers_complete, and on_body never.  HttpParserUpgrade is raised with
# the offset of the body.  Fed on, the same parser reads the body as the next request's first line and refuses it.  So a
# server that ignores the exception loses the body of every such POST, which Java's HttpClient sends by default.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install httptools==0.9.0
"$folder/venv/bin/python" - <<'PYTHON'
import httptools

seen = []


class Request:
    def on_headers_complete(self):
        seen.append("headers complete")

    def on_body(self, body):
        seen.append(f"body {body!r}")

    def on_message_complete(self):
        seen.append("message complete")


head = (
    b"POST / HTTP/1.1\r\nHost: server\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAAA\r\nContent-Length: 4\r\n\r\n"
)
parser = httptools.HttpRequestParser(Request())
try:
    parser.feed_data(head + b"body")
except httptools.HttpParserUpgrade as upgrade:
    seen.append(f"upgrade at {upgrade.args[0] - len(head)} bytes after the headers")
try:
    parser.feed_data(b"body")
except httptools.HttpParserError as error:
    seen.append(f"then {type(error).__name__}: {error}")
print("httptools", httptools.__version__, *seen, sep="\n  ")
expected = [
    "headers complete",
    "message complete",
    "upgrade at 0 bytes after the headers",
    "then HttpParserInvalidMethodError: Invalid method encountered",
]
raise SystemExit(seen != expected)
PYTHON
