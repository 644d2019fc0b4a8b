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

# Parts of the work buffer, each a tile of results.
VALUE, GRAD_LOGITS, GRAD_SCALE = (TILE * k for k in range(3))
BLOCK = 8  # marks in a word: where none is set, all are passed over at once


@_jit
def _part(x, logits, log_scale, depth, work, mark):
    """Value and slopes of a tile, right at zeros where p <= 1/2."""
    for j in range(x.size):
        a = logits[j]
        scale = log_scale[j] + depth
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
        mark[j] = np.int8(1) if p > HALF or x[j] != ZERO else np.int8(0)


@_jit
def _others(x, logits, log_scale, depth, work, mark, place):
    """Complete the successes of a tile, which are few, and the zeros where p > 1/2."""
    found, end = 0, -(-x.size // BLOCK)
    mark[x.size : end * BLOCK] = 0
    words = mark.view(np.int64)
    for word in range(end):
        if words[word] == 0:
            continue
        for j in range(word * BLOCK, word * BLOCK + BLOCK):
            place[found] = j
            found += mark[j]
    for k in range(found):
        j = place[k]
        if x[j] != ZERO:
            a = logits[j]
            t = _exp(-abs(a))
            work[VALUE + j] = min(log_scale[j] + depth, ZERO) + min(a, ZERO) - _log1p(t)
            work[GRAD_SCALE + j] = ONE
            work[GRAD_LOGITS + j] = (t if a > ZERO else ONE) / (ONE + t)
            continue
        scale = min(np.float64(log_scale[j]) + np.float64(depth), 0.0)
        e = math.exp(min(-np.float64(logits[j]), 80.0))
        gap = max(e - math.expm1(scale), 1e-30)  # (1 - p)(1 + e)
        slope = -math.exp(scale) / gap
        work[VALUE + j] = float32(math.log(gap) - math.log1p(e))
        work[GRAD_SCALE + j] = float32(slope)
        work[GRAD_LOGITS + j] = float32(slope * e / (1.0 + e))


# The table of arguments, as `_nb_compiled` has them.
(TAKEN, ROWS, COLS, SHARE_ROWS, SUMMED, PERIOD, LOGITS_STEP, SCALE_STEP, DEPTH_STEP) = range(9)
(COUNT, LOGITS, LOG_SCALE, LOG_DEPTH, OUT, TO_LOGITS, TO_SCALE, TO_DEPTH, TABLE_SIZE) = range(9, 18)


def _run(pointer):
    """Work through shares of rows until all are taken; any number of threads may do so at once."""
    table = numba.carray(pointer, TABLE_SIZE)
    rows, cols, share, summed = table[ROWS], table[COLS], table[SHARE_ROWS], table[SUMMED]
    work = np.empty(3 * TILE, np.float32)
    mark, place = np.empty(TILE, np.int8), np.empty(TILE, np.int32)
    while True:
        start = _take(pointer) * share
        if start >= rows:
            return
        for row in range(start, min(start + share, rows)):
            total = slopes = 0.0
            depth = ZERO
            if table[LOG_DEPTH]:
                depth = _vector(table[LOG_DEPTH], row * table[DEPTH_STEP], 1)[0]
            for left in range(0, cols, TILE):
                n = min(TILE, cols - left)
                x = _vector(table[COUNT], (row % table[PERIOD]) * cols + left, n)
                a = _vector(table[LOGITS], row * table[LOGITS_STEP] + left, n)
                s = _vector(table[LOG_SCALE], row * table[SCALE_STEP] + left, n)
                _part(x, a, s, depth, work, mark)
                _others(x, a, s, depth, work, mark, place)
                if summed:
                    total += _sum(work[VALUE : VALUE + n])
                if table[TO_DEPTH]:
                    slopes += _sum(work[GRAD_SCALE : GRAD_SCALE + n])
                for k in range(1 if summed else 0, 3):
                    if table[OUT + k]:
                        _copy(work[k * TILE :], _vector(table[OUT + k], row * cols + left, n))
            if summed:
                _vector(table[OUT], row, 1)[0] = total
            if table[TO_DEPTH]:
                _vector(table[TO_DEPTH], row, 1)[0] = slopes
