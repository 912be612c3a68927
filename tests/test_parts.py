# SPDX-License-Identifier: Apache-2.0
"""Parts from outside of the package: used by name, found again, imported only if trusted."""

import contextlib
import json
import sys

import flax.linen as nn
import numpy as np
import pytest

from tests.tiny import tiny_config
from tests.trained import write_images
from vit_jax import evaluate, predict, report
from vit_jax.checkpoint.manifest import write_manifest
from vit_jax.checkpoint.pretrained.convert import convert
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.config.load import trust_config
from vit_jax.data.ops.transforms import apply
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.data.sources import find_dataset
from vit_jax.inference.model import load_model
from vit_jax.training.experiment import Experiment
from vit_jax.training.run import train
from vit_jax.utils import registry
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import trust_parts

MODELS = """
import flax.linen as nn
import jax.numpy as jnp

class Net(nn.Module):
    num_classes: int
    width: int = 8
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.relu(nn.Conv(self.width, (3, 3), (2, 2), name="decoder")(images)).mean(axis=(1, 2))
        logits = nn.Dense(self.num_classes, name="classes")(x).astype(jnp.float32)
        return logits, {"pre_logits": x, "logits": logits}

def make_net(*, num_classes: int, variant: str):
    return Net(num_classes, width={"small": 4, "large": 16}[variant])

class Bare(Net):
    def __call__(self, images, *, train):
        return super().__call__(images, train=train)[0]

class Wide(Net):
    def __call__(self, images, *, train):
        logits, out = super().__call__(images, train=train)
        return logits[:, :3], out
"""

# Parts that fail once their code runs.
BROKEN = """
import flax.linen as nn
import jax.numpy as jnp
import optax
from parts_models import Net
from vit_jax.evaluators.base import Evaluator
from vit_jax.objectives.supervised import Supervised

class Fails(Net):
    def __call__(self, images, *, train):
        return super().__call__(images, train=train) + nn.nothing

class FailsInTraining(Net):
    def __call__(self, images, *, train):
        if train:
            images = images.reshape(3)
        return super().__call__(images, train=train)

class Averages(Net):
    @nn.compact
    def __call__(self, images, *, train):
        x = nn.BatchNorm(use_running_average=not train)(images).mean(axis=(1, 2))
        x = nn.Dense(self.num_classes)(x)
        return x, {"pre_logits": x, "logits": x}

class Patches(Net):
    def grid(self, image_size):
        raise ValueError("expected a multiple of 3")

def make_broken(broken):
    class Broken(Supervised):
        def loss(self, params, batch, rng):
            return broken(*super().loss(params, batch, rng))

    return lambda *, model, num_classes: Broken(model, num_classes, pixel_mean=0, pixel_std=1)

no_metrics = make_broken(lambda loss, metrics: loss)
no_loss = make_broken(lambda loss, metrics: (loss, {"brier": loss}))
no_scalar = make_broken(lambda loss, metrics: (loss[None], metrics))
no_key = make_broken(lambda loss, metrics: metrics["brier"])

class NoParams(Supervised):
    def init(self, rng, batch):
        return None

def no_params(*, model, num_classes):
    return NoParams(model, num_classes, pixel_mean=0, pixel_std=1)

class NoPredictions(Supervised):
    def predict(self, params, batch):
        return super().predict(params, batch)["logits"]

def no_predictions(*, model, num_classes):
    return NoPredictions(model, num_classes, pixel_mean=0, pixel_std=1)

class Silent(Evaluator):
    metrics = ("sure",)

    def judge_batch(self, params, batch):
        return self.judge(self.objective.predict(params, batch)["logits"])

    def run(self, params, *, details=None):
        return {}

class NoColumns(Silent):
    def judge(self, logits):
        return {"sure": logits.max(axis=-1)}

class NoRows(Silent):
    def judge(self, logits):
        return {"sure": logits.max()}, {}

class NoAttribute(Silent):
    def judge(self, logits):
        return {"sure": logits.most}, {}

def no_state():
    return optax.GradientTransformation(lambda params: params["no"], lambda g, s, p: (g, s))

def no_update():
    return optax.GradientTransformation(lambda params: (), lambda g, s: (g, s))
"""

OPS = """
import cv2
from vit_jax.data.ops.transforms import Transform

class Blur(Transform):
    def __init__(self, size: int):
        if size > 9:
            raise ValueError("too much")
        self.size = size

    def __call__(self, features):
        return features | {"image": cv2.blur(features["image"], (self.size, self.size))}

def shift(by: int = 0):
    return lambda features: features | {"image": features["image"] + by}

def nothing():
    return None

def forgets():
    return lambda features: None

def flattens():
    return lambda features: features | {"image": features["image"].ravel()}

def fails():
    return lambda features: features["picture"]
"""

