"""What all command-line tools share: help with examples, errors on one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from pcka_distill.errors import UserError

__all__ = ["run_tool", "tool_parser"]


def tool_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the tool's docstring, as it is written."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def run_tool(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], None],
    interrupted: str = "interrupted",
) -> None:
    """Run a tool; what the user can change, and Ctrl-C, end it with one line.

    Args:
        parser: of :func:`tool_parser`.
        main: takes what was parsed.
        interrupted: what to say after Ctrl-C: what is kept, and how to go on.
    """
    args = parser.parse_args()
    try:
        main(args)
    except UserError as e:
        if args.debug:
            raise
        sys.exit(f"error: {e}")
    except OSError as e:
        # Of a file that cannot be opened, made or written; any other is not the user's to change.
        if args.debug or not e.filename:
            raise
        sys.exit(f"error: {e.filename}: {e.strerror}")
    except KeyboardInterrupt:
        if args.debug:
            raise
        sys.exit(f"\n{interrupted}")
