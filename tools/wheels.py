# SPDX-License-Identifier: Apache-2.0
"""Fetches the wheels that another machine's Python lacks to run vit_jax, to be copied there.

    python -m pip list --format=freeze > packages.txt     # on that machine
    python -m tools.wheels packages.txt --python=3.12     # here

For Linux on x86-64. Versions are those of requirements.lock; what is there already stays as it is,
and so does JAX, which fits that machine's accelerator.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.markers import Marker, default_environment
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
_PIN = re.compile(r"^([\w.-]+)==(\S+)(?: ; (.+?))? \\$", re.MULTILINE)
_ITS_OWN = {"jax", "jaxlib"}
# pip takes each for itself alone, not for those before it.
_PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]


def find_missing(lock: str, packages: str, python: str) -> list[str]:
    """The pins of a lock file that a machine needs and lacks, as `NAME==VERSION`.

    Args:
      lock: its text.
      packages: what the machine has, a line each, `NAME==VERSION`.
      python: its version, such as `3.12`.
    """
    have = {canonicalize_name(line.partition("==")[0]) for line in packages.split()}
    there = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    return [
        f"{name}=={version}"
        for name, version, marker in _PIN.findall(lock)
        if canonicalize_name(name) not in have | _ITS_OWN
        and (not marker or Marker(marker).evaluate(there))
    ]


def fetch(pin: str, python: str, folder: Path) -> None:
    """Downloads a wheel, or makes one of a package that has none and is of Python alone.

    Raises:
      SystemExit: neither can be done.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for_there = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    for_there += [f"--platform={platform}" for platform in _PLATFORMS]
    download = [*pip, "download", "--no-deps", f"--dest={folder}", *for_there, pin]
    if not subprocess.run(download, stderr=subprocess.DEVNULL).returncode:
        return
    before = set(folder.iterdir())
    make = subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", pin])
    made = set(folder.iterdir()) - before
    if make.returncode or not all(file.name.endswith("-none-any.whl") for file in made):
        for file in made:
            file.unlink()
        raise SystemExit(f"{pin}: there is no wheel of it for Python {python}")


def main(argv: Sequence[str]) -> None:
    """Fetches all, naming each, and prints what to do there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path, help="what `pip list --format=freeze` says there")
    parser.add_argument("--python", default="3.12", help="the version of Python there")
    parser.add_argument("--folder", type=Path, default=Path("build/wheels"), help="to write to")
    args = parser.parse_args(argv)
    try:
        packages = args.packages.read_text(encoding="utf-8")
    except OSError as e:
        parser.error(f"{args.packages}: {e.strerror}")
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    args.folder.mkdir(parents=True, exist_ok=True)
    for pin in find_missing(lock, packages, args.python):
        print(pin, flush=True)
        fetch(pin, args.python, args.folder)
    size = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"wrote {args.folder}: {size / 2**20:.1f} MiB. Where it was brought to:")
    print(
        f"  python -m pip install --no-index --no-deps --target=build/site {args.folder}/*.whl\n"
        "  export PYTHONPATH=build/site"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
