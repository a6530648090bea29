"""What Schemathesis does to each request before it sends it, so that thousands of them end in minutes.

Valid requests for long answers become requests for short ones.  What the document cannot say is mended, since hardly a
request would come further otherwise: an invented model becomes the served one, and a conversation that ends with the
model's own words gets a last word of the user's.  Everything else goes as it was generated.
"""

import math
from typing import Any

import schemathesis

LIMITS = {"max_tokens": 4, "max_completion_tokens": 4, "tokens_to_generate": 4, "n": 2, "best_of": 2}
"""The largest number of each field that is left as it is; those that the server would refuse are left too."""

_REFUSED = {"max_tokens": 2048, "max_completion_tokens": 2048, "tokens_to_generate": math.inf, "n": 129, "best_of": 129}
_DEFAULTS = {"/v1/chat/completions": {"max_tokens": 4}, "/api": {"tokens_to_generate": 4}}


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, **kwargs: Any) -> None:
    """Changes a request in place."""
    if not isinstance(case.body, dict):
        return
    body: dict[str, Any] = _DEFAULTS.get(case.operation.path, {}) | case.body
    if isinstance(body.get("model"), str):
        del body["model"]
    match body.get("messages"):
        case [*_, {"role": "system" | "developer" | "assistant"}] as messages:
            body["messages"] = [*messages, {"role": "user", "content": "Hello"}]
    for name, limit in LIMITS.items():
        if type(value := body.get(name)) is int and limit < value < _REFUSED[name]:
            body[name] = limit
    case.body = body
