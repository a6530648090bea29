"""Checkpoints of all kinds on two ranks, what ranks exchange, and what they hold."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persimmon.model.checkpoint import expected_shapes
from persimmon.model.ranks import bytes_of_gather, bytes_of_sum
from persimmon.model.runner import PooledStates, SequenceInput
from tests.distributed.rank_functions import exchange, plain_torch_logits
from tests.distributed.rank_processes import call_on_ranks
from tests.model import transformers_reference
from tests.model.checkpoints import make_checkpoint
from tests.model.quantization.compressed import load_decompressed, quantization, weights, write_compressed
from tests.model.quantization.test_while_loading import CONFIG, write_zeros
from tests.model.test_parity import random_prompts
from tests.model.test_rope_scaling import scaled
from tests.ranks import harness_on, on_ranks

NEW_TOKENS = 32
HEADS: dict[str, Any] = {"num_attention_heads": 4, "vocab_size": 4099}
"""No number of ranks divides this vocabulary."""

PROMPTS = list(random_prompts())[:10]
FLOAT = {"quantized_activations": "float"}


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("four-heads"), **HEADS)


@pytest.mark.parametrize("settings", [{"quantization": "int8"}, {"quantization": "int4"}], ids=str)
def test_weights_quantized_while_loading_have_the_numbers_of_one_rank(
    four_heads: Path, settings: dict[str, str]
) -> None:
    def outputs(ranks: int) -> list[list[int]]:
        with on_ranks(ranks, four_heads, **FLOAT, **settings) as loaded:
            return harness_on(loaded).outputs(PROMPTS, NEW_TOKENS)

    assert outputs(2) == outputs(1)


@pytest.mark.parametrize("arguments", [weights(), weights(4, group_size=32)], ids=["int8", "int4"])
def test_quantized_checkpoints_give_transformers_tokens(tmp_path: Path, arguments: dict[str, Any]) -> None:
    config = quantization({"targets": ["Linear"], "weights": arguments}, ignore=("lm_head",))
    folder = write_compressed(tmp_path, config, num_attention_heads=2)
    prompts = [[token % 96 for token in prompt] for prompt in PROMPTS]
    expected = transformers_reference.continue_greedily(load_decompressed(folder), prompts, 8).without_near_ties()
    assert expected.prompts
    with on_ranks(2, folder, **FLOAT) as loaded:
        assert harness_on(loaded).outputs(expected.prompts, 8) == expected.outputs


def test_a_tied_head_and_an_embedding_in_its_file(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True, **HEADS)
    own = make_checkpoint(tmp_path / "own", **HEADS)
    for folder, settings in ((tied, {}), (own, {"embedding_table": "file"})):
        expected = transformers_reference.continue_greedily(transformers_reference.load(folder), PROMPTS, 8)
        expected = expected.without_near_ties()
        assert expected.prompts
        with on_ranks(2, folder, **settings) as loaded:
            assert harness_on(loaded).outputs(expected.prompts, 8) == expected.outputs


def test_angles_that_depend_on_the_length_of_the_prompt(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", max_position_embeddings=64, **HEADS)
    folder = scaled(plain, tmp_path / "scaled", "dynamic")

    def outputs(ranks: int) -> list[list[int]]:
        with on_ranks(ranks, folder, max_model_len="256") as loaded:
            return harness_on(loaded, max_num_batched_tokens=50).outputs(PROMPTS, NEW_TOKENS)

    assert outputs(2) == outputs(1)


def test_a_classifier_scores_on_the_first_rank(tmp_path: Path) -> None:
    labels = {"id2label": {0: "calm", 1: "glad", 2: "sad"}}
    folder = make_checkpoint(tmp_path, architecture="PersimmonForSequenceClassification", settings=labels, **HEADS)
    step = [SequenceInput(PROMPTS[1], 0, list(range(10)), (), PooledStates(range(150), total=False, scores=True))]

    def scores(ranks: int) -> np.ndarray:
        with on_ranks(ranks, folder) as loaded:
            (pooled,) = loaded.runner.launch(step).wait().pooled.values()
            return np.frombuffer(pooled, "<f4")

    np.testing.assert_allclose(scores(2), scores(1), atol=1e-4)


def test_ranks_exchange_numbers_in_order_and_as_many_bytes_as_they_count(tmp_path: Path) -> None:
    size, config = 3, replace(CONFIG, vocab_size=100)
    answers = call_on_ranks(size, tmp_path, exchange, config)
    for name in ("few", "many"):
        total = answers[0][name].clone()
        for other in answers[1:]:
            total += other[name]
        for own in answers:
            assert torch.equal(own[f"sum of {name}"], total)
            assert own[f"sum of {name}, bytes"] == bytes_of_sum(total.nbytes, size)
    assert torch.equal(answers[0]["gathered"], torch.cat([own["logits"] for own in answers], dim=1))
    sent = bytes_of_gather(5, config, size)
    assert [own["gathered, bytes"] for own in answers] == [0] + [sent] * (size - 1)
    assert all(own["broadcast"].tolist() == [0] * 4 for own in answers)


def test_plain_torch_gives_transformers_logits(four_heads: Path, tmp_path: Path) -> None:
    first, *_ = call_on_ranks(2, tmp_path, plain_torch_logits, four_heads, PROMPTS[5])
    (expected,) = transformers_reference.logits(transformers_reference.load(four_heads), [[*PROMPTS[5], 7]])
    torch.testing.assert_close(first, expected[-2:], rtol=0, atol=1e-4)


PEAK = """
import sys
from pathlib import Path

import torch

from persimmon import kernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.persimmon import Persimmon
from persimmon.model.ranks import DistributedRanks
from persimmon.model.shard import Shard


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def load(folder):
    config = PersimmonConfig.from_folder(folder)
    ranks = DistributedRanks(Shard(1, 4))  # no step is run
    parameters = Checkpoint.open(folder, config).parameters(shard=ranks.shard)
    operations = kernels.for_device(torch.device("cpu"))
    return Persimmon(config, parameters, torch.float32, torch.device("cpu"), operations, ranks=ranks)


torch.set_num_threads(1)
small, large = map(Path, sys.argv[1:])
load(small)
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = status("VmRSS")
model = load(large)
print(status("VmHWM") - before)
"""


def test_a_rank_never_holds_much_more_than_its_part(tmp_path: Path) -> None:
    config = replace(
        CONFIG,
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    write_zeros(tmp_path / "small", replace(config, num_hidden_layers=1))
    write_zeros(tmp_path / "large", config)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    whole = 4 * sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
    # While one matrix is laid out, its part is in memory twice, and the pages of its file once.
    assert peak < 0.35 * whole
