"""A comparison is fair, goes on where it stopped, and its page says what its results say."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import REPO
from scipy.stats import ttest_rel

from pcka_distill import compare as module
from pcka_distill.bench import Diverged, run
from pcka_distill.compare import Comparison, compare, read_plan, write_page
from pcka_distill.errors import UserError

PLAN = """
title: A comparison
choose_on: val
report_on: test
tune_seeds: [100, 101]
tasks:
  short: {config: FOLDER/c.yaml, teacher: FOLDER/t.yaml, opts: {SOLVER.MAX_ITER: 10}}
  long: {base: short, opts: {SOLVER.MAX_ITER: 30}}
methods:
  plain: {title: student alone}
  a: {losses: [ALoss], tune: [{A.WEIGHT: 1.0}, {A.WEIGHT: 3.0, A.MORE: 1}]}
  b: {losses: [BLoss], opts: {B.KIND: x}}
  ab: {combine: [a, b], title: A and B}
sections:
  - {title: One, task: short, methods: [plain, a, b, ab], reference: a, seeds: 3, plot: bars}
  - {title: Two, task: long, methods: [plain, a], seeds: 2, plot: iterations}
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN.replace("FOLDER", str(tmp_path)))
    for name in "ct":
        (tmp_path / f"{name}.yaml").write_text("MODEL: {DEVICE: cpu}")
    return tmp_path / "plan.yaml"


class World:
    """In place of training: an AP that depends on the overrides and the seed, and a record."""

    def __init__(self):
        self.ran = []
        self.fail = None
        self.teacher = 1.0

    def run(self, config, folder, opts=(), *, label, teacher=None, threads=None):
        opts = dict(zip(opts[::2], opts[1::2]))
        self.ran.append((config, opts, teacher))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("MODEL: {DEVICE: cpu}")
        assert threads == 1  # a teacher's rounding depends on it, too
        if teacher is None:
            model = {"weight": torch.tensor([self.teacher])}
            torch.save({"model": model}, folder / "model_final.pth")
        if self.fail and self.fail(opts):
            raise Diverged("loss is NaN")
        losses = opts.get("MODEL.DISTILL.LOSSES", [])
        seed = opts.get("SEED", 0)
        ap = 30 + seed % 100 * (1 + len(losses)) + opts.get("SOLVER.MAX_ITER", 0) / 10
        if "ALoss" in losses:
            # Better on val with the small weight, on test with the large one.
            small = opts["MODEL.DISTILL.A.WEIGHT"] == 1.0
            val, ap = ap + (6 if small else 4), ap + (1 if small else 20)
        else:
            val = ap
        if "BLoss" in losses:
            ap += 2.5 - 0.1 * seed
        points = (ap - 5, ap)
        with open(folder / "metrics.json", "w") as f:
            for i, x in enumerate(points):
                f.write(json.dumps({"iteration": 5 * i + 4, "loss": 1.0}) + "\n")
                f.write(json.dumps({"iteration": 5 * i + 4, "test/bbox/AP": x}) + "\n")
        boxes = {
            k: {"bbox": {"AP": v, "AP50": v + 10, "AP75": v + 5}}
            for k, v in (("val", val), ("test", ap))
        }
        return {"results": boxes, "train_seconds": 1.23, "parameters": 5}


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(module, "run", world.run)
    return world


def comparison(plan, **changes):
    content = read_plan(plan)
    for key, value in changes.items():
        setattr(content, key, value)
    return Comparison(content, plan.with_name("results.jsonl"))


def make(plan, runs="runs", **changes):
    made = comparison(plan, **changes)
    compare(made, made.plan.sections, plan.parent / runs, 2)
    return made


