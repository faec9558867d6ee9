"""Tests of what only newer versions of torch have are skipped on older ones, and say so."""

import pytest
import torch


def needs_torch(version: str, feature: str) -> pytest.MarkDecorator:
    """A mark that skips the test if torch is older than ``version``, the first to have ``feature``."""
    old = torch.torch_version.TorchVersion(torch.__version__) < version
    return pytest.mark.skipif(old, reason=f'torch {version} is the first to have {feature}')
