"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images, inside the package, no download.

Fixed, class-stratified parts: 599 test images, and 1,198 to train on, of which the validation
split (see `loading`) holds 198 out.
"""

import numpy as np

from clicktrain_jax.extras import hint
from experiments.data import splits
from experiments.data.dataset import RawArrays

TEST_COUNT = 599
VALIDATION_COUNT = 198
_LEVELS = 16


def read() -> RawArrays:
    """The digits as uint8 (N, 8, 8, 1): 1,198 train and 599 test images.

    Raises:
        ValueError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(f"name='digits' needs scikit-learn ({error}): {hint('experiments')}") from error
    source = datasets.load_digits()
    # 17 grey levels, 0..16, spread over the bytes so that digits go the way of other images.
    images = np.round(source.images * (255 / _LEVELS)).astype(np.uint8)[..., None]
    labels = source.target.astype(np.int32)
    train, test = splits.hold_out(labels, TEST_COUNT)
    return RawArrays(images[train], labels[train], images[test], labels[test], 10, "raw")
