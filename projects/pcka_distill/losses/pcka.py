"""PCKA: relations between the patches of feature maps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import configurable
from torch import Tensor

from pcka_distill.errors import UserError
from pcka_distill.functional import (
    CHANNEL_FREE_LAYOUTS,
    CHANNEL_LAYOUTS,
    CHANNEL_WEIGHTS,
    FORMS,
    LAYOUTS,
    patch_counts,
    pcka_loss,
)
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, FeatureLoss, check_relation_weights

__all__ = ["PCKALoss"]

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")


@DISTILL_LOSS_REGISTRY.register()
class PCKALoss(FeatureLoss):
    """Patch-based CKA on FPN levels (paper section 3.4), see :func:`.functional.pcka_loss`.

    Args:
        levels: student levels, empty for every level that can be paired.
        patch_size: side of a patch in cells of the map: one for all levels, or one a level.
        layout, form, channel_weight, center, debiased, intra_weight, inter_weight: see
            :func:`.functional.pcka_loss`.
        common: see :class:`.DistillLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[str] = (),
        patch_size: int | Sequence[int] = 16,
        layout: str = "spatial",
        form: str = "cka",
        channel_weight: str = "equal",
        center: bool = True,
        debiased: bool = False,
        intra_weight: float = 1.0,
        inter_weight: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(levels=levels, **common)
        sizes = (patch_size,) if isinstance(patch_size, int) else tuple(patch_size)
        if not sizes or not all(isinstance(p, int) and p > 0 for p in sizes):
            raise UserError(
                f"PCKALoss: patch sizes must be whole numbers of at least 1, got {list(sizes)}"
            )
        if len(sizes) > 1 and len(sizes) != len(self.levels):
            raise UserError(
                f"PCKALoss: {len(sizes)} patch sizes for {len(self.levels)} levels "
                f"{list(self.levels)}; give one PATCH_SIZE, or one for each of LEVELS"
            )
        if layout not in LAYOUTS:
            raise UserError(f"PCKALoss: unknown layout {layout!r}, expected {', '.join(LAYOUTS)}")
        if form not in FORMS:
            raise UserError(f"PCKALoss: unknown form {form!r}, expected {', '.join(FORMS)}")
        if channel_weight not in CHANNEL_WEIGHTS:
            raise UserError(
                f"PCKALoss: unknown channel weight {channel_weight!r}, expected "
                f"{', '.join(CHANNEL_WEIGHTS)}"
            )
        if channel_weight != "equal" and layout not in CHANNEL_LAYOUTS:
            raise UserError(
                f"PCKALoss: layout {layout!r} has no CKA for each channel to weigh; set "
                "CHANNEL_WEIGHT equal"
            )
        check_relation_weights(self, intra_weight, inter_weight)
        if form != "cka" and debiased:
            raise UserError(
                f"PCKALoss: a debiased CKA may be negative, and the form {form!r} is for those "
                "that are not; set DEBIASED False"
            )
        if layout in CHANNEL_FREE_LAYOUTS and not inter_weight and form != "signed":
            self.project = None
        # What the layout's centring takes out: a feature is of one image in it, or of all.
        if center or debiased:
            self.fill = "batch" if layout in ("sample", "batch") else "image"
        self._patch_sizes = sizes
        self._warned: set[str] = set()
        self.options: dict[str, Any] = {
            "layout": layout,
            "form": form,
            "channel_weight": channel_weight,
            "center": center,
            "debiased": debiased,
            "intra_weight": intra_weight,
            "inter_weight": inter_weight,
        }

    def patch_size(self, level: str) -> int:
        """Side of a patch on a level, in cells."""
        if len(self._patch_sizes) == 1:
            return self._patch_sizes[0]
        return self._patch_sizes[self.levels.index(level)]

    def _too_few(self, shape: tuple[int, int, int, int], p: int) -> str:
        """Which relation between patches of p has nothing to say on (B, C, H, W), or ""."""
        _, patches, values = patch_counts(shape, p, self.options["layout"])
        least = 4 if self.options["debiased"] else 3 if self.options["center"] else 2
        for part, samples, features in (("intra", patches, values), ("inter", values, patches)):
            if self.options["form"] == "signed":
                # Two points on a line correlate by 1 or -1; elsewhere two are enough.
                least = 3 if self.options["center"] and features == 1 else 2
            if self.options[f"{part}_weight"] and samples < least:
                return (
                    f"the {part} relation has {samples} samples, and the CKA of fewer than {least} "
                    f"is constant, with patches of {p} on"
                )
        return ""

    def _unfit(self, shape: tuple[int, int, int, int], p: int) -> str:
        """Why patches of p are refused on maps of a shape (B, C, H, W), or ""."""
        if p > min(shape[-2:]):
            return f"a patch of {p} is larger than"
        return self._too_few(shape, p)

    def check_maps(self, shapes: Mapping[str, tuple[int, int, int, int]]) -> dict[str, str]:
        notes: dict[str, str] = {}
        fitting: dict[str, int] = {}
        problem = ""
        for level, shape in shapes.items():
            p = self.patch_size(level)
            unfit = self._unfit(shape, p)
            if unfit and not problem:
                cells = f"{shape[2]} x {shape[3]} cells at the smallest training size"
                problem = f"{unfit} level {level!r} ({cells})"
            for q in (p >> i for i in range(p.bit_length())):
                if not self._unfit(shape, q):
                    fitting[level] = q
                    break
            notes[level] = self._note(shape, p)
        if problem:
            sizes = list(fitting.values())
            advice = "no size fits: change the relations or the levels"
            if len(fitting) == len(shapes) and len(set(sizes)) == 1:
                advice = f"set MODEL.DISTILL.PCKA.PATCH_SIZE [{sizes[0]}]"
            elif fitting:
                advice = f"set MODEL.DISTILL.PCKA.PATCH_SIZE {sizes} and LEVELS {list(fitting)}"
            raise UserError(f"PCKALoss: {problem}; {advice}")
        return notes

    def _note(self, shape: tuple[int, int, int, int], p: int) -> str:
        """The CKA of unrelated maps: near 1 the loss has little left to say."""
        _, patches, values = patch_counts(shape, p, self.options["layout"])
        counts = f"{patches} patches of {values} values"
        if self.options["form"] == "signed":
            return counts
        expected = []
        for part, n, features in (("intra", patches, values), ("inter", values, patches)):
            if self.options[f"{part}_weight"]:
                # The expectation for Gaussian noise.
                noise = 0.0 if self.options["debiased"] else features / (features + n)
                expected.append(f"{part} {noise:.2f}")
        return f"{counts}; CKA of unrelated maps: {', '.join(expected)}"

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        p = self.patch_size(level)
        b, c, h, w = student.shape
        if level not in self._warned and (few := self._too_few((b, c, h, w), p)):
            self._warned.add(level)
            logger.warning(
                f"PCKALoss: {few} level {level!r} ({h} x {w} cells): that relation teaches nothing "
                "on such images (said once)"
            )
        return pcka_loss(student, teacher, patch_size=p, **self.options)
