import ast
import logging
import re

import pytest
import torch
from detectron2.config import CfgNode
from helpers import rand

from pcka_distill import (
    DISTILL_LOSS_REGISTRY,
    ATLoss,
    CWDLoss,
    DistillLoss,
    DISTLoss,
    DKDLoss,
    FCKALoss,
    FeatureLoss,
    FGDLoss,
    KDLoss,
    MGDLoss,
    MimicLoss,
    PCKALoss,
    PKDLoss,
    RCKALoss,
    ReviewKDLoss,
    SPLoss,
    Taps,
    UserError,
    get_distill_cfg,
)
from pcka_distill.baselines import (
    at_loss,
    cwd_loss,
    dist_loss,
    dkd_loss,
    fgd_focal_loss,
    hcl_loss,
    kd_loss,
    object_masks,
    pkd_loss,
    sp_loss,
)
from pcka_distill.build import build_losses
from pcka_distill.functional import fcka_loss, pcka_loss, rcka_loss
from pcka_distill.pairing import LevelPair


def feature_taps(seed, channels=4):
    return Taps(
        features={
            "p3": rand(2, channels, 8, 8, seed=seed),
            "p4": rand(2, channels, 4, 4, seed=seed),
        }
    )


def pair(level, student=4, teacher=4):
    return LevelPair(level, level, student, teacher, 8, 8)


def test_pcka_by_level_and_weight():
    s, t = feature_taps(0), feature_taps(1)
    loss = PCKALoss(levels=("p4", "p3"), patch_size=(2, 4), layout="sample", weight=3.0)
    losses = loss(s, t)
    assert list(losses) == ["loss_pcka_p4", "loss_pcka_p3"]
    for level, p in (("p4", 2), ("p3", 4)):
        expected = 3 * pcka_loss(
            s.features[level], t.features[level], patch_size=p, layout="sample"
        )
        torch.testing.assert_close(losses[f"loss_pcka_{level}"], expected)


def test_a_projection_only_where_channels_differ():
    loss = PCKALoss(patch_size=2)
    loss.attach({"p3": pair("p3", 4, 6), "p4": pair("p4")})
    assert list(loss.projections) == ["p3"]
    t = feature_taps(1)
    t.features["p3"] = rand(2, 6, 8, 8, seed=3)
    sum(loss(feature_taps(0), t).values()).backward()
    assert loss.projections["p3"].weight.grad.abs().sum() > 0


def test_mimic_is_the_mean_square_after_its_projection():
    loss = MimicLoss(weight=2.0)
    loss.attach({"p3": pair("p3"), "p4": pair("p4")})
    s, t = feature_taps(0), feature_taps(1)
    conv = loss.projections["p3"]
    projected = torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], s.features["p3"])
    expected = 2 * ((projected + conv.bias[:, None, None] - t.features["p3"]) ** 2).mean()
    torch.testing.assert_close(loss(s, t)["loss_mimic_p3"], expected)


def test_rcka_takes_the_teachers_best_rows_of_each_image():
    s = Taps(logits={"p3": rand(2, 30, 5), "p4": rand(2, 7, 5, seed=1)})
    t = Taps(logits={"p3": rand(2, 30, 5, seed=2), "p4": rand(2, 7, 5, seed=3)})
    x, y = (torch.cat(list(taps.logits.values()), 1) for taps in (s, t))
    rows = [sorted(range(37), key=lambda r, i=i: -y[i, r].max())[:10] for i in range(2)]
    x, y = (torch.cat([z[i, r] for i, r in enumerate(rows)]) for z in (x, y))
    losses = RCKALoss(topk_per_image=10, weight=2.0, inter_weight=3.0)(s, t)
    torch.testing.assert_close(losses["loss_rcka_intra"], 2 * rcka_loss(x, y, inter_weight=0))
    torch.testing.assert_close(losses["loss_rcka_inter"], 6 * rcka_loss(x, y, intra_weight=0))


