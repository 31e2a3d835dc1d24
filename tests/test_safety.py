"""Files of others: read as data, refused in one line, and never changed."""

import copy
import io
import json
import logging
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from helpers import REPO, digits_cfg, distill_cfg, student_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pcka_distill import UserError, engine, get_distill_cfg, load_teacher_weights
from pcka_distill.build import build_teacher, merge_config
from pcka_distill.checkpoint import SafeCheckpointer
from pcka_distill.export import export_student

# By default the same in every run; with FUZZ_CASES so many others.
CASES = int(os.environ.get("FUZZ_CASES", "2000"))
SAME = "FUZZ_CASES" not in os.environ


def fuzzed():
    return settings(
        max_examples=CASES, derandomize=SAME, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


# ---- configs ----------------------------------------------------------------------------------

CALL = "MODEL:\n  DEVICE: !!python/object/apply:os.system ['touch {}']\n"


def merge(path, *opts):
    cfg = get_distill_cfg()
    merge_config(cfg, str(path), list(opts), "config file")
    return cfg


def test_a_config_that_calls_a_function_is_refused(tmp_path):
    path, trace = tmp_path / "x.yaml", tmp_path / "trace"
    path.write_text(CALL.format(trace))
    with pytest.raises(UserError, match=r"it would run a program; .*add TRUST_CONFIG True") as e:
        merge(path)
    assert "\n" not in str(e.value) and not trace.exists()
    # In a base, too, and in a teacher's.
    (tmp_path / "y.yaml").write_text("_BASE_: x.yaml\n")
    with pytest.raises(UserError, match="it would run a program"):
        merge(tmp_path / "y.yaml")
    cfg = distill_cfg("retinanet", "x.pth", "MODEL.DISTILL.TEACHER.CONFIG_FILE", str(path))
    with pytest.raises(UserError, match=r"teacher config .* it would run a program"):
        build_teacher(cfg)
    assert not trace.exists()


def test_no_config_trusts_itself(tmp_path):
    path, trace = tmp_path / "x.yaml", tmp_path / "trace"
    path.write_text("TRUST_CONFIG: True\n" + CALL.format(trace))
    with pytest.raises(UserError, match="it would run a program"):
        merge(path)
    path.write_text("TRUST_CONFIG: True\n")
    with pytest.raises(UserError, match="TRUST_CONFIG is for the command line"):
        merge(path)
    assert not trace.exists()


def test_no_file_speaks_for_another(tmp_path):
    """A student's yaml cannot trust its teacher's, nor checkpoints; a program needs trust, too."""
    path, trace = tmp_path / "x.yaml", tmp_path / "trace"
    path.write_text(CALL.format(trace))
    opts = ["MODEL.DISTILL.TEACHER.CONFIG_FILE", str(path), "MODEL.DISTILL.TEACHER.OPTS"]
    cfg = distill_cfg("retinanet", "x.pth", *opts, ["TRUST_CONFIG", "True"])
    with pytest.raises(
        UserError, match=r"TEACHER\.OPTS cannot set TRUST_CONFIG: it is for the comm"
    ):
        build_teacher(cfg)
    (tmp_path / "y.yaml").write_text("TRUST_CHECKPOINT: True\n")
    with pytest.raises(UserError, match="TRUST_CHECKPOINT is for the command line"):
        merge(tmp_path / "y.yaml")
    program = tmp_path / "teacher.py"
    program.write_text(f"open({str(trace)!r}, 'w')\n")
    cfg = distill_cfg("retinanet", "x.pth", *opts[:1], str(program))
    with pytest.raises(UserError, match=r"teacher\.py is a program; if you trust where it comes"):
        build_teacher(cfg)
    assert not trace.exists()


@pytest.mark.parametrize("base", ["https://no.such.host/x.yaml", "pipe", "gone.yaml"])
def test_bases_are_files(base, tmp_path):
    """What is fetched or waits is never opened, wherever its name seems to lead."""
    os.mkfifo(tmp_path / "pipe")
    folder = Path(model_zoo.get_config_file("Base-RetinaNet.yaml")).parent
    if "://" in base:
        base = f"https://no.such.host/../../..{folder}/Base-RetinaNet.yaml"
    (tmp_path / "x.yaml").write_text(f"_BASE_: {base}\n")
    with pytest.raises(UserError, match=r"its _BASE_ .* is no file here"):
        merge(tmp_path / "x.yaml")


def test_proposals_are_pickles(tmp_path):
    path = str(REPO / "configs" / "Digits" / "retinanet_student.yaml")
    opts = ["MODEL.LOAD_PROPOSALS", "True", "OUTPUT_DIR", str(tmp_path)]
    args = default_argument_parser().parse_args(["--config-file", path, *opts])
    with pytest.raises(UserError, match=r"MODEL\.LOAD_PROPOSALS reads pickles"):
        engine.setup(args)


def test_one_that_you_trust(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("SOLVER:\n  MAX_ITER: !!python/object/apply:eval ['6 * 7']\n")
    assert merge(path, "TRUST_CONFIG", "True").SOLVER.MAX_ITER == 42
    assert merge(path, "TRUST_CONFIG", True).SOLVER.MAX_ITER == 42
    cfg = distill_cfg(
        "retinanet",
        "gone.pth",
        "MODEL.DISTILL.TEACHER.CONFIG_FILE",
        str(path),
        "TRUST_CONFIG",
        True,
    )
    # It is read, and a teacher of Detectron2's default architecture is built of it.
    with pytest.raises(UserError, match="weights not found"):
        build_teacher(cfg)


def test_detectron2s_own_configs_compute(tmp_path):
    """Its RetinaNets do, in their base."""
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    cfg = merge(model_zoo.get_config_file(name))
    assert (
        cfg.MODEL.ANCHOR_GENERATOR.SIZES == model_zoo.get_config(name).MODEL.ANCHOR_GENERATOR.SIZES
    )
    based = tmp_path / "mine.yaml"
    based.write_text(f"_BASE_: {model_zoo.get_config_file(name)}\nSOLVER:\n  MAX_ITER: 7\n")
    assert merge(based).SOLVER.MAX_ITER == 7
    # A copy of it elsewhere is a file like any other.
    copied = tmp_path / "Base-RetinaNet.yaml"
    shutil.copy(model_zoo.get_config_file("Base-RetinaNet.yaml"), copied)
    with pytest.raises(UserError, match="it would run a program"):
        merge(copied)
    # So is one that only points there.
    folder = Path(model_zoo.get_config_file("Base-RetinaNet.yaml")).parent
    with pytest.raises(UserError, match="it would run a program"):
        merge(folder / ".." / ".." / ".." / os.path.relpath(copied, folder.parents[2]))


def test_old_configs_are_converted_and_no_less_safe(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("VERSION: 1\nMODEL:\n  RESNETS:\n    DEPTH: 101\n")
    assert merge(path).MODEL.RESNETS.DEPTH == 101
    path.write_text("VERSION: 1\n" + CALL.format(tmp_path / "trace"))
    with pytest.raises(UserError, match="it would run a program"):
        merge(path)
    assert not (tmp_path / "trace").exists()


# Nine times nine times nine ...
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("_BASE_: x.yaml\n", "leads back to itself"),
        ("MODEL: &a [*a]\n", "leads back to itself|holds more than 100000 values"),
        (BOMB, "holds more than 100000 values"),
    ],
)  # fmt: skip
def test_configs_without_an_end(content, message, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        merge(tmp_path / "x.yaml")


SOURCE = (
    student_yaml("retinanet")
    .read_text()
    .replace("Base-RetinaNet", "../../configs/Digits/Base-RetinaNet")
)


PIECES = "MODEL SOLVER DISTILL MAX_ITER VERSION _BASE_ 7 : [ ] { } *a !! | ' # ? > ~ , ."
PIECES = [*PIECES.split(), "\n", "  ", "- ", "&a ", '"', "\t"]


@fuzzed()
@given(data=st.data())
def test_any_yaml_is_a_config_or_one_line(data, tmp_path_factory):
    """Cut, with bytes changed, or made of pieces of yaml."""
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    raw = bytearray(
        SOURCE.replace("../../configs/Digits", str(REPO / "configs" / "Digits")).encode()
    )
    kind = data.draw(st.sampled_from(["cut", "bytes", "pieces"]))
    if kind == "cut":
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    elif kind == "bytes":
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    else:
        raw = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=40))).encode()
    path.write_bytes(bytes(raw))
    try:
        merge(path)
    except UserError as e:
        assert str(e).startswith(f"config file {path} cannot be used: ")
        assert "\n" not in str(e) and len(str(e)) > len(f"config file {path} cannot be used: ")


