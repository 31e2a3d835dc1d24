#!/usr/bin/env python
r"""How alike the features of a teacher and its students are, in pictures.

    python tools/visualize_cka.py --config-file configs/Digits/retinanet_pcka_kd.yaml \
        --students alone=output/demo/plain taught=output/demo/distilled --out output/cka \
        --opts MODEL.DISTILL.TEACHER.WEIGHTS output/demo/teacher/model_final.pth

Writes levels.png and layers.png (CKA of every pyramid level, and of every layer of the backbone,
with every one of the teacher's), channels.png (CKA of each channel, as PCKA sees it), relations.png
(Gram matrices of an image's patches), features.png (its feature maps) and cka.json. A student is
named TITLE=CHECKPOINT or TITLE=OUTPUT_DIR; TITLE= is the student as the config begins.
"""

import argparse
from pathlib import Path

from pcka_distill.errors import UserError
from pcka_distill.inference import errors_of_a_tool, load_config
from pcka_distill.tool import run_tool, tool_parser
from pcka_distill.visualize import draw_cka, named_folders


def main(args: argparse.Namespace) -> None:
    """Measure, draw, and print what was measured."""
    with errors_of_a_tool(args.opts):
        cfg = load_config(args.config_file, args.opts)
        dataset = args.dataset or next(iter((*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)), "")
        if not dataset:
            raise UserError("the config names no dataset; name one with --dataset")
        students = named_folders(args.students)
        found = draw_cka(cfg, students, dataset, args.out, args.images)
    for title, levels in found.items():
        print(f"{title}: " + ", ".join(f"{k} {v:.3f}" for k, v in levels.items()))
    print(f"CKA with the teacher on images of {dataset}; pictures in {args.out}")


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("--config-file", required=True, help="of a distillation")
    parser.add_argument(
        "--students", nargs="+", required=True, metavar="TITLE=PATH", help="see above"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--dataset", default="", help="default: the first of DATASETS.TEST")
    parser.add_argument("--images", type=int, default=64, help="how many of it; default 64")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="overrides: KEY VALUE ..."
    )
    run_tool(parser, main)
