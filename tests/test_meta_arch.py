"""A student, a teacher and losses together, on the real adapters."""

import copy
import logging
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, StandardROIHeads, build_model
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.solver import build_optimizer
from detectron2.structures import RotatedBoxes
from detectron2.utils.events import EventStorage
from helpers import FAMILIES, LEVELS, STAGES, build_distilled, digits_cfg, distill_cfg, make_batch
from torch import nn

from pcka_distill import (
    DISTILL_LOSS_REGISTRY,
    ATLoss,
    DistillationModel,
    DistillLoss,
    FGDLoss,
    FrozenTeacher,
    MimicLoss,
    PCKALoss,
    RCKALoss,
    UserError,
    student_config,
)
from pcka_distill.adapters import find_adapter, prepare_alike
from pcka_distill.adapters.base import _ADAPTERS
from pcka_distill.functional import pcka_loss, without_padding
from pcka_distill.recorder import Recorder

LOSSES = ["PCKALoss", "RCKALoss", "MimicLoss"]
OTHERS = [name for name, _ in DISTILL_LOSS_REGISTRY if name not in LOSSES]
# On every family the first, on the two that differ most the others.
EACH = [(family, name) for family in FAMILIES for name in LOSSES]
EACH += [(f, n) for f in ("retinanet", "cascade_rcnn") for n in OTHERS]
# It takes a softmax apart.
EACH.remove(("retinanet", "DKDLoss"))


# Where the number of classes is, of families without RoI heads.
NODES = {"retinanet": "RETINANET", "fcos": "FCOS", "sem_seg": "SEM_SEG_HEAD"}


def terms(family, loss):
    """What a loss adds to the dictionary of a family's losses."""
    name = loss.removesuffix("Loss").lower()
    if loss == "RCKALoss":
        return [f"loss_rcka_{part}{s}" for part in ("intra", "inter") for s in STAGES[family]]
    if "logits" in DISTILL_LOSS_REGISTRY.get(loss).reads:
        return [f"loss_{name}{s}" for s in STAGES[family]]
    return [f"loss_{name}_{level}" for level in LEVELS[family]]


def resnet(model):
    """The ResNet in it, with or without an FPN."""
    return getattr(model.backbone, "bottom_up", model.backbone)


def build(family, teacher_files, losses=("PCKALoss",), *opts, seed=0):
    torch.manual_seed(seed)
    cfg = distill_cfg(family, teacher_files[family], "MODEL.DISTILL.LOSSES", list(losses), *opts)
    return build_model(cfg)


def stock(family, seed=0):
    """What stock Detectron2 builds of the student's config."""
    torch.manual_seed(seed)
    return build_model(digits_cfg(family))


def step(model, batch, seed=1):
    torch.manual_seed(seed)
    with EventStorage(0):
        return model(batch)


