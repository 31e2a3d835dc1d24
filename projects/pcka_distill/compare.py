"""A fair comparison of distillation methods: equal trials, equal seeds, one page.

A plan (a yaml, see ``benchmarks/comparison.yaml``) names tasks, methods and the sections of a page.
Every method of a section is run on the section's task with the same seeds, from the same initial
weights, with the same teacher, images and iterations. What is to be chosen (a weight) is chosen by
the mean metric on one dataset, over seeds of its own; what is reported is measured on another.

Results are lines of a ``results.jsonl``. What is there is not run again, and the page is made from
it alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from tqdm import tqdm

from pcka_distill.bench import REPOSITORY, Diverged, run, spread
from pcka_distill.build import config_keys, read_config
from pcka_distill.errors import UserError, reason
from pcka_distill.teacher import digest_of

__all__ = ["Comparison", "compare", "read_plan", "write_page"]

Opts = dict[str, Any]
Row = dict[str, Any]
T = TypeVar("T")

# What the tool sets for each run.
_OWN_KEYS = ("SEED", "OUTPUT_DIR", "MODEL.DISTILL.TEACHER.WEIGHTS")
# The file in a run's folder with the commit that it began with.
_CODE = "code.txt"


@dataclass
class Task:
    """What is trained: a distillation config, and its teacher."""

    config: str = ""
    #: config of the teacher, trained here first; empty for the one that the config names, as it is
    teacher: str = ""
    #: overrides of the config
    opts: Opts = field(default_factory=dict)
    #: another task: what is not said here is as there, settings included
    base: str = ""
    #: methods whose settings are chosen on this task all the same
    tune: list[str] = field(default_factory=list)


@dataclass
class Method:
    """What is added to a student: losses and their keys, below MODEL.DISTILL."""

    losses: list[str] = field(default_factory=list)
    opts: Opts = field(default_factory=dict)
    #: settings of which the best on the validation set is taken
    tune: list[Opts] = field(default_factory=list)
    #: other methods, with their settings, to which this one adds
    combine: list[str] = field(default_factory=list)
    #: what to call it in the page; its name if empty
    title: str = ""


@dataclass
class Section:
    """A table of the page."""

    title: str
    task: str
    methods: list[str]
    text: str = ""
    #: seeds 0, 1, ... of every method; 0 only chooses its settings, and is no table
    seeds: int = 5
    #: what the others are compared to, by a paired test; one or several of the methods
    reference: str | list[str] = ""
    #: a bar for each method; or "iterations" for a curve; empty for none
    plot: str = ""

    @property
    def references(self) -> list[str]:
        """The same, always a list."""
        if isinstance(self.reference, str):
            return [self.reference] if self.reference else []
        return self.reference


@dataclass
class Plan:
    """All of a comparison."""

    title: str
    #: datasets to choose settings on, and to report
    choose_on: str
    report_on: str
    tasks: dict[str, Task]
    methods: dict[str, Method]
    sections: list[Section]
    text: str = ""
    #: file of the results, beside the plan
    results: str = "results.jsonl"
    #: what a run is measured by, "task/metric" as its results.json has them; the first decides
    metrics: list[str] = field(default_factory=lambda: ["bbox/AP", "bbox/AP50", "bbox/AP75"])
    #: seeds of the runs that settings are chosen by
    tune_seeds: list[int] = field(default_factory=lambda: [100, 101])
    #: keep what the teachers compute on disk; for images that come back unchanged
    cache: bool = False

    @property
    def names(self) -> list[str]:
        """Of the metrics, without their tasks where they are told apart without."""
        short = [x.partition("/")[2] for x in self.metrics]
        return [x if short.count(x) == 1 else whole for x, whole in zip(short, self.metrics)]


def _make(kind: type[T], content: Any, where: str) -> T:
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a mapping of keys to values")
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in content:
        if key not in known:
            raise UserError(f"{where} has an unknown key {key!r}; known are {', '.join(known)}")
    try:
        return kind(**content)
    except TypeError as e:
        raise UserError(f"{where}: {reason(e)}") from e


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        UserError: it is not there, is no yaml, or names what it does not define.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as e:
        raise UserError(f"plan {path} cannot be read: {reason(e)}") from e
    plan = _make(Plan, content, str(path))
    plan.tasks = {k: _make(Task, v, f"task {k!r}") for k, v in plan.tasks.items()}
    plan.methods = {k: _make(Method, v or {}, f"method {k!r}") for k, v in plan.methods.items()}
    plan.sections = [_make(Section, x, f"section {i + 1}") for i, x in enumerate(plan.sections)]

    def known(name: str, names: Iterable[str], where: str) -> None:
        if name not in names:
            raise UserError(f"{where} names {name!r}, expected one of {', '.join(names)}")

    if not plan.metrics or not all(re.fullmatch(r"[^/]+/.+", x) for x in plan.metrics):
        raise UserError(f"{path}: metrics are written as task/metric, such as bbox/AP")
    if len(set(plan.metrics)) < len(plan.metrics):
        raise UserError(f"{path}: a metric is named twice: {', '.join(plan.metrics)}")
    if plan.choose_on == plan.report_on:
        raise UserError(f"{path}: choose_on and report_on must be two datasets")
    for name, task in plan.tasks.items():
        if task.base:
            known(task.base, plan.tasks, f"task {name!r}")
        for method_name in task.tune:
            known(method_name, plan.methods, f"task {name!r}")
        own = [key for key in _OWN_KEYS if key in task.opts]
        if own:
            raise UserError(f"task {name!r} sets {', '.join(own)}, which each run has its own of")
    for name, method in plan.methods.items():
        for other in method.combine:
            known(other, plan.methods, f"method {name!r}")
    for section in plan.sections:
        where = f"section {section.title!r}"
        known(section.task, plan.tasks, where)
        for name in section.methods:
            known(name, plan.methods, where)
        for name in section.references:
            known(name, section.methods, f"the reference of {where}")
        shared = [x for x in plan.tune_seeds if x in range(section.seeds)]
        if shared:
            raise UserError(f"{where} reports seeds {shared}, which settings are chosen by")
    _refuse_loops({k: [t.base] if t.base else [] for k, t in plan.tasks.items()}, "task")
    _refuse_loops({k: m.combine for k, m in plan.methods.items()}, "method")
    return plan


def _refuse_loops(parents: Mapping[str, Sequence[str]], what: str) -> None:
    def visit(name: str, below: tuple[str, ...]) -> None:
        if name in below:
            raise UserError(f"{what} {name!r} is made of itself")
        for parent in parents[name]:
            visit(parent, (*below, name))

    for name in parents:
        visit(name, ())


@dataclass(frozen=True)
class Job:
    """One run: a task with a setting of a method, and a seed."""

    task: str
    #: the overrides, as json with sorted keys
    setting: str
    seed: int

    @property
    def opts(self) -> Opts:
        """The overrides."""
        opts: Opts = json.loads(self.setting)
        return opts

    @property
    def overrides(self) -> Opts:
        """The same by their whole names."""
        return {f"MODEL.DISTILL.{k}": v for k, v in self.opts.items()}

    @property
    def folder(self) -> str:
        """A name for its folder that says what it is."""
        words = [f"{k}={v}" for k, v in self.opts.items()]
        name = "".join(c if c.isalnum() or c in "=.-" else "_" for c in "_".join(words))
        if len(name) > 150:
            # File systems have a limit; what is cut off must still tell two settings apart.
            digest = hashlib.blake2b(self.setting.encode(), digest_size=4).hexdigest()
            name = f"{name[:140]}-{digest}"
        return f"{self.task}/{name}/{self.seed}"


class Comparison:
    """A plan and the results that there are.

    Args:
        plan: see :func:`read_plan`.
        results: a ``results.jsonl``; it need not be there yet.
    """

    def __init__(self, plan: Plan, results: Path) -> None:
        self.plan = plan
        self.path = results
        #: (what was run, seed) -> result
        self.rows: dict[tuple[str, int], Row] = {}
        #: config -> result
        self.teachers: dict[str, Row] = {}
        self._contents: dict[str, Opts] = {}
        if results.exists():
            for i, line in enumerate(results.read_text().splitlines()):
                try:
                    row = json.loads(line)
                except ValueError as e:
                    raise UserError(f"{results}: line {i + 1} is damaged; remove it") from e
                if "teacher" in row:
                    self.teachers[row["teacher"]] = row
                else:
                    self.rows[row["run"], row["seed"]] = row

    def add(self, job: Job, row: Row) -> None:
        """Keep the result of a run."""
        run = self.identity(job)
        row = {"task": job.task, "opts": job.opts, "seed": job.seed, "run": run, **row}
        self.rows[run, job.seed] = row
        self._append(row)

    def row(self, job: Job) -> Row | None:
        """The result of a run, if it is there."""
        return self.rows.get((self.identity(job), job.seed))

    def identity(self, job: Job) -> str:
        """A digest of all that was asked for: what is run again if a config or a plan changes.

        The names of tasks and methods are no part of it, nor are the defaults of keys.
        """
        if job.task not in self._contents:
            task = self.task(job.task)
            loaded = read_config(str(REPOSITORY / task.config))
            keys = {k: v for k, v in config_keys(loaded) if not isinstance(v, dict)}
            asked = {**keys, **task.opts, "teacher": task.teacher}
            for key in _OWN_KEYS:
                asked.pop(key, None)
            self._contents[job.task] = asked
        asked = {**self._contents[job.task], **job.overrides}
        return hashlib.blake2b(_text(asked).encode(), digest_size=8).hexdigest()

    def add_teacher(self, config: str, row: Row) -> None:
        """Keep the result of a teacher."""
        row = {"teacher": config, **row}
        self.teachers[config] = row
        self._append(row)

    def _append(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def task(self, name: str) -> Task:
        """A task with all that it takes from others."""
        task = self.plan.tasks[name]
        if not task.base:
            return task
        base = self.task(task.base)
        return Task(
            task.config or base.config, task.teacher or base.teacher, {**base.opts, **task.opts}
        )

    def title(self, method: str) -> str:
        """What the page calls a method."""
        return self.plan.methods[method].title or method

    def _tuned_on(self, name: str, method: str) -> str:
        """The task on which the settings of a method are chosen."""
        task = self.plan.tasks[name]
        if not task.base or method in task.tune or not self.plan.methods[method].tune:
            return name
        return self._tuned_on(task.base, method)

    def _candidates(self, task: str, name: str) -> list[Opts] | None:
        """The settings of a method that are tried on a task; None if others must be known first."""
        method = self.plan.methods[name]
        losses, opts = list(method.losses), {}
        for other in method.combine:
            setting = self.setting(task, other)
            if setting is None:
                return None
            losses += setting.pop("LOSSES")
            opts.update(setting)
        if not losses:
            # The student alone, whatever its family: without a weight nothing is built.
            return [{"LOSSES": ["PCKALoss"], "PCKA.WEIGHT": 0.0}]
        opts = {"LOSSES": list(dict.fromkeys(losses)), **opts, **method.opts}
        return [{**opts, **x} for x in method.tune or [{}]]

    def setting(self, task: str, name: str) -> Opts | None:
        """The setting of a method that a task uses; None if it is not known yet."""
        task = self._tuned_on(task, name)
        candidates = self._candidates(task, name)
        if candidates is None:
            return None
        if len(candidates) == 1:
            return dict(candidates[0])
        scores = []
        for opts in candidates:
            rows = [self.row(job) for job in self._jobs(task, opts, self.plan.tune_seeds)]
            if None in rows:
                return None
            plan = self.plan
            values = [_metric(row, plan.choose_on, plan.names[0]) for row in rows if row]
            scores.append(statistics.mean(values))
        # One that diverged with any of the seeds is the last to be taken.
        order = [-math.inf if math.isnan(score) else score for score in scores]
        return dict(candidates[max(range(len(order)), key=order.__getitem__)])

    @staticmethod
    def _jobs(task: str, opts: Opts, seeds: Iterable[int]) -> list[Job]:
        return [Job(task, _text(opts), seed) for seed in seeds]

    def missing(self, sections: Sequence[Section]) -> list[Job]:
        """The runs that sections lack and whose settings are known; dict order, none twice."""
        jobs: dict[Job, None] = {}
        for section in sections:
            for name in section.methods:
                jobs.update(dict.fromkeys(self.wanted(section, name)))
        return [job for job in jobs if self.row(job) is None]

    def wanted(self, section: Section, name: str) -> Iterator[Job]:
        """The runs of a method in a section, there or not, as far as its settings are known.

        Those that settings are chosen of, its own and of what it combines, and those of its table.
        """
        yield from self._trials(section.task, name)
        setting = self.setting(section.task, name)
        if setting is not None:
            yield from self._jobs(section.task, setting, range(section.seeds))

    def _trials(self, task: str, name: str) -> Iterator[Job]:
        """The runs that :meth:`setting` looks at."""
        task = self._tuned_on(task, name)
        candidates = self._candidates(task, name) or []
        if len(candidates) > 1:
            for opts in candidates:
                yield from self._jobs(task, opts, self.plan.tune_seeds)
        for other in self.plan.methods[name].combine:
            yield from self._trials(task, other)

    def results(self, section: Section, name: str) -> list[Row]:
        """The rows of a method in a section, by seed; fewer than its seeds if some are missing."""
        setting = self.setting(section.task, name)
        if setting is None:
            return []
        jobs = self._jobs(section.task, setting, range(section.seeds))
        return [row for job in jobs if (row := self.row(job)) is not None]


def _text(opts: Opts) -> str:
    return json.dumps(opts, sort_keys=True)


def _metric(row: Row, dataset: str, name: str) -> float:
    """Of a run, in percent; NaN if it diverged."""
    value = row["metrics"].get(dataset, {}).get(name) if "metrics" in row else None
    return math.nan if value is None else float(value)


def _history(folder: Path, datasets: Sequence[str], metric: str) -> list[list[Any]]:
    """[iteration, {dataset: value}] of each evaluation on the way, of a task/metric."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        content = json.loads(line)
        for key, value in content.items():
            if key == metric or key.endswith(f"/{metric}"):
                # Of a single dataset Detectron2 leaves out the name.
                dataset = key.removesuffix(metric).rstrip("/") or datasets[0]
                found.setdefault(content["iteration"] + 1, {})[dataset] = value
    return [[i, found[i]] for i in sorted(found)]


