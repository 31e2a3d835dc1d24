"""A dataset in COCO's format, looked at before it is trained on, and split."""

from __future__ import annotations

import collections
import colorsys
import contextlib
import functools
import json
import logging
import math
import os
import random
import re
import statistics
import warnings
from collections.abc import Hashable, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.data.datasets.coco import load_coco_json
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

# Private, as what is read like a teacher's config must be read by the same lines.
from pcka_distill.build import _find_config, _read_yaml_teacher, class_names
from pcka_distill.checkpoint import write_whole
from pcka_distill.data.check import (
    box_problem,
    check_records,
    evaluation_problem,
    is_number,
    is_size,
)

# What a training takes for an unreadable image is one here.
from pcka_distill.data.loader import _UNREADABLE
from pcka_distill.errors import UserError, reason

__all__ = [
    "Dataset",
    "Finding",
    "Report",
    "check_dataset",
    "compare_classes",
    "draw_sheet",
    "prepare_data",
    "read_dataset",
    "split_images",
    "teacher_classes",
    "write_split",
]

Record = dict[str, Any]
Color = tuple[float, float, float]
# x0, y0, x1, y1 in pixels.
Corners = tuple[float, float, float, float]

_SPLITS = ("train", "val", "test")
_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id"),
    "categories": ("id", "name"),
}
# Box areas, in pixels: COCO's medium ones begin and end here.
_MEDIUM = 32**2, 96**2
# In pixels: what x + width is off by where it was rounded.
_ROUNDING = 0.01
_ROWS, _FIRST = 30, 5
# The tag of EXIF, and those of its values that exchange width and height.
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)

_REFUSED, _LEFT_OUT = "refused", "left out"
# What is found -> what its ids are of, and what training does with it.
_KINDS = {
    "image ids that are used again": ("image", _REFUSED),
    "annotation ids that are used again": ("annotation", _REFUSED),
    "category ids that are used again": ("category", _REFUSED),
    "objects of unknown categories": ("annotation", _REFUSED),
    "boxes that are no list or empty": ("annotation", _REFUSED),
    "masks that are no list of polygons": ("annotation", _REFUSED),
    "images that do not exist": ("file", _REFUSED),
    "images that cannot be read": ("file", _REFUSED),
    "images of another size than the json says": ("file", _REFUSED),
    "images without a size": ("image", _LEFT_OUT),
    "objects of unknown images": ("annotation", _LEFT_OUT),
    "boxes that are not four finite numbers": ("annotation", _LEFT_OUT),
    "boxes without an area": ("annotation", _LEFT_OUT),
    "boxes outside of their image": ("annotation", _LEFT_OUT),
    "masks without a polygon of three points": ("annotation", _LEFT_OUT),
    "objects that COCO's evaluation refuses": ("annotation", "refused in DATASETS.TEST"),
    "boxes partly outside of their image": ("annotation", "clipped"),
    "crowd objects": ("annotation", "not learned from"),
    "images without objects (or crowds alone)": ("image", "not learned from"),
    "categories without objects": ("category", "never learned"),
    "category names that are used again": ("category", "told apart by id alone"),
    "images of a file that another one has": ("image", "seen twice; one split has both"),
    "masks that are malformed": ("annotation", "boxes are used; unfit for mask heads"),
    "objects without a mask": ("annotation", "boxes are used; unfit for mask heads"),
    "images that EXIF turns by 90 degrees": ("file", "turned; the json has the turned size"),
    "images on disk that the json does not list": ("file", "not used"),
}


# ---- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """What a COCO json says, with all keys that loading needs."""

    #: the json
    file: Path
    #: where its file names begin
    folder: Path
    content: Record

    @property
    def images(self) -> list[Record]:
        """As they are listed."""
        return self.content["images"]

    @property
    def annotations(self) -> list[Record]:
        """As they are listed."""
        return self.content["annotations"]

    @functools.cached_property
    def categories(self) -> list[Record]:
        """In the order of the classes that Detectron2 makes of them."""
        return sorted(self.content["categories"], key=lambda x: x["id"])

    def path(self, image: Record) -> str:
        """Where Detectron2 looks for an image."""
        return os.path.join(self.folder, image["file_name"])

    @functools.cached_property
    def by_image(self) -> dict[Hashable, list[Record]]:
        """The annotations of each image's id."""
        found: dict[Hashable, list[Record]] = {x["id"]: [] for x in self.images}
        for annotation in self.annotations:
            if annotation["image_id"] in found:
                found[annotation["image_id"]].append(annotation)
        return found


