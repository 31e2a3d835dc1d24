"""Small inputs and configs that several test files share."""

from pathlib import Path

import torch
from detectron2.structures import Boxes, Instances

from pcka_distill import get_distill_cfg

REPO = Path(__file__).resolve().parents[1]
FAMILIES = ("retinanet", "faster_rcnn")


def digits_cfg(name, *opts):
    """A shipped Digits config with overrides."""
    cfg = get_distill_cfg()
    cfg.merge_from_file(str(REPO / "configs" / "Digits" / f"{name}.yaml"))
    cfg.merge_from_list(list(opts))
    return cfg


def distill_cfg(family, weights, *opts):
    """A Digits distillation whose teacher has the student's small architecture."""
    return digits_cfg(
        f"{family}_pcka",
        "MODEL.DISTILL.TEACHER.CONFIG_FILE",
        str(REPO / "configs" / "Digits" / f"{family}_student.yaml"),
        "MODEL.DISTILL.TEACHER.WEIGHTS",
        weights,
        *opts,
    )


def make_batch(seed=0, sizes=((96, 96), (96, 96))):
    """Images of noise with two boxes each."""
    g = torch.Generator().manual_seed(seed)
    batch = []
    for h, w in sizes:
        instances = Instances((h, w))
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 8.0, 33.0, 44.0], [50.0, 40.0, 80.0, 90.0]]))
        instances.gt_classes = torch.tensor([3, 7])
        image = torch.randint(0, 256, (3, h, w), generator=g, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": h, "width": w})
    return batch
