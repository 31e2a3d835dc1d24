"""How alike features are, and what is detected, in pictures."""

import fcntl
import json
import logging
import os
import pty
import re
import runpy
import shutil
import struct
import subprocess
import sys
import termios
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.modeling.backbone import ViT
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.structures import Boxes, Instances
from helpers import REPO, assert_one_line, build_distilled, digits_cfg, distill_cfg, make_batch
from PIL import Image
from torch import nn

from pcka_distill import PCKALoss, UserError, drawing, visualize
from pcka_distill import tool as tool_module
from pcka_distill.drawing import Row, detection_grid, place_labels
from pcka_distill.functional import pool_places
from pcka_distill.hooks import DetectionPictures
from pcka_distill.visualize import (
    _channel_cka,
    _draw_channels,
    _from_tokens,
    _layer_places,
    _places,
    _tell,
    _Watch,
    cka_matrix,
    draw_cka,
    draw_results,
    layers_of,
    named_folders,
    save_figure,
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


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn", "sem_seg"])
def test_feature_maps_are_the_levels_and_nothing_else(family, teacher_files):
    model = build_distilled(family, teacher_files)
    for maps in model.eval().feature_maps(make_batch()):
        assert list(maps) == list(model.student.backbone.output_shape())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Of a distillation of image classifiers."""
    path = tmp_path_factory.mktemp("classifier") / "teacher.pth"
    torch.save({"model": build_model(digits_cfg("classifier_teacher")).state_dict()}, path)
    return digits_cfg(
        "classifier_rcka", "MODEL.DEVICE", "cpu", "MODEL.DISTILL.TEACHER.WEIGHTS", str(path)
    )


def test_pictures_of_a_classifier(classifier, tmp_path):
    """Its network gives logits beside its maps."""
    values = draw_cka(classifier, {"begin": ""}, classifier.DATASETS.TEST[0], tmp_path, 8)
    assert list(values["begin"]) == ["stride4"]
    assert {x.name for x in tmp_path.iterdir()} == {"cka.json", *(f"{x}.png" for x in PICTURES)}


class Chain(nn.Sequential):
    """Of blocks, which see what is left of the others' outputs."""

    def __init__(self, count):
        super().__init__(*(self.Block(self) for _ in range(count)))
        self.outputs, self.most = [], 0

    class Block(nn.Module):
        def __init__(self, chain):
            super().__init__()
            self.chain = [chain]

        def forward(self, x):
            (chain,) = self.chain
            out = x + 1
            chain.outputs.append(weakref.ref(out))
            chain.most = max(chain.most, sum(x() is not None for x in chain.outputs))
            return out


def test_of_a_layer_only_its_places_are_kept():
    chain, x = Chain(9), torch.randn(2, 3, 8, 8)
    with _Watch(chain) as watch:
        chain(x)
        chain(x)
    # The one that is made, and the one that it is made of.
    assert chain.most == 2
    found, without = watch.found()
    assert not without
    assert list(found) == [str(i) for i in range(9)]
    torch.testing.assert_close(found["8"][4], pool_places(torch.cat([x, x]) + 9, 4))
    chain(x)
    assert watch.found()[0]["8"][4].shape == (64, 3), "it goes on after the end"


def outputs_of(backbone, images, names):
    """Layer -> what it gives."""
    found = {}
    modules = dict(backbone.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda m, a, out, k=name: found.update({k: out}))
        for name in names
    ]
    backbone(images)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_layers_of_a_vision_transformer():
    """Its blocks give (B, H, W, C)."""
    net = ViT(img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2, out_feature="last")
    images = torch.randn(2, 3, 64, 48)
    with _Watch(net) as watch:
        net(images)
    found, without = watch.found()
    assert list(found) == ["patch_embed.proj", "blocks.0", "blocks.1"] and not without
    given = outputs_of(net, images, list(found))
    assert given["blocks.1"].shape == (2, 8, 6, 24)
    for name in ("blocks.0", "blocks.1"):
        torch.testing.assert_close(found[name][4], pool_places(given[name].permute(0, 3, 1, 2), 4))
    torch.testing.assert_close(found["patch_embed.proj"][4], pool_places(given["patch_embed.proj"]))


