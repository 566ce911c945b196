"""Falsified training data: by hand, and nothing but what hostile clients train on."""

import pytest
import torch

from fedknow.client.data import Split, TaskData, TaskStream
from fedknow.client.data.poison import PoisonedStream, add_trigger
from fedknow.client.data.samples import as_spec
from fedknow.protocols.config import AttackConfig


class Stream:
    tasks, classes, spec, clients = 1, 6, as_spec((1, 4, 4)), 2

    def length(self, client: int) -> int:
        return 1

    def task(self, client: int, task: int) -> TaskData:
        x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 4, 4).clone()
        split = Split(x, torch.tensor([3, 4, 5, 3]))
        return TaskData(0, (3, 4, 5), (3, 4, 5), split, split)


def poisoned(name: str, client: int) -> TaskData:
    stream: TaskStream = PoisonedStream(Stream(), AttackConfig(name=name), {1})
    assert (stream.tasks, stream.classes, stream.clients) == (1, 6, 2)
    assert stream.spec.shape == (1, 4, 4)
    assert stream.length(client) == 1
    return stream.task(client, 0)


@pytest.mark.parametrize("name", ["labelflip", "backdoor"])
def test_honest_clients_and_test_samples_are_left_alone(name):
    original = Stream().task(0, 0)
    honest = poisoned(name, 0)
    assert torch.equal(honest.train.x, original.train.x)
    assert torch.equal(honest.train.y, original.train.y)
    hostile = poisoned(name, 1)
    assert torch.equal(hostile.test.x, original.test.x)
    assert torch.equal(hostile.test.y, original.test.y)


def test_flipped_labels_stand_at_the_other_end():
    data = poisoned("labelflip", 1)
    assert data.train.y.tolist() == [5, 4, 3, 5]


def test_every_second_sample_is_marked():
    data = poisoned("backdoor", 1)
    assert data.train.y.tolist() == [3, 4, 3, 3]
    # The brightest value is 3, in the lower right corner of 3 x 3 pixels.
    corner = data.train.x[:, 0, 1:, 1:]
    assert corner.flatten(1).amin(1).tolist() == [3.0, 1.0, 3.0, 3.0]
    assert data.train.x[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_trigger_does_not_change_the_images_given():
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = 2.0
    marked = add_trigger(x)
    assert x.sum() == 2.0
    assert marked.sum() == 2.0 + 9 * 2.0
