#!/usr/bin/env python
r"""The truth, and what each student of some runs detects, on the first images of a dataset.

    python tools/visualize_results.py --out results.png --dataset digits_test \
        --runs teacher=output/demo/teacher alone=output/demo/plain taught=output/demo/distilled

A run is named TITLE=OUTPUT_DIR. Green boxes are right, red ones are wrong.
"""

import argparse
from pathlib import Path

from pcka_distill.errors import UserError
from pcka_distill.inference import errors_of_a_tool
from pcka_distill.tool import run_tool, tool_parser
from pcka_distill.visualize import draw_results, named_folders


def main(args: argparse.Namespace) -> None:
    """Detect and draw."""
    if args.images < 1:
        raise UserError(f"--images is {args.images}; it must be positive")
    runs = named_folders(args.runs)
    with errors_of_a_tool(args.opts):
        draw_results(
            args.out, args.dataset, runs, images=args.images, score=args.score, opts=args.opts
        )
    print(args.out)


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="TITLE=OUTPUT_DIR", help="that have ended"
    )
    parser.add_argument("--dataset", required=True, help="with boxes, registered")
    parser.add_argument(
        "--out", type=Path, required=True, help="picture to write: a .png, .jpg, .pdf, ..."
    )
    parser.add_argument("--images", type=int, default=6, help="how many; default 6, at most 24")
    parser.add_argument("--score", type=float, default=0.4, help="threshold; default 0.4")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="overrides, last: KEY VALUE ..."
    )
    run_tool(parser, main)
