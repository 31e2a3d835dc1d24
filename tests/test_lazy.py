"""LazyConfigs: the numbers of the yaml configs, and what else the yaml configs promise."""

import inspect
import itertools
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from helpers import REPO, assert_one_line, digits_cfg, make_batch
from omegaconf import DictConfig, ListConfig
from torch import nn

from pcka_distill import UserError, engine, get_distill_cfg, lazy
from pcka_distill.build import merge_config
from pcka_distill.step import NonFiniteError, replay
from pcka_distill.teacher import fingerprint

pytestmark = pytest.mark.usefixtures("digits")

TOOL = REPO / "tools" / "lazyconfig_train_net.py"
FAMILIES = ("retinanet", "fcos", "faster_rcnn")
SHIPPED = [f"Digits/{x}_pcka" for x in FAMILIES]
SHIPPED += [f"COCO-Detection/{x}_R_101_to_R_50_pcka_2x" for x in FAMILIES]

# Images of random sizes, mirrored at random.
RANDOM = """
import detectron2.data.transforms as T
steps = dataloader.train.mapper.augmentations
steps[0].short_edge_length = [64, 80, 96]
steps.append(L(T.RandomFlip)(horizontal=True))
model.losses[0].patch_size = 1
"""


def parse(path, opts, flags=()):
    opts = [str(x) for x in opts]
    return default_argument_parser().parse_args(["--config-file", str(path), *flags, *opts])


def yaml_arguments(family, teacher, output, *opts, flags=()):
    opts = [
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", REPO / f"configs/Digits/{family}_student.yaml"),
        *("MODEL.DISTILL.TEACHER.WEIGHTS", teacher, "DATASETS.TEST", "()", *opts),
        *("OUTPUT_DIR", output),
    ]
    return parse(REPO / f"configs/Digits/{family}_pcka.yaml", opts, flags)


def lazy_arguments(family, teacher, output, *opts, flags=(), path=None):
    opts = [
        f"model.teacher.config={REPO}/configs/Digits/{family}_student.yaml",
        f"model.teacher.weights={teacher}",
        "dataloader.test=[]",
        *opts,
        f"train.output_dir={output}",
    ]
    return parse(path or REPO / f"configs/lazy/Digits/{family}_pcka.py", opts, flags)


def my_config(folder, code, family="retinanet"):
    """A LazyConfig of one's own: that of a family, and what one adds to it."""
    path = folder / "mine.py"
    keys = ("dataloader", "lr_multiplier", "model", "optimizer", "train")
    shipped = REPO / f"configs/lazy/Digits/{family}_pcka.py"
    path.write_text(
        "import torch\n"
        "from detectron2.config import LazyCall as L, LazyConfig\n"
        f"{', '.join(keys)} = LazyConfig.load({str(shipped)!r}, {keys})\n"
        f"{inspect.cleandoc(code)}\n"
    )
    return path


def final(folder):
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)


def assert_equal(a, b):
    """Everything of two checkpoints but the time that they took."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "Stopwatch":
                assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


def metrics(folder):
    """What is logged, but for times."""
    lines = [json.loads(x) for x in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.endswith(("time", "seconds"))} for x in lines]


# ---- equal to the yaml ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_the_yaml(family, teacher_files, tmp_path):
    """After three iterations: weights, optimizer, random numbers, and all that was logged."""
    teacher = teacher_files[family]
    # A warm-up of one iteration, or next to nothing would be learned.
    opts = ("SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 1)
    engine.main(yaml_arguments(family, teacher, tmp_path / "yaml", *opts))
    opts = ("train.max_iter=3", f"lr_multiplier.warmup_length={1 / 3}")
    lazy.main(lazy_arguments(family, teacher, tmp_path / "lazy", *opts))
    assert_equal(final(tmp_path / "yaml"), final(tmp_path / "lazy"))
    logged = metrics(tmp_path / "yaml")
    assert logged == metrics(tmp_path / "lazy")
    assert {"loss_pcka_p3", "loss_pcka_p5", "total_loss", "lr"} <= logged[-1].keys()
    torch.manual_seed(0)
    begin, end = build_model(digits_cfg(family)).state_dict(), final(tmp_path / "lazy")["model"]
    assert list(begin) == list(end) == list(final(tmp_path / "yaml")["model"])
    assert not all(torch.allclose(x, end[k], atol=1e-3) for k, x in begin.items())


def test_the_numbers_of_the_yaml_with_every_option(teacher_files, tmp_path):
    """Adapters, logits, images of random sizes, mixed precision, parts, a teacher run faster."""
    teacher = teacher_files["faster_rcnn"]
    keys = {
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.AMP.PRECISION": "bfloat16",
        "SOLVER.ACCUMULATION_STEPS": 2,
        "SOLVER.ACTIVATION_CHECKPOINT": True,
        "SOLVER.SKIP_NONFINITE": 1,
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.5,
        "DATALOADER.MAX_UNREADABLE": 1,
        "SOLVER.IMS_PER_BATCH": 4,
        "SEED": 3,
    }
    options = {"precision": "bfloat16", "channels_last": False, "allow_partial": True}
    opts = [
        *(x for pair in keys.items() for x in pair),
        *(x for k, v in options.items() for x in (f"MODEL.DISTILL.TEACHER.{k.upper()}", v)),
        *("MODEL.DISTILL.TEACHER.CACHE.DIR", tmp_path / "yaml_cache"),
        *("MODEL.DISTILL.LOSSES", "['PCKALoss','MimicLoss','RCKALoss']"),
        *("SOLVER.WARMUP_ITERS", 1, "SOLVER.MAX_ITER", 2, "MODEL.DISTILL.PCKA.PATCH_SIZE", 1),
        *("INPUT.MIN_SIZE_TRAIN", (64, 80, 96), "INPUT.RANDOM_FLIP", "horizontal"),
    ]
    engine.main(yaml_arguments("faster_rcnn", teacher, tmp_path / "yaml", *opts))
    path = my_config(
        tmp_path,
        RANDOM
        + """
