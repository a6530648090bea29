"""Which kernels the first seconds of serving compile, and which steps after the warm-up compile yet others.

Runs the server's own warm-up, then steps of many kinds, on a network of meta tensors whose launches are compilations
for sm_90; prints the names of what was compiled before and after, as JSON.  Needs a process of its own:

    TRITON_INTERPRET=0 python -m tests.model.serving_compilations [--enforce-eager]
"""

import argparse
import json
import random

import torch

from kernels import StepLimits
from kernels.fused import FusedKernels
from model.checkpoint import expected_shapes
from model.config import PersimmonConfig
from model.cuda_graphs import DecodeGraphs
from model.fused_sampler import FusedSampler
from model.graph_sizes import default_sizes
from model.kv_cache import KVCache
from model.memory import MemoryPlan
from model.persimmon import Persimmon
from model.runner import PendingTokens, Runner, SequenceInput
from model.sampler import SamplingParams
from server.config import Settings
from server.engine.loading import _warm_up
from tests.kernels.ahead_of_time import launches_compile

META = torch.device("meta")
MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS = 2048, 32, 1024
CONFIG = PersimmonConfig(
    vocab_size=262144,
    hidden_size=4096,
    intermediate_size=16384,
    num_hidden_layers=1,
    num_attention_heads=64,
    max_position_embeddings=16384,
)
STEPS = 150


class MetaRunner(Runner):
    """Launches everything and computes nothing: every token is 0."""

    def _fetch(self, tokens: torch.Tensor) -> PendingTokens:
        return PendingTokens(torch.zeros(tokens.shape, dtype=torch.int64))


def make_runner(settings: Settings) -> MetaRunner:
    """As the server makes it, on a GPU that is not there."""
    kernels = FusedKernels(META)
    kernels.reserve(StepLimits(settings.max_num_seqs, MAX_MODEL_LEN, 64, 64, 4096, 16384, CONFIG.vocab_size))
    tensors = ((name, torch.empty(shape, device=META)) for name, shape in expected_shapes(CONFIG).items())
    model = Persimmon(CONFIG, tensors, torch.float16, META, kernels)
    cache = KVCache.allocate(CONFIG, NUM_BLOCKS, BLOCK_SIZE, torch.float16, META)
    graphs = None
    if not settings.enforce_eager:
        sizes = default_sizes(settings.max_num_seqs)
        graphs = DecodeGraphs(model, cache, kernels, sizes=sizes, max_model_len=MAX_MODEL_LEN)
    runner = MetaRunner(model, cache, kernels, FusedSampler(kernels, model.head), graphs)
    if graphs is not None:
        # What capturing launches.
        for size in sizes:
            runner.run([SequenceInput([0], 0, [0], SamplingParams())] * size)
    return runner


def random_step(dice: random.Random, most: int) -> list[SequenceInput]:
    """Decodes, prompts or both, short and long, some drawn, some from few tokens."""
    decodes = dice.choice([0, 1, 2, 3, 16, 48, dice.randint(1, most)])
    chunks = dice.choice([0, 1, 1, 2, min(8, most)])
    batch = []
    for index in range(max(1, min(decodes + chunks, most))):
        count = 1 if index < decodes else dice.choice([1, 5, 16, 17, 64, 65, dice.randint(1, 900)])
        start = dice.choice([0, 1, 255, 256, dice.randint(0, MAX_MODEL_LEN - count)])
        sampling = dice.choice([SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_k=5)])
        samples = count == 1 or dice.random() < 0.5
        table = range(-(-(start + count) // BLOCK_SIZE))
        batch.append(SequenceInput([0] * count, start, table, sampling if samples else None))
    return batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    given = parser.parse_args()
    settings = Settings(enforce_eager=given.enforce_eager, max_num_seqs=given.max_num_seqs)
    plan = MemoryPlan(0, 0, 0, 0, 0, NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN)
    with launches_compile(90) as compiled:
        runner = make_runner(settings)
        _warm_up(runner, plan, settings, compiles=True)
        warm = len(compiled)
        dice = random.Random(0)
        for _ in range(STEPS):
            runner.run(random_step(dice, settings.max_num_seqs))
    names = [kernel.name for kernel in compiled]
    print(json.dumps({"warm-up": names[:warm], "serving": names[warm:]}))


if __name__ == "__main__":
    main()
