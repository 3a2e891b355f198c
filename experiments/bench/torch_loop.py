"""A training loop as it is usual in PyTorch: eager updates, each image augmented on the host by a loader's workers.

`experiments.bench.torch_epochs` starts it with an interpreter that has PyTorch, NumPy and Pillow, and asks for an epoch
at a time; nothing of jax is imported. Lines are JSON on standard input and output, as in `experiments.bench.worker`.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (everybody's name for it)
from PIL import Image, ImageOps

from experiments.bench.worker import serve

# Files of a job's folder: what is handed over.
JOB, IMAGES, WEIGHTS = "job.json", "images.npz", "weights.npz"


class VGG(torch.nn.Module):
    """The net of `clicktrain_jax.models.vgg` for 32x32 images.

    Args:
        net: ``{"channels": of an image, "stages": [[filters of each convolution]], "hidden": [widths], "classes",
            "dropout": rate}``.
    """

    def __init__(self, net: Mapping[str, Any]) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        channels = net["channels"]
        for index, stage in enumerate(net["stages"]):
            if index:
                layers.append(torch.nn.MaxPool2d(2))
            for filters in stage:
                convolution = torch.nn.Conv2d(channels, filters, 3, padding=1, bias=False)
                layers += [convolution, torch.nn.BatchNorm2d(filters, eps=1e-5, momentum=0.1)]
                layers.append(torch.nn.ReLU(inplace=True))
                channels = filters
        self.features = torch.nn.Sequential(*layers, torch.nn.AvgPool2d(2))
        layers = []
        for hidden in net["hidden"]:
            layers += [torch.nn.Dropout(net["dropout"]), torch.nn.Linear(channels, hidden)]
            layers.append(torch.nn.ReLU(inplace=True))
            channels = hidden
        self.classifier = torch.nn.Sequential(*layers, torch.nn.Linear(channels, net["classes"]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32 (batch, channels, 32, 32), normalised -> logits (batch, classes)."""
        # One position is left: the order of channels and positions does not matter.
        return self.classifier(self.features(images).flatten(1))

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take weights by the names that they have in the Flax net, such as ``params/Conv_0/kernel``.

        Raises:
            ValueError: there are weights that this net has no place for.
        """
        left = dict(arrays)

        def put(tensor: torch.Tensor, name: str, axes: tuple[int, ...] = (0,)) -> None:
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(left.pop(name).transpose(axes))))

        with torch.no_grad():
            for index, layer in enumerate(_of_kind(self.features, torch.nn.Conv2d)):
                put(layer.weight, f"params/Conv_{index}/kernel", (3, 2, 0, 1))
            for index, layer in enumerate(_of_kind(self.features, torch.nn.BatchNorm2d)):
                put(layer.weight, f"params/BatchNorm_{index}/scale")
                put(layer.bias, f"params/BatchNorm_{index}/bias")
                put(layer.running_mean, f"batch_stats/BatchNorm_{index}/mean")
                put(layer.running_var, f"batch_stats/BatchNorm_{index}/var")
            for index, layer in enumerate(_of_kind(self.classifier, torch.nn.Linear)):
                put(layer.weight, f"params/Dense_{index}/kernel", (1, 0))
                put(layer.bias, f"params/Dense_{index}/bias")
        if left:
            raise ValueError(f"the net in PyTorch has no place for {sorted(left)}")


class HostImages(torch.utils.data.Dataset):
    """Images that are cropped, flipped and normalised one at a time, as transforms of PIL images do it.

    Args:
        images: uint8 (N, height, width, 3).
        labels: int64 (N,).
        job: ``crop_padding``, ``flip``, ``mean`` and ``std`` of it are used.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, job: Mapping[str, Any]) -> None:
        self.images, self.labels = images, labels
        self.padding, self.flip = job["crop_padding"], job["flip"]
        self.mean, self.std = (torch.tensor(job[key])[:, None, None] for key in ("mean", "std"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """float32 (3, height, width) and its label."""
        image = Image.fromarray(self.images[index])
        if self.padding:
            width, height = image.size
            top, left = torch.randint(2 * self.padding + 1, (2,)).tolist()
            image = ImageOps.expand(image, self.padding).crop((left, top, left + width, top + height))
        if self.flip and torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        return tensor.sub_(self.mean).div_(self.std), int(self.labels[index])


class Loop:
    """A net in training.

    Args:
        job: see `experiments.bench.torch_epochs.hand_over`.
        arrays: the weights to begin with.
        images: to train on.
        loader: whether batches come from a loader; otherwise every update gets the same one.
        channels_last: whether maps lie in memory as (batch, height, width, channels).
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        images: HostImages,
        *,
        loader: bool = True,
        channels_last: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.images = images
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.net = VGG(job["net"])
        self.net.load(arrays)
        self.net.to(memory_format=self.format)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), job["learning_rate"], job["momentum"], weight_decay=job["weight_decay"]
        )
        workers = job["workers"] if loader else 0
        self.batches: Any = torch.utils.data.DataLoader(
            images, job["batch_size"], shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        if not loader:
            self.batches = _FixedBatches(self.batches)

    def epoch(self) -> dict[str, Any]:
        """Train one epoch: ``{"seconds", "images", "loss"}``, the loss being the mean over its updates."""
        self.net.train()
        begin = time.perf_counter()
        losses, count = [], 0
        correct = torch.zeros((), dtype=torch.int64)
        for images, labels in self.batches:
            loss, logits = self.update(images, labels)
            losses.append(loss)
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
        loss, _ = torch.stack(losses).mean().item(), correct.item()
        return {"seconds": time.perf_counter() - begin, "images": count, "loss": loss}

    def update(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One update; returns the loss and the logits before it."""
        self.optimizer.zero_grad()
        logits = self.net(images.to(memory_format=self.format))
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), logits.detach()


class Served:
    """What can be asked for.

    Args:
        folder: of the job.
    """

    FORMS: Mapping[str, Mapping[str, bool]] = {
        "with its loader": {},
        "with its loader, channels_last": {"channels_last": True},
        "one fixed batch": {"loader": False},
        "one fixed batch, channels_last": {"loader": False, "channels_last": True},
    }

    version = f"torch {torch.__version__}"

    def __init__(self, folder: Path) -> None:
        self.job = json.loads((folder / JOB).read_text())
        with np.load(folder / WEIGHTS) as arrays:
            self.arrays = dict(arrays)
        with np.load(folder / IMAGES) as arrays:
            self.images = HostImages(arrays["images"], arrays["labels"], self.job)
        torch.set_num_threads(self.job["threads"])
        self.loops: dict[str, Loop] = {}

    def epoch(self, form: str) -> dict[str, Any]:
        """An epoch of one of `FORMS`; each has a net of its own."""
        if form not in self.loops:
            self.loops[form] = Loop(self.job, self.arrays, self.images, **self.FORMS[form])
        return self.loops[form].epoch()

    def logits(self, count: int) -> dict[str, Any]:
        """Of the first images, neither cropped nor flipped, by the weights that were handed over."""
        net = VGG(self.job["net"]).eval()
        net.load(self.arrays)
        pixels = torch.from_numpy(self.images.images[:count]).permute(0, 3, 1, 2).to(torch.float32) / 255
        with torch.no_grad():
            return {"logits": net((pixels - self.images.mean) / self.images.std).tolist()}


class _FixedBatches:
    """Batches of an epoch's sizes, all of them the beginning of one that was made beforehand."""

    def __init__(self, loader: Any) -> None:
        self.images, self.labels = next(iter(loader))
        whole, left = divmod(len(loader.dataset), len(self.labels))
        self.sizes = [len(self.labels)] * whole + [left] * bool(left)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((self.images[:size], self.labels[:size]) for size in self.sizes)


def _of_kind(layers: torch.nn.Sequential, kind: type) -> list[Any]:
    return [layer for layer in layers if isinstance(layer, kind)]


if __name__ == "__main__":
    serve("torch", lambda: Served(Path(sys.argv[1])))
