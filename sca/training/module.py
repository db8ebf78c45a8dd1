"""Module that the trainer optimizes: a model with its loss weights and auxiliary heads."""

from __future__ import annotations

from collections.abc import Mapping

from sca_registry import RegistryError
from sca_registry.contracts import Batch
from sca_registry.errors import make_unknown_name_error
from torch import Tensor, nn

from sca.model import LABEL_SMOOTHING, SegmentCaptioner
from sca.nn.quantized_layers import iter_quantized_layers
from sca.training.auxiliary_losses import UNKNOWN_LABEL, AttributeHead, AttributeValues, pool_ground_truth_features
from sca.training.recipe import TrainOptions


class TrainingModule(nn.Module):
    """Model with its loss weights and the auxiliary heads that exist only during training.

    Args:
        model: Model to train.
        loss_weights: Weights by loss.
        attributes: Attributes that the auxiliary heads predict.
        chunk_size: Regions per forward pass, see `TrainOptions`; 0 for all.
        label_smoothing: Label smoothing of the caption loss.

    Raises:
        RegistryError: An auxiliary loss has a weight, and the data has no attributes for it.
    """

    def __init__(
        self,
        model: SegmentCaptioner,
        loss_weights: Mapping[str, float],
        attributes: AttributeValues,
        chunk_size: int = 0,
        label_smoothing: float = LABEL_SMOOTHING,
    ):
        super().__init__()
        self.model = model
        self.loss_weights: dict[str, float] = dict(loss_weights)
        self.chunk_size = chunk_size
        self.label_smoothing = label_smoothing
        for loss in ("attributes", "feature_attributes"):
            if loss_weights.get(loss) and not (
                attributes.region_attributes or (loss == "attributes" and attributes.relation_attributes)
            ):
                raise RegistryError(f"loss.{loss} requires attributes, and no dataset has any; set loss.{loss}=0")
        self.heads: nn.ModuleDict = nn.ModuleDict()
        if loss_weights.get("attributes"):
            attribute_values = attributes.region_attributes | attributes.relation_attributes
            self.heads["attributes"] = AttributeHead(model.mixer.hidden_size, model.mixer.num_queries, attribute_values)
        if loss_weights.get("feature_attributes"):
            self.heads["feature_attributes"] = AttributeHead(model.segmenter.channels, 1, attributes.region_attributes)
        self.recent_losses: dict[str, list[Tensor]] = {}
        # read by DistributedDataParallel, which cannot copy these weights from the first process to the others
        self._ddp_params_and_buffers_to_ignore: list[str] = [
            f"{name}.weight" for name, _ in iter_quantized_layers(self)
        ]

    def forward(self, batch: Batch, loss_scales: Mapping[str, float] | None = None) -> Tensor:
        """Return the weighted sum of all losses.

        Args:
            batch: Batch with targets.
            loss_scales: Factor of each loss: the batch's share of the step's terms, see `CaptionTrainer`. It makes the
                gradients of accumulated batches equal those of one large batch. None for 1.

        Returns:
            Scalar loss.
        """
        assert batch.targets is not None  # set by `collate_examples`
        output = self.model(batch, self.loss_weights, self.chunk_size, self.label_smoothing)
        losses = dict(output.losses)
        losses.setdefault("caption", output.queries.sum() * 0.0)  # of a batch without texts
        if "attributes" in self.heads:
            losses["attributes"] = self.heads["attributes"](output.queries, batch.auxiliary_targets)
        if "feature_attributes" in self.heads:
            features = pool_ground_truth_features(output.regions, batch.targets)
            masked_labels = {
                name: labels.masked_fill(~batch.targets.has_mask, UNKNOWN_LABEL)
                for name, labels in batch.auxiliary_targets.items()
            }
            losses["feature_attributes"] = self.heads["feature_attributes"](features, masked_labels)
        if loss_scales is not None:
            losses = {name: value * loss_scales.get(name, loss_scales["regions"]) for name, value in losses.items()}
        for name, value in losses.items():
            self.recent_losses.setdefault(name, []).append(value.detach())
        return sum(self.loss_weights.get(name, 1.0) * value for name, value in losses.items())

    def group_trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return trainable parameters by the groups of `spec.trainable`; those of the auxiliary heads are "heads"."""
        groups = {**self.model.group_parameters(), "heads": list(self.heads.parameters())}
        trainable = {name: [p for p in parameters if p.requires_grad] for name, parameters in groups.items()}
        return {name: parameters for name, parameters in trainable.items() if parameters}


def check_lr_multipliers(options: TrainOptions, module: TrainingModule) -> None:
    """Check that every learning rate multiplier is for a group with trainable parameters.

    Args:
        options: Options of [train].
        module: Module with the trainable parameters.

    Raises:
        RegistryError: A group has none.
    """
    for name in options.lr_multipliers:
        if name not in (groups := module.group_trainable_parameters()):
            raise make_unknown_name_error(f"train.lr_multipliers: no trainable group {name!r}", name, groups)
