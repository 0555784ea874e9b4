"""Folders: where outputs and cached checkpoints go."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from colqwen_lab.errors import BadInput

PACKAGE = Path(__file__).parent
DATA = PACKAGE / "data"


def cache_folder() -> Path:
    """The folder of checkpoints made here: COLQWEN_LAB_CACHE, else the user's cache folder."""
    if named := os.environ.get("COLQWEN_LAB_CACHE"):
        return Path(named)
    try:
        return Path(platformdirs.user_cache_dir("colqwen-lab"))
    except RuntimeError:  # a user without a home folder
        return Path(tempfile.gettempdir()) / f"colqwen-lab-{os.getuid()}"


def outputs_folder() -> Path:
    """The folder that runs write to, the same from every current folder.

    COLQWEN_LAB_OUTPUTS, else `outputs/` in the checkout, else `outputs/` in the current folder.
    Raises BadInput if it cannot be written.
    """
    checkout = PACKAGE.parent
    root = checkout if (checkout / "pyproject.toml").exists() else Path.cwd()
    return writable_folder(Path(os.environ.get("COLQWEN_LAB_OUTPUTS") or root / "outputs"))


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


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold PATH.lock, then remove it; `on_wait` may raise where another process holds it.

    On a file system without locks it goes on with a warning. Raises OSError for a lock file that
    cannot be opened, as another user's.
    """
    lock = FileLock(f"{path}.lock")
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
