# SPDX-License-Identifier: Apache-2.0
"""The catalogue is well-formed, names find their rows, and AugReg's index is read by its rule."""

import csv
import dataclasses
from pathlib import Path

import pytest

from tools.catalogue_table import PAGE, make_table, renew
from vit_jax.checkpoint.pretrained.catalogue import (
    CATALOGUE,
    Published,
    describe_augreg,
    find,
    is_name,
    list_models,
    load_catalogue,
    needs_index,
    normalize_name,
    select_augreg,
    to_https,
)
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.utils.errors import UserError

ROWS = load_catalogue()
COLLECTIONS = {
    "imagenet21k": "vit_models/imagenet21k",
    "imagenet21k+imagenet2012": "vit_models/imagenet21k+imagenet2012",
    "augreg": "vit_models/augreg",
    "augreg+imagenet2012": "vit_models/augreg",
    "augreg-i1k": "vit_models/augreg",
    "sam": "vit_models/sam",
    "gsam": "vit_models/gsam",
    "mixer-imagenet1k": "mixer_models/imagenet1k",
    "mixer-imagenet21k": "mixer_models/imagenet21k",
    "mixer-sam": "mixer_models/sam",
    "big_vision": "big_vision",
}
CLASSES = {"imagenet21k": 21843, "imagenet2012": 1000}
AUGREG = [row for row in ROWS.values() if "/augreg/" in row.url_gs]


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_a_row_is_well_formed(row):
    collection, _, rest = row.name.partition(":")
    model, _, pixels = rest.partition("@")
    assert is_name(row.name)
    assert row.url_gs.startswith(f"gs://{COLLECTIONS[collection]}/")
    assert row.url_gs.endswith(".npz")
    assert row.url_https == to_https(row.url_gs)
    assert row.model == ("mixer" if collection.startswith("mixer") else "vit")
    assert row.variant.removesuffix("-gap-norep") in model
    assert row.image_size in (224, 384)
    assert pixels in ("", str(row.image_size))
    assert row.num_classes == CLASSES[row.pretraining.split("+")[-1]]
    assert row.head in ("valid", "zero", "none", "")
    assert (row.mean, row.std) == (0.5, 0.5)
    assert row.licence == "Apache-2.0"
    assert row.source
    assert row.sha256 == "" or (
        len(row.sha256) == 64 and set(row.sha256) <= set("0123456789abcdef")
    )
    assert (row.top1 is None) == (row.top1_image_size is None)
    assert row.top1 is None or (70 < row.top1 < 90 and row.num_classes == 1000)
    *_, last = parse_preprocess(row.eval, key=row.name)
    assert dataclasses.astuple(last)[0] == row.image_size


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("augreg:b16", "augreg:B/16"),
        ("AugReg:ViT-B/16", "augreg:B/16"),
        ("augreg:r_ti_16", "augreg:R+Ti/16"),
        ("augreg+imagenet2012:B-16@384", "augreg+imagenet2012:B/16@384"),
        ("mixer-sam:b32", "mixer-sam:B/32"),
    ],
)
def test_a_name_may_be_spelled_in_another_way(spelling, name):
    assert find(spelling) == ROWS[name]
    assert not needs_index(spelling)


def test_every_name_is_found_by_itself():
    assert {find(name, catalogue=ROWS).name for name in ROWS} == ROWS.keys()
    assert len({normalize_name(name.lower(), ROWS) for name in ROWS}) == len(ROWS)


def test_names_are_searched_in_any_spelling():
    assert "augreg:B/16" in list_models("ViT-B_16")
    assert "augreg:B/16" in list_models("b16")
    assert "augreg:B/16" in list_models("ViT")
    assert not list_models("resnet")
    assert "augreg:B/16" in list_models("B/16 augreg")


def test_names_and_files_are_unique():
    with CATALOGUE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for column in ("name", "url_gs", "url_https"):
        assert len({row[column] for row in rows}) == len(rows) == len(ROWS)