def _execute(comparison: Comparison, job: Job, runs: Path, teacher: Path | None) -> Row:
    plan, task = comparison.plan, comparison.task(job.task)
    opts: Opts = {"SEED": job.seed, **task.opts}
    if plan.cache:
        opts["MODEL.DISTILL.TEACHER.CACHE.DIR"] = str(runs.absolute() / "cache")
    # Only the last one: a run that is cut off is made again.
    opts.setdefault("SOLVER.CHECKPOINT_PERIOD", 10**9)
    opts.update(job.overrides)
    folder = runs / job.folder
    flat = [x for pair in opts.items() for x in pair]
    try:
        found = _run(task.config, folder, flat, label="", teacher=teacher)
    except Diverged as e:
        return {"diverged": str(e), **_made_with(folder)}
    row = _result(found, folder, plan)
    history = _history(folder, list(found["results"]), plan.metrics[0])
    if len(history) > 1:
        row["history"] = history
    return row


def _made_with(folder: Path) -> dict[str, str]:
    """What a run was made with: where, and the commit that it began with, if that is known."""
    device = yaml.safe_load((folder / "config.yaml").read_text())["MODEL"]["DEVICE"]
    if device.startswith("cuda") and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    where = f"torch {torch.__version__}, Python {platform.python_version()}, {device}"
    code = folder / _CODE
    return {"environment": where, **({"code": code.read_text()} if code.exists() else {})}


