"""A trained student to give away: a slim checkpoint, TorchScript, ONNX, and a model card."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, LazyConfig
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from PIL.Image import DecompressionBombError
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from tqdm import tqdm

from pcka_distill.checkpoint import read_checkpoint, write_whole
from pcka_distill.classifier import ImageClassifier
from pcka_distill.engine import stock_config
from pcka_distill.errors import UserError, reason
from pcka_distill.inference import Predictor, load_config
from pcka_distill.report import read_run

__all__ = ["FORMATS", "export_student", "find_image", "load_averaged"]

FORMATS = ("torchscript", "onnx")
_OPSET = 16
# Relative to the largest value: other kernels round in another order.
_TOLERANCE = 1e-3
_SHORT = 300
# Of torch's tracers, about its own ways and about sizes that are constants of a graph.
_TRACERS = (
    ".*deprecated",
    ".*legacy TorchScript-based ONNX export",
    "The feature will be removed",
    "Constant folding",
    "Exporting aten",
)
# Overrides by which nothing of a model is another.
_NO_CHANGE = {"TRUST_CONFIG", "TRUST_CHECKPOINT", "MODEL.DEVICE"}
_FILES = {"torchscript": "model.ts", "onnx": "model.onnx"}
# What all of Detectron2's detectors call it.
_THRESHOLD = "test_score_thresh"
# All that an export writes.
_WRITTEN = ("model_final.pth", "student_config.yaml", "classes.json", "model_card.md",
            *_FILES.values())  # fmt: skip

Image = np.ndarray[Any, Any]


def find_image(path: str, config: str, opts: Sequence[Any] = ()) -> Image:
    """A picture to compare on, (H, W, 3), uint8, RGB.

    Args:
        path: of it; empty takes the first that the student is tested on.
        config, opts: see :meth:`.Predictor.load`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    datasets = [x for x in load_config(config, opts).DATASETS.TEST if x in DatasetCatalog]
    try:
        record: dict[str, Any] = {"file_name": path}
        if not path and datasets:
            record = DatasetCatalog.get(datasets[0])[0]
        if "image" in record:
            found: Image = record["image"]
            return found
        if record["file_name"]:
            return read_image(record["file_name"], format="RGB")
    except (OSError, ValueError, SyntaxError, LookupError, DecompressionBombError) as e:
        # What Pillow and the readers of a dataset raise of files that are not there or damaged, of
        # pictures of gigabytes, of records without a file and of datasets without records.
        raise UserError(f"no picture to compare on ({reason(e)}); name one with --image") from e
    raise UserError("name a picture with --image, on which to compare what is written")


