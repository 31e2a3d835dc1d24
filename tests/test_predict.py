"""Pictures, folders and videos in; boxes, masks, pixels and classes out."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from helpers import FAMILIES, REPO, assert_one_line, digits_cfg, student_yaml
from PIL import Image

from pcka_distill import UserError, get_distill_cfg
from pcka_distill.build import build_registered
from pcka_distill.drawing import _right, draw_output
from pcka_distill.inference import Predictor
from pcka_distill.predict import check_folder, cli, describe, find_inputs, predict

# A random model is sure of nothing.
EAGER = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
EAGER += ("MODEL.FCOS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5)


def tool(*args):
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / "predict.py"), *map(str, args)],
        capture_output=True, text=True, cwd=REPO,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder: two pictures, one in a folder below, a file that is none, and a text."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (2, 70, 110, 3), np.uint8)
    Image.fromarray(noise[0]).save(folder / "a.png")
    (folder / "below").mkdir()
    Image.fromarray(noise[1]).save(folder / "below" / "b.JPG")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_inputs_are_not_written_over(pictures, tmp_path):
    inputs = find_inputs([str(pictures)])
    check_folder([str(pictures)], inputs, tmp_path)
    for out in (pictures, pictures / "below", pictures / "found"):
        with pytest.raises(UserError, match="is where the inputs are"):
            check_folder([str(pictures)], inputs, out)
    pattern = str(pictures / "*.png")
    with pytest.raises(UserError, match="is where the inputs are"):
        check_folder([pattern], find_inputs([pattern]), pictures)
    check_folder([pattern], find_inputs([pattern]), pictures / "found")


def test_a_long_narrow_picture(teacher_files, tmp_path):
    Image.new("RGB", (4500, 30)).save(tmp_path / "a.png")
    predictor = Predictor.load(str(student_yaml("fcos")), teacher_files["fcos"])
    predict(predictor, find_inputs([str(tmp_path / "a.png")]), tmp_path / "out", 0.5)
    assert Image.open(tmp_path / "out" / "a.jpg").size == (4500, 30)


def test_stuff_has_its_own_names():
    segments = [
        {"id": 1, "isthing": True, "category_id": 1},
        {"id": 2, "isthing": False, "category_id": 1},
    ]
    output = {"panoptic_seg": (torch.zeros(2, 2), segments), "sem_seg": torch.zeros(2, 2, 2)}
    _, content = describe(output, ["cat", "dog"], 0.5, ["sky", "sea"])
    assert [x["name"] for x in content["segments"]] == ["dog", "sea"]


def test_files_folders_and_patterns(pictures):
    a, b = pictures / "a.png", pictures / "below" / "b.JPG"
    assert [str(y) for _, y in find_inputs([str(pictures)])] == ["a.jpg", "below/b.jpg"]
    assert [x for x, _ in find_inputs([str(pictures / "*.png"), str(a), str(b)])] == [a, b]
    assert [x for x, _ in find_inputs([str(pictures / "**" / "*.JPG")])] == [b]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing/*.jpg", "no pictures or videos in 'nothing/\\*.jpg'"),
        ("gone.png", "no pictures or videos in 'gone.png'"),
        ("notes.txt", "is no picture or video"),
        ("twins*", "twins/x.png and twins_too/x.png would have the same name"),
    ],
)
def test_inputs_that_are_none(pattern, message, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    for name in ("twins", "twins_too"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    with pytest.raises(UserError, match=message):
        find_inputs([pattern])


def test_names_are_told_apart(teacher_files, tmp_path):
    """A photo and the clip of the same moment are no clash; two kinds of a picture keep both."""
    folder = tmp_path / "in"
    folder.mkdir()
    names = ("IMG_1.JPG", "a.jpg", "a.png", "b.png")
    for i, name in enumerate(names):
        Image.new("RGB", (96, 96), (60 * i,) * 3).save(folder / name)
    write_video(folder / "IMG_1.MOV", np.zeros((2, 96, 96, 3), np.uint8))
    inputs = find_inputs([str(folder)])
    drawn = ["IMG_1.jpg", "IMG_1.mp4", "a.jpg.jpg", "a.png.jpg", "b.jpg"]
    assert [str(name) for _, name in inputs] == drawn
    predictor = Predictor.load(str(student_yaml("fcos")), teacher_files["fcos"])
    predict(predictor, inputs, tmp_path / "out", 0.5)
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == [*drawn, "predictions.json"]
    (folder / "a.png.jpg").write_bytes((folder / "a.png").read_bytes())
    with pytest.raises(UserError, match=r"a.png and .*a.png.jpg would have the same name"):
        find_inputs([str(folder)])


@pytest.mark.parametrize(
    ("family", "order"), [*((x, "BGR") for x in FAMILIES), ("retinanet", "RGB")]
)
def test_the_predictions_are_those_of_stock_detectron2(family, order, pictures, teacher_files):
    opts = [*EAGER, "INPUT.FORMAT", order, "MODEL.DEVICE", "cpu"]
    mine = Predictor.load(str(student_yaml(family)), teacher_files[family], opts)
    stock = digits_cfg(family, *opts, "MODEL.WEIGHTS", teacher_files[family])
    stock = DefaultPredictor(stock)(read_image(str(pictures / "a.png"), format="BGR"))
    found = mine(read_image(str(pictures / "a.png"), format="RGB"))
    assert found.keys() == stock.keys()
    if "sem_seg" in stock:
        torch.testing.assert_close(found["sem_seg"], stock["sem_seg"])
    if "instances" in stock:
        assert len(stock["instances"]) > 0
        for field, value in stock["instances"].get_fields().items():
            mine_too = found["instances"].get(field)
            value, mine_too = (getattr(x, "tensor", x) for x in (value, mine_too))
            torch.testing.assert_close(mine_too, value)


@pytest.mark.parametrize("family", ["mask_rcnn", "panoptic_fpn", "sem_seg", "fcos"])
def test_pictures_and_json(family, pictures, teacher_files, tmp_path):
    predictor = Predictor.load(str(student_yaml(family)), teacher_files[family], list(EAGER))
    inputs = find_inputs([str(pictures)])
    content = predict(predictor, inputs, tmp_path / "out", 0.0)
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == content
    assert [x["file"] for x in content["files"]] == [str(x) for x, _ in inputs]
    for name in ("a.jpg", "below/b.jpg"):
        drawn = np.asarray(Image.open(tmp_path / "out" / name))
        assert drawn.shape == (480, 754, 3)
    first, output = content["files"][0], predictor(read_image(str(inputs[0][0]), format="RGB"))
    if "instances" in output:
        boxes = output["instances"].pred_boxes.tensor.numpy()
        boxes[:, 2:] -= boxes[:, :2]
        found = np.array([x["bbox"] for x in first["objects"]])
        np.testing.assert_allclose(found, boxes, atol=1e-4)
        assert ("segmentation" in first["objects"][0]) == output["instances"].has("pred_masks")
        assert all(x["name"] == str(x["category_id"]) for x in first["objects"])
    if family == "sem_seg":
        assert sum(first["pixels"].values()) == 70 * 110
        labels = np.asarray(Image.open(tmp_path / "out" / "a_labels.png"))
        np.testing.assert_array_equal(labels, output["sem_seg"].argmax(0))
    if family == "panoptic_fpn":
        assert len(first["segments"]) == len(output["panoptic_seg"][1])


def test_a_threshold_leaves_out_what_is_scored_lower(pictures, teacher_files):
    predictor = Predictor.load(
        str(student_yaml("faster_rcnn")), teacher_files["faster_rcnn"], list(EAGER)
    )
    output = predictor(read_image(str(pictures / "a.png"), format="RGB"))
    scores = sorted(output["instances"].scores.tolist())
    kept, content = describe(output, predictor.classes, scores[2])
    assert sorted(kept["instances"].scores.tolist()) == scores[2:]
    assert sorted(x["score"] for x in content["objects"]) == pytest.approx(scores[2:])
    assert len(output["instances"]) == len(scores)


@pytest.fixture
def unknown(teacher_files, tmp_path):
    """Config and checkpoint of a student whose datasets nobody has registered here."""
    cfg = digits_cfg("fcos", *EAGER, "DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ())
    folder = tmp_path / "unknown"
    folder.mkdir()
    (folder / "a.yaml").write_text(cfg.dump())
    (folder / "a.pth").write_bytes(Path(teacher_files["fcos"]).read_bytes())
    return str(folder / "a.yaml"), str(folder / "a.pth")


def test_names_of_classes_that_lie_beside_the_weights(unknown, pictures, tmp_path):
    config, weights = unknown
    assert Predictor.load(config, weights).classes is None
    names = [f"kind {i}" for i in range(10)]
    file = Path(weights).with_name("classes.json")
    file.write_text(json.dumps({"classes": names, "stuff": ["sky"]}))
    predictor = Predictor.load(config, weights)
    assert (predictor.classes, predictor.stuff) == (names, ["sky"])
    content = predict(predictor, find_inputs([str(pictures / "a.png")]), tmp_path / "out", 0.0)
    objects = content["files"][0]["objects"]
    assert objects and all(x["name"] == f"kind {x['category_id']}" for x in objects)
    # Of a dataset that is known here they are its own.
    known = Predictor.load(config, weights, ["DATASETS.TEST", "('digits_val',)"])
    assert known.classes == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"classes": ["a", "b"]}', "names 2 classes and the model has 10; correct or remove it"),
        ("{}", "names 0 classes and the model has 10"),
        ("{", r"classes.json cannot be read: .*; correct or remove it"),
        ("[]", r"classes.json cannot be read"),
        ('{"classes": 3}', r"classes.json cannot be read"),
    ],
)
def test_names_of_classes_that_are_none(text, message, unknown):
    config, weights = unknown
    Path(weights).with_name("classes.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Predictor.load(config, weights)


@pytest.mark.parametrize("device", ["foo", "cpu:x", "meta"])
def test_a_device_that_is_not_here(device, teacher_files):
    with pytest.raises(UserError, match=f"MODEL.DEVICE is '{device}', which is not here; set it"):
        Predictor.load(str(student_yaml("fcos")), teacher_files["fcos"], ["MODEL.DEVICE", device])


def test_weights_are_no_override(teacher_files):
    opts = ["MODEL.WEIGHTS", teacher_files["fcos"]]
    with pytest.raises(UserError, match="name the checkpoint by --weights"):
        Predictor.load(str(student_yaml("fcos")), teacher_files["fcos"], opts)


def test_advice_is_that_of_the_tool(teacher_files, pictures, tmp_path, monkeypatch, capsys):
    """What it says to add can be added as it is said."""
    content = torch.load(teacher_files["fcos"], weights_only=True)
    # No tensor and no number: it would be run by being read.
    torch.save({**content, "more": slice(1)}, tmp_path / "a.pth")

    def run(*args):
        given = ["--config", str(student_yaml("fcos")), "--out", str(tmp_path / "out"), *args]
        monkeypatch.setattr(sys, "argv", ["predict", str(pictures), *given])
        cli()

    weights = ["--weights", str(tmp_path / "a.pth")]
    with pytest.raises(SystemExit, match=r"add --opts TRUST_CHECKPOINT True at the end of"):
        run(*weights)
    run(*weights, "--opts", "TRUST_CHECKPOINT", "True")
    assert "2 files" in capsys.readouterr().out
    opts = ["--opts", "MODEL.DEVICE", "cpu"]
    with pytest.raises(SystemExit, match=r"add TRUST_CHECKPOINT True at the end of"):
        run(*weights, *opts)
    run(*weights, *opts, "TRUST_CHECKPOINT", "True")
    with pytest.raises(SystemExit, match=r"not found: gone.pth; change --weights"):
        run("--weights", "gone.pth")
    with pytest.raises(SystemExit, match=r"Change --weights or the config"):
        run("--weights", teacher_files["retinanet"])


def test_a_classifier(pictures, tmp_path):
    cfg = get_distill_cfg()
    cfg.merge_from_file(str(REPO / "configs" / "ImageNet" / "resnet18.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.CLASSIFIER.IMAGE_SIZE", 64])
    torch.manual_seed(0)
    predictor = Predictor(cfg, build_registered(cfg, "the model"))
    predictor.classes = [f"kind {i}" for i in range(1000)]
    content = predict(predictor, find_inputs([str(pictures / "a.png")]), tmp_path, 0.5)
    best = content["files"][0]["best"]
    scores = predictor(read_image(str(pictures / "a.png"), format="RGB"))["scores"]
    assert [x["category_id"] for x in best] == scores.argsort(descending=True)[:5].tolist()
    assert [x["name"] for x in best] == [f"kind {x['category_id']}" for x in best]
    assert (tmp_path / "a.jpg").is_file()


def test_what_cannot_be_read_is_named_and_the_rest_is_done(pictures, teacher_files, tmp_path):
    (tmp_path / "half.png").write_bytes((pictures / "a.png").read_bytes()[:900])
    (tmp_path / "whole.png").write_bytes((pictures / "a.png").read_bytes())
    (tmp_path / "no.mp4").write_bytes(b"no video")
    predictor = Predictor.load(str(student_yaml("fcos")), teacher_files["fcos"])
    content = predict(predictor, find_inputs([str(tmp_path)]), tmp_path / "out", 0.5)
    assert [x["file"] for x in content["files"]] == [str(tmp_path / "whole.png")]
    assert content["unreadable"] == [str(tmp_path / x) for x in ("half.png", "no.mp4")]
    with pytest.raises(UserError, match=r"none of the files can be read: .*half\.png"):
        predict(predictor, find_inputs([str(tmp_path / "half.png")]), tmp_path / "out", 0.5)


def write_video(path, frames):
    """In a codec that every OpenCV has; its container is not the name's."""
    clip = path.with_suffix(".avi")
    size = frames.shape[2], frames.shape[1]
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 5, size)
    for frame in frames:
        writer.write(frame)
    writer.release()
    clip.rename(path)


