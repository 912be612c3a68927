# SPDX-License-Identifier: Apache-2.0
"""Writes `torch/`: small random models of timm and transformers, and what they compute.

Run it with an interpreter that has torch, timm 1.0.31, transformers 5.23 and safetensors:

  python tests/testdata/make_torch_golden.py

All parameters are random, so that none hides behind a zero or a one. Outputs are computed in
float64 and stored in float32.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import GluMlp, HybridEmbed, LayerNorm, StdConv2dSame, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from timm.models.vision_transformer import VisionTransformer

OUT = Path(__file__).parent / "torch"
IMAGES = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
OTHER_SIZE = (48, 40)  # (height, width), besides that of the position embeddings
PROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 32, "width": 32},
}


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws all parameters anew; scales lie around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        leaf, parent = name.split(".")[-1], name.split(".")[-2] if "." in name else ""
        is_scale = leaf.startswith(("gamma", "lambda")) or (leaf == "weight" and "norm" in parent)
        with torch.no_grad():
            p.copy_(1 + 0.3 * noise if is_scale else 0.2 * noise)
    return model.eval()


def draw_images(height: int, width: int) -> torch.Tensor:
    """Returns float32 `[1, 3, height, width]`."""
    return torch.randn((1, 3, height, width), generator=torch.Generator().manual_seed(7))


def save_case(name: str, tensors: dict, images: torch.Tensor, outputs: dict, **files: dict) -> None:
    """Writes the weights, what they compute, and the JSON files published beside them."""
    folder = OUT / name
    folder.mkdir(parents=True)
    tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    arrays = {k: v.detach().float().numpy() for k, v in outputs.items()}
    other = draw_images(*OTHER_SIZE).permute(0, 2, 3, 1).numpy()
    images = images.permute(0, 2, 3, 1).numpy()
    np.savez(folder / "io.npz", image=images, other_image=other, **arrays)
    for file, content in files.items():
        text = json.dumps(content, indent=2, sort_keys=True)
        (folder / f"{file}.json").write_text(text + "\n")


def save_timm(
    name: str, model: torch.nn.Module, *, architecture: str, heads: int, pool: str, seed: int
) -> None:
    """Saves a model of timm; `architecture` is the published one that has its options."""
    model = randomize(model, seed)
    is_mixer = isinstance(model, MlpMixer)
    size = (model.stem if is_mixer else model.patch_embed).img_size
    images = draw_images(*size)
    config = {
        "architecture": architecture,
        "global_pool": pool,
        "num_classes": model.num_classes,
        "model_args": {} if is_mixer else {"num_heads": heads},
        "pretrained_cfg": {"input_size": [3, *size], **IMAGES},
    }
    tensors = model.state_dict()
    if name == "timm_vit_bfloat16":
        tensors = {k: v.bfloat16() for k, v in tensors.items()}
        model.load_state_dict({k: v.float() for k, v in tensors.items()})
    model = model.double()
    outputs = {"logits": run_timm(model, images)}
    if not isinstance(model, Beit | MlpMixer):  # See `save_resized_biases`; a Mixer has one size.
        model.set_input_size(img_size=OTHER_SIZE)  # It resizes the position embeddings.
        outputs["other_logits"] = run_timm(model, draw_images(*OTHER_SIZE))
    save_case(name, tensors, images, outputs, config=config)


def run_timm(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns the logits of the class token's head, if there are two, in float64."""
    with torch.no_grad():
        if hasattr(model, "head_dist"):
            return model.head(model.forward_features(images.double())[:, 0])
        return model(images.double())


