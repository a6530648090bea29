"""What the engine process gets: how it loads the model, plans memory and schedules."""

from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, field_validator

from persimmon.server.settings.logs import LogSettings
from persimmon.server.settings.section import setting
from persimmon.server.settings.speculation import SpeculativeConfig

MAX_BODY_BYTES = 32 * 2**20
"""Default limit of a request's body: a text of 16,384 tokens is some 100 KB, and a request may hold many texts."""

BODIES_TOGETHER = 4
"""The longest bodies that an API worker may receive at once; of shorter ones, as many as take the same memory."""


class EngineSettings(LogSettings):
    """Settings of the engine process."""

    load_format: Literal["auto", "dummy"] = setting(
        "auto", "auto reads the checkpoint's weights; dummy makes random ones, to measure speed.", "model"
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = setting(
        "auto",
        "Type of activations. auto on a GPU: the checkpoint's own 16-bit type. auto on a CPU: "
        "bfloat16 for a bfloat16 checkpoint if the processor has instructions for it; otherwise float32, which is "
        "exact, and in which 16-bit weights stay 16 bits.",
        "model",
    )
    quantization: Literal["none", "int8", "int4"] = setting(
        "none",
        "Quantize the weights while they are loaded: 8 bits with a scale for each output, or 4 bits with a scale for "
        "each group of inputs; the embedding and lm_head have 8 bits in both.",
        "model",
    )
    quantization_group_size: Literal[32, 128] = setting(
        32,
        "Inputs that share a scale with --quantization int4. 128 takes 8% less memory for the layers, and is less "
        "accurate.",
        "model",
    )
    quantized_activations: Literal["auto", "float", "int8"] = setting(
        "auto",
        "What 8-bit and 4-bit weights are multiplied by on a CPU. int8 rounds activations to 8 bits, with a scale for "
        "at most 64 of them, and multiplies integers: faster, at a small loss. float leaves them as they are: a "
        "quantized checkpoint gives the tokens that Transformers gives. auto is int8.",
        "model",
    )
    embedding_table: Literal["memory", "file"] = setting(
        "memory",
        "Where a CPU looks the embeddings of tokens up. file: in the checkpoint's file, as it stores them, also with "
        "--quantization. A row takes memory once a prompt or an answer has used it, and the system may take that back. "
        "While the server runs the file must not be changed in place: if it becomes shorter, the engine dies.",
        "model",
    )
    seed: int = setting(
        0,
        "Seed of dummy weights and of requests without a seed.",
        "model",
        "N",
        ge=0,
        lt=2**63,
    )

    max_body_size: ByteSize = setting(
        ByteSize(MAX_BODY_BYTES),
        "Maximum size of a request body, before and after decompression; larger ones get a 413. All bodies that an API "
        "worker is receiving may take four times this; beyond that requests get a 429.",
        "http",
        "SIZE",
        gt=0,
    )
    api_workers: int = setting(
        1,
        "Processes that answer HTTP. One streams tens of thousands of tokens a second from one core.",
        "http",
        "N",
        ge=1,
        le=256,
    )

    tensor_parallel_size: int = setting(
        1,
        "Processes (ranks) that share the network: each has an equal part of the attention heads, the MLP and the "
        "vocabulary, and of the KV cache. Must divide the heads and intermediate_size. Each rank needs its own GPU "
        "(not yet run on GPUs), or at least a core: they divide those of the engine.",
        "model",
        "N",
        ge=1,
        le=64,
    )
    max_model_len: int | None = setting(
        None,
        "Maximum length of a sequence, prompt and answer together. Default: the model's context length (times the "
        "factor of its RoPE scaling), or what the KV cache holds if that is less.",
        "engine",
        "TOKENS",
        ge=2,
    )
    max_num_seqs: int = setting(
        256,
        "Maximum sequences that run at once; more wait. Unless set, it is lowered to --max-num-batched-tokens.",
        "engine",
        "N",
        ge=1,
        le=65536,
    )
    max_num_batched_tokens: int = setting(
        2048,
        "Token budget of one step: one for each decoding sequence, the rest for prompt chunks. "
        "At least --max-num-seqs; unless set, it is raised to that.",
        "engine",
        "TOKENS",
        ge=1,
    )
    max_itl_ms: float | None = setting(
        None,
        "Limit on the time of a step that runs prompt chunks next to decoding sequences. While more prompts are being "
        "computed than sequences decode, it grows by that ratio; prompts that wait for a place do not count. "
        "Default: 1.75 times the time without prompts.",
        "engine",
        "MILLISECONDS",
        gt=0,
    )
    max_chunks_per_second: float | None = setting(
        None,
        "Limit on the chunks of all streams of an engine together: while N sequences run, a stream gets tokens at most "
        "every N / this many seconds, and then all of that time. Its first token and its end do not wait. Saves "
        "processor time of API workers and proxies. Default: no limit.",
        "engine",
        "N",
        gt=0,
    )
    async_scheduling: Literal["auto", "on", "off"] = setting(
        "auto",
        "Plan and launch each step while the one before it runs. auto: on with a GPU; off on a CPU, where every token "
        "would come one step late.",
        "engine",
    )
    enable_prefix_caching: bool = setting(
        True, "Reuse the KV blocks of prompt prefixes that were seen before.", "engine"
    )
    speculative_config: SpeculativeConfig | None = setting(
        None,
        "Guess the tokens that come next and check several in one step (speculative decoding); answers stay the same, "
        "token for token. auto: as many guesses as pay. off: none. Or JSON in vLLM's spelling: method is ngram (the "
        "last prompt_lookup_max to prompt_lookup_min tokens are looked for in prompt and answer), suffix (as many as "
        "occurred before, up to 32, also in recent answers to the same API key) or auto (suffix, with only as many "
        "guesses as pay); num_speculative_tokens is the maximum number of guesses of a sequence in a step, 16 by "
        "default with auto. Faster where answers repeat their prompts, themselves or each other; with ngram and suffix "
        "slower where guesses are wrong. Default: auto on a CPU, unless --async-scheduling is on.",
        "engine",
        "JSON",
    )
    batch_invariant: bool = setting(
        False,
        "Compute a request's tokens and log-probabilities with the same bits alone, in any batch, from a prefix-cache "
        "hit and after a preemption. On a CPU the C kernels always do; where torch "
        "computes a part, the server does not start. On a GPU the flag makes prompts slower.",
        "engine",
    )

    cuda_graph_sizes: tuple[int, ...] | None = setting(
        None,
        "Batch sizes for which decode steps are captured as CUDA graphs at start, for example 1,2,4,8. A step uses the "
        "next larger size; larger steps run without a graph. At most --max-num-seqs. Default: dense up to "
        "--max-num-seqs. Steps with prompts are captured for up to 512 tokens, and those with guesses for up to 64. "
        "Ignored without a GPU.",
        "gpu",
        "N,N,...",
    )
    enforce_eager: bool = setting(
        False, "Do not capture CUDA graphs: faster start and less memory, but slower decoding.", "gpu"
    )
    allow_old_triton: bool = setting(
        False,
        "Start with a Triton before 3.7.1 on a GPU of compute capability 9.0 or later (H100), where its code can give "
        "wrong results, with a warning instead of an error.",
        "gpu",
    )

    profile_steps: int | None = setting(
        None,
        "Record the first steps with work in torch's profiler: how many. Default: none.",
        "debug",
        "N",
        ge=1,
    )
    profile_dir: Path = setting(
        Path("."),
        "Folder of the file that --profile-steps writes; https://ui.perfetto.dev opens it.",
        "debug",
        "FOLDER",
    )

    queue_timeout: float = setting(
        60.0,
        "Maximum time in the queue; then the request gets a 429. 0 for no limit. Most proxies and clients close a "
        "silent connection after a minute.",
        "load",
        "SECONDS",
        ge=0,
    )

    block_size: Literal[16, 32, 64] = setting(32, "Tokens in one block of the KV cache.", "memory")
    kv_cache_dtype: Literal["auto", "float16", "bfloat16", "int8", "fp8_e4m3"] = setting(
        "auto",
        "Type of the KV cache's keys and values. auto: that of the activations, see --dtype. float16, bfloat16: 16 "
        "bits for a float32 network on a CPU, half the memory to hold and to read; float16 saturates at 65504. int8: 8 "
        "bits with a scale for each token and head, which holds nearly twice the tokens of 16 bits in the same memory, "
        "and four times those of float32. fp8_e4m3: 8 bits without scales, saturating at 448, on a GPU from compute "
        "capability 8.9 on (L4, RTX 40, H100). On a GPU int8 and fp8_e4m3 need a --dtype of 16 bits. Prompts and "
        "answers read what was rounded.",
        "memory",
    )
    kv_cache_memory: ByteSize | None = setting(
        None,
        "Size of the KV cache, of all ranks together, for example 4GiB or 800MB, allocated at start. Default on a GPU: "
        "what "
        "--gpu-memory-utilization leaves. Default on a CPU: room for --max-num-seqs full sequences, but at most a "
        "quarter of the free memory, and at most 1 GiB or four times the weights, whichever is more; never less than "
        "one sequence of the given --max-model-len.",
        "memory",
        "SIZE",
        gt=0,
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "Share of the GPU's memory to use for weights, activations, CUDA graphs and the KV cache.",
        "memory",
        "SHARE",
        gt=0,
        le=1,
    )

    @field_validator("block_size", "quantization_group_size", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        # Flags and variables are text, and the allowed values are numbers.
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @field_validator("speculative_config", mode="before")
    @classmethod
    def _speculation(cls, value: Any) -> Any:
        return SpeculativeConfig.from_json(value) if isinstance(value, str) else value

    @field_validator("cuda_graph_sizes", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return value.replace(",", " ").split() if isinstance(value, str) else value
