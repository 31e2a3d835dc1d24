"""Semantic segmentation: features from the backbone, logits of every pixel from the head."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch.nn.functional as F
from detectron2.modeling import SemanticSegmentor
from detectron2.projects.deeplab.semantic_seg import DeepLabV3Head
from detectron2.structures import ImageList
from torch import Tensor, nn

from pcka_distill.adapters.base import Adapter, Record, padding, register_adapter
from pcka_distill.errors import UserError, reason
from pcka_distill.structures import Taps

__all__ = ["SemSegAdapter"]

_GROUP = "pixels"


@register_adapter
class SemSegAdapter(Adapter):
    """SemanticSegmentor: softmax logits of every pixel, on the grid that the head predicts on.

    Heads may differ in kind and in stride: the teacher's logits are resized to the student's grid.
    Those of Detectron2 (SemSegFPNHead, DeepLabV3Head, DeepLabV3PlusHead), of this project (PSPHead)
    and any other whose last layer is its ``predictor`` can be read.
    """

    family = SemanticSegmentor
    title = "semantic segmentation (SemanticSegmentor)"
    provides = frozenset({"features", "logits", "labels"})
    background = False
    class_key = "stuff_classes"

    def num_classes(self, model: Any) -> int | None:
        predictor = getattr(model.sem_seg_head, "predictor", None)
        return getattr(predictor, "out_channels", None)

    def is_sigmoid(self, model: Any) -> bool:
        return False

    def logit_signature(self, model: Any) -> dict[str, object]:
        head = model.sem_seg_head
        if not isinstance(getattr(head, "predictor", None), nn.Module):
            raise UserError(f"the logits of {type(head).__name__} cannot be read: no predictor")
        return {}

    def logit_groups(self, model: Any) -> list[str]:
        return [_GROUP]

    def hook_points(self, model: Any, reads: Collection[str]) -> dict[str, nn.Module]:
        points = super().hook_points(model, reads)
        if "logits" in reads:
            points["predictor"] = model.sem_seg_head.predictor
        return points

    def read_logits(self, model: Any, record: Record, taps: Taps) -> None:
        taps.logits = {_GROUP: record["predictor"][-1].output.permute(0, 2, 3, 1)}

    def read_labels(self, model: Any, batched_inputs: list[dict[str, Any]], taps: Taps) -> None:
        ignored, logits = model.sem_seg_head.ignore_value, taps.logits[_GROUP]
        labels = _batch([x["sem_seg"].to(logits.device) for x in batched_inputs], model, ignored)
        # The cell at the centre of each; the head's own loss resizes the logits instead.
        labels = F.interpolate(
            labels[:, None].float(), size=logits.shape[1:3], mode="nearest-exact"
        )
        labels = labels[:, 0].long()
        taps.labels = {_GROUP: labels.masked_fill(labels == ignored, -1)}

    def preprocess(self, model: Any, batched_inputs: list[dict[str, Any]]) -> Tensor:
        images = [x["image"].to(model.device) for x in batched_inputs]
        return _batch([(x - model.pixel_mean) / model.pixel_std for x in images], model, 0.0)

    def teacher_logits(
        self, model: Any, features: dict[str, Tensor], student: Taps
    ) -> dict[str, Tensor]:
        head = model.sem_seg_head
        try:
            if isinstance(head, DeepLabV3Head):
                logits = head.predictor(head.aspp(features[head.in_features[0]]))
            elif hasattr(head, "layers"):
                logits = head.layers(features)
            else:
                # In the size of the image, which costs memory and is cut down again.
                logits = head(features)[0]
        except ValueError as e:
            # DeepLab pools over the crops that it was made for.
            raise UserError(
                f"the teacher's {type(head).__name__} cannot take images of {student.padded_size} "
                f"pixels: {reason(e)}; set INPUT.CROP alike in both configs"
            ) from e
        name, shape = next(iter(model.backbone.output_shape().items()))
        stride = round(features[name].shape[-2] * shape.stride / logits.shape[-2])
        logits = self.cut(logits, student.padded_size, max(1, stride))
        size = student.logits[_GROUP].shape[1:3]
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return {_GROUP: logits.permute(0, 2, 3, 1)}


def _batch(images: list[Tensor], model: Any, value: float) -> Tensor:
    """(B, ..., H, W), padded as SemanticSegmentor does."""
    divisor, square = padding(model.backbone)
    # Before there was square padding, there was no word for it.
    more = {"padding_constraints": {"square_size": square}} if square else {}
    return ImageList.from_tensors(images, divisor, value, **more).tensor
