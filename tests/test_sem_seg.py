"""Semantic segmentation: heads, backbones, taps, losses on pixels, Cityscapes' layout."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from cityscapesscripts.helpers.labels import trainId2label
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from helpers import REPO, assert_one_line, digits_cfg, make_batch, train_net
from PIL import Image
from pycocotools.coco import COCO
from torch.utils._python_dispatch import TorchDispatchMode

from pcka_distill import (
    DistillationModel,
    FrozenTeacher,
    KDLoss,
    RCKALoss,
    Taps,
    UserError,
    find_adapter,
    get_distill_cfg,
)
from pcka_distill.backbones import from_torchvision
from pcka_distill.build import merge_config
from pcka_distill.data.sem_seg import check_labels, sem_seg_mapper
from pcka_distill.engine import _evaluator_type
from pcka_distill.psp import PSPHead

HEADS = {
    "fpn": [],
    "psp": [
        "MODEL.SEM_SEG_HEAD.NAME", "PSPHead", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p3"],
        "MODEL.PSP_HEAD.AUX_FEATURE", "p4", "MODEL.SEM_SEG_HEAD.NORM", "BN",
    ],
    "v3": [
        "MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3Head", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p4"],
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 16, "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 32,
        "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS", [1, 2, 3],
    ],
    "v3plus": [
        "MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3PlusHead", "MODEL.SEM_SEG_HEAD.IN_FEATURES",
        ["p2", "p5"], "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 32,
        "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS", [1, 2, 3], "MODEL.SEM_SEG_HEAD.NORM", "BN",
    ],
}  # fmt: skip


def segmentor(head, *opts, seed=0):
    torch.manual_seed(seed)
    return build_model(digits_cfg("sem_seg_student", *HEADS[head], *opts))


def pixels(head, model, batch):
    """What the predictor gives, by stock Detectron2's own forward in eval mode."""
    found = []
    handle = model.sem_seg_head.predictor.register_forward_hook(lambda m, a, x: found.append(x))
    with torch.no_grad():
        model.eval()(batch)
    handle.remove()
    return torch.cat(found)


# ---- taps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_the_teachers_pixels_are_those_of_its_own_forward(head, storage):
    """Padded further than it would by itself, and cut again."""
    model = segmentor(head).eval()
    batch = make_batch(sizes=((90, 96), (64, 80)))
    adapter = find_adapter(model)
    want = pixels(head, model, batch).permute(0, 2, 3, 1)
    student = Taps(images=torch.zeros(2, 3, 96, 96), logits={"pixels": torch.zeros_like(want)})
    with torch.no_grad():
        maps = adapter.teacher_features(model, batch, student, alike=False)
        got = adapter.teacher_logits(model, maps, student)["pixels"]
    assert torch.equal(got, want)


@pytest.mark.parametrize("teacher", HEADS)
@pytest.mark.parametrize("student", HEADS)
def test_heads_of_other_kinds_and_strides(student, teacher, storage):
    """KD takes the teacher's logits on the student's grid."""
    torch.manual_seed(0)
    kd = KDLoss()
    taught = segmentor(teacher, seed=1)
    model = DistillationModel(
        student=segmentor(student), teacher=FrozenTeacher(taught), losses=[kd]
    )
    batch = make_batch()
    seen = []
    kd.register_forward_pre_hook(lambda m, args: seen.append(args))
    losses = model(batch)
    assert losses["loss_kd"] > 0
    mine, theirs = (x.logits["pixels"] for x in seen[0])
    want = pixels(teacher, taught, batch)
    size = mine.shape[1:3]
    if size != want.shape[-2:]:
        want = F.interpolate(want, size=size, mode="bilinear", align_corners=False)
    assert torch.allclose(theirs, want.permute(0, 2, 3, 1), atol=1e-5)
    log_p, log_q = (z.detach().log_softmax(-1).double().numpy() for z in (mine, theirs))
    by_hand = (np.exp(log_q) * (log_q - log_p)).sum(-1).mean()
    assert losses["loss_kd"].item() == pytest.approx(by_hand, rel=1e-4)


def test_labels_are_those_at_the_centres_of_cells(storage):
    model = segmentor("fpn")
    adapter = find_adapter(model)
    batch = make_batch()
    batch[1]["sem_seg"][:48] = 255
    taps = Taps(logits={"pixels": torch.zeros(2, 24, 24, 11)})
    model.sem_seg_head.ignore_value = 255
    adapter.read_labels(model, batch, taps)
    want = torch.stack([x["sem_seg"][2::4, 2::4] for x in batch])
    assert torch.equal(taps.labels["pixels"], want.masked_fill(want == 255, -1))


