"""``python -m benchmarks.kills --out FOLDER``: kills runs of every policy, and says what was lost; see campaign.py.

With ``--processes 2`` runs of two processes, of which one is killed, or both; see pairs.py.
Goes on where it stopped, and writes an entry for every kill to ``benchmarks/kills/results.jsonl``. It is one process
that forks: start it before anything else uses a device.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from typing import Any

RESULTS = pathlib.Path(__file__).with_name("results.jsonl")


def main() -> int:
    """Runs the campaign; 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the runs")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="JSON lines, which it goes on from")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="of each run")
    parser.add_argument("--kills", type=int, default=5, help="of each run")
    parser.add_argument("--cases", type=int, default=1000, help="how many cases are tried at most")
    parser.add_argument("--policies", nargs="+", help="those alone; all by default")
    parser.add_argument("--page", type=pathlib.Path, help="page whose tables are written anew")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import matplotlib.pyplot  # noqa: F401  # once, for all that are forked
    import tensorflow_datasets  # noqa: F401
    from orbax.checkpoint import v1  # noqa: F401

    from benchmarks.kills import campaign, pairs, report, victim

    tried_in: Any = campaign if args.processes == 1 else pairs

    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "fashion").exists():
        victim.write_data(args.out)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    entries = [json.loads(line) for line in lines]
    ends = [entry for entry in report.of_runs(entries, args.processes) if entry["event"] == "end"]
    tried = [tried_in.case_of(entry) for entry in ends]
    cases = [case for case in tried_in.cases() if case not in tried]
    left = [case for case in cases if case.policy in (args.policies or [case.policy])]
    for case in left[: args.cases]:
        begun, kills = time.monotonic(), tried_in.moments(case, args.seed, args.kills)
        entries += (new := list(tried_in.try_case(case, kills, args.out)))
        with args.results.open("a") as file:
            file.writelines(json.dumps(one) + "\n" for one in new)
        print(f"{case}: {time.monotonic() - begun:.0f} s, {new[-1]}", flush=True)
    print(report.table(report.of_runs(entries, args.processes)))
    if args.page is not None:
        report.write_page(args.page, entries)
    lost = report.lost(entries)
    print(f"lost: {lost or 'nothing'}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
