"""How alike features are, and what is detected, in pictures."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from helpers import REPO, assert_one_line, build_distilled, digits_cfg, distill_cfg, make_batch
from PIL import Image
from torch import nn

from pcka_distill import PCKALoss, UserError
from pcka_distill.functional import pool_places
from pcka_distill.visualize import (
    _channel_cka,
    _places,
    cka_matrix,
    draw_cka,
    draw_results,
    layers_of,
    named_folders,
)

PICTURES = ("levels", "layers", "channels", "relations", "features")


def tool(name, *args):
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / name), *map(str, args)],
        capture_output=True, text=True, cwd=REPO,
    )  # fmt: skip


def cka_of(x, y):
    """Debiased CKA from the definition of HSIC_1 (Song et al. 2012, eq. 5), with N x N matrices."""
    n = len(x)
    k, l = (np.asarray(z, np.float64) @ np.asarray(z, np.float64).T for z in (x, y))

    def hsic(a, b):
        a, b = (z - np.diag(np.diag(z)) for z in (a, b))
        one = np.ones(n)
        return (
            np.trace(a @ b)
            + (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (one @ a @ b @ one)
        ) / (n * (n - 3))

    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def test_a_place_is_a_mean_of_its_cells():
    x = torch.randn(2, 3, 9, 12)
    rows = pool_places(x, 4)
    assert rows.shape == (32, 3)
    # Image 1, last row of places, third place.
    torch.testing.assert_close(rows[16 + 12 + 2], x[1, :, 6:9, 6:9].mean((1, 2)))
    with pytest.raises(ValueError, match="grid of 4 on maps of"):
        pool_places(x[..., :3])


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 13])
def test_unrelated_maps_have_nothing_in_common(side):
    """However small they are: no cell is counted twice."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        x, y = (_places(torch.randn(8, 64, side, side, generator=g)) for _ in "xy")
        found.append(cka_matrix({"x": x}, {"y": y}).item())
    assert abs(np.mean(found)) < 3 * np.std(found) / 20**0.5 + 0.01


def test_the_matrix_is_of_its_definition():
    g = torch.Generator().manual_seed(0)
    x = {k: torch.randn(20, n, generator=g) for k, n in (("a", 3), ("b", 30))}
    y = {"c": x["a"] @ torch.randn(3, 5, generator=g), "d": torch.randn(20, 4, generator=g)}
    found = cka_matrix({k: {2: v} for k, v in x.items()}, {k: {1: v, 2: v} for k, v in y.items()})
    expected = [[cka_of(a, b) for b in y.values()] for a in x.values()]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_layers_are_blocks_and_what_is_outside_of_them():
    backbone = build_model(digits_cfg("retinanet")).backbone
    names = list(layers_of(backbone))
    assert "bottom_up.stem.conv1" in names
    assert "bottom_up.res4.0" in names
    assert not any(x.startswith("bottom_up.res4.0.") for x in names)
    assert {"fpn_lateral3", "fpn_output5"} <= set(names)


@pytest.mark.usefixtures("storage")
def test_measured_features_are_those_that_losses_see(teacher_files, monkeypatch):
    model = build_distilled("retinanet", teacher_files)
    seen = {}

    def compare(self, level, student, teacher):
        seen[level] = student, teacher
        return student.sum() * 0

    monkeypatch.setattr(PCKALoss, "compare", compare)
    batch = make_batch()
    model.train()
    # Statistics of the batch would be those of training.
    for x in model.modules():
        if isinstance(x, nn.modules.batchnorm._BatchNorm):
            x.eval()
    model(batch)
    mine, theirs = model.feature_maps(batch)
    for level, pair in model.pairs.items():
        torch.testing.assert_close(mine[level], seen[level][0])
        torch.testing.assert_close(theirs[pair.teacher], seen[level][1])


