"""The contract between a distillation loss and the model that computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.utils.registry import Registry
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from pcka_distill.errors import UserError
from pcka_distill.pairing import LevelPair
from pcka_distill.structures import Taps

__all__ = ["DISTILL_LOSS_REGISTRY", "DistillLoss", "FeatureLoss", "check_relation_weights"]

DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")
DISTILL_LOSS_REGISTRY.__doc__ = """
Registry of distillation losses: subclasses of :class:`DistillLoss` that can be called with a
config (``from_config``). ``MODEL.DISTILL.LOSSES`` names them.
"""


class DistillLoss(nn.Module):
    """Compares what was read off the student with what was read off the teacher.

    A subclass implements :meth:`forward`, names what it :attr:`reads`, and never sees a detector.

    Args:
        weight: factor of every term that the loss returns.
        warmup_iters: iterations over which the weight rises linearly from 0; 0 is full weight
            from the start.

    Raises:
        UserError: a negative weight or a negative warm-up.
    """

    #: which parts of the taps it reads, of {"features", "logits", "foreground"}; only these are
    #: computed
    reads: frozenset[str] = frozenset()
    #: the student's feature levels it reads; empty means every level that can be paired
    levels: tuple[str, ...] = ()

    def __init__(self, *, weight: float = 1.0, warmup_iters: int = 0) -> None:
        super().__init__()
        name = type(self).__name__
        if weight < 0:
            raise UserError(f"{name}: weight must not be negative, got {weight}")
        if warmup_iters < 0:
            raise UserError(f"{name}: warm-up must not be negative, got {warmup_iters}")
        self.weight = float(weight)
        self.warmup_iters = int(warmup_iters)

    @property
    def name(self) -> str:
        """What its terms are called in the log, and its parameters in a checkpoint."""
        return type(self).__name__.removesuffix("Loss").lower()

    def schedule(self, iteration: int) -> float:
        """The factor of the weight at an iteration, in (0, 1]."""
        return min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0

    def attach(self, pairs: Mapping[str, LevelPair]) -> None:
        """Take notice of the paired levels; called once, before any forward.

        Args:
            pairs: student level -> pair, of the levels that this loss reads.
        """

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

    def check_logits(self, columns: int) -> None:
        """Refuse settings that leave nothing to compare in a head.

        Args:
            columns: of the logits, K or K + 1 for K classes.

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
    """A loss between feature maps, level by level, on equal channels.

    Where the channels of a pair differ, or always if ``project`` says so, the student's map goes
    through a 1x1 convolution first. It is trained with the student and is not part of it.

    Args:
        levels: student levels, empty for every level that can be paired.
        project: put the convolution on every level.
        weight, warmup_iters: see :class:`DistillLoss`.
    """

    reads = frozenset({"features"})

    def __init__(
        self,
        *,
        levels: Sequence[str] = (),
        project: bool = False,
        weight: float = 1.0,
        warmup_iters: int = 0,
    ) -> None:
        super().__init__(weight=weight, warmup_iters=warmup_iters)
        if len(set(levels)) != len(levels):
            raise UserError(f"{type(self).__name__}: a level is named twice in {list(levels)}")
        self.levels = tuple(levels)
        self._project = project
        self.projections = nn.ModuleDict()

    def attach(self, pairs: Mapping[str, LevelPair]) -> None:
        self.levels = tuple(pairs)
        for level, pair in pairs.items():
            if self._project or pair.student_channels != pair.teacher_channels:
                conv = nn.Conv2d(pair.student_channels, pair.teacher_channels, kernel_size=1)
                c2_xavier_fill(conv)
                self.projections[level] = conv

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one level: two (B, C, H, W) maps of one shape -> scalar, unweighted."""
        raise NotImplementedError

    def forward(self, student: Taps, teacher: Taps) -> dict[str, Tensor]:
        losses = {}
        for level in self.levels or student.features:
            x, y = student.features[level], teacher.features[level]
            if level in self.projections:
                x = self.projections[level](x)
            losses[f"loss_{self.name}_{level}"] = self.weight * self.compare(level, x, y)
        return losses


def check_relation_weights(loss: DistillLoss, intra: float, inter: float) -> None:
    """Refuse weights of the two relations that leave no loss, or a negative one."""
    if min(intra, inter) < 0 or max(intra, inter) == 0:
        raise UserError(
            f"{type(loss).__name__}: one of INTRA_WEIGHT and INTER_WEIGHT must be positive, and "
            f"none negative; got {intra} and {inter}"
        )
