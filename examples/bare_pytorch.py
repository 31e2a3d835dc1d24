#!/usr/bin/env python
"""The losses alone, in a plain PyTorch loop, with models of torchvision and timm.

They are functions of tensors: PCKA on pairs of feature maps, RCKA and KD on logits. No detector, no
config, no hooks. Nothing is downloaded, so the teacher is not trained and there is nothing to learn
from it; give yours weights="DEFAULT" or load a checkpoint.

    python examples/bare_pytorch.py --iterations 20
"""

import argparse

import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

from pcka_distill.baselines import kd_loss
from pcka_distill.functional import pcka_loss, rcka_loss

CLASSES = 10


def batches(count, size=32):
    """Your data: images (B, 3, 64, 64), labels (B,). Here noise, on a pattern for each class."""
    patterns = torch.randn(CLASSES, 3, 64, 64)
    for _ in range(count):
        labels = torch.randint(CLASSES, (size,))
        yield patterns[labels] + torch.randn(size, 3, 64, 64), labels


def main(iterations):
    """Train a student on labels, and on what the teacher makes of the images."""
    torch.manual_seed(0)
    # Module of a network of torchvision -> name of what comes out of it.
    nodes = {"layer2": "stride8", "layer3": "stride16", "fc": "logits"}
    resnet = torchvision.models.resnet34(weights=None, num_classes=CLASSES)
    teacher = create_feature_extractor(resnet, nodes).eval().requires_grad_(False)
    # A student of torchvision is read in the same way; timm's models give their maps themselves.
    student = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=CLASSES)
    levels = {"stride8": 2, "stride16": 3}  # of the maps of forward_intermediates
    # Its maps have fewer channels than the teacher's: 1x1 convolutions, which are trained with it
    # and then thrown away. The layouts per_image and batch of PCKA need none.
    mine, theirs = student.feature_info, {"stride8": 128, "stride16": 256}
    convs = nn.ModuleDict(
        {k: nn.Conv2d(mine[i]["num_chs"], theirs[k], 1) for k, i in levels.items()}
    )
    optimizer = torch.optim.AdamW([*student.parameters(), *convs.parameters()], lr=2e-3)

    for i, (images, labels) in enumerate(batches(iterations)):
        with torch.no_grad():
            target = teacher(images)
        last, maps = student.forward_intermediates(images, indices=list(levels.values()))
        logits = student.forward_head(last)
        losses = {"loss_ce": F.cross_entropy(logits, labels)}
        for level, x in zip(levels, maps):
            # Patches of 2 x 2 cells, of maps of 8 x 8 and 4 x 4.
            pcka = pcka_loss(convs[level](x), target[level], patch_size=2, layout="sample")
            losses[f"loss_pcka_{level}"] = pcka
        losses["loss_rcka"] = rcka_loss(logits, target["logits"])
        losses["loss_kd"] = 0.1 * kd_loss(logits, target["logits"], temperature=4.0)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        print(f"{i}: " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=20)
    main(parser.parse_args().iterations)
