"""Image classification: networks, data, the paper's whole RCKA, runs from the command line."""

import json
import os
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import REPO, assert_one_line, digits_cfg, train_net
from PIL import Image
from sklearn.datasets import load_digits

from pcka_distill import (
    DISTILL_LOSS_REGISTRY,
    DistillationModel,
    FCKALoss,
    FrozenTeacher,
    ImageClassifier,
    MimicLoss,
    RCKALoss,
    UserError,
    get_distill_cfg,
    load_teacher_weights,
    register_classification,
    register_image_folder,
)
from pcka_distill.build import class_names, merge_config
from pcka_distill.checkpoint import StrictCheckpointer
from pcka_distill.cifar import CIFAR_NETS
from pcka_distill.classifier import ClassifierNet, build_net
from pcka_distill.data.classification import (
    AUGMENTATIONS,
    ClassificationEvaluator,
    ClassificationMapper,
)
from pcka_distill.engine import Trainer, _check_classes

PAIRS = sorted(
    p for x in ("CIFAR-100", "ImageNet") for p in (REPO / "configs" / x).glob("*_rcka.yaml")
)


def load(path, *opts):
    cfg = get_distill_cfg()
    merge_config(cfg, str(path), ["MODEL.DEVICE", "cpu", *opts], "config file")
    return cfg


def classifier(name="cifar/resnet8", classes=10, size=8, seed=0):
    torch.manual_seed(seed)
    return ImageClassifier(
        net=build_net(name, classes), num_classes=classes, image_size=size,
        pixel_mean=[80.0] * 3, pixel_std=[96.0] * 3,
    )  # fmt: skip


def images(count=6, size=8, classes=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randint(0, 256, (3, size, size), generator=g, dtype=torch.uint8),
            "label": int(torch.randint(0, classes, (1,), generator=g)),
            "image_id": i,
        }
        for i in range(count)
    ]


def step(model, batch):
    with EventStorage(0):
        return model(batch)


# ---- networks --------------------------------------------------------------------------------

# Millions of parameters for 100 classes, as papers in that setting list them.
SIZES = {
    "resnet8x4": 1.23, "resnet32x4": 7.43, "resnet20": 0.28, "resnet32": 0.47, "resnet56": 0.86,
    "resnet110": 1.74, "wrn_16_2": 0.70, "wrn_40_1": 0.57, "wrn_40_2": 2.26, "vgg8": 3.97,
    "vgg13": 9.46, "shufflenet_v1": 0.95, "mobilenet_v2": 0.81,
}  # fmt: skip


@pytest.mark.parametrize("name", CIFAR_NETS)
def test_networks_of_cifar(name):
    net = CIFAR_NETS[name](100).eval()
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert count == pytest.approx(SIZES.get(name, count), abs=0.0051)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert net(x).shape == (2, 100)
        # Each image for itself.
        one, both = net(x[:1]), net(x)[:1]
        assert (one - both).norm() < 1e-4 * both.norm()


@pytest.mark.parametrize(
    ("name", "size", "want"),
    [
        ("torchvision/resnet18", 64, {4: ("layer1", 64), 8: ("layer2", 128), 32: ("layer4", 512)}),
        ("torchvision/mobilenet_v2", 64, {4: ("features.3", 24), 32: ("features", 1280)}),
        (
            "timm/mobilenetv1_100",
            64,
            {2: ("blocks.0", 64), 8: ("blocks.2", 256), 16: ("blocks.3", 512)},
        ),
        ("cifar/wrn_16_2", 32, {1: ("stages.0", 32), 2: ("stages.1", 64), 4: ("stages", 128)}),
        ("cifar/resnet8", 32, {1: ("stages.0", 16), 2: ("stages.1", 32), 4: ("stages", 64)}),
        ("torchvision/vgg11_bn", 128, {16: ("features.28", 512)}),
        ("cifar/vgg13", 32, {1: ("stages.0", 64), 4: ("stages.2", 256), 8: ("stages", 512)}),
        ("torchvision/vit_b_16", 224, {16: ("conv_proj", 768)}),
        ("timm/swin_tiny_patch4_window7_224", 224, {}),
    ],
)
def test_levels_are_found_in_any_network(name, size, want):
    """And are what the named module gives; what is found is called by its stride."""
    net = build_net(name, 10).eval()
    seen = {}
    for module, _ in want.values():
        net.get_submodule(module).register_forward_hook(
            lambda m, a, x, module=module: seen.update({module: x})
        )
    whole = ClassifierNet(net, size)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        out = whole(x)
        assert torch.equal(out["logits"], net(x))
    shapes = whole.output_shape()
    for stride, (_, channels) in want.items():
        level = f"stride{stride}"
        assert (shapes[level].stride, shapes[level].channels) == (stride, channels)
        assert out[level].shape == (1, channels, size // stride, size // stride)
    if "swin" in name:
        # Its maps have their channels last; its attention is square and no map.
        assert not shapes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar/resnet21", r"of cifar/ there are resnet8, "),
        ("torchvision/resnet19", r"cannot be built: Unknown model resnet19"),
        ("timm/nothing", r"cannot be built: .*nothing"),
        ("resnet18", r"write cifar/, torchvision/ or timm/"),
        ("", r"write cifar/, torchvision/ or timm/"),
    ],
)
def test_networks_that_are_not_known(name, message):
    with pytest.raises(UserError, match=message):
        build_net(name, 10)


