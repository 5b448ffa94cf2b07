"""Keeping a GPU busy: CUDA graphs, which launch the many small kernels of a step at once, and copies that nothing waits for."""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

NUM_WARM_UPS = 3  # torch's advice: libraries set themselves up in the first calls

Function = Callable[..., tuple[Tensor, ...]]

logger = logging.getLogger(__name__)


class Caller(Protocol):
    """Calls a pure function of tensors, as `plainly` or `Graphs.call`."""

    def __call__(self, function: Function, tensors: Sequence[Tensor], *constants: Hashable) -> tuple[Tensor, ...]:
        """`function(*tensors, *constants)`."""
        ...


def plainly(function: Function, tensors: Sequence[Tensor], *constants: Hashable) -> tuple[Tensor, ...]:
    """`function(*tensors, *constants)`."""
    return function(*tensors, *constants)


class Graphs:
    """Calls pure functions of tensors: on a GPU by replaying a CUDA graph for each function and combination of shapes.

    The kernels and so the bits are those of plain calls. A function that cannot be captured is called plainly, and that is logged.
    """

    def __init__(self) -> None:
        self._captured: dict[Hashable, _Graph | None] = {}

    def forget(self) -> None:
        """Drop all graphs."""
        self._captured.clear()

    def call(self, function: Function, tensors: Sequence[Tensor], *constants: Hashable) -> tuple[Tensor, ...]:
        """`function(*tensors, *constants)`.

        Args:
            function: of a module, without side effects, which reads no value of a tensor on the CPU.
            tensors: may hold other values in each call.
            constants: are the same objects whenever they are equal. Tensors within them are read where they are.
        """
        if not tensors[0].is_cuda:
            return function(*tensors, *constants)
        key = (function, constants, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
        if key not in self._captured:
            self._captured[key] = _capture(function, tensors, constants)
        graph = self._captured[key]
        return function(*tensors, *constants) if graph is None else graph.replay(tensors)


class _Graph:
    """A captured call with the memory that it reads and writes."""

    def __init__(self, function: Function, tensors: Sequence[Tensor], constants: Sequence[Hashable]) -> None:
        self._inputs = [tensor.clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(NUM_WARM_UPS):
                function(*self._inputs, *constants)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs, *constants)

    def replay(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)  # the next replay overwrites them


def _capture(function: Function, tensors: Sequence[Tensor], constants: Sequence[Hashable]) -> _Graph | None:
    try:
        return _Graph(function, tensors, constants)
    except Exception as error:  # a network may do what a capture forbids
        logger.warning("%s runs without CUDA graphs: %s", function.__name__, str(error).partition("\n")[0])
        return None


class Numbers:
    """Values of a tensor on their way to the CPU. Asking for them waits for the tensor, but for nothing that the GPU does later."""

    def __init__(self, tensor: Tensor) -> None:
        self._values, self._event = tensor, None
        if tensor.is_cuda:
            self._values = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def tolist(self) -> list[list[float]]:
        """As Tensor.tolist."""
        if self._event is not None:
            self._event.synchronize()
        values: list[list[float]] = self._values.tolist()
        return values


def send(values: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device, without waiting for what a GPU is doing."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
