"""`load`: from a `DataConfig` to a `Dataset`."""

from pathlib import Path

import numpy as np

from experiments.data import cache, digits, encoded, packed, splits, tfds_source
from experiments.data.dataset import DataConfig, Dataset, RawArrays, check_raw, fingerprint, fingerprint_of_text
from experiments.data.decode import encoding_of
from experiments.data.streaming import StreamedDataset
from pallas_kernels.tuning import cache_folder

# What published recipes use, the same for every encoding and subset, so that exported nets agree.
# CIFAR-10's spreads are the customary ones, not those of its pixels (about 0.247, 0.243, 0.262).
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
# What nets for photographs are given, ImageNet's or not.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load(config: DataConfig) -> Dataset | StreamedDataset:
    """Loads a data set into memory, from the cache of decoded arrays where there is one; finds one that is streamed.

    Args:
        config: See `DataConfig`.

    Returns:
        The data set, split as asked; a `StreamedDataset` where `image_size` is given.

    Raises:
        DatasetMissing: If it is neither on this machine nor obtainable now (known within seconds).
        ValueError: For a field out of range, or a source that cannot be read.
    """
    _check_config(config)
    if config.image_size is not None:
        return _streamed(config)
    raw = check_raw(_read(config), config.name)
    count = digits.VALIDATION_COUNT if config.name == "digits" else len(raw.train_labels) // 10
    train, validation = splits.hold_out(raw.train_labels, count)
    # The train part of "validation" serves "test" as well: one normalisation for both, and it has
    # never seen an image that either evaluates on.
    mean, std = _STATISTICS.get(config.name) or _statistics(raw.train_images[train])
    if config.eval_split == "validation":
        eval_images, eval_labels = raw.train_images[validation], raw.train_labels[validation]
        train_images, train_labels = raw.train_images[train], raw.train_labels[train]
    else:
        eval_images, eval_labels = raw.test_images, raw.test_labels
        train_images, train_labels = raw.train_images, raw.train_labels
    if config.train_examples is not None:
        subset = splits.balanced_subset(train_labels, config.train_examples)
        train_images, train_labels = train_images[subset], train_labels[subset]
    arrays = (train_images, train_labels, eval_images, eval_labels)
    for array in arrays:
        array.setflags(write=False)
    return Dataset(
        config.name,
        *arrays,
        num_classes=raw.num_classes,
        mean=mean,
        std=std,
        eval_split=config.eval_split,
        encoding=raw.encoding,
        fingerprint=fingerprint(*arrays),
    )


def _check_config(config: DataConfig) -> None:
    if config.name == "imagenet2012" and config.image_size is None:
        raise ValueError("name='imagenet2012' does not fit in memory: give image_size, 224 for example, to stream it")
    if config.image_size is not None and config.image_size < 1:
        raise ValueError(f"image_size={config.image_size}; expected at least 1, or None to hold the set in memory")
    if not 0 < config.least_crop_area <= 1:
        raise ValueError(f"least_crop_area={config.least_crop_area}; expected a share above 0, 1 at most")
    if config.eval_split not in ("validation", "test"):
        raise ValueError(f"eval_split={config.eval_split!r}; expected 'validation' or 'test': choose one")
    if config.train_examples is not None and config.train_examples < 1:
        raise ValueError(f"train_examples={config.train_examples}; expected at least 1, or None for all")
    if config.name == "digits" and config.image_size is not None:
        raise ValueError(f"image_size={config.image_size}, but name='digits' is embedded and small: leave it unset")
    if config.name == "digits" and config.dir is not None:
        raise ValueError(
            f"dir={config.dir!r}, but name='digits' is embedded and reads no files: leave dir "
            "unset, or name another data set"
        )


def _streamed(config: DataConfig) -> StreamedDataset:
    found = encoded.find(config.name, tfds_source.data_dir(config.dir))
    # Where labels are only in the records, parts are drawn without a look at the classes.
    labels = found.train_labels if found.train_labels is not None else np.zeros(len(found.train), np.int32)
    if not len(labels) or not len(found.test):
        raise ValueError(f"{config.name} has {len(labels)} train and {len(found.test)} test images; expected some")
    train, evaluation, held_out = np.arange(len(labels)), found.test, np.arange(len(found.test))
    if config.eval_split == "validation":
        evaluation = found.train
        train, held_out = splits.hold_out(labels, len(labels) // 10)
    if config.train_examples is not None:
        train = train[splits.balanced_subset(labels[train], config.train_examples)]
    mean, std = _STATISTICS.get(config.name, _IMAGENET)
    return StreamedDataset(
        config.name,
        found.train,
        train,
        evaluation,
        held_out,
        num_classes=found.num_classes,
        mean=mean,
        std=std,
        eval_split=config.eval_split,
        encoding=encoding_of([found.train[0][0]]),
        fingerprint=fingerprint_of_text(f"{found.fingerprint} {fingerprint(train, held_out)}"),
        image_size=config.image_size,
        least_crop_area=config.least_crop_area,
    )


def place(config: DataConfig) -> Path | None:
    """Where the images of a config are looked for, as an absolute path; None for embedded ones."""
    return None if config.name == "digits" else tfds_source.data_dir(config.dir).resolve()


def _read(config: DataConfig) -> RawArrays:
    if config.name == "digits":
        return digits.read()
    cache_dir = Path(config.cache_dir or cache_folder()).expanduser()
    source = tfds_source.data_dir(config.dir)
    files = packed.files_of(source)
    if files:
        return cache.cached(cache_dir, config.name, files, lambda: packed.load_packed(source, name=config.name))
    folder = tfds_source.find_or_prepare(config.name, source)
    files = tfds_source.files_of(folder)
    return cache.cached(cache_dir, config.name, files, lambda: tfds_source.read(folder))


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, H, W, C), scaled to [0, 1]."""
    scaled = images.astype(np.float64) / 255.0
    mean, std = scaled.mean(axis=(0, 1, 2)), scaled.std(axis=(0, 1, 2))
    return tuple(round(float(v), 4) for v in mean), tuple(round(float(v), 4) for v in std)
