"""Teacher and students side by side: how alike their features are, and what they detect."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from torch import Tensor, nn
from tqdm import tqdm

from pcka_distill.build import build_registered
from pcka_distill.checkpoint import StrictCheckpointer
from pcka_distill.drawing import (
    Image,
    Row,
    detection_grid,
    figure_of,
    picture_of,
    save_figure,
    truth_of,
)
from pcka_distill.engine import _check_datasets, _resume_or_load
from pcka_distill.errors import UserError, reason
from pcka_distill.functional import CHANNEL_LAYOUTS, linear_cka, pool_places, to_patches
from pcka_distill.inference import Predictor
from pcka_distill.losses import PCKALoss
from pcka_distill.meta_arch import DistillationModel
from pcka_distill.recorder import Recorder

__all__ = ["draw_cka", "draw_results", "layers_of", "named_folders"]

# As in training: PCKA is of a batch.
_BATCH = 8
# Beyond so many rows a heatmap has no numbers in its cells.
_NUMBERED = 8


def named_folders(texts: Sequence[str], *, titled: bool = True) -> dict[str, str]:
    """TITLE=PATH, as on a command line -> title -> path.

    Args:
        texts: of the command line.
        titled: a path without a title is refused; otherwise its last part is the title.

    Raises:
        UserError: one without a title, or a title that is there twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        title, sign, path = text.partition("=")
        if not titled and (not sign or Path(text).exists()):
            title, sign, path = Path(text).name, "=", text
        if not (title and sign) or title in found:
            raise UserError(f"{text!r} is no TITLE=PATH with a title of its own")
        found[title] = path
    return found


def _checkpoint_in(path: str) -> str:
    return str(Path(path) / "model_final.pth") if path and Path(path).is_dir() else path


# ---- detections ----------------------------------------------------------------------------


def draw_results(
    path: Path, dataset: str, runs: Mapping[str, str], *, images: int, score: float
) -> None:
    """The first images of a dataset: the truth, and what each student of some runs detects.

    Args:
        path: of the picture to write.
        dataset: with boxes, registered.
        runs: title -> OUTPUT_DIR of a run, with ``student_config.yaml`` and ``model_final.pth``.
        images: how many.
        score: what is scored lower is not drawn.

    Raises:
        UserError: a dataset without boxes, a folder without a run, or other classes.
    """
    _check_datasets([dataset])
    records = [x for x in DatasetCatalog.get(dataset) if "annotations" in x][:images]
    names = MetadataCatalog.get(dataset).get("thing_classes")
    if not records or names is None:
        raise UserError(f"dataset {dataset} has no boxes to draw; name another with --dataset")
    pictures = [picture_of(x) for x in records]
    truth = [truth_of(x) for x in records]
    rows = [Row("truth", None)]
    for folder in runs.values():
        for name in ("student_config.yaml", "model_final.pth"):
            if not Path(folder, name).is_file():
                raise UserError(f"{folder} is no folder of a run that has ended: it has no {name}")
    for title, folder in tqdm(runs.items(), desc="detect", unit="model", disable=None):
        predictor = Predictor.load(str(Path(folder) / "student_config.yaml"))
        rows.append(Row(title, _detect(predictor, pictures, score, names)))
    caption = f"scores above {score}: green boxes are right, red ones are wrong"
    save_figure(detection_grid(pictures, truth, rows, names, caption), path)


def _detect(
    predictor: Predictor, pictures: Sequence[Image], score: float, names: Sequence[str]
) -> list[Any]:
    if predictor.classes is not None and list(predictor.classes) != list(names):
        raise UserError(
            f"a model of the classes {', '.join(predictor.classes[:4])}, ... is not for objects of "
            f"{', '.join(names[:4])}, ...; name a dataset of its own with --dataset"
        )
    found = []
    for picture in pictures:
        output = predictor(picture)
        if "instances" not in output:
            raise UserError(f"{type(predictor.model).__name__} detects no boxes")
        instances = output["instances"]
        found.append(instances[instances.scores >= score])
    return found


# ---- features --------------------------------------------------------------------------------


