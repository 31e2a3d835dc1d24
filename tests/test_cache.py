"""The teacher's cache: nothing changes but the time that the teacher takes."""

import hashlib
import logging
import os
import stat

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import distill_cfg, make_batch

from pcka_distill import UserError
from pcka_distill.cache import FeatureCache
from pcka_distill.teacher import fingerprint


def maps_of(images, factor=1.0):
    """Something that depends on the pixels, as a backbone's maps do."""
    x = torch.stack([image.float() for image in images])
    return {"p3": factor * x[..., ::8, ::8] / 7, "p4": factor * x.mean((1, 2, 3), keepdim=True)}


class Counter:
    """Computes maps, and counts how often it is asked to."""

    def __init__(self, images, factor=1.0):
        self.images, self.factor, self.calls = images, factor, 0

    def __call__(self):
        self.calls += 1
        return maps_of(self.images, self.factor)


@pytest.fixture
def images():
    return [x["image"] for x in make_batch()]


def fetch(cache, images, counter, size=(96, 96), levels=("p3", "p4")):
    return cache.fetch(images, levels, size, torch.device("cpu"), counter)


def entries(folder):
    return sorted(folder.glob("*/*/*.pt"))


def test_what_was_written_is_read(images, tmp_path):
    cold, warm = Counter(images), Counter(images)
    first = fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images, cold)
    second = fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images[::-1], warm)
    assert (cold.calls, warm.calls) == (1, 0) and len(entries(tmp_path)) == 2
    for level, exact in maps_of(images).items():
        torch.testing.assert_close(first[level], exact, rtol=1e-3, atol=1e-2)
        # Each image by itself, in the batch's order.
        assert torch.equal(second[level], first[level].flip(0))


@pytest.mark.parametrize("change", ["teacher", "pixel", "padding", "levels", "one image"])
def test_whatever_changes_the_maps_is_computed_again(change, images, tmp_path):
    fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images, Counter(images))
    owner, size, levels = "teacher", (96, 96), ("p3", "p4")
    if change == "teacher":
        owner = "another"
    elif change == "levels":
        levels = ("p3",)
    elif change == "padding":
        size = (96, 128)
    else:
        images = [x.clone() for x in images]
        images[0][0, 0, 0] += 1
        if change == "pixel":
            images[1] = images[0]
    counter = Counter(images)
    cache = FeatureCache(tmp_path, 1 << 30, owner)
    maps = fetch(cache, images, counter, size, levels)
    assert counter.calls == 1
    assert cache.hits == (change == "one image")
    torch.testing.assert_close(maps["p3"], maps_of(images)["p3"], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "empty", "a folder"])
def test_a_damaged_entry_is_computed_again(damage, images, tmp_path, caplog):
    fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images, Counter(images))
    for path in entries(tmp_path):
        data = bytearray(path.read_bytes())
        if damage == "flipped bit":
            data[len(data) // 2] ^= 1
        path.unlink()
        if damage == "a folder":
            path.mkdir()
        else:
            end = {"cut off": len(data) - 9, "empty": 0}.get(damage, len(data))
            path.write_bytes(bytes(data[:end]))
    cache, counter = FeatureCache(tmp_path, 1 << 30, "teacher"), Counter(images)
    with caplog.at_level(logging.WARNING):
        maps = fetch(cache, images, counter)
    assert counter.calls == 1 and cache.damaged == 2
    assert sum("is computed again" in r.message for r in caplog.records) == 1
    torch.testing.assert_close(maps["p3"], maps_of(images)["p3"], rtol=1e-3, atol=1e-2)
    if damage != "a folder":
        again = Counter(images)
        fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images, again)
        assert again.calls == 0