def test_a_size_that_a_network_cannot_take():
    with pytest.raises(UserError, match=r"cannot take images of 8 x 8: .*IMAGE_SIZE or NAME"):
        ClassifierNet(build_net("torchvision/vit_b_16", 10), 8)


def test_a_library_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm; install it"):
        build_net("timm/mobilenetv1_100", 10)


def test_a_module_that_is_used_at_several_strides():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.b = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1)
            self.relu = torch.nn.ReLU()

        def forward(self, x):
            return self.relu(self.b(self.relu(self.a(x)))).mean((-2, -1))

    net = ClassifierNet(Net(), 16)
    out = net(torch.randn(2, 3, 16, 16))
    assert {k: tuple(x.shape[1:]) for k, x in out.items() if k != "logits"} == {
        "stride2": (8, 8, 8), "stride4": (16, 4, 4)
    }  # fmt: skip
    assert {k: x.channels for k, x in net.output_shape().items()} == {"stride2": 8, "stride4": 16}


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_auxiliary_classifiers_are_refused():
    net = ClassifierNet(build_net("torchvision/googlenet", 10), 64).train()
    with pytest.raises(UserError, match=r"GoogLeNet has auxiliary classifiers"):
        net(torch.randn(2, 3, 64, 64))


# ---- the model -------------------------------------------------------------------------------


def test_losses_and_scores_by_hand():
    model = classifier()
    batch = images()
    x = torch.stack([(z["image"].float() - 80) / 96 for z in batch])
    labels = torch.tensor([z["label"] for z in batch])
    net = classifier().backbone.net
    assert torch.allclose(step(model, batch)["loss_cls"], F.cross_entropy(net(x), labels))
    model.eval()
    net.load_state_dict(model.backbone.net.state_dict())
    with torch.no_grad():
        got = torch.stack([y["scores"] for y in model(batch)])
        assert torch.allclose(got, net.eval()(x).softmax(-1), atol=1e-6)


def test_images_of_several_sizes_are_refused():
    batch = [*images(2), *images(1, size=10)]
    with pytest.raises(UserError, match=r"a batch has \[\(8, 8\), \(10, 10\)\]"):
        classifier()(batch)


def cka(x, y):
    """By its definition, with Grams."""
    x, y = (z.reshape(len(z), -1).double().numpy() for z in (x, y))
    h = np.eye(len(x)) - 1 / len(x)
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


