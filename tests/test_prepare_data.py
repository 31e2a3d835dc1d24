"""tools/prepare_data.py: what it finds is what training leaves out or refuses."""

import collections
import contextlib
import copy
import functools
import io
import json
import logging
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from helpers import REPO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from pcka_distill import UserError, engine, get_distill_cfg
from pcka_distill.build import merge_config
from pcka_distill.data.prepare import (
    _styles,
    check_dataset,
    compare_classes,
    draw_sheet,
    prepare_data,
    read_dataset,
    split_images,
    teacher_classes,
)

GRAY = 128
WIDTH, HEIGHT = 60, 40


def coco():
    """Six images of 60 x 40 pixels with two boxes each, one of which is medium by COCO's area."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT, "video_id": i // 2}
        for i in range(1, 7)
    ]
    annotations = []
    for x in images:
        for box, category in (([5, 5, 10, 12], 3), ([12, 2, 40, 35], 7)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": x["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"year": 2026},
        "licenses": [{"id": 1, "name": "mine"}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The pictures of coco(), and some that are not of it."""
    folder = tmp_path_factory.mktemp("data") / "images"
    (folder / "other").mkdir(parents=True)
    picture = Image.new("RGB", (WIDTH, HEIGHT), (GRAY, GRAY, GRAY))
    for i in range(1, 7):
        picture.save(folder / f"{i}.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.save(folder / "other" / "turned.jpg", exif=exif)
    (folder / "other" / "text.png").write_text("no image")
    (folder / "other" / "notes.txt").write_text("no image, and not called one")
    return folder


OTHERS = "images on disk that the json does not list"


@pytest.fixture
def write(images):
    """Write a json beside the images."""
    file = images.parent / "pets.json"

    def write_json(content):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write_json


def check(file, images, **options):
    return check_dataset(read_dataset(file, images), **options)


def findings(report):
    return {x.what: x.ids for x in report.findings.values() if x.what != OTHERS}


def trained_on(file, images):
    """(images, boxes) that a training would see of a json; its error if it refuses it."""
    register_coco_instances("prepared", {}, str(file), str(images))
    try:
        load = functools.partial(get_detection_dataset_dicts, ["prepared"], filter_empty=False)
        records = engine._records(["prepared"], load, tell=False)
        return len(records), sum(len(x["annotations"]) for x in records)
    finally:
        DatasetCatalog.remove("prepared")
        MetadataCatalog.pop("prepared", None)


# ---- checking ---------------------------------------------------------------------------------


def test_nothing_is_wrong(images, write, capsys):
    file = write(coco())
    assert prepare_data(file, images)
    said = capsys.readouterr().out
    assert f"{file}: 6 images, 12 objects, 2 categories" in said
    # By id, and not as they are listed.
    assert (
        "  id    category      objects    images\n  3     cat                 6         6" in said
    )
    assert "  7     dog                 6         6\n" in said
    assert "  image width          60     60        60\n" in said
    assert "  objects in an image  2      2         2\n" in said
    assert "6 small (under 32 x 32 pixels), 6 medium, 0 large (from 96 x 96)" in said
    assert f"\n{file} can be trained on\n" in said
    report = check(file, images)
    assert report.usable and findings(report) == {}
    # Of the folder's other files those that are called pictures.
    assert report.findings[OTHERS].ids == ["other/text.png", "other/turned.jpg"]


def change(*path):
    """A change of coco(): keys, and the value that comes last."""

    def apply(content):
        node = content
        for key in path[:-2]:
            node = node[key]
        node[path[-2]] = path[-1]

    return apply


def box(value, i=0):
    return change("annotations", i, "bbox", value)


def drop(part, i, key):
    return lambda content: content[part][i].pop(key)


def mask(value, i=0):
    """One mask, where all others are right."""

    def apply(content):
        for a in content["annotations"]:
            a["segmentation"] = [[1, 1, 9, 1, 9, 9]]
        content["annotations"][i]["segmentation"] = value

    return apply


NOT_FINITE = "boxes that are not four finite numbers"
EVALUATION = "objects that COCO's evaluation refuses"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([box([float("nan"), 5, 10, 12])], {NOT_FINITE: [1], EVALUATION: [1]}),
        ([box([5, 10, 12], 3)], {NOT_FINITE: [4], EVALUATION: [4]}),
        ([box([4, 5, 10**400, 12])], {NOT_FINITE: [1], EVALUATION: [1]}),
        ([drop("annotations", 2, "bbox")], {NOT_FINITE: [3], EVALUATION: [3]}),
        ([box([5, 5, 0, 12]), box([5, 5, 9, -1], 4)], {"boxes without an area": [1, 5]}),
        (
            [box([60, 5, 10, 12]), box([-9, 5, 9, 12], 1), box([4, 40, 9, 9], 2)],
            {"boxes outside of their image": [1, 2, 3]},
        ),
        (
            [
                change("images", 1, "width", None),
                change("images", 3, "height", 0),
                change("images", 3, "file_name", "gone.png"),
            ],
            {"images without a size": [2, 4]},
        ),
        ([change("annotations", 5, "image_id", 99)], {"objects of unknown images": [6]}),
        (
            [mask([[1, 1, 2, 2]]), mask([[1, 1, 9, 1, 9, 9]])],
            {},
        ),
        ([mask([[1, 1, 2, 2]], 8)], {"masks without a polygon of three points": [9]}),
        # Harmless.
        (
            [box([-1, 5, 10, 12]), box([5, 5, 55, 35.005], 1), box([5, 5, 55.5, 12], 2)],
            {"boxes partly outside of their image": [1, 3]},
        ),
        ([change("annotations", 5, "iscrowd", 1)], {"crowd objects": [6]}),
        (
            [change("annotations", i, "image_id", 1) for i in (4, 5)],
            {"images without objects (or crowds alone)": [3]},
        ),
        (
            [change("annotations", i, "iscrowd", 1) for i in (4, 5)],
            {"crowd objects": [5, 6], "images without objects (or crowds alone)": [3]},
        ),
        (
            [lambda x: x["categories"].append({"id": 1, "name": "cow"})],
            {"categories without objects": [1]},
        ),
        ([change("categories", 0, "name", "cat")], {"category names that are used again": ["cat"]}),
        (
            [change("images", 4, "file_name", "./1.png")],
            {"images of a file that another one has": [5]},
        ),
        ([mask([[1, 1, 9, 1, 9, 9], [1, 2]], 2)], {"masks that are malformed": [3]}),
        ([mask([[1, 1, 9, 1, 9, float("inf")]], 2)], {"masks that are malformed": [3]}),
        (
            [mask({"size": [HEIGHT, WIDTH], "counts": [1, 2]}, 2)],
            {"masks that are malformed": [3]},
        ),
        (
            [mask({"size": [WIDTH, HEIGHT], "counts": "abc"}, 2)],
            {"masks that are malformed": [3]},
        ),
        ([mask({"size": [HEIGHT, WIDTH], "counts": [5, WIDTH * HEIGHT - 5]}, 2)], {}),
        ([mask([], 2)], {"objects without a mask": [3]}),
        ([drop("annotations", 0, "area"), drop("annotations", 7, "iscrowd")], {EVALUATION: [1, 8]}),
    ],
)
def test_what_is_left_out_or_harmless(changes, expected, images, write):
    content = coco()
    for apply in changes:
        apply(content)
    file = write(content)
    report = check(file, images)
    assert findings(report) == expected
    assert report.usable
    n_images, n_boxes = trained_on(file, images)
    assert (report.images_left_out, report.boxes_left_out) == (6 - n_images, 12 - n_boxes)
    left_out = [x for x in report.findings.values() if x.then == "left out"]
    assert bool(left_out) == ((n_images, n_boxes) != (6, 12))
    if left_out:
        assert (
            f"can be trained on; {12 - n_boxes} boxes and {6 - n_images} images" in report.verdict
        )
    else:
        assert report.verdict == "can be trained on"


