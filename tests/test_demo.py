"""`make demo` in small: whole, interrupted, run again."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import REPO
from PIL import Image

from pcka_distill import UserError, bench, get_distill_cfg
from pcka_distill.build import merge_config
from pcka_distill.demo import run_demo

pytestmark = pytest.mark.usefixtures("digits")

SMALL = ["SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "('digits_test',)"]
STUDENT = "configs/Digits/retinanet_student.yaml"


def forbid_processes(monkeypatch):
    def start(command, **_):
        raise AssertionError(f"started {command}")

    monkeypatch.setattr(bench.subprocess, "Popen", start)


def test_interrupted_continued_and_run_again(tmp_path, capfd, monkeypatch):
    opts = [*SMALL, "SOLVER.MAX_ITER", 16]
    command = [sys.executable, str(REPO / "tools" / "demo.py"), "--output", str(tmp_path)]
    demo = subprocess.Popen(
        [*command, *map(str, opts)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore it, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first = tmp_path / "teacher" / "last_checkpoint"
    while not first.exists():
        assert demo.poll() is None
        time.sleep(0.05)
    # As Ctrl-C in a terminal does: to the demo and to its child.
    os.killpg(demo.pid, signal.SIGINT)
    message = demo.communicate(timeout=60)[1]
    assert demo.returncode == 1
    assert message.strip() == "interrupted; `make demo` goes on from the last checkpoint"
    assert not (tmp_path / "teacher" / "results.json").exists()

    run_demo(tmp_path, opts)
    log = (tmp_path / "teacher" / "train.log").read_text()
    starts = [int(x) for x in re.findall(r"Starting training from iteration (\d+)", log)]
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1]
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert [r.split("|")[1].strip() for r in rows[2:]] == [
        "teacher", "plain student", "distilled student",
    ]  # fmt: skip
    said = capfd.readouterr().out
    assert rows[-1] in said
    assert "AP on test with a teacher" in said
    picture = Image.open(tmp_path / "picture.png")
    assert min(picture.size) > 500
    assert picture.convert("L").getextrema() == (0, 255)

    # All of it is there: only the table and the picture are made again.
    forbid_processes(monkeypatch)
    (tmp_path / "picture.png").unlink()
    run_demo(tmp_path, opts)
    assert rows[-1] in capfd.readouterr().out
    assert (tmp_path / "picture.png").exists()


def test_a_run_of_another_config_is_kept(tmp_path, monkeypatch):
    opts = [*SMALL, "SOLVER.MAX_ITER", 2]
    results = bench.run(STUDENT, tmp_path, [*opts, "SEED", 0], label="student")
    assert results["results"]["digits_test"]["bbox"]["AP"] >= 0
    forbid_processes(monkeypatch)
    assert bench.run(STUDENT, tmp_path, [*opts, "SEED", 0], label="student") == results
    with pytest.raises(UserError, match="holds a run of another config; remove that folder"):
        bench.run(STUDENT, tmp_path, [*opts, "SEED", 1], label="student")
    assert (tmp_path / "results.json").exists()
    (tmp_path / "model_final.pth").unlink()
    with pytest.raises(UserError, match=r"lost its model_final.pth; remove that folder"):
        bench.run(STUDENT, tmp_path, [*opts, "SEED", 0], label="student")


def test_a_student_of_an_earlier_teacher_is_kept(tmp_path, monkeypatch):
    teacher = tmp_path / "teacher.pth"
    teacher.touch()
    cfg = get_distill_cfg()
    weights = ["MODEL.DISTILL.TEACHER.WEIGHTS", str(teacher)]
    folder = tmp_path / "student"
    merge_config(cfg, str(REPO / STUDENT), ["OUTPUT_DIR", str(folder), *weights], "config")
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    os.utime(folder / "config.yaml", (0, 0))
    forbid_processes(monkeypatch)
    with pytest.raises(UserError, match="holds a run of an earlier teacher"):
        bench.run(STUDENT, folder, label="student", teacher=teacher)


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"the student failed: error: checkpoint not found: no.pth"):
        bench.run(STUDENT, tmp_path, ["MODEL.WEIGHTS", "no.pth"], label="the student")
