"""Which feature map of the student is taught by which of the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor

from pcka_distill.errors import UserError

__all__ = ["LevelPair", "align", "describe", "pair_levels"]

# A map of twice or half the resolution still shows the same objects; beyond that two levels of an
# FPN stand for objects of different sizes.
_MAX_STRIDE_RATIO = 2


@dataclass(frozen=True)
class LevelPair:
    """A student level and the teacher level it learns from.

    Attributes:
        student, teacher: level names in the two ``output_shape()``.
        student_channels, teacher_channels: C of the two maps.
        student_stride, teacher_stride: pixels of the input per cell of the map.
    """

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int
    student_stride: int
    teacher_stride: int

    def __str__(self) -> str:
        resized = self.student_stride != self.teacher_stride
        return (
            f"{self.student} ({self.student_channels} channels, stride {self.student_stride}) <- "
            f"{self.teacher} ({self.teacher_channels} channels, stride {self.teacher_stride})"
            + (", the teacher's resized to the student's grid" if resized else "")
        )


def _list(shapes: Mapping[str, ShapeSpec]) -> str:
    return ", ".join(f"{k} (stride {v.stride}, {v.channels} channels)" for k, v in shapes.items())


def pair_levels(
    student: Mapping[str, ShapeSpec],
    teacher: Mapping[str, ShapeSpec],
    levels: Sequence[str] = (),
) -> dict[str, LevelPair]:
    """Pair feature levels by stride.

    The teacher's level of the same stride is taken (of the same name, if several have it), else
    the nearest one within a factor of two, whose map is then resized.

    Args:
        student, teacher: ``backbone.output_shape()`` of the two.
        levels: the student's levels to pair; empty means every one that the teacher can match
            without resizing.

    Returns:
        student level -> pair, in the order of ``levels``.

    Raises:
        UserError: a level that the student lacks, or that nothing in the teacher can match. The
            message lists both sides.
    """
    both = f"student has {_list(student)}; teacher has {_list(teacher)}"
    strides = [s.stride for s in (*student.values(), *teacher.values())]
    if any(not s for s in strides):
        raise UserError(f"levels cannot be paired without strides: {both}")
    pairs: dict[str, LevelPair] = {}
    for level in levels or student:
        if level not in student:
            raise UserError(f"unknown level {level!r}: {both}; change LEVELS")
        mine = student[level]

        def distance(name: str, mine: ShapeSpec = mine, level: str = level) -> tuple[float, bool]:
            a, b = sorted((mine.stride, teacher[name].stride))
            return b / a, name != level

        match = min(teacher, key=distance, default=None)
        limit = _MAX_STRIDE_RATIO if levels else 1
        if match is None or distance(match)[0] > limit:
            if levels:
                raise UserError(f"level {level!r} has no counterpart: {both}; change LEVELS")
            continue
        theirs = teacher[match]
        pairs[level] = LevelPair(
            level, match, mine.channels, theirs.channels, mine.stride, theirs.stride
        )
    if not pairs:
        raise UserError(f"no level of the two feature pyramids matches: {both}")
    return pairs


def describe(pairs: Mapping[str, LevelPair]) -> str:
    """The pairing plan, one line a level."""
    return "\n".join(f"  {pair}" for pair in pairs.values())


def align(
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    pairs: Mapping[str, LevelPair],
    padded_size: tuple[int, int],
) -> dict[str, Tensor]:
    """Bring the teacher's maps onto the student's grid.

    Both networks pad images at the bottom and at the right, perhaps to different multiples: the
    teacher's map is cut to the extent that the student's covers, then resized if the strides
    differ. The student's maps are left as they are.

    Args:
        teacher: teacher level -> (B, C_t, H_t, W_t), covering at least ``padded_size``.
        student: student level -> (B, C_s, H, W).
        pairs: see :func:`pair_levels`.
        padded_size: (height, width) of the student's padded batch, in pixels.

    Returns:
        student level -> (B, C_t, H, W).
    """
    aligned = {}
    for level, pair in pairs.items():
        size = student[level].shape[-2:]
        rows, cols = (-(-side // pair.teacher_stride) for side in padded_size)
        x = teacher[pair.teacher][..., :rows, :cols]
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        aligned[level] = x
    return aligned
