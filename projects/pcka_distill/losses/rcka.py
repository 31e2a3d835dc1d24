"""RCKA: relations between samples and between classes in the logits of a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from pcka_distill.errors import UserError
from pcka_distill.functional import rcka_loss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, DistillLoss, check_relation_weights
from pcka_distill.structures import Taps

__all__ = ["RCKALoss"]


def _select(
    student: Taps, teacher: Taps, levels: Sequence[str], k: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of logits to relate: suffix of the term -> (N, K) of each side.

    Dense groups (B, R, K): the k rows of each image that the teacher scores highest, over all
    levels, of those in the foreground if it is known. Region groups (R, K + 1) are already a
    chosen set and are taken whole, each by itself.
    """
    chosen, dense = {}, []
    for group, y in teacher.logits.items():
        if levels and group not in levels:
            continue
        x = student.logits[group]
        if y.dim() == 2:
            chosen["" if group == "box" else f"_{group}"] = (x, y)
            continue
        score = y.amax(-1)
        if student.foreground:
            score = score.masked_fill(~student.foreground[group], -torch.inf)
        # The best k of all levels are among the best k of each: select before concatenating,
        # and the 10^5 anchors of a COCO image are never copied.
        dense.append(_best(x, y, score, k))
    if dense:
        x, y, score = (torch.cat(side, dim=1) for side in zip(*dense))
        x, y, score = _best(x, y, score, k)
        known = ~score.isneginf()
        chosen[""] = (x[known], y[known])
    return chosen


def _best(x: Tensor, y: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of x and y (B, R, K) the k rows of each image with the best score (B, R); 0 for all."""
    if not k or k >= score.shape[1]:
        return x, y, score
    score, rows = score.topk(k, dim=1)
    return x.take_along_dim(rows[..., None], 1), y.take_along_dim(rows[..., None], 1), score


@DISTILL_LOSS_REGISTRY.register()
class RCKALoss(DistillLoss):
    """Relation CKA on head logits (paper section 3.3), see :func:`.functional.rcka_loss`.

    Two-stage heads: the rows are the student's sampled regions, which the teacher scores too; a
    cascade has a pair of terms for every stage.
    Dense heads: the rows are the locations that the teacher scores highest, because background
    drowns the Gram matrix of all anchors.

    Args:
        levels: feature levels of a dense head whose logits are read, empty for all.
        topk_per_image: rows kept for each image of a dense head; 0 keeps all.
        foreground_only: of a dense head relate only rows that the student's labels match with an
            object; still no more than ``topk_per_image``.
        center, intra_weight, inter_weight: see :func:`.functional.rcka_loss`.
        temperature: see :func:`.functional.rcka_loss`; 0 or None relates the logits themselves.
        weight, warmup_iters: see :class:`.DistillLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    reads = frozenset({"logits"})

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[str] = (),
        topk_per_image: int = 50,
        foreground_only: bool = False,
        center: bool = True,
        intra_weight: float = 1.0,
        inter_weight: float = 1.0,
        temperature: float | None = None,
        weight: float = 1.0,
        warmup_iters: int = 0,
    ) -> None:
        super().__init__(weight=weight, warmup_iters=warmup_iters)
        check_relation_weights(self, intra_weight, inter_weight)
        if topk_per_image < 0 or (temperature or 0) < 0:
            raise UserError("RCKALoss: TOPK_PER_IMAGE and TEMPERATURE must not be negative")
        self.levels = tuple(levels)
        self.topk_per_image = topk_per_image
        if foreground_only:
            self.reads = frozenset({"logits", "foreground"})
        self.center = center
        self.part_weights = {"intra": float(intra_weight), "inter": float(inter_weight)}
        self.temperature = temperature or None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.DISTILL.RCKA
        return {
            "levels": node.LEVELS,
            "topk_per_image": node.TOPK_PER_IMAGE,
            "foreground_only": node.FOREGROUND_ONLY,
            "center": node.CENTER,
            "intra_weight": node.INTRA_WEIGHT,
            "inter_weight": node.INTER_WEIGHT,
            "temperature": node.TEMPERATURE,
            "weight": node.WEIGHT,
            "warmup_iters": node.WARMUP_ITERS,
        }

    def check_logits(self, columns: int) -> None:
        if self.temperature and columns < 2:
            raise UserError(
                "RCKALoss: the softmax of one class is constant; set "
                "MODEL.DISTILL.RCKA.TEMPERATURE 0"
            )
        least = 3 if self.center else 2
        if self.part_weights["inter"] and columns < least:
            raise UserError(
                f"RCKALoss: the CKA between fewer than {least} classes is constant, and the heads "
                f"have {columns}; set MODEL.DISTILL.RCKA.INTER_WEIGHT 0"
            )

    def forward(self, student: Taps, teacher: Taps) -> dict[str, Tensor]:
        rows = _select(student, teacher, self.levels, self.topk_per_image)
        return {
            f"loss_rcka_{part}{suffix}": rcka_loss(
                x,
                y,
                center=self.center,
                intra_weight=self.weight * weight if part == "intra" else 0.0,
                inter_weight=self.weight * weight if part == "inter" else 0.0,
                temperature=self.temperature,
            )
            for suffix, (x, y) in rows.items()
            for part, weight in self.part_weights.items()
            if weight > 0
        }
