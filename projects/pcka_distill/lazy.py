"""Training and evaluation from a LazyConfig, Detectron2's way to write a config as a program.

It has the keys of Detectron2's own tools/lazyconfig_train_net.py: ``model``, ``optimizer``,
``lr_multiplier``, ``train``, and ``dataloader`` with ``train``, ``test`` and ``evaluator``; the
last two may be lists, of as many loaders as evaluators. The model is any, or one that is taught::

    model = L(DistillationModel)(
        student=...,
        teacher=L(load_teacher)(config="COCO-Detection/retinanet_R_101_FPN_3x.yaml"),
        losses=[L(PCKALoss)(levels=["p3", "p4", "p5"])],
    )

It is trained by the :class:`.Trainer` of the yaml configs, with the same numbers for the same seed,
and the same schedule: ``lr_multiplier.warmup_length`` is a share of ``train.max_iter``.
Of the keys under ``train``, those in ``_OURS`` below are not Detectron2's. There is nothing like
``SOLVER.REFERENCE_WORLD_SIZE``, ``TEST.PRECISE_BN``, ``VIS_PERIOD`` and
``MODEL.DISTILL.TEACHER.MIN_AP``.

A LazyConfig is a program, and the one on the command line is run: it is the user's own command, as
with Detectron2's tool. So is one in yaml, which can name any function. What it names in turn is
read as from a yaml config: a teacher's config that is a program needs ``trust_config``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer, PeriodicWriter
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from pcka_distill.adapters import find_adapter
from pcka_distill.build import (
    class_names,
    config_keys,
    drop_unweighted,
    get_config_file,
    get_distill_cfg,
    load_teacher,
    merge_config,
    own_random_stream,
)
from pcka_distill.data.loader import ResumableLoader
from pcka_distill.engine import (
    _CLASS_KEYS,
    Trainer,
    _announce,
    _check,
    _check_evaluation,
    _disk_errors,
    _records,
    _run,
    _settle,
    logger,
)
from pcka_distill.errors import UserError, reason
from pcka_distill.meta_arch import DistillationModel, _smallest_batch

__all__ = ["LazyTrainer", "load_config", "main", "setup", "trainer_of"]

# Key of a LazyConfig -> what a yaml calls it. These are Detectron2's,
_THEIRS = {
    "train.output_dir": "OUTPUT_DIR",
    "train.init_checkpoint": "MODEL.WEIGHTS",
    "train.max_iter": "SOLVER.MAX_ITER",
    "train.amp.enabled": "SOLVER.AMP.ENABLED",
    "train.checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "train.eval_period": "TEST.EVAL_PERIOD",
    "train.device": "MODEL.DEVICE",
    "train.seed": "SEED",
    "train.cudnn_benchmark": "CUDNN_BENCHMARK",
    "dataloader.train.total_batch_size": "SOLVER.IMS_PER_BATCH",
}
# and these are not.
_OURS = {
    "train.amp.precision": "SOLVER.AMP.PRECISION",
    "train.clip_gradients.enabled": "SOLVER.CLIP_GRADIENTS.ENABLED",
    "train.clip_gradients.clip_type": "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    "train.clip_gradients.clip_value": "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
    "train.clip_gradients.norm_type": "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "train.accumulation_steps": "SOLVER.ACCUMULATION_STEPS",
    "train.activation_checkpoint": "SOLVER.ACTIVATION_CHECKPOINT",
    "train.skip_nonfinite": "SOLVER.SKIP_NONFINITE",
    "train.deterministic": "SOLVER.DETERMINISTIC",
    "train.gradient_monitor_period": "SOLVER.GRADIENT_MONITOR_PERIOD",
    "train.max_unreadable": "DATALOADER.MAX_UNREADABLE",
    "train.trust_checkpoint": "TRUST_CHECKPOINT",
}
_KEYS = _THEIRS | _OURS
# Detectron2's, too, and no key of a yaml.
_OTHERS = ("train.log_period", "train.checkpointer.max_to_keep")
# By a training. An evaluation needs the first three.
_NEEDED = ("model", "train.output_dir", "dataloader", "dataloader.train", "train.max_iter",
           "optimizer", "lr_multiplier")  # fmt: skip
# What errors call by the names of a yaml.
_TERMS = {yaml: lazy for lazy, yaml in _KEYS.items()} | {
    "TRUST_CHECKPOINT True": "train.trust_checkpoint=True",
    "TRUST_CONFIG True": "model.teacher.trust_config=True",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test",
    "DATASETS": "dataloader",
    "SOLVER.BASE_LR": "optimizer.lr",
    "INPUT.CROP": "the mapper",
    "INPUT.MAX_SIZE_TRAIN": "max_size of ResizeShortestEdge",
    "MODEL.DISTILL.LOSSES": "model.losses",
    "MODEL.DISTILL.TEACHER.CONFIG_FILE": "model.teacher.config",
    "MODEL.DISTILL.TEACHER.COMPILE": "model.teacher.compiled",
    "MODEL.DISTILL.TEACHER.CACHE.DIR": "model.teacher.cache_dir",
    "MODEL.DISTILL.TEACHER.CACHE.MAX_GB": "model.teacher.cache_max_gb",
    "NUM_CLASSES of MODEL.RETINANET, FCOS, ROI_HEADS, SEM_SEG_HEAD or CLASSIFIER": "num_classes",
}


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Run a LazyConfig and override its values.

    More strict than Detectron2's own: an override is of a key that is there, or of an argument that
    its function takes; with a ``+`` before it, of anything.

    Args:
        path: of the file, or its name under ``configs/`` of this project.
        overrides: ``key=value`` each.

    Raises:
        UserError: the file is not there, fails, or has no such key.
    """
    path = _find(path)
    try:
        config = LazyConfig.load(path)
    except Exception as e:
        # The file is a program: anything can go wrong in it.
        raise UserError(f"config file {path} cannot be used: {reason(e)}") from e
    if "model" not in config and "MODEL" in config:
        raise UserError(f"config file {path} is no LazyConfig but one for tools/train_net.py")
    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign:
            raise UserError(f"override {override!r} of the config file is no key=value")
        if not key.startswith(("+", "~")) and not _is_known(config, key):
            keys = [*_KEYS, *(k for k, _ in config_keys(_plain(config)))]
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise UserError(
                f"override of the config file cannot be used: {path} has no key {key}{hint} "
                f"(+{override} would add it)"
            )
    try:
        return LazyConfig.apply_overrides(config, list(overrides))
    except Exception as e:
        # Of hydra's grammar and of OmegaConf: a dozen types.
        raise UserError(f"override of the config file cannot be used: {reason(e)}") from e