def train(model, steps):
    optimizer = build_optimizer(digits_cfg("retinanet_student", "SOLVER.BASE_LR", 1e-3), model)
    history = []
    torch.manual_seed(5)
    for i in range(steps):
        with EventStorage(i):
            losses = model(make_batch(i))
        history.append({k: v.item() for k, v in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return history


@pytest.mark.parametrize(
    ("family", "losses"), [(f, [n]) for f, n in EACH] + [(f, LOSSES) for f in FAMILIES]
)
def test_every_family_with_every_loss(family, losses, teacher_files, batch):
    model = build(family, teacher_files, losses)
    out = step(model, batch)
    own = step(stock(family), batch)
    assert sorted(out) == sorted([*own, *(term for name in losses for term in terms(family, name))])
    # Reading the student does not change what it computes.
    assert all(torch.equal(out[k], own[k]) for k in own)
    distilled = [v for k, v in out.items() if k not in own]
    assert all(torch.isfinite(v) and v > 0 for v in distilled)
    sum(distilled).backward()
    assert resnet(model.student).stem.conv1.weight.grad.abs().sum() > 0
    # Every adapter learns: an unused parameter is an error under DDP.
    assert all(p.grad is not None for p in model.distill.parameters())


@pytest.mark.parametrize(("family", "name"), EACH)
def test_every_loss_falls(family, name, teacher_files):
    """On a batch that does not change, with gradients of distillation alone."""
    model = build(family, teacher_files, [name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(20):
        out = step(model, make_batch())
        loss = sum(out[k] for k in terms(family, name))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-3:]) < 0.8 * sum(history[:3]), history


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_like_its_teacher_has_nothing_to_learn(family, teacher_files, batch):
    model = build(family, teacher_files, ["PCKALoss", "RCKALoss"])
    model.student.load_state_dict(torch.load(teacher_files[family])["model"])
    # BatchNorm of the teacher uses its running statistics.
    for m in model.student.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    out = step(model, batch)
    for name in (*terms(family, "PCKALoss"), *terms(family, "RCKALoss")):
        assert out[name] < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_zero_is_stock_detectron2_bit_for_bit(family, teacher_files):
    zero = [x for n in ("PCKA", "RCKA", "MIMIC") for x in (f"MODEL.DISTILL.{n}.WEIGHT", 0.0)]
    ours, theirs = build(family, teacher_files, LOSSES, *zero), stock(family)
    assert train(ours, 4) == train(theirs, 4)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_changes_nothing_but_the_gradient(family, teacher_files):
    """Same initial student, same sampled regions, same random stream afterwards."""
    ours, theirs = build(family, teacher_files, LOSSES), stock(family)
    first, second = train(ours, 1)[0], train(theirs, 1)[0]
    assert {k: first[k] for k in second} == second
    for model in (ours, theirs):
        step(model, make_batch())
        model.after = torch.rand(3)
    assert torch.equal(ours.after, theirs.after)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_stays_out_and_stays_frozen(family, teacher_files, batch):
    model = build(family, teacher_files, LOSSES)
    teacher = model.teacher.model
    ids = {id(p) for p in teacher.parameters()}
    assert not ids & {id(p) for p in model.parameters()}
    assert not ids & {
        id(p) for g in build_optimizer(get_cfg(), model).param_groups for p in g["params"]
    }
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    model.train()
    train(model, 3)
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_the_teacher_follows_between_devices(teacher_files):
    model = build("retinanet", teacher_files)
    model.double()
    assert next(model.teacher.model.parameters()).dtype == torch.float64
    assert model.to("meta").teacher.model.head.cls_score.weight.device.type == "meta"


def _count_calls(module, counts, name):
    module.register_forward_hook(lambda *_: counts.__setitem__(name, counts.get(name, 0) + 1))


@pytest.mark.parametrize(
    ("family", "losses", "expected"),
    [
        ("retinanet", ["PCKALoss", "MimicLoss"], {"backbone": 1}),
        # once a level; the box branch never
        ("retinanet", LOSSES, {"backbone": 1, "cls_score": 3}),
        ("faster_rcnn", ["PCKALoss", "MimicLoss"], {"backbone": 1}),
        ("faster_rcnn", LOSSES, {"backbone": 1, "box_pooler": 1, "box_head": 1}),
    ],
)
def test_only_what_a_loss_reads_is_run(family, losses, expected, teacher_files, batch):
    model = build(family, teacher_files, losses)
    teacher, counts = model.teacher.model, {}
    parts = {"backbone": teacher.backbone}
    if family == "retinanet":
        parts |= {"cls_score": teacher.head.cls_score, "bbox_pred": teacher.head.bbox_pred}
    else:
        heads = teacher.roi_heads
        parts |= {"box_pooler": heads.box_pooler, "box_head": heads.box_head}
        parts |= {"rpn": teacher.proposal_generator.rpn_head}
    for name, part in parts.items():
        _count_calls(part, counts, name)
    step(model, batch)
    assert counts == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alike", [True, False])
def test_the_teacher_looks_before_the_student_fills_the_memory(family, alike, teacher_files, batch):
    """What it needs for a while then does not come on top of the student's activations."""
    model = build(family, teacher_files, LOSSES)
    model._alike = alike
    order = []
    for name, network in (("teacher", model.teacher.model), ("student", model.student)):
        network.backbone.register_forward_hook(lambda *_, name=name: order.append(name))
    step(model, batch)
    assert order == ["teacher", "student"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("losses", [["PCKALoss"], LOSSES])
def test_images_are_prepared_once_where_both_do_it_alike(
    family, losses, teacher_files, batch, monkeypatch
):
    """And the losses are those of a teacher that prepares its own, bit for bit."""
    results, counts = [], []
    for alike in (True, False):
        model = build(family, teacher_files, losses)
        assert model._alike
        model._alike = alike
        adapter, calls = model._teacher_adapter, []
        prepare = adapter.preprocess

        def counted(teacher, inputs, prepare=prepare, calls=calls):
            calls.append(1)
            return prepare(teacher, inputs)

        monkeypatch.setattr(adapter, "preprocess", counted)
        results.append(step(model, batch))
        counts.append(len(calls))
    assert counts == [0, 1]
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_who_prepares_images_in_another_way_does_so():
    def detector(**changes):
        model = build_model(digits_cfg("retinanet"))
        for name, value in changes.items():
            setattr(model, name, value)
        return model

    class Own(type(detector())):
        def preprocess_image(self, batched_inputs):
            raise NotImplementedError

    assert prepare_alike(detector(), detector())
    assert not prepare_alike(detector(), detector(pixel_std=torch.full((3, 1, 1), 58.0)))
    own = detector()
    own.__class__ = Own
    assert not prepare_alike(detector(), own) and not prepare_alike(own, detector())
    coarse = detector()
    coarse.backbone._size_divisibility *= 2
    assert prepare_alike(coarse, detector()) and not prepare_alike(detector(), coarse)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_in_another_precision(family, teacher_files, batch):
    """Its maps are of that type, its boxes stay exact, and the losses are nearly the same."""
    exact = step(build(family, teacher_files, LOSSES), batch)
    model = build(family, teacher_files, LOSSES, "MODEL.DISTILL.TEACHER.PRECISION", "bfloat16")
    seen = []
    model.teacher.model.backbone.register_forward_hook(
        lambda _, __, maps: seen.extend(x.dtype for x in maps.values())
    )
    if family != "retinanet" and hasattr(model.teacher.model, "roi_heads"):
        heads = model.teacher.model.roi_heads
        pooler = heads.pooler if family == "c4_rcnn" else heads.box_pooler
        pooler.register_forward_hook(lambda _, __, x: seen.append(x.dtype))
        assert step(model, batch) and seen.pop() == torch.float32
    losses = step(model, batch)
    assert torch.bfloat16 in seen
    for name, value in losses.items():
        assert value.dtype == torch.float32
        # Of a random head the best-scored places, which RCKA takes, are a matter of rounding.
        chosen = name.startswith("loss_rcka") and family in ("retinanet", "fcos")
        tolerance = 0.2 if chosen else 0.02
        assert value.item() == pytest.approx(exact[name].item(), rel=0.05, abs=tolerance), name
    sum(losses.values()).backward()


def test_the_students_autocast_is_not_the_teachers(teacher_files, batch):
    """ "float32" is never less, "" is what the student runs in."""
    for precision, expected in (("", torch.bfloat16), ("float32", torch.float32)):
        model = build(
            "retinanet", teacher_files, ["PCKALoss"], "MODEL.DISTILL.TEACHER.PRECISION", precision
        )
        seen = []
        model.teacher.model.backbone.register_forward_hook(
            lambda _, __, maps, seen=seen: seen.append(maps["p3"].dtype)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = step(model, batch)
        assert seen == [expected]
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_teacher_with_channels_last(teacher_files, batch):
    key = "MODEL.DISTILL.TEACHER.CHANNELS_LAST"
    exact = step(build("retinanet", teacher_files, LOSSES[:1], key, False), batch)
    model = build("retinanet", teacher_files)
    seen = []
    original = model._teach
    model._teach = lambda frozen, maps, student: (
        seen.extend(maps.values()) or original(frozen, maps, student)
    )
    weight = model.teacher.model.backbone.fpn_output3.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    losses = step(model, batch)
    # Losses read rows: out of every cell of another layout they would take one value.
    assert seen and all(x.is_contiguous() for x in seen)
    for name, value in losses.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-4, atol=1e-5)


def test_a_compiled_teacher(teacher_files, batch, monkeypatch):
    """Its backbone is; what the compiler cannot do is said on one line."""
    key = ("MODEL.DISTILL.TEACHER.COMPILE", True)
    exact = step(build("retinanet", teacher_files), batch)
    compiled = []
    compile_now = nn.Module.compile
    with monkeypatch.context() as patch:
        # The graph is captured as usual, and run as it is: no compiler is needed here.
        patch.setattr(
            nn.Module, "compile",
            lambda self: (compiled.append(self), compile_now(self, backend="eager")),
        )  # fmt: skip
        model = build("retinanet", teacher_files, ["PCKALoss"], *key)
    losses = step(model, batch)
    assert compiled == [model.teacher.model.backbone]
    assert all(torch.allclose(losses[k], exact[k]) for k in exact)

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self: compile_now(self, backend=broken))
        model = build("retinanet", teacher_files, ["PCKALoss"], *key)
    with pytest.raises(UserError, match=r"no compiler here.*TEACHER\.COMPILE False"):
        step(model, batch)


@pytest.mark.parametrize(
    ("precision", "message"),
    [("half", "expected '', 'float32'"), ("float16", "needs a CUDA device")],
)
def test_precisions_that_cannot_be(precision, message, teacher_files):
    with pytest.raises(UserError, match=message):
        build(
            "retinanet", teacher_files, ["PCKALoss"], "MODEL.DISTILL.TEACHER.PRECISION", precision
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_is_the_student_alone(family, teacher_files, batch):
    model = build(family, teacher_files, LOSSES).eval()
    alone = stock(family).eval()
    counts = {}
    _count_calls(model.teacher.model.backbone, counts, "teacher")
    with torch.no_grad():
        ours, theirs = model(batch), alone(batch)
    assert not counts
    for a, b in zip(ours, theirs):
        if family == "sem_seg":
            assert torch.equal(a["sem_seg"], b["sem_seg"])
            continue
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)


# ---- checkpoints -----------------------------------------------------------------------------


def _incompatible(model, path):
    found = {}

    class Spy(DetectionCheckpointer):
        def _log_incompatible_keys(self, incompatible):
            found["x"] = incompatible

    Spy(model).load(str(path))
    return found["x"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_the_students(family, teacher_files, tmp_path):
    model = build(family, teacher_files, LOSSES, seed=3)
    DetectionCheckpointer(model, str(tmp_path)).save("model_final")
    alone = stock(family)
    result = _incompatible(alone, tmp_path / "model_final.pth")
    assert not result.missing_keys and not result.incorrect_shapes
    # Beside the student there are only the 1x1 adapters; of the teacher there is nothing.
    assert sorted(result.unexpected_keys) == sorted(
        f"distill.mimic.projections.{p}.{x}" for p in LEVELS[family] for x in ("weight", "bias")
    )
    for key, value in alone.state_dict().items():
        assert torch.equal(value, model.student.state_dict()[key])
    again = build(family, teacher_files, LOSSES, seed=4)
    result = _incompatible(again, tmp_path / "model_final.pth")
    assert not any((result.missing_keys, result.unexpected_keys, result.incorrect_shapes))
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_a_checkpoint_does_not_depend_on_the_order_of_the_losses(teacher_files):
    model = build("retinanet", teacher_files, ["PCKALoss", "MimicLoss"])
    other = build("retinanet", teacher_files, ["MimicLoss"], seed=1)
    other.load_state_dict(model.state_dict())


def test_without_adapters_the_checkpoint_is_the_stock_one(teacher_files):
    model = build("retinanet", teacher_files)
    assert list(model.state_dict()) == list(stock("retinanet").state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_checkpoint_loads_into_the_student(family, teacher_files, tmp_path):
    alone = stock(family, seed=9)
    torch.save({"model": alone.state_dict()}, tmp_path / "zoo.pth")
    model = build(family, teacher_files, LOSSES)
    result = _incompatible(model, tmp_path / "zoo.pth")
    assert all(k.startswith("distill.") for k in result.missing_keys)
    assert not result.unexpected_keys and not result.incorrect_shapes
    for key, value in alone.state_dict().items():
        assert torch.equal(model.student.state_dict()[key], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_other_classes_loads_as_in_stock(family, teacher_files, tmp_path):
    """Fine-tuning of a zoo model: what fits is loaded, the rest is named, nothing fails."""
    node = NODES.get(family, "ROI_HEADS")
    zoo = build_model(digits_cfg(family, f"MODEL.{node}.NUM_CLASSES", 7))
    torch.save({"model": zoo.state_dict()}, tmp_path / "zoo.pth")
    ours, theirs = build(family, teacher_files), stock(family)
    mine, stocks = (_incompatible(m, tmp_path / "zoo.pth") for m in (ours, theirs))
    assert mine.incorrect_shapes == stocks.incorrect_shapes != []
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


def test_what_is_not_its_own_is_the_students(teacher_files):
    model = build("faster_rcnn", teacher_files)
    assert model.roi_heads is model.student.roi_heads
    assert model.device == model.student.device
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imagenet_backbone_loads_into_the_student(family, teacher_files, tmp_path):
    """As R-50.pkl: names without any prefix, matched by Detectron2's heuristics."""
    source = resnet(stock(family, seed=9)).state_dict()
    content = {
        "model": {k: v.numpy() for k, v in source.items()},
        "__author__": "test",
        "matching_heuristics": True,
    }
    (tmp_path / "R.pkl").write_bytes(pickle.dumps(content))
    model = build(family, teacher_files, LOSSES)
    result = _incompatible(model, tmp_path / "R.pkl")
    assert not result.incorrect_shapes and not result.unexpected_keys
    for key, value in source.items():
        assert torch.equal(resnet(model.student).state_dict()[key], value), key


# ---- copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_work_and_are_independent(clone, teacher_files, batch):
    model = build("faster_rcnn", teacher_files, LOSSES)
    expected = step(model, batch)
    twin = clone(model)
    for p in (*model.parameters(), *model.teacher.model.parameters()):
        p.data.zero_()
    model.double()
    out = step(twin, batch)
    assert {k: v.item() for k, v in out.items()} == {k: v.item() for k, v in expected.items()}


def test_two_losses_of_one_name():
    student = build_model(digits_cfg("retinanet_student"))
    with pytest.raises(UserError, match="two distillation losses are called 'mimic'"):
        DistillationModel(
            student=student, teacher=FrozenTeacher(student), losses=[MimicLoss(), MimicLoss()]
        )


def test_without_a_loss_it_is_not_silently_plain(teacher_files):
    with pytest.raises(UserError, match=r"MODEL\.DISTILL\.LOSSES is empty"):
        build("retinanet", teacher_files, [])


# ---- unequal pairs ---------------------------------------------------------------------------


def unequal(student_opts=(), teacher_opts=(), losses=None, **kwargs):
    student = build_model(digits_cfg("retinanet_student", *student_opts))
    teacher = build_model(digits_cfg("retinanet_student", *teacher_opts))
    return DistillationModel(
        student=student,
        teacher=FrozenTeacher(teacher, **kwargs.pop("teacher_kwargs", {})),
        losses=losses or [PCKALoss(patch_size=2, layout="sample"), MimicLoss()],
        **kwargs,
    )


def test_other_channels(batch):
    model = unequal(teacher_opts=["MODEL.FPN.OUT_CHANNELS", 32])
    out = step(model, batch)
    sum(v for k, v in out.items() if "pcka" in k).backward()
    assert model.distill["pcka"].projections["p4"].weight.shape == (32, 64, 1, 1)
    assert model.distill["pcka"].projections["p4"].weight.grad.abs().sum() > 0
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


def test_the_plan_is_seen_wherever_detectron2s_log_is(caplog):
    """Without any set-up of ours: in a trainer of one's own."""
    logging.getLogger("detectron2").propagate = True
    with caplog.at_level(logging.INFO, "detectron2"):
        unequal(teacher_opts=["MODEL.FPN.OUT_CHANNELS", 32], smallest_batch=(2, 96, 96))
    assert "p3 (64 channels, stride 8) <- p3 (32 channels, stride 8)\n" in caplog.text
    assert "pcka on p4: 1x1 conv 64 -> 32 on the student" in caplog.text
    assert "pcka on p5: 8 patches of 4 values; CKA of unrelated maps: intra 0.33" in caplog.text


def test_other_levels_and_strides(batch):
    """The teacher's pyramid starts one level later: p3 learns from its p4, resized."""
    late = [
        *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]),
        *("MODEL.FPN.IN_FEATURES", ["res4", "res5"]),
        *("MODEL.RETINANET.IN_FEATURES", ["p4", "p5"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[26], [42]]),
    ]
    losses = [PCKALoss(levels=("p3", "p4"), patch_size=2, layout="sample")]
    model = unequal(teacher_opts=late, losses=losses)
    assert [(p.student, p.teacher) for p in model.pairs.values()] == [("p3", "p4"), ("p4", "p4")]
    assert {"loss_pcka_p3", "loss_pcka_p4"} <= set(step(model, batch))


def test_levels_that_stay_alone_are_told(caplog):
    logging.getLogger("detectron2").propagate = True
    early = [
        *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4"]),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4"]),
        *("MODEL.RETINANET.IN_FEATURES", ["p3", "p4"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[14], [26]]),
    ]
    with caplog.at_level(logging.INFO, "detectron2"):
        model = unequal(teacher_opts=early)
    assert list(model.pairs) == ["p3", "p4"]
    assert "  p5: not used" in caplog.text


def test_a_model_without_a_backbone_is_refused_by_name(teacher_files):
    @META_ARCH_REGISTRY.register()
    class Bare(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.layer = nn.Linear(1, 1)

    try:
        cfg = distill_cfg("retinanet", teacher_files["retinanet"])
        cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE = "Bare"
        with pytest.raises(UserError, match="no adapter for Bare"):
            build_model(cfg)
    finally:
        META_ARCH_REGISTRY._obj_map.pop("Bare")


def test_two_stage_teacher_of_a_one_stage_student(batch):
    student = build_model(digits_cfg("retinanet_student"))
    teacher = FrozenTeacher(build_model(digits_cfg("faster_rcnn_student")))
    model = DistillationModel(
        student=student, teacher=teacher, losses=[PCKALoss(patch_size=2, layout="sample")]
    )
    assert "loss_pcka_p5" in step(model, batch)
    with pytest.raises(UserError, match="RCKALoss compares logits, and those of RetinaNet"):
        DistillationModel(student=student, teacher=teacher, losses=[RCKALoss()])


class PoolingBackbone(Backbone):
    """Exact features without a receptive field beyond the cell: average pools of the image."""

    size_divisibility = 32

    def __init__(self, size_divisibility):
        super().__init__()
        self.size_divisibility = size_divisibility
        self._out_features = ["p3", "p4", "p5"]
        self._out_feature_strides = {"p3": 8, "p4": 16, "p5": 32}
        self._out_feature_channels = dict.fromkeys(self._out_features, 64)

    def forward(self, x):
        pools = {k: nn.functional.avg_pool2d(x, s) for k, s in self._out_feature_strides.items()}
        return {k: v.repeat(1, 22, 1, 1)[:, :64] for k, v in pools.items()}


class Probe(DistillLoss):
    """Keeps what a loss is given."""

    reads = frozenset({"features", "logits"})

    def forward(self, student, teacher):
        self.student, self.teacher = student, teacher
        return {}


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn", "sem_seg"])
def test_losses_know_what_is_padding(family, teacher_files):
    built, probe = build_distilled(family, teacher_files), Probe()
    losses = [PCKALoss(levels=("p3",), patch_size=2, layout="sample"), probe]
    model = DistillationModel(
        student=built.student, teacher=built.teacher, losses=losses, input_format="BGR"
    )
    sizes = [(96, 128), (80, 64)]
    losses = step(model, make_batch(sizes=sizes))
    student, teacher = probe.student, probe.teacher
    assert student.sizes == sizes and student.padded_size == (96, 128)
    assert student.extents(12, 16) == [(12, 16), (10, 8)]
    x, y = (
        without_padding(z.features["p3"], student.extents(12, 16), "batch")
        for z in (student, teacher)
    )
    expected = pcka_loss(x, y, patch_size=2, layout="sample")
    torch.testing.assert_close(losses["loss_pcka_p3"], expected)


@pytest.mark.parametrize(("mine", "theirs"), [(32, 32), (32, 64), (64, 32)])
def test_other_padding_is_not_compared_misaligned(mine, theirs):
    """96 x 128 images, padded to 128 x 128 on one side only: equal pixels face each other."""
    torch.manual_seed(0)
    model = unequal(losses=[Probe()])
    model.student.backbone = PoolingBackbone(mine)
    model.teacher.model.backbone = PoolingBackbone(theirs)
    model = DistillationModel(
        student=model.student, teacher=model.teacher, losses=[Probe()], input_format="BGR"
    )
    model.student.load_state_dict(model.teacher.model.state_dict())
    for m in model.student.modules():
        if isinstance(m, nn.GroupNorm):
            # It averages over the map, padding included.
            m.forward = lambda x: x
    for m in model.teacher.model.modules():
        if isinstance(m, nn.GroupNorm):
            m.forward = lambda x: x
    step(model, make_batch(sizes=((96, 128), (96, 128))))
    student, teacher = model.losses[0].student, model.losses[0].teacher
    for level, x in student.features.items():
        assert torch.equal(x, teacher.features[level])
        rows = x.shape[-2]
        a, b = (t.logits[level].reshape(2, rows, -1) for t in (student, teacher))
        # The head's two 3 x 3 convolutions look two cells beyond the cut.
        torch.testing.assert_close(a[:, : rows - 2], b[:, : rows - 2])


def test_a_teacher_pads_no_further_than_it_must(batch):
    """An FPN may have levels that are coarser than what its images are padded to."""
    model = unequal(losses=[MimicLoss(levels=("p3",))])
    backbone = model.teacher.model.backbone
    backbone._out_feature_strides = {**backbone._out_feature_strides, "p5": 128}
    assert backbone.padding_constraints and backbone.size_divisibility == 32
    seen = []
    backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    model._alike = False
    step(model, batch)
    assert seen == [(96, 96)]


def test_channel_order_is_translated(batch):
    """The teacher was trained on RGB: it must see the reversed channels of the student's BGR."""
    seen = {}
    model = unequal(teacher_kwargs={"input_format": "RGB"}, input_format="BGR")
    model.teacher.model.backbone.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    step(model, batch)
    expected = (batch[0]["image"].flip(0) - 127.5) / 64
    torch.testing.assert_close(seen["x"][0], expected)


def test_logits_that_cannot_be_compared():
    opts = ["MODEL.ANCHOR_GENERATOR.SIZES", [[14], [26], [42]]]
    with pytest.raises(UserError, match="but anchors "):
        unequal(teacher_opts=opts, losses=[RCKALoss()])
    # Features do not mind.
    unequal(teacher_opts=opts)


def test_one_class_has_no_relation_to_others():
    one = ["MODEL.RETINANET.NUM_CLASSES", 1]
    with pytest.raises(UserError, match="INTER_WEIGHT 0"):
        unequal(one, one, losses=[RCKALoss()])
    unequal(one, one, losses=[RCKALoss(inter_weight=0.0)])


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn", "cascade_rcnn"])
def test_classes_are_paired_by_name(family, batch):
    """Teacher and student share two classes, under other indices: only those are compared."""
    node = {"retinanet": "RETINANET"}.get(family, "ROI_HEADS")
    student = build_model(digits_cfg(family, f"MODEL.{node}.NUM_CLASSES", 3))
    teacher = build_model(digits_cfg(family, f"MODEL.{node}.NUM_CLASSES", 4))
    for instances in (x["instances"] for x in batch):
        instances.gt_classes = instances.gt_classes % 3
    probe = Probe()
    model = DistillationModel(
        student=student,
        teacher=FrozenTeacher(teacher, classes=["car", "dog", "cat", "bus"]),
        losses=[probe],
        classes=["cat", "tree", "dog"],
    )
    recorder = Recorder(model._student_adapter.hook_points(student, {"logits"}))
    with recorder.recording() as record:
        step(model, batch)
        whole = model._student_adapter.collect(student, record, {"logits"}, batch).logits
    columns = [0, 2] if family == "retinanet" else [0, 2, 3]
    for group, logits in probe.student.logits.items():
        assert torch.equal(logits, whole[group][..., columns])
        assert probe.teacher.logits[group].shape == logits.shape
    # The teacher's dog and cat, in the student's order.
    adapter = model._teacher_adapter
    maps = adapter.teacher_features(teacher, batch, probe.student, alike=False)
    whole = adapter.teacher_logits(teacher, maps, probe.student)
    for group, logits in whole.items():
        theirs = [2, 1] if family == "retinanet" else [2, 1, 4]
        assert torch.equal(probe.teacher.logits[group], logits[..., theirs])


def test_heads_that_score_classes_one_by_one(batch):
    """The column of the background is never trained there: it is not compared."""
    opts = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True]
    student, teacher = (build_model(digits_cfg("faster_rcnn", *opts)) for _ in range(2))
    probe = Probe()
    step(DistillationModel(student=student, teacher=FrozenTeacher(teacher), losses=[probe]), batch)
    assert probe.student.logits["box"].shape[1] == probe.teacher.logits["box"].shape[1] == 10
    softmax = FrozenTeacher(build_model(digits_cfg("faster_rcnn")))
    with pytest.raises(UserError, match=r"sigmoid scores True \(student\) != False"):
        DistillationModel(student=student, teacher=softmax, losses=[RCKALoss()])


def test_one_stage_teacher_of_a_two_stage_student(batch):
    student = build_model(digits_cfg("faster_rcnn"))
    teacher = FrozenTeacher(build_model(digits_cfg("fcos")))
    losses = [PCKALoss(levels=("p3", "p4"), patch_size=2, layout="sample"), MimicLoss()]
    out = step(DistillationModel(student=student, teacher=teacher, losses=losses), batch)
    assert {"loss_pcka_p3", "loss_mimic_p5"} <= set(out)
    with pytest.raises(UserError, match=r"those of GeneralizedRCNN .* and FCOS .* nothing in"):
        DistillationModel(student=student, teacher=teacher, losses=[RCKALoss()])


def test_labels_of_who_has_none():
    class Bare(find_adapter(build_model(digits_cfg("retinanet"))).__class__):
        provides = frozenset({"features", "logits"})

    student = build_model(digits_cfg("retinanet"))
    _ADAPTERS.insert(0, Bare)
    try:
        for loss, what in ((RCKALoss(foreground_only=True), "labels"), (FGDLoss(), "boxes")):
            message = f"{type(loss).__name__} reads {what}, and RetinaNet has none to read"
            with pytest.raises(UserError, match=message):
                DistillationModel(student=student, teacher=FrozenTeacher(student), losses=[loss])
    finally:
        _ADAPTERS.remove(Bare)


def test_what_is_between_is_what_the_loss_put_there(caplog):
    """Of other channels mimic has a convolution, attention none."""
    logging.getLogger("detectron2").propagate = True
    with caplog.at_level(logging.INFO, "detectron2"):
        unequal(teacher_opts=["MODEL.FPN.OUT_CHANNELS", 32], losses=[MimicLoss(), ATLoss()])
    assert "mimic on p3: 1x1 conv 64 -> 32" in caplog.text and "at on" not in caplog.text


def test_boxes_that_are_turned_are_refused(batch):
    model = DistillationModel(
        student=(student := build_model(digits_cfg("retinanet"))),
        teacher=FrozenTeacher(copy.deepcopy(student)),
        losses=[FGDLoss()],
    )
    adapter = model._student_adapter
    with model._recorder.recording() as record:
        step(model.student, batch)
        batch[0]["instances"].gt_boxes = RotatedBoxes(torch.zeros(2, 5))
        with pytest.raises(UserError, match="those of the dataset have 5 numbers"):
            adapter.collect(model.student, record, {"features", "boxes"}, batch)


def test_dkd_is_not_for_classes_one_by_one(teacher_files):
    with pytest.raises(UserError, match="this head scores classes one by one; use KDLoss"):
        build("fcos", teacher_files, ["DKDLoss"])


def test_no_dataset_is_read_for_features_alone(teacher_files, monkeypatch):
    def fail(datasets, key):
        raise AssertionError(f"read {datasets}")

    for module in ("build", "meta_arch"):
        monkeypatch.setattr(f"pcka_distill.{module}.class_names", fail)
    build("retinanet", teacher_files, ["PCKALoss", "MimicLoss"])
    with pytest.raises(AssertionError, match="read"):
        build("retinanet", teacher_files, ["RCKALoss"])


def test_classes_that_cannot_be_paired():
    seven = ["MODEL.RETINANET.NUM_CLASSES", 7]
    with pytest.raises(UserError, match="10 classes, the teacher 7, and their names are not known"):
        unequal(teacher_opts=seven, losses=[RCKALoss()])
    with pytest.raises(UserError, match="no class of the same name: a0, a1"):
        unequal(
            teacher_opts=seven,
            losses=[RCKALoss()],
            classes=[f"a{i}" for i in range(10)],
            teacher_kwargs={"classes": [f"b{i}" for i in range(7)]},
        )
    with pytest.raises(
        UserError, match="the teacher's dataset names 4 classes, and its head has 10"
    ):
        unequal(
            losses=[RCKALoss()],
            classes=[f"a{i}" for i in range(10)],
            teacher_kwargs={"classes": ["a1", "a2", "a3", "a4"]},
        )
    # Two of a box head and its background are enough to relate, one of a dense head is not.
    with pytest.raises(UserError, match="INTER_WEIGHT 0"):
        unequal(
            losses=[RCKALoss()],
            classes=[f"a{i}" for i in range(10)],
            teacher_kwargs={"classes": [f"b{i}" for i in range(9)] + ["a3"]},
        )
    # Features do not mind.
    unequal(teacher_opts=seven)


class Labels(Probe):
    reads = frozenset({"features", "logits", "labels", "boxes"})


@pytest.mark.parametrize("family", ["faster_rcnn", "cascade_rcnn", "c4_rcnn"])
def test_labels_of_regions_are_those_the_head_is_trained_with(
    family, batch, empty_batch, monkeypatch
):
    """Stock Detectron2's own labels, as its losses are given them, stage by stage."""
    seen = []
    losses = FastRCNNOutputLayers.losses

    def spy(self, predictions, proposals):
        seen.append(torch.cat([x.gt_classes for x in proposals]))
        return losses(self, predictions, proposals)

    monkeypatch.setattr(FastRCNNOutputLayers, "losses", spy)
    for inputs in (batch, [empty_batch[0], batch[1]]):
        probe = Labels()
        student, teacher = (build_model(digits_cfg(family)) for _ in range(2))
        model = DistillationModel(student=student, teacher=FrozenTeacher(teacher), losses=[probe])
        seen.clear()
        step(model, inputs)
        labels = list(probe.student.labels.values())
        assert len(labels) == len(seen) == len(STAGES[family])
        assert all(torch.equal(a, b) for a, b in zip(labels, seen))
        assert any((x < 10).any() for x in seen)
        expected = [x["instances"].gt_boxes.tensor for x in inputs]
        assert all(torch.equal(a, b) for a, b in zip(probe.student.boxes, expected))


def test_labels_in_terms_of_the_shared_classes(batch):
    """The batch shows classes 3 and 7 of ten; the teacher knows 7 and 9."""
    names = [f"c{i}" for i in range(10)]
    probe = Labels()
    student = build_model(digits_cfg("faster_rcnn"))
    teacher = build_model(digits_cfg("faster_rcnn", "MODEL.ROI_HEADS.NUM_CLASSES", 2))
    frozen = FrozenTeacher(teacher, classes=["c9", "c7"])
    whole = Labels()
    for classes, loss in ((names, whole), (names, probe)):
        other = frozen if loss is probe else FrozenTeacher(copy.deepcopy(student))
        step(
            DistillationModel(student=student, teacher=other, losses=[loss], classes=classes), batch
        )
    before, after = whole.student.labels["box"], probe.student.labels["box"]
    table = {3: -1, 7: 0, 10: 2}
    assert {x.item() for x in before} == set(table)
    assert after.tolist() == [table[x] for x in before.tolist()]


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_labels_are_where_the_objects_are(family, batch):
    probe = Labels()
    student, teacher = (build_model(digits_cfg(family)) for _ in range(2))
    step(DistillationModel(student=student, teacher=FrozenTeacher(teacher), losses=[probe]), batch)
    maps = [probe.student.features[f] for f in student.head_in_features]
    anchors = student.anchor_generator(maps)
    assert {x.item() for y in probe.student.labels.values() for x in y.unique()} >= {3, 7, 10}
    for level, boxes in zip(student.head_in_features, anchors):
        assert probe.student.labels[level].shape == probe.student.logits[level].shape[:2]
        for i, x in enumerate(batch):
            labels = probe.student.labels[level][i]
            inside = boxes.get_centers()[(labels >= 0) & (labels < 10)]
            x0, y0, x1, y1 = x["instances"].gt_boxes.tensor.unbind(1)
            near = 8  # a matched anchor need not be centred in the box
            hit = (
                (inside[:, None, 0] > x0 - near) & (inside[:, None, 0] < x1 + near)
                & (inside[:, None, 1] > y0 - near) & (inside[:, None, 1] < y1 + near)
            )  # fmt: skip
            assert hit.any(1).all()


@pytest.mark.parametrize("family", ["fcos", "faster_rcnn"])
def test_rcka_of_the_foreground_alone(family, batch, empty_batch, teacher_files):
    model = build(family, teacher_files, ["RCKALoss"], "MODEL.DISTILL.RCKA.FOREGROUND_ONLY", True)
    assert step(model, batch)["loss_rcka_intra"] > 0
    assert step(model, empty_batch)["loss_rcka_intra"] == 0


def test_a_cascade_and_a_single_head(batch):
    """Stages are taught by one head, one head by the mean of the stages."""
    cascade, single = (build_model(digits_cfg(x)) for x in ("cascade_rcnn", "faster_rcnn"))
    probe = Probe()
    step(DistillationModel(student=single, teacher=FrozenTeacher(cascade), losses=[probe]), batch)
    heads = cascade.roi_heads
    maps = [probe.teacher.features[f] for f in heads.box_in_features]
    pooled = heads.box_pooler(maps, probe.student.regions["box"])
    stages = [p(h(pooled))[0] for h, p in zip(heads.box_head, heads.box_predictor)]
    torch.testing.assert_close(probe.teacher.logits["box"], sum(stages) / 3)

    cascade, single = (build_model(digits_cfg(x)) for x in ("cascade_rcnn", "faster_rcnn"))
    step(DistillationModel(student=cascade, teacher=FrozenTeacher(single), losses=[probe]), batch)
    assert list(probe.teacher.logits) == ["stage0", "stage1", "stage2"]
    heads = single.roi_heads
    maps = [probe.teacher.features[f] for f in heads.box_in_features]
    for group, boxes in probe.student.regions.items():
        expected = heads.box_predictor(heads.box_head(heads.box_pooler(maps, boxes)))[0]
        assert torch.equal(probe.teacher.logits[group], expected)


def test_heads_whose_boxes_are_computed_in_another_way(batch):
    class OwnHeads(StandardROIHeads):
        def _forward_box(self, features, proposals):
            return super()._forward_box(features, proposals)

    student = build_model(digits_cfg("faster_rcnn"))
    teacher = FrozenTeacher(copy.deepcopy(student))
    student.roi_heads.__class__ = OwnHeads
    with pytest.raises(UserError, match=r"logits of OwnHeads cannot be read: .*CascadeROIHeads"):
        DistillationModel(student=student, teacher=teacher, losses=[RCKALoss()])
    loss = PCKALoss(patch_size=2, layout="sample")
    model = DistillationModel(student=student, teacher=teacher, losses=[loss])
    assert "loss_pcka_p3" in step(model, batch)


def test_unsupported_models_name_the_supported(batch):
    with pytest.raises(
        UserError,
        match=r"no adapter for Linear: supported are dense detectors \(RetinaNet, FCOS\), image cl",
    ):
        DistillationModel(
            student=nn.Linear(1, 1), teacher=FrozenTeacher(nn.Linear(1, 1)), losses=[PCKALoss()]
        )


# ---- hard input ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_images_without_objects(family, teacher_files, empty_batch, batch):
    model = build(family, teacher_files, LOSSES)
    for inputs in (empty_batch, [empty_batch[0], batch[1]], batch[:1]):
        out = step(model, inputs)
        sum(out.values()).backward()
        assert all(torch.isfinite(v) for v in out.values())


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn"])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_loss_on_hard_input(family, autocast, teacher_files, empty_batch, batch):
    """All at once: no objects, one image, and in bf16 beside the student's own autocast."""
    names = [n for n in LOSSES + OTHERS if n != "DKDLoss" or family != "retinanet"]
    model = build(family, teacher_files, names)
    for inputs in (empty_batch, [empty_batch[0], batch[1]], batch[:1], batch):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = step(model, inputs)
        assert len(out) > len(names) and all(torch.isfinite(v) for v in out.values())
        sum(out.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("regions", [0, 1])
@pytest.mark.parametrize("family", ["faster_rcnn", "cascade_rcnn", "mask_rcnn", "c4_rcnn"])
def test_no_or_one_region(family, regions, teacher_files, batch):
    model = build(family, teacher_files, ["RCKALoss"])
    sampler = model.student.roi_heads.label_and_sample_proposals

    def few(proposals, targets):
        return [x[: regions if i == 0 else 0] for i, x in enumerate(sampler(proposals, targets))]

    model.student.roi_heads.label_and_sample_proposals = few
    out = step(model, batch)
    sum(v for k, v in out.items() if "rcka" in k).backward()
    assert all(out[k].item() == 0 for k in terms(family, "RCKALoss"))


def test_mask_rcnn(teacher_files, digits):
    """Masks are the student's own affair: the teacher's mask head is never run."""
    from detectron2.data import DatasetMapper

    opts = ["MODEL.MASK_ON", True]
    cfg = digits_cfg("faster_rcnn_student", *opts)
    mapper = DatasetMapper(cfg, is_train=True)
    inputs = [mapper(digits[0]), mapper(digits[1])]
    student, teacher = build_model(cfg), build_model(cfg)
    counts = {}
    _count_calls(teacher.roi_heads.mask_head, counts, "mask")
    model = DistillationModel(
        student=student, teacher=FrozenTeacher(teacher), losses=[PCKALoss(patch_size=2), RCKALoss()]
    )
    out = step(model, inputs)
    assert {"loss_mask", "loss_pcka_p3", "loss_rcka_intra"} <= set(out)
    assert not counts


def test_warm_up_reads_the_iteration(teacher_files, batch):
    full = build("retinanet", teacher_files)
    warming = build("retinanet", teacher_files, ["PCKALoss"], "MODEL.DISTILL.PCKA.WARMUP_ITERS", 10)
    for iteration, factor in ((0, 0.1), (4, 0.5), (20, 1.0)):
        with EventStorage(iteration):
            a, b = full(batch)["loss_pcka_p3"], warming(batch)["loss_pcka_p3"]
        torch.testing.assert_close(b, factor * a)


def test_nothing_recorded_is_kept(teacher_files, batch):
    model = build("faster_rcnn", teacher_files, LOSSES)
    step(model, batch)
    assert all(not tap.calls for tap in model._recorder._taps.values())


def test_losses_need_a_teacher():
    student = build_model(digits_cfg("retinanet_student"))
    with pytest.raises(UserError, match="need a teacher"):
        DistillationModel(student=student, teacher=None, losses=[PCKALoss()])


def test_student_config_is_stock(teacher_files):
    cfg = distill_cfg("retinanet", teacher_files["retinanet"])
    assert student_config(cfg).MODEL.META_ARCHITECTURE == "RetinaNet"
    cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE = "RetinaNett"
    with pytest.raises(UserError, match="STUDENT_ARCHITECTURE is 'RetinaNett'"):
        student_config(cfg)
