#!/usr/bin/env python
"""Distil a detector that neither Detectron2 nor pcka_distill knows: write its adapter.

The detector is a CenterNet in miniature (Zhou et al., 2019): a heatmap of object centres, one
channel a class, and a box for each cell. What distillation needs to know about it is the 29 lines
of CenterNetAdapter. Run it anywhere; it trains for a few iterations on the digits set:

    python examples/own_detector.py
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from pcka_distill import (
    Adapter,
    DistillationModel,
    FrozenTeacher,
    MimicLoss,
    PCKALoss,
    RCKALoss,
    get_distill_cfg,
    register_adapter,
)

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "Digits" / "retinanet_student.yaml"


@META_ARCH_REGISTRY.register()
class CenterNet(nn.Module):
    """Somebody else's detector: nothing in it is made for distillation."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.num_classes = cfg.MODEL.RETINANET.NUM_CLASSES
        shape = self.backbone.output_shape()["p3"]
        self.stride = shape.stride
        self.heatmap = nn.Conv2d(shape.channels, self.num_classes, 3, padding=1)
        self.box = nn.Conv2d(shape.channels, 4, 3, padding=1)
        nn.init.constant_(self.heatmap.bias, -4.0)

    def preprocess_image(self, batched_inputs):
        images = [(x["image"].to(self.box.weight) - 127.5) / 64 for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, batched_inputs):
        feature = self.backbone(self.preprocess_image(batched_inputs).tensor)["p3"]
        heatmap, boxes = self.heatmap(feature), self.box(feature)
        if not self.training:
            return [{"heatmap": h, "boxes": b} for h, b in zip(heatmap.sigmoid(), boxes)]
        target, loss_box = torch.zeros_like(heatmap), boxes.sum() * 0
        for i, x in enumerate(batched_inputs):
            gt = x["instances"]
            cells = (gt.gt_boxes.get_centers() / self.stride).long()
            target[i, gt.gt_classes, cells[:, 1], cells[:, 0]] = 1.0
            predicted = boxes[i, :, cells[:, 1], cells[:, 0]].T
            loss_box = loss_box + F.l1_loss(predicted, gt.gt_boxes.tensor / 96, reduction="sum")
        count = target.sum().clamp(min=1)
        loss = F.binary_cross_entropy_with_logits(heatmap, target, reduction="sum")
        return {"loss_heatmap": loss / count, "loss_box": loss_box / count}


@register_adapter
class CenterNetAdapter(Adapter):
    """All that distillation needs to know about a CenterNet."""

    family = CenterNet

    def num_classes(self, model):
        return model.num_classes

    def is_sigmoid(self, model):
        return True

    def logit_signature(self, model):
        return {"stride": model.stride}

    def logit_groups(self, model):
        return ["heatmap"]

    def hook_points(self, model, reads):
        points = super().hook_points(model, reads)
        return {**points, "heatmap": model.heatmap} if "logits" in reads else points

    def read_logits(self, model, record, taps):
        # (B, K, H, W) -> (B, H*W, K)
        taps.logits = {"heatmap": record["heatmap"][-1].output.flatten(2).mT}

    def teacher_logits(self, model, features, student):
        heatmap = self.cut(model.heatmap(features["p3"]), student.padded_size, model.stride)
        return {"heatmap": heatmap.flatten(2).mT}


def main(iterations):
    """Train a student for a few iterations, from an equal teacher."""
    cfg = get_distill_cfg()
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "CenterNet", "SOLVER.IMS_PER_BATCH", 4])
    seed_all_rng(0)
    # A real teacher is bigger, and trained.
    student, teacher = META_ARCH_REGISTRY.get("CenterNet")(cfg), CenterNet(cfg)
    model = DistillationModel(
        student=student,
        teacher=FrozenTeacher(teacher),
        losses=[PCKALoss(patch_size=2, layout="sample"), MimicLoss(), RCKALoss()],
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))
    for i, batch in zip(range(iterations), loader):
        with EventStorage(i):
            losses = model(batch)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        print(f"{i}: " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=10)
    main(parser.parse_args().iterations)
