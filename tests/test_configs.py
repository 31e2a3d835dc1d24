"""Every shipped yaml, and the COCO ones with their real architectures on COCO's real layout."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from helpers import REPO
from PIL import Image

from pcka_distill import DistillationModel, UserError, get_distill_cfg, student_config
from pcka_distill.build import _find_config, build_losses, merge_config

CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))
RUNNABLE = [p for p in CONFIGS if not p.name.startswith("Base")]


def load(path, *opts):
    cfg = get_distill_cfg()
    merge_config(cfg, str(path), ["MODEL.DEVICE", "cpu", *opts], "config file")
    return cfg


def name(path):
    return str(path.relative_to(REPO / "configs"))


def test_values_as_people_write_them(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "MODEL:\n  DISTILL:\n    LOSSES: PCKALoss\n    PCKA:\n      WEIGHT: 5\n"
        "      PATCH_SIZE: 4\n      LEVELS: [p3]\n"
    )
    node = load(path).MODEL.DISTILL
    assert (tuple(node.LOSSES), node.PCKA.WEIGHT) == (("PCKALoss",), 5.0)
    assert tuple(node.PCKA.PATCH_SIZE) == (4,)
    opts = {
        "MODEL.DISTILL.PCKA.WEIGHT": "0", "MODEL.DISTILL.LOSSES": "[PCKALoss, RCKALoss]",
        "MODEL.DISTILL.PCKA.LEVELS": "['p4','p5']", "SOLVER.STEPS": "(3, 4)",
        "MODEL.DISTILL.PCKA.PATCH_SIZE": "8", "SOLVER.BASE_LR": "1e-3", "DATASETS.TEST": "()",
    }  # fmt: skip
    cfg = load(path, *(x for pair in opts.items() for x in pair))
    assert cfg.MODEL.DISTILL.PCKA.WEIGHT == 0.0
    assert tuple(cfg.MODEL.DISTILL.LOSSES) == ("PCKALoss", "RCKALoss")
    assert tuple(cfg.MODEL.DISTILL.PCKA.LEVELS) == ("p4", "p5")
    assert tuple(cfg.MODEL.DISTILL.PCKA.PATCH_SIZE) == (8,)
    assert tuple(cfg.SOLVER.STEPS) == (3, 4)
    assert cfg.SOLVER.BASE_LR == 1e-3
    assert tuple(cfg.DATASETS.TEST) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL:\n  DISTILL:\n    PKCA:\n      WEIGHT: 1.0\n", "did you mean MODEL.DISTILL.PCKA?"),
        ("MODEL:\n  MASK_ON: [1\n", "line 3, column 1"),
        ("MODEL:\n  MASK_ON: 3.5\n", "Type mismatch"),
        ("", "it holds no keys"),
        ("- a list", "it holds no keys"),
    ],
)
def test_yamls_that_cannot_be_used(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as e:
        load(tmp_path / "x.yaml")
    assert "\n" not in str(e.value)


def test_configs_are_merged_as_detectron2_merges_them(tmp_path):
    """What is more forgiving is not different."""
    zoo = Path(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")).parents[1]
    old = tmp_path / "old.yaml"
    old.write_text("MODEL:\n  WEIGHT: of version 1\n")
    for path in (*CONFIGS, *sorted(zoo.rglob("*.yaml")), old):
        ours, theirs = load(path), get_distill_cfg()
        theirs.merge_from_file(str(path))
        theirs.MODEL.DEVICE = "cpu"
        assert ours.dump() == theirs.dump()


def test_a_teachers_config_beside_the_yaml(tmp_path):
    (tmp_path / "teacher.yaml").write_text("VERSION: 2\n")
    path = tmp_path / "x.yaml"
    path.write_text("MODEL:\n  DISTILL:\n    TEACHER:\n      CONFIG_FILE: teacher.yaml\n")
    assert str(tmp_path / "teacher.yaml") == load(path).MODEL.DISTILL.TEACHER.CONFIG_FILE
    opts = ["MODEL.DISTILL.TEACHER.CONFIG_FILE", "elsewhere.yaml"]
    assert load(path, *opts).MODEL.DISTILL.TEACHER.CONFIG_FILE == "elsewhere.yaml"


@pytest.fixture
def no_weights(monkeypatch):
    """Teachers keep their random weights; that weights are checked is tested elsewhere."""
    monkeypatch.setattr("pcka_distill.build.load_teacher_weights", lambda *_, **__: 0)


# Those for COCO are built, and run, below.
@pytest.mark.parametrize("path", [p for p in RUNNABLE if "COCO" not in str(p)], ids=name)
def test_every_yaml_builds(path, no_weights):
    cfg = load(path)
    model = build_model(cfg)
    assert isinstance(model, DistillationModel) == (
        cfg.MODEL.META_ARCHITECTURE == "DistillationModel"
    )


@pytest.mark.parametrize("path", RUNNABLE, ids=name)
def test_every_run_has_its_own_folder(path):
    folders = [load(p).OUTPUT_DIR for p in RUNNABLE]
    assert folders.count(load(path).OUTPUT_DIR) == 1


# The plain students are Detectron2's own, but for the schedule.
TWINS = {
    "faster_rcnn_R_50_FPN_2x": "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    "retinanet_R_50_FPN_2x": "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
}


def like(ours, theirs):
    """Of a config what another one has."""
    kept = CfgNode({k: v for k, v in ours.items() if k in theirs})
    for key, value in kept.items():
        if isinstance(value, CfgNode):
            kept[key] = like(value, theirs[key])
    return kept


@pytest.mark.parametrize("ours", TWINS)
def test_coco_students_are_the_model_zoos(ours):
    mine = load(REPO / "configs" / "COCO-Detection" / f"{ours}.yaml")
    theirs = model_zoo.get_config(TWINS[ours])
    theirs.MODEL.DEVICE = "cpu"
    mine = like(student_config(mine).MODEL, theirs.MODEL)
    # Of two ways to write one number, one is rounded.
    sizes = [cfg.ANCHOR_GENERATOR.pop("SIZES") for cfg in (mine, theirs.MODEL)]
    for a, b in zip(*sizes):
        np.testing.assert_allclose(a, b, rtol=0.01)
    # Mask heads are configured there and not switched on.
    for cfg in (mine, theirs.MODEL):
        cfg.pop("ROI_MASK_HEAD")
    assert json.loads(json.dumps(mine)) == json.loads(json.dumps(theirs.MODEL))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Six images in COCO 2017's layout, with its categories, people and a sparse category id."""
    root = tmp_path_factory.mktemp("datasets")
    rng = np.random.default_rng(0)
    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    (root / "coco" / "annotations").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2)):
        folder = root / "coco" / f"{split}2017"
        folder.mkdir()
        images, annotations = [], []
        for i in range(count):
            h, w = ((120, 160), (160, 120))[i % 2]
            pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:012d}.jpg")
            images.append({"id": i, "file_name": f"{i:012d}.jpg", "height": h, "width": w})
            for category in (1, 90):
                x, y, bw, bh = 10.0 + 20 * i, 12.0, 60.0, 70.0
                polygon = [x, y, x + bw, y, x + bw, y + bh, x, y + bh]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": category,
                     "bbox": [x, y, bw, bh], "area": bw * bh, "iscrowd": 0,
                     "segmentation": [polygon]}
                )  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": things}
        path = root / "coco" / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content))
    return root


