"""Which kernels the first seconds of serving compile, and which steps after the warm-up compile yet others.

Runs the server's own warm-up, then steps of many kinds, on a network of meta tensors; prints what Triton would compile
for sm_90 before and after, for each kind of server, as JSON.  Nothing is compiled: that every kernel can be is another
test's subject, and here it takes a minute.  Needs a process of its own:

    TRITON_INTERPRET=0 python -m tests.model.serving_compilations
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from triton import knobs
from triton.runtime.jit import JitFunctionInfo

from persimmon.kernels.cache_types import EIGHT_BIT_CACHES
from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.invariant import InvariantKernels
from persimmon.kernels.quantized import Bits, QuantizedMatrix
from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import Architecture, PersimmonConfig, VisionConfig
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.graphs import Record
from persimmon.model.kv_cache import KVCache
from persimmon.model.leftovers import EMBEDDING
from persimmon.model.memory import MemoryPlan
from persimmon.model.patches import PatchSpan
from persimmon.model.persimmon import Persimmon, is_matrix
from persimmon.model.rope_scaling import RopeScaling
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PooledStates, PromptLogprobs, Report, Runner, SequenceInput
from persimmon.model.token_counts import TokenCounts
from persimmon.server.config import Settings
from persimmon.server.engine.loading import warm_up_steps
from persimmon.server.engine.model_setup import graph_sizes, limits_of, max_guesses
from persimmon.server.settings.speculation import SpeculativeConfig
from tests.kernels.ahead_of_time import launches_compile
from tests.model.rows import row_with

T = TypeVar("T")

META = torch.device("meta")
MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS = 2048, 32, 1024
GENERATOR = PersimmonConfig(
    vocab_size=262144,
    hidden_size=4096,
    intermediate_size=16384,
    num_hidden_layers=1,
    num_attention_heads=64,
    max_position_embeddings=16384,
)
SCALING = RopeScaling(kind="dynamic", factor=4.0, original_length=512)
STEPS = 150


class MetaRunner(Runner):
    """Launches everything and computes nothing, so there is nothing to wait for."""

    def run(self, batch: Sequence[SequenceInput]) -> list[int]:
        self.launch(batch)
        return []


class MetaExecutor(FusedExecutor):
    """Has nothing to send to the host."""

    def _send(self, words: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros(words.shape, dtype=words.dtype), None

    def recorder(self) -> Record:
        return launch_once


class NoGraph:
    """Repeats nothing."""

    def replay(self) -> None:
        pass


def launch_once(run: Callable[[], T]) -> tuple[NoGraph, T]:
    return NoGraph(), run()


def tensors_of(config: PersimmonConfig, bits: Bits | None) -> Iterator[tuple[str, torch.Tensor | QuantizedMatrix]]:
    """Of a checkpoint; with bits its layers' matrices are quantized in groups, lm_head and embedding row by row."""
    for name, shape in expected_shapes(config).items():
        tensor = torch.empty(shape, device=META)
        if bits is not None and (is_matrix(name) or name == EMBEDDING):
            own_bits: Bits = 8 if name in (EMBEDDING, "lm_head.weight") else bits
            group = shape[1] if own_bits == 8 else 128
            numbers = torch.empty(
                shape[0], shape[1] * own_bits // 8, dtype=torch.int8 if own_bits == 8 else torch.uint8, device=META
            )
            scales = torch.empty(shape[0], shape[1] // group, dtype=torch.float16, device=META)
            yield name, QuantizedMatrix(numbers, scales, own_bits, group)
        else:
            yield name, tensor


def make_runner(settings: Settings, config: PersimmonConfig, bits: Bits | None = None) -> MetaRunner:
    """As the server makes it, on a GPU that is not there."""
    kernels = (InvariantKernels if settings.batch_invariant else FusedKernels)(META)
    executor = MetaExecutor(
        kernels, graph_sizes(settings, config), guesses=max_guesses(settings.speculative_config, config)
    )
    model = Persimmon(config, tensors_of(config, bits), torch.float16, META, kernels)
    executor.reserve(limits_of(settings, config, _max_model_len(settings), quantized=bits is not None))
    cache_dtype = EIGHT_BIT_CACHES.get(settings.kv_cache_dtype, torch.float16)
    cache = KVCache.allocate(config, NUM_BLOCKS, BLOCK_SIZE, cache_dtype, META)
    return MetaRunner(executor.start(model, cache))


def random_step(dice: random.Random, settings: Settings, config: PersimmonConfig) -> list[SequenceInput]:
    """Decodes, prompts or both, short and long, of every kind of draw and report; some decodes have guesses."""
    most, longest = settings.max_num_seqs, _max_model_len(settings)
    decodes = dice.choice([0, 1, 2, 3, 16, 48, dice.randint(1, most)])
    chunks = dice.choice([0, 1, 1, 2, min(8, most)])
    kinds = dice.choice([PLAIN, PLAIN, PLAIN + ADJUSTED])
    batch: list[SequenceInput] = []
    sequences = max(1, min(decodes + chunks, most))
    room = most - sequences  # for further samples of their prompts
    for index in range(sequences):
        count = 1 if index < decodes else min(longest - 1, dice.choice([1, 5, 16, 17, 64, 65, dice.randint(1, 900)]))
        start = min(longest - count, dice.choice([0, 1, 255, 256, dice.randint(0, longest - count)]))
        table = range(-(-(start + count) // BLOCK_SIZE))
        samplings: list[RowSampling] = []
        if config.generates and (count == 1 or dice.random() < 0.5):
            forks = dice.choice([0, 0, min(2, room)])
            room -= forks
            samplings = [dice.choice(kinds)] * (1 + forks)
        report = random_report(dice, count, config) if index >= decodes else None
        # Of a prompt that goes on behind its chunk, the angles may be those of its length.
        limit = config.rope_limit or 0
        prompt_length = limit + 1 if not samplings and start + count < limit else 0
        patches = random_patches(dice, count, config)
        batch.append(SequenceInput([0] * count, start, table, samplings, report, prompt_length, patches))
    if settings.speculative_config is not None and chunks == 0 and dice.random() < 0.5:
        return [with_guesses(item, dice.choice([0, 1, 4])) for item in batch[:12]]
    return batch


def with_guesses(item: SequenceInput, guesses: int) -> SequenceInput:
    """A single token with guesses behind it, as far as its blocks hold them, drawn at all of them."""
    guesses = min(guesses, len(item.block_table) * BLOCK_SIZE - item.start - 1)
    if len(item.samplings) != 1:
        return item
    return replace(item, token_ids=[0] * (1 + guesses), samplings=list(item.samplings) * (1 + guesses), guesses=guesses)


def random_report(dice: random.Random, count: int, config: PersimmonConfig) -> Report | None:
    if dice.random() < 0.5:
        return None
    first = dice.randrange(count)
    if config.generates and dice.random() < 0.5:
        return PromptLogprobs(first, [0] * (count - first), dice.choice([0, 5]))
    return PooledStates(range(first, count), dice.random() < 0.5, not config.generates and dice.random() < 0.5)


def random_patches(dice: random.Random, count: int, config: PersimmonConfig) -> list[PatchSpan]:
    if config.vision is None or dice.random() < 0.5:
        return []
    first = dice.randrange(count)
    return [PatchSpan(first, np.zeros((dice.randint(1, count - first), config.vision.patch_numbers), np.uint8))]


def token_counts(prompt: int, output: int) -> TokenCounts:
    counts = TokenCounts(range(prompt))
    for token_id in range(output):
        counts.append(token_id)
    return counts


ALL_ALLOWED = np.full(GENERATOR.vocab_size // 32, -1, dtype=np.int32)
PLAIN = [row_with(), row_with(temperature=1.0), row_with(temperature=1.0, top_k=5)]
ADJUSTED = [
    row_with(seen=token_counts(16, 0), repetition_penalty=1.5),
    row_with(temperature=1.0, seen=token_counts(5, 3), presence_penalty=1.0, frequency_penalty=0.5, logprobs=0),
    row_with(temperature=1.0, top_p=0.5, logit_bias={7: 1.0, 16: -1.0}, banned=(1, 2)),
    row_with(allowed=lambda: ALL_ALLOWED, logprobs=20),
]


GUESSES = SpeculativeConfig.from_json('{"method": "ngram", "num_speculative_tokens": 4}')

BITS: dict[str, Bits] = {"int4": 4}
"""Of servers with quantized weights."""

SERVERS: dict[str, tuple[Settings, dict[str, Any]]] = {
    "default": (Settings(speculative_config=GUESSES), {}),
    "eager": (Settings(enforce_eager=True, max_num_seqs=1, speculative_config=GUESSES), {}),
    "int8 cache": (Settings(max_num_seqs=8, kv_cache_dtype="int8"), {}),
    "batch-invariant": (Settings(batch_invariant=True), {}),
    "int4": (Settings(max_num_seqs=66), {}),
    "short": (Settings(enforce_eager=True, max_num_seqs=32, max_model_len=40), {}),
    "long prompts": (Settings(max_num_seqs=8), {"rope_scaling": SCALING, "max_position_embeddings": 512}),
    "images": (Settings(max_num_seqs=8), {"vision": VisionConfig()}),
    "images, batch-invariant": (Settings(max_num_seqs=8, batch_invariant=True), {"vision": VisionConfig()}),
    "classifier": (Settings(), {"architecture": Architecture.TOKEN_CLASSIFICATION, "labels": ("calm", "glad", "sad")}),
}
"""By name, what was asked for and how the network differs from GENERATOR."""


def _max_model_len(settings: Settings) -> int:
    return settings.max_model_len or MAX_MODEL_LEN


def compilations(settings: Settings, changes: dict[str, Any], bits: Bits | None) -> dict[str, list[str]]:
    config = replace(GENERATOR, **changes)
    plan = MemoryPlan(0, 0, 0, 0, 0, NUM_BLOCKS, BLOCK_SIZE, _max_model_len(settings))
    compiled: dict[str, str] = {}

    def note(*, key: str, fn: JitFunctionInfo, **_: object) -> bool:
        compiled.setdefault(f"{fn.module} {fn.name} {key}", fn.name)
        return True  # as if another had compiled it

    with launches_compile(90), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        runner = make_runner(settings, config, bits)
        for batch in warm_up_steps(plan, settings, config, compiles=True):
            runner.run(batch)
        warm = len(compiled)
        dice = random.Random(0)
        for _ in range(STEPS):
            runner.run(random_step(dice, settings, config))
    names = list(compiled.values())
    return {"warm-up": names[:warm], "serving": names[warm:]}


def main() -> None:
    print(json.dumps({name: compilations(*server, BITS.get(name)) for name, server in SERVERS.items()}))


if __name__ == "__main__":
    main()