def _find(path: str) -> str:
    if not path:
        raise UserError("there is no config file; name one by --config-file")
    if os.path.isfile(path):
        return path
    try:
        return get_config_file(path)
    except UserError as e:
        raise UserError(f"config file not found: {path} (seen from {os.getcwd()})") from e


def _is_read(key: str) -> bool:
    """Whether it is a key of a run that the trainer reads, there or not."""
    return key in _KEYS or key in _OTHERS or key.startswith("train.ddp.")


def _is_known(config: DictConfig, key: str) -> bool:
    if _is_read(key):
        return True
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, ListConfig):
        return name.isdecimal() and int(name) < len(node)
    if not isinstance(node, DictConfig):
        return False
    if name in node or "_target_" not in node:
        return name in node
    try:
        parameters = inspect.signature(_target(node)).parameters.values()
    except (TypeError, ValueError):
        # Nothing says what it takes.
        return True
    return any(name == p.name or p.kind is p.VAR_KEYWORD for p in parameters)


def _plain(node: Any) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(node)
    return found


def _target(node: Any) -> Any:
    """What a LazyCall calls; None of anything else, and of what is not there."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    try:
        return locate(target) if isinstance(target, str) else target
    except ImportError:
        # To be told when it is called.
        return None


def _build(node: Any, what: str) -> Any:
    try:
        return instantiate(node)
    except UserError:
        raise
    except Exception as e:
        # Arguments that do not fit, values that are missing: what is called may raise anything.
        raise UserError(f"{what} cannot be built: {reason(e)}") from e


def _names(loader: Any) -> list[str]:
    """The datasets of a loader, where it names some."""
    node = loader.get("dataset") if isinstance(loader, Mapping) else None
    names = node.get("names") if isinstance(node, Mapping) else None
    return [names] if isinstance(names, str) else list(names or ())


def _tests(config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Test set -> its loader and its evaluator, or several of them, uninstantiated."""
    node = config.dataloader
    loaders, evaluators = node.get("test"), node.get("evaluator")
    if not (loaders and evaluators):
        return {}
    if not isinstance(loaders, ListConfig):
        loaders, evaluators = [loaders], [evaluators]
    elif not isinstance(evaluators, ListConfig) or len(loaders) != len(evaluators):
        count = len(evaluators) if isinstance(evaluators, ListConfig) else 1
        raise UserError(
            f"dataloader.test has {len(loaders)} loaders and dataloader.evaluator {count} "
            "evaluators; give each loader its own"
        )
    found: dict[str, tuple[Any, Any]] = {}
    for i, pair in enumerate(zip(loaders, evaluators)):
        name = ", ".join(_names(pair[0])) or "dataloader.test"
        found[f"{name} ({i})" if name in found else name] = pair
    return found