class Stops:
    """A predictor whose user presses Ctrl-C after some calls."""

    classes, stuff = None, None

    def __init__(self, predictor, calls):
        self.predictor, self.calls = predictor, calls

    def __call__(self, image):
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        return self.predictor(image)


def test_what_is_interrupted_is_told_from_what_is_done(pictures, teacher_files, tmp_path):
    clip, out = tmp_path / "clip.avi", tmp_path / "out"
    write_video(clip, np.zeros((3, 96, 96, 3), np.uint8))
    predictor = Predictor.load(str(student_yaml("fcos")), teacher_files["fcos"])
    inputs = find_inputs([str(pictures / "a.png"), str(clip), str(pictures / "below")])
    with pytest.raises(KeyboardInterrupt, match=r"out/predictions.json has 1 of 3 files"):
        predict(Stops(predictor, 2), inputs, out, 0.5)
    # Nothing that looks like a video.
    assert sorted(x.name for x in out.rglob("*")) == ["a.jpg", "predictions.json"]
    content = json.loads((out / "predictions.json").read_text())
    assert [x["file"] for x in content["files"]] == [str(pictures / "a.png")]
    assert content["not_done"] == [str(clip), str(pictures / "below" / "b.JPG")]
    with pytest.raises(KeyboardInterrupt, match="has 0 of 3 files"):
        predict(Stops(predictor, 0), inputs, tmp_path / "other", 0.5)
    assert "not_done" not in predict(predictor, inputs, out, 0.5)
    assert (out / "clip.mp4").is_file()


