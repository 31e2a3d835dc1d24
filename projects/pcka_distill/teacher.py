"""A frozen teacher, and the proof that its weights are really in it."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from pcka_distill.errors import UserError, reason

__all__ = ["FrozenTeacher", "load_teacher_weights"]

logger = logging.getLogger(__name__)


class FrozenTeacher:
    """A trained detector that is only ever read: eval mode, no gradient.

    It is deliberately no ``nn.Module``: assigned to a model it stays out of that model's
    ``parameters()``, ``state_dict()``, ``train()`` and DDP buckets. The owner moves it between
    devices with :meth:`apply`.

    Args:
        model: a trained detector. It is put into eval mode and its parameters are frozen.
        input_format: channel order of the images that it was trained on, "BGR" or "RGB"; None
            when it is the student's.
    """

    def __init__(self, model: nn.Module, *, input_format: str | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.input_format = input_format

    def apply(self, fn: Callable[[Any], Any]) -> None:
        """Apply a tensor function (``to``, ``cuda``, ``half``) as ``nn.Module`` would."""
        self.model._apply(fn)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        # It never changes, so a copy of the model (an EMA, say) can share it.
        return self


class _StrictCheckpointer(DetectionCheckpointer):
    """Remembers what did not match; the stock one only logs it."""

    incompatible: Any = None

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        self.incompatible = incompatible


def _shorten(keys: list[str], limit: int = 8) -> str:
    more = f", and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def load_teacher_weights(model: nn.Module, path: str, *, allow_partial: bool = False) -> int:
    """Load a teacher's checkpoint and refuse anything less than all of it.

    A checkpoint that has *more* than the model is refused as well: the weights of an R101 fill an
    R50 without a missing key, and give garbage.

    Args:
        model: the teacher's architecture.
        path: a file or anything that Detectron2 can resolve (``detectron2://``, ``https://``).
        allow_partial: only warn.

    Returns:
        the number of tensors loaded.

    Raises:
        UserError: no path, no file, a file that cannot be read, or keys that do not match.
    """
    if not path:
        raise UserError(
            "the teacher has no weights; set MODEL.DISTILL.TEACHER.WEIGHTS to its checkpoint"
        )
    checkpointer = _StrictCheckpointer(model)
    try:
        local = checkpointer.path_manager.get_local_path(path)
        if not os.path.isfile(local):
            raise FileNotFoundError(local)
        checkpointer.load(path)
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(
            f"teacher weights not found: {path}; set MODEL.DISTILL.TEACHER.WEIGHTS to a checkpoint"
        ) from e
    except (
        RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError,
        AttributeError, ImportError, IndexError, OSError, zipfile.BadZipFile,
    ) as e:  # fmt: skip
        raise UserError(
            f"teacher weights cannot be read: {path} ({reason(e)}); if the file is damaged or is "
            "no checkpoint, set MODEL.DISTILL.TEACHER.WEIGHTS to another"
        ) from e

    result = checkpointer.incompatible
    # BN counters come and go with the kind of BN and are unused in eval mode; the adapters of a
    # student that was itself distilled are no part of it.
    counter = "num_batches_tracked"
    missing = [k for k in result.missing_keys if not k.endswith(counter)]
    unexpected = [
        k
        for k in result.unexpected_keys
        if not k.endswith(counter) and not k.startswith("distill.")
    ]
    problems = []
    if result.incorrect_shapes:
        shapes = [f"{k} {tuple(a)} != {tuple(b)}" for k, a, b in result.incorrect_shapes]
        problems.append(f"{len(shapes)} of another shape than the model's: {_shorten(shapes)}")
        # A tensor of the wrong shape is not loaded, so it is listed as missing as well.
        wrong = {k for k, _, _ in result.incorrect_shapes}
        missing = [k for k in missing if k not in wrong]
    if missing:
        problems.append(f"{len(missing)} missing in the file: {_shorten(sorted(missing))}")
    if unexpected:
        problems.append(f"{len(unexpected)} unknown to the model: {_shorten(sorted(unexpected))}")
    total = len(model.state_dict())
    loaded = total - len(missing) - len(result.incorrect_shapes)
    if problems:
        message = f"teacher weights {path} do not fit its config: " + "; ".join(problems)
        if not allow_partial:
            raise UserError(
                f"{message}. Check MODEL.DISTILL.TEACHER.CONFIG_FILE and its number of classes, "
                "or set MODEL.DISTILL.TEACHER.ALLOW_PARTIAL True"
            )
        logger.warning(f"{message}. Going on, as MODEL.DISTILL.TEACHER.ALLOW_PARTIAL is set")
    return loaded
