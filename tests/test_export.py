"""What is exported is the student, wherever it is taken."""

import io
import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from helpers import REPO, assert_one_line, digits_cfg, distill_cfg, student_yaml
from omegaconf import DictConfig
from PIL import Image
from torch.jit._trace import TracerWarning

from pcka_distill import UserError, export
from pcka_distill.inference import Predictor

EAGER = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
EAGER += ("MODEL.FCOS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 6)
TRACED = ("retinanet", "fcos", "faster_rcnn", "cascade_rcnn", "mask_rcnn", "c4_rcnn", "sem_seg")
TRACED += ("classifier",)


def noise(height=70, width=110, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# In a process of its own: conftest.py switches off what traces.
EXPORT = """
import sys, torch, pcka_distill
from pathlib import Path
from pcka_distill import export
import numpy as np
folder = Path(sys.argv[1])
for run in sorted(x for x in folder.iterdir() if x.is_dir()):
    images = np.load(run / "images.npz")
    lines = export.export_student(
        str(run / "config.yaml"), run / "out", images["a"], formats=export.FORMATS
    )
    (run / "lines.txt").write_text("\\n".join(lines))
    traced = torch.jit.load(str(run / "out" / "model.ts"))
    found = traced(torch.load(run / "prepared.pth"))
    torch.save([found] if isinstance(found, torch.Tensor) else list(found), run / "found.pth")
"""


# Sure of nothing.
BLIND = ("MODEL.FCOS.SCORE_THRESH_TEST", 0.999, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.999)


def make_run(path, family, weights, *opts):
    """A folder of a run of a family, as training leaves it."""
    path.mkdir()
    cfg = distill_cfg(family, weights, *EAGER, "MODEL.DEVICE", "cpu", *opts)
    cfg.OUTPUT_DIR = str(path)
    (path / "config.yaml").write_text(cfg.dump())
    state = torch.load(weights, weights_only=True)["model"]
    content = {"model": {**state, "distill.pcka.x": torch.zeros(3)}, "iteration": 7}
    torch.save({**content, "optimizer": {"state": torch.zeros(1000)}}, path / "model_final.pth")
    results = {"digits_val": {"bbox": {"AP": 12.34, "AP-cat": 1.0, "APl": None}}}
    (path / "results.json").write_text(json.dumps({"results": results}))
    return path


@pytest.fixture
def run(teacher_files, tmp_path):
    """Family -> folder of a run."""
    return lambda family: make_run(tmp_path / "run", family, teacher_files[family])


@pytest.fixture(scope="module")
def graphs(teacher_files, tmp_path_factory):
    """Family -> what its export left; the classifier is one of them."""
    folder = tmp_path_factory.mktemp("graphs")
    for family in (*TRACED, "blind"):
        if family == "blind":
            path = make_run(folder / family, "fcos", teacher_files["fcos"], *BLIND)
            sizes = (70, 110)
        elif family == "classifier":
            path = folder / family
            path.mkdir()
            cfg = digits_cfg("classifier_student", "MODEL.DEVICE", "cpu")
            (path / "config.yaml").write_text(cfg.dump())
            torch.manual_seed(0)
            torch.save({"model": build_model(cfg).state_dict()}, path / "model_final.pth")
            sizes = (cfg.MODEL.CLASSIFIER.IMAGE_SIZE,) * 2
        else:
            path = make_run(folder / family, family, teacher_files[family])
            sizes = (70, 110)
        np.savez(path / "images.npz", a=noise(*sizes))
        # What is asked of the graphs is another image, of another size where that can be.
        other = noise(*sizes[::-1], seed=2)
        prepared = Predictor.load(str(path / "config.yaml")).prepare(other)["image"]
        torch.save(prepared, path / "prepared.pth")
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, folder], capture_output=True, text=True,
        env={**os.environ, "PYTORCH_JIT": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    return folder


def test_a_checkpoint_is_the_student_alone(run, tmp_path):
    path = run("fcos")
    lines = export.export_student(str(path / "config.yaml"), tmp_path / "out", noise())
    assert "bit for bit" in lines[0]
    content = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    assert content.keys() == {"model"}
    assert not any(k.startswith("distill.") for k in content["model"])
    assert (tmp_path / "out" / "model_final.pth").stat().st_size < (
        path / "model_final.pth"
    ).stat().st_size
    card = (tmp_path / "out" / "model_card.md").read_text()
    assert "AP 12.3" in card
    assert "AP-cat" not in card
    assert "taught by | fcos_student.yaml with fcos.pth" in card
    assert "PCKALoss (weight 1.0)" in card
    names = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert names == {"classes": [str(x) for x in range(10)]}
    # Nothing of where it was made goes with it.
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize("family", ["retinanet", "mask_rcnn"])
def test_stock_detectron2_runs_it(family, run, tmp_path):
    path = run(family)
    export.export_student(str(path / "config.yaml"), tmp_path / "out", noise())
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "out" / "student_config.yaml"))
    cfg.MODEL.WEIGHTS = str(tmp_path / "out" / "model_final.pth")
    cfg.MODEL.DEVICE = "cpu"
    image = noise(seed=1)
    found = DefaultPredictor(cfg)(image[:, :, ::-1])["instances"]
    expected = Predictor.load(str(path / "config.yaml"))(image)["instances"]
    assert len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("kind", export.FORMATS)
