"""The Persimmon network: token ids in, logits out.

Everything `forward` reads comes in as an argument.  Knows nothing of requests, scheduling or sampling.

Pre-norm blocks with sequential residuals: x += attention(norm(x)); x += mlp(norm(x)), as in Adept's release.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from kernels import AttentionPlan, Kernels
from model.config import PersimmonConfig
from model.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass of the network computes; T tokens of several sequences, one sequence after the other.

    Attributes:
        token_ids: [T] int64.
        attention: positions, where keys and values go, and who attends to what.
        logits_rows: [R] int64, the tokens whose next-token logits are wanted.
    """

    token_ids: torch.Tensor
    attention: AttentionPlan
    logits_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """A LayerNorm's weight and bias, each [hidden]."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection: weight as `Kernels.prepare_weight` made it of [out, in], bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block's parameters; qk_norm holds both QK-norms, each part [2, head_dim], query first."""

    attention_norm: Norm
    query_key_value: Linear
    qk_norm: Norm | None
    attention_out: Linear
    mlp_norm: Norm
    mlp_up: Linear
    mlp_down: Linear


class Persimmon:
    """The network with its parameters on one device.

    Args:
        config: the architecture.
        tensors: every parameter once, by its Hugging Face name; taken one at a time, so that a checkpoint is never
            held twice.
        dtype: parameters and activations.
        device: where they live.
        kernels: the operations.
    """

    def __init__(
        self,
        config: PersimmonConfig,
        tensors: Iterable[tuple[str, torch.Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._kernels = kernels
        parameters: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            # A copy even where nothing changes: a checkpoint file that is replaced must not change the model.
            parameter = tensor.to(device=device, dtype=dtype, copy=True)
            is_projection = parameter.ndim == 2 and name != "model.embed_tokens.weight"
            parameters[name] = kernels.prepare_weight(parameter) if is_projection else parameter
        self._embedding = parameters["model.embed_tokens.weight"]
        self._layers = [self._layer(parameters, index) for index in range(config.num_hidden_layers)]
        self._final_norm = _norm(parameters, "model.final_layernorm")
        head = self._embedding if config.tie_word_embeddings else parameters["lm_head.weight"]
        self._head = Linear(head, None)
        self._cos, self._sin = rotary_table(config, device)

    def _layer(self, parameters: dict[str, torch.Tensor], index: int) -> Layer:
        prefix = f"model.layers.{index}"
        qk_norm = None
        if self.config.qk_layernorm:
            query = _norm(parameters, f"{prefix}.self_attn.q_layernorm")
            key = _norm(parameters, f"{prefix}.self_attn.k_layernorm")
            qk_norm = Norm(torch.stack((query.weight, key.weight)), torch.stack((query.bias, key.bias)))
        return Layer(
            attention_norm=_norm(parameters, f"{prefix}.input_layernorm"),
            query_key_value=_linear(parameters, f"{prefix}.self_attn.query_key_value"),
            qk_norm=qk_norm,
            attention_out=_linear(parameters, f"{prefix}.self_attn.dense"),
            mlp_norm=_norm(parameters, f"{prefix}.post_attention_layernorm"),
            mlp_up=_linear(parameters, f"{prefix}.mlp.dense_h_to_4h"),
            mlp_down=_linear(parameters, f"{prefix}.mlp.dense_4h_to_h"),
        )

    @torch.inference_mode()
    def forward(self, step: Step, cache: KVCache) -> torch.Tensor:
        """Runs one step and writes its keys and values into the cache.

        Returns:
            [R, vocab_size] float32, the logits at `step.logits_rows`.
        """
        kernels, eps = self._kernels, self.config.layer_norm_eps
        positions = step.attention.positions
        cos, sin = self._cos[positions], self._sin[positions]
        x = F.embedding(step.token_ids, self._embedding)
        for layer, k_cache, v_cache in zip(self._layers, cache.keys, cache.values, strict=True):
            normed = kernels.layer_norm(x, layer.attention_norm.weight, layer.attention_norm.bias, eps)
            qkv = kernels.linear(normed, layer.query_key_value.weight, layer.query_key_value.bias)
            q = kernels.qk_norm_rotary_store(
                qkv.view(-1, self.config.num_attention_heads, 3, self.config.head_dim),
                layer.qk_norm.weight if layer.qk_norm else None,
                layer.qk_norm.bias if layer.qk_norm else None,
                eps,
                cos,
                sin,
                k_cache,
                v_cache,
                step.attention,
            )
            attended = kernels.paged_attention(q, k_cache, v_cache, step.attention)
            x += kernels.linear(attended, layer.attention_out.weight, layer.attention_out.bias)
            normed = kernels.layer_norm(x, layer.mlp_norm.weight, layer.mlp_norm.bias, eps)
            activation = kernels.relu_squared(kernels.linear(normed, layer.mlp_up.weight, layer.mlp_up.bias))
            x += kernels.linear(activation, layer.mlp_down.weight, layer.mlp_down.bias)
        wanted = kernels.layer_norm(x[step.logits_rows], self._final_norm.weight, self._final_norm.bias, eps)
        return kernels.linear(wanted, self._head.weight, self._head.bias).float()


def rotary_table(config: PersimmonConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position * theta^(-2i/R) for every position, R being the rotary dimensions of a head.

    Returns:
        Two [max_position_embeddings, 1, 1, R/2] float32 tensors, ready to broadcast over heads, queries and keys.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    frequencies = 1.0 / config.rope_theta**exponents
    angles = torch.arange(config.max_position_embeddings, dtype=torch.float32)[:, None] * frequencies
    shape = (config.max_position_embeddings, 1, 1, config.rotary_dim // 2)
    return angles.cos().view(shape).to(device), angles.sin().view(shape).to(device)


def _norm(parameters: dict[str, torch.Tensor], name: str) -> Norm:
    return Norm(parameters[f"{name}.weight"], parameters[f"{name}.bias"])


def _linear(parameters: dict[str, torch.Tensor], name: str) -> Linear:
    return Linear(parameters[f"{name}.weight"], parameters[f"{name}.bias"])
