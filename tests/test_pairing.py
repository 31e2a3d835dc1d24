import pytest
import torch
from detectron2.layers import ShapeSpec

from pcka_distill import UserError
from pcka_distill.pairing import align, describe, pair_levels


def pyramid(channels, **strides):
    return {k: ShapeSpec(channels=channels, stride=v) for k, v in strides.items()}


FPN = pyramid(256, p2=4, p3=8, p4=16, p5=32, p6=64)
RETINA = pyramid(256, p3=8, p4=16, p5=32, p6=64, p7=128)


def test_levels_are_matched_by_stride():
    pairs = pair_levels(RETINA, FPN)
    assert [(p.student, p.teacher) for p in pairs.values()] == [
        (f"p{i}",) * 2 for i in (3, 4, 5, 6)
    ]
    assert describe(pairs).splitlines()[0].endswith("<- p3 (256 channels, stride 8)")


def test_same_stride_under_other_names_and_channels():
    pairs = pair_levels(RETINA, pyramid(96, res3=8, res4=16), ["p3", "p4"])
    assert [(p.teacher, p.teacher_channels) for p in pairs.values()] == [("res3", 96), ("res4", 96)]
    assert "p3 (256 channels, stride 8) <- res3 (96 channels, stride 8)" in describe(pairs)


def test_same_name_wins_among_equal_strides():
    teacher = pyramid(256, res5=32, p5=32)
    assert pair_levels(RETINA, teacher, ["p5"])["p5"].teacher == "p5"


def test_nearest_stride_is_resized_only_on_request():
    teacher = pyramid(256, p2=4)
    assert pair_levels(RETINA, teacher, ["p3"])["p3"].teacher_stride == 4
    assert "the teacher's resized" in describe(pair_levels(RETINA, teacher, ["p3"]))
    with pytest.raises(UserError, match="no level of the two feature pyramids matches"):
        pair_levels(RETINA, teacher)


@pytest.mark.parametrize(
    ("levels", "message"),
    [(["p9"], "unknown level 'p9'"), (["p7"], "level 'p7' has no counterpart")],
)
def test_what_cannot_be_paired_lists_both_sides(levels, message):
    teacher = pyramid(64, res2=4, res3=8)
    with pytest.raises(UserError, match=message) as e:
        pair_levels(RETINA, teacher, levels)
    assert "student has p3 (stride 8, 256 channels)" in str(e.value)
    assert "teacher has res2 (stride 4, 64 channels)" in str(e.value)
    assert "\n" not in str(e.value)


def test_align_cuts_padding_and_resizes():
    student = {"p3": torch.zeros(1, 4, 12, 12), "p4": torch.zeros(1, 4, 6, 6)}
    ramp = torch.arange(16.0).expand(1, 5, 16, 16)
    pairs = pair_levels(
        pyramid(4, p3=8, p4=16), {"a": ShapeSpec(channels=5, stride=8)}, ["p3", "p4"]
    )
    out = align({"a": ramp}, student, pairs, (96, 96))
    # Same stride: the student's extent of the map, untouched.
    assert torch.equal(out["p3"], ramp[..., :12, :12])
    # Twice the stride: column j covers columns 2j and 2j + 1.
    expected = torch.tensor([0.5, 2.5, 4.5, 6.5, 8.5, 10.5]).expand(1, 5, 6, 6)
    torch.testing.assert_close(out["p4"], expected)
