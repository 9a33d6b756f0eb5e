"""What an adapter, a run or a checkpoint names as its base: names that lead in a circle, or that no
file has, are one line."""

from __future__ import annotations

import json

import pytest

from opd.errors import ModelError
from opd.models.choice import ModelChoice, is_tiny
from opd.models.inert import copy_result
from opd.models.peft_files import options_of
from opd.tiny import MODEL


def adapter(folder, base):
    folder.mkdir(parents=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def run(folder, model):
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / "config.toml").write_text(model)
    return folder


def test_a_circle_of_bases_is_no_tiny_model(tmp_path):
    first = adapter(tmp_path / "first", tmp_path / "second")
    adapter(tmp_path / "second", first)
    assert not is_tiny(str(first))
    run(tmp_path / "one", f'[model]\npath = "{tmp_path / "other"}"\n')
    run(tmp_path / "other", f'[model]\npath = "{tmp_path / "one"}"\n')
    assert not is_tiny(str(tmp_path / "one"))
    assert is_tiny(str(adapter(tmp_path / "third", "tiny")))


def test_a_checkpoint_that_is_its_own_base_is_one_line(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-000001"
    run(tmp_path / "run", f'[model]\npath = "{step}"\n')
    with pytest.raises(ModelError, match="names itself as its base"):
        ModelChoice(path=str(step)).folder(weights=False)
    adapter(step / "adapter", step)
    with pytest.raises(ModelError, match="names itself as its base"):
        ModelChoice(path=str(step)).folder()


def test_an_adapter_over_the_adapter_of_a_checkpoint_is_refused(tmp_path):
    """It would be trained without the lower one."""
    step = run(tmp_path / "run", '[model]\ntune = "lora"\n') / "checkpoints" / "step-000001"
    adapter(step / "adapter", "tiny")
    with pytest.raises(ModelError, match="is an adapter itself"):
        ModelChoice(path=str(adapter(tmp_path / "upper", step))).folder()


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\0b", "\udce9"])
def test_a_base_that_no_file_is_called_is_one_line(tmp_path, name):
    folder = adapter(tmp_path / "adapter", name)
    with pytest.raises(ModelError, match="is no path or name") as error:
        ModelChoice(path=str(folder)).folder()
    assert "\n" not in str(error.value)
    assert not is_tiny(str(folder))


@pytest.mark.parametrize("text", ["model = 5\n", 'model = "x"\n', ""])
def test_a_recipe_without_a_model_section_is_of_the_embedded_one(tmp_path, text):
    step = run(tmp_path / "run", text) / "checkpoints" / "step-000001"
    assert is_tiny(str(tmp_path / "run"))
    assert ModelChoice(path=str(step)).folder(weights=False) == MODEL


def test_a_model_and_an_adapter_in_one_folder(tmp_path):
    """transformers loads the adapter over the base that it names, so neither alone is meant for
    certain."""
    both = adapter(tmp_path / "both", "tiny")
    (both / "config.json").write_text("{}")
    (both / "adapter_model.safetensors").write_bytes(b"")
    assert ModelChoice(path=str(both)).folder() == MODEL  # a model's settings alone are no model
    (both / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="holds a model and an adapter"):
        ModelChoice(path=str(both)).folder()
    (both / "adapter_model.safetensors").unlink()
    assert ModelChoice(path=str(both)).folder() == both


@pytest.mark.parametrize("alpha", [0, 0.0, 10**400, float("inf"), "x", None])
def test_an_adapter_whose_scale_is_none(tmp_path, alpha):
    folder = adapter(tmp_path / "adapter", "tiny")
    content = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="lora_alpha"):
        options_of(folder)


def test_an_adapter_that_is_a_link_to_elsewhere_is_refused(tmp_path):
    folder = adapter(tmp_path / "adapter", "tiny")
    (tmp_path / "secret").write_bytes(b"")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="outside of the model folder"):
        ModelChoice(path=str(folder)).options()


def test_an_exported_adapter_names_no_code(tmp_path):
    """PEFT imports the modules that these settings name."""
    folder = adapter(tmp_path / "adapter", "tiny")
    content = json.loads((folder / "adapter_config.json").read_text())
    planted = {
        "auto_mapping": {"base_model_class": "X", "parent_library": "planted"},
        "megatron_core": "planted",
    }
    (folder / "adapter_config.json").write_text(json.dumps(content | planted))
    copy_result(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == content