COMMON = [
    "MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "[]",
    "SOLVER.BASE_LR", "1e-5", "DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TRAIN", "[256]",
    "INPUT.MAX_SIZE_TRAIN", "341", "INPUT.MIN_SIZE_TEST", "256", "INPUT.MAX_SIZE_TEST", "341",
]  # fmt: skip


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory):
    """Config of a teacher -> a checkpoint of random weights, made once."""
    folder = tmp_path_factory.mktemp("coco_teachers")
    made = {}

    def make(config):
        if config not in made:
            cfg = get_distill_cfg()
            cfg.merge_from_file(_find_config(config)[0])
            cfg.MODEL.DEVICE = "cpu"
            torch.manual_seed(0)
            state = {k: v.half() if v.is_floating_point() else v
                     for k, v in build_model(cfg).state_dict().items()}  # fmt: skip
            made[config] = str(folder / f"{len(made)}.pth")
            torch.save({"model": state}, made[config])
        return made[config]

    return make


def terms(cfg):
    """What the losses of a config add to the log."""
    levels = cfg.MODEL.DISTILL.PCKA.LEVELS
    per_loss = {
        "PCKALoss": [f"loss_pcka_{level}: " for level in levels],
        "MimicLoss": [f"loss_mimic_{level}: " for level in levels],
        "RCKALoss": ["loss_rcka_intra: ", "loss_rcka_inter: "],
    }
    return [x for loss in cfg.MODEL.DISTILL.LOSSES for x in per_loss[loss]]


