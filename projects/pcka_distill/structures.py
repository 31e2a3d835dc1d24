"""What is read off a detector while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Taps"]


@dataclass
class Taps:
    """Tensors of one forward pass that a distillation loss may compare.

    Attributes:
        features: level name -> (B, C, H, W), FPN feature maps.
        logits: group name -> class logits before any sigmoid or softmax. A dense head gives one
            group a level, (B, H*W*A, K) for A anchors of K classes; a box head gives one group
            ``"box"``, (R, K + 1) for the R regions of all images together, a cascade one group
            ``"stage0"``, ... a stage. Segmentation gives one group ``"pixels"``, (B, h, w, K), a
            classifier one group ``"image"``, (B, K).
        regions: group of a box head -> per image, the boxes that the rows of its logits stand
            for, in pixels of the network's input. Empty for dense detectors.
        labels: group -> what the student's own labels say of the rows of its logits, of their
            shape without the last axis: the index of a class, the number of classes for
            background, -1 for what is ignored.
        sigmoid: whether the logits are scored class by class, not by a softmax.
        background: whether most rows are background. Of a softmax its column is then the last,
            and of a dense head only the best rows are compared. Elsewhere every row has a class.
        boxes: per image (M, 4), the true boxes x1, y1, x2, y2 in pixels of the network's input.
        images: (B, 3, H, W), the batch after normalisation and padding.
        sizes: per image (height, width) of it without the padding, which is below and to the right;
            empty if that is not known.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    regions: dict[str, list[Any]] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    sigmoid: bool = False
    background: bool = True
    boxes: list[Tensor] = field(default_factory=list)
    images: Tensor | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def padded_size(self) -> tuple[int, int]:
        """(height, width) of the images, in pixels: every feature map covers this extent."""
        if self.images is None:
            raise ValueError("an adapter's collect() must fill in Taps.images")
        height, width = self.images.shape[-2:]
        return height, width

    def extents(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Per image, the (rows, columns) that it covers of a grid over the padded batch.

        Empty where nothing is known of the padding.
        """
        if not self.sizes:
            return []
        height, width = self.padded_size
        return [(-(-h * rows // height), -(-w * columns // width)) for h, w in self.sizes]
