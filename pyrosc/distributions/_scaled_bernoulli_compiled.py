"""The scaled Bernoulli kernel as one compiled pass over memory, in single precision on CPU.

As `_nb_compiled`, whose formulas for exponentials and logarithms it takes: branch-free over a tile, then the
few entries in which 1 - p is small, one by one in double precision.
"""

# Types are inferred when the functions are compiled.
# mypy: disable-error-code="no-untyped-def, call-arg"

from __future__ import annotations

import math

import numba
import numpy as np
from numpy import float32

from ._nb_compiled import HALF, ONE, TILE, ZERO, _copy, _exp, _jit, _log1p, _sum, _take, _vector

# Parts of the work buffer, each a tile: results, and which entries need more.
VALUE, GRAD_LOGITS, GRAD_SCALE, OTHER = (TILE * k for k in range(4))


@_jit
def _part(x, logits, log_scale, work):
    """Value and slopes of a tile, right at zeros where p <= 1/2."""
    for j in range(x.size):
        a = logits[j]
        scale = log_scale[j]
        if scale > ZERO:
            scale = ZERO
        t = _exp(-abs(a))
        inverse = ONE / (ONE + t)
        q, miss = t * inverse, inverse  # sigmoid(a), and the complement
        if a > ZERO:
            q, miss = inverse, t * inverse
        p = q * _exp(scale)
        small = p
        if p > HALF:
            small = HALF
        slope = -small / (ONE - small)
        work[VALUE + j] = _log1p(-small)
        work[GRAD_LOGITS + j] = slope * miss
        work[GRAD_SCALE + j] = slope
        work[OTHER + j] = ONE if p > HALF or x[j] != ZERO else ZERO


@_jit
def _others(x, logits, log_scale, work, place):
    """Complete the successes of a tile, which are few, and the zeros where p > 1/2."""
    found = 0
    for j in range(x.size):
        place[found] = j
        found += int(work[OTHER + j])
    for k in range(found):
        j = place[k]
        scale = min(np.float64(log_scale[j]), 0.0)
        if x[j] != ZERO:
            a = np.float64(logits[j])
            t = math.exp(-abs(a))
            work[VALUE + j] = float32(scale + min(a, 0.0) - math.log1p(t))
            work[GRAD_SCALE + j] = ONE
            work[GRAD_LOGITS + j] = float32((t if a > 0.0 else 1.0) / (1.0 + t))
            continue
        e = math.exp(min(-np.float64(logits[j]), 80.0))
        gap = max(e - math.expm1(scale), 1e-30)  # (1 - p)(1 + e)
        slope = -math.exp(scale) / gap
        work[VALUE + j] = float32(math.log(gap) - math.log1p(e))
        work[GRAD_SCALE + j] = float32(slope)
        work[GRAD_LOGITS + j] = float32(slope * e / (1.0 + e))


# The table of arguments, as `_nb_compiled` has them.
(TAKEN, ROWS, COLS, SHARE_ROWS, SUMMED, PERIOD, LOGITS_STEP, SCALE_STEP) = range(8)
(COUNT, LOGITS, LOG_SCALE, OUT, TO_LOGITS, TO_SCALE, TABLE_SIZE) = range(8, 15)


def _run(pointer):
    """Work through shares of rows until all are taken; any number of threads may do so at once."""
    table = numba.carray(pointer, TABLE_SIZE)
    rows, cols, share, summed = table[ROWS], table[COLS], table[SHARE_ROWS], table[SUMMED]
    work = np.empty(4 * TILE, np.float32)
    place = np.empty(TILE, np.int32)
    while True:
        start = _take(pointer) * share
        if start >= rows:
            return
        for row in range(start, min(start + share, rows)):
            total = 0.0
            for left in range(0, cols, TILE):
                n = min(TILE, cols - left)
                x = _vector(table[COUNT], (row % table[PERIOD]) * cols + left, n)
                a = _vector(table[LOGITS], row * table[LOGITS_STEP] + left, n)
                s = _vector(table[LOG_SCALE], row * table[SCALE_STEP] + left, n)
                _part(x, a, s, work)
                _others(x, a, s, work, place)
                if summed:
                    total += _sum(work[VALUE : VALUE + n])
                for k in range(1 if summed else 0, 3):
                    if table[OUT + k]:
                        _copy(work[k * TILE :], _vector(table[OUT + k], row * cols + left, n))
            if summed:
                _vector(table[OUT], row, 1)[0] = total
