#!/usr/bin/env python
"""Train or evaluate a teacher, a plain student or a distilled student.

Takes the flags of Detectron2's own tools/train_net.py.
"""

import sys

from detectron2.engine import default_argument_parser, launch

from pcka_distill.engine import main
from pcka_distill.errors import UserError

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command with --resume goes on from the last checkpoint")
