"""Run all benchmarks, or those named: ``python -m bench imports data``.

``train`` can be of one size: ``python -m bench train --size XL``.
"""

import sys
from importlib import import_module

ALL = (
    *("imports", "data", "encoding", "copying", "sampling", "evaluate"),
    *("energies", "precision", "train", "overlap", "checkpointing", "resuming"),
)
STUDIES = ("study_adaptive", "recipes", "kernels", "halves")
"""Not of speed, or long, or for certain processors alone: run by name."""

names, given = sys.argv[1:], {}
if "--size" in names:
    at = names.index("--size")
    if "train" not in names[:at] or len(names) < at + 2:
        sys.exit("error: --size is of 'train': python -m bench train --size XL")
    given = {"train": names[at + 1]}
    del names[at : at + 2]
for name in names or ALL:
    if name not in (*ALL, *STUDIES):
        sys.exit(f"error: no benchmark {name!r}; there are {', '.join((*ALL, *STUDIES))}")
    print(f"== {name}", flush=True)
    import_module(f"bench.{name}").main(*([given[name]] if name in given else []))
