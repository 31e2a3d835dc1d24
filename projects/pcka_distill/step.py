"""One training step: accumulation, mixed precision, and no silent NaN."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from pcka_distill.build import build_registered, get_distill_cfg
from pcka_distill.checkpoint import write_whole
from pcka_distill.errors import UserError, reason
from pcka_distill.hooks import normalizers, set_normalizers

__all__ = ["NonFiniteError", "TrainingStep", "replay"]

# So many steps in a row that a scaler leaves out are no search for a scale any more: from 65536 it
# is at 1 after 16.
_MOST_OVERFLOWS = 20
# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")


class NonFiniteError(UserError, FloatingPointError):
    """A loss or a gradient is not finite."""


class TrainingStep(SimpleTrainer):
    """Detectron2's step, bit for bit; in parts, in mixed precision, and looked after.

    With several parts the update is that of their gradients, averaged by their images, as if each
    were the share of a process. It is that of the whole batch where losses are means over images.
    It is not where they relate images to one another: batch norm, RCKA on box heads, and PCKA in
    every layout but ``per_image`` then relate those of a part. The running normaliser of RetinaNet
    and FCOS takes a step with every part.

    A step whose losses or gradients are not finite changes no weight. It ends the run with an
    error that names the loss, the iteration and the images, and leaves a dump of all that is
    needed to see it again (:func:`replay`); or so many of them are left out and counted.

    Args:
        model: in training mode afterwards.
        data_loader: an iterable of batches.
        optimizer: of the model's parameters.
        parts: in which each batch is taken.
        precision: of autocast, None for none.
        scaler: of the losses, for float16.
        skip_nonfinite: steps that may be left out in all of the run.
        monitor_period: every so many iterations, log what share each loss has in the gradient; 0
            for never.
        folder: for dumps.
        config: goes into a dump, so that it can be seen again without more.

    Attributes:
        skipped: steps left out until now.

    Raises:
        NonFiniteError: from :meth:`run_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        parts: int = 1,
        precision: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        skip_nonfinite: int = 0,
        monitor_period: int = 0,
        folder: str = "",
        config: str = "",
    ) -> None:
        # Some versions of Detectron2 begin with the data at once: not before it is known where.
        super().__init__(model, (), optimizer)
        self.data_loader = data_loader
        self.parts = parts
        self.precision = precision
        self.scaler = scaler
        if scaler is not None or skip_nonfinite:
            # torch takes a first step that is left out for a schedule in the wrong order.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler")
        self.skip_nonfinite = skip_nonfinite
        self.skipped = 0
        self._monitor_period = monitor_period
        self._folder = folder
        self._config = config
        self._batches: Iterator[list[dict[str, Any]]] | None = None
        self._parallel = isinstance(model, nn.parallel.DistributedDataParallel)
        self._device = next(model.parameters()).device
        self._overflows = 0
        self._mine = True
        none = nn.Module.get_extra_state
        kinds = [(m, type(m).get_extra_state is not none) for m in model.modules()]
        self._loose = [(m, extra) for m, extra in kinds if extra or hasattr(m, "_ema_update")]

    def begin(self) -> None:
        """Begin with the data."""
        self._batches = iter(self.data_loader)

    def run_step(self) -> None:
        assert self.model.training, "the model was changed to eval mode"
        if self._batches is None:
            self.begin()
            assert self._batches is not None
        start = time.perf_counter()
        data = next(self._batches)
        data_time = time.perf_counter() - start
        random_state = _random_state(self._device)
        buffers = [x.clone() for x in self.model.buffers()] if self.skip_nonfinite else []
        loose = self._loose_state()
        self.optimizer.zero_grad()
        alone = False
        try:
            losses = self._gradients(data)
            wrong = self._not_finite(losses)
        except FloatingPointError as e:
            # Detectron2's RPN looks for itself. Other processes do not know, and wait in backward.
            losses, wrong, alone, self._mine = {}, reason(e), self._parallel, True
        if wrong:
            with torch.no_grad():
                for x, before in zip(self.model.buffers(), buffers):
                    x.copy_(before)
            self._put_back(loose)
            self._leave_out(wrong, losses, data, random_state, alone=alone)
            return
        self._write_metrics(losses, data_time)
        if self.scaler is None:
            self.optimizer.step()
            return
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # It left the step out. At first that is how it finds its scale.
        self._overflows = self._overflows + 1 if self.scaler.get_scale() < scale else 0
        if self._overflows > _MOST_OVERFLOWS:
            self._put_back(loose)
            wrong = f"the scaled gradient has not been finite in {self._overflows} steps in a row"
            self._leave_out(wrong, losses, data, random_state, alone=False, last=True)

    def _gradients(self, data: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Backward of a batch: name -> loss."""
        totals: dict[str, Tensor] = {}
        size = -(-len(data) // self.parts)
        for first in range(0, len(data), size):
            part = data[first : first + size]
            last = first + size >= len(data)
            # Processes exchange their gradients once, after the last part.
            quiet = contextlib.nullcontext() if last or not self._parallel else self.model.no_sync()
            with quiet:
                with self._autocast():
                    losses = self.model(part)
                    if isinstance(losses, Tensor):
                        losses = {"total_loss": losses}
                    if len(part) < len(data):
                        share = len(part) / len(data)
                        losses = {name: share * x for name, x in losses.items()}
                    total = sum(losses.values())
                if last and self._monitor_period and not self.iter % self._monitor_period:
                    self._monitor(losses)
                (total if self.scaler is None else self.scaler.scale(total)).backward()
            for name, x in losses.items():
                totals[name] = totals[name] + x.detach() if name in totals else x.detach()
        return totals

    def _loose_state(self) -> list[tuple[nn.Module, Any, Any]]:
        """What a forward changes beside buffers: running normalisers, counts of draws."""
        return [
            (m, m.__dict__.get("loss_normalizer"), m.get_extra_state() if extra else None)
            for m, extra in self._loose
        ]

    @staticmethod
    def _put_back(state: list[tuple[nn.Module, Any, Any]]) -> None:
        for module, normalizer, extra in state:
            if extra is not None:
                module.set_extra_state(extra)
            if normalizer is not None:
                module.loss_normalizer = normalizer
            else:
                # Detectron2's dense detectors make theirs in the first forward.
                module.__dict__.pop("loss_normalizer", None)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self.precision)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _not_finite(self, losses: dict[str, Tensor]) -> str:
        """What of a step is not finite, in words; the same in all processes."""
        values = torch.stack([x.float() for x in losses.values()])
        checked = [values]
        if self.scaler is None:
            # A scaler has infinite gradients now and then, and leaves those steps out by itself.
            grads = [p.grad for p in self._parameters() if p.grad is not None]
            if grads:
                checked.append(torch.stack(torch._foreach_norm(grads)).float())
        finite = torch.cat(checked).isfinite().all().float()
        if self._parallel:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        # The one moment at which the step waits for the device; Detectron2 would a line later.
        if finite.item():
            return ""
        wrong = [f"{k} is {v:g}" for k, v in zip(losses, values.tolist()) if not _is_finite(v)]
        if not wrong and self.scaler is None:
            names = {id(p): name for name, p in self.model.named_parameters()}
            first = next(
                (
                    names.get(id(p), "a parameter")
                    for p in self._parameters()
                    if p.grad is not None and not p.grad.isfinite().all()
                ),
                "",
            )
            wrong = [f"the gradient of {first} is not finite"] if first else []
        text = ", ".join(wrong)
        self._mine = bool(text)
        if comm.get_world_size() > 1:
            said = {i: x for i, x in enumerate(comm.all_gather(text)) if x}
            text = "; ".join(f"in process {i} {x}" for i, x in said.items())
        return text

    def _leave_out(
        self,
        wrong: str,
        losses: dict[str, Tensor],
        data: list[dict[str, Any]],
        random_state: dict[str, Tensor],
        *,
        alone: bool,
        last: bool = False,
    ) -> None:
        # Detectron2 gives every record an id; those of one's own data may have none.
        names = [str(x.get("image_id", x.get("file_name", "?"))) for x in data]
        if comm.get_world_size() > 1 and not alone:
            names = [x for part in comm.all_gather(names) for x in part]
        what = f"{wrong} at iteration {self.iter} (images {', '.join(names)})"
        if self.skipped < self.skip_nonfinite and not (alone or last):
            self.skipped += 1
            get_event_storage().put_scalar("skipped_steps", self.skipped, smoothing_hint=False)
            logger.warning(
                f"Step left out: {what}. It is the {self.skipped}. of at most "
                f"{self.skip_nonfinite} (SOLVER.SKIP_NONFINITE)"
            )
            return
        kept = self._dump(losses, data, random_state) if self._mine else ""
        advice = "; lower SOLVER.BASE_LR or the loss's WEIGHT"
        if not (alone or last):
            advice += ", or set SOLVER.SKIP_NONFINITE to leave such steps out"
        skipped = f" after {self.skipped} steps that were left out" if self.skipped else ""
        raise NonFiniteError(f"not finite: {what}{skipped}{advice}{kept}")

    def _dump(
        self,
        losses: dict[str, Tensor],
        data: list[dict[str, Any]],
        random_state: dict[str, Tensor],
    ) -> str:
        """Write all that this process computed from; where, in words."""
        if not self._folder:
            return ""
        model = self.model.module if self._parallel else self.model
        path = Path(self._folder) / f"nonfinite_{self.iter:07d}_rank{comm.get_rank()}.pth"
        content = {
            "config": self._config,
            "iteration": self.iter,
            "precision": self.precision,
            "parts": self.parts,
            "model": model.state_dict(),
            "inputs": data,
            "random": random_state,
            "normalizers": normalizers(model),
            "losses": {k: v.item() for k, v in losses.items()},
        }
        try:
            write_whole(path, lambda f: torch.save(content, f))
        except OSError as e:
            # The error that is on its way matters more.
            return f" (its dump could not be written: {e})"
        return f". What it was computed from is in {path}: python tools/replay.py {path}"

    def _monitor(self, losses: dict[str, Tensor]) -> None:
        """Log the norm of each loss's gradient, and its share in the sum of all norms.

        Of a batch in parts they are those of the last part.
        """
        parameters = [p for p in self._parameters() if p.requires_grad]
        norms = {}
        for name, loss in losses.items():
            if not loss.requires_grad:
                continue
            # Not backward: nothing is added to a gradient, and no process waits for another.
            scale = 1.0 if self.scaler is None else self.scaler.get_scale()
            grads = torch.autograd.grad(
                scale * loss, parameters, retain_graph=True, allow_unused=True
            )
            found = [g for g in grads if g is not None]
            norm = torch.stack(torch._foreach_norm(found)).float().norm() if found else None
            norms[name] = norm if norm is None else norm / scale
        known = {k: v for k, v in norms.items() if v is not None}
        values = torch.stack(list(known.values()))
        shares = (values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)).tolist()
        storage = get_event_storage()
        # Detectron2 prints all that has "loss" in its name, every 20 iterations.
        names = [name.removeprefix("loss_") for name in known]
        for name, norm, share in zip(names, values.tolist(), shares):
            storage.put_scalar(f"grad_norm/{name}", norm, smoothing_hint=False)
            storage.put_scalar(f"grad_share/{name}", share, smoothing_hint=False)
        if comm.is_main_process():
            said = ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares))
            logger.info(f"Shares in the gradient at iteration {self.iter}: {said}")

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict()
        state["skipped"] = self.skipped
        if self.scaler is not None:
            # Detectron2's name for it: its checkpoints go on here, and ours there.
            state["grad_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.skipped = state.get("skipped", 0)
        if self.scaler is not None and "grad_scaler" in state:
            self.scaler.load_state_dict(state["grad_scaler"])


def _is_finite(x: float) -> bool:
    return abs(x) < float("inf")


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that a model draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def replay(path: Path) -> dict[str, Any]:
    """Compute a step that was not finite once more, from its dump, and look where it began.

    The dump is a pickle of your own run: do not replay one that you were sent.

    Returns:
        ``losses``: name -> value, as they were; ``modules``: those whose output is not finite, in
        the order of computation; ``gradients``: parameters whose gradient is not finite.

    Raises:
        UserError: no dump, or a model that cannot be built here.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
        config, inputs = content["config"], content["inputs"]
    except Exception as e:
        # Of a file that is anything else.
        what = f"it has no {e}" if isinstance(e, KeyError) else reason(e)
        raise UserError(
            f"{path} is no dump of a step, as nonfinite_..._rank0.pth in OUTPUT_DIR is: {what}"
        ) from e
    cfg = get_distill_cfg()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(config))
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    model = build_registered(cfg, "the model")
    model.load_state_dict(content["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = TrainingStep(
        model, [], optimizer, parts=content["parts"], precision=content["precision"]
    )
    modules: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not all(x.isfinite().all() for x in _tensors(output)) and name not in modules:
                modules.append(name)

        return look

    watched = dict(model.named_modules())
    teacher = getattr(model, "teacher", None)
    if teacher is not None:
        watched |= {f"teacher.{k}": m for k, m in teacher.model.named_modules()}
    for name, module in watched.items():
        if not any(module.children()):
            module.register_forward_hook(watch(name))
    set_normalizers(model, content["normalizers"])
    torch.set_rng_state(content["random"]["cpu"])
    if "cuda" in content["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(content["random"]["cuda"])
    with EventStorage(content["iteration"]):
        try:
            losses = step._gradients(inputs)
        except FloatingPointError:
            losses = {}
    return {
        "losses": {k: v.item() for k, v in losses.items()},
        "modules": modules,
        "gradients": [
            k for k, p in model.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ],
    }  # fmt: skip


def _tensors(x: Any) -> Iterator[Tensor]:
    """All in a nest of them."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        yield from (t for v in x.values() for t in _tensors(v))
    elif isinstance(x, (list, tuple)):
        yield from (t for v in x for t in _tensors(v))
