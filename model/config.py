"""PersimmonConfig: the facts of one checkpoint's network, read from its config.json and checked.

Knows both spellings of Hugging Face's file, and its traps.  Knows nothing of tensors: it imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Literal

from persimmon.model.classifier_config import ProblemType, read_labels, read_pad_token_id, read_problem_type
from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject, shown
from persimmon.model.quantization.compressed_tensors import CompressedTensors, read_compressed_tensors
from persimmon.model.rope_scaling import RopeScaling, read_rope_scaling, rope_tables

MODEL_TYPE = "persimmon"
FUYU_MODEL_TYPE = "fuyu"
DTYPES = ("float16", "bfloat16", "float32")

ScoreFunction = Literal["softmax", "sigmoid", "none"]

MAX_LAYERS = 10_000
"""More layers than this are a mistake in the file, which is found here before their tensors are listed."""


MAX_PATCH_SIZE = 4096
"""Larger patches are a mistake in the file, which is found here before memory is planned for their matrix."""


class Architecture(StrEnum):
    """What stands on the network's hidden states, by the names of Transformers' classes."""

    CAUSAL_LM = "PersimmonForCausalLM"
    """lm_head: logits of the next token.  FuyuForCausalLM is this network with a `VisionConfig`."""
    SEQUENCE_CLASSIFICATION = "PersimmonForSequenceClassification"
    """A score for each label, of a sequence's last token."""
    TOKEN_CLASSIFICATION = "PersimmonForTokenClassification"  # noqa: S105
    """A score for each label, of every token."""


FUYU = "FuyuForCausalLM"
"""Transformers' class of the network that reads images too."""

# Adept published one vocabulary, of this size, in which |ENDOFTEXT| begins and ends every document.
ADEPT_VOCAB_SIZE = 262144
ADEPT_END_OF_TEXT = 71013

ADAPTER_FILE = "adapter_config.json"
"""What makes a folder a PEFT adapter."""

# What Transformers' PersimmonConfig writes by default, as in its own conversion of Adept's release.
_PLACEHOLDER_IDS = {"bos_token_id": 1, "eos_token_id": 2}

# What a text_config means that lacks a key: the defaults of Transformers' PersimmonConfig.
_TEXT_DEFAULTS = {
    "vocab_size": ADEPT_VOCAB_SIZE,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "max_position_embeddings": 16384,
}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """How images become embeddings: patches of pixels, each projected by one matrix into the first layer.

    Attributes:
        patch_size: height and width of a patch, in pixels.
        num_channels: numbers of a pixel; only 3, red, green and blue, is supported.
        image_token_id: the id that stands for a patch among the token ids of a prompt.

    Raises:
        ValueError: a value is not supported.
    """

    patch_size: int = 30
    num_channels: int = 3
    image_token_id: int = 71011

    def __post_init__(self) -> None:
        if self.num_channels != 3:
            raise ValueError(f"num_channels is {self.num_channels}; only 3 (red, green and blue) is supported")

    @property
    def patch_numbers(self) -> int:
        """Numbers of a patch, in the order height, width, channel."""
        return self.patch_size**2 * self.num_channels