from pcka_distill import MimicLoss, RCKALoss
model.losses += [L(MimicLoss)(), L(RCKALoss)()]
""",
        "faster_rcnn",
    )
    names = {yaml: key for key, yaml in lazy._KEYS.items()}
    opts = [
        *(f"{names[k]}={v}" for k, v in keys.items()),
        *(f"model.teacher.{k}={v}" for k, v in options.items()),
        f"model.teacher.cache_dir={tmp_path}/lazy_cache",
        "lr_multiplier.warmup_length=0.5",
        "train.max_iter=2",
    ]
    args = lazy_arguments("faster_rcnn", teacher, tmp_path / "lazy", *opts, path=path)
    lazy.main(args)
    assert_equal(final(tmp_path / "yaml"), final(tmp_path / "lazy"))
    logged = metrics(tmp_path / "yaml")
    assert logged == metrics(tmp_path / "lazy")
    assert {"loss_rcka_intra", "loss_mimic_p3", "teacher_cache_hits"} <= logged[-1].keys()
    assert any(k.startswith("distill.mimic.") for k in final(tmp_path / "lazy")["model"])


def plain(x):
    """What something is made of, in types that can be compared."""
    if isinstance(x, torch.Tensor):
        return [str(x.dtype), list(x.shape), x.flatten().tolist() if x.numel() <= 64 else None]
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, (list, tuple, ListConfig)):
        return [plain(v) for v in x]
    if isinstance(x, (dict, DictConfig)):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (set, frozenset)):
        return sorted(x)
    if isinstance(x, (type, nn.Module)) or not hasattr(x, "__dict__"):
        return getattr(x, "__qualname__", type(x).__qualname__)
    return [type(x).__qualname__, plain(vars(x))]


def attributes(model):
    """Those of all modules, but what every module has."""
    common = vars(nn.Module())
    return {
        f"{name}.{key}": plain(value)
        for name, module in model.named_modules()
        for key, value in {**vars(module), "class": type(module)}.items()
        if key not in common
    }


def shipped(name):
    """The yaml and the LazyConfig of a name."""
    cfg = get_distill_cfg()
    merge_config(cfg, str(REPO / f"configs/{name}.yaml"), ["MODEL.DEVICE", "cpu"], "config file")
    return cfg, lazy.load_config(str(REPO / f"configs/lazy/{name}.py"), ["train.device=cpu"])


@pytest.mark.parametrize("name", SHIPPED)
def test_the_settings_of_the_yaml(name, monkeypatch):
    """Student, teacher, losses, optimizer, schedule, images, run."""
    asked = []
    monkeypatch.setattr(
        "pcka_distill.build.load_teacher_weights", lambda _, path, **kw: asked.append((path, kw))
    )
    cfg, config = shipped(name)
    settings, trainer = lazy._settings(config), lazy.trainer_of(config)
    models = []
    for make in (build_model, trainer.make_model):
        torch.manual_seed(0)
        models.append(make(cfg if make is build_model else settings))
    mine, theirs = (x.state_dict() for x in models)
    assert list(mine) == list(theirs) and all(torch.equal(x, theirs[k]) for k, x in mine.items())
    students = [attributes(x.student) for x in models]
    # Weights of losses: of one that is not named it is 1.
    weights = [x.pop("roi_heads.box_predictor.loss_weight", {}) for x in students]
    assert all(x == 1.0 for found in weights for x in found.values())
    assert students[0] == students[1]
    assert [attributes(x) for x in models[0].losses] == [attributes(x) for x in models[1].losses]
    assert models[0].pairs == models[1].pairs
    teachers = [attributes(x.teacher.model) for x in models]
    for found in teachers:
        found.pop("roi_heads.box_predictor.loss_weight", None)
    assert teachers[0] == teachers[1]
    assert asked[0] == asked[1] and asked[0][0]

    optimizers = [engine.Trainer.build_optimizer(cfg, models[0])]
    optimizers.append(trainer.build_optimizer(settings, models[1]))
    groups = [
        [
            {k: len(v) if k == "params" else v for k, v in g.items() if k != "foreach"}
            for g in groups
        ]
        for groups in (x.param_groups for x in optimizers)
    ]
    assert groups[0] == groups[1]
    assert type(optimizers[0]).__name__ == type(optimizers[1]).__name__
    schedules = [engine.Trainer.build_lr_scheduler(cfg, optimizers[0])._multiplier]
    schedules.append(trainer.build_lr_scheduler(settings, optimizers[1])._multiplier)
    n = cfg.SOLVER.MAX_ITER
    points = {
        *range(0, n, max(1, n // 5000)),
        *cfg.SOLVER.STEPS,
        *(x - 1 for x in cfg.SOLVER.STEPS),
    }
    assert all(schedules[0](i / n) == schedules[1](i / n) for i in points if i < n)

    node = config.dataloader
    tests = node.test if isinstance(node.test, ListConfig) else [node.test]
    assert plain(DatasetMapper(cfg, True)) == plain(instantiate(node.train.mapper))
    for test in tests:
        assert plain(DatasetMapper(cfg, False)) == plain(instantiate(test.mapper))
        assert test.dataset.filter_empty is False
    assert {x.num_workers for x in (node.train, *tests)} == {cfg.DATALOADER.NUM_WORKERS}
    for key in (*lazy._KEYS.values(), "DATASETS.TRAIN", "DATASETS.TEST", "INPUT.MIN_SIZE_TRAIN"):
        *path, last = key.split(".")
        a, b = cfg, settings
        for part in path:
            a, b = a[part], b[part]
        assert a[last] == b[last] or key == "OUTPUT_DIR", key
    assert settings.OUTPUT_DIR != cfg.OUTPUT_DIR


@pytest.mark.parametrize("grouping", [True, False])
def test_the_loader_of_the_yaml(grouping, tmp_path):
    """With another sampler, and what else a loader can be told."""
    opts = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "SEED", 4,
            "DATALOADER.REPEAT_THRESHOLD", 0.35, "DATALOADER.ASPECT_RATIO_GROUPING", grouping,
            "DATALOADER.NUM_WORKERS", 1]  # fmt: skip
    cfg = engine.setup(yaml_arguments("fcos", "gone.pth", tmp_path / "yaml", *opts))
    code = """
