# SPDX-License-Identifier: Apache-2.0
"""Reads forms of type multipart/form-data (RFC 7578), which browsers and `curl -F` send."""

import email
import email.message

FORM = "multipart/form-data"
# What `curl -d` and `curl --data-binary` call their bodies, and how images start.
_ENCODED = "application/x-www-form-urlencoded"
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM")
# A form has at most this many parts, and so many bytes beside its files.
MAX_PARTS = 8
OVERHEAD = 8192


def is_form(content_type: str) -> bool:
    """Whether a header `Content-Type` is that of a form."""
    return content_type.partition(";")[0].strip().lower() == FORM


def describe_encoded(content_type: str, body: bytes) -> str:
    """Returns what is wrong with a body that `curl -d` has sent in place of an image, or nothing.

    Its header alone does not show that, since `curl --data-binary` sends the same one.
    """
    if not content_type.startswith(_ENCODED) or b"\r" in body or b"\n" in body:
        return ""
    if body.startswith(_IMAGES):
        return "curl -d leaves out line breaks: use --data-binary @FILE or -F file=@FILE"
    if body and len(body) < OVERHEAD and all(0x20 <= byte < 0x7F for byte in body):
        return "the body is text: expected the bytes of a file, as curl -F file=@FILE sends them"
    return ""


def read_form(content_type: str, body: bytes) -> tuple[list[bytes], dict[str, str]]:
    """Separates the parts of a form.

    Args:
      content_type: header of the request, which has the boundary of the parts.
      body: the whole body of the request.

    Returns:
      The contents of the files, and the other fields by name. A form of one part has no fields: its
      part counts as a file even if it has no file name.

    Raises:
      ValueError: the body is not a whole form, or has too many parts or the same field twice.
    """
    boundary = _read_header("Content-Type", content_type).get_boundary("")
    if not 1 <= len(boundary) <= 70:
        raise ValueError(f"{FORM} without a boundary of 1 to 70 characters")
    mark = b"\r\n--" + boundary.encode("latin-1", "replace")
    _, *parts = (b"\r\n" + body).split(mark, MAX_PARTS + 1)
    if not parts or not parts.pop().startswith(b"--"):
        raise ValueError(f"no whole form of at most {MAX_PARTS} parts")
    files: list[bytes] = []
    fields: dict[str, str] = {}
    for part in parts:
        head, blank, content = part.partition(b"\r\n\r\n")
        if not blank or len(head) > OVERHEAD:
            raise ValueError("a part of the form without whole headers")
        headers = email.message_from_string(head.decode("latin-1").strip())
        name = headers.get_param("name", header="Content-Disposition")
        if headers.get_filename() is not None or len(parts) == 1:
            files.append(content)
        elif not isinstance(name, str) or name in fields:
            raise ValueError(f"a field of the form is given twice or without a name: {name!r:.40}")
        else:
            fields[name] = content.decode(errors="replace")
    return files, fields


def _read_header(name: str, value: str) -> email.message.Message:
    message = email.message.Message()
    message[name] = value
    return message