# ---- checkpoints ------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch trace_of_a_checkpoint",)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


@pytest.mark.parametrize("suffix", ["pth", "pkl", "pyth"])
def test_a_checkpoint_that_runs_something_is_refused(tiny, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"model": tiny.state_dict(), "model_state": tiny.state_dict(), "x": Evil()}
    if suffix == "pkl":
        Path("x.pkl").write_bytes(pickle.dumps({"model": {}, "__author__": Evil()}))
    else:
        torch.save(content, f"x.{suffix}")
    for load in (
        lambda: load_teacher_weights(tiny, f"x.{suffix}"),
        lambda: SafeCheckpointer(tiny).load(f"x.{suffix}"),
    ):
        with pytest.raises(UserError, match=r"add TRUST_CHECKPOINT True") as e:
            load()
        assert "system" in str(e.value) and "\n" not in str(e.value)
    assert not Path("trace_of_a_checkpoint").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoint_of_the_model_zoo(tiny, protocol, tmp_path):
    """A pickle of numpy arrays, as they are published; also one of Python 2."""
    arrays = {k: v.numpy() for k, v in tiny.state_dict().items()}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2"}, protocol=protocol))
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert load_teacher_weights(other, str(path)) == 7
    assert torch.equal(other[0].weight, tiny[0].weight)
    # numpy 1 called the module by another name.
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    if protocol == 2:
        path.write_bytes(old)
        assert load_teacher_weights(other, str(path)) == 7