from detectron2.data.samplers import RepeatFactorTrainingSampler as Sampler
dataloader.train.sampler = L(Sampler)(
    repeat_factors=L(Sampler.repeat_factors_from_category_frequency)(
        dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.35
    ),
    seed="${train.seed}",
)
"""
    opts = ["train.seed=4", "dataloader.train.num_workers=1"]
    # True is Detectron2's default.
    opts += [] if grouping else ["dataloader.train.aspect_ratio_grouping=false"]
    path = my_config(tmp_path, code, "fcos")
    args = lazy_arguments("fcos", "gone.pth", tmp_path / "lazy", *opts, path=path)
    settings, kind = lazy.setup(args)
    loaders = engine.Trainer.build_train_loader(cfg), kind.build_train_loader(settings)
    for name in ("batch_size", "_groups", "_num_workers", "_seed", "_max_unreadable"):
        mine, theirs = (getattr(x, name) for x in loaders)
        assert mine == theirs, name
    orders = [list(itertools.islice(x._sampler, 3000)) for x in loaders]
    assert orders[0] == orders[1] and len(set(orders[0][:1500])) < 1500

    # A sampler of another dataset.
    kind.config.dataloader.train.sampler.repeat_factors = torch.ones(7)
    with pytest.raises(UserError, match="sampler counts 7 images and 1500 can be used"):
        kind.build_train_loader(settings)


def test_every_run_has_its_own_folder():
    folders = [shipped(x)[1].train.output_dir for x in SHIPPED]
    assert len(set(folders)) == len(folders) and "???" not in folders


@pytest.mark.parametrize(
    "name", ["COCO-Detection/retinanet_R_50_FPN_1x.py", "COCO-Detection/fcos_R_50_FPN_1x.py"]
)
def test_detectron2s_own_configs_are_understood(name):
    config = lazy.load_config(model_zoo.get_config_file(name), ["train.device=cpu"])
    cfg = lazy._settings(config)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.DEVICE) == (90000, 16, "cpu")
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("coco_2017_train",), ("coco_2017_val",))
    assert (min(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN) == (640, 1333)
    assert cfg.MODEL.WEIGHTS.endswith("R-50.pkl")
    model = lazy.trainer_of(config).make_model(cfg)
    assert type(model).__name__ == type(instantiate(config.model)).__name__


# ---- the teacher ------------------------------------------------------------------------------


def test_a_teacher_that_is_a_lazy_config(teacher_files, tmp_path):
    """As a mapping inside of the student's: the numbers of the one that is named."""
    teacher, opts = (
        teacher_files["fcos"],
        ("train.max_iter=2", "dataloader.train.total_batch_size=2"),
    )
    lazy.main(lazy_arguments("fcos", teacher, tmp_path / "named", *opts))
    code = "model.teacher.config = {'model': model.student}"
    args = [f"model.teacher.weights={teacher}", "dataloader.test=[]", *opts]
    path = my_config(tmp_path, code, "fcos")
    lazy.main(parse(path, [*args, f"train.output_dir={tmp_path}/inside"]))
    assert_equal(final(tmp_path / "named"), final(tmp_path / "inside"))

    # Its own settings can be overridden, and are no more than its own.
    kind = lazy.setup(parse(path, [*args, "model.teacher.config.model.test_score_thresh=0.5",
                                   f"train.output_dir={tmp_path}/other"]))[1]  # fmt: skip
    model = kind.make_model(kind(lazy._settings(kind.config)).cfg)
    assert model.teacher.model.test_score_thresh == 0.5
    assert model.student.test_score_thresh == 0.02
    # Detectron2's own instantiate makes the same model.
    torch.manual_seed(0)
    mine = instantiate(kind.config.model)
    torch.manual_seed(0)
    student = instantiate(kind.config.model.student)
    after = torch.get_rng_state()
    assert_equal(dict(mine.student.state_dict()), dict(student.state_dict()))
    stock = instantiate(kind.config.model.teacher.config.model)
    stock.load_state_dict(torch.load(teacher)["model"])
    assert mine.teacher.fingerprint == fingerprint(stock)
    torch.manual_seed(0)
    instantiate(kind.config.model)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_teacher_of_ones_own_moves_no_random_generator_either(tmp_path):
    path = my_config(
        tmp_path,
        """
        from pcka_distill import FrozenTeacher
        model.teacher = L(FrozenTeacher)(model=model.student)
        """,
    )
    cfg, kind = lazy.setup(parse(path, [f"train.output_dir={tmp_path}/x"]))
    torch.manual_seed(0)
    kind.build_student(cfg)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    kind.make_model(cfg)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_loss_of_weight_0_is_the_plain_student(tmp_path):
    """Its teacher is not asked for."""
    opts = ["SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path / "yaml"]
    engine.main(parse(REPO / "configs/Digits/retinanet_student.yaml", opts))
    opts = ["model.losses.0.weight=0", "train.max_iter=2", "lr_multiplier.warmup_length=1"]
    lazy.main(lazy_arguments("retinanet", "gone.pth", tmp_path / "lazy", *opts))
    a, b = (final(tmp_path / x)["model"] for x in ("yaml", "lazy"))
    assert_equal(dict(a), dict(b))
    assert "PCKALoss has weight 0" in (tmp_path / "lazy" / "log.txt").read_text()


def test_logits_are_compared_by_the_names_of_classes(teacher_files, tmp_path):
    path = my_config(
        tmp_path,
        "from pcka_distill import KDLoss\nmodel.losses = [L(KDLoss)(foreground_only=True)]",
    )
    args = lazy_arguments("retinanet", teacher_files["retinanet"], tmp_path / "x", path=path)
    cfg, kind = lazy.setup(args)
    assert kind.make_model(cfg).teacher.classes == [str(i) for i in range(10)]
    kind.config.model.teacher.classes = list("abcdefghij")
    with pytest.raises(UserError, match="no class of the same name"):
        kind.make_model(cfg)


# ---- runs -------------------------------------------------------------------------------------


@pytest.fixture
def few_images(tmp_path):
    """Four images of the digits set: an evaluation of a second."""
    source = MetadataCatalog.get("digits_val")
    content = json.loads(Path(source.json_file).read_text())
    content["images"] = content["images"][:4]
    kept = {x["id"] for x in content["images"]}
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in kept]
    (tmp_path / "few.json").write_text(json.dumps(content))
    register_coco_instances("few", {}, str(tmp_path / "few.json"), source.image_root)
    yield "few"
    DatasetCatalog.remove("few")
    MetadataCatalog.remove("few")


