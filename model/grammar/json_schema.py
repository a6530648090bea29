"""A client's JSON Schema -> a schema in the keywords that the grammar engine enforces, or a sentence why not.

What constrains nothing is left out, references are renumbered, and what cannot be enforced exactly is refused, so that
every answer that ends is valid.  Knows nothing of tokens; the steps are in modules of their own.
"""

import json
from typing import Any

from persimmon.model.grammar.closed_objects import close_objects
from persimmon.model.grammar.json_text import read_json, type_name
from persimmon.model.grammar.one_of import separate_alternatives
from persimmon.model.grammar.schema_reader import SchemaReader
from persimmon.model.grammar.schema_size import check_size
from persimmon.model.grammar_spec import GrammarError

MAX_SCHEMA_BYTES = 65_536
"""Of a schema as JSON, without what says nothing of a value: descriptions, defaults, definitions that are not used."""


def read_schema(text: str, additional_properties: bool = False) -> dict[str, Any]:
    """A JSON Schema of the drafts 4 to 2020-12, reduced to what constrains an answer.

    Args:
        text: the schema as JSON.
        additional_properties: whether objects whose schema lists properties may have others too, where the schema does
            not say.  JSON Schema allows them; models that may add properties seldom stop.

    Raises:
        GrammarError: it is not a valid JSON Schema, asks for something that cannot be enforced, or is too large.
    """
    schema = read_json(text, "the JSON schema")
    if not isinstance(schema, (dict, bool)):
        raise GrammarError(f"the JSON schema is {type_name(schema)}; expected an object")
    try:
        reduced = SchemaReader(schema).read()
        size = len(json.dumps(reduced, ensure_ascii=False, separators=(",", ":")).encode())
        if size > MAX_SCHEMA_BYTES:
            raise GrammarError(
                f"the JSON schema has {size} bytes without its descriptions; at most {MAX_SCHEMA_BYTES} are allowed"
            )
        reduced = close_objects(separate_alternatives(reduced), additional_properties)
        check_size(reduced)
    except RecursionError:
        raise GrammarError("the JSON schema is nested too deeply") from None
    return reduced