@torch.no_grad()
def test_layers_of_a_swin_transformer():
    """Its blocks give (B, L, C), whose L = H * W is of sides that were padded."""
    net = SwinTransformer(embed_dim=24, depths=(1, 1), num_heads=(2, 2), window_size=4,
                          out_indices=(1,), drop_path_rate=0.0).eval()  # fmt: skip
    images = torch.randn(2, 3, 60, 44)
    with _Watch(net) as watch:
        net(images)
    found, without = watch.found()
    assert not without
    blocks = ["layers.0.blocks.0", "layers.1.blocks.0"]
    assert list(found) == ["patch_embed.proj", *blocks]
    given = outputs_of(net, images, blocks)
    for name, sides in zip(blocks, ((15, 11), (8, 6))):
        x = given[name]
        assert x.shape[1] == sides[0] * sides[1]
        maps = x.reshape(2, *sides, -1).permute(0, 3, 1, 2)
        torch.testing.assert_close(found[name][4], pool_places(maps, 4))


def test_tokens_of_a_known_place_and_others():
    x = torch.randn(2, 13, 5)
    with_class_token = _from_tokens(x, (64, 48))
    assert with_class_token.shape == (2, 5, 4, 3)
    torch.testing.assert_close(with_class_token[:, :, 1, 2], x[:, 1 + 3 + 2])
    torch.testing.assert_close(_from_tokens(x[:, 1:], (64, 48)), with_class_token)
    # Two tokens more than places: the mean over all of them is all that is sure.
    torch.testing.assert_close(
        _from_tokens(torch.cat([x, x[:, :1]], 1), (64, 48))[..., 0, 0],
        torch.cat([x, x[:, :1]], 1).mean(1),
    )


@pytest.mark.parametrize(
    ("width", "shape", "expected"),
    [
        (5, (2, 7, 8, 5), "last"),
        (5, (2, 5, 7, 8), "first"),
        (5, (2, 5, 8, 5), "cannot be known"),
        (6, (2, 7, 8, 5), "cannot be known"),
        (5, (2, 7, 5), "last"),
        (5, (2, 5, 5), "last"),
        (6, (2, 7, 5), "cannot be known"),
        (5, (8, 7, 5), "no maps of 2 images"),
        (None, (2, 7, 8, 5), "first"),
        (None, (2, 7, 5), "cannot be known"),
        (None, None, "no tensor but a tuple"),
    ],
)
def test_which_axis_the_channels_are(width, shape, expected):
    layer = nn.Sequential(nn.LayerNorm(width) if width else nn.Conv2d(3, 3, 1))
    found = _layer_places(layer, torch.zeros(shape) if shape else (), (2, 3, 64, 64))
    if expected in ("first", "last"):
        assert found[1].shape == (2, shape[1 if expected == "first" else -1])
    else:
        assert expected in found


def test_layers_that_are_left_out_are_named_on_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        _tell([{}, {}])
        assert not caplog.records
        _tell([{}, {"a": "why", "b": "why", "c": "why", "d": "more"}])
    assert [x.getMessage() for x in caplog.records] == [
        "Layers that are left out of layers.png: a, b and 1 more of the teacher: why; d of the "
        "teacher: more"
    ]


def test_layers_that_run_twice_or_seldom():
    x = torch.randn(1, 3, 4, 4)
    chain = Chain(2)
    with _Watch(chain) as watch:
        chain(x)
        chain[1](x)
        nn.Module.__call__(chain, x)
        chain._modules.pop("0")
        chain(x)
    found, without = watch.found()
    assert not found
    assert without == {"0": "they do not run for all images", "1": "they run more than once"}


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
def test_numbers_that_cannot_be_written(teacher_files, tmp_path):
    cfg = distill_cfg("retinanet", teacher_files["retinanet"], "MODEL.DEVICE", "cpu")
    (tmp_path / "cka.json").mkdir()
    with pytest.raises(UserError, match=r"cka.json cannot be written: it is a folder; change"):
        draw_cka(cfg, {"begin": ""}, "digits_val", tmp_path, 8)
    assert [x.name for x in tmp_path.iterdir()] == ["cka.json"]


