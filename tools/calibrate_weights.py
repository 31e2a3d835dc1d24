#!/usr/bin/env python
"""Propose weights with which each distillation loss begins at a chosen share of the gradient.

    python tools/calibrate_weights.py --config-file configs/Digits/retinanet_pcka.yaml --share 0.3

It trains for some iterations with the weights that the config has, measures the norm of each loss's
gradient, and prints the weights. Nothing of the run is kept. The overrides are those of
tools/train_net.py.
"""

import argparse
import tempfile
from typing import Any

import pcka_distill  # noqa: F401  (before Detectron2: it filters the warnings of others)

# isort: split
from detectron2.engine import HookBase

from pcka_distill.bench import spread
from pcka_distill.engine import Trainer, setup
from pcka_distill.errors import UserError
from pcka_distill.losses import DistillLoss
from pcka_distill.meta_arch import DistillationModel
from pcka_distill.tool import run_tool, tool_parser

_PREFIX = "grad_norm/"


def _is_of(term: str, loss: str) -> bool:
    return term == loss or term.startswith(f"{loss}_")


class _Norms(HookBase):
    """Gradient norms: loss -> one a measurement."""

    def __init__(self, period: int, losses: list[DistillLoss]) -> None:
        self.found: dict[str, list[float]] = {}
        self._losses = losses
        self._period = period

    def after_step(self) -> None:
        if self.trainer.iter % self._period:
            return
        # As at full weight, whatever the schedule has made of it.
        factors = {loss.name: loss.schedule(self.trainer.iter) for loss in self._losses}
        for key, (value, _) in self.trainer.storage.latest().items():
            if key.startswith(_PREFIX):
                name = key.removeprefix(_PREFIX)
                factor = next((v for k, v in factors.items() if _is_of(name, k)), 1.0)
                if factor:
                    self.found.setdefault(name, []).append(value / factor)


def check_share(share: float, losses: int) -> None:
    """Refuse a share of each of so many losses that cannot be had."""
    if not 0 < share * losses < 1:
        raise UserError(
            f"--share {share} of each of {losses} losses leaves nothing to the detector's own; "
            f"make it positive and less than {1 / losses:.2f}"
        )


def propose(
    norms: dict[str, float], terms: dict[str, list[str]], weights: dict[str, float], share: float
) -> dict[str, float]:
    """Weights with which each loss has a share of the sum of all norms.

    Args:
        norms: term, without "loss_" -> norm of its gradient with the present weights.
        terms: loss -> its terms; those of no loss are the detector's own.
        weights: loss -> present weight.
        share: of each loss, in (0, 1 / number of losses).

    Raises:
        UserError: a share that cannot be had, or a loss without a gradient.
    """
    check_share(share, len(terms))
    taught = {name for names in terms.values() for name in names}
    own = sum(norm for name, norm in norms.items() if name not in taught)
    whole = own / (1 - share * len(terms))
    found = {}
    for loss, names in terms.items():
        norm = sum(norms.get(name, 0.0) for name in names)
        if not norm:
            raise UserError(f"the loss {loss} has no gradient: take it out, or change its settings")
        found[loss] = weights[loss] * share * whole / norm
    return found


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    if args.iterations < 1 or args.period < 1:
        raise UserError("--iterations and --period must be positive")
    with tempfile.TemporaryDirectory() as folder:
        args.opts += ["SOLVER.GRADIENT_MONITOR_PERIOD", args.period, "OUTPUT_DIR", folder]
        args.opts += ["SOLVER.CHECKPOINT_PERIOD", 10**9, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", []]
        args.opts += ["MODEL.DISTILL.TEACHER.MIN_AP", 0]
        args.resume = args.eval_only = False
        trainer = Trainer(setup(args))
        model: Any = trainer.model
        if not isinstance(model, DistillationModel) or not model.losses:
            raise UserError("the config distils nothing: there are no weights to propose")
        check_share(args.share, len(model.losses))
        trainer.resume_or_load(resume=False)
        # The schedule stays that of the whole run.
        trainer.max_iter = min(args.iterations, trainer.max_iter)
        norms = _Norms(args.period, model.losses)
        trainer.register_hooks([norms])
        trainer.train()
    means = {name: sum(values) / len(values) for name, values in norms.found.items()}
    weights = {loss.name: loss.weight for loss in model.losses}
    terms = {name: [x for x in means if _is_of(x, name)] for name in weights}
    proposed = propose(means, terms, weights, args.share)
    print(f"\nNorm of each gradient, over {len(next(iter(norms.found.values())))} measurements:")
    for name, values in norms.found.items():
        print(f"  {name}: {spread(values) if max(values) >= 1 else f'{means[name]:.3g}'}")
    print(f"\nFor a share of {args.share:g} each:")
    for name, weight in proposed.items():
        print(f"  MODEL.DISTILL.{name.upper()}.WEIGHT {weight:.3g}")


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("--config-file", required=True, help="of the distillation")
    parser.add_argument("--share", type=float, default=0.3, help="of each loss; default 0.3")
    parser.add_argument("--iterations", type=int, default=200, help="of the training; default 200")
    parser.add_argument(
        "--period", type=int, default=10, help="of measurements, in iterations; default 10"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    run_tool(parser, main, "interrupted; nothing was kept")