def test_a_trusted_checkpoint(tiny, tmp_path):
    torch.save({"model": tiny.state_dict(), "args": pytest.approx(1)}, tmp_path / "x.pth")
    SafeCheckpointer(tiny, trusted=True).load(str(tmp_path / "x.pth"))


def archive(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_a_compressed_checkpoint_is_none(tiny, tmp_path):
    """A few kilobytes could become gigabytes."""
    raw = archive({"model": tiny.state_dict()})
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as source,
        zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(UserError, match="it is compressed, which checkpoints of torch never are"):
        load_teacher_weights(tiny, str(tmp_path / "x.pth"))


def test_a_pickle_that_asks_for_room_without_end(tiny, tmp_path):
    """It numbers a part as the two billionth: Python's own reader makes room for all before."""
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02}r" + (2**31 - 2).to_bytes(4, "little") + b".")
    with pytest.raises(UserError, match="its part 2147483646 comes after 0 others"):
        load_teacher_weights(tiny, str(path))


def test_a_weight_that_is_marked_as_a_folder(tiny, tmp_path):
    """By one bit of the archive's list of files: torch reads zeros, and no checksum is wrong."""
    raw = bytearray(archive({"model": tiny.state_dict()}))
    # The entry of a weight in that list; 38 bytes after its beginning are the attributes.
    at = raw.index(b"/data/2", raw.index(b"PK\x01\x02"))
    entry = raw.rindex(b"PK\x01\x02", 0, at)
    raw[entry + 38] |= 0x10
    (tmp_path / "x.pth").write_bytes(bytes(raw))
    with pytest.raises(UserError, match="data/2 is marked as a folder"):
        load_teacher_weights(tiny, str(tmp_path / "x.pth"))


class Reduced:
    """Pickled as the call of a function, and then a state."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    ("kind", "state", "shape", "numbers", "message"),
    [
        # Bytes that would be taken for addresses of Python's objects.
        ("O8", (3, "|", None, None, None, -1, -1, 0), (1,), b"12345678", "array of type 'O8'"),
        ("f4", (3, "<", None, None, None, -1, -1, 63), (1,), b"1234", "array of type .3, '<'"),
        ("f4", (3, "<", None, ("a",), {"a": 1}, 8, 1, 0), (1,), b"1234", "array of type .3, '<'"),
        ("f4", (3, "<", None, None, None, -1, -1, 0), (2**40,), b"1234", "has 4 bytes"),
        ("f4", (3, "<", None, None, None, -1, -1, 0), (-1, -1), b"1234", "has the shape"),
        ("f4", (3, "<", None, None, None, -1, -1, 0), (1,), b"1234", "missing in the file"),
    ],
)  # fmt: skip
def test_an_array_is_numbers(kind, state, shape, numbers, message, tiny, tmp_path):
    path = tmp_path / "x.pkl"
    function = np.zeros(0).__reduce__()[0]
    dtype = Reduced(np.dtype, (kind, False, True), state)
    array = Reduced(function, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, numbers))
    path.write_bytes(pickle.dumps({"model": {"x": array}, "__author__": "x"}, protocol=2))
    # The last one is read; it has not the model's tensors.
    with pytest.raises(UserError, match=message):
        load_teacher_weights(tiny, str(path))


@fuzzed()
@given(data=st.data())
def test_any_file_is_a_checkpoint_or_one_line(data, tiny, tmp_path_factory):
    """Cut, with bits flipped, or with a piece moved; as .pth and as .pkl."""
    suffix = data.draw(st.sampled_from(["pth", "pkl"]))
    path = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    state = tiny.state_dict()
    if suffix == "pth":
        raw = bytearray(archive({"model": state, "iteration": 3}))
    else:
        arrays = {k: v.numpy() for k, v in state.items()}
        raw = bytearray(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=2))
    kind = data.draw(st.sampled_from(["cut", "bits", "moved"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if kind == "cut":
        raw = raw[:at]
    elif kind == "bits":
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        size = data.draw(st.integers(1, 64))
        raw[at : at + size] = raw[: min(size, len(raw) - at)]
    path.write_bytes(bytes(raw))
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    try:
        load_teacher_weights(model, str(path))
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)
    else:
        # What was read over is no weight. Of a .pkl nothing tells.
        if suffix == "pth":
            assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())


# ---- datasets ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two small images, a file that is no image, and a broken one."""
    path = tmp_path_factory.mktemp("images")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
    (path / "text.png").write_text("no image")
    (path / "broken.png").write_bytes((path / "0.png").read_bytes()[:100])
    return path