def load_averaged(cfg: CfgNode, model: nn.Module, key: str) -> None:
    """Put another set of weights of a checkpoint into a student, an average of them mostly.

    Args:
        cfg: MODEL.WEIGHTS names the checkpoint.
        model: of its weights.
        key: of the checkpoint, whose value is a state_dict: names may begin with ``module.`` and
            ``student.``, as those of :class:`torch.optim.swa_utils.AveragedModel` do.

    Raises:
        UserError: there is no such key, or what it has is not the student's.
    """
    content = read_checkpoint(cfg.MODEL.WEIGHTS, trusted=cfg.TRUST_CHECKPOINT)
    if not isinstance(content.get(key), Mapping):
        raise UserError(f"{cfg.MODEL.WEIGHTS} has no weights {key!r}, but {', '.join(content)}")
    state = {
        name.removeprefix("module.").removeprefix("student."): value
        for name, value in content[key].items()
    }
    state = {k: v for k, v in state.items() if k != "n_averaged" and not k.startswith("distill.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise UserError(f"{key!r} of {cfg.MODEL.WEIGHTS} is not the student's: {reason(e)}") from e


def export_student(
    config: str,
    folder: Path,
    image: Image,
    *,
    weights: str = "",
    key: str = "model",
    half: bool = False,
    formats: Sequence[str] = (),
    fields: Mapping[str, str] | None = None,
    opts: Sequence[Any] = (),
) -> list[str]:
    """Write a student into a folder: checkpoint, config, model card, and perhaps graphs of it.

    The folder is complete: it names no other, and is what ``tools/predict.py`` takes, with the
    names of its classes where they are known. All that is
    written is read again and compared with the model it came from. Files of an earlier export are
    removed first.

    Args:
        config, weights, opts: see :meth:`.Predictor.load`.
        folder: is made.
        image: (H, W, 3), uint8, RGB: on which the written models are compared with the student.
        key: of the checkpoint, whose weights to take; see :func:`load_averaged`.
        half: write weights in half precision.
        formats: some of :data:`FORMATS`, made by Detectron2's exporter.
        fields: of the card: what the files do not say, such as licences.

    Returns:
        what was written and how it compared, a line each.

    Raises:
        UserError: no checkpoint, a model that cannot be exported, one that came out different, or a
            picture in which it finds nothing, where that can be compared in no other way.
    """
    for taken in {Path(config).resolve().parent, Path(weights or config).resolve().parent}:
        if folder.resolve() == taken or (folder / "last_checkpoint").exists():
            raise UserError(f"{folder} holds a run, which would be lost; choose another with --out")
    predictor = Predictor.load(config, weights, [*opts, "MODEL.DEVICE", "cpu"])
    if key != "model":
        load_averaged(predictor.cfg, predictor.model, key)
    if formats:
        _check_traced(predictor, image)
    lines = []
    steps = tqdm(total=1 + len(formats), unit="file", disable=None, leave=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _WRITTEN:
            # A graph of other weights would pass for one of these.
            (folder / name).unlink(missing_ok=True)
        names = {"classes": predictor.classes, "stuff": predictor.stuff}
        known = {k: list(v) for k, v in names.items() if v}
        if known:
            text = json.dumps(known, indent=1)
            write_whole(folder / "classes.json", lambda f: f.write(text.encode()))
        steps.set_description("export checkpoint")
        lines.append(_write_checkpoint(predictor, folder, image, half))
        for kind in formats:
            steps.update()
            steps.set_description(f"export {kind}")
            lines.append(_trace(predictor, image, folder, kind))
        final = Path(config).resolve().parent / "model_final.pth"
        changed = set(map(str, opts[::2])) - _NO_CHANGE
        source = Path(predictor.cfg.MODEL.WEIGHTS).resolve()
        evaluated = key == "model" and not changed and source == final
        card = _card(predictor, Path(config).parent, evaluated, lines, fields or {})
        write_whole(folder / "model_card.md", lambda f: f.write(card.encode()))
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {reason(e)}; change --out") from e
    finally:
        steps.close()
    return lines


def _write_checkpoint(predictor: Predictor, folder: Path, image: Image, half: bool) -> str:
    """The student's tensors and nothing else, with the yaml that stock Detectron2 builds it by."""
    state = {
        k: v.half() if half and v.is_floating_point() else v
        for k, v in predictor.model.state_dict().items()
    }
    path = folder / "model_final.pth"
    write_whole(path, lambda f: torch.save({"model": state}, f))
    config, text = folder / "student_config.yaml", _yaml(predictor, path.name)
    write_whole(config, lambda f: f.write(text.encode()))
    # Of a LazyConfig it was asked before.
    opts = ["MODEL.DEVICE", "cpu", "TRUST_CONFIG", predictor.cfg.TRUST_CONFIG]
    again = Predictor.load(str(config), "", opts)
    if half:
        differ = max(
            ((v - again.model.state_dict()[k]).abs() / v.abs().max().clamp(min=1e-12)).max().item()
            for k, v in predictor.model.state_dict().items()
            if v.is_floating_point() and v.numel()
        )
        if not differ < 2**-9:
            # Beyond what half precision can hold: infinite, or nothing left.
            raise UserError("the weights do not fit into half precision; leave out --half")
        how = f"weights differ by up to {differ:.1e} of a tensor's largest"
    else:
        expected, names = _flat_outputs(predictor.model, predictor.prepare(image))
        found, _ = _flat_outputs(again.model, again.prepare(image))
        # Of an image without objects the predictions are equal whatever the weights are.
        same = again.model.state_dict()
        pairs = [*zip(expected, found), *((v, same[k]) for k, v in state.items())]
        if not all(torch.equal(x, y) for x, y in pairs):
            raise UserError("the checkpoint does not give the student's predictions again")
        nothing = _count(expected, names) == 0
        how = f"gives the same {'weights' if nothing else 'predictions'}, bit for bit"
    return f"{path.name}, {_megabytes(path)}: {how}"


def _yaml(predictor: Predictor, weights: str) -> str:
    """What is true of the model wherever it is."""
    if predictor.config is None:
        cfg = stock_config(predictor.cfg)
        cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = weights, "./output"
        text: str = cfg.dump()
        return text
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "lazy.yaml")
        # It writes into files alone.
        LazyConfig.save(predictor.config, str(path))
        return path.read_text()


def _adapter(model: nn.Module, prepared: dict[str, Any]) -> TracingAdapter:
    """Of an image tensor to tensors, in the coordinates of that image."""
    run: Callable[..., Any] | None = None
    if isinstance(model, GeneralizedRCNN):
        # Masks are pasted by what can be traced into no graph.
        def run(model: Any, inputs: Any) -> Any:
            return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]

    with torch.no_grad():
        adapter = TracingAdapter(model, [{"image": prepared["image"]}], run)
        # Learns the schema of its outputs.
        adapter(*adapter.flattened_inputs)
    return adapter.eval()


def _flat_outputs(model: nn.Module, prepared: dict[str, Any]) -> tuple[list[Tensor], list[str]]:
    """What a model says of an image, and what each part is called."""
    adapter = _adapter(model, prepared)
    with torch.no_grad():
        outputs = list(adapter(*adapter.flattened_inputs))
    schema = adapter.outputs_schema.schemas[0]
    names: list[str] = []
    for key, part in zip(schema.keys, schema.schemas):
        fields = getattr(part, "keys", None)
        names += [*fields, "image_size"] if fields else [key]
    return outputs, names


def _count(outputs: Sequence[Tensor], names: Sequence[str]) -> int | None:
    """Objects that were found; None of a model that finds none."""
    return len(outputs[names.index("pred_boxes")]) if "pred_boxes" in names else None


def _check_traced(predictor: Predictor, image: Image) -> None:
    """Refuse what is known to fail before anything is written."""
    kind = type(predictor.model).__name__
    if kind == "PanopticFPN":
        raise UserError("Detectron2's exporter knows no PanopticFPN; leave out --formats")
    outputs, names = _flat_outputs(predictor.model, predictor.prepare(image))
    if _count(outputs, names) != 0:
        return
    with _every_object(predictor.model):
        every, _ = _flat_outputs(predictor.model, predictor.prepare(image))
    # What is computed of each object is not traced without one.
    if "pred_masks" in names or _count(every, names) == 0:
        raise UserError(
            f"the {kind} finds no object in the picture, on which a graph could be compared with "
            "it; name another with --image, or leave out --formats"
        )


def _trace(predictor: Predictor, image: Image, folder: Path, kind: str) -> str:
    """By Detectron2's exporter; compared on the image, and on it in another size."""
    model, prepared = predictor.model, predictor.prepare(image)
    path = folder / _FILES[kind]
    data, names = _graph(model, prepared, kind)
    worst, seen, count = _prove(model, prepared, data, path, kind)
    how = f"on images of {seen}"
    if count == 0:
        # Nothing is equal to nothing, whatever the graph does: one of the same model that keeps
        # every object is made in the same way.
        with _every_object(model):
            every, _ = _graph(model, prepared, kind)
            worst, seen, _ = _prove(model, prepared, every, path, kind)
        how = f"in a copy without score threshold, on images of {seen}; with it nothing is found"
    write_whole(path, lambda f: f.write(data))
    return (
        f"{path.name}, {_megabytes(path)}: image (3, H, W) {prepared['image'].dtype} -> "
        f"{', '.join(names)}; differs from the student by up to {worst:.1e} of the largest value, "
        f"{how}"
    )


def _graph(model: nn.Module, prepared: dict[str, Any], kind: str) -> tuple[bytes, list[str]]:
    """A file of the model, and what its outputs are called."""
    adapter = _adapter(model, prepared)
    _, names = _flat_outputs(model, prepared)
    data = io.BytesIO()
    # A graph that fails is printed by torch, all of it.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(), torch.no_grad(), quiet:
        # That sizes and counts of this image are in the graph: it is compared with another one.
        warnings.simplefilter("ignore", TracerWarning)
        for text in _TRACERS:
            warnings.filterwarnings("ignore", message=text)
        try:
            if kind == "torchscript":
                # Torch's own check is left out: it runs the model twice, on the same image.
                graph = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
                torch.jit.save(graph, data)
            else:
                _to_onnx(adapter, data, names)
        except UserError:
            raise
        except Exception as e:
            # Of tracing: a dozen kinds, in torch and in onnx.
            why = reason(e)[:_SHORT]
            raise UserError(f"{type(model).__name__} cannot be exported as {kind}: {why}") from e
    return data.getvalue(), names


def _prove(
    model: nn.Module, prepared: dict[str, Any], data: bytes, path: Path, kind: str
) -> tuple[float, str, int | None]:
    """How a graph differs from the model, on which images, and the objects on the first."""
    # It gets its name when it is known to be right.
    with tempfile.TemporaryDirectory() as temporary:
        unproven = Path(temporary, path.name)
        unproven.write_bytes(data)
        run = _runner(unproven, kind)
    outputs, names = _flat_outputs(model, prepared)
    worst = _compare(outputs, run(prepared["image"]), path)
    seen = [_size(prepared["image"], _count(outputs, names))]
    # A classifier has one size.
    if "scores" not in names or "pred_classes" in names:
        other = nn.functional.interpolate(
            prepared["image"][None].float(), scale_factor=0.75, mode="bilinear"
        )[0].to(prepared["image"].dtype)
        expected, _ = _flat_outputs(model, {"image": other})
        worst = max(worst, _compare(expected, run(other), path))
        seen.append(_size(other, _count(expected, names)))
    return worst, " and ".join(seen), _count(outputs, names)


@contextlib.contextmanager
def _every_object(model: nn.Module) -> Iterator[None]:
    """Detectron2's detectors without their score threshold."""
    found = {x: getattr(x, _THRESHOLD) for x in model.modules() if hasattr(x, _THRESHOLD)}
    try:
        for module in found:
            setattr(module, _THRESHOLD, 0.0)
        yield
    finally:
        for module, value in found.items():
            setattr(module, _THRESHOLD, value)


def _size(image: Tensor, count: int | None) -> str:
    objects = "" if count is None else f" ({count} objects)"
    return f"{image.shape[1]} x {image.shape[2]}{objects}"


def _to_onnx(adapter: TracingAdapter, data: Any, names: list[str]) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as e:
        raise UserError(f"ONNX needs {e.name}: pip install 'pcka_distill[export]'") from e
    options: dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        # The newer exporter knows no detector of Detectron2.
        options["dynamo"] = False
    torch.onnx.export(
        adapter,
        adapter.flattened_inputs,
        data,
        opset_version=_OPSET,
        input_names=["image"],
        output_names=names,
        dynamic_axes={"image": {1: "height", 2: "width"}},
        **options,
    )


def _runner(path: Path, kind: str) -> Callable[[Tensor], list[Tensor]]:
    """What is in the file, as others will run it: an image (3, H, W) in, tensors out."""
    if kind == "torchscript":
        module = torch.jit.load(str(path))

        def run(image: Tensor) -> list[Tensor]:
            with torch.no_grad():
                found = module(image)
            return [found] if isinstance(found, Tensor) else list(found)

        return run
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(x) for x in session.run(None, {"image": image.numpy()})]


