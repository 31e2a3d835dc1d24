"""Mimic: plain regression of feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from pcka_distill.functional import mimic_loss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss

__all__ = ["MimicLoss"]


@DISTILL_LOSS_REGISTRY.register()
class MimicLoss(FeatureLoss):
    """MSE between the student's projected map and the teacher's (FitNets, ICLR 2015).

    The paper's best detection rows are PCKA + mimic.

    Args:
        levels: student levels, empty for every level that can be paired.
        weight, warmup_iters: see :class:`.DistillLoss`.
    """

    @configurable
    def __init__(
        self, *, levels: Sequence[str] = (), weight: float = 1.0, warmup_iters: int = 0
    ) -> None:
        super().__init__(levels=levels, project=True, weight=weight, warmup_iters=warmup_iters)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.DISTILL.MIMIC
        return {"levels": node.LEVELS, "weight": node.WEIGHT, "warmup_iters": node.WARMUP_ITERS}

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return mimic_loss(student, teacher)