@pytest.mark.parametrize(
    "path", [p for p in RUNNABLE if "COCO" in str(p) and "_to_" in p.name], ids=name
)
def test_the_patches_of_coco_configs_fit(path):
    """At their own size: the runs below are of small images and set other patches."""
    cfg = load(path)
    side = min(cfg.INPUT.MIN_SIZE_TRAIN)
    pcka = next(x for x in build_losses(cfg) if x.name == "pcka")
    shapes = {k: (2, 256, *[-(-side // 2 ** int(k[1:]))] * 2) for k in pcka.levels}
    assert len(shapes) == 4
    notes = pcka.check_maps(shapes)
    assert list(notes) == list(shapes)


def test_fcos_is_the_model_zoos():
    """The builder's model, against Detectron2's own LazyConfig."""
    mine = build_model(load(REPO / "configs" / "COCO-Detection" / "fcos_R_50_FPN_2x.yaml"))
    theirs = instantiate(model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (mine, theirs)]
    assert shapes[0] == shapes[1]
    for key in (
        "num_classes", "center_sampling_radius", "focal_loss_alpha", "focal_loss_gamma",
        "test_score_thresh", "test_topk_candidates", "test_nms_thresh",
        "max_detections_per_image", "head_in_features",
    ):  # fmt: skip
        assert getattr(mine, key) == getattr(theirs, key), key
    assert str(mine) == str(theirs)
    assert torch.equal(mine.pixel_mean, theirs.pixel_mean)


# These are evaluated, too; that costs as much again.
EVALUATED = [f"{f}_{n}" for f in ("faster_rcnn", "retinanet")
             for n in ("R_101_to_R_50_pcka_2x", "R_50_FPN_2x")]  # fmt: skip


@pytest.mark.parametrize("path", [p for p in RUNNABLE if "COCO" in str(p)], ids=name)
def test_coco_configs_train_and_evaluate(path, coco, teacher_weights, tmp_path):
    """At their real size, through the command line, on small images."""
    cfg = load(path)
    opts = [*COMMON, "OUTPUT_DIR", str(tmp_path / "out")]
    evaluated = path.stem in EVALUATED
    if not evaluated:
        opts += ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1"]
    if cfg.MODEL.DISTILL.LOSSES:
        weights = teacher_weights(cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE)
        opts += ["MODEL.DISTILL.TEACHER.WEIGHTS", weights, "MODEL.DISTILL.PCKA.PATCH_SIZE", "[2]"]
    done = subprocess.run(
        [sys.executable, str(REPO / "tools" / "train_net.py"), "--config-file", str(path), *opts],
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "DETECTRON2_DATASETS": str(coco)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    log = (tmp_path / "out" / "log.txt").read_text()
    expected = terms(cfg)
    assert all(term in log for term in expected)
    assert ("loss_pcka" in log) == bool(expected)
    # The heaviest of all child processes so far, in KiB.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6 * 2**20
    if not evaluated:
        return
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "AP" in results["results"]["coco_2017_val"]["bbox"]

    # Stock Detectron2, in a process that has never heard of this package.
    check = """
import sys
from pathlib import Path
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

class Spy(DetectionCheckpointer):
    def _log_incompatible_keys(self, found):
        assert not found.missing_keys and not found.incorrect_shapes, found
        print("compared")

cfg = get_cfg()
cfg.merge_from_file("out/student_config.yaml")
Spy(build_model(cfg)).load("out/model_final.pth")
assert not any(name.startswith("pcka") for name in sys.modules)
"""
    stock = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path
    )
    assert stock.returncode == 0 and "compared" in stock.stdout, stock.stderr[-3000:]