def layers_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """What is compared of a backbone: residual blocks, and convolutions outside them."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            kind = type(child).__name__
            if isinstance(child, nn.Conv2d) or kind.endswith(("Block", "Bottleneck", "Residual")):
                found[prefix + name] = child
            else:
                walk(child, f"{prefix}{name}.")

    walk(backbone, "")
    return found


# Places across an image -> (N, C), see pool_places: as many as the map has cells, at most four.
_Places = dict[int, Tensor]
_GRIDS = (1, 2, 3, 4)


def _places(x: Tensor) -> _Places:
    return {g: pool_places(x, g).cpu() for g in _GRIDS if g <= min(x.shape[-2:])}


def _join(parts: Sequence[_Places]) -> _Places:
    return {g: torch.cat([x[g] for x in parts]) for g in parts[0]}


class _Features(NamedTuple):
    """Of one student and of its teacher, on the same images."""

    #: pyramid level -> its places, the student's and the teacher's
    levels: list[dict[str, _Places]]
    #: layer of the backbone -> its places, the student's and the teacher's, in the order of running
    layers: list[dict[str, _Places]]
    #: paired level -> (C,), the CKA of each channel as PCKA sees it
    channels: dict[str, Tensor]
    #: paired level -> (1, C, H, W) of the first image, the student's and the teacher's
    first: dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def _look(model: DistillationModel, inputs: Sequence[dict[str, Any]], projected: bool) -> _Features:
    """What teacher and student make of images; are the 1x1 convolutions between them trained?"""
    assert model.teacher is not None
    sides: tuple[Any, Any] = model.student, model.teacher.model
    loss = next((x for x in model.losses if isinstance(x, PCKALoss)), None)
    levels: list[dict[str, list[_Places]]] = [{}, {}]
    layers: list[dict[str, list[_Places]]] = [{}, {}]
    channels: dict[str, list[Tensor]] = {}
    first: dict[str, tuple[Tensor, Tensor]] = {}
    modules = [layers_of(x.backbone) for x in sides]
    recorders = [Recorder(x) for x in modules]
    # Called when a layer is run for the first time.
    begin = [
        {name: functools.partial(_enter, into, name) for name in names}
        for into, names in zip(layers, modules)
    ]
    for start in tqdm(range(0, len(inputs), _BATCH), desc="features", disable=None):
        batch = list(inputs[start : start + _BATCH])
        with (
            recorders[0].recording(begin[0]) as mine_called,
            recorders[1].recording(begin[1]) as theirs_called,
        ):
            mine, theirs = model.feature_maps(batch)
        for into, maps in zip(levels, (mine, theirs)):
            for level, x in maps.items():
                into.setdefault(level, []).append(_places(x))
        for into, record in zip(layers, (mine_called, theirs_called)):
            for name, calls in record.items():
                if len(calls) == 1 and calls[0].output.dim() == 4:
                    into[name].append(_places(calls[0].output))
        for level, pair in model.pairs.items():
            x, y = mine[level], theirs[pair.teacher]
            if x.shape[-2:] != y.shape[-2:]:
                y = F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=False)
            first.setdefault(level, (x[:1].float().cpu(), y[:1].float().cpu()))
            # PCKA is of a batch: that of a smaller one would be another.
            if loss is None or level not in loss.levels or len(batch) < _BATCH:
                continue
            if level in loss.projections and projected:
                x = loss.projections[level](x)
            if x.shape == y.shape:
                channels.setdefault(level, []).append(_channel_cka(loss, level, x, y))
    return _Features(
        [{k: _join(v) for k, v in x.items()} for x in levels],
        [{k: _join(v) for k, v in x.items() if v} for x in layers],
        {k: torch.stack(v).mean(0).cpu() for k, v in channels.items()},
        first,
    )


def _enter(into: dict[str, list[_Places]], name: str, _: Any) -> None:
    into.setdefault(name, [])


def _channel_cka(loss: PCKALoss, level: str, x: Tensor, y: Tensor) -> Tensor:
    """(C,): the CKA of each channel, by the layout and the patches of a loss."""
    layout = loss.options["layout"] if loss.options["layout"] in CHANNEL_LAYOUTS else "spatial"
    size = min(loss.patch_size(level), *x.shape[-2:])
    patches = [to_patches(z, size, layout) for z in (x, y)]
    return linear_cka(*patches, center=loss.options["center"])


def cka_matrix(x: Mapping[str, _Places], y: Mapping[str, _Places]) -> Tensor:
    """(len(x), len(y)): the debiased linear CKA of each with each, on the finest grid of both."""
    pairs = [(a, b) for a in x.values() for b in y.values()]
    values = []
    for a, b in tqdm(pairs, desc="CKA", unit="pair", disable=None):
        grid = max(a.keys() & b.keys())
        values.append(linear_cka(a[grid], b[grid], debiased=True))
    return torch.stack(values).view(len(x), len(y))


def draw_cka(
    cfg: CfgNode, students: Mapping[str, str], dataset: str, folder: Path, images: int
) -> dict[str, dict[str, float]]:
    """Pictures of how alike a teacher's and its students' features are.

    ``levels.png`` and ``layers.png``: CKA of every pyramid level, and of every layer of the
    backbone, with every one of the teacher's; ``channels.png``: for each paired level the CKA of
    each channel, as PCKA sees it; ``relations.png``: the Gram matrices of the patches of the first
    image; ``features.png``: its feature maps.

    Args:
        cfg: of a distillation.
        students: title -> checkpoint, or folder of a run; empty is the student as ``cfg`` begins.
        dataset: whose first images are looked at.
        folder: to write into.
        images: how many; no fewer than a batch of 8.

    Returns:
        title -> paired level -> CKA with the teacher, also written to ``cka.json``.
    """
    if images < _BATCH:
        raise UserError(f"--images is {images}; it must be at least {_BATCH}")
    _check_datasets([dataset])
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DISTILL.TEACHER.CACHE.DIR = ""
    # Of a student that begins at random there is one.
    seed_all_rng(max(cfg.SEED, 0))
    model: Any = build_registered(cfg, "the model")
    if not isinstance(model, DistillationModel) or not model.pairs:
        raise UserError(
            "the config compares no features with a teacher's: name one of a distillation"
        )
    model.eval()
    begin = {k: v.clone() for k, v in model.state_dict().items()}
    files = {title: _checkpoint_in(path) for title, path in students.items()}
    for path in files.values():
        if path and "://" not in path and not Path(path).is_file():
            raise UserError(f"checkpoint not found: {path}; change --students")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {reason(e)}; change --out") from e
    records = DatasetCatalog.get(dataset)[:images]
    prepare = Predictor(cfg, model.student).prepare
    if len(records) < _BATCH:
        raise UserError(
            f"dataset {dataset} has {len(records)} images; at least {_BATCH} are needed"
        )
    pictures = [picture_of(x) for x in records]
    inputs = [prepare(x) for x in pictures]
    found: dict[str, _Features] = {}
    for title, path in files.items():
        model.load_state_dict(begin)
        weights = path or cfg.MODEL.WEIGHTS
        checkpointer = StrictCheckpointer(model, trusted=cfg.TRUST_CHECKPOINT)
        _resume_or_load(checkpointer, weights, False)
        if path and (checkpointer.mismatch.shapes or checkpointer.mismatch.missing):
            raise UserError(f"{weights} is not the student's: {checkpointer.mismatch}")
        state = model.state_dict()
        own = [k for k in begin if k.startswith("distill.")]
        # Of a student alone the 1x1 convolutions are those that it began with.
        known = not path or not own or not all(torch.equal(state[k], begin[k]) for k in own)
        found[title] = _look(model, inputs, known)
    titles = list(found)
    for name, of in (("levels", "levels"), ("layers", "layers")):
        matrices = [cka_matrix(*getattr(x, of)) for x in found.values()]
        axes = [list(y) for y in getattr(next(iter(found.values())), of)]
        _draw_matrices(folder / f"{name}.png", titles, matrices, axes)
        if name == "levels":
            values = {
                title: {
                    k: float(m[axes[0].index(k), axes[1].index(pair.teacher)])
                    for k, pair in model.pairs.items()
                }
                for title, m in zip(titles, matrices)
            }
    _draw_channels(folder / "channels.png", {k: x.channels for k, x in found.items()})
    first = {k: x.first for k, x in found.items()}
    sizes = dict.fromkeys(model.pairs, 1)
    for loss in model.losses:
        if isinstance(loss, PCKALoss):
            sizes.update({k: loss.patch_size(k) for k in loss.levels})
    _draw_relations(folder / "relations.png", first, sizes)
    _draw_maps(folder / "features.png", first, pictures[0], inputs[0])
    (folder / "cka.json").write_text(json.dumps(values, indent=1))
    return values


def _draw_matrices(
    path: Path, titles: Sequence[str], matrices: Sequence[Tensor], axes: Sequence[list[str]]
) -> None:
    """A heatmap for each student: its levels or layers down, the teacher's across."""
    rows, columns = (max(len(x), 4) for x in axes)
    small = max(rows, columns) > _NUMBERED
    inches = 0.16 if small else 0.55
    figure, grid = figure_of(len(titles), 1, inches * columns + 1.4, inches * rows + 1.4)
    low = min(0.0, *(float(x.min()) for x in matrices))
    for i, (title, matrix, axis) in enumerate(zip(titles, matrices, grid[0])):
        shown = axis.imshow(matrix, vmin=low, vmax=1, cmap="magma", aspect="auto")
        axis.set_title(title)
        axis.set_xlabel("teacher")
        axis.set_xticks(range(len(axes[1])), axes[1], rotation=90, fontsize=6 if small else 9)
        axis.set_yticks(range(len(axes[0])), axes[0] if not i else [""] * len(axes[0]))
        axis.tick_params("y", labelsize=6 if small else 9)
        if not i:
            axis.set_ylabel("student")
        if not small:
            for y, row in enumerate(matrix.tolist()):
                for x, value in enumerate(row):
                    color = "black" if value > (1 + low) / 2 else "white"
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, size=8)
    figure.colorbar(shown, ax=grid[0].tolist(), label="CKA (linear, debiased)")
    save_figure(figure, path)