@pytest.mark.parametrize("k", [0, 3, 10])
def test_rcka_of_the_foreground(k):
    s = Taps(logits={"p3": rand(2, 30, 5), "p4": rand(2, 7, 5, seed=1)})
    t = Taps(logits={"p3": rand(2, 30, 5, seed=2), "p4": rand(2, 7, 5, seed=3)})
    generator = torch.Generator().manual_seed(4)
    # Classes 0 to 4, background 5, ignored -1.
    s.labels = {
        k: torch.randint(-1, 6, x.shape[:2], generator=generator) for k, x in s.logits.items()
    }
    s.sigmoid = True
    x, y = (torch.cat(list(taps.logits.values()), 1) for taps in (s, t))
    labels = torch.cat(list(s.labels.values()), 1)
    fg = (labels != -1) & (labels != 5)
    rows = [
        sorted(fg[i].nonzero().flatten().tolist(), key=lambda r, i=i: -y[i, r].max())[: k or None]
        for i in range(2)
    ]
    x, y = (torch.cat([z[i, r] for i, r in enumerate(rows)]) for z in (x, y))
    losses = RCKALoss(topk_per_image=k, foreground_only=True)(s, t)
    torch.testing.assert_close(losses["loss_rcka_intra"], rcka_loss(x, y, inter_weight=0))


def test_the_foreground_of_a_box_head():
    """Of a softmax the last column is the background, which is the largest label."""
    x, y = rand(9, 4), rand(9, 4, seed=1)
    labels = torch.tensor([0, 3, 2, -1, 1, 3, 2, 2, 0])
    s, t = Taps(logits={"box": x}, labels={"box": labels}), Taps(logits={"box": y})
    kept = [0, 2, 4, 6, 7, 8]
    losses = RCKALoss(foreground_only=True)(s, t)
    torch.testing.assert_close(sum(losses.values()), rcka_loss(x[kept], y[kept]))


def test_rcka_takes_all_rows_of_a_box_head():
    x, y = rand(9, 4), rand(9, 4, seed=1)
    losses = RCKALoss(topk_per_image=2)(Taps(logits={"box": x}), Taps(logits={"box": y}))
    torch.testing.assert_close(sum(losses.values()), rcka_loss(x, y))


def logit_taps(groups, seed=0, **kwargs):
    return Taps(
        logits={k: rand(*shape, seed=seed + i) for i, (k, shape) in enumerate(groups.items())},
        **kwargs,
    )


def test_kd_by_the_kind_of_head():
    """A softmax of a box head, classes one by one of a dense head, a term for each stage."""
    box = {"box": (9, 4)}
    s, t = logit_taps(box), logit_taps(box, 5)
    loss = KDLoss(weight=2.0, temperature=3.0)(s, t)
    expected = 2 * kd_loss(s.logits["box"], t.logits["box"], temperature=3.0)
    assert list(loss) == ["loss_kd"]
    torch.testing.assert_close(loss["loss_kd"], expected)

    dense = {"p3": (2, 6, 5), "p4": (2, 3, 5)}
    s, t = logit_taps(dense, sigmoid=True), logit_taps(dense, 5, sigmoid=True)
    x, y = (torch.cat(list(z.logits.values()), 1).flatten(0, 1) for z in (s, t))
    loss = KDLoss(topk_per_image=0)(s, t)
    torch.testing.assert_close(loss["loss_kd"], kd_loss(x, y, sigmoid=True))

    stages = {"stage0": (9, 4), "stage1": (9, 4)}
    loss = KDLoss(levels=("stage1",))(logit_taps(stages), logit_taps(stages, 5))
    assert list(loss) == ["loss_kd_stage1"]


def test_dkd_is_of_the_students_labels():
    box = {"box": (9, 4)}
    labels = torch.tensor([0, 3, 2, -1, 1, 3, 2, 2, 0])
    s, t = logit_taps(box, labels={"box": labels}), logit_taps(box, 5)
    loss = DKDLoss(alpha=2.0, beta=3.0, temperature=2.0, weight=4.0)(s, t)
    expected = dkd_loss(
        s.logits["box"], t.logits["box"], labels, alpha=2.0, beta=3.0, temperature=2.0
    )
    torch.testing.assert_close(loss["loss_dkd"], 4 * expected)
    with pytest.raises(UserError, match="use KDLoss"):
        DKDLoss().check_logits(5, sigmoid=True)
    DKDLoss().check_logits(5, sigmoid=False)