def test_no_more_than_its_bound_is_written(images, tmp_path, caplog):
    fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images[:1], Counter(images[:1]))
    bound = entries(tmp_path)[0].stat().st_size * 3 // 2
    cache = FeatureCache(tmp_path, bound, "teacher")
    others = [x["image"] for i in (1, 2) for x in make_batch(i)]
    with caplog.at_level(logging.WARNING):
        for image in others:
            fetch(cache, [image], Counter([image]))
    assert len(entries(tmp_path)) == 1
    assert sum("it is full" in r.message for r in caplog.records) == 1
    # What is there is still used.
    counter = Counter(images[:1])
    fetch(cache, images[:1], counter)
    assert counter.calls == 0


def test_a_disk_that_fails_does_not_stop_a_run(images, tmp_path, caplog, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    cache = FeatureCache(tmp_path, 1 << 30, "teacher")
    monkeypatch.setattr("os.replace", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fetch(cache, images, Counter(images))
    assert sum("No space left" in r.message for r in caplog.records) == 1
    assert not [x for x in tmp_path.rglob("*") if x.is_file()]


def test_an_entry_of_another_torch_is_computed_again(images, tmp_path):
    """Whole, but nothing that this version can read."""
    fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images, Counter(images))
    data = b"no zip file"
    for path in entries(tmp_path):
        path.write_bytes(hashlib.blake2b(data, digest_size=16).digest() + data)
    cache, counter = FeatureCache(tmp_path, 1 << 30, "teacher"), Counter(images)
    fetch(cache, images, counter)
    assert counter.calls == 1 and cache.damaged == 2


def test_what_a_killed_process_left_is_counted_and_cleared(images, tmp_path, caplog):
    fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images, Counter(images))
    path = entries(tmp_path)[0]
    fresh, stale = (path.with_suffix(f".{name}.tmp") for name in ("1", "2"))
    for leftover in (fresh, stale):
        leftover.write_bytes(bytes(1 << 20))
    os.utime(stale, (0, 0))
    with caplog.at_level(logging.WARNING):
        FeatureCache(tmp_path, 1 << 20, "teacher")
    assert fresh.exists() and not stale.exists()
    assert sum("it is full; nothing more is written" in r.message for r in caplog.records) == 1


def test_runs_that_share_a_folder_see_what_the_others_write(tmp_path, monkeypatch):
    monkeypatch.setattr("pcka_distill.cache._MEASURE_EVERY", 1)
    image = make_batch()[0]["image"]
    fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), [image], Counter([image]))
    bound = entries(tmp_path)[0].stat().st_size * 7 // 2
    caches = [FeatureCache(tmp_path, bound, f"teacher {i}") for i in range(4)]
    for i in range(3):
        image = make_batch(i)[0]["image"]
        for cache in caches:
            fetch(cache, [image], Counter([image]))
    assert len(entries(tmp_path)) <= 4


def test_whoever_may_read_the_folder_may_read_its_entries(images, tmp_path):
    before = os.umask(0o027)
    try:
        fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images, Counter(images))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(x.stat().st_mode) for x in entries(tmp_path)} == {0o640}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_not_kept(value, images, tmp_path):
    def compute():
        return {k: torch.full_like(x, value) for k, x in maps_of(images).items()}

    maps = fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images, compute)
    assert not maps["p3"].isfinite().any() and not entries(tmp_path)


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e5])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_neither_scale_nor_offset_costs_digits(factor, offset, images, tmp_path):
    """What a CKA sees is the rest, and it is blind to both."""

    def compute():
        return {k: factor * (x + offset) for k, x in maps_of(images).items()}

    maps = fetch(FeatureCache(tmp_path, 1 << 30, "teacher"), images, compute)["p3"]
    exact = compute()["p3"]
    kept, true = (x - x.mean((-2, -1), keepdim=True) for x in (maps, exact))
    assert (kept - true).abs().max() <= 1e-3 * true.abs().max()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"change MODEL\.DISTILL\.TEACHER\.CACHE\.DIR"):
        FeatureCache(tmp_path / "file" / "cache", 1 << 30, "teacher")


