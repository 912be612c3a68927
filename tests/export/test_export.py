# SPDX-License-Identifier: Apache-2.0
"""The command that writes models for other programs."""

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax import export
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.checkpoint.pretrained.test_image_text import put
from tests.trained import MIXER, write_model, write_towers
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors
from vit_jax.export import stablehlo
from vit_jax.export.__main__ import main
from vit_jax.export.compare import check_size, compare_outputs
from vit_jax.inference.model import load_model
from vit_jax.utils.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES = ["ant", "bee", "ça va"]

# What a program that knows only JAX does with a folder that was written.
USE_WITH_JAX_ALONE = """
import json, pathlib, sys
import numpy as np
from jax import export
folder = pathlib.Path(sys.argv[1])
call = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes())).call
np.save(sys.argv[3], call(np.load(sys.argv[2])))
assert not any(name.startswith(("vit_jax", "flax")) for name in sys.modules)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models of three classes, and their names."""
    folder = tmp_path_factory.mktemp("export")
    write_model(folder / "vit.npz")
    write_model(folder / "mixer.npz", MIXER)
    write_model(folder / "headless.npz", classes=0, dtype="bfloat16", rope_theta=100.0)
    write_towers(folder / "towers.npz")
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return folder


@pytest.fixture(scope="module")
def written(place):
    """A folder with `vit.npz` in all formats that need no other package."""
    source = [f"--checkpoint={place / 'vit.npz'}", f"--labels={place / 'names.txt'}"]
    main([*source, "--to=stablehlo,npz,safetensors", f"--output={place / 'written'}"])
    return place / "written"


def test_no_file_has_a_path_of_this_machine(written):
    files = [path for path in written.rglob("*") if path.is_file()]
    assert len(files) >= 7
    for path in files:
        content = path.read_bytes()
        for words in (str(ROOT), str(written.parent), sys.prefix, "site-packages"):
            assert words.encode() not in content, (path.name, words)


@pytest.fixture
def call(place, said, tmp_path):
    """Exports a model to a folder, and gives that and what the command said."""

    def run(model, *arguments):
        output = tmp_path / "out"
        main([f"--checkpoint={place / model}", f"--output={output}", *arguments])
        return output, said

    return run


def make_images(rows, size=8):
    return np.random.default_rng(5).integers(0, 256, (rows, size, size, 3), np.uint8)


