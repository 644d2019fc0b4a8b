"""When and how the compiled kernels run, of the negative binomial and of the scaled Bernoulli law.

They are for large matrices in single precision on CPU, several times faster there than one tensor operation
after another. numba is imported, and a kernel compiled or loaded from numba's cache, when the first such
matrix comes.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._layout import Layout

# Entries of a matrix from which the kernel is worth the loading; smaller ones never import numba.
MIN_SIZE = 2**16
# Entries that a thread takes at a time.
SHARE = 2**14
MAX_OWN_THREADS = 8
# Parameters that the kernel of a law takes, of which the last may be missing: log mean, log dispersion and
# logits of zero inflation; logits, log scale and one more for each row. The module of a kernel is
# `_LAW_compiled`.
PARAMETERS = {"nb": 3, "scaled_bernoulli": 3}


def suits(value: Tensor, views: list[Tensor], layout: Layout, law: str = "nb") -> bool:
    """Whether to run the compiled kernel on these arguments. It depends on nothing but them."""
    if layout.rows * layout.cols < max(MIN_SIZE, 1) or value.device.type != "cpu":
        return False
    if any(view.dtype != torch.float32 or view.device.type != "cpu" for view in views):
        return False
    return _kernel(law) is not None


def evaluate(
    value: Tensor, views: list[Tensor], layout: Layout, needs: Sequence[bool], law: str = "nb"
) -> tuple[Tensor, list[Tensor | None]]:
    """Value, and of the entry-wise gradients in the law's parameters those needed.

    Rows are worked out independently of each other, so results do not depend on the number of threads.
    """
    rows, cols = layout.rows, layout.cols
    count, period = _counts(value, layout)
    inputs = [view.detach().contiguous() for view in views]
    out = inputs[0].new_empty(rows if layout.event_ndims else (rows, cols))
    widths = [cols if view.dim() == 1 else view.shape[1] for view in inputs]
    grads = [out.new_empty(rows, k) if need else None for need, k in zip(needs, widths, strict=True)]
    missing: list[Tensor | None] = [None] * (PARAMETERS[law] - len(inputs))
    steps = [0 if arg is None or arg.dim() == 1 else arg.shape[1] for arg in (*inputs, *missing)]
    share = max(1, SHARE // cols)
    sizes = [0, rows, cols, share, int(layout.event_ndims > 0), period, *steps]
    tensors = [count, *inputs, *missing, out, *grads, *missing]
    _run(_kernel(law), sizes, tensors, -(-rows // share))
    return out, grads


def _counts(value: Tensor, layout: Layout) -> tuple[Tensor, int]:
    """Counts row by row, and the number of rows after which they repeat (several particles)."""
    value = value.detach().to(torch.float32)
    lead = len(layout.shape) - value.dim()
    if value.shape == layout.shape[lead:] and value.numel() % layout.cols == 0:
        return value.contiguous(), value.numel() // layout.cols
    return value.expand(layout.shape).contiguous(), layout.rows


@cache
def _kernel(law: str) -> Any:
    """The compiled function of a law; None where numba is missing, broken, or told not to compile."""
    try:
        import numba

        from ._nb_compiled import build

        if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
            return None
        return build(import_module(f"._{law}_compiled", __package__)._run)
    except Exception as error:  # the other way gives the same results
        warnings.warn(
            f"likelihoods of counts run several times slower than they could: {error!r}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _run(kernel: Any, sizes: list[int], tensors: list[Tensor | None], shares: int) -> None:
    """Call the kernel in as many threads as torch uses; each takes shares of the rows until none is left."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    table = np.array([*sizes, *addresses], np.int64)
    threads, parallel = min(torch.get_num_threads(), shares), _parallel()

    def work(*held: Any) -> None:
        kernel.ctypes(ctypes.cast(table.ctypes.data, ctypes.POINTER(ctypes.c_int64)))

    if threads == 1:
        work()
    elif parallel is not None:
        parallel(kernel.address, table.ctypes.data, threads, 0)
    else:
        # A thread holds the tensors, in case an interrupt ends this function first.
        helpers = [
            threading.Thread(target=work, args=tuple(tensors), daemon=True)
            for _ in range(min(threads, MAX_OWN_THREADS) - 1)
        ]
        for helper in helpers:
            helper.start()
        work()
        for helper in helpers:
            helper.join()


@cache
def _parallel() -> Any:
    """The OpenMP runtime's way to call a function in all of its threads, or None where there is none.

    Torch's threads keep their cores busy for a while after each operation, waiting for the next one. Threads
    of our own would have to share the cores with them, and take twice as long.
    """
    try:
        runtime = ctypes.CDLL(None)
        parallel = runtime.GOMP_parallel  # (function, argument, threads, flags)
        same = runtime.omp_get_max_threads() == torch.get_num_threads()
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel if same else None