@pytest.mark.parametrize(
    ("changes", "what", "ids"),
    [
        ([change("images", 1, "id", 1)], "image ids that are used again", [1]),
        ([change("annotations", 4, "id", 2)], "annotation ids that are used again", [2]),
        ([change("categories", 0, "id", 3)], "category ids that are used again", [3]),
        ([change("annotations", 4, "category_id", 4)], "objects of unknown categories", [5]),
        ([box(None), box([], 2)], "boxes that are no list or empty", [1, 3]),
        ([mask([1, 1, 9, 1, 9, 9], 5)], "masks that are no list of polygons", [6]),
        ([change("images", 2, "file_name", "gone.png")], "images that do not exist", ["gone.png"]),
        (
            [change("images", 2, "file_name", "other/text.png")],
            "images that cannot be read",
            ["other/text.png"],
        ),
        (
            [change("images", 0, "width", WIDTH + 1), change("images", 5, "height", 9)],
            "images of another size than the json says",
            ["1.png", "6.png"],
        ),
    ],
)
def test_what_is_refused(changes, what, ids, images, write, capsys):
    content = coco()
    for apply in changes:
        apply(content)
    file = write(content)
    report = check(file, images)
    assert findings(report)[what] == ids
    assert f"{len(ids)} {what}" in report.reasons
    assert prepare_data(file, images) is False
    said = capsys.readouterr().out
    assert f"{file} cannot be used: {len(ids)} {what}" in said
    assert "register_coco_instances" not in said
    # Training refuses it as well: at once, or (one id twice, of two images) it would mix them up,
    # or when it reads the picture.
    if not what.startswith("image"):
        with pytest.raises(UserError):
            trained_on(file, images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (change("images", []), "it has no images"),
        (change("categories", []), "it has no categories"),
        (change("annotations", []), "it has no objects to learn from"),
        (change("annotations", 3, "ignore", 1), '"ignore" in COCO json file is not supported'),
        (change("annotations", 3, "keypoints", ["a", "b"]), "Detectron2 cannot load it"),
        (
            lambda x: [y.update(width=0) for y in x["images"]],
            "6 images without a size|no images, of a size",
        ),
    ],
)
def test_what_is_refused_as_a_whole(changes, message, images, write):
    content = coco()
    changes(content)
    report = check(write(content), images)
    assert not report.usable
    assert any(x in report.verdict for x in message.split("|"))


