"""The tests of GenevaDrive: every engine test runs on SQLite, PostgreSQL and MariaDB or MySQL, real ones.

Crashes, races and duplicates come first. The servers are started by conftest.py.
"""

import argparse
import asyncio
import base64
import configparser
import contextlib
import contextvars
import copy
import csv
import dataclasses
import enum
import fcntl
import functools
import gc
import gzip
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import mailbox
import math
import multiprocessing
import operator
import os
import pickle
import pydoc
import random
import re
import shutil
import signal
import smtplib
import socket
import sqlite3
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import types
import typing
import unittest
import uuid
import zoneinfo
from collections import Counter, deque
from collections.abc import Sequence as SequenceType
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import datetime, timedelta, timezone
from decimal import Decimal, getcontext
from email.utils import parseaddr
from html.parser import HTMLParser
from http.cookies import SimpleCookie
from importlib.machinery import ModuleSpec
from pathlib import Path
from queue import Empty
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen
from wsgiref.util import setup_testing_defaults

import peewee
import pytest
from huey import CancelExecution, MemoryHuey, PriorityRedisHuey, RedisHuey, crontab
from huey.api import group
from huey.contrib.sql_huey import SqlHuey
from huey.exceptions import RetryTask, TaskLockedException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peewee import (
    BinaryUUIDField,
    BooleanField,
    CharField,
    CompositeKey,
    ForeignKeyField,
    IntegerField,
    Model,
    SqliteDatabase,
    UUIDField,
)
from playhouse.db_url import connect, parse
from playhouse.pool import PooledMySQLDatabase, PooledPostgresqlDatabase, PooledSqliteDatabase

import geneva_drive as gd
from conftest import SERVERS, free_port, require_command, require_package
from geneva_drive import (
    ExceptionPolicy,
    GenevaDrive,
    StepExecution,
    Workflow,
    cancel_if,
    on_exception,
    removed_step,
    step,
)

HERE = Path(__file__).resolve().parent
START = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
ELSEWHERE = pytest.mark.exhaustive("postgresql", "mysql")  # on SQLite in every run, there by --exhaustive alone
fork = multiprocessing.get_context("fork")


class User(Model):
    name = CharField(default="ada")
    active = BooleanField(default=True)
    visits = IntegerField(default=0)

    class Meta:
        table_name = "test_users"


class Effect(Model):
    """One row for each time that a step's body did something."""

    what = CharField()

    class Meta:
        table_name = "test_effects"


class Ticket(Model):
    id = UUIDField(primary_key=True)

    class Meta:
        table_name = "test_tickets"


class Country(Model):
    code = CharField(primary_key=True)

    class Meta:
        table_name = "test_countries"


MODELS = [User, Effect, Ticket, Country]


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = START

    def __call__(self):
        return self.now

    def forward(self, **duration):
        self.now += timedelta(**duration)


class Database:
    """A database of the session with its URL, from which other processes connect anew."""

    def __init__(self, url):
        self.url = url
        self.peewee = open_database(url)
        GenevaDrive(self.peewee).create_tables()
        for model in MODELS:
            model.bind(self.peewee)
        self.peewee.drop_tables(MODELS)
        self.peewee.create_tables(MODELS)


def open_database(url):
    if url.startswith("sqlite"):
        return connect(url, pragmas={"journal_mode": "wal", "foreign_keys": 1, "synchronous": 0}, timeout=20)
    return connect(url)


@pytest.fixture(scope="session", params=SERVERS)
def database(request, servers):
    database = Database(servers.empty(request.param))
    yield database
    assert GenevaDrive(database.peewee).doctor() == []


@pytest.fixture
def db(database):
    for model in MODELS:
        model.bind(database.peewee)
    yield database.peewee
    while database.peewee.session_rollback():
        pass


@pytest.fixture
def drive(db):
    drive = GenevaDrive(db)
    for model in [*reversed(gd.MODELS), *MODELS]:
        model.delete().execute()
    yield drive
    assert violations(GenevaDrive(db)) == []  # whatever the test did


def violations(drive):
    """What doctor() says of the rows. What it says of the schema takes ten times as long, and hardly changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gd._Schema, "parts", lambda *_, **__: [])
        return drive.doctor()


def silent_heartbeat():
    """What a process has that performs nothing; its thread never beats."""
    heartbeat = gd._Heartbeat()
    heartbeat.thread = threading.current_thread()
    heartbeat.connected.set()
    return heartbeat


@pytest.fixture
def clock(drive, monkeypatch):
    """A clock that the test moves; between its lines no thread of ours beats at the time it shows."""
    monkeypatch.setattr(gd, "_heartbeat", silent_heartbeat())
    drive.clock = Clock()
    return drive.clock


@contextlib.contextmanager
def driven(db):
    """A drive on a database that a test has for itself, with the tests' models."""
    for model in MODELS:
        model.bind(db)
    drive = GenevaDrive(db)
    drive.create_tables(MODELS)
    yield drive
    assert drive.doctor() == []
    db.close()


@pytest.fixture
def hero(drive):
    return User.create()


@pytest.fixture
def helpers(drive):
    return gd.TestHelpers()


def reload(workflow):
    return Workflow.get_by_id(workflow.id)


def history(workflow):
    return [(each.step_name, each.state, each.outcome) for each in workflow.execution_history]


def scheduled(workflow):
    return workflow.execution_history.where(StepExecution.state == "scheduled").get()


def effects():
    return [row.what for row in Effect.select().order_by(Effect.id)]


def did(what):
    Effect.create(what=what)


def messages(drive, queue="default"):
    huey = drive.queues[queue]
    return sorted(task.args[0] for task in huey.pending() + huey.scheduled())


def diagnosed(drive, *sentences):
    """Assert what doctor() says of rows that the test has spoilt, and remove them."""
    found = drive.doctor()
    assert {sentence for sentence in sentences for each in found if re.fullmatch(sentence, each)} == {*sentences}
    assert len(found) == len(sentences)
    StepExecution.delete().execute()
    Workflow.delete().execute()


def nothing_written(drive):
    assert Workflow.select().count() == 0
    assert StepExecution.select().count() == 0
    assert [message for queue in drive.queues for message in messages(drive, queue)] == []


def work_off(drive, queue="default", limit=200):
    """What a consumer's scheduler and worker do, in this thread: run all messages that are due."""
    huey = drive.queues[queue]
    for _ in range(limit):
        task = huey.dequeue()
        if task is None:
            return
        huey.execute(task)
    raise AssertionError("the queue does not come to an end")


def housekeeping_elsewhere(drive):
    """Housekeeping as another process does it: to it, what this one performs may be dead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gd, "_heartbeat", silent_heartbeat())
        return drive.housekeeping()


def in_processes(count, target, *arguments):
    """Run `target(number, *arguments, results)` in forked processes; returns what they put into `results`."""
    results = fork.Queue()
    processes = [fork.Process(target=target, args=(number, *arguments, results)) for number in range(count)]
    for process in processes:
        process.start()
    collected = []
    while any(process.is_alive() for process in processes):
        with contextlib.suppress(Empty):
            while True:
                collected.append(results.get(timeout=0.05))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with contextlib.suppress(Empty):
        while True:
            collected.append(results.get(timeout=0.05))
    return collected


# For processes that find this checkout: the drivers that most users have, which start in half the time, or all.
LEAN, FULL = {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE / '.ci' / 'lean'}"}, {"PYTHONPATH": str(HERE)}


def python(*arguments, **kwargs):
    """A Python process that finds this checkout."""
    env = {**os.environ, **LEAN, "PYTHONUNBUFFERED": "1", **kwargs.pop("env", {})}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=env, **kwargs)


def utcnow():
    return datetime.now(timezone.utc)


def until(condition, seconds=30):
    """Wait for another process; the state that is waited for is asserted, not the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Plain(Workflow):
    @step
    def one(self):
        did("one")

    @step(wait=timedelta(days=2))
    def two(self):
        did("two")

    @step
    def three(self):
        did("three")


class Tomorrow(Workflow):
    @step(wait=timedelta(days=1))
    def one(self):
        did("one")


class Quick(Workflow):
    @step
    def one(self):
        did("one")

    @step
    def two(self):
        did("two")

    @step
    def three(self):
        did("three")


# ==== Races, duplicates and crashes ===================================================================================


def _create_rounds(number, url, hero_ids, barrier, results):
    db = open_database(url)
    User.bind(db)
    GenevaDrive(db)
    for hero_id in hero_ids:
        hero = User(id=hero_id)
        barrier.wait(timeout=60)
        try:
            results.put(("created", hero_id, Plain.create(hero=hero).id))
        except gd.AlreadyOngoingError as error:
            results.put(("refused", hero_id, error.workflow_id))


def test_of_two_processes_that_create_the_same_workflow_at_once_one_succeeds(database, drive, is_exhaustive):
    rounds = 1000 if is_exhaustive else 60
    hero_ids = list(range(1, rounds + 1))
    database.peewee.close()
    results = in_processes(2, _create_rounds, database.url, hero_ids, fork.Barrier(2))
    created = {hero_id: workflow_id for what, hero_id, workflow_id in results if what == "created"}
    refused = {hero_id: workflow_id for what, hero_id, workflow_id in results if what == "refused"}
    assert len(results) == 2 * rounds
    assert sorted(created) == hero_ids
    assert refused == created
    assert Workflow.ongoing().count() == StepExecution.select().count() == rounds


def _create_tables(number, url, barrier, results):
    drive = GenevaDrive(open_database(url))
    barrier.wait(timeout=60)
    drive.create_tables()


@pytest.mark.parametrize("kind", SERVERS)
def test_eight_processes_create_the_tables_at_once(servers, kind, is_exhaustive):
    for _ in range(20 if is_exhaustive else 2):
        url = servers.empty(kind)
        in_processes(8, _create_tables, url, fork.Barrier(8))
        db = open_database(url)
        GenevaDrive(db)
        names = {each.name for table in ENGINE_TABLES for each in db.get_indexes(table)}
        partial = {"geneva_drive_paused"} if kind == "mysql" else set()
        assert set(SCHEMA_INDEXES) - partial <= names
        db.close()


def _execute(number, url, execution_id, barrier, results):
    db = open_database(url)
    for model in MODELS:
        model.bind(db)
    GenevaDrive(db)
    execution = StepExecution.get_by_id(execution_id)
    barrier.wait(timeout=60)
    results.put(execution.execute())


def test_one_execution_given_to_six_threads_and_three_processes_at_once_runs_once(
    database, db, drive, hero, is_exhaustive
):
    rounds = 50 if is_exhaustive else 3

    def run(execution_id, barrier, results):
        execution = StepExecution.get_by_id(execution_id)
        barrier.wait(timeout=60)
        results.append(execution.execute())
        db.close()

    for _ in range(rounds):
        execution = scheduled(Quick.create(hero=hero, allow_multiple=True))
        db.close()
        barrier, results, here = fork.Barrier(9), fork.Queue(), []
        processes = [
            fork.Process(target=_execute, args=(number, database.url, execution.id, barrier, results))
            for number in range(3)
        ]
        threads = [threading.Thread(target=run, args=(execution.id, barrier, here)) for _ in range(6)]
        for each in processes + threads:
            each.start()
        there = [results.get(timeout=60) for _ in processes]
        for each in processes + threads:
            each.join()
        assert sorted(here + there) == [False] * 8 + [True]
    assert effects() == ["one"] * rounds


def test_get_or_create_by_six_threads_gives_one_workflow(db, drive, hero):
    barrier, results = threading.Barrier(6), []

    def run():
        barrier.wait(timeout=60)
        results.append(Plain.get_or_create(hero=hero))
        db.close()

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({workflow.id for workflow, _ in results}) == 1
    assert sorted(created for _, created in results) == [False] * 5 + [True]


def test_creating_and_canceling_in_two_threads_never_fails(db, drive, hero):
    failures = []

    def run(work):
        try:
            for _ in range(50):
                work()
        except Exception as error:
            failures.append(error)
        finally:
            db.close()

    def cancel():
        for workflow in Plain.ongoing():
            with contextlib.suppress(gd.InvalidStateError):
                workflow.cancel()

    threads = [threading.Thread(target=run, args=(work,)) for work in (lambda: Plain.get_or_create(hero=hero), cancel)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert Plain.ongoing().count() <= 1


def test_a_second_message_for_an_execution_changes_nothing(drive, hero):
    workflow = Plain.create(hero=hero)
    execution = scheduled(workflow)
    assert execution.execute() is True
    before = history(workflow)
    assert StepExecution.get_by_id(execution.id).execute() is False
    assert history(workflow) == before
    assert effects() == ["one"]


def test_a_message_for_a_paused_or_canceled_workflow_changes_nothing(drive, hero):
    workflow = Plain.create(hero=hero)
    workflow.pause()
    work_off(drive)
    assert scheduled(workflow).execute() is False
    assert (reload(workflow).state, history(workflow)) == ("paused", [("one", "scheduled", None)])
    workflow.cancel()
    assert workflow.execution_history.get().execute() is False
    assert effects() == []


def test_a_message_that_comes_too_early_is_queued_again_for_its_time(db, drive, hero):
    drive = GenevaDrive(db, huey=MemoryHuey("outside", results=False))
    workflow = Plain.create(hero=hero)
    scheduled(workflow).execute()
    execution = scheduled(workflow)
    drive.huey.flush()
    drive._perform(execution.id)
    assert history(workflow)[-1] == ("two", "scheduled", None)
    (task,) = drive.huey.scheduled()
    assert task.args == (execution.id,)
    assert task.eta.replace(tzinfo=timezone.utc) == execution.scheduled_for


def test_an_attempt_that_lost_its_claim_records_nothing(drive, clock, hero, caplog):
    class Slow(Workflow):
        @step
        def work(self):
            if not effects():
                did("slow")
                self.context["by"] = "the dead"
                clock.forward(minutes=10)
                assert housekeeping_elsewhere(drive)["stuck_in_progress_recovered"] == 1
            else:
                did("again")

        @step
        def after(self):
            did("after")

    workflow = Slow.create(hero=hero)
    assert scheduled(workflow).execute() is True
    assert history(workflow) == [("work", "failed", "recovered"), ("work", "scheduled", None)]
    assert reload(workflow).context == {}
    assert "claim was lost" in caplog.text
    gd.TestHelpers().speedrun_workflow(workflow)
    assert effects() == ["slow", "again", "after"]


def test_a_step_whose_process_died_runs_again_and_pauses_after_too_many_deaths(drive, clock, hero):
    class Deadly(Workflow):
        @step
        def work(self):
            did("work")

    drive.max_recoveries = 2
    workflow = Deadly.create(hero=hero)
    for death in range(3):
        assert gd._Attempt.claim(drive, scheduled(workflow).id) is not None  # and then its process is no more
        assert drive.housekeeping()["stuck_in_progress_recovered"] == 0
        clock.forward(minutes=3)
        assert drive.housekeeping()["stuck_in_progress_recovered"] == 1
        assert reload(workflow).state == ("ready" if death < 2 else "paused")
    assert history(workflow) == [("work", "failed", "recovered")] * 3
    reload(workflow).resume()
    assert scheduled(workflow).recoveries == 0
    gd.TestHelpers().speedrun_workflow(workflow)
    assert (reload(workflow).state, effects()) == ("finished", ["work"])


def _claim(number, url, execution_id, results):
    GenevaDrive(open_database(url))
    results.put(gd._Attempt.claim(gd._drive(), execution_id) is not None)


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="only Linux names processes for good")
def test_a_process_of_this_host_that_is_gone_is_not_waited_for(database, db, drive, hero):
    workflow = Plain.create(hero=hero)
    database.peewee.close()
    assert in_processes(1, _claim, database.url, scheduled(workflow).id) == [True]
    execution = workflow.execution_history.get()
    here = execution.performed_by
    for unknown in ("of/another/1/1", here.replace("/", "x/", 1), None, gd._this_process()):
        execution._write(performed_by=unknown)
        assert drive.housekeeping()["stuck_in_progress_recovered"] == 0
    execution._write(performed_by=here)
    assert drive.housekeeping()["stuck_in_progress_recovered"] == 1
    assert history(workflow) == [("one", "failed", "recovered"), ("one", "scheduled", None)]


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="only Linux names processes for good")
def test_a_process_is_gone_though_nobody_waited_for_it_or_another_one_has_its_id():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = f"{gd._host()}/{child.pid}/{gd._process_start(child.pid)}"
    assert not gd._is_process_gone(name)
    assert gd._is_process_gone(name + "0")
    child.kill()
    until(lambda: gd._process_start(child.pid) is None)  # a zombie
    assert gd._is_process_gone(name)
    child.communicate()
    assert gd._is_process_gone(name)


LINUX_ROOT = Path("/proc/self/ns/time").exists() and os.geteuid() == 0 and shutil.which("unshare")


@pytest.mark.skipif(not LINUX_ROOT, reason="only root makes a time namespace, with unshare of util-linux")
def test_a_process_of_another_time_namespace_is_not_taken_for_gone():
    look = "import geneva_drive as gd, sys; print(gd._this_process(), gd._is_process_gone(sys.argv[1]))"
    mine = gd._this_process()
    command = ["unshare", "--time", "--boottime", "100000", "--fork", sys.executable, "-c", look, mine]
    seen = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.split()
    assert seen[1] == "False"
    assert seen[0].rpartition("/")[0].rpartition("/")[0] != gd._host()
    assert not gd._is_process_gone(seen[0])  # it is, by now: of what is told apart, only its silence tells
    here = [sys.executable, "-c", look, mine]
    seen = subprocess.run(here, cwd=HERE, capture_output=True, text=True, check=True).stdout.split()
    assert seen[1] == "False"
    assert gd._is_process_gone(seen[0])


def test_no_process_recovers_a_step_that_it_performs_whatever_its_clock_did(drive, clock, hero):
    class Sleeps(Workflow):
        @step
        def work(self):
            clock.forward(minutes=10)  # as a host's sleep does, or whoever sets the clock
            assert drive.housekeeping()["stuck_in_progress_recovered"] == 0
            did("work")

    workflow = Sleeps.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert (effects(), history(workflow)) == (["work"], [("work", "completed", "success")])
    assert not gd._heartbeat.beating


@ELSEWHERE
def test_after_a_hosts_sleep_silence_is_death_once_all_have_had_the_time_to_beat(drive, hero, monkeypatch):
    drive.stuck_in_progress_threshold = 4
    workflow, slept = Plain.create(hero=hero), 600
    gd._Attempt.claim(drive, scheduled(workflow).id)  # which another process performs
    monkeypatch.setattr(gd, "_heartbeat", silent_heartbeat())
    awake = time.time
    monkeypatch.setattr(time, "time", lambda: awake() + slept)  # the monotonic clock stood still
    drive.clock = lambda: utcnow() + timedelta(seconds=slept)
    assert drive.housekeeping()["stuck_in_progress_recovered"] == 0
    until(lambda: drive.housekeeping()["stuck_in_progress_recovered"] == 1)  # it died all the same


def test_a_step_whose_process_died_is_canceled_where_that_is_asked_for(drive, clock, hero):
    drive.stuck_recovery_action = "cancel"
    workflow = Plain.create(hero=hero)
    gd._Attempt.claim(drive, scheduled(workflow).id)
    clock.forward(minutes=3)
    drive.housekeeping()
    assert (reload(workflow).state, history(workflow)) == ("canceled", [("one", "failed", "recovered")])


def test_a_process_that_is_interrupted_leaves_its_step_to_be_run_again(drive, hero):
    class Interrupted(Workflow):
        @step
        def work(self):
            if not effects():
                did("interrupted")
                raise KeyboardInterrupt
            did("done")

    workflow = Interrupted.create(hero=hero)
    with pytest.raises(KeyboardInterrupt):
        scheduled(workflow).execute()
    assert history(workflow) == [("work", "failed", "recovered"), ("work", "scheduled", None)]
    gd.TestHelpers().speedrun_workflow(workflow)
    assert effects() == ["interrupted", "done"]


@ELSEWHERE
def test_the_heartbeat_keeps_a_step_alive_that_is_longer_than_the_threshold(drive, hero):
    drive.stuck_in_progress_threshold = 1

    class Long(Workflow):
        @step
        def work(self):
            began, silences = StepExecution.get().started_at, []
            while not silences or utcnow() < began + timedelta(seconds=2):
                silences.append(housekeeping_elsewhere(drive)["stuck_in_progress_recovered"])
                time.sleep(0.1)  # for the other thread
            assert set(silences) == {0}
            did("work")

    workflow = Long.create(hero=hero)
    assert scheduled(workflow).execute() is True
    assert history(workflow) == [("work", "completed", "success")]


@pytest.mark.parametrize("call", ["cancel", "pause"])
def test_a_call_in_after_step_execution_stops_a_run_on(drive, hero, call):
    class Stops(Workflow):
        @step
        def one(self):
            did("one")

        @step
        def two(self):
            did("two")

        def after_step_execution(self, execution):
            if execution.step_name == "one":
                getattr(self, call)()

    workflow = Stops.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert effects() == ["one"]
    row = reload(workflow)
    assert (row.state, row.pause_requested) == ({"cancel": "canceled", "pause": "paused"}[call], False)
    assert history(row)[-1] == ("two", "canceled", "canceled")
    if call == "pause":
        row.resume()
        drive._perform(scheduled(workflow).id)
        assert (reload(workflow).state, effects()) == ("finished", ["one", "two"])


def test_a_claim_that_was_recovered_during_the_hooks_of_a_run_on_is_not_performed(drive, clock, hero, caplog):
    class Lingers(Workflow):
        @step
        def one(self):
            did("one")

        @step
        def two(self):
            did("two")

        def after_step_execution(self, execution):
            if execution.step_name == "one":
                clock.forward(minutes=10)
                assert housekeeping_elsewhere(drive)["stuck_in_progress_recovered"] == 1

    workflow = Lingers.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert effects() == ["one"]
    assert "claim was lost" in caplog.text
    assert history(workflow)[1:] == [("two", "failed", "recovered"), ("two", "scheduled", None)]


def test_a_run_on_that_a_hook_breaks_off_is_recovered_like_a_death(drive, clock, hero):
    class Exits(Quick):
        def after_step_execution(self, execution):
            if execution.number == 1:
                raise SystemExit

    workflow = Exits.create(hero=hero)
    with pytest.raises(SystemExit):
        drive._perform(scheduled(workflow).id)
    assert history(workflow) == [("one", "completed", "success"), ("two", "in_progress", None)]
    clock.forward(minutes=3)
    assert gd._heartbeat._beat() is None
    assert drive.housekeeping()["stuck_in_progress_recovered"] == 1
    work_off(drive)
    assert reload(workflow).state == "finished"


def test_the_heartbeat_covers_the_hooks_between_two_steps_of_a_run_on(drive, hero):
    beating = []

    class Lingers(Quick):
        def after_step_execution(self, execution):
            beating.append((execution.step_name, len(gd._heartbeat.beating)))

    drive._perform(scheduled(Lingers.create(hero=hero)).id)
    assert beating == [("one", 1), ("two", 1), ("three", 0)]
    assert gd._heartbeat.beating == set()


@pytest.mark.parametrize("awaited", [None, "go"])
def test_a_transactional_step_that_deadlocks_is_performed_again_with_its_signal(db, drive, served, awaited):
    users = [User.create(name="first"), User.create(name="second")]
    barrier, met = threading.Barrier(2), set()

    class Locks(Workflow):
        @step(transactional=True, on_exception="cancel", wait_for=awaited)
        def both(self):
            mine, other = users if self.hero == users[0] else users[::-1]
            User.update(visits=User.visits + 1).where(User.id == mine.id).execute()
            if served and mine.id not in met:  # the one that is performed again would wait for nobody
                met.add(mine.id)
                barrier.wait(timeout=30)
            User.update(visits=User.visits + 1).where(User.id == other.id).execute()
            assert awaited is None or self.signal_payload == mine.name

    workflows = [Locks.create(hero=hero) for hero in users]
    for workflow in workflows if awaited else ():
        workflow.signal(awaited, workflow.hero.name)

    def run(message):
        drive._perform(message)
        db.close()

    threads = [threading.Thread(target=run, args=(scheduled(each).id,)) for each in workflows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.state for each in Locks.select()] == ["finished", "finished"]
    assert [each.visits for each in User.select()] == [2, 2]
    assert {each.outcome for each in StepExecution.select()} == {"success"}
    assert [consumed(each) for each in workflows] == ([["first"], ["second"]] if awaited else [[], []])


def test_a_transactional_step_that_is_canceled_as_it_starts_over_knows_itself(drive, hero, monkeypatch):
    class Deadlock(Exception):
        pass

    class Starts(Workflow):
        @step(transactional=True)
        def over(self):
            seen.append((self.current_step_name, self.idempotency_key))
            if len(seen) == 1:
                raise Deadlock

    def start_over_late(attempt):
        reload(workflow).cancel()
        start_over(attempt)

    seen, start_over, is_transient = [], gd._Attempt._start_over, gd._Access.is_transient
    monkeypatch.setattr(
        gd._Access, "is_transient", lambda self, error: isinstance(error, Deadlock) or is_transient(self, error)
    )
    monkeypatch.setattr(gd._Attempt, "_start_over", start_over_late)
    workflow = Starts.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert seen == [("over", workflow.idempotency_key)] * 2
    assert (reload(workflow).state, reload(workflow).current_step_name) == ("canceled", None)
    assert history(workflow) == [("over", "completed", "success")]


STRICT = {  # what a role's, a server's or a session's default makes of each statement
    "serializable": ("postgresql", {"options": "-c default_transaction_isolation=serializable"}),
    "repeatable read": ("postgresql", {"options": r"-c default_transaction_isolation=repeatable\ read"}),
    "mysql: serializable": ("mysql", {"init_command": "set session transaction isolation level serializable"}),
    # The default of MariaDB since 11.6.
    "mysql: snapshot isolation": ("mysql", {"init_command": "set innodb_snapshot_isolation = on"}),
}


@pytest.fixture(params=STRICT)
def strict(request, servers):
    kind, options = STRICT[request.param]
    db = connect(servers.empty(kind), **options)
    try:
        db.connect()
    except peewee.OperationalError as error:
        pytest.skip(f"this server knows no innodb_snapshot_isolation: {error}")
    with driven(db) as drive:
        yield drive


def test_collisions_that_a_strict_isolation_refuses_are_repeated(strict, caplog):
    refused, seen, counted = [], [], User.create()

    class Counts(Workflow):
        @step(wait=0.001)
        def wait(self):
            pass

        @step(transactional=True)
        def count(self):
            user = User.get_by_id(counted.id)
            time.sleep(0.002)
            User.update(visits=user.visits + 1).where(User.id == user.id).execute()

        @step
        def end(self):
            pass

    def look():
        seen.extend([strict.doctor(), strict.stats()])
        return strict.is_idle()

    strict.database.query_hooks.append(lambda event: event.exception and refused.append(event.exception))
    for _ in range(30):
        Counts.create(hero=User.create())
    strict.run(workers=4, until=look)
    assert any(gd._drive()._access.is_transient(error) for error in refused), "nothing collided"
    assert {each.state for each in Counts.select()} == {"finished"}
    assert {each.outcome for each in StepExecution.select()} == {"success"}
    assert User.get_by_id(counted.id).visits == 30
    assert [found for found in seen[::2] if found] == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_process_that_performs_short_steps_opens_no_other_connection_and_one_for_a_long_step(servers):
    url = servers.empty("postgresql")
    db, others = open_database(url), f"select count(*) from pg_stat_activity where datname = '{urlsplit(url).path[1:]}'"
    watcher = open_database(urlsplit(url)._replace(path="/postgres").geturl())
    drive = GenevaDrive(db, stuck_in_progress_threshold=4)  # after a quarter of a second, a step is a long one
    drive.create_tables()
    for model in MODELS:
        model.bind(db)
    db.create_tables(MODELS)

    def connections():
        return watcher.execute_sql(others).fetchone()[0]

    class Long(Workflow):
        @step
        def one(self):
            until(lambda: connections() == 2)

    class Short(Workflow):
        @step
        def one(self):
            seen.append(connections())

    seen = []
    try:
        for _ in range(20):
            assert scheduled(Short.create(hero=User.create())).execute()
        assert set(seen) == {1}
        assert scheduled(Long.create(hero=User.create())).execute()
        until(lambda: connections() == 1)
    finally:
        db.close()
        watcher.close()


def test_a_consumer_that_starts_has_its_heartbeats_connection_at_once(db, drive, monkeypatch):
    heartbeat = gd._Heartbeat()
    monkeypatch.setattr(gd, "_heartbeat", heartbeat)
    began = time.monotonic()
    heartbeat.enter()
    assert heartbeat.connected.is_set()
    assert time.monotonic() - began < 0.8  # it looks each second
    heartbeat.thread.name = "of this test"
    heartbeat.exit()
    until(lambda: heartbeat.database is None)


def test_there_is_one_heartbeat_thread_whatever_the_number_of_drives(db, drive, hero):
    for _ in range(5):
        GenevaDrive(db)
        assert scheduled(Quick.create(hero=hero, allow_multiple=True)).execute() is True
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("geneva-drive-heartbeat") == 1


def _use_connection(number, results):
    results.put(User.select().count())


def test_a_process_may_fork_while_another_thread_opens_a_connection(db, drive, hero):
    # What that thread holds would be held for ever in the child, where it does not run.
    with db._lock:
        assert in_processes(2, _use_connection) == [1, 1]


def test_a_process_that_forks_beside_a_consumer_wakes_nobody_and_does_not_wait_for_its_threads(db, drive, hero):
    locked, go_on = threading.Event(), threading.Event()

    def hold(condition):
        with condition:
            locked.set()
            go_on.wait(timeout=60)

    with sleepy_consumer(drive, workers=1), ThreadPoolExecutor(1) as threads:
        idle = drive.huey.storage.idle
        until(lambda: idle.changed._waiters)
        holding = threads.submit(hold, idle.changed)
        assert locked.wait(timeout=30)
        assert in_processes(1, lambda number, results: results.put(Quick.create(hero=hero).state)) == ["ready"]
        go_on.set()
        holding.result()


def test_forked_processes_do_not_share_a_pools_idle_connections(servers):
    db = PooledPostgresqlDatabase(**parse(servers.empty("postgresql")))
    User.bind(db)
    GenevaDrive(db)
    with db.connection_context():
        db.create_tables([User])
        User.create()
    assert in_processes(4, _use_connection) == [1] * 4
    with db.connection_context():
        assert User.select().count() == 1
    db.close_all()


# ==== Crash points: the process dies before every statement and commit ================================================


class _DyingCursor:
    """A driver's cursor whose process is killed before a certain statement, BEGIN and COMMIT included."""

    def __init__(self, cursor, countdown):
        self.cursor, self.countdown = cursor, countdown

    def execute(self, *arguments):
        self.countdown(arguments[0])
        return self.cursor.execute(*arguments)

    def __iter__(self):
        return iter(self.cursor)

    def __getattr__(self, name):
        return getattr(self.cursor, name)


def dies_at(moment, db, act, verbs=""):
    """Run `act` in a process that is killed at a moment: 0 is before its first statement, 1 before its second.

    After a statement is before the next one, for the database. Returns False if there are not so many: all was done.
    Where most statements only read, `verbs`, a regular expression, says which of them count.
    """
    process = os.fork()
    if process == 0:
        moments, cursor = itertools.count(), db.cursor

        def countdown(sql):
            if re.match(verbs, sql, re.IGNORECASE) and next(moments) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            db.cursor = lambda *arguments, **kwargs: _DyingCursor(cursor(*arguments, **kwargs), countdown)
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def _did(workflow):
    did(f"{workflow.id} {workflow.current_step_name}")


class Fragile(Workflow):
    """What goes through all that a step can come to; `context` says which calls from outside interrupt it."""

    @step
    def plain(self):
        _did(self)
        self.context["plain"] = True
        if call := self.context.pop("interrupted_by", None):
            getattr(reload(self), call)()

    @step(transactional=True)
    def exactly_once(self):
        _did(self)

    @step(resumable=True)
    def counted(self):
        for number in self.resume_over(range(3), every=2):
            did(f"{self.id} counted {number}")
            if number == 0 and (call := self.context.pop("stopped_by", None)):
                getattr(reload(self), call)()

    @step(on_exception="reattempt", max_reattempts=1, terminal_action="skip")
    def failing(self):
        _did(self)
        raise LookupError("as ever")

    @step(wait_for="go", timeout=3600, on_timeout="run", matching=bool)
    def signaled(self):
        _did(self)

    @step(wait=60, transactional=True)
    def last(self):
        _did(self)


def _fragile(**context):
    return Fragile.create(hero=User.create(), context=context)


def _queued(**context):
    bring_on(gd._drive())  # what earlier deaths left, or it would be before this one in the queue
    return _fragile(**context)


def _message(drive):
    """A consumer's worker, with the next message."""
    drive.huey.execute(drive.huey.dequeue())


def _performing():
    workflow = _fragile()
    gd._Attempt.claim(gd._drive(), scheduled(workflow).id)
    return reload(workflow)


def _awaiting(pause=False, signal=None):
    workflow = _fragile()
    workflow.pause()
    workflow.resume_at("signaled")
    if pause:
        workflow.pause()
    if signal is not None:
        workflow.signal("go", signal)
    return workflow


def _signaled(payload):
    bring_on(gd._drive())
    return _awaiting(signal=payload)


def _timed_out():
    drive = gd._drive()
    bring_on(drive)
    workflow = _awaiting()
    drive.clock.forward(hours=1)
    return workflow


def _paused(**context):
    workflow = _fragile(**context)
    workflow.pause()
    return workflow


def _paused_without_execution():
    workflow = _fragile()
    attempt = gd._Attempt.claim(gd._drive(), scheduled(workflow).id)
    reload(workflow).pause()
    attempt._record(gd._Verdict("step", "pause"))
    return reload(workflow)


def _neglected():
    """A dead process, a lost message, and a workflow that is over for long: all that housekeeping looks for."""
    drive = gd._drive()
    bring_on(drive)  # what earlier deaths left, or there would be more and more to do
    over = Quick.create(hero=User.create())
    over.cancel()
    over._write(transitioned_at=START - timedelta(days=31))
    _performing()
    lost = _fragile()
    drive.huey.flush()
    drive.clock.forward(minutes=10)
    return lost


class Guardian(Workflow):
    @step(wait_for_children=True, on_exception="reattempt")
    def see_them_off(self):
        if self.children.where(Workflow.state.in_(gd.ONGOING)).exists():
            raise AssertionError("woken too early")


def _guarded(*steps):
    """Children that stand at these steps, and the parent that waits for them."""
    drive = gd._drive()
    bring_on(drive)  # what earlier deaths left
    parent = Guardian.create(hero=User.create())
    children = [Fragile.create(hero=User.create(), parent=parent) for _ in steps]
    for child in children:
        child.pause()
    _message(drive)  # it looks, and waits
    assert [each.state for each in parent.execution_history] == ["waiting"]
    for child, step_name in zip(children, steps):
        child.resume_at(step_name)
    return parent, children


def _dead_child():
    drive = gd._drive()
    _, (child,) = _guarded("last")
    gd._Attempt.claim(drive, scheduled(child).id)
    drive.clock.forward(minutes=10)
    drive.stuck_recovery_action = "cancel"


#: What is prepared, what is done to it by a process that dies, and the states in which a workflow may end.
CRASHES = {
    "create a child": (
        lambda: Guardian.create(hero=User.create()),
        lambda drive, parent: Fragile.create(hero=User.create(), parent=parent),
        {"finished"},
    ),
    "create many children": (
        lambda: (Guardian.create(hero=User.create()), [User.create() for _ in range(3)]),
        lambda drive, prepared: Fragile.create_many(prepared[1], parent=prepared[0]),
        {"finished"},
    ),
    "end the last child": (lambda: _guarded("last"), lambda drive, _: _message(drive), {"finished"}),
    "end one of two children": (
        lambda: _guarded("last", "last"),
        lambda drive, _: _message(drive),
        {"finished"},
    ),
    "cancel the last child": (
        lambda: _guarded("plain"),
        lambda drive, family: family[1][0].cancel(),
        {"finished", "canceled"},
    ),
    "skip past the last child's last step": (
        lambda: _guarded("last"),
        lambda drive, family: family[1][0].skip(),
        {"finished"},
    ),
    "cancel a parent with its children": (
        lambda: _guarded("plain", "last"),
        lambda drive, family: family[0].cancel(children=True),
        {"finished", "canceled"},
    ),
    "recover a child": (_dead_child, lambda drive, _: drive.housekeeping(), {"finished", "canceled"}),
    "signal": (_awaiting, lambda drive, workflow: workflow.signal("go", 1, idempotency_key="k"), {"finished"}),
    "signal for later": (_fragile, lambda drive, workflow: workflow.signal("go", 1), {"finished"}),
    "perform with a signal": (lambda: _signaled(1), lambda drive, _: _message(drive), {"finished"}),
    "perform with another's signal": (lambda: _signaled(0), lambda drive, _: _message(drive), {"finished"}),
    "resume what waits": (
        lambda: _awaiting(pause=True, signal=1),
        lambda drive, workflow: workflow.resume(),
        {"finished"},
    ),
    "time out": (_timed_out, lambda drive, _: _message(drive), {"finished"}),
    "create": (lambda: None, lambda drive, _: _fragile(), {"finished"}),
    "create_many": (
        lambda: [User.create() for _ in range(3)],
        lambda drive, heroes: Fragile.create_many(heroes),
        {"finished"},
    ),
    "perform with run-on": (_queued, lambda drive, _: _message(drive), {"finished"}),
    "perform without run-on": (
        _queued,
        lambda drive, _: (setattr(drive, "run_on", 0), _message(drive), _message(drive)),
        {"finished"},
    ),
    "perform, paused meanwhile": (
        lambda: _queued(interrupted_by="pause"),
        lambda drive, _: _message(drive),
        {"finished"},
    ),
    "perform, canceled meanwhile": (
        lambda: _queued(interrupted_by="cancel"),
        lambda drive, _: _message(drive),
        {"finished", "canceled"},
    ),
    "perform, paused at a checkpoint": (
        lambda: _queued(stopped_by="pause"),
        lambda drive, _: _message(drive),
        {"finished"},
    ),
    "perform, canceled at a checkpoint": (
        lambda: _queued(stopped_by="cancel"),
        lambda drive, _: _message(drive),
        {"finished", "canceled"},
    ),
    "pause": (_fragile, lambda drive, workflow: workflow.pause(), {"finished"}),
    "pause while performing": (_performing, lambda drive, workflow: workflow.pause(), {"finished"}),
    "resume what is scheduled": (_paused, lambda drive, workflow: workflow.resume(), {"finished"}),
    "resume without an execution": (
        _paused_without_execution,
        lambda drive, workflow: workflow.resume(),
        {"finished"},
    ),
    "resume_at": (_paused, lambda drive, workflow: workflow.resume_at("exactly_once"), {"finished"}),
    "cancel": (_fragile, lambda drive, workflow: workflow.cancel(), {"finished", "canceled"}),
    "cancel while performing": (_performing, lambda drive, workflow: workflow.cancel(), {"finished", "canceled"}),
    "skip": (_fragile, lambda drive, workflow: workflow.skip(), {"finished"}),
    "skip what is paused": (_paused_without_execution, lambda drive, workflow: workflow.skip(), {"finished"}),
    "housekeeping": (_neglected, lambda drive, _: drive.housekeeping(), {"finished", "canceled"}),
}


def bring_on(drive):
    """What a consumer does about everything, in the time to come; and a person, who resumes what is paused."""
    for _ in range(12):
        if not Workflow.ongoing().exists():
            return
        for workflow in Workflow.paused():
            workflow.resume()
        drive.clock.forward(minutes=70)
        drive.housekeeping()
        for task in drive.huey.read_schedule():
            drive.huey.enqueue(task)
        work_off(drive)
    raise AssertionError(f"stuck: {[(each.state, history(each)) for each in Workflow.ongoing()]}")


@pytest.mark.parametrize("name", CRASHES)
@ELSEWHERE
def test_wherever_a_process_dies_the_workflow_goes_on(db, drive, clock, name, is_exhaustive):
    prepare, act, endings = CRASHES[name]
    if name == "housekeeping":  # which has nothing to queue again where no message can be lost
        drive = GenevaDrive(db, huey=MemoryHuey("outside", results=False), clock=clock)
    for moment in itertools.count(step=1 if is_exhaustive else 4):
        prepared = prepare()
        if not dies_at(moment, db, lambda: act(drive, prepared)):  # noqa: B023
            break
        assert violations(drive) == []
    # A hero and one statement there; elsewhere BEGIN, two statements and COMMIT at the least.
    assert moment >= (2 if drive._access.dialect.is_one_statement else 4)
    bring_on(drive)
    assert {each.state for each in Workflow.select()} <= endings
    counts = Counter(effects())
    for workflow in Fragile.select():
        done = [each.step_name for each in workflow.execution_history if each.outcome == "success"]
        assert len(done) == len(set(done))
        for step_name in done:
            for what in [f"counted {number}" for number in range(3)] if step_name == "counted" else [step_name]:
                times = counts.pop(f"{workflow.id} {what}")
                assert times == 1 if step_name in ("exactly_once", "last") else times in (1, 2)
    left = [effect for effect in counts if effect.endswith(("exactly_once", "last"))]
    assert left == []  # of no step that is not recorded
    for parent in Guardian.finished():
        assert "failed" not in [each.outcome for each in parent.execution_history]
        assert (parent.ongoing_children or 0) == parent.children.where(Workflow.state.in_(gd.ONGOING)).count() == 0


# ==== What it costs ===================================================================================================


class Costs:
    """Counts the statements and transactions of a database."""

    def __init__(self, db, monkeypatch):
        self.statements, self.transactions = [], 0
        begin = db.begin

        def counting(*arguments, **kwargs):
            self.transactions += 1
            return begin(*arguments, **kwargs)

        monkeypatch.setattr(db, "begin", counting)
        monkeypatch.setattr(db, "query_hooks", [lambda event: self.statements.append(event.sql)])

    def of(self, work):
        """What `work` costs: its result, its statements on the engine's and the queue's tables, its transactions."""
        self.statements.clear()
        self.transactions = 0
        result = work()
        # What a connection prepares it prepares once.
        costly = [sql for sql in self.statements if "geneva_drive" in sql and not sql.startswith("prepare ")]
        return result, costly, self.transactions


#: Statements and transactions, of each act; a statement by itself needs no transaction.
BUDGET = {
    "sqlite": {"create": (2, 1), "take": (3, 1), "run on": (3, 1), "wait": (3, 1)},
    "postgresql": {"create": (1, 0), "take": (1, 0), "run on": (1, 0), "wait": (1, 0)},
    "mysql": {"create": (2, 1), "take": (2, 0), "run on": (2, 1), "wait": (2, 1)},  # of MariaDB
}


def budget_of(drive):
    budget, database = BUDGET[drive._access.dialect.section], drive._access.database
    if drive._access.dialect.section == "mysql" and not drive._access.dialect._is_mariadb(database):
        return {**budget, "take": (3, 0)}  # MySQL's claims cannot be told to wait for nobody: it asks for that before
    return budget


def taken(drive):
    """The attempt that is due first, as a worker takes it."""
    attempt = drive.huey.dequeue().attempt
    gd._heartbeat.remove(attempt)
    return attempt


def test_creating_a_workflow_is_one_statement_or_transaction(db, drive, hero, monkeypatch):
    costs = Costs(db, monkeypatch)
    workflow, statements, transactions = costs.of(lambda: Plain.create(hero=hero))
    assert (len(statements), transactions) == budget_of(drive)["create"]
    assert messages(drive) == [scheduled(workflow).id]


@pytest.mark.parametrize("priorities", [1, 3])
def test_taking_and_claiming_a_step_is_one_statement_or_transaction(db, drive, hero, monkeypatch, priorities):
    for priority in range(1, priorities):
        Plain.create(hero=User.create(), options={"priority": priority}).pause()
        Tomorrow.create(hero=User.create(), options={"priority": priority})
    workflow = Quick.create(hero=hero)
    drive.huey.storage.priorities()  # asked for once in a second
    costs = Costs(db, monkeypatch)
    task, statements, transactions = costs.of(drive.huey.dequeue)
    assert (len(statements), transactions) == budget_of(drive)["take"]
    assert task.attempt.execution.state == "in_progress"
    costs.of(lambda: drive.huey.execute(task))
    assert reload(workflow).state == "finished"


def test_claiming_a_step_that_a_message_asks_for_is_a_look_and_one_statement_or_transaction(
    db, drive, hero, monkeypatch
):
    execution = scheduled(Quick.create(hero=hero))
    costs = Costs(db, monkeypatch)
    attempt, statements, transactions = costs.of(lambda: gd._Attempt.claim(drive, execution.id, "default"))
    assert attempt.execution.state == "in_progress"
    expected = {"sqlite": (3, 1), "postgresql": (2, 0), "mysql": (2, 0)}
    assert (len(statements), transactions) == expected[drive._access.dialect.section]


def test_an_empty_look_is_one_statement_that_locks_nothing(db, drive, hero, monkeypatch):
    Tomorrow.create(hero=hero)
    drive.huey.storage.priorities()
    costs = Costs(db, monkeypatch)
    task, statements, transactions = costs.of(drive.huey.dequeue)
    assert (task, len(statements), transactions) == (None, 1, 0)


def test_an_empty_look_needs_no_lock_that_others_hold(db, drive, hero):
    Tomorrow.create(hero=hero)

    def look():
        with db.connection_context():
            drive.huey.storage.priorities()
            return drive.huey.dequeue()

    with ThreadPoolExecutor(1) as threads, drive._access.begin():
        Tomorrow.create(hero=User.create())  # on SQLite, there is one lock for all who write
        for each in gd.MODELS:
            each.update(id=each.id).execute()
        assert threads.submit(look).result(timeout=10) is None


def test_a_priority_that_comes_and_goes_is_known_as_it_comes_again(db, drive):
    storage = drive.huey.storage

    def come_and_go(priority):
        workflow = Plain.create(hero=User.create(), options={"priority": priority})
        storage._asked = -math.inf
        assert priority in storage.priorities()
        workflow.cancel()
        storage._asked = -math.inf
        return storage.priorities()

    assert come_and_go(7) == (7, 0)
    for priority in range(100):
        assert len(come_and_go(priority)) <= gd.MAX_KNOWN_PRIORITIES


def test_a_priority_that_another_worker_finds_disturbs_no_look_at_what_is_due_first(drive, hero, monkeypatch):
    workflow, found = Tomorrow.create(hero=hero), itertools.chain([(0,)], itertools.repeat((7, 0)))
    monkeypatch.setattr(drive.huey.storage, "priorities", lambda: next(found))
    assert [drive.huey.storage.first_due() for _ in range(2)] == [scheduled(workflow).due_at] * 2


def test_threads_that_look_at_once_begin_with_another_execution_each(drive):
    ids = [Plain.create(hero=User.create()).id for _ in range(3)]
    drive.huey.storage.looking.add(-1)  # another thread
    taken = [drive.huey.dequeue().attempt for _ in range(3)]
    # PostgreSQL passes over what the other one has locked, and has no need of this.
    order = ids if drive._access.dialect.section == "postgresql" else [ids[1], ids[2], ids[0]]
    assert [each.workflow.id for each in taken] == order
    assert drive.huey.dequeue() is None
    for each in taken:
        each.run()
    assert drive.huey.storage.looking == {-1}


@pytest.mark.parametrize("database", ["postgresql", "mysql"], indirect=True)  # on SQLite, there is one lock for all
def test_what_others_have_locked_holds_up_no_step_of_another_workflow(database, db, drive, hero):
    Plain.create_many([User(id=number) for number in range(1, 101)])
    locked, other = list(Plain.select()), Quick.create(hero=hero)

    def take():
        with db.connection_context():
            drive.huey.storage.priorities()
            return drive.huey.dequeue()

    with ThreadPoolExecutor(1) as threads:
        with drive._access.begin():
            for each in locked:
                each.pause()
            attempt = threads.submit(take).result(timeout=10).attempt
            assert attempt.workflow.id == other.id
            assert threads.submit(take).result(timeout=10) is None
        threads.submit(attempt.run).result()
    drive.run(until=drive.is_idle)
    assert [reload(each).state for each in (*locked, other)] == [*["paused"] * 100, "finished"]


@contextlib.contextmanager
def paused_elsewhere(db, drive, workflow):
    """A transaction of another thread pauses a workflow; yields what commits it before the end, and whether it has."""
    is_paused, is_to_end = threading.Event(), threading.Event()

    def pause():
        with db.connection_context(), drive._access.begin():
            workflow.pause()
            is_paused.set()
            assert is_to_end.wait(60)

    with ThreadPoolExecutor(1) as threads:
        pausing = threads.submit(pause)
        assert is_paused.wait(10)
        try:
            yield is_to_end.set, pausing.done
        finally:
            is_to_end.set()
        pausing.result()


@pytest.mark.parametrize("database", ["postgresql", "mysql"], indirect=True)
def test_what_others_have_locked_holds_up_no_step_of_a_lower_priority(database, db, drive, hero):
    locked, other = Plain.create(hero=hero, options={"priority": 10}), Quick.create(hero=User.create())
    with paused_elsewhere(db, drive, locked):
        deadline = time.monotonic() + 20
        drive.run(until=lambda: reload(other).state == "finished" or time.monotonic() > deadline)
        found = reload(other).state
    assert (found, reload(locked).state) == ("finished", "paused")


def test_what_is_due_and_locked_by_others_is_looked_for_now_and_then(db, drive, hero, monkeypatch):
    workflow, take, looks = Plain.create(hero=hero), gd._Attempt.take, []
    monkeypatch.setattr(gd._Attempt, "take", lambda *arguments: looks.append(1) or take(*arguments))
    with paused_elsewhere(db, drive, workflow) as (commit, is_committed):
        threading.Timer(1, commit).start()
        drive.run(workers=2, until=is_committed)
    assert len(looks) < 150
    assert (reload(workflow).state, effects()) == ("paused", [])


def test_ending_a_step_and_claiming_the_next_is_one_statement_or_transaction(db, drive, hero, monkeypatch):
    Quick.create(hero=hero)
    attempt = taken(drive)
    assert attempt.workflow.hero == hero
    costs = Costs(db, monkeypatch)
    verdict = gd._Verdict("step", "return")
    following, statements, transactions = costs.of(lambda: attempt._record(verdict, lambda: True))
    assert following.execution.step_name == "two"
    assert (len(statements), transactions) == budget_of(drive)["run on"]


def test_ending_a_step_and_queuing_the_next_is_one_statement_or_transaction(db, drive, hero, monkeypatch):
    workflow = Plain.create(hero=hero)
    attempt = taken(drive)
    costs = Costs(db, monkeypatch)
    _, statements, transactions = costs.of(lambda: attempt._record(gd._Verdict("step", "return")))
    assert (len(statements), transactions) == budget_of(drive)["wait"]
    assert messages(drive) == [scheduled(workflow).id]


@pytest.mark.parametrize("run_on", [0, 60])
def test_a_workflow_costs_what_its_steps_cost_and_one_look_at_its_hero_for_each(db, drive, hero, monkeypatch, run_on):
    drive.run_on, budget = run_on, budget_of(drive)
    workflow = Quick.create(hero=hero)
    drive.huey.storage.priorities()
    monkeypatch.setattr(drive.huey.storage, "_asked", math.inf)  # however long this takes

    def perform_all():
        while task := drive.huey.dequeue():
            drive.huey.execute(task)

    costs = Costs(db, monkeypatch)
    costs.of(perform_all)
    statements = [sql for sql in costs.statements if re.match("(?!prepare).*(geneva_drive|test_users)", sql)]
    takes, heroes, empty = 1 if run_on else 3, 3, 1
    last = max(1, budget["wait"][0] - 1)  # no execution begins by it
    assert len(statements) == takes * budget["take"][0] + 2 * budget["run on"][0] + last + heroes + empty
    assert reload(workflow).state == "finished"


@pytest.mark.parametrize("call", ["pause", "cancel"])
def test_an_interruption_costs_a_few_statements_more(db, drive, hero, monkeypatch, call):
    workflow = Plain.create(hero=hero)
    attempt = taken(drive)
    getattr(reload(workflow), call)()
    costs = Costs(db, monkeypatch)
    _, statements, transactions = costs.of(lambda: attempt._record(gd._Verdict("step", "return"), lambda: True))
    assert len(statements) <= 7
    assert transactions <= 2  # the first finds that the fence is gone


# ==== What is due next is claimed with the end of a step ==============================================================


@pytest.fixture
def taker(drive, clock, monkeypatch):
    """A drive whose own queue is served by this thread, without an end to a run-on."""
    gd._heartbeat.workers.add(threading.get_ident())
    drive.run_on = 60
    monkeypatch.setattr(drive.huey.storage, "_asked", math.inf)
    return drive


def after_a_task(taker, *workflows):
    """The states of workflows once a worker has performed one task of Huey's."""
    taker.huey.execute(taker.huey.dequeue())
    return [reload(each).state for each in workflows]


def test_a_worker_claims_what_is_due_next_in_the_commit_that_ends_a_step(db, taker, monkeypatch):
    ids = [Quick.create(hero=User.create()).id for _ in range(3)]
    task, costs = taker.huey.dequeue(), Costs(db, monkeypatch)
    _, statements, transactions = costs.of(lambda: taker.huey.execute(task))
    performed = [each for each in ids if Workflow.get_by_id(each).state == "finished"]
    found = performed, len(statements), transactions
    expected = {
        "postgresql": (ids, 9 + 9, 0),  # each step is one statement, and a look at its hero
        "sqlite": (ids, 3 * (3 + 3 + 2) + 2 * 3 + 1, 9),  # twice, a look and a claim; and a look that finds nothing
        "mysql": (ids[:1], 2 + 2 + 1, 2),  # of a workflow by itself
    }
    assert found == expected[taker._access.dialect.section]
    assert gd._heartbeat.beating == set()


def elsewhere(taker, monkeypatch):
    gd._heartbeat.workers.clear()


def drains(taker, monkeypatch):
    monkeypatch.setattr(taker._dispatch, "draining", lambda queue: lambda: True)
    monkeypatch.setattr(gd._OwnStorage, "_drains", lambda self: False)


#: Where something of others' would come between, or there is no time for more.
WHAT_KEEPS_FROM_TAKING = {
    "no run-on": lambda taker, monkeypatch: setattr(taker, "run_on", 0),
    "elsewhere": elsewhere,
    "drains": drains,
    "priorities": lambda taker, monkeypatch: setattr(taker.huey.storage, "_asked", time.monotonic() - 1.5),
    "before": lambda taker, monkeypatch: taker.huey.pre_execute()(lambda task: None),
    "behind": lambda taker, monkeypatch: taker.huey.post_execute()(lambda task, value, error: None),
    "signal": lambda taker, monkeypatch: taker.huey.signal("complete")(lambda *_: None),
    "hook": lambda taker, monkeypatch: monkeypatch.setattr(Quick, "after_step_execution", lambda self, _: None),
    "end": lambda taker, monkeypatch: monkeypatch.setattr(gd.step_finished, "_receiver_list", [("", print, None)]),
    "transition": lambda taker, monkeypatch: monkeypatch.setattr(
        gd.workflow_transitioned, "_receiver_list", [("", print, None)]
    ),
}


@pytest.mark.parametrize("why", WHAT_KEEPS_FROM_TAKING)
def test_a_step_of_another_workflow_is_a_task_by_itself_where_something_may_come_between(taker, monkeypatch, why):
    first, second = (Quick.create(hero=User.create()) for _ in range(2))
    monkeypatch.setattr(taker.huey.storage, "priorities", lambda: (0,))
    WHAT_KEEPS_FROM_TAKING[why](taker, monkeypatch)
    states = after_a_task(taker, first, second)
    assert states[1] == "ready"
    assert scheduled(second).queue == "default"


def test_an_end_that_others_changed_claims_nothing_along(taker):
    class Paused(Workflow):
        @step
        def only(self):
            reload(self).pause()

    first, second = Paused.create(hero=User.create()), Quick.create(hero=User.create())
    assert after_a_task(taker, first, second) == ["finished", "ready"]
    assert scheduled(second).queue == "default"
    assert after_a_task(taker, second) == ["finished"]


def test_what_a_step_that_is_put_back_claims_along_is_performed(taker, clock):
    class Later(Workflow):
        @step
        def first(self):
            pass

        @step(wait=lambda self: 60)
        def second(self):
            pass

    workflows = [Later.create(hero=User.create()) for _ in range(3)]
    performed = 1 if taker._access.dialect.section == "mysql" else 3
    after_a_task(taker, *workflows)
    assert [reload(each).current_step_name for each in workflows] == ["second"] * performed + ["first"] * (
        3 - performed
    )
    assert {reload(each).state for each in workflows} == {"ready"}
    assert gd._heartbeat.beating == set()


def test_what_is_claimed_along_and_not_defined_here_is_put_off(taker, clock):
    first, second = (Quick.create(hero=User.create()) for _ in range(2))
    Workflow.update(type="Nobody").where(Workflow.id == second.id).execute()
    assert after_a_task(taker, first, second) == ["finished", "ready"]
    is_put_off = scheduled(second).due_at > clock()
    assert is_put_off is (taker._access.dialect.section != "mysql")
    assert gd._heartbeat.beating == set()


def test_what_is_claimed_along_as_the_consumer_begins_to_drain_is_given_back(taker, monkeypatch, clock):
    draining = []

    class Stopping(Workflow):
        @step
        def only(self):
            pass

    first, second = Stopping.create(hero=User.create()), Quick.create(hero=User.create())
    record = gd._Attempt._record

    def record_late(self, verdict, may_run_on):
        def may_run_on_once():
            yes = may_run_on()
            draining.append(True)  # between this question and the commit
            return yes

        return record(self, verdict, may_run_on_once)

    monkeypatch.setattr(gd._Attempt, "_record", record_late)
    monkeypatch.setattr(gd._OwnStorage, "_drains", lambda self: False)
    monkeypatch.setattr(taker._dispatch, "draining", lambda queue: lambda: bool(draining))
    assert after_a_task(taker, first, second) == ["finished", "ready"]
    assert scheduled(second).queue == "default"
    assert gd._heartbeat.beating == set()


def test_a_workflows_own_next_step_of_a_higher_priority_comes_before_others(taker):
    order = []

    class Rising(Workflow):
        @step
        def low(self):
            order.append("low")

        @step(options={"priority": 5})
        def high(self):
            order.append("high")

    class Other(Workflow):
        @step
        def only(self):
            order.append("other")

    workflows = [Rising.create(hero=User.create()), Other.create(hero=User.create())]
    taker.huey.storage._priorities = (5, 0)
    while any(reload(each).state == "ready" for each in workflows):
        after_a_task(taker)
    assert order == ["low", "high", "other"]


def test_a_row_that_cannot_be_read_does_not_undo_the_end_of_another_step(db, taker):
    first, second = (Quick.create(hero=User.create()) for _ in range(2))
    db.execute_sql(f"update geneva_drive_workflows set context = 'no JSON' where id = {second.id}")
    with contextlib.suppress(ValueError):
        after_a_task(taker)
    db.execute_sql(f"update geneva_drive_workflows set context = '{{}}' where id = {second.id}")
    assert reload(first).state == "finished"
    Workflow.delete().where(Workflow.id == second.id).execute()


def test_a_claim_that_has_waited_for_locks_has_its_heartbeat_renewed_at_once(drive, hero, clock):
    Quick.create(hero=hero)
    attempt = taken(drive)
    clock.forward(seconds=0.5)
    gd._heartbeat.beaten = 1.0
    gd._heartbeat.add(attempt)
    assert gd._heartbeat.beaten == 1.0
    gd._heartbeat.remove(attempt)
    clock.forward(seconds=10)
    gd._heartbeat.add(attempt)
    assert (gd._heartbeat.beaten, gd._heartbeat.hurry.is_set()) == (-math.inf, True)
    gd._heartbeat.remove(attempt)
    gd._Recording(attempt).put_back({"state": "scheduled"})


def test_moments_can_be_updated_in_bulk(drive, clock):
    workflows = [Plain.create(hero=User.create()) for _ in range(2)]
    moments = [clock() - timedelta(days=days, microseconds=1) for days in (1, 2)]
    for each, moment in zip(workflows, moments):
        each.transitioned_at = moment
    assert Workflow.bulk_update(workflows, [Workflow.transitioned_at]) == 2
    assert [reload(each).transitioned_at for each in workflows] == moments


def test_of_what_is_claimed_along_the_highest_priority_comes_first(taker):
    first, low, high = (Quick.create(hero=User.create(), options={"priority": each}) for each in (9, 0, 5))
    order = []

    class Watching(Workflow):
        @step
        def only(self):
            order.append(self.context["priority"])

    for each in (low, high):
        each.cancel()
    for each in (0, 5):
        Watching.create(hero=User.create(), context={"priority": each}, options={"priority": each})
    taker.huey.storage._priorities = (9, 5, 0)
    for _ in range(3 if taker._access.dialect.section == "mysql" else 1):
        after_a_task(taker, first)
    assert order == [5, 0]


# ==== A move as it is planned leaves what the one under the lock leaves ===============================================


def _meanwhile(call):
    return lambda self: getattr(reload(self), call)()


def _note(workflow, **values):
    """Change a workflow's context from outside."""
    outside = reload(workflow)
    outside.context.update(values)
    assert outside.save() == 1


def _recovered(self):
    _drive = gd._drive()
    _drive.clock.forward(hours=1)
    assert housekeeping_elsewhere(_drive)["stuck_in_progress_recovered"] == 1


def _fails(error):
    def turn(self):
        raise error

    return turn


#: What a step may come to, by itself or by others in the middle of it.
TURNS = {
    "returns": lambda self: None,
    "changes its context": lambda self: self.context.update(seen=True),
    "changes its context as others do": lambda self: (_note(self, by="others"), self.context.update(seen=True)),
    "has a context that cannot be kept": lambda self: self.context.update(seen=object()),
    "is reattempted": lambda self: self.reattempt(),
    "is reattempted later": lambda self: self.reattempt(wait=30),
    "skips": lambda self: self.skip(),
    "cancels": lambda self: self.cancel(),
    "pauses": lambda self: self.pause(),
    "finishes": lambda self: self.finish(),
    "is reattempted for a reason": lambda self: self.reattempt(reason="not yet"),
    "cancels for a reason": lambda self: self.cancel(reason="sold out"),
    "pauses for a reason": lambda self: self.pause(reason="to be looked at"),
    "finishes for a reason": lambda self: self.finish(reason="paid in cash"),
    "is paused meanwhile for a reason": lambda self: reload(self).pause(reason="a holiday"),
    "is canceled meanwhile for a reason": lambda self: reload(self).cancel(reason="withdrawn"),
    "fails and is reattempted": _fails(KeyError("k")),
    "fails and is skipped": _fails(ValueError("v")),
    "fails and is canceled": _fails(TypeError("t")),
    "fails and is paused": _fails(OSError("o")),
    "is paused meanwhile": _meanwhile("pause"),
    "is canceled meanwhile": _meanwhile("cancel"),
    "is recovered meanwhile": _recovered,
}


def contents(drive):
    """What is in the tables and the queues, but for numbers and texts that no two runs have in common."""
    ids, rows = itertools.count(), {}
    for model in gd.MODELS:
        for each in model.select().order_by(model.id):
            rows[model, each.id] = {"place": next(ids), **each.__data__}
    for data in rows.values():
        if "workflow" in data:
            data["workflow"] = rows[Workflow, data["workflow"]]["place"]
        data["job_id"], data["error_backtrace"] = bool(data.get("job_id")), bool(data.get("error_backtrace"))
        for name in ("id", "token", "hero_id"):
            data.pop(name, None)
    tasks = [
        (rows.get((StepExecution, task.args[0]), {}).get("place"), task.eta, task.priority, name)
        for name, queue in drive.queues.items()
        for task in queue.pending() + queue.scheduled()
    ]
    return [*rows.values()], tasks


@pytest.mark.parametrize("run_on", [0, 60])
@pytest.mark.parametrize("wait", [0, pytest.param(60, marks=ELSEWHERE)])
@pytest.mark.parametrize("turn", TURNS)
def test_a_move_as_planned_leaves_what_the_amended_one_leaves(drive, monkeypatch, turn, wait, run_on):
    class Turns(Workflow):
        exception_policies = [
            gd.ExceptionPolicy("reattempt", matching=KeyError, wait=5, jitter=0),
            gd.ExceptionPolicy("skip", matching=ValueError),
            gd.ExceptionPolicy("cancel", matching=TypeError),
        ]

        @step(options={"priority": 3})
        def before(self):
            did("before")

        @step(options={"priority": 3})
        def turns(self):
            did(turn)
            TURNS[turn](self)

        @step(wait=wait)
        def after(self):
            did("after")

    def left():
        drive.clock = Clock()
        drive.huey.flush()
        for model in (*reversed(gd.MODELS), Effect):
            model.delete().execute()
        workflow = Turns.create(hero=User.create())
        found = []
        for _ in range(4):
            execution = workflow.execution_history.where(StepExecution.state == "scheduled").first()
            if execution is None:
                break
            with contextlib.suppress(TypeError, OSError):
                drive._perform(execution.id)
            drive._perform(execution.id)  # a second message
            found += contents(drive)
        return found, effects()

    drive.run_on = run_on
    planned = left()
    assert planned[1][:2] == ["before", turn]
    monkeypatch.setattr(gd._Recording, "_needs_lock", lambda self: True)
    assert planned == left()


CHANGES_BEFORE_A_CLAIM = {
    "put off": lambda workflow: gd._Attempt.claim(gd._drive(), scheduled(workflow).id, "default").put_off("a test"),
    "pause": Workflow.pause,
    "cancel": Workflow.cancel,
    "context": lambda workflow: _note(workflow, by="others"),
    "claim": lambda workflow: gd._Attempt.claim(gd._drive(), scheduled(workflow).id),
}


@pytest.mark.parametrize("change", CHANGES_BEFORE_A_CLAIM)
def test_a_step_is_claimed_as_it_was_read_or_not_at_all(drive, clock, hero, change):
    workflow = Quick.create(hero=hero)
    execution = StepExecution._with_workflow(scheduled(workflow).id)
    CHANGES_BEFORE_A_CLAIM[change](workflow)
    before = list(StepExecution.select().tuples()), list(Workflow.select().tuples())
    assert gd._claim(drive, execution) is False
    assert (list(StepExecution.select().tuples()), list(Workflow.select().tuples())) == before


@pytest.mark.parametrize("call", ["message", "execute"])
def test_a_context_that_is_saved_while_a_step_is_claimed_does_not_keep_it_from_being_performed(
    drive, hero, monkeypatch, call
):
    workflow, get, saved = Plain.create(hero=hero), gd._claim, []

    def get_late(*arguments):
        if not saved:
            saved.append(_note(Workflow.get_by_id(workflow.id), by="others"))
        return get(*arguments)

    monkeypatch.setattr(gd, "_claim", get_late)
    if call == "message":
        drive._perform(scheduled(workflow).id)
    else:
        assert scheduled(workflow).execute() is True
    assert effects() == ["one"]
    assert reload(workflow).context == {"by": "others"}


def test_a_step_that_is_just_being_put_off_is_not_claimed_as_it_was_read(db, drive, clock, hero):
    workflow = Quick.create(hero=hero)
    execution = StepExecution._with_workflow(scheduled(workflow).id)

    def claim():
        with db.connection_context():
            return gd._claim(drive, execution)

    with ThreadPoolExecutor(1) as threads:
        with drive._access.begin():
            CHANGES_BEFORE_A_CLAIM["put off"](workflow)
            claiming = threads.submit(claim)
            with pytest.raises(FutureTimeout):
                claiming.result(timeout=0.3)
        assert claiming.result(timeout=30) is False
    assert reload(workflow).state == "ready"
    assert history(workflow) == [("one", "scheduled", None)]


@pytest.mark.parametrize("needs_lock", [False, True])
def test_a_step_that_runs_on_sees_what_others_saved_during_the_one_before_it(drive, hero, monkeypatch, needs_lock):
    class Watched(Workflow):
        @step
        def one(self):
            other = reload(self)
            other.context["outside"] = [1]
            other.save()
            Workflow.update(options={"priority": 7}).where(Workflow.id == self.id).execute()

        @step
        def two(self):
            did(f"{self.context} {self.options} {self.state} {self.current_step_name} {type(self).__name__}")
            assert self.__data__ == reload(self).__data__
            assert self.hero == hero

    monkeypatch.setattr(gd._Recording, "_needs_lock", lambda self: needs_lock)
    drive.run_on = 60
    workflow = Watched.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert effects() == ["{'outside': [1]} {'priority': 7} performing two Watched"]
    assert history(workflow) == [("one", "completed", "success"), ("two", "completed", "success")]


def test_a_message_that_is_not_to_be_performed_is_left_alone_however_moves_are_made(drive, clock, hero, monkeypatch):
    def left():
        drive.huey.flush()
        for model in reversed(gd.MODELS):
            model.delete().execute()
        workflow = Plain.create(hero=hero)
        first = scheduled(workflow)
        drive._perform(first.id)
        waiting, found = scheduled(workflow), []
        for change in (
            lambda: None,  # too early
            lambda: Workflow.update(type="Gone").execute(),
            lambda: StepExecution.update(step_name="gone").where(StepExecution.id == waiting.id).execute(),
            workflow.pause,
            lambda: reload(workflow).cancel(),
        ):
            change()
            for each in (first, waiting):
                drive._perform(each.id)
            found += contents(drive)
            Workflow.update(type="Plain").execute()
            clock.forward(days=3)
            drive.undefined_step_grace = timedelta(days=100)
        return found

    start = clock.now
    quick = left()
    clock.now = start
    drive.undefined_step_grace = timedelta(minutes=10)
    monkeypatch.setattr(gd._Recording, "_needs_lock", lambda self: True)
    assert quick == left()


@pytest.mark.parametrize("wait", [0, 60])
@pytest.mark.parametrize("number", [None, 2**40, 2**62])
def test_what_is_told_of_a_message_and_what_is_in_it_is_the_number_of_the_execution(drive, hero, wait, number):
    class Two(Workflow):
        one = step("go")
        two = step("go", wait=wait)

        def go(self):
            did(self.current_step_name)

    drive.run_on, told = 0, []
    drive.huey.signal(gd.SIGNAL_ENQUEUED, gd.SIGNAL_SCHEDULED)(receiver := lambda name, task: told.append(task.args))
    workflow = Two.create(hero=hero)
    if number:
        following = {
            "sqlite": "select {}",  # it goes on from the highest number that is there
            "postgresql": "select setval('geneva_drive_step_executions_id_seq', {})",
            "mysql": "alter table geneva_drive_step_executions auto_increment = {}",
        }[drive._access.dialect.section]
        drive._access.database.execute_sql(following.format(number))
    drive.huey.execute(drive.huey.dequeue())
    drive.huey.disconnect_signal(receiver)
    first, second = (each.id for each in workflow.execution_history)
    assert second >= (number if number and drive._access.dialect.section != "sqlite" else first + 1)
    assert told == [(first,), (second,)]
    (message,) = drive.huey.pending() + drive.huey.scheduled()
    assert message.args == (second,)


#: Whose connection it is, who waits for the lock of a row, and how to break off what a connection is at.
STATEMENTS_UNDER_WAY = {
    "postgresql": (
        "select pg_backend_pid()",
        "select pid from pg_stat_activity where wait_event_type = 'Lock'",
        "select pg_cancel_backend(%s)",
    ),
    "mysql": (
        "select connection_id()",
        "select id from information_schema.processlist where info like 'update %%'",  # it takes no time but for a lock
        "kill query %s",
    ),
}


@pytest.mark.parametrize("database", ["postgresql", "mysql"], indirect=True)
@pytest.mark.parametrize("run_on", [True, False])
def test_a_step_whose_end_is_broken_off_on_the_server_has_not_ended(database, db, drive, hero, run_on):
    who, waiting, break_off = STATEMENTS_UNDER_WAY[drive._access.dialect.section]
    workflow = Quick.create(hero=hero)
    attempt, numbers = gd._Attempt.claim(drive, scheduled(workflow).id), []
    failed, go_on = threading.Event(), threading.Event()

    def record():
        attempt._record(gd._Verdict("step", "return"), lambda: run_on)

    def broken_off():
        with db.connection_context():
            numbers.append(db.execute_sql(who).fetchone())
            with pytest.raises(peewee.DatabaseError):
                record()
            failed.set()
            assert reload(workflow).state == "performing"  # for the connection that has changed it
            assert go_on.wait(timeout=30)
            record()

    with ThreadPoolExecutor(1) as threads:
        with db.atomic():
            assert StepExecution._lock(StepExecution.id == attempt.execution.id)
            recording = threads.submit(broken_off)
            until(lambda: numbers and numbers[0] in db.execute_sql(waiting).fetchall())
            db.execute_sql(break_off, numbers[0])
            assert failed.wait(timeout=30)
        go_on.set()
        recording.result(timeout=30)
    assert history(workflow)[0] == ("one", "completed", "success")
    Workflow.delete().execute()
    StepExecution.delete().execute()


@pytest.mark.parametrize("run_on", [True, False])
def test_a_heartbeat_that_is_just_being_written_holds_up_the_end_of_a_step_and_does_no_more(
    database, db, drive, hero, run_on
):
    workflow = Quick.create(hero=hero)
    attempt = gd._Attempt.claim(drive, scheduled(workflow).id)
    locked, go_on = threading.Event(), threading.Event()

    def beat():
        with db.connection_context(), drive._access.begin():
            StepExecution.update(heartbeat_at=utcnow()).where(StepExecution.id == attempt.execution.id).execute()
            locked.set()
            go_on.wait(timeout=30)

    with ThreadPoolExecutor(2) as threads:
        beating = threads.submit(beat)
        assert locked.wait(timeout=30)

        def record():
            with db.connection_context():
                return attempt._record(gd._Verdict("step", "return"), lambda: run_on)

        recording = threads.submit(record)
        with pytest.raises(FutureTimeout):
            recording.result(timeout=0.3)
        go_on.set()
        beating.result()
        following = recording.result()
    assert history(workflow)[0] == ("one", "completed", "success")
    assert history(workflow)[1:] == [("two", "in_progress" if run_on else "scheduled", None)]
    assert (following and following.execution.id) == (workflow.execution_history[1].id if run_on else None)
    Workflow.delete().execute()
    StepExecution.delete().execute()


def test_sql_that_is_built_once_is_what_peewee_builds_of_the_values(drive, clock, hero, helpers, monkeypatch):
    sent, built_once = Counter(), gd._Record._built.__func__

    def built(cls, verb, columns, where, make):
        model, statement = cls._meta.model, copy.copy(built_once(cls, verb, columns, where, make))
        fill = statement.filled

        def filled(*values):
            new = {getattr(model, name): getattr(model, name).to_value(values[0][name]) for name in columns}
            null = [name.removesuffix(" is null") for name in where if name.endswith(" is null")]
            found = [getattr(model, name) == values[1][name] for name in where if name.split()[0] not in null]
            found += [getattr(model, name).is_null() for name in null]  # what is null comes last
            query = make(model, new).where(*found) if found else make(model, new)
            plain = drive.database.get_sql_context().sql(query).query()
            assert (statement.sql, fill(*values)) == plain
            sent[verb, model] += 1
            return fill(*values)

        statement.filled = filled
        return statement

    monkeypatch.setattr(gd._Record, "_built", classmethod(built))
    workflow = Payment.create(hero=hero, context={"a": 1})
    workflow.signal("confirmed", {"b": 2})
    drive._perform(scheduled(workflow).id)
    Charged.create(hero=hero, options={"queue": "default"})
    work_off(drive)
    Plain.create_many([User.create(), User.create()])
    assert effects() == ["confirm {'b': 2}", "deliver None"]
    verbs = {*itertools.product(("insert", "insert many", "update"), (Workflow, StepExecution))}
    if drive._access.dialect.is_one_statement:  # which is built of blanks alone
        verbs -= {("insert", Workflow)}
    assert {*sent} == verbs


def test_a_heros_own_select_and_conversions_count_and_leave_no_statement_open(db, drive, helpers):
    class Upper(peewee.CharField):
        def adapt(self, value):
            return value.lower()

        def python_value(self, value):
            return value.upper()

    class Member(peewee.Model):
        key = Upper(primary_key=True)
        group = peewee.ForeignKeyField(User, column_name="of_group")

        class Meta:
            database = db
            table_name = "test_members"

        @classmethod
        def select(cls, *fields):
            query = super().select(*fields)
            return query if fields else query.join(User, on=User.name == "ada")  # a row for each of them

    class Greets(Workflow):
        @step
        def one(self):
            did(f"{self.hero.key} {self.hero.group.id} {self.hero._dirty}")

    db.drop_tables([Member])
    db.create_tables([Member])
    try:
        group = User.create()
        User.create()
        Member.insert(key="Me", group=group).execute()
        workflow = Greets.create(hero=Member.get())
        helpers.speedrun_workflow(workflow)
        with ThreadPoolExecutor(1) as threads:  # after this, who looks at older rows can write no more on SQLite
            threads.submit(lambda: [did("elsewhere"), db.close()]).result()
        did("here")
        assert effects() == [f"ME {group.id} set()", "elsewhere", "here"]
    finally:
        gd._hero_models.pop("Member", None)
        db.drop_tables([Member])


def test_a_row_read_by_built_sql_is_the_row_that_peewee_reads(drive, hero):
    workflow = Plain.create(hero=hero, context={"a": [1, None]}, options={"queue": "default"})
    scheduled(workflow).execute()
    for row in (*Workflow.select(), *workflow.execution_history):
        found = gd._Record._row.__func__(type(row), id=row.id)
        assert (type(found), found.__data__, found._dirty) == (type(row), row.__data__, row._dirty)
    execution = scheduled(workflow)
    found = StepExecution._with_workflow(execution.id)
    assert (found.__data__, found.workflow.__data__) == (execution.__data__, reload(workflow).__data__)
    assert type(found.workflow) is Plain
    assert StepExecution._with_workflow(0) is Workflow._row(id=0) is None


def test_names_and_errors_may_be_of_any_language(drive, hero):
    class Größen(Workflow):
        @step
        def größe(self):
            did("größe")

        @step(name="вес 😀", on_exception="skip")
        def weight(self):
            raise OddError("Zahlung für Ä fehlt 😀")

        @step(wait_for="für 😀")
        def paid(self):
            did(self.signal_payload)

    workflow = Größen.create(hero=hero)
    work_off(drive)
    workflow.signal("für 😀", "€")
    work_off(drive)
    assert [each[:2] for each in history(workflow)] == [
        ("größe", "completed"),
        ("вес 😀", "skipped"),
        ("paid", "completed"),
    ]
    assert effects() == ["größe", "€"]
    for each in workflow.execution_history:
        assert not each.execute()
        assert gd._Attempt.claim(drive, each.id, "default") is None


# ==== Starting ========================================================================================================


def test_a_new_workflow_is_ready_and_its_first_step_is_queued(drive, clock, hero):
    class Delayed(Workflow):
        @step(wait=90)
        def one(self):
            pass

    workflow = Delayed.create(hero=hero, context={"invoice": 7})
    assert type(workflow) is Delayed
    assert (workflow.state, workflow.current_step_name, workflow.created_at) == ("ready", "one", START)
    row = reload(workflow)
    assert row == workflow
    assert row.__data__ == workflow.__data__
    assert (row.type, row.hero_type, row.hero_id, row.hero) == ("Delayed", "User", str(hero.id), hero)
    (execution,) = row.execution_history
    assert (execution.state, execution.number, execution.enqueued_at) == ("scheduled", 1, START)
    assert execution.scheduled_for == START + timedelta(seconds=90)
    (task,) = drive.huey.scheduled()
    assert (task.args, task.kwargs, task.id) == ((execution.id,), {}, execution.job_id)


@pytest.mark.parametrize(
    "make", [lambda: User.create(), lambda: Ticket.create(id=uuid.uuid4()), lambda: Country.create(code="Åland ")]
)
def test_a_hero_may_have_any_key(drive, helpers, make):
    hero = make()
    workflow = Quick.create(hero=hero)
    assert reload(workflow).hero == hero
    with pytest.raises(gd.AlreadyOngoingError):
        Quick.create(hero=type(hero).get_by_id(hero._pk))
    helpers.speedrun_workflow(workflow)
    assert [each.id for each in Quick.for_hero(hero)] == [workflow.id]


def test_a_key_in_another_form_is_the_same_hero(drive):
    ticket = Ticket.create(id=uuid.uuid4())
    Quick.create(hero=ticket)
    with pytest.raises(gd.AlreadyOngoingError):
        Quick.create(hero=Ticket(id=ticket.id.hex.upper()))
    with pytest.raises(gd.AlreadyOngoingError):
        Quick.create(hero=Ticket(id=str(ticket.id)))


def test_heroes_that_differ_in_case_or_spaces_are_different(drive, helpers):
    codes = ["abc", "ABC", "abc ", " abc", "àbc", "\U0001f600"]
    for code in codes:
        Plain.create(hero=Country(code=code))  # the application's own table may not tell them apart on MySQL
    assert Plain.ongoing().count() == len(codes)
    assert sorted(each.hero_id for each in Plain.ready()) == sorted(codes)
    for code in codes:
        with pytest.raises(gd.AlreadyOngoingError):
            Plain.create(hero=Country(code=code))
        assert [each.hero_id for each in Plain.for_hero(Country(code=code))] == [code]


def test_types_and_ids_that_read_the_same_when_put_together_are_kept_apart(drive):
    class A(Workflow):
        workflow_type = "A"

        @step
        def one(self):
            pass

    class AB(A):
        workflow_type = "AB"

    class Thing(Model):
        name = CharField(primary_key=True)

        class Meta:
            hero_type = "B"

    class OtherThing(Model):
        name = CharField(primary_key=True)

        class Meta:
            hero_type = "B1"

    A.create(hero=Thing(name="12"))
    A.create(hero=OtherThing(name="2"))
    AB.create(hero=Thing(name="12"))
    assert Workflow.ongoing().count() == 3


def test_without_a_hero_and_with_allow_multiple_there_is_no_limit(drive, hero):
    class Free(Workflow):
        may_proceed_without_hero = True

        @step
        def one(self):
            did(str(self.hero))

    Free.create(), Free.create(hero=None)
    Free.create(hero=hero)
    Free.create(hero=hero, allow_multiple=True), Free.create(hero=hero, allow_multiple=True)
    assert Free.get_or_create(hero=hero)[1] is False
    assert Free.get_or_create()[1] is True
    assert Free.ready().count() == 6


def test_the_second_create_names_the_ongoing_workflow(drive, hero):
    first = Plain.create(hero=hero)
    with pytest.raises(gd.AlreadyOngoingError, match=rf"User {hero.id}.*Plain.*workflow {first.id}") as caught:
        Plain.create(hero=hero)
    assert caught.value.workflow_id == first.id
    assert isinstance(caught.value, peewee.IntegrityError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.workflow_id) == (str(caught.value), first.id)


def test_a_refused_create_does_not_spoil_the_callers_transaction(db, drive, hero):
    first = Plain.create(hero=hero)
    with db.atomic():
        with pytest.raises(gd.AlreadyOngoingError) as caught:
            Plain.create(hero=hero)
        User.create(name="after")
    assert caught.value.workflow_id == first.id
    assert User.select().where(User.name == "after").count() == 1


def test_a_rollback_leaves_neither_rows_nor_messages(db, drive, hero):
    with pytest.raises(ZeroDivisionError), db.atomic():
        Plain.create(hero=hero)
        Quick.create_many([hero])
        raise ZeroDivisionError
    nothing_written(drive)


def test_an_outside_queue_gets_its_messages_after_the_outermost_commit(db, drive, hero):
    outside = MemoryHuey("outside", results=False)
    drive = GenevaDrive(db, huey=outside)
    with db.atomic():
        with db.atomic():
            workflow = Plain.create(hero=hero)
        assert messages(drive) == []
    assert messages(drive) == [scheduled(workflow).id]
    with pytest.raises(ZeroDivisionError), db.atomic():
        Quick.create(hero=hero)
        raise ZeroDivisionError
    assert messages(drive) == [scheduled(workflow).id]


def test_a_queue_that_is_down_costs_a_log_line_and_no_workflow(db, drive, hero, caplog):
    down = RedisHuey("down", host="127.0.0.1", port=1, results=False)
    drive = GenevaDrive(db, huey=down)
    drive.clock = Clock()
    workflow = Quick.create(hero=hero)
    assert reload(workflow).state == "ready"
    assert "housekeeping makes up for it" in caplog.text
    drive = GenevaDrive(db, huey=MemoryHuey("up again", results=False), clock=drive.clock)
    drive.clock.forward(minutes=2)
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 1
    work_off(drive)
    assert reload(workflow).state == "finished"


@pytest.mark.parametrize("outside", [False, pytest.param(True, marks=ELSEWHERE)])
def test_create_many_creates_all(db, drive, outside):
    if outside:
        drive = GenevaDrive(db, huey=MemoryHuey("outside", results=False))
    User.insert_many([{"name": str(number)} for number in range(2500)]).execute()
    assert Quick.create_many(User.select()) == 2500
    assert Quick.ready().count() == 2500
    assert messages(drive) == [row.id for row in StepExecution.select(StepExecution.id).order_by(StepExecution.id)]
    assert len({row.token for row in Workflow.select()}) == 2500
    first = Workflow.select().order_by(Workflow.id).get()
    assert scheduled(first).execute() is True
    assert reload(first).current_step_name == "two"


def test_create_many_is_all_or_nothing_and_names_the_conflict(drive):
    heroes = [User.create(name=str(number)) for number in range(5)]
    ongoing = Plain.create(hero=heroes[3])
    with pytest.raises(gd.AlreadyOngoingError) as caught:
        Plain.create_many(heroes)
    assert caught.value.workflow_id == ongoing.id
    assert Workflow.select().count() == 1
    assert Plain.create_many(heroes, on_conflict="ignore") == 4
    assert Plain.create_many(heroes, on_conflict="ignore") == 0
    with pytest.raises(gd.AlreadyOngoingError):
        Quick.create_many([heroes[0], heroes[0]])
    assert Quick.create_many([heroes[0], heroes[0]], on_conflict="ignore") == 1
    with pytest.raises(ValueError, match="on_conflict"):
        Quick.create_many([], on_conflict="replace")
    assert Quick.create_many([]) == 0


def test_create_many_takes_no_hero_that_is_none(drive):
    class Free(Workflow):
        may_proceed_without_hero = True

        @step
        def one(self):
            pass

    for on_conflict in ("raise", "ignore"):
        with pytest.raises(TypeError, match="not None"):
            Free.create_many([None, None], on_conflict=on_conflict)
    nothing_written(drive)


def test_a_hero_twice_in_create_many_is_named_without_a_workflow(drive, hero):
    with pytest.raises(gd.AlreadyOngoingError, match=rf"User {hero.id} .* in this very call") as caught:
        Quick.create_many([hero, hero])
    assert caught.value.workflow_id is None
    nothing_written(drive)


def test_get_or_create_sees_through_an_old_snapshot(database, db, drive, hero):
    results = []

    def create():
        results.append(Plain.create(hero=hero).id)
        db.close()

    with db.atomic():
        if drive._access.dialect.section != "sqlite":  # where the other one would have to wait
            assert Plain.select().count() == 0
            thread = threading.Thread(target=create)
            thread.start()
            thread.join()
        else:
            create_here = Plain.create(hero=hero)
            results.append(create_here.id)
        workflow, created = Plain.get_or_create(hero=hero)
    assert (workflow.id, created) == (results[0], False)


class Color(enum.Enum):
    RED = "red"


class ColorField(CharField):
    def db_value(self, value):
        return Color(value).value

    def python_value(self, value):
        return Color(value)


@pytest.mark.parametrize("with_binary_key", [False, True])
def test_binary_uuids_and_foreign_keys_make_heroes_too(db, drive, helpers, with_binary_key):
    class Badge(Model):
        id = BinaryUUIDField(primary_key=True)

        class Meta:
            database = db
            table_name = "test_badges"

    class Guard(Model):
        badge = ForeignKeyField(Badge, primary_key=True)

        class Meta:
            database = db
            table_name = "test_guards"

    db.drop_tables([Badge, Guard])
    db.create_tables([Badge, Guard])
    badge = Badge.create(id=uuid.uuid4())
    hero = badge if with_binary_key else Guard.create(badge=badge)
    workflow = Quick.create(hero=hero)
    assert workflow.hero_id == str(badge.id)
    assert reload(workflow).hero == hero
    helpers.speedrun_workflow(workflow)
    assert workflow.state == "finished"
    db.drop_tables([Badge, Guard])


def test_a_hero_is_read_with_the_condition_that_its_model_adds_at_that_moment(db, drive, helpers):
    tenant = contextvars.ContextVar("tenant", default=None)

    class Tenanted(Model):
        @classmethod
        def select(cls, *fields):
            query = super().select(*fields)
            return query.where(cls.tenant == tenant.get()) if tenant.get() else query

        class Meta:
            database = db

    class Account(Tenanted):
        tenant = CharField()

        class Meta:
            table_name = "test_accounts"

    db.drop_tables([Account])
    db.create_tables([Account])
    workflows = {name: Quick.create(hero=Account.create(tenant=name)) for name in ("red", "blue")}
    for asking, name in itertools.product((None, "red", "blue"), workflows):
        token = tenant.set(asking)
        assert (reload(workflows[name]).hero is None) == (asking not in (None, name)), (asking, name)
        tenant.reset(token)
    for workflow in workflows.values():
        helpers.speedrun_workflow(workflow)
        assert workflow.state == "finished"
    db.drop_tables([Account])


def test_a_hero_is_read_from_where_its_model_is_at_that_moment(db, drive, tmp_path):
    class Moved(Model):
        name = CharField(default="")

        class Meta:
            database = db
            table_name = "test_moved"

    other = SqliteDatabase(tmp_path / "other.db")
    table_names = ("test_moved", "test_moved_on")
    for table_name in table_names:
        Moved._meta.set_table_name(table_name)
        db.drop_tables([Moved])
        db.create_tables([Moved])
        Moved.insert(id=1, name=table_name).execute()
    workflow = Plain.create(hero=Moved(id=1))
    for table_name in table_names:
        Moved._meta.set_table_name(table_name)
        assert reload(workflow).hero.name == table_name
    with other, Moved.bind_ctx(other):
        other.create_tables([Moved])
        Moved.insert(id=1, name="other").execute()
        assert reload(workflow).hero.name == "other"
    assert reload(workflow).hero.name == table_name
    db.execute_sql(f"alter table {table_name} add column size integer")
    Moved._meta.add_field("size", IntegerField(null=True))
    Moved.update(size=7).execute()
    assert reload(workflow).hero.size == 7
    Moved.bind(None)
    with pytest.raises(peewee.InterfaceError, match="must be bound"):
        reload(workflow).hero  # noqa: B018
    for table_name in table_names:
        db.execute_sql(f"drop table {table_name}")
    gd._hero_models.pop("Moved")


def test_a_key_that_is_lost_as_text_is_refused(drive):
    class Paint(Model):
        color = ColorField(primary_key=True)

    with pytest.raises(TypeError, match="Paint cannot be a hero: its key is lost as text"):
        Plain.create(hero=Paint(color=Color.RED))
    nothing_written(drive)


def test_a_hero_may_be_called_like_a_model_of_hueys(drive, monkeypatch):
    namespace = {"__name__": "chores", "Model": Model}
    exec("class Task(Model): pass", namespace)
    monkeypatch.setattr(gd, "_hero_models", {})
    huey = SqlHuey(database=drive.database, create_tables=False)
    assert huey.storage.Task.__name__ == "Task"
    assert gd._hero_model("Task") is namespace["Task"]


class Keyless(Model):
    name = CharField()

    class Meta:
        primary_key = False


class TwoKeys(Model):
    a = IntegerField()
    b = IntegerField()

    class Meta:
        primary_key = CompositeKey("a", "b")


class Stepless(Workflow):
    pass


class Premium(Workflow):
    step_options = {"queue": "premium"}

    @step
    def one(self):
        pass


BAD_CREATES = [
    (lambda: Plain.create(hero=User()), ValueError, r"this User has no id yet: save it"),
    (lambda: Plain.create(hero="ada"), TypeError, r"saved instance of a Peewee model, not 'ada'"),
    (lambda: Plain.create(hero=User), TypeError, r"saved instance of a Peewee model"),
    (lambda: Plain.create(), TypeError, r"saved instance of a Peewee model, not None"),
    (lambda: Plain.create(hero=TwoKeys(a=1, b=2)), TypeError, r"TwoKeys cannot be a hero.*one column"),
    (lambda: Plain.create(hero=Keyless(name="x")), TypeError, r"Keyless cannot be a hero"),
    (lambda: Plain.create(hero=Country(code="x" * 256)), ValueError, r"Country has 256 characters, over 255"),
    (lambda: Plain.create(hero=Country(code="a\0b")), ValueError, r"Country holds a NUL"),
    (lambda: Plain.create(hero=Country(code="\ud800")), ValueError, r"Country holds .*lone surrogate"),
    (lambda: Plain.create(hero=User(id=1), context=[1]), TypeError, r"context must be a dict"),
    (lambda: Plain.create(hero=User(id=1), context={1: 2}), TypeError, r"context must be a dict with text keys"),
    (lambda: Plain.create(hero=User(id=1), context={"a": {1, 2}}), TypeError, r'context\["a"\] is not JSON.*set'),
    (lambda: Plain.create(hero=User(id=1), context={"a": float("nan")}), ValueError, r'context\["a"\] is not JSON'),
    (lambda: Plain.create(hero=User(id=1), context={"a": "x" * 140_000}), ValueError, r"context takes 1400\d\d bytes"),
    (lambda: Plain.create(hero=User(id=1), allow_multiple="no"), TypeError, r"Plain.create.*allow_multiple.*'no'"),
    (lambda: Plain.create(hero=User(id=1), options=3), gd.StepConfigurationError, r"Plain.create.*options: must be"),
    (lambda: Plain.create(hero=User(id=1), options={"que": 1}), gd.StepConfigurationError, r"'que': use queue, p"),
    (lambda: Plain.create(hero=User(id=1), options={"priority": "1"}), gd.StepConfigurationError, r"priority .*'1'"),
    (lambda: Plain.create(hero=User(id=1), options={"queue": "vip"}), gd.UnknownQueueError, r"'vip'.*one of default"),
    (lambda: Premium.create(hero=User(id=1)), gd.UnknownQueueError, r"Premium.one .*'premium'.*one of default"),
    (lambda: Stepless.create(hero=User(id=1)), gd.StepConfigurationError, r"Stepless.*no steps.*@step"),
    (lambda: Workflow.create(hero=User(id=1)), gd.StepConfigurationError, r"no steps"),
    (lambda: Plain.create_many([User(id=1), User()]), ValueError, r"this User has no id yet"),
    (lambda: Plain.get_or_create(hero=User()), ValueError, r"this User has no id yet"),
]


@pytest.mark.parametrize("number", range(len(BAD_CREATES)))
def test_bad_input_is_named_and_nothing_is_written(drive, number):
    call, error, text = BAD_CREATES[number]
    with pytest.raises(error, match=text):
        call()
    nothing_written(drive)


def test_an_ambiguous_hero_name_lists_the_models(drive):
    namespace = {"__name__": "billing", "Model": Model}
    exec("class Invoice(Model): pass", namespace)
    other = {"__name__": "shipping", "Model": Model}
    exec("class Invoice(Model): pass", other)
    with pytest.raises(gd.ConfigurationError, match=r"'Invoice' is ambiguous: billing.Invoice, shipping.Invoice"):
        Plain.create(hero=namespace["Invoice"](id=1))
    nothing_written(drive)
    exec("class Invoice(Model):\n class Meta:\n  hero_type = 'shipped'", other)
    del namespace, other


def test_a_hero_type_is_not_inherited(drive):
    class Animal(Model):
        class Meta:
            hero_type = "animal"

    class Dog(Animal):
        pass

    assert Plain.create(hero=Animal(id=1)).hero_type == "animal"
    assert Plain.create(hero=Dog(id=1)).hero_type == "Dog"


def test_a_stale_instance_cannot_turn_back_the_state(drive, hero):
    workflow = Plain.create(hero=hero)
    stale = reload(workflow)
    workflow.cancel()
    stale.context["note"] = "late"
    stale.save()
    assert (reload(workflow).state, reload(workflow).context) == ("canceled", {"note": "late"})
    stale.state = "ready"
    with pytest.raises(TypeError, match=r"save\(\) keeps the context only, not state"):
        stale.save()
    assert reload(workflow).state == "canceled"


# ==== What a step does, and what is recorded of it ====================================================================


OUTCOMES = {
    "return": ({}, lambda self: None, "completed", "success", "ready", "second"),
    "reattempt": ({}, lambda self: self.reattempt(wait=5), "completed", "reattempted", "ready", "first"),
    "skip": ({}, lambda self: self.skip(), "skipped", "skipped", "ready", "second"),
    "skip_if": ({"skip_if": True}, lambda self: did("body"), "skipped", "skipped", "ready", "second"),
    "cancel": ({}, lambda self: self.cancel(), "canceled", "canceled", "canceled", None),
    "pause": ({}, lambda self: self.pause(), "canceled", "canceled", "paused", "first"),
    "finish": ({}, lambda self: self.finish(), "completed", "success", "finished", None),
    "error": ({}, lambda self: 1 / 0, "failed", "failed", "paused", "first"),
    "error, pause": ({"on_exception": "pause"}, lambda self: 1 / 0, "failed", "failed", "paused", "first"),
    "error, skip": ({"on_exception": "skip"}, lambda self: 1 / 0, "skipped", "skipped", "ready", "second"),
    "error, cancel": ({"on_exception": "cancel"}, lambda self: 1 / 0, "failed", "canceled", "canceled", None),
    "error, reattempt": ({"on_exception": "reattempt"}, lambda self: 1 / 0, "failed", "reattempted", "ready", "first"),
    "exhausted": (
        {"on_exception": "reattempt", "max_reattempts": 0},
        *(lambda self: 1 / 0, "failed", "failed", "paused", "first"),
    ),
    "exhausted, skip": (
        {"on_exception": "reattempt", "max_reattempts": 0, "terminal_action": "skip"},
        *(lambda self: 1 / 0, "skipped", "skipped", "ready", "second"),
    ),
    "exhausted, cancel": (
        {"on_exception": "reattempt", "max_reattempts": 0, "terminal_action": "cancel"},
        *(lambda self: 1 / 0, "failed", "canceled", "canceled", None),
    ),
    "handler, reattempt": (
        {"on_exception": lambda self, error: self.reattempt(wait=7)},
        *(lambda self: 1 / 0, "failed", "reattempted", "ready", "first"),
    ),
    "handler, skip": (
        {"on_exception": lambda self, error: self.skip()},
        *(lambda self: 1 / 0, "skipped", "skipped", "ready", "second"),
    ),
    "handler, cancel": (
        {"on_exception": lambda self, error: self.cancel()},
        *(lambda self: 1 / 0, "failed", "canceled", "canceled", None),
    ),
    "handler, finish": (
        {"on_exception": lambda self, error: self.finish()},
        *(lambda self: 1 / 0, "failed", "failed", "finished", None),
    ),
    "handler without a call": (
        {"on_exception": lambda self, error: None},
        *(lambda self: 1 / 0, "failed", "failed", "paused", "first"),
    ),
    "handler that fails": (
        {"on_exception": lambda self, error: [].pop()},
        *(lambda self: 1 / 0, "failed", "failed", "paused", "first"),
    ),
    "context that is not JSON": (
        {},
        *(lambda self: self.context.update(it=self), "failed", "failed", "paused", "first"),
    ),
    "SystemExit": (
        {"on_exception": "skip"},
        *(lambda self: sys.exit(3), "skipped", "skipped", "ready", "second"),
    ),
    "error that is a BaseException": (
        {"on_exception": "skip"},
        *(lambda self: (_ for _ in ()).throw(PanicError), "skipped", "skipped", "ready", "second"),
    ),
    "error of a generator that nothing would run": (
        {},
        *(lambda self: (each for each in "ab"), "failed", "failed", "paused", "first"),
    ),
    "asynchronous": ({}, lambda self: asyncio.sleep(0), "completed", "success", "ready", "second"),
}


@pytest.mark.parametrize("transactional", [False, True])
@pytest.mark.parametrize("name", OUTCOMES)
def test_each_outcome_is_recorded(drive, clock, hero, name, transactional):
    options, body, state, outcome, workflow_state, stands_at = OUTCOMES[name]

    class Outcome(Workflow):
        @step(transactional=transactional, **options)
        def first(self):
            return body(self)

        @step(wait=60)
        def second(self):
            pass

    workflow = Outcome.create(hero=hero)
    clock.forward(seconds=1)
    try:
        assert scheduled(workflow).execute() is True
        raised = None
    except BaseException as error:
        raised = error
    row, execution = reload(workflow), workflow.execution_history.get()
    assert (execution.state, execution.outcome) == (state, outcome)
    assert (row.state, row.current_step_name) == (workflow_state, stands_at)
    assert (execution.started_at, execution.finished_at) == (clock.now, clock.now)
    assert (row.transitioned_at is None) == (workflow_state == "ready")
    is_error = execution.error_class_name is not None
    assert is_error == any(word in name for word in ("error", "exhausted", "handler", "not JSON", "SystemExit"))
    if is_error:
        assert execution.error_message is not None
        assert "Traceback" in execution.error_backtrace
    assert (raised is not None) == ((is_error and workflow_state in ("paused", "canceled")) or name == "SystemExit")
    active = [each for each in workflow.execution_history if each.state in gd.ACTIVE]
    if workflow_state == "ready":
        (following,) = active
        assert (following.step_name, following.number, following.reattempts) == (
            stands_at,
            2,
            int(outcome == "reattempted" and is_error),
        )
        assert messages(drive)[-1] == following.id
    else:
        assert active == []
    assert effects() == []


def test_transactional_steps_commit_their_writes_with_the_outcome_and_errors_roll_them_back(drive, hero, helpers):
    class Transfer(Workflow):
        @step(transactional=True, on_exception="reattempt")
        def book(self):
            did("booked")
            if Workflow.get_by_id(self.id).execution_history.count() == 1:
                raise ConnectionError

        @step(transactional=True)
        def stop(self):
            did("stopped")
            self.pause()

    workflow = Transfer.create(hero=hero)
    helpers.perform_next_step(workflow)
    assert effects() == []
    helpers.speedrun_workflow(workflow)
    assert effects() == ["booked", "stopped"]
    assert [outcome for _, _, outcome in history(workflow)] == ["reattempted", "success", "canceled"]


def test_a_transactional_step_that_lost_its_claim_leaves_no_writes(drive, clock, hero):
    class Transfer(Workflow):
        @step(transactional=True)
        def book(self):
            did("booked")
            clock.forward(minutes=10)
            # On SQLite no other connection could do this while the transaction is open.
            housekeeping_elsewhere(drive)

    workflow = Transfer.create(hero=hero)
    scheduled(workflow).execute()
    assert effects() == []
    assert history(workflow) == [("book", "in_progress", None)]


def test_an_error_keeps_its_class_message_and_traceback_whatever_is_in_them(drive, hero, helpers):
    class Odd(Workflow):
        @step(on_exception="skip")
        def one(self):
            raise ValueError("NUL \0, surrogate \ud800, smile \U0001f600")

        @step(on_exception="skip")
        def two(self):
            raise ValueError("x" * 1_000_000)

        @step(on_exception="skip")
        def three(self):
            class Unprintable(Exception):
                def __str__(self):
                    raise RuntimeError("no")

            raise Unprintable

    workflow = Odd.create(hero=hero)
    helpers.speedrun_workflow(workflow)
    one, two, three = workflow.execution_history
    assert one.error_class_name == "ValueError"
    assert one.error_message == "NUL \\x00, surrogate \\ud800, smile \U0001f600"
    assert "in one" in one.error_backtrace
    assert two.error_message == "x" * gd.MAX_ERROR_CHARS
    assert three.error_class_name.endswith("Unprintable")
    assert "cannot be shown" in three.error_message


def test_what_is_claimed_is_read_as_it_was_written_whatever_is_in_it(drive):
    class Odd(Workflow):
        step_options = {"priority": 7}

        @step(name="Größe \\ ' \" 😀")
        def one(self):
            pass

    planes = [range(0x20, 0x500), range(0x2000, 0x2070), range(0xFF00, 0x10000), range(0x1F600, 0x1F650)]
    text = "".join(chr(code) for plane in planes for code in plane)
    context = {"text": text, "controls": "".join(map(chr, range(0x20))), "deep": [None, True, 1.5, -(10**30), {}]}
    context["long"] = "ä" * 15_000
    Odd.create(hero=Country.create(code=f" Ä\\'\"😀{text[200:300]} "), context=context)
    written = StepExecution.select().get()
    claimed = drive._access.dialect.take(drive, "default", (7,))
    assert claimed.__data__ == {**written.__data__, **gd._claim_columns(claimed.started_at)}
    assert claimed.workflow.__data__ == {**written.workflow.__data__, "state": "performing"}
    assert claimed.workflow.context == context
    assert claimed.workflow.hero == Country.get()


@pytest.mark.parametrize(("charset", "name"), [("utf8", "W𠮷 😀"), ("latin1", "Wë"), ("utf8mb4", "W𠮷 😀")])
def test_types_and_heroes_keep_their_names_whatever_character_set_the_connection_has(servers, charset, name):
    db = connect(servers.empty("mysql"), charset=charset)
    with driven(db) as drive:

        class Odd(Workflow):
            workflow_type = name

            @step
            def one(self):
                did(self.hero.code == name[1:])

        class Far(Model):
            code = CharField(primary_key=True)

            class Meta:
                database = SqliteDatabase(":memory:")

        Far.create_table()
        far = Far.create(code=name[1:])
        workflow = Odd.create(hero=far)
        with pytest.raises(gd.AlreadyOngoingError):
            Odd.create(hero=far)
        work_off(drive)
        assert (reload(workflow).state, effects()) == ("finished", ["True"])
        stored = db.execute_sql("select hex(type), hex(hero_id) from geneva_drive_workflows").fetchall()
        assert stored == ((name.encode().hex().upper(), name[1:].encode().hex().upper()),)
        Far._meta.database.close()


@pytest.mark.parametrize("database", ["mysql"], indirect=True)
def test_what_is_too_long_to_be_read_as_one_text_is_claimed_all_the_same(database, db, drive, hero):
    workflow = Quick.create(hero=hero, context={"long": '"' * 60_000})
    scheduled(workflow)._write(cursor='"' * 60_000)
    ((limit,),) = db.execute_sql("select @@global.max_allowed_packet").fetchall()
    db.execute_sql(f"set global max_allowed_packet = {400 * 1024}")
    try:
        db.close()
        db.connect()
        claimed = drive._access.dialect.take(drive, "default", (0,))
        assert claimed.workflow.context == workflow.context
    finally:
        db.execute_sql(f"set global max_allowed_packet = {limit}")
        db.close()
        db.connect()


class PanicError(BaseException):
    """As extension modules raise it."""


class Smiles(Workflow):
    @step(on_exception="skip")
    def one(self):
        did("one")
        raise type("Größe\U0001f600", (ValueError,), {})("no \U0001f600 " + "x" * gd.MAX_ERROR_CHARS)

    @step(on_exception="skip", transactional=True)
    def two(self):
        did("two")
        raise ValueError("\U0001f600" * gd.MAX_ERROR_CHARS)

    @step
    def three(self):
        self.context["smile"] = "\U0001f600"
        raise ValueError("\U0001f600")


NARROW = {  # what the connection, the database or a column cannot hold a character by
    "mysql: client of three bytes": ("mysql", {"charset": "utf8"}, None),
    "mysql: client of one byte": ("mysql", {"charset": "latin1"}, None),
    "mysql: columns": ("mysql", {}, "alter table geneva_drive_step_executions modify {} text character set latin1"),
    "postgresql: client": ("postgresql", {"encoding": "latin1"}, None),
    "postgresql: client without a character set": ("postgresql", {"encoding": "sql_ascii"}, None),
    "postgresql: database": ("postgresql", {}, "LATIN1"),
}


@pytest.fixture(params=NARROW)
def narrow(request, servers):
    kind, options, change = NARROW[request.param]
    url = servers.empty(kind)
    if change == "LATIN1":
        db = connect(url)
        name, db = db.database, connect(urlsplit(url)._replace(path="/postgres").geturl())
        with db.connection_context():
            db.execute_sql(f"drop database {name}")
            db.execute_sql(f"create database {name} encoding LATIN1 template template0 lc_collate 'C' lc_ctype 'C'")
    db = connect(url, **options)
    with driven(db) as drive:
        for column in gd._error_columns(ValueError()) if change and kind == "mysql" else ():
            db.execute_sql(change.format(column))
        yield drive


@pytest.mark.parametrize("is_inside", [False, True], ids=["by itself", "in a test's own transaction"])
def test_an_error_that_cannot_be_encoded_is_recorded_escaped_and_obeyed(narrow, is_inside):
    with narrow.database.atomic() if is_inside else contextlib.nullcontext():
        workflow = Smiles.create(hero=User.create())
        gd.TestHelpers().speedrun_workflow(workflow, raise_errors=False)
    one, two, three = workflow.execution_history
    assert effects() == ["one"]
    assert [each.state for each in (one, two, three)] == ["skipped", "skipped", "failed"]
    assert one.error_class_name.endswith("Gr\\xf6\\xdfe\\U0001f600")
    assert one.error_message.startswith("no \\U0001f600 xxx")
    assert {len(one.error_message), len(two.error_message)} == {gd.MAX_ERROR_CHARS}
    assert three.error_message == "\\U0001f600"
    assert "in three" in three.error_backtrace


def test_a_reason_that_cannot_be_encoded_is_kept_escaped(narrow):
    if narrow._access.dialect.section == "mysql":
        for table in ("workflows", "step_executions"):
            column = "reason text character set latin1"
            narrow.database.execute_sql(f"alter table geneva_drive_{table} modify {column}")
    for is_inside in (False, True):
        with narrow.database.atomic() if is_inside else contextlib.nullcontext():
            workflow = Plain.create(hero=User.create())
            workflow.pause(reason="no \U0001f600")
            assert reload(workflow).reason == "no \\U0001f600"
            workflow.resume()
            workflow.cancel(reason="no \U0001f600")
            assert workflow.execution_history[0].reason == "no \\U0001f600"


def test_an_error_whose_own_code_fails_is_recorded(drive, hero, helpers):
    class Worst(Exception):
        def __str__(self):
            raise PanicError

        __repr__ = __str__

    class Fails(Workflow):
        @step
        def one(self):
            Worst.__qualname__ = "a name with \0 and \udc80"
            raise Worst

        @step
        def two(self):
            error = SyntaxError("x")
            error.lineno, error.filename, error.text = "no number", 5, object()
            raise error

    workflow = Fails.create(hero=hero)
    helpers.perform_next_step(workflow, raise_errors=False)
    workflow.skip()
    helpers.perform_next_step(workflow, raise_errors=False)
    one, _skipped, two = workflow.execution_history
    assert one.error_class_name.endswith("a name with \\x00 and \\udc80")
    assert one.error_message == "(its message cannot be shown: PanicError)"
    assert two.state == "failed"


@dataclasses.dataclass(frozen=True)
class Declined(Exception):
    code: str


class Unspeakable:
    def __str__(self):
        raise RuntimeError("no")

    __repr__ = __str__


# The first argument of a driver's error is its number; that of another one may be anything.
ODD_ERRORS = {
    "frozen": lambda: Declined("lost card"),
    "a dict": lambda: ValueError({"amount": ["too low"]}),
    "no text": lambda: ValueError(Unspeakable()),
    "a huge number": lambda: ValueError(10**5000),
    "a number of the server's for a deadlock": lambda: ValueError(1213),
    "what SQLite says of a lock": lambda: ValueError("database is locked"),
}


def test_what_an_error_of_a_transactional_step_holds_keeps_no_policy_from_deciding_on_it(drive, hero, helpers):
    performed = []

    class Charges(Workflow):
        @step(transactional=True, on_exception=ExceptionPolicy("cancel", matching=(Declined, ValueError)))
        def charge(self):
            performed.append(self.context["error"])
            raise ODD_ERRORS[self.context["error"]]()

    for error in ODD_ERRORS:
        workflow = Charges.create(hero=hero, context={"error": error})
        helpers.perform_next_step(workflow, raise_errors=False)
        assert (error, workflow.state, history(workflow)) == (error, "canceled", [("charge", "failed", "canceled")])
    assert performed == list(ODD_ERRORS)


LEAVES_OPEN = {
    "session": lambda db: db.session_start(),
    "atomic": lambda db: db.atomic().__enter__(),
    "raw": lambda db: db.begin(),
}


@pytest.mark.parametrize("way", LEAVES_OPEN)
def test_a_transaction_left_open_is_rolled_back_and_an_error(db, drive, hero, way):
    class Sloppy(Workflow):
        @step
        def one(self):
            LEAVES_OPEN[way](db)
            did("lost")

    workflow = Sloppy.create(hero=hero)
    with pytest.raises(gd.TransactionLeftOpenError, match="one left a transaction open"):
        scheduled(workflow).execute()
    assert (reload(workflow).state, effects()) == ("paused", [])
    assert not db.in_transaction()


@pytest.mark.parametrize("caller", [False, True])
def test_a_savepoint_left_open_is_rolled_back_and_an_error(db, drive, hero, caller):
    class Sloppy(Workflow):
        @step(transactional=not caller)
        def one(self):
            did("one")
            db.atomic().__enter__()
            did("lost")

    with db.atomic() if caller else contextlib.nullcontext():
        workflow = Sloppy.create(hero=hero)
        with pytest.raises(gd.TransactionLeftOpenError, match="one left a transaction open"):
            scheduled(workflow).execute()
    assert (reload(workflow).state, effects()) == ("paused", ["one"] * caller)
    assert not db.in_transaction()


CALLS = ("cancel", "pause", "skip", "finish", "reattempt")


@pytest.mark.parametrize("within", ["the body", "a transactional step", "the caller's transaction"])
@pytest.mark.parametrize("call", CALLS)
def test_flow_control_within_a_transaction_of_the_bodys_is_refused_in_words(db, drive, hero, helpers, call, within):
    class Withdraws(Workflow):
        @step(transactional=within == "a transactional step")
        def one(self):
            with db.atomic():
                did("lost")
                getattr(self, call)()

    with db.atomic() if within == "the caller's transaction" else contextlib.nullcontext():
        workflow = Withdraws.create(hero=hero)
        fix = rf"one called {call}\(\) within a transaction.* call {call}\(\) behind the block"
        with pytest.raises(gd.FlowControlInTransactionError, match=fix):
            scheduled(workflow).execute()
    assert (history(workflow), effects()) == ([("one", "failed", "failed")], [])
    assert reload(workflow).state == "paused"


@pytest.mark.parametrize("transactional", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_flow_control_behind_a_transaction_of_the_bodys_keeps_its_writes(db, drive, hero, call, transactional):
    class Withdraws(Workflow):
        @step(transactional=transactional)
        def one(self):
            if self.execution_history.count() == 1:
                with contextlib.suppress(OddError), db.atomic():  # one that was rolled back does not count any more
                    raise OddError
                with db.atomic(), db.atomic():
                    did("kept")
                getattr(self, call)()

    workflow = Withdraws.create(hero=hero)
    scheduled(workflow).execute()
    assert (len(effects()), workflow.execution_history.get().error_class_name) == (1, None)


def test_flow_control_within_a_transaction_of_a_hook_is_refused(db, drive, hero, helpers):
    class Hooked(Workflow):
        def around_step_execution(self, execution):
            return db.atomic()

        @step
        def one(self):
            did("lost")
            self.skip()

    workflow = Hooked.create(hero=hero)
    with pytest.raises(gd.FlowControlInTransactionError):
        helpers.perform_next_step(workflow)
    assert (reload(workflow).state, effects()) == ("paused", [])


def test_flow_control_within_a_transaction_of_a_condition_or_a_handler_is_refused(db, drive, hero, helpers, caplog):
    class Conditional(Workflow):
        @cancel_if
        def odd(self):
            with db.atomic():
                did("lost")
                self.skip()

        @step
        def one(self):
            did("one")

    class Handled(Workflow):
        @on_exception
        def handle(self, error):
            with db.atomic():
                did("lost")
                self.skip()

        @step(transactional=True)
        def one(self):
            raise OddError

    workflows = [cls.create(hero=hero) for cls in (Conditional, Handled)]
    for workflow in workflows:
        helpers.perform_next_step(workflow, raise_errors=False)
        assert (reload(workflow).state, effects()) == ("paused", [])
    assert "handler handle failed" in caplog.text
    assert "behind the block" in caplog.text


def test_flow_control_within_a_transaction_of_a_heros_own_database_is_refused(servers, drive, helpers):
    elsewhere = open_database(servers.empty(drive._access.dialect.section))

    class Visitor(Model):
        class Meta:
            database = elsewhere

    elsewhere.create_tables([Visitor])

    class Leaves(Workflow):
        @step
        def one(self):
            with elsewhere.atomic():
                Visitor.create()
                self.skip()

        @step
        def two(self):
            self.cancel()

    workflow = Leaves.create(hero=Visitor.create())
    with pytest.raises(gd.FlowControlInTransactionError):
        helpers.perform_next_step(workflow)
    assert Visitor.select().count() == 1
    workflow.skip()
    with elsewhere.atomic():  # the caller's
        helpers.perform_next_step(workflow)
    assert reload(workflow).state == "canceled"
    elsewhere.close()


def test_a_refused_flow_control_that_is_swallowed_is_the_error_all_the_same(db, drive, hero, helpers):
    class Stubborn(Workflow):
        @step(on_exception="skip")
        def one(self):
            self.keeps_on()

        @step(on_exception="skip")
        def two(self):
            self.keeps_on()
            self.pause()

        def keeps_on(self):
            with contextlib.suppress(Exception), db.atomic():
                did("lost")
                self.cancel()

    workflow = Stubborn.create(hero=hero)
    helpers.speedrun_workflow(workflow)
    assert (workflow.state, effects()) == ("finished", [])
    names = {each.error_class_name for each in workflow.execution_history}
    assert names == {"geneva_drive.FlowControlInTransactionError"}


@pytest.mark.parametrize("where", ["cancel_if", "skip_if", "before", "around", "the hook", "body", "handler"])
def test_flow_control_that_a_bare_except_swallows_is_obeyed_at_once(drive, hero, helpers, caplog, where):
    class Swallows(Workflow):
        @cancel_if
        def condition(self):
            self.swallow_in("cancel_if")

        def before_step_execution(self, execution):
            self.swallow_in("before")

        @contextlib.contextmanager
        def around_step_execution(self, execution):
            self.swallow_in("around")
            with contextlib.suppress(BaseException if where == "the hook" else OddError):
                yield
            if where == "handler":
                raise OddError

        @on_exception
        def handle(self, error):
            self.swallow_in("handler")

        @step(skip_if=lambda self: self.swallow_in("skip_if"))
        def one(self):
            did("body")
            self.swallow_in("body")
            if where == "the hook":
                self.finish()

        @step
        def two(self):
            did("two")

        def swallow_in(self, place):
            for call in (self.skip, self.pause, self.finish) if place == where else ():
                with contextlib.suppress(BaseException):
                    call()

    workflow = Swallows.create(hero=hero)
    helpers.speedrun_workflow(workflow, raise_errors=False)
    assert history(workflow) == [("one", *(("failed", "failed") if where == "handler" else ("completed", "success")))]
    assert (workflow.state, len(effects())) == ("finished", where in ("the hook", "body", "handler"))
    (warning,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "'finish') was swallowed, and is obeyed all the same" in warning.getMessage()


def test_an_error_that_leaves_a_body_which_swallowed_flow_control_is_the_error(drive, hero, helpers):
    class Swallows(Workflow):
        @step
        def one(self):
            try:
                self.cancel()
            except BaseException:
                raise OddError from None

    workflow = Swallows.create(hero=hero)
    with pytest.raises(OddError):
        helpers.perform_next_step(workflow)
    assert reload(workflow).state == "paused"


class Group(BaseException):
    """As Python 3.11 has it, and packages for older ones."""

    def __init__(self, *exceptions):
        self.exceptions = exceptions


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("others", [0, 1])
def test_flow_control_in_a_group_counts_if_nothing_else_is_in_it(drive, hero, helpers, depth, others):
    class Groups(Workflow):
        @step(on_exception="skip")
        def one(self):
            group = []
            for call in (self.pause, self.cancel):
                try:
                    call()
                except BaseException as control:
                    group.append(control)
            group += [OddError()] * others
            for _ in range(depth):
                group = [Group(*group)]
            raise group[0]

    workflow = Groups.create(hero=hero)
    helpers.perform_next_step(workflow)
    assert reload(workflow).state == ("finished" if others else "canceled")
    assert (workflow.execution_history.get().error_class_name is not None) == others


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup came with Python 3.11")
def test_flow_control_in_a_task_group_is_found(drive, hero, helpers):
    class Groups(Workflow):
        @step
        async def one(self):
            async def decide():
                self.cancel()

            async with asyncio.TaskGroup() as group:
                group.create_task(decide())
                group.create_task(asyncio.sleep(60))

    workflow = Groups.create(hero=hero)
    helpers.perform_next_step(workflow)
    assert history(workflow) == [("one", "canceled", "canceled")]
    assert workflow.execution_history.get().error_class_name is None


def drop_connection(db):
    """End this thread's connection from another one, as an administrator or a restart does."""
    is_postgresql = isinstance(db, peewee.PostgresqlDatabase)
    (number,) = db.execute_sql("select pg_backend_pid()" if is_postgresql else "select connection_id()").fetchone()

    def kill():
        db.execute_sql("select pg_terminate_backend(%s)" if is_postgresql else "kill %s", (number,))
        listing = (
            "select pid from pg_stat_activity" if is_postgresql else "select id from information_schema.processlist"
        )
        until(lambda: (number,) not in db.execute_sql(listing).fetchall())
        db.close()

    killer = threading.Thread(target=kill)
    killer.start()
    killer.join()


@pytest.fixture
def served(drive):
    """SQLite has no connection that could be lost."""
    return drive._access.dialect.section != "sqlite"


@pytest.mark.parametrize("within", ["nothing", "atomic", "transactional"])
def test_a_database_that_goes_away_in_mid_body_costs_an_attempt(db, drive, hero, served, within):
    class Dropped(Workflow):
        @step(transactional=within == "transactional", on_exception="cancel")
        def one(self):
            did("one")
            if served and self.execution_history.count() == 1:
                with db.atomic() if within == "atomic" else contextlib.nullcontext():
                    drop_connection(db)
                    did("lost")

    workflow = Dropped.create(hero=hero)
    message = scheduled(workflow).id
    with pytest.raises((peewee.OperationalError, peewee.InterfaceError)) if served else contextlib.nullcontext():
        drive._perform(message)
    if served:
        assert history(workflow) == [("one", "failed", "recovered"), ("one", "scheduled", None)]
        drive._perform(scheduled(workflow).id)
    assert reload(workflow).state == "finished"
    assert effects() == ["one"] * (2 if served and within != "transactional" else 1)


def test_a_dead_connection_to_a_heros_own_database_is_replaced(servers, db, drive, served):
    if served:
        elsewhere = open_database(servers.empty(drive._access.dialect.section))

        class Guest(Model):
            class Meta:
                database = elsewhere

        elsewhere.create_tables([Guest])

        class Visits(Workflow):
            @step(on_exception=ExceptionPolicy("reattempt", wait=0))
            def one(self):
                if self.execution_history.count() == 1:
                    drop_connection(elsewhere)
                    assert self.hero == Guest.get_by_id(self.hero.id)

        workflow = Visits.create(hero=Guest.create())
        drive._perform(scheduled(workflow).id)  # and the reattempt, in a run-on
        assert [outcome for _, _, outcome in history(workflow)] == ["reattempted", "success"]
        elsewhere.close()


def test_a_connection_that_died_while_idle_is_replaced(db, drive, hero, served):
    workflow = Plain.create(hero=hero)
    message = scheduled(workflow).id
    for call in (lambda: drive._perform(message), workflow.pause, workflow.resume, drive.housekeeping):
        if served:
            drop_connection(db)
        call()
    assert (reload(workflow).state, effects()) == ("ready", ["one"])


#: What happens to statements that a connection has prepared, and how it is undone.
JOB_ID = "alter table geneva_drive_step_executions alter column job_id type"
MISHAPS = {"deallocate all": "", "discard all": "", f"{JOB_ID} text": f"{JOB_ID} varchar(255)"}


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
@pytest.mark.parametrize("mishap", [*MISHAPS, "prepared by others"])
def test_what_happens_to_prepared_statements_keeps_no_step_from_being_performed(database, db, drive, mishap):
    prepared = drive._access.dialect.prepared

    def perform():
        workflow = Quick.create(hero=User.create())
        while task := drive.huey.dequeue():
            drive.huey.execute(task)
        assert reload(workflow).state == "finished"

    db.close()
    perform()
    assert prepared[db.connection()]
    if mishap in MISHAPS:
        db.execute_sql(mishap)
    else:
        prepared[db.connection()].clear()
    try:
        perform()
    finally:
        if MISHAPS.get(mishap):
            db.execute_sql(MISHAPS[mishap])
            db.close()


@pytest.mark.parametrize("has_hero", [True, False])
def test_a_workflow_is_created_once_though_the_answer_is_lost(db, drive, served, monkeypatch, has_hero):
    execute, lost = db.execute_sql, []

    def execute_and_lose_the_connection(sql, *rest):
        cursor = execute(sql, *rest)
        if served and not lost and sql.lower().startswith(("execute", "with", "insert into")):
            lost.append(sql)
            drop_connection(db)
            execute("select 1")
        return cursor

    class Visits(Workflow):
        may_proceed_without_hero = True

        @step
        def one(self):
            did("one")

    hero = User.create() if has_hero else None
    Visits.create(hero=hero, allow_multiple=True).cancel()  # on PostgreSQL, prepares the statement
    with monkeypatch.context() as patch:
        patch.setattr(db, "execute_sql", execute_and_lose_the_connection)
        workflow = Visits.create(hero=hero, allow_multiple=True)
    assert len(lost) == served
    assert [(each.id, each.token) for each in Visits.ongoing()] == [(workflow.id, workflow.token)]
    drive.run(until=drive.is_idle)
    assert (reload(workflow).state, effects()) == ("finished", ["one"])


def test_a_connection_context_is_left_as_ever_though_the_connection_in_it_was_replaced(db, drive, hero, served):
    db.close()
    with db.connection_context():
        with db.connection_context():
            if served:
                drop_connection(db)
            workflow = Plain.create(hero=hero)
        assert not db.is_closed()
        if served:
            drop_connection(db)
        workflow.pause()
    assert db.is_closed()
    assert reload(workflow).state == "paused"


def test_system_exit_is_an_error_of_the_step_and_then_raised_on(drive, hero):
    class Exits(Workflow):
        @step(on_exception="skip")
        def one(self):
            sys.exit("goodbye")

    workflow = Exits.create(hero=hero)
    with pytest.raises(SystemExit):
        scheduled(workflow).execute()
    assert reload(workflow).state == "finished"
    assert workflow.execution_history.get().error_class_name == "SystemExit"


class GreenletExit(BaseException):
    """As greenlet has it, which is not installed here."""


class Killed(GreenletExit):
    pass


def test_a_base_exception_of_a_librarys_is_an_error_and_leaves_the_workers_alive(drive, hero):
    class Panics(Workflow):
        exception_policies = [ExceptionPolicy("cancel", matching=PanicError)]

        @step
        def one(self):
            did(threading.current_thread().name)
            if self.hero.id != hero.id:
                raise PanicError("unwrap")

    workflows = [Panics.create(hero=User.create()), Panics.create(hero=hero)]
    drive.run(until=drive.is_idle)
    assert [reload(each).state for each in workflows] == ["canceled", "finished"]
    execution = workflows[0].execution_history.get()
    assert (execution.state, execution.outcome) == ("failed", "canceled")
    assert execution.error_class_name.endswith("PanicError")
    first, second = effects()
    assert first == second


def test_a_base_exception_leaves_the_task_as_the_cause_of_an_error_and_execute_as_it_is(drive, hero, helpers):
    class Panics(Workflow):
        @step
        def one(self):
            raise PanicError("unwrap")

    workflow = Panics.create(hero=hero)
    with pytest.raises(gd.GenevaDriveError, match=r"Panics\.one failed with PanicError") as caught:
        drive._perform(scheduled(workflow).id)
    assert isinstance(caught.value.__cause__, PanicError)
    for raise_errors in (True, False):
        reload(workflow).resume()
        with pytest.raises(PanicError) if raise_errors else contextlib.nullcontext():
            helpers.perform_next_step(reload(workflow), raise_errors=raise_errors)
        assert history(workflow)[-1] == ("one", "failed", "failed")


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
def test_what_ends_the_process_or_its_greenlet_is_no_error_of_the_step(drive, hero, error):
    class Ends(Workflow):
        @step
        def one(self):
            if self.execution_history.count() == 1:
                raise error

    workflow = Ends.create(hero=hero)
    with pytest.raises(error):
        drive._perform(scheduled(workflow).id)
    assert history(workflow) == [("one", "failed", "recovered"), ("one", "scheduled", None)]


@pytest.mark.parametrize("error", [PanicError, asyncio.CancelledError, SystemExit])
def test_whatever_conditions_handlers_hooks_and_receivers_raise_the_attempt_is_recorded(drive, hero, helpers, error):
    def fails(*arguments, **kwargs):
        raise error

    class Fails(Workflow):
        @on_exception
        def handle(self, failure):
            fails()

        def after_step_execution(self, execution):
            if error is not SystemExit:
                fails()

        @step(skip_if=fails)
        def one(self):
            pass

    events = (gd.step_started, gd.step_finished, gd.workflow_transitioned)
    for event in events:
        event.connect(fails)
    try:
        workflow = Fails.create(hero=hero)
        with pytest.raises(error):
            helpers.perform_next_step(workflow)
    finally:
        for event in events:
            event.disconnect(fails)
    assert history(workflow) == [("one", "failed", "failed")]
    assert reload(workflow).state == "paused"


def test_an_error_that_takes_no_note_is_raised_as_it_is(drive, hero):
    @dataclasses.dataclass(frozen=True)
    class FrozenError(Exception):
        code: int

    class Fails(Workflow):
        @step
        def one(self):
            raise FrozenError(7)

    workflow = Fails.create(hero=hero)
    with pytest.raises(FrozenError):
        scheduled(workflow).execute()
    assert reload(workflow).state == "paused"


class Later:
    """An awaitable of nobody's."""

    def __init__(self, coroutine):
        self.coroutine = coroutine

    def __await__(self):
        return self.coroutine.__await__()


def behind_a_decorator(wrap=lambda result: result):
    return lambda function: lambda *arguments: wrap(function(*arguments))


@pytest.mark.parametrize("wrap", [lambda result: result, Later, lambda result: Later(Later(result))])
def test_whatever_can_be_awaited_is_run_wherever_it_is_returned(drive, hero, helpers, wrap):
    class Waits(Workflow):
        @cancel_if
        @behind_a_decorator(wrap)
        async def odd(self):
            return False

        @behind_a_decorator(wrap)
        async def before_step_execution(self, execution):
            did("before")

        @behind_a_decorator(wrap)
        async def after_step_execution(self, execution):
            did("after")

        @on_exception(OddError)
        @behind_a_decorator(wrap)
        async def handle(self, error):
            self.skip()

        @step(skip_if=behind_a_decorator(wrap)(lambda self: asyncio.sleep(0, False)))
        @behind_a_decorator(wrap)
        async def one(self):
            did("one")
            raise OddError

    workflow = Waits.create(hero=hero)
    helpers.perform_next_step(workflow)
    assert history(workflow) == [("one", "skipped", "skipped")]
    assert effects() == ["before", "one", "after"]


async def yields_asynchronously():
    did("lost")
    yield 1


def yields():
    did("lost")
    yield 1


@pytest.mark.parametrize("generator", [yields, yields_asynchronously])
@pytest.mark.parametrize("place", ["cancel_if", "skip_if", "before", "around", "body"])
def test_a_generator_that_nothing_would_run_is_an_error_wherever_it_is_returned(drive, hero, place, generator):
    def returned_in(here):
        return generator() if here == place else None

    class Yields(Workflow):
        @cancel_if
        def odd(self):
            return returned_in("cancel_if")

        def before_step_execution(self, execution):
            return returned_in("before")

        def around_step_execution(self, execution):
            return returned_in("around") or contextlib.nullcontext()

        @step(skip_if=lambda self: returned_in("skip_if"))
        def one(self):
            return returned_in("body")

    workflow = Yields.create(hero=hero)
    with pytest.raises(
        gd.StepConfigurationError, match=r"Yields\.one: .*returned a generator, which nothing would run"
    ):
        scheduled(workflow).execute()
    assert (reload(workflow).state, effects()) == ("paused", [])


def in_a_loop(work):
    """Call something where an event loop runs, as an asynchronous test or a notebook does."""

    async def run():
        return work()

    return asyncio.run(run())


class Async(Workflow):
    @step
    async def one(self):
        await asyncio.sleep(0)
        did(f"one {threading.current_thread() is threading.main_thread()} {TENANT.get()}")
        self.context["seen"] = True

    @step
    async def two(self):
        self.cancel()

    @step
    def three(self):
        did("three")


TENANT = contextvars.ContextVar("tenant", default="nobody")


@pytest.mark.parametrize("autoconnect", [True, False])
def test_an_asynchronous_step_is_performed_where_a_loop_runs(db, drive, hero, helpers, served, autoconnect):
    workflow = Async.create(hero=hero)
    connections = []

    def perform():
        TENANT.set("acme")
        helpers.perform_next_step(workflow)
        scheduled(workflow).execute()

    class Connects(Workflow):
        @step
        async def one(self):
            connections.append(db.connection())

    db.connect(reuse_if_open=True)
    db.autoconnect = autoconnect
    try:
        in_a_loop(perform)
        in_a_loop(lambda: helpers.perform_next_step(Connects.create(hero=hero)))
    finally:
        db.autoconnect = True
    assert (reload(workflow).state, reload(workflow).context) == ("canceled", {"seen": True})
    assert effects() == ["one False acme"]
    assert gd._is_dead(connections[0]) or not served


def test_errors_and_refusals_come_through_where_a_loop_runs(db, drive, hero, helpers):
    class Fails(Workflow):
        @step
        async def one(self):
            raise PanicError

        @step
        async def two(self):
            with db.atomic():
                did("lost")
                self.finish()

        @step
        async def three(self):
            db.atomic().__enter__()
            did("lost")

        @step(transactional=True)
        async def four(self):
            did("kept")

    workflow = Fails.create(hero=hero)
    refusals = (PanicError, gd.FlowControlInTransactionError, gd.TransactionLeftOpenError, gd.StepConfigurationError)
    for refusal in refusals:
        with pytest.raises(refusal):
            in_a_loop(lambda: helpers.perform_next_step(workflow))
        assert (workflow.state, effects()) == ("paused", [])
        workflow.resume() if workflow.current_step_name == "four" else workflow.skip()
    asyncio.run(asyncio.to_thread(lambda: (helpers.perform_next_step(workflow), db.close())))  # as its error advises
    assert (reload(workflow).state, effects()) == ("finished", ["kept"])


def test_nothing_that_an_attempt_sets_in_its_context_is_seen_by_the_next_one(drive, hero, helpers):
    def sets(place):
        did(f"{place} {TENANT.get()} {getcontext().prec}")
        TENANT.set(place)
        getcontext().prec = 3

    class Sets(Workflow):
        @cancel_if
        def condition(self):
            sets("condition")

        @step(on_exception="skip")
        def one(self):
            sets("body")
            raise OddError

        @step
        async def two(self):
            sets("body")

        def after_step_execution(self, execution):
            sets("hook")

    def transitioned(sender, workflow, old, new):
        if new == "performing":
            TENANT.set("receiver")

    gd.workflow_transitioned.connect(transitioned)
    try:
        getcontext()  # as the thread has it
        for perform in (drive._perform, lambda number: StepExecution.get_by_id(number).execute()):
            workflow = Sets.create(hero=hero)
            perform(scheduled(workflow).id)
            helpers.speedrun_workflow(workflow)
            assert (TENANT.get(), getcontext().prec) == ("nobody", 28)
    finally:
        gd.workflow_transitioned.disconnect(transitioned)
    first, *others = [each for each in effects() if each.startswith("condition")]
    assert first == "condition receiver 28"
    assert set(others) <= {"condition nobody 28", "condition receiver 28"}
    assert [each for each in effects() if each.startswith("body")] == ["body condition 3"] * 4


def test_the_context_is_saved_with_the_outcome(drive, hero, helpers):
    class Remembers(Workflow):
        @step
        def one(self):
            self.context["seen"] = ["é", None, 1.5]
            self.context.setdefault("by", {})["step"] = "one"

        @step(on_exception="reattempt")
        def two(self):
            if self.execution_history.count() == 2:
                assert self.context == {"seen": ["é", None, 1.5], "by": {"step": "one"}}
                self.context["two"] = True
                raise ConnectionError
            assert self.context["two"] is True

        @step
        def three(self):
            self.context = {"replaced": True}
            self.cancel()

    workflow = Remembers.create(hero=hero)
    helpers.speedrun_workflow(workflow)
    assert [outcome for _, _, outcome in history(workflow)] == ["success", "reattempted", "success", "canceled"]
    assert reload(workflow).context == {"replaced": True}


def _charges(self):
    self.context["receipt"] = "r-1"
    self.context.setdefault("lines", []).append(7)
    del self.context["offer"]


#: How a body that has charged may end; and whether the context is kept.
ENDS_OF_CHARGES = {
    "success": (lambda self: None, True),
    "error": (_fails(OSError("no")), True),
    "error that is reattempted": (_fails(KeyError("no")), True),
    "interruption": (_fails(KeyboardInterrupt()), True),
    "cancel": (lambda self: self.cancel(), True),
    "pause from outside": (_meanwhile("pause"), True),
    "cancel from outside": (_meanwhile("cancel"), True),
    "value that is not JSON": (lambda self: self.context.update(at=object()), True),
    "value that is no JSON later": (lambda self: self.context["lines"].append(object()), True),
    "recovery": (_recovered, False),
}


@pytest.mark.parametrize("is_edited", [False, True], ids=["alone", "edited"])
@pytest.mark.parametrize("end", ENDS_OF_CHARGES)
def test_what_a_body_changed_in_the_context_is_kept_however_it_ends_and_takes_nobodys_changes_away(
    drive, clock, hero, end, is_edited
):
    class Charges(Workflow):
        exception_policies = [ExceptionPolicy("reattempt", matching=KeyError)]

        @step
        def charge(self):
            _charges(self)
            if is_edited:
                _note(self, by="ada", lines="theirs", offer=None, channel="WEB")
            ENDS_OF_CHARGES[end][0](self)

    workflow = Charges.create(hero=hero, context={"channel": "web", "offer": 1})
    with contextlib.suppress(OSError, TypeError, KeyboardInterrupt):
        scheduled(workflow).execute()
    kept = {"channel": "web", "offer": 1}
    edits = {"by": "ada", "lines": "theirs", "offer": None, "channel": "WEB"}
    kept |= edits if is_edited else {}
    if ENDS_OF_CHARGES[end][1]:
        kept |= {"receipt": "r-1", "lines": [7]}
        del kept["offer"]
    if end == "value that is no JSON later":  # its key alone is as others left it
        kept |= {"lines": "theirs"}
        if not is_edited:
            del kept["lines"]
    assert reload(workflow).context == kept


@pytest.mark.parametrize("end", ["error", "success", "cancel", "error that a handler tells of"])
def test_the_context_of_a_transactional_step_has_the_fate_of_its_other_writes(drive, hero, end):
    class Books(Workflow):
        @on_exception(ValueError)
        def tell(self, error):
            self.context["told"] = str(error)

        @step(transactional=True)
        def book(self):
            did("booked")
            self.context["booked"] = True
            self.save()
            self.context["more"] = True
            if end == "cancel":
                self.cancel()
            if end != "success":
                raise ValueError("no") if "handler" in end else OSError("no")

    workflow = Books.create(hero=hero)
    with contextlib.suppress(OSError, ValueError):
        scheduled(workflow).execute()
    is_kept = end in ("success", "cancel")
    told = {"told": "no"} if "handler" in end else {}
    assert effects() == ["booked"] * is_kept
    assert reload(workflow).context == ({"booked": True, "more": True} if is_kept else told)


def test_an_edit_that_a_collation_does_not_see_is_kept(drive, hero):
    class Charges(Workflow):
        @step
        def charge(self):
            self.context["receipt"] = "r-1"
            _note(self, by="ADA")

    workflow = Charges.create(hero=hero, context={"by": "Ada"})
    scheduled(workflow).execute()
    assert reload(workflow).context == {"by": "ADA", "receipt": "r-1"}


def test_of_two_who_change_a_key_the_later_commit_wins_and_only_what_was_changed_is_written(drive, hero):
    workflow = Plain.create(hero=hero, context={"mine": 1, "theirs": [1], "gone": 1})
    stale = reload(workflow)
    workflow.context.update(theirs=[2], new={"a": 1})
    del workflow.context["gone"]
    assert workflow.save() == 1
    stale.context["mine"] = 2
    assert stale.save() == 1
    assert stale.context == reload(workflow).context == {"mine": 2, "theirs": [2], "new": {"a": 1}}
    workflow.context["mine"] = 3
    lines = workflow.context.setdefault("new", {})
    workflow.save()
    lines["b"] = 2  # what one holds of it is part of it still
    workflow.save()
    stale.save()  # has changed nothing since
    assert reload(workflow).context == {"mine": 3, "theirs": [2], "new": {"a": 1, "b": 2}}
    workflow.context = {"all": "new"}
    _note(workflow, late=True)
    workflow.save()
    assert reload(workflow).context == {"all": "new", "late": True}


def test_what_was_saved_in_a_transaction_that_is_rolled_back_is_written_by_the_next_save(db, drive, hero):
    workflow = Plain.create(hero=hero)
    workflow.context["note"] = "called"
    with db.atomic() as transaction:
        workflow.save()
        transaction.rollback()
    assert reload(workflow).context == {}
    workflow.save()
    assert reload(workflow).context == {"note": "called"}


def test_a_call_on_an_instance_keeps_what_was_not_saved_yet(drive, hero):
    workflow = Plain.create(hero=hero)
    workflow.context["note"] = "called"
    _note(workflow, by="ada")
    workflow.pause()
    assert workflow.context == {"by": "ada", "note": "called"}
    assert reload(workflow).context == {"by": "ada"}
    workflow.save()
    assert reload(workflow).context == {"by": "ada", "note": "called"}


def test_many_who_save_at_once_lose_nothing(db, drive, hero):
    workflow, failures = Plain.create(hero=hero), []

    def save(name):
        try:
            for number in range(20):
                mine = reload(workflow)
                mine.context[f"{name} {number}"] = number
                mine.save()
        except Exception as error:
            failures.append(error)
        finally:
            db.close()

    threads = [threading.Thread(target=save, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert reload(workflow).context == {f"{name} {number}": number for name in "abcd" for number in range(20)}


#: How something comes into a context, with what an error says of it; and whether it is noticed at once.
NOT_JSON = {
    "item": (lambda it: it.__setitem__("at", {1}), TypeError, r'context\["at"\] is not JSON.*set', True),
    "update": (lambda it: it.update(lines=[0, {"at": b""}]), TypeError, r'context\["lines"\]\[1\]\["at"\] ', True),
    "setdefault": (lambda it: it.setdefault("at", object), TypeError, r'context\["at"\]', True),
    "union": (lambda it: it.__ior__({"at": object}), TypeError, r'context\["at"\]', True),
    "NaN": (lambda it: it.update(a={"b": (1, float("nan"))}), ValueError, r'context\["a"\]\["b"\]\[1\] is not', True),
    "key": (lambda it: it.__setitem__(7, 7), TypeError, r"text keys.*7", True),
    "inner key": (lambda it: it.update(a={"b": {(1, 2): 3}}), TypeError, r'context\["a"\]\["b"\] is not JSON', True),
    "circle": (
        lambda it: it.update(a=(lambda one: (one.append(one), one)[1])([])),
        ValueError,
        r'context\["a"\]',
        True,
    ),
    "later": (lambda it: it["list"].append(object()), TypeError, r'context\["list"\]\[0\] is not JSON', False),
    "length": (lambda it: it.update(long="x" * 140_000), ValueError, r"context takes 1400\d\d bytes", False),
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_no_context_can_hold_is_told_of_by_the_way_to_it_and_the_rest_is_kept(drive, hero, name):
    put, error, problem, is_at_once = NOT_JSON[name]

    class Odd(Workflow):
        @step
        def one(self):
            self.context["receipt"] = "r-1"
            put(self.context)
            did("went on")

    workflow = Odd.create(hero=hero, context={"list": []})
    with pytest.raises(error, match=problem):
        scheduled(workflow).execute()
    assert effects() == [] if is_at_once else ["went on"]
    assert reload(workflow).context == {"list": [], "receipt": "r-1"}
    outside = reload(workflow)
    with pytest.raises(error, match=problem):
        put(outside.context)
        outside.save()
    for other in ([1], "text"):
        with pytest.raises(TypeError, match="the context must be a dict"):
            outside.context = other
        with pytest.raises(TypeError, match="the context must be a dict"):
            Workflow.update(context=other).execute()
    assert reload(workflow).context == {"list": [], "receipt": "r-1"}


def test_a_context_that_grows_too_long_by_others_is_refused_to_who_saves_and_keeps_the_outcome_of_a_step(
    drive, hero, caplog
):
    class Long(Workflow):
        @step
        def one(self):
            self.context["receipt"] = "r-1"
            self.context["long"] = "x" * 70_000
            _note(self, theirs="y" * 70_000)

    workflow = Long.create(hero=hero)
    scheduled(workflow).execute()
    assert (reload(workflow).state, reload(workflow).context) == (
        "finished",
        {"theirs": "y" * 70_000, "receipt": "r-1"},
    )
    assert "not kept: ['long']" in caplog.text
    workflow.context["long"] = "x" * 70_000
    with pytest.raises(ValueError, match="with what others saved meanwhile"):
        workflow.save()


def test_what_moves_from_one_key_of_the_context_to_another_is_kept_however_long(drive, hero):
    class Moves(Workflow):
        @step
        def one(self):
            self.context["to"] = self.context.pop("from")

        @step
        def two(self):
            self.context["from"], self.context["to"] = self.context["to"], ""

    workflow = Moves.create(hero=hero, context={"from": "x" * 90_000, "to": ""})
    scheduled(workflow).execute()
    scheduled(workflow).execute()
    workflow = reload(workflow)
    assert workflow.context == {"from": "x" * 90_000, "to": ""}
    workflow.context.update({"from": "", "to": "x" * 90_000})
    workflow.save()
    assert reload(workflow).context == {"from": "", "to": "x" * 90_000}


def test_what_nests_too_deep_in_the_context_by_the_time_that_the_step_ends_is_told_of_and_the_rest_is_kept(drive, hero):
    class Nests(Workflow):
        @step
        def one(self):
            self.context["receipt"] = "r-1"
            inner = self.context["list"]
            for _ in range(100_000):
                inner.append([])
                inner = inner[0]

    workflow = Nests.create(hero=hero, context={"list": []})
    with pytest.raises(ValueError, match=r"the context.*is not JSON"):
        scheduled(workflow).execute()
    assert reload(workflow).context == {"list": [], "receipt": "r-1"}


def test_what_was_saved_in_a_transaction_is_not_written_again_over_what_others_make_of_it(drive, hero, helpers):
    class Counts(Workflow):
        @step
        def one(self):
            self.context["count"] += 1

    workflow = Counts.create(hero=hero)
    with drive.database.atomic():
        workflow.context["count"] = 1
        workflow.save()
        helpers.perform_next_step(workflow)
        assert workflow.context == {"count": 2}
        workflow.context["note"] = "new"
        workflow.save()
    _note(workflow, count=5)
    workflow.context["note"] = "newer"
    workflow.save()
    assert workflow.context == reload(workflow).context == {"count": 5, "note": "newer"}


def test_the_context_of_a_deleted_workflow_is_saved_nowhere(drive, hero):
    workflow = Plain.create(hero=hero)
    Workflow.delete().execute()
    workflow.context["note"] = 1
    assert workflow.save() == 0
    assert Workflow.select().count() == 0


def test_a_context_may_be_copied_and_pickled(drive, hero):
    context = Plain.create(hero=hero, context={"a": [1]}).context
    for each in (copy.deepcopy(context), pickle.loads(pickle.dumps(context)), copy.copy(context)):
        assert each == context == {"a": [1]}
        assert not each.is_changed()


def test_flow_control_does_not_fall_to_except_exception(drive, hero, helpers):
    class Careful(Workflow):
        @step
        async def one(self):
            try:
                await asyncio.sleep(0)
                self.skip()
            except Exception:
                did("caught")
            did("went on")

        @step
        def two(self):
            did("two")

    workflow = Careful.create(hero=hero)
    helpers.speedrun_workflow(workflow)
    assert (effects(), history(workflow)[0]) == (["two"], ("one", "skipped", "skipped"))


def test_the_order_of_one_attempt(drive, hero, helpers):
    class Ordered(Workflow):
        @cancel_if
        def first_condition(self):
            did("first condition")

        @cancel_if
        def second_condition(self):
            did("second condition")

        def before_step_execution(self, execution):
            did(f"before {execution.state}")

        def after_step_execution(self, execution):
            did(f"after {execution.state}")
            raise RuntimeError("is logged")

        @contextlib.contextmanager
        def around_step_execution(self, execution):
            did("around in")
            yield
            did("around out")

        @step(skip_if=lambda self: did("skip_if"))
        def one(self):
            did("body")

        @step(skip_if="always")
        def two(self):
            did("never")

        def always(self):
            return True

    helpers.speedrun_workflow(Ordered.create(hero=hero))
    assert effects() == [
        *("first condition", "second condition", "skip_if", "before in_progress", "around in", "body", "around out"),
        *("after completed", "first condition", "second condition", "after skipped"),
    ]


def test_errors_in_conditions_and_hooks_count_as_the_steps(drive, hero, helpers):
    class Hooks(Workflow):
        @cancel_if
        def condition(self):
            return 1 // self.context["divisor"]

        def before_step_execution(self, execution):
            if self.context["fail"] == "before":
                raise KeyError("before")

        @contextlib.contextmanager
        def around_step_execution(self, execution):
            if self.context["fail"] == "around":
                raise KeyError("around")
            yield

        @step
        def one(self):
            did("body")

    for fail in ("before", "around"):
        workflow = Hooks.create(hero=User.create(), context={"fail": fail, "divisor": 2})
        with pytest.raises(KeyError, match=fail):
            helpers.speedrun_workflow(workflow)
        assert reload(workflow).state == "paused"
    workflow = Hooks.create(hero=hero, context={"fail": "", "divisor": 0})
    with pytest.raises(ZeroDivisionError):
        helpers.speedrun_workflow(workflow)
    assert effects() == []


def test_each_attempt_of_a_run_on_has_a_fresh_workflow_and_hero(drive, hero):
    instances = []

    class Fresh(Workflow):
        @step
        def one(self):
            instances.append((self, self.hero))
            self.remark = "mine"
            User.update(visits=5).execute()
            self.context["kept"] = True

        @step
        def two(self):
            instances.append((self, self.hero))
            assert not hasattr(self, "remark")
            assert (self.hero.visits, self.context) == (5, {"kept": True})

    workflow = Fresh.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert reload(workflow).state == "finished"
    (one, hero_one), (two, hero_two) = instances
    assert one is not two
    assert hero_one is not hero_two


def test_a_run_on_needs_no_second_message_and_can_be_turned_off(drive, hero):
    workflow = Quick.create(hero=hero)
    _message(drive)
    assert reload(workflow).state == "finished"
    assert len({each.job_id for each in workflow.execution_history}) == 1
    drive.run_on = 0
    workflow = Quick.create(hero=hero)
    _message(drive)
    assert reload(workflow).current_step_name == "two"
    assert messages(drive) == [scheduled(workflow).id]


def test_a_run_on_stops_where_queue_or_priority_change(db, drive, hero):
    drive = GenevaDrive(db, queues=["premium"])

    class Changing(Workflow):
        @step
        def one(self):
            did("one")

        @step(options={"queue": "premium"})
        def two(self):
            did("two")

        @step(options={"queue": "premium", "priority": 5})
        def three(self):
            did("three")

    workflow = Changing.create(hero=hero)
    work_off(drive)
    assert effects() == ["one"]
    drive._perform(scheduled(workflow).id)
    assert effects() == ["one", "two"]
    (task,) = [task for task in drive.queues["premium"].pending() if task.priority == 5]
    assert task.args == (scheduled(workflow).id,)
    work_off(drive, "premium")
    assert reload(workflow).state == "finished"


def test_queue_and_priority_of_step_instance_and_class_win_in_this_order(db, drive, hero):
    drive = GenevaDrive(db, queues=["premium", "bulk"])

    class Base(Workflow):
        step_options = {"queue": "premium", "priority": 1}

        @step
        def one(self):
            pass

        @step(options={"priority": 9})
        def two(self):
            pass

    class Child(Base):
        step_options = {"priority": 2}

    workflow = Child.create(hero=hero, options={"queue": "bulk"})
    assert drive._dispatch.route(workflow, "one") == ("bulk", 2)
    assert drive._dispatch.route(workflow, "two") == ("bulk", 9)
    (task,) = drive.queues["bulk"].pending()
    assert task.priority == 2
    assert messages(drive) == messages(drive, "premium") == []
    assert drive._dispatch.route(Base.create(hero=hero), "one") == ("premium", 1)


def test_a_queue_that_a_deploy_took_away_gives_way_to_the_default_one(db, drive, hero, caplog):
    drive = GenevaDrive(db, queues=["premium"])
    drive.clock = Clock()
    workflow = Premium.create(hero=hero)
    clock, drive = drive.clock, GenevaDrive(db)
    drive.clock = clock
    clock.forward(minutes=5)
    drive.housekeeping()
    work_off(drive)
    assert reload(workflow).state == "finished"
    assert "'premium', which this drive does not have" in caplog.text


# -- waits that are computed --


class Trial(Workflow):
    """Ends when the hero's number of visits, taken for days, has passed since the start of the test."""

    @step
    def begin(self):
        did("begin")

    @step(wait="end_of_trial")
    def bill(self):
        did(f"bill {self.context.get('days')}")

    def end_of_trial(self):
        assert not gd._drive().database.in_transaction()
        return START + timedelta(days=self.hero.visits)


def test_a_computed_wait_is_asked_when_its_step_is_reached_and_again_when_it_is_due(drive, clock):
    hero = User.create(visits=3)
    workflow = Trial.create(hero=hero)
    work_off(drive)
    execution = scheduled(workflow)
    assert effects() == ["begin"]
    assert (execution.scheduled_for, execution.reached_at) == (START + timedelta(days=3), START)
    assert (execution.asks_wait, execution.started_at, execution.number) == (True, None, 2)
    assert messages(drive) == [execution.id]
    User.update(visits=5).execute()  # prolonged
    clock.forward(days=3)
    work_off(drive)
    execution = scheduled(workflow)
    assert (execution.scheduled_for, execution.number) == (START + timedelta(days=5), 2)
    clock.forward(days=2)
    work_off(drive)
    assert effects() == ["begin", "bill None"]
    assert reload(workflow).state == "finished"
    last = workflow.execution_history[-1]
    assert (last.asks_wait, last.reached_at, last.started_at) == (None, START, START + timedelta(days=5))


@pytest.mark.parametrize("run_on", [0, 60])
@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (timedelta(hours=1), 3600),
        (90, 90),
        (0.5, 0.5),
        (START + timedelta(minutes=1), 60),
        ((START + timedelta(minutes=1)).astimezone(timezone(timedelta(hours=-7))), 60),
        (None, None),
        (0, None),
        (START - timedelta(days=9000), None),
    ],
    ids=str,
)
def test_a_computed_wait_is_a_duration_a_moment_or_none(drive, clock, hero, said, seconds, run_on):
    class Computes(Workflow):
        @step
        def one(self):
            pass

        @step(wait=lambda self: said)
        def two(self):
            did("two")

    drive.run_on = run_on
    workflow = Computes.create(hero=hero)
    work_off(drive)
    if seconds is None:
        assert (effects(), reload(workflow).state) == (["two"], "finished")
    else:
        assert (effects(), reload(workflow).state) == ([], "ready")
        assert scheduled(workflow).scheduled_for == START + timedelta(seconds=seconds)
        clock.forward(seconds=seconds)
        work_off(drive)
        assert (effects(), reload(workflow).state) == (["two"], "finished")


@pytest.mark.parametrize(
    "said", [datetime(2026, 3, 2), "tomorrow", -5, timedelta(days=-1), True, math.nan, b"1", [1]], ids=str
)
def test_what_is_no_wait_is_an_error_of_the_step_that_names_it(drive, clock, hero, said):
    class Computes(Workflow):
        wrong = True

        @step(wait=lambda self: said if Computes.wrong else 60)
        def one(self):
            did("one")

    workflow = Computes.create(hero=hero)
    with pytest.raises((TypeError, ValueError), match=r"^Computes\.one: what its wait returns, .* must be "):
        drive._perform(scheduled(workflow).id)
    assert (reload(workflow).state, effects()) == ("paused", [])
    Computes.wrong = False
    workflow.resume()  # no body has begun: it is asked again
    work_off(drive)
    assert effects() == []
    assert scheduled(workflow).scheduled_for == START + timedelta(minutes=1)


def test_the_furthest_moment_of_the_calendar_is_waited_for_and_one_beyond_it_is_an_error(drive, clock, hero):
    class Computes(Workflow):
        zone = timezone.utc

        @step(wait=lambda self: datetime.max.replace(tzinfo=Computes.zone))
        def one(self):
            did("one")

    workflow = Computes.create(hero=hero)
    work_off(drive)
    assert scheduled(workflow).scheduled_for == datetime.max.replace(tzinfo=timezone.utc)
    Computes.zone = timezone(timedelta(hours=-1))
    beyond, within = datetime.max.replace(tzinfo=Computes.zone), r"must be within the calendar of UTC, not datetime"
    with pytest.raises(ValueError, match=rf"^reschedule\(\): when {within}"):
        workflow.reschedule(beyond)
    with pytest.raises(ValueError, match=rf"^Computes\.one: what its wait returns, .* {within}"):
        scheduled(workflow).execute()
    assert (reload(workflow).state, effects()) == ("paused", [])


def test_an_error_of_a_wait_is_reattempted_and_the_wait_asked_again_until_a_body_has_begun(drive, clock, hero):
    class Fails(Workflow):
        asked = 0

        @step(wait="hours", on_exception=ExceptionPolicy("reattempt", wait=60, jitter=0))
        def one(self):
            did("one")
            if len(effects()) < 3:
                raise OddError

        def hours(self):
            Fails.asked += 1
            if Fails.asked == 1:
                raise OddError("the hero has no date yet")
            return timedelta(hours=2)

    workflow = Fails.create(hero=hero)
    work_off(drive)
    first, second = workflow.execution_history
    assert (first.outcome, first.reason) == ("reattempted", "OddError: the hero has no date yet")
    assert (second.asks_wait, second.reached_at) == (True, START)
    clock.forward(minutes=1)
    work_off(drive)
    assert scheduled(workflow).scheduled_for == START + timedelta(hours=2)
    for _ in range(9):
        clock.forward(hours=1)
        work_off(drive)
    assert (effects(), Fails.asked) == (["one"] * 3, 3)
    assert reload(workflow).state == "finished"
    assert {each.reached_at for each in workflow.execution_history} == {START}


@pytest.mark.parametrize("transactional", [False, True])
@pytest.mark.parametrize("where", ["wait", "body"])
def test_a_crash_in_a_wait_has_it_asked_again_and_one_in_the_body_has_not(drive, clock, hero, where, transactional):
    class Crashes(Workflow):
        asked, crashes = 0, True

        def crash(self, here):
            if here == where and Crashes.crashes:
                Crashes.crashes = False
                raise KeyboardInterrupt

        @step(wait="minute", transactional=transactional)
        def one(self):
            did(f"one {drive.database.in_transaction()}")
            self.crash("body")

        def minute(self):
            assert not drive.database.in_transaction()
            Crashes.asked += 1
            self.crash("wait")

    workflow = Crashes.create(hero=hero)
    with pytest.raises(KeyboardInterrupt):
        drive._perform(scheduled(workflow).id)
    assert scheduled(workflow).asks_wait is (True if where == "wait" else None)
    work_off(drive)
    assert Crashes.asked == (2 if where == "wait" else 1)
    assert [each.outcome for each in workflow.execution_history] == ["recovered", "success"]
    assert effects() == [f"one {transactional}"] * (1 if transactional or where == "wait" else 2)


@pytest.mark.parametrize("transactional", [False, True])
def test_a_claim_that_was_recovered_while_its_wait_was_asked_is_not_performed(
    drive, clock, hero, caplog, transactional
):
    class Lingers(Workflow):
        asked = 0

        @step(wait="at_length", transactional=transactional)
        def one(self):
            did("one")

        def at_length(self):
            Lingers.asked += 1
            if Lingers.asked == 1:
                clock.forward(minutes=10)
                assert housekeeping_elsewhere(drive)["stuck_in_progress_recovered"] == 1

    workflow = Lingers.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert effects() == []
    assert "claim was lost" in caplog.text
    work_off(drive)
    assert effects() == ["one"]
    assert [each.outcome for each in workflow.execution_history] == ["recovered", "success"]


def test_the_order_of_an_attempt_with_a_computed_wait(drive, clock, hero):
    class Ordered(Workflow):
        @cancel_if
        def condition(self):
            did("cancel_if")

        @step(wait="moment", skip_if="is_superfluous", wait_for="go", matching="is_mine")
        def one(self):
            did("body")

        def moment(self):
            did("wait")
            return 60

        def is_superfluous(self):
            did("skip_if")

        def is_mine(self, payload):
            did(f"matching {payload}")
            return True

    workflow = Ordered.create(hero=hero)
    workflow.signal("go", 7)
    work_off(drive)
    assert effects() == ["cancel_if", "wait"]
    clock.forward(minutes=1)
    work_off(drive)
    assert effects()[2:] == ["cancel_if", "wait", "skip_if", "matching 7", "body"]


def test_those_who_ignore_waits_ask_a_computed_one_and_run_the_body_whatever_it_says(drive, clock, hero, helpers):
    class Computes(Workflow):
        fails = False

        @step(wait="day")
        def one(self):
            did("one")

        two = step("one", wait="day", transactional=True)

        def day(self):
            did("asked")
            if Computes.fails:
                raise OddError
            return timedelta(days=1)

    workflow = Computes.create(hero=hero)
    assert scheduled(workflow).execute() is True
    helpers.perform_next_step(workflow)
    assert (effects(), workflow.state) == (["asked", "one"] * 2, "finished")
    helpers.speedrun_workflow(Computes.create(hero=hero))
    assert effects()[4:] == ["asked", "one"] * 2
    Computes.fails = True
    workflow = Computes.create(hero=hero)
    with pytest.raises(OddError):
        helpers.perform_next_step(workflow)
    assert workflow.state == "paused"
    for move in (lambda: helpers.perform_step_inline(workflow, "one"), lambda: workflow.resume_at("one")):
        move()  # neither asks
        workflow.pause()
    workflow.resume()
    work_off(drive)
    assert effects()[8:] == ["asked", "one", "one", "asked"]
    assert reload(workflow).current_step_name == "two"


@pytest.mark.parametrize("call", ["pause", "cancel"])
def test_a_workflow_paused_or_canceled_while_its_wait_is_asked_stands_still(drive, clock, hero, call):
    class Computes(Workflow):
        @step(wait="hour")
        def one(self):
            did("one")

        def hour(self):
            if not self.context:
                getattr(reload(self), call)(reason="while it is asked")
            return 3600

    workflow = Computes.create(hero=hero)
    work_off(drive)
    (execution,) = workflow.execution_history
    assert (reload(workflow).reason, execution.queue) == ("while it is asked", None)
    if call == "cancel":
        assert (execution.state, execution.outcome, execution.reason) == ("canceled", "canceled", "while it is asked")
    else:
        assert (reload(workflow).state, execution.state, execution.asks_wait) == ("paused", "scheduled", True)
        workflow.context["seen"] = True
        workflow.save()
        workflow.resume()
        assert scheduled(workflow).due_at == START + timedelta(hours=1)
        clock.forward(hours=1)
        work_off(drive)
        assert effects() == ["one"]


def test_flow_control_in_a_computed_wait_is_obeyed(drive, clock, hero):
    class Controls(Workflow):
        @step(wait=lambda self: self.skip(reason="there is no trial"))
        def one(self):
            did("one")

        @step(wait=lambda self: self.cancel(reason="enough"), transactional=True)
        def two(self):
            did("two")

    workflow = Controls.create(hero=hero)
    work_off(drive)
    assert effects() == []
    assert [(each.outcome, each.reason) for each in workflow.execution_history] == [
        ("skipped", "there is no trial"),
        ("canceled", "enough"),
    ]
    assert (reload(workflow).state, reload(workflow).reason) == ("canceled", "enough")


def test_a_timeout_counts_from_the_end_of_a_computed_wait(drive, clock, hero):
    class Waits(Workflow):
        @step(wait=lambda self: timedelta(days=2), wait_for="paid", timeout=timedelta(days=3), on_timeout="cancel")
        def one(self):
            did(self.signal_payload)

    workflow, other = Waits.create(hero=hero), Waits.create(hero=User.create())
    assert (scheduled(workflow).waiting_for, scheduled(workflow).times_out_at) == (None, None)
    work_off(drive)
    other.signal("paid", "early")  # kept: it waits for its time yet
    work_off(drive)
    assert {scheduled(each).scheduled_for for each in (workflow, other)} == {START + timedelta(days=2)}
    clock.forward(days=2)
    work_off(drive)
    execution = waiting(workflow)
    assert execution.times_out_at == START + timedelta(days=5)
    assert (execution.waits_since, execution.asks_wait) == (START + timedelta(days=2), None)
    assert effects() == ["early"]
    clock.forward(days=3)
    work_off(drive)
    assert (reload(workflow).state, reload(workflow).reason) == ("canceled", "no signal paid within 3 d")


def test_the_first_step_of_many_may_have_a_computed_wait(drive, clock):
    class Computes(Workflow):
        @step(wait=lambda self: timedelta(hours=self.hero.visits))
        def one(self):
            did(f"one {self.hero.visits}")

    Computes.create_many([User.create(visits=hours) for hours in (2, 1, 0)])
    work_off(drive)
    assert effects() == ["one 0"]
    hours = [
        (each.scheduled_for - START) / timedelta(hours=1) for each in StepExecution.select().order_by(StepExecution.id)
    ]
    assert hours == [2, 1, 0]


def test_what_was_to_ask_takes_a_plain_wait_that_a_deploy_put_in_its_place(drive, clock, hero):
    def deploy(declared):
        class Deployed(Workflow):
            @step(wait=declared)
            def one(self):
                did("one")

        return Deployed

    asking = deploy(lambda self: timedelta(days=2)).create(hero=hero)
    deploy(timedelta(hours=1))
    work_off(drive)
    assert scheduled(asking).scheduled_for == START + timedelta(hours=1)
    plain = deploy(timedelta(hours=1)).create(hero=User.create())
    deploy(lambda self: timedelta(days=2))
    clock.forward(hours=1)
    work_off(drive)
    assert effects() == ["one"]  # what is scheduled keeps its time; what was to ask asks the class as it is
    assert reload(plain).state == "finished"
    assert scheduled(asking).scheduled_for == START + timedelta(days=2)


def test_only_a_step_with_a_computed_wait_costs_a_statement_more(db, drive, clock, hero, monkeypatch):
    class Steps(Workflow):
        plain = step("go")
        computed = step("go", wait=lambda self: None)

        def go(self):
            pass

    drive.run_on = 0
    Steps.create(hero=hero)
    costs, numbers = Costs(db, monkeypatch), []
    for _ in range(2):
        attempt = taken(drive)
        numbers.append(len(costs.of(attempt.run)[1]))
    assert numbers[1] - numbers[0] <= 1  # the last one inserts no other


# ==== Policies ========================================================================================================


def test_the_wait_doubles_up_to_ten_minutes_with_jitter():
    policy = ExceptionPolicy("reattempt")
    for reattempts in range(2000):
        base = min(2.0**reattempts, 600) if reattempts < 20 else 600
        seconds = policy.delay(reattempts).total_seconds()
        assert base * 0.89 <= seconds <= min(base * 1.11, 600)
    assert len({policy.delay(3) for _ in range(20)}) > 1
    assert ExceptionPolicy("reattempt", wait=15, jitter=0, backoff=1).delay(7) == timedelta(seconds=15)


def test_a_reattempt_after_an_error_waits_as_its_policy_says(drive, clock, hero):
    class Backoff(Workflow):
        exception_policies = [ExceptionPolicy("reattempt", wait=10, backoff=3, jitter=0, max_reattempts=3)]

        @step
        def call(self):
            raise TimeoutError

    workflow = Backoff.create(hero=hero)
    waits = []
    for _ in range(3):
        scheduled(workflow).execute()
        waits.append((scheduled(workflow).scheduled_for - clock.now).total_seconds())
    assert waits == [10, 30, 90]
    with pytest.raises(TimeoutError):
        scheduled(workflow).execute()
    assert reload(workflow).state == "paused"
    reload(workflow).resume()
    assert scheduled(workflow).reattempts == 0


def test_reattempt_calls_and_recoveries_do_not_count_as_error_reattempts(drive, clock, hero):
    class Mixed(Workflow):
        @step(on_exception="reattempt", max_reattempts=1)
        def call(self):
            turn = self.execution_history.count()
            if turn in (1, 4):
                raise TimeoutError
            if turn in (2, 3):
                self.reattempt()

    workflow = Mixed.create(hero=hero)
    for _ in range(3):
        scheduled(workflow).execute()
    assert scheduled(workflow).reattempts == 1
    gd._Attempt.claim(drive, scheduled(workflow).id)
    clock.forward(minutes=5)
    drive.housekeeping()
    assert (scheduled(workflow).reattempts, scheduled(workflow).recoveries) == (1, 1)
    scheduled(workflow).execute()
    assert reload(workflow).state == "finished"


def test_the_policy_that_applies_is_the_steps_then_the_latest_specific_then_the_latest_blanket(drive, helpers):
    class Policies(Workflow):
        exception_policies = [
            ExceptionPolicy("cancel", matching=LookupError),
            ExceptionPolicy("pause"),
            ExceptionPolicy("skip", matching=(KeyError, "test_geneva_drive.OddError", "gone.Error")),
        ]

        @step(on_exception=ExceptionPolicy("pause", matching=IndexError))
        def call(self):
            raise {"key": KeyError, "index": IndexError, "lookup": LookupError, "odd": OddError, "value": ValueError}[
                self.context["kind"]
            ]

    class Child(Policies):
        @on_exception
        def handle(self, error):
            did("handled")
            self.finish()

    expected = {"key": "finished", "index": "paused", "lookup": "canceled", "odd": "finished", "value": "paused"}
    for kind, state in expected.items():
        workflow = Policies.create(hero=User.create(), context={"kind": kind})
        helpers.speedrun_workflow(workflow, raise_errors=False)
        assert (kind, reload(workflow).state) == (kind, state)
    workflow = Child.create(hero=User.create(), context={"kind": "value"})
    helpers.speedrun_workflow(workflow, raise_errors=False)
    assert (reload(workflow).state, effects()) == ("finished", ["handled"])


class OddError(Exception):
    pass


@pytest.mark.parametrize("matching", ["broken_module.Error", "..x", "test_geneva_drive.User.DoesNotExist", "KeyError"])
def test_a_dotted_name_may_be_nested_and_whatever_its_import_raises_it_matches_nothing(
    drive, hero, tmp_path, monkeypatch, matching
):
    (tmp_path / "broken_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)

    class Lazy(Workflow):
        exception_policies = [ExceptionPolicy("cancel", matching=matching)]

        @step
        def one(self):
            raise User.DoesNotExist if self.context["own"] else KeyError

    states = {}
    for own in (True, False):
        workflow = Lazy.create(hero=User.create(), context={"own": own})
        with pytest.raises((User.DoesNotExist, KeyError)):
            scheduled(workflow).execute()
        states[own] = reload(workflow).state
    assert states == {
        True: "canceled" if "User" in matching else "paused",
        False: "canceled" if matching == "KeyError" else "paused",
    }


def test_an_asyncio_cancellation_is_an_error_of_the_step(drive, hero):
    class Cancels(Workflow):
        @step(on_exception="skip")
        async def one(self):
            raise asyncio.CancelledError

    workflow = Cancels.create(hero=hero)
    scheduled(workflow).execute()
    assert reload(workflow).state == "finished"


@pytest.mark.parametrize("report", ["terminal_only", "always", "never"])
@pytest.mark.parametrize("action", ["pause", "cancel", "skip", "reattempt"])
def test_report_says_when_the_error_leaves_the_task(drive, hero, action, report):
    class Reports(Workflow):
        exception_policies = [ExceptionPolicy(action, report=report)]

        @step
        def one(self):
            raise OddError

    workflow = Reports.create(hero=hero)
    raises = report == "always" or (report == "terminal_only" and action in ("pause", "cancel"))
    with pytest.raises(OddError) if raises else contextlib.nullcontext() as caught:
        drive._perform(scheduled(workflow).id)
    assert len(history(workflow)) >= 1
    if raises and sys.version_info >= (3, 11):
        state = reload(workflow).state
        assert caught.value.__notes__ == [f"in the step one of Reports {workflow.id}, which is {state} now"]


def test_the_first_policy_of_a_steps_list_that_matches_decides_and_the_classs_if_none_does(drive, hero, helpers):
    def handle(self, error):
        self.skip(reason=f"handled {error}")

    class Lists(Workflow):
        exception_policies = [ExceptionPolicy("cancel")]

        @step(on_exception=[ExceptionPolicy("skip", matching=KeyError), ExceptionPolicy("pause", matching=LookupError)])
        def one(self):
            raise KeyError("k")

        @step(on_exception=(ExceptionPolicy("pause", matching=KeyError), handle, ExceptionPolicy("pause")))
        def two(self):
            raise ValueError("v")

        @step(on_exception=[ExceptionPolicy("skip", matching=KeyError), ExceptionPolicy("pause", matching="OSError")])
        def three(self):
            raise TypeError("t")

    workflow = Lists.create(hero=hero)
    helpers.speedrun_workflow(workflow, raise_errors=False)
    assert [(each.step_name, each.outcome, each.reason) for each in workflow.execution_history] == [
        ("one", "skipped", "KeyError: 'k'"),
        ("two", "skipped", "handled v"),
        ("three", "canceled", "TypeError: t"),
    ]
    assert [len(each.policies) for each in Lists.steps] == [2, 3, 2]
    for note in ("on KeyError: skip", "on LookupError: pause", "on error: handle", "on OSError: pause"):
        assert note in Lists.graph()


# ==== Calls from outside ==============================================================================================

CALLS = ["cancel", "pause", "skip", "resume", "resume_at", "reschedule", "reattempt", "finish"]


def in_state(drive, state):
    """A workflow in some state, made by the ordinary means."""
    workflow = Plain.create(hero=User.create())
    if state == "performing":
        gd._Attempt.claim(drive, scheduled(workflow).id)
    elif state == "paused":
        workflow.pause()
    elif state == "canceled":
        workflow.cancel()
    elif state == "finished":
        gd.TestHelpers().speedrun_workflow(workflow)
    return reload(workflow)


@pytest.mark.parametrize("state", ["ready", "performing", "paused", "finished", "canceled"])
@pytest.mark.parametrize("call", CALLS)
def test_calls_from_outside_are_allowed_or_refused_as_the_table_says(drive, clock, state, call):
    after = {
        ("cancel", "ready"): "canceled",
        ("cancel", "performing"): "canceled",
        ("cancel", "paused"): "canceled",
        ("pause", "ready"): "paused",
        ("pause", "performing"): "performing",
        ("skip", "ready"): "ready",
        ("skip", "paused"): "ready",
        ("resume", "paused"): "ready",
        ("resume_at", "paused"): "ready",
        ("resume_at", "finished"): "ready",
        ("resume_at", "canceled"): "ready",
        ("reschedule", "ready"): "ready",
        ("reschedule", "paused"): "paused",
    }.get((call, state))
    workflow = in_state(drive, state)
    before = history(workflow)
    arguments = ["three"] if call == "resume_at" else []
    if after is None:
        with pytest.raises(gd.InvalidStateError, match=rf"Plain {workflow.id} is {state}; {call}\(\) was refused"):
            getattr(workflow, call)(*arguments)
        assert history(workflow) == before
        assert reload(workflow).state == state
    else:
        getattr(workflow, call)(*arguments)
        assert (workflow.state, reload(workflow).state) == (after, after)
        assert reload(workflow).__data__ == workflow.__data__
    assert reload(workflow).current_step_name == {
        ("skip", "ready"): "two",
        ("skip", "paused"): "two",
        ("resume_at", "paused"): "three",
        ("resume_at", "finished"): "three",
        ("resume_at", "canceled"): "three",
    }.get((call, state), None if reload(workflow).state in ("finished", "canceled") else "one")


def test_canceling_takes_the_scheduled_execution_along(drive, hero):
    for pause_first in (False, True):
        workflow = Plain.create(hero=hero)
        if pause_first:
            workflow.pause()
        workflow.cancel()
        assert history(workflow) == [("one", "canceled", "canceled")]


def test_a_workflow_canceled_while_performing_records_the_step_and_goes_no_further(drive, hero):
    class Canceled(Workflow):
        @step
        def one(self):
            Workflow.get_by_id(self.id).cancel()
            assert reload(self).state == "canceled"
            self.context["done"] = True
            did("went on")

        @step
        def two(self):
            did("two")

    workflow = Canceled.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert history(workflow) == [("one", "completed", "success")]
    row = reload(workflow)
    assert (row.state, row.current_step_name, row.context) == ("canceled", None, {"done": True})
    assert effects() == ["went on"]


@pytest.mark.parametrize("ending", ["return", "reattempt", "pause", "cancel", "finish", "error"])
def test_a_pause_asked_for_while_performing_takes_hold_when_the_step_is_recorded(drive, clock, hero, ending):
    class Paused(Workflow):
        @step
        def one(self):
            controller = Workflow.get_by_id(self.id)
            controller.pause()
            with pytest.raises(gd.InvalidStateError, match="performing, and about to pause"):
                controller.pause()
            if ending == "error":
                raise OddError
            if ending != "return":
                getattr(self, ending)()

        @step(wait=60)
        def two(self):
            did("two")

    workflow = Paused.create(hero=hero)
    with pytest.raises(OddError) if ending == "error" else contextlib.nullcontext():
        drive._perform(scheduled(workflow).id)
    row = reload(workflow)
    assert row.state == {"cancel": "canceled", "finish": "finished"}.get(ending, "paused")
    assert row.pause_requested is False
    following = [(each.step_name, each.scheduled_for) for each in row.execution_history if each.state == "scheduled"]
    expected = {"return": [("two", START + timedelta(seconds=60))], "reattempt": [("one", START)]}
    assert following == expected.get(ending, [])
    if row.state == "paused":
        row.resume()
        assert row.state == "ready"
        assert messages(drive)[-1] == scheduled(row).id


def test_resuming_keeps_the_time_of_what_was_scheduled_and_queues_it_again(drive, clock, hero):
    workflow = Plain.create(hero=hero)
    scheduled(workflow).execute()
    before = scheduled(workflow)
    reload(workflow).pause()
    drive.huey.flush()
    clock.forward(hours=1)
    row = reload(workflow)
    row.resume()
    after = scheduled(workflow)
    assert (after.id, after.scheduled_for) == (before.id, before.scheduled_for)
    (task,) = drive.huey.scheduled()
    assert task.args == (after.id,)
    row.pause()
    drive.huey.flush()
    clock.forward(days=30)
    row.resume()
    assert [task.args for task in drive.huey.pending()] == [(after.id,)]


def test_resuming_a_failed_step_runs_it_now(drive, clock, hero, helpers):
    class Fails(Workflow):
        @step(wait=timedelta(days=1))
        def one(self):
            if not self.hero.active:
                raise OddError

    User.update(active=False).execute()
    workflow = Fails.create(hero=hero)
    helpers.perform_next_step(workflow, raise_errors=False)
    clock.forward(days=3)
    workflow.resume()
    execution = scheduled(workflow)
    assert (execution.number, execution.scheduled_for) == (2, clock.now)
    User.update(active=True).execute()
    helpers.speedrun_workflow(workflow)
    assert workflow.state == "finished"


def test_skipping_a_paused_workflow_records_the_step_it_stood_at(drive, hero, helpers):
    class Fails(Workflow):
        @step
        def one(self):
            raise OddError

        @step
        def two(self):
            did("two")

    workflow = Fails.create(hero=hero)
    helpers.perform_next_step(workflow, raise_errors=False)
    workflow.skip()
    assert history(workflow) == [("one", "failed", "failed"), ("one", "skipped", "skipped"), ("two", "scheduled", None)]
    workflow.skip()
    assert (workflow.state, history(workflow)[-1]) == ("finished", ("two", "skipped", "skipped"))


def test_a_controller_that_loads_a_performing_workflow_is_outside(drive, hero):
    class Inspects(Workflow):
        @step
        def one(self):
            other = Workflow.get_by_id(self.id)
            for call in (other.skip, other.finish, other.reattempt, other.resume):
                with pytest.raises(gd.InvalidStateError):
                    call()
            did("went on")

    scheduled(Inspects.create(hero=hero)).execute()
    assert effects() == ["went on"]


def test_calls_work_inside_a_transaction_of_the_caller_and_are_rolled_back_with_it(db, drive, hero):
    workflow = Plain.create(hero=hero)
    with pytest.raises(ZeroDivisionError), db.atomic():
        workflow.pause()
        raise ZeroDivisionError
    assert reload(workflow).state == "ready"
    with db.atomic():
        reload(workflow).cancel()
    assert reload(workflow).state == "canceled"


# -- other times --


def test_reschedule_gives_what_is_scheduled_another_time(drive, clock, hero):
    workflow = Tomorrow.create(hero=hero)
    declared = scheduled(workflow).scheduled_for
    clock.forward(hours=1)
    for when, expected in (
        (timedelta(hours=5), START + timedelta(hours=6)),
        (60, START + timedelta(hours=1, minutes=1)),
        (START + timedelta(days=30), START + timedelta(days=30)),
        (START - timedelta(days=30), START + timedelta(hours=1)),  # what has passed means now
        (None, declared),
    ):
        workflow.reschedule(when)
        execution = scheduled(workflow)
        assert (execution.scheduled_for, execution.due_at, execution.queue) == (expected, expected, "default")
        assert execution.number == 1
    workflow.reschedule(0)
    work_off(drive)
    assert len(effects()) == 1


@pytest.mark.parametrize("when", [timedelta(hours=1), None])
def test_what_is_rescheduled_while_it_is_paused_stays_paused(drive, clock, hero, when):
    workflow = Tomorrow.create(hero=hero)
    expected = START + timedelta(hours=1) if when else scheduled(workflow).scheduled_for
    workflow.pause(reason="a holiday")
    workflow.reschedule(when)
    execution = scheduled(workflow)
    assert (reload(workflow).state, reload(workflow).reason, execution.queue) == ("paused", "a holiday", None)
    workflow.resume()
    assert scheduled(workflow).due_at == expected


def test_reschedule_of_what_waits_for_a_signal_moves_its_limit_and_the_error_tells_how_long_it_was(drive, clock, hero):
    workflow = Payment.create(hero=hero)
    clock.forward(days=1)
    workflow.reschedule(timedelta(hours=2))
    assert waiting(workflow).times_out_at == waiting(workflow).due_at == START + timedelta(days=1, hours=2)
    assert waiting(workflow).scheduled_for == START
    clock.forward(hours=2)
    work_off(drive)
    execution = workflow.execution_history[0]
    assert (reload(workflow).state, execution.error_class_name) == ("paused", "geneva_drive.SignalTimeoutError")
    assert "waited for the signal 'confirmed' for 1 d 2 h, and it did not come" in execution.error_message
    assert execution.reason == reload(workflow).reason == "no signal confirmed within 1 d 2 h"


def test_a_limit_that_no_step_declares_may_be_set_and_taken_away_and_pauses(drive, clock, hero):
    class Endless(Workflow):
        @step(wait_for="go")
        def one(self):
            did("one")

    workflow = Endless.create(hero=hero)
    workflow.reschedule(60)
    assert messages(drive) == [waiting(workflow).id]
    workflow.reschedule()
    assert (waiting(workflow).times_out_at, messages(drive)) == (None, [])
    workflow.reschedule(60)
    clock.forward(minutes=1)
    work_off(drive)
    assert (reload(workflow).state, reload(workflow).reason) == ("paused", "no signal go within 1 min")
    workflow.resume()
    workflow.signal("go")
    work_off(drive)
    assert effects() == ["one"]


def test_reschedule_without_a_time_takes_what_the_class_declares_by_now(drive, clock, hero):
    def deploy(days, limit=None):
        class Deployed(Workflow):
            @step(wait=timedelta(days=days))
            def one(self):
                did("one")

            @step(wait=timedelta(days=days), wait_for="go", timeout=limit and timedelta(days=limit))
            def two(self):
                did("two")

        return Deployed

    plain, waits = (deploy(7, 3).create(hero=User.create()) for _ in range(2))
    waits.skip()
    assert waiting(waits).times_out_at == START + timedelta(days=10)
    deploy(1, 2)
    for each in (plain, waits):
        reload(each).reschedule()
    assert scheduled(plain).scheduled_for == START + timedelta(days=1)
    assert waiting(waits).times_out_at == START + timedelta(days=3)
    assert waiting(waits).scheduled_for == waiting(waits).waits_since == START + timedelta(days=1)
    clock.forward(days=2)  # its wait is over: the limit alone is moved
    deploy(5, 4)
    reload(waits).reschedule()
    assert waiting(waits).times_out_at == START + timedelta(days=5)
    deploy(5)
    reload(waits).reschedule()
    assert (waiting(waits).times_out_at, waiting(waits).queue) == (None, None)


@pytest.mark.parametrize("now", ["children", "another signal"])
def test_reschedule_without_a_time_has_a_step_wait_for_what_it_is_to_wait_for_by_now(drive, hero, now):
    def deploy(**waits):
        class Deployed(Workflow):
            @step(**waits)
            def one(self):
                did("one")

            @step(wait_for="paid")
            def two(self):
                did("two")

        return Deployed

    workflow = deploy(wait_for="go", timeout=7200).create(hero=hero)
    if now == "another signal":
        workflow.signal("paid")
    deploy(**({"wait_for_children": True} if now == "children" else {"wait_for": "paid"}))
    reload(workflow).reschedule()
    work_off(drive)
    assert (effects(), drive.doctor()) == (["one"], [])
    assert waiting(workflow).waiting_for == "paid"


@pytest.mark.parametrize("now", ["a plain step", "removed"])
def test_reschedule_without_a_time_lets_a_workflow_go_on_whose_step_does_not_wait_any_more(drive, hero, now):
    def deploy(step_now):
        class Deployed(Workflow):
            one = step_now

            @step
            def two(self):
                did("two")

        return Deployed

    def one(self):
        did("one")

    workflow = deploy(step(wait_for="go")(one)).create(hero=hero)
    work_off(drive)
    assert effects() == []
    deploy(gd.removed_step() if now == "removed" else step(one))
    reload(workflow).reschedule()
    assert drive.doctor() == []
    work_off(drive)
    assert effects() == (["two"] if now == "removed" else ["one", "two"])
    assert reload(workflow).state == "finished"


def test_reschedule_asks_a_computed_wait_again_unless_it_is_given_a_time(drive, clock):
    hero = User.create(visits=3)
    workflow = Trial.create(hero=hero)
    work_off(drive)
    User.update(visits=1).execute()
    workflow.reschedule()
    assert (scheduled(workflow).scheduled_for, scheduled(workflow).asks_wait) == (START, True)
    work_off(drive)
    assert scheduled(workflow).scheduled_for == START + timedelta(days=1)
    workflow.reschedule(timedelta(hours=1))
    assert scheduled(workflow).asks_wait is None
    clock.forward(hours=1)
    work_off(drive)
    assert effects() == ["begin", "bill None"]


def test_reschedule_asks_the_wait_that_a_deploy_computes_where_the_plain_one_of_a_signal_is_not_over(
    drive, clock, hero
):
    def deploy(wait):
        class Deployed(Workflow):
            @step(wait=wait, wait_for="go", timeout=timedelta(days=1))
            def one(self):
                did("one")

        return Deployed

    workflow = deploy(timedelta(days=7)).create(hero=hero)
    assert waiting(workflow).times_out_at == START + timedelta(days=8)
    deploy(lambda self: timedelta(days=2))
    reload(workflow).reschedule()
    work_off(drive)
    assert scheduled(workflow).scheduled_for == START + timedelta(days=2)
    clock.forward(days=2)
    work_off(drive)
    assert waiting(workflow).times_out_at == START + timedelta(days=3)
    reload(workflow).reschedule()  # its wait is over, and not asked again
    assert waiting(workflow).times_out_at == START + timedelta(days=3)
    assert drive.doctor() == []


def test_where_nothing_is_scheduled_reschedule_names_resume(drive, hero, helpers):
    class Fails(Workflow):
        @step
        def one(self):
            raise OddError

    workflow = Fails.create(hero=hero)
    helpers.speedrun_workflow(workflow, raise_errors=False)
    with pytest.raises(
        gd.InvalidStateError, match=r"is paused; reschedule\(\) was refused: nothing is .*: resume\(\) "
    ):
        workflow.reschedule(60)


@pytest.mark.parametrize("when", [datetime(2026, 3, 2), "2d", -1, True, timedelta(days=-1), math.inf], ids=str)
def test_a_time_that_is_none_is_refused_before_anything_is_written(drive, clock, hero, when):
    workflow = Tomorrow.create(hero=hero)
    before = list(StepExecution.select().tuples())
    with pytest.raises((TypeError, ValueError), match=r"^reschedule\(\): when must be "):
        workflow.reschedule(when)
    assert list(StepExecution.select().tuples()) == before


def test_a_step_cannot_reschedule_its_own_workflow(drive, hero, helpers):
    class Tries(Workflow):
        @step
        def one(self):
            self.reschedule(60)

    workflow = Tries.create(hero=hero)
    with pytest.raises(gd.InvalidStateError):
        helpers.perform_next_step(workflow)
    assert workflow.state == "paused"


def test_a_message_for_the_earlier_time_of_what_was_rescheduled_changes_nothing(db, clock, hero):
    huey = MemoryHuey("outside", results=False)
    drive = GenevaDrive(db, huey=huey, clock=clock)
    workflow = Tomorrow.create(hero=hero)
    workflow.reschedule(0)
    workflow.reschedule(timedelta(hours=1))
    huey.execute(huey.dequeue())
    assert (effects(), scheduled(workflow).scheduled_for) == ([], START + timedelta(hours=1))
    clock.forward(hours=1)
    for task in huey.read_schedule(clock.now.replace(tzinfo=None)):
        huey.enqueue(task)
    while task := huey.dequeue():
        huey.execute(task)
    assert len(effects()) == 1
    assert drive.doctor() == []


# -- what is over goes on --


@pytest.mark.parametrize("end", ["finished", "canceled"])
def test_what_is_over_goes_on_at_a_step_as_the_ongoing_one_of_its_hero(drive, clock, end):
    workflow = in_state(drive, end)
    number, key = workflow.execution_count, workflow.token
    clock.forward(days=5)
    workflow.resume_at("two", reason="they came back")
    row = reload(workflow)
    assert (row.state, row.current_step_name, row.transitioned_at, row.reason) == ("ready", "two", None, None)
    execution = scheduled(workflow)
    assert (execution.number, execution.begun_reason) == (number + 1, "they came back")
    assert (execution.scheduled_for, execution.reached_at) == (clock.now, clock.now)
    with pytest.raises(gd.AlreadyOngoingError) as caught:
        Plain.create(hero=workflow.hero)
    assert caught.value.workflow_id == workflow.id
    clock.forward(days=25)
    assert drive.housekeeping()["workflows_cleaned_up"] == 0  # long since over, as it was, but not any more
    gd.TestHelpers().speedrun_workflow(workflow)
    assert (workflow.state, workflow.token) == ("finished", key)


@pytest.mark.parametrize("end", ["finished", "canceled"])
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_over_stays_so_where_its_hero_has_another_ongoing_one(db, drive, end, inside):
    workflow = in_state(drive, end)
    other = Plain.create(hero=workflow.hero)
    before = contents(drive)
    with db.atomic() if inside else contextlib.nullcontext():
        with pytest.raises(gd.AlreadyOngoingError) as caught:
            workflow.resume_at("two")
        did("after")  # the caller's transaction is usable
        with pytest.raises(gd.AlreadyOngoingError, match=f"workflow {other.id}"):
            Plain.select(Plain.id).where(Plain.id == workflow.id).get().resume_at("two")
    assert caught.value.workflow_id == other.id
    assert (contents(drive), effects()[-1]) == (before, "after")
    Plain.create(hero=workflow.hero, allow_multiple=True)  # which neither counts nor is counted
    other.cancel()
    workflow.resume_at("two")
    assert reload(workflow).state == "ready"


def test_several_of_a_hero_may_go_on_where_that_was_allowed(drive, hero):
    workflows = [Plain.create(hero=hero, allow_multiple=True) for _ in range(3)]
    for each in workflows:
        each.cancel()
        each.resume_at("one")
    assert Plain.ready().count() == 3


def test_a_canceled_workflow_whose_last_attempt_is_in_progress_does_not_go_on(drive, clock, hero):
    workflow = Plain.create(hero=hero)
    attempt = gd._Attempt.claim(drive, scheduled(workflow).id)
    workflow.cancel()
    with pytest.raises(
        gd.InvalidStateError, match=r"is canceled; resume_at\(\) was refused: its last attempt is still in"
    ):
        workflow.resume_at("two")
    attempt.run()
    workflow.resume_at("two")
    assert history(workflow) == [("one", "completed", "success"), ("two", "scheduled", None)]


def _resume_over(number, url, ids, barrier, results):
    GenevaDrive(open_database(url))
    workflow = Workflow.get_by_id(ids[number])
    barrier.wait(timeout=60)
    try:
        workflow.resume_at("one")
        results.put(workflow.id)
    except gd.AlreadyOngoingError as error:
        results.put(-error.workflow_id)


def test_of_those_of_a_hero_that_go_on_at_once_in_several_processes_one_does(database, drive, hero, is_exhaustive):
    for _ in range(20 if is_exhaustive else 2):
        Workflow.delete().execute()
        workflows = []
        for _ in range(4):
            workflows.append(Plain.create(hero=hero))
            workflows[-1].cancel()
        database.peewee.close()
        results = in_processes(4, _resume_over, database.url, [each.id for each in workflows], fork.Barrier(4))
        (winner,) = [each for each in results if each > 0]
        assert [each for each in results if each < 0] == [-winner] * 3
        assert [each.id for each in Plain.ongoing()] == [winner]


def test_what_goes_on_as_housekeeping_is_about_to_delete_it_is_kept(db, drive, clock, hero, monkeypatch):
    workflow = in_state(drive, "finished")
    clock.forward(days=31)
    delete = drive._recovery._delete

    def late(ids, expired):
        assert ids == [workflow.id]
        reload(workflow).resume_at("two")
        return delete(ids, expired)

    monkeypatch.setattr(drive._recovery, "_delete", late)
    assert drive.housekeeping()["workflows_cleaned_up"] == 0
    assert scheduled(workflow).step_name == "two"


# -- reasons --


class Reasoned(Workflow):
    """What a step does is told by the hero's name."""

    exception_policies = [
        ExceptionPolicy("reattempt", matching=LookupError, max_reattempts=1, terminal_action="cancel", wait=0),
        ExceptionPolicy("skip", matching=KeyError),
    ]

    @cancel_if
    def is_withdrawn(self):
        return self.hero.name == "withdrawn"

    @on_exception(PermissionError)
    def give_up(self, error):
        self.finish(reason=f"not allowed: {error}")

    @step
    def one(self):
        turns = {
            "cancel": lambda: self.cancel(reason="sold out"),
            "pause": lambda: self.pause(reason="  to be\nlooked\t at "),
            "skip": lambda: self.skip(reason="nothing to do"),
            "finish": lambda: self.finish(reason="paid in cash"),
            "ValueError": lambda: int("x"),
            "KeyError": lambda: {}["k"],
            "LookupError": lambda: [][0],
            "PermissionError": lambda: (_ for _ in ()).throw(PermissionError("no")),
            "AssertionError": lambda: (_ for _ in ()).throw(AssertionError),
        }
        if self.hero.name in turns:
            turns[self.hero.name]()

    @step
    def two(self):
        pass


#: By the name of the hero: the reasons of the attempts, and the workflow's state and reason at the end.
REASONS = {
    "withdrawn": (["is_withdrawn"], "canceled", "is_withdrawn"),
    "cancel": (["sold out"], "canceled", "sold out"),
    "pause": (["to be looked at"], "paused", "to be looked at"),
    "skip": (["nothing to do", None], "finished", None),
    "finish": (["paid in cash"], "finished", "paid in cash"),
    "ValueError": ([error := "ValueError: invalid literal for int() with base 10: 'x'"], "paused", error),
    "KeyError": (["KeyError: 'k'", None], "finished", None),
    "LookupError": ([error := "IndexError: list index out of range", error], "canceled", error),
    "PermissionError": (["not allowed: no"], "finished", "not allowed: no"),
    "AssertionError": (["AssertionError"], "paused", "AssertionError"),
    "nothing": ([None, None], "finished", None),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_are_kept_with_the_attempt_that_ended_and_the_workflow_that_stands_still(drive, name):
    workflow = Reasoned.create(hero=User.create(name=name))
    for _ in range(4):
        with contextlib.suppress(Exception):
            work_off(drive)
    attempts, state, reason = REASONS[name]
    assert [each.reason for each in workflow.execution_history] == attempts
    assert (reload(workflow).state, reload(workflow).reason) == (state, reason)


def test_the_engine_gives_its_own_reasons(drive, clock, hero, helpers):
    gone = Plain.create(hero=User.create())
    User.delete().where(User.id == gone.hero_id).execute()
    helpers.perform_next_step(gone)
    assert (gone.reason, gone.execution_history[0].reason) == ("the hero is gone", "the hero is gone")
    undefined = Plain.create(hero=hero)
    Workflow.update(current_step_name="nowhere").where(Workflow.id == undefined.id).execute()
    StepExecution.update(step_name="nowhere").where(StepExecution.workflow == undefined.id).execute()
    helpers.perform_next_step(undefined, raise_errors=False)
    assert undefined.reason == undefined.execution_history[0].reason == "no step called nowhere"
    drive.max_recoveries = 2
    dies = Plain.create(hero=User.create())
    for _ in range(3):
        gd._Attempt.claim(drive, scheduled(dies).id)
        clock.forward(hours=1)
        housekeeping_elsewhere(drive)
    reasons = [each.reason for each in dies.execution_history]
    assert reasons == ["its process died", "its process died 2 times", "its process died 3 times"]
    assert (reload(dies).state, reload(dies).reason) == ("paused", "its process died 3 times")


def test_calls_from_outside_keep_their_reasons_until_the_workflow_goes_on(drive, clock, hero):
    def reasons():
        row = reload(workflow)
        return row.reason, [(each.step_name, each.reason, each.begun_reason) for each in row.execution_history]

    workflow = Plain.create(hero=hero)
    workflow.pause(reason="a holiday")
    assert workflow.reason == "a holiday"
    assert reasons() == ("a holiday", [("one", None, None)])
    workflow.resume(reason="it is over")
    assert reasons() == (None, [("one", None, "it is over")])
    workflow.skip(reason="done by hand")
    assert reasons() == (None, [("one", "done by hand", "it is over"), ("two", None, None)])
    workflow.pause()
    workflow.resume_at("three", reason="so far so good")
    assert reasons()[1][1:] == [("two", None, None), ("three", None, "so far so good")]
    workflow.cancel(reason="withdrawn")
    assert reasons()[0] == "withdrawn"
    assert reasons()[1][2] == ("three", "withdrawn", "so far so good")
    assert history(workflow)[2] == ("three", "canceled", "canceled")


@pytest.mark.parametrize(
    ("end", "state", "expected"),
    [
        (lambda self: None, "paused", "a holiday"),
        (lambda self: self.reattempt(), "paused", "a holiday"),
        (_fails(OddError("broken")), "paused", "OddError: broken"),
        (lambda self: self.pause(), "paused", "a holiday"),
        (lambda self: self.pause(reason="my own"), "paused", "my own"),
        (lambda self: self.finish(), "finished", None),
        (lambda self: self.finish(reason="my own"), "finished", "my own"),
        (lambda self: self.cancel(), "canceled", None),
        (lambda self: reload(self).cancel(reason="after all"), "canceled", "after all"),
    ],
)
def test_the_reason_of_a_pause_is_kept_from_its_request_on_and_what_stops_the_workflow_first_wins(
    drive, hero, end, state, expected
):
    class Paused(Workflow):
        @step
        def one(self):
            reload(self).pause(reason="a holiday")
            assert (reload(self).reason, reload(self).state) == ("a holiday", "performing")
            end(self)

        @step
        def two(self):
            pass

    workflow = Paused.create(hero=hero)
    with contextlib.suppress(OddError):
        scheduled(workflow).execute()
    assert (reload(workflow).state, reload(workflow).reason) == (state, expected)


def test_a_workflow_that_finishes_before_its_pause_has_none_of_its_reason(drive, hero):
    class Last(Workflow):
        @step
        def one(self):
            reload(self).pause(reason="a holiday")

    workflow = Last.create(hero=hero)
    scheduled(workflow).execute()
    assert (reload(workflow).state, reload(workflow).reason) == ("finished", None)


def test_a_resumable_step_that_stops_at_a_checkpoint_knows_the_reason(drive, hero, helpers):
    class Long(Workflow):
        @step(resumable=True)
        def one(self):
            reload(self).pause(reason="a holiday")
            self.checkpoint(1)

    workflow = Long.create(hero=hero)
    helpers.perform_next_step(workflow)
    assert (workflow.state, workflow.reason) == ("paused", "a holiday")
    assert workflow.execution_history[0].reason == "a holiday"


@pytest.mark.parametrize("reason", [7, b"text", ["text"], ValueError("text")], ids=repr)
@pytest.mark.parametrize("call", ["cancel", "pause", "skip", "resume", "resume_at", "reattempt", "finish"])
def test_a_reason_is_text_alone(drive, hero, call, reason):
    workflow = Plain.create(hero=hero)
    arguments = ["two"] if call == "resume_at" else []
    with pytest.raises(TypeError, match=rf"^Plain \d+: the reason of {call}\(\) must be text, not "):
        getattr(workflow, call)(*arguments, reason=reason)
    assert reload(workflow).state == "ready"


def test_a_reason_is_kept_on_one_line_cut_and_escaped(drive, hero):
    workflow = Plain.create(hero=hero)
    workflow.pause(reason=" a\n\n b\tc\x00 \udc80 " + "ü😀" * 1000)
    reason = reload(workflow).reason
    assert reason.startswith("a b c\\x00 \\udc80 ü😀ü😀")
    assert len(reason) == 1000 + len("\\x00") - 1 + len("\\udc80") - 1
    workflow.cancel(reason=" \n ")
    assert reload(workflow).reason is None


def test_a_database_that_is_busy_does_not_have_a_reason_escaped(drive, hero, monkeypatch):
    workflow = Plain.create(hero=hero)
    lock, failures = gd._lock_with_active, [peewee.OperationalError("database is locked")] * gd.TRANSACTION_TRIES

    def fails(*arguments):
        if failures:
            raise failures.pop()
        return lock(*arguments)

    monkeypatch.setattr(gd, "_lock_with_active", fails)
    monkeypatch.setattr(gd, "_give_way", lambda tries: None)
    monkeypatch.setattr(drive._access, "is_transient", lambda error: "locked" in str(error))
    with pytest.raises(peewee.OperationalError, match="locked"):
        workflow.pause(reason="vergaß es")
    workflow.pause(reason="vergaß es")
    assert reload(workflow).reason == "vergaß es"


def test_the_log_tells_the_reason_of_an_outcome(drive, caplog):
    caplog.set_level(logging.INFO, "geneva_drive")
    workflow = Reasoned.create(hero=User.create(name="withdrawn"))
    scheduled(workflow).execute()
    assert any(message.endswith("] canceled: is_withdrawn") for message in caplog.messages)


# ==== Resumable steps =================================================================================================


class Parcel(Model):
    label = CharField(unique=True)
    weight = IntegerField(default=1)

    class Meta:
        table_name = "test_parcels"


class Stamp(Model):
    parcel = ForeignKeyField(Parcel, backref="stamps")

    class Meta:
        table_name = "test_stamps"


@pytest.fixture
def table(db):
    """Makes tables for a test: `table(Parcel)`."""
    made = []

    def make(*models):
        for model in models:
            model.bind(db, bind_refs=False, bind_backrefs=False)
        db.drop_tables(models)
        db.create_tables(models)
        made.extend(models)

    yield make
    db.drop_tables(made)


@pytest.fixture
def parcels(table):
    """Makes parcels, labelled a, b, c, …"""

    def make(count):
        table(Parcel, Stamp)
        Parcel.insert_many([{"label": chr(97 + number)} for number in range(count)]).execute()

    return make


def cursors(workflow):
    return [each.cursor for each in workflow.execution_history]


def perform(workflow):
    """Perform the scheduled step as a consumer does, and no other; an error of the step is in its execution."""
    with contextlib.suppress(OddError):
        scheduled(workflow).execute()
    return reload(workflow)


def test_a_loop_goes_on_at_its_last_checkpoint_after_an_error(drive, hero, parcels):
    class Sends(Workflow):
        @step(resumable=True, on_exception=ExceptionPolicy("reattempt", wait=0))
        def send(self):
            for parcel in self.resume_over(Parcel, every=3):
                did(parcel.label)
                if effects().count("e") == 1 and parcel.label == "e":
                    raise OddError

        @step(resumable=True)
        def bill(self):
            assert self.cursor is None

    parcels(7)
    workflow = Sends.create(hero=hero)
    assert perform(perform(workflow)).current_step_name == "bill"
    assert effects() == [*"abcde", *"defg"]
    perform(workflow)
    assert history(workflow) == [
        ("send", "failed", "reattempted"),
        ("send", "completed", "success"),
        ("bill", "completed", "success"),
    ]
    assert cursors(workflow) == [3, 7, None]


# How an attempt ends that was at "half", what is done then from outside, and where the next one begins.
TRAVELS = {
    "error, policy reattempt": ("raise", None, "half"),
    "error, policy pause": ("raise", lambda workflow: workflow.resume(), "half"),
    "reattempt()": (lambda workflow: workflow.reattempt(), None, "half"),
    "reattempt() later": (lambda workflow: workflow.reattempt(wait=60), None, "half"),
    "reattempt(rewind=True)": (lambda workflow: workflow.reattempt(rewind=True), None, None),
    "rewound by a handler": ("raise", None, None),
    "reattempt(), paused meanwhile": (
        lambda workflow: (reload(workflow).pause(), workflow.reattempt()),
        lambda workflow: workflow.resume(),
        "half",
    ),
    "pause()": (lambda workflow: workflow.pause(), lambda workflow: workflow.resume(), "half"),
    "pause(), resume_at()": (lambda workflow: workflow.pause(), lambda workflow: workflow.resume_at("one"), None),
    "pause(), skip()": (lambda workflow: workflow.pause(), lambda workflow: workflow.skip(), None),
    "skip()": (lambda workflow: workflow.skip(), None, None),
    "death": ("die", None, "half"),
    "death, too many": ("die", lambda workflow: workflow.resume(), "half"),
    "connection lost": ("disconnect", None, "half"),
}


@pytest.mark.parametrize("name", TRAVELS)
def test_the_cursor_travels_to_the_next_attempt_at_the_step_and_no_other(db, drive, clock, hero, served, name):
    ending, afterwards, beginning = TRAVELS[name]
    policy = {"error, policy pause": "pause", "rewound by a handler": lambda self, error: self.reattempt(rewind=True)}

    class Travels(Workflow):
        @step(resumable=True, on_exception=policy.get(name, ExceptionPolicy("reattempt", wait=0)))
        def one(self):
            seen.append(self.cursor)
            if len(seen) > 1:
                return
            self.checkpoint("half")
            if ending == "raise":
                raise OddError
            if ending == "disconnect" and served:
                drop_connection(db)
                did("lost")
            if ending in ("die", "disconnect"):
                raise KeyboardInterrupt
            ending(self)

        @step(resumable=True)
        def two(self):
            seen.append(self.cursor)

    seen = []
    if name == "death, too many":
        drive.max_recoveries = 0
    workflow = Travels.create(hero=hero)
    with contextlib.suppress(OddError, KeyboardInterrupt, peewee.OperationalError, peewee.InterfaceError):
        scheduled(workflow).execute()
    if afterwards:
        afterwards(reload(workflow))
    assert cursors(workflow)[0] == "half"
    scheduled(workflow).execute()
    assert seen == [None, beginning]


def test_a_process_that_dies_leaves_its_cursor_to_the_next_attempt(database, db, drive, hero):
    class Dies(Workflow):
        @step(resumable=True)
        def one(self):
            for number in self.resume_over(range(10), every=2):
                did(str(number))
                if number == 5 and self.execution_history.count() == 1:
                    os.kill(os.getpid(), signal.SIGKILL)

    workflow = Dies.create(hero=hero)
    database.peewee.close()
    process = fork.Process(target=lambda: drive._perform(scheduled(workflow).id))
    process.start()
    process.join()
    drive.housekeeping()
    drive._perform(scheduled(workflow).id)
    assert effects() == [*"012345", *"456789"]
    assert cursors(workflow) == [4, 10]
    assert history(workflow) == [("one", "failed", "recovered"), ("one", "completed", "success")]


@pytest.mark.parametrize("call", ["pause", "cancel"])
def test_a_pause_or_cancel_from_outside_stops_a_step_at_its_next_checkpoint(drive, clock, hero, call):
    class Stops(Workflow):
        @step(resumable=True)
        def one(self):
            self.context["begun"] = self.cursor
            with contextlib.suppress(Exception):
                for number in self.resume_over(range(9), every=3):
                    did(str(number))
                    if number == 4:
                        getattr(reload(self), call)()

        @step
        def two(self):
            did("two")

    workflow = Stops.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert effects() == [*"012345"]
    assert history(workflow) == [("one", "canceled", "canceled")]
    row = reload(workflow)
    assert (row.context, row.pause_requested, cursors(row)) == ({"begun": None}, False, [6])
    if call == "cancel":
        assert (row.state, row.current_step_name) == ("canceled", None)
        return
    assert (row.state, row.current_step_name, row.transitioned_at) == ("paused", "one", START)
    row.resume()
    drive._perform(scheduled(row).id)
    assert effects() == [*"012345", *"678", "two"]
    assert reload(row).context == {"begun": 6}


def test_an_attempt_that_lost_its_claim_ends_at_its_next_checkpoint(drive, clock, hero, caplog):
    class Silent(Workflow):
        @step(resumable=True)
        def one(self):
            for number in self.resume_over(range(6), every=2):
                try:
                    did(str(number))
                    if number == 2 and self.execution_history.count() == 1:
                        clock.forward(hours=1)
                        housekeeping_elsewhere(drive)
                        gd._Attempt.claim(drive, scheduled(workflow).id)
                except Exception:
                    did("caught")

    workflow = Silent.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert effects() == [*"0123"]
    assert "the claim was lost" in caplog.text
    assert history(workflow) == [("one", "failed", "recovered"), ("one", "in_progress", None)]
    assert cursors(workflow) == [2, 2]


def test_a_stop_at_a_checkpoint_that_is_swallowed_lets_the_body_go_on_to_its_end(drive, hero, helpers, caplog):
    class Stubborn(Workflow):
        @step(resumable=True)
        def one(self):
            reload(workflow).pause()
            with contextlib.suppress(BaseException):
                self.checkpoint(1)
            did("went on")

        @step
        def two(self):
            pass

    workflow = Stubborn.create(hero=hero)
    helpers.perform_next_step(workflow)
    assert history(workflow) == [("one", "completed", "success"), ("two", "scheduled", None)]
    assert (reload(workflow).state, effects(), "swallowed" in caplog.text) == ("paused", ["went on"], False)


def test_an_attempt_whose_workflow_was_deleted_ends_at_its_next_checkpoint(drive, hero):
    class Gone(Workflow):
        @step(resumable=True)
        def one(self):
            reload(self).delete_instance()
            self.checkpoint(1)
            did("went on")

    drive._perform(scheduled(Gone.create(hero=hero)).id)
    assert effects() == []
    assert Workflow.select().count() == StepExecution.select().count() == 0


def test_a_checkpoint_is_a_heartbeat_and_may_keep_what_is_kept_already(drive, clock, hero):
    class Beats(Workflow):
        @step(resumable=True)
        def one(self):
            for moment in (START, START, START + timedelta(hours=1)):
                clock.now = moment
                self.checkpoint(7)
                assert self.execution_history.get().heartbeat_at == moment
            drive.housekeeping()

    workflow = Beats.create(hero=hero)
    clock.forward(seconds=-1)
    assert perform(workflow).state == "finished"


def test_any_json_value_makes_a_cursor_and_the_next_attempt_sees_it_as_this_one(drive, hero):
    values = [0, "", False, "\0\ud800 ü", 1.5, [1, [2]], (1, 2), {"a": None}, {7: "seven"}, "x" * 131_000, None]
    seen = []

    class Keeps(Workflow):
        @step(resumable=True)
        def one(self):
            place = self.execution_history.count() - 1
            seen.append(self.cursor)
            if place < len(values):
                self.checkpoint(values[place])
                assert self.cursor == json.loads(json.dumps(values[place]))
                if isinstance(self.cursor, dict):
                    self.cursor["unkept"] = True
                self.reattempt()

    workflow = Keeps.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert reload(workflow).state == "finished"
    assert seen == [None, *json.loads(json.dumps(values))]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({1, 2}, TypeError, "the cursor is not JSON: .*set"),
        (float("nan"), ValueError, "the cursor is not JSON"),
        ("x" * 132_000, ValueError, "the cursor takes 132002 bytes, over 131072"),
    ],
)
def test_what_no_cursor_can_be_is_refused_and_the_last_one_stays(drive, hero, value, error, message):
    class Refuses(Workflow):
        @step(resumable=True)
        def one(self):
            self.checkpoint("last")
            with pytest.raises(error, match=message):
                self.checkpoint(value)
            assert self.cursor == "last"

    assert perform(Refuses.create(hero=hero)).state == "finished"


def test_a_cursor_belongs_to_the_body_of_a_resumable_step(drive, hero):
    class Plainly(Workflow):
        @step
        def one(self):
            for use in USES.values():
                with pytest.raises(gd.StepConfigurationError, match=r"Plainly.one: .*@step\(resumable=True\)"):
                    use(self)

    workflow = Plainly.create(hero=hero)
    for name, use in USES.items():
        with pytest.raises(gd.StepConfigurationError, match=rf"Plainly {workflow.id}: {re.escape(name)} is for the"):
            use(workflow)
    assert perform(workflow).state == "finished"


USES = {
    "cursor": lambda workflow: workflow.cursor,
    "checkpoint()": lambda workflow: workflow.checkpoint(1),
    "resume_over()": lambda workflow: workflow.resume_over([1]),
}


@pytest.mark.parametrize(
    "uses", ["resume_over", "checkpoint, resume_over", "resume_over within", "resume_over, checkpoint"]
)
def test_a_step_has_one_cursor(drive, hero, uses):
    class Twice(Workflow):
        @step(resumable=True)
        def one(self):
            if uses == "checkpoint, resume_over":
                self.checkpoint(1)
            else:
                for _ in self.resume_over([1], every=5):
                    if uses == "resume_over within":
                        self.checkpoint(2)
            if uses == "resume_over, checkpoint":
                self.checkpoint(2)
            self.resume_over([1])

    workflow = Twice.create(hero=hero)
    with pytest.raises(gd.StepConfigurationError, match=r"Twice.one: .*cursor.*make two steps of them"):
        scheduled(workflow).execute()
    assert reload(workflow).state == "paused"


def test_within_the_bodys_own_transaction_a_checkpoint_commits_and_fails_with_the_writes(db, drive, hero):
    class Banks(Workflow):
        @step(resumable=True, on_exception=ExceptionPolicy("reattempt", wait=0))
        def one(self):
            with contextlib.suppress(OddError), db.atomic():
                self.checkpoint("undone")
                assert self.cursor == "undone"
                raise OddError
            for batch in range(self.cursor or 0, 4):
                with db.atomic():
                    did(str(batch))
                    self.checkpoint(batch + 1)
                    assert self.cursor == batch + 1
                    if batch == 2 and self.execution_history.count() == 1:
                        raise OddError
            assert self.cursor == 4

    workflow = Banks.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert effects() == [*"0123"]
    assert cursors(workflow) == [2, 4]


@pytest.mark.parametrize("call", ["pause", "cancel"])
def test_a_stop_within_the_bodys_own_transaction_undoes_both_its_writes_and_its_checkpoint(db, drive, hero, call):
    def stop(workflow):
        getattr(reload(workflow), call)()

    class Stopped(Workflow):
        @step(resumable=True)
        def one(self):
            for batch in range(self.cursor or 0, 4):
                if batch == 2 and self.execution_history.count() == 1:
                    stop(self)
                with db.atomic():
                    did(str(batch))
                    self.checkpoint(batch + 1)

    workflow = Stopped.create(hero=hero)
    drive._perform(scheduled(workflow).id)
    assert effects() == [*"01"]
    assert cursors(workflow) == [2]
    if call == "pause":
        reload(workflow).resume()
        drive._perform(scheduled(workflow).id)
        assert effects() == [*"0123"]


def test_a_transaction_that_stays_open_behind_a_checkpoint_holds_up_nothing_else(db, drive, clock, hero, served):
    class Long(Workflow):
        @step(resumable=True)
        def one(self):
            with db.atomic():
                self.checkpoint(1)
                if served:  # SQLite has one writer
                    clock.forward(hours=1)
                    helper = threading.Thread(target=look_after_the_others)
                    helper.start()
                    helper.join(timeout=30)

    def look_after_the_others():
        assert gd._heartbeat._beat() is None
        looked.append(other.execution_history.get().heartbeat_at)
        looked.append(drive.housekeeping()["stuck_in_progress_recovered"])
        db.close()

    looked, other, dead = [], Quick.create(hero=User.create()), Quick.create(hero=User.create())
    workflow = Long.create(hero=hero)
    gd._Attempt.claim(drive, scheduled(dead).id)
    gd._heartbeat.add(gd._Attempt.claim(drive, scheduled(other).id))
    assert perform(workflow).state == "finished"
    assert looked == ([START + timedelta(hours=1), 1] if served else [])
    gd._heartbeat.beating.clear()


def test_a_loop_within_a_transaction_would_keep_nothing_and_is_refused(db, drive, hero):
    class Wrapped(Workflow):
        @step(resumable=True)
        def one(self):
            with db.atomic():
                for _ in self.resume_over([1, 2]):
                    did("undone")

    workflow = Wrapped.create(hero=hero)
    with pytest.raises(gd.StepConfigurationError, match=r"Wrapped.one: resume_over\(\) within a transaction"):
        scheduled(workflow).execute()
    assert effects() == []


def test_a_consumer_that_drains_hands_a_step_on_at_a_checkpoint_and_an_inline_call_does_not(db, drive, hero):
    class Handed(Workflow):
        @step(resumable=True)
        def one(self):
            for number in self.resume_over(range(8), every=2):
                did(str(number))
                if number == 4 and not begun.is_set():
                    begun.set()
                    assert drive._dispatch.consumers["default"].stop_flag.wait(timeout=30)

    begun = threading.Event()
    workflow = Handed.create(hero=hero)
    drive.run(until=begun.is_set)
    assert effects() == [*"012345"]
    assert history(workflow) == [("one", "completed", "reattempted"), ("one", "scheduled", None)]
    following = scheduled(workflow)
    assert (following.cursor, following.reattempts, following.recoveries) == (6, 0, 0)
    assert following.job_id in {task.id for task in drive.huey.pending()}
    assert following.execute()
    other = Handed.create(hero=User.create())
    drive._perform(scheduled(other).id)  # in no consumer's worker
    assert history(other) == [("one", "completed", "success")]
    assert effects() == [str(number) for number in range(8)] * 2


def test_a_checkpoint_is_one_transaction_of_two_statements(db, drive, hero, monkeypatch):
    costs = Costs(db, monkeypatch)
    spent = []

    class Counted(Workflow):
        @step(resumable=True)
        def one(self):
            for value in (1, 2):
                spent.append(costs.of(lambda value=value: self.checkpoint(value))[1:])

    assert perform(Counted.create(hero=hero)).state == "finished"
    assert [(len(statements), transactions) for statements, transactions in spent] == [(2, 1)] * 2


def test_resumable_steps_work_inside_a_tests_own_transaction(db, drive, hero, helpers, parcels):
    class Sends(Workflow):
        @step(resumable=True)
        def one(self):
            for parcel in self.resume_over(Parcel, every=2):
                did(parcel.label)
                if parcel.label == "d" and self.execution_history.count() == 1:
                    reload(self).pause()

        @step(resumable=True, on_exception=ExceptionPolicy("reattempt", wait=0))
        def two(self):
            for number in range(self.cursor or 0, 3):
                with db.atomic():
                    did(str(number))
                    self.checkpoint(number + 1)
                    if number == 1 and self.cursor not in effects():
                        did(self.cursor)
                        raise OddError

    parcels(5)
    with db.atomic() as transaction:
        workflow = Sends.create(hero=hero)
        helpers.speedrun_workflow(workflow)
        assert (workflow.state, effects()) == ("paused", [*"abcd"])
        workflow.resume()
        helpers.perform_next_step(workflow)
        assert effects() == [*"abcde"]
        helpers.perform_next_step(workflow)
        assert cursors(workflow)[-2:] == [1, 1]
        transaction.rollback()
    nothing_written(drive)


def test_an_async_body_may_be_resumed(drive, hero):
    class Asynchronous(Workflow):
        @step(resumable=True)
        async def one(self):
            for number in self.resume_over(range(4), every=2):
                await asyncio.sleep(0)
                did(str(number))
                if number == 1:
                    reload(self).pause()

    workflow = Asynchronous.create(hero=hero)
    assert perform(workflow).state == "paused"
    reload(workflow).resume()
    assert perform(workflow).state == "finished"
    assert effects() == [*"0123"]


@pytest.mark.parametrize("is_sent", [True, False], ids=["sent", "timed out"])
def test_a_step_that_waited_for_a_signal_goes_on_at_its_cursor_and_does_not_wait_anew(drive, clock, hero, is_sent):
    class Waits(Workflow):
        @step(resumable=True, wait_for="go", timeout=60, on_timeout="run")
        def one(self):
            seen.append((self.signal_payload, self.cursor))
            if self.cursor is None:
                reload(self).pause()
            self.checkpoint("half")

    seen, payload = [], "now" if is_sent else None
    workflow = Waits.create(hero=hero)
    clock.forward(seconds=0 if is_sent else 60)
    if is_sent:
        workflow.signal("go", payload)
    drive._perform(workflow.execution_history.get().id)
    assert reload(workflow).state == "paused"
    reload(workflow).resume()
    assert perform(workflow).state == "finished"
    assert seen == [(payload, None), (payload, "half")]


# -- what can be gone over --


class Looped(Workflow):
    """Goes over what a test says, as it says, until it is interrupted; effects are what was visited."""

    items, how, interruptions = staticmethod(list), {}, ()

    @step(resumable=True, on_exception=ExceptionPolicy("reattempt", wait=0))
    def one(self):
        for place, item in enumerate(self.resume_over(self.items(), **self.how)):
            self.visited.append(item)
            if place in self.interruptions and self.execution_history.count() <= len(self.interruptions):
                raise OddError


def looped(monkeypatch, items, interruptions=(), **how):
    """What a loop visits, from its start to its end."""
    visited = []
    for name, value in {"items": staticmethod(items), "how": how, "interruptions": interruptions}.items():
        monkeypatch.setattr(Looped, name, value)
    monkeypatch.setattr(Looped, "visited", visited, raising=False)
    workflow = Looped.create(hero=User.create())
    while workflow.state == "ready":
        workflow = perform(workflow)
    assert workflow.state == "finished", history(workflow)
    return visited


def refusal(monkeypatch, items, cursor=None, **how):
    """How a loop is refused that begins at a cursor."""
    for name, value in {"items": staticmethod(items), "how": how, "interruptions": ()}.items():
        monkeypatch.setattr(Looped, name, value)
    visited = []
    monkeypatch.setattr(Looped, "visited", visited, raising=False)
    workflow = Looped.create(hero=User.create())
    scheduled(workflow)._write(cursor=cursor)
    assert perform(workflow).state == "ready"
    execution = workflow.execution_history.get()
    assert execution.error_class_name == "geneva_drive.StepConfigurationError"
    reload(workflow).cancel()
    return execution.error_message


def key_fields():
    """Fields that make a key, and ten values each, in their order on every database."""
    moments = [datetime(2026, 3, 1, 12, 0, number, 0 if number < 5 else 250) for number in range(10)]
    ids = sorted(uuid.uuid4() for _ in range(10))
    return {
        "int": (peewee.BigIntegerField(primary_key=True), [7 * number - 20 for number in range(10)]),
        "text": (CharField(primary_key=True), [f"{number} O'Brien % ü" for number in range(10)]),
        "UUID": (UUIDField(primary_key=True), ids),
        "binary UUID": (BinaryUUIDField(primary_key=True), ids),
        "moment": (gd._UtcField(primary_key=True), [each.replace(tzinfo=timezone.utc) for each in moments]),
        "naive moment": (peewee.DateTimeField(primary_key=True), [each.replace(microsecond=0) for each in moments]),
        "date": (peewee.DateField(primary_key=True), [each.date() + timedelta(each.second) for each in moments]),
        "Decimal": (
            peewee.DecimalField(primary_key=True, decimal_places=2),
            [Decimal(number) / 4 for number in range(10)],
        ),
    }


@pytest.mark.parametrize("kind", key_fields())
@pytest.mark.parametrize("is_descending", [False, pytest.param(True, marks=ELSEWHERE)], ids=["ascending", "descending"])
def test_a_query_is_gone_over_along_any_unique_key(drive, table, monkeypatch, kind, is_descending):
    field, values = key_fields()[kind]

    class Keyed(Model):
        code = field
        number = IntegerField(unique=True)

    table(Keyed)
    Keyed.insert_many([{"code": code, "number": -place} for place, code in enumerate(values)]).execute()
    order = -1 if is_descending else 1
    for every in (1, 3, 10, 11):
        key = Keyed.code.desc() if is_descending else Keyed.code
        visited = looped(monkeypatch, Keyed.select, (4, 3), key=key, every=every)
        assert list(dict.fromkeys(row.code for row in visited)) == values[::order]
        assert max(Counter(visited).values()) <= 3
        assert len(visited) <= 10 + 2 * every
    by_number = looped(monkeypatch, lambda: Keyed, key=-Keyed.number if is_descending else +Keyed.number, every=3)
    assert [row.code for row in by_number] == values[::-order]


def test_rows_come_as_the_query_says(parcels, monkeypatch, hero):
    parcels(5)
    Stamp.insert_many([{"parcel": number} for number in (1, 2, 2, 5)]).execute()
    query = Parcel.select(Parcel.label, Parcel.id)
    assert looped(monkeypatch, query.tuples, (2,), every=2)[-3:] == [("c", 3), ("d", 4), ("e", 5)]
    (last,) = looped(monkeypatch, query.where(Parcel.id == 5).namedtuples, every=2)
    assert (last.label, last.id, last._fields) == ("e", 5, ("label", "id"))
    assert looped(monkeypatch, query.dicts, every=2)[-1] == {"label": "e", "id": 5}
    joined = Stamp.select(Stamp, Parcel).join(Parcel)
    assert [(row.id, row.parcel.label) for row in looped(monkeypatch, lambda: joined, (1, 1), every=1)][-2:] == [
        *((3, "b"), (4, "e"))
    ]
    both = looped(monkeypatch, Stamp.select(Parcel.id, Stamp.id, Parcel.label).join(Parcel).dicts, every=3)
    assert [row["label"] for row in both] == [*"abbe"]
    assert {"label", "id"} < set(both[0]) != {gd.CURSOR_ALIAS}
    assert not any(gd.CURSOR_ALIAS in row for row in both)
    counted = Parcel.select(Parcel.id, peewee.fn.COUNT(Stamp.id)).left_outer_join(Stamp).group_by(Parcel.id)
    assert looped(monkeypatch, counted.tuples, (3,), every=2)[-3:] == [(3, 0), (4, 0), (5, 1)]
    stamped = Parcel.select().join(Stamp).distinct()
    assert [row.label for row in looped(monkeypatch, lambda: stamped, every=2)] == [*"abe"]
    alias = Parcel.alias()
    backwards = looped(monkeypatch, lambda: alias.select().where(alias.id < 4), key=alias.label.desc(), every=2)
    assert [row.label for row in backwards] == [*"cba"]
    second = Parcel.get(label="b")
    assert [row.id for row in looped(monkeypatch, lambda: second.stamps, every=1)] == [2, 3]
    assert looped(monkeypatch, lambda: Parcel.select().where(Parcel.id > 9)) == []
    assert looped(monkeypatch, lambda: User) == [hero, *User.select().where(User.id > hero.id).order_by(User.id)]


def test_a_key_may_be_a_foreign_key(drive, table, monkeypatch):
    class Receipt(Model):
        ticket = ForeignKeyField(Ticket, primary_key=True)

    class Note(Model):
        receipt = ForeignKeyField(Receipt, unique=True)

    table(Receipt, Note)
    tickets = sorted((Ticket.create(id=uuid.uuid4()) for _ in range(5)), key=lambda ticket: ticket.id)
    for ticket in tickets:
        Note.create(receipt=Receipt.create(ticket=ticket))
    visited = looped(monkeypatch, Receipt.select, (3,), every=2)
    assert [row.ticket_id for row in visited] == [ticket.id for ticket in (*tickets[:4], *tickets[2:])]
    visited = looped(monkeypatch, Note.select(Note.receipt).dicts, (3,), key=Note.receipt, every=2)
    assert [row["receipt"] for row in visited] == [ticket.id for ticket in (*tickets[:4], *tickets[2:])]


class Shelf:
    """A sequence that counts what is taken from it."""

    def __init__(self):
        self.taken = 0

    def __len__(self):
        return 7

    def __getitem__(self, place):
        self.taken += 1
        return range(7)[place]


SequenceType.register(Shelf)


@pytest.mark.parametrize(
    "items",
    [
        lambda: list(range(7)),
        lambda: range(7),
        lambda: iter(range(7)),
        lambda: (number for number in range(7)),
        lambda: dict.fromkeys(range(7)),
        lambda: dict.fromkeys(range(7)).keys(),
        lambda: deque(range(7)),
    ],
)
def test_anything_in_a_stable_order_is_gone_over_by_its_places(drive, monkeypatch, items):
    assert looped(monkeypatch, items, (3, 3), every=2) == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6]
    assert StepExecution.select().order_by(-StepExecution.id).get().cursor == 7
    for every in (1, 7, 8):
        assert looped(monkeypatch, items, every=every) == [*range(7)]


def test_of_what_is_done_in_a_sequence_nothing_is_taken_again_and_nothing_is_read_ahead(drive, monkeypatch):
    shelf, produced = Shelf(), []
    looped(monkeypatch, lambda: shelf, (4,), every=4)
    assert shelf.taken == 5 + 3

    def produce():
        for number in range(5):
            produced.append(number)
            assert len(produced) - 1 == len(Looped.visited)
            yield number

    assert looped(monkeypatch, produce, every=3) == produced


def test_nothing_to_go_over_needs_no_checkpoint(drive, monkeypatch):
    for items in (list, lambda: User.select().where(User.id < 0)):
        assert looped(monkeypatch, items) == []
        assert StepExecution.select().order_by(-StepExecution.id).get().cursor is None


def test_a_loop_that_is_left_keeps_what_it_kept(drive, hero):
    class Leaves(Workflow):
        @step(resumable=True)
        def one(self):
            for number in self.resume_over(range(9), every=2):
                if number == 5:
                    break

    workflow = Leaves.create(hero=hero)
    assert perform(workflow).state == "finished"
    assert cursors(workflow) == [4]


def test_rows_are_written_deleted_and_added_while_a_query_is_gone_over(drive, hero, parcels):
    class Changes(Workflow):
        @step(resumable=True)
        def one(self):
            for parcel in self.resume_over(Parcel.select().where(Parcel.weight == 1), every=2):
                did(parcel.label)
                parcel.weight = 2
                parcel.save()
                if parcel.label == "a":
                    Parcel.create(label="z")
                if parcel.label == "b":
                    Parcel.delete().where(Parcel.label == "d").execute()

    parcels(5)
    assert perform(Changes.create(hero=hero)).state == "finished"
    assert effects() == [*"abce", "z"]


def test_a_query_may_be_on_another_database(servers, drive, monkeypatch, hero):
    elsewhere = open_database(servers.empty("sqlite"))

    class Distant(Model):
        class Meta:
            database = elsewhere

    elsewhere.create_tables([Distant])
    Distant.insert_many([{"id": number} for number in range(1, 6)]).execute()
    visited = looped(monkeypatch, Distant.select, (3,), every=2)
    assert [row.id for row in visited] == [1, 2, 3, 4, 3, 4, 5]
    elsewhere.close()


class Odd(Model):
    number = IntegerField(null=True, unique=True)
    color = ColorField(unique=True)
    plain = IntegerField(default=0)

    class Meta:
        table_name = "test_odd"


class Pair(Model):
    one = IntegerField()
    two = IntegerField(unique=True)

    class Meta:
        primary_key = CompositeKey("one", "two")
        table_name = "test_pairs"


REFUSED_LOOPS = {
    "a set": (lambda: {1, 2}, {}, "not {1, 2}: sort a set"),
    "a number": (lambda: 7, {}, "takes a query, a model, or an iterable in a stable order, not 7"),
    "a key of a list": (lambda: [1], {"key": User.id}, "key is for queries"),
    "every 0": (lambda: [1], {"every": 0}, "every must be a positive int, not 0"),
    "every True": (lambda: [1], {"every": True}, "every must be a positive int, not True"),
    "a union": (lambda: User.select() | User.select(), {}, "takes the select() of a model, no other kind of query"),
    "raw SQL": (lambda: User.raw("select * from test_users"), {}, "takes the select() of a model"),
    "an order": (lambda: User.select().order_by(User.name), {}, "must have no order_by, limit or offset"),
    "a limit": (lambda: User.select().limit(3), {}, "must have no order_by, limit or offset"),
    "an offset": (lambda: User.select().offset(3), {}, "must have no order_by, limit or offset"),
    "another's key": (lambda: User, {"key": Effect.id}, "key must be a field of User, which is selected from"),
    "no field": (lambda: User, {"key": "id"}, "key must be a field of User, which is selected from, not 'id'"),
    "a key that repeats": (lambda: User, {"key": User.name}, "key must be unique and not null, as name is not"),
    "a key that may be null": (lambda: Odd, {"key": Odd.number}, "key must be unique and not null, as number is not"),
    "a collation": (lambda: User, {"key": User.id.desc(collation="x")}, "leave out collate()"),
    "two keys": (lambda: Pair, {}, "Pair has no primary key of one column: name a unique field as key"),
    "no key": (lambda: Keyless, {}, "Keyless has no primary key of one column"),
    "a key not selected": (lambda: User.select(User.name), {}, "the query must select the key, id, too"),
    "objects": (lambda: User.select().objects(dict), {}, "rows must be models, dicts or tuples"),
    "groups": (lambda: Odd.select().group_by(Odd.plain), {}, "a query with group_by must group by the key"),
    "a full join": (
        lambda: Odd.select().join(User, peewee.JOIN.FULL, on=(User.id == Odd.id)),
        {},
        "a right or full join makes rows without the key",
    ),
    "a key lost as text": (lambda: Odd, {"key": Odd.color}, "the key color is lost as text"),
    "a join that repeats rows": (
        lambda: User.select().join(Effect, on=(Effect.what == User.name)),
        {},
        "the key id is there twice, or null: a join repeats rows: use distinct()",
    ),
}


def test_what_cannot_be_gone_over_again_is_refused_and_nothing_visited(drive, hero, table, monkeypatch):
    table(Odd, Pair)
    Odd.create(color=Color.RED)
    did("ada")
    did("ada")
    for name, (items, how, message) in REFUSED_LOOPS.items():
        found = refusal(monkeypatch, items, **how)
        assert found.startswith("Looped.one: resume_over(): "), name
        assert message in found, name
        assert Looped.visited == [], name


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_row_that_a_join_repeats_is_noticed_at_the_edge_of_a_page_too(drive, parcels, monkeypatch, every):
    parcels(6)
    Stamp.insert_many([{"parcel": number} for number in (1, 2, 3, 4, 4, 5)]).execute()
    message = refusal(monkeypatch, Parcel.select().join(Stamp).switch, every=every)
    assert "the key id is there twice" in message
    assert {row.id for row in Looped.visited} <= {1, 2, 3}  # of the fourth, no page with but one of the two is visited


MISFITS = {
    "text for a place": (lambda: [1], "one"),
    "a place behind the end": (lambda: [1], 2),
    "a place behind an iterator's end": (lambda: iter([1]), 2),
    "a place before the start": (lambda: [1], -1),
    "text for a number": (lambda: User, "one"),
    "a number's text for a number": (lambda: User, "1"),
    "a list for a number": (lambda: User, [1]),
    "truth for a number": (lambda: User, True),
    "a number for text": (lambda: Country, 1),
    "a number for a UUID": (lambda: Ticket, 1),
    "other text for a UUID": (lambda: Ticket, "one"),
}


def test_a_cursor_of_another_loop_is_named_with_the_way_out(drive, hero, monkeypatch):
    for name, (items, cursor) in MISFITS.items():
        message = refusal(monkeypatch, items, cursor)
        beginning = f"Looped.one: resume_over(): cannot go on at the cursor {cursor!r}: the items were others"
        assert beginning in message, name
        assert "resume_at(), or with reattempt(rewind=True)" in message, name
        assert Looped.visited == [], name


def test_times_and_numbers_for_each_other_are_misfits_too(drive, table, monkeypatch):
    class Timed(Model):
        at = peewee.DateTimeField(primary_key=True)
        rate = peewee.DecimalField(unique=True)

    table(Timed)
    for key, cursor in ((None, 7), (None, "noon"), (Timed.rate, "noon"), (Timed.rate, 7)):
        assert "cannot go on at the cursor" in refusal(monkeypatch, lambda: Timed, cursor, key=key)


def test_a_handler_may_start_over_where_the_cursor_does_not_fit(drive, hero, helpers):
    class Mended(Workflow):
        @on_exception(gd.StepConfigurationError)
        def start_over(self, error):
            self.reattempt(rewind=True)

        @step(resumable=True)
        def one(self):
            for number in self.resume_over(range(3)):
                did(str(number))

    workflow = Mended.create(hero=hero)
    scheduled(workflow)._write(cursor="of a query")
    helpers.speedrun_workflow(workflow)
    assert workflow.state == "finished"
    assert effects() == [*"012"]


def test_a_graph_says_what_is_resumable():
    class Resumed(Workflow):
        @step(resumable=True)
        def one(self):
            pass

    assert '    start --> step1["one<br/>resumable"]' in Resumed.graph().splitlines()


# ==== Properties: random sequences against a model ====================================================================

# Hypothesis makes up sequences of moves: calls, messages, losses, deaths of the process, and within the bodies of steps
# further ones. Each move is made twice: by `Actual` on a drive, by `Imagined` on a model of the tables that is written
# from the contract and shares nothing with the engine. After each of them the rows must be those of the model; after a
# death, those that the model has after one of the commits that the move consists of, and nothing in between.
#
# More examples than in an ordinary run: GENEVA_DRIVE_TEST_EXAMPLES=5000 pytest -k random_sequence

# What became of an attempt: the state and outcome of its execution, and what the workflow does then.
WHAT_FOLLOWS = {
    "return": ("completed", "success", "advance"),
    "reattempt": ("completed", "reattempted", "repeat"),
    "reattempt later": ("completed", "reattempted", "repeat"),
    "rewind": ("completed", "reattempted", "repeat"),
    "skip": ("skipped", "skipped", "advance"),
    "skip_if": ("skipped", "skipped", "advance"),
    "cancel": ("canceled", "canceled", "cancel"),
    "cancel with children": ("canceled", "canceled", "cancel"),
    "cancel_if": ("canceled", "canceled", "cancel"),
    "hero gone": ("canceled", "canceled", "cancel"),
    "pause": ("canceled", "canceled", "pause"),
    "finish": ("completed", "success", "finish"),
    "error, policy pause": ("failed", "failed", "pause"),
    "error, policy reattempt": ("failed", "reattempted", "repeat"),
    "error, policy skip": ("skipped", "skipped", "advance"),
    "error, policy cancel": ("failed", "canceled", "cancel"),
    "error, policy finish": ("failed", "failed", "finish"),
    "timeout, skip": ("skipped", "skipped", "advance"),
    "death, reattempt": ("failed", "recovered", "repeat"),
    "death, pause": ("failed", "recovered", "pause"),
    "death, cancel": ("failed", "recovered", "cancel"),
}


class Refused(Exception):
    """Policy cancel."""


class Missing(Exception):
    """Policy skip."""


class Settled(Exception):
    """A handler that calls finish()."""


class Flaky(Exception):
    """Policy reattempt, twice and at once; then cancel."""


class Late(Exception):
    """Policy reattempt, once and after a minute; then skip."""


class Stubborn(Exception):
    """Policy reattempt, once and at once; then pause."""


# What a body may end with that is an error: the policy, how many reattempts, their wait in seconds, what follows them.
ERRORS = {
    OddError: ("pause", 0, 0, None),
    SystemExit: ("pause", 0, 0, None),
    gd.TransactionLeftOpenError: ("pause", 0, 0, None),
    Refused: ("cancel", 0, 0, None),
    Missing: ("skip", 0, 0, None),
    Settled: ("finish", 0, 0, None),
    Flaky: ("reattempt", 2, 0, "cancel"),
    Late: ("reattempt", 1, 60, "skip"),
    Stubborn: ("reattempt", 1, 0, "pause"),
}
THIS = "this one"  # in place of a workflow's place: the one that is being performed
LATER = 60  # seconds, for reattempt(wait=...)
SILENCE, OVERDUE, KEPT = timedelta(hours=1), timedelta(minutes=1), timedelta(days=30)
KEPT_OF_RECURRING = timedelta(minutes=90)
CATCH_UP = timedelta(minutes=10)  # of what recurs at each full hour
MAX_RECOVERIES = 2
SCRIPTED_STEPS = {"plain": 0, "banked": 0, "later": 90, "timed": 0, "awaits": 0, "gathers": 0, "last": 0}  # their waits
WAITS = {"awaits": "SignalTimeoutError", "gathers": "ChildrenTimeoutError"}  # for a signal, for children
LIMIT = timedelta(minutes=5)  # of those
BANKED = ("banked", "last")  # transactional; the others are resumable
ASKING = ("timed", "last")  # whose waits are computed


class Turn(typing.NamedTuple):
    """What the next attempt at a step does: its end, what happens during its body and after it, a change of context.

    Where it has a checkpoint, that comes after what happens during the body. `wait` is what a computed wait says, or an
    error of it.
    """

    end: str | type[BaseException] = "return"
    during: tuple = ()
    after: tuple = ()
    context: str | None = None
    checkpoint: bool = False
    wait: int | type[BaseException] | None = None


class Move(typing.NamedTuple):
    """A move, the turns that are taken meanwhile, and when, if at all, the process dies."""

    name: str
    arguments: tuple = ()
    turns: tuple = ()
    dies: tuple | None = None  # ("statement", 3): before the fourth; ("commit", 0): right after the first


class Scripted(Workflow):
    """Every attempt at a step takes the next turn of the sequence that is being played."""

    exception_policies = [
        ExceptionPolicy(
            policy, matching=error, wait=wait, jitter=0, max_reattempts=limit, terminal_action=terminal or "pause"
        )
        for error, (policy, limit, wait, terminal) in ERRORS.items()
        if policy != "finish" and error not in (OddError, SystemExit, gd.TransactionLeftOpenError)
    ]
    playing = None
    turn = None

    @on_exception(Settled)
    def settle(self, error):
        self.finish()

    @cancel_if
    def is_withdrawn(self):
        self.turn = self.playing.next_turn()
        return self.turn.end == "cancel_if"

    def is_superfluous(self):
        return self.turn.end == "skip_if"

    def moment(self):
        if isinstance(self.turn.wait, type):
            raise self.turn.wait
        return self.turn.wait

    def body(self):
        number = self._attempt.execution.number
        did(f"{self.token} {number}")
        self.playing.happen_here(self, self.turn.during)
        if self.turn.checkpoint and self.current_step_name not in BANKED:
            self.checkpoint([number])
        change(self.context, self.turn.context, number)
        if self.turn.end is gd.TransactionLeftOpenError:
            self.playing.db.session_start()
        elif isinstance(self.turn.end, type):
            raise self.turn.end
        elif self.turn.end == "reattempt later":
            self.reattempt(wait=LATER)
        elif self.turn.end == "rewind":
            self.reattempt(rewind=True)
        elif self.turn.end == "cancel with children":
            self.cancel(children=True)
        elif self.turn.end != "return":
            getattr(self, self.turn.end)(reason=f"I {self.turn.end}")

    plain = step("body", skip_if="is_superfluous", resumable=True)
    banked = step("body", skip_if="is_superfluous", transactional=True)
    later = step("body", skip_if="is_superfluous", wait=SCRIPTED_STEPS["later"], resumable=True)
    timed = step("body", skip_if="is_superfluous", wait="moment", resumable=True)
    awaits = step("body", skip_if="is_superfluous", resumable=True, wait_for="go", timeout=LIMIT, on_timeout="skip")
    gathers = step(
        "body", skip_if="is_superfluous", resumable=True, wait_for_children=True, timeout=LIMIT, on_timeout="skip"
    )
    last = step("body", skip_if="is_superfluous", wait="moment", transactional=True)

    def after_step_execution(self, execution):
        if self.turn:
            self.playing.happen_here(self, self.turn.after)


class Recurring(Scripted):
    """Recurs, without a hero, as long as a sequence is being played."""

    may_proceed_without_hero = True
    delete_completed_after = KEPT_OF_RECURRING


def change(context, key, value):
    """What turns and notes do to a context: set a key, or take it away."""
    if key and key.startswith("-"):
        context.pop(key[1:], None)
    elif key:
        context[key] = value


# -- the model --


@dataclasses.dataclass
class ImaginedExecution:
    serial: int
    step: str
    due: datetime
    state: str = "scheduled"
    outcome: str | None = None
    reattempts: int = 0
    recoveries: int = 0
    error: str | None = None
    heard_of: datetime | None = None
    finished: datetime | None = None
    cursor: list | None = None
    since: datetime | None = None  # when the wait for a signal or children began
    limit: datetime | None = None  # of that
    reached: datetime | None = None
    asks: bool | None = None  # the computed wait
    reason: str | None = None
    begun: str | None = None  # why it was resumed
    signal: int | None = None  # the place of the one that it was given


@dataclasses.dataclass
class ImaginedWorkflow:
    hero: int | None
    allow_multiple: bool
    parent: "ImaginedWorkflow | None" = None
    occurs: datetime | None = None
    state: str = "ready"
    step: str | None = "plain"
    pause_requested: bool = False
    context: dict = dataclasses.field(default_factory=dict)
    transitioned: datetime | None = None
    reason: str | None = None
    executions: list = dataclasses.field(default_factory=list)
    effects: list = dataclasses.field(default_factory=list)  # the numbers of the executions that left one, for good
    signals: list = dataclasses.field(default_factory=list)  # what each says, and when it was consumed

    @property
    def pending(self):
        """The place of the first signal that is there to be given, or None."""
        return next((place for place, (_, consumed) in enumerate(self.signals) if consumed is None), None)

    @property
    def is_over(self):
        return self.state in ("finished", "canceled")

    @property
    def kept(self):
        return KEPT_OF_RECURRING if self.occurs else KEPT

    @property
    def active(self):
        newest = self.executions[-1]
        return newest if newest.state in ("scheduled", "waiting", "in_progress") else None


class Imagined:
    """The tables as the contract has them."""

    def __init__(self, now, run_on, on_death, one_writer):
        self.now, self.run_on, self.on_death, self.one_writer = now, run_on, on_death, one_writer
        self.workflows, self.present_heroes = [], {0, 1, 2}
        self.commits, self.observed, self.turns = [], [], []
        self.serials, self.in_transaction, self.performed = itertools.count(), False, []
        self.recurs = True

    def commit(self):
        if not self.in_transaction:
            self.commits.append(copy.deepcopy((self.workflows, self.present_heroes)))

    def make(self, move):
        """Make a move; the states that the tables have on the way are in `commits`, what callers see in `observed`."""
        self.commits, self.observed, self.turns, self.performed = [], [], list(move.turns), []
        self.commit()
        self.happen([(move.name, *move.arguments)])

    def happen(self, events):
        for name, *arguments in events:
            self.observed.append(getattr(self, name)(*arguments))

    def happen_here(self, workflow, events):
        self.performed.append(workflow)
        self.happen(events)
        self.performed.pop()

    def transact(self, is_kept, events):
        kept, self.in_transaction = (self.workflows, self.performed), True
        if not is_kept:
            self.workflows, self.performed = copy.deepcopy(kept)
        self.happen(events)
        self.in_transaction = False
        if not is_kept:
            self.workflows, self.performed = kept
        self.commit()

    def forward(self, seconds):
        self.now += timedelta(seconds=seconds)

    def hero(self, number):
        self.present_heroes ^= {number}
        self.commit()

    def create(self, hero, allow_multiple, parent_at=None):
        parent = None if parent_at is None else self.find(parent_at)
        if parent and parent.is_over:
            return "refused"
        if not allow_multiple and self.has_ongoing(hero):
            return "ongoing"
        self.workflows.append(ImaginedWorkflow(hero, allow_multiple, parent))
        self.schedule(self.workflows[-1], "plain", self.now)
        self.commit()
        return "ok"

    def create_many(self, heroes, on_conflict, parent_at=None):
        parent = None if parent_at is None else self.find(parent_at)
        if parent and parent.is_over:
            return "refused"
        free = [hero for hero in heroes if not self.has_ongoing(hero)]
        if on_conflict == "raise" and free != list(heroes):
            return "ongoing"
        for hero in free:
            self.workflows.append(ImaginedWorkflow(hero, False, parent))
            self.schedule(self.workflows[-1], "plain", self.now)
        self.commit()
        return len(free)

    def has_ongoing(self, hero):
        return hero is not None and any(
            each.hero == hero and not each.is_over and not each.allow_multiple for each in self.workflows
        )

    def schedule(self, workflow, step_name, due, **values):
        execution = ImaginedExecution(next(self.serials), step_name, due, **{"reached": self.now, **values})
        workflow.executions.append(execution)
        if step_name in WAITS:
            execution.since, execution.limit = execution.since or due, execution.limit or due + LIMIT
            must_wait = execution.limit > due and self.lacks(workflow, step_name)
            execution.state = "waiting" if must_wait else "scheduled"

    def lacks(self, workflow, step_name):
        """Whether what a step waits for is not there."""
        return bool(self.ongoing_children(workflow)) if step_name == "gathers" else workflow.pending is None

    def ongoing_children(self, workflow):
        return [each for each in self.workflows if each.parent is workflow and not each.is_over]

    def cancel_children(self, workflow, reason):
        for child in self.ongoing_children(workflow):
            self.cancel(child, reason or "canceled with its parent")
            self.cancel_children(child, reason)

    def cancel(self, workflow, reason):
        if workflow.active and workflow.active.state != "in_progress":
            self.end(workflow.active, "canceled", "canceled", reason)
        workflow.state, workflow.step, workflow.pause_requested = "canceled", None, False
        workflow.transitioned, workflow.reason = self.now, reason

    def tell_parent(self, workflow):
        """A child may have ended: the parent that waits for that is woken by the last one."""
        parent = workflow.parent
        if not (parent and workflow.is_over and parent.state == "ready") or self.ongoing_children(parent):
            return
        if parent.active.state == "waiting" and parent.active.step == "gathers":
            self.wake(parent.active)

    def enter(self, workflow, step_name, wait=0, **carried):
        """Go on with a step after a call from outside."""
        workflow.state, workflow.step, workflow.transitioned, workflow.reason = "ready", step_name, None, None
        self.schedule(workflow, step_name, self.now + timedelta(seconds=wait), **carried)

    def wake(self, execution):
        execution.state, execution.due = "scheduled", max(execution.due, self.now)

    def consume(self, workflow, step_name):
        """What was given to the attempts at a step is used up with it."""
        for each in workflow.executions:
            if each.step == step_name and each.finished and each.signal is not None:
                says, consumed = workflow.signals[each.signal]
                workflow.signals[each.signal] = says, consumed or self.now

    def end(self, execution, state, outcome, reason=None):
        execution.state, execution.outcome, execution.finished = state, outcome, self.now
        execution.reason = reason

    def find(self, place):
        """The workflow that is being performed, or one counted from the newest; None if there is none."""
        if place == THIS:
            return self.performed[-1] if any(each is self.performed[-1] for each in self.workflows) else None
        return self.workflows[-1 - place % len(self.workflows)] if self.workflows else None

    def call(self, place, call, *arguments):
        workflow = self.find(place)
        if workflow is None:
            return None
        state, active = workflow.state, workflow.active
        if call == "cancel" and not workflow.is_over:
            self.cancel(workflow, "cancel")
            if arguments == (True,):
                self.cancel_children(workflow, "cancel")
        elif call == "pause" and state == "ready":
            workflow.state, workflow.transitioned, workflow.reason = "paused", self.now, "pause"
        elif call == "pause" and state == "performing" and not workflow.pause_requested:
            workflow.pause_requested, workflow.reason = True, "pause"
        elif call == "skip" and state in ("ready", "paused"):
            if active is None:
                self.schedule(workflow, workflow.step, self.now, reached=workflow.executions[-1].reached)
                workflow.executions[-1].since = workflow.executions[-1].limit = None
            self.end(workflow.executions[-1], "skipped", "skipped", "skip")
            self.consume(workflow, workflow.step)
            following = step_behind(workflow.step)
            if following:
                self.enter(workflow, following, SCRIPTED_STEPS[following], asks=following in ASKING or None)
            else:
                workflow.state, workflow.step, workflow.transitioned = "finished", None, self.now
                workflow.reason = None
        elif call == "resume" and state == "paused" and active:
            workflow.state, workflow.transitioned, workflow.reason = "ready", None, None
            active.reattempts, active.recoveries, active.begun = 0, 0, "resume"
            if active.state == "waiting" and not self.lacks(workflow, active.step):
                self.wake(active)
        elif call == "resume" and state == "paused":
            newest = workflow.executions[-1]
            # Else it goes on, and does not wait anew.
            since, limit = (None, None) if newest.cursor is None else (newest.since, newest.limit)
            carried = {"asks": newest.asks, "reached": newest.reached, "begun": "resume"}
            self.enter(workflow, workflow.step, cursor=newest.cursor, since=since, limit=limit, **carried)
        elif call == "resume_at" and (state == "paused" or (workflow.is_over and not active)):
            if workflow.is_over and not workflow.allow_multiple and self.has_ongoing(workflow.hero):
                return "ongoing"
            if active:
                self.end(active, "canceled", "canceled")
            self.enter(workflow, *arguments, begun="resume_at")
        elif call == "reschedule" and state in ("ready", "paused") and active:
            self.reschedule(active, *arguments)
        else:
            return "refused"
        self.tell_parent(workflow)
        self.commit()
        return "ok"

    def reschedule(self, execution, seconds=None):
        declared = max(execution.reached + timedelta(seconds=SCRIPTED_STEPS[execution.step]), self.now)
        if seconds is not None and execution.state == "waiting":
            execution.limit = self.now + timedelta(seconds=seconds)
        elif seconds is not None:
            execution.due, execution.asks = self.now + timedelta(seconds=seconds), None
        elif execution.state == "waiting":
            execution.since = execution.due = execution.since if execution.since <= self.now else declared
            execution.limit = max(execution.since + LIMIT, self.now)
        else:
            execution.due, execution.asks = declared, execution.step in ASKING or None

    def note(self, place, key, value):
        workflow = self.find(place)
        if workflow is None:
            return None
        change(workflow.context, key, value)
        self.commit()
        return "ok"

    def signal(self, place, says):
        workflow = self.find(place)
        if workflow is None or workflow.is_over:
            return workflow and "refused"
        workflow.signals.append((says, None))
        active = workflow.active
        if workflow.state == "ready" and active.state == "waiting" and active.step == "awaits":
            self.wake(active)
        self.commit()
        return "ok"

    def write(self, workflow, read, changed):
        """The keys that were changed in what was read, onto what others left."""
        for key in {*read, *changed}:
            if key not in changed:
                workflow.context.pop(key, None)
            elif key not in read or read[key] != changed[key]:
                workflow.context[key] = changed[key]

    def housekeeping(self, seconds):
        self.forward(seconds)
        silent = [
            (workflow, execution)
            for workflow in self.workflows
            for execution in workflow.executions
            if execution.state == "in_progress" and execution.heard_of < self.now - SILENCE
        ]
        for workflow, execution in sorted(silent, key=lambda pair: pair[1].serial):
            times = f" {execution.recoveries + 1} times" if execution.recoveries else ""
            self.record(workflow, execution, self.death(execution), reason=f"its process died{times}")
        self.occur()
        deleted = [workflow for condition in gd._drive()._access.dialect.over for workflow in self.clean_up(condition)]
        return len(silent), len(deleted), sum(len(each.executions) for each in deleted)

    def clean_up(self, condition):
        """Delete the workflows in the states of a condition: a commit for each type, Recurring before Scripted."""
        for recurs in (True, False):
            of_type = [
                each for each in self.workflows if bool(each.occurs) is recurs and f"'{each.state}'" in condition
            ]
            old = [each for each in of_type if self.is_expired(each)]
            self.workflows = [each for each in self.workflows if not any(each is one for one in old)]
            for each in self.workflows:
                each.parent = None if any(each.parent is one for one in old) else each.parent
            self.commit()
            yield from old

    def occur(self):
        hour = self.now.replace(minute=0, second=0)
        occurrences = [each for each in self.workflows if each.occurs]
        is_there = any(each.occurs >= hour or not each.is_over for each in occurrences)
        if self.recurs and hour > self.now - CATCH_UP and not is_there:
            self.workflows.append(ImaginedWorkflow(None, False, occurs=hour))
            self.schedule(self.workflows[-1], "plain", self.now)
            self.commit()

    def is_expired(self, workflow):
        is_kept = workflow.parent and not workflow.parent.is_over
        return workflow.is_over and workflow.transitioned < self.now - workflow.kept and not is_kept

    def death(self, execution):
        exhausted = self.on_death == "reattempt" and execution.recoveries >= MAX_RECOVERIES
        return f"death, {'pause' if exhausted else self.on_death}"

    def deliver(self, place, number):
        """The message for an execution arrives; not for the first time, perhaps."""
        return self.perform(place, number, "task")

    def perform(self, place, number, how):
        workflow = self.find(place)
        if workflow is None:
            return None
        execution = workflow.executions[-1 - number % len(workflow.executions)]
        is_there = execution.state == "scheduled" and (how != "task" or execution.due <= self.now)
        is_late = execution.state == "waiting" and execution.limit <= self.now
        if not (is_there or is_late) or workflow.state != "ready":
            return False if how != "task" else None
        self.claim(workflow, execution)
        self.commit()
        following, raised = (None, None) if how == "claim" else self.attempt(workflow, execution, how)
        is_run_on = True
        while following and raised is None:
            following, raised = self.attempt(workflow, following, how, is_run_on)
        return raised or (None if how == "task" else True)

    def claim(self, workflow, execution):
        workflow.state, execution.state, execution.heard_of = "performing", "in_progress", self.now

    def attempt(self, workflow, execution, how, is_run_on=False):
        """One attempt; returns the execution that it runs on with, and the name of the error that leaves the task."""
        number, is_banked = len(workflow.executions), execution.step in BANKED
        if not self.is_ours(workflow, execution):
            return None, None
        if is_run_on and (workflow.state == "canceled" or workflow.pause_requested):
            # Decided on during what happened after the step before: this one does not even begin.
            end = "cancel" if workflow.state == "canceled" else "pause"
            self.record(workflow, execution, end, reason=workflow.reason)
            return None, None
        if workflow.hero not in {*self.present_heroes, None}:
            self.record(workflow, execution, "hero gone", reason="the hero is gone")
            return None, None
        turn, begins = self.turns.pop(0) if self.turns else Turn(), True
        if execution.asks and turn.end != "cancel_if":
            if isinstance(turn.wait, type):
                turn, begins = turn._replace(end=turn.wait), False
            elif how != "execute" and execution.reached + timedelta(seconds=turn.wait or 0) > self.now:
                execution.state, execution.due = "scheduled", execution.reached + timedelta(seconds=turn.wait)
                workflow.state = "ready"
                self.commit()
                self.happen_here(workflow, turn.after)
                return None, None
            else:
                execution.asks = None
                self.commit()
                if is_banked:  # what was asked outside of the transaction is asked again in it
                    turn = self.turns.pop(0) if self.turns else Turn()
        read, changed = dict(workflow.context), dict(workflow.context)
        given = workflow.pending if execution.step == "awaits" and turn.end not in ("cancel_if", "skip_if") else None
        is_looked = execution.step in WAITS and turn.end not in ("cancel_if", "skip_if")
        if is_looked and self.lacks(workflow, execution.step):
            if execution.limit > self.now:
                assert execution.step == "gathers"  # no signal is taken away again, but there may be new children
                self.put_back(workflow, execution)
                self.happen_here(workflow, turn.after)
                return None, None
            execution.error = WAITS[execution.step]
            waited = gd._span(max(execution.limit - execution.since, timedelta(0)))
            reason = (
                f"no signal go within {waited}" if execution.step == "awaits" else f"children were ongoing for {waited}"
            )
            may_run_on = how == "task" and self.run_on
            following = self.record(workflow, execution, "timeout, skip", may_run_on=may_run_on, reason=reason)
            self.happen_here(workflow, turn.after)
            return following, None
        reason = None
        if turn.end not in ("cancel_if", "skip_if") and begins:
            if not is_banked:
                workflow.effects.append(number)
                self.commit()
            if not (is_banked and self.one_writer):
                self.happen_here(workflow, turn.during)
            if turn.checkpoint and not is_banked:
                turn, reason = self.checkpoint(workflow, execution, turn)
            change(changed, turn.context, number)
        error = turn.end if isinstance(turn.end, type) else None
        if error:
            text = f"the step {execution.step} left a transaction open; it was rolled back: use db.atomic()"
            reason = f"{error.__name__}{f': {text}' if error is gd.TransactionLeftOpenError else ''}"
        if error is KeyboardInterrupt:
            end, raised = self.death(execution), error
        elif error:
            policy, limit, _, terminal = ERRORS[error]
            policy = terminal if policy == "reattempt" and execution.reattempts >= limit else policy
            end = f"error, policy {policy}"
            raised = error if policy in ("pause", "cancel") or error is SystemExit else None
        else:
            end, raised = turn.end, None
            told = {"cancel_if": "is_withdrawn", **{each: f"I {each}" for each in USUAL_CALLS}}
            reason = reason or told.get(end)
        is_ours, following = self.is_ours(workflow, execution), None
        if is_ours:
            execution.signal = given
            if error:
                execution.error = error.__name__
            elif is_banked and end not in ("cancel_if", "skip_if"):
                workflow.effects.append(number)
            if not (error and is_banked):
                self.write(workflow, read, changed)
            may_run_on = how == "task" and self.run_on and not raised
            following = self.record(workflow, execution, end, error, may_run_on, reason)
            self.happen_here(workflow, turn.after)
        return following, raised and raised.__name__

    def put_back(self, workflow, execution):
        """The execution waits after all."""
        if workflow.state == "canceled":
            self.end(execution, "canceled", "canceled", workflow.reason)
        else:
            execution.state, execution.heard_of = "waiting", None
            workflow.state = "paused" if workflow.pause_requested else "ready"
            workflow.transitioned = self.now if workflow.pause_requested else None
            workflow.pause_requested = False
        self.commit()

    def checkpoint(self, workflow, execution, turn):
        """Returns how the body goes on, if it does, and why it does not."""
        if not self.is_ours(workflow, execution):
            return Turn(), None
        execution.cursor, execution.heard_of = [len(workflow.executions)], self.now
        self.commit()
        if workflow.state == "canceled" or workflow.pause_requested:
            return Turn("cancel" if workflow.state == "canceled" else "pause", after=turn.after), workflow.reason
        return turn, None

    def is_ours(self, workflow, execution):
        is_kept = any(each is workflow for each in self.workflows)
        return is_kept and execution is workflow.executions[-1] and execution.state == "in_progress"

    def record(self, workflow, execution, end, error=None, may_run_on=False, reason=None):
        state, outcome, then = WHAT_FOLLOWS[end]
        self.end(execution, state, outcome, reason)
        if then in ("advance", "finish"):
            self.consume(workflow, execution.step)
        following = None
        if workflow.state != "canceled":
            is_pausing, workflow.pause_requested = workflow.pause_requested, False
            if then == "repeat":
                wait = LATER if end == "reattempt later" else ERRORS[error][2] if error in ERRORS else 0
                reattempts = execution.reattempts + end.startswith("error")
                recoveries = execution.recoveries + end.startswith("death")
                due, cursor = self.now + timedelta(seconds=wait), None if end == "rewind" else execution.cursor
                carried = {"reattempts": reattempts, "recoveries": recoveries, "limit": execution.limit}
                carried.update(since=execution.since, reached=execution.reached, asks=execution.asks)
                self.schedule(workflow, execution.step, due, cursor=cursor, **carried)
            elif then == "advance" and step_behind(execution.step):
                name = step_behind(execution.step)
                due = self.now + timedelta(seconds=SCRIPTED_STEPS[name])
                self.schedule(workflow, name, due, asks=name in ASKING or None)
            if workflow.active:
                workflow.state = "paused" if is_pausing else "ready"
                workflow.step = workflow.active.step
                is_next = workflow.active.due <= self.now and workflow.active.step not in WAITS
                if may_run_on and not is_pausing and is_next:
                    following = workflow.active
                    self.claim(workflow, following)
            else:
                workflow.state = {"pause": "paused", "cancel": "canceled"}.get(then, "finished")
                workflow.step = execution.step if then == "pause" else None
            workflow.transitioned = None if workflow.state in ("ready", "performing") else self.now
            own = reason if then in ("pause", "cancel", "finish") else None
            workflow.reason = own or (workflow.reason if is_pausing and workflow.state == "paused" else None)
        if end == "cancel with children":
            self.cancel_children(workflow, workflow.reason)
        self.tell_parent(workflow)
        self.commit()
        return following


def step_behind(name):
    names = list(SCRIPTED_STEPS)
    return names[names.index(name) + 1] if name != names[-1] else None


def picture(workflows, heroes):
    """The model's tables as `Actual.picture` has the real ones."""
    return [
        {
            "hero": None if each.hero is None else heroes[each.hero],
            "occurs": each.occurs,
            "parent": next((place for place, one in enumerate(workflows) if one is each.parent), None),
            "ongoing children": sum(one.parent is each and not one.is_over for one in workflows),
            "allow_multiple": each.allow_multiple,
            "state": each.state,
            "step": each.step,
            "pause_requested": each.pause_requested,
            "context": each.context,
            "transitioned": each.transitioned,
            "reason": each.reason,
            "executions": [
                (
                    *(one.step, one.state, one.outcome, one.due, one.reattempts, one.recoveries),
                    *(one.error, one.finished, one.cursor, one.since, one.limit, one.reached, one.asks),
                    *(one.reason, one.begun, one.signal),
                )
                for one in each.executions
            ],
            "signals": each.signals,
            "effects": sorted(each.effects),
        }
        for each in workflows
    ]


# -- the drive --


class Died(GreenletExit):
    """What a killed process does not live to see: raised by every statement once it is dead; no error of a step's."""


class MortalProcess:
    """Lets this process die, as far as a database can tell, before its nth statement or right after its nth commit."""

    def __init__(self, db):
        self.db, self.dies = db, None

    @contextlib.contextmanager
    def living_until(self, dies):
        self.dies = dies
        self.db.cursor, self.db.commit = self.cursor, self.commit  # all of Peewee's statements pass through them
        try:
            yield
        finally:
            del self.db.cursor, self.db.commit

    def cursor(self, *arguments, **options):
        self.live_on("statement")
        return type(self.db).cursor(self.db, *arguments, **options)

    def commit(self):
        type(self.db).commit(self.db)
        self.live_on("commit")  # else nothing could happen between a commit and what is to follow it

    def live_on(self, what):
        if self.dies is None or threading.current_thread().name == "geneva-drive-heartbeat":
            return
        cause, left = self.dies
        if left == 0 and cause in (what, "dead"):
            self.dies = ("dead", 0)
            raise Died
        if cause == what:
            self.dies = (cause, left - 1)


def disconnect(db):
    """End this thread's connection as the server does when the process is gone: what was open is rolled back."""
    if not db.is_closed():
        connection = db.connection()
        if gd._is_in_transaction(connection):
            connection.cursor().execute("ROLLBACK")
        connection.close()
    db.dispose()


class RolledBack(Exception):
    pass


class Actual:
    """A drive, real rows and a queue."""

    def __init__(self, db, huey, run_on, on_death):
        self.db, self.process = db, MortalProcess(db)
        self.drive = GenevaDrive(
            db,
            huey=huey,
            clock=Clock(),
            run_on=timedelta(days=1) if run_on else 0,
            stuck_recovery_action=on_death,
            max_recoveries=MAX_RECOVERIES,
            stuck_in_progress_threshold=SILENCE,
            stuck_scheduled_threshold=OVERDUE,
            delete_completed_workflows_after=KEPT,
        )
        self.clock, self.huey, self.one_writer = self.drive.clock, self.drive.huey, isinstance(db, SqliteDatabase)
        for model in [*reversed(gd.MODELS), *MODELS]:
            model.delete().execute()
        self.heroes = [User.create().id for _ in range(3)]
        self.observed, self.turns, self.performed = [], [], []
        Scripted.playing = self

    def make(self, move):
        """Make a move; returns whether the process lived through it. What callers saw is in `observed`."""
        self.observed, self.turns, self.performed = [], list(move.turns), []
        try:
            with self.process.living_until(move.dies):
                self.happen([(move.name, *move.arguments)])
        except Died:
            disconnect(self.db)
            gd._heartbeat.beating.clear()
            return False
        return True

    def happen(self, events):
        for name, *arguments in events:
            try:
                observed = getattr(self, name)(*arguments)
            except Exception as error:  # the engine would take it for the error of a step that this happens in
                observed = repr(error)
            self.observed.append(observed)

    def happen_here(self, workflow, events):
        self.performed.append(workflow.id)
        if not self.db.in_transaction():
            self.happen(events)
        elif events and not self.one_writer:  # the step's own transaction must have no part in this
            self.elsewhere(lambda: self.happen(events))
        self.performed.pop()

    def elsewhere(self, work):
        """Do something on a connection of its own."""
        deaths = []

        def run():
            try:
                work()
            except Died as death:
                deaths.append(death)
            finally:
                disconnect(self.db)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if deaths:
            raise Died

    def next_turn(self):
        return self.turns.pop(0) if self.turns else Turn()

    def transact(self, is_kept, events):
        with contextlib.suppress(RolledBack), self.db.atomic():
            self.happen(events)
            if not is_kept:
                raise RolledBack

    def forward(self, seconds):
        self.clock.forward(seconds=seconds)

    def hero(self, number):
        # One statement, so that the process cannot die in between.
        if not User.delete().where(User.id == self.heroes[number]).execute():
            User.insert(id=self.heroes[number]).execute()

    def create(self, hero, allow_multiple, parent_at=None):
        parent = None if parent_at is None else self.find(parent_at)
        try:
            Scripted.create(hero=User(id=self.heroes[hero]), allow_multiple=allow_multiple, parent=parent)
        except gd.InvalidStateError:
            return "refused"
        except gd.AlreadyOngoingError as error:
            return "ongoing" if Workflow.ongoing().where(Workflow.id == error.workflow_id).exists() else "a ghost"
        return "ok"

    def create_many(self, heroes, on_conflict, parent_at=None):
        parent = None if parent_at is None else self.find(parent_at)
        try:
            return Scripted.create_many([User(id=self.heroes[hero]) for hero in heroes], on_conflict, parent=parent)
        except gd.InvalidStateError:
            return "refused"
        except gd.AlreadyOngoingError:
            return "ongoing"

    def find(self, place):
        if place == THIS:
            return Workflow.get_or_none(Workflow.id == self.performed[-1])
        workflows = list(Workflow.select().order_by(Workflow.id.desc()))
        return workflows[place % len(workflows)] if workflows else None

    def call(self, place, call, *arguments):
        workflow = self.find(place)
        if workflow is None:
            return None
        options = {} if call == "reschedule" else {"reason": call}
        if call == "cancel":
            arguments, options["children"] = (), arguments == (True,)
        try:
            getattr(workflow, call)(*arguments, **options)
        except gd.InvalidStateError:
            return "refused"
        except gd.AlreadyOngoingError:
            return "ongoing"
        return "ok"

    def note(self, place, key, value):
        workflow = self.find(place)
        if workflow is None:
            return None
        change(workflow.context, key, value)
        workflow.save()
        return "ok"

    def signal(self, place, says):
        workflow = self.find(place)
        if workflow is None:
            return None
        try:
            assert workflow.signal("go", says) is True
        except gd.InvalidStateError:
            return "refused"
        return "ok"

    def housekeeping(self, seconds):
        self.forward(seconds)
        counts = housekeeping_elsewhere(self.drive)
        names = ("stuck_in_progress_recovered", "workflows_cleaned_up", "step_executions_cleaned_up")
        return tuple(counts[name] for name in names)

    def alarm(self):
        """What a consumer's scheduler does."""
        for task in self.huey.read_schedule(self.clock.now.replace(tzinfo=None)):
            self.huey.enqueue(task)

    def next_message(self):
        """The place and number, for `deliver`, of the execution that the next message is for, if there is one."""
        if not self.huey.pending(limit=1):
            return None
        execution = StepExecution.get_or_none(StepExecution.id == self.huey.pending(limit=1)[0].args[0])
        if execution is None:  # long since deleted
            self.huey.dequeue()
            return self.next_message()
        later = StepExecution.select().where(
            (StepExecution.workflow == execution.workflow_id) & (StepExecution.number > execution.number)
        )
        return Workflow.select().where(Workflow.id > execution.workflow_id).count(), later.count()

    def deliver(self, place, number):
        return self.report(lambda: self.huey.dequeue().execute())

    def perform(self, place, number, how):
        workflow = self.find(place)
        if workflow is None:
            return None
        executions = list(workflow.execution_history)
        execution = executions[-1 - number % len(executions)]
        if how == "claim":  # by a process that is never heard of again
            return gd._Attempt.claim(self.drive, execution.id) is not None
        return self.report(execution.execute if how == "execute" else lambda: self.drive._perform(execution.id))

    def report(self, work):
        try:
            return work()
        except (KeyboardInterrupt, *ERRORS) as error:
            return type(error).__name__

    def lose(self):
        self.huey.storage.flush_queue()
        self.huey.storage.flush_schedule()

    def picture(self):
        """The rows; with them, the ids of all executions, and of those that a message must be under way for."""
        counts, executions = Counter(what for (what,) in Effect.select(Effect.what).tuples()), {}
        columns = (
            StepExecution.workflow,
            StepExecution.id,
            StepExecution.number,
            StepExecution.step_name,
            StepExecution.state,
            StepExecution.outcome,
            StepExecution.scheduled_for,
            StepExecution.reattempts,
            StepExecution.recoveries,
            StepExecution.error_class_name,
            StepExecution.finished_at,
            StepExecution.cursor,
            StepExecution.waits_since,
            StepExecution.times_out_at,
            StepExecution.reached_at,
            StepExecution.asks_wait,
            StepExecution.reason,
            StepExecution.begun_reason,
            StepExecution.signal_id,
        )
        self.known, self.owed = set(), set()
        for workflow_id, *row in StepExecution.select(*columns).order_by(*columns[0:3:2]).tuples():
            executions.setdefault(workflow_id, []).append(row)
            self.known.add(row[0])
        found, workflows = [], list(Workflow.select().order_by(Workflow.id))
        parents = {each.id: place for place, each in enumerate(workflows)}
        for each in workflows:
            attempts = executions.get(each.id, [])
            if each.state == "ready":
                self.owed |= {row[0] for row in attempts if row[3] in ("scheduled", "waiting")}
            signals = list(each.signals.order_by(gd.WorkflowSignal.id))
            places = {None: None, **{one.id: place for place, one in enumerate(signals)}}
            found.append(
                {
                    "hero": each.hero_id and int(each.hero_id),
                    "occurs": each.occurs_at,
                    "parent": parents.get(each.parent_id),
                    "ongoing children": each.ongoing_children or 0,
                    "allow_multiple": each.allow_multiple,
                    "state": each.state,
                    "step": each.current_step_name,
                    "pause_requested": each.pause_requested,
                    "context": each.context,
                    "transitioned": each.transitioned_at,
                    "reason": without_id(each.reason),
                    "executions": [
                        (*row[2:8], row[8] and row[8].rpartition(".")[2], *map(without_id, row[9:-1]), places[row[-1]])
                        for row in attempts
                    ],
                    "signals": [(one.payload, one.consumed_at) for one in signals],
                    "effects": [row[1] for row in attempts for _ in range(counts[f"{each.token} {row[1]}"])],
                }
            )
        return found


def without_id(value):
    """A reason as the model has it, which knows no ids."""
    return re.sub(r"with (Scripted|Recurring) \d+$", "with its parent", value) if isinstance(value, str) else value


class Sequence:
    """A sequence of moves, each made on the drive and on the model and compared."""

    def __init__(self, db, queue, run_on, on_death):
        huey = MemoryHuey("outside", results=False) if queue == "outside" else None
        if queue == "along":
            huey = SqlHuey("along", database=db, results=False)
            huey.flush()
        self.actual = Actual(db, huey, run_on, on_death)
        self.imagined = Imagined(self.actual.clock.now, run_on, on_death, self.actual.one_writer)
        self.queue = queue
        self.known, self.lost = set(), set()
        Recurring.recurs = crontab(minute="0")

    def play(self, moves):
        for move in moves:
            if all(each.is_over for each in self.imagined.workflows):
                self.make(Move("create", (0, False)))
            self.make(move)
            assert violations(self.actual.drive) == []
        self.come_to_an_end()
        assert violations(self.actual.drive) == []

    def make(self, move):
        """Make a move and compare; returns whether the process lived through it."""
        if move.name == "work":
            return self.work(*move.arguments, move.turns, move.dies)
        is_about_messages = move.name in ("alarm", "lose")
        self.imagined.now = self.actual.clock.now
        if not is_about_messages:
            self.imagined.make(move)
        lived = self.actual.make(move)
        found = self.actual.picture()
        if is_about_messages:
            assert found == self.picture()
        elif lived:
            assert self.actual.observed == self.imagined.observed
            assert found == self.picture()
        else:
            assert self.actual.observed == self.imagined.observed[: len(self.actual.observed)]
            heroes = {self.actual.heroes.index(each.id) for each in User.select()}
            possible = [
                (workflows, present)
                for workflows, present in self.imagined.commits
                if picture(workflows, self.actual.heroes) == found and heroes == present
            ]
            assert possible, f"dead in mid-move, and left rows that no commit makes: {found}, {self.imagined.commits}"
            self.imagined.workflows, self.imagined.present_heroes = possible[-1]
        self.check_messages(may_lose=move.name == "lose" or (not lived and self.may_lose(move)))
        return lived

    def work(self, seconds, turns, dies):
        """What a consumer does, with `seconds` before each message, until the turns are taken or nothing is to do."""
        lived = True
        while True:
            if seconds:
                self.make(Move("forward", (seconds,)))
            if not self.actual.huey.pending(limit=1):
                self.make(Move("alarm"))
            message = self.actual.next_message()
            if message is None:
                return lived
            lived &= self.make(Move("deliver", message, turns, dies))
            left = tuple(self.actual.turns)
            if left != turns or not lived:  # else that was an old message, which changes nothing
                dies = None
            turns = left
            if not turns:
                return lived

    def picture(self):
        return picture(self.imagined.workflows, self.actual.heroes)

    def may_lose(self, move):
        if self.queue == "along":  # what goes into it is part of the commit; what was taken out is lost
            return move.name in ("alarm", "deliver")
        return self.queue == "outside"

    def check_messages(self, may_lose):
        under_way, owed = set(messages(self.actual.drive)), self.actual.owed
        self.known |= self.actual.known
        assert under_way <= self.known, "a message for an execution that was never committed"
        if self.queue == "own":
            assert under_way == owed, "what is in the queue is what the rows say, and cannot be lost"
        if may_lose:
            self.lost |= owed - under_way
        self.lost &= owed - under_way
        assert owed - under_way <= self.lost, "an execution without a message, and none was lost"

    def come_to_an_end(self):
        """Whatever happened: resumed and left alone, every workflow comes to its end by itself."""
        self.imagined.recurs, Recurring.recurs = False, None
        for _ in range(12):
            for place in range(len(self.imagined.workflows)):
                if self.imagined.workflows[-1 - place].state == "paused":
                    self.make(Move("call", (place, "resume")))
            self.make(Move("housekeeping", (2 * 3600,)))
            self.make(Move("alarm"))
            while self.actual.huey.pending(limit=1):
                self.make(Move("work", (0,)))
            if all(each.is_over for each in self.imagined.workflows):
                return
        raise AssertionError(f"stuck: {self.actual.picture()}")


# -- the sequences --

HEROES = st.integers(0, 2)
KEYS = st.sampled_from(["a", "b", "-a", "-b"])  # of a context; or away with it
SECONDS = st.sampled_from([0, 30, 61, 2 * 3600, 2 * 3600, 31 * 86400])
USUAL_CALLS = ["pause", "pause", "pause", "resume", "resume", "skip", "skip", "cancel", "reattempt", "finish"]


def deaths(statements):
    at_a_statement = st.tuples(st.just("statement"), st.integers(0, statements))
    return st.one_of(st.none(), st.none(), at_a_statement, st.tuples(st.just("commit"), st.integers(0, 3)))


def events_about(*places):
    """Strategies for what may happen: calls from outside, and anything."""
    place = st.sampled_from(places)
    calls = st.tuples(st.just("call"), place, st.sampled_from(USUAL_CALLS))
    ending = st.tuples(st.just("call"), place, st.just("cancel"), st.just(True))
    moving = st.tuples(st.just("call"), place, st.just("resume_at"), st.sampled_from(list(SCRIPTED_STEPS)))
    moving |= st.tuples(st.just("call"), place, st.just("reschedule"), st.sampled_from([0, 30, 2 * 3600]))
    moving |= st.tuples(st.just("call"), place, st.just("reschedule"))
    parent = st.none() | place
    creating = st.tuples(st.just("create"), HEROES, st.booleans(), parent)
    creating_many = st.tuples(
        st.just("create_many"), st.sets(HEROES).map(sorted).map(tuple), st.sampled_from(["raise", "ignore"]), parent
    )
    noting = st.tuples(st.just("note"), place, KEYS, st.integers(0, 9))
    signaling = st.tuples(st.just("signal"), place, st.integers(0, 9))
    transacting = st.lists(calls | moving | creating | noting | signaling, min_size=1, max_size=3).map(tuple)
    return calls, st.one_of(
        calls,
        calls,
        calls,
        moving,
        ending,
        creating,
        creating_many,
        noting,
        signaling,
        signaling,
        st.tuples(st.just("transact"), st.booleans(), transacting),
        st.tuples(
            st.just("perform"), place, st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from(["task", "execute", "claim"])
        ),
        st.tuples(st.just("housekeeping"), SECONDS),
        st.tuples(st.just("forward"), SECONDS),
        st.tuples(st.just("hero"), HEROES),
    )


_, EVENTS = events_about(0, 0, 0, 1, 2)
CALLS_HERE, EVENTS_HERE = events_about(THIS, THIS, THIS, 0, 1)
# Taken for dead in mid-body, and the next attempt begun by another process: what a claim is fenced for.
TAKEN_OVER = st.tuples(
    st.just(("housekeeping", 2 * 3600)),
    st.tuples(st.just("perform"), st.just(THIS), st.just(0), st.sampled_from(["task", "execute", "claim", "claim"])),
)
SOME_EVENTS_HERE = st.one_of(
    st.just(()), st.just(()), st.tuples(CALLS_HERE), st.lists(EVENTS_HERE, max_size=2).map(tuple), TAKEN_OVER
)
TURNS = st.builds(
    Turn,
    st.sampled_from(
        ["return", *(end for end in WHAT_FOLLOWS if "," not in end and end != "hero gone"), KeyboardInterrupt, *ERRORS]
    ),
    during=SOME_EVENTS_HERE,
    after=SOME_EVENTS_HERE,
    context=st.none() | KEYS,
    checkpoint=st.booleans(),
    wait=st.sampled_from([None, None, 0, 30, 90, 7200, Late, OddError, Flaky]),
)
# Often enough in a row for attempts, or recoveries, to be exhausted.
FAILURES = st.builds(
    lambda end, count: (Turn(end),) * count,
    st.sampled_from([Flaky, Flaky, Late, Stubborn, KeyboardInterrupt]),
    st.integers(2, MAX_RECOVERIES + 1),
)
WORK = st.builds(
    Move,
    st.just("work"),
    st.tuples(st.sampled_from([0, 0, 120, 2 * 3600])),
    turns=st.lists(TURNS, min_size=1, max_size=4).map(tuple) | FAILURES,
    dies=deaths(30),
)
HAPPEN = st.builds(
    lambda event, turns, dies: Move(event[0], event[1:], turns, dies),
    EVENTS,
    turns=st.lists(TURNS, max_size=2).map(tuple),
    dies=deaths(12),
)
QUEUE = st.builds(Move, st.sampled_from(["alarm", "lose"]), dies=deaths(8))
MOVES = st.one_of(WORK, WORK, WORK, WORK, WORK, WORK, HAPPEN, HAPPEN, HAPPEN, HAPPEN, QUEUE)


# The drive's own; one whose messages are rows of the drive's database; one that loses what a death comes before.
QUEUES = ["own", "along", "outside"]


@pytest.fixture
def tables_of_huey(db):
    yield
    Recurring.recurs = None
    SqlHuey("along", database=db).storage.drop_tables()


def test_a_random_sequence_of_anything_leaves_the_rows_that_the_contract_says(
    db, tables_of_huey, caplog, is_exhaustive
):
    caplog.set_level(logging.CRITICAL)
    usual = (100 if is_exhaustive else 10) if isinstance(db, SqliteDatabase) else (20 if is_exhaustive else 2)
    examples = int(os.environ.get("GENEVA_DRIVE_TEST_EXAMPLES") or usual)

    @settings(max_examples=examples, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
    @given(
        queue=st.sampled_from(QUEUES),
        run_on=st.booleans(),
        on_death=st.sampled_from(["reattempt", "reattempt", "cancel"]),
        # Hypothesis keeps lists short unless told otherwise; a counterexample may come down to the short ones.
        sequence=st.lists(MOVES, max_size=6) | st.lists(MOVES, min_size=30, max_size=50),
    )
    def play(queue, run_on, on_death, sequence):
        Sequence(db, queue, run_on, on_death).play(sequence)

    play()


AWAITING = [Move("create", (0, False)), Move("call", (0, "pause")), Move("call", (0, "resume_at", "awaits"))]
TO_ASK = [
    *[Move("create", (0, False)), Move("call", (0, "pause")), Move("call", (0, "resume_at", "later"))],
    Move("call", (0, "skip")),
]
# The last of each is the move in which the process dies: at every statement and after every commit that it has.
GATHERING = [
    Move("create", (0, False)),
    *[Move("create", (hero, False, hero - 1)) for hero in (1, 2)],
    Move("call", (2, "pause")),
    Move("call", (2, "resume_at", "gathers")),
    Move("call", (0, "cancel")),
    Move("call", (1, "pause")),
    Move("call", (1, "resume_at", "last")),
]
DEADLY = [
    [*GATHERING, Move("call", (1, "skip"))],
    [*GATHERING, Move("perform", (1, 0, "task"))],
    [*GATHERING, Move("call", (2, "cancel", True))],
    [*GATHERING, Move("call", (1, "cancel")), Move("create", (2, False, 2)), Move("work", (0,), (Turn(),))],
    [*GATHERING, Move("forward", (301,)), Move("work", (0,), (Turn("cancel with children"), Turn()))],
    [*GATHERING[:2], Move("work", (0,), (Turn("cancel with children"),))],
    [Move("create", (0, False)), Move("create_many", ((1, 2), "ignore", 0))],
    [Move("create", (0, False))],
    [Move("create", (0, False)), Move("create_many", ((0, 1, 2), "ignore"))],
    [Move("create", (0, False)), Move("work", (0,), (Turn(context="a"), Turn(), Turn("reattempt later")))],
    [
        Move("create", (0, False)),
        Move("work", (0,), (Turn(OddError, during=(("note", THIS, "b", 1), ("note", THIS, "a", 1)), context="a"),)),
    ],
    [Move("create", (0, False)), Move("note", (0, "a", 1))],
    [*AWAITING, Move("signal", (0, 7))],
    [*AWAITING, Move("signal", (0, 7)), Move("work", (0,), (Turn(Flaky), Turn("rewind"), Turn(), Turn()))],
    [*AWAITING, Move("forward", (301,)), Move("work", (0,), (Turn(during=(("signal", THIS, 7),)),))],
    [*AWAITING, Move("call", (0, "pause")), Move("signal", (0, 7)), Move("call", (0, "resume"))],
    [*AWAITING, Move("signal", (0, 7)), Move("work", (0,), (Turn("pause"),)), Move("call", (0, "skip"))],
    [Move("create", (0, False)), Move("work", (0,), (Turn(during=(("call", THIS, "pause"),)),))],
    [Move("create", (0, False)), Move("work", (0,), (Turn(during=(("call", THIS, "cancel"),)),))],
    [Move("create", (0, False)), Move("work", (0,), (Turn(after=(("call", THIS, "cancel"),)),))],
    [Move("create", (0, False)), Move("work", (0,), (Turn(), Turn(Flaky), Turn(Flaky), Turn(Flaky)))],
    [Move("create", (0, False)), Move("work", (0,), (Turn(OddError),)), Move("call", (0, "skip"))],
    [Move("create", (0, False)), Move("work", (0,), (Turn("pause"),)), Move("call", (0, "resume"))],
    [Move("create", (0, False)), Move("work", (0,), tuple(Turn(end, checkpoint=True) for end in (Flaky, "rewind")))],
    [Move("create", (0, False)), Move("work", (0,), (Turn(during=(("call", THIS, "pause"),), checkpoint=True),))],
    [Move("create", (0, False)), Move("work", (0,), (Turn("pause", checkpoint=True),)), Move("call", (0, "resume"))],
    [Move("create", (0, False)), Move("work", (0,), (Turn(), Turn())), Move("perform", (0, 0, "task"))],  # too early
    [
        Move("create", (0, False)),
        Move("work", (0,), (Turn(during=(("housekeeping", 2 * 3600), ("perform", THIS, 0, "claim"))),)),
    ],
    [
        Move("create", (0, False)),
        Move("perform", (0, 0, "claim")),
        Move("housekeeping", (61,)),
        Move("call", (0, "pause")),
        Move("call", (0, "pause")),
        Move("call", (0, "cancel")),
        Move("housekeeping", (2 * 3600,)),
    ],
    [
        Move("create", (0, False)),
        Move("work", (0,), (Turn(Late),)),
        Move("call", (0, "pause")),
        Move("call", (0, "resume")),
    ],
    [Move("forward", (2 * 3600,)), Move("housekeeping", (0,))],
    [Move("housekeeping", (0,)), Move("work", (0,), (Turn("finish"),)), Move("housekeeping", (2 * 3600,))],
    [Move("create", (0, False)), Move("call", (0, "pause"))],
    [Move("create", (0, False)), Move("call", (0, "pause")), Move("call", (0, "resume"))],
    [Move("create", (0, False)), Move("call", (0, "pause")), Move("call", (0, "resume_at", "last"))],
    [Move("create", (0, False)), Move("call", (0, "skip"))],
    [Move("create", (0, False)), Move("call", (0, "cancel"))],
    [Move("create", (0, False)), Move("call", (0, "reschedule", 60))],
    [Move("create", (0, False)), Move("call", (0, "cancel")), Move("call", (0, "resume_at", "last"))],
    [*AWAITING, Move("call", (0, "reschedule", 60))],
    [*TO_ASK, Move("work", (0,), (Turn(wait=90),))],
    [*TO_ASK, Move("work", (0,), (Turn(wait=Flaky), Turn(wait=90), Turn(), Turn(Flaky), Turn()))],
    [*TO_ASK, Move("call", (0, "skip")), Move("call", (0, "skip")), Move("work", (0,), (Turn(), Turn()))],
    [
        Move("create", (0, True)),
        Move("call", (0, "cancel")),
        Move("forward", (31 * 86400,)),
        *[Move("create", (0, True)), Move("perform", (0, 0, "claim"))] * 2,
        Move("create", (0, True)),
        Move("lose"),
        Move("housekeeping", (2 * 3600,)),
    ],
]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)  # elsewhere it takes minutes
@pytest.mark.parametrize(
    "queue", [QUEUES[0], *(pytest.param(each, marks=pytest.mark.exhaustive) for each in QUEUES[1:])]
)
def test_a_death_at_any_moment_leaves_the_rows_of_one_commit_or_the_other(
    db, tables_of_huey, caplog, queue, is_exhaustive
):
    caplog.set_level(logging.CRITICAL)
    for *before, move in DEADLY if is_exhaustive else DEADLY[::3]:
        for cause in ("statement", "commit"):
            for moment in itertools.count(step=5 if cause == "statement" and not is_exhaustive else 1):
                sequence = Sequence(db, queue, run_on=True, on_death="reattempt")
                assert all(sequence.make(each) for each in before)
                if sequence.make(move._replace(dies=(cause, moment))):
                    break
            changes_nothing = move.name == "perform"  # of what is not due
            assert moment > (2 if cause == "statement" else 0) or changes_nothing, (before, move)
        sequence.come_to_an_end()
        assert violations(sequence.actual.drive) == []


# ==== Signals =========================================================================================================


class Payment(Workflow):
    @step(wait_for="confirmed", timeout=timedelta(days=3), on_timeout="pause")
    def confirm(self):
        did(f"confirm {self.signal_payload}")

    @step
    def deliver(self):
        did(f"deliver {self.signal_payload}")


class Parcels(Workflow):
    """One step for each of its parcels, in any order of their arrival."""

    heavy = step("take", wait_for="arrived", matching=lambda parcel: parcel["kilos"] > 20)
    light = step("take", wait_for="arrived")

    def take(self):
        did(f"{self.current_step_name} {self.signal_payload['kilos']}")


def waiting(workflow):
    return workflow.execution_history.where(StepExecution.state == "waiting").get()


def consumed(workflow):
    return [each.payload for each in workflow.signals.order_by(gd.WorkflowSignal.id) if each.consumed_at]


def test_a_step_waits_for_its_signal_and_gets_the_payload(drive, clock, hero, helpers):
    workflow = Payment.create(hero=hero)
    execution = waiting(workflow)
    assert (execution.waiting_for, execution.times_out_at) == ("confirmed", START + timedelta(days=3))
    assert (workflow.state, workflow.current_step_name) == ("ready", "confirm")
    assert execution.execute() is False
    clock.forward(hours=1)
    assert workflow.signal("confirmed", {"by": "bank", "cents": [1, 2]}) is True
    execution = scheduled(workflow)
    assert (execution.waiting_for, execution.scheduled_for) == ("confirmed", START + timedelta(hours=1))
    work_off(drive)
    assert reload(workflow).state == "finished"
    assert effects() == ["confirm {'by': 'bank', 'cents': [1, 2]}", "deliver None"]
    assert history(workflow) == [("confirm", "completed", "success"), ("deliver", "completed", "success")]
    (kept,) = workflow.signals
    assert (kept.name, kept.consumed_at) == ("confirmed", START + timedelta(hours=1))
    assert workflow.execution_history[0].signal_id == kept.id


def test_a_signal_that_comes_first_is_kept_for_the_step(drive, hero):
    class Later(Workflow):
        @step
        def one(self):
            did("one")

        @step(wait_for="go")
        def two(self):
            did(f"two {self.signal_payload}")

    workflow = Later.create(hero=hero)
    workflow.signal("go", 7)
    assert [each.state for each in workflow.execution_history] == ["scheduled"]
    work_off(drive)
    assert (reload(workflow).state, effects(), consumed(workflow)) == ("finished", ["one", "two 7"], [7])


def test_a_signal_sent_while_the_step_before_is_performed_is_not_lost(drive, hero):
    class Eager(Workflow):
        @step
        def ask(self):
            assert reload(self).signal("answer", "while asking") is True

        @step(wait_for="answer")
        def hear(self):
            did(self.signal_payload)

        @step(transactional=True)
        def ask_again(self):
            self.signal("answer", "in the transaction")

        @step(wait_for="answer", transactional=True)
        def hear_again(self):
            did(self.signal_payload)

    workflow = Eager.create(hero=hero)
    work_off(drive)
    assert (reload(workflow).state, effects()) == ("finished", ["while asking", "in the transaction"])


def test_waiting_costs_no_message_and_a_timeout_costs_one(drive, clock, hero):
    class Patient(Workflow):
        @step(wait_for="go")
        def one(self):
            pass

    Patient.create(hero=hero)
    assert messages(drive) == []
    workflow = Payment.create(hero=hero)
    assert messages(drive) == [waiting(workflow).id]
    clock.forward(days=2)
    assert sum(drive.housekeeping().values()) == 0
    assert messages(drive) == [waiting(workflow).id]
    assert Payment.create_many([User.create() for _ in range(3)]) == 3
    assert len(messages(drive)) == 4
    assert Patient.create_many([User.create() for _ in range(3)]) == 3
    assert len(messages(drive)) == 4
    assert StepExecution.select().where(StepExecution.state == "waiting").count() == 8


@pytest.mark.parametrize(
    ("action", "recorded", "state"),
    [
        ("pause", ("failed", "failed"), "paused"),
        ("cancel", ("failed", "canceled"), "canceled"),
        ("skip", ("skipped", "skipped"), "finished"),
        ("run", ("completed", "success"), "finished"),
    ],
)
def test_what_a_timeout_does_is_the_steps_to_say(drive, clock, hero, helpers, action, recorded, state):
    class Impatient(Workflow):
        @step(wait_for="go", timeout=60, on_timeout=action)
        def one(self):
            did(f"one {self.signal_payload}")

        @step
        def two(self):
            did("two")

    workflow = Impatient.create(hero=hero)
    helpers.travel(workflow, 59)
    assert waiting(workflow).waiting_for == "go"
    helpers.travel(workflow, 2)
    first = workflow.execution_history[0]
    assert ((first.state, first.outcome), reload(workflow).state) == (recorded, state)
    assert effects() == {"skip": ["two"], "run": ["one None", "two"]}.get(action, [])
    if action == "run":
        assert first.error_class_name is None
    else:
        assert first.error_class_name == "geneva_drive.SignalTimeoutError"
        assert first.error_message.endswith("the step one waited for the signal 'go' for 1 min, and it did not come")


def test_a_message_brings_the_timeout_and_housekeeping_one_that_was_lost(db, drive, clock):
    drive = GenevaDrive(db, huey=MemoryHuey("outside", results=False), clock=clock)
    workflows = [Payment.create(hero=User.create()) for _ in range(2)]
    drive.huey.flush()
    clock.forward(days=2, hours=23)
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 0
    clock.forward(hours=2)
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 2
    work_off(drive)
    assert [reload(each).state for each in workflows] == ["paused", "paused"]
    assert drive.is_idle()


def test_a_timeout_that_comes_after_the_signal_changes_nothing(drive, clock, hero):
    workflow = Payment.create(hero=hero)
    (late,) = drive.huey.scheduled()
    drive.huey.flush()
    workflow.signal("confirmed", 1)
    clock.forward(days=4)
    work_off(drive)
    drive.huey.execute(late)
    assert (reload(workflow).state, effects()) == ("finished", ["confirm 1", "deliver None"])


def test_a_step_begun_after_its_timeout_takes_the_signal_that_is_there(drive, clock, hero):
    workflow = Payment.create(hero=hero)
    workflow.signal("confirmed", 1)
    clock.forward(days=4)
    work_off(drive)
    assert effects() == ["confirm 1", "deliver None"]


def test_resuming_after_a_timeout_waits_anew_or_takes_what_came_meanwhile(drive, clock, hero, helpers):
    workflow = Payment.create(hero=hero)
    helpers.travel(workflow, timedelta(days=3))
    assert (workflow.state, workflow.current_step_name) == ("paused", "confirm")
    workflow.resume()
    assert waiting(workflow).times_out_at == drive.clock() + timedelta(days=3)
    helpers.travel(workflow, timedelta(days=3))
    assert workflow.signal("confirmed", "late") is True
    assert workflow.execution_history.where(StepExecution.state == "scheduled").count() == 0
    workflow.resume()
    helpers.speedrun_workflow(workflow)
    assert (workflow.state, effects()) == ("finished", ["confirm late", "deliver None"])


def test_a_paused_workflow_keeps_a_signal_for_resume(drive, clock, hero, helpers):
    workflow = Payment.create(hero=hero)
    workflow.pause()
    workflow.signal("confirmed", 1)
    assert (waiting(workflow).waiting_for, reload(workflow).state) == ("confirmed", "paused")
    workflow.resume()
    work_off(drive)
    assert effects() == ["confirm 1", "deliver None"]


def test_a_workflow_resumed_without_a_signal_waits_on_for_the_same_time(drive, clock, hero):
    workflow = Payment.create(hero=hero)
    workflow.pause()
    drive.huey.flush()
    clock.forward(days=1)
    workflow.resume()
    assert waiting(workflow).times_out_at == START + timedelta(days=3)
    assert messages(drive) == [waiting(workflow).id]
    workflow.pause()
    clock.forward(days=3)
    work_off(drive)
    assert waiting(workflow)
    workflow.resume()  # its time has passed
    work_off(drive)
    assert reload(workflow).state == "paused"
    assert history(workflow) == [("confirm", "failed", "failed")]


def test_a_pause_while_performing_leaves_the_next_step_waiting(drive, hero):
    class Interrupted(Workflow):
        @step
        def one(self):
            reload(self).pause()

        @step(wait_for="go", timeout=60)
        def two(self):
            did(self.signal_payload)

    workflow = Interrupted.create(hero=hero)
    work_off(drive)
    assert (reload(workflow).state, waiting(workflow).waiting_for) == ("paused", "go")
    workflow.signal("go", "went")
    workflow.resume()
    work_off(drive)
    assert (reload(workflow).state, effects()) == ("finished", ["went"])


def test_a_redelivered_key_is_acknowledged_and_ignored(drive, hero, helpers):
    workflow = Payment.create(hero=hero)
    assert workflow.signal("confirmed", 1, idempotency_key="event 1") is True
    assert workflow.signal("confirmed", 2, idempotency_key="event 1") is False
    assert workflow.signal("confirmed", 3, idempotency_key="Event 1") is True
    assert workflow.signal("confirmed", 4) is True
    assert workflow.signal("confirmed", 4) is True
    helpers.speedrun_workflow(workflow)
    assert workflow.signal("confirmed", 1, idempotency_key="event 1") is False
    with pytest.raises(gd.InvalidStateError, match=r"finished; signal\(\) was refused: it is allowed when ready, perf"):
        workflow.signal("confirmed", 5, idempotency_key="event 5")
    assert effects() == ["confirm 1", "deliver None"]
    assert [each.payload for each in workflow.signals.order_by(gd.WorkflowSignal.id)] == [1, 3, 4, 4]


def test_the_same_key_may_come_under_another_name_and_to_another_workflow(drive):
    class Two(Workflow):
        first = step("go", wait_for="left")
        second = step("go", wait_for="right")

        def go(self):
            pass

    one, other = (Two.create(hero=User.create()) for _ in range(2))
    for workflow in (one, other):
        assert workflow.signal("left", 1, idempotency_key="k") is True
        assert workflow.signal("right", 1, idempotency_key="k") is True
        assert workflow.signal("right", 1, idempotency_key="k") is False


def test_a_reattempt_sees_the_signal_again(drive, clock, hero, helpers):
    class Stubborn(Workflow):
        @step(wait_for="go", timeout=60, on_exception="reattempt")
        def one(self):
            did(f"try {self.signal_payload}")
            if len(effects()) == 1:
                raise LookupError
            if len(effects()) == 2:
                self.reattempt()

        @step(wait_for="go")
        def two(self):
            did(f"two {self.signal_payload}")

    workflow = Stubborn.create(hero=hero)
    workflow.signal("go", "first")
    helpers.speedrun_workflow(workflow)
    assert effects() == ["try first", "try first", "try first"]
    assert (consumed(workflow), waiting(workflow).step_name) == (["first"], "two")
    workflow.signal("go", "second")
    helpers.speedrun_workflow(workflow)
    assert (effects()[-1], consumed(workflow)) == ("two second", ["first", "second"])


def test_an_attempt_after_a_crash_sees_the_signal_again(drive, clock, hero, helpers):
    workflow = Payment.create(hero=hero)
    workflow.signal("confirmed", 1)
    assert gd._Attempt.claim(drive, scheduled(workflow).id) is not None  # and then its process is no more
    clock.forward(minutes=3)
    assert drive.housekeeping()["stuck_in_progress_recovered"] == 1
    helpers.speedrun_workflow(workflow)
    assert effects() == ["confirm 1", "deliver None"]


def test_a_step_that_ran_after_its_timeout_does_not_wait_again_when_it_is_reattempted(drive, clock, hero, helpers):
    class Late(Workflow):
        @step(wait_for="go", timeout=60, on_timeout="run", on_exception="reattempt")
        def one(self):
            did(f"one {self.signal_payload}")
            if len(effects()) == 1:
                raise LookupError

    workflow = Late.create(hero=hero)
    helpers.travel(workflow, 120)
    assert (workflow.state, effects()) == ("finished", ["one None", "one None"])


@pytest.mark.parametrize("has_failed", [False, True])
def test_skipping_leaves_a_signal_to_the_next_step_unless_the_step_had_it(drive, hero, helpers, has_failed):
    class Twice(Workflow):
        @step(wait_for="go")
        def one(self):
            did(f"one {self.signal_payload}")
            raise LookupError

        @step(wait_for="go")
        def two(self):
            did(f"two {self.signal_payload}")

    workflow = Twice.create(hero=hero)
    workflow.signal("go", 1)
    workflow.signal("go", 2)
    if has_failed:
        helpers.speedrun_workflow(workflow, raise_errors=False)
        assert workflow.state == "paused"
    workflow.skip()
    helpers.speedrun_workflow(workflow)
    assert effects() == (["one 1", "two 2"] if has_failed else ["two 1"])
    assert consumed(workflow) == ([1, 2] if has_failed else [1])


def test_signals_that_do_not_match_are_left_to_other_steps(drive, clock, hero):
    workflow = Parcels.create(hero=hero)
    for kilos in (3, 5):
        workflow.signal("arrived", {"kilos": kilos})
        work_off(drive)
        assert (waiting(workflow).step_name, waiting(workflow).started_at, effects()) == ("heavy", None, [])
    workflow.signal("arrived", {"kilos": 30})
    work_off(drive)
    assert (reload(workflow).state, effects()) == ("finished", ["heavy 30", "light 3"])
    assert [each.payload["kilos"] for each in workflow.signals if not each.consumed_at] == [5]


def test_a_signal_that_comes_while_another_one_is_looked_at_is_not_overlooked(drive, hero):
    sent = []

    def matching(payload):
        if not sent:
            sent.append(reload(workflow).signal("go", "right"))
        return payload == "right"

    class Choosy(Workflow):
        @step(wait_for="go", matching=matching)
        def one(self):
            did(self.signal_payload)

    workflow = Choosy.create(hero=hero)
    workflow.signal("go", "wrong")
    work_off(drive)
    assert (reload(workflow).state, effects(), sent) == ("finished", ["right"], [True])

    # and one that comes between the last look and the record
    sent.clear()
    find = gd._Attempt._find_signal

    def find_and_send(attempt, definition):
        found = find(attempt, definition)
        if not found and len(sent) == 1:
            sent.append(reload(workflow).signal("go", "right"))
        return found

    workflow = Choosy.create(hero=hero)
    sent.append("wrong will be looked at")
    workflow.signal("go", "wrong")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gd._Attempt, "_find_signal", find_and_send)
        work_off(drive)
    assert (reload(workflow).state, effects()) == ("finished", ["right", "right"])


@pytest.mark.parametrize("call", ["pause", "cancel"])
def test_a_call_while_a_signal_is_looked_at_and_found_to_be_anothers_is_obeyed(drive, hero, call):
    class Choosy(Workflow):
        @step(wait_for="go", matching=lambda payload: payload or getattr(reload(workflow), call)())
        def one(self):
            did(self.signal_payload)

    workflow = Choosy.create(hero=hero)
    workflow.signal("go", 0)
    work_off(drive)
    if call == "cancel":
        assert (reload(workflow).state, history(workflow)) == ("canceled", [("one", "canceled", "canceled")])
        return
    assert (reload(workflow).state, history(workflow)) == ("paused", [("one", "waiting", None)])
    reload(workflow).signal("go", 1)
    reload(workflow).resume()
    work_off(drive)
    assert (reload(workflow).state, effects()) == ("finished", ["1"])


def test_an_error_of_matching_counts_as_the_bodys(drive, hero, helpers):
    class Broken(Workflow):
        @step(wait_for="go", matching=lambda payload: payload["kilos"])
        def one(self):
            pass

    workflow = Broken.create(hero=hero)
    workflow.signal("go", {})
    with pytest.raises(KeyError):
        helpers.speedrun_workflow(workflow)
    assert (workflow.state, consumed(workflow)) == ("paused", [])


def test_conditions_are_checked_when_the_step_runs_and_a_skipped_one_takes_no_signal(drive, clock, hero, helpers):
    class Conditional(Workflow):
        @cancel_if
        def hero_left(self):
            return not self.hero.active

        @step(wait_for="go", skip_if=lambda self: self.hero.visits)
        def one(self):
            did(f"one {self.signal_payload}")

        @step(wait_for="go", timeout=60, on_timeout="run")
        def two(self):
            did(f"two {self.signal_payload}")

    workflow = Conditional.create(hero=hero)
    User.update(visits=1).execute()
    workflow.signal("go", 1)
    helpers.speedrun_workflow(workflow)
    assert (workflow.state, effects()) == ("finished", ["two 1"])
    workflow = Conditional.create(hero=hero)
    workflow.skip()
    User.update(active=False).execute()
    helpers.travel(workflow, 60)
    assert (workflow.state, effects()) == ("canceled", ["two 1"])


def test_a_wait_comes_before_the_signal_and_the_timeout_after_it(drive, clock, hero, helpers):
    class Both(Workflow):
        @step(wait=60, wait_for="go", timeout=30, on_timeout="run")
        def one(self):
            did(f"{(drive.clock() - begun).total_seconds():.0f} s: {self.signal_payload}")

    begun = drive.clock()
    workflow = Both.create(hero=hero)
    assert waiting(workflow).times_out_at == START + timedelta(seconds=90)
    workflow.signal("go", 1)
    assert scheduled(workflow).scheduled_for == START + timedelta(seconds=60)
    helpers.travel(workflow, 100)
    workflow, begun = Both.create(hero=hero), drive.clock()
    helpers.travel(workflow, 100)
    assert effects() == ["60 s: 1", "90 s: None"]


def test_a_timeout_of_nothing_looks_once(drive, hero):
    class Glance(Workflow):
        @step(wait_for="go", timeout=0, on_timeout="run")
        def one(self):
            did(f"one {self.signal_payload}")

    workflow = Glance.create(hero=hero)
    work_off(drive)
    assert (reload(workflow).state, effects()) == ("finished", ["one None"])
    assert Glance.create_many([User.create()]) == 1
    work_off(drive)
    assert effects() == ["one None", "one None"]


def test_a_signal_belongs_to_the_transaction_around_it(drive, db, hero):
    workflow = Payment.create(hero=hero)
    with pytest.raises(LookupError), db.atomic():
        workflow.signal("confirmed", 1, idempotency_key="k")
        assert scheduled(workflow)
        raise LookupError
    assert (waiting(workflow).waiting_for, workflow.signals.count()) == ("confirmed", 0)
    with db.atomic():
        assert workflow.signal("confirmed", 1, idempotency_key="k") is True
        assert workflow.signal("confirmed", 1, idempotency_key="k") is False
    work_off(drive)
    assert effects() == ["confirm 1", "deliver None"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            ("paid",),
            gd.UnknownSignalError,
            r"sent the signal 'paid', which no step of Payment waits for: .*\(confirmed\)",
        ),
        ((7,), gd.UnknownSignalError, r"sent the signal 7"),
        (("confirmed", {1, 2}), TypeError, r"the payload of the signal 'confirmed' is not JSON"),
        (("confirmed", float("nan")), ValueError, r"the payload of the signal 'confirmed' is not JSON"),
        (
            ("confirmed", 128 * 1024 * "x"),
            ValueError,
            r"the payload of the signal 'confirmed' takes 131074 bytes, over",
        ),
        (("confirmed", 1, 7), TypeError, r"the idempotency_key of the signal 'confirmed' must be text, not 7"),
        (("confirmed", 1, ""), ValueError, r"must have 1 to 255 printable characters"),
        (("confirmed", 1, 256 * "x"), ValueError, r"must have 1 to 255 printable characters"),
        (("confirmed", 1, "a\0b"), ValueError, r"must have 1 to 255 printable characters"),
        (("confirmed", 1, "a\ud800"), ValueError, r"must have 1 to 255 printable characters"),
    ],
)
def test_a_wrong_signal_is_refused_and_nothing_is_written(drive, hero, arguments, error, text):
    workflow = Payment.create(hero=hero)
    with pytest.raises(error, match=text):
        workflow.signal(*arguments)
    assert (waiting(workflow).waiting_for, workflow.signals.count()) == ("confirmed", 0)


@pytest.mark.parametrize("payload", [None, 0, "", [], {}, "\0 \ud800 ü", [1.5, {"a": None}], (128 * 1024 - 2) * "x"])
def test_a_payload_may_be_any_json_value(drive, hero, helpers, payload):
    seen = []

    class Echo(Workflow):
        @step(wait_for="say")
        def one(self):
            seen.append(self.signal_payload)

    workflow = Echo.create(hero=hero)
    workflow.signal("say", payload, idempotency_key="schlüssel")
    helpers.speedrun_workflow(workflow)
    assert (workflow.state, seen) == ("finished", [payload])


def test_a_signal_for_a_workflow_that_was_deleted_says_so(drive, hero):
    workflow = Payment.create(hero=hero)
    Workflow.delete().execute()
    StepExecution.delete().execute()
    with pytest.raises(Workflow.DoesNotExist, match="was deleted; the signal 'confirmed' came too late"):
        workflow.signal("confirmed")


def test_whoever_knows_only_the_hero_signals_its_ongoing_workflow(drive, hero, helpers):
    with pytest.raises(Payment.DoesNotExist, match=r"Payment.signal_hero\(User \d+\): there is no Payment about it"):
        Payment.signal_hero(hero, "confirmed")
    Quick.create(hero=hero)
    workflow = Payment.create(hero=hero)
    Payment.create(hero=User.create())
    assert Payment.signal_hero(hero, "confirmed", 1, idempotency_key="e1") is True
    assert Payment.signal_hero(hero, "confirmed", 1, idempotency_key="e1") is False
    helpers.speedrun_workflow(workflow)
    assert effects() == ["confirm 1", "deliver None"]
    with pytest.raises(gd.InvalidStateError, match=r"is finished; signal\(\) was refused"):
        Payment.signal_hero(hero, "confirmed", 2)
    second = Payment.create(hero=hero)
    assert Payment.signal_hero(hero, "confirmed", 1, idempotency_key="e1") is False
    assert second.signals.count() == 0
    third = Payment.create(hero=hero, allow_multiple=True)
    with pytest.raises(ValueError, match=f"the workflows {second.id}, {third.id} are ongoing"):
        Payment.signal_hero(hero, "confirmed", 3)
    second.cancel()
    assert Payment.signal_hero(hero, "confirmed", 4) is True
    assert third.signals.get().payload == 4


def test_a_signal_may_be_sent_where_the_class_is_not_known(drive, hero, monkeypatch):
    workflow = Payment.create(hero=hero)
    monkeypatch.delitem(gd._workflow_classes, "Payment")
    row = reload(workflow)
    assert type(row) is Workflow
    assert row.signal("confirmed", 1) is True
    assert row.signal("whatever", 2) is True
    with pytest.raises(gd.UnknownSignalError):
        row.signal("")
    monkeypatch.undo()
    work_off(drive)
    assert effects() == ["confirm 1", "deliver None"]


def test_steps_that_begin_or_cease_to_wait_with_a_deploy_strand_nobody(drive, clock, monkeypatch):
    def define(**options):
        class Deployed(Workflow):
            @step(**options)
            def one(self):
                did(f"one {self.signal_payload}")

        monkeypatch.setitem(gd._workflow_classes, "Deployed", Deployed)
        return Deployed

    workflow = define(wait_for="go").create(hero=User.create())
    paused = define(wait_for="go").create(hero=User.create())
    paused.pause()
    define()
    clock.forward(minutes=10)
    drive.housekeeping()
    work_off(drive)
    assert history(workflow) == history(paused) == [("one", "waiting", None)]  # by hand alone: it may be the old code
    assert drive.doctor() == [each.problem for each in drive._reports.stranded()]
    assert drive.doctor()[0].startswith("2 ongoing workflows of Deployed wait at the step 'one' for the signal 'go', ")
    reload(workflow).pause()
    for each in (workflow, paused):
        reload(each).resume()
    work_off(drive)
    assert [reload(each).state for each in (workflow, paused)] == ["finished", "finished"]

    workflow = define().create(hero=User.create())
    define(wait_for="go", timeout=60)
    work_off(drive)
    assert waiting(workflow).times_out_at == drive.clock() + timedelta(seconds=60)
    assert len(messages(drive)) == 1
    reload(workflow).signal("go", 1)
    work_off(drive)

    workflow = define(wait_for="go").create(hero=User.create())
    define(wait_for="went")
    reload(workflow).signal("went", 2)
    work_off(drive)
    assert (reload(workflow).state, effects()) == ("finished", ["one None", "one None", "one 1", "one 2"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"wait_for": 7}, r"wait_for must be a signal's name, not 7"),
        ({"wait_for": ""}, r"wait_for must be a signal's name, not ''"),
        ({"timeout": 7}, r"timeout goes with wait_for or wait_for_children only"),
        ({"timeout": 7, "wait_for": None}, r"timeout goes with wait_for or wait_for_children only"),
        ({"matching": len}, r"matching goes with wait_for only"),
        ({"wait_for": "x", "on_timeout": "skip"}, r"on_timeout goes with timeout only"),
        ({"wait_for": "x", "timeout": -1}, r"timeout must be neither negative"),
        ({"wait_for": "x", "timeout": "3 d"}, r"timeout must be a timedelta or a number of seconds"),
        (
            {"wait_for": "x", "timeout": 1, "on_timeout": "reattempt"},
            r"on_timeout must be one of pause, skip, cancel, run",
        ),
        ({"wait_for": "x", "matching": 7}, r"matching must be a callable of the signal's payload, .* not 7"),
        ({"wait_for": "x", "matching": "x"}, r"matching names no method: 'x'"),
    ],
)
def test_what_is_wrong_with_waiting_for_a_signal_is_said_at_once(options, text):
    with pytest.raises(gd.StepConfigurationError, match=rf"Wrong\.one: {text}"):

        class Wrong(Workflow):
            @step(**options)
            def one(self):
                pass


def test_the_helpers_stop_at_a_step_that_waits(drive, hero, helpers):
    workflow = Payment.create(hero=hero)
    helpers.speedrun_workflow(workflow)
    helpers.assert_workflow_state(workflow, "ready")
    hint = r"confirm waits; call signal\('confirmed'\), or travel\(\)"
    with pytest.raises(AssertionError, match=rf"no step is scheduled: {hint}"):
        helpers.perform_next_step(workflow)
    with pytest.raises(AssertionError, match=rf"its step confirm could not be performed: {hint}"):
        helpers.perform_step_inline(workflow, "confirm")
    workflow.signal("confirmed", 1)
    helpers.perform_step_inline(workflow, "confirm")
    helpers.assert_step_executed(workflow, "confirm")


def test_what_waits_is_counted_and_is_idle_unless_its_time_is_limited(drive, clock, hero):
    assert drive.is_idle()
    workflow = Parcels.create(hero=hero)
    assert drive.is_idle()
    for _ in range(2):
        Payment.create(hero=User.create())
    assert not drive.is_idle()
    found = [each for each in drive.stats() if each.name == "geneva_drive_waiting_steps"]
    assert found == [
        gd.Metric("geneva_drive_waiting_steps", {"type": "Parcels", "signal": "arrived"}, 1),
        gd.Metric("geneva_drive_waiting_steps", {"type": "Payment", "signal": "confirmed"}, 2),
    ]
    workflow.signal("arrived", {"kilos": 1})
    assert not drive.is_idle()


def test_doctor_finds_a_step_that_waits_for_what_is_there(drive, hero):
    workflow = Payment.create(hero=hero)
    gd.WorkflowSignal.insert(workflow=workflow.id, name="confirmed", created_at=START).execute()
    waits = StepExecution.get()
    spoilt = Quick.create(hero=hero)
    scheduled(spoilt)._write(state="waiting", queue=None)
    diagnosed(
        drive,
        f"execution {waits.id} waits for the signal confirmed, which is there",
        f"execution {waiting(spoilt).id} waits for no signal, and for no child",
    )


def test_signals_are_deleted_with_their_workflow(drive, clock, hero, helpers):
    workflow = Payment.create(hero=hero)
    workflow.signal("confirmed", 1)
    helpers.speedrun_workflow(workflow)
    clock.forward(days=31)
    assert drive.housekeeping()["workflows_cleaned_up"] == 1
    assert gd.WorkflowSignal.select().count() == 0
    other = Payment.create(hero=hero)
    other.signal("confirmed", 1)
    if isinstance(drive.database, SqliteDatabase):
        drive.database.execute_sql("pragma foreign_keys = off")
    try:
        Workflow.delete().execute()
    finally:
        if isinstance(drive.database, SqliteDatabase):
            drive.database.execute_sql("pragma foreign_keys = on")
    assert gd.WorkflowSignal.select().count() == 0


def test_the_graph_shows_what_is_waited_for():
    assert '"confirm<br/>wait for confirmed, after 3 d pause"' in Payment.graph()
    assert '"light<br/>wait for arrived"' in Parcels.graph()


def _signal_and_work(number, url, ids, barrier, results):
    """Sends each workflow its signal, each twice with one key, while its steps before and after are performed."""
    db = open_database(url)
    for model in MODELS:
        model.bind(db)
    drive = GenevaDrive(db)
    barrier.wait(timeout=60)
    for each in ids:
        if number % 2:
            drive._perform(StepExecution.get((StepExecution.workflow == each) & (StepExecution.number == 1)).id)
        else:
            results.put(reload(Workflow(id=each)).signal("go", each, idempotency_key=f"event {each}"))
    work_off(drive, limit=10_000)


class Meeting(Workflow):
    @step
    def before(self):
        pass

    @step(wait_for="go")
    def meet(self):
        did(f"{self.id}: {self.signal_payload}")


def test_in_no_order_of_arrival_a_signal_is_lost_or_doubled(database, drive, is_exhaustive):
    count = 500 if is_exhaustive else 30
    Meeting.create_many([User.create() for _ in range(count)])
    ids = [each.id for each in Meeting.select()]
    database.peewee.close()
    sent = in_processes(4, _signal_and_work, database.url, ids, fork.Barrier(4))
    work_off(drive)
    assert sorted(sent) == [False] * count + [True] * count
    assert sorted(effects()) == sorted(f"{each}: {each}" for each in ids)
    assert Meeting.finished().count() == count


@pytest.mark.parametrize("database", ["postgresql", "mysql"], indirect=True)  # SQLite lets nobody else write meanwhile
def test_a_transaction_with_an_older_snapshot_neither_misses_a_signal_nor_doubles_it(database, drive, db, hero):
    class Snapshot(Workflow):
        @step(transactional=True)
        def one(self):
            Effect.select().count()  # what this transaction sees from now on is how it was at this moment
            if not sent:
                sent.extend(in_processes(1, _send, database.url, self.id))
            did("one")

        @step(wait_for="go")
        def two(self):
            did(f"two {self.signal_payload}")

    sent = []
    workflow = Snapshot.create(hero=hero)
    if "postgres" in database.url:
        db.connection().set_session(isolation_level="REPEATABLE READ")
    try:
        work_off(drive)
    finally:
        db.close()
    assert (sent, reload(workflow).state, effects()) == ([True], "finished", ["one", "two 1"])


def _send(number, url, workflow_id, results):
    GenevaDrive(open_database(url))
    results.put(Workflow.get_by_id(workflow_id).signal("go", 1))


def test_a_signal_is_matched_by_a_method_that_has_the_hero_at_hand(drive, hero):
    class Matches(Workflow):
        @step(wait_for="paid", matching="is_mine")
        def one(self):
            did(self.signal_payload)

        def is_mine(self, payload):
            return payload == self.hero.id

    workflow = Matches.create(hero=hero)
    workflow.signal("paid", hero.id + 1)
    work_off(drive)
    assert [each.state for each in workflow.execution_history] == ["waiting"]
    workflow.signal("paid", hero.id)
    work_off(drive)
    assert effects() == [str(hero.id)]
    assert consumed(workflow) == [hero.id]


def test_the_time_that_a_step_waited_in_vain_counts_from_its_beginning_whatever_came_meanwhile(drive, clock, hero):
    class Matches(Workflow):
        @step(wait=3600, wait_for="paid", matching=lambda payload: False, timeout=timedelta(days=3))
        def one(self):
            pass

    workflow = Matches.create(hero=hero)
    clock.forward(days=2)
    workflow.signal("paid", "of another")
    work_off(drive)
    clock.forward(days=2)
    work_off(drive)
    assert reload(workflow).reason == "no signal paid within 3 d"


# ==== Signals: what went wrong once ===================================================================================


class Sorted(Workflow):
    """Two steps that wait for one signal; the first one is choosy."""

    heavy = step("take", wait_for="arrived", timeout=60, matching=lambda kilos: kilos > 20, on_exception="reattempt")
    light = step("take", wait_for="arrived")

    def take(self):
        did(f"{self.current_step_name} {self.signal_payload}")
        if effects() == ["heavy 30"]:
            raise LookupError


def test_skipping_a_step_leaves_what_it_only_looked_at_to_the_next_one(drive, clock, hero, helpers):
    workflow = Sorted.create(hero=hero)
    workflow.signal("arrived", 3)
    work_off(drive)
    assert waiting(workflow).signal_id == workflow.signals.get().id
    helpers.travel(workflow, 61)
    assert (workflow.state, history(workflow)) == ("paused", [("heavy", "failed", "failed")])
    assert workflow.execution_history.get().signal_id is None
    workflow.skip()
    work_off(drive)
    assert (reload(workflow).state, effects(), consumed(workflow)) == ("finished", ["light 3"], [3])


@pytest.mark.parametrize("how", ["skip", "skip_if"])
def test_a_step_that_is_skipped_before_its_reattempt_takes_its_signal_along(drive, clock, hero, helpers, how):
    class Twice(Workflow):
        @step(wait_for="go", skip_if=lambda self: how == "skip_if" and effects(), on_exception="reattempt")
        def one(self):
            did(f"one {self.signal_payload}")
            raise LookupError

        @step(wait_for="go")
        def two(self):
            did(f"two {self.signal_payload}")

    workflow = Twice.create(hero=hero)
    workflow.signal("go", 1)
    helpers.perform_next_step(workflow)
    assert history(workflow) == [("one", "failed", "reattempted"), ("one", "scheduled", None)]
    if how == "skip":
        workflow.skip()
    else:
        helpers.perform_next_step(workflow)
    assert (waiting(workflow).step_name, consumed(workflow)) == ("two", [1])
    workflow.signal("go", 2)
    helpers.speedrun_workflow(workflow)
    assert (workflow.state, effects(), consumed(workflow)) == ("finished", ["one 1", "two 2"], [1, 2])


def test_a_step_that_had_a_signal_at_its_beginning_and_refused_it_gets_a_message_for_its_timeout(drive, clock, hero):
    class Later(Workflow):
        @step
        def one(self):
            pass

        @step(wait_for="go", timeout=60, matching=bool)
        def two(self):
            pass

    workflow = Later.create(hero=hero)
    workflow.signal("go", 0)
    work_off(drive)
    assert messages(drive) == [waiting(workflow).id]
    workflow.signal("go", 0)
    work_off(drive)
    assert messages(drive) == [waiting(workflow).id]
    clock.forward(seconds=60)
    work_off(drive)
    for task in drive.huey.read_schedule(drive.clock().replace(tzinfo=None)):
        drive.huey.execute(task)
    assert (reload(workflow).state, history(workflow)[1:]) == ("paused", [("two", "failed", "failed")])


def test_the_heartbeat_goes_on_when_another_worker_has_taken_the_step_that_one_put_back(db, drive, hero):
    class Slowly(Workflow):
        @step(wait_for="go", matching=bool)
        def one(self):
            entered.set()
            assert may_end.wait(20)
            did(str(len(gd._heartbeat.beating)))

    def run():
        work_off(drive)
        db.close()

    def on_transition(cls, workflow, old, new):
        """Runs when the first worker has committed that the step waits on, and before it has turned to another one."""
        if (old, new) == ("performing", "ready") and not threads:
            workflow.signal("go", 1)
            threads.append(threading.Thread(target=run))
            threads[0].start()
            assert entered.wait(20)

    threads, entered, may_end = [], threading.Event(), threading.Event()
    gd.workflow_transitioned.connect(on_transition)
    try:
        workflow = Slowly.create(hero=hero)
        workflow.signal("go", 0)
        work_off(drive, limit=2)
    finally:
        gd.workflow_transitioned.disconnect(on_transition)
    may_end.set()
    threads[0].join()
    assert (reload(workflow).state, effects()) == ("finished", ["1"])
    assert not gd._heartbeat.beating


def _refuse_and_fail(number, url, workflow_id, results):
    User.bind(GenevaDrive(open_database(url)).database)  # the parent's connection is in a transaction
    with contextlib.suppress(LookupError):
        scheduled(Workflow(id=workflow_id)).execute()
    results.put(Workflow.get_by_id(workflow_id).state)


class Failing(Workflow):
    @step(wait_for="go")
    def one(self):
        raise LookupError

    @step(wait_for="go")
    def two(self):
        pass


@pytest.mark.parametrize("database", ["mysql"], indirect=True)  # its snapshots last as long as the transaction
def test_a_skip_in_a_transaction_with_an_older_snapshot_takes_the_signal_along(database, drive, db, hero):
    workflow = Failing.create(hero=hero)
    workflow.signal("go", 1)
    with db.atomic():
        assert reload(workflow).state == "ready"
        assert in_processes(1, _refuse_and_fail, database.url, workflow.id) == ["paused"]
        workflow.skip()
    assert consumed(workflow) == [1]
    assert history(workflow) == [("one", "failed", "failed"), ("one", "skipped", "skipped"), ("two", "waiting", None)]


def _deliver(number, url, workflow_id, results):
    GenevaDrive(open_database(url))
    workflow = Workflow.get_by_id(workflow_id)
    results.put(workflow.signal("confirmed", 1, idempotency_key="k"))
    workflow.cancel()


@pytest.mark.parametrize("database", ["mysql"], indirect=True)
def test_a_key_is_acknowledged_to_a_transaction_that_is_older_than_its_first_delivery(database, drive, db, hero):
    workflow = Payment.create(hero=hero)
    with db.atomic():
        assert reload(workflow).state == "ready"
        assert in_processes(1, _deliver, database.url, workflow.id) == [True]
        assert workflow.signal("confirmed", 1, idempotency_key="k") is False
        with pytest.raises(gd.InvalidStateError):
            workflow.signal("confirmed", 1, idempotency_key="another")
    assert workflow.signals.count() == 1


def _create_payment(number, url, hero_id, results):
    GenevaDrive(open_database(url))
    results.put(Payment.create(hero=User(id=hero_id)).id)


@pytest.mark.parametrize("database", ["mysql"], indirect=True)
def test_a_hero_is_signaled_in_a_transaction_that_is_older_than_its_workflow(database, drive, db, hero):
    with db.atomic():
        assert User.select().count() == 1
        (created,) = in_processes(1, _create_payment, database.url, hero.id)
        assert Payment.signal_hero(hero, "confirmed", 1) is True
    work_off(drive)
    assert (Workflow.get_by_id(created).state, effects()) == ("finished", ["confirm 1", "deliver None"])


def test_a_signal_that_only_the_execution_knows_after_a_deploy_is_taken(drive, hero, helpers, monkeypatch):
    workflow = Payment.create(hero=hero)

    class Payment2(Workflow):
        workflow_type = "Payment2"

        @step
        def deliver(self):
            pass

    monkeypatch.setitem(gd._workflow_classes, "Payment", Payment2)
    row = reload(workflow)
    with pytest.raises(gd.UnknownSignalError):
        row.signal("paid")
    assert row.signal("confirmed", 1, idempotency_key="k") is True
    assert row.signal("confirmed", 1, idempotency_key="k") is False
    with pytest.raises(gd.StepNotDefinedError):  # and no longer waits for ever
        helpers.speedrun_workflow(row)
    row.cancel()
    assert row.signal("confirmed", 1, idempotency_key="k") is False
    with pytest.raises(gd.InvalidStateError):
        row.signal("confirmed", 1)


# ==== Parents and children ============================================================================================


class Chore(Workflow):
    """A child that ends as its context says."""

    exception_policies = [ExceptionPolicy("cancel", matching=KeyError)]

    @cancel_if
    def is_moot(self):
        return self.context.get("end") == "is_moot"

    @step(skip_if=lambda self: self.context.get("end") == "skip_if")
    def work(self):
        end = self.context.get("end")
        if end == "fail":
            raise KeyError(end)
        if end in ("cancel", "skip", "finish"):
            getattr(self, end)()
        did(f"work {self.hero.id}")


class Household(Workflow):
    """A parent: the children are made while it stands at its first step."""

    @step
    def begin(self):
        did("begin")

    @step(wait_for_children=True)
    def gather(self):
        states = Counter(child.state for child in self.children)
        did(" ".join(["gather", *(f"{count} {state}" for state, count in sorted(states.items()))]))


def chores(parent, count=1, cls=Chore, **context):
    return [cls.create(hero=User.create(), parent=parent, context=context) for _ in range(count)]


def household(count=1, cls=Household, **context):
    """A parent that waits for so many children."""
    parent = cls.create(hero=User.create())
    children = chores(parent, count, **context)
    scheduled(parent).execute()
    assert waiting(parent).waiting_for is None
    return parent, children


def finish(workflow):
    """Perform the steps of one workflow, those of no other."""
    while workflow.execution_history.where(StepExecution.state == "scheduled").exists():
        scheduled(workflow).execute()


def ongoing_children(workflow):
    """How many the row counts, which must be how many there are."""
    counted = reload(workflow).ongoing_children or 0
    assert counted == workflow.children.where(Workflow.state.in_(gd.ONGOING)).count()
    return counted


def test_a_step_waits_for_the_end_of_the_last_child_and_is_woken_in_that_commit(drive, clock):
    parent, (one, other) = household(2)
    assert [child.id for child in parent.children] == [one.id, other.id]
    assert {type(child) for child in parent.children} == {Chore}
    assert (type(reload(one).parent), reload(one).parent.id, reload(parent).parent) == (Household, parent.id, None)
    assert waiting(parent).queue is None  # it costs nothing meanwhile
    assert waiting(parent).execute() is False
    finish(one)
    assert (history(parent)[-1], ongoing_children(parent)) == (("gather", "waiting", None), 1)
    clock.forward(hours=1)
    with db_rolled_back(drive):
        finish(other)
        assert scheduled(parent).scheduled_for == START + timedelta(hours=1)
    assert (history(parent)[-1], ongoing_children(parent)) == (("gather", "waiting", None), 1)
    finish(other)
    assert (scheduled(parent).scheduled_for, ongoing_children(parent)) == (START + timedelta(hours=1), 0)
    work_off(drive)
    assert effects()[-1] == "gather 2 finished"
    assert history(parent) == [("begin", "completed", "success"), ("gather", "completed", "success")]


@contextlib.contextmanager
def db_rolled_back(drive):
    with drive._access.database.atomic() as transaction:
        yield
        transaction.rollback()


#: How a child may come to its end: its context, and what is done to it.
ENDS = {
    "performed": ({}, finish),
    "finish()": ({"end": "finish"}, finish),
    "skipped past the last step": ({"end": "skip"}, finish),
    "skip_if": ({"end": "skip_if"}, finish),
    "skip() from outside": ({}, lambda child: child.skip()),
    "skip() of a paused one": ({}, lambda child: (child.pause(), child.skip())),
    "cancel() inside": ({"end": "cancel"}, finish),
    "cancel() from outside": ({}, lambda child: child.cancel()),
    "cancel() of one read in part": (
        {},
        lambda child: Workflow.select(Workflow.id, Workflow.type).where(Workflow.id == child.id).get().cancel(),
    ),
    "cancel_if": ({"end": "is_moot"}, finish),
    "no hero": ({}, lambda child: (child.hero.delete_instance(), finish(child))),
    "an error": ({"end": "fail"}, lambda child: gd.TestHelpers().speedrun_workflow(child, raise_errors=False)),
    "died": ({}, lambda child: _die(child)),
    "deleted": ({}, lambda child: (Workflow.delete().where(Workflow.id == child.id).execute(), _sweep())),
    "deleted as an instance": ({}, lambda child: (child.delete_instance(), _sweep())),
}


def _die(child):
    gd._drive().stuck_recovery_action = "cancel"
    gd._Attempt.claim(gd._drive(), scheduled(child).id)
    gd._drive().clock.forward(minutes=10)
    _sweep()


def _sweep():
    housekeeping_elsewhere(gd._drive())


@pytest.mark.parametrize("end", ENDS)
def test_every_end_of_a_child_counts(drive, clock, end):
    context, act = ENDS[end]
    parent, (child,) = household(**context)
    act(child)
    assert ongoing_children(parent) == 0
    assert history(parent)[-1] == ("gather", "scheduled", None)
    work_off(drive)
    assert reload(parent).state == "finished"


def test_a_child_that_times_out_or_is_canceled_while_it_performs_has_ended(drive, clock, hero):
    class Hopes(Workflow):
        @step(wait_for="luck", timeout=60, on_timeout="cancel")
        def hope(self):
            did("hope")

    parent = Household.create(hero=hero)
    chores(parent, cls=Hopes)
    work_off(drive)
    clock.forward(seconds=61)
    work_off(drive)
    assert (reload(parent).state, effects()) == ("finished", ["begin", "gather 1 canceled"])

    class Canceled(Workflow):
        @step
        def work(self):
            reload(self).cancel()
            did(f"after it {history(self.parent)[-1][1]} {ongoing_children(self.parent)}")

    parent = Household.create(hero=hero)
    (child,) = chores(parent, cls=Canceled)
    scheduled(parent).execute()
    finish(child)
    work_off(drive)
    assert effects()[-2:] == ["after it scheduled 0", "gather 1 canceled"]
    assert history(child) == [("work", "completed", "success")]


def test_a_pause_or_an_error_that_pauses_is_no_end(drive):
    class Stumbles(Workflow):
        @step
        def work(self):
            if not self.context.get("again"):
                self.context["again"] = True
                raise ValueError("stumbled")

    parent = Household.create(hero=User.create())
    one, other = chores(parent, cls=Stumbles) + chores(parent)
    scheduled(parent).execute()
    other.pause()
    with pytest.raises(ValueError, match="stumbled"):
        finish(one)
    assert (reload(one).state, ongoing_children(parent)) == ("paused", 2)
    for each in (one, other):
        reload(each).resume()
        finish(each)
    assert history(parent)[-1] == ("gather", "scheduled", None)


def test_with_no_children_it_runs_at_once(drive, hero, helpers):
    class First(Workflow):
        @step(wait_for_children=True)
        def gather(self):
            did("gather")

    parent = Household.create(hero=hero)
    helpers.speedrun_workflow(parent)
    assert (parent.state, effects()) == ("finished", ["begin", "gather"])
    parent = First.create(hero=hero)
    assert scheduled(parent).execute() is True
    assert effects()[-1] == "gather"


def test_a_claimed_step_looks_once_more_before_its_body(drive, hero):
    class First(Workflow):
        @step(wait_for_children=True)
        def gather(self):
            did("gather")

    parent = First.create(hero=hero)
    (child,) = chores(parent)
    assert scheduled(parent).execute() is True
    assert (effects(), history(parent)) == ([], [("gather", "waiting", None)])
    finish(child)
    finish(parent)
    assert (effects()[-1], history(parent)) == ("gather", [("gather", "completed", "success")])


def test_children_that_end_before_the_step_is_reached_are_not_waited_for(drive, hero):
    parent = Household.create(hero=hero)
    for child in chores(parent, 2):
        finish(child)
    assert (ongoing_children(parent), reload(parent).ongoing_children) == (0, 0)
    work_off(drive)
    assert effects()[-1] == "gather 2 finished"


def test_a_wait_comes_before_the_children(drive, clock, hero):
    class Later(Workflow):
        @step
        def begin(self):
            pass

        @step(wait=60, wait_for_children=True)
        def gather(self):
            did("gather")

    parent = Later.create(hero=hero)
    (child,) = chores(parent)
    work_off(drive)
    assert (scheduled(parent).scheduled_for, reload(child).state) == (START + timedelta(seconds=60), "finished")


class Hurried(Workflow):
    @step
    def begin(self):
        pass

    @step(wait_for_children=True, timeout=3600)
    def pauses(self):
        did("pauses")

    @step(wait_for_children=True, timeout=3600, on_timeout="skip")
    def skips(self):
        did("skips")

    @step(wait_for_children=True, timeout=3600, on_timeout="run")
    def runs(self):
        did("runs")

    @step(wait_for_children=True, timeout=3600, on_timeout="cancel")
    def cancels(self):
        did("cancels")


def test_the_timeout_of_a_wait_for_children(drive, clock, helpers):
    parent, _ = household(cls=Hurried)
    helpers.assert_waiting_for(parent, None)
    assert waiting(parent).times_out_at == waiting(parent).due_at == START + timedelta(hours=1)
    helpers.travel(parent, 3600)
    error = parent.execution_history.order_by(StepExecution.number.desc()).get()
    assert (parent.state, error.outcome, parent.reason) == ("paused", "failed", "children were ongoing for 1 h")
    assert error.error_class_name == "geneva_drive.ChildrenTimeoutError"
    assert "the step pauses waited for the ends of its children for 1 h, and some are ongoing still" in (
        error.error_message
    )
    parent.resume()
    assert waiting(parent).times_out_at == START + timedelta(hours=2)  # it waits anew
    parent.skip()
    helpers.travel(parent, 3600)
    helpers.travel(parent, 3600)
    helpers.travel(parent, 3600)
    assert [(each.step_name, each.outcome) for each in parent.execution_history][2:] == [
        ("pauses", "skipped"),
        ("skips", "skipped"),
        ("runs", "success"),
        ("cancels", "canceled"),
    ]
    assert effects() == ["runs"]


def test_a_timeout_that_comes_after_the_last_end_changes_nothing(drive, clock):
    _, (child,) = household(cls=Hurried)
    child.cancel()
    clock.forward(hours=3)  # and no worker was there
    work_off(drive)
    assert effects() == ["pauses", "skips", "runs", "cancels"]


def test_a_paused_parent_looks_at_resume(drive):
    parent, (one, other) = household(2)
    parent.pause()
    finish(one)
    parent.resume()
    assert history(parent)[-1] == ("gather", "waiting", None)
    parent.pause()
    finish(other)
    assert (reload(parent).state, history(parent)[-1]) == ("paused", ("gather", "waiting", None))
    parent.resume()
    work_off(drive)
    assert (reload(parent).state, effects()[-1]) == ("finished", "gather 2 finished")


def test_a_parent_that_is_over_or_gone_is_told_and_nothing_follows(drive):
    parent, (one, other) = household(2)
    parent.cancel()
    finish(one)
    assert (reload(parent).state, ongoing_children(parent)) == ("canceled", 1)
    Workflow.delete().where(Workflow.id == parent.id).execute()
    assert reload(other).parent_id is None
    other.cancel()
    assert reload(other).state == "canceled"


def test_a_child_is_refused_by_what_is_no_parent_and_nothing_is_written(drive, hero):
    for wrong in (7, hero, "parent", Workflow):
        with pytest.raises(TypeError, match=r"Chore.create\(\): parent must be a workflow that was created, not"):
            Chore.create(hero=hero, parent=wrong)
        with pytest.raises(TypeError, match="parent must be a workflow"):
            Chore.create_many([hero], parent=wrong)
    assert Workflow.select().count() == 0
    over = Plain.create(hero=hero)
    over.cancel()
    for create in (
        lambda: Chore.create(hero=hero, parent=over),
        lambda: Chore.get_or_create(hero=hero, parent=over),
        lambda: Chore.create_many([hero], parent=over),
    ):
        with pytest.raises(gd.InvalidStateError, match=r"is canceled; a child's create\(\) was refused: it is allowed"):
            create()
    over.delete_instance()
    with pytest.raises(Workflow.DoesNotExist, match=r"was deleted; a child's create\(\) came too late"):
        Chore.create(hero=hero, parent=over)
    nothing_written(drive)


def test_what_is_found_keeps_its_parent_and_is_not_counted_again(drive, hero):
    parent, other = Household.create(hero=hero), Household.create(hero=User.create())
    child, created = Chore.get_or_create(hero=hero, parent=parent)
    assert (created, child.parent_id, ongoing_children(parent)) == (True, parent.id, 1)
    again, created = Chore.get_or_create(hero=hero, parent=other)
    assert (created, again.id, again.parent_id, ongoing_children(other)) == (False, child.id, parent.id, 0)
    with pytest.raises(gd.AlreadyOngoingError):
        Chore.create(hero=hero, parent=other)
    users = [hero, User.create(), User.create()]
    assert Chore.create_many(users, "ignore", parent=other) == 2
    assert (ongoing_children(parent), ongoing_children(other)) == (1, 2)
    with pytest.raises(gd.AlreadyOngoingError):
        Chore.create_many([User.create(), hero], parent=other)
    assert ongoing_children(other) == 2
    loner = Chore.create(hero=User.create())
    again, _ = Chore.get_or_create(hero=loner.hero, parent=parent)
    assert (again.id, again.parent_id, ongoing_children(parent)) == (loner.id, None, 1)


def test_a_rollback_leaves_neither_child_nor_count(db, drive, hero):
    parent = Household.create(hero=hero)
    with db.atomic() as transaction:
        chores(parent)
        Chore.create_many([User.create(), User.create()], parent=parent)
        assert ongoing_children(parent) == 3
        transaction.rollback()
    assert (ongoing_children(parent), Chore.select().count()) == (0, 0)


def test_a_step_makes_children_while_it_performs_and_in_its_own_transaction(drive, hero):
    class Splits(Workflow):
        @step
        def one(self):
            Chore.create(hero=User.create(), parent=self)

        @step(transactional=True)
        def two(self):
            Chore.create_many([User.create(), User.create()], parent=self)

        @step(wait_for_children=True)
        def gather(self):
            did(f"gather {self.children.count()}")

    parent = Splits.create(hero=hero)
    work_off(drive)
    assert (reload(parent).state, effects()[-1]) == ("finished", "gather 3")
    assert [each[2] for each in history(parent)] == ["success"] * 3


def test_the_end_of_a_grandchild_wakes_the_child_and_the_childs_the_parent(drive):
    parent = Household.create(hero=User.create())
    child = Household.create(hero=User.create(), parent=parent)
    (grandchild,) = chores(child)
    scheduled(parent).execute()
    scheduled(child).execute()
    finish(grandchild)
    assert (history(parent)[-1][1], history(child)[-1][1]) == ("waiting", "scheduled")
    assert (ongoing_children(parent), ongoing_children(child)) == (1, 0)
    scheduled(child).execute()
    assert (history(parent)[-1][1], ongoing_children(parent)) == ("scheduled", 0)
    work_off(drive)
    assert effects()[-2:] == ["gather 1 finished", "gather 1 finished"]


def test_a_child_that_goes_on_after_its_end_counts_again(drive):
    parent, (one, other) = household(2)

    finish(one)
    reload(one).resume_at("work")
    assert (ongoing_children(parent), reload(one).state) == (2, "ready")
    finish(other)
    assert history(parent)[-1] == ("gather", "waiting", None)
    finish(one)
    assert history(parent)[-1] == ("gather", "scheduled", None)
    reload(one).resume_at("work")  # which the step that is about to run sees
    assert scheduled(parent).execute() is True
    assert history(parent)[-1] == ("gather", "waiting", None)
    finish(one)
    work_off(drive)
    assert [each for each in effects() if "gather" in each] == ["gather 2 finished"]


# -- canceled with their parent --


def family(depth=3, width=2):
    """A parent with children, and theirs, down to so many generations; all of them, level by level."""
    levels = [[Household.create(hero=User.create())]]
    for _ in range(depth - 1):
        levels.append([child for parent in levels[-1] for child in chores(parent, width, Household)])
    return levels


def states(workflows):
    return [reload(each).state for each in workflows]


def test_a_parent_is_canceled_with_its_children_and_theirs(drive, monkeypatch):
    (parent,), children, grandchildren = family()
    told = []
    children[0].cancel()  # what is over stays as it is, and so does what is below it
    at = reload(children[0]).transitioned_at
    performing = gd._Attempt.claim(drive, scheduled(grandchildren[2]).id)
    grandchildren[3].pause()

    def receive(cls, workflow, old, new):
        told.append((workflow.id, old, new))

    gd.workflow_transitioned.connect(receive, "family")
    try:
        parent.cancel(children=True)
    finally:
        gd.workflow_transitioned.disconnect(name="family")
    assert (parent.state, states(children)) == ("canceled", ["canceled"] * 2)
    assert states(grandchildren) == ["ready", "ready", "canceled", "canceled"]
    assert reload(children[0]).transitioned_at == at
    ids = [each.id for each in (children[1], *grandchildren[2:], parent)]
    assert told == [(each, old, "canceled") for each, old in zip(ids, ["ready", "performing", "paused", "ready"])]
    assert [history(each)[0][1] for each in (children[1], *grandchildren[2:])] == [
        "canceled",
        "in_progress",
        "canceled",
    ]
    assert [ongoing_children(each) for each in (parent, *children)] == [0, 2, 0]
    told = f"canceled with Household {parent.id}"
    assert (reload(children[1]).reason, children[1].execution_history.get().reason) == (told, told)
    performing._record(gd._Verdict("step", "return"))  # what it did is recorded, and nothing follows
    assert (reload(grandchildren[2]).state, history(grandchildren[2])) == (
        "canceled",
        [("begin", "completed", "success")],
    )
    work_off(drive)
    assert effects() == ["begin"] * 2 + ["gather"] * 2  # of those below the child that was over before


def test_a_reason_is_not_taken_for_the_word_to_cancel_the_children(drive):
    parent, (child,) = household()
    with pytest.raises(TypeError):
        parent.cancel("sold out")
    assert (reload(parent).state, reload(child).state) == ("ready", "ready")


def test_without_being_told_so_a_parent_leaves_its_children(drive):
    parent, (child,) = household()
    parent.cancel()
    assert (reload(child).state, ongoing_children(parent)) == ("ready", 1)


@pytest.mark.parametrize("way", ["body", "handler", "swallowed", "transactional", "reason"])
def test_a_step_cancels_the_children_with_its_workflow(drive, hero, way):
    class Gives(Workflow):
        @on_exception(KeyError)
        def give_up(self, error):
            self.cancel(children=True)

        @step(transactional=way == "transactional")
        def up(self):
            chores(self, 2)
            if way == "handler":
                raise KeyError("x")
            if way == "reason":
                self.cancel(children=True, reason="sold out")
            if way == "swallowed":
                with contextlib.suppress(BaseException):
                    self.cancel(children=True)
                return
            self.cancel(children=True)

    grandparent = Household.create(hero=User.create())
    parent = Gives.create(hero=hero, parent=grandparent)
    with contextlib.suppress(KeyError):
        scheduled(parent).execute()
    assert reload(parent).state == "canceled"
    assert [child.state for child in parent.children] == ["canceled"] * 2
    reason = "sold out" if way == "reason" else f"canceled with Gives {parent.id}" if way != "handler" else None
    assert reason is None or {child.reason for child in parent.children} == {reason}
    assert (ongoing_children(parent), ongoing_children(grandparent)) == (0, 0)
    work_off(drive)
    assert effects() == ["begin", "gather 1 canceled"]


def test_a_later_call_or_error_is_obeyed_without_the_children(drive, hero):
    class Wavers(Workflow):
        @step(on_exception="cancel")
        def work(self):
            chores(self)
            with contextlib.suppress(BaseException):
                self.cancel(children=True)
            raise KeyError("x")

    parent = Wavers.create(hero=hero)
    with pytest.raises(KeyError):
        scheduled(parent).execute()
    assert (reload(parent).state, states(parent.children)) == ("canceled", ["ready"])


def test_thousands_of_children_are_canceled_with_few_statements(db, drive, monkeypatch, is_exhaustive):
    count = 10_000 if is_exhaustive else 2000
    parent = Household.create(hero=User.create())
    Chore.create_many([User(id=number) for number in range(1, count + 1)], parent=parent)
    generation = parent
    for _ in range(20):  # one below the other
        generation = Household.create(hero=User.create(), parent=generation)
    costs = Costs(db, monkeypatch)
    _, statements, transactions = costs.of(lambda: parent.cancel(children=True))
    assert transactions == 1
    assert len(statements) < 100
    assert Counter(each.state for each in Workflow.select()) == {"canceled": count + 21}
    assert StepExecution.select().where(StepExecution.state != "canceled").count() == 0


# -- deletion --


@pytest.mark.parametrize("keys", ["on", "off"])
@pytest.mark.parametrize("how", ["housekeeping", "delete()", "delete_instance()"])
def test_children_lose_a_parent_that_is_deleted(db, drive, clock, how, keys):
    parent, (child,) = household()
    parent.cancel()
    if isinstance(db, SqliteDatabase):
        db.execute_sql(f"pragma foreign_keys = {keys}")
    try:
        if how == "housekeeping":
            clock.forward(days=31)
            assert drive.housekeeping()["workflows_cleaned_up"] == 1
        elif how == "delete()":
            Workflow.delete().where(Workflow.id == parent.id).execute()
        else:
            parent.delete_instance()
    finally:
        if isinstance(db, SqliteDatabase):
            db.execute_sql("pragma foreign_keys = on")
    assert (reload(child).parent_id, reload(child).parent) == (None, None)
    work_off(drive)
    assert reload(child).state == "finished"


def test_what_is_over_is_kept_as_long_as_its_parent_is_ongoing(drive, clock):
    parent, (one, other) = household(2)
    grandchild, loner = chores(other) + chores(None)
    for each in (one, grandchild, loner):
        finish(each)
    clock.forward(days=31)
    assert drive.housekeeping()["workflows_cleaned_up"] == 1
    assert {each.id for each in Workflow.select()} == {parent.id, one.id, other.id, grandchild.id}
    finish(other)
    drive.housekeeping()
    assert {each.id for each in Workflow.select()} == {parent.id, one.id, other.id}
    work_off(drive)
    drive.housekeeping()
    assert {each.id for each in Workflow.select()} == {parent.id, other.id}  # these ended just now
    clock.forward(days=31)
    drive.housekeeping()
    assert Workflow.select().count() == 0


def test_housekeeping_wakes_who_waits_for_children_that_were_deleted(drive, clock):
    parent, (one, other) = household(2)
    untouched, _ = household(2)
    one.delete_instance()
    _sweep()
    assert (history(parent)[-1][1], reload(parent).ongoing_children) == ("waiting", 2)
    other.delete_instance()
    assert drive.doctor() == [f"execution {waiting(parent).id} waits for no signal, and for no child"]
    _sweep()
    assert (history(parent)[-1][1], ongoing_children(parent)) == ("scheduled", 0)
    assert (history(untouched)[-1][1], ongoing_children(untouched)) == ("waiting", 2)
    one, _ = untouched.children
    one.delete_instance()
    Workflow.delete().where(Workflow.type == "Chore").execute()
    untouched.pause()
    _sweep()
    assert (reload(untouched).state, ongoing_children(untouched)) == ("paused", 0)
    untouched.resume()
    work_off(drive)
    assert {each.state for each in Workflow.select()} == {"finished"}


def test_doctor_finds_a_parent_that_counts_too_few_children(drive):
    parent, _ = household(2)
    parent._write(ongoing_children=1)
    diagnosed(drive, f"workflow {parent.id} counts 1 ongoing children, but has 2")


# -- definitions, words --


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"wait_for_children": 1}, "wait_for_children must be a bool, not 1"),
        ({"wait_for_children": True, "wait_for": "go"}, "wait_for and wait_for_children exclude each other"),
        ({"wait_for_children": True, "matching": bool}, "matching goes with wait_for only"),
        ({"wait_for_children": False, "timeout": 1}, "timeout goes with wait_for or wait_for_children only"),
        ({"wait_for_children": True, "on_timeout": "run"}, "on_timeout goes with timeout only"),
    ],
)
def test_a_wrong_wait_for_children_is_told_when_the_class_is_defined(options, problem):
    with pytest.raises(gd.StepConfigurationError, match=f"Wrong.gather: .*{problem}"):

        class Wrong(Workflow):
            @step(**options)
            def gather(self):
                pass


@pytest.mark.parametrize("name", ["parent", "parent_id", "children", "ongoing_children"])
def test_a_step_is_not_called_as_the_family_is(name):
    with pytest.raises(gd.StepConfigurationError, match=f"Wrong.{name}: "):
        type(Workflow)("Wrong", (Workflow,), {name: step("run"), "run": lambda self: None})


def test_what_is_said_of_a_wait_for_children(drive, helpers, capsys):
    parent, (child,) = household(cls=Hurried)
    assert '"pauses<br/>wait for children, after 1 h pause"' in Hurried.graph()
    with pytest.raises(AssertionError, match=r"pauses waits; for its children: run those in workflow.children, or tra"):
        helpers.perform_next_step(parent)
    helpers.speedrun_workflow(parent)
    assert parent.state == "ready"
    (metric,) = (each for each in drive.stats() if each.name == "geneva_drive_waiting_steps")
    assert (metric.labels, metric.value) == ({"type": "Hurried", "signal": ""}, 1)
    assert [each for each in drive._reports.stranded() if each.type == "Hurried"] == []
    assert drive.is_idle() is False  # for the child's sake
    finish(child)
    helpers.speedrun_workflow(parent)
    assert effects()[0].startswith("work")


def test_a_deploy_that_takes_the_wait_away_lets_the_last_end_wake_it_all_the_same(drive, hero):
    parent, _ = household()

    class Household(Workflow):
        @step
        def gather(self):
            did("gather without waiting")

    try:
        reload(parent).pause()
        reload(parent).resume()
        work_off(drive)
        assert "gather without waiting" in effects()
        assert reload(parent).state == "finished"
    finally:
        gd._register(globals()["Household"])


# -- what it costs --


def test_a_parent_to_be_told_costs_two_statements_and_others_nothing(db, drive, hero, monkeypatch):
    parent, other = Household.create(hero=hero), Chore.create(hero=User.create())
    child, _ = chores(parent, 2)
    costs, budget = Costs(db, monkeypatch), budget_of(drive)
    _, statements, transactions = costs.of(lambda: Chore.create(hero=User.create(), parent=parent))
    assert (len(statements), transactions) == (budget["create"][0] + 2, 1)
    alone, told = (gd._Attempt.claim(drive, scheduled(each).id) for each in (other, child))
    _, alone, _ = costs.of(lambda: alone._record(gd._Verdict("step", "return")))
    assert not any("FOR UPDATE" in sql for sql in alone)
    _, told, transactions = costs.of(lambda: told._record(gd._Verdict("step", "return")))
    assert (len(told), transactions) == (len(alone) + 2, 1)
    assert ongoing_children(parent) == 2


@pytest.mark.parametrize("crowd", ["few", "many"])
def test_an_end_costs_the_same_whatever_the_number_of_children(db, drive, hero, monkeypatch, crowd, is_exhaustive):
    count = 100 if crowd == "few" else 20_000 if is_exhaustive else 3000
    parent = Household.create(hero=hero)
    Chore.create_many([User(id=number) for number in range(1, count + 1)], parent=parent)
    scheduled(parent).execute()
    of_chores, last = Workflow.type == "Chore", Chore.select(peewee.fn.MAX(Workflow.id)).scalar()
    over = {"state": "finished", "transitioned_at": START, "current_step_name": None}
    Workflow.update(over).where(of_chores & (Workflow.id != last)).execute()
    ended = {"state": "completed", "outcome": "success", "finished_at": START, "queue": None}
    StepExecution.update(ended).where(StepExecution.workflow.not_in([parent.id, last])).execute()
    parent._write(ongoing_children=1)
    costs, child = Costs(db, monkeypatch), Chore.get_by_id(last)
    _, statements, _ = costs.of(child.cancel)
    assert len(statements) == 8  # of the parent, the child and an execution of each, the row is locked, and written
    assert history(parent)[-1] == ("gather", "scheduled", None)


# -- races: two that end at once, many that end while their processes are killed --


def _old_snapshot(number, url, child_id, results):
    GenevaDrive(open_database(url))
    Workflow.get_by_id(child_id).cancel()
    results.put("canceled")


#: Of each database, what a session begins with: its isolation levels.
ISOLATIONS = {
    "sqlite": [""],
    "postgresql": [
        f"set session characteristics as transaction isolation level {level}"
        for level in ("read committed", "repeatable read", "serializable")
    ],
    "mysql": [
        f"set session transaction isolation level {level}"
        for level in ("read committed", "repeatable read", "serializable")
    ],
}


@contextlib.contextmanager
def isolated(db, level):
    """The connection of this thread begins its transactions with a level."""
    db.close()
    if level:
        db.execute_sql(level)
    try:
        yield
    finally:
        db.close()


LEVELS = [
    pytest.param(kind, level, id=f"{kind} {level.split('level ')[-1]}".strip())
    for kind in SERVERS
    for level in ISOLATIONS[kind]
]


@pytest.mark.parametrize(("database", "level"), LEVELS, indirect=["database"])
def test_of_two_children_that_end_at_the_same_instant_one_wakes_the_parent(database, db, drive, level):
    parent, (one, other) = household(2)
    blocked, failures = threading.Event(), []

    def end_beside():
        try:
            with isolated(db, level):
                begin = db.cursor

                def cursor(*arguments, **options):
                    blocked.set()  # this one's first statement, which has its snapshot, waits for the other's commit
                    return begin(*arguments, **options)

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(db, "cursor", cursor)
                    other.cancel()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=end_beside)
    with isolated(db, level):
        with drive._access.begin():
            one.cancel()
            thread.start()
            assert blocked.wait(10)
            if not isinstance(db, SqliteDatabase):
                until_one_waits_for_a_lock(database.url)
        thread.join()
    assert failures == []
    assert (ongoing_children(parent), history(parent)[-1]) == (0, ("gather", "scheduled", None))


@pytest.mark.parametrize(("database", "level"), LEVELS, indirect=["database"])
def test_a_child_that_is_created_as_housekeeping_mends_the_count_of_others_is_counted(database, db, drive, level):
    parent, (gone,) = household()
    gone.delete_instance()

    def sweep_beside():
        with isolated(db, level):
            drive._recovery._recover_parents()

    with isolated(db, level), ThreadPoolExecutor(1) as threads:
        with drive._access.begin():
            chores(parent)
            sweep = threads.submit(sweep_beside)
            if not isinstance(db, SqliteDatabase):
                until_one_waits_for_a_lock(database.url)
        sweep.result(timeout=60)
    drive._recovery._recover_parents()
    assert (reload(parent).ongoing_children, violations(drive)) == (2, [])  # healed once there is none
    assert history(parent)[-1] == ("gather", "waiting", None)


def until_one_waits_for_a_lock(url):
    """Until a session of the server waits for another one's lock on a row."""

    def is_waiting():
        if isinstance(beside, peewee.PostgresqlDatabase):
            waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
            return beside.execute_sql(waiting).fetchone()[0] > 0
        return "LOCK WAIT" in beside.execute_sql("show engine innodb status").fetchone()[2]

    # On no connection that is in a transaction: to such a one, PostgreSQL shows the sessions of its first look.
    with contextlib.closing(open_database(url)) as beside:
        until(is_waiting)


@pytest.mark.parametrize(
    ("database", "level"), [each for each in LEVELS if "sqlite" not in each.id], indirect=["database"]
)
def test_a_transaction_with_an_older_snapshot_misses_no_end(database, db, drive, level):
    parent, (one, other) = household(2)
    database.peewee.close()
    attempts = itertools.count(1)
    with isolated(db, level):
        while True:
            try:
                with db.atomic():  # the caller's own, which is its to repeat
                    Effect.select().count()  # what it sees from now on is how things were at this moment
                    if next(attempts) == 1:
                        in_processes(1, _old_snapshot, database.url, one.id)
                    other.cancel()
                break
            except peewee.DatabaseError as error:
                if not drive._access.is_transient(error):
                    raise
    assert (ongoing_children(parent), history(parent)[-1]) == (0, ("gather", "scheduled", None))


def test_with_strict_isolation_many_that_end_at_once_wake_their_parent_once(strict, caplog):
    parent = Household.create(hero=User.create())
    Chore.create_many([User.create() for _ in range(30)], parent=parent)
    strict.run(workers=4, until=strict.is_idle)
    assert (effects().count("gather 30 finished"), reload(parent).state) == (1, "finished")
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def _consume(url):
    """A consumer, until nothing is to be done."""
    db = open_database(url)
    for model in MODELS:
        model.bind(db)
    drive = GenevaDrive(db, run_on=0)
    drive.run(workers=2, until=drive.is_idle)


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="elsewhere it takes minutes to take them for dead")
def test_children_that_end_in_processes_that_are_killed_wake_their_parent_once(database, db, drive, is_exhaustive):
    count, kills = (1000, 30) if is_exhaustive else (60, 3)

    def begin():
        db.close()
        process = fork.Process(target=_consume, args=(database.url,))
        process.start()
        return process

    grandparent = Household.create(hero=User.create())
    parent = Household.create(hero=User.create(), parent=grandparent)
    Chore.create_many([User.create() for _ in range(count)], parent=parent)
    processes = [begin() for _ in range(3)]
    for kill in range(kills):
        done = (kill + 1) * count // (kills + 1)
        until(lambda: Chore.finished().count() >= done)  # noqa: B023
        processes[kill % 3].kill()
        processes[kill % 3].join()
        processes[kill % 3] = begin()  # the first thing that it does is to recover what the other one left
    for each in processes:
        each.join()
        assert each.exitcode == 0
    assert Counter(each.state for each in Workflow.select()) == {"finished": count + 2}
    for each in (parent, grandparent):
        attempts = [(one.step_name, one.outcome) for one in each.execution_history if one.outcome != "recovered"]
        assert attempts == [("begin", "success"), ("gather", "success")]
        assert ongoing_children(each) == 0


def _cancel_family(number, url, parent_id, barrier, results):
    db = open_database(url)
    for model in MODELS:
        model.bind(db)
    drive = GenevaDrive(db)
    barrier.wait(timeout=60)
    if number == 0:
        Workflow.get_by_id(parent_id).cancel(children=True)
    else:
        drive.run(workers=2, until=drive.is_idle)


def test_a_parent_is_canceled_with_children_that_perform_and_create_and_nothing_goes_on(database, drive, is_exhaustive):
    for _ in range(10 if is_exhaustive else 2):
        (parent,), *_ = family(depth=3, width=6)
        database.peewee.close()
        in_processes(3, _cancel_family, database.url, parent.id, fork.Barrier(3))
        assert reload(parent).state in ("canceled", "finished")
        assert Workflow.ongoing().count() == 0
        for each in Workflow.select():
            assert ongoing_children(each) == 0
        assert violations(drive) == []


# ==== What a deploy may take away =====================================================================================


def test_a_workflow_whose_class_is_gone_stays_scheduled_and_can_be_canceled(drive, clock, hero, caplog):
    workflow = Plain.create(hero=hero)
    Workflow.update(type="GoneSince").execute()
    gone = reload(workflow)
    assert type(gone) is Workflow
    assert scheduled(gone).execute() is False
    assert "'GoneSince', which no class defines" in caplog.text
    assert (reload(gone).state, history(gone)) == ("ready", [("one", "scheduled", None)])
    clock.forward(minutes=5)
    work_off(drive)
    assert (messages(drive), history(gone)) == ([scheduled(gone).id], [("one", "scheduled", None)])
    gone.pause()
    for call in (gone.resume, gone.skip):
        with pytest.raises(gd.WorkflowNotDefinedError, match="GoneSince"):
            call()
    gone.cancel()
    assert (reload(gone).state, history(gone)) == ("canceled", [("one", "canceled", "canceled")])


def test_a_workflow_whose_class_is_gone_is_still_recovered(drive, clock, hero):
    workflow = Plain.create(hero=hero)
    gd._Attempt.claim(drive, scheduled(workflow).id)
    Workflow.update(type="GoneSince").execute()
    clock.forward(minutes=5)
    assert drive.housekeeping()["stuck_in_progress_recovered"] == 1
    assert history(workflow) == [("one", "failed", "recovered"), ("one", "scheduled", None)]


def test_a_workflow_whose_heros_model_is_gone_stays_scheduled(drive, hero, caplog):
    workflow = Plain.create(hero=hero)
    Workflow.update(hero_type="GoneModel").execute()
    assert scheduled(workflow).execute() is False
    assert "no model called 'GoneModel'" in caplog.text
    assert reload(workflow).state == "ready"


def test_a_paused_workflow_whose_step_is_gone_goes_on_with_another(drive, hero, helpers):
    workflow = Plain.create(hero=hero)
    StepExecution.update(step_name="renamed").execute()
    Workflow.update(current_step_name="renamed").execute()
    with pytest.raises(gd.StepNotDefinedError, match=r"'renamed' \(it has: one, two, three\); define it again, "):
        scheduled(workflow).execute()
    row = reload(workflow)
    assert (row.state, history(row)) == ("paused", [("renamed", "failed", "failed")])
    assert row.execution_history.get().error_class_name.endswith("StepNotDefinedError")
    for call in (row.resume, row.skip):
        with pytest.raises(gd.StepNotDefinedError, match=r"or move on with resume_at\(\) to one of these$"):
            call()
    for call in (row.resume_at, functools.partial(helpers.perform_step_inline, row)):
        with pytest.raises(gd.StepNotDefinedError, match=r"'nowhere' \(it has: one, two, three\); use one of these$"):
            call("nowhere")
    row.resume_at("three")
    helpers.speedrun_workflow(row)
    assert (row.state, effects()) == ("finished", ["three"])


# ==== Removed steps, and old code beside new ==========================================================================


def version(**declared):
    """The class Tour as one version of the code has it; every step does what its name says."""

    def go(self):
        did(self.current_step_name)

    return type(Workflow)("Tour", (Workflow,), {"go": go, "__qualname__": "version.<locals>.Tour", **declared})


def deploy(cls):
    """Let the rows of a type find another version of their class from now on, as in a process that has it."""
    gd._workflow_classes[cls.workflow_type] = cls


ONE_TWO_THREE = {"one": step("go"), "two": step("go", wait=60), "three": step("go")}


def work_off_at(drive, queue="default"):
    """What a consumer does at the time that the drive's clock shows."""
    for task in drive.queues[queue].read_schedule(drive.clock().replace(tzinfo=None)):
        drive.queues[queue].enqueue(task)
    work_off(drive, queue)


def without(*removed):
    return version(**{name: removed_step() if name in removed else each for name, each in ONE_TWO_THREE.items()})


def standing_at(place):
    """A workflow of the old code that came to a step."""
    workflow, helpers = version(**ONE_TWO_THREE).create(hero=User.create()), gd.TestHelpers()
    while workflow.current_step_name != place:
        helpers.perform_next_step(workflow)
    return workflow


def _paused_at(place):
    workflow = standing_at(place)
    workflow.pause()
    return workflow


def _failed_at(place):
    workflow = standing_at(place)
    attempt = gd._Attempt.claim(gd._drive(), scheduled(workflow).id)
    attempt._record(gd._Verdict("error", "pause", error=OddError("as ever")))
    return reload(workflow)


def _died_at(place):
    workflow = standing_at(place)
    gd._Attempt.claim(gd._drive(), scheduled(workflow).id)
    return reload(workflow)


#: How a workflow may stand at a step, and the rows that tell of it before the one that was skipped.
STANDING = {
    "scheduled": (standing_at, []),
    "paused": (_paused_at, []),
    "paused by an error": (_failed_at, [("failed", "failed")]),
    "dead in mid-step": (_died_at, [("failed", "recovered")]),
}


@pytest.mark.parametrize("place", ONE_TWO_THREE)
@pytest.mark.parametrize("standing", STANDING)
def test_a_workflow_that_stands_at_a_removed_step_goes_on_with_the_next_one(drive, clock, helpers, standing, place):
    stand, before = STANDING[standing]
    workflow = stand(place)
    deploy(without(place))
    if workflow.state == "paused":
        reload(workflow).resume()
    for _ in range(2):
        clock.forward(minutes=10)
        drive.housekeeping()
        work_off_at(drive)
    row = reload(workflow)
    assert [each[1:] for each in history(row) if each[0] == place] == [*before, ("skipped", "skipped")]
    assert (row.state, effects()) == ("finished", [name for name in ONE_TWO_THREE if name != place])


@pytest.mark.parametrize("place", ONE_TWO_THREE)
@pytest.mark.parametrize("is_paused", [False, True])
def test_a_removed_step_can_be_skipped_by_hand(drive, helpers, is_paused, place):
    workflow = _failed_at(place) if is_paused else standing_at(place)
    deploy(without(place))
    workflow = reload(workflow)
    workflow.skip()
    assert (place, "skipped", "skipped") in history(workflow)
    helpers.speedrun_workflow(workflow)
    assert (workflow.state, effects()) == ("finished", [name for name in ONE_TWO_THREE if name != place])


@pytest.mark.parametrize("how", ["timeout", "resume", "skip"])
def test_what_waits_for_a_signal_at_a_removed_step_goes_on(drive, clock, helpers, how):
    waits = step("go", wait_for="paid", timeout=3600, on_timeout="cancel")
    workflow = version(**{**ONE_TWO_THREE, "two": waits}).create(hero=User.create())
    helpers.perform_next_step(workflow)
    assert history(workflow)[-1] == ("two", "waiting", None)
    if how == "resume":
        workflow.pause()
    deploy(without("two"))
    workflow = reload(workflow)
    assert stranded(drive) == [("wait", "Tour", "paid", 1)]  # without a timeout it would wait for ever
    if how == "timeout":
        clock.forward(hours=1)
    else:
        getattr(workflow, how)()
    work_off_at(drive)
    assert (reload(workflow).state, effects()) == ("finished", ["one", "three"])
    assert history(workflow)[1] == ("two", "skipped", "skipped")


def test_new_workflows_do_not_come_by_removed_steps(drive, helpers, hero):
    tour = without("one", "three")
    assert names(tour) == ["two"]
    assert "one" not in tour.graph()
    assert tour.create_many([User.create()]) == 1
    workflow = tour.create(hero=hero)
    assert (workflow.previous_step_name, workflow.current_step_name, workflow.next_step_name) == (None, "two", None)
    helpers.speedrun_workflow(workflow)
    assert history(workflow) == [("two", "completed", "success")]
    with pytest.raises(gd.StepConfigurationError, match=r"Tour.create.*no steps"):
        without(*ONE_TWO_THREE).create(hero=hero)


def test_the_next_step_waits_from_the_moment_when_the_removed_one_was_due(drive, clock, helpers):
    workflow = standing_at("one")
    deploy(without("one"))
    clock.forward(seconds=30)
    work_off(drive)
    assert scheduled(workflow).scheduled_for == START + timedelta(seconds=90)
    removed = workflow.execution_history.get()
    assert (removed.started_at, removed.finished_at, removed.error_message) == (clock(), clock(), None)


def test_several_steps_removed_in_a_row_are_passed_over_at_once(drive, helpers):
    first, second = standing_at("one"), standing_at("two")
    deploy(without("one", "two"))
    for workflow in (first, second):
        workflow = reload(workflow)
        assert workflow.next_step_name == "three"
        helpers.speedrun_workflow(workflow)
    assert [name for name, *_ in history(first)] == ["one", "three"]
    assert effects() == ["one", "three", "three"]


def test_a_condition_cancels_a_workflow_at_a_removed_step_before_it_is_skipped(drive, helpers):
    withdrawn, orphan = standing_at("two"), standing_at("two")
    leave = cancel_if(lambda self: not self.hero.active)
    deploy(version(leave=leave, **{**ONE_TWO_THREE, "two": removed_step()}))
    User.update(active=False).where(User.id == withdrawn.hero_id).execute()
    User.delete().where(User.id == orphan.hero_id).execute()
    for workflow in (withdrawn, orphan):
        helpers.speedrun_workflow(workflow)
        assert (workflow.state, history(workflow)[-1]) == ("canceled", ("two", "canceled", "canceled"))


def test_a_removed_step_cannot_be_resumed_at_or_performed(drive, helpers):
    workflow = _paused_at("two")
    deploy(without("two"))
    workflow = reload(workflow)
    problem = r"Tour has no step 'two' \(it has: one, three\); it was removed: use another one"
    for call in (workflow.resume_at, lambda name: helpers.perform_step_inline(workflow, name)):
        with pytest.raises(gd.StepNotDefinedError, match=problem):
            call("two")
    assert (workflow.previous_step_name, workflow.next_step_name) == ("one", "three")
    assert (reload(workflow).state, history(workflow)[-1]) == ("paused", ("two", "scheduled", None))
    workflow.resume_at("three")
    helpers.speedrun_workflow(workflow)
    assert effects() == ["one", "three"]


def test_a_list_of_steps_can_be_shortened_at_either_end(drive, helpers):
    long = version(polling=[step("go", wait=5)] * 4, last=step("go"))
    workflows = []
    for number in range(4):
        workflows.append(long.create(hero=User.create()))
        for _ in range(number):
            helpers.perform_next_step(workflows[-1])
    Effect.delete().execute()
    polling = [removed_step(), *[step("go", wait=5)] * 2, removed_step(name="polling_4")]
    short = version(polling=polling, last=step("go"))
    assert names(short) == ["polling_2", "polling_3", "last"]
    deploy(short)
    for workflow in workflows:
        helpers.speedrun_workflow(workflow)
    rest = ["polling_2", "polling_3", "last"]
    assert effects() == [*rest, *rest, "polling_3", "last", "last"]


def test_a_child_removes_what_its_parent_declares_and_a_grandchild_brings_it_back(drive, hero, helpers):
    class Parent(Workflow):
        polling = [step("check")] * 3

        @step
        def one(self):
            did("one")

        def check(self):
            did(self.current_step_name)

    class Child(Parent):
        one = removed_step()
        second = removed_step(name="polling_2")

        @step(before_step="one")
        def before(self):
            did("before")

        @step(after_step="one")
        def after(self):
            did("after")

    class Grandchild(Child):
        @step
        def one(self):
            did("one again")

    class Silent(Child):
        def one(self):
            """A method like any other: only @step brings the step back."""

    assert names(Parent) == ["polling_1", "polling_2", "polling_3", "one"]
    assert names(Child) == names(Silent) == ["polling_1", "polling_3", "before", "after"]
    assert names(Grandchild) == ["polling_1", "polling_3", "before", "one", "after"]
    helpers.speedrun_workflow(Grandchild.create(hero=hero))
    assert effects() == ["polling_1", "polling_3", "before", "one again", "after"]


def test_a_removed_step_keeps_the_place_that_before_step_or_after_step_gave_it():
    class Parent(Workflow):
        @step
        def one(self):
            pass

        @step
        def two(self):
            pass

    class Child(Parent):
        ahead = removed_step(before_step="one")
        between = removed_step("in between", after_step="one")
        behind = removed_step()

    assert [each.name for each in Child._blueprint.steps] == ["ahead", "one", "in between", "two", "behind"]
    assert names(Child) == ["one", "two"]


def test_the_name_of_a_removed_step_may_be_that_of_an_attribute_since():
    class Renamed(Workflow):
        was_pause = removed_step("pause")

        @step
        def one(self):
            pass

    assert Renamed._find("pause").removed


BAD_REMOVALS = {
    "pause = removed_step()": r"Bad.pause: a step must not be called 'pause'",
    "gone = removed_step(3)": r"Bad.3: name must be text of 1 to 255 printable characters, not 3",
    "gone = removed_step('')": r"Bad.: name must be text of 1 to 255 .*, not ''",
    "gone = removed_step(before_step='nowhere')": r"Bad.gone: there is no step 'nowhere' yet",
    "gone = removed_step(before_step='one', after_step='one')": r"Bad.gone: before_step and after_step exclude",
    "one = removed_step()": r"Bad.one: the step is declared twice",
    "gone = removed_step('one')": r"Bad.one: the step is declared twice",
    "gone = removed_step()\ngone = step('one')": r"Bad.gone: the step is declared twice",
    "gone = removed_step()\ndef gone(self): pass": r"Bad.gone: the step is declared twice",
    "many = [removed_step('many_2'), removed_step()]": r"Bad.many_2: the step is declared twice",
    "gone = removed_step()\nagain = step('gone')": r"Bad.again: its body 'gone' is not a method of the class",
}


@pytest.mark.parametrize("body", BAD_REMOVALS)
def test_a_wrong_removal_names_class_step_and_fix(body):
    lines = ["@step", "def one(self): pass", *body.splitlines()]
    code = "class Bad(Workflow):\n" + "\n".join(f"    {line}" for line in lines)
    with pytest.raises(gd.StepConfigurationError, match=BAD_REMOVALS[body]):
        exec(code, {**globals(), "__name__": "elsewhere"})
    assert "Bad" not in gd._workflow_classes


SOUND_BEFORE_A_DEPLOY = "all that ongoing workflows need is defined: their classes, steps, heroes and signals\n"


def test_the_steps_in_flight_that_a_deploy_would_strand_are_counted(drive, helpers, command_line):
    many = [standing_at("two") for _ in range(3)]
    many[0].pause()
    gd._Attempt.claim(drive, scheduled(many[1]).id)
    over = standing_at("two")
    over.cancel()
    standing_at("three")
    dog, cat = Dog.create(hero=User.create()), Cat.create(hero=User.create())
    assert Workflow.undefined_steps_in_flight() == []
    assert command_line("doctor", "--deploy")[:2] == (0, SOUND_BEFORE_A_DEPLOY)

    deploy(version(one=step("go"), three=step("go")))
    Workflow.update(type="Horse").where(Workflow.id == cat.id).execute()
    Workflow.update(current_step_name="fetch 'it'").where(Workflow.id == dog.id).execute()
    StepExecution.update(step_name="fetch 'it'").where(StepExecution.workflow == dog.id).execute()
    found = [("Dog", "fetch 'it'", 1), ("Horse", cat.current_step_name, 1), ("Tour", "two", 3)]
    assert Workflow.undefined_steps_in_flight() == found
    assert gd.UndefinedStep("Dog", "fetch 'it'", 1) in Animal.undefined_steps_in_flight()
    assert Animal.undefined_steps_in_flight() == Dog.undefined_steps_in_flight() == found[:1]
    assert Plain.undefined_steps_in_flight() == []
    assert gd._workflow_classes["Tour"].undefined_steps_in_flight() == found[2:]

    status, output, _ = command_line("doctor", "--deploy")
    dog_line, cat_line, tour_line = output.splitlines()
    assert status == 1
    assert dog_line.startswith("1 ongoing workflow of Dog stands at the step \"fetch 'it'\", which the class does not ")
    assert dog_line.endswith(
        "define: keep the name, by @step(name=\"fetch 'it'\"), or put removed_step(\"fetch 'it'\") in its place"
    )
    assert cat_line.endswith(" and no class defines that type: import it, or set workflow_type on its successor")
    assert tour_line.startswith(
        "3 ongoing workflows of Tour stand at the step 'two', which the class does not define: "
    )
    assert tour_line.endswith("keep the name, by @step(name='two'), or put two = removed_step() in its place")
    status, output, _ = command_line("doctor", "--deploy", "--json")
    kinds = ("step", "class", "step")
    expected = [(kind, *each, line) for kind, each, line in zip(kinds, found, [dog_line, cat_line, tour_line])]
    keys = ("kind", "type", "name", "workflows", "problem")
    assert (status, json.loads(output)) == (1, [dict(zip(keys, each)) for each in expected])
    assert command_line("doctor") == (0, "all is sound\n", "")

    deploy(without("two"))
    assert Workflow.undefined_steps_in_flight() == found[:2]


def test_the_heroes_whose_model_a_deploy_would_lose_are_counted(drive, command_line, monkeypatch):
    namespace = {"__name__": "shops", "Model": Model}
    exec("class Shop(Model): pass", namespace)
    exec("class Till(Model): pass", namespace)
    for number in range(3):
        Plain.create(hero=namespace["Shop"](id=number))
    Quick.create(hero=namespace["Shop"](id=1)).pause()
    Plain.create(hero=namespace["Shop"](id=7)).cancel()
    Plain.create(hero=namespace["Till"](id=1))
    assert command_line("doctor", "--deploy")[0] == 0

    monkeypatch.setattr(gd, "_hero_models", {})
    namespace["Shop"]._meta.hero_type = "Store"  # as a model is that was renamed
    exec("class Till(Model): pass", other := {"__name__": "banks", "Model": Model})
    status, output, _ = command_line("doctor", "--deploy")
    plain, ambiguous, quick = output.splitlines()
    fix = "no model called 'Shop' is defined: import it, or set hero_type = 'Shop' in the Meta of its successor"
    assert (status, plain) == (1, f"3 ongoing workflows of Plain need a hero of the type 'Shop', but {fix}")
    assert quick == f"1 ongoing workflow of Quick needs a hero of the type 'Shop', but {fix}"
    assert "of Plain needs a hero of the type 'Till', but the hero type 'Till' is ambiguous: " in ambiguous
    found = json.loads(command_line("doctor", "--deploy", "--json")[1])
    assert [(each["kind"], each["type"], each["name"], each["workflows"]) for each in found] == [
        ("hero", "Plain", "Shop", 3),
        ("hero", "Plain", "Till", 1),
        ("hero", "Quick", "Shop", 1),
    ]
    namespace["Shop"]._meta.hero_type = "Shop"
    other["Till"]._meta.hero_type = "Safe"
    assert command_line("doctor", "--deploy")[:2] == (0, SOUND_BEFORE_A_DEPLOY)
    for model in (*namespace.values(), *other.values()):  # they may outlive the test, in its next run
        if model is not Model and isinstance(model, peewee.ModelBase):
            model._meta.hero_type = "of another test"


def waits_for(*names):
    """Deploys a class with a step for each of these signals; one of None does not wait."""
    steps = {
        f"step_{number}": step("go", wait_for=name) if isinstance(name, str | None) else name
        for number, name in enumerate(names, 1)
    }

    def go(self):
        did(str(self.signal_payload))

    deploy(type(Workflow)("Claim", (Workflow,), {"go": go, "__qualname__": "waits_for.<locals>.Claim", **steps}))


def claims(number):
    return [gd._workflow_classes["Claim"].create(hero=User.create()) for _ in range(number)]


def stranded(drive):
    return [each[:4] for each in drive._reports.stranded()]


def test_what_waits_for_a_signal_that_a_deploy_renamed_is_named_until_it_is_resumed(drive, command_line):
    waits_for("paid", "sent")
    first, paused, *_ = claims(3)
    paused.pause()
    assert stranded(drive) == drive.doctor() == []
    waits_for("payment_confirmed", "sent")
    assert stranded(drive) == [("wait", "Claim", "paid", 3)]
    status, output, _ = command_line("doctor", "--deploy")
    line = "3 ongoing workflows of Claim wait at the step 'step_1' for the signal 'paid', which no step of the class "
    advice = "keep wait_for='paid', or skip() the step for them, or pause() and resume() them after the deploy"
    assert (status, output) == (1, f"{line}waits for: {advice}\n")
    assert command_line("doctor") == (1, f"{output}violations: 1\n", "")
    Workflow.update(type="Unknown").where(Workflow.id == first.id).execute()  # what it waits for, nobody knows here
    assert drive.doctor()[0].startswith("2 ongoing workflows of Claim wait at")
    Workflow.update(type="Claim").execute()
    for workflow in Workflow.ready():
        workflow.pause()
    assert stranded(drive) == [("wait", "Claim", "paid", 3)]
    for workflow in Workflow.paused():
        workflow.resume()
    assert stranded(drive) == drive.doctor() == []
    with pytest.raises(gd.UnknownSignalError):
        reload(first).signal("paid")
    assert reload(first).signal("payment_confirmed", 7)
    work_off(drive)
    assert (effects(), reload(first).current_step_name) == (["7"], "step_2")


def test_what_waits_where_a_deploy_took_the_signal_away_or_changed_it_for_another_is_named(drive):
    waits_for("paid", "sent")
    workflows = claims(2)
    waits_for("sent", "paid")
    assert stranded(drive) == [("changed wait", "Claim", "paid", 2)]
    assert drive.doctor() == []  # for what it waits is waited for by a step of its class
    waits_for(None, "sent")
    assert stranded(drive) == [("wait", "Claim", "paid", 2)]
    assert drive.doctor() == [each.problem for each in drive._reports.stranded()]
    advice = "keep wait_for='paid', or skip() the step for them, or pause() and resume() them after the deploy"
    assert drive.doctor()[0].endswith(advice)
    waits_for()  # the step is gone
    assert drive.doctor()[0].endswith("keep wait_for='paid', or pause() them, and resume_at() another step")
    waits_for(None, "paid")
    assert stranded(drive) == [("changed wait", "Claim", "paid", 2)]
    waits_for(removed_step(), "sent")
    assert stranded(drive) == [("wait", "Claim", "paid", 2)]
    assert drive.doctor()[0].endswith(advice)
    for workflow, first in zip(workflows, (removed_step(), None)):
        waits_for(first, "paid")
        reload(workflow).pause()
        reload(workflow).resume()
        work_off(drive)
        assert reload(workflow).current_step_name == "step_2"
    assert (stranded(drive), effects()) == ([], ["None"])


def test_the_signals_that_were_accepted_and_no_step_is_to_take_after_a_deploy_are_counted(drive, command_line):
    waits_for(None, "paid")
    first, second, over = claims(3)
    for workflow in (first, second, over):
        assert workflow.signal("paid", 1)
    second.signal("paid", 2)
    over.cancel()
    assert stranded(drive) == []
    waits_for(None, "payment_confirmed")
    assert stranded(drive) == [("signal", "Claim", "paid", 2)]
    status, output, _ = command_line("doctor", "--deploy")
    line = "2 ongoing workflows of Claim keep the signal 'paid', which no step of the class waits for: keep such a step"
    assert (status, output) == (1, f"{line}, or send them the signal by its new name and delete that of the old one\n")
    assert drive.doctor() == []  # nothing waits for it
    waits_for(None, "paid")
    work_off(drive)
    assert (stranded(drive), effects()) == ([], ["None", "None", "1", "1"])


def test_what_stands_at_a_removed_step_is_shown_as_any_other(command_line, drive):
    workflow = _paused_at("two")
    deploy(without("two"))
    assert f"resume {workflow.id}  (or skip, cancel)" in command_line("show", workflow.id)[1]
    deploy(version(one=step("go")))
    output = command_line("show", workflow.id)[1]
    assert "define it again, put removed_step() in its place, or move on with resume_at()" in " ".join(output.split())


@ELSEWHERE
def test_wherever_a_process_dies_that_skips_a_removed_step_the_workflow_goes_on(db, drive, clock):
    for moment in itertools.count():
        work_off_at(drive)
        standing_at("one")
        deploy(without("one"))
        if not dies_at(moment, db, lambda: _message(drive)):
            break
        assert drive.doctor() == []
    # To take a step, and to end it and claim the next one: a statement each there, a short transaction elsewhere.
    assert moment >= (3 if drive._access.dialect.is_one_statement else 7)
    for _ in range(3):
        clock.forward(minutes=10)
        drive.housekeeping()
        work_off_at(drive)
    assert Workflow.finished().count() == Workflow.select().count() == moment + 1
    assert Counter(effects()) == {"two": moment + 1, "three": moment + 1}


# -- a consumer with the old code takes the message of a step that only the new code defines --

NEW = {"zero": step("go"), **ONE_TWO_THREE}


def create_by_new_code(**kwargs):
    """A workflow of the new code, whose first step the old one does not know, in a process that has the old one."""
    workflow = version(**NEW).create(hero=User.create(), **kwargs)
    deploy(version(**ONE_TWO_THREE))
    return workflow


def ring(drive, queue="default"):
    """Set the clock to when the one message is due, and do with it what a consumer does."""
    huey = drive.queues[queue]
    (task,) = huey.pending() + huey.scheduled()
    if task.eta:
        drive.clock.now = max(drive.clock.now, task.eta.replace(tzinfo=timezone.utc))
    work_off_at(drive, queue)


@pytest.mark.parametrize("is_embedded", [True, False], ids=["embedded", "outside"])
def test_a_step_that_is_not_defined_here_is_put_off_for_a_grace_and_then_fails(db, drive, caplog, is_embedded):
    drive = GenevaDrive(db, huey=None if is_embedded else MemoryHuey("outside", results=False), clock=Clock())
    drive.stuck_scheduled_threshold = 0.001  # housekeeping is as eager as can be
    workflow, delays = create_by_new_code(), []
    while reload(workflow).state == "ready":
        assert history(workflow) == [("zero", "scheduled", None)]
        before = drive.clock.now
        drive.clock.forward(seconds=0.5 * bool(delays))
        assert drive.housekeeping()["stuck_scheduled_recovered"] == 0  # there is a message, for later
        ring(drive)
        delays.append((drive.clock.now - before).total_seconds())
    assert delays[:9] == [0, 1, 1, 2, 4, 8, 16, 30, 30]
    assert timedelta(minutes=10) <= drive.clock.now - START < timedelta(minutes=10, seconds=30)
    assert caplog.text.count("is put off for ") == len(delays) - 1
    assert "is put off for 30 s: Tour" in caplog.text
    assert (reload(workflow).state, history(workflow)) == ("paused", [("zero", "failed", "failed")])
    assert workflow.execution_history.get().error_class_name.endswith("StepNotDefinedError")
    assert messages(drive) == []


def test_a_consumer_with_the_new_code_performs_what_one_with_the_old_code_put_off(drive, clock):
    workflow = create_by_new_code()
    ring(drive)
    ring(drive)
    deploy(version(**NEW))
    ring(drive)
    assert history(workflow)[:2] == [("zero", "completed", "success"), ("one", "completed", "success")]
    assert effects() == ["zero", "one"]
    assert clock.now == START + timedelta(seconds=2)


def test_old_code_and_new_take_turns_and_perform_each_step_once(drive, clock):
    old = version(**ONE_TWO_THREE, four=step("go"))
    new = version(**{**NEW, "two": removed_step(), "three": removed_step()}, trois=step("go", wait=1), four=step("go"))
    drive.run_on = 0
    workflows = [each.create(hero=User.create()) for each in (old, new) for _ in range(4)]
    for cls in itertools.cycle([old, new, new, old, new]):
        deploy(cls)
        if not Workflow.ongoing().exists():
            break
        clock.forward(seconds=4)
        for _ in range(3):
            if task := drive.huey.dequeue():
                drive.huey.execute(task)
    assert {each.state for each in Workflow.select()} == {"finished"}
    for workflow in workflows:
        done = [each.step_name for each in workflow.execution_history if each.outcome == "success"]
        assert len(done) == len(set(done))
        assert {"one", "four"} <= set(done)
        assert len({"three", "trois"} & set(done)) == 1
        assert not workflow.execution_history.where(StepExecution.state == "failed").exists()


def test_the_grace_may_be_turned_off_and_does_not_count_for_calls_in_the_process(drive, clock):
    workflow = create_by_new_code()
    with pytest.raises(gd.StepNotDefinedError):
        scheduled(workflow).execute()
    assert reload(workflow).state == "paused"
    drive.undefined_step_grace = 0
    workflow = create_by_new_code()
    work_off(drive)
    assert (reload(workflow).state, messages(drive)) == ("paused", [])


def test_a_step_that_nobody_defines_pauses_in_the_end_though_each_message_is_lost(db, drive, clock):
    drive = GenevaDrive(db, huey=MemoryHuey("outside", results=False), clock=clock)
    workflow, lost = create_by_new_code(), 0
    while reload(workflow).state == "ready":
        drive.huey.flush()
        clock.forward(seconds=61)
        lost += drive.housekeeping()["stuck_scheduled_recovered"]
        work_off(drive)
    assert clock.now - START < timedelta(minutes=12)
    assert lost > 4
    assert history(workflow) == [("zero", "failed", "failed")]


@ELSEWHERE
def test_wherever_a_process_dies_that_puts_off_a_step_it_is_taken_up_again(db, drive, clock):
    for moment in itertools.count():
        create_by_new_code()
        if not dies_at(moment, db, drive.huey.dequeue):
            break
        assert drive.doctor() == []
    assert moment >= 4
    clock.forward(minutes=2)
    drive.housekeeping()  # those that had claimed one died in mid-attempt
    deploy(version(**NEW))
    work_off(drive)
    assert effects() == ["zero", "one"] * (moment + 1)
    assert {len(history(each)) for each in Workflow.select()} == {3, 4}


def test_a_step_that_is_put_off_stays_in_the_queue_that_it_was_in(db, drive):
    drive = GenevaDrive(db, queues=["premium"], clock=Clock())
    workflow = version(zero=step("go", options={"queue": "premium"}), **ONE_TWO_THREE).create(hero=User.create())
    new = type(workflow)
    deploy(version(**ONE_TWO_THREE))  # which does not know that it is a step for `premium`
    ring(drive, "premium")
    assert messages(drive, "premium") == [scheduled(workflow).id]
    deploy(new)
    ring(drive, "premium")
    assert (messages(drive), effects()) == ([scheduled(workflow).id], ["zero"])


def test_a_step_of_the_new_code_that_waits_for_a_signal_is_put_off_as_any_other(drive, clock):
    new = version(zero=step("go", wait_for="paid", timeout=60, on_timeout="skip"), last=step("go"))
    paid, late = [new.create(hero=User.create()) for _ in range(2)]
    paid.signal("paid")
    deploy(version(last=step("go")))
    for seconds, late_state in ((0, "waiting"), (60, "scheduled")):  # its time to wait is over
        clock.forward(seconds=seconds)
        work_off_at(drive)
        assert history(paid) == [("zero", "scheduled", None)]
        assert history(late) == [("zero", late_state, None)]
    assert messages(drive) == [each.execution_history.get().id for each in (paid, late)]
    deploy(new)
    clock.forward(seconds=30)
    work_off_at(drive)
    assert history(paid) == [("zero", "completed", "success"), ("last", "completed", "success")]
    assert history(late) == [("zero", "skipped", "skipped"), ("last", "completed", "success")]
    assert messages(drive) == []


def test_immediate_mode_knows_no_grace_for_there_is_no_other_consumer(db, drive):
    GenevaDrive(db, huey=MemoryHuey("now", results=False, immediate=True))
    with db.atomic():
        workflow = create_by_new_code()
    assert history(workflow) == [("zero", "failed", "failed")]


@pytest.mark.parametrize("is_embedded", [True, False], ids=["embedded", "outside"])
def test_the_grace_of_a_step_that_waited_for_a_signal_begins_with_the_end_of_its_wait(db, drive, is_embedded):
    drive = GenevaDrive(db, huey=None if is_embedded else MemoryHuey("outside", results=False), clock=Clock())
    new = version(zero=step("go", wait_for="paid", timeout=3600, on_timeout="skip"), last=step("go"))
    workflow = new.create(hero=User.create())
    deploy(version(last=step("go")))
    drive.clock.forward(seconds=3600)
    ring(drive)
    assert history(workflow) == [("zero", "scheduled", None)]
    assert (scheduled(workflow).due_at - drive.clock.now).total_seconds() == 1
    deploy(new)
    ring(drive)
    assert history(workflow)[0] == ("zero", "skipped", "skipped")


def test_a_step_that_is_put_off_can_be_paused_resumed_and_canceled(drive, clock):
    workflow = create_by_new_code()
    ring(drive)
    workflow.pause()
    with pytest.raises(gd.StepNotDefinedError):
        workflow.resume()
    assert messages(drive) == []
    deploy(version(**NEW))
    workflow.resume()
    deploy(version(**ONE_TWO_THREE))
    ring(drive)
    assert messages(drive) == [scheduled(workflow).id]
    reload(workflow).cancel()
    assert (messages(drive), history(workflow)) == ([], [("zero", "canceled", "canceled")])


# ==== Queries and rows ================================================================================================


class Animal(Workflow):
    @step
    def feed(self):
        pass


class Dog(Animal):
    pass


class Cat(Animal):
    workflow_type = "felines.Cat"


def test_queries_span_subclasses_and_rows_come_back_as_their_class(drive):
    dog, cat, plain = Dog.create(hero=User.create()), Cat.create(hero=User.create()), Plain.create(hero=User.create())
    assert {type(each) for each in Animal.select()} == {Dog, Cat}
    assert [each.id for each in Dog.ready()] == [dog.id]
    assert [type(each) for each in Workflow.select().order_by(Workflow.id)] == [Dog, Cat, Plain]
    assert Cat.get(Workflow.hero_id == cat.hero_id) == cat
    assert Animal.get_or_none(Workflow.id == plain.id) is None
    later = Animal.ongoing().where(Workflow.created_at > dog.created_at).order_by(Workflow.id.desc())
    assert list(later) == [cat]
    joined = Dog.select(Workflow, StepExecution).join(StepExecution).where(StepExecution.state == "scheduled")
    assert [(type(each), each.id) for each in joined] == [(Dog, dog.id)]
    assert [type(each.workflow) for each in StepExecution.select().order_by(StepExecution.id)] == [Dog, Cat, Plain]
    assert Workflow.select(Workflow.id).tuples().count() == len(Workflow) == 3


def test_updates_and_deletions_on_a_subclass_touch_its_rows_alone(drive):
    dog, cat, plain = Dog.create(hero=User.create()), Cat.create(hero=User.create()), Plain.create(hero=User.create())
    assert Animal.update(context={"fed": True}).execute() == 2
    assert (reload(dog).context, reload(cat).context, reload(plain).context) == ({"fed": True}, {"fed": True}, {})
    StepExecution.delete().execute()
    assert Cat.delete().execute() == 1
    assert {each.id for each in Workflow.select()} == {dog.id, plain.id}
    Plain.delete().execute()
    lost = f"workflow {dog.id} is ready, but no execution of it is active"
    diagnosed(drive, lost, f"workflow {dog.id} counts 1 executions, but its newest is number None")


def test_executions_are_deleted_with_their_workflow(drive, hero):
    drive._access.database.execute_sql("pragma foreign_keys = 0") if drive._access.dialect.section == "sqlite" else None
    try:
        for delete in (lambda: Plain.delete().execute(), lambda: Plain.get().delete_instance()):
            Plain.create(hero=hero)
            assert delete() == 1
            assert StepExecution.select().count() == 0
        Plain.create(hero=hero)
    finally:
        drive._access.database.execute_sql(
            "pragma foreign_keys = 1"
        ) if drive._access.dialect.section == "sqlite" else None


@ELSEWHERE
def test_rows_can_be_changed_while_a_query_is_iterated(drive):
    User.insert_many([{"name": str(number)} for number in range(300)]).execute()
    Plain.create_many(User.select())
    for workflow in Plain.ready():
        workflow.pause()
    for workflow in Plain.paused():
        workflow.resume()
    assert Plain.ready().count() == 300


def test_times_are_aware_utc_with_microseconds_and_compare(drive, clock, hero):
    clock.now = datetime(2026, 7, 1, 14, 30, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    workflow = Plain.create(hero=hero)
    assert workflow.created_at == clock.now
    row = reload(workflow)
    assert row.created_at == clock.now
    assert row.created_at.tzinfo is timezone.utc
    assert Plain.ready().where(Workflow.created_at == clock.now).count() == 1
    assert Plain.ready().where(Workflow.created_at < clock.now).count() == 0
    assert Plain.ready().where(Workflow.created_at >= datetime(2026, 7, 1, 12, 30, 0, 123456)).count() == 1
    clock.now = clock.now.replace(microsecond=0)
    assert reload(Plain.create(hero=User.create())).created_at == clock.now


def test_an_hour_that_comes_twice_is_two_moments(drive, clock, hero):
    first = datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
    second = first.replace(fold=1)
    assert first == second  # to Python, within one time zone
    clock.now = first.astimezone(timezone.utc)
    Plain.create(hero=hero)
    created = [Plain.select().where(Workflow.created_at == each).count() for each in (first, second, first)]
    assert created == [1, 0, 1]


def test_neighbours_and_keys_of_a_workflow(drive, hero, helpers):
    class Keys(Workflow):
        @step
        def one(self):
            did(self.idempotency_key)
            if len(effects()) == 1:
                self.reattempt()

        @step
        def two(self):
            did(self.idempotency_key)

    workflow = Keys.create(hero=hero)
    assert (workflow.previous_step_name, workflow.next_step_name) == (None, "two")
    helpers.speedrun_workflow(workflow)
    assert (workflow.previous_step_name, workflow.next_step_name) == (None, None)
    first, again, second = effects()
    assert first == again != second
    StepExecution.delete().execute(), Workflow.delete().execute(), Effect.delete().execute()
    other = Keys.create(hero=hero)  # on SQLite with the same id
    helpers.speedrun_workflow(other)
    assert not {first, second} & set(effects())


def test_events_tell_of_steps_and_transitions_and_a_failing_receiver_harms_nothing(drive, hero, helpers, caplog):
    told = []

    def fails(sender, workflow, *arguments, **kwargs):
        raise RuntimeError("receiver")

    def started(sender, workflow, execution):
        told.append(("started", execution.step_name, execution.state))

    def finished(sender, workflow, execution):
        told.append(("finished", execution.step_name, execution.outcome))

    def transitioned(sender, workflow, old, new):
        assert isinstance(workflow, Plain)
        told.append((old, new))

    events = (gd.step_started, gd.step_finished, gd.workflow_transitioned)
    for event, receiver in zip(events, (started, finished, transitioned)):
        event.connect(fails)
        event.connect(receiver)
    try:
        workflow = Plain.create(hero=hero)
        helpers.perform_next_step(workflow)
        workflow.cancel()
    finally:
        for event, receiver in zip(events, (started, finished, transitioned)):
            event.disconnect(fails)
            event.disconnect(receiver)
    assert told == [
        *[(None, "ready"), ("ready", "performing"), ("started", "one", "in_progress"), ("performing", "ready")],
        *[("finished", "one", "success"), ("ready", "canceled")],
    ]
    assert "receiver fails failed" in caplog.text
    for event in events:
        text = pydoc.plain(pydoc.render_doc(event))
        arguments = "old, new" if event is gd.workflow_transitioned else "execution=execution"
        assert f"`receiver(cls, workflow, {arguments})`" in text


def test_a_row_says_what_it_is(drive, hero):
    workflow = Payment.create(hero=hero)
    execution = workflow.execution_history.get()
    workflow.signal("confirmed")
    sent = workflow.signals.get()
    assert str(workflow) == repr(workflow) == f"<Payment {workflow.id}: ready at confirm>"
    attempt = f"<StepExecution {execution.id}: attempt 1 of workflow {workflow.id} at confirm, "
    assert str(execution) == repr(execution) == f"{attempt}waiting>"
    pending = f"<WorkflowSignal {sent.id}: confirmed for workflow {workflow.id}, pending>"
    assert str(sent) == repr(sent) == pending
    work_off(drive)
    assert str(workflow.execution_history[0]) == f"{attempt}success>"
    assert str(workflow.signals.get()) == pending.replace("pending", "consumed")
    assert str(Workflow.select(Workflow.id, Workflow.type).get()) == f"<Payment {workflow.id}: None>"


@pytest.fixture
def told():
    """The transitions that receivers of the event are told of."""
    transitions = []

    def on(sender, workflow, old, new):
        transitions.append((workflow.id, old, new))

    gd.workflow_transitioned.connect(on)
    yield transitions
    gd.workflow_transitioned.disconnect(on)


@contextlib.contextmanager
def rolled_back(db, way):
    """A savepoint that is rolled back: by an error, by hand, or with the one around it."""
    with contextlib.suppress(OddError), db.atomic() as savepoint:
        if way == "with the one around it":
            with db.atomic():
                yield
        else:
            yield
        if way == "by hand":
            savepoint.rollback()
        else:
            raise OddError


@pytest.mark.parametrize("is_proxy", [False, True])
@pytest.mark.parametrize("way", ["by an error", "by hand", "with the one around it"])
def test_what_a_savepoint_rolled_back_is_told_to_nobody(db, drive, told, caplog, way, is_proxy):
    outside, proxy = MemoryHuey("outside", results=False), peewee.DatabaseProxy()
    drive = GenevaDrive(proxy if is_proxy else db, huey=outside)
    proxy.initialize(db)
    applications = []
    heroes = [User.create() for _ in range(4)]
    with caplog.at_level(logging.INFO, "geneva_drive"):
        with db.atomic():
            first = Plain.create(hero=heroes[0])
            with rolled_back(db, way):
                Plain.create(hero=heroes[1])
                first.pause()
                db.after_commit(lambda: applications.append("ran"))  # which is Peewee's business
            with db.atomic() as savepoint:
                second = Plain.create(hero=heroes[2])
                savepoint.commit()
                gone = Plain.create(hero=heroes[3])
                savepoint.rollback()
                first.cancel()
            assert (told, messages(drive), caplog.messages, applications) == ([], [], [], [])
        expected = [(first.id, None, "ready"), (second.id, None, "ready"), (first.id, "ready", "canceled")]
        assert told == expected
        assert caplog.messages == [f"Plain {number}: {old or 'new'} -> {new}" for number, old, new in expected]
        assert messages(drive) == [first.execution_history.get().id, scheduled(second).id]
        assert applications == ["ran"]
    assert gone.id not in {each.id for each in Workflow.select()}


def test_huey_and_the_log_are_told_of_what_is_committed_alone(db, drive, hero, caplog):
    sent = []
    drive.huey.signal()(lambda kind, task: sent.append(kind))
    with caplog.at_level(logging.INFO, "geneva_drive"), db.atomic() as transaction:
        Plain.create(hero=hero)
        Quick.create_many([hero])
        transaction.rollback()
    assert (sent, caplog.messages) == ([], [])
    Plain.create(hero=hero)
    assert sent == ["enqueued"]


def test_a_connection_that_is_lost_within_savepoints_leaves_none_behind(db, drive, hero, served, told):
    with contextlib.suppress(peewee.PeeweeException), db.atomic(), db.atomic():
        Plain.create(hero=hero)
        drop_connection(db) if served else db.execute_sql("rollback")
        db.execute_sql("select 1" if served else "select nonsense from nowhere")
    db.close()
    assert (gd._depth(db), told) == (0, [])

    class Cancels(Workflow):
        @step
        def one(self):
            self.cancel()

    workflow = Cancels.create(hero=hero)
    scheduled(workflow).execute()
    assert reload(workflow).state == "canceled"


def test_the_logger_says_what_a_line_is_about(drive, hero, caplog):
    class Talks(Workflow):
        @step
        def one(self):
            self.logger.info("100%% of %s", "it", extra={"more": 1})
            self.logger.info("nothing more", extra=None)

    workflow = Talks.create(hero=hero)
    with caplog.at_level(logging.INFO, "geneva_drive"):
        scheduled(workflow).execute()
    (record,) = [record for record in caplog.records if "of it" in record.getMessage()]
    execution = workflow.execution_history.get()
    prefix = f"[Talks {workflow.id} of User {hero.id} step one execution {execution.id}]"
    assert record.getMessage() == f"{prefix} 100% of it"
    assert (record.workflow_id, record.step_name, record.more) == (workflow.id, "one", 1)


class Busy(Exception):
    pass


class Drawn(Workflow):
    exception_policies = [ExceptionPolicy("reattempt", matching="shop.Down", max_reattempts=9, terminal_action="skip")]

    @cancel_if
    def hero_inactive(self):
        return False

    @on_exception(Busy)
    def wait_a_bit(self, error):
        self.reattempt(wait=60)

    @step(skip_if=lambda self: False)
    def one(self):
        pass

    @step(wait=timedelta(days=2, hours=3), skip_if="hero_inactive", transactional=True)
    def two(self):
        pass

    @step(wait=0.3, on_exception="reattempt", max_reattempts=None)
    def three(self):
        pass

    odd = [step("three", name='_4. "<b>"; | `x`')]


def test_a_graph_shows_steps_waits_conditions_and_policies():
    assert Drawn.graph().splitlines() == [
        "flowchart TD",
        '    start(["Drawn"])',
        '    start --> step1["one<br/>skip if …"]',
        '    step1 -->|"2 d 3 h"| step2["two<br/>skip if hero_inactive<br/>transactional"]',
        '    step2 -->|"300 ms"| step3["three<br/>on error: reattempt"]',
        # Names may hold what means something to Mermaid, HTML or Markdown: seen in a browser, it reads as it is.
        '    step3 --> step4["#95;4#46; #34;#60;b#62;#34;#59; #124; #96;x#96;"]',
        '    step4 --> finished(["finished"])',
        '    conditions["before each step: cancel if<br/>hero_inactive"]',
        '    conditions -.-> canceled(["canceled"])',
        '    policies["in every step<br/>on Busy: wait_a_bit<br/>on shop#46;Down: reattempt 9 times, then skip"]',
    ]


# ==== Definitions =====================================================================================================


def names(cls):
    return [definition.name for definition in cls.steps]


def test_parents_steps_come_first_overrides_change_bodies_and_redeclarations_options(drive, hero, helpers):
    class Parent(Workflow):
        @step(wait=60, on_exception="skip")
        def one(self):
            did("parent's one")

        @step(wait=60)
        def two(self):
            did("parent's two")

    class Child(Parent):
        def one(self):
            did("child's one")

        @step
        def two(self):
            super().two()
            did("child's two")

        @step(before_step="one")
        def zero(self):
            did("zero")

    assert names(Child) == ["zero", "one", "two"]
    assert [each.wait.total_seconds() for each in Child.steps] == [0, 60, 0]
    assert names(Parent) == ["one", "two"]
    helpers.speedrun_workflow(Child.create(hero=hero))
    assert effects() == ["zero", "child's one", "parent's two", "child's two"]


def test_a_mixin_brings_its_steps_conditions_and_policies(drive, hero, helpers):
    class Audited:
        @cancel_if
        def inactive(self):
            return not self.hero.active

        @step
        def audit(self):
            did("audit")

    class Order(Audited, Workflow):
        @step
        def ship(self):
            did("ship")

    helpers.speedrun_workflow(Order.create(hero=hero))
    assert effects() == ["audit", "ship"]
    late = Order.create(hero=User.create(active=False))
    helpers.speedrun_workflow(late)
    assert late.state == "canceled"


def test_a_list_makes_several_steps_of_one_body(drive, clock, hero, helpers):
    class Polls(Workflow):
        @step
        def begin(self):
            pass

        polling = [step("check"), *(step("check", wait=60) for _ in range(2)), step("check", name="last_check")]
        again = step("check", wait=5)

        @step
        def end(self):
            pass

        def check(self):
            did(self.current_step_name)

    assert names(Polls) == ["begin", "polling_1", "polling_2", "polling_3", "last_check", "again", "end"]
    helpers.speedrun_workflow(Polls.create(hero=hero))
    assert effects() == ["polling_1", "polling_2", "polling_3", "last_check", "again"]


def test_a_decorator_around_a_step_leaves_it_a_step(drive, hero, helpers):
    import functools

    def loud(method):
        @functools.wraps(method)
        def wrapper(self):
            did("loud")
            return method(self)

        return wrapper

    class Loud(Workflow):
        @loud
        @step(wait=3)
        def one(self):
            did("one")

    assert Loud.steps[0].wait == timedelta(seconds=3)
    helpers.speedrun_workflow(Loud.create(hero=hero))
    assert effects() == ["loud", "one"]


BAD_DEFINITIONS = {
    "@step(wait=-1)\ndef send(self): pass": r"Bad.send: wait must be neither negative nor over .*, not -1$",
    "@step(wait=1e300)\ndef send(self): pass": r"Bad.send: wait must be neither negative nor over .*, not 1e\+300$",
    "@step(wait=timedelta(seconds=-1))\ndef send(self): pass": r"wait .*, not -datetime.timedelta\(seconds=1\)$",
    "@step(wait='1')\ndef send(self): pass": r"Bad.send: wait must be a timedelta or a number of seconds, not '1'",
    "@step(wait=True)\ndef send(self): pass": r"Bad.send: wait must be",
    "@step(wait=float('nan'))\ndef send(self): pass": r"Bad.send: wait must be",
    "@step(wiat=1)\ndef send(self): pass": r"Bad.send: unknown option 'wiat': use wait, skip_if",
    "@step(skip_if=3)\ndef send(self): pass": r"Bad.send: skip_if must be",
    "@step(skip_if='nowhere')\ndef send(self): pass": r"Bad.send: skip_if names no method: 'nowhere'",
    "@step(wait='nowhere')\ndef send(self): pass": r"Bad.send: wait names no method: 'nowhere'",
    "@step(wait='two days')\ndef send(self): pass": r"Bad.send: wait must be a timedelta or .*, not 'two days'",
    "async def soon(self): pass\n@step(wait='soon')\ndef send(self): pass": r"Bad.send: wait must not be async",
    "@step(wait_for='x', matching='nowhere')\ndef send(self): pass": r"Bad.send: matching names no method: 'nowhere'",
    "@step(wait_for='x', matching=3)\ndef send(self): pass": r"Bad.send: matching must be a callable .* method's name",
    "@step(on_exception=[])\ndef send(self): pass": r"Bad.send: on_exception must be .* not \[\]",
    "@step(on_exception=['skip'])\ndef send(self): pass": r"Bad.send: on_exception must be .* not \['skip'\]",
    "async def f(self, error): pass\n@step(on_exception=[f])\ndef send(self): pass": r"Bad.send: on_exception must not",
    "@step(on_exception=[print], max_reattempts=1)\ndef send(self): pass": r"Bad.send: max_reattempts goes with",
    "@step(on_exception='explode')\ndef send(self): pass": r"Bad.send: on_exception must be .* not 'explode'",
    "@step(on_exception=ValueError)\ndef send(self): pass": r"Bad.send: on_exception must be",
    "@step(max_reattempts=3)\ndef send(self): pass": r"Bad.send: max_reattempts goes with on_exception=\"reattempt\"",
    "@step(on_exception='reattempt', max_reattempts=-1)\ndef send(self): pass": r"Bad.send: .*max_reattempts must be",
    "@step(on_exception='reattempt', terminal_action='x')\ndef send(self): pass": r"Bad.send: .*terminal_action must",
    "@step(before_step='nowhere')\ndef send(self): pass": r"Bad.send: there is no step 'nowhere' yet",
    "@step\ndef a(self): pass\n@step(before_step='a', after_step='a')\ndef send(self): pass": r"Bad.send: .*exclude",
    "@step(transactional=1)\ndef send(self): pass": r"Bad.send: transactional must be a bool, not 1",
    "@step(resumable=1)\ndef send(self): pass": r"Bad.send: resumable must be a bool",
    "@step(resumable=True, transactional=True)\ndef send(self): pass": r"Bad.send: resumable and transactional exclude",
    "@step(before_step=3)\ndef send(self): pass": r"Bad.send: before_step must be a step's name, not 3",
    "@step(on_exception=print, terminal_action='skip')\ndef send(self): pass": r"Bad.send: terminal_action goes with",
    "@step(options={'q': 1})\ndef send(self): pass": r"Bad.send: options: unknown option 'q'",
    "@step(name='')\ndef send(self): pass": r"Bad.: name must be text of 1 to 255 .*, not ''",
    "@step\ndef pause(self): pass": r"Bad.pause: a step must not be called 'pause'",
    "@step\ndef id(self): pass": r"Bad.id: a step must not be called 'id'",
    "@step(name='state')\ndef send(self): pass": r"Bad.state: a step must not be called 'state'",
    "@step\ndef send(self): pass\n@step\ndef send(self): pass": r"Bad.send: the step is declared twice",
    "@step\ndef send(self): pass\ndef send(self): pass": r"Bad.send: the step is declared twice",
    "@step\ndef send(self): pass\n@step(name='send')\ndef other(self): pass": r"Bad.send: the step is declared twice",
    "many = [step('nowhere')]": r"Bad.many_1: its body 'nowhere' is not a method",
    "step_options = {'priority': 'high'}": r"Bad.step_options: priority must be an int",
    "step_options = 3": r"Bad.step_options: must be a dict",
    "exception_policies = [3]": r"Bad.exception_policies: must be a list of ExceptionPolicy objects, not \[3\]",
    "exception_policies = ExceptionPolicy('skip')": r"Bad.exception_policies: must be a list",
    "workflow_type = 3": r"Bad: workflow_type must be text",
    "name = CharField()": r"Bad.name: workflows share one table",
    "class Meta: table_name = 'mine'": r"Bad.Meta: workflows share one table",
    "@step\ndef send(self): yield": r"Bad.send: its body 'send' is a generator",
    "@step(skip_if='late')\ndef send(self): pass\nasync def late(self): pass": r"Bad.send: skip_if must not be async",
    "@cancel_if\nasync def late(self): pass": r"Bad.late: a condition must not be async",
    "@on_exception\nasync def late(self, error): pass": r"Bad.late: a handler must not be async",
    "@classmethod\n@step\ndef send(self): pass": r"Bad.send: a step must be a method",
    "@property\n@step\ndef send(self): pass": r"Bad.send: a step must be a method",
    "type = 'mine'": r"Bad.type: workflows share one table",
    "__slots__ = ('mine',)": r"Bad: its instances cannot be made from rows",
    "one = cancel_if(property(len))": r"@cancel_if is for methods",
    "one = step(3)": r"@step is for methods, not for 3",
}


@pytest.mark.parametrize("body", BAD_DEFINITIONS)
def test_a_wrong_definition_names_class_step_and_fix(body):
    code = "class Bad(Workflow):\n" + "\n".join(f"    {line}" for line in body.splitlines())
    with pytest.raises(gd.StepConfigurationError, match=BAD_DEFINITIONS[body]):
        exec(code, {**globals(), "__name__": "elsewhere"})
    assert "Bad" not in gd._workflow_classes


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("explode",), "action must be one of pause, cancel, skip, reattempt, not 'explode'"),
        (("skip", 3), "matching must name exception classes, not 3"),
        (("skip", int), "matching must name exception classes"),
        (("reattempt", None, -1), "wait must be neither negative"),
        (("reattempt", None, 1, 0.5), "backoff must be a number, at least 1"),
        (("reattempt", None, 1, 2, 3), "jitter must be a fraction"),
        (("reattempt", None, 1, 2, 0, "x"), "max_wait must be"),
        (("reattempt", None, 1, 2, 0, 1, 2.5), "max_reattempts must be None or an int, at least 0, not 2.5"),
        (("reattempt", None, 1, 2, 0, 1, 2, "reattempt"), "terminal_action must be one of pause, cancel, skip"),
        (("reattempt", None, 1, 2, 0, 1, 2, "skip", "often"), "report must be one of terminal_only"),
    ],
)
def test_a_wrong_policy_says_so(arguments, text):
    with pytest.raises(gd.StepConfigurationError, match=text):
        ExceptionPolicy(*arguments)


def test_two_classes_of_one_type_are_an_error_unless_one_is_the_other_imported_again(tmp_path, monkeypatch):
    source = "from geneva_drive import Workflow, step\nclass Twin(Workflow):\n    @step\n    def one(self): pass\n"
    for module in ("twin_a", "twin_b"):
        (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    first = importlib.import_module("twin_a")
    again = importlib.reload(first)
    assert gd._workflow_classes["Twin"] is again.Twin
    with pytest.raises(gd.StepConfigurationError, match=r"twin_b.Twin: the type 'Twin' belongs to twin_a.Twin"):
        importlib.import_module("twin_b")
    assert gd._workflow_classes["Twin"] is again.Twin


def test_a_class_may_be_called_workflow(drive, hero, helpers):
    base = Workflow

    class Workflow_(base):
        @step
        def one(self):
            did("one")

    named = type(base)("Workflow", (Workflow_,), {})
    try:
        workflow = named.create(hero=hero)
        helpers.speedrun_workflow(workflow)
        assert (type(reload(workflow)), effects()) == (named, ["one"])
    finally:
        del gd._workflow_classes["Workflow"]


def test_generic_classes_work_where_workflow_comes_first():
    item = typing.TypeVar("item")

    class Repository(typing.Generic[item]):
        pass

    class Sound(Workflow, Repository[int]):
        pass

    with pytest.raises(gd.StepConfigurationError, match="name Workflow first among the bases"):

        class Poisonous(Repository[int], Workflow):
            pass

    assert "Poisonous" not in gd._workflow_classes


def test_a_child_that_takes_away_a_method_of_its_parents_declarations_is_an_error():
    class Parent(Workflow):
        @cancel_if
        def late(self):
            return False

        @step
        def one(self):
            pass

    for name, problem in (("late", "it must stay a method"), ("one", "its body 'one' is not a method")):
        with pytest.raises(gd.StepConfigurationError, match=rf"Child.{name}: {problem}"):
            type(Workflow)("Child", (Parent,), {name: None})


def test_of_classes_local_to_functions_the_latest_wins():
    def define():
        class Local(Workflow):
            @step
            def one(self):
                pass

        return Local

    define()
    latest = define()
    assert gd._workflow_classes["Local"] is latest


# ==== The drive, its settings and its tables ==========================================================================


@pytest.mark.parametrize(
    ("arguments", "settings", "text"),
    [
        (["app.db"], {}, r"takes a Peewee database, not 'app.db'"),
        ([], {"max_recovery": 3}, r"unknown setting 'max_recovery' of GenevaDrive: use .*max_recoveries"),
        ([], {"max_recoveries": -1}, r"max_recoveries must be an int, at least 0, not -1"),
        ([], {"run_on": timedelta(seconds=-2)}, r"run_on must be .*, not -datetime.timedelta\(seconds=2\)$"),
        ([], {"stuck_recovery_action": "skip"}, r"stuck_recovery_action must be \"reattempt\" or \"cancel\""),
        ([], {"run_on": "1"}, r"run_on must be a timedelta or seconds"),
        ([], {"stuck_in_progress_threshold": None}, r"stuck_in_progress_threshold must be"),
        ([], {"housekeeping_batch_size": 0}, r"housekeeping_batch_size must be a positive int"),
        ([], {"housekeeping_schedule": 5}, r"housekeeping_schedule must be a Huey crontab"),
        ([], {"clock": START}, r"clock must be a callable"),
        ([], {"huey": "redis"}, r"huey must be a Huey instance, not 'redis'"),
        ([], {"queues": "premium"}, r"queues must be a dict"),
        ([], {"queues": ["default"]}, r"a name must be ASCII other than 'default'"),
        ([], {"queues": ["prêmium"]}, r"a name must be ASCII"),
        ([], {"stuck_scheduled_threshold": 0}, r"stuck_scheduled_threshold must be .*more than 0"),
        ([], {"clock": lambda: datetime(2026, 1, 1)}, r"clock must be a callable that returns an aware datetime"),
        ([], {"queues": {"premium": "redis"}}, r"'premium' must be a Huey instance"),
    ],
)
def test_a_wrong_setting_raises_at_construction(arguments, settings, text):
    before = gd._current_drive
    with pytest.raises(gd.ConfigurationError, match=text):
        GenevaDrive(*(arguments or [SqliteDatabase(":memory:")]), **settings)
    assert gd._current_drive is before


def test_settings_are_attributes_and_checked_there_too(drive):
    drive.run_on = 3
    assert drive.run_on == timedelta(seconds=3)
    drive.delete_completed_workflows_after = None
    assert drive.delete_completed_workflows_after is None
    with pytest.raises(gd.ConfigurationError, match="max_recoveries"):
        drive.max_recoveries = "many"


def test_the_help_on_a_drive_tells_its_settings_with_their_defaults():
    shown = {
        name: gd._span(default) if isinstance(default, timedelta) else json.dumps(default)
        for name, (default, _, _) in gd.SETTINGS.items()
        if name not in ("housekeeping_schedule", "clock")
    }
    shown |= {"housekeeping_schedule": "every minute", "clock": "the host's"}
    assert dict(re.findall(r":param (\w+): \((.+?)\) ", inspect.getdoc(GenevaDrive))) == shown


def test_without_a_drive_a_workflow_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(gd, "_current_drive", None)
    with pytest.raises(gd.ConfigurationError, match="construct GenevaDrive"):
        Plain.create(hero=User(id=1))


def test_constructing_a_drive_runs_no_sql():
    class Untouchable(SqliteDatabase):
        def _connect(self):
            raise AssertionError("connected")

    drive = GenevaDrive(Untouchable("nowhere.db"), queues=["premium"])
    assert sorted(drive.queues) == ["default", "premium"]


def test_a_proxy_may_be_initialized_after_the_drive(tmp_path):
    proxy = peewee.DatabaseProxy()
    drive = GenevaDrive(proxy)
    with pytest.raises(gd.ConfigurationError, match=r"DatabaseProxy .* not initialized"):
        drive.create_tables()
    db = SqliteDatabase(tmp_path / "proxy.db", pragmas={"journal_mode": "wal"})
    proxy.initialize(db)
    for model in MODELS:
        model.bind(proxy)
    proxy.create_tables(MODELS)
    drive.create_tables()
    workflow = Quick.create(hero=User.create())
    work_off(drive)
    assert (reload(workflow).state, effects()) == ("finished", ["one", "two", "three"])
    with pytest.raises(ZeroDivisionError), proxy.atomic():
        Quick.create(hero=User.create())
        raise ZeroDivisionError
    assert (Quick.select().count(), messages(drive)) == (1, [])
    db.close()


def test_a_database_that_cannot_work_is_refused_at_construction():
    from playhouse.postgres_ext import PooledPostgresqlExtDatabase, PostgresqlExtDatabase
    from playhouse.sqliteq import SqliteQueueDatabase

    unfit = [
        (
            SqliteQueueDatabase("queue.db", autostart=False),
            "SqliteQueueDatabase has no transactions: use SqliteDatabase",
        ),
        (PostgresqlExtDatabase("app", server_side_cursors=True), r"server_side_cursors=True .*ServerSide\(\)"),
        (PooledPostgresqlExtDatabase("app", server_side_cursors=True), r"server_side_cursors=True .*ServerSide\(\)"),
    ]
    before = gd._current_drive
    for database, words in unfit:
        for proxied in (database, peewee.DatabaseProxy()):
            if proxied is not database:
                proxied.initialize(database)
            with pytest.raises(gd.ConfigurationError, match=words):
                GenevaDrive(proxied)
        assert gd._current_drive is before
        later = peewee.DatabaseProxy()
        GenevaDrive(later)
        with pytest.raises(gd.ConfigurationError, match=words):
            later.initialize(database)
        before = gd._current_drive
    GenevaDrive(PostgresqlExtDatabase("app"))


@pytest.mark.parametrize("name", [":memory:", "file:app?mode=memory"])
def test_a_database_in_memory_that_threads_do_not_share_is_refused_as_they_start(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    db = SqliteDatabase(name, uri=name.startswith("file"))
    with driven(db) as drive:
        workflow = Quick.create(hero=User.create())
        for start in (drive.run, drive.huey.create_consumer(workers=1).start):
            with pytest.raises(gd.ConfigurationError, match="another database in each thread: use a file; or perform"):
                start()
        gd.TestHelpers().speedrun_workflow(workflow)
        assert effects() == ["one", "two", "three"]


def test_a_pool_serves_as_well(tmp_path):
    db = PooledSqliteDatabase(tmp_path / "pool.db", max_connections=4, timeout=5)
    for model in MODELS:
        model.bind(db)
    drive = GenevaDrive(db)
    drive.create_tables()
    db.create_tables(MODELS)
    workflow = Quick.create(hero=User.create())
    drive.run(workers=2, until=lambda: reload(workflow).state == "finished")
    assert effects() == ["one", "two", "three"]
    db.close_all()


def test_an_unsupported_database_is_refused_before_anything_is_created():
    from playhouse.cockroachdb import CockroachDatabase

    class Oracle(peewee.Database):
        def _connect(self):
            raise AssertionError("connected")

    for database in (Oracle("db"), CockroachDatabase("db")):
        drive = GenevaDrive(database)
        with pytest.raises(gd.UnsupportedDatabaseError, match=f"{type(database).__name__} is not supported"):
            drive.create_tables()


ENGINE_TABLES = [model._meta.table_name for model in gd.MODELS]
SCHEMA_INDEXES = sorted(set(re.findall(r"^create (?:unique )?index (\w+)", gd.SCHEMA_FILE.read_text(), re.MULTILINE)))


def test_the_schema_file_speaks_of_the_models_tables_and_columns():
    for section in ("every database", "postgresql", "sqlite", "mysql"):
        for statement in gd._schema_statements(section):
            assert statement == statement.strip()
            assert not statement.isupper()
            table = re.search(r" on (\w+)|alter table (\w+)", statement)
            assert (table[1] or table[2]) in ENGINE_TABLES
            columns = re.search(r"\((.*?)\)", statement.split(" on ")[-1]) if " on " in statement else None
            known = {field.column_name for model in gd.MODELS for field in model._meta.sorted_fields}
            known |= {"ongoing", "active"}
            for column in columns[1].split(", ") if columns else ():
                assert column.split()[0] in known, statement
    for states, expected in ((gd.ONGOING, "one_ongoing_workflow"), (gd.ACTIVE, "one_active_execution")):
        listed = "(" + ", ".join(f"'{state}'" for state in states) + ")"
        assert gd.SCHEMA_FILE.read_text().count(f"state in {listed}") == 2, expected


def test_create_tables_is_idempotent_and_completes_what_was_begun(database, db, drive):
    tables = set(db.get_tables())
    assert {each for each in tables if each.startswith("geneva_drive")} == {*ENGINE_TABLES, "geneva_drive_schema"}
    db.execute_sql(
        "drop index geneva_drive_hero"
        + (" on geneva_drive_workflows" if drive._access.dialect.section == "mysql" else "")
    )
    drive.create_tables()
    assert "geneva_drive_hero" in {each.name for each in db.get_indexes("geneva_drive_workflows")}
    drive.create_tables()


class Awaits(Workflow):
    @step(wait_for="told")
    def one(self):
        pass


BEFORE_THE_TABLES = {
    "create": lambda hero, drive: Quick.create(hero=hero),
    "create_many": lambda hero, drive: Quick.create_many([hero]),
    "get_or_create": lambda hero, drive: Quick.get_or_create(hero=hero),
    "signal": lambda hero, drive: Awaits(id=1, type="Awaits").signal("told"),
    "signal_hero": lambda hero, drive: Awaits.signal_hero(hero, "told", idempotency_key="k"),
    "pause": lambda hero, drive: Quick(id=1, type="Quick").pause(),
    "stats": lambda hero, drive: drive.stats(),
    "is_idle": lambda hero, drive: drive.is_idle(),
    "housekeeping": lambda hero, drive: drive.housekeeping(),
    "execute": lambda hero, drive: StepExecution(id=1).execute(),
}


@pytest.mark.parametrize("call", BEFORE_THE_TABLES)
@pytest.mark.parametrize("kind", SERVERS)
def test_before_create_tables_each_call_says_so(servers, kind, call):
    db = open_database(servers.empty(kind))
    drive = GenevaDrive(db)
    problem = r"has no tables of GenevaDrive: call drive\.create_tables\(\)"
    with User.bind_ctx(db), contextlib.closing(db):
        with pytest.raises(gd.GenevaDriveError, match=problem) as told:
            BEFORE_THE_TABLES[call](User(id=1), drive)
        assert isinstance(told.value.__cause__, peewee.DatabaseError)
        with pytest.raises(gd.GenevaDriveError, match=problem), db.atomic():
            Quick.create(hero=User(id=1))


@pytest.mark.parametrize("kind", SERVERS)
def test_with_the_tables_of_an_older_version_a_call_says_so(servers, monkeypatch, kind):
    db = open_database(servers.empty(kind))
    with driven(db) as drive:
        version, column = "geneva_drive_schema", "transitioned_at"
        db.execute_sql(f"alter table geneva_drive_workflows rename column {column} to spoilt")
        monkeypatch.setattr(gd, "SCHEMA_VERSION", gd.SCHEMA_VERSION + 1)
        problem = rf"is at version {gd.SCHEMA_VERSION - 1}, .* call drive\.create_tables\(\)"
        with pytest.raises(gd.GenevaDriveError, match=problem):
            Quick.create(hero=User.create())
        db.execute_sql(f"alter table geneva_drive_workflows rename column spoilt to {column}")
        drive.create_tables()
        assert [row for (row,) in db.execute_sql(f"select version from {version} order by version")] == [
            gd.SCHEMA_VERSION - 1,
            gd.SCHEMA_VERSION,
        ]


class Author(Model):
    name = CharField(index=True)

    class Meta:
        table_name = "test_authors"


class Book(Model):
    author = ForeignKeyField(Author)
    title = CharField(unique=True)

    class Meta:
        table_name = "test_books"


def _create_tables(number, url, barrier, results):
    db = open_database(url)
    for model in (Author, Book):
        model.bind(db)
    drive = GenevaDrive(db)
    barrier.wait(timeout=60)
    drive.create_tables([Book, Author])
    results.put(sorted(each.name for each in db.get_indexes("test_books")))
    db.close()


@pytest.mark.parametrize("kind", SERVERS)
def test_many_processes_create_the_tables_of_an_application_at_once(servers, kind):
    url = servers.empty(kind)
    made = in_processes(8, _create_tables, url, fork.Barrier(8))
    assert len(made) == 8
    assert all({"book_author_id", "book_title"} <= set(indexes) for indexes in made)
    db = open_database(url)
    Author.bind(db)
    drive = GenevaDrive(db)
    if kind != "mysql":  # where Peewee makes no index of a table that is there
        db.execute_sql("drop index author_name")
    drive.create_tables([Author])
    assert "author_name" in {each.name for each in db.get_indexes("test_authors")}
    with db.atomic():  # there is nothing to change, and nobody to wait for
        Author.create(name="ada")
        drive.create_tables([Author])
    assert drive.doctor() == []
    db.close()


def test_tables_of_another_database_are_not_created_in_passing(db, drive, tmp_path):
    class Elsewhere(Model):
        class Meta:
            database = SqliteDatabase(tmp_path / "other.db")

    for wrong in (Elsewhere, "test_users"):
        with pytest.raises(gd.ConfigurationError, match="is not a model of the drive's database"):
            drive.create_tables([Author, wrong])
    assert "test_authors" not in db.get_tables()
    with pytest.raises(gd.ConfigurationError, match="is not a model of the drive's database"):
        drive.create_tables(Elsewhere)  # one may come without a list


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("is_outside", [False, True])
def test_no_queue_needs_tables_of_its_own(servers, kind, is_outside):
    db = open_database(servers.empty(kind))
    GenevaDrive(db, huey=MemoryHuey("outside") if is_outside else None, queues=["premium"]).create_tables()
    assert sorted(db.get_tables()) == sorted([*ENGINE_TABLES, "geneva_drive_schema"])
    db.close()


def test_the_database_itself_refuses_a_second_active_execution(drive, hero):
    workflow = Plain.create(hero=hero)
    execution = scheduled(workflow)
    values = {**execution.__data__, "number": 2}
    del values["id"]
    for state in gd.ACTIVE:
        with pytest.raises(peewee.IntegrityError):
            StepExecution.insert(**{**values, "state": state}).execute()
    spare = StepExecution.insert(**{**values, "state": "completed", "queue": None}).execute()
    number = f"workflow {workflow.id} counts 1 executions, but its newest is number 2"
    diagnosed(drive, number, f"execution {spare} is completed, but the outcome None and the end None do not fit")


def test_an_applications_own_task_and_schedule_tables_are_left_alone(db, drive, hero):
    assert not {"task", "schedule", "kv", "counter"} & set(db.get_tables())


# -- upgrades: a database that lacks what this code has --


def shape(db):
    """All that tells one schema from another."""
    found = {("version", *row) for row in db.execute_sql("select version from geneva_drive_schema").fetchall()}
    if isinstance(db, SqliteDatabase):
        found |= {*db.execute_sql("select name, sql from sqlite_master where type = 'trigger'").fetchall()}
    for table in ENGINE_TABLES:
        found |= {(each.name, each.sql, *each.columns, each.unique) for each in db.get_indexes(table)}
        if isinstance(db, peewee.MySQLDatabase):  # with collations and expressions
            definition = db.execute_sql(f"show create table {table}").fetchone()[1]
            found |= {re.sub(r",$| AUTO_INCREMENT=\d+", "", line) for line in definition.split("\n")}
        else:
            found |= {(table, each.name, each.full_type.lower(), each.null) for each in db.get_columns(table)}
            found |= {(table, each.column, each.dest_table, each.on_delete) for each in db.get_foreign_keys(table)}
    return found


@pytest.fixture(params=SERVERS)
def earlier(request, servers):
    """Makes databases that lack a part of each kind, and have a workflow on its way; gives drives on them."""
    made = []

    def make():
        url = servers.empty(request.param)
        db = open_database(url)
        for model in MODELS:
            model.bind(db)
        drive = GenevaDrive(db, clock=Clock())
        drive.create_tables(MODELS)
        drive.shape, drive.url, drive.workflow = shape(db), url, Plain.create(hero=User.create())
        on = " on {}" if request.param == "mysql" else ""
        for index, table in (("one_ongoing_workflow", ENGINE_TABLES[0]), ("queue", ENGINE_TABLES[1])):
            db.execute_sql(f"drop index geneva_drive_{index}{on.format(table)}")
        of_workflows = {"postgresql": ["parent_id"], "mysql": ["ongoing"]}.get(request.param, [])
        for table, column in [(ENGINE_TABLES[1], "cursor"), *((ENGINE_TABLES[0], each) for each in of_workflows)]:
            db.execute_sql(f"alter table {table} drop column {column.join(db.quote)}")
        if request.param == "sqlite":
            db.execute_sql("drop trigger geneva_drive_delete_executions")
        db.execute_sql(f"drop table {ENGINE_TABLES[2]}")
        db.execute_sql("delete from geneva_drive_schema")
        made.append(db)
        return drive

    yield make
    for db in made:
        db.close()


def test_create_tables_adds_what_is_missing_and_workflows_go_on(earlier, monkeypatch):
    drive, statements = earlier(), []
    drive.create_tables()
    with monkeypatch.context() as patch:
        patch.setattr(drive.database, "query_hooks", [lambda event: statements.append(event.sql)])
        drive.create_tables()
    verbs = "create|alter|insert|update|delete|drop|set|lock"
    assert not any(re.match(verbs, sql, re.IGNORECASE) for sql in statements)  # what is up to date is left alone
    assert (shape(drive.database), drive.doctor()) == (drive.shape, [])
    for _ in range(2):
        work_off(drive)
        drive.clock.forward(days=2)
    assert (reload(drive.workflow).state, effects()) == ("finished", ["one", "two", "three"])


@ELSEWHERE
def test_an_upgrade_that_dies_anywhere_is_completed_by_the_next_one(earlier):
    for moment in itertools.count():
        drive = earlier()
        if not dies_at(moment, drive.database, drive.create_tables, "create|alter|insert"):
            break
        assert "has no tables of GenevaDrive" in drive.doctor()[0]  # it is the last thing to be recorded
        drive.create_tables()
        assert shape(drive.database) == drive.shape
    assert moment >= 5
    assert shape(drive.database) == drive.shape


def _upgrade(number, url, barrier, results):
    drive = GenevaDrive(open_database(url))
    barrier.wait(timeout=60)
    drive.create_tables()
    results.put(drive.doctor())


def test_eight_processes_upgrade_at_once(earlier, is_exhaustive):
    for _ in range(5 if is_exhaustive else 1):
        drive = earlier()
        drive.database.close()
        assert in_processes(8, _upgrade, drive.url, fork.Barrier(8)) == [[]] * 8
        assert shape(drive.database) == drive.shape


@pytest.mark.parametrize("earlier", ["postgresql", "mysql"], indirect=True)
def test_the_upgrade_waits_for_open_transactions_and_holds_nobody_up(earlier):
    drive = earlier()
    busy, others = open_database(drive.url), open_database(drive.url)
    is_mysql = isinstance(busy, peewee.MySQLDatabase)
    others.execute_sql("set lock_wait_timeout = 20" if is_mysql else "set lock_timeout = '20s'")
    waiting = "select 1 from pg_stat_activity where query ~* '^(alter|create)' and wait_event_type = 'Lock'"
    if is_mysql:
        waiting = "select 1 from information_schema.processlist where state like 'Waiting for table metadata lock'"
    number = "update geneva_drive_step_executions set reattempts = reattempts + 1"
    with busy.atomic():
        busy.execute_sql(number)
        upgrade = fork.Process(target=_upgrade, args=(0, drive.url, fork.Barrier(1), fork.Queue()))
        upgrade.start()
        for _ in range(2):
            until(lambda: others.execute_sql(waiting).fetchone())
            others.execute_sql("select count(*) from geneva_drive_step_executions").fetchone()
        assert upgrade.is_alive()
    upgrade.join()
    assert upgrade.exitcode == 0
    assert (drive.doctor(), StepExecution.get().reattempts) == ([], 1)
    busy.close()
    others.close()


@pytest.mark.parametrize("earlier", ["mysql"], indirect=True)
def test_on_mysql_the_tables_are_not_changed_inside_a_transaction_which_that_would_commit(earlier):
    drive = earlier()
    for is_done in (False, True):
        refused = pytest.raises(
            gd.GenevaDriveError, match=r"create_tables\(\) has tables to change, .* outside of trans"
        )
        with drive.database.atomic() as transaction:
            User.create(name="nobody")
            with contextlib.nullcontext() if is_done else refused:
                drive.create_tables()
            transaction.rollback()
        drive.create_tables()
    assert not User.select().where(User.name == "nobody").exists()


@pytest.mark.parametrize("kind", SERVERS)
def test_older_code_works_beside_a_newer_schema_and_leaves_it_as_it_is(servers, kind):
    with driven(open_database(servers.empty(kind))) as drive:
        db = drive.database
        db.execute_sql("alter table geneva_drive_step_executions add column of_a_later_version integer")
        db.execute_sql(f"insert into geneva_drive_schema (version) values ({gd.SCHEMA_VERSION + 1})")
        before = shape(db)
        drive.create_tables()
        assert (shape(db), drive.doctor()) == (before, [])
        workflow = Quick.create(hero=User.create())
        drive.run(until=lambda: reload(workflow).state == "finished")


def test_code_that_is_newer_than_the_tables_says_so_and_takes_no_step(db, drive, command_line, monkeypatch):
    workflow = Quick.create(hero=User.create())
    with monkeypatch.context() as patch:
        patch.setattr(gd, "SCHEMA_VERSION", 2)
        problem = (
            r"the schema of .* is at version 1, this version of GenevaDrive needs version 2: call drive\.create_tab"
        )
        assert len(drive.doctor()) == 1
        assert re.match(problem, drive.doctor()[0])
        for start in (drive.run, drive.huey.create_consumer(workers=1).start):
            with pytest.raises(gd.GenevaDriveError, match=problem):
                start()
        for command in ("worker", "list", "doctor", "housekeeping"):
            status, _, errors = command_line(command)
            assert (status, bool(re.search(problem, errors))) == (1, True)
    assert (history(workflow), drive.doctor()) == ([("one", "scheduled", None)], [])
    drive.run(until=lambda: reload(workflow).state == "finished")


def test_a_consumer_starts_though_the_version_cannot_be_read_yet(tmp_path, caplog):
    db = SqliteDatabase(tmp_path / "app.db", timeout=0.1)
    with driven(db) as drive:
        workflow = Quick.create(hero=User.create())
        db.close()
        with contextlib.closing(sqlite3.connect(tmp_path / "app.db", isolation_level=None)) as other:
            other.execute("begin exclusive")

            def is_over():
                if other.in_transaction:
                    other.rollback()
                    db.timeout = 20
                return reload(workflow).state == "finished"

            drive.run(until=is_over)
    assert "the version of the schema cannot be read: database is locked" in caplog.text


# ==== The drive's own Huey: the row is the message ====================================================================


class Ranked(Workflow):
    @step
    def one(self):
        did(f"{self.context['rank']}")


def ranked(*ranks, **options):
    """Workflows of these priorities, in this order."""
    return [
        Ranked.create(hero=User.create(), context={"rank": rank}, options={"priority": rank} if rank else None)
        for rank in ranks
    ]


def test_what_is_due_is_performed_by_its_priority_and_then_by_its_time(drive, clock):
    ranked(0, -3, 7, 2)
    clock.forward(seconds=-5)
    ranked(0, 7)  # due before the others
    clock.forward(seconds=5)
    ranked(2, 7)
    Foremost.create(hero=User.create())  # higher than all, and not due
    expected = list(StepExecution.select().where(StepExecution.due_at <= clock()))
    expected.sort(key=lambda each: (-each.priority, each.due_at, each.id))
    assert [each.priority for each in expected] == [7, 7, 7, 2, 2, 0, 0, -3]
    assert [task.args[0] for task in drive.huey.pending()] == [each.id for each in expected]
    taken = []
    while task := drive.huey.dequeue():
        taken.append(task.args[0])
        drive.huey.execute(task)
    assert taken == [each.id for each in expected]
    ranked(7)
    clock.forward(days=1)
    work_off(drive)
    assert effects()[-2:] == ["foremost", "7"]


class Foremost(Workflow):
    step_options = {"priority": 9}

    @step(wait=timedelta(days=1))
    def one(self):
        did("foremost")


def _create_ranked(number, url, results):
    db = open_database(url)
    for model in MODELS:
        model.bind(db)
    GenevaDrive(db)
    ranked(9)
    results.put(1)
    db.close()


def test_a_priority_that_another_process_adds_is_seen_within_a_second(database, db, drive):
    ranked(0, 0)
    drive.huey.execute(drive.huey.dequeue())  # the priorities are known by now
    db.close()
    in_processes(1, _create_ranked, database.url)
    until(lambda: drive.huey.storage.priorities() == (9, 0))
    work_off(drive)
    assert effects() == ["0", "9", "0"]


def test_the_queue_shows_the_steps_as_tasks_with_their_times_and_priorities(drive, clock):
    now = ranked(0)[0]
    urgent = ranked(5)[0]
    later = Tomorrow.create(hero=User.create())
    waits = Asking.create(hero=User.create())
    Confirming.create(hero=User.create()).pause()
    Confirming.create(hero=User.create()).cancel()
    gd._Attempt.claim(drive, scheduled(Plain.create(hero=User.create())).id)
    Awaits.create(hero=User.create())  # without a limit
    huey = drive.huey
    shown = [(task.name, task.args, task.eta, task.priority) for task in huey.pending()]
    ids = {each.id: each.execution_history.get().id for each in (now, urgent, later, waits)}
    assert shown == [
        ("perform_step", (ids[urgent.id],), None, 5),
        ("perform_step", (ids[now.id],), None, None),
    ]
    day, month = clock.now + timedelta(days=1), clock.now + timedelta(days=30)
    shown = [(task.args, task.eta.replace(tzinfo=timezone.utc)) for task in huey.scheduled()]
    assert shown == [((ids[later.id],), day), ((ids[waits.id],), month)]
    assert (len(huey), huey.pending_count(), huey.scheduled_count()) == (2, 2, 2)
    assert [len(huey.pending(limit=1)), len(huey.scheduled(limit=1))] == [1, 1]
    assert bool(huey)
    assert [task.id for task in huey.pending()] == [
        StepExecution.get_by_id(task.args[0]).job_id for task in huey.pending()
    ]
    assert (huey.all_results(), huey.result_count(), huey.flush_locks("any")) == ({}, 0, set())


class Confirming(Workflow):
    @step
    def one(self):
        did("confirming")


@contextlib.contextmanager
def told_by(huey):
    """What Huey's signals and hooks tell of tasks."""
    told = []

    @huey.signal()
    def receiver(name, task, error=None):
        told.append((name, task.args[0]))

    huey.pre_execute("told")(lambda task: told.append(("before", task.args[0])))
    huey.post_execute("told")(lambda task, value, error: told.append(("after", task.args[0])))
    try:
        yield told
    finally:
        huey.disconnect_signal(receiver)
        huey.unregister_pre_execute("told")
        huey.unregister_post_execute("told")


def test_signals_and_hooks_of_hueys_see_the_steps(db, drive, hero):
    class FailsLater(Workflow):
        @step
        def one(self):
            pass

        @step(wait=10)
        def two(self):
            raise OddError

    with told_by(drive.huey) as told:
        with db.atomic():
            workflow = FailsLater.create(hero=hero)
            assert told == []  # nobody is told of what is not committed
        first = scheduled(workflow).id
        with pytest.raises(ZeroDivisionError), db.atomic():
            FailsLater.create(hero=User.create())
            raise ZeroDivisionError
        assert told == [("enqueued", first)]
        work_off(drive)
        second = scheduled(workflow).id
        performed = ["enqueued", "executing", "before", "after", "complete"]
        assert sorted(told) == sorted([*((name, first) for name in performed), ("scheduled", second)])
        assert [name for name, number in told if number == first] == performed
        del told[:]
        drive.clock = lambda: utcnow() + timedelta(seconds=11)
        work_off(drive)
        assert told == [(name, second) for name in ("executing", "before", "error", "after")]
    assert reload(workflow).state == "paused"


def test_a_step_that_a_hook_cancels_is_put_back_and_counts_as_no_attempt(drive, clock, hero):
    workflow, canceled = Quick.create(hero=hero, options={"priority": 4}), []

    @drive.huey.pre_execute("not yet")
    def not_yet(task):
        canceled.append(task.args[0])
        raise CancelExecution

    with told_by(drive.huey) as told:
        assert drive.huey.execute(drive.huey.dequeue()) is None
        assert ("canceled", scheduled(workflow).id) in told
    drive.huey.unregister_pre_execute("not yet")
    execution = scheduled(workflow)
    assert canceled == [execution.id]
    assert (history(workflow), effects()) == ([("one", "scheduled", None)], [])
    assert (execution.started_at, execution.performed_by) == (None, None)
    assert (execution.reattempts, execution.recoveries) == (0, 0)
    assert reload(workflow).state == "ready"
    assert drive.huey.dequeue() is None  # for a little while
    assert execution.due_at > clock()
    assert execution.scheduled_for <= clock()
    assert execution.priority == 4
    clock.forward(minutes=11)
    work_off(drive)
    assert (reload(workflow).state, effects()) == ("finished", ["one", "two", "three"])


@pytest.mark.parametrize("error", [RetryTask, TaskLockedException, CancelExecution])
def test_what_hueys_own_exceptions_do_in_a_body_is_what_other_errors_do(drive, hero, error):
    class Raising(Workflow):
        @step
        def one(self):
            raise error("so")

    workflow = Raising.create(hero=hero)
    work_off(drive)
    assert (reload(workflow).state, history(workflow)) == ("paused", [("one", "failed", "failed")])


REFUSED = {
    "a task": lambda huey: huey.task()(lambda: did("no"))(),
    "a task for later": lambda huey: huey.task()(lambda: did("no")).schedule(delay=1),
    "many": lambda huey: huey.task()(lambda n: did("no")).map([1, 2]),
    "a pipeline": lambda huey: huey.enqueue((task := huey.task()(lambda: did("no"))).s().then(task)),
    "a group": lambda huey: huey.enqueue(group([huey.task()(lambda: did("no")).s()])),
    "immediate": lambda huey: setattr(huey, "immediate", True),
    "revoke_all": lambda huey: huey.revoke_all(huey._geneva_drive_tasks[0]),
    "revoke_by_id": lambda huey: huey.revoke_by_id("any"),
    "lock_task": lambda huey: huey.lock_task("any").acquire(),
    "is_locked": lambda huey: huey.is_locked("any"),
    "rate_limit": lambda huey: huey.rate_limit("any", 1, 1).__enter__(),
    "put": lambda huey: huey.put("any", 1),
    "result": lambda huey: huey.result("any"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_the_drives_own_huey_does_not_do_it_refuses_in_words(drive, hero, call):
    with pytest.raises(gd.ConfigurationError, match=r"the drive's own .*GenevaDrive\(db, huey=\.\.\.\)"):
        REFUSED[call](drive.huey)
    assert drive.huey.immediate is False
    workflow = Quick.create(hero=hero)
    work_off(drive)
    assert effects() == ["one", "two", "three"]
    assert reload(workflow).state == "finished"


def test_flush_leaves_the_steps(drive, hero):
    workflow = Quick.create(hero=hero)
    Tomorrow.create(hero=hero)
    drive.huey.flush()
    for flush in ("flush_queue", "flush_schedule", "flush_results", "flush_counters"):
        getattr(drive.huey.storage, flush)()
    assert (drive.huey.pending_count(), drive.huey.scheduled_count()) == (1, 1)
    work_off(drive)
    assert reload(workflow).state == "finished"


@ELSEWHERE
def test_periodic_tasks_run_in_the_scheduler_after_housekeeping_and_are_retried(drive, hero, monkeypatch):
    told, sweep = [], gd._Recovery.sweep

    def note(what):
        told.append((what, threading.current_thread().name, drive._access.database.is_closed()))

    monkeypatch.setattr(gd._Recovery, "sweep", lambda self: note("housekeeping") or sweep(self))

    @drive.huey.periodic_task(lambda moment: len(told) < 20, retries=2, retry_delay=1)
    def creates():
        note("creates")
        if sum(what == "creates" for what, *_ in told) < 3:
            raise OddError
        Quick.get_or_create(hero=hero)

    @drive.huey.periodic_task(lambda moment: False)
    def never():
        note("never")

    with told_by_names(drive.huey) as names:
        drive.run(workers=2, until=lambda: "finished" in [each.state for each in Quick.select()])
    whats = [what for what, thread, _ in told if thread == "Scheduler"]
    assert whats[0] == "housekeeping"
    assert whats.count("creates") >= 3
    assert "never" not in whats
    assert {thread for what, thread, _ in told if what == "creates"} == {"Scheduler"}
    assert effects() == ["one", "two", "three"]
    assert {"executing", "error", "retrying", "complete"} <= {name for name, task in names if task == "creates"}


@contextlib.contextmanager
def told_by_names(huey):
    told = []
    receiver = huey.signal()(lambda name, task, error=None: told.append((name, task.name)))
    try:
        yield told
    finally:
        huey.disconnect_signal(receiver)


def test_a_periodic_task_leaves_no_connection_behind_in_the_scheduler(db, drive):
    seen = []

    @drive.huey.periodic_task(lambda moment: True)
    def looks():
        seen.append(User.select().count())

    def tick():
        for task in drive.huey.read_periodic(None):
            drive.huey.enqueue(task)
        return db.is_closed()

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(tick).result(timeout=30) is True
    assert seen == [0]
    db.connect(reuse_if_open=True)
    tick()
    assert not db.is_closed()  # it is the caller's


MISPLACED = {
    "paused": (
        {"state": "paused", "transitioned_at": START},
        {},
        "is scheduled in a workflow that is paused, but in the queue default",
    ),
    "of nobody": ({}, {"queue": None}, "is scheduled in a workflow that is ready, but in no queue"),
    "without a limit": (
        {},
        {"state": "waiting", "waiting_for": "told"},
        "is waiting in a workflow that is ready, but in the queue default",
    ),
    "with a limit": (
        {},
        {"state": "waiting", "waiting_for": "told", "times_out_at": START, "queue": None},
        "is waiting in a workflow that is ready, but in no queue",
    ),
    "performed": (
        {"state": "performing"},
        {"state": "in_progress"},
        "is in_progress in a workflow that is performing, but in the queue default",
    ),
    "of no time": ({}, {"due_at": None}, "is in the queue default, but has the priority 0 and is due at None"),
    "of no priority": ({}, {"priority": None}, "is in the queue default, but has the priority None and is due at .*"),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_the_doctor_tells_of_what_is_in_a_queue_by_mistake_or_in_none(drive, clock, hero, case):
    workflow = Plain.create(hero=hero)
    execution = scheduled(workflow)
    assert drive.doctor() == []
    changes, columns, problem = MISPLACED[case]
    Workflow.update(**changes, token="x").where(Workflow.id == workflow.id).execute()
    StepExecution.update(**{"number": 1, **columns}).where(StepExecution.id == execution.id).execute()
    diagnosed_among(drive, f"execution {execution.id} {problem}")


def diagnosed_among(drive, sentence):
    """Assert that doctor() says something, and remove the rows."""
    found = drive.doctor()
    assert [each for each in found if re.fullmatch(sentence, each)], found
    StepExecution.delete().execute()
    Workflow.delete().execute()


OUT_OF_THE_QUEUE = {
    "paused": lambda drive, workflow: workflow.pause(),
    "canceled": lambda drive, workflow: workflow.cancel(),
    "claimed": lambda drive, workflow: gd._Attempt.claim(drive, scheduled(workflow).id),
    "claimed and paused": lambda drive, workflow: (
        gd._Attempt.claim(drive, scheduled(workflow).id),
        reload(workflow).pause(),
    ),
}


@pytest.mark.parametrize("way", OUT_OF_THE_QUEUE)
def test_what_is_paused_canceled_or_claimed_is_in_no_queue(drive, clock, hero, way):
    workflow = Plain.create(hero=hero)
    OUT_OF_THE_QUEUE[way](drive, workflow)
    (execution,) = workflow.execution_history
    assert execution.queue is None
    assert (messages(drive), drive.huey.dequeue()) == ([], None)


def _take_all(number, url, results):
    db = open_database(url)
    for model in MODELS:
        model.bind(db)
    drive = GenevaDrive(db, run_on=0)

    def work():
        with db.connection_context():
            for _ in range(1000):
                task = drive.huey.dequeue()
                if task is None:
                    return
                results.put(task.args[0])
                drive.huey.execute(task)

    with ThreadPoolExecutor(2) as threads:
        for each in [threads.submit(work) for _ in range(2)]:
            each.result()


def test_several_threads_of_several_processes_take_each_step_once(database, db, drive):
    Quick.create_many([User.create() for _ in range(30)])
    for rank in (5, 0, 5):
        ranked(rank)
    db.close()
    taken_by_all = in_processes(3, _take_all, database.url)
    while drive.huey.pending_count():  # what came while all had looked
        taken_by_all += in_processes(1, _take_all, database.url)
    assert Counter(taken_by_all) == {each.id: 1 for each in StepExecution.select()}
    assert {each.state for each in Workflow.select()} == {"finished"}
    assert Counter(effects()) == {"one": 30, "two": 30, "three": 30, "5": 2, "0": 1}


# ==== Housekeeping ====================================================================================================


def test_housekeeping_deletes_what_is_over_long_since_in_batches(drive, clock, helpers):
    drive.housekeeping_batch_size = 2
    workflows = [Quick.create(hero=User.create()) for _ in range(5)]
    for workflow in workflows[:4]:
        helpers.speedrun_workflow(workflow)
    workflows[4].cancel()
    paused, ready = Plain.create(hero=User.create()), Plain.create(hero=User.create())
    paused.pause()
    clock.forward(days=29)
    recent = Quick.create(hero=User.create())
    recent.cancel()
    assert drive.housekeeping()["workflows_cleaned_up"] == 0
    clock.forward(days=2)
    counts = drive.housekeeping()
    assert (counts["workflows_cleaned_up"], counts["step_executions_cleaned_up"]) == (5, 13)
    assert {each.id for each in Workflow.select()} == {paused.id, ready.id, recent.id}
    drive.delete_completed_workflows_after = None
    clock.forward(days=999)
    assert drive.housekeeping()["workflows_cleaned_up"] == 0


@contextlib.contextmanager
def sql_huey(db):
    """A Huey of the application's whose messages are rows of the drive's own database."""
    huey = SqlHuey(database=db, results=False)
    try:
        yield huey
    finally:
        huey.storage.drop_tables()


@pytest.fixture
def outside(db, drive, clock):
    """A drive whose default queue is a Huey of the application's, which may lose what it is given."""
    return GenevaDrive(db, huey=MemoryHuey("outside", results=False), queues=["own"], clock=clock)


def test_housekeeping_queues_again_what_is_overdue_once_per_threshold(outside, clock):
    drive = outside
    drive.housekeeping_batch_size = 2
    due = [Plain.create(hero=User.create()) for _ in range(5)]
    waiting = Plain.create(hero=User.create())
    scheduled(waiting).execute()
    paused = Plain.create(hero=User.create())
    paused.pause()
    drive.huey.flush()
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 0
    clock.forward(seconds=61)
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 5
    assert messages(drive) == sorted(scheduled(each).id for each in due)
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 0
    drive.huey.flush()
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 0
    clock.forward(seconds=61)
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 5
    assert scheduled(paused).execute() is False


@pytest.mark.parametrize("kind", ["memory", "redis", "priorities", "sql"])
def test_housekeeping_leaves_alone_what_a_queue_is_behind_with(db, drive, servers, kind):
    make = {
        "memory": lambda: contextlib.nullcontext(MemoryHuey("behind", results=False)),
        "redis": lambda: contextlib.nullcontext(RedisHuey("behind", url=servers.redis(), results=False)),
        "priorities": lambda: contextlib.nullcontext(
            PriorityRedisHuey("behind_too", url=servers.redis(), results=False)
        ),
        "sql": lambda: sql_huey(db),
    }
    with make[kind]() as huey:
        drive = GenevaDrive(db, huey=huey, clock=Clock())
        drive.huey.flush()
        workflows = []
        for _ in range(6):
            workflows.append(Plain.create(hero=User.create()))
            drive.clock.forward(minutes=10)
        for _ in range(3):
            assert drive.housekeeping()["stuck_scheduled_recovered"] == 0
            drive.clock.forward(minutes=10)
        lost = [drive.huey.dequeue().args[0] for _ in range(2)]
        assert lost == [scheduled(each).id for each in workflows[:2]]
        # The queue's first message is ten minutes younger than the second of the lost ones.
        assert drive.housekeeping()["stuck_scheduled_recovered"] == 2
        assert drive.housekeeping()["stuck_scheduled_recovered"] == 0
        assert messages(drive) == sorted(scheduled(each).id for each in workflows)
        for _ in workflows:
            drive.huey.execute(drive.huey.dequeue())
        assert effects() == ["one"] * 6


def test_housekeeping_has_nothing_to_do_with_what_the_drives_own_queue_is_behind_with(drive, clock):
    workflows = [Plain.create(hero=User.create()) for _ in range(3)]
    before = list(StepExecution.select().order_by(StepExecution.id).tuples())
    for _ in range(3):
        clock.forward(hours=10)
        assert set(drive.housekeeping().values()) == {0}
    assert list(StepExecution.select().order_by(StepExecution.id).tuples()) == before
    assert messages(drive) == [scheduled(each).id for each in workflows]


@pytest.mark.parametrize("is_own", [True, False])
def test_what_is_in_a_queue_that_a_deploy_took_away_comes_to_the_default_one(db, drive, clock, is_own):
    with_it = {"queues": ["premium"] if is_own else {"premium": MemoryHuey("gone", results=False)}}
    GenevaDrive(db, clock=clock, **with_it)
    due, later, paused = (cls.create(hero=User.create(), options={"queue": "premium"}) for cls in (Quick, Plain, Quick))
    scheduled(later).execute()
    paused.pause()
    drive = GenevaDrive(db, clock=clock)
    assert [messages(drive), drive.housekeeping()["stuck_scheduled_recovered"]] == [[], 0]
    clock.forward(minutes=2)
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 1
    assert messages(drive) == [scheduled(due).id]
    clock.forward(days=3)
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 1
    drive.run_on = 60
    work_off(drive)
    assert [reload(each).state for each in (due, later, paused)] == ["finished", "finished", "paused"]


def test_what_waits_behind_a_higher_priority_is_not_taken_for_lost(db, drive):
    class Urgent(Workflow):
        @step(options={"priority": 5})
        def one(self):
            pass

    with sql_huey(db) as huey:
        drive, task = GenevaDrive(db, huey=huey, clock=Clock()), huey.storage.Task
        waiting = Plain.create(hero=User.create())
        drive.clock.forward(minutes=10)
        urgent = Urgent.create(hero=User.create())
        drive.clock.forward(minutes=10)
        assert drive.housekeeping()["stuck_scheduled_recovered"] == 0
        task.delete().where(task.priority == 0).execute()
        assert drive.housekeeping()["stuck_scheduled_recovered"] == 1
        assert messages(drive) == sorted(scheduled(each).id for each in (waiting, urgent))
        task.delete().where(task.priority == 5).execute()
        assert drive.housekeeping()["stuck_scheduled_recovered"] == 1
        assert messages(drive) == sorted(scheduled(each).id for each in (waiting, urgent))


def test_a_schedule_that_is_behind_is_not_taken_for_lost(outside, clock):
    drive = outside
    workflow = Plain.create(hero=User.create())
    scheduled(workflow).execute()
    drive.huey.storage.flush_queue()
    clock.forward(days=3)
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 0
    drive.huey.flush()
    assert drive.housekeeping()["stuck_scheduled_recovered"] == 1


def test_two_sweeps_at_once_recover_each_execution_once(db, outside, clock):
    drive = outside
    for _ in range(20):
        gd._Attempt.claim(drive, scheduled(Plain.create(hero=User.create())).id)
        Quick.create(hero=User.create())
    drive.huey.flush()
    clock.forward(minutes=5)
    results = []

    def sweep():
        results.append(drive.housekeeping())
        db.close()

    threads = [threading.Thread(target=sweep) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each["stuck_in_progress_recovered"] for each in results) == 20
    assert sum(each["stuck_scheduled_recovered"] for each in results) == 20
    assert Workflow.ready().count() == 40


def test_a_row_that_cannot_be_recovered_does_not_stop_the_others(drive, clock, caplog):
    workflows = [Plain.create(hero=User.create()) for _ in range(3)]
    for workflow in workflows:
        gd._Attempt.claim(drive, scheduled(workflow).id)
    broken = workflows[1].execution_history.get()
    spare = {**broken.__data__, "number": 2, "state": "completed"}
    del spare["id"]
    StepExecution.insert(**spare).execute()  # the number that the recovery would take
    clock.forward(minutes=5)
    assert drive.housekeeping()["stuck_in_progress_recovered"] == 2
    assert f"execution {broken.id} cannot be recovered" in caplog.text
    assert reload(workflows[1]).state == "performing"
    assert reload(workflows[2]).state == "ready"
    number = f"workflow {workflows[1].id} counts 1 executions, but its newest is number 2"
    diagnosed(drive, number, r"execution \d+ is completed, but the outcome None and the end None do not fit")


class Note(Model):
    workflow = ForeignKeyField(Workflow)

    class Meta:
        table_name = "test_notes"


def test_a_workflow_that_cannot_be_deleted_stops_neither_the_others_nor_recovery(db, drive, clock, helpers, caplog):
    Note.bind(db, bind_refs=False)
    db.create_tables([Note])
    try:
        workflows = [Quick.create(hero=User.create()) for _ in range(3)]
        for workflow in workflows:
            helpers.speedrun_workflow(workflow)
        Note.create(workflow=workflows[1])
        dead = Plain.create(hero=User.create())
        gd._Attempt.claim(drive, scheduled(dead).id)
        clock.forward(days=31)
        counts = drive.housekeeping()
        assert (counts["workflows_cleaned_up"], counts["stuck_in_progress_recovered"]) == (2, 1)
        assert f"workflow {workflows[1].id} cannot be deleted" in caplog.text
        assert {each.id for each in Workflow.select()} == {workflows[1].id, dead.id}
    finally:
        db.drop_tables([Note])


def test_the_doctor_tells_of_rows_that_do_not_fit_together(drive, hero):
    assert drive.doctor() == []
    ready, canceled, finished = (Plain.create(hero=User.create()) for _ in range(3))
    canceled.cancel()
    StepExecution.update(state="in_progress").where(StepExecution.workflow == ready.id).execute()
    StepExecution.update(state="scheduled").where(StepExecution.workflow == canceled.id).execute()
    Workflow.update(state="finished").where(Workflow.id == finished.id).execute()
    diagnosed(
        drive,
        rf"workflow {ready.id} is ready, but its execution \d+ is in_progress",
        rf"workflow {canceled.id} is canceled, but its execution \d+ is scheduled",
        r"execution \d+ is scheduled, but the outcome canceled and the end .* do not fit",
        rf"workflow {finished.id} is finished, but its execution \d+ is scheduled",
        rf"workflow {finished.id} is finished, but stands at the step one",
        r"execution \d+ is in_progress in a workflow that is ready, but in the queue default",
        r"execution \d+ is scheduled in a workflow that is finished, but in the queue default",
    )


def test_the_doctor_tells_of_an_index_that_is_missing_and_what_it_let_through(db, drive, hero):
    on = {table: f" on {table}" if drive._access.dialect.section == "mysql" else "" for table in ENGINE_TABLES}
    db.execute_sql(f"drop index geneva_drive_one_ongoing_workflow{on[ENGINE_TABLES[0]]}")
    db.execute_sql(f"drop index geneva_drive_one_active_execution{on[ENGINE_TABLES[1]]}")
    try:
        first, second = Plain.create(hero=hero), Plain.create(hero=hero)
        values = {**scheduled(first).__data__, "number": 2}
        del values["id"]
        StepExecution.insert(**values).execute()
        Workflow.update(execution_count=2).where(Workflow.id == first.id).execute()
        diagnosed(
            drive,
            f"User {hero.id} has 2 ongoing workflows of the type Plain",
            f"workflow {first.id} has 2 active executions",
            r"the schema lacks: create unique index geneva_drive_one_ongoing_workflow .*",
            r"the schema lacks: create unique index geneva_drive_one_active_execution .*",
        )
        assert second.id != first.id
    finally:
        StepExecution.delete().execute()
        Workflow.delete().execute()
        drive.create_tables()


def test_stats_count_what_there_is(drive, clock, helpers):
    class Fails(Workflow):
        @step
        def one(self):
            raise OddError

    assert drive.stats() == [("geneva_drive_oldest_overdue_seconds", {}, 0), ("geneva_drive_overdue_steps", {}, 0)]
    finished, canceled, dead, paused, *_ = [Plain.create(hero=User.create()) for _ in range(6)]
    helpers.speedrun_workflow(finished)
    canceled.cancel()
    helpers.speedrun_workflow(Fails.create(hero=User.create()), raise_errors=False)
    gd._Attempt.claim(drive, scheduled(dead).id)
    paused.pause()  # what is scheduled in it is not overdue
    clock.forward(minutes=5)
    assert drive.housekeeping()["stuck_in_progress_recovered"] == 1
    clock.forward(minutes=5)
    numbers = {(each.name.removeprefix("geneva_drive_"), *each.labels.values()): each.value for each in drive.stats()}
    assert numbers == {
        ("workflows", "Plain", "ready"): 3,
        ("workflows", "Plain", "performing"): 0,
        ("workflows", "Plain", "paused"): 1,
        ("workflows", "Plain", "finished"): 1,
        ("workflows", "Plain", "canceled"): 1,
        **{("workflows", "Fails", state): int(state == "paused") for state in gd.WORKFLOW_STATES},
        ("paused_ratio", "Plain"): 0.25,
        ("paused_ratio", "Fails"): 1,
        ("recovered_steps", "Plain"): 1,
        ("recovered_steps", "Fails"): 0,
        ("overdue_steps",): 3,
        ("oldest_overdue_seconds",): 600,
    }
    names = [each.name for each in drive.stats()]
    assert names == sorted(names)  # what belongs to one metric stands together, as Prometheus wants it
    Workflow.delete().execute()


def test_a_workflow_that_moves_on_while_one_asks_is_not_idle(drive, hero, monkeypatch):
    attempt = gd._Attempt.claim(drive, scheduled(Plain.create(hero=hero)).id)

    def move_on(event):
        monkeypatch.undo()
        attempt.run()

    monkeypatch.setattr(drive._access.database, "query_hooks", [move_on])
    assert not drive.is_idle()
    assert attempt.execution.state == "completed"
    assert not drive.is_idle()


def test_a_drive_is_idle_when_nothing_is_ready_or_performing(drive, hero, helpers):
    assert drive.is_idle()
    workflow = Plain.create(hero=hero)
    assert not drive.is_idle()
    workflow.pause()
    assert drive.is_idle()  # though a step of it is scheduled
    workflow.resume()
    gd._Attempt.claim(drive, scheduled(workflow).id)
    assert not drive.is_idle()
    workflow.cancel()
    assert drive.is_idle()
    StepExecution.update(state="completed", outcome="success", finished_at=START).execute()


# ==== Recurring workflows =============================================================================================


@pytest.fixture
def recurring():
    """Makes classes that recur: until the test ends, since each housekeeping looks at them."""
    made = []

    def make(name="Nightly", **declared):
        declared = {"recurs": crontab(minute="0", hour="3"), "may_proceed_without_hero": True, **declared}

        @step
        def report(self):
            did(f"{self.type} {self.occurs_at:%d %H:%M}")

        made.append(
            type(Workflow)(name, (Workflow,), {"report": report, "__qualname__": f"<locals>.{name}", **declared})
        )
        return made[-1]

    yield make
    for cls in made:
        cls.recurs = None


EVERY_MINUTE = {"recurs": crontab(), "recurrences_overlap": True}


def moments(cls):
    """When workflows of a class occur: the day of March, and the time."""
    query = cls.select().where(Workflow.occurs_at.is_null(False)).order_by(Workflow.occurs_at)
    return [f"{each.occurs_at:%d %H:%M}" for each in query]


def look(drive, moment):
    drive.clock.now = datetime.strptime(f"2026 3 {moment}+0000", "%Y %m %d %H:%M:%S%z")
    assert set(drive.housekeeping()) == {
        *("workflows_cleaned_up", "step_executions_cleaned_up"),
        *("stuck_in_progress_recovered", "stuck_scheduled_recovered"),
    }


def test_a_workflow_is_created_for_each_minute_that_matches(drive, clock, recurring):
    Nightly = recurring(step_options={"priority": 7})
    look(drive, "2 02:59:59")
    nothing_written(drive)
    for seconds in ("00", "30", "59"):
        look(drive, f"2 03:00:{seconds}")
    nightly = Nightly.select().get()
    assert (nightly.hero, nightly.state, nightly.allow_multiple, nightly.context) == (None, "ready", False, {})
    assert (nightly.occurs_at, nightly.created_at) == (START.replace(day=2, hour=3), START.replace(day=2, hour=3))
    assert scheduled(nightly).priority == 7
    look(drive, "2 03:02:00")
    work_off(drive)
    assert effects() == ["Nightly 02 03:00"]
    look(drive, "3 03:00:00")
    assert moments(Nightly) == ["02 03:00", "03 03:00"]
    assert Plain.create(hero=User.create()).occurs_at is None


def test_what_no_consumer_was_there_for_is_made_up_for_the_newest_alone(drive, clock, recurring):
    Nightly, Often = recurring(), recurring("Often", recurs=crontab(minute="*/2"))
    look(drive, "2 03:09:59")
    assert (moments(Nightly), moments(Often)) == (["02 03:00"], ["02 03:08"])
    Nightly.delete().execute()
    look(drive, "2 03:10:00")
    assert moments(Nightly) == []
    Nightly.recurrence_catch_up = timedelta(hours=20)
    look(drive, "3 22:59:59")
    assert moments(Nightly) == ["03 03:00"]
    Nightly.select().get().cancel()
    look(drive, "4 23:00:00")
    assert moments(Nightly) == ["03 03:00"]
    Nightly.recurrence_catch_up = 0  # one look is a minute behind the other
    look(drive, "5 03:01:59")
    assert moments(Nightly) == ["03 03:00", "05 03:00"]


def test_one_is_left_out_while_an_earlier_one_is_ongoing_and_made_up_for(drive, clock, recurring, caplog):
    Often = recurring(recurs=crontab(minute="*/5"))
    Often.create()  # does not count
    look(drive, "2 03:00:00")
    first = Often.select().where(Workflow.occurs_at.is_null(False)).get()
    first.pause()
    for seconds in ("00", "20", "59"):
        look(drive, f"2 03:05:{seconds}")
    assert moments(Often) == ["02 03:00"]
    assert caplog.text.count(f"Nightly of 2026-03-02 03:05:00+00:00 is left out, as <Nightly {first.id}: paused") == 1
    first.resume()
    work_off(drive)
    look(drive, "2 03:08:00")
    assert moments(Often) == ["02 03:00", "02 03:05"]
    look(drive, "2 03:12:00")
    assert moments(Often) == ["02 03:00", "02 03:05"]
    assert caplog.text.count("is left out") == 2
    Often.recurrences_overlap = True
    look(drive, "2 03:13:00")
    assert moments(Often) == ["02 03:00", "02 03:05", "02 03:10"]


def test_a_host_whose_clock_is_behind_creates_nothing_older(drive, clock, recurring):
    Often = recurring(**EVERY_MINUTE)
    look(drive, "2 03:01:10")
    look(drive, "2 03:00:40")
    assert moments(Often) == ["02 03:01"]
    look(drive, "2 03:02:10")
    assert moments(Often) == ["02 03:01", "02 03:02"]


def test_a_clock_that_was_wrong_by_hours_ends_no_recurrence(drive, clock, recurring):
    Hourly = recurring(recurs=crontab(minute="0"), recurrences_overlap=True)
    look(drive, "2 08:00:10")
    for hour in range(3, 10):
        look(drive, f"2 {hour:02}:00:10")
    assert moments(Hourly) == [f"02 {hour:02}:00" for hour in range(3, 10)]


def test_a_clock_that_was_wrong_by_years_ends_no_recurrence(drive, clock, recurring):
    Often = recurring(**EVERY_MINUTE)
    clock.forward(days=3000)
    drive.housekeeping()
    look(drive, "2 03:01:10")
    assert [f"{each.occurs_at:%Y-%m-%d}" for each in Often.select().order_by(Workflow.id)] == [
        "2034-05-18",
        "2026-03-02",
    ]


# A change of the clock: when, in which zone, whether it goes forward; and the moments of half past one and two.
CHANGES = {
    "Berlin, spring": (datetime(2026, 3, 29, 1), "Europe/Berlin", True, ["00:30", "01:30"]),
    "Berlin, autumn": (datetime(2026, 10, 25, 1), "Europe/Berlin", False, ["23:30", "00:30"]),
    "New York, spring": (datetime(2026, 3, 8, 7), "America/New_York", True, ["06:30", "07:30"]),
    "New York, autumn": (datetime(2026, 11, 1, 6), "America/New_York", False, ["05:30", "07:30"]),
}


@pytest.mark.parametrize("name", CHANGES)
@ELSEWHERE
def test_of_local_times_that_a_change_of_the_clock_skips_or_repeats_there_is_one(drive, clock, recurring, name):
    change, zone, is_forward, half_past = CHANGES[name]
    begin, end = change - timedelta(minutes=150), change + timedelta(minutes=150)
    how = {"recurrence_timezone": zone, "recurrences_overlap": True}
    patterns = {"Minutes": {}, "Quarters": {"minute": "*/15"}, "One": {"minute": 30, "hour": 1}}
    patterns["Two"] = {"minute": 30, "hour": 2}
    classes = {name: recurring(name, recurs=crontab(**pattern), **how) for name, pattern in patterns.items()}
    clock.now = begin.replace(tzinfo=timezone.utc)
    for _ in range((end - begin) // timedelta(minutes=1) + 1):
        drive._recurrence.look()
        clock.forward(minutes=1)
    found = {
        name: [each.occurs_at.replace(tzinfo=None) for each in cls.select().order_by(Workflow.occurs_at)]
        for name, cls in classes.items()
    }
    minutes = [begin + timedelta(minutes=number) for number in range(301)]
    if not is_forward:  # the hour that comes a second time
        minutes = [each for each in minutes if not change <= each < change + timedelta(hours=1)]
    assert found["Minutes"] == minutes
    assert found["Quarters"] == [each for each in minutes if each.minute % 15 == 0]
    assert [f"{each:%H:%M}" for each in found["One"] + found["Two"]] == half_past


def test_a_local_day_that_a_country_leaves_out_is_not_lost(drive, clock, recurring):
    Daily = recurring(recurs=crontab(minute="0", hour="12"), recurrence_timezone="Pacific/Apia")
    clock.now = datetime(2011, 12, 28, 12, tzinfo=timezone.utc)
    for _ in range(4 * 24):
        drive._recurrence.look()
        work_off(drive)
        clock.forward(hours=1)
    # There was no 30th of December. Its noon, and that of the 31st, are one moment.
    assert [f"{each.occurs_at:%d %H}" for each in Daily.select().order_by(Workflow.occurs_at)] == [
        "28 22",
        "29 22",
        "30 22",
        "31 22",
    ]


def test_recurs_is_read_at_each_look_and_inherited(drive, clock, recurring):
    Nightly = recurring()
    Special = type(Workflow)("Special", (Nightly,), {})
    try:
        look(drive, "2 03:00:00")
        assert (moments(Special), moments(Nightly)) == (["02 03:00"], ["02 03:00"] * 2)
        work_off(drive)
        Nightly.recurs, Special.recurs = crontab(minute="30"), None
        look(drive, "3 03:00:00")
        look(drive, "3 03:30:00")
        assert moments(Nightly) == ["02 03:00", "02 03:00", "03 03:30"]
    finally:
        Special.recurs = None


def test_a_class_that_cannot_be_looked_at_does_not_stop_the_others(drive, clock, recurring, caplog):
    def fails(moment):
        raise OddError(moment)

    recurring("Fails", recurs=fails)
    recurring("Nowhere", step_options={"queue": "nowhere"})
    recurring("Stepless", report=None)
    Nightly = recurring()
    look(drive, "2 03:00:00")
    assert {each.type for each in Workflow.select()} == {"Nightly"}
    assert moments(Nightly) == ["02 03:00"]
    assert re.findall(r"(\w+) recurs, and could not be looked at", caplog.text) == ["Fails", "Nowhere"]
    assert "asks for the queue 'nowhere'" in caplog.text


def test_each_consumer_looks_every_minute_whatever_the_schedule_of_housekeeping(db, drive, clock, recurring):
    outside = MemoryHuey("outside", results=False)
    drive = GenevaDrive(db, huey=outside, queues=["own"], clock=clock, housekeeping_schedule=lambda moment: False)
    Often = recurring(**EVERY_MINUTE)
    for huey in drive.queues.values():
        for task in huey.read_periodic(datetime(2026, 3, 1, 12, 7)):
            huey.enqueue(task)
        work_off(drive)
        clock.forward(minutes=1)
    assert moments(Often) == ["01 12:00", "01 12:01"]
    assert effects() == ["Nightly 01 12:00", "Nightly 01 12:01"]


def _look_in_rounds(number, url, rounds, barrier, results):
    db = open_database(url)
    drive, behind = GenevaDrive(db), 30 * (number % 2)
    for place in range(rounds):
        moment = START + timedelta(minutes=10 * place, seconds=10)
        drive.clock = lambda: moment - timedelta(seconds=behind)  # noqa: B023
        barrier.wait(timeout=60)
        drive.housekeeping()
        barrier.wait(timeout=60)
        if number == 0:
            for each in Workflow.ongoing():
                results.put((place, each.type, each.occurs_at))
                each.cancel()


def test_of_processes_that_look_at_the_same_second_one_creates(database, drive, recurring, caplog, is_exhaustive):
    rounds = 200 if is_exhaustive else 10
    recurring(recurs=crontab(minute="*/10"), recurrences_overlap=True, recurrence_catch_up=300)
    recurring("Minutes", recurs=crontab())
    database.peewee.close()
    results = in_processes(8, _look_in_rounds, database.url, rounds, fork.Barrier(8))
    nightly = sorted(moment for _, name, moment in results if name == "Nightly")
    assert nightly == [START + timedelta(minutes=10 * place) for place in range(rounds)]
    # Half of the clocks are behind, and show the minute before: of the two, which must not overlap, one came first.
    minutes = {place: moment for place, name, moment in results if name == "Minutes"}
    assert len(results) == 2 * rounds
    for place in range(rounds):
        assert START + timedelta(minutes=10 * place) - minutes[place] in (timedelta(0), timedelta(minutes=1))


@ELSEWHERE
def test_wherever_a_process_dies_in_a_look_the_workflow_is_there_once(db, drive, clock, recurring):
    Often, other = recurring(**EVERY_MINUTE), recurring("Other", **EVERY_MINUTE)
    for moment in itertools.count():
        clock.forward(minutes=1)
        if not dies_at(moment, db, drive._recurrence.look):
            break
        assert violations(drive) == []
        drive._recurrence.look()
    assert moment > 8
    assert moments(Often) == moments(other) == [f"01 12:{minute:02}" for minute in range(1, moment + 2)]


def _look_forever(number, url, offset, results):
    db = open_database(url)
    drive = GenevaDrive(db)
    drive.clock = lambda: START + timedelta(minutes=offset)
    while True:
        drive._recurrence.look()


def test_processes_that_are_killed_as_they_look_leave_one_workflow_for_each_class_and_moment(
    database, drive, clock, recurring, is_exhaustive
):
    classes = [recurring(f"Class{number}", **EVERY_MINUTE) for number in range(5)]
    rounds = 60 if is_exhaustive else 6
    for offset in range(rounds):
        database.peewee.close()
        processes = [
            fork.Process(target=_look_forever, args=(number, database.url, offset, None)) for number in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            time.sleep(0.01 * (offset % 6))  # none may have begun, or all
            process.kill()
        for process in processes:
            process.join()
        clock.now = START + timedelta(minutes=offset)
        drive._recurrence.look()
        assert violations(drive) == []
    for cls in classes:
        assert moments(cls) == [f"01 {12 + minute // 60}:{minute % 60:02}" for minute in range(rounds)]


@pytest.mark.parametrize("database", ["postgresql", "mysql"], indirect=True)  # on SQLite, there is one lock for all
def test_a_process_that_has_stopped_within_a_look_holds_up_no_other(database, drive, clock, recurring):
    Often, beside = recurring(**EVERY_MINUTE), open_database(database.url)
    with beside.atomic():
        beside.execute_sql("select version from geneva_drive_schema for update").fetchall()
        drive.housekeeping()
    assert moments(Often) == []
    beside.close()
    drive.housekeeping()
    assert moments(Often) == ["01 12:00"]


def test_threads_that_look_at_once_collide_in_silence_under_a_strict_isolation(strict, recurring, caplog):
    strict.clock = Clock()
    classes = [recurring(f"Class{number}", **EVERY_MINUTE) for number in range(3)]

    def look_on():
        for _ in range(20):
            barrier.wait(timeout=60)
            strict._recurrence.look()
            if not barrier.wait(timeout=60):
                strict.clock.forward(minutes=1)
        strict.database.close()

    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        for each in [threads.submit(look_on) for _ in range(4)]:
            each.result(timeout=120)
    for cls in classes:
        assert moments(cls) == [f"01 12:{minute:02}" for minute in range(20)]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_look_within_a_transaction_of_the_callers_is_a_part_of_it(db, drive, clock, recurring):
    Often = recurring(**EVERY_MINUTE)
    with db.atomic() as transaction:
        assert Often.select().count() == 0
        drive.housekeeping()
        drive.housekeeping()
        assert moments(Often) == ["01 12:00"]
        transaction.rollback()
    nothing_written(drive)
    drive.housekeeping()
    work_off(drive)
    assert effects() == ["Nightly 01 12:00"]


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ({"recurs": "0 3 * * *"}, r"recurs must be None or a Huey crontab, such as crontab\(.*\), not '0 3 \* \* \*'"),
        ({"may_proceed_without_hero": False}, r"recurs: what recurs has no hero: set may_proceed_without_hero = True"),
        ({"recurrence_timezone": "Europe/Atlantis"}, r"recurrence_timezone must .*, not 'Europe/Atlantis': .*tzdata"),
        ({"recurrence_timezone": None}, r"recurrence_timezone must be the name of a time zone, not None"),
        ({"recurrence_timezone": "../etc"}, r"recurrence_timezone must be the name of a time zone, not '../etc'"),
        ({"recurrence_timezone": "Europe"}, r"recurrence_timezone must be the name of a time zone, not 'Europe'"),
        ({"recurrence_catch_up": "1 h"}, r"recurrence_catch_up must be a timedelta or a number of seconds, not '1 h'"),
        ({"recurrence_catch_up": None}, r"recurrence_catch_up must be a timedelta or a number of seconds, not None"),
        ({"recurrences_overlap": 1}, r"recurrences_overlap must be a bool, not 1"),
        ({"delete_completed_after": "never"}, r"delete_completed_after must be a timedelta .*, not 'never'"),
        ({"delete_completed_after": -1}, r"delete_completed_after must be neither negative nor .*, not -1"),
        ({"occurs_at": None}, r"occurs_at: workflows share one table"),
    ],
)
def test_what_is_wrong_about_recurrence_or_retention_raises_when_the_class_is_defined(recurring, declared, text):
    with pytest.raises(gd.StepConfigurationError, match=rf"^Nightly(: |\.){text}"):
        recurring(**declared)
    assert Workflow.recurs is None


def test_a_recurrence_must_not_be_async(recurring):
    async def recurs(moment):
        return True

    with pytest.raises(gd.StepConfigurationError, match=r"^Nightly: recurs must not be async"):
        recurring(recurs=recurs)


def test_utc_needs_no_database_of_time_zones(drive, clock, recurring, monkeypatch):
    def unknown(name):
        raise gd.zoneinfo.ZoneInfoNotFoundError(name)

    monkeypatch.setattr(gd.zoneinfo, "ZoneInfo", unknown)
    Nightly = recurring()
    look(drive, "2 03:00:00")
    assert moments(Nightly) == ["02 03:00"]
    with pytest.raises(gd.StepConfigurationError, match="where the system knows none, pip install tzdata"):
        recurring(recurrence_timezone="Europe/Berlin")


# ==== Retention of a class ============================================================================================


def canceled_ago(cls, days):
    """A workflow of a class that was canceled so many days ago."""
    workflow = cls.create(hero=User.create())
    workflow.cancel()
    workflow._write(transitioned_at=START - timedelta(days=days))
    return workflow


def test_a_class_may_say_for_how_long_its_workflows_are_kept(drive, clock):
    class Short(Plain):
        delete_completed_after = timedelta(days=1)

    class Seconds(Short):
        delete_completed_after = 3 * 86400

    class Kept(Plain):
        delete_completed_after = None

    class Gone(Plain):
        delete_completed_after = 0

    expired, kept = [], []
    for cls, days in ((Short, 1), (Seconds, 3), (Plain, 30), (Kept, math.inf), (Gone, 30)):
        for age in (0.5, 2, 4, 29, 31, 3000):
            (expired if age > days else kept).append(canceled_ago(cls, age).id)
    del gd._workflow_classes["Gone"]  # a type that no class defines here has the drive's
    assert drive.housekeeping()["workflows_cleaned_up"] == len(expired)
    assert [each.id for each in Workflow.select().order_by(Workflow.id)] == kept
    drive.delete_completed_workflows_after = None
    clock.forward(days=9999)
    assert drive.housekeeping()["workflows_cleaned_up"] == 3
    assert {each.type for each in Workflow.select()} == {"Plain", "Kept", "Gone"}


def test_an_occurrence_is_kept_for_twice_the_catch_up(drive, clock, recurring):
    Nightly = recurring(delete_completed_after=0, recurrence_catch_up=timedelta(hours=2))
    look(drive, "2 03:00:00")
    work_off(drive)
    for moment in ("2 03:01:00", "2 04:59:00", "2 06:59:59"):
        look(drive, moment)
        assert moments(Nightly) == ["02 03:00"]
    look(drive, "2 07:00:01")
    assert moments(Nightly) == []
    assert effects() == ["Nightly 02 03:00"]


# ==== Many rows: what the planners make of the statements =============================================================


def plan(db, sql, params):
    """How the database would go about a statement, a line for each part."""
    if isinstance(db, peewee.SqliteDatabase):
        return [row[3] for row in db.execute_sql(f"explain query plan {sql}", params)]
    sql = re.sub("^set statement .+ for (?=update )", "", sql)  # MariaDB's, for the time of the statement
    cursor = db.execute_sql(f"explain {sql}", params)
    if isinstance(db, peewee.PostgresqlDatabase):
        return [row[0] for row in cursor]
    names = [column[0] for column in cursor.description]
    return [str(dict(zip(names, row))) for row in cursor]


#: How a plan tells that it reads a whole table. Not meant are partial indexes, which hold what a statement is about,
#: what is inserted, and the signals, of which there are few here.
SCANS = {
    "sqlite": r"SCAN (?!\d* ?CONSTANT|\d+-ROW VALUES|(t1|e) USING (COVERING )?INDEX geneva_drive_(silent|over))",
    "postgresql": r"Seq Scan on (?!geneva_drive_signals)",
    "mysql": r"'table': '\w+', 'type': '(ALL|index)', (?!.*'rows': None)",
}
SORTS = {"sqlite": r"TEMP B-TREE FOR (ORDER|LAST)", "postgresql": r"(^|-> +)Sort ", "mysql": r"filesort"}


class Many(Workflow):
    @step(wait=timedelta(days=30))
    def far_away(self):
        pass

    @step(wait_for="answer", timeout=timedelta(days=30))
    def asked(self):
        pass


class Asking(Workflow):
    @step(wait_for="answer", timeout=timedelta(days=30))
    def asks(self):
        pass


class Pressing(Workflow):
    step_options = {"priority": 5}

    @step(wait=timedelta(days=30))
    def one(self):
        pass


class Resting(Workflow):
    @step
    def one(self):
        pass


class Occurring(Workflow):
    may_proceed_without_hero = True
    delete_completed_after = None

    @step
    def one(self):
        pass


@pytest.fixture
def crowd_size(is_exhaustive):
    """How many others there are of each kind."""
    return 20_000 if is_exhaustive else 7000


@contextlib.contextmanager
def crowd(servers, kind, monkeypatch, size=0):
    """A drive on a database that a test has for itself, and what fills its tables, of which there are no statistics."""
    monkeypatch.setattr(gd._Postgresql, "execute", gd._Dialect.execute)  # the hooks see what is sent, as it is planned
    monkeypatch.setattr(gd, "_heartbeat", silent_heartbeat())
    db = open_database(servers.empty(kind))
    with driven(db) as drive:
        drive.clock = Clock()
        if kind == "postgresql":
            for model in gd.MODELS:
                db.execute_sql(f"alter table {model._meta.table_name} set (autovacuum_enabled = off)")

        def fill():
            with db.atomic():
                for batch in peewee.chunked([{"name": "one of many"}] * size, 1000):
                    User.insert_many(batch).execute()
            heroes = list(User.select().order_by(User.id.desc()).limit(size))
            for cls, number in ((Many, size), (Pressing, size), (Resting, size), (Asking, 3000)):
                assert cls.create_many(heroes[:number]) == number
            resting = Workflow.type == "Resting"
            ids = Workflow.select(Workflow.id).where(resting)
            StepExecution.update(queue=None).where(StepExecution.workflow.in_(ids)).execute()
            Workflow.update(state="paused", transitioned_at=START).where(resting).execute()
            if kind == "postgresql":  # what these changes leave behind is passed over by the next look, and gone
                db.execute_sql("vacuum")
            return heroes

        yield drive, fill
    monkeypatch.undo()


def analyze(db, kind):
    verb = {"sqlite": "analyze", "postgresql": "analyze", "mysql": "analyze table"}[kind]
    for model in (*gd.MODELS, User):
        cursor = db.execute_sql(f"{verb} {model._meta.table_name}")
        assert kind != "mysql" or cursor.fetchall()


@contextlib.contextmanager
def statements_sent(db):
    """The statements on the engine's tables, with the parameters with which each was sent first."""
    sent = {}

    def hook(event):
        if re.search(r"geneva_drive_(workflows|step|signals)", event.sql):
            sent.setdefault(event.sql, event.params)

    db.query_hooks.append(hook)
    try:
        yield sent
    finally:
        db.query_hooks.remove(hook)


@contextlib.contextmanager
def instructions(db, unit=1):
    """A list that grows by an item for each so many instructions that SQLite executes in the block."""
    ticks = []
    db.connection().set_progress_handler(lambda: ticks.append(1), unit)
    try:
        yield ticks
    finally:
        db.connection().set_progress_handler(None, unit)


def effort(db, kind, sql, params):
    """How much a database reads for a statement, in units of its own; the statement is rolled back."""
    with db.atomic() as transaction:
        if kind == "postgresql":  # pages; what is prepared may be planned for these parameters, or for any
            read, numbers = 0, (f"${number}" for number in itertools.count(1))
            db.execute_sql(f"prepare probe as {re.sub('%s', lambda _: next(numbers), sql)}")
            for mode in ("force_custom_plan", "force_generic_plan"):
                db.execute_sql(f"set local plan_cache_mode = {mode}")
                blanks = f"({', '.join(['%s'] * len(params))})" if params else ""
                explain = f"explain (analyze, buffers, format json) execute probe {blanks}"
                with db.atomic() as savepoint:
                    ((found,),) = db.execute_sql(explain, params).fetchall()
                    savepoint.rollback()
                read = max(read, found[0]["Plan"]["Shared Hit Blocks"] + found[0]["Plan"]["Shared Read Blocks"])
            db.execute_sql("deallocate probe")
        elif kind == "mysql":  # rows
            count = "show session status like %s"
            before = db.execute_sql(count, ["Handler_read%"]).fetchall()
            db.execute_sql(sql, params).fetchall()
            after = db.execute_sql(count, ["Handler_read%"]).fetchall()
            read = sum(int(number) for _, number in after) - sum(int(number) for _, number in before)
        else:  # instructions
            with instructions(db) as ticks:
                db.execute_sql(sql, params).fetchall()
            read = len(ticks)
        transaction.rollback()
    return read


@pytest.mark.parametrize("kind", SERVERS)
@ELSEWHERE
def test_what_waits_and_what_is_paused_costs_those_nothing_who_look_for_what_is_due(
    servers, kind, monkeypatch, crowd_size
):
    with crowd(servers, kind, monkeypatch, crowd_size) as (drive, fill):
        db, storage = drive._access.database, drive.huey.storage

        def costs():
            """What is read by those who look for what is due, take it and end it; by statement."""
            found = Counter()

            def measure(work):
                with statements_sent(db) as sent:
                    result = work()
                for sql, params in sent.items():
                    if not sql.lower().startswith("insert"):
                        found[sql] = max(found[sql], effort(db, kind, sql, params))
                return result

            for priority in (None, 5):  # a second one of each is there when it is measured what it took to take one
                Plain.create(hero=User.create(), options=priority and {"priority": priority})
            Quick.create(hero=User.create(), options={"priority": 5})
            storage._asked = -math.inf
            assert measure(storage.priorities) == (5, 0)
            assert measure(lambda: [*drive._recovery._places()]) == [("default", 0), ("default", 5)]
            for priority in (5, 5, None):
                task = measure(drive.huey.dequeue)
                assert task.priority == priority
                measure(lambda: drive.huey.execute(task))  # noqa: B023
            work_off(drive)
            assert measure(drive.huey.dequeue) is None
            assert measure(storage.first_due) > drive.clock()
            assert not measure(drive.is_idle)
            return found

        Many.create(hero=User.create())  # the drive is never idle
        Pressing.create(hero=User.create())
        few = costs()
        fill()
        for is_analyzed in (False, True):
            if is_analyzed:
                analyze(db, kind)
            many = costs()
            assert len(many.keys() & few.keys()) > 8
            too_much = {sql: (few[sql], cost) for sql, cost in many.items() if cost > 3 * few[sql] + 60}
            assert not too_much


@pytest.mark.parametrize("kind", SERVERS)
@ELSEWHERE
def test_no_statement_reads_or_sorts_a_large_table(servers, kind, monkeypatch, crowd_size):
    with crowd(servers, kind, monkeypatch, crowd_size) as (drive, fill):
        db, heroes = drive._access.database, fill()
        for cls, number in ((Plain, 6000), (Quick, 3000)):
            assert cls.create_many(heroes[:number]) == number
        over = [each.id for each in Plain.select(Workflow.id).order_by(Workflow.id.desc()).limit(3000)]
        ended = {"state": "canceled", "outcome": "canceled", "finished_at": START, "queue": None}  # kept for a while
        StepExecution.update(ended).where(StepExecution.workflow.in_(over)).execute()
        ended = {"state": "canceled", "current_step_name": None, "transitioned_at": START}
        Workflow.update(ended).where(Workflow.id.in_(over)).execute()
        analyze(db, kind)
        with statements_sent(db) as sent:
            for run_on in (0, 1):
                drive.run_on = run_on
                for _ in range(3):
                    drive.huey.execute(drive.huey.dequeue())
            with (
                monkeypatch.context() as patch
            ):  # as a worker does it, which may claim one workflow's along with another's
                patch.setattr(gd._heartbeat, "workers", {threading.get_ident()})
                drive.huey.execute(drive.huey.dequeue())
            newcomer = User.create()
            for cls in (Quick, Many, Asking):
                workflow = cls.create(hero=newcomer)
                with pytest.raises(gd.AlreadyOngoingError):
                    cls.create(hero=newcomer)
                assert cls.get_or_create(hero=newcomer) == (workflow, False)
                workflow.pause()
                workflow.resume()
            assert Asking.signal_hero(newcomer, "answer")
            workflow.cancel()
            assert Quick.create_many(heroes[3000:3500]) == 500
            assert Quick.create_many(heroes[2900:3600], on_conflict="ignore") == 100
            assert drive.huey.storage.first_due() == START
            monkeypatch.setattr(Occurring, "recurs", crontab())
            for _ in range(2):
                assert set(drive.housekeeping().values()) == {0}
                drive.clock.forward(minutes=1)
            monkeypatch.setattr(drive._recovery, "_progress", lambda *_: START)
            assert drive._recovery._recover_overdue("default", 0) == 0  # as for a queue of the application's
            assert not drive.is_idle()
        assert Occurring.select().count() == 1
        assert len(sent) > 30
        if kind == "postgresql":
            assert any("ended as (" in sql and "taken as (" in sql for sql in sent)
        for sql, params in sent.items():
            lines = plan(db, sql, params)
            # Sorted may be: one hero's workflows, the processes at work.
            waste = [SCANS, SORTS][: 1 if re.search(r".hero_id. = |DISTINCT", sql) else 2]
            wasteful = [line for of_kind in waste for line in lines if re.search(of_kind[kind], line)]
            assert not wasteful, f"{sql[:200]} … {sql[-1000:]}: {lines}"


@pytest.mark.parametrize("kind", ["sqlite", "mysql"])  # of a table of a hundred rows, PostgreSQL may well read all
def test_a_look_into_the_queue_reads_no_other_workflows_though_most_of_them_are_due(servers, kind, monkeypatch):
    with crowd(servers, kind, monkeypatch) as (drive, _):
        db, drive.run_on = drive._access.database, 0
        Quick.create_many([User.create() for _ in range(100)])
        for _ in range(4):
            for _ in range(30):
                drive.huey.execute(drive.huey.dequeue())
            analyze(db, kind)
            with statements_sent(db) as sent:
                drive.huey.execute(drive.huey.dequeue())
            of_queue = [str(plan(db, *each)) for each in sent.items() if "OFFSET" in each[0]]
            assert of_queue
            assert not [lines for lines in of_queue if re.search(f"{SCANS[kind]}|{SORTS[kind]}", lines)]


@pytest.mark.parametrize("kind", SERVERS)
def test_what_a_class_keeps_costs_nothing_to_those_who_delete_or_look_for_what_recurs(servers, kind, monkeypatch):
    with crowd(servers, kind, monkeypatch) as (drive, _):
        db, long_ago = drive._access.database, START - timedelta(days=99)
        ended = {"state": "finished", "current_step_name": None, "transitioned_at": long_ago}
        monkeypatch.setattr(Occurring, "recurs", crontab())

        def costs():
            drive.clock.forward(minutes=1)
            with statements_sent(db) as sent:
                assert drive.housekeeping()["workflows_cleaned_up"] == 0
            Occurring.ongoing().get().cancel()
            return {sql: effort(db, kind, sql, params) for sql, params in sent.items() if "insert" not in sql.lower()}

        canceled_ago(Plain, 1)
        few = costs()
        with db.atomic():
            for batch in peewee.chunked([START - timedelta(minutes=number) for number in range(20_000)], 1000):
                rows = [{**gd._Start(Occurring, None).values(None, None), **ended, "occurs_at": each} for each in batch]
                Workflow._insert_rows(rows, lambda model, new: model.insert(new))
        for is_analyzed in (False, True):
            if is_analyzed:
                analyze(db, kind)
            many = costs()
            assert len(many.keys() & few.keys()) > 6
            assert not {sql: (few.get(sql), cost) for sql, cost in many.items() if cost > 3 * few.get(sql, 20) + 60}
        for model in reversed(gd.MODELS):
            model.delete().execute()


@pytest.mark.parametrize("database", ["mysql"], indirect=True)  # where what is read is locked
@pytest.mark.parametrize("has_had_children", [False, True])
def test_deletion_locks_what_it_deletes_and_no_others(db, drive, clock, has_had_children):
    heroes = [User(id=number) for number in range(1, 4001)]
    Many.create_many(heroes)
    Plain.create_many(heroes[:300])
    ended = {"state": "canceled", "outcome": "canceled", "finished_at": START, "queue": None}
    StepExecution.update(ended).where(StepExecution.workflow.in_(Plain.select(Workflow.id))).execute()
    ended = {"state": "canceled", "current_step_name": None, "transitioned_at": START - timedelta(days=31)}
    ended["ongoing_children"] = 0 if has_had_children else None
    Workflow.update(ended).where(Workflow.type == "Plain").execute()
    analyze(db, "mysql")
    with statements_sent(db) as sent:
        assert drive.housekeeping()["workflows_cleaned_up"] == 300
    assert len([sql for sql in sent if "`parent_id` IN" in sql]) == has_had_children
    read = {sql: effort(db, "mysql", sql, params) for sql, params in sent.items()}
    assert max(read.values()) < 1500, read


@pytest.mark.parametrize("kind", SERVERS)
@ELSEWHERE
def test_no_statement_about_children_reads_or_sorts_a_large_table(servers, kind, monkeypatch, crowd_size):
    with crowd(servers, kind, monkeypatch, crowd_size) as (drive, fill):
        db, heroes = drive._access.database, fill()
        parent = Household.create(hero=User.create())
        assert Plain.create_many(heroes[:3000], parent=parent) == 3000
        scheduled(parent).execute()
        over = [each.id for each in Plain.select(Workflow.id).order_by(Workflow.id).limit(2997)]
        ended = {"state": "canceled", "outcome": "canceled", "finished_at": START, "queue": None}
        StepExecution.update(ended).where(StepExecution.workflow.in_(over)).execute()
        ended = {"state": "canceled", "current_step_name": None, "transitioned_at": START}
        Workflow.update(ended).where(Workflow.id.in_(over)).execute()
        parent._write(ongoing_children=3)
        analyze(db, kind)
        with statements_sent(db) as sent:
            (child,) = chores(parent)
            child.cancel()
            assert Plain.create_many(heroes[3000:3100], "ignore", parent=parent) == 100
            assert parent.children.where(Workflow.state == "canceled").count() == 2998
            drive.housekeeping()
            other = Household.create(hero=User.create(), parent=parent)
            (child,) = chores(other)
            finish(other)
            child.delete_instance()
            drive.housekeeping()
            parent.cancel(children=True)
            parent._write(transitioned_at=START - timedelta(days=31))
            assert drive.housekeeping()["workflows_cleaned_up"] == 1
        assert Workflow.select().where(Workflow.parent.is_null(False)).count() == 0
        assert len(sent) > 30
        for sql, params in sent.items():
            lines = plan(db, sql, params)
            # Sorted may be: one parent's children, one workflow's executions, the one that is over of its type, the
            # processes at work.
            few = r".parent_id. (= |IN)|.workflow_id. = |.transitioned_at. <|DISTINCT"
            waste = [SCANS, SORTS][: 1 if re.search(few, sql) else 2]
            wasteful = [line for of_kind in waste for line in lines if re.search(of_kind[kind], line)]
            assert not wasteful, f"{sql[:200]} … {sql[-1000:]}: {lines}"


@pytest.mark.parametrize("kind", SERVERS)
@ELSEWHERE
def test_the_few_that_are_paused_are_found_among_many_without_reading_those(servers, kind, monkeypatch, crowd_size):
    with crowd(servers, kind, monkeypatch, crowd_size) as (drive, fill):
        db, heroes = drive._access.database, fill()
        few = [each.id for each in Resting.select(Workflow.id).order_by(Workflow.id).limit(100)]
        others = (Workflow.type == "Resting") & (Workflow.id > few[-1])
        over = {"state": "canceled", "current_step_name": None, "transitioned_at": START}
        Workflow.update(over).where(others).execute()

        def selected(**options):
            query = gd._CommandLine(drive, argparse.Namespace(**options), "")._selected
            query = query.where(Workflow.id == options["id"]) if "id" in options else query
            return query.order_by(Workflow.id.desc()).limit(50)

        analyze(db, kind)
        of_few = [{"hero": f"User:{heroes[0].id}"}, {"waiting_for": "nothing", "id": few[0]}]
        of_few += [{"state": "paused", "error": "odd"}, {"state": "paused"}]
        for options in of_few[: 2 if kind == "mysql" else 4]:  # MariaDB expects to find 50 of 100 soon, by the id
            assert effort(db, kind, *selected(**options).sql()) < 3000, options
        with statements_sent(db) as sent:
            assert [each.ids for each in drive.paused_groups()] == [few[::-1]]
        assert max(effort(db, kind, sql, params) for sql, params in sent.items()) < 3000
        for model in reversed(gd.MODELS):
            model.delete().execute()


# ==== Consumers: real processes =======================================================================================

APP = """
import atexit, logging, multiprocessing, os, signal, sys, time

if "APP_EXIT" in os.environ:
    atexit.register(lambda: (note(f"{os.getpid()} exits"), time.sleep(float(os.environ["APP_EXIT"]))))

from datetime import datetime, timedelta, timezone
from huey import MemoryHuey, PriorityRedisHuey
from peewee import CharField, Model
from playhouse.db_url import connect
import geneva_drive
from geneva_drive import GenevaDrive, Workflow, removed_step, step

logging.basicConfig(level=logging.INFO)
env = os.environ
url = env["APP_URL"]
is_sqlite = url.startswith("sqlite")
options = {"pragmas": {"journal_mode": "wal"}, "timeout": float(env.get("APP_TIMEOUT", 20))} if is_sqlite else {}
db = connect(url, **options)
outside = None
if "APP_REDIS" in env:
    outside = PriorityRedisHuey("app", url=env["APP_REDIS"], results=False)
if "APP_MEMORY" in env:
    outside = MemoryHuey("app", results=False)
drive = GenevaDrive(db, huey=outside, queues=["premium"])
drive.stuck_in_progress_threshold = float(env.get("APP_THRESHOLD", 120))
drive.stuck_scheduled_threshold = float(env.get("APP_OVERDUE", 60))
drive.clock = lambda: datetime.now(timezone.utc) + timedelta(seconds=float(env.get("APP_CLOCK", 0)))
if "APP_PATIENCE" in env:  # in place of ten seconds with the database, and of five to exit in
    geneva_drive.PATIENCE_SECONDS = float(env["APP_PATIENCE"])
    geneva_drive.EXIT_TIME = timedelta(seconds=float(env["APP_PATIENCE"]))
huey = drive.huey

class Customer(Model):
    name = CharField()
    class Meta:
        database = db
        table_name = "app_customers"

class Trace(Model):
    what = CharField()
    class Meta:
        database = db
        table_name = "app_traces"

def trace(what):
    Trace.create(what=what)

def note(what):
    # Not in the database, which may be down.
    with open("notes", "a") as notes:
        notes.write(what + "\\n")

def wait_for_gate():
    while not os.path.exists(env["APP_GATE"]):
        time.sleep(0.02)

class Welcome(Workflow):
    @step
    def one(self):
        trace(f"one {self.hero.name}")

    @step(wait=0.3)
    def two(self):
        trace("two")

    @step
    def three(self):
        trace(f"three {os.getpid()}")

class Slow(Workflow):
    @step
    def one(self):
        trace("one begins")
        wait_for_gate()
        trace("one ends")

    @step
    def two(self):
        trace("two")

class Aloof(Workflow):
    @step
    def one(self):
        note(f"{self.id} begins")
        wait_for_gate()
        note(f"{self.id} ends")

    @step
    def two(self):
        note(f"{self.id} two")

class Booked(Workflow):
    @step(transactional=True)
    def one(self):
        note(f"{self.id} begins")
        trace(f"{self.id} booked")
        wait_for_gate()
        note(f"{self.id} ends")

class Later(Workflow):
    @step(wait=2)
    def one(self):
        note(f"{self.id} one")

class Tour(Workflow):
    def book(self):
        trace(f"{self.id} {self.current_step_name}")

    one = step("book", transactional=True)
    gone = step("book", wait=1, transactional=True)
    old_name = step("book", wait=1, transactional=True)
    last = step("book", transactional=True)

class Round(Workflow):
    @step(resumable=True)
    def one(self):
        for place in self.resume_over(Trace.select().where(Trace.what == "place"), key=Trace.id.desc(), every=10):
            note(f"{place.id}")
            if place.id == int(env.get("APP_BARRED", 0)):
                wait_for_gate()

    @step
    def two(self):
        note("two")

class Forks(Workflow):
    @step
    def one(self):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        note(f"fork {os.WTERMSIG(os.waitpid(child, 0)[1])}")

    @step
    def two(self):
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join()
        with fork.Pool(2) as pool:
            note(f"process {-child.exitcode} pool {pool.map(abs, [-1, -2])}")

kinds = {kind.__name__: kind for kind in (Welcome, Slow, Aloof, Booked, Later, Tour, Round, Forks)}

if __name__ == "__main__":
    command = sys.argv[1]
    if command == "setup":
        db.create_tables([Customer, Trace])
        drive.create_tables()
    elif command == "create":
        options = {"queue": sys.argv[3]} if sys.argv[3:] else None
        print(kinds[sys.argv[2]].create(hero=Customer.create(name="Ada"), options=options).id)
    elif command == "create_another":  # of another kind, for a customer that is there: one transaction, the library's
        print(kinds[sys.argv[2]].create(hero=Customer.select().order_by(Customer.id).first()).id)
    elif command == "create_many":
        with db.atomic():
            kinds[sys.argv[2]].create_many([Customer.create(name="Ada") for _ in range(int(sys.argv[3]))])
    elif command == "create_on_and_on":
        while True:
            kinds[sys.argv[2]].create(hero=Customer.create(name="Ada"))
            time.sleep(0.15)
    elif command == "housekeeping":
        drive.housekeeping()
    elif command == "lose":  # what a worker takes, and dies before it begins
        print(len([huey.dequeue() for _ in range(5)]), flush=True)
        os.kill(os.getpid(), 9)
    elif command == "run_until_idle":
        drive.run(until=drive.is_idle)
    elif command == "run":
        drive.run(workers=2, shutdown_timeout=float(sys.argv[2]) if sys.argv[2:] else None)
"""

HEALING = {"APP_THRESHOLD": "3", "APP_OVERDUE": "1"}  # finds in seconds what the defaults find in minutes


# A Python that has imported what every application does, and forks a process for each request: to start one new Python
# after the other would take longer than all that the tests are about. With a request come a socket, the output and the
# errors. Over the socket go what to run, where and with what environment; and back the process's id, its stops and its
# end, which a process for each request waits for: this one stays without threads, since it forks.
NURSERY = """
import contextlib, importlib, json, os, runpy, signal, socket, sys, time, warnings

for name in ("geneva_drive", "huey.consumer", "huey.consumer_options", "psycopg2", "pymysql", "redis"):
    with contextlib.suppress(ImportError):  # a test that needs it says so
        importlib.import_module(name)

def next_request():
    while fds := socket.recv_fds(requests, 1, 3)[1]:
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return socket.socket(fileno=fds[0]), *fds[1:]
        for fd in fds:
            os.close(fd)
    os._exit(0)  # whom they are for is gone

def wait_for(child):
    status = None
    while status is None or os.WIFSTOPPED(status):
        _, status = os.waitpid(child, os.WUNTRACED)
        line = "stopped" if os.WIFSTOPPED(status) else str(os.waitstatus_to_exitcode(status))
        own.sendall(line.encode() + b"\\n")
    os._exit(0)

requests = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries those who wait
own, output, errors = next_request()
requests.close()
what = json.loads(own.makefile().readline())
if child := os.fork():
    os.close(output)
    os.close(errors)
    wait_for(child)
os.setsid()
own.sendall(f"{os.getpid()}\\n".encode())
own.close()
for fd, inherited in ((output, 1), (errors, 2)):
    os.dup2(fd, inherited)
    os.close(fd)
os.environ.clear()
os.environ.update(what["env"])
time.tzset()
os.chdir(what["cwd"])
sys.argv, sys.path[0] = what["arguments"], what["cwd"]
if sys.argv[:2] == ["-W", "error"]:
    del sys.argv[:2]
    warnings.simplefilter("error")
if sys.argv[0] == "-m":
    sys.argv.pop(0)
    runpy._run_module_as_main(sys.argv[0])
elif sys.argv[0] == "-c":
    exec(sys.argv.pop(1))
else:
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    __file__ = sys.argv[0]
    with open(__file__) as script:
        code = compile(script.read(), os.path.abspath(__file__), "exec")
    exec(code)
"""


class Nursery:
    """A running nursery, which ends with this process."""

    def __init__(self):
        self.requests, there = socket.socketpair()
        with there:
            how = {"pass_fds": [there.fileno()], "start_new_session": True, "env": FULL}
            self.process = python("-c", NURSERY, there.fileno(), **how)

    def close(self):
        self.requests.close()
        self.process.wait()


nursery = functools.cache(Nursery)


@pytest.fixture(scope="session", autouse=True)
def end_of_the_nursery():
    yield
    if nursery.cache_info().currsize:
        nursery().close()


class Process:
    """A process of the nursery, in a session of its own: a consumer that is killed leaves its worker processes."""

    def __init__(self, *arguments, output, errors, cwd, env):
        self.returncode, self._said = None, b""
        self._own, there = socket.socketpair()
        with there:
            socket.send_fds(nursery().requests, [b"."], [there.fileno(), output.fileno(), errors.fileno()])
        what = {"arguments": [*map(str, arguments)], "cwd": str(cwd), "env": {**os.environ, **env}}
        self._own.sendall(json.dumps(what).encode() + b"\n")
        self.pid = int(self._line(60))

    def _line(self, timeout):
        self._own.settimeout(timeout)
        while b"\n" not in self._said:
            said = self._own.recv(1024)
            assert said, "the nursery is gone"
            self._said += said
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def wait(self, timeout=60):
        while self.returncode is None:
            if (line := self._line(timeout)) != "stopped":
                self.returncode = int(line)
                self._own.close()
        return self.returncode

    def wait_until_stopped(self):
        assert self._line(60) == "stopped"

    def poll(self):
        with contextlib.suppress(BlockingIOError):
            self.wait(timeout=0)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def completed(*arguments, cwd, env=None):
    """Run a process of the nursery to its end; returns the exit code, the output and the errors."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        status, texts = Process(*arguments, output=output, errors=errors, cwd=cwd, env=env or {}).wait(), []
        for each in (output, errors):
            each.seek(0)
            texts.append(each.read())
        return status, *texts


class App:
    """An application in a folder of its own, driven through real processes."""

    def __init__(self, folder, url, redis=None, source=APP):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "app.py").write_text(source)
        self.gate = folder / "gate"
        self.env = {"APP_URL": url, "APP_GATE": str(self.gate), **({"APP_REDIS": redis} if redis else {})}
        self.processes = []
        self.db = open_database(url)
        self.run("setup")
        for model in gd.MODELS:
            model.bind(self.db)

    def start(self, *arguments, **env):
        """A process that logs to log0, log1, … in the order of their starts."""
        with (self.folder / f"log{len(self.processes)}").open("w") as log:
            process = Process(*arguments, output=log, errors=log, cwd=self.folder, env={**self.env, **env})
        self.processes.append(process)
        return process

    def run(self, *arguments, **env):
        status, output, errors = completed("app.py", *arguments, cwd=self.folder, env={**self.env, **env})
        assert status == 0, errors
        return output.strip()

    def consumer(self, *options, queue="huey", **env):
        quick = ("-d", "0.02", "-m", "0.1", *options)
        return self.start("-m", "huey.bin.huey_consumer", f"app.{queue}", *quick, **env)

    def create(self, *arguments, **env):
        return int(self.run("create", *arguments, **env))

    def state(self, workflow_id):
        return Workflow.get_by_id(workflow_id).state

    def traces(self):
        return [row[0] for row in self.db.execute_sql("select what from app_traces order by id").fetchall()]

    def notes(self):
        """What bodies have told without the database."""
        return (self.folder / "notes").read_text().split("\n")[:-1] if (self.folder / "notes").exists() else []

    def log(self, number=0):
        return (self.folder / f"log{number}").read_text()

    def are_over(self, **env):
        """Whether all workflows are finished; what was lost on the way is looked for first."""
        self.run("housekeeping", **HEALING, **env)
        return not Workflow.select().where(Workflow.state != "finished").exists()

    def doctor(self):
        return GenevaDrive(self.db).doctor()

    def close(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.db.close()
        for log in sorted(self.folder.glob("log*")):
            print(f"---- {log.name}\n{log.read_text(errors='replace')}")  # shown where the test failed


@pytest.fixture(params=SERVERS)
def app(request, servers, tmp_path):
    app = App(tmp_path, servers.empty(request.param))
    yield app
    app.close()


@pytest.mark.parametrize(("app", "kind"), list(zip(SERVERS, ("thread", "process", "thread"))), indirect=["app"])
def test_a_script_run_as_main_and_a_consumer_that_imports_it_share_their_workflows(app, kind):
    workflow = app.create("Welcome")
    consumer = app.consumer("-w", "2", "-k", kind)
    until(lambda: app.state(workflow) == "finished")
    assert app.traces()[:2] == ["one Ada", "two"]
    later = app.create("Welcome")
    until(lambda: app.state(later) == "finished")
    assert len(app.traces()) == 6
    consumer.send_signal(signal.SIGINT)
    assert consumer.wait(timeout=30) == 0


def test_with_the_logging_that_the_manual_advises_a_huey_consumer_prints_each_line_once(servers, tmp_path):
    basic = "logging.basicConfig(level=logging.INFO)\n"
    advised = APP.replace(basic, f'{basic}logging.getLogger("huey").propagate = False\n')
    app = App(tmp_path, servers.empty("sqlite"), source=advised)
    try:
        workflow = app.create("Welcome")
        app.consumer()
        until(lambda: app.state(workflow) == "finished")
        for line in ("Huey consumer started", f"Welcome {workflow}: performing -> finished"):
            assert app.log().count(line) == 1
    finally:
        app.close()


def test_a_consumer_on_redis_takes_over_what_was_committed_here(servers, tmp_path):
    app = App(tmp_path, servers.empty("sqlite"), servers.redis())
    try:
        workflow = app.create("Welcome")
        app.consumer("-w", "2", "-k", "process")
        until(lambda: app.state(workflow) == "finished")
        premium = app.create("Welcome", "premium")  # which is the drive's own
        (app.folder / "premium.py").write_text("import app\nhuey = app.drive.queues['premium']\n")
        app.start("-m", "huey.bin.huey_consumer", "premium.huey")
        until(lambda: app.state(premium) == "finished")
    finally:
        app.close()


OFTEN = """
from huey import crontab

class Often(Workflow):
    may_proceed_without_hero = True
    recurs = crontab(minute="*/5")
    recurrence_catch_up = 240

    @step
    def one(self):
        trace(f"{self.occurs_at:%H:%M}")

kinds = """


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.exhaustive("sqlite", "mysql")
def test_of_consumers_that_start_at_once_and_are_killed_one_creates_what_recurs(servers, tmp_path, kind):
    app = App(tmp_path, servers.empty(kind), source=APP.replace("\nkinds = ", OFTEN))
    try:
        now = utcnow()
        late = now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1, seconds=20) - now
        for minutes in (0, 5, 10):  # and half of the clocks are thirty seconds behind
            clocks = [late.total_seconds() + 60 * minutes - 30 * (number % 2) for number in range(8)]
            consumers = [app.consumer("-k", "thread", APP_CLOCK=str(clock)) for clock in clocks]
            for consumer in consumers[:6]:
                time.sleep(0.1 * random.random())
                consumer.kill()
            until(lambda: f"{minutes:02}" in {trace[-2:] for trace in app.traces()})  # noqa: B023
            until(lambda: app.are_over(APP_CLOCK=str(clocks[0])))  # noqa: B023 - by the two that are left
            for consumer in consumers:
                consumer.kill()
                consumer.wait()
        moments = [each.occurs_at.minute for each in Workflow.select().order_by(Workflow.occurs_at)]
        assert moments == [0, 5, 10]
        assert {trace[-2:] for trace in app.traces()} == {"00", "05", "10"}
        assert app.doctor() == []
    finally:
        app.close()


@ELSEWHERE
def test_a_named_queue_is_served_by_its_own_consumer(app):
    workflow = app.create("Welcome", "premium")
    (app.folder / "premium.py").write_text("import app\nhuey = app.drive.queues['premium']\n")
    app.start("-m", "huey.bin.huey_consumer", "premium.huey", "-d", "0.02", "-m", "0.1")
    until(lambda: app.state(workflow) == "finished")
    everything = app.create("Welcome", "premium"), app.create("Welcome")
    app.start("app.py", "run")
    until(lambda: [app.state(each) for each in everything] == ["finished"] * 2)


def test_the_schedule_is_in_utc_whatever_the_time_zones_of_producer_and_consumer(app):
    before = time.time()
    workflow = app.create("Welcome", TZ="Asia/Tokyo")
    app.consumer(TZ="America/New_York")
    until(lambda: app.state(workflow) == "finished")
    assert time.time() - before < 30
    one, two, _three = Workflow.get_by_id(workflow).execution_history
    assert two.started_at - one.finished_at >= timedelta(seconds=0.3)


def test_each_queue_has_the_periodic_housekeeping(db, drive):
    drive = GenevaDrive(db, queues={"outside": MemoryHuey("outside")}, housekeeping_schedule=crontab(minute="7"))
    for huey in drive.queues.values():
        for minute, names in ((7, ["housekeeping", "recurrence"]), (8, ["recurrence"])):
            tasks = huey.read_periodic(datetime(2026, 1, 1, 1, minute))
            assert [type(task).__name__ for task in tasks] == names


class Tenant(Model):
    class Meta:
        table_name = "test_tenants"


def test_a_drive_that_was_replaced_says_so_and_has_no_part_in_the_work_of_the_later_one(tmp_path, db, drive, hero):
    old_db = SqliteDatabase(tmp_path / "old.db")
    old = GenevaDrive(old_db)
    old.create_tables()
    with Tenant.bind_ctx(old_db):
        Tenant.create_table()
        tenant = Tenant.create()
        theirs = scheduled(Quick.create(hero=tenant))
        drive = GenevaDrive(db, queues=["more"])
        ours = scheduled(Quick.create(hero=hero))
        calls = (old.run, old.is_idle, old.housekeeping, old.doctor, old.create_tables, old.huey.dequeue)
        for call in (
            *calls,
            functools.partial(old._perform, theirs.id),
            functools.partial(old._dispatch.tasks["default"].call_local, ours.id, task=None),
        ):
            with pytest.raises(
                gd.ConfigurationError, match=r"on the database .*old.db', was replaced by a later one, on"
            ):
                call()
        for call in (
            lambda: Plain.create(hero=tenant),
            lambda: Plain.get_or_create(hero=tenant),
            lambda: Plain.create_many([tenant]),
            lambda: Plain.for_hero(tenant),
        ):
            with pytest.raises(gd.ConfigurationError, match=r"Tenant is in the database .*old.db', whose GenevaDrive"):
                call()
    assert Workflow.select().count() == 1
    assert history(reload(ours.workflow)) == [("one", "scheduled", None)]
    assert drive.is_idle() is False
    old_db.close()


def test_a_later_drive_may_know_its_database_by_another_object(database, drive, hero):
    later = GenevaDrive(open_database(database.url))
    workflow = Quick.create(hero=hero)
    work_off(later)
    assert reload(workflow).state == "finished"
    later.database.close()


def test_a_huey_that_a_drive_made_for_itself_is_none_for_another(db, drive):
    for options in ({"huey": drive.huey}, {"queues": {"more": drive.huey}}):
        with pytest.raises(gd.ConfigurationError, match="one that another GenevaDrive made for itself: leave it out"):
            GenevaDrive(db, **options)
    assert drive.is_idle() is True  # it was not replaced


def test_a_drive_on_the_same_database_goes_on_with_what_the_earlier_one_left(db, drive, hero):
    workflow = Quick.create(hero=hero)
    later = GenevaDrive(db)
    Quick.create(hero=User.create())
    work_off(later)
    assert reload(workflow).state == "finished"
    assert effects() == ["one", "two", "three"] * 2


def test_a_second_drive_on_the_same_outside_queue_takes_its_tasks_over(db, drive, hero):
    outside = MemoryHuey("outside", results=False)
    GenevaDrive(db, huey=outside)
    drive = GenevaDrive(db, huey=outside)
    workflow = Quick.create(hero=hero)
    work_off(drive)
    assert reload(workflow).state == "finished"
    assert len(outside._registry.periodic_tasks) == 2  # housekeeping, and the look for what recurs


def test_immediate_mode_runs_the_steps_after_the_commit(db, drive, hero):
    GenevaDrive(db, huey=MemoryHuey("now", results=False, immediate=True))
    with db.atomic():
        workflow = Quick.create(hero=hero)
        assert effects() == []
    assert (reload(workflow).state, effects()) == ("finished", ["one", "two", "three"])


def test_immediate_mode_on_the_drives_own_database_waits_for_the_commit_too(db, drive, hero):
    immediate = SqlHuey(database=db, results=False, immediate=True, immediate_use_memory=False)
    try:
        GenevaDrive(db, huey=immediate)
        with pytest.raises(ZeroDivisionError), db.atomic():
            Quick.create(hero=hero)
            assert effects() == []
            raise ZeroDivisionError
        workflow = Quick.create(hero=hero)
        assert (reload(workflow).state, effects()) == ("finished", ["one", "two", "three"])
    finally:
        immediate.storage.drop_tables()


CLOSES = {
    "sqlite": (SqliteDatabase, PooledSqliteDatabase),
    "postgresql": (peewee.PostgresqlDatabase, PooledPostgresqlDatabase),
    "mysql": (peewee.MySQLDatabase, PooledMySQLDatabase),
}


class Closing(Workflow):
    @step
    def one(self):
        with self.hero._meta.database.connection_context():
            did("one")

    @step(resumable=True)
    def two(self):
        for item in self.resume_over(["a", "b"], every=1):
            with self.hero._meta.database.connection_context():
                did(item)

    @step
    def three(self):
        self.hero._meta.database.close()
        User.select().count()


@pytest.mark.parametrize("autoconnect", [True, False])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("kind", SERVERS)
def test_what_a_body_that_closes_the_connection_did_is_recorded_once(servers, kind, pooled, autoconnect):
    db = CLOSES[kind][pooled](**parse(servers.empty(kind)), autoconnect=autoconnect)
    db.connect()
    with driven(db) as drive:
        workflow = Closing.create(hero=User.create())
        drive.run(until=drive.is_idle)
        assert effects() == ["one", "a", "b"]
        end = ("completed", "success") if autoconnect else ("failed", "failed")  # no loss of the connection: an error
        assert history(workflow) == [*((each, "completed", "success") for each in ("one", "two")), ("three", *end)]
        again = Closing.create(hero=User.create())
        assert scheduled(again).execute() is True
        assert history(again)[0] == ("one", "completed", "success")
    if pooled:
        db.close_all()


class ClosingEverywhere(Workflow):
    def uses(self, *_):
        with self.hero._meta.database.connection_context():
            return did(f"in {self.current_step_name}")

    before_step_execution = after_step_execution = uses

    @cancel_if
    def never(self):
        self.uses()

    @step(wait_for="go")
    def one(self):
        self.uses()
        raise ZeroDivisionError

    @on_exception(ZeroDivisionError)
    def handles(self, error):
        did(f"{User.select().count()} hero")
        self.uses()
        self.skip()

    @step(skip_if="uses")
    def two(self):
        did("two")


@pytest.mark.parametrize("kind", SERVERS)
def test_conditions_hooks_handlers_and_receivers_may_close_the_connection_too(servers, kind):
    db = CLOSES[kind][False](**parse(servers.empty(kind)), autoconnect=False)
    db.connect()
    with driven(db) as drive:
        workflow = ClosingEverywhere.create(hero=User.create())
        workflow.signal("go")
        receiver = lambda cls, workflow, execution: workflow.uses()  # noqa: E731
        for event in (gd.step_started, gd.step_finished):
            event.connect(receiver, name="closing")
        try:
            drive.run(until=drive.is_idle)
        finally:
            for event in (gd.step_started, gd.step_finished):
                event.disconnect(receiver, name="closing")
        assert history(workflow) == [("one", "skipped", "skipped"), ("two", "completed", "success")]
        assert {"1 hero", "two"} <= set(effects())


def test_heroes_in_a_database_without_autoconnect_are_found(db, drive, tmp_path):
    heroes = SqliteDatabase(tmp_path / "heroes.db", autoconnect=False)
    with User.bind_ctx(heroes), Effect.bind_ctx(heroes), heroes.connection_context():
        heroes.create_tables([User, Effect])
        workflow = Closing.create(hero=User.create())
        drive.run(until=drive.is_idle)
        assert effects() == ["one", "a", "b"]
        assert history(workflow)[:2] == [(each, "completed", "success") for each in ("one", "two")]


def test_a_database_without_autoconnect_serves_a_consumer(servers):
    db = SqliteDatabase(parse(servers.empty("sqlite"))["database"], autoconnect=False, timeout=20)
    for model in MODELS:
        model.bind(db)
    drive = GenevaDrive(db)
    with db.connection_context():
        drive.create_tables()
        db.create_tables(MODELS)
        workflow = Quick.create(hero=User.create())
        drive.run(until=lambda: reload(workflow).state == "finished")
        assert effects() == ["one", "two", "three"]


def test_a_priority_is_refused_where_the_queue_knows_none(db, drive, hero, servers):
    class Urgent(Workflow):
        @step(options={"priority": 5})
        def one(self):
            did("urgent")

    drive = GenevaDrive(db, huey=RedisHuey("plain", url=servers.redis(), results=False))
    with pytest.raises(gd.ConfigurationError, match=r"Urgent.one asks for a priority.*PriorityRedisHuey"):
        Urgent.create(hero=hero)
    assert Workflow.select().count() == 0
    drive = GenevaDrive(db, huey=PriorityRedisHuey("sorted", url=servers.redis(), results=False))
    drive.huey.flush()
    Quick.create(hero=hero)
    Urgent.create(hero=hero)
    work_off(drive)
    assert effects() == ["urgent", "one", "two", "three"]


def test_run_ends_by_the_second_signal_though_what_that_interrupts_fails_in_its_own_way(drive):
    def interrupted():
        signal.raise_signal(signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ZeroDivisionError from None

    before = signal.getsignal(signal.SIGTERM)
    drive.run(until=interrupted)
    assert signal.getsignal(signal.SIGTERM) == before
    until(lambda: not {"Worker-1", "Scheduler"} & {each.name for each in threading.enumerate()})


def test_a_worker_that_looks_into_the_queue_as_its_run_ends_ends_too(drive, monkeypatch):
    is_looking, is_over = threading.Event(), threading.Event()

    def take(*_):
        is_looking.set()
        is_over.wait()

    monkeypatch.setattr(gd._Attempt, "take", take)
    drive.run(until=is_looking.is_set, shutdown_timeout=0)
    worker = next(each for each in threading.enumerate() if each.name == "Worker-1")
    is_over.set()
    worker.join(10)
    assert not worker.is_alive()


def test_a_worker_of_a_drive_that_was_replaced_closes_its_connection_as_it_ends(db, drive):
    GenevaDrive(db)
    db.connect(reuse_if_open=True)
    drive._dispatch._end_worker()
    assert db.is_closed()


def test_run_waits_for_the_steps_under_way_no_longer_than_it_is_told_to(db, drive, hero):
    begun, gate = threading.Event(), threading.Event()

    class Waits(Workflow):
        @step
        def one(self):
            begun.set()
            gate.wait(timeout=30)

    workflow = Waits.create(hero=hero)
    drive.run(until=begun.is_set, shutdown_timeout=0.1)
    assert history(workflow) == [("one", "in_progress", None)]
    gate.set()  # the process lives on, and so does the step
    until(lambda: history(workflow) == [("one", "completed", "success")])
    for wrong in (-1, "soon"):
        with pytest.raises(gd.ConfigurationError, match=r"run\(\): shutdown_timeout must be"):
            drive.run(shutdown_timeout=wrong)


@contextlib.contextmanager
def sleepy_consumer(drive, workers):
    """A consumer that looks into its queue every ten minutes, if nothing wakes it; ends in good time all the same."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gd, "SHORTEST_NAP", 600)
        patch.setattr(gd, "LONGEST_NAP", 600)
        drive.huey.storage.begin()
        consumer, idle = drive.huey.create_consumer(workers=workers), drive.huey.storage.idle
        consumer.start()
        try:
            until(lambda: idle.waiting == workers and idle.is_watched)
            yield consumer
        finally:
            consumer.stop_flag.set()
            with idle.changed:
                idle.nap, idle.news = 0, idle.news + 1
                idle.changed.notify_all()
            began = time.monotonic()
            consumer.stop(graceful=True)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    drive.huey.storage.begin()
    assert time.monotonic() - began < 60


def test_workers_of_the_same_process_are_woken_by_what_is_committed(db, drive, hero):
    gates = [threading.Event() for _ in range(3)]

    class Gated(Workflow):
        @step
        def one(self):
            gates[self.context["gate"]].set()
            assert all(gate.wait(timeout=30) for gate in gates)

    with sleepy_consumer(drive, workers=3):
        idle = drive.huey.storage.idle
        with db.atomic():  # a step for each of the workers
            workflows = [Gated.create(hero=User.create(), context={"gate": number}) for number in range(3)]
            assert idle.waiting == 3
        for workflow in workflows:
            until(lambda workflow=workflow: reload(workflow).state == "finished")
        until(lambda: idle.waiting == 3)
        with db.atomic() as transaction:
            Quick.create(hero=hero)
            transaction.rollback()
        drive.run_on = 0  # each step goes through the queue
        workflow = Quick.create(hero=hero)
        until(lambda: reload(workflow).state == "finished")
        for number, priority in enumerate((7, -7, 3)):  # that the queue has not seen yet
            workflow = Quick.create(hero=User.create(), options={"priority": priority})
            until(lambda workflow=workflow: reload(workflow).state == "finished")
            assert len(effects()) == 3 * (number + 2)
        assert Quick.create_many([User.create() for _ in range(4)]) == 4
        until(lambda: Quick.select().where(Workflow.state == "finished").count() == 8)


class Soon(Workflow):
    @step(wait=0.05)
    def one(self):
        did("soon")


@pytest.mark.parametrize("workers", [1, 3])
def test_what_falls_due_wakes_a_worker_at_its_time(drive, hero, workers):
    with sleepy_consumer(drive, workers):
        workflow = Soon.create(hero=hero)
        until(lambda: reload(workflow).state == "finished")
        Tomorrow.create(hero=User.create())
        idle = drive.huey.storage.idle
        until(lambda: idle.first_due and idle.first_due > utcnow())  # the one who watches knows of it
        workflow = Soon.create(hero=User.create())  # and this one comes before it
        until(lambda: reload(workflow).state == "finished")
    assert effects() == ["soon", "soon"]
    for each in StepExecution.select().where(StepExecution.step_name == "one", StepExecution.started_at.is_null(False)):
        assert each.started_at >= each.scheduled_for


def test_an_idle_consumer_looks_no_more_often_the_more_workers_it_has(db, drive, hero, monkeypatch):
    """One of its workers watches the queue, and only what is due makes the others look."""
    with sleepy_consumer(drive, workers=4):
        sent = []
        monkeypatch.setattr(db, "query_hooks", [lambda event: sent.append(event.sql)])
        Tomorrow.create(hero=hero)
        until(lambda: drive.huey.storage.idle.first_due)
        time.sleep(2 * gd.STOP_SECONDS)
        looks = [sql for sql in sent if re.search("(?i)due_at. <= |execute geneva_drive", sql)]
        monkeypatch.undo()
    assert len(looks) <= 3, looks


def test_run_serves_the_queues_that_it_is_told_to_and_ends_when_it_is_told_to(db, drive, hero):
    drive = GenevaDrive(db, queues=["premium"])
    with pytest.raises(gd.UnknownQueueError, match=r"run\(\) asks for the queue 'vip'"):
        drive.run(queues=["vip"])
    with pytest.raises(gd.ConfigurationError, match="workers must be a positive int"):
        drive.run(workers=0)
    workflow, premium = Quick.create(hero=hero), Premium.create(hero=hero)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    drive.run(workers=2, queues=["premium"], until=lambda: reload(premium).state == "finished")
    assert reload(workflow).state == "ready"
    drive.run(workers=1, until=lambda: reload(workflow).state == "finished")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# ==== Drivers: each that Peewee has a class for =======================================================================


DRIVERS = {  # the package, the server, and Peewee's module and classes
    "apsw": ("sqlite", "playhouse.apsw_ext", "APSWDatabase"),
    "cysqlite": ("sqlite", "playhouse.cysqlite_ext", "CySqliteDatabase", "PooledCySqliteDatabase"),
    "psycopg": ("postgresql", "playhouse.postgres_ext", "Psycopg3Database", "PooledPsycopg3Database"),
    "mysql": ("mysql", "playhouse.mysql_ext", "MySQLConnectorDatabase", "PooledMySQLConnectorDatabase"),
    "mariadb": ("mysql", "playhouse.mysql_ext", "MariaDBConnectorDatabase", "PooledMariaDBConnectorDatabase"),
}


@pytest.fixture(params=[f"{package} {name}" for package, (_, _, *names) in DRIVERS.items() for name in names])
def connects(request, servers):
    """What makes another Peewee database of the same driver on the same new database, and their kind."""
    package, name = request.param.split()
    kind, module, *_ = DRIVERS[package]
    # mariadb alone has no wheels, and is not among what the tests bring along.
    require_package(package, "apt-get install libmariadb-dev && pip install mariadb" if package == "mariadb" else None)
    parameters = parse(servers.empty(kind))
    if kind == "sqlite":
        parameters.update(pragmas={"journal_mode": "wal", "foreign_keys": 1}, timeout=0.1)
    made = []

    def connect_anew():
        made.append(getattr(importlib.import_module(module), name)(**parameters))
        return made[-1]

    yield connect_anew, kind
    for db in made:
        getattr(db, "close_all", db.close)()


class Everything(Workflow):
    @cancel_if
    def is_inactive(self):
        return not self.hero.active

    @step
    def keep(self):
        self.context["smile"] = "\U0001f600"

    @step(wait=0.01, transactional=True)
    def count(self):
        User.update(visits=User.visits + 1).where(User.id == self.hero.id).execute()

    @step(on_exception="skip")
    def fail(self):
        raise ValueError("no \U0001f600")

    @step(wait_for="told", timeout=60)
    def told(self):
        did(self.signal_payload["what"])

    @step(resumable=True)
    def go_over(self):
        for user in self.resume_over(User, every=1):
            did(user.name)


def test_every_driver_does_all_that_the_library_does(connects):
    connect_anew, _ = connects
    with driven(connect_anew()) as drive:
        before, hero = utcnow(), User.create(name="ada")
        workflow = Everything.create(hero=hero)
        with pytest.raises(gd.AlreadyOngoingError):
            Everything.create(hero=hero)
        assert Everything.create_many([User.create(name="bob", active=False)]) == 1
        assert workflow.signal("told", {"what": "told"}, idempotency_key="1")
        assert not workflow.signal("told", {"what": "told"}, idempotency_key="1")
        drive.run(workers=2, until=drive.is_idle)
        assert [each.state for each in Everything.select().order_by(Workflow.id)] == ["finished", "canceled"]
        outcomes = [each.outcome for each in workflow.execution_history]
        assert outcomes == ["success", "success", "skipped", "success", "success"]
        assert effects() == ["told", "ada", "bob"]
        assert (User.get_by_id(hero.id).visits, reload(workflow).context) == (1, {"smile": "\U0001f600"})
        assert before <= reload(workflow).created_at <= reload(workflow).transitioned_at <= utcnow()
        again = Everything.create(hero=hero)
        again.pause()
        again.resume()
        again.cancel()
        assert drive.housekeeping()["stuck_in_progress_recovered"] == 0
        assert {metric.name for metric in drive.stats()} >= {"geneva_drive_workflows", "geneva_drive_overdue_steps"}


def test_every_driver_tells_of_a_collision_which_is_repeated(connects):
    connect_anew, kind = connects
    with driven(connect_anew()):
        other, users = connect_anew(), [User.create(name="first"), User.create(name="second")]
        locked, go_on = threading.Event(), threading.Event()

        def collide():
            update = f"update test_users set visits = visits + 1 where id = {other.param}"
            with other.connection_context(), other.atomic(*["IMMEDIATE"] * (kind == "sqlite")):
                other.execute_sql(update, (users[1].id,))
                locked.set()
                go_on.wait(timeout=30)
                if kind != "sqlite":
                    with contextlib.suppress(peewee.PeeweeException):  # of the two, either is refused
                        other.execute_sql(update, (users[0].id,))

        class Locks(Workflow):
            @step(transactional=True)
            def both(self):
                for user in users:
                    User.update(visits=User.visits + 1).where(User.id == user.id).execute()
                    threading.Timer(0.3, go_on.set).start()

        workflow = Locks.create(hero=users[0])
        with ThreadPoolExecutor(1) as threads:
            held = threads.submit(collide)
            assert locked.wait(timeout=30)
            threading.Timer(0.5, go_on.set).start()  # on SQLite, the step cannot even be claimed before
            assert scheduled(workflow).execute() is True
            with contextlib.suppress(peewee.PeeweeException):
                held.result()
        assert history(workflow) == [("both", "completed", "success")]


# SQLite has no connection that could be lost.
WHO_AM_I = {"sqlite": "select 1", "postgresql": "select pg_backend_pid()", "mysql": "select connection_id()"}
KILL = {"sqlite": "select {}", "postgresql": "select pg_terminate_backend({})", "mysql": "kill {}"}


@pytest.mark.filterwarnings("ignore:unclosed <(socket|ssl):ResourceWarning")
def test_every_driver_tells_of_a_lost_connection_which_is_replaced(connects):
    connect_anew, kind = connects
    other, lost = connect_anew(), []

    class Loses(Workflow):
        @step
        def one(self):
            if not lost:
                lost.append(drive._access.database.execute_sql(WHO_AM_I[kind]).fetchone()[0])
                with other.connection_context():
                    other.execute_sql(KILL[kind].format(lost[0]))
                time.sleep(0.1)
            User.select().count()

        @step(on_exception="cancel")
        def two(self):
            User.select().count()

    with driven(connect_anew()) as drive:
        workflow = Loses.create(hero=User.create())
        drive.run(until=drive.is_idle)
        assert history(workflow) == [
            *[("one", "failed", "recovered")] * (kind != "sqlite"),
            ("one", "completed", "success"),
            ("two", "completed", "success"),
        ]
    gc.collect()  # mysql-connector does not close the socket of a connection that the server has ended


@ELSEWHERE  # the drive's own database, not the driver's
@pytest.mark.filterwarnings("ignore:unclosed <(socket|ssl):ResourceWarning")
def test_with_every_driver_a_lost_connection_to_a_heros_own_database_is_replaced(db, drive, connects):
    connect_anew, kind = connects
    elsewhere, other = connect_anew(), connect_anew()

    class Visitor(Model):
        class Meta:
            database = elsewhere

    elsewhere.create_tables([Visitor])

    class Visits(Workflow):
        @step(on_exception=ExceptionPolicy("reattempt", wait=0))
        def one(self):
            if kind != "sqlite" and self.execution_history.count() == 1:
                number = elsewhere.execute_sql(WHO_AM_I[kind]).fetchone()[0]
                with other.connection_context():
                    other.execute_sql(KILL[kind].format(number))
                time.sleep(0.1)
            Visitor.get_by_id(self.hero.id)

    workflow = Visits.create(hero=Visitor.create())
    drive._perform(scheduled(workflow).id)  # and the reattempt, in a run-on
    assert [outcome for *_, outcome in history(workflow)] == ["reattempted"] * (kind != "sqlite") + ["success"]
    elsewhere.close()
    gc.collect()


def test_every_driver_tells_that_the_tables_are_missing(connects):
    drive = GenevaDrive(connects[0]())
    with pytest.raises(gd.GenevaDriveError, match="has no tables of GenevaDrive"):
        drive.stats()
    drive._access.database.close()


# ==== Failures of the parts: real servers, real signals ===============================================================

RUN = ["app.py", "run"]
CONSUMER = ["-m", "huey.bin.huey_consumer", "app.huey", "-d", "0.02", "-m", "0.1", "-w", "2"]
PROCESSES = [*CONSUMER, "-k", "process"]
WAYS = {"run": RUN, "threads": CONSUMER, "processes": PROCESSES}
ONE_WAY_EACH = list(zip(SERVERS, WAYS, strict=True))


@contextlib.contextmanager
def running_app(folder, url, redis=None):
    app = App(folder, url, redis)
    try:
        yield app
        assert app.doctor() == []
    finally:
        app.close()


@contextlib.contextmanager
def down(server, app):
    with server.down():
        app.db.close()  # the test's own connection
        yield


def flushed(server):
    """Lose all that a Redis holds; returns how many keys it held."""
    redis = RedisHuey("any", url=server.url).storage.conn
    keys = redis.dbsize()
    redis.flushall()
    return keys


def is_unharmed(app, consumer, number=0):
    """Whether a consumer is the process that was started, with the workers that it started with."""
    return consumer.poll() is None and "died" not in app.log(number)


@pytest.mark.parametrize(("kind", "way"), [("postgresql", "run"), ("postgresql", "processes"), ("mysql", "threads")])
@pytest.mark.exhaustive("processes")
def test_a_database_that_is_killed_and_restarted_under_a_consumer_costs_nothing(servers, tmp_path, kind, way):
    server = servers.breakable(kind)
    with running_app(tmp_path, server.empty()) as app:
        consumer = app.start(*WAYS[way])
        in_mid_body = app.create("Aloof")
        until(lambda: app.notes() == [f"{in_mid_body} begins"])
        with down(server, app):
            pass
        app.gate.touch()
        until(lambda: app.state(in_mid_body) == "finished")
        with down(server, app):
            pass
        while_idle = app.create("Aloof")
        until(lambda: app.state(while_idle) == "finished")
        app.gate.unlink()
        to_be_recorded = app.create("Aloof")
        until(lambda: f"{to_be_recorded} begins" in app.notes())
        with down(server, app):
            app.gate.touch()
            until(lambda: f"{to_be_recorded} ends" in app.notes())
            time.sleep(3)  # the outage
        until(lambda: app.state(to_be_recorded) == "finished")
        workflows = (in_mid_body, while_idle, to_be_recorded)
        assert app.notes() == [f"{each} {what}" for each in workflows for what in ("begins", "ends", "two")]
        assert is_unharmed(app, consumer)


@contextlib.contextmanager
def limited_account(url, connections):
    """The URL of an account that may have so many connections to a database."""
    name, database, admin = f"few_{uuid.uuid4().hex[:12]}", urlsplit(url).path[1:], open_database(url)
    made, gone = {
        "postgresql": (
            [f"create role {name} login connection limit {connections}", f"alter database {database} owner to {name}"],
            [f"reassign owned by {name} to current_user", f"drop owned by {name}", f"drop role {name}"],
        ),
        "mysql": (
            [f"create user {name} with max_user_connections {connections}", f"grant all on {database}.* to {name}"],
            [f"drop user {name}"],
        ),
    }[urlsplit(url).scheme]
    try:
        for statement in made:
            admin.execute_sql(statement)
        server = urlsplit(url)
        yield server._replace(netloc=f"{name}@{server.netloc.rpartition('@')[2]}").geturl()
    finally:
        for statement in gone:
            admin.execute_sql(statement)
        admin.close()


def is_connected(db):
    """Whether there is a connection, or room for one."""
    with contextlib.suppress(peewee.OperationalError):
        db.connect(reuse_if_open=True)
    return not db.is_closed()


@pytest.mark.parametrize(("kind", "way"), [("postgresql", "run"), ("mysql", "processes")])
def test_a_long_step_lives_on_though_others_take_all_connections(servers, tmp_path, kind, way):
    url, taken = servers.empty(kind), []
    with limited_account(url, 8) as few, contextlib.closing(App(tmp_path, few)) as app:
        workflow = app.create("Aloof")
        app.start(*WAYS[way], APP_THRESHOLD="2")
        until(lambda: app.notes() == [f"{workflow} begins"])
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            taken.append(open_database(few))
            try:
                taken[-1].connect()
            except peewee.OperationalError:
                taken.pop()
                time.sleep(0.05)
        assert taken
        app.run("housekeeping", APP_URL=url, APP_THRESHOLD="2")
        for each in taken:
            each.close()
        until(lambda: is_connected(app.db))  # the server takes a moment to see that they are gone
        app.gate.touch()
        until(lambda: app.state(workflow) == "finished")
        assert app.notes() == [f"{workflow} {what}" for what in ("begins", "ends", "two")]
        assert app.doctor() == []


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
def test_a_claim_waits_for_a_database_that_restarts_since_its_message_is_gone(servers, kind):
    server = servers.breakable(kind)
    db = open_database(server.empty())
    drive = GenevaDrive(db)
    drive.create_tables()
    for model in (User, Effect):
        model.bind(db)
    db.create_tables([User, Effect])
    workflow = Quick.create(hero=User.create())
    message = scheduled(workflow).id
    db.close()

    def perform():
        drive._perform(message)
        db.close()

    worker = threading.Thread(target=perform)
    with server.down():
        worker.start()
        time.sleep(1)  # the outage
    worker.join()
    assert (reload(workflow).state, effects()) == ("finished", ["one", "two", "three"])
    db.close()


@pytest.mark.parametrize(("kind", "way"), [("postgresql", "processes"), ("mysql", "threads")])
@pytest.mark.exhaustive("mysql")
def test_connections_that_are_dropped_all_the_time_cost_attempts_and_no_workflow(servers, tmp_path, kind, way):
    listing, drop = {
        "postgresql": (
            "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()",
            "select pg_terminate_backend(%s)",
        ),
        "mysql": (
            "select id from information_schema.processlist where db = database() and id <> connection_id()",
            "kill %s",
        ),
    }[kind]
    with running_app(tmp_path, servers.empty(kind)) as app:
        app.gate.touch()
        app.run("create_many", "Welcome", 25)
        app.run("create_many", "Booked", 25)
        consumer = app.start(*WAYS[way], **HEALING)
        dropped = []

        def drop_all():
            for row in app.db.execute_sql(listing).fetchall():
                with contextlib.suppress(peewee.OperationalError):  # it is gone already
                    app.db.execute_sql(drop, row)
                    dropped.append(row)
            return len(dropped) >= 30

        until(drop_all)
        until(app.are_over)
        assert sorted(what for what in app.traces() if "booked" in what) == sorted(
            f"{each.id} booked" for each in Workflow.select().where(Workflow.type == "Booked")
        )
        assert is_unharmed(app, consumer)


def test_a_redis_that_is_down_restarts_empty_or_is_flushed_loses_no_workflow(servers, tmp_path):
    server = servers.breakable("redis")
    with running_app(tmp_path, servers.empty("sqlite"), server.url) as app:
        app.gate.touch()
        consumer = app.start(*PROCESSES, **HEALING)
        app.create("Welcome")
        until(app.are_over)
        with server.down():
            producer = app.start("app.py", "create", "Welcome")
            assert producer.wait(timeout=30) == 0
        assert app.state(int(app.log(1).splitlines()[-1])) == "ready"
        assert "failed after a commit; housekeeping makes up for it" in app.log(1)
        until(app.are_over)
        app.gate.unlink()
        app.run("create_many", "Aloof", 10)  # two are performed, the others queued
        app.run("create_many", "Later", 10)  # and these scheduled
        with server.down():
            pass
        app.run("create_many", "Aloof", 10)
        app.run("create_many", "Later", 10)
        assert flushed(server) > 0
        app.gate.touch()
        until(app.are_over)
        assert max(Counter(app.notes()).values()) == 1
        assert is_unharmed(app, consumer)


def test_on_sqlite_the_threads_of_a_process_take_turns_and_do_not_find_the_database_locked(tmp_path):
    db = SqliteDatabase(str(tmp_path / "turns.db"), timeout=0)
    drive = GenevaDrive(db)
    drive.create_tables()
    db.close()
    begun, go_on = threading.Event(), threading.Event()

    def first():
        with db.connection_context(), drive._access.begin(), drive._access.begin():  # a savepoint needs no turn
            begun.set()
            assert go_on.wait(timeout=30)

    def second():
        with db.connection_context(), drive._access.begin():
            return "written"

    with ThreadPoolExecutor(3) as threads:
        holding = threads.submit(first)
        assert begun.wait(timeout=30)
        with pytest.raises(peewee.OperationalError, match="locked"):  # a body that takes long: the database decides
            threads.submit(second).result()
        waiting = threads.submit(second)
        with pytest.raises(FutureTimeout):
            waiting.result(timeout=0.1)
        go_on.set()
        holding.result()
        assert waiting.result() == "written"
        threads.submit(second).result()
    with pytest.raises(ZeroDivisionError), db, drive._access.begin():
        raise ZeroDivisionError
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(second).result() == "written"


@pytest.mark.parametrize("timeout", [1, 20])
def test_a_writer_that_locks_sqlite_for_seconds_delays_everything_and_loses_nothing(servers, tmp_path, timeout):
    with running_app(tmp_path, servers.empty("sqlite")) as app:
        consumer = app.start(*CONSUMER, APP_TIMEOUT=str(timeout))
        to_be_recorded, to_be_claimed = app.create("Aloof"), app.create("Later")
        until(lambda: app.notes() == [f"{to_be_recorded} begins"])
        writer = sqlite3.connect(parse(app.env["APP_URL"])["database"])
        writer.execute("begin immediate")
        app.gate.touch()
        producer = app.start("app.py", "create_another", "Later", APP_TIMEOUT=str(timeout))
        until(lambda: f"{to_be_recorded} ends" in app.notes())
        time.sleep(3)
        assert app.notes() == [f"{to_be_recorded} {what}" for what in ("begins", "ends")]
        writer.rollback()
        writer.close()
        assert producer.wait(timeout=30) == 0
        created = int(app.log(1).splitlines()[-1])
        until(lambda: [app.state(each) for each in (to_be_recorded, to_be_claimed, created)] == ["finished"] * 3)
        expected = [f"{to_be_recorded} {what}" for what in ("begins", "ends", "two")]
        assert sorted(app.notes()) == sorted([*expected, f"{to_be_claimed} one", f"{created} one"])
        assert is_unharmed(app, consumer)


def test_a_process_that_dies_with_what_it_took_has_lost_nothing(app):
    app.run("create_many", "Later", 300)
    until(lambda: StepExecution.select(peewee.fn.MIN(StepExecution.scheduled_for)).scalar() < utcnow())
    loser = app.start("app.py", "lose")
    assert (loser.wait(timeout=30), app.log().splitlines()[-1]) == (-signal.SIGKILL, "5")
    assert StepExecution.select().where(StepExecution.state == "in_progress").count() == 5
    app.start(*CONSUMER, **HEALING)
    until(app.are_over)
    assert sorted(app.notes()) == sorted(f"{each.id} one" for each in Workflow.select())
    assert app.doctor() == []


def test_a_schedule_in_memory_that_dies_with_its_process_is_made_up_for(servers, tmp_path):
    with running_app(tmp_path, servers.empty("sqlite")) as app:
        app.run("create_many", "Later", 300, APP_MEMORY="1")
        latest = StepExecution.select(peewee.fn.MAX(StepExecution.scheduled_for))
        until(lambda: latest.scalar() < utcnow() - timedelta(seconds=1))
        app.start(*CONSUMER, APP_MEMORY="1", **HEALING)  # sweeps as it starts
        until(lambda: Workflow.select().where(Workflow.state == "finished").count() == 300)
        assert sorted(app.notes()) == sorted(f"{each.id} one" for each in Workflow.select())


def stop(app, process):
    """Stop a process group, but not while it holds SQLite's one write lock: everybody would wait for it."""
    with contextlib.ExitStack() as lock:
        if app.env["APP_URL"].startswith("sqlite"):
            writer = lock.enter_context(contextlib.closing(sqlite3.connect(app.db.database, timeout=30)))
            writer.execute("begin immediate")
        os.killpg(process.pid, signal.SIGSTOP)
        process.wait_until_stopped()  # it goes on for a moment


@pytest.mark.parametrize(("app", "way"), ONE_WAY_EACH, indirect=["app"])
@ELSEWHERE
def test_a_process_stopped_past_its_threshold_records_nothing_and_works_on(app, way):
    short = {"APP_THRESHOLD": "3"}
    workflow = app.create("Aloof")
    stopped = app.start(*WAYS[way], **short)
    until(lambda: app.notes() == [f"{workflow} begins"])
    stop(app, stopped)
    until(lambda: StepExecution.get().heartbeat_at < utcnow() - timedelta(seconds=3.1))
    other = app.start(*CONSUMER, **short)
    until(lambda: len(app.notes()) == 2)
    app.gate.touch()
    until(lambda: app.state(workflow) == "finished")
    os.killpg(stopped.pid, signal.SIGCONT)
    until(lambda: "the claim was lost to recovery" in app.log())
    assert app.notes() == [f"{workflow} {what}" for what in ("begins", "begins", "ends", "two", "ends")]
    assert [each[1:] for each in history(Workflow.get_by_id(workflow))] == [
        *(("failed", "recovered"), ("completed", "success"), ("completed", "success"))
    ]
    other.kill()
    later = app.create("Aloof")
    until(lambda: app.state(later) == "finished")
    assert is_unharmed(app, stopped)
    assert app.doctor() == []


def test_a_transactional_step_of_a_stopped_process_has_its_effect_once(app):
    workflow = app.create("Booked")
    stopped = app.start(*CONSUMER, APP_THRESHOLD="1")
    until(lambda: app.notes() == [f"{workflow} begins"])
    os.killpg(stopped.pid, signal.SIGSTOP)
    until(lambda: StepExecution.get().heartbeat_at < utcnow() - timedelta(seconds=1.1))
    app.start(*CONSUMER, APP_THRESHOLD="1")
    app.gate.touch()
    if "sqlite" not in app.env["APP_URL"]:  # there the stopped process keeps the one write lock
        until(lambda: app.state(workflow) == "finished")
        assert app.traces() == [f"{workflow} booked"]
    os.killpg(stopped.pid, signal.SIGCONT)
    until(lambda: app.notes().count(f"{workflow} ends") == app.notes().count(f"{workflow} begins"))
    later = app.create("Booked")
    until(lambda: {app.state(workflow), app.state(later)} == {"finished"})
    assert app.traces() == [f"{workflow} booked", f"{later} booked"]
    assert is_unharmed(app, stopped)
    assert app.doctor() == []


def test_clocks_that_differ_by_thirty_seconds_recover_nothing_that_lives_and_stop_nothing(servers, tmp_path):
    with running_app(tmp_path, servers.empty("postgresql")) as app:
        slow = app.create("Aloof")
        for offset in ("0", "-30"):
            app.start(*CONSUMER, APP_CLOCK=offset)
        until(lambda: app.notes() == [f"{slow} begins"])
        app.run("create_many", "Welcome", 5)
        app.run("create_many", "Welcome", 5, APP_CLOCK="-30")
        app.run("housekeeping", APP_CLOCK="30")
        until(lambda: Workflow.select().where(Workflow.state == "finished").count() == 10, 60)
        app.run("housekeeping", APP_CLOCK="30")
        app.gate.touch()
        until(lambda: app.state(slow) == "finished")
        assert app.notes() == [f"{slow} {what}" for what in ("begins", "ends", "two")]
        assert len(app.traces()) == 30
        assert {each.outcome for each in StepExecution.select()} == {"success"}


# How a consumer is told to end before its step has: its arguments, the signals, what it says before it gets the next.
INTERRUPTIONS = {
    "run": (RUN, ["SIGTERM", "SIGINT"], ["draining"]),
    "run after a timeout": ([*RUN, "1"], ["SIGTERM"], []),
    "threads": (CONSUMER, ["SIGTERM"], []),
    "processes": (PROCESSES, ["SIGTERM"], []),
    "threads after a timeout": ([*CONSUMER, "-g", "TERM", "-t", "1"], ["SIGTERM"], []),
    "processes after a timeout": ([*PROCESSES, "-g", "TERM", "-t", "1"], ["SIGTERM"], []),
    "threads asked twice": (CONSUMER, ["SIGINT", "SIGINT"], ["Shutting down gracefully"]),
}


@pytest.mark.parametrize("way", INTERRUPTIONS)
def test_the_step_of_a_consumer_that_is_interrupted_runs_again_at_once_in_the_next_one(servers, tmp_path, way):
    arguments, signals, answers = INTERRUPTIONS[way]
    kind = SERVERS[list(INTERRUPTIONS).index(way) % len(SERVERS)]
    with running_app(tmp_path, servers.empty(kind)) as app:
        workflow = app.create("Aloof")
        consumer = app.start(*arguments)
        until(lambda: app.notes() == [f"{workflow} begins"])
        for number, answer in zip(signals, [*answers, ""], strict=True):
            consumer.send_signal(signal.Signals[number])
            until(lambda answer=answer: answer in app.log())
        consumer.wait(timeout=30)
        app.gate.touch()
        app.start(*CONSUMER)
        until(lambda: app.state(workflow) == "finished")
        assert app.notes() == [f"{workflow} {what}" for what in ("begins", "begins", "ends", "two")]
        assert history(Workflow.get_by_id(workflow))[0] == ("one", "failed", "recovered")


@pytest.mark.parametrize(("app", "way"), ONE_WAY_EACH, indirect=["app"])
def test_the_step_of_a_consumer_that_is_killed_runs_again_at_once_in_the_next_one(app, way):
    workflow = app.create("Aloof")
    consumer = app.start(*WAYS[way])
    until(lambda: app.notes() == [f"{workflow} begins"])
    os.killpg(consumer.pid, signal.SIGKILL)
    app.start(*WAYS[way])  # at once, perhaps before the system has buried the other one
    app.gate.touch()
    until(lambda: app.state(workflow) == "finished")
    assert app.notes() == [f"{workflow} {what}" for what in ("begins", "begins", "ends", "two")]
    assert [each.outcome for each in StepExecution.select().order_by(StepExecution.id)] == [
        *("recovered", "success", "success")
    ]
    assert app.doctor() == []


@pytest.mark.parametrize(("app", "way"), ONE_WAY_EACH[:2], indirect=["app"])
@pytest.mark.exhaustive("postgresql")
def test_the_step_of_a_process_that_exits_is_soon_recovered_on_another_host_but_not_while_it_goes_on(app, way):
    workflow = app.create("Aloof")
    consumer = app.start(*WAYS[way], APP_EXIT="5", APP_PATIENCE="3")
    until(lambda: app.notes() == [f"{workflow} begins"])
    StepExecution.update(performed_by="another host/1/1").execute()  # about which nobody here knows anything
    consumer.send_signal(signal.SIGTERM)
    if way == "run":
        until(lambda: "draining" in app.log())
        consumer.send_signal(signal.SIGTERM)
    until(lambda: f"{consumer.pid} exits" in app.notes())
    time.sleep(4)  # longer than a process usually takes to exit: this one is still there
    app.run("housekeeping")
    assert history(Workflow.get_by_id(workflow)) == [("one", "in_progress", None)]
    consumer.wait(timeout=30)
    app.run("housekeeping", APP_CLOCK="4")
    assert history(Workflow.get_by_id(workflow))[0] == ("one", "failed", "recovered")
    assert app.notes()[:1] == [f"{workflow} begins"]
    assert app.doctor() == []


def test_a_second_signal_ends_the_waiting_for_all_queues(servers, tmp_path):
    with running_app(tmp_path, servers.empty("sqlite")) as app:
        workflows = app.create("Aloof"), app.create("Aloof", "premium")
        consumer = app.start(*RUN)
        until(lambda: sorted(app.notes()) == sorted(f"{each} begins" for each in workflows))
        consumer.send_signal(signal.SIGINT)
        until(lambda: "draining" in app.log())
        consumer.send_signal(signal.SIGINT)
        consumer.wait(timeout=30)
        assert sorted(app.notes()) == sorted(f"{each} begins" for each in workflows)


PLACES = list(range(400, 0, -1))  # in the order of the round


def make_places(app):
    rows = ", ".join(f"({number}, 'place')" for number in PLACES)
    app.db.execute_sql(f"insert into app_traces (id, what) values {rows}")
    return app.create("Round")


@pytest.mark.parametrize(("app", "way"), ONE_WAY_EACH, indirect=["app"])
def test_a_resumable_step_that_is_killed_again_and_again_repeats_what_its_last_checkpoint_did_not_keep(app, way):
    workflow = make_places(app)
    kills = 3
    for kill in range(kills):
        consumer = app.start(*WAYS[way], APP_BARRED=str(PLACES[35 + 100 * kill]))
        until(lambda kill=kill: f"{PLACES[35 + 100 * kill]}" in app.notes())
        os.killpg(consumer.pid, signal.SIGKILL)
    app.start(*WAYS[way])
    until(lambda: app.state(workflow) == "finished")
    expected, begin = [], 0
    for kill in range(kills):
        expected += PLACES[begin : 36 + 100 * kill]
        begin = 30 + 100 * kill
    assert app.notes() == [str(place) for place in expected + PLACES[begin:]] + ["two"]
    assert [each.outcome for each in Workflow.get_by_id(workflow).execution_history] == [
        *["recovered"] * kills,
        *["success"] * 2,
    ]
    assert app.doctor() == []


# How a consumer is asked to drain: its arguments, the signal, what it says then.
DRAINING = {
    "run, SIGTERM": (RUN, "SIGTERM", "draining"),
    "run, SIGINT": (RUN, "SIGINT", "draining"),
    "threads": (CONSUMER, "SIGINT", "Shutting down gracefully"),
    "threads, -g TERM": ([*CONSUMER, "-g", "TERM"], "SIGTERM", "Shutting down gracefully"),
    "processes": (PROCESSES, "SIGINT", "Shutting down gracefully"),
}


@pytest.mark.parametrize("way", DRAINING)
def test_draining_ends_the_step_under_way_and_leaves_the_next_in_the_tables(servers, tmp_path, way):
    arguments, number, answer = DRAINING[way]
    kind = SERVERS[list(DRAINING).index(way) % len(SERVERS)]
    with running_app(tmp_path, servers.empty(kind)) as app:
        workflow = app.create("Slow")
        consumer = app.start(*arguments)
        until(lambda: app.traces() == ["one begins"])
        consumer.send_signal(signal.Signals[number])
        until(lambda: answer in app.log())
        app.gate.touch()
        assert consumer.wait(timeout=30) == 0
        assert app.traces() == ["one begins", "one ends"]
        assert history(Workflow.get_by_id(workflow)) == [("one", "completed", "success"), ("two", "scheduled", None)]
        app.start(*RUN)
        until(lambda: app.state(workflow) == "finished")
        assert app.traces() == ["one begins", "one ends", "two"]


@pytest.mark.parametrize("way", DRAINING)
def test_a_resumable_step_of_a_consumer_that_drains_goes_on_in_the_next_one_and_repeats_nothing(servers, tmp_path, way):
    arguments, number, answer = DRAINING[way]
    kind = SERVERS[list(DRAINING).index(way) % len(SERVERS)]
    with running_app(tmp_path, servers.empty(kind)) as app:
        workflow = make_places(app)
        consumer = app.start(*arguments, APP_BARRED=str(PLACES[35]))
        until(lambda: f"{PLACES[35]}" in app.notes())
        consumer.send_signal(signal.Signals[number])
        until(lambda: answer in app.log())
        app.gate.touch()
        assert consumer.wait(timeout=30) == 0
        assert app.notes() == [str(place) for place in PLACES[:40]]
        assert history(Workflow.get_by_id(workflow)) == [
            ("one", "completed", "reattempted"),
            ("one", "scheduled", None),
        ]
        app.start(*CONSUMER)
        until(lambda: app.state(workflow) == "finished")
        assert app.notes() == [str(place) for place in PLACES] + ["two"]


@pytest.mark.parametrize(
    ("app", "way", "call"),
    [(*each, call) for each, call in zip(ONE_WAY_EACH, ("pause", "cancel", "pause"))],
    indirect=["app"],
)
def test_a_call_from_another_process_stops_a_resumable_step_at_its_next_checkpoint(app, way, call):
    def command(name):
        assert app.start("-m", "geneva_drive", "app:drive", name, workflow).wait(timeout=30) == 0

    workflow = make_places(app)
    app.start(*WAYS[way], APP_BARRED=str(PLACES[35]))
    until(lambda: f"{PLACES[35]}" in app.notes())
    command(call)
    app.gate.touch()
    until(lambda: history(Workflow.get_by_id(workflow)) == [("one", "canceled", "canceled")])
    assert app.notes() == [str(place) for place in PLACES[:40]]
    if call == "pause":
        assert app.state(workflow) == "paused"
        command("resume")
        until(lambda: app.state(workflow) == "finished")
        assert app.notes() == [str(place) for place in PLACES] + ["two"]
    assert app.doctor() == []


def test_a_strange_name_of_a_process_does_not_stop_recovery(drive, clock, hero):
    for name in ("worker-7", f"{gd._host()}/a/b", f"{gd._host()}/1", None):
        workflow = Plain.create(hero=User.create())
        gd._Attempt.claim(drive, scheduled(workflow).id)
        workflow.execution_history.get()._write(performed_by=name)
    assert drive.housekeeping()["stuck_in_progress_recovered"] == 0
    clock.forward(minutes=3)
    assert drive.housekeeping()["stuck_in_progress_recovered"] == 4


SIGNALS_ITSELF = """
import os, signal, sys
from peewee import SqliteDatabase
from geneva_drive import GenevaDrive

database, left = sys.argv[1], int(sys.argv[2])

def count(frame, event, argument):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGTERM)

GenevaDrive(SqliteDatabase(database)).run(until=lambda: sys.setprofile(count))
"""


def test_run_ends_on_a_signal_at_any_instant_of_its_loop(tmp_path, is_exhaustive):
    path = str(tmp_path / "app.db")
    database = SqliteDatabase(path)
    GenevaDrive(database).create_tables()
    database.close()
    where = {"output": sys.__stderr__, "errors": sys.__stderr__, "cwd": tmp_path, "env": {}}
    for first in range(1, 25, 4 if is_exhaustive else 8):  # a call, or a return from one, in the main thread
        some = [Process("-c", SIGNALS_ITSELF, path, instant, **where) for instant in range(first, first + 4)]
        try:
            assert [each.wait(timeout=20) for each in some] == [0] * 4
        finally:
            for each in some:
                each.kill()
                each.wait()


HANGS_IN_UNTIL = """
import signal, sys, time
from peewee import SqliteDatabase
from geneva_drive import GenevaDrive

def hang():
    handle = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *arguments: (print("signaled", flush=True), handle(*arguments)))
    print("asked", flush=True)
    time.sleep(60)

GenevaDrive(SqliteDatabase(sys.argv[1])).run(until=hang)
"""


def test_a_second_signal_interrupts_what_run_is_asked_until_when(tmp_path):
    path = str(tmp_path / "app.db")
    GenevaDrive(SqliteDatabase(path)).create_tables()
    process = python("-c", HANGS_IN_UNTIL, path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "asked\n"
    for _ in range(2):  # the second one after the first was handled: two that arrive at once are one
        process.terminate()
        assert process.stdout.readline() == "signaled\n"
    assert process.wait(timeout=20) == 0
    process.stdout.close()


@pytest.mark.parametrize("way", [*WAYS, "processes, -g TERM"])
def test_what_a_step_forks_has_the_handlers_of_signals_that_were_there_before(servers, tmp_path, way):
    arguments = {**WAYS, "processes, -g TERM": [*PROCESSES, "-g", "TERM"]}[way]
    with running_app(tmp_path, servers.empty("sqlite")) as app:
        app.create("Forks")
        consumer = app.start(*arguments)
        expected = [f"fork {signal.SIGTERM.value}", f"process {signal.SIGTERM.value} pool [1, 2]"]
        if "processes" in way:  # multiprocessing lets no child of its own have children
            del expected[1]
        until(lambda: app.notes() == expected)
        consumer.send_signal(signal.SIGINT)
        assert consumer.wait(timeout=30) == 0


class Wire:
    """A way to a server that can be cut without either end being told."""

    def __init__(self, url):
        server = urlsplit(url)
        self.to, self.sockets, self.is_cut = (server.hostname, server.port), [], False
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        self.url = server._replace(netloc=f"{server.username}@127.0.0.1:{port}").geturl()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                ends = self.listener.accept()[0], socket.create_connection(self.to)
                self.sockets += ends
                for source, target in (ends, ends[::-1]):
                    threading.Thread(target=self.pass_on, args=(source, target), daemon=True).start()

    def pass_on(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.is_cut:
                    target.sendall(data)
            if not self.is_cut:
                target.shutdown(socket.SHUT_RDWR)

    def close(self):
        for each in (self.listener, *self.sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the threads, which a close does not
            each.close()


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
def test_a_second_signal_ends_a_run_that_looks_into_a_database_that_never_answers_again(servers, tmp_path, kind):
    with contextlib.closing(Wire(servers.empty(kind))) as wire, contextlib.closing(App(tmp_path, wire.url)) as app:
        workflow = app.create("Aloof")
        process = app.start("app.py", "run_until_idle", APP_PATIENCE="1")
        until(lambda: app.notes() == [f"{workflow} begins"])
        wire.is_cut = True
        time.sleep(0.5)  # by then it looks
        for number in (signal.SIGTERM, signal.SIGINT):  # two of one kind that arrive at once are one
            process.send_signal(number)
        process.wait(timeout=20)


def is_group_gone(leader):
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


def test_worker_processes_end_their_steps_and_then_themselves_when_their_consumer_was_killed(servers, tmp_path):
    with running_app(tmp_path, servers.empty("postgresql")) as app:
        workflow = app.create("Aloof")
        consumer = app.start(*PROCESSES)
        until(lambda: app.notes() == [f"{workflow} begins"])
        consumer.kill()
        consumer.wait()
        app.gate.touch()
        until(lambda: is_group_gone(consumer.pid))
        assert history(Workflow.get_by_id(workflow))[0] == ("one", "completed", "success")


# How the database goes away and what is done then; the signals; what its step is at.
GONE_FOR_GOOD = {
    "killed, idle": (["SIGINT"], None),
    "cut off, idle": (["SIGINT"], None),
    "cut off, idle, SIGTERM": (["SIGTERM"], None),
    "cut off, to be recorded": (["SIGINT"], "record"),
    "killed, to be recorded, asked twice": (["SIGINT", "SIGTERM"], "record"),
    "cut off, in mid-step, asked twice": (["SIGINT", "SIGTERM"], "body"),
}


@pytest.mark.parametrize("case", GONE_FOR_GOOD)
@pytest.mark.parametrize(("kind", "way"), [("postgresql", "threads"), ("mysql", "processes"), ("postgresql", "run")])
@pytest.mark.exhaustive("threads", "processes")
def test_a_consumer_whose_database_is_gone_for_good_ends_when_it_is_told_to(servers, tmp_path, kind, way, case):
    signals, state = GONE_FOR_GOOD[case]
    wire = Wire(servers.empty(kind))
    app = App(tmp_path, wire.url)
    try:
        workflow = app.create("Aloof") if state else None
        connected = len(wire.sockets)
        consumer = app.start(*WAYS[way], APP_THRESHOLD="2", APP_PATIENCE="2")
        until(lambda: app.log().count("Huey consumer started") >= 2)  # of two queues, or told twice
        until(lambda: app.notes() == [f"{workflow} begins"] if state else len(wire.sockets) >= connected + 8)
        if "killed" in case:
            wire.close()
        wire.is_cut = True
        if state == "record":
            app.gate.touch()
            until(lambda: f"{workflow} ends" in app.notes())
        for number in signals:
            consumer.send_signal(signal.Signals[number])
            until(lambda: "draining" in app.log() or "Shutting down" in app.log())
        consumer.wait(timeout=30)
        until(lambda: is_group_gone(consumer.pid))
    finally:
        wire.close()
        app.close()


# ==== Rolling deploys: two versions of an application beside each other ===============================================

TOUR = re.search(r"^    one = step.*?\n\n", APP[APP.index("class Tour") :], re.MULTILINE | re.DOTALL)[0]
NEXT_TOUR = """
    zero = step("book", transactional=True)
    one = step("book", transactional=True)
    gone = removed_step()
    added = step("book", wait=0.5, transactional=True)
    old_name = removed_step()
    new_name = step("book", wait=0.5, transactional=True)
    last = step("book", transactional=True)

"""


def roll_out(old, new):
    """Replace one version of an application by another, while both perform steps and both create workflows."""
    drained, killed, *_ = old.start(*RUN), old.start(*CONSUMER), old.start("app.py", "create_on_and_on", "Tour")
    producer = new.start("app.py", "create_on_and_on", "Tour")
    until(lambda: "zero" in old.log(0) + old.log(1))  # a step that neither of them knows
    until(lambda: any("old_name" in what for what in old.traces()))
    new.start(*RUN)
    until(lambda: Workflow.select().count() >= 80)
    until(lambda: standing_later() >= {"gone", "old_name"})
    drained.terminate()
    killed.kill()
    assert drained.wait(timeout=30) == 0
    for process in (*old.processes, producer):
        process.kill()
        process.wait()
    new.start(*RUN)
    until(lambda: new.run("housekeeping", **HEALING) is not None and GenevaDrive(new.db).is_idle(), seconds=60)


def standing_later():
    """The steps that workflows wait at which are not due in a moment."""
    soon = utcnow() + timedelta(seconds=0.3)
    rows = StepExecution.select().where(StepExecution.state == "scheduled", StepExecution.scheduled_for > soon)
    return {row.step_name for row in rows}


@pytest.mark.parametrize("kind", SERVERS)
@ELSEWHERE
def test_a_rolling_deploy_that_removes_adds_and_renames_steps_strands_no_workflow(servers, tmp_path, kind):
    url = servers.empty(kind)
    with running_app(tmp_path / "old", url) as old:
        new = App(tmp_path / "new", url, source=APP.replace(TOUR, NEXT_TOUR))
        try:
            roll_out(old, new)
        finally:
            new.close()
        logs = [path.read_text() for app in (old, new) for path in app.folder.glob("log*")]
        assert not any("-> paused" in log for log in logs)
        workflows = list(Workflow.select())
        assert Counter(each.state for each in workflows) == {"finished": len(workflows)}
        performed, times = {each.id: set() for each in workflows}, Counter(new.traces())
        for what, count in times.items():
            assert count == 1, what
            workflow_id, name = what.split()
            performed[int(workflow_id)].add(name)
        for names_of_one in performed.values():
            assert {"one", "last"} <= names_of_one
            assert len({"old_name", "new_name"} & names_of_one) == 1
        assert set.union(*performed.values()) == {"zero", "one", "gone", "added", "old_name", "new_name", "last"}
        skipped = {row.step_name for row in StepExecution.select().where(StepExecution.state == "skipped")}
        assert skipped == {"gone", "old_name"}


# ==== Help for tests ==================================================================================================


def test_the_helpers_work_inside_a_tests_own_transaction(db, drive, hero, helpers):
    class Writes(Workflow):
        @step(on_exception="skip")
        def one(self):
            did("kept")
            raise OddError

        @step(on_exception="skip")
        def two(self):
            with db.atomic():
                did("nested")
            db.execute_sql("select nonsense from nowhere")

        @step(transactional=True)
        def three(self):
            did("three")

    with db.atomic() as transaction:
        workflow = Writes.create(hero=hero)
        helpers.speedrun_workflow(workflow)
        assert workflow.state == "finished"
        assert {"kept", "three"} <= set(effects())
        transaction.rollback()
    nothing_written(drive)
    assert effects() == []


def test_a_step_can_be_performed_out_of_turn(drive, hero, helpers):
    workflow = Plain.create(hero=hero)
    helpers.perform_step_inline(workflow, "two")
    assert history(workflow) == [
        ("one", "canceled", "canceled"),
        ("two", "completed", "success"),
        ("three", "scheduled", None),
    ]
    assert (workflow.current_step_name, effects()) == ("three", ["two"])


def test_failed_assertions_show_the_history(drive, hero, helpers):
    class Fails(Workflow):
        @step
        def one(self):
            raise OddError("what went wrong")

    workflow = Fails.create(hero=hero)
    helpers.speedrun_workflow(workflow, raise_errors=False)
    with pytest.raises(AssertionError, match=r"(?s)is paused: expected.*finished.*one .*failed.*what went wrong"):
        helpers.assert_workflow_state(workflow, "finished")
    with pytest.raises(AssertionError, match=r"an execution of one that is completed"):
        helpers.assert_step_executed(workflow, "one")
    with pytest.raises(AssertionError, match=r"no step is scheduled"):
        helpers.perform_next_step(workflow)

    class Endless(Workflow):
        @step
        def one(self):
            self.reattempt()

    with pytest.raises(AssertionError, match=r"not over after 7 steps"):
        helpers.speedrun_workflow(Endless.create(hero=hero), max_iterations=7)


def test_travelling_runs_each_step_at_its_own_time(drive, clock, hero, helpers):
    class Nudges(Workflow):
        @step
        def first(self):
            did("first")

        @step(wait=timedelta(days=2))
        def second(self):
            did("second")

        @step(wait=timedelta(days=7))
        def third(self):
            did("third")

    workflow = Nudges.create(hero=hero)
    helpers.travel(workflow, timedelta(days=1))
    assert (effects(), drive.clock()) == (["first"], START + timedelta(days=1))
    helpers.travel(workflow, timedelta(days=7, hours=23))  # an hour short of the third: waits add up
    assert (effects(), workflow.current_step_name) == (["first", "second"], "third")
    helpers.travel(workflow, 3600)
    assert (effects(), workflow.state) == (["first", "second", "third"], "finished")
    days = [(each.started_at - START) / timedelta(days=1) for each in workflow.execution_history]
    assert days == [0, 2, 9]
    assert drive.clock() == START + timedelta(days=9)
    clock.forward(days=1)  # the test's own clock counts on below
    assert drive.clock() == START + timedelta(days=10)


def test_travelling_for_exactly_the_wait_runs_the_step_though_a_real_clock_goes_on(drive, hero, helpers):
    workflow = Plain.create(hero=hero)
    helpers.travel(workflow, timedelta(days=2))
    assert (workflow.state, effects()) == ("finished", ["one", "two", "three"])
    assert repr(workflow) == f"<Plain {workflow.id}: finished>"
    assert repr(Plain.create(hero=User.create())).endswith(": ready at one>")


def test_a_real_clock_goes_on_from_where_one_travelled_to(drive, hero, helpers):
    workflow = Plain.create(hero=hero)
    helpers.travel(workflow, timedelta(days=3))
    assert workflow.state == "finished"
    first, second = drive.clock(), drive.clock()
    assert timedelta(days=3) <= first - datetime.now(timezone.utc) + timedelta(minutes=1)
    until(lambda: drive.clock() > second)


def test_travelling_stops_at_an_error_and_passes_over_what_is_paused(drive, clock, hero, helpers):
    class Fails(Workflow):
        @step(wait=timedelta(days=1))
        def one(self):
            raise OddError("what went wrong")

    workflow = Fails.create(hero=hero)
    with pytest.raises(OddError):
        helpers.travel(workflow, timedelta(days=5))
    assert (workflow.state, drive.clock()) == ("paused", START + timedelta(days=1))
    helpers.travel(workflow, timedelta(days=5))
    assert (workflow.state, drive.clock()) == ("paused", START + timedelta(days=6))
    other = Fails.create(hero=User.create())
    helpers.travel(other, timedelta(days=5), raise_errors=False)
    assert (other.state, drive.clock()) == ("paused", START + timedelta(days=11))


def test_travelling_gives_up_on_a_step_that_falls_due_without_end(drive, clock, hero, helpers):
    class Endless(Workflow):
        @step
        def one(self):
            self.reattempt(wait=timedelta(minutes=1))

    workflow = Endless.create(hero=hero)
    with pytest.raises(AssertionError, match=r"(?s)is due still after 3 steps.* one .*reattempted"):
        helpers.travel(workflow, timedelta(days=1), max_iterations=3)
    assert len(history(workflow)) == 4
    helpers.travel(Endless.create(hero=User.create()), timedelta(minutes=2.5), max_iterations=3)
    with pytest.raises(ValueError, match=r"^travel\(\): duration must be .*, not -datetime.timedelta\(days=1\)$"):
        helpers.travel(workflow, timedelta(days=-1))


def test_travelling_heeds_computed_waits_and_asks_them_again(drive, clock, helpers):
    hero = User.create(visits=10)
    workflow = Trial.create(hero=hero)
    helpers.travel(workflow, timedelta(days=1))
    helpers.assert_next_step(workflow, "bill", due=START + timedelta(days=10))
    helpers.assert_next_step(workflow, "bill", due=timedelta(days=9))
    User.update(visits=20).execute()
    helpers.travel(workflow, timedelta(days=10))
    helpers.assert_next_step(workflow, "bill", due=timedelta(days=9).total_seconds())
    helpers.travel(workflow, timedelta(days=10))
    assert (effects(), workflow.state) == (["begin", "bill None"], "finished")
    assert workflow.execution_history[-1].started_at == START + timedelta(days=20)


def test_what_comes_next_and_when_can_be_asserted(drive, clock, hero, helpers):
    workflow = Plain.create(hero=hero)
    helpers.assert_next_step(workflow, "one")
    helpers.assert_next_step(workflow, "one", due=0)
    with pytest.raises(AssertionError, match=r"(?s)is ready: expected two to be scheduled\. Its exec.*one +scheduled"):
        helpers.assert_next_step(workflow, "two")
    with pytest.raises(
        AssertionError, match=r"one to be scheduled for 2026-03-01 12:01:00\+00:00, not for 2026-03-01 12:00"
    ):
        helpers.assert_next_step(workflow, "one", due=60)
    with pytest.raises(AssertionError, match=r"expected it to wait for the signal go"):
        helpers.assert_waiting_for(workflow, "go")
    payment = Payment.create(hero=hero)
    helpers.assert_waiting_for(payment, "confirmed")
    helpers.assert_next_step(payment, "confirm", due=timedelta(days=3))
    with pytest.raises(AssertionError):
        helpers.assert_waiting_for(payment, "declined")
    payment.pause()
    with pytest.raises(AssertionError, match=r"is paused: expected it to wait"):
        helpers.assert_waiting_for(payment, "confirmed")
    payment.cancel()
    with pytest.raises(AssertionError, match=r"is canceled: expected confirm to be scheduled"):
        helpers.assert_next_step(payment, "confirm")
    with pytest.raises(TypeError, match=r"due must be"):
        helpers.assert_next_step(workflow, "one", due="tomorrow")


class TestWithUnittest(gd.TestHelpers, unittest.TestCase):
    def test_the_mixin_works_under_unittest(self):
        db = SqliteDatabase(":memory:")
        GenevaDrive(db).create_tables()
        for model in MODELS:
            model.bind(db)
        db.create_tables(MODELS)
        workflow = Quick.create(hero=User.create())
        self.speedrun_workflow(workflow)
        self.assert_workflow_state(workflow, "finished")
        self.assert_step_executed(workflow, "two")
        db.close()

    def test_the_clock_is_put_back_at_the_end_of_a_test(self):
        class Travels(gd.TestHelpers, unittest.TestCase):
            def runTest(self):
                workflow = Plain.create(hero=User.create())
                for _ in range(3):
                    self.travel(workflow, timedelta(days=1))
                assert drive.clock is not clock
                self.assert_workflow_state(workflow, "finished")

        db, clock = SqliteDatabase(":memory:"), Clock()
        drive = GenevaDrive(db, clock=clock)
        drive.create_tables()
        for model in MODELS:
            model.bind(db)
        db.create_tables(MODELS)
        result = unittest.TestResult()
        Travels().run(result)
        assert result.wasSuccessful(), result.errors
        assert drive.clock is clock
        db.close()


def test_the_mixin_itself_is_not_collected():
    assert gd.TestHelpers.__test__ is False
    assert TestWithUnittest.__test__ is True


# ==== Command line ====================================================================================================


@pytest.fixture
def command_line(drive, monkeypatch, capsys):
    """Runs a command on the test's drive: `command_line("show", 7)` returns the exit code, the output, the errors."""
    shop = types.ModuleType("shop")
    shop.drive, shop.other, shop.__spec__ = drive, drive.database, ModuleSpec("shop", None)
    monkeypatch.setitem(sys.modules, "shop", shop)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments, app="shop:drive"):
        status = gd.main([app, *map(str, arguments)])
        return status, *capsys.readouterr()

    yield run
    logging.getLogger("huey").setLevel(logging.NOTSET)


def test_show_tells_for_when_a_recurring_workflow_was_created(drive, clock, recurring, command_line):
    Nightly = recurring()
    look(drive, "2 03:02:00")
    assert "  occurs at: 2 min ago, 2026-03-02 03:00:00Z\n" in command_line("show", Nightly.select().get().id)[1]


class Charged(Workflow):
    workflow_type = "shop.Charged"

    @step(on_exception="reattempt", max_reattempts=1)
    def charge_the_card(self):
        raise OddError("the bank \x1b[31mis closed\x07 \u202e and " + 60 * "so on, ")

    @step(wait=timedelta(days=9))
    def two(self):
        pass


@pytest.fixture
def failed(drive, clock, hero, helpers):
    """A workflow that failed twice, an hour apart, and is paused since a day."""
    workflow = Charged.create(hero=hero, context={"invoice": 7})
    for _ in range(2):
        helpers.speedrun_workflow(workflow, max_iterations=2, raise_errors=False)
        clock.forward(hours=1)
    clock.forward(days=1)
    return workflow


def test_show_draws_the_attempts_with_their_errors_and_says_what_to_do_next(command_line, failed, helpers, clock):
    status, output, _ = command_line("show", failed.id)
    lines = output.splitlines()
    assert status == 0
    assert lines[0] == f"shop.Charged {failed.id} of User {failed.hero_id}: paused at charge_the_card"
    assert lines[1] == "  created: 1 d ago, 2026-03-01 12:00:00Z"
    assert '  context: {"invoice": 7}' in lines
    assert lines[-1].endswith(f" shop:drive resume {failed.id}  (or skip, cancel)")
    assert re.search(r"^1  charge_the_card  reattempted +!", output, re.MULTILINE)
    assert re.search(r"^2  charge_the_card  failed +!", output, re.MULTILINE)
    assert r"OddError: the bank \x1b[31mis closed\x07 \u202e and so on" in output
    assert "… (see --json)" in output
    failed.skip()
    clock.forward(days=3)
    _, output, _ = command_line("show", failed.id)
    assert re.search(r"^4  two +scheduled +·{20,} +in 6 d$", output, re.MULTILINE)
    assert output.splitlines()[-1].endswith(f"shop:drive skip {failed.id}  (or pause, cancel)")
    failed.cancel()
    assert "You may" not in command_line("show", failed.id)[1]


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_tables_fit_the_terminal(command_line, drive, clock, monkeypatch, columns):
    class Long(Workflow):
        workflow_type = "billing.monthly.Invoicing 日本語 and whatever else is to be done"

        @step(name="a_step_that_has_rather_much_to_say_about_itself")
        def one(self):
            pass

    workflow = Long.create(hero=Country.create(code="日" * 30, force_insert=True))
    Plain.create(hero=User.create())
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (["list"], ["stats"], ["show", workflow.id]):
        _, output, _ = command_line(*command)
        title, *lines = output.splitlines()
        room = {40: 90, 80: 80, 160: 160}[columns]  # below some width, lines are left to the terminal to break
        assert max(map(gd._width, lines)) <= room, output
        assert gd._width(title) <= room or command[0] == "show"  # which has the names in full
    monkeypatch.delenv("COLUMNS")
    assert Long.workflow_type in command_line("list")[1]  # no terminal: nothing is cut


def test_list_narrows_by_state_class_and_hero(command_line, drive, clock, helpers, monkeypatch):
    dogs = [Dog.create(hero=User.create()) for _ in range(3)]
    cat = Cat.create(hero=User.create())
    dogs[0].pause()
    Workflow.update(type="Horse").where(Workflow.id == dogs[2].id).execute()

    def listed(*options):
        status, output, _ = command_line("list", "--json", *options)
        assert status == 0
        return [each["id"] for each in json.loads(output)]

    assert listed() == [cat.id, *(dog.id for dog in reversed(dogs))]
    assert listed("--type", "Animal") == [cat.id, dogs[1].id, dogs[0].id]
    assert listed("--type", "Horse") == [dogs[2].id]  # no class defines it any more
    assert listed("--state", "paused", "--type", "Dog") == [dogs[0].id]
    assert listed("--hero", f"User:{cat.hero_id}") == [cat.id]
    assert listed("--limit", 1) == [cat.id]
    assert "1 of 4: use --limit 4" in command_line("list", "--limit", 1)[1]
    assert command_line("list", "--hero", "User:none")[1] == "no workflow matches\n"
    clock.forward(hours=2)
    assert re.search(r"paused +\w+ +2 h ago +a person$", command_line("list")[1], re.MULTILINE)
    for columns in ("160", "0"):  # room for the moment, too; or no terminal
        monkeypatch.setenv("COLUMNS", columns)
        assert re.search(
            r"paused +\w+ +2 h ago, 2026-03-01 12:00:00Z +a person$", command_line("list")[1], re.MULTILINE
        )


class Mailing(Workflow):
    @step
    def send(self):
        if mail_server:
            raise type(mail_server)(*mail_server.args)

    @step(wait=timedelta(days=3))
    def remind(self):
        self.send()


mail_server = None


@pytest.fixture
def mails(drive, clock, monkeypatch):
    """Sends mails to so many users, through a server with this error, if any; returns the ids of their workflows."""

    def send(number, error=None):
        monkeypatch.setitem(globals(), "mail_server", error)
        query = Mailing.select().where(Mailing.id > (Mailing.select(peewee.fn.MAX(Mailing.id)).scalar() or 0))
        heroes = [{"name": f"user {each}"} for each in range(number)]
        with drive.database.atomic():
            User.insert_many(heroes).execute()
            Mailing.create_many(User.select().order_by(User.id.desc()).limit(number))
            workflows = list(query.order_by(Mailing.id))
        work_off(drive, limit=number + 1)
        monkeypatch.setitem(globals(), "mail_server", None)
        return [each.id for each in workflows]

    return send


def rows(*ids):
    """All that the tables hold about these workflows."""
    columns = [tuple(model.select().where(key.in_(ids)).order_by(model.id).tuples()) for model, key in KEYS]
    return [list(each) for each in columns]


KEYS = ((Workflow, Workflow.id), (StepExecution, StepExecution.workflow))


@ELSEWHERE
def test_a_night_is_mended_from_the_terminal_and_nothing_else_is_touched(command_line, drive, clock, mails):
    before = mails(40)  # they wait for their second step
    refused = mails(300, ConnectionRefusedError(111, "Connection refused"))
    clock.forward(minutes=30)
    cut_off = mails(200, TimeoutError("timed out after 10 s"))
    other = mails(1, OddError("the user has no mailbox"))
    held = mails(2)
    assert command_line("pause", held[0], "--reason", "a holiday until 2026-04-01")[0] == 0
    clock.forward(hours=3)

    lines = command_line("stats")[1].splitlines()  # found
    at = lines.index("PAUSED  TYPE     STEP    WHY")
    assert lines[at + 1 : at + 5] == [
        "   300  Mailing  send    ConnectionRefusedError",
        "   200  Mailing  send    TimeoutError",
        "     1  Mailing  remind  a person: a holiday until …",
        "     1  Mailing  send    OddError",
    ]
    assert "shop:drive list --state paused --error TEXT (or --why TEXT)" in lines[at + 5]
    status, output, _ = command_line("list", "--state", "paused", "--why", "refused")  # understood
    assert (status, output.count("4 h ago    ConnectionRefusedError: [")) == (0, 50)
    assert output.endswith("\n50 of 300: use --limit 300, or select less (see list --help)\n")
    shown = command_line("show", refused[7])[1]
    assert "    ConnectionRefusedError: [Errno 111] Connection refused\n" in shown
    assert "waits for" not in shown
    assert f"Mend the cause, then: {shown.rpartition('then: ')[2]}".endswith(
        f"resume {refused[7]}  (or skip, cancel)\n"
    )

    untouched = rows(*before, *other, *held)
    assert command_line("cancel", refused[7], "--reason", "asked to be left alone")[0] == 0
    refused.remove(refused[7])
    paused = rows(*refused, *cut_off)
    mend = ("resume", "--state", "paused", "--type", "Mailing", "--reason", "the mail server is back")
    status, output, _ = command_line(*mend, "--error", "refused", "--dry-run")
    assert (status, len(output.splitlines())) == (0, 300)
    assert output.endswith("\n299 of 299; the same without --dry-run does it\n")
    assert rows(*refused, *cut_off) == paused
    assert command_line(*mend, "--error", "refused")[1].endswith("\n299 of 299\n")
    assert Mailing.paused().count() == 202
    assert command_line(*mend, "--error", "timeouterror")[1].endswith("\n200 of 200\n")
    assert command_line(*mend, "--error", "timeouterror")[1] == "no workflow matches\n"

    assert rows(*before, *other, *held) == untouched
    resumed = StepExecution.select().where(StepExecution.begun_reason == "the mail server is back")
    assert {each.workflow_id for each in resumed} == {*refused, *cut_off}
    work_off(drive, limit=500)
    assert Counter(each.state for each in Mailing.select()) == {"ready": 40 + 499 + 1, "paused": 2, "canceled": 1}
    assert Mailing.canceled().get().reason == "asked to be left alone"
    assert drive.doctor() == []


def test_selections_narrow_together(command_line, drive, clock, mails, helpers):
    refused, named = mails(2, ConnectionRefusedError("100%_busy")), mails(1, OddError("no mailbox ünknown"))
    clock.forward(hours=2)
    sent, asking = mails(2), Payment.create(hero=User.create())
    Workflow.get_by_id(sent[0]).pause(reason="a Holiday")
    clock.forward(minutes=1)
    asking_too = Payment.create(hero=User.create())
    asking_too.pause()

    def listed(*options):
        status, output, _ = command_line("list", "--json", *options)
        assert status == 0
        return sorted(each["id"] for each in json.loads(output))

    assert listed("--error", "REFUSED") == listed("--error", "0%_b") == refused
    assert listed("--error", "0%%b") == listed("--error", "0__b") == []
    assert listed("--error", "no mailbox") == listed("--error", "odderror") == listed("--why", "OddError: no") == named
    assert listed("--error", "odderror: no mailbox") == listed("--error", "OddError: ") == named  # as WHY shows it
    assert listed("--error", "OddError: mailbox") == listed("--error", "holiday") == []
    assert listed("--why", "holiday") == [sent[0]]
    assert listed("--waiting-for", "confirmed") == [asking.id, asking_too.id]
    assert listed("--waiting-for", "confirmed", "--state", "ready") == [asking.id]
    assert listed("--waiting-for", "confirm") == []
    assert listed("--older-than", "2h") == refused + named
    assert listed("--older-than", "60s") == sorted([*refused, *named, *sent, asking.id])
    assert listed("--older-than", "1min", "--waiting-for", "confirmed") == [asking.id]
    assert listed("--older-than", "2h", "--error", "refused", "--state", "paused", "--type", "Mailing") == refused
    assert listed("--parent", asking.id) == []
    children = [Plain.create(hero=User.create(), parent=asking) for _ in range(2)]
    children[0].cancel()
    assert listed("--parent", asking.id) == [each.id for each in children]
    assert listed("--parent", asking.id, "--state", "canceled") == [children[0].id]
    children[1].cancel()
    assert listed("--step", "send", "--why", "no mailbox", "--hero", f"User:{reload_id(named[0]).hero_id}") == named
    gd._Attempt.claim(drive, scheduled(Plain.create(hero=User.create())).id)
    clock.forward(minutes=9)
    assert listed("--state", "performing", "--older-than", "10min") == []
    assert len(listed("--state", "performing", "--older-than", "9min")) == 1


def reload_id(workflow_id):
    return Workflow.get_by_id(workflow_id)


def test_list_tells_apart_what_waits_for_a_person_a_signal_a_time_and_a_worker(
    command_line, drive, clock, mails, helpers, monkeypatch
):
    class Again(Workflow):
        @step(on_exception=ExceptionPolicy("reattempt", wait=3600, jitter=0))
        def one(self):
            raise OddError

    failed, timed = mails(1, OddError("no mailbox")), mails(4)
    due, asking, again = (
        Plain.create(hero=User.create()),
        Payment.create(hero=User.create()),
        Again.create(hero=User.create()),
    )
    helpers.perform_next_step(again, raise_errors=False)
    claimed = Plain.create(hero=User.create())
    gd._Attempt.claim(drive, scheduled(claimed).id)
    parent, (child,) = household()
    held, bare, canceled, later = map(reload_id, timed)
    held.pause(reason="on holiday")
    bare.pause()
    canceled.cancel(reason="withdrawn")
    clock.forward(minutes=5)
    told = {
        failed[0]: ("", "OddError: no mailbox"),
        held.id: ("a person", "a person: on holiday"),
        bare.id: ("a person", "a person"),
        canceled.id: ("", "withdrawn"),
        later.id: ("its time", "its time"),
        due.id: ("a worker", "a worker"),
        asking.id: ("the signal confirmed", "the signal confirmed"),
        again.id: ("its time, to try again after 1 of its errors",) * 2,
        claimed.id: ("", ""),
        parent.id: ("its children", "its children"),
        child.id: ("a worker", "a worker"),
    }
    assert {each["id"]: each["waits_for"] for each in json.loads(command_line("list", "--json")[1])} == {
        each: waits_for for each, (waits_for, _) in told.items()
    }
    monkeypatch.setenv("COLUMNS", "0")  # nothing is cut
    title, *lines = command_line("list")[1].splitlines()
    shown = {int(line.split()[0]): line[title.index("WHY") :] for line in lines}
    assert shown == {each: why for each, (_, why) in told.items()}
    for workflow_id, (waits_for, _) in told.items():
        output = command_line("show", workflow_id)[1]
        assert re.findall("^  waits for: (.*)$", output, re.MULTILINE) == [waits_for] * bool(waits_for)
        assert ("Mend the cause" in output) == (workflow_id in failed)
        assert json.loads(command_line("show", workflow_id, "--json")[1])["waits_for"] == waits_for
    StepExecution.delete().where(StepExecution.workflow == due.id).execute()  # nobody's doing, but it must be seen
    assert command_line("list", "--type", "Plain")[1].count("Plain") == 2
    assert command_line("show", due.id)[0] == 0
    Workflow.delete().execute()


def test_show_says_what_ended_each_attempt_and_by_whom(command_line, drive, clock, hero, helpers):
    class Told(Workflow):
        @step(skip_if=lambda self: True)
        def one(self):
            pass

        @step
        def two(self):
            if self.execution_history.count() == 2:
                self.reattempt(reason="not yet")
            self.pause(reason="for the boss")

        @step
        def three(self):
            pass

        @step(on_exception=lambda self, error: self.cancel(reason="a bad sign"))
        def four(self):
            raise OddError("four\nlines")

    workflow = Told.create(hero=hero)
    for _ in range(3):
        helpers.perform_next_step(workflow)
    workflow.skip(reason="he agrees")
    workflow.skip()
    helpers.perform_next_step(workflow, raise_errors=False)
    output = command_line("show", workflow.id)[1]
    lines = [re.sub(r"^(\d)  (\w+) +(\w+) .*", r"\1 \2 \3", line) for line in output.splitlines()]
    start = next(place for place, line in enumerate(lines) if line.startswith("#"))
    assert lines[start + 1 : -1] == [
        *("1 one skipped", "    by the workflow itself"),
        *("2 two reattempted", "    by the workflow itself: not yet"),
        *("3 two canceled", "    by the workflow itself: for the boss"),
        *("4 two skipped", "    by a call from outside: he agrees"),
        *("5 three skipped", "    by a call from outside"),
        *("6 four canceled", "    test_geneva_drive.OddError: four lines", "    a bad sign"),
        "· waited   █ performed   ! failed or died",
    ]
    dead = Plain.create(hero=hero)
    gd._Attempt.claim(drive, scheduled(dead).id)
    clock.forward(minutes=5)
    housekeeping_elsewhere(drive)
    assert "    its process died\n" in command_line("show", dead.id)[1]


def test_what_changed_since_it_was_selected_is_left_alone(command_line, drive, mails, monkeypatch):
    first, second, third = mails(3, OddError("no mailbox"))
    before = rows(second)

    def controlled(self, workflow_id, make, inner=gd._CommandLine._controlled):
        if workflow_id == second:  # somebody else is at it, too
            StepExecution.update(error_class_name="Other", error_message="").where(
                StepExecution.workflow == second
            ).execute()
            Workflow.update(reason="Other").where(Workflow.id == second).execute()
            before[:] = rows(second)
        return inner(self, workflow_id, make)

    monkeypatch.setattr(gd._CommandLine, "_controlled", controlled)
    status, output, _ = command_line("resume", "--error", "OddError")
    assert (status, rows(second)) == (1, before)
    assert f"{second}: there is no workflow {second} that is selected any more: see " in output
    assert output.endswith("\n2 of 3\n")
    assert [reload_id(each).state for each in (first, third)] == ["ready", "ready"]


def test_paused_workflows_are_grouped_by_class_step_and_what_paused_them(
    drive, clock, mails, command_line, monkeypatch
):
    assert drive.paused_groups() == []
    ids = [each for number in range(12) for each in mails(1, OddError(f"no mailbox {number}"))]
    held = mails(4)
    for number, each in enumerate(held):
        reload_id(each).pause(reason=f"order {number}-{uuid.uuid4()} is held until somebody has had time to look at it")
    bare = mails(1)
    reload_id(bare[0]).pause()
    died = mails(1)
    StepExecution.update(outcome="recovered").where(StepExecution.workflow == died[0]).execute()
    Workflow.update(state="paused", reason="its process died 6 times").where(Workflow.id == died[0]).execute()
    groups = [
        ("Mailing", "send", "OddError", ids[::-1]),
        ("Mailing", "remind", "a person: order … is held until somebody has had t", held[::-1]),
        ("Mailing", "remind", "a person", bare),
        ("Mailing", "remind", "its process died … times", died),
    ]
    assert drive.paused_groups() == groups
    assert isinstance(drive.paused_groups()[0], gd.PausedGroup)
    monkeypatch.setattr(gd, "MAX_SHOWN", 1)
    assert re.search(r"\n3 more: use --json; see .* list --state paused", command_line("stats")[1])
    monkeypatch.setattr(gd, "MAX_GROUPED", 3)
    assert [len(each.ids) for each in drive.paused_groups()] == [1, 1, 1]
    Workflow.delete().execute()


def test_flow_control_reports_each_and_does_not_stop_at_a_failure(command_line, drive, helpers, told, caplog):
    first, over, last = [Plain.create(hero=User.create()) for _ in range(3)]
    over.cancel()
    ids = (first.id, over.id, 10**9, last.id)
    caplog.set_level(logging.INFO, "geneva_drive")
    told.clear()
    status, output, _ = command_line("pause", *ids, "--dry-run")
    assert (status, told, caplog.messages) == (1, [], [])
    assert f"would pause Plain {last.id} of User {last.hero_id}: ready at one" in output
    assert [reload(each).state for each in (first, over, last)] == ["ready", "canceled", "ready"]
    status, output, _ = command_line("pause", *ids)
    assert (status, len(output.splitlines())) == (1, 4)
    assert f"Plain {first.id} of User {first.hero_id}: paused at one, was ready" in output
    assert "pause() was refused: it is allowed when ready, performing" in output
    assert "there is no workflow 1000000000: see " in output
    assert [reload(each).state for each in (first, over, last)] == ["paused", "canceled", "paused"]
    status, output, _ = command_line(
        "resume", "--type", "Plain", "--json"
    )  # those that can be, where no state is given
    assert status == 0
    assert [(each["id"], each["state"], each["error"]) for each in json.loads(output)] == [
        (first.id, "ready", None),
        (last.id, "ready", None),
    ]
    assert command_line("resume", "--type", "Plain") == (0, "no workflow matches\n", "")
    assert command_line("cancel", "--state", "canceled")[0] == 1
    assert command_line("skip", "--hero", f"User:{last.hero_id}")[0] == 0
    assert reload(last).current_step_name == "two"
    gd._Attempt.claim(drive, scheduled(first).id)
    assert command_line("pause", first.id)[1].endswith(
        ": performing at one, to pause when this step ends, was performing\n"
    )
    assert command_line("pause", first.id, "--dry-run")[0] == 1


def test_reasons_are_given_and_shown_on_the_command_line(command_line, drive, hero):
    workflow = Plain.create(hero=hero)
    assert command_line("pause", workflow.id, "--reason", "a \x1b[31m holiday")[0] == 0
    shown = command_line("show", workflow.id)[1]
    assert r"  reason: a \x1b[31m holiday" in shown.splitlines()
    command_line("resume", workflow.id, "--reason", "it is over")
    command_line("skip", workflow.id, "--reason", "done by hand")
    command_line("resume", "--at", "three", workflow.id, "--reason", "refused")
    command_line("cancel", workflow.id, "--reason", "withdrawn")
    lines = command_line("show", workflow.id)[1].splitlines()
    by_whom = {f"    by a call from outside: {reason}" for reason in ("done by hand", "withdrawn")}
    assert {"    resumed: it is over", "  reason: withdrawn", *by_whom} < {*lines}
    assert json.loads(command_line("list", "--json")[1])[0]["reason"] == "withdrawn"
    assert command_line("resume", "--at", "two", "--state", "canceled", "--reason", "back")[0] == 0
    assert scheduled(workflow).begun_reason == "back"
    assert command_line("resume", "--at", "two", "--type", "Plain") == (0, "no workflow matches\n", "")


def test_after_a_deploy_that_shortened_a_wait_one_command_brings_all_to_what_is_declared(command_line, drive, clock):
    def deploy(days):
        class Deployed(Workflow):
            @step
            def first(self):
                pass

            @step(wait=timedelta(days=days))
            def second(self):
                assert self.hero.name != "broken"

        return Deployed

    cls = deploy(7)
    cls.create_many([User.create() for _ in range(5)])
    there = list(cls.select().order_by(cls.id))
    for each in there[:4]:
        each.skip()
    there[3].pause()
    broken = cls.create(hero=User.create(name="broken"))  # has nothing that is scheduled
    gd.TestHelpers().speedrun_workflow(broken, raise_errors=False)
    assert (broken.state, broken.current_step_name) == ("paused", "second")
    other = Tomorrow.create(hero=User.create())
    before = scheduled(other).scheduled_for
    clock.forward(hours=1)
    deploy(1)
    selection = ("--type", "Deployed", "--step", "second", "--as-declared")
    status, output, _ = command_line("reschedule", *selection, "--dry-run")
    assert (status, output.count("would reschedule Deployed")) == (0, 4)
    assert scheduled(there[0]).scheduled_for == START + timedelta(days=7)
    assert command_line("reschedule", *selection)[0] == 0
    assert [scheduled(each).scheduled_for for each in there[:4]] == [START + timedelta(days=1)] * 4
    assert [reload(each).state for each in there[:4]] == ["ready"] * 3 + ["paused"]
    assert scheduled(there[4]).step_name == "first"
    assert scheduled(other).scheduled_for == before
    status, _, problem = command_line("reschedule", other.id, "--in", "9" * 20 + "d")
    assert (status, "argument --in: it must be neither negative nor over a hundred years" in problem) == (2, True)
    assert command_line("reschedule", other.id, "--in", "1d 2h30min")[0] == 0
    assert scheduled(other).scheduled_for == START + timedelta(days=1, hours=3, minutes=30)
    assert command_line("reschedule", other.id, "--at", "2026-04-01T12:00Z")[0] == 0
    assert scheduled(other).scheduled_for == datetime(2026, 4, 1, 12, tzinfo=timezone.utc)
    assert command_line("reschedule", other.id, "--at", "2026-04-01 12:00:00+02:00")[0] == 0
    assert scheduled(other).scheduled_for == datetime(2026, 4, 1, 10, tzinfo=timezone.utc)


def test_what_a_program_may_read_comes_as_json_too(command_line, drive, failed):
    shown = json.loads(command_line("show", failed.id, "--json")[1])
    assert (shown["id"], shown["state"], shown["context"]) == (failed.id, "paused", {"invoice": 7})
    assert [each["outcome"] for each in shown["executions"]] == ["reattempted", "failed"]
    assert shown["executions"][0]["error_message"].startswith("the bank \x1b[31mis closed")
    assert datetime.fromisoformat(shown["created_at"]) == START
    (listed,) = json.loads(command_line("list", "--json")[1])
    assert listed["id"] == failed.id
    group = {"type": "shop.Charged", "step_name": "charge_the_card", "why": "OddError", "ids": [failed.id]}
    assert json.loads(command_line("stats", "--json")[1]) == [*(each._asdict() for each in drive.stats()), group]
    assert json.loads(command_line("housekeeping", "--json")[1]) == drive.housekeeping()
    assert json.loads(command_line("doctor", "--json")[1]) == []


def test_stats_housekeeping_and_doctor_speak_to_people(command_line, drive, clock, failed):
    Plain.create(hero=User.create())
    clock.forward(seconds=30)
    _, output, _ = command_line("stats")
    assert re.search(r"^shop\.Charged +0 +0 +1 +0 +0 +100 +0$", output, re.MULTILINE)
    assert output.endswith("overdue steps: 1, the oldest due 30 s ago, 2026-03-02 14:00:00Z\n")
    assert re.search(r"^workflows_cleaned_up +0$", command_line("housekeeping")[1], re.MULTILINE)
    assert command_line("doctor") == (0, "all is sound\n", "")
    Workflow.update(current_step_name=None).execute()
    status, output, _ = command_line("doctor")
    assert (status, output.count("stands at the step")) == (1, 2)
    Workflow.delete().execute()


@pytest.mark.parametrize(
    ("arguments", "app", "problem"),
    [
        ([], "shop", "the following arguments are required: COMMAND"),
        (["dance"], "shop", "invalid choice: 'dance'"),
        (["list", "--state", "asleep"], "shop", "invalid choice: 'asleep'"),
        (["show", "seven"], "shop", "invalid int value: 'seven'"),
        (["list", "--hero", "User"], "shop", "it must be TYPE:ID, such as User:7"),
        (["list", "--type", "Nobody"], "shop", "no workflow class is called 'Nobody': use "),
        (["graph", "Nobody"], "shop", "no workflow class is called 'Nobody': use "),
        (["cancel"], "shop", "cancel: give ids, or some of --state, --type, --hero, --step"),
        (["cancel", "--why", ""], "shop", "--why: it must not be empty; leave it out to select whatever it is"),
        (["list", "--older-than", "soon"], "shop", "'soon' is no duration such as 2d"),
        (["list", "--parent", "mine"], "shop", "argument --parent: invalid int value: 'mine'"),
        (["reschedule", "7"], "shop", "reschedule: give one of --in, --at and --as-declared"),
        (["reschedule", "7", "--in", "2d", "--as-declared"], "shop", "give one of --in, --at and --as-declared"),
        (["reschedule", "7", "--in", "2d", "--at", "2026-03-01T12:00Z"], "shop", "give one of --in, --at and"),
        (["reschedule", "7", "--in", "2 weeks"], "shop", "'2 weeks' is no duration such as 2d, 90min or 1h30min"),
        (["reschedule", "7", "--in", "soon"], "shop", "'soon' is no duration such as"),
        (["reschedule", "7", "--at", "2026-03-01T12:00"], "shop", "'2026-03-01T12:00' is no moment such as"),
        (["reschedule", "7", "--at", "noon"], "shop", "'noon' is no moment such as 2026-03-01T12:00Z"),
        (["cancel", "7", "--state", "ready"], "shop", "cancel: give ids, or some of"),
        (["worker", "--queue", "nowhere"], "shop", "asks for the queue 'nowhere'"),
        (["worker", "--workers", "0"], "shop", "workers must be a positive int"),
        (["list"], "nowhere:drive", "'nowhere:drive': no module named 'nowhere'; call it in the application's folder"),
        (["list"], "a file.py", "'a file.py': No module named 'a file'; call it"),
        (["list"], ":", "such as app:drive"),
        (
            ["list"],
            "shop:drvie",
            "shop has no attribute 'drvie'; did you mean shop:drive?",
        ),
        (["list"], "shop:other", "shop:other is not the geneva_drive.GenevaDrive in use, but <peewee."),
        (["list"], "shop:other", ">; did you mean shop:drive?"),
        (["list"], "json", "json has no attribute 'drive'; json has no drive: name the module that constructs it"),
    ],
)
def test_wrong_usage_is_named_and_exits_with_2(command_line, arguments, app, problem):
    status, output, errors = command_line(*arguments, app=app)
    assert (status, output) == (2, "")
    assert problem in errors


def test_the_graph_of_a_class_is_printed(command_line):
    assert command_line("graph", "Drawn") == (0, Drawn.graph() + "\n", "")


def test_ids_that_no_database_takes_are_refused_in_a_line(command_line):
    for number in (0, 7, 2**70):
        status, output, errors = command_line("show", number)
        assert (status, output, errors.count("\n")) == (1, "", 1)


@ELSEWHERE
def test_a_worker_on_the_command_line_drains_on_sigterm(app):
    workflow = app.create("Slow", "premium")
    # As __main__ the module is loaded a second time; the application's classes are of the one that it imports.
    worker = app.start("-m", "geneva_drive", "app:drive", "worker", "--workers", "2", "--queue", "premium")
    until(lambda: app.traces() == ["one begins"])
    worker.terminate()
    until(lambda: "draining" in (app.folder / "log0").read_text())
    app.gate.touch()
    assert worker.wait(timeout=30) == 0
    assert app.traces() == ["one begins", "one ends"]
    assert app.state(workflow) == "ready"
    assert f"Slow {workflow}: ready -> performing" in (app.folder / "log0").read_text()


def test_what_stands_at_a_step_that_is_gone_is_moved_on_with_resume_at(command_line, drive, hero):
    workflow = Plain.create(hero=hero)
    Workflow.update(current_step_name="gone").execute()
    StepExecution.update(step_name="gone").execute()
    _, output, _ = command_line("show", workflow.id)
    assert "Plain has no step 'gone' (it has: one, two, three)" in " ".join(output.split())
    assert f"pause {workflow.id}  (or cancel)" in output
    workflow.pause()
    assert f"resume --at STEP {workflow.id}  (or cancel)" in command_line("show", workflow.id)[1]
    for arguments in (("resume",), ("skip",), ("resume", "--at", "three too")):
        before = history(workflow)
        assert command_line(*arguments, workflow.id, "--dry-run")[0] == 1
        assert command_line(*arguments, workflow.id)[0] == 1
        assert (reload(workflow).state, history(workflow)) == ("paused", before)
    assert command_line("resume", "--at", "three", workflow.id, "--dry-run")[0] == 0
    assert reload(workflow).state == "paused"
    assert command_line("resume", "--at", "three", "--state", "paused")[0] == 0
    assert (reload(workflow).state, scheduled(workflow).step_name) == ("ready", "three")


def command(folder, *arguments, module="geneva_drive", env=None):
    status, output, errors = completed("-m", module, *arguments, cwd=folder, env=env)
    assert "Traceback" not in errors, errors
    return status, output, errors


SHOP = """
import os
from peewee import CharField, Model
from playhouse.db_url import connect
from {module} import GenevaDrive, Workflow, step

db = connect(os.environ.get("SHOP_URL", "sqlite:///shop.db"))
drive = GenevaDrive(db)

class Customer(Model):
    name = CharField()
    class Meta:
        database = db

class Greets(Workflow):
    @step(wait=60)
    def greet(self):
        pass

def setup():
    db.create_tables([Customer])
    drive.create_tables()
    with db.atomic():
        Greets.create_many([Customer.create(name="Ada") for _ in range({count})])
"""


def make_shop(folder, module="geneva_drive", count=1, is_set_up=True):
    (folder / "shop.py").write_text(SHOP.format(module=module, count=count))
    if is_set_up:
        status, _, errors = completed("-c", "import shop; shop.setup()", cwd=folder)
        assert status == 0, errors


def test_expected_errors_cost_a_line_and_no_traceback(tmp_path):
    make_shop(tmp_path, is_set_up=False)
    status, output, errors = command(tmp_path, "shop", "list")
    assert (status, output) == (1, "")
    assert "the database 'shop.db' has no tables of GenevaDrive: call drive.create_tables()" in errors
    nobody_there = f"postgresql://postgres@127.0.0.1:{free_port()}/shop"
    for url in ("sqlite:////nowhere/at/all/shop.db", nobody_there, nobody_there.replace("postgresql", "mysql")):
        status, output, errors = command(tmp_path, "shop", "list", env={"SHOP_URL": url})
        assert (status, output, errors.count("\n")) == (1, "", 1)
        assert "the database refused: " in errors
    (tmp_path / "shop.py").write_text("import not_installed_here")
    status, _, errors = completed("-m", "geneva_drive", "shop", "list", cwd=tmp_path)
    assert status == 1
    assert "No module named 'not_installed_here'" in errors  # the application's own, with the place


def test_the_command_line_of_a_vendored_copy_finds_its_own_application(tmp_path):
    package = tmp_path / "vendor"
    package.mkdir()
    for file in (gd.__file__, gd.SCHEMA_FILE):
        shutil.copy(file, package)
    make_shop(tmp_path, module="vendor.geneva_drive")
    status, output, _ = command(tmp_path, "shop", "list", module="vendor.geneva_drive")
    assert (status, len(output.splitlines())) == (0, 2)
    status, _, errors = command(tmp_path, "shop", "list")
    assert status == 2
    assert "shop is not the geneva_drive.GenevaDrive in use, but <vendor.geneva_drive.GenevaDrive object at" in errors


def test_a_reader_that_has_seen_enough_costs_no_traceback(tmp_path):
    make_shop(tmp_path, count=500)  # more than a pipe holds
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = ("-m", "geneva_drive", "shop", "list", "--limit", "500", "--json")
    process = python(*command, cwd=tmp_path, env={"PYTHONUNBUFFERED": ""}, **pipe)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def in_a_terminal(folder, *arguments, program=("-m", "geneva_drive"), **env):
    """What a command writes to a terminal of 100 columns."""
    here, there = os.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    env = {"NO_COLOR": "", "COLUMNS": "", **env}
    process = python(*program, *arguments, cwd=folder, stdin=there, stdout=there, stderr=there, env=env)
    os.close(there)
    output = b""
    with contextlib.suppress(OSError):  # which is how Linux says that it is the end
        while chunk := os.read(here, 4096):
            output += chunk
    os.close(here)
    assert process.wait(timeout=60) == 0
    return output.decode()


def test_there_is_colour_on_a_terminal_only_and_never_with_no_color(tmp_path):
    make_shop(tmp_path)
    colored = in_a_terminal(tmp_path, "shop", "list")
    assert "\033[36mready\033[0m" in colored
    plain = in_a_terminal(tmp_path, "shop", "list", NO_COLOR="1")
    assert "\033" not in plain
    assert re.sub(r"\033\[\d*m", "", colored).splitlines()[0] == plain.splitlines()[0]
    assert "\033" not in command(tmp_path, "shop", "list")[1]
    bar = re.search(r"·+", in_a_terminal(tmp_path, "shop", "show", "1"))
    assert len(bar[0]) == 50  # as wide as the terminal has room for


def test_the_command_line_sends_a_signal(command_line, drive, hero):
    workflow = Payment.create(hero=hero)
    _, output, _ = command_line("show", workflow.id)
    assert "  waits for: the signal confirmed" in output.splitlines()
    assert re.search(r"^1  confirm  waiting .* in 3 d$", output, re.MULTILINE)
    _, output, _ = command_line("stats")
    assert "Payment: 1 wait for the signal confirmed" in output.splitlines()
    for arguments, status, text in (
        (["confirmed", "--payload", "{7"], 2, "--payload {7: it is not JSON"),
        (["paid"], 1, "which no step of Payment waits for: use one of its signals (confirmed)"),
        (["confirmed", "--key", ""], 1, "must have 1 to 255 printable characters"),
    ):
        found, output, errors = command_line("signal", workflow.id, *arguments)
        assert (found, output) == (status, "")
        assert text in errors
    send = ["signal", workflow.id, "confirmed", "--payload", '{"by": "hand"}', "--key", "k"]
    status, output, _ = command_line(*send)
    assert (status, output) == (0, f"Payment {workflow.id} of User {hero.id}: ready at confirm: confirmed was sent\n")
    _, output, _ = command_line(*send)
    assert output.endswith("confirmed was sent before, and is left out\n")
    status, output, _ = command_line(*send, "--json")
    assert (status, json.loads(output)) == (0, {"id": workflow.id, "signal": "confirmed", "is_new": False})
    work_off(drive)
    assert effects() == ["confirm {'by': 'hand'}", "deliver None"]
    status, _, errors = command_line("signal", workflow.id, "confirmed")
    assert (status, "is finished; signal() was refused" in errors) == (1, True)


# ==== Examples and manual =============================================================================================


def test_the_signup_example_goes_on_after_kills_and_sends_each_mail_once(tmp_path):
    command = [HERE / "examples" / "signup.py", "--seconds-per-day", "0.4"]

    def start():
        return python(*command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    # Each run is killed once it has shown some more lines: in the import, among the welcomes, in the waits.
    for lines in (1, 2, 3):
        process = start()
        for _ in range(lines):
            process.stdout.readline()
        process.kill()
        process.communicate()
    finished, _ = start().communicate(timeout=120)
    assert "stopped before the end" not in finished
    again, _ = start().communicate(timeout=120)
    assert "nothing left to do" in again
    assert f"The mails are in {tmp_path / 'signup.maildir' / 'new'}, a file each." in again
    with contextlib.closing(sqlite3.connect(tmp_path / "signup.db")) as db:
        workflows = dict(db.execute("select hero_id, state from geneva_drive_workflows").fetchall())
        people = db.execute("select id, email, status from person").fetchall()
    with (HERE / "examples" / "people.csv").open(encoding="utf-8", newline="") as file:
        assert sorted(email for _, email, _ in people) == sorted({row["email"].lower() for row in csv.DictReader(file)})
    assert workflows == {str(person): "canceled" if status == "closed" else "finished" for person, _, status in people}
    mails = {"subscribed": 3, "unsubscribed": 2, "closed": 0}
    expected = Counter({email: mails[status] for _, email, status in people if mails[status]})
    with contextlib.closing(mailbox.Maildir(tmp_path / "signup.maildir")) as maildir:
        sent = list(maildir)
    assert Counter(parseaddr(message["To"])[1] for message in sent) == expected
    assert len({message["Message-ID"] for message in sent}) == len(sent)


def test_the_signup_example_shows_in_a_terminal_what_comes_next_and_when(tmp_path):
    program = (HERE / "examples" / "signup.py", "--seconds-per-day", "0.8")
    output = in_a_terminal(tmp_path, program=program)
    shown = [each.removesuffix("\x1b[K") for each in output.split("\r") if each.endswith("\x1b[K")]
    line = re.compile(r" +[\d.]+ s  \d+ mails, \d+ of 41 workflows are over; next: (\w+|the end) (now|in \d s)")
    assert all(line.fullmatch(each) and len(each) < 100 for each in shown)
    assert len(shown) == len(set(shown)) > 15
    assert {line.fullmatch(each)[1] for each in shown} > {"send_reminder", "send_farewell"}
    assert re.search(r"next: send_\w+ in \d s", output)  # which of them, depends on how busy the machine is
    assert output.splitlines()[-1] == f"The mails are in {tmp_path / 'signup.maildir' / 'new'}, a file each."


def test_the_signup_example_stops_on_ctrl_c_and_says_how_to_go_on(tmp_path):
    process = python(HERE / "examples" / "signup.py", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = [process.stdout.readline().decode() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert "; next: send_" in lines[1]
    assert (process.returncode, errors) == (0, b"")
    assert "stopped before the end: start it again to go on" in output.decode()
    assert doctor_of(tmp_path / "signup.db") == []


def test_the_signup_example_names_file_and_line_of_a_malformed_row(tmp_path):
    (tmp_path / "people.csv").write_text(
        "name,email,plan,status\nAda,ada@example.com,free,subscribed\nBob,bob,free,x\n"
    )
    command = (HERE / "examples" / "signup.py", "people.csv")
    process = python(*command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "people.csv:3: 'bob' is not a valid email" in errors
    assert not (tmp_path / "signup.db").exists()


# The small examples: what each prints when it is run as it stands; lines of regular expressions, in no order.
EXAMPLES = {
    "payment.py": [
        "before somebody looks at what is paused: 3 payments",
        "after somebody looks at what is paused: 0 payments",
        "paid: finished; charge success, send_receipt success",
        "pending, paid: finished; charge reattempted, charge success, send_receipt success",
        "suspicious, paid: finished; charge canceled, charge success, send_receipt success",
        "stolen card: canceled; charge canceled",
        "voucher: finished; charge skipped, send_receipt success",
        "charged before: finished; charge success",
        "unreachable, paid: finished; charge reattempted, charge success, send_receipt success",
        "(unreachable, ){3}paid: finished; (charge reattempted, ){2}charge failed, charge success, send_receipt .*",
        "rate limit, paid: finished; charge reattempted, charge success, send_receipt success",
        "free: finished; charge skipped, send_receipt success",
        "withdrawn: canceled; charge canceled",
        "skipped by hand: finished; charge skipped, send_receipt success",
        "canceled by hand: canceled; charge canceled",
        "paused by hand: finished; charge success, send_receipt success",
    ],
    "polling.py": [
        "polling_1: the list of customers is here",
        "polling_1: the balance sheet is not ready",
        "polling_4: the last word is not ready",
        "give_up: the last word does not come",
        "list of customers: finished after 2 steps",
        "balance sheet: finished after [345] steps",
        "last word: canceled after 6 steps",
    ],
    "trial.py": [
        "Dan: welcome",
        r"Ada: billed (at|\d\.\d s after) the end of the trial",
        r"Bob: billed (at|\d\.\d s after) the end of the trial",
        r"Cleo: billed (at|\d\.\d s after) the end of the trial",
        r"Dan: billed (at|\d\.\d s after) the end of the trial",
        "Bob: finished",
        r"\(left\) Eve: canceled, customer_has_left",
    ],
    "signals.py": [
        "event 1: thank you",
        "event 1: we know",
        "event 2: thank you",
        "event 3: thank you",
        "chair: sent",
        "desk: 100 euros are missing",
        "event 4: the order is closed, give the money back",
        "chair: finished",
        "desk: paused",
        "lamp: canceled",
    ],
    "fan_out.py": [
        "The first issue: 4 letters\nThe first issue: 4 letters",  # of which the first were taken back
        "ada@example.com: sent",
        "The first issue: 3 sent, 1 late",
        "letter to ada@example.com: finished",
        "letter to bob@example.com: finished",
        "letter to cyd: canceled",
        "letter to dan@example.com: finished",
    ],
    "resumable.py": [
        "send: recovered at 300",
        "send: recovered at 750",
        "send: success at 1000",
        "book: recovered at 550",
        "book: success at 1000",
        "1000 readers got a letter, 60 of them two; 1000 copies are booked",
    ],
    "nightly.py": [
        "2026-03-27: 100 euros, counted for 01:30 UTC",
        "2026-03-28: 101 euros, counted for 01:30 UTC",
        "2026-03-29: 102 euros, counted for 00:30 UTC",
        "2026-10-24: 103 euros, counted for 00:30 UTC",
        "4 nights were counted",
    ],
    "async_steps.py": ["some shop takes more than 0.4 s", "bought a lamp from Birch for 9"],
    "tracing.py": [
        "POST /orders: under nothing, UNSET",
        "Fulfilment.charge: under POST /orders, ERROR",
        "Fulfilment.charge: under POST /orders, UNSET",
        "print label: under Fulfilment.ship, UNSET",
        "Fulfilment.ship: under POST /orders, UNSET",
        "1 trace",
    ],
    "error_tracking.py": [
        r"captured LookupError\('no dictionary'\) \{.*'id': 1, 'step': 'guess_language', 'state': 'ready'\}",
        r"captured ZeroDivisionError.* \{'workflow': 'Import', 'id': 1, 'step': 'convert', 'state': 'paused'\}",
        r"captured LookupError\('no dictionary'\) \{.*'id': 2, 'step': 'guess_language', 'state': 'ready'\}",
        "The tables have them all:",
        "fetch: reattempted, ConnectionError: the server is busy",
        "guess_language: skipped, LookupError: no dictionary",
        "convert: canceled, PermissionError: Bob has withdrawn his consent",
        "convert: failed, ZeroDivisionError: division by zero",
    ],
}


def example(folder, name, *arguments, stdin="", env=None, status=0):
    """Run an example in a folder until it exits with `status`; returns what it printed."""
    command = [HERE / "examples" / name, *arguments]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = python(*command, cwd=folder, env=env or {}, **streams)
    output, _ = process.communicate(stdin, timeout=60)
    assert process.returncode == status, output
    return output


def doctor_of(path):
    """What doctor() says of a database that an example has left."""
    with contextlib.closing(SqliteDatabase(path)) as left:
        return GenevaDrive(left).doctor()


def test_each_small_example_shows_what_it_says(tmp_path):
    with ThreadPoolExecutor(len(EXAMPLES)) as threads:  # most of the time they wait
        outputs = dict(zip(EXAMPLES, threads.map(functools.partial(example, tmp_path), EXAMPLES)))
    for name, lines in EXAMPLES.items():
        for line in lines:
            assert re.search(f"^{line}$", outputs[name], re.MULTILINE), (name, line, outputs[name])
        assert "Traceback" not in outputs[name], name
        assert doctor_of(tmp_path / f"{Path(name).stem}.db") == [], name


def test_the_priorities_example_prefers_what_is_urgent_and_keeps_the_queues_apart(tmp_path):
    output = example(tmp_path, "priorities.py")
    done = re.findall(r"(?:written|posted): (?:an? \w+ \w+|another one|offer \d+)", output)
    letters = ["an urgent letter", "an ordinary letter", "another one"]
    assert [each for each in done if "offer" not in each] == [
        f"{act}: {letter}" for letter in letters for act in ("written", "posted")
    ]
    assert {f"posted: offer {number}" for number in range(20)} < set(done)
    assert done.index("posted: another one") < done.index("posted: offer 19")  # nobody waits for the mailing
    assert doctor_of(tmp_path / "priorities.db") == []


def test_the_approval_example_waits_for_a_human_from_one_start_to_the_next(tmp_path):
    output = example(tmp_path, "approval.py", stdin="y\n")  # and then the input ends
    assert "paid 2 euros for a pencil" in output
    assert "paid 300 euros for a chair" in output
    assert output.endswith("a pencil: finished\na chair: finished\na yacht: paused\n")
    output = example(tmp_path, "approval.py", stdin="n\n")
    assert "paid" not in output
    assert output.endswith("a pencil: finished\na chair: finished\na yacht: canceled\n")
    assert doctor_of(tmp_path / "approval.db") == []


def test_the_redis_example_outlives_the_loss_of_its_messages(servers, tmp_path):
    output = example(tmp_path, "redis_queue.py", env={"REDIS_URL": servers.redis(), **FULL})
    assert re.findall(r"(.*): (\d) messages", output) == [
        ("before the commit", "0"),
        ("after the commit", "3"),
        ("after an accident", "0"),
    ]
    assert output.endswith("3 deliveries are finished\n")
    assert doctor_of(tmp_path / "redis_queue.db") == []


def test_the_unittest_example_passes_under_unittest_and_pytest(tmp_path):
    assert "Ran 4 tests" in example(tmp_path, "test_trial.py")
    file = HERE / "examples" / "test_trial.py"
    process = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", file, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=60)
    assert "4 passed" in output


def test_the_web_example_answers_while_its_consumer_works(tmp_path):
    shutil.copy(HERE / "examples" / "web.py", tmp_path)
    url = f"http://127.0.0.1:{free_port()}"

    def call(path, data=None):
        try:
            with urlopen(url + path, data, timeout=10) as response:
                return response.status, json.load(response)
        except HTTPError as error:
            with error:
                return error.code, None

    def answers():
        with contextlib.suppress(URLError):
            return call("/signups/1")[0] == 404

    consumer = python("-m", "huey.bin.huey_consumer", "web.huey", "-w", "2", "-m", "0.2", "-q", cwd=tmp_path)
    web = python("web.py", url.rpartition(":")[2], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        until(answers)
        status, first = call("/signups", b"email=ada@example.com")
        assert (status, first["id"], first["email"]) == (201, 1, "ada@example.com")
        status, again = call("/signups", b"email=ada@example.com")
        assert (status, again["id"]) == (200, 1)
        assert call("/signups", b"")[0] == 400
        until(lambda: call("/signups/1")[1]["state"] == "finished")
        assert call("/signups/1")[1]["done"] == ["send_welcome", "send_reminder"]
    finally:
        for process in (web, consumer):
            process.kill()
            process.wait()
    assert doctor_of(tmp_path / "web.db") == []


def exported(folder, *arguments):
    """What examples/metrics.py serves."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = python(HERE / "examples" / "metrics.py", *arguments, "--port=0", cwd=folder, **streams)
    try:
        with urlopen(process.stdout.readline().decode().strip(), timeout=10) as response:
            text = response.read().decode()
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, b"Traceback" in errors) == (0, False)
    sample = re.compile(r'geneva_drive_\w+(\{(\w+="([^"\\\n]|\\[\\"n])*",?)+\})? [\d.]+')
    kinds = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds))
    assert all(sample.fullmatch(line) for line in text.splitlines() if not line.startswith("# "))
    return text


def test_the_metrics_example_speaks_to_prometheus(tmp_path):
    text = exported(tmp_path)
    assert text.count("# TYPE") == 5
    assert 'geneva_drive_workflows{type="Delivery",state="finished"} 2\n' in text
    assert 'geneva_drive_paused_ratio{type="Delivery"} 1.0\n' in text
    assert 'geneva_drive_recovered_steps{type="Delivery"} 0\n' in text
    assert list(tmp_path.iterdir()) == []


def test_the_metrics_example_serves_those_of_any_application(tmp_path):
    make_shop(tmp_path, is_set_up=False)
    with (tmp_path / "shop.py").open("a") as shop:
        shop.write("class Asks(Workflow):\n @step(wait_for='so \"to\" say')\n def one(self): pass\n")
    setup = "import shop; shop.setup(); shop.Asks.create(hero=shop.Customer.get())"
    assert completed("-c", setup, cwd=tmp_path)[0] == 0
    text = exported(tmp_path, "shop:drive")
    assert 'geneva_drive_workflows{type="Greets",state="ready"} 1\n' in text
    assert 'geneva_drive_waiting_steps{type="Asks",signal="so \\"to\\" say"} 1\n' in text
    for app, problem in (
        ("shop:drvie", "module 'shop' has no attribute 'drvie'"),
        ("shop:db", "shop:db is no GenevaDrive, but <peewee."),
        ("nowhere:drive", "No module named 'nowhere'"),
    ):
        assert problem in example(tmp_path, "metrics.py", app, status=2)


def test_the_backup_example_needs_no_more_than_the_two_files_beside_it(tmp_path):
    folder = tmp_path / "backup"
    folder.mkdir()
    for file in (gd.__file__, gd.SCHEMA_FILE, HERE / "examples" / "backup.py"):
        shutil.copy(file, folder)

    def back_up(status=0):
        return example(tmp_path, folder / "backup.py", "notes.txt", env={"PYTHONPATH": ""}, status=status)

    assert "is paused" in back_up(status=1)  # there are no notes yet
    notes = tmp_path / "notes.txt"
    notes.write_text("Remember the milk.")
    output = back_up()
    assert f"run by {folder / 'geneva_drive.py'}" in output
    assert "is finished" in output
    notes.write_text("Forget it.")
    back_up()
    (copy,) = tmp_path.glob("notes.txt.copies/*.gz")
    assert gzip.decompress(copy.read_bytes()) == b"Remember the milk."  # today's copy was made before
    assert doctor_of(tmp_path / "notes.txt.copies" / "backup.db") == []


@pytest.mark.parametrize("queue", ["sqlite", "redis"])
def test_the_two_processes_example_shares_its_workflows(servers, tmp_path, queue):
    env = {"REDIS_URL": servers.redis(), **FULL} if queue == "redis" else {}
    shutil.copy(HERE / "examples" / "two_processes" / "app.py", tmp_path)
    consumer = python("-m", "huey.bin.huey_consumer", "app.huey", "-w", "2", "-m", "0.2", "-q", cwd=tmp_path, env=env)
    try:
        application = python("app.py", "3", cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
        output, _ = application.communicate(timeout=60)
        assert "all orders are shipped" in output
        with contextlib.closing(sqlite3.connect(tmp_path / "orders.db")) as db:
            rows = db.execute('select charged_by, shipped_by from "order"').fetchall()
        assert rows == [(consumer.pid, consumer.pid)] * 3
    finally:
        consumer.kill()
        consumer.wait()


STEPPED = """
import time
from geneva_drive import GenevaDrive, Workflow, step
from peewee import SqliteDatabase

db = SqliteDatabase("app.db", timeout=10)
drive = GenevaDrive(db)
drive.create_tables()

class Slow(Workflow):
    may_proceed_without_hero = True

    @step
    def one(self):
        print("began", flush=True)
        time.sleep(1)
        self.context["ended"] = True

    @step
    def two(self):
        pass
"""


def deployed(kind):
    """What a unit file or a Dockerfile says: the command, the signal that stops it, how long it has for that."""
    folder = HERE / "examples" / "two_processes"
    if kind == "systemd":
        unit = configparser.ConfigParser()
        unit.optionxform = str
        unit.read(folder / "consumer.service")
        service = unit["Service"]
        _, *arguments = service["ExecStart"].split()
        return arguments, service["KillSignal"], int(service["TimeoutStopSec"])
    text = (folder / "Dockerfile").read_text()
    _, _, _, *arguments = json.loads(re.search("^CMD (.+)", text, re.MULTILINE)[1])
    return (
        arguments,
        re.search(r"^STOPSIGNAL (\w+)", text, re.MULTILINE)[1],
        int(re.search(r"--stop-timeout (\d+)", text)[1]),
    )


@pytest.mark.parametrize("kind", ["systemd", "docker"])
def test_a_deployed_consumer_drains_in_the_time_that_it_is_given(tmp_path, kind):
    arguments, stop_signal, timeout = deployed(kind)
    assert 5 <= timeout - int(arguments[arguments.index("--shutdown-timeout") + 1]) <= 20
    (tmp_path / "app.py").write_text(STEPPED)
    assert completed("-c", "import app; app.Slow.create()", cwd=tmp_path)[0] == 0
    consumer = python("-m", "geneva_drive", *arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert consumer.stdout.readline() == b"began\n"
    consumer.send_signal(getattr(signal, stop_signal))
    _, errors = consumer.communicate(timeout=timeout)
    assert (consumer.returncode, b"draining" in errors) == (0, True)
    with contextlib.closing(sqlite3.connect(tmp_path / "app.db")) as db:
        rows = db.execute("select step_name, state from geneva_drive_step_executions order by number").fetchall()
    assert rows == [("one", "completed"), ("two", "scheduled")]
    assert doctor_of(tmp_path / "app.db") == []


def test_systemd_understands_the_unit_of_the_consumer(tmp_path):
    systemd = require_command("systemd-analyze", "apt-get install systemd")
    text = (HERE / "examples" / "two_processes" / "consumer.service").read_text()
    unit = tmp_path / "consumer.service"
    unit.write_text(re.sub("ExecStart=[^ ]+", f"ExecStart={sys.executable}", text))
    process = subprocess.run([systemd, "verify", unit], capture_output=True, text=True, timeout=60)
    assert (process.returncode, [line for line in process.stderr.splitlines() if "consumer.service" in line]) == (0, [])


def chaos(url, workflows, **options):
    """examples/chaos.py, begun."""
    words = [f"--{name}={value}" for name, value in options.items()]
    where = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return python(HERE / "examples" / "chaos.py", url, f"--workflows={workflows}", *words, **where)


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.exhaustive("sqlite", "mysql")
def test_the_chaos_example_kills_and_disturbs_and_finds_every_promise_kept(servers, kind):
    url = servers.empty(kind)
    process = chaos(url, 60, **{"seconds": 6, "workers": 3, "kill-every": 0.4, "disturb-every": 1})
    table, errors = process.communicate(timeout=400)
    assert process.returncode == 0, table + errors
    lines = dict(re.fullmatch(r"(.*?)  +(\S+)(?: s)?", line).groups() for line in table.splitlines())
    assert (lines["finished"], lines["lost"], lines["effects of transactional steps wrong"]) == ("60", "0", "0")
    assert int(lines["kills (SIGKILL)"]) > 0
    assert int(lines["times that the file was locked" if kind == "sqlite" else "connections dropped"]) > 0
    (shown,) = (
        text
        for heading, language, text in blocks("transactions.md")
        if (heading, language) == ("See it survive", "text")
    )
    assert [line[:44].rstrip() for line in shown.splitlines()] == [
        name.replace("times that the file was locked", "connections dropped") for name in lines
    ]
    again = chaos(url, 60)
    assert "is not empty" in again.communicate(timeout=60)[1]
    assert again.returncode == 2


def test_the_chaos_example_tells_of_each_promise_that_broke(servers, tmp_path):
    process = chaos(f"sqlite:///{tmp_path}/chaos.db", 40, seconds=3, workers=1)  # which is not killed
    booked = "select workflow_id from geneva_drive_step_executions where step_name = 'book' and state = 'completed'"
    with contextlib.closing(sqlite3.connect(tmp_path / "chaos.db", timeout=30, isolation_level=None)) as db:

        def rows(query):
            with contextlib.suppress(sqlite3.OperationalError):  # there are no tables yet
                return db.execute(query).fetchall()

        until(lambda: len(rows(booked) or ()) >= 3)
        (lacking,), (again,), (booked_again,), *_ = rows(booked)
        db.execute(f"delete from chaos_effects where workflow = {lacking} and step = 'charge'")
        effects = [(again, "charge")] * 30 + [(booked_again, "book")]
        db.executemany("insert into chaos_effects (workflow, step) values (?, ?)", effects)
        db.execute(f"update geneva_drive_signals set consumed_at = null where workflow_id = {lacking}")
        db.execute(f"update geneva_drive_workflows set context = '{{\"paid\": 7}}' where id = {again}")
        stop = f"update geneva_drive_workflows set state = 'canceled' where state = 'ready' and id in ({booked})"
        until(lambda: db.execute(stop).rowcount)
    table, errors = process.communicate(timeout=400)
    assert process.returncode == 1, table + errors
    assert re.search(r"^lost +[1-9]", table, re.MULTILINE)
    assert re.findall("BROKEN: (.*)", table) == [
        "every workflow finishes, and once",
        "its steps succeed in their order, once each",
        "what succeeded had its effect",
        "a plain step repeats its effect only where an attempt died",
        "a transactional step has its effect exactly once",
        "every signal is given to its step, and once",
        "and with its payload",
        "doctor() finds nothing",
    ]


# ==== The benchmark among the examples: that it measures what it says, not how fast ===================================

STEPPING = ["the driver alone", "bare Huey", "GenevaDrive", "GenevaDrive, run_on=0"]
CREATING = ["the driver alone, one by one", "create()", "create_many()"]


def benchmark(*options, status=0):
    """A short run of examples/benchmark.py; returns what it printed."""
    short = ("--workflows=4", "--creations=5", "--rounds=1", "--workers=1,2", "--samples=2")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = python(HERE / "examples" / "benchmark.py", *short, *options, env={"GENEVA_DRIVE_URL": ""}, **streams)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == status, output + errors
    return output if status == 0 else errors


@pytest.mark.parametrize("kind", SERVERS)
@ELSEWHERE
def test_the_benchmark_example_measures_all_contenders_and_leaves_the_database_empty(servers, kind):
    url = servers.empty(kind)
    results = json.loads(benchmark(url, "--json"))
    assert (results["database"], results["workflows"], results["rounds"]) == (kind, 4, 1)
    assert list(results["steps"]) == ["1", "2"]
    for contenders in (*results["steps"].values(), results["created"]):
        assert list(contenders) == (CREATING if contenders is results["created"] else STEPPING)
        for each in contenders.values():
            assert each["rounds"] == [each["per_second"]]
            assert min(each["per_second"], each["to_floor"], each["cpu_ms"]) > 0
        floor, *others = contenders.values()
        assert floor["to_floor"] == 1
        assert 5 < floor["memory_mb"] < min(other["memory_mb"] for other in others) < 500
    for latency in results["latency_ms"].values():
        assert latency["samples"] == 2
        assert 0 < latency["median"] <= latency["p95"] == latency["worst"]
    assert 0 < results["idle_cpu_percent"] < 100
    with contextlib.closing(connect(url)) as db:
        assert db.get_tables() == []


@pytest.mark.exhaustive
def test_the_benchmark_example_prints_the_tables_that_the_manual_shows(tmp_path):
    plot = tmp_path / "steps.png"
    is_drawn = importlib.util.find_spec("matplotlib") is not None
    output = benchmark("--workers=1", *([f"--plot={plot}"] if is_drawn else []))  # on a SQLite file of its own
    (shown,) = (
        text for heading, language, text in blocks("performance.md") if (heading, language) == ("Speed", "text")
    )
    names = [line[:36].rstrip() for line in output.splitlines()[2:]]
    assert {*STEPPING, *CREATING} < {*names}
    assert {*names} <= {line[:36].rstrip() for line in shown.splitlines()}
    assert plot.exists() == is_drawn


@pytest.mark.parametrize("kind", SERVERS)
@ELSEWHERE
def test_the_benchmark_example_measures_in_a_crowd(servers, kind):
    url = servers.empty(kind)
    results = json.loads(benchmark(url, "--json", "--crowd=1000,2500"))
    assert [crowd["waiting"] for crowd in results["crowds"]] == [1000, 2500, 1000]
    before, larger, after = (crowd["milliseconds"] for crowd in results["crowds"])
    assert before.keys() == larger.keys() == after.keys() == results["crowds"][1]["ratios"].keys()
    assert min(*before.values(), *larger.values(), *after.values()) > 0
    assert results["deletion"]["workflows"] == 250
    with contextlib.closing(connect(url)) as db:
        assert db.get_tables() == []


def test_the_benchmark_example_prints_what_a_crowd_costs():
    output = benchmark("--crowd=1000,2000")
    assert re.search(r"^create\(\) +\d+\.\d\d +\d+\.\d\d +\(\d+\.\d\d\) +\d+\.\d\d", output, re.MULTILINE)
    assert "200 of them are deleted in" in output
    (shown,) = (
        text
        for heading, language, text in blocks("performance.md")
        if (heading, language) == ("With many waiting workflows", "text")
    )
    beginnings = [{re.sub(r"[\d,.]+", "#", line)[:24] for line in text.splitlines()[1:]} for text in (output, shown)]
    assert beginnings[0] == beginnings[1]
    assert "numbers of at least 1000" in benchmark("--crowd=10", status=2)


def test_the_benchmark_example_refuses_a_database_that_holds_anything(servers, tmp_path):
    url = servers.empty("sqlite")
    with contextlib.closing(connect(url)) as db:
        db.execute_sql("create table task (title text)")
        db.execute_sql("insert into task values ('of others')")
        assert "is not empty" in benchmark(url, status=2)
        assert db.execute_sql("select * from task").fetchall() == [("of others",)]
        assert db.get_tables() == ["task"]
    assert "the URL must be of" in benchmark("sqlite:///:memory:", status=2)
    assert "cannot be opened" in benchmark(f"sqlite:///{tmp_path}/nowhere/app.db", status=2)


def test_the_benchmark_example_says_at_once_that_matplotlib_is_missing():
    script = HERE / "examples" / "benchmark.py"
    process = python("-S", script, "--plot=steps.png", stderr=subprocess.PIPE, text=True)  # -S: no packages
    assert "pip install matplotlib" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


# ==== The console among the examples ==================================================================================

# What may come from users: markup, quotes, an override of the direction, a language from right to left, characters that
# no page may hold. And what of it is shown.
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'&amp; \u05e9"
UNPRINTABLE = HOSTILE + "\u202egnp.exe\x1b[31m\x85"
SHOWN = HOSTILE + r"\u202egnp.exe\x1b[31m\x85"


class Page(HTMLParser):
    """A page that is well-formed, and holds nothing that runs anything, or loads it from elsewhere."""

    WORDS = re.compile("[^ ]+").findall
    ELEMENTS = set(
        WORDS("html head meta title style body main nav h1 h2 p a b bdi span time table thead tbody tr th td")
    )
    ELEMENTS |= set(WORDS("section div form label input select option button details summary pre ol li svg rect"))
    ATTRIBUTES = set(WORDS("class dir datetime scope value x y width height role aria-label data-head lang charset"))
    ATTRIBUTES |= set(WORDS("content name href rel action formaction method type placeholder autocomplete"))
    ATTRIBUTES |= {"selected", "disabled", "hidden"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text, self.links, self.forms = Counter(), [], "", {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert tag in self.ELEMENTS
        assert given.keys() <= self.ATTRIBUTES
        self.elements[tag] += 1
        if tag not in ("meta", "input"):
            self.open.append(tag)
        for name in given.keys() & {"href", "action", "formaction"}:
            assert re.match("/(?!/)", given[name]), "a place elsewhere"
        if tag == "a":
            self.links[given["href"]] = ""
        if tag == "form":
            self.forms.append({})
        if tag in ("input", "button", "select") and "name" in given:
            self.forms[-1][given["name"]] = given.get("value", "")
        if tag == "button" and "formaction" in given:
            self.forms[-1].setdefault("calls", []).append(given["formaction"].rpartition("/")[2])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] == ["a"]:
            self.links[list(self.links)[-1]] += data
        if self.open[-1:] == ["style"]:
            assert not re.search(r"url\(|@import|//", data)


class Operator:
    """Somebody who uses a console, without a browser: with its cookies, and the forms that it shows."""

    def __init__(self, app, host="localhost:8080", script=""):
        self.app, self.host, self.script, self.cookies, self.headers = app, host, script, SimpleCookie(), {}

    def get(self, path, status=200, **query):
        return self.ask("GET", path + "?" * bool(query) + urlencode(query), status)

    def post(self, path, status=200, headers=(), **form):
        return self.ask("POST", path, status, urlencode(form).encode(), dict(headers))

    def call(self, workflow, call, status=303, **form):
        """Fill in the form of a call, as its page shows it, and send it."""
        (shown,) = [each for each in self.get(f"/workflows/{workflow.id}").forms if call in each.get("calls", ())]
        return self.post(f"/workflows/{workflow.id}/{call}", status, **{**shown, **form, "calls": ""})

    def ask(self, method, path, status, body=b"", headers=()):
        path, _, query = path.partition("?")
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "HTTP_HOST": self.host}
        environ |= {"SCRIPT_NAME": self.script, "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}
        cookies = "; ".join(f"{each.key}={each.value}" for each in self.cookies.values())
        environ |= {"HTTP_COOKIE": cookies, **dict(headers)}
        setup_testing_defaults(environ)
        answers = []
        text = b"".join(self.app(environ, lambda *answer: answers.append(answer))).decode()
        (line, headers, *_) = answers[0]
        self.headers = dict(headers)
        self.cookies.load(self.headers.get("Set-Cookie", ""))
        assert int(line[:3]) == status, (text[text.find("<main") :], environ["wsgi.errors"].getvalue())
        assert self.headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'sha256-")
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
        return Page(text) if text else None


@pytest.fixture(scope="session")
def console():
    require_package("bottle")
    spec = importlib.util.spec_from_file_location("console", HERE / "examples" / "console.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def browsing(console, drive):
    return Operator(console.make_app(drive))


class Newsletter(Workflow):
    """Fails at its first step, or waits for a signal before the second one."""

    @step
    def send(self):
        if not self.hero.active:
            raise ConnectionError(f"no {self.hero.name}")

    @step(wait_for="opened", timeout=timedelta(days=3))
    def thank(self):
        did(self.signal_payload)


def newsletters(helpers, *activities):
    """Workflows that wait for their signal, or are paused by an error."""
    made = [Newsletter.create(hero=User.create(active=active)) for active in activities]
    for each in made:
        helpers.perform_next_step(each, raise_errors=False)
    return [reload(each) for each in made]


def states_of(workflows):
    return [reload(each).state for each in workflows]


def test_the_console_counts_workflows_and_groups_the_paused(browsing, helpers, console, monkeypatch):
    *_failed, waiting, by_hand = newsletters(helpers, False, False, False, True, True)
    by_hand.pause(reason="ask Grace")
    waiting.cancel()
    done = Plain.create(hero=User.create())
    page = browsing.get("/")
    links = dict(reversed(each) for each in page.links.items())
    assert "3 Newsletter at send: ConnectionError" in links
    assert links["1 Newsletter at thank: no error"].startswith("/workflows?state=paused&type=Newsletter&step=thank")
    assert (
        page.links["/workflows?type=Newsletter&state=paused"],
        page.links["/workflows?type=Newsletter&state=canceled"],
    ) == ("4", "1")
    assert page.links["/workflows?type=Plain&state=ready"] == "1"
    assert browsing.headers["Refresh"] == "30"
    monkeypatch.setattr(console, "COUNTED", 1)
    monkeypatch.setattr(console, "NEWEST", 3)
    page = browsing.get("/")
    assert page.links["/workflows?type=Newsletter&state=paused"] == "3+"
    assert page.links["/workflows?type=Plain&state=ready"] == "1+"
    assert "2 Newsletter at send: ConnectionError" in page.links.values()
    done.cancel()


def preview(browsing, call, step_name="send", error="ConnectionError"):
    page = browsing.get("/group", type="Newsletter", step=step_name, error=error, call=call)
    return page, page.forms[0] if page.forms else None


@pytest.mark.parametrize("call", ["resume", "skip", "cancel"])
def test_the_console_calls_a_group_after_its_preview(browsing, helpers, call):
    group = newsletters(helpers, False, False)
    others = newsletters(helpers, True)
    page, form = preview(browsing, call)
    assert f"{call} these 2" in page.text
    assert states_of(group) == ["paused"] * 2
    answer = browsing.post("/group", **form | {"reason": "the server is back"})
    assert f"{call}: 2 done, 0 left as they are" in answer.text
    assert states_of(group) == [{"cancel": "canceled"}.get(call, "ready")] * 2
    assert states_of(others) == ["ready"]
    for each in map(reload, group):
        said = [each.reason, *((row.reason, row.begun_reason) for row in each.execution_history)]
        assert "the server is back" in str(said)


def test_the_console_acts_on_a_group_as_far_as_it_stands_as_it_was_shown(browsing, helpers, drive):
    drive.clock = lambda: START
    stays, resumed, again, skipped, over = group = newsletters(helpers, *[False] * 5)
    _, form = preview(browsing, "cancel")
    drive.clock = lambda: START + timedelta(seconds=1)
    resumed.resume()
    again.resume()
    helpers.perform_next_step(again, raise_errors=False)
    skipped.skip()
    skipped.pause()
    over.cancel()
    (late,) = newsletters(helpers, False)
    answer = browsing.post("/group", **form)
    assert "cancel: 1 done, 4 left as they are" in answer.text
    assert f"Newsletter {again.id} is not as it was shown" in answer.text
    assert states_of([*group, late]) == ["canceled", "ready", "paused", "paused", "canceled", "paused"]
    assert reload(stays).transitioned_at == START + timedelta(seconds=1)


def test_the_console_waits_for_whoever_changes_a_row_and_then_leaves_it(browsing, helpers, database):
    (workflow,) = newsletters(helpers, False)
    _, form = preview(browsing, "skip")
    answers = []
    with database.peewee.atomic():
        workflow.resume()
        thread = threading.Thread(target=lambda: answers.append(browsing.post("/group", **form)))
        thread.start()
        thread.join(0.3)
        assert answers == []
    thread.join(20)
    assert "skip: 0 done, 1 left as they are" in answers[0].text
    assert reload(workflow).current_step_name == "send"


def test_the_console_offers_the_calls_that_a_state_allows(browsing, helpers, console):
    assert {name: tuple(gd.ALLOWED_FROM[name]) for name in console.CALLS} == console.CALLS
    assert console.STATES == gd.WORKFLOW_STATES
    ready, paused, over = newsletters(helpers, True, False, True)
    over.cancel()
    for workflow in (ready, paused, over):
        page = browsing.get(f"/workflows/{workflow.id}")
        offered = {call for form in page.forms for call in form["calls"]}
        assert offered == {name for name, states in console.CALLS.items() if reload(workflow).state in states}
        assert all("token" in form and "shown" in form for form in page.forms)


def test_the_console_makes_every_call(browsing, helpers, drive):
    drive.clock = lambda: START
    (workflow,) = newsletters(helpers, False)
    browsing.call(workflow, "resume", reason="mended")
    assert reload(workflow).execution_history.order_by(StepExecution.number.desc()).get().begun_reason == "mended"
    browsing.call(workflow, "reschedule", when="2h")
    assert reload(workflow).execution_history.where(
        StepExecution.state == "scheduled"
    ).get().scheduled_for == START + timedelta(hours=2)
    browsing.call(workflow, "reschedule", when="2026-03-09T12:00")
    assert reload(workflow).execution_history.where(
        StepExecution.state == "scheduled"
    ).get().scheduled_for == START + timedelta(days=8)
    browsing.call(workflow, "pause", reason="by hand")
    assert (reload(workflow).state, reload(workflow).reason) == ("paused", "by hand")
    browsing.call(workflow, "skip", reason="not needed")
    assert reload(workflow).current_step_name == "thank"
    browsing.call(workflow, "signal", signal="opened", payload='{"at": 7}', key="a")
    assert gd.WorkflowSignal.get().payload == {"at": 7}
    helpers.perform_next_step(workflow)
    assert reload(workflow).state == "finished"
    browsing.call(workflow, "resume_at", step="thank")
    browsing.call(workflow, "cancel", reason="the customer called")
    assert (reload(workflow).state, reload(workflow).reason) == ("canceled", "the customer called")
    page = browsing.get(f"/workflows/{workflow.id}")
    for said in (
        "the customer called",
        "resumed: mended",
        "ConnectionError: no ada",
        "thank",
        "opened",
        '{"at": 7}',
        "Traceback (most recent call last)",
    ):
        assert said in page.text


def test_the_console_shows_parent_and_children_and_cancels_them_together(browsing, hero):
    parent = Plain.create(hero=hero)
    children = [Newsletter.create(hero=User.create(), parent=parent) for _ in range(2)]
    page = browsing.get(f"/workflows/{parent.id}")
    assert {f"/workflows/{each.id}" for each in children} < page.links.keys()
    assert page.forms[0].keys() >= {"children", "reason"}
    page = browsing.get(f"/workflows/{children[0].id}")
    assert page.links[f"/workflows/{parent.id}"] == str(parent.id)
    assert "children" not in page.forms[0]
    ids = [link for link in browsing.get("/workflows", parent=parent.id).links if re.search(r"/\d+$", link)]
    assert ids == [f"/workflows/{each.id}" for each in reversed(children)]
    browsing.call(parent, "cancel", children="too", reason="all of it")
    assert states_of([parent, *children]) == ["canceled"] * 3


def test_the_console_refuses_what_cannot_be(browsing, helpers):
    (workflow,) = newsletters(helpers, True)
    path, page = f"/workflows/{workflow.id}", browsing.get(f"/workflows/{workflow.id}")
    form = page.forms[0] | {"calls": ""}
    assert "is ready; resume() was refused" in browsing.post(f"{path}/resume", 409, **form).text
    assert "not JSON" in browsing.post(f"{path}/signal", 400, **form, signal="opened", payload="{").text
    assert "no step" in browsing.post(f"{path}/signal", 409, **form, signal="closed").text
    assert "no duration" in browsing.post(f"{path}/reschedule", 400, **form, when="soon").text
    browsing.post(f"{path}/reattempt", 404, **form)
    browsing.post("/workflows/999999/cancel", 404, **form)
    for gone in ("/workflows/999999", "/workflows/99999999999999999999", "/workflows/x", "/nothing"):
        browsing.get(gone, 404)
    for wrong in ({"parent": "x"}, {"before": "-1"}, {"older_than": "long"}, {"older_than": "999999d"}, {"step": "\0"}):
        browsing.get("/workflows", 400, **wrong)
    browsing.get("/group", 400, call="delete")
    helpers.travel(workflow, timedelta(days=3))  # it stands at another step, or no more
    assert "not as it was shown" in browsing.post(f"{path}/skip", 409, **form).text
    assert states_of([workflow]) == ["paused"]


def test_the_console_refuses_forged_requests(browsing, helpers, console, drive):
    (workflow,) = newsletters(helpers, False)
    path, form = f"/workflows/{workflow.id}/cancel", browsing.get(f"/workflows/{workflow.id}").forms[0] | {"calls": ""}
    other = Operator(browsing.app)
    others = other.get(f"/workflows/{workflow.id}").forms[0]["token"]
    browsing.post(path, 403)
    browsing.post(path, 403, **form | {"token": others})
    browsing.post(path, 403, **form | {"token": "\u05e9"})
    Operator(browsing.app).post(path, 403, **form)  # without the cookie
    for site in ("cross-site", "same-site", "none"):
        browsing.post(path, 403, {"HTTP_SEC_FETCH_SITE": site}, **form)
    browsing.ask("POST", path, 413, b"x" * 1_000_001)
    browsing.ask("PUT", path, 403)
    browsing.get(path, 405)
    for host in ("evil.example", "localhost.evil.example:8080", "", "127.0.0.1.nip.io"):
        foreign = Operator(browsing.app, host)
        foreign.cookies = browsing.cookies
        foreign.get("/", 421)
        foreign.post(path, 421, **form)
    only_shows = Operator(console.make_app(drive, read_only=True, secret="s"))
    assert only_shows.get(f"/workflows/{workflow.id}").forms == []
    only_shows.get("/group", 400, call="cancel", type="Newsletter", step="send", error="ConnectionError")
    only_shows.post(path, 403, **form)
    assert states_of([workflow]) == ["paused"]
    assert "HttpOnly" in other.headers["Set-Cookie"]
    assert "SameSite=strict" in other.headers["Set-Cookie"]
    browsing.post(path, 303, {"HTTP_SEC_FETCH_SITE": "same-origin"}, **form)
    assert states_of([workflow]) == ["canceled"]


def test_gets_change_nothing_in_the_console(browsing, helpers, db):
    workflows = newsletters(helpers, False, True)
    before = [list(model.select().order_by(model.id).dicts()) for model in gd.MODELS]
    with statements_sent(db) as sent:
        for path in ("/", "/workflows", *(f"/workflows/{each.id}" for each in workflows)):
            browsing.get(path)
        for call in ("resume", "skip", "cancel"):
            preview(browsing, call)
    assert {each.split()[0].upper() for each in sent} <= {"SELECT"}
    assert [list(model.select().order_by(model.id).dicts()) for model in gd.MODELS] == before


def test_processes_of_the_console_share_their_tokens_by_the_secret(console, drive, helpers):
    (workflow,) = newsletters(helpers, False)
    one, other, stranger = (Operator(console.make_app(drive, secret=secret)) for secret in ("s", b"s", "t"))
    form = one.get(f"/workflows/{workflow.id}").forms[0] | {"calls": ""}
    for each, status in ((stranger, 403), (other, 303)):
        each.cookies = one.cookies
        each.post(f"/workflows/{workflow.id}/resume", status, **form)
    assert states_of([workflow]) == ["ready"]


def test_the_console_is_mounted_behind_a_login(console, drive, helpers, db):
    import bottle

    app, (workflow,) = bottle.Bottle(), newsletters(helpers, False)
    app.mount("/ops/", console.make_app(drive, hosts=("Ops.Example.com",)))
    browsing = Operator(app, "ops.example.com")
    page = browsing.get("/ops/workflows")
    assert f"/ops/workflows/{workflow.id}" in page.links
    assert "Path=/ops/" in browsing.headers["Set-Cookie"]
    Operator(app, "localhost").get("/ops/", 421)
    assert not db.is_closed()  # it was open before


def test_the_console_selects_as_the_command_line_does(browsing, command_line, helpers, clock):
    failed, waiting, by_hand = newsletters(helpers, False, True, True)
    by_hand.pause(reason="ask Grace")
    plain = Plain.create(hero=User.create(name="mary"))
    child = Plain.create(hero=User.create(), parent=plain)
    clock.forward(hours=3)
    newer = Plain.create(hero=User.create())
    everything = [newer, child, plain, by_hand, waiting, failed]
    for found, selection in (
        (everything, {}),
        ([newer, child, plain, waiting], {"state": "ready"}),
        ([by_hand, failed], {"state": "paused"}),
        ([], {"state": "performing"}),
        ([newer, child, plain], {"type": "Plain"}),
        ([plain], {"hero": f"User:{plain.hero_id}"}),
        ([failed], {"step": "send"}),
        ([failed], {"error": "no ada"}),
        ([failed], {"error": "CONNECTIONerr"}),
        ([], {"error": "Grace"}),
        ([by_hand], {"why": "grace"}),
        ([by_hand, waiting], {"waiting_for": "opened"}),
        ([waiting], {"waiting_for": "opened", "state": "ready"}),
        ([child, plain, by_hand, waiting, failed], {"older_than": "2h59min"}),
        ([failed], {"older_than": "3h", "error": "ada", "state": "paused", "type": "Newsletter", "step": "send"}),
        ([child], {"parent": str(plain.id)}),
    ):
        assert listed_by(browsing, **selection) == [each.id for each in found], selection
        options = [f"--{name.replace('_', '-')}={value}" for name, value in selection.items()]
        listed = json.loads(command_line("list", "--json", *options)[1])
        assert [each["id"] for each in listed] == [each.id for each in found], options
    for found, selection in (  # what the command line refuses, and has no need of
        ([], {"state": "bogus' or 1=1"}),
        ([], {"type": "Nothing"}),
        ([waiting], {"before": str(by_hand.id), "state": "ready"}),
    ):
        assert listed_by(browsing, **selection) == [each.id for each in found], selection


def listed_by(browsing, **selection):
    links = browsing.get("/workflows", **selection).links
    return [int(link.rpartition("/")[2]) for link in links if re.search(r"/workflows/\d+$", link)]


@pytest.mark.parametrize("text", ["2h", " 90 min", "1h30min", "2d 3s", "250ms", "1 ms1d", "", "soon", "2", "-1h", "1w"])
def test_the_console_reads_durations_as_the_command_line_does(console, text):
    try:
        duration = gd._duration_of(text)
    except argparse.ArgumentTypeError:
        with pytest.raises(console.HTTPError):
            console.duration(text)
    else:
        assert console.duration(text) == duration


@pytest.mark.parametrize("selection", [{}, {"state": "paused"}, {"state": "ready"}, {"type": "Newsletter"}])
def test_the_console_pages_by_key(browsing, helpers, console, monkeypatch, selection):
    monkeypatch.setattr(console, "PER_PAGE", 2)
    workflows = newsletters(helpers, *[selection != {"state": "paused"}] * 5)
    found, path, pages = [], "/workflows?" + urlencode(selection), 0
    while path:
        page, pages = browsing.get(path), pages + 1
        found += [int(link.rpartition("/")[2]) for link in page.links if re.search(r"/workflows/\d+$", link)]
        path = next((link for link, text in page.links.items() if text == "older ones"), None)
    assert (found, pages) == ([each.id for each in reversed(workflows)], 3)


def test_the_console_shows_hostile_names_and_errors_as_text(console, drive, db):
    class Job(Workflow):
        workflow_type = HOSTILE
        may_proceed_without_hero = True

        @step(name=HOSTILE)
        def one(self):
            self.context[UNPRINTABLE] = UNPRINTABLE
            raise type(HOSTILE, (ValueError,), {})(UNPRINTABLE + "long" * 20_000)

    job = Job.create()
    gd.TestHelpers().perform_next_step(job, raise_errors=False)
    browsing, kind = Operator(console.make_app(drive)), f"{__name__}.{HOSTILE}"
    given = {"type": HOSTILE, "step": HOSTILE, "error": kind}
    for page in (
        browsing.get("/"),
        browsing.get("/workflows"),
        browsing.get("/workflows", **given),
        browsing.get("/group", **given, call="cancel"),
        browsing.get(f"/workflows/{job.id}"),
    ):
        assert HOSTILE in page.text
        assert page.elements["title"] >= 1
    assert f"{kind}: {SHOWN}long" in page.text
    assert r"gnp.exe\u001b[31m\x85" in page.text  # in the context, as JSON
    assert len(page.text) < 60_000  # of an error of 80,000 characters, and its traceback
    assert HOSTILE in browsing.get("/workflows", type=HOSTILE, step=HOSTILE, why="nothing <b>").text


def test_the_console_says_what_to_do_without_tables(console, tmp_path):
    db = SqliteDatabase(tmp_path / "empty.db")
    assert "drive.create_tables() makes them" in Operator(console.make_app(GenevaDrive(db))).get("/", 503).text
    assert db.is_closed()


def test_what_a_page_of_the_console_reads_does_not_grow_with_the_tables(console, monkeypatch, tmp_path):
    for name in ("NEWEST", "COUNTED", "PER_PAGE"):
        monkeypatch.setattr(console, name, 20)
    paths = ["/", "/workflows?state=paused", "/workflows?state=ready", "/workflows"]
    paths += ["/group?call=skip&type=Newsletter&step=send"]
    db, steps = SqliteDatabase(tmp_path / "many.db"), []
    with driven(db) as drive:
        browsing = Operator(console.make_app(drive))

        def effort_for(path):
            browsing.get(path)  # what Peewee looks up once is not counted
            with instructions(db, 10) as ticks:
                browsing.get(path)
            return len(ticks)

        for number in (300, 3000):
            Newsletter.create_many([User.create() for _ in range(number)])
            ready = Workflow.select().where(Workflow.state == "ready").order_by(-Workflow.id)
            for workflow in list(ready)[::10]:
                workflow.pause()
            steps.append([effort_for(path) for path in paths])
    for path, few, many in zip(paths, *steps):
        assert 20 < many < few * 1.2, path


class Browser:
    """A real Chromium, driven by the DevTools protocol through two pipes."""

    IS_LOADED = {"expression": "document.readyState == 'complete' && !window.isLeft"}

    def __init__(self, chromium, profile):
        (theirs_in, self.commands), (self.answers, theirs_out) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        # Its ends of the pipes are to be 3 and 4.
        script = f'exec 5<&{theirs_in} 6>&{theirs_out}; exec 3<&5 4>&6; exec "$@"'
        command = ["bash", "-c", script, "browser", str(chromium), *options, "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.read, self.number, self.session, self.console = b"", 0, {}, []
        until(lambda: self.targets())
        attached = self.send("Target.attachToTarget", targetId=self.targets()[0], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def targets(self):
        found = self.send("Target.getTargets")["targetInfos"]
        return [each["targetId"] for each in found if each["type"] == "page"]

    def send(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self):
        while b"\0" not in self.read:
            read = os.read(self.answers, 65536)
            assert read, "the browser is gone"
            self.read += read
        message, _, self.read = self.read.partition(b"\0")
        event = json.loads(message)
        if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.console.append(event["params"])  # where it tells what a policy forbade
        return event

    def loaded(self, leave):
        """Do what opens another page, and wait until that is there."""
        self.look("window.isLeft = true")
        leave()
        until(lambda: self.send("Runtime.evaluate", **self.IS_LOADED)["result"].get("value"))

    def open(self, url):
        self.loaded(lambda: self.send("Page.navigate", url=url))

    def look(self, script):
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def type(self, **values):
        """Write into the fields of the form that has all these names."""
        self.look(
            f"""{{ const values = {json.dumps(values)};
            const form = [...document.forms].find(each => Object.keys(values).every(name => each.elements[name]));
            for (const name in values) form.elements[name].value = values[name]; }}"""
        )

    def click(self, text):
        """Click on the first link or button with this text, and wait for the page that it opens."""
        place = self.look(
            f"""{{ const found = [...document.querySelectorAll('a, button')].find(
                each => each.textContent.trim() == {json.dumps(text)});
            found.scrollIntoView({{block: 'center'}});
            const [box] = found.getClientRects(); [box.x + box.width / 2, box.y + box.height / 2] }}"""
        )
        mouse = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type="mousePressed", **mouse)
        self.loaded(lambda: self.send("Input.dispatchMouseEvent", type="mouseReleased", **mouse))

    def text(self):
        return self.look("document.body.innerText")

    def looks_right(self, name):
        """At each width and in each scheme; it is kept as a picture where there is a folder for them."""
        for width, scheme in itertools.product((400, 1280), SCHEMES):
            self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            assert self.look("document.documentElement.scrollWidth") <= width, name
            colours = "getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color"
            assert self.look(f"[{colours}]") == SCHEMES[scheme]
            if folder := os.environ.get("GENEVA_DRIVE_SCREENSHOTS"):
                clip = self.look("({x: 0, y: 0, width: innerWidth, height: document.body.offsetHeight, scale: 1})")
                clip["height"] = min(clip["height"], 1200)
                picture = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
                shot = base64.b64decode(picture["data"])
                Path(folder, f"{name}-{width}-{scheme}.png").write_bytes(shot)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)


@pytest.fixture
def browser(chromium, tmp_path):
    browser = Browser(chromium, tmp_path / "profile")
    yield browser
    browser.close()


CONSOLED = f"""
import smtplib
from peewee import CharField, Model, SqliteDatabase
from geneva_drive import GenevaDrive, TestHelpers, Workflow, step

db = SqliteDatabase("app.db", pragmas={{"journal_mode": "wal"}}, timeout=10)
drive = GenevaDrive(db)

class User(Model):
    id = CharField(primary_key=True)

    class Meta:
        database = db

class Signup(Workflow):
    @step(on_exception="reattempt", max_reattempts=60)
    def send_reminder(self):
        raise smtplib.SMTPServerDisconnected({UNPRINTABLE!r} + "long" * 20_000)

    @step(name={HOSTILE!r}, wait_for="opened")
    def thank(self):
        pass

if __name__ == "__main__":
    db.create_tables([User])
    drive.create_tables()
    for key in ({UNPRINTABLE!r}, "W" * 255, "third"):
        TestHelpers().speedrun_workflow(Signup.create(hero=User.create(id=key)), raise_errors=False)
"""
SCHEMES = {
    "dark": ["rgb(17, 20, 24)", "rgb(230, 233, 237)"],
    "light": ["rgb(244, 245, 247)", "rgb(27, 31, 36)"],
}


def test_the_console_is_used_in_a_browser(console, browser, tmp_path):
    (tmp_path / "app.py").write_text(CONSOLED, encoding="utf-8")
    example(tmp_path, tmp_path / "app.py")
    assert "app:User is no GenevaDrive" in example(tmp_path, "console.py", "app:User", status=2)
    assert "no attribute" in example(tmp_path, "console.py", "app:nothing", status=2)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = python(HERE / "examples" / "console.py", "app:drive", "--port=0", cwd=tmp_path, **streams)
    try:
        browser.open(process.stdout.readline().decode().strip())
        use(browser)
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert b"Traceback" not in errors
    assert browser.console == []
    assert doctor_of(tmp_path / "app.db") == []


def use(browser):
    group = "Signup at send_reminder: smtplib.SMTPServerDisconnected"
    assert f"3 {group}" in browser.text()
    browser.click(f"3 {group}")  # which filters
    assert browser.look("document.forms[0].elements.state.value") == "paused"
    browser.type(hero="User:third")
    browser.click("show")
    browser.click("Signup 3")
    assert "SMTPServerDisconnected" in browser.text()
    browser.type(reason="the customer <b>called</b>")
    browser.click("cancel")
    assert "the customer <b>called</b>" in browser.text()
    for path in ("/", "/workflows", "/workflows/1", "/workflows/2", "/group"):
        query = "?call=skip&type=Signup&step=send_reminder&error=smtplib.SMTPServerDisconnected"
        browser.open(browser.look("location.origin") + path + query * (path == "/group"))
        browser.look("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert browser.look("document.scripts.length") == 0
        browser.looks_right(f"hostile{path.replace('/', '_')}")
    browser.click("skip these 2")  # the preview, as it was opened last
    assert "skip: 2 done, 0 left as they are" in browser.text()
    browser.click("Overview")
    assert "None." in browser.text()
    browser.open(browser.look("location.origin") + "/workflows/2")
    assert "waits for the signal opened" in browser.text()
    browser.type(signal="opened", payload='{"at": "noon"}')
    browser.click("signal")
    assert '{"at": "noon"}' in browser.text()
    assert "due for" in browser.text()
    assert browser.look("document.title") == "Signup 2"


@contextlib.contextmanager
def open_to_browsers(console, app):
    """A console on a port of its own, in a thread."""
    with console.make_server("127.0.0.1", 0, app, console.Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.exhaustive
def test_a_night_is_mended_in_a_browser_and_nothing_else_is_touched(console, browser, drive, clock, mails, monkeypatch):
    failed = []
    for _ in range(5):  # over an hour
        failed += mails(100)
        clock.forward(minutes=12)
    clock.now = START + timedelta(days=3)
    monkeypatch.setitem(globals(), "mail_server", smtplib.SMTPServerDisconnected("Connection unexpectedly closed"))
    for _ in range(5):  # an hour without the mail server
        work_off(drive)
        clock.forward(minutes=12)
    others = mails(3, smtplib.SMTPServerDisconnected("Connection unexpectedly closed"))  # at another step
    others += mails(2, ValueError("no such mailbox"))
    others += mails(40)  # sent, and to be reminded
    Workflow.get_by_id(others[-1]).pause(reason="a holiday until 2026-04-01")
    clock.forward(hours=3)
    untouched, everything = rows(*others), [model.select().count() for model in gd.MODELS]

    with open_to_browsers(console, console.make_app(drive)) as url:
        mend_the_night(browser, url, failed)
    assert browser.console == []

    assert rows(*others) == untouched
    *resumed, canceled = failed
    begun = StepExecution.select().where(StepExecution.begun_reason == "the mail server is back")
    assert {each.workflow_id for each in begun} == {*resumed}
    assert {(each.step_name, each.state, each.scheduled_for) for each in begun} == {("remind", "scheduled", clock.now)}
    assert {each.id for each in Mailing.ready()} == {*resumed, *others[5:-1]}
    (left,) = Mailing.canceled()
    assert (left.id, left.reason, left.execution_count) == (canceled, "asked to be left alone", 2)
    workflows, executions, signals = everything
    assert [model.select().count() for model in gd.MODELS] == [workflows, executions + 499, signals]
    work_off(drive, limit=500)
    assert {each.id for each in Mailing.finished()} == {*resumed}


def mend_the_night(browser, url, failed):
    group, *_, canceled = "Mailing at remind: smtplib.SMTPServerDisconnected", *failed
    browser.open(url)
    for number, paused in {500: group, 3: group.replace("remind", "send"), 2: "Mailing at send: ValueError"}.items():
        assert f"{number} {paused}" in browser.text()
    browser.looks_right("1-overview")
    browser.click(f"500 {group}")
    browser.click(f"Mailing {canceled}")
    assert "SMTPServerDisconnected: Connection unexpectedly closed" in browser.text()
    browser.looks_right("2-workflow")
    browser.type(reason="asked to be left alone")
    browser.click("cancel")
    assert "asked to be left alone" in browser.text()
    browser.looks_right("3-canceled")
    browser.click("Overview")
    paused = rows(*failed)
    browser.click("resume")  # of the largest group, which stands first
    assert f"resume 499 {group}" in browser.text()
    browser.looks_right("4-preview")
    assert rows(*failed) == paused
    browser.type(reason="the mail server is back")
    browser.click("resume these 499")
    assert "resume: 499 done, 0 left as they are" in browser.text()
    browser.looks_right("5-done")
    browser.click("Overview")
    assert group not in browser.text()
    assert "3 Mailing at send: smtplib.SMTPServerDisconnected" in browser.text()
    browser.looks_right("6-overview-afterwards")


def test_the_readme_lists_every_example_and_the_small_ones_are_small():
    readme = (HERE / "README.md").read_text()
    for path in (HERE / "examples").iterdir():
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__"):
            assert f"(examples/{path.name})" in readme
    for line in re.findall(r"^- .*\(examples/.*", readme.partition("under 80 lines each")[2], re.MULTILINE):
        (name,) = re.findall(r"\((examples/.*?)\)", line)
        assert len((HERE / name).read_text().splitlines()) < 80, name


# A hero for the manual's payments, and a run of them.
TRY_THE_PAYMENTS = """
from peewee import BooleanField, IntegerField, Model, SqliteDatabase
from geneva_drive import GenevaDrive, TestHelpers
from steps import PaymentWorkflow

db = SqliteDatabase(":memory:")
drive = GenevaDrive(db)
receipts = [None, "receipt 7"]

class Order(Model):
    total = IntegerField(default=30)
    withdrawn = BooleanField(default=False)

    class Meta:
        database = db

    def charge(self, idempotency_key):
        return receipts.pop(0)

    def book(self, receipt):
        print("booked:", receipt)

    def mail_review_request(self):
        print("how was it?")

db.create_tables([Order])
drive.create_tables()
payment = PaymentWorkflow.create(hero=Order.create())
TestHelpers().speedrun_workflow(payment)
print(payment.state, [each.outcome for each in payment.execution_history])
"""

TRY_THE_WAITS = """
from datetime import datetime, timedelta, timezone
from peewee import CharField, DateTimeField, Model, SqliteDatabase
from geneva_drive import GenevaDrive, TestHelpers
from waits import TrialWorkflow

db = SqliteDatabase(":memory:")
drive = GenevaDrive(db, clock=lambda: datetime(2026, 3, 1, 12, tzinfo=timezone.utc))

class User(Model):
    email = CharField()
    trial_ends_at = DateTimeField()
    class Meta:
        database = db

drive.create_tables([User])
user, helpers = User.create(email="ada@example.com", trial_ends_at=datetime(2026, 3, 9, 12)), TestHelpers()
trial = TrialWorkflow.create(hero=user)
helpers.travel(trial, timedelta(days=2))
print(f"{trial.execution_history[-1].scheduled_for:%B %d}")
User.update(trial_ends_at=datetime(2026, 3, 20, 12)).execute()
helpers.travel(trial, timedelta(days=7))
print(f"{trial.execution_history[-1].scheduled_for:%B %d}")
helpers.travel(trial, timedelta(days=11))
"""

TRY_THE_DELIVERY = """
from peewee import Model, SqliteDatabase
from geneva_drive import GenevaDrive, TestHelpers
from delivery import DeliveryWorkflow, payment_webhook

db = SqliteDatabase(":memory:")
drive = GenevaDrive(db)

class Order(Model):
    class Meta:
        database = db

    def send(self, receipt):
        print("sent,", receipt)

    def keep_for_a_person(self, event):
        print("too late,", event["receipt"])

db.create_tables([Order])
drive.create_tables()
order = Order.create()
workflow = DeliveryWorkflow.create(hero=order)
TestHelpers().speedrun_workflow(workflow)
for _ in range(2):
    payment_webhook(order, {"id": "event 1", "receipt": "receipt 7"})
TestHelpers().speedrun_workflow(workflow)
for number in (1, 2):
    payment_webhook(order, {"id": f"event {number}", "receipt": "receipt 8"})
"""

# The manual's two test files stand in one folder, and leave nothing in the application's database.
TRY_BOTH_ORDERS = """
import subprocess, sys

files = ["test_app.py", "test_with_pytest.py"]
for order in (files, files[::-1], files[1:]):
    subprocess.run([sys.executable, "-W", "error", "-m", "pytest", "-p", "no:terminal", *order], check=True)

import app

print(app.SignupWorkflow.select().count(), app.User.select().count())
app.db.close()
"""

TRY_MATCHING = """
from shop import Order
from geneva_drive import TestHelpers
from invoices import InvoiceWorkflow

workflow = InvoiceWorkflow.create(hero=Order.create(total=30))
for payload in ({"cents": 40}, None, {"amount": 10}, {"amount": 40}):
    workflow.signal("paid", payload)
TestHelpers().speedrun_workflow(workflow)
"""

TRY_THE_LIMIT = """
from datetime import timedelta
from shop import Payment, User
from geneva_drive import TestHelpers
from renewals import RenewalWorkflow

users = [User.create(email=email) for email in ("ada@example.com", "bob@example.com")]
paying, silent = map(RenewalWorkflow.create, users)
paying.signal("paid", {"cents": 1500})
TestHelpers().speedrun_workflow(paying)
print(Payment.get().amount)
TestHelpers().travel(silent, timedelta(days=14))
"""

TRY_EARLY = """
from shop import Order, drive
from loans import LoanWorkflow, returned

returned(LoanWorkflow.create(hero=Order.create()))
drive.run(until=drive.is_idle)
"""

TRY_MONTHLY = """
from shop import User
from geneva_drive import TestHelpers
from monthly import InvoiceWorkflow, MonthlyInvoices

User.create(email="ada@example.com")
TestHelpers().speedrun_workflow(MonthlyInvoices.create())
for workflow in InvoiceWorkflow.ready():
    TestHelpers().speedrun_workflow(workflow)
"""

TRY_FLASK = """
from flask_app import app
from signups import SignupWorkflow, User, db, drive

drive.create_tables([User])
db.close()
client = app.test_client()
for _ in range(2):
    print(client.post("/signups", data={"email": "ada@example.com"}).status_code)
print(client.get("/signups/1").json, client.get("/signups/2").status_code)
User.delete().execute()
SignupWorkflow.delete().execute()
"""

# FastAPI's own client needs one more package.
TRY_FASTAPI = """
import asyncio
from fastapi_app import app
from signups import SignupWorkflow, User, drive

async def post(path, query):
    sent, scope = [], {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "headers": []}
    async def receive():
        return {"type": "http.request", "body": b""}
    async def send(message):
        sent.append(message)
    await app({**scope, "query_string": query, "scheme": "http", "server": ("test", 80)}, receive, send)
    print(sent[0]["status"], sent[1]["body"].decode())

drive.create_tables([User])
asyncio.run(post("/signups", b"email=ada@example.com"))
User.delete().execute()
SignupWorkflow.delete().execute()
"""

TRY_DJANGO = """
import django
from django.conf import settings
from django.core.management import call_command

database = {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}
apps = ["django.contrib.contenttypes", "django.contrib.auth"]
settings.configure(DATABASES={"default": database}, INSTALLED_APPS=apps)
django.setup()
call_command("migrate", verbosity=0)
from django.contrib.auth.models import User
from django.db import transaction
from beside_django import begin_signup, drive

drive.create_tables()
with transaction.atomic():
    user = User.objects.create(username="ada", email="ada@example.com")
    transaction.on_commit(lambda: begin_signup(user.id))
drive.run(until=drive.is_idle)
"""


# The application of the session at the command line, on the morning after the mail server was down.
MORNING = """
from datetime import datetime, timedelta, timezone
from smtplib import SMTPServerDisconnected
from peewee import CharField, Model, SqliteDatabase
from geneva_drive import ExceptionPolicy, GenevaDrive, TestHelpers, Workflow, step

db = SqliteDatabase("app.db")
NIGHT = datetime(2026, 11, 23, 2, 0, 0, tzinfo=timezone.utc)
now = datetime(2026, 11, 23, 5, 40, 30, tzinfo=timezone.utc)
drive = GenevaDrive(db, clock=lambda: now)

class User(Model):
    email = CharField()
    class Meta:
        database = db

class SignupWorkflow(Workflow):
    @step
    def send_welcome_email(self):
        passes(seconds=0.2)

    @step(wait=timedelta(days=2), on_exception=ExceptionPolicy("reattempt", wait=600, jitter=0, max_reattempts=1))
    def send_reminder(self):
        passes(seconds=5)
        if NIGHT <= now < NIGHT + timedelta(minutes=40):
            raise ConnectionRefusedError(111, "Connection refused")
        if NIGHT <= now < NIGHT + timedelta(hours=1):
            raise SMTPServerDisconnected("Connection unexpectedly closed")

def passes(**duration):
    global now
    now += timedelta(**duration)

def setup():
    global now
    drive.create_tables([User])
    with db.atomic():
        for number in range(520):
            now = NIGHT - timedelta(days=2, seconds=65 - 6 * number)
            workflow = SignupWorkflow.create(hero=User.create(email=f"user{number}@example.com"))
            while workflow.state == "ready":
                now = max(now, workflow.execution_history[-1].scheduled_for)
                TestHelpers().perform_next_step(workflow, raise_errors=False)
        for reason in ("on holiday until 2026-12-01", None, None):
            workflow = SignupWorkflow.create(hero=User.create(email="somebody@example.com"))
            if reason:
                workflow.pause(reason=reason)
"""


class Program(typing.NamedTuple):
    """How the Python below one heading is tried: the file that it is, and what it prints when Python is run so.

    Without arguments, it is the commands shown below it that run it. `text` is the file where the manual shows none.
    """

    file: str
    arguments: SequenceType[str] = ()
    output: str = ""
    needs: str | None = None  # a package
    text: str = ""


README, MANUAL = HERE / "README.md", HERE / "docs"
DOCUMENTS = {path.name: path for path in (README, *sorted(MANUAL.glob("*.md")))}


def blocks(document):
    """A document's fenced blocks: the heading above each, its language and its text."""
    heading = None
    pattern = r"^#+ (?P<heading>.*)$|^ *```(?P<language>.*)\n(?P<text>(?:.*\n)*?) *```$"
    for found in re.finditer(pattern, DOCUMENTS[document].read_text(encoding="utf-8"), re.MULTILINE):
        heading = found["heading"] or heading
        if not found["heading"]:
            yield heading, found["language"], textwrap.dedent(found["text"])


def python_below(document, heading):
    return shown_below(document, heading, "python")


def shown_below(document, heading, language="text"):
    return "".join(text for *place, text in blocks(document) if place == [heading, language])


# What each document's folder holds from the start: the application that it is about, as the manual shows it.
SURROUNDINGS = {
    "shop.py": python_below("shop.md", "The shop"),
    "bank.py": python_below("shop.md", "The bank"),
    "app.py": python_below("README.md", "A complete program"),
}

# By document and heading, in their order. The files of a document share a folder.
PROGRAMS = {
    "README.md": {
        "A complete program": Program("app.py", ["app.py"], "welcome, ada@example.com\nstill there, ada@example.com\n")
    },
    "children.md": {
        "Start them, and wait": Program("orders.py"),
        "Watch it work": Program("watch.py", ["watch.py"], "closed, lost: 1\n"),
    },
    "databases.md": {
        each: Program("app.py", ["app.py"], "default\n") for each in ("PostgreSQL", "MySQL and MariaDB", "SQLite")
    },
    "deploys.md": {
        "Remove, rename, add": Program(
            "next_app.py",
            ["-c", "import next_app; print(*(each.name for each in next_app.SignupWorkflow.steps))"],
            "send_welcome_email survey\n",
        )
    },
    "errors.md": {
        "Retry a step": Program("charging.py", ["charging.py"]),
        "What is recorded": Program(
            "recorded.py",
            ["recorded.py"],
            "reserve reattempted KeyError 'no shelf'\n"
            "reserve success None None\n"
            "tell_the_warehouse skipped ValueError no such article\n"
            "charge failed LookupError no such card\n"
            "paused at charge - LookupError: no such card\n",
        ),
    },
    "heroes.md": {
        "One ongoing workflow for each hero": Program(
            "signups.py",
            ["signups.py"],
            "ongoing already: workflow 1\n1 False\n1 created\nwelcome, ada@example.com\nwelcome, bob@example.com\n",
        )
    },
    "loops.md": {
        "Two ways": Program("month_end.py"),
        "Watch it fail and go on": Program(
            "watch.py", ["watch.py"], shown_below("loops.md", "Watch it fail and go on")
        ),
    },
    "operating.md": {
        "A morning after the mail server was down": Program("app.py", ["-c", "import app; app.setup()"], text=MORNING)
    },
    "recipes.md": {
        "An application to build on": Program("signups.py", ["signups.py"]),
        "Flask": Program("flask_app.py", ["-c", TRY_FLASK], "201\n200\n{'state': 'ready'} 404\n", needs="flask"),
        "FastAPI": Program(
            "fastapi_app.py",
            ["-c", TRY_FASTAPI],
            '200 {"id":1,"is_new":true}\n',
            needs="fastapi",
        ),
        "Django beside it": Program(
            "beside_django.py", ["-c", TRY_DJANGO], "welcome, ada@example.com\n", needs="django"
        ),
        "Jupyter": Program("notebook.py", ["notebook.py"], "welcome, ada@example.com\n[('send_welcome', 'success')]\n"),
        "Scripts and cron": Program(
            "script.py",
            ["-c", "import runpy; [runpy.run_path('script.py') for _ in range(2)]"],
            "welcome, bob@example.com\nwelcome, cleo@example.com\n",
        ),
        "asyncio": Program("in_threads.py", ["in_threads.py"], "True\nTrue\nTrue\n"),
        "Do something unless a signal comes": Program("offers.py", ["offers.py"], "a reminder to eve@example.com\n"),
        "A DateField as a wait": Program("renewals.py", ["renewals.py"], "2199-07-01 07:00:00+00:00\n"),
    },
    "recurring.md": {
        "A report each night": Program("nightly.py"),
        "Try it": Program("try_it.py", ["try_it.py"], "the report of 2026-07-01 01:00:00+00:00\n"),
        "For each hero, each month": Program("monthly.py", ["-c", TRY_MONTHLY], "an invoice for ada@example.com\n"),
    },
    "running.md": {
        "Start a consumer": Program("logs.py", ["logs.py"]),
        "Several queues, and priorities": Program("queues.py", ["queues.py"], "news for ada@example.com\ncounted\n"),
    },
    "security.md": {"Queues": Program("signed.py", ["signed.py"], "shop\n")},
    "shop.md": {
        "The shop": Program("shop.py", ["shop.py"]),
        "Watch a class work": Program("thanks.py", ["thanks.py"], "thank you for 30\nfinished\n"),
        "The bank": Program("bank.py", ["bank.py"]),
    },
    "signals.md": {
        "Wait, and tell": Program("delivery.py", ["-c", TRY_THE_DELIVERY], "sent, receipt 7\ntoo late, receipt 8\n"),
        "What may come first": Program("loans.py", ["-c", TRY_EARLY], "thank you\n"),
        "Time limits": Program("renewals.py", ["-c", TRY_THE_LIMIT], "thank you\n1500\ngoodbye\n"),
        "A wrong payload": Program(
            "tickets.py", ["tickets.py"], "paused - KeyError: 'cents'\n{'amount': 30}\nbooked 3000\n"
        ),
        "Only some of the signals": Program("invoices.py", ["-c", TRY_MATCHING], "closed with 40\n"),
    },
    "states.md": {
        "Find workflows": Program(
            "find.py", ["find.py"], "1 send_welcome she asked for a moment\n0\nready\ncanceled\n"
        ),
        "Events": Program(
            "events.py",
            ["events.py"],
            "None -> ready\nready -> performing\nperforming -> finished\ngreet success\n",
        ),
    },
    "steps.md": {
        "A class with everything": Program(
            "steps.py",
            ["-c", TRY_THE_PAYMENTS],
            "booked: receipt 7\nhow was it?\nfinished ['reattempted', 'success', 'success', 'success']\n",
        ),
        "Waits": Program(
            "waits.py",
            ["-c", TRY_THE_WAITS],
            "did you know, ada@example.com\nMarch 09\nMarch 20\nyour trial is over, ada@example.com\n",
        ),
        "Several steps from one body": Program(
            "polling.py", ["polling.py"], "polling_1 polling_2 polling_3 polling_4 polling_5 polling_6\n"
        ),
    },
    "testing.md": {
        "With unittest": Program(
            "test_app.py",
            ["-m", "unittest", "-q", "test_app"],
            "welcome, ada@example.com\nstill there, ada@example.com\n",
        ),
        "With pytest": Program("conftest.py"),
        "A test that uses it": Program("test_with_pytest.py", ["-c", TRY_BOTH_ORDERS], "0 0\n"),
    },
    "transactions.md": {
        "Writes to your own database: `transactional`": Program(
            "booking.py", ["booking.py"], "booked 100\nfinished 900 False\npaused 900 False\n"
        )
    },
    "tutorial.md": {
        "The database": Program("models.py"),
        "A mail server that can fail": Program("mail.py"),
        **dict.fromkeys(
            ("The first step", "A wait", "A wait for each hero", "A signal", "Conditions and retries"),
            Program("app.py"),
        ),
        "Tests": Program(
            "test_app.py",
            ["-m", "unittest", "-q"],
            "to tina@example.com: welcome, please confirm\nto tina@example.com: please pay\n",
        ),
        # What the second terminal does there: a consumer performs Fay's step.
        "Two processes": Program(
            "fay.py",
            ["fay.py"],
            "to fay@example.com: welcome, please confirm\n",
            text="import app\napp.sign_up('fay@example.com')\napp.work()\n",
        ),
        "A deploy": Program(
            "app.py", text=python_below("tutorial.md", "Conditions and retries").replace("begin_trial", "start_trial")
        ),
        "Keep the step's old name": Program("app.py"),
    },
}

# What runs the manual's commands, those that install aside.
COMMANDS = {
    ".venv/bin/python examples/signup.py": test_the_signup_example_goes_on_after_kills_and_sends_each_mail_once,
    ".venv/bin/python -m pytest -n 4 --dist worksteal": pytest.main,  # this run
    ".venv/bin/python examples/chaos.py": test_the_chaos_example_kills_and_disturbs_and_finds_every_promise_kept,
    ".venv/bin/python examples/benchmark.py": test_the_benchmark_example_prints_the_tables_that_the_manual_shows,
    "geneva-drive app:drive worker --workers 4": test_a_worker_on_the_command_line_drains_on_sigterm,
    "huey_consumer app.huey -w 4": test_the_web_example_answers_while_its_consumer_works,
    "geneva-drive app:drive doctor --deploy": test_the_steps_in_flight_that_a_deploy_would_strand_are_counted,
    "geneva-drive app:drive reschedule --type TrialWorkflow --step send_tips --as-declared": (
        test_after_a_deploy_that_shortened_a_wait_one_command_brings_all_to_what_is_declared
    ),
}


def typed(line, folder):
    """What a command prints that is typed in a folder, in a terminal of 100 columns."""
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **LEAN, "COLUMNS": "100"}
    command = f'set -o pipefail; geneva-drive() {{ python -m geneva_drive "$@"; }}; {line}'
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("python -m geneva_drive", "geneva-drive")


def without_times(text):
    """The tutorial is run at any time; what a table says of it is narrower or wider."""
    moment = r"(in \d+ \w+|\d+ \w+ ago)(, \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ)?"
    return re.sub(" +", " ", re.sub(moment, "soon", text))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_program_and_session_of_the_manual_prints_what_it_says(tmp_path, document):
    programs = PROGRAMS.get(document, {})
    shown = dict.fromkeys(heading for heading, language, _ in blocks(document) if language == "python")
    assert list(shown) == [heading for heading, program in programs.items() if not program.text]
    for file, text in SURROUNDINGS.items():
        (tmp_path / file).write_text(text)
    missing = {each.needs for each in programs.values() if each.needs and not importlib.util.find_spec(each.needs)}
    for heading, below in itertools.groupby(blocks(document), operator.itemgetter(0)):
        if program := programs.get(heading):
            (tmp_path / program.file).write_text(program.text or python_below(document, heading))
            if program.arguments and program.needs not in missing:
                status, output, errors = completed("-W", "error", *program.arguments, cwd=tmp_path)
                assert (status, output) == (0, program.output), (heading, errors)
        for session in (text for _, language, text in below if language == "console"):
            lines = re.findall(r"^\$ (.*)$", session, re.MULTILINE)
            printed = "".join(f"$ {line}\n{typed(line, tmp_path)}" for line in lines)
            same = without_times if document == "tutorial.md" else str
            assert same(printed) == same(session), heading
    for package in missing:  # the others have been tried
        require_package(package)


def test_every_command_in_the_manual_is_run_by_a_test():
    texts = {document: [text for _, language, text in blocks(document) if language == "sh"] for document in DOCUMENTS}
    lines = [line for each in texts.values() for text in each for line in text.splitlines()]
    commands = {command for line in lines for command in line.split(" && ")}
    prepares = re.compile(r"python3 -m venv |\S*pip install |\. \.venv/bin/activate|mkdir |cd ")
    assert {command for command in commands if not prepares.match(command)} == COMMANDS.keys()
    for text, end in zip(texts["README.md"], ("examples/signup.py\n", "worksteal\n")):  # the first two: a fresh clone
        assert text.startswith("python3 -m venv .venv && ")
        assert text.endswith(end)


def test_every_query_of_the_manual_is_understood_by_every_database(drive, hero):
    Plain.create(hero=hero)
    queries = [text for _, language, text in blocks("schema.md") if language == "sql"]
    assert [len(drive.database.execute_sql(query).fetchall()) for query in queries] == [1, 0, 0, 0]


def test_every_block_of_the_manual_is_of_a_language_that_a_test_runs_or_that_is_no_code():
    for document, path in DOCUMENTS.items():
        found = list(blocks(document))
        # text: what examples printed; ini and dockerfile: how consumers are kept running
        languages = {
            "console",
            "dockerfile",
            "ini",
            "python",
            "sh",
            "text",
            *(["sql"] if document == "schema.md" else []),
        }
        assert {language for _, language, _ in found} <= languages
        assert 2 * len(found) == path.read_text(encoding="utf-8").count("```")


def prose_of(path):
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """What the headings of a document may be linked by, as MkDocs and others make it."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_of_the_manual_leads_somewhere(document):
    path = DOCUMENTS[document]
    for link in re.findall(r"\]\(([^()\s]+)\)", prose_of(path)):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert link.startswith("https://") or (target.exists() and (not anchor or anchor in anchors(target))), link


def test_the_manual_says_what_each_public_name_setting_option_column_command_and_metric_is(drive):
    named = {document: set(re.findall(r"`+([^`]+)`+", path.read_text("utf-8"))) for document, path in DOCUMENTS.items()}
    reference = DOCUMENTS["reference.md"].read_text(encoding="utf-8")
    events = {name for name, value in vars(gd).items() if isinstance(value, gd._Event)}
    assert set(re.findall(r"^::: geneva_drive\.(\w+)$", reference, re.MULTILINE)) | events == set(gd.__all__)
    assert named["reference.md"] >= events
    assert named["running.md"] >= gd.SETTINGS.keys()
    assert named["steps.md"] >= gd.STEP_OPTIONS.keys()
    assert {each.split()[0] for each in named["operating.md"]} >= gd._COMMANDS.keys()
    assert named["operating.md"] >= {metric.name for metric in drive.stats()}
    schema = DOCUMENTS["schema.md"].read_text(encoding="utf-8")
    for model in gd.MODELS:
        _, section = schema.split(f"## `{model._meta.table_name}`\n")
        cells = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", "".join(cells))) == {each.column_name for each in model._meta.sorted_fields}


def test_docstrings_are_markdown_with_one_error_for_each_line_so_that_the_reference_shows_them_whole():
    source = Path(gd.__file__).read_text(encoding="utf-8")
    assert re.findall(r":(?:class|meth|func|attr|exc):`[^`]*`|:raises \w+, .*", source) == []


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 220


# ==== Packaging: the schema file is found beside the module, however the library was installed ========================

TRY_THE_TABLES = """
import sqlite3
from peewee import SqliteDatabase
from {module} import SCHEMA_FILE, GenevaDrive

assert SCHEMA_FILE.exists(), SCHEMA_FILE
database = SqliteDatabase("app.db")
GenevaDrive(database).create_tables()
assert "geneva_drive_one_ongoing_workflow" in [index.name for index in database.get_indexes("geneva_drive_workflows")]
print(SCHEMA_FILE.resolve())
"""


def run(*command, cwd):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it outranks what is installed
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def schema_file_taken(python, cwd, module="geneva_drive"):
    """The schema file that a Python, started in a folder, makes the tables with."""
    cwd.mkdir(exist_ok=True)
    return Path(run(python, "-c", TRY_THE_TABLES.format(module=module), cwd=cwd))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the project, for building leaves litter."""
    litter = shutil.ignore_patterns(".git", ".venv", ".*cache", "__pycache__", "build", "dist", "*.egg-info")
    return Path(shutil.copytree(HERE, tmp_path_factory.mktemp("source") / "geneva_drive", ignore=litter))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


@pytest.fixture
def fresh_python(tmp_path):
    """The Python of a new virtual environment that borrows this one's packages, so that nothing is downloaded."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    own_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    # What is borrowed is searched last, and the .pth files in it, as editable installs make them, are not followed.
    Path(own_packages, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python


def pip_install(python, *what):
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(python, "-m", "pip", "--disable-pip-version-check", "install", *offline, *what, cwd=python.parent)


def test_the_wheel_brings_the_schema_file(built, fresh_python, tmp_path):
    (wheel,) = built.glob(f"geneva_drive-{gd.__version__}-py3-none-any.whl")
    pip_install(fresh_python, wheel)
    taken = schema_file_taken(fresh_python, cwd=tmp_path / "elsewhere")
    assert taken.is_relative_to(tmp_path / "venv")
    assert taken.read_bytes() == gd.SCHEMA_FILE.read_bytes()
    make_shop(tmp_path)
    script = tmp_path / "venv" / "bin" / "geneva-drive"
    assert "ready" in run(script, "shop:drive", "list", cwd=tmp_path)
    assert f"{script.name} shop:drive skip 1" in run(script, "shop:drive", "show", 1, cwd=tmp_path)


# A user's module, as strict as mypy can be. An ignored error that does not occur is an error too.
TYPED = """
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

from peewee import BooleanField, Model, SqliteDatabase
from typing_extensions import assert_type

from geneva_drive import *

drive = GenevaDrive(SqliteDatabase("app.db"), queues=["premium"], max_recoveries=3)
now = datetime.now(timezone.utc)


class User(Model):
    deactivated = BooleanField(default=False)


class Signup(Workflow):
    step_options = {"queue": "premium"}
    exception_policies = [ExceptionPolicy("reattempt", matching=ConnectionError, wait=0.1)]

    @cancel_if
    def hero_deactivated(self) -> bool:
        return bool(self.hero.deactivated)

    @on_exception(TimeoutError, "requests.Timeout")
    def wait_as_told(self, error: TimeoutError) -> None:
        self.reattempt(wait=error.args[0])

    @on_exception
    def give_up(self, error: Exception) -> None:
        self.cancel()

    @step
    def welcome(self) -> int:
        self.context["invoice"] = 7
        return self.id

    @step(wait=timedelta(days=2), skip_if=lambda self: self.hero.deactivated, on_exception="reattempt")
    async def remind(self) -> None:
        self.logger.info("asked with %s", self.idempotency_key)

    @step(resumable=True)
    def bill(self) -> None:
        for some in self.resume_over(User, every=10):
            assert_type(some, Any)
        for user in self.resume_over(User.select().where(User.deactivated == False), every=10):
            assert_type(user, User)
        for each in self.resume_over(Signup.paused(), key=Workflow.id.desc()):
            assert_type(each, Signup)
        for number, name in self.resume_over(enumerate(["a", "b"])):
            assert_type((number, name), tuple[int, str])
        self.checkpoint({"done": self.cursor})
        self.resume_over(User, evry=1)  # type: ignore[call-arg]
        self.reattempt(rewind=True)

    def check(self) -> None:
        self.finish()

    checks = [step("check"), *(step("check", wait=60) for _ in range(5))]
    misspelt = step("check", wate=60)  # type: ignore[call-overload]
    gone = removed_step()
    gone_too = removed_step("long gone", after_step=7)  # type: ignore[arg-type]

    @contextmanager
    def around_step_execution(self, execution: StepExecution) -> Iterator[None]:
        assert_type(execution.workflow, Workflow)
        yield


@step_finished(sender=Signup)
def count(cls: type[Signup], workflow: Signup, execution: StepExecution) -> None:
    assert_type(execution.outcome, str | None)


def tell(cls: type[Workflow], workflow: Workflow, old: str | None, new: str) -> None:
    pass


workflow_transitioned.connect(tell, sender=Signup)
step_started.connect(count)
step_started.connect(tell)  # type: ignore[arg-type]


user = User.create()
workflow = Signup.create(hero=user, context={"answer": 42})
assert_type(workflow, Signup)
assert_type(Signup.get_or_create(hero=user), tuple[Signup, bool])
assert_type(Signup.create_many(User.select(), on_conflict="ignore"), int)
assert_type(Signup.undefined_steps_in_flight(), list[UndefinedStep])
assert_type([each.workflows for each in Workflow.undefined_steps_in_flight()], list[int])
Signup.create(heroe=user)  # type: ignore[call-arg]
assert_type(workflow.welcome(), int)
workflow.welcome(1)  # type: ignore[call-arg]

for each in Signup.paused():
    assert_type(each, Signup)
for each in Signup.for_hero(user).where(Workflow.created_at > now).order_by(Workflow.id.desc()):
    assert_type(each, Signup)
for some in Workflow.ready():
    assert_type(some, Workflow)
query = Signup.ongoing().where((Workflow.state != "paused") & Workflow.hero_id.in_(["1", "2"]))
assert_type(query.get(), Signup)
assert_type(query.first(), Signup | None)
assert_type(query[0], Signup)
assert_type(query[:2], list[Signup])
assert_type(list(query), list[Signup])
assert_type((query.count(), len(query), query.exists()), tuple[int, int, bool])
assert_type(list(Signup.select(Workflow.id).tuples()), list[Any])
assert_type(Signup.get_or_none(Workflow.id == 1), Signup | None)
Signup.update(context={}).where(Workflow.state == "finished").execute()
Signup.delete().where(Workflow.transitioned_at < now).execute()

assert_type((workflow.id, workflow.type, workflow.state), tuple[int, str, str])
assert_type((workflow.hero, workflow.hero_id, workflow.context), tuple[Any, str | None, dict[str, Any]])
assert_type((workflow.created_at, workflow.transitioned_at), tuple[datetime, datetime | None])
assert_type((workflow.current_step_name, workflow.next_step_name), tuple[str | None, str | None])
workflow.stat  # type: ignore[attr-defined]
for execution in workflow.execution_history:
    assert_type((execution.step_name, execution.scheduled_for), tuple[str, datetime])
    assert_type((execution.workflow_id, execution.finished_at), tuple[int, datetime | None])
assert_type(workflow.execution_history.where(StepExecution.state == "failed").first(), StepExecution | None)

assert_type(drive.housekeeping(), dict[str, int])
assert_type(drive.paused_groups(), list[PausedGroup])
assert_type([(each.why, each.ids) for each in drive.paused_groups()], list[tuple[str, list[int]]])
assert_type((drive.run_on, drive.max_recoveries), tuple[timedelta, int])
drive.clock = lambda: now
drive.run(workers=2, until=lambda: not query.exists(), shutdown_timeout=5)
TestHelpers().speedrun_workflow(workflow)
try:
    workflow.resume_at("remind")
except (InvalidStateError, Signup.DoesNotExist):
    pass
except AlreadyOngoingError as error:
    assert_type(error.workflow_id, int | None)
"""

# Programs that leave out hints of their own are none the worse for it.
TYPE_RULES = """
[mypy]
strict = True
[mypy-untyped.*]
disallow_untyped_defs = False
disallow_untyped_calls = False
"""


def test_the_wheel_brings_type_hints_that_keep_the_class_of_each_workflow(built, fresh_python, tmp_path):
    pip_install(fresh_python, *built.glob("*.whl"))
    (stubs,) = tmp_path.glob("venv/lib/python*/site-packages/geneva_drive-stubs/__init__.pyi")
    assert stubs.read_bytes() == Path(gd.__file__).read_bytes()
    untyped = tmp_path / "untyped"
    untyped.mkdir()
    (untyped / "__init__.py").touch()
    shutil.copy(HERE / "examples" / "payment.py", untyped)
    (untyped / "app.py").write_text(python_below("README.md", "A complete program"))
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "rules.ini").write_text(TYPE_RULES)
    mypy = (sys.executable, "-m", "mypy", "--config-file", "rules.ini", "--python-executable", fresh_python)
    assert run(*mypy, "typed.py", "untyped", cwd=tmp_path).startswith("Success: no issues found in 4 source files")


def test_the_sdist_brings_what_the_tests_need(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    examples = {str(path.relative_to(HERE)) for path in (HERE / "examples").rglob("*.py")}
    manual = {"README.md", "mkdocs.yml", *(f"docs/{path.name}" for path in MANUAL.iterdir())}
    needed = {"conftest.py", "test_geneva_drive.py", "pyproject.toml", "setup.py", "LICENSE", *manual, *examples}
    assert needed <= names


def test_an_editable_install_takes_the_schema_file_of_the_source(source, fresh_python, tmp_path):
    pip_install(fresh_python, "--editable", source)
    assert schema_file_taken(fresh_python, cwd=tmp_path / "elsewhere") == source / "geneva_drive_schema.sql"


def test_a_vendored_copy_takes_the_schema_file_at_its_side(tmp_path):
    vendor = tmp_path / "myapp" / "vendor"
    vendor.mkdir(parents=True)
    for file in (Path(gd.__file__), gd.SCHEMA_FILE):
        shutil.copy(file, vendor)
    taken = schema_file_taken(sys.executable, cwd=tmp_path, module="myapp.vendor.geneva_drive")
    assert taken == vendor / "geneva_drive_schema.sql"
