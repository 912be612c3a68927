# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: the loss from the outputs of model and heads in float64, and its parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.compiled import compiled
from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.models.positions import resize_patches
from vit_jax.models.variants import make_vit
from vit_jax.objectives.block_masks import gather_masked
from vit_jax.objectives.dino import make_dino
from vit_jax.utils.durations import Clock
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

SIZES = {"patch_size": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
HEAD = {"prototypes": 12, "head_width": 8, "bottleneck": 6, "head_layers": 2}
VIEWS = {"global": (1, 16, 16, 3), "local": (3, 8, 8, 3)}
ONE = {"global": (1, 16, 16, 3)}
CLOCK = Clock(batch_size=4, epoch_examples=lambda: 40)
GRAM = {"gram_weight": 2.0, "gram_start": {"steps": 3}}


def dino(*, model=None, views=None, **options):
    vit = make_vit(num_classes=0, **(SIZES | (model or {})))
    given = {"view_shapes": VIEWS if views is None else views, "clock": CLOCK, "total_steps": 20}
    return make_dino(model=vit, image_shape=(16, 16, 3), **(given | HEAD | options))


def draw_batch(count=4):
    rng = np.random.default_rng(0)
    shapes = {"image": (16, 16, 3), "global": (1, 16, 16, 3), "local": (3, 8, 8, 3)}
    batch = {k: rng.integers(0, 256, (count, *v)).astype(np.uint8) for k, v in shapes.items()}
    return {k: jnp.asarray(v) for k, v in batch.items()} | {"label": jnp.zeros(count, jnp.int32)}


def draw_params(objective, seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0), draw_batch()))
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def cross_entropy(targets, scores):
    return -(targets * np.log(softmax(scores / 0.1))).sum(axis=-1)


def encode(objective, params, images, **options):
    out = compiled(objective.model)({"params": params}, images, train=False, **options)[1]
    return out["pre_logits"], out["encoded"][:, 1:]


@pytest.mark.parametrize("ibot_head", ["shared", "separate"])
def test_the_loss_is_that_of_its_parts(ibot_head):
    objective = dino(ibot_weight=0.7, ibot_head=ibot_head, koleo_weight=0.3)
    student, teacher = (draw_params(objective, seed) for seed in (1, 2))
    batch = jax.jit(objective.augment)(draw_batch(), jax.random.key(0))
    rng = jax.random.key(5)
    inputs = {"teacher": teacher, "teacher_temp": jnp.float32(0.05)}
    loss, metrics = jax.jit(objective.loss)({**student, **inputs}, batch, rng)

    # Crops of an image are neighbours among the rows.
    both = jnp.stack([batch["image"], batch["global"][:, 0]], axis=1).reshape(8, 16, 16, 3)
    masks = objective.masks.draw(jax.random.fold_in(rng, 0), 8)
    small = batch["local"].reshape(12, 8, 8, 3)

    def scores(params, name, features):
        head = objective.patch_head if name == "ibot_head" else objective.head
        return np.asarray(compiled(head)({"params": params[name]}, features), np.float64)

    taught, taught_patches = encode(objective, teacher, both)
    seen, seen_patches = encode(objective, student, both, masked=masks)
    local, _ = encode(objective, student, small, position_grid=(4, 4))
    targets = softmax((scores(teacher, "dino_head", taught) - student["centers"]["dino"]) / 0.05)
    targets = targets.reshape(4, 2, 12)
    globals_ = scores(student, "dino_head", seen).reshape(4, 2, 12)
    locals_ = scores(student, "dino_head", local).reshape(4, 3, 12)
    pairs = [(t, globals_[:, 1 - t]) for t in (0, 1)]
    pairs += [(t, locals_[:, i]) for t in (0, 1) for i in range(3)]
    want = np.mean([cross_entropy(targets[:, t], s).mean() for t, s in pairs])
    np.testing.assert_allclose(metrics["dino_loss"], want, rtol=1e-5)
    entropy = -(targets * np.log(targets)).sum(axis=-1).mean()
    np.testing.assert_allclose(metrics["target_entropy"], entropy, rtol=1e-4)
    np.testing.assert_allclose(metrics["target_kl"], want - entropy, rtol=1e-4)

    name = "ibot_head" if ibot_head == "separate" else "dino_head"
    center, terms = student["centers"]["ibot"], []
    masks = np.asarray(masks)
    taught_rows, seen_rows = (
        scores(teacher, name, taught_patches),
        scores(student, name, seen_patches),
    )
    for i in np.flatnonzero(masks.any(axis=1)):
        p = softmax((taught_rows[i][masks[i]] - center) / 0.05)
        terms.append(cross_entropy(p, seen_rows[i][masks[i]]).mean())
    assert len(terms) == 4
    np.testing.assert_allclose(metrics["ibot_loss"], sum(terms) / 8, rtol=1e-5)

    x = np.asarray(seen, np.float64).reshape(4, 2, 16)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    koleo = 0.0
    for crop in (0, 1):
        distances = np.linalg.norm(x[:, None, crop] - x[None, :, crop], axis=-1)
        koleo -= np.log((distances + 9 * np.eye(4)).min(axis=1)).mean()
    np.testing.assert_allclose(metrics["koleo_loss"], koleo, rtol=1e-4)
    parts = [metrics[f"{name}_loss"] for name in ("dino", "ibot", "koleo")]
    np.testing.assert_allclose(loss, parts[0] + 0.7 * parts[1] + 0.3 * parts[2], rtol=1e-5)

    valid = gather_masked(masks.reshape(1, 8, 16), objective.masks.capacity(8))[1]
    assert valid.sum() == masks.sum()
    updated, rest = objective.update_statistics(student, metrics)
    rows = scores(teacher, "dino_head", taught)
    want = 0.9 * student["centers"]["dino"] + 0.1 * rows.mean(axis=0)
    np.testing.assert_allclose(updated["centers"]["dino"], want, rtol=1e-4, atol=1e-6)
    want = 0.9 * student["centers"]["ibot"] + 0.1 * taught_rows[masks].mean(axis=0)
    np.testing.assert_allclose(updated["centers"]["ibot"], want, rtol=1e-4, atol=1e-6)
    assert all(np.ndim(x) == 0 for x in rest.values())


