"""Help, errors and Ctrl-C of the command-line tools."""

import subprocess
import sys
from pathlib import Path

import pytest

from pcka_distill.errors import UserError
from pcka_distill.tool import run_tool, tool_parser

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def run(monkeypatch, error, *flags):
    monkeypatch.setattr(sys, "argv", ["tool", *flags])

    def main(args):
        raise error

    run_tool(tool_parser("What it does.\n\n    tool it\n"), main, "interrupted; run it again")


def test_what_the_user_can_change_is_one_line(monkeypatch):
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, UserError("no such level"))
    assert e.value.code == "error: no such level"
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, KeyboardInterrupt())
    assert e.value.code == "\ninterrupted; run it again"


def test_a_file_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").touch()

    def fail():
        (tmp_path / "file" / "x").mkdir()

    with pytest.raises(NotADirectoryError) as raised:
        fail()
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, raised.value)
    assert e.value.code == f"error: {tmp_path / 'file' / 'x'}: Not a directory"
    with pytest.raises(OSError, match="no file"):
        run(monkeypatch, OSError("no file"))


@pytest.mark.parametrize("error", [UserError("no such level"), KeyboardInterrupt()])
def test_debug_lets_it_through(monkeypatch, error):
    with pytest.raises(type(error)):
        run(monkeypatch, error, "--debug")


def test_what_is_wrong_in_the_code_is_not_hidden(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, ZeroDivisionError())


@pytest.mark.parametrize("name", sorted(x.name for x in TOOLS.glob("*.py")))
def test_help_has_an_example(name):
    shown = subprocess.run(
        [sys.executable, str(TOOLS / name), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert f"tools/{name}" in shown
