"""The images of a tokenized prompt: where they are for the engine, and what reading them means for an answer.

Knows prompts and token ids; nothing of how images are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from persimmon.model.chat_prompt import ChatPrompt
from persimmon.model.coordinate_tags import CoordinateTags
from persimmon.model.tokenizer import IncrementalDetokenizer, Tokenizer
from persimmon.server.engine.messages import PromptSpan
from persimmon.server.http.errors import ApiError, bad_request


@dataclass(frozen=True, slots=True)
class PromptImages:
    """What a prompt has of images.

    Attributes:
        spans: their rows of patches, with the pixels.  Emptied when the engine has them: answers may take long.
        num_tokens: of all images.
        tags: boxes and points in answers; None where the vocabulary has none.
        scale: of the last image, whose pixels they count.
    """

    spans: list[PromptSpan]
    num_tokens: int
    tags: CoordinateTags | None
    scale: float

    @classmethod
    def of(cls, prompt: object, token_ids: Sequence[int], name: str) -> Self | None:
        """Those of a prompt; None where it has none.

        Args:
            prompt: a conversation, or any other prompt.
            token_ids: all of it.
            name: the field that it comes from.

        Raises:
            ApiError: a text of the prompt spells the placeholder of a patch.
        """
        if not isinstance(prompt, ChatPrompt) or prompt.image_tokens is None or not (images := prompt.images):
            return None
        if token_ids.count(prompt.image_tokens.patch) != sum(image.rows * image.columns for image in images):
            raise bad_request(
                f"Invalid '{name}': a text in it spells the token that stands for a part of an image; leave it out.",
                name,
            )
        spans = [
            PromptSpan(start=start, length=length, content=digest, pixels=pixels)
            for start, length, digest, pixels in prompt.image_rows(token_ids)
        ]
        return cls(spans, prompt.num_image_tokens, prompt.image_tokens.tags, images[-1].scale)

    def detokenizer(self, tokenizer: Tokenizer) -> IncrementalDetokenizer:
        """A detokenizer for one new answer, which writes boxes and points as tags."""
        return tokenizer.detokenizer() if self.tags is None else self.tags.detokenizer(self.scale)


def cut_image(prompt_tokens: int) -> ApiError:
    """A 400 for truncate_prompt_tokens with a prompt that has images and more tokens."""
    return bad_request(
        f"Invalid 'truncate_prompt_tokens': it would cut a prompt with images, which is not supported; the prompt has "
        f"{prompt_tokens} tokens. Please leave it out, or send fewer or smaller images.",
        "truncate_prompt_tokens",
    )
