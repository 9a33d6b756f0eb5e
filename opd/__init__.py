"""Vision-OPD: on-policy self-distillation from an evidence crop to the full image, for
vision-language models.

The names below are enough for a script or a notebook: `docs/python.md` shows them at work. A name
is imported when it is first used, so `import opd` alone costs nothing and loads no framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from opd.version import __version__ as __version__

if TYPE_CHECKING:
    from opd.api import (
        Gap,
        Model,
        Run,
        measure_gap,
        open_model,
        open_run,
        read_data,
        recipe,
        resume,
        train,
    )
    from opd.backend import Backend
    from opd.errors import OpdError, RunError, UserError
    from opd.measure.gap import Answered
    from opd.objective import Objective
    from opd.progress import Progress, Quiet
    from opd.run.recipe import Recipe
    from opd.types import (
        Box,
        Completion,
        Encoder,
        Example,
        Group,
        Prompt,
        Sampling,
        TokenStatistics,
        Update,
    )
else:
    MODULES = {
        "opd.api": "Gap Model Run measure_gap open_model open_run read_data recipe resume train",
        "opd.backend": "Backend",
        "opd.errors": "OpdError RunError UserError",
        "opd.measure.gap": "Answered",
        "opd.objective": "Objective",
        "opd.progress": "Progress Quiet",
        "opd.run.recipe": "Recipe",
        "opd.types": "Box Completion Encoder Example Group Prompt Sampling TokenStatistics Update",
    }
    """Public names by their module; the imports above say the same to type checkers."""

    def __getattr__(name: str) -> Any:
        """Imports a public name on first use."""
        for module, names in MODULES.items():
            if name in names.split():
                value = globals()[name] = getattr(import_module(module), name)
                return value
        raise AttributeError(f"module 'opd' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Answered",
    "Backend",
    "Box",
    "Completion",
    "Encoder",
    "Example",
    "Gap",
    "Group",
    "Model",
    "Objective",
    "OpdError",
    "Progress",
    "Prompt",
    "Quiet",
    "Recipe",
    "Run",
    "RunError",
    "Sampling",
    "TokenStatistics",
    "Update",
    "UserError",
    "measure_gap",
    "open_model",
    "open_run",
    "read_data",
    "recipe",
    "resume",
    "train",
]
