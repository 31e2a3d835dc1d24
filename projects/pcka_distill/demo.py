"""What ``make demo`` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import ColorMode, Visualizer

from pcka_distill.bench import REPOSITORY, run, test_metrics
from pcka_distill.build import get_distill_cfg, merge_config, student_config

__all__ = ["run_demo"]

_SCORE = 0.4
_IMAGES = 6


def _predictor(config: str, folder: Path, opts: Sequence[object]) -> DefaultPredictor:
    cfg = get_distill_cfg()
    weights = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    merge_config(cfg, str(REPOSITORY / config), [*opts, *weights], "config file")
    return DefaultPredictor(student_config(cfg))


def _draw(path: Path, rows: dict[str, DefaultPredictor | None]) -> None:
    """The first test images, one row for the truth (None) and one for each detector."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The first of the split, whatever they show: nothing is picked.
    records = DatasetCatalog.get("digits_test")[:_IMAGES]
    metadata = MetadataCatalog.get("digits_test")
    figure = Figure(figsize=(2.2 * _IMAGES, 2.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), _IMAGES, squeeze=False)
    for (title, predictor), axes in zip(rows.items(), grid):
        axes[0].set_ylabel(title)
        for record, axis in zip(records, axes):
            image = read_image(record["file_name"], format="BGR")
            canvas = Visualizer(
                np.ascontiguousarray(image[:, :, ::-1]), metadata, 3.0, ColorMode.IMAGE
            )
            if predictor is None:
                boxes = [
                    {k: a[k] for k in ("bbox", "bbox_mode", "category_id")}
                    for a in record["annotations"]
                ]
                drawn = canvas.draw_dataset_dict({**record, "annotations": boxes})
            else:
                found: Any = predictor(image)["instances"].to("cpu")
                drawn = canvas.draw_instance_predictions(found[found.scores > _SCORE])
            axis.imshow(drawn.get_image())
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=110)


def run_demo(folder: Path, opts: Sequence[object] = ()) -> None:
    """Train the three, then print a table and draw a picture.

    Args:
        folder: everything is written below it; what is there already is used.
        opts: config overrides for all three runs.
    """
    print(f"Three runs on the digits set, results on its test split. Logs: {folder}/*/train.log")
    teacher_config = "configs/Digits/retinanet_teacher.yaml"
    plain_config = "configs/Digits/retinanet_student.yaml"
    distilled_config = "configs/Digits/retinanet_pcka.yaml"
    teacher = run(teacher_config, folder / "teacher", opts, label="teacher")
    weights = folder / "teacher" / "model_final.pth"
    plain = run(plain_config, folder / "plain", opts, label="plain student")
    distilled = run(
        distilled_config, folder / "distilled", opts, label="distilled student", teacher=weights
    )

    lines = [
        "| model | AP | AP50 | AP75 | parameters | seconds of training |",
        "|---|---|---|---|---|---|",
    ]
    runs = {"teacher": teacher, "plain student": plain, "distilled student": distilled}
    for name, results in runs.items():
        metrics = test_metrics(results)
        values = " | ".join(f"{metrics[k]:.1f}" for k in ("AP", "AP50", "AP75"))
        lines.append(
            f"| {name} | {values} | {results['parameters'] / 1e6:.2f} M | "
            f"{results['train_seconds']:.0f} |"
        )
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    _draw(
        folder / "picture.png",
        {
            "truth": None,
            "plain": _predictor(plain_config, folder / "plain", opts),
            "distilled": _predictor(distilled_config, folder / "distilled", opts),
        },
    )
    gain = test_metrics(distilled)["AP"] - test_metrics(plain)["AP"]
    print("\n" + "\n".join(lines))
    print(
        f"\nThe same student, seed and iterations: {gain:+.1f} AP on test with a teacher.\n"
        f"Picture: {folder / 'picture.png'}\n\n"
        "Next, PCKA + mimic from the same teacher:\n"
        f"  {_python()} tools/train_net.py --config-file configs/Digits/retinanet_pcka_mimic.yaml "
        f"MODEL.DISTILL.TEACHER.WEIGHTS {weights}"
    )


def _python() -> str:
    """The running interpreter, as one would type it."""
    path = os.path.relpath(sys.executable)
    return path if not path.startswith("..") else sys.executable
