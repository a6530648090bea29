"""The network: every variant and spelling of a checkpoint equals Transformers, and every trap has its test."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persimmon import kernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.persimmon import Persimmon
from persimmon.model.rotary import rotary_table
from tests.engine_harness import CPU, load_model
from tests.model import transformers_reference
from tests.model.checkpoints import make_checkpoint
from tests.model.forward_pass import hidden_states

LOGITS_TOLERANCE = 1e-4
NOTICEABLE = 100 * LOGITS_TOLERANCE
TOKEN_IDS = random.Random(0).choices(range(2, 4096), k=60)

Change = Callable[[dict[str, Any]], None]


def logits_of(model: Persimmon, token_ids: list[int]) -> torch.Tensor:
    """The next-token logits of every token, [T, vocab_size], computed in one pass."""
    return model.logits(hidden_states(model, token_ids))


def transformers_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    return transformers_reference.logits(transformers_reference.load(folder), [token_ids])[0]


def assert_equal_transformers(folder: Path, token_ids: list[int]) -> None:
    actual, expected = logits_of(load_model(folder), token_ids), transformers_logits(folder, token_ids)
    # Logits have a standard deviation of one, but ten with tied embeddings: rounding grows with them.
    tolerance = LOGITS_TOLERANCE * max(1.0, float(expected.std()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def with_config(checkpoint: Path, folder: Path, change: Change) -> Path:
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(checkpoint, folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    return folder


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    "variant",
    [
        {"seed": 1},
        {"qk_layernorm": False},
        {"tie_word_embeddings": True},
        {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 130, "num_hidden_layers": 1},
        {"hidden_size": 256, "num_attention_heads": 2},
        {"vocab_size": 5003},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_logits_of_every_variant_equal_transformers(tmp_path: Path, variant: dict[str, Any]) -> None:
    assert_equal_transformers(make_checkpoint(tmp_path / "checkpoint", **variant), TOKEN_IDS)


def test_logits_equal_transformers_up_to_the_longest_sequence(random_checkpoint: Path) -> None:
    longest = PersimmonConfig.from_folder(random_checkpoint).max_position_embeddings
    token_ids = random.Random(2).choices(range(2, 4096), k=longest)
    actual = logits_of(load_model(random_checkpoint), token_ids)
    torch.testing.assert_close(actual, transformers_logits(random_checkpoint, token_ids), rtol=0, atol=LOGITS_TOLERANCE)


class TestEveryParameter:
    """A port that leaves a tensor out gives other logits, so the parity tests can tell."""

    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight",
            *(
                f"model.layers.1.{part}.{kind}"
                for part in (
                    "input_layernorm",
                    "self_attn.query_key_value",
                    "self_attn.q_layernorm",
                    "self_attn.k_layernorm",
                    "self_attn.dense",
                    "post_attention_layernorm",
                    "mlp.dense_h_to_4h",
                    "mlp.dense_4h_to_h",
                )
                for kind in ("weight", "bias")
            ),
            "model.final_layernorm.weight",
            "model.final_layernorm.bias",
            "lm_head.weight",
        ],
    )
    def test_matters(self, random_checkpoint: Path, name: str) -> None:
        config = PersimmonConfig.from_folder(random_checkpoint)
        tensors = dict(Checkpoint.open(random_checkpoint, config).tensors())
        complete = Persimmon(
            config=config, tensors=tensors.items(), dtype=torch.float32, device=CPU, kernels=kernels.for_device(CPU)
        )
        neutral = torch.ones_like if name.endswith("layernorm.weight") else torch.zeros_like
        tensors[name] = neutral(tensors[name])
        lacking = Persimmon(
            config=config, tensors=tensors.items(), dtype=torch.float32, device=CPU, kernels=kernels.for_device(CPU)
        )
        assert difference(logits_of(complete, TOKEN_IDS), logits_of(lacking, TOKEN_IDS)) > NOTICEABLE


class TestFusedProjection:
    def test_is_laid_out_head_by_head(self, random_checkpoint: Path) -> None:
        # Two heads that change places, with their columns of the output projection, change nothing.
        config = PersimmonConfig.from_folder(random_checkpoint)
        heads, dim = config.num_attention_heads, config.head_dim
        order = list(reversed(range(heads)))
        tensors = dict(Checkpoint.open(random_checkpoint, config).tensors())
        expected = logits_of(
            Persimmon(
                config=config, tensors=tensors.items(), dtype=torch.float32, device=CPU, kernels=kernels.for_device(CPU)
            ),
            TOKEN_IDS,
        )
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}.self_attn"
            for name in (f"{prefix}.query_key_value.weight", f"{prefix}.query_key_value.bias"):
                rows = tensors[name]
                tensors[name] = rows.view(heads, 3 * dim, *rows.shape[1:])[order].reshape(rows.shape)
            columns = tensors[f"{prefix}.dense.weight"]
            swapped = columns.view(-1, heads, dim)[:, order].reshape(columns.shape)
            tensors[f"{prefix}.dense.weight"] = swapped
        actual = logits_of(
            Persimmon(
                config=config, tensors=tensors.items(), dtype=torch.float32, device=CPU, kernels=kernels.for_device(CPU)
            ),
            TOKEN_IDS,
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=LOGITS_TOLERANCE)


class TestEps:
    def test_of_every_norm_is_layer_norm_eps(self, random_checkpoint: Path, tmp_path: Path) -> None:
        # So large that a norm with another eps, those of queries and keys among them, is noticed.
        def change(values: dict[str, Any]) -> None:
            values.update(layer_norm_eps=0.5, rms_norm_eps=1e-6)

        folder = with_config(random_checkpoint, tmp_path / "checkpoint", change)
        assert_equal_transformers(folder, TOKEN_IDS)
        assert difference(transformers_logits(folder, TOKEN_IDS), transformers_logits(random_checkpoint, TOKEN_IDS)) > (
            NOTICEABLE
        )


class TestIgnoredKeys:
    @pytest.mark.parametrize(
        "stale",
        [{"rms_norm_eps": 0.5}, {"hidden_dropout": 0.6}, {"attention_dropout": 0.6}, {"initializer_range": 9}],
        ids=str,
    )
    def test_change_nothing(self, random_checkpoint: Path, tmp_path: Path, stale: dict[str, Any]) -> None:
        folder = with_config(random_checkpoint, tmp_path / "checkpoint", lambda values: values.update(stale))
        assert torch.equal(
            logits_of(load_model(folder), TOKEN_IDS), logits_of(load_model(random_checkpoint), TOKEN_IDS)
        )


class TestRotarySpelling:
    @staticmethod
    def new(theta: float, factor: float | None) -> Change:
        def change(values: dict[str, Any]) -> None:
            values.pop("partial_rotary_factor", None)
            values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
            if factor is not None:
                values["rope_parameters"]["partial_rotary_factor"] = factor

        return change

    @staticmethod
    def old(theta: float, factor: float | None) -> Change:
        def change(values: dict[str, Any]) -> None:
            del values["rope_parameters"]
            values.pop("partial_rotary_factor", None)
            values.update(rope_theta=theta, rope_scaling=None)
            if factor is not None:
                values["partial_rotary_factor"] = factor

        return change

    @pytest.mark.parametrize(("theta", "factor"), [(25000.0, 0.5), (25000.0, None), (300.0, 0.25), (300.0, None)])
    def test_old_and_new_files_give_equal_logits(
        self, random_checkpoint: Path, tmp_path: Path, theta: float, factor: float | None
    ) -> None:
        old = with_config(random_checkpoint, tmp_path / "old", self.old(theta, factor))
        new = with_config(random_checkpoint, tmp_path / "new", self.new(theta, factor))
        logits = logits_of(load_model(new), TOKEN_IDS)
        assert torch.equal(logits_of(load_model(old), TOKEN_IDS), logits)
        written_out = with_config(random_checkpoint, tmp_path / "written-out", self.new(theta, factor or 0.5))
        expected = transformers_logits(written_out, TOKEN_IDS)
        torch.testing.assert_close(logits, expected, rtol=0, atol=LOGITS_TOLERANCE)

    def test_factor_and_theta_matter(self, random_checkpoint: Path, tmp_path: Path) -> None:
        expected = logits_of(load_model(random_checkpoint), TOKEN_IDS)
        for number, (theta, factor) in enumerate([(10000.0, 0.5), (25000.0, 1.0), (25000.0, 0.25)]):
            folder = with_config(random_checkpoint, tmp_path / str(number), self.new(theta, factor))
            assert difference(logits_of(load_model(folder), TOKEN_IDS), expected) > NOTICEABLE


class TestRotaryTable:
    @pytest.mark.parametrize(("theta", "factor"), [(25000.0, 0.5), (10000.0, 1.0), (500.0, 0.25)])
    def test_has_frequencies_over_the_rotary_dimensions(self, theta: float, factor: float) -> None:
        config = PersimmonConfig(
            vocab_size=8,
            hidden_size=128,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16384,
            rope_theta=theta,
            partial_rotary_factor=factor,
        )
        rotary_dim = int(64 * factor)
        rotary = rotary_table(config, CPU)
        cos, sin = rotary.cos, rotary.sin
        assert cos.shape == sin.shape == (16384, rotary_dim // 2)
        angles = np.arange(16384)[:, None] * theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
        # Float32 angles, as Transformers has them: at position 16,384 they are good to about a thousandth.
        np.testing.assert_allclose(cos.numpy(), np.cos(angles), atol=2e-3)
        np.testing.assert_allclose(sin.numpy(), np.sin(angles), atol=2e-3)
        np.testing.assert_allclose(cos[:64].numpy(), np.cos(angles[:64]), atol=1e-5)


class TestSixteenBits:
    @pytest.mark.parametrize(
        ("dtype", "largest_error", "least_agreement"), [(torch.float16, 0.01, 0.97), (torch.bfloat16, 0.05, 0.9)]
    )
    @pytest.mark.parametrize("checkpoint", ["random", "demo"])
    def test_stays_close_to_float32(
        self,
        request: pytest.FixtureRequest,
        checkpoint: str,
        dtype: torch.dtype,
        largest_error: float,
        least_agreement: float,
    ) -> None:
        folder = request.getfixturevalue(f"{checkpoint}_checkpoint")
        token_ids = random.Random(3).choices(range(2, 4096), k=300)
        expected = logits_of(load_model(folder), token_ids)
        actual = logits_of(load_model(folder, dtype), token_ids)
        assert actual.dtype == torch.float32
        error = float((actual - expected).square().mean().sqrt() / expected.std())
        assert error < largest_error
        assert float((actual.argmax(-1) == expected.argmax(-1)).float().mean()) > least_agreement

    def test_a_square_beyond_float16_saturates(self, random_checkpoint: Path) -> None:
        config = PersimmonConfig.from_folder(random_checkpoint)
        tensors = dict(Checkpoint.open(random_checkpoint, config).tensors())
        # One hidden unit of the MLP is far above 256 for every token and counts for little in its output.
        tensors["model.layers.1.mlp.dense_h_to_4h.bias"][7] = 1000.0
        tensors["model.layers.1.mlp.dense_4h_to_h.weight"][:, 7] = 1e-5
        model = Persimmon(
            config=config, tensors=tensors.items(), dtype=torch.float16, device=CPU, kernels=kernels.for_device(CPU)
        )
        assert bool(logits_of(model, TOKEN_IDS).isfinite().all())


class TestLoading:
    def test_the_model_keeps_its_own_copy_of_the_parameters(self, random_checkpoint: Path) -> None:
        config = PersimmonConfig.from_folder(random_checkpoint)
        tensors = dict(Checkpoint.open(random_checkpoint, config).tensors())
        model = Persimmon(
            config=config, tensors=tensors.items(), dtype=torch.float32, device=CPU, kernels=kernels.for_device(CPU)
        )
        expected = logits_of(model, TOKEN_IDS)
        for tensor in tensors.values():
            tensor.fill_(math.nan)
        assert torch.equal(logits_of(model, TOKEN_IDS), expected)
