"""Two-stage detectors: features from the backbone, logits of the regions the student samples."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from detectron2.modeling import GeneralizedRCNN, StandardROIHeads
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from detectron2.structures import pairwise_iou
from torch import Tensor, nn

from pcka_distill.adapters.base import Adapter, Record, register_adapter
from pcka_distill.errors import UserError
from pcka_distill.structures import Taps

__all__ = ["RCNNAdapter"]


class _BoxHead(NamedTuple):
    """What the box branches of all RoI heads have in common."""

    in_features: list[str]
    pooler: nn.Module
    #: pooled regions -> what the predictor takes; one a stage
    heads: list[Callable[[Tensor], Tensor]]
    #: the first of its outputs are the logits; one a stage
    predictors: list[nn.Module]
    #: which regions show which objects; one a stage
    matchers: list[Callable[[Tensor], tuple[Tensor, Tensor]]]

    @property
    def groups(self) -> list[str]:
        stages = len(self.predictors)
        return ["box"] if stages == 1 else [f"stage{k}" for k in range(stages)]


def _box_head(model: Any) -> _BoxHead:
    heads = model.roi_heads
    # A subclass may compute its boxes in another way; what it adds beside them does not matter.
    forward = getattr(type(heads), "_forward_box", None)
    stage = getattr(type(heads), "_run_stage", None)
    if forward is CascadeROIHeads._forward_box and stage is CascadeROIHeads._run_stage:
        return _BoxHead(
            heads.box_in_features,
            heads.box_pooler,
            list(heads.box_head),
            list(heads.box_predictor),
            list(heads.proposal_matchers),
        )
    if forward is StandardROIHeads._forward_box:
        return _BoxHead(
            heads.box_in_features,
            heads.box_pooler,
            [heads.box_head],
            [heads.box_predictor],
            [heads.proposal_matcher],
        )
    shared = getattr(type(heads), "_shared_roi_transform", None)
    if shared is Res5ROIHeads._shared_roi_transform and type(heads).forward is Res5ROIHeads.forward:
        return _BoxHead(
            heads.in_features,
            heads.pooler,
            [lambda x: heads.res5(x).mean(dim=[2, 3])],
            [heads.box_predictor],
            [heads.proposal_matcher],
        )
    raise UserError(
        f"the logits of {type(heads).__name__} cannot be read: of the R-CNN family those of "
        "StandardROIHeads, CascadeROIHeads and Res5ROIHeads can"
    )


def _is_sigmoid(predictor: nn.Module) -> bool:
    """Whether classes are scored one by one: the background's column is then never trained."""
    return bool(getattr(predictor, "use_sigmoid_ce", False))


def _logits(predictor: nn.Module, output: Any) -> Tensor:
    logits: Tensor = output[0]
    return logits[:, :-1] if _is_sigmoid(predictor) else logits


@register_adapter
class RCNNAdapter(Adapter):
    """The R-CNN family: Faster, Mask, Cascade and C4 R-CNN, PanopticFPN.

    The teacher scores the very boxes that the student's sampler drew: its pooler, box head and
    predictor are run on its own features. Its proposals, masks and NMS are never computed. Stage
    k of a cascade is taught by the teacher's stage k, or its last; a single head by the mean of
    all stages.
    """

    family = GeneralizedRCNN
    title = "the R-CNN family (Faster, Mask, Cascade and C4 R-CNN, PanopticFPN)"
    provides = Adapter.provides | {"labels"}

    def num_classes(self, model: Any) -> int | None:
        return getattr(model.roi_heads, "num_classes", None)

    def is_sigmoid(self, model: Any) -> bool:
        return _is_sigmoid(_box_head(model).predictors[0])

    def logit_signature(self, model: Any) -> dict[str, object]:
        predictor: Any = _box_head(model).predictors[0]
        return {
            "box coordinates": len(predictor.box2box_transform.weights),
            "sigmoid scores": self.is_sigmoid(model),
        }

    def logit_groups(self, model: Any) -> list[str]:
        return _box_head(model).groups

    def select_classes(self, model: Any, logits: Tensor, classes: list[int]) -> Tensor:
        if self.is_sigmoid(model):
            return logits[..., classes]
        # The last column is the background.
        return logits[..., [*classes, -1]]

    def hook_points(self, model: Any, reads: Collection[str]) -> dict[str, nn.Module]:
        points = super().hook_points(model, reads)
        if "logits" in reads:
            head = _box_head(model)
            points["pooler"] = head.pooler
            points.update(zip(head.groups, head.predictors))
        return points

    def read_logits(self, model: Any, record: Record, taps: Taps) -> None:
        # The pooler is called once a stage, in their order.
        head = _box_head(model)
        for group, predictor, pooled in zip(head.groups, head.predictors, record["pooler"]):
            taps.regions[group] = list(pooled.args[1])
            taps.logits[group] = _logits(predictor, record[group][-1].output)

    def read_labels(self, model: Any, batched_inputs: list[dict[str, Any]], taps: Taps) -> None:
        head, background = _box_head(model), model.roi_heads.num_classes
        for group, matcher in zip(head.groups, head.matchers):
            labels = []
            for regions, inputs in zip(taps.regions[group], batched_inputs):
                truth = inputs["instances"].to(regions.device)
                classes = torch.full((len(regions),), background, device=regions.device)
                if len(truth):
                    match, kind = matcher(pairwise_iou(truth.gt_boxes, regions))
                    classes = truth.gt_classes[match].masked_fill(kind == 0, background)
                    classes = classes.masked_fill(kind == -1, -1)
                labels.append(classes)
            taps.labels[group] = torch.cat(labels)

    def teacher_logits(
        self, model: Any, features: dict[str, Tensor], student: Taps
    ) -> dict[str, Tensor]:
        groups = {}
        head = _box_head(model)
        # RoIAlign takes boxes in the precision of the maps, and in half of it they are pixels off.
        maps = [features[f].float() for f in head.in_features]
        for group, boxes in student.regions.items():
            pooled = head.pooler(maps, boxes)
            stages = list(zip(head.heads, head.predictors))
            if group != "box":
                stages = [stages[min(int(group.removeprefix("stage")), len(stages) - 1)]]
            logits = [
                _logits(predictor, predictor(box_head(pooled))) for box_head, predictor in stages
            ]
            groups[group] = torch.stack(logits).mean(0)
        return groups
