"""Mimic: plain regression of feature maps."""

from __future__ import annotations

from torch import Tensor

from pcka_distill.baselines import mimic_loss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss

__all__ = ["MimicLoss"]


@DISTILL_LOSS_REGISTRY.register()
class MimicLoss(FeatureLoss):
    """MSE between the student's projected map and the teacher's (FitNets, ICLR 2015).

    The paper's best detection rows are PCKA + mimic. Arguments: see :class:`.FeatureLoss`.
    """

    project = True

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return mimic_loss(student, teacher)