def test_a_picture_that_exif_turns(images, write):
    """Detectron2 turns it, so that the json has to say what comes out."""
    what = "images that EXIF turns by 90 degrees"
    mismatch = "images of another size than the json says"
    content = coco()
    content["images"][0].update(file_name="other/turned.jpg", width=HEIGHT, height=WIDTH)
    content["annotations"][1]["bbox"] = [2, 12, 30, 40]
    report = check(write(content), images)
    assert report.usable and findings(report) == {what: ["other/turned.jpg"]}
    content["images"][0].update(width=WIDTH, height=HEIGHT)
    report = check(write(content), images)
    assert findings(report)[mismatch] == ["other/turned.jpg"]
    assert not report.usable


def test_fast_opens_no_image(images, write):
    content = coco()
    content["images"][0]["file_name"] = "other/text.png"
    content["images"][1]["width"] += 1
    report = check(write(content), images, fast=True)
    assert report.usable and "--fast" in report.text()
    content["images"][2]["file_name"] = "gone.png"
    assert not check(write(content), images, fast=True).usable


def test_long_lists_are_cut_unless_all_is_asked_for(images, write, capsys):
    content = coco()
    content["categories"] += [{"id": 10 + i, "name": f"name {i}"} for i in range(60)]
    file = write(content)
    prepare_data(file, images)
    said = capsys.readouterr().out
    assert "name 20" in said and "name 50" not in said
    assert "... and 32 more (--all shows them)" in said
    assert "category 10, 11, 12, 13, 14, ..." in said
    prepare_data(file, images, show_all=True)
    said = capsys.readouterr().out
    assert "name 50" in said and "68, 69\n" in said and "more (--all" not in said


def test_names_cannot_disturb_the_terminal(images, write, capsys):
    content = coco()
    content["categories"][0]["name"] = "a\x1b[2Jb\ud800\nc"
    prepare_data(write(content), images)
    said = capsys.readouterr().out
    assert "a?[2Jb??c" in said and "\x1b" not in said


# ---- what is no COCO json ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as json: Expecting value"),
        ('{"images": [', "cannot be read as json"),
        ("[" * 100_000, "nested too deeply"),
        ('{"images": ' + "9" * 5000 + "}", "cannot be read as json"),
        ("[1, 2]", "is no COCO json: it holds a list, expected images, annotations, categories"),
        ("{}", "it has no images, expected a list"),
        ('{"images": {}}', "images is an object, expected a list"),
        ('{"images": [3]}', r"images\[0\] is 3"),
        ('{"images": [{"id": 1}]}', r"images\[0\] has no file_name"),
    ],
)
def test_what_is_no_coco_json_is_one_line(text, message, images, write):
    with pytest.raises(UserError, match=message) as e:
        read_dataset(write(text), images)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (drop("annotations", 4, "image_id"), r"annotations\[4\] has no image_id"),
        (drop("images", 0, "width"), r"images\[0\] has no width"),
        (change("images", 0, "id", [1]), r"the id of images\[0\] is a list, expected a number"),
        (change("images", 0, "id", float("nan")), r"the id of images\[0\] is nan"),
        (change("images", 0, "id", "1"), "some ids of images are numbers and some are texts"),
        (change("annotations", 0, "category_id", None), r"category_id of annotations\[0\] is None"),
        (change("images", 0, "file_name", 5), r"file_name of images\[0\] is 5, expected a text"),
        (change("categories", 1, "name", None), r"the name of categories\[1\] is None"),
    ],
)
def test_keys_that_loading_needs(changes, message, images, write):
    content = coco()
    changes(content)
    with pytest.raises(UserError, match=message):
        read_dataset(write(content), images)


