"""Whole runs through the same entry as tools/train_net.py, on the digits set."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from helpers import REPO, SHIPPED, build_distilled, make_batch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.multiprocessing.spawn import ProcessRaisedException

from pcka_distill import UserError, get_distill_cfg
from pcka_distill.engine import Trainer, cli, main, setup

pytestmark = pytest.mark.usefixtures("digits")


def arguments(config, output, *opts, flags=()):
    opts = [*opts, "OUTPUT_DIR", str(output), "TEST.EVAL_PERIOD", "0"]
    path = str(REPO / "configs" / "Digits" / f"{config}.yaml")
    return default_argument_parser().parse_args(
        ["--config-file", path, *flags, *(str(x) for x in opts)]
    )


def distill_arguments(family, teacher, output, *opts, flags=()):
    return arguments(
        f"{family}_pcka",
        output,
        *("MODEL.DISTILL.LOSSES", "['PCKALoss','MimicLoss']"),
        "MODEL.DISTILL.TEACHER.CONFIG_FILE",
        REPO / "configs" / "Digits" / f"{family}_student.yaml",
        "MODEL.DISTILL.TEACHER.WEIGHTS",
        teacher,
        "SOLVER.MAX_ITER",
        4,
        "SOLVER.CHECKPOINT_PERIOD",
        2,
        *opts,
        flags=flags,
    )


def metrics(output):
    return {k for x in (output / "metrics.json").read_text().splitlines() for k in json.loads(x)}


@pytest.mark.parametrize("family", SHIPPED)
def test_a_distilled_run_end_to_end(family, teacher_files, tmp_path):
    """Train, evaluate, and let stock Detectron2 load the checkpoint with the student's config."""
    args = distill_arguments(
        family, teacher_files[family], tmp_path, "MODEL.DISTILL.LOSSES",
        "['PCKALoss','RCKALoss','MimicLoss']",
    )  # fmt: skip
    results = main(args)
    segments = family == "sem_seg"
    data, task, metric = (
        ("digits_sem_seg", "sem_seg", "mIoU") if segments else ("digits", "bbox", "AP")
    )
    assert set(results) == {f"{data}_val", f"{data}_test"}
    written = json.loads((tmp_path / "results.json").read_text())
    assert metric in written["results"][f"{data}_val"][task]
    assert written["parameters"] < 1e6 and written["train_seconds"] > 0

    # Every loss by level, in JSON, in TensorBoard and on the console.
    terms = {f"loss_{n}_p{i}" for n in ("pcka", "mimic") for i in (3, 4, 5)}
    own = {"fcos": ("loss_fcos_cls", "loss_fcos_ctr"), "sem_seg": ("loss_sem_seg",)}
    terms |= {"loss_rcka_intra", "loss_rcka_inter", *own.get(family, ("loss_cls", "loss_box_reg"))}
    assert terms <= metrics(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert all(f"{term}: " in log for term in terms) and "eta: " in log
    assert "p3 (64 channels, stride 8) <- p3 (64 channels, stride 8)" in log
    events = next(tmp_path.glob("events*")).read_bytes()
    assert all(term.encode() in events for term in terms)

    # Stock Detectron2: its own config, builder and checkpointer.
    # (FCOS is Detectron2's own, and so is its checkpoint; the yaml that builds it is not.)
    cfg = get_distill_cfg() if family == "fcos" else get_cfg()
    cfg.merge_from_file(str(tmp_path / "student_config.yaml"))
    model = build_model(cfg)
    incompatible = []

    class Spy(DetectionCheckpointer):
        def _log_incompatible_keys(self, x):
            incompatible.append(x)

    Spy(model).load(str(tmp_path / "model_final.pth"))
    assert not incompatible[0].missing_keys and not incompatible[0].incorrect_shapes
    # and the same detections as the distilled model gives
    distilled = Trainer.build_model(setup(args))
    DetectionCheckpointer(distilled).load(str(tmp_path / "model_final.pth"))
    batch = make_batch()
    for m in (model, distilled):
        for head in m.modules():
            if hasattr(head, "test_score_thresh"):
                head.test_score_thresh = 0.0
    with torch.no_grad():
        ours, theirs = distilled.eval()(batch), model.eval()(batch)
    for a, b in zip(ours, theirs):
        if segments:
            assert torch.equal(a["sem_seg"], b["sem_seg"])
            continue
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)

    # Evaluation builds no teacher: its checkpoint may be gone.
    again = distill_arguments(
        family, "gone.pth", tmp_path / "eval", "MODEL.WEIGHTS", tmp_path / "model_final.pth",
        flags=["--eval-only"],
    )  # fmt: skip
    assert main(again)[f"{data}_test"][task][metric] == results[f"{data}_test"][task][metric]


