"""The step that `profile moe` measures: a configuration on the ranks that are here, its tokens, its routing, and its engines."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ...moe.config import ModelConfig
from ...moe.errors import ConfigError, DataError, MoefoldError, Problem, TopologyError
from ...parallel.engine import Engine, MicroBatch
from ...parallel.forced_routing import forced, zipf_load
from ...parallel.mesh import Mesh, build_mesh
from ...parallel.nodes import NodeMap
from ...parallel.recorder import CommRecorder
from ...parallel.step_volume import Way, expert_blocks
from ...parallel.topology import Topology
from ..data.loader import open_data
from ..metrics import read_metrics
from ..rundir import RunDir
from ..settings import RunConfig

RoutingName = Literal["natural", "balanced", "zipf", "recorded"]
TokensName = Literal["random", "text"]
SEED = 20


@dataclass(frozen=True)
class Load:
    """How tokens are spread over experts. natural: as the router, with its initial weights, chooses. recorded: by the last load
    that the metrics of `run` hold. exponent: of zipf. tokens: random ids, or the configuration's text."""

    routing: RoutingName = "natural"
    exponent: float = 1.0
    run: str | None = None
    tokens: TokensName = "random"

    def __post_init__(self) -> None:
        problems = []
        if self.exponent < 0:
            problems.append(Problem("--zipf", f"is {self.exponent}, but an exponent must not be negative; 0 is even"))
        if (self.run is None) != (self.routing != "recorded"):
            what = "needs --from-run RUN" if self.run is None else "does not go with --from-run; leave one of them out"
            problems.append(Problem("--routing", f"is '{self.routing}', which {what}"))
        if problems:
            raise ConfigError(problems)

    @property
    def text(self) -> str:
        how = {"zipf": f"Zipf routing with exponent {self.exponent:g}", "recorded": f"routing as recorded in {self.run}"}
        return f"{how.get(self.routing, f'{self.routing} routing')}, {self.tokens} tokens"

    def loads_LE(self, model: ModelConfig) -> Tensor | None:
        """Wished loads of each MoE layer; None = even ones.

        Raises:
            DataError: a run without recorded loads, or of another model.
        """
        assert model.moe is not None
        L, E = len(model.moe_layers), model.moe.num_experts
        if self.routing == "zipf":
            return torch.stack([zipf_load(E, self.exponent, SEED + index) for index in range(L)])
        if self.routing != "recorded" or self.run is None:
            return None
        path = RunDir.open(self.run).metrics
        found = read_metrics(path).last("moe/load_LE")
        if found is None:
            raise DataError(f"{path}: no line has moe/load_LE; recorded routing needs a run with MoE layers and a metric line")
        if (len(found), len(found[0])) != (L, E):
            shape = f"{len(found)} layers of {len(found[0])} experts, but this model has {L} of {E}"
            raise DataError(f"{path}: loads are of {shape}; use the run's own config.toml")
        # an expert that got nothing would never be drawn, and top_k of them must be
        return torch.tensor(found, dtype=torch.float64).clamp_min(1e-6)


@dataclass
class Case:
    """One configuration on the ranks that run, and what has been built for it. Methods are collective."""

    config: RunConfig
    topology: Topology
    device: torch.device
    nodes: NodeMap
    load: Load
    loads_LE: Tensor | None
    rows_TS: Tensor
    meshes: dict[tuple[int, int, int], tuple[Mesh, NodeMap | None]] = field(default_factory=dict)

    @staticmethod
    def make(config: RunConfig, topology: Topology, device: torch.device, nodes: NodeMap, load: Load) -> Case:
        """Draws or reads the tokens of one step: rank 0 does, and tells the others. Raises DataError or RunDirError on all."""
        box: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                box[0] = (load.loads_LE(config.model), _tokens(config, load.tokens))
            except MoefoldError as error:
                box[0] = error
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], MoefoldError):
            raise box[0]
        return Case(config, topology, device, nodes, load, *box[0])

    @property
    def way(self) -> Way:
        """As it is configured."""
        return Way.of(self.config.model, self.topology, self.config.parallel.pieces)

    @property
    def micros(self) -> int:
        """Micro-batches of a step; the same in every folding, as each data rank has as many sequences as before."""
        return self.config.train.global_batch // self.topology.dp // self.rows(self.topology)

    def rows(self, topology: Topology) -> int:
        """Sequences of a micro-batch."""
        own = self.config.train.global_batch // self.topology.dp
        micro = self.config.parallel.micro_batch or own
        # fewer data ranks have more sequences each: in as many micro-batches
        return self.config.train.global_batch // topology.dp // (own // micro)

    def tokens(self, topology: Topology) -> int:
        """That one rank routes at once."""
        return self.rows(topology) * self.config.data.seq_len // topology.tp

    def mesh(self, way: Way) -> tuple[Mesh, NodeMap | None]:
        """The groups of a folding, and its nodes if groups in two levels can be made; built once."""
        if way.folding not in self.meshes:
            topology = way.topology(self.topology)
            nodes = self.nodes if self.has_levels(topology) else None
            mesh = build_mesh(topology, self.device, self.config.parallel.timeout_s, nodes)
            self.meshes[way.folding] = (mesh, nodes)
        return self.meshes[way.folding]

    def has_levels(self, topology: Topology) -> bool:
        """Whether groups in two levels can be made of a layout, with neighbouring experts on each node."""
        assert self.config.model.moe is not None
        try:
            return expert_blocks(topology, self.nodes, self.config.model.moe.num_experts) is not None
        except TopologyError:
            return False

    def engine(self, way: Way) -> Engine:
        """A new engine that sends this way, with a recorder."""
        mesh, _ = self.mesh(way)
        model, train = way.model(self.config.model), self.config.train
        recorder = CommRecorder(mesh.rank, self.device)
        settings = {"precision": train.precision, "recompute": self.config.parallel.recompute, "seed": train.seed}
        return Engine(model, mesh, pieces=way.pieces, recorder=recorder, **settings)  # type: ignore[arg-type]

    def batches(self, mesh: Mesh) -> list[MicroBatch]:
        """This rank's micro-batches of the step."""
        rows, share = self.rows(mesh.topology), self.config.train.global_batch // self.micros
        starts = [m * share + mesh.coordinates.dp * rows for m in range(self.micros)]
        parts = [self.rows_TS[start : start + rows].to(self.device) for start in starts]
        return [MicroBatch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]

    @contextmanager
    def routed(self, engine: Engine) -> Iterator[None]:
        """While the body runs, the engine routes as wished."""
        natural = self.load.routing == "natural"
        with nullcontext() if natural else forced(engine.layers, self.loads_LE, SEED + 7919 * engine.mesh.rank):
            yield


def one_layer(model: ModelConfig) -> ModelConfig:
    """The same model with its first MoE layer alone."""
    return replace(model, num_layers=1, dense_prefix_layers=0, moe_every=1)


def _tokens(config: RunConfig, kind: TokensName) -> Tensor:
    """int64 [global_batch, seq_len + 1]."""
    rows, length = config.train.global_batch, config.data.seq_len
    if kind == "random":
        return torch.randint(0, config.model.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(SEED))
    with tempfile.TemporaryDirectory(prefix="moefold-profile-") as folder:
        data = open_data(config.data, vocab_size=config.model.vocab_size, global_batch=rows, cache_dir=folder, eval_batches=0)
        batch = data.train.batch(0)
        return torch.cat([batch.tokens_BS, batch.labels_BS[:, -1:]], 1)