def save_transformers(name: str, model: torch.nn.Module, *, seed: int) -> None:
    """Saves a model of transformers, with the files that its `save_pretrained` writes."""
    model = randomize(model, seed)
    folder = OUT / name
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    model = model.double()
    options = {} if "dinov" in model.config.model_type else {"interpolate_pos_encoding": True}
    arrays = {}
    for prefix, size in (("", (32, 32)), ("other_", OTHER_SIZE)):
        images = draw_images(*size)
        with torch.no_grad():
            out = model(images.double(), **options)
        outputs = {
            "encoded": out.get("last_hidden_state"),
            "pre_logits": out.get("pooler_output"),
            "logits": out.get("cls_logits", out.get("logits")),
        }
        if model.config.model_type not in ("vit", "dinov3_vit"):
            outputs.pop("pre_logits")
        arrays |= {prefix + k: v.float().numpy() for k, v in outputs.items() if v is not None}
        arrays[f"{prefix}image"] = images.permute(0, 2, 3, 1).numpy()
    np.savez(folder / "io.npz", **arrays)
    text = json.dumps(PROCESSOR, indent=2, sort_keys=True)
    (folder / "preprocessor_config.json").write_text(text + "\n")


def hybrid(layers: tuple[int, ...], **kwargs) -> VisionTransformer:
    """A ResNet of half the usual width, or the usual first layers, and a transformer on top."""
    conv = partial(StdConv2dSame, eps=1e-8)
    if layers:
        backbone = ResNetV2(
            layers,
            num_classes=0,
            global_pool="",
            preact=False,
            stem_type="same",
            conv_layer=conv,
            width_factor=0.5,
        )
    else:
        backbone = create_resnetv2_stem(3, stem_type="same", preact=False, conv_layer=conv)
    return VisionTransformer(embed_layer=partial(HybridEmbed, backbone=backbone), **kwargs)


def save_all_timm() -> None:
    small = {"patch_size": 8, "embed_dim": 32, "depth": 2, "mlp_ratio": 2, "num_classes": 5}
    plain = {"img_size": 32, "num_heads": 4, **small}
    save = partial(save_timm, heads=4)
    vit = VisionTransformer
    save("timm_vit", vit(**plain), architecture="vit_tiny_patch16_224", pool="token", seed=0)
    save(
        "timm_vit_bfloat16", vit(**plain), architecture="vit_tiny_patch16_224", pool="token", seed=1
    )
    save(
        "timm_vit_no_embed_class",
        vit(**plain, no_embed_class=True, init_values=1.0, qkv_bias=False),
        architecture="deit3_small_patch16_224",
        pool="token",
        seed=2,
    )
    save(
        "timm_vit_average",
        vit(**plain, global_pool="avg"),
        architecture="eva_large_patch14_196",
        pool="avg",
        seed=3,
    )
    options = {"class_token": False, "reg_tokens": 2, "init_values": 1.0, "qk_norm": True}
    save(
        "timm_vit_registers",
        vit(**plain, **options, global_pool="avg"),
        architecture="vit_so150m_patch16_reg4_gap_256",
        pool="avg",
        seed=4,
    )
    options = {"reg_tokens": 3, "no_embed_class": True, "init_values": 1.0}
    save(
        "timm_vit_swiglu",
        vit(**plain, **options, mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU),
        architecture="vit_giant_patch14_reg4_dinov2",
        pool="token",
        seed=5,
    )
    options = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}
    save(
        "timm_vit_map",
        vit(**plain, **options),
        architecture="vit_base_patch32_siglip_256",
        pool="map",
        seed=6,
    )
    save(
        "timm_deit_distilled",
        VisionTransformerDistilled(**plain),
        architecture="deit_tiny_distilled_patch16_224",
        pool="token",
        seed=7,
    )
    rope = {**small, "img_size": (32, 48), "num_heads": 2, "init_values": 1.0}
    rope |= {"use_rot_pos_emb": True, "num_classes": 5}
    options = {"class_token": False, "num_reg_tokens": 1, "use_abs_pos_emb": False}
    save_timm(
        "timm_eva_rope",
        Eva(**rope, **options, ref_feat_shape=16),
        architecture="vit_medium_patch16_rope_reg1_gap_256",
        pool="avg",
        heads=2,
        seed=8,
    )
    options = {"attn_type": "rope", "rope_grid_indexing": "xy", "rope_temperature": 100.0}
    options |= {"no_embed_class": True, "global_pool": "token"}
    save_timm(
        "timm_eva_rope_ape",
        Eva(**rope | {"img_size": 32}, **options),
        architecture="vit_base_patch16_rope_ape_224",
        pool="token",
        heads=2,
        seed=9,
    )
    options = {"embed_dim": 32, "depth": 1, "mlp_ratio": 2, "num_classes": 5, "num_heads": 4}
    save(
        "timm_hybrid",
        hybrid((1, 1), img_size=32, patch_size=1, **options),
        architecture="vit_small_r26_s32_224",
        pool="token",
        seed=10,
    )
    save(
        "timm_hybrid_stem",
        hybrid((), img_size=32, patch_size=2, **options),
        architecture="vit_tiny_r_s16_p8_224",
        pool="token",
        seed=11,
    )


