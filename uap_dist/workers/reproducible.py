"""Torch settings that make results repeat bit for bit: for a whole process, or around one task in a user's process."""

import ctypes
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
# cuBLAS is deterministic only with a fixed workspace, and reads this variable when its first handle is created
WORKSPACE, FIXED_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
FULL = "ieee"  # precision: no TF32, no bfloat16
TF32_ON_GPUS = ("tf32",) * 3 + (FULL,) * 3  # see `_places`

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True)
class Settings:
    """Torch settings that affect the bits of results.

    Attributes:
        num_threads: of torch on the CPU.
        is_deterministic: whether deterministic kernels are used.
        warns_only: whether an operation without a deterministic kernel warns instead of raising.
        fills_memory: whether deterministic mode also initialises memory that is never read.
        tries_kernels: whether cuDNN benchmarks its kernels and picks the fastest.
        precisions: of float32 matrix products, convolutions and recurrent layers, on GPUs (cuda, cudnn) and CPUs (mkldnn).
        old_precisions: of matrix products and of cuDNN in torch's older interface; None if it cannot express the current ones.
        workspace: cuBLAS's, an environment variable; None if it is not set.
    """

    num_threads: int
    is_deterministic: bool = True
    warns_only: bool = True  # some networks have layers without a deterministic GPU kernel
    fills_memory: bool = False  # slow, and does not affect results
    tries_kernels: bool = False
    precisions: tuple[str, ...] = (FULL,) * 6
    old_precisions: tuple[str | None, bool | None] = ("highest", False)
    workspace: str | None = FIXED_WORKSPACE

    @classmethod
    def now(cls) -> "Settings":
        """The current settings of this process."""
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
        """Apply the settings to this process."""
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
    """Set up a process that belongs to this package alone: number of CPU threads, deterministic kernels, full precision.

    Freed memory is kept for the next tensors.
    """
    _keep_freed_memory()
    _ours(num_threads, "float32").apply()


@contextmanager
def reproducible(num_threads: int, precision: Precision = "float32") -> Iterator[None]:
    """Within this context results have the bits of a process set up by `set_up_torch`; the old settings are restored afterwards.

    Args:
        num_threads: of torch on the CPU.
        precision: of networks: "float32"; "tf32", in which GPUs multiply with 10 bits of mantissa; or "bfloat16", as torch.autocast
            has it.
    """
    before, ours = Settings.now(), _ours(num_threads, precision)
    ours.apply()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # without its cache of converted weights, which CUDA graphs cannot use
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
            yield
    finally:
        before.apply()


@contextmanager
def noticing_kernels() -> Iterator[set[str]]:
    """Collects the names of operations that torch warns of within this context because they are not deterministic."""
    found: set[str] = set()
    with warnings.catch_warnings(record=True) as heard:
        # "always", because by default Python shows a warning from one place only once
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


def _ours(num_threads: int, precision: Precision) -> Settings:
    workspace = os.environ.get(WORKSPACE, FIXED_WORKSPACE)
    if precision == "tf32":
        return Settings(num_threads, workspace=workspace, precisions=TF32_ON_GPUS, old_precisions=(None, None))
    return Settings(num_threads, workspace=workspace)


def _places() -> tuple[Any, ...]:
    b: Any = torch.backends
    return b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors; page faults would otherwise cost a quarter of a step in batches of 24."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_TOP_PAD, 64 << 20)):
            mallopt(parameter, value)