def test_what_is_run(plan, world):
    """Nothing but what the sections need, each once, the same seeds for all."""
    make(plan)
    teacher, *rest = world.ran
    assert teacher == (str(plan.parent / "t.yaml"), {}, None)
    assert all(x[2].parts[-2:] == ("t", "model_final.pth") for x in rest)
    keys = [json.dumps(x[1], sort_keys=True) for x in rest]
    assert len(set(keys)) == len(keys)

    def seeds(iterations, **setting):
        return sorted(
            o["SEED"]
            for _, o, _ in rest
            if o["SOLVER.MAX_ITER"] == iterations
            and all(o.get(f"MODEL.DISTILL.{k}") == v for k, v in setting.items())
            and ("MODEL.DISTILL.A.WEIGHT" in o) == ("A.WEIGHT" in setting)
        )

    plain, a, b = {"PCKA.WEIGHT": 0.0}, {"LOSSES": ["ALoss"]}, {"B.KIND": "x"}
    assert seeds(10, **plain, LOSSES=["PCKALoss"]) == [0, 1, 2]
    assert seeds(10, **b) == [0, 1, 2]
    # The weight is chosen on val, on seeds of its own, whatever it does on test.
    assert seeds(10, **a, **{"A.WEIGHT": 1.0}) == [0, 1, 2, 100, 101]
    assert seeds(10, **a, **{"A.WEIGHT": 3.0}) == [100, 101]
    # Both with the weights that each was given alone.
    assert seeds(10, LOSSES=["ALoss", "BLoss"], **b, **{"A.WEIGHT": 1.0}) == [0, 1, 2]
    # The longer task takes the settings of the shorter one.
    assert seeds(30, **plain) == [0, 1] and seeds(30, **a, **{"A.WEIGHT": 1.0}) == [0, 1]
    assert len(rest) == 3 + 3 + 7 + 3 + 2 + 2


def test_a_task_may_choose_for_itself(plan, world):
    """For one method; what is not tuned there, or not at all, is as on its base."""
    tasks = read_plan(plan).tasks
    tasks["long"].tune = ["a"]
    done = make(plan, tasks=tasks)
    seeds = {
        o["SEED"]
        for _, o, _ in world.ran
        if o.get("SOLVER.MAX_ITER") == 30 and o.get("MODEL.DISTILL.A.WEIGHT") == 3.0
    }
    assert seeds == {100, 101}
    assert done.setting("long", "ab") == {"LOSSES": ["ALoss", "BLoss"], "A.WEIGHT": 1.0} | {
        "B.KIND": "x"
    }


def test_what_is_there_is_not_run_again(plan, world):
    make(plan)
    lines = plan.with_name("results.jsonl").read_text()
    world.ran.clear()
    make(plan, "elsewhere")
    assert not world.ran and plan.with_name("results.jsonl").read_text() == lines
    # One more seed: only that one.
    more = comparison(plan)
    more.plan.sections[0].seeds = 4
    compare(more, more.plan.sections, plan.parent / "runs", 2)
    assert {o.get("SEED") for _, o, _ in world.ran} == {3} and len(world.ran) == 4


def test_a_result_names_the_commit_that_made_it(plan, world, monkeypatch):
    """And says if the code has been changed since; outside a checkout nothing is said."""
    repository = plan.parent / "checkout"
    (repository / "projects").mkdir(parents=True)
    monkeypatch.setattr(module, "REPOSITORY", repository)

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(repository), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def codes(runs):
        plan.with_name("results.jsonl").unlink(missing_ok=True)
        made = make(plan, runs)
        return {row.get("code") for row in (*made.rows.values(), *made.teachers.values())}

    assert codes("a") == {None}
    git("init", "--quiet")
    (repository / "projects" / "a.py").write_text("a = 1")
    git("add", ".")
    git("commit", "--quiet", "-m", "a")
    commit = git("rev-parse", "--short", "HEAD")
    (repository / "results.jsonl").write_text("what a comparison writes is no change of it")
    # Of another repository, as a hook of it would have.
    monkeypatch.setenv("GIT_DIR", str(REPO / ".git"))
    assert codes("b") == {commit}
    (repository / "projects" / "b.py").write_text("b = 1")
    assert codes("c") == {f"{commit}+"}
    # Runs that are there already were made by what was there then.
    assert codes("b") == {commit} and codes("a") == {None}


def test_an_interrupted_comparison_goes_on(plan, world):
    def stop(opts):
        if len(world.ran) >= 6:
            raise KeyboardInterrupt
        return False

    world.fail = stop
    with pytest.raises(KeyboardInterrupt):
        make(plan)
    kept = len(comparison(plan).rows)
    assert 0 < kept < 20
    world.fail, before = None, len(world.ran)
    done = make(plan, "again")
    assert len(done.rows) == 20
    assert len(world.ran) - before == 20 - kept + 1


