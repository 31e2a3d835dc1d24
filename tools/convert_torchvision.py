#!/usr/bin/env python
"""Make Detectron2's tensors of torchvision's ResNet weights.

    python tools/convert_torchvision.py resnet18-f37072fd.pth output/weights/torchvision_R-18.pth

Models with such weights read RGB images, subtract ImageNet's mean and divide by its deviation, and
have MODEL.RESNETS.STRIDE_IN_1X1 False.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import pcka_distill  # noqa: F401  (before Detectron2: it filters the warnings of others)
from pcka_distill.backbones import from_torchvision
from pcka_distill.checkpoint import write_whole
from pcka_distill.errors import UserError, reason
from pcka_distill.tool import run_tool, tool_parser


def main(args: argparse.Namespace) -> None:
    """Read, rename, write."""
    try:
        state = torch.load(args.source, map_location="cpu", weights_only=True)
    except Exception as e:
        # Whatever pickle, zipfile and torch raise on a file that is something else.
        raise UserError(f"{args.source} cannot be read: {reason(e)}") from e
    content: dict[str, Any] = {"model": from_torchvision(state), "__author__": "torchvision"}
    # Its tensors have no "backbone." in front: Detectron2 finds where they go.
    content["matching_heuristics"] = True
    args.target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.target, lambda f: torch.save(content, f))
    print(f"{len(content['model'])} tensors in {args.target}")


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("source", type=Path, help="torchvision's file")
    parser.add_argument("target", type=Path, help="to write")
    run_tool(parser, main)