def cka(x, y, center):
    """By its definition, with Grams."""
    k, l = x @ x.T, y @ y.T
    if center:
        h = np.eye(len(k)) - 1 / len(k)
        k, l = h @ k @ h, h @ l @ h
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("samples", ["rows", "images"])
def test_rcka_of_pixels_and_of_images(samples, center, storage):
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(4, 3, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    loss = RCKALoss(samples=samples, center=center)
    sides = [Taps(logits={"pixels": z}, background=False) for z in (x, y)]
    got = loss(*sides)
    a, b = (z.reshape((4, -1) if samples == "images" else (-1, 4)).numpy() for z in (x, y))
    assert got["loss_rcka_intra"].item() == pytest.approx(1 - cka(a, b, center), abs=1e-9)
    assert got["loss_rcka_inter"].item() == pytest.approx(1 - cka(a.T, b.T, center), abs=1e-9)


def test_pixels_that_are_not_labelled_are_left_out(storage):
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(1, 4, 4, 5, generator=g) for _ in range(2))
    labels = torch.tensor([4, -1, 0, 2]).repeat(4)
    student = Taps(logits={"pixels": x}, labels={"pixels": labels.view(1, 4, 4)}, background=False)
    got = KDLoss(foreground_only=True)(student, Taps(logits={"pixels": y}))
    kept = (labels >= 0).nonzero()[:, 0]
    whole = Taps(logits={"pixels": x.view(1, 1, 16, 5)[:, :, kept]}, background=False)
    want = KDLoss()(whole, Taps(logits={"pixels": y.view(1, 1, 16, 5)[:, :, kept]}))
    assert torch.allclose(got["loss_kd"], want["loss_kd"])


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.count = max(self.count, x.numel())
        return out


@pytest.mark.parametrize("samples", ["rows", "images"])
def test_no_relation_is_larger_than_the_logits(samples):
    """Of 19 classes at the stride of 8 of crops of 512 x 1024: as published it is 90 GiB."""
    shape = (2, 64, 128, 19)
    x, y = torch.randn(shape, requires_grad=True), torch.randn(shape)
    loss = RCKALoss(samples=samples, center=samples == "rows")
    with _Largest() as largest:
        sum(
            loss(*(Taps(logits={"pixels": z}, background=False) for z in (x, y))).values()
        ).backward()
    assert largest.count <= x.numel()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        ({"samples": "images"}, "retinanet", "SAMPLES images is for segmentation"),
        ({"samples": "images", "temperature": 2.0}, "sem_seg", "with TEMPERATURE 0"),
        ({"samples": "pixels"}, "sem_seg", "expected rows or images"),
    ],
)
def test_samples_that_cannot_be(options, family, message):
    student, teacher = (build_model(digits_cfg(f"{family}_student")) for _ in range(2))

    def build():
        losses = [RCKALoss(**options)]
        DistillationModel(student=student, teacher=FrozenTeacher(teacher), losses=losses)

    with pytest.raises(UserError, match=message):
        build()


# ---- heads and backbones ---------------------------------------------------------------------


def psp(**options):
    shapes = {"res4": ShapeSpec(channels=8, stride=8), "res5": ShapeSpec(channels=16, stride=8)}
    torch.manual_seed(0)
    return PSPHead(
        shapes,
        in_feature="res5",
        **{"num_classes": 5, "conv_dims": 8, "norm": "", "dropout": 0.0, **options},
    )