def row(page, title, method):
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    line = re.search(rf"^\| {re.escape(method)} \|.*$", section, re.M)[0]
    head = re.search(r"^\| method .*$", section, re.M)[0]
    return dict(zip(*([x.strip() for x in y.strip("|").split("|")] for y in (head, line))))


def test_the_page(plan, world):
    page = write_page(make(plan), plan.with_suffix(".md"))
    aps = {
        "student alone": [31.0 + 2 * s for s in range(3)],
        "a": [32.0 + 2 * s for s in range(3)],
        "b": [33.5 + 1.9 * s for s in range(3)],
    }
    for method, values in aps.items():
        cells = row(page, "One", method)
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        assert cells["AP"] == f"{mean:.1f} ± {deviation:.1f}"
        assert cells["AP50"] == f"{mean + 10:.1f} ± {deviation:.1f}"
    # By hand: 2.5, 2.4 and 2.3 more than alone; 1.5, 1.4 and 1.3 more than a, so that the standard
    # error is 0.1 / sqrt(3), and t with two degrees of freedom is 4.303 at 95 %.
    assert row(page, "One", "b")["over the student alone"] == "+2.4 [+2.2, +2.6]"
    p = ttest_rel(aps["b"], aps["a"]).pvalue
    assert row(page, "One", "b")["over a"] == f"+1.4 [+1.2, +1.6], p {p:.3f}"
    assert row(page, "One", "a")["over a"] == ""
    # A constant difference has no interval.
    assert row(page, "One", "a")["over the student alone"] == "+1.0"
    assert row(page, "One", "A and B")["chosen on val"] == "A.WEIGHT 1.0"
    assert row(page, "Two", "a")["AP"] == "35.0 ± 1.4"
    assert "over a" not in row(page, "Two", "a")
    assert "/t.yaml | 30.0 | 30.0 |" in page
    assert re.search(r"^20 runs: torch \S+, Python \S+, cpu\.$", page, re.M)
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (plan.parent / name).stat().st_size > 5000
    # Made again of the results alone.
    assert write_page(comparison(plan), plan.parent / "other.md") == page.replace(
        "(plan_", "(other_"
    )


def test_runs_that_are_not_made_yet_are_told(plan, world):
    world.fail = lambda opts: "ALoss" in opts.get("MODEL.DISTILL.LOSSES", [])
    done = make(plan, sections=read_plan(plan).sections[:1])
    page = write_page(done, plan.with_suffix(".md"))
    assert row(page, "One", "a")["AP"] == "3 of 3 diverged"
    assert row(page, "One", "b")["over a"] == ""
    page = write_page(comparison(plan), plan.with_suffix(".md"))
    assert row(page, "Two", "student alone")["AP"] == "0 of 2 runs made"
    # Before any was made, settings included.
    plan.with_name("results.jsonl").unlink()
    page = write_page(comparison(plan), plan.with_suffix(".md"))
    assert row(page, "One", "a")["AP"] == "0 of 3 runs made"
    assert row(page, "One", "a")["chosen on val"] == ""


def test_a_seed_that_diverged_has_no_curve(plan, world):
    world.fail = lambda opts: opts.get("SOLVER.MAX_ITER") == 30 and opts["SEED"] == 1
    page = write_page(make(plan), plan.with_suffix(".md"))
    assert row(page, "Two", "a")["AP"] == "1 of 2 diverged"


def test_a_changed_task_is_another(plan, world):
    """Whatever it is called; and what did not change is kept."""
    make(plan)
    world.ran.clear()
    tasks = read_plan(plan).tasks
    tasks["long"].opts = {"SOLVER.MAX_ITER": 31}
    changed = make(plan, "elsewhere", tasks=tasks)
    assert {o.get("SOLVER.MAX_ITER") for _, o, _ in world.ran[1:]} == {31}
    assert len(world.ran) == 1 + 4 and len(changed.rows) == 24
    world.ran.clear()
    (plan.parent / "c.yaml").write_text("MODEL: {DEVICE: cpu}\nSOLVER: {BASE_LR: 0.1}")
    make(plan, "again")
    assert len(world.ran) == 1 + 20