def test_a_fingerprint_is_of_all_that_a_teacher_computes_with(teacher_files):
    cfg = distill_cfg("retinanet", teacher_files["retinanet"])
    teacher = build_model(cfg).teacher.model
    seen = {fingerprint(teacher)}
    assert fingerprint(build_model(cfg).teacher.model) in seen
    teacher.pixel_mean += 1
    seen.add(fingerprint(teacher))
    teacher.head.cls_score.bias.data[0] += 1
    assert fingerprint(teacher) not in seen and len(seen) == 2


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn"])
def test_a_run_is_the_same_cold_and_warm(family, teacher_files, tmp_path):
    """With logits too: heads are run on what was kept, and the backbone is not run at all."""
    losses = []
    for expected_calls in (3, 0):
        torch.manual_seed(0)
        model = build_model(
            distill_cfg(
                family, teacher_files[family],
                "MODEL.DISTILL.LOSSES", ["PCKALoss", "RCKALoss"],
                "MODEL.DISTILL.TEACHER.CACHE.DIR", str(tmp_path),
            )
        )  # fmt: skip
        calls = []
        model.teacher.model.backbone.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        for i in range(3):
            with EventStorage(i) as storage:
                torch.manual_seed(i)
                losses.append(model(make_batch(i)))
            assert storage.latest()["teacher_cache_hits"][0] == (expected_calls == 0)
        assert len(calls) == expected_calls
    for cold, warm in zip(losses[:3], losses[3:]):
        assert all(torch.equal(cold[k], warm[k]) for k in cold)


@pytest.mark.parametrize("change", ["config", "precision"])
def test_another_way_to_run_the_same_weights_is_another_teacher(change, teacher_files, tmp_path):
    """Settings without a weight of their own count, and the student's autocast does not."""
    base = ["MODEL.DISTILL.TEACHER.CACHE.DIR", str(tmp_path)]
    other = ["MODEL.DISTILL.TEACHER.OPTS", ["MODEL.FPN.FUSE_TYPE", "avg"]]
    if change == "precision":
        other = ["MODEL.DISTILL.TEACHER.PRECISION", "bfloat16"]
    for opts, autocast, hits in (
        ([], False, 0),
        ([], True, 1),
        (other, False, 0),
        (other, True, 1),
    ):
        model = build_model(distill_cfg("retinanet", teacher_files["retinanet"], *base, *opts))
        with EventStorage(0), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(make_batch())
        assert model.teacher.cache.hits == 2 * hits


@pytest.mark.parametrize("size", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bound_that_is_none(size, teacher_files, tmp_path):
    with pytest.raises(UserError, match=r"CACHE\.MAX_GB is .*; it must be positive"):
        build_model(
            distill_cfg(
                "retinanet", teacher_files["retinanet"],
                "MODEL.DISTILL.TEACHER.CACHE.DIR", str(tmp_path),
                "MODEL.DISTILL.TEACHER.CACHE.MAX_GB", size,
            )
        )  # fmt: skip


def test_random_sizes_are_warned_of(teacher_files, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        build_model(
            distill_cfg(
                "retinanet", teacher_files["retinanet"],
                "MODEL.DISTILL.TEACHER.CACHE.DIR", str(tmp_path),
                "INPUT.MIN_SIZE_TRAIN", (96, 128),
            )
        )  # fmt: skip
    assert any("they will seldom come back" in r.message for r in caplog.records)


def test_only_the_levels_that_are_read_are_kept(teacher_files, tmp_path):
    sizes = []
    for level in ("p3", "p5"):
        model = build_model(
            distill_cfg(
                "retinanet", teacher_files["retinanet"],
                "MODEL.DISTILL.PCKA.LEVELS", (level,),
                "MODEL.DISTILL.TEACHER.CACHE.DIR", str(tmp_path / level),
            )
        )  # fmt: skip
        with EventStorage(0):
            model(make_batch())
        sizes.append(entries(tmp_path / level)[0].stat().st_size)
    assert sizes[0] > 4 * sizes[1]
