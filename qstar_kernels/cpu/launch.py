"""q* on a CPU: the compiled rows of rows.c (theory/computation.md, «On a CPU»).

Rows are shared out over `torch.get_num_threads()` threads of our own: nothing spins at a barrier, and the bits of a row
depend on nothing but the row.
"""

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType

import torch
from torch import Tensor

from qstar_kernels.types import FIELDS, LARGEST_LOGIT, METHODS, PER_ROW, QStarStep, Settings, mask_of, output_dtype

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
KINDS = {str: ctypes.c_int64, float: ctypes.c_double, int: ctypes.c_int64}  # a method is its place in `METHODS`
OF_ROWS, NUMBERS = ctypes.c_void_p * len(PER_ROW), ctypes.c_double * len(PER_ROW)
BOUNDS = NUMBERS(*(x.least for x in PER_ROW.values())), NUMBERS(*(x.most for x in PER_ROW.values()))
MIN_SHARE = 1 << 17  # logits of one side that are worth a thread


class Job(ctypes.Structure):
    """The struct of the same name in rows.c."""

    _fields_ = (
        ("logits", ctypes.c_void_p * 2),
        ("row_stride", ctypes.c_int64 * 2),
        ("stride", ctypes.c_int64 * 2),
        ("dtype", ctypes.c_int64 * 2),
        ("vocab_size", ctypes.c_int64),
        ("what", ctypes.c_int64),
        ("log_q_is_double", ctypes.c_int64),
        ("mask", ctypes.c_double * 2),
        ("largest_logit", ctypes.c_double),
        *((f.name, KINDS[f.type]) for f in fields(Settings)),
        ("of_rows", OF_ROWS),
        ("least", NUMBERS),
        ("most", NUMBERS),
        ("seeds", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("status", ctypes.c_void_p),
        ("drawn", ctypes.c_void_p),
        ("log_q", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled rows.c, None where it was not built."""
    spec = find_spec("qstar_kernels.cpu._rows")
    return None if spec is None else ctypes.CDLL(spec.origin)


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="qstar")


def qstar_cpu(
    logits_theta: Tensor,
    logits_t: Tensor,
    settings: Settings,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    want_log_q: bool = False,
    per_row: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[QStarStep, Tensor | None]:
    """`qstar_kernels.reference.qstar_reference` on a CPU, fast; the same arguments and results.

    Fields and log q are float64 for float64 logits, float32 otherwise; all sums are float64.

    Raises:
        ValueError: the logits are not on a CPU, or of another type than float16, bfloat16, float32 or float64.
        RuntimeError: rows.c was not built.
        MemoryError: no memory for one row in float64, which truncation takes.
    """
    compiled = library()
    if compiled is None:
        raise RuntimeError("qstar_kernels was installed without its CPU kernel; install a C compiler, then it again")
    sides = logits_theta.detach(), logits_t.detach()
    if sides[0].device.type != "cpu" or any(side.dtype not in DTYPES for side in sides):
        types = " and ".join(f"{side.dtype} on {side.device}" for side in sides)
        raise ValueError(f"the logits are {types}; impl='cpu' takes {', '.join(map(str, DTYPES))} on a CPU")
    batch, vocab_size = sides[0].shape
    dtype = output_dtype(*sides)
    # beside the logits, whatever torch's default device is: their addresses are all that the C code gets
    numbers = torch.empty(len(FIELDS), batch, dtype=torch.float64, device="cpu")
    status = torch.empty(batch, dtype=torch.int64, device="cpu")
    log_q = torch.empty(batch, vocab_size, dtype=dtype, device="cpu") if want_log_q else None
    drawn = None if seeds is None else torch.empty(batch, dtype=torch.int64, device="cpu")
    # held until the call returns
    index = [None if x is None else x.contiguous() for x in (seeds, positions, tokens)]
    of_rows = {name: x.detach().double().contiguous() for name, x in per_row.items()}
    addresses = [of_rows[name].data_ptr() if name in of_rows else None for name in PER_ROW] if of_rows else ()
    job = Job(
        (ctypes.c_void_p * 2)(*(side.data_ptr() for side in sides)),
        (ctypes.c_int64 * 2)(*(side.stride(0) for side in sides)),
        (ctypes.c_int64 * 2)(*(side.stride(1) for side in sides)),
        (ctypes.c_int64 * 2)(*(DTYPES[side.dtype] for side in sides)),
        vocab_size,
        1 if seeds is not None else 2 if tokens is not None else 0,
        dtype == torch.float64,
        (ctypes.c_double * 2)(*(mask_of(side.dtype) for side in sides)),
        LARGEST_LOGIT,
        METHODS.index(settings.method),
        *settings.values()[1:],
        OF_ROWS(*addresses),
        *BOUNDS,
        *(None if x is None else x.data_ptr() for x in index),
        numbers.data_ptr(),
        batch,
        status.data_ptr(),
        None if drawn is None else drawn.data_ptr(),
        None if log_q is None else log_q.data_ptr(),
    )

    def rows(first: int, last: int) -> int:
        return compiled.qstar_rows(ctypes.byref(job), ctypes.c_int64(first), ctypes.c_int64(last))

    threads = min(torch.get_num_threads(), batch, batch * vocab_size // MIN_SHARE)
    if threads > 1:
        bounds = [batch * i // threads for i in range(threads + 1)]
        short = any(list(pool(threads).map(rows, bounds[:-1], bounds[1:])))
    else:
        short = rows(0, batch)
    if short:
        raise MemoryError(f"no memory for a row of {vocab_size} numbers")
    return QStarStep.of(numbers.to(dtype).unbind(), status, tokens if drawn is None else drawn), log_q
