"""The steps of a GPU on two ranks, in Triton's interpreter, with gloo in the place of nccl, and nothing captured."""

from pathlib import Path

import pytest

from tests.distributed.gpu_steps import STEPS, outcomes
from tests.distributed.rank_processes import call_on_ranks
from tests.model.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("small"),
        num_hidden_layers=1,
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=192,
        vocab_size=131,
    )


@pytest.mark.parametrize(("sizes", "steps"), [([], 2), ([2, 4], len(STEPS))], ids=["anew", "on fixed buffers"])
def test_two_ranks_draw_what_one_draws(folder: Path, tmp_path: Path, sizes: list[int], steps: int) -> None:
    alone = outcomes(None, folder, sizes, steps)
    together, _ = call_on_ranks(2, tmp_path, outcomes, folder, sizes, steps)
    assert len(alone) == len(together) == steps
    for mine, theirs in zip(alone, together, strict=True):
        assert theirs.tokens == mine.tokens
        for one, other in ((mine.logprobs, theirs.logprobs), (mine.prompt_logprobs, theirs.prompt_logprobs)):
            assert one.keys() == other.keys()
            for key, entries in one.items():
                assert [own.token_id for own in other[key]] == [own.token_id for own in entries]
                assert [own.logprob for own in other[key]] == pytest.approx([own.logprob for own in entries], abs=1e-4)