def test_psp_by_hand():
    """Pooled, projected, enlarged, put side by side; of odd sizes too."""
    head = psp(norm="BN").eval()
    x = torch.randn(2, 16, 7, 9)
    parts = [x]
    for size, branch in zip((1, 2, 3, 6), head.branches):
        cells = []
        for i in range(size):
            for j in range(size):
                rows = slice(i * 7 // size, -(-(i + 1) * 7 // size))
                columns = slice(j * 9 // size, -(-(j + 1) * 9 // size))
                cells.append(x[..., rows, columns].mean((-2, -1)))
        pooled = torch.stack(cells, -1).view(2, 16, size, size)
        parts.append(F.interpolate(branch(pooled), (7, 9), mode="bilinear", align_corners=False))
    want = head.predictor(head.bottleneck(torch.cat(parts, 1)))
    assert want.shape == (2, 5, 7, 9)
    assert torch.allclose(head.layers({"res5": x}), want, atol=1e-5)


def test_psp_losses():
    head = psp(aux_feature="res4", aux_weight=0.5, loss_weight=2.0)
    maps = {"res4": torch.randn(2, 8, 4, 4), "res5": torch.randn(2, 16, 4, 4)}
    # The last cells reach over the image.
    labels = torch.randint(0, 5, (2, 30, 31))
    labels[0, :9] = 255
    none, losses = head(maps, labels)
    assert none is None
    for name, logits, weight in (
        ("loss_sem_seg", head.layers(maps), 2.0),
        ("loss_sem_seg_aux", head.aux(maps["res4"]), 1.0),
    ):
        large = F.interpolate(logits, scale_factor=8, mode="bilinear", align_corners=False)
        large = large[..., :30, :31]
        want = weight * F.cross_entropy(large, labels, ignore_index=255)
        assert torch.allclose(losses[name], want)
    _, losses = head(maps, torch.full_like(labels, 255))
    assert all(x == 0 for x in losses.values())
    logits, losses = head.eval()(maps)
    assert logits.shape == (2, 5, 32, 32)
    assert losses == {}


def test_psp_of_what_cannot_be():
    with pytest.raises(UserError, match=r"PSPHead reads 'res3' and the backbone gives res4, res5"):
        psp(aux_feature="res3")
    with pytest.raises(UserError, match=r"set MODEL.SEM_SEG_HEAD.NORM GN, or raise"):
        psp(norm="BN").layers({"res5": torch.randn(1, 16, 4, 4)})
    with pytest.raises(UserError, match=r"IN_FEATURES has p2, p3, p4, p5; set it to \[res5\]"):
        build_model(digits_cfg("sem_seg_student", "MODEL.SEM_SEG_HEAD.NAME", "PSPHead"))


def backbone(name, depth, *opts):
    cfg = get_distill_cfg()
    channels = 64 if depth < 50 else 256
    cfg.merge_from_list(
        [
            *("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", channels),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.RESNETS.STEM_TYPE", "basic", "MODEL.RESNETS.NORM", "BN"),
            *("MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.RES5_MULTI_GRID", [1, 1, 1], *opts),
        ]
    )
    torch.manual_seed(0)
    return BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3)).eval()


def dilations(res4, res5):
    return ["MODEL.RESNETS.RES4_DILATION", res4, "MODEL.RESNETS.RES5_DILATION", res5]


@pytest.mark.parametrize(
    ("theirs", "depth", "opts"),
    [
        ("build_resnet_backbone", 18, dilations(1, 1)),
        ("build_resnet_backbone", 34, dilations(1, 1)),
        ("build_resnet_backbone", 50, dilations(1, 2)),
        ("build_resnet_deeplab_backbone", 50, dilations(1, 2)),
        ("build_resnet_deeplab_backbone", 50, dilations(2, 4)),
        (
            "build_resnet_deeplab_backbone",
            50,
            [*dilations(2, 4), "MODEL.RESNETS.STEM_TYPE", "deeplab"],
        ),
    ],
)
def test_a_dilated_resnet_is_detectron2s(theirs, depth, opts):
    """Where Detectron2 can build it."""
    a = backbone("build_dilated_resnet_backbone", depth, *opts)
    b = backbone(theirs, depth, *opts)
    b.load_state_dict(a.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        mine, want = a(x), b(x)
    assert {k: (v.channels, v.stride) for k, v in a.output_shape().items()} == {
        k: (v.channels, v.stride) for k, v in b.output_shape().items()
    }
    assert all(torch.equal(mine[k], want[k]) for k in want)


def test_a_dilated_resnet_18():
    """Detectron2 builds none: by torch's own functions."""
    net = backbone("build_dilated_resnet_backbone", 18, *dilations(2, 4))
    assert [x.stride for x in net.output_shape().values()] == [4, 8, 8, 8]
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 64, 64))

    def conv(module, x, dilation):
        pad = dilation * (module.weight.shape[-1] // 2)
        x = F.conv2d(x, module.weight, padding=pad, dilation=dilation)
        n = module.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)

    for before, stage, dilation in (("res3", "res4", 2), ("res4", "res5", 4)):
        x = maps[before]
        with torch.no_grad():
            for block in getattr(net, stage):
                y = conv(block.conv2, conv(block.conv1, x, dilation).relu(), dilation)
                x = (y + (x if block.shortcut is None else conv(block.shortcut, x, 1))).relu()
        assert torch.allclose(maps[stage], x, atol=1e-4)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.RESNETS.DEPTH", 20], "DEPTH is 20"),
        (["MODEL.RESNETS.STEM_TYPE", "x"], "STEM_TYPE is 'x'"),
        (dilations(2, 2), "got 2 and 2"),
    ],
)
def test_backbones_that_cannot_be(opts, message):
    with pytest.raises(UserError, match=message):
        backbone("build_dilated_resnet_backbone", 18, *opts)


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvisions_weights(depth, tmp_path):
    """Through the tool and Detectron2's checkpointer, into a model; its maps are torchvision's."""
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(f"resnet{depth}").eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    tool = [sys.executable, str(REPO / "tools" / "convert_torchvision.py")]
    made = tmp_path / "made" / "b.pth"
    subprocess.run([*tool, str(tmp_path / "a.pth"), str(made)], check=True, capture_output=True)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone("build_dilated_resnet_backbone", depth)

    model = Model().eval()
    DetectionCheckpointer(model).load(str(made))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            want = layer(want)
        assert torch.allclose(model.backbone(x)["res5"], want, atol=1e-4)