def test_another_teacher_is_not_mixed_in(plan, world):
    make(plan)
    world.teacher = 2.0
    sections = read_plan(plan).sections
    sections[0].seeds = 4
    with pytest.raises(UserError, match=r"is another teacher than that of .*bring its che"):
        make(plan, "elsewhere", sections=sections)
    # The same, trained again, will do.
    world.teacher = 1.0
    assert len(make(plan, "again", sections=sections).rows) == 24


def test_one_that_fails_does_not_stop_the_others(plan, world, monkeypatch):
    real = world.run

    def run(config, folder, opts=(), **kwargs):
        if "BLoss" in dict(zip(opts[::2], opts[1::2])).get("MODEL.DISTILL.LOSSES", []):
            raise UserError("B needs what is not there")
        return real(config, folder, opts, **kwargs)

    monkeypatch.setattr(module, "run", run)
    with pytest.raises(UserError, match="6 runs failed, the others were made; the first: B needs"):
        make(plan)
    assert len(comparison(plan).rows) == 14


def test_results_that_are_damaged(plan, world):
    make(plan)
    results = plan.with_name("results.jsonl")
    results.write_text(results.read_text()[:-20])
    with pytest.raises(UserError, match=r"results\.jsonl: line 21 is damaged; remove it"):
        comparison(plan)


def test_folders_tell_settings_apart():
    settings = [json.dumps({f"A.KEY_{i}": i * k for i in range(40)}) for k in (1, 2)]
    folders = {module.Job("task", x, 0).folder for x in settings}
    assert len(folders) == 2 and all(len(Path(x).parts[1]) < 200 for x in folders)


def test_a_weight_that_diverges_is_not_chosen(plan, world):
    world.fail = lambda opts: opts.get("MODEL.DISTILL.A.WEIGHT") == 1.0
    page = write_page(make(plan), plan.with_suffix(".md"))
    assert row(page, "One", "a")["chosen on val"] == "A.WEIGHT 3.0, A.MORE 1"


def test_several_references(plan, world):
    plan.write_text(plan.read_text().replace("reference: a", "reference: [a, b]"))
    page = write_page(make(plan), plan.with_suffix(".md"))
    cells = row(page, "One", "A and B")
    # B gives 2.5 + 0.9 seed to A; A gives 1 + seed to B.
    assert cells["over a"].startswith("+3.4 [") and cells["over b"].startswith("+2.0 [")
    assert row(page, "One", "b")["over b"] == "" and row(page, "One", "b")["over a"]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((0.5, 1.0, 3.0), "A.WEIGHT 1.0"),
        ((1.0, 2.0, 3.0), "A.WEIGHT 1.0 (the least tried)"),
        ((0.3, 0.5, 1.0), "A.WEIGHT 1.0 (the most tried)"),
        ((1.0, 3.0), "A.WEIGHT 1.0"),
    ],
)
def test_an_edge_that_won_is_marked(plan, world, weights, said):
    tune = ", ".join(f"{{A.WEIGHT: {x}}}" for x in weights)
    old = "tune: [{A.WEIGHT: 1.0}, {A.WEIGHT: 3.0, A.MORE: 1}]"
    plan.write_text(plan.read_text().replace(old, f"tune: [{tune}]"))
    page = write_page(make(plan), plan.with_suffix(".md"))
    assert row(page, "One", "a")["chosen on val"] == said


