"""From the mixer's width to the language model's."""

from __future__ import annotations

from torch import nn


class Projection(nn.Sequential):
    """(N, Q, D) -> (N, Q, E): one linear layer, or three with GELU between ("mlp"), as in SCA (arXiv 2312.00869).

    norm: "none", or a LayerNorm "pre", "post" or "both". `ModelSpec` checks both options.
    """

    def __init__(self, in_features: int, out_features: int, kind: str = "linear", norm: str = "none"):
        layers: list[nn.Module] = [nn.LayerNorm(in_features)] if norm in ("pre", "both") else []
        layers.append(nn.Linear(in_features, out_features))
        if kind == "mlp":
            layers += [
                nn.GELU(),
                nn.Linear(out_features, out_features),
                nn.GELU(),
                nn.Linear(out_features, out_features),
            ]
        if norm in ("post", "both"):
            layers.append(nn.LayerNorm(out_features))
        super().__init__(*layers)
