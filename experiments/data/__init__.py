"""Data sets in memory or streamed (``load``), folders of images, the packed archive, augmentation inside the step."""

from experiments.data.augment import normalise
from experiments.data.dataset import DataConfig, Dataset, DatasetMissing
from experiments.data.decode import is_lossy
from experiments.data.image_folder import prepare_folder
from experiments.data.loading import load, place
from experiments.data.packed import load_packed, pack
from experiments.data.streaming import Share, StreamedDataset

__all__ = [
    "DataConfig",
    "Dataset",
    "DatasetMissing",
    "Share",
    "StreamedDataset",
    "is_lossy",
    "load",
    "load_packed",
    "normalise",
    "pack",
    "place",
    "prepare_folder",
]
