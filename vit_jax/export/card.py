# SPDX-License-Identifier: Apache-2.0
"""The card of an exported model: `README.md` in the format of the Hugging Face hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import vit_jax
from vit_jax.checkpoint.listing import is_step
from vit_jax.data.sources import KINDS
from vit_jax.export.measure import Cost
from vit_jax.export.schemes import DYNAMIC
from vit_jax.export.signature import SIGNATURE, name_source, without_folders
from vit_jax.inference.model import LoadedModel
from vit_jax.observe.jsonl import read_metrics
from vit_jax.utils.layout import LABELS
from vit_jax.utils.text import printable
from vit_jax.utils.tree import count

CARD = "README.md"

# Keys that hold paths of this machine.
_LOCAL_KEYS = ("data_dir", "init_from", "teacher", "real_json", "class_weights")
# Keys that hold names of datasets.
_NAME_KEYS = ("name", "data_name", "mixture")

_LOAD = """```python
import vit_jax

model = vit_jax.load_model("model.{name}")
prediction = model(model.preprocess("photo.jpg"))
```"""
_USE = {
    "npz": _LOAD,
    "safetensors": """With timm, and with transformers where timm is installed, from the folder or
from the hub (`hf-hub:USER/NAME`):

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
```

With vit_jax:

"""
    + _LOAD,
    "transformers": """With transformers, from the folder or from the hub:

```python
from transformers import AutoModel  # or AutoModelForImageClassification, with a classifier

model = AutoModel.from_pretrained("FOLDER").eval()
```

With vit_jax:

"""
    + _LOAD.replace("model.{name}", "model.safetensors"),
    "stablehlo": """With JAX alone, on a CPU, GPU or TPU:

```python
import pathlib
from jax import export

call = export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes())).call
{output} = call(images)
```""",
    "onnx": """With ONNX Runtime:

```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
({output},) = session.run(None, {{"images": images}})
```""",
    "savedmodel": """With TensorFlow:

```python
import tensorflow as tf

