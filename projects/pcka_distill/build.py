"""From a config to a student, a teacher and losses."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from detectron2.config import (
    CfgNode,
    LazyConfig,
    downgrade_config,
    get_cfg,
    instantiate,
    upgrade_config,
)
from detectron2.config.compat import guess_version
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.projects.deeplab import add_deeplab_config
from omegaconf import DictConfig, OmegaConf
from torch import nn

from pcka_distill.cache import FeatureCache
from pcka_distill.config import add_pcka_distill_config
from pcka_distill.errors import UserError, reason
from pcka_distill.losses import DISTILL_LOSS_REGISTRY, DistillLoss
from pcka_distill.teacher import FrozenTeacher, load_teacher_weights

__all__ = [
    "build_losses",
    "build_registered",
    "build_student",
    "build_teacher",
    "class_names",
    "config_keys",
    "drop_unweighted",
    "get_config_file",
    "get_distill_cfg",
    "load_teacher",
    "merge_config",
    "own_random_stream",
    "read_config",
    "register_config",
    "student_config",
]

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")


@contextlib.contextmanager
def own_random_stream() -> Iterator[None]:
    """Let what is built inside draw random numbers without moving torch's generators.

    Whatever distillation adds to a run, the student's initialisation, its sampled regions and its
    order of images stay those of the run without it.
    """
    # A CUDA generator that nobody has used yet has nothing to be protected from, and naming the
    # device avoids a warning (and a copy of every other generator) on boxes with several.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


# Keys that no file can set.
_TRUST = ("TRUST_CONFIG", "TRUST_CHECKPOINT")
# A config of Detectron2 has some hundreds.
_MAX_VALUES = 100_000
_ADD_KEYS: list[Callable[[CfgNode], None]] = [add_deeplab_config, add_pcka_distill_config]


def register_config(add_keys: Callable[[CfgNode], None]) -> Callable[[CfgNode], None]:
    """Make the config keys of your own project known, to the student's and the teacher's yaml.

    Args:
        add_keys: adds keys to a config, as the ``add_..._config`` of Detectron2's projects do.
    """
    if add_keys not in _ADD_KEYS:
        _ADD_KEYS.append(add_keys)
    return add_keys


def get_distill_cfg() -> CfgNode:
    """Detectron2's default config, with its DeepLab's keys, this project's and registered ones."""
    cfg = get_cfg()
    for add_keys in _ADD_KEYS:
        add_keys(cfg)
    return cfg


def merge_config(cfg: CfgNode, path: str, opts: list[Any], what: str) -> None:
    """Merge a config file and command-line overrides.

    More forgiving than Detectron2's own: 5 is as good as 5.0, p3 as [p3], and on the command line
    [p3, p4] as ['p3', 'p4']. A teacher's config that is found nowhere else is looked for beside
    the file.

    Less forgiving of one thing: a yaml can name functions to call, and Detectron2 calls them. Here
    only its own configs may, or any if ``TRUST_CONFIG`` is set in cfg or by the overrides, which
    must be those of the command line.

    Raises:
        UserError: the file is not there or is no yaml, or a key or a value does not fit.
    """
    trusted = cfg.TRUST_CONFIG or "True" in [
        str(value) for key, value in zip(opts[::2], opts[1::2]) if key == "TRUST_CONFIG"
    ]
    if path and not os.path.isfile(path):
        if not (_ROOT / "configs" / path).is_file():
            raise UserError(f"{what} not found: {path}")
        path = get_config_file(path)
    if path:
        with _config_errors(cfg, f"{what} {path} cannot be used"):
            loaded = read_config(path, trusted=trusted)
            for key in _TRUST:
                if loaded.pop(key, False):
                    raise ValueError(f"{key} is for the command line: no file can trust itself")
            fitted = CfgNode(_fit(loaded, cfg))
            version = fitted.get("VERSION") or guess_version(fitted, path)
            if version == cfg.VERSION:
                cfg.merge_from_other_cfg(fitted)
            else:
                # Of another version of Detectron2's keys: it converts them.
                old = downgrade_config(cfg, to_version=version)
                old.merge_from_other_cfg(fitted)
                cfg.update(upgrade_config(old))
    with _config_errors(cfg, f"override of the {what} cannot be used"):
        known = dict(config_keys(cfg))
        values = [_fit(v, known.get(k)) for k, v in zip(opts[::2], opts[1::2])]
        # Of an odd number the last is a key without a value: let yacs say so.
        pairs = [x for pair in zip(opts[::2], values) for x in pair]
        cfg.merge_from_list(pairs + list(opts[len(pairs) :]))
    name = cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE
    beside = Path(path).parent / name
    if name and beside.is_file() and _find_config(name) is None:
        cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE = str(beside)


