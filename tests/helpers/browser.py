"""Headless Chromium for the tests of pages: Debian's, as ``make browser`` installs it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = [
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync',
]  # fmt: skip
"""Without these it asks the network for updates of itself."""


def chromium() -> str:
    """The program; the test is skipped where there is none."""
    named = os.environ.get('MMPRUNE_CHROMIUM', 'chromium')
    return shutil.which(named) or pytest.skip(f'{named} is not there: `make browser` installs it')


@contextmanager
def browsing(profile: Path) -> Iterator:
    """A playwright context in a new, empty profile."""
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    program = chromium()
    with playwright.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            str(profile), executable_path=program, args=FLAGS
        )
        yield context
        context.close()
