"""How far each choice may be from float32; `python -m benchmarks.quality` prints the figures."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoint import DEMO
from benchmarks.quality import (
    CALIBRATION,
    CHOICES,
    FLOAT32,
    HELD_OUT,
    Loss,
    converted,
    load,
    log_probabilities,
    loss,
    read_texts,
)
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.loading import LoadedModel


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(DEMO)
    return read_texts(HELD_OUT, tokenizer, 1)


@pytest.fixture(scope="module")
def exact() -> LoadedModel:
    return load(DEMO, FLOAT32)


@pytest.fixture(scope="module")
def expected(exact: LoadedModel, texts: list[list[int]]) -> list[torch.Tensor]:
    return list(log_probabilities(exact, texts))


def judged(name: str, texts: list[list[int]], expected: list[torch.Tensor], scratch: Path) -> Loss:
    choice = next(own for own in CHOICES if own.name == name)
    return loss(choice, texts, expected, load(converted(DEMO, choice, scratch), choice), trained=True)


@pytest.mark.parametrize(
    ("name", "bound"), [("int8", 0.005), ("int4 in 32s, calibrated", 0.04), ("float32, int8 cache", 0.002)]
)
def test_perplexity_stays_within_its_bound(
    texts: list[list[int]], expected: list[torch.Tensor], tmp_path: Path, name: str, bound: float
) -> None:
    own = judged(name, texts, expected, tmp_path)
    assert abs(own.perplexity_change) <= bound
    assert own.kl > 0


def test_calibration_loses_less_than_rounding_to_the_nearest(
    texts: list[list[int]], expected: list[torch.Tensor], tmp_path: Path
) -> None:
    calibrated, rounded = (
        judged(name, texts, expected, tmp_path) for name in ("int4 in 128s, calibrated", "int4 in 128s")
    )
    assert calibrated.kl < rounded.kl


def test_float32_is_as_far_from_the_texts_as_its_log_probabilities_say(
    exact: LoadedModel, texts: list[list[int]], expected: list[torch.Tensor]
) -> None:
    own = loss(FLOAT32, texts, expected, exact, trained=True)
    assert (own.perplexity_change, own.kl, own.top1) == (0.0, 0.0, 1.0)
    surprise = torch.cat([-rows[range(len(rows)), text[1:]] for rows, text in zip(expected, texts, strict=True)])
    assert own.tokens == len(surprise)
    assert own.perplexity == pytest.approx(surprise.mean().exp().item(), rel=1e-5)


def test_texts_are_not_those_of_calibration() -> None:
    words = [{json.loads(line)["text"].split('"')[1] for line in path.open()} for path in (CALIBRATION, HELD_OUT)]
    assert all(words)
    assert not words[0] & words[1]


def test_names_of_choices_are_unique() -> None:
    assert len({own.name for own in CHOICES}) == len(CHOICES)
