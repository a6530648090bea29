"""Twins in plain torch of the kernels in `layer_norm` and `projection`: what they compute, written to be read.

Knows nothing of padding, splits or launches: every row given is a row.
"""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812

from persimmon.kernels.layer_norm import STATISTICS_COLUMNS


def tile_statistics(x: torch.Tensor) -> torch.Tensor:
    """Mean and sum of squared deviations of each tile of columns of each row: x [M, hidden] to [2, tiles, M]."""
    tiles = torch.split(x.float(), STATISTICS_COLUMNS, dim=1)
    means = torch.stack([tile.mean(1) for tile in tiles])
    squares = torch.stack([(tile - mean[:, None]).square().sum(1) for tile, mean in zip(tiles, means, strict=True)])
    return torch.stack((means, squares))


def embed(
    token_ids: torch.Tensor, sampled: torch.Tensor | None, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the table [vocabulary, hidden] and their statistics; id -1 - r means sampled[r]."""
    if sampled is not None:
        token_ids = torch.where(token_ids < 0, sampled[(-1 - token_ids).clamp(min=0)], token_ids)
    x = F.embedding(token_ids, table)
    return x, tile_statistics(x)


def merged_layer_norm(
    x: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm of x [M, hidden] from its tiles' statistics [2, tiles, M]."""
    hidden = x.shape[1]
    means, squares = statistics[0], statistics[1]
    counts = torch.full_like(means[:, :1], STATISTICS_COLUMNS)
    counts[-1] = hidden - STATISTICS_COLUMNS * (len(means) - 1)
    mean = (means * counts).sum(0) / hidden
    variance = (squares + counts * (means - mean).square()).sum(0) / hidden
    centred = (x.float() - mean[:, None]) * (variance + eps).rsqrt()[:, None]
    return (centred * weight.float() + bias.float()).to(x.dtype)


def bias_relu_squared_(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """max(x + bias, 0)^2 in place, at most 65,504 in float16."""
    pre_activation = x.float() if bias is None else x.float() + bias.float()
    return x.copy_(_relu_squared(pre_activation, x.dtype))


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Literal["none", "relu_squared"] = "none",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """activation(x [M, in] @ weight [out, in].T + bias), rounded once, and which outputs any row has alive."""
    out = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if activation == "none":
        return out.to(x.dtype), None
    activated = _relu_squared(out, x.dtype).to(x.dtype)
    return activated, (activated != 0).any(0).to(torch.int8)


def project_add_(
    x: torch.Tensor, activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool
) -> torch.Tensor:
    """X [M, out] += activation [M, in] @ weight.T + bias, rounded once; returns x's statistics."""
    weight = weight.T if transposed else weight
    added = F.linear(activation.float(), weight.float(), None if bias is None else bias.float())
    x.copy_(x.float() + added)
    return tile_statistics(x)


def _relu_squared(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    squared = x.relu().square()
    if dtype == torch.float16:
        squared.clamp_(max=torch.finfo(dtype).max)
    return squared
