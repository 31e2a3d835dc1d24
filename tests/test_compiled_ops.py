"""Detectron2 with its compiled ops, which the pinned wheel has for Python 3.10 alone."""

import importlib.util
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

COMPILED = importlib.util.find_spec("detectron2._C") is not None
# On 3.10 they must be there: a skip would hide that the leg tests nothing.
pytestmark = pytest.mark.skipif(
    not COMPILED and sys.version_info[:2] != (3, 10),
    reason="this Detectron2 has no compiled ops; PYTHON=python3.10 make test has them",
)


@pytest.mark.usefixtures("digits")
def test_fast_coco_evaluation_is_the_slow_one():
    """COCOEvaluator takes the compiled evaluation by itself where it finds it."""
    g = torch.Generator().manual_seed(0)
    records = DatasetCatalog.get("digits_val")[:40]
    inputs, outputs = [], []
    for record in records:
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        found = Instances((96, 96))
        found.pred_boxes = Boxes(boxes + 3 * torch.randn(boxes.shape, generator=g))
        found.pred_classes = torch.where(
            torch.rand(len(classes), generator=g) < 0.2, (classes + 1) % 10, classes
        )
        found.scores = torch.rand(len(classes), generator=g)
        inputs.append({"image_id": record["image_id"], "file_name": record["file_name"]})
        outputs.append({"instances": found})

    def evaluate(**options):
        evaluator = COCOEvaluator("digits_val", ("bbox",), distributed=False, **options)
        evaluator.reset()
        evaluator.process(inputs, outputs)
        used = evaluator._use_fast_impl
        return used, evaluator.evaluate(img_ids=[r["image_id"] for r in records])["bbox"]

    (fast, a), (slow, b) = evaluate(), evaluate(use_fast_impl=False)
    assert fast and not slow
    assert 5 < a["AP"] < 95
    for key, value in a.items():
        assert value == pytest.approx(b[key], nan_ok=True, abs=1e-6)


def test_rotated_nms():
    from detectron2.layers import nms_rotated

    boxes = torch.tensor([[5.0, 5, 8, 4, 0], [5, 5, 8, 4, 5], [5, 5, 8, 4, 90], [50, 50, 8, 4, 0]])
    keep = nms_rotated(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), 0.5)
    assert keep.tolist() == [0, 2, 3]
