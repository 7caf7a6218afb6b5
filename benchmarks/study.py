# SPDX-License-Identifier: Apache-2.0
"""What the studies share: logs of one JSON line a run, and paired differences by seed."""

import json

import numpy as np
from scipy import stats


def finished(log):
    """The runs in a log."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines]


def interval(differences):
    """(mean, half of the 95 % interval)."""
    n = len(differences)
    half = stats.t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / n**0.5
    return np.mean(differences), half


def print_differences(of, titles, comparisons, width):
    """Prints paired differences of accuracies; `of` are runs by configuration and seed."""
    print(f"\n{'difference in points':<{width}}{'mean':>7}   {'95 % interval':<18}aim")
    for a, b, aim in comparisons:
        seeds = sorted(of[a].keys() & of[b].keys())
        if len(seeds) < 2:
            continue
        mean, half = interval([of[a][s]["accuracy"] - of[b][s]["accuracy"] for s in seeds])
        ends = f"[{mean - half:+.2f}, {mean + half:+.2f}]"
        print(f"{f'{titles[a]} - {titles[b]}':<{width}}{mean:>+7.2f}   {ends:<18}{aim}")
