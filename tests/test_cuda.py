"""On a GPU: the results of the CPU, mixed precision, whole runs. Skipped where there is none."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import (
    FAMILIES,
    REPO,
    SHIPPED,
    build_distilled,
    distill_cfg,
    gradients,
    make_batch,
    rand,
    value_and_gradient,
)

from pcka_distill import functional, get_distill_cfg, kernels
from pcka_distill.engine import main
from pcka_distill.functional import FORMS, LAYOUTS, pcka_loss, rcka_loss
from pcka_distill.inference import Predictor
from pcka_distill.step import TrainingStep

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("digits", "full_fp32"),
]


@pytest.fixture
def full_fp32():
    """Products of ten bits (TF32) are near enough for training, and too coarse to compare."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [x.allow_tf32 for x in switches]
    for x in switches:
        x.allow_tf32 = False
    yield
    for x, value in zip(switches, before):
        x.allow_tf32 = value


def distance(a, b):
    return ((a.cpu().double() - b.double()).norm() / b.double().norm()).item()


# ---- the losses ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "patch"), [((2, 5, 9, 13), 4), ((2, 24, 50, 84), 16)])
@pytest.mark.parametrize("own_kernels", [True, False])
def test_pcka_is_that_of_the_cpu(layout, center, form, shape, patch, own_kernels, monkeypatch):
    assert kernels._run(torch.device(DEVICE, 0))
    monkeypatch.setattr(kernels, "_run", lambda device: own_kernels)
    x = rand(*shape, dtype=torch.float64)
    y = 0.5 * x + rand(*shape, seed=1, dtype=torch.float64)
    options = {"layout": layout, "center": center, "form": form, "inter_weight": 2.0}
    options["patch_size"] = patch
    expected, gradient = value_and_gradient(pcka_loss, x, y, **options)
    for budget in (functional._DEVICE_BUDGET, 1):
        monkeypatch.setattr(functional, "_DEVICE_BUDGET", budget)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            there = [z.to(DEVICE, dtype) for z in (x, y)]
            value, found = value_and_gradient(pcka_loss, *there, **options)
            assert value.device.type == DEVICE and value.dtype == dtype
            assert value.item() == pytest.approx(expected.item(), rel=tolerance)
            assert distance(found, gradient) < tolerance


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_pcka_under_autocast(half):
    """Of maps in half precision, in fp32; the gradient leaves room for AMP's scale."""
    x, y = (rand(2, 16, 50, 84, seed=i).to(half) for i in range(2))
    options = {"patch_size": 16, "inter_weight": 1.0}
    expected, gradient = value_and_gradient(pcka_loss, x.double(), y.double(), **options)

    def scaled(x, y, **options):
        return 65536.0 * pcka_loss(x, y, **options)

    with torch.autocast(DEVICE, dtype=half):
        value, found = value_and_gradient(scaled, x.to(DEVICE), y.to(DEVICE), **options)
    assert value.dtype == torch.float32 and found.dtype == half
    assert value.item() / 65536 == pytest.approx(expected.item(), rel=1e-4)
    assert distance(found.double() / 65536, gradient) < torch.finfo(half).eps


@pytest.mark.parametrize("rows", [6, 300])
def test_rcka_is_that_of_the_cpu(rows):
    x, y = (rand(rows, 9, seed=i, dtype=torch.float64) for i in range(2))
    expected, gradient = value_and_gradient(rcka_loss, x, y)
    value, found = value_and_gradient(rcka_loss, x.to(DEVICE), y.to(DEVICE))
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert distance(found, gradient) < 1e-10


