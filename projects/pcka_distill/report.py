"""One page about one or several runs, for people: curves, tables, pictures, what differed."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from tqdm import tqdm

from pcka_distill.checkpoint import write_whole
from pcka_distill.drawing import figure_of
from pcka_distill.errors import UserError, reason
from pcka_distill.visualize import check_target, draw_results

__all__ = ["Run", "read_run", "write_report"]

# What differs between any two runs and says nothing.
_OWN = ("OUTPUT_DIR", "train.output_dir")
_MOST_CURVES = 12

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em;
  color: #1c1c1c; background: #fff; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; border-bottom: 1px solid #e2e2e2; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th.text { text-align: left; }
td.text { text-align: left; font-family: ui-monospace, monospace; font-size: .85em;
  overflow-wrap: anywhere; }
.up { color: #0a6b1f; } .down { color: #a3180e; } .note { color: #666; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; } pre { font-size: .8em; }
"""


@dataclass
class Run:
    """What a run left in its OUTPUT_DIR."""

    title: str
    folder: Path
    #: key -> value, as written in config.yaml; of a LazyConfig, too, which is not run
    config: dict[str, Any]
    #: iteration -> what was logged then, in order
    metrics: dict[int, dict[str, float]]
    #: results.json, or evaluation.json; empty for a run that has not ended
    results: dict[str, Any]
    #: of the machine, as Detectron2 logged it: name -> what
    environment: dict[str, str]
    #: what the log says of the teacher
    teacher: str
    #: of its files, what is damaged and was left out
    left_out: list[str] = field(default_factory=list)

    @property
    def lazy(self) -> bool:
        """Whether its config is a LazyConfig."""
        return any(x.rpartition(".")[2] == "_target_" for x in self.config)


class _PlainLoader(yaml.SafeLoader):
    """Reads objects of Python as the data that they are written with; nothing is made or run."""


