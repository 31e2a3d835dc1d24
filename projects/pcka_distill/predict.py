"""What a trained student finds in pictures, folders and videos."""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib.util
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import RotatedBoxes
from PIL import Image
from tqdm import tqdm

from pcka_distill.checkpoint import write_whole
from pcka_distill.drawing import draw_output
from pcka_distill.errors import UserError, reason
from pcka_distill.inference import Predictor, errors_of_a_tool
from pcka_distill.tool import run_tool, tool_parser

__all__ = ["cli", "describe", "find_inputs", "predict"]

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
_BEST = 5

HELP = """What a trained student finds: pictures with boxes, and a json.

    python tools/predict.py photos/ clip.mp4 --config output/student_config.yaml --out found
    pcka-predict 'photos/*.jpg' --config my.yaml --weights model_final.pth --out found --score 0.3

Takes pictures, folders, patterns and videos, and detectors, segmentation and classifiers. In the
output folder each input has a picture (or a video) of its name, and predictions.json has for each
what was found: boxes are [x, y, width, height] in pixels, masks are COCO's compressed RLE. Where a
folder has an a.jpg and an a.png, they are drawn as a.jpg.jpg and a.png.jpg.
"""


def find_inputs(patterns: Sequence[str]) -> list[tuple[Path, Path]]:
    """Every picture and video that is meant.

    Args:
        patterns: files, folders (with all below them), glob patterns.

    Returns:
        path -> what to call its picture or video below the output folder, in order and without
        repetition. Those that would have the same name keep their own ending in it.

    Raises:
        UserError: one that matches nothing, or two inputs that would have the same name.
    """
    known = (*IMAGES, *VIDEOS)
    found: dict[Path, Path] = {}
    for pattern in patterns:
        there = os.path.exists(pattern)
        matches = [pattern] if there else sorted(glob.glob(pattern, recursive=True))
        here: list[tuple[Path, Path]] = []
        for match in map(Path, matches):
            if match.is_dir():
                files = sorted(x for x in match.rglob("*") if x.suffix.lower() in known)
                here += [(x, x.relative_to(match)) for x in files]
            else:
                here.append((match, Path(match.name)))
        if not here:
            raise UserError(
                f"no pictures or videos in {pattern!r} (seen from {os.getcwd()}); expected files "
                f"that end in {' '.join(known)}, folders of them, or patterns in quotes"
            )
        for path, name in here:
            if path.suffix.lower() not in known:
                raise UserError(f"{path} is no picture or video: expected {' '.join(known)}")
            found.setdefault(path, name)
    endings = {x: ".mp4" if x.suffix.lower() in VIDEOS else ".jpg" for x in found}
    names = {path: name.with_suffix(endings[path]) for path, name in found.items()}
    taken = Counter(names.values())
    owners: dict[Path, Path] = {}
    for path, name in names.items():
        if taken[name] > 1:
            # Of a photo.jpg and a photo.png.
            names[path] = name = name.with_name(path.name + endings[path])
        other = owners.setdefault(name, path)
        if other != path:
            raise UserError(
                f"{other} and {path} would have the same name in the output folder; give each "
                "folder a run of its own"
            )
    return list(names.items())


def check_folder(patterns: Sequence[str], inputs: Sequence[tuple[Path, Path]], out: Path) -> None:
    """Refuse an output folder in which inputs would be written over, or taken for inputs again.

    Args:
        patterns, inputs: of :func:`find_inputs`.
        out: to write into.
    """
    if importlib.util.find_spec("cv2") is None:
        raise UserError("pictures are drawn by OpenCV; pip install opencv-python-headless")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} cannot be written: it is a file; change --out")
    own = out.resolve()
    parents = {path.resolve().parent for path, _ in inputs}
    folders = {Path(x).resolve() for x in patterns if os.path.isdir(x)}
    if own in parents or any(x == own or x in own.parents for x in folders):
        raise UserError(f"{out} is where the inputs are; choose another folder with --out")