def _compare(expected: Sequence[Tensor], found: Sequence[Tensor], path: Path) -> float:
    """The largest difference of real numbers, relative to the largest value of a tensor."""
    worst = 0.0
    if len(expected) != len(found):
        raise UserError(f"{path} says something else than the student: {len(found)} tensors")
    for x, y in zip(expected, found):
        if x.shape != y.shape:
            raise UserError(
                f"{path} says something else than the student: {tuple(y.shape)} instead of "
                f"{tuple(x.shape)}"
            )
        if not x.is_floating_point():
            # Classes and sizes: none of them is nearly another.
            if (x != y).any():
                raise UserError(
                    f"{path} says something else than the student: {int((x != y).sum())} of "
                    f"{x.numel()} whole numbers are others"
                )
        elif x.numel():
            x, y = x.double(), y.double()
            differ = ((x - y).abs().max() / x.abs().max().clamp(min=1e-12)).item()
            # Also where it is not a number.
            if not differ <= _TOLERANCE:
                raise UserError(
                    f"{path} says something else than the student: it differs by {differ:.1e} of "
                    "the largest value"
                )
            worst = max(worst, differ)
    return worst


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


def _run_of(run: Path) -> tuple[dict[str, str], Any]:
    """By what a run was taught, and its results."""
    left = read_run("", run)
    keys, weights = left.config, {}
    if left.lazy:
        for key in [x for x in keys if re.fullmatch(r"model\.losses\.\d+\._target_", x)]:
            weight = keys.get(key.replace("_target_", "weight"), "of its default")
            weights[str(keys[key]).rpartition(".")[2]] = weight
        prefix, config, file = "model.teacher.", "config", "weights"
    else:
        taught = keys.get("MODEL.META_ARCHITECTURE") == "DistillationModel"
        for name in (taught and keys.get("MODEL.DISTILL.LOSSES")) or ():
            weights[name] = keys.get(f"MODEL.DISTILL.{name.upper()[:-4]}.WEIGHT")
        prefix, config, file = "MODEL.DISTILL.TEACHER.", "CONFIG_FILE", "WEIGHTS"
    results = left.results.get("results", {})
    if not weights:
        return {}, results
    # Of a teacher whose config is no file there is no name.
    teacher = keys.get(prefix + config, "a LazyConfig"), keys.get(prefix + file)
    return {
        # Where they lay says nothing to others.
        "taught by": " with ".join(Path(str(x)).name for x in teacher if x),
        "distillation losses": ", ".join(f"{k} (weight {w})" for k, w in weights.items()),
    }, results


