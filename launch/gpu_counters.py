"""Counters of an NVIDIA GPU, read once a second in a thread: power, clocks, throttling, memory, NVLink, PCIe and how busy it is.

What a device does not tell is None, never 0. Throughput and utilisation come from GPM (Hopper and later) where it answers; else
NVLink from the cumulative counters of its links and PCIe from NVML's 20 ms window. Counters are of the whole device, whatever
runs on it. NVML is a parameter (the module `pynvml` of nvidia-ml-py), so that nothing here needs a GPU to be imported or tested.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any

PERIOD_S = 1.0
KIB, MIB, GIB = 2**10, 2**20, 2**30
NVLINK_SENT, NVLINK_RECEIVED = 138, 139
"""Field ids of cumulative KiB of data of one link (NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX and _RX)."""
GPM_METRICS = MappingProxyType(
    {
        "sm_util": (2, 0.01),
        "tensor_util": (5, 0.01),
        "dram_util": (10, 0.01),
        "pcie_tx_gib_s": (20, MIB / GIB),
        "pcie_rx_gib_s": (21, MIB / GIB),
        "nvlink_rx_gib_s": (60, MIB / GIB),
        "nvlink_tx_gib_s": (61, MIB / GIB),
    }
)
"""name -> (NVML's number of the metric, its unit in ours): percent, or MiB per second."""
REASONS = (
    (0x4, "software power cap"),
    (0x8, "hardware slowdown"),
    (0x20, "software thermal limit"),
    (0x40, "hardware thermal limit"),
    (0x80, "hardware power brake"),
)
"""Bits of the clocks' event reasons that hold a GPU back; being idle and chosen clocks are no faults."""
NAMES = (
    "power_w",
    "temperature_c",
    "sm_clock_mhz",
    "mem_used_gib",
    "throttled_frac",
    *GPM_METRICS,
)
LOWEST, HIGHEST = ("sm_clock_mhz",), ("temperature_c", "mem_used_gib", "throttled_frac")
"""Of which the worst rank counts; of the others the mean."""


@dataclass(frozen=True)
class Reading:
    """One look at the device. values: by the names of `NAMES`, None where it does not tell. reasons: why it is held back."""

    values: dict[str, float | None]
    reasons: tuple[str, ...] = ()


@dataclass
class Device:
    """One GPU through NVML. handle: NVML's. now: seconds."""

    nvml: Any
    handle: Any
    now: Callable[[], float] = time.monotonic
    _links: tuple[int, ...] = field(init=False, default=())
    _gpm: bool = field(init=False, default=False)
    _sample: Any = field(init=False, default=None)
    _before: dict[str, tuple[float, int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        links = range(int(getattr(self.nvml, "NVML_NVLINK_MAX_LINKS", 18)))
        self._links = tuple(link for link in links if self._ask("nvmlDeviceGetNvLinkState", link) == 1)
        support = self._ask("nvmlGpmQueryDeviceSupport")
        self._gpm = bool(support is not None and support.isSupportedDevice)

    def read(self) -> Reading:
        """Look now. Rates are those since the look before; None at the first."""
        milliwatts, memory = self._ask("nvmlDeviceGetPowerUsage"), self._ask("nvmlDeviceGetMemoryInfo")
        values: dict[str, float | None] = {
            "power_w": None if milliwatts is None else milliwatts / 1e3,
            "temperature_c": self._ask("nvmlDeviceGetTemperature", 0),
            "sm_clock_mhz": self._ask("nvmlDeviceGetClockInfo", 1),
            "mem_used_gib": None if memory is None else memory.used / GIB,
        }
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        reasons = () if bits is None else tuple(name for bit, name in REASONS if bits & bit)
        values["throttled_frac"] = None if bits is None else float(bool(reasons))
        values |= self._rates()
        return Reading(values, reasons)

    def _rates(self) -> dict[str, float | None]:
        found = self._from_gpm()
        if self._links:
            for name, number in (("nvlink_tx_gib_s", NVLINK_SENT), ("nvlink_rx_gib_s", NVLINK_RECEIVED)):
                counted = self._from_links(name, number)
                found[name] = counted if found[name] is None else found[name]
        else:
            found |= {"nvlink_tx_gib_s": None, "nvlink_rx_gib_s": None}
        for name, counter in (("pcie_tx_gib_s", 0), ("pcie_rx_gib_s", 1)):
            if found[name] is None:
                kib_s = self._ask("nvmlDeviceGetPcieThroughput", counter)
                found[name] = None if kib_s is None else kib_s * KIB / GIB
        return found

    def _from_gpm(self) -> dict[str, float | None]:
        """`GPM_METRICS` between the sample before and one of now."""
        nothing: dict[str, float | None] = dict.fromkeys(GPM_METRICS)
        if not self._gpm:
            return nothing
        nvml = self.nvml
        before, self._sample = self._sample, None
        try:
            newest = nvml.nvmlGpmSampleAlloc()
            nvml.nvmlGpmSampleGet(self.handle, newest)
            self._sample = newest
            if before is None:
                return nothing
            asked = nvml.c_nvmlGpmMetricsGet_t()
            asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
            asked.numMetrics, asked.sample1, asked.sample2 = len(GPM_METRICS), before, newest
            for place, (number, _) in enumerate(GPM_METRICS.values()):
                asked.metrics[place].metricId = number
            nvml.nvmlGpmMetricsGet(asked)
            got = zip(GPM_METRICS.items(), asked.metrics, strict=False)
            return {name: m.value * unit if m.nvmlReturn == 0 else None for (name, (_, unit)), m in got}
        except nvml.NVMLError:
            # a package newer than the driver asks with a structure that it refuses: the older ways are left
            self._gpm = False
            return nothing
        finally:
            if before is not None:
                nvml.nvmlGpmSampleFree(before)

    def _from_links(self, name: str, number: int) -> float | None:
        """GiB per second over all links, from cumulative counters; None at the first look and where a link does not answer."""
        fields = self._ask("nvmlDeviceGetFieldValues", [(number, link) for link in self._links])
        if fields is None or any(f.nvmlReturn != 0 for f in fields):
            return None
        kib, now_s = sum(f.value.ullVal for f in fields), self.now()
        before = self._before.get(name)
        self._before[name] = (now_s, kib)
        if before is None or now_s <= before[0] or kib < before[1]:
            return None  # no look before, or the counters began again
        return (kib - before[1]) * KIB / GIB / (now_s - before[0])

    def _ask(self, function: str, *args: Any) -> Any:
        """What NVML answers; None where it, this device or this version of it has no answer."""
        call = getattr(self.nvml, function, None)
        if call is None:
            return None
        try:
            return call(self.handle, *args)
        except self.nvml.NVMLError:
            return None


class GpuSampler:
    """Reads a device every `period_s` seconds in a thread while the body of its `with` runs; `take` sums up what it saw."""

    def __init__(self, device: Device, period_s: float = PERIOD_S):
        self.device, self.period_s = device, period_s
        self._lock, self._end = threading.Lock(), threading.Event()
        self._readings: list[Reading] = []
        self._thread = threading.Thread(target=self._run, daemon=True, name="gpu counters")

    def __enter__(self) -> GpuSampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while True:
            reading = self.device.read()
            with self._lock:
                self._readings.append(reading)
                del self._readings[:-3600]  # nobody asks: an hour is enough
            if self._end.wait(self.period_s):
                return

    def take(self) -> Reading:
        """Means over the readings since the last call; None for what none of them has. reasons: all that occurred."""
        with self._lock:
            readings, self._readings = self._readings, []
        return mean_of(readings)


def mean_of(readings: Sequence[Reading]) -> Reading:
    """Each value as the mean of those readings that have it."""
    values: dict[str, float | None] = {}
    for name in NAMES:
        known = [v for r in readings if (v := r.values.get(name)) is not None]
        values[name] = sum(known) / len(known) if known else None
    return Reading(values, tuple(name for _, name in REASONS if any(name in r.reasons for r in readings)))


def gpu_metrics(ranks: Sequence[Reading]) -> dict[str, float]:
    """The `gpu/` metrics of a line from what each rank read; what no device tells is absent."""
    out = {}
    for name in NAMES:
        known = [v for r in ranks if (v := r.values.get(name)) is not None]
        if known:
            out[f"gpu/{name}"] = min(known) if name in LOWEST else max(known) if name in HIGHEST else sum(known) / len(known)
    return out


def open_device(uuid: str, nvml: Any) -> Device | None:
    """The GPU with this UUID; None where NVML or its driver is missing, or does not know it (a part of a GPU, for example)."""
    try:
        nvml.nvmlInit()
        return Device(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
    except nvml.NVMLError:
        return None
