#!/usr/bin/env bash
# jsonschema 4.26.0: the format relative-json-pointer and numbers that have a 0 before another digit.
#
# Guess: "105" and "120/a" are both valid relative JSON pointers (draft-bhutton-relative-json-pointer-00, section 3: a
# non-negative integer without leading zeros), and the checker takes both.
# Behaviour: "105" is refused, since each digit after a 0 counts as one after a leading zero.
# Output seen:
#   120/a: valid
#   105: refused
# Exits with 1 when this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jsonschema==4.26.0 jsonpointer==3.12
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from jsonschema import Draft202012Validator

checker = Draft202012Validator.FORMAT_CHECKER
results = {text: checker.conforms(text, "relative-json-pointer") for text in ("120/a", "105")}
for text, valid in results.items():
    print(f"{text}: {'valid' if valid else 'refused'}")
sys.exit(0 if results == {"120/a": True, "105": False} else 1)
PYTHON
