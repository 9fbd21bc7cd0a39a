"""`python -m tests.torture`: runs faults one after the other, a line of JSON each; fails if a promise was broken."""

from __future__ import annotations

import argparse
import sys

from tests.torture.line import everything, shown


def main() -> int:
    faults = everything()
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to run; all of them without")
    parser.add_argument("--quick", action="store_true", help="the short form that `make test` runs")
    parser.add_argument("--n", type=int, help="how often, instead of each fault's own number")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="name them and what they promise, and end")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in faults]
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join(sorted(faults))}")
    chosen = [faults[name] for name in given.names] or list(faults.values())
    if given.list:
        for fault in chosen:
            print(f"{fault.name:32} {fault.goal:5} n {fault.n:<8} {fault.says}")
        return 0
    broken = []
    for fault in chosen:
        line = fault.line(given.n or (fault.quick if given.quick else fault.n), given.seed)
        print(shown(line), flush=True)
        if not line["kept"]:
            broken.append(fault.name)
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
