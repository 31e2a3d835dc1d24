#!/usr/bin/env python
"""Compare distillation methods: equal trials, equal seeds, one page.

    python tools/compare.py benchmarks/comparison.yaml
    python tools/compare.py my_plan.yaml --dry-run

The plan names tasks, methods and tables. Results are added to results.jsonl beside the plan, one
line a run; what is there is not run again, and an interrupted comparison goes on.
"""

import argparse
from pathlib import Path

from pcka_distill.bench import REPOSITORY
from pcka_distill.compare import Comparison, compare, read_plan, write_page
from pcka_distill.errors import UserError
from pcka_distill.tool import run_tool, tool_parser


def main(args: argparse.Namespace) -> None:
    """Make the runs that are missing, then the page."""
    plan = read_plan(args.plan)
    comparison = Comparison(plan, args.results or args.plan.with_name(plan.results))
    sections = [
        s for s in plan.sections if not args.sections or any(w in s.title for w in args.sections)
    ]
    if not sections:
        titles = ", ".join(s.title for s in plan.sections)
        raise UserError(f"no section has one of {args.sections} in its title; there are {titles}")
    if args.dry_run:
        print(f"{len(comparison.missing(sections))} runs are known to be missing")
        return
    if not args.page_only:
        runs = args.runs or REPOSITORY / "output" / args.plan.stem
        compare(comparison, sections, runs, args.jobs)
    page = args.plan.with_suffix(".md")
    print(write_page(comparison, page))


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument(
        "--sections", nargs="+", default=[], help="words in the titles of the tables to make"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--runs", type=Path, help="default: output/ and the plan's name")
    parser.add_argument("--results", type=Path, help="default: that of the plan, beside it")
    parser.add_argument("--dry-run", action="store_true", help="count the runs that are missing")
    parser.add_argument("--page-only", action="store_true", help="make the page of what is there")
    run_tool(parser, main, "interrupted; the same command goes on")