def _metrics(results: Any) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Dataset, task and metrics, those of single classes left out, of what may be null."""
    for dataset, tasks in results.items() if isinstance(results, Mapping) else ():
        for task, metrics in tasks.items() if isinstance(tasks, Mapping) else ():
            found = metrics.items() if isinstance(metrics, Mapping) else ()
            numbers = {k: v for k, v in found if isinstance(v, (int, float)) and "-" not in k}
            if numbers:
                yield dataset, task, numbers


def _card(
    predictor: Predictor,
    run: Path,
    evaluated: bool,
    lines: Sequence[str],
    fields: Mapping[str, str],
) -> str:
    """What a user of the model asks: what it is, who taught it, how good it is, what is allowed."""
    cfg, model, names = predictor.cfg, predictor.model, predictor.classes
    count = sum(p.numel() for p in model.parameters())
    size = (
        f"{cfg.MODEL.CLASSIFIER.IMAGE_SIZE} x {cfg.MODEL.CLASSIFIER.IMAGE_SIZE} pixels"
        if isinstance(model, ImageClassifier)
        else f"shorter side {cfg.INPUT.MIN_SIZE_TEST} pixels, longer at most "
        f"{cfg.INPUT.MAX_SIZE_TEST}"
    )
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "not known"
    facts = {
        "model": f"{type(model).__name__}, {count / 1e6:.2f} M parameters",
        "classes": f"{len(names)}: {shown}" if names else shown,
        "images": f"{cfg.INPUT.FORMAT}, {size}; mean {list(cfg.MODEL.PIXEL_MEAN)}, "
        f"std {list(cfg.MODEL.PIXEL_STD)}",
        "trained on": ", ".join(cfg.DATASETS.TRAIN),
    }
    results = "\nThese weights were not evaluated.\n"
    if (run / "config.yaml").is_file():
        taught, left = _run_of(run)
        facts |= taught
        rows = [
            f"| {dataset} | {task} | {', '.join(f'{k} {v:.1f}' for k, v in metrics.items())} |\n"
            for dataset, task, metrics in _metrics(left)
        ]
        if rows and evaluated:
            head = "| dataset | task | in percent |\n|---|---|---|\n"
            results = "\n## Results\n\n" + head + "".join(rows)
    facts |= fields
    table = "\n".join(f"| {k} | {v} |" for k, v in facts.items())
    if names:
        lines = [*lines, "classes.json: the names of the classes"]
    files = "\n".join(f"- {x}" for x in lines)
    return (
        f"# {type(model).__name__}\n\n| | |\n|---|---|\n{table}\n{results}\n"
        f"## Files\n\n{files}\n- student_config.yaml: what Detectron2 builds it by, with the "
        "imports that its training had\n"
    )
