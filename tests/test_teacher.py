import copy
import logging
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from detectron2.config import CfgNode as CN
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import REPO, digits_cfg, distill_cfg, make_batch

from pcka_distill import (
    FrozenTeacher,
    UserError,
    build,
    find_adapter,
    get_distill_cfg,
    load_teacher_weights,
    register_config,
)
from pcka_distill.build import build_teacher
from pcka_distill.structures import Taps
from pcka_distill.teacher import fingerprint, fold_batch_norms


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(digits_cfg("retinanet_student"))


@pytest.fixture
def state(teacher_files):
    return torch.load(teacher_files["retinanet"])["model"]


class Author:
    """Something that is no tensor."""


def save(tmp_path, state):
    path = tmp_path / "teacher.pth"
    torch.save({"model": state}, path)
    return str(path)


def test_all_of_it_is_loaded(model, state, tmp_path):
    assert load_teacher_weights(model, save(tmp_path, state)) == len(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def _missing(state):
    del state["head.cls_score.weight"], state["backbone.fpn_lateral3.weight"]
    return "2 missing in the file: backbone.fpn_lateral3.weight, head.cls_score.weight"


def _shape(state):
    state["head.cls_score.weight"] = state["head.cls_score.weight"][:30]
    return r"1 of another shape .*: head.cls_score.weight \(30, 64, 3, 3\) != \(40, 64, 3, 3\)"


def _unexpected(state):
    """As when the weights of an R101 are loaded into an R50: nothing is missing."""
    state["backbone.bottom_up.res4.22.conv1.weight"] = torch.zeros(1)
    return "1 unknown to the model: backbone.bottom_up.res4.22.conv1.weight"


@pytest.mark.parametrize("spoil", [_missing, _shape, _unexpected])
def test_anything_less_is_refused_and_named(model, state, tmp_path, spoil, caplog):
    message = spoil(state)
    path = save(tmp_path, state)
    with pytest.raises(UserError, match=message) as e:
        load_teacher_weights(model, path)
    assert "\n" not in str(e.value) and "ALLOW_PARTIAL" in str(e.value)
    with caplog.at_level(logging.WARNING, "detectron2.pcka_distill"):
        logging.getLogger("detectron2").propagate = True
        load_teacher_weights(model, path, allow_partial=True)
    assert "Going on, as MODEL.DISTILL.TEACHER.ALLOW_PARTIAL is set" in caplog.text


def test_what_a_distilled_student_has_beside_it_is_no_problem(model, state, tmp_path):
    state["distill.0.projections.p3.weight"] = torch.zeros(1)
    load_teacher_weights(model, save(tmp_path, state))


def test_imagenet_backbone_is_no_teacher(model, tmp_path):
    """A pickle whose names are only matched by heuristics, and that has no head."""
    keys = {k: v.numpy() for k, v in model.backbone.bottom_up.state_dict().items()}
    path = tmp_path / "backbone.pkl"
    content = {"model": keys, "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"missing in the file: .*fpn"):
        load_teacher_weights(model, str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "teacher weights not found"),
        (b"", "cannot be read"),
        (b"not a checkpoint", "cannot be read"),
        (pickle.dumps(["a", "list"]), "cannot be read"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_files_that_are_no_checkpoint(model, tmp_path, content, message, suffix):
    path = tmp_path / f"x{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        load_teacher_weights(model, str(path))
    assert "\n" not in str(e.value) and "MODEL.DISTILL.TEACHER.WEIGHTS" in str(e.value)


def test_truncated_checkpoint(model, state, tmp_path):
    path = save(tmp_path, state)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_teacher_weights(model, path)


def test_more_than_tensors_in_the_file(model, state, tmp_path):
    """It is refused, with the reason; and read where one says that one trusts it."""
    path = tmp_path / "old.pth"
    torch.save({"model": state, "author": Author()}, path)
    with pytest.raises(UserError, match=r"more than tensors .*Author.*add TRUST_CHECKPOINT True"):
        load_teacher_weights(model, str(path))
    assert load_teacher_weights(model, str(path), trusted=True) == len(state)


def test_no_network(model, monkeypatch):
    def fail(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("iopath.common.download.request.urlopen", fail)
    with pytest.raises(UserError, match=r"could not be downloaded: .*; fetch it by hand"):
        load_teacher_weights(model, "https://no.such.host/model_final.pkl")


def test_batch_norm_counters_do_not_matter(model, state, tmp_path):
    """Nor the pixel statistics that checkpoints of 2020 hold."""
    first = next(k for k in state if k.endswith("num_batches_tracked"))
    del state[first]
    state["backbone.fpn_lateral3.norm.num_batches_tracked"] = torch.tensor(3)
    state["pixel_mean"] = torch.full((3, 1, 1), 127.5)
    load_teacher_weights(model, save(tmp_path, state))


def test_no_weights_named(model):
    with pytest.raises(UserError, match=r"set MODEL\.DISTILL\.TEACHER\.WEIGHTS"):
        load_teacher_weights(model, "")


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_batch_norms_are_folded_into_convolutions(norm):
    torch.manual_seed(0)
    model = build_model(digits_cfg("retinanet_student", "MODEL.RESNETS.NORM", norm)).eval()
    norms = [x for x in model.backbone.bottom_up.modules() if hasattr(x, "running_mean")]
    assert len(norms) > 5
    for x in norms:
        x.running_mean.normal_()
        x.running_var.uniform_(0.5, 2)
        x.weight.data.uniform_(0.5, 2)
        x.bias.data.normal_()
    before = copy.deepcopy(model)
    teacher = FrozenTeacher(model, fold_norms=True)
    assert not any(hasattr(x, "running_mean") for x in model.modules())
    assert not any(x.requires_grad for x in model.parameters())
    # What it was given is what its fingerprint tells.
    assert teacher.fingerprint == fingerprint(before) == FrozenTeacher(before).fingerprint
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        mine, expected = model.backbone(images), before.backbone(images)
    for level, x in expected.items():
        assert x.abs().max() > 0.1
        torch.testing.assert_close(mine[level], x, rtol=1e-4, atol=1e-5)


class NormAndActivation(torch.nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("what", ["of the batch", "subclass", "hook"])
def test_norms_that_do_more_than_scale_are_not_folded(what):
    norm = torch.nn.BatchNorm2d(4, track_running_stats=what != "of the batch")
    conv = Conv2d(3, 4, 3, norm=NormAndActivation(4) if what == "subclass" else norm)
    if what == "hook":
        conv.norm.register_forward_hook(lambda *_: None)
    assert fold_batch_norms(torch.nn.Sequential(conv)) == 0 and conv.norm is not None


def test_what_is_no_image_keeps_its_layout():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Conv3d(2, 3, 2))
    FrozenTeacher(model, channels_last=True)
    assert not model[0].weight.is_contiguous() and model[1].weight.is_contiguous()


def test_a_fingerprint_is_taken_when_it_is_wanted(model, state):
    """Whatever has been loaded by then, and of models without values never."""
    teacher = FrozenTeacher(model)
    model.load_state_dict(state)
    assert teacher.fingerprint == fingerprint(model)
    FrozenTeacher(model.to("meta"))


def test_a_teacher_that_is_loaded_has_no_batch_norms(teacher_files):
    teacher = build_teacher(distill_cfg("retinanet", teacher_files["retinanet"]))
    assert not any("running_mean" in k for k in teacher.model.backbone.bottom_up.state_dict())


def test_frozen(model):
    teacher = FrozenTeacher(model)
    assert not model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.DISTILL.TEACHER.CONFIG_FILE", ""], "the teacher has no config"),
        (["MODEL.DISTILL.TEACHER.CONFIG_FILE", "no/such.yaml"], "neither a file .* nor a name"),
        (["MODEL.DISTILL.TEACHER.OPTS", ["MODEL.RETINANETT.X", 1]], "override of the teacher"),
        (["MODEL.DISTILL.TEACHER.OPTS", ["MODEL.RETINANET.NUM_CLASSES", 80]], "another shape"),
    ],
)
def test_teacher_configs_that_cannot_work(teacher_files, opts, message):
    with pytest.raises(UserError, match=message):
        build_teacher(distill_cfg("retinanet", teacher_files["retinanet"], *opts))


def test_keys_of_another_project(teacher_files, tmp_path, monkeypatch):
    def add_keys(cfg):
        cfg.MODEL.THEIRS = CN({"DEPTH": 3})

    monkeypatch.setattr("pcka_distill.build._ADD_KEYS", list(build._ADD_KEYS))
    path = tmp_path / "teacher.yaml"
    base = REPO / "configs" / "Digits" / "retinanet_student.yaml"
    path.write_text(f"_BASE_: {base}\nMODEL:\n  THEIRS:\n    DEPTH: 5\n")
    opts = ["MODEL.DISTILL.TEACHER.CONFIG_FILE", str(path)]
    cfg = distill_cfg("retinanet", teacher_files["retinanet"], *opts)
    with pytest.raises(UserError, match=r"teacher config .*THEIRS"):
        build_teacher(cfg)
    register_config(add_keys)
    register_config(add_keys)
    assert get_distill_cfg().MODEL.THEIRS.DEPTH == 3
    build_teacher(cfg)


def lazy_teacher(name, tmp_path, *opts):
    """A distillation of the digits student of FCOS by a teacher that is a LazyConfig."""
    path = REPO / "tests" / "configs" / f"{name}.py"
    torch.manual_seed(0)
    state = instantiate(LazyConfig.load(str(path)).model).state_dict()
    torch.save({"model": state}, tmp_path / "teacher.pth")
    cfg = distill_cfg(
        "fcos", str(tmp_path / "teacher.pth"), "MODEL.DISTILL.TEACHER.CONFIG_FILE", str(path),
        "INPUT.MAX_SIZE_TRAIN", 128, "TRUST_CONFIG", True, *opts,
    )  # fmt: skip
    return cfg, state


@pytest.mark.parametrize("name", ["vitdet", "swin", "regnet"])
def test_lazy_configs(name, tmp_path):
    losses = ["PCKALoss", "MimicLoss", "RCKALoss"]
    cfg, state = lazy_teacher(name, tmp_path, "MODEL.DISTILL.LOSSES", losses)
    model = build_model(cfg)
    assert all(torch.equal(v, state[k]) for k, v in model.teacher.model.state_dict().items())
    assert model.teacher.input_format == "RGB"
    assert model.teacher.classes == [str(i) for i in range(10)]
    with EventStorage(0):
        # Of another size than the square that a ViT wants.
        out = model(make_batch(sizes=((96, 64), (80, 96))))
    terms = ("loss_pcka_p3", "loss_mimic_p5", "loss_rcka_intra")
    assert all(torch.isfinite(out[k]) and out[k] > 0 for k in terms)
    assert model.distill["pcka"].projections["p3"].weight.shape == (48, 64, 1, 1)


def test_images_larger_than_the_square_of_a_transformer(tmp_path):
    """Detectron2 would crop them without a word, or fail in the middle of a run."""
    cfg, _ = lazy_teacher("vitdet", tmp_path, "INPUT.MAX_SIZE_TRAIN", 200)
    with pytest.raises(UserError, match=r"128 x 128 pixels and INPUT\.MAX_SIZE_TRAIN is 200"):
        build_teacher(cfg)
    cfg.INPUT.MAX_SIZE_TRAIN = 128
    model = build_model(cfg)
    with pytest.raises(UserError, match="and here is one of 160"), EventStorage(0):
        model(make_batch(sizes=((96, 160),)))


def test_a_transformer_without_a_square_covers_the_students_extent(tmp_path):
    opts = ["model.backbone.square_pad", 0]
    cfg, _ = lazy_teacher("vitdet", tmp_path, "MODEL.DISTILL.TEACHER.OPTS", opts)
    model = build_model(cfg)
    adapter = find_adapter(model.teacher.model)
    student = Taps(images=torch.zeros(1, 3, 90, 97))
    maps = adapter.teacher_features(
        model.teacher.model, make_batch(sizes=((90, 97),)), student, alike=False
    )
    shapes = model.teacher.model.backbone.output_shape()
    covered = {tuple(side * shapes[f].stride for side in x.shape[-2:]) for f, x in maps.items()}
    assert covered == {(96, 128)}


def test_overrides_of_a_lazy_config(tmp_path):
    cfg, _ = lazy_teacher("regnet", tmp_path)
    cfg.MODEL.DISTILL.TEACHER.OPTS = ["model.test_score_thresh", 0.75]
    assert build_teacher(cfg).model.test_score_thresh == 0.75
    cfg.MODEL.DISTILL.TEACHER.OPTS = ["model.backbone.out_channels", 32]
    with pytest.raises(UserError, match="another shape"):
        build_teacher(cfg)
    cfg.MODEL.DISTILL.TEACHER.OPTS = ["+model.backbone.out_chanels", 32]
    with pytest.raises(UserError, match=r"cannot be built: .*out_chanels"):
        build_teacher(cfg)


@pytest.mark.parametrize("source", ["model = 1 / 0", "x = 3"])
def test_lazy_configs_that_cannot_be_used(source, tmp_path):
    (tmp_path / "bad.py").write_text(source)
    opts = ["MODEL.DISTILL.TEACHER.CONFIG_FILE", str(tmp_path / "bad.py"), "TRUST_CONFIG", True]
    with pytest.raises(UserError, match=r"bad.py cannot be used: (division|it defines)"):
        build_teacher(distill_cfg("fcos", "", *opts))


def test_a_zoo_name_brings_its_own_weights(teacher_files, monkeypatch):
    """Without a network: only what would be loaded."""
    asked = []
    monkeypatch.setattr(
        "pcka_distill.build.load_teacher_weights",
        lambda model, path, **_: asked.append(path) or 0,
    )
    cfg = distill_cfg("retinanet", "")
    cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    teacher = build_teacher(cfg)
    assert type(teacher.model).__name__ == "RetinaNet"
    assert asked[0].startswith("https://") and asked[0].endswith(".pkl")


def test_overrides_reach_the_teacher(teacher_files):
    opts = ["MODEL.DISTILL.TEACHER.OPTS", ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.5]]
    teacher = build_teacher(distill_cfg("retinanet", teacher_files["retinanet"], *opts))
    assert teacher.model.test_score_thresh == 0.5


def test_building_a_teacher_moves_no_random_generator(teacher_files):
    cfg = distill_cfg("retinanet", teacher_files["retinanet"])
    before = torch.get_rng_state()
    build_teacher(cfg)
    assert torch.equal(torch.get_rng_state(), before)
