"""Which kernels the first seconds of serving compile, and which steps after the warm-up compile yet others.

Runs the server's own warm-up, then steps of many kinds, on a network of meta tensors; prints what Triton would compile
for sm_90 before and after, for each kind of server, as JSON.  Nothing is compiled: that every kernel can be is another
test's subject, and here it takes a minute.  Needs a process of its own:

    TRITON_INTERPRET=0 python -m tests.model.serving_compilations
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from triton import knobs
from triton.runtime.jit import JitFunctionInfo

from persimmon.kernels.fused import FusedKernels
from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.graphs import Record
from persimmon.model.kv_cache import KVCache
from persimmon.model.memory import MemoryPlan
from persimmon.model.persimmon import Persimmon
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PooledStates, PromptLogprobs, Report, Runner, SequenceInput
from persimmon.model.token_counts import TokenCounts
from persimmon.server.config import Settings
from persimmon.server.engine.loading import _graph_sizes, _limits, warm_up_steps
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


def make_runner(settings: Settings, config: PersimmonConfig) -> MetaRunner:
    """As the server makes it, on a GPU that is not there."""
    kernels = FusedKernels(META)
    executor = MetaExecutor(kernels, _graph_sizes(settings, config))
    executor.reserve(_limits(settings, config, MAX_MODEL_LEN))
    tensors = ((name, torch.empty(shape, device=META)) for name, shape in expected_shapes(config).items())
    model = Persimmon(config, tensors, torch.float16, META, kernels)
    cache = KVCache.allocate(config, NUM_BLOCKS, BLOCK_SIZE, torch.float16, META)
    return MetaRunner(executor.start(model, cache))


def random_step(dice: random.Random, most: int, config: PersimmonConfig) -> list[SequenceInput]:
    """Decodes, prompts or both, short and long, of every kind of draw and report."""
    decodes = dice.choice([0, 1, 2, 3, 16, 48, dice.randint(1, most)])
    chunks = dice.choice([0, 1, 1, 2, min(8, most)])
    kinds = dice.choice([PLAIN, PLAIN, PLAIN + ADJUSTED])
    batch: list[SequenceInput] = []
    sequences = max(1, min(decodes + chunks, most))
    room = most - sequences  # for further samples of their prompts
    for index in range(sequences):
        count = 1 if index < decodes else dice.choice([1, 5, 16, 17, 64, 65, dice.randint(1, 900)])
        start = dice.choice([0, 1, 255, 256, dice.randint(0, MAX_MODEL_LEN - count)])
        table = range(-(-(start + count) // BLOCK_SIZE))
        samplings: list[RowSampling] = []
        if config.generates and (count == 1 or dice.random() < 0.5):
            forks = dice.choice([0, 0, min(2, room)])
            room -= forks
            samplings = [dice.choice(kinds)] * (1 + forks)
        report = random_report(dice, count, config) if index >= decodes else None
        batch.append(SequenceInput([0] * count, start, table, samplings, report))
    return batch


def random_report(dice: random.Random, count: int, config: PersimmonConfig) -> Report | None:
    if dice.random() < 0.5:
        return None
    first = dice.randrange(count)
    if config.generates and dice.random() < 0.5:
        return PromptLogprobs(first, [0] * (count - first), dice.choice([0, 5]))
    return PooledStates(range(first, count), dice.random() < 0.5, not config.generates and dice.random() < 0.5)


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


SERVERS: dict[str, tuple[Settings, Architecture]] = {
    "default": (Settings(), GENERATOR.architecture),
    "eager": (Settings(enforce_eager=True, max_num_seqs=1), GENERATOR.architecture),
    "few": (Settings(max_num_seqs=8), GENERATOR.architecture),
    "classifier": (Settings(), Architecture.TOKEN_CLASSIFICATION),
}


def compilations(settings: Settings, architecture: Architecture) -> dict[str, list[str]]:
    labels = () if architecture == GENERATOR.architecture else ("calm", "glad", "sad")
    config = replace(GENERATOR, architecture=architecture, labels=labels)
    plan = MemoryPlan(0, 0, 0, 0, 0, NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN)
    compiled: dict[str, str] = {}

    def note(*, key: str, fn: JitFunctionInfo, **_: object) -> bool:
        compiled.setdefault(f"{fn.module} {fn.name} {key}", fn.name)
        return True  # as if another had compiled it

    with launches_compile(90), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        runner = make_runner(settings, config)
        for batch in warm_up_steps(plan, settings, config, compiles=True):
            runner.run(batch)
        warm = len(compiled)
        dice = random.Random(0)
        for _ in range(STEPS):
            runner.run(random_step(dice, settings.max_num_seqs, config))
    names = list(compiled.values())
    return {"warm-up": names[:warm], "serving": names[warm:]}


def main() -> None:
    print(json.dumps({name: compilations(*server) for name, server in SERVERS.items()}))


if __name__ == "__main__":
    main()
