"""Lanes against a model: publishing, draining, deaths at any store, takeovers, new boots, power losses, restores.

The model of a lane is the list of records that were published into it, and what of them the database holds. A process
dies as by SIGKILL: at its n-th store into the mapped file, of which a part may be done, and what it had is taken over
by a new one. The laws: records are read in order, once, unchanged, none is missing and none is made up; the header's
words say what the model says.

`make crash` runs 10,000 sequences; ORBITSTREAM_CRASH_SEED repeats a run.
"""

from __future__ import annotations

import random
import shutil
import struct
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine import lanes, producer, ring
from engine.consumer import Consumer, SealedConsumer
from engine.lanes import Lock, claim_consumer, claim_producer
from engine.producer import Producer
from engine.ring import HEADER_BYTES, RECORD_HEADER, Lane, LaneFailedError, LaneFullError, padded
from tests.long_run import LONG, SEED, report

CAPACITY = 8192  # small, so that a few records go round it
LARGEST = CAPACITY // 4 - RECORD_HEADER.size
LAYOUT = b"model"
ALL = 1 << 40
PAGE = 4096
DATABASE = uuid.UUID(int=7)

CHOICES = st.integers(0, 1 << 32)  # the seed of what a rule chooses by itself: Hypothesis is slow at small choices
LIMITS = st.sampled_from([ALL, ALL, 20, 7, 1])
PICK = st.integers(0, 1 << 16)


def any_record(rng: random.Random) -> tuple[int, int | None, bytes, int]:
    """Choose size, words to leave free at the end of the ring (None: as it comes), key and points of a record."""
    size = rng.choice([rng.randrange(200), rng.randrange(LARGEST), LARGEST])
    gap = rng.choice([None, None, rng.randrange(7)])
    return size, gap, rng.choice([b"", b"k", b"a key of 20 letters."]), rng.randrange(1, 10)