def read_config(path: str, *, trusted: bool = False) -> dict[str, Any]:
    """The keys of a yaml and of what it is based on, as they are written.

    Raises:
        Exception: of half a dozen kinds: no yaml, no keys, a program in it that is not trusted.
    """
    reader = CfgNode if trusted else _SafeConfig
    try:
        loaded = dict(reader.load_yaml_with_base(path, allow_unsafe=trusted))
    except yaml.constructor.ConstructorError as e:
        raise ValueError(
            f"{reason(e)}: it would run a program; if you trust where it comes from, add "
            "TRUST_CONFIG True to the command line"
        ) from e
    except RecursionError as e:
        raise ValueError("its _BASE_, or a value in it, leads back to itself") from e
    except (TypeError, ValueError) as e:
        # Empty, a list, a word.
        raise TypeError("it holds no keys") from e
    _refuse_bombs(loaded)
    return loaded


class _SafeConfig(CfgNode):
    """Reads a config as data; those that ship with Detectron2 may compute a value."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> Any:
        # It is asked again for each _BASE_. What is looked at must be what is opened: no address,
        # which would be fetched, and no pipe.
        if "://" in filename or not os.path.isfile(filename):
            raise FileNotFoundError(f"its _BASE_ {filename} is no file here")
        return super().load_yaml_with_base(filename, allow_unsafe=_of_detectron2(filename))


def _of_detectron2(path: str) -> bool:
    # In a checkout of Detectron2 the folder of its package is a link to another one.
    spec = importlib.util.find_spec("detectron2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model_zoo" / "configs"
    return folder.resolve() in Path(path).resolve().parents


def _refuse_bombs(node: Any) -> None:
    """A few lines of yaml can stand for millions of values, by aliases of aliases."""
    left, todo = _MAX_VALUES, [node]
    while todo:
        node = todo.pop()
        inside = node.values() if isinstance(node, dict) else node
        todo += inside if isinstance(node, (dict, list, tuple)) else ()
        left -= 1
        if left < 0:
            raise ValueError(f"it holds more than {_MAX_VALUES} values")


def config_keys(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config, nodes included, with its value."""
    for key, value in cfg.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from config_keys(value, f"{prefix}{key}.")


def _fit(value: Any, default: Any) -> Any:
    """What was surely meant where a default of this type stands."""
    if isinstance(value, dict) and isinstance(default, dict):
        return {k: _fit(v, default.get(k)) for k, v in value.items()}
    if isinstance(default, float):
        decoded = CfgNode._decode_cfg_value(value)
        return float(decoded) if type(decoded) is int else value
    if isinstance(default, (list, tuple)):
        decoded = CfgNode._decode_cfg_value(value)
        if decoded is None:
            return None
        if isinstance(decoded, str) and decoded.startswith("["):
            # [p3, p4], of which the quotes were eaten by a shell or never typed.
            decoded = yaml.safe_load(decoded)
        return decoded if isinstance(decoded, (list, tuple)) else [decoded]
    return value


