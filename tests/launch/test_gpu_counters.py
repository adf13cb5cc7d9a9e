"""Counters of a GPU, from a stand-in of NVML: what it tells becomes a figure, what it does not tell is no zero."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from moefold.launch.gpu_counters import GPM_METRICS, MIB, Device, GpuSampler, Reading, gpu_metrics, mean_of, open_device
from moefold.launch.metrics import make_record

GIB = 2**30
RATES = tuple(GPM_METRICS)


class NVMLError(Exception):
    """As the module's own."""


class FakeNvml:
    """Two links of four; power, clocks and memory as given. absent: functions that this device does not support."""

    NVML_NVLINK_MAX_LINKS, NVML_GPM_METRICS_GET_VERSION = 4, 1
    NVMLError = NVMLError

    def __init__(self, *, absent: tuple[str, ...] = (), gpm: Mapping[int, float] | None = None, links: int = 2, reasons: int = 0):
        self.absent, self.gpm, self.links, self.reasons = absent, gpm, links, reasons
        self.kib = 0
        self.samples = 0
        self.known = "GPU-abc"

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "absent"):

            def refused(*_: Any) -> None:
                raise NVMLError("not supported")

            return refused
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.known:
            raise NVMLError("not found")
        return "handle"

    def nvmlDeviceGetNvLinkState(self, _: str, link: int) -> int:
        return int(link < self.links)

    def nvmlDeviceGetPowerUsage(self, _: str) -> int:
        return 350_500

    def nvmlDeviceGetTemperature(self, _: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetClockInfo(self, _: str, kind: int) -> int:
        return 1755

    def nvmlDeviceGetMemoryInfo(self, _: str) -> Any:
        return SimpleNamespace(used=3 * GIB)

    def nvmlDeviceGetCurrentClocksEventReasons(self, _: str) -> int:
        return self.reasons

    def nvmlDeviceGetPcieThroughput(self, _: str, counter: int) -> int:
        return (1 + counter) * 2**20

    def nvmlDeviceGetFieldValues(self, _: str, fields: list[tuple[int, int]]) -> list[Any]:
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(ullVal=self.kib)) for _ in fields]

    def nvmlGpmQueryDeviceSupport(self, _: str) -> Any:
        return SimpleNamespace(isSupportedDevice=int(self.gpm is not None))

    def nvmlGpmSampleAlloc(self) -> object:
        self.samples += 1
        return object()

    def nvmlGpmSampleFree(self, sample: object) -> None:
        self.samples -= 1

    def nvmlGpmSampleGet(self, _: str, sample: object) -> None: ...

    def c_nvmlGpmMetricsGet_t(self) -> Any:
        return SimpleNamespace(metrics=[SimpleNamespace(metricId=0, nvmlReturn=1, value=0.0) for _ in range(9)])

    def nvmlGpmMetricsGet(self, asked: Any) -> None:
        assert self.gpm is not None
        for metric in asked.metrics[: asked.numMetrics]:
            metric.nvmlReturn = 0 if metric.metricId in self.gpm else 3
            metric.value = self.gpm.get(metric.metricId, 0.0)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_first_look_has_no_rates_and_the_second_has_those_since() -> None:
    nvml, clock = FakeNvml(), Clock()
    device = Device(nvml, "handle", clock)
    first = device.read().values
    assert (first["power_w"], first["temperature_c"], first["sm_clock_mhz"], first["mem_used_gib"]) == (350.5, 61, 1755, 3.0)
    assert first["nvlink_tx_gib_s"] is None, "nothing to compare with yet"
    assert first["pcie_tx_gib_s"] == pytest.approx(1.0) and first["pcie_rx_gib_s"] == pytest.approx(2.0)
    nvml.kib, clock.now_s = 4 * 2**20, 2.0
    second = device.read().values
    assert second["nvlink_tx_gib_s"] == second["nvlink_rx_gib_s"] == pytest.approx(2 * 4 / 2.0), "two links, in two seconds"
    nvml.kib, clock.now_s = 0, 3.0
    assert device.read().values["nvlink_tx_gib_s"] is None, "a counter that began again"
    assert second["sm_util"] is second["tensor_util"] is None


