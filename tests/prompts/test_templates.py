"""A model that thinks: the prompt's bytes in rollout, teacher and exported template, which says it
without any argument."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from opd.errors import DataError, ModelError
from opd.prompts import renderer, templates
from opd.prompts.encoder import PromptEncoder
from opd.tiny import MODEL, Scenes
from opd.views.usable import encode_student, encode_teacher
from opd.views.view import ViewOptions
from opd_cli import main

HEAD = """{%- set image = '<|vision_start|><|image_pad|><|vision_end|>' %}
{%- macro text(content) %}{% if content is string %}{{ content }}{% else %}
{%- for part in content %}{{ image if part.type == 'image' else part.text }}{% endfor %}
{%- endif %}{% endmacro %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + text(message.content) + '<|im_end|>\\n' }}
{%- endfor %}
"""
PLAIN = (
    HEAD + "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
# As Qwen3's, which thinks unless it is told not to.
QWEN3 = (
    PLAIN.removesuffix("{%- endif %}\n")
    + "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}\n"
)
# As Qwen3.5's small models, which do not think unless they are told to.
OPT_IN = (
    PLAIN.removesuffix("{%- endif %}\n")
    + "    {%- if enable_thinking is defined and enable_thinking is true %}\n        {{-"
    " '<think>\\n' }}\n    {%- else %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%-"
    " endif %}\n{%- endif %}\n"
)
# Qwen3-VL's Thinking models always open the block.
ALWAYS = PLAIN.replace("assistant\\n'", "assistant\\n<think>\\n'")
CLOSED = "<think>\n\n</think>\n\n"
TEMPLATES = {
    "plain": (PLAIN, ""),
    "qwen3": (QWEN3, CLOSED),
    "opt in": (OPT_IN, CLOSED),
    "always": (ALWAYS, CLOSED),
    "embedded": (None, ""),
}
FEW = ["--backend", "cpu", "--steps", "1", "--set", "measure.count=0", "--set", "rollout.prompts=2"]


@pytest.fixture(params=TEMPLATES)
def thinking(request, tmp_path):
    """A model folder with each template, and the end of its prompt, written out."""
    template, end = TEMPLATES[request.param]
    shutil.copytree(MODEL, tmp_path / "model")
    if template is not None:
        write(tmp_path / "model", template)
    return tmp_path / "model", end


def write(folder, template):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)


def expected(question, end):
    asked = f"<|vision_start|><|image_pad|><|vision_end|>{question}"
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{end}"


def served(folder, question, **arguments):
    """The prompt of somebody who knows nothing of the training."""
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True, **arguments
    )


def compact(folder, prompt):
    """The text of an encoded prompt of a model folder, with an image's tokens as one."""
    tokens = prompt.tokens.tolist()
    image = prompt.visual.index.tolist()
    kept = [token for place, token in enumerate(tokens) if place not in image[1:]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.decode(kept, clean_up_tokenization_spaces=False)


def test_rollout_teacher_and_export_have_the_same_bytes(thinking, tmp_path):
    folder, end = thinking
    scene = Scenes("train", 1)[0]
    prompt = expected(scene.question, end)
    encoder = PromptEncoder(folder)
    assert compact(folder, encode_student(encoder, scene)) == prompt
    assert compact(folder, encode_teacher(encoder, scene, ViewOptions())) == prompt
    run = tmp_path / "run"
    done = CliRunner().invoke(
        main, ["train", "tiny", "--model", str(folder), "--out", str(run), *FEW]
    )
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["export", str(run), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    for place in (run / "model", tmp_path / "out"):
        assert served(place, scene.question) == prompt
        assert served(place, scene.question, enable_thinking=True) == prompt
        again = PromptEncoder(place)
        assert compact(place, encode_student(again, scene)) == prompt
    # written once: what is trained again is not wrapped again
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (run / "model" / name).exists():
            assert (tmp_path / "out" / name).read_bytes() == (run / "model" / name).read_bytes()
    if not end:
        assert served(folder, scene.question) == prompt


def test_a_template_is_found_wherever_it_stands(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    several = [{"name": "default", "template": QWEN3}, {"name": "tools", "template": ALWAYS}]
    (tmp_path / "model/tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": several})
    )
    (tmp_path / "model/chat_template.json").write_text(json.dumps({"chat_template": QWEN3}))
    encoder = PromptEncoder(tmp_path / "model")
    (tmp_path / "adapter").mkdir()  # an adapter is written without a tokenizer
    for folder in (tmp_path / "adapter", tmp_path / "model"):
        for _ in range(2):
            encoder.save(folder)
            assert served(folder, "What?") == expected("What?", CLOSED)
            assert served(folder, "What?", chat_template="tools") == expected("What?", CLOSED)
            assert json.loads((folder / "chat_template.json").read_text()) == {
                "chat_template": templates.OFF + QWEN3
            }
    assert not (tmp_path / "adapter/config.json").exists()


def test_a_template_that_cannot_be_rendered_is_one_line(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    write(tmp_path / "model", "{{ raise_exception('tools only') }}")
    done = CliRunner().invoke(main, ["train", "tiny", "--model", str(tmp_path / "model"), *FEW])
    assert done.exit_code == 2
    assert (
        done.stderr
        == f"opd: {tmp_path / 'model'}: the chat template cannot be rendered: tools only\n"
    )


LOOPS = (
    "{%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- for c in range(99999) -%}{%-"
    " endfor -%}{%- endfor -%}{%- endfor -%}"
)
DOUBLES = (
    "{%- set ns = namespace(x='a') -%}{%- for i in range(99) -%}{%- set ns.x = ns.x ~ ns.x -%}{%-"
    " endfor -%}"
)


@pytest.fixture(scope="module")
def one_second():
    """A bound that keeps the tests quick; a process that has it serves all of them."""
    seconds, renderer.SECONDS = renderer.SECONDS, 1
    renderer.stop()
    yield
    renderer.SECONDS = seconds
    renderer.stop()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, "it takes more than 1 seconds"),
        (
            (
                "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) ~ f(n + 1) }}{% endif %}{% endmacro"
                " %}{{ f(0) }}"
            ),
            "it takes more than 1 seconds",
        ),
        (DOUBLES, "it takes more than 512 MiB of memory"),
        ("{{ 'a' * 10**11 }}", "it takes more than 512 MiB of memory"),
        ("{{ 'a' | center(10**11) }}", "it takes more than 512 MiB of memory"),
        ("{{ '%99999999999d' | format(1) }}", "it takes more than 512 MiB of memory"),
        ("{{ messages | tojson(indent=10**10) }}", "it takes more than 512 MiB of memory"),
        ("{{ 'a' * 10**7 }}", "it writes 10,000,051 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without an end"),
        ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", "it calls itself without an end"),
    ],
    ids=str,
)
def test_a_template_without_an_end_is_one_line(tmp_path, one_second, template, message):
    shutil.copytree(MODEL, tmp_path / "model")
    write(tmp_path / "model", template + PLAIN)
    with pytest.raises(ModelError) as caught:
        PromptEncoder(tmp_path / "model")
    assert (
        str(caught.value)
        == f"{tmp_path / 'model'}: the chat template cannot be rendered: {message}"
    )


