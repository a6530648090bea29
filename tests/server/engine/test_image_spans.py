"""Image patches of prompts as the engine takes them: checked, bounded in memory, and kept until a sequence ends."""

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from persimmon.model.config import VisionConfig
from persimmon.server.engine import image_spans
from persimmon.server.engine.image_spans import ImageSpans, held_bytes, patches_within
from persimmon.server.engine.messages import PromptSpan
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_runner import NoRoomError

SPEAKER = 5
VISION = VisionConfig(patch_size=2, image_token_id=SPEAKER)
NUMBERS = 12


def row(start: int, length: int) -> PromptSpan:
    pixels = np.arange(start * NUMBERS, (start + length) * NUMBERS, dtype=np.uint8).tobytes()
    return PromptSpan(start=start, length=length, content=b"row", pixels=pixels)


def sequence(*rows: PromptSpan, length: int = 12, forks: int = 0) -> Sequence:
    token_ids = [1] * length
    for own in rows:
        token_ids[own.start : own.end] = [SPEAKER] * own.length
    samples = [Sequence(number, list(token_ids), 4, spans=rows, sample_index=number) for number in range(1 + forks)]
    return Sequence(0, token_ids, 4, spans=rows, forks=samples[1:])


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Pixels go with the last reference, without the collector, which an engine runs seldom."""
    gc.disable()
    yield
    gc.enable()


def test_a_text_model_takes_none() -> None:
    with pytest.raises(ValueError, match="reads text only"):
        ImageSpans().admit(sequence(row(1, 2)), None)


def test_patches_need_their_pixels() -> None:
    with pytest.raises(ValueError, match="the 2 image patches from token 1 on have 3 bytes of pixels; expected 24, 12"):
        ImageSpans().admit(sequence(PromptSpan(start=1, length=2, content=b"", pixels=b"abc")), VISION)


def test_patches_need_the_token_that_stands_for_them() -> None:
    wrong = sequence(row(1, 3))
    wrong.token_ids[2] = 7
    with pytest.raises(ValueError, match="the 3 image patches from token 1 on have other token ids than 5"):
        ImageSpans().admit(wrong, VISION)


def test_that_token_stands_for_patches_only() -> None:
    wrong = sequence(row(1, 3))
    wrong.token_ids[9] = SPEAKER
    with pytest.raises(ValueError, match="the prompt has token id 5 4 times, and 3 image patches"):
        ImageSpans().admit(wrong, VISION)


@pytest.mark.usefixtures("no_collector")
def test_pixels_are_counted_until_the_last_sample_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_spans, "MAX_PIXEL_BYTES", 5 * NUMBERS)
    images = ImageSpans()
    first = sequence(row(1, 2), row(4, 1), forks=2)
    images.admit(first, VISION)
    assert images.held == 3 * NUMBERS
    with pytest.raises(NoRoomError, match="take 0 MiB"):
        images.admit(sequence(row(0, 3)), VISION)
    second = sequence(row(0, 2))
    images.admit(second, VISION)
    assert images.held == 5 * NUMBERS
    # As where forks begin.
    fork, other = first.forks
    fork.leader = other.leader = None
    first.forks, first, other = [], second, second
    assert images.held == 5 * NUMBERS
    del fork
    assert images.held == 2 * NUMBERS
    del first, other, second
    assert images.held == 0


def test_a_single_sequence_may_have_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_spans, "MAX_PIXEL_BYTES", 2 * NUMBERS)
    images = ImageSpans()
    images.admit(large := sequence(row(1, 9)), VISION)
    assert images.held == 9 * NUMBERS == len(large.spans[0].pixels)
    # So the memory that is planned holds the longest sequence.
    assert held_bytes(VISION, 12) == 12 * NUMBERS
    assert held_bytes(VISION, 1) == 2 * NUMBERS
    assert held_bytes(None, 12) == 0


def test_a_step_gets_the_patches_of_its_tokens() -> None:
    own = sequence(row(1, 4), row(6, 2), row(8, 3), length=12)
    for start in range(12):
        for end in range(start + 1, 13):
            found: dict[int, bytes] = {}
            for span in patches_within(own, start, end):
                assert span.pixels.shape == (len(span.pixels), NUMBERS)
                found |= {start + span.start + place: pixels.tobytes() for place, pixels in enumerate(span.pixels)}
            inside = [place for span in own.spans for place in range(span.start, span.end) if start <= place < end]
            assert found == {place: row(place, 1).pixels for place in inside}