def _plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    # A function or a class has its name in the tag.
    return suffix.partition(":")[2] or suffix


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def read_run(title: str, folder: Path) -> Run:
    """Read OUTPUT_DIR.

    Raises:
        UserError: there is no run, or its files are damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no folder of a run: it has no config.yaml")
    left_out: list[str] = []
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = yaml.load(text, _PlainLoader)
        if not isinstance(config, dict):
            raise ValueError("its config.yaml has no keys")
        config = dict(_flat(config))
        results: dict[str, Any] = {}
        for name in ("results.json", "evaluation.json"):
            if not results and (folder / name).is_file():
                results = _read_results(folder / name, left_out)
        metrics = _read_metrics(folder / "metrics.json", left_out)
        path = folder / "log.txt"
        log = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except (ValueError, RecursionError, yaml.YAMLError, OSError) as e:
        raise UserError(f"the run in {folder} cannot be read: {reason(e)}") from e
    # With several parts of a run, the last is what counts.
    block = log.rsplit("Environment info:", 1)[-1] if "Environment info:" in log else ""
    block = block.split("PyTorch built with", 1)[0]
    pairs = re.findall(r"^(\w[\w.$() -]*?) {2,}(\S.*)$", block, re.M)
    said = re.findall(r"(Teacher: .* loaded from .*|Fingerprint of the teacher: \w+)", log)
    return Run(
        title, folder, config, metrics, results, dict(pairs),
        "; ".join(dict.fromkeys(said)), left_out,
    )  # fmt: skip


def _is_metric(x: object) -> bool:
    return isinstance(x, (int, float, NoneType)) and not isinstance(x, bool)


def _read_results(path: Path, left_out: list[str]) -> dict[str, Any]:
    """Of results.json, with what is no number left out.

    Raises:
        ValueError: it is none.
    """
    content = json.loads(path.read_bytes())
    datasets = content.get("results", {}) if isinstance(content, dict) else None
    tasks = list(datasets.values()) if isinstance(datasets, dict) else [0]
    tables = [x for y in tasks if isinstance(y, dict) for x in y.values()]
    if not all(isinstance(x, (dict, NoneType)) for x in (*tasks, *tables)):
        raise ValueError(f"{path.name} is none: dataset, task and metric are expected in it")
    odd = [k for k in ("parameters", "train_seconds") if not _is_metric(content.get(k))]
    for key in odd:
        del content[key]
    for table in filter(None, tables):
        for key in [k for k, v in table.items() if not _is_metric(v)]:
            del table[key]
            odd.append(key)
    if odd:
        left_out.append(f"{path.name}: {', '.join(dict.fromkeys(odd))}, no numbers")
    return content


def _read_metrics(path: Path, left_out: list[str]) -> dict[int, dict[str, float]]:
    """Iteration -> what was logged then; whole lines that cannot be read are counted."""
    found: dict[int, dict[str, float]] = {}
    last, odd = -1, 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            content = json.loads(line)
            step = int(content.pop("iteration"))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            # A run that was killed leaves half a line at the end, which is nobody's fault.
            odd += line.strip() != b"" and line.endswith(b"\n")
            continue
        if step < last:
            # A run that went on from a checkpoint logs some iterations again: the last counts.
            # So do those of a new run in the same folder.
            found = {k: v for k, v in found.items() if k <= step}
        found.setdefault(step, {}).update(content)
        last = step
    if odd:
        left_out.append(f"{path.name}: {odd} line{'s' if odd > 1 else ''} that cannot be read")
    return dict(sorted(found.items()))


def _flat(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, f"{prefix}{key}.")
    elif isinstance(node, list) and any(isinstance(x, dict) for x in node):
        # The losses of a LazyConfig.
        yield from _flat(dict(enumerate(node)), prefix)
    else:
        yield prefix[:-1], node


def write_report(path: Path, runs: Sequence[Run], *, images: int = 6, score: float = 0.4) -> None:
    """Write the page: one file of HTML with all of its pictures in it.

    Args:
        path: of the page.
        runs: the first is what the others are compared with.
        images: of how many test images to draw detections, at most 24; 0 draws none.
        score: what is scored lower is not drawn.

    Raises:
        UserError: it cannot be written.
    """
    check_target(path)
    parts = [
        ("Results", _results),
        ("Curves", _curves),
        ("By class", _classes),
        ("Detections", lambda runs: _pictures(runs, images, score)),
        ("What differs", _differences),
        ("Environment", _environments),
    ]
    body = []
    for title, part in tqdm(parts, desc="report", unit="part", disable=None):
        content = part(runs)
        if content:
            body.append(f"<h2>{title}</h2>\n{content}")
    names = ", ".join(x.title for x in runs)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(names)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(names)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
    try:
        write_whole(path, lambda f: f.write(page.encode()))
    except OSError as e:
        raise UserError(f"{path} cannot be written: {reason(e)}; change --out") from e


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of cells that are HTML already; those of :func:`_text` are aligned to the left."""
    texts = [any(row[i].startswith("<td") for row in rows) for i in range(len(head))]
    lines = [
        "".join(
            f'<th class="text">{html.escape(x)}</th>' if text else f"<th>{html.escape(x)}</th>"
            for x, text in zip(head, texts)
        )
    ]
    lines += ["".join(x if x.startswith("<td") else f"<td>{x}</td>" for x in row) for row in rows]
    body = "\n".join(f"<tr>{x}</tr>" for x in lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def _text(text: object) -> str:
    return f'<td class="text">{html.escape(str(text))}</td>'


def _number(value: float | None, before: float | None = None) -> str:
    """A metric, and by how much it differs."""
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:.1f}"
    if before is not None and math.isfinite(before):
        # Of what rounds to zero there is no sign, and no colour.
        change = round(value - before, 1) + 0.0
        color = "up" if change > 0 else "down" if change < 0 else "note"
        text += f' <span class="{color}">({change:+.1f})</span>'
    return text


def _tasks(run: Run) -> dict[tuple[str, str], dict[str, float | None]]:
    """(dataset, task) -> metric -> value."""
    datasets = run.results.get("results", {})
    return {(d, t): m or {} for d, tasks in datasets.items() for t, m in (tasks or {}).items()}


def _is_of_class(metric: str) -> bool:
    return "-" in metric


# Of the metrics of a class, which are shown.
_BY_CLASS = ("AP-", "IoU-")