def save_all_eva() -> None:
    """Saves models of the class `Eva`: EVA, EVA-02 and DINOv3."""
    eva = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    eva |= {"mlp_ratio": 2, "num_classes": 5, "global_pool": "token", "use_fc_norm": False}
    dinov3 = {"rope_type": "dinov3", "rope_rotate_half": True, "rope_temperature": 100.0}
    dinov3 |= {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "dynamic_img_size": True}
    dinov3 |= {"num_reg_tokens": 4, "init_values": 1e-5}
    dinov3 |= {"norm_layer": partial(LayerNorm, eps=1e-5)}
    eva02 = {"swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "qkv_fused": False}
    eva02 |= {"use_rot_pos_emb": True, "ref_feat_shape": (16, 16)}
    cases = {
        "timm_dinov3": (dinov3, "vit_small_patch16_dinov3_qkvb"),
        "timm_dinov3_gated": (
            dinov3 | {"swiglu_mlp": True, "swiglu_align_to": 8, "qkv_bias": False},
            "vit_small_plus_patch16_dinov3",
        ),
        "timm_eva": ({}, "eva_giant_patch14_clip_224"),
        "timm_eva02": (eva02, "eva02_base_patch16_clip_224"),
    }
    for seed, (name, (options, architecture)) in enumerate(cases.items(), 30):
        model = Eva(**eva | options)
        save_timm(name, model, architecture=architecture, pool="token", heads=4, seed=seed)


def save_all_positions() -> None:
    """Saves models whose attention depends on positions by parameters of its own."""
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    sizes |= {"num_classes": 5, "init_values": 0.1}
    beit = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "img_size": (32, 24)}
    mixed = {"img_size": (32, 24), "global_pool": "token", "use_rot_pos_emb": True}
    mixed |= {"attn_type": "rope", "rope_type": "mixed", "rope_grid_indexing": "xy"}
    mixed |= {"rope_temperature": 10.0, "use_fc_norm": False}
    cases = {
        "timm_beit": (Beit(**sizes | beit), "beit_base_patch16_224", "avg"),
        "timm_beit_token": (
            Beit(**sizes | beit | {"img_size": 32, "global_pool": "token"}),
            "beitv2_base_patch16_224",
            "token",
        ),
        "timm_rope_mixed": (
            Eva(**sizes | mixed, use_abs_pos_emb=False),
            "vit_small_patch16_rope_mixed_224",
            "token",
        ),
        "timm_rope_mixed_ape": (
            Eva(**sizes | mixed, use_abs_pos_emb=True, no_embed_class=True),
            "vit_base_patch16_rope_mixed_ape_224",
            "token",
        ),
    }
    perception = {**sizes, "embed_dim": 48, "init_values": None, "global_pool": "map"}
    perception |= {"attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True}
    perception |= {"ref_feat_shape": (24, 24), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy"}
    perception |= {"attn_pool_num_heads": 8, "attn_pool_mlp_ratio": 4.0, "img_size": (32, 24)}
    perception |= {"norm_layer": partial(LayerNorm, eps=1e-5)}
    cases["timm_pe"] = Eva(**perception), "vit_pe_core_tiny_patch16_384", "map"
    for seed, (name, (model, architecture, pool)) in enumerate(cases.items(), 40):
        save_timm(name, model, architecture=architecture, pool=pool, heads=4, seed=seed)


def save_all_mixers() -> None:
    """Saves Mixers whose MLPs compute the exact GELU, and gated ones."""
    sizes = {"img_size": (32, 24), "patch_size": 8, "num_blocks": 2, "embed_dim": 32}
    sizes |= {"num_classes": 5}
    gated = {"mlp_ratio": (1.0, 4.0), "mlp_layer": GluMlp, "act_layer": torch.nn.SiLU}
    cases = {
        "timm_mixer": (MlpMixer(**sizes), "mixer_s32_224"),
        "timm_mixer_gated": (MlpMixer(**sizes, **gated), "gmixer_12_224"),
    }
    for seed, (name, (model, architecture)) in enumerate(cases.items(), 50):
        save_timm(name, model, architecture=architecture, pool="avg", heads=0, seed=seed)


def save_all_transformers() -> None:
    tf = transformers
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"image_size": 32, "patch_size": 8}
    vit = {**sizes, "intermediate_size": 64, "layer_norm_eps": 1e-3}
    labels = {"id2label": {i: str(i) for i in range(5)}}
    save_transformers(
        "hf_vit", tf.ViTForImageClassification(tf.ViTConfig(**vit, **labels)), seed=20
    )
    save_transformers(
        "hf_vit_pooler",
        tf.ViTModel(tf.ViTConfig(**vit, hidden_act="gelu_pytorch_tanh", pooler_output_size=24)),
        seed=21,
    )
    save_transformers(
        "hf_deit",
        tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**vit, **labels)),
        seed=22,
    )
    dinov2 = {**sizes, "mlp_ratio": 2}
    save_transformers("hf_dinov2", tf.Dinov2Model(tf.Dinov2Config(**dinov2)), seed=23)
    registers = {**dinov2, "num_register_tokens": 3, "use_swiglu_ffn": True}
    save_transformers(
        "hf_dinov2_registers",
        tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**registers)),
        seed=24,
    )
    save_transformers(
        "hf_ijepa", tf.IJepaForImageClassification(tf.IJepaConfig(**vit, **labels)), seed=25
    )
    model = tf.Dinov2WithRegistersForImageClassification(
        tf.Dinov2WithRegistersConfig(**dinov2, num_register_tokens=2, **labels)
    )
    save_transformers("hf_dinov2_classifier", model, seed=28)
    dinov3 = {**sizes, "intermediate_size": 64, "num_register_tokens": 4}
    save_transformers("hf_dinov3", tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**dinov3)), seed=26)
    gated = {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False}
    save_transformers(
        "hf_dinov3_gated", tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**dinov3, **gated)), seed=27
    )


