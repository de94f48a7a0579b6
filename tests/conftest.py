"""What all tests share: this folder on the path (for ``naive``), no deadlines, long ones slow."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("blocksparse", deadline=None, print_blob=True)
settings.load_profile("blocksparse")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that is long is slow, too."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)
