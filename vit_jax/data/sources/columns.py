# SPDX-License-Identifier: Apache-2.0
"""Names of columns in the name of a dataset, as in `parquet:PATH#image=img,label=fine_label`."""

import re
from collections.abc import Sequence


def split_columns(text: str, columns: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Returns the path in the name of a dataset, and the names of columns by what they hold.

    Args:
      text: the path, with `#image=img,label=fine_label` or the like after it, or nothing.
      columns: what columns may hold; only these are recognized, so that a path may have a `#`.
    """
    kinds = f"(?:{'|'.join(columns)})"
    renamed = re.search(f"#({kinds}=[^,]+(?:,{kinds}=[^,]+)*)$", text)
    if not renamed:
        return text, {}
    pairs = (column.partition("=") for column in renamed[1].split(","))
    return text[: renamed.start()], {kind: name for kind, _, name in pairs}
