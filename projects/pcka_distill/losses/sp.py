"""SP: which images look alike."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pcka_distill.baselines import sp_loss
from pcka_distill.errors import UserError
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss

__all__ = ["SPLoss"]


@DISTILL_LOSS_REGISTRY.register()
class SPLoss(FeatureLoss):
    """Similarity-preserving distillation (Tung & Mori, ICCV 2019), see :func:`.baselines.sp_loss`.

    Channels may differ. Relates the images of a batch: it needs more than a few. The paper's weight
    is 3000, at one level and batches of 128. Arguments: see :class:`.FeatureLoss`.

    Raises:
        UserError: batches of one image.
    """

    project = None

    def check_maps(self, shapes: Mapping[str, tuple[int, int, int, int]]) -> dict[str, str]:
        if min(shape[0] for shape in shapes.values()) < 2:
            raise UserError(
                "SPLoss: one image has no relation to another, and a batch has one on each "
                "process; raise SOLVER.IMS_PER_BATCH"
            )
        return {}

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return sp_loss(student, teacher)
