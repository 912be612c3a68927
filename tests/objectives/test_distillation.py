# SPDX-License-Identifier: Apache-2.0
"""Distillation against plain numpy, with a teacher from a file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.teacher import write_teacher
from vit_jax.losses import distillation_divergence
from vit_jax.models.variants import make_vit
from vit_jax.objectives.distillation import make_distillation
from vit_jax.utils.errors import UserError

SIZES = {"patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
BATCH = {
    "image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)), jnp.uint8),
    "label": jnp.arange(4) % 3,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def distillation(teacher, *, token=False, **options):
    model = make_vit(num_classes=3, distillation_token=token, **SIZES)
    return make_distillation(
        model=model, num_classes=3, image_shape=(8, 8, 3), teacher=teacher, **options
    )


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_divergence_is_that_of_softened_distributions():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 4))
    log_p, log_q = log_softmax(teacher / 3), log_softmax(student / 3)
    want = 9 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
    got = distillation_divergence(jnp.asarray(student), jnp.asarray(teacher), 3.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(distillation_divergence(student, student, 3.0), 0, atol=1e-6)


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_loss_is_the_weighted_sum_of_labels_and_teacher(kind, token, teacher):
    objective = distillation(teacher, token=token, kind=kind, alpha=0.3, temperature=2.0)
    params = jax.jit(objective.init)(jax.random.key(0), BATCH)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    augmented = objective.augment(BATCH, jax.random.key(1))
    everything = {**params, **objective.constants()}
    loss, metrics = objective.loss(everything, augmented, jax.random.key(2))

    out = objective.predict(params, BATCH)
    for_labels = out["class_logits" if token else "logits"]
    for_teacher = out["distillation_logits" if token else "logits"]
    # The teacher sees the same pixels, as it wants them.
    images = (np.asarray(BATCH["image"]) / 255 - 0.3) / 0.2
    said, _ = objective.teacher.model.apply(
        {"params": objective.teacher.params}, jnp.asarray(images, jnp.float32), train=False
    )
    label_loss = -log_softmax(for_labels)[np.arange(4), np.asarray(BATCH["label"])].mean()
    if kind == "hard":
        teacher_loss = -log_softmax(for_teacher)[np.arange(4), np.argmax(said, axis=-1)].mean()
    else:
        log_p, log_q = log_softmax(said / 2), log_softmax(for_teacher / 2)
        teacher_loss = 4 * (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert float(metrics["label_loss"]) == pytest.approx(label_loss, rel=1e-4)
    assert float(metrics["teacher_loss"]) == pytest.approx(teacher_loss, rel=1e-3)
    assert float(loss) == pytest.approx(0.7 * label_loss + 0.3 * teacher_loss, rel=1e-3)


def test_the_teacher_is_no_parameter_of_the_student(teacher):
    objective = distillation(teacher)
    params = jax.jit(objective.init)(jax.random.key(0), BATCH)
    assert "teacher" not in params
    assert any("teacher from" in note and "not trained" in note for note in objective.notes())
    assert any("resized from 4x4 to 2x2" in note for note in objective.notes())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher": None}, r"objective\.teacher is missing"),
        ({"teacher": "nowhere.npz"}, r"objective\.teacher='nowhere.npz': there is no"),
        ({"alpha": 1.5}, r"objective\.alpha=1\.5"),
        ({"temperature": 0.0}, r"objective\.temperature=0\.0"),
        ({"multi_label": True}, "one label an example"),
    ],
)
def test_what_can_not_be_distilled_is_refused(options, words, teacher):
    with pytest.raises(UserError, match=words) as caught:
        _ = distillation(**({"teacher": teacher} | options)).teacher
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "words"), [(5, "it has 5 classes and the student 3"), (0, "it has no head")]
)
def test_teachers_of_other_classes_are_refused(classes, words, tmp_path):
    with pytest.raises(UserError, match=rf"objective\.teacher=.*: {words}"):
        _ = distillation(write_teacher(tmp_path, classes=classes)).teacher


def test_a_teacher_whose_classes_have_another_order_is_refused(tmp_path):
    teacher = write_teacher(tmp_path, names=("a", "b", "c"))
    assert distillation(teacher, class_names=("a", "b", "c")).teacher
    assert distillation(teacher).teacher
    with pytest.raises(UserError, match="its class 1 is 'b' and that of the data 'c'"):
        _ = distillation(teacher, class_names=("a", "c", "b")).teacher
