#!/usr/bin/env python
"""Look at a dataset in COCO's format before training on it, and split it.

    python tools/prepare_data.py annotations.json images/ --sheet sheet.png
    python tools/prepare_data.py annotations.json images/ --split 0.8 0.1 0.1 --output splits
    python tools/prepare_data.py annotations.json images/ \\
        --teacher-config COCO-Detection/retinanet_R_101_FPN_3x.yaml

It counts what is there, and what training would leave out or refuse; the exit code is 1 if the
dataset cannot be trained on. A split is by images, seeded, with every category in proportion as
well as can be. The dataset itself is never changed.
"""

import argparse
import sys
from pathlib import Path

from pcka_distill.data.prepare import prepare_data
from pcka_distill.tool import run_tool, tool_parser


def main(args: argparse.Namespace) -> None:
    """Everything that was asked for, in one go."""
    options = {key: value for key, value in vars(args).items() if key != "debug"}
    if not prepare_data(**options):
        sys.exit(1)


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("annotations", type=Path, help="COCO's json")
    parser.add_argument("images", type=Path, help="the folder that its file names begin in")
    parser.add_argument(
        "--teacher-config",
        default="",
        metavar="CONFIG",
        help="compare the categories with its classes: a yaml, or a name in the model zoo",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="draw some images with their boxes"
    )
    parser.add_argument(
        "--split",
        type=float,
        nargs="+",
        default=(),
        metavar="SHARE",
        help="of the images, for train and val, or for train, val and test",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the split is written")
    parser.add_argument(
        "--group-by",
        default="",
        metavar="KEY",
        help="keep images together that have the same value of this key, such as video_id",
    )
    parser.add_argument("--seed", type=int, default=0, help="of split and sheet; default 0")
    parser.add_argument("--fast", action="store_true", help="do not open the images")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier split and sheet"
    )
    parser.add_argument("--all", action="store_true", dest="show_all", help="cut no list")
    run_tool(parser, main)
