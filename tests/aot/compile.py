"""Compile every production launch of the Triton kernels for sm_90, without a GPU, and say what each one uses.

How to add kernels: write `tests/aot/calls_NAME.py` with

    def calls() -> dict[str, Callable[[], object]]: ...

Each value runs one of our Triton entry points (forward, or forward and backward) on `torch.device("meta")` tensors of a
production shape and dtype. The launches it makes are recorded instead of run, and compiled with the very signature,
constants, divisibility attributes and options that the launch on a GPU would have. A meta tensor holds no data, so a call
that synchronises with the host (`.item()`, `.tolist()`, a boolean mask) fails here too.

As a script, in a process of its own because the compiler can crash the process on some inputs:

    python tests/aot/compile.py                 list the calls
    python tests/aot/compile.py NAME...         compile them: one JSON object per line, {"call": NAME} before each call
    python tests/aot/compile.py --write         compile all, and write resources.json
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
TABLE = HERE / "resources.json"
SHARED_LIMIT = 232_448
"""Bytes of shared memory one block can have on sm_90. The compiler accepts more; the launch would fail."""
FLOAT_ATOMIC = re.compile(r"\b(?:red|atom)\.\S*add\S*\.(?:noftz\.)?(?:f|bf)\d+")


def all_calls() -> dict[str, Callable[[], object]]:
    """Every call of every calls_*.py, by name."""
    found: dict[str, Callable[[], object]] = {}
    for path in sorted(HERE.glob("calls_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, call in module.calls().items():
            assert name not in found, f"{path.name}: a second call named {name}"
            found[name] = call
    return found


@contextmanager
def recorded_launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Kernels with the arguments of their launches, which do not happen."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def compiled(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
    """The launch compiled for sm_90, and a key that is equal for launches of one binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
    options, signature, constants, attrs = kernel._pack_args(backend, kwargs, bound, specialization, None)
    binary = triton.compile(ASTSource(kernel, signature, constants, attrs), target=target, options=options.__dict__)
    return binary, binary.hash


def measure(binary: Any) -> dict[str, Any]:
    """What a binary uses, from its metadata, its PTX and its machine code."""
    tools = Path(sys.modules["triton"].__file__ or "").parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / "cuobjdump", flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    operands = re.findall(r"tt\.dot [^:]*: tensor<\d+x\d+x(\w+)[,>]", binary.asm["ttir"])
    return {
        "registers": used["REG"],
        "shared_bytes": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        "stack_bytes": used["STACK"] + used["LOCAL"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "hgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "hmma": len(re.findall(r"\bHMMA\b", sass)),
        "float_atomics": len(FLOAT_ATOMIC.findall(binary.asm["ptx"])),
        "dots_16_bit": sum(operand in ("f16", "bf16") for operand in operands),
    }


def compile_call(call: Callable[[], object], known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One measurement per different binary that the call launches, named by kernel and number. `known`: from earlier calls."""
    with recorded_launches() as launches:
        call()
    assert launches, "the call launched no kernel"
    seen: set[str] = set()
    for kernel, args, kwargs in launches:
        binary, key = compiled(kernel, args, kwargs)
        if key not in seen:
            seen.add(key)
            if key not in known:
                known[key] = measure(binary)
            yield {"kernel": f"{len(seen)} {kernel.__name__.strip('_')}", **known[key]}


def run(names: list[str]) -> Iterator[tuple[str, dict[str, dict[str, Any]] | str]]:
    """(call, its kernels by name, or what went wrong) for each name; a process that dies costs only the call it was at."""
    waiting = list(names)
    while waiting:
        command = [sys.executable, str(Path(__file__).resolve()), *waiting]
        done = subprocess.run(command, capture_output=True, text=True, env=_plain_environment())
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found: dict[str, dict[str, dict[str, Any]]] = {}
        current = ""
        for line in lines:
            if "call" in line:
                current = line["call"]
                found[current] = {}
            else:
                found[current][line.pop("kernel")] = line
        if done.returncode == 0:
            yield from found.items()
            return
        failed = current or waiting[0]
        error = f"exit code {done.returncode}\n{done.stderr[-4000:]}"
        yield from ((name, error if name == failed else kernels) for name, kernels in found.items() if name != failed)
        yield failed, error
        waiting = [name for name in waiting if name not in found and name != failed]


def _plain_environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def write_table() -> None:
    """Compile all calls and write what they use to resources.json."""
    import triton

    kernels = {}
    for call, result in run(list(all_calls())):
        if isinstance(result, str):
            raise SystemExit(f"{call}: {result}")
        for kernel, use in result.items():
            kernels[f"{call}: {kernel}"] = {key: use[key] for key in ("registers", "shared_bytes", "warps")}
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(use)}" for name, use in sorted(kernels.items()))
    TABLE.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{rows}\n  }}\n}}\n')
    print(f"{len(kernels)} kernels in {TABLE}")


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        return write_table()
    calls = all_calls()
    measured: dict[str, dict[str, Any]] = {}
    for name in arguments or calls:
        print(json.dumps({"call": name}), flush=True)
        for use in compile_call(calls[name], measured) if arguments else ():
            print(json.dumps(use), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