def test_a_program_needs_jax_alone_and_takes_any_number_of_images(written, place, tmp_path):
    model = load_model(place / "vit.npz")
    images = make_images(7)
    np.save(tmp_path / "in.npy", images)
    script = [sys.executable, "-c", USE_WITH_JAX_ALONE, str(written)]
    files = [str(tmp_path / "in.npy"), str(tmp_path / "out.npy")]
    subprocess.run([*script, *files], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(files[1]), model(images).logits, atol=1e-6)
    program = export.deserialize(bytearray((written / "model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")


def test_the_signature_says_what_goes_in_and_what_is_left_to_do(written, place):
    found = json.loads((written / "signature.json").read_text())
    assert found["files"] == {"stablehlo": "model.stablehlo"}
    assert found["input"]["shape"] == ["batch", 8, 8, 3]
    assert found["input"]["dtype"] == "uint8"
    assert found["output"] == {"name": "logits", "dtype": "float32", "shape": ["batch", 3]}
    inside = {"divide_by": 255, "mean": 0.4, "std": 0.3}
    assert found["preprocess"] == {"outside": "decode|resize(8, 8)", "inside": inside}
    assert found["probabilities"] == "softmax"
    assert found["class_names"] == NAMES
    assert (written / "labels.txt").read_text() == (place / "names.txt").read_text()


def test_weights_are_read_again_as_the_same_model(written, place):
    images = make_images(2)
    expected = load_model(place / "vit.npz")(images).logits
    for name in ("model.npz", "model.safetensors"):
        again = load_model(written / name)
        np.testing.assert_allclose(again(images).logits, expected, atol=1e-6)
        assert (again.pixel_mean, again.preparation.line) == (0.4, "decode|resize(8, 8)")
        assert list(again.class_names) == NAMES


def test_a_model_is_exported_as_it_was_asked_for(call):
    output, said = call("vit.npz", "--to=npz", "--preprocess=decode|resize(16)")
    assert said[-2] == f"wrote {output / 'model.json'} (0.4 kB)"
    assert not any(".tmp" in x for x in said)
    line = "model.npz: read back: every parameter is the same, and so is the model that is rebuilt"
    assert any(x.startswith(line) for x in said)
    # Position embeddings have been resized, and the file knows the size of images.
    again = load_model(output / "model.npz")
    assert again.image_shape == (16, 16, 3)
    assert again.params["Transformer"]["posembed_input"]["pos_embedding"].shape == (1, 17, 16)


def test_of_a_model_without_a_classifier_features_are_exported_and_that_is_said(call, place):
    output, said = call("headless.npz", "--to=stablehlo")
    source = place / "headless.npz"
    assert f"{source}: has no trained classifier; programs return features (pre_logits)" in said
    found = json.loads((output / "signature.json").read_text())
    assert found["output"] == {"name": "pre_logits", "dtype": "float32", "shape": ["batch", 16]}
    assert found["probabilities"] is None
    assert any(line.startswith("model.stablehlo: read back; differs from the mo") for line in said)


def test_programs_of_two_towers_give_unit_vectors_of_images(call, place):
    output, said = call("towers.npz", "--to=stablehlo")
    assert any("programs return unit vectors of images (image_embed)" in line for line in said)
    found = json.loads((output / "signature.json").read_text())
    assert found["output"] == {"name": "image_embed", "dtype": "float32", "shape": ["batch", 16]}
    assert found["probabilities"] is None
    program = export.deserialize(bytearray((output / "model.stablehlo").read_bytes()))
    images = make_images(3)
    expected = load_model(place / "towers.npz").image_embed(images)
    np.testing.assert_allclose(program.call(images), expected, atol=1e-6)


def test_weights_have_all_layers_so_that_no_line_names_one(call):
    output, said = call("towers.npz", "--to=npz")
    assert not any("image_embed" in line or "programs" in line for line in said)
    card = (output / "README.md").read_text()
    assert 'model("photo.jpg", labels=["a cat", "a dog"])' in card


@pytest.mark.parametrize("name", ["safetensors", "transformers"])
def test_two_towers_that_transformers_does_not_have_are_refused_by_name(call, tmp_path, name):
    with pytest.raises(UserError) as error:
        call("towers.npz", f"--to={name}")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'out' / 'model.safetensors'}: can't be written: CLIP")
    assert message.endswith("a .npz holds any model")
    assert not list(tmp_path.glob("out*"))


def read_content(path):
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    return metadata, {name: x.tobytes() for name, x in load_file(path).items()}


def test_two_towers_have_the_files_of_transformers_by_either_name(tmp_path, said):
    source = put(tmp_path, "siglip_bv")
    for name in ("safetensors", "transformers"):
        main([f"--checkpoint={source}", f"--to={name}", f"--output={tmp_path / name}"])
    names = {path.name for path in (tmp_path / "transformers").iterdir()}
    assert {"model.safetensors", "config.json", "README.md"} <= names
    for file in names - {"README.md"}:
        expected, found = (tmp_path / name / file for name in ("safetensors", "transformers"))
        # Entries of the metadata, which the library stores in any order, are compared as a dict.
        assert read_content(found) == read_content(expected)
    for name in ("safetensors", "transformers"):
        card = (tmp_path / name / "README.md").read_text()
        assert "AutoModel.from_pretrained" in card
        assert "timm" not in card


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), None])
def test_what_ends_early_leaves_nothing(call, tmp_path, monkeypatch, error):
    def fail(path, content):
        with open(path, "wb") as file:
            file.write(content[:10])
        raise error or KeyboardInterrupt

    monkeypatch.setattr(stablehlo.Path, "write_bytes", fail)
    if error is None:
        with pytest.raises(KeyboardInterrupt):
            call("vit.npz", "--to=stablehlo")
    else:
        with pytest.raises(UserError, match="can't be written: No space left on device"):
            call("vit.npz", "--to=stablehlo")
    assert not list(tmp_path.iterdir())


