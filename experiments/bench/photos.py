"""Made-up photographs: JPEG files of the size and the weight that ImageNet's have, to measure and test with."""

import io
from pathlib import Path

import numpy as np

# Width and height that most of ImageNet's have.
SIZE = (500, 375)


def photo(seed: int, size: tuple[int, int] = SIZE, mode: str = "RGB") -> bytes:
    """A JPEG of soft shapes and a camera's noise, about 100 kB as ImageNet's are.

    Args:
        seed: Decides everything.
        size: Width and height.
        mode: Pillow's: "RGB", "L" or "CMYK".
    """
    from PIL import Image

    random = np.random.default_rng(seed)
    width, height = size
    shapes = Image.fromarray(random.integers(0, 256, (height // 25 + 2, width // 25 + 2, 3), np.uint8))
    soft = np.asarray(shapes.resize(size, Image.Resampling.BICUBIC), np.int16)
    noisy = (soft + random.normal(0, 9, soft.shape).astype(np.int16)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).convert(mode).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_photos(
    folder: Path, *, classes: int = 2, train: int = 8, test: int = 4, size: tuple[int, int] = SIZE
) -> Path:
    """Writes FOLDER/train/CLASS/FILE and FOLDER/val/CLASS/FILE.

    Args:
        folder: Made when missing.
        classes: How many.
        train: Photographs of each to train on.
        test: And to evaluate on.
        size: Width and height.

    Returns:
        The folder.
    """
    seed = 0
    for part, count in (("train", train), ("val", test)):
        for number in range(classes):
            place = folder / part / f"class{number}"
            place.mkdir(parents=True)
            for index in range(count):
                seed += 1
                (place / f"{index:05d}.JPEG").write_bytes(photo(seed, size))
    return folder
