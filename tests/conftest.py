"""Before any test module imports mmdet or mmpose: what makes them importable on today's torch."""

import pytest
import torch

import mmprune.mm.compat  # noqa: F401
from mmprune.budget import choose, device, steps


def pytest_addoption(parser):
    parser.addoption(
        '--random-nets', type=int, default=250, help='how many random networks to cut (250)'
    )


@pytest.fixture(scope='session', autouse=True)
def _units_one_by_one(tmp_path_factory):
    """Most networks here are narrow, and what is tested is not how wide they stay: ``divisor='auto'``
    is 1 in this process (tests of it say otherwise, see test_steps.py). No test reads what was measured
    before, nor leaves its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(device.ENVIRONMENT, str(tmp_path_factory.mktemp('cache')))
        patch.setattr(choose, 'divisor_of', lambda device, dtype, backend: 1)
        patch.setattr(steps, 'LEAST', 1)
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in parallel round otherwise, and trained networks with them."""
    torch.set_num_threads(1)
