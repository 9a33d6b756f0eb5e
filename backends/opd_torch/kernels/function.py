"""torch's `autograd.Function` with types: torch annotates neither `apply` nor the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """Carries tensors from a forward to its backward. A function that needs more than tensors
    extends this protocol.
    """

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Saves inputs or outputs of the forward; the backward reads them in `saved_tensors`."""


class Function(torch.autograd.Function):
    """`torch.autograd.Function`: a forward and its backward."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *inputs: Any) -> Any:
            """Runs the forward and returns its outputs."""