def coco():
    box = {"bbox": [4, 5, 10, 12], "area": 120, "iscrowd": 0, "category_id": 1}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 24, "width": 32} for i in range(2)],
        "annotations": [{**box, "id": i + 1, "image_id": i % 2} for i in range(4)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def use(content, folder, evaluate=True):
    """What a training and its evaluation do with a dataset: images seen, boxes seen."""
    file = folder / "annotations.json"
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_text(text)
    register_coco_instances("fuzz", {}, str(file), str(folder))
    try:
        cfg = digits_cfg("retinanet", "DATASETS.TRAIN", ("fuzz",), "SOLVER.IMS_PER_BATCH", 1)
        if evaluate:
            engine._check_evaluation("fuzz")
        batches = iter(engine.Trainer.build_train_loader(cfg))
        seen = [next(batches)[0] for _ in range(3)]
        if not evaluate:
            return seen
        evaluator = COCOEvaluator("fuzz", tasks=("bbox",), distributed=False)
        evaluator.reset()
        found = Instances((24, 32))
        found.pred_boxes = Boxes(torch.tensor([[4.0, 5.0, 14.0, 17.0]]))
        found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
        for record in DatasetCatalog.get("fuzz"):
            evaluator.process([record], [{"instances": found}])
        evaluator.evaluate()
        return seen
    finally:
        DatasetCatalog.remove("fuzz")
        MetadataCatalog.remove("fuzz")
        # Nothing is written to a user's data.
        assert file.read_text() == text
        assert {x.name for x in folder.iterdir()} == {
            "0.png", "1.png", "text.png", "broken.png", "annotations.json"
        }  # fmt: skip


def changed(path, value):
    content = coco()
    node = content
    for key in path[:-1]:
        node = node[key]
    if value is DELETE:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return content


DELETE = object()
BOX, IMAGE = ("annotations", 0), ("images", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*BOX, "bbox"), [float("nan"), 5, 10, 12], "1 boxes that are not four finite numbers are"),
        ((*BOX, "bbox"), [4, 5, float("inf"), 12], "1 boxes that are not four finite numbers"),
        ((*BOX, "bbox"), [4, 5, 10], "1 boxes that are not four finite numbers are left out"),
        (
            (*BOX, "bbox"),
            [4, 5, -10, 12],
            "1 boxes without an area are left out (first of image 0)",
        ),
        ((*BOX, "bbox"), [4, 5, 0, 12], "1 boxes without an area are left out"),
        ((*BOX, "bbox"), [40, 5, 10, 12], "1 boxes outside of their image are left out"),
        ((*IMAGE, "width"), 0, "1 images without a size are left out (first of image 0)"),
        ((*IMAGE, "height"), float("nan"), "1 images without a size are left out"),
        ((*IMAGE, "height"), None, "1 images without a size are left out"),
        ((*BOX, "bbox"), [4, 5, 10**400, 12], "1 boxes that are not four finite numbers"),
    ],
)
def test_what_cannot_be_trained_on_is_left_out_and_counted(path, value, message, folder, caplog):
    logging.getLogger("detectron2").propagate = True
    seen = use(changed(path, value), folder, evaluate=False)
    assert message in caplog.text
    for x in seen:
        boxes = x["instances"].gt_boxes.tensor
        assert len(boxes) in (1, 2) and boxes.isfinite().all()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*BOX, "category_id"), 9, "category_id=9"),
        ((*BOX, "bbox"), DELETE, "the bbox of annotation 1 is None"),
        (
            (*BOX, "area"),
            DELETE,
            "the area of annotation 1 is None, and COCO's evaluation reads it",
        ),
        ((*BOX, "iscrowd"), DELETE, "the iscrowd of annotation 1 is None"),
        ((*BOX, "bbox"), [4, 5, float("nan"), 1], r"the bbox of annotation 1 is \[4, 5, nan, 1\]"),
        ((*BOX, "image_id"), DELETE, "have no 'image_id'"),
        ((*BOX, "id"), -1, "the id of annotation -1 is -1, and COCO's evaluation reads it"),
        ((*BOX, "id"), 2, "are not unique"),
        ((*IMAGE, "width"), DELETE, "have no 'width'"),
        ((*IMAGE, "file_name"), "gone.png", "gone.png does not exist"),
        ((*IMAGE, "file_name"), "text.png", "text.png cannot be read"),
        ((*IMAGE, "file_name"), "broken.png", "broken.png cannot be read"),
        ((*IMAGE, "width"), 33, "0.png cannot be read .*Mismatched"),
        (("categories",), DELETE, "have no 'categories'"),
        (("images",), [], "no images|is empty"),
    ],
)
def test_what_cannot_be_left_out_is_refused(path, value, message, folder):
    with pytest.raises(UserError, match=message) as e:
        use(changed(path, value), folder)
    assert "\n" not in str(e.value)


