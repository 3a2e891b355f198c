"""Choices by measurement: timed side by side, checked before they are timed, remembered per kind of device."""

from pallas_kernels.tuning.autotune import Choice, autotune, recall
from pallas_kernels.tuning.cache import Cache, cache_folder, device_kind
from pallas_kernels.tuning.timing import Timing, time_together

__all__ = ["Cache", "Choice", "Timing", "autotune", "cache_folder", "device_kind", "recall", "time_together"]