def _resizing(config: DictConfig) -> Any:
    """The LazyCall that gives training images their size; None if the mapper does not say."""
    steps = OmegaConf.select(config, "dataloader.train.mapper.augmentations")
    last = [x for x in steps or () if _target(x) is not RandomFlip][-1:]
    return last[0] if last and _target(last[0]) is ResizeShortestEdge else None


def _settings(config: DictConfig) -> CfgNode:
    """What the trainer reads of a config, by the names that a yaml has for it."""
    cfg = get_distill_cfg()
    # See LazyModel.
    cfg.MODEL.META_ARCHITECTURE = "LazyModel"
    cfg.TRUST_CONFIG = True
    found = {key: OmegaConf.select(config, lazy) for lazy, key in _KEYS.items()}
    opts = [x for pair in found.items() if pair[1] is not None for x in pair]
    merge_config(cfg, "", opts, "config file")
    if found["SOLVER.IMS_PER_BATCH"] is None:
        # Of a loader of one's own it is not known: nothing but checks reads it.
        cfg.SOLVER.IMS_PER_BATCH = comm.get_world_size() * cfg.SOLVER.ACCUMULATION_STEPS
    cfg.DATASETS.TRAIN = tuple(_names(config.dataloader.get("train")))
    cfg.DATASETS.TEST = tuple(_tests(config))
    resize = _resizing(config)
    sides = resize.short_edge_length if resize else ()
    cfg.INPUT.MIN_SIZE_TRAIN = (sides,) if isinstance(sides, int) else tuple(sides)
    # 0: not known.
    cfg.INPUT.MAX_SIZE_TRAIN = resize.get("max_size", sys.maxsize) if resize else 0
    return cfg


def _distills(node: Any) -> bool:
    target = _target(node)
    return isinstance(target, type) and issubclass(target, DistillationModel)


def _make_model(config: DictConfig, cfg: CfgNode) -> nn.Module:
    node = config.model
    if not _distills(node):
        model: nn.Module = _build(node, "the model").to(cfg.MODEL.DEVICE)
        return model
    # As from a yaml. The student first: it must find the random generators as it would without us.
    parts = dict(node.items())
    student = _make_student(config, cfg)
    losses = _build(node.get("losses"), "model.losses")
    if not losses:
        raise UserError(
            "model.losses is empty: say what the student is to learn by, such as L(PCKALoss)(), or "
            "make the student the model"
        )
    losses = drop_unweighted(losses)
    reads_logits = any("logits" in loss.reads for loss in losses)
    key = find_adapter(student).class_key if reads_logits else ""
    known = {
        "input_format": OmegaConf.select(config, "dataloader.train.mapper.image_format"),
        "classes": class_names(cfg.DATASETS.TRAIN, key) if key else None,
        "smallest_batch": _smallest_batch(cfg, student),
    }
    parts = known | parts | {"student": student, "losses": losses}
    teacher: Any = parts.get("teacher") if losses else None
    if _target(teacher) is load_teacher:
        given = {
            "device": cfg.MODEL.DEVICE,
            "class_key": key,
            "largest_image": cfg.INPUT.MAX_SIZE_TRAIN,
            "student_format": parts["input_format"] or "",
            "trust_checkpoint": cfg.TRUST_CHECKPOINT,
        }
        teacher = given | dict(teacher)
    with own_random_stream():
        parts["teacher"] = _build(teacher, "the teacher")
    model = _build(parts, "the model").to(cfg.MODEL.DEVICE)
    return model


