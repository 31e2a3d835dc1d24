#!/usr/bin/env python
"""Train or evaluate a teacher, a plain student or a distilled student.

Takes the flags of Detectron2's own tools/train_net.py; --help lists them.
"""

from pcka_distill.engine import cli

if __name__ == "__main__":
    cli()
