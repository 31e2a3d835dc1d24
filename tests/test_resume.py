"""Runs that are stopped, in every way, and go on: the same weights as of one that was not."""

import json
import logging
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser
from helpers import REPO

from pcka_distill import UserError
from pcka_distill.engine import Trainer, main, setup

pytestmark = pytest.mark.usefixtures("digits")
# Images are resized and mirrored at random, and the detector samples regions at random.
RANDOM = (
    *("INPUT.MIN_SIZE_TRAIN", (64, 80, 96), "INPUT.RANDOM_FLIP", "horizontal"),
    *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 2),
    *("MODEL.DISTILL.PCKA.PATCH_SIZE", (1,)),
)


@pytest.fixture
def few_images(tmp_path):
    """Four images of the digits set: an evaluation of a second."""
    source = MetadataCatalog.get("digits_val")
    content = json.loads(Path(source.json_file).read_text())
    content["images"] = content["images"][:4]
    kept = {x["id"] for x in content["images"]}
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in kept]
    (tmp_path / "few.json").write_text(json.dumps(content))
    register_coco_instances("few", {}, str(tmp_path / "few.json"), source.image_root)
    yield "few"
    DatasetCatalog.remove("few")
    MetadataCatalog.remove("few")


def arguments(family, teacher, output, *opts, flags=()):
    config = REPO / "configs" / "Digits" / f"{family}_pcka.yaml"
    student = REPO / "configs" / "Digits" / f"{family}_student.yaml"
    opts = [
        *("MODEL.DISTILL.LOSSES", "['PCKALoss','MimicLoss']"),
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", student, "MODEL.DISTILL.TEACHER.WEIGHTS", teacher),
        *("DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 0, *RANDOM, *opts, "OUTPUT_DIR", output),
    ]
    return default_argument_parser().parse_args(
        ["--config-file", str(config), *flags, *map(str, opts)]
    )


def final(output):
    return torch.load(output / "model_final.pth", weights_only=True)


def assert_equal(a, b):
    """Everything of two checkpoints but the time that they took."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "Stopwatch":
                assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("family", ["retinanet", "fcos", "faster_rcnn"])
def test_a_resumed_run_is_the_uninterrupted_one(family, workers, teacher_files, tmp_path):
    """Weights, buffers, adapters, optimizer, schedule, random numbers: bit for bit."""
    opts = ("SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 3, "DATALOADER.NUM_WORKERS", workers)
    teacher = teacher_files[family]
    main(arguments(family, teacher, tmp_path / "whole", *opts))

    class Stopped(Trainer):
        def run_step(self):
            if self.iter == 5:
                raise KeyboardInterrupt
            super().run_step()

    trainer = Stopped(setup(arguments(family, teacher, tmp_path / "parts", *opts)))
    trainer.resume_or_load(resume=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "parts" / "last_checkpoint").read_text() == "model_0000002.pth"
    # What was drawn meanwhile by someone else must not matter.
    torch.manual_seed(123)
    main(arguments(family, teacher, tmp_path / "parts", *opts, flags=["--resume"]))
    assert_equal(final(tmp_path / "whole"), final(tmp_path / "parts"))


def start(args, log):
    """A process of its own that runs main; forked, so that it need not import everything again."""

    def run():
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        main(args)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_for(process, condition, seconds=60.0):
    """Whether it came true before the process ended."""
    end = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def test_killed_twenty_times(teacher_files, few_images, tmp_path):
    """In steps, while checkpoints are written, in evaluations, and at moments chosen by chance."""
    opts = (
        # More than all of the twenty get to, on a fast machine.
        *("SOLVER.MAX_ITER", 240, "SOLVER.CHECKPOINT_PERIOD", 2),
        *("DATASETS.TEST", f"('{few_images}',)", "TEST.EVAL_PERIOD", 6),
    )
    teacher = teacher_files["faster_rcnn"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    reference = start(arguments("faster_rcnn", teacher, whole, *opts), tmp_path / "whole.txt")
    args = arguments("faster_rcnn", teacher, parts, *opts, flags=["--resume"])
    log, last = parts / "log.txt", parts / "last_checkpoint"
    chance = random.Random(0)

    def read(path):
        return path.read_text() if path.exists() else ""

    def kill_once(moment):
        before, evaluations = read(last), read(log).count("Start inference")
        process = start(args, tmp_path / "parts.txt")
        if moment == "chance":
            time.sleep(chance.uniform(0.0, 1.2))
        else:
            # Nothing would ever be done if none of them got as far as a checkpoint.
            assert wait_for(process, lambda: read(last) != before)
        if moment == "writing":
            assert wait_for(process, lambda: any(parts.glob("*.partial")))
        elif moment == "evaluating":
            assert wait_for(process, lambda: read(log).count("Start inference") > evaluations)
            time.sleep(chance.uniform(0.0, 0.1))
        elif moment == "step":
            time.sleep(chance.uniform(0.0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, read(tmp_path / "parts.txt")
        if last.exists():
            # Whole, and all that is needed to go on.
            content = torch.load(parts / last.read_text(), weights_only=True)
            assert {"model", "trainer", "iteration"} <= content.keys()

    for moment in ["step", "writing", "evaluating", "chance"] * 5:
        kill_once(moment)
    process = start(args, tmp_path / "parts.txt")
    process.join(timeout=120)
    assert process.exitcode == 0, (tmp_path / "parts.txt").read_text()
    reference.join(timeout=120)
    assert reference.exitcode == 0
    assert_equal(final(whole), final(parts))
    results = [json.loads((x / "results.json").read_text()) for x in (whole, parts)]
    assert results[0]["results"] == results[1]["results"]


def test_another_teacher_is_refused(teacher_files, tmp_path):
    opts = ("SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1)
    teacher = teacher_files["retinanet"]
    main(arguments("retinanet", teacher, tmp_path / "run", *opts))
    other = torch.load(teacher)["model"]
    other["head.cls_score.bias"] += 1e-3
    torch.save({"model": other}, tmp_path / "other.pth")
    args = arguments(
        "retinanet", tmp_path / "other.pth", tmp_path / "run", *opts, flags=["--resume"]
    )
    with pytest.raises(UserError, match=r"taught by another teacher \(fingerprint [0-9a-f]{32}\)"):
        main(args)


def test_a_run_without_a_seed_goes_on_with_the_one_it_drew(teacher_files, tmp_path):
    opts = ("SEED", -1, "SOLVER.CHECKPOINT_PERIOD", 2)
    teacher, output = teacher_files["retinanet"], tmp_path / "run"
    seeds = []
    for stop, flags in ((2, []), (4, ["--resume"]), (4, [])):
        args = arguments("retinanet", teacher, output, *opts, "SOLVER.MAX_ITER", stop, flags=flags)
        seeds.append(setup(args).SEED)
    assert seeds[0] == seeds[1] >= 0
    # A new run has a new one.
    assert seeds[2] != seeds[0]


def test_other_data_are_told(teacher_files, tmp_path, caplog):
    logging.getLogger("detectron2").propagate = True
    teacher = teacher_files["retinanet"]
    opts = ("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER")
    main(arguments("retinanet", teacher, tmp_path, *opts, 2))
    main(arguments("retinanet", teacher, tmp_path, *opts, 3, flags=["--resume"]))
    assert "with other data" not in caplog.text
    more = ("SOLVER.IMS_PER_BATCH", 4)
    main(arguments("retinanet", teacher, tmp_path, *opts, 4, *more, flags=["--resume"]))
    assert "goes on with other data than it had: batch 2 (then), 4 (now)" in caplog.text
    # A checkpoint of Detectron2 knows of no random numbers.
    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    del content["trainer"]["hooks"]["RunState"]
    torch.save(content, tmp_path / "model_final.pth")
    main(arguments("retinanet", teacher, tmp_path, *opts, 5, *more, flags=["--resume"]))
    assert "The checkpoint holds no random numbers" in caplog.text
