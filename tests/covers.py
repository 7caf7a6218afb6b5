# SPDX-License-Identifier: Apache-2.0
"""Which cases of a test of several `parametrize` cover each of their values."""

import collections


def left_out(cases: list) -> list:
    """Cases of a test without which each value of each `parametrize` still occurs.

    Every value of one occurs `cover(times=...)` times, as far as there are so many (each-choice
    coverage: Ammann and Offutt, Introduction to Software Testing, 6.2).
    """
    times = cases[0].get_closest_marker("cover").kwargs.get("times", 1)
    values = {}
    for item in cases:
        names = [mark.args[0] for mark in item.iter_markers("parametrize")]
        names = [n.replace(" ", "").split(",") if isinstance(n, str) else n for n in names]
        params = item.callspec.params
        values[item] = [(*group, *(id(params[name]) for name in group)) for group in names]
    missing = collections.Counter({v: times for found in values.values() for v in found})
    rest = list(cases)
    while rest:
        wanted = {item: [missing[v] for v in values[item]] for item in rest}
        best = max(rest, key=lambda i: (sum(n > 0 for n in wanted[i]), sum(wanted[i])))
        if max(wanted[best]) <= 0:
            break
        missing.subtract(values[best])
        rest.remove(best)
    return rest