def test_a_run_end_to_end(few_images, teacher_files, tmp_path):
    """Train, evaluate by the config's evaluators, and let stock Detectron2 load what is left."""
    path = my_config(
        tmp_path,
        """
        from detectron2.evaluation import DatasetEvaluator
        class Count(DatasetEvaluator):
            def reset(self): self.images = 0
            def process(self, inputs, outputs): self.images += len(outputs)
            def evaluate(self): return {"count": {"images": self.images}}
        for i in range(2):
            dataloader.test[i].dataset.names = "few"
        dataloader.evaluator[0].dataset_name = "few"
        dataloader.evaluator[1] = [L(Count)()]
        model.student.test_score_thresh = 0.0
        """,
    )
    output = tmp_path / "run"
    opts = [
        f"model.teacher.config={REPO}/configs/Digits/retinanet_student.yaml",
        f"model.teacher.weights={teacher_files['retinanet']}",
        "train.max_iter=4", "train.checkpointer.period=1", "train.checkpointer.max_to_keep=2",
        "train.eval_period=2", "train.log_period=1", "train.gradient_monitor_period=2",
        "+train.mystery=3", f"train.output_dir={output}",
    ]  # fmt: skip
    results = lazy.main(parse(path, opts))
    assert set(results) == {"few", "few (1)"}
    written = json.loads((output / "results.json").read_text())
    assert written["results"]["few (1)"] == {"count": {"images": 4}}
    assert "AP" in written["results"]["few"]["bbox"] and written["train_seconds"] > 0
    assert sorted(x.name for x in output.glob("model_*.pth")) == [
        "model_0000002.pth", "model_0000003.pth", "model_final.pth"
    ]  # fmt: skip
    logged = metrics(output)
    # The last line is of the last evaluation.
    assert [x["iteration"] for x in logged] == [0, 1, 2, 3, 4]
    assert ["few/bbox/AP" in x for x in logged] == [False, True, False, False, True]
    assert ["grad_share/pcka_p3" in x for x in logged[:4]] == [True, False, True, False]
    log = (output / "log.txt").read_text()
    assert "train.mystery is no key of this trainer" in log and "Fingerprint of the teacher" in log
    assert "p3 (64 channels, stride 8) <- p3 (64 channels, stride 8)" in log
    # What is compared is known from the mapper's size of images.
    assert re.search(r"pcka on p3: 36 patches of \d+ values", log)

    # Stock Detectron2: its own config, builder and checkpointer.
    stock = LazyConfig.load(str(output / "student_config.yaml")).model
    assert "pcka_distill" not in (output / "student_config.yaml").read_text()
    model = instantiate(stock)
    incompatible = []

    class Spy(DetectionCheckpointer):
        def _log_incompatible_keys(self, x):
            incompatible.append(x)

    Spy(model).load(str(output / "model_final.pth"))
    assert not incompatible[0].missing_keys and not incompatible[0].incorrect_shapes
    # and the same detections as the distilled model gives
    cfg, kind = lazy.setup(parse(path, [*opts[:-1], f"train.output_dir={tmp_path}/again"]))
    distilled = kind.build_model(cfg)
    DetectionCheckpointer(distilled).load(str(output / "model_final.pth"))
    batch = make_batch()
    with torch.no_grad():
        ours, theirs = distilled.eval()(batch), model.eval()(batch)
    for a, b in zip(ours, theirs):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)

    # Evaluation builds no teacher: its checkpoint may be gone.
    opts = [
        "model.teacher.weights=gone.pth", f"train.init_checkpoint={output}/model_final.pth",
        f"train.output_dir={tmp_path}/eval",
    ]  # fmt: skip
    again = lazy.main(parse(path, opts, flags=["--eval-only"]))
    assert again["few"]["bbox"]["AP50"] == results["few"]["bbox"]["AP50"]
    assert (tmp_path / "eval" / "evaluation.json").is_file()
    with pytest.raises(UserError, match=r"not that of the model .* Change train\.init_checkpoint"):
        lazy.main(parse(path, [*opts, "model.student.num_classes=10", "model.student.head.norm=BN"],
                        flags=["--eval-only"]))  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_is_the_uninterrupted_one(workers, teacher_files, tmp_path):
    """Bit for bit; images are resized and mirrored at random, and regions are sampled at random."""
    path = my_config(tmp_path, RANDOM, "faster_rcnn")
    teacher, output = teacher_files["faster_rcnn"], tmp_path / "run"
    opts = (
        *("train.max_iter=4", "train.checkpointer.period=2", "lr_multiplier.warmup_length=0.1"),
        *("dataloader.train.total_batch_size=2", f"dataloader.train.num_workers={workers}"),
        "train.seed=-1",
    )
    lazy.main(lazy_arguments("faster_rcnn", teacher, output, *opts, path=path))
    whole = final(output)
    (output / "last_checkpoint").write_text("model_0000001.pth")
    (output / "model_final.pth").unlink()
    torch.manual_seed(123)
    lazy.main(lazy_arguments("faster_rcnn", teacher, output, *opts, path=path, flags=["--resume"]))
    assert_equal(whole, final(output))
    # and not because nothing is random
    first = torch.load(output / "model_0000001.pth", weights_only=True)["model"]
    assert not torch.equal(first["roi_heads.box_predictor.cls_score.weight"],
                           whole["model"]["roi_heads.box_predictor.cls_score.weight"])  # fmt: skip