def _results(runs: Sequence[Run]) -> str:
    """Metrics of every dataset, and the size and length of each run."""
    rows = []
    for run in runs:
        parameters = run.results.get("parameters")
        seconds = run.results.get("train_seconds")
        rows.append([
            html.escape(run.title),
            f"{parameters / 1e6:.2f} M" if parameters else "-",
            str(max(run.metrics, default=0)),
            f"{seconds / 60:.1f} min" if seconds else "-" if run.results else "has not ended",
            _text(run.teacher or "-"),
        ])  # fmt: skip
    text = _table(["run", "parameters", "iterations", "in training steps", "teacher"], rows)
    text += "".join(
        _note(f"{x.title}, left out: {'; '.join(x.left_out)}.") for x in runs if x.left_out
    )
    for key in dict.fromkeys(key for run in runs for key in _tasks(run)):
        names = [
            name
            for name in dict.fromkeys(x for run in runs for x in _tasks(run).get(key, {}))
            if not _is_of_class(name)
        ]
        first = _tasks(runs[0]).get(key, {})
        rows = [
            [html.escape(run.title)]
            + [
                _number(_tasks(run).get(key, {}).get(x), None if not i else first.get(x))
                for x in names
            ]
            for i, run in enumerate(runs)
        ]
        text += f"<h3>{html.escape(' / '.join(key))}</h3>" + _table(["run", *names], rows)
    return text


def _series(run: Run, wanted: Callable[[str], bool]) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> iterations and values."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for step, content in run.metrics.items():
        for name, value in content.items():
            if wanted(name) and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return found


