"""Two-stage detectors: features from the backbone, logits of the regions the student samples."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from detectron2.modeling import GeneralizedRCNN, StandardROIHeads
from torch import nn

from pcka_distill.adapters.base import Adapter, Record, register_adapter
from pcka_distill.errors import UserError
from pcka_distill.structures import Taps

__all__ = ["RCNNAdapter"]


@register_adapter
class RCNNAdapter(Adapter):
    """The R-CNN family; logits of Faster and Mask R-CNN with StandardROIHeads.

    The teacher scores the very boxes that the student's sampler drew: its pooler, box head and
    predictor are run on its own features. Its proposals, masks and NMS are never computed.
    """

    family = GeneralizedRCNN

    def num_classes(self, model: Any) -> int | None:
        return getattr(model.roi_heads, "num_classes", None)

    def logit_signature(self, model: Any) -> dict[str, object]:
        if type(model.roi_heads) is not StandardROIHeads:
            raise UserError(
                f"the logits of {type(model.roi_heads).__name__} cannot be read: of the R-CNN "
                "family those of StandardROIHeads can; take RCKALoss out of MODEL.DISTILL.LOSSES"
            )
        return {"columns": model.roi_heads.num_classes + 1}

    def hook_points(self, model: Any, reads: Collection[str]) -> dict[str, nn.Module]:
        points = super().hook_points(model, reads)
        if "logits" not in reads:
            return points
        heads = model.roi_heads
        return {**points, "box_pooler": heads.box_pooler, "box_predictor": heads.box_predictor}

    def collect(self, model: Any, record: Record, reads: Collection[str]) -> Taps:
        taps = super().collect(model, record, reads)
        if "logits" in reads:
            taps.regions = list(record["box_pooler"][-1].args[1])
            taps.logits = {"box": record["box_predictor"][-1].output[0]}
        return taps

    def run_teacher(
        self,
        model: Any,
        batched_inputs: list[dict[str, Any]],
        student: Taps,
        reads: Collection[str],
    ) -> Taps:
        features, size = self.teacher_features(model, batched_inputs, student.padded_size)
        taps = Taps(features=features, regions=student.regions, padded_size=size)
        if "logits" in reads:
            heads = model.roi_heads
            pooled = heads.box_pooler([features[f] for f in heads.box_in_features], taps.regions)
            taps.logits = {"box": heads.box_predictor(heads.box_head(pooled))[0]}
        return taps
