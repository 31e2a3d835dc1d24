"""Dense detectors: features from the backbone, logits from the head, level by level."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from detectron2.modeling.meta_arch import retinanet
from torch import Tensor, nn

from pcka_distill.adapters.base import Adapter, Record, register_adapter
from pcka_distill.structures import Taps

try:
    from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
    from detectron2.modeling.meta_arch.fcos import FCOSHead

    _STOCK_HEADS: tuple[type[nn.Module], ...] = (retinanet.RetinaNetHead, FCOSHead)
except ImportError:
    # Before FCOS came into Detectron2, RetinaNet was all of it.
    DenseDetector, permute_to_N_HWA_K = retinanet.RetinaNet, retinanet.permute_to_N_HWA_K
    _STOCK_HEADS = (retinanet.RetinaNetHead,)

__all__ = ["DenseAdapter"]


@register_adapter
class DenseAdapter(Adapter):
    """RetinaNet and FCOS: sigmoid logits of every anchor or location, one group a level."""

    family = DenseDetector
    title = "dense detectors (RetinaNet, FCOS)"
    provides = Adapter.provides | {"labels"}

    def num_classes(self, model: Any) -> int:
        return int(model.num_classes)

    def is_sigmoid(self, model: Any) -> bool:
        return True

    def logit_signature(self, model: Any) -> dict[str, object]:
        shapes = model.backbone.output_shape()
        return {
            "anchors": [
                [f"{x1 - x0:.0f} x {y1 - y0:.0f}" for x0, y0, x1, y1 in level.tolist()]
                for level in model.anchor_generator.cell_anchors
            ],
            "strides": [shapes[f].stride for f in model.head_in_features],
        }

    def logit_groups(self, model: Any) -> list[str]:
        return list(model.head_in_features)

    def hook_points(self, model: Any, reads: Collection[str]) -> dict[str, nn.Module]:
        points = super().hook_points(model, reads)
        return {**points, "head": model.head} if "logits" in reads else points

    def read_logits(self, model: Any, record: Record, taps: Taps) -> None:
        taps.logits = self._groups(model, record["head"][-1].output[0])

    def read_labels(self, model: Any, batched_inputs: list[dict[str, Any]], taps: Taps) -> None:
        maps = [taps.features[f] for f in model.head_in_features]
        anchors = model.anchor_generator(maps)
        truth = [x["instances"].to(maps[0].device) for x in batched_inputs]
        labels = torch.stack(model.label_anchors(anchors, truth)[0])
        sizes = [len(a) for a in anchors]
        taps.labels = dict(zip(model.head_in_features, labels.split(sizes, dim=1)))

    def teacher_logits(
        self, model: Any, features: dict[str, Tensor], student: Taps
    ) -> dict[str, Tensor]:
        inputs = [features[f] for f in model.head_in_features]
        # The box branch is half of the head's cost and nothing reads it.
        if type(model.head) in _STOCK_HEADS:
            logits = [model.head.cls_score(model.head.cls_subnet(x)) for x in inputs]
        else:
            logits = model.head(inputs)[0]
        shapes = model.backbone.output_shape()
        logits = [
            self.cut(x, student.padded_size, shapes[f].stride)
            for x, f in zip(logits, model.head_in_features)
        ]
        return dict(zip(student.logits, self._groups(model, logits).values()))

    @staticmethod
    def _groups(model: Any, logits: list[Tensor]) -> dict[str, Tensor]:
        rows = (permute_to_N_HWA_K(x, model.num_classes) for x in logits)
        return dict(zip(model.head_in_features, rows))
