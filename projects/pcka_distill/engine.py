"""Training and evaluation: Detectron2's own trainer, with clear answers before it starts."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import errno
import functools
import importlib.util
import json
import logging
import math
import os
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList, MapDataset
from detectron2.data.samplers import InferenceSampler
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    launch,
)
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.evaluation import (
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.projects.deeplab import add_deeplab_config, build_lr_scheduler
from detectron2.solver import build_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import distributed, nn
from torch.multiprocessing.spawn import ProcessRaisedException

from pcka_distill.adapters import find_adapter
from pcka_distill.build import (
    build_registered,
    build_student,
    config_keys,
    get_config_file,
    get_distill_cfg,
    merge_config,
    student_config,
)
from pcka_distill.checkpoint import (
    SafeCheckpointer,
    StrictCheckpointer,
    remove_partial,
    write_whole,
)
from pcka_distill.config import add_pcka_distill_config
from pcka_distill.data.check import check_annotations, check_records
from pcka_distill.data.classification import ClassificationEvaluator, ClassificationMapper
from pcka_distill.data.loader import ResumableLoader, build_train_loader, own_random_numbers
from pcka_distill.data.sem_seg import check_labels, read_labels, sem_seg_mapper
from pcka_distill.errors import UserError, reason
from pcka_distill.hooks import DetectionPictures, ProgressBar, RunState, Stopwatch
from pcka_distill.memory import checkpoint_activations
from pcka_distill.meta_arch import DistillationModel
from pcka_distill.preflight import check_teacher
from pcka_distill.step import NonFiniteError, TrainingStep
from pcka_distill.teacher import fingerprint

__all__ = ["Trainer", "cli", "load_student", "main", "setup", "stock_config"]

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")


def _resume_or_load(checkpointer: DetectionCheckpointer, path: str, resume: bool) -> None:
    """Detectron2's ``resume_or_load``, with what to change if it fails."""
    last = checkpointer.get_checkpoint_file() if resume else ""
    source = last or path
    advice = (
        "correct or remove last_checkpoint in OUTPUT_DIR, or leave out --resume"
        if last
        else "change MODEL.WEIGHTS"
    )
    try:
        checkpointer.resume_or_load(path, resume=resume)
    except (AssertionError, FileNotFoundError, IsADirectoryError) as e:
        raise UserError(f"checkpoint not found: {source}; {advice}") from e
    except UserError:
        raise
    except Exception as e:
        # Whatever pickle, zipfile and torch raise on a damaged file: a dozen types.
        raise UserError(f"checkpoint {source} cannot be loaded ({reason(e)}); {advice}") from e


@contextlib.contextmanager
def _no_traceback_of_user_errors() -> Iterator[None]:
    """Detectron2 logs what ended a training, with its traceback; of ours one line is enough."""

    def unless_ours(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, UserError)

    theirs = logging.getLogger("detectron2.engine.train_loop")
    theirs.addFilter(unless_ours)
    try:
        yield
    finally:
        theirs.removeFilter(unless_ours)


