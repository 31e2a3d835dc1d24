"""The digits set: a detection task from real scans that needs no download.

scikit-learn ships 1,797 handwritten digits (8 x 8 scans, UCI "Optical Recognition of Handwritten
Digits"). Here 2 to 5 of them are pasted, coloured and scaled, onto each cluttered 96 x 96 image.
It is a real detection task, with ten classes, a fourfold range of scales and clutter, that a
small detector learns in minutes on a laptop's CPU.

``digits_train`` (1500 images), ``digits_val`` (300) and ``digits_test`` (300) are Detectron2
datasets in COCO format with boxes and masks. A digit appears in one split only. They are rendered
when they are first read, into ``$DETECTRON2_DATASETS/digits`` (default ``./datasets/digits``).
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

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

logger = logging.getLogger(__name__)

IMAGE_SIZE = 96
# split -> (images, seed of the rendering, share of the scanned digits)
SPLITS = {
    "train": (1500, 1, (0.0, 0.7)),
    "val": (300, 2, (0.7, 0.85)),
    "test": (300, 3, (0.85, 1.0)),
}
CLASSES = [str(i) for i in range(10)]
# Raise it when the rendering changes: a cached set of another version is rendered again.
VERSION = 1

_MIN_SIDE, _MAX_SIDE = 18, 44
_ALPHA_THRESHOLD = 0.25
_MAX_OVERLAP = 0.1
_MIN_CONTRAST = 70.0


def _background(rng: np.random.Generator) -> np.ndarray:
    """A cluttered background: (96, 96, 3) float32 in 0..255."""
    size = IMAGE_SIZE
    grid = rng.uniform(0, 255, (rng.integers(2, 5), rng.integers(2, 5), 3)).astype(np.float32)
    image = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    image = np.ascontiguousarray(image)
    for _ in range(rng.integers(2, 7)):
        color = rng.uniform(0, 255, 3).tolist()
        thickness = int(rng.integers(1, 4))
        a, b = rng.integers(0, size, (2, 2)).tolist()
        kind = rng.integers(3)
        if kind == 0:
            cv2.line(image, a, b, color, thickness, cv2.LINE_AA)
        elif kind == 1:
            axes = rng.integers(5, size // 2, 2).tolist()
            start, sweep = rng.uniform(0, 360), rng.uniform(60, 270)
            cv2.ellipse(image, a, axes, 0, start, start + sweep, color, thickness, cv2.LINE_AA)
        else:
            cv2.rectangle(image, a, b, color, thickness)
    return image + rng.normal(0, rng.uniform(2, 8), image.shape).astype(np.float32)


def _color_off(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour at least _MIN_CONTRAST grey levels off the mean of what it will cover."""
    grey = np.array([0.114, 0.587, 0.299], np.float32)
    mean = float(background.reshape(-1, 3).mean(0) @ grey)
    while True:
        color = rng.uniform(0, 255, 3).astype(np.float32)
        if abs(float(color @ grey) - mean) >= _MIN_CONTRAST:
            return color


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Shared area of two (x0, y0, x1, y1) boxes, as a part of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / min(areas)


