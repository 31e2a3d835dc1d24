#!/usr/bin/env python
"""Train a teacher, and a student by it, on a COCO json of your own.

The images are generated here: 150 of 96 x 96 pixels, with squares and discs. To use your own,
replace what is marked "yours". The number of classes is read from the json. The configs are made
for small images on a CPU; for photographs take those of configs/COCO-Detection.

    python examples/own_dataset.py

From a command line the same takes two yaml files, and a script that registers the datasets and
ends in `pcka_distill.engine.cli()`: see "Your own detector and data" in README.md.
"""

import json
from pathlib import Path

import numpy as np
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from PIL import Image, ImageDraw

from pcka_distill import get_distill_cfg
from pcka_distill.engine import Trainer
from pcka_distill.tool import run_tool, tool_parser

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "Digits"


def write_shapes(folder, count, seed):
    """Images, and their annotations.json: what you have already."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]
    coco = {"images": [], "annotations": [], "categories": categories}
    for i in range(count):
        image = Image.fromarray(rng.integers(60, 200, (96, 96, 3), dtype=np.uint8))
        canvas = ImageDraw.Draw(image)
        for left in (0, 48):
            kind, side = int(rng.integers(2)), int(rng.integers(20, 44))
            x, y = left + int(rng.integers(1, 47 - side)), int(rng.integers(1, 95 - side))
            draw = (canvas.rectangle, canvas.ellipse)[kind]
            draw((x, y, x + side - 1, y + side - 1), fill=("red", "green", "blue")[rng.integers(3)])
            where = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0}
            what = {"id": len(coco["annotations"]) + 1, "image_id": i, "category_id": kind + 1}
            coco["annotations"].append(what | where)
        image.save(folder / "images" / f"{i}.png")
        coco["images"].append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 96})
    (folder / "annotations.json").write_text(json.dumps(coco))


def train(config, args, folder, classes, *opts):
    """Train what a config describes on my_train.

    Returns:
        box AP on my_val, in percent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cfg = get_distill_cfg()
    cfg.merge_from_file(str(CONFIGS / config))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("my_train",), ("my_val",)
    cfg.MODEL.RETINANET.NUM_CLASSES = classes
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = args.iterations, args.iterations // 10
    cfg.OUTPUT_DIR = str(folder)
    cfg.merge_from_list(list(opts))
    # What the student's config names as its teacher's.
    (folder / "config.yaml").write_text(cfg.dump())
    seed_all_rng(0)
    trainer = Trainer(cfg)
    trainer.train()
    return trainer.storage.latest()["bbox/AP"][0]


def main(args):
    """Register the data, train both, print their AP."""
    setup_logger()
    write_shapes(args.output / "train", 120, seed=0)  # yours: leave out
    write_shapes(args.output / "val", 30, seed=1)  # yours: leave out
    train_json = args.output / "train" / "annotations.json"  # yours
    train_images = args.output / "train" / "images"  # yours
    val_json = args.output / "val" / "annotations.json"  # yours
    val_images = args.output / "val" / "images"  # yours

    register_coco_instances("my_train", {}, str(train_json), str(train_images))
    register_coco_instances("my_val", {}, str(val_json), str(val_images))
    classes = len(json.loads(train_json.read_text())["categories"])
    teacher = args.output / "teacher"
    by_whom = [
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", str(teacher / "config.yaml")),
        *("MODEL.DISTILL.TEACHER.WEIGHTS", str(teacher / "model_final.pth")),
    ]
    theirs = train("retinanet_teacher.yaml", args, teacher, classes)
    mine = train("retinanet_pcka_kd.yaml", args, args.output / "student", classes, *by_whom)
    print(f"box AP on my_val: teacher {theirs:.1f}, student {mine:.1f}")


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("--iterations", type=int, default=60, help="of each of the two")
    parser.add_argument("--output", type=Path, default=Path("output/examples/own_dataset"))
    run_tool(parser, main)
