"""Runs of tools/train_net.py as child processes: resumable, with progress, and their results.

What the demo and benchmarks/ have in common.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pcka_distill.build import get_distill_cfg, merge_config
from pcka_distill.errors import UserError

__all__ = ["Diverged", "run", "spread", "test_metrics"]

REPOSITORY = Path(__file__).parents[2]
_REPORT_SECONDS = 15.0


class Diverged(UserError):
    """A run whose loss was not finite."""


def _iterations(folder: Path, start: int) -> Iterator[int]:
    """The iterations that metrics.json lists as finished, from an offset in bytes on."""
    try:
        with open(folder / "metrics.json", "rb") as f:
            f.seek(start)
            lines = f.read().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        # The last line may be half written.
        with contextlib.suppress(ValueError, KeyError):
            yield int(json.loads(line)["iteration"]) + 1


def _follow(
    process: subprocess.Popen[bytes], folder: Path, start: int, total: int, label: str
) -> None:
    """Show progress and ETA until the process ends: a bar on a terminal, else a line at times.

    Args:
        start: size of metrics.json before the process began.
    """
    terminal = sys.stderr.isatty()
    said = time.monotonic()
    # When which iteration was seen: the speed is that of the last minute or so.
    seen: deque[tuple[float, int]] = deque(maxlen=8)
    with tqdm(total=total, desc=label, unit="it", disable=not terminal, dynamic_ncols=True) as bar:
        while process.poll() is None:
            time.sleep(0.5)
            done = min(max(_iterations(folder, start), default=0), total)
            if done and (not seen or done > seen[-1][1]):
                if not seen:
                    # Of a run that goes on: it did not do these now.
                    bar.initial = bar.n = bar.last_print_n = done
                seen.append((time.monotonic(), done))
                bar.update(done - bar.n)
            if not terminal and seen and time.monotonic() - said > _REPORT_SECONDS:
                said = time.monotonic()
                left = ""
                if done == total:
                    left = ", evaluating"
                elif len(seen) > 1:
                    pace = (seen[-1][0] - seen[0][0]) / (seen[-1][1] - seen[0][1])
                    left = f", about {(total - done) * pace:.0f} s left"
                print(f"  {label}: iteration {done} of {total}{left}", flush=True)


def run(
    config: str,
    folder: Path,
    opts: Sequence[object] = (),
    *,
    label: str,
    teacher: Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Train and evaluate a config in a folder, or go on with it, or only read its results.

    Args:
        config: path below the repository.
        folder: OUTPUT_DIR of the run; its output goes to ``train.log`` there.
        opts: overrides, as on the command line.
        label: what to call it in the progress; "" shows none.
        teacher: the checkpoint that the run depends on.
        threads: of the child process; None leaves it to torch.

    Returns:
        what ``results.json`` says.

    Raises:
        Diverged: its loss was not finite.
        UserError: the run failed (the message has its last line), or the folder holds something
            else: a run of another config, or one that learned from an earlier teacher.
    """
    folder = folder.absolute()
    opts = [*opts, "OUTPUT_DIR", str(folder)]
    if teacher is not None:
        opts += ["MODEL.DISTILL.TEACHER.WEIGHTS", str(teacher.absolute())]
    cfg = get_distill_cfg()
    merge_config(cfg, str(REPOSITORY / config), list(opts), "config file")
    results, dumped = folder / "results.json", folder / "config.yaml"
    if dumped.exists():
        other = dumped.read_text() != cfg.dump()
        older = teacher is not None and teacher.stat().st_mtime > dumped.stat().st_mtime
        if other or older:
            raise UserError(
                f"{folder} holds a run of {'another config' if other else 'an earlier teacher'}; "
                "remove that folder to make it again, or choose another output folder"
            )
    if results.exists() and not (folder / "model_final.pth").exists():
        raise UserError(
            f"{folder} has lost its model_final.pth; remove that folder to make it again"
        )
    if not results.exists():
        folder.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, str(REPOSITORY / "tools" / "train_net.py"), "--resume"]
        command += ["--config-file", str(REPOSITORY / config), *map(str, opts)]
        metrics = folder / "metrics.json"
        start = metrics.stat().st_size if metrics.exists() else 0
        with open(folder / "train.log", "ab") as log:
            said = log.tell()
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                if label:
                    _follow(process, folder, start, cfg.SOLVER.MAX_ITER, label)
                process.wait()
            finally:
                # On Ctrl-C the terminal has interrupted the child as well: let it end by itself.
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
        if process.returncode:
            with open(folder / "train.log", "rb") as log:
                log.seek(said)
                lines = log.read().decode(errors="replace").strip().splitlines()
            diverged = [x for x in lines if x.startswith("error: not finite: ")]
            last = "".join((diverged or lines)[-1:])
            what = label or f"the run in {folder}"
            message = f"{what} failed: {last} (all of it: {folder / 'train.log'})"
            raise Diverged(message) if diverged else UserError(message)
    content: dict[str, Any] = json.loads(results.read_text())
    return content


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def test_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The box metrics of the test split: AP, AP50, AP75, ... in percent."""
    metrics: dict[str, float] = results["results"]["digits_test"]["bbox"]
    return metrics
