#!/usr/bin/env python
r"""Export a trained student: a slim checkpoint, TorchScript, ONNX, and a model card.

    python tools/export_student.py --config-file output/demo/distilled/student_config.yaml \
        --out exported --formats torchscript onnx --image photo.jpg --license Apache-2.0

The folder is complete: it is what stock Detectron2 and tools/predict.py run. What is written is
compared with the student on the image; without one it is the first that the student was tested on.
"""

import argparse
from pathlib import Path

from pcka_distill.export import FORMATS, export_student, find_image
from pcka_distill.inference import errors_of_a_tool
from pcka_distill.tool import run_tool, tool_parser


def main(args: argparse.Namespace) -> None:
    """Export and say what was written."""
    fields = {
        "licence of the weights": args.license,
        "licence of the teacher": args.teacher_license,
        "licence of the data": args.data_license,
    }
    with errors_of_a_tool(args.opts):
        image = find_image(args.image, args.config_file, args.opts)
        lines = export_student(
            args.config_file, args.out, image, weights=args.weights, key=args.key, half=args.half,
            formats=args.formats, fields=fields, opts=args.opts,
        )  # fmt: skip
    print("\n".join([*lines, f"model card: {args.out / 'model_card.md'}"]))


if __name__ == "__main__":
    parser = tool_parser(__doc__)
    parser.add_argument("--config-file", required=True, help="yaml of the student")
    parser.add_argument("--weights", default="", help="default: model_final.pth beside the config")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument(
        "--image", default="", help="picture to compare on; default: the first of DATASETS.TEST"
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=[], help="graphs to write; default: none"
    )
    parser.add_argument("--half", action="store_true", help="weights in half precision")
    parser.add_argument(
        "--key", default="model",
        help="key of the checkpoint, with the state_dict to export; default: model, the weights "
        "that were trained. No average is trained here: it is under the key by which a hook of "
        "your own saved one, such as the state_dict() of torch.optim.swa_utils.AveragedModel",
    )  # fmt: skip
    parser.add_argument("--license", default="not stated", help="of the weights, for the card")
    parser.add_argument("--teacher-license", default="not stated", help="for the card")
    parser.add_argument("--data-license", default="not stated", help="for the card")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[],
        help="overrides: KEY VALUE ..., at the end of the command line",
    )  # fmt: skip
    run_tool(parser, main)
