# SPDX-License-Identifier: Apache-2.0
"""Local copies of workdirs in buckets.

All of the package reads and writes a workdir as a folder. Where `--workdir` is the URL of a bucket,
that folder is a local copy: its small files are downloaded when it is opened, the arrays of a
checkpoint when they are read. What a run writes is uploaded with each checkpoint, of which the
manifest comes last: a checkpoint without one does not count.

Lines that are printed show the URL in place of the folder, see `utils.text.name_in_texts`.
"""

import atexit
import contextlib
import errno
import itertools
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vit_jax.utils.bounds import is_inside
from vit_jax.utils.buckets import EXPECTED, SCHEMES, Bucket, is_url
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import private_folder
from vit_jax.utils.layout import (
    BROKEN,
    CHECKPOINTS,
    CONFIG,
    DIVERGENCE,
    EVALS,
    LABELS,
    LEDGER,
    LOCK,
    MANIFEST,
    METRICS,
    REPORT,
    RESULTS,
    ROLLBACKS,
    RUN,
    TRACKERS_FILE,
)
from vit_jax.utils.text import name_in_texts, printable

# Seconds from one renewal of a lock to the next, and after which one that was not renewed is free.
RENEW_S, LEASE_S = 10.0, 45.0
# Seconds from one upload of files to the next, between checkpoints.
_UPLOAD_S = 60.0
# A lock whose time is so many seconds ago is free at once, however wrong the clocks are.
_ANCIENT_S = 3600.0
# Files of a checkpoint that describe it; the others hold arrays.
_SMALL = (MANIFEST, RUN, "description/", "metrics/")
# Names of what the other processes of a job have uploaded of a checkpoint, and seconds to wait.
_PART, _PART_S = "part-", 900.0
# Files of a workdir that have a use in a local copy, and never those of other folders.
_READ = (CONFIG, RUN, LABELS, METRICS, LEDGER, TRACKERS_FILE, RESULTS, REPORT)
_READ_BELOW = (f"{EVALS}/", f"{DIVERGENCE}/{ROLLBACKS}")
# Endings of files of weights and images, which are no workdirs.
_WEIGHTS = (".npz", ".npy", ".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".onnx")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".txt", ".csv")

_mirrors: dict[str, "Mirror"] = {}


def find_folder(workdir: str | os.PathLike[str], *, key: str = "--workdir") -> Path:
    """Returns the folder of a workdir: its own, or a local copy of what a bucket has below a URL.

    Raises:
      UserError: the URL is of another form, or the bucket can't be read.
    """
    if not is_url(workdir):
        return Path(workdir)
    url = os.fspath(workdir)
    if not url.startswith(SCHEMES):
        raise UserError(f"{key}={url!r}: expected a folder, {EXPECTED}")
    try:
        bucket = Bucket(url)
        for mirror in _mirrors.values():
            if mirror.url == bucket.url:
                mirror.refresh()
                return mirror.root
        mirror = Mirror(bucket)
        mirror.refresh()
    except UserError as e:
        raise UserError(f"{key}={e}") from None
    except OSError as e:
        raise UserError(f"{key}={url}: {e.strerror or e}") from None
    _mirrors[str(mirror.root)] = mirror
    return mirror.root


def find_local(source: str, *, key: str = "--init_from") -> str:
    """Returns a source of weights with a workdir in a bucket replaced by its local copy.

    Args:
      source: such as `gs://bucket/run`, `gs://bucket/run/checkpoints/20` or `gs://bucket/run:PART`;
        a file, which its ending shows, and what is no URL of a bucket are returned as they are.
      key: that the source was given for.

    Raises:
      UserError: see `find_folder`.
    """
    if not source.startswith(SCHEMES):
        return source
    scheme, _, rest = source.partition("://")
    rest, colon, part = rest.partition(":")
    if PurePosixPath(rest).suffix.lower() in (*_WEIGHTS, *_IMAGES):
        return source
    run, inside, step = f"{rest.rstrip('/')}/".partition(f"/{CHECKPOINTS}/")
    folder = find_folder(f"{scheme}://{run.rstrip('/')}", key=key)
    return f"{folder}{f'{inside}{step}'.rstrip('/')}{colon}{part}"


def find_mirror(path: Path) -> "Mirror | None":
    """Returns the local copy that a path is in; None if it is in none."""
    if not _mirrors:
        return None
    path = path.absolute()
    return next((_mirrors[p] for p in map(str, (path, *path.parents)) if p in _mirrors), None)


def refresh(folder: Path) -> None:
    """Brings the local copy of a workdir up to date; other folders are as they are.

    Raises:
      UserError: the bucket can't be read.
    """
    if (mirror := find_mirror(folder)) is not None:
        try:
            mirror.refresh()
        except OSError as e:
            raise UserError(f"--workdir={mirror.url}: {e.strerror}") from None


def fetch_checkpoint(
    folder: Path,
    items: Collection[str] | None = None,
    *,
    names: Collection[str] | None = None,
) -> None:
    """Downloads what is not here of a checkpoint in a local copy; others are as they are.

    Args:
      folder: of the checkpoint.
      items: the parts that are wanted, such as `params`; None for all.
      names: of the files that are wanted, in these parts; None for all.

    Raises:
      UserError: the bucket can't be read.
    """
    if (mirror := find_mirror(folder)) is not None:
        try:
            mirror.fetch(folder, items, names)
        except OSError as e:
            raise UserError(f"--workdir={mirror.url}: {e.strerror}") from None


def upload(path: Path) -> None:
    """Uploads what was written in the local copy of a workdir; does nothing for other folders.

    Raises:
      OSError: it can't be uploaded.
    """
    if (mirror := find_mirror(path)) is not None:
        mirror.upload()


class Mirror:
    """A local copy of a workdir in a bucket, which ends with the process.

    Attributes:
      url: of the workdir.
      root: the folder.
    """

    def __init__(self, bucket: Bucket):
        self.bucket, self.url = bucket, bucket.url
        bucket.list(CONFIG)  # Before a folder is made: whether the bucket can be read.
        self._home = _make_home()
        self.root = self._home / bucket.name / bucket.path
        self.root.mkdir(parents=True)
        name_in_texts(str(self.root), self.url)
        # Generations of objects that were read, and what was last written here, by name.
        self._generations: dict[str, bytes] = {}
        self._sent: dict[str, tuple[int, int]] = {}
        self._busy = threading.RLock()
        self._lost: str | None = None
        self._witness = CONFIG  # an object that a listing has to have if it exists
        self._keep = False
        atexit.register(self._remove)

    def _remove(self) -> None:
        if not self._keep:
            shutil.rmtree(self._home, ignore_errors=True)

    # Reading

    def refresh(self) -> None:
        """Downloads small files that are new or changed; checkpoints that are gone are removed.

        Raises:
          OSError: the bucket can't be read.
        """
        with self._busy:
            names = [name for name in self.bucket.list() if is_inside(name)]
            # A listing that is refused, or whose later pages are, is shorter, without an error: a
            # run would start from scratch. Names are sorted, and checkpoints come first.
            if self._witness not in names and self.bucket.read(self._witness)[0] is not None:
                raise OSError(
                    errno.EACCES,
                    f"{self.url} can't be listed: the credentials permit reading objects, and not "
                    "listing all of them",
                )
            whole = _whole_steps(names)
            wanted = [name for name in names if _is_small(name, whole)]
            changed = [n for n in wanted if self._is_as_read(n)]
            self.bucket.each(changed, self._refresh_one)
            folder = self.root / CHECKPOINTS
            for step in os.listdir(folder) if folder.is_dir() else ():
                if step.isdecimal() and step not in whole:
                    shutil.rmtree(folder / step, ignore_errors=True)

    def _is_as_read(self, name: str) -> bool:
        """Whether a file has no changes that are not uploaded, which would be overwritten."""
        path = self.root / name
        return not path.exists() or self._sent.get(name) == _stamp(path)

    def _refresh_one(self, name: str) -> None:
        path = self.root / name
        known = self._generations.get(name) if path.exists() else None
        content, self._generations[name] = self.bucket.read_if_new(name, known)
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.part")
            temporary.write_bytes(content)
            os.replace(temporary, path)
            self._sent[name] = _stamp(path)
            if path.name == MANIFEST and name.startswith(f"{CHECKPOINTS}/"):
                self.drop_arrays(path.parent)  # Arrays that are here were of another one.

    def fetch(
        self,
        checkpoint: Path,
        items: Collection[str] | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        """Downloads the arrays of a checkpoint, as far as they are not here.

        Args:
          checkpoint: its folder in the local copy.
          items: the parts that are wanted, such as `params`; None for all.
          names: of the files that are wanted, in these parts; None for all.

        Raises:
          OSError: they can't be read.
        """
        prefix = checkpoint.absolute().relative_to(self.root).as_posix()
        try:
            files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
            sizes = {name: int(entry[0]) for name, entry in files.items() if is_inside(name)}
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            return  # The caller finds the fault of the manifest.
        missing = [
            (f"{prefix}/{name}", checkpoint / name, size)
            for name, size in sizes.items()
            if (items is None or name.partition("/")[0] in items)
            and (names is None or name in names)
            and not (checkpoint / name).exists()
        ]
        with contextlib.suppress(FileNotFoundError):  # The caller finds what is missing.
            self.bucket.download(missing)

    def list_missing(self, checkpoint: Path) -> list[str]:
        """The names in the manifest of a checkpoint of which the bucket has no object."""
        prefix = f"{checkpoint.absolute().relative_to(self.root).as_posix()}/"
        files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        there = {name.removeprefix(prefix) for name in self.bucket.list(prefix)}
        return sorted(set(files) - there)

    # Writing

    def upload(self) -> None:
        """Uploads files that have changed, but for checkpoints.

        Raises:
          OSError: one can't be uploaded.
        """
        with self._busy:
            self._check_lock()
            changed = {}
            for top in sorted(self.root.iterdir()):
                if top.name in (CHECKPOINTS, BROKEN, LOCK):
                    continue
                for path in (top, *sorted(top.rglob("*"))):
                    name = path.relative_to(self.root).as_posix()
                    with contextlib.suppress(FileNotFoundError):  # It was temporary.
                        if not path.is_file() or path.suffix in (".tmp", ".part"):
                            continue
                        if self._sent.get(name) != (stamp := _stamp(path)):
                            changed[name] = stamp
            self.bucket.upload((name, self.root / name) for name in changed)
            self._sent |= changed
            for name in changed:
                self._generations.pop(name, None)

    def upload_part(
        self, step: int, files: Mapping[str, list[Any]], folder: Path, *, process: int
    ) -> None:
        """Uploads the arrays of a process that is not the first, and then what it has uploaded.

        Args:
          step: of the checkpoint.
          files: sizes and checksums by name.
          folder: that has them.
          process: index of the process.

        Raises:
          OSError: they can't be uploaded.
        """
        prefix = f"{CHECKPOINTS}/{step}/"
        try:
            self.bucket.upload((f"{prefix}{name}", folder / name) for name in files)
        except OSError:
            self.bucket.write(f"{prefix}{_PART}{process}", b"null")
            raise
        self.bucket.write(f"{prefix}{_PART}{process}", json.dumps(dict(files)).encode())

    def wait_for_parts(self, step: int, processes: Collection[int]) -> dict[str, list[Any]]:
        """Waits until other processes have uploaded their parts of a checkpoint.

        Returns:
          The sizes and checksums of their files by name.

        Raises:
          OSError: one is missing for too long.
        """
        prefix, until = f"{CHECKPOINTS}/{step}/{_PART}", time.monotonic() + _PART_S
        wanted = [f"{prefix}{process}" for process in processes]
        while wanted and not (there := set(self.bucket.list(prefix))).issuperset(wanted):
            if time.monotonic() > until:
                missing = next(name for name in wanted if name not in there)
                raise OSError(
                    errno.ETIMEDOUT,
                    f"process {missing.removeprefix(prefix)} has not uploaded its part of the "
                    f"checkpoint for {_PART_S:.0f} s",
                )
            time.sleep(0.2)
        files: dict[str, list[Any]] = {}
        for name in wanted:
            part = json.loads(self.bucket.read(name)[0] or b"null")
            if part is None:
                raise OSError(errno.EIO, f"{self.url}/{name}: its process can't upload its part")
            files |= part
        self.bucket.delete(wanted)
        return files

    def upload_checkpoint(self, step: int, folder: Path) -> None:
        """Uploads a checkpoint from a folder with its manifest, which comes last.

        Raises:
          OSError: it can't be uploaded.
        """
        self._check_lock()
        prefix = f"{CHECKPOINTS}/{step}/"
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        named = [(f"{prefix}{path.relative_to(folder).as_posix()}", path) for path in files]
        self.bucket.upload(one for one in named if one[0] != f"{prefix}{MANIFEST}")
        # Records up to this step come before the checkpoint counts.
        self.upload()
        self._check_lock()
        self.bucket.write(f"{prefix}{MANIFEST}", (folder / MANIFEST).read_bytes())

    def drop_arrays(self, checkpoint: Path) -> None:
        """Removes the arrays of a checkpoint from the local copy, since the bucket has them."""
        for path in checkpoint.iterdir():
            if path.is_dir() and not f"{path.name}/".startswith(_SMALL):
                shutil.rmtree(path, ignore_errors=True)

    def remove_checkpoint(self, step: int) -> None:
        """Removes a checkpoint from the bucket: first its manifest, so that it does not count.

        Raises:
          OSError: it can't be removed.
        """
        self._check_lock()
        self._delete_checkpoint(f"{CHECKPOINTS}/{step}/")

    def _delete_checkpoint(self, prefix: str) -> None:
        names = self.bucket.list(prefix)
        if f"{prefix}{MANIFEST}" in names:
            self.bucket.delete([f"{prefix}{MANIFEST}"])
        self.bucket.delete(name for name in names if name != f"{prefix}{MANIFEST}")

    def set_aside(self, step: int) -> str:
        """Moves a checkpoint to a free name such as `broken/20`, and returns that.

        Raises:
          OSError: it can't be moved.
        """
        taken = {name.split("/")[1] for name in self.bucket.list(f"{BROKEN}/") if "/" in name}
        names = (f"{step}-{i}" for i in itertools.count(2))
        free = next(name for name in itertools.chain([str(step)], names) if name not in taken)
        prefix, target = f"{CHECKPOINTS}/{step}/", f"{BROKEN}/{free}"
        for name in self.bucket.list(prefix):
            content, _ = self.bucket.read(name)
            if content is not None:
                self.bucket.write(f"{target}/{name.removeprefix(prefix)}", content)
        self._delete_checkpoint(prefix)
        return target

    def remove_halves(self) -> None:
        """Removes checkpoints without a manifest, which a killed run left half uploaded.

        Raises:
          OSError: they can't be removed.
        """
        names = self.bucket.list(f"{CHECKPOINTS}/")
        whole = _whole_steps(names)
        for step in {name.split("/")[1] for name in names} - whole:
            prefix = f"{CHECKPOINTS}/{step}/"
            # The listing may be shorter than it should be, see `refresh`.
            if step.isdecimal() and self.bucket.read(f"{prefix}{MANIFEST}")[0] is None:
                self.bucket.delete(name for name in names if name.startswith(prefix))

    # The lock

    def find_holder(self) -> str | None:
        """Returns the process that trains in the workdir, as `process PID on HOST`, or None.

        A process that was killed holds the lock up to `LEASE_S` seconds longer.

        Raises:
          OSError: the bucket can't be read.
        """
        content, _ = self.bucket.read(LOCK)
        record = _parse_lock(content)
        if content is None or _is_over(record) or time.time() - record["time"] > 2 * LEASE_S:
            return None
        return record["holder"]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the workdir for a run, and uploads what it has written at its end.

        The lock is an object that is written on condition and renewed every `RENEW_S` seconds. One
        that was not renewed for `LEASE_S` seconds is that of a process that was killed, and is
        taken over, at once if that process was on this machine.

        Raises:
          UserError: another process holds the lock, or there can be none.
        """
        self._lost = None
        try:
            generation = self._acquire()
            # The run before may have ended meanwhile.
            self._witness = LOCK
            self.refresh()
            self.remove_halves()
        except OSError as e:
            raise UserError(f"--workdir={self.url}: {e.strerror}") from None
        stop = threading.Event()
        thread = threading.Thread(
            target=self._hold, args=(generation, stop), name="lock", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            self._finish()
            stop.set()
            thread.join()

    def _acquire(self) -> bytes:
        seen, since, told = None, 0.0, False
        while True:
            content, generation = self.bucket.read(LOCK)
            record = _parse_lock(content)
            waited = time.monotonic() - since
            if content is None or _is_over(record) or (seen == content and waited > LEASE_S):
                mine = self.bucket.write(LOCK, _make_lock(), if_generation=generation)
                if mine is not None:
                    return mine
            elif seen is None:
                seen, since = content, time.monotonic()
            elif seen != content:  # It was renewed: its holder is alive.
                raise UserError(
                    f"--workdir={self.url!r} is in use by {record['holder']}; expected one run at "
                    "a time: wait for its end, or choose another workdir"
                )
            elif not told:
                told = True
                _log(
                    f"{self.url} is locked by {record['holder']}: waiting up to {LEASE_S:.0f} s "
                    "to see whether that is still running"
                )
            time.sleep(min(0.5, RENEW_S / 4))

    def _hold(self, generation: bytes, stop: threading.Event) -> None:
        """Runs in the background: renews the lock, and uploads files between checkpoints."""
        uploaded, failing = time.monotonic(), False
        while not stop.wait(RENEW_S):
            try:
                renewed = self.bucket.write(LOCK, _make_lock(), if_generation=generation)
                if renewed is None:
                    content, now = self.bucket.read(LOCK)
                    # A request that was answered with an error may have been carried out.
                    if content is None or not _is_own(_parse_lock(content)):
                        by = _parse_lock(content)["holder"] if content else "no process"
                        self._lost = f"the lock of {self.url} was taken over by {by}"
                        _log(f"{self._lost}: this run writes nothing more there")
                        return
                    renewed = now
                generation = renewed
                has_begun = (self.root / CONFIG).exists()
                if has_begun and time.monotonic() - uploaded > _UPLOAD_S:
                    self.upload()
                    uploaded = time.monotonic()
                failing = False
            except OSError as e:
                if not failing:
                    _log(f"{e.strerror}: continues, and tries again")
                failing = True
        with contextlib.suppress(OSError):
            self.bucket.write(LOCK, None, if_generation=generation)

    def _check_lock(self) -> None:
        if self._lost is not None:
            raise OSError(errno.EPERM, self._lost)

    def _finish(self) -> None:
        if not (self.root / CONFIG).exists():  # It was refused.
            return
        try:
            self.upload()
        except OSError as e:
            self._keep = True
            _log(f"{e.strerror}: what was written since the last upload is kept in {self._home}")


def _log(text: str) -> None:
    import logging

    logging.getLogger("vit_jax").warning("%s", printable(text))


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _whole_steps(names: Collection[str]) -> set[str]:
    """The steps of checkpoints that have a manifest."""
    parts = [name.split("/") for name in names]
    return {p[1] for p in parts if len(p) == 3 and p[0] == CHECKPOINTS and p[2] == MANIFEST}


def _is_small(name: str, whole: Collection[str]) -> bool:
    """Whether an object is part of each local copy."""
    top, _, rest = name.partition("/")
    if top == CHECKPOINTS:
        step, _, file = rest.partition("/")
        return step in whole and file.startswith(_SMALL)
    return name in _READ or name.startswith(_READ_BELOW)


def _make_home() -> Path:
    """Makes a folder for a local copy, and removes those of processes that were killed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return private_folder(cache / "vit_jax" / "workdirs")


def _boot() -> str:
    """Names this start of this machine, whose process numbers are unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Each container has numbers of its own.
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _make_lock() -> bytes:
    host = socket.gethostname()
    record = {
        "holder": f"process {os.getpid()} on {host}",
        "pid": os.getpid(),
        "boot": _boot(),
        "time": time.time(),
    }
    return json.dumps(record).encode()


def _parse_lock(content: bytes | None) -> dict[str, Any]:
    record = {"holder": "another process", "pid": 0, "boot": "", "time": 0.0}
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        found = json.loads(content or b"")
        if isinstance(found, dict):
            record |= {k: v for k, v in found.items() if type(v) is type(record.get(k))}
    return record


def _is_own(record: dict[str, Any]) -> bool:
    return record["pid"] == os.getpid() and record["boot"] == _boot()


def _is_over(record: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock is surely gone."""
    if record["time"] < time.time() - _ANCIENT_S:
        return True
    if record["boot"] and record["boot"] == _boot() and record["pid"] > 0:
        try:
            os.kill(record["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
    return False