def test_the_papers_whole_loss_by_hand():
    """CE + FCKA + intra-LCKA + inter-LCKA, of a student and a teacher of other widths."""
    teacher = classifier("cifar/wrn_16_2", seed=1)
    losses = [FCKALoss(levels=["stride4"]), RCKALoss()]
    model = DistillationModel(student=classifier(), teacher=FrozenTeacher(teacher), losses=losses)
    batch = images(12)
    got = step(model, batch)
    plain = classifier()
    x = plain.preprocess_image(batch).tensor
    mine = {k: v.detach() for k, v in plain.backbone(x).items()}
    with torch.no_grad():
        theirs = teacher.backbone(x)
    labels = torch.tensor([z["label"] for z in batch])
    want = {
        "loss_cls": F.cross_entropy(mine["logits"], labels).item(),
        "loss_fcka_stride4": 1 - cka(mine["stride4"], theirs["stride4"]),
        "loss_rcka_intra": 1 - cka(mine["logits"], theirs["logits"]),
        "loss_rcka_inter": 1 - cka(mine["logits"].T, theirs["logits"].T),
    }
    assert {k: v.item() for k, v in got.items()} == pytest.approx(want, abs=1e-5)
    sum(got.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    "name", sorted(k for k, x in DISTILL_LOSS_REGISTRY if "boxes" not in x.reads)
)
def test_every_loss_teaches_a_classifier(name):
    torch.manual_seed(0)
    loss = DISTILL_LOSS_REGISTRY.get(name)
    options = {"levels": ["stride2", "stride4"]} if hasattr(loss, "project") else {}
    if name == "PCKALoss":
        options["patch_size"] = 1
    loss = loss(**options)
    teacher = FrozenTeacher(classifier("cifar/resnet14", seed=1))
    model = DistillationModel(student=classifier(), teacher=teacher, losses=[loss])
    batch = images(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(20):
        out = step(model, batch)
        total = sum(v for k, v in out.items() if k != "loss_cls")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert sum(history[-3:]) < 0.9 * sum(history[:3]), history


def test_one_forward_of_the_teacher_and_none_of_its_head_again():
    teacher = classifier(seed=1)
    calls = []
    teacher.backbone.net.fc.register_forward_hook(lambda *a: calls.append(1))
    losses = [FCKALoss(levels=["stride4"]), RCKALoss()]
    model = DistillationModel(student=classifier(), teacher=FrozenTeacher(teacher), losses=losses)
    calls.clear()
    step(model, images())
    assert len(calls) == 1


def test_checkpoints_are_those_of_the_network(tmp_path):
    """torchvision's file loads into a student that is taught, and what it saves loads there."""
    theirs = torchvision.models.resnet18(num_classes=10)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    student = classifier("torchvision/resnet18", size=64)
    teacher = FrozenTeacher(classifier(size=64, seed=1))
    model = DistillationModel(student=student, teacher=teacher, losses=[RCKALoss()])
    DetectionCheckpointer(model).load(str(tmp_path / "theirs.pth"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(theirs.state_dict().values(), student.backbone.net.state_dict().values())
    )
    DetectionCheckpointer(model, str(tmp_path)).save("ours")
    state = torch.load(tmp_path / "ours.pth", weights_only=False)["model"]
    assert list(state) == list(theirs.state_dict())
    torchvision.models.resnet18(num_classes=10).load_state_dict(state)


def test_a_checkpoint_of_other_classes(tmp_path):
    """What fits is loaded, the rest is named; of a teacher it is refused."""
    theirs = torchvision.models.resnet18(num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    model = classifier("torchvision/resnet18", size=64)
    checkpointer = StrictCheckpointer(model)
    checkpointer.load(str(tmp_path / "x.pth"))
    shapes, missing, unexpected = checkpointer.mismatch
    assert [k for k, _, _ in shapes] == ["fc.weight", "fc.bias"]
    assert missing == unexpected == []
    assert torch.equal(model.backbone.net.conv1.weight, theirs.conv1.weight)
    with pytest.raises(UserError, match=r"do not fit its config: .*fc\.bias"):
        load_teacher_weights(model, str(tmp_path / "x.pth"))


def test_a_teacher_of_another_image_size():
    teacher = FrozenTeacher(classifier("timm/vit_tiny_patch16_224", size=224, seed=1))
    model = DistillationModel(student=classifier(), teacher=teacher, losses=[RCKALoss()])
    with pytest.raises(UserError, match=r"made for images of 224 pixels and cannot .*\(8, 8\)"):
        step(model, images())


def test_a_student_with_adapters_becomes_a_teacher(tmp_path):
    teacher = FrozenTeacher(classifier(seed=1))
    model = DistillationModel(student=classifier(), teacher=teacher, losses=[MimicLoss()])
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    assert any(k.startswith("distill.") for k in model.state_dict())
    other = classifier(seed=2)
    load_teacher_weights(other, str(tmp_path / "x.pth"))
    assert torch.equal(other.backbone.net.fc.weight, model.student.backbone.net.fc.weight)


def test_classes_are_paired_by_the_names_of_folders(tmp_path):
    for side, kinds in (("mine", "abc"), ("theirs", "bcd")):
        for kind in kinds:
            (tmp_path / side / kind).mkdir(parents=True)
        register_image_folder(f"{side}_folder", tmp_path / side)
    assert class_names(["mine_folder"], "classes") == ["a", "b", "c"]
    assert class_names(["theirs_folder"], "classes") == ["b", "c", "d"]
    register_image_folder("gone_folder", tmp_path / "gone")
    assert class_names(["gone_folder"], "classes") is None


def test_datasets_of_other_classes_are_refused(tmp_path):
    for name, kinds in (("train", ("cat", "dog")), ("val", ("cats", "dog"))):
        register_image_folder(f"other_{name}", tmp_path)
        MetadataCatalog.get(f"other_{name}").set(classes=list(kinds))
    with pytest.raises(
        UserError, match=r"'other_train' and 'other_val' .* \('cat' where .* 'cats'\)"
    ):
        _check_classes(["other_train", "other_val"], classifier(classes=2))


def test_cifars_files(datasets, monkeypatch):
    """torchvision compares them to the published ones; these are of noise."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    register_classification(str(datasets))
    try:
        assert class_names(["cifar100_test"], "classes")[:2] == ["class 0", "class 1"]
        records = DatasetCatalog.get("cifar100_train")
        raw = pickle.loads((datasets / "cifar-100-python" / "train").read_bytes())
        for i in (0, 79):
            assert records[i]["label"] == raw["fine_labels"][i]
            want = raw["data"][i].reshape(3, 32, 32)
            assert (records[i]["image"].transpose(2, 0, 1) == want).all()
    finally:
        register_classification(os.environ["DETECTRON2_DATASETS"])


def test_copies_are_independent():
    model = classifier()
    other = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    batch = images()
    assert not torch.equal(step(model, batch)["loss_cls"], step(other, batch)["loss_cls"])
    assert list(other.state_dict()) == list(model.state_dict())


# ---- data ------------------------------------------------------------------------------------


def test_scans_are_scikit_learns():
    records = {x: DatasetCatalog.get(f"digit_scans_{x}") for x in ("train", "val", "test")}
    assert [len(x) for x in records.values()] == [1258, 269, 270]
    every = sorted(
        (x["image"][..., 0].tobytes(), x["label"]) for part in records.values() for x in part
    )
    scans = load_digits()
    want = (np.asarray(scans.images) * (255 / 16)).round().astype(np.uint8)
    assert every == sorted((x.tobytes(), int(y)) for x, y in zip(want, scans.target))
    few = DatasetCatalog.get("digit_scans_train_100")
    assert np.bincount([x["label"] for x in few]).tolist() == [10] * 10
    known = {x["image"].tobytes() for x in records["train"]}
    assert all(x["image"].tobytes() in known for x in few)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_mapper(augmentation, training, image_format, tmp_path):
    """A picture that is red on all of it stays red, whatever part of it is shown."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 0] = 200
    Image.fromarray(pixels).save(tmp_path / "x.png")
    mapper = ClassificationMapper(16, augmentation, image_format, training=training)
    for record in ({"image": pixels}, {"file_name": str(tmp_path / "x.png")}):
        mapped = mapper({**record, "label": 3})
        assert mapped["image"].shape == (3, 16, 16)
        assert mapped["image"].dtype == torch.uint8
        assert mapped["label"] == 3
        red = mapped["image"][0 if image_format == "RGB" else 2]
        assert red.max() == 200
        if (augmentation, training) != ("padded_crop", True):
            assert (red == 200).all()
        others = mapped["image"][1:] if image_format == "RGB" else mapped["image"][:2]
        assert (others == 0).all()


def test_what_is_evaluated_is_the_centre():
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 16:48] = 255
    mapper = ClassificationMapper(28, "resized_crop", "RGB", training=False)
    assert (mapper({"image": pixels})["image"] == 255).all()


def test_an_augmentation_that_is_not_known():
    with pytest.raises(UserError, match=r"AUGMENTATION 'flip', expected resized_crop, padded_crop"):
        ClassificationMapper(8, "flip", "RGB", training=True)


def test_evaluator_by_hand():
    scores = torch.tensor(
        [
            [9, 0, 0, 0, 0, 0, 0.0],
            [1, 2, 3, 4, 5, 6, 7],
            [1, 2, 3, 4, 5, 6, 7],
            [5, 1, 1, 1, 1, 1, 4],
        ]
    )
    labels = [0, 2, 1, 6]
    evaluator = ClassificationEvaluator(distributed=False)
    for x, label in zip(scores, labels):
        evaluator.process([{"label": label}], [{"scores": x}])
    assert evaluator.evaluate() == {"classification": {"top1": 25.0, "top5": 75.0}}
    evaluator.reset()
    assert evaluator.evaluate() == {"classification": {"top1": 0.0, "top5": 0.0}}


def test_folders_of_ones_own(tmp_path):
    register_image_folder("no_folder", tmp_path / "no")
    with pytest.raises(UserError, match=r"there is no folder .*folder/CLASS/IMAGE"):
        DatasetCatalog.get("no_folder")
    for kind, count in (("b", 2), ("a", 1)):
        (tmp_path / kind).mkdir()
        for i in range(count):
            Image.new("RGB", (5, 5)).save(tmp_path / kind / f"{i}.png")
    register_image_folder("own_folder", tmp_path)
    records = DatasetCatalog.get("own_folder")
    assert [(x["label"], x["image_id"]) for x in records] == [(0, 0), (1, 1), (1, 2)]
    assert MetadataCatalog.get("own_folder").classes == ["a", "b"]
    (tmp_path / "c").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    register_classification(str(other))
    try:
        assert MetadataCatalog.get("imagenet_val").image_root == str(other / "imagenet" / "val")
    finally:
        register_classification(os.environ["DETECTRON2_DATASETS"])
    other.rmdir()
    with pytest.raises(UserError, match=r"c has no images"):
        DatasetCatalog.get("own_folder")


# ---- runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """CIFAR-100's files and ImageNet's folders, with a few images of noise."""
    root = tmp_path_factory.mktemp("datasets")
    rng = np.random.default_rng(0)
    folder = root / "cifar-100-python"
    folder.mkdir()
    names = [f"class {i}" for i in range(100)]
    for split in ("train", "test"):
        data = rng.integers(0, 256, (80, 3072), np.uint8)
        labels = rng.integers(0, 100, 80).tolist()
        (folder / split).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    for split in ("train", "val"):
        for i in range(1000):
            kind = root / "imagenet" / split / f"n{i:08d}"
            kind.mkdir(parents=True)
            if i < 4:
                pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
                Image.fromarray(pixels).save(kind / "x.jpg")
            else:
                (kind / "x.jpg").symlink_to(root / "imagenet" / split / "n00000000" / "x.jpg")
    return root


def test_pairs_of_the_papers_table():
    assert len([p for p in PAIRS if p.parent.name == "CIFAR-100"]) == 9
    assert len([p for p in PAIRS if p.parent.name == "ImageNet"]) == 2


@pytest.mark.parametrize("path", PAIRS, ids=lambda p: p.stem)
def test_pairs_build_and_step(path):
    """With their own teacher's weights in the files that they name."""
    cfg = load(path)
    size = 64 if path.parent.name == "ImageNet" else 32
    opts = ["MODEL.CLASSIFIER.IMAGE_SIZE", size]
    student = build_model(load(path, "MODEL.META_ARCHITECTURE", "ImageClassifier", *opts))
    teacher = build_model(load(REPO / cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE, *opts))
    losses = [FCKALoss(levels=cfg.MODEL.DISTILL.FCKA.LEVELS), RCKALoss()]
    model = DistillationModel(student=student, teacher=FrozenTeacher(teacher), losses=losses)
    out = step(model, images(4, size, cfg.MODEL.CLASSIFIER.NUM_CLASSES))
    assert all(torch.isfinite(x) for x in out.values())
    assert len(out) == 4
    assert tuple(cfg.MODEL.DISTILL.LOSSES) == ("FCKALoss", "RCKALoss")


@pytest.mark.parametrize(
    "name", ["CIFAR-100/resnet56_to_resnet20", "ImageNet/resnet34_to_resnet18"]
)
def test_runs_on_the_layouts_of_the_datasets(name, datasets, tmp_path):
    """From the command line. torchvision compares CIFAR's files to the published ones."""
    path = REPO / "configs" / f"{name}_rcka.yaml"
    torch.manual_seed(0)
    teacher = build_model(load(REPO / load(path).MODEL.DISTILL.TEACHER.CONFIG_FILE))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    opts = ("DATASETS.TEST", "()") if "ImageNet" in name else ()
    if "CIFAR" in name:
        done = train_net("--config-file", path, "MODEL.DEVICE", "cpu", root=datasets)
        assert done.returncode == 1
        assert "CIFAR-100 is not in" in done.stderr.strip().splitlines()[-1]
        return
    done = train_net(
        "--config-file", path, "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH",
        4, "MODEL.DISTILL.TEACHER.WEIGHTS", tmp_path / "teacher.pth", "MODEL.CLASSIFIER.IMAGE_SIZE",
        64, "DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 0, "OUTPUT_DIR", tmp_path / "out",
        *opts, root=datasets,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[0])
    assert np.isfinite(first["total_loss"])


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("teacher") / "x.pth"
    torch.save({"model": build_model(digits_cfg("classifier_teacher")).state_dict()}, path)
    return path


def test_the_digits_config_trains_resumes_and_evaluates(teacher_file, tmp_path):
    config = ["--config-file", REPO / "configs" / "Digits" / "classifier_rcka.yaml"]
    config += ["MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file, "SOLVER.CHECKPOINT_PERIOD", 3]
    opts = [*config, "SOLVER.MAX_ITER", 6]
    assert train_net(*opts, "OUTPUT_DIR", tmp_path / "a").returncode == 0
    b = tmp_path / "b"
    b.mkdir()
    (b / "model_0000002.pth").write_bytes((tmp_path / "a" / "model_0000002.pth").read_bytes())
    (b / "last_checkpoint").write_text("model_0000002.pth")
    done = train_net(*opts[:2], "--resume", *opts[2:], "OUTPUT_DIR", b)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = (
        torch.load(tmp_path / x / "model_final.pth", weights_only=False)["model"] for x in "ab"
    )
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    results = json.loads((b / "results.json").read_text())["results"]
    # An ordinary student: stock config, no teacher.
    done = train_net(
        "--config-file", b / "student_config.yaml", "--eval-only", "MODEL.WEIGHTS",
        b / "model_final.pth", "OUTPUT_DIR", tmp_path / "e",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["results"] == results


def test_images_are_evaluated_in_batches():
    """Of IMS_PER_BATCH, with the result of one at a time."""
    opts = ["SOLVER.IMS_PER_BATCH", 100, "DATASETS.TEST", ("digit_scans_test",)]
    cfg = digits_cfg("classifier_student", *opts)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    sizes = []
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    results = Trainer.test(cfg, model)["classification"]
    handle.remove()
    records = DatasetCatalog.get("digit_scans_test")
    assert sum(sizes) == len(records) and set(sizes[:-1]) == {100}
    mapper = ClassificationMapper.of(cfg, training=False)
    with torch.no_grad():
        best = [int(model([mapper(x)])[0]["scores"].argmax()) for x in records]
    right = sum(k == x["label"] for k, x in zip(best, records))
    assert results["top1"] == pytest.approx(100 * right / len(records), abs=0.5)


def test_weight_zero_is_the_student_alone(teacher_file, tmp_path):
    zero = ["MODEL.DISTILL.RCKA.WEIGHT", 0.0, "MODEL.DISTILL.FCKA.WEIGHT", 0.0]
    zero += ["MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file]
    states = []
    for name, more in (("student", []), ("rcka", zero)):
        done = train_net(
            "--config-file", REPO / "configs" / "Digits" / f"classifier_{name}.yaml",
            "SOLVER.MAX_ITER", 4, "DATASETS.TEST", "()", *more, "OUTPUT_DIR", tmp_path / name,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        states.append(torch.load(tmp_path / name / "model_final.pth", weights_only=False)["model"])
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.CLASSIFIER.NUM_CLASSES", "7"], r"dataset names 10 classes, and its head has 7"),
        (["MODEL.CLASSIFIER.NAME", "cifar/x"], r"of cifar/ there are"),
        (["DATASETS.TRAIN", "[imagenet_train]"], r"is not there: .*imagenet/train"),
        (["DATASETS.TRAIN", "[cifar100_train]"], r"CIFAR-100 is not in .*download=True"),
        (["MODEL.DISTILL.FCKA.LEVELS", "[res5]"], r"unknown level 'res5': student has stride1"),
        (["MODEL.DISTILL.LOSSES", "[FGDLoss]"], r"FGDLoss reads boxes, and Image"),
        (["SOLVER.IMS_PER_BATCH", "2"], r"the CKA of fewer than 3 images is constant"),
        (["MODEL.CLASSIFIER.IMAGE_SIZE", "16"], r"an image has 8 x 8 pixels and .* is 16"),
        (["DATASETS.TRAIN", "[digits_train]"], r"'digits_train' is of type coco, and the model is"),
        (["DATASETS.TEST", "[digits_val]"], r"'digits_val' is of type coco, and the model is"),
    ],
)  # fmt: skip
def test_one_line_says_what_to_change(opts, message, teacher_file, tmp_path):
    done = train_net(
        "--config-file", REPO / "configs" / "Digits" / "classifier_rcka.yaml",
        "MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file, "OUTPUT_DIR", tmp_path, *opts,
        root=tmp_path / "empty",
    )  # fmt: skip
    assert_one_line(done, message)
