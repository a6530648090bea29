"""The Persimmon network: token ids in, hidden states out, and logits or a classifier's scores of those.

Everything `forward` reads comes in as an argument.  Knows nothing of requests, scheduling or sampling.

Pre-norm blocks with sequential residuals: x += attention(norm(x)); x += mlp(norm(x)), as in Adept's release.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from persimmon.kernels import Activation, Kernels, Linear, Norm, QuantizedMatrix, Residual, Rotary
from persimmon.model.config import PersimmonConfig
from persimmon.model.kv_cache import KVCache
from persimmon.model.leftovers import EMBEDDING
from persimmon.model.patches import PATCHES_AT_ONCE, Patches, inputs_of, padded
from persimmon.model.ranks import Ranks
from persimmon.model.rotary import rotary_of_tokens, rotary_table
from persimmon.model.shard import ONLY
from persimmon.model.tensor_names import PATCH_PROJECTION


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass of the network computes; T tokens of several sequences, one sequence after the other.

    Attributes:
        token_ids: [T] int64; a negative one, -1 - r, stands for `sampled[r]`.
        attention: where keys and values go and who attends to what, as `Kernels.plan_attention` made it.
        logits_rows: [R] int64, the tokens whose next-token logits are wanted; None for all.
        sampled: [*] int64 tokens that the device knows before the host does.
        rotary: the tokens' angles, see `Persimmon.rotary_of_tokens`; None for those of their positions.
        patches: the tokens among the T that stand for image patches; None where none does.
    """

    token_ids: torch.Tensor
    attention: Any
    logits_rows: torch.Tensor | None
    sampled: torch.Tensor | None = None
    rotary: Rotary | None = None
    patches: Patches | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block's parameters; qk_norm holds both QK-norms, each part [2, head_dim], query first."""

    attention_norm: Norm
    query_key_value: Linear[Any]
    qk_norm: Norm | None
    attention_out: Linear[Any]
    mlp_norm: Norm
    mlp_up: Linear[Any]
    mlp_down: Linear[Any]