@pytest.mark.usefixtures("digits")
def test_of_other_widths_there_are_no_channels(teacher_files, tmp_path):
    cfg = distill_cfg("retinanet", teacher_files["retinanet"], "MODEL.DEVICE", "cpu")
    cfg.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 32])
    values = draw_cka(cfg, {"begin": ""}, "digits_val", tmp_path, 8)
    assert values["begin"].keys() == {"p3", "p4", "p5"}


@pytest.mark.usefixtures("digits")
def test_pictures_of_detections(teacher_files, tmp_path):
    run = make_run(tmp_path / "run", teacher_files["fcos"])
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


NAMES = ("traffic light", "person", "fire hydrant", "dining table", "sports ball")


def photographs(count, height=480, width=640, boxes=12):
    """Images, their truth, and detections of which one in three has another class."""
    g = torch.Generator().manual_seed(0)
    images, truth, found = [], [], []
    for _ in range(count):
        images.append(np.full((height, width, 3), 90, np.uint8))
        center = torch.rand(boxes, 2, generator=g) * torch.tensor([width, height])
        sides = torch.rand(boxes, 2, generator=g) * 200 + 15
        corners = Boxes(torch.cat([center - sides / 2, center + sides / 2], 1))
        corners.clip((height, width))
        kinds = torch.randint(0, len(NAMES), (boxes,), generator=g)
        size = (height, width)
        truth.append(Instances(size, gt_boxes=corners, gt_classes=kinds))
        wrong = (kinds + (torch.arange(boxes) % 3 == 0)) % len(NAMES)
        found.append(Instances(size, pred_boxes=corners, pred_classes=wrong))
    return images, truth, found


def test_photographs_can_be_read():
    """Their pictures are large, names stay in them, and hide little of one another."""
    images, truth, found = photographs(5)
    figure = detection_grid(images, truth, [Row("truth", None), Row("a", found)], NAMES, "caption")
    figure.canvas.draw()
    width, _ = figure.canvas.get_width_height()
    assert width < 1600
    # Two beside one another, in three lines of two rows.
    shown = [x for x in figure.axes if x.images]
    assert len(shown) == 10 and len(figure.axes) == 12
    assert [x.get_ylabel() for x in figure.axes[::2]] == ["truth", "a"] * 3
    # The fifth image, its own truth above what is found in it.
    assert [len(x.patches) for x in figure.axes[8:]] == [12, 0, 12, 0]
    for axis in shown:
        frame = axis.get_window_extent()
        assert frame.width > 480
        labels = [x.get_bbox_patch().get_window_extent() for x in axis.texts]
        assert len(labels) == 12
        for x in axis.texts:
            size = x.get_window_extent()
            assert size.height < 0.05 * frame.height and size.width < 0.2 * frame.width
            assert 0 < x.get_bbox_patch().get_alpha() < 1
        for x in labels:
            assert frame.x0 - 1 <= x.x0 < x.x1 <= frame.x1 + 1
            assert frame.y0 - 1 <= x.y0 < x.y1 <= frame.y1 + 1
        areas = [x.intersection(x, y) for i, x in enumerate(labels) for y in labels[:i]]
        hidden = sum(x.width * x.height for x in areas if x is not None)
        assert hidden < 0.05 * sum(x.width * x.height for x in labels)


def test_digits_stay_on_one_line():
    images, truth, found = photographs(6, 96, 96, 3)
    figure = detection_grid(images, truth, [Row("truth", None), Row("a", found)], NAMES, "caption")
    assert [x.get_ylabel() for x in figure.axes] == [*["truth", *[""] * 5], *["a", *[""] * 5]]
    assert 1400 < figure.canvas.get_width_height()[0] < 1500


def test_a_figure_that_viewers_open(monkeypatch):
    monkeypatch.setattr(drawing, "_LONGEST", 1500)
    images, truth, found = photographs(2, 640, 480, 1)
    rows = [Row(str(i), found) for i in range(6)]
    figure = detection_grid(images, truth, rows, NAMES, "caption")
    # Without it 6 * 656.
    assert 1500 < figure.canvas.get_width_height()[1] < 1700