def test_what_is_in_no_table_is_listed(plan, world):
    """Not what a setting was chosen of, nor what another section takes over."""
    page = write_page(make(plan), plan.with_suffix(".md"))
    assert "in no table" not in page
    fewer = comparison(plan)
    fewer.plan.sections = [s for s in fewer.plan.sections if s.title == "Two"]
    page = write_page(fewer, plan.with_suffix(".md"))
    listed = page.split("in no table")[1].split("\n\n")[1].splitlines()[2:]
    settings = [line.split(" | ")[1:3] for line in listed]
    # The student alone, B, and A with B, three seeds each; A was chosen of for Two.
    assert ["LOSSES ['PCKALoss'], PCKA.WEIGHT 0.0", "3"] in settings
    assert ["B.KIND x, LOSSES ['BLoss']", "3"] in settings
    assert [x[1] for x in settings] == ["3"] * len(settings)
    assert all("A.MORE" not in x[0] for x in settings)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: A comparison", "titel: A", "unknown key 'titel'; known are title, choose_on"),
        ("losses: [BLoss]", "loss: [BLoss]", "method 'b' has an unknown key 'loss'"),
        ("combine: [a, b]", "combine: [a, c]", "method 'ab' names 'c', expected one of plain, a"),
        ("task: long", "task: wide", "section 'Two' names 'wide'"),
        ("reference: a", "reference: z", "the reference of section 'One' names 'z'"),
        (
            "[plain, a, b, ab], reference: a",
            "[plain, b], reference: [b, a]",
            "the reference of section 'One' names 'a', expected one of plain, b",
        ),
        ("SOLVER.MAX_ITER: 30", "SEED: 3", "task 'long' sets SEED, which each run has its own"),
        ("base: short", "base: tall", "task 'long' names 'tall'"),
        ("base: short", "base: long", "task 'long' is made of itself"),
        ("combine: [a, b]", "combine: [ab]", "method 'ab' is made of itself"),
        ("report_on: test", "report_on: val", "must be two datasets"),
        ("tune_seeds: [100, 101]", "tune_seeds: [1, 9]", r"'One' reports seeds \[1\], which"),
        ("title: Two, ", "", "section 2: .*title"),
        ("tasks:", "tasks: [", "cannot be read"),
    ],
)
def test_plans_that_cannot_be_used(plan, old, new, message):
    plan.write_text(PLAN.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_plan(plan)
    with pytest.raises(UserError, match=r"none\.yaml cannot be read"):
        read_plan(plan.with_name("none.yaml"))


def test_a_loss_that_is_not_finite_is_known_as_such(tmp_path):
    """By the error that it ended with, in the part of the log that is new."""
    opts = ["SOLVER.MAX_ITER", 30, "SOLVER.WARMUP_ITERS", 0, "SOLVER.IMS_PER_BATCH", 2]
    opts += ["DATASETS.TEST", [], "SOLVER.BASE_LR"]
    config = "configs/Digits/retinanet_student.yaml"
    with pytest.raises(Diverged, match=r"the run in .* failed: error: not finite: .*loss_"):
        run(config, tmp_path, [*opts, 1e30], label="")
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"SOLVER\.MAX_ITER is 0") as other:
        run(config, tmp_path, [*opts, 1e-3, "SOLVER.MAX_ITER", 0], label="again")
    assert not isinstance(other.value, Diverged)


def test_of_real_runs(tmp_path):
    """A teacher, a student alone and a distilled one, of two iterations each."""
    short = {
        "SOLVER": {"MAX_ITER": 2, "IMS_PER_BATCH": 2},
        "DATASETS": {"TEST": ["digits_test"]},
        # Nothing is found, and evaluated in no time.
        "MODEL": {"RETINANET": {"SCORE_THRESH_TEST": 0.99}},
    }
    for name, config in (("teacher", "retinanet_student"), ("distilled", "retinanet_pcka")):
        content = {"_BASE_": str(REPO / "configs" / "Digits" / f"{config}.yaml"), **short}
        if name == "distilled":
            teacher = {"TEACHER": {"CONFIG_FILE": "teacher.yaml"}}
            content["MODEL"] = {**content["MODEL"], "DISTILL": teacher}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    plan = {
        "title": "Real",
        "choose_on": "digits_val",
        "report_on": "digits_test",
        "cache": True,
        "tasks": {
            "tiny": {
                "config": str(tmp_path / "distilled.yaml"),
                "teacher": str(tmp_path / "teacher.yaml"),
            }
        },
        "methods": {"plain": {}, "pkd": {"losses": ["PKDLoss"]}},
        "sections": [{"title": "Tiny", "task": "tiny", "methods": ["plain", "pkd"], "seeds": 1}],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, str(REPO / "tools" / "compare.py"), str(tmp_path / "plan.yaml")]
    command += ["--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r.get("teacher") for r in rows] == [str(tmp_path / "teacher.yaml"), None, None]
    assert all(0 <= r["metrics"]["digits_test"]["AP"] <= 100 for r in rows)
    assert "## Tiny" in done.stdout and (tmp_path / "plan.md").read_text() in done.stdout
    assert list((tmp_path / "runs" / "cache").glob("*/*/*.pt"))
    again = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert again.stdout.startswith("0 runs")
