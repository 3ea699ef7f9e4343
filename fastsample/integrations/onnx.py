"""ONNX programs as networks, run by onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import unknown

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class OnnxNetwork:
    """An ONNX program as ``net(x, t, **conditions)``, for :func:`fastsample.wrap`.

    The first input is the state, the second the time; the others are the conditions, by their names in the program.
    Tensors pass through the host's memory; no gradient passes.
    """

    def __init__(self, model: str | os.PathLike[str] | Any, providers: Sequence[str] | None = None) -> None:
        """
        Args:
            model: an ONNX file, or an ``onnxruntime.InferenceSession``.
            providers: onnxruntime's execution providers; by default all that are available.

        Raises:
            ImportError: onnxruntime is not installed.
            ValueError: the program has fewer than two inputs.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("ONNX programs are run by onnxruntime: pip install onnxruntime") from error
        session: Any = model
        if isinstance(model, (str, os.PathLike)):
            providers = onnxruntime.get_available_providers() if providers is None else providers
            session = onnxruntime.InferenceSession(os.fspath(model), providers=list(providers))
        self._session = session
        inputs = {i.name: i.type for i in self._session.get_inputs()}
        if len(inputs) < 2:
            raise ValueError(
                f"the program has the inputs {list(inputs)}; a network has a state and a time at least"
            )
        self._x, self._t, *self._conditions = inputs
        self._types, self._rank = inputs, {i.name: len(i.shape) for i in self._session.get_inputs()}

    def _given(self, name: str, value: Any) -> np.ndarray:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if name == self._t and self._rank[name] == 0:
            array = array.reshape(-1)[0]
        return np.ascontiguousarray(array, dtype=_DTYPES.get(self._types[name], array.dtype))

    def __call__(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The program's first output for ``x`` (B, ...) and ``t`` (B,), on the device of ``x``."""
        for name in conditions:
            if name not in self._conditions:
                raise unknown("condition", name, self._conditions)
        missing = [name for name in self._conditions if name not in conditions]
        if missing:
            raise ValueError(f"the program needs the conditions {', '.join(missing)}; pass them as keywords")
        feed = {k: self._given(k, v) for k, v in {self._x: x, self._t: t, **conditions}.items()}
        out = torch.from_numpy(self._session.run(None, feed)[0])
        return out.to(x.device, x.dtype)
