# SPDX-License-Identifier: Apache-2.0
"""What the user probably meant: the end of an error about a name, a config key or a folder.

Nothing here imports a library, so that a typo is reported at once.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vit_jax.utils.layout import CHECKPOINTS, CONFIG, LEDGER, METRICS
from vit_jax.utils.mirrors import Mirror, find_mirror


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Config keys, and the names that timm, Lightning, Transformers and others have for them. A name
# may be in several rows. NAME is that of an evaluator.
_KEYS = {
    "optimizer.name": "opt optim optimizer_class optimizer_name",
    "optimizer.lr": "learning_rate base_lr init_lr max_lr blr peak_lr",
    "optimizer.weight_decay": "wd",
    "optimizer.schedule": "sched scheduler lr_scheduler lr_schedule lr_scheduler_type decay_type",
    "optimizer.warmup_steps": "warmup num_warmup_steps warmup_iters",
    "optimizer.warmup_epochs": "warmup",
    "optimizer.warmup_percent": "warmup_ratio warmup_fraction pct_start",
    "optimizer.start_lr": "warmup_lr warmup_lr_init warmup_start_lr",
    "optimizer.end_lr": "min_lr lr_min eta_min final_lr",
    "optimizer.grad_clip_norm": "clip_grad clip_grad_norm clip_norm grad_clip gradient_clip "
    "gradient_clip_val gradient_clipping max_grad_norm",
    "optimizer.accum_steps": "accum accumulate_grad_batches accumulation_steps grad_accum "
    "grad_accum_steps gradient_accumulation_steps",
    "optimizer.layer_decay": "layer_decay_rate llrd lr_layer_decay",
    "optimizer.freeze": "freeze_backbone freeze_encoder freeze_layers frozen",
    "optimizer.eps": "opt_eps adam_epsilon epsilon",
    "optimizer.b1": "opt_betas betas beta1 adam_beta1",
    "optimizer.b2": "opt_betas betas beta2 adam_beta2",
    "optimizer.momentum": "opt_momentum",
    "epochs": "epoch max_epochs n_epochs nb_epochs num_epochs num_train_epochs",
    "total_steps": "iterations max_iters max_steps num_steps num_train_steps train_steps "
    "training_steps",
    "data.name": "data_path data_root dataset_name datamodule dataset train_dir",
    "data.split": "train_split",
    "data.batch_size": "batch bs global_batch_size per_device_batch_size "
    "per_device_train_batch_size train_batch_size",
    "data.num_threads": "dataloader_num_workers num_workers workers",
    "data.shuffle_window": "buffer_size shuffle_buffer shuffle_buffer_size shuffle_size",
    "data.repeats": "aug_repeats ra_sampler repeated_aug",
    "data.preprocess": "aa auto_augment augment augmentation crop_pct crop_size image_size "
    "img_size input_size interpolation rand_augment resolution transform transforms "
    "random_resized_crop random_crop",
    "model.variant": "arch architecture backbone model_name",
    "model.patch_size": "patch",
    "model.num_layers": "depth layers n_layers num_hidden_layers",
    "model.hidden_size": "d_model dim emb_dim embed_dim hidden_dim width",
    "model.num_heads": "heads n_heads num_attention_heads",
    "model.mlp_dim": "ff_dim intermediate_size mlp_ratio",
    "model.num_classes": "n_classes nb_classes num_labels",
    "model.classifier": "global_pool pool pool_type pooling",
    "model.num_registers": "reg_tokens register_tokens registers",
    "model.position_embedding": "pos_embed",
    "model.layer_scale_init": "init_values layer_scale",
    "model.activation": "act_layer hidden_act",
    "model.dropout_rate": "drop drop_rate dropout hidden_dropout_prob proj_drop",
    "model.attention_dropout_rate": "attention_dropout attention_probs_dropout_prob attn_drop "
    "attn_drop_rate",
    "model.stochastic_depth_rate": "drop_path drop_path_rate stochastic_depth "
    "stochastic_depth_prob",
    "model.patch_dropout_rate": "patch_drop_rate patch_dropout",
    "lora.rank": "lora_r lora_rank r",
    "lora.alpha": "lora_alpha",
    "lora.base": "load_in_8bit",
    "lora.targets": "lora_target_modules target_modules",
    "lora.patterns": "rank_pattern alpha_pattern",
    "lora.scaling": "use_rslora",
    "lora.method": "use_dora peft_type",
    "lora.train": "modules_to_save",
    "model.remat": "checkpoint_activations grad_checkpointing gradient_checkpointing",
    "objective.loss": "bce_loss criterion loss_fn",
    "objective.label_smoothing": "label_smooth smoothing",
    "objective.class_weights": "class_weight",
    "objective.flip": "flip_lr hflip horizontal_flip random_flip random_horizontal_flip",
    "objective.mixup": "mixup_alpha",
    "objective.cutmix": "cutmix_alpha",
    "objective.random_erasing": "random_erase reprob",
    "objective.random_erasing_mode": "remode",
    "objective.pixel_mean": "mean image_mean",
    "objective.pixel_std": "std image_std",
    "objective.teacher": "teacher_model teacher_path",
    "ema_decay": "ema ema_rate model_ema model_ema_decay use_ema",
    "ema_warmup": "model_ema_warmup",
    "precision": "amp amp_dtype bf16 fp16 half_precision mixed_precision",
    "seed": "manual_seed random_seed rng_seed seed_everything",
    "init_from": "checkpoint_path ckpt_path finetune finetune_from initial_checkpoint load_from "
    "model_path pretrained pretrained_path pretrained_weights resume_from weights",
    "mesh.data": "data_parallel devices dp gpus num_devices num_gpus strategy",
    "mesh.tensor": "model_parallel tensor_parallel tp",
    "mesh.fsdp": "strategy",
    "log_every": "log_every_n_steps log_freq log_interval logging_steps print_every print_freq",
    "checkpoint.every": "ckpt_every every_n_train_steps save_every save_freq save_interval "
    "save_steps",
    "checkpoint.keep": "checkpoint_hist max_to_keep save_top_k save_total_limit",
    "stop.metric": "early_stop early_stopping early_stopping_metric monitor",
    "stop.patience": "early_stop early_stopping early_stopping_patience patience_epochs",
    "checkpoint.keep_best": "best_metric eval_metric metric_for_best_model monitor save_best",
    "evals.NAME.split": "eval_split test_split val_split",
    "evals.NAME.preprocess": "eval_transform test_transform val_transform val_transforms",
    "evals.NAME.batch_size": "eval_batch_size per_device_eval_batch_size val_batch_size "
    "validation_batch_size",
    "evals.NAME.every": "eval_interval eval_steps val_check_interval val_interval",
    "evals.NAME.every_epochs": "check_val_every_n_epoch eval_epochs",
    "tracking.trackers": "log_wandb logger loggers report_to use_wandb wandb",
    "tracking.project": "wandb_project",
    "tracking.run": "exp_name experiment experiment_name run_name wandb_name",
    "--config": "cfg config_file config_path recipe",
    "--platform": "accelerator device",
    "vit_jax sweep": "hparams multirun sweep",
    "--workdir": "default_root_dir dirpath log_dir logdir out_dir outdir output output_dir "
    "root_dir save_dir",
}

# Sections of the configs of other projects, whose keys are elsewhere here.
_FOREIGN_SECTIONS = _words(
    "args callbacks cfg config fit hparams hyperparameters initargs kwargs learner params run "
    "solver system train trainer training trainingargs trainingarguments"
)
# Keys of such sections that name a class.
_NAMES_OF_PARTS = _words("class classpath name target type")

# The path of a class, such as torch.optim.AdamW.
_CLASS = re.compile(r"(?:[a-z_]\w*\.)+([A-Z]\w*)")

# Names of parts and choices, and what other projects call them.
_NAMES = {
    "adamw": "adam_w torch_adamw fused_adamw deepspeed_cpu_adam nadamw",
    "adam": "fused_adam",
    "lamb": "fused_lamb lambc",
    "lars": "larc",
    "schedule_free_adamw": "adamw_schedule_free schedule_free",
    "sgd": "momentum nesterov torch_sgd fused_sgd",
    "softmax": "ce cross_entropy cross_entropy_loss categorical_crossentropy softmax_xent "
    "label_smoothing_cross_entropy soft_target_cross_entropy nll_loss",
    "sigmoid": "bce bce_loss bce_with_logits bce_with_logits_loss binary_cross_entropy "
    "sigmoid_xent",
    "cosine": "cosine_annealing cosine_annealing_lr cosine_annealing_warm_restarts cosine_decay "
    "cosine_lr cosine_lr_scheduler cosine_with_warmup cosine_with_restarts one_cycle one_cycle_lr "
    "linear_warmup_cosine_annealing_lr warmup_cosine warmup_cosine_lr",
    "linear": "linear_lr linear_with_warmup poly polynomial polynomial_lr warmup_linear",
    "exponential": "exponential_lr exponential_decay",
    "rsqrt": "inverse_sqrt inverse_square_root noam",
    "constant": "none const fixed constant_lr constant_with_warmup",
    "float32": "fp32 32 32_true single full tf32",
    "bfloat16": "amp bf16 bf16_mixed fp16 16 16_mixed float16 half mixed mixed_bfloat16 "
    "mixed_float16",
    "float8": "fp8",
    "flip_lr": "flip hflip horizontal_flip random_flip random_horizontal_flip",
    "inception_crop": "random_resized_crop rrc random_resize_crop",
    "central_crop": "center_crop",
    "grayscale": "random_grayscale",
    "decode": "to_tensor decode_image to_image pil_to_tensor",
    "imagenet2012": "imagenet imagenet1k ilsvrc ilsvrc2012 imagenet_1k",
    "gap": "avg mean average global_average",
    "token": "cls class_token cls_token",
    "map": "attention attn attention_pooling",
    "gelu": "gelu_exact",
    "vit": "visiontransformer vision_transformer",
    "mixer": "mlp_mixer mlpmixer",
    "wandb": "weights_and_biases weightsandbiases",
    "safetensors": "timm torch pytorch pt pth",
    "transformers": "hf huggingface hugging_face",
    "savedmodel": "tf tensorflow tflite",
    "npz": "numpy jax",
}

# Names and workdirs that are listed at most, and folders in which workdirs are looked for.
_MOST_NAMES, _MOST_LISTED, _MOST_FOLDERS = 40, 3, 200


def fold(name: str) -> str:
    """Returns a name without case and separators: `B/16`, `b_16` and `B16` become the same."""
    return re.sub(r"[^0-9a-z+]", "", name.lower())


def _invert(table: Mapping[str, str]) -> dict[str, list[str]]:
    inverted: dict[str, list[str]] = {}
    for ours, names in table.items():
        for name in names.split():
            inverted.setdefault(fold(name), []).append(ours)
    return inverted


_OUR_KEYS, _OUR_NAMES = _invert(_KEYS), _invert(_NAMES)


def known_keys() -> tuple[str, ...]:
    """The config keys and flags that `suggest_key` gives for names of other projects."""
    return tuple(_KEYS)


def find_near(name: str, options: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Returns the option that is meant by a name, in another spelling or of another project.

    Args:
      name: as the user wrote it.
      options: names that there are.
      cutoff: how similar another name must be, see `difflib.get_close_matches`.
    """
    options = sorted(options)
    folded: dict[str, str] = {}
    for option in options:
        folded.setdefault(fold(option), option)
    if fold(name) in folded:
        return folded[fold(name)]
    for ours in _OUR_NAMES.get(fold(name), ()):
        if ours in options:
            return ours
    lower = {option.lower(): option for option in reversed(options)}
    near = difflib.get_close_matches(name.lower(), sorted(lower), n=1, cutoff=cutoff)
    if not near and (named := _CLASS.fullmatch(name)):
        return find_near(named[1], options, cutoff=cutoff)
    return lower[near[0]] if near else None


