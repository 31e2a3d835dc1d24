"""ReviewKD: each level of the teacher is taught to the student's level and those above it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import get_norm
from detectron2.utils import comm
from torch import Tensor, nn

from pcka_distill.baselines import hcl_loss
from pcka_distill.errors import UserError
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss
from pcka_distill.pairing import LevelPair
from pcka_distill.structures import Taps

__all__ = ["ReviewKDLoss"]


def _conv(inputs: int, outputs: int, size: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    # Of the whole batch, which for a detector is a few images a process.
    norm = get_norm("naiveSyncBN" if comm.get_world_size() > 1 else "BN", outputs)
    return nn.Sequential(conv, norm)


class _Fusion(nn.Module):
    """Attention-based fusion (ABF) of a level with what came from above it."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, last: bool) -> None:
        super().__init__()
        self.reduce = _conv(inputs, hidden, 1)
        self.expand = _conv(hidden, outputs, 3)
        self.attention = None if last else nn.Conv2d(2 * hidden, 2, 1)

    def forward(self, x: Tensor, above: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.reduce(x)
        if self.attention is not None and above is not None:
            above = F.interpolate(above, size=x.shape[-2:], mode="nearest")
            share = self.attention(torch.cat([x, above], 1)).sigmoid()
            x = x * share[:, :1] + above * share[:, 1:]
        return self.expand(x), x


@DISTILL_LOSS_REGISTRY.register()
class ReviewKDLoss(FeatureLoss):
    """Knowledge review (Chen et al., CVPR 2021): fused levels, :func:`.baselines.hcl_loss`.

    The student's coarsest level is compared to the teacher's; each finer one is fused with what
    was made of the coarser ones first. The fusion is learned and not part of the student. The
    paper's weight for detection is 1; its code fuses in as many channels as the student's coarsest
    level has. What images are padded with is compared, too, as in that code.

    Args:
        hidden: channels in which levels are fused; 0 for the teacher's, at most 512.
        common: see :class:`.FeatureLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    # The fusion brings the channels of the one to those of the other.
    project = None

    @configurable
    def __init__(self, *, hidden: int = 0, **common: Any) -> None:
        super().__init__(**common)
        if hidden < 0:
            raise UserError(f"ReviewKDLoss: HIDDEN must not be negative, got {hidden}")
        self.hidden = hidden
        self.fusions = nn.ModuleDict()

    def attach(self, pairs: Mapping[str, LevelPair]) -> dict[str, str]:
        super().attach(pairs)
        # Coarsest first.
        self.levels = tuple(sorted(pairs, key=lambda x: -pairs[x].student_stride))
        hidden = self.hidden or min(512, max(p.teacher_channels for p in pairs.values()))
        for level in self.levels:
            pair, top = pairs[level], level == self.levels[0]
            self.fusions[level] = _Fusion(
                pair.student_channels, hidden, pair.teacher_channels, last=top
            )
        return dict.fromkeys(self.levels, f"fused in {hidden} channels")

    def check_maps(self, shapes: Mapping[str, tuple[int, int, int, int]]) -> dict[str, str]:
        for level, (b, _, h, w) in shapes.items():
            if b * h * w < 2:
                raise UserError(
                    f"ReviewKDLoss: batch norm needs more than one cell of level {level!r}; raise "
                    "SOLVER.IMS_PER_BATCH or leave that level out of "
                    "MODEL.DISTILL.REVIEWKD.LEVELS"
                )
        return {}

    def forward(self, student: Taps, teacher: Taps) -> dict[str, Tensor]:
        losses, above = {}, None
        for level in self.levels:
            x, above = self.fusions[level](student.features[level], above)
            value = hcl_loss(x, teacher.features[level])
            losses[f"loss_{self.name}_{level}"] = self.weight * value
        return losses