def read_dataset(file: Path, folder: Path) -> Dataset:
    """Read a COCO json as data.

    Args:
        file: the json.
        folder: of its images.

    Raises:
        UserError: it is not there, is no json, or lacks a key that loading needs.
    """
    if not file.is_file():
        raise UserError(f"annotations not found: {file}")
    if not folder.is_dir():
        raise UserError(f"the folder of the images is not there: {folder}")
    what = f"{file} is no COCO json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as e:
        raise UserError(f"{what}: its values are nested too deeply") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read as json: {reason(e)}") from e
    if not isinstance(content, dict):
        raise UserError(f"{what}: it holds {_show(content)}, expected {', '.join(_KEYS)}")
    for part, keys in _KEYS.items():
        if not isinstance(content.get(part), list):
            is_there = (
                f"{part} is {_show(content[part])}" if part in content else f"it has no {part}"
            )
            raise UserError(f"{what}: {is_there}, expected a list")
        for i, entry in enumerate(content[part]):
            if not isinstance(entry, dict):
                raise UserError(f"{what}: {part}[{i}] is {_show(entry)}")
            for key in keys:
                if key not in entry:
                    raise UserError(f"{what}: {part}[{i}] has no {key}")
                value = entry[key]
                if key.endswith("id") and not (isinstance(value, str) or is_number(value)):
                    raise UserError(
                        f"{what}: the {key} of {part}[{i}] is {_show(value)}, expected a number"
                    )
                if key.endswith("name") and not isinstance(value, str):
                    raise UserError(
                        f"{what}: the {key} of {part}[{i}] is {_show(value)}, expected a text"
                    )
        # Detectron2 sorts them.
        if part != "annotations" and len({isinstance(x["id"], str) for x in content[part]}) > 1:
            raise UserError(f"{what}: some ids of {part} are numbers and some are texts")
    return Dataset(file, folder, content)


def _show(value: Any) -> str:
    """A value of a json for a message, whatever it is."""
    # The repr of what is nested deeply fails.
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return repr(value)[:40]


def _clean(value: Any, length: int = 40) -> str:
    """A text of a json for the terminal: no control characters, no half of a surrogate pair."""
    text = "".join(c if c.isprintable() else "?" for c in str(value)[: length + 1])
    return text if len(text) <= length else text[: length - 3] + "..."


# ---- checking ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What was found more than zero times."""

    what: str
    #: what the ids are of: image, annotation, category or file
    of: str
    #: what training does with it
    then: str
    #: one for each time
    ids: list[Any]


@dataclass
class Report:
    """What a dataset holds, and what is wrong with it."""

    data: Dataset
    #: by what was found
    findings: dict[str, Finding] = field(default_factory=dict)
    #: why it cannot be used
    reasons: list[str] = field(default_factory=list)
    boxes_left_out: int = 0
    images_left_out: int = 0
    #: (id, name, objects, images with it), by id
    categories: list[tuple[Any, str, int, int]] = field(default_factory=list)
    #: (widths, heights), in pixels, of the images that have a size
    sizes: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    #: of the boxes that are kept, in square pixels
    areas: list[float] = field(default_factory=list)
    #: whether images were opened
    opened: bool = True

    @property
    def usable(self) -> bool:
        """Whether training would begin."""
        return not self.reasons

    def add(self, what: str, number: Any) -> None:
        """Count what was found, and of which id."""
        of, then = _KINDS[what]
        self.findings.setdefault(what, Finding(what, of, then, [])).ids.append(number)

    @property
    def verdict(self) -> str:
        """One line."""
        if self.reasons:
            return f"cannot be used: {'; '.join(self.reasons)}"
        if self.boxes_left_out or self.images_left_out:
            return (
                f"can be trained on; {self.boxes_left_out} boxes and {self.images_left_out} images "
                "would be left out"
            )
        return "can be trained on"

    def text(self, *, show_all: bool = False) -> str:
        """The report.

        Args:
            show_all: cut no list.
        """
        data = self.data
        parts = [
            f"{_clean(data.file, 200)}: {len(data.images)} images, "
            f"{len(data.annotations)} objects, {len(data.categories)} categories"
        ]
        rows = [(_clean(i), _clean(name), *counts) for i, name, *counts in self.categories]
        if rows:
            parts.append(_table(rows, ("id", "category", "objects", "images"), show_all))
        objects = [len(x) for x in data.by_image.values()]
        spreads = [("image width", self.sizes[0]), ("image height", self.sizes[1])]
        spreads.append(("objects in an image", [float(x) for x in objects]))
        rows = [
            (what, *(f"{f(values):g}" for f in (min, statistics.median, max)))
            for what, values in spreads
            if values
        ]
        if rows:
            parts.append(_table(rows, ("", "min", "median", "max")))
        low, high = _MEDIUM
        small, large = sum(x < low for x in self.areas), sum(x >= high for x in self.areas)
        parts.append(
            f"Boxes by COCO's areas: {small} small (under 32 x 32 pixels), "
            f"{len(self.areas) - small - large} medium, {large} large (from 96 x 96)"
        )
        if self.findings:
            rows = [
                (len(x.ids), x.what, x.then, f"{x.of} {_some(x.ids, show_all)}")
                for x in self.findings.values()
            ]
            parts.append(_table(rows, ("count", "found", "in training", "first"), show_all=True))
        if not self.opened:
            parts.append("Images were not opened (--fast): their sizes are those of the json.")
        return "\n\n".join(parts)


