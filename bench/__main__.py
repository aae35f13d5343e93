"""Run all benchmarks, or those named: ``python -m bench imports data``."""

import sys
from importlib import import_module

ALL = (
    *("imports", "data", "encoding", "copying", "sampling", "evaluate"),
    *("energies", "precision", "train", "overlap", "checkpointing", "resuming"),
)
STUDIES = ("study_adaptive", "recipes", "kernels", "halves")
"""Not of speed, or long, or for certain processors alone: run by name."""

for name in sys.argv[1:] or ALL:
    if name not in (*ALL, *STUDIES):
        sys.exit(f"error: no benchmark {name!r}; there are {', '.join((*ALL, *STUDIES))}")
    print(f"== {name}")
    import_module(f"bench.{name}").main()
