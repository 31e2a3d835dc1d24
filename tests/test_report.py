"""One page about runs: true numbers, and a browser that shows it."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model
from helpers import REPO, assert_one_line, digits_cfg

from pcka_distill import UserError
from pcka_distill.report import _used, read_run, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
LOG = """[11/23 20:00:21] detectron2 INFO: Environment info:
-------------------  --------------
sys.platform         linux
Python               3.11.7 (main)
Compiler ($CXX)      c++ 12
PyTorch              2.14.1+cu130 @/somewhere
-------------------  --------------
PyTorch built with:
  - GCC  13.3
[11/23 20:00:22] detectron2.x INFO: Teacher: FCOS of t.yaml, 3 of 3 tensors loaded from <t>.pth
"""


def tool(*args):
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / "report.py"), *map(str, args)],
        capture_output=True, text=True, cwd=REPO,
    )  # fmt: skip


def make_run(folder, ap, *, loss="MimicLoss", weight=1.0, ended=True):
    """A run's folder, of known numbers."""
    folder.mkdir()
    cfg = digits_cfg("fcos", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder))
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.0
    (folder / "student_config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    if loss:
        cfg.MODEL.META_ARCHITECTURE = "DistillationModel"
        cfg.MODEL.DISTILL.LOSSES = [loss]
        cfg.MODEL.DISTILL.MIMIC.WEIGHT = weight
    (folder / "config.yaml").write_text(cfg.dump())
    lines = [{"iteration": i, "total_loss": 2 - i / 50, "loss_cls": 1.0, "cka/p3": i / 50}
             for i in range(20, 41)]  # fmt: skip
    lines.insert(12, {"iteration": 25, "total_loss": 99.0})
    lines.append({"iteration": 41, "bbox/AP": ap, "bbox/APl": math.nan})
    text = "\n".join(json.dumps(x) for x in lines)
    (folder / "metrics.json").write_text(text + '\n{"iteration": 42, "total_lo')
    metrics = {"AP": ap, "AP50": ap + 10, "APl": None, "AP-cat": ap - 5, "AP-<dog>": 30.0}
    if ended:
        results = {
            "parameters": 1_234_567,
            "train_seconds": 90,
            "results": {"digits_val": {"bbox": metrics}},
        }
        (folder / "results.json").write_text(json.dumps(results))
    (folder / "log.txt").write_text(LOG)
    return folder


def cells(page):
    """Rows of the page's tables, as texts."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [
        [re.sub("<[^>]+>", "", x) for x in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
        for row in rows
    ]


def test_what_a_run_left(tmp_path):
    run = read_run("a", make_run(tmp_path / "a", 40.0))
    assert run.environment == {
        "sys.platform": "linux", "Python": "3.11.7 (main)", "Compiler ($CXX)": "c++ 12",
        "PyTorch": "2.14.1+cu130 @/somewhere",
    }  # fmt: skip
    assert run.teacher.startswith("Teacher: FCOS of t.yaml")
    # Logged twice, as by a run that went on from a checkpoint: the later line counts.
    assert run.metrics[25]["total_loss"] == 99.0
    assert max(run.metrics) == 41


@pytest.mark.usefixtures("digits")
def test_the_numbers_of_the_page(tmp_path):
    runs = [
        read_run("alone", make_run(tmp_path / "a", 30.04, loss="")),
        read_run("<b>taught</b>", make_run(tmp_path / "b", 42.0, weight=3.0)),
        read_run("half", make_run(tmp_path / "c", 0.0, ended=False)),
    ]
    write_report(tmp_path / "x" / "page.html", runs, images=2)
    page = (tmp_path / "x" / "page.html").read_text()
    rows = cells(page)
    assert ["alone", "30.0", "40.0", "-"] in rows
    assert ["&lt;b&gt;taught&lt;/b&gt;", "42.0 (+12.0)", "52.0 (+12.0)", "-"] in rows
    assert ["half", "-", "-", "-"] in rows
    assert ["&lt;dog&gt;", "30.0", "30.0 (+0.0)", "-"] in rows
    assert rows[1][:4] == ["alone", "1.23 M", "41", "1.5 min"]
    assert rows[3][3] == "has not ended"
    assert ["MODEL.DISTILL.MIMIC.WEIGHT", "-", "3.0", "1.0"] in rows
    # The keys of losses that no run has differ in nothing.
    assert not any(row[0].startswith("MODEL.DISTILL.PCKA") for row in rows)
    assert not any(row[0] == "OUTPUT_DIR" for row in rows)
    assert ["Python", "3.11.7 (main)"] in rows
    assert page.count("data:image/png;base64,") == 2
    assert "<b>taught" not in page
    assert "http" not in page


def test_of_one_run_nothing_differs(tmp_path):
    write_report(tmp_path / "page.html", [read_run("a", make_run(tmp_path / "a", 30.0))], images=0)
    page = (tmp_path / "page.html").read_text()
    assert "What differs" not in page
    assert ["a", "30.0", "40.0", "-"] in cells(page)


def test_data_that_are_elsewhere_leave_a_note(tmp_path):
    folder = make_run(tmp_path / "a", 30.0)
    text = (
        (folder / "config.yaml")
        .read_text()
        .replace("digits_test", "gone")
        .replace("digits_val", "gone")
    )
    (folder / "config.yaml").write_text(text)
    write_report(tmp_path / "page.html", [read_run("a", folder)])
    assert "Not drawn: unknown dataset &#x27;gone&#x27;" in (tmp_path / "page.html").read_text()


def test_metrics_of_a_class_are_not_mixed(tmp_path):
    folder = make_run(tmp_path / "a", 30.0)
    metrics = {"mIoU": 20.0, "IoU-sky": 11.0, "ACC-sky": 99.0, "min(IoU, B-Iou)-sky": 5.0}
    results = {"results": {"x": {"sem_seg": metrics}, "y": {"bbox": None}}}
    (folder / "results.json").write_text(json.dumps(results))
    write_report(tmp_path / "page.html", [read_run("a", folder)], images=0)
    rows = cells((tmp_path / "page.html").read_text())
    assert ["sky", "11.0"] in rows
    assert not any("99.0" in row or "5.0" in row for row in rows)


def test_a_new_run_in_the_same_folder(tmp_path):
    folder = make_run(tmp_path / "a", 30.0)
    with open(folder / "metrics.json", "a") as f:
        f.write('\n5\n{"iteration": 20, "total_loss": 7.0}\n{"iteration": 24, "total_loss": 6.0}\n')
    run = read_run("a", folder)
    assert sorted(run.metrics) == [20, 24]
    assert run.metrics[20]["total_loss"] == 7.0


def test_keys_that_mean_something():
    config = {
        "MODEL.META_ARCHITECTURE": "DistillationModel", "MODEL.DISTILL.LOSSES": ["KDLoss"],
        "MODEL.DISTILL.KD.WEIGHT": 1.0, "MODEL.DISTILL.KD.TEMPERATURE": 2.0,
        "MODEL.DISTILL.DKD.WEIGHT": 1.0, "MODEL.DISTILL.TEACHER.WEIGHTS": "x", "SEED": 1,
    }  # fmt: skip
    assert set(config) - set(_used(config)) == {"MODEL.DISTILL.DKD.WEIGHT"}
    config["MODEL.META_ARCHITECTURE"] = "RetinaNet"
    assert set(_used(config)) == {"MODEL.META_ARCHITECTURE", "SEED"}


@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome here")
@pytest.mark.usefixtures("digits")
def test_a_browser_shows_it(tmp_path):
    """All pictures load, nothing is logged, and the page is no wider than its window."""
    runs = [read_run(x, make_run(tmp_path / x, ap)) for x, ap in (("a", 30.0), ("b", 40.0))]
    write_report(tmp_path / "page.html", runs, images=1)
    probe = """<script>addEventListener("load", () => { document.title = "seen " +
      [...document.images].map(x => x.naturalWidth > 200) + " " +
      (document.documentElement.scrollWidth <= innerWidth) })</script></body>"""
    page = (tmp_path / "page.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("</body>", probe))
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            "--window-size=900,900", (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "<title>seen true,true true</title>" in done.stdout
    assert "CONSOLE" not in done.stderr


@pytest.mark.usefixtures("digits")
def test_the_command(tmp_path):
    make_run(tmp_path / "a=1", 30.0)
    out = tmp_path / "page.html"
    done = tool(tmp_path / "a=1", f"other={tmp_path / 'a=1'}", "--out", out, "--images", 0)
    assert done.returncode == 0, done.stderr
    assert "<h1>a=1, other</h1>" in out.read_text()
    assert_one_line(tool(tmp_path, "--out", out), "is no folder of a run: it has no config.yaml")
    assert_one_line(tool(tmp_path / "a=1", "--images", -1), "--images is -1")
    done = tool(tmp_path / "a=1", "--out", out / "x.html", "--images", 0)
    assert_one_line(done, "cannot be written.*change --out")


def test_damaged_files(tmp_path):
    folder = make_run(tmp_path / "a", 30.0)
    (folder / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"the run in .* cannot be read"):
        read_run("a", folder)
