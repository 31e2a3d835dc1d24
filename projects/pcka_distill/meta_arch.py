"""The meta-architecture: an ordinary student that is taught while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from pcka_distill.adapters import find_adapter, prepare_alike
from pcka_distill.build import (
    build_losses,
    build_student,
    build_teacher,
    class_names,
    own_random_stream,
    student_config,
)
from pcka_distill.checkpoint import hide_prefix
from pcka_distill.errors import UserError
from pcka_distill.fcos import widen_head
from pcka_distill.functional import linear_cka, pool_places, without_padding
from pcka_distill.losses import DistillLoss
from pcka_distill.pairing import LevelPair, align, describe, pair_levels
from pcka_distill.recorder import Recorder
from pcka_distill.structures import Taps
from pcka_distill.teacher import FrozenTeacher

__all__ = ["DistillationModel"]

# Of Detectron2's writers.
_CKA_PERIOD = 20
# Places of an image, each way, and how few of them say nothing.
_CKA_GRID = 4
_LEAST_SAMPLES = 8

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")


@META_ARCH_REGISTRY.register()
class DistillationModel(nn.Module):
    """A student detector, a frozen teacher, and what the one is to learn from the other.

    In training it returns the student's own losses and, beside them, those of distillation. In
    inference it is the student, nothing else. Its ``state_dict()`` is the student's, so that
    stock Detectron2 loads its checkpoints with the student's own config; the few parameters of
    1x1 adapters sit beside them under ``distill.``.

    Args:
        student: a detector of a supported family (see :mod:`pcka_distill.adapters`).
        teacher: None is allowed when there are no losses.
        losses: no two of one name. May be empty; the model then trains as the student alone does,
            bit for bit.
        input_format: channel order of the student's images, "BGR" or "RGB"; None when it is the
            teacher's.
        classes: names of the student's classes, in the order of its logits; None when they are
            the teacher's. Where the two differ, logits are compared in the classes of the same
            name.
        smallest_batch: (B, height, width) of the smallest padded batch to be expected, in
            pixels; None skips the check that the losses' settings suit it.

    Raises:
        UserError: levels that cannot be paired, logits that cannot be compared, settings that
            leave nothing to compare.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher | None,
        losses: Iterable[DistillLoss],
        input_format: str | None = None,
        classes: Sequence[str] | None = None,
        smallest_batch: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        # Of one that was not built from a yaml.
        widen_head(student)
        self.distill = nn.ModuleDict()
        for loss in losses:
            if loss.name in self.distill:
                raise UserError(f"two distillation losses are called {loss.name!r}")
            self.distill[loss.name] = loss
        self.teacher = teacher
        self.pairs: dict[str, LevelPair] = {}
        self._classes: tuple[list[int], list[int]] | None = None
        hide_prefix(self, "student.", besides="distill.")
        if not self.distill:
            return
        if teacher is None:
            raise UserError("distillation losses need a teacher")
        formats = {x for x in (input_format, teacher.input_format) if x}
        if len(formats) > 1 and formats != {"BGR", "RGB"}:
            raise UserError(f"student and teacher read different image formats: {sorted(formats)}")
        self._flip_channels = len(formats) > 1
        self._reads = frozenset(part for loss in self.losses for part in loss.reads)
        if "labels" in self._reads:
            self._reads |= {"logits"}
        self._student_adapter = find_adapter(student)
        self._teacher_adapter = find_adapter(teacher.model)
        for loss in self.losses:
            unread = ", ".join(sorted(loss.reads - self._student_adapter.provides))
            if unread:
                hint = " or set its FOREGROUND_ONLY False" if "labels" in unread else ""
                raise UserError(
                    f"{type(loss).__name__} reads {unread}, and {type(student).__name__} has none "
                    f"to read; take it out of MODEL.DISTILL.LOSSES{hint}"
                )
        if "features" in self._reads:
            self._pair(teacher.model, smallest_batch)
        if "logits" in self._reads:
            self._pair_logits(teacher, classes, smallest_batch[0] if smallest_batch else None)
        self._alike = not self._flip_channels and prepare_alike(student, teacher.model)
        self._recorder = Recorder(self._student_adapter.hook_points(student, self._reads))
        self.distill.to(next(student.parameters()).device)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        # The student first: it must find the random generators as it would without us.
        student = build_student(cfg)
        losses = build_losses(cfg)
        # Only for logits: to know the classes of a COCO json, all of it is read.
        reads_logits = any("logits" in loss.reads for loss in losses)
        key = find_adapter(student).class_key if reads_logits else ""
        teacher = build_teacher(cfg, class_key=key) if losses else None
        return {
            "student": student,
            "teacher": teacher,
            "losses": losses,
            "input_format": cfg.INPUT.FORMAT,
            "classes": class_names(cfg.DATASETS.TRAIN, key) if key else None,
            "smallest_batch": _smallest_batch(cfg, student),
        }

    def _pair(self, teacher: nn.Module, smallest_batch: tuple[int, int, int] | None) -> None:
        """Pair the levels that the losses read and let the losses build on them."""
        mine = self._student_adapter.feature_shapes(self.student)
        theirs = self._teacher_adapter.feature_shapes(teacher)
        notes: list[str] = []
        for loss in self.losses:
            if "features" not in loss.reads:
                continue
            pairs = pair_levels(mine, theirs, loss.levels)
            with own_random_stream():
                between = loss.attach(pairs)
            notes += [f"  {loss.name} on {level}: {note}" for level, note in between.items()]
            self.pairs.update(pairs)
            if smallest_batch is not None:
                batch, height, width = smallest_batch
                shapes = {
                    level: (
                        batch,
                        pair.teacher_channels,
                        -(-height // pair.student_stride),
                        -(-width // pair.student_stride),
                    )
                    for level, pair in pairs.items()
                }
                for level, note in loss.check_maps(shapes).items():
                    notes.append(f"  {loss.name} on {level}: {note}")
        alone = [level for level in mine if level not in self.pairs]
        if alone:
            notes.insert(0, f"  {', '.join(alone)}: not used")
        logger.info("\n".join(["Distillation, student <- teacher:", describe(self.pairs), *notes]))

    def _pair_logits(
        self, frozen: FrozenTeacher, classes: Sequence[str] | None, images: int | None
    ) -> None:
        """Pair the classes of the two heads, and refuse logits that cannot be compared."""
        teacher = frozen.model
        names = [type(x).__name__ for x in (self.student, teacher)]
        losses = [x for x in self.losses if "logits" in x.reads]
        readers = ", ".join(type(x).__name__ for x in losses)
        if type(self._student_adapter) is not type(self._teacher_adapter):
            raise UserError(
                f"{readers} compares logits, and those of {names[0]} (student) and {names[1]} "
                "(teacher) have nothing in common; take it out of MODEL.DISTILL.LOSSES"
            )
        try:
            mine = self._student_adapter.logit_signature(self.student)
            theirs = self._teacher_adapter.logit_signature(teacher)
        except UserError as e:
            raise UserError(f"{e}; take {readers} out of MODEL.DISTILL.LOSSES") from e
        if mine != theirs:
            differ = ", ".join(
                f"{key} {mine[key]} (student) != {theirs[key]} (teacher)"
                for key in mine
                if mine[key] != theirs[key]
            )
            raise UserError(
                f"{readers} compares logits row by row, but {differ}; make the two heads equal "
                "or take it out of MODEL.DISTILL.LOSSES"
            )
        counts = [
            adapter.num_classes(model)
            for adapter, model in (
                (self._student_adapter, self.student),
                (self._teacher_adapter, teacher),
            )
        ]
        self._classes = _pair_classes(classes, frozen.classes, counts, readers)
        shared = len(self._classes[0]) if self._classes else counts[0]
        groups = self._student_adapter.logit_groups(self.student)
        sigmoid = self._student_adapter.is_sigmoid(self.student)
        for loss in losses:
            if shared is not None:
                blank = torch.zeros(1, shared + 1)
                columns = self._student_adapter.select_classes(
                    self.student, blank, list(range(shared))
                )
                loss.check_logits(
                    columns.shape[1],
                    sigmoid=sigmoid,
                    background=self._student_adapter.background,
                    images=images,
                )
            unknown = ", ".join(x for x in loss.levels if x not in groups)
            if unknown:
                raise UserError(
                    f"{type(loss).__name__}: unknown level {unknown}, the student's head has "
                    f"{', '.join(groups)}; change LEVELS"
                )

    @property
    def losses(self) -> list[DistillLoss]:
        """The distillation losses, in the order in which they are computed."""
        return cast("list[DistillLoss]", list(self.distill.values()))

    def __getattr__(self, name: str) -> Any:
        # What is not its own is the student's: Detectron2's checkpointer, hooks and users look
        # for model.backbone, model.roi_heads, model.device.
        try:
            return super().__getattr__(name)
        except AttributeError:
            student = self.__dict__.get("_modules", {}).get("student")
            if student is None:
                raise
            return getattr(student, name)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> DistillationModel:
        # The teacher is no submodule, so that it is in nobody's state_dict; it has to follow the
        # student between devices all the same.
        super()._apply(fn)
        if self.teacher is not None:
            self.teacher.apply(fn)
        return self

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Detectron2's contract.

        Args:
            batched_inputs: as for any Detectron2 model.

        Returns:
            in training a dict of scalar losses; in inference what the student returns.
        """
        if not self.training or not self.distill:
            return self.student(batched_inputs)
        frozen = self.teacher
        assert frozen is not None  # with losses the constructor asks for one
        maps: dict[str, Tensor] = {}

        def look_first(args: tuple[Any, ...]) -> None:
            # Before the student fills the memory with its activations: what the teacher needs for
            # a while can be used again then.
            maps.update(self._teacher_maps(frozen, batched_inputs, Taps(images=args[0])))

        with self._recorder.recording({"backbone": look_first}) as record:
            losses = dict(self.student(batched_inputs))
            student = self._student_adapter.collect(
                self.student, record, self._reads, batched_inputs
            )
        if not maps:
            # An adapter of one's own may know of no backbone.
            maps = self._teacher_maps(frozen, batched_inputs, student)
        teacher = self._teach(frozen, maps, student)
        if self._classes is not None:
            for taps, adapter, model, indices in (
                (student, self._student_adapter, self.student, self._classes[0]),
                (teacher, self._teacher_adapter, frozen.model, self._classes[1]),
            ):
                taps.logits = {
                    k: adapter.select_classes(model, x, indices) for k, x in taps.logits.items()
                }
            count = self._student_adapter.num_classes(self.student)
            assert count is not None  # with classes to pair it is known
            student.labels = {
                k: _select_labels(x, self._classes[0], count) for k, x in student.labels.items()
            }
        iteration = get_event_storage().iter
        if (iteration + 1) % _CKA_PERIOD == 0:
            self._log_cka(student, teacher)
        for loss in self.losses:
            factor = loss.schedule(iteration)
            for name, value in loss(student, teacher).items():
                if name in losses:
                    raise RuntimeError(f"two losses are called {name!r}")
                losses[name] = value if factor == 1.0 else factor * value
        return losses

    @torch.no_grad()
    def _log_cka(self, student: Taps, teacher: Taps) -> None:
        """How alike the two are by now, whatever the losses make of it."""
        for level in self.pairs if "features" in self._reads else ():
            maps = [z.features[level] for z in (student, teacher)]
            if extents := student.extents(*maps[0].shape[-2:]):
                maps = [without_padding(z, extents, "batch") for z in maps]
            grid = min(_CKA_GRID, *maps[0].shape[-2:])
            if len(maps[0]) * grid**2 < _LEAST_SAMPLES:
                continue
            x, y = (pool_places(z, grid) for z in maps)
            cka = linear_cka(x, y, debiased=True)
            get_event_storage().put_scalar(f"cka/{level}", cka, smoothing_hint=False)

    @torch.no_grad()
    def feature_maps(
        self, batched_inputs: list[dict[str, Any]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the two backbones make of the same images, for measuring; losses see the same.

        Args:
            batched_inputs: as for any Detectron2 model.

        Returns:
            the student's level -> (B, C, H, W), and the teacher's level -> (B, C', H', W'), which
            covers as much of the images. Nothing is resized.
        """
        assert self.teacher is not None
        model: Any = self.student
        images = self._student_adapter.preprocess(model, batched_inputs)
        # A classifier's logits are beside its maps.
        mine = self._student_adapter.feature_shapes(self.student)
        maps = {k: x for k, x in model.backbone(images).items() if k in mine}
        student = Taps(images=images, features=maps)
        teacher = self._teacher_maps(self.teacher, batched_inputs, student)
        cut = {}
        for level, shape in self._teacher_adapter.feature_shapes(self.teacher.model).items():
            if level in teacher:
                rows, cols = (-(-side // shape.stride) for side in student.padded_size)
                cut[level] = teacher[level][..., :rows, :cols]
        return student.features, cut

    def _teacher_maps(
        self, frozen: FrozenTeacher, batched_inputs: list[dict[str, Any]], student: Taps
    ) -> dict[str, Tensor]:
        """The teacher's feature maps; of the student's taps only the images need be there."""
        adapter, model = self._teacher_adapter, frozen.model
        if self._flip_channels:
            batched_inputs = frozen.flip_channels(batched_inputs)

        def compute() -> dict[str, Tensor]:
            maps = adapter.teacher_features(model, batched_inputs, student, alike=self._alike)
            # What is made with channels last is read in rows, by each of the losses.
            return {level: x.contiguous() for level, x in maps.items()}

        with frozen.running():
            if frozen.cache is None:
                return compute()
            # A head may read any of them.
            levels = adapter.cached_maps(model)
            if "logits" not in self._reads:
                levels = list({pair.teacher: None for pair in self.pairs.values()})
            images = [x["image"] for x in batched_inputs]
            size = student.padded_size
            maps = frozen.cache.fetch(images, levels, size, frozen.device, compute)
        rate = frozen.cache.hits / (frozen.cache.hits + frozen.cache.misses)
        get_event_storage().put_scalar("teacher_cache_hits", rate, smoothing_hint=False)
        return maps

    def _teach(self, frozen: FrozenTeacher, maps: dict[str, Tensor], student: Taps) -> Taps:
        """What the losses read of the teacher, in the student's terms."""
        teacher = Taps(features=maps, regions=student.regions)
        with frozen.running():
            if "logits" in self._reads:
                teacher.logits = self._teacher_adapter.teacher_logits(frozen.model, maps, student)
            if self.pairs:
                teacher.features = align(maps, student.features, self.pairs, student.padded_size)
        return teacher


def _pair_classes(
    mine: Sequence[str] | None,
    theirs: Sequence[str] | None,
    counts: Sequence[int | None],
    readers: str,
) -> tuple[list[int], list[int]] | None:
    """Indices of the classes of the same name, student's and teacher's; None if all are equal.

    Args:
        mine, theirs: class names; None if they are not known.
        counts: classes of the student's and of the teacher's head.
        readers: the losses that want them, for the message.
    """
    for side, names, count in zip(("student", "teacher"), (mine, theirs), counts):
        if names is not None and count is not None and len(names) != count:
            raise UserError(
                f"{readers} compares logits by class: the {side}'s dataset names {len(names)} "
                f"classes, and its head has {count}; correct DATASETS.TRAIN or the number of "
                "classes in its config"
            )
    if mine is None or theirs is None:
        if counts[0] == counts[1]:
            return None
        raise UserError(
            f"{readers} compares logits, the student has {counts[0]} classes, the teacher "
            f"{counts[1]}, and their names are not known; register both datasets with "
            "their class names, or take the loss out of MODEL.DISTILL.LOSSES"
        )
    if list(mine) == list(theirs):
        return None
    # Of a name that is there twice the first is meant.
    where = {name: i for i, name in reversed(list(enumerate(theirs)))}
    pairs = [(i, where[name]) for i, name in enumerate(mine) if name in where]
    if not pairs:
        raise UserError(
            f"{readers} compares logits, and student and teacher have no class of the same name: "
            f"{', '.join(mine[:5])}, ... and {', '.join(theirs[:5])}, ...; take it out of "
            "MODEL.DISTILL.LOSSES"
        )
    shared = ", ".join(mine[i] for i, _ in pairs)
    logger.info(
        f"Logits are compared in {len(pairs)} classes that both know, of {len(mine)} (student) "
        f"and {len(theirs)} (teacher): {shared}"
    )
    return [i for i, _ in pairs], [i for _, i in pairs]


def _select_labels(labels: Tensor, classes: list[int], count: int) -> Tensor:
    """Labels of some of so many classes: the others become -1, "ignored"."""
    # The last is for -1 itself.
    table = labels.new_full((count + 2,), -1)
    table[classes] = torch.arange(len(classes), device=labels.device)
    table[count] = len(classes)
    return table[labels]


def _smallest_batch(cfg: CfgNode, student: Any) -> tuple[int, int, int] | None:
    """(B, height, width) of the smallest batch that a config can give a forward, in pixels.

    None where the config does not say: images that are not resized to a known short side.
    """
    shortest = min(cfg.INPUT.MIN_SIZE_TRAIN, default=0)
    kind = student_config(cfg).MODEL.META_ARCHITECTURE
    if kind == "ImageClassifier":
        shortest = cfg.MODEL.CLASSIFIER.IMAGE_SIZE
    elif kind == "SemanticSegmentor" and cfg.INPUT.CROP.ENABLED:
        # They are cropped after they were resized.
        crop = cfg.INPUT.CROP
        shortest = min(shortest, *crop.SIZE) if crop.TYPE == "absolute" else 0
    if not shortest:
        return None
    backbone = getattr(student, "backbone", None)
    divisor = max(getattr(backbone, "size_divisibility", 0), 1)
    side = -(-shortest // divisor) * divisor
    forwards = comm.get_world_size() * cfg.SOLVER.ACCUMULATION_STEPS
    return max(1, cfg.SOLVER.IMS_PER_BATCH // forwards), side, side
