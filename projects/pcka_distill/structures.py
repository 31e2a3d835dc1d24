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
            ``"stage0"``, ... a stage.
        regions: group of a box head -> per image, the boxes that the rows of its logits stand
            for, in pixels of the network's input. Empty for dense detectors.
        foreground: group of a dense head -> (B, H*W*A) bool, the rows of its logits that the
            student's own labels match with an object.
        images: (B, 3, H, W), the batch after normalisation and padding.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    regions: dict[str, list[Any]] = field(default_factory=dict)
    foreground: dict[str, Tensor] = field(default_factory=dict)
    images: Tensor | None = None

    @property
    def padded_size(self) -> tuple[int, int]:
        """(height, width) of the images, in pixels: every feature map covers this extent."""
        if self.images is None:
            raise ValueError("an adapter's collect() must fill in Taps.images")
        height, width = self.images.shape[-2:]
        return height, width
