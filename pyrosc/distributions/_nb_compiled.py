"""The negative binomial kernel as one compiled pass over memory, in single precision on CPU.

Importing this module imports numba; ``_compiled`` does so when it pays. A tile of one row is worked out at a
time in buffers that stay in the first-level cache, every entry by branch-free formulas that LLVM turns into
vector instructions, exponentials and logarithms included:

1. `_part`: value and gradient of the negative binomial for counts of 0 and 1, with the formulas of
   `pyrosc.distributions._special.nb_nonzero`, in which nothing overflows or cancels;
2. `_other_counts`: what larger (and fractional) counts need besides, one by one in double precision;
3. `_inflate`: the extra zeros.

The polynomials are least-maximum-error fits of this project (weighted for relative error: 3e-9 for ``exp``,
6e-9 for ``log1p``, beyond which single precision rounds).
"""

# Types are inferred when the functions are compiled.
# mypy: disable-error-code="no-untyped-def, call-arg"

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic
from numpy import float32

TILE = 1024
# Parts of the work buffer, each a tile: results, and what `_other_counts` needs from `_part`.
VALUE, GRAD_MEAN, GRAD_DISP, GRAD_ZI, PULL, SHARE, OTHER, DISP = (TILE * k for k in range(8))

# Of fast-math only fused multiply-adds: the order of operations matters below.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
_jit = numba.njit(**_OPTIONS)

ZERO, HALF, ONE, TWO = float32(0), float32(0.5), float32(1), float32(2)
LOW, HIGH = float32(-87), float32(88)  # beyond, exp leaves the normal numbers
LOG2_E = float32(1 / math.log(2))
LN2 = float32(math.log(2))
LN2_HEAD = float32(0.693359375)  # few digits, so that a product with a small integer is exact
LN2_REST = float32(math.log(2) - 0.693359375)
ROUND = float32(1.5 * 2**23)  # adding it leaves an integer in the lowest bits
ROUND_BITS = 0x4B400000 - 127
# exp(r) = 1 + r + r^2 (E0 + E1 r + ...) for |r| <= log(2)/2
E0, E1, E2, E3, E4 = (float32(c) for c in (0.49999994, 0.16666521, 0.041668389, 0.0083687157, 0.0013814602))
# log(1 + f) = f - f^2/2 + f^3 (L0 + L1 f + ...) for sqrt(1/2) <= 1 + f <= sqrt(2)
L0, L1, L2, L3 = (float32(c) for c in (0.33333331, -0.25000823, 0.20001221, -0.16623327))
L4, L5, L6, L7 = (float32(c) for c in (0.14201882, -0.13160631, 0.12760857, -0.076322757))
ROOT_ABOVE, ROOT_BELOW = float32(math.sqrt(2) - 1), float32(math.sqrt(0.5) - 1)
# p - log(1 + r) = -(p^2/2 + p^3/3 + ...), p = r/(1 + r), up to this p by its series
SMALL_SHARE = float32(0.05)
T2, T3, T4, T5, T6 = (float32(1 / k) for k in range(2, 7))

MAX_SMALL_COUNT = float32(16)
MIN_DISP, MAX_DISP = float32(1e-15), float32(1e30)  # within, a product of 16 terms cannot overflow
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@_jit
def _exp(x):
    """Exponential of a float32, cut at the ends of the normal numbers."""
    if x < LOW:
        x = LOW
    if x > HIGH:
        x = HIGH
    rounded = x * LOG2_E + ROUND
    k = rounded - ROUND
    r = (x - k * LN2_HEAD) - k * LN2_REST
    value = ((((E4 * r + E3) * r + E2) * r + E1) * r + E0) * (r * r) + r + ONE
    power = np.int32((np.float32(rounded).view(np.int32) - np.int32(ROUND_BITS)) << np.int32(23))
    return value * np.int32(power).view(np.float32)