def test_weights_of_another_network(tmp_path):
    with pytest.raises(UserError, match=r"is called 'features.0.weight'"):
        from_torchvision({"features.0.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"that is no state of torchvision's ResNets"):
        from_torchvision({"fc.bias": torch.zeros(1)})
    (tmp_path / "x.pth").write_bytes(b"no")
    tool = [sys.executable, str(REPO / "tools" / "convert_torchvision.py")]
    done = subprocess.run(
        [*tool, str(tmp_path / "x.pth"), str(tmp_path / "y.pth")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'x.pth'} cannot be")


# ---- data and runs ---------------------------------------------------------------------------


def test_crops_come_after_the_resize(tmp_path):
    cfg = digits_cfg(
        "sem_seg_student", "INPUT.MIN_SIZE_TRAIN", [192], "INPUT.CROP.ENABLED", True,
        "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [64, 96],
    )  # fmt: skip
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(tmp_path / "x.png")
    Image.fromarray(np.ones((96, 96), np.uint8)).save(tmp_path / "y.png")
    record = {"file_name": str(tmp_path / "x.png"), "sem_seg_file_name": str(tmp_path / "y.png")}
    mapped = sem_seg_mapper(cfg)(record)
    assert mapped["image"].shape == (3, 64, 96)
    assert mapped["sem_seg"].shape == (64, 96)


def test_the_digits_pixels_are_their_masks(digits):
    """Against what COCO's own reader makes of the annotations."""
    record = DatasetCatalog.get("digits_sem_seg_val")[5]
    labels = np.asarray(Image.open(record["sem_seg_file_name"]))
    coco = COCO(MetadataCatalog.get("digits_val").json_file)
    want = np.full((96, 96), 10)
    for x in coco.loadAnns(coco.getAnnIds(imgIds=[record["image_id"]])):
        want[coco.annToMask(x) > 0] = x["category_id"] - 1
    assert (labels == want).all()
    assert record["file_name"].endswith(coco.imgs[record["image_id"]]["file_name"])


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """Three images in the folders and under the names of Cityscapes, a quarter of its size."""
    root = tmp_path_factory.mktemp("datasets")
    rng = np.random.default_rng(0)
    for split, city, count in (("train", "bochum", 2), ("val", "ulm", 1)):
        for i in range(count):
            name = f"{city}_00000{i}_000019"
            folders = [root / "cityscapes" / x / split / city for x in ("leftImg8bit", "gtFine")]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            train_ids = rng.choice([*range(19), 255], (8, 16)).repeat(32, 0).repeat(32, 1)
            ids = np.vectorize(lambda x: trainId2label[x].id if x != 255 else 0)(train_ids)
            image = rng.integers(0, 256, (256, 512, 3), np.uint8)
            Image.fromarray(image).save(folders[0] / f"{name}_leftImg8bit.png")
            for kind, x in (("labelTrainIds", train_ids), ("labelIds", ids), ("instanceIds", ids)):
                path = folders[1] / f"{name}_gtFine_{kind}.png"
                Image.fromarray(x.astype(np.uint16 if kind == "instanceIds" else np.uint8)).save(
                    path
                )
            (folders[1] / f"{name}_gtFine_polygons.json").write_text(
                json.dumps({"imgHeight": 256, "imgWidth": 512, "objects": []})
            )
    return root


CONFIGS = sorted((REPO / "configs" / "Cityscapes").glob("*_to_*.yaml"))


def load(path, *opts):
    cfg = get_distill_cfg()
    merge_config(cfg, str(path), ["MODEL.DEVICE", "cpu", *opts], "config file")
    return cfg


SMALL = [
    "MODEL.RESNETS.NORM", "BN", "MODEL.SEM_SEG_HEAD.NORM", "GN", "INPUT.MIN_SIZE_TRAIN", "[128]",
    "INPUT.CROP.SIZE", "[64,128]",
]  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_cityscapes_configs_train_and_evaluate(path, cityscapes, tmp_path):
    """Their real architectures, on small crops, by the command line."""
    teacher = load(path).MODEL.DISTILL.TEACHER.CONFIG_FILE
    torch.manual_seed(0)
    model = build_model(load(REPO / teacher, "MODEL.WEIGHTS", "", *SMALL))
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    done = train_net(
        *("--config-file", path, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
        *("MODEL.DISTILL.TEACHER.WEIGHTS", tmp_path / "teacher.pth", "SOLVER.IMS_PER_BATCH", 2),
        *("MODEL.DISTILL.TEACHER.OPTS", SMALL, "INPUT.MIN_SIZE_TEST", 128),
        *("SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 0, "DATALOADER.NUM_WORKERS", 0),
        *("SOLVER.BASE_LR", 0.0001, *SMALL, "OUTPUT_DIR", tmp_path / "out"),
        root=cityscapes,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[0])
    assert all(np.isfinite(first[f"loss_rcka_{x}"]) for x in ("intra", "inter"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert 0 <= results["cityscapes_fine_sem_seg_val"]["sem_seg"]["IoU"] <= 100
    # An ordinary checkpoint of the student alone.
    state = torch.load(tmp_path / "out" / "model_final.pth", weights_only=False)["model"]
    stock = get_distill_cfg()
    stock.merge_from_file(str(tmp_path / "out" / "student_config.yaml"))
    assert list(build_model(stock).state_dict()) == list(state)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "10"], r"have the value 10, and classes are 0 to 9"),
        (["MODEL.DISTILL.LOSSES", "[FGDLoss]"], r"reads boxes, and SemanticSegmentor has none"),
        (["DATASETS.TRAIN", "[cityscapes_fine_sem_seg_train]"], r"is not there: .*Img8bit/train"),
        (["MODEL.SEM_SEG_HEAD.NORM", "SyncBN"], r"SEM_SEG_HEAD.NORM is SyncBN, .*; set BN or GN"),
        (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "[p9]"], r"cannot be built: .* cannot be empty"),
    ],
)  # fmt: skip
def test_one_line_says_what_to_change(opts, message, teacher_files, tmp_path):
    done = train_net(
        *("--config-file", REPO / "configs" / "Digits" / "sem_seg_pcka.yaml"),
        *("MODEL.DISTILL.TEACHER.WEIGHTS", teacher_files["sem_seg"]),
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", "configs/Digits/sem_seg_student.yaml"),
        *("OUTPUT_DIR", tmp_path / "out", *opts),
    )
    assert_one_line(done, message)


def test_labels_beyond_the_classes(tmp_path):
    record = {"file_name": "x.png", "sem_seg_file_name": str(tmp_path / "y.png")}
    Image.fromarray(np.array([[0, 4, 255]], np.uint8)).save(tmp_path / "y.png")
    check_labels([record], 5, 255)
    with pytest.raises(UserError, match=r"y.png have the value 4, and classes are 0 to 3, .* 255"):
        check_labels([record], 4, 255)
    with pytest.raises(UserError, match=r"have the value 255"):
        check_labels([record], 5, 100)
    with pytest.raises(UserError, match=r"x.png has no labels of its pixels"):
        check_labels([{"file_name": "x.png"}], 5, 255)
    (tmp_path / "y.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"y.png cannot be read"):
        check_labels([record], 5, 255)


def test_a_teacher_of_other_crops(storage):
    """DeepLab pools over the crops of its own config."""
    crops = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE"]
    teacher = FrozenTeacher(segmentor("v3", *crops, [80, 80]))
    model = DistillationModel(student=segmentor("fpn"), teacher=teacher, losses=[KDLoss()])
    with pytest.raises(UserError, match=r"cannot take images of \(96, 96\) .* INPUT.CROP alike"):
        model(make_batch())


def test_cityscapes_needs_its_scripts(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "cityscapesscripts" else found(name, *a),
    )
    with pytest.raises(UserError, match="pip install cityscapesscripts"):
        _evaluator_type("cityscapes_fine_sem_seg_val")
