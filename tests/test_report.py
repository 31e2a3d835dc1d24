"""One page about runs: true numbers, and a browser that shows it."""

import json
import math
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.modeling import build_model
from helpers import REPO, assert_one_line, digits_cfg

from pcka_distill import UserError, __version__
from pcka_distill.report import _number, _used, read_run, write_report

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
    assert re.findall("data:image/(.*?);base64,", page) == ["png", "jpeg"]
    assert f"made by pcka_distill {__version__}." in page
    assert "<b>taught" not in page
    assert "http" not in page


def test_of_one_run_nothing_differs(tmp_path):
    write_report(tmp_path / "page.html", [read_run("a", make_run(tmp_path / "a", 30.0))], images=0)
    page = (tmp_path / "page.html").read_text()
    assert "What differs" not in page
    assert ["a", "30.0", "40.0", "-"] in cells(page)


def test_data_that_are_elsewhere_leave_a_note(tmp_path):
    folder = make_run(tmp_path / "a", 30.0)
    config = (folder / "config.yaml").read_text()
    # No advice of another tool.
    (folder / "config.yaml").write_text(re.sub("digits_(val|test)", "digit_scans_val", config))
    write_report(tmp_path / "page.html", [read_run("a", folder)])
    page = (tmp_path / "page.html").read_text()
    assert "Not drawn: dataset digit_scans_val has no boxes to draw.</p>" in page
    (folder / "config.yaml").write_text(config)
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", "{", "Expecting property name"),
        ("results.json", "[]", "results.json is none: dataset, task and metric are expected"),
        ("results.json", '{"results": {"a": 3}}', "results.json is none"),
        ("results.json", '{"results": {"a": {"bbox": [1]}}}', "results.json is none"),
        ("results.json", '{"results": 3}', "results.json is none"),
        ("results.json", "[" * 10**5, "recursion"),
        ("results.json", b"\xff\xff\xff", "codec can't decode"),
        ("config.yaml", "- 3", "its config.yaml has no keys"),
        ("config.yaml", "", "its config.yaml has no keys"),
        ("config.yaml", "a: !!python/object/apply:os.system [", "while parsing"),
        ("config.yaml", "a: &a {b: *a}", "recursion"),
        ("config.yaml", b"\xff", "codec can't decode"),
    ],
)
def test_damaged_files(name, content, message, tmp_path):
    folder = make_run(tmp_path / "a", 30.0)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"the run in .*a cannot be read: .*{message}"):
        read_run("a", folder)


def test_what_is_damaged_in_a_file_is_left_out_and_named(tmp_path):
    folder = make_run(tmp_path / "a", 30.0)
    metrics = {"AP": "x", "AP50": 44.0, "APs": True, "APl": None}
    results = {"parameters": "many", "results": {"digits_val": {"bbox": metrics}}}
    (folder / "results.json").write_text(json.dumps(results))
    lines = [b"[1]", b'{"iteration": null}', b'{"iteration": 1e999}', b"\xff\xfe{", b'"a"', b"{}"]
    known = b'{"iteration": 7, "total_loss": 3.0, "x": "\xc3\xa9"}'
    (folder / "metrics.json").write_bytes(b"\n".join([*lines, b"", known, b'{"iteration": 8, "t']))
    (folder / "log.txt").write_bytes(b"\xff" + LOG.encode())
    run = read_run("a", folder)
    assert run.metrics == {7: {"total_loss": 3.0, "x": "é"}}
    assert run.environment["sys.platform"] == "linux"
    assert run.left_out == [
        "results.json: parameters, AP, APs, no numbers",
        "metrics.json: 6 lines that cannot be read",
    ]
    write_report(tmp_path / "page.html", [run], images=0)
    page = (tmp_path / "page.html").read_text()
    assert ["a", "44.0", "-"] in cells(page)
    assert "a, left out: results.json: parameters, AP, APs, no numbers; metrics.json: 6" in page


