"""Files that are complete or absent: written under a temporary name beside the target, fsynced, renamed."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minitron.errors import RequestError, first_line

ALMOST_FULL = 1 << 20  # bytes that are free
LARGEST_JSON = 1 << 28  # bytes; the largest file that is read as JSON, a tokenizer's apart, has a hundredth of that


@contextlib.contextmanager
def os_errors_are_requests(what: str, path: Path) -> Iterator[None]:
    """A full disk or a read-only folder is the user's to mend: one line instead of a traceback."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{what} {path}: {error.strerror or why_not_written(error, path)}") from error
    except SafetensorError as error:  # its writer wraps what the system said
        raise RequestError(f"{what} {path}: {why_not_written(error, path)}") from error


def why_not_written(error: BaseException, path: Path) -> str:
    """One line on why something could not be written, where a library does not pass on what the system said: a full disk is looked for."""
    there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
    with contextlib.suppress(OSError):
        if there is not None and shutil.disk_usage(there).free < ALMOST_FULL:
            return os.strerror(errno.ENOSPC)
    return next(reversed(str(error).strip().splitlines()), repr(error))


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `target` (file or folder) to write to; it takes the target's place only if the block succeeds.

    A folder that already stands at `target` is replaced; what an earlier, killed writer left is removed first.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.partial")
    with os_errors_are_requests("cannot write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        try:
            yield temporary
            mode = usual_mode()
            for path in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
                if path.is_file():
                    path.chmod(mode)  # safetensors lets nobody but the owner read what it writes
                fsync_path(path)
            if target.is_dir() or temporary.is_dir():
                remove(target)
            os.replace(temporary, target)
            fsync_path(target.parent)
        except BaseException:
            remove(temporary)
            raise


def usual_mode() -> int:
    """The permissions of a new file, as the umask has them."""
    mask = os.umask(0o077)  # there is no other way to read it; a file that another thread makes right now is closed rather than open to all
    os.umask(mask)
    return 0o666 & ~mask


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there. A folder loses its name first: half of one is never found under it."""
    shutil.rmtree(_doomed(path), ignore_errors=True)  # where an earlier removal was killed
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(retire(path))
    else:
        path.unlink(missing_ok=True)


def _doomed(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.removed")


def retire(folder: Path) -> Path:
    """Give a folder that is to be removed another name, beside it, and return that."""
    doomed = _doomed(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    return doomed


def link(path: Path, name: Path) -> None:
    """Give a file a second name; where the file system can't, it is copied."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, complete or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; one that is missing, broken or out of all proportion is refused in one line."""
    try:
        if (size := Path(path).stat().st_size) > LARGEST_JSON:
            raise ValueError(f"{size:,} bytes, and at most {LARGEST_JSON:,} are read")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {error}") from error
    except RecursionError as error:
        raise RequestError(f"cannot read {path}: it is nested too deeply") from error


@contextlib.contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Inside the block what a file holds is taken apart: one that lacks something is refused in one line, which names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RequestError(f"cannot read {path}: it is not as it was written ({type(error).__name__}: {first_line(error)})") from error


def read_object(path: Path, of_objects: bool = False) -> dict[str, Any]:
    """`read_json` of a file that holds a JSON object; with `of_objects`, one whose values are objects too. Anything else is refused in one line."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise RequestError(f"cannot read {path}: it is not a JSON object")
    if of_objects and (odd := [name for name, value in found.items() if not isinstance(value, dict)]):
        raise RequestError(f"cannot read {path}: {odd[0]} is not a JSON object")
    return found


def sha256(*paths: Path) -> str:
    """Hash of the contents of `paths`, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
