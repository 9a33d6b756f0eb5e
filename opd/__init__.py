"""Vision-OPD: on-policy self-distillation from an evidence crop to the full image, for vision-language models.

This package is the whole method and no kernel: numpy in, numpy out. Backends (`opd_torch`, `opd_mlx`) run it on a device.
"""

from opd.objective import Objective
from opd.types import Box, Completion, Example, Group, Prompt, Sampling, TokenStatistics, Update

__version__ = "0.1.0"

__all__ = ["Box", "Completion", "Example", "Group", "Objective", "Prompt", "Sampling", "TokenStatistics", "Update"]
