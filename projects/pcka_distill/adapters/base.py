"""The contract between a detector family and the model that distils it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from pcka_distill.errors import UserError
from pcka_distill.recorder import Call
from pcka_distill.structures import Taps

__all__ = ["Adapter", "Record", "find_adapter", "padding", "prepare_alike", "register_adapter"]

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
    #: what it can read, of {"features", "logits", "labels", "boxes"}
    provides: ClassVar[frozenset[str]] = frozenset({"features", "logits", "boxes"})
    #: whether most rows of its logits are background, see :class:`.Taps`
    background: ClassVar[bool] = True
    #: what a dataset's metadata call the names of its classes
    class_key: ClassVar[str] = "thing_classes"

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

    def is_sigmoid(self, model: Any) -> bool:
        """Whether its classes are scored one by one, not by a softmax with the background last."""
        raise NotImplementedError

    def select_classes(self, model: Any, logits: Tensor, classes: list[int]) -> Tensor:
        """The columns of some foreground classes, with whatever belongs to every class set."""
        return logits[..., classes]

    def hook_points(self, model: Any, reads: Collection[str]) -> dict[str, nn.Module]:
        """Name -> submodule whose calls :meth:`collect` wants to see.

        Args:
            reads: what the losses read, of {"features", "logits", "labels", "boxes"}.
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
        sizes = [(x["image"].shape[-2], x["image"].shape[-1]) for x in batched_inputs]
        taps = Taps(features=dict(call.output), images=call.args[0], sizes=sizes)
        if "logits" in reads:
            self.read_logits(model, record, taps)
            taps.sigmoid = self.is_sigmoid(model)
            taps.background = self.background
        if "labels" in reads:
            self.read_labels(model, batched_inputs, taps)
        if "boxes" in reads:
            taps.boxes = [_boxes(x["instances"]).to(call.args[0].device) for x in batched_inputs]
        return taps

    def cached_maps(self, model: Any) -> list[str]:
        """What of :meth:`teacher_features` :meth:`teacher_logits` may read."""
        return list(self.feature_shapes(model))

    def preprocess(self, model: Any, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """The normalised and padded batch (B, 3, H, W) of raw inputs, as a model makes it."""
        images: Tensor = model.preprocess_image(batched_inputs).tensor
        return images

    def read_logits(self, model: Any, record: Record, taps: Taps) -> None:
        """Add the student's logits, and the regions that they stand for, to its taps.

        Args:
            model: the student.
            record: its recorded calls at the hook points.
            taps: what is there already: features and images.
        """
        raise NotImplementedError

    def read_labels(self, model: Any, batched_inputs: list[dict[str, Any]], taps: Taps) -> None:
        """Likewise the labels of the logits' rows, once those are there."""
        raise NotImplementedError

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
        self, model: Any, batched_inputs: list[dict[str, Any]], student: Taps, *, alike: bool
    ) -> dict[str, Tensor]:
        """The teacher's feature maps, over at least the extent that the student's cover.

        Args:
            model: the teacher, in eval mode.
            batched_inputs: raw inputs, for it to normalise and pad in its own way.
            student: the student's taps of the same inputs; the images may be all that is there.
            alike: that way is the student's (see :func:`prepare_alike`): its images will do.

        Returns:
            level -> (B, C, H, W).
        """
        backbone = model.backbone
        if alike and student.images is not None:
            return dict(backbone(student.images))
        divisor, square = padding(backbone)
        longest = max(max(x["image"].shape[-2:]) for x in batched_inputs)
        if square and longest > square:
            raise UserError(
                f"the teacher pads images to {square} x {square} pixels, and here is one of "
                f"{longest}; set INPUT.MAX_SIZE_TRAIN to at most {square}"
            )
        images = self.preprocess(model, batched_inputs)
        # Both sides pad at the bottom and right. Where the teacher pads less than the student,
        # pad it further (with the zeros of ImageList), so that its maps can be cut to size.
        bottom, right = (
            max(0, -(-want // divisor) * divisor - have)
            for want, have in zip(student.padded_size, images.shape[-2:])
        )
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        return dict(backbone(images))

    @staticmethod
    def cut(x: Tensor, padded_size: tuple[int, int], stride: int) -> Tensor:
        """Cut a map (..., H, W) to the extent of the student's padded batch.

        Logits need it before they are flattened, so that row i is the same place on both sides;
        features are cut and resized by the model.
        """
        rows, cols = (-(-side // stride) for side in padded_size)
        return x[..., :rows, :cols]


def _boxes(truth: Any) -> Tensor:
    """(M, 4) of the instances of an image."""
    boxes: Tensor = truth.gt_boxes.tensor
    if boxes.shape[1:] != (4,):
        raise UserError(
            "a loss reads boxes along the axes of the image (x1, y1, x2, y2), and those of the "
            f"dataset have {boxes.shape[1]} numbers; leave it out"
        )
    return boxes


def padding(backbone: Any) -> tuple[int, int]:
    """What the sides of a batch must be multiples of, and the square it must fill; 0 for none."""
    constraints = getattr(backbone, "padding_constraints", None) or {}
    # That of a vision transformer is misspelled in Detectron2, which therefore passes it over: what
    # does not fill a patch is dropped.
    names = ("size_divisibility", "size_divisiblity")
    divisor = max(backbone.size_divisibility, *(constraints.get(name, 0) for name in names), 1)
    return divisor, constraints.get("square_size", 0)


def prepare_alike(student: Any, teacher: Any) -> bool:
    """Whether the images that a student normalised and padded are those of a teacher too.

    They are where both do it as Detectron2 does, with the same mean and deviation, and the
    student pads to a multiple of what the teacher needs.
    """
    for model in (student, teacher):
        # Of semantic segmentation it is a part of the forward.
        prepare = getattr(type(model), "preprocess_image", type(model).forward)
        if not prepare.__module__.startswith(("detectron2.modeling.meta_arch", "pcka_distill.")):
            return False
    (mine, my_square), (theirs, their_square) = (padding(x.backbone) for x in (student, teacher))
    return (
        mine % theirs == 0
        and not (my_square or their_square)
        and all(
            torch.equal(getattr(student, name).cpu(), getattr(teacher, name).cpu())
            for name in ("pixel_mean", "pixel_std")
        )
    )


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
