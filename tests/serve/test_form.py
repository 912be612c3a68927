# SPDX-License-Identifier: Apache-2.0
"""Forms of several parts, as browsers and curl send them."""

import pytest

from vit_jax.serve.form import MAX_PARTS, is_form, read_form

KIND = "multipart/form-data; boundary=----X"
IMAGE = b"\x89PNG\r\n\x1a\n\r\n--\r\n------\r\n\x00\xff\r\n"


def part(content, head='name="file"; filename="a.png"', kind="Content-Type: image/png\r\n"):
    return (
        f"------X\r\nContent-Disposition: form-data; {head}\r\n{kind}\r\n".encode()
        + content
        + b"\r\n"
    )


END = b"------X--\r\n"


def test_a_form_has_files_and_fields_byte_for_byte():
    body = part(b"3", 'name="top_k"', "") + part(IMAGE) + END
    assert read_form(KIND, body) == ([IMAGE], {"top_k": "3"})
    # Text before the first part, and a boundary in quotes.
    assert read_form('Multipart/Form-Data; Boundary="----X"', b"hello\r\n" + body)[0] == [IMAGE]
    assert read_form(KIND, part(IMAGE, 'name="image"') + END) == ([IMAGE], {})
    assert read_form(KIND, part(b"", 'name="a"; filename=""') + END) == ([b""], {})


def test_the_type_of_a_form_is_told_by_its_header():
    assert is_form(KIND)
    assert is_form("MULTIPART/form-data;boundary=a")
    assert not is_form("multipart/mixed; boundary=a")
    assert not is_form("image/png")
    assert not is_form("")


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("multipart/form-data", END, "without a boundary"),
        (f"multipart/form-data; boundary={'x' * 71}", END, "without a boundary"),
        (KIND, b"", "no whole form"),
        (KIND, IMAGE, "no whole form"),
        (KIND, part(IMAGE), "no whole form"),
        (KIND, part(IMAGE)[:-5], "no whole form"),
        (KIND, part(IMAGE) * (MAX_PARTS + 1) + END, "no whole form of at most 8 parts"),
        (KIND, b"------X\r\nnothing\r\n" + END, "without whole headers"),
        (KIND, b"------X\r\n" + b"a" * 9000 + b"\r\n\r\n\r\n" + END, "without whole headers"),
        (KIND, part(b"1", 'name="a"') * 2 + END, "twice or without a name: 'a'"),
        (KIND, part(b"1", "") + part(IMAGE) + END, "twice or without a name: None"),
    ],
)
def test_what_is_no_whole_form_is_refused(kind, body, message):
    with pytest.raises(ValueError, match=message) as error:
        read_form(kind, body)
    assert "\n" not in str(error.value)