# evaluator_type -> what its datasets call their classes
_CLASS_KEYS = {
    **dict.fromkeys(("coco", "lvis", "pascal_voc"), "thing_classes"),
    **dict.fromkeys(("sem_seg", "cityscapes_sem_seg"), "stuff_classes"),
    "classification": "classes",
}
_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def _precision(cfg: CfgNode) -> torch.dtype | None:
    """Of mixed precision; None for none."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    name = cfg.SOLVER.AMP.PRECISION or ("float16" if cuda else "bfloat16")
    if name not in _PRECISIONS:
        raise UserError(
            f"unknown SOLVER.AMP.PRECISION {name!r}, expected {', '.join(map(repr, _PRECISIONS))}, "
            "or '' for that of the device"
        )
    if name == "float16" and not cuda:
        raise UserError(
            "SOLVER.AMP.PRECISION float16 needs a CUDA device; set it to bfloat16, or "
            "SOLVER.AMP.ENABLED False"
        )
    return _PRECISIONS[name]


@contextlib.contextmanager
def _older_numpy() -> Iterator[None]:
    """What cityscapesscripts 2.3 and Detectron2 v0.6 still ask NumPy for."""
    numpy: Any = np
    old = {"in1d": lambda x, among: np.isin(x, among).ravel(), "float": float, "int": int}
    missing = [name for name in old if not hasattr(numpy, name)]
    for name in missing:
        setattr(numpy, name, old[name])
    try:
        yield
    finally:
        for name in missing:
            delattr(numpy, name)


class _CityscapesEvaluator(CityscapesSemSegEvaluator):
    def evaluate(self) -> Any:
        with _older_numpy():
            return super().evaluate()


class _SemSegEvaluator(SemSegEvaluator):
    def __init__(self, dataset_name: str, **options: Any) -> None:
        super().__init__(dataset_name, **options)
        # Detectron2's own asks NumPy 2 for an array that is no copy, which it cannot give.
        self.sem_seg_loading_fn = read_labels

    def process(self, inputs: Any, outputs: Any) -> None:
        with _older_numpy():
            super().process(inputs, outputs)

    def evaluate(self) -> Any:
        with _older_numpy():
            return super().evaluate()


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer: its hooks, solver and evaluators, and errors that come early.

    The step is a :class:`.TrainingStep`, checkpoints are those of a :class:`.SafeCheckpointer`,
    and the data come from a :class:`.ResumableLoader`.
    """

    #: how several processes share a model, see :func:`detectron2.engine.create_ddp_model`
    ddp: ClassVar[dict[str, Any]] = {"broadcast_buffers": False}

    def __init__(self, cfg: CfgNode) -> None:
        # Detectron2's own constructor makes the step and the checkpointer itself, and wants a GPU
        # for each of several processes.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.stopwatch = Stopwatch()
        # In its order: each may draw random numbers.
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        _check_classes([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], model)
        teacher = getattr(model, "teacher", None)
        print_of = ""
        if teacher is not None:
            print_of = teacher.fingerprint
            logger.info(f"Fingerprint of the teacher: {print_of}")
            with own_random_numbers():
                check_teacher(cfg, teacher)
        devices = [comm.get_local_rank()] if cfg.MODEL.DEVICE.startswith("cuda") else None
        model = create_ddp_model(model, device_ids=devices, **self.ddp)
        precision, parts = _precision(cfg), cfg.SOLVER.ACCUMULATION_STEPS
        self._trainer = TrainingStep(
            model,
            loader,
            optimizer,
            parts=parts,
            precision=precision,
            scaler=torch.amp.GradScaler("cuda") if precision is torch.float16 else None,
            skip_nonfinite=cfg.SOLVER.SKIP_NONFINITE,
            monitor_period=cfg.SOLVER.GRADIENT_MONITOR_PERIOD,
            folder=cfg.OUTPUT_DIR,
            config=cfg.dump(),
        )
        if parts > 1:
            logger.info(
                f"Each batch is taken in {parts} parts: losses that relate images to one another "
                "relate those of a part"
            )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            trusted=cfg.TRUST_CHECKPOINT,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        data = {
            "seed": cfg.SEED,
            "batch": cfg.SOLVER.IMS_PER_BATCH,
            "images": len(loader) if isinstance(loader, ResumableLoader) else 0,
        }
        self._state = RunState(_student(model), cfg.SOLVER.CHECKPOINT_PERIOD, print_of, data)
        self.register_hooks(self.build_hooks())

    def train(self) -> Any:
        with _no_traceback_of_user_errors():
            return super().train()

    def after_train(self) -> None:
        hooks: Any = self._hooks  # type: ignore[has-type]
        if self.iter < self.max_iter:
            # It failed. Where one process alone did, an evaluation would wait for the others.
            self._hooks = [x for x in hooks if not isinstance(x, EvalHook)]
        try:
            super().after_train()
        finally:
            self._hooks = hooks

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = cls.make_model(cfg)
        if cfg.SOLVER.ACTIVATION_CHECKPOINT:
            checkpoint_activations(_student(model))
        logger.info(f"Model:\n{model}")
        return model

    @classmethod
    def make_model(cls, cfg: CfgNode) -> nn.Module:
        """What is trained, on its device."""
        return build_registered(cfg, "the model")

    @classmethod
    def build_student(cls, cfg: CfgNode) -> nn.Module:
        """The student alone, on its device."""
        return build_student(cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        """Detectron2's, resumable. For a mapper of your own see :func:`.build_train_loader`."""
        keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN
        records = _records(
            cfg.DATASETS.TRAIN,
            lambda: get_detection_dataset_dicts(
                cfg.DATASETS.TRAIN,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
                proposal_files=proposals if cfg.MODEL.LOAD_PROPOSALS else None,
            ),
        )
        mapper: Any = None
        kind = student_config(cfg).MODEL.META_ARCHITECTURE
        if kind == "SemanticSegmentor":
            head = cfg.MODEL.SEM_SEG_HEAD
            check_labels(records, head.NUM_CLASSES, head.IGNORE_VALUE)
            mapper = sem_seg_mapper(cfg)
        elif kind == "ImageClassifier":
            mapper = ClassificationMapper.of(cfg, training=True)
        return build_train_loader(cfg, records, mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        if _evaluator_type(dataset_name) != "classification":
            return super().build_test_loader(cfg, dataset_name)
        # Detectron2's own takes one image at a time, and some versions no more.
        records = DatasetFromList(DatasetCatalog.get(dataset_name), copy=False)
        return torch.utils.data.DataLoader(
            MapDataset(records, ClassificationMapper.of(cfg, training=False)),
            batch_size=max(1, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()),
            sampler=InferenceSampler(len(records)),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=trivial_batch_collator,
        )

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """Detectron2's, and WarmupPolyLR of its project DeepLab."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        name = cfg.SOLVER.OPTIMIZER.upper()
        if name == "SGD":
            optimizer: torch.optim.Optimizer = build_optimizer(cfg, model)
            return optimizer
        if name != "ADAMW":
            raise UserError(
                f"unknown SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER!r}, expected SGD or AdamW"
            )
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        kind = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        adamw: torch.optim.Optimizer = kind(params, lr=cfg.SOLVER.BASE_LR)
        return adamw

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        kind = _evaluator_type(dataset_name)
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        if kind == "classification":
            return ClassificationEvaluator()
        if kind == "cityscapes_sem_seg":
            return _CityscapesEvaluator(dataset_name)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        evaluators = {"coco": COCOEvaluator, "lvis": LVISEvaluator, "sem_seg": _SemSegEvaluator}
        return evaluators[kind](dataset_name, output_dir=folder)

    def build_hooks(self) -> list[HookBase | None]:
        hooks: list[HookBase | None] = super().build_hooks()
        # First, so that checkpoints hold the seconds of the step they were made after.
        hooks.insert(0, self.stopwatch)
        # Last before a checkpoint: what comes after must not draw random numbers.
        last = next(
            i for i, x in enumerate(hooks) if isinstance(x, (PeriodicCheckpointer, EvalHook))
        )
        hooks.insert(last, self._state)
        if comm.is_main_process():
            hooks.insert(1, ProgressBar())
            if self.cfg.VIS_PERIOD > 0:
                hooks.insert(1, _pictures(self.cfg, self.model))
        return hooks

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        """Detectron2's; training goes on afterwards as if there had been no evaluation."""
        if comm.get_world_size() > 1:
            # Batch norms have statistics of their own in every process: those that are saved, of
            # the first, are those to evaluate.
            for x in model.buffers():
                distributed.broadcast(x, 0)
        with own_random_numbers():
            return super().test(cfg, model, evaluators)

    def resume_or_load(self, resume: bool = True) -> None:
        _resume_or_load(self.checkpointer, self.cfg.MODEL.WEIGHTS, resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1
        if comm.get_world_size() > 1:
            # Machines that share no disk would each go on from what they have.
            begins = comm.all_gather((self.start_iter, fingerprint(_student(self.model))))
            if len(set(begins)) > 1:
                iterations = ", ".join(str(x) for x, _ in begins)
                raise UserError(
                    f"the processes begin at iterations {iterations}, or with other weights: give "
                    "all machines the same OUTPUT_DIR and MODEL.WEIGHTS"
                )


# How many images are drawn.
_PICTURES = 6


def _pictures(cfg: CfgNode, model: nn.Module) -> HookBase | None:
    """Of VIS_PERIOD: Detectron2 itself draws nothing but proposals. None for what has no boxes."""
    name = next((x for x in cfg.DATASETS.TEST if _evaluator_type(x) in ("coco", "lvis")), None)
    records = DatasetCatalog.get(name)[:_PICTURES] if name else []
    student = _student(model)
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN":
        # Its boxes are rotated.
        records = []
    if not records or not all("annotations" in x for x in records):
        logger.warning("VIS_PERIOD draws detections, and no set of DATASETS.TEST has boxes to draw")
        return None
    inputs = [DatasetMapper(cfg, False)(x) for x in records]
    return DetectionPictures(
        cfg.VIS_PERIOD,
        {"student": student},
        records,
        inputs,
        MetadataCatalog.get(name).thing_classes,
    )


def _records(
    names: Sequence[str], load: Callable[[], list[dict[str, Any]]], *, tell: bool = True
) -> list[dict[str, Any]]:
    """Load datasets, and look what can be trained on.

    Args:
        names: of the datasets.
        load: gives their records.
        tell: log what is left out.

    Raises:
        UserError: annotations that are damaged, empty or no COCO json, images that are missing.
    """
    name = ", ".join(names)
    try:
        records = load()
    except UserError:
        raise
    except KeyError as e:
        raise UserError(f"dataset {name} cannot be used: its annotations have no {e}") from e
    except Exception as e:
        # Whatever pycocotools and Detectron2 stumble over in a json: a dozen types.
        raise UserError(f"dataset {name} cannot be used: {reason(e)}") from e
    metadata = MetadataCatalog.get(names[0])
    classes = metadata.get("thing_classes")
    numbers = metadata.get("thing_dataset_id_to_contiguous_id")
    if classes and numbers and len(numbers) != len(classes):
        raise UserError(f"dataset {name} cannot be used: two of its categories have one id")
    return check_records(records, name, len(classes) if classes else None, tell=tell)


def _check_evaluation(name: str) -> None:
    """Refuse a test set before the training that an evaluation would lose."""
    kind = _evaluator_type(name)
    if kind == "cityscapes_sem_seg" and comm.get_local_size() != comm.get_world_size():
        raise UserError(
            f"{name!r} is evaluated by Cityscapes' own scripts, which work on one machine; take it "
            "out of DATASETS.TEST and evaluate afterwards with --eval-only"
        )
    _records([name], functools.partial(DatasetCatalog.get, name), tell=False)
    file = MetadataCatalog.get(name).get("json_file")
    if kind == "coco" and file and os.path.isfile(file):
        check_annotations(file, name)


def _evaluator_type(dataset: str) -> str:
    kind = MetadataCatalog.get(dataset).get("evaluator_type")
    if kind not in _CLASS_KEYS:
        raise UserError(
            f"no evaluator for dataset {dataset!r} of type {kind!r}; set its evaluator_type in "
            f"MetadataCatalog to one of {', '.join(_CLASS_KEYS)}"
        )
    if kind == "cityscapes_sem_seg" and importlib.util.find_spec("cityscapesscripts") is None:
        raise UserError(
            f"the evaluation of {dataset!r} needs cityscapesscripts: pip install cityscapesscripts"
        )
    return str(kind)


def _student(model: nn.Module) -> nn.Module:
    """The student in a distilled model; any other model itself."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model.student if isinstance(model, DistillationModel) else model


def _check_classes(datasets: Sequence[str], model: nn.Module) -> None:
    """Refuse a head whose number of classes is not the datasets'."""
    student = _student(model)
    try:
        adapter = find_adapter(student)
        count = adapter.num_classes(student)
    except UserError:
        # A plain model of a family that we cannot distil can still be trained.
        return
    known: list[tuple[str, list[str]]] = []
    for name in datasets:
        metadata = MetadataCatalog.get(name)
        kind = metadata.get("evaluator_type")
        if kind in _CLASS_KEYS and _CLASS_KEYS[kind] != adapter.class_key:
            raise UserError(
                f"dataset {name!r} is of type {kind}, and the model is a {type(student).__name__}: "
                "change DATASETS or the model"
            )
        classes = metadata.get(adapter.class_key)
        if classes is not None:
            known.append((name, list(classes)))
        if None not in (classes, count) and len(classes) != count:
            raise UserError(
                f"dataset {name!r} has {len(classes)} classes and the model has {count}; set "
                f"NUM_CLASSES of MODEL.RETINANET, FCOS, ROI_HEADS, SEM_SEG_HEAD or CLASSIFIER to "
                f"{len(classes)}"
            )

    for name, classes in known[1:]:
        first, expected = known[0]
        if classes != expected:
            x, y = next(((x, y) for x, y in zip(expected, classes) if x != y), ("", ""))
            raise UserError(
                f"datasets {first!r} and {name!r} have other classes ({x!r} where the other has "
                f"{y!r}): what is learned on one would be counted wrong on the other"
            )


def _check_datasets(names: list[str]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"DATASETS names datasets, and {name!r} is no name")
        if name not in DatasetCatalog:
            close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            hint = f", did you mean {', '.join(close)}?" if close else ""
            raise UserError(
                f"unknown dataset {name!r} in DATASETS{hint}; your own must be registered before, "
                "for example with register_coco_instances"
            )
        metadata = MetadataCatalog.get(name)
        prepare = metadata.get("prepare")
        if prepare is not None:
            prepare()
        for key in ("json_file", "image_root", "image_dir", "gt_dir"):
            path = metadata.get(key)
            if path and "://" not in path and not os.path.exists(path):
                raise UserError(
                    f"dataset {name!r} is not there: {path} does not exist (seen from "
                    f"{os.getcwd()}); correct where it was registered, or set DETECTRON2_DATASETS "
                    "to the folder that holds Detectron2's own datasets"
                )


def _check(
    cfg: CfgNode,
    args: argparse.Namespace,
    *,
    model: Mapping[str, Any] | None = None,
    datasets: list[str] | None = None,
) -> None:
    """What can be known to fail before anything is built.

    Args:
        cfg: of the run.
        args: of the command line.
        model, datasets: of a run that describes them elsewhere than in cfg.
    """
    processes = comm.get_world_size()
    batch = cfg.SOLVER.IMS_PER_BATCH
    # Detectron2 scales the batch from the reference number of processes to the actual one.
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or processes
    parts = cfg.SOLVER.ACCUMULATION_STEPS
    if not args.eval_only and parts < 1:
        raise UserError(f"SOLVER.ACCUMULATION_STEPS is {parts}; it must be positive")
    if not args.eval_only and (batch < 1 or batch % (reference * parts)):
        name = "SOLVER.REFERENCE_WORLD_SIZE" if cfg.SOLVER.REFERENCE_WORLD_SIZE else "processes"
        times = f" times SOLVER.ACCUMULATION_STEPS ({parts})" if parts > 1 else ""
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch}; it must be a positive multiple of {name} "
            f"({reference}){times}"
        )
    if not args.eval_only:
        _precision(cfg)
    if not args.eval_only and cfg.SOLVER.MAX_ITER < 1:
        raise UserError(f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}; it must be positive")
    if not args.eval_only and cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        raise UserError(
            f"SOLVER.CHECKPOINT_PERIOD is {cfg.SOLVER.CHECKPOINT_PERIOD}; it must be positive"
        )
    keys = config_keys(cfg.MODEL, "MODEL.") if model is None else config_keys(model, "model.")
    synced = [key for key, value in keys if value == "SyncBN"]
    if synced and not args.eval_only and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError(
            f"{' and '.join(synced)} {'is' if len(synced) == 1 else 'are'} SyncBN, which trains on "
            "CUDA devices alone; set BN or GN"
        )
    if cfg.MODEL.LOAD_PROPOSALS and not cfg.TRUST_CHECKPOINT:
        raise UserError(
            "MODEL.LOAD_PROPOSALS reads pickles, which can run any program; if you trust where "
            "they come from, add TRUST_CHECKPOINT True to the command line"
        )
    if datasets is None:
        if not args.eval_only and not cfg.DATASETS.TRAIN:
            raise UserError("DATASETS.TRAIN is empty; name a dataset to train on")
        datasets = [*cfg.DATASETS.TEST, *(() if args.eval_only else cfg.DATASETS.TRAIN)]
    _check_datasets(datasets)
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if args.eval_only and not (cfg.MODEL.WEIGHTS or (args.resume and os.path.isfile(last))):
        raise UserError(
            "--eval-only needs a checkpoint: set MODEL.WEIGHTS, or --resume for the last one in "
            "OUTPUT_DIR"
        )
    if args.eval_only and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty; name a dataset to evaluate on")


def _draw_seed(folder: str, resume: bool) -> int:
    """A seed for all processes, kept in a folder; that of the run that goes on, if it has one."""
    path = Path(folder, "seed.txt")
    seed = -1
    if resume and comm.is_main_process() and path.is_file():
        text = path.read_text().strip()
        seed = int(text) if text.isdecimal() else -1
    seed = int(comm.all_gather(seed)[0])
    if seed < 0:
        seed = int(comm.shared_random_seed())
        if comm.is_main_process():
            write_whole(path, lambda f: f.write(f"{seed}\n".encode()))
    return seed


def setup(args: argparse.Namespace) -> CfgNode:
    """Config, checks, logging and seeds of a run.

    Args:
        args: of :func:`detectron2.engine.default_argument_parser`.

    Raises:
        UserError: see the messages; nothing has been built by then.
    """
    cfg = get_distill_cfg()
    merge_config(cfg, args.config_file, args.opts, "config file")
    student_config(cfg)
    notes = _settle(cfg, args)
    _check(cfg, args)
    _announce(cfg, args, notes, cfg)
    kind = cfg.MODEL.META_ARCHITECTURE
    if cfg.MODEL.DISTILL.LOSSES and kind != "DistillationModel":
        logger.warning(
            f"MODEL.DISTILL.LOSSES is set, but META_ARCHITECTURE is {kind}: nothing is distilled"
        )
    if comm.is_main_process():
        stock = stock_config(cfg)
        path = Path(cfg.OUTPUT_DIR, "student_config.yaml")
        write_whole(path, lambda f: f.write(stock.dump().encode()))
    return cfg


def stock_config(cfg: CfgNode) -> CfgNode:
    """What stock Detectron2 needs, beside a checkpoint, to run the student of a config."""
    stock, own = student_config(cfg), get_cfg()
    add_pcka_distill_config(own)
    # Of another project's FCOS the node stays.
    if stock.MODEL.META_ARCHITECTURE == "FCOS" or stock.MODEL.FCOS.keys() != own.MODEL.FCOS.keys():
        del own.MODEL["FCOS"]
    # What this project's own models read stays: without it nothing can build them.
    if stock.MODEL.META_ARCHITECTURE == "ImageClassifier":
        del own.MODEL["CLASSIFIER"], own.INPUT["CLASSIFICATION"]
    backbone, head = stock.MODEL.BACKBONE.NAME, stock.MODEL.SEM_SEG_HEAD.NAME
    if not (
        backbone in ("build_dilated_resnet_backbone", "build_resnet_deeplab_backbone")
        or head.startswith("DeepLab")
    ):
        add_deeplab_config(own)
    if head == "PSPHead":
        del own.MODEL["PSP_HEAD"]
    _drop_own_keys(stock, own, get_cfg())
    return stock


def _settle(cfg: CfgNode, args: argparse.Namespace) -> list[tuple[int, str]]:
    """Decide what a config leaves open, freeze it, and open the log in its OUTPUT_DIR.

    Returns:
        level and text of what is to be logged.
    """
    notes: list[tuple[int, str]] = []
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        notes.append((logging.WARNING, "No CUDA device here: MODEL.DEVICE is set to cpu"))
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.OUTPUT_DIR) as probe:
            probe.write(bytes(1 << 16))
            probe.flush()
    except OSError as e:
        raise UserError(f"OUTPUT_DIR cannot be written: {e}; change OUTPUT_DIR") from e
    if comm.is_main_process():
        remove_partial(cfg.OUTPUT_DIR)
    if cfg.SEED < 0 and not args.eval_only:
        cfg.SEED = _draw_seed(cfg.OUTPUT_DIR, args.resume)
        notes.append((logging.INFO, f"No SEED was given; this run has {cfg.SEED}"))
    cfg.freeze()
    # default_setup makes the same call again, which changes nothing.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    return notes


