"""The first layer of the grid networks against a linear layer over one-hot codes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from recipes.networks import GridLinear
from recipes.tasks import DoorKey


def one_hot(observation):
    cells = functional.one_hot(observation[..., :-1].long(), 7)[..., 1:].flatten(-2)
    return torch.cat([cells, observation[..., -1:]], -1).float()


@pytest.mark.parametrize("size", [6, 12])  # which multiply and choose
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_grid_layer_is_a_linear_layer_over_one_hot_codes(size, compiled):
    observation = DoorKey(size).make(3, seed=0).rollout(10)["observation"].flatten(0, 1)
    observation[0] = 0  # an item that chooses no row
    observation[1, -1] = 1
    layer = GridLinear(observation.shape[-1] - 1, 7, 5)
    forward = torch.compile(layer, fullgraph=True) if compiled else layer
    mapped = forward(observation)
    expected = one_hot(observation) @ layer.weight + layer.bias
    torch.testing.assert_close(mapped, expected)
    gradient = torch.randn_like(mapped)
    parameters = [layer.weight, layer.bias]
    found = torch.autograd.grad((mapped * gradient).sum(), parameters)
    due = torch.autograd.grad((expected * gradient).sum(), parameters)
    torch.testing.assert_close(found, due)
    assert due[0].count_nonzero() > 0


def test_a_grid_layer_keeps_the_shape_of_its_batch():
    observation = DoorKey(12).make(3, seed=0).rollout(4)["observation"]
    layer = GridLinear(observation.shape[-1] - 1, 7, 5)
    assert layer(observation).shape == (3, 4, 5)
    torch.testing.assert_close(layer(observation)[2, 3], layer(observation[2:3, 3])[0])
