"""A folder of image files, train/CLASS/FILE and test/CLASS/FILE, as a TFDS directory.

The files go in byte for byte, so what they went through stays told by their encoding. Everything is
read and checked before anything is written.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.data import tfds_source
from experiments.data.decode import UNKNOWN, decode_image, encoding_of
from experiments.data.writing import import_tfds, write_tfds

_VERSION = "1.0.0"
_TEST_NAMES = ("test", "val")
LITTER = ("Thumbs.db", "desktop.ini")  # Beside hidden files: what file managers leave behind.
_TAKEN = {"digits": "that set is embedded and reads no files", "imagenet2012": "that set does not fit in memory"}
_LAYOUT = "expected train/CLASS/FILE and test/CLASS/FILE (or val/CLASS/FILE)"


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A folder of images that was read and found sound.

    Attributes:
        classes: Their folders' names. A label is a place in it: by name, or by number where all
            names are numbers.
        files: Split, "train" and "test" -> (class, file) of each image.
        left_out: Folders of images that are in neither split.
        image_shape: (H, W, C) of every image; None where sizes may differ.
        encoding: As `decode.encoding_of` names it.
    """

    classes: list[str]
    files: dict[str, list[tuple[str, Path]]] = dataclasses.field(repr=False)
    left_out: list[Path]
    image_shape: tuple[int, int, int] | None
    encoding: str


def prepare_folder(source: Path, name: str, directory: Path, *, any_size: bool = False) -> tuple[Path, ImageFolder]:
    """Writes DIRECTORY/NAME/1.0.0 from a folder of images; `load` then finds it by its name.

    Args:
        source: Holds train/ and test/, or val/ where test/ has no classes; in each a folder a
            class, the same in both; in these PNG, JPEG, WebP, BMP or PPM files of one size, all
            grey or all in colour. Hidden files are passed over.
        name: Of the data set; letters, digits and "_".
        directory: The TFDS data directory; created when needed.
        any_size: Images may be of any size, for sets that are streamed; they are then not decoded here.

    Returns:
        The prepared folder, and what is in it.

    Raises:
        OSError: If something cannot be read or written.
        ValueError: If the folder is not like that, the name is taken, or tensorflow-datasets is
            not installed. Nothing is written then.
    """
    import_tfds()  # Before the reading: it would be for nothing.
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(f"name={name!r}; expected letters, digits and '_', a letter first")
    if name in _TAKEN and not (any_size and name == "imagenet2012"):
        raise ValueError(f"name={name!r}: {_TAKEN[name]}; give another name")
    there = tfds_source.find_prepared(name, directory)
    if there is not None:
        raise ValueError(f"{there} is there already: remove it, or give another name or directory")
    images = read_folder(source, any_size=any_size)
    splits = {split: functools.partial(_examples, source, files) for split, files in images.files.items()}
    folder = write_tfds(
        name,
        _VERSION,
        directory,
        splits,
        image_shape=images.image_shape or (None, None, 3),
        encoding=images.encoding,
        labels={"label": images.classes},
        description=f"{name}, prepared by experiments.data.image_folder from a folder of images.",
    )
    return folder, images


def read_folder(source: Path, *, any_size: bool = False) -> ImageFolder:
    """Looks at every file of a folder of images; see `prepare_folder`.

    Raises:
        OSError: If something cannot be read.
        ValueError: If it is not laid out as expected, or an image is unusable; it names the first
            file or class that is wrong, and what to do.
    """
    names, parts, left_out = find_classes(source)
    files = {split: [(name, file) for name in names for file in _files(part / name)] for split, part in parts.items()}
    everything = [file for split in files.values() for _, file in split]
    shape, encoding = (None, _encodings(everything)) if any_size else _check_images(everything)
    return ImageFolder(names, files, left_out, shape, encoding)