def _announce(
    cfg: CfgNode, args: argparse.Namespace, notes: list[tuple[int, str]], kept: Any
) -> None:
    """Begin the log with what is run, keep its config in OUTPUT_DIR, and seed the generators."""
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if args.config_file and not os.path.isfile(args.config_file):
        # A name under configs/, which default_setup would look for where one stands.
        args.config_file = get_config_file(args.config_file)
    default_setup(kept, args)
    if cfg.SOLVER.DETERMINISTIC:
        # Asked for by cuBLAS, before its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    for level, note in notes:
        logger.log(level, note)
    if not (args.resume or args.eval_only) and os.path.exists(last):
        logger.warning(
            f"{cfg.OUTPUT_DIR} holds an earlier run: this one writes over its checkpoints and adds "
            "to its logs (--resume would go on with it)"
        )


def _drop_own_keys(cfg: CfgNode, own: CfgNode, known: CfgNode) -> None:
    """Remove from a config what own has and Detectron2 does not know."""
    for key, value in own.items():
        if key not in known:
            del cfg[key]
        elif isinstance(value, CfgNode):
            _drop_own_keys(cfg[key], value, known[key])


def _write_results(
    cfg: CfgNode, file: str, model: nn.Module, results: dict[str, Any], **facts: float
) -> None:
    """Write a file in OUTPUT_DIR for programs to read."""
    if not comm.is_main_process():
        return
    names = cfg.DATASETS.TEST
    by_dataset = {names[0]: results} if len(names) == 1 else results
    content = {
        "parameters": sum(p.numel() for p in _student(model).parameters()),
        **facts,
        # dataset -> task -> metric; what COCO cannot compute (no large objects) is null
        "results": {
            name: {
                task: {k: v if math.isfinite(v) else None for k, v in metrics.items()}
                for task, metrics in tasks.items()
            }
            for name, tasks in by_dataset.items()
        },
    }
    path, text = Path(cfg.OUTPUT_DIR, file), json.dumps(content, indent=1)
    write_whole(path, lambda f: f.write(text.encode()))


