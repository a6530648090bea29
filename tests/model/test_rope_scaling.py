"""Scaled rotary embeddings against Transformers' Persimmon: the same angles, the same tokens.

Where frequencies depend on the length, Transformers' answer depends on what the model object computed before, so each
prompt gets a rotary embedding that is new.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon.kernels import Kernels
from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.rotary import rotary_of_tokens, rotary_table
from persimmon.server.engine.sequence import Sequence
from tests.engine_harness import CPU, Harness, blocks_for, load_model, new_tokens
from tests.model.checkpoints import make_checkpoint
from tests.model.transformers_reference import NEAR_TIE, load

TRAINED_FOR = 64
NEW_TOKENS = 24
FREQUENCIES = 8

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "yarn with all settings": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "truncate": False,
    },
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "short_factor": [1.0 + i / 10 for i in range(FREQUENCIES)],
        "long_factor": [2.0 + i for i in range(FREQUENCIES)],
        "original_max_position_embeddings": 32,
    },
    "longrope with a factor": {
        "rope_type": "longrope",
        "short_factor": [1.0] * FREQUENCIES,
        "long_factor": [3.0] * FREQUENCIES,
        "factor": 4.0,
    },
}
CONTEXT_LENGTHS = dict(zip(SCALINGS, (256, 256, 256, 256, 64, 64, 64), strict=True))


def settings(name: str) -> dict[str, Any]:
    return {"rope_type": name, **SCALINGS[name]}


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("plain"),
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TRAINED_FOR,
    )


def scaled(plain: Path, folder: Path, name: str) -> Path:
    shutil.copytree(plain, folder)
    return change_config(folder, rope_parameters={"rope_theta": 25000.0, **settings(name)})


# What config.json says.


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("spelling", ["new", "old", "oldest", "both"])
def test_angles_are_those_of_transformers(plain: Path, tmp_path: Path, name: str, spelling: str) -> None:
    from transformers import PersimmonConfig as Reference
    from transformers.models.persimmon.modeling_persimmon import PersimmonRotaryEmbedding

    folder = shutil.copytree(plain, tmp_path / "scaled")
    table = settings(name)
    if spelling == "new":
        change_config(folder, rope_parameters={**table, "rope_theta": 300.0, "partial_rotary_factor": 0.5})
    elif spelling == "old":
        change_config(folder, rope_parameters=None, rope_theta=300.0, rope_scaling=table)
    elif spelling == "oldest":
        table["type"] = table.pop("rope_type")
        change_config(folder, rope_parameters=None, rope_theta=300.0, rope_scaling=table)
    else:
        change_config(folder, rope_parameters={"rope_type": "default"}, rope_theta=300.0, rope_scaling=table)
    config, theirs = PersimmonConfig.from_folder(folder), Reference.from_pretrained(folder)
    assert config.context_length == CONTEXT_LENGTHS[name]
    for length in (10, 32, 33, TRAINED_FOR, TRAINED_FOR + 1, 200):
        rotary = PersimmonRotaryEmbedding(theirs)
        cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
        ours = rotary_of_tokens(config, torch.arange(length), torch.full((length,), length), CPU)
        assert torch.equal(ours.cos, cos[0, :, :FREQUENCIES])
        assert torch.equal(ours.sin, sin[0, :, :FREQUENCIES])
        # The row of a position in the table is that of a token that is computed alone.
        assert torch.equal(rotary_table(config, CPU, length).cos[-1], ours.cos[-1])


def test_an_empty_table_asks_for_nothing(plain: Path, tmp_path: Path) -> None:
    folder = change_config(shutil.copytree(plain, tmp_path / "scaled"), rope_scaling={})
    assert PersimmonConfig.from_folder(folder).rope_scaling is None


def test_the_original_length_at_the_top_counts_first(plain: Path, tmp_path: Path) -> None:
    folder = scaled(plain, tmp_path / "scaled", "llama3")
    change_config(folder, original_max_position_embeddings=16)
    scaling = PersimmonConfig.from_folder(folder).rope_scaling
    assert scaling is not None
    assert scaling.original_length == 16


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rope_type": "proportional"}, "has a 'proportional' rotary embedding; expected one of default, linear, "),
        ({"rope_type": "linear"}, "rope_parameters.factor is None; expected a positive number"),
        ({"rope_type": "linear", "factor": -1}, "rope_parameters.factor is -1; expected a positive number"),
        (
            {"rope_type": "linear", "factor": 1e30},
            "rope_parameters.factor is 1e+30; expected at most 2,147,483,647 tokens",
        ),
        ({"rope_type": "dynamic", "factor": 1e308}, "rope_parameters.factor is 1e+308; expected at most 2,147,483,647"),
        ({"rope_type": "yarn", "factor": 1e10}, "rope_parameters.factor is 10000000000.0; expected at most "),
        ({"rope_type": "dynamic", "factor": 0.5}, "rope_parameters.factor is 0.5; expected a positive number"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "short_factor is [1.0]; expected 8 positive numbers"),
        ({"rope_type": "llama3", "factor": 2.0}, "rope_parameters.low_freq_factor is None"),
        ({"rope_type": 3}, "rope_parameters.rope_type is 3; expected a string"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 1},
            "high_freq_factor is 1; expected more than low_freq_factor, which is 4.0",
        ),
        (
            {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.0625},
            "dynamic scaling needs 4 rotary dimensions, and the model has 2",
        ),
    ],
)
def test_scaling_that_cannot_be_served_is_named(
    plain: Path, tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    folder = change_config(shutil.copytree(plain, tmp_path / "scaled"), rope_parameters=table)
    with pytest.raises(CheckpointError) as caught:
        PersimmonConfig.from_folder(folder)
    assert str(caught.value).startswith(f"{folder}/config.json: ")
    assert message in str(caught.value)


# What the engine makes of it.


def fresh_rotary(model: Any) -> None:
    """Makes Transformers' model forget which lengths it has seen."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def continued(model: Any, prompt: list[int]) -> list[int] | None:
    """Transformers' greedy tokens after a prompt; None where rounding could choose between two."""
    fresh_rotary(model)
    with torch.inference_mode():
        made = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.cat(made.logits).topk(2).values
    tokens: list[int] = made.sequences[0, len(prompt) :].tolist()
    return tokens if bool((best[:, 0] - best[:, 1] > NEAR_TIE).all()) else None


