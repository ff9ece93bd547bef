"""Products with one to four tokens in C, on the CPU: each weight is read from memory once, and nothing else takes time.

A token at a time a layer takes as long as its weights take from memory. kernels.c reads them in several streams, in
float32 or bfloat16, and computes in float32. It is compiled on first use (build.py) and shares the threads that
torch has. Where it cannot be built everything works without: `is_available` is False and `why_not` says why. The
environment variable KRONPRESS_NATIVE turns it off (0) or names the instruction set (avx512, avx2, portable).

None of this is differentiable, or seen by a compiler: `takes` is False while torch.compile or torch.export traces.

Letters as in matrices/kronecker.py; t tokens.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kronpress.errors import RequestError, WorkError
from kronpress.native import build

MOST_TOKENS = 4
MOST_VECTORS = 16  # with more, and several tokens, arithmetic takes longer than memory
PLAIN = (Tensor, nn.Parameter)  # subclasses may stand for something without memory of its own
OFF = ("0", "off", "no", "false")


class Loaded(NamedTuple):
    """The library and its instruction set, or the reason why there is none."""

    library: ctypes.CDLL | None
    instruction_set: str
    reason: str | None


@cache
def loaded() -> Loaded:
    """Builds the library if need be, loads it, and tries it."""
    asked = os.environ.get("KRONPRESS_NATIVE", "").lower()
    if asked in OFF:
        return Loaded(None, "portable", f"KRONPRESS_NATIVE is {asked}")
    here = build.instruction_sets()
    if asked not in ("", "1", *here):
        allowed = ", ".join(("0", "1", *here))
        return Loaded(None, "portable", f"KRONPRESS_NATIVE is {asked}, which is not one of this machine's: {allowed}")
    instruction_set = asked if asked in here else here[0]
    try:
        library = build.load(instruction_set)
    except WorkError as error:
        return Loaded(None, "portable", str(error))
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.kronecker.argtypes = [ctypes.c_int, ctypes.c_int, *[pointer] * 5, *[size] * 7]
    library.linear.argtypes = [ctypes.c_int, *[pointer] * 4, *[size] * 4]
    library.low_rank.argtypes = [ctypes.c_int, *[pointer] * 5, *[size] * 5]
    if not gives_known_results(library):
        return Loaded(None, "portable", "the native routines, as this compiler built them, give wrong results")
    return Loaded(library, instruction_set, None)


def gives_known_results(library: ctypes.CDLL) -> bool:
    """One product of small integers, which float32 holds exactly."""
    weight = torch.arange(5 * 70, dtype=torch.float32).remainder(7).reshape(5, 70)
    x = torch.arange(70, dtype=torch.float32).remainder(5)
    y = torch.empty(5)
    pointers = (weight.data_ptr(), x.data_ptr(), None, y.data_ptr())
    return library.linear(0, *pointers, 1, 5, 70, 1) == 0 and torch.equal(y, (weight * x).sum(1))


def is_available() -> bool:
    """Whether there are native routines; the first call builds them."""
    return loaded().library is not None


def why_not() -> str | None:
    """One sentence, or None if they are available."""
    return loaded().reason


def instruction_set() -> str:
    """`avx512`, `avx2` or `portable`."""
    return loaded().instruction_set


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether the routines can take this product: one to four tokens x (..., n), float32 or bfloat16, on the CPU.

    `weights` are the factors and the bias, of the same dtype and contiguous. Whether a gradient is wanted, the caller
    knows. The first call builds the routines.
    """
    if torch.compiler.is_compiling() or loaded().library is None:
        return False
    dtype, width = x.dtype, x.shape[-1] if x.ndim else 0
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        return False
    if not (x.is_cpu and type(x) in PLAIN and 0 < x.numel() <= MOST_TOKENS * width):
        return False
    for weight in weights:
        if not (weight.dtype is dtype and weight.is_cpu and type(weight) in PLAIN and weight.is_contiguous()):
            return False
    # Under autocast the product would have another dtype, and within torch.func x may be a batch of x.
    return not torch.is_autocast_enabled("cpu") and torch._C._functorch.peek_interpreter_stack() is None


def pays(left: Tensor, right: Tensor, x: Tensor) -> bool:
    """Whether `kronecker` is the faster one of itself and the same product in torch, as measured.

    It is made for reading the larger factor once. Where there are so many vectors that arithmetic takes longer than
    memory, torch's matrix products are as fast or faster; for one token only where they need not transpose, with A the
    smaller one.
    """
    is_left_small = left.numel() < right.numel()
    rows, _, columns = (left if is_left_small else right).shape
    tokens = x.numel() // x.shape[-1]
    return (tokens == 1 and not is_left_small) or tokens * min(rows, columns) <= MOST_VECTORS