def main(args: argparse.Namespace) -> Any:
    """Train, or with ``--eval-only`` evaluate, what the config describes.

    Returns:
        the metrics of ``DATASETS.TEST``, also written to ``OUTPUT_DIR``: to ``results.json`` after
        training, to ``evaluation.json`` otherwise.
    """
    with _disk_errors():
        cfg = setup(args)
        for name in cfg.DATASETS.TEST:
            _check_evaluation(name)
        return _run(cfg, args, Trainer)


def load_student(
    cfg: CfgNode,
    *,
    resume: bool = False,
    build: Callable[[CfgNode], nn.Module] = build_student,
) -> nn.Module:
    """The trained student alone: no teacher is built or needed.

    Args:
        cfg: its config, or that of its distillation.
        resume: from the last checkpoint in OUTPUT_DIR, instead of MODEL.WEIGHTS.
        build: makes it.

    Raises:
        UserError: a checkpoint that is not there, or that lacks any of the student's tensors.
    """
    model = build(cfg)
    _check_classes(cfg.DATASETS.TEST, model)
    checkpointer = StrictCheckpointer(model, save_dir=cfg.OUTPUT_DIR, trusted=cfg.TRUST_CHECKPOINT)
    _resume_or_load(checkpointer, cfg.MODEL.WEIGHTS, resume)
    shapes, missing, unexpected = mismatch = checkpointer.mismatch
    if shapes or missing:
        raise UserError(
            f"the checkpoint is not that of the model to evaluate: {mismatch}. Change "
            "MODEL.WEIGHTS or the config"
        )
    if unexpected:
        logger.warning(f"Of the checkpoint's tensors {mismatch}")
    return model


