from __future__ import annotations

import sys

import numpy as np
import pytest

from blocksparse.cli import images
from blocksparse.cli.console import CommandError, UsageError
from blocksparse.format import Preprocessing

Image = pytest.importorskip("PIL.Image")


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def steps(resize=None, crop=None, channels="rgb"):
    count = 3 if channels == "rgb" else 1
    mean, std = (0.485, 0.456, 0.406)[:count], (0.229, 0.224, 0.225)[:count]
    return Preprocessing(resize, crop, mean, std, channels)


@pytest.mark.parametrize("size", [(37, 52), (52, 37), (33, 33), (9, 40), (5, 6)])
@pytest.mark.parametrize(
    ("resize", "crop"),
    [(None, None), (32, (28, 28)), ((24, 30), None), (17, (16, 20)), (None, (12, 15))],
)
def test_pixels_are_those_of_torchvision(size, resize, crop):
    transforms = pytest.importorskip("torchvision.transforms")
    chain = []
    if resize is not None:
        chain.append(transforms.Resize(resize))
    if crop is not None:
        chain.append(transforms.CenterCrop(crop))
    known = steps(resize, crop)
    chain += [transforms.ToTensor(), transforms.Normalize(known.mean, known.std)]
    image = picture(*size)
    expected = transforms.Compose(chain)(image).numpy()
    found = images.from_pixels(image, known)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    # One rounding in the division, one in the subtraction, one in the quotient.
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 2.0**-23 * 4.5)


def test_a_long_image_is_not_made_huge(tmp_path):
    class Long:
        size = (1, 2**22)

        def resize(self, size, _):
            pytest.fail(f"was resized to {size}")

    with pytest.raises(CommandError, match=r"1x4194304 pixels .* to 256x1073741824, more than"):
        images.from_pixels(Long(), steps(256, (224, 224)))


def test_an_image_and_its_pixels_give_the_same(tmp_path):
    image = picture(20, 30)
    image.save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.asarray(image))
    known, shape = steps((8, 8)), (3, 8, 8)
    [(name, from_file)] = images.inputs(tmp_path / "a.png", known, shape)
    [(_, from_array)] = images.inputs(tmp_path / "a.npy", known, shape)
    assert name.endswith("a.png")
    np.testing.assert_array_equal(from_file, from_array)


def test_a_gray_model_sees_gray(tmp_path):
    picture(6, 6).convert("L").save(tmp_path / "gray.png")
    picture(6, 6).save(tmp_path / "colour.png")
    for name in ("gray.png", "colour.png"):
        [(_, array)] = images.inputs(tmp_path / name, steps(channels="gray"), (1, 6, 6))
        assert array.shape == (1, 6, 6)


def test_gray_pixels_reach_a_colour_model(tmp_path):
    np.save(tmp_path / "gray.npy", np.full((6, 6), 51, np.uint8))
    [(_, array)] = images.inputs(tmp_path / "gray.npy", steps(), (3, 6, 6))
    np.testing.assert_allclose(array[:, 0, 0], (0.2 - np.array(steps().mean)) / steps().std, 1e-5)


def test_folders_are_searched_and_sorted(tmp_path):
    for name in ("b/2.png", "b/1.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in images.expand([str(tmp_path)])]
    assert found == ["a.jpg", "b/1.PNG", "b/2.png"]


def test_nothing_to_predict_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="holds no file"):
        images.expand([str(tmp_path)])
    with pytest.raises(UsageError, match="there is no image"):
        images.expand([str(tmp_path / "cat.png")])


def test_an_image_without_preprocessing_is_an_error(tmp_path):
    picture(6, 6).save(tmp_path / "a.png")
    with pytest.raises(CommandError, match="does not say how"):
        list(images.inputs(tmp_path / "a.png", None, (3, 6, 6)))


def test_arrays_that_are_not_finite_are_refused(tmp_path):
    array = np.zeros((2, 3, 6, 6), np.float32)
    array[1, 0, 2, 2] = np.nan
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(CommandError, match=r"a\.npy\[1\]: holds NaN, infinity"):
        list(images.inputs(tmp_path / "a.npy", None, (3, 6, 6)))


def test_numbers_beyond_float32_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.full((3, 6, 6), 1e300))
    with pytest.raises(CommandError, match="beyond float32"):
        list(images.inputs(tmp_path / "a.npy", None, (3, 6, 6)))


@pytest.mark.parametrize("shape", [(0, 3, 6, 6), (3, 0, 6)])
def test_an_array_without_pixels_is_refused(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    with pytest.raises(CommandError, match=r"a\.npy: holds no image, its shape is"):
        list(images.inputs(tmp_path / "a.npy", None, (3, 6, 6)))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_a_channel_are_refused(tmp_path, mode):
    """Pillow would make white of nearly all of them."""
    Image.new(mode, (6, 6), 5000).save(tmp_path / "a.tif")
    with pytest.raises(CommandError, match=r"a\.tif has pixels of more than 8 bits"):
        list(images.inputs(tmp_path / "a.tif", steps(), (3, 6, 6)))


def test_an_archive_under_the_name_of_an_array_is_refused(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        np.savez(file, np.zeros((3, 6, 6), np.float32))
    with pytest.raises(CommandError, match=r"a\.npy is no \.npy array but an \.npz archive"):
        list(images.inputs(tmp_path / "a.npy", None, (3, 6, 6)))


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    picture(6, 6).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CommandError, match="pip install pillow"):
        list(images.inputs(tmp_path / "a.png", steps(), (3, 6, 6)))