def describe(
    output: dict[str, Any],
    classes: Sequence[str] | None,
    score: float,
    stuff: Sequence[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An output without what is scored below a threshold, and the same for a json.

    Args:
        output: of :class:`.Predictor`.
        classes: their names.
        score: the threshold.
        stuff: names of what is no thing, of a panoptic segmentation.
    """

    def name(index: int, names: Sequence[str] | None = classes) -> str:
        return names[index] if names and index < len(names) else str(index)

    if "instances" in output and isinstance(output["instances"].pred_boxes, RotatedBoxes):
        raise UserError("the model detects rotated boxes, which are not known here")
    output = dict(output)
    content: dict[str, Any] = {}
    if "instances" in output:
        found = output["instances"]
        found = output["instances"] = found[found.scores >= score]
        content["objects"] = [
            {"name": name(x["category_id"]), **{k: v for k, v in x.items() if k != "image_id"}}
            for x in instances_to_coco_json(found, 0)
        ]
    if "panoptic_seg" in output:
        content["segments"] = [
            {"name": name(x["category_id"], classes if x["isthing"] else stuff), **x}
            for x in output["panoptic_seg"][1]
        ]
    elif "sem_seg" in output:
        counts = np.bincount(output["sem_seg"].argmax(0).flatten().numpy())
        content["pixels"] = {name(k): int(n) for k, n in enumerate(counts) if n}
    if "scores" in output:
        scores, kinds = output["scores"].topk(min(_BEST, len(output["scores"])))
        content["best"] = [
            {"name": name(k), "category_id": k, "score": s}
            for k, s in zip(kinds.tolist(), scores.tolist())
        ]
    return output, content


def predict(
    predictor: Predictor, inputs: Sequence[tuple[Path, Path]], folder: Path, score: float
) -> dict[str, Any]:
    """Predict, draw and write.

    Args:
        predictor: a trained student.
        inputs: of :func:`find_inputs`.
        folder: pictures and ``predictions.json`` are written into it, the latter also of what is
            done when it is interrupted.
        score: what is scored lower is left out.

    Returns:
        what ``predictions.json`` says; files that cannot be read are in its ``unreadable``.

    Raises:
        UserError: nothing could be read, or the folder cannot be written.
        KeyboardInterrupt: Ctrl-C; it says what was done.
    """
    entries: list[dict[str, Any]] = []
    unreadable: list[str] = []
    content: dict[str, Any] = {"classes": predictor.classes, "score": score, "files": entries}
    content["unreadable"] = unreadable
    try:
        try:
            for path, name in tqdm(inputs, desc="predict", unit="file", disable=None):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                draw = _video if path.suffix.lower() in VIDEOS else _picture
                entry = draw(predictor, path, target, score)
                if entry is None:
                    unreadable.append(str(path))
                else:
                    entries.append({"file": str(path), **entry})
        except KeyboardInterrupt as e:
            done = len(entries) + len(unreadable)
            content["not_done"] = [str(path) for path, _ in inputs[done:]]
            _write_json(folder, content)
            raise KeyboardInterrupt(
                f"{folder}/predictions.json has {len(entries)} of {len(inputs)} files"
            ) from e
        if not entries:
            raise UserError(f"none of the files can be read: {', '.join(unreadable[:4])}")
        _write_json(folder, content)
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {reason(e)}; change --out") from e
    return content


def _write_json(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "predictions.json", lambda f: f.write(text.encode()))


def _picture(predictor: Predictor, path: Path, target: Path, score: float) -> dict[str, Any] | None:
    try:
        image = read_image(str(path), format="RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        # What Pillow raises of a file that is no picture, or half of one, or one of gigabytes: it
        # is counted and named.
        return None
    output, content = describe(predictor(image), predictor.classes, score, predictor.stuff)
    Image.fromarray(draw_output(image, output, predictor.classes, predictor.stuff)).save(
        target, quality=92
    )
    if "sem_seg" in output and "panoptic_seg" not in output:
        labels = output["sem_seg"].argmax(0).numpy().astype(np.uint8)
        Image.fromarray(labels).save(target.with_name(f"{target.stem}_labels.png"))
    return {"height": image.shape[0], "width": image.shape[1], **content}


def _frames(path: Path) -> Iterator[tuple[np.ndarray[Any, Any], float, int]]:
    """Frames (H, W, 3) in RGB, frames a second, and how many there are to be, 0 if unknown."""
    import cv2

    video = cv2.VideoCapture(str(path))
    try:
        rate = video.get(cv2.CAP_PROP_FPS) or 25.0
        count = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        while True:
            there, frame = video.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), rate, count
    finally:
        video.release()


def _video(predictor: Predictor, path: Path, target: Path, score: float) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial") as temporary:
        # It has its name when it is whole: half of a video looks like one.
        unfinished = Path(temporary, target.name)
        entry = _draw_video(predictor, path, unfinished, score)
        if entry is not None:
            os.replace(unfinished, target)
    return entry


def _draw_video(
    predictor: Predictor, path: Path, target: Path, score: float
) -> dict[str, Any] | None:
    import cv2

    writer: Any = None
    entries: list[dict[str, Any]] = []
    entry: dict[str, Any] = {}
    bar = tqdm(desc=path.name, unit="frame", disable=None, leave=False)
    try:
        for frame, rate, count in _frames(path):
            bar.total = count or None
            output, content = describe(predictor(frame), predictor.classes, score, predictor.stuff)
            drawn = draw_output(frame, output, predictor.classes, predictor.stuff)
            if writer is None:
                # Even sides, which most codecs want.
                size = drawn.shape[1] // 2 * 2, drawn.shape[0] // 2 * 2
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
                if not writer.isOpened():
                    raise UserError(f"{target.name} cannot be written as a video; change --out")
                entry = {"height": frame.shape[0], "width": frame.shape[1], "frames_a_second": rate}
                # Of a file that breaks off there are fewer.
                entry["frames_announced"] = count
            writer.write(cv2.cvtColor(drawn[: size[1], : size[0]], cv2.COLOR_RGB2BGR))
            entries.append(content)
            bar.update()
    finally:
        bar.close()
        if writer is not None:
            writer.release()
    return {**entry, "frames": entries} if entries else None


def _quiet_opencv() -> None:
    """What is wrong with a video is said here, and not by OpenCV and its FFmpeg as well."""
    # Read when the first video is opened.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    with contextlib.suppress(ImportError, AttributeError):
        from cv2.utils import logging

        logging.setLogLevel(logging.LOG_LEVEL_SILENT)


def _main(args: argparse.Namespace) -> None:
    _quiet_opencv()
    if not 0 <= args.score <= 1:
        raise UserError(f"--score is {args.score}; it must be from 0 to 1")
    inputs = find_inputs(args.inputs)
    check_folder(args.inputs, inputs, args.out)
    with errors_of_a_tool(args.opts):
        predictor = Predictor.load(args.config_file, args.weights, args.opts)
    try:
        content = predict(predictor, inputs, args.out, args.score)
    except KeyboardInterrupt as e:
        if args.debug:
            raise
        sys.exit(f"\ninterrupted; {e}")
    for path in content["unreadable"]:
        print(f"warning: {path} cannot be read and was left out")
    for entry in content["files"]:
        announced, seen = entry.get("frames_announced", 0), len(entry.get("frames", ()))
        if seen < announced:
            print(f"warning: {entry['file']} breaks off after {seen} of {announced} frames")
    print(f"{len(content['files'])} files: {args.out}/predictions.json, and a picture of each")


def cli() -> None:
    """The command line of ``pcka-predict`` and ``tools/predict.py``."""
    parser = tool_parser(HELP)
    parser.add_argument("inputs", nargs="+", help="pictures, folders, patterns, videos")
    parser.add_argument("--config-file", "--config", required=True, help="yaml of the student")
    parser.add_argument("--weights", default="", help="default: model_final.pth beside the config")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--score", type=float, default=0.5, help="threshold; default 0.5")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[],
        help="overrides: KEY VALUE ..., at the end of the command line",
    )  # fmt: skip
    run_tool(parser, _main)
