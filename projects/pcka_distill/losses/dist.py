"""DIST: correlations of class scores."""

from __future__ import annotations

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from pcka_distill.baselines import dist_loss
from pcka_distill.errors import UserError
from pcka_distill.losses.base import (
    DISTILL_LOSS_REGISTRY,
    LogitLoss,
    check_relation_weights,
    check_temperature,
)

__all__ = ["DISTLoss"]


@DISTILL_LOSS_REGISTRY.register()
class DISTLoss(LogitLoss):
    """Distillation from a stronger teacher (Huang et al., NeurIPS 2022).

    Args:
        inter_weight, intra_weight, temperature: see :func:`.baselines.dist_loss`; the defaults are
            its code's.
        common: see :class:`.LogitLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    @configurable
    def __init__(
        self,
        *,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        temperature: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_relation_weights(self, intra_weight, inter_weight)
        check_temperature(self, temperature)
        self.options = {
            "inter_weight": inter_weight,
            "intra_weight": intra_weight,
            "temperature": temperature,
        }

    def check_logits(
        self, columns: int, *, sigmoid: bool, background: bool = True, images: int | None = None
    ) -> None:
        # Two that are tied by a softmax correlate by 1 or -1, whatever they are.
        least = 2 if sigmoid else 3
        if self.options["inter_weight"] and columns < least:
            raise UserError(
                f"DISTLoss: the correlation over fewer than {least} classes is constant, and the "
                f"heads have {columns}; set MODEL.DISTILL.DIST.INTER_WEIGHT 0"
            )

    def compare(
        self, student: Tensor, teacher: Tensor, *, sigmoid: bool, labels: Tensor | None
    ) -> dict[str, Tensor]:
        return {"": dist_loss(student, teacher, sigmoid=sigmoid, **self.options)}
