import ast
import logging
import re

import pytest
import torch

from pcka_distill import (
    DISTILL_LOSS_REGISTRY,
    MimicLoss,
    PCKALoss,
    RCKALoss,
    Taps,
    UserError,
    get_distill_cfg,
)
from pcka_distill.functional import pcka_loss, rcka_loss
from pcka_distill.pairing import LevelPair


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
    s.foreground = {"p3": rand(2, 30, seed=4) > 1, "p4": rand(2, 7, seed=5) > 1}
    x, y = (torch.cat(list(taps.logits.values()), 1) for taps in (s, t))
    fg = torch.cat(list(s.foreground.values()), 1)
    rows = [
        sorted(fg[i].nonzero().flatten().tolist(), key=lambda r, i=i: -y[i, r].max())[: k or None]
        for i in range(2)
    ]
    x, y = (torch.cat([z[i, r] for i, r in enumerate(rows)]) for z in (x, y))
    losses = RCKALoss(topk_per_image=k)(s, t)
    torch.testing.assert_close(losses["loss_rcka_intra"], rcka_loss(x, y, inter_weight=0))


def test_rcka_takes_all_rows_of_a_box_head():
    x, y = rand(9, 4), rand(9, 4, seed=1)
    losses = RCKALoss(topk_per_image=2)(Taps(logits={"box": x}), Taps(logits={"box": y}))
    torch.testing.assert_close(sum(losses.values()), rcka_loss(x, y))


def test_warm_up_rises_linearly_to_full_weight():
    loss = PCKALoss(warmup_iters=4)
    assert [loss.schedule(i) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert PCKALoss().schedule(0) == 1.0


@pytest.mark.parametrize("name", ["PCKALoss", "RCKALoss", "MimicLoss"])
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
        (lambda: RCKALoss(topk_per_image=-1), "must not be negative"),
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
    RCKALoss().check_logits(3)
    RCKALoss(center=False).check_logits(2)
    RCKALoss(inter_weight=0.0).check_logits(1)
    with pytest.raises(UserError, match=r"have 2; set MODEL\.DISTILL\.RCKA\.INTER_WEIGHT 0"):
        RCKALoss().check_logits(2)
    with pytest.raises(UserError, match="softmax of one class"):
        RCKALoss(inter_weight=0.0, temperature=2.0).check_logits(1)