def _student_node(config: DictConfig) -> Any:
    node = config.model
    if not _distills(node):
        return node
    if "student" not in node:
        raise UserError("the model has no student; set model.student")
    return node.student


def _make_student(config: DictConfig, cfg: CfgNode) -> nn.Module:
    model: nn.Module = _build(_student_node(config), "the student").to(cfg.MODEL.DEVICE)
    return model


@META_ARCH_REGISTRY.register()
def LazyModel(cfg: CfgNode) -> nn.Module:
    """The model of a run of a LazyConfig, from the config that it kept: for tools/replay.py."""
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if not cfg.TRUST_CONFIG:
        raise UserError(
            f"{path} is a program; if you trust where it comes from, add TRUST_CONFIG True to the "
            "command line"
        )
    return _make_model(load_config(path), cfg)


class LazyTrainer(Trainer):
    """The trainer of yaml configs; what it trains, how, and on what is a LazyConfig's.

    Its cfg has the settings of the run alone. See :func:`trainer_of`.
    """

    #: the LazyConfig
    config: ClassVar[Any]

    @classmethod
    def make_model(cls, cfg: CfgNode) -> nn.Module:
        return _make_model(cls.config, cfg)

    @classmethod
    def build_student(cls, cfg: CfgNode) -> nn.Module:
        return _make_student(cls.config, cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        node = cls.config.optimizer
        params = node.get("params")
        if not isinstance(params, Mapping):
            raise UserError(
                "optimizer.params is no LazyCall that takes the model, such as "
                "L(get_default_optimizer_params)()"
            )
        optimizer = _build({**node, "params": {**params, "model": model}}, "the optimizer")
        return maybe_add_gradient_clipping(cfg, optimizer)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        node = {
            "_target_": LRMultiplier,
            "optimizer": optimizer,
            "multiplier": cls.config.lr_multiplier,
            "max_iter": cfg.SOLVER.MAX_ITER,
        }
        return _build(node, "lr_multiplier")

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's loader of named datasets made resumable; any other as it is."""
        node = cls.config.dataloader.train
        needed = {"_target_", "dataset", "mapper", "total_batch_size"}
        others = {"sampler", "num_workers", "aspect_ratio_grouping"}
        ours = needed <= set(node) <= needed | others and cfg.DATASETS.TRAIN
        if not (ours and _target(node) is build_detection_train_loader):
            logger.warning(
                "dataloader.train is not Detectron2's own loader of named datasets: where a run is "
                "resumed, its data begin anew"
            )
            return _build(node, "dataloader.train")
        records = _records(cfg.DATASETS.TRAIN, functools.partial(instantiate, node.dataset))
        mapper = _build(node.mapper, "dataloader.train.mapper")
        sampler = _build(node.get("sampler"), "dataloader.train.sampler")
        factors = getattr(sampler, "_int_part", records)
        if len(factors) != len(records):
            raise UserError(
                f"dataloader.train.sampler counts {len(factors)} images and {len(records)} can be "
                "used: take out those that the log names, or choose another sampler"
            )
        return ResumableLoader(
            records,
            TrainingSampler(len(records)) if sampler is None else sampler,
            mapper,
            cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
            group_by_aspect=node.get("aspect_ratio_grouping", True),
            num_workers=node.get("num_workers", 0),
            seed=max(cfg.SEED, 0),
            max_unreadable=cfg.DATALOADER.MAX_UNREADABLE,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return _build(_tests(cls.config)[dataset_name][0], "dataloader.test")

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return _build(_tests(cls.config)[dataset_name][1], "dataloader.evaluator")

    def build_hooks(self) -> list[HookBase | None]:
        hooks = super().build_hooks()
        train = self.config.train
        for hook in hooks:
            if isinstance(hook, PeriodicCheckpointer):
                hook.max_to_keep = OmegaConf.select(train, "checkpointer.max_to_keep")
            elif isinstance(hook, PeriodicWriter):
                hook._period = train.get("log_period", hook._period)
        return hooks


def trainer_of(config: DictConfig) -> type[LazyTrainer]:
    """A trainer of what a LazyConfig describes: a class, as Detectron2's build by class methods."""
    ddp = OmegaConf.select(config, "train.ddp")
    options = Trainer.ddp | (_plain(ddp) if ddp else {})
    return type("LazyTrainer", (LazyTrainer,), {"config": config, "ddp": options})


def setup(args: argparse.Namespace) -> tuple[CfgNode, type[LazyTrainer]]:
    """Config, checks, logging and seeds of a run.

    Args:
        args: of :func:`detectron2.engine.default_argument_parser`.

    Returns:
        the settings of the run, by the names that a yaml has for them, and its trainer.

    Raises:
        UserError: see the messages; nothing has been built by then.
    """
    config = load_config(args.config_file, args.opts)
    needed = _NEEDED[:3] if args.eval_only else _NEEDED
    missing = [key for key in needed if OmegaConf.select(config, key) is None]
    if missing:
        raise UserError(f"config file {args.config_file} defines no {', '.join(missing)}")
    cfg = _settings(config)
    notes = _settle(cfg, args)
    config.train.update(seed=cfg.SEED, device=cfg.MODEL.DEVICE)
    tests = [name for loader, _ in _tests(config).values() for name in _names(loader)]
    datasets = [*tests, *(() if args.eval_only else cfg.DATASETS.TRAIN)]
    _check(cfg, args, model=_plain(config.model), datasets=datasets)
    _announce(cfg, args, notes, config)
    for key, value in config_keys(_plain(config.train), "train."):
        if not (isinstance(value, dict) or _is_read(key)):
            logger.warning(f"{key} is no key of this trainer, and does nothing")
    if comm.is_main_process():
        # What stock Detectron2 needs, beside a checkpoint, to run the student.
        student = copy.deepcopy(_student_node(config))
        OmegaConf.resolve(student)
        path = os.path.join(cfg.OUTPUT_DIR, "student_config.yaml")
        LazyConfig.save(DictConfig({"model": student}, flags={"allow_objects": True}), path)
    for name in tests:
        if MetadataCatalog.get(name).get("evaluator_type") in _CLASS_KEYS:
            _check_evaluation(name)
        else:
            # Of a kind that only its evaluator knows.
            _records([name], functools.partial(DatasetCatalog.get, name), tell=False)
    return cfg, trainer_of(config)


def _translate(text: str) -> str:
    """A message for the users of a yaml, with the names of a LazyConfig."""
    keys = config_keys(get_distill_cfg().MODEL.DISTILL)
    arguments = {k.rpartition(".")[2] for k, v in keys if not isinstance(v, dict)}
    terms, own = (
        "|".join(re.escape(x) for x in sorted(group, key=len, reverse=True))
        for group in (_TERMS, arguments)
    )
    pattern = (
        rf"(?<![\w./'])(?:({terms})|MODEL\.DISTILL\.TEACHER\.([A-Z_]+)|"
        rf"(?:MODEL\.DISTILL\.[A-Z]+\.)?({own}))(?![\w/])"
    )

    def lazy(match: re.Match[str]) -> str:
        term, teacher, argument = match.groups()
        if term:
            return _TERMS[term]
        return f"model.teacher.{teacher.lower()}" if teacher else argument.lower()

    return re.sub(pattern, lazy, text)


@contextlib.contextmanager
def _errors_of_a_lazy_config() -> Iterator[None]:
    try:
        yield
    except UserError as e:
        e.args = (_translate(str(e)),)
        raise
    except OmegaConfBaseException as e:
        # An interpolation of a value that is not there, and the like.
        raise UserError(f"the config cannot be used: {reason(e)}") from e


def main(args: argparse.Namespace) -> Any:
    """Train, or with ``--eval-only`` evaluate, what a LazyConfig describes.

    Returns:
        the metrics of the test sets, also written to ``train.output_dir``: to ``results.json``
        after training, to ``evaluation.json`` otherwise.
    """
    with _errors_of_a_lazy_config(), _disk_errors():
        cfg, kind = setup(args)
        return _run(cfg, args, kind)
