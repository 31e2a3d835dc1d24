"""Small inputs and configs that several test files share."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from pcka_distill import get_distill_cfg

REPO = Path(__file__).resolve().parents[1]
# Those with a Digits config of their own, and those that only the tests have one for.
SHIPPED = ("retinanet", "fcos", "faster_rcnn", "sem_seg")
FAMILIES = (*SHIPPED, "cascade_rcnn", "mask_rcnn", "c4_rcnn", "panoptic_fpn")
LEVELS = dict.fromkeys(FAMILIES, ("p3", "p4", "p5")) | {
    "c4_rcnn": ("res4",),
    "sem_seg": ("p2", "p3", "p4", "p5"),
}
STAGES = dict.fromkeys(FAMILIES, ("",)) | {"cascade_rcnn": ("_stage0", "_stage1", "_stage2")}

# Of the student; its batch norm would relate the images of a part to one another.
FROZEN_NORM = (
    *("MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.DISTILL.TEACHER.OPTS", ["MODEL.RESNETS.NORM", "BN"]),
)


def student_yaml(family):
    """The small student of a family."""
    if family in SHIPPED:
        return REPO / "configs" / "Digits" / f"{family}_student.yaml"
    return REPO / "tests" / "configs" / f"{family}.yaml"


def digits_cfg(name, *opts):
    """A family's student, or a shipped Digits config, with overrides."""
    cfg = get_distill_cfg()
    shipped = REPO / "configs" / "Digits" / f"{name}.yaml"
    cfg.merge_from_file(str(shipped if shipped.exists() else student_yaml(name)))
    cfg.merge_from_list(list(opts))
    return cfg


def distill_cfg(family, weights, *opts):
    """A distillation of a family's student by a teacher of the same small architecture."""
    cfg = digits_cfg(family)
    student = cfg.MODEL.META_ARCHITECTURE
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "DistillationModel"),
            *("MODEL.DISTILL.STUDENT_ARCHITECTURE", student),
            *("MODEL.DISTILL.TEACHER.CONFIG_FILE", str(student_yaml(family))),
            *("MODEL.DISTILL.TEACHER.WEIGHTS", weights),
            *("MODEL.DISTILL.LOSSES", ["PCKALoss"]),
            *("MODEL.DISTILL.PCKA.LEVELS", LEVELS[family]),
            *("MODEL.DISTILL.PCKA.PATCH_SIZE", (2,)),
            *("MODEL.DISTILL.PCKA.LAYOUT", "sample"),
            # The centred relation of the two images of a batch is constant.
            *("MODEL.DISTILL.FCKA.CENTER", False),
            *opts,
        ]
    )
    return cfg


def rand(*shape, seed=0, dtype=torch.float32):
    """Gaussian noise of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_batch(seed=0, sizes=((96, 96), (96, 96))):
    """Images of noise with two boxes each, their masks, and a semantic segmentation."""
    g = torch.Generator().manual_seed(seed)
    batch = []
    for h, w in sizes:
        instances = Instances((h, w))
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 8.0, 33.0, 44.0], [50.0, 40.0, 80.0, 90.0]]))
        instances.gt_classes = torch.tensor([3, 7])
        instances.gt_masks = PolygonMasks(
            [
                [[x0, y0, x1, y0, x1, y1, x0, y1]]
                for x0, y0, x1, y1 in instances.gt_boxes.tensor.tolist()
            ]
        )
        image = torch.randint(0, 256, (3, h, w), generator=g, dtype=torch.uint8)
        sem_seg = torch.randint(0, 3, (h, w), generator=g)
        batch.append(
            {"image": image, "instances": instances, "sem_seg": sem_seg, "height": h, "width": w}
        )
    return batch


def build_distilled(family, teacher_files, *opts):
    """Of the same weights whenever it is called."""
    torch.manual_seed(0)
    return build_model(distill_cfg(family, teacher_files[family], *opts))


def gradients(model, batch):
    """(losses, gradients) of one forward; the random numbers that it draws are always the same."""
    model.zero_grad()
    torch.manual_seed(1)
    with EventStorage(0):
        losses = model(batch)
    sum(losses.values()).backward()
    return losses, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def train_net(*args, root=None):
    """tools/train_net.py in a process of its own, with the datasets below a folder."""
    environment = {**os.environ, **({"DETECTRON2_DATASETS": str(root)} if root else {})}
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / "train_net.py"), *map(str, args)],
        capture_output=True, text=True, cwd=REPO, env=environment,
    )  # fmt: skip


def assert_one_line(done, message):
    """A process ended with one line for its user, which matches."""
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr[-2000:]
    assert re.search(message, last), last


def value_and_gradient(loss, x, *others, **options):
    x = x.clone().requires_grad_()
    value = loss(x, *others, **options)
    return value.detach(), torch.autograd.grad(value, x)[0]