def _run(cfg: CfgNode, args: argparse.Namespace, kind: type[Trainer]) -> Any:
    if args.eval_only:
        model = load_student(cfg, resume=args.resume, build=kind.build_student)
        results = kind.test(cfg, model)
        _write_results(cfg, "evaluation.json", model, results)
        return results
    trainer = kind(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    results = trainer._last_eval_results
    seconds = trainer.stopwatch.seconds
    _write_results(cfg, "results.json", trainer.model, results, train_seconds=seconds)
    return results


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        # Writers that are closed after one failed stumble over what it left.
        error: BaseException | None = e
        while error is not None and not (isinstance(error, OSError) and error.errno in _NO_ROOM):
            error = error.__context__
        if error is None:
            raise
        raise UserError(
            f"{error.filename or 'OUTPUT_DIR'} cannot be written: {error.strerror}; make room or "
            "change OUTPUT_DIR, and go on from the last checkpoint with --resume"
        ) from e


def _leave(code: int) -> NoReturn:
    """End a process that others were joined to, without what Python does last.

    A thread of gloo lets go of a collective's tensors a moment after the collective has returned.
    It needs Python for that, and if that is being taken down, the whole process is aborted
    (pytorch/pytorch#179291); what NCCL has under way after an error would be waited for, by all.
    """
    if code == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_and_leave(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run in a process of Detectron2's launcher, which is this one if it is to be alone."""
    result = run(args)
    if distributed.is_initialized():
        _leave(0)
    return result


def _join(args: argparse.Namespace, run: Callable[[argparse.Namespace], Any]) -> NoReturn:
    """Run in a process that torchrun started; ``--num-gpus`` and the like are its business."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=DEFAULT_TIMEOUT)
    size = int(os.environ["LOCAL_WORLD_SIZE"])
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
    else:
        # Detectron2 0.6 has it in its launcher alone. Every process takes part in making each.
        for first in range(0, distributed.get_world_size(), size):
            ranks = list(range(first, first + size))
            group = distributed.new_group(ranks)
            if distributed.get_rank() in ranks:
                comm._LOCAL_PROCESS_GROUP = group
    try:
        run(args)
    except BaseException as e:
        if isinstance(e, UserError) and not args.debug:
            print(f"error: {e}", file=sys.stderr)
        else:
            traceback.print_exc()
        _leave(1)
    distributed.destroy_process_group()
    _leave(0)


_EXAMPLES = """Examples, of a teacher, a student that it teaches, and the student's evaluation:

    {0} --config-file configs/Digits/retinanet_teacher.yaml
    {0} --config-file configs/Digits/retinanet_pcka_kd.yaml SOLVER.BASE_LR 0.005
    {0} --config-file configs/Digits/retinanet_pcka_kd.yaml --eval-only \\
        MODEL.WEIGHTS output/digits/retinanet_pcka_kd/model_final.pth

Several GPUs, of one machine or of two:

    {0} --num-gpus 8 --config-file cfg.yaml
    {0} --machine-rank 0 --num-machines 2 --dist-url URL --config-file cfg.yaml
    {0} --machine-rank 1 --num-machines 2 --dist-url URL --config-file cfg.yaml
"""


def cli(run: Callable[[argparse.Namespace], Any] = main, epilog: str | None = None) -> None:
    """The command line: Detectron2's flags, its launcher, and errors on one line.

    Args:
        run: what every process does; pickled.
        epilog: of the help; examples of yaml configs if None.
    """
    parser = default_argument_parser(epilog or _EXAMPLES.format(sys.argv[0]))
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args()
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _join(args, run)
        devices = torch.cuda.device_count()
        # Without any they are processes on the CPU, joined by gloo.
        if args.num_gpus > devices > 0:
            raise UserError(f"--num-gpus is {args.num_gpus} and {devices} CUDA devices are here")
        launch(
            functools.partial(_run_and_leave, run),
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except UserError as e:
        if args.debug:
            raise
        sys.exit(f"error: {e}")
    except ProcessRaisedException as e:
        # A child of the launcher failed: of a UserError only the message is news.
        kind, _, message = str(e).strip().splitlines()[-1].partition(": ")
        if args.debug or not kind.endswith((UserError.__name__, NonFiniteError.__name__)):
            raise
        sys.exit(f"error: {message}")
    except KeyboardInterrupt:
        sys.exit(
            "interrupted; with --resume the same command goes on from the last checkpoint, if one "
            "was saved"
        )
