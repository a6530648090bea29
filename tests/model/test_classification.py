"""Classifiers and hidden states: scores and final hidden states equal Transformers', however a prompt is cut up."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon import kernels
from persimmon.model.checkpoint import Checkpoint, dummy_tensors, expected_shapes
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.persimmon import Persimmon, parameter_dtype
from tests.engine_harness import CPU, load_model
from tests.model.checkpoints import make_checkpoint
from tests.model.forward_pass import hidden_states

TOLERANCE = 1e-4
LABELS = {0: "calm", 1: "glad", 2: "sad", 3: "angry", 4: "calm"}
PAD = 7
CLASSIFIERS = [Architecture.SEQUENCE_CLASSIFICATION, Architecture.TOKEN_CLASSIFICATION]

lengths = pytest.mark.parametrize("length", [1, 2, 16, 17, 130])
chunks = pytest.mark.parametrize("chunk", [None, 1, 7, 64])
classifiers = pytest.mark.parametrize("architecture", CLASSIFIERS)


def prompt(length: int) -> list[int]:
    return random.Random(length).choices(range(PAD + 1, 4096), k=length)


def transformers_model(folder: Path, name: str) -> Any:
    import transformers  # takes seconds

    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def transformers_scores(model: Any, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """The classifier's logits of sequences of equal length."""
    with torch.inference_mode():
        scores: torch.Tensor = model(torch.tensor(token_ids)).logits
    return scores


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


