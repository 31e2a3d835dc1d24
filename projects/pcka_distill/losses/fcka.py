"""FCKA: relations between whole feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import configurable
from torch import Tensor

from pcka_distill.errors import UserError
from pcka_distill.functional import fcka_loss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss

__all__ = ["FCKALoss"]


@DISTILL_LOSS_REGISTRY.register()
class FCKALoss(FeatureLoss):
    """CKA between the images of a batch (paper section 3.3), see :func:`.functional.fcka_loss`.

    Channels may differ. It is the feature loss of the paper's classification; with the few images
    that a detector's batch has there is little to relate.

    Args:
        center: see :func:`.functional.fcka_loss`.
        common: see :class:`.FeatureLoss`.

    Raises:
        UserError: batches of too few images.
    """

    project = None

    @configurable
    def __init__(self, *, center: bool = True, **common: Any) -> None:
        super().__init__(**common)
        self.center = center

    def check_maps(self, shapes: Mapping[str, tuple[int, int, int, int]]) -> dict[str, str]:
        least = 3 if self.center else 2
        images = min(shape[0] for shape in shapes.values())
        if images < least:
            raise UserError(
                f"FCKALoss: the CKA of fewer than {least} images is constant, and a batch has "
                f"{images} on each process; use PCKALoss, or raise SOLVER.IMS_PER_BATCH"
            )
        return {}

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return fcka_loss(student, teacher, center=self.center)
