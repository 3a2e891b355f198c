"""Writes a TFDS directory in array_record form, without TensorFlow: image files go in as they are."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from clicktrain_jax.extras import hint


def import_tfds() -> ModuleType:
    """tensorflow_datasets; ValueError if it, or array_record, is not installed."""
    try:
        import array_record  # noqa: F401  TFDS imports it late, with a message of its own.
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError(
            f"a TFDS directory needs tensorflow-datasets and array-record ({error}): "
            f"{hint('experiments')}, or point data.dir at a file made by `python -m experiments pack-data`"
        ) from error
    return tensorflow_datasets


def write_tfds(
    name: str,
    version: str,
    directory: Path,
    splits: Mapping[str, Callable[[], Iterable[tuple[int | str, dict[str, Any]]]]],
    *,
    image_shape: tuple[int, int, int],
    encoding: str,
    labels: Mapping[str, int | list[str]],
    description: str,
    homepage: str | None = None,
) -> Path:
    """Writes DIRECTORY/NAME/VERSION: aside first, then renamed, so that it is whole or not there.

    Args:
        name: Of the data set.
        version: As "1.0.0".
        directory: The TFDS data directory; created when needed.
        splits: Split name -> its examples, (key, {"id": text, "image": image file, label key: class}),
            the class as number or name. TFDS orders them by a hash of the key: same keys, same order.
        image_shape: (H, W, C) of every image.
        encoding: As `decode.encoding_of` names it; noted where TFDS has a word for it.
        labels: Label key -> number of classes, or their names in order.
        description: Of the data set.
        homepage: Of the data set.

    Returns:
        The prepared folder.

    Raises:
        OSError: If it cannot be written.
        ValueError: If tensorflow-datasets is not installed.
    """
    tfds = import_tfds()
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(
            shape=image_shape, encoding_format=encoding if encoding in ("png", "jpeg") else None
        ),
        **{
            key: tfds.features.ClassLabel(**{"num_classes" if isinstance(classes, int) else "names": classes})
            for key, classes in labels.items()
        },
    }

    def info(builder: Any) -> Any:
        return tfds.core.DatasetInfo(
            builder=builder,
            description=description,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage=homepage,
        )

    body = {
        "VERSION": tfds.core.Version(version),
        "name": name,
        "_info": info,
        "_split_generators": lambda builder, manager: {split: examples() for split, examples in splits.items()},
        "_generate_examples": None,  # Abstract in the base; the generators above take its place.
        # TFDS would look for these beside the class's source file, which takes importlib_resources.
        "code_path": None,
        "url_infos": {},
        "__module__": __name__,
    }
    # Unregistered: a registered class would shadow TFDS's own of the same name.
    with tfds.core.registered.skip_registration():
        builder_class = type(name.capitalize(), (tfds.core.GeneratorBasedBuilder,), body)
    directory.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=directory))
    try:
        builder = builder_class(data_dir=str(aside), file_format="array_record")
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        with contextlib.redirect_stdout(None):  # TFDS would tell of downloads, and of the folder aside.
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        target = directory / name / version
        target.parent.mkdir(exist_ok=True)
        Path(builder.data_dir).rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
