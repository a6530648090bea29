"""What decode attention's programs without work prefetch; that loads and stores are the same is another test's."""

import pytest
import torch

from persimmon.kernels import LayerCache, prefetch
from persimmon.kernels import decode_attention as module
from persimmon.kernels.decode_attention import decode_attention
from persimmon.kernels.decode_work import DecodeWorkspace, build_work_list
from persimmon.kernels.prefetch import LINE_BYTES

CPU = torch.device("cpu")
HEADS, DIM, BLOCK, PROGRAMS = 2, 16, 16, 8


def run(lengths: list[int], ahead: torch.Tensor | None) -> torch.Tensor:
    """A step of decode attention on a grid of at most PROGRAMS, of sequences that all attend to one page of ones."""
    workspace = DecodeWorkspace.allocate(4, 1024, HEADS, DIM, CPU)
    counts = torch.tensor(lengths, dtype=torch.int32)
    build_work_list(counts, workspace)
    pages = torch.ones(1, HEADS, BLOCK, DIM)
    return decode_attention(
        torch.ones(len(lengths), HEADS, 3, DIM),
        None,
        None,
        0.0,
        torch.ones(1024, DIM // 4),
        torch.zeros(1024, DIM // 4),
        LayerCache(pages, pages.clone()),
        counts,
        torch.zeros(len(lengths), 1024 // BLOCK, dtype=torch.int32),
        workspace,
        ahead=ahead,
    )


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the cache lines that were asked for."""
    asked: list[int] = []
    monkeypatch.setattr(prefetch, "prefetch", lambda pointers: asked.extend(pointers.handle.data.ravel().tolist()))
    monkeypatch.setattr(module, "num_sms", lambda device: PROGRAMS // 4)
    return asked


@pytest.mark.parametrize("most_bytes", [16 * 1024 * 1024, 100 * LINE_BYTES])
def test_programs_without_work_ask_for_the_next_weight_and_for_nothing_else(
    lines: list[int], monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    monkeypatch.setattr(module, "AHEAD_BYTES", most_bytes)
    ahead = torch.zeros(3000 * LINE_BYTES // 4)
    out = run([5], ahead)
    wanted = range(ahead.data_ptr(), ahead.data_ptr() + min(most_bytes, ahead.nbytes), LINE_BYTES)
    assert sorted(set(lines)) == list(wanted)
    assert torch.equal(out, run([5], None))


def test_programs_that_have_work_ask_for_nothing(lines: list[int]) -> None:
    run([300, 300, 5], torch.zeros(3000 * LINE_BYTES // 4))
    assert lines == []