def _some(ids: Sequence[Any], show_all: bool) -> str:
    shown = list(dict.fromkeys(_clean(x) for x in (ids if show_all else ids[:_FIRST])))
    return ", ".join(shown) + (", ..." if len(ids) > _FIRST and not show_all else "")


def _table(rows: Sequence[Sequence[object]], headers: Sequence[str], show_all: bool = False) -> str:
    shown = rows if show_all else rows[:_ROWS]
    numbers = [all(isinstance(row[i], int) for row in rows) for i in range(len(headers))]
    # "1e5" is the name of a category here, and no number.
    text = tabulate(
        [[str(x) for x in row] for row in shown],
        headers,
        tablefmt="plain",
        disable_numparse=True,
        colalign=["right" if x else "left" for x in numbers],
    )
    text = "\n".join(f"  {line}".rstrip() for line in text.splitlines())
    left = len(rows) - len(shown)
    return text + (f"\n  ... and {left} more (--all shows them)" if left else "")


def check_dataset(data: Dataset, *, fast: bool = False) -> Report:
    """Find what training would leave out or refuse.

    Args:
        data: the dataset.
        fast: do not open the images.
    """
    report = Report(data, opened=not fast)
    _check_ids(report)
    _check_annotations(report)
    _check_files(report, fast)
    report.findings = {x: report.findings[x] for x in _KINDS if x in report.findings}
    report.reasons = [
        f"{len(x.ids)} {x.what}" for x in report.findings.values() if x.then == _REFUSED
    ]
    if not data.categories:
        report.reasons.append("it has no categories")
    if not report.sizes[0]:
        report.reasons.append("it has no images" + (", of a size" if data.images else ""))
    if not report.reasons:
        _load(report)
    return report


def _check_ids(report: Report) -> None:
    data = report.data
    for part, what in zip(_KEYS, ("image", "annotation", "category")):
        _add_repeated(report, f"{what} ids that are used again", data.content[part], "id")
    _add_repeated(report, "category names that are used again", data.categories, "name")
    seen: set[str] = set()
    for image in data.images:
        path = os.path.normpath(data.path(image))
        if path in seen:
            report.add("images of a file that another one has", image["id"])
        seen.add(path)


def _add_repeated(report: Report, what: str, entries: list[Record], key: str) -> None:
    seen: set[Hashable] = set()
    for entry in entries:
        if entry[key] in seen:
            report.add(what, entry[key])
        seen.add(entry[key])


def _check_annotations(report: Report) -> None:
    data = report.data
    sizes: dict[Hashable, tuple[Any, Any]] = {}
    for image in data.images:
        size = image["width"], image["height"]
        sizes[image["id"]] = size
        if is_size(size):
            report.sizes[0].append(float(size[0]))
            report.sizes[1].append(float(size[1]))
        else:
            report.add("images without a size", image["id"])
    known = {x["id"] for x in data.categories}
    objects: collections.Counter[Hashable] = collections.Counter()
    images: dict[Hashable, set[Hashable]] = {x: set() for x in known}
    has_masks = any(x.get("segmentation") for x in data.annotations)
    for annotation in data.annotations:
        number, image_id, category = (annotation[k] for k in _KEYS["annotations"])
        if evaluation_problem(annotation):
            report.add("objects that COCO's evaluation refuses", number)
        if image_id not in sizes:
            report.add("objects of unknown images", number)
            continue
        if category in known:
            objects[category] += 1
            images[category].add(image_id)
        else:
            report.add("objects of unknown categories", number)
        if annotation.get("iscrowd", 0) != 0:
            report.add("crowd objects", number)
        # Of an image without a size all are left out.
        kept = is_size(sizes[image_id]) and _check_box(report, annotation, sizes[image_id])
        if kept and has_masks and not annotation.get("segmentation"):
            report.add("objects without a mask", number)
    for image_id, here in data.by_image.items():
        if all(x.get("iscrowd", 0) != 0 for x in here):
            report.add("images without objects (or crowds alone)", image_id)
    for x in data.categories:
        report.categories.append((x["id"], x["name"], objects[x["id"]], len(images[x["id"]])))
        if not objects[x["id"]]:
            report.add("categories without objects", x["id"])


def _check_box(report: Report, annotation: Record, size: tuple[float, float]) -> bool:
    """Whether an object of an image is kept."""
    number, mask = annotation["id"], annotation.get("segmentation")
    if mask:
        listed = isinstance(mask, list) and all(isinstance(x, Sized) for x in mask)
        if not listed and not isinstance(mask, dict):
            report.add("masks that are no list of polygons", number)
            return False
        if listed and not any(_is_polygon(x) for x in mask):
            report.add("masks without a polygon of three points", number)
            return False
        if not _is_mask(mask, size):
            report.add("masks that are malformed", number)
    box = annotation.get("bbox")
    if "bbox" in annotation and not (isinstance(box, Sized) and len(box)):
        report.add("boxes that are no list or empty", number)
        return False
    problem = box_problem({"bbox": box, "bbox_mode": BoxMode.XYWH_ABS}, size)
    if problem:
        report.add(problem, number)
        return False
    x, y, w, h = (float(v) for v in annotation["bbox"])
    report.areas.append(w * h)
    if min(x, y, size[0] - x - w, size[1] - y - h) < -_ROUNDING:
        report.add("boxes partly outside of their image", number)
    return True


