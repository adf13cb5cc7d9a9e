"""Named errors of moefold, each with the process exit code it leads to. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


class MoefoldError(Exception):
    """Base of every error a user can cause or meet. `exit_code` is what the command line returns for it."""

    exit_code: int = 1
    told: bool = False
    """Whether the user has been told of it, here or by another rank; the command line then says nothing more."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input.

    where: dotted path of the setting (`model.moe.top_k`), or a file.
    what: the value, why it cannot be, and the way out, in one sentence.
    origin: where the value came from (`base.toml:14`, `flag`, `default`); filled in by the loader.
    """

    where: str
    what: str
    origin: str = ""

    def __str__(self) -> str:
        return f"{self.where}{f' ({self.origin})' if self.origin else ''}: {self.what}"


class ConfigError(MoefoldError, ValueError):
    """A configuration that cannot run. Carries every problem found, not only the first."""

    exit_code = 2
    title = "config error"

    def __init__(self, problems: list[Problem] | str):
        self.problems = [Problem("config", problems)] if isinstance(problems, str) else list(problems)
        super().__init__(self.render())

    def render(self) -> str:
        n = len(self.problems)
        lines = [f"{self.title}: {n} problem{'s' if n != 1 else ''}", *(f"  {p}" for p in self.problems)]
        return "\n".join(lines)


class TopologyError(ConfigError):
    """Parallel degrees that cannot be laid out; lists every violation with the nearest legal values."""

    title = "topology error"


class DataError(MoefoldError):
    """Training data that is missing, unreadable, empty, corrupt, too short or outside the vocabulary."""

    exit_code = 3


class CheckpointError(MoefoldError):
    """A checkpoint that is missing, incomplete, foreign, or belongs to another model."""

    exit_code = 3


class RunDirError(MoefoldError):
    """A run directory that is in use, not empty, or not a run directory."""

    exit_code = 3


class NumericsError(MoefoldError):
    """Loss or gradients that are not finite."""

    exit_code = 4


class CommError(MoefoldError):
    """A collective that timed out or disagreed between ranks."""

    exit_code = 5


class PreemptedError(MoefoldError):
    """The job was asked to stop and has saved a checkpoint: requeue it."""

    exit_code = 75