def test_the_cka_of_a_channel():
    """Of one channel the loss is 1 - CKA."""
    loss = PCKALoss(levels=["p3"], patch_size=2)
    x, y = torch.randn(2, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    found = _channel_cka(loss, "p3", x, y)
    for c in range(3):
        alone = loss.compare("p3", x[:, c : c + 1], y[:, c : c + 1])
        assert found[c] == pytest.approx(1 - alone.item(), abs=1e-5)


@pytest.mark.parametrize("family", ["retinanet", "sem_seg"])
@pytest.mark.usefixtures("digits")
def test_pictures_of_features(family, teacher_files, tmp_path):
    cfg = distill_cfg(family, teacher_files[family], "MODEL.DEVICE", "cpu", "SEED", 5)
    students = {"begin": "", "copy": teacher_files[family]}
    values = draw_cka(cfg, students, "digits_val", tmp_path / "a", 12)
    # A copy of the teacher is as alike as can be, and a random student is not.
    assert all(x == pytest.approx(1, abs=1e-4) for x in values["copy"].values())
    assert all(x < 0.99 for x in values["begin"].values())
    assert json.loads((tmp_path / "a" / "cka.json").read_text()) == values
    for name in PICTURES:
        picture = np.asarray(Image.open(tmp_path / "a" / f"{name}.png"))
        assert picture.std() > 5, name
    assert draw_cka(cfg, students, "digits_val", tmp_path / "b", 12) == values


@pytest.mark.usefixtures("digits")
def test_of_other_widths_there_are_no_channels(teacher_files, tmp_path):
    cfg = distill_cfg("retinanet", teacher_files["retinanet"], "MODEL.DEVICE", "cpu")
    cfg.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 32])
    values = draw_cka(cfg, {"begin": ""}, "digits_val", tmp_path, 8)
    assert values["begin"].keys() == {"p3", "p4", "p5"}


@pytest.mark.usefixtures("digits")
def test_pictures_of_detections(teacher_files, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    cfg = digits_cfg("fcos", "MODEL.FCOS.SCORE_THRESH_TEST", 0.0, "MODEL.DEVICE", "cpu")
    (run / "student_config.yaml").write_text(cfg.dump())
    shutil.copy(teacher_files["fcos"], run / "model_final.pth")
    for score, name in ((0.0, "a"), (1.0, "b")):
        draw_results(
            tmp_path / f"{name}.png", "digits_val", {"random": str(run)}, images=3, score=score
        )
    a, b = (np.asarray(Image.open(tmp_path / f"{x}.png").convert("RGB")) for x in "ab")
    red = [((x[..., 0] > 240) & (x[..., 1:] < 15).all(-1)).sum() for x in (a, b)]
    assert red[0] > red[1] + 500
    # The images are there: three, and again for the row of the student.
    picture = read_image(DatasetCatalog.get("digits_val")[0]["file_name"], format="RGB")
    assert b.std() > 20 < picture.std()


@pytest.mark.parametrize("text", ["no title", "=path", ""])
def test_names_of_runs(text):
    with pytest.raises(UserError, match="TITLE=PATH"):
        named_folders([text])
    with pytest.raises(UserError, match="title of its own"):
        named_folders(["a=x", "a=y"])
    assert named_folders(["a=x=1", "b="]) == {"a": "x=1", "b": ""}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config-file", "configs/Digits/retinanet_student.yaml"], "name one of a distillation"),
        (["--config-file", "gone.yaml"], "config file not found"),
        (["--images", "3"], "--images is 3; it must be at least 8"),
        (["--dataset", "gone"], "unknown dataset 'gone'"),
        (["--students", "a=gone.pth"], "checkpoint not found: gone.pth"),
        (["--students", "nothing"], "'nothing' is no TITLE=PATH"),
    ],
)
def test_one_line_of_features(args, message, teacher_files, tmp_path):
    config = "configs/Digits/retinanet_pcka.yaml"
    done = tool(
        "visualize_cka.py", "--config-file", config, "--students", "begin=", "--out", tmp_path,
        *args, "--opts", "MODEL.DISTILL.TEACHER.WEIGHTS", teacher_files["retinanet"],
        "MODEL.DISTILL.TEACHER.CONFIG_FILE", "configs/Digits/retinanet_student.yaml",
    )  # fmt: skip
    assert_one_line(done, message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--runs", "a=gone"], "gone is no folder of a run"),
        (["--runs", "gone"], "no TITLE=PATH"),
        (["--images", "0"], "--images is 0"),
        (["--dataset", "digit_scans_val"], "has no boxes to draw"),
    ],
)
def test_one_line_of_detections(args, message, tmp_path):
    done = tool(
        "visualize_results.py", "--runs", "a=b", "--dataset", "digits_val",
        "--out", tmp_path / "x.png", *args,
    )  # fmt: skip
    assert_one_line(done, message)