def _is_polygon(x: Any) -> bool:
    """Whether Detectron2 keeps it."""
    return isinstance(x, list) and len(x) % 2 == 0 and len(x) >= 6


def _is_mask(mask: Any, size: tuple[float, float]) -> bool:
    """Whether a segmentation is polygons or run lengths all through."""
    if isinstance(mask, dict):
        counts = mask.get("counts")
        if isinstance(counts, list):
            runs = all(type(x) is int and x >= 0 for x in counts)
            right = runs and sum(counts) == size[0] * size[1]
        else:
            right = isinstance(counts, str) and counts != ""
        return right and mask.get("size") == [size[1], size[0]]
    return all(_is_polygon(x) and all(is_number(v) for v in x) for x in mask)


def _check_files(report: Report, fast: bool) -> None:
    data = report.data
    listed = set()
    for image in tqdm(data.images, desc="images", unit="image", disable=None):
        name, path = image["file_name"], data.path(image)
        expected = image["width"], image["height"]
        listed.add(os.path.normpath(path))
        if not is_size(expected):
            # It is left out, whatever the file is.
            continue
        if not os.path.isfile(path):
            report.add("images that do not exist", name)
            continue
        if fast:
            continue
        try:
            size, turned = _look(path)
        except _UNREADABLE:
            report.add("images that cannot be read", name)
            continue
        if turned:
            report.add("images that EXIF turns by 90 degrees", name)
        if expected != size:
            report.add("images of another size than the json says", name)
    endings = tuple(Image.registered_extensions())
    for folder, _, files in os.walk(data.folder):
        for name in sorted(files):
            path = os.path.normpath(os.path.join(folder, name))
            if name.lower().endswith(endings) and path not in listed:
                name = os.path.relpath(path, data.folder)
                report.add("images on disk that the json does not list", name)


def _look(path: str) -> tuple[tuple[int, int], bool]:
    """Of an image file: (width, height) as training sees it, and whether EXIF turned it."""
    with warnings.catch_warnings():
        # Of damaged EXIF, or many pixels: it can be read all the same.
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            width, height = image.size
            orientation = None
            # To look for what might be behind the pixels of a PNG, all of it would be decoded.
            if image.format != "PNG" or "exif" in image.info:
                # Whatever PIL stumbles over: Detectron2 goes on without it as well.
                with contextlib.suppress(Exception):
                    orientation = image.getexif().get(_ORIENTATION)
    turned = orientation in _TURNED
    return ((height, width) if turned else (width, height)), turned


def _load(report: Report) -> None:
    """Count what is left out, by loading it as a training does."""
    data = report.data
    # Of categories and images that are counted here.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        records = load_coco_json(str(data.file), str(data.folder))
    except KeyError as e:
        report.reasons.append(f"its annotations have no {_clean(e)}")
        return
    except Exception as e:
        # Whatever pycocotools and Detectron2 stumble over in a json: a dozen types.
        report.reasons.append(f"Detectron2 cannot load it ({_clean(reason(e), 200)})")
        return
    finally:
        logging.disable(level)
    kept = check_records(records, str(data.file), tell=False)
    report.images_left_out = len(data.images) - len(kept)
    report.boxes_left_out = len(data.annotations) - sum(len(x["annotations"]) for x in kept)
    if not any(a.get("iscrowd", 0) == 0 for x in kept for a in x["annotations"]):
        report.reasons.append("it has no objects to learn from")


# ---- the teacher's classes --------------------------------------------------------------------


