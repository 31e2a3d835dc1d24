"""Training batches: their order and groups, from any batch on, with any number of workers."""

import itertools
import logging
import random

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from helpers import digits_cfg

from pcka_distill import UserError
from pcka_distill.data.loader import ResumableLoader, build_train_loader, own_random_numbers

SIZES = [(30, 20), (20, 30), (25, 25), (40, 10), (10, 40), (30, 29), (20, 21)]
RECORDS = [
    {"file_name": f"{i}.png", "image_id": i, "width": w, "height": h}
    for i, (w, h) in enumerate(SIZES)
]


def mapper(record):
    """What it drew from each of the three generators."""
    return {**record, "drawn": (random.random(), np.random.rand(), torch.rand(1).item())}


def make(mapper=mapper, records=RECORDS, sampler=None, **kwargs):
    sampler = sampler or TrainingSampler(len(records), seed=3)
    return ResumableLoader(records, sampler, mapper, 3, seed=5, **kwargs)


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


@pytest.mark.parametrize("group", [True, False])
def test_order_and_groups_are_detectron2s(group):
    """Of its newer versions with no worker: with several they shuffle groups among themselves."""
    stock = build_detection_train_loader(
        RECORDS, mapper=mapper, sampler=TrainingSampler(len(RECORDS), seed=3),
        total_batch_size=3, aspect_ratio_grouping=group,
    )  # fmt: skip
    mine = take(make(group_by_aspect=group), 30)
    theirs = take(stock, 30)
    assert [[x["image_id"] for x in b] for b in mine] == [
        [x["image_id"] for x in b] for b in theirs
    ]


@pytest.mark.parametrize("first", [1, 2, 13, 29])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_begin_anywhere_and_do_not_depend_on_workers(first, workers):
    """With all that was drawn for each image."""
    expected = take(make(), 40)
    loader = make(num_workers=workers)
    loader.first_batch = first
    assert take(loader, 40 - first) == expected[first:]


def test_images_draw_numbers_of_their_own():
    drawn = [x["drawn"] for b in take(make(), 40) for x in b]
    assert len(set(drawn)) == len(drawn)
    other = make()
    other._seed = 6
    assert not set(drawn) & {x["drawn"] for b in take(other, 40) for x in b}


def test_nobody_elses_random_numbers_are_moved():
    def state():
        return random.getstate(), tuple(np.random.get_state()[1]), torch.get_rng_state().tolist()

    batches = iter(make())
    before = state()
    next(batches)
    assert state() == before
    with own_random_numbers(7):
        seeded = random.random(), np.random.rand(), torch.rand(1).item()
        with own_random_numbers(7):
            assert (random.random(), np.random.rand(), torch.rand(1).item()) == seeded
    assert state() == before


def test_what_stands_in_for_an_image_without_objects_is_of_its_group():
    """So that batches are known without reading images."""

    def some(record):
        return None if record["image_id"] in (0, 1, 3) else mapper(record)

    batches = take(make(some), 40)
    assert {x["image_id"] for b in batches for x in b} == {2, 4, 5, 6}
    for batch in batches:
        assert len({x["width"] > x["height"] for x in batch}) == 1
    loader = make(some)
    loader.first_batch = 17
    assert take(loader, 23) == batches[17:]


def test_a_mapper_that_makes_nothing():
    with pytest.raises(UserError, match=r"made nothing of 100 images in a row; change INPUT.CROP"):
        take(make(lambda record: None), 1)


def unreadable(record):
    if record["image_id"] in (1, 4):
        raise OSError("image file is truncated")
    return mapper(record)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_told_by_name(workers):
    message = r"image [14].png cannot be read \(image file is truncated\); .*MAX_UNREADABLE .* 0 to"
    with pytest.raises(UserError, match=message):
        take(make(unreadable, num_workers=workers), 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_counted(workers, caplog):
    logging.getLogger("detectron2").propagate = True
    batches = take(make(unreadable, num_workers=workers, max_unreadable=2), 40)
    assert {x["image_id"] for b in batches for x in b} == {0, 2, 3, 5, 6}
    told = list(dict.fromkeys(m for m in caplog.messages if "cannot be read" in m))
    assert len(told) == 2 and "1. of at most 2" in told[0] and "2. of at most 2" in told[1]
    with pytest.raises(UserError, match=r"to more than 1 to leave out"):
        take(make(unreadable, max_unreadable=1), 40)


def test_a_fault_of_the_mapper_is_no_fault_of_the_image():
    def broken(record):
        raise KeyError("annotations")

    with pytest.raises(KeyError, match="annotations"):
        take(make(broken, max_unreadable=100), 1)


def test_a_loader_of_a_config(digits):
    cfg = digits_cfg("retinanet", "SEED", 11, "SOLVER.IMS_PER_BATCH", 2)
    loader = build_train_loader(cfg, digits)
    batches = take(loader, 2)
    assert all(
        len(b) == 2 and {"image", "instances", "image_id"} <= x.keys() for b in batches for x in b
    )
    with pytest.raises(UserError, match=r"training data cannot be sampled: Unknown training samp"):
        build_train_loader(digits_cfg("retinanet", "DATALOADER.SAMPLER_TRAIN", "No"), digits)
    mine = build_train_loader(cfg, digits, mapper=lambda record: {"mine": record["image_id"]})
    assert set(take(mine, 1)[0][0]) == {"mine"}