@pytest.mark.parametrize("family", TRACED)
def test_graphs_say_what_the_student_says(family, kind, graphs):
    path = graphs / family
    predictor = Predictor.load(str(path / "config.yaml"))
    prepared = torch.load(path / "prepared.pth")
    with torch.no_grad():
        (expected,) = predictor.model([{"image": prepared}])
    lines = (path / "lines.txt").read_text().splitlines()
    if kind == "torchscript":
        found = torch.load(path / "found.pth")
    else:
        session = onnxruntime.InferenceSession(str(path / "out" / "model.onnx"))
        found = [torch.from_numpy(x) for x in session.run(None, {"image": prepared.numpy()})]
        names = [x.name for x in session.get_outputs()]
        assert names == lines[2].split(" -> ")[1].split(";")[0].split(", ")
    if "instances" not in expected:
        (value,) = expected.values()
        torch.testing.assert_close(found[0], value, atol=1e-4, rtol=1e-4)
        return
    instances = expected["instances"]
    assert len(instances) > 0
    assert f"{len(instances)} objects" in lines[1] or len(instances) < 6
    torch.testing.assert_close(found[0], instances.pred_boxes.tensor, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(found[1], instances.pred_classes)


def test_half_precision(run, tmp_path):
    path = run("fcos")
    export.export_student(str(path / "config.yaml"), tmp_path / "out", noise(), half=True)
    state = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    assert all(x.dtype == torch.float16 for x in state.values() if x.is_floating_point())
    stock = build_model(digits_cfg("fcos"))
    DetectionCheckpointer(stock).load(str(tmp_path / "out" / "model_final.pth"))
    whole = Predictor.load(str(path / "config.yaml")).model.state_dict()
    for name, x in stock.state_dict().items():
        assert x.dtype == whole[name].dtype
        torch.testing.assert_close(x, whole[name], rtol=1e-3, atol=1e-6)


def test_results_are_those_of_the_exported_weights(run, tmp_path):
    """A card says nothing of weights that nobody evaluated."""
    path = run("fcos")
    (path / "model_0000001.pth").write_bytes((path / "model_final.pth").read_bytes())
    config, other = str(path / "config.yaml"), str(path / "model_0000001.pth")
    export.export_student(config, tmp_path / "out", noise(), weights=other)
    card = (tmp_path / "out" / "model_card.md").read_text()
    assert "12.3" not in card
    assert "These weights were not evaluated." in card


@pytest.mark.parametrize("task", [None, {"AP": None}, {"AP": "high"}])
def test_results_that_are_none(task, run, tmp_path):
    path = run("fcos")
    (path / "results.json").write_text(json.dumps({"results": {"digits_val": {"bbox": task}}}))
    export.export_student(str(path / "config.yaml"), tmp_path / "out", noise())
    card = (tmp_path / "out" / "model_card.md").read_text()
    assert "These weights were not evaluated." in card


def test_names_of_classes_go_on_with_the_weights(run, tmp_path):
    """From export to export, where nobody has registered the datasets."""
    path, opts = run("fcos"), ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    names = [f"kind {i}" for i in range(10)]
    (path / "classes.json").write_text(json.dumps({"classes": names}))
    export.export_student(str(path / "config.yaml"), tmp_path / "a", noise(), opts=opts)
    export.export_student(str(tmp_path / "a/student_config.yaml"), tmp_path / "b", noise())
    assert json.loads((tmp_path / "b/classes.json").read_text()) == {"classes": names}
    assert Predictor.load(str(tmp_path / "b/student_config.yaml")).classes == names
    (path / "classes.json").unlink()
    export.export_student(str(path / "config.yaml"), tmp_path / "b", noise(), opts=opts)
    assert not (tmp_path / "b/classes.json").exists()


@pytest.mark.parametrize("records", [[], [{"height": 3}], [{"file_name": "bomb.png"}]])
def test_a_picture_that_cannot_be_had(records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(DatasetCatalog, "get", lambda _: records)
    with pytest.raises(UserError, match=r"no picture to compare on .* name one with --image"):
        export.find_image("", str(student_yaml("fcos")))


def test_a_run_is_not_written_over(run, tmp_path):
    path = run("fcos")
    with pytest.raises(UserError, match="holds a run, which would be lost"):
        export.export_student(str(path / "config.yaml"), path, noise())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "last_checkpoint").write_text("")
    with pytest.raises(UserError, match="holds a run, which would be lost"):
        export.export_student(str(path / "config.yaml"), tmp_path / "other", noise())


def test_weights_beyond_half_precision(run, tmp_path):
    path = run("fcos")
    content = torch.load(path / "model_final.pth", weights_only=True)
    next(iter(content["model"].values())).fill_(1e6)
    torch.save(content, path / "model_final.pth")
    with pytest.raises(UserError, match="do not fit into half precision; leave out --half"):
        export.export_student(str(path / "config.yaml"), tmp_path / "out", noise(), half=True)


def test_an_average_of_the_weights(run, tmp_path):
    path = run("fcos")
    model = Predictor.load(str(path / "config.yaml")).model
    average = torch.optim.swa_utils.AveragedModel(model)
    for x in model.parameters():
        x.data.mul_(3)
    average.update_parameters(model)
    average.update_parameters(model)
    content = torch.load(path / "model_final.pth", weights_only=True)
    torch.save({**content, "ema": average.state_dict()}, path / "model_final.pth")
    config = str(path / "config.yaml")
    export.export_student(config, tmp_path / "out", noise(), key="ema")
    state = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    expected = average.module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(x, expected[k]) for k, x in state.items())
    with pytest.raises(UserError, match="has no weights 'mean', but model, iteration"):
        export.export_student(config, tmp_path / "out", noise(), key="mean")
    content["ema"] = {"a": torch.zeros(1)}
    torch.save(content, path / "model_final.pth")
    with pytest.raises(UserError, match=r"'ema' of .* is not the student's"):
        export.export_student(config, tmp_path / "out", noise(), key="ema")


