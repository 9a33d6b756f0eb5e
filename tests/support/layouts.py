"""A random model's folder, rewritten as other versions of transformers, and mlx-vlm, write one.

4.45 kept a processor's template in chat_template.json, and Qwen2.5-VL's publishers another one, for
text alone, in tokenizer_config.json. 4.52 moved the template to chat_template.jinja, named settings
that are not set, and wrote the video processor's file. 4.57 allows templates of other names in a
folder. 5 nests all processors in processor_config.json, and has no maps of tokens. mlx-vlm copies
every JSON file and lets the processor of its day write over the copies.
"""

from __future__ import annotations

import json
from pathlib import Path

import transformers

PROCESSORS = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_5": "Qwen3VLProcessor",
    "gemma3": "Gemma3Processor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
}
OWN = {
    "gemma3": {"image_seq_length": 16},
    "idefics3": {"image_seq_len": 4},
    "smolvlm": {"image_seq_len": 4},
}
NAMED = {
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
    "smolvlm": {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
}
UNSET = (
    "crop_size",
    "data_format",
    "device",
    "disable_grouping",
    "input_data_format",
    "return_tensors",
    "do_center_crop",
)
TEXT_ALONE = (
    "{% for message in messages %}{{ message.content if message.content is string else 'text' }}{%"
    " endfor %}"
)


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2))


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def template(folder: Path) -> str:
    """The folder's template, wherever the random model has it; taken out."""
    settings = read(folder / "tokenizer_config.json")
    held = settings.pop("chat_template", None)
    write(folder / "tokenizer_config.json", settings)
    own = folder / "chat_template.jinja"
    held = own.read_text() if own.is_file() else held
    remove(folder, "chat_template.jinja")
    return held


def old_tokenizer(folder: Path, kind: str) -> None:
    """Tokens in tokenizer_config.json once more, and in two maps."""
    tokens = read(folder / "tokenizer.json")["added_tokens"]
    settings = read(folder / "tokenizer_config.json")
    decoder = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokens
    }
    special = [token["content"] for token in tokens if token["special"]]
    named = {key: value for key, value in settings.items() if key.endswith("_token") and value}
    settings |= {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": special,
        "clean_up_tokenization_spaces": False,
    }
    settings |= NAMED.get(kind, {}) | {
        "extra_special_tokens": NAMED.get(kind, {}),
        "processor_class": PROCESSORS[kind],
    }
    settings |= {
        "tokenizer_class": (
            "Qwen2TokenizerFast" if kind.startswith("qwen") else "PreTrainedTokenizerFast"
        )
    }
    settings.pop("backend", None)
    write(folder / "tokenizer_config.json", settings)
    write(
        folder / "special_tokens_map.json",
        named | NAMED.get(kind, {}) | {"additional_special_tokens": special},
    )
    write(folder / "added_tokens.json", {token["content"]: token["id"] for token in tokens})


def image_settings(folder: Path, kind: str) -> dict:
    return read(folder / "preprocessor_config.json") | {"processor_class": PROCESSORS[kind]}


def transformers_4_45(folder: Path, kind: str) -> None:
    held, images = template(folder), image_settings(folder, kind)
    old_tokenizer(folder, kind)
    write(folder / "chat_template.json", {"chat_template": held})
    write(
        folder / "tokenizer_config.json",
        read(folder / "tokenizer_config.json") | {"chat_template": TEXT_ALONE},
    )
    if kind.startswith("qwen"):
        size = images.pop("size")
        images |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    write(folder / "preprocessor_config.json", images)
    if kind in OWN:
        write(folder / "processor_config.json", OWN[kind] | {"processor_class": PROCESSORS[kind]})


def transformers_4_52(folder: Path, kind: str) -> None:
    held, images = template(folder), image_settings(folder, kind)
    old_tokenizer(folder, kind)
    (folder / "chat_template.jinja").write_text(held)
    images["image_processor_type"] += "Fast"
    write(folder / "preprocessor_config.json", dict.fromkeys(UNSET) | images)
    if kind.startswith("qwen"):
        write(
            folder / "video_preprocessor_config.json",
            images | {"video_processor_type": "Qwen2VLVideoProcessor"},
        )
    if kind in OWN:
        write(folder / "processor_config.json", OWN[kind] | {"processor_class": PROCESSORS[kind]})


def transformers_4_57(folder: Path, kind: str) -> None:
    transformers_4_52(folder, kind)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text(TEXT_ALONE)
    if kind.startswith("qwen"):
        path = folder / "preprocessor_config.json"
        images = read(path)
        write(
            path,
            images
            | {
                "min_pixels": images["size"]["shortest_edge"],
                "max_pixels": images["size"]["longest_edge"],
            },
        )


def transformers_5(folder: Path, kind: str) -> None:
    (folder / "chat_template.jinja").write_text(template(folder))
    images = image_settings(folder, kind)
    settings = read(folder / "tokenizer_config.json") | {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
    }
    write(
        folder / "tokenizer_config.json",
        settings | NAMED.get(kind, {}) | {"extra_special_tokens": NAMED.get(kind, {})},
    )
    nested = {"image_processor": images, "processor_class": PROCESSORS[kind], **OWN.get(kind, {})}
    if kind.startswith("qwen"):
        nested["video_processor"] = images | {"video_processor_type": "Qwen2VLVideoProcessor"}
    write(folder / "processor_config.json", nested)
    remove(folder, "preprocessor_config.json")


def mlx_community(folder: Path, kind: str) -> None:
    """The files of 4.45, with those of 5 beside them, and a settings' file of both."""
    transformers_4_45(folder, kind)
    held = read(folder / "chat_template.json")["chat_template"]
    (folder / "chat_template.jinja").write_text(held)
    images = read(folder / "preprocessor_config.json")
    write(
        folder / "processor_config.json",
        {"image_processor": images, "processor_class": PROCESSORS[kind], **OWN.get(kind, {})},
    )
    # Settings that a processor of today does not read any more must not win.
    write(folder / "preprocessor_config.json", images | {"image_mean": [0.1, 0.1, 0.1]})
    config = read(folder / "config.json")
    write(
        folder / "config.json",
        config | {"quantization": {"group_size": 64, "bits": 4}, "eos_token_id": [0, 1]},
    )


LAYOUTS = {
    "4.45": transformers_4_45,
    "4.52": transformers_4_52,
    "4.57": transformers_4_57,
    "5": transformers_5,
    "mlx": mlx_community,
}


class Videos:
    """Of a video processor, the attributes that a processor asks for when no video is given."""

    merge_size, num_frames, fps, model_input_names = 2, 1, 1, ()


def stock(folder: Path, kind: str, monkeypatch) -> object:
    """The model's own processor by its own `from_pretrained`; its video processor alone, which
    needs torchvision, is left out."""
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.processing_utils import ProcessorMixin

    checked = ProcessorMixin.check_argument_for_proper_class
    monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", lambda *_, **__: Videos())
    monkeypatch.setattr(
        ProcessorMixin,
        "check_argument_for_proper_class",
        lambda own, name, value: (
            type(value) if name == "video_processor" else checked(own, name, value)
        ),
    )
    monkeypatch.setattr(ProcessorMixin, "__repr__", object.__repr__)  # it is logged, as JSON
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    return getattr(transformers, PROCESSORS[kind]).from_pretrained(folder, backend="pil")
