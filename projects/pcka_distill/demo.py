"""What ``make demo`` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import pairwise_iou

from pcka_distill.bench import REPOSITORY, run, test_metrics
from pcka_distill.build import get_distill_cfg, merge_config, student_config

__all__ = ["run_demo"]

_SCORE = 0.4
_IMAGES = 6
_BOX_KEYS = ("bbox", "bbox_mode", "category_id")


def _predictor(config: str, folder: Path, opts: Sequence[object]) -> DefaultPredictor:
    cfg = get_distill_cfg()
    weights = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    merge_config(cfg, str(REPOSITORY / config), [*opts, *weights], "config file")
    return DefaultPredictor(student_config(cfg))


def _draw(path: Path, rows: dict[str, DefaultPredictor | None]) -> None:
    """The first test images, one row for the truth (None) and one for each detector."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    # The first of the split, whatever they show: nothing is picked.
    records = DatasetCatalog.get("digits_test")[:_IMAGES]
    names = MetadataCatalog.get("digits_test").thing_classes
    figure = Figure(figsize=(2.2 * _IMAGES, 2.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.supxlabel(f"detections with a score above {_SCORE}: green are right, red are wrong")
    grid = figure.subplots(len(rows), _IMAGES, squeeze=False)
    for (title, predictor), axes in zip(rows.items(), grid):
        axes[0].set_ylabel(title)
        for record, axis in zip(records, axes):
            image = read_image(record["file_name"], format="BGR")
            truth = annotations_to_instances(
                [{k: a[k] for k in _BOX_KEYS} for a in record["annotations"]], image.shape[:2]
            )
            if predictor is None:
                boxes = truth.gt_boxes
                labels = [names[c] for c in truth.gt_classes]
                colors = ["white"] * len(labels)
            else:
                found: Any = predictor(image)["instances"].to("cpu")
                # Best last, on top of the others.
                found = found[(found.scores > _SCORE).nonzero().flatten().flip(0)]
                boxes = found.pred_boxes
                labels = [names[c] for c in found.pred_classes]
                same = found.pred_classes[:, None] == truth.gt_classes
                right = (same & (pairwise_iou(boxes, truth.gt_boxes) > 0.5)).any(1)
                colors = ["lime" if x else "red" for x in right]
            axis.imshow(image[:, :, ::-1], interpolation="nearest")
            for (x0, y0, x1, y1), label, color in zip(boxes.tensor.tolist(), labels, colors):
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=color, lw=2))
                axis.text(
                    x0 + 1, y0 + 1, label, color=color, va="top", fontsize=9, weight="bold",
                    path_effects=[withStroke(linewidth=2, foreground="black")],
                )  # fmt: skip
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
    distilled_config = "configs/Digits/retinanet_pcka_kd.yaml"
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
        "Next, PCKA without KD, from the same teacher:\n"
        f"  {_python()} tools/train_net.py --config-file configs/Digits/retinanet_pcka.yaml "
        f"MODEL.DISTILL.TEACHER.WEIGHTS {weights}"
    )


def _python() -> str:
    """The running interpreter, as one would type it."""
    path = os.path.relpath(sys.executable)
    return path if not path.startswith("..") else sys.executable
