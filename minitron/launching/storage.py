"""Whether a folder can serve all nodes of a job, as far as one machine can tell."""

import os
import re
from pathlib import Path

from minitron.errors import refuse
from minitron.files import os_errors_are_requests

OWN_DISKS = ("tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "vfat")  # kinds that one machine has for itself


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there. Raises RequestError where one may not be searched."""
    with os_errors_are_requests("cannot look for", folder):
        return next(one for one in (folder, *folder.parents) if one.exists())


def refuse_unwritable(folder: Path, setting: str = "run.dir") -> None:
    """Refuse a folder that can't be made, or written to, by this user. Makes nothing."""
    there = existing(folder)
    if not there.is_dir():
        raise refuse(setting, folder, f"{there} is a file; a folder is needed")
    if not os.access(there, os.W_OK | os.X_OK):
        raise refuse(setting, folder, f"{there} can't be written to here; a folder that all nodes can write to is needed")


def own_disk(folder: Path, mounts: str) -> str | None:
    """The kind of file system that holds a folder, where it is one that other machines seldom see; `mounts`: /proc/self/mounts."""
    place, found = os.path.realpath(existing(folder)), ("", "")
    for line in mounts.splitlines():
        _, point, kind = line.split(" ")[:3]
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)
        if len(point) >= len(found[0]) and f"{place}/".startswith(f"{point.rstrip('/')}/"):
            found = (point, kind)
    return found[1] if found[1] in OWN_DISKS else None
