"""Teacher and students side by side: how alike their features are, and what they detect."""

from __future__ import annotations

import functools
import io
import json
import logging
import tempfile
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
from pcka_distill.checkpoint import StrictCheckpointer, write_whole
from pcka_distill.drawing import (
    Image,
    Row,
    detection_grid,
    figure_of,
    picture_of,
    truth_of,
)
from pcka_distill.engine import _check_datasets, _resume_or_load
from pcka_distill.errors import UserError, reason
from pcka_distill.functional import CHANNEL_LAYOUTS, linear_cka, pool_places, to_patches
from pcka_distill.inference import Predictor
from pcka_distill.losses import PCKALoss
from pcka_distill.meta_arch import DistillationModel

__all__ = [
    "MOST_IMAGES",
    "check_target",
    "draw_cka",
    "draw_results",
    "layers_of",
    "named_folders",
    "save_figure",
]

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")

#: images with detections in one picture: of more it would be of no use, and hundreds of megabytes
MOST_IMAGES = 24

# As in training: PCKA is of a batch.
_BATCH = 8
# Beyond so many rows a heatmap has no numbers in its cells.
_NUMBERED = 8
_PICTURES = ("levels", "layers", "channels", "relations", "features")
_ENDINGS = (".jpeg", ".jpg", ".pdf", ".png", ".svg", ".tif", ".tiff", ".webp")


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
            # Of a folder that is named "." too.
            title, sign, path = Path(text).resolve().name, "=", text
        if not (title and sign):
            raise UserError(f"{text!r} is no TITLE=PATH")
        if title in found:
            raise UserError(
                f"two are called {title!r}: {found[title]} and {path}; write TITLE=PATH, with a "
                "title of its own for each"
            )
        found[title] = path
    return found


def check_target(path: Path) -> None:
    """Refuse what could not be written once the work is done; folders above it are made.

    Raises:
        UserError: it is a folder, or cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise UserError(f"{path} cannot be written: {reason(e)}; change --out") from e


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a picture, whole or not at all.

    Raises:
        UserError: it cannot be written there.
    """
    from matplotlib.artist import Artist

    # Most of what it takes is spent on the parts of a figure, one after the other.
    bar = tqdm(total=len(figure.axes), desc=f"draw {path.name}", disable=None, leave=False)

    class Tick(Artist):
        def draw(self, renderer: Any) -> None:
            bar.update()

    for axis in figure.axes:
        axis.add_artist(Tick()).set_in_layout(False)
    ending = path.suffix[1:].lower()
    options = {"pil_kwargs": {"quality": 90}} if ending in ("jpg", "jpeg", "webp") else {}
    data = io.BytesIO()
    try:
        with bar:
            figure.savefig(data, format=ending, dpi="figure", **options)
        write_whole(path, lambda f: f.write(data.getvalue()))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be written: {reason(e)}; change --out") from e


def _checkpoint_in(path: str) -> str:
    return str(Path(path) / "model_final.pth") if path and Path(path).is_dir() else path


# ---- detections ----------------------------------------------------------------------------


def draw_results(
    path: Path,
    dataset: str,
    runs: Mapping[str, str],
    *,
    images: int,
    score: float,
    opts: Sequence[Any] = (),
) -> None:
    """The first images of a dataset: the truth, and what each student of some runs detects.

    Args:
        path: of the picture to write; its ending says of what kind.
        dataset: with boxes, registered.
        runs: title -> OUTPUT_DIR of a run, with ``student_config.yaml`` and ``model_final.pth``.
        images: how many, at most 24.
        score: what is scored lower is not drawn.
        opts: of the students' configs, see :meth:`.Predictor.load`.

    Raises:
        UserError: a dataset without boxes, a folder without a run, other classes, or a picture
            that cannot be written.
    """
    if images > MOST_IMAGES:
        raise UserError(f"--images is {images}; at most {MOST_IMAGES} are drawn")
    if path.suffix.lower() not in _ENDINGS and not path.is_dir():
        raise UserError(f"{path} has none of the endings {' '.join(_ENDINGS)}; change --out")
    check_target(path)
    _check_datasets([dataset])
    records = [x for x in DatasetCatalog.get(dataset) if "annotations" in x][:images]
    names = MetadataCatalog.get(dataset).get("thing_classes")
    if not records or names is None:
        raise UserError(f"dataset {dataset} has no boxes to draw; name another with --dataset")
    pictures = _read(records)
    truth = [truth_of(x) for x in records]
    rows = [Row("truth", None)]
    for folder in runs.values():
        for name in ("student_config.yaml", "model_final.pth"):
            if not Path(folder, name).is_file():
                raise UserError(f"{folder} is no folder of a run that has ended: it has no {name}")
    total = len(runs) * len(pictures)
    with tqdm(total=total, desc="detect", unit="image", disable=None) as bar:
        for title, folder in runs.items():
            predictor = Predictor.load(str(Path(folder) / "student_config.yaml"), "", opts)
            rows.append(Row(title, _detect(predictor, pictures, score, names, bar)))
    caption = f"scores above {score}: green boxes are right, red ones are wrong"
    save_figure(detection_grid(pictures, truth, rows, names, caption), path)


