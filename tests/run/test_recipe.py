from __future__ import annotations

from pathlib import Path

import pytest

from opd.errors import RecipeError
from opd.run import recipe as recipes


def test_the_paper_preset_is_the_official_run():
    recipe = recipes.load("paper")
    assert (
        recipe.rollout.prompts,
        recipe.rollout.completions,
        recipe.rollout.max_tokens,
        recipe.rollout.temperature,
    ) == (96, 8, 1024, 1.0)
    assert (
        recipe.objective.alpha,
        recipe.objective.top_k,
        recipe.objective.tail,
        recipe.objective.ratio_clip,
    ) == (0.5, 100, True, 2.0)
    assert (recipe.teacher.rule, recipe.teacher.rate, recipe.run.steps) == ("ema", 0.05, 65)
    optimizer = recipe.optimizer
    assert (
        optimizer.learning_rate,
        optimizer.schedule,
        optimizer.warmup_steps,
        optimizer.betas,
    ) == (2e-6, "constant", 10, (0.9, 0.999))
    assert (optimizer.weight_decay, optimizer.gradient_clip) == (0.01, 1.0)


@pytest.mark.parametrize("preset", recipes.PRESETS)
def test_every_preset_survives_its_own_file(preset, tmp_path):
    recipe = recipes.load(preset)
    (tmp_path / "config.toml").write_text(recipes.write(recipe, {"opd": "0"}))
    assert recipes.reread(tmp_path / "config.toml") == recipe


def test_overrides_are_toml_or_plain_strings():
    recipe = recipes.load(
        "tiny",
        [
            "run.steps=7",
            "optimizer.betas=[0.8, 0.9]",
            "teacher.rule=frozen",
            'data.path="my.jsonl"',
            "objective.tail=false",
        ],
    )
    assert (
        recipe.run.steps,
        recipe.optimizer.betas,
        recipe.teacher.rule,
        recipe.data.path,
        recipe.objective.tail,
    ) == (
        7,
        (0.8, 0.9),
        "frozen",
        "my.jsonl",
        False,
    )


@pytest.mark.parametrize("preset", recipes.PRESETS)
def test_the_tower_is_trained_with_all_weights_and_adapted_where_asked_for(preset):
    def vision(*overrides):
        return recipes.load(preset, overrides).model.vision

    assert vision("model.tune=full")
    assert not vision("model.tune=lora")
    assert not vision("model.tune=qlora")
    assert vision("model.tune=lora", "model.vision=true")
    assert not vision("model.tune=full", "model.vision=false")


def test_zero_is_none_in_the_objective():
    objective = recipes.load(
        "tiny", ["objective.top_k=0", "objective.ratio_clip=0"]
    ).objective.objective(0.7)
    assert (objective.top_k, objective.ratio_clip, objective.temperature) == (None, None, 0.7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.promts=3", "unknown key rollout.promts; did you mean 'prompts'?"),
        ("rolout.prompts=3", "unknown key rolout; did you mean 'rollout'?"),
        ("run.steps=0", "run.steps = 0: input should be greater than or equal to 1"),
        ("run.steps=many", "run.steps = 'many': input should be a valid integer"),
        ("objective.alpha=1.5", "objective.alpha = 1.5: input should be less than or equal to 1"),
        ("objective.alpha=nan", "objective.alpha = nan: input should be a finite number"),
        (
            "teacher.rule=emma",
            "teacher.rule = 'emma': input should be 'ema', 'frozen', 'sync' or 'live'",
        ),
        ("steps=3", "--set steps=3: write it as section.key=value, such as --set run.steps=100"),
        (
            "run.steps",
            "--set run.steps: write it as section.key=value, such as --set run.steps=100",
        ),
        ("run=3", "--set run=3: write it as section.key=value"),
    ],
)
def test_mistakes_are_one_line(override, message):
    with pytest.raises(RecipeError) as failure:
        recipes.load("tiny", [override])
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run\nsteps = 3", "is not valid TOML"),
        ("[run]\nsteps = 3\nsteps = 4", "is not valid TOML"),
        ("run = 3", "run = 3: input should be a valid dictionary"),
        ("[optimiser]\nlearning_rate = 1", "unknown key optimiser; did you mean 'optimizer'?"),
        ("\xff", "cannot be read"),
    ],
)
def test_a_broken_file_is_one_line(text, message, tmp_path):
    (tmp_path / "my.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError) as failure:
        recipes.load(str(tmp_path / "my.toml"))
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_file_says_what_differs_from_a_preset(tmp_path):
    """Of its model, or the one that it names; a run's config.toml is a recipe too."""
    file = tmp_path / "my.toml"
    file.write_text("[run]\nsteps = 7\n[optimizer]\nlearning_rate = 1e-4\n")
    tiny = recipes.load("tiny")
    mine = recipes.load(str(file), ["run.seed=3"])
    assert mine == tiny.model_copy(
        update={
            "run": tiny.run.model_copy(update={"steps": 7, "seed": 3}),
            "optimizer": tiny.optimizer.model_copy(update={"learning_rate": 1e-4}),
        }
    )
    assert recipes.load(str(file), ["model.path=some/model"]).model.tune == "lora"
    file.write_text('preset = "paper"\n[run]\nsteps = 7\n')
    assert recipes.load(str(file)) == recipes.load("paper", ["run.steps=7"])
    file.write_text(recipes.write(mine, {"opd": "0"}))
    assert recipes.load(str(file)) == mine
    file.write_text('preset = "papre"\n')
    with pytest.raises(RecipeError, match="unknown preset 'papre'; did you mean 'paper'"):
        recipes.load(str(file))


def test_a_missing_recipe_names_the_presets():
    with pytest.raises(
        RecipeError, match=r"recipe 'tinny': neither a file nor a preset; did you mean 'tiny'\?"
    ):
        recipes.load("tinny")
    with pytest.raises(
        RecipeError, match="recipe 'zzz': neither a file nor a preset; known: lora, paper, tiny"
    ):
        recipes.load("zzz")


def test_every_key_has_a_default_and_a_sentence():
    for name, section in recipes.Recipe.model_fields.items():
        for key, field in type(section.default).model_fields.items():
            assert not field.is_required(), f"{name}.{key}"
            assert field.description, f"{name}.{key}"
            assert field.description.endswith("."), f"{name}.{key}"


def test_the_reference_is_the_one_in_the_docs():
    assert recipes.reference() == (Path(__file__).parents[2] / "docs/recipe.md").read_text(
        encoding="utf-8"
    )