def test_files_of_2020_have_no_head_and_gsam_is_warned_of():
    assert all(row.head == "zero" for name, row in ROWS.items() if name.startswith("imagenet21k:"))
    assert all("validates badly" in row.note for n, row in ROWS.items() if n.startswith("gsam:"))


def test_published_accuracies_are_those_of_the_recommended_files():
    top1 = {n.split(":")[1]: row.top1 for n, row in ROWS.items() if row.recommended and row.top1}
    assert top1 == {
        "L/16@384": 85.59,
        "B/16@384": 85.49,
        "S/16@384": 83.73,
        "R50+L/32@384": 85.99,
        "R26+S/32@384": 83.85,
        "Ti/16@384": 78.22,
        "B/32@384": 83.59,
        "S/32@384": 79.58,
        "R+Ti/16@384": 75.40,
    }


@pytest.mark.parametrize("row", AUGREG, ids=lambda row: row.name)
def test_the_name_of_an_augreg_file_says_what_its_row_says(row):
    described = describe_augreg(row.url_gs.rpartition("/")[2])
    for field in ("variant", "image_size", "num_classes", "head", "eval", "url_gs", "url_https"):
        assert getattr(described, field) == getattr(row, field)
    if not row.name.startswith("augreg-i1k:"):  # Fine-tuned on what it was trained on.
        assert described.pretraining == row.pretraining


