"""Mimic: plain regression of feature maps."""

from __future__ import annotations

from torch import Tensor

from pcka_distill.baselines import mimic_loss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss

__all__ = ["MimicLoss"]


@DISTILL_LOSS_REGISTRY.register()
class MimicLoss(FeatureLoss):
    """MSE between the student's projected map and the teacher's (FitNets, ICLR 2015).

    FitNets takes half of the squared distance, of one layer, and before the training proper; here,
    as in distillation of detectors since, it is the mean over cells and channels of each level, all
    along. The best detection rows of the PCKA paper are PCKA + mimic. Arguments: see
    :class:`.FeatureLoss`.
    """

    project = True

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return mimic_loss(student, teacher)