@_jit
def _log1p(u):
    """Logarithm of 1 + u for a float32 u in [-1/2, 1]."""
    f, shift = u, ZERO
    if u > ROOT_ABOVE:
        f, shift = HALF * u - HALF, LN2
    if u < ROOT_BELOW:
        f, shift = TWO * u + ONE, -LN2
    rest = ((((((L7 * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
    return shift + (f + f * f * (f * rest - HALF))


@_jit
def _exp_all(source, target):
    for j in range(source.size):
        target[j] = _exp(source[j])


@_jit
def _part(count, log_mean, log_disp, disp, work):
    """Negative binomial part of a tile: right for counts 0 and 1, a start for the others."""
    for j in range(count.size):
        x, theta = count[j], disp[j]
        diff = log_mean[j] - log_disp[j]
        t = _exp(-abs(diff))
        inverse = ONE / (ONE + t)
        log1p_r = _log1p(t)
        p, share = t * inverse, inverse  # mean / (mean + disp), and the complement
        if diff > ZERO:
            p, share = inverse, t * inverse
            log1p_r = log1p_r + diff
        pull = theta * p
        zero = -theta * log1p_r
        bend = pull + zero
        if p < SMALL_SHARE:
            bend = ((((T6 * p + T5) * p + T4) * p + T3) * p + T2) * p * -pull
        value = zero
        if x != ZERO:
            value = x * (log_mean[j] - log1p_r) + zero
            bend = bend + p
        work[VALUE + j] = value
        work[GRAD_MEAN + j] = x * share - pull
        work[GRAD_DISP + j] = bend
        work[PULL + j] = pull
        work[SHARE + j] = share
        work[OTHER + j] = ONE if x != ZERO and x != ONE else ZERO


@_jit
def _other_counts(count, log_mean, log_disp, disp, work, place):
    """Complete the entries of a tile whose count is neither 0 nor 1."""
    found = 0
    for j in range(count.size):
        place[found] = j
        found += int(work[OTHER + j])
    for k in range(found):
        j = place[k]
        x, theta = count[j], disp[j]
        if x > ONE and x <= MAX_SMALL_COUNT and x == np.floor(x) and theta > MIN_DISP and theta < MAX_DISP:
            pull, share, base = np.float64(work[PULL + j]), np.float64(work[SHARE + j]), np.float64(theta)
            inverse, rising, factorial, slope = 1.0 / base, 1.0, 1.0, 0.0
            for i in range(1, np.int64(x)):
                rising *= 1.0 + i * inverse
                factorial *= 1.0 + i
                slope += (pull - share * i) / (base + i)
            work[VALUE + j] += float32(math.log(rising / factorial))
            work[GRAD_DISP + j] += float32(slope)
        else:
            value, grad_mean, grad_disp = _wide(
                np.float64(x), np.float64(log_mean[j]), np.float64(log_disp[j])
            )
            work[VALUE + j] = float32(value)
            work[GRAD_MEAN + j] = float32(grad_mean)
            work[GRAD_DISP + j] = float32(grad_disp)


@_jit
def _wide(count, log_mean, log_disp):
    """Value and gradient by the general formula, in double precision."""
    disp, diff = math.exp(log_disp), log_mean - log_disp
    t = math.exp(-abs(diff))
    log1p_r = max(diff, 0.0) + math.log1p(t)
    p, share = t / (1.0 + t), 1.0 / (1.0 + t)
    if diff > 0.0:
        p, share = share, p
    rising, slope = _log_rising(disp, count)
    value = rising - _log_factorial(count) + count * (diff - log1p_r) - disp * log1p_r
    taken, pull = count * share, disp * p
    return value, taken - pull, disp * (slope - log1p_r) + pull - taken


@_jit
def _log_rising(base, count):
    """``lgamma(base + count) - lgamma(base)`` and its derivative in ``base``.

    By Stirling's series, below 8 after eight steps of the recurrence.
    """
    over, under, over_slope, under_slope = 1.0, 1.0, 0.0, 0.0
    if base < 8.0:
        for i in range(8):
            over_slope = over_slope * (base + count + i) + over
            over *= base + count + i
            under_slope = under_slope * (base + i) + under
            under *= base + i
        base += 8.0
    upper = base + count
    growth = math.log1p(count / base)
    rest, rest_slope = _stirling(1.0 / base)
    upper_rest, upper_slope = _stirling(1.0 / upper)
    value = count * math.log(base) + (upper - 0.5) * growth - count + upper_rest - rest
    slope = growth + upper_slope - rest_slope
    return value - math.log(over / under), slope - (over_slope / over - under_slope / under)


@_jit
def _log_factorial(count):
    """``lgamma(count + 1)``."""
    u, product = count + 1.0, 1.0
    if u < 8.0:
        for i in range(8):
            product *= u + i
        u += 8.0
    return (u - 0.5) * math.log(u) - u + HALF_LOG_2PI + _stirling(1.0 / u)[0] - math.log(product)


@_jit
def _stirling(inv):
    """Log-gamma(u) less (u - 1/2) log(u) - u + log(2 pi)/2, and digamma(u) less log(u), by 1/u, u >= 8."""
    w = inv * inv
    rest = ((((w * (1 / 1188) - 1 / 1680) * w + 1 / 1260) * w - 1 / 360) * w + 1 / 12) * inv
    slope = ((((w * (-1 / 132) + 1 / 240) * w - 1 / 252) * w + 1 / 120) * w - 1 / 12) * w - 0.5 * inv
    return rest, slope


@_jit
def _inflate(count, zi_logits, work):
    """Mix in the extra zeros.

    With l the logits and v the log-mass of a zero: ``log p(0) = log(e^l + e^v) - log(1 + e^l)``, the first
    term ``max(l, v) + log(1 + e^-|l - v|)``, the second alike with v = 0.
    """
    for j in range(count.size):
        x, logits, value = count[j], zi_logits[j], work[VALUE + j]
        margin = logits - value
        s, w = _exp(-abs(logits)), _exp(-abs(margin))
        to_gate, to_own = ONE / (ONE + s), ONE / (ONE + w)
        gate, start = to_gate, ZERO
        if logits < ZERO:
            gate, start = s * to_gate, max(value, logits)
        own, extra = to_own, w * to_own  # whose zero it is: the negative binomial's own, or an extra one
        if margin > ZERO:
            own, extra = w * to_own, to_own
        if x != ZERO:
            own, extra, w, start = ONE, ZERO, ZERO, value - max(logits, ZERO)
        work[VALUE + j] = start + _log1p((w - s) * to_gate)
        work[GRAD_MEAN + j] *= own
        work[GRAD_DISP + j] *= own
        work[GRAD_ZI + j] = extra - gate


@_jit
def _copy(source, target):
    for j in range(target.size):
        target[j] = source[j]


@numba.njit(error_model="numpy", fastmath={"reassoc", "contract"})
def _sum(values):
    total = 0.0
    for j in range(values.size):
        total += np.float64(values[j])
    return total


@intrinsic
def _take(typing, counter):
    """Add one to an integer in memory, at once for all threads, and give back what it was."""

    def generate(context, builder, signature, args):
        one = context.get_constant(numba.types.int64, 1)
        return builder.atomic_rmw("add", args[0], one, "monotonic")

    return numba.types.int64(numba.types.CPointer(numba.types.int64)), generate


@intrinsic
def _pointer(typing, address):
    """The address of single-precision numbers as a pointer."""
    result = numba.types.CPointer(numba.types.float32)

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(numba.types.int64), generate


@_jit
def _vector(address, offset, size):
    """Numbers in memory as an array."""
    return numba.carray(_pointer(address + 4 * offset), size)


# The table of arguments, 64-bit integers: a counter of the shares taken, sizes, whether rows are summed, the
# number of rows after which the counts repeat; how far each input moves on per row (0: all rows share one);
# addresses of inputs and of results, these in the order of the work buffer (0: none).
(TAKEN, ROWS, COLS, SHARE_ROWS, SUMMED, PERIOD, MEAN_STEP, DISP_STEP, ZI_STEP) = range(9)
(COUNT, LOG_MEAN, LOG_DISP, ZI_LOGITS, OUT, TO_MEAN, TO_DISP, TO_ZI, TABLE_SIZE) = range(9, 18)


def _run(pointer):
    """Work through shares of rows until all are taken; any number of threads may do so at once.

    Matrices lie flat, row by row. ``OUT`` has one entry per row where ``SUMMED``.
    """
    table = numba.carray(pointer, TABLE_SIZE)
    rows, cols, share, summed = table[ROWS], table[COLS], table[SHARE_ROWS], table[SUMMED]
    work = np.empty(8 * TILE, np.float32)
    place = np.empty(TILE, np.int32)
    shared_disp = np.empty(0 if table[DISP_STEP] else cols, np.float32)
    if not table[DISP_STEP]:
        _exp_all(_vector(table[LOG_DISP], 0, cols), shared_disp)
    while True:
        start = _take(pointer) * share
        if start >= rows:
            return
        for row in range(start, min(start + share, rows)):
            total = 0.0
            for left in range(0, cols, TILE):
                n = min(TILE, cols - left)
                x = _vector(table[COUNT], (row % table[PERIOD]) * cols + left, n)
                a = _vector(table[LOG_MEAN], row * table[MEAN_STEP] + left, n)
                b = _vector(table[LOG_DISP], row * table[DISP_STEP] + left, n)
                disp = work[DISP : DISP + n]
                if table[DISP_STEP]:
                    _exp_all(b, disp)
                else:
                    disp = shared_disp[left : left + n]
                _part(x, a, b, disp, work)
                _other_counts(x, a, b, disp, work, place)
                if table[ZI_LOGITS]:
                    _inflate(x, _vector(table[ZI_LOGITS], row * table[ZI_STEP] + left, n), work)
                if summed:
                    total += _sum(work[VALUE : VALUE + n])
                for k in range(1 if summed else 0, 4):
                    if table[OUT + k]:
                        _copy(work[k * TILE :], _vector(table[OUT + k], row * cols + left, n))
            if summed:
                _vector(table[OUT], row, 1)[0] = total


def build(run: Any = _run) -> Any:
    """Compile a kernel, or load it from numba's cache on disk; a C function of the table's address."""
    signature = numba.void(numba.types.CPointer(numba.types.int64))
    try:
        return numba.cfunc(signature, cache=True, **_OPTIONS)(run)
    except (RuntimeError, OSError):  # no folder to cache in
        return numba.cfunc(signature, **_OPTIONS)(run)
