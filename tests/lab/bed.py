"""Several hosts on one machine: network namespaces joined by shaped links, on which real `torchrun --nnodes` jobs run.

    with Lab(hosts=2, rate="200mbit") as lab:
        end = lab.torchrun(Path("train.py"), ["--steps", "10"], nproc_per_node=2, timeout_s=60)
        job = lab.start_torchrun("moefold.launch.pretrain", ["run.toml"])     # in the background: now break something
        job.wait_for('"step": 20')
        lab.link(1, up=False)
        job.wait()

Everything lives in namespaces of its own that need no root and have no way out, and ends with the `with` block, or with the
program that opened it, however that ends. In tests the fixture `make_lab` skips with the reason where no lab can be made.
Benchmarks, which run from the root of the repository, import it by path:

    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from lab.bed import Lab
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .processes import ANSWER_S, Job, JobEnd, LabError, LabUnavailable, Process
from .processes import Ended as Ended

FOLDER = Path(__file__).resolve().parent
NETLAB = ("bash", str(FOLDER / "netlab.sh"))
WAYS = ("rootless", "rooted")
"""Of netlab.sh to make fresh namespaces; the first that works here is taken."""
MAX_HOSTS = 10
"""torchrun numbers nodes in the order of host names as strings, and 'nl10' would come before 'nl2'."""
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOT_INHERITED_FAMILIES = ("NETLAB_", "PET_", "TORCHELASTIC_")
"""Settings of netlab.sh and of torchrun by environment variable: a job gets none that it was not given."""
FOR_JOBS = MappingProxyType(
    {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        # with one store for all rounds of a rendezvous, a restarted world reads the addresses of the last one
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
)
FIRST_PORT = 29500


class Lab:
    """Hosts 0 .. hosts - 1, each with a name, an address, a loopback and one link to a switch; a context manager.

    Args:
        hosts: at most `MAX_HOSTS`.
        rate: of every link in each direction, as '200mbit' or '1gbit', headers included: TCP gets 95.6 % of it. None: unshaped.
        intra_rate: of every host's loopback, both directions together.

    Raises:
        ValueError: a number of hosts that it cannot have.
        LabUnavailable: on entering, where namespaces or tools for them are missing.
        LabError: on entering, for a rate that cannot be read.
    """

    def __init__(self, hosts: int = 2, rate: str | None = None, intra_rate: str | None = None):
        if not 1 <= hosts <= MAX_HOSTS:
            raise ValueError(f"hosts = {hosts}: a lab has 1 to {MAX_HOSTS}")
        self.hosts = hosts
        self._rates = (rate, intra_rate)
        self._lock = threading.Lock()
        self._unread = b""
        self._questions = 0
        self._jobs = 0
        self._outputs = 0
        self._agent: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lab:
        way = available()
        self.folder = Path(tempfile.mkdtemp(prefix="moefold-lab-"))
        command = [*NETLAB, way, sys.executable, "-I", "-S", str(FOLDER / "agent.py")]
        with (self.folder / "agent.err").open("wb") as err:
            # in a session of its own: Ctrl-C is for the program that holds the lab, which then closes it
            self._agent = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, env=_clean(), start_new_session=True
            )
        try:
            rate, intra_rate = self._rates
            self._netlab("up", str(self.hosts), *([rate] if rate else []))
            if intra_rate:
                self.shape_local(None, intra_rate)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove the namespaces. What ran here cannot be asked any more."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        assert agent.stdin is not None and agent.stdout is not None
        with suppress(BrokenPipeError):  # it has ended already
            agent.stdin.close()  # now it ends, and with process 1 of their namespace the kernel ends all others
        try:
            agent.wait(5)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()
        agent.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def name(self, host: int) -> str:
        """Its host name, which every host resolves."""
        return f"nl{self._known(host)}"

    def address(self, host: int) -> str:
        return f"10.77.0.{self._known(host) + 1}"

    def shape(self, host: int | None, rate: str) -> None:
        """Limit a host's link (None: all links) in both directions."""
        self._netlab("shape", self._which(host), rate)

    def shape_local(self, host: int | None, rate: str) -> None:
        """Limit a host's loopback (None: of all): what its own processes send each other."""
        self._netlab("local", self._which(host), rate)

    def link(self, host: int, up: bool) -> None:
        """Pull a host's cable, or put it back."""
        self._netlab("link", self._which(host), "up" if up else "down")

    def pause(self, host: int) -> None:
        """Stop all processes on a host, as if it hung; `resume` lets them go on."""
        self._netlab("pause", self._which(host))

    def resume(self, host: int) -> None:
        self._netlab("cont", self._which(host))

    def kill(self, host: int) -> None:
        """Kill all processes on a host at once: the host has died. It can be used again."""
        self._netlab("kill", self._which(host))

    def pids(self, host: int) -> list[int]:
        """Processes on a host, by the numbers that they have inside the lab."""
        return [int(pid) for pid in self._netlab("pids", self._which(host)).split()]

    def burden(self, host: int, processes: int, timeout_s: float = 60.0) -> Process:
        """Start this many processes on a host that compute without end. They end by `stop()`, or after `timeout_s` seconds."""
        script = 'for i in $(seq "$1"); do (while :; do :; done) & done; wait'
        return self.start(host, ["bash", "-c", script, "burden", str(processes)], timeout_s)

    def start(
        self,
        host: int,
        argv: Sequence[str],
        timeout_s: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Process:
        """Start a command on a host.

        timeout_s: after so long it is killed with all that it started.
        env: beside this program's environment, less what belongs to a job that this program may be part of.
        cwd: by default a fresh folder of the lab.
        """
        self._outputs += 1
        folder = self.folder / f"{self._outputs}"
        folder.mkdir()
        out, err = folder / "stdout", folder / "stderr"
        fields: dict[str, Any] = {
            "argv": [*NETLAB, "exec", self._which(host), *argv],
            "env": {**_clean(), **FOR_JOBS, **(env or {})},
            "cwd": str(cwd or folder),
            "out": str(out),
            "err": str(err),
            "limit_s": timeout_s,
        }
        return Process(self._ask, host, self._ask("start", **fields)["number"], (out, err), timeout_s)

    def run(self, host: int, argv: Sequence[str], timeout_s: float = 60.0, **options: Any) -> Ended:
        """`start`, and wait for the end."""
        return self.start(host, argv, timeout_s, **options).wait()

    def start_torchrun(
        self,
        target: Path | str,
        args: Sequence[object] = (),
        nproc_per_node: int = 1,
        timeout_s: float = 60.0,
        launcher: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Job:
        """Start torchrun on all hosts, as one job whose rendezvous is on host 0; node ranks are host numbers.

        Workers get one thread each (OMP_NUM_THREADS).

        target: a script's path, or the name of a module.
        launcher: more options of torchrun, such as '--max-restarts=3'; later ones win.
        """
        self._jobs += 1
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.hosts}", f"--nproc-per-node={nproc_per_node}"]
        # a port of its own: the last job's may not be free yet
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.name(0)}:{FIRST_PORT + self._jobs}", f"--rdzv-id={self._jobs}"]
        command += [*launcher, *(["-m"] if isinstance(target, str) else []), "--", str(target), *map(str, args)]
        return Job({host: self.start(host, command, timeout_s, env, cwd) for host in range(self.hosts)})

    def torchrun(self, target: Path | str, args: Sequence[object] = (), **options: Any) -> JobEnd:
        """`start_torchrun`, and wait for the end. Look at `ok`, or call `check()`: a job that failed does not raise by itself."""
        return self.start_torchrun(target, args, **options).wait()

    def _netlab(self, *words: str) -> str:
        done = self._ask("call", argv=[*NETLAB, *words], limit_s=ANSWER_S / 2)
        if done["code"] != 0:
            raise LabError(f"{' '.join(words)}: {done['err'].strip()}")
        return done["out"]

    def _known(self, host: int) -> int:
        if host not in range(self.hosts):
            raise ValueError(f"host {host}: this lab has hosts 0 to {self.hosts - 1}")
        return host

    def _which(self, host: int | None) -> str:
        return "all" if host is None else str(self._known(host))

    def _ask(self, do: str, **fields: Any) -> dict[str, Any]:
        with self._lock:
            if self._agent is None:
                raise LabError("this lab is not open; use it inside its `with` block")
            assert self._agent.stdin is not None
            self._questions += 1
            question = {"id": self._questions, "do": do, **fields}
            try:
                self._agent.stdin.write(json.dumps(question).encode() + b"\n")
                self._agent.stdin.flush()
                # one whose asker was interrupted has left its answer here
                while (answer := json.loads(self._answer()))["id"] != self._questions:
                    pass
            except (BrokenPipeError, EOFError) as error:
                raise LabError(f"the lab's process 1 has ended: {(self.folder / 'agent.err').read_text().strip()}") from error
        if "error" in answer:
            raise LabError(f"{do}: {answer['error']}")
        return answer

    def _answer(self) -> bytes:
        assert self._agent is not None and self._agent.stdout is not None
        pipe = self._agent.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], ANSWER_S)[0]:
                raise LabError(f"the lab has not answered for {ANSWER_S:g} s")
            received = os.read(pipe, 1 << 16)
            if not received:
                raise EOFError
            self._unread += received
        line, self._unread = self._unread.split(b"\n", 1)
        return line


def available() -> str:
    """The first of `WAYS` in which a lab can be made here.

    Raises:
        LabUnavailable: none works; with the reason for each.
    """
    if sys.platform != "linux":
        raise LabUnavailable(f"network namespaces are a feature of Linux, and this is {sys.platform}")
    if shutil.which("bash") is None:
        raise LabUnavailable("bash is not installed")
    reasons = []
    for way in WAYS:
        done = subprocess.run([*NETLAB, way, *NETLAB, "check"], capture_output=True, text=True, timeout=ANSWER_S, env=_clean())
        if done.returncode == 0:
            return way
        said = "; ".join(line.removeprefix("netlab: ") for line in done.stderr.splitlines())
        reasons.append(f"{way}: {said or f'exit code {done.returncode}'}")
    raise LabUnavailable("; ".join(reasons))


def _clean() -> dict[str, str]:
    """This program's environment, without what would make a lab or a job in it another one."""
    return {k: v for k, v in os.environ.items() if k not in NOT_INHERITED and not k.startswith(NOT_INHERITED_FAMILIES)}
