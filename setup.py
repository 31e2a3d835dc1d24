import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def version() -> str:
    for line in (HERE / "projects/pcka_distill/__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("no __version__ in projects/pcka_distill/__init__.py")


class BuildWithConfigs(build_py):
    """The configs lie at the top of the repository, and in a wheel inside of the package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "pcka_distill", "configs")
            shutil.rmtree(target, ignore_errors=True)
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(HERE / "configs", target, ignore=ignored)


setup(
    name="pcka_distill",
    version=version(),
    description="Detection distillation by centered kernel alignment, for Detectron2",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "projects"},
    packages=find_packages("projects"),
    package_data={"pcka_distill": ["py.typed"]},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={
        "console_scripts": [
            "pcka-train = pcka_distill.engine:cli",
            "pcka-predict = pcka_distill.predict:cli",
        ]
    },
    # Detectron2 itself (v0.6 or later) is not listed: it has no release on the package index, and
    # whoever has a GPU box has built the official one. README.md says how to install it.
    install_requires=[
        "torch>=1.13",
        "fvcore",
        "iopath",
        "numpy",
        "omegaconf",
        "Pillow",
        "pycocotools",
        "PyYAML",
        "tabulate",
        "tqdm",
    ],
    # Not required: whoever has OpenCV has it under one of four names that do not live together.
    extras_require={
        "demo": ["opencv-python-headless", "scikit-learn", "scipy", "matplotlib"],
        "export": ["onnx", "onnxruntime"],
    },
)
