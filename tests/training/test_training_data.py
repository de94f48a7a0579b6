"""The data modules: what they hold and make, and what they say when data is missing."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from blocksparse.training import Cifar10, Cifar100, Digits, Fake, ImageFolder
from blocksparse.training.data.files import FileImages
from blocksparse.training.data.memory import Augmentation, MemoryImages
from blocksparse.training.data.order import BatchKey


def all_shifts(image: np.ndarray, shift: int) -> set[bytes]:
    """Every shift of an image [C, H, W] by up to `shift` pixels, one pixel at a time."""
    channels, height, width = image.shape
    found = set()
    for down in range(-shift, shift + 1):
        for right in range(-shift, shift + 1):
            moved = np.zeros_like(image)
            for c in range(channels):
                for i in range(height):
                    for j in range(width):
                        if 0 <= i - down < height and 0 <= j - right < width:
                            moved[c, i, j] = image[c, i - down, j - right]
            found.add(moved.tobytes())
    return found


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_reaches_every_shift_and_nothing_else(flip):
    image = torch.arange(1, 2 * 3 * 4 + 1, dtype=torch.uint8).reshape(2, 3, 4)
    wanted = all_shifts(image.numpy(), 1)
    if flip:
        wanted |= all_shifts(image.flip(-1).numpy(), 1)
    batch = Augmentation(shift=1, flip=flip)(image.repeat(400, 1, 1, 1), generator())
    assert batch.dtype == torch.uint8
    assert {sample.contiguous().numpy().tobytes() for sample in batch} == wanted


def test_augmentation_off_changes_nothing():
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=generator())
    assert torch.equal(Augmentation()(images, generator()), images)


def test_memory_batch_is_normalised():
    images = torch.randint(0, 256, (6, 2, 3, 4), dtype=torch.uint8, generator=generator())
    source = MemoryImages(images, torch.arange(6), mean=(0.25, 0.5), std=(0.5, 2.0))
    batch, labels = source[BatchKey((4, 1), 0)]
    wanted = (images[[4, 1]].double() / 255 - torch.tensor([0.25, 0.5])[:, None, None]) / (
        torch.tensor([0.5, 2.0])[:, None, None]
    )
    # Three float32 operations on numbers below 2.
    torch.testing.assert_close(batch.double(), wanted, rtol=0, atol=3 * 2 * 2**-23)
    assert labels.tolist() == [4, 1]
    assert batch.dtype == torch.float32


def test_digits():
    data = Digits()
    assert (data.num_classes, data.input_shape) == (10, (1, 8, 8))
    assert data.preprocessing == {
        "resize": (8, 8),
        "crop": None,
        "mean": data.mean,
        "std": data.std,
        "channels": "gray",
    }
    ((val_images, val_labels),) = list(data.val_dataloader())
    train = list(data.train_dataloader())
    assert val_images.shape == (360, 1, 8, 8)
    assert len(train) == 1437 // 64
    assert train[0][0].shape == (64, 1, 8, 8)
    assert np.bincount(val_labels).min() >= 35


def test_digits_normalisation_is_that_of_its_training_scans():
    data = Digits()
    images = torch.cat([images for images, _ in data.calibration_dataloader()])
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


def test_statistics_are_taken_on_the_same_images_augmented():
    data = Digits()
    plain = list(data.calibration_dataloader())
    augmented = list(data.statistics_dataloader())
    again = list(data.statistics_dataloader())
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, augmented, strict=True))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(plain, augmented, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(augmented, again, strict=True))


def test_digits_split_is_fixed_and_disjoint():
    def scans(source):
        return [image.numpy().tobytes() for image in source.images]

    train, _, val = Digits(seed=0).load()
    other_train, _, other_val = Digits(seed=1).load()
    assert scans(train) == scans(other_train)
    assert scans(val) == scans(other_val)
    digest = hashlib.sha256(b"".join(scans(val))).hexdigest()
    # The split that published figures were measured on.
    assert digest[:16] == "ac6ada28192bd51a"
    assert len(train) + len(val) == 1797
    assert not set(scans(train)) & set(scans(val))


def test_another_split_seed_gives_another_split():
    assert not torch.equal(Digits(split_seed=1).load()[2].images, Digits().load()[2].images)


def test_training_batches_depend_on_the_seed():
    first = next(iter(Digits(seed=0).train_dataloader()))[0]
    assert torch.equal(first, next(iter(Digits(seed=0).train_dataloader()))[0])
    assert not torch.equal(first, next(iter(Digits(seed=1).train_dataloader()))[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mean": (0.1, 0.2)}, "data.mean has 2"),
        ({"std": (0.0,)}, "above zero"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
    ],
)
def test_digits_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        Digits(**options)


@pytest.fixture
def folder(tmp_path):
    """Two classes of noise, of different sizes, as PNG."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "ant"):
            where = tmp_path / part / name
            where.mkdir(parents=True)
            for i in range(count):
                shape = (20 + i, 30 - i, 3)
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(where / f"{i}.png")
    return tmp_path