@pytest.mark.parametrize("options", [{}, {"form": "signed"}, {"layout": "sample"}])
@pytest.mark.parametrize("inter_weight", [0.0, 1.0])
def test_the_loss_does_not_wait_for_the_device(options, inter_weight):
    """Nothing of it is read back: the processor goes on while the GPU computes."""
    x, y = (rand(2, 16, 40, 52, seed=i).to(DEVICE) for i in range(2))
    options = {"patch_size": 8, "inter_weight": inter_weight, **options}
    value_and_gradient(pcka_loss, x, y, **options)
    with warnings.catch_warnings():
        # torch says that it may overlook some.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            value_and_gradient(pcka_loss, x, y, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_runs_of_pcka_repeat_bit_for_bit():
    x, y = (rand(2, 64, 100, 168, seed=i).to(DEVICE) for i in range(2))
    options = {"patch_size": 16, "inter_weight": 1.0}
    one, other = (value_and_gradient(pcka_loss, x, y, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("own_kernels", [True, False])
@pytest.mark.parametrize("options", [{}, {"inter_weight": 1.0}])
def test_memory_of_the_loss(options, own_kernels, monkeypatch):
    """P3 to P6 of an 800 x 1333 image together: at most 1.5 of both sides' features."""
    monkeypatch.setattr(kernels, "_run", lambda device: own_kernels)
    sides = ((100, 168), (50, 84), (25, 42), (13, 21))
    pairs = [[torch.randn(2, 256, *side, device=DEVICE) for _ in range(2)] for side in sides]

    def train():
        losses = [pcka_loss(x, y, **options) for x, y in pairs]
        torch.autograd.grad(sum(losses), [x for x, _ in pairs])

    for x, _ in pairs:
        x.requires_grad_()
    train()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.5 * sum(2 * 4 * x.numel() for x, _ in pairs)


# ---- the model -------------------------------------------------------------------------------

_FEATURES = ("PCKA", "Mimic", "AT", "CWD", "PKD", "FGD", "MGD", "FCKA", "SP", "ReviewKD")
FEATURE_LOSSES = [f"{x}Loss" for x in _FEATURES]
LOGIT_LOSSES = ["KDLoss", "DISTLoss", "RCKALoss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_loss_is_that_of_the_cpu(family, teacher_files):
    """Those on features; where nothing is sampled, on logits, and the student's own, too."""
    dense = family in ("retinanet", "fcos")
    kinds = FEATURE_LOSSES + LOGIT_LOSSES * (family not in ("cascade_rcnn", "sem_seg"))
    # It covers cells at random, and a GPU draws other numbers.
    kinds.remove("MGDLoss")
    if family == "sem_seg":
        # There are no boxes.
        kinds.remove("FGDLoss")
    if family == "c4_rcnn":
        # Of one level there is nothing to fuse.
        kinds.remove("ReviewKDLoss")
    opts = ("MODEL.DISTILL.LOSSES", kinds)
    model = build_distilled(family, teacher_files, "MODEL.DEVICE", "cpu", *opts)
    there = build_model(distill_cfg(family, teacher_files[family], "MODEL.DEVICE", DEVICE, *opts))
    there.load_state_dict(model.state_dict())
    expected, _ = gradients(model, make_batch())
    losses, found = gradients(there, make_batch())
    assert expected.keys() == losses.keys() and found
    compared = [k for k in kinds if dense or k in FEATURE_LOSSES]
    own = {f"loss_{k.removesuffix('Loss').lower()}" for k in compared}
    assert own == {x for x in own if any(name.startswith(x) for name in losses)}
    for name, value in losses.items():
        assert torch.isfinite(value)
        if dense or name.startswith(tuple(own)):
            assert value.item() == pytest.approx(expected[name].item(), rel=2e-3, abs=1e-5), name
    assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_mixed_precision(family, precision, teacher_files):
    """Losses are finite, the student learns, and its weights stay in fp32."""
    opts = ("MODEL.DISTILL.LOSSES", ["PCKALoss", "MimicLoss", "PKDLoss"], "MODEL.DEVICE", DEVICE)
    model = build_distilled(family, teacher_files, *opts)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler(DEVICE) if precision is torch.float16 else None
    step = TrainingStep(model, [make_batch()] * 12, optimizer, precision=precision, scaler=scaler)
    before = {k: x.clone() for k, x in model.named_parameters()}
    totals = []
    for i in range(12):
        step.iter = i
        with EventStorage(i) as storage:
            step.run_step()
        totals.append(storage.latest()["total_loss"][0])
    assert all(math.isfinite(x) for x in totals)
    assert sum(totals[-3:]) < sum(totals[:3])
    after = dict(model.named_parameters())
    assert all(x.dtype == torch.float32 for x in after.values())
    assert any(not torch.equal(x, before[k]) for k, x in after.items())
    if scaler is not None:
        assert 2**8 <= scaler.get_scale() <= 2**16


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_teacher_in_half_precision_teaches_the_same(precision, channels_last, teacher_files):
    plain = build_distilled("retinanet", teacher_files, "MODEL.DEVICE", DEVICE)
    other = build_distilled(
        "retinanet", teacher_files, "MODEL.DEVICE", DEVICE,
        "MODEL.DISTILL.TEACHER.PRECISION", precision,
        "MODEL.DISTILL.TEACHER.CHANNELS_LAST", channels_last,
    )  # fmt: skip
    expected, _ = gradients(plain, make_batch())
    losses, _ = gradients(other, make_batch())
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=2e-2), name


def test_a_compiled_teacher_teaches_the_same(teacher_files):
    plain = build_distilled("retinanet", teacher_files, "MODEL.DEVICE", DEVICE)
    opts = ("MODEL.DEVICE", DEVICE, "MODEL.DISTILL.TEACHER.COMPILE", True)
    other = build_distilled("retinanet", teacher_files, *opts)
    expected, _ = gradients(plain, make_batch())
    losses, _ = gradients(other, make_batch())
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-3), name


# ---- whole runs ------------------------------------------------------------------------------


def options(family, teacher, output, *opts):
    config = REPO / "configs" / "Digits" / f"{family}_pcka.yaml"
    student = REPO / "configs" / "Digits" / f"{family}_student.yaml"
    return [
        *("--config-file", str(config)),
        *("MODEL.DEVICE", DEVICE, "OUTPUT_DIR", str(output), "TEST.EVAL_PERIOD", "0"),
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", str(student)),
        *("MODEL.DISTILL.TEACHER.WEIGHTS", teacher),
        *("SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"),
        *map(str, opts),
    ]


def run(arguments, *flags):
    return main(default_argument_parser().parse_args([*flags, *arguments]))


@pytest.mark.parametrize("family", SHIPPED)
def test_a_run_in_float16(family, teacher_files, tmp_path):
    """Trained, evaluated, resumed; and read on a CPU by Detectron2 alone."""
    opts = (
        *("SOLVER.AMP.ENABLED", True, "MODEL.DISTILL.TEACHER.PRECISION", "float16"),
        *("MODEL.DISTILL.TEACHER.CHANNELS_LAST", True),
        *("MODEL.DISTILL.LOSSES", "['PCKALoss','RCKALoss','MimicLoss']"),
    )
    arguments = options(family, teacher_files[family], tmp_path, *opts)
    results = run(arguments)
    assert results
    said = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    assert all(math.isfinite(x["total_loss"]) for x in said if "total_loss" in x)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    saved = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    assert "cuda" in saved["trainer"]["hooks"]["RunState"]["processes"][0]
    run(arguments, "--resume")
    # Of FCOS Detectron2 has no keys.
    cfg = get_distill_cfg() if family == "fcos" else get_cfg()
    cfg.merge_from_file(str(tmp_path / "student_config.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    student = build_model(cfg)
    DetectionCheckpointer(student).load(str(tmp_path / "model_final.pth"))
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(x, final[k].cpu()) for k, x in student.state_dict().items())


def test_a_resumed_run_goes_on_where_it_was(teacher_files, tmp_path, monkeypatch):
    """The random numbers of the device, too; some gradients of a GPU are sums in any order."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    weights = teacher_files["faster_rcnn"]
    opts = ("DATASETS.TEST", "()", "SEED", 5, "SOLVER.WARMUP_ITERS", 0)
    arguments = options("faster_rcnn", weights, tmp_path, *opts)
    run(arguments)
    whole = torch.load(tmp_path / "model_final.pth", weights_only=True)
    middle = torch.load(tmp_path / "model_0000001.pth", weights_only=True)["model"]
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    run(arguments, "--resume")
    again = torch.load(tmp_path / "model_final.pth", weights_only=True)
    states = [x["trainer"]["hooks"]["RunState"]["processes"][0] for x in (whole, again)]
    assert torch.equal(states[0]["cuda"], states[1]["cuda"])
    weights = [k for k, x in whole["model"].items() if k.endswith("weight")]
    one, other, start = (
        torch.cat([x[k].flatten().cpu() for k in weights])
        for x in (whole["model"], again["model"], middle)
    )
    # Of how far they went since then.
    assert (other - one).norm() < 0.1 * (one - start).norm()


def test_maps_read_from_the_cache(teacher_files, tmp_path):
    opts = ("DATASETS.TEST", "()", "SEED", 5, "MODEL.DISTILL.TEACHER.CACHE.DIR", tmp_path / "maps")
    losses = []
    for name in ("cold", "warm"):
        run(options("retinanet", teacher_files["retinanet"], tmp_path / name, *opts))
        lines = [json.loads(x) for x in (tmp_path / name / "metrics.json").read_text().splitlines()]
        losses.append(lines[-1]["loss_pcka_p3"])
        assert lines[-1]["teacher_cache_hits"] == float(name == "warm")
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("how", ["launcher", "torchrun"])
def test_a_run_as_a_process_of_a_group(how, teacher_files, tmp_path):
    """The ways to start one; with one device there is nobody to talk to."""
    start = [sys.executable, str(REPO / "tools" / "train_net.py")]
    flags = ["--num-gpus", "1"]
    if how == "torchrun":
        start[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        flags = []
    arguments = options("retinanet", teacher_files["retinanet"], tmp_path, "DATASETS.TEST", "()")
    done = subprocess.run([*start, *flags, *arguments], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model_final.pth").exists()
    assert done.stdout.count("Starting training from iteration 0") == 1


def test_a_predictor(teacher_files):
    config = str(REPO / "configs" / "Digits" / "retinanet_student.yaml")
    image = make_batch()[0]["image"].permute(1, 2, 0).numpy()
    found = []
    for device in ("cpu", DEVICE):
        predictor = Predictor.load(config, teacher_files["retinanet"], ["MODEL.DEVICE", device])
        found.append(predictor(image)["instances"].to("cpu"))
    one, other = found
    assert len(one) == len(other) > 0
    torch.testing.assert_close(other.scores, one.scores, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.pred_boxes.tensor, one.pred_boxes.tensor, rtol=0, atol=0.1)
