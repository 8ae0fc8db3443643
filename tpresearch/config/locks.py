"""A file that one process at a time has locked."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import IO

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems that have none, such as Lustre's default, and NFS where its lock service does not run."""


def lock(file: IO[str]) -> bool:
    """Lock a file that is open for writing until it is closed, or this process ends in any way; False if another process has it.

    Raises:
        OSError: ENOLCK on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        number = errno.ENOLCK if error.errno in WITHOUT_LOCKS else error.errno
        raise OSError(number, os.strerror(number or 0)) from error
    return True
