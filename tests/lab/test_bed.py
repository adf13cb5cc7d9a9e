"""The lab itself: hosts and their names, rates that hold, faults, time limits, no way out, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.bed import FOLDER, WAYS, Lab, LabError, LabUnavailable, Process, available
from sources import ROOT

pytestmark = pytest.mark.alone

TCP_SHARE = 0.956
"""Of a link's rate: 1448 bytes of 1514 are payload."""
NAMESPACES = ("net", "pid", "mnt", "user")
TOOLS = ("awk", "bash", "env", "hostname", "mkdir", "mount", "nsenter", "rm", "sh", "sort", "tc", "tr", "true", "unshare")


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab(hosts=2)


def say(*code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", "\n".join(code)]


def namespaces_of(lab: Lab) -> set[str]:
    """Those that every process of the lab may be in."""
    links = [f"/proc/self/ns/{kind}" for kind in NAMESPACES]
    return {line for host in range(lab.hosts) for line in lab.run(host, ["readlink", *links]).out.split()}


def members(namespaces: set[str]) -> list[str]:
    """Processes of this machine that are in one of these namespaces, but not in all of this process's own."""
    mine = {os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES}
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            theirs = {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in NAMESPACES}
        except OSError:  # it has ended, or belongs to somebody else and so not to a lab of ours
            continue
        if theirs & (namespaces - mine):
            found.append(pid)
    return found


def gone(namespaces: set[str], within_s: float) -> bool:
    end_s = time.monotonic() + within_s
    while members(namespaces):
        if time.monotonic() > end_s:
            return False
        time.sleep(0.02)
    return True


def interfaces() -> list[str]:
    return sorted(os.listdir("/sys/class/net"))


@pytest.mark.parametrize("way", WAYS)
def test_a_lab_leaves_nothing_behind(lab: Lab, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        monkeypatch.setattr("lab.bed.WAYS", (way,))
        available()
    except LabUnavailable as unavailable:
        pytest.skip(str(unavailable))
    before = interfaces(), sorted(Path("/run").iterdir())
    with Lab(hosts=3, rate="100mbit") as other:
        folder = other.folder
        namespaces = namespaces_of(other)
        for host in range(3):
            other.start(host, ["sleep", "600"], timeout_s=700)
        other.pause(1)
        assert len(members(namespaces)) >= 4, "three sleepers and process 1"
        assert (interfaces(), sorted(Path("/run").iterdir())) == before, "this machine's own network has not changed"
    assert gone(namespaces, within_s=0.0)
    assert not folder.exists()
    with pytest.raises(LabError, match="not open"):
        other.pids(0)


def test_nothing_outlives_a_program_that_is_killed(lab: Lab) -> None:
    """Also not a process that is stopped, or that has left its session."""
    code = f"""
        import sys, time
        sys.path.insert(0, {str(FOLDER.parent)!r})
        from lab.bed import Lab
        with Lab(hosts=2) as lab:
            lab.start(0, ["setsid", "sleep", "600"], timeout_s=700)
            lab.start(1, ["sleep", "600"], timeout_s=700)
            lab.pause(1)
            links = lab.run(0, ["readlink", "/proc/self/ns/pid", "/proc/self/ns/net"]).out.split()
            print(lab.folder, *links, flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-S", "-c", "if True:" + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        folder, *links = program.stdout.readline().split()
        try:
            assert len(members(set(links))) >= 3
        finally:
            program.send_signal(signal.SIGKILL)
            program.wait()
            shutil.rmtree(folder)  # files stay, as after every program that is killed
    assert gone(set(links), within_s=5.0)


def test_hosts_know_themselves_and_each_other(lab: Lab) -> None:
    code = say("import socket", "print(socket.gethostname(), *(socket.gethostbyname(f'nl{i}') for i in range(2)))")
    for host in range(2):
        assert lab.run(host, code).out.split() == [lab.name(host), lab.address(0), lab.address(1)]


def test_hosts_have_no_way_out(lab: Lab) -> None:
    """Not to the world, and not to this machine, whose loopback and addresses are other ones than theirs."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        addresses = ["192.0.2.1", "127.0.0.1", *{info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}]
        code = say(
            "import socket, sys",
            "for address in sys.argv[2:]:",
            "    try:",
            "        socket.create_connection((address, int(sys.argv[1])), timeout=5)",
            "        print('reached', address)",
            "    except OSError as error:",
            "        print(error.strerror or error)",
        )
        answers = lab.run(0, [*code, str(port), *addresses]).out.splitlines()
        assert len(answers) == len(addresses)
        assert set(answers) <= {"Network is unreachable", "Connection refused"}
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass  # from outside the same address is there


def bins(meter: Process) -> list[float]:
    lines = [line for line in meter.out().splitlines(keepends=True) if "mbit_per_s" in line and line.endswith("\n")]
    return [json.loads(line)["mbit_per_s"] for line in lines]


def next_bins(meter: Process, count: int, skip: int = 2) -> list[float]:
    """What arrives from now on, in Mbit/s for each 100 ms; the first bins, in which something was changed, left out."""
    first = len(bins(meter)) + skip
    end_s = time.monotonic() + 20
    while len(found := bins(meter)[first:]) < count:
        assert time.monotonic() < end_s and meter.ended() is None, f"the flow has ended: {meter.err()}"
        time.sleep(0.05)
    return found[:count]


def flow(lab: Lab, source: int, target: int, port: int) -> Process:
    """A TCP flow without end between two hosts; the process that measures it."""
    traffic = [sys.executable, "-I", "-S", str(FOLDER / "traffic.py")]
    meter = lab.start(target, [*traffic, "sink", str(port), "60"])
    meter.wait_for("listening", timeout_s=10)
    lab.start(source, [*traffic, "send", lab.address(target), str(port), "60"])
    return meter


def test_rates_hold_and_change_while_traffic_flows(lab: Lab) -> None:
    lab.shape(None, "200mbit")
    meter = flow(lab, 0, 1, port=5000)
    assert statistics.median(next_bins(meter, 10)) == pytest.approx(200 * TCP_SHARE, rel=0.06)
    lab.shape(0, "50mbit")
    assert statistics.median(next_bins(meter, 8)) == pytest.approx(50 * TCP_SHARE, rel=0.06)
    lab.shape(0, "200mbit")
    lab.shape(1, "100mbit")  # what comes in is shaped as well; the sender first has to recover from what was dropped there
    assert statistics.median(next_bins(meter, 8, skip=12)) == pytest.approx(100 * TCP_SHARE, rel=0.06)
    lab.link(1, up=False)
    assert next_bins(meter, 5) == [0.0] * 5
    lab.link(1, up=True)
    wait_s = time.monotonic() + 10
    while not next_bins(meter, 1, skip=0)[0]:
        assert time.monotonic() < wait_s, "the flow does not go on when the link is back"
    assert meter.stop().code == -9


def test_loopback_has_a_rate_of_its_own(lab: Lab) -> None:
    lab.shape_local(0, "100mbit")
    meter = flow(lab, 0, 0, port=5001)
    assert 70 < statistics.median(next_bins(meter, 5)) < 105
    meter.stop()


def cpu_ticks(lab: Lab, host: int) -> int:
    """Processor time of a host's processes, in clock ticks."""
    lines = [lab.run(host, ["cat", f"/proc/{pid}/stat"]).out for pid in lab.pids(host)]
    fields = [line.rsplit(")", 1)[1].split() for line in lines if line]
    return sum(int(f[11]) + int(f[12]) for f in fields)


def test_a_burden_takes_processor_time_until_it_is_stopped(lab: Lab) -> None:
    with_others = lab.pids(1)
    burden = lab.burden(1, 2)
    before = cpu_ticks(lab, 1)
    time.sleep(0.5)
    assert cpu_ticks(lab, 1) - before > 0.1 * os.sysconf("SC_CLK_TCK"), "of one second, if both cores are free"
    assert len(lab.pids(1)) >= len(with_others) + 2
    assert burden.stop().code == -9
    assert set(lab.pids(1)) <= set(with_others)


def test_a_paused_host_stands_still(lab: Lab) -> None:
    clock = lab.start(0, say("import time", "while True:", "    print(1, flush=True)", "    time.sleep(0.02)"))
    clock.wait_for("1", timeout_s=10)
    lab.pause(0)
    ticks = len(clock.out())
    time.sleep(0.3)
    assert len(clock.out()) <= ticks + 2
    lab.resume(0)
    time.sleep(0.3)
    assert len(clock.out()) > ticks + 4
    lab.kill(0)
    assert clock.wait().code == -9
    assert lab.pids(0) == []


def test_what_takes_too_long_is_killed_with_its_children(lab: Lab) -> None:
    end = lab.run(0, ["sh", "-c", "echo begun; setsid sleep 600 & sleep 600"], timeout_s=0.4)
    assert (end.code, end.timed_out, end.out) == (-9, True, "begun\n")
    assert 0.4 <= end.seconds < 5
    assert lab.pids(0) == []


def test_outputs_and_exit_codes_come_back(lab: Lab) -> None:
    end = lab.run(1, ["sh", "-c", 'echo "$COLOUR"; echo oh >&2; exit 3'], env={"COLOUR": "green"})
    assert (end.host, end.code, end.out, end.err, end.timed_out) == (1, 3, "green\n", "oh\n", False)


def test_a_job_that_fails_says_where_and_how(lab: Lab) -> None:
    process = lab.start(1, ["sh", "-c", "echo before the end; exit 4"])
    with pytest.raises(LabError, match=r"no 'step 7' in the output of host 1: exit code 4 after .* s\nbefore the end"):
        process.wait_for("step 7", timeout_s=10)
    with pytest.raises(LabError, match=r"no 'step 7' in the output after 0\.1 s"):
        lab.start(1, ["sleep", "5"], timeout_s=6).wait_for("step 7", timeout_s=0.1)


def test_variables_of_another_job_do_not_come_in(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("PET_NNODES", "7")
    monkeypatch.setenv("HARMLESS", "1")
    names = lab.run(0, ["env"]).out
    assert "RANK=" not in names and "PET_NNODES" not in names
    assert "HARMLESS=1" in names and "OMP_NUM_THREADS=1" in names


@pytest.mark.parametrize("hosts", [0, 11])
def test_a_lab_has_one_to_ten_hosts(hosts: int) -> None:
    with pytest.raises(ValueError, match=f"hosts = {hosts}: a lab has 1 to 10"):
        Lab(hosts=hosts)


def test_wrong_hosts_and_rates_are_named(lab: Lab) -> None:
    with pytest.raises(ValueError, match="host 2: this lab has hosts 0 to 1"):
        lab.pids(2)
    with pytest.raises(LabError, match="rate 'fast': write it as 200mbit"):
        lab.shape(0, "fast")
    with pytest.raises(LabError, match="rate '200': write it as 200mbit"), Lab(hosts=1, rate="200"):
        pass


def tools(folder: Path, names: tuple[str, ...]) -> Path:
    """A folder for PATH with these tools of this machine only."""
    for name in names:
        if (found := shutil.which(name)) is not None:
            (folder / name).symlink_to(found)
    return folder


def test_the_reason_is_given_where_there_are_no_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lab: Lab, make_lab: Callable[..., Lab]
) -> None:
    monkeypatch.setenv("PATH", str(tools(tmp_path, TOOLS)))
    missing = r"iproute2 \(ip, tc\) or util-linux \(nsenter\) is not on PATH"
    with pytest.raises(LabUnavailable, match=missing), Lab():
        pass
    with pytest.raises(pytest.skip.Exception, match=f"no lab: .*{missing}"):
        make_lab(hosts=2)


def test_the_reason_is_given_where_namespaces_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = tools(tmp_path, tuple(set(TOOLS) - {"unshare"})) / "unshare"
    refusing.write_text(f"#!{shutil.which('sh')}\necho unshare failed: Operation not permitted >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabUnavailable, match=r"rootless: .*Operation not permitted; rooted: .*Operation not permitted"), Lab():
        pass


def test_benchmarks_can_import_it() -> None:
    """The way that the module's docstring tells, from the root of the repository."""
    lines = ("import sys", f"sys.path.append({str(ROOT / 'tests')!r})", "from lab.bed import Lab", "import bench.result")
    command = [sys.executable, "-c", "\n".join([*lines, "print(Lab(3).hosts, bench.__doc__[:10])"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "3 Benchmarks\n"), done.stderr


def test_an_interrupted_question_does_not_answer_the_next_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Lab) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Lab, "_answer", interrupt)
        lab.shape(0, "fast")
    assert lab.run(0, ["echo", "well"]).out == "well\n"


def test_a_lab_whose_process_1_has_died_says_so(lab: Lab) -> None:
    with Lab(hosts=1) as other:
        assert other._agent is not None
        other._agent.kill()
        other._agent.wait()
        with pytest.raises(LabError, match="process 1 has ended"):
            other.pids(0)