def any_base(rng: random.Random) -> int:
    """Choose a position from which on a lane is seen: any, or one near the end of the ring."""
    return 8 * rng.choice([0, rng.randrange(3 * CAPACITY // 8), CAPACITY // 8 - rng.randrange(1, 7)])


class Killed(BaseException):
    """The process is gone: it does nothing any more, not even what stands in `finally`."""


@dataclass
class Fate:
    """After how many stores a process dies, and which share of the fatal one is done."""

    stores: int = ALL
    share: float = 0.0


class Stores:
    """A mapped buffer as a process with a fate sees it."""

    def __init__(self, view: memoryview, fate: Fate) -> None:
        self.view, self.fate, self.release = view, fate, view.release

    def __getitem__(self, key: Any) -> Any:
        return self.view[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.fate.stores == 0:
            if isinstance(key, slice):  # a copy of many bytes may be cut anywhere; a word is stored whole or not
                done = int(len(value) * self.fate.share)
                self.view[key.start : key.start + done] = value[:done]
            raise Killed
        self.fate.stores -= 1
        self.view[key] = value


@dataclass(eq=False)
class Sent:
    """A record as it was handed to `publish`, with its place."""

    start: int
    end: int
    content: tuple[bytes, int, int, bytes]  # payload, points, time, key
    raw: bytes = b""
    answered: bool = True

    @property
    def points(self) -> int:
        return self.content[1]


@dataclass(eq=False)
class Model:
    """A lane: its file, what was published into it, what the database holds of it, and who has its two ends."""

    path: Path
    boot: bytes
    view: Lane  # of a process that only looks
    image: bytes  # of the file when it was last brought to the disk
    base: int = 0  # where it was when we first saw it
    published: list[Sent] = field(default_factory=list)
    ghosts: list[Sent] = field(default_factory=list)  # begun by a process that died before it published them
    damaged: set[Sent] = field(default_factory=set)
    forgone: set[Sent] = field(default_factory=set)  # gone with a restore, when a live lane was resumed
    stored: list[Sent] = field(default_factory=list)
    ledger: int = 0
    settled: int = 0
    tail: int = 0
    tail_settled: int = 0
    synced: int = 0
    freed: int = 0  # the furthest tail ever: what lies before it may have been overwritten
    closed: bool = False
    resumed: bool = False
    archived: bool = False
    consumer: Consumer | None = None
    lock: Lock | None = None

    @property
    def excused(self) -> set[Sent]:
        return self.damaged | self.forgone

    @property
    def head(self) -> int:
        return self.published[-1].end if self.published else self.base

    def place(self, length: int) -> tuple[int, int]:
        """Where the next record of `length` bytes lies: never over the end of the ring."""
        room = CAPACITY - self.head % CAPACITY
        start = self.head if room >= length else self.head + room
        return start, start + length

    def raw(self, sent: Sent) -> bytes:
        offset = sent.start % CAPACITY
        return bytes(self.view.data[offset : offset + sent.end - sent.start])

    def overwritten(self, sent: Sent) -> bool:
        """Tell whether a record is gone because its room was freed once, although the database no longer has it."""
        return sent.end <= self.freed and self.raw(sent) != sent.raw

    def let_go(self) -> None:
        """The consumer's process ends: the kernel frees its lock."""
        if self.consumer is not None and self.lock is not None:
            self.consumer.lane.close()
            self.lock.release()
        self.consumer = self.lock = None


class Lanes(RuleBasedStateMachine):
    """A lane directory, the processes around it, and the ledger."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="os-model-", dir="/dev/shm"))
        self.boot, self.number = bytes(15) + b"\1", 0
        self.patches = [
            mock.patch.object(lanes, "boot_id", lambda: self.boot),
            mock.patch.object(ring, "MIN_CAPACITY", CAPACITY),
        ]
        for patch in self.patches:
            patch.start()
        self.models: list[Model] = []
        self.mine: Model | None = None  # the lane of the one producer
        self.producer: Producer | None = None
        self.lock: Lock | None = None
        self.fate = Fate()
        self.failed = False

    @initialize(durable=st.booleans())
    def begin(self, durable: bool) -> None:
        self.durable = durable

    def model_at(self, path: Path) -> Model | None:
        return next((each for each in self.models if each.path == path and not each.archived), None)

    # -- the producer's end

    def ready(self, rng: random.Random) -> bool:
        """Take a lane for a producer, unless there is one; tell whether it may be published into."""
        if self.producer is None:
            self.a_producer_takes_a_lane(any_base(rng))
        assert self.mine is not None
        return not self.mine.closed

    def a_producer_takes_a_lane(self, base: int) -> None:
        """It is the first that it may append to, or a new one under the first free name."""
        for number in range(len(self.models) + 1):
            path = self.folder / f"lane-{number:04d}.ring"
            model = self.model_at(path)
            if model is None:
                break
            unsynced = self.durable and model.synced != model.head
            if model.boot == self.boot and not model.closed and not unsynced:
                break
            model.closed |= model.boot == self.boot and unsynced
        taken, self.lock = claim_producer(self.folder, CAPACITY, LAYOUT, durable=self.durable)
        assert taken.lane.path == path
        if model is None:
            view = Lane(path)
            view.words[ring.HEAD] = view.words[ring.TAIL] = view.words[ring.SYNCED] = base
            view.words[ring.COUNTERS_A] = base
            model = Model(path, self.boot, view, bytes(view.map), base, ledger=base, tail=base, synced=base)
            self.models.append(model)
        assert taken.lane.uuid == model.view.uuid
        lane, self.fate = taken.lane, Fate()
        lane.words, lane.data = Stores(lane.words, self.fate), Stores(lane.data, self.fate)  # type: ignore[assignment]
        self.mine, self.producer, self.failed = model, taken, False

    def publish(self, size: int, gap: int | None, key: bytes, points: int, fate: Fate, *, synced: bool = True) -> None:
        model, producer = self.mine, self.producer
        assert model is not None and producer is not None
        overhead = RECORD_HEADER.size + padded(len(key))
        room = CAPACITY - model.head % CAPACITY
        if gap is not None and 0 <= room - overhead - gap * 8 <= LARGEST:
            size = room - overhead - gap * 8
        size = min(size, CAPACITY // 4 - overhead)
        self.number += 1
        payload = (self.number.to_bytes(8, "little") * (size // 8 + 1))[:size]
        start, end = model.place(padded(overhead + size))
        sent = Sent(start, end, (payload, points, self.number, key))
        before, refused = bytes(model.view.map), bytearray(model.view.map)
        struct.pack_into("<Q", refused, 8 * ring.REFUSED, model.view.refused_points + points)
        self.fate.stores, self.fate.share = fate.stores, fate.share
        try:
            got = producer.publish([payload[: size // 3], payload[size // 3 :]], points, self.number, key)
            got.sync()
        except LaneFullError:
            assert end - model.tail > CAPACITY
            assert bytes(model.view.map) == refused, "it is counted, and nothing else"
            return
        except LaneFailedError:
            assert self.failed and bytes(model.view.map) == before
            return
        except (Killed, OSError) as error:
            sent.answered = False
            (model.published if model.view.head == end else model.ghosts).append(sent)
            assert model.view.head == model.head, "a head that was never asked for"
            self.failed = isinstance(error, OSError)
        else:
            assert synced and not self.failed and got.end == end
            assert end - model.tail <= CAPACITY
            model.published.append(sent)
            if self.durable:
                model.image, model.synced = bytes(model.view.map), end
            try:
                got.answered()
            except Killed:
                sent.answered = False
        sent.raw = model.raw(sent)

    @rule(count=st.integers(1, 12), choices=CHOICES)
    def records_are_published(self, count: int, choices: int) -> None:
        rng = random.Random(choices)
        for _ in range(count if self.ready(rng) else 0):
            self.publish(*any_record(rng), Fate())
            if self.mine is not None and rng.random() < 0.3:
                self.drain(self.mine)

    @rule(count=st.integers(0, 6), choices=CHOICES, stores=st.integers(0, 13))
    def the_producer_dies_while_it_publishes(self, count: int, choices: int, stores: int) -> None:
        rng = random.Random(choices)
        if self.ready(rng):
            for _ in range(count):
                self.publish(*any_record(rng), Fate())
            self.publish(*any_record(rng), Fate(stores, rng.random()))
        self.the_producer_dies()

    @precondition(lambda self: self.durable)
    @rule(choices=CHOICES)
    def the_disk_fails(self, choices: int) -> None:
        rng = random.Random(choices)
        if self.ready(rng):
            with mock.patch.object(producer.os, "fdatasync", side_effect=OSError("disk")):
                self.publish(*any_record(rng), Fate(), synced=False)

    @precondition(lambda self: self.producer is not None)
    @rule()
    def the_producer_dies(self) -> None:
        assert self.producer is not None and self.lock is not None
        self.producer.lane.close()
        self.lock.release()
        self.mine = self.producer = self.lock = None

    @precondition(lambda self: self.producer is not None)
    @rule()
    def the_lane_is_closed(self) -> None:
        assert self.producer is not None and self.mine is not None
        self.fate.stores = ALL
        self.producer.close()
        self.mine.closed = True
        with suppress(ring.LaneClosedError, LaneFailedError):
            self.producer.publish([b"refused"], 1, 0)
            raise AssertionError("published into a closed lane")

    # -- the consumer's end

    def present(self) -> list[Model]:
        return [each for each in self.models if not each.archived]

    def take(self, model: Model) -> Consumer:
        """Take a lane's consumer end, as a writer does; nobody else gets it then."""
        if model.consumer is None:
            claimed = claim_consumer(model.path)
            assert claimed is not None
            model.consumer, model.lock = claimed
            assert model.consumer.sealed == (model.boot != self.boot or model.resumed)
            if model.view.database is None:
                model.consumer.set_database(DATABASE)
        assert claim_consumer(model.path) is None
        return model.consumer

    def check(self, model: Model, consumer: Consumer, limit: int, max_bytes: int = ALL) -> list[Sent]:
        """Read from the ledger's position on, and hold what comes against the model; returns it."""
        waiting = [each for each in model.published if each.end > model.ledger and each not in model.excused]
        maybe = [each for each in model.ghosts if each.end > model.ledger]
        if consumer.sealed:
            waiting = [each for each in waiting if not model.overwritten(each)]
        if consumer.sealed and self.durable:
            maybe += [each for each in waiting if not each.answered]
            waiting = [each for each in waiting if each.answered]
        by_place = {(each.start, each.end, each.content): each for each in [*waiting, *maybe]}
        found = []
        position = model.ledger
        for record in consumer.read(model.ledger, limit, max_bytes):
            content = (bytes(record.payload)[: record.end - record.start], record.points, record.time_us, record.key)
            record.payload.release()
            assert record.start == position, "raw positions leave no gap"
            position = record.end
            sent = next(
                (each for key, each in by_place.items() if key[1] == record.end and self.same(key[2], content)), None
            )
            assert sent is not None, f"invented, changed or doubled: {record}"
            assert sent.start >= record.start
            found.append(sent)
        ends = [each.end for each in found]
        assert ends == sorted(set(ends)), "order"
        last = ends[-1] if ends else model.ledger
        following = [each for each in waiting if each.end > last]
        assert [each for each in waiting if each.end <= last] == [each for each in found if each in waiting], "lost"
        if following:
            over_points = sum(each.points for each in found) + following[0].points > limit
            over_bytes = following[0].end - model.ledger > max_bytes
            assert found and (over_points or over_bytes or (consumer.sealed and maybe)), "lost, or stopped too early"
        assert len(found) <= 1 or sum(each.points for each in found) <= limit
        return found

    @staticmethod
    def same(sent: tuple[bytes, int, int, bytes], read: tuple[bytes, int, int, bytes]) -> bool:
        """Compare contents; a payload is read with the zeros that fill its record up."""
        return sent[1:] == read[1:] and read[0][: len(sent[0])] == sent[0] and not any(read[0][len(sent[0]) :])

    @precondition(lambda self: self.present())
    @rule(
        which=PICK,
        limit=LIMITS,
        max_bytes=st.sampled_from([ALL, 5000]),
        dies=st.sampled_from(["", "", "", "before COMMIT", "after COMMIT", "at the first store", "at the last store"]),
    )
    def a_writer_drains(self, which: int, limit: int, max_bytes: int, dies: str) -> None:
        self.drain(self.present()[which % len(self.present())], limit, max_bytes, dies)

    def drain(self, model: Model, limit: int = ALL, max_bytes: int = ALL, dies: str = "") -> None:
        """Do what a writer does with a lane: skip what the ledger has, read, COMMIT, free."""
        consumer = self.take(model)
        if model.ledger < model.view.tail and not model.resumed:  # the database went back: the lane is stopped
            model.let_go()
            return
        if model.ledger > model.view.tail:
            consumer.free(model.ledger, model.settled)
            model.tail, model.tail_settled = model.ledger, model.settled
            model.freed = max(model.freed, model.tail)
        found = self.check(model, consumer, limit, max_bytes)
        if found and dies != "before COMMIT":
            model.stored += found
            model.ledger = found[-1].end
            model.settled += sum(each.points for each in found)
            words = consumer.lane.words
            fatal = {"at the first store": 0, "at the last store": 1}.get(dies, ALL)
            consumer.lane.words = Stores(words, Fate(fatal))  # type: ignore[assignment]
            with suppress(Killed):
                if dies != "after COMMIT":
                    if dies != "at the first store":
                        model.tail_settled = model.settled
                    if not dies:
                        model.tail = model.ledger
                        model.freed = max(model.freed, model.tail)
                    consumer.free(model.ledger, model.settled)
            consumer.lane.words = words
        if dies:
            model.let_go()

    @precondition(lambda self: self.present())
    @rule(which=PICK)
    def a_drained_lane_is_archived(self, which: int) -> None:
        """If nobody will append to it again; else it stays."""
        model = self.present()[which % len(self.present())]
        consumer = self.take(model)
        behind = model.ledger < model.view.tail and not model.resumed
        if behind or (consumer.sealed and self.check(model, consumer, ALL)):
            return
        if consumer.sealed:
            model.tail, model.tail_settled = max(consumer.end, model.view.tail), model.settled  # type: ignore[attr-defined]
            consumer.free(model.tail, model.settled)
        expected = self.mine is not model and (consumer.sealed or (model.closed and model.head == model.tail))
        assert lanes.retire(consumer, LAYOUT) == expected
        if expected:
            assert not model.path.exists()
            model.path = self.folder / lanes.ARCHIVE / f"{model.view.uuid}.ring"
            assert model.path in lanes.archived(self.folder)
            model.archived = True
            model.let_go()

    # -- what happens to all of them

    @rule(choices=CHOICES)
    def the_machine_boots_anew(self, choices: int) -> None:
        """Nobody is left. With `disk`, pages are from before or after the last sync; else a record is damaged."""
        rng = random.Random(choices)
        if self.producer is not None:
            self.the_producer_dies()
        self.boot = (int.from_bytes(self.boot, "big") + 1).to_bytes(16, "big")
        for model in self.models:
            model.let_go()
            if model.archived or int.from_bytes(model.boot, "big") + 1 != int.from_bytes(self.boot, "big"):
                continue
            if self.durable:
                after = bytes(model.view.map)
                for at in range(0, len(after), PAGE):
                    model.view.map[at : at + PAGE] = (after if rng.random() < 0.5 else model.image)[at : at + PAGE]
                model.tail, model.tail_settled = model.view.tail, model.view.settled_points
            elif rng.random() < 0.5 and model.head > model.ledger:
                self.break_last_record(model, rng.random() < 0.5, rng.randrange(1 << 16))

    def break_last_record(self, model: Model, cut: bool, where: int) -> None:
        """Cut it off from some byte on, or flip a bit."""
        last = model.published[-1]
        at = HEADER_BYTES + last.start % CAPACITY
        byte = where % (last.end - last.start)
        if cut:
            model.view.map[at + byte : at + last.end - last.start] = bytes(last.end - last.start - byte)
        else:
            model.view.map[at + byte] ^= 1 << where % 8
        if model.raw(last) != last.raw:
            model.damaged.add(last)
            lane = Lane(model.path)
            assert SealedConsumer(lane).holes(model.ledger), "a lost record gives no alarm"
            lane.close()

    @precondition(lambda self: any(each.stored for each in self.models))
    @rule(which=PICK, kept=PICK)
    def the_database_is_restored(self, which: int, kept: int) -> None:
        models = [each for each in self.models if each.stored]
        model = models[which % len(models)]
        model.stored = model.stored[: kept % len(model.stored)]
        model.ledger = model.stored[-1].end if model.stored else model.base
        model.settled = sum(each.points for each in model.stored)
        model.forgone = {each for each in model.forgone if each.end <= model.ledger}

    @precondition(lambda self: any(each.ledger < each.view.tail and not each.resumed for each in self.models))
    @rule(which=PICK)
    def the_operator_resumes_a_lane(self, which: int) -> None:
        behind = [each for each in self.models if each.ledger < each.view.tail and not each.resumed]
        self.resume(behind[which % len(behind)])

    def resume(self, model: Model) -> None:
        was_archived = model.archived
        model.let_go()
        if was_archived:
            model.path = lanes.bring_back(model.path)
            model.archived = False
        consumer = self.take(model)
        if was_archived or consumer.sealed:
            consumer.resume()
            model.closed = model.resumed = True
        else:  # what the restore took away is no longer in the lane
            model.forgone |= {each for each in model.published if model.ledger < each.end <= model.tail}
            model.ledger = model.tail
        model.let_go()

    # -- the laws

    @invariant()
    def words_say_what_the_model_says(self) -> None:
        for model in self.models:
            lane = model.view
            if model.boot != self.boot or model.resumed:  # only the ledger is believed now
                continue
            counted = sum(each.points for each in model.published), len(model.published)
            assert (lane.head, lane.published) == (model.head, counted)
            assert (lane.tail, lane.settled_points) == (model.tail, model.tail_settled)
            assert 0 <= lane.head - lane.tail <= CAPACITY and 0 <= lane.fill <= 1
            assert lane.queued_points == max(0, counted[0] - model.tail_settled)
            assert lane.answered_points == sum(each.points for each in model.published if each.answered)
            assert lane.closed == model.closed

    def teardown(self) -> None:
        try:
            if self.producer is not None:
                self.the_producer_dies()
            for model in self.models:
                model.let_go()
                if model.ledger < model.view.tail and not model.resumed:
                    self.resume(model)
                if not model.archived:
                    self.drain_to_the_end(model)
                stored = set(model.stored)
                assert [each.end for each in model.stored] == sorted({each.end for each in model.stored}), "order"
                assert stored <= {*model.published, *model.ghosts} - model.excused
        finally:
            shutil.rmtree(self.folder)
            for patch in self.patches:
                patch.stop()
            for model in self.models:
                model.let_go()
                model.view.close()

    def drain_to_the_end(self, model: Model) -> None:
        overwritten = {each for each in model.published if model.overwritten(each)}
        self.drain(model)
        assert not self.check(model, self.take(model), ALL)
        unsure = {each for each in model.published if not each.answered and self.durable and model.boot != self.boot}
        missing = set(model.published) - set(model.stored) - model.excused - overwritten - unsure
        assert not missing, "lost"


def test_lanes_keep_what_they_took() -> None:
    sequences = 10_000 if LONG else 150
    print(f"{sequences} sequences, ORBITSTREAM_CRASH_SEED={SEED}")
    run_state_machine_as_test(
        seed(SEED)(Lanes),
        settings=settings(
            max_examples=sequences,
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )
    report("ring model", sequences=sequences, seed=SEED)