def _image(figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _curves(runs: Sequence[Run]) -> str:
    """The main metric against iterations, then the losses, the CKAs and shares of each run."""
    panels: list[tuple[str, list[tuple[str, list[int], list[float]]]]] = []
    main = [
        x
        for run in runs
        for x in _series(run, lambda x: re.search(r"(^|/)(AP|mIoU|top1)$", x) is not None)
    ]
    for name in dict.fromkeys(main):
        lines = [(run.title, *_series(run, name.__eq__)[name]) for run in runs
                 if _series(run, name.__eq__)]  # fmt: skip
        panels.append((name, lines))
    totals = [(run.title, *_series(run, "total_loss".__eq__)["total_loss"]) for run in runs
              if _series(run, "total_loss".__eq__)]  # fmt: skip
    if totals:
        panels.append(("total_loss", totals))
    for run in runs:
        for title, prefix in (
            ("losses", "loss_"), ("CKA with the teacher", "cka/"),
            ("shares of the gradient", "grad_share/"),
        ):  # fmt: skip
            series = _series(run, lambda x, p=prefix: x.startswith(p))  # type: ignore[misc]
            lines = [(name.removeprefix(prefix), *xy) for name, xy in series.items()]
            if lines:
                panels.append((f"{run.title}: {title}", lines))
    if not panels:
        return ""
    columns = min(3, len(panels))
    figure, grid = figure_of(columns, -(-len(panels) // columns), 4.0, 3.0)
    for axis in grid.flat[len(panels) :]:
        axis.set_axis_off()
    for (title, lines), axis in zip(panels, grid.flat):
        for name, steps, values in lines[:_MOST_CURVES]:
            axis.plot(steps, values, label=name, lw=1.3, marker="." if len(steps) < 8 else None)
        more = len(lines) - _MOST_CURVES
        axis.set_title(title + (f" ({more} more not drawn)" if more > 0 else ""), fontsize=9)
        axis.set_xlabel("iteration", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    return _image(figure)


def _classes(runs: Sequence[Run]) -> str:
    """AP of each class, sorted by how much the last run differs from the first."""
    text = ""
    for key in dict.fromkeys(key for run in runs for key in _tasks(run)):
        tables = [
            {
                k.split("-", 1)[1]: v
                for k, v in _tasks(run).get(key, {}).items()
                if k.startswith(_BY_CLASS)
            }
            for run in runs
        ]
        names = list(dict.fromkeys(x for table in tables for x in table))
        if not names:
            continue
        first, last = tables[0], tables[-1]

        def change(name: str, a: Any = first, b: Any = last) -> float:
            x, y = a.get(name), b.get(name)
            return y - x if None not in (x, y) else -math.inf

        if len(runs) > 1:
            names.sort(key=change, reverse=True)
        rows = [
            [html.escape(name)]
            + [
                _number(table.get(name), None if not i else first.get(name))
                for i, table in enumerate(tables)
            ]
            for name in names
        ]
        head = ["class", *(x.title for x in runs)]
        text += f"<h3>{html.escape(' / '.join(key))}</h3>" + _table(head, rows)
    return text


def _pictures(runs: Sequence[Run], images: int, score: float) -> str:
    """What each detects in the first images of the dataset that the first was tested on."""
    if not images:
        return ""
    # A LazyConfig is a program, which is nothing to run for a page.
    lazy = [x.title for x in runs if x.lazy]
    text = ""
    if lazy:
        text = _note(f"Not drawn: {', '.join(lazy)}, whose models are those of LazyConfigs.")
    runs = [x for x in runs if not x.lazy]
    datasets = runs[0].config.get("DATASETS.TEST") if runs else None
    if isinstance(datasets, str):
        # Detectron2 dumps tuples as texts.
        datasets = re.findall(r"'([^']+)'", datasets)
    if not datasets:
        return text
    folders = {x.title: str(x.folder) for x in runs if (x.folder / "model_final.pth").is_file()}
    if not folders:
        return text + _note("No run has a model_final.pth.")
    with tempfile.TemporaryDirectory() as folder:
        # Of photographs a png would be five times as large.
        path = Path(folder, "picture.jpg")
        try:
            draw_results(path, str(datasets[-1]), folders, images=images, score=score)
        except UserError as e:
            # Data that are on another machine, a classifier: the rest of the page is of use. What
            # to change is a matter of another command line.
            return text + _note(f"Not drawn: {str(e).partition(';')[0]}.")
        data = base64.b64encode(path.read_bytes()).decode()
    return text + f'<img alt="detections" src="data:image/jpeg;base64,{data}">'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _differences(runs: Sequence[Run]) -> str:
    """Keys that mean something to a run and have not the same value in all of them."""
    if len(runs) == 1:
        return ""
    # The keys of a LazyConfig are no others' keys.
    kinds = [[x for x in runs if x.lazy is lazy] for lazy in (False, True)]
    text = ""
    if all(kinds):
        text = _note("The keys of yaml configs and of LazyConfigs are compared among themselves.")
    for alike in kinds:
        if len(alike) < 2:
            continue
        configs = [_used(run.config) for run in alike]
        rows = []
        for key in sorted({x for config in configs for x in config}):
            values = [str(config.get(key, "-")) for config in configs]
            if len(set(values)) > 1 and key not in _OWN:
                rows.append([f"<code>{html.escape(key)}</code>", *map(_text, values)])
        titles = [x.title for x in alike]
        equal = _note(f"All keys of {', '.join(titles)} are equal.")
        text += _table(["key", *titles], rows) if rows else equal
    return text


def _used(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys of losses that the run does not have."""
    distills = config.get("MODEL.META_ARCHITECTURE") == "DistillationModel"
    losses = config.get("MODEL.DISTILL.LOSSES") or ()
    names = {x.upper().removesuffix("LOSS") for x in losses}
    kept = {}
    for key, value in config.items():
        path = key.split(".")
        if path[:2] == ["MODEL", "DISTILL"]:
            of_a_loss = ".".join([*path[:3], "WEIGHT"]) in config
            if not distills or (of_a_loss and path[2] not in names):
                continue
        kept[key] = value
    return kept


def _environments(runs: Sequence[Run]) -> str:
    """Of the machines: once, where they are equal."""
    known: dict[str, Mapping[str, str]] = {}
    titles: dict[str, list[str]] = {}
    for run in runs:
        key = json.dumps(run.environment, sort_keys=True)
        known[key] = run.environment
        titles.setdefault(key, []).append(run.title)
    text = ""
    for key, values in known.items():
        if values:
            rows = [[html.escape(k), _text(v)] for k, v in values.items()]
            text += f"<h3>{html.escape(', '.join(titles[key]))}</h3>" + _table(["", ""], rows)
    try:
        version = metadata.version("pcka_distill")
    except metadata.PackageNotFoundError:
        version = "that is not installed"
    return text + _note(f"This page was made by pcka_distill {version}.")
