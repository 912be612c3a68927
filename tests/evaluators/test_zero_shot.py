# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification and retrieval over a split, against plain numpy."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.evaluators.retrieval import Retrieval
from vit_jax.evaluators.zero_shot import ZeroShot
from vit_jax.objectives.contrastive import Contrastive
from vit_jax.parallel.mesh import make_mesh
from vit_jax.utils.errors import UserError

WIDTH, LENGTH, SPLIT = 10, 56, "test[:75]"
TEMPLATES = ("the digit {}", "{}!", "a picture of {}.")


def unit(z, xp=np):
    return z / (xp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)


@dataclasses.dataclass(frozen=True)
class Projections:
    """Embeds images and texts by random projections of pixels and of bytes."""

    def apply(self, variables, images=None, tokens=None, *, train):
        params = variables["params"]
        zimg = ztxt = None
        if images is not None:
            zimg = unit(images[..., 0].reshape(len(images), -1) @ params["img"], jnp)
        if tokens is not None:
            ztxt = unit(tokens.astype(jnp.float32) @ params["txt"], jnp)
        return zimg, ztxt, {"img": {}}


RNG = np.random.default_rng(0)
PARAMS = {
    "img": RNG.normal(size=(144, WIDTH)).astype(np.float32),
    "txt": RNG.normal(size=(LENGTH, WIDTH)).astype(np.float32),
    "t": np.log([3.0]).astype(np.float32),
    "b": np.float32([-1.0]),
}
OBJECTIVE = Contrastive(Projections(), None)


def make(data_dir, kind, *, devices=8, **options):
    data = DatasetSpec(
        options.pop("dataset", "digits_captions"),
        SPLIT,
        "decode",
        16,
        data_dir,
        "evals.e",
        tokenizer=options.pop("tokenizer", f"bytes(length={LENGTH})"),
    )
    mesh = make_mesh(devices=jax.devices()[:devices])
    objective = options.pop("objective", OBJECTIVE)
    return kind(name="e", data=data, objective=objective, mesh=mesh, **options)


@pytest.fixture(scope="module")
def split(data_dir):
    """Embeddings of the images, captions of each, and labels, by plain numpy in float64."""
    spec = make(data_dir, ZeroShot).data
    source = spec.open()
    zimg, labels = [], []
    for batch in eval_batches(spec):
        pixels = batch["image"][batch["mask"] > 0][..., 0].astype(np.float64) / 127.5 - 1
        zimg.append(unit(pixels.reshape(len(pixels), -1) @ PARAMS["img"]))
        labels.append(batch["label"][batch["mask"] > 0])
    captions = [source.captions(i) for i in range(len(source))]
    return np.concatenate(zimg), captions, np.concatenate(labels)


def embed(texts):
    tokens = np.zeros((len(texts), LENGTH))
    for row, text in zip(tokens, texts, strict=True):
        ids = [*[byte + 3 for byte in text.encode()][: LENGTH - 1], 1]
        row[: len(ids)] = ids
    return unit(tokens @ PARAMS["txt"])


