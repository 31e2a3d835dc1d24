"""The digits set: a detection task from real scans that needs no download.

scikit-learn ships 1,797 handwritten digits (8 x 8 scans, UCI "Optical Recognition of Handwritten
Digits"). Here 2 to 5 of them are pasted, coloured and scaled, onto each cluttered 96 x 96 image.
It is a real detection task, with ten classes, a fourfold range of scales and clutter, that a
small detector learns in minutes on a laptop's CPU.

``digits_train`` (1500 images), ``digits_val`` (300) and ``digits_test`` (300) are Detectron2
datasets in COCO format with boxes and masks. A digit appears in one split only. The first tenth of
the training images is ``digits_train_10``, for what few labels are worth. ``digits_sem_seg_train``,
``..._val`` and ``..._test`` are the same images with a class for every pixel. They are rendered
when they are first read, into ``$DETECTRON2_DATASETS/pcka_digits`` (default
``./datasets/pcka_digits``).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data.datasets import load_coco_json
from PIL import Image

from pcka_distill.data.catalog import register
from pcka_distill.errors import UserError

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")

# split -> (images, seed of the rendering, share of the scanned digits)
SPLITS = {
    "train": (1500, 1, (0.0, 0.7)),
    "val": (300, 2, (0.7, 0.85)),
    "test": (300, 3, (0.85, 1.0)),
}
FOLDER = "pcka_digits"
CLASSES = [str(i) for i in range(10)]
#: side of the images, in pixels
IMAGE_SIZE = 96
# Raise it when the rendering changes: a cached set of another version is rendered again.
VERSION = 1
_STAMP = "pcka_distill digits, version "


def ensure_digits(root: str | os.PathLike[str]) -> Path:
    """Render the digits set into ``root/pcka_digits`` unless it is there; return that folder.

    The folder appears in one rename when it is complete, so an interrupted or a concurrent run
    never leaves half a set behind.

    Raises:
        UserError: something else is in that folder, it cannot be written, or a package that only
            the rendering needs is not installed.
    """
    folder = Path(root) / FOLDER
    stamp, wanted = folder / "version", f"{_STAMP}{VERSION}"

    def found() -> str:
        return stamp.read_text() if stamp.is_file() else ""

    if found() == wanted:
        return folder
    if folder.exists() and not found().startswith(_STAMP):
        raise UserError(
            f"{folder} is in the way of the digits set and was not made here; move it, or set "
            "DETECTRON2_DATASETS to another folder"
        )
    try:
        from pcka_distill.data.rendering import render_split
    except ImportError as e:
        raise UserError(f"rendering the digits set needs {e.name}: pip install -e '.[demo]'") from e
    logger.info(f"Rendering the digits set into {folder} (once, some seconds)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=folder.parent))
    except OSError as e:
        raise UserError(
            f"the digits set cannot be written: {e}; set DETECTRON2_DATASETS to another folder"
        ) from e
    try:
        for split, (count, seed, share) in SPLITS.items():
            render_split(partial, split, count, seed, share, CLASSES)
        (partial / "version").write_text(wanted)
        partial.chmod(0o755)
        if found() not in ("", wanted):
            shutil.rmtree(folder)
        try:
            partial.rename(folder)
        except OSError:
            # Another process finished first; its set is the same, bit for bit.
            if found() != wanted:
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _load(split: str, name: str, root: str, count: int | None) -> list[dict[str, Any]]:
    folder = ensure_digits(root)
    records: list[dict[str, Any]] = load_coco_json(
        str(folder / f"{split}.json"), str(folder / split), name
    )
    return records[:count]


def _ensure_sem_seg(root: str) -> Path:
    """Write the class of every pixel beside the images, of which the json has the masks."""
    folder = ensure_digits(root)
    found = folder / "sem_seg"
    if found.is_dir():
        return found
    try:
        partial = Path(tempfile.mkdtemp(prefix=".sem_seg-", dir=folder))
        try:
            for split in SPLITS:
                (partial / split).mkdir()
                coco = json.loads((folder / f"{split}.json").read_text())
                labels = {
                    x["id"]: np.full((x["height"], x["width"]), len(CLASSES), np.uint8)
                    for x in coco["images"]
                }
                for x in coco["annotations"]:
                    # A digit's mask is what is seen of it: no two overlap.
                    mask = mask_util.decode(x["segmentation"]).astype(bool)
                    labels[x["image_id"]][mask] = x["category_id"] - 1
                for x in coco["images"]:
                    Image.fromarray(labels[x["id"]]).save(partial / split / x["file_name"])
            partial.chmod(0o755)
            partial.rename(found)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as e:
        # Another process may have finished first; its files are the same.
        if not found.is_dir():
            raise UserError(
                f"the digits set cannot be written: {e}; set DETECTRON2_DATASETS to another folder"
            ) from e
    return found


def _load_sem_seg(split: str, root: str) -> list[dict[str, Any]]:
    labels = _ensure_sem_seg(root) / split
    images = labels.parents[1] / split
    return [
        {
            "file_name": str(images / path.name),
            "sem_seg_file_name": str(path),
            "image_id": int(path.stem) + 1,
            "height": IMAGE_SIZE,
            "width": IMAGE_SIZE,
        }
        for path in sorted(labels.glob("*.png"))
    ]


def register_digits(root: str = "") -> None:
    """Register ``digits_{train,train_10,val,test}`` and ``digits_sem_seg_{train,val,test}``.

    Nothing is rendered until one is read.

    Importing the package does it once, and leaves datasets of these names alone.

    Args:
        root: the folder that holds ``pcka_digits/``, instead of what is registered; by default
            ``$DETECTRON2_DATASETS``, or ``datasets`` as everywhere in Detectron2.
    """
    folder = os.path.expanduser(root or os.environ.get("DETECTRON2_DATASETS", "datasets"))
    tenth = SPLITS["train"][0] // 10
    datasets = [(f"digits_{split}", split, None) for split in SPLITS]
    for name, split, count in [*datasets, ("digits_train_10", "train", tenth)]:
        register(
            name,
            functools.partial(_load, split, name, folder, count),
            anew=bool(root),
            json_file=os.path.join(folder, FOLDER, f"{split}.json"),
            image_root=os.path.join(folder, FOLDER, split),
            # The json of the tenth is that of the whole, which would be what it is evaluated on.
            evaluator_type="coco" if count is None else None,
            prepare=functools.partial(ensure_digits, folder),
            thing_classes=CLASSES,
        )
    for split in SPLITS:
        register(
            f"digits_sem_seg_{split}",
            functools.partial(_load_sem_seg, split, folder),
            anew=bool(root),
            image_root=os.path.join(folder, FOLDER, split),
            evaluator_type="sem_seg",
            prepare=functools.partial(_ensure_sem_seg, folder),
            stuff_classes=[*CLASSES, "background"],
            ignore_label=255,
        )
