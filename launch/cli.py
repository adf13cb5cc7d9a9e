"""The command `moefold`: its words, help, exit codes. What verbs there are is in `verbs.py`. Imports no torch.

Options of a verb have no dot (`--dry-run`); whatever has one (`--train.lr 3e-4`) is a setting, checked by `launch/config.py`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from ..moe.errors import ConfigError, MoefoldError, Problem
from .verb import Flags, Verb
from .verbs import VERBS


class _Parser(argparse.ArgumentParser):
    """Help that begins with examples, and ends with the way to every setting."""

    def __init__(self, name: str, verb: Verb):
        super().__init__(prog=f"moefold {name}", allow_abbrev=False, add_help=False)
        self.verb = verb
        verb.options(self)
        self.add_argument("-h", "--help", action="store_true", help="show this text")

    def format_help(self) -> str:
        lines = [f"{self.prog}: {self.verb.summary}", "", "examples:", *(f"  {line}" for line in self.verb.examples), ""]
        lines += [super().format_help()]
        if self.verb.common:
            width = max(len(name) for name, _ in self.verb.common)
            lines += ["most used settings:", *(f"  {name:{width}}  {text}" for name, text in self.verb.common), ""]
        if self.verb.settings:
            lines += ["all settings: moefold config show"]
        return "\n".join(lines).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 ok, 1 crash, 2 usage or configuration, 3 data, checkpoint or run directory,
    4 numerics, 5 communication, 6 out of memory, 75 pre-empted after saving, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args:
        print(_overview(), file=sys.stderr)
        return 2
    name, *rest = args
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        from .. import __version__

        print(f"moefold {__version__}")
        return 0
    family = [verb for verb in VERBS if verb.startswith(f"{name} ")]
    if family and name in VERBS:
        # a verb that has words as well: `upcycle` and `upcycle record`
        if rest and f"{name} {rest[0]}" in VERBS:
            name, rest = f"{name} {rest[0]}", rest[1:]
        return _guarded(name, rest)
    if family and (not rest or rest[0] in ("-h", "--help")):
        print(_overview(name), file=sys.stdout if rest else sys.stderr)
        return 0 if rest else 2
    if family:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"verbs: {', '.join(VERBS)}"
        print(f"moefold: no verb '{name}'; {hint}", file=sys.stderr)
        return 2
    return _guarded(name, rest)


def _guarded(name: str, args: list[str]) -> int:
    """Run a verb; errors that a user can cause are told without a traceback."""
    try:
        parser = _Parser(name, VERBS[name])
        options, flags = _parse(parser, args)
        if options.help:
            print(parser.format_help(), end="")
            return 0
        code = VERBS[name].run(options, flags)
        sys.stdout.flush()
        return code
    except MoefoldError as error:
        rank = os.environ.get("RANK", "0")
        # Every rank reads the same configuration; one of them says what is wrong with it.
        if not error.told and (rank == "0" or not isinstance(error, ConfigError)):
            print(f"{'' if rank == '0' else f'[rank {rank}] '}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    except Exception as error:
        torch = sys.modules.get("torch")
        if not isinstance(error, MemoryError) and (torch is None or not isinstance(error, torch.OutOfMemoryError)):
            raise
        print(f"out of memory: {error}", file=sys.stderr)
        return 6


def _parse(parser: _Parser, args: list[str]) -> tuple[argparse.Namespace, Flags]:
    plain, dotted = split_settings(args)
    if "-h" in plain or "--help" in plain:
        return argparse.Namespace(help=True), {}
    options, unknown = parser.parse_known_intermixed_args(plain)
    if dotted and not parser.verb.settings:
        raise ConfigError(
            [Problem(word, f"is a setting, but `{parser.prog}` takes none") for word in dotted if word.startswith("--")]
        )
    if unknown:
        # Words after an unknown option are most likely its value.
        words = [word for word in unknown if word.startswith("-")] or unknown
        raise ConfigError([Problem(word, f"unknown option; {_option_hint(parser, word)}") for word in words])
    if not dotted:
        return options, {}
    from .config import parse_overrides

    return options, parse_overrides(dotted)


def split_settings(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options and positional words of a verb, and its dotted settings with their values."""
    plain: list[str] = []
    dotted: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or "." not in name:
            plain.append(word)
            continue
        dotted.append(word)
        if not equals and words and not words[0].startswith("--"):
            dotted.append(words.pop(0))
    return plain, dotted


def _option_hint(parser: argparse.ArgumentParser, word: str) -> str:
    from .schema import settings

    name = word.removeprefix("--").partition("=")[0].replace("-", "_")
    paths = [f"--{s.path}" for s in settings() if s.path.rsplit(".", 1)[-1] == name and "[]" not in s.path]
    near = difflib.get_close_matches(word, list(parser._option_string_actions), n=1, cutoff=0.7)
    return f"did you mean {' or '.join([*near, *paths])}?" if near or paths else f"see {parser.prog} --help"


def _overview(family: str = "") -> str:
    """All verbs, or those that begin with one word."""
    verbs = {name: verb for name, verb in VERBS.items() if not family or name.startswith(f"{family} ")}
    shown = list(verbs) if family else ["config", "pretrain"]
    width = max(map(len, verbs))
    lines = [
        f"moefold {family}".rstrip() + ": " + ("verbs of two words" if family else "distributed Mixture-of-Experts training")
    ]
    lines += ["", "examples:", *(f"  {verbs[name].examples[0]}" for name in shown)]
    lines += ["", "verbs:", *(f"  {name:{width}}  {verb.summary}" for name, verb in verbs.items())]
    return "\n".join(
        [*lines, "", f"moefold {family or 'VERB'}{' WORD' * bool(family)} --help says more; all settings: moefold config show"]
    )


if __name__ == "__main__":
    sys.exit(main())
