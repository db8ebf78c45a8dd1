"""What is optimized: a model with the weights of its losses and the heads that exist only in training."""

from __future__ import annotations

from collections.abc import Mapping

from sca_registry import RegistryError
from sca_registry.contracts import Batch
from sca_registry.messages import unknown
from torch import Tensor, nn

from sca.model import SegmentCaptioner
from sca.training.auxiliary import UNKNOWN, AttributeHead, Attributes, features_under_truth
from sca.training.recipe import TrainOptions


class TrainingModule(nn.Module):
    """A model together with the weights of its losses and the heads that exist only while training."""

    def __init__(self, model: SegmentCaptioner, weights: Mapping[str, float], attributes: Attributes, chunk: int = 0):
        super().__init__()
        self.model = model
        self.weights = dict(weights)
        self.chunk = chunk
        for loss in ("attributes", "features"):
            if weights.get(loss) and not (attributes.own or (loss == "attributes" and attributes.between)):
                raise RegistryError(f"loss.{loss} names attributes, and the data has none: set loss.{loss}=0")
        self.heads = nn.ModuleDict()
        if weights.get("attributes"):
            named = attributes.own | attributes.between
            self.heads["attributes"] = AttributeHead(model.mixer.hidden_size, model.mixer.num_queries, named)
        if weights.get("features"):
            self.heads["features"] = AttributeHead(model.segmenter.channels, 1, attributes.own)
        self.recent: dict[str, list[float]] = {}

    def forward(self, batch: Batch, shares: Mapping[str, float] | None = None) -> Tensor:
        """The sum of all losses, each the mean of what it counts in this batch times its share (1: the batch is all
        there is), so that a step cut into pieces learns what it would as a whole.
        """
        output = self.model(batch, self.weights, self.chunk)
        losses = dict(output.losses)
        if "attributes" in self.heads:
            losses["attributes"] = self.heads["attributes"](output.queries, batch.extra)
        if "features" in self.heads:
            features = features_under_truth(output.regions, batch.targets)
            known = {name: labels.masked_fill(~batch.targets.has_mask, UNKNOWN) for name, labels in batch.extra.items()}
            losses["features"] = self.heads["features"](features, known)
        if shares is not None:
            losses = {name: value * shares.get(name, shares["regions"]) for name, value in losses.items()}
        for name, value in losses.items():
            self.recent.setdefault(name, []).append(value.detach())
        return sum(self.weights.get(name, 1.0) * value for name, value in losses.items())

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by the names that `spec.trainable` uses, and the heads."""
        groups = {**self.model.groups(), "heads": list(self.heads.parameters())}
        trained = {name: [p for p in parameters if p.requires_grad] for name, parameters in groups.items()}
        return {name: parameters for name, parameters in trained.items() if parameters}


def check_rates(options: TrainOptions, module: TrainingModule) -> None:
    """Raise RegistryError for a rate of something that does not train."""
    for name in options.lr_multipliers:
        if name not in (known := module.groups()):
            raise unknown(f"train.rates.{name} is for nothing that trains", name, known)
