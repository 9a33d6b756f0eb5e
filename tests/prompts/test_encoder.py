"""Prompts against the model's real processor and the model's real position code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opd.errors import DataError, ModelError
from opd.prompts.encoder import PromptEncoder
from opd.tiny import MODEL, Scenes
from opd.views.images import student_images, teacher_images
from opd.views.view import ViewOptions
from tests.support.prompt_cases import tokenizer_of

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TURN = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- for part in message.content -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"""
PLAIN = TURN + "{%- endif -%}"
THINKING = (
    TURN + "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\n\n</think>\n\n' }}{%- else -%}{{ '<think>\n' }}{%- endif -%}{%- endif -%}"
)
SIZES = [
    [(128, 128)],
    [(48, 48)],
    [(17, 200)],
    [(333, 90)],
    [(1, 1)],
    [(3, 40)],
    [(48, 48), (128, 64)],
    [(500, 30), (20, 20), (64, 160)],
    [],
]


@pytest.fixture(scope="session", params=["written here", "embedded"])
def any_folder(request: pytest.FixtureRequest, folder: Path) -> Path:
    return MODEL if request.param == "embedded" else folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def write_model(folder: Path, template: str = PLAIN, **config: Any) -> Path:
    """A model folder without weights: patch 8, merge 2, between 256 and 65,536 pixels, byte-level
    tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["What digit is on the red tile?", "The red tile shows 7."] * 9,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 256, "longest_edge": 65536},
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.6, 0.7],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **config}))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.eos_token_id, 0]})
    )
    return folder


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def real_processor(folder: Path) -> Any:
    """Qwen3VLProcessor as it is, but for a video processor: that one would need torchvision."""
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    processor = object.__new__(Qwen3VLProcessor)
    processor.tokenizer = AutoTokenizer.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    processor.video_processor = SimpleNamespace(merge_size=2, model_input_names=[])
    processor.chat_template = processor.tokenizer.chat_template
    for name in ("image", "video"):
        setattr(processor, f"{name}_token", f"<|{name}_pad|>")
        setattr(
            processor,
            f"{name}_token_id",
            processor.tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"),
        )
    return processor


def expected(folder: Path, images: list[Image.Image], question: str) -> dict[str, Any]:
    processor = real_processor(folder)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return dict(processor(text=[text], images=images or None, return_tensors="np"))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_encodes_as_the_real_processor_and_numbers_positions_as_the_real_model(
    any_folder: Path, sizes: list[tuple[int, int]]
) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    images = [noise(size, seed) for seed, size in enumerate(sizes)]
    prompt = PromptEncoder(any_folder).encode(images, "What digit is on the red tile?")
    real = expected(any_folder, images, "What digit is on the red tile?")

    np.testing.assert_array_equal(prompt.tokens, real["input_ids"][0])
    assert prompt.tokens.dtype == np.int32
    assert set(prompt.images) == ({"pixel_values", "image_grid_thw"} if images else set())
    for name, dtype in {"pixel_values": np.float32, "image_grid_thw": np.int32}.items():
        if images:
            np.testing.assert_array_equal(prompt.images[name], real[name])
            assert prompt.images[name].dtype == dtype
            assert prompt.images[name].flags.c_contiguous

    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    )
    model.get_vision_position_ids = MethodType(Qwen3VLModel.get_vision_position_ids, model)
    positions, _ = Qwen3VLModel.get_rope_index(
        model,
        torch.tensor(real["input_ids"]),
        torch.tensor(real["mm_token_type_ids"]),
        image_grid_thw=torch.tensor(real["image_grid_thw"]) if images else None,
    )
    np.testing.assert_array_equal(prompt.positions, positions[:, 0].numpy())
    np.testing.assert_array_equal(prompt.visual.index, np.flatnonzero(real["mm_token_type_ids"][0]))
    assert len(prompt.visual.index) == len(prompt.visual.image) == len(prompt.visual.boxes)


def test_the_embedded_task_gives_64_and_9_visual_tokens() -> None:
    example = Scenes("train", 1)[0]
    encoder = PromptEncoder(MODEL)
    student = encoder.encode(student_images(example), example.question)
    teacher = encoder.encode(
        teacher_images(example, ViewOptions(margin=6, min_size=48)), example.question
    )
    assert (len(student.visual.index), len(teacher.visual.index)) == (64, 9)


def test_student_and_teacher_differ_only_in_their_image_tokens(folder: Path) -> None:
    encoder = PromptEncoder(folder)
    student = encoder.encode([noise((128, 128))], "What digit is on the red tile?")
    teacher = encoder.encode([noise((48, 48))], "What digit is on the red tile?")
    assert (len(student.visual.index), len(teacher.visual.index)) == (64, 9)
    np.testing.assert_array_equal(
        np.delete(student.tokens, student.visual.index),
        np.delete(teacher.tokens, teacher.visual.index),
    )
    # An image of 8 x 8 visual tokens takes 8 positions, one of 3 x 3 takes 3.
    assert student.start == len(student) - 64 + 8
    assert teacher.start == len(teacher) - 9 + 3


def test_prompts_of_one_question_share_their_layout_and_those_of_other_sizes_do_not(
    folder: Path,
) -> None:
    encoder, question = PromptEncoder(folder), "What digit is on the red tile?"
    first, second, other = (
        encoder.encode([noise(size)], question) for size in ((128, 128), (128, 128), (120, 120))
    )
    assert first.positions is second.positions
    assert first.visual is second.visual
    with pytest.raises(ValueError, match="read-only"):
        first.positions[0, 0] = 5
    # 120 pixels become 112 or 128: as many tokens as 128 have, or other ones, and other boxes in
    # any case.
    assert other.visual.boxes.max() == 120
    assert first.visual.boxes.max() == 128
    fresh = PromptEncoder(folder).encode([noise((120, 120))], question)
    for mine, its in (
        (other.tokens, fresh.tokens),
        (other.positions, fresh.positions),
        (other.visual.boxes, fresh.visual.boxes),
    ):
        np.testing.assert_array_equal(mine, its)


def test_positions_of_two_small_images_written_out(folder: Path) -> None:
    prompt = PromptEncoder(folder).encode([noise((48, 32)), noise((16, 32))], "<image>What<image>")
    texts = [
        "<|im_start|>user\n<|vision_start|>",
        *["<|image_pad|>"] * 6,
        "<|vision_end|>What<|vision_start|>",
        *["<|image_pad|>"] * 2,
    ]
    ids = tokenizer_of(folder)("".join(texts))["input_ids"]
    assert prompt.tokens[: len(ids)].tolist() == ids
    first, second = prompt.visual.index[0], prompt.visual.index[6]
    assert (prompt.positions[:, first : first + 6] - first).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1],
        [0, 1, 2, 0, 1, 2],
    ]
    # The first image holds 6 tokens in 3 positions.
    assert (prompt.positions[:, second : second + 2] - (second - 3)).tolist() == [
        [0, 0],
        [0, 1],
        [0, 0],
    ]
    assert prompt.visual.image.tolist() == [0] * 6 + [1] * 2


def test_visual_boxes_written_out(folder: Path) -> None:
    # 30 x 50 pixels become 32 x 48: 2 columns and 3 rows of tokens.
    visual = PromptEncoder(folder).encode([noise((30, 50))], "What?").visual
    third, two_thirds = 50 / 3, 100 / 3
    assert visual.boxes.dtype == np.float32
    np.testing.assert_allclose(
        visual.boxes,
        [
            [0, 0, 15, third],
            [15, 0, 30, third],
            [0, third, 15, two_thirds],
            [15, third, 30, two_thirds],
            [0, two_thirds, 15, 50],
            [15, two_thirds, 30, 50],
        ],
        rtol=1e-6,
    )


@pytest.mark.parametrize("size", [(128, 128), (17, 200), (333, 90), (1, 1)], ids=str)
def test_visual_boxes_tile_the_image(folder: Path, size: tuple[int, int]) -> None:
    width, height = size
    boxes = (
        PromptEncoder(folder)
        .encode([noise((64, 64)), noise(size)], "What?")
        .visual.boxes[16:]
        .astype(np.float64)
    )
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert areas.sum() == pytest.approx(width * height)
    centres = np.stack([(boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2], axis=1)
    inside = (centres[:, None] > boxes[None, :, :2]).all(2) & (
        centres[:, None] < boxes[None, :, 2:]
    ).all(2)
    np.testing.assert_array_equal(inside, np.eye(len(boxes), dtype=bool))
    assert boxes.min() == 0
    assert boxes.max(axis=0).tolist() == pytest.approx(
        [width - boxes[0, 2], height - boxes[0, 3], width, height]
    )


def test_a_visual_token_looks_at_the_pixels_of_its_box(folder: Path) -> None:
    black = Image.new("RGB", (96, 64))
    encoder = PromptEncoder(folder)
    before = encoder.encode([black], "What?")
    for number in (0, 5, 14, 23):
        left, top, right, bottom = before.visual.boxes[number].astype(int)
        marked = black.copy()
        marked.paste((255, 255, 255), (left, top, right, bottom))
        changed = (
            encoder.encode([marked], "What?").images["pixel_values"]
            != before.images["pixel_values"]
        ).any(axis=1)
        # Four patches are merged into one token.
        assert np.flatnonzero(changed).tolist() == list(range(4 * number, 4 * number + 4))


@pytest.mark.parametrize(
    ("question", "count", "expected"),
    [
        ("What?", 1, "IWhat?"),
        ("What?", 2, "IIWhat?"),
        ("What?", 0, "What?"),
        ("<image>\nWhat?", 1, "I\nWhat?"),
        ("What is in <image>?", 1, "What is in I?"),
        ("<image>a<image>b", 2, "IaIb"),
        ("<image> What?", 3, "III What?"),
        ("<image>a<image>b", 3, "IaIIb"),
    ],
)
def test_images_stand_where_the_question_says(
    folder: Path, question: str, count: int, expected: str
) -> None:
    encoder = PromptEncoder(folder)
    prompt = encoder.encode([noise((16, 16))] * count, question)
    text = tokenizer_of(folder).decode(prompt.tokens.tolist())
    text = text.replace("<|vision_start|><|image_pad|><|vision_end|>", "I")
    assert text == f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("question", "size", "message"),
    [
        ("<image><image>What?", (16, 16), "the question has 2 '<image>' markers for 1 image"),
        ("What is <|image_pad|>?", (16, 16), "contains a reserved token such as '<|image_pad|>'"),
        (
            "What?",
            (2000, 2),
            (
                "images of 2000 x 2 pixels cannot be encoded: absolute aspect ratio must be smaller"
                " than 200"
            ),
        ),
    ],
)
def test_questions_and_images_that_do_not_fit_are_data_errors(
    folder: Path, question: str, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        PromptEncoder(folder).encode([noise(size)], question)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_thinking_is_off_where_the_template_knows_it(tmp_path: Path) -> None:
    encoder = PromptEncoder(write_model(tmp_path, THINKING))
    prompt = encoder.encode([noise((16, 16))], "What?")
    text = tokenizer_of(tmp_path).decode(prompt.tokens.tolist())
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_stop_banned_and_decode(folder: Path, tmp_path: Path) -> None:
    encoder = PromptEncoder(folder)
    tokenizer = tokenizer_of(folder)
    numbers = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL]
    assert encoder.stop == (numbers[2], numbers[0])
    assert encoder.banned == (numbers[3], numbers[4], numbers[5], numbers[6])
    ids = tokenizer("The red tile shows 7 .<|im_end|>")["input_ids"]
    assert encoder.decode(np.asarray(ids, dtype=np.int32)) == "The red tile shows 7 ."
    (write_model(tmp_path) / "generation_config.json").unlink()
    assert PromptEncoder(tmp_path).stop == (numbers[2],)


def test_pixel_limits_bound_the_number_of_visual_tokens(folder: Path) -> None:
    image = [noise((128, 128))]
    counts = {
        limits: len(
            PromptEncoder(folder, max_pixels=limits[0], min_pixels=limits[1])
            .encode(image, "What?")
            .visual.index
        )
        for limits in [(None, None), (64 * 64, None), (None, 256 * 256), (128, None)]
    }
    assert counts == {(None, None): 64, (64 * 64, None): 16, (None, 256 * 256): 256, (128, None): 1}


BOUNDS = {"student": (96 * 96, 64 * 64), "teacher": (300 * 300, 160 * 160)}
ASPECTS = [
    (96, 96),
    (97, 95),
    (288, 32),
    (24, 384),
    (300, 300),
    (301, 299),
    (900, 100),
    (640, 480),
    (64, 64),
    (5, 3),
    (1, 90),
    (700, 9),
]


@pytest.mark.parametrize("policy", ["student", "teacher"])
def test_bounds_give_what_the_models_own_processor_gives_with_them(
    folder: Path, tmp_path: Path, policy: Any
) -> None:
    """Against the real processor of a model that has these bounds of its own: up to the limits, at
    them, and beyond."""
    (largest, smallest), (teacher_largest, teacher_smallest) = BOUNDS.values()
    ours = PromptEncoder(folder, largest, smallest, teacher_largest, teacher_smallest)
    path = write_model(tmp_path) / "preprocessor_config.json"
    size = dict(zip(("longest_edge", "shortest_edge"), BOUNDS[policy], strict=True))
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": size}))
    counts = {}
    for seed, aspect in enumerate(ASPECTS):
        image = noise(aspect, seed)
        prompt, real = ours.encode([image], "What?", policy), expected(tmp_path, [image], "What?")
        np.testing.assert_array_equal(prompt.tokens, real["input_ids"][0])
        np.testing.assert_array_equal(prompt.images["image_grid_thw"], real["image_grid_thw"])
        np.testing.assert_array_equal(prompt.images["pixel_values"], real["pixel_values"])
        counts[aspect] = len(prompt.visual.index)
    # A visual token is 16 x 16 pixels.
    assert (counts[5, 3], counts[640, 480]) == {"student": (24, 30), "teacher": (104, 336)}[policy]


def test_the_teacher_follows_the_student_where_it_has_no_bounds_of_its_own(folder: Path) -> None:
    image = [noise((128, 128))]

    def counts(**bounds: int) -> tuple[int, ...]:
        encoder = PromptEncoder(folder, **bounds)
        return tuple(
            len(encoder.encode(image, "What?", policy).visual.index)
            for policy in ("student", "teacher")
        )

    assert counts() == (64, 64)
    assert counts(max_pixels=64 * 64) == (16, 16)
    assert counts(max_pixels=64 * 64, teacher_max_pixels=32 * 32) == (16, 4)
    assert counts(teacher_max_pixels=32 * 32) == (64, 4)
    assert counts(teacher_min_pixels=256 * 256) == (64, 256)
    assert counts(min_pixels=320 * 320) == (400, 400)  # above the model's own maximum


def test_keys_of_the_policies_differ_where_their_bounds_do(folder: Path) -> None:
    image = [noise((32, 48))]  # within all bounds: the arrays are equal, the settings are not
    keys = {}
    for name, bounds in {
        "one": {},
        "two": {"teacher_max_pixels": 4096},
        "three": {"max_pixels": 4096},
    }.items():
        encoder = PromptEncoder(folder, **bounds)
        keys[name] = [
            encoder.encode(image, "What?", policy).key for policy in ("student", "teacher")
        ]
    assert keys["one"][0] == keys["one"][1] == keys["two"][0] != keys["two"][1]
    assert keys["three"] == [keys["two"][1]] * 2


def test_a_limit_below_the_models_own_minimum_holds(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"shortest_edge": 256', '"shortest_edge": 4096'))
    counts = [
        len(PromptEncoder(tmp_path, limit).encode([noise((16, 16))], "What?").visual.index)
        for limit in (None, 1024)
    ]
    assert counts == [16, 4]


def test_key_is_equal_only_for_equal_features(folder: Path) -> None:
    encoder = PromptEncoder(folder)
    red, blue = Image.new("RGB", (32, 48), "red"), Image.new("RGB", (32, 48), "blue")
    same = encoder.encode([red, blue], "What?").key
    assert encoder.encode([red.copy(), blue.copy()], "Another question").key == same
    assert PromptEncoder(folder).encode([red, blue], "What?").key == same
    others = [
        encoder.encode([blue, red], "What?").key,
        encoder.encode([red], "What?").key,
        encoder.encode([red, red], "What?").key,
        encoder.encode([red.transpose(Image.Transpose.ROTATE_90), blue], "What?").key,
        PromptEncoder(folder, max_pixels=1024).encode([red, blue], "What?").key,
    ]
    assert len({same, *others}) == 6
    assert len(same) == len(hashlib.sha256().hexdigest())


def test_published_names_of_the_image_processor_load_without_torchvision(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "preprocessor_config.json"
    before = PromptEncoder(tmp_path).encode([noise((64, 48))], "What?").images["pixel_values"]
    settings = {
        **json.loads(path.read_text()),
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
    }
    path.write_text(json.dumps(settings))
    np.testing.assert_array_equal(
        PromptEncoder(tmp_path).encode([noise((64, 48))], "What?").images["pixel_values"], before
    )
    path.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    np.testing.assert_array_equal(
        PromptEncoder(tmp_path).encode([noise((64, 48))], "What?").images["pixel_values"], before
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "is not a complete model folder: config.json is missing"),
        ("tokenizer_config.json", None, "tokenizer_config.json is missing"),
        ("tokenizer.json", None, "tokenizer.json or vocab.json is missing"),
        (
            "preprocessor_config.json",
            None,
            "preprocessor_config.json or processor_config.json is missing",
        ),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "config.json does not hold a JSON object"),
        ("config.json", "{}", "config.json has no model_type"),
        (
            "config.json",
            '{"model_type": "qwen9_vl"}',
            "model_type 'qwen9_vl' is not supported; supported: gemma3, idefics3, qwen2_5_vl,",
        ),
        ("preprocessor_config.json", "{", "tokenizer or image processor cannot be loaded"),
        ("tokenizer.json", "{", "tokenizer or image processor cannot be loaded"),
        ("chat_template.jinja", None, "the tokenizer has no chat template"),
        ("generation_config.json", "x", "generation_config.json is not JSON"),
    ],
)
def test_a_broken_model_folder_is_one_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = write_model(tmp_path) / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ModelError) as caught:
        PromptEncoder(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "model_type '" in message
    assert "\n" not in str(caught.value)


def test_a_template_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    """As processors kept it before transformers 4.50."""
    template = write_model(tmp_path) / "chat_template.jinja"
    (tmp_path / "chat_template.json").write_text(
        json.dumps({"chat_template": template.read_text()})
    )
    wanted = PromptEncoder(tmp_path).encode([], "What?").tokens
    template.unlink()
    np.testing.assert_array_equal(PromptEncoder(tmp_path).encode([], "What?").tokens, wanted)


def test_a_missing_model_folder_and_a_missing_token_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model folder not found: .*/nowhere$"):
        PromptEncoder(tmp_path / "nowhere")
    path = write_model(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text().replace("<|video_pad|>", "<|video_pat|>"))
    with pytest.raises(
        ModelError, match=r"the tokenizer has no token '<\|video_pad\|>', which qwen3_vl needs"
    ):
        PromptEncoder(tmp_path)
