#!/usr/bin/env python
"""How alike are the layers of two networks? CKA, layer by layer, without hooks.

`linear_cka` compares two sets of features of the same images; their widths may differ. All images
at once would need all features at once, so each minibatch gives a CKA and the mean is printed.
Plain CKA of few images with many features is near 1 whatever they are; debiased=True takes the
unbiased HSIC estimator instead. (Nguyen et al., ICLR 2021, average the HSICs, then divide.)

    python examples/measure_cka.py

Nothing is downloaded: the networks are not trained and the images are noise. Put in yours where it
says so.
"""

import argparse

import timm
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from pcka_distill.functional import linear_cka


@torch.no_grad()
def cka_table(net_a, net_b, batches):
    """CKA of every layer of one network with every layer of another.

    Args:
        net_a, net_b: images -> features of layers, as a list or a dict of (B, ...), B > 3.
        batches: of images (B, C, H, W).

    Returns:
        (layers of a, layers of b), the mean over batches; 1 where they are alike up to rotation,
        offset and scale, about 0 where they have nothing in common.
    """
    tables = []
    for images in batches:
        a, b = (
            [x.flatten(1) for x in (out.values() if isinstance(out, dict) else out)]
            for out in (net_a(images), net_b(images))
        )
        tables.append(torch.tensor([[linear_cka(x, y, debiased=True) for y in b] for x in a]))
    return torch.stack(tables).mean(0)


def show(title, rows, columns, table):
    """Print a table of CKAs."""
    print(f"\n{title}\n{'':10}" + "".join(f"{name:>10}" for name in columns))
    for name, values in zip(rows, table.tolist()):
        print(f"{name:10}" + "".join(f"{value:10.3f}" for value in values))


def main(count):
    """Compare a network of torchvision with itself and with one of timm."""
    torch.manual_seed(0)
    # Yours: weights="DEFAULT" or a checkpoint; and images as the networks were trained on.
    resnet = torchvision.models.resnet18(weights=None).eval()
    mobile = timm.create_model("mobilenetv3_small_050", pretrained=False, features_only=True).eval()
    batches = [torch.rand(32, 3, 64, 64) for _ in range(count)]

    layers = ["layer1", "layer2", "layer3", "layer4", "fc"]
    resnet = create_feature_extractor(resnet, layers)
    modules = mobile.feature_info.module_name()
    show("resnet18 with itself", layers, layers, cka_table(resnet, resnet, batches))
    show("resnet18 with mobilenetv3", layers, modules, cka_table(resnet, mobile, batches))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=4)
    main(parser.parse_args().batches)
