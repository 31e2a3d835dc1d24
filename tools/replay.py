#!/usr/bin/env python
"""Compute a training step that was not finite once more, and say where it began.

    python tools/replay.py output/run/nonfinite_0001234_rank0.pth

The dump is a pickle: replay those of your own runs alone.
"""

import argparse
from pathlib import Path

import pcka_distill  # noqa: F401  (before Detectron2: it filters the warnings of others)
from pcka_distill.step import replay
from pcka_distill.tool import run_tool, tool_parser

_SHOWN = 10


def main(args: argparse.Namespace) -> None:
    """Print losses, modules and gradients."""
    found = replay(args.dump)
    for name, value in found["losses"].items():
        print(f"{name}: {value:g}")
    for what, key in (("output", "modules"), ("gradient", "gradients")):
        names = found[key]
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        print(f"{what} not finite: {', '.join(names[:_SHOWN]) or 'none'}{more}")


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("dump", type=Path, help="nonfinite_..._rank0.pth of a run")
    run_tool(parser, main)
