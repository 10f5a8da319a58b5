"""A safety checker for tests: a real class of transformers with tiny weights."""

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

RED, BLUE = ([200, 30, 30], [30, 30, 200])


def plain(colour):
    return np.full((64, 64, 3), colour, np.uint8)


def write_classifier(folder):
    """An image classifier with tiny weights that tells red from blue, by the labels red and calm."""
    config = ViTConfig(
        image_size=32,
        patch_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        num_labels=2,
        id2label={0: "calm", 1: "red"},
        label2id={"calm": 0, "red": 1},
    )
    model = ViTForImageClassification(config).eval()
    images = torch.stack([torch.tensor(plain(c)[:32, :32] / 127.5 - 1).permute(2, 0, 1).float() for c in (RED, BLUE)])
    with torch.no_grad():
        red, blue = model.vit(images).last_hidden_state[:, 0]
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        model.classifier.weight[1] = 12 * (red - blue) / (red - blue).norm() ** 2
        model.classifier.bias[1] = -model.classifier.weight[1] @ (red + blue) / 2
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