WEIRD = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5),
    st.just([]), st.just({}), st.lists(st.floats(), max_size=5),
    st.sampled_from(["text.png", "broken.png", "..", 0, 1, 2, 3, [[1, 2, 3, 4, 5, 6]], DELETE]),
)  # fmt: skip


@fuzzed()
@given(data=st.data())
def test_any_json_is_a_dataset_or_one_line(data, folder):
    """Values of another kind in any place, keys that are gone, or a text that is cut."""
    content = coco()
    if data.draw(st.integers(0, 9)) == 0:
        text = json.dumps(content)
        content = text[: data.draw(st.integers(0, len(text) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            node, depth = content, data.draw(st.integers(1, 4))
            for i in range(depth):
                if not isinstance(node, (dict, list)) or not node:
                    break
                keys = list(node) if isinstance(node, dict) else list(range(len(node)))
                key = data.draw(st.sampled_from(keys))
                if i + 1 < depth and isinstance(node[key], (dict, list)) and node[key]:
                    node = node[key]
                    continue
                value = data.draw(WEIRD)
                if value is DELETE:
                    del node[key]
                else:
                    # It may be changed in its turn.
                    node[key] = copy.deepcopy(value)
                break
    try:
        seen = use(content, folder)
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) > 20
    else:
        for x in seen:
            boxes = x["instances"].gt_boxes
            assert boxes.tensor.isfinite().all() and boxes.nonempty().all()


# ---- what is written -------------------------------------------------------------------------


def test_an_export_stays_in_its_folder(teacher_files, tmp_path):
    """Whatever paths its config has, and wherever the names that it writes lead."""
    run, out = tmp_path / "run", tmp_path / "a" / "out"
    run.mkdir()
    out.mkdir(parents=True)
    (tmp_path / "victim").write_text("mine")
    for name in ("model_final.pth", "student_config.yaml", "model_card.md"):
        (out / name).symlink_to(tmp_path / "victim")
    cfg = digits_cfg("retinanet", "OUTPUT_DIR", "../../escaped", "MODEL.DEVICE", "cpu")
    cfg.DATASETS.TRAIN = ("../../escaped",)
    (run / "config.yaml").write_text(cfg.dump())
    shutil.copy(teacher_files["retinanet"], run / "model_final.pth")
    before = {x for x in tmp_path.rglob("*") if out not in x.parents}
    image = np.zeros((96, 96, 3), np.uint8)
    weights = str(run / "model_final.pth")
    export_student(str(run / "config.yaml"), out, image, weights=weights)
    assert {x for x in tmp_path.rglob("*") if out not in x.parents} == before
    assert (tmp_path / "victim").read_text() == "mine"
    written = (out / "student_config.yaml").read_text()
    assert "OUTPUT_DIR: ./output" in written and str(tmp_path) not in written
