"""PKD: features that correlate, whatever their magnitudes."""

from __future__ import annotations

from torch import Tensor

from pcka_distill.baselines import pkd_loss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss

__all__ = ["PKDLoss"]


@DISTILL_LOSS_REGISTRY.register()
class PKDLoss(FeatureLoss):
    """Pearson correlation distillation (Cao et al., NeurIPS 2022), see :func:`.baselines.pkd_loss`.

    The weights in its code are 6 for Faster R-CNN and 10 for RetinaNet. Arguments: see
    :class:`.FeatureLoss`.
    """

    fill = "batch"

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return pkd_loss(student, teacher)