def prompts() -> list[list[int]]:
    """Around the length that the model was trained for; several begin alike, also those that are longer."""
    beginning = random.Random(0).choices(range(2, 200), k=160)
    lengths = (5, 30, 31, 33, 50, 63, 64, 65, 66, 81, 100, 100, 130, 160)
    return [
        beginning[: length - 4] + random.Random(number).choices(range(2, 200), k=4)
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "longrope"])
def test_tokens_are_those_of_transformers_however_they_are_computed(
    plain: Path, tmp_path: Path, name: str, cpu_kernels: Kernels[Any, Any]
) -> None:
    folder = scaled(plain, tmp_path / "scaled", name)
    # Longrope's file gives the length after scaling.
    change_config(folder, max_position_embeddings=256 if name == "longrope" else TRAINED_FOR)
    reference = load(folder)
    expected = {number: tokens for number, prompt in enumerate(prompts()) if (tokens := continued(reference, prompt))}
    assert len(expected) > 8, "too many near-ties to compare anything"
    asked = [prompts()[number] for number in expected]
    model = load_model(folder, operations=cpu_kernels)
    blocks = blocks_for([len(prompt) + NEW_TOKENS for prompt in asked], 16)
    ways: list[dict[str, Any]] = [
        {"num_blocks": blocks},
        {"num_blocks": blocks, "prefix_caching": True, "max_num_batched_tokens": 24, "max_num_seqs": 4},
        {"num_blocks": blocks, "max_num_batched_tokens": 33, "overlap": True},
        {"num_blocks": 24, "prefix_caching": True, "max_num_batched_tokens": 40},
    ]
    for way in ways:
        harness = Harness(model, operations=cpu_kernels, **way)
        assert harness.outputs(asked, NEW_TOKENS) == list(expected.values()), way
        if "prefix_caching" in way:  # again, with whatever is cached by now
            assert harness.outputs(asked, NEW_TOKENS) == list(expected.values()), way
    assert harness.stats.preemptions > 0


def test_states_of_a_long_prompt_are_those_of_one_pass(
    plain: Path, tmp_path: Path, cpu_kernels: Kernels[Any, Any]
) -> None:
    folder = scaled(plain, tmp_path / "scaled", "dynamic")
    reference, prompt = load(folder), prompts()[-1]
    with torch.inference_mode():
        expected = reference.model(torch.tensor([prompt])).last_hidden_state[0]
    model = load_model(folder, operations=cpu_kernels)
    harness = Harness(model, operations=cpu_kernels, num_blocks=20, max_num_batched_tokens=37)
    sequence = Sequence("it", list(prompt), 0, pooling="all")
    harness.run([sequence])
    actual = torch.tensor(harness.reports[sequence].pooled).view(len(prompt), -1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_long_prompts_share_blocks_only_with_those_of_their_length(plain: Path, tmp_path: Path) -> None:
    model = load_model(scaled(plain, tmp_path / "scaled", "dynamic"))
    beginning = random.Random(0).choices(range(2, 200), k=128)
    harness = Harness(model, num_blocks=64, prefix_caching=True)

    def cached(length: int) -> int:
        (sequence,) = harness.generate([[*beginning[: length - 1], length]], 1)
        assert len(new_tokens(sequence)) == 1
        return sequence.cached_tokens or 0

    assert [cached(length) for length in (60, 50, TRAINED_FOR)] == [0, 48, 48]
    assert [cached(length) for length in (100, 101, 100, 101, 50)] == [0, 0, 96, 96, 48]


def test_a_plain_checkpoint_has_no_limit(plain: Path) -> None:
    model = load_model(plain)
    assert model.config.rope_limit is None
    assert model.config.context_length == TRAINED_FOR
    assert not rotary_table(model.config, CPU).by_token
