"""One way to read image files; those that cannot be are named."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from blocksparse.image_files import SUFFIXES, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    """Return a small file that says it is an image of any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(9))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_every_kind_is_read_in_either_mode(
    tmp_path: Path, suffix: str, channels: int, mode: str
) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix in (".pgm", ".gif"):
        Image.fromarray(PIXELS[:, :, 0]).save(path)
    else:
        Image.fromarray(PIXELS).save(path)
    image = read_image(path, channels)
    assert (image.mode, image.size) == (mode, (20, 20))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", encoded("PNG")[:90], encoded("JPEG")[:200], png(30_000, 30_000)],
    ids=["empty", "text", "cut PNG", "cut JPEG", "huge"],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png is not a readable image: .*replace or remove it"):
        read_image(path, 3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"]),
    st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_files_are_read_or_named(
    tmp_path: Path, kind: str, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(encoded(kind))
    for place, value in changes:
        content[place] = value
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, of what it could read all the same
        try:
            assert read_image(path, 3).mode == "RGB"
        except ValueError as error:
            said = str(error)
        else:
            return
    assert said.startswith(str(path))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (6, 6), 5000).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif has pixels of more than 8 bits"):
        read_image(tmp_path / "a.tif", 3)
