"""What `moefold` can do: each verb with its options and examples, a thin wrapper of a function. Imports no torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..moe.errors import ConfigError, MoefoldError
from .profile import verbs_comm, verbs_moe, verbs_run
from .upcycle.verbs_upcycle import VERBS as UPCYCLE
from .verb import Flags, Verb, add_files, add_json, print_json
from .verbs_convert import VERBS as CONVERT


def _pretrain_options(parser: argparse.ArgumentParser) -> None:
    add_files(parser)
    parser.add_argument("--resume", metavar="WHAT", help="auto, must, never, or a checkpoint; the same as --checkpoint.resume")


def _pretrain(options: argparse.Namespace, flags: Flags) -> int:
    from .config import load

    if options.resume is not None:
        flags = {**flags, "checkpoint.resume": options.resume}
    loaded = load(*options.files, flags=flags)
    from .pretrain import pretrain

    def start() -> int | MoefoldError:
        try:
            return pretrain(loaded.config, origins=dict(loaded.origins)).exit_code
        except MoefoldError as error:
            return error

    outcome: int | MoefoldError | None
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        # Under torchrun: the traceback of a worker that failed unexpectedly is then shown in the launcher's summary. A named
        # error passes by it: it is told once, without a traceback.
        from torch.distributed.elastic.multiprocessing.errors import record

        outcome = record(start)()
    else:
        outcome = start()
    if isinstance(outcome, MoefoldError):
        raise outcome
    return outcome or 0


def _parity_options(parser: argparse.ArgumentParser) -> None:
    add_files(parser)
    parser.add_argument(
        "--world", type=int, default=4, metavar="N", help="ranks to compare with one process (default: %(default)s)"
    )
    add_json(parser)


def _parity(options: argparse.Namespace, flags: Flags) -> int:
    from .config import check_world, load

    loaded = load(*options.files, flags=flags)
    check_world(loaded, options.world)
    from .parity import parity

    result = parity(loaded.config, options.world)
    if options.json:
        print_json(result.to_dict())
    else:
        print(result.render())
    return result.exit_code


def _plan_options(parser: argparse.ArgumentParser) -> None:
    add_files(parser)
    parser.add_argument("--out", metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--measure-s", type=float, default=3.0, metavar="S", help="seconds to measure for (default: %(default)s)")
    add_json(parser)


def _plan(options: argparse.Namespace, flags: Flags) -> int:
    from .config import load

    loaded = load(*options.files, flags=flags)
    from .plan import plan

    result = plan(loaded.config, measure_s=options.measure_s, out=options.out)
    if result.rank == 0 and options.json:
        print_json(result.to_dict())
    elif result.rank == 0:
        print(result.render())
    return result.exit_code


def _launch_options(parser: argparse.ArgumentParser) -> None:
    add_files(parser)
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="workers per node (default: %(default)s)")
    parser.add_argument("--slurm", action="store_true", help="write an sbatch file and submit it")
    parser.add_argument("--dry-run", action="store_true", help="print the scripts, write and submit nothing")
    parser.add_argument("--time", default="4:00:00", help="Slurm time limit (default: %(default)s)")
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--account", help="Slurm account")
    parser.add_argument("--rdzv-host", metavar="HOST[:PORT]", help="first node, where the others meet it (without --slurm)")
    add_json(parser)


def _launch(options: argparse.Namespace, flags: Flags) -> int:
    from .slurm import Job, launch

    names = ("nodes", "gpus_per_node", "slurm", "time", "partition", "account", "rdzv_host")
    job = Job(**{name: getattr(options, name) for name in names})
    done = launch(*options.files, job=job, dry_run=options.dry_run, flags=flags)
    if options.json:
        print_json(done.to_dict())
    else:
        print(done.render())
    return 0


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; several are compared")
    parser.add_argument("--out", metavar="FILE", help="HTML file (default: report.html in the run directory)")


def _report(options: argparse.Namespace, flags: Flags) -> int:
    from .report import report

    print(report(*options.runs, out=options.out).path)
    return 0


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["show", "check"], help="show every value and its origin, or validate")
    add_files(parser, "*")
    parser.add_argument("--world", type=int, metavar="N", help="check: also lay the run out on N ranks")
    add_json(parser)


def _config(options: argparse.Namespace, flags: Flags) -> int:
    if options.action == "check":
        return _config_check(options, flags)
    from .config import flatten, load
    from .schema import settings
    from .show import show

    if not options.files and not flags:
        if options.json:
            print_json([vars(setting) for setting in settings()])
        else:
            print("\n".join(f"{s.path} = {s.default}  # {s.type}{f'. {s.doc}' if s.doc else ''}" for s in settings()))
        return 0
    loaded = load(*options.files, flags=flags)
    if options.json:
        values = flatten(loaded.config).items()
        print_json({path: {"value": value, "origin": loaded.origins[path]} for path, value in values})
    else:
        print(show(loaded))
    return 0


def _config_check(options: argparse.Namespace, flags: Flags) -> int:
    from .config import check_world, load

    try:
        loaded = load(*options.files, flags=flags)
        topology = check_world(loaded, options.world) if options.world is not None else None
    except ConfigError as error:
        if not options.json:
            raise
        print_json({"ok": False, "problems": [vars(problem) for problem in error.problems]})
        return error.exit_code
    config = loaded.config
    facts: dict[str, Any] = {
        "params": config.model.num_params,
        "active_params": config.model.num_active_params,
        "tokens_per_step": config.train.global_batch * config.data.seq_len,
        "steps": config.train.total_steps(config.data.seq_len),
    }
    if options.json:
        print_json({"ok": True, "problems": [], **facts, "topology": topology.to_dict() if topology else None})
        return 0
    print(f"ok: {', '.join(options.files) or 'settings'}")
    print(f"  parameters  {facts['params']:,}, of which a token uses {facts['active_params']:,}")
    tokens = facts["steps"] * facts["tokens_per_step"]
    print(f"  training    {facts['steps']:,} steps of {facts['tokens_per_step']:,} tokens = {tokens:,} tokens")
    if topology:
        print("\n".join(f"  {line}" for line in str(topology).splitlines()))
    return 0


_TRAINING = (
    ("--train.steps N", "optimizer steps (or --train.tokens N)"),
    ("--train.lr X", "peak learning rate"),
    ("--parallel.ep N", "expert-parallel ranks"),
    ("--checkpoint.resume WHAT", "auto, must, never, or the path of a checkpoint"),
    ("--run.dir DIR", "exact run directory, to continue a run"),
)

VERBS: Mapping[str, Verb] = MappingProxyType(
    {
        "pretrain": Verb(
            "train a model; under torchrun on all its ranks, alone in one process",
            (
                "torchrun --nproc-per-node 4 -m moefold.launch.pretrain quickstart",
                "moefold pretrain quickstart --parallel.dp 1 --parallel.hsdp 1 --parallel.ep 1 --train.steps 50",
            ),
            _TRAINING,
            _pretrain_options,
            _pretrain,
        ),
        "parity": Verb(
            "show that a layout gives the loss, gradients and updates of one process",
            ("moefold parity quickstart --world 4", "moefold parity quickstart --world 4 --parallel.ep 4 --json"),
            (("--parallel.ep N", "expert-parallel ranks"), ("--parallel.tp N", "tensor-parallel ranks")),
            _parity_options,
            _parity,
        ),
        "plan": Verb(
            "measure links and experts, and choose in how many pieces to send each MoE layer",
            (
                "torchrun --nproc-per-node 4 -m moefold.launch.plan quickstart --out plan.json",
                "moefold plan quickstart --parallel.dp 1 --parallel.hsdp 1 --parallel.ep 1",
            ),
            (("--parallel.ep N", "expert-parallel ranks"), ("--model.moe.dispatcher NAME", "all_to_all or hierarchical")),
            _plan_options,
            _plan,
        ),
        "profile comm": verbs_comm.VERB,
        "profile moe": verbs_moe.VERB,
        "profile run": verbs_run.VERB,
        **UPCYCLE,
        **CONVERT,
        "launch": Verb(
            "write the scripts of a multi-node run, and submit them to Slurm",
            (
                "moefold launch quickstart --nodes 2 --gpus-per-node 2 --rdzv-host node1 --dry-run",
                "moefold launch quickstart --nodes 2 --gpus-per-node 2 --slurm --time 1:00:00 --dry-run",
            ),
            (("--run.dir DIR", "continue the run of this directory"), ("--run.root DIR", "folder for new run directories")),
            _launch_options,
            _launch,
        ),
        "report": Verb(
            "write one HTML file about a run, or about several over one another",
            ("moefold report runs/quickstart-20260801-120000", "moefold report runs/a runs/b --out comparison.html"),
            (),
            _report_options,
            _report,
            settings=False,
        ),
        "config": Verb(
            "show every setting with its origin, or check a configuration",
            ("moefold config show quickstart --train.lr 3e-4", "moefold config check quickstart --world 4"),
            (),
            _config_options,
            _config,
        ),
    }
)
