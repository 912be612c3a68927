# SPDX-License-Identifier: Apache-2.0
r"""Compares runs: last and best results, speed, and the config keys that differ.

The runs may be under way. The table has a column for each run, and a star at the best value; csv
and json have a record for each run. The page index.html, which --output writes, draws the curves of
all runs in the same charts. The exit code is 2 for bad input.

Examples:
  python -m vit_jax.compare runs/a runs/b
  python -m vit_jax.compare runs/* --output=compared
  python -m vit_jax.compare runs/* --format=json
"""

import argparse
import json
from collections.abc import Sequence

from vit_jax.observe.console import log, set_up
from vit_jax.pages.comparison import (
    PAGE,
    RunRecord,
    make_csv,
    make_html,
    make_records,
    make_rows,
    read_runs,
    show_table,
)
from vit_jax.utils.command import CommandParser, add_workdir, local_path, run_command
from vit_jax.utils.files import check_fresh, fresh_file, fresh_folder
from vit_jax.utils.streams import print_result
from vit_jax.utils.text import encode_text

FORMATS = ("table", "csv", "json")


def render(runs: Sequence[RunRecord], form: str) -> str:
    """The comparison as text in one of `FORMATS`, or in `html`."""
    if form == "html":
        return make_html(runs)
    records = make_records(runs)
    if form == "csv":
        return make_csv(records)
    if form == "json":
        return json.dumps(records, indent=1) + "\n"
    return "\n".join(show_table(make_rows(records))) + "\n"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command."""
    parser = CommandParser(prog="python -m vit_jax.compare", description=__doc__)
    add_workdir(parser, "Compare the runs of these workdirs.", several=True)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="Print the comparison in this format. The default is %(default)s.",
    )
    parser.add_argument(
        "--output",
        type=local_path,
        help="Write the comparison instead of printing it: to a file that ends in .csv, .json or "
        ".html, or else to a folder with all three. It must not exist.",
    )
    args = parser.parse_intermixed_args(argv)
    parser.require_workdir(args.workdirs)
    return args


def main(argv: Sequence[str]) -> None:
    """Prints the comparison, or writes it to files."""
    args = parse_arguments(argv)
    set_up(quiet=False, to_stderr=args.output is None)
    if args.output is not None:
        check_fresh(args.output)
    runs = read_runs(args.workdirs)
    if args.output is None:
        print_result(render(runs, args.format), end="")
    elif (form := args.output.suffix.removeprefix(".")) in ("csv", "json", "html"):
        with fresh_file(args.output) as fresh:
            fresh.write_bytes(encode_text(render(runs, form)))
        log(f"wrote {args.output}")
    else:
        files = {PAGE: "html", "runs.csv": "csv", "runs.json": "json"}
        with fresh_folder(args.output) as folder:
            for name, form in files.items():
                (folder / name).write_bytes(encode_text(render(runs, form)))
        for name in files:
            log(f"wrote {args.output / name}")


if __name__ == "__main__":
    run_command(main)
