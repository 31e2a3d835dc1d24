"""Is the teacher a teacher? Asked of its own detections, before the first iteration."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import time
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from torch.utils.data import SequentialSampler
from tqdm import tqdm

from pcka_distill.errors import UserError, reason
from pcka_distill.teacher import FrozenTeacher

__all__ = ["check_teacher"]

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")


def check_teacher(cfg: CfgNode, frozen: FrozenTeacher) -> float | None:
    """Refuse a teacher that detects less than ``MODEL.DISTILL.TEACHER.MIN_AP``.

    A random one, one that is fed the wrong channels or the wrong normalisation, or one of other
    classes trains anyone's student to be worse, and no loss shows it.

    Args:
        cfg: the student's. Images are prepared as for its evaluation.
        frozen: the teacher.

    Returns:
        box AP in percent on so many images of the first of ``DATASETS.TEST``; None if MIN_AP is 0.

    Raises:
        UserError: it is lower, or it cannot be computed.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    if not node.MIN_AP:
        return None
    if node.MIN_AP_IMAGES < 1:
        raise UserError("MODEL.DISTILL.TEACHER.MIN_AP_IMAGES must be positive")
    if not cfg.DATASETS.TEST:
        raise UserError(
            "MODEL.DISTILL.TEACHER.MIN_AP needs images to detect in: name a dataset in "
            "DATASETS.TEST, or set it 0"
        )
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco":
        raise UserError(f"MODEL.DISTILL.TEACHER.MIN_AP is for datasets of COCO's kind, not {name}")
    # One process looks, the others wait for what it says.
    said: tuple[float, str] = (0.0, "")
    if comm.is_main_process():
        try:
            with tempfile.TemporaryDirectory() as folder:
                said = _average_precision(cfg, frozen, name, folder), ""
        except Exception as e:
            # Whatever it is, the other processes wait to be told.
            said = 0.0, str(e) if isinstance(e, UserError) else f"no AP of the teacher: {reason(e)}"
    ap, error = comm.all_gather(said)[0]
    if error:
        raise UserError(error)
    if ap < node.MIN_AP:
        raise UserError(
            f"the teacher's AP is {ap:.1f} on images of {name}, and MODEL.DISTILL.TEACHER.MIN_AP "
            f"is {node.MIN_AP}: check its WEIGHTS, INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD, and the "
            "size of images"
        )
    return ap


def _average_precision(cfg: CfgNode, frozen: FrozenTeacher, name: str, folder: str) -> float:
    records = DatasetCatalog.get(name)
    classes = MetadataCatalog.get(name).get("thing_classes")
    if frozen.classes is not None and list(frozen.classes) != list(classes):
        raise UserError(
            f"MODEL.DISTILL.TEACHER.MIN_AP compares classes, and those of the teacher are not "
            f"those of {name}; set it 0"
        )
    count = cfg.MODEL.DISTILL.TEACHER.MIN_AP_IMAGES
    records = records[:: max(1, len(records) // count)][:count]
    loader: Any = build_detection_test_loader(
        records,
        mapper=DatasetMapper(cfg, False),
        # All of them: this is done in one process.
        sampler=SequentialSampler(records),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    flip = frozen.input_format not in (None, cfg.INPUT.FORMAT)
    evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False, output_dir=folder)
    evaluator.reset()
    start = time.perf_counter()
    with frozen.running():
        for inputs in tqdm(loader, desc="teacher", unit="image", disable=None, dynamic_ncols=True):
            if flip:
                inputs = frozen.flip_channels(inputs)
            evaluator.process(inputs, frozen.model(inputs))
    # The tables of an evaluation would look like those of the student.
    quiet = logging.getLogger("detectron2.evaluation")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            results = evaluator.evaluate(img_ids=[x["image_id"] for x in records])
    finally:
        quiet.setLevel(level)
    ap = float(results["bbox"]["AP"])
    # Of no detection at all, Detectron2 says NaN.
    ap = 0.0 if math.isnan(ap) else ap
    logger.info(
        f"Teacher: AP {ap:.1f} on {len(records)} images of {name}, in "
        f"{time.perf_counter() - start:.0f} s"
    )
    return ap
