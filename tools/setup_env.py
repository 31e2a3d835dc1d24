#!/usr/bin/env python3
"""Make the virtual environment of `make demo` and `make test`. Needs nothing but Python.

Usage: python3 tools/setup_env.py .venv
"""

# Plain syntax throughout: a Python that is too old must get as far as the line that says so.
import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEEDED_GB = 8


def fail(message: str) -> None:
    """Stop with one line."""
    sys.exit("error: " + message)


def requirement_files() -> "list[str]":
    """The pinned requirements of this Python."""
    name = "py310.txt" if sys.version_info[:2] == (3, 10) else "default.txt"
    return [os.path.join(ROOT, "requirements", x) for x in (name, "detectron2.txt")]


def fingerprint(venv: str) -> str:
    """What the environment depends on: if any of it changes, the environment is stale."""
    digest = hashlib.sha256((sys.version + os.path.abspath(venv)).encode())
    for path in [*requirement_files(), os.path.join(ROOT, "setup.py"), os.path.abspath(__file__)]:
        with open(path, "rb") as f:
            digest.update(f.read())
    return digest.hexdigest()


def pip(venv: str, *args: str) -> None:
    """Run the environment's pip."""
    command = [os.path.join(venv, "bin", "python"), "-m", "pip", "install"]
    if subprocess.call([*command, "--disable-pip-version-check", *args]):
        fail(
            "pip could not install what is above; is the package index reachable? (Behind a "
            "mirror, set PIP_INDEX_URL.) The same command tries again."
        )


def main() -> None:
    """Make the environment unless it is there and up to date."""
    if sys.version_info < (3, 10):
        fail(
            "Python 3.10 or later is needed, this is {}.{}; name another: make demo "
            "PYTHON=python3.11".format(*sys.version_info[:2])
        )
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        sys.exit(sys.argv[1:] not in (["-h"], ["--help"]))
    venv = os.path.abspath(sys.argv[1])
    stamp = os.path.join(venv, "stamp")
    wanted = fingerprint(venv)
    if os.path.isfile(stamp):
        with open(stamp) as f:
            if f.read() == wanted:
                return
    if os.path.exists(venv):
        if not os.path.isfile(os.path.join(venv, "pyvenv.cfg")):
            fail("{} exists and is no virtual environment; move it away".format(venv))
        print("{} is incomplete or out of date, making it again".format(sys.argv[1]), flush=True)
        shutil.rmtree(venv)
    free = shutil.disk_usage(os.path.dirname(venv)).free / 1e9
    if free < NEEDED_GB:
        fail("{} GB of disk are needed for torch, {:.1f} GB are free".format(NEEDED_GB, free))
    print("Making {} with Python {}.{}: some minutes, once".format(
        sys.argv[1], *sys.version_info[:2]), flush=True)  # fmt: skip
    if subprocess.call([sys.executable, "-m", "venv", venv]):
        fail("python -m venv does not work here; on Debian: apt install python3-venv")

    requirements, detectron2 = requirement_files()
    # The small ones first: an index that cannot be reached shows in seconds. fvcore and iopath
    # come as source and are built with this setuptools.
    with open(requirements) as f:
        setuptools = next(line.split()[0] for line in f if line.startswith("setuptools=="))
    pip(venv, "--quiet", "--retries", "1", "--timeout", "20", setuptools, "wheel")
    pip(venv, "--no-build-isolation", "-r", requirements)
    site = subprocess.check_output(
        [os.path.join(venv, "bin", "python"), "-c", "import site; print(site.getsitepackages()[0])"]
    )
    # The wheel says cp310; its Python files serve every version.
    pip(
        venv, "--quiet", "--no-deps", "--require-hashes", "--python-version", "3.10",
        "--only-binary=:all:", "--target", site.decode().strip(), "-r", detectron2,
    )  # fmt: skip
    pip(venv, "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT)
    with open(stamp, "w") as f:
        f.write(wanted)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command starts again")
