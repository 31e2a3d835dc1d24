"""The same updates in less memory: gradient accumulation and activation checkpointing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pcka_distill.errors import UserError

__all__ = ["AccumulatingAMPTrainer", "AccumulatingTrainer", "checkpoint_activations"]


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's trainer, with each batch taken in several parts.

    The update is that of the parts' gradients, averaged by their images, as if each were the share
    of a process. It is that of the whole batch where losses are means over images. It is not where
    they relate images to one another: batch norm, RCKA on box heads, and PCKA in every layout but
    ``per_image`` then relate those of a part. The running normaliser of RetinaNet and FCOS takes a
    step with every part.

    Attributes:
        parts: how many.
    """

    parts = 1

    def run_step(self) -> None:
        _accumulated_step(self, self.parts, contextlib.nullcontext())


class AccumulatingAMPTrainer(AMPTrainer):
    """:class:`AccumulatingTrainer` in mixed precision."""

    parts = 1

    def run_step(self) -> None:
        # Older Detectron2 knows one precision only.
        dtype = getattr(self, "precision", torch.float16)
        _accumulated_step(self, self.parts, torch.autocast("cuda", dtype=dtype))


def _accumulated_step(
    trainer: Any, parts: int, precision: contextlib.AbstractContextManager[Any]
) -> None:
    assert trainer.model.training, "the model was changed to eval mode"
    parallel = isinstance(trainer.model, nn.parallel.DistributedDataParallel)
    start = time.perf_counter()
    data = next(trainer._data_loader_iter)
    data_time = time.perf_counter() - start
    scaler = getattr(trainer, "grad_scaler", None)
    trainer.optimizer.zero_grad()
    totals: dict[str, Tensor] = {}
    size = -(-len(data) // parts)
    for first in range(0, len(data), size):
        part = data[first : first + size]
        # Processes exchange their gradients once, after the last part.
        quiet: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if parallel and first + size < len(data):
            quiet = trainer.model.no_sync()
        with quiet:
            with precision:
                share = len(part) / len(data)
                losses = {name: share * x for name, x in trainer.model(part).items()}
                total = sum(losses.values())
            (total if scaler is None else scaler.scale(total)).backward()
        for name, x in losses.items():
            totals[name] = totals[name] + x.detach() if name in totals else x.detach()
    if hasattr(trainer, "after_backward"):
        trainer.after_backward()
    trainer._write_metrics(totals, data_time)
    if scaler is None:
        trainer.optimizer.step()
    else:
        scaler.step(trainer.optimizer)
        scaler.update()


class _CheckpointedStage(nn.Sequential):
    """A stage whose activations are computed again in backward instead of being kept."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        output: Tensor = checkpoint(
            super().forward,
            x,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), self._statistics_kept()),
        )
        return output

    @contextlib.contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """Without this batch norms would count the second forward too."""
        kinds = nn.modules.batchnorm._BatchNorm
        norms: list[Any] = [x for x in self.modules() if isinstance(x, kinds)]
        norms = [x for x in norms if x.track_running_stats]
        before = [(x.momentum, x.num_batches_tracked.clone()) for x in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, (momentum, count) in zip(norms, before):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)


def checkpoint_activations(model: Any) -> int:
    """Keep no activations inside the stages of a detector's ResNet; backward computes them again.

    Losses, gradients and updates are those of the model without it. Frozen stages keep none
    anyway and are left alone.

    Returns:
        the number of stages.

    Raises:
        UserError: the backbone has no such stages.
    """
    backbone = getattr(model, "backbone", None)
    stages = getattr(getattr(backbone, "bottom_up", backbone), "stages", None)
    if not stages or not all(type(x) in (nn.Sequential, _CheckpointedStage) for x in stages):
        raise UserError(
            f"SOLVER.ACTIVATION_CHECKPOINT works on ResNets, and {type(backbone).__name__} has no "
            "stages of that kind; set it False, or use the backbone's own key for it"
        )
    trained = [x for x in stages if any(p.requires_grad for p in x.parameters())]
    for stage in trained:
        # A class, unlike a wrapper, leaves names, hooks, copies and pickles as they are.
        stage.__class__ = _CheckpointedStage
    return len(trained)