class Persimmon:
    """The network with its parameters on one device.

    Args:
        config: the architecture.
        tensors: every parameter once, by its Hugging Face name; taken one at a time, so that a checkpoint is never
            held twice.  A tensor may be a view of a file; a quantized matrix has memory of its own.
        dtype: parameters and activations, see `parameter_dtype`.
        device: where they live.
        kernels: the operations.
        max_model_len: maximum tokens of a sequence; the network's own by default.
        embedding: used where it lies, such as in a file, instead of one among the tensors; of a type that
            `Kernels.stored_dtype` keeps.
        ranks: the ranks that share the network, of whose parameters `tensors` are this one's, see `Shard.part`; None
            where there are no others, and kernels add a product to the residual stream in one launch.

    Attributes:
        config, dtype, device, ranks: as given.
        layers: the parameters of each layer.
    """

    def __init__(
        self,
        config: PersimmonConfig,
        tensors: Iterable[tuple[str, torch.Tensor | QuantizedMatrix]],
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels[Any, Any],
        max_model_len: int | None = None,
        embedding: torch.Tensor | QuantizedMatrix | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self._shard = ONLY if ranks is None else ranks.shard
        self.dtype = dtype
        self.device = device
        self._kernels = kernels
        parameters: dict[str, torch.Tensor] = {}
        weights: dict[str, Any] = {}
        table = embedding
        for name, tensor in tensors:
            parameter: torch.Tensor | QuantizedMatrix
            if isinstance(tensor, QuantizedMatrix):
                parameter = tensor.to(device)  # which owns its memory, so that it needs no copy
            else:
                # A copy even where nothing changes: a checkpoint file that is replaced must not change the model.
                stored = kernels.stored_dtype(tensor.dtype, dtype)
                kept = stored if is_matrix(name) or is_lookup_table(name, config) else parameter_dtype(name, dtype)
                parameter = tensor.to(device=device, dtype=kept, copy=True)
                if name == f"{PATCH_PROJECTION}.weight":
                    parameter = F.pad(parameter, (0, padded(parameter.shape[1]) - parameter.shape[1]))
            if is_matrix(name):
                # Squared ReLU leaves most of the MLP's activations zero.
                weights[name] = kernels.prepare_weight(parameter, sparse_input=name.endswith("dense_4h_to_h.weight"))
            elif name == EMBEDDING:
                table = parameter
            elif isinstance(parameter, QuantizedMatrix):
                raise ValueError(f"{name} is quantized; only the matrices of products and the embedding may be")
            else:
                parameters[name] = kernels.prepare_bias(parameter) if _is_projection(name) else parameter
            del tensor, parameter  # before the next one is made
        if table is None:
            raise ValueError(f"the tensors hold no {EMBEDDING}")
        self._embedding = _with_scales(table, dtype)
        self.layers = [self._layer(parameters, weights, index) for index in range(config.num_hidden_layers)]
        self._final_norm = self._norm(parameters, "model.final_layernorm")
        self._patch_projection = None if config.vision is None else _linear(parameters, weights, PATCH_PROJECTION)
        self._head: Any = None
        self._score: tuple[torch.Tensor, torch.Tensor | None] | None = None
        if config.generates:
            tied = config.tie_word_embeddings
            self._head = kernels.tied_weight(self._embedding) if tied else weights["lm_head.weight"]
        else:
            self._score = parameters["score.weight"], parameters.get("score.bias")
        self._rotary = rotary_table(config, device, max_model_len)

    @property
    def head(self) -> Any:
        """lm_head, a `Weight` of the network's kernels and of shape (vocab_size, hidden), or this rank's rows of it.

        Raises:
            ValueError: the network classifies, see `PersimmonConfig.generates`.
        """
        if self._head is None:
            raise ValueError(f"{self.config.architecture} has no lm_head, so it makes no logits of next tokens")
        return self._head

    def _layer(self, parameters: dict[str, torch.Tensor], weights: dict[str, Any], index: int) -> Layer:
        prefix = f"model.layers.{index}"
        qk_norm = None
        if self.config.qk_layernorm:
            query = self._norm(parameters, f"{prefix}.self_attn.q_layernorm")
            key = self._norm(parameters, f"{prefix}.self_attn.k_layernorm")
            qk_norm = Norm(
                torch.stack((query.weight, key.weight)), torch.stack((query.bias, key.bias)), self.config.layer_norm_eps
            )
        return Layer(
            attention_norm=self._norm(parameters, f"{prefix}.input_layernorm"),
            query_key_value=_linear(parameters, weights, f"{prefix}.self_attn.query_key_value"),
            qk_norm=qk_norm,
            attention_out=_linear(parameters, weights, f"{prefix}.self_attn.dense"),
            mlp_norm=self._norm(parameters, f"{prefix}.post_attention_layernorm"),
            mlp_up=_linear(parameters, weights, f"{prefix}.mlp.dense_h_to_4h"),
            mlp_down=_linear(parameters, weights, f"{prefix}.mlp.dense_4h_to_h"),
        )

    def _norm(self, parameters: dict[str, torch.Tensor], name: str) -> Norm:
        return Norm(parameters[f"{name}.weight"], parameters[f"{name}.bias"], self.config.layer_norm_eps)

    @torch.inference_mode()
    def forward(
        self, step: Step, cache: KVCache, kernels: Kernels[Any, Any] | None = None, ranks: Ranks | None = None
    ) -> torch.Tensor:
        """Runs one step and writes its keys and values into the cache.

        Args:
            step: what to compute.
            cache: of keys and values; of this rank's heads.
            kernels: operations instead of the network's own, on the same form of weights: such as record them.
            ranks: instead of the network's own, where those are recorded.

        Returns:
            [R, hidden], the final LayerNorm's output at `step.logits_rows`: the last hidden state of Transformers'
            PersimmonModel, of which `logits` makes logits, and `scores` a classifier's scores.
        """
        kernels, ranks, plan = kernels or self._kernels, ranks or self.ranks, step.attention
        heads, head_dim = self._shard.num_heads(self.config), self.config.head_dim
        rotary = step.rotary or kernels.rotary_at(self._rotary, plan)
        x = self._embed(step, kernels, ranks)
        if step.patches is not None:
            self.place_patches(x.values, step.patches)
            x = Residual(x.values)  # what kernels have noted of its rows is no longer true
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            qkv = kernels.norm_linear(x, layer.attention_norm, layer.query_key_value, plan)
            qkv = qkv.view(-1, heads, 3, head_dim)
            attended = kernels.attention(qkv, layer.qk_norm, rotary, layer_cache, plan, ahead=layer.attention_out)
            _add_product_(x, Activation(attended), layer.attention_out, plan, kernels, ranks)
            inner = kernels.norm_linear_relu_squared(x, layer.mlp_norm, layer.mlp_up, plan)
            _add_product_(x, inner, layer.mlp_down, plan, kernels, ranks)
        return kernels.norm_rows(x, self._final_norm, step.logits_rows)

    def _embed(self, step: Step, kernels: Kernels[Any, Any], ranks: Ranks | None) -> Residual:
        if ranks is None:
            return kernels.embed(step.token_ids, step.sampled, self._embedding, step.attention)
        rows, elsewhere = self.rows_of_table(step.token_ids, step.sampled, ranks)
        own = kernels.embed(rows, None, self._embedding, step.attention).values
        return Residual(ranks.sum(own.masked_fill_(elsewhere, 0)))

    def place_patches(self, embeddings: torch.Tensor, patches: Patches) -> None:
        """Overwrites a step's embeddings where its tokens stand for image patches.

        Args:
            embeddings: [T, hidden], as the table has given them.
            patches: of the step.

        Raises:
            ValueError: the network reads text only.
        """
        projection = self._patch_projection
        if projection is None:
            raise ValueError("this network reads text only, and a step has image patches")
        for places, pixels in zip(
            torch.split(patches.places, PATCHES_AT_ONCE), torch.split(patches.pixels, PATCHES_AT_ONCE), strict=True
        ):
            inputs = Activation(inputs_of(pixels, embeddings.dtype))
            embeddings[places] = self._kernels.product(inputs, projection)

    def rows_of_table(
        self, token_ids: torch.Tensor, sampled: torch.Tensor | None, ranks: Ranks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where tokens' embeddings lie in this rank's rows of the table.

        Args:
            token_ids, sampled: as in a step; only the first rank reads `sampled`, and sends the others what it says.
            ranks: those that share the network.

        Returns:
            [T] int64 rows, 0 for a token whose embedding another rank has, and [T, 1] bool, which those are.  The sum
            over ranks is exact, because all but one add zeros.
        """
        if sampled is not None:
            if ranks.shard.rank == 0 and len(sampled):
                token_ids = torch.where(token_ids < 0, sampled[(-1 - token_ids).clamp_min(0)], token_ids)
            token_ids = ranks.broadcast(token_ids)
        own = ranks.shard.vocabulary(self.config)
        elsewhere = (token_ids < own.start) | (token_ids >= own.stop)
        return (token_ids - own.start).masked_fill_(elsewhere, 0), elsewhere[:, None]

    def rotary_of_tokens(self, positions: torch.Tensor, lengths: torch.Tensor) -> Rotary:
        """The angles of a step's tokens where frequencies depend on the length, see `PersimmonConfig.rope_limit`.

        Args:
            positions: [T] int64.
            lengths: [T] int64, of its prompt for each token of one, for others the length up to and with the token.
        """
        return rotary_of_tokens(self.config, positions, lengths, self.device)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab_size] float32 logits of what `forward` returned; on ranks but the first only their own columns.

        Raises:
            ValueError: the network classifies.
        """
        logits = self._kernels.logits(hidden, self.head)
        return logits if self.ranks is None else self.ranks.gather(logits, self.config)

    @torch.inference_mode()
    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, num_labels] float32 scores of what `forward` returned: a classifier's logits, in `config.labels`' order.

        In float32 whatever the network's dtype: the product is small, and what it makes is what clients see.

        Raises:
            ValueError: the network generates text, see `PersimmonConfig.generates`.
        """
        if self._score is None:
            raise ValueError(f"{self.config.architecture} has no classification head, so it scores no labels")
        return F.linear(hidden.float(), *self._score)


def _add_product_(
    x: Residual, inputs: Activation, linear: Linear[Any], plan: Any, kernels: Kernels[Any, Any], ranks: Ranks | None
) -> None:
    if ranks is None:
        kernels.add_product_(x, inputs, linear, plan)
    else:
        kernels.add_(x, ranks.sum(kernels.product(inputs, linear)), plan)


def _with_scales(table: torch.Tensor | QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor | QuantizedMatrix:
    """An embedding whose rows come out in the network's dtype: of a quantized one they have that of the scales."""
    if isinstance(table, QuantizedMatrix):
        return replace(table, scales=table.scales.to(dtype))
    return table


def _is_projection(name: str) -> bool:
    """Whether a parameter belongs to a product that the kernels make."""
    return not ("norm" in name or name.startswith("score.") or name == EMBEDDING)


def is_matrix(name: str) -> bool:
    """Whether a parameter is the matrix of a product that the kernels make, and so kept as their `Weight`."""
    return _is_projection(name) and name.endswith(".weight")


def is_lookup_table(name: str, config: PersimmonConfig) -> bool:
    """Whether a parameter is an embedding of which only rows are read, so not one that is lm_head too."""
    return name == EMBEDDING and not (config.generates and config.tie_word_embeddings)


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type that a network keeps a parameter in, unless kernels say so: see `Kernels.stored_dtype`.

    Norms and classifiers' scores are computed in float32, so their few numbers stay in it.

    Args:
        name: the parameter's.
        dtype: that the network computes in.
    """
    return torch.float32 if "norm" in name or name.startswith("score.") else dtype


def _linear(parameters: dict[str, torch.Tensor], weights: dict[str, Any], name: str) -> Linear[Any]:
    # The bias of a product that is summed over ranks is on the first one only.
    return Linear(weights[f"{name}.weight"], parameters.get(f"{name}.bias"))
