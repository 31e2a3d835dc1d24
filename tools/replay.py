#!/usr/bin/env python
"""Compute a training step that was not finite once more, and say where it began.

    python tools/replay.py output/run/nonfinite_0001234_rank0.pth

The dump is a pickle: replay those of your own runs alone.
"""

import argparse
import sys
from pathlib import Path

import pcka_distill  # noqa: F401  (before Detectron2: it filters the warnings of others)
from pcka_distill.errors import UserError
from pcka_distill.step import replay

_SHOWN = 10


def main() -> None:
    """Print losses, modules and gradients."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", type=Path)
    found = replay(parser.parse_args().dump)
    for name, value in found["losses"].items():
        print(f"{name}: {value:g}")
    for what, key in (("output", "modules"), ("gradient", "gradients")):
        names = found[key]
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        print(f"{what} not finite: {', '.join(names[:_SHOWN]) or 'none'}{more}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