def suggest(name: str, options: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` or the list of options, to append to an error."""
    options = sorted(options)
    near = find_near(name, options)
    return _list(options) if near is None else f"; did you mean {near!r}?"


def _list(options: Iterable[str]) -> str:
    options = sorted(options)
    if not options:
        return ""
    more = f", ... ({len(options)} in all)" if len(options) > _MOST_NAMES else ""
    return f"; there is: {', '.join(options[:_MOST_NAMES])}{more}"


def suggest_key(
    key: str,
    allowed: Iterable[str],
    everywhere: Mapping[str, Sequence[str]] | None = None,
    *,
    below: Sequence[str] = (),
) -> str:
    """Returns which config key is meant by an unknown one, to append to an error.

    Args:
      key: dotted, without a leading `config.`.
      allowed: names that its section takes.
      everywhere: all dotted keys; of a key that only some parts take, the names of these parts.
      below: the keys within it that lead to a value, as of a section that another project has:
        ("max_epochs",) of `trainer.max_epochs`.
    """
    section, _, name = key.rpartition(".")
    everywhere = everywhere or {}
    if below and (found := _find_below(key, below, everywhere)):
        return _ask(*map(_flag, found))
    if owners := everywhere.get(key):
        return f"; it is a key of {section}.name={' or '.join(map(repr, owners))}"
    # A constructor from outside may lack a key that all others take.
    everywhere = {other: names for other, names in everywhere.items() if other != key}
    prefix = f"{section}." if section else ""
    own = {fold(option): f"{prefix}{option}" for option in allowed}
    if fold(name) in own:
        return _ask(_flag(own[fold(name)]))
    if found := _find_same(name, prefix, everywhere):
        return _ask(*map(_flag, found))
    if fold(name) in _NAMES_OF_PARTS and f"{prefix}name" in everywhere:
        return _ask(_flag(f"{prefix}name"))
    if fold(name) in _FOREIGN_SECTIONS:
        return _list(allowed)
    # The names of the section first, then those of all sections.
    leaves: dict[str, list[str]] = {}
    for other in everywhere:
        leaves.setdefault(_leaf(other).lower(), []).append(other)
    near = difflib.get_close_matches(name.lower(), leaves, n=1, cutoff=0.75)
    close = find_near(name, allowed)
    if near and (close is None or _ratio(name, near[0]) > _ratio(name, close)):
        return _ask(*map(_flag, _prefer(leaves[near[0]])))
    if close is not None:
        return _ask(_flag(f"{prefix}{close}"))
    return _list(allowed)


def _find_below(
    key: str, below: Sequence[str], everywhere: Mapping[str, Sequence[str]]
) -> list[str]:
    """The keys that are meant by a value within a section of another project."""
    leaf = below[-1]
    if fold(leaf) in _NAMES_OF_PARTS:  # What it names shows only the section.
        leaf = below[-2] if len(below) > 1 else _leaf(key)
    # `modle.hidden_size`: the section with nearly this name, if it has the key.
    near = find_near(_leaf(key), {other.partition(".")[0] for other in everywhere})
    return _find_same(leaf, f"{near}.", everywhere)


def _find_same(name: str, prefix: str, everywhere: Mapping[str, Sequence[str]]) -> list[str]:
    """The keys of this name, or that another project calls so; those with the prefix first."""
    same = [other for other in everywhere if fold(_leaf(other)) == fold(name)]
    foreign = _OUR_KEYS.get(fold(name), [])
    for found in (same, foreign):
        if own := [other for other in found if prefix and other.startswith(prefix)]:
            return own
    return _prefer(same) or foreign


def suggest_flag(name: str) -> str:
    """Returns the config key that is meant by an unknown flag, to append to an error, or nothing.

    Args:
      name: of the flag, with or without hyphens in front and a value behind it.
    """
    name = name.lstrip("-").partition("=")[0]
    if name in _KEYS:  # Such as --optimizer.lr, without config.
        return _ask(_flag(name))
    folded = fold(_leaf(name))
    same = [key for key in _KEYS if fold(_leaf(key)) == folded]
    found = _prefer(same) or _OUR_KEYS.get(folded, [])
    return _ask(*map(_flag, found)) if found else ""


def _flag(key: str) -> str:
    """A key as it is typed; other flags, commands, and keys within a list stay as they are."""
    within_list = "[" in key or key.startswith("optimizer.schedules.")
    return key if key.startswith("--") or " " in key or within_list else f"--config.{key}"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


def _prefer(keys: Sequence[str]) -> list[str]:
    """Keys of training, where evaluators have one of the same name."""
    return [key for key in keys if not key.startswith("evals.")] or list(keys)


def _ask(*keys: str) -> str:
    return f"; did you mean {' or '.join(map(repr, keys[:3]))}?"


def find_near_path(path: Path) -> Path | None:
    """Returns the existing path that is nearly named by one that does not exist; None for none."""
    found = Path(path.anchor or ".")
    for part in path.parts[bool(path.anchor) :]:
        if not os.path.lexists(found / part):
            try:
                near = find_near(part, os.listdir(found), cutoff=0.75)
            except OSError:
                return None
            if near is None:
                return None
            part = near
        found /= part
    return found


def suggest_path(path: Path) -> str:
    """Returns which existing path is meant, to append to an error, or nothing."""
    near = None if os.path.lexists(path) else find_near_path(path)
    return "" if near is None else _ask(str(near))


def suggest_workdir(path: Path) -> str:
    """Returns what a path is that is no workdir, and which workdir is meant, to append to an error.

    The text is empty where there is nothing to say.
    """
    if _is_workdir(path):
        return ""
    for parent in dict.fromkeys([*path.parents, *path.absolute().parents]):
        if _is_workdir(parent):
            return f"; {path} is within a workdir: did you mean {str(parent)!r}?"
    if not os.path.lexists(path):
        near = find_near_path(path)
        if near is None or not os.path.isdir(near):
            return "; it does not exist"
        return f"; it does not exist{_ask(str(near))}"
    if os.path.isfile(path):
        kind = "a config file" if path.suffix == ".py" else "a file"
        return f"; {path} is {kind}: give the folder that `vit_jax train` got as --workdir"
    return _describe_folder(path)


def _is_workdir(folder: Path) -> bool:
    names = (METRICS, LEDGER, CHECKPOINTS)
    found = (os.path.exists(folder / name) for name in names)
    return os.path.isfile(folder / CONFIG) and any(found)


def _describe_folder(folder: Path) -> str:
    if (mirror := find_mirror(folder)) is not None:
        return _describe_bucket(mirror)
    try:
        names = sorted(os.listdir(folder))
    except OSError as e:
        return f"; {folder} can't be read ({e.strerror})"
    if not names:
        return f"; {folder} is empty: no run has begun there"
    runs = _find_workdirs(folder)
    if runs:
        listed = " or ".join(repr(str(run)) for run in runs[:_MOST_LISTED])
        held = "the workdir of a run" if len(runs) == 1 else f"{len(runs)} workdirs"
        return f"; {folder} holds {held}: did you mean {listed}?"
    if any(name.endswith(".py") for name in names):
        return f"; {folder} holds Python files, such as {folder / _first(names, '.py')}"
    return f"; {folder} holds {', '.join(names[:_MOST_LISTED])}{', ...' * (len(names) > 3)}"


def _describe_bucket(mirror: Mirror) -> str:
    try:
        names = mirror.bucket.list()
    except OSError as e:
        return f"; {e.strerror}"
    runs = [name.removesuffix(f"/{CONFIG}") for name in names if name.endswith(f"/{CONFIG}")]
    if runs:
        listed = " or ".join(repr(f"{mirror.url}/{run}") for run in runs[:_MOST_LISTED])
        return f"; did you mean {listed}?"
    if names:
        return f"; it holds {', '.join(names[:_MOST_LISTED])}{', ...' * (len(names) > 3)}"
    # Google's store does not tell a missing bucket from one without such objects.
    return "; nothing is stored there: no run has begun, or the bucket or the path is another"


def _find_workdirs(folder: Path) -> list[Path]:
    """The workdirs below a folder, at most two levels down."""
    below: list[Path] = []
    todo = [folder]
    for _ in range(2):
        todo = [path for parent in todo[:_MOST_FOLDERS] for path in _folders_in(parent)]
        below += [path for path in todo if _is_workdir(path)]
        todo = [path for path in todo if not _is_workdir(path)]
    return below


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _first(names: Sequence[str], suffix: str) -> str:
    return next(name for name in names if name.endswith(suffix))
