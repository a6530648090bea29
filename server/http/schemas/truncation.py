"""Prompts that may be shortened to fit: the fields that say so, under vLLM's names and with its meaning.

Knows token ids; nothing of texts or of how many tokens the model reads.
"""

from typing import Literal

from pydantic import Field

from persimmon.server.http.errors import bad_request
from persimmon.server.http.schemas.request_object import RequestObject

Side = Literal["left", "right"]
"""Where tokens are cut off."""


class TruncatingRequest(RequestObject):
    """A request whose prompts may be shortened."""

    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        description="Truncate each prompt to this number of tokens; -1 keeps as many as fit next to max_tokens (or "
        "one token, if that is not given). Default: a prompt that is too long is an error.",
    )
    truncation_side: Side | None = Field(
        None,
        description="Which side to truncate: left keeps the last tokens, right the first ones. Default: left, after a "
        "text's beginning-of-sequence token; for embeddings and classification right.",
    )

    def shortened(self, token_ids: list[int], most: int, default: Side, begin: int = 0) -> list[int]:
        """A prompt as the model is to read it.

        Args:
            token_ids: all of the prompt.
            most: tokens of a prompt that the model reads.
            default: where to cut if the request does not say it.
            begin: first tokens that are kept where the request does not say where to cut.

        Raises:
            ApiError: the request keeps nothing, or more than the model reads.
        """
        keep = self.truncate_prompt_tokens
        if keep is None:
            return token_ids
        if keep == 0 or keep > most:
            raise bad_request(
                f"Invalid 'truncate_prompt_tokens': it is {keep}; give 1 to {most}, or -1 for as many as fit.",
                "truncate_prompt_tokens",
            )
        keep = most if keep < 0 else keep
        if len(token_ids) <= keep:
            return token_ids
        if (self.truncation_side or default) == "right":
            return token_ids[:keep]
        begin = 0 if self.truncation_side else min(begin, keep)
        return token_ids[:begin] + token_ids[len(token_ids) - (keep - begin) :]