DATA = """
import numpy as np
from vit_jax.data.sources.base import Dataset, DatasetInfo, Records

class Grey(Records):
    def read(self, row):
        return np.full((8, 8, 3), row, np.uint8)

    def describe(self, row):
        return f"grey[{row}]"

def make_grey(count="20"):
    rows = np.arange(int(count))
    info = DatasetInfo(2, (8, 8, 3))
    return Dataset("grey", info, Grey(), (rows % 2).astype(np.int32), {"train": rows})

def make_list():
    return [1]
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with modules of a user, who has named none of them."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name, code in (("models", MODELS), ("ops", OPS), ("data", DATA), ("broken", BROKEN)):
        (folder / f"parts_{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    forget(monkeypatch)
    return folder


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(registry, "_trusted", set())
    for name in [name for name in sys.modules if name.startswith("parts_")]:
        monkeypatch.delitem(sys.modules, name)


def config_of(data_dir, model, **changes):
    config = tiny_config(data_dir, **changes)
    with config.unlocked():
        config.model = model
    return config


def test_weights_go_to_a_file_and_back(trained, tmp_path):
    weights = load_pretrained(str(trained))
    convert(weights, tmp_path / "net.npz")
    again = load_pretrained(str(tmp_path / "net.npz"))
    assert again.model == weights.model
    with pytest.raises(UserError, match="--parts=parts_models"):
        load_model(tmp_path / "net.npz")
    assert load_model(tmp_path / "net.npz", parts="parts_models").module.width == 4
    with pytest.raises(UserError, match="timm has no parts_models:make_net"):
        convert(weights, tmp_path / "net.safetensors")


@pytest.fixture
def trained(outside, tmp_path, data_dir, monkeypatch):
    """The workdir of a model from outside, after which everything is forgotten."""
    model = {"name": "parts_models:make_net", "variant": "small"}
    train(config_of(data_dir, model, ema_decay=0.5), tmp_path / "run")
    forget(monkeypatch)
    return tmp_path / "run"


def test_a_model_is_trained_and_found_again(trained, tmp_path, capsys, monkeypatch):
    assert json.loads((trained / "config.json").read_text())["model"] == {
        "name": "parts_models:make_net",
        "num_classes": 10,
        "variant": "small",
    }
    weights = load_pretrained(str(trained))
    assert weights.model["name"] == "parts_models:make_net"
    assert set(weights.params) == {
        f"{module}/{leaf}" for module in ("decoder", "classes") for leaf in ("kernel", "bias")
    }
    image = write_images(tmp_path / "images", 1)[0]
    for command, arguments in ((evaluate, []), (predict, [str(image)])):
        with pytest.raises(UserError, match="--parts=parts_models"):
            command.main([f"--workdir={trained}", *arguments])
    assert "parts_models" not in sys.modules
    assert evaluate.main([f"--workdir={trained}", "--parts=parts_models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"val/top1", "val_ema/top1"} <= found.keys()
    forget(monkeypatch)
    model = load_model(trained, parts=["parts_models"])
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), np.uint8)
    assert model.classifies
    assert model.module.width == 4
    assert model(images).logits.shape == (3, 10)
    assert model.features(images, "pre_logits").shape == (3, 4)


def test_the_same_name_resumes_and_another_is_refused(trained, data_dir):
    def start(**model):
        model = {"name": "parts_models:make_net", "variant": "small"} | model
        train(config_of(data_dir, model, ema_decay=0.5, total_steps=12), trained)

    with pytest.raises(UserError, match=r"model\.variant is 'small' there"):
        start(variant="large")
    start()
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").open()]
    assert {4, 8, 12} <= set(steps)


def test_a_teacher_is_from_outside(trained, tmp_path, data_dir):
    config = tiny_config(data_dir, objective={"name": "distillation", "teacher": str(trained)})
    with pytest.raises(UserError, match=r"objective\.teacher=.*--parts=parts_models"):
        Experiment.from_config(config).objective.constants()
    trust_parts("parts_models")
    assert Experiment.from_config(config).objective.constants()["teacher"].keys() == {
        "classes",
        "decoder",
    }


def test_parameters_from_a_run_are_adapted(trained, data_dir):
    trust_parts("parts_models")
    model = {"name": "parts_models:make_net", "variant": "small"}
    experiment = Experiment.from_config(config_of(data_dir, model, init_from=str(trained)))
    weights = load_pretrained(str(trained))
    state = experiment.init_state()
    np.testing.assert_array_equal(
        state.params["classes"]["kernel"], weights.params["classes/kernel"]
    )


def test_parameters_of_another_model_from_outside_are_noted(trained, data_dir):
    trust_parts("parts_models")
    model = {"name": "parts_models:Net", "width": 4}
    experiment = Experiment.from_config(config_of(data_dir, model))
    _, notes = experiment.fit_params(load_pretrained(str(trained)), experiment.initial_params())
    line = "model.name: 'parts_models:make_net' in the file, 'parts_models:Net' here"
    assert line in notes


def test_defaults_that_no_config_can_hold_are_left_to_the_constructor(outside, data_dir):
    trust_parts("parts_models")
    experiment = Experiment.from_config(config_of(data_dir, {"name": "parts_models:Net"}))
    assert experiment.config["model"] == {
        "name": "parts_models:Net",
        "num_classes": 10,
        "width": 8,
    }
    assert isinstance(experiment.model, nn.Module)
    assert experiment.description["model"] == experiment.config["model"]


def test_a_model_without_dtype_has_no_precision(outside, data_dir):
    trust_parts("parts_models")
    config = config_of(data_dir, {"name": "parts_models:Net"}, precision="bfloat16")
    line = r"precision='bfloat16': model\.name='parts_models:Net' has no argument dtype"
    with pytest.raises(UserError, match=line):
        Experiment.from_config(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parts_models:Bare", "expected (logits, out), and 'pre_logits' and 'logits' in"),
        ("parts_models:Wide", "expected logits [batch, 10]"),
        ("parts_models:jnp", "is a module; expected a function or a class"),
        ("builtins:dict", "can't be called by name"),
        ("parts_models:nn", "is a module"),
    ],
)
def test_a_model_that_gives_something_else_is_refused(outside, data_dir, name, message):
    trust_parts(["parts_models", "builtins"])
    with pytest.raises(UserError) as error:
        Experiment.from_config(config_of(data_dir, {"name": name}))
    assert str(error.value).startswith(f"model.name={name!r}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("section", "name", "message"),
    [
        ("model", "Fails", "failed with AttributeError: "),
        ("model", "FailsInTraining", "failed with TypeError: "),
        ("model", "Averages", "failed with ScopeCollectionNotFound: "),
        ("model", "Patches", "failed with ValueError: expected a multiple of 3 (parts_broken.py:"),
        ("objective", "no_metrics", "loss gives float32[]: expected (loss, metrics), with"),
        ("objective", "no_loss", "expected (loss, metrics), with 'loss' in the dict metrics"),
        ("objective", "no_scalar", "expected (loss, metrics), with a float scalar as loss"),
        ("objective", "no_key", "failed with KeyError: 'brier' (parts_broken.py:"),
        ("objective", "no_params", "init gives a NoneType; expected a dict of parameters"),
        ("objective", "no_predictions", "predict gives float32[1, 10]: expected a dict with 'l"),
        ("evals.mine", "NoColumns", "expected two dicts of columns, of which the first is summed"),
        ("evals.mine", "NoRows", "'float32[]'}, {}): expected columns [batch, ...] of a batch of"),
        ("evals.mine", "NoAttribute", "failed with AttributeError: "),
        ("optimizer", "no_state", "failed with KeyError: 'no' (parts_broken.py:"),
        ("optimizer", "no_update", "failed with TypeError: "),
    ],
)
def test_a_part_that_fails_is_refused_before_a_run_starts(
    outside, data_dir, section, name, message
):
    trust_parts(["parts_models", "parts_broken"])
    config = config_of(data_dir, {"name": "parts_models:Net"})
    with config.unlocked():
        if section == "evals.mine":
            config.evals.mine = dict(config.evals.val) | {"name": f"parts_broken:{name}"}
        elif section == "optimizer":
            config.optimizer.name = f"parts_broken:{name}"
        else:
            config[section] = {"name": f"parts_broken:{name}"}
    with pytest.raises(UserError) as error:
        Experiment.from_config(config)
    assert str(error.value).startswith(f"{section}.name='parts_broken:{name}'")
    assert message in str(error.value)
    # The call of an optimizer with wrong arguments is not a line of its code.
    if " failed " in message and name != "no_update":
        assert "(parts_broken.py:" in str(error.value)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("forgets", "gives no image in a NoneType; expected a dict of features with 'image'"),
        ("flattens", "gives an image of another shape in a dict"),
        ("fails", "failed with KeyError: 'picture' (parts_ops.py:"),
    ],
)
def test_an_operation_that_fails_is_refused_before_a_run_starts(outside, data_dir, op, message):
    trust_parts("parts_ops")
    line = f"decode|parts_ops:{op}() | resize(8)"
    with pytest.raises(UserError) as error:
        Experiment.from_config(tiny_config(data_dir, data__preprocess=line))
    assert str(error.value).startswith(f"data.preprocess: 'parts_ops:{op}()' {message}")


def test_operations_are_from_outside(outside):
    line = "parts_ops:Blur(3)|parts_ops:shift(by=2) | parts_ops:shift"
    with pytest.raises(UserError, match=r"data\.preprocess='parts_ops:Blur' is named by a file"):
        parse_preprocess(line, key="data.preprocess")
    trust_parts("parts_ops")
    image = np.full((8, 8, 3), 7, np.uint8)
    ops = parse_preprocess(line, key="data.preprocess")
    np.testing.assert_array_equal(
        apply(ops, {"image": image}, np.random.default_rng(0))["image"], image + 2
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("parts_ops:Blur", "wrong arguments in 'parts_ops:Blur': expected parts_ops:Blur(size)"),
        ("parts_ops:Blur('a')", "parts_ops:Blur: size='a' is a str; expected int"),
        ("parts_ops:Blur(0)", "size=0: expected more than 0"),
        ("parts_ops:Blur(11)", "'parts_ops:Blur' failed with ValueError: too much (parts_ops.py:"),
        ("parts_ops:nothing", "gives a NoneType; expected collections.abc.Callable"),
        ("parts_ops:Blur(open('x'))", "wrong arguments"),
    ],
)
def test_operations_are_checked(outside, line, message):
    trust_parts("parts_ops")
    with pytest.raises(UserError) as error:
        parse_preprocess(f"decode|{line}", key="pp")
    assert message in str(error.value)


def test_a_dataset_is_from_outside(outside, data_dir):
    def find(name):
        return find_dataset(f"parts_data:{name}", data_dir=data_dir)

    with pytest.raises(UserError, match=r"data\.name='parts_data:make_grey' is named by a file"):
        find("make_grey:30")
    config = tiny_config(data_dir, data__name="parts_data:make_grey:30", data__preprocess="decode")
    with config.unlocked():
        config.evals = {}
    trust_config(config)
    assert Experiment.from_config(config).train_data.info.num_classes == 2
    assert find("make_grey").lengths == {"train": 20}
    assert find("make_grey:30").lengths == {"train": 30}
    with pytest.raises(UserError, match=r"gives a list; expected vit_jax\.data\.sources\.base"):
        find("make_list")


def test_what_a_config_names_is_trusted_and_no_more(monkeypatch):
    forget(monkeypatch)
    trust_config(
        {
            "model": {"name": "a.b:c"},
            "optimizer.name": "d:e",
            "init_from": "no:thing",
            "data": {"name": "folder:photos", "mixture": (("f:g:x", "train", 1.0),)},
            "evals": {"val": {"data_name": "h:i", "preprocess": "decode|j:k(2)|l.m:n"}},
            "tracking": {"trackers": ("o:p", "wandb")},
        }
    )
    assert registry._trusted == {"a.b", "d", "f", "h", "j", "l.m", "o"}


@pytest.mark.parametrize("where", ["checkpoint", "config.json"])
def test_a_hostile_workdir_runs_no_code(trained, tmp_path, outside, monkeypatch, where):
    mark = tmp_path / "was here"
    (outside / "parts_hostile.py").write_text(f"open({str(mark)!r}, 'w')\n")
    files = [trained / "config.json"]
    if where == "checkpoint":
        files = list(trained.glob("checkpoints/*/description/metadata"))
    assert files
    image = write_images(tmp_path / "images", 1)[0]
    for file in files:
        file.write_text(file.read_text().replace("parts_models:make_net", "parts_hostile:make"))
        if where == "checkpoint":
            write_manifest(file.parents[1])
    commands = (
        lambda: load_model(trained, parts=["parts_models"]),
        lambda: evaluate.main([f"--workdir={trained}", "--parts=parts_models"]),
        lambda: report.main([f"--workdir={trained}", "--parts=parts_models"]),
        lambda: predict.main([f"--workdir={trained}", "--parts=parts_models", str(image)]),
    )
    for command in commands:
        with contextlib.suppress(UserError):
            command()
    assert not mark.exists()
    assert "parts_hostile" not in sys.modules
    # It would have run, had the user named it.
    load = commands[0] if where == "checkpoint" else commands[1]
    with pytest.raises(UserError, match="add --parts=parts_hostile to import it"):
        load()
    trust_parts("parts_hostile")
    with pytest.raises(UserError, match="parts_hostile has no make"):
        load()
    assert mark.exists()