def test_bytes_that_are_no_text(images, tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as json"):
        read_dataset(tmp_path / "x.json", images)
    with pytest.raises(UserError, match="annotations not found"):
        read_dataset(tmp_path / "y.json", images)
    with pytest.raises(UserError, match="folder of the images is not there"):
        read_dataset(tmp_path / "x.json", tmp_path / "images")


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5),
        st.sampled_from([0, 1, 3, 7, 10**400, "1.png", "other/text.png", "..", "\0", ""]),
        st.just([[1] * 6]),
    ),
    lambda x: st.lists(x, max_size=5) | st.dictionaries(st.sampled_from(["id", "size"]), x),
    max_leaves=4,
)  # fmt: skip


@settings(
    max_examples=100, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_any_json_is_a_report_or_one_line(data, images, write, tmp_path_factory):
    content = coco()
    for a in content["annotations"]:
        a["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    for _ in range(data.draw(st.integers(1, 3))):
        node, depth = content, data.draw(st.sampled_from([1, 3, 4, 5]))
        for i in range(depth):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys))
            if i + 1 < depth and isinstance(node[key], (dict, list)) and node[key]:
                node = node[key]
            elif data.draw(st.integers(0, 3)) == 0:
                del node[key]
                break
            else:
                node[key] = copy.deepcopy(data.draw(VALUES))
                break
    text = json.dumps(content)
    if data.draw(st.integers(0, 19)) == 0:
        text = text[: data.draw(st.integers(0, len(text) - 1))]
    file = write(text)
    folder = tmp_path_factory.mktemp("fuzz")
    drawn = data.draw(st.integers(0, 9)) == 0
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            usable = prepare_data(
                file, images, split=(0.5, 0.5), output=folder,
                sheet=folder / "sheet.png" if drawn else None,
            )  # fmt: skip
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) > 20
    else:
        assert f"{file} can" in said.getvalue()
        said.getvalue().encode()
        if usable:
            report = check(file, images)
            n_images, n_boxes = trained_on(file, images)
            whole = json.loads(text)
            assert report.images_left_out == len(whole["images"]) - n_images
            assert report.boxes_left_out == len(whole["annotations"]) - n_boxes
            assert {x.name for x in folder.iterdir()} >= {"train.json", "val.json"}
    assert file.read_text() == text


# ---- the teacher's classes --------------------------------------------------------------------


def test_the_classes_of_teachers():
    digits = teacher_classes("configs/Digits/retinanet_teacher.yaml")
    assert digits == [str(i) for i in range(10)]
    zoo = teacher_classes("COCO-Detection/retinanet_R_50_FPN_3x.yaml")
    assert len(zoo) == 80 and zoo[:2] == ["person", "bicycle"] and zoo[-1] == "toothbrush"


def test_classes_are_compared(images, write, capsys):
    content = coco()
    content["categories"] = [
        {"id": 3, "name": "Person"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "newt"},
    ]  # fmt: skip
    file = write(content)
    prepare_data(file, images, teacher_config="COCO-Detection/retinanet_R_50_FPN_3x.yaml")
    said = capsys.readouterr().out
    assert "The teacher has 80 classes" in said
    assert "  1  in both             dog\n" in said
    assert "  2  only here           Person, newt\n" in said
    assert "(69 more, --all shows them)" in said
    assert "Spelled in another way: Person (the teacher's person);" in said
    assert "Losses on logits compare the 1 classes of the same name." in said
    prepare_data(file, images, teacher_config="configs/Digits/retinanet_teacher.yaml")
    assert "Losses on logits are refused: no class has the same name" in capsys.readouterr().out
    for key in ("RETINANET", "FCOS", "ROI_HEADS"):
        assert f"{key}: {{NUM_CLASSES: 3}}" in said


