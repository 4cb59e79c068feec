"""The digits task: the same split every time, and a model that learns with any mixture in it."""

import itertools

import pytest
import torch
from torch import nn

from p2pmoe.errors import ConfigError
from p2pmoe.training.digits import DigitsClassifier, load_split, make_digits_task, shuffled_batches
from p2pmoe.training.loop import LoopOptions, TrainingLoop
from p2pmoe.training.tasks import TASKS, TaskOptions, find_task


def test_the_split_is_the_same_every_time_and_leaves_nothing_out() -> None:
    first, second = load_split(), load_split()

    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_labels, second.test_labels)
    assert first.train_images.shape == (1437, 64)
    assert first.test_images.shape == (360, 64)
    assert first.test_images.min() == 0
    assert first.test_images.max() == 1
    assert set(first.test_labels.tolist()) == set(range(10))


def test_no_image_is_both_trained_and_held_out() -> None:
    digits = load_split()

    held_out = {tuple(image) for image in digits.test_images.tolist()}

    assert not held_out & {tuple(image) for image in digits.train_images.tolist()}


def test_batches_repeat_by_seed_and_cover_every_sample() -> None:
    inputs, targets = torch.arange(10.0).reshape(10, 1), torch.arange(10)

    first, again, other = (list(itertools.islice(shuffled_batches(inputs, targets, 5, seed), 4)) for seed in (1, 1, 2))

    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, other, strict=True))
    assert sorted(torch.cat([first[0][1], first[1][1]]).tolist()) == list(range(10))
    assert all(torch.equal(x.flatten().long(), y) for x, y in first)


def test_a_batch_is_never_larger_than_the_samples() -> None:
    inputs, targets = next(shuffled_batches(torch.zeros(3, 1), torch.zeros(3), 64, 0))

    assert (len(inputs), len(targets)) == (3, 3)


def test_the_mixture_is_added_to_what_goes_around_it() -> None:
    torch.manual_seed(0)
    model = DigitsClassifier(nn.Identity(), 16)
    x = torch.rand(2, 64)

    assert torch.equal(model(x), model.head(2 * model.trunk(x)))


def test_a_local_layer_in_the_mixtures_place_learns_the_digits() -> None:
    torch.manual_seed(0)
    task = make_digits_task(nn.Linear(32, 32), TaskOptions(hidden_dim=32, batch_size=64, seed=0))

    history = TrainingLoop(task, LoopOptions(steps=150, evaluate_every=50)).run()

    assert history.accuracy is not None
    assert history.accuracy > 0.9


def test_every_registered_task_can_be_loaded() -> None:
    for name in TASKS:
        assert callable(find_task(name))


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown task 'mnist'; tasks: digits"):
        find_task("mnist")
