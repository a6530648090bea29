"""How probable a token was: the record that travels from the model to the client.  Plain data; knows no tensor."""

from dataclasses import dataclass


# Not frozen, because that makes each three times as slow to make, and a step makes one a token.
@dataclass(slots=True, kw_only=True)
class TokenLogprobs:
    """How probable a token was under the network's own logits, before any sampling parameter changed them.

    Attributes:
        token_id: the token.
        logprob: its natural log-probability.
        top_ids: the most probable tokens in its place, best first, the lowest id first among equals.
        top_logprobs: theirs.
    """

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]