@contextlib.contextmanager
def _config_errors(cfg: CfgNode, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        # yaml and yacs raise half a dozen unrelated types here, AssertionError among them.
        text = reason(e)
        unknown = re.search(r"Non-existent (?:config )?key: (\S+)", text)
        if unknown:
            close = difflib.get_close_matches(unknown[1], [k for k, _ in config_keys(cfg)], n=1)
            text += f", did you mean {close[0]}?" if close else ""
        raise UserError(f"{what}: {text}") from e


def student_config(cfg: CfgNode) -> CfgNode:
    """The config of the student alone: an ordinary model of its own meta-architecture.

    Of a config that does not distil, it is a copy.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "DistillationModel":
        name = cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE
        if name not in META_ARCH_REGISTRY or name == "DistillationModel":
            raise UserError(
                f"MODEL.DISTILL.STUDENT_ARCHITECTURE is {name!r}; set it to the student's "
                "meta-architecture, such as RetinaNet or GeneralizedRCNN"
            )
        cfg.MODEL.META_ARCHITECTURE = name
    return cfg


def build_student(cfg: CfgNode) -> nn.Module:
    """The student, exactly as Detectron2 builds it."""
    return build_registered(student_config(cfg), "the model")


def build_registered(cfg: CfgNode, what: str) -> nn.Module:
    """Detectron2's ``build_model``.

    Raises:
        UserError: a meta-architecture, backbone or head that is not registered, or values that
            they refuse.
    """
    try:
        model: nn.Module = build_model(cfg)
    except UserError:
        raise
    except (AssertionError, ValueError) as e:
        raise UserError(f"{what} cannot be built: {reason(e)}") from e
    except KeyError as e:
        if "registry" not in str(e):
            raise
        raise UserError(f"{what} cannot be built: {reason(e)}") from e
    except RuntimeError as e:
        # torch says of a device that it does not know, or that is not here; and whatever else.
        if "device" not in str(e).lower():
            raise
        raise UserError(
            f"{what} cannot be put on MODEL.DEVICE {cfg.MODEL.DEVICE!r}: {reason(e)}"
        ) from e
    return model


# Of configs/: in the package where a wheel was installed, at the top of a checkout otherwise.
_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parents[1]


def get_config_file(name: str) -> str:
    """The path of a config that ships with pcka_distill, wherever it is installed.

    Args:
        name: as under ``configs/``: "COCO-Detection/retinanet_R_101_to_R_50_pcka_2x.yaml".

    Raises:
        UserError: there is none of that name.
    """
    folder = _ROOT / "configs"
    files = [x for x in folder.rglob("*") if x.suffix in (".py", ".yaml")]
    names = [x.relative_to(folder).as_posix() for x in files]
    if name in names:
        return str(folder / name)
    close = difflib.get_close_matches(name, names, n=3)
    hint = f", did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"no config {name!r} ships with pcka_distill{hint}")


def _find_config(name: str) -> tuple[str, str] | None:
    """Resolve a path or a model-zoo name to (path, zoo name or "")."""
    # A path in a shipped config is relative to the repository, wherever one stands.
    for candidate in (Path(name), _ROOT / name):
        if candidate.is_file():
            return str(candidate), ""
    # Not at the top: it needs pkg_resources, which newer setuptools no longer bring, and only
    # zoo names need it.
    from detectron2 import model_zoo

    try:
        return model_zoo.get_config_file(name), name
    except RuntimeError:
        return None


class _TeacherPlan(NamedTuple):
    """What a config file says of a teacher."""

    build: Callable[[], nn.Module]
    #: channel order of its images; None if the config does not say
    input_format: str | None
    #: what it was trained on
    datasets: list[str]
    #: all that its config says of the model
    description: str


def _read_yaml_teacher(path: str, opts: list[Any], device: str, trusted: bool) -> _TeacherPlan:
    cfg = get_distill_cfg()
    cfg.TRUST_CONFIG = trusted
    named = [key for key in opts[::2] if key in _TRUST]
    if named:
        raise UserError(
            f"MODEL.DISTILL.TEACHER.OPTS cannot set {named[0]}: it is for the command line"
        )
    merge_config(cfg, path, opts, "teacher config")
    # A student that was distilled before can be a teacher now.
    cfg = student_config(cfg)
    cfg.MODEL.DEVICE = device
    return _TeacherPlan(
        functools.partial(build_registered, cfg, "the teacher"),
        cfg.INPUT.FORMAT,
        list(cfg.DATASETS.TRAIN),
        cfg.MODEL.dump(),
    )


def _read_lazy_teacher(path: str, opts: list[Any], device: str) -> _TeacherPlan:
    """Of a LazyConfig: ViTDet, Swin, RegNet and FCOS have no yaml in Detectron2."""
    try:
        cfg = LazyConfig.load(path)
        overrides = [f"{key}={value}" for key, value in zip(opts[::2], opts[1::2])]
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    except Exception as e:
        # The file is a program: anything can go wrong in it.
        raise UserError(f"teacher config {path} cannot be used: {reason(e)}") from e
    return _plan_lazy_teacher(cfg, path, device)


def _plan_lazy_teacher(cfg: Any, path: str, device: str) -> _TeacherPlan:
    if not OmegaConf.is_dict(cfg.get("model")):
        raise UserError(f"teacher config {path} cannot be used: it defines no model")

    def first(*keys: str) -> Any:
        return next((x for x in (OmegaConf.select(cfg, k) for k in keys) if x is not None), None)

    def build() -> nn.Module:
        try:
            model: nn.Module = instantiate(cfg.model).to(device)
        except ImportError as e:
            # Detectron2's transformers import timm when they are built.
            raise UserError(f"the teacher of {path} needs {e.name}; install it") from e
        except Exception as e:
            raise UserError(f"the teacher of {path} cannot be built: {reason(e)}") from e
        return model

    datasets = first("dataloader.train.dataset.names") or []
    return _TeacherPlan(
        build,
        first("model.input_format", "dataloader.train.mapper.image_format"),
        [datasets] if isinstance(datasets, str) else list(datasets),
        OmegaConf.to_yaml(cfg.model),
    )


_IMAGENET_MEAN = {"BGR": [104, 116, 124], "RGB": [124, 116, 104]}
_PRECISIONS = {
    "": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_teacher(
    *,
    config: str | Mapping[str, Any],
    weights: str = "",
    opts: Sequence[Any] = (),
    device: str = "cpu",
    precision: str = "",
    channels_last: bool = True,
    compiled: bool = False,
    cache_dir: str = "",
    cache_max_gb: float = 20.0,
    allow_partial: bool = False,
    classes: Sequence[str] | None = None,
    class_key: str = "",
    trust_config: bool = False,
    trust_checkpoint: bool = False,
    largest_image: int = 0,
    student_format: str = "",
) -> FrozenTeacher:
    """A teacher with all of its weights loaded; in a LazyConfig ``L(load_teacher)(...)``.

    It is built here, and not by Detectron2's ``instantiate``, so that the student's random numbers
    stay where they are: ``instantiate`` leaves alone what is in a mapping without ``_target_``.

    Args:
        config: a path or a name in Detectron2's model zoo, of a yaml or a LazyConfig; or a
            LazyConfig itself, a mapping with its ``model``, as ``dict(model=L(RetinaNet)(...))``.
        weights: its checkpoint; empty: the zoo's, for a zoo name.
        opts: overrides of a config that is named, key and value by turns.
        device: where it is put.
        precision: "float32", "bfloat16", "float16" (CUDA), or empty for the student's.
        channels_last, compiled: see :class:`.FrozenTeacher`. Its batch norms are folded, see there.
        cache_dir: keep its feature maps there; empty keeps none.
        cache_max_gb: how much is kept.
        allow_partial: only warn if its weights do not fit.
        classes: names of its classes; None for those of its config's datasets, by ``class_key``.
        class_key: see :func:`class_names`; empty does not look them up.
        trust_config: let a config that is named call functions, or be a program.
        trust_checkpoint: read weights that hold more than tensors, and can run any program.
        largest_image: longest side of an image in training, in pixels; 0 if that is not known.
        student_format: channel order of the student's images.

    Raises:
        UserError: there is no such config, or it cannot be built, or its weights are not there or
            do not fit.
    """
    if precision not in _PRECISIONS:
        raise UserError(
            f"unknown MODEL.DISTILL.TEACHER.PRECISION {precision!r}, expected "
            f"{', '.join(repr(x) for x in _PRECISIONS)}"
        )
    if precision == "float16" and not device.startswith("cuda"):
        raise UserError(
            "MODEL.DISTILL.TEACHER.PRECISION float16 needs a CUDA device; set it to bfloat16"
        )
    if isinstance(config, str):
        name = config
        overrides: Any = OmegaConf.to_container(opts) if OmegaConf.is_config(opts) else opts
        plan, zoo_name = _named_plan(config, list(overrides), device, trust_config)
        if zoo_name and not weights:
            from detectron2 import model_zoo

            try:
                weights = model_zoo.get_checkpoint_url(zoo_name)
            except RuntimeError as e:
                raise UserError(
                    f"the model zoo has no weights for {zoo_name}; set "
                    "MODEL.DISTILL.TEACHER.WEIGHTS"
                ) from e
    else:
        name = "a LazyConfig"
        if not OmegaConf.is_config(config):
            config = DictConfig(dict(config), flags={"allow_objects": True})
        plan = _plan_lazy_teacher(config, name, device)
    with own_random_stream():
        model = plan.build()
    padding = getattr(getattr(model, "backbone", None), "padding_constraints", None) or {}
    square = padding.get("square_size", 0)
    if 0 < square < largest_image:
        raise UserError(
            f"the teacher pads images to {square} x {square} pixels and INPUT.MAX_SIZE_TRAIN is "
            f"{largest_image}; set it to at most {square}"
        )
    mean = [round(x) for x in getattr(model, "pixel_mean", torch.zeros(0)).flatten().tolist()]
    if mean == _IMAGENET_MEAN.get("BGR" if plan.input_format == "RGB" else "RGB"):
        logger.warning(
            f"The teacher reads {plan.input_format} images and subtracts ImageNet's mean in the "
            "other order of channels: check INPUT.FORMAT and MODEL.PIXEL_MEAN of its config"
        )
    loaded = load_teacher_weights(
        model, weights, allow_partial=allow_partial, trusted=trust_checkpoint
    )
    logger.info(
        f"Teacher: {type(model).__name__} of {name}, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{loaded} of {len(model.state_dict())} tensors loaded from {weights}"
    )
    if cache_dir:
        if not (0 < cache_max_gb < math.inf):
            raise UserError(
                f"MODEL.DISTILL.TEACHER.CACHE.MAX_GB is {cache_max_gb}; it must be positive"
            )
        # What is kept must not depend on the autocast that the student happens to be in.
        precision = precision or "float32"
    if classes is None and class_key:
        classes = class_names(plan.datasets, class_key)
    teacher = FrozenTeacher(
        model,
        input_format=plan.input_format,
        classes=classes,
        precision=_PRECISIONS[precision],
        fold_norms=True,
        channels_last=channels_last,
        compiled=compiled,
    )
    if cache_dir:
        # Its fingerprint has been taken by now: that of large weights takes a while.
        formats = f"{plan.input_format} {student_format}"
        owner = f"2 {teacher.fingerprint} {plan.description} {precision} {formats}"
        teacher.cache = FeatureCache(cache_dir, int(cache_max_gb * 2**30), owner)
    return teacher


def _named_plan(name: str, opts: list[Any], device: str, trusted: bool) -> tuple[_TeacherPlan, str]:
    """What a path or a name in the model zoo stands for, and that name or ""."""
    found = _find_config(name)
    if found is None:
        raise UserError(
            f"teacher config {name!r} is neither a file (seen from {os.getcwd()}) nor "
            "a name in Detectron2's model zoo; change MODEL.DISTILL.TEACHER.CONFIG_FILE"
        )
    path, zoo_name = found
    if path.endswith(".py"):
        if not (trusted or _of_detectron2(path)):
            raise UserError(
                f"teacher config {path} is a program; if you trust where it comes from, add "
                "TRUST_CONFIG True to the command line"
            )
        plan = _read_lazy_teacher(path, opts, device)
    else:
        plan = _read_yaml_teacher(path, opts, device, trusted)
    return plan, zoo_name


def build_teacher(cfg: CfgNode, *, class_key: str = "") -> FrozenTeacher:
    """The teacher of ``MODEL.DISTILL.TEACHER``, with all of its weights loaded.

    It lives on ``MODEL.DEVICE``, whatever its own config says.

    Args:
        cfg: the student's.
        class_key: look up the names of its classes, see :func:`class_names`; empty does not.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    if not node.CONFIG_FILE:
        raise UserError(
            "the teacher has no config; set MODEL.DISTILL.TEACHER.CONFIG_FILE to a path or to a "
            "name in Detectron2's model zoo"
        )
    frozen = load_teacher(
        config=node.CONFIG_FILE,
        weights=node.WEIGHTS,
        opts=node.OPTS,
        device=cfg.MODEL.DEVICE,
        precision=node.PRECISION,
        channels_last=node.CHANNELS_LAST,
        compiled=node.COMPILE,
        cache_dir=node.CACHE.DIR,
        cache_max_gb=node.CACHE.MAX_GB,
        allow_partial=node.ALLOW_PARTIAL,
        class_key=class_key,
        trust_config=cfg.TRUST_CONFIG,
        trust_checkpoint=cfg.TRUST_CHECKPOINT,
        largest_image=cfg.INPUT.MAX_SIZE_TRAIN,
        student_format=cfg.INPUT.FORMAT,
    )
    if frozen.cache is not None:
        classifies = student_config(cfg).MODEL.META_ARCHITECTURE == "ImageClassifier"
        random = classifies and cfg.INPUT.CLASSIFICATION.AUGMENTATION != "none"
        if random or cfg.INPUT.CROP.ENABLED or len(set(cfg.INPUT.MIN_SIZE_TRAIN)) > 1:
            logger.warning(
                "The teacher has a cache, and training images are cropped or resized at random: "
                "they will seldom come back; unset MODEL.DISTILL.TEACHER.CACHE.DIR, INPUT.CROP or "
                "all but one of INPUT.MIN_SIZE_TRAIN"
            )
    return frozen


def class_names(datasets: Sequence[str], key: str = "thing_classes") -> list[str] | None:
    """The class names of a config's datasets; None if nobody here has registered them.

    Those of a COCO json of one's own are known only once it is read, so it is.

    Args:
        datasets: their names.
        key: what their metadata call them.
    """
    for name in datasets:
        metadata = MetadataCatalog.get(name)
        file = metadata.get("json_file")
        if name in DatasetCatalog and key not in metadata.as_dict():
            if metadata.get("read_classes") is not None:
                # Of one that is not here others may be.
                with contextlib.suppress(UserError):
                    return list(metadata.read_classes())
            if file is None or not os.path.isfile(file):
                continue
            DatasetCatalog.get(name)
        classes = metadata.get(key)
        if classes is not None:
            return list(classes)
    return None


def build_losses(cfg: CfgNode) -> list[DistillLoss]:
    """The losses of ``MODEL.DISTILL.LOSSES`` whose weight is not zero."""
    names = list(cfg.MODEL.DISTILL.LOSSES)
    if not names:
        raise UserError(
            "MODEL.DISTILL.LOSSES is empty: name what the student is to learn by, such as "
            "PCKALoss, or set META_ARCHITECTURE to the student's own"
        )
    if len(set(names)) != len(names):
        raise UserError(f"a loss is named twice in MODEL.DISTILL.LOSSES {names}")
    losses = []
    for name in names:
        if name not in DISTILL_LOSS_REGISTRY:
            known = ", ".join(sorted(k for k, _ in DISTILL_LOSS_REGISTRY))
            raise UserError(f"unknown loss {name!r} in MODEL.DISTILL.LOSSES; known are {known}")
        losses.append(DISTILL_LOSS_REGISTRY.get(name)(cfg))
    return drop_unweighted(losses)


def drop_unweighted(losses: Iterable[DistillLoss]) -> list[DistillLoss]:
    """Those whose weight is not zero; the others are told.

    They would have adapters without a gradient (an error under DDP) and want a teacher; without
    them a run is equal to stock Detectron2's, bit for bit.
    """
    kept = []
    for loss in losses:
        if loss.weight == 0:
            logger.warning(f"{type(loss).__name__} has weight 0 and is left out")
        else:
            kept.append(loss)
    return kept