def test_dist_by_the_kind_of_head():
    dense = {"p3": (2, 6, 5)}
    s, t = logit_taps(dense, sigmoid=True), logit_taps(dense, 5)
    loss = DISTLoss(inter_weight=2.0, intra_weight=0.5, temperature=2.0)(s, t)
    x, y = (z.logits["p3"].flatten(0, 1) for z in (s, t))
    options = {"inter_weight": 2.0, "intra_weight": 0.5, "temperature": 2.0, "sigmoid": True}
    # The best-scored first: of all rows that is another order, and no other loss.
    torch.testing.assert_close(loss["loss_dist"], dist_loss(x, y, **options))


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        (ATLoss, at_loss),
        (CWDLoss, cwd_loss),
        (PKDLoss, pkd_loss),
        (SPLoss, sp_loss),
        (FCKALoss, fcka_loss),
    ],
)
def test_feature_losses_are_their_functions(loss, function):
    s, t = feature_taps(0), feature_taps(1)
    made = loss(weight=3.0)
    made.attach({"p3": pair("p3"), "p4": pair("p4")})
    assert not made.projections
    losses = made(s, t)
    for level in s.features:
        expected = 3 * function(s.features[level], t.features[level])
        torch.testing.assert_close(losses[f"loss_{made.name}_{level}"], expected)
    temperature = {CWDLoss: {"temperature": 4.0}, FCKALoss: {"center": False}}.get(loss)
    if temperature:
        value = loss(**temperature)(s, t)[f"loss_{made.name}_p3"]
        expected = function(s.features["p3"], t.features["p3"], **temperature)
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    "build",
    [
        ATLoss,
        SPLoss,
        FCKALoss,
        lambda: PCKALoss(patch_size=2, layout="batch"),
        lambda: PCKALoss(patch_size=2, layout="per_image"),
    ],
)
def test_who_needs_no_projection_for_other_channels(build):
    loss = build()
    loss.attach({"p3": pair("p3", 4, 6)})
    assert not list(loss.parameters())
    s, t = feature_taps(0), feature_taps(1)
    t.features["p3"] = rand(2, 6, 8, 8, seed=3)
    s.features["p3"].requires_grad_()
    loss(s, t)[f"loss_{loss.name}_p3"].backward()
    assert s.features["p3"].grad.abs().sum() > 0


def test_with_inter_relations_channels_must_agree():
    loss = PCKALoss(patch_size=2, layout="batch", inter_weight=1.0)
    loss.attach({"p3": pair("p3", 4, 6)})
    assert list(loss.projections) == ["p3"]


def test_batch_norm_of_one_cell():
    ReviewKDLoss().check_maps({"p5": (1, 4, 1, 2)})
    with pytest.raises(UserError, match=r"more than one cell of level 'p5'; raise SOLVER\.IMS_PER"):
        ReviewKDLoss().check_maps({"p4": (1, 4, 2, 2), "p5": (1, 4, 1, 1)})


def test_correlations_of_too_few_classes():
    DISTLoss().check_logits(3, sigmoid=False)
    DISTLoss().check_logits(2, sigmoid=True)
    DISTLoss(inter_weight=0.0).check_logits(1, sigmoid=True)
    for columns, sigmoid in ((2, False), (1, True)):
        with pytest.raises(UserError, match=r"constant, and the heads have \d; set .*INTER_WEIGHT"):
            DISTLoss().check_logits(columns, sigmoid=sigmoid)


def test_the_signed_form_is_no_cka():
    """Two samples on a line correlate by 1 or -1; two of several values are enough."""
    signed = {"form": "signed", "levels": ("p3",)}
    PCKALoss(patch_size=2, **signed).check_maps({"p3": (1, 5, 2, 4)})
    with pytest.raises(UserError, match="has 2 samples, and the CKA of fewer than 3"):
        PCKALoss(patch_size=1, **signed).check_maps({"p3": (1, 5, 1, 2)})
    note = PCKALoss(patch_size=2, **signed).check_maps({"p3": (1, 5, 8, 8)})["p3"]
    assert note == "16 patches of 4 values"


