"""Prompts as each model's own processor makes them, put together from its parts."""

from __future__ import annotations

from types import SimpleNamespace

QUESTION = "What digit is on the red tile?"


def tokenizer_of(folder):
    """A model's tokenizer as transformers opens it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def processor(name, folder, **bounds):
    """The family's own processor; Qwen's without its video processor, which would need
    torchvision."""
    import transformers
    from transformers import AutoImageProcessor

    images = AutoImageProcessor.from_pretrained(folder, backend="pil", **bounds)
    tokenizer = tokenizer_of(folder)
    if name == "gemma3":
        return transformers.Gemma3Processor(
            images, tokenizer, image_seq_length=16, chat_template=tokenizer.chat_template
        )
    if name == "smolvlm":
        return transformers.Idefics3Processor(
            images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
        )
    if name == "llava":
        return transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        )
    own = object.__new__(
        transformers.Qwen2_5_VLProcessor if name == "qwen2_5_vl" else transformers.Qwen3VLProcessor
    )
    own.tokenizer, own.image_processor, own.chat_template = (
        tokenizer,
        images,
        tokenizer.chat_template,
    )
    own.video_processor = SimpleNamespace(merge_size=2, model_input_names=[])
    for kind in ("image", "video"):
        setattr(own, f"{kind}_token", f"<|{kind}_pad|>")
        setattr(own, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
    return own


def expected(name, folder, images, **bounds):
    """Tokens and arrays by the family's own processor."""
    own = processor(name, folder, **bounds)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": QUESTION}]
    text = own.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    given = [images] if name in ("gemma3", "smolvlm") else images
    # The template has written the first token already.
    return dict(
        own(
            text=[text],
            images=given if images else None,
            add_special_tokens=False,
            return_tensors="np",
        )
    )
