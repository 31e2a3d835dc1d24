"""A trained student in use: pictures in, predictions out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from torch import Tensor, nn

from pcka_distill.adapters import find_adapter
from pcka_distill.build import class_names, get_distill_cfg, merge_config, student_config
from pcka_distill.classifier import ImageClassifier
from pcka_distill.data.classification import ClassificationMapper
from pcka_distill.engine import load_student
from pcka_distill.errors import UserError

__all__ = ["Predictor", "load_config"]


def load_config(path: str, opts: Sequence[Any] = ()) -> CfgNode:
    """A config for use, on a CPU where it asks for a GPU that is not here.

    Args:
        path: a yaml, or the name of one that ships with pcka_distill.
        opts: overrides: key, value, ...

    Raises:
        UserError: no config, or keys that do not fit.
    """
    if os.path.isfile(path) and "_target_:" in Path(path).read_text(errors="replace"):
        raise UserError(f"{path} is a LazyConfig, which is not read here: its run has no yaml")
    cfg = get_distill_cfg()
    merge_config(cfg, path, list(opts), "config file")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


class Predictor:
    """A model in evaluation mode, and its pictures prepared as for its evaluation.

    Args:
        cfg: of the student alone.
        model: as ``cfg`` describes it, on any device; it is put into evaluation mode.

    Attributes:
        classes: names, in the order of its logits; None where no dataset of ``cfg`` is known here.
        stuff: names of what is no thing, of a panoptic segmentation; None as above.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        self.cfg = cfg
        self.model = model.eval()
        datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        self.classes = class_names(datasets, find_adapter(model).class_key)
        self.stuff = class_names(datasets, "stuff_classes")
        sizes = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self._resize = ResizeShortestEdge([sizes[0], sizes[0]], sizes[1])
        self._mapper = None
        if isinstance(model, ImageClassifier):
            self._mapper = ClassificationMapper.of(cfg, training=False)

    @classmethod
    def load(cls, config: str, weights: str = "", opts: Sequence[Any] = ()) -> Predictor:
        """With all of its weights.

        Args:
            config: the yaml that it was trained with, or ``student_config.yaml`` of its run.
            weights: its checkpoint; empty is ``model_final.pth`` in the folder of the config.
            opts: overrides: key, value, ...

        Raises:
            UserError: no config, no checkpoint, or one that is not the student's.
        """
        cfg = student_config(load_config(config, opts))
        if not weights:
            beside = Path(config).parent / "model_final.pth"
            if not beside.is_file():
                raise UserError(f"there is no {beside}: name the student's checkpoint (--weights)")
            weights = str(beside)
        cfg.MODEL.WEIGHTS = weights
        return cls(cfg, load_student(cfg))

    def prepare(self, image: np.ndarray[Any, Any]) -> dict[str, Any]:
        """A model's input.

        Args:
            image: (H, W, 3), uint8, RGB.
        """
        height, width = image.shape[:2]
        if self._mapper is not None:
            return self._mapper({"image": image, "height": height, "width": width})
        if self.cfg.INPUT.FORMAT == "BGR":
            image = image[:, :, ::-1]
        resized = self._resize.get_transform(image).apply_image(image)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}

    def __call__(self, image: np.ndarray[Any, Any]) -> dict[str, Any]:
        """What Detectron2's model says of a picture.

        Args:
            image: (H, W, 3), uint8, RGB.

        Returns:
            ``instances``, ``sem_seg`` (K, H, W), ``panoptic_seg`` or ``scores`` (K), on the CPU.
        """
        with torch.no_grad():
            (output,) = self.model([self.prepare(image)])
        return {key: _on_cpu(value) for key, value in output.items()}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_on_cpu(x) for x in value)
    return value.to("cpu") if isinstance(value, Tensor) or hasattr(value, "pred_boxes") else value
