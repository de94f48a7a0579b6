"""What all tests share: this folder on the path (for ``naive``), and examples without deadline."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("blocksparse", deadline=None, print_blob=True)
settings.load_profile("blocksparse")
