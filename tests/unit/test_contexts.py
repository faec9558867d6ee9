"""What surrounds a run is as before at its end."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from mmprune.contexts import modes_restored, random_state, random_state_restored, set_random_state


def drawn():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def as_saved(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def as_earlier_versions_saved(state, path):
    name, keys, *others = state['numpy']
    return as_saved(state | {'numpy': [name, torch.tensor(keys), *others]}, path)


@pytest.mark.parametrize('saved', [as_saved, as_earlier_versions_saved])
def test_a_saved_random_state_gives_the_same_numbers(tmp_path, saved):
    np.random.normal()  # numpy then has a second number ready
    state = saved(random_state(), tmp_path / 'state.pth')
    wanted = drawn(), np.random.normal()
    set_random_state(state)
    assert (drawn(), np.random.normal()) == wanted


def test_a_block_that_fails_puts_random_states_and_modes_back():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
    state = random_state()
    wanted = drawn()
    set_random_state(state)
    with pytest.raises(ZeroDivisionError), random_state_restored(), modes_restored(model):
        drawn()
        model.eval()[1].train()
        raise ZeroDivisionError
    assert drawn() == wanted
    assert [module.training for module in model.modules()] == [True, True, False]
