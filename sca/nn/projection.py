"""Projection of queries to the width of the language model."""

from __future__ import annotations

from torch import nn


class Projection(nn.Sequential):
    """Projection from query embeddings (N, Q, D) to language model embeddings (N, Q, E), as in SCA (arXiv 2312.00869).

    `ModelSpec` validates both options.

    Args:
        in_features: D.
        out_features: E.
        type: "linear" for one linear layer, "mlp" for three with GELU in between, "none" for no layer.
        norm: LayerNorm before ("pre"), after ("post") or on both sides ("both") of the layers; "none" for no norm.
    """

    def __init__(self, in_features: int, out_features: int, type: str = "linear", norm: str = "none"):
        layers: list[nn.Module] = [nn.LayerNorm(in_features)] if norm in ("pre", "both") else []
        if type != "none":
            layers.append(nn.Linear(in_features, out_features))
        if type == "mlp":
            layers += [
                nn.GELU(),
                nn.Linear(out_features, out_features),
                nn.GELU(),
                nn.Linear(out_features, out_features),
            ]
        if norm in ("post", "both"):
            layers.append(nn.LayerNorm(out_features))
        super().__init__(*layers)
