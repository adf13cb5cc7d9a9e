"""`torchrun --nproc-per-node N -m moefold.launch.profile comm ...`: the verbs `profile ...` with the same arguments."""

from __future__ import annotations

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]]))
