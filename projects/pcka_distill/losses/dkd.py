"""DKD: the teacher's doubt, apart from its mistakes."""

from __future__ import annotations

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from pcka_distill.baselines import dkd_loss
from pcka_distill.errors import UserError
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, LogitLoss

__all__ = ["DKDLoss"]


@DISTILL_LOSS_REGISTRY.register()
class DKDLoss(LogitLoss):
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022), see :func:`.baselines.dkd_loss`.

    It is made for the softmax of box heads. In a head that scores classes one by one the target has
    one other class, "not it": what DKD takes apart is then all in one part, and :class:`.KDLoss` is
    the loss to use.

    Args:
        alpha, beta, temperature: see :func:`.baselines.dkd_loss`; the defaults are the paper's for
            detection.
        common: see :class:`.LogitLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    reads = frozenset({"logits", "labels"})

    @configurable
    def __init__(
        self, *, alpha: float = 1.0, beta: float = 0.25, temperature: float = 1.0, **common: Any
    ) -> None:
        super().__init__(**common)
        if min(alpha, beta) < 0 or max(alpha, beta) == 0 or temperature <= 0:
            raise UserError(
                "DKDLoss: ALPHA and BETA must not be negative nor both 0, and TEMPERATURE must be "
                f"positive; got {alpha}, {beta} and {temperature}"
            )
        self.options = {"alpha": alpha, "beta": beta, "temperature": temperature}

    def check_logits(
        self, columns: int, *, sigmoid: bool, background: bool = True, images: int | None = None
    ) -> None:
        if sigmoid:
            raise UserError(
                "DKDLoss takes a softmax apart, and this head scores classes one by one; use KDLoss"
            )

    def compare(
        self, student: Tensor, teacher: Tensor, *, sigmoid: bool, labels: Tensor | None
    ) -> dict[str, Tensor]:
        assert labels is not None  # it reads them
        return {"": dkd_loss(student, teacher, labels, **self.options)}