def test_gram_anchoring_adds_its_loss():
    views = VIEWS | {"gram": (2, 24, 24, 3)}
    options = {"gram_weight": 2.0, "gram_start": {"steps": 3}, "gram_updates": ({"steps": 5},)}
    objective = dino(views=views, same_draws=("gram",), **options)
    assert "gram_teacher" in objective.objective_params
    student, teacher = (draw_params(objective, seed) for seed in (1, 2))
    rng = np.random.default_rng(3)
    large = jnp.asarray(rng.integers(0, 256, (4, 2, 24, 24, 3)).astype(np.uint8))
    batch = objective.augment(draw_batch() | {"gram": large}, jax.random.key(0))
    loss = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))

    def run(step):
        inputs = objective.step_inputs(jnp.int32(step), teacher)
        return loss({**student, **inputs}, batch, jax.random.key(5))

    (before, metrics), grads = run(2)
    assert metrics["gram_loss"] == 0
    assert not any(np.any(x) for x in jax.tree.leaves(grads["gram_teacher"]))
    (after, metrics), grads = run(3)
    assert not any(np.any(x) for x in jax.tree.leaves(grads["gram_teacher"]))
    np.testing.assert_allclose(after - before, 2 * metrics["gram_loss"], rtol=1e-4)

    both = jnp.stack([batch["image"], batch["global"][:, 0]], axis=1).reshape(8, 16, 16, 3)
    seen = encode(objective, student, both)[1]
    high = batch["gram"].reshape(8, 24, 24, 3)
    taught = encode(objective, student["gram_teacher"], high, position_grid=(4, 4))[1]
    taught = resize_patches(taught, (6, 6), (4, 4))

    def cosines(x):
        x = np.asarray(x, np.float64)
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
        return np.einsum("bpd,bqd->bpq", x, x)

    want = np.square(cosines(seen) - cosines(taught)).mean()
    np.testing.assert_allclose(metrics["gram_loss"], want, rtol=1e-4)


