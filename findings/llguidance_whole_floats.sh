#!/bin/sh
# llguidance 1.9.1 writes a whole number in "enum" or "const" without its fraction: {"enum": [1.0]} allows 1, and not 1.0.
#
# Guess, before running it: {"enum": [1.0]} accepts the text 1.0, as the schema has it, and not 1.
# JSON Schema takes both texts for the same number, so either answer is valid; what surprises is which of the two a model is
# held to.
#
# Seen: 1.0, 3.0 in "const" and 1e2 are allowed as 1, 3 and 100 only, also inside an object; 2.50 as 2.5 only.  A fine-tuned
# model that writes 1.0 is forced off its own spelling.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install llguidance==1.9.1
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper


class Bytes:
    """A tokenizer whose tokens are bytes."""

    tokens = [bytes([byte]) for byte in range(256)] + [b"<eos>"]
    eos_token_id = 256
    bos_token_id = None

    def __call__(self, text):
        return list(text)


tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))


def accepts(schema, text):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    return all(map(matcher.consume_token, text.encode())) and matcher.is_accepting()


cases = [
    ({"enum": [1.0]}, "1", "1.0"),
    ({"const": 3.0}, "3", "3.0"),
    ({"type": "number", "const": 3.0}, "3", "3.0"),
    ({"enum": [1e2]}, "100", "100.0"),
    ({"enum": [2.50]}, "2.5", "2.50"),
    ({"const": {"a": 1.0}}, '{"a":1}', '{"a":1.0}'),
]
seen = [(accepts(schema, first), accepts(schema, second)) for schema, first, second in cases]
print("llguidance", version("llguidance"))
for (schema, first, second), (one, other) in zip(cases, seen):
    print(f"  {json.dumps(schema)}: {first} {'allowed' if one else 'refused'}, {second} {'allowed' if other else 'refused'}")
raise SystemExit(seen != [(True, False)] * len(cases))
PYTHON