def test_ctrl_c_is_one_line(pictures, teacher_files, tmp_path, monkeypatch):
    def load(*_):
        return Stops(None, 0)

    monkeypatch.setattr(Predictor, "load", load)
    args = [str(pictures), "--config", "a.yaml", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["predict", *args])
    with pytest.raises(SystemExit) as e:
        cli()
    assert e.value.code == f"\ninterrupted; {tmp_path}/out/predictions.json has 0 of 2 files"
    monkeypatch.setattr(sys, "argv", ["predict", "--debug", *args])
    with pytest.raises(KeyboardInterrupt):
        cli()


def test_a_video_that_cannot_be_read_is_one_line(teacher_files, tmp_path):
    """FFmpeg has its own to say of it, which says less."""
    (tmp_path / "no.mp4").write_bytes(b"no video" * 100)
    done = tool(
        tmp_path / "no.mp4", "--config", student_yaml("fcos"), "--weights", teacher_files["fcos"],
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert_one_line(done, "none of the files can be read: .*no.mp4")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_video(teacher_files, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 98, 122, 3), np.uint8)
    clip = tmp_path / "clip.avi"
    write_video(clip, frames)
    predictor = Predictor.load(str(student_yaml("fcos")), teacher_files["fcos"], list(EAGER))
    content = predict(predictor, find_inputs([str(clip)]), tmp_path / "out", 0.0)
    (entry,) = content["files"]
    assert (entry["height"], entry["width"], entry["frames_a_second"]) == (98, 122, 5)
    video = cv2.VideoCapture(str(clip))
    expected = [predictor(video.read()[1][:, :, ::-1])["instances"].scores for _ in frames]
    video.release()
    for frame, scores in zip(entry["frames"], expected):
        assert [x["score"] for x in frame["objects"]] == pytest.approx(scores.tolist())
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    drawn.release()


