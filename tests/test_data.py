import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, pairwise_ioa
from PIL import Image

from pcka_distill import UserError
from pcka_distill.data import digits as module
from pcka_distill.data import rendering


@pytest.fixture
def small(monkeypatch):
    """Fewer images, the same code."""
    monkeypatch.setattr(
        module, "SPLITS", {k: (12, seed, share) for k, (_, seed, share) in module.SPLITS.items()}
    )


def _files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_deterministic_and_made_once(small, tmp_path):
    a, b = module.ensure_digits(tmp_path / "a"), module.ensure_digits(tmp_path / "b")
    assert _files(a) == _files(b)
    before = {p: p.stat().st_mtime_ns for p in a.rglob("*")}
    module.ensure_digits(tmp_path / "a")
    assert {p: p.stat().st_mtime_ns for p in a.rglob("*")} == before


def test_without_the_packages_that_draw_it(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "pcka_distill.data.rendering")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"needs cv2: pip install -e '\.\[demo\]'"):
        module.ensure_digits(tmp_path)


def test_another_version_is_rendered_again(small, tmp_path):
    folder = module.ensure_digits(tmp_path)
    (folder / "version").write_text(f"{module._STAMP}0")
    (folder / "train" / "00000.png").unlink()
    module.ensure_digits(tmp_path)
    assert (folder / "train" / "00000.png").is_file()


def test_somebody_elses_folder_is_left_alone(tmp_path):
    mine = tmp_path / module.FOLDER / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(UserError, match="was not made here; move it"):
        module.ensure_digits(tmp_path)
    assert mine.read_text() == "precious"


def test_a_folder_that_cannot_be_written():
    with pytest.raises(UserError, match=r"cannot be written: .*set DETECTRON2_DATASETS"):
        module.ensure_digits("/dev/null")


def test_another_root(tmp_path):
    before = MetadataCatalog.get("digits_val").json_file
    module.register_digits()
    assert MetadataCatalog.get("digits_val").json_file == before
    try:
        module.register_digits(str(tmp_path))
        assert MetadataCatalog.get("digits_val").json_file.startswith(str(tmp_path))
        MetadataCatalog.get("digits_val").prepare()
        assert (tmp_path / module.FOLDER / "val.json").is_file()
    finally:
        module.register_digits(str(Path(before).parents[1]))
    assert MetadataCatalog.get("digits_val").json_file == before


def test_datasets_of_these_names_are_left_alone():
    check = """
from detectron2.data import DatasetCatalog
DatasetCatalog.register("digits_train", lambda: ["mine"])
import pcka_distill
assert DatasetCatalog.get("digits_train") == ["mine"]
"""
    subprocess.run([sys.executable, "-c", check], check=True)


def test_interrupted_rendering_leaves_nothing(small, tmp_path, monkeypatch):
    calls = []
    real = rendering.render_split

    def fail_late(folder, split, *args):
        calls.append(split)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(folder, split, *args)

    monkeypatch.setattr(rendering, "render_split", fail_late)
    with pytest.raises(KeyboardInterrupt):
        module.ensure_digits(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_digit_is_in_two_splits():
    total = 1797
    ranges = [range(round(a * total), round(b * total)) for _, _, (a, b) in module.SPLITS.values()]
    assert sorted(i for r in ranges for i in r) == list(range(total))


def test_annotations_fit_the_images(digits):
    root = MetadataCatalog.get("digits_train").image_root
    assert len(digits) == 1500
    assert 2 <= np.mean([len(x["annotations"]) for x in digits]) <= 5
    assert {a["category_id"] for x in digits for a in x["annotations"]} == set(range(10))
    for record in digits[:50]:
        assert record["file_name"].startswith(root)
        assert Image.open(record["file_name"]).size == (96, 96)
        for a in record["annotations"]:
            x, y, w, h = a["bbox"]
            assert w > 3 and h > 3 and x >= 0 and y >= 0 and x + w <= 96 and y + h <= 96


def test_digits_stand_out_from_the_background(digits):
    """The masks lie on the digits: their pixels differ from those around them in the box."""
    import pycocotools.mask as mask_util

    contrast = []
    for record in digits[:100]:
        image = np.asarray(Image.open(record["file_name"]).convert("L"), dtype=float)
        for a in record["annotations"]:
            mask = mask_util.decode(a["segmentation"]).astype(bool)
            x, y, w, h = (int(v) for v in a["bbox"])
            box = np.zeros_like(mask)
            box[y : y + h, x : x + w] = True
            if (box & ~mask).sum() > 10:
                contrast.append(abs(image[mask].mean() - image[box & ~mask].mean()))
    assert np.median(contrast) > 25


def test_digits_hardly_overlap(digits):
    """Less than 10 % of the smaller box, but for the pixels that cutting to the mask takes off."""
    for record in digits:
        boxes = Boxes([a["bbox"] for a in record["annotations"]])
        boxes.tensor[:, 2:] += boxes.tensor[:, :2]
        # Either way round: the larger is that of the smaller box.
        shared = pairwise_ioa(boxes, boxes).fill_diagonal_(0)
        assert shared.max() <= 0.1


@pytest.mark.parametrize("split", ["val", "test"])
def test_splits_are_registered(split):
    records = DatasetCatalog.get(f"digits_{split}")
    assert len(records) == 300
    content = json.loads(Path(MetadataCatalog.get(f"digits_{split}").json_file).read_text())
    assert [c["name"] for c in content["categories"]] == module.CLASSES


def test_a_tenth_of_the_labels(digits):
    tenth = DatasetCatalog.get("digits_train_10")
    assert len(tenth) == 150
    assert [x["file_name"] for x in tenth] == [x["file_name"] for x in digits[:150]]
    # All ten classes are there, and none is rare.
    counts = Counter(a["category_id"] for x in tenth for a in x["annotations"])
    assert len(counts) == 10 and min(counts.values()) > 30
