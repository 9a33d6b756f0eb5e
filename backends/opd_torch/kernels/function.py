"""torch's `autograd.Function` with types: torch annotates neither `apply` nor the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """Where a forward leaves tensors for its backward. Functions that leave more than tensors
    extend it.
    """

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps inputs or outputs of the forward; the backward reads them in `saved_tensors`."""


class Function(torch.autograd.Function):
    """A forward and its backward; see torch's class."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *inputs: Any) -> Any:
            """Runs the forward, whose outputs it returns."""
