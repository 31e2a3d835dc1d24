"""KD: the teacher's class scores."""

from __future__ import annotations

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from pcka_distill.baselines import kd_loss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, LogitLoss, check_temperature

__all__ = ["KDLoss"]


@DISTILL_LOSS_REGISTRY.register()
class KDLoss(LogitLoss):
    """Knowledge distillation (Hinton et al., 2015), see :func:`.baselines.kd_loss`.

    Args:
        temperature: see :func:`.baselines.kd_loss`.
        common: see :class:`.LogitLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    @configurable
    def __init__(self, *, temperature: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        check_temperature(self, temperature)
        self.temperature = temperature

    def compare(
        self, student: Tensor, teacher: Tensor, *, sigmoid: bool, labels: Tensor | None
    ) -> dict[str, Tensor]:
        return {"": kd_loss(student, teacher, temperature=self.temperature, sigmoid=sigmoid)}