def save_resized_positions() -> None:
    """Saves what timm makes of position embeddings `[1, 1 + 4 * 6, 3]`."""
    posemb = torch.randn((1, 25, 3), generator=torch.Generator().manual_seed(11))
    resized = {}
    for height, width in ((2, 3), (3, 9), (7, 5), (6, 6), (1, 13)):
        options = {"new_size": [height, width], "old_size": [4, 6], "num_prefix_tokens": 1}
        options |= {"posemb": posemb}
        resample = partial(timm.layers.resample_abs_pos_embed, **options)
        size = f"{height}_{width}"
        resized[f"bicubic_{size}"] = resample()
        resized[f"bicubic_no_antialias_{size}"] = resample(antialias=False)
        resized[f"bilinear_half_pixel_{size}"] = resample(interpolation="bilinear", antialias=False)
    arrays = {name: x.numpy() for name, x in resized.items()}
    np.savez(OUT / "positions.npz", posemb=posemb.numpy(), **arrays)


def save_resized_biases() -> None:
    """Saves what timm makes of biases by distance in 4x4 patches, `[49 + 3, 2]`, and of a model."""
    table = torch.randn((52, 2), generator=torch.Generator().manual_seed(12))
    arrays = {"table": table.numpy()}
    for rows, columns in ((6, 5), (3, 3), (4, 7), (2, 9), (24, 24), (1, 1)):
        shape = ((2 * rows - 1) * (2 * columns - 1) + 3, 2)
        resized = timm.layers.resize_rel_pos_bias_table(table, (rows, columns), shape)
        arrays[f"{rows}_{columns}"] = resized.numpy()
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
    sizes |= {"num_classes": 5, "init_values": 0.1, "global_pool": "token"}
    options = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "img_size": OTHER_SIZE}
    model = Beit(**sizes | options)
    tensors = load_file(OUT / "timm_beit_token" / "model.safetensors")
    model.load_state_dict(timm.models.beit.checkpoint_filter_fn(tensors, model))
    arrays["logits"] = run_timm(model.double().eval(), draw_images(*OTHER_SIZE)).float().numpy()
    np.savez(OUT / "biases.npz", **arrays)