def test_image_folder_from_files(folder):
    data = ImageFolder(root=folder, size=12, resize=16, batch_size=3)
    assert data.classes == ("ant", "cat")
    assert data.input_shape == (3, 12, 12)
    assert data.preprocessing["resize"] == 16
    assert data.preprocessing["crop"] == (12, 12)
    ((images, labels), (_, more)) = data.val_dataloader()
    assert images.shape == (3, 3, 12, 12)
    assert torch.cat([labels, more]).tolist() == [0, 0, 1, 1]
    # By Pillow alone: the shorter side (20) to 16, the middle 12 x 12.
    with Image.open(folder / "val" / "ant" / "0.png") as image:
        resized = np.asarray(image.resize((24, 16), Image.Resampling.BILINEAR))
    wanted = (resized[2:14, 6:18] / 255 - np.array(data.mean)) / np.array(data.std)
    np.testing.assert_allclose(images[0].permute(1, 2, 0), wanted, atol=1e-5)


def test_image_folder_in_memory_validates_on_the_same_pixels(folder):
    options = {"root": folder, "size": 12, "resize": 16}
    (from_files,) = ImageFolder(**options).val_dataloader()
    (from_memory,) = ImageFolder(**options, in_memory=True).val_dataloader()
    torch.testing.assert_close(from_memory[0], from_files[0], rtol=0, atol=1e-5)
    assert torch.equal(from_memory[1], from_files[1])


def test_image_folder_without_crop_and_colour(folder):
    data = ImageFolder(
        root=folder, size=8, resize=None, channels=1, mean=[0.5], std=[0.5], in_memory=True
    )
    assert data.preprocessing["resize"] == (8, 8)
    assert data.preprocessing["crop"] is None
    assert next(iter(data.val_dataloader()))[0].shape == (4, 1, 8, 8)
    assert next(iter(data.train_dataloader()))[0].shape == (6, 1, 8, 8)


def test_file_batches_are_functions_of_their_key(folder):
    data = ImageFolder(root=folder, size=12, resize=16)
    source = data.load()[0]
    assert isinstance(source, FileImages)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = source[BatchKey((0, 1, 0), 5)][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(source[BatchKey((0, 1, 0), 5)][0], first)
    assert not torch.equal(source[BatchKey((0, 1, 0), 6)][0], first)
    assert not torch.equal(first[0], first[2])  # one file, cut out twice


def test_file_batches_leave_the_generators_of_accelerators_alone(folder, monkeypatch):
    def seeded(seed):
        raise AssertionError("a batch is made on the CPU")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    ImageFolder(root=folder, size=12, resize=16).load()[0][BatchKey((0, 1), 5)]


def test_image_folder_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train: there is no such folder.*data\.root"):
        ImageFolder(root=tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="train: there are no class folders"):
        ImageFolder(root=tmp_path)


def test_image_folder_classes_differ(folder):
    (folder / "val" / "bee").mkdir()
    with pytest.raises(ValueError, match="differ in bee"):
        ImageFolder(root=folder)


def test_image_folder_empty_class_and_broken_file(folder):
    for part in ("train", "val"):
        (folder / part / "bee").mkdir()
    data = ImageFolder(root=folder, size=8, resize=None)
    with pytest.raises(FileNotFoundError, match="bee: there is no image"):
        data.setup()
    for part in ("train", "val"):
        (folder / part / "bee" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(ValueError, match=r"0\.png is not a readable image"):
        ImageFolder(root=folder, size=8, resize=None, in_memory=True).setup()


def test_image_folder_refuses_a_crop_that_does_not_fit(folder):
    with pytest.raises(ValueError, match=r"data\.resize is 200, below data\.size 224"):
        ImageFolder(root=folder, resize=200)


def test_fake():
    data = Fake(num_classes=7, input_shape=(2, 5, 6), train_size=10, val_size=9, batch_size=4)
    assert (data.num_classes, data.input_shape) == (7, (2, 5, 6))
    val = list(data.val_dataloader())
    assert [len(labels) for _, labels in val] == [4, 4, 1]
    assert torch.cat([labels for _, labels in val]).tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert torch.equal(val[0][0], next(iter(data.val_dataloader()))[0])
    assert not torch.equal(val[0][0], next(iter(data.calibration_dataloader()))[0])
    assert len(list(data.train_dataloader())) == 2


@pytest.mark.parametrize(("kind", "base"), [(Cifar10, "cifar-10-"), (Cifar100, "cifar-100-")])
def test_cifar_missing(tmp_path, kind, base):
    with pytest.raises(FileNotFoundError, match=rf"{base}.*data\.root.*data\.download"):
        kind(root=tmp_path)


def test_cifar100_has_its_classes():
    assert len(set(Cifar100.names.split())) == 100


def test_cifar10_from_torchvisions_files(tmp_path, monkeypatch):
    """A set of the true layout but few images; only torchvision's checksums are set to its own."""
    where = tmp_path / "cifar-10-batches-py"
    where.mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        (where / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((where / name).read_bytes()).hexdigest()

    batches = [
        (name, {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [3, 1, 4, 1]})
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    ]
    sums = [write(name, content) for name, content in batches]
    name, digest = write("batches.meta", {"label_names": Cifar10.names.split()})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest}
    )
    data = Cifar10(root=tmp_path, mean=(0, 0, 0), std=(1, 1, 1))
    ((images, labels),) = data.val_dataloader()
    wanted = batches[5][1]["data"].reshape(4, 3, 32, 32) / np.float32(255)
    np.testing.assert_allclose(images, wanted, atol=1e-6)
    assert labels.tolist() == [3, 1, 4, 1]
    assert len(data.load()[0]) == 20
    (where / "test_batch").write_bytes(b"cut")
    with pytest.raises(FileNotFoundError, match="missing or damaged"):
        Cifar10(root=tmp_path).setup()
