"""Loading that says what did not match, instead of only logging it."""

from __future__ import annotations

from typing import Any, NamedTuple

from detectron2.checkpoint import DetectionCheckpointer

__all__ = ["Mismatch", "StrictCheckpointer"]


class Mismatch(NamedTuple):
    """What of a checkpoint and a model did not find its counterpart."""

    #: (key, shape in the file, shape in the model)
    shapes: list[tuple[str, Any, Any]]
    #: of the model, not in the file
    missing: list[str]
    #: in the file, not of the model
    unexpected: list[str]

    def __str__(self) -> str:
        shapes = [f"{k} {tuple(a)} != {tuple(b)}" for k, a, b in self.shapes]
        kinds = {
            "of another shape than the model's": shapes,
            "missing in the file": self.missing,
            "unknown to the model": self.unexpected,
        }
        return "; ".join(f"{len(v)} {k}: {_shorten(v)}" for k, v in kinds.items() if v)


def _shorten(keys: list[str], limit: int = 8) -> str:
    more = f", and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


class StrictCheckpointer(DetectionCheckpointer):
    """Loads a model alone, also from the checkpoint of a distilled student.

    Attributes:
        mismatch: of the last load.
    """

    mismatch = Mismatch([], [], [])

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        def counts(key: str) -> bool:
            # BN counters come and go with the kind of BN and are unused in eval mode; pixel
            # statistics were part of checkpoints until 2020 and come from the config since; the
            # adapters of a distilled student are no part of it.
            return not (
                key.endswith("num_batches_tracked")
                or key in ("pixel_mean", "pixel_std")
                or key.startswith("distill.")
            )

        shapes = list(incompatible.incorrect_shapes)
        # A tensor of the wrong shape is not loaded, so it is listed as missing as well.
        wrong = {k for k, _, _ in shapes}
        self.mismatch = Mismatch(
            shapes,
            sorted(k for k in incompatible.missing_keys if counts(k) and k not in wrong),
            sorted(k for k in incompatible.unexpected_keys if counts(k)),
        )
