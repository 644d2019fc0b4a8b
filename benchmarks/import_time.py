"""How long `import pyrosc` takes, against the libraries it stands on.

Runs `import torch, pyro, anndata` and `import pyrosc` in turn, each in a process of its own, and compares the
medians. Exits with status 1 if pyrosc takes more than TARGET times as long, or if it imports a library that
it must import only where that is used.

    python benchmarks/import_time.py [--repeats 9]
"""

import argparse
import statistics
import subprocess
import sys
import time

BASELINE = "import torch, pyro, anndata"
OURS = "import pyrosc"
TARGET = 1.15
LAZY = ("scanpy", "matplotlib", "sklearn", "scipy.stats", "numba")


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def imported(code: str) -> set[str]:
    """Which libraries of LAZY are in sys.modules after `code`."""
    code += f"; import sys; print(*[name for name in {LAZY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(run.stdout.split())


def main() -> int:
    parser = argparse.ArgumentParser(description="Time `import pyrosc`.")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each (default 9)")
    repeats = parser.parse_args().repeats

    heavy = imported(OURS) - imported(BASELINE)  # also warms the file cache
    times: dict[str, list[float]] = {BASELINE: [], OURS: []}
    for _ in range(repeats):
        for code, measured in times.items():
            measured.append(seconds(code))

    for code, measured in times.items():
        print(
            f"{code:30s} median {statistics.median(measured):.3f} s  "
            f"(min {min(measured):.3f}, max {max(measured):.3f}, n = {repeats})"
        )
    ratio = statistics.median(times[OURS]) / statistics.median(times[BASELINE])
    print(f"ratio {ratio:.3f} (target: at most {TARGET})")
    print(f"imported beyond the baseline, of {', '.join(LAZY)}: {', '.join(sorted(heavy)) or 'none'}")
    return int(ratio > TARGET or bool(heavy))


if __name__ == "__main__":
    sys.exit(main())
