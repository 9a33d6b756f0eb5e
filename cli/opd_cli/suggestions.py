"""Suggests what an unknown option may mean: an option of the command or a key of the recipe,
including their names in other trainers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

import click

ELSEWHERE = {
    "optimizer.learning_rate": "lr",
    "optimizer.betas": "adam_betas",
    "optimizer.epsilon": "adam_epsilon eps",
    "optimizer.weight_decay": "wd",
    "optimizer.warmup_steps": "warmup warmup_ratio num_warmup_steps lr_warmup_steps",
    "optimizer.schedule": "lr_scheduler lr_scheduler_type scheduler lr_schedule",
    "optimizer.gradient_clip": "max_grad_norm grad_clip clip_grad gradient_clipping clip",
    "rollout.prompts": (
        "batch_size train_batch_size per_device_train_batch_size global_batch_size bs batch"
    ),
    "rollout.completions": (
        "num_generations group_size n_samples num_samples generations rollouts num_rollouts"
        " rollout_n n"
    ),
    "rollout.max_tokens": (
        "max_new_tokens max_completion_length max_response_length max_length max_gen_tokens"
    ),
    "rollout.temperature": "temp",
    "rollout.microbatch_tokens": (
        "gradient_accumulation_steps gradient_accumulation micro_batch_size microbatch_size"
        " grad_accum"
    ),
    "data.max_prompt_tokens": (
        "max_prompt_length max_input_length max_seq_len max_seq_length cutoff_len max_model_len"
    ),
    "objective.alpha": "beta lmbda jsd_beta kl_beta",
    "objective.top_k": "topk distill_top_k",
    "objective.ratio_clip": "clip_ratio is_clip importance_clip cliprange epsilon_high",
    "teacher.rate": "ema ema_decay ema_rate tau teacher_decay teacher_ema",
    "model.rank": "lora_rank lora_r r",
    "model.alpha": "lora_alpha",
    "model.targets": "target_modules lora_target_modules lora_targets",
    "model.tune": "finetune tuning tuning_type train_type finetuning_type",
    "model.tune=lora": "lora use_lora use_peft peft",
    "model.tune=qlora": "qlora load_in_4bit use_qlora quantization_bit",
    "model.tune=full": "full full_finetune",
    "model.dtype": "torch_dtype precision mixed_precision",
    "model.dtype=bfloat16": "bf16 fp16 bfloat16 float16 half",
    "model.dtype=float32": "fp32 float32",
    "model.vision": "train_vision tune_vision unfreeze_vision",
    "model.vision=false": "freeze_vision freeze_vision_tower freeze_vision_modules freeze_vit",
    "model.max_pixels": "image_max_pixels pixels resolution image_size",
    "model.min_pixels": "image_min_pixels",
    "model.revision": "model_revision branch",
    "view.kind": "view teacher_view",
    "view.margin": "crop_margin padding",
    "measure.path": (
        "eval_data eval_dataset eval_file validation_file val_data test_data test_file eval_path"
    ),
    "measure.count": "eval_size eval_samples max_eval_samples num_eval limit",
    "measure.every": "eval_steps eval_every eval_interval val_every eval_strategy",
    "run.checkpoint_every": (
        "save_steps save_every save_interval checkpoint_steps checkpointing_steps"
    ),
    "run.keep": "save_total_limit keep_checkpoints max_checkpoints",
    "run.rollouts_every": "log_completions logging_steps log_every",
    "--steps": (
        "max_steps num_steps train_steps num_train_steps total_steps iterations iters"
        " num_iterations max_iters"
    ),
    "--out": (
        "output_dir output out_dir output_folder output_path save_dir run_dir workdir o save_path"
    ),
    "--data": (
        "dataset train_data data_path train_file dataset_name dataset_path data_file train_dataset"
        " jsonl d"
    ),
    "--model": (
        "model_name model_name_or_path model_path base_model pretrained model_id checkpoint m"
    ),
    "--seed": "random_seed random_state",
    "--resume": "resume_from_checkpoint resume_from restart",
    "--force": "overwrite overwrite_output_dir yes f",
    "--count": "num_examples examples samples max_samples",
    "--set": "override overrides opt s",
    "--backend": "accelerator",
    "--backend cuda": "gpu cuda",
    "--backend mlx": "mlx metal mps",
    "--backend cpu": "cpu no_cuda use_cpu",
    "RECIPE": "config config_file recipe preset cfg c",
}
"""Keys and options, and their names in other trainers."""

SAME = {
    "--steps": "run.steps",
    "--seed": "run.seed",
    "--count": "measure.count",
    "--model": "model.path",
    "--data": "data.path",
}
"""Options of commands, and the keys of the recipe that they set."""

EPOCHS = (
    "epochs",
    "epoch",
    "num_epochs",
    "num_train_epochs",
    "max_epochs",
    "n_epochs",
    "total_epochs",
)


def where(ctx: click.Context | None) -> str:
    """A clause for a message that points to the help of the command."""
    return f" (see: {ctx.command_path} --help)" if ctx else ""


def unknown_option(error: click.NoSuchOption, arguments: Sequence[str]) -> str:
    """The message for an unknown option: what it may mean, with the value that it was given."""
    given, value = _given(error.option_name, arguments)
    name = given.lstrip("-").replace("-", "_").lower()
    command = error.ctx.command if error.ctx else None
    options = [
        option
        for parameter in (command.params if command else ())
        for option in parameter.opts
        if option.startswith("--")
    ]
    if "--set" not in options:
        meant = get_close_matches(error.option_name, options, n=1)
        hint = (
            f"did you mean {meant[0]}?"
            if meant
            else f"known: {', '.join(sorted({*options, '--help'}))}"
        )
        return f"no such option {given}; {hint}{where(error.ctx)}"
    if name in EPOCHS:
        steps = "--steps N" if "--steps" in options else "--set run.steps=N"
        return (
            f"no such option {given}; a run is as long as its steps: {steps}, of rollout.prompts"
            f" rows each{where(error.ctx)}"
        )
    command_name = (error.ctx.info_name if error.ctx else "") or ""
    meant = _meant(name, options, command_name)
    if not meant and error.possibilities:
        return f"{error.format_message().rstrip('.')}{where(error.ctx)}"
    meant = meant or _nearest(name, options, command_name)
    shown = " or ".join(_shown(target, value) for target in meant)
    return (
        f"no such option {given}" + (f"; did you mean {shown}?" if shown else "") + where(error.ctx)
    )


def keys() -> dict[str, list[str]]:
    """Every key of a recipe, with its full names section.key in all sections that have it."""
    from opd.run.recipe import Recipe

    names: dict[str, list[str]] = {}
    for section, field in Recipe.model_fields.items():
        for key in type(field.default).model_fields:
            names.setdefault(key, []).append(f"{section}.{key}")
    return names


def _meant(name: str, options: Sequence[str], command: str) -> list[str]:
    """The options and full keys that are called `name` here or in other trainers; several if
    several sections have the key."""
    if f"--{name.replace('_', '-')}" in options:  # --Steps, --AS_JSON
        return [f"--{name.replace('_', '-')}"]
    known = keys()
    section, _, key = name.rpartition(".")
    if section:
        exact = [full for full in known.get(key, ()) if full == name]
        return exact or [
            full for full in _meant(key, options, command) if full.startswith(f"{section}.")
        ]
    if name in known:
        measuring = command in ("gap", "sample")
        return sorted(known[name], key=lambda full: full.startswith("measure.") != measuring)
    for target, names in ELSEWHERE.items():
        if name in names.split():
            return [target if target.partition(" ")[0] in options else SAME.get(target, target)]
    return []


def _nearest(name: str, options: Sequence[str], command: str) -> list[str]:
    """The options and full keys whose name is nearest to `name`; empty if none is near."""
    names = [*keys()]
    for elsewhere in ELSEWHERE.values():
        names += [other for other in elsewhere.split() if len(other) > 2]
    for full_names in keys().values():
        names += full_names
    close = get_close_matches(name, names, n=1, cutoff=0.75)
    return _meant(close[0], options, command) if close else []


def _shown(target: str, value: str | None) -> str:
    """The arguments to write on the command line for `target`, with `value`."""
    if target == "RECIPE":
        return f"{value or 'my.toml'} without an option's name"
    if target.startswith("--"):
        takes = " " not in target and target != "--force"
        return f"{target} {value}" if takes and value is not None else target
    return (
        f"--set {target}"
        if "=" in target
        else f"--set {target}={'VALUE' if value is None else value}"
    )


def _given(option: str, arguments: Sequence[str]) -> tuple[str, str | None]:
    """The unknown option as the user wrote it (click reads -lr as -l), and the value that follows,
    None if there is none."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        short = re.fullmatch(r"-[^-].*", name) and name.startswith(option)
        if name == option or short:
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            if equals:
                return name, value
            return name, following if following and not re.match(r"-\D", following) else None
    return option, None
