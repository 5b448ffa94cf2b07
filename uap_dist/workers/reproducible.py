"""Torch's settings under which the same numbers give the same bits: for a process of ours, or around one task in a user's."""

import ctypes
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
# cuBLAS repeats its bits only with a fixed workspace, and reads this when its first handle is made
WORKSPACE, FIXED_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
FULL = "ieee"  # precision: no TF32, no bfloat16


@dataclass(frozen=True)
class Settings:
    """Torch's settings on which bits depend.

    Attributes:
        num_threads: of torch on the CPU.
        is_deterministic: whether kernels that repeat their bits are preferred.
        warns_only: whether a kernel without such a kind warns; else it raises.
        fills_memory: whether deterministic mode initialises memory that nobody reads.
        tries_kernels: whether cuDNN measures which of its kernels is the fastest.
        precisions: of float32 products, convolutions and recurrent layers on GPUs and CPUs.
        old_precisions: of products and of cuDNN as torch's older interface has them; None where a user's mixture has none.
        workspace: of cuBLAS.
    """

    num_threads: int
    is_deterministic: bool = True
    warns_only: bool = True  # some networks have layers without such a kernel on GPUs
    fills_memory: bool = False  # slow, changes nothing
    tries_kernels: bool = False
    precisions: tuple[str, ...] = (FULL,) * 6
    old_precisions: tuple[str | None, bool | None] = ("highest", False)
    workspace: str | None = FIXED_WORKSPACE

    @classmethod
    def now(cls) -> "Settings":
        """Those of this process."""
        product, cudnn = None, None
        with suppress(RuntimeError):
            product = torch.get_float32_matmul_precision()
        with suppress(RuntimeError):
            cudnn = torch.backends.cudnn.allow_tf32
        return cls(
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark,
            tuple(place.fp32_precision for place in _places()),
            (product, cudnn),
            os.environ.get(WORKSPACE),
        )

    def apply(self) -> None:
        """Make them those of this process."""
        torch.set_num_threads(self.num_threads)
        torch.use_deterministic_algorithms(self.is_deterministic, warn_only=self.warns_only)
        torch.utils.deterministic.fill_uninitialized_memory = self.fills_memory  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = self.tries_kernels
        product, cudnn = self.old_precisions
        if product is not None:
            torch.set_float32_matmul_precision(product)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for place, precision in zip(_places(), self.precisions, strict=True):
            place.fp32_precision = precision
        if self.workspace is None:
            os.environ.pop(WORKSPACE, None)
        else:
            os.environ[WORKSPACE] = self.workspace


def set_up_torch(num_threads: int) -> None:
    """Have a process of ours, and nobody else's, use so many CPU threads and kernels that give the same bits each time.

    Freed memory is kept for the next tensors.
    """
    _keep_freed_memory()
    _ours(num_threads).apply()


@contextmanager
def reproducible(num_threads: int) -> Iterator[None]:
    """The same bits as in a process that `set_up_torch` has set up; afterwards torch is as it was."""
    before, ours = Settings.now(), _ours(num_threads)
    ours.apply()
    try:
        yield
    finally:
        before.apply()


@contextmanager
def noticing_kernels() -> Iterator[set[str]]:
    """Names of the kernels that torch, meanwhile, warned of because they do not repeat their bits."""
    found: set[str] = set()
    with warnings.catch_warnings(record=True) as heard:
        # each time, because Python shows a warning of one place only once
        warnings.filterwarnings(
            "always", message=".*(does not have a deterministic implementation|is not deterministic)"
        )
        yield found
    for warning in heard:
        text = str(warning.message)
        name = re.match(r"(\S+) does not have a deterministic implementation", text)
        if name or "is not deterministic because it uses CuBLAS" in text:
            found.add(name[1] if name else "cuBLAS")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _ours(num_threads: int) -> Settings:
    return Settings(num_threads, workspace=os.environ.get(WORKSPACE, FIXED_WORKSPACE))


def _places() -> tuple[Any, ...]:
    b: Any = torch.backends
    return b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn


def _keep_freed_memory() -> None:
    """Have glibc keep freed tensors instead of returning their pages, whose faults cost a quarter of a step in batches of 24."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_TOP_PAD, 64 << 20)):
            mallopt(parameter, value)
