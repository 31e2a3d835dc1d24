#!/usr/bin/env python
"""One page about one or several runs: curves, tables, pictures, what differed.

    python tools/report.py output/demo/plain output/demo/distilled --out report.html
    python tools/report.py alone=output/demo/plain taught=output/demo/distilled --out report.html

The page is a single file. A run is named OUTPUT_DIR or TITLE=OUTPUT_DIR; the first is what the
others are compared with. Runs that have not ended can be looked at as well.
"""

import argparse
from pathlib import Path

from pcka_distill.errors import UserError
from pcka_distill.report import read_run, write_report
from pcka_distill.tool import run_tool, tool_parser
from pcka_distill.visualize import MOST_IMAGES, named_folders


def main(args: argparse.Namespace) -> None:
    """Read the runs and write the page."""
    if not 0 <= args.images <= MOST_IMAGES:
        raise UserError(f"--images is {args.images}; it must be from 0 to {MOST_IMAGES}")
    runs = [
        read_run(title, Path(path))
        for title, path in named_folders(args.runs, titled=False).items()
    ]
    write_report(args.out, runs, images=args.images, score=args.score)
    print(args.out)


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="OUTPUT_DIR", help="or TITLE=OUTPUT_DIR")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="page to write")
    parser.add_argument(
        "--images", type=int, default=6, help="with detections; default 6, at most 24"
    )
    parser.add_argument("--score", type=float, default=0.4, help="threshold; default 0.4")
    run_tool(parser, main)
