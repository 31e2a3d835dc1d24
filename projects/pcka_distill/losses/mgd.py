"""MGD: the teacher's map made from a masked one of the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from pcka_distill.baselines import mimic_loss
from pcka_distill.errors import UserError
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss
from pcka_distill.pairing import LevelPair

__all__ = ["MGDLoss"]


@DISTILL_LOSS_REGISTRY.register()
class MGDLoss(FeatureLoss):
    r"""Masked generative distillation (Yang et al., ECCV 2022, eq. 1-5).

    A share of the student's cells is blanked, the same in all channels, and two 3x3 convolutions
    with a ReLU in between have to make the teacher's map from what is left:

    .. math:: \\mathcal{L} = \\| F_t - G(M \\odot f(F_s)) \\|^2

    averaged over cells and channels. The paper sums over them, and weighs the sum with 2e-5 for
    one-stage and 5e-7 for two-stage detectors.

    Args:
        mask_ratio: share of the cells that is blanked, on average; the paper's lambda, 0.65 for
            one-stage and 0.45 for two-stage detectors.
        common: see :class:`.FeatureLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    @configurable
    def __init__(self, *, mask_ratio: float = 0.65, **common: Any) -> None:
        super().__init__(**common)
        if not 0 <= mask_ratio < 1:
            raise UserError(f"MGDLoss: MASK_RATIO must be in [0, 1), got {mask_ratio}")
        self.mask_ratio = mask_ratio
        self.generators = nn.ModuleDict()
        # Masks drawn so far. A generator of its own, seeded with it, leaves the student's random
        # numbers (its sampled regions) as they are without us, and goes on where a resumed run
        # stopped.
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def attach(self, pairs: Mapping[str, LevelPair]) -> None:
        super().attach(pairs)
        for level, pair in pairs.items():
            c = pair.teacher_channels
            self.generators[level] = nn.Sequential(
                nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(c, c, 3, padding=1)
            )

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        draws = self.draws
        assert isinstance(draws, Tensor)
        # On the CPU: a CUDA generator gives other numbers.
        generator = torch.Generator().manual_seed(int(draws))
        draws += 1
        b, _, h, w = student.shape
        kept = torch.rand(b, 1, h, w, generator=generator) >= self.mask_ratio
        return mimic_loss(self.generators[level](student * kept.to(student)), teacher)
