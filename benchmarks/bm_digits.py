#!/usr/bin/env python
"""Plain against distilled students on the digits set, several seeds: benchmarks/digits.md.

Runs that are finished are not made again; an interrupted one goes on. One thread a process.
"""

import argparse
import json
import platform
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pcka_distill.bench import REPOSITORY, run
from pcka_distill.errors import UserError

FAMILIES = {"retinanet": "RetinaNet", "faster_rcnn": "Faster R-CNN"}
METHODS = {"student": "plain", "pcka": "PCKA", "pcka_mimic": "PCKA + mimic"}


def spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(family: str, teacher: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The results of one family."""
    box = "digits_test"

    def metrics(results: list[dict[str, Any]], key: str, split: str = box) -> list[float]:
        return [r["results"][split]["bbox"][key] for r in results]

    def cells(*values: str) -> str:
        return f"| {' | '.join(values)} |"

    def millions(results: dict[str, Any]) -> str:
        return f"{results['parameters'] / 1e6:.2f} M"

    plain = metrics(rows["student"], "AP")
    lines = [
        f"## {FAMILIES[family]}",
        "",
        "| model | AP, test | gain over plain, same seed | AP by seed | AP50 | AP75 | AP, val |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, results in rows.items():
        ap = metrics(results, "AP")
        lines.append(
            cells(
                f"{METHODS[method]} ({millions(results[0])})",
                spread(ap),
                "" if method == "student" else spread([a - b for a, b in zip(ap, plain)]),
                " / ".join(f"{x:.1f}" for x in ap),
                spread(metrics(results, "AP50")),
                spread(metrics(results, "AP75")),
                spread(metrics(results, "AP", "digits_val")),
            )
        )
    once = [f"{metrics([teacher], key)[0]:.1f}" for key in ("AP", "AP50", "AP75")]
    val = f"{metrics([teacher], 'AP', 'digits_val')[0]:.1f}"
    label = f"teacher ({millions(teacher)}), seed 0"
    lines.append(cells(label, once[0], "", once[0], once[1], once[2], val))
    return [*lines, ""]


def main() -> None:
    """Make all runs, then the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every student")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "output" / "benchmark")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "benchmarks" / "digits.md")
    args = parser.parse_args()

    def job(family: str, method: str, seed: int) -> dict[str, Any]:
        name = f"{family}_{method}"
        weights = args.runs / f"{family}_teacher_0" / "model_final.pth"
        return run(
            f"configs/Digits/{name}.yaml",
            args.runs / f"{name}_{seed}",
            ["SEED", seed],
            label=f"{name}, seed {seed}",
            teacher=weights if method.startswith("pcka") else None,
            threads=1,
        )

    with ThreadPoolExecutor(args.jobs) as pool:
        teachers = dict(zip(FAMILIES, pool.map(lambda f: job(f, "teacher", 0), FAMILIES)))
        keys = [(f, m, s) for f in FAMILIES for m in METHODS for s in range(args.seeds)]
        students = dict(zip(keys, pool.map(lambda key: job(*key), keys)))

    lines = [
        "# Digits: plain against distilled students",
        "",
        "Box AP in percent on the 300 test images, mean ± standard deviation over "
        f"{args.seeds} seeds. Plain and distilled students share seed, initial weights, order of "
        "images and iterations; one teacher (seed 0) for each family. Nothing was tuned on test.",
        "",
        "    make bench",
        "",
        "runs, for every row, `tools/train_net.py --config-file "
        "configs/Digits/<family>_<method>.yaml SEED <seed>` with `<method>` one of teacher, "
        "student, pcka and pcka_mimic, on one thread. The raw figures are in digits.jsonl.",
        "",
    ]
    for family in FAMILIES:
        rows = {m: [students[family, m, s] for s in range(args.seeds)] for m in METHODS}
        lines += table(family, teachers[family], rows)
    lines.append(f"torch {torch.__version__}, Python {platform.python_version()}, CPU.")
    args.page.write_text("\n".join(lines) + "\n")
    with open(args.page.with_suffix(".jsonl"), "w") as f:
        for family, results in teachers.items():
            f.write(
                json.dumps({"family": family, "method": "teacher", "seed": 0, **results}) + "\n"
            )
        for (family, method, seed), results in students.items():
            row = {"family": family, "method": method, "seed": seed, **results}
            f.write(json.dumps(row) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on")
