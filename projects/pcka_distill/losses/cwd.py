"""CWD: where each channel looks."""

from __future__ import annotations

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from pcka_distill.baselines import cwd_loss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss, check_temperature

__all__ = ["CWDLoss"]


@DISTILL_LOSS_REGISTRY.register()
class CWDLoss(FeatureLoss):
    """Channel-wise distillation (Shu et al., ICCV 2021), see :func:`.baselines.cwd_loss`.

    For the FPN of detectors a weight of 10 and a temperature of 1 are in use (MMRazor).

    Args:
        temperature: see :func:`.baselines.cwd_loss`.
        common: see :class:`.FeatureLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    fill = "image"

    @configurable
    def __init__(self, *, temperature: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        check_temperature(self, temperature)
        self.temperature = temperature

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        return cwd_loss(student, teacher, temperature=self.temperature)
