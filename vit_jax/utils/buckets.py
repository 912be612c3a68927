# SPDX-License-Identifier: Apache-2.0
"""Objects in a bucket of Google Cloud Storage or S3, through TensorStore.

TensorStore comes with Orbax. It reads credentials where the clients of both stores do, retries what
may succeed later, and can write on condition.
"""

import contextlib
import errno
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from vit_jax.utils.errors import UserError
from vit_jax.utils.text import printable

SCHEMES = ("gs://", "s3://")
EXPECTED = "gs://BUCKET/PATH or s3://BUCKET/PATH"

# Retries of one request, which take up to about 20 seconds together.
RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}
# Seconds for a request whose bytes flow, with its retries: TensorStore ends the others earlier.
_TIMEOUT_S = 1800.0
_THREADS = 16
# Requests at a time, of which ranged reads ahead of their use make many.
_REQUESTS = 128
# Files of at least this many bytes are sent and read two at a time, since they are held in memory.
_LARGE = 2**26
_ADDRESS = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])/(.+)")
# One slash is what is left of a URL that was treated as the path of a file.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(gs|s3):/?(?=[^/])")
# What the libraries in TensorStore print about each place without credentials.
_NOISE = re.compile(
    r"[IWE]\d{4} .* (common-io|AuthCredentialsProvider|google_auth_provider\.cc|aws_api\.cc|"
    r"http-stream|http-connection|http-connection-manager):?"
)
_HINTS = {
    "NoSuchBucket": "the bucket does not exist",
    "NOT_FOUND": "the bucket does not exist",
    "ExpiredToken": "the credentials have expired",
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key is not that of the access key",
    "UNAUTHENTICATED": "credentials are missing, or have expired",
    "PERMISSION_DENIED": "the credentials are missing or do not permit it",
}
# What TensorStore reports of a range that is not in an object.
_BEYOND = "OUT_OF_RANGE"
T = TypeVar("T")


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a text is a URL, or was one: `gs:/b/x` is left where one was treated as a path."""
    return _URL.match(os.fspath(text)) is not None


def split_url(url: str) -> tuple[str, str, str]:
    """Returns the scheme, bucket and path of a URL such as `gs://bucket/runs/digits`.

    Raises:
      UserError: it is of another form.
    """
    found = _ADDRESS.fullmatch(url.rstrip("/"))
    if found is None or not {"", ".", ".."}.isdisjoint(found[3].split("/")):
        raise UserError(f"{url!r}: expected {EXPECTED}")
    return found[1], found[2], found[3]


class Bucket:
    """The objects below a URL, by the rest of their name.

    All methods can be called from any thread. They raise `OSError`, whose `strerror` says in one
    line what failed, without credentials.

    Args:
      url: such as `gs://bucket/runs/digits`.
      whole: whether the objects are all of the bucket, and `url` is that of any of them.

    Raises:
      UserError: it is of another form.
    """

    def __init__(self, url: str, *, whole: bool = False):
        self.scheme, self.name, path = split_url(url)
        self.path = "" if whole else path
        self.url = f"{self.scheme}://{self.name}/{self.path}".rstrip("/")

    @functools.cached_property
    def _store(self) -> Any:
        return _open_store(self.scheme, self.name, f"{self.path}/" if self.path else "")

    def list(self, prefix: str = "") -> list[str]:
        """Returns the sorted names that start with a prefix.

        Where Google Cloud Storage refuses the request, TensorStore reports no names.
        """
        ts = _tensorstore()
        keys = ts.KvStore.KeyRange(prefix, _after(prefix)) if prefix else None
        names = self._call("listed", "", lambda: self._store.list(keys))
        found = sorted(name.decode(errors="surrogateescape") for name in names)
        return [name for name in found if name.startswith(prefix)]

    def read(self, name: str) -> tuple[bytes | None, bytes]:
        """Returns the content of an object, None without one, and its generation for `write`."""
        result = self._call("read", name, lambda: self._store.read(name))
        content = result.value if result.state == "value" else None
        return content, result.stamp.generation

    def read_if_new(self, name: str, known: bytes | None) -> tuple[bytes | None, bytes]:
        """As `read`, but None for an object that still has the generation `known`."""
        if known is None:
            return self.read(name)
        result = self._call("read", name, lambda: self._store.read(name, if_not_equal=known))
        content = result.value if result.state == "value" else None
        return content, result.stamp.generation if content is not None else known

    def read_range(self, name: str, start: int, stop: int | None) -> bytes:
        """Returns the bytes of an object from `start` to `stop`; fewer if it ends before.

        None stands for its end.

        Raises:
          FileNotFoundError: there is no such object.
        """
        for end in dict.fromkeys((stop, None)):  # A range that is not all there is refused.
            try:
                result = self._call("read", name, lambda end=end: self.start_read(name, start, end))
            except OSError as e:
                if _BEYOND not in str(e.strerror):
                    raise
                continue
            self._check_there(name, result)
            return result.value
        return b""

    def read_tail(self, name: str, size: int) -> bytes:
        """Returns the last `size` bytes of an object, or all of one that has fewer.

        Raises:
          FileNotFoundError: there is no such object.
        """
        try:
            result = self._call("read", name, lambda: self.start_read(name, -size, None))
        except OSError as e:
            if _BEYOND not in str(e.strerror):
                raise
            return self.read_range(name, 0, None)
        self._check_there(name, result)
        return result.value

    def start_read(self, name: str, start: int, stop: int | None) -> Any:
        """Starts `read_range`; `result()` of the future has `value`, or raises any error."""
        return self._store.read(name, byte_range=slice(start, stop))

    def generation(self, name: str) -> bytes:
        """The generation of an object, which changes when it is written.

        Raises:
          FileNotFoundError: there is no such object.
        """
        try:
            result = self._call("read", name, lambda: self.start_read(name, 0, 1))
        except OSError as e:
            if _BEYOND in str(e.strerror):  # It is empty.
                return b""
            raise
        self._check_there(name, result)
        return result.stamp.generation

    def _check_there(self, name: str, result: Any) -> None:
        if result.state != "value":
            raise FileNotFoundError(2, "there is no such object", f"{self.url}/{name}")

    def write(
        self, name: str, content: bytes | None, *, if_generation: bytes | None = None
    ) -> bytes | None:
        """Writes a whole object, or deletes it where `content` is None.

        Args:
          name: of the object.
          content: of the object.
          if_generation: that the object has to have, as `read` returned it.

        Returns:
          Its generation; None if it has another one than `if_generation` and was left as it is.
        """
        options: dict[str, Any] = {} if if_generation is None else {"if_equal": if_generation}
        verb = "written" if content is not None else "deleted"
        stamp = self._call(verb, name, lambda: self._store.write(name, content, **options))
        # A condition that does not hold gives the generation of no object.
        return stamp.generation or None

    def upload(self, files: Iterable[tuple[str, Path]]) -> None:
        """Writes files as objects, several at a time."""
        self.each(files, lambda pair: self.write(pair[0], pair[1].read_bytes()), _size_of)

    def download(self, objects: Iterable[tuple[str, Path, int]]) -> None:
        """Reads objects into files, each with about how many bytes it has.

        Raises:
          FileNotFoundError: there is no such object; all others were read.
        """
        missing: list[str] = []

        def fetch(one: tuple[str, Path, int]) -> None:
            name, path, _ = one
            content, _ = self.read(name)
            if content is None:  # An error here would leave the others unread.
                missing.append(name)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

        self.each(objects, fetch, lambda one: one[2])
        if missing:
            raise FileNotFoundError(2, "there is no such object", f"{self.url}/{min(missing)}")

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that do not exist are none."""
        self.each(names, lambda name: self.write(name, None))

    def each(
        self, items: Iterable[T], work: Callable[[T], Any], size: Callable[[T], int] = lambda _: 0
    ) -> None:
        """Calls `work` for items in several threads; in fewer where one has many bytes."""
        items = list(items)
        large = [item for item in items if size(item) >= _LARGE]
        small = [item for item in items if size(item) < _LARGE]
        for some, threads in ((small, _THREADS), (large, 2)):
            if some:
                with ThreadPoolExecutor(min(threads, len(some))) as pool:
                    list(pool.map(work, some))

    def _call(self, verb: str, name: str, start: Callable[[], Any]) -> Any:
        try:
            return start().result(timeout=_TIMEOUT_S)
        except OSError as e:
            if not isinstance(e, TimeoutError):  # The store could not be opened.
                raise
            error: Exception = TimeoutError(f"no answer in {_TIMEOUT_S:.0f} s")
        except Exception as e:  # TensorStore raises ValueError for whatever a server answers.
            error = e
        where = f"{self.url}/{name}" if name else self.url
        # What no retry mends has a number of its own.
        number = errno.EACCES if any(code in str(error) for code in _HINTS) else errno.EIO
        raise OSError(number, f"{where} can't be {verb}: {describe_failure(error)}")