def command(*args):
    # As users run it: conftest.py switches scripted functions off.
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_JIT"}
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / "train_net.py"), *map(str, args)],
        capture_output=True, text=True, cwd=REPO, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize("family", SHIPPED)
def test_zero_weight_run_is_stock(family, teacher_files, tmp_path):
    """Through the command line: the same data, losses and final weights as the plain student."""
    opts = ["SOLVER.MAX_ITER", 4, "DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 0]
    zero = ["MODEL.DISTILL.PCKA.WEIGHT", 0.0]
    for folder, config, more in (("plain", "student", []), ("zero", "pcka", zero)):
        path = REPO / "configs" / "Digits" / f"{family}_{config}.yaml"
        done = command("--config-file", path, *opts, *more, "OUTPUT_DIR", tmp_path / folder)
        assert done.returncode == 0, done.stderr
    plain, zero = (
        torch.load(tmp_path / x / "model_final.pth", weights_only=False)["model"]
        for x in ("plain", "zero")
    )
    assert list(plain) == list(zero)
    assert all(torch.equal(plain[k], zero[k]) for k in plain)


def test_resume_continues_everything(teacher_files, tmp_path):
    opts = ["DATASETS.TEST", "()"]
    run = distill_arguments("retinanet", teacher_files["retinanet"], tmp_path, *opts)
    main(run)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    saved = torch.load(tmp_path / "model_0000001.pth", weights_only=False)
    args = distill_arguments(
        "retinanet", teacher_files["retinanet"], tmp_path, *opts, flags=["--resume"]
    )
    trainer = Trainer(setup(args))
    fresh = trainer.model.state_dict()["distill.mimic.projections.p3.weight"].clone()
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    state = trainer.model.state_dict()
    assert list(state) == list(saved["model"])
    assert all(torch.equal(state[k], saved["model"][k]) for k in state)
    # the adapters too, and they had been trained
    assert not torch.equal(state["distill.mimic.projections.p3.weight"], fresh)
    mine, theirs = trainer.state_dict(), saved["trainer"]
    assert mine["iteration"] == theirs["iteration"] == 1
    assert mine["hooks"]["LRScheduler"] == theirs["hooks"]["LRScheduler"]
    assert mine["hooks"]["Stopwatch"] == theirs["hooks"]["Stopwatch"]
    moments = mine["_trainer"]["optimizer"]["state"]
    for key, value in theirs["_trainer"]["optimizer"]["state"].items():
        assert torch.equal(moments[key]["exp_avg"], value["exp_avg"])
    trainer.train()
    assert trainer.iter == 4
    assert torch.load(tmp_path / "model_final.pth", weights_only=False)["iteration"] == 3


def test_a_finished_run_resumed_is_only_evaluated(teacher_files, tmp_path):
    opts = ["DATASETS.TEST", "('digits_val',)"]
    weights = teacher_files["retinanet"]
    first = main(distill_arguments("retinanet", weights, tmp_path, *opts))
    again = main(distill_arguments("retinanet", weights, tmp_path, *opts, flags=["--resume"]))
    assert again["bbox"]["AP50"] == first["bbox"]["AP50"]


def test_adamw_and_sgd_by_key(tmp_path):
    for name, kind in (
        ("AdamW", torch.optim.AdamW),
        ("adamw", torch.optim.AdamW),
        ("SGD", torch.optim.SGD),
    ):
        cfg = setup(arguments("faster_rcnn_student", tmp_path, "SOLVER.OPTIMIZER", name))
        optimizer = Trainer.build_optimizer(cfg, build_model(cfg))
        assert isinstance(optimizer, kind) and "GradientClip" in type(optimizer).__name__
        assert all(g["weight_decay"] in (0.0, 1e-4) for g in optimizer.param_groups)


# ---- bad input: one line, before anything is trained -----------------------------------------

BAD = {
    "config key": (
        ["MODEL.DISTILL.PCKA.WIEGHT", 1],
        "override of the config file cannot be used: .*, did you mean MODEL.DISTILL.PCKA.WEIGHT?",
    ),
    "half an override": (["SOLVER.MAX_ITER"], "override of the config file cannot be used"),
    "level": (["MODEL.DISTILL.PCKA.LEVELS", "['p9']"], "unknown level 'p9': student has p3"),
    "loss": (["MODEL.DISTILL.LOSSES", "['PKCALoss']"], "unknown loss 'PKCALoss'"),
    "teacher weights": (["MODEL.DISTILL.TEACHER.WEIGHTS", "no.pth"], "teacher weights not found"),
    "teacher config": (["MODEL.DISTILL.TEACHER.CONFIG_FILE", "no.yaml"], "neither a file .* nor"),
    "patch": (["MODEL.DISTILL.PCKA.PATCH_SIZE", "[4]"], "a patch of 4 is larger than level 'p5'"),
    "classes": (["MODEL.RETINANET.NUM_CLASSES", 4], "has 10 classes and the model has 4"),
    "architecture": (["MODEL.DISTILL.STUDENT_ARCHITECTURE", "X"], "STUDENT_ARCHITECTURE is 'X'"),
    "dataset": (["DATASETS.TRAIN", "['digit_train']"], "did you mean digits_train"),
    "dataset, nothing like it": (
        ["DATASETS.TRAIN", "['zzzzzz']"], "unknown dataset 'zzzzzz' in DATASETS; your own must be"
    ),
    "test dataset": (["DATASETS.TEST", "['digits_tset']"], "did you mean digits_test"),
    "no loss": (["MODEL.DISTILL.LOSSES", "[]"], "MODEL.DISTILL.LOSSES is empty"),
    "meta-architecture": (["MODEL.META_ARCHITECTURE", "Retina"], "cannot be built: .*'Retina'"),
    "backbone": (["MODEL.BACKBONE.NAME", "bilud"], "the model cannot be built: .*'bilud'"),
    "teacher's backbone": (
        ["MODEL.DISTILL.TEACHER.OPTS", "['MODEL.BACKBONE.NAME','bilud']"],
        "the teacher cannot be built: .*'bilud'",
    ),
    "mixed precision": (
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16"],
        "SOLVER.AMP.PRECISION float16 needs a CUDA device",
    ),
    "unknown precision": (
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp8"],
        "unknown SOLVER.AMP.PRECISION 'fp8', expected 'float16', 'bfloat16', or ''",
    ),
    "dataset files": (["DATASETS.TRAIN", "['coco_2017_train']"], "is not there: .*DETECTRON2_DATA"),
    "device": (["MODEL.DEVICE", "gpu"], "the model cannot be put on MODEL.DEVICE 'gpu': "),
    "no dataset": (["DATASETS.TRAIN", "[]"], "DATASETS.TRAIN is empty"),
    "iterations": (["SOLVER.MAX_ITER", 0], "SOLVER.MAX_ITER is 0; it must be positive"),
    "batch size": (["SOLVER.IMS_PER_BATCH", 0], "SOLVER.IMS_PER_BATCH is 0"),
    "no parts": (["SOLVER.ACCUMULATION_STEPS", 0], "ACCUMULATION_STEPS is 0; it must be positive"),
    "uneven parts": (
        ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.ACCUMULATION_STEPS", 3],
        r"multiple of processes \(1\) times SOLVER.ACCUMULATION_STEPS \(3\)",
    ),
    "teacher's precision": (
        ["MODEL.DISTILL.TEACHER.PRECISION", "fp8"], "unknown MODEL.DISTILL.TEACHER.PRECISION 'fp8'"
    ),
    "teacher's cache": (
        ["MODEL.DISTILL.TEACHER.CACHE.DIR", "/dev/null/x"], "cache cannot be used: .*/dev/null"
    ),
    "batch size to be scaled": (
        ["SOLVER.IMS_PER_BATCH", 12, "SOLVER.REFERENCE_WORLD_SIZE", 8],
        r"is 12; it must be a positive multiple of SOLVER.REFERENCE_WORLD_SIZE \(8\)",
    ),
    "level of logits": (
        ["MODEL.DISTILL.LOSSES", "['RCKALoss']", "MODEL.DISTILL.RCKA.LEVELS", "['p9']"],
        "RCKALoss: unknown level p9, the student's head has p3, p4, p5; change LEVELS",
    ),
    "optimizer": (["SOLVER.OPTIMIZER", "Adam"], "unknown SOLVER.OPTIMIZER 'Adam'"),
    "student weights": (["MODEL.WEIGHTS", "no.pth"], "checkpoint not found: no.pth"),
    "pyramids": (
        ["MODEL.DISTILL.TEACHER.OPTS", "['MODEL.FPN.IN_FEATURES',['res5'],"
         "'MODEL.RESNETS.OUT_FEATURES',['res5'],'MODEL.RETINANET.IN_FEATURES',['p5'],"
         "'MODEL.ANCHOR_GENERATOR.SIZES',[[42]]]", "MODEL.DISTILL.TEACHER.ALLOW_PARTIAL", True],
        "level 'p3' has no counterpart: student has p3 .*; teacher has p5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_the_first_iteration(case, teacher_files, tmp_path):
    opts, message = BAD[case]
    args = distill_arguments(
        "retinanet", teacher_files["retinanet"], tmp_path, "DATASETS.TEST", "()", *opts
    )
    with pytest.raises(UserError, match=message) as e:
        main(args)
    assert "\n" not in str(e.value)
    log = tmp_path / "metrics.json"
    assert not log.exists() or log.read_text() == ""


def test_the_keys_that_save_time_and_memory(teacher_files, tmp_path):
    """Together, and again from a checkpoint; the student's config stays one of Detectron2."""
    opts = (
        *("SOLVER.ACCUMULATION_STEPS", 2, "SOLVER.ACTIVATION_CHECKPOINT", True),
        *("MODEL.DISTILL.TEACHER.PRECISION", "bfloat16"),
        *("MODEL.DISTILL.TEACHER.CHANNELS_LAST", True),
        *("MODEL.DISTILL.TEACHER.CACHE.DIR", tmp_path / "cache"),
    )
    teacher = teacher_files["retinanet"]
    output = tmp_path / "run"
    main(distill_arguments("retinanet", teacher, output, *opts, "DATASETS.TEST", "()"))
    assert {"teacher_cache_hits", "loss_pcka_p3", "total_loss"} <= metrics(output)
    log = (output / "log.txt").read_text()
    assert "_CheckpointedStage" in log and "Each batch is taken in 2 parts" in log
    args = distill_arguments(
        "retinanet", teacher, output, *opts, "SOLVER.MAX_ITER", 6, "DATASETS.TEST", "()",
        flags=["--resume"],
    )  # fmt: skip
    main(args)
    cfg = get_cfg()
    cfg.merge_from_file(str(output / "student_config.yaml"))
    student = build_model(cfg)
    DetectionCheckpointer(student).load(str(output / "model_final.pth"))
    saved = torch.load(output / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(x, saved[k]) for k, x in student.state_dict().items())


def test_corrupt_student_weights(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    args = arguments("retinanet_student", tmp_path, "MODEL.WEIGHTS", tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth cannot be loaded"):
        main(args)


@pytest.mark.parametrize("flags", [["--eval-only"], ["--eval-only", "--resume"]])
def test_eval_only_needs_a_checkpoint(flags, tmp_path):
    with pytest.raises(UserError, match="--eval-only needs a checkpoint"):
        main(arguments("retinanet_student", tmp_path, flags=flags))


def test_eval_only_refuses_the_checkpoint_of_another_model(teacher_files, tmp_path):
    """Stock Detectron2 warns, and reports the AP of a random head."""
    state = torch.load(teacher_files["retinanet"])["model"]
    del state["head.bbox_pred.bias"]
    state["head.cls_score.weight"] = torch.zeros(7, 64, 3, 3)
    torch.save({"model": state}, tmp_path / "x.pth")
    args = arguments(
        "retinanet_student", tmp_path, "MODEL.WEIGHTS", tmp_path / "x.pth", flags=["--eval-only"]
    )
    with pytest.raises(UserError, match=r"1 of another shape .*cls_score.*1 missing .*bbox_pred"):
        main(args)


def test_evaluation_keeps_the_results_of_training(teacher_files, tmp_path):
    (tmp_path / "results.json").write_text("of training")
    main(
        arguments(
            "retinanet_student", tmp_path, "MODEL.WEIGHTS", teacher_files["retinanet"],
            "DATASETS.TEST", "('digits_val',)", flags=["--eval-only"],
        )
    )  # fmt: skip
    assert (tmp_path / "results.json").read_text() == "of training"
    assert "digits_val" in json.loads((tmp_path / "evaluation.json").read_text())["results"]


def test_a_last_checkpoint_that_is_gone(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    with pytest.raises(UserError, match=r"model_0000099.pth; correct or remove last_checkpoint"):
        main(arguments("retinanet_student", tmp_path, flags=["--resume"]))


@pytest.fixture
def my_dataset(tmp_path):
    """Register a COCO json of one's own; its content is the argument."""

    def register(content):
        (tmp_path / "my.json").write_text(content)
        register_coco_instances("my_set", {}, str(tmp_path / "my.json"), str(tmp_path))

    yield register
    DatasetCatalog.remove("my_set")
    MetadataCatalog.remove("my_set")


def test_classes_of_the_test_set_are_checked_before_training(my_dataset, tmp_path):
    my_dataset(json.dumps({**json.loads(EMPTY), "images": [IMAGE]}))
    (tmp_path / "gone.png").touch()
    args = arguments("retinanet_student", tmp_path, "DATASETS.TEST", "('my_set',)")
    with pytest.raises(UserError, match="dataset 'my_set' has 1 classes and the model has 10"):
        main(args)


def test_mixed_precision_is_no_matter_of_evaluation(teacher_files, tmp_path):
    opts = ["MODEL.WEIGHTS", teacher_files["retinanet"], "SOLVER.AMP.ENABLED", True]
    setup(arguments("retinanet_student", tmp_path, *opts, flags=["--eval-only"]))


IMAGE = {"id": 1, "file_name": "gone.png", "height": 9, "width": 9}
EMPTY = json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]})


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "Expecting value"),
        ("{}", "its annotations have no 'categories'"),
        (EMPTY, "no images|is empty"),
    ],
)
def test_damaged_annotations(split, content, message, my_dataset, tmp_path):
    my_dataset(content)
    opts = ["DATASETS.TEST", "()", f"DATASETS.{split}", "('my_set',)"]
    args = arguments("retinanet_student", tmp_path, *opts)
    with pytest.raises(UserError, match=f"dataset my_set cannot be used: .*({message})"):
        main(args)


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_images_that_are_missing(split, my_dataset, tmp_path):
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
    my_dataset(json.dumps({**json.loads(EMPTY), "images": [IMAGE], "annotations": [box]}))
    opts = ["DATASETS.TEST", "()", f"DATASETS.{split}", "('my_set',)"]
    args = arguments("retinanet_student", tmp_path, *opts)
    with pytest.raises(UserError, match=r"my_set cannot be used: image .*gone.png does not exist"):
        main(args)


