"""Image classifiers: the maps of each resolution, and one row of logits an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcka_distill.adapters.base import Adapter, Record, register_adapter
from pcka_distill.classifier import ImageClassifier
from pcka_distill.errors import UserError, reason
from pcka_distill.structures import Taps

__all__ = ["ClassifierAdapter"]

_GROUP = "image"


@register_adapter
class ClassifierAdapter(Adapter):
    """ImageClassifier: softmax logits of every image, which its network computes with its maps."""

    family = ImageClassifier
    title = "image classifiers (ImageClassifier)"
    provides = frozenset({"features", "logits", "labels"})
    background = False
    class_key = "classes"

    def num_classes(self, model: Any) -> int:
        return int(model.num_classes)

    def is_sigmoid(self, model: Any) -> bool:
        return False

    def logit_signature(self, model: Any) -> dict[str, object]:
        return {}

    def logit_groups(self, model: Any) -> list[str]:
        return [_GROUP]

    def cached_maps(self, model: Any) -> list[str]:
        return [*super().cached_maps(model), "logits"]

    def teacher_features(
        self, model: Any, batched_inputs: list[dict[str, Any]], student: Taps, *, alike: bool
    ) -> dict[str, Tensor]:
        try:
            maps = super().teacher_features(model, batched_inputs, student, alike=alike)
        except (AssertionError, RuntimeError) as e:
            if student.padded_size == (model.image_size, model.image_size):
                raise
            raise UserError(
                f"the teacher was made for images of {model.image_size} pixels and cannot take "
                f"those of {student.padded_size}: {reason(e)}; set MODEL.CLASSIFIER.IMAGE_SIZE "
                "alike in both configs"
            ) from e
        # Like the others of one cell, for whoever keeps them.
        return {**maps, "logits": maps["logits"][..., None, None]}

    def read_logits(self, model: Any, record: Record, taps: Taps) -> None:
        taps.logits = {_GROUP: record["backbone"][-1].output["logits"]}

    def read_labels(self, model: Any, batched_inputs: list[dict[str, Any]], taps: Taps) -> None:
        labels = [x["label"] for x in batched_inputs]
        taps.labels = {_GROUP: torch.tensor(labels, device=taps.logits[_GROUP].device)}

    def teacher_logits(
        self, model: Any, features: dict[str, Tensor], student: Taps
    ) -> dict[str, Tensor]:
        return {_GROUP: features["logits"].flatten(1)}
