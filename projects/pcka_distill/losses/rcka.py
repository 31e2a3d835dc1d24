"""RCKA: relations between samples and between classes in the logits of a head."""

from __future__ import annotations

from typing import Any

from detectron2.config import configurable
from torch import Tensor

from pcka_distill.errors import UserError
from pcka_distill.functional import rcka_loss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, LogitLoss, check_relation_weights

__all__ = ["RCKALoss"]


@DISTILL_LOSS_REGISTRY.register()
class RCKALoss(LogitLoss):
    """Relation CKA on head logits (paper section 3.3), see :func:`.functional.rcka_loss`.

    Args:
        center, intra_weight, inter_weight: see :func:`.functional.rcka_loss`.
        temperature: relate scores, softmax or sigmoid as the head has, of logits divided by it,
            see :func:`.functional.rcka_loss`; 0 or None relates the logits themselves.
        samples: "rows" (regions, anchors, pixels), or "images": of a segmentation, each with all of
            its logits, as in the paper's published code. Its inter relation, which relates every
            logit of an image to every other, is made from products of images alone (paper 3.3 by
            ||X^T Y|| = <X X^T, Y Y^T>) and needs no more memory than intra.
        common: see :class:`.LogitLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    @configurable
    def __init__(
        self,
        *,
        center: bool = True,
        intra_weight: float = 1.0,
        inter_weight: float = 1.0,
        temperature: float | None = None,
        samples: str = "rows",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_relation_weights(self, intra_weight, inter_weight)
        if (temperature or 0) < 0:
            raise UserError("RCKALoss: TEMPERATURE must not be negative")
        if samples not in ("rows", "images"):
            raise UserError(f"RCKALoss: unknown samples {samples!r}, expected rows or images")
        self.whole_images = samples == "images"
        self.center = center
        self.part_weights = {"intra": float(intra_weight), "inter": float(inter_weight)}
        self.temperature = temperature or None

    def check_logits(
        self, columns: int, *, sigmoid: bool, background: bool = True, images: int | None = None
    ) -> None:
        if self.whole_images:
            least = 3 if self.center else 2
            if self.part_weights["intra"] and images is not None and images < least:
                raise UserError(
                    f"RCKALoss: the CKA of fewer than {least} images is constant, and a batch has "
                    f"{images} on each process; set MODEL.DISTILL.RCKA.CENTER False, or raise "
                    "SOLVER.IMS_PER_BATCH"
                )
            if background or self.temperature or self.foreground_only:
                raise UserError(
                    "RCKALoss: SAMPLES images is for segmentation, with TEMPERATURE 0 and "
                    "FOREGROUND_ONLY False; set MODEL.DISTILL.RCKA.SAMPLES rows"
                )
            return
        if self.temperature and columns < 2 and not sigmoid:
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

    def compare(
        self, student: Tensor, teacher: Tensor, *, sigmoid: bool, labels: Tensor | None
    ) -> dict[str, Tensor]:
        return {
            part: rcka_loss(
                student,
                teacher,
                center=self.center,
                intra_weight=weight if part == "intra" else 0.0,
                inter_weight=weight if part == "inter" else 0.0,
                temperature=self.temperature,
                sigmoid=sigmoid,
            )
            for part, weight in self.part_weights.items()
            if weight > 0
        }