def test_labels_hide_least():
    box, size = [40.0, 40.0, 60.0, 60.0], (15.0, 5.0)
    assert place_labels([box], [size], (100, 100)) == [(40, 35)]
    # Two of the same box: above to the left, then where the first is not.
    first, second = place_labels([box, box], [size] * 2, (100, 100))
    assert first == (40, 35)
    assert second[1] + 5 <= 35 or second[1] >= 60 or second[0] >= 60 or second[0] + 15 <= 40
    # At the upper edge, below it.
    assert place_labels([[40.0, 0.0, 60.0, 20.0]], [size], (100, 100)) == [(40, 20)]
    # At the right edge, and of the whole image.
    assert place_labels([[95.0, 40.0, 100.0, 60.0]], [size], (100, 100)) == [(85, 35)]
    assert place_labels([[0.0, 0.0, 100.0, 100.0]], [size], (100, 100)) == [(0, 0)]
    assert place_labels([], [], (100, 100)) == []


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    figure, _ = visualize.figure_of(1, 1, 2, 2)
    path = tmp_path / "a.jpg"
    save_figure(figure, path)
    assert Image.open(path).size == (220, 220)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"a\.jpg cannot be written: disk full; change --out"):
        save_figure(figure, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_legend_hides_no_channel(monkeypatch):
    figures = []
    monkeypatch.setattr(visualize, "save_figure", lambda figure, _: figures.append(figure))
    values = torch.rand(64, generator=torch.Generator().manual_seed(0))
    _draw_channels("x.png", {k: {"p3": values, "p4": values**2} for k in ("as it begins", "b")})
    (figure,) = figures
    figure.canvas.draw()
    for axis in figure.axes:
        legend = axis.get_legend().get_window_extent()
        assert not legend.overlaps(axis.patch.get_window_extent())
        assert legend.y1 <= figure.bbox.y1


@pytest.mark.usefixtures("digits")
def test_a_picture_that_is_gone_ends_no_training(tmp_path, caplog):
    records = [dict(x) for x in DatasetCatalog.get("digits_val")[:2]]
    records[0]["file_name"] = str(tmp_path / "gone.png")
    instances = Instances((96, 96), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0),
                          pred_classes=torch.zeros(0, dtype=torch.int64))  # fmt: skip

    class Model(nn.Module):
        def forward(self, inputs):
            assert inputs == [{"second"}]
            return [{"instances": instances}]

    drawn = []
    hook = DetectionPictures(
        1, {"student": Model()}, records, [{"first"}, {"second"}], "0123456789"
    )
    put_image = lambda name, x: drawn.append(x.shape)  # noqa: E731
    storage = SimpleNamespace(put_image=put_image)
    hook.trainer = SimpleNamespace(iter=0, max_iter=9, storage=storage)
    hook.after_step()
    hook.after_step()
    assert len(drawn) == 2
    assert [x.getMessage() for x in caplog.records if "gone.png" in x.getMessage()] == [
        f"Not drawn: the picture {tmp_path}/gone.png cannot be read: [Errno 2] No such file or "
        f"directory: '{tmp_path}/gone.png'"
    ]
    # With none of them there is no picture, and still a training.
    records[1]["file_name"] = records[0]["file_name"]
    hook.after_step()
    assert len(drawn) == 2


def make_run(folder, weights):
    folder.mkdir()
    cfg = digits_cfg("fcos", "MODEL.FCOS.SCORE_THRESH_TEST", 0.0, "MODEL.DEVICE", "cpu")
    (folder / "student_config.yaml").write_text(cfg.dump())
    shutil.copy(weights, folder / "model_final.pth")
    return folder


@pytest.mark.usefixtures("digits")
def test_a_bar_on_a_terminal_alone(teacher_files, tmp_path):
    """It counts images, and there is one while they are drawn."""
    run, out = make_run(tmp_path / "run", teacher_files["fcos"]), tmp_path / "new" / "x.png"
    args = ["--runs", f"a={run}", "--dataset", "digits_val", "--out", out, "--images", 3]
    done = tool("visualize_results.py", *args)
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert "%|" not in done.stderr
    assert [x.name for x in out.parent.iterdir()] == ["x.png"]
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, REPO / "tools" / "visualize_results.py", *map(str, args)],
        stdout=subprocess.DEVNULL, stderr=end, cwd=REPO,
    )  # fmt: skip
    os.close(end)
    seen = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            # What Linux says once nobody has the other end.
            break
        if not part:
            break
        seen += part
    os.close(terminal)
    assert process.wait() == 0
    assert re.search(rb"detect: 100%.* 3/3 .*image", seen), seen
    assert re.search(rb"draw x.png: ", seen), seen


