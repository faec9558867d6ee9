"""Before any test module imports mmdet or mmpose: what makes them importable on today's torch."""

import pytest
import torch

import mmprune.compat  # noqa: F401


def pytest_addoption(parser):
    parser.addoption(
        '--random-nets', type=int, default=250, help='how many random networks to cut (250)'
    )


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in parallel round otherwise, and trained networks with them."""
    torch.set_num_threads(1)
