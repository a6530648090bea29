"""The memory plan: its sums, its errors, and its estimate against what a step allocates."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from persimmon import kernels
from persimmon.kernels import QuantizedFormat, reference
from persimmon.model.checkpoint import dummy_tensors, expected_shapes
from persimmon.model.config import Architecture, PersimmonConfig, VisionConfig
from persimmon.model.kv_cache import KVCache, block_bytes
from persimmon.model.memory import GIB, MemoryPlan, MemoryPlanError, activation_bytes, available_memory
from persimmon.model.memory_limits import MemoryLeft
from persimmon.model.patches import PatchSpan
from persimmon.model.persimmon import Persimmon
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PooledStates, PromptLogprobs, SequenceInput
from persimmon.model.token_counts import TokenCounts
from tests.engine_harness import runner_of
from tests.model import memory_plans
from tests.model.forward_pass import hidden_states
from tests.model.rows import changed, row_with

CPU = torch.device("cpu")
GPU = torch.device("cuda")
MIB = 1 << 20

PERSIMMON_8B = PersimmonConfig(
    vocab_size=262144,
    hidden_size=4096,
    intermediate_size=16384,
    num_hidden_layers=36,
    num_attention_heads=64,
    max_position_embeddings=16384,
)
SMALL = PersimmonConfig(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=4096,
)
NUM_LABELS = 1000
# With the numbers of their heads.
CLASSIFIERS = {
    Architecture.SEQUENCE_CLASSIFICATION: NUM_LABELS * SMALL.hidden_size,
    Architecture.TOKEN_CLASSIFICATION: NUM_LABELS * (SMALL.hidden_size + 1),
}


def classifier(architecture: Architecture) -> PersimmonConfig:
    return replace(SMALL, architecture=architecture, labels=tuple(map(str, range(NUM_LABELS))))


def plan(config: PersimmonConfig = SMALL, **changes: Any) -> MemoryPlan:
    return memory_plans.plan(config, **changes)


class TestPlan:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("device", [CPU, GPU], ids=str)
    @pytest.mark.parametrize("available", [64 * MIB, 200 * MIB, 4 * GIB])
    def test_parts_fit_into_what_is_available(self, available: int, device: torch.device, dtype: torch.dtype) -> None:
        made = plan(available=available, device=device, dtype=dtype)
        assert made.available == available
        assert made.weights + made.activations + made.kv_cache <= available
        assert made.kv_cache == made.num_blocks * made.block_bytes
        assert made.kv_tokens == made.num_blocks * 16
        assert 1 <= made.max_model_len <= made.kv_tokens

    def test_persimmon_8b_has_the_known_sizes(self) -> None:
        made = plan(PERSIMMON_8B, available=80 * GIB, device=GPU, dtype=torch.float16)
        # The norms' numbers take four bytes each.
        assert made.weights == 2 * (9_397_175_296 + 36 * (2 * 2 * 4096 + 2 * 2 * 64) + 2 * 4096)
        assert made.block_bytes == 16 * 589_824
        assert made.max_model_len == 16384

    def test_weights_are_the_model_s(self) -> None:
        tensors = dummy_tensors(SMALL, torch.float32, CPU, 0)
        assert plan().weights == sum(tensor.nbytes for _, tensor in tensors)

    def test_tied_embeddings_are_counted_once(self) -> None:
        table = SMALL.vocab_size * SMALL.hidden_size * 4
        assert plan(replace(SMALL, tie_word_embeddings=True)).weights == plan().weights - table

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_classifiers_head_takes_four_bytes_a_number(self, dtype: torch.dtype) -> None:
        table = SMALL.vocab_size * SMALL.hidden_size * dtype.itemsize
        for architecture, numbers in CLASSIFIERS.items():
            made = plan(classifier(architecture), dtype=dtype)
            assert made.weights == plan(dtype=dtype).weights - table + 4 * numbers

    @pytest.mark.parametrize("block_size", [16, 32, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
    def test_block_bytes_are_what_the_cache_allocates(self, dtype: torch.dtype, block_size: int) -> None:
        cache = KVCache.allocate(SMALL, 5, block_size, dtype, CPU)
        allocated = sum(tensor.nbytes for tensor in cache.tensors)
        assert allocated == 5 * block_bytes(SMALL, block_size, dtype)

    def test_a_gpu_gives_the_cache_all_that_is_left(self) -> None:
        made = plan(device=GPU)
        assert 0 <= GIB - made.weights - made.activations - made.kv_cache < made.block_bytes

    def test_a_cpu_gives_the_cache_room_for_every_sequence_and_no_more(self) -> None:
        made = plan(available=64 * GIB, max_model_len=1000, max_num_seqs=3)
        assert made.num_blocks == 3 * 63

    def test_a_cpu_gives_the_cache_at_most_a_quarter_of_the_memory(self) -> None:
        made = plan(max_num_seqs=1000, available=2 * GIB)
        assert GIB // 2 - made.block_bytes < made.kv_cache <= GIB // 2

    def test_a_cpu_gives_a_small_model_no_more_than_a_small_cache(self) -> None:
        made = plan(max_num_seqs=100_000, available=64 * GIB)
        assert GIB - made.block_bytes < made.kv_cache <= GIB

    def test_a_cpu_gives_a_large_model_up_to_four_times_its_weights(self) -> None:
        made = plan(PERSIMMON_8B, max_num_seqs=1000, available=1024 * GIB)
        assert 0 <= 4 * made.weights - made.kv_cache < made.block_bytes

    def test_a_cpu_gives_the_cache_room_for_one_longest_sequence(self) -> None:
        made = plan(replace(SMALL, max_position_embeddings=2**20), available=64 * GIB)
        assert made.kv_tokens == made.max_model_len == 2**20
        assert made.kv_cache > GIB

    @pytest.mark.parametrize("device", [CPU, GPU], ids=str)
    def test_step_buffers_leave_less_for_the_cache(self, device: torch.device) -> None:
        fixed = plan().weights + plan().activations
        made = plan(device=device, available=fixed + 12 * MIB, step_buffers=10 * MIB)
        assert made.step_buffers == 10 * MIB
        assert 0 <= 2 * MIB - made.kv_cache < made.block_bytes

    def test_an_explicit_cache_is_as_large_as_asked(self) -> None:
        made = plan(kv_cache_bytes=10 * MIB)
        assert 10 * MIB - made.block_bytes < made.kv_cache <= 10 * MIB


class TestMaxModelLen:
    def test_is_what_the_model_was_trained_for(self) -> None:
        assert plan().max_model_len == 4096

    def test_shrinks_to_what_the_cache_holds_when_nobody_chose_it(self) -> None:
        made = plan(kv_cache_bytes=10 * plan().block_bytes)
        assert made.num_blocks == 10
        assert made.max_model_len == 160

    def test_is_what_was_asked_for(self) -> None:
        assert plan(max_model_len=1000).max_model_len == 1000
        assert plan(max_model_len=160, kv_cache_bytes=10 * plan().block_bytes).max_model_len == 160


class TestErrors:
    """One line with the numbers and the flag to change."""

    @staticmethod
    def error(config: PersimmonConfig = SMALL, **changes: Any) -> str:
        with pytest.raises(MemoryPlanError) as caught:
            plan(config, **changes)
        message = str(caught.value)
        assert "\n" not in message
        assert "-0." not in message
        return message

    def test_step_buffers_larger_than_what_is_left(self) -> None:
        assert "step buffers 1.00 GiB" in self.error(step_buffers=GIB)

    def test_more_tokens_than_the_model_was_trained_for(self) -> None:
        message = self.error(max_model_len=4097)
        assert "--max-model-len is 4097" in message
        assert "give at most 4096" in message

    def test_more_tokens_than_the_cache_holds(self) -> None:
        message = self.error(max_model_len=161, kv_cache_bytes=10 * plan().block_bytes)
        assert "--max-model-len is 161" in message
        assert "holds 160 tokens" in message
        assert "lower it to 160" in message
        assert f"set --kv-cache-memory to {11 * plan().block_bytes}" in message

    def test_more_tokens_than_the_cache_holds_in_its_type(self) -> None:
        asked: dict[str, Any] = {"max_model_len": 400, "kv_cache_bytes": 10 * plan().block_bytes}
        assert "set --kv-cache-dtype to int8" in self.error(**asked, cache_dtypes=[torch.float32, torch.int8])
        assert "--kv-cache-dtype" not in self.error(**asked, cache_dtypes=[torch.float32, torch.float16])
        less = asked | {"max_model_len": 300}
        assert "set --kv-cache-dtype to float16" in self.error(**less, cache_dtypes=[torch.float32, torch.float16])
        assert plan(**asked, cache_dtypes=[torch.int8, torch.float32]).max_model_len == 400

    def test_a_larger_cache_is_not_advised_where_there_is_no_memory_for_it(self) -> None:
        made = plan()
        available = made.weights + made.activations + 20 * made.block_bytes
        message = self.error(max_model_len=4096, available=available)
        assert "lower it to " in message
        assert "--kv-cache-memory" not in message

    @pytest.mark.parametrize("advised", [r"lower it to (\d+)", r"set --kv-cache-memory to (\d+)"])
    def test_advice_on_the_length_is_accepted(self, advised: str) -> None:
        found = re.search(advised, self.error(max_model_len=4096, kv_cache_bytes=3 * MIB))
        assert found is not None
        changes: dict[str, Any] = {"max_model_len": 4096, "kv_cache_bytes": 3 * MIB}
        changes["kv_cache_bytes" if "cache" in advised else "max_model_len"] = int(found[1])
        assert plan(**changes).max_model_len == changes["max_model_len"]

    def test_a_cache_larger_than_the_memory(self) -> None:
        message = self.error(kv_cache_bytes=2 * GIB)
        assert "--kv-cache-memory is 2.00 GiB, but of 1.00 GiB available" in message
        found = re.search(r"give at most (\d+)$", message)
        assert found is not None
        plan(kv_cache_bytes=int(found[1]))

    def test_a_cache_smaller_than_a_block(self) -> None:
        message = self.error(kv_cache_bytes=1000)
        assert "--kv-cache-memory is 1000 B, but one block of 16 tokens takes 32.0 KiB" in message
        found = re.search(r"give at least (\d+)", message)
        assert found is not None
        assert plan(kv_cache_bytes=int(found[1])).num_blocks == 1

    @pytest.mark.parametrize("device", [CPU, GPU], ids=str)
    def test_weights_larger_than_the_memory(self, device: torch.device) -> None:
        message = self.error(PERSIMMON_8B, available=16 * GIB, device=device, dtype=torch.float16)
        assert "weights 17.50 GiB" in message
        assert "16.00 GiB available" in message
        assert message.endswith("give the server more memory, or use --quantization int8")

    def test_numbers_of_32_bits_may_be_narrower(self) -> None:
        assert "16-bit --dtype" in self.error(PERSIMMON_8B, available=16 * GIB)
        assert "--dtype" not in self.error(
            PERSIMMON_8B, available=12 * GIB, weight_bytes=lambda shape, stored: 2 * math.prod(shape)
        )

    @pytest.mark.parametrize(
        ("bits", "advice"), [(8, "or use --quantization int4"), (4, "give the server more memory")]
    )
    def test_fewer_bits_are_advised_while_there_are_any(self, bits: Literal[4, 8], advice: str) -> None:
        form = QuantizedFormat(bits, None if bits == 8 else 32, torch.float16)
        names = [name for name, shape in expected_shapes(PERSIMMON_8B).items() if len(shape) == 2]
        message = self.error(
            PERSIMMON_8B, available=4 * GIB, weight_bytes=reference.weight_bytes, stored=dict.fromkeys(names, form)
        )
        assert message.endswith(advice)

    def test_nothing_left_for_the_cache(self) -> None:
        made = plan()
        message = self.error(available=made.weights + made.activations + made.block_bytes - 1)
        assert "not enough memory" in message
        assert plan(available=made.weights + made.activations + made.block_bytes).num_blocks == 1

    def test_what_limits_the_memory_is_named(self) -> None:
        assert "(left of a cup)" in self.error(available=MIB, limited_by="left of a cup")

    @given(
        available=st.integers(6 * MIB, 400 * MIB),
        length=st.integers(2, 4096),
        max_num_seqs=st.integers(1, 512),
        tokens=st.integers(1, 8192),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def test_advice_on_the_step_is_accepted(
        self, available: int, length: int, max_num_seqs: int, tokens: int, dtype: torch.dtype
    ) -> None:
        asked: dict[str, Any] = {
            "available": available,
            "dtype": dtype,
            "max_num_seqs": min(max_num_seqs, tokens),
            "max_num_batched_tokens": tokens,
        }
        config = replace(SMALL, max_position_embeddings=length)
        message = ""
        try:
            plan(config, **asked)
        except MemoryPlanError as error:
            message = str(error)
        advised = re.findall(r"--(max-[\w-]+) to (\d+)", message)
        assert bool(message) == bool(advised or "give the server more memory" in message)
        if advised:
            plan(config, **asked | {name.replace("-", "_"): int(number) for name, number in advised})


def test_a_cpu_has_what_is_left_less_what_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    left = MemoryLeft(GIB, 2 * GIB, Path("/group"))
    monkeypatch.setattr("persimmon.model.memory.memory_left", lambda: left)
    assert available_memory(CPU, 0.9) == left
    assert available_memory(CPU, 0.9, reserved=MIB) == replace(left, bytes=GIB - MIB)
    assert available_memory(CPU, 0.9, reserved=2 * GIB).bytes == 0


CHANGED = row_with(
    seen=TokenCounts(range(SMALL.vocab_size)),
    frequency_penalty=1.0,
    logit_bias=dict.fromkeys(range(SMALL.vocab_size), 1.0),
    banned=tuple(range(100)),
    allowed=lambda: np.full(-(-SMALL.vocab_size // 32), -1, dtype=np.int32),
    logprobs=20,
)
"""Changes all that can be changed, for every token that there is."""


class TestActivations:
    @pytest.mark.parametrize(
        ("sequences", "tokens", "context", "sampling"),
        [
            pytest.param(1, 512, 0, row_with(), id="a prompt"),
            pytest.param(1, 512, 2048, row_with(), id="a chunk after a long context"),
            pytest.param(1, 64, 4032, row_with(), id="a small chunk after the longest context"),
            pytest.param(64, 64, 300, row_with(), id="decodes"),
            pytest.param(64, 64, 10, row_with(temperature=1.0), id="draws"),
            pytest.param(64, 64, 10, row_with(temperature=1.0, top_p=0.9, min_p=0.1), id="draws with top-p"),
            pytest.param(32, 512, 500, row_with(temperature=1.0, top_k=5, top_p=0.5), id="everything at once"),
            pytest.param(64, 64, 10, CHANGED, id="changed logits"),
            pytest.param(64, 64, 10, changed(CHANGED, temperature=1.0, top_p=0.9), id="draws from changed logits"),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_estimate_is_not_below_what_a_step_allocates(
        self, dtype: torch.dtype, sequences: int, tokens: int, context: int, sampling: RowSampling
    ) -> None:
        operations = kernels.for_device(CPU)
        model = Persimmon(SMALL, dummy_tensors(SMALL, dtype, CPU, 0), dtype, CPU, operations)
        blocks = list(range(-(-(context + tokens) // 16)))
        cache = KVCache.allocate(SMALL, len(blocks), 16, dtype, CPU)
        for tensor in cache.tensors:
            tensor.zero_()
        # All read and write the same blocks: it is the sizes that count here.
        counts = [1] * (sequences - 1) + [tokens - sequences + 1]
        batch = [SequenceInput([5] * count, context, blocks, (sampling,)) for count in counts]
        runner = runner_of(model, cache, operations)
        runner.run(batch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            runner.run(batch)
        peak = _peak_bytes(profiler)
        assert peak > 0
        assert peak <= activation_bytes(SMALL, dtype, sequences, tokens, context + tokens)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_estimate_is_not_below_what_a_step_with_images_allocates(self, dtype: torch.dtype) -> None:
        config = replace(SMALL, vision=VisionConfig(image_token_id=5))
        operations = kernels.for_device(CPU)
        model = Persimmon(config, dummy_tensors(config, dtype, CPU, 0), dtype, CPU, operations)
        runner = runner_of(model, KVCache.allocate(config, 32, 16, dtype, CPU), operations)
        patches = [PatchSpan(0, np.zeros((512, 2700), np.uint8))]
        batch = [SequenceInput([5] * 512, 0, range(32), (row_with(),), patches=patches)]
        runner.run(batch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            runner.run(batch)
        peak = _peak_bytes(profiler)
        # What is projected at once is most of it.
        assert 256 * 2704 * 4 < peak <= activation_bytes(config, dtype, 1, 512, 512)

    @pytest.mark.parametrize(
        "report",
        [PromptLogprobs(0, [5] * 512, 20), PooledStates(range(512), total=False), PooledStates(range(512), total=True)],
        ids=["log-probabilities", "states", "their sum"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_estimate_is_not_below_what_a_report_of_a_prompt_allocates(
        self, dtype: torch.dtype, report: PromptLogprobs | PooledStates
    ) -> None:
        operations = kernels.for_device(CPU)
        model = Persimmon(SMALL, dummy_tensors(SMALL, dtype, CPU, 0), dtype, CPU, operations)
        cache = KVCache.allocate(SMALL, 32, 16, dtype, CPU)
        runner = runner_of(model, cache, operations)
        batch = [SequenceInput([5] * 512, 0, list(range(32)), (), report)]
        runner.run(batch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            runner.run(batch)
        assert 0 < _peak_bytes(profiler) <= activation_bytes(SMALL, dtype, 1, 512, 512)

    @pytest.mark.parametrize("architecture", CLASSIFIERS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_estimate_is_not_below_what_a_classifier_allocates(
        self, architecture: Architecture, dtype: torch.dtype
    ) -> None:
        tokens, config = 512, classifier(architecture)
        model = Persimmon(config, dummy_tensors(config, dtype, CPU, 0), dtype, CPU, kernels.for_device(CPU))
        token_ids = [5] * tokens
        rows = slice(None) if architecture is Architecture.TOKEN_CLASSIFICATION else slice(-1, None)
        model.scores(hidden_states(model, token_ids)[rows])
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model.scores(hidden_states(model, token_ids)[rows])
        # The cache is made within what is measured.
        cache = tokens // 16 * block_bytes(config, 16, dtype)
        assert 0 < _peak_bytes(profiler) - cache <= activation_bytes(config, dtype, 1, tokens, tokens)

    def test_a_classifiers_vocabulary_takes_nothing(self) -> None:
        for architecture in CLASSIFIERS:
            config = classifier(architecture)
            larger = replace(config, vocab_size=100 * config.vocab_size)
            assert activation_bytes(larger, torch.half, 8, 64, 64) == activation_bytes(config, torch.half, 8, 64, 64)

    def test_rows_that_are_scored_are_counted(self) -> None:
        def labels_bytes(architecture: Architecture) -> int:
            config = classifier(architecture)
            half = replace(config, labels=config.labels[: NUM_LABELS // 2])
            return activation_bytes(config, torch.half, 8, 64, 64) - activation_bytes(half, torch.half, 8, 64, 64)

        assert labels_bytes(Architecture.SEQUENCE_CLASSIFICATION) == 8 * NUM_LABELS // 2 * 4
        assert labels_bytes(Architecture.TOKEN_CLASSIFICATION) == 64 * NUM_LABELS // 2 * 4


def _peak_bytes(profiler: Any) -> int:
    """The most that was allocated at once, beyond what was there before."""
    allocated = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak
