import os
import random
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# Before the package is imported: it registers its datasets under this folder.
os.environ.setdefault("DETECTRON2_DATASETS", str(REPO / "datasets"))
# RetinaNet's focal loss is a scripted function, and a scripted function computes its first calls in
# a process in another way than the later ones: without this, two equal runs differ in the last bit.
os.environ["PYTORCH_JIT"] = "0"

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton is imported: kernels of a GPU are run by its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from helpers import FAMILIES, digits_cfg, make_batch

import pcka_distill  # noqa: F401  (registers everything)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """In every test, whichever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    """The digits set, rendered if it is not there yet."""
    return DatasetCatalog.get("digits_train")


@pytest.fixture
def storage():
    with EventStorage(0) as s:
        yield s


@pytest.fixture(scope="session")
def teacher_files(tmp_path_factory):
    """family -> checkpoint of a random model of the student's architecture."""
    folder = tmp_path_factory.mktemp("teachers")
    files = {}
    for family in FAMILIES:
        torch.manual_seed(7)
        files[family] = str(folder / f"{family}.pth")
        torch.save({"model": build_model(digits_cfg(family)).state_dict()}, files[family])
    return files


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def empty_batch():
    """Two images without a single object."""
    batch = make_batch()
    for x in batch:
        x["instances"] = Instances((96, 96))
        x["instances"].gt_boxes = Boxes(torch.zeros(0, 4))
        x["instances"].gt_classes = torch.zeros(0, dtype=torch.int64)
        x["instances"].gt_masks = PolygonMasks([])
    return batch