def test_a_name_finds_its_row():
    assert find("augreg:B/16").url_gs == (
        "gs://vit_models/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("augreg:B/61", "'augreg:B/61' is not published; did you mean 'augreg:B/16'?"),
        ("augrek:B/16", "unknown collection 'augrek'; did you mean 'augreg'?"),
        ("augreg+imagenet2012:B/16", "did you mean 'augreg+imagenet2012:B/16@"),
        ("augreg:B-17", "no AugReg file"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, message):
    assert message in refusal(find, name)


def test_names_have_a_form_of_their_own():
    assert all(map(is_name, ("sam:B/16", "augreg:B_16", "big_vision:S/16-i1k-90ep")))
    assert not any(map(is_name, ("a/b:c", "gs://b/x", "x.npz", "x.npz:params", "sam:", "sam")))
    assert [
        n for n in ("augreg:B_16", "augreg:B/16", "augreg:B_16-i21k", "sam:B_16") if needs_index(n)
    ] == ["augreg:B_16"]


INDEX = """\
name,ds,lr,final_val,adapt_ds,filename,adapt_filename
B/16,i21k,0.001,0.40,cifar100,B_16-i21k-300ep-lr_0.001-aug_a-wd_0.1-do_0.0-sd_0.0,x
B/16,i21k,0.001,0.45,cifar100,B_16-i21k-300ep-lr_0.001-aug_b-wd_0.1-do_0.0-sd_0.0,x
B/16,i21k,0.001,0.45,"a, b",B_16-i21k-300ep-lr_0.001-aug_b-wd_0.1-do_0.0-sd_0.0,y
B/16,i21k,0.001,,cifar100,B_16-i21k-300ep-lr_0.001-aug_c-wd_0.1-do_0.0-sd_0.0,x
B/16,i21k_30,0.001,0.99,cifar100,B_16-i21k_30-30ep-lr_0.001-aug_d-wd_0.1-do_0.0-sd_0.0,x
B/16,i1k,0.001,0.99,cifar100,B_16-i1k-300ep-lr_0.001-aug_e-wd_0.1-do_0.0-sd_0.0,x
R+Ti/16,i21k,0.001,0.99,cifar100,R_Ti_16-i21k-300ep-lr_0.001-aug_f-wd_0.1-do_0.0-sd_0.0,x
"""


def test_the_index_rule_takes_the_best_file_pretrained_on_imagenet21k(tmp_path):
    published = select_augreg(INDEX, "B_16")
    assert published.url_gs.endswith("/B_16-i21k-300ep-lr_0.001-aug_b-wd_0.1-do_0.0-sd_0.0.npz")
    assert published.variant == "B/16"
    (tmp_path / "index.csv").write_text(INDEX)
    assert select_augreg(tmp_path / "index.csv", "B_16") == published
    assert select_augreg(INDEX, "R_Ti_16").variant == "R+Ti/16"


def test_the_index_rule_takes_a_file_name_as_it_is():
    name = "B_16-i21k-300ep-lr_0.001-aug_a-wd_0.1-do_0.0-sd_0.0"
    for spelling in (name, f"{name}.npz"):
        assert select_augreg("", spelling).url_gs == f"gs://vit_models/augreg/{name}.npz"


def test_a_selected_file_with_a_row_is_that_row():
    name = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
    index = f"ds,filename,final_val\ni21k,{name},0.5\n"
    assert select_augreg(index, "B_16") == ROWS["augreg:B/16"]
    assert find(f"augreg:{name}") == ROWS["augreg:B/16"]


def test_a_model_that_is_not_in_the_index_gets_the_nearest():
    assert "did you mean 'B_16'?" in refusal(select_augreg, INDEX, "B_61")


@pytest.mark.parametrize("text", ["", "<html></html>", "a,b\n1,2\n", "ds,filename,final_val\ni21k"])
def test_what_is_no_index_is_refused(text, tmp_path):
    path = tmp_path / "index.csv"
    path.write_text(text)
    message = refusal(select_augreg, path, "B_16")
    assert str(path) in message


@pytest.mark.parametrize(
    ("filename", "variant", "image_size", "num_classes", "pretraining"),
    [
        (
            "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",
            "R26+S/32",
            224,
            21843,
            "imagenet21k",
        ),
        (
            "Ti_16-i1k-300ep-lr_0.001-a--cifar100-steps_10k-lr_0.01-res_384",
            "Ti/16",
            384,
            100,
            "imagenet2012+cifar100",
        ),
        (
            "B_8-i21k_30-30ep-lr_0.001-a--kitti-steps_0k-lr_0.01-res_224",
            "B/8",
            224,
            None,
            "imagenet21k+kitti",
        ),
    ],
)
def test_names_of_augreg_files_are_read(filename, variant, image_size, num_classes, pretraining):
    p = describe_augreg(filename)
    assert (p.variant, p.image_size, p.num_classes) == (variant, image_size, num_classes)
    assert p.pretraining == pretraining
    parse_preprocess(p.eval, key="eval")


@pytest.mark.parametrize("name", ["B-16", "B_16-i22k-x", "../B_16-i21k-x", "B_16-i21k-x--y", ""])
def test_other_names_of_augreg_files_are_refused(name):
    refusal(describe_augreg, name)


HEADER = ",".join(field.name for field in dataclasses.fields(Published))
LINE = "sam:X,vit,X/16,224,imagenet2012,1000,valid,0.5,0.5,decode,,,,,,,,gs://b/x,https://h/x,s,n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,model\n", "expected ['name', 'model', 'variant'"),
        (f"{HEADER}\n{LINE}\n{LINE}\n", "line 3: a second 'sam:X'"),
        (f"{HEADER}\n{LINE.replace('224', 'large')}\n", "line 2: invalid literal"),
        (f"{HEADER}\nsam:X,vit\n", "line 2: a cell is missing"),
        (f"{HEADER}\n{LINE.replace(',,gs', ',maybe,gs').replace(',,maybe', ',no,')}\n", "'no'"),
    ],
)
def test_a_catalogue_that_is_wrong_is_refused(text, message, tmp_path):
    path = tmp_path / "catalogue.csv"
    path.write_text(text)
    assert message in refusal(load_catalogue, path)


def test_the_documentation_has_the_table_of_the_catalogue():
    text = PAGE.read_text(encoding="utf-8")
    assert make_table(ROWS.values()) in text
    assert renew(text) == text


def test_the_documentation_names_every_collection():
    text = Path(PAGE).read_text(encoding="utf-8").partition("## All names")[0]
    assert {name.partition(":")[0] for name in ROWS} == COLLECTIONS.keys()
    assert all(f"`{collection}`" in text for collection in COLLECTIONS)
