"""A GPU's batch-invariant mode through Triton's interpreter: the same bits in any batch and any chunking.

What is compared are log-probabilities, and the keys and values that were stored, which depend on everything computed
before them.  tests/exhaustive/test_batch_invariant_sweep.py goes through many more sizes.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon.kernels import StepLimits
from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.invariant import InvariantKernels
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.kv_cache import KVCache
from persimmon.model.patches import PatchSpan
from persimmon.model.persimmon import Persimmon
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PromptLogprobs, Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.server.engine.sequence import Sequence as EngineSequence
from tests.engine_harness import CPU, GREEDY, Harness, load_model, new_tokens, poisoned_cache
from tests.fuyu import make_fuyu, random_image
from tests.interpreter import keep_language_patched, multiply_as_matrix_units
from tests.model.checkpoints import make_checkpoint

VOCAB_SIZE = 130
BLOCK_SIZE = 16
MAX_MODEL_LEN = 300
DRAWN = SamplingParams(temperature=1.0, top_p=0.9, seed=5, logprobs=3)
PLAIN = SamplingParams(temperature=1.0, seed=5, logprobs=3)
MAX_TOKENS = 8


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_language_patched()
    multiply_as_matrix_units(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def tiny_checkpoint(folder: Path) -> Path:
    """One layer, whose last product has four splits."""
    return make_checkpoint(
        folder,
        num_hidden_layers=1,
        hidden_size=128,
        num_attention_heads=2,
        intermediate_size=512,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=2560,
    )


def start(
    model: Persimmon,
    cache: KVCache,
    kernels: FusedKernels,
    sizes: Sequence[int],
    max_num_seqs: int,
    max_model_len: int = MAX_MODEL_LEN,
) -> Runner:
    config = model.config
    executor = FusedExecutor(kernels, sizes)
    executor.reserve(
        StepLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            max_model_len=max_model_len,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
        )
    )
    return Runner(executor.start(model, cache))


@dataclass
class Machine:
    """A model on invariant kernels, with a cache of its own, full of NaN, and blocks that are handed out at random."""

    folder: Path
    dtype: torch.dtype = torch.float16
    sizes: Sequence[int] = ()
    num_blocks: int = 400
    max_num_seqs: int = 320
    max_model_len: int = MAX_MODEL_LEN
    kernels: FusedKernels = field(default_factory=lambda: InvariantKernels(CPU))
    runner: Runner = field(init=False)
    cache: KVCache = field(init=False)
    free: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        model = load_model(self.folder, self.dtype, self.kernels)
        self.cache = poisoned_cache(model, self.num_blocks, BLOCK_SIZE)
        self.runner = start(model, self.cache, self.kernels, self.sizes, self.max_num_seqs, self.max_model_len)
        blocks = list(range(self.num_blocks))
        random.Random(self.num_blocks).shuffle(blocks)
        self.free = iter(blocks)

    def sequence(self, tokens: Sequence[int]) -> "Cached":
        return Cached(self, tokens, [next(self.free) for _ in range(-(-len(tokens) // BLOCK_SIZE))])


@dataclass
class Cached:
    """A sequence of known tokens, as far as it has been computed."""

    machine: Machine
    tokens: Sequence[int]
    table: list[int]
    done: int = 0

    def part(self, count: int, asked: SamplingParams | None = None, *, reported: bool = True) -> SequenceInput:
        """The next tokens, after which is drawn if `asked` says how."""
        first, self.done = self.done, self.done + count
        following = self.tokens[first + 1 : self.done + 1]
        return SequenceInput(
            self.tokens[first : self.done],
            first,
            self.table,
            (RowSampling(asked=asked, position=first),) if asked else (),
            report=PromptLogprobs(0, following, top=3) if reported and following else None,
        )

    def stored(self) -> torch.Tensor:
        """[2, layers * H, done, D], the keys and values of what has been computed."""
        layers = [
            torch.cat([tensor[self.table].transpose(0, 1).flatten(1, 2)[:, : self.done] for tensor in pair])
            for pair in zip(*[iter(self.machine.cache.tensors)] * 2, strict=True)
        ]
        return torch.stack(layers)


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


def in_chunks(
    machine: Machine, own: Sequence[int], chunks: Sequence[int], others: Callable[[], list[SequenceInput]] = list
) -> tuple[list[TokenLogprobs], torch.Tensor]:
    """The prompt's log-probabilities and what it has stored, each chunk computed next to others."""
    sequence, reports = machine.sequence(own), list[TokenLogprobs]()
    for count in chunks:
        batch = [*others(), sequence.part(count)]
        reports += machine.runner.launch(batch).wait().prompt_logprobs.get(len(batch) - 1, [])
    return reports, sequence.stored()


