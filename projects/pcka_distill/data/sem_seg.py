"""Training data of semantic segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils.file_io import PathManager
from PIL import Image

from pcka_distill.errors import UserError, reason

__all__ = ["check_labels", "read_labels", "sem_seg_mapper"]

# Of so many images, spread over the dataset.
_FILES = 16


def read_labels(file_name: str, dtype: Any = None) -> Any:
    """(H, W) of an image of labels."""
    with PathManager.open(file_name, "rb") as f:
        return np.asarray(Image.open(f), dtype=dtype)


def check_labels(records: Sequence[dict[str, Any]], classes: int, ignored: int) -> None:
    """Refuse label images that a head of so many classes cannot be trained on.

    Raises:
        UserError: records without a label image, one that cannot be read, or a label that is
            neither a class nor the ignored value.
    """
    for record in records[:: max(1, len(records) // _FILES)]:
        path = record.get("sem_seg_file_name")
        if path is None:
            raise UserError(
                f"image {record.get('file_name')} has no labels of its pixels (sem_seg_file_name): "
                "DATASETS.TRAIN is no dataset of semantic segmentation"
            )
        try:
            labels = np.unique(read_labels(path))
        except OSError as e:
            raise UserError(f"the labels {path} cannot be read: {reason(e)}") from e
        wrong = [int(x) for x in labels if x >= classes and x != ignored]
        if wrong:
            raise UserError(
                f"the labels {path} have the value {wrong[0]}, and classes are 0 to {classes - 1}, "
                f"the ignored value {ignored}: correct MODEL.SEM_SEG_HEAD.NUM_CLASSES, its "
                "IGNORE_VALUE or the labels"
            )


def sem_seg_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's mapper, with the crop after the resize, as in its project DeepLab.

    Crops are then of one size, whatever the scale, and no class fills more than
    ``INPUT.CROP.SINGLE_CATEGORY_MAX_AREA`` of one.
    """
    crop = cfg.INPUT.CROP
    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.CROP.ENABLED = False
    augmentations = build_augmentation(plain, is_train=True)
    if crop.ENABLED:
        most, ignored = crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        take = T.RandomCrop_CategoryAreaConstraint(crop.TYPE, crop.SIZE, most, ignored)
        augmentations.insert(1, take)
    return DatasetMapper(plain, is_train=True, augmentations=augmentations)
