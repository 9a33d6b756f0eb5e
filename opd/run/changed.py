"""Changes that a person makes on purpose when a run is resumed."""

from __future__ import annotations

import os
from dataclasses import dataclass

from opd.data import may_exist
from opd.errors import DataError, FolderError, ModelError, plural
from opd.method.schedules import learning_rate
from opd.models import hub
from opd.run.folder import RunFolder
from opd.run.recipe import Recipe, validate


@dataclass(frozen=True)
class Changed:
    """Changes to a run that is resumed; None leaves the run's own value.

    `data`, `measured`, `model`: the new places of the run's inputs. `steps`: the new number of
    steps. `accept`: inputs may differ from those that the run began with.
    """

    data: str | None = None
    measured: str | None = None
    model: str | None = None
    steps: int | None = None
    accept: bool = False

    def applied(self, recipe: Recipe, folder: RunFolder) -> tuple[Recipe, list[str]]:
        """The recipe with the changes, and a line for each change of the run that a person should
        know. Raises UserError."""
        values = recipe.model_dump()
        places = {"data": self.data, "measure": self.measured, "model": self.model}
        for section, path in places.items():
            if path is not None:
                values[section]["path"] = path
        if self.model is not None:
            values["model"]["revision"] = ""
        lines = []
        if self.steps is not None and self.steps != recipe.run.steps:
            values["run"]["steps"] = self.steps
            lines = [self._extension(recipe, folder)]
        changed = validate(values, str(folder.path))
        self._check_places(changed, folder)
        return changed, lines

    def _extension(self, recipe: Recipe, folder: RunFolder) -> str:
        """A line that says what the new number of steps changes. Raises FolderError if the run has
        already done more."""
        steps, before = self.steps or 0, recipe.run.steps
        done = max([step for step, _ in folder.checkpoints()], default=0)
        if steps < done:
            raise FolderError(
                f"run '{folder.path}' has done {plural(done, 'step')}: --steps {steps} would be"
                f" fewer; give {done} or more"
            )
        line = f"run.steps is {steps} from now on, not {before}"
        if recipe.optimizer.schedule == "constant" or done <= recipe.optimizer.warmup_steps:
            return line
        then = learning_rate(recipe.optimizer, done, before)
        now = learning_rate(recipe.optimizer, min(done + 1, steps), steps)
        return (
            f"{line}: optimizer.schedule = {recipe.optimizer.schedule} ends there too, so the"
            f" learning rate, {then:.2g} at step {done}, goes on at {now:.2g}, and the result is"
            f" not that of a run begun with {plural(steps, 'step')}"
        )

    def _check_places(self, recipe: Recipe, folder: RunFolder) -> None:
        """Raises UserError if an input of the run is not where it was, and no new place is
        given."""
        for path, given, option in (
            (recipe.data.path, self.data, "--data FILE"),
            (recipe.measure.path, self.measured, "--set measure.path=FILE"),
        ):
            if path not in ("", "tiny") and given is None and not may_exist(path):
                raise DataError(
                    f"data file not found: {path}, of run '{folder.path}'; where it was moved, give"
                    f" {option}"
                )
        path = recipe.model.path
        if (
            path != "tiny"
            and self.model is None
            and not os.path.isdir(path)
            and not hub.is_id(path)
        ):
            raise ModelError(
                f"model '{path}' of run '{folder.path}': no such folder; where it was moved, give"
                " --model FOLDER"
            )
