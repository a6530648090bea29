#!/usr/bin/env bash
# llguidance 1.9.1: the bounds of a 64-bit integer in a JSON Schema.
#
# Guess: minimum -2^63 compiles, with any maximum of 64 bits.
# Behaviour: the schema is refused ("Failed to generate regex for integer range"), although it is valid; a minimum of
# -2^63 + 1024, the next double, compiles.
# Output seen:
#   int64: refused: Failed to generate regex for integer range: min=Some(-9223372036854775808), max=Some(9223372036854774784)
#   int64, 1024 less: compiles
# Exits with 1 when this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper


class Bytes:
    tokens = [bytes([byte]) for byte in range(256)] + [b""]
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))


def follow(schema):
    return LLMatcher(tokenizer, json.dumps({"grammars": [{"json_schema": schema}]}), log_level=0)


def first_line(matcher):
    return matcher.get_error().split("\n")[0] if matcher.is_error() else ""


int64 = follow({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1024})
less = follow({"type": "integer", "minimum": -(2**63) + 1024, "maximum": 2**63 - 1024})
print("int64:", f"refused: {first_line(int64)}" if int64.is_error() else "compiles")
print("int64, 1024 less:", f"refused: {first_line(less)}" if less.is_error() else "compiles")
sys.exit(0 if int64.is_error() and not less.is_error() else 1)
PYTHON
