#!/usr/bin/env python
"""The pictures of the documentation, drawn from what `make demo` leaves.

    python tools/draw_docs.py --demo output/demo --out docs/pictures

Results on the digits' test images, and how alike the features of teacher and student are.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from pcka_distill.inference import load_config
from pcka_distill.tool import run_tool, tool_parser
from pcka_distill.visualize import check_target, draw_cka, draw_results


def main(args: argparse.Namespace) -> None:
    """Draw them all."""
    alone, taught = str(args.demo / "plain"), str(args.demo / "distilled")
    teacher = args.demo / "teacher"
    weights = ["MODEL.DISTILL.TEACHER.WEIGHTS", str(teacher / "model_final.pth")]
    cfg = load_config(str(args.demo / "distilled" / "config.yaml"), weights)
    students = {"as training begins": "", "alone": alone, "taught": taught}
    check_target(args.out / "results.png")
    with tempfile.TemporaryDirectory() as folder:
        draw_cka(cfg, students, "digits_test", Path(folder), args.images)
        # Not the numbers, which are for programs.
        for picture in Path(folder).glob("*.png"):
            shutil.copyfile(picture, args.out / picture.name)
    runs = {"teacher": str(teacher), "alone": alone, "taught": taught}
    draw_results(args.out / "results.png", "digits_test", runs, images=6, score=0.4)
    print(args.out)


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("--demo", type=Path, default=Path("output/demo"), help="its folder")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="to write into")
    parser.add_argument("--images", type=int, default=64, help="to measure on; default 64")
    run_tool(parser, main)