serve = tf.saved_model.load("model.savedmodel").signatures["serving_default"]
(({output}),) = serve(images=tf.constant(images)).values()
```""",
}


def read_results(model: LoadedModel, *, params: str) -> list[tuple[str, str, float]]:
    """Returns (evaluator, metric, value) of each result of a run at the loaded checkpoint.

    The results are those of the loaded parameters, `params` ("raw" or "ema"); the list is empty for
    weights that are not of a run.
    """
    step = Path(model.source).name
    if model.workdir is None or not is_step(step):
        return []
    names = {f"{name}_ema" if params == "ema" else name: name for name in model.config["evals"]}
    results = {}
    for record in read_metrics(model.workdir):
        if record["step"] == int(step):
            for key, value in record.items():
                prefix, _, metric = key.rpartition("/")
                if prefix in names:
                    results[names[prefix], metric] = value
    return [(*key, value) for key, value in results.items()]


def make_card(
    model: LoadedModel,
    formats: Sequence[str],
    layer: str,
    *,
    name: str,
    license_id: str | None,
    params: str,
    quantize: str | None = None,
    costs: Mapping[str, Cost] = MappingProxyType({}),
) -> str:
    """Returns the text of the card of a model whose programs return the output of `layer`.

    `license_id` is the licence of the weights by its name on the hub, None if it is not known.
    `params` are the parameters that were loaded, "raw" or "ema". `quantize` is the scheme of
    quantized programs, and `costs` what was measured of them by format.
    """
    results = read_results(model, params=params)
    kind = model.arguments.get("name", "vit")
    kinds = {"mixer": "Mixer", "vit": "Vision Transformer", "two_towers": "model"}
    kind = kinds.get(kind, f"`{kind}`")
    classes = f"{model.module.num_classes} classes" if model.classifies else "no classifier"
    if model.texts is not None:
        classes = f"and texts of up to {model.texts.module.context_length} tokens"
    parts = [
        _front_matter(model, formats, results, name=name, license_id=license_id),
        f"# {name}",
        f"A {kind} of {count(model.list_params()):,} parameters for images of "
        f"{model.image_shape[0]}x{model.image_shape[1]}, with {classes}; "
        f"made by vit_jax {vit_jax.__version__} from `{name_source(model)}`"
        + (", the average of its parameters." if params == "ema" else "."),
        *_show_results(model, results),
        *_show_quantization(quantize, costs),
        *_show_training(model),
        *_show_use(model, formats, layer),
        "## Licence",
        license_id or "Not stated: ask whoever published this model before you use it.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(
    model: LoadedModel,
    formats: Sequence[str],
    results: Sequence[tuple[str, str, float]],
    *,
    name: str,
    license_id: str | None,
) -> str:
    task = "image-classification" if model.classifies else "image-feature-extraction"
    data = _data_name(model.config)
    fields: dict[str, Any] = {
        "license": license_id or "unknown",
        "library_name": "vit_jax",
        "pipeline_tag": task,
        "tags": ["jax", "vision", *formats],
    }
    if data is not None:
        fields["datasets"] = [data]
    found = [
        {
            "task": {"type": task},
            "dataset": {"name": source, "type": source, "split": split},
            "metrics": [{"type": "accuracy", "name": f"{evaluator} top-1", "value": value}],
        }
        for evaluator, metric, value in results
        if metric == "top1"
        for source, split in [_judged_on(model.config, evaluator)]
    ]
    if found:
        fields["metrics"] = ["accuracy"]
        fields["model-index"] = [{"name": name, "results": found}]
    # JSON is valid YAML.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _show_results(model: LoadedModel, results: Sequence[tuple[str, str, float]]) -> list[str]:
    if not results:
        return ["## Results", "No evaluation of these parameters is known."]
    rows = ["| evaluation | data | metric | value |", "| --- | --- | --- | --- |"]
    for evaluator, metric, value in results:
        source, split = _judged_on(model.config, evaluator)
        rows.append(f"| {evaluator} | {source}, {split} | {metric} | {value:.6g} |")
    return ["## Results", "\n".join(rows)]


def _show_quantization(quantize: str | None, costs: Mapping[str, Cost]) -> list[str]:
    if quantize is None:
        return []
    text = (
        "Kernels of matrix products and convolutions are int8 with one scale per output channel; "
        "embeddings, norms and biases are float32. The results above are of the model before."
    )
    if quantize == DYNAMIC:
        text += (
            " Inputs of dense layers become uint8 by their range, which is measured at each call "
            "over the whole batch, so an output depends on the other images of its batch."
        )
    measured = [f"- `model.{name}`: {cost.describe()}" for name, cost in costs.items()]
    return ["## Quantization", text, "\n".join(measured)]


def _show_training(model: LoadedModel) -> list[str]:
    config = model.config
    if "data" not in config:
        return []
    data, optimizer = config["data"], config.get("optimizer") or {}
    lines = [
        f"- data: {_data_name(config)}, {data.get('split')}, in batches of {data['batch_size']}",
        f"- preparation of images: `{without_folders(str(data.get('preprocess')))}`",
        f"- objective: {(config.get('objective') or {}).get('name')}",
        f"- optimizer: {optimizer.get('name')}, learning rate {optimizer.get('lr')}",
        f"- steps: {Path(model.source).name} of {config.get('total_steps')}",
    ]
    text = json.dumps(_without_paths(config), indent=1, sort_keys=True, ensure_ascii=False)
    details = f"<details><summary>The whole config</summary>\n\n```json\n{text}\n```\n\n</details>"
    return ["## Training", "\n".join(lines), details]


def _show_use(model: LoadedModel, formats: Sequence[str], layer: str) -> list[str]:
    height, width, _ = model.image_shape
    parts = [
        "## Images",
        f"`{without_folders(model.preparation.line)}` makes the input, then pixels in [0, 1] have "
        f"the mean {model.pixel_mean} subtracted and are divided by {model.pixel_std}.",
        "## Use",
    ]
    programs = [name for name in formats if name in ("stablehlo", "onnx", "savedmodel")]
    output = layer.rpartition("/")[2]
    if programs:
        parts.append(
            f"`images` are uint8 `[n, {height}, {width}, 3]`, RGB: decode and resize them; the "
            f"program does the rest, and gives float32 `{layer}`. See `{SIGNATURE}`."
        )
    for name in formats:
        # Two towers have the names and the class of transformers in either format.
        use = "transformers" if name == "safetensors" and model.texts is not None else name
        text = _USE[use].format(name=name, output=output)
        if model.texts is not None:
            text = text.replace(
                'model(model.preprocess("photo.jpg"))',
                'model("photo.jpg", labels=["a cat", "a dog"])',
            )
        parts.append(text)
    if "safetensors" in formats and "pre_logits" in model.params:
        parts.append(
            "`model.safetensors` has no classifier: timm has no tanh layer (`pre_logits`) before "
            "its head. It gives features: `model.forward_features(images)` of timm, "
            "`model.features(images)` of vit_jax."
        )
    if model.classifies:
        what = "a sigmoid" if model.loss == "sigmoid" else "a softmax"
        names = f" Class names are in `{LABELS}`, a line each." if model.class_names else ""
        scaled = "" if model.temperature == 1 else f" divided by {model.temperature:.6g}"
        parts.append(f"Probabilities are {what} of the logits{scaled}.{names}")
    return parts


def _data_name(config: Mapping[str, Any]) -> str | None:
    data = config.get("data") or {}
    if data.get("name"):
        return _without_folder(data["name"])
    names = [_without_folder(source["name"]) for source in data.get("mixture") or ()]
    return " + ".join(names) or None


def _judged_on(config: Mapping[str, Any], evaluator: str) -> tuple[str, str]:
    """The dataset and split of an evaluator."""
    section = config["evals"][evaluator]
    source = section.get("data_name")
    name = _without_folder(source) if source else _data_name(config)
    return name or "unknown", str(section.get("split"))


def _without_folder(name: str) -> str:
    """Returns the name of a dataset; of one in files, the kind and the last part of its path."""
    kind, colon, path = name.partition(":")
    if colon and kind in KINDS and "://" not in path:
        return printable(f"{kind}:{Path(path).name}")
    return without_folders(name)


def _without_paths(value: Any, key: str = "") -> Any:
    """Replaces paths of the machine in a config by their last part."""
    if isinstance(value, Mapping):
        return {k: _without_paths(v, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(v, key) for v in value]
    if not isinstance(value, str):
        return value
    if key in _NAME_KEYS:
        return _without_folder(value)
    if key in _LOCAL_KEYS and "://" not in value:
        return printable(Path(value).name)
    return without_folders(value)