def find_classes(source: Path) -> tuple[list[str], dict[str, Path], list[Path]]:
    """How a folder of images is laid out, without a look at its files.

    Returns:
        The classes in the order of their labels; split, "train" and "test" -> its folder, which holds a folder a
        class; folders of images that are in neither.

    Raises:
        OSError: If something cannot be read.
        ValueError: If it is not laid out as expected.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; {_LAYOUT}")
    if not (source / "train").is_dir():
        found = ", ".join(entry.name for entry in _entries(source)[:5]) or "nothing"
        raise ValueError(f"{source} holds {found}, but no train/; {_LAYOUT}: sort the images into such folders")
    tests = [source / name for name in _TEST_NAMES if (source / name).is_dir()]
    if not tests:
        raise ValueError(
            f"{source} holds train/, but neither test/ nor val/; {_LAYOUT}: move a part of each class there"
        )
    # ImageNet's and others' test/ is flat, its labels being secret; their val/ has the classes.
    test = next((folder for folder in tests if _class_folders(folder)), tests[0])
    parts = {"train": source / "train", "test": test}
    classes = {split: {entry.name: entry for entry in _class_folders(part)} for split, part in parts.items()}
    _check_classes(parts, classes)
    names = sorted(classes["train"], key=(lambda name: (int(name), name)) if _are_numbers(classes["train"]) else None)
    return names, parts, [folder for folder in tests if folder != test]


def _entries(folder: Path) -> list[Path]:
    found = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.name not in LITTER)
    for entry in found:
        if not entry.name.isprintable() or entry.name != entry.name.strip():
            raise ValueError(f"{str(entry)!r} has a line break, a blank at its ends or the like in its name: rename it")
    return found


def _class_folders(part: Path) -> list[Path]:
    return [entry for entry in _entries(part) if entry.is_dir()]


def _are_numbers(names: dict[str, Path]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


def _check_classes(parts: dict[str, Path], classes: dict[str, dict[str, Path]]) -> None:
    for split, part in parts.items():
        if not classes[split]:
            raise ValueError(f"{part} holds no folders; {_LAYOUT}: sort its images into a folder a class")
        for entry in _entries(part):
            if entry.is_file() and encoding_of([_head(entry)]) != UNKNOWN:
                raise ValueError(f"{entry} is in no class; {_LAYOUT}: move it into its class's folder, or away")
    for split, other in (("train", "test"), ("test", "train")):
        alone = sorted(set(classes[split]) - set(classes[other]))
        if alone:
            names = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
            raise ValueError(
                f"{parts[split]} holds classes that {parts[other]} does not: {names}; expected the same in both: add "
                "or rename the folders there, or move these away"
            )
    if len(classes["train"]) < 2:
        raise ValueError(f"{parts['train']} holds one class, {min(classes['train'])}; expected two or more; {_LAYOUT}")


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096)


def _files(folder: Path) -> list[Path]:
    found = _entries(folder)
    if not found:
        raise empty_class(folder)
    for entry in found:
        if not entry.is_file():
            raise ValueError(f"{entry} is no file; expected image files alone in a class's folder: move it away")
    return found


def empty_class(folder: Path) -> ValueError:
    """What is wrong with a class without images."""
    return ValueError(f"class {folder.name} is empty, {folder} holds no images: add some, or remove it everywhere")


def _encodings(files: list[Path]) -> str:
    return "+".join(sorted({_checked_encoding(file, _head(file)) for file in files}))


def _checked_encoding(file: Path, data: bytes) -> str:
    encoding = encoding_of([data])
    if encoding == UNKNOWN:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is no PNG, JPEG, WebP, BMP or PPM file: convert it, or move it away"
        )
    return encoding


def _check_images(files: list[Path]) -> tuple[tuple[int, int, int], str]:
    encodings, shape = set(), None
    for file in files:
        data = file.read_bytes()
        encoding = _checked_encoding(file, data)
        try:
            found = decode_image(data).shape
        except ValueError as error:
            raise ValueError(f"{file} {error}: replace it, or move it away") from error
        shape = shape or found
        if found != shape:
            raise ValueError(
                f"{file} is {_size(found)}, {files[0]} is {_size(shape)}; expected one size for all, and all grey or "
                "all in colour: convert the images first, for example with ImageMagick's mogrify, or prepare them with "
                "--any-size and stream them"
            )
        encodings.add(encoding)
    return shape, "+".join(sorted(encodings))


def _size(shape: tuple[int, int, int]) -> str:
    height, width, channels = shape
    return f"{width}x{height} {'grey' if channels == 1 else 'in colour'}"


def _examples(source: Path, files: list[tuple[str, Path]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for label, file in files:
        key = file.relative_to(source).as_posix()
        yield key, {"id": key, "image": file.read_bytes(), "label": label}
