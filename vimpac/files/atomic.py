"""Files that appear complete or not at all: temporary name, fsync, rename, fsync of the folder. Folders with one writer."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vimpac.errors import FIXABLE, InputError

TEMPORARY = ".tmp"
LOCK = ".lock"

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`. What the body writes there becomes `path`, unless the body raises.

    It gets the permissions that the umask gives, since safetensors writes files that only their owner may read. An OSError of
    the body without a file name (such as a full disk) gets the name of `path`.
    """
    temporary = temporary_of(path)
    try:
        with naming(path):
            descriptor = create(temporary)
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            os.close(descriptor)
            yield temporary
            temporary.chmod(mode)
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """The name under which `path` is written first."""
    return path.with_name(path.name + TEMPORARY)


def create(path: Path) -> int:
    """A descriptor of a new, empty file. Replaces what a killed run left under this name, and never follows a link there."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of `path` to an OSError of the body that has no file name, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # without a number Python would show only the message
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def publish(temporary: Path, path: Path) -> None:
    """Makes the finished file `temporary` durable under its final name."""
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def make_folder(path: Path) -> None:
    """Creates `path` and its parents if they are missing. Raises InputError with the reason if the user can fix it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in FIXABLE:
            raise
        reason = "a file or a link that leads nowhere is in its place" if error.errno == errno.EEXIST else error.strerror
        raise InputError(f"cannot make the folder {path}: {reason}; choose another folder") from error


@contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Reserves `folder` for this process. Raises InputError(refusal) at once if another one (or this one) holds it.

    Creates the folder if it is missing, and removes it again if it is still empty at the end. The lock is the operating
    system's, on the file LOCK in the folder, so it ends with the process in any case. Without locks in the file system, it
    does nothing.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        descriptor = _lock(folder / LOCK, refusal)
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # while locked, so that it cannot be the file of another process
            os.close(descriptor)
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _lock(path: Path, refusal: str) -> int:
    """A descriptor that holds the lock on `path`."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise InputError(f"{path} is a link, expected the lock file of a run: remove it") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(refusal) from None
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process that held the lock has removed the file since it was opened here


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