def test_relations_of_too_few_images():
    shapes = {"p3": (2, 4, 8, 8)}
    FCKALoss(center=False).check_maps(shapes)
    SPLoss().check_maps(shapes)
    with pytest.raises(UserError, match="fewer than 3 images is constant, and a batch has 2"):
        FCKALoss().check_maps(shapes)
    for loss in (FCKALoss(center=False), SPLoss()):
        with pytest.raises(UserError, match=r"raise SOLVER\.IMS_PER_BATCH"):
            loss.check_maps({"p3": (1, 4, 8, 8)})


def test_fgd_weighs_objects_and_relates_the_whole():
    s, t = feature_taps(0), feature_taps(1)
    s.images = torch.zeros(2, 3, 32, 32)
    s.boxes = [torch.tensor([[4.0, 4.0, 20.0, 16.0]]), torch.zeros(0, 4)]
    options = {"alpha": 0.3, "beta": 0.2, "gamma": 0.1, "temperature": 0.7}
    loss = FGDLoss(weight=2.0, global_weight=0.5, **options)
    loss.attach({"p3": pair("p3"), "p4": pair("p4")})
    losses = loss(s, t)
    for level, x in s.features.items():
        y = t.features[level]
        focal = fgd_focal_loss(x, y, *object_masks(s.boxes, (32, 32), x), **options)
        # The context blocks start as the identity.
        expected = 2 * (focal + 0.5 * ((x - y) ** 2).sum() / 2)
        torch.testing.assert_close(losses[f"loss_fgd_{level}"], expected)
    context = loss.mine["p3"]
    torch.nn.init.normal_(context.transform[-1].weight)
    x = s.features["p3"]
    w = {k: v.detach().flatten(1) if v.dim() == 4 else v.detach() for k, v in
         context.state_dict().items()}  # fmt: skip
    cells = x.flatten(2)
    attention = (w["attention.weight"] @ cells + w["attention.bias"]).softmax(-1)
    pooled = (cells * attention).sum(-1)
    hidden = pooled @ w["transform.0.weight"].T + w["transform.0.bias"]
    hidden = hidden - hidden.mean(1, keepdim=True)
    hidden = hidden / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = (hidden * w["transform.1.weight"].flatten() + w["transform.1.bias"].flatten()).relu()
    added = hidden @ w["transform.3.weight"].T + w["transform.3.bias"]
    torch.testing.assert_close(context(x), x + added[..., None, None])
    # Without it there is nothing to train.
    alone = FGDLoss(global_weight=0.0)
    alone.attach({"p3": pair("p3")})
    assert not list(alone.parameters())


def test_mgd_generates_from_what_is_left():
    loss = MGDLoss(mask_ratio=0.8, weight=2.0)
    loss.attach({"p3": pair("p3")})
    s, t = feature_taps(0), feature_taps(1)
    seen = []
    loss.generators["p3"].register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    before = torch.get_rng_state()
    first = loss(s, t)
    assert torch.equal(torch.get_rng_state(), before)  # the student's are left alone
    masked, made = seen[0]
    kept = (masked != 0).any(1, keepdim=True)
    assert 0.1 < kept.float().mean() < 0.35
    assert torch.equal(masked, s.features["p3"] * kept)
    # Two 3x3 convolutions, a ReLU between them.
    w = {k.removeprefix("generators.p3."): v for k, v in loss.state_dict().items()}
    conv = torch.nn.functional.conv2d
    hidden = conv(masked, w["0.weight"], w["0.bias"], padding=1).clamp(min=0)
    torch.testing.assert_close(made, conv(hidden, w["2.weight"], w["2.bias"], padding=1))
    torch.testing.assert_close(first["loss_mgd_p3"], 2 * ((made - t.features["p3"]) ** 2).mean())
    loss(s, t)
    assert not torch.equal(seen[1][0] != 0, masked != 0)
    # A resumed run goes on with the masks.
    state = loss.state_dict()
    loss(s, t)
    resumed = MGDLoss(mask_ratio=0.8)
    resumed.attach({"p3": pair("p3")})
    resumed.load_state_dict(state)
    resumed.generators["p3"].register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    resumed(s, t)
    assert torch.equal(seen[-1][0], seen[-2][0])
    # Another seed has others.
    torch.manual_seed(torch.initial_seed() + 1)
    resumed.load_state_dict(state)
    resumed(s, t)
    assert not torch.equal(seen[-1][0], seen[-2][0])


