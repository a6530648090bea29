"""Memory plans of small networks on a CPU."""

from typing import Any

import torch

from persimmon.model.config import PersimmonConfig
from persimmon.model.memory import GIB, MemoryPlan, plan_memory


def plan(config: PersimmonConfig, **changes: Any) -> MemoryPlan:
    """The plan for a GiB, float32 and small steps, but for what is given otherwise."""
    arguments: dict[str, Any] = {
        "available": GIB,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "block_size": 16,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "max_model_len": None,
        "kv_cache_bytes": None,
    }
    return plan_memory(config, **(arguments | changes))
