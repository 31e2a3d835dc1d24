"""What the documentation needs beside MkDocs and its plugins.

Formulas become pictures when the site is built, so that no script has to be fetched; pages of the
repository that lie elsewhere are part of the site; and docstrings, which are reStructuredText in
places, become Markdown.
"""

from __future__ import annotations

import base64
import html
import io
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from griffe import Extension, Module, Object
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_REPOSITORY = Path(__file__).resolve().parents[1]
# Beside those in docs/, at the same places.
_PAGES = ("benchmarks/*.md", "benchmarks/*.png", "CHANGELOG.md", "CONTRIBUTING.md")


def formula(latex: str) -> str:
    """A formula as a picture in HTML."""
    latex = " ".join(latex.split())
    svg = io.BytesIO()
    # What matplotlib calls otherwise.
    drawn = latex.replace(r"\left\|", r"\left\Vert").replace(r"\right\|", r"\right\Vert")
    drawn = drawn.replace(r"\frac", r"\dfrac")
    math_to_image(f"${drawn}$", svg, prop=FontProperties(size=13), format="svg", dpi=72)
    source = base64.b64encode(svg.getvalue()).decode()
    return f'<img alt="{html.escape(latex)}" src="data:image/svg+xml;base64,{source}">'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs' event: add the pages that lie elsewhere."""
    for pattern in _PAGES:
        for path in sorted(_REPOSITORY.glob(pattern)):
            name = path.relative_to(_REPOSITORY).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' event: formulas, and links that are right in the repository."""
    markdown = re.sub(r"\]\(\.\./(?=benchmarks/|[A-Z]+\.md)", "](", markdown)
    return re.sub(
        r"^```math\n(.*?)^```$", lambda x: f"<p>{formula(x[1])}</p>", markdown, flags=re.M | re.S
    )


class RestructuredText(Extension):
    """Docstrings as Markdown: roles, formulas, tables, doctests."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Griffe's event."""
        objects = list(_inside(pkg))
        paths = {x.name: x.path for x in objects}
        for x in objects:
            if x.docstring:
                x.docstring.value = markdown_of(x.docstring.value, paths)


def _inside(obj: Object) -> Iterator[Object]:
    yield obj
    for member in obj.members.values():
        if isinstance(member, Object):
            yield from _inside(member)


def markdown_of(text: str, paths: Mapping[str, str]) -> str:
    """Markdown of a docstring's reStructuredText.

    Args:
        text: the docstring.
        paths: name of an object -> where it is; if a page has it there, its name is a link.
    """

    def fenced(match: re.Match[str], language: str = "text") -> str:
        return f"```{language}\n{textwrap.dedent(match[0]).strip()}\n```\n"

    def link(match: re.Match[str]) -> str:
        name = match[1].rsplit(".", 1)[-1]
        path = paths.get(name, match[1])
        return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'

    text = re.sub(r"^=+ =+.*\n(?:.*\n)*?=+ =+.*\n(?:.*\n)*?=+ =+.*\n", fenced, text, flags=re.M)
    doctest = r"^>>>.*\n?(?:\S.*\n?)*"
    text = re.sub(doctest, lambda x: fenced(x, "pycon"), text, flags=re.M)
    math = r"^\.\. math::(.*\n(?: +.*\n)*)"
    text = re.sub(math, lambda x: f"{formula(x[1])}\n", text, flags=re.M)
    text = re.sub(r"::\n", ":\n", text)
    parts = re.split(r"(```.*?```|``.*?``|:\w+:`.*?`)", text, flags=re.S)
    # Of H*W*A it would make the W slanted, and of <X, Y> an element of HTML.
    parts[::2] = [re.sub(r"(?<=\w)\*(?=\w)", r"\\*", x) for x in parts[::2]]
    parts[::2] = [re.sub(r"<(?=[A-Z])", "&lt;", x) for x in parts[::2]]
    text = re.sub(r"(?<!`)``([^`]+)``(?!`)", r"`\1`", "".join(parts))
    return re.sub(r":\w+:`~?\.?([\w.]+)`", link, text)