def test_an_earlier_run_in_the_folder_is_told(tmp_path, caplog):
    logging.getLogger("detectron2").propagate = True
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    setup(arguments("retinanet_student", tmp_path, flags=["--resume"]))
    assert "holds an earlier run" not in caplog.text
    setup(arguments("retinanet_student", tmp_path))
    assert "holds an earlier run" in caplog.text


def test_no_evaluator(my_dataset, tmp_path):
    my_dataset(EMPTY)
    MetadataCatalog.get("my_set").__dict__["evaluator_type"] = "mine"
    args = arguments("retinanet_student", tmp_path, "DATASETS.TEST", "('my_set',)")
    with pytest.raises(UserError, match="no evaluator for dataset 'my_set' of type 'mine'"):
        main(args)


def test_losses_without_the_model_that_computes_them(teacher_files, tmp_path, caplog):
    logging.getLogger("detectron2").propagate = True
    setup(
        distill_arguments(
            "retinanet", teacher_files["retinanet"], tmp_path,
            "MODEL.META_ARCHITECTURE", "RetinaNet",
        )
    )  # fmt: skip
    assert "META_ARCHITECTURE is RetinaNet: nothing is distilled" in caplog.text


def test_an_output_folder_that_cannot_be_written():
    with pytest.raises(UserError, match=r"OUTPUT_DIR cannot be written: .*/dev/null"):
        main(arguments("retinanet_student", "/dev/null/x"))


