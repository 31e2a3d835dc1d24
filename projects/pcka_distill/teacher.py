"""A frozen teacher, and the proof that its weights are really in it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pcka_distill.cache import FeatureCache
from pcka_distill.checkpoint import StrictCheckpointer
from pcka_distill.errors import UserError, reason

__all__ = ["FrozenTeacher", "fingerprint", "fold_batch_norms", "load_teacher_weights"]

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")

_DIGEST = 16
_FOLDED = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)


class FrozenTeacher:
    """A trained detector that is only ever read: eval mode, no gradient.

    It is deliberately no ``nn.Module``: assigned to a model it stays out of that model's
    ``parameters()``, ``state_dict()``, ``train()`` and DDP buckets. The owner moves it between
    devices with :meth:`apply`.

    Args:
        model: a trained detector. It is put into eval mode and its parameters are frozen.
        input_format: channel order of the images that it was trained on, "BGR" or "RGB"; None
            when it is the student's.
        classes: names of its classes, in the order of its logits; None when they are the
            student's.
        precision: to run it in, under autocast; None is the student's.
        fold_norms: :func:`fold_batch_norms` in it.
        channels_last: lay its weights and maps out that way.
        compiled: run its backbone through ``torch.compile``.
        cache: where its feature maps are kept; None keeps none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_format: str | None = None,
        classes: Sequence[str] | None = None,
        precision: torch.dtype | None = None,
        fold_norms: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
        cache: FeatureCache | None = None,
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.input_format = input_format
        self.classes = classes
        self.cache = cache
        self._precision = precision
        self._compiled = compiled
        self._fingerprint = ""
        if fold_norms:
            # What is folded has the rounding of the device in it.
            self._fingerprint = fingerprint(model)
            if folded := fold_batch_norms(model):
                logger.info(f"The teacher's convolutions take over {folded} batch norms")
        if channels_last:
            # There may be others than images and weights of convolutions.
            self.apply(lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x)
        if compiled:
            backbone: Any = self.model.backbone
            backbone.compile()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def fingerprint(self) -> str:
        """That of the model, by :func:`fingerprint`, before its batch norms were folded."""
        return self._fingerprint or fingerprint(self.model)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What is run inside is run without gradient, in the teacher's precision.

        Not in inference mode: it is no faster (see benchmarks/performance.md), and a loss such
        as mimic could not save its tensors for the student's backward.

        Raises:
            UserError: its backbone cannot be compiled.
        """
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._precision is not None:
            lower = self._precision != torch.float32
            dtype = self._precision if lower else None
            autocast = torch.autocast(self.device.type, dtype=dtype, enabled=lower)
        try:
            with torch.no_grad(), autocast:
                yield
        except Exception as e:
            compiler = type(e).__module__.startswith(("torch._dynamo", "torch._inductor"))
            if not (self._compiled and compiler):
                raise
            raise UserError(
                f"the teacher cannot be compiled: {reason(e)}; set "
                "MODEL.DISTILL.TEACHER.COMPILE False"
            ) from e

    @staticmethod
    def flip_channels(inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Inputs with the channels of their ``image`` (C, H, W) in the other order, RGB or BGR."""
        return [{**x, "image": x["image"].flip(0)} for x in inputs]

    def apply(self, fn: Callable[[Any], Any]) -> None:
        """Apply a tensor function (``to``, ``cuda``, ``half``) as ``nn.Module`` would."""
        self.model._apply(fn)


def fold_batch_norms(model: nn.Module) -> int:
    """Make batch norms, which in eval mode scale and shift alone, part of the convolutions before.

    What the model computes stays the same, but for rounding, in fewer passes over its maps. It is
    one for good: it has no norms any more. Of convolutions only Detectron2's know theirs.

    Args:
        model: that is not trained any further. It is changed.

    Returns:
        how many.
    """
    folded = 0
    convs: list[Any] = [x for x in model.modules() if type(x) is Conv2d]
    for conv in convs:
        norm = conv.norm
        # Subclasses, and hooks, may do more than that; without running statistics it goes by those
        # of the batch in eval mode, too.
        known = type(norm) in _FOLDED and norm.running_mean is not None
        if not known or any(x._forward_hooks or x._forward_pre_hooks for x in (conv, norm)):
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        conv.norm = None
        folded += 1
    return folded


def fingerprint(model: Any) -> str:
    """A digest of what a model is made of: its class, its weights, its normalisation."""
    # In newer versions of Detectron2 the normalisation is no part of the state.
    names = ("pixel_mean", "pixel_std")
    tensors = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return digest_of({**model.state_dict(), **tensors}, type(model).__name__)


def digest_of(state: Mapping[str, Any], about: str = "") -> str:
    """A digest of named tensors, and of whatever else is said about them."""
    digest = hashlib.blake2b(about.encode(), digest_size=_DIGEST)
    for name, x in sorted(state.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_teacher_weights(
    model: nn.Module, path: str, *, allow_partial: bool = False, trusted: bool = False
) -> int:
    """Load a teacher's checkpoint and refuse anything less than all of it.

    A checkpoint that has *more* than the model is refused as well: the weights of an R101 fill an
    R50 without a missing key, and give garbage.

    Args:
        model: the teacher's architecture.
        path: a file or anything that Detectron2 can resolve (``detectron2://``, ``https://``).
        allow_partial: only warn.
        trusted: read a file that holds more than tensors, and can run any program.

    Returns:
        the number of tensors loaded.

    Raises:
        UserError: no path, no file, a file that cannot be read, or keys that do not match.
    """
    if not path:
        raise UserError(
            "the teacher has no weights; set MODEL.DISTILL.TEACHER.WEIGHTS to its checkpoint"
        )
    checkpointer = StrictCheckpointer(model, trusted=trusted)
    try:
        local = checkpointer.path_manager.get_local_path(path)
        if not os.path.isfile(local):
            raise FileNotFoundError(local)
        checkpointer.load(path)
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(
            f"teacher weights not found: {path}; set MODEL.DISTILL.TEACHER.WEIGHTS to a checkpoint"
        ) from e
    except Exception as e:
        # Whatever pickle, zipfile and torch raise on a damaged file: a dozen types.
        raise UserError(
            f"teacher weights cannot be read: {path} ({reason(e)}); if the file is damaged or is "
            "no checkpoint, set MODEL.DISTILL.TEACHER.WEIGHTS to another"
        ) from e

    for name, theirs in checkpointer.pixels.items():
        mine = getattr(model, name).flatten().tolist()
        if not all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in zip(mine, theirs)):
            raise UserError(
                f"teacher weights {path} were trained with {name} {theirs}, and its config has "
                f"{mine}; correct MODEL.{name.upper()} by MODEL.DISTILL.TEACHER.OPTS"
            )
    mismatch = checkpointer.mismatch
    if any(mismatch):
        message = f"teacher weights {path} do not fit its config: {mismatch}"
        if not allow_partial:
            raise UserError(
                f"{message}. Check MODEL.DISTILL.TEACHER.CONFIG_FILE and its number of classes, "
                "or set MODEL.DISTILL.TEACHER.ALLOW_PARTIAL True"
            )
        logger.warning(f"{message}. Going on, as MODEL.DISTILL.TEACHER.ALLOW_PARTIAL is set")
    return len(model.state_dict()) - len(mismatch.missing) - len(mismatch.shapes)
