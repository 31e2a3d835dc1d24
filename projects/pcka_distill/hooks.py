"""What happens around a training step: time, progress, and all that a resumed run goes on with."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.evaluation.evaluator import inference_context
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pcka_distill.drawing import Image, Row, detection_grid, picture_of, truth_of
from pcka_distill.errors import UserError

__all__ = [
    "DetectionPictures",
    "ProgressBar",
    "RunState",
    "Stopwatch",
    "normalizers",
    "set_normalizers",
]

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")


def normalizers(model: nn.Module) -> dict[str, float]:
    """Module -> the running normaliser that RetinaNet and FCOS keep outside their state."""
    found = ((k, getattr(m, "loss_normalizer", None)) for k, m in model.named_modules())
    return {name: float(value) for name, value in found if isinstance(value, (int, float))}


def set_normalizers(model: nn.Module, values: Mapping[str, float]) -> None:
    """Put them back."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name, value in values.items():
        modules[name].loss_normalizer = value


class Stopwatch(HookBase):
    """Seconds spent in training steps, over all resumed parts of a run."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        self.seconds += time.perf_counter() - self._start

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds = state["seconds"]


class ProgressBar(HookBase):
    """A bar with ETA on a terminal; in a file or a pipe the log's own ETA is enough."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def before_train(self) -> None:
        if not sys.stderr.isatty():
            return
        loggers = [logging.getLogger(n) for n in ("detectron2", "fvcore")]
        self._redirect = logging_redirect_tqdm(loggers)
        self._redirect.__enter__()
        start, stop = self.trainer.start_iter, self.trainer.max_iter
        self._bar = tqdm(initial=start, total=stop, desc="train", unit="it", dynamic_ncols=True)

    def after_step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def after_train(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._redirect.__exit__(None, None, None)
            self._bar = None


class DetectionPictures(HookBase):
    """The first images of a test set, with the truth and what is detected, for TensorBoard.

    Those that cannot be read are left out, and named once: they are no reason to end a training.

    Args:
        period: in iterations.
        models: title -> a detector; each is in evaluation mode while it is asked.
        records: of Detectron2's catalogues, with ``annotations``.
        inputs: the same images as these models take them.
        names: of the classes.
        score: what is scored lower is not drawn.
    """

    def __init__(
        self,
        period: int,
        models: Mapping[str, nn.Module],
        records: Sequence[dict[str, Any]],
        inputs: Sequence[dict[str, Any]],
        names: Sequence[str],
        score: float = 0.4,
    ) -> None:
        self._period = period
        self._models = dict(models)
        self._records = records
        self._inputs = inputs
        self._names = names
        self._score = score
        self._unreadable: set[int] = set()

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if next_iter % self._period and next_iter != self.trainer.max_iter:
            return
        images = self._read()
        if not images:
            return
        rows = [Row("truth", None)]
        for title, model in self._models.items():
            with inference_context(model), torch.no_grad():
                found = [model([self._inputs[i]])[0]["instances"].to("cpu") for i in images]
            rows.append(Row(title, [x[x.scores >= self._score] for x in found]))
        truth = [truth_of(self._records[i]) for i in images]
        caption = f"scores above {self._score}: green boxes are right, red ones are wrong"
        figure = detection_grid(list(images.values()), truth, rows, self._names, caption)
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        self.trainer.storage.put_image("detections", pixels.transpose(2, 0, 1))

    def _read(self) -> dict[int, Image]:
        """Index -> picture (H, W, 3), of those that can be read."""
        images = {}
        for i, record in enumerate(self._records):
            try:
                images[i] = picture_of(record)
            except UserError as e:
                if i not in self._unreadable:
                    logger.warning(f"Not drawn: {e}")
                self._unreadable.add(i)
        return images


class RunState(HookBase):
    """What a checkpoint of Detectron2 lacks: random numbers, and the running normalisers.

    With it, and with the data where it was (:class:`.ResumableLoader`), a run that was stopped
    ends with the weights of one that was not, bit for bit. It also refuses to go on with another
    teacher.

    Args:
        model: the student; RetinaNet and FCOS keep a running normaliser outside their state.
        period: of checkpoints.
        teacher: fingerprint of the teacher, empty without one.
        data: what the order of images depends on, by name.
    """

    def __init__(
        self, model: nn.Module, period: int, teacher: str = "", data: Mapping[str, int] = {}
    ) -> None:
        self._model = model
        self._period = period
        self._teacher = teacher
        self._data = dict(data)
        self._saved_at = -1
        self._saved: dict[str, Any] = {}
        self._found: dict[str, Any] = {}

    def before_train(self) -> None:
        step = self.trainer._trainer
        start = self.trainer.start_iter
        if hasattr(step.data_loader, "first_batch"):
            step.data_loader.first_batch = start
        elif start:
            logger.warning("The data begin anew: their loader is no ResumableLoader")
        if start and not self._found:
            logger.warning(
                "The checkpoint holds no random numbers: the run goes on with others than it had"
            )
        # It draws a random number, so it comes before they are put where they were.
        step.begin()
        found, self._found = self._found, {}
        if not found:
            return
        world, rank = comm.get_world_size(), comm.get_rank()
        if len(found["processes"]) != world:
            logger.warning(
                f"The run was made by {len(found['processes'])} processes and goes on with "
                f"{world}: its random numbers are others from here on"
            )
        if rank < len(found["processes"]):
            self._restore(found["processes"][rank])

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        due = next_iter == self.trainer.max_iter or next_iter % self._period == 0
        if due and comm.get_world_size() > 1:
            # All processes are here at the same time; only the first writes the checkpoint.
            states = comm.gather(self._state())
            self._saved = {"teacher": self._teacher, "processes": states, **self._data}
            self._saved_at = self.trainer.iter

    def state_dict(self) -> dict[str, Any]:
        # Of a checkpoint between the periods, by a hook of one's own, all is known if we are alone.
        if comm.get_world_size() == 1:
            return {"teacher": self._teacher, "processes": [self._state()], **self._data}
        # Those of an earlier iteration would be wrong.
        return self._saved if self._saved_at == self.trainer.iter else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = state.get("teacher", "")
        if known and self._teacher and known != self._teacher:
            raise UserError(
                f"the run was taught by another teacher (fingerprint {known}) than that of "
                f"MODEL.DISTILL.TEACHER.WEIGHTS ({self._teacher}); bring the former back, or begin "
                "a new run in another OUTPUT_DIR"
            )
        self._found = state
        differ = [
            f"{key} {state[key]} (then), {value} (now)"
            for key, value in self._data.items()
            if state.get(key, value) != value
        ]
        if differ:
            logger.warning(
                f"The run goes on with other data than it had: {', '.join(differ)}; images come in "
                "another order from here on"
            )

    def _state(self) -> dict[str, Any]:
        """Of this process, in types that are read back without running anything."""
        numpy_state: Any = np.random.get_state()
        kind, keys, position, has_gauss, gauss = numpy_state
        version, integers, next_gauss = random.getstate()
        state = {
            "python": [version, list(integers), next_gauss],
            "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), position],
            "numpy_gauss": [has_gauss, float(gauss)],
            "torch": torch.get_rng_state(),
            "normalizers": normalizers(self._model),
        }
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        version, integers, next_gauss = state["python"]
        random.setstate((version, tuple(integers), next_gauss))
        kind, keys, position = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, *state["numpy_gauss"]))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        set_normalizers(self._model, state["normalizers"])