def test_another_teacher_is_refused(teacher_files, tmp_path):
    opts = (
        "train.max_iter=2",
        "train.checkpointer.period=1",
        "dataloader.train.total_batch_size=2",
    )
    lazy.main(lazy_arguments("retinanet", teacher_files["retinanet"], tmp_path / "run", *opts))
    state = torch.load(teacher_files["retinanet"])
    state["model"] = {k: v + 1 if k.endswith("bias") else v for k, v in state["model"].items()}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"another teacher .* of model\.teacher\.weights"):
        lazy.main(lazy_arguments("retinanet", tmp_path / "other.pth", tmp_path / "run", *opts,
                                 flags=["--resume"]))  # fmt: skip


def test_the_config_that_a_run_kept(teacher_files, tmp_path):
    """It is one itself. Its keys are sorted, and random weights are drawn in another order."""
    teacher, opts = teacher_files["fcos"], ("train.max_iter=1", "train.seed=5")
    cfg, kind = lazy.setup(lazy_arguments("fcos", teacher, tmp_path / "first", *opts))
    path, opts = tmp_path / "first" / "config.yaml", [f"train.output_dir={tmp_path}/again"]
    assert attributes(kind.make_model(cfg)) == attributes(kind.make_model(cfg))
    models = [kind.make_model(cfg)]
    cfg, kind = lazy.setup(parse(path, opts))
    models.append(kind.make_model(cfg))
    assert cfg.SEED == 5 and cfg.INPUT.MIN_SIZE_TRAIN == (96,)
    assert attributes(models[0]) == attributes(models[1])
    lazy.main(parse(path, opts))
    assert final(tmp_path / "again")["iteration"] == 0
    assert "no ResumableLoader" not in (tmp_path / "again" / "log.txt").read_text()