def test_an_earlier_export_is_removed(run, tmp_path):
    """What was made of other weights would pass for one of these."""
    path, out = run("fcos"), tmp_path / "out"
    out.mkdir()
    for name in ("model.ts", "model.onnx", "model_card.md", "notes.txt"):
        (out / name).write_text("of another model")
    export.export_student(str(path / "config.yaml"), out, noise())
    assert sorted(x.name for x in out.iterdir()) == [
        "classes.json", "model_card.md", "model_final.pth", "notes.txt", "student_config.yaml",
    ]  # fmt: skip


def test_graphs_are_compared_where_nothing_is_found(graphs):
    """In a copy that keeps every object; what is written has its threshold."""
    path = graphs / "blind"
    for line in (path / "lines.txt").read_text().splitlines()[1:]:
        assert re.search(r"in a copy without score threshold, on images .*\([1-9] objects\)", line)
        assert line.endswith("with it nothing is found")
    image = torch.load(path / "prepared.pth")
    session = onnxruntime.InferenceSession(str(path / "out" / "model.onnx"))
    for boxes in (
        torch.load(path / "found.pth")[0],
        session.run(None, {"image": image.numpy()})[0],
    ):
        assert boxes.shape == (0, 4)


def test_a_graph_that_cannot_be_compared(run, tmp_path):
    """What is computed of each object is traced with objects alone."""
    path, out = run("mask_rcnn"), tmp_path / "out"
    with pytest.raises(
        UserError, match=r"finds no object in the picture.* name another with --ima"
    ):
        export.export_student(str(path / "config.yaml"), out, noise(), formats=["onnx"], opts=BLIND)
    assert not out.exists()


