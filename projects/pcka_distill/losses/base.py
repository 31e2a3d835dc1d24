"""The contract between a distillation loss and the model that computes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from pcka_distill.errors import UserError
from pcka_distill.functional import own_cells, without_padding
from pcka_distill.pairing import LevelPair
from pcka_distill.structures import Taps

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "DistillLoss",
    "FeatureLoss",
    "LogitLoss",
    "check_relation_weights",
    "check_temperature",
]

DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")
DISTILL_LOSS_REGISTRY.__doc__ = """
Registry of distillation losses: subclasses of :class:`DistillLoss` that can be called with a
config (Detectron2's ``@configurable``). ``MODEL.DISTILL.LOSSES`` names them.
"""


class DistillLoss(nn.Module):
    """Compares what was read off the student with what was read off the teacher.

    A subclass implements :meth:`forward`, names what it :attr:`reads`, and never sees a detector.

    Args:
        weight: factor of every term that the loss returns.
        warmup_iters: iterations over which the weight rises linearly from 0; 0 is full weight
            from the start.
        decay_iters: (first, last) iteration of its linear fall to 0; empty for none.

    Raises:
        UserError: a negative weight, a negative warm-up, iterations that do not follow each other.
    """

    #: which parts of the taps it reads, of {"features", "logits", "labels", "boxes"}; only these
    #: are computed, and the logits that labels are of
    reads: frozenset[str] = frozenset()
    #: the student's feature levels it reads; empty means every level that can be paired
    levels: tuple[str, ...] = ()

    @configurable
    def __init__(
        self, *, weight: float = 1.0, warmup_iters: int = 0, decay_iters: Sequence[int] = ()
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if weight < 0:
            raise UserError(f"{name}: weight must not be negative, got {weight}")
        if warmup_iters < 0:
            raise UserError(f"{name}: warm-up must not be negative, got {warmup_iters}")
        if decay_iters and not (len(decay_iters) == 2 and 0 <= decay_iters[0] < decay_iters[1]):
            raise UserError(
                f"{name}: the decay is from one iteration to a later one, got {list(decay_iters)}"
            )
        self.weight = float(weight)
        self.warmup_iters = int(warmup_iters)
        self.decay_iters = tuple(decay_iters)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of the constructor, from ``MODEL.DISTILL.<NAME>``: its keys are theirs.

        A loss without such a node is built with its own defaults.
        """
        node = cfg.MODEL.DISTILL.get(cls.__name__.removesuffix("Loss").upper(), {})
        return {key.lower(): value for key, value in node.items()}

    @property
    def name(self) -> str:
        """What its terms are called in the log, and its parameters in a checkpoint."""
        return type(self).__name__.removesuffix("Loss").lower()

    def schedule(self, iteration: int) -> float:
        """The factor of the weight at an iteration, in [0, 1]."""
        factor = min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0
        if self.decay_iters:
            first, last = self.decay_iters
            factor *= min(1.0, max(0.0, (last - iteration) / (last - first)))
        return factor

    def attach(self, pairs: Mapping[str, LevelPair]) -> dict[str, str]:
        """Take notice of the paired levels; called once, before any forward.

        Args:
            pairs: student level -> pair, of the levels that this loss reads.

        Returns:
            level -> what is put between the two, for the log; may be empty.
        """
        return {}

    def check_maps(self, shapes: Mapping[str, tuple[int, int, int, int]]) -> dict[str, str]:
        """Refuse settings that leave nothing to compare.

        Args:
            shapes: student level -> (B, C, H, W), the smallest map that training will see there.

        Returns:
            level -> what is worth knowing about it, for the log; may be empty.

        Raises:
            UserError: with what to change.
        """
        return {}

    def check_logits(
        self, columns: int, *, sigmoid: bool, background: bool = True, images: int | None = None
    ) -> None:
        """Refuse settings that leave nothing to compare in a head.

        Args:
            columns: of the logits, K or K + 1 for K classes.
            sigmoid, background: see :class:`.Taps`.
            images: of the smallest batch of a process; None if that is not known.

        Raises:
            UserError: with what to change.
        """

    def forward(self, student: Taps, teacher: Taps) -> dict[str, Tensor]:
        """Compute the loss.

        Args:
            student: its tensors carry the gradient.
            teacher: constants. Features are keyed by the *student's* level names and lie on the
                student's grid (same H x W); channels may differ. Logits have the student's shape.

        Returns:
            ``loss_<name>_<level or part>`` -> scalar, times ``weight``.
        """
        raise NotImplementedError


class FeatureLoss(DistillLoss):
    """A loss between feature maps, level by level.

    Where the channels of a pair differ, or always if ``project`` says so, the student's map goes
    through a 1x1 convolution first. It is trained with the student and is not part of it.

    Args:
        levels: student levels, empty for every level that can be paired.
        weight, warmup_iters, decay_iters: see :class:`DistillLoss`.
    """

    reads = frozenset({"features"})
    #: put the convolution on every level, or (None) never: the loss compares maps of any channels
    project: bool | None = False
    #: what stands where images are padded, see :func:`.functional.without_padding`
    fill: str = "zero"

    @configurable
    def __init__(self, *, levels: Sequence[str] = (), **common: Any) -> None:
        super().__init__(**common)
        if len(set(levels)) != len(levels):
            raise UserError(f"{type(self).__name__}: a level is named twice in {list(levels)}")
        self.levels = tuple(levels)
        self.projections = nn.ModuleDict()

    def attach(self, pairs: Mapping[str, LevelPair]) -> dict[str, str]:
        self.levels = tuple(pairs)
        notes = {}
        for level, pair in pairs.items():
            mine, theirs = pair.student_channels, pair.teacher_channels
            if self.project or (mine != theirs and self.project is not None):
                conv = nn.Conv2d(mine, theirs, kernel_size=1)
                c2_xavier_fill(conv)
                self.projections[level] = conv
                notes[level] = f"1x1 conv {mine} -> {theirs} on the student"
        return notes

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one level: two (B, C, H, W) maps of one shape -> scalar, unweighted."""
        raise NotImplementedError

    def maps(self, student: Taps, teacher: Taps) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Level, the student's map, projected where it has to be, and the teacher's.

        Both without what is padding, which may leave fewer rows and columns than in the taps.
        """
        for level in self.levels or student.features:
            x, y = student.features[level], teacher.features[level]
            if level in self.projections:
                x = self.projections[level](x)
            if extents := student.extents(*x.shape[-2:]):
                x, y = (without_padding(z, extents, self.fill) for z in (x, y))
            yield level, x, y

    def forward(self, student: Taps, teacher: Taps) -> dict[str, Tensor]:
        return {
            f"loss_{self.name}_{level}": self.weight * self.compare(level, x, y)
            for level, x, y in self.maps(student, teacher)
        }


class LogitLoss(DistillLoss):
    """A loss between rows of class logits.

    Two-stage heads: the rows are the student's sampled regions, which the teacher scores too; a
    cascade has a term for every stage.
    Dense heads: the rows are the locations that the teacher scores highest, over all levels,
    because background drowns the few objects in a mean over all anchors.
    Segmentation: the rows are all pixels, on the grid that the student's head predicts on.
    Classification: the rows are the images.

    Args:
        levels: feature levels of a dense head whose logits are read, or stages of a cascade;
            empty for all.
        topk_per_image: rows kept for each image of a dense detection head; 0 keeps all.
        foreground_only: keep only rows that the student's labels match with an object, or pixels
            that are labelled; of a dense head still no more than ``topk_per_image``.
        weight, warmup_iters, decay_iters: see :class:`DistillLoss`.

    Raises:
        UserError: a setting that cannot work.
    """

    reads = frozenset({"logits"})
    #: a row is an image with all of its logits, where every pixel has some
    whole_images: bool = False

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[str] = (),
        topk_per_image: int = 50,
        foreground_only: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if topk_per_image < 0:
            raise UserError(f"{type(self).__name__}: TOPK_PER_IMAGE must not be negative")
        self.levels = tuple(levels)
        self.topk_per_image = topk_per_image
        self.foreground_only = foreground_only
        if foreground_only:
            self.reads = self.reads | {"labels"}

    def compare(
        self, student: Tensor, teacher: Tensor, *, sigmoid: bool, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """The terms of one set of rows.

        Args:
            student, teacher: (N, P) logits of N rows; N may be 0.
            sigmoid: see :class:`.Taps`.
            labels: (N,), see :class:`.Taps`; None unless the loss reads them.

        Returns:
            part, "" if there is but one -> scalar, unweighted.
        """
        raise NotImplementedError

    def forward(self, student: Taps, teacher: Taps) -> dict[str, Tensor]:
        losses = {}
        for suffix, (x, y, labels) in self._rows(student, teacher).items():
            for part, value in self.compare(x, y, sigmoid=student.sigmoid, labels=labels).items():
                name = "_".join(filter(None, ("loss", self.name, part, suffix)))
                losses[name] = self.weight * value
        return losses

    def _rows(
        self, student: Taps, teacher: Taps
    ) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        """Suffix of the term -> logits (N, P) of each side, labels (N,)."""
        chosen, dense = {}, []
        k = self.topk_per_image if student.background else 0
        for group, y in teacher.logits.items():
            if self.levels and group not in self.levels:
                continue
            x, labels, kept = student.logits[group], None, None
            if "labels" in self.reads:
                labels = student.labels[group]
            if self.foreground_only and labels is not None:
                classes = y.shape[-1] - (student.background and not student.sigmoid)
                kept = (labels >= 0) & (labels < classes)
            if y.dim() == 2:
                if kept is not None and labels is not None:
                    x, y, labels = x[kept], y[kept], labels[kept]
                chosen["" if group in ("box", "image") else group] = (x, y, labels)
                continue
            if y.dim() == 4 and (extents := student.extents(*y.shape[1:3])):
                x, y, kept, labels = _own_pixels(x, y, kept, labels, extents)
            if self.whole_images:
                chosen[""] = (x.flatten(1), y.flatten(1), None)
                continue
            # Pixels are rows like others.
            x, y = x.flatten(1, -2), y.flatten(1, -2)
            if labels is None:
                labels = torch.zeros_like(y[..., 0], dtype=torch.long)
            labels = labels.flatten(1)
            score = y.amax(-1)
            if kept is not None:
                score = score.masked_fill(~kept.flatten(1), -torch.inf)
            # The best k of all levels are among the best k of each: select before concatenating,
            # and the 10^5 anchors of a COCO image are never copied.
            dense.append(_best(x, y, labels, score, k))
        if dense:
            x, y, labels, score = (torch.cat(side, dim=1) for side in zip(*dense))
            x, y, labels, score = _best(x, y, labels, score, k)
            known = ~score.isneginf()
            labelled = labels[known] if "labels" in self.reads else None
            chosen[""] = (x[known], y[known], labelled)
        return chosen


def _own_pixels(
    x: Tensor,
    y: Tensor,
    kept: Tensor | None,
    labels: Tensor | None,
    extents: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Logits (B, h, w, K), and what is known of their pixels (B, h, w), without the padding."""
    x, y = (without_padding(z.movedim(-1, 1), extents).movedim(1, -1) for z in (x, y))
    rows, columns = y.shape[1:3]
    if kept is not None:
        kept = kept[:, :rows, :columns]
    if any(extent != (rows, columns) for extent in extents):
        own = own_cells(extents, y.device)
        kept = own if kept is None else kept & own
    return x, y, kept, None if labels is None else labels[:, :rows, :columns]


def _best(x: Tensor, y: Tensor, labels: Tensor, score: Tensor, k: int) -> tuple[Tensor, ...]:
    """Of x and y (B, R, P) and labels the k rows of each image with the best score (B, R)."""
    if not k or k >= score.shape[1]:
        return x, y, labels, score
    score, rows = score.topk(k, dim=1)
    x, y = (z.take_along_dim(rows[..., None], 1) for z in (x, y))
    return x, y, labels.take_along_dim(rows, 1), score


def check_relation_weights(loss: DistillLoss, intra: float, inter: float) -> None:
    """Refuse weights of the two relations that leave no loss, or a negative one."""
    if min(intra, inter) < 0 or max(intra, inter) == 0:
        raise UserError(
            f"{type(loss).__name__}: one of INTRA_WEIGHT and INTER_WEIGHT must be positive, and "
            f"none negative; got {intra} and {inter}"
        )


def check_temperature(loss: DistillLoss, temperature: float) -> None:
    """Refuse a temperature that is not positive."""
    if temperature <= 0:
        raise UserError(f"{type(loss).__name__}: TEMPERATURE must be positive, got {temperature}")