def test_a_step_that_is_not_finite_can_be_seen_again(teacher_files, tmp_path):
    opts = ("train.max_iter=9", "optimizer.lr=1e30", "lr_multiplier.warmup_length=0.1")
    args = lazy_arguments("retinanet", teacher_files["retinanet"], tmp_path / "run", *opts)
    with pytest.raises(NonFiniteError, match=r"lower optimizer\.lr or the loss's weight") as e:
        lazy.main(args)
    assert "set train.skip_nonfinite" in str(e.value)
    path = re.search(r"replay.py (\S+)$", str(e.value))[1]
    told = torch.load(path, weights_only=False)["losses"]
    found = replay(Path(path))["losses"]
    assert str(told) == str(found) and len(told) >= 5


def test_two_processes(few_images, teacher_files, tmp_path):
    """By Detectron2's launcher, from the command line: they stay in step."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    opts = (
        "train.max_iter=2",
        "dataloader.train.total_batch_size=4",
        "train.checkpointer.period=1",
    )
    args = lazy_arguments("retinanet", teacher_files["retinanet"], tmp_path / "run", *opts)
    done = subprocess.run(
        [sys.executable, str(TOOL), "--num-gpus", "2", "--dist-url", url,
         "--config-file", args.config_file, *args.opts],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    processes = final(tmp_path / "run")["trainer"]["hooks"]["RunState"]["processes"]
    assert len(processes) == 2
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("Starting training from iteration 0") == 1 and "World size: 2" in log


def test_a_loader_of_ones_own(teacher_files, tmp_path):
    path = my_config(
        tmp_path,
        """
        import sys
        sys.path.insert(0, TESTS)
        from helpers import make_batch
        def batches(count): return [make_batch(i) for i in range(count)]
        dataloader.train = L(batches)(count=3)
        """.replace("TESTS", repr(str(REPO / "tests"))),
    )
    args = lazy_arguments("retinanet", teacher_files["retinanet"], tmp_path / "run",
                          "train.max_iter=2", path=path)  # fmt: skip
    lazy.main(args)
    assert "no ResumableLoader" not in (log := (tmp_path / "run" / "log.txt").read_text())
    assert "dataloader.train is not Detectron2's own loader of named datasets" in log
    assert final(tmp_path / "run")["iteration"] == 1


# ---- bad input: one line, before anything is trained -------------------------------------------

BAD = {
    "unknown key": (
        ["train.max_itr=5"],
        r"has no key train.max_itr, did you mean train.max_iter\? \(\+train.max_itr=5 would add it",
    ),
    "unknown key of a call": (
        ["model.student.num_clases=3"], r"did you mean model\.student\.num_classes\?"
    ),
    "unknown key of a list": (["dataloader.test.7.num_workers=3"], "has no key dataloader.test.7"),
    "no override": (["train.max_iter"], "'train.max_iter' of the config file is no key=value"),
    "a yaml's override": (["SOLVER.MAX_ITER", "5"], r"'SOLVER\.MAX_ITER' .* is no key=value"),
    "half a list": (["model.losses=[1"], "override of the config file cannot be used"),
    "type": (["train.max_iter=many"], r"Type mismatch .* for config key: train\.max_iter"),
    "iterations": (["train.max_iter=0"], r"^train\.max_iter is 0; it must be positive"),
    "period": (["train.checkpointer.period=0"], r"^train\.checkpointer\.period is 0"),
    "batch": (["dataloader.train.total_batch_size=0"], r"^dataloader\.train\.total_batch_s.* is 0"),
    "parts": (["train.accumulation_steps=3"], r"\(1\) times train\.accumulation_steps \(3\)"),
    "precision": (
        ["train.amp.enabled=true", "train.amp.precision=float16"],
        r"^train\.amp\.precision float16 needs a CUDA device; .*, or train\.amp\.enabled False",
    ),
    "norm": (
        ["model.student.head.norm=SyncBN"], r"^model\.student\.head\.norm is SyncBN, .* CUDA"
    ),
    "output": (["train.output_dir=/dev/null/x"], r"^train\.output_dir cannot be written"),
    "dataset": (
        ["dataloader.train.dataset.names=digit_train"],
        "unknown dataset 'digit_train' in dataloader, did you mean digits_train",
    ),
    "dataset files": (
        ["dataloader.train.dataset.names=coco_2017_train"], "is not there: .*DETECTRON2_DATASETS"
    ),
    "classes": (["model.student.num_classes=4"], "has 10 classes and the model has 4; set num_cl"),
    "level": (["model.losses.0.levels=[p9]"], "unknown level 'p9': student has p3"),
    "patch": (
        ["model.losses.0.patch_size=4"], r"of 4 is larger .* set patch_size \[4, 4, 2\] and levels"
    ),
    "no loss": (["model.losses=[]"], "^model.losses is empty"),
    "loss": (["+model.losses.0.widht=3"], "model.losses cannot be built: .*widht"),
    "argument": (["+model.student.widht=3"], "the student cannot be built: .*widht"),
    "no teacher": (["model.teacher=null"], "distillation losses need a teacher"),
    "teacher weights": (
        ["model.teacher.weights=no.pth"], r"not found: no\.pth; set model\.teacher\.weights"
    ),
    "no teacher weights": (["model.teacher.weights=''"], r"no weights; set model\.teacher\.wei"),
    "teacher config": (
        ["model.teacher.config=no.yaml"], r"neither a file .*; change model\.teacher\.config$"
    ),
    "teacher that is a program": (
        ["model.teacher.config=" + str(REPO / "configs/lazy/Digits/fcos_pcka.py")],
        r"is a program; .* add model\.teacher\.trust_config=True to the command line",
    ),
    "teacher without a model": (["model.teacher.config={x: 1}"], "it defines no model"),
    "teacher's precision": (
        ["model.teacher.precision=fp8"], r"unknown model\.teacher\.precision 'fp8'"
    ),
    "teacher's cache": (
        ["model.teacher.cache_dir=x", "model.teacher.cache_max_gb=-1"],
        r"^model\.teacher\.cache_max_gb is -1",
    ),
    "student weights": (
        ["train.init_checkpoint=no.pth"], r"checkpoint not found: no\.pth; change train\.init_check"
    ),
    "optimizer": (["optimizer.params=null"], "optimizer.params is no LazyCall that takes the mod"),
    "optimizer's argument": (["+optimizer.momentun=1"], "the optimizer cannot be built: .*entun"),
    "schedule": (["lr_multiplier={x: 1}"], "lr_multiplier cannot be built: .*ParamScheduler"),
    "reference": (["train.output_dir='${train.x}'"], "the config cannot be used: .*train.x"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_the_first_iteration(case, teacher_files, tmp_path):
    opts, message = BAD[case]
    args = lazy_arguments("retinanet", teacher_files["retinanet"], tmp_path, "train.max_iter=2")
    args.opts += opts
    with pytest.raises(UserError, match=message) as e:
        lazy.main(args)
    assert "\n" not in str(e.value)
    log = tmp_path / "metrics.json"
    assert not log.exists() or log.read_text() == ""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("model = 1 / 0", "mine.py cannot be used: division by zero"),
        ("model = (", "mine.py cannot be used: .*syntax error"),
        ("x = {}", "mine.py defines no model, train.output_dir, dataloader"),
        ("del model", "mine.py defines no model$"),
        ("dataloader = None", "mine.py defines no dataloader, dataloader.train$"),
        ("del dataloader['train']", "mine.py defines no dataloader.train$"),
        ("del optimizer, lr_multiplier", "mine.py defines no optimizer, lr_multiplier$"),
        ("del model['student']", r"the model has no student; set model\.student"),
        ("dataloader.evaluator = dataloader.evaluator[:1]", "has 2 loaders .* 1 evaluators"),
        ("dataloader.train.dataset.names = [3]", "3 is no name"),
        ("model.student._target_ = 'no.such.Detector'", "the student cannot be built"),
        ("model = {'_target_': 'no.such.Detector'}", "the model cannot be built"),
    ],
)
def test_configs_that_cannot_be_used(code, message, tmp_path):
    if code == "x = {}":
        (tmp_path / "mine.py").write_text(code)
    else:
        my_config(tmp_path, code)
    with pytest.raises(UserError, match=message) as e:
        lazy.main(parse(tmp_path / "mine.py", []))
    assert "\n" not in str(e.value)


def test_annotations_that_an_evaluation_would_stumble_over(few_images, tmp_path):
    content = json.loads((tmp_path / "few.json").read_text())
    del content["annotations"][0]["area"]
    (tmp_path / "few.json").write_text(json.dumps(content))
    path = my_config(tmp_path, "dataloader.test[1].dataset.names = 'few'")
    with pytest.raises(UserError, match="dataset few cannot be used: the area of annotation"):
        lazy.main(parse(path, [f"train.output_dir={tmp_path}/run"]))


def test_files_that_are_no_lazy_config(tmp_path):
    with pytest.raises(UserError, match=r"there is no config file; name one by --config-file"):
        lazy.main(default_argument_parser().parse_args([]))
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match=r"mine\.txt cannot be used: .* python or yaml"):
        lazy.main(parse(tmp_path / "mine.txt", []))
    with pytest.raises(UserError, match=r"is no LazyConfig but one for tools/train_net\.py"):
        lazy.main(parse(REPO / "configs/Digits/fcos_pcka.yaml", []))


def test_a_config_by_its_name_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = engine.setup(parse("Digits/fcos_pcka.yaml", ["OUTPUT_DIR", "yaml"]))
    args = parse("lazy/Digits/fcos_pcka.py", ["train.output_dir=lazy"])
    assert lazy.setup(args)[0].SOLVER.MAX_ITER == cfg.SOLVER.MAX_ITER == 1200
    assert Path(args.config_file).is_file()


def test_eval_only_needs_a_checkpoint_and_images(tmp_path):
    args = lazy_arguments("retinanet", "gone.pth", tmp_path, flags=["--eval-only"])
    with pytest.raises(UserError, match=r"needs a checkpoint: set train\.init_checkpoint"):
        lazy.main(args)
    args.opts.append("train.init_checkpoint=some.pth")
    with pytest.raises(UserError, match=r"dataloader\.test is empty"):
        lazy.main(args)


def test_the_command_prints_the_line_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), "--config-file", "no/such.py"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert_one_line(done, "config file not found: no/such.py")
    assert "Traceback" not in done.stderr
