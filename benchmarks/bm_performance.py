#!/usr/bin/env python
"""What distillation costs, as ratios measured side by side: benchmarks/performance.md.

    python benchmarks/bm_performance.py              every section
    python benchmarks/bm_performance.py loss step    some; the rows of the others are kept

On a machine with a GPU the same command measures there.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

# The profiler, which measures memory, otherwise tells of its own start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from published import published_pcka
from torch import Tensor
from tqdm import tqdm

from pcka_distill import DistillationModel, FrozenTeacher, functional
from pcka_distill.bench import REPOSITORY
from pcka_distill.build import build_losses, build_student, get_distill_cfg, merge_config
from pcka_distill.cache import FeatureCache
from pcka_distill.functional import patch_counts, pcka_loss

Row = dict[str, Any]
PAGE = REPOSITORY / "benchmarks" / "performance.md"

# P3 to P6 of an 800 x 1333 image, padded to 800 x 1344.
LEVELS = {"P3": (100, 168), "P4": (50, 84), "P5": (25, 42), "P6": (13, 21)}
BATCH, CHANNELS, PATCH = 2, 256, 16


# ---- measuring -------------------------------------------------------------------------------


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """One call, from an idle device to an idle device."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def side_by_side(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    what: str,
    once: tuple[str, ...] = (),
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; each round runs all of them, one by one.

    A candidate is run twice in its turn, and the second time counts: the first finds the caches
    and the memory that its neighbour left. One round more comes first and is not counted.

    Args:
        candidates: what to run.
        rounds: that count.
        device: see :func:`seconds`.
        what: for the progress bar.
        once: candidates that take too long to be run twice, and too long for it to matter.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    total = (rounds + 1) * len(candidates)
    with tqdm(total=total, desc=what, disable=not sys.stderr.isatty()) as bar:
        for i in range(rounds + 1):
            for name, run in candidates.items():
                taken = seconds(run, device)
                if name not in once:
                    taken = seconds(run, device)
                bar.update()
                if i:
                    times[name].append(taken)
    return times


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that a call has allocated at any time, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler counts torch's memory alone; what would be in huge pages is numpy's.
    with (
        mock.patch.object(functional, "_HUGE", math.inf),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    # Older torch counts in microseconds; of equal ones the order is that of the events.
    events.sort(key=lambda e: e.start_ns() if hasattr(e, "start_ns") else e.start_us())
    sizes = [e.nbytes() for e in events]
    return max(itertools.accumulate(sizes), default=0)


def ratios(numerator: Iterable[float], denominator: Iterable[float]) -> dict[str, float]:
    """Median and range of the ratios of the rounds."""
    values = [a / b for a, b in zip(numerator, denominator)]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def add(*lists: list[float]) -> list[float]:
    """Round by round."""
    return [sum(parts) for parts in zip(*lists)]


# ---- the loss --------------------------------------------------------------------------------


def maps(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Student's and teacher's features of one level."""
    student, teacher = (torch.randn(BATCH, CHANNELS, *shape, device=device) for _ in range(2))
    return student.requires_grad_(), teacher


def bare_products(
    shape: tuple[int, int], relations: int, device: torch.device
) -> Callable[[], Any]:
    """The matrix products that intra (1) or intra and inter (2) cannot do without."""
    g, n, p = patch_counts((BATCH, CHANNELS, *shape), PATCH, "spatial")
    x, y = (torch.randn(g, n, p, device=device) for _ in range(2))
    gram = torch.randn(g, n, n, device=device)

    def run() -> None:
        torch.bmm(x, x.mT)
        torch.bmm(y, y.mT)
        torch.bmm(gram, x)
        if relations == 2:
            torch.bmm(x, y.mT)
            torch.bmm(gram, y)

    return run


def loss_section(rounds: int, device: torch.device) -> list[Row]:
    """pcka_loss forward and backward, against the published algorithm and bare products."""
    torch.set_num_threads(1)

    def differentiate(loss: Callable[..., Tensor], x: Tensor, y: Tensor, **options: Any) -> Any:
        return lambda: torch.autograd.grad(loss(x, y, **options), x)

    forms = {
        "intra + inter, not centred, as published": {"inter_weight": 1.0, "center": False},
        "intra + inter, centred": {"inter_weight": 1.0},
        "intra, centred (the default)": {},
    }
    times: dict[str, list[list[float]]] = {}
    pairs = [maps(shape, device) for shape in LEVELS.values()]

    def train(pairs: list[tuple[Tensor, Tensor]], options: dict[str, Any]) -> Any:
        losses = [pcka_loss(x, y, **options) for x, y in pairs]
        return torch.autograd.grad(sum(losses[1:], losses[0]), [x for x, _ in pairs])

    def peak(pairs: list[tuple[Tensor, Tensor]], options: dict[str, Any]) -> float:
        features = sum(2 * x.numel() * x.element_size() for x, _ in pairs)
        train(pairs, options)
        return peak_bytes(lambda: train(pairs, options), device) / features

    for (level, shape), (x, y) in zip(LEVELS.items(), pairs):
        candidates = {
            "published": differentiate(published_pcka, x, y),
            "bare 1": bare_products(shape, 1, device),
            "bare 2": bare_products(shape, 2, device),
        }
        for name, options in forms.items():
            candidates[name] = differentiate(pcka_loss, x, y, **options)
        measured = side_by_side(candidates, rounds, device, f"loss, {level}", once=("published",))
        for name, values in measured.items():
            times.setdefault(name, []).append(values)
    rows: list[Row] = []
    for name, options in forms.items():
        mine, bare = times[name], times["bare 2" if "inter_weight" in options else "bare 1"]
        if "published" in name:
            rows.append(
                {"name": f"{name}: the published algorithm / ours, P3 to P6 together"}
                | ratios(add(*times["published"]), add(*mine))
            )
            for level, theirs, ours in zip(LEVELS, times["published"], mine):
                rows.append({"name": f"the same, {level} alone"} | ratios(theirs, ours))
        rows.append(
            {"name": f"{name}: ours / its bare matrix products"} | ratios(add(*mine), add(*bare))
        )
        rows.append(
            {
                "name": f"{name}: peak memory / features of both sides, P3 to P6 together",
                "median": peak(pairs, options),
            }
        )
        if name == "intra + inter, centred":
            for level, pair in zip(LEVELS, pairs):
                rows.append({"name": f"the same, {level} alone", "median": peak([pair], options)})
    return rows


# ---- the step --------------------------------------------------------------------------------


def images(count: int, height: int, width: int) -> list[dict[str, Any]]:
    """Noise with eight boxes an image."""
    from detectron2.structures import Boxes, Instances

    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(count):
        instances = Instances((height, width))
        corner = torch.rand(8, 2, generator=generator) * torch.tensor([width / 2, height / 2])
        size = 32 + torch.rand(8, 2, generator=generator) * height / 3
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], 1))
        instances.gt_classes = torch.randint(0, 80, (8,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def distilled(config: str, device: torch.device) -> tuple[DistillationModel, Any]:
    """A shipped pair with random weights, and its teacher as Detectron2 has it.

    What they compute does not matter for their cost.
    """
    from detectron2 import model_zoo

    cfg = get_distill_cfg()
    merge_config(cfg, str(REPOSITORY / "configs" / config), ["MODEL.WEIGHTS", ""], "config")
    cfg.MODEL.DEVICE = str(device)
    student = build_student(cfg)
    path = model_zoo.get_config_file(cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE)
    teacher_cfg = get_distill_cfg()
    merge_config(teacher_cfg, path, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", str(device)], "config")
    teacher = build_student(teacher_cfg)
    # Of an untrained network without batch norm the maps grow from stage to stage.
    for network in (student, teacher):
        for name, parameter in network.named_parameters():
            if "conv3" in name:
                parameter.data.mul_(0.1)
    stock = copy.deepcopy(teacher).eval()
    # As a teacher is that is built from a config.
    frozen = FrozenTeacher(teacher, fold_norms=True, channels_last=True)
    return DistillationModel(student=student, teacher=frozen, losses=build_losses(cfg)), stock


def step_section(rounds: int, device: torch.device) -> list[Row]:
    """A distilled training step against the student's own and the teacher's backbone."""
    from detectron2.utils.events import EventStorage

    torch.set_num_threads(os.cpu_count() or 1)
    counts = [1] if device.type == "cpu" else [2]
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 60 << 30:
        # Two do not keep such a device busy.
        counts.append(8)
    rows = []
    for title, config in {
        "RetinaNet R101 to R50": "COCO-Detection/retinanet_R_101_to_R_50_pcka_2x.yaml",
        "Faster R-CNN R101 to R50": "COCO-Detection/faster_rcnn_R_101_to_R_50_pcka_2x.yaml",
    }.items():
        model, teacher = distilled(config, device)
        student: Any = model.student
        # In mixed precision the teacher is in half precision, too, as it is by default.
        half = (torch.float16,) if device.type == "cuda" else ()
        for count, precision in itertools.product(counts, (None, *half)):
            batch = images(count, 800, 1333)
            prepared = student.preprocess_image(batch).tensor
            name = title + (f", {count} images" if count > 2 else "")
            name += ", AMP (float16)" if precision else ""
            autocast = functools.partial(
                torch.autocast, device.type, dtype=precision, enabled=precision is not None
            )

            def train(
                network: Any, batch: list[dict[str, Any]] = batch, autocast: Any = autocast
            ) -> None:
                # The same regions and losses each time.
                torch.manual_seed(0)
                with EventStorage(0), autocast():
                    losses = network(batch)
                sum(losses.values()).backward()
                network.zero_grad(set_to_none=True)

            def look(
                teacher: Any = teacher, x: Tensor = prepared, autocast: Any = autocast
            ) -> None:
                with autocast(), torch.no_grad():
                    teacher.backbone(x)

            candidates: dict[str, Callable[[], object]] = {
                "plain": functools.partial(train, model.student),
                "teacher": look,
                "distilled": functools.partial(train, model),
            }
            # On a CPU each of them takes seconds.
            once = tuple(candidates) if device.type == "cpu" else ()
            times = side_by_side(candidates, rounds, device, f"step, {name}", once)
            parts = add(times["plain"], times["teacher"])
            rows += [
                {"name": f"{name}: distilled step / (plain step + teacher's backbone)"}
                | ratios(times["distilled"], parts),
                {"name": f"{name}: distilled step / plain step"}
                | ratios(times["distilled"], times["plain"]),
            ]
            if device.type == "cuda":
                peaks = [peak_bytes(candidates[x], device) for x in ("distilled", "plain")]
                rows.append(
                    {
                        "name": f"{name}: peak memory of a distilled step / of a plain step",
                        "median": peaks[0] / peaks[1],
                    }
                )
        # Before the next pair is built.
        del model, teacher, student, prepared, candidates, train, look
    return rows


# ---- the teacher -----------------------------------------------------------------------------


def teacher_section(rounds: int, device: torch.device) -> list[Row]:
    """A ResNet-101 FPN backbone's forward in the ways that a key can choose."""
    torch.set_num_threads(1)
    _, plain = distilled("COCO-Detection/retinanet_R_101_to_R_50_pcka_2x.yaml", device)
    x = torch.randn(2, 3, 480, 640, device=device)

    def run(fold_norms: bool = True, **options: Any) -> Callable[[], object]:
        frozen = FrozenTeacher(copy.deepcopy(plain), fold_norms=fold_norms, **options)

        def forward() -> None:
            with frozen.running():
                frozen.model.backbone(x)

        return forward

    folded = FrozenTeacher(copy.deepcopy(plain), fold_norms=True).model.backbone

    def inference() -> None:
        with torch.inference_mode():
            folded(x)

    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    name = str(half).removeprefix("torch.")
    candidates = {
        "as it is": run(),
        "its batch norms not folded into convolutions (not used)": run(fold_norms=False),
        "torch.inference_mode instead of no_grad (not used)": inference,
        "CHANNELS_LAST": run(channels_last=True),
        f"PRECISION {name}": run(precision=half),
        f"PRECISION {name}, CHANNELS_LAST": run(precision=half, channels_last=True),
        "COMPILE": run(compiled=True),
        f"COMPILE, PRECISION {name}": run(compiled=True, precision=half),
        f"COMPILE, PRECISION {name}, CHANNELS_LAST": run(
            compiled=True, precision=half, channels_last=True
        ),
    }
    times = side_by_side(candidates, rounds, device, "teacher")
    return [
        {"name": f"{name} / as it is"} | ratios(values, times["as it is"])
        for name, values in times.items()
        if name != "as it is"
    ]


# ---- the cache -------------------------------------------------------------------------------


def cache_section(rounds: int, device: torch.device) -> list[Row]:
    """A step of the digits task, its teacher's maps computed or read."""
    from detectron2.data import DatasetMapper, build_detection_train_loader
    from detectron2.utils.events import EventStorage

    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = get_distill_cfg()
        path = REPOSITORY / "configs" / "Digits" / "retinanet_pcka.yaml"
        merge_config(cfg, str(path), ["MODEL.DEVICE", str(device)], "config")
        teacher_cfg = get_distill_cfg()
        path = REPOSITORY / cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE
        merge_config(teacher_cfg, str(path), ["MODEL.DEVICE", str(device)], "config")
        weights = Path(folder) / "teacher.pth"
        torch.save({"model": build_student(teacher_cfg).state_dict()}, weights)
        cfg.MODEL.DISTILL.TEACHER.WEIGHTS = str(weights)
        models = {}
        for name in ("computed", "read"):
            cfg.MODEL.DISTILL.TEACHER.CACHE.DIR = folder if name == "read" else ""
            models[name] = DistillationModel(cfg)
        loader = build_detection_train_loader(
            cfg, mapper=DatasetMapper(cfg, is_train=True), num_workers=0
        )
        batches = list(itertools.islice(loader, 8))

        def train(model: Any) -> None:
            for batch in batches:
                with EventStorage(0):
                    losses = model(batch)
                sum(losses.values()).backward()
                model.zero_grad(set_to_none=True)

        times = side_by_side(
            {
                "plain": lambda: train(models["computed"].student),
                "computed": lambda: train(models["computed"]),
                "read": lambda: train(models["read"]),
            },
            rounds,
            device,
            "cache",
        )
        for name in ("computed", "read"):
            rows.append(
                {"name": f"RetinaNet on digits, maps {name}: distilled step / plain step"}
                | ratios(times[name], times["plain"])
            )
        entry = next(Path(folder).glob("*/*/*.pt")).stat().st_size
        rows.append(
            {
                "name": "KiB on disk for an image of 96 x 96 pixels, p3 to p5",
                "median": entry / 1024,
            }
        )
    # At COCO's size, the teacher alone.
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(folder, 1 << 40, "benchmark")
        model: Any = distilled("COCO-Detection/retinanet_R_101_to_R_50_pcka_2x.yaml", device)
        batch = images(2, 800, 1333)
        prepared = model.student.preprocess_image(batch).tensor
        levels = [pair.teacher for pair in model.pairs.values()]

        def compute() -> dict[str, Tensor]:
            with model.teacher.running():
                maps: dict[str, Tensor] = model.teacher.model.backbone(prepared)
            return maps

        def read() -> dict[str, Tensor]:
            height, width = prepared.shape[-2:]
            raw = [x["image"] for x in batch]
            return cache.fetch(raw, levels, (height, width), device, compute)

        read()
        times = side_by_side(
            {"computed": compute, "read": read}, min(rounds, 3), device, "cache, large"
        )
        rows.append(
            {"name": "R101 FPN, 2 images of 800 x 1333, one thread: maps read / computed"}
            | ratios(times["read"], times["computed"])
        )
        entry = next(Path(folder).glob("*/*/*.pt")).stat().st_size
        rows.append({"name": "MiB on disk for such an image, p3 to p6", "median": entry / 2**20})
    return rows


# ---- scale -----------------------------------------------------------------------------------

# A base case of which one size at a time is changed.
BASE = {"batch": 2, "side": 64, "channels": 64, "patch": 8}
SWEEPS = {
    "batch": (1, 2, 4, 8),
    "side": (64, 96, 128, 192),
    "channels": (32, 64, 128, 256),
    "patch": (4, 8, 16, 32),
}


def scale_section(rounds: int, device: torch.device) -> list[Row]:
    """How the cost of the loss grows with each size, and the slope in a doubly logarithmic plot."""
    torch.set_num_threads(1)
    rows: list[Row] = []

    def differentiate(layout: str, size: dict[str, int], levels: int = 1) -> Callable[[], object]:
        pairs = []
        for i in range(levels):
            side = size["side"] >> i
            shape = (size["batch"], size["channels"], side, side)
            student = torch.randn(shape, device=device).requires_grad_()
            pairs.append((student, torch.randn(shape, device=device)))

        def run() -> None:
            for x, y in pairs:
                loss = pcka_loss(x, y, patch_size=size["patch"], layout=layout, inter_weight=1.0)
                torch.autograd.grad(loss, x)

        return run

    for layout in ("spatial", "sample"):
        for name, values in SWEEPS.items():
            candidates = {
                str(value): differentiate(layout, {**BASE, name: value}) for value in values
            }
            times = side_by_side(candidates, rounds, device, f"scale, {layout}, {name}")
            cost = [
                statistics.median(t / b for t, b in zip(times[str(v)], times[str(values[0])]))
                for v in values
            ]
            slope = statistics.linear_regression(
                [math.log(v) for v in values], [math.log(c) for c in cost]
            ).slope
            rows.append(
                {
                    "name": f"{layout}, {name}",
                    "median": slope,
                    "values": list(values),
                    "cost": cost,
                }
            )
        levels = (1, 2, 3, 4)
        big = {**BASE, "side": 128}
        times = side_by_side(
            {str(n): differentiate(layout, big, n) for n in levels}, rounds, device, "scale, levels"
        )
        cost = [statistics.median(t / b for t, b in zip(times[str(n)], times["1"])) for n in levels]
        rows.append(
            {
                "name": f"{layout}, levels",
                "median": statistics.linear_regression(
                    [math.log(n) for n in levels], [math.log(c) for c in cost]
                ).slope,
                "values": list(levels),
                "cost": cost,
            }
        )
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """The sweeps of a device, cost against size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True)
    largest = [max(row["cost"]) for row in rows]
    for axis, layout in zip(axes, ("spatial", "sample")):
        for row in rows:
            kind, name = row["name"].split(", ")
            if kind == layout:
                size = [v / row["values"][0] for v in row["values"]]
                label = f"{name}: exponent {row['median']:.2f}"
                axis.plot(size, row["cost"], marker="o", label=label)
        axis.set(
            xscale="log", yscale="log", title=f"layout {layout}", xlabel="size / smallest size"
        )
        axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        ticks = [2**i for i in range(8) if i < 2 or 2**i < 2 * max(largest)]
        axis.set_yticks(ticks, [str(x) for x in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2)
    axes[0].set_ylabel("cost / cost of the smallest")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- the page --------------------------------------------------------------------------------

SECTIONS = {
    "loss": (loss_section, 5, 5),
    "step": (step_section, 7, 10),
    "teacher": (teacher_section, 3, 20),
    "cache": (cache_section, 7, 7),
    "scale": (scale_section, 9, 21),
}

INTRODUCTION = """\
# What distillation costs

Made by `make bench`, or section by section by the command above each table. Every figure is a
ratio of times that were taken in turns in one run (the median of the rounds; in brackets the lowest
and the highest), or of bytes. A time by itself would say more about the machine than the code.
"""

TEXT = {
    "loss": """\
## The loss

`functional.pcka_loss`, forward and backward, on P3 to P6 of an 800 x 1333 image (100 x 168 to
13 x 21 cells; 2 images, 256 channels, patches of 16, layout `spatial`), on one thread. *The
published algorithm* is `benchmarks/published.py`: a loop over channels, Gram matrices of both
relations, every inner product the trace of a matrix product; it is not centred. *Bare matrix
products* are the `torch.bmm` of the same shapes: three for intra alone, five for both. Two of them
are symmetric; ours makes one half of those, on a CPU, where they are large. Peak memory has the
gradients of all four levels in it, as a training step has.

On a CPU that is as noisy in its memory as the one below, whose caches others share, runs differ:
two in the hour before had 101 and 92 and, both relations centred, 1.71 and 1.44 times the products.

On a GPU what lies between the products is in kernels of our own, at most five a step. The H100
below waits for the processor that launches them, but for P3: these maps are small for it.
""",
    "step": """\
## The step

A training step (forward and backward) of two shipped COCO configs at their real size, on images of
800 x 1333 (one on a CPU, two or more on a GPU) and all cores: the distilled model against the
student alone and the teacher's backbone alone, as Detectron2 has it, on images that are prepared
already. The teacher comes first in a step, so that the memory that it needs for a while serves the
student's activations afterwards; its batch norms are part of its convolutions, and it works with
channels last, which on a CPU makes up for the loss, or some of it. On the H100, below, it did not
yet have channels last.
What is above 1 is the loss, most of it the matrix products of P2 of Faster R-CNN, with both
relations: 19 billion multiplications an image on a CPU, 24 on a GPU, in fp32, or under AMP in TF32.
The H100 waits for the processor that launches its work, most of all with two images, so that rounds
differ: a run an hour before had Faster R-CNN at 1.04, 1.09 (AMP) and, with 8 images, 1.08 and 1.05.
Peak memory is without the weights of either. The weights are random.
""",
    "teacher": """\
## The teacher

The forward of a ResNet-101 FPN backbone on 2 images of 480 x 640 in the ways that
`MODEL.DISTILL.TEACHER` can choose, against fp32 without channels last; on one thread. Batch norms
of Detectron2's convolutions are always made part of them: values are the same but for rounding.
`torch.inference_mode` is no key: it gains nothing, and a loss could not save its tensors for
backward. Compiling takes a minute at first and again for new image sizes, and is not in these
figures. Half precision does not help a GPU that waits for its launches: autocast adds some.
""",
    "cache": """\
## The teacher's cache

`retinanet_pcka` of the digits task, 8 batches, with the teacher's maps computed in every step or
read from `MODEL.DISTILL.TEACHER.CACHE.DIR`; on one thread. What is read was written a moment
before and comes from the system's own cache, not from a disk. A GPU computes maps faster than they
are read, 11 MiB of each of COCO's images: the cache is for teachers that are slow and data that is
small.
""",
    "scale": """\
## Scale

Let a level have B images, C channels and H x W cells, with patches of p. In the layout `spatial`
each channel has a Gram of N = HW / p^2 patches with P = B p^2 values, in `sample` N = B HW / p^2
and P = p^2. Each of the at most five products is made on the smaller side (intra alone, which takes
three on its own, up to N = 5/3 P there), so it takes C N P min(N, P) multiplications:

| | while N <= P | while N >= P |
|---|---|---|
| spatial | C B (HW)^2 / p^2 | C B^2 HW p^2 |
| sample | C B^2 (HW)^2 / p^2 | C B HW p^2 |

The rest, cutting patches, centring, resizing, moves the maps a fixed number of times: C B HW. Where
that outweighs the products, all exponents of the maps go to 1 and that of p to 0. Memory is the
student's gradient and the patches of a few channels at a time, on a GPU of as many as take no more
than the features of both sides (in the layouts `per_image` and
`per_position`, which cannot be cut up so: of an image, or of all). From 2 images, 64 channels,
64 x 64 cells and patches of 8, one size at a time is changed; the exponent is the slope of
log cost over log size. *side* changes H and W together; *levels* adds maps of half the side, each
a quarter of the cost at most, so their sum converges. On the H100 maps of these sizes cost their
launches: the same whatever the size, and as much for each level.
""",
}


def cell(row: Row) -> str:
    """A figure, with its range if it has one."""

    def number(value: float) -> str:
        return f"{value:.0f}" if value >= 20 else f"{value:.2f}"

    text = number(row["median"])
    return f"{text} ({number(row['low'])} – {number(row['high'])})" if "low" in row else text


def page(rows: list[Row]) -> str:
    """benchmarks/performance.md from its rows."""
    lines = [INTRODUCTION]
    for section, text in TEXT.items():
        of_section = [row for row in rows if row["section"] == section]
        if not of_section:
            continue
        lines += [text]
        for device in dict.fromkeys(row["device"] for row in of_section):
            here = [row for row in of_section if row["device"] == device]
            head = "exponent" if section == "scale" else "ratio"
            lines += [
                f"`{here[0]['command']}`, {here[0]['rounds']} rounds, {device}:",
                "",
                f"| | {head} |",
                "|---|---|",
                *(f"| {row['name']} | {cell(row)} |" for row in here),
                "",
            ]
            if section == "scale":
                lines += [f"![cost against size]({picture(device)})", ""]
    return "\n".join(lines)


def picture(device: str) -> str:
    """File name of a device's plot."""
    kind = "cpu" if "CPU" in device else "gpu"
    return f"performance_{kind}.png"


def main() -> None:
    """Measure, and write the rows, the plot and the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--rounds", type=int, help="instead of each section's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    unknown = [x for x in args.sections if x not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]}, expected {', '.join(SECTIONS)}")

    device = torch.device(args.device)
    name = f"{os.cpu_count()} cores, CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    environment = f"{name}, torch {torch.__version__}, Python {platform.python_version()}"
    raw = args.page.with_suffix(".jsonl")
    rows = [json.loads(x) for x in raw.read_text().splitlines()] if raw.exists() else []
    for section in args.sections or SECTIONS:
        measure, cpu_rounds, gpu_rounds = SECTIONS[section]
        rounds = args.rounds or (gpu_rounds if device.type == "cuda" else cpu_rounds)
        print(f"{section}: {rounds} rounds on {environment}", flush=True)
        facts = {
            "section": section,
            "device": environment,
            "kind": device.type,
            "rounds": rounds,
            "command": f"python benchmarks/bm_performance.py {section}"
            + (f" --rounds {rounds}" if args.rounds else ""),
        }
        torch.manual_seed(0)
        measured = [{**row, **facts} for row in measure(rounds, device)]
        for row in measured:
            print(f"  {row['name']}: {cell(row)}", flush=True)
        kept = [r for r in rows if (r["section"], r["kind"]) != (section, device.type)]
        rows = sorted(
            kept + measured, key=lambda r: (list(SECTIONS).index(r["section"]), r["kind"])
        )
        # After each section, so that nothing is lost when a later one is stopped.
        raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args.page.write_text(page(rows))
        if section == "scale":
            plot(measured, args.page.parent / picture(environment))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the sections that were finished are written")
