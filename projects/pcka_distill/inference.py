"""A trained student in use: pictures in, predictions out."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from pcka_distill.adapters import find_adapter
from pcka_distill.build import (
    build_student,
    class_names,
    get_distill_cfg,
    merge_config,
    student_config,
)
from pcka_distill.classifier import ImageClassifier
from pcka_distill.data.classification import ClassificationMapper
from pcka_distill.engine import load_student
from pcka_distill.errors import UserError, reason
from pcka_distill.lazy import _make_student, _names, _student_node, _target
from pcka_distill.lazy import load_config as load_lazy

__all__ = ["Predictor", "errors_of_a_tool", "load_config"]

# What can be overridden beside a LazyConfig; all else is in the file.
_BESIDE_LAZY = ("TRUST_CONFIG", "TRUST_CHECKPOINT", "MODEL.DEVICE", "INPUT.FORMAT",
                "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "DATASETS.TRAIN",
                "DATASETS.TEST")  # fmt: skip


@contextlib.contextmanager
def errors_of_a_tool(opts: Sequence[Any] = ()) -> Iterator[None]:
    """What errors advise, for a tool that takes overrides by ``--opts`` and has ``--weights``.

    Args:
        opts: the overrides that it was given.
    """
    try:
        yield
    except UserError as e:
        # All that comes after --opts is its own.
        flag = "" if opts else "--opts "
        text = re.sub(
            r"\badd (TRUST_\w+ True) to the command line",
            rf"add {flag}\1 at the end of the command line",
            str(e),
        )
        e.args = (re.sub(r"\b([Cc]hange) MODEL\.WEIGHTS\b", r"\1 --weights", text),)
        raise


def load_config(path: str, opts: Sequence[Any] = ()) -> CfgNode:
    """A config for use, on a CPU where it asks for a GPU that is not here.

    Of a LazyConfig that a run left, it is what images, datasets and device are; its model is made
    by :class:`.Predictor`, or with what it learned from by ``build_model``.

    Args:
        path: a yaml, or the name of one that ships with pcka_distill.
        opts: overrides: key, value, ...

    Raises:
        UserError: no config, keys that do not fit, a device that is not here, or a LazyConfig
            without ``TRUST_CONFIG``.
    """
    return _read(path, opts)[0]


def _read(path: str, opts: Sequence[Any]) -> tuple[CfgNode, DictConfig | None]:
    """A config, and of a LazyConfig the student with its test loader."""
    if path.endswith(".py"):
        raise UserError(
            f"{path} is a program, and a yaml is read here: name the config.yaml that its run left "
            "in train.output_dir"
        )
    is_lazy = os.path.isfile(path) and "_target_:" in Path(path).read_text(errors="replace")
    cfg, config = get_distill_cfg(), None
    merge_config(cfg, "" if is_lazy else path, list(opts), "config file")
    if is_lazy:
        try:
            config = _read_lazy(cfg, path, list(map(str, opts[::2])))
        except OmegaConfBaseException as e:
            # An interpolation of a value that is not there, and the like.
            raise UserError(f"config file {path} cannot be used: {reason(e)}") from e
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    try:
        torch.zeros(1, device=cfg.MODEL.DEVICE).cpu()
    except (RuntimeError, AssertionError) as e:
        # No device of that name or number, or a torch that was built without it.
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, which is not here; set it to cpu, or to cuda"
        ) from e
    return cfg, config


def _read_lazy(cfg: CfgNode, path: str, overridden: Sequence[str]) -> DictConfig:
    """Into cfg what a LazyConfig says of images, datasets and device."""
    # Reading it alone can call functions.
    if not cfg.TRUST_CONFIG:
        raise UserError(
            f"{path} is a LazyConfig, which is a program; if you trust where it comes from, add "
            "TRUST_CONFIG True to the command line"
        )
    for key in overridden:
        if key not in _BESIDE_LAZY:
            raise UserError(
                f"{key} is no key of the LazyConfig {path}: change it in the file (overrides are "
                f"{', '.join(_BESIDE_LAZY)})"
            )
    config = run = load_lazy(path)
    beside = Path(path).parent / "config.yaml"
    if "dataloader" not in config and beside.is_file():
        # A run's student_config.yaml has the student alone.
        run = load_lazy(str(beside))
    loaders = OmegaConf.select(run, "dataloader.test")
    loaders = list(loaders) if isinstance(loaders, ListConfig) else [loaders] if loaders else []
    steps = OmegaConf.select(loaders[0], "mapper.augmentations") if loaders else None
    resize: Any = steps[0] if steps is not None and len(steps) == 1 else None
    sides = resize.short_edge_length if _target(resize) is ResizeShortestEdge else ()
    sides = {sides} if isinstance(sides, int) else set(sides)
    if len(sides) != 1:
        raise UserError(
            f"{path} does not say how test images are prepared: beside it there must be the "
            "config.yaml of its run, and in that the mapper of dataloader.test with one "
            "ResizeShortestEdge to one size"
        )
    model = copy.deepcopy(_student_node(config))
    test = copy.deepcopy(loaders[0])
    OmegaConf.resolve(model)
    OmegaConf.resolve(test)
    found = {
        "INPUT.MIN_SIZE_TEST": sides.pop(),
        "INPUT.MAX_SIZE_TEST": resize.get("max_size", sys.maxsize),
        "INPUT.FORMAT": test.mapper.get("image_format"),
        "DATASETS.TRAIN": tuple(_names(OmegaConf.select(run, "dataloader.train"))),
        "DATASETS.TEST": tuple(x for loader in loaders for x in _names(loader)),
        "MODEL.DEVICE": OmegaConf.select(run, "train.device"),
        "MODEL.PIXEL_MEAN": list(model.get("pixel_mean") or ()),
        "MODEL.PIXEL_STD": list(model.get("pixel_std") or ()),
    }
    known = {k: v for k, v in found.items() if v and k not in overridden}
    merge_config(cfg, "", [x for pair in known.items() for x in pair], "config file")
    # See LazyModel.
    cfg.MODEL.META_ARCHITECTURE, cfg.OUTPUT_DIR = "LazyModel", str(Path(path).parent)
    parts = {"model": model, "dataloader": {"test": test}}
    return DictConfig(parts, flags={"allow_objects": True})


class Predictor:
    """A model in evaluation mode, and its pictures prepared as for its evaluation.

    Args:
        cfg: of the student alone.
        model: as ``cfg`` describes it, on any device; it is put into evaluation mode.

    Attributes:
        classes: names, in the order of its logits: of a dataset of ``cfg``, or where none is known
            here of ``classes.json`` beside its checkpoint, as an export has it; or None.
        stuff: names of what is no thing, of a panoptic segmentation; None as above.
        config: a LazyConfig of the model and its test images; None of a model of a yaml.
    """

    config: DictConfig | None = None

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
            config: the yaml that it was trained with, or ``student_config.yaml`` of its run. That
                of a LazyConfig calls functions: ``TRUST_CONFIG`` must be among the overrides.
            weights: its checkpoint; empty is ``model_final.pth`` in the folder of the config.
            opts: overrides: key, value, ...

        Raises:
            UserError: no config, no checkpoint, or one that is not the student's; a damaged
                ``classes.json``.
        """
        if "MODEL.WEIGHTS" in map(str, opts[::2]):
            raise UserError("MODEL.WEIGHTS is no override here; name the checkpoint by --weights")
        cfg, described = _read(config, opts)
        cfg = student_config(cfg)
        if not weights:
            beside = Path(config).parent / "model_final.pth"
            if not beside.is_file():
                raise UserError(f"there is no {beside}: name the student's checkpoint (--weights)")
            weights = str(beside)
        cfg.MODEL.WEIGHTS = weights
        build = functools.partial(_make_student, described) if described else build_student
        predictor = cls(cfg, load_student(cfg, build=build))
        predictor.config = described
        names = Path(weights).parent / "classes.json"
        if predictor.classes is None and names.is_file():
            predictor._read_names(names)
        return predictor

    def _read_names(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text())
            lists = [[str(x) for x in content.get(k) or ()] for k in ("classes", "stuff")]
        except (OSError, ValueError, AttributeError, TypeError) as e:
            raise UserError(f"{path} cannot be read: {reason(e)}; correct or remove it") from e
        count = find_adapter(self.model).num_classes(self.model)
        if count not in (None, len(lists[0])):
            raise UserError(
                f"{path} names {len(lists[0])} classes and the model has {count}; correct or "
                "remove it"
            )
        self.classes, self.stuff = (x or None for x in lists)

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
