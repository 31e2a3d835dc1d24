#!/usr/bin/env python
"""The demo: a teacher, a student alone, and the same student taught, on the digits set.

Five to ten minutes on two CPU cores. Interrupted and started again, it goes on.
"""

import argparse
import sys
from pathlib import Path

from pcka_distill.demo import run_demo
from pcka_distill.errors import UserError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="its folder")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides for all runs")
    args = parser.parse_args()
    try:
        run_demo(args.output, args.opts)
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; `make demo` goes on from the last checkpoint")