def kronecker(left: Tensor, right: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[t, p, q] = Σ_iab A_i[p, a] B_i[q, b] x[t, a, b] + bias[p, q], (..., n1 n2) to (..., m1 m2).

    Either factor may be the large one. With a small A it is the fastest: x and y stay as they are in memory.

    Args:
        left: A, (m1, k, n1).
        right: B, (m2, k, n2).
        x: (..., n1 n2), of any number of tokens.
        bias: (m1 m2,).

    Raises:
        RequestError: sizes or dtypes that do not belong together, or a factor that is not contiguous.
        WorkError: there are no native routines, or there is no memory.
    """
    (m1, k, n1), (m2, terms, n2) = left.shape, right.shape
    if terms != k:
        raise RequestError(f"left has {k} terms and right {terms}: both must have as many")
    x, y = _input_and_output(x, n1 * n2, m1 * m2, bias, left, right)
    is_left_small = left.numel() < right.numel()
    if is_left_small:
        left, right, (m1, n1), (m2, n2) = right, left, (m2, n2), (m1, n1)
    _done(
        _library().kronecker(
            left.dtype is torch.bfloat16,
            is_left_small,
            left.data_ptr(),
            right.data_ptr(),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.numel() // (n1 * n2),
            m1,
            k,
            n1,
            m2,
            n2,
            torch.get_num_threads(),
        )
    )
    return y


def linear(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias with W (m, n): (..., n) to (..., m).

    Raises:
        RequestError: sizes or dtypes that do not belong together, or a weight that is not contiguous.
        WorkError: there are no native routines, or there is no memory.
    """
    m, n = weight.shape
    x, y = _input_and_output(x, n, m, bias, weight, weight)
    _done(
        _library().linear(
            weight.dtype is torch.bfloat16,
            weight.data_ptr(),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.numel() // n,
            m,
            n,
            torch.get_num_threads(),
        )
    )
    return y


def low_rank(left: Tensor, right: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Vᵀ Uᵀ + bias with U (m, rank) or (m, rank, 1) and V (rank, n): (..., n) to (..., m).

    What is between the two stays in float32.

    Raises:
        RequestError: sizes or dtypes that do not belong together, or a factor that is not contiguous.
        WorkError: there are no native routines, or there is no memory.
    """
    m, rank = left.shape[:2]
    n = right.shape[1]
    if right.shape[0] != rank or left.numel() != m * rank:
        raise RequestError(f"factors {tuple(left.shape)} and {tuple(right.shape)}: the rank of both must be one")
    x, y = _input_and_output(x, n, m, bias, left, right)
    _done(
        _library().low_rank(
            left.dtype is torch.bfloat16,
            left.data_ptr(),
            right.data_ptr(),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.numel() // n,
            m,
            rank,
            n,
            torch.get_num_threads(),
        )
    )
    return y


def _library() -> ctypes.CDLL:
    found = loaded()
    if found.library is None:
        raise WorkError(f"there are no native routines: {found.reason}")
    return found.library


def _input_and_output(
    x: Tensor, n: int, m: int, bias: Tensor | None, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """x contiguous and an empty y; all that would let C read beyond a tensor is refused."""
    dtype, shape = x.dtype, x.shape
    if (
        shape[-1] != n
        or not (dtype is torch.float32 or dtype is torch.bfloat16)
        or not (left.dtype is dtype and right.dtype is dtype)
        or not (x.is_cpu and left.is_cpu and right.is_cpu)
        or not (left.is_contiguous() and right.is_contiguous())
        or (
            bias is not None
            and not (bias.numel() == m and bias.dtype is dtype and bias.is_cpu and bias.is_contiguous())
        )
    ):
        tensors = (x, left, right) if bias is None else (x, left, right, bias)
        given = ", ".join(f"{tuple(t.shape)} {t.dtype} {t.device} strides {t.stride()}" for t in tensors)
        raise RequestError(
            f"x, factors and bias are {given}; a native {m}×{n} product takes x (..., {n}) and a bias ({m},), "
            "all float32 or all bfloat16, on the CPU, the factors and the bias contiguous"
        )
    return x.contiguous(), x.new_empty((*shape[:-1], m))


def _done(status: int) -> None:
    if status:
        raise WorkError("no memory for a native product")