def test_long_runs_are_read_in_no_time(tmp_path):
    folder = make_run(tmp_path / "a", 30.0)
    lines = "".join(f'{{"iteration": {i}, "total_loss": 1.0}}\n' for i in range(30_000))
    (folder / "metrics.json").write_text(lines)
    start = time.perf_counter()
    assert len(read_run("a", folder).metrics) == 30_000
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("value", "color", "text"),
    [
        (40.1, "up", "(+0.1)"), (39.9, "down", "(-0.1)"), (40.0, "note", "(+0.0)"),
        (39.97, "note", "(+0.0)"), (40.03, "note", "(+0.0)"),
    ],
)  # fmt: skip
def test_what_does_not_differ_has_no_colour(value, color, text):
    assert _number(value, 40.0).endswith(f'<span class="{color}">{text}</span>')


def make_lazy_run(folder, ap, weight):
    """A run of a LazyConfig, as its trainer leaves it; what it names must not be run."""
    make_run(folder, ap)
    config = LazyConfig.load(str(REPO / "configs" / "lazy" / "Digits" / "fcos_pcka.py"))
    config.train.output_dir = str(folder)
    config.model.losses[0].weight = weight
    LazyConfig.save(config, str(folder / "config.yaml"))
    with open(folder / "config.yaml", "a") as f:
        f.write(
            f"trap: !!python/object/apply:os.mkdir [{folder / 'trap'}]\n"
            f"other: {{_target_: os.mkdir, path: {folder / 'trap'}}}\n"
            "kind: !!python/name:os.mkdir ''\npair: !!python/tuple [1, 2]\n"
        )
    LazyConfig.save(config, str(folder / "student_config.yaml"))
    return folder


@pytest.mark.usefixtures("digits")
def test_runs_of_a_lazy_config(tmp_path):
    """Their numbers are those of any run; nothing of what they name is run."""
    folders = [
        make_lazy_run(tmp_path / x, *of) for x, of in (("b", (40.0, 2.5)), ("c", (41.0, 7.5)))
    ]
    lazy = [read_run(x.name, x) for x in folders]
    assert lazy[0].lazy and lazy[0].config["model.losses.0.weight"] == 2.5
    assert lazy[0].config["kind"] == "os.mkdir" and lazy[0].config["pair"] == [1, 2]
    runs = [read_run("a", make_run(tmp_path / "a", 30.0)), *lazy]
    assert not runs[0].lazy
    write_report(tmp_path / "page.html", runs, images=1)
    page = (tmp_path / "page.html").read_text()
    rows = cells(page)
    assert ["c", "41.0 (+11.0)", "51.0 (+11.0)", "-"] in rows
    assert ["model.losses.0.weight", "2.5", "7.5"] in rows
    # Nothing else differs: not their folders, and not each key from a yaml's.
    assert not any(x[0].startswith(("train.", "MODEL.")) for x in rows)
    assert "Not drawn: b, c, whose models are those of LazyConfigs." in page
    # Of the other run there are detections.
    assert page.count("data:image/jpeg") == 1
    write_report(tmp_path / "page.html", lazy, images=1)
    page = (tmp_path / "page.html").read_text()
    assert "Not drawn: b, c" in page and "data:image/jpeg" not in page
    assert not any((x / "trap").exists() for x in folders)


def test_one_line_of_a_report(tmp_path):
    assert_one_line(tool(tmp_path, "--images", 25), "--images is 25; it must be from 0 to 24")
    done = tool(tmp_path / "a", tmp_path / "b" / "a")
    assert_one_line(done, "two are called 'a': .*; write TITLE=PATH, with a title of its own")


def test_a_page_that_cannot_be_written_is_known_at_once(tmp_path, monkeypatch):
    run = read_run("a", make_run(tmp_path / "a", 30.0))
    monkeypatch.setattr("pcka_distill.report._results", lambda _: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"a cannot be written: it is a folder; change --out"):
        write_report(tmp_path / "a", [run])
