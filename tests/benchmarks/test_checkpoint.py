from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.checkpoint import write_checkpoint
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "checkpoint"
    assert write_checkpoint(folder) == 33_610_752
    return folder


def test_the_benchmark_checkpoint_is_one_that_the_server_loads(folder: Path) -> None:
    config = PersimmonConfig.from_folder(folder)
    assert Checkpoint.open(folder, config).total_bytes == 33_610_752 * 4
    assert Tokenizer.from_folder(folder).vocab_size <= config.vocab_size


def test_only_tokens_that_are_text_can_win(folder: Path) -> None:
    rows = load_file(folder / "model.safetensors")["lm_head.weight"].abs().sum(dim=1)
    tokenizer = Tokenizer.from_folder(folder)
    winners = rows.nonzero().flatten().tolist()
    assert len(winners) > 3000
    assert all(tokenizer.decode([winner]) and "�" not in tokenizer.decode([winner]) for winner in winners)