def teacher_classes(config: str) -> list[str] | None:
    """The classes of the datasets that a teacher's config names; None if they are not known here.

    Args:
        config: a yaml, or a name in the model zoo. Weights are not needed.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    found = _find_config(config)
    if found is None:
        raise UserError(
            f"teacher config {config!r} is neither a file (seen from {os.getcwd()}) nor a name in "
            "Detectron2's model zoo; change --teacher-config"
        )
    path, _ = found
    if path.endswith(".py"):
        raise UserError(f"teacher config {path} is a program; --teacher-config takes a yaml")
    plan = _read_yaml_teacher(path, [], "cpu", False)
    return class_names(plan.datasets)


def compare_classes(
    mine: Sequence[str], theirs: Sequence[str] | None, *, show_all: bool = False
) -> str:
    """What the classes of a teacher mean for a student of these.

    Args:
        mine: names of the categories, by id.
        theirs: the teacher's; None if they are not known.
        show_all: cut no list.
    """
    features = "Losses on feature maps do not read classes."
    if theirs is None:
        return (
            "The teacher's classes are not known here: its DATASETS.TRAIN is not registered. "
            f"Losses on logits then need a teacher of {len(mine)} classes, the same ones in the "
            f"same order. {features}"
        )
    if list(mine) == list(theirs):
        return (
            f"The teacher has the same {len(mine)} classes in the same order: losses on logits "
            f"compare all of them. {features}"
        )
    shared = [x for x in dict.fromkeys(mine) if x in set(theirs)]
    lists = {
        "in both": shared,
        "only here": [x for x in mine if x not in set(theirs)],
        "only the teacher's": [x for x in theirs if x not in set(mine)],
    }
    rows = []
    for what, names in lists.items():
        cut = names if show_all else names[:10]
        more = f", ... ({len(names) - len(cut)} more, --all shows them)" if cut != names else ""
        rows.append((len(names), what, ", ".join(map(_clean, cut)) + more))
    text = (
        f"The teacher has {len(theirs)} classes:\n\n" + _table(rows, ("", "classes", "")) + "\n\n"
    )
    spelled = {_spelling(x): x for x in lists["only the teacher's"]}
    alike = [(x, spelled[_spelling(x)]) for x in lists["only here"] if _spelling(x) in spelled]
    if alike:
        pairs = ", ".join(f"{_clean(x)} (the teacher's {_clean(y)})" for x, y in alike)
        text += f"Spelled in another way: {pairs}; rename them in the json to have them compared.\n"
    if shared:
        text += f"Losses on logits compare the {len(shared)} classes of the same name. {features}"
    else:
        text += f"Losses on logits are refused: no class has the same name. {features}"
    return text


def _spelling(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


# ---- splitting --------------------------------------------------------------------------------


def split_images(
    data: Dataset, shares: Sequence[float], *, seed: int = 0, group_by: str = ""
) -> dict[str, list[Record]]:
    """Deal the images out, each category in proportion as well as can be.

    Images of the rarest categories come first, each goes to the split that its categories bring
    nearest to their shares. Without groups every split has its share of the images, to within one.

    Args:
        data: the dataset.
        shares: of train and val, or of train, val and test; what they leave is in no split.
        seed: of the order within a category.
        group_by: images with the same value of this key stay together; empty: those of one file.

    Returns:
        the images of train, val (and test), in the order of the json.

    Raises:
        UserError: images without the key, or a split that would have no image.
    """
    units = _groups(data, group_by)
    random.Random(seed).shuffle(units)
    known = {x["id"] for x in data.categories}
    # Images by category, and as None of any.
    held: list[collections.Counter[Hashable]] = []
    total: collections.Counter[Hashable] = collections.Counter()
    for unit in units:
        ids = [data.images[i]["id"] for i in unit]
        present = [{a["category_id"] for a in data.by_image[x]} & known for x in ids]
        held.append(collections.Counter(c for x in present for c in [None, *x]))
        total.update(held[-1])
    rest = 1 - sum(shares)
    parts = [*shares, rest] if rest > 1e-9 else list(shares)
    room = _whole_numbers(parts, len(data.images))
    lacks = [{c: share * n for c, n in total.items()} for share in parts]
    chosen: list[list[int]] = [[] for _ in parts]

    def gain(s: int, unit: collections.Counter[Hashable]) -> float:
        """By how much the squares of what is lacking, relative to what is wanted, become less."""
        return sum(n * (2 * lacks[s][c] - n) / (parts[s] * total[c]) for c, n in unit.items())

    for u in sorted(range(len(units)), key=lambda u: min(total[c] for c in held[u])):
        # A group may fit nowhere.
        fitting = [s for s in range(len(parts)) if room[s] >= len(units[u])] or range(len(parts))
        best = max(fitting, key=lambda s: gain(s, held[u]))
        chosen[best] += units[u]
        room[best] -= len(units[u])
        for category, n in held[u].items():
            lacks[best][category] -= n
    found = {
        name: [data.images[i] for i in sorted(x)] for name, x in zip(_SPLITS, chosen[: len(shares)])
    }
    for name, images in found.items():
        if not images:
            raise UserError(
                f"--split leaves {name} without images: there are {len(data.images)}, in "
                f"{len(units)} groups; change the shares"
            )
    return found


def _groups(data: Dataset, key: str) -> list[list[int]]:
    """Indices of images that stay together."""
    found: dict[Hashable, list[int]] = {}
    for i, image in enumerate(data.images):
        value = image.get(key) if key else os.path.normpath(data.path(image))
        if not isinstance(value, (str, int, float)):
            raise UserError(
                f"--group-by {key}: image {_clean(image['id'])} has "
                + (
                    f"{_show(value)}, expected a number or a text"
                    if key in image
                    else "no such key"
                )
            )
        found.setdefault(value, []).append(i)
    return list(found.values())


def _whole_numbers(shares: Sequence[float], total: int) -> list[int]:
    """Of a total, each to within one of its share; the largest remainders are rounded up."""
    # Of 0.7 * 10 the last bit is wrong.
    exact = [round(x * total, 6) for x in shares]
    whole = [math.floor(x) for x in exact]
    first = sorted(range(len(shares)), key=lambda s: whole[s] - exact[s])
    for s in first[: total - sum(whole)]:
        whole[s] += 1
    return whole


def write_split(data: Dataset, parts: dict[str, list[Record]], folder: Path) -> dict[str, Path]:
    """Write a json for each part, with all that the whole one has beside images and annotations.

    Args:
        data: the whole.
        parts: name -> images.
        folder: of NAME.json; made if it is not there. What is there is replaced.

    Raises:
        UserError: they cannot be written.
    """
    paths = {}
    for name, images in parts.items():
        ids = {x["id"] for x in images}
        content = {
            **data.content,
            "images": images,
            "annotations": [a for a in data.annotations if a["image_id"] in ids],
        }
        paths[name] = folder / f"{name}.json"
        try:
            text = json.dumps(content).encode()
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(paths[name], functools.partial(_write, text))
        except (OSError, RecursionError) as e:
            raise UserError(f"{paths[name]} cannot be written: {reason(e)}") from e
    return paths


def _write(text: bytes, file: IO[bytes]) -> None:
    file.write(text)


def _describe_split(
    data: Dataset, parts: dict[str, list[Record]], *, show_all: bool = False
) -> str:
    """Counts of each part, and categories that one of them lacks."""
    counts = {}
    for name, images in parts.items():
        objects = [a["category_id"] for x in images for a in data.by_image[x["id"]]]
        counts[name] = collections.Counter(objects)
    rows: list[Sequence[object]] = [("images", *map(len, parts.values()))]
    rows.append(("objects", *(x.total() for x in counts.values())))
    text = _table(rows, ("", *parts)) + "\n\n"
    rows = [(_clean(x["name"]), *(n[x["id"]] for n in counts.values())) for x in data.categories]
    text += _table(rows, ("objects of", *parts), show_all)
    rows = []
    for x in data.categories:
        there = [name for name, n in counts.items() if n[x["id"]]]
        missing = [name for name in counts if name not in there]
        if there and missing:
            rows.append((_clean(x["name"]), ", ".join(missing), ", ".join(there)))
    if rows:
        text += "\n\nCategories that are not in every part:\n\n"
        text += _table(rows, ("category", "not in", "only in"), show_all)
    return text


# ---- the sheet --------------------------------------------------------------------------------

# In pixels: a picture, what is around it, the line above it, and a line of the legend.
_CELL, _GAP, _TITLE, _LINE = 360, 12, 20, 24
_COLUMNS, _LEGEND_COLUMNS, _LEGEND = 4, 6, 60
# At so many boxes of an image there are names: more would hide it.
_NAMES = 15
_DPI = 100


def draw_sheet(data: Dataset, path: Path, *, count: int = 16, seed: int = 0) -> None:
    """Draw random images with their boxes, each category in a colour of its own.

    Names stand at the boxes as far as there is room, large ones first; all are in the legend.

    Args:
        data: the dataset.
        path: of the PNG; its folder is made if it is not there.
        count: of the images.
        seed: of the choice.

    Raises:
        UserError: it cannot be written, or no image is there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = [x for x in data.images if os.path.isfile(data.path(x))]
    if not there:
        raise UserError(f"--sheet has nothing to draw: no image of {data.file} is in {data.folder}")
    chosen = random.Random(seed).sample(there, min(count, len(there)))
    present = {a["category_id"] for x in chosen for a in data.by_image[x["id"]]}
    styles = _styles(data.categories)
    legend = [styles[x["id"]] for x in data.categories if x["id"] in present]
    more = len(legend) - _LEGEND
    columns = min(_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    lines = -(-min(len(legend), _LEGEND) // _LEGEND_COLUMNS) + (more > 0)
    width = _COLUMNS * (_CELL + _GAP) + _GAP
    height = rows * (_TITLE + _CELL + _GAP) + _GAP + lines * _LINE + _GAP // 2
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    # One unit is one pixel, from the upper left.
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set(xlim=(0, width), ylim=(height, 0))
    with warnings.catch_warnings():
        # Of file names in letters that the font lacks: of categories such names are not drawn.
        warnings.filterwarnings("ignore", message="Glyph")
        for i, image in enumerate(chosen):
            row, column = divmod(i, columns)
            left = _GAP + column * (_CELL + _GAP)
            top = _GAP + row * (_TITLE + _CELL + _GAP)
            _draw_image(axis, canvas.get_renderer(), data, image, styles, (left, top))
        top = height - lines * _LINE - _GAP // 2
        for i, (name, color) in enumerate(legend[:_LEGEND]):
            row, column = divmod(i, _LEGEND_COLUMNS)
            left = _GAP + column * (width - _GAP) // _LEGEND_COLUMNS
            _add_text(axis, (left, top + row * _LINE), name, color)
        if more > 0:
            text = f"and {more} more categories"
            _add_text(axis, (_GAP, top + (lines - 1) * _LINE), text, (1.0, 1.0, 1.0))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda f: figure.savefig(f, format="png", dpi=_DPI))
        except OSError as e:
            raise UserError(f"{path} cannot be written: {reason(e)}; change --sheet") from e


def _styles(categories: Sequence[Record]) -> dict[Hashable, tuple[str, Color]]:
    """What each category's id is called on the sheet, and its colour."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    styles: dict[Hashable, tuple[str, Color]] = {}
    for i, x in enumerate(categories):
        name = _clean(x["name"], 24)
        if not all(font.get_char_index(ord(c)) for c in name):
            name = f"category {_clean(x['id'], 14)}"
        # Neighbours are far apart on the circle of hues, however many there are.
        hue = i * 0.618034 % 1
        styles[x["id"]] = name, colorsys.hsv_to_rgb(hue, 0.9 if i % 2 else 0.75, 0.95)
    return styles


def _add_text(axis: Any, place: tuple[float, float], text: str, color: Color) -> Any:
    """A label on its colour; place is its upper left corner."""
    bright = 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2] > 0.5
    return axis.text(
        *place, text, va="top", fontsize=8, color="black" if bright else "white", parse_math=False,
        bbox={"facecolor": color, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def _draw_image(
    axis: Any,
    renderer: Any,
    data: Dataset,
    image: Record,
    styles: dict[Hashable, tuple[str, Color]],
    place: tuple[int, int],
) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    left, top = place[0], place[1] + _TITLE
    objects, drawn = data.by_image[image["id"]], 0
    names: list[tuple[Corners, str, Color]] = []
    try:
        pixels, scale = _read_scaled(data.path(image))
    except _UNREADABLE as e:
        why = f"cannot be read:\n{_clean(reason(e), 45)}"
        axis.text(left, top, why, va="top", fontsize=8, parse_math=False)
    else:
        height, width = pixels.shape[:2]
        extent = left, left + width, top + height, top
        axis.imshow(pixels, extent=extent, aspect="auto", interpolation="nearest")
        for annotation in objects:
            box, size = annotation.get("bbox"), (width / scale[0], height / scale[1])
            found = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS}
            if annotation["category_id"] not in styles or box_problem(found, size):
                continue
            drawn += 1
            x, y, w, h = (float(v) for v in annotation["bbox"])
            x0, x1 = (left + min(max(v * scale[0], 0), width) for v in (x, x + w))
            y0, y1 = (top + min(max(v * scale[1], 0), height) for v in (y, y + h))
            name, color = styles[annotation["category_id"]]
            edge = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=color, lw=1.5)
            edge.set_linestyle("--" if annotation.get("iscrowd", 0) != 0 else "-")
            # Seen on a background of its own colour, too.
            edge.set_path_effects([withStroke(linewidth=3, foreground="black")])
            axis.add_patch(edge)
            names.append(((x0, y0, x1, y1), name, color))
        # The largest boxes have names, if there is room; of the others the legend tells.
        taken: list[Corners] = []
        names.sort(key=lambda x: (x[0][0] - x[0][2]) * (x[0][3] - x[0][1]))
        for corners, name, color in names[:_NAMES]:
            bounds = left, top, left + width, top + height
            _place_name(axis, renderer, bounds, taken, corners, name, color)
    file = image["file_name"]
    title = f"{_clean(file if len(file) < 30 else '...' + file[-27:])}, {len(objects)} objects"
    title += f", {len(objects) - drawn} not drawn" if drawn < len(objects) else ""
    axis.text(left, place[1], title, va="top", fontsize=8, parse_math=False)


def _read_scaled(path: str) -> tuple[np.ndarray[Any, Any], tuple[float, float]]:
    """(H, W, 3) RGB, with a longer side of a cell's, and the factors of its width and height."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.fromarray(read_image(path, "RGB"))
    factor = _CELL / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    how = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX
    return np.asarray(image.resize(size, how)), (size[0] / image.width, size[1] / image.height)


def _place_name(
    axis: Any, renderer: Any, bounds: Corners, taken: list[Corners], box: Corners, name: str,
    color: Color,
) -> None:  # fmt: skip
    """Write a name above, in or below its box, if that is not over another one."""
    text = _add_text(axis, (0, 0), name, color)
    extent = text.get_window_extent(renderer).padded(2)
    width, height = extent.width, extent.height
    left = min(max(box[0], bounds[0]), max(bounds[2] - width, bounds[0]))
    for top in (box[1] - height, box[1], box[3], box[3] - height):
        here = left, top, left + width, top + height
        free = all(
            here[2] <= x[0] or x[2] <= here[0] or here[3] <= x[1] or x[3] <= here[1] for x in taken
        )
        if free and bounds[1] <= top and here[3] <= bounds[3]:
            text.set_position((left + 2, top + 2))
            taken.append(here)
            return
    text.remove()


# ---- the tool ---------------------------------------------------------------------------------


def prepare_data(
    annotations: Path,
    images: Path,
    *,
    teacher_config: str = "",
    sheet: Path | None = None,
    split: Sequence[float] = (),
    output: Path | None = None,
    group_by: str = "",
    seed: int = 0,
    fast: bool = False,
    overwrite: bool = False,
    show_all: bool = False,
) -> bool:
    """Check a dataset, print what was found, draw it, and split it if it can be used.

    Args:
        annotations: COCO's json; never changed.
        images: the folder that its file names begin in.
        teacher_config: see :func:`teacher_classes`; empty: no comparison.
        sheet: see :func:`draw_sheet`; None: none.
        split: see :func:`split_images`; empty: none.
        output: folder of the split.
        group_by: see :func:`split_images`.
        seed: of the sheet and of the split.
        fast: do not open the images.
        overwrite: replace an earlier sheet and split.
        show_all: cut no list.

    Returns:
        whether it can be trained on.

    Raises:
        UserError: see the messages; nothing has been written by then, but for a full disk.
    """
    targets = _check_request(annotations, images, sheet, split, output, group_by)
    for target in targets:
        if target.exists() and not overwrite:
            raise UserError(f"{target} is there already; add --overwrite, or choose another place")
    data = read_dataset(annotations, images)
    parts = split_images(data, split, seed=seed, group_by=group_by) if split else {}
    theirs = teacher_classes(teacher_config) if teacher_config else None

    report = check_dataset(data, fast=fast)
    print(report.text(show_all=show_all))
    mine = [x["name"] for x in data.categories]
    if teacher_config:
        print(f"\n{compare_classes(mine, theirs, show_all=show_all)}")
    files = {"": annotations}
    if parts and output is not None and report.usable:
        files = dict(write_split(data, parts, output))
        print(f"\n{_describe_split(data, parts, show_all=show_all)}")
    print(f"\n{_clean(annotations, 200)} {report.verdict}")
    if sheet is not None:
        draw_sheet(data, sheet, seed=seed)
        print(f"\nPictures: {_clean(sheet, 200)}")
    if report.usable:
        print(f"\n{_registration(files, annotations, images, len(mine))}")
    return report.usable


def _check_request(
    annotations: Path,
    images: Path,
    sheet: Path | None,
    split: Sequence[float],
    output: Path | None,
    group_by: str,
) -> list[Path]:
    """The files that are to be written."""
    targets = []
    if split:
        if len(split) not in (2, 3):
            raise UserError(
                "--split takes the shares of train and val, or of train, val and test; "
                f"{len(split)} are given"
            )
        # Of 0.7 + 0.2 + 0.1 the last bit is wrong.
        if not all(x > 0 for x in split) or not sum(split) <= 1 + 1e-9:
            shares = " ".join(f"{x:g}" for x in split)
            raise UserError(f"--split {shares}: shares are positive and sum to at most 1")
        if output is None:
            raise UserError("--split needs --output, the folder to write to")
        targets += [output / f"{name}.json" for name in _SPLITS[: len(split)]]
    elif output is not None or group_by:
        raise UserError("--output and --group-by are of a split: add --split 0.8 0.2")
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise UserError(f"--sheet {sheet} is to be a PNG: let its name end in .png")
        if images.resolve() in sheet.resolve().parents:
            raise UserError(f"--sheet {sheet} is among the images; choose another folder")
        targets.append(sheet)
    for target in targets:
        if target.resolve() == annotations.resolve():
            raise UserError(f"{target} is the dataset itself; choose another --output")
    return targets


def _registration(files: dict[str, Path], annotations: Path, images: Path, classes: int) -> str:
    """What to paste to train on it."""
    stem = re.sub(r"\W+", "_", annotations.stem)
    names = {}
    for split in files:
        name = f"{stem}_{split}" if split else stem
        while name in DatasetCatalog:
            name = f"my_{name}"
        names[split] = name
    lines = ["from detectron2.data.datasets import register_coco_instances", ""]
    for split, file in files.items():
        lines.append(
            f"register_coco_instances({names[split]!r}, {{}}, {str(file)!r}, {str(images)!r})"
        )
    first, *rest = names.values()
    return "\n".join(
        [
            "To train on it, in a script that ends with pcka_distill.engine.cli():",
            "",
            *lines,
            "",
            "and in its config, with the NUM_CLASSES of your detector:",
            "",
            "DATASETS:",
            f"  TRAIN: ({first!r},)",
            *([f"  TEST: ({rest[0]!r},)"] if rest else []),
            "MODEL:",
            f"  RETINANET: {{NUM_CLASSES: {classes}}}",
            f"  FCOS: {{NUM_CLASSES: {classes}}}",
            f"  ROI_HEADS: {{NUM_CLASSES: {classes}}}",
        ]
    )