class Pair:
    """One checkpoint, here and in Transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder)
        self.theirs = transformers_model(folder, self.model.config.architecture)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Path]:
    return {
        architecture: make_checkpoint(
            tmp_path_factory.mktemp("classifier"),
            architecture=architecture,
            settings={"id2label": LABELS, "pad_token_id": PAD},
        )
        for architecture in CLASSIFIERS
    }


@pytest.fixture(scope="module")
def sequences(folders: dict[Architecture, Path]) -> Pair:
    return Pair(folders[Architecture.SEQUENCE_CLASSIFICATION])


@pytest.fixture(scope="module")
def tokens(folders: dict[Architecture, Path]) -> Pair:
    return Pair(folders[Architecture.TOKEN_CLASSIFICATION])


class TestSequences:
    @lengths
    @chunks
    def test_scores_of_the_last_token_are_transformers(self, sequences: Pair, length: int, chunk: int | None) -> None:
        last = hidden_states(sequences.model, prompt(length), chunk)[-1:]
        assert_close(sequences.model.scores(last), transformers_scores(sequences.theirs, [prompt(length)]))

    @pytest.mark.parametrize(
        "token_ids",
        [[*prompt(9), PAD], [*prompt(9), PAD, PAD, PAD], [PAD, PAD, 5, PAD, 9, PAD], [5, PAD], [PAD], [PAD] * 4],
        ids=str,
    )
    def test_padding_at_the_end_is_looked_past(self, sequences: Pair, token_ids: list[int]) -> None:
        pooled = sequences.model.config.pooled_token(token_ids)
        expected = transformers_scores(sequences.theirs, [token_ids])
        assert_close(sequences.model.scores(hidden_states(sequences.model, token_ids))[pooled][None], expected)
        # What comes after the pooled token need not be computed.
        assert_close(sequences.model.scores(hidden_states(sequences.model, token_ids[: pooled + 1])[-1:]), expected)

    def test_without_a_padding_token_the_last_one_counts(self, tmp_path: Path) -> None:
        pair = Pair(make_checkpoint(tmp_path, architecture=Architecture.SEQUENCE_CLASSIFICATION))
        assert pair.model.config.pooled_token([*prompt(5), 0, 0]) == 6
        scores = pair.model.scores(hidden_states(pair.model, [*prompt(5), 0, 0])[-1:])
        assert_close(scores, transformers_scores(pair.theirs, [[*prompt(5), 0, 0]]))

    def test_scores_are_those_of_a_padded_batch(self, sequences: Pair) -> None:
        prompts = [prompt(length) for length in (3, 11, 20)]
        batch = [[*token_ids, *[PAD] * (20 - len(token_ids))] for token_ids in prompts]
        alone = [hidden_states(sequences.model, token_ids)[-1:] for token_ids in prompts]
        assert_close(sequences.model.scores(torch.cat(alone)), transformers_scores(sequences.theirs, batch))


class TestTokens:
    @lengths
    @chunks
    def test_scores_of_every_token_are_transformers(self, tokens: Pair, length: int, chunk: int | None) -> None:
        scores = tokens.model.scores(hidden_states(tokens.model, prompt(length), chunk))
        assert_close(scores, transformers_scores(tokens.theirs, [prompt(length)])[0])


class TestVariants:
    @classifiers
    @pytest.mark.parametrize(
        "variant",
        [
            {"settings": {"num_labels": 1}},
            {"settings": {"num_labels": 2}},
            {"settings": {"num_labels": 131}},
            {"settings": {"hidden_dropout": 0.6, "classifier_dropout": 0.5}},
            {"settings": {"token_classification_bias": False}},
            {"tie_word_embeddings": True},
            {"dtype": torch.bfloat16, "max_shard_size": "400KB"},
        ],
        ids=str,
    )
    def test_scores_of_every_variant_are_transformers(
        self, tmp_path: Path, architecture: Architecture, variant: dict[str, Any]
    ) -> None:
        pair = Pair(make_checkpoint(tmp_path, architecture=architecture, num_hidden_layers=1, **variant))
        scores = pair.model.scores(hidden_states(pair.model, prompt(20)))
        expected = transformers_scores(pair.theirs, [prompt(20)])[0]
        assert pair.model.config.num_labels == expected.shape[-1]
        assert_close(scores if expected.ndim == 2 else scores[-1], expected)


class TestHiddenStates:
    @lengths
    @chunks
    def test_are_the_last_of_transformers_model(self, random_checkpoint: Path, length: int, chunk: int | None) -> None:
        theirs = transformers_model(random_checkpoint, "PersimmonModel")
        with torch.inference_mode():
            expected = theirs(torch.tensor([prompt(length)])).last_hidden_state[0]
        assert_close(hidden_states(load_model(random_checkpoint), prompt(length), chunk), expected)

    @classifiers
    def test_of_classifiers_are_too(self, folders: dict[Architecture, Path], architecture: Architecture) -> None:
        theirs = transformers_model(folders[architecture], "PersimmonModel")
        with torch.inference_mode():
            expected = theirs(torch.tensor([prompt(20)])).last_hidden_state[0]
        assert_close(hidden_states(load_model(folders[architecture]), prompt(20)), expected)


class TestSixteenBits:
    @classifiers
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_scores_lose_nothing_to_the_type(
        self, folders: dict[Architecture, Path], architecture: Architecture, dtype: torch.dtype
    ) -> None:
        model = load_model(folders[architecture], dtype)
        hidden = hidden_states(model, prompt(20))
        assert hidden.dtype in (dtype, torch.float32)
        scores = model.scores(hidden)
        assert scores.dtype == torch.float32
        stored = dict(Checkpoint.open(folders[architecture], model.config).tensors())
        expected = hidden.double() @ stored["score.weight"].double().T + stored.get("score.bias", torch.zeros(1))
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)

    def test_heads_and_norms_stay_in_float32_and_all_else_does_not(self, tokens: Pair) -> None:
        kept = {
            name for name in expected_shapes(tokens.model.config) if parameter_dtype(name, torch.half) != torch.half
        }
        assert kept == {name for name in expected_shapes(tokens.model.config) if "norm" in name or "score" in name}


class TestHeads:
    """Each network has one of the two."""

    @classifiers
    def test_classifier_makes_no_logits(self, folders: dict[Architecture, Path], architecture: Architecture) -> None:
        model = load_model(folders[architecture])
        with pytest.raises(ValueError, match=rf"{architecture} has no lm_head"):
            model.logits(torch.zeros(1, 128))
        with pytest.raises(ValueError, match=rf"{architecture} has no lm_head"):
            _ = model.head

    def test_generator_scores_no_labels(self, random_checkpoint: Path) -> None:
        with pytest.raises(ValueError, match="PersimmonForCausalLM has no classification head"):
            load_model(random_checkpoint).scores(torch.zeros(1, 128))

    @classifiers
    def test_dummy_tensors_make_a_classifier(
        self, folders: dict[Architecture, Path], architecture: Architecture
    ) -> None:
        config = PersimmonConfig.from_folder(folders[architecture])
        tensors = dummy_tensors(config, torch.float32, CPU, seed=0)
        model = Persimmon(
            config=config, tensors=tensors, dtype=torch.float32, device=CPU, kernels=kernels.for_device(CPU)
        )
        scores = model.scores(hidden_states(model, prompt(20)))
        assert scores.shape == (20, 5)
        assert bool(scores.isfinite().all())
        assert float(scores.std()) > 0.01