def test_gpm_is_asked_where_it_is_supported_and_left_where_it_fails() -> None:
    told = {2: 75.0, 5: 40.0, 20: 512.0, 21: 1024.0, 60: 2048.0, 61: 4096.0}
    nvml, clock = FakeNvml(gpm=told), Clock()
    device = Device(nvml, "handle", clock)
    assert device.read().values["sm_util"] is None
    clock.now_s = 1.0
    values = device.read().values
    assert (values["sm_util"], values["tensor_util"], values["dram_util"]) == (0.75, 0.4, None)
    assert (values["pcie_tx_gib_s"], values["nvlink_tx_gib_s"], values["nvlink_rx_gib_s"]) == (0.5, 4.0, 2.0)
    for _ in range(5):
        device.read()
    assert nvml.samples == 1, "all samples but the newest are given back"
    nvml.absent = ("nvmlGpmMetricsGet",)
    clock.now_s, nvml.kib = 9.0, 8 * 2**20
    values = device.read().values
    assert values["sm_util"] is None and values["pcie_tx_gib_s"] == pytest.approx(1.0)
    assert values["nvlink_tx_gib_s"] == pytest.approx(2 * 8 / 8.0)


@pytest.mark.parametrize(
    ("absent", "missing"),
    [
        (("nvmlDeviceGetPowerUsage",), {"power_w"}),
        (("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetClockInfo"), {"mem_used_gib", "sm_clock_mhz"}),
        (("nvmlDeviceGetPcieThroughput",), {"pcie_tx_gib_s", "pcie_rx_gib_s"}),
        (("nvmlDeviceGetFieldValues",), {"nvlink_tx_gib_s", "nvlink_rx_gib_s"}),
        (("nvmlDeviceGetCurrentClocksEventReasons",), {"throttled_frac"}),
        (("nvmlDeviceGetNvLinkState",), {"nvlink_tx_gib_s", "nvlink_rx_gib_s"}),
    ],
)
def test_what_a_device_does_not_tell_is_absent_and_never_zero(absent: tuple[str, ...], missing: set[str]) -> None:
    clock = Clock()
    device = Device(FakeNvml(absent=absent), "handle", clock)
    device.read()
    clock.now_s = 1.0
    values = device.read().values
    always = {"sm_util", "tensor_util", "dram_util"}
    assert {name for name, value in values.items() if value is None} == missing | always
    metrics = gpu_metrics([mean_of([Reading(values)])])
    assert not {f"gpu/{name}" for name in missing | always} & set(metrics)
    assert make_record("step", 1, 0, metrics)["kind"] == "step", "every name is registered"


def test_idle_is_no_throttling_but_heat_is() -> None:
    assert Device(FakeNvml(reasons=0x1), "handle").read().values["throttled_frac"] == 0.0
    hot = Device(FakeNvml(reasons=0x1 | 0x40), "handle").read()
    assert hot.values["throttled_frac"] == 1.0 and hot.reasons == ("hardware thermal limit",)
    both = mean_of([hot, Reading({"throttled_frac": 0.0}), Reading({"throttled_frac": None})])
    assert both.values["throttled_frac"] == 0.5 and both.reasons == hot.reasons


def test_ranks_are_put_together_by_what_matters() -> None:
    ranks = [
        Reading({"power_w": 100.0, "sm_clock_mhz": 1800, "temperature_c": 50}),
        Reading({"power_w": 300.0, "sm_clock_mhz": 900}),
    ]
    assert gpu_metrics(ranks) == {"gpu/power_w": 200.0, "gpu/sm_clock_mhz": 900, "gpu/temperature_c": 50}
    assert gpu_metrics([]) == {}


def test_the_thread_reads_until_it_is_told_to_end() -> None:
    with GpuSampler(Device(FakeNvml(gpm={2: 50.0}), "handle"), period_s=0.01) as sampler:
        end_s = time.monotonic() + 5
        while sampler.take().values["sm_util"] is None and time.monotonic() < end_s:
            time.sleep(0.01)
        assert time.monotonic() < end_s
    assert not sampler._thread.is_alive()
    sampler.take()
    assert sampler.take().values == dict.fromkeys(sampler.take().values)


def test_a_device_that_nvml_does_not_know_is_left_alone() -> None:
    assert open_device("GPU-abc", FakeNvml()) is not None
    assert open_device("GPU-part-of-one", FakeNvml()) is None
    assert open_device("GPU-abc", FakeNvml(absent=("nvmlInit",))) is None
    assert MIB * 1024 == GIB