@pytest.mark.parametrize(("opts", "what"), [((), "predictions"), (BLIND, "weights")])
def test_a_checkpoint_is_compared_on_something(opts, what, run, tmp_path, monkeypatch):
    config, out = str(run("fcos") / "config.yaml"), tmp_path / "out"
    lines = export.export_student(config, out, noise(), opts=opts)
    assert f"gives the same {what}, bit for bit" in lines[0]
    save = torch.save

    def other(content, file):
        save({"model": {k: v * 0 for k, v in content["model"].items()}}, file)

    monkeypatch.setattr(torch, "save", other)
    with pytest.raises(UserError, match="does not give the student's predictions again"):
        export.export_student(config, out, noise(), opts=opts)


def test_tracing_is_quiet(run, tmp_path, monkeypatch, recwarn):
    """It is torch's to warn, and to trace a second time: here the graph itself is compared."""
    asked = []

    def trace(adapter, inputs, **options):
        asked.append(options)
        warnings.warn("\nThere are 2 live references to the data", TracerWarning, stacklevel=1)
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.jit, "trace", trace)
    with pytest.raises(UserError, match="FCOS cannot be exported as torchscript: no such operator"):
        export.export_student(
            str(run("fcos") / "config.yaml"), tmp_path / "out", noise(), formats=["torchscript"]
        )
    assert asked == [{"check_trace": False}]
    assert not [x for x in recwarn.list if issubclass(x.category, TracerWarning)]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal(terminal, run, tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    export.export_student(str(run("fcos") / "config.yaml"), tmp_path / "out", noise())
    assert ("export checkpoint" in shown.getvalue()) == terminal


@pytest.mark.parametrize(
    ("expected", "found"), [((1000, 999), (1000, 1000)), ((True, False), (True, True))]
)
def test_whole_numbers_are_equal(expected, found, tmp_path):
    expected, found = torch.tensor(expected), torch.tensor(found)
    assert export._compare([expected], [expected], tmp_path) == 0
    with pytest.raises(UserError, match=r"says something else.* 1 of 2 whole numbers are others"):
        export._compare([expected], [found], tmp_path)


@pytest.mark.parametrize(
    "found", [[torch.ones(2, 3) * 1.01], [torch.ones(2, 2)], [torch.full((2, 3), torch.nan)]]
)
def test_a_graph_that_says_something_else_is_refused(found, tmp_path):
    assert export._compare([torch.ones(2, 3)], [torch.ones(2, 3)], tmp_path) == 0
    with pytest.raises(UserError, match="says something else than the student"):
        export._compare([torch.ones(2, 3)], found, tmp_path)


def test_what_cannot_be_exported(run, tmp_path):
    with pytest.raises(UserError, match="knows no PanopticFPN; leave out --formats"):
        export.export_student(
            str(run("panoptic_fpn") / "config.yaml"), tmp_path / "out", noise(), formats=["onnx"]
        )


@pytest.mark.usefixtures("digits")
def test_the_command(run, tmp_path):
    path = run("fcos")
    Image.fromarray(noise()).save(tmp_path / "a.png")
    config = path / "config.yaml"

    def tool(*args):
        return subprocess.run(
            [
                *(sys.executable, REPO / "tools" / "export_student.py", "--config-file", config),
                *("--out", tmp_path / "out", *map(str, args)),
            ],
            capture_output=True, text=True, cwd=REPO, env={**os.environ, "PYTORCH_JIT": "1"},
        )  # fmt: skip

    done = tool("--formats", "torchscript", "onnx", "--license", "MIT")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 4
    assert "| licence of the weights | MIT |" in (tmp_path / "out" / "model_card.md").read_text()
    assert_one_line(tool("--image", "gone.png"), "no picture to compare on .*--image")
    done = tool("--weights", "gone.pth")
    assert_one_line(done, "checkpoint not found: gone.pth; change --weights")
    done = tool("--help").stdout
    # As a shell takes it; and what no help says is not there to be found.
    assert "student_config.yaml \\\n        --out exported" in done
    assert not re.findall(r"^  --[\w-]+(?: [A-Z_]+)?\n(?=  -|$)", done, re.M)
    assert "torch.optim.swa_utils.AveragedModel" in " ".join(done.split())
    done = tool("--image", tmp_path / "a.png", "--out", config / "x")
    assert_one_line(done, "cannot be written.*change --out")
    done = tool("--opts", "DATASETS.TEST", "[]")
    assert_one_line(done, "name a picture with --image")


@pytest.fixture
def lazy_run(tmp_path):
    """A folder as a training from a LazyConfig leaves it."""
    folder = tmp_path / "lazy"
    folder.mkdir()
    config = LazyConfig.load(str(REPO / "configs/lazy/Digits/retinanet_pcka.py"))
    config.model.student.test_score_thresh = 0.0
    config.train.output_dir = str(folder)
    LazyConfig.save(config, str(folder / "config.yaml"))
    LazyConfig.save(
        DictConfig({"model": config.model.student}), str(folder / "student_config.yaml")
    )
    torch.manual_seed(0)
    state = instantiate(config.model.student).state_dict()
    torch.save({"model": state}, folder / "model_final.pth")
    results = {"digits_val": {"bbox": {"AP": 12.34, "AP-1": 1.0, "APl": None}, "segm": None}}
    (folder / "results.json").write_text(json.dumps({"results": results}))
    return folder


@pytest.mark.parametrize("name", ["config.yaml", "student_config.yaml"])
def test_a_student_of_a_lazy_config(name, lazy_run, tmp_path):
    config, out, trust = str(lazy_run / name), tmp_path / "out", ["TRUST_CONFIG", "True"]
    with pytest.raises(UserError, match=f"{name} is a LazyConfig.* add TRUST_CONFIG True"):
        export.export_student(config, out, noise())
    lines = export.export_student(config, out, noise(), opts=trust)
    assert "bit for bit" in lines[0]
    # Prepared as the yaml of the same student has it.
    same = digits_cfg("retinanet_pcka", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    (tmp_path / "same.yaml").write_text(same.dump())
    image, weights = noise(seed=1), str(lazy_run / "model_final.pth")
    expected = Predictor.load(str(tmp_path / "same.yaml"), weights)(image)["instances"]
    assert len(expected) > 0
    for path in (config, str(out / "student_config.yaml")):
        predictor = Predictor.load(path, "", trust)
        found = predictor(image)["instances"]
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.scores, expected.scores)
        assert predictor.classes == [str(x) for x in range(10)]
    # As stock Detectron2 builds it.
    stock = instantiate(LazyConfig.load(str(out / "student_config.yaml")).model)
    DetectionCheckpointer(stock).load(str(out / "model_final.pth"))
    card = (out / "model_card.md").read_text()
    assert "| digits_val | bbox | AP 12.3 |" in card
    assert "| taught by | retinanet_teacher.yaml with model_final.pth |" in card
    assert "PCKALoss (weight 3.0)" in card
    assert "mean [127.5, 127.5, 127.5]" in card
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_a_lazy_config_that_cannot_be_used(lazy_run):
    config, trust = str(lazy_run / "student_config.yaml"), ["TRUST_CONFIG", "True"]
    with pytest.raises(UserError, match=r"retinanet_pcka.py is a program.* name the config.yaml"):
        Predictor.load(str(REPO / "configs/lazy/Digits/retinanet_pcka.py"), "", trust)
    with pytest.raises(UserError, match=r"MODEL.RETINANET.NUM_CLASSES is no key of the LazyConfig"):
        Predictor.load(config, "", [*trust, "MODEL.RETINANET.NUM_CLASSES", 3])
    sizes = ["INPUT.MIN_SIZE_TEST", 48, "MODEL.DEVICE", "cpu"]
    assert Predictor.load(config, "", [*trust, *sizes]).prepare(noise())["image"].shape[1] == 48
    (lazy_run / "config.yaml").unlink()
    with pytest.raises(UserError, match="does not say how test images are prepared"):
        Predictor.load(config, "", trust)


def test_a_lazy_config_runs_nothing_unasked(lazy_run):
    """Not by being read, either: yaml can call functions."""
    told = lazy_run / "told"
    with open(lazy_run / "config.yaml", "a") as f:
        f.write(f"evil: !!python/object/apply:builtins.open [{told}, w]\n")
    with pytest.raises(UserError, match="add TRUST_CONFIG True"):
        Predictor.load(str(lazy_run / "config.yaml"))
    assert not told.exists()
    Predictor.load(str(lazy_run / "config.yaml"), "", ["TRUST_CONFIG", "True"])
    assert told.exists()


def test_the_students_own_yaml(teacher_files, tmp_path):
    """Of a run that is elsewhere: a yaml and a checkpoint are enough."""
    config = str(student_yaml("fcos"))
    export.export_student(
        config, tmp_path / "out", noise(), weights=teacher_files["fcos"], opts=EAGER
    )
    assert "## Results" not in (tmp_path / "out" / "model_card.md").read_text()
