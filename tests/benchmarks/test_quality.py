"""How far each choice may be from float32; `python -m benchmarks.quality` prints the figures."""

import pytest
import torch

from benchmarks.checkpoint import DEMO
from benchmarks.quality import CHOICES, FLOAT32, TEXTS, load, log_probabilities, loss, read_texts
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.loading import LoadedModel

FEW = 16
"""Texts of each file, some 45 tokens each."""


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(DEMO)
    return [own for name in ("familiar", "unseen") for own in read_texts(TEXTS / f"{name}.jsonl", tokenizer, 1)[:FEW]]


@pytest.fixture(scope="module")
def exact() -> LoadedModel:
    return load(DEMO, FLOAT32)


@pytest.fixture(scope="module")
def expected(exact: LoadedModel, texts: list[list[int]]) -> list[torch.Tensor]:
    return list(log_probabilities(exact, texts))


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.005), ("int4 in 32s", 0.04)])
def test_perplexity_stays_within_its_bound(
    texts: list[list[int]], expected: list[torch.Tensor], name: str, bound: float
) -> None:
    choice = next(own for own in CHOICES if own.name == name)
    own = loss(choice, "some", texts, expected, load(DEMO, choice), trained=True)
    assert abs(own.perplexity_change) <= bound
    assert own.kl > 0


def test_float32_is_as_far_from_the_texts_as_its_log_probabilities_say(
    exact: LoadedModel, texts: list[list[int]], expected: list[torch.Tensor]
) -> None:
    own = loss(FLOAT32, "some", texts, expected, exact, trained=True)
    assert (own.perplexity_change, own.kl, own.top1) == (0.0, 0.0, 1.0)
    surprise = torch.cat([-rows[range(len(rows)), text[1:]] for rows, text in zip(expected, texts, strict=True)])
    assert own.tokens == len(surprise)
    assert own.perplexity == pytest.approx(surprise.mean().exp().item(), rel=1e-5)


def test_texts_are_not_those_of_calibration() -> None:
    names = ("calibration", "familiar", "unseen")
    read = {name: set((TEXTS / f"{name}.jsonl").read_text().splitlines()) for name in names}
    assert all(read.values())
    assert not read["calibration"] & (read["familiar"] | read["unseen"])


def test_names_of_choices_are_unique() -> None:
    assert len({own.name for own in CHOICES}) == len(CHOICES)
