"""The torch backend of `opd`: CUDA and CPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from opd.backend import State
from opd.errors import BackendError
from opd.types import ModelOptions

if TYPE_CHECKING:
    from opd_torch.backend import TorchBackend

__all__ = ["load_cpu", "load_cuda", "state_of_cpu", "state_of_cuda"]


def load_cpu(options: ModelOptions) -> TorchBackend:
    """Loads the model on the CPU."""
    return _load(options, "cpu")


def load_cuda(options: ModelOptions) -> TorchBackend:
    """Loads the model on this process's GPU: number `LOCAL_RANK`, which torchrun sets, or 0.

    Raises BackendError without a GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise BackendError(
            "backend 'cuda': torch sees no GPU on this machine; use the backend 'cpu'"
        )
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    torch.cuda.set_device(device)
    return _load(options, device)


def state_of_cpu() -> State:
    """The state of the CPU, which is always available."""
    from opd_torch.device import this_device

    device = this_device("cpu")
    return State(True, device.name, budgets=device.budgets)


def state_of_cuda() -> State:
    """Whether torch sees a GPU, and the name of the first one."""
    import torch

    if not torch.cuda.is_available():
        return State(False, "", "torch sees no CUDA GPU on this machine")
    from opd_torch.device import this_device

    device = this_device("cuda")
    return State(True, device.name, budgets=device.budgets)


def _load(options: ModelOptions, device: str) -> TorchBackend:
    import torch.distributed

    from opd_torch.backend import TorchBackend
    from opd_torch.device import this_device
    from opd_torch.model import check_four_bits, load_model

    # Under torchrun the processes connect here, unless the caller has initialised torch.distributed
    # before.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    record = this_device(device, options.dtype, options.checkpoint_above)
    if options.four_bit:
        check_four_bits(record.torch)
    return TorchBackend(options, load_model(options, record))