def _draw_channels(path: Path, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """For each level a histogram of its channels' CKA, of every student."""
    levels = list(dict.fromkeys(level for x in found.values() for level in x))
    figure, grid = figure_of(max(len(levels), 1), 1, 3.4, 2.8)
    for level, axis in zip(levels, grid[0]):
        for title, channels in found.items():
            if level in channels:
                label = f"{title}: mean {channels[level].mean():.2f}"
                bins = torch.linspace(0, 1, 26).tolist()
                axis.hist(channels[level].tolist(), bins=bins, histtype="step", label=label, lw=1.5)
        axis.set_title(level)
        axis.set_xlabel("CKA of a channel with the teacher's")
        axis.set_ylabel("channels")
        axis.legend(fontsize=7)
    if not levels:
        grid[0][0].set_axis_off()
        grid[0][0].text(
            0.5,
            0.5,
            "no channels to compare: the config has no PCKA, or widths differ",
            ha="center",
            va="center",
            wrap=True,
        )
    save_figure(figure, path)


_First = Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]


def _sides(first: _First, level: str) -> Iterator[tuple[str, Tensor]]:
    """Title and map (1, C, H, W), the teacher's first."""
    yield "teacher", next(iter(first.values()))[level][1]
    for title, maps in first.items():
        yield title, maps[level][0]


