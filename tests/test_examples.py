"""The examples run, and teach."""

import os
import re
import subprocess
import sys

import pytest
from helpers import REPO

EXAMPLES = sorted((REPO / "examples").glob("*.py"))


@pytest.mark.usefixtures("digits")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples(path):
    done = subprocess.run(
        [sys.executable, str(path), "--iterations", "12"],
        capture_output=True, text=True, cwd=REPO, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for term in ("loss_pcka_p3", "loss_mimic_p3", "loss_rcka_intra"):
        values = [float(x) for x in re.findall(rf"{term} (\S+?)(?:,|$)", done.stdout, re.M)]
        assert len(values) == 12
        assert sum(values[-4:]) < sum(values[:4]), term


def test_the_adapter_of_the_example_is_short():
    source = (REPO / "examples" / "own_detector.py").read_text()
    adapter = re.search(r"@register_adapter\n.*?\n\n\n", source, re.S)[0].strip().splitlines()
    assert len(adapter) < 60
    assert f"{len(adapter)} lines" in source