@pytest.mark.parametrize("devices", [1, 8])
def test_zero_shot_averages_unit_vectors_of_prompts(devices, data_dir, split, tmp_path):
    zimg, _, labels = split
    evaluator = make(data_dir, ZeroShot, devices=devices, templates=TEMPLATES)
    results = evaluator.run(PARAMS, details=tmp_path / "e_1")
    names = evaluator.data.info.class_names
    assert names[3] == "three"
    classes = [embed([t.replace("{}", name) for t in TEMPLATES]).mean(axis=0) for name in names]
    logits = 3 * zimg @ unit(np.stack(classes)).T - 1
    predicted = logits.argmax(axis=1)
    assert results["count"] == len(labels) == 75
    assert results["top1"] == pytest.approx((predicted == labels).mean())
    rank = (logits > logits[np.arange(75), labels][:, None]).sum(axis=1)
    assert results["top5"] == pytest.approx((rank < 5).mean())
    of_classes = [(predicted == c)[labels == c].mean() for c in range(10) if (labels == c).any()]
    assert results["mean_per_class"] == pytest.approx(np.mean(of_classes))
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(75), labels]
    assert results["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    details = json.loads((tmp_path / "e_1.json").read_text())
    assert details["prompts"][:3] == ["the digit zero", "zero!", "a picture of zero."]
    assert details["classes"][3]["name"] == "three"
    assert (tmp_path / "e_1_confusion.csv").exists()


def test_other_names_of_the_classes_give_other_prompts(data_dir, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("nul\neen\ntwee\ndrie\nvier\nvijf\nzes\nzeven\nacht\n")
    evaluator = make(data_dir, ZeroShot, class_names=str(names))
    with pytest.raises(UserError, match="9 names for the 10 classes of digits_captions"):
        evaluator.open()
    names.write_text(names.read_text() + "negen\n")
    evaluator = make(data_dir, ZeroShot, class_names=str(names))
    evaluator.open()
    assert evaluator.prompts[9] == "a photo of a negen."


def test_labels_without_captions_are_enough(data_dir):
    names = tuple(f"digit {i}" for i in range(10))
    evaluator = make(data_dir, ZeroShot, dataset="digits", class_names=names)
    assert evaluator.run(PARAMS | {"img": PARAMS["img"][:64]})["count"] == 75


@pytest.mark.parametrize("devices", [1, 8])
def test_retrieval_ranks_all_captions_and_images(devices, data_dir, split, tmp_path):
    zimg, captions, _ = split
    evaluator = make(data_dir, Retrieval, devices=devices, prefix="see ", k=(1, 3))
    results = evaluator.run(PARAMS, details=tmp_path / "e_1")
    owner = np.repeat(np.arange(75), [len(c) for c in captions])
    texts = [text for several in captions for text in several]
    similarities = zimg @ embed([f"see {text}" for text in texts]).T
    # Equal captions are equally similar; earlier ones come first.
    similarities = similarities.astype(np.float32)
    order = np.argsort(-similarities, axis=1, kind="stable")
    first = np.array([(owner[row] == i).argmax() for i, row in enumerate(order)])
    assert results["image_to_text_recall1"] == pytest.approx((first < 1).mean(), abs=0.03)
    assert results["image_to_text_recall3"] == pytest.approx((first < 3).mean(), abs=0.03)
    ranks = (similarities > similarities[owner, np.arange(len(texts))]).sum(axis=0)
    assert results["text_to_image_recall3"] == pytest.approx((ranks < 3).mean(), abs=0.005)
    assert results["captions"] == len(texts) == 225
    worst = json.loads((tmp_path / "e_1.json").read_text())["worst"]
    assert worst["text_to_image"][0]["rank"] == ranks.max() + 1
    assert [pair["rank"] for pair in worst["image_to_text"]] == sorted(
        (pair["rank"] for pair in worst["image_to_text"]), reverse=True
    )


def test_texts_that_are_cut_are_counted_once(data_dir, said):
    evaluator = make(data_dir, ZeroShot, templates=("{}", "a very long template " * 4 + "{}"))
    evaluator.open()
    evaluator.open()
    lines = [line for line in said if "their ends are cut" in line]
    assert lines == [
        f"e: 10 of 20 prompts have more than {LENGTH} tokens, and their ends are cut, such as "
        "'a very long template a very long template a very long templa'"
    ]


def test_several_labels_are_right_if_one_is_and_images_without_do_not_count(data_dir):
    evaluator = make(data_dir, ZeroShot)
    label = np.zeros((4, 10), np.float32)
    label[0, [1, 2]] = label[1, 3] = label[3, 9] = 1
    logits = np.zeros((4, 10), np.float32)
    logits[np.arange(4), [2, 4, 0, 9]] = 1
    results, _ = evaluator.judge_rows({"label": label, "logits": logits})
    assert results["top1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", [ZeroShot, Retrieval])
def test_evaluators_of_texts_need_texts(kind, data_dir):
    with pytest.raises(UserError, match=r"is for objective\.name='contrastive'"):
        make(data_dir, kind, objective=object())
    with pytest.raises(UserError, match=r"data\.tokenizer=None with evals\.e\.name="):
        make(data_dir, kind, tokenizer=None)
