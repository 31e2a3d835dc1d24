"""What ``make demo`` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pcka_distill.bench import run, test_metrics
from pcka_distill.visualize import draw_results

__all__ = ["run_demo"]

_IMAGES = 6
_SCORE = 0.4


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
    draw_results(
        folder / "picture.png",
        "digits_test",
        {"plain": str(folder / "plain"), "distilled": str(folder / "distilled")},
        # The first of the split, whatever they show: nothing is picked.
        images=_IMAGES,
        score=_SCORE,
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
