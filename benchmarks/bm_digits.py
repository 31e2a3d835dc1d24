#!/usr/bin/env python
"""Plain against distilled students on the digits set, several seeds: benchmarks/digits.md.

Runs that are finished are not made again; an interrupted one goes on. One thread a process.
"""

import argparse
import json
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pcka_distill.bench import REPOSITORY, run, spread
from pcka_distill.errors import UserError


class Pair(NamedTuple):
    """A teacher and a student, by the names of their configs."""

    title: str
    teacher: str
    student: str


# The name of a pair is how its distilled configs begin.
PAIRS = {
    "retinanet": Pair("RetinaNet", "retinanet_teacher", "retinanet_student"),
    "fcos": Pair("FCOS", "fcos_teacher", "fcos_student"),
    "faster_rcnn": Pair("Faster R-CNN", "faster_rcnn_teacher", "faster_rcnn_student"),
    "cascade_to_faster_rcnn": Pair(
        "Cascade R-CNN to Faster R-CNN", "cascade_rcnn_teacher", "faster_rcnn_student"
    ),
}
METHODS = {"student": "plain", "pcka": "PCKA", "pcka_mimic": "PCKA + mimic"}

Row = dict[str, Any]


def table(title: str, rows: dict[str, list[Row]]) -> list[str]:
    """The results of one pair: method -> rows, one a seed."""

    def metrics(results: list[Row], key: str, split: str = "digits_test") -> list[float]:
        return [r["results"][split]["bbox"][key] for r in results]

    plain = metrics(rows["student"], "AP")
    lines = [
        f"## {title}",
        "",
        "| model | AP, test | gain over plain, same seed | AP by seed | AP50 | AP75 | AP, val |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, name in {**METHODS, "teacher": "teacher"}.items():
        results = rows[method]
        ap = metrics(results, "AP")
        gains = [a - b for a, b in zip(ap, plain)]
        size = f"{results[0]['parameters'] / 1e6:.2f} M"
        cells = (
            f"{name} ({size}), seed 0" if method == "teacher" else f"{name} ({size})",
            spread(ap),
            spread(gains) if method in ("pcka", "pcka_mimic") else "",
            " / ".join(f"{x:.1f}" for x in ap),
            spread(metrics(results, "AP50")),
            spread(metrics(results, "AP75")),
            spread(metrics(results, "AP", "digits_val")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def page(rows: list[Row]) -> str:
    """The page of all rows that there are."""
    lines = [
        "# Digits: plain against distilled students",
        "",
        "Box AP in percent on the 300 test images, mean ± standard deviation over the seeds. Plain "
        "and distilled students share seed, initial weights, order of images and iterations; one "
        "teacher (seed 0) for each pair. Nothing was tuned on test.",
        "",
        "    make bench",
        "",
        "runs, for every row, `tools/train_net.py --config-file "
        "configs/Digits/<pair>_<method>.yaml SEED <seed>`, with `<method>` one of pcka and "
        "pcka_mimic, or the pair's plain student and its teacher, on one thread. The raw figures "
        "are in digits.jsonl.",
        "",
    ]
    for name, pair in PAIRS.items():
        methods: dict[str, list[Row]] = {}
        for row in rows:
            if row["pair"] == name:
                methods.setdefault(row["method"], []).append(row)
        if methods:
            lines += table(pair.title, methods)
    where = sorted({row["environment"] for row in rows})
    return "\n".join([*lines, "; ".join(where) + "."]) + "\n"


def main() -> None:
    """Make all runs, then the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="the rows of others are kept"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every student")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "output" / "benchmark")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "benchmarks" / "digits.md")
    args = parser.parse_args()

    def job(config: str, seed: int, teacher: str = "") -> Row:
        weights = args.runs / f"{teacher}_0" / "model_final.pth" if teacher else None
        return run(
            f"configs/Digits/{config}.yaml",
            args.runs / f"{config}_{seed}",
            ["SEED", seed],
            label=f"{config}, seed {seed}",
            teacher=weights,
            threads=1,
        )

    pairs = {name: PAIRS[name] for name in args.pairs}
    # Two pairs can share a plain student.
    jobs = dict.fromkeys((p.teacher, 0, "") for p in pairs.values())
    students = dict.fromkeys((p.student, s, "") for p in pairs.values() for s in range(args.seeds))
    taught = [
        (f"{name}_{method}", s, p.teacher)
        for name, p in pairs.items()
        for method in ("pcka", "pcka_mimic")
        for s in range(args.seeds)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(jobs, pool.map(lambda key: job(*key), jobs)))
        rest = [*students, *taught]
        done.update(zip(rest, pool.map(lambda key: job(*key), rest)))

    raw = args.page.with_suffix(".jsonl")
    kept = [json.loads(x) for x in raw.read_text().splitlines()] if raw.exists() else []
    rows = [row for row in kept if row["pair"] not in pairs]
    environment = f"torch {torch.__version__}, Python {platform.python_version()}, CPU"
    for name, pair in pairs.items():
        for method in ("teacher", *METHODS):
            for seed in range(1 if method == "teacher" else args.seeds):
                config = {"teacher": pair.teacher, "student": pair.student}.get(method)
                distilled = config is None
                key = (config or f"{name}_{method}", seed, pair.teacher if distilled else "")
                rows.append(
                    {"pair": name, "method": method, "seed": seed, "environment": environment}
                    | done[key]
                )
    rows.sort(key=lambda row: list(PAIRS).index(row["pair"]))
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(rows)
    args.page.write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on")