def _draw_relations(path: Path, first: _First, sizes: Mapping[str, int]) -> None:
    """The Gram matrix of the patches of an image, by level, of the teacher and each student."""
    levels = [k for k, (x, _) in next(iter(first.values())).items() if min(x.shape[-2:]) > 1]
    figure, grid = figure_of(len(first) + 1, max(len(levels), 1), 2.4, 2.5)
    for level, axes in zip(levels, grid):
        for axis, (title, x) in zip(axes, _sides(first, level)):
            size = min(sizes[level], min(x.shape[-2:]) // 2)
            patches = to_patches(x, size, "spatial")
            patches = patches - patches.mean(-2, keepdim=True)
            gram = (patches @ patches.mT).mean(0)
            axis.imshow(gram / gram.abs().max().clamp(min=1e-12), vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set_title(title)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0].set_ylabel(f"{level}, {len(gram)} patches")
    save_figure(figure, path)


def _draw_maps(path: Path, first: _First, picture: Image, prepared: dict[str, Any]) -> None:
    """The length of the features at each place of an image, by level."""
    levels = list(next(iter(first.values())))
    height, width = prepared["image"].shape[-2:]
    figure, grid = figure_of(len(first) + 2, len(levels), 2.2, 2.2 * height / width + 0.3)
    for level, axes in zip(levels, grid):
        axes[0].imshow(picture)
        axes[0].set_ylabel(level)
        for axis, (title, x) in zip(axes[1:], _sides(first, level)):
            axis.imshow(torch.linalg.vector_norm(x[0], dim=0), cmap="viridis")
            axis.set_title(title)
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
    save_figure(figure, path)
