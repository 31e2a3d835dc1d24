#!/usr/bin/env python
"""Distil by a loss of your own, set by config keys of your own.

The loss is the style of feature maps (Gatys et al., CVPR 2016): the student's channels are to be
related to one another as the teacher's are. A FeatureLoss brings levels, weight, schedule and the
1x1 convolutions where channels differ; what is left to write is `compare`.

    python examples/own_loss.py --iterations 30

In a project of your own the class and the keys are registered by a script that ends in
`pcka_distill.engine.cli()`, and your yaml says

    MODEL:
      DISTILL:
        LOSSES: [GramLoss, PCKALoss]
        GRAM: {WEIGHT: 5.0, LEVELS: [p3, p4]}

Here the teacher is not trained: enough to see it run, and nothing to learn from.
"""

import os
from pathlib import Path

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch.nn import functional as F

from pcka_distill import (
    DISTILL_LOSS_REGISTRY,
    FeatureLoss,
    get_distill_cfg,
    register_config,
    register_digits,
)
from pcka_distill.engine import Trainer
from pcka_distill.functional import full_precision, widen
from pcka_distill.tool import run_tool, tool_parser

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "Digits"


@DISTILL_LOSS_REGISTRY.register()
class GramLoss(FeatureLoss):
    """Mean squared difference of the channels' Gram matrices.

    Args:
        normalize: compare cosines, which do not depend on the scale of a channel.
        common: levels, weight, warmup_iters, decay_iters.
    """

    @configurable
    def __init__(self, *, normalize=True, **common):
        super().__init__(**common)
        self.normalize = normalize

    def compare(self, level, student, teacher):
        """Two maps (B, C, H, W) of one shape -> scalar; the weight comes later."""
        # Under AMP: a Gram matrix of fp16 features overflows.
        with full_precision(student.device):
            x, y = (self.gram(widen(z)) for z in (student, teacher))
            return F.mse_loss(x, y)

    def gram(self, x):
        """(B, C, H, W) -> (B, C, C)."""
        x = x.flatten(2)
        x = F.normalize(x, dim=2) if self.normalize else x / x.shape[2] ** 0.5
        return x @ x.mT


@register_config
def add_gram_config(cfg):
    """MODEL.DISTILL.GRAM, of GramLoss: its keys are the arguments of the class."""
    cfg.MODEL.DISTILL.GRAM = CfgNode()
    cfg.MODEL.DISTILL.GRAM.WEIGHT = 1.0
    cfg.MODEL.DISTILL.GRAM.LEVELS = ()
    cfg.MODEL.DISTILL.GRAM.NORMALIZE = True


def main(args):
    """Train a student by the new loss and one of the old ones."""
    setup_logger()
    seed_all_rng(0)
    args.output.mkdir(parents=True, exist_ok=True)
    # The example's data: in Detectron2's folder of datasets if you have one.
    register_digits(os.environ.get("DETECTRON2_DATASETS", str(args.output / "datasets")))
    cfg = get_distill_cfg()
    cfg.merge_from_file(str(CONFIGS / "retinanet_teacher.yaml"))
    weights = args.output / "untrained_teacher.pth"
    torch.save({"model": build_model(cfg).state_dict()}, weights)

    cfg = get_distill_cfg()
    cfg.merge_from_file(str(CONFIGS / "retinanet_pcka.yaml"))
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = str(weights)
    cfg.MODEL.DISTILL.LOSSES = ["GramLoss", "PCKALoss"]
    cfg.MODEL.DISTILL.GRAM.WEIGHT = 5.0
    cfg.MODEL.DISTILL.GRAM.LEVELS = ["p3", "p4"]
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.MAX_ITER = args.iterations
    cfg.SOLVER.WARMUP_ITERS = args.iterations // 10
    cfg.OUTPUT_DIR = str(args.output)
    trainer = Trainer(cfg)
    trainer.train()
    for name, history in trainer.storage.histories().items():
        if name.startswith("loss_"):
            values = [value for value, _ in history.values()]
            print(f"{name}: {values[0]:.4f} -> {values[-1]:.4f}")


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("output/examples/own_loss"))
    run_tool(parser, main)