def test_the_average_becomes_the_gram_teacher_at_the_steps_that_are_given():
    objective = dino(gram_weight=1.0, gram_start={"steps": 3}, gram_updates=({"steps": 5},))
    params, average = (draw_params(objective, seed) for seed in (1, 2))
    steps = ((1, 2, False), (2, 3, True), (3, 4, False), (4, 5, True), (3, 9, True), (5, 9, False))
    for before, step, due in steps:
        now, mean = objective.follow_average(params, average, jnp.int32(before), jnp.int32(step))
        got = now["gram_teacher"]["embedding"]["kernel"]
        want = average["embedding"] if due else params["gram_teacher"]["embedding"]
        np.testing.assert_array_equal(got, want["kernel"])
        np.testing.assert_array_equal(got, mean["gram_teacher"]["embedding"]["kernel"])


def test_a_gram_teacher_that_was_due_before_is_made_at_once():
    """As in a run that resumes with fewer steps, so that a percentage of them has passed."""
    objective = dino(gram_weight=1.0, gram_start={"steps": 9}, gram_updates=({"steps": 3},))
    params, average = (draw_params(objective, seed) for seed in (1, 2))
    unset = params | {"gram_teacher": jax.tree.map(np.zeros_like, params["gram_teacher"])}
    for step, due in ((2, False), (7, True)):
        now, _ = objective.follow_average(unset, average, jnp.int32(step), jnp.int32(step))
        want = average["embedding"] if due else unset["gram_teacher"]["embedding"]
        got = now["gram_teacher"]["embedding"]["kernel"]
        np.testing.assert_array_equal(got, want["kernel"])


def test_the_gram_teacher_is_of_the_start_unless_an_earlier_step_is_given():
    for given, want in (((), (9,)), ((12,), (9, 12)), ((4,), (4,)), ((4, 12), (4, 12))):
        updates = tuple({"steps": step} for step in given)
        gram = dino(gram_weight=1.0, gram_start={"steps": 9}, gram_updates=updates).gram
        assert (gram.start, gram.updates) == (9, want)


