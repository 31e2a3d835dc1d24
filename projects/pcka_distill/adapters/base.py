"""The contract between a detector family and the model that distils it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from pcka_distill.errors import UserError
from pcka_distill.recorder import Call
from pcka_distill.structures import Taps

__all__ = ["Adapter", "Record", "find_adapter", "register_adapter"]

#: name of a hook point -> its calls, in order
Record = Mapping[str, list[Call]]


class Adapter:
    """Reads one family of detectors.

    Subclasses name the :attr:`family` and say where its features and logits can be read. An
    adapter keeps nothing: every method is given the model.
    """

    #: the meta-architecture that it reads, with its subclasses
    family: ClassVar[type[nn.Module]]
    #: what to call the family in a message; its class name if empty
    title: ClassVar[str] = ""
    #: what it can read, of {"features", "logits", "foreground"}
    provides: ClassVar[frozenset[str]] = frozenset({"features", "logits"})

    def feature_shapes(self, model: Any) -> dict[str, ShapeSpec]:
        """Level -> channels and stride of the feature maps that can be read."""
        return dict(model.backbone.output_shape())

    def num_classes(self, model: Any) -> int | None:
        """Foreground classes that the detector predicts; None if it does not say."""
        raise NotImplementedError

    def logit_signature(self, model: Any) -> dict[str, object]:
        """What must be equal in two models, but for the classes, for their logits to be compared.

        Returns:
            property -> value.

        Raises:
            UserError: this member of the family has no logits that can be read.
        """
        raise NotImplementedError

    def logit_groups(self, model: Any) -> list[str]:
        """The groups of logits that :meth:`collect` gives."""
        raise NotImplementedError

    def select_classes(self, model: Any, logits: Tensor, classes: list[int]) -> Tensor:
        """The columns of some foreground classes, with whatever belongs to every class set."""
        return logits[..., classes]

    def hook_points(self, model: Any, reads: Collection[str]) -> dict[str, nn.Module]:
        """Name -> submodule whose calls :meth:`collect` wants to see.

        Args:
            reads: what the losses read, of {"features", "logits", "foreground"}.
        """
        return {"backbone": model.backbone}

    def collect(
        self,
        model: Any,
        record: Record,
        reads: Collection[str],
        batched_inputs: list[dict[str, Any]],
    ) -> Taps:
        """Read a training forward of the student.

        Args:
            model: the student.
            record: its recorded calls at the hook points.
            reads: see :meth:`hook_points`.
            batched_inputs: what it was given.
        """
        call = record["backbone"][-1]
        images = call.args[0]
        return Taps(features=dict(call.output), padded_size=tuple(images.shape[-2:]))

    def run_teacher(
        self,
        model: Any,
        batched_inputs: list[dict[str, Any]],
        student: Taps,
        reads: Collection[str],
    ) -> Taps:
        """Run only those parts of a teacher that the losses read.

        Args:
            model: the teacher, in eval mode.
            batched_inputs: raw inputs; the teacher normalises and pads them in its own way.
            student: the student's taps of the same inputs.
            reads: see :meth:`hook_points`.
        """
        features, size = self.teacher_features(model, batched_inputs, student.padded_size)
        taps = Taps(features=features, regions=student.regions, padded_size=size)
        if "logits" in reads:
            taps.logits = self.teacher_logits(model, features, student)
        return taps

    def teacher_logits(
        self, model: Any, features: dict[str, Tensor], student: Taps
    ) -> dict[str, Tensor]:
        """The teacher's logits from its feature maps, for the rows of the student's.

        Args:
            model: the teacher, in eval mode.
            features: what :meth:`teacher_features` gave.
            student: the student's taps of the same inputs.

        Returns:
            the student's groups -> logits.
        """
        raise NotImplementedError

    def teacher_features(
        self, model: Any, batched_inputs: list[dict[str, Any]], padded_size: tuple[int, int]
    ) -> tuple[dict[str, Tensor], tuple[int, int]]:
        """The teacher's feature maps, over at least the extent that the student's cover.

        Returns:
            level -> (B, C, H, W), and the (height, width) in pixels that they cover.
        """
        backbone = model.backbone
        padding = getattr(backbone, "padding_constraints", None) or {}
        square = padding.get("square_size", 0)
        longest = max(max(x["image"].shape[-2:]) for x in batched_inputs)
        if square and longest > square:
            raise UserError(
                f"the teacher pads images to {square} x {square} pixels, and here is one of "
                f"{longest}; set INPUT.MAX_SIZE_TRAIN to at most {square}"
            )
        images = model.preprocess_image(batched_inputs).tensor
        divisor = max(backbone.size_divisibility, 1)
        if padding:
            # A vision transformer drops what does not fill a patch.
            divisor = max(divisor, *(x.stride for x in backbone.output_shape().values()))
        # Both sides pad at the bottom and right. Where the teacher pads less than the student,
        # pad it further (with the zeros of ImageList), so that its maps can be cut to size.
        bottom, right = (
            max(0, -(-want // divisor) * divisor - have)
            for want, have in zip(padded_size, images.shape[-2:])
        )
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        return backbone(images), tuple(images.shape[-2:])

    @staticmethod
    def cut(x: Tensor, padded_size: tuple[int, int], stride: int) -> Tensor:
        """Cut a map (..., H, W) to the extent of the student's padded batch.

        Logits need it before they are flattened, so that row i is the same place on both sides;
        features are cut and resized by the model.
        """
        rows, cols = (-(-side // stride) for side in padded_size)
        return x[..., :rows, :cols]


_ADAPTERS: list[type[Adapter]] = []


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: make an adapter known. Later ones win, so users can replace ours."""
    _ADAPTERS.insert(0, adapter)
    return adapter


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model's family.

    Raises:
        UserError: the family is unknown.
    """
    for adapter in _ADAPTERS:
        if isinstance(model, adapter.family):
            return adapter()
    known = ", ".join(sorted(x.title or x.family.__name__ for x in _ADAPTERS))
    raise UserError(
        f"no adapter for {type(model).__name__}: supported are {known}; for your own detector "
        "write one, as in examples/own_detector.py"
    )
