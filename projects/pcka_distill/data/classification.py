"""Datasets of labelled images: CIFAR-100, ImageNet, folders of one's own, and scanned digits."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from pcka_distill.data.catalog import register
from pcka_distill.errors import UserError

__all__ = [
    "ClassificationEvaluator",
    "ClassificationMapper",
    "register_classification",
    "register_image_folder",
]

Record = dict[str, Any]
AUGMENTATIONS = ("resized_crop", "padded_crop", "none")
# split -> share of the scanned digits, of which the digits set is made too
_SCANS = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}
_PER_CLASS = 10
_KIND = "classification"


class ClassificationMapper:
    """Record -> model input: ``image`` (3, S, S) uint8 and ``label``.

    Args:
        size: S, of the images.
        augmentation: one of :data:`AUGMENTATIONS`, see ``INPUT.CLASSIFICATION``.
        image_format: "RGB" or "BGR".
        training: or the view that is evaluated: of "resized_crop" the centre of the image, resized
            so that its shorter side is 8/7 of S.

    Raises:
        UserError: an augmentation that is not known.
    """

    def __init__(self, size: int, augmentation: str, image_format: str, *, training: bool) -> None:
        try:
            from torchvision.transforms import v2
        except ImportError as e:
            raise UserError("classification needs torchvision 0.15 or later; install it") from e
        steps: dict[tuple[str, bool], list[Any]] = {
            ("resized_crop", True): [
                v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(),
            ],
            ("resized_crop", False): [
                v2.Resize(round(size * 8 / 7), antialias=True), v2.CenterCrop(size),
            ],
            ("padded_crop", True): [
                v2.RandomCrop(size, padding=size // 8, pad_if_needed=True),
                v2.RandomHorizontalFlip(),
            ],
        }  # fmt: skip
        if augmentation not in AUGMENTATIONS:
            raise UserError(
                f"unknown INPUT.CLASSIFICATION.AUGMENTATION {augmentation!r}, expected "
                f"{', '.join(AUGMENTATIONS)}"
            )
        self._steps = v2.Compose(steps.get((augmentation, training), [v2.Identity()]))
        self._size = size
        self._format = image_format

    @classmethod
    def of(cls, cfg: CfgNode, *, training: bool) -> ClassificationMapper:
        """That of a config."""
        kind = cfg.INPUT.CLASSIFICATION.AUGMENTATION
        size = cfg.MODEL.CLASSIFIER.IMAGE_SIZE
        return cls(size, kind, cfg.INPUT.FORMAT, training=training)

    def __call__(self, record: Record) -> Record:
        if "image" in record:
            # (H, W, 3), RGB.
            image = record["image"][..., :: -1 if self._format == "BGR" else 1]
        else:
            image = read_image(record["file_name"], format=self._format)
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        image = self._steps(image)
        if image.shape[-2:] != (self._size, self._size):
            raise UserError(
                f"an image has {image.shape[-2]} x {image.shape[-1]} pixels and "
                f"MODEL.CLASSIFIER.IMAGE_SIZE is {self._size}: change it, or set "
                "INPUT.CLASSIFICATION.AUGMENTATION resized_crop"
            )
        return {**record, "image": image}


class ClassificationEvaluator(DatasetEvaluator):
    """Share of the images whose class is the best-scored one, or among the best five, in percent.

    Args:
        distributed: count the images of all processes.
    """

    def __init__(self, *, distributed: bool = True) -> None:
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        self._counts = {"images": 0, "top1": 0, "top5": 0}

    def process(self, inputs: Sequence[Record], outputs: Sequence[Record]) -> None:
        for x, y in zip(inputs, outputs):
            best = y["scores"].topk(min(5, len(y["scores"]))).indices.tolist()
            self._counts["images"] += 1
            self._counts["top1"] += best[0] == x["label"]
            self._counts["top5"] += x["label"] in best

    def evaluate(self) -> dict[str, dict[str, float]]:
        """``classification`` -> ``top1`` and ``top5``."""
        counts = [self._counts]
        if self._distributed:
            comm.synchronize()
            counts = comm.gather(self._counts)
            if not comm.is_main_process():
                return {}
        whole = {k: sum(x[k] for x in counts) for k in self._counts}
        images = max(whole.pop("images"), 1)
        return {"classification": {k: 100 * v / images for k, v in whole.items()}}


def _folder_classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: classification reads folder/CLASS/IMAGE, one folder for "
            "each class; move the images there, or set DETECTRON2_DATASETS to where they are"
        )
    classes = sorted(x.name for x in folder.iterdir() if x.is_dir())
    if not classes:
        raise UserError(f"{folder} has no folders of classes: put images into {folder}/CLASS/")
    return classes


def _load_folder(folder: str, name: str) -> list[Record]:
    root = Path(folder)
    classes = _folder_classes(root)
    kinds = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
    records: list[Record] = []
    for label, kind in enumerate(classes):
        files = sorted(x for x in (root / kind).iterdir() if x.suffix.lower() in kinds)
        if not files:
            raise UserError(f"{root / kind} has no images ({', '.join(kinds)})")
        records += [
            {"file_name": str(x), "image_id": len(records) + i, "label": label}
            for i, x in enumerate(files)
        ]
    MetadataCatalog.get(name).set(classes=classes)
    return records


def register_image_folder(name: str, folder: str | os.PathLike[str]) -> None:
    """Make folder/CLASS/IMAGE a dataset; its classes are the folders, in alphabetical order."""
    _register_folder(name, str(folder), anew=True)


def _register_folder(name: str, folder: str, *, anew: bool) -> None:
    load = functools.partial(_load_folder, folder, name)
    classes = functools.partial(_folder_classes, Path(folder))
    register(name, load, evaluator_type=_KIND, anew=anew, image_root=folder, read_classes=classes)


def _open_cifar(root: str, split: str) -> Any:
    from torchvision.datasets import CIFAR100

    try:
        return CIFAR100(root, train=split == "train", download=False)
    except RuntimeError as e:
        raise UserError(
            f"CIFAR-100 is not in {root}: unpack cifar-100-python.tar.gz there, so that "
            f"{os.path.join(root, 'cifar-100-python', 'train')} exists, or run python -c 'import "
            f'torchvision as t; t.datasets.CIFAR100("{root}", download=True)\''
        ) from e


def _cifar_classes(root: str) -> list[str]:
    return list(_open_cifar(root, "test").classes)


def _load_cifar(root: str, split: str, name: str) -> list[Record]:
    data = _open_cifar(root, split)
    MetadataCatalog.get(name).set(classes=list(data.classes))
    return _of_arrays(data.data, data.targets)


def _of_arrays(images: Any, labels: Sequence[int]) -> list[Record]:
    return [
        {"image_id": i, "image": x, "label": int(label)}
        for i, (x, label) in enumerate(zip(images, labels))
    ]


def _load_scans(split: str, per_class: int | None) -> list[Record]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise UserError(f"the scanned digits need {e.name}: pip install -e '.[demo]'") from e
    scans = load_digits()
    # The permutation by which the digits set is split.
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(scans.target))
    start, stop = (round(x * len(order)) for x in _SCANS[split])
    chosen = order[start:stop]
    labels = scans.target[chosen]
    if per_class is not None:
        first = [np.flatnonzero(labels == k)[:per_class] for k in range(10)]
        kept = np.sort(np.concatenate(first))
        chosen, labels = chosen[kept], labels[kept]
    images = np.asarray(scans.images)[chosen] * (255 / 16)
    images = np.repeat(images.round().astype(np.uint8)[..., None], 3, axis=-1)
    return _of_arrays(images, labels.tolist())


def register_classification(root: str = "") -> None:
    """Register ``cifar100_{train,test}``, ``imagenet_{train,val}`` and ``digit_scans_...``.

    ``digit_scans_{train,val,test}`` are scikit-learn's 8 x 8 scans, ``digit_scans_train_100`` ten
    of each class. Importing the package does it once, and leaves datasets of these names alone;
    nothing is read until it is needed.

    Args:
        root: the folder that holds ``cifar-100-python/`` and ``imagenet/{train,val}/CLASS/``,
            instead of what is registered; by default ``$DETECTRON2_DATASETS``, or ``datasets``.
    """
    folder = os.path.expanduser(root or os.environ.get("DETECTRON2_DATASETS", "datasets"))
    anew = bool(root)
    for split in ("train", "test"):
        name = f"cifar100_{split}"
        load = functools.partial(_load_cifar, folder, split, name)
        classes = functools.partial(_cifar_classes, folder)
        register(name, load, evaluator_type=_KIND, anew=anew, read_classes=classes)
    for split in ("train", "val"):
        images = os.path.join(folder, "imagenet", split)
        _register_folder(f"imagenet_{split}", images, anew=anew)
    for name, split, count in (
        *((f"digit_scans_{x}", x, None) for x in _SCANS),
        (f"digit_scans_train_{10 * _PER_CLASS}", "train", _PER_CLASS),
    ):
        load = functools.partial(_load_scans, split, count)
        register(name, load, evaluator_type=_KIND, anew=anew, classes=[str(i) for i in range(10)])
