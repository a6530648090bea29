"""Image patches of prompts: checked when they come, bounded in memory, and found for the steps that compute them.

Knows spans of token ids and their pixels, and neither images nor the network.
"""

import weakref

import numpy as np

from persimmon.model.config import VisionConfig
from persimmon.model.patches import PatchSpan
from persimmon.server.engine.messages import PromptSpan
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_runner import NoRoomError

MAX_PIXEL_BYTES = 512 << 20
"""Pixels that all sequences may hold together; those of 86 images of 1080 x 1920 with Fuyu-8B's patches."""


def held_bytes(vision: VisionConfig | None, max_model_len: int) -> int:
    """What the pixels of all sequences take at most, in bytes.

    Args:
        vision: how the network reads images; None where it does not.
        max_model_len: tokens of a sequence, at most.
    """
    return 0 if vision is None else max(MAX_PIXEL_BYTES, max_model_len * vision.patch_numbers)


class _Spans(list[PromptSpan]):
    """The spans of a sequence and its forks, which can be referenced weakly."""


class ImageSpans:
    """The patches of the sequences that an engine has, waiting or running.

    A sequence keeps its pixels until it ends, because after a preemption its prompt is computed again.
    """

    def __init__(self) -> None:
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes of the pixels of all sequences."""
        return self._held

    def admit(self, sequence: Sequence, vision: VisionConfig | None) -> None:
        """Checks the patches of a new sequence, and counts their pixels until it and its forks have ended.

        Args:
            sequence: a sequence with spans.
            vision: how the network reads images; None where it does not.

        Raises:
            NoRoomError: sequences hold too many pixels already.
            ValueError: the spans are not those of image patches, or patches have no span.
        """
        if vision is None:
            raise ValueError("this model reads text only; leave out what stands for anything else in the prompt")
        image_token_id = vision.image_token_id
        for span in sequence.spans:
            expected = span.length * vision.patch_numbers
            if len(span.pixels) != expected:
                raise ValueError(
                    f"the {span.length} image patches from token {span.start} on have {len(span.pixels)} bytes of "
                    f"pixels; expected {expected}, {vision.patch_numbers} for each"
                )
            token_ids = sequence.token_ids[span.start : span.start + span.length]
            if token_ids.count(image_token_id) != span.length:
                raise ValueError(
                    f"the {span.length} image patches from token {span.start} on have other token ids than "
                    f"{image_token_id}, which stands for a patch"
                )
        patches = sum(span.length for span in sequence.spans)
        if (found := sequence.token_ids.count(image_token_id)) != patches:
            raise ValueError(
                f"the prompt has token id {image_token_id} {found} times, and {patches} image patches; with images it "
                f"may stand for patches only"
            )
        self._hold(sequence, patches * vision.patch_numbers)

    def _hold(self, sequence: Sequence, size: int) -> None:
        if self._held and self._held + size > MAX_PIXEL_BYTES:
            raise NoRoomError(
                f"The images of running and waiting requests take {self._held >> 20} MiB, and this one's "
                f"{size >> 20} MiB more would exceed {MAX_PIXEL_BYTES >> 20} MiB."
            )
        self._held += size
        spans = _Spans(sequence.spans)
        weakref.finalize(spans, self._release, size).atexit = False
        for own in sequence.family:
            own.spans = spans

    def _release(self, size: int) -> None:
        self._held -= size


def patches_within(sequence: Sequence, start: int, end: int) -> list[PatchSpan]:
    """The patches among some of a sequence's tokens, as views of its pixels."""
    return [
        PatchSpan(
            start=max(span.start - start, 0),
            pixels=np.frombuffer(span.pixels, np.uint8).reshape(span.length, -1)[
                max(start - span.start, 0) : end - span.start
            ],
        )
        for span in sequence.spans_within(start, end)
    ]
