"""The same updates in less memory: activations that are computed twice instead of kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pcka_distill.errors import UserError

__all__ = ["checkpoint_activations"]


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
