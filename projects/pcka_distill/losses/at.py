"""AT: where a network looks."""

from __future__ import annotations

from torch import Tensor

from pcka_distill.baselines import at_loss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss

__all__ = ["ATLoss"]


@DISTILL_LOSS_REGISTRY.register()
class ATLoss(FeatureLoss):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017), see :func:`.baselines.at_loss`.

    Channels may differ. The paper's weight is 1000 divided by the number of cells, which makes a
    fine level count for less; here all count alike. Arguments: see :class:`.FeatureLoss`.
    """

    project = None

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return at_loss(student, teacher)
