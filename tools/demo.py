#!/usr/bin/env python
"""The demo: a teacher, a student alone, and the same student taught, on the digits set.

    python tools/demo.py --output output/demo

Five to ten minutes on two CPU cores. Interrupted and started again, it goes on.
"""

import argparse
from pathlib import Path

from pcka_distill.demo import run_demo
from pcka_distill.tool import run_tool, tool_parser

if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="its folder")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides for all runs")
    run_tool(
        parser,
        lambda args: run_demo(args.output, args.opts),
        "interrupted; `make demo` goes on from the last checkpoint",
    )
