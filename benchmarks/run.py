# SPDX-License-Identifier: Apache-2.0
"""All benchmarks of speed and memory that need no peer, in one command; writes RESULTS.md.

    python benchmarks/run.py            # some 20 minutes on a quiet machine
    python benchmarks/run.py --short    # tiny sizes, one round, nothing written: do they work

Peers run beside where they are installed (qwix in `qat.py`, onnxruntime in `integer.py`). What
needs torch or data is apart: solvers.py, ptq.py, quality.py, deploy.py, distill.py, prune.py and
the studies.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("qat.py", "integer.py", "scale.py")
SHORT = {"qat.py": ["--only", "mlp,decoder"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--rounds", type=int, help="by default those of the scripts")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    args = parser.parse_args()
    if not args.short:
        args.out.write_text(
            "# Measured\n\nWritten by `python benchmarks/run.py`. Ratios of CPU time on one pinned "
            "core, candidates in turns in one process, medians; smaller is better.\n"
        )
    for script in SCRIPTS:
        start = time.perf_counter()
        turns = [] if args.rounds is None else ["--rounds", str(args.rounds)]
        more = (
            SHORT.get(script, []) + ["--short"] if args.short else ["--out", str(args.out), *turns]
        )
        subprocess.run([sys.executable, str(HERE / script), *more], check=True)
        print(f"{script}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
