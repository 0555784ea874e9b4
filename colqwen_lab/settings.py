"""Folders and files: where outputs and cached checkpoints go, and how a file is written whole."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from colqwen_lab.errors import BadInput, LabError, MissingRequirement

PACKAGE = Path(__file__).parent
DATA = PACKAGE / "data"


def cache_folder() -> Path:
    """The folder of checkpoints made here: COLQWEN_LAB_CACHE, else the user's cache folder."""
    return _folder("COLQWEN_LAB_CACHE", _usual_cache())


def _usual_cache() -> str:
    try:
        return platformdirs.user_cache_dir("colqwen-lab")
    except RuntimeError:  # a user without a home folder
        return os.path.join(tempfile.gettempdir(), f"colqwen-lab-{os.getuid()}")


def _folder(variable: str, default: str | Path) -> Path:
    return Path(os.path.expanduser(os.environ.get(variable) or default))


def outputs_folder() -> Path:
    """The folder that runs write to, the same from every current folder.

    COLQWEN_LAB_OUTPUTS, else `outputs/` in the checkout, else `outputs/` in the current folder.
    Raises BadInput if it cannot be written.
    """
    checkout = PACKAGE.parent
    root = checkout if (checkout / "pyproject.toml").exists() else Path.cwd()
    return writable_folder(_folder("COLQWEN_LAB_OUTPUTS", root / "outputs"))


def in_use(folder: Path) -> bool:
    """Whether `folder` is a file, or a folder that holds something; BadInput for an odd name."""
    try:
        return not stat.S_ISDIR(os.stat(folder).st_mode) or any(folder.iterdir())
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise _cannot_make(folder, error) from None


def writable_folder(folder: Path) -> Path:
    """`folder`, created if needed; BadInput if it cannot be created or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _cannot_make(folder, error) from None
    if not os.access(folder, os.W_OK):
        raise BadInput(f"cannot write to the folder {folder}; name a writable folder")
    return folder


def _cannot_make(folder: Path, error: Exception) -> BadInput:
    reason = getattr(error, "strerror", None) or str(error)
    return BadInput(f"cannot create the folder {folder}: {reason}; name a writable folder")


OTHER_KINDS = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}


def regular_file(path: str | Path, like: str = "") -> Path:
    """The real path of a regular file, or of none; what it holds matches the pattern `like`.

    Raises BadInput for a device, pipe or folder, and for a file of another kind.
    """
    if str(path) == "-":
        raise BadInput("- must be the name of a file; `compare --markdown -` alone means stdout")
    try:
        mode, head = os.stat(path).st_mode, b""
        if like and stat.S_ISREG(mode):
            with open(path, "rb") as file:
                head = file.read(4096)
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"cannot use {path}: {reason}; name a file in a folder you can write"
        ) from None
    if not stat.S_ISREG(mode):
        kind = next((kind for test, kind in OTHER_KINDS.items() if test(mode)), "device")
        raise BadInput(f"{path} must be a regular file or a new one, got a {kind}; name another")
    if head and not re.match(like.encode(), head):
        raise BadInput(f"{path} holds content of another kind, which stays; name a new file")
    return Path(os.path.realpath(path))


def write_file(path: str | Path, content: str | bytes, like: str) -> Path:
    """Write a whole file and return its path; where that fails, the old file stays.

    Raises BadInput as `regular_file` does, MissingRequirement when the disk is full.
    """
    real = regular_file(path, like)
    part = real.with_name(f".{real.name}.{os.getpid()}.tmp")
    try:
        with part.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(real)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = MissingRequirement if full else BadInput
        then = "free some space" if full else "name a file in a folder you can write"
        raise kind(f"cannot write {path}: {error.strerror or error}; {then}") from None
    finally:
        with suppress(OSError):
            part.unlink()
    return Path(path)


@contextmanager
def writing(path: Path, kind: type[LabError], then: str) -> Iterator[None]:
    """Around a write: an OSError becomes a one-line `kind` that says what to do `then`."""
    try:
        yield
    except OSError as error:
        raise kind(f"cannot write {path}: {error.strerror or error}; {then}") from None


def append(path: Path, left: bytes) -> None:
    """Append whole lines, on disk when this returns; where that fails, none of them."""
    with path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(start)
            raise


def end_last_line(path: Path, whole: int) -> None:
    """Cut what a killed run left of its last line, or give the last row its newline."""
    with path.open("ab+") as file:
        file.truncate(whole)
        file.seek(max(whole - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.write(b"\n")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold PATH.lock, then remove it; `on_wait` may raise where another process holds it.

    On a file system without locks it goes on with a warning. Raises OSError for a lock file that
    cannot be opened, as another user's, and BadInput for one that is no lock.
    """
    lock = FileLock(regular_file(f"{path}.lock", r"\Z"))  # which empties the file
    with ExitStack() as stack:
        try:
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except Timeout:
                on_wait()
                stack.enter_context(lock.acquire())
            stack.callback(_remove, lock.lock_file)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"the file system of {path} has no locks; run one command at a time on it",
                stacklevel=2,
            )
        yield


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