def _render(
    digits: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One image, (96, 96, 3) uint8 BGR, and its objects as (class, (96, 96) bool mask)."""
    size = IMAGE_SIZE
    image = _background(rng)
    boxes: list[tuple[int, ...]] = []
    objects: list[tuple[int, np.ndarray]] = []
    wanted = int(rng.integers(2, 6))
    for _ in range(20 * wanted):
        if len(objects) == wanted:
            break
        index = rng.integers(len(digits))
        side = round(float(np.exp(rng.uniform(np.log(_MIN_SIDE), np.log(_MAX_SIDE)))))
        alpha = cv2.resize(digits[index], (side, side), interpolation=cv2.INTER_CUBIC)
        alpha = alpha.clip(0, 1)
        rows, cols = np.nonzero(alpha > _ALPHA_THRESHOLD)
        left, top = rng.integers(0, size - side + 1, 2).tolist()
        box = (
            left + int(cols.min()),
            top + int(rows.min()),
            left + int(cols.max()) + 1,
            top + int(rows.max()) + 1,
        )
        if any(_overlap(box, other) > _MAX_OVERLAP for other in boxes):
            continue
        patch = image[top : top + side, left : left + side]
        color = _color_off(patch, rng)
        opacity = (alpha * rng.uniform(0.8, 1.0))[..., None]
        patch[:] = patch * (1 - opacity) + color * opacity
        mask = np.zeros((size, size), bool)
        mask[top : top + side, left : left + side] = alpha > _ALPHA_THRESHOLD
        for _, below in objects:
            below &= ~mask
        boxes.append(box)
        objects.append((int(labels[index]), mask))
    image = image + rng.normal(0, 3, image.shape).astype(np.float32)
    return image.clip(0, 255).astype(np.uint8), objects


def _render_split(folder: Path, split: str) -> None:
    import pycocotools.mask as mask_util
    from sklearn.datasets import load_digits

    count, seed, (start, stop) = SPLITS[split]
    scans = load_digits()
    # One fixed permutation decides which digits belong to which split.
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(scans.target))
    chosen = order[round(start * len(order)) : round(stop * len(order))]
    digits = (scans.images[chosen] / 16).astype(np.float32)
    labels = scans.target[chosen]
    rng = np.random.Generator(np.random.PCG64(seed))

    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        image, objects = _render(digits, labels, rng)
        name = f"{i:05d}.png"
        if not cv2.imwrite(str(folder / split / name), image):
            raise OSError(f"could not write {folder / split / name}")
        images.append({"id": i + 1, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
        for label, mask in objects:
            rle = mask_util.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": label + 1,
                    "bbox": [float(v) for v in mask_util.toBbox(rle)],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    content = {
        "info": {"description": f"digits detection set, version {VERSION}, split {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    (folder / f"{split}.json").write_text(json.dumps(content))


def ensure_digits(root: str | os.PathLike[str]) -> Path:
    """Render the digits set into ``root/digits`` unless it is there; return that folder.

    The folder appears in one rename when it is complete, so an interrupted or a concurrent run
    never leaves half a set behind.
    """
    folder = Path(root) / "digits"
    stamp = folder / "version"
    if stamp.is_file() and stamp.read_text() == str(VERSION):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info(f"Rendering the digits set into {folder} (once, some seconds)")
    partial = Path(tempfile.mkdtemp(prefix=".digits-", dir=folder.parent))
    try:
        for split in SPLITS:
            _render_split(partial, split)
        (partial / "version").write_text(str(VERSION))
        partial.chmod(0o755)
        if folder.exists() and not (stamp.is_file() and stamp.read_text() == str(VERSION)):
            shutil.rmtree(folder)
        try:
            partial.rename(folder)
        except OSError:
            # Another process finished first; its set is the same, bit for bit.
            if not stamp.is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _load(split: str, name: str, root: str) -> list[dict[str, Any]]:
    folder = ensure_digits(root)
    records: list[dict[str, Any]] = load_coco_json(
        str(folder / f"{split}.json"), str(folder / split), name
    )
    return records


def register_digits(root: str = "") -> None:
    """Register ``digits_{train,val,test}``; nothing is rendered until one is read.

    Args:
        root: the folder that holds ``digits/``; by default ``$DETECTRON2_DATASETS``, or
            ``datasets`` as everywhere in Detectron2.
    """
    root = os.path.expanduser(root or os.environ.get("DETECTRON2_DATASETS", "datasets"))
    for split in SPLITS:
        name = f"digits_{split}"
        if name in DatasetCatalog:
            continue
        DatasetCatalog.register(name, lambda s=split, n=name: _load(s, n, root))
        MetadataCatalog.get(name).set(
            json_file=os.path.join(root, "digits", f"{split}.json"),
            image_root=os.path.join(root, "digits", split),
            evaluator_type="coco",
            prepare=functools.partial(ensure_digits, root),
            thing_classes=CLASSES,
        )
