# SPDX-License-Identifier: Apache-2.0
"""What another machine lacks."""

import pytest

from tools.wheels import find_missing, main

LOCK = r"""# made by a tool
clu==0.0.12 \
    --hash=sha256:12
colorama==0.4.6 ; sys_platform == 'win32' \
    --hash=sha256:12
flax==0.12.8 ; python_full_version < '3.12' \
    --hash=sha256:12
flax==0.12.12 ; python_full_version >= '3.12' \
    --hash=sha256:12
jax==0.12.0.1 ; python_full_version >= '3.12' \
    --hash=sha256:12
ml-collections==1.1.0 \
    --hash=sha256:12
"""


@pytest.mark.parametrize(
    ("packages", "python", "missing"),
    [
        ("", "3.12", ["clu==0.0.12", "flax==0.12.12", "ml-collections==1.1.0"]),
        ("", "3.11", ["clu==0.0.12", "flax==0.12.8", "ml-collections==1.1.0"]),
        ("Flax==0.9\nml_collections==1.0\n", "3.12", ["clu==0.0.12"]),
    ],
)
def test_what_is_there_stays_and_the_rest_is_of_its_python(packages, python, missing):
    assert find_missing(LOCK, packages, python) == missing


def test_a_list_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "packages.txt")])
    assert end.value.code == 2
    assert "packages.txt: No such file" in capsys.readouterr().err.splitlines()[-1]