def test_a_gram_teacher_of_another_patch_is_refused(tmp_path):
    vit = make_vit(num_classes=0, **(SIZES | {"patch_size": 8}))
    init = functools.partial(vit.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    params = flatten(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    path = str(tmp_path / "teacher.npz")
    write_npz(path, Weights(params=params, layout="test"))
    with pytest.raises(UserError, match=r"gram_teacher=.*it has patches of 8x8 and the model of 4"):
        dino(gram_weight=1.0, gram_teacher=path).load_params()


def test_parts_that_are_off_have_no_parameters():
    plain, full = dino(centering="sinkhorn"), dino(ibot_weight=1.0, ibot_head="separate")
    for objective in (plain, full):
        params = jax.eval_shape(lambda o=objective: o.init(jax.random.key(0), draw_batch()))
        assert set(objective.objective_params) == params.keys() - {
            "embedding",
            "cls",
            "Transformer",
        }
    assert plain.objective_params == ("dino_head",)
    assert full.objective_params == ("dino_head", "ibot_head", "centers", "mask_token")


def test_local_crops_may_be_left_out():
    objective = dino(views={"global": (1, 16, 16, 3)}, centering="sinkhorn")
    params = draw_params(objective, 1)
    batch = {k: v for k, v in draw_batch().items() if k != "local"}
    inputs = objective.step_inputs(jnp.int32(0), params)
    augmented = objective.augment(batch, jax.random.key(0))
    loss, metrics = jax.jit(objective.loss)({**params, **inputs}, augmented, jax.random.key(1))
    assert np.isfinite(loss)
    assert metrics["loss"] == metrics["dino_loss"]


@pytest.mark.parametrize(
    ("options", "equal"),
    [({}, True), ({"centering": "sinkhorn"}, False), ({"koleo_weight": 0.5}, False)],
    ids=["centering", "sinkhorn", "koleo"],
)
def test_micro_batches_give_the_loss_of_the_batch_unless_it_is_over_the_batch(options, equal):
    objective = dino(views={"global": (1, 16, 16, 3)}, **options)
    student, teacher = (draw_params(objective, seed) for seed in (1, 2))
    batch = {k: x for k, x in draw_batch().items() if k != "local"}
    batch = objective.augment(batch, jax.random.key(0))
    inputs = {"teacher": teacher, "teacher_temp": jnp.float32(0.05)}

    @jax.jit
    def losses(params):
        whole = objective.loss(params, batch, jax.random.key(1))
        micro = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in (0, 1)]
        parts = [objective.loss(params, part, jax.random.key(1)) for part in micro]
        return whole, jax.tree.map(lambda a, b: (a + b) / 2, *parts)

    (want, whole), (got, parts) = losses({**student, **inputs})
    assert np.allclose(got, want, rtol=1e-5) == equal
    if "centers" in student:
        # Centers are over the global batch in any case.
        updated = [objective.update_statistics(student, x)[0]["centers"] for x in (whole, parts)]
        np.testing.assert_allclose(updated[1]["dino"], updated[0]["dino"], rtol=1e-4, atol=1e-6)


def test_no_gradient_reaches_the_teacher():
    objective = dino(centering="sinkhorn")
    params, batch = draw_params(objective, 1), draw_batch()
    augmented = objective.augment(batch, jax.random.key(0))

    def loss(student, teacher):
        inputs = {"teacher": teacher, "teacher_temp": jnp.float32(0.05)}
        return objective.loss({**student, **inputs}, augmented, jax.random.key(1))[0]

    student = jax.jit(jax.grad(loss))(params, draw_params(objective, 2))
    assert all(np.any(x) for x in jax.tree.leaves(student))


def test_schedules_are_those_of_the_options():
    objective = dino(
        teacher_temp=0.07, teacher_temp_start=0.04, teacher_temp_warmup_epochs=1, momentum=0.9
    )
    temps = [float(objective.step_inputs(s, None)["teacher_temp"]) for s in (0, 9, 19)]
    np.testing.assert_allclose(temps, [0.04, 0.07, 0.07], rtol=1e-6)
    decays = [float(objective.average_decay(s)) for s in (0, 10, 20)]
    np.testing.assert_allclose(decays, [0.9, 0.95, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("metrics", "fault"),
    [
        ({"target_entropy": np.log(12), "dino_loss": np.log(12)}, "uniform"),
        ({"target_entropy": 0.01, "dino_loss": 0.2}, "peaked"),
        ({"feature_rank": 1.1}, "rank"),
        ({"patch_cosine": 0.999}, "patches"),
    ],
)
def test_a_collapse_is_named(metrics, fault):
    healthy = {"target_entropy": 1.0, "dino_loss": 2.0, "feature_rank": 7.0, "patch_cosine": 0.5}
    assert not dino().warnings(healthy)
    assert not dino().warnings({})
    (line,) = dino().warnings(healthy | metrics).values()
    assert list(dino().warnings(healthy | metrics)) == [fault]
    assert next(iter(metrics)) in line
    assert "\n" not in line


def test_the_memory_of_the_scores_is_noted():
    (line,) = dino(prototypes=2**16).notes()
    # 4 images of 2 + 2 + 3 crops.
    assert f"{4 * 4 * 7 * 2**16 / 1e9:.3g} GB" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"views": {}}, "needs a second global crop"),
        ({"views": VIEWS | {"other": (1, 8, 8, 3)}}, "has no use for 'other'"),
        ({"views": VIEWS | {"global": (2, 16, 16, 3)}}, "expected one of the same size"),
        ({"views": VIEWS | {"global": (1, 8, 8, 3)}}, r"1 of 8x8, with images of 16x16"),
        ({"views": VIEWS | {"local": (2, 32, 32, 3)}}, "32x32 are larger than the global crops"),
        (
            {"views": VIEWS | {"local": (2, 10, 8, 3)}},
            r"data\.views\.local: crops of 10x8 can't be cut into patches of 4x4: .* such as 8x8",
        ),
        (
            GRAM | {"views": VIEWS | {"gram": (2, 22, 22, 3)}},
            r"data\.views\.gram: crops of 22x22 can't be cut into patches of 4x4: .* as 20x20",
        ),
        ({"prototypes": 1}, r"objective\.prototypes=1: expected at least 2"),
        ({"prototypes": 10**8}, r"prototypes=100000000: the last layer would take [\d.,]+ GB"),
        ({"ibot_prototypes": 10}, r"objective\.ibot_prototypes=10: expected"),
        ({"ibot_head": "separate"}, r"objective\.ibot_head='separate': expected objective\.ibot"),
        ({"mask_ratio": (0.2, 0.5)}, r"objective\.mask_ratio=\(0\.2, 0\.5\): expected"),
        ({"mask_share": 0.9}, r"objective\.mask_share=0\.9: expected objective\.ibot_weight"),
        ({"teacher_temp_start": 0.02}, r"objective\.teacher_temp_start=0\.02: expected a warm-up"),
        (GRAM | {"model": {"patch_size": 16}, "views": ONE}, "with one patch in images of 16x16"),
        ({"sinkhorn_iterations": 5}, r"objective\.sinkhorn_iterations=5: expected the default"),
        (
            {"centering": "sinkhorn", "center_momentum": 0.5},
            r"objective\.center_momentum=0\.5: expected the default with .*'sinkhorn'",
        ),
        ({"student_temp": 0.0}, r"objective\.student_temp=0\.0"),
        ({"teacher_temp": -1.0}, r"objective\.teacher_temp=-1\.0"),
        ({"momentum": 1.5}, r"objective\.momentum=1\.5: expected 0 to 1"),
        ({"koleo_weight": -1.0}, r"objective\.koleo_weight=-1\.0"),
        ({"head_layers": 0}, r"objective\.head_layers=0"),
        ({"ibot_weight": 1.0, "mask_ratio": (0.0, 0.5)}, "masks 0 to 8 of the 16 patches"),
        ({"ibot_weight": 1.0, "mask_ratio": (0.5, 0.1)}, r"mask_ratio=\(0\.5, 0\.1\)"),
        ({"ibot_weight": 1.0, "mask_share": 0.0}, r"objective\.mask_share=0 with"),
        ({"teacher_temp_warmup_epochs": 3}, "is longer than the 20 steps of the run"),
        ({"model": {"classifier": "map"}}, "expected model.name='vit'"),
        ({"model": {"patch_dropout_rate": 0.5}}, r"model\.patch_dropout_rate=0\.5"),
        ({"pixel_std": 0.0}, r"objective\.pixel_std=0\.0"),
        ({"gram_weight": 2.0}, r"average at objective\.gram_start, which is 0"),
        ({"gram_weight": 0.0, "gram_teacher": "x"}, r"objective\.gram_weight=0\.0 with other keys"),
        (
            {"gram_weight": -1.0},
            r"objective\.gram_weight=-1\.0: expected above 0",
        ),
        ({"gram_weight": 1.0, "gram_start": {"steps": 20}}, "not shorter than the 20 steps"),
        ({"gram_weight": 1.0, "gram_start": {"hours": 2}}, "gram_start has {'hours': 2}"),
        (
            {"gram_weight": 1.0, "gram_teacher": "x", "gram_updates": ({"epochs": 3},)},
            r"objective\.gram_updates: epochs=3 is not shorter",
        ),
        (
            {"gram_weight": 1.0, "gram_start": {"steps": 9}, "gram_updates": ({"steps": 0},)},
            r"objective\.gram_updates=\(0,\) steps: expected none before the first step",
        ),
        ({"views": VIEWS | {"gram": (2, 32, 32, 3)}}, r"data\.views\.gram without"),
        (
            {"model": {"position_embedding": "relative"}},
            r"data\.views\.local: crops of 8x8 .* model\.position_embedding='relative'",
        ),
        (GRAM | {"views": VIEWS | {"gram": (1, 32, 32, 3)}}, r"data\.views\.gram: 1 of 32x32"),
        (GRAM | {"views": VIEWS | {"gram": (2, 8, 8, 3)}}, "and at least as large"),
        (
            GRAM | {"views": VIEWS | {"gram": (2, 32, 32, 3)}},
            r"expected data\.same_draws=\('gram',",
        ),
    ],
)
def test_wrong_values_are_refused(options, words):
    with pytest.raises(UserError, match=words) as caught:
        dino(**options)
    assert "\n" not in str(caught.value)


def test_koleo_needs_two_images():
    with pytest.raises(UserError, match=r"\(micro-\)batches of 1"):
        dino(koleo_weight=0.1).check_batch(1)
    dino(koleo_weight=0.1).check_batch(2)
    dino().check_batch(1)
