"""What holds for all tests. ``mmprune.mm`` comes first: it makes mmdet importable everywhere. Without
OpenMMLab the tests of the core run, and modules that need it are skipped."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec('mmengine'):
    import mmprune.mm  # noqa: F401
from mmprune.budget import choose, device


def pytest_addoption(parser):
    parser.addoption(
        '--random-nets', type=int, default=250, help='how many random networks to cut (250)'
    )


@pytest.fixture(scope='session', autouse=True)
def _the_same_device_everywhere(tmp_path_factory):
    """As for a user, ``divisor='auto'`` is the default. But every machine seems to work in multiples of
    8 channels, so that results are the same everywhere, and the user's cache is not used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(device.ENVIRONMENT, str(tmp_path_factory.mktemp('cache')))
        patch.setattr(choose, 'divisor_of', lambda device, dtype, backend: 8)
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Another number of threads changes the rounding of sums, and trained networks with it."""
    torch.set_num_threads(1)
