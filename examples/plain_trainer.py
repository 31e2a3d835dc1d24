#!/usr/bin/env python
"""Distil in a training script of your own: three lines.

An ordinary Detectron2 script: model, optimizer, data, loop, checkpoint. The three lines marked
"distill" are all that a teacher adds; without them it trains the student alone. What it saves is
the student's, which the last lines show: the stock model has every tensor of it.

    python examples/plain_trainer.py --iterations 20
    python examples/plain_trainer.py --iterations 1200 --teacher TEACHER/model_final.pth

The teacher is configs/Digits/retinanet_teacher.yaml. Without --teacher it is not trained: enough
to see it run, and nothing to learn from.
"""

import os
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from pcka_distill import (
    DistillationModel,
    MimicLoss,
    PCKALoss,
    get_distill_cfg,
    load_teacher,
    register_digits,
)
from pcka_distill.tool import run_tool, tool_parser

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "Digits"
TEACHER = CONFIGS / "retinanet_teacher.yaml"


def read_config(name, *opts):
    """Your own yaml; where it has no keys of pcka_distill, Detectron2's get_cfg() reads it too."""
    cfg = get_distill_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.merge_from_list(list(opts))
    return cfg


def main(args):
    """Train the student and load it into the stock model."""
    seed_all_rng(0)
    args.output.mkdir(parents=True, exist_ok=True)
    # The example's data: in Detectron2's folder of datasets if you have one.
    register_digits(os.environ.get("DETECTRON2_DATASETS", str(args.output / "datasets")))
    if not args.teacher:
        print("no --teacher: an untrained one stands in for it")
        args.teacher = str(args.output / "untrained_teacher.pth")
        untrained = build_model(read_config("retinanet_teacher.yaml"))
        torch.save({"model": untrained.state_dict()}, args.teacher)

    steps = ["SOLVER.MAX_ITER", args.iterations, "SOLVER.WARMUP_ITERS", args.iterations // 10]
    cfg = read_config("retinanet_student.yaml", *steps)
    model = build_model(cfg)
    losses = [PCKALoss(patch_size=2, form="signed"), MimicLoss()]  # distill
    teacher = load_teacher(config=str(TEACHER), weights=args.teacher)  # distill
    model = DistillationModel(student=model, teacher=teacher, losses=losses)  # distill

    # Not before: a loss may have parameters of its own, which are trained with the student.
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(model, str(args.output), optimizer=optimizer)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    loader = build_detection_train_loader(cfg)
    with EventStorage() as storage:
        for i, batch in zip(range(args.iterations), loader):
            terms = model(batch)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            scheduler.step()
            storage.step()
            print(f"{i}: " + ", ".join(f"{k} {v:.3f}" for k, v in terms.items()))
    checkpointer.save("model_final")

    stock, trained = build_model(cfg), model.state_dict()
    DetectionCheckpointer(stock).load(str(args.output / "model_final.pth"))
    equal = all(torch.equal(x, trained[k]) for k, x in stock.state_dict().items())
    print(f"the stock {type(stock).__name__} has what was trained: {equal}")


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("--teacher", default="", help="its checkpoint")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("output/examples/plain_trainer"))
    run_tool(parser, main)