@dataclass(frozen=True, kw_only=True)
class PersimmonConfig:
    """The shape of a Persimmon network and what its files say about its token ids.

    A field without a default must be in config.json.  The defaults are those of the public checkpoints.  For
    rope_theta, Transformers' own default was 25000 too until its version 5 made it 10000; files that it wrote
    always have the key.

    Attributes:
        vocab_size: rows of the embedding table.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: transformer layers.
        num_attention_heads: heads of queries, keys and values alike.
        max_position_embeddings: the longest sequence the model was trained for, in tokens; see `context_length`.
        layer_norm_eps: added to the variance in every LayerNorm, those of queries and keys included.
        rope_theta: base of the rotary frequencies.
        partial_rotary_factor: share of each head's dimensions that the rotary embedding turns.
        hidden_act: the MLP's activation; only "relu2", max(x, 0)², exists.
        qk_layernorm: whether queries and keys are normalized per head before the rotary embedding.
        tie_word_embeddings: whether the output projection is the embedding table; a checkpoint has no
            lm_head.weight then.
        bos_token_id: the id that begins a document, or None.
        eos_token_ids: the ids that end a document; may be empty.
        dtype: the type the weights were stored in, one of DTYPES; None where the file does not say.
        architecture: generates text, or classifies sequences or tokens.
        labels: a classifier's, by their numbers; empty where text is generated.
        problem_type: what a classifier was trained for; None where the file does not say.
        token_classification_bias: whether a token classifier's head has a bias.  A sequence classifier's has none.
        pad_token_id: a sequence classifier's padding, see `pooled_token`; None where it has none.
        rope_scaling: how the rotary embedding is stretched to longer contexts; None where it is not.
        quantization: which of the checkpoint's matrices are quantized; None where none is.
        vision: how it reads images; None where it reads text only.

    Raises:
        ValueError: a value is not supported, or two contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    rope_theta: float = 25000.0
    partial_rotary_factor: float = 0.5
    hidden_act: str = "relu2"
    qk_layernorm: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None
    architecture: Architecture = Architecture.CAUSAL_LM
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = None
    token_classification_bias: bool = True
    pad_token_id: int | None = None
    rope_scaling: RopeScaling | None = None
    quantization: CompressedTensors | None = None
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(
                f"partial_rotary_factor is {self.partial_rotary_factor}; expected more than 0 and at most 1"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} makes "
                f"{self.rotary_dim} rotary dimensions; they turn in pairs; expected a positive even number"
            )
        if self.hidden_act != "relu2":
            raise ValueError(f"hidden_act is {self.hidden_act!r}; only 'relu2' is supported")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.generates == bool(self.labels):
            raise ValueError(
                f"{self.architecture} has {self.num_labels} labels; expected at least one for a classifier, and none "
                f"for other models"
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type is 'single_label_classification', but there is only one label; expected two or more, or "
                "'regression'"
            )
        if self.vision is not None and self.vision.image_token_id >= self.vocab_size:
            raise ValueError(
                f"image_token_id is {self.vision.image_token_id}; expected a token id below vocab_size "
                f"{self.vocab_size}"
            )

    @property
    def generates(self) -> bool:
        """Whether the network generates text; it classifies otherwise, and has no lm_head."""
        return self.architecture is Architecture.CAUSAL_LM

    @property
    def num_labels(self) -> int:
        """A classifier's labels."""
        return len(self.labels)

    @property
    def score_bias(self) -> bool:
        """Whether a classifier adds a bias to its scores."""
        return self.architecture is Architecture.TOKEN_CLASSIFICATION and self.token_classification_bias

    @property
    def score_function(self) -> ScoreFunction:
        """What makes a row of a classifier's scores what is reported of them, as in Transformers' pipelines.

        softmax: probabilities that add up to one.  sigmoid: a probability for each label on its own, also where
        there is a single one.  none: the scores themselves, a regression's values.  Tokens have one label each,
        whatever problem_type says.
        """
        if self.architecture is Architecture.TOKEN_CLASSIFICATION:
            return "softmax"
        if self.problem_type == "regression":
            return "none"
        if self.problem_type == "multi_label_classification" or self.num_labels == 1:
            return "sigmoid"
        return "softmax"

    def pooled_token(self, token_ids: Sequence[int]) -> int:
        """Which token's scores are a sequence's: the place of the last one that is not padding.

        Tokens after it change nothing.  Of nothing but padding it is the first, as in Transformers.
        """
        return next((i for i in reversed(range(len(token_ids))) if token_ids[i] != self.pad_token_id), 0)

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """The first dimensions of each head, which the rotary embedding turns.

        The rotary frequencies are theta^(-2i / rotary_dim): over these dimensions, not over head_dim.
        """
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def context_length(self) -> int:
        """The longest sequence to serve, in tokens: `max_position_embeddings`, or what scaling makes of it."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        return self.rope_scaling.context_length(self.max_position_embeddings)

    @property
    def rope_limit(self) -> int | None:
        """Prompts longer than this have rotary frequencies that depend on their length; None where none have."""
        return None if self.rope_scaling is None else self.rope_scaling.limit

    @classmethod
    def from_folder(cls, folder: Path) -> "PersimmonConfig":
        """Reads config.json, and generation_config.json where there is one, for its token ids.

        Keys that do not belong to this network are ignored: the public files carry a stale rms_norm_eps, and
        a hidden_dropout of 0.6 that means nothing when a model is served.

        The end-of-text ids are those of both files.  With Adept's vocabulary, 1 and 2 are not end-of-text: they are
        Transformers' defaults, and a server that used them would never stop. There the id is |ENDOFTEXT|'s unless the
        files name another.  (Fuyu's documents do begin with 1, `<s>`.)

        Fuyu's network is in its text_config, or in older files at the top level.

        Args:
            folder: a checkpoint in Hugging Face layout.

        Raises:
            CheckpointError: the folder or config.json is missing or unreadable, describes another model, or
                has a value that cannot be served.
        """
        if not folder.exists():
            raise CheckpointError(f"{folder}: no such folder")
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; expected the folder that holds config.json")
        file = JsonObject.read(folder / "config.json")
        _refuse_adapter(folder, merged=file is not None)
        if file is None:
            raise CheckpointError(
                f"{folder}: no config.json; expected a checkpoint in Hugging Face layout "
                "(config.json, tokenizer.model, model.safetensors)"
            )
        architecture = _architecture(file)
        network = _network(file)
        vocab_size = network.positive_integer("vocab_size")
        token_id_files = [file]
        if (generation := JsonObject.read(folder / "generation_config.json")) is not None:
            token_id_files.append(generation)
        rotary = rope_tables(network)
        # What a file says of labels means nothing where text is generated.
        generates = architecture is Architecture.CAUSAL_LM
        try:
            config = cls(
                vocab_size=vocab_size,
                hidden_size=network.positive_integer("hidden_size"),
                intermediate_size=network.positive_integer("intermediate_size"),
                num_hidden_layers=network.positive_integer("num_hidden_layers", MAX_LAYERS),
                num_attention_heads=network.positive_integer("num_attention_heads"),
                max_position_embeddings=network.positive_integer("max_position_embeddings"),
                layer_norm_eps=_positive_number([network], "layer_norm_eps", cls.layer_norm_eps),
                rope_theta=_positive_number(rotary, "rope_theta", cls.rope_theta),
                partial_rotary_factor=_positive_number(rotary, "partial_rotary_factor", cls.partial_rotary_factor),
                hidden_act=network.text("hidden_act") or cls.hidden_act,
                qk_layernorm=network.flag("qk_layernorm", cls.qk_layernorm),
                tie_word_embeddings=file.flag("tie_word_embeddings", cls.tie_word_embeddings),
                bos_token_id=next(iter(_token_ids(token_id_files, "bos_token_id", vocab_size)), None),
                eos_token_ids=_token_ids(token_id_files, "eos_token_id", vocab_size),
                dtype=file.text("dtype") or file.text("torch_dtype"),
                architecture=architecture,
                labels=() if generates else read_labels(file),
                problem_type=None if generates else read_problem_type(file),
                token_classification_bias=file.flag("token_classification_bias", cls.token_classification_bias),
                pad_token_id=None if generates else read_pad_token_id(file, vocab_size),
                quantization=read_compressed_tensors(file),
                vision=_vision(file),
            )
            scaling = read_rope_scaling(network, config.max_position_embeddings, config.rotary_dim)
            return replace(config, rope_scaling=scaling)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {error}") from None


def check_vocabulary(folder: Path, config: PersimmonConfig, tokenizer_vocab_size: int) -> None:
    """Raises CheckpointError where the tokenizer can produce token ids that the embedding has no row for.

    Args:
        folder: the checkpoint, for the message.
        config: its network.
        tokenizer_vocab_size: how many ids its tokenizer has.
    """
    if tokenizer_vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer_vocab_size} token ids but vocab_size in config.json is "
            f"{config.vocab_size}: ids from {config.vocab_size} up have no row in the embedding, so tokenizer and "
            f"weights do not belong to the same model"
        )


def _refuse_adapter(folder: Path, *, merged: bool) -> None:
    """Raises CheckpointError where a folder holds a PEFT adapter, which Transformers would apply to its base model.

    Args:
        folder: the checkpoint.
        merged: whether it holds a whole checkpoint too.
    """
    adapter = JsonObject.read(folder / ADAPTER_FILE)
    if adapter is None:
        return
    base = adapter.values.get("base_model_name_or_path")
    of = f" of {base!r}"[:200] if isinstance(base, str) and base else ""
    merge = "merge it into its base model (PEFT's merge_and_unload), save that, and serve the result"
    if merged:
        merge += f"; if the weights here are merged already, delete {ADAPTER_FILE}"
    raise CheckpointError(f"{adapter.path}: this is a PEFT adapter{of}; this server does not apply adapters: {merge}")


def _architecture(file: JsonObject) -> Architecture:
    """The first of a file's architectures that is served; generation where it names none."""
    names = file.values.get("architectures")
    model_type = file.values.get("model_type")
    # A configuration saved on its own, without a model, has no architectures; one of the two must be there.
    if model_type in (MODEL_TYPE, FUYU_MODEL_TYPE) or (model_type is None and names is not None):
        if names is None:
            return Architecture.CAUSAL_LM
        listed = names if isinstance(names, list) else []
        if model_type == FUYU_MODEL_TYPE:
            if FUYU in listed:
                return Architecture.CAUSAL_LM
        elif served := [name for name in listed if name in tuple(Architecture)]:
            return Architecture(served[0])
    raise CheckpointError(
        f"{file.path}: architectures is {shown(names)} and model_type {shown(model_type)}; "
        f"this server serves only {', '.join(Architecture)} (model_type {MODEL_TYPE!r}) and {FUYU} "
        f"(model_type {FUYU_MODEL_TYPE!r})"
    )


def _network(file: JsonObject) -> JsonObject:
    """Where config.json describes the network: of a model that reads images that may be a table."""
    text = file.table("text_config") if file.values.get("model_type") == FUYU_MODEL_TYPE else None
    if text is None:
        return file
    if text.values.get("model_type") not in (None, MODEL_TYPE):
        raise text.error("model_type", f"{MODEL_TYPE!r}")
    given = {key: value for key, value in text.values.items() if value is not None}
    return replace(text, values=_TEXT_DEFAULTS | given)


def _vision(file: JsonObject) -> VisionConfig | None:
    if file.values.get("model_type") != FUYU_MODEL_TYPE:
        return None
    given = {key: file.values.get(key) for key in ("patch_size", "num_channels")}
    sizes = {key: file.positive_integer(key, MAX_PATCH_SIZE) for key, value in given.items() if value is not None}
    token_ids = file.token_ids("image_token_id")
    if len(token_ids) > 1:
        raise file.error("image_token_id", "a single token id")
    return VisionConfig(**sizes, **({"image_token_id": token_ids[0]} if token_ids else {}))


def _positive_number(places: Sequence[JsonObject], key: str, default: float) -> float:
    return next((value for place in places if (value := place.positive_number(key)) is not None), default)


def _token_ids(files: Sequence[JsonObject], key: str, vocab_size: int) -> tuple[int, ...]:
    """The ids that the files have under a key, in order, each once."""
    token_ids: dict[int, None] = {}
    for file in files:
        for token_id in file.token_ids(key):
            if token_id >= vocab_size:
                raise file.error(key, f"below vocab_size {vocab_size}: higher ids have no row in the embedding")
            token_ids[token_id] = None
    fuyu = files[0].values.get("model_type") == FUYU_MODEL_TYPE
    if vocab_size == ADEPT_VOCAB_SIZE and not (fuyu and key == "bos_token_id"):
        token_ids.pop(_PLACEHOLDER_IDS[key], None)
        return tuple(token_ids) or (ADEPT_END_OF_TEXT,)
    return tuple(token_ids)
