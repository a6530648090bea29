#!/bin/sh
# llguidance 1.9.1 allows \u escapes in a JSON string for control characters only: "\u00e9" is refused where "é" is allowed.
#
# Guess, before running it: in {"type": "string"} with a length, an escaped surrogate pair is allowed and counts as one
# character, as the character itself does.
# RFC 8259, 7: any character may be escaped.
#
# Seen: "\ud834\udd1e", "\u00e9", "\u0061" and "\/" are refused; "\u0001", "\u000a", "\u007f"
# and "\n" are allowed.  So a model trained on JSON as Python's json.dumps writes it by default (all beyond ASCII escaped) cannot
# keep to that form under a schema.
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


refused = [r'"\ud834\udd1e"', r'"\u00e9"', r'"\u0061"', r'"\/"']
allowed = ['"é"', '"𝄞"', '"/"', r'"\u0001"', r'"\u000a"', r'"\u007f"', r'"\n"']
seen = {text: accepts({"type": "string"}, text) for text in refused + allowed}
print("llguidance", version("llguidance"))
for text, one in seen.items():
    print(f"  {ascii(text)}: {'allowed' if one else 'refused'}")
pair = accepts({"type": "string", "maxLength": 1}, '"𝄞"')
print(f"  the same character unescaped, with maxLength 1: {'allowed' if pair else 'refused'}")
raise SystemExit(not pair or any(seen[text] for text in refused) or not all(seen[text] for text in allowed))
PYTHON