def _read(records: Sequence[dict[str, Any]]) -> list[Image]:
    return [picture_of(x) for x in tqdm(records, desc="read", unit="image", disable=None)]


def _detect(
    predictor: Predictor,
    pictures: Sequence[Image],
    score: float,
    names: Sequence[str],
    bar: tqdm[Any],
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
        bar.update()
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
_MOST_STRIDE = 64


def _places(x: Tensor) -> _Places:
    return {g: pool_places(x, g).cpu() for g in _GRIDS if g <= min(x.shape[-2:])}


def _join(parts: Sequence[_Places]) -> _Places:
    # Batches of smaller images may have maps of fewer cells.
    grids = [g for g in parts[0] if all(g in x for x in parts)]
    return {g: torch.cat([x[g] for x in parts]) for g in grids}


def _is_channels_last(layer: nn.Module, shape: torch.Size) -> bool | None:
    """Of an output of 3 or 4 axes; None where it cannot be known.

    Layer normalisation, which transformers have and convolutional blocks have not, says how many
    channels there are.
    """
    norms = [x for x in layer.children() if isinstance(x, nn.LayerNorm)]
    norms = norms or [x for x in layer.modules() if isinstance(x, nn.LayerNorm)]
    widths = {x.normalized_shape[0] for x in norms}
    first, last = shape[1] in widths, shape[-1] in widths
    if len(shape) == 3:
        return last or None
    if not widths:
        return False
    return last if first != last else None


def _from_tokens(x: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens (B, L, C) as maps (B, C, H, W) of images of a size, in pixels.

    Where L is not that of maps of any stride, with a class token before it or without, places are
    not known: (B, C, 1, 1), the mean of the tokens.
    """
    for extra in (0, 1):
        for stride in range(1, _MOST_STRIDE + 1):
            rows, cols = (-(-side // stride) for side in size)
            if rows * cols == x.shape[1] - extra:
                return x[:, extra:].mT.unflatten(2, (rows, cols))
    return x.mean(1)[..., None, None]


def _layer_places(layer: nn.Module, output: Any, images: Sequence[int]) -> _Places | str:
    """What a layer says of places, or why that is not known.

    Args:
        layer: with channels first or last, or with tokens.
        output: what it gave.
        images: the shape (B, 3, H, W) of the batch.
    """
    if not isinstance(output, Tensor):
        return f"they give no tensor but a {type(output).__name__}"
    if output.dim() not in (3, 4) or len(output) != images[0]:
        return f"{tuple(output.shape)} are no maps of {images[0]} images"
    last = _is_channels_last(layer, output.shape)
    if last is None:
        return f"which axis of {tuple(output.shape)} are the channels cannot be known"
    if output.dim() == 3:
        output = _from_tokens(output, images[-2:])
    elif last:
        output = output.movedim(-1, 1)
    return _places(output)


class _Watch:
    """Pools what the layers of a backbone give as soon as they do: whole, they are gigabytes.

    Args:
        backbone: see :func:`layers_of`. It is watched until the end of a with block.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._parts: dict[str, list[_Places]] = {}
        self._why: dict[str, str] = {}
        self._batches = 0
        self._images: tuple[int, ...] = ()
        self._handles = [backbone.register_forward_pre_hook(self._begin)]
        for name, layer in layers_of(backbone).items():
            hook = functools.partial(self._see, name)
            self._handles.append(layer.register_forward_hook(hook))

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._batches += 1
        self._images = tuple(args[0].shape)

    def _see(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        parts = self._parts.setdefault(name, [])
        if name in self._why:
            return
        found = _layer_places(layer, output, self._images)
        if isinstance(found, str):
            self._why[name] = found
        else:
            parts.append(found)
            if len(parts) > self._batches:
                self._why[name] = "they run more than once"

    def found(self) -> tuple[dict[str, _Places], dict[str, str]]:
        """Layer -> its places, in the order of running; and layer -> why it has none."""
        for name, parts in self._parts.items():
            if len(parts) < self._batches:
                self._why.setdefault(name, "they do not run for all images")
        known = {k: _join(v) for k, v in self._parts.items() if k not in self._why}
        return known, self._why


class _Features(NamedTuple):
    """Of one student and of its teacher, on the same images."""

    #: pyramid level -> its places, the student's and the teacher's
    levels: list[dict[str, _Places]]
    #: layer of the backbone -> its places, the student's and the teacher's, in the order of running
    layers: list[dict[str, _Places]]
    #: layer of the backbone -> why it is left out, the student's and the teacher's
    without: list[dict[str, str]]
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
    channels: dict[str, list[Tensor]] = {}
    first: dict[str, tuple[Tensor, Tensor]] = {}
    bar = tqdm(total=len(inputs), desc="features", unit="image", disable=None)
    with bar, _Watch(sides[0].backbone) as my_layers, _Watch(sides[1].backbone) as their_layers:
        for start in range(0, len(inputs), _BATCH):
            batch = list(inputs[start : start + _BATCH])
            mine, theirs = model.feature_maps(batch)
            for into, maps in zip(levels, (mine, theirs)):
                for level, x in maps.items():
                    into.setdefault(level, []).append(_places(x))
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
            bar.update(len(batch))
    layers, without = zip(*(x.found() for x in (my_layers, their_layers)))
    return _Features(
        [{k: _join(v) for k, v in x.items()} for x in levels],
        list(layers),
        list(without),
        {k: torch.stack(v).mean(0).cpu() for k, v in channels.items()},
        first,
    )


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

    Raises:
        UserError: too few images, no distillation of features, a checkpoint that is not the
            student's, or a folder that cannot be written.
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
    for name in ("cka.json", *(f"{x}.png" for x in _PICTURES)):
        check_target(folder / name)
    records = DatasetCatalog.get(dataset)[:images]
    prepare = Predictor(cfg, model.student).prepare
    if len(records) < _BATCH:
        raise UserError(
            f"dataset {dataset} has {len(records)} images; at least {_BATCH} are needed"
        )
    pictures = _read(records)
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
    # All of them are of one architecture.
    some = next(iter(found.values()))
    _tell(some.without)
    for name in ("levels", "layers"):
        axes = [list(x) for x in getattr(some, name)]
        if not all(axes):
            _draw_nothing(folder / f"{name}.png", "no layers to compare")
            continue
        matrices = [cka_matrix(*getattr(x, name)) for x in found.values()]
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
    text = json.dumps(values, indent=1).encode()
    try:
        write_whole(folder / "cka.json", lambda f: f.write(text))
    except OSError as e:
        raise UserError(f"{folder}/cka.json cannot be written: {reason(e)}; change --out") from e
    return values


def _tell(without: Sequence[Mapping[str, str]]) -> None:
    """On one line, which layers are not compared and why."""
    parts = []
    for side, reasons in zip(("student", "teacher"), without):
        for why in dict.fromkeys(reasons.values()):
            names = [k for k, v in reasons.items() if v == why]
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            parts.append(f"{', '.join(names[:2])}{more} of the {side}: {why}")
    if parts:
        logger.warning(f"Layers that are left out of layers.png: {'; '.join(parts)}")


def _draw_nothing(path: Path, text: str) -> None:
    figure, grid = figure_of(1, 1, 3.4, 2.8)
    grid[0][0].set_axis_off()
    grid[0][0].text(0.5, 0.5, text, ha="center", va="center", wrap=True)
    save_figure(figure, path)


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
    if not levels:
        _draw_nothing(path, "no channels to compare:\nthe config has no PCKA, or widths differ")
        return
    figure, grid = figure_of(len(levels), 1, 3.4, 2.7 + 0.18 * len(found))
    for level, axis in zip(levels, grid[0]):
        for title, channels in found.items():
            if level in channels:
                label = f"{title}: mean {channels[level].mean():.2f}"
                bins = torch.linspace(0, 1, 26).tolist()
                axis.hist(channels[level].tolist(), bins=bins, histtype="step", label=label, lw=1.5)
        axis.set_xlabel("CKA of a channel with the teacher's")
        axis.set_ylabel("channels")
        # Above, where there is nothing that it could hide.
        axis.legend(title=level, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
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