TOOLS = ("visualize_cka", "visualize_results", "report", "draw_docs")


@pytest.mark.parametrize("name", TOOLS)
def test_help(name, monkeypatch):
    """Every option is explained, and the examples can be copied."""
    parsers = []
    monkeypatch.setattr(tool_module, "run_tool", lambda parser, _: parsers.append(parser))
    runpy.run_path(str(REPO / "tools" / f"{name}.py"), run_name="__main__")
    (parser,) = parsers
    assert all(x.help for x in parser._actions)
    for line in parser.format_help().splitlines():
        assert len(line) <= 100
    text = (REPO / "tools" / f"{name}.py").read_text()
    for example in re.findall(r"^    python tools/.*(?:\\\n.*)*", text, re.M):
        assert example in parser.format_help()


def test_pictures_of_the_docs_spare_what_is_there(tmp_path, monkeypatch):
    for name in ("draw_cka", "draw_results"):
        monkeypatch.setattr(visualize, name, lambda *args, **_: None)

    def draw_cka(cfg, students, dataset, folder, images):
        for name in ("levels.png", "cka.json"):
            (folder / name).write_text("new")

    monkeypatch.setattr(visualize, "draw_cka", draw_cka)
    demo = tmp_path / "demo" / "distilled"
    demo.mkdir(parents=True)
    (demo / "config.yaml").write_text(digits_cfg("retinanet_pcka").dump())
    out = tmp_path / "out"
    out.mkdir()
    for name in ("levels.png", "cka.json"):
        (out / name).write_text("old")
    monkeypatch.setattr(sys, "argv", ["x", "--demo", str(demo.parent), "--out", str(out)])
    runpy.run_path(str(REPO / "tools" / "draw_docs.py"), run_name="__main__")
    assert {x.name: x.read_text() for x in out.iterdir()} == {
        "levels.png": "new", "cka.json": "old",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["no title", "=path", ""])
def test_names_of_runs(text):
    with pytest.raises(UserError, match="TITLE=PATH"):
        named_folders([text])
    with pytest.raises(UserError, match="title of its own"):
        named_folders(["a=x", "a=y"])
    assert named_folders(["a=x=1", "b="]) == {"a": "x=1", "b": ""}


def test_folders_without_a_title(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert named_folders(["."], titled=False) == {"run": "."}
    assert named_folders(["../run/", "b=x"], titled=False) == {"run": "../run/", "b": "x"}
    with pytest.raises(
        UserError, match=r"two are called 'run': \. and other/run; write TITLE=PATH"
    ):
        named_folders([".", "other/run"], titled=False)
    with pytest.raises(UserError, match="'/' is no TITLE=PATH"):
        named_folders(["/"], titled=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config-file", "configs/Digits/retinanet_student.yaml"], "name one of a distillation"),
        (["--config-file", "gone.yaml"], "config file not found"),
        (["--images", "3"], "--images is 3; it must be at least 8"),
        (["--dataset", "gone"], "unknown dataset 'gone'"),
        (["--students", "a=gone.pth"], "checkpoint not found: gone.pth"),
        (["--students", "nothing"], "'nothing' is no TITLE=PATH"),
        (["--out", "README.md/x"], "cannot be written: .*; change --out"),
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
        (["--images", "25"], "--images is 25; at most 24 are drawn"),
        # Before anything is read.
        (["--out", "docs"], "docs cannot be written: it is a folder; change --out"),
        (["--out", "x.txt"], "x.txt has none of the endings .jpeg .jpg .* .png .*; change --out"),
        (["--out", "README.md/x.png"], "cannot be written: .*; change --out"),
    ],
)
def test_one_line_of_detections(args, message, tmp_path):
    done = tool(
        "visualize_results.py", "--runs", "a=b", "--dataset", "digits_val",
        "--out", tmp_path / "x.png", *args,
    )  # fmt: skip
    assert_one_line(done, message)