class TestPrompts:
    def test_have_the_same_bits_however_they_are_cut(self, checkpoint: Path) -> None:
        machine, own = Machine(checkpoint), tokens(70)
        whole, stored = in_chunks(machine, own, [70])
        assert len(whole) == 69
        # Single tokens are decodes; up to 64 tokens go through the small projections, up to 16 without a norm.
        for chunks in ([66, 1, 3], [1, 5, 40, 24]):
            again, stored_again = in_chunks(machine, own, chunks)
            assert again == whole
            assert torch.equal(stored_again, stored)

    def test_have_the_same_bits_next_to_others(self, checkpoint: Path) -> None:
        machine, own = Machine(checkpoint), tokens(24)
        alone, stored = in_chunks(machine, own, [24])
        decodes = [machine.sequence(tokens(5, seed)) for seed in range(1, 50)]
        machine.runner.launch([sequence.part(2, reported=False) for sequence in decodes]).wait()

        def others() -> list[SequenceInput]:
            return [sequence.part(1, reported=False) for sequence in decodes]

        beside, stored_beside = in_chunks(machine, own, [17, 7], others)
        assert beside == alone
        assert torch.equal(stored_beside, stored)

    def test_with_images_have_the_same_bits_however_they_are_cut(self, tmp_path: Path) -> None:
        machine, own = Machine(make_fuyu(tmp_path, patch_size=4, num_hidden_layers=1, hidden_size=128)), tokens(80)
        pixels = random_image(1, 66, 3, patch_numbers=48)[0]

        def stored(chunks: Sequence[int]) -> torch.Tensor:
            sequence = machine.sequence(own)
            for count in chunks:
                first = sequence.done
                part = sequence.part(count)
                inside = [i for i in range(66) if first <= 10 + i < first + count]
                spans = [PatchSpan(10 + inside[0] - first, pixels[inside])] if inside else []
                machine.runner.launch([replace(part, patches=spans)]).wait()
            return sequence.stored()

        assert torch.equal(stored([12, 1, 67]), stored([80]))


class TestDecodes:
    def test_draw_the_same_alone_and_among_others_on_fixed_buffers_and_without(self, checkpoint: Path) -> None:
        own = tokens(20)

        def last(machine: Machine, company: int) -> tuple[list[int], list[TokenLogprobs], torch.Tensor]:
            sequence = machine.sequence(own)
            others = [machine.sequence(tokens(2, seed)) for seed in range(1, company + 1)]
            machine.runner.launch([sequence.part(19, reported=False)]).wait()
            if others:
                machine.runner.launch([other.part(1, reported=False) for other in others]).wait()
            batch = [
                sequence.part(1, DRAWN, reported=False),
                *(other.part(1, GREEDY, reported=False) for other in others),
            ]
            drawn = machine.runner.launch(batch).wait()
            return drawn.tokens[0], drawn.logprobs[0], sequence.stored()

        token, logprobs, stored = last(Machine(checkpoint, sizes=(4, 70)), 0)
        for sizes, company in (((4, 70), 65), ((), 17)):
            other, others_logprobs, others_stored = last(Machine(checkpoint, sizes=sizes), company)
            assert (other, others_logprobs) == (token, logprobs)
            assert torch.equal(others_stored, stored)

    def test_report_what_the_prompt_reports(self, checkpoint: Path) -> None:
        """The logits of a step's samples and those of a prompt's tokens come from different kernels."""
        machine, own = Machine(checkpoint), tokens(20)
        (*_, reported), _ = in_chunks(machine, own, [20])
        sequence = machine.sequence(own)
        machine.runner.launch([sequence.part(18, reported=False)]).wait()
        drawn = machine.runner.launch([sequence.part(1, DRAWN, reported=False)]).wait()
        assert drawn.logprobs[0][0].top_ids == reported.top_ids
        assert drawn.logprobs[0][0].top_logprobs == reported.top_logprobs


def test_the_engine_gives_a_request_the_same_bits_whatever_happens_to_it(checkpoint: Path) -> None:
    """Alone; then among others that come later, in small chunks, with prefix hits, in a cache that is too small."""
    kernels = InvariantKernels(CPU)
    model = load_model(checkpoint, torch.float16, kernels)
    beginning = tokens(17, seed=9)
    prompts = [beginning + tokens(9 + 3 * seed, seed) for seed in range(2)]

    def harness(num_blocks: int, **options: Any) -> Harness:
        return Harness(
            model,
            num_blocks=num_blocks,
            runner=start(model, poisoned_cache(model, num_blocks, BLOCK_SIZE), kernels, (4,), 4),
            **options,
        )

    def run(engine: Harness, some: Sequence[list[int]], arrivals: Sequence[int] | None = None) -> list[tuple]:
        sequences = [
            EngineSequence(key=key, token_ids=list(prompt), max_tokens=MAX_TOKENS, sampling=PLAIN)
            for key, prompt in enumerate(some)
        ]
        engine.run(sequences, arrivals)
        return [(new_tokens(sequence), engine.reports[sequence].logprobs) for sequence in sequences]

    (alone,) = run(harness(8), prompts[1:])
    crowded = harness(4, max_num_batched_tokens=16, max_num_seqs=4, prefix_caching=True, overlap=True, typical_output=1)
    assert run(crowded, prompts, arrivals=[0, 2])[1] == alone
    assert crowded.stats.preemptions > 0
    assert crowded.stats.cached_tokens > 0