# Sides of the image: rounding down differs from rounding, and halves of odd numbers occur.
EVALUATED = (75, 113)
TIMM_EVALUATIONS = {
    "timm_bicubic": {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "bicubic"},
    "timm_bilinear": {"input_size": [3, 32, 32], "crop_pct": 0.7, "interpolation": "bilinear"},
    "timm_lanczos": {"input_size": [3, 24, 24], "crop_pct": 0.8, "interpolation": "lanczos"},
    "timm_nearest": {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "nearest"},
    "timm_defaults": {"input_size": [3, 24, 24]},
    "timm_squash": {"input_size": [3, 24, 32], "crop_pct": 0.85, "crop_mode": "squash"},
    "timm_larger": {"input_size": [3, 80, 80], "crop_pct": 1.0, "interpolation": "bicubic"},
}
HF_EVALUATIONS = {
    "hf_vit": {"size": {"height": 32, "width": 24}},
    "hf_deit": {"size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}},
    "hf_bit": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}},
}


def save_evaluations() -> None:
    """Saves what timm and transformers make of an image before they normalise it."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(EVALUATED[::-1], Image.Resampling.BICUBIC), np.float64)
    image = np.clip(smooth + rng.normal(0, 25, smooth.shape), 0, 255).astype(np.uint8)
    arrays, configs = {"image": image}, {}
    for name, config in TIMM_EVALUATIONS.items():
        config = {**config, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
        data = timm.data.resolve_data_config(pretrained_cfg=config)
        transform = timm.data.create_transform(**data, normalize=False)
        arrays[name] = transform(Image.fromarray(image)).permute(1, 2, 0).numpy()
        configs[name] = {"config": {"architecture": "x", "pretrained_cfg": config}}
    classes = {
        "hf_vit": transformers.ViTImageProcessorPil,
        "hf_deit": transformers.DeiTImageProcessorPil,
        "hf_bit": transformers.BitImageProcessorPil,
    }
    for name, options in HF_EVALUATIONS.items():
        processor = classes[name](**options)
        plain = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        arrays[name] = plain["pixel_values"][0].transpose(1, 2, 0).astype(np.uint8)
        configs[name] = {"preprocessor_config": json.loads(processor.to_json_string())}
    np.savez_compressed(OUT / "evaluation.npz", **arrays)
    text = json.dumps(configs, indent=2, sort_keys=True)
    (OUT / "evaluation.json").write_text(text + "\n")


if __name__ == "__main__":
    for folder in filter(Path.is_dir, OUT.iterdir()):
        shutil.rmtree(folder)
    print(f"timm {timm.__version__}, transformers {transformers.__version__}")
    save_all_timm()
    save_all_eva()
    save_all_positions()
    save_all_mixers()
    save_all_transformers()
    save_resized_positions()
    save_resized_biases()
    save_evaluations()
