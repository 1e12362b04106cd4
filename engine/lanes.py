"""The lane directory: which lanes there are, and who owns their two ends.

    <lane dir>/lane-0003.ring        the ring file
               lane-0003.producer    locked by the web worker that appends to it
               lane-0003.consumer    locked by the writer that drains it
               archive/              sealed lanes that were drained to their end
               writers.lock          locked by the one who supervises writers here

A lock is an flock on a file of its own, opened after any fork with O_CLOEXEC: the kernel frees it when its holder dies
and nobody else can. A process that holds one never forks. Lock files are never removed, so that two processes can
never hold locks on two inodes of one name.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from engine.consumer import Consumer, SealedConsumer
from engine.failpoints import ARMED, hit
from engine.producer import Producer
from engine.ring import RESUMED, Lane, LaneError, boot_id, create, whole_pages

MAX_LANES: Final = 1000
MAX_UNUSABLE: Final = 10
"""So many names of a lane that cannot be used are somebody's mistakes; more of them, and it is the folder."""
ARCHIVE: Final = "archive"
_NAME = re.compile(r"lane-\d{4}\.ring")
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


log = logging.getLogger("orbitstream.lanes")


class LaneDirError(Exception):
    """A lane directory that cannot be used, and what to do about it."""


class Lock:
    """An exclusive flock on `path`, held until `release` or the death of this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def acquire(self) -> bool:
        """Take the lock if it is free, without waiting; tell whether it is ours now."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        _give_to_owner(fd, self.path.parent)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        with suppress(OSError):  # for an error message of somebody else: a full disk must not keep us from the lock
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        return True

    def holder(self) -> str:
        """Return the process id that the last holder wrote, for an error message."""
        try:
            return self.path.read_text().strip() or "?"
        except OSError:
            return "?"

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _give_to_owner(fd: int, folder: Path) -> None:
    """Give a file that root made to the owner of its folder: an operator acts for the service, which has to open it."""
    if os.geteuid() == 0:
        owner, file = folder.stat(), os.fstat(fd)
        if file.st_uid == 0 != owner.st_uid and file.st_nlink == 1:  # another link may be anybody's file
            os.fchown(fd, owner.st_uid, owner.st_gid)


def expect(folder: Path) -> None:
    """Refuse to say of a lane directory that is not there that nothing waits in it; raises LaneDirError."""
    if not folder.is_dir():
        raise LaneDirError(f"no lane directory {folder}: give the service's by --lane-dir or ORBITSTREAM_LANE_DIR")


