"""Handwritten digits (scikit-learn's bundled 1,797 images of 8 × 8 pixels) with a mixture in the middle of the model.

Plain single-device code: whether the mixture is here or all over the world is not visible from inside.
Shapes: B samples, P = 64 pixels, H hidden features, C = 10 classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from p2pmoe.training.tasks import Task, TaskOptions

PIXELS: Final = 64
CLASSES: Final = 10
HELD_OUT: Final = 360
SPLIT_SEED: Final = 20_020_401  # one split for every run, so that accuracies of different seeds compare
LEARNING_RATE: Final = 3e-3


@dataclass(frozen=True, slots=True)
class Digits:
    """Images [N, 64] in 0…1 with labels [N], for training and held out."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


class DigitsClassifier(nn.Module):
    """[B, P] -> [B, C]: a trunk, a mixture with a residual connection around it, a head."""

    def __init__(self, mixture: nn.Module, hidden_dim: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(PIXELS, hidden_dim), nn.GELU(), nn.LayerNorm(hidden_dim))
        self.mixture = mixture
        self.head = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, CLASSES))

    def forward(self, images_BP: torch.Tensor) -> torch.Tensor:
        hidden_BH = self.trunk(images_BP)
        hidden_BH = hidden_BH + self.mixture(hidden_BH)
        logits_BC: torch.Tensor = self.head(hidden_BH)
        return logits_BC


def load_split() -> Digits:
    """The same split every time."""
    bundle = load_digits()
    images = torch.from_numpy(bundle.data).to(torch.float32) / 16.0
    labels = torch.from_numpy(bundle.target).to(torch.int64)
    order = shuffled(len(images), torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[train], labels[train], images[test], labels[test])


def shuffled(count: int, generator: torch.Generator) -> torch.Tensor:
    """The numbers below `count` in random order, int64 on the CPU."""
    return torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")


def shuffled_batches(
    inputs: torch.Tensor, targets: torch.Tensor, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of full size; every sample once before any comes again, give or take the last batch."""
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(inputs))
    while True:
        order = shuffled(len(inputs), generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield inputs[chosen], targets[chosen]


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images that the model names right."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return float((model(images).argmax(1) == labels).float().mean())
    finally:
        model.train(was_training)


def make_digits_task(mixture: nn.Module, options: TaskOptions) -> Task:
    """See `MakeTask`."""
    digits = load_split()
    model = DigitsClassifier(mixture, options.hidden_dim)
    return Task(
        model=model,
        batches=shuffled_batches(digits.train_images, digits.train_labels, options.batch_size, options.seed),
        loss=functional.cross_entropy,
        evaluate=lambda: accuracy(model, digits.test_images, digits.test_labels),
        learning_rate=LEARNING_RATE,
    )