def describe_failure(error: BaseException) -> str:
    """Returns what TensorStore reports in one line, without the answer and its identifiers."""
    # The answer of a server stands in brackets; it may repeat what was sent.
    text = re.split(r" \[[\w-]+='", " ".join(str(error).split()), maxsplit=1)[0][:300]
    for name, value in os.environ.items():
        if len(value) > 6 and re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY", name):
            text = text.replace(value, "***")
    hint = next((hint for code, hint in _HINTS.items() if code in text), "")
    return printable(f"{hint} ({text})" if hint else text or type(error).__name__)


def _after(prefix: str) -> bytes:
    """The smallest name after all names that start with a prefix, which is ASCII."""
    name = prefix.encode()
    return name[:-1] + bytes([name[-1] + 1])


def _size_of(pair: tuple[str, Path]) -> int:
    return pair[1].stat().st_size


@functools.cache
def _tensorstore() -> Any:
    """Imports TensorStore, which reads some of its settings only then."""
    defaults = {"CONNECT_TIMEOUT_SECONDS": 10, "LOW_SPEED_TIME_SECONDS": 20}
    for name, value in (defaults | {"LOW_SPEED_LIMIT_BYTES": 1}).items():
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", str(value))
    import tensorstore

    return tensorstore


@functools.cache
def _open_store(scheme: str, bucket: str, path: str) -> Any:
    """Opens a store; the first request looks for credentials, which is not silent by itself."""
    ts = _tensorstore()
    env = os.environ

    def context(driver: str) -> dict[str, Any]:
        limit = {"limit": _REQUESTS}
        return {f"{driver}_request_retries": RETRIES, f"{driver}_request_concurrency": limit}

    spec: dict[str, Any] = {"bucket": bucket, "path": path}
    if scheme == "gs":
        spec |= {"driver": "gcs", "context": context("gcs")}
        _check_key_file()
        # The variable of Google's clients and its emulators.
        if (host := env.get("STORAGE_EMULATOR_HOST")) and "TENSORSTORE_GCS_HTTP_URL" not in env:
            env["TENSORSTORE_GCS_HTTP_URL"] = host if "://" in host else f"http://{host}"
            env.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")
    else:
        spec |= {"driver": "s3", "context": context("s3")}
        if endpoint := env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"):
            region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
            spec |= {"endpoint": endpoint, "aws_region": region}
    with _without_noise():
        try:
            store = ts.KvStore.open(spec).result(timeout=_TIMEOUT_S)
            with contextlib.suppress(Exception):  # The next request reports it.
                store.read("lock").result(timeout=_TIMEOUT_S)
        except Exception as e:
            raise OSError(
                5, f"{scheme}://{bucket} can't be opened: {describe_failure(e)}"
            ) from None
    return store


def _check_key_file() -> None:
    # TensorStore would use no credentials instead.
    file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if file and not os.path.isfile(file):
        raise OSError(2, f"GOOGLE_APPLICATION_CREDENTIALS={file}: there is no such file")


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Holds back what is written to stderr meanwhile, and drops what C++ libraries log of it."""
    try:
        saved = os.dup(2)
    except OSError:  # There is no stderr.
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            lines = [line for line in held if not _NOISE.match(line.decode(errors="replace"))]
            if lines:
                os.write(2, b"".join(lines))