def _code() -> str:
    """The commit of this code, with a + if it has been changed since; empty outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return ""

    # Of a hook they would name another repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(REPOSITORY), *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return done.stdout.strip()

    try:
        # Results themselves are a change that does not matter.
        folders = ("projects", "tools", "configs")
        changed = git("status", "--porcelain", "--untracked-files=normal", "--", *folders)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        # No git, or none that may read it: a commit is worth less than the run.
        return ""


def _run(
    config: str, folder: Path, opts: Sequence[Any] = (), *, label: str, teacher: Path | None = None
) -> dict[str, Any]:
    """:func:`.bench.run` on one thread; a run that begins keeps the commit that it begins with."""
    if not (folder / "config.yaml").exists() and (code := _code()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CODE).write_text(code)
    # Teachers as their students: on more a teacher is another, by its rounding.
    return run(config, folder, opts, label=label, teacher=teacher, threads=1)


def _result(found: dict[str, Any], folder: Path, plan: Plan) -> Row:
    """Of a ``results.json`` what is kept."""
    wanted = [(*whole.split("/", 1), name) for whole, name in zip(plan.metrics, plan.names)]
    return {
        # Of a model that finds nothing Detectron2 says that there is no AP.
        "metrics": {
            dataset: {name: round(v[task][key] or 0.0, 3) for task, key, name in wanted}
            for dataset, v in found["results"].items()
        },
        "seconds": round(found["train_seconds"], 1),
        "parameters": found["parameters"],
        **_made_with(folder),
    }


def _teachers(
    comparison: Comparison, sections: Sequence[Section], runs: Path, processes: int
) -> dict[str, Path]:
    """Train the teachers that are not there: config -> checkpoint.

    Raises:
        UserError: one is not that of the results.
    """
    configs = [comparison.task(section.task).teacher for section in sections]
    folders = {x: runs / "teachers" / Path(x).stem for x in dict.fromkeys(configs) if x}
    if len(set(folders.values())) < len(folders):
        raise UserError(f"teachers of one name: {', '.join(folders)}; rename their configs")
    weights = {config: folder / "model_final.pth" for config, folder in folders.items()}
    with ThreadPoolExecutor(processes) as pool:
        made = {
            config: pool.submit(_run, config, folder, label=folder.name)
            for config, folder in folders.items()
            if config not in comparison.teachers or not weights[config].exists()
        }
    for config, folder in folders.items():
        found = made[config].result() if config in made else None
        state = torch.load(weights[config], map_location="cpu", weights_only=True)["model"]
        digest = digest_of(state)
        known = comparison.teachers.get(config)
        if known is None and found is not None:
            row = _result(found, folder, comparison.plan)
            comparison.add_teacher(config, {**row, "weights": digest})
        elif known is not None and known["weights"] != digest:
            raise UserError(
                f"{weights[config]} is another teacher than that of {comparison.path}: bring its "
                "checkpoint, or begin with new results"
            )
    return weights


def compare(
    comparison: Comparison, sections: Sequence[Section], runs: Path, processes: int
) -> None:
    """Make the runs that sections lack, so many at a time, each on one thread.

    Raises:
        UserError: runs failed, for another reason than a loss that is not finite. All others were
            made.
    """
    failed: dict[Job, UserError] = {}

    def left() -> list[Job]:
        return [job for job in comparison.missing(sections) if job not in failed]

    if not left():
        return
    weights = _teachers(comparison, sections, runs, processes)
    with ThreadPoolExecutor(processes) as pool:
        while jobs := left():
            futures = {
                pool.submit(
                    _execute, comparison, job, runs, weights.get(comparison.task(job.task).teacher)
                ): job
                for job in jobs
            }
            with tqdm(total=len(jobs), desc="runs", disable=not sys.stderr.isatty()) as bar:
                try:
                    for count, done in enumerate(as_completed(futures), 1):
                        job = futures[done]
                        try:
                            row = done.result()
                        except UserError as e:
                            failed[job] = e
                            result = str(e)
                        else:
                            comparison.add(job, row)
                            plan = comparison.plan
                            result = f"{_metric(row, plan.choose_on, plan.names[0]):.1f}"
                        bar.update()
                        bar.write(f"{count} of {len(jobs)}: {job.folder}: {result}")
                except BaseException:
                    # What is running ends by itself; its folder has the result.
                    pool.shutdown(cancel_futures=True)
                    raise
    if failed:
        first = next(iter(failed.values()))
        raise UserError(f"{len(failed)} runs failed, the others were made; the first: {first}")


# ---- the page --------------------------------------------------------------------------------


def _difference(mine: Sequence[float], theirs: Sequence[float]) -> tuple[str, str]:
    """Of paired values the mean difference with its 95 % interval, and the p-value of a t-test."""
    differences = [a - b for a, b in zip(mine, theirs)]
    if any(math.isnan(x) for x in differences):
        return "", ""
    mean = statistics.mean(differences)
    if len(differences) < 2 or statistics.stdev(differences) < 1e-9:
        return f"{mean:+.1f}", ""
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0)
    low, high = test.confidence_interval()
    p = "p < 0.001" if test.pvalue < 0.001 else f"p {test.pvalue:.3f}"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", p


def _setting_text(comparison: Comparison, section: Section, name: str) -> str:
    """What was chosen for a method, of what was tried."""
    setting = comparison.setting(section.task, name) or {}
    chosen: dict[str, str] = {}

    def add(name: str) -> None:
        method = comparison.plan.methods[name]
        for other in method.combine:
            add(other)
        # What is not in it was tried and not taken.
        for key in dict.fromkeys(k for opts in method.tune for k in opts if k in setting):
            tried = [opts[key] for opts in method.tune if isinstance(opts.get(key), float)]
            edge = ""
            if len(set(tried)) > 2:
                # Beyond an edge there may be a better one.
                ends = {min(tried): " (the least tried)", max(tried): " (the most tried)"}
                edge = ends.get(setting[key], "")
            chosen[key] = f"{setting[key]}{edge}"

    add(name)
    return ", ".join(f"{k} {v}" for k, v in chosen.items())


def table(comparison: Comparison, section: Section) -> list[str]:
    """A section's table; a method whose runs are not all there has a row that says so."""
    plan = comparison.plan
    first, *others = plan.names
    rows = {name: comparison.results(section, name) for name in section.methods}

    def values(name: str, metric: str, dataset: str = plan.report_on) -> list[float]:
        return [_metric(row, dataset, metric) for row in rows[name]]

    def over(name: str, other: str) -> tuple[str, str]:
        if name == other or len(rows[other]) < section.seeds:
            return "", ""
        return _difference(values(name, first), values(other, first))

    alone = [x for x in section.methods if not (plan.methods[x].losses or plan.methods[x].combine)]
    columns = ["method", "chosen on val", first]
    if alone:
        columns.append("over the student alone")
    columns += [f"over {comparison.title(x)}" for x in section.references]
    columns += [*others, f"{first}, val"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name in section.methods:
        cells = [comparison.title(name), _setting_text(comparison, section, name)]
        if len(rows[name]) < section.seeds:
            cells.append(f"{len(rows[name])} of {section.seeds} runs made")
        elif diverged := sum("diverged" in row for row in rows[name]):
            cells.append(f"{diverged} of {section.seeds} diverged")
        else:
            cells.append(spread(values(name, first)))
            if alone:
                cells.append(over(name, alone[0])[0])
            cells += [", ".join(filter(None, over(name, x))) for x in section.references]
            cells += [spread(values(name, x)) for x in others]
            cells.append(spread(values(name, first, plan.choose_on)))
        cells += [""] * (len(columns) - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plot(comparison: Comparison, section: Section, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plan = comparison.plan
    first = plan.names[0]
    curves = section.plot == "iterations"
    needed = "history" if curves else "metrics"
    made = {name: comparison.results(section, name) for name in section.methods}
    done = {
        name: rows
        for name, rows in made.items()
        if len(rows) == section.seeds and all(needed in row for row in rows)
    }
    height = 4.5 if curves else 0.9 + 0.3 * len(done)
    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (name, rows) in enumerate(done.items()):
        if curves:
            iterations = [x for x, _ in rows[0]["history"]]
            aps = [[ap[plan.report_on] for _, ap in row["history"]] for row in rows]
            mean = [statistics.mean(x) for x in zip(*aps)]
            deviation = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in zip(*aps)]
            line = axes.plot(
                iterations, mean, marker="o", markersize=3, label=comparison.title(name)
            )[0]
            low, high = ([m + k * s for m, s in zip(mean, deviation)] for k in (-1, 1))
            axes.fill_between(iterations, low, high, color=line.get_color(), alpha=0.12)
        else:
            values = [_metric(row, plan.report_on, first) for row in rows]
            axes.plot(values, [i] * len(values), "o", color="0.6", markersize=4)
            axes.plot([statistics.mean(values)], [i], "|", color="black", markersize=14, mew=2)
    axes.grid(axis="both" if curves else "x", alpha=0.3)
    if curves:
        axes.set_xlabel("iteration")
        axes.set_ylabel(f"{first}, {plan.report_on}")
        if done:
            axes.legend()
    else:
        axes.set_yticks(range(len(done)), [comparison.title(name) for name in done])
        axes.invert_yaxis()
        axes.set_xlabel(f"{first}, {plan.report_on}; a dot a seed, a line their mean")
    figure.savefig(path, dpi=110)


def _tried(comparison: Comparison) -> list[str]:
    """What was run and is in no table, nor among the settings that one was chosen of."""
    plan = comparison.plan
    used = {
        comparison.identity(job)
        for section in plan.sections
        for name in section.methods
        for job in comparison.wanted(section, name)
    }
    left: dict[str, list[Row]] = {}
    for (digest, _), row in comparison.rows.items():
        if digest not in used:
            left.setdefault(digest, []).append(row)
    if not left:
        return []
    first = plan.names[0]
    lines = ["## Tried, and in no table", "", f"| task | setting | runs | {first} | {first}, val |"]
    lines.append("|---|---|---|---|---|")
    for rows in left.values():
        setting = ", ".join(f"{k} {v}" for k, v in rows[0]["opts"].items())
        aps = [
            spread([_metric(row, dataset, first) for row in rows])
            for dataset in (plan.report_on, plan.choose_on)
        ]
        lines.append(f"| {rows[0]['task']} | {setting} | {len(rows)} | {' | '.join(aps)} |")
    return [*lines, ""]


def write_page(comparison: Comparison, path: Path) -> str:
    """Write the page, and its plots beside it.

    Returns:
        its text, which depends on the plan and the results alone.
    """
    plan = comparison.plan
    lines = [f"# {plan.title}", ""]
    if plan.text:
        lines += [plan.text.strip(), ""]
    for i, section in enumerate(plan.sections):
        if not section.seeds:
            continue
        lines += [f"## {section.title}", ""]
        if section.text:
            lines += [section.text.strip(), ""]
        lines += [*table(comparison, section), ""]
        if section.plot:
            name = f"{path.stem}_{i + 1}.png"
            lines += [f"![{section.title}]({name})", ""]
            _plot(comparison, section, path.with_name(name))
    used = [*comparison.teachers.values(), *comparison.rows.values()]
    where = sorted({row["environment"] for row in used})
    if comparison.teachers:
        first = plan.names[0]
        lines += ["## Teachers", "", f"| config | {first} | {first}, val |", "|---|---|---|"]
        for config, row in sorted(comparison.teachers.items()):
            aps = [f"{_metric(row, x, first):.1f}" for x in (plan.report_on, plan.choose_on)]
            lines.append(f"| {config} | {' | '.join(aps)} |")
        lines.append("")
    lines += _tried(comparison)
    text = "\n".join([*lines, f"{len(comparison.rows)} runs: {'; '.join(where)}."]) + "\n"
    path.write_text(text)
    return text
