"""Training data of semantic segmentation."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation

__all__ = ["sem_seg_mapper"]


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