def test_a_program_that_computes_something_else_is_refused(place):
    model = load_model(place / "vit.npz")
    images = make_images(2)
    logits = model(images).logits
    line = compare_outputs(model, "logits", [images], [logits + 1e-5], what="model.x")
    assert line.startswith("model.x: read back; differs from the model by 1e-05 at most")
    for wrong in (logits + 0.1, logits * np.nan):
        with pytest.raises(UserError, match=r"expected .* or less; nothing is written"):
            compare_outputs(model, "logits", [images], [wrong], what="model.x")
    with pytest.raises(UserError, match=r"gives \[2, 2\] where the model gives \[2, 3\]"):
        compare_outputs(model, "logits", [images], [logits[:, :2]], what="model.x")


def test_parameters_that_no_file_can_hold_are_refused(place):
    large = {"head": np.broadcast_to(np.float32(0), (2**29,))}
    model = dataclasses.replace(load_model(place / "vit.npz"), params=large)
    with pytest.raises(UserError, match=r"--to=onnx: the parameters are 2\.0 GiB, and a file"):
        check_size(model, what="onnx")


def test_a_mixer_is_written_with_the_names_of_timm(place, tmp_path, said):
    main(
        [f"--checkpoint={place / 'mixer.npz'}", "--to=safetensors", f"--output={tmp_path / 'out'}"]
    )
    assert not (tmp_path / "out" / "config.json").exists()
    assert any("config.json: not written, so timm needs the arguments" in line for line in said)
    ours = read_npz(place / "mixer.npz")
    written = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert written.params.keys() == ours.params.keys()
    assert written.model["activation"] == "gelu_tanh"


def test_files_of_transformers_are_read_as_the_model(tmp_path):
    case = ROOT / "tests/testdata/torch/hf_dinov3/model.safetensors"
    main([f"--checkpoint={case}", "--to=transformers", f"--output={tmp_path / 'out'}"])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    files = {"model.safetensors", "config.json", "preprocessor_config.json"}
    assert written == files | {"README.md"}
    assert "AutoModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    assert read_safetensors(tmp_path / "out" / "model.safetensors").model == (
        read_safetensors(case).model
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=out"], "--to is missing; see python -m vit_jax.export --help"),
        (["--to=npz"], "--output is missing"),
        (["--to=onx", "--output=out"], "--to=onx: 'onx' is unknown; "),
        (["--to=timm", "--output=out"], "did you mean 'safetensors'?"),
        (["--to=npz", "--output=m.npz"], "--output=m.npz: expected a folder; the file in it will"),
        (["--to=npz", "--output={place}"], "exists; remove it, or choose another name"),
        (["--to=npz", "--output=out", "--layer=encoded"], "has all layers; leave --layer out"),
        (["--to=stablehlo", "--output=out", "--layer=encode"], "layer='encode' is not one of"),
        (
            ["--to=transformers", "--output=out", "--checkpoint={place}/mixer.npz"],
            "--to=transformers: model.name='mixer' is no Vision Transformer, and only these",
        ),
        (["--to=safetensors,transformers", "--output=out"], "write the same file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    place, tmp_path, monkeypatch, said, arguments, message
):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(place=place) for argument in arguments]
    with pytest.raises(UserError) as error:
        main([f"--checkpoint={place / 'vit.npz'}", *arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