def test_a_template_that_waits_for_its_question_ends_too(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    write(
        tmp_path / "model",
        "{%- if 'now' in messages[0].content[-1].text -%}{{ 'a' * 10**11 }}{%- endif -%}" + PLAIN,
    )
    encoder = PromptEncoder(tmp_path / "model")
    before = encoder.encode([], "What?").tokens
    with pytest.raises(ModelError, match="it takes more than 512 MiB of memory"):
        encoder.encode([], "What is it now?")
    assert encoder.encode([], "What?").tokens.tolist() == before.tolist()


def test_a_question_that_the_template_refuses_is_a_row_of_data(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    write(
        tmp_path / "model",
        "{%- if 'now' in messages[0].content[-1].text -%}{{ raise_exception('not now') }}{%-"
        " endif -%}" + PLAIN,
    )
    with pytest.raises(
        DataError, match="the chat template refuses the question 'What is it now\\?': not now"
    ):
        PromptEncoder(tmp_path / "model").encode([], "What is it now?")


def test_a_template_without_images_is_one_line(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    write(
        tmp_path / "model",
        PLAIN.replace("image if part.type == 'image' else part.text", "part.text"),
    )
    with pytest.raises(
        ModelError,
        match=(
            r"the chat template writes '<\|image_pad\|>' 0 times for one image; put the template"
            r" for images"
        ),
    ):
        PromptEncoder(tmp_path / "model")


def test_a_template_runs_nothing_and_reaches_nothing(tmp_path, monkeypatch):
    """Neither Python's inside nor a module of the folder that the command runs in."""
    (tmp_path / "jinja2.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    renderer.stop()
    assert renderer.render("{{ messages[0].role }}", [], {}) == "user"
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(renderer.TemplateError):
            renderer.render(template, [], {})
    assert not (tmp_path / "ran").exists()


def test_a_signal_to_the_whole_group_leaves_the_renderer_alone():
    """`timeout` and schedulers signal every process of a run, which then finishes its step."""
    assert renderer.render("{{ messages[0].role }}", [], {}) == "user"
    process = renderer.start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    assert renderer.render("{{ messages[0].role }}", [], {}) == "user"
    assert renderer.start() is process


def test_a_renderer_that_cannot_start_is_no_matter_of_memory(tmp_path, monkeypatch):
    renderer.stop()
    (tmp_path / "jinja2.py").write_text("raise SystemExit(1)")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(renderer.TemplateError, match="ended its process with exit code 1"):
            renderer.render("{{ messages[0].role }}", [], {})
    finally:
        renderer.stop()
