#!/usr/bin/env python
r"""Train or evaluate what a LazyConfig describes: a teacher, a plain or a distilled student.

    python tools/lazyconfig_train_net.py --config-file configs/lazy/Digits/retinanet_pcka.py \
        train.max_iter=600 train.output_dir=output/run

Takes the flags of Detectron2's own tools/lazyconfig_train_net.py; --help lists them. The config is
a program, and is run.
"""

from pcka_distill.engine import cli
from pcka_distill.lazy import main

if __name__ == "__main__":
    cli(main, __doc__)