@pytest.mark.parametrize("value", [None, 0])
def test_boxes_are_drawn_where_they_are(value, teacher_files):
    predictor = Predictor.load(str(student_yaml("fcos")), teacher_files["fcos"], list(EAGER))
    image = np.zeros((480, 640, 3), np.uint8)
    found = predictor(image)["instances"][:1]
    found.pred_boxes.tensor[0] = torch.tensor([100.0, 50.0, 300.0, 250.0])
    drawn = draw_output(image, {"instances": found[:value]}, ["a"] * 10)
    edge = drawn[150, 97:103].max() > 80
    assert edge == (value is None)
    assert drawn[150, 200].max() == 0


def test_an_object_is_found_once(teacher_files):
    predictor = Predictor.load(str(student_yaml("fcos")), teacher_files["fcos"], list(EAGER))
    found = predictor(np.zeros((96, 96, 3), np.uint8))["instances"][:4]
    found.pred_boxes.tensor = torch.tensor(
        [[0.0, 0, 10, 10], [1, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]]
    )
    found.pred_classes = torch.tensor([3, 3, 4, 3])
    truth = type(found)((96, 96))
    truth.gt_boxes = type(found.pred_boxes)(torch.tensor([[0.0, 0, 10, 9]]))
    truth.gt_classes = torch.tensor([3])
    assert _right(found, truth) == [True, False, False, False]
    assert _right(found, truth[:0]) == [False] * 4


