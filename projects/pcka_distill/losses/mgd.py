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

    .. math:: \mathcal{L} = \| F_t - G(M \odot f(F_s)) \|^2

    averaged over cells and channels. The paper sums over them, and weighs the sum with 2e-5 for
    one-stage and 5e-7 for two-stage detectors: there a fine level counts for more, having more
    cells; here all count alike.

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
        self._draws = 0

    def attach(self, pairs: Mapping[str, LevelPair]) -> dict[str, str]:
        notes = super().attach(pairs)
        for level, pair in pairs.items():
            c = pair.teacher_channels
            self.generators[level] = nn.Sequential(
                nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(c, c, 3, padding=1)
            )
        return notes

    def get_extra_state(self) -> Tensor:
        """How many masks were drawn: a resumed run goes on with the next."""
        return torch.tensor(self._draws)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on after so many."""
        self._draws = int(state)

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        # A generator of its own leaves the student's random numbers (its sampled regions) as they
        # are without us; that of the run gives each seed and process masks of its own. On the CPU:
        # a CUDA generator gives other numbers.
        seed = (torch.initial_seed() + 1_000_003 * self._draws) % 2**63
        generator = torch.Generator().manual_seed(seed)
        self._draws += 1
        b, _, h, w = student.shape
        kept = torch.rand(b, 1, h, w, generator=generator) >= self.mask_ratio
        return mimic_loss(self.generators[level](student * kept.to(student)), teacher)
