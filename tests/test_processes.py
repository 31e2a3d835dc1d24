"""Several processes, of one machine or of several, started by Detectron2's launcher or by torchrun.

On a CPU they are joined by gloo; what differs with NCCL was not run here.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from detectron2.modeling import build_model
from helpers import FROZEN_NORM, REPO, digits_cfg

pytestmark = pytest.mark.usefixtures("digits")
SCRIPT = str(REPO / "tests" / "train_in_processes.py")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def arguments(teacher, output, *opts, config="retinanet_pcka"):
    family = config.rpartition("_")[0]
    opts = [
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", REPO / "configs/Digits" / f"{family}_student.yaml"),
        *("MODEL.DISTILL.TEACHER.WEIGHTS", teacher, "SOLVER.IMS_PER_BATCH", 4),
        *("MODEL.DISTILL.LOSSES", "['PCKALoss','MimicLoss']"),
        *("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 0),
        *opts, "OUTPUT_DIR", output,
    ]  # fmt: skip
    path = REPO / "configs" / "Digits" / f"{config}.yaml"
    return ["--config-file", str(path)], [str(x) for x in opts]


def start(command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "tests")} | {
        k: str(v) for k, v in environment.items()
    }
    return subprocess.Popen(
        command, cwd=REPO, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def launch(how, config, opts, **environment):
    """Two processes, in one of three ways."""
    python = [sys.executable, SCRIPT]
    url = ["--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    if how == "alone":
        return [start([*python, *config, *opts], **environment)]
    if how == "launcher":
        return [start([*python, *config, "--num-gpus", "2", *url, *opts], **environment)]
    if how == "machines":
        flags = ["--num-machines", "2", "--num-gpus", "1", *url, "--machine-rank"]
        return [start([*python, *config, *flags, str(i), *opts], **environment) for i in range(2)]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    run += ["--master_port", str(free_port()), SCRIPT]
    return [start([*run, *config, *opts], **environment)]


def finish(processes):
    said = [p.communicate(timeout=240)[0] for p in processes]
    assert all(p.returncode == 0 for p in processes), said
    return said[0]


# Nothing here relates images to one another, and nothing draws random numbers.
SEPARATE = (
    *("MODEL.DISTILL.STUDENT_ARCHITECTURE", "Untaught"),
    *("MODEL.DISTILL.PCKA.LAYOUT", "per_image", "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.05),
    *FROZEN_NORM,
)


def final(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_two_processes_make_the_update_of_one(teacher_files, tmp_path):
    """Of the same global batch; three iterations, and every way to start them."""
    said = {}
    for how in ("alone", "launcher", "machines", "torchrun"):
        processes = launch(how, *arguments(teacher_files["retinanet"], tmp_path / how, *SEPARATE))
        said[how] = finish(processes)
        assert f"weights in step in {1 if how == 'alone' else 2} processes: True" in said[how]
    alone = final(tmp_path / "alone")
    start = torch.load(teacher_files["retinanet"])["model"]
    # Trained it was: the student's and the adapters' weights are not those of the beginning.
    assert any(k.startswith("distill.") for k in alone)
    for how in ("launcher", "machines", "torchrun"):
        found = final(tmp_path / how)
        assert found.keys() == alone.keys()
        for name, x in alone.items():
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6)
    launcher = final(tmp_path / "launcher")
    for how in ("machines", "torchrun"):
        assert all(torch.equal(x, final(tmp_path / how)[k]) for k, x in launcher.items())
    assert len(start) > 0
    # Nothing is logged twice.
    log = (tmp_path / "launcher" / "log.txt").read_text()
    assert log.count("Starting training from iteration 0") == 1
    for line in ("Starting training from iteration 0", "Fingerprint of the teacher"):
        assert said["launcher"].count(line) == 1 and said["torchrun"].count(line) == 1


def test_processes_are_in_step_and_evaluate_one_model(teacher_files, tmp_path):
    """Batch norm, sampled regions, adapters, and an evaluation in the middle; then resumed."""
    opts = [
        "DATASETS.TEST",
        "('digits_val',)",
        "TEST.EVAL_PERIOD",
        2,
        "SOLVER.CHECKPOINT_PERIOD",
        2,
    ]
    config, opts = arguments(
        teacher_files["faster_rcnn"], tmp_path / "run", *opts, config="faster_rcnn_pcka"
    )
    said = finish(launch("launcher", config, opts))
    assert "weights in step in 2 processes: True" in said
    assert "buffers in step in 2 processes: True" in said
    whole = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert len(whole["trainer"]["hooks"]["RunState"]["processes"]) == 2
    # The random numbers of both processes go on.
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    finish(launch("launcher", [*config, "--resume"], opts))
    again = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert all(torch.equal(x, again["model"][k]) for k, x in whole["model"].items())
    # On another number of processes they cannot, and it is said.
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    said = finish(launch("alone", [*config, "--resume"], opts))
    assert "was made by 2 processes and goes on with 1" in said


@pytest.mark.parametrize(
    ("config", "losses", "dataset"),
    [
        ("sem_seg_pcka", ["PCKALoss", "RCKALoss"], "digits_sem_seg_val"),
        ("classifier_rcka", ["FCKALoss", "RCKALoss"], "digit_scans_test"),
    ],
)
def test_other_tasks_in_mixed_precision(config, losses, dataset, tmp_path):
    """Pixels and images, in two processes and bf16: in step, and evaluated together."""
    cfg = digits_cfg(config.rpartition("_")[0] + "_student")
    torch.manual_seed(7)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "teacher.pth")
    opts = ["MODEL.DISTILL.LOSSES", losses, "DATASETS.TEST", (dataset,), "SOLVER.AMP.ENABLED", True]
    opts += ["SOLVER.IMS_PER_BATCH", 8]
    config, opts = arguments(tmp_path / "teacher.pth", tmp_path / "run", *opts, config=config)
    said = finish(launch("launcher", config, opts))
    assert "weights in step in 2 processes: True" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert list(results) == [dataset]
    first = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[0])
    terms = {
        k for k in first if k.startswith("loss_") and k.split("_")[1] in ("pcka", "rcka", "fcka")
    }
    assert len(terms) >= 3 and all(math.isfinite(first[k]) for k in terms)


@pytest.mark.parametrize("how", ["launcher", "machines", "torchrun"])
def test_a_crash_of_one_process_ends_all(how, teacher_files, tmp_path):
    """Within a minute, and with the first error shown."""
    config, opts = arguments(
        teacher_files["retinanet"], tmp_path / "run", "SOLVER.MAX_ITER", 100000
    )
    processes = launch(how, config, opts, FAIL=f"1 2 {tmp_path / 'failed'}")
    said = [p.communicate(timeout=240)[0] for p in processes]
    ended = time.time()
    assert all(p.returncode != 0 for p in processes)
    assert any("RuntimeError: the first error" in x for x in said)
    assert ended - float((tmp_path / "failed").read_text()) < 60


def test_a_loss_that_is_not_finite_in_one_process(teacher_files, tmp_path):
    """Every process says the same; one line, with the process."""
    teacher = torch.load(teacher_files["retinanet"])
    teacher["model"]["backbone.fpn_output5.weight"] *= float("inf")
    torch.save(teacher, tmp_path / "bad.pth")
    config, opts = arguments(tmp_path / "bad.pth", tmp_path / "run")
    processes = launch("launcher", config, opts)
    said = processes[0].communicate(timeout=240)[0]
    assert processes[0].returncode == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: not finite: in process 0 loss_") and "in process 1 loss_" in last
    assert len(list((tmp_path / "run").glob("nonfinite_0000000_rank*.pth"))) == 2