def test_an_error_in_a_launched_process_is_one_line_too(monkeypatch):
    """As torch.multiprocessing reports it from a child of Detectron2's launcher."""

    def launch(*args, **kwargs):
        raise ProcessRaisedException(
            "\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call "
            "last):\n  ...\npcka_distill.errors.UserError: unknown level 'p9'\n", 1, 2
        )  # fmt: skip

    monkeypatch.setattr("pcka_distill.engine.launch", launch)
    monkeypatch.setattr("sys.argv", ["train_net.py"])
    with pytest.raises(SystemExit, match=r"^error: unknown level 'p9'$"):
        cli()


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("sys.argv", ["train_net.py", "--num-gpus", "64"])
    with pytest.raises(SystemExit, match=r"^error: --num-gpus is 64 and 2 CUDA devices"):
        cli()


def test_the_command_prints_the_line_and_no_traceback(tmp_path):
    done = command("--config-file", "no/such.yaml", "OUTPUT_DIR", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: config file not found: no/such.yaml"
    assert "Traceback" not in done.stderr
    (tmp_path / "bad.yaml").write_text("MODEL: [unclosed\n")
    done = command("--config-file", tmp_path / "bad.yaml", "OUTPUT_DIR", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: config file" in done.stderr.strip().splitlines()[-1]


def test_debug_shows_where_an_error_comes_from():
    done = command("--config-file", "no/such.yaml", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "merge_config" in done.stderr


def test_what_tensorboard_shows(teacher_files, tmp_path):
    """Losses and CKA by level, shares of the gradient, and Detectron2's pictures of detections."""
    main(
        distill_arguments(
            "retinanet", teacher_files["retinanet"], tmp_path, "SOLVER.MAX_ITER", 20,
            "VIS_PERIOD", 8, "SOLVER.GRADIENT_MONITOR_PERIOD", 20,
            "DATASETS.TEST", "['digits_val']",
        )
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars, pictures = events.Tags()["scalars"], events.Tags()["images"]
    levels = ("p3", "p4", "p5")
    assert {f"loss_{x}_{y}" for x in ("pcka", "mimic") for y in levels} <= set(scalars)
    assert {f"cka/{x}" for x in levels} | {"grad_share/pcka_p3"} <= set(scalars)
    for level in levels:
        (value,) = events.Scalars(f"cka/{level}")
        # At the end of a period, where writers look.
        assert value.step == 19
        assert -1 < value.value < 0.999
    assert pictures == ["detections"]
    drawn = events.Images("detections")
    assert [x.step for x in drawn] == [7, 15, 19]
    assert min(x.width for x in drawn) > 600


def test_pictures_change_nothing_else(teacher_files, tmp_path):
    for period in (0, 1):
        main(
            distill_arguments(
                "retinanet", teacher_files["retinanet"], tmp_path / str(period), "SEED", 3,
                "VIS_PERIOD", period, "DATASETS.TEST", "['digits_val']",
            )
        )  # fmt: skip
    a, b = (torch.load(tmp_path / x / "model_final.pth", weights_only=False) for x in "01")
    assert all(torch.equal(x, b["model"][k]) for k, x in a["model"].items())


def test_pictures_of_what_has_no_boxes(teacher_files, tmp_path, caplog):
    main(distill_arguments("sem_seg", teacher_files["sem_seg"], tmp_path, "VIS_PERIOD", 1))
    assert "no set of DATASETS.TEST has boxes to draw" in caplog.text


def test_a_copy_of_the_teacher_has_cka_1(teacher_files, storage):
    model = build_distilled("retinanet", teacher_files)
    DetectionCheckpointer(model).load(teacher_files["retinanet"])
    for x in model.modules():
        if "BatchNorm" in type(x).__name__:
            x.eval()
    storage.iter = 19
    model(make_batch())
    assert all(storage.latest()[f"cka/{x}"][0] == pytest.approx(1, abs=1e-4) for x in model.pairs)