def test_the_same_classes():
    assert "same 2 classes in the same order" in compare_classes(["a", "b"], ["a", "b"])
    swapped = compare_classes(["a", "b"], ["b", "a"])
    assert "same order" not in swapped and "compare the 2 classes of the same name" in swapped
    for known in (["a", "b"], ["b"], None):
        assert "Losses on feature maps do not read classes" in compare_classes(["a", "b"], known)


def test_a_teacher_of_unknown_classes(tmp_path):
    config = tmp_path / "teacher.yaml"
    config.write_text("DATASETS:\n  TRAIN: ('nobody_knows_it',)\n")
    assert teacher_classes(str(config)) is None
    assert "classes are not known here" in compare_classes(["a"], None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.yaml", "neither a file .* nor a name in Detectron2's model zoo"),
        ("common/models/fcos.py", "is a program; --teacher-config takes a yaml"),
    ],
)
def test_what_is_no_teacher_is_told_before_the_check(name, message, images, write, capsys):
    with pytest.raises(UserError, match=message):
        prepare_data(write(coco()), images, teacher_config=name)
    assert capsys.readouterr().out == ""


# ---- splitting --------------------------------------------------------------------------------


@pytest.fixture
def many(images, write):
    """200 images, one category rarer than the other, and some without objects."""
    random = np.random.default_rng(0)
    content = {
        "info": {}, "licenses": [], "images": [], "annotations": [],
        "categories": [{"id": c, "name": f"c{c}"} for c in range(6)],
    }  # fmt: skip
    for i in range(200):
        content["images"].append(
            {"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40, "video_id": i // 7}
        )
        for c in np.flatnonzero(random.random(6) < [0.05, 0.1, 0.1, 0.2, 0.3, 0.5]):
            content["annotations"].append(
                {"id": len(content["annotations"]), "image_id": i, "category_id": int(c)}
            )
    return read_dataset(write(content), images)


def ids(parts):
    return {name: [x["id"] for x in part] for name, part in parts.items()}


@pytest.mark.parametrize(
    "shares", [(0.8, 0.1, 0.1), (0.7, 0.3), (1 / 3, 1 / 3, 1 / 3), (0.5, 0.25), (0.333, 0.333)]
)
def test_a_split_is_in_proportion(many, shares):
    parts = ids(split_images(many, shares))
    assert list(parts) == ["train", "val", "test"][: len(shares)]
    everything = [i for part in parts.values() for i in part]
    assert len(set(everything)) == len(everything)
    if sum(shares) > 0.99:
        assert sorted(everything) == list(range(200))
    for share, part in zip(shares, parts.values()):
        assert abs(len(part) - share * 200) < 1
        assert part == sorted(part)
    having = collections.defaultdict(set)
    for a in many.annotations:
        having[a["category_id"]].add(a["image_id"])
    assert len(having[0]) < 15
    for seed in range(10):
        parts = ids(split_images(many, shares, seed=seed))
        for share, part in zip(shares, parts.values()):
            for there in having.values():
                assert abs(len(there & set(part)) - share * len(there)) < 1.5


def test_a_split_depends_on_the_seed_alone(many):
    first = ids(split_images(many, (0.6, 0.4), seed=1))
    assert first == ids(split_images(many, (0.6, 0.4), seed=1))
    assert first != ids(split_images(many, (0.6, 0.4), seed=2))


def test_groups_stay_together(many):
    parts = split_images(many, (0.6, 0.2, 0.2), group_by="video_id")
    videos = [{x["video_id"] for x in part} for part in parts.values()]
    assert sum(map(len, videos)) == len(set.union(*videos)) == 29
    for share, part in zip((0.6, 0.2, 0.2), parts.values()):
        assert abs(len(part) - share * 200) <= 7
    with pytest.raises(UserError, match="--group-by scene: image 0 has no such key"):
        split_images(many, (0.6, 0.4), group_by="scene")
    many.images[4]["video_id"] = [4]
    with pytest.raises(UserError, match="image 4 has a list, expected a number or a text"):
        split_images(many, (0.6, 0.4), group_by="video_id")


def test_images_of_one_file_stay_together(many):
    for i, x in enumerate(many.images):
        x["file_name"] = f"{i // 2}.jpg"
    for part in ids(split_images(many, (0.5, 0.5))).values():
        assert {i ^ 1 for i in part} == set(part)


def test_a_split_without_images(many):
    with pytest.raises(UserError, match="--split leaves val without images: there are 200"):
        split_images(many, (0.999, 0.001))
    for x in many.images:
        x["video_id"] = x["id"] % 2
    with pytest.raises(UserError, match="leaves test without images"):
        split_images(many, (0.5, 0.3, 0.2), group_by="video_id")


def files(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_split_is_written_beside_its_source(images, write, tmp_path, capsys):
    content = coco()
    content["videos"] = [{"id": 0}]
    # One category is in one image alone.
    content["categories"].append({"id": 9, "name": "newt"})
    content["annotations"][4]["category_id"] = 9
    # And one image is none.
    content["annotations"][6]["image_id"] = 99
    file = write(content)
    before = files(images.parent)
    out = tmp_path / "new" / "folder"
    split = {"split": (0.5, 0.3, 0.2), "output": out}
    assert prepare_data(file, images, **split)
    said = capsys.readouterr().out
    assert files(images.parent) == before
    assert {x.name for x in out.iterdir()} == {"train.json", "val.json", "test.json"}
    parts = [json.loads((out / f"{x}.json").read_text()) for x in ("train", "val", "test")]
    assert [len(x["images"]) for x in parts] == [3, 2, 1]
    for part in parts:
        for key in ("info", "licenses", "categories", "videos"):
            assert part[key] == content[key]
        mine = {x["id"] for x in part["images"]}
        assert part["annotations"] == [a for a in content["annotations"] if a["image_id"] in mine]
    assert sum(len(x["annotations"]) for x in parts) == 11
    objects = [sum(a["category_id"] == 9 for a in x["annotations"]) for x in parts]
    there = ["train", "val", "test"][objects.index(1)]
    gone = ", ".join(x for x in ("train", "val", "test") if x != there)
    rows = [x.split() for x in said.splitlines()]
    assert ["images", "3", "2", "1"] in rows
    assert [x for x in rows if x[:1] == ["newt"]] == [
        ["newt", *map(str, objects)],
        ["newt", *gone.split(), there],
    ]

    # Nothing is written over, unless that is asked for.
    written = files(out)
    with pytest.raises(UserError, match=r"train.json is there already; add --overwrite"):
        prepare_data(file, images, **split)
    assert files(out) == written
    (out / "train.json").unlink()
    with pytest.raises(UserError, match=r"val.json is there already"):
        prepare_data(file, images, **split)
    assert not (out / "train.json").exists()
    assert prepare_data(file, images, **split, overwrite=True)
    assert {p: text for p, (text, _) in files(out).items()} == {
        p: text for p, (text, _) in written.items()
    }


def test_the_source_cannot_be_the_target(images, tmp_path):
    source = tmp_path / "train.json"
    source.write_text(json.dumps(coco()))
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match=r"train.json is the dataset itself"):
            prepare_data(source, images, split=(0.5, 0.5), output=folder, overwrite=True)
    with pytest.raises(UserError, match="is among the images"):
        prepare_data(source, images, sheet=images / "other" / "1.png", overwrite=True)
    assert json.loads(source.read_text()) == coco()


def test_what_cannot_be_used_is_not_split(images, write, tmp_path):
    content = coco()
    content["images"][0]["file_name"] = "gone.png"
    assert not prepare_data(write(content), images, split=(0.5, 0.5), output=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": (0.8,), "output": "x"}, "takes the shares of train and val, .* 1 are given"),
        ({"split": (0.4, 0.3, 0.2, 0.1), "output": "x"}, "4 are given"),
        ({"split": (0.8, 0.3), "output": "x"}, "--split 0.8 0.3: shares are positive and sum to"),
        ({"split": (1.0, 0.0), "output": "x"}, "--split 1 0: shares are positive"),
        ({"split": (0.5, float("nan")), "output": "x"}, "--split 0.5 nan: shares are positive"),
        ({"split": (0.8, 0.2)}, "--split needs --output"),
        ({"output": "x"}, "are of a split"),
        ({"group_by": "x"}, "are of a split"),
        ({"sheet": "x.jpg"}, "let its name end in .png"),
    ],
)
def test_requests_that_do_not_fit(options, message, images, write, capsys, tmp_path):
    paths = {k: tmp_path / v for k, v in options.items() if k in ("output", "sheet")}
    with pytest.raises(UserError, match=message):
        prepare_data(write(coco()), images, **{**options, **paths})
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_what_is_printed_can_be_pasted(images, write, tmp_path, capsys):
    prepare_data(write(coco()), images, split=(0.5, 0.5), output=tmp_path)
    said = capsys.readouterr().out
    lines = [x for x in said.splitlines() if "register_coco_instances" in x]
    assert len(lines) == 3
    cfg = get_distill_cfg()
    config = tmp_path / "config.yaml"
    text = said[said.index("DATASETS:") :]
    config.write_text(text)
    merge_config(cfg, str(config), [], "config")
    assert yaml.safe_load(text)["MODEL"]["RETINANET"] == {"NUM_CLASSES": 2}
    try:
        exec("\n".join(lines), {})
        assert cfg.DATASETS.TRAIN == ("pets_train",) and cfg.DATASETS.TEST == ("pets_val",)
        assert len(DatasetCatalog.get("pets_train")) == len(DatasetCatalog.get("pets_val")) == 3
        assert MetadataCatalog.get("pets_val").thing_classes == ["cat", "dog"]
    finally:
        for name in ("pets_train", "pets_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)


def test_names_of_other_datasets_are_left_to_them(images, tmp_path, capsys):
    file = tmp_path / "digits_val.json"
    file.write_text(json.dumps(coco()))
    assert prepare_data(file, images)
    assert "register_coco_instances('my_digits_val', {}," in capsys.readouterr().out


# ---- the sheet --------------------------------------------------------------------------------


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def colorful(pixel):
    return max(pixel) - min(pixel) > 100


def test_boxes_are_drawn_where_they_are(images, write, tmp_path):
    content = coco()
    del content["images"][1:]
    content["annotations"] = content["annotations"][:2]
    data = read_dataset(write(content), images)
    path = tmp_path / "new" / "sheet.png"
    draw_sheet(data, path)
    sheet = pixels_of(path)
    gray = (sheet == GRAY).all(axis=2)
    rows, columns = np.flatnonzero(gray.any(1)), np.flatnonzero(gray.any(0))
    top, left = rows[0], columns[0]
    scale = (columns[-1] + 1 - left) / WIDTH
    assert scale == (rows[-1] + 1 - top) / HEIGHT > 1

    def at(x, y):
        return sheet[round(top + y * scale), round(left + x * scale)]

    # Names are above the boxes or in a left corner.
    seen = []
    for x, y, w, h in ([5, 5, 10, 12], [12, 2, 40, 35]):
        edges = [at(x + w, y + 0.8 * h), at(x + 0.8 * w, y + h), at(x, y + 0.8 * h)]
        assert all(colorful(p) for p in edges)
        assert (np.ptp(edges, axis=0) < 3).all()
        seen.append(edges[0])
        assert (at(x + 0.9 * w, y + 0.9 * h) == GRAY).all()
    assert (at(58, 38) == GRAY).all()
    # Of two colours, and the legend below has both.
    assert max(abs(seen[0] - seen[1])) > 100
    below = sheet[rows[-1] + 10 :]
    for color in seen:
        assert (np.abs(below - color).max(axis=2) < 4).sum() > 30


def test_names_are_not_over_one_another(images, write, tmp_path):
    """Of two equal boxes, the second of which covers the first, both can be read."""
    content = coco()
    del content["images"][1:]
    content["annotations"] = content["annotations"][:2]
    for a in content["annotations"]:
        a["bbox"] = [20, 15, 20, 15]
    draw_sheet(read_dataset(write(content), images), tmp_path / "sheet.png")
    sheet = pixels_of(tmp_path / "sheet.png")
    rows = np.flatnonzero((sheet == GRAY).all(axis=2).any(1))
    legend = sheet[rows[-1] + 10 :].reshape(-1, 3)
    found, counts = np.unique(legend, axis=0, return_counts=True)
    colors = [c for c in found[np.argsort(-counts)] if colorful(c)][:2]
    for color in colors:
        # The name's background.
        assert (np.abs(sheet[: rows[-1]] - color).max(axis=2) < 4).sum() > 150


def test_crowds_have_broken_lines(images, write, tmp_path):
    lines = []
    for crowd in (0, 1):
        content = coco()
        del content["images"][1:], content["annotations"][1:]
        content["annotations"][0].update(bbox=[10, 10, 40, 20], iscrowd=crowd)
        draw_sheet(read_dataset(write(content), images), tmp_path / f"{crowd}.png")
        sheet = pixels_of(tmp_path / f"{crowd}.png")
        # The lowest line of the picture that is not gray is the box's lower edge.
        below = np.flatnonzero((sheet == GRAY).all(axis=2).sum(1) > 300)[-1]
        part = (np.ptp(sheet[:below], axis=2) > 100).sum(1)
        lines.append(part[np.flatnonzero(part > 50)[-1]])
    assert 50 < lines[1] < 0.9 * lines[0]


def test_names_that_the_font_cannot_draw():
    styles = _styles([{"id": 3, "name": "\u72ac"}, {"id": 5, "name": "_$\u00e9"}])
    assert [name for name, _ in styles.values()] == ["category 3", "_$\u00e9"]


def test_the_seed_chooses_the_images(images, write, tmp_path):
    data = read_dataset(write(coco()), images)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_sheet(data, tmp_path / f"{name}.png", count=2, seed=seed)
    a, b, c = ((tmp_path / f"{x}.png").read_bytes() for x in "abc")
    assert a == b != c


def test_a_sheet_of_what_is_hard_to_draw(images, write, tmp_path, capsys):
    """A broken picture, bad boxes, crowds, names that are markup, or in letters without a font."""
    content = coco()
    content["images"][0]["file_name"] = "other/text.png"
    content["categories"] = [
        {"id": 3, "name": "_$x"}, {"id": 7, "name": "\u72ac\u732b"},
        *({"id": 10 + i, "name": f"{i}" * 30} for i in range(70)),
    ]  # fmt: skip
    content["annotations"][2].update(iscrowd=1, bbox=[-20, -20, 500, 500])
    content["annotations"][3]["bbox"] = [float("nan")] * 4
    content["annotations"][4]["category_id"] = 99
    more = [
        {
            **content["annotations"][5],
            "id": 100 + i,
            "category_id": 10 + i,
            "bbox": [i / 2, 3, 20, 9],
        }
        for i in range(70)
    ]
    content["annotations"] += more
    path = tmp_path / "sheet.png"
    assert not prepare_data(write(content), images, sheet=path)
    assert f"Pictures: {path}" in capsys.readouterr().out
    height, width, _ = pixels_of(path).shape
    assert 700 < width < 2000 and 700 < height < 2000
    with pytest.raises(UserError, match=r"sheet.png is there already"):
        prepare_data(write(coco()), images, sheet=path)


def test_a_sheet_of_nothing(images, write, tmp_path, capsys):
    content = coco()
    for x in content["images"]:
        x["file_name"] = "gone.png"
    with pytest.raises(UserError, match="--sheet has nothing to draw"):
        prepare_data(write(content), images, sheet=tmp_path / "sheet.png")
    assert "cannot be used: 6 images that do not exist" in capsys.readouterr().out


# ---- the command line -------------------------------------------------------------------------


def run(monkeypatch, *args):
    """The tool's exit code, or its message."""
    tool = str(REPO / "tools" / "prepare_data.py")
    monkeypatch.setattr(sys, "argv", [tool, *map(str, args)])
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as e:
        return e.code
    return 0


def test_the_command_line(images, write, tmp_path, monkeypatch, capsys):
    file = write(coco())
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    args = [
        *(file, images, "--split", 0.5, 0.5, "--output", out, "--seed", 3),
        *("--group-by", "video_id"),
        *("--sheet", sheet, "--teacher-config", "configs/Digits/retinanet_teacher.yaml"),
        *("--all", "--fast"),
    ]
    assert run(monkeypatch, *args) == 0
    assert {x.name for x in tmp_path.iterdir()} == {"out", "sheet.png"}
    assert "can be trained on" in capsys.readouterr().out
    assert run(monkeypatch, *args).startswith("error: ")
    assert run(monkeypatch, *args, "--overwrite") == 0
    content = coco()
    content["annotations"][0]["category_id"] = 5
    capsys.readouterr()
    assert run(monkeypatch, write(content), images) == 1
    assert "cannot be used: 1 objects of unknown categories" in capsys.readouterr().out
    code = run(monkeypatch, write("{"), images)
    assert code.startswith("error: ") and "\n" not in code


def test_logging_goes_on_afterwards(images, write):
    """What Detectron2 says of categories is said by the report; the rest is not silenced."""
    logging.disable(logging.INFO)
    try:
        check(write(coco()), images)
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)


def test_the_digits_are_a_good_dataset(digits, capsys):
    metadata = MetadataCatalog.get("digits_val")
    assert prepare_data(Path(metadata.json_file), Path(metadata.image_root))
    assert f"{metadata.json_file} can be trained on\n" in capsys.readouterr().out
