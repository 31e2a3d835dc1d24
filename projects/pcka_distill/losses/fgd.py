"""FGD: objects and background apart, and their relation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from pcka_distill.baselines import fgd_focal_loss, object_masks
from pcka_distill.errors import UserError
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss
from pcka_distill.pairing import LevelPair
from pcka_distill.structures import Taps

__all__ = ["FGDLoss"]


class _GlobalContext(nn.Module):
    """What a map says as a whole is added to each of its cells (GcBlock, Cao et al., 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.attention = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
        )
        nn.init.kaiming_normal_(self.attention.weight)
        # It starts as the identity.
        last = self.transform[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        attention = self.attention(x).flatten(2).softmax(-1)
        context = torch.einsum("bcn,bn->bc", x.flatten(2), attention[:, 0])
        transformed: Tensor = self.transform(context[..., None, None])
        return x + transformed


@DISTILL_LOSS_REGISTRY.register()
class FGDLoss(FeatureLoss):
    r"""Focal and global distillation (Yang et al., CVPR 2022, eq. 1-13).

    Focal: :func:`.baselines.fgd_focal_loss`. Global: both maps go through a learned context block
    each, and :math:`\lambda \| R(F_t) - R(F_s) \|^2` compares them. All are sums over an image,
    as in the paper, and means over images.

    Args:
        alpha, beta: weights of objects and background.
        gamma: of the attention maps themselves.
        global_weight: of the global part, the paper's lambda. The defaults of the four are the
            paper's for RetinaNet; it has 1.6e-3, 8e-4, 8e-4 and 8e-6 for FCOS, and 5e-5, 2.5e-5,
            5e-5 and 5e-7 for two-stage detectors.
        temperature: of the attention.
        common: see :class:`.FeatureLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    reads = frozenset({"features", "boxes"})

    @configurable
    def __init__(
        self,
        *,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 1e-3,
        global_weight: float = 5e-6,
        temperature: float = 0.5,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if min(alpha, beta, gamma, global_weight) < 0 or temperature <= 0:
            raise UserError(
                "FGDLoss: ALPHA, BETA, GAMMA and GLOBAL_WEIGHT must not be negative, and "
                "TEMPERATURE must be positive"
            )
        self.options: dict[str, Any] = {
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "temperature": temperature,
        }
        self.global_weight = global_weight
        self.mine, self.theirs = nn.ModuleDict(), nn.ModuleDict()

    def attach(self, pairs: Mapping[str, LevelPair]) -> dict[str, str]:
        notes = super().attach(pairs)
        for level, pair in pairs.items():
            if self.global_weight:
                self.mine[level] = _GlobalContext(pair.teacher_channels)
                self.theirs[level] = _GlobalContext(pair.teacher_channels)
        return notes

    def forward(self, student: Taps, teacher: Taps) -> dict[str, Tensor]:
        losses = {}
        for level, x, y in self.maps(student, teacher):
            # Of what is left without the padding.
            cells = zip(student.padded_size, x.shape[-2:], student.features[level].shape[-2:])
            height, width = (side * left / whole for side, left, whole in cells)
            masks = object_masks(student.boxes, (height, width), x)
            loss = fgd_focal_loss(x, y, *masks, **self.options)
            if self.global_weight:
                with torch.autocast(x.device.type, enabled=False):
                    difference = self.theirs[level](y.float()) - self.mine[level](x.float())
                loss = loss + self.global_weight * difference.square().sum() / max(1, len(x))
            losses[f"loss_{self.name}_{level}"] = self.weight * loss
        return losses