def test_the_command(pictures, teacher_files, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "student_config.yaml").write_text(student_yaml("fcos").read_text())
    base = REPO / "configs" / "Digits" / "Base-FCOS-Digits.yaml"
    text = (run / "student_config.yaml").read_text().replace("Base-FCOS-Digits.yaml", str(base))
    (run / "student_config.yaml").write_text(text)
    config = run / "student_config.yaml"
    done = tool(pictures, "--config", config, "--out", tmp_path / "out")
    assert_one_line(done, "there is no .*model_final.pth: name the student's checkpoint")
    weights = torch.load(teacher_files["fcos"], weights_only=True)
    torch.save(weights, run / "model_final.pth")
    done = tool(pictures, "--config", config, "--out", tmp_path / "out", "--opts", *EAGER)
    assert done.returncode == 0, done.stderr
    assert "2 files" in done.stdout
    assert done.stderr == ""
    weights["model"].pop(next(iter(weights["model"])))
    torch.save(weights, run / "model_final.pth")
    done = tool(pictures, "--config", config, "--out", tmp_path / "out")
    assert_one_line(done, "the checkpoint is not that of the model")
    done = tool(pictures, "--config", "gone.yaml", "--out", tmp_path / "out")
    assert_one_line(done, "config file not found: gone.yaml")
    done = tool(pictures, "--config", config, "--out", tmp_path / "out", "--score", 2)
    assert_one_line(done, "--score is 2.0")
    done = tool(pictures, "--config", config, "--weights", teacher_files["fcos"], "--out", config)
    assert_one_line(done, "cannot be written.* change --out")
    done = tool(pictures, "--config", config, "--out", pictures / "found")
    assert_one_line(done, "is where the inputs are; choose another folder with --out")