def conv_and_norm(module, x):
    """A convolution and the norm of a batch, by hand."""
    weight = module[0].weight.detach()
    x = torch.nn.functional.conv2d(x, weight, padding=weight.shape[-1] // 2)
    x = x - x.mean((0, 2, 3), keepdim=True)
    return x / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()


def test_reviewkd_fuses_from_the_top():
    loss = ReviewKDLoss(weight=2.0, hidden=6)
    s, t = feature_taps(0), feature_taps(1)
    fine, coarse = LevelPair("p3", "p3", 4, 4, 8, 8), LevelPair("p4", "p4", 4, 4, 16, 16)
    loss.attach({"p3": fine, "p4": coarse})
    losses = loss(s, t)
    assert list(losses) == ["loss_reviewkd_p4", "loss_reviewkd_p3"]
    top, bottom = loss.fusions["p4"], loss.fusions["p3"]
    assert [top.reduce[0].kernel_size, top.expand[0].kernel_size] == [(1, 1), (3, 3)]
    above = conv_and_norm(top.reduce, s.features["p4"])
    made = conv_and_norm(top.expand, above)
    torch.testing.assert_close(losses["loss_reviewkd_p4"], 2 * hcl_loss(made, t.features["p4"]))
    own = conv_and_norm(bottom.reduce, s.features["p3"])
    above = above.repeat_interleave(2, 2).repeat_interleave(2, 3)
    attention = bottom.attention
    share = torch.einsum("oi,bihw->bohw", attention.weight[:, :, 0, 0], torch.cat([own, above], 1))
    share = (share + attention.bias[:, None, None]).sigmoid()
    fused = own * share[:, 0:1] + above * share[:, 1:2]
    made = conv_and_norm(bottom.expand, fused)
    torch.testing.assert_close(losses["loss_reviewkd_p3"], 2 * hcl_loss(made, t.features["p3"]))


# But for one, whose levels are fused before they are compared, padding included.
LOSSES_ON_MAPS = [
    kind
    for _, kind in DISTILL_LOSS_REGISTRY
    if issubclass(kind, FeatureLoss) and kind is not ReviewKDLoss
]
# Two images have no relation once it is centred.
OPTIONS = {PCKALoss: {"patch_size": 2}, FCKALoss: {"center": False}}


@pytest.mark.parametrize("kind", LOSSES_ON_MAPS, ids=lambda kind: kind.__name__)
def test_what_is_padding_teaches_nothing(kind):
    """Whatever the two networks make of it, and none of the gradient goes there."""
    torch.manual_seed(0)
    loss = kind(**OPTIONS.get(kind, {}))
    loss.attach({"p3": pair("p3")})
    found = []
    for seed in (0, 1):
        torch.manual_seed(0)
        if kind is MGDLoss:
            loss.set_extra_state(torch.tensor(0))
        taps = feature_taps(0), feature_taps(1)
        for k, z in enumerate(taps):
            # 40 x 64, 64 x 24 and nothing of the last two rows and columns of cells.
            for i, (h, w) in enumerate([(5, 8), (8, 3)]):
                noise = 9 * rand(4, 8, 8, seed=10 * seed + k)
                z.features["p3"][i, :, h:], z.features["p3"][i, :, :, w:] = (
                    noise[:, h:],
                    noise[:, :, w:],
                )
            z.images, z.sizes = torch.zeros(2, 3, 64, 64), [(40, 64), (64, 24)]
        taps[0].boxes = [
            torch.tensor([[4.0, 4.0, 30.0, 30.0]]),
            torch.tensor([[0.0, 8.0, 20.0, 40.0]]),
        ]
        x = taps[0].features["p3"].requires_grad_()
        value = loss(*taps)["loss_" + loss.name + "_p3"]
        value.backward()
        assert x.grad[0, :, 5:].eq(0).all() and x.grad[1, :, :, 3:].eq(0).all()
        assert x.grad[0, :, :5].abs().sum() > 0
        found.append((value.detach(), x.grad[0, :, :5], x.grad[1, :, :, :3]))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("samples", ["rows", "images"])
def test_pixels_of_padding_are_no_rows(samples):
    options = {"samples": samples, "center": samples == "rows"}
    s = Taps(
        logits={"pixels": rand(2, 4, 4, 3)}, images=torch.zeros(2, 3, 16, 16), background=False
    )
    t = Taps(logits={"pixels": rand(2, 4, 4, 3, seed=1)})
    s.sizes = [(8, 16), (16, 9)]
    x, y = (z.logits["pixels"] for z in (s, t))
    if samples == "rows":
        x, y = (torch.cat([z[0, :2].flatten(0, 1), z[1, :, :3].flatten(0, 1)]) for z in (x, y))
        expected = rcka_loss(x, y)
    else:
        x, y = x.clone(), y.clone()
        for z in (x, y):
            z[0, 2:] = 0
            z[1, :, 3:] = 0
        expected = rcka_loss(x.flatten(1), y.flatten(1), center=False)
    torch.testing.assert_close(sum(RCKALoss(**options)(s, t).values()), expected)


def test_a_loss_of_another_project_needs_no_keys():
    """Registered from anywhere: without a node of keys it has its own defaults."""

    @DISTILL_LOSS_REGISTRY.register()
    class OwnLoss(FeatureLoss):
        def compare(self, level, student, teacher):
            return (student - teacher).abs().mean()

    @DISTILL_LOSS_REGISTRY.register()
    class BareLoss(DistillLoss):
        pass

    try:
        cfg = get_distill_cfg()
        cfg.MODEL.DISTILL.OWN = CfgNode({"WEIGHT": 3.0, "LEVELS": ["p4"]})
        cfg.MODEL.DISTILL.LOSSES = ["OwnLoss", "BareLoss"]
        own, bare = build_losses(cfg)
    finally:
        for name in ("OwnLoss", "BareLoss"):
            DISTILL_LOSS_REGISTRY._obj_map.pop(name)
    assert (own.weight, own.levels, bare.weight) == (3.0, ("p4",), 1.0)


def test_the_weight_falls_to_zero():
    loss = PCKALoss(warmup_iters=2, decay_iters=(4, 8))
    expected = [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert [loss.schedule(i) for i in range(10)] == expected


def test_warm_up_rises_linearly_to_full_weight():
    loss = PCKALoss(warmup_iters=4)
    assert [loss.schedule(i) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert PCKALoss().schedule(0) == 1.0


@pytest.mark.parametrize("name", [name for name, _ in DISTILL_LOSS_REGISTRY])
def test_every_loss_can_be_built_from_its_defaults(name):
    loss = DISTILL_LOSS_REGISTRY.get(name)(get_distill_cfg())
    assert loss.weight == 1.0 and loss.reads


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PCKALoss(weight=-1.0), "weight must not be negative"),
        (lambda: PCKALoss(warmup_iters=-1), "warm-up must not be negative"),
        (lambda: PCKALoss(levels=("p3", "p3")), "named twice"),
        (lambda: PCKALoss(patch_size=0), "whole numbers of at least 1, got \\[0\\]"),
        (lambda: PCKALoss(patch_size=(1.5,)), "whole numbers of at least 1, got \\[1.5\\]"),
        (lambda: PCKALoss(patch_size=(2, 4), levels=("p3",)), "2 patch sizes for 1 levels"),
        (lambda: PCKALoss(layout="x"), "unknown layout 'x'"),
        (lambda: PCKALoss(intra_weight=0.0), "INTRA_WEIGHT and INTER_WEIGHT must be positive"),
        (lambda: PCKALoss(inter_weight=-1.0), "none negative; got 1.0 and -1.0"),
        (lambda: RCKALoss(intra_weight=0.0, inter_weight=0.0), "must be positive"),
        (lambda: RCKALoss(topk_per_image=-1), "RCKALoss: TOPK_PER_IMAGE must not be negative"),
        (lambda: KDLoss(topk_per_image=-1), "KDLoss: TOPK_PER_IMAGE must not be negative"),
        (lambda: RCKALoss(temperature=-1.0), "TEMPERATURE must not be negative"),
        (lambda: PCKALoss(form="x"), "unknown form 'x', expected cka, sqrt, log, signed"),
        (
            lambda: PCKALoss(form="signed", debiased=True),
            "a debiased CKA may be negative, and the form 'signed'",
        ),
        (lambda: PCKALoss(channel_weight="x"), "unknown channel weight 'x', expected equal, var"),
        (
            lambda: PCKALoss(channel_weight="variance", layout="batch"),
            "'batch' has no CKA for each channel to weigh; set CHANNEL_WEIGHT equal",
        ),
        (lambda: PKDLoss(decay_iters=(5,)), r"PKDLoss: the decay is .* got \[5\]"),
        (lambda: PKDLoss(decay_iters=(5, 5)), "from one iteration to a later one"),
        (lambda: CWDLoss(temperature=0.0), "CWDLoss: TEMPERATURE must be positive"),
        (lambda: KDLoss(temperature=0.0), "KDLoss: TEMPERATURE must be positive"),
        (lambda: DISTLoss(temperature=0.0), "DISTLoss: TEMPERATURE must be positive"),
        (lambda: DISTLoss(inter_weight=0.0, intra_weight=0.0), "DISTLoss: one of INTRA_WEIGHT"),
        (lambda: DKDLoss(alpha=0.0, beta=0.0), "DKDLoss: ALPHA and BETA"),
        (lambda: FGDLoss(gamma=-1.0), "FGDLoss: ALPHA, BETA, GAMMA and GLOBAL_WEIGHT"),
        (lambda: MGDLoss(mask_ratio=1.0), r"MASK_RATIO must be in \[0, 1\), got 1.0"),
        (lambda: ReviewKDLoss(hidden=-1), "HIDDEN must not be negative"),
    ],
)
def test_settings_that_cannot_work(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(
    ("kwargs", "shape", "message"),
    [
        ({"patch_size": 4}, (8, 5, 3, 9), r"a patch of 4 is larger than .*PATCH_SIZE \[2\]$"),
        ({"patch_size": 4}, (8, 5, 4, 8), r"intra relation has 2 samples.* on level 'p3' \(4 x 8"),
        ({"patch_size": 4, "center": False}, (8, 5, 4, 4), "has 1 samples, .* fewer than 2"),
        ({"patch_size": 64}, (8, 5, 40, 40), r"PATCH_SIZE \[32\]$"),
        ({"patch_size": 1}, (8, 5, 1, 1), "no size fits: change the relations or the levels"),
        ({"patch_size": 2, "debiased": True}, (8, 5, 2, 6), "fewer than 4"),
        ({"patch_size": 2, "debiased": True, "center": False}, (8, 5, 2, 6), "fewer than 4"),
        ({"patch_size": 3, "layout": "sample"}, (2, 5, 3, 3), "has 2 samples"),
        (
            {"patch_size": 1, "layout": "sample", "inter_weight": 1.0, "intra_weight": 0.0},
            (8, 5, 9, 9),
            "the inter relation has 1 samples",
        ),
    ],
)
def test_patches_that_leave_nothing_to_compare(kwargs, shape, message):
    loss = PCKALoss(levels=("p3",), **kwargs)
    with pytest.raises(UserError, match=message):
        loss.check_maps({"p3": shape})


def test_patches_that_fit():
    PCKALoss(patch_size=4).check_maps({"p3": (1, 5, 8, 8)})
    PCKALoss(patch_size=3, layout="sample").check_maps({"p3": (8, 5, 3, 3)})
    PCKALoss(patch_size=4, center=False).check_maps({"p3": (1, 5, 4, 8)})


@pytest.mark.parametrize("last", [(2, 5, 4, 4), (2, 5, 1, 1)])
def test_the_advice_for_several_levels_fits(last):
    """Followed to the letter it leads to no other error."""
    shapes = {"p3": (2, 5, 16, 16), "p4": (2, 5, 8, 8), "p5": last}
    with pytest.raises(UserError) as e:
        PCKALoss(patch_size=8).check_maps(shapes)
    advice = re.search(r"PATCH_SIZE (\[.*?\]) and LEVELS (\[.*?\])$", str(e.value)).groups()
    sizes, levels = map(ast.literal_eval, advice)
    assert sizes == ([8, 4, 2] if last[2] == 4 else [8, 4])
    assert levels == list(shapes)[: len(sizes)]
    PCKALoss(patch_size=sizes, levels=levels).check_maps({k: shapes[k] for k in levels})


def test_maps_too_small_while_training_are_told_once(caplog):
    """Nobody said how small they would be: no config, or images of extreme shapes."""
    logging.getLogger("detectron2").propagate = True
    loss = PCKALoss(patch_size=4)
    for _ in range(3):
        loss(feature_taps(0), feature_taps(1))
    assert caplog.text.count("that relation teaches nothing") == 1
    assert "level 'p4' (4 x 4 cells)" in caplog.text


@pytest.mark.parametrize(
    ("layout", "debiased"), [("spatial", False), ("sample", False), ("sample", True)]
)
def test_the_cka_of_unrelated_maps_is_told(layout, debiased):
    options = {"patch_size": 2, "layout": layout, "debiased": debiased}
    note = PCKALoss(inter_weight=1.0, **options).check_maps({"p3": (2, 200, 16, 12)})["p3"]
    patches, values, intra, inter = re.fullmatch(
        r"(\d+) patches of (\d+) values; CKA of unrelated maps: intra (\S+), inter (\S+)", note
    ).groups()
    assert int(patches) * int(values) == 2 * 16 * 12
    x, y = rand(2, 200, 16, 12), rand(2, 200, 16, 12, seed=1)
    for told, weights in ((intra, (1, 0)), (inter, (0, 1))):
        weights = dict(zip(("intra_weight", "inter_weight"), weights))
        actual = 1 - pcka_loss(x, y, **options, **weights)
        # The unbiased estimator of few samples is a ratio of noisy numbers.
        assert float(told) == pytest.approx(actual.item(), abs=0.02 if not debiased else 0.1)
    assert "inter" not in PCKALoss(**options).check_maps({"p3": (2, 200, 16, 12)})["p3"]


def test_rcka_reads_the_levels_it_is_given():
    s = Taps(logits={"p3": rand(2, 30, 5), "p4": rand(2, 7, 5, seed=1)})
    t = Taps(logits={"p3": rand(2, 30, 5, seed=2), "p4": rand(2, 7, 5, seed=3)})
    only = RCKALoss(levels=("p4",), topk_per_image=4)(s, t)
    alone = [Taps(logits={"p4": x.logits["p4"]}) for x in (s, t)]
    expected = RCKALoss(topk_per_image=4)(*alone)
    assert only == expected


def test_classes_too_few_to_relate():
    RCKALoss().check_logits(3, sigmoid=True)
    RCKALoss(center=False).check_logits(2, sigmoid=True)
    RCKALoss(inter_weight=0.0).check_logits(1, sigmoid=True)
    with pytest.raises(UserError, match=r"have 2; set MODEL\.DISTILL\.RCKA\.INTER_WEIGHT 0"):
        RCKALoss().check_logits(2, sigmoid=True)
    with pytest.raises(UserError, match="softmax of one class"):
        RCKALoss(inter_weight=0.0, temperature=2.0).check_logits(1, sigmoid=False)
    RCKALoss(inter_weight=0.0, temperature=2.0).check_logits(1, sigmoid=True)