def prepare(folder: Path, durability: str = "process") -> None:
    """Make the lane directory, 0700, or check that the one that is there is ours alone; raises LaneDirError.

    A durability of `os` or `disk` is refused on a file system that lives in memory.
    """
    try:
        if durability != "process" and _file_system(folder) in ("tmpfs", "ramfs"):
            raise LaneDirError(
                f"ORBITSTREAM_DURABILITY={durability} cannot be kept in {folder}, which is memory: "
                "set ORBITSTREAM_LANE_DIR to a folder on a disk"
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise LaneDirError(f"ORBITSTREAM_LANE_DIR: cannot make {folder}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise LaneDirError(f"ORBITSTREAM_LANE_DIR: {folder} is not a directory")
    if status.st_uid != os.geteuid():
        raise LaneDirError(f"ORBITSTREAM_LANE_DIR: {folder} belongs to user {status.st_uid}, we are {os.geteuid()}")
    if status.st_mode & 0o022:
        raise LaneDirError(f"ORBITSTREAM_LANE_DIR: {folder} can be written by others: name a folder of its own")
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LaneDirError(f"ORBITSTREAM_LANE_DIR: {folder} cannot be written: {error.strerror}") from error


def check_room(folder: Path, lanes_wanted: int, capacity: int) -> None:
    """Raise LaneDirError if the file system has no room for so many lanes, counting those that are there."""
    present = 0
    for path in lane_files(folder):
        with suppress(OSError):  # archived meanwhile, or a link to nowhere
            present += path.stat().st_size
    room = os.statvfs(folder)
    missing = lanes_wanted * capacity - present - room.f_bavail * room.f_frsize
    if missing > 0:
        raise LaneDirError(
            f"ORBITSTREAM_LANE_BYTES={capacity}: {lanes_wanted} lanes do not fit into {folder}, {missing} bytes are "
            "missing: free some space, or set ORBITSTREAM_LANE_BYTES or ORBITSTREAM_LANE_DIR"
        )


def _file_system(folder: Path) -> str:
    """Return the type of the file system that `folder` lies on, or will lie on once it is made (proc(5), mountinfo)."""
    device = next(path for path in (folder, *folder.absolute().parents) if path.exists()).stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            return after.split()[0]
    return "unknown"


def lane_files(folder: Path) -> list[Path]:
    """Return the ring files of `folder` that are in use or wait to be drained, by name."""
    try:
        return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []


def open_lanes(folder: Path) -> Iterator[Lane]:
    """Map each readable lane of `folder` in turn, for a look at its words; the caller closes each.

    A file that cannot be read is left out (`unreadable`): the writers say so, and count it as a stopped lane.
    """
    for path in lane_files(folder):
        with suppress(OSError, LaneError):
            yield Lane(path)


def unreadable(folder: Path) -> dict[str, str]:
    """Return the ring files of `folder` that cannot be read, with the reason: what they hold nobody knows."""
    found = {}
    for path in lane_files(folder):
        try:
            Lane(path).close()
        except (OSError, LaneError) as error:
            if is_there(path):
                found[path.name] = str(error)
    return found


def is_there(path: Path) -> bool:
    """Tell whether there is something of that name, be it a link to nowhere."""
    return os.path.lexists(path)


def claim_producer(folder: Path, capacity: int, layout: bytes, *, durable: bool = False) -> tuple[Producer, Lock]:
    """Take the first lane whose producer lock is free and which this process may append to, or make a new one.

    Only a lane of this boot, this row layout and this capacity is adopted; others are left to the writers. With
    `durable` (fdatasync before each 202) its head must be on the disk as well: else what was published last may have
    been refused by the disk, and the lane is closed. A name that cannot be used is left aside. Raises LaneDirError when
    there is no room for a new lane.
    """
    boot, unusable = boot_id(), 0
    for number in range(MAX_LANES):
        path = folder / f"lane-{number:04d}.ring"
        lock = Lock(path.with_suffix(".producer"))
        try:
            if not lock.acquire():
                continue
            if not is_there(path):
                _create(path, capacity, layout, boot)
        except OSError as error:
            lock.release()
            log.error("left aside: %s", error)
            unusable += 1
            if unusable > MAX_UNUSABLE:
                raise LaneDirError(f"cannot make a lane in {folder}: {error}") from error
            continue
        except BaseException:  # a signal's too: a lock that nobody holds on to would keep the lane from others
            lock.release()
            raise
        try:
            producer = _adopt(Lane(path), boot, layout, capacity, durable=durable)
        except (OSError, LaneError) as error:
            log.error("left aside: %s", error)
            producer = None
        if producer is not None:
            return producer, lock
        lock.release()
    raise LaneDirError(f"{folder} holds {MAX_LANES} lanes already: run `orbitstream drain`")


def _adopt(lane: Lane, boot: bytes, layout: bytes, capacity: int, *, durable: bool) -> Producer | None:
    """Return the producer of a lane that may be appended to; the caller holds its producer lock."""
    if lane.boot == boot and not lane.closed and lane.layout == layout:
        producer = Producer(lane, durable=durable)
        if lane.capacity == whole_pages(capacity) and (not durable or lane.synced == lane.head):
            return producer
        producer.close()
    lane.close()
    return None


def _create(path: Path, capacity: int, layout: bytes, boot: bytes) -> None:
    try:
        create(path, capacity, layout, boot)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise LaneDirError(
            f"cannot make a lane of {capacity} bytes in {path.parent}: {error.strerror}; "
            "free some space, or set ORBITSTREAM_LANE_BYTES or ORBITSTREAM_LANE_DIR"
        ) from error
    except LaneError as error:
        raise LaneDirError(f"cannot make a lane: {error}") from error


def claim_consumer(path: Path) -> tuple[Consumer, Lock] | None:
    """Take the consumer end of a lane if it is free; None if another process has it or the lane is gone."""
    lock = Lock(path.with_suffix(".consumer"))
    if not lock.acquire():
        return None
    try:
        lane = Lane(path)
    except FileNotFoundError:
        lock.release()
        return None
    except BaseException:  # the same
        lock.release()
        raise
    # What an operator resumed is read like a sealed lane: records behind the tail, some of them overwritten since.
    return (Consumer(lane) if lane.boot == boot_id() and not lane.resumed else SealedConsumer(lane)), lock


def retire(consumer: Consumer, layout: bytes) -> bool:
    """Archive a drained lane that no producer will adopt again; tell whether it is gone from the directory.

    The caller holds the consumer lock. That is a lane of an earlier boot, of another row layout, or closed; its
    producer lock is taken for the move, so that nobody appends to it meanwhile.
    """
    lane = consumer.lane
    sealed = isinstance(consumer, SealedConsumer)
    if not sealed and lane.layout == layout and not lane.closed:
        return False
    lock = Lock(lane.path.with_suffix(".producer"))
    if not lock.acquire():
        return False
    try:
        if not sealed and lane.head != lane.tail:
            return False
        if lane.tail <= consumer.end:  # all there was is drained: from now on the database may go back again
            lane.words[RESUMED] = 0
        archive = lane.path.parent / ARCHIVE
        archive.mkdir(mode=0o700, exist_ok=True)
        archived = archive / f"{lane.uuid}.ring"
        if ARMED:
            hit("archive-before-move")
        os.replace(lane.path, archived)
        if ARMED:
            hit("archive-after-move")
        os.utime(archived)  # from now on counts how long it is kept
        return True
    finally:
        lock.release()


def archived(folder: Path) -> list[Path]:
    """Return the ring files of drained lanes that are kept for a restore of the database."""
    try:
        return sorted(path for path in (folder / ARCHIVE).iterdir() if path.suffix == ".ring")
    except (FileNotFoundError, NotADirectoryError):
        return []


def forget_archived(folder: Path, keep_s: float) -> list[Path]:
    """Remove archived lanes older than `keep_s`, and return which; what cannot be removed stays."""
    removed = []
    for path in archived(folder):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > keep_s:
                path.unlink()
                removed.append(path)
    return removed


def bring_back(path: Path) -> Path:
    """Put an archived lane among those to be drained again, under the first free name; returns its new path."""
    folder = path.parent.parent
    for number in range(MAX_LANES):
        target = folder / f"lane-{number:04d}.ring"
        lock = Lock(target.with_suffix(".producer"))
        if not lock.acquire():
            continue
        try:
            if not is_there(target):
                os.link(path, target)
                path.unlink()
                return target
        finally:
            lock.release()
    raise LaneDirError(f"{folder} holds {MAX_LANES} lanes already: run `orbitstream drain`")
