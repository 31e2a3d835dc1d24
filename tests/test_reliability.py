"""What a team that trains for days relies on: equalities, hard input, memory, the teacher."""

import errno
import gc
import logging
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.engine import SimpleTrainer, default_argument_parser
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage, JSONWriter
from helpers import FAMILIES, REPO, build_distilled, digits_cfg, distill_cfg, make_batch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pcka_distill import (
    DISTILL_LOSS_REGISTRY,
    FrozenTeacher,
    UserError,
)
from pcka_distill import checkpoint as checkpoint_module
from pcka_distill.build import build_teacher
from pcka_distill.engine import main
from pcka_distill.preflight import check_teacher
from pcka_distill.step import TrainingStep
from pcka_distill.teacher import fingerprint

LOSSES = [name for name, _ in DISTILL_LOSS_REGISTRY]


def train(model, kind, steps, batches=4):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    step = kind(model, [make_batch(i % batches) for i in range(steps)], optimizer)
    with EventStorage(0) as storage:
        for i in range(steps):
            storage.iter = step.iter = i
            step.run_step()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_0_is_stock_detectron2_after_fifty_steps(family, teacher_files):
    """Weights, buffers and all: its trainer and the plain student, ours and the distilled one."""
    torch.manual_seed(0)
    stock = train(build_model(digits_cfg(family)), SimpleTrainer, 50)
    model = build_distilled(family, teacher_files, "MODEL.DISTILL.PCKA.WEIGHT", 0.0)
    found = train(model, TrainingStep, 50).state_dict()
    expected = stock.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(x, found[k]) for k, x in expected.items())


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn", "sem_seg"])
def test_deterministic_runs_are_equal(family, teacher_files, tmp_path, monkeypatch):
    """And torch has been told to refuse what is not."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    cfg = distill_cfg(family, teacher_files[family], "MODEL.DEVICE", "cpu")
    (tmp_path / "x.yaml").write_text(cfg.dump())
    opts = ["SOLVER.DETERMINISTIC", "True", "SOLVER.MAX_ITER", "3", "DATASETS.TEST", "()"]
    opts += ["SOLVER.IMS_PER_BATCH", "4", "SEED", "3"]
    try:
        for name in "ab":
            args = ["--config-file", str(tmp_path / "x.yaml"), *opts]
            args += ["OUTPUT_DIR", str(tmp_path / name)]
            main(default_argument_parser().parse_args(args))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = (torch.load(tmp_path / x / "model_final.pth", weights_only=True) for x in "ab")
    assert all(torch.equal(x, b["model"][k]) for k, x in a["model"].items())


def test_the_teacher_is_the_same_after_training(teacher_files):
    names = [x for x in LOSSES if x != "DKDLoss"]
    model = build_distilled(
        "retinanet", teacher_files, "MODEL.DISTILL.LOSSES", names,
        "MODEL.DISTILL.TEACHER.PRECISION", "bfloat16",
    )  # fmt: skip
    before, student = fingerprint(model.teacher.model), fingerprint(model.student)
    train(model, TrainingStep, 5)
    assert fingerprint(model.teacher.model) == before
    assert fingerprint(model.student) != student
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.model.parameters())


HARD = {
    "tiny": lambda x: x * 1e-8,
    "huge": lambda x: x * 1e6,
    "dead channels": lambda x: x * (torch.arange(x.shape[1]) % 2)[:, None, None],
    "identical patches": lambda x: x[..., :1, :1].expand_as(x) + 0 * x,
    "zero": lambda x: 0 * x,
    "one hot": lambda x: x * (torch.arange(x.shape[-1]) == 0),
}


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("hard", HARD)
def test_every_loss_is_finite_on_hard_features(hard, side, teacher_files):
    """All at once, under bf16; what the losses give back to the backbone, too."""
    names = [x for x in LOSSES if x != "DKDLoss"]
    model = build_distilled("retinanet", teacher_files, "MODEL.DISTILL.LOSSES", names)
    seen = []

    def spoil(module, args, output):
        changed = {k: HARD[hard](x) for k, x in output.items()}
        if module is model.student.backbone:
            for x in changed.values():
                x.requires_grad_()
                x.retain_grad()
            seen.append(changed)
        return changed

    for kind, net in (("student", model.student), ("teacher", model.teacher.model)):
        if side in (kind, "both"):
            net.backbone.register_forward_hook(spoil)
    with EventStorage(0), torch.autocast("cpu", torch.bfloat16):
        losses = model(make_batch())
    taught = {k: v for k, v in losses.items() if k not in ("loss_cls", "loss_box_reg")}
    assert len(taught) > len(names)
    assert all(x.isfinite() for x in taught.values()), taught
    assert all(x.dtype == torch.float32 for x in taught.values())
    sum(taught.values()).backward()
    for maps in seen:
        assert all(x.grad is None or x.grad.isfinite().all() for x in maps.values())


def test_constant_images(teacher_files):
    names = [x for x in LOSSES if x != "DKDLoss"]
    model = build_distilled("retinanet", teacher_files, "MODEL.DISTILL.LOSSES", names)
    batch = make_batch()
    for x in batch:
        x["image"] = torch.full_like(x["image"], 127)
    with EventStorage(0), torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_memory_is_flat_over_two_thousand_steps(teacher_files):
    """No tensor is kept by a hook, a recorder, a cache of shapes or a log."""
    model = build_distilled("retinanet", teacher_files, "MODEL.DISTILL.PCKA.PATCH_SIZE", (1,))
    batch = make_batch(sizes=((32, 32), (32, 32)))
    for x in batch:
        x["instances"].gt_boxes.clip((32, 32))
        x["instances"] = x["instances"][x["instances"].gt_boxes.nonempty()]
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    step = TrainingStep(model, [batch] * 2000, optimizer)

    def alive():
        gc.collect()
        return sum(1 for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))

    counts, used = [], []
    with EventStorage(0) as storage:
        for i in range(2000):
            step.iter = storage.iter = i
            step.run_step()
            # Detectron2's writers clear what a run has shown.
            storage.clear_images()
            if i in (199, 1999):
                counts.append(alive())
                used.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert counts[0] == counts[1]
    # Kilobytes: what Detectron2's own log of 1,800 more steps takes, and no more.
    assert used[1] - used[0] < 20_000


@pytest.mark.parametrize("whole", [True, False])
def test_an_average_of_the_student(whole, teacher_files):
    """EMA by torch: of the student, or of all with the teacher left as it is."""
    model = build_distilled("retinanet", teacher_files)
    net = model if whole else model.student
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    expected = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    step = TrainingStep(model, [make_batch(i) for i in range(3)], optimizer)
    with EventStorage(0):
        for i in range(3):
            step.iter = i
            step.run_step()
            average.update_parameters(net)
            state = net.state_dict()
            for k, v in state.items():
                floating = v.is_floating_point()
                first = i == 0
                expected[k] = v.clone() if first or not floating else 0.9 * expected[k] + 0.1 * v
    found = average.module.state_dict()
    for k, v in expected.items():
        if v.is_floating_point():
            torch.testing.assert_close(found[k], v, rtol=1e-5, atol=1e-6)
    # It detects, and is loaded into a plain student.
    average.eval()
    with torch.no_grad():
        assert len(average.module(make_batch())) == 2
    plain = build_model(digits_cfg("retinanet"))
    plain.load_state_dict(found, strict=False)


# ---- the teacher, before the first iteration --------------------------------------------------


def preflight(teacher, *opts):
    cfg = digits_cfg(
        "retinanet_pcka", "MODEL.DISTILL.TEACHER.MIN_AP", 10.0,
        "MODEL.DISTILL.TEACHER.MIN_AP_IMAGES", 5, *opts,
    )  # fmt: skip
    return check_teacher(cfg, teacher)


class Oracle(torch.nn.Module):
    """Detects what is there, if it is shown the image as it is."""

    def __init__(self, records):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.records = {x["image_id"]: x for x in records}

    def forward(self, inputs):
        outputs = []
        for x in inputs:
            record = self.records[x["image_id"]]
            size = (record["height"], record["width"])
            truth = annotations_to_instances(record["annotations"], size, "bitmask")
            found = Instances(size)
            found.pred_boxes, found.pred_classes = truth.gt_boxes, truth.gt_classes
            found.scores = torch.ones(len(truth))
            image = torch.from_numpy(read_image(record["file_name"], "BGR").copy()).permute(2, 0, 1)
            if not torch.equal(image, x["image"]):
                found.pred_classes = (found.pred_classes + 1) % 10
            outputs.append({"instances": found})
        return outputs


@pytest.fixture
def oracle(digits):
    return Oracle(DatasetCatalog.get("digits_val"))


def test_a_teacher_that_detects(oracle, caplog):
    logging.getLogger("detectron2").propagate = True
    with caplog.at_level(logging.INFO, logger="detectron2"):
        assert preflight(FrozenTeacher(oracle, input_format="BGR")) == pytest.approx(100.0)
    assert "Teacher: AP 100.0 on 5 images of digits_val" in caplog.text


def test_a_teacher_that_does_not(teacher_files, oracle):
    """Random, or fed with the channels in the wrong order."""
    random = build_teacher(distill_cfg("retinanet", teacher_files["retinanet"]))
    with pytest.raises(UserError, match=r"the teacher's AP is 0\.\d on images of digits_val, and"):
        preflight(random)
    with pytest.raises(UserError, match=r"the teacher's AP is 0\.0"):
        preflight(FrozenTeacher(oracle, input_format="RGB"))


def test_it_is_asked_before_the_first_iteration(teacher_files, tmp_path):
    path = REPO / "configs" / "Digits" / "retinanet_pcka.yaml"
    opts = [
        *("MODEL.DISTILL.TEACHER.WEIGHTS", teacher_files["retinanet"]),
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", REPO / "configs/Digits/retinanet_student.yaml"),
        *("MODEL.DISTILL.TEACHER.MIN_AP", 5, "MODEL.DISTILL.TEACHER.MIN_AP_IMAGES", 3),
        *("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 2),
    ]
    args = default_argument_parser().parse_args(["--config-file", str(path), *map(str, opts)])
    with pytest.raises(UserError, match=r"MODEL\.DISTILL\.TEACHER\.MIN_AP is 5\.0: check its"):
        main(args)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DATASETS.TEST", ()], "name a dataset in DATASETS.TEST, or set it 0"),
        (["MODEL.DISTILL.TEACHER.MIN_AP_IMAGES", 0], "MIN_AP_IMAGES must be positive"),
    ],
)
def test_what_cannot_be_asked(opts, message, oracle):
    with pytest.raises(UserError, match=message):
        preflight(FrozenTeacher(oracle), *opts)


def test_it_is_asked_of_its_own_classes(oracle):
    names = MetadataCatalog.get("digits_val").thing_classes
    assert preflight(FrozenTeacher(oracle, classes=names)) == pytest.approx(100.0)
    with pytest.raises(UserError, match="compares classes, and those of the teacher are not those"):
        preflight(FrozenTeacher(oracle, classes=names[::-1]))


def test_a_mean_in_the_other_order_of_channels(teacher_files, caplog):
    logging.getLogger("detectron2").propagate = True
    opts = ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "INPUT.FORMAT", "RGB"]
    build_teacher(
        distill_cfg("retinanet", teacher_files["retinanet"], "MODEL.DISTILL.TEACHER.OPTS", opts)
    )
    assert "reads RGB images and subtracts ImageNet's mean in the other order" in caplog.text
    caplog.clear()
    opts[-1] = "BGR"
    build_teacher(
        distill_cfg("retinanet", teacher_files["retinanet"], "MODEL.DISTILL.TEACHER.OPTS", opts)
    )
    assert "in the other order" not in caplog.text


def test_a_checkpoint_that_was_normalised_otherwise(teacher_files, tmp_path):
    state = torch.load(teacher_files["retinanet"])["model"]
    state["pixel_mean"] = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"were trained with pixel_mean \[103.*PIXEL_MEAN by MODEL"):
        build_teacher(distill_cfg("retinanet", str(tmp_path / "x.pth")))


# ---- disks ------------------------------------------------------------------------------------


def run_arguments(output, *opts, flags=()):
    path = REPO / "configs" / "Digits" / "retinanet_student.yaml"
    opts = [
        *("OUTPUT_DIR", output, "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.CHECKPOINT_PERIOD", 2, *opts),
    ]
    return ["--config-file", str(path), *flags, *map(str, opts)]


def parse(arguments):
    return default_argument_parser().parse_args(arguments)


def test_a_full_disk_leaves_the_last_checkpoint(digits, tmp_path):
    """A limit on the size of a file stands in for the disk; the run goes on when there is room."""
    main(parse(run_arguments(tmp_path, "SOLVER.MAX_ITER", 2)))
    whole = (tmp_path / "model_final.pth").read_bytes()
    script = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = run_arguments(tmp_path, "SOLVER.MAX_ITER", 6, flags=["--resume"])
    done = subprocess.run(
        [sys.executable, "-c", script, str(REPO / "tools" / "train_net.py"), *arguments],
        capture_output=True, text=True, cwd=REPO,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"^error: checkpoint .*model_0000003.pth cannot be written", last), last
    assert "the last whole one is" in last and "model_final.pth" in last and "--resume" in last
    assert "Traceback" not in done.stderr + done.stdout
    assert (tmp_path / "model_final.pth").read_bytes() == whole
    assert not list(tmp_path.glob("*.partial"))
    main(parse(arguments))
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 5


@pytest.mark.parametrize("name", ["model_0000003.pth", "last_checkpoint"])
def test_a_disk_that_became_read_only(name, digits, tmp_path, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if os.path.basename(target) == name and "3" in (tmp_path / "count").read_text():
            raise OSError(errno.EROFS, "Read-only file system", str(target))
        if str(target).endswith("model_0000003.pth"):
            (tmp_path / "count").write_text("3")
        replace(source, target)

    (tmp_path / "count").write_text("3" if name.startswith("model") else "")
    monkeypatch.setattr(checkpoint_module.os, "replace", refuse)
    with pytest.raises(UserError, match=rf"{name} cannot be written .*Read-only file system"):
        main(parse(run_arguments(tmp_path, "SOLVER.MAX_ITER", 6)))
    monkeypatch.undo()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    main(parse(run_arguments(tmp_path, "SOLVER.MAX_ITER", 6, flags=["--resume"])))
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 5


def test_a_log_that_cannot_be_written(digits, tmp_path, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JSONWriter, "write", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; make room"):
        main(parse(run_arguments(tmp_path, "SOLVER.MAX_ITER", 2)))


# ---- weights by the gradient ------------------------------------------------------------------


def calibrate(*arguments):
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / "calibrate_weights.py"), *map(str, arguments)],
        capture_output=True, text=True, cwd=REPO,
    )  # fmt: skip


def test_calibrated_weights_have_the_share_that_was_asked_for(digits, teacher_files, tmp_path):
    """Measured again with the weights that were proposed."""
    config = ["--config-file", "configs/Digits/retinanet_pcka.yaml", "--iterations", 1]
    opts = [
        *("MODEL.DISTILL.TEACHER.WEIGHTS", teacher_files["retinanet"]),
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", "configs/Digits/retinanet_student.yaml"),
        *("SOLVER.IMS_PER_BATCH", 2, "MODEL.DISTILL.LOSSES", "['PCKALoss','MimicLoss']"),
    ]
    done = calibrate(*config, "--share", 0.2, *opts)
    assert done.returncode == 0, done.stderr
    proposed = re.findall(r"^  (MODEL\.DISTILL\.\w+\.WEIGHT) (\S+)$", done.stdout, re.M)
    assert [k for k, _ in proposed] == ["MODEL.DISTILL.PCKA.WEIGHT", "MODEL.DISTILL.MIMIC.WEIGHT"]
    done = calibrate(*config, "--share", 0.2, *opts, *(x for pair in proposed for x in pair))
    shares = re.search(r"Shares in the gradient at iteration 0: (.*)", done.stdout + done.stderr)[1]
    for loss in ("pcka", "mimic"):
        found = sum(float(x) for x in re.findall(rf"{loss}_p\d ([\d.]+)%", shares))
        assert found == pytest.approx(20.0, abs=0.5)
    again = re.findall(r"^  (MODEL\.DISTILL\.\w+\.WEIGHT) (\S+)$", done.stdout, re.M)
    for (_, a), (_, b) in zip(proposed, again):
        assert float(a) == pytest.approx(float(b), rel=0.02)
    done = calibrate(*config, "--share", 0.6, *opts)
    assert done.returncode == 1 and "positive and less than 0.50" in done.stderr.splitlines()[-1]
    # It is said before anything is measured, and by nobody else.
    assert "Starting training" not in done.stdout + done.stderr
    assert "Warning" not in done.stderr


def test_weights_of_a_config_that_distils_nothing(digits):
    done = calibrate("--config-file", "configs/Digits/retinanet_student.yaml")
    assert done.returncode == 1 and "distils nothing" in done.stderr.splitlines()[-1]


def test_a_teacher_of_other_classes(oracle):
    """Its detections name a class that the dataset does not have."""
    forward = oracle.forward

    def shifted(inputs):
        outputs = forward(inputs)
        for x in outputs:
            x["instances"].pred_classes += 70
        return outputs

    oracle.forward = shifted
    with pytest.raises(UserError, match="no AP of the teacher: A prediction has class="):
        preflight(FrozenTeacher(oracle))


def test_one_of_several_processes_looks_at_all_images(oracle, monkeypatch):
    """Detectron2's sampler would give it a share of them."""
    monkeypatch.setattr(
        "detectron2.data.samplers.distributed_sampler.comm.get_world_size", lambda: 4
    )
    monkeypatch.setattr("pcka_distill.preflight.comm.all_gather", lambda x: [x])
    assert preflight(FrozenTeacher(oracle)) == pytest.approx(100.0)
