"""The angles of the rotary embedding: of every position, or of tokens whose frequencies depend on a length.

Formulas and order of operations are Transformers' (modeling_rope_utils), so that float32 results are the same.
"""

import math

import torch

from persimmon.kernels import Rotary
from persimmon.kernels.launch import upload
from persimmon.model.config import PersimmonConfig
from persimmon.model.rope_scaling import RopeScaling


def rotary_table(config: PersimmonConfig, device: torch.device, positions: int | None = None) -> Rotary:
    """The angles of each position, of which kernels take what a step needs.

    Where frequencies depend on the length, a row is for a sequence that ends there: what a token has that is computed
    with all tokens before it in the cache.

    Args:
        config: the network.
        device: where the tables are to be.
        positions: how many; as many as the network can serve by default.
    """
    every = torch.arange(config.context_length if positions is None else positions)
    return _rotary(config, every, every + 1, device, by_token=False)


def rotary_of_tokens(
    config: PersimmonConfig, positions: torch.Tensor, lengths: torch.Tensor, device: torch.device
) -> Rotary:
    """The angles of a step's tokens, of which each belongs to a pass over a sequence of some length.

    Args:
        config: the network.
        positions: [T] int64.
        lengths: [T] int64, tokens of the sequence when the token is computed as Transformers would.
        device: where the angles are to be.
    """
    return _rotary(config, positions, lengths, device, by_token=True)


def _rotary(
    config: PersimmonConfig, positions: torch.Tensor, lengths: torch.Tensor, device: torch.device, *, by_token: bool
) -> Rotary:
    scaling = config.rope_scaling
    if scaling is not None and scaling.limit is not None:
        # Most lengths are below the limit, where all frequencies are the same.
        distinct, place = torch.unique(lengths.clamp_min(scaling.limit), return_inverse=True)
        frequencies = _frequencies_by_length(config, scaling, distinct)[place]
    else:
        frequencies = _frequencies(config, scaling)
    angles = positions.float()[:, None] * frequencies
    scale = 1.0 if scaling is None else scaling.attention_factor
    cos, sin = ((turned * scale).numpy() for turned in (angles.cos(), angles.sin()))
    return Rotary(upload(cos, device), upload(sin, device), by_token)


def _exponents(config: PersimmonConfig) -> torch.Tensor:
    """[R/2] float32, 2i / R."""
    return torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim


def _frequencies_by_length(config: PersimmonConfig, scaling: RopeScaling, lengths: torch.Tensor) -> torch.Tensor:
    """[L, R/2] float32, the frequencies of sequences of these lengths, [L] int64, none below the limit."""
    dim, exponents = config.rotary_dim, _exponents(config)
    if scaling.kind == "dynamic":  # NTK-aware, of the current length
        ratio = scaling.factor * lengths / scaling.original_length
        base = config.rope_theta * (ratio - (scaling.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base[:, None] ** exponents
    factors = torch.where(
        (lengths > scaling.original_length)[:, None],
        torch.tensor(scaling.long_factors, dtype=torch.float32),
        torch.tensor(scaling.short_factors, dtype=torch.float32),
    )
    return 1.0 / (factors * config.rope_theta**exponents)


def _frequencies(config: PersimmonConfig, scaling: RopeScaling | None) -> torch.Tensor:
    """[R/2] float32, the frequencies of sequences of any length."""
    plain = 1.0 / config.rope_theta ** _exponents(config)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    return _llama3(plain, scaling) if scaling.kind == "llama3" else _yarn(config, scaling)


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths are stretched, short ones stay, those between are interpolated (Llama 3.1)."""
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length
    wavelengths = 2 * math.pi / plain
    stretched = torch.where(wavelengths > length / low, plain / scaling.factor, plain)
    smooth = (length / wavelengths - low) / (high - low)
    between = ~(wavelengths < length / high) * ~(wavelengths > length / low)
    return torch.where(between, (1 - smooth) * stretched / scaling.factor + smooth * stretched, stretched)


def _yarn(config: PersimmonConfig, scaling: RopeScaling) -> torch.Tensor:
    """Slow dimensions are interpolated, fast ones stay, with a ramp between (Peng et al., arXiv:2309.00071)."""
    dim, base = config.rotary_dim, config.rope_theta

    def dimension(rotations: float) -> float:
        return (dim * math.log(scaling.original_length / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high if high != low else high + 0.001) - low)
    stays = 1 - ramp.clamp(0, 1)
    powers = base ** _exponents(config)
    return 1.0 / (scaling.factor * powers) * (1 - stays) + 1.0 / powers * stays
