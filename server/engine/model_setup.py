"""What the engine's start decides before any weight is read: device, types, kernels, formats, and their refusals.

Every rank of a network comes to the same decisions by itself; `Agreement` says whether they did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from persimmon import kernels
from persimmon.kernels import QuantizedFormat, QuantizedMatrix, StepLimits
from persimmon.kernels.cache_types import cache_choice, chosen_dtype
from persimmon.model.checkpoint import Checkpoint, expected_shapes
from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.executor import Executor, executor_for
from persimmon.model.graph_sizes import default_sizes
from persimmon.model.identity import Identity, change, identity
from persimmon.model.leftovers import EMBEDDING
from persimmon.model.quantization.scheme import formats_of_config, quantized_formats
from persimmon.model.shard import ONLY, Shard, check_divides, check_groups
from persimmon.server.settings.engine import EngineSettings
from persimmon.server.settings.speculation import SpeculativeConfig


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """A checkpoint whose headers have been read, and how it will be computed.

    Attributes:
        shard: the part of this rank.
        config: the network that the files hold.
        checkpoint: the files; None for dummy weights.
        files: which they were when they were opened.
        device: that computes.
        dtype: of activations.
        kernels: the operations.
        executor: runs them; not started yet.
        speculation: how next tokens are guessed; None for only what grammars force.
        cache_dtypes: the type of the KV cache, and after it the others that could be used.
        table: this rank's rows of the embedding where they stay in their file; else None.
        formats: of the parameters that are quantized while they are loaded, by name.
        stored: the dtype or format that kernels are given each parameter in, by name.
    """

    shard: Shard
    config: PersimmonConfig
    checkpoint: Checkpoint | None
    files: Identity
    device: torch.device
    dtype: torch.dtype
    kernels: kernels.Kernels[Any, Any]
    executor: Executor
    speculation: SpeculativeConfig | None
    cache_dtypes: Sequence[torch.dtype]
    table: torch.Tensor | QuantizedMatrix | None
    formats: Mapping[str, QuantizedFormat]
    stored: Mapping[str, torch.dtype | QuantizedFormat]

    @property
    def quantized(self) -> bool:
        """Whether a parameter is quantized."""
        return any(isinstance(form, QuantizedFormat) for form in self.stored.values())

    @property
    def agreement(self) -> "Agreement":
        """What all ranks must have decided alike."""
        return Agreement(
            files=self.files,
            network=repr(self.config),
            activations=repr(self.dtype),
            cache=repr(self.cache_dtypes[0]),
            weights=repr(sorted((name, str(form)) for name, form in self.stored.items())),
            software=f"torch {torch.__version__}, {type(self.executor).__name__} {getattr(self.kernels, 'build', '')}",
        )

    def limits(self, settings: EngineSettings, max_model_len: int) -> StepLimits:
        """The largest step of this rank.

        Args:
            settings: of the engine.
            max_model_len: maximum tokens of a sequence.
        """
        return limits_of(settings, self.config, max_model_len, self.shard, quantized=self.quantized)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks must have decided alike, each field in words.

    Attributes:
        files: of the checkpoint, see `persimmon.model.identity`.
        network, activations, cache, weights, software: that this rank will compute with.
    """

    files: Identity
    network: str
    activations: str
    cache: str
    weights: str
    software: str

    def difference(self, other: "Agreement") -> str | None:
        """The first thing that another rank has decided otherwise, for people; None where there is none."""
        if (file := change(self.files, other.files)) is not None:
            return f"the checkpoint ({file} in between)"
        for name in (field.name for field in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: {mine} and {theirs}"
        return None


def set_up(settings: EngineSettings, folder: Path, shard: Shard = ONLY) -> ModelSetup:
    """Reads the headers of a checkpoint and decides how it is computed.

    Args:
        settings: of the engine.
        folder: the checkpoint's.
        shard: the part of this rank.

    Raises:
        CheckpointError: the checkpoint is damaged or not Persimmon's, or cannot be divided among the ranks.
        KernelsUnavailableError: this machine cannot compute it, or not as asked.
    """
    device = serving_device(shard)
    if shard.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton launches
    # cuBLAS would otherwise add up split products in 16 bits, which squared ReLU's magnitudes do not survive.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    files = identity(folder)
    config = PersimmonConfig.from_folder(folder)
    check_divides(config, shard.size)
    dtype = choose_dtype(settings.dtype, config.dtype, device, cpu_bfloat16=kernels.cpu_multiplies_bfloat16())
    operations = kernels.for_device(
        device,
        dtype,
        batch_invariant=settings.batch_invariant,
        allow_old_triton=settings.allow_old_triton,
        quantized_activations=settings.quantized_activations,
    )
    cache_dtypes = choose_cache_dtypes(settings.kv_cache_dtype, operations.cache_dtypes(dtype), device)
    speculation = choose_speculation(settings, config, device)
    guesses = max_guesses(speculation, config)
    executor = executor_for(operations, device, graph_sizes(settings, config), guesses=guesses)
    checkpoint = Checkpoint.open(folder, config) if settings.load_format == "auto" else None
    if checkpoint is not None:
        config = checkpoint.config
    check_batch_invariance(settings, config, device)
    table = None
    if checkpoint is not None and settings.embedding_table == "file":
        table = embedding_in_file(checkpoint, operations, dtype, device, shard)
    formats = formats_to_make(settings, config, dtype if checkpoint is None else checkpoint.dtype)
    if table is not None:
        formats.pop(EMBEDDING, None)
    stored: dict[str, torch.dtype | QuantizedFormat] = {} if checkpoint is None else dict(checkpoint.stored)
    for name, kept in (stored | formats).items():
        stored[name] = kept if isinstance(kept, QuantizedFormat) else operations.stored_dtype(kept, dtype)
    check_groups(stored, expected_shapes(config), config, shard.size)
    return ModelSetup(
        shard=shard,
        config=config,
        checkpoint=checkpoint,
        files=files,
        device=device,
        dtype=dtype,
        kernels=operations,
        executor=executor,
        speculation=speculation,
        cache_dtypes=cache_dtypes,
        table=table,
        formats=formats,
        stored=stored,
    )


def serving_device(shard: Shard) -> torch.device:
    """The device that a rank computes on: a GPU of its own, or the CPU.

    Raises:
        KernelsUnavailableError: there are fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if shard.size > gpus:
        raise kernels.KernelsUnavailableError(
            f"--tensor-parallel-size is {shard.size}, but {gpus} GPU{'s are' if gpus > 1 else ' is'} visible, and each "
            f"rank needs its own: give at most {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to serve on the CPU"
        )
    return torch.device("cuda", shard.rank)


def check_batch_invariance(settings: EngineSettings, config: PersimmonConfig, device: torch.device) -> None:
    """Makes sure that with --batch-invariant no product of the network depends on the number of rows.

    Raises:
        KernelsUnavailableError: one does.
    """
    if settings.batch_invariant and config.tie_word_embeddings and device.type == "cpu":
        raise kernels.KernelsUnavailableError(
            "--batch-invariant does not hold on a CPU for a checkpoint with tie_word_embeddings: its lm_head is the "
            "embedding, whose products torch adds up in an order that depends on the number of rows. Serve it without "
            "the flag, or on a GPU"
        )


def embedding_in_file(
    checkpoint: Checkpoint,
    operations: kernels.Kernels[Any, Any],
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = ONLY,
) -> torch.Tensor | QuantizedMatrix:
    """A rank's rows of the embedding for --embedding-table file: see `Checkpoint.mapped_embedding`.

    Raises:
        KernelsUnavailableError: the device or its kernels cannot read it there.
        CheckpointError: it cannot be read there in the form that the file has, or is read whole.
    """
    if device.type != "cpu":
        raise kernels.KernelsUnavailableError(
            "--embedding-table is file, which a GPU cannot read: leave it out, or hide the GPU with "
            "CUDA_VISIBLE_DEVICES="
        )
    if checkpoint.config.generates and checkpoint.config.tie_word_embeddings:
        raise CheckpointError(
            "--embedding-table is file, but with tie_word_embeddings each step reads the whole embedding as lm_head: "
            "leave the flag out"
        )
    table = checkpoint.mapped_embedding(shard)
    if isinstance(table, torch.Tensor) and operations.stored_dtype(table.dtype, dtype) != table.dtype:
        stored, used = (str(each).removeprefix("torch.") for each in (table.dtype, dtype))
        raise kernels.KernelsUnavailableError(
            f"--embedding-table is file, but the file's embedding is {stored}, which is not looked up as it is when "
            f"activations are {used}: use --dtype {stored}, or leave the flag out"
        )
    return table


def choose_speculation(
    settings: EngineSettings, config: PersimmonConfig, device: torch.device
) -> SpeculativeConfig | None:
    """How next tokens are guessed; None for only what grammars force.

    Without --speculative-config none are on a GPU, and on a CPU as many as pay, where no steps overlap.
    """
    if settings.speculative_config is not None:
        return settings.speculative_config
    if device.type != "cpu":
        return SpeculativeConfig(method="off")
    return None if settings.async_scheduling == "on" or not config.generates else SpeculativeConfig(method="auto")


def graph_sizes(settings: EngineSettings, config: PersimmonConfig) -> list[int]:
    """Batch sizes that get a CUDA graph."""
    # A classifier only computes prompts, which no graph is made for.
    if settings.enforce_eager or not config.generates:
        return []
    return list(settings.cuda_graph_sizes or default_sizes(settings.max_num_seqs))


def max_guesses(speculation: SpeculativeConfig | None, config: PersimmonConfig) -> int:
    """Maximum guesses of a sequence in a step, of those that are not only what grammars force."""
    if speculation is None or speculation.method == "off" or not config.generates:
        return 0
    return speculation.max_guesses


def limits_of(
    settings: EngineSettings,
    config: PersimmonConfig,
    max_model_len: int,
    shard: Shard = ONLY,
    *,
    quantized: bool = False,
) -> StepLimits:
    """The largest step of a rank.

    Args:
        settings: of the engine.
        config: the network.
        max_model_len: maximum tokens of a sequence.
        shard: the part of the rank.
        quantized: whether matrices of products are.
    """
    return StepLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=max_model_len,
        num_heads=shard.num_heads(config),
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=shard.intermediate_size(config),
        # What draws takes grows with it, and a classifier draws nothing.
        vocab_size=config.vocab_size if config.generates else 0,
        quantized=quantized,
    )


def choose_dtype(asked: str, stored: str | None, device: torch.device, *, cpu_bfloat16: bool) -> torch.dtype:
    """The type to compute in.

    `auto` is the checkpoint's own 16-bit type on a GPU, or float16 for one stored in float32; on a CPU it is bfloat16
    for a checkpoint stored in that, where the processor multiplies it, and otherwise float32, the exact choice.

    Args:
        asked: the setting.
        stored: the checkpoint's type, None where it does not say.
        device: that computes.
        cpu_bfloat16: whether the processor multiplies bfloat16 numbers.
    """
    if asked == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if stored == "bfloat16" and cpu_bfloat16 else torch.float32
        asked = stored if stored in ("float16", "bfloat16") else "float16"
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[asked]


def choose_cache_dtypes(asked: str, offered: Sequence[torch.dtype], device: torch.device) -> list[torch.dtype]:
    """The type to keep keys and values in, and after it the others that could be used.

    Args:
        asked: the setting.
        offered: what the kernels can keep them in, the network's own type first.
        device: that computes.

    Raises:
        KernelsUnavailableError: the kernels do not offer what is asked for.
    """
    chosen = chosen_dtype(asked, offered[0])
    if chosen not in offered:
        names = [cache_choice(own, offered[0]) for own in offered]
        raise kernels.KernelsUnavailableError(
            f"--kv-cache-dtype is {asked}, which this {'GPU' if device.type == 'cuda' else 'CPU'}'s kernels do not "
            f"have for --dtype {str(offered[0]).removeprefix('torch.')}: use "
            f"{' or '.join(filter(None, (', '.join(names[:-1]), names[-1])))}"
        )
    return [chosen, *(own for own in offered if own != chosen)]


def formats_to_make(
    settings: EngineSettings, config: PersimmonConfig, stored: torch.dtype
) -> dict[str, QuantizedFormat]:
    """The formats that tensors get while they are loaded, by name: those of --quantization, or of dummies a file's own.

    Args:
        settings: of the engine.
        config: the network.
        stored: the dtype of the checkpoint's tensors.

    Raises:
        CheckpointError: the checkpoint is quantized already, or a matrix cannot be quantized as asked.
    """
    if settings.quantization == "none":
        return formats_of_config(config, stored) if settings.load_format == "dummy" else {}
    if config.quantization is not None:
        raise CheckpointError(
            f"--quantization is {settings.quantization}, but the checkpoint's weights are quantized already "
            f"(quantization_config in its config.json): serve it without --quantization"
        )
    return quantized_formats(config, settings.quantization, settings.quantization_group_size)
