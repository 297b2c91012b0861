"""The constants of the static model that fit a device's trials best.

Coordinate descent on the mean absolute logarithm of predicted over measured, cut off at 4.5 times: a trial that the
host interrupted, or a cause that the model does not know, is not to bend the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray

from triton_conv.static_model.demand import Demand
from triton_conv.static_model.machine import Machine

from .trial_demands import Counted

Vector = NDArray[np.float64]

# No share of what the hardware does is more than all of it, nor device memory faster than a copy.
_MOST = dict.fromkeys(("issue", "integer", "special", "memory", "l1", "tensor"), 1.0)
# Known without a fit: a kernel that waits for something else would pass for slow tensor cores.
_FIXED = ("clock", "tensor", "ceilings")
_CUT, _STEP, _SHRINK, _FINEST, _ROUNDS = 1.5, 0.25, 0.7, 0.01, 60


def fit(trials: Sequence[Counted], start: Machine) -> Machine:
    """The machine with constants fitted to these trials; those that are known stay."""
    columns = np.array([trial.demand.astuple() for trial in trials]).T
    demands = Demand(*columns)
    times = np.array([trial.time_us for trial in trials]) * 1e-6

    def loss(machine: Machine) -> float:
        error = np.abs(np.log(_predict(machine, demands) / times))
        return float(np.minimum(error, _CUT).mean())

    most = _MOST | {"device": start.ceilings[0]}
    names = [entry.name for entry in fields(Machine) if entry.name not in _FIXED]
    steps = dict.fromkeys(names, _STEP)
    best, found = loss(start), start
    for _ in range(_ROUNDS):
        for name in names:
            for sign in (1, -1):
                value = getattr(found, name) * math.exp(sign * steps[name])
                changed = replace(found, **{name: min(value, most.get(name, math.inf))})
                if (now := loss(changed)) < best - 1e-7:
                    best, found = now, changed
                    break
            else:
                steps[name] *= _SHRINK
        if max(steps.values()) < _FINEST:
            break
    return found


def _predict(machine: Machine, demands: Demand) -> Vector:
    """`Machine.predict` of all trials at once: its terms are sums and quotients, of arrays as of numbers."""
    terms: Vector = np.array(list(machine.seconds(demands).values()))
    result: Vector = machine.launch + (terms**machine.overlap).sum(0) ** (1 / machine.overlap)
    return result
