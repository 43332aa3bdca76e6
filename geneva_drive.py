"""Durable workflows for applications that use Peewee and Huey.

A workflow belongs to a *hero* (the row it is about: a user, an order), runs its steps one after the other with waits of
seconds or months, survives crashes and deploys, and leaves a row for every attempt::

    from datetime import timedelta
    from peewee import CharField, Model, SqliteDatabase
    from geneva_drive import GenevaDrive, Workflow, step

    db = SqliteDatabase("app.db")
    drive = GenevaDrive(db)
    huey = drive.huey                       # for `huey_consumer app.huey`

    class User(Model):
        email = CharField()
        class Meta:
            database = db

    class Signup(Workflow):
        @step
        def welcome(self):
            print("welcome,", self.hero.email)

        @step(wait=timedelta(days=2))
        def remind(self):
            print("still there,", self.hero.email, "?")

    if __name__ == "__main__":
        db.create_tables([User])
        drive.create_tables()
        Signup.create(hero=User.create(email="ada@example.com"))
        drive.run(workers=2)

How it works. Two tables hold the truth: one row for each workflow, one for each attempt at a step (an *execution*).
The drive's own queue is the table of executions itself. In another Huey, a message holds the id of an execution and
nothing else, so that a message that is lost or doubled does no harm. Whoever takes, ends or recovers an execution first
updates the workflow's row, on condition that this execution is still its newest: one fence and one lock order for
everything.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import concurrent.futures
import contextlib
import contextvars
import copyreg
import decimal
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import numbers
import operator
import os
import pkgutil
import random
import re
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
import traceback
import types
import typing
import unicodedata
import uuid
import weakref
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, NoReturn, TypeAlias, TypeVar, cast, overload

import peewee
from huey import Huey, crontab
from huey.api import PeriodicTask
from huey.consumer import Consumer
from huey.contrib.sql_huey import SqlStorage
from huey.signals import SIGNAL_ENQUEUED, SIGNAL_SCHEDULED
from huey.storage import BaseStorage
from peewee import SQL, Database, Model, MySQLDatabase, PostgresqlDatabase, SqliteDatabase
from playhouse.cockroachdb import CockroachDatabase
from playhouse.signals import Signal

if TYPE_CHECKING:
    from typing_extensions import Protocol, Self, Unpack

__version__ = "0.1.0"

# fmt: off
__all__ = [
    "AlreadyOngoingError", "ChildrenTimeoutError", "ConfigurationError", "ExceptionPolicy",
    "FlowControlInTransactionError", "GenevaDrive", "GenevaDriveError", "InvalidStateError", "Metric", "PausedGroup",
    "SignalTimeoutError", "StepConfigurationError", "StepDefinition", "StepExecution", "StepNotDefinedError",
    "TestHelpers", "TransactionLeftOpenError", "UndefinedStep", "UnknownQueueError", "UnknownSignalError",
    "UnsupportedDatabaseError", "Workflow", "WorkflowNotDefinedError", "WorkflowSignal", "cancel_if", "on_exception",
    "removed_step", "step", "step_finished", "step_started", "workflow_transitioned",
]
# fmt: on

logger = logging.getLogger("geneva_drive")
logger.addHandler(logging.NullHandler())

T = TypeVar("T")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Receiver = TypeVar("_Receiver")
_Row = TypeVar("_Row", bound=Model)
_Route: TypeAlias = "tuple[str, int]"  # the name of a queue, and the priority in it
_Json: TypeAlias = "dict[str, Any] | None"
_Queues: TypeAlias = "Mapping[str, Huey] | Iterable[str] | None"
_Places: TypeAlias = "tuple[str, tuple[int, ...]]"  # the name of a queue, and the priorities to look for in it
_Moved: TypeAlias = "tuple[int, StepExecution | None]"  # see `_Access.move()`
_Check: TypeAlias = "Callable[[Any, str], Any]"  # of a value and its name; returns what is kept

# ==== States, and what an outcome does to them ========================================================================

READY, PERFORMING, PAUSED, FINISHED, CANCELED = "ready", "performing", "paused", "finished", "canceled"
SCHEDULED, WAITING, IN_PROGRESS = "scheduled", "waiting", "in_progress"
COMPLETED, FAILED, SKIPPED = "completed", "failed", "skipped"

ONGOING, OVER = (READY, PERFORMING, PAUSED), (FINISHED, CANCELED)
WORKFLOW_STATES = (*ONGOING, *OVER)
TO_CLAIM = (SCHEDULED, WAITING)
ACTIVE = (*TO_CLAIM, IN_PROGRESS)
FAILURES = ("failed", "recovered")  # the outcomes that the application did not decide

# By why an attempt ended and what was decided: the execution's state, its outcome, and what the workflow does next.
EFFECTS = {
    ("step", "return"): (COMPLETED, "success", "advance"),
    ("step", "reattempt"): (COMPLETED, "reattempted", "repeat"),
    ("step", "skip"): (SKIPPED, "skipped", "advance"),
    ("step", "cancel"): (CANCELED, "canceled", "cancel"),
    ("step", "pause"): (CANCELED, "canceled", "pause"),
    ("step", "finish"): (COMPLETED, "success", "finish"),
    ("error", "reattempt"): (FAILED, "reattempted", "repeat"),
    ("error", "skip"): (SKIPPED, "skipped", "advance"),
    ("error", "cancel"): (FAILED, "canceled", "cancel"),
    ("error", "pause"): (FAILED, "failed", "pause"),
    ("error", "finish"): (FAILED, "failed", "finish"),
    ("timeout", "skip"): (SKIPPED, "skipped", "advance"),
    ("timeout", "cancel"): (FAILED, "canceled", "cancel"),
    ("timeout", "pause"): (FAILED, "failed", "pause"),
    ("death", "reattempt"): (FAILED, "recovered", "repeat"),
    ("death", "cancel"): (FAILED, "recovered", "cancel"),
    ("death", "pause"): (FAILED, "recovered", "pause"),
}
WORKFLOW_STATE_AFTER = {"advance": READY, "repeat": READY, "pause": PAUSED, "cancel": CANCELED, "finish": FINISHED}

# The states in which a call from outside a step is allowed.
ALLOWED_FROM = {
    "cancel": ONGOING,
    "pause": (READY, PERFORMING),
    "skip": (READY, PAUSED),
    "resume": (PAUSED,),
    "resume_at": (PAUSED, *OVER),
    "reschedule": (READY, PAUSED),
    "reattempt": (),
    "finish": (),
    "signal": ONGOING,
    "a child's create": ONGOING,
}

ON_EXCEPTION_ACTIONS = ("pause", "cancel", "skip", "reattempt")

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
NO_WAIT = timedelta(0)
LONGEST_WAIT = timedelta(days=36500)  # further away, the calendar overflows
A_MINUTE, A_DAY = timedelta(minutes=1), timedelta(days=1)
MAX_NAME_CHARS = 255
MAX_JSON_BYTES = 128 * 1024
MAX_ERROR_CHARS = 50_000
MAX_REASON_CHARS = 1000
CURSOR_ALIAS = "geneva_drive_cursor"  # of the key of a row, in queries of the application's
TRANSACTION_TRIES = 16  # a transaction that deadlocks on every one of them has another problem
PUT_OFF_FOR = timedelta(seconds=1), timedelta(seconds=30)  # at first and at most: a step that is not defined here
EXIT_TIME = timedelta(seconds=5)  # that a process may take to exit while steps are under way
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
PATIENCE_SECONDS = 10  # with locks; a step that is done waits longer to be recorded
SCHEMA_PATIENCE_SECONDS = 600  # how long a change of the schema waits for the ends of transactions on its table
SHORTEST_NAP, LONGEST_NAP = 0.02, 0.25  # seconds between two looks into an empty queue
MAX_COUNTED, MAX_SHOWN = 100_000, 20  # by the command line: workflows that match, groups of paused ones
MAX_GROUPED, GROUPED_CHARS = 10_000, 40  # the newest paused workflows; how much of a reason tells groups apart
MAX_LISTED = 100  # ids in a condition: of 200 on, MySQL and MariaDB may read, and so lock, the whole table instead
MAX_KNOWN_PRIORITIES = 20  # that are looked for even when the queue holds nothing of them
STOP_SECONDS = 0.5  # until run() sees a signal, and a worker that waits to be told that its consumer stops

# ==== Errors and events ===============================================================================================


class GenevaDriveError(Exception):
    """Base of the library's own errors."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructors below take data, not the message; without this, an error could not cross processes.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ConfigurationError(GenevaDriveError, TypeError):
    """A setting of the drive is unknown, ill-typed or missing."""


class StepConfigurationError(GenevaDriveError, TypeError):
    """The definition of a workflow class is wrong; raised when the class is defined.

    What can be seen in a running step alone, such as the misuse of a cursor, is an error of that step.
    """


class UnsupportedDatabaseError(GenevaDriveError):
    """The drive's database cannot enforce what the library promises."""

    def __init__(self, database: object) -> None:
        super().__init__(
            f"{type(database).__name__} is not supported, since its uniqueness indexes are not known: use Peewee's "
            "SqliteDatabase, PostgresqlDatabase or MySQLDatabase, or one of their pools"
        )


class UnknownQueueError(GenevaDriveError, ValueError):
    """A workflow asks for a queue that the drive does not have."""

    def __init__(self, where: str, queue: object, known: Iterable[str]) -> None:
        super().__init__(
            f"{where} asks for the queue {queue!r}, which this drive does not have: use one of {', '.join(known)}, "
            f"or name it in GenevaDrive(..., queues=[{queue!r}])"
        )


class AlreadyOngoingError(GenevaDriveError, peewee.IntegrityError):
    """The hero has an ongoing workflow of this class; its id is in `workflow_id`."""

    def __init__(self, values: Mapping[str, Any], workflow_id: int | None) -> None:
        which = f"already, workflow {workflow_id}" if workflow_id else "already in this very call"
        super().__init__(
            f"{_hero_label(**values)} has an ongoing {values['type']} {which}: use get_or_create(), wait for its end, "
            'or pass allow_multiple=True, or on_conflict="ignore" to create_many()'
        )
        self.workflow_id = workflow_id


class InvalidStateError(GenevaDriveError):
    """A call is not allowed in the state that the workflow is in."""

    def __init__(self, workflow: Workflow, call: str, fix: str = "") -> None:
        allowed = ", ".join(ALLOWED_FROM[call])
        state = "performing, and about to pause" if workflow.pause_requested else workflow.state
        fix = fix or (f"it is allowed when {allowed}" if allowed else "it can be called inside a step only")
        if workflow.pause_requested and call == "pause":
            fix = "it pauses by itself when the step under way ends"
        super().__init__(f"{workflow._label} is {state}; {call}() was refused: {fix}")


class StepNotDefinedError(GenevaDriveError, LookupError):
    """A workflow stands at a step that its class does not define (any more)."""

    def __init__(self, workflow: Workflow, step_name: str | None) -> None:
        known = ", ".join(definition.name for definition in workflow.steps) or "none"
        fix = "define it again, put removed_step() in its place, or move on with resume_at() to one of these"
        if step_name != workflow.current_step_name:
            fix = "use one of these"
        if workflow._find(step_name):
            fix = "it was removed: use another one"
        super().__init__(f"{workflow._label}: {workflow.type} has no step {step_name!r} (it has: {known}); {fix}")


class WorkflowNotDefinedError(GenevaDriveError, LookupError):
    """No class is defined for a workflow's type."""

    def __init__(self, workflow: Workflow) -> None:
        super().__init__(
            f"workflow {workflow.id} has the type {workflow.type!r}, which no class defines here: import the module "
            "that defines it, or set workflow_type on the class that took its place"
        )


class UnknownSignalError(GenevaDriveError, ValueError):
    """A workflow is sent a signal that no step of its class waits for."""

    def __init__(self, workflow: Workflow, name: object) -> None:
        known = ", ".join(sorted(workflow._signal_names())) or "none"
        super().__init__(
            f"{workflow._label} was sent the signal {name!r}, which no step of {workflow.type} waits for: use one of "
            f"its signals ({known})" + f", or declare a step with wait_for={name!r}" * _is_name(name)
        )


class SignalTimeoutError(GenevaDriveError, TimeoutError):
    """The signal that a step waited for did not come in time. It is recorded, not raised."""

    def __init__(self, workflow: Workflow, definition: StepDefinition, waited: timedelta) -> None:
        super().__init__(
            f"{workflow._label}: the step {definition.name} waited for the signal {definition.wait_for!r} for "
            f"{_span(waited)}, and it did not come"
        )


class ChildrenTimeoutError(GenevaDriveError, TimeoutError):
    """Children that a step waited for did not end in time. It is recorded, not raised."""

    def __init__(self, workflow: Workflow, definition: StepDefinition, waited: timedelta) -> None:
        super().__init__(
            f"{workflow._label}: the step {definition.name} waited for the ends of its children for "
            f"{_span(waited)}, and some are ongoing still: see workflow.children"
        )


class TransactionLeftOpenError(GenevaDriveError):
    """A step's body began a transaction and did not end it."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where} left a transaction open; it was rolled back: use db.atomic()")


class FlowControlInTransactionError(GenevaDriveError):
    """A flow control method was called within a transaction that the step, or a hook around it, had begun."""

    def __init__(self, workflow: Workflow, call: str, step_name: str) -> None:
        super().__init__(
            f"{workflow._label}: the step {step_name} called {call}() within a transaction, and what it had written "
            f"there would have been rolled back: call {call}() behind the block"
        )


class _FlowControl(BaseException):
    """Ends the body of a step. Not an Exception: a body's `except Exception` must not catch it.

    :param details: what a verdict is to have of it: `reason`, `rewind`, `children`.
    """

    def __init__(self, action: str, wait: timedelta = NO_WAIT, **details: Any) -> None:
        super().__init__(action)
        self.action, self.wait, self.details = action, wait, details


def _flow_control_in(error: BaseException) -> _FlowControl | None:
    """The flow control that an error is, or that a group of errors (an asyncio.TaskGroup's) holds and nothing else."""
    if isinstance(error, _FlowControl):
        return error
    errors = getattr(error, "exceptions", None)  # Python 3.10 has no class for groups
    found = [_flow_control_in(each) for each in errors] if isinstance(errors, (list, tuple)) else []
    return found[-1] if found and all(found) else None


def _ends_process(error: BaseException) -> bool:
    """Whether an error ends this process or greenlet, and says nothing about the code that raised it."""
    # gevent's need not be there to be imported.
    return isinstance(error, KeyboardInterrupt) or any(each.__name__ == "GreenletExit" for each in type(error).__mro__)


@contextlib.contextmanager
def _logged(problem: str, *details: object) -> Iterator[None]:
    """Log what code of others raises, whatever it is, and go on."""
    try:
        yield
    except BaseException as error:
        if _ends_process(error):
            raise
        logger.exception(problem, *details)


class _ClaimLost(Exception):
    """An execution is not ours, or not any more: others claimed or recovered it, or deleted it with its workflow."""


if TYPE_CHECKING:
    _OnTransition: TypeAlias = Callable[[Any, Any, "str | None", str], object]

    class _OnAttempt(Protocol):
        def __call__(self, cls: Any, workflow: Any, /, execution: StepExecution) -> object: ...


class _Event(Signal, Generic[_Receiver]):
    """A signal of playhouse.signals, whose receivers cannot harm the workflow that they are told about."""

    def __init__(self, doc: str) -> None:
        super().__init__()
        self.__doc__ = f"{doc}\n\n`cls` is the workflow's class. An error of a receiver is logged."  # for help()

    def __call__(self, name: str | None = None, sender: type | None = None) -> Callable[[_Receiver], _Receiver]:
        """A decorator that connects a function."""
        return super().__call__(name, sender)

    def connect(self, receiver: _Receiver, name: str | None = None, sender: type | None = None) -> None:
        """Have `receiver` called from now on.

        :param name: what it is known by; None takes the function's own.
        :param sender: a workflow class, to be told of its workflows and those of its subclasses alone.
        """
        super().connect(receiver, name, sender)

    def send(self, instance: Any, *args: Any, **kwargs: Any) -> None:
        for name, receiver, sender in self._receiver_list:
            if sender is None or isinstance(instance, sender):
                with _logged("the receiver %s failed on an event of %s", name, instance._label):
                    result = receiver(type(instance), instance, *args, **kwargs)
                    _finished(result, f"the receiver {name}")


step_started: _Event[_OnAttempt] = _Event(
    "`receiver(cls, workflow, execution=execution)`: an attempt at a step, a `StepExecution`, begins."
)
step_finished: _Event[_OnAttempt] = _Event(
    "`receiver(cls, workflow, execution=execution)`: it ended; its `state`, `outcome` and error are committed."
)
workflow_transitioned: _Event[_OnTransition] = _Event(
    "`receiver(cls, workflow, old, new)`: its state changed and is committed; `old` is None for a new workflow."
)

# ==== Value objects: policies and step definitions ====================================================================


def _utcnow() -> datetime:
    return datetime.now(timezone.utc)


def _duration(value: object, what: str, kind: type[Exception] = ValueError) -> timedelta:
    """A timedelta or a number of seconds, never negative, as a timedelta; else an error of that kind says why not."""
    duration = value
    if _is_number(value):
        try:
            duration = timedelta(seconds=float(cast(float, value)))
        except OverflowError:
            duration = timedelta.max
    if not isinstance(duration, timedelta):
        raise kind(f"{what} must be a timedelta or a number of seconds, not {value!r}")
    if not NO_WAIT <= duration <= LONGEST_WAIT:
        raise kind(f"{what} must be neither negative nor over a hundred years, not {_as_given(value)}")
    return duration


def _moment(value: Any, start: datetime, what: str) -> datetime:
    """An aware datetime as it is, a duration from `start` on; else a TypeError or a ValueError says what is wrong."""
    if isinstance(value, datetime) and value.utcoffset() is not None:
        with contextlib.suppress(OverflowError):
            return value.astimezone(timezone.utc)
        raise ValueError(f"{what} must be within the calendar of UTC, not {value!r}")
    if not isinstance(value, timedelta) and not _is_number(value):
        raise TypeError(f"{what} must be a timedelta, a number of seconds or an aware datetime, not {value!r}")
    return start + _duration(value, what)


def _one_line(text: str) -> str | None:
    """A reason as it is kept: without breaks of lines, and not too long; None if nothing is left."""
    return " ".join(text.split())[:MAX_REASON_CHARS] or None


def _as_given(value: Any) -> str:
    """A value for a message. Python shows minus one second as minus one day and 86,399 seconds."""
    return f"-{-value!r}" if isinstance(value, timedelta) and value < NO_WAIT else repr(value)


def _require(condition: object, where: str, problem: str) -> None:
    if not condition:
        raise StepConfigurationError(f"{where}: {problem}")


def _require_plain(function: Any, where: str, what: str) -> None:
    _require(not inspect.iscoroutinefunction(function), where, f"{what} must not be async")


def _checked(options: Mapping[str, Any], checks: Mapping[str, _Check], where: str) -> dict[str, Any]:
    """Options as their checks return them; else a StepConfigurationError says which one is wrong."""
    for name, value in options.items():
        _require(name in checks, where, f"unknown option {name!r}: use {', '.join(checks)}")
        _require_plain(value, where, name)
    return {name: checks[name](value, f"{where}: {name}") for name, value in options.items()}


def _checks_of(kind: type) -> dict[str, _Check]:
    """The checks that stand beside the types in a class's annotations."""
    return {name: hint.__metadata__[0] for name, hint in typing.get_type_hints(kind, include_extras=True).items()}


def _must_be(description: str, is_right: Callable[[Any], object]) -> _Check:
    def check(value: Any, what: str) -> Any:
        if not is_right(value):
            raise StepConfigurationError(f"{what} must be {description}, not {value!r}")
        return value

    return check


def _one_of(*choices: str) -> _Check:
    return _must_be(f"one of {', '.join(choices)}", choices.__contains__)


def _optional(check: _Check) -> _Check:
    return lambda value, what: None if value is None else check(value, what)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS and value.isprintable()


def _error_kinds(value: Any, what: str) -> tuple[Any, ...]:
    kinds = tuple(value) if isinstance(value, (tuple, list, set)) else (value,)
    for kind in kinds:
        if not (isinstance(kind, str) or (isinstance(kind, type) and issubclass(kind, BaseException))):
            raise StepConfigurationError(f"{what} must name exception classes, not {kind!r}")
    return kinds


_A_DURATION = functools.partial(_duration, kind=StepConfigurationError)
_A_FACTOR = _must_be("a number, at least 1", lambda value: _is_number(value) and value >= 1)
_A_FRACTION = _must_be("a fraction from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_A_LIMIT = _optional(_must_be("None or an int, at least 0", lambda value: _is_int(value) and value >= 0))
_A_LAST_ACTION = _one_of("pause", "cancel", "skip")


@dataclass(frozen=True)
class ExceptionPolicy:
    """What an error in a step does.

    :param action: "pause", "cancel", "skip" or "reattempt".
    :param matching: an exception class, several, or a dotted name that is imported when an error comes (a name that
        cannot be imported matches nothing); None matches every error.
    :param wait: before the first reattempt: a timedelta or seconds. Each further one waits `backoff` times longer, up
        to `max_wait`, spread by `jitter`, a fraction of the wait.
    :param max_reattempts: how many there may be since the step was first reached or resumed; None never stops.
    :param terminal_action: what happens then: "pause", "cancel" or "skip".
    :param report: when the error also leaves the Huey task, for error trackers: "terminal_only" (the workflow was
        paused or canceled), "always" or "never".
    :raises StepConfigurationError: if any of them is wrong.
    """

    action: Annotated[str, _one_of(*ON_EXCEPTION_ACTIONS)]
    matching: Annotated[Any, _optional(_error_kinds)] = None
    wait: Annotated[timedelta | float, _A_DURATION] = 1
    backoff: Annotated[float, _A_FACTOR] = 2
    jitter: Annotated[float, _A_FRACTION] = 0.1
    max_wait: Annotated[timedelta | float, _A_DURATION] = timedelta(minutes=10)
    max_reattempts: Annotated[int | None, _A_LIMIT] = 100
    terminal_action: Annotated[str, _A_LAST_ACTION] = "pause"
    report: Annotated[str, _one_of("terminal_only", "always", "never")] = "terminal_only"

    def __post_init__(self) -> None:
        given = {option: getattr(self, option) for option in POLICY_OPTIONS}
        vars(self).update(_checked(given, POLICY_OPTIONS, f"ExceptionPolicy({self.action!r})"))  # it is frozen

    def matches(self, error: BaseException) -> bool:
        """Whether the policy is meant for `error`."""
        return self.matching is None or any(_matches(kind, error) for kind in self.matching)

    def delay(self, reattempts: int) -> timedelta:
        """The wait before the next reattempt, when there were `reattempts` of them already."""
        wait, longest = (cast(timedelta, each).total_seconds() for each in (self.wait, self.max_wait))
        try:
            seconds = min(wait * self.backoff**reattempts, longest)
        except OverflowError:
            seconds = longest if wait else 0
        return timedelta(seconds=min(seconds * random.uniform(1 - self.jitter, 1 + self.jitter), longest))

    def _decide(self, workflow: Workflow, error: BaseException, reattempts: int) -> _FlowControl:
        return _FlowControl(self.action, self.delay(reattempts))


POLICY_OPTIONS = _checks_of(ExceptionPolicy)


@dataclass(frozen=True)
class _HandlerPolicy(ExceptionPolicy):
    """A policy whose action is the flow control method that a handler calls; without a call, it pauses."""

    handler: Any = None  # a method's name, or a callable of the workflow and the error

    def _decide(self, workflow: Workflow, error: BaseException, reattempts: int) -> _FlowControl:
        attempt = cast(_Attempt, workflow._attempt)
        try:
            attempt.ask(self.handler, error)
        except BaseException as failure:
            if control := _flow_control_in(failure):
                return control
            if _ends_process(failure):
                raise
            workflow.logger.exception("the exception handler %s failed: pausing", self.handler)
        return _FlowControl("pause")


PAUSE = ExceptionPolicy("pause")


def _matches(kind: Any, error: BaseException) -> bool:
    if isinstance(kind, str):
        try:
            kind = pkgutil.resolve_name(kind if "." in kind else f"builtins.{kind}")
        except Exception:  # whatever the import of a module may raise
            return False
    return isinstance(kind, type) and isinstance(error, kind)


@dataclass(frozen=True)
class StepDefinition:
    """A step as its class declares it; `body` is the name of the method that it runs."""

    name: str
    body: str
    wait: timedelta | Callable[[Any], object] | str = NO_WAIT
    skip_if: Any = None
    policies: tuple[ExceptionPolicy, ...] = ()
    transactional: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    wait_for: str | None = None
    wait_for_children: bool = False
    timeout: timedelta | None = None
    on_timeout: str = "pause"
    matching: Callable[[Any], object] | str | None = None
    resumable: bool = False
    removed: bool = False  # then it is skipped as by any true `skip_if`: the hero and the conditions come first

    @property
    def _waits(self) -> bool:
        return self.wait_for is not None or self.wait_for_children

    def _first(self, reached: datetime) -> dict[str, Any]:
        """What its first execution is made of, where a workflow comes to it at this moment."""
        first = {"step_name": self.name, "reached_at": reached}
        if isinstance(self.wait, timedelta):
            return {**first, "scheduled_for": reached + self.wait}
        return {**first, "scheduled_for": reached, "asks_wait": True}


class UndefinedStep(NamedTuple):
    """A step that no class defines in this process, and how many ongoing workflows of the type stand at it."""

    type: str
    step_name: str
    workflows: int


# ==== The language in which steps are declared ========================================================================


def _is_condition(value: Any) -> bool:
    return isinstance(value, bool) or _is_matcher(value)


def _is_matcher(value: Any) -> bool:
    return isinstance(value, str) or callable(value)


def _is_reaction(value: Any) -> bool:
    is_handler = callable(value) and not isinstance(value, type)
    return is_handler or isinstance(value, ExceptionPolicy)


def _are_reactions(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(map(_is_reaction, value))
    return _is_reaction(value) or value in ON_EXCEPTION_ACTIONS


def _a_wait(value: Any, what: str) -> Any:
    is_name = isinstance(value, str) and value.isidentifier()
    return value if is_name or callable(value) else _A_DURATION(value, what)


_A_BOOL = _must_be("a bool", lambda value: isinstance(value, bool))
_A_CONDITION = _optional(_must_be("a callable, a method's name or a bool", _is_condition))
_A_MATCHER = _optional(_must_be("a callable of the signal's payload, or a method's name", _is_matcher))
_A_STEP = _optional(_must_be("a step's name", _is_name))
_A_REACTION = _must_be(
    f"{', '.join(ON_EXCEPTION_ACTIONS)}, an ExceptionPolicy, a callable, or a list of the latter two", _are_reactions
)
_Reaction: TypeAlias = Callable[[Any, Any], object] | ExceptionPolicy


HUEY_OPTIONS = {"queue": _must_be("a queue's name", _is_name), "priority": _must_be("an int", _is_int)}


def _checked_options(options: Any, where: str) -> dict[str, Any]:
    """Huey's options for steps, if they are sound; else a StepConfigurationError says what is wrong."""
    _require(isinstance(options, Mapping), where, f'must be a dict such as {{"queue": "premium"}}, not {options!r}')
    return _checked(options, HUEY_OPTIONS, where)


def _zone(name: str) -> tzinfo:
    """A time zone by its name. UTC needs no database of them, which not every system has."""
    return timezone.utc if name == "UTC" else zoneinfo.ZoneInfo(name)


def _check_zone(name: Any, what: str) -> None:
    try:
        _zone(name)
    except Exception as error:  # of several classes: it may be no text, a folder, a path
        fix = 'use "UTC", or one such as "Europe/Berlin"; where the system knows none, pip install tzdata'
        raise StepConfigurationError(f"{what} must be the name of a time zone, not {name!r}: {fix}") from error


#: What a class declares of its workflows as a whole.
CLASS_OPTIONS: dict[str, _Check] = {
    "recurs": _optional(_must_be("None or a Huey crontab, such as crontab(minute='0', hour='3')", callable)),
    "recurrence_timezone": _check_zone,
    "recurrences_overlap": _A_BOOL,
    "recurrence_catch_up": _A_DURATION,
    "delete_completed_after": _optional(_A_DURATION),
}


def _check_class_options(cls: Any) -> None:
    given = {name: getattr(cls, name) for name in CLASS_OPTIONS if hasattr(cls, name)}
    _checked(given, CLASS_OPTIONS, cls.__name__)
    problem = "recurs: what recurs has no hero: set may_proceed_without_hero = True"
    _require(cls.recurs is None or cls.may_proceed_without_hero, cls.__name__, problem)


class _StepOptions(typing.TypedDict, total=False):
    """The options of a step: their types, for type checkers, and what checks them when the class is defined."""

    wait: Annotated[timedelta | float | Callable[[Any], object] | str, _a_wait]
    skip_if: Annotated[Callable[[Any], object] | str | bool | None, _A_CONDITION]
    on_exception: Annotated[_Reaction | Sequence[_Reaction] | str | None, _optional(_A_REACTION)]
    max_reattempts: Annotated[int | None, _A_LIMIT]
    terminal_action: Annotated[str, _A_LAST_ACTION]
    before_step: Annotated[str | None, _A_STEP]
    after_step: Annotated[str | None, _A_STEP]
    transactional: Annotated[bool, _A_BOOL]
    resumable: Annotated[bool, _A_BOOL]
    options: Annotated[Mapping[str, Any], _checked_options]
    name: Annotated[str, _must_be(f"text of 1 to {MAX_NAME_CHARS} printable characters", _is_name)]
    wait_for: Annotated[str | None, _optional(_must_be("a signal's name", _is_name))]
    wait_for_children: Annotated[bool, _A_BOOL]
    timeout: Annotated[timedelta | float | None, _optional(_A_DURATION)]
    on_timeout: Annotated[str, _one_of("pause", "skip", "cancel", "run")]
    matching: Annotated[Callable[[Any], object] | str | None, _A_MATCHER]


STEP_OPTIONS = _checks_of(_StepOptions)


@dataclass(frozen=True)
class _Declaration:
    """What `step` was told. It is checked when the class is defined, so that errors can name class and step."""

    options: dict[str, Any]
    body: str | None = None
    is_removed: bool = False


@overload
def step(body: _Function, /) -> _Function: ...
@overload
def step(body: str, /, **options: Unpack[_StepOptions]) -> Any: ...
@overload
def step(**options: Unpack[_StepOptions]) -> Callable[[_Function], _Function]: ...
def step(body: Any = None, /, **options: Any) -> Any:
    """Declare a method as a step: `@step`, `@step(wait=...)`; or one more step with another's body: `step("body")`.

    :param wait: how long after the previous step it runs: a timedelta or seconds; or a callable of the workflow, or a
        method's name, that returns one of these, an aware datetime, or None for no wait. It is called when the step is
        reached, and again at the time that it returned, as long as that is in the future. Its error is the step's.
    :param skip_if: a callable of the workflow, a method's name or a bool: true skips the step.
    :param on_exception: "pause" (the default), "cancel", "skip", "reattempt", an `ExceptionPolicy`, or a
        callable of the workflow and the error that calls a flow control method; or a list of policies and callables, of
        which the first that matches decides, and the class's if none does.
    :param max_reattempts: with "reattempt": how many; 100 by default, None never stops.
    :param terminal_action: with "reattempt": what follows the last one; "pause" by default, "cancel" or "skip".
    :param before_step: the name of the step to be placed before. `after_step`: the one to be placed behind.
    :param transactional: run the body in the transaction that records its outcome: its writes to the drive's database
        happen exactly once.
    :param resumable: let the body keep a cursor, by `resume_over()` or `checkpoint()`, from which the next attempt goes
        on.
    :param options: `{"queue": ..., "priority": ...}` for Huey.
    :param name: the step's name, if it is not the method's.
    :param wait_for: the name of a signal: the step runs once `Workflow.signal()` sent it, and the body finds it in
        `self.signal_payload`. With `wait`, not before that.
    :param wait_for_children: let the step run once no workflow that was created with `parent=self` is ongoing; with
        `wait`, not before that. The body finds in `self.children` how each fared.
    :param timeout: how long it waits for the signal or the children, a timedelta or seconds; None waits for ever.
    :param on_timeout: what follows then: "pause" by default, "skip", "cancel", or "run", whose body finds None.
    :param matching: a callable of the payload, or the name of a method that takes it: false leaves a signal to another
        step.
    :raises StepConfigurationError: when the class is defined, if any of it is wrong.
    """
    if body is None:
        return functools.partial(step, **options)
    if isinstance(body, str):
        return _Declaration(options, body)
    if not inspect.isfunction(body):
        raise StepConfigurationError(f"@step is for methods, not for {body!r}")
    body._geneva_drive_step = _Declaration(options)  # type: ignore[attr-defined]
    return body


def removed_step(name: str | None = None, *, before_step: str | None = None, after_step: str | None = None) -> Any:
    """Declare in the place where a step used to be that it is gone: `remind = removed_step()`.

    New workflows do not come by it. One that stands at it goes on: when the step is due, and unless a condition cancels
    the workflow, it is recorded as skipped and the next one is scheduled.

    :param name: the step's name, if it is not the attribute's.
    :param before_step: as the step had it. `after_step` likewise: what comes next is told by the place.
    :raises StepConfigurationError: when the class is defined, if any of it is wrong.
    """
    options = {"before_step": before_step, "after_step": after_step, "skip_if": True}
    return _Declaration(options if name is None else {**options, "name": name}, is_removed=True)


def cancel_if(condition: _Function) -> _Function:
    """Declare a method as a condition that is checked before every step; true cancels the workflow."""
    if not inspect.isfunction(condition):
        raise StepConfigurationError(f"@cancel_if is for methods, not for {condition!r}")
    condition._geneva_drive_cancel_if = True  # type: ignore[attr-defined]
    return condition


@overload
def on_exception(*matching: type[BaseException] | str) -> Callable[[_Function], _Function]: ...
@overload
def on_exception(handler: _Function, /) -> _Function: ...
def on_exception(*matching: Any) -> Any:
    """Declare a method as a handler of the errors that match, `@on_exception(KeyError)`, or bare, of all of them.

    The handler takes the error and calls a flow control method; without a call the workflow pauses.
    """
    if len(matching) == 1 and inspect.isfunction(matching[0]):
        return on_exception()(matching[0])

    def declare(handler: Any) -> Any:
        handler._geneva_drive_handles = matching
        return handler

    return declare


class _ClassBody(dict[str, Any]):
    """The namespace of a workflow's class body: a step that is defined again there would vanish without a trace."""

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name

    def __setitem__(self, key: str, value: Any) -> None:
        old = self.get(key)
        is_step = hasattr(old, "_geneva_drive_step") or isinstance(old, _Declaration)
        if is_step and getattr(value, "__wrapped__", None) is not old:
            raise StepConfigurationError(f"{self.class_name}.{key}: the step is declared twice: rename one of them")
        super().__setitem__(key, value)


@dataclass
class _Blueprint:
    """All that a class and its parents declare."""

    cls: type
    steps: list[StepDefinition] = field(default_factory=list)  # the removed ones in their places
    cancel_ifs: list[str] = field(default_factory=list)
    policies: list[ExceptionPolicy] = field(default_factory=list)
    step_options: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def by_name(self) -> dict[str | None, StepDefinition]:
        """The steps by their names, the removed ones too."""
        return {each.name: each for each in self.steps}

    def add_class(self, cls: type) -> None:
        """Add what the body of one class declares, in its order."""
        declared: set[str] = set()
        for key, value in vars(cls).items():
            for body, options in _declared_steps(key, value):
                where = f"{self.cls.__name__}.{options['name']}"
                self._add_step(key, body, options, where)
                _require(options["name"] not in declared, where, "the step is declared twice: rename one of them")
                declared.add(options["name"])
            self._add_rules(key, value, f"{self.cls.__name__}.{key}")

    def check_methods(self) -> None:
        """Refuse what declarations rely on and is no method, now that all that children may change is known."""
        for each in self.steps:
            if not each.removed:
                self._check_methods(each, f"{self.cls.__name__}.{each.name}")
        handlers = (policy.handler for policy in self.policies if isinstance(policy, _HandlerPolicy))
        for name in (*self.cancel_ifs, *handlers):
            problem = "it must stay a method: a condition or a handler relies on it"
            _require(callable(getattr(self.cls, name)), f"{self.cls.__name__}.{name}", problem)

    def policy_for(self, definition: StepDefinition, error: BaseException) -> ExceptionPolicy:
        """The policy that decides what an error in a step does."""
        latest_first = self.policies[::-1]
        specific_first = sorted(latest_first, key=lambda policy: policy.matching is None)
        candidates = (*definition.policies, *specific_first)
        return next((each for each in candidates if each.matches(error)), PAUSE)

    def _add_step(self, key: str, body: str | None, options: dict[str, Any], where: str) -> None:
        """Add a step that an attribute declares; one without a body was removed."""
        options = _checked(options, STEP_OPTIONS, where)
        _check_together(options, where)
        # The name of one that was removed may have become an attribute.
        reserved = dir(Workflow)
        for name in (key, options["name"]) if body else (key,):
            problem = f"a step must not be called {name!r}, an attribute of Workflow: rename it"
            _require(name not in reserved, where, problem)
        defined = {option: value for option, value in options.items() if option in StepDefinition.__dataclass_fields__}
        policies = _step_policies(options, where)
        definition = StepDefinition(**defined, body=body or "", policies=policies, removed=not body)
        self._place(definition, options.get("before_step"), options.get("after_step"), where)

    def _check_methods(self, definition: StepDefinition, where: str) -> None:
        body, method = definition.body, getattr(self.cls, definition.body, None)
        _require(callable(method), where, f"its body {body!r} is not a method of the class")
        is_generator = inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method)
        _require(not is_generator, where, f"its body {body!r} is a generator, which nothing would run: do not yield")
        for option in ("skip_if", "wait", "matching"):
            if isinstance(name := getattr(definition, option), str):
                named = getattr(self.cls, name, None)
                _require(callable(named), where, f"{option} names no method: {name!r}")
                _require_plain(named, where, option)

    def _place(self, definition: StepDefinition, before: str | None, after: str | None, where: str) -> None:
        names = [each.name for each in self.steps]
        place = len(names)
        if definition.name in names:
            place = names.index(definition.name)
            del self.steps[place], names[place]
        if beside := before or after:
            known = ", ".join(names) or "none"
            _require(beside in names, where, f"there is no step {beside!r} yet to be placed beside: use {known}")
            place = names.index(beside) + bool(after)
        self.steps.insert(place, definition)

    def _add_rules(self, key: str, value: Any, where: str) -> None:
        """Add what an attribute declares for all steps: a condition, policies, options."""
        inner = getattr(value, "__func__", getattr(value, "fget", None))  # of a class method, of a property
        _require(not hasattr(inner, "_geneva_drive_step"), where, "a step must be a method, and called as one")
        if getattr(value, "_geneva_drive_cancel_if", False) and key not in self.cancel_ifs:
            _require_plain(value, where, "a condition")
            self.cancel_ifs.append(key)
        if hasattr(value, "_geneva_drive_handles"):
            _require_plain(value, where, "a handler")
            self.policies = [each for each in self.policies if getattr(each, "handler", None) != key]
            self.policies.append(_HandlerPolicy("pause", matching=value._geneva_drive_handles or None, handler=key))
        if key == "exception_policies":
            is_list = isinstance(value, (list, tuple)) and all(isinstance(each, ExceptionPolicy) for each in value)
            _require(is_list, where, f"must be a list of ExceptionPolicy objects, not {value!r}")
            self.policies.extend(value)
        if key == "step_options":
            self.step_options.update(_checked_options(value, where))


def _declared_steps(key: str, value: Any) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The body (of one that was removed, None) and the options of each step that an attribute of a class declares."""
    if isinstance(value, (list, tuple)) and any(isinstance(each, _Declaration) for each in value):
        items = [(f"{key}_{number}", each) for number, each in enumerate(value, 1)]
    else:
        items = [(key, getattr(value, "_geneva_drive_step", value))]
    for name, declaration in items:
        if isinstance(declaration, _Declaration):
            body = None if declaration.is_removed else declaration.body or key
            yield body, {"name": name, **declaration.options}


def _check_together(options: dict[str, Any], where: str) -> None:
    waits = ("wait_for", "wait_for_children")
    for option, needed in (("timeout", waits), ("matching", waits[:1]), ("on_timeout", ("timeout",))):
        is_right = option not in options or any(options.get(each) not in (None, False) for each in needed)
        _require(is_right, where, f"{option} goes with {' or '.join(needed)} only")
    _require(not all(map(options.get, waits)), where, f"{' and '.join(waits)} exclude each other: make it two steps")
    has_two_places = options.get("before_step") and options.get("after_step")
    _require(not has_two_places, where, "before_step and after_step exclude each other")
    problem = "resumable and transactional exclude each other: what rolls back the body would take its cursor along"
    _require(not (options.get("resumable") and options.get("transactional")), where, problem)


def _step_policies(options: dict[str, Any], where: str) -> tuple[ExceptionPolicy, ...]:
    """The policies that `on_exception`, `max_reattempts` and `terminal_action` of a step make."""
    reaction = options.get("on_exception")
    limits = {key: options[key] for key in ("max_reattempts", "terminal_action") if key in options}
    for key in limits:
        _require(reaction == "reattempt", where, f'{key} goes with on_exception="reattempt" only')
    if reaction is None or isinstance(reaction, str):
        return (ExceptionPolicy(reaction, **limits),) if reaction else ()
    reactions = reaction if isinstance(reaction, (list, tuple)) else (reaction,)
    for each in reactions:
        _require_plain(each, where, "on_exception")
    return tuple(_HandlerPolicy("pause", handler=each) if callable(each) else each for each in reactions)


# ==== Fields: one form of a value on every database ===================================================================


class _OwnTypeField(peewee.Field):
    """A field whose column has a type of the library's own on some databases: see `_Dialect.column_types`."""

    kind = ""

    @property
    def dialect(self) -> _Dialect:
        """Of the database in use."""
        return _dialect(self.model._meta.get_database_instance())

    def ddl_datatype(self, ctx: Any) -> Any:
        own = self.dialect.column_types.get(self.kind)
        return SQL(own) if own else super().ddl_datatype(ctx)


class _NameField(_OwnTypeField, peewee.CharField):
    """Short text of our own making, compared by its code points."""

    kind = "name"


def _as_text(value: Any) -> Any:
    return value.decode() if isinstance(value, (bytes, bytearray)) else value


class _ExactField(_OwnTypeField, peewee.CharField):
    """Short text compared byte by byte."""

    kind = "exact"
    python_value = staticmethod(_as_text)

    def db_value(self, value: Any) -> Any:
        return self.storing()(super().db_value(value))

    def storing(self) -> Callable[[Any], Any]:
        """What stores a value in the database in use, for many of them."""
        return self.dialect.store_exact


class _TypeField(_ExactField):
    """The name of a workflow's class; reading it gives the row that class."""

    class accessor_class(peewee.FieldAccessor):
        def __set__(self, instance: Workflow, value: str) -> None:
            super().__set__(instance, value)
            if type(instance).workflow_type != value:
                instance.__class__ = _workflow_classes.get(value, Workflow)


class _LongTextField(_OwnTypeField, peewee.TextField):
    """Text of any length. Holds nothing that some database refuses."""

    kind = "text"

    def db_value(self, value: str | None) -> str | None:
        return value and _storable(value)


def _storable(text: str, charset: str = "utf-8") -> str:
    """Text without what some database refuses, and what a character set does not have: that is escaped."""
    return text.replace("\0", "\\x00").encode(charset, "backslashreplace").decode()


class _JsonField(_OwnTypeField, peewee.TextField):
    """A JSON value as text. A database's own JSON type would reorder its keys and refuse some of its strings."""

    kind = "text"

    def db_value(self, value: Any) -> str | None:
        return None if value is None else _dump_json(value, f"the {self.name}")

    def python_value(self, value: Any) -> Any:
        return None if value is None else json.loads(value)


class _ReadText(str):
    """A JSON object as a row holds it, to be compared with."""


class _ReadObject(dict[str, Any]):
    """A JSON object, and the text that was read."""

    read = "{}"


class _JsonObjectField(_JsonField):
    __hash__ = peewee.Field.__hash__

    def __eq__(self, other: Any) -> Any:
        # It is compared with what was read: byte by byte, where a collation would take "Ada" for "ADA".
        return peewee.Expression(self.dialect.exactly(self), peewee.OP.EQ, other)

    def db_value(self, value: Any) -> str | None:
        return value if value is None or isinstance(value, _ReadText) else _dump_object(value)

    def python_value(self, value: Any) -> Any:
        if value is None:
            return None
        read = _ReadObject(json.loads(value))
        read.read = value
        return read


class _Context(dict[str, Any]):
    """The context as it was read, and what was changed in it since; what is not JSON is refused on its way in.

    What is written of it are the keys that this instance changed, onto what the row holds by then.
    """

    def __init__(self, text: str) -> None:
        super().__init__(json.loads(text) if text != "{}" else ())
        self.read = text
        self.at_commit: Any = None  # of the transaction in which it was saved

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise TypeError(f"the context must have text keys, as a JSON object has, not {key!r}")
        _encode({key: value}, "the context")
        super().__setitem__(key, value)

    # The dict's own would pass by the check.
    update, setdefault = MutableMapping.update, MutableMapping.setdefault

    def __ior__(self, other: Any) -> Self:  # type: ignore[override, misc]
        self.update(other)
        return self

    def is_changed(self) -> bool:
        return (self.read != "{}" or len(self) > 0) and _encoded_or_none(self) != self.read

    def onto(self, text: str) -> tuple[_Context, list[str]]:
        """What another context becomes by the changes in this one; and the keys that cannot be kept, left as they were.

        These are not JSON, since something was put into their value later, or would make the whole too long.
        """
        read, merged, misfits, growth = json.loads(self.read), _Context(text), [], dict[str, int]()
        for key in read.keys() - self.keys():
            merged.pop(key, None)
        for key, value in self.items():
            encoded = _encoded_or_none(value)
            if encoded is None:
                misfits.append(key)
            elif key not in read or encoded != _encode_json(read[key]):
                growth[key] = self._size(key) - merged._size(key)
        excess = sum(map(merged._size, merged)) + sum(growth.values()) - MAX_JSON_BYTES
        for key in sorted(growth, key=growth.__getitem__, reverse=True):
            if min(excess, growth[key]) > 0:
                excess -= growth.pop(key)
                misfits.append(key)
        merged.update({key: self[key] for key in growth})
        return _Context(_encode_json(merged)), misfits

    def _size(self, key: str) -> int:
        """What a key adds to the length of the whole, which is the sum of these."""
        return len(_encode_json({key: self[key]})) if key in self else 0

    def follow(self, other: _Context) -> None:
        """Become another one, into which this one was written; values that are the same stay the same objects."""
        for key in self.keys() - other.keys():
            del self[key]
        for key in other:
            if key not in self or _encode_json(self[key]) != _encode_json(other[key]):
                self[key] = other[key]
        self.read = other.read

    def replaced(self, value: Any) -> _Context:
        """The same as read, and this in its place."""
        _dump_object(value)
        new = _Context(self.read)
        new.clear()
        new.update(value)
        return new


class _ContextField(_JsonObjectField):
    class accessor_class(peewee.FieldAccessor):
        def __set__(self, instance: Workflow, value: Any) -> None:
            old = instance.__data__.get(self.name)
            super().__set__(instance, old.replaced(value) if isinstance(old, _Context) and value is not old else value)

    def db_value(self, value: Any) -> str | None:
        return value.read if isinstance(value, _Context) and not value.is_changed() else super().db_value(value)

    def python_value(self, value: Any) -> Any:
        return None if value is None else _Context(value)


def _utc_text(moment: datetime | None) -> str | None:
    """A moment as columns take it; for a datetime, drivers take several times as long, or refuse it."""
    if moment is None:
        return None
    if moment.tzinfo is not timezone.utc:
        moment = moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return _text_of(moment)


@functools.lru_cache(maxsize=32)  # one moment goes into several columns and many rows
def _text_of(moment: datetime) -> str:
    """Of a moment in UTC: in other zones, moments that differ may be equal."""
    return moment.isoformat(" ").removesuffix("+00:00")


class _UtcField(_OwnTypeField, peewee.DateTimeField):
    """A moment: stored as naive UTC with microseconds, read as an aware datetime. A naive one is in UTC."""

    kind = "moment"
    db_value = staticmethod(_utc_text)

    def case_value(self, value: datetime | None) -> Any:
        """For `bulk_update()`: in a CASE, text is text, and needs the column's type."""
        own, stored = self.dialect.column_types.get(self.kind), self.to_value(value)
        return stored.cast(own) if own else stored

    def python_value(self, value: Any) -> datetime | None:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        return moment and moment.replace(tzinfo=timezone.utc)


def _dump_object(value: Any) -> str:
    """The context, a JSON object, as text; else a TypeError or a ValueError says what is wrong."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"the context must be a dict with text keys, a JSON object, not {value!r:.200}")
    return _dump_json(value, "the context")


_encode_json = json.JSONEncoder(allow_nan=False).encode


def _encoded_or_none(value: Any) -> str | None:
    """Any JSON value as text; None for what is not JSON."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        return _encode_json(value)
    return None


def _encode(value: Any, what: str) -> str:
    """Any JSON value as text; else a TypeError or a ValueError says where in `what` something is not JSON."""
    try:
        return _encode_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        where = f"{what}{_way_to_misfit(value)}"
        raise kind(f"{where} is not JSON: {error}; keep ids, numbers and text in it") from error


def _way_to_misfit(value: Any, depth: int = 20) -> str:
    """The way to the first part of a value that is not JSON: `["lines"][3]["at"]`."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, part in parts if depth else ():
        if _encoded_or_none(part) is None:
            return f"[{json.dumps(key, default=repr)}]{_way_to_misfit(part, depth - 1)}"
    return ""


def _dump_json(value: Any, what: str) -> str:
    """Any JSON value as text; else a TypeError or a ValueError says what is wrong with `what`."""
    text = _encode(value, what)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{what} takes {len(text)} bytes, over {MAX_JSON_BYTES}: keep large things in own rows")
    return text


# ==== User code: what it returns, and what it is run in ===============================================================


def _finished(result: Any, where: str, must_stay: bool = False) -> Any:
    """What user code comes to: an awaitable is run to its end; what nothing would run is a StepConfigurationError.

    :param must_stay: that it is run in this thread, on its connection.
    """
    if result is None:
        return None
    if not inspect.isawaitable(result):
        is_lazy = inspect.isgenerator(result) or inspect.isasyncgen(result)
        problem = "it returned a generator, which nothing would run: use its items there, and do not yield"
        _require(not is_lazy, where, problem)
        return result

    async def wait() -> Any:
        return await result

    if not _is_loop_running():
        return _finished(asyncio.run(wait()), where, must_stay)
    if must_stay and inspect.iscoroutine(result):
        result.close()  # or Python would warn that it was never awaited
    problem = "an event loop runs in this thread, and another one would be outside of the step's transaction: perform "
    _require(not must_stay, where, problem + "the transactional step through asyncio.to_thread()")
    return _finished(_drive()._access.run_beside(lambda: asyncio.run(wait()), where), where)


#: Of most hooks and conditions: nothing of these is left to be run.
PLAIN_RESULTS = frozenset({type(None), bool, contextlib.nullcontext})


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _own_context() -> contextvars.Context:
    """A copy of the thread's context, for an attempt: what it sets must not reach the next one."""
    context = contextvars.copy_context()
    context.run(decimal.setcontext, decimal.getcontext().copy())  # which is changed in place
    return context


# ==== Statements: SQL that is built once ==============================================================================


class _Blank:
    """The place of a value in SQL that is built before the value is known.

    :param name: of the value, in the mapping that is given in this `place`, from 0, when the SQL is sent.
    """

    def __init__(self, field: peewee.Field[Any], name: str, place: int) -> None:
        stores = field.storing() if isinstance(field, _ExactField) else field.db_value
        self.convert, self.name, self.place = None if _is_plain(field) else stores, name, place

    @classmethod
    def value(cls, field: peewee.Field[Any], name: str, place: int = 0) -> peewee.Value:
        return peewee.Value(cls(field, name, place), converter=False)


PLAIN_FIELDS = _NameField, peewee.IntegerField, peewee.ForeignKeyField  # the library's own, to keys that are integers


def _is_plain(field: peewee.Field[Any]) -> bool:
    """Whether what the library has for a field is what drivers take and return, and nothing is to be converted."""
    return issubclass(field.model, _Record) and isinstance(field, PLAIN_FIELDS)


class _Built:
    """A query of Peewee's as it is sent. Building its SQL takes longer than running it, and is done once.

    The plain form stays beside each use: the query, of blanks in the place of values.
    """

    def __init__(self, database: Database, query: Any) -> None:
        self.database, self.query = database, query
        self.sql, parameters = database.get_sql_context().sql(query).query()
        self.parameters: list[tuple[int | None, str, Any]] = [
            (each.place, each.name, each.convert) if isinstance(each, _Blank) else (None, "", each)
            for each in parameters
        ]
        dialect = _dialect_of(cast(Any, type(database))) or _Dialect()  # a hero's may be one that we do not know
        self.send, self.rows = dialect.execute, cast(Any, None)

    def filled(self, *values: Mapping[str, Any]) -> list[Any]:
        """The parameters, with these values in the blanks, each as its field stores it; null is null everywhere."""
        filled = []
        for place, name, convert in self.parameters:
            value = convert if place is None else values[place][name]  # without a place, a constant
            is_stored = place is None or convert is None or value is None
            filled.append(value if is_stored else convert(value))
        return filled

    def execute(self, *values: Mapping[str, Any]) -> Any:
        """Send it; returns the driver's cursor."""
        return self.send(self.database, self.sql, self.filled(*values))

    def first(self, *values: Mapping[str, Any]) -> Any:
        """Send it; returns the first row as Peewee would make it, or None."""
        cursor = self.execute(*values)
        row = cursor.fetchone()
        if row is not None and self.rows is None:
            rows = self.query._get_model_cursor_wrapper(cursor)
            rows.initialize()  # which column is which field's: the same for each cursor
            rows.cursor, self.rows = None, rows
        cursor.close()  # there may be more rows: a statement that stays open lets its connection see old ones
        return row and self.rows.process_row(row)


def _conditions(where: Mapping[str, Any]) -> tuple[str, ...]:
    """Of conditions that a row has these values: each one's name, and whether the value is null."""
    if None not in where.values():
        return tuple(where)
    return tuple(name if value is not None else f"{name} is null" for name, value in where.items())


def _blanks(model: Any, names: Iterable[str], place: int) -> dict[Any, Any]:
    """Fields, and blanks for their new values in the mapping at `place`."""
    return {model._meta.fields[name]: _Blank.value(model._meta.fields[name], name, place) for name in names}


def _found_by(model: Any, conditions: Iterable[str], place: int) -> list[Any]:
    """The conditions of `_conditions()`, with blanks for the values in the mapping at `place`."""
    found = []
    for condition in conditions:
        name = condition.removesuffix(" is null")
        column = getattr(model, name)
        found.append(column.is_null() if name != condition else column == _Blank.value(column, name, place))
    return found


# ==== Types and heroes: classes by the names under which rows know them ===============================================

_workflow_classes: dict[str, type[Workflow]] = {}
_hero_models: dict[str, type[Model]] = {}


def _source_file(cls: type) -> str | None:
    path = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return path and os.path.realpath(path)


def _may_replace(new: type, old: type) -> bool:
    """Whether two classes may share a name: one is a re-import of the other, or local to a function, as in tests.

    A script that runs as `__main__` and is imported too defines its classes twice, in two modules from one file.
    """
    if "<locals>" in new.__qualname__ or "<locals>" in old.__qualname__:
        return True
    same_place = new.__module__ == old.__module__ or _source_file(new) == _source_file(old) is not None
    return same_place and new.__qualname__ == old.__qualname__


def _hero_type(model: type[Model]) -> str:
    """The name under which workflows know a model: `Meta.hero_type`, or the model's own."""
    name = getattr(model._meta, "hero_type", None)
    # Peewee hands Meta options down: what a parent has too is the parent's name, not this model's.
    parents = (getattr(getattr(base, "_meta", None), "hero_type", None) for base in model.__bases__)
    return model.__name__ if name is None or name in parents else str(name)


def _hero_model(hero_type: str) -> type[Model] | None:
    """The model called `hero_type`, or None; several are a ConfigurationError."""
    model = _hero_models.get(hero_type) or _find_hero_model(hero_type)
    if model:
        _hero_models[hero_type] = model
    return model


def _hero_problem(hero_type: str) -> str | None:
    """Why the heroes of a type cannot be read in this process, if they cannot."""
    try:
        if _hero_model(hero_type):
            return None
    except ConfigurationError as error:  # it is ambiguous
        return str(error)
    fix = f"import it, or set hero_type = {hero_type!r} in the Meta of its successor"
    return f"no model called {hero_type!r} is defined: {fix}"


def _find_hero_model(hero_type: str) -> type[Model] | None:
    found: list[type[Model]] = []
    models = Model.__subclasses__()
    for model in models:
        models += model.__subclasses__()
        # Huey's own models, Task and Schedule among them, are nobody's heroes.
        if _hero_type(model) == hero_type and not model.__module__.startswith("huey."):
            found = [each for each in found if not _may_replace(model, each)] + [model]
    if len(set(found)) > 1:
        names = ", ".join(f"{model.__module__}.{model.__qualname__}" for model in found)
        raise ConfigurationError(
            f"the hero type {hero_type!r} is ambiguous: {names}; set hero_type in the Meta of all but one of them"
        )
    return found[0] if found else None


def _hero_row(model: type[Model], key: Any) -> Model | None:
    meta, field = model._meta, model._meta.primary_key
    database = meta.get_database_instance()
    # What a select() of the model's own adds (a tenant, a soft delete) may be another condition each time.
    if database is None or getattr(model.select, "__func__", None) is not cast(Any, Model.select).__func__:
        return cast("Model | None", model.select().where(field == key).get_or_none())
    read_from = (model, meta.schema, meta.table_name, *meta.sorted_field_names)
    built = _drive()._access.statement(
        database, read_from, lambda: model.select().where(field == _Blank.value(field, "key"))
    )
    return cast("Model | None", built.first({"key": key}))


def _hero_key(hero: Any) -> tuple[str, str]:
    """The type and id under which a workflow knows its hero; else a TypeError or a ValueError says what is wrong."""
    if not isinstance(hero, Model):
        raise TypeError(f"a hero must be a saved instance of a Peewee model, not {hero!r}")
    model, hero_id = type(hero), _hero_id(hero)
    if len(hero_id) > MAX_NAME_CHARS:
        raise ValueError(f"the id of this {model.__name__} has {len(hero_id)} characters, over {MAX_NAME_CHARS}")
    if _storable(hero_id) != hero_id:
        raise ValueError(f"the id of this {model.__name__} holds a NUL or a lone surrogate: {hero_id!r}")
    _check_place(model)
    hero_type = _hero_type(model)
    if _hero_models.get(hero_type) is not model:
        _find_hero_model(hero_type)  # for the error, if there are others of the name
        _hero_models[hero_type] = model
    return hero_type, hero_id


def _hero_id(hero: Model) -> str:
    """The key of a hero as text, there and back, so that 7 and "7", or a UUID and its hex digits, are one hero."""
    model, key = type(hero), hero._pk
    if model._meta.primary_key is False or model._meta.composite_key:
        raise TypeError(f"{model.__name__} cannot be a hero: it has no primary key of one column; use a row that has")
    if key is None:
        raise ValueError(f"this {model.__name__} has no id yet: save it before it becomes a hero")
    field = _referenced(model._meta.primary_key)
    if isinstance(field, (peewee.UUIDField, peewee.BinaryUUIDField)):
        is_raw = isinstance(key, (bytes, memoryview))
        return str(uuid.UUID(bytes=bytes(key)) if is_raw else uuid.UUID(str(key)))
    stored = field.db_value(key)
    hero_id = str(field.python_value(stored))
    with contextlib.suppress(Exception):  # of a field of the application's own
        if field.db_value(hero_id) == stored:
            return hero_id
    raise TypeError(f"{model.__name__} cannot be a hero: its key is lost as text; use int, UUID or text for it")


def _referenced(field: Any) -> peewee.Field:
    """The key at the end of a foreign key, of one to another one too; any other field as it is."""
    while isinstance(field, peewee.ForeignKeyField):
        field = field.rel_field
    return field


def _check_place(model: type[Model]) -> None:
    """Refuse a model on the database of an earlier drive: its workflows would be kept in another one."""
    database, ours = _unproxied(model._meta.database), _unproxied(_drive().database)
    is_earlier = database is not ours and database in _earlier_databases
    if is_earlier and _address(database) != _address(ours):
        problem = f"{model.__name__} is in {_place(database)}, whose GenevaDrive was replaced by one on {_place(ours)}"
        raise ConfigurationError(f"{problem}, which would keep the workflow: make one drive for each process")


# ==== Workflows =======================================================================================================


if TYPE_CHECKING:

    class _Query(peewee.ModelSelect[_Row], Generic[_Row]):
        """Peewee's query of rows, and what its hints leave out."""

        def first(self, database: Any = None, n: int = 1) -> _Row | None: ...
        def tuples(self, as_tuple: bool = True) -> _Query[Any]: ...
        def dicts(self, as_dict: bool = True) -> _Query[Any]: ...
        @overload
        def __getitem__(self, place: int) -> _Row: ...
        @overload
        def __getitem__(self, place: slice) -> list[_Row]: ...
        def __getitem__(self, place: Any) -> Any: ...

    class _StateQuery:
        def __get__(self, instance: object, owner: type[_Row]) -> Callable[[], _Query[_Row]]: ...


class _WorkflowSelect(peewee.ModelSelect):
    """Reads all rows before it hands out the first: on SQLite a write fails while a read is half done."""

    def __iter__(self) -> Iterator[Any]:
        rows = super().__iter__()
        self._cursor_wrapper.fill_cache()
        return rows


class _WorkflowType(peewee.ModelBase):
    """Subclasses of Workflow share its table: they are plain classes, not Peewee models with columns of their own."""

    @classmethod
    def __prepare__(mcs, name: str, bases: tuple[type, ...], **kwargs: Any) -> dict[str, Any]:
        return _ClassBody(name)

    def __new__(mcs, name: str, bases: tuple[type, ...], body: dict[str, Any], **kwargs: Any) -> Any:
        if not any(isinstance(base, _WorkflowType) for base in bases):
            return super().__new__(mcs, name, bases, dict(body), **kwargs)
        for key, value in body.items():
            problem = "workflows share one table: keep what a workflow needs in its context or in rows of your own"
            is_column = key == "Meta" or key in Workflow._meta.fields or isinstance(value, peewee.Field)
            _require(hasattr(value, "_geneva_drive_step") or not is_column, f"{name}.{key}", problem)
        body.setdefault("workflow_type", name)
        _require(_is_name(body["workflow_type"]), name, f"workflow_type must be text, 1 to {MAX_NAME_CHARS} characters")
        cls = type.__new__(mcs, name, bases, dict(body), **kwargs)
        blueprint = _Blueprint(cls)
        for ancestor in reversed(cls.__mro__):
            if not issubclass(Workflow, ancestor):
                blueprint.add_class(ancestor)
        blueprint.check_methods()
        try:
            Workflow.__new__(Workflow).__class__ = cls  # as reading a row does
        except TypeError as error:
            problem = "its instances cannot be made from rows: name Workflow first among the bases, use no __slots__"
            raise StepConfigurationError(f"{name}: {problem} ({error})") from error
        _check_class_options(cls)
        cls._blueprint = blueprint
        cls.steps = tuple(each for each in blueprint.steps if not each.removed)
        _register(cls)
        return cls


def _register(cls: type[Workflow]) -> None:
    old = _workflow_classes.get(cls.workflow_type)
    if old is not None and not _may_replace(cls, old):
        raise StepConfigurationError(
            f"{cls.__module__}.{cls.__qualname__}: the type {cls.workflow_type!r} belongs to "
            f"{old.__module__}.{old.__qualname__}: set another workflow_type on one of them"
        )
    _workflow_classes[cls.workflow_type] = cls


class _Record(Model):
    """What the library's tables share: statements about one row, of which the hot path consists."""

    DoesNotExist: type[peewee.DoesNotExist]

    def __str__(self) -> str:
        return repr(self)

    @classmethod
    def _update_row(cls, changes: Mapping[str, Any], **where: Any) -> int:
        """Update the row with these values; returns 1, or 0 if there is none."""
        built = cls._built("update", changes, _conditions(where), lambda model, new: model.update(new))
        return cast(int, built.database.rows_affected(built.execute(changes, where)))

    @classmethod
    def _insert_row(cls, values: Mapping[str, Any]) -> int:
        """Insert a row; returns its id."""
        built = cls._built("insert", values, (), lambda model, new: model.insert(new))
        cursor = built.execute(values)
        returns = " RETURNING " in built.sql  # the drivers' ways of telling differ
        return cast(int, cursor.fetchone()[0] if returns else built.database._last_insert_rowid(cursor))

    @classmethod
    def _insert_rows(cls, rows: Sequence[Mapping[str, Any]], make: Any) -> None:
        """Insert rows that have the same columns, with one statement."""
        built = cls._built("insert many", rows[0], (), make)
        head, row, tail = cast(Any, re.fullmatch(r"(.+ VALUES )(\([^()]+\))(.*)", built.sql)).groups()
        parameters = itertools.chain.from_iterable(map(built.filled, rows))
        built.database.execute_sql(f"{head}{', '.join([row] * len(rows))}{tail}", [*parameters])

    @classmethod
    def _row(cls, **where: Any) -> Any:
        """The row with these values, or None."""
        built = cls._built("select", (), _conditions(where), lambda model, _: model.select())
        values = built.execute({}, where).fetchone()
        return values and cls._from_columns(values)

    @classmethod
    def _from_columns(cls, values: Sequence[Any]) -> Any:
        """A row as Peewee would read it, of its columns in their order."""
        data = dict(zip(cls._columns(), values))
        for name, convert in cls._conversions():
            if data.get(name) is not None:
                data[name] = convert(data[name])
        return cls._made(data, data["id"])

    @classmethod
    def _made(cls, values: Mapping[str, Any], row_id: int) -> Any:
        """An instance for a row that is there, with these values."""
        row = cls.__new__(cls)
        row.__data__, row.__rel__, row._dirty = {**values, "id": row_id}, {}, set()
        return row

    @classmethod
    @functools.cache
    def _columns(cls) -> list[str]:
        return [field.name for field in cls._meta.sorted_fields]

    @classmethod
    @functools.cache
    def _conversions(cls) -> list[tuple[str, Any]]:
        """What is to be done to the values that a driver returns."""
        fields = cls._meta.sorted_fields
        return [(field.name, field.python_value) for field in fields if not _is_plain(field)]

    @classmethod
    def _built(cls, verb: str, columns: Iterable[str], where: Iterable[str], make: Any) -> _Built:
        model = cls._meta.model

        def query() -> Any:
            made = make(model, _blanks(model, columns, 0))
            return made.where(*_found_by(model, where, 1)) if where else made

        return _drive()._access.statement(cls._meta.database, (model, verb, *columns, "where", *where), query)

    def _write(self, **values: Any) -> None:
        """Update this row, which the caller has locked, and the instance with it."""
        self._update_row(values, id=self.id)
        self.__data__.update(values)

    def _take_over(self, other: _Record) -> None:
        self.__data__.update(other.__data__)
        self._dirty.clear()

    @classmethod
    def _lock(cls, *where: Any, skip_locked: bool = False) -> Any:
        """The row, or None, locked until the transaction ends."""
        return _drive()._access.repeat(cls._locking(cls._meta.model.select().where(*where), skip_locked).get_or_none)

    @classmethod
    def _locking(cls, query: Any, skip_locked: bool = False) -> Any:
        """A query that locks its rows: a plain one could be served from an old snapshot."""
        database = _unproxied(cls._meta.database)
        # Outside of a transaction there is neither snapshot nor lock.
        return _dialect(database).locking(query, database, skip_locked) if database.in_transaction() else query


def _in_state(state: str, doc: str) -> _StateQuery:
    """A class method that selects by state."""

    def select(cls: type[Workflow]) -> Any:
        return cls.select().where(Workflow.state == state)

    select.__doc__ = f"{doc} A query, over this class and its subclasses."
    return cast("_StateQuery", classmethod(select))


class Workflow(_Record, metaclass=_WorkflowType):
    """A durable sequence of steps about a hero. Subclass it and declare the steps with `step`.

    Class attributes to set: `may_proceed_without_hero`, `step_options`, `exception_policies`, `workflow_type`;
    `delete_completed_after`, and those about what recurs. Instances are rows; their state is changed by the methods
    below, never by assigning to a column.
    """

    id: peewee.Field[int] = peewee.BigAutoField()
    type: peewee.Field[str] = _TypeField()
    hero_type: peewee.Field[str | None] = _ExactField(null=True)
    hero_id: peewee.Field[str | None] = _ExactField(null=True)
    state: peewee.Field[str] = _NameField(default=READY)
    current_step_name: peewee.Field[str | None] = _NameField(null=True)
    allow_multiple: peewee.Field[bool] = peewee.BooleanField(default=False)
    context: peewee.Field[dict[str, Any]] = _ContextField()
    options: peewee.Field[_Json] = _JsonObjectField(null=True)
    #: Why it is paused, canceled or finished, or is about to pause; null while it goes on.
    reason: peewee.Field[str | None] = _LongTextField(null=True)
    #: How many executions it has had: the number of the newest one, and the fence around every change.
    execution_count: peewee.Field[int] = peewee.IntegerField(default=1)
    pause_requested: peewee.Field[bool] = peewee.BooleanField(default=False)
    #: Tells apart workflows that get the same id, one after the other.
    token: peewee.Field[str] = _NameField()
    #: The workflow that it was created by, with `parent=`; None without, and once that one was deleted.
    parent: peewee.Field[Workflow | None] = peewee.ForeignKeyField(
        "self", null=True, backref="+", on_delete="SET NULL", index=False
    )
    parent_id: peewee.Field[int | None]
    #: How many of its children are ongoing. Each creation and end of one changes it under the lock of this row: so two
    #: that end at once see each other, whatever the isolation level. None for what never had a child.
    ongoing_children: peewee.Field[int | None] = peewee.IntegerField(null=True)
    #: The minute that it was created for by its class's `recurs`; None for one that was made by `create()`.
    occurs_at: peewee.Field[datetime | None] = _UtcField(null=True)
    created_at: peewee.Field[datetime] = _UtcField()
    transitioned_at: peewee.Field[datetime | None] = _UtcField(null=True)

    class Meta:
        table_name = "geneva_drive_workflows"

    may_proceed_without_hero = False
    step_options: Mapping[str, Any] = {}
    exception_policies: Sequence[ExceptionPolicy] = []
    workflow_type = ""
    #: For how long its workflows are kept once they are over, a timedelta or seconds; None keeps them. Where it is not
    #: set, and of types that no class defines here, the drive's `delete_completed_workflows_after` counts.
    delete_completed_after: timedelta | float | None
    #: A Huey crontab: consumers create a workflow for each minute in `recurrence_timezone` that matches.
    recurs: Callable[[datetime], object] | None = None
    recurrence_timezone = "UTC"
    #: Whether one is created while an earlier one is ongoing; it is left out otherwise, with a warning in the log.
    recurrences_overlap = False
    #: How late one may be created that no consumer ran for, or that was left out; only the newest one is.
    recurrence_catch_up: timedelta | float = timedelta(minutes=10)
    #: The steps in their order, own and inherited; those that were removed are left out.
    steps: tuple[StepDefinition, ...] = ()

    _blueprint: _Blueprint
    _attempt: _Attempt | None = None
    _locked_parent: Workflow | None = None  # of a row that was locked behind it

    @classmethod
    def _from_columns(cls, values: Sequence[Any]) -> Any:
        row = super()._from_columns(values)
        row.__class__ = _workflow_classes.get(row.type, Workflow)
        return row

    # -- starting ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        hero: Model | None = None,
        allow_multiple: bool = False,
        context: _Json = None,
        options: _Json = None,
        parent: Workflow | None = None,
    ) -> Self:
        """Start a workflow. It is durable once the transaction that surrounds the call, if any, is committed.

        :param hero: a saved instance of any model; None only where `may_proceed_without_hero`.
        :param allow_multiple: start one to which the rule of one ongoing workflow per class and hero does not apply.
        :param context: a JSON object to be kept with the workflow.
        :param options: `{"queue": ..., "priority": ...}` for this workflow's steps.
        :param parent: the workflow that it is a child of, which can wait for its end by `wait_for_children`.
        :returns: the workflow, an instance of this class.
        :raises AlreadyOngoingError: if the hero has an ongoing workflow of this class.
        :raises InvalidStateError: if the parent is finished or canceled.
        :raises TypeError: if the hero, the context or the parent is of a wrong type. Nothing is written then.
        :raises ValueError: if the hero is not saved, its id or the context is too long, or the context holds NaN.
        :raises StepConfigurationError: if the class has no steps or the options are wrong.
        :raises UnknownQueueError: if a step asks for a queue that the drive does not have.
        """
        start = _Start(cls, parent, allow_multiple, context, options)
        key = (None, None) if hero is None and cls.may_proceed_without_hero else _hero_key(hero)
        values = start.values(*key)
        workflow = _alone(values, lambda: start.insert(values))
        if hero is not None:
            workflow._hero = hero
        return cast("Self", workflow)

    @classmethod
    def get_or_create(cls, hero: Model | None = None, **kwargs: Any) -> tuple[Self, bool]:
        """The hero's ongoing workflow of this class, or a new one; safe when several processes ask at once.

        :param kwargs: as for `create()`, for a new one; the other keeps what it has, its parent too.
        :returns: the workflow, and whether it was created.
        """
        key = dict(zip(("hero_type", "hero_id"), (None, None) if hero is None else _hero_key(hero), strict=True))
        for _ in range(TRANSACTION_TRIES):
            if hero is not None and (ongoing := _ongoing({**key, "type": cls.workflow_type})):
                return ongoing, False
            with contextlib.suppress(AlreadyOngoingError):  # by now; it is looked for again
                return cls.create(hero=hero, **kwargs), True
        raise GenevaDriveError(f"{cls.workflow_type}.get_or_create(): workflows come and go too fast; try again")

    @classmethod
    def create_many(cls, heroes: Iterable[Model], on_conflict: str = "raise", *, parent: Workflow | None = None) -> int:
        """Start a workflow for each hero: all or nothing, and set-based, for tens of thousands of them.

        :param on_conflict: "raise", or "ignore" to leave out the heroes that have an ongoing workflow of this class.
        :param parent: the workflow that they are children of; see `create()`.
        :returns: how many were created.
        :raises AlreadyOngoingError: if a hero has one, or is there twice, and conflicts are not ignored.
        :raises InvalidStateError: if the parent is finished or canceled.
        """
        if on_conflict not in ("raise", "ignore"):
            raise ValueError(f'{cls.__name__}.create_many(): on_conflict must be "raise" or "ignore"')
        start, rows = _Start(cls, parent), dict[tuple[str, str], dict[str, Any]]()
        for hero in heroes:
            key = _hero_key(hero)
            if key not in rows:
                rows[key] = start.values(*key)
            elif on_conflict == "raise":
                raise AlreadyOngoingError(rows[key], None)

        def insert() -> int:
            parent_row = start.lock_parent()
            number = sum(start.insert_many(list(batch), on_conflict) for batch in peewee.chunked(rows.values(), 1000))
            _count_children(start.drive, parent_row, number)
            return number

        return start.drive._access.transact(insert)

    # -- flow control -----------------------------------------------------------------------------------------------

    def cancel(self, *, children: bool = False, reason: str | None = None) -> None:
        """End the workflow for good. Inside a step this ends its body at once.

        From outside, a resumable step that is being performed ends at its next checkpoint, another one as it does.

        :param children: whether to cancel its ongoing children too, with theirs, in the same commit.
        :param reason: why, for people: text, which is kept on one line and cut at 1,000 characters. It is found in
            `workflow.reason`, and in that of the attempt which ends by it. The calls below have it too.
        :raises InvalidStateError: from outside, if the workflow is over.
        :raises FlowControlInTransactionError: inside a step, within a transaction that the step has begun.
        :raises TypeError: if the reason is not text.
        """
        self._control("cancel", functools.partial(_canceled, children=children), reason, children=children)

    def pause(self, *, reason: str | None = None) -> None:
        """Halt the workflow until `resume()`. Inside a step this ends its body at once, to run again then.

        From outside, a step that is being performed ends and is recorded first; a resumable one ends at its next
        checkpoint.

        :param reason: as for `cancel()`; an error that pauses the workflow first is the reason instead.
        :raises InvalidStateError: from outside, if the workflow is paused or over.
        :raises FlowControlInTransactionError: inside a step, within a transaction that the step has begun.
        """
        self._control("pause", _paused, reason)

    def skip(self, *, reason: str | None = None) -> None:
        """Go on with the next step. Inside a step this ends its body at once; from outside it also resumes.

        :param reason: kept with the attempt that is skipped.
        :raises InvalidStateError: from outside, if the workflow is performing or over.
        :raises FlowControlInTransactionError: inside a step, within a transaction that the step has begun.
        """
        self._control("skip", _skipped, reason)

    def reattempt(
        self, wait: timedelta | float | None = None, rewind: bool = False, *, reason: str | None = None
    ) -> NoReturn:
        """Inside a step: end its body at once and run it again, after `wait` (a timedelta or seconds).

        :param rewind: let a resumable step begin at the start, not at its cursor.
        :param reason: kept with the attempt that ends.
        :raises InvalidStateError: from outside.
        :raises FlowControlInTransactionError: inside a step, within a transaction that the step has begun.
        """
        self._control("reattempt", None, reason, wait=_duration(wait or 0, "reattempt(): wait"), rewind=rewind)
        raise AssertionError("unreachable")

    def finish(self, *, reason: str | None = None) -> NoReturn:
        """Inside a step: end its body at once, and the workflow with it, as finished.

        :param reason: as for `cancel()`.
        :raises InvalidStateError: from outside.
        :raises FlowControlInTransactionError: inside a step, within a transaction that the step has begun.
        """
        self._control("finish", None, reason)
        raise AssertionError("unreachable")

    def resume(self, *, reason: str | None = None) -> None:
        """Let a paused workflow go on: what was scheduled keeps its time, else the step it stands at runs now.

        A resumable step goes on at its cursor. The counts of reattempts and recoveries start anew.

        :param reason: kept with the attempt that this leads to, as its `begun_reason`.
        :raises InvalidStateError: if it is not paused.
        :raises StepNotDefinedError: if its class does not define that step.
        """
        self._control("resume", _resumed, reason)

    def resume_at(self, step_name: str, *, reason: str | None = None) -> None:
        """Let a workflow that is paused or over go on with a step, now, and from its start.

        :param reason: as for `resume()`.
        :raises InvalidStateError: if it is ready or performing, or canceled with its last attempt in progress still.
        :raises AlreadyOngoingError: if it was over, and its hero has another ongoing workflow of this class by now.
        :raises StepNotDefinedError: if there is no such step, or no longer.
        """
        self._control("resume_at", functools.partial(_moved, step_name=step_name), reason)

    def reschedule(self, when: datetime | timedelta | float | None = None) -> None:
        """Set the time of the step that is scheduled; of one that waits for a signal or children, its limit.

        Such a limit has the step's `on_timeout`, "pause" where it declares none.

        :param when: an aware datetime, or a timedelta or seconds from now; what has passed means now. None: as the
            class declares it by now, counted from when the step was reached; a computed wait is called again.
        :raises InvalidStateError: if it is performing or over, or nothing is scheduled (an error paused it).
        :raises StepNotDefinedError: without a time, if its class does not define the step.
        :raises TypeError: if `when` is something else.
        :raises ValueError: if it is a negative duration, or one of over a hundred years.
        """
        moment = None if when is None else _moment(when, _drive()._now(), "reschedule(): when")
        self._control("reschedule", functools.partial(_rescheduled, moment=moment))

    def _control(self, call: str, change: Any, reason: Any = None, **options: Any) -> None:
        """Inside an attempt, end its body; outside, make the change."""
        if reason is not None and not isinstance(reason, str):
            raise TypeError(f"{self._label}: the reason of {call}() must be text, not {reason!r:.100}")
        reason = _one_line(reason or "")
        if self._attempt is not None and ("step", call) in EFFECTS:
            self._attempt.leave(_FlowControl(call, reason=reason, **options))
        self._take_over(_controlled(self, call, change, reason))

    def _write(self, **values: Any) -> None:
        was_over = self.state in OVER
        super()._write(**values)
        if change := was_over - (self.state in OVER):
            _count_children(_drive(), self._locked_parent, change)

    # -- signals ----------------------------------------------------------------------------------------------------

    #: In the body of a step with `wait_for`: the payload of the signal that it was given; None after a timeout.
    signal_payload: Any = None

    def signal(self, name: str, payload: Any = None, idempotency_key: str | None = None) -> bool:
        """Tell the workflow that something happened outside. A step that waits for it runs now, one to come later.

        Durable once the transaction that surrounds the call, if any, is committed. The signal is kept until the step
        that it was given to has ended, so that each attempt at it finds it; a paused workflow keeps it for
        `resume()`.

        :param payload: any JSON value of up to 128 KiB, for `self.signal_payload`.
        :param idempotency_key: text of 1 to 255 characters; a second signal of the name and key changes nothing.
        :returns: True; False if it was delivered before, to a workflow that is over by now, too.
        :raises InvalidStateError: if the workflow is finished or canceled.
        :raises UnknownSignalError: if no step of its class waits for such a signal.
        :raises TypeError: if the payload is not JSON, or the key not text. Nothing is written then.
        :raises ValueError: if the payload or the key is too long, or the payload holds NaN.
        """
        _check_signal(self, name, payload, idempotency_key)
        values = {"workflow": self.id, "name": name, "payload": payload, "idempotency_key": idempotency_key}
        drive = _drive()
        try:
            return drive._access.transact(lambda: _received(drive, self, values))
        except peewee.IntegrityError:
            if idempotency_key is None:
                raise
            return False  # the caller's transaction began before the first delivery, and cannot see it

    @classmethod
    def signal_hero(cls, hero: Model, name: str, payload: Any = None, idempotency_key: str | None = None) -> bool:
        """Send a signal to the ongoing workflow of this class about a hero; see `signal()`.

        :returns: True; False if a workflow of this class and hero had this name and key before.
        :raises InvalidStateError: if there is none ongoing, but one that is over.
        :raises Workflow.DoesNotExist: if there never was one.
        :raises ValueError: if there are several, as `allow_multiple` has it.
        """
        drive, query, key = _drive(), cls.for_hero(hero), WorkflowSignal.idempotency_key == idempotency_key
        if idempotency_key is not None:  # a key is one event's, whichever of the hero's workflows had it
            before = query.join(WorkflowSignal).where((WorkflowSignal.name == name) & key)
            if drive._access.repeat(before.exists):
                return False
        of_hero = cls._locking(query.where(Workflow.state.in_(ONGOING)).order_by(Workflow.id))
        ongoing = drive._access.repeat(functools.partial(list[Any], of_hero))
        about = f"{cls.__name__}.signal_hero({_hero_label(*_hero_key(hero))})"
        if len(ongoing) > 1:
            ids = ", ".join(str(each.id) for each in ongoing)
            raise ValueError(f"{about}: the workflows {ids} are ongoing; call signal() of the one that is meant")
        workflow = ongoing[0] if ongoing else drive._access.repeat(query.order_by(Workflow.id.desc()).first)
        if workflow is None:
            raise cls.DoesNotExist(f"{about}: there is no {cls.__name__} about it: create() one first")
        return workflow.signal(name, payload, idempotency_key)

    # -- resumable steps --------------------------------------------------------------------------------------------

    @property
    def cursor(self) -> Any:
        """In a resumable step: what `checkpoint()` kept last, in this attempt or an earlier one; None at the start.

        Each reading is a query. From outside, `execution_history` has the cursor of each attempt.

        :raises StepConfigurationError: elsewhere.
        """
        return self._progress("cursor").cursor()

    def checkpoint(self, value: Any) -> None:
        """In a resumable step: keep how far it came; the next attempt at it goes on there.

        Commits; or, within a transaction of the body's on the drive's database, is part of it: let it be the last
        statement there, for the next heartbeat waits for it. Ends the body at once, as flow control does, if the
        workflow was canceled or paused meanwhile, or its consumer drains: another one then goes on. A transaction that
        it is a part of is rolled back by that, and its part of the work done again.

        :param value: any JSON value, up to 128 KiB; it is the `cursor` from now on.
        :raises StepConfigurationError: elsewhere, and beside `resume_over()`.
        :raises TypeError: if the value is not JSON.
        :raises ValueError: if it is too long, or holds NaN.
        """
        self._progress("checkpoint()").checkpoint(value)

    def resume_over(self, items: Iterable[T], key: Any = None, every: int = 100) -> Iterator[T]:
        """In a resumable step: go over items, with a `checkpoint()` after each `every` of them and at the end.

        What was done since the last checkpoint is done again after a crash or an error: `every` items at most.

        :param items: a query of a model, or the model itself, read in pages of `every` rows along `key`; or any other
            iterable that has the same items in the same order each time.
        :param key: for a query: a unique field of its model that cannot be null, ascending or with `.desc()`; None
            takes the primary key. The rows that are there when their page is read are visited.
        :param every: how many items there are from one checkpoint to the next.
        :raises StepConfigurationError: if the items cannot be resumed, or were others when the cursor was kept; if the
            step is not resumable, or uses its cursor already.
        """
        return self._progress("resume_over()").resume_over(items, key, every)

    def _progress(self, call: str) -> _Progress:
        """Of the attempt under way at a resumable step; else a StepConfigurationError."""
        attempt = self._attempt
        if attempt is None:
            raise StepConfigurationError(f"{self._label}: {call} is for the body of a step with @step(resumable=True)")
        name = attempt.execution.step_name
        is_resumable = self._definition(name).resumable
        _require(is_resumable, f"{self.type}.{name}", f"{call} needs a cursor: declare it with @step(resumable=True)")
        return attempt.progress

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def hero(self) -> Any:
        """The row that the workflow is about, read once per instance; None if it is gone or there is none.

        It is read with its model's `select()`. If that adds a condition, such as a tenant or a soft delete, let it add
        none in a worker, which has no request: a row that it leaves out counts as gone, and its workflow is canceled.
        An error that it raises is the step's error.
        """
        if "_hero" not in self.__dict__:
            model = self.hero_type and _hero_model(self.hero_type)
            self._hero = None
            if model:
                is_binary = isinstance(_referenced(model._meta.primary_key), peewee.BinaryUUIDField)
                self._hero = _hero_row(model, uuid.UUID(self.hero_id) if is_binary else self.hero_id)
        return self._hero

    @property
    def children(self) -> _Query[Workflow]:
        """The workflows that were created with `parent=` this one, in their order: a query."""
        return Workflow.select().where(Workflow.parent == self.id).order_by(Workflow.id)

    @property
    def execution_history(self) -> _Query[StepExecution]:
        """The executions in their order: a query of `StepExecution`."""
        return StepExecution.select().where(StepExecution.workflow == self.id).order_by(StepExecution.number)

    @classmethod
    def graph(cls) -> str:
        """The class as a Mermaid flowchart: its steps, the waits between them, conditions and policies."""
        return _flowchart(cls)

    @property
    def previous_step_name(self) -> str | None:
        """The step declared before the current one."""
        return self._neighbour(-1)

    @property
    def next_step_name(self) -> str | None:
        """The step declared after the current one."""
        return self._neighbour(+1)

    @property
    def idempotency_key(self) -> str:
        """A key for calls to other systems: the same in every attempt at the current step, unique to it.

        A UUID, version 5 (RFC 9562), of the workflow's token and the step's name.
        """
        return str(uuid.uuid5(uuid.UUID(self.token), str(self.current_step_name)))

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that says which workflow, hero, step and execution a line is about, in text and in `extra`."""
        execution = self._attempt and self._attempt.execution
        details = {
            "workflow_type": self.type,
            "workflow_id": self.id,
            "hero": _hero_label(self.hero_type, self.hero_id),
            "step_name": self.current_step_name,
            "execution_id": execution and execution.id,
        }
        return _WorkflowLogger(logger, details)

    def __repr__(self) -> str:
        return f"<{self._label}: {self.state}{f' at {self.current_step_name}' if self.current_step_name else ''}>"

    @property
    def _label(self) -> str:
        return f"{self.type} {self.id}"

    def _neighbour(self, offset: int) -> str | None:
        current = self.current_step_name
        names = [each.name for each in self._blueprint.steps if not each.removed or each.name == current]
        if current not in names:
            return None
        place = names.index(current) + offset
        return names[place] if 0 <= place < len(names) else None

    def _undefined(self) -> str | None:
        """Why the workflow cannot run in this process, if it cannot: its class or its hero's model is not there."""
        if self.type not in _workflow_classes:
            return str(WorkflowNotDefinedError(self))
        problem = self.hero_type and _hero_problem(self.hero_type)
        return f"{self._label}: {problem}" if problem else None

    def _definition(self, step_name: str | None) -> StepDefinition:
        """A step of its class, a removed one too; else a WorkflowNotDefinedError or a StepNotDefinedError."""
        if self.type not in _workflow_classes:
            raise WorkflowNotDefinedError(self)
        definition = self._find(step_name)
        if definition is None:
            raise StepNotDefinedError(self, step_name)
        return definition

    @classmethod
    def _find(cls, step_name: str | None) -> StepDefinition | None:
        return cls._blueprint.by_name.get(step_name)

    @classmethod
    def _signal_names(cls) -> set[str]:
        return {each.wait_for for each in cls.steps if each.wait_for}

    def _step_after(self, step_name: str) -> StepDefinition | None:
        place = [*self._blueprint.by_name].index(self._definition(step_name).name) + 1
        return next((each for each in self._blueprint.steps[place:] if not each.removed), None)

    @classmethod
    def _huey_options(cls, definition: StepDefinition | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Of the class, the instance and the step: the latter win."""
        return {**cls._blueprint.step_options, **(options or {}), **(definition.options if definition else {})}

    # -- hooks ------------------------------------------------------------------------------------------------------

    def before_step_execution(self, execution: StepExecution) -> None:
        """Called before a step's body; an error counts as the body's."""

    def after_step_execution(self, execution: StepExecution) -> None:
        """Called after the outcome, whatever it was, is committed; an error is logged."""

    def around_step_execution(self, execution: StepExecution) -> contextlib.AbstractContextManager[Any]:
        """The context manager that a step's body runs in."""
        return contextlib.nullcontext()

    # -- queries ----------------------------------------------------------------------------------------------------

    ready = _in_state(READY, "The workflows whose next step is scheduled.")
    performing = _in_state(PERFORMING, "The workflows that a step of is being performed.")
    paused = _in_state(PAUSED, "The workflows that wait for `resume()`.")
    finished = _in_state(FINISHED, "The workflows that came to their end.")
    canceled = _in_state(CANCELED, "The workflows that were canceled.")

    @classmethod
    def ongoing(cls) -> _Query[Self]:
        """The workflows that are neither finished nor canceled."""
        return cls.select().where(Workflow.state.in_(ONGOING))

    @classmethod
    def for_hero(cls, hero: Model) -> _Query[Self]:
        """The workflows of one hero."""
        hero_type, hero_id = _hero_key(hero)
        return cls.select().where((Workflow.hero_type == hero_type) & (Workflow.hero_id == hero_id))

    @classmethod
    def undefined_steps_in_flight(cls) -> list[UndefinedStep]:
        """What a deploy of this code would strand: the steps that ongoing workflows stand at and that it lacks.

        Over this class and its subclasses. A step under `removed_step()` is defined. Reads all rows.

        :returns: these steps, sorted; of a type that no class defines, all.
        """
        found = _count_ongoing(cls.select(), Workflow.type, Workflow.current_step_name)
        defined = {(key, each.name) for key, known in _workflow_classes.items() for each in known._blueprint.steps}
        return [UndefinedStep(*each) for each in found if each[:2] not in defined]

    @classmethod
    def select(cls, *fields: Any) -> _Query[Self]:
        """A query over this class and its subclasses; rows come back as their own class."""
        # On Workflow itself, for Peewee to recognise the model that the fields belong to, in joins above all.
        query = _WorkflowSelect(Workflow, fields or Workflow._meta.sorted_fields, is_default=not fields)
        return cls._narrow(query)

    @classmethod
    def update(cls, __data: Any = None, **values: Any) -> peewee.ModelUpdate:
        """An update of the rows of this class and its subclasses."""
        return cls._narrow(peewee.ModelUpdate(Workflow, Workflow._normalize_data(__data, values)))

    @classmethod
    def delete(cls) -> peewee.ModelDelete:
        """A deletion of rows of this class and its subclasses."""
        return cls._narrow(peewee.ModelDelete(Workflow))

    @classmethod
    def _narrow(cls, query: Any) -> Any:
        if cls is Workflow:
            return query
        names = {name for name, each in _workflow_classes.items() if issubclass(each, cls)} | {cls.workflow_type}
        return query.where(Workflow.type.in_(sorted(names)))

    def save(self, force_insert: bool = False, only: Any = None) -> int:
        """Save what this instance changed in the context, key by key, onto the context as others left it.

        The rest is the engine's: a stale instance must not turn back what moved on.

        :returns: 1, or 0 if the workflow was deleted.
        :raises TypeError: if another column was assigned to, or a value was put into the context that is not JSON.
        :raises ValueError: if the context has become too long.
        """
        touched = self._dirty - {"context"}
        if touched or force_insert or self.id is None:
            raise TypeError(
                f"{self._label}: save() keeps the context only, not {', '.join(sorted(touched)) or 'new rows'}: use "
                "create(), cancel(), pause(), skip(), resume(), or Workflow.update() if you know better"
            )
        context, text, drive = self.context, _dump_object(self.context), _drive()
        may_be_undone = drive._access.database.in_transaction()

        def merge() -> _Context | None:
            row = Workflow._lock(Workflow.id == self.id)
            if row is None:
                return None
            merged, misfits = context.onto(row.context.read)
            if misfits:
                problem = f"takes over {MAX_JSON_BYTES} bytes with what others saved meanwhile"
                raise ValueError(f"{self._label}: the context {problem}: keep large things in own rows")
            row._write(context=merged)
            return merged

        merged = drive._access.transact(merge)
        if merged is not None and may_be_undone:  # then the changes are to be written again
            context.at_commit = drive._access.after_commit(functools.partial(setattr, context, "read", text))
        elif merged is not None:
            context.follow(merged)
        self._dirty.discard("context")
        return int(merged is not None)

    def _as_read(self) -> dict[str, Any]:
        """What finds the row as long as nobody wrote what others may write to at any time."""
        options = self.options
        read = None if options is None else _ReadText(getattr(options, "read", None) or _encode_json(options))
        return {"context": _ReadText(self.context.read), "options": read}

    def _take_over(self, other: _Record) -> None:
        mine = self.context
        super()._take_over(other)
        if mine is not None and mine.at_commit in _drive()._access.database._state.commit_callbacks:
            mine.at_commit()  # what the transaction under way has saved is in the other one
        if mine is not None and mine.is_changed():  # and not saved: it must not get lost
            self.__data__["context"], _ = mine.onto(self.context.read)
            self.context.read = other.context.read


#: The rows that the unique index of ongoing workflows holds; literals, or SQLite would not see that it applies.
ONGOING_ROWS = SQL(f"state in {ONGOING} and not allow_multiple")


def _is_in(*states: str) -> Any:
    """The condition for workflows in one of these states: literals, for the same reason; `in` would hide them."""
    return functools.reduce(operator.or_, [Workflow.state == SQL(f"'{state}'") for state in states])


def _count_ongoing(query: Any, *columns: Any) -> list[Any]:
    """What columns hold in the rows about ongoing workflows, and of how many: sorted tuples, without nulls."""
    query = query.select(*columns, peewee.fn.COUNT(Workflow.id.distinct())).where(Workflow.state.in_(ONGOING))
    return sorted(query.where(*[each.is_null(False) for each in columns]).group_by(*columns).tuples())


Workflow._blueprint = _Blueprint(Workflow)

# ==== Starting: workflows and their first executions ==================================================================


class _Start:
    """Starts workflows of one class; all of it but the heroes is checked before anything is written."""

    def __init__(
        self, cls: type[Workflow], parent: Any, allow_multiple: bool = False, context: _Json = None, options: Any = None
    ) -> None:
        where, self.cls, self.drive, self.parent = f"{cls.__name__}.create()", cls, _drive(), parent
        _require(cls.steps, where, "the class has no steps; was a @step decorator forgotten?")
        if not isinstance(allow_multiple, bool):
            raise TypeError(f"{where}: allow_multiple must be a bool, not {allow_multiple!r}")
        if parent is not None and not (isinstance(parent, Workflow) and parent.id):
            raise TypeError(f"{where}: parent must be a workflow that was created, not {parent!r}")
        if options is not None:
            options = _checked_options(options, f"{where}: options")
        for definition in cls.steps:
            if asked := cls._huey_options(definition, options):
                self.drive._dispatch.check_route(f"{cls.__name__}.{definition.name}", asked)
        self.columns = {
            **Workflow._meta.get_default_dict(),
            "type": cls.workflow_type,
            "current_step_name": cls.steps[0].name,
            "allow_multiple": allow_multiple,
            "context": _Context("{}" if context is None else _dump_object(context)),
            "options": options,
            **dict.fromkeys(("reason", "occurs_at", "transitioned_at", "ongoing_children")),
            "parent": parent and parent.id,
        }

    def values(self, hero_type: str | None, hero_id: str | None) -> dict[str, Any]:
        """The columns of a new workflow of a hero."""
        hero = {"hero_type": hero_type, "hero_id": hero_id}
        return {**self.columns, **hero, "token": os.urandom(16).hex(), "created_at": self.drive._now()}

    def insert(self, values: dict[str, Any]) -> Workflow:
        """Insert a workflow, with its first execution."""
        access, tries = self.drive._access, itertools.count()
        is_atomic = access.dialect.is_one_statement and not (self.drive._dispatch.has_shared or self.parent)

        def insert() -> Workflow:
            _count_children(self.drive, self.lock_parent(), +1)
            return self._inserted(values, is_again=next(tries) > 0)

        return access.transact(insert, is_atomic=is_atomic)

    def lock_parent(self) -> Workflow | None:
        """The row of the parent, if there is to be one, locked; an error, if it cannot have children any more."""
        if self.parent is None:
            return None
        row, call = Workflow._lock(Workflow.id == self.parent.id), "a child's create"
        if row is None:
            raise Workflow.DoesNotExist(f"{self.parent._label} was deleted; {call}() came too late")
        if row.state not in ALLOWED_FROM[call]:
            raise InvalidStateError(row, call)
        return cast(Workflow, row)

    def _inserted(self, values: dict[str, Any], is_again: bool) -> Workflow:
        """Insert it; or find it, where a try before was committed as its connection went."""
        workflow, access = self.cls._made(values, 0), self.drive._access
        begins = self._first_values(workflow, values["created_at"])
        ids = self._ids(values) if is_again else None
        workflow.__data__["id"], execution_id = ids or access.dialect.create(access.database, values, begins)
        self.drive._announce(workflow, None, READY)  # before a worker is woken, which announces what follows
        self.drive._dispatch.send([StepExecution._made({**begins, "workflow": workflow.id}, execution_id)])
        return cast(Workflow, workflow)

    def _first_values(self, workflow: Workflow, now: datetime) -> dict[str, Any]:
        """The columns of a new workflow's first execution."""
        begins = {**self.cls.steps[0]._first(now), "number": 1, "created_at": now}
        return StepExecution._scheduled_values(workflow, READY, begins)

    @staticmethod
    def _ids(values: dict[str, Any]) -> tuple[int, int] | None:
        """The ids of the workflow that was inserted with these values, if it was, and of its first execution."""
        workflow = Workflow._row(**{name: values[name] for name in ("hero_type", "hero_id", "token")})
        first = workflow and StepExecution._row(workflow=workflow.id, number=1)
        return first and (workflow.id, first.id)

    def insert_many(self, rows: list[dict[str, Any]], on_conflict: str) -> int:
        """Insert workflows, with their first executions; returns how many were."""
        ignore = self.drive._access.dialect.ignore
        Workflow._insert_rows(rows, lambda model, new: model.insert(new).on_conflict(action=ignore))
        # Found through the index of ongoing workflows; the token tells ours from those that were there before.
        query = Workflow.select(Workflow.token, Workflow.id).where(
            (Workflow.type == self.cls.workflow_type)
            & Workflow.hero_type.in_({row["hero_type"] for row in rows})
            & Workflow.hero_id.in_([row["hero_id"] for row in rows])
            & ONGOING_ROWS
        )
        ids = dict(query.tuples())
        created = [self.cls._made(row, ids[row["token"]]) for row in rows if row["token"] in ids]
        if len(created) < len(rows) and on_conflict == "raise":
            row = next(row for row in rows if row["token"] not in ids)
            ongoing = _ongoing(row)
            raise AlreadyOngoingError(row, ongoing and ongoing.id)
        for workflow in created:
            self.drive._announce(workflow, None, READY)
        if created:
            self._schedule(created)
        return len(created)

    def _schedule(self, workflows: list[Workflow]) -> None:
        """Insert the first executions of new workflows."""
        now = self.drive._now()
        same = self._first_values(workflows[0], now)
        rows = [{**same, "workflow": each.id, "job_id": _job_id(now)} for each in workflows]
        StepExecution._insert_rows(rows, lambda model, new: model.insert(new))
        of_these = StepExecution.workflow.in_([each.id for each in workflows])
        ids = dict(StepExecution.select(StepExecution.workflow, StepExecution.id).where(of_these).tuples())
        self.drive._dispatch.send([StepExecution._made(row, ids[row["workflow"]]) for row in rows])


def _ongoing(values: Mapping[str, Any]) -> Any:
    """The ongoing workflow of this type and hero, or None, in spite of any old snapshot."""
    same = [getattr(Workflow, name) == values[name] for name in ("type", "hero_type", "hero_id")]
    return Workflow._lock(*same, ONGOING_ROWS)


def _alone(values: Mapping[str, Any], begin: Callable[[], T]) -> T:
    """Have a workflow with these values become ongoing; an AlreadyOngoingError, if its hero has another such one."""
    for _ in range(TRANSACTION_TRIES):
        try:
            return begin()
        except peewee.IntegrityError as error:
            if ongoing := _ongoing(values):
                raise AlreadyOngoingError(values, ongoing.id) from error
            collision = error  # it ended in between: try again
    raise collision


# ==== Calls from outside of a step ====================================================================================


def _controlled(workflow: Workflow, call: str, change: Any, reason: str | None) -> Workflow:
    """Make a change under the workflow's row lock, where its state allows the call; returns the row."""
    drive, found = _drive(), dict[str, Any]()

    def locked_change(charset: str) -> Workflow:
        parent_id = workflow.parent_id if "parent" in workflow.__data__ else _parent_id_of(workflow.id)
        row, active = _lock_with_active(workflow.id, parent_id)
        if row is None:
            raise Workflow.DoesNotExist(f"{workflow._label} was deleted; {call}() came too late")
        if row.state not in ALLOWED_FROM[call] or (row.pause_requested and call == "pause"):
            raise InvalidStateError(row, call)
        before = row.state
        found.update(row.__data__)  # the instance may have been read in part
        change(drive, row, active, reason and _storable(reason, charset))
        drive._announce(row, before, row.state)
        return cast(Workflow, row)

    return drive._access.escaping(
        lambda charset: _alone(found, lambda: drive._access.transact(lambda: locked_change(charset))),
        lambda: reason or "",
    )


def _lock_with_active(workflow_id: int, parent_id: int | None = None) -> tuple[Any, Any]:
    """The row and its active execution, each or None, in the order in which everything locks them."""
    row = _lock_behind_parent(workflow_id, parent_id)
    return row, StepExecution._lock((StepExecution.workflow == workflow_id) & StepExecution.state.in_(ACTIVE))


def _parent_id_of(workflow_id: int) -> Any:
    return Workflow.select(Workflow.parent).where(Workflow.id == workflow_id).scalar()


def _lock_behind_parent(workflow_id: int, parent_id: int | None) -> Any:
    """The row, or None; and before it the parent's, which is told if the workflow comes to its end, or goes on again.

    Without the parent's id, its state must not change so.
    """
    parent = parent_id and Workflow._lock(Workflow.id == parent_id)
    row = Workflow._lock(Workflow.id == workflow_id)
    if row and parent and row.parent_id == parent.id:  # else the parent was deleted, and its id used again
        row._locked_parent = parent
    return row


# In what follows the workflow's row is locked, behind its parent's; its active execution, if any, is `active`.


def _check_signal(workflow: Workflow, name: Any, payload: Any, key: Any) -> None:
    if not _is_name(name):
        raise UnknownSignalError(workflow, name)
    _dump_json(payload, f"the payload of the signal {name!r}")
    if key is not None and not isinstance(key, str):
        raise TypeError(f"the idempotency_key of the signal {name!r} must be text, not {key!r}")
    if key is not None and not _is_name(key):
        raise ValueError(f"the idempotency_key of the signal {name!r} must have 1 to 255 printable characters")


def _received(drive: GenevaDrive, workflow: Workflow, values: dict[str, Any]) -> bool:
    """Keep a signal, and wake the execution that waits for it. Whether it is a new one.

    A step begins to wait under the lock of the same row: whichever of the two comes first, the other one sees it.
    """
    row, active = _lock_with_active(workflow.id)
    name, key = values["name"], values["idempotency_key"]
    if row is None:
        raise Workflow.DoesNotExist(f"{workflow._label} was deleted; the signal {name!r} came too late")
    same = (WorkflowSignal.workflow == row.id) & (WorkflowSignal.name == name)
    if key is not None and WorkflowSignal.select().where(same & (WorkflowSignal.idempotency_key == key)).exists():
        return False
    # A change, for the isolation level REPEATABLE READ of PostgreSQL: who lets the step wait on account of an older
    # snapshot collides with it and tries again.
    row._write(state=row.state)
    WorkflowSignal.insert(created_at=drive._now(), **values).execute()
    if row.state not in ALLOWED_FROM["signal"]:  # asked last: a key that an older snapshot hides is found by the index
        raise InvalidStateError(row, "signal")
    # Of a class that is not defined here, other processes know what it waits for; after a deploy, the execution may.
    is_known = row.type not in _workflow_classes or name in row._signal_names()
    if not is_known and not (active and active.waiting_for == name):
        raise UnknownSignalError(row, name)
    if active and active.state == WAITING and row.state == READY:
        definition = row._find(active.step_name)
        if name in (active.waiting_for, definition and definition.wait_for):  # as it began to wait, or by now
            _wake(drive, row, active)
    return True


def _wake(drive: GenevaDrive, workflow: Workflow, execution: StepExecution) -> None:
    """Have an execution that waits run: not before its time, and to see for itself what signals there are."""
    due = max(execution.scheduled_for, drive._now())
    drive._dispatch.put_in_queue(workflow, execution, state=SCHEDULED, scheduled_for=due)


def _count_children(drive: GenevaDrive, parent: Workflow | None, change: int) -> None:
    """Change the number of ongoing children that a parent, if there is one, counts; at 0, wake the step that waits.

    Needs the parent's lock. Counting the children's rows instead would lock them on MySQL, where a plain look sees an
    old snapshot; and in PostgreSQL's REPEATABLE READ, who has not seen this change must collide with it.
    """
    if parent is None:
        return
    parent._write(ongoing_children=max(0, (parent.ongoing_children or 0) + change))
    if parent.ongoing_children or parent.state != READY:
        return
    waits = (StepExecution.state == WAITING) & StepExecution.waiting_for.is_null()
    execution = StepExecution._lock((StepExecution.workflow == parent.id) & waits)
    if execution:
        _wake(drive, parent, execution)


def _has_ongoing_children(drive: GenevaDrive, workflow: Workflow) -> bool:
    """As the row has it by now, without a lock."""
    ongoing = Workflow.select(Workflow.ongoing_children).where(Workflow.id == workflow.id)
    return bool(drive._access.repeat(ongoing.scalar))


def _must_wait(workflow: Workflow, definition: StepDefinition, execution: StepExecution | None = None) -> bool:
    """Whether what a step waits for is not there: the ends of all children, or a signal. Needs the lock.

    :param execution: the step's, which has looked at some signals.
    """
    if definition.wait_for_children:
        return bool(cast(Workflow, Workflow._lock(Workflow.id == workflow.id)).ongoing_children)
    if definition.wait_for is None:
        return False
    looked_at = execution.signal_id if execution else None
    return WorkflowSignal._lock(*WorkflowSignal._pending(workflow, definition, looked_at)) is None


def _beginning(workflow: Workflow, values: Mapping[str, Any]) -> dict[str, Any]:
    """How a new execution begins: scheduled, or waiting for what has not come. Needs the workflow's lock.

    :param values: the execution's; with `times_out_at` where an earlier attempt has begun to wait.
    """
    definition = workflow._find(values["step_name"])
    if definition is None or not definition._waits or values.get("asks_wait"):
        return {"state": SCHEDULED}
    due, times_out_at = values["scheduled_for"], values.get("times_out_at")
    since = values.get("waits_since") or due
    if times_out_at is None and definition.timeout is not None:
        times_out_at = due + definition.timeout
    is_late = times_out_at is not None and times_out_at <= due
    # Before the first execution, there were neither signals nor children.
    waits = not is_late and (_must_wait(workflow, definition) if values["number"] > 1 else bool(definition.wait_for))
    state = WAITING if waits else SCHEDULED
    return {"state": state, "waiting_for": definition.wait_for, "waits_since": since, "times_out_at": times_out_at}


def _canceled(drive: GenevaDrive, workflow: Workflow, active: Any, reason: str | None, children: bool = False) -> None:
    _drop(drive, active, reason)
    workflow._write(**_columns_of_canceled(drive, reason))
    if children:
        _cancel_children(drive, workflow, reason)


def _columns_of_canceled(drive: GenevaDrive, reason: str | None) -> dict[str, Any]:
    ended = {"state": CANCELED, "current_step_name": None, "transitioned_at": drive._now(), "reason": reason}
    return {**ended, "pause_requested": False}


def _cancel_children(drive: GenevaDrive, workflow: Workflow, reason: str | None) -> None:
    """Cancel the ongoing children and theirs, level by level: so parents are locked before children."""
    reason = reason or f"canceled with {workflow._label}"
    parents, columns = [workflow.id], {**_columns_of_canceled(drive, reason), "ongoing_children": 0}
    workflow._write(ongoing_children=0)
    ongoing = Workflow.select().where(Workflow.state.in_(ONGOING))
    while parents:
        next_parents: list[int] = []
        for batch in _locked_children(ongoing, parents):
            ids = [child.id for child in batch]
            next_parents += _parents_among(batch)
            to_claim = StepExecution.workflow.in_(ids) & StepExecution.state.in_(TO_CLAIM)
            StepExecution.update(_columns_of_dropped(drive, reason)).where(to_claim).execute()
            Workflow.update(columns).where(Workflow.id.in_(ids)).execute()
            for child in batch:
                before = child.state
                child.__data__.update(columns)
                drive._announce(child, before, CANCELED)
        parents = next_parents


def _parents_among(workflows: Iterable[Workflow]) -> list[int]:
    """The ids of those that ever had a child; the others need not be asked for children."""
    return [each.id for each in workflows if each.ongoing_children is not None]


def _locked_children(query: Any, parents: list[int]) -> Iterator[list[Any]]:
    """The children that a query selects, locked, in batches; the caller changes each so that it is selected no more."""
    for some in peewee.chunked(parents, MAX_LISTED):
        # Without a limit below the table's size, or in the order of the ids, MariaDB may read, and so lock, all of it.
        batch, is_full = Workflow._locking(query.where(Workflow.parent.in_(list(some))).limit(2000)), True
        while is_full and (children := sorted(batch.clone(), key=lambda child: child.id)):
            yield children
            is_full = len(children) == 2000


def _paused(drive: GenevaDrive, workflow: Workflow, active: Any, reason: str | None) -> None:
    if workflow.state == PERFORMING:
        workflow._write(pause_requested=True, reason=reason)  # obeyed by whoever records the running step
    else:
        workflow._write(state=PAUSED, transitioned_at=drive._now(), reason=reason)
        if active:
            active._write(queue=None)


def _skipped(drive: GenevaDrive, workflow: Workflow, active: StepExecution | None, reason: str | None) -> None:
    following, now = workflow._step_after(cast(str, workflow.current_step_name)), drive._now()
    ended = {**_columns_of_dropped(drive, reason), "state": SKIPPED, "outcome": "skipped"}
    WorkflowSignal._consume_given(workflow, workflow.current_step_name, now)
    if active:
        active._write(**ended)
    else:
        reached, number = StepExecution._newest(workflow).reached_at, workflow.execution_count + 1
        workflow._write(execution_count=number)
        begun = {"number": number, "step_name": workflow.current_step_name, "scheduled_for": now, "created_at": now}
        StepExecution._insert_row(StepExecution._new_values(workflow, {**begun, **ended, "reached_at": reached}))
    if following:
        _enter(drive, workflow, following._first(now))
    else:
        workflow._write(state=FINISHED, current_step_name=None, transitioned_at=now, reason=None)


def _resumed(drive: GenevaDrive, workflow: Workflow, active: StepExecution | None, reason: str | None) -> None:
    definition = workflow._definition(workflow.current_step_name)
    if active:
        waits_for = definition.wait_for if active.state == WAITING else active.waiting_for  # it may have been renamed
        begun_reason = reason or active.begun_reason
        active._write(reattempts=0, recoveries=0, waiting_for=waits_for, begun_reason=begun_reason)
        workflow._write(state=READY, transitioned_at=None, reason=None)
        if active.state == WAITING and not _must_wait(workflow, definition, active):
            _wake(drive, workflow, active)
        else:
            drive._dispatch.put_in_queue(workflow, active)
    else:
        newest = StepExecution._newest(workflow)
        # What goes on at its cursor does not wait for its signal anew.
        of_cursor = () if newest.cursor is None else ("cursor", "waits_since", "times_out_at")
        carried = {name: newest.__data__[name] for name in ("reached_at", "asks_wait", *of_cursor)}
        begins = {"step_name": definition.name, "scheduled_for": drive._now(), "begun_reason": reason}
        _enter(drive, workflow, {**begins, **carried})


def _moved(
    drive: GenevaDrive, workflow: Workflow, active: StepExecution | None, reason: str | None, step_name: str
) -> StepExecution:
    if workflow._definition(step_name).removed:
        raise StepNotDefinedError(workflow, step_name)
    if active and active.state == IN_PROGRESS:  # of one that was canceled
        raise InvalidStateError(workflow, "resume_at", "its last attempt is still in progress: wait for its end")
    _drop(drive, active)
    now = drive._now()
    begins = {"step_name": step_name, "scheduled_for": now, "reached_at": now, "begun_reason": reason}
    return _enter(drive, workflow, begins)


def _rescheduled(
    drive: GenevaDrive, workflow: Workflow, active: StepExecution | None, _: None, moment: datetime | None
) -> None:
    """Give what is scheduled another time, and what waits another limit; without a moment, those that are declared."""
    if active is None:
        raise InvalidStateError(workflow, "reschedule", "nothing is scheduled: resume() has the step run again")
    now = drive._now()
    if moment is None:
        changes = _as_declared(workflow._definition(active.step_name), active, now)
    elif active.state == WAITING:
        changes = {"times_out_at": max(moment, now)}
    else:
        changes = {"scheduled_for": max(moment, now), "asks_wait": None}
    drive._dispatch.put_in_queue(workflow, active, **changes)


def _as_declared(definition: StepDefinition, active: StepExecution, now: datetime) -> dict[str, Any]:
    """The time of an execution, and its limit, as its step has them by now."""
    first = definition._first(active.reached_at or active.created_at)
    due, asks_wait = max(first["scheduled_for"], now), first.get("asks_wait")
    since = active.waits_since or active.scheduled_for
    # The step does not wait for anything any more; or there is a wait before that, which is not over.
    is_plain = not definition._waits or (asks_wait and since > now)
    if active.state != WAITING or is_plain:
        limit = {"waits_since": None, "times_out_at": None} if asks_wait else {}  # it counts from the wait's end
        return {"state": SCHEDULED, "scheduled_for": due, "asks_wait": asks_wait, **limit}
    since = since if since <= now else due  # its wait is not over
    times_out_at = None if definition.timeout is None else max(since + definition.timeout, now)
    # What waits for something else by now runs, to see whether that is there.
    state = WAITING if active.waiting_for == definition.wait_for else SCHEDULED
    return {"state": state, "scheduled_for": since, "waits_since": since, "times_out_at": times_out_at}


def _drop(drive: GenevaDrive, active: StepExecution | None, reason: str | None = None) -> None:
    if active and active.state != IN_PROGRESS:  # which records by itself what came of it
        active._write(**_columns_of_dropped(drive, reason))


def _columns_of_dropped(drive: GenevaDrive, reason: str | None) -> dict[str, Any]:
    ended = {"state": CANCELED, "outcome": "canceled", "finished_at": drive._now(), "reason": reason}
    return {**ended, "signal_id": None, "queue": None}


def _enter(drive: GenevaDrive, workflow: Workflow, begins: dict[str, Any]) -> StepExecution:
    """Schedule a new execution, which begins so, and make the workflow stand at it."""
    step_name, number = begins["step_name"], workflow.execution_count + 1
    workflow._write(state=READY, current_step_name=step_name, execution_count=number, transitioned_at=None, reason=None)
    begins = {**begins, "number": number, "created_at": drive._now()}
    values = StepExecution._scheduled_values(workflow, READY, begins)
    execution = StepExecution._made(values, StepExecution._insert_row(values))
    drive._dispatch.send([execution])
    return cast(StepExecution, execution)


# ==== Executions: one row for each attempt at a step ==================================================================


class StepExecution(_Record):
    """One attempt at a step of a workflow: when it was due, when it ran, and what came of it."""

    id: peewee.Field[int] = peewee.BigAutoField()
    workflow: peewee.Field[Workflow] = peewee.ForeignKeyField(
        Workflow, backref="executions", on_delete="CASCADE", index=False
    )
    workflow_id: peewee.Field[int]
    #: 1, 2, 3, … within the workflow.
    number: peewee.Field[int] = peewee.IntegerField()
    step_name: peewee.Field[str] = _NameField()
    state: peewee.Field[str] = _NameField()
    outcome: peewee.Field[str | None] = _NameField(null=True)
    #: Why it ended as it did; why the workflow was resumed, if it began by that.
    reason: peewee.Field[str | None] = _LongTextField(null=True)
    begun_reason: peewee.Field[str | None] = _LongTextField(null=True)
    #: When the workflow came to the step: that of the first attempt at it.
    reached_at: peewee.Field[datetime | None] = _UtcField(null=True)
    #: Whether the step's computed wait is to be asked before its body.
    asks_wait: peewee.Field[bool | None] = peewee.BooleanField(null=True)
    scheduled_for: peewee.Field[datetime] = _UtcField()
    #: The queue that gives it out, with which priority, and when; null while nobody is to take it.
    queue: peewee.Field[str | None] = _NameField(null=True)
    priority: peewee.Field[int | None] = peewee.IntegerField(null=True)
    due_at: peewee.Field[datetime | None] = _UtcField(null=True)
    #: When a message for it was last sent, where its queue is a Huey of the application's.
    enqueued_at: peewee.Field[datetime | None] = _UtcField(null=True)
    started_at: peewee.Field[datetime | None] = _UtcField(null=True)
    heartbeat_at: peewee.Field[datetime | None] = _UtcField(null=True)
    #: The process that performs or performed it, as `_this_process()` names it.
    performed_by: peewee.Field[str | None] = _NameField(null=True)
    finished_at: peewee.Field[datetime | None] = _UtcField(null=True)
    #: Reattempts after errors, and recoveries after crashes, of this step so far.
    reattempts: peewee.Field[int] = peewee.IntegerField(default=0)
    recoveries: peewee.Field[int] = peewee.IntegerField(default=0)
    error_class_name: peewee.Field[str | None] = _NameField(null=True)
    error_message: peewee.Field[str | None] = _LongTextField(null=True)
    error_backtrace: peewee.Field[str | None] = _LongTextField(null=True)
    job_id: peewee.Field[str | None] = _NameField(null=True)
    created_at: peewee.Field[datetime] = _UtcField()
    #: The signal that it waits, or waited, for; null for children. From when, and until when: after that, `on_timeout`
    #: says what follows.
    waiting_for: peewee.Field[str | None] = _NameField(null=True)
    waits_since: peewee.Field[datetime | None] = _UtcField(null=True)
    times_out_at: peewee.Field[datetime | None] = _UtcField(null=True)
    #: The newest signal that it looked at and that was not for it; once it ended, the one that it was given.
    signal_id: peewee.Field[int | None] = peewee.BigIntegerField(null=True)
    #: How far a resumable step came, in this attempt or an earlier one: any JSON value.
    cursor: peewee.Field[Any] = _JsonField(null=True)

    class Meta:
        table_name = "geneva_drive_step_executions"

    def __repr__(self) -> str:
        what = f"attempt {self.number} of workflow {self.workflow_id} at {self.step_name}"
        return f"<StepExecution {self.id}: {what}, {self.outcome or self.state}>"

    @property
    def _due(self) -> datetime | None:
        """When it is to be performed; None if it waits for a signal or children without a limit."""
        return _due(self.__data__)

    def _overdue(self) -> timedelta:
        """For how long it has been due: since its time to wait for a signal was over, if it was."""
        now, moments = _drive()._now(), (self.scheduled_for, self.times_out_at)
        return now - max((each for each in moments if each and each <= now), default=now)

    def execute(self) -> bool:
        """Run this attempt in the calling process, whether it is due or not, and nothing after it.

        A computed wait is called, and its error is the step's, but its time is ignored.

        Where an event loop runs in the calling thread, what is asynchronous in it is run in a thread, on a connection
        of that thread's: it does not see what the caller's transaction has written, nor an in-memory database of
        SQLite, and on SQLite it cannot write as long as the caller's transaction does.

        :returns: True; or False, and nothing was done, if it is not scheduled any more, if it waits for a signal or
            children, or its workflow is not ready.
        :raises BaseException: the step's error, once its outcome is committed, if it paused or canceled the workflow.
        """
        return self._execute(heeds_wait=False)

    def _execute(self, heeds_wait: bool) -> bool:
        """Execute it; with `heeds_wait`, only to put it back if a computed wait is not over."""
        context = _own_context()
        attempt = context.run(_Attempt.claim, _drive(), self.id)
        if attempt is None:
            return False
        attempt.heeds_wait = heeds_wait
        try:
            context.run(attempt.run)
        finally:
            self._take_over(attempt.execution)
        return True

    @classmethod
    def _with_workflow(cls, execution_id: int) -> StepExecution | None:
        """The row and its workflow's, read together: as they are now, also in a transaction that has begun before."""
        blank = _Blank.value(cast(Any, cls.id), "id")
        built = _drive()._access.statement(cls._meta.database, "claim", lambda: cls._joined().where(cls.id == blank))
        values = built.execute({"id": execution_id}).fetchone()
        execution = cls._from_joined(values) if values else None
        if execution and _drive()._access.database.in_transaction():  # of an old snapshot: locks tell what is there
            workflow = _lock_behind_parent(execution.workflow_id, execution.workflow.parent_id)
            execution = workflow and cls._lock(cls.id == execution_id)
            if execution:
                execution.__rel__["workflow"] = workflow
        return execution

    @classmethod
    def _joined(cls) -> Any:
        """A query of executions and of their workflows, for `_from_joined()`."""
        query = cls.select(*cls._meta.sorted_fields, *Workflow._meta.sorted_fields)
        return query.join(Workflow, _drive()._access.dialect.in_order)

    @classmethod
    def _from_joined(cls, values: Sequence[Any]) -> StepExecution:
        width = len(cls._columns())
        execution = cls._from_columns(values[:width])
        execution.__rel__["workflow"] = Workflow._from_columns(values[width:])
        return cast(StepExecution, execution)

    @classmethod
    def _newest(cls, workflow: Workflow) -> Any:
        """The newest execution of a workflow, locked, as the workflow is."""
        return cls._lock((cls.number == workflow.execution_count) & (cls.workflow == workflow.id))

    @classmethod
    def _new_values(cls, workflow: Workflow, begins: dict[str, Any]) -> dict[str, Any]:
        """The columns of a new execution."""
        return {**cls._meta.get_default_dict(), **begins, "workflow": workflow.id}

    @classmethod
    def _scheduled_values(cls, workflow: Workflow, workflow_state: str, begins: dict[str, Any]) -> dict[str, Any]:
        """The columns of one that is to be performed, or to wait; in its queue, if its workflow is to be ready."""
        values = cls._new_values(workflow, begins)
        values.update(_beginning(workflow, values))
        return {**values, **_place_in_queue(workflow, values, workflow_state, values["created_at"])}


#: What joins a workflow with its newest execution, by an index.
IS_NEWEST: Any = (StepExecution.workflow == Workflow.id) & (StepExecution.number == Workflow.execution_count)


def _due(values: Mapping[str, Any]) -> datetime | None:
    """When an execution with these columns is to be performed; None if it waits without a limit."""
    return cast("datetime | None", values["times_out_at" if values["state"] == WAITING else "scheduled_for"])


def _place_in_queue(
    workflow: Workflow,
    values: Mapping[str, Any],
    workflow_state: str,
    now: datetime,
    not_before: datetime = EPOCH,
    route: _Route | None = None,
) -> dict[str, Any]:
    """The columns by which an execution is given out: this is where it is decided which are.

    What is scheduled, or waits with a limit, is in a queue as long as its workflow is ready, and nothing else is.

    :param values: the execution's columns.
    :param route: the queue and priority, where the class is not to be asked.
    """
    due = _due(values)
    if workflow_state != READY or values["state"] not in TO_CLAIM or due is None:
        return {"queue": None}
    queue, priority = route or _drive()._dispatch.route(workflow, values["step_name"])
    place = {"queue": queue, "priority": priority, "due_at": max(due, not_before), "job_id": _job_id(now)}
    return {**place, "enqueued_at": now}


class WorkflowSignal(_Record):
    """Something that happened outside, told to a workflow; kept until the step that waits for it ended."""

    id: peewee.Field[int] = peewee.BigAutoField()
    workflow: peewee.Field[Workflow] = peewee.ForeignKeyField(
        Workflow, backref="signals", on_delete="CASCADE", index=False
    )
    workflow_id: peewee.Field[int]
    name: peewee.Field[str] = _NameField()
    payload: peewee.Field[Any] = _JsonField(null=True)
    idempotency_key: peewee.Field[str | None] = _ExactField(null=True)
    created_at: peewee.Field[datetime] = _UtcField()
    consumed_at: peewee.Field[datetime | None] = _UtcField(null=True)

    class Meta:
        table_name = "geneva_drive_signals"

    def __repr__(self) -> str:
        what = "consumed" if self.consumed_at else "pending"
        return f"<WorkflowSignal {self.id}: {self.name} for workflow {self.workflow_id}, {what}>"

    @classmethod
    def _pending(cls, workflow: Workflow, definition: StepDefinition, after: int | None) -> tuple[Any, ...]:
        """The condition for what a step may be given, from the first that came after signal `after`."""
        name = cls.name == definition.wait_for
        return cls.workflow == workflow.id, name, cls.consumed_at.is_null(), cls.id > (after or 0)

    @classmethod
    def _consume_given(cls, workflow: Workflow, step_name: str | None, now: datetime) -> None:
        """Consume what the attempts at a step were given, or the next step that waits for its like would get it."""
        attempts = (StepExecution.workflow == workflow.id) & (StepExecution.step_name == step_name)
        given = StepExecution.select(StepExecution.signal_id).where(attempts & StepExecution.finished_at.is_null(False))
        pending = (cls.workflow == workflow.id) & cls.consumed_at.is_null()
        cls.update(consumed_at=now).where(pending & cls.id.in_(given)).execute()


MODELS = (Workflow, StepExecution, WorkflowSignal)


# ==== The executor: one attempt, from claim to record =================================================================


@dataclass(frozen=True)
class _Verdict:
    """How an attempt ended: a key of EFFECTS, and what goes with it."""

    cause: str
    action: str
    wait: timedelta = NO_WAIT
    error: BaseException | None = None
    surfaces: bool = False  # whether the error is raised once the outcome is committed
    reason: str | None = None  # for people
    rewind: bool = False  # whether the next attempt at a resumable step is to begin at the start
    children: bool = False  # whether the children are to be canceled too
    until: datetime | None = None  # when a computed wait is over


#: A transactional step's computed wait is over. It was called outside of a transaction; now the step's may begin.
_GO_ON = _Verdict("step", "go on")


def _timed_out(workflow: Workflow, definition: StepDefinition, execution: StepExecution, limit: datetime) -> _Verdict:
    """What follows when nothing came of what a step waited for."""
    waited = max(limit - (execution.waits_since or execution.scheduled_for), NO_WAIT)
    kind = ChildrenTimeoutError if definition.wait_for_children else SignalTimeoutError
    what = "children were ongoing for" if definition.wait_for_children else f"no signal {definition.wait_for} within"
    error, reason = kind(workflow, definition, waited), f"{what} {_span(waited)}"
    return _Verdict("timeout", definition.on_timeout, error=error, reason=reason)


class _Attempt:
    """An execution that this process has claimed; `queue` is the one whose worker performs it, if a worker does."""

    def __init__(self, drive: GenevaDrive, execution: StepExecution, queue: str | None = None) -> None:
        self.drive, self.workflow, self.execution, self.queue = drive, execution.workflow, execution, queue
        self.is_run_on, self.is_begun, self.heeds_wait = False, False, True
        self.verdict: _Verdict | None = None  # how it ended, once that is known
        self.signal: WorkflowSignal | None = None  # the one that the body is given
        self.claimed, self.patience_ends = time.monotonic(), math.inf  # the patience to record the outcome
        self.is_draining: Callable[[], bool] = lambda: False
        self.around: dict[Database, tuple[Any, int]] = {}  # the transactions around the user code under way
        self.leaving: BaseException | None = None  # what that raised by calling a flow control method
        self.must_stay = False  # in this thread, on its connection
        self.progress = _Progress(self)

    # -- claiming ---------------------------------------------------------------------------------------------------

    @classmethod
    def take(cls, drive: GenevaDrive, queue: str, priorities: tuple[int, ...]) -> _Attempt | None:
        """Claim what is due first in a queue of the drive's own, with one of these priorities; None if nothing is."""
        while execution := drive._access.dialect.take(drive, queue, priorities):
            if attempt := cls(drive, execution, queue).accepted():
                _heartbeat.add(attempt)  # it has to outlive Huey's hooks
                return attempt
        return None

    @classmethod
    def claim(cls, drive: GenevaDrive, execution_id: int, queue: str | None = None) -> _Attempt | None:
        """Claim a scheduled execution: of several who try, at the same time or later, one gets it.

        :param queue: the one whose message asks for it: what is not due yet, or not defined here, is queued again.
        :returns: None if it is not to be run, or not by us.
        """
        for _ in range(TRANSACTION_TRIES):
            execution = cls._claimable(drive, execution_id, queue)
            # The message is gone from the queue: without a claim, the execution waits until it is overdue.
            if execution is None or _claim(drive, execution):
                return execution and cls(drive, execution, queue).accepted()
            # Claimed meanwhile, or changed in what does not matter: its context, most likely.
        return None

    @classmethod
    def _claimable(cls, drive: GenevaDrive, execution_id: int, queue: str | None) -> StepExecution | None:
        """The execution with its workflow, if it is to be run, and by us."""
        execution = drive._access.repeat(lambda: StepExecution._with_workflow(execution_id), PATIENCE_SECONDS)
        if execution is None or execution.state not in TO_CLAIM or execution.workflow.state != READY:
            return None
        problem, due = execution.workflow._undefined(), execution._due
        if problem and not queue:
            logger.error("execution %s stays scheduled: %s", execution_id, problem)
            return None
        if due is None or due > drive._now():
            if queue and due:
                drive._dispatch.send([execution])
            if queue or execution.state == WAITING:
                return None
        return execution

    def accepted(self, is_draining: bool = False) -> _Attempt | None:
        """Itself; None where its step is not defined here, as in a deploy, for which other code runs beside ours.

        :param is_draining: that its consumer was about to stop as it was claimed along with the end of a step.
        """
        workflow, execution, queue = self.workflow, self.execution, self.queue
        problem = "its consumer drains" if is_draining else workflow._undefined()
        if queue and not problem and workflow._find(execution.step_name) is None:
            overdue = execution._overdue()
            # In immediate mode there is no other consumer of the queue, and what is scheduled never comes.
            if overdue < self.drive.undefined_step_grace and not self.drive.queues[queue].immediate:
                problem = str(StepNotDefinedError(workflow, execution.step_name))
        if problem:
            self.put_off(problem)
            return None
        self.drive._announce(workflow, READY, PERFORMING)
        return self

    def put_off(self, problem: str) -> None:
        """Give the claim back, for a little later, in the same queue: the longer it has been due, the later."""
        shortest, longest = PUT_OFF_FOR
        delay = min(max(self.execution._overdue(), shortest), longest)
        _heartbeat.remove(self)
        with contextlib.suppress(_ClaimLost):
            route = cast(str, self.queue), self.execution.priority or 0  # its class, which knows, is not here
            _Recording(self).put_back({"state": SCHEDULED}, self.drive._now() + delay, route)
        note = "execution %s is put off for %s: %s", self.execution.id, _span(delay), problem
        self.drive._access.after_commit(lambda: logger.warning(*note))

    # -- one attempt ------------------------------------------------------------------------------------------------

    def run(
        self, may_run_on: Callable[[], bool] = lambda: False, is_draining: Callable[[], bool] = lambda: False
    ) -> _Attempt | None:
        """Perform the step and record what came of it.

        :param may_run_on: asked as the outcome is recorded, whether to claim the next step in the same commit.
        :param is_draining: asked at a checkpoint, whether to leave the rest to another consumer.
        :returns: the attempt at the next step, if it was claimed.
        :raises BaseException: the step's error, if it is to leave the task.
        """
        following, recorded, self.is_begun = None, True, True
        self.workflow._attempt, self.is_draining = self, is_draining
        _heartbeat.add(self)
        try:
            following = self._perform_and_record(may_run_on)
            if following:
                _heartbeat.add(following)  # it is claimed, and has to outlive the hooks below
        except _ClaimLost:
            recorded = False
            # Or the connection was lost at the commit, and the second try found that the first one was committed.
            self.workflow.logger.warning("the claim was lost to recovery; nothing more is recorded of this attempt")
        finally:
            self.workflow._attempt = self.leaving = None
            _heartbeat.remove(self)
        if recorded:
            self._tell_of_end(following)
        if self.verdict and self.verdict.surfaces:
            error, step_name, state = cast(Any, self.verdict.error), self.execution.step_name, self.workflow.state
            with contextlib.suppress(Exception):  # Python 3.10 knows no notes, a frozen dataclass takes none
                note = f"in the step {step_name} of {self.workflow._label}, which is {state} now"
                error.add_note(note)  # error trackers show it with the traceback
            raise error
        return following

    def _tell_of_end(self, following: _Attempt | None) -> None:
        try:
            step_finished.send(self.workflow, execution=self.execution)
            result: Any = cast(Any, self.workflow).after_step_execution(self.execution)
            _finished(result, f"{self.workflow.type}.after_step_execution()")
        except BaseException as error:
            if isinstance(error, SystemExit) or _ends_process(error):
                if following:  # which nobody performs now: without a heartbeat it is recovered
                    _heartbeat.remove(following)
                raise
            self.workflow.logger.exception("after_step_execution failed")

    def _overtaken(self) -> _Verdict | None:
        """What was decided about the workflow between the claim and now, in a run-on, where there was time for it.

        Between two of its steps the first one's hooks and receivers run: they may take long, or cancel or pause the
        workflow. Costs nothing unless they could.
        """
        if not self.is_run_on or not (time.monotonic() - self.claimed > 1 or self.has_hooks()):
            return None
        execution = self.drive._access.repeat(lambda: StepExecution._with_workflow(self.execution.id))
        if execution is None or execution.state != IN_PROGRESS:
            raise _ClaimLost
        reason = execution.workflow.reason
        if execution.workflow.state == CANCELED:
            return _Verdict("step", "cancel", reason=reason)
        return _Verdict("step", "pause", reason=reason) if execution.workflow.pause_requested else None

    def has_hooks(self) -> bool:
        """Whether user code is called once the outcome is committed."""
        has_own = type(self.workflow).after_step_execution is not Workflow.after_step_execution
        return has_own or bool(step_finished._receiver_list)

    def _perform_and_record(self, may_run_on: Callable[[], bool]) -> _Attempt | None:
        if overtaken := self._overtaken():
            return self._record(overtaken)
        step_started.send(self.workflow, execution=self.execution)
        try:
            definition = self.workflow._definition(self.execution.step_name)
        except StepNotDefinedError as error:  # no policy has a say in this
            reason = f"no step called {self.execution.step_name}"
            return self._record(_Verdict("error", "pause", error=error, surfaces=True, reason=reason))
        access = self.drive._access
        access.open()  # a receiver may have closed it
        is_ours = definition.transactional and not access.database.in_transaction()
        for tries in range(1, TRANSACTION_TRIES + 1):
            try:
                asks = self.execution.asks_wait or not definition.transactional
                verdict = self._perform(definition) if asks else _GO_ON
                if verdict is _GO_ON:
                    with access.begin():
                        return self._record(self._perform(definition), may_run_on)
            except _ClaimLost:
                raise
            except BaseException as error:
                if is_ours and tries < TRANSACTION_TRIES and access.is_transient(error):
                    _give_way(tries)
                    self._start_over()
                    continue
                if definition.transactional:  # the context is rolled back with the body's other writes
                    self.workflow.__data__["context"] = _Context(self.workflow.context.read)
                verdict = self._judge(definition, error)
            break
        return self._record(verdict, may_run_on)

    def _start_over(self) -> None:
        """A deadlock has rolled back a transactional step: perform it again, with rows that are read again."""
        self.workflow._attempt = self.signal = None
        self.workflow = self.drive._access.repeat(lambda: Workflow.get_by_id(self.workflow.id))
        self.workflow.__data__["current_step_name"] = self.execution.step_name  # one that was canceled stands at none
        self.workflow._attempt = self

    # -- performing -------------------------------------------------------------------------------------------------

    def _perform(self, definition: StepDefinition) -> _Verdict:
        """Run the step; raises whatever its body raised."""
        database = self.drive._access.database
        if not database.in_transaction():
            return self._perform_checked(definition)
        # In a transaction of the caller's, a test's most likely: an error of the database would doom all of it on
        # PostgreSQL. The savepoint is released after other errors: what the body wrote before them stays, as it does
        # where each statement commits by itself.
        failure: BaseException | None = None
        try:
            with database.atomic():
                try:
                    return self._perform_checked(definition)
                except BaseException as error:
                    failure = error
        except peewee.DatabaseError as error:
            failure = failure or error
        raise cast(BaseException, failure)

    def _perform_checked(self, definition: StepDefinition) -> _Verdict:
        self._begin_user_code(definition.transactional)
        depth = self.depth_around(self.drive._access.database)
        try:
            verdict = self._flow(definition)
        finally:
            left_open = self.drive._access.roll_back_to(depth)
        if left_open:
            raise TransactionLeftOpenError(f"the step {self.execution.step_name}")
        if self.workflow.context.is_changed():
            _dump_object(self.workflow.context)  # an error of the step, if something cannot be kept
        return verdict

    def _flow(self, definition: StepDefinition) -> _Verdict:
        """The order of one attempt; errors are the caller's."""
        workflow, execution = self.workflow, self.execution
        try:
            if workflow.hero is None and not workflow.may_proceed_without_hero:
                return _Verdict("step", "cancel", reason="the hero is gone")
            for condition in workflow._blueprint.cancel_ifs:
                if self.call(getattr(workflow, condition)):
                    return _Verdict("step", "cancel", reason=condition)
            if execution.asks_wait:
                until = self._asked_wait(definition)
                if until > self.drive._now() and self.heeds_wait:
                    return _Verdict("step", "wait", until=until)
                self._end_wait()
                if definition.transactional:
                    workflow.__dict__.pop("_hero", None)  # in the transaction it is read anew
                    return _GO_ON
            if self.ask(definition.skip_if):
                return _Verdict("step", "skip", reason="the step was removed" if definition.removed else None)
            children_go_on = definition.wait_for_children and _has_ongoing_children(self.drive, workflow)
            if children_go_on or (definition.wait_for and not self._find_signal(definition)):
                limit = execution.times_out_at
                if limit is None or limit > self.drive._now():
                    return _Verdict("step", "wait")
                if definition.on_timeout != "run":
                    return _timed_out(workflow, definition, execution, limit)
            self.call(workflow.before_step_execution, execution)
            with self.call(workflow.around_step_execution, execution):
                self.call(getattr(workflow, definition.body))
            self._leave_after_all()
        except BaseException as error:
            control = _flow_control_in(error)
            if control is None:
                raise
            return _Verdict("step", control.action, control.wait, **control.details)
        return _Verdict("step", "return")

    def _begin_user_code(self, must_stay: bool = False) -> None:
        self.drive._access.open()  # where autoconnect is off, what ran before may have closed it
        databases, self.must_stay = self.drive._access.databases(), must_stay
        self.leaving, self.around = None, {each: (each._state.transactions, _depth(each)) for each in databases}

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call user code: a condition, a hook, the body, a handler. Returns what it came to."""
        self._leave_after_all()  # what surrounds a body may have swallowed a call before it
        result = function(*arguments)
        if type(result) not in PLAIN_RESULTS:
            result = _finished(result, f"{self.where}: {_name_of(function)}()", self.must_stay)
        self.drive._access.open()
        self._leave_after_all()
        return result

    def leave(self, control: _FlowControl) -> NoReturn:
        """End the user code that calls a flow control method; one that was refused remains its error."""
        if not isinstance(self.leaving, FlowControlInTransactionError):
            self.leaving = control
            if any(_depth(each) > self.depth_around(each) for each in self.drive._access.databases()):
                self.leaving = FlowControlInTransactionError(self.workflow, control.action, self.execution.step_name)
        raise self.leaving

    def _leave_after_all(self) -> None:
        """Obey a flow control method whose exception user code has swallowed, with a bare `except:` most likely."""
        if self.leaving is not None:
            problem = "%r was swallowed, and is obeyed all the same: let it through, by `except Exception:`"
            self.workflow.logger.warning(problem, self.leaving)
            raise self.leaving

    def depth_around(self, database: Database) -> int:
        """The depth of transactions at which the user code began; another thread or connection began at none."""
        transactions, depth = self.around.get(database, (None, 0))
        return depth if transactions is database._state.transactions else 0

    @property
    def where(self) -> str:
        """How to call the step in a message."""
        return f"{self.workflow.type}.{self.execution.step_name}"

    def _find_signal(self, definition: StepDefinition) -> bool:
        """Give the workflow the first signal that is for the step, and tell whether there is one."""
        matching: Any = definition.matching
        page = 1 if matching is None else 100
        if isinstance(matching, str):
            matching = getattr(self.workflow, matching)
        while True:
            pending = WorkflowSignal._pending(self.workflow, definition, self.execution.signal_id)
            query = WorkflowSignal.select().where(*pending).order_by(WorkflowSignal.id).limit(page)
            found = self.drive._access.repeat(functools.partial(list[Any], query))
            for each in found:
                if matching is None or self.call(matching, each.payload):
                    self.signal, self.workflow.signal_payload = each, each.payload
                    return True
                self.execution.signal_id = each.id
            if len(found) < page:
                return False

    def ask(self, question: Any, *about: Any) -> Any:
        """What a condition, a wait or a handler says: a callable of the workflow, a method's name, or the answer."""
        if isinstance(question, str):
            return self.call(getattr(self.workflow, question), *about)
        return self.call(question, self.workflow, *about) if callable(question) else question

    def _asked_wait(self, definition: StepDefinition) -> datetime:
        """When the step's wait is over, as the workflow's code says now."""
        wait, reached = self.ask(definition.wait), self.execution.reached_at or self.execution.created_at
        what = f"{self.where}: what its wait returns, if it is not None,"
        return _moment(NO_WAIT if wait is None else wait, reached, what)

    def _end_wait(self) -> None:
        """Keep that the wait is over: once the body has begun, no later attempt is to ask again."""
        over, mine = {"asks_wait": None}, {"id": self.execution.id, "state": IN_PROGRESS}
        if not self.drive._access.transact(lambda: StepExecution._update_row(over, **mine)):
            raise _ClaimLost  # another one may be at the body by now
        self.execution.__data__.update(over)

    # -- judging ----------------------------------------------------------------------------------------------------

    def _judge(self, definition: StepDefinition, error: BaseException) -> _Verdict:
        """What an error that left the body leads to."""
        access = self.drive._access
        reason = _described(error)
        if _ends_process(error) or access.is_lost(error):  # which is the server's fault
            return replace(self.drive._recovery.death(self.execution), error=error, surfaces=True, reason=reason)
        self._begin_user_code()
        if isinstance(error, peewee.PeeweeException):
            for each in access.databases():  # the hero's own among them, which the next attempt needs
                access.drop_if_dead(each, _is_gone)
        reattempts = self.execution.reattempts
        policy = self.workflow._blueprint.policy_for(definition, error)
        decision = policy._decide(self.workflow, error, reattempts)
        action = decision.action
        if action == "reattempt" and policy.max_reattempts is not None and reattempts >= policy.max_reattempts:
            action = policy.terminal_action
        is_reported = policy.report == "always" or (policy.report == "terminal_only" and action in ("pause", "cancel"))
        surfaces = is_reported or isinstance(error, SystemExit)
        details = {**decision.details, "reason": decision.details.get("reason") or reason}
        return _Verdict("error", action, decision.wait, error, surfaces, **details)

    def _record(self, verdict: _Verdict, may_run_on: Callable[[], bool] = lambda: False) -> _Attempt | None:
        """Commit the outcome and what follows it: the next execution, claimed already if it may run on.

        Raises _ClaimLost, and writes nothing, if the execution is not ours any more.
        """
        self.verdict, run_on, access = verdict, not verdict.surfaces and may_run_on(), self.drive._access
        access.open()  # where autoconnect is off, the body may have closed it
        following = access.escaping(
            lambda charset: _Recording(self, run_on, charset).end(verdict),
            lambda: "".join([verdict.reason or "", *_error_columns(verdict.error).values()]),
        )
        self.patience_ends = math.inf
        if verdict.reason:
            access.after_commit(lambda: self.workflow.logger.info("%s: %s", self.execution.outcome, verdict.reason))
        return following


# ==== Recording: what came of an attempt, and what follows ============================================================


class _Move(NamedTuple):
    """A workflow's move: its changes, if the fence holds; its execution's; the columns of the one that follows, if any.

    A dialect carries it out, all or nothing.
    """

    changes: dict[str, Any]
    fence: dict[str, Any]
    columns: dict[str, Any]
    execution: dict[str, Any]  # what finds its row
    begins: _Json = None
    is_patient: bool = True  # whether to wait for locks, where the database can be told not to
    parent: int | None = None  # the one that is to be told of the workflow's end
    takes: _Places | None = None  # where what is due first, of any workflow, is to be claimed along


class _Recording:
    """Writes what came of an attempt: as it is planned, under the fence; or, if others said something, amended."""

    def __init__(self, attempt: _Attempt, run_on: bool = False, charset: str = "utf-8") -> None:
        self.attempt, self.run_on, self.charset = attempt, run_on, charset
        self.drive, self.workflow, self.execution = attempt.drive, attempt.workflow, attempt.execution
        self.access, self.now = self.drive._access, self.drive._now()
        self.changes: dict[str, Any] = {}  # of the workflow
        self.columns: dict[str, Any] = {}  # of the execution
        self.follows: _Json = None  # what the next execution is made of
        self.waits_for: StepDefinition | None = None  # the step whose execution is put back to wait
        self.not_before = EPOCH  # for one that is put back
        self.route: _Route | None = None  # likewise: the class's, unless it is given
        self.consumes = False  # whether the signals that the step was given are done with
        self.cancels_children = False

    def end(self, verdict: _Verdict) -> _Attempt | None:
        """Record the outcome; returns the attempt that follows, if it is claimed.

        :raises _ClaimLost: if the execution is not ours any more; nothing is written.
        """
        if verdict.action == "wait":
            return self._wait(verdict.until)
        state, outcome, then = EFFECTS[verdict.cause, verdict.action]
        signal = self.attempt.signal
        self.columns = {"state": state, "outcome": outcome, "finished_at": self.now, "signal_id": signal and signal.id}
        self.columns.update(_error_columns(verdict.error, self.charset))
        self.follows = self._what_follows(verdict, then)
        self.consumes = then in ("advance", "finish") and bool(signal or self.execution.waiting_for)
        self.cancels_children = verdict.children and then == "cancel"
        workflow_state = WORKFLOW_STATE_AFTER[then] if self.follows or then != "advance" else FINISHED
        if self.follows and self.run_on and self._runs_on(self.follows):
            workflow_state = PERFORMING
        self.changes = {
            "state": workflow_state,
            "current_step_name": self.follows["step_name"] if self.follows else None,
            "execution_count": self.execution.number + bool(self.follows),
            "transitioned_at": None if workflow_state in (READY, PERFORMING) else self.now,
        }
        if then == "pause":
            self.changes["current_step_name"] = self.execution.step_name
        if verdict.reason:
            self.columns["reason"] = reason = _storable(verdict.reason, self.charset)
            if then in ("pause", "cancel", "finish"):
                self.changes["reason"] = reason
        if self.workflow.context.is_changed():
            self.changes["context"] = self._merged_context(self.workflow.context.read)
        return self._commit()

    def put_back(
        self, columns: dict[str, Any], not_before: datetime = EPOCH, route: _Route | None = None
    ) -> _Attempt | None:
        """Give the claim back: the execution is in its queue again, with these columns. Returns as `end()` does.

        :raises _ClaimLost: if the execution is not ours any more; nothing is written.
        """
        self.changes, self.not_before, self.route = {"state": READY}, not_before, route
        self.columns = {"started_at": None, "heartbeat_at": None, "performed_by": None, **columns}
        return self._commit()

    def _wait(self, until: datetime | None) -> _Attempt | None:
        """Put the execution back: until then; or as what it waits for was not there, but may have come meanwhile."""
        if until is not None:
            return self.put_back({"state": SCHEDULED, "scheduled_for": until})
        definition, limit = self.workflow._definition(self.execution.step_name), self.execution.times_out_at
        since = self.execution.waits_since or self.now  # it may have begun when the step did not wait yet
        if limit is None and definition.timeout is not None:
            limit = self.now + definition.timeout
        self.waits_for = definition
        waits: dict[str, Any] = {"state": WAITING, "waiting_for": definition.wait_for, "times_out_at": limit}
        return self.put_back({**waits, "waits_since": since, "signal_id": self.execution.signal_id})

    # -- planning ---------------------------------------------------------------------------------------------------

    def _what_follows(self, verdict: _Verdict, then: str) -> dict[str, Any] | None:
        """The columns of the next execution that the decision makes, or None."""
        execution, progress = self.execution, self.attempt.progress
        if then == "advance":
            definition = self.workflow._step_after(execution.step_name)
            return definition._first(self.now) if definition else None
        if then == "repeat":
            cursor = progress.cursor() if progress.has_checkpoint else execution.cursor
            return {
                "asks_wait": execution.asks_wait,
                "reached_at": execution.reached_at,
                "waits_since": execution.waits_since,
                "step_name": execution.step_name,
                "scheduled_for": self.now + verdict.wait,
                "reattempts": execution.reattempts + (verdict.cause == "error"),
                "recoveries": execution.recoveries + (verdict.cause == "death"),
                "times_out_at": execution.times_out_at,
                "cursor": None if verdict.rewind else cursor,
            }
        return None

    def _runs_on(self, follows: dict[str, Any]) -> bool:
        """Whether the next execution is due now, on the queue and with the priority that we are on."""
        # Whether what a step waits for is there is known under the lock only, after this was decided.
        if follows["scheduled_for"] > self.now or self._has_to_wait(follows):
            return False
        here, next_one = (self.workflow._find(each) for each in (self.execution.step_name, follows["step_name"]))
        if here and next_one and here.options == next_one.options:
            return True
        route = functools.partial(self.drive._dispatch.route, self.workflow)
        return route(follows["step_name"]) == route(self.execution.step_name)

    def _has_to_wait(self, follows: dict[str, Any]) -> bool:
        """Whether the step that follows is one that waits for a signal or for children."""
        definition = self.workflow._find(follows["step_name"])
        return definition is not None and definition._waits

    def _merged_context(self, text: str) -> _Context:
        """A context, by the changes that the attempt made in its own."""
        merged, misfits = self.workflow.context.onto(text)
        if misfits:
            self.workflow.logger.warning("of the context, what is not JSON or too long was not kept: %s", misfits)
        return merged

    # -- committing -------------------------------------------------------------------------------------------------

    def _commit(self) -> _Attempt | None:
        # As long as the claim is ours: then another process may perform the step, and this one's outcome is void.
        patience = max(PATIENCE_SECONDS, self.drive.stuck_in_progress_threshold.total_seconds())
        self.attempt.patience_ends = time.monotonic() + patience
        written = None if self._needs_lock() else self._write_as_planned(patience)
        return self._apply(written or self.access.transact(self._write_amended, patience))

    def _needs_lock(self) -> bool:
        """Whether what is to be written is known under the lock alone, or a message is to be sent along with it."""
        is_about_signals = self.waits_for or self.consumes or (self.follows and self._has_to_wait(self.follows))
        return bool(is_about_signals) or self.cancels_children or self.drive._dispatch.has_shared

    def _parent_to_tell(self) -> int | None:
        """The id of the parent, if the workflow has one and comes to its end."""
        return self.workflow.parent_id if self.changes["state"] in OVER else None

    def _write_as_planned(self, patience: float) -> _Written | None:
        """In one move, as most outcomes of most steps are; None, and nothing is written, if the fence does not hold."""
        state = self.changes["state"]
        columns, begins = self._placed(self.columns, state), self._next(state)
        found, parent = {"id": self.execution.id}, self._parent_to_tell()
        takes = None if parent or self._is_followed(begins) else self._takes()
        move = _Move(self.changes, self._fence(), columns, found, begins, parent=parent, takes=takes)
        moved = self.access.move(move, patience)
        return None if moved is None else _Written(self.changes, columns, begins, moved[0], taken=moved[1])

    def _is_followed(self, begins: _Json) -> bool:
        """Whether the workflow's own next execution is claimed, or due: it may come before those of others."""
        return begins is not None and (begins["queue"] is None or begins["due_at"] <= self.now)

    def _takes(self) -> _Places | None:
        """Where to claim what is due next, of any workflow, in the commit that ends this step; None: nowhere.

        So it is where hooks or receivers are called before it could begin: other workers can begin it at once.
        """
        is_watched = self.attempt.has_hooks() or workflow_transitioned._receiver_list
        if not self.run_on or is_watched or self.access.database.in_transaction():
            return None
        huey = self.drive.queues.get(self.attempt.queue or "")
        return huey.to_take() if isinstance(huey, _OwnHuey) and self.access.dialect.takes_along() else None

    def _fence(self) -> dict[str, Any]:
        """What finds the workflow's row, unless others said something, or wrote what is to be read, meanwhile."""
        fence = {**_fence(self.workflow, self.execution, PERFORMING), "pause_requested": False}
        as_read = self.workflow._as_read()
        if self.changes["state"] == PERFORMING:
            fence.update(as_read)
        elif "context" in self.changes:
            fence["context"] = as_read["context"]
        if parent := self._parent_to_tell():
            fence["parent"] = parent  # it may have been deleted, and its id used again
        return fence

    def _write_amended(self) -> _Written:
        """Others paused or canceled the workflow, wrote its context or took the claim; or there is more to see to."""
        row = self._locked_row()
        before, changes, columns = row.state, dict(self.changes), self.columns
        if before == CANCELED:
            for name in ("state", "current_step_name", "execution_count", "transitioned_at", "reason"):
                changes[name] = row.__data__[name]
            if "outcome" not in columns:  # it was to be put back
                columns = _columns_of_dropped(self.drive, row.reason)
        elif row.pause_requested:
            changes["pause_requested"] = False
            if self.follows or "outcome" not in columns:
                changes.update(state=PAUSED, transitioned_at=self.now)
            changes["reason"] = changes.get("reason") or (row.reason if changes["state"] == PAUSED else None)
        if "context" in changes:
            changes["context"] = self._merged_context(row.context.read)
        if self.waits_for and changes["state"] == READY and not _must_wait(row, self.waits_for, self.execution):
            columns = {**columns, "state": SCHEDULED}
        columns = self._placed(columns, changes["state"])
        row._write(**changes)
        StepExecution._update_row(columns, id=self.execution.id)
        if self.cancels_children:
            _cancel_children(self.drive, row, changes.get("reason"))
        if self.consumes:  # before it is looked whether there is one for the next step
            WorkflowSignal._consume_given(row, self.execution.step_name, self.now)
        begins = None if before == CANCELED else self._next(changes["state"])
        written = _Written(changes, columns, begins, StepExecution._insert_row(begins) if begins else 0, row, before)
        self._send(written, along=True)
        return written

    def _locked_row(self) -> Workflow:
        """The workflow's row, locked, if this execution is its newest still, and ours; else a _ClaimLost."""
        row = _lock_behind_parent(self.workflow.id, self._parent_to_tell())
        execution = StepExecution._lock(StepExecution.id == self.execution.id)
        newest = row is not None and row.execution_count == self.execution.number
        if not newest or execution is None or execution.state != IN_PROGRESS:
            raise _ClaimLost
        return cast(Workflow, row)

    def _placed(self, columns: dict[str, Any], workflow_state: str) -> dict[str, Any]:
        """The execution's columns, with its place in the queue if it is put back."""
        if "outcome" in columns:
            return columns
        values = {**self.execution.__data__, **columns}
        place = _place_in_queue(self.workflow, values, workflow_state, self.now, self.not_before, self.route)
        return {**columns, **place}

    def _next(self, workflow_state: str) -> _Json:
        """The columns of the next execution, if any, in a workflow of this state: claimed, in its queue, or neither."""
        if self.follows is None:
            return None
        begins = {**self.follows, "number": self.execution.number + 1, "created_at": self.now}
        if workflow_state == PERFORMING:
            begins.update(_claim_columns(self.now), job_id=self.execution.job_id)
            return StepExecution._new_values(self.workflow, begins)
        return StepExecution._scheduled_values(self.workflow, workflow_state, begins)

    # -- what follows -----------------------------------------------------------------------------------------------

    def _apply(self, written: _Written) -> _Attempt | None:
        """Have the instances show what was written, and tell of it; returns the attempt that follows, if claimed."""
        self.workflow.__data__.update(written.changes)
        self.execution.__data__.update(written.columns)
        self.drive._announce(self.workflow, written.before, self.workflow.state)
        self._send(written, along=False)
        if written.taken:
            return _Attempt(self.drive, written.taken, self.attempt.queue)
        if written.begins is None or written.begins["state"] != IN_PROGRESS:
            return None
        # What others may have written to meanwhile is as they left it; and what the body did to its values is not seen.
        seen = written.row or self.workflow
        options = Workflow.options.python_value(seen._as_read()["options"])
        row = {**self.workflow.__data__, "context": _Context(seen.context.read), "options": options}
        execution = StepExecution._made(written.begins, written.following_id)
        execution.__rel__["workflow"] = type(self.workflow)._made(row, self.workflow.id)
        following = _Attempt(self.drive, execution, self.attempt.queue)
        following.is_run_on = True
        return following

    def _send(self, written: _Written, along: bool) -> None:
        """Tell the queue of what is in it by this.

        :param along: whether this is within the transaction, for a message that is a part of it.
        """
        values, execution_id = written.columns, self.execution.id
        if written.begins:
            values, execution_id = written.begins, written.following_id
        queue = values.get("queue")
        if queue and self.drive._dispatch.is_sent_along(queue) is along:
            self.drive._dispatch.send([StepExecution._made({**self.execution.__data__, **values}, execution_id)])


class _Written(NamedTuple):
    """What was written: to the workflow, to the execution; the columns of the one that follows, and its id."""

    changes: dict[str, Any]
    columns: dict[str, Any]
    begins: _Json
    following_id: int
    row: Workflow | None = None  # as it is now, if it was locked
    before: str = PERFORMING  # the workflow's state
    taken: StepExecution | None = None  # what was claimed along with it, of any workflow


TAKEN = {"state": PERFORMING}  # what a claim changes of the workflow


def _claim(drive: GenevaDrive, execution: StepExecution, is_patient: bool = True, carry_out: Any = None) -> bool:
    """Claim an execution that was read with its workflow, unless either has changed since; whether it is ours.

    :param is_patient: whether to wait for who has locked one of them, where the database can be told not to.
    :param carry_out: what carries out the move; None has it done in a transaction of its own.
    """
    workflow, claim = execution.workflow, _claim_columns(drive._now())
    fence = {**_fence(workflow, execution, READY), **workflow._as_read()}
    found = {"id": execution.id, "due_at": execution.due_at}
    move, patience = _Move(TAKEN, fence, claim, found, is_patient=is_patient), PATIENCE_SECONDS if is_patient else None
    if (carry_out(move) if carry_out else drive._access.move(move, patience)) is None:
        return False
    workflow.__data__.update(TAKEN)
    execution.__data__.update(claim)
    return True


def _claim_columns(now: datetime) -> dict[str, Any]:
    claim = {"state": IN_PROGRESS, "queue": None, "started_at": now, "heartbeat_at": now}
    return {**claim, "performed_by": _this_process()}


def _fence(workflow: Workflow, execution: StepExecution, state: str) -> dict[str, Any]:
    """What finds the workflow's row, as long as this execution is its newest and it is in `state`."""
    return {"id": workflow.id, "execution_count": execution.number, "state": state}


def _error_columns(error: BaseException | None, charset: str = "utf-8") -> dict[str, str]:
    if error is None:
        return {}
    cls = type(error)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    message = _shown("message", lambda: str(error))
    lines = _shown("traceback", lambda: "".join(traceback.format_exception(cls, error, error.__traceback__)))
    name, message, lines = (_storable(text, charset) for text in (name, message, lines))
    return {
        "error_class_name": name[:MAX_NAME_CHARS],
        "error_message": message[:MAX_ERROR_CHARS],
        "error_backtrace": lines[-MAX_ERROR_CHARS:],  # its end says most
    }


def _described(error: BaseException) -> str | None:
    """An error as a reason: `ValueError: no such mailbox`."""
    message = _shown("message", lambda: str(error))
    return _one_line(f"{type(error).__name__}: {message}" if message else type(error).__name__)


def _shown(what: str, show: Callable[[], str]) -> str:
    """What the error's own code makes of it, if that does not fail in its turn."""
    try:
        return show()
    except BaseException as failure:
        return f"(its {what} cannot be shown: {type(failure).__name__})"


# ==== Resumable steps: a cursor, and loops that keep it ===============================================================


class _Progress:
    """How far an attempt at a resumable step came."""

    def __init__(self, attempt: _Attempt) -> None:
        self.attempt, self.drive = attempt, attempt.drive
        self.has_loop, self.has_checkpoint = False, False

    def cursor(self) -> Any:
        """How far the step came. Read each time: a checkpoint may have been rolled back with the body's transaction."""
        self.drive._access.open()
        mine = StepExecution.id == self.attempt.execution.id
        return self.drive._access.repeat(StepExecution.select(StepExecution.cursor).where(mine).scalar)

    def checkpoint(self, value: Any) -> None:
        problem = "checkpoint() beside resume_over() would take its cursor away: make two steps of them"
        _require(not self.has_loop, self.attempt.where, problem)
        self._keep(value)

    def resume_over(self, items: Any, key: Any, every: Any) -> Iterator[Any]:
        where = f"{self.attempt.where}: resume_over()"
        problem = "the step's one cursor is in use, by checkpoint() or another resume_over(): make two steps of them"
        _require(not (self.has_loop or self.has_checkpoint), where, problem)
        _require(_is_int(every) and every > 0, where, f"every must be a positive int, not {every!r}")
        if isinstance(items, peewee.ModelBase):
            items = items.select()
        loop = (_Pages if isinstance(items, peewee.BaseQuery) else _Items)(where, items, key, every)
        rest = loop.behind(self.cursor(), self._keep_place)
        self.has_loop = True
        return rest

    def _keep_place(self, cursor: Any) -> None:
        problem = "resume_over() within a transaction would keep nothing before its end: begin transactions in the loop"
        database = self.drive._access.database
        _require(_depth(database) <= self.attempt.depth_around(database), self.attempt.where, problem)
        self._keep(cursor)

    def _keep(self, value: Any) -> None:
        cursor = json.loads(_dump_json(value, "the cursor"))  # as the next attempt will see it
        self.has_checkpoint = True
        self.drive._access.open()
        end = self.drive._access.transact(lambda: self._kept(cursor))
        self.attempt.execution.__data__["cursor"] = cursor
        if end is None and self.attempt.is_draining():
            end = _FlowControl("reattempt", reason="handed on at a checkpoint, for the consumer drains")
        if end:
            raise end

    def _kept(self, cursor: Any) -> _FlowControl | None:
        """Write the cursor, with a heartbeat; returns how the body is to end, if it is."""
        execution_id, changes = self.attempt.execution.id, {"cursor": cursor, "heartbeat_at": self.drive._now()}
        kept = StepExecution._update_row(changes, id=execution_id, state=IN_PROGRESS)
        mine = (StepExecution.id == execution_id) & (StepExecution.state == IN_PROGRESS)
        if not kept and StepExecution._lock(mine) is None:  # MySQL counts no row that is as it was
            return _FlowControl("cancel")  # recovered or deleted: whatever is said here, it will not be recorded
        # Not locked: whoever locks the two does so in the other order.
        row = Workflow._row(id=self.attempt.workflow.id)
        if row is None or row.state == CANCELED:
            return _FlowControl("cancel", reason=row and row.reason)
        return _FlowControl("pause", reason=row.reason) if row.pause_requested else None


class _Items:
    """An iterable with the same items in the same order each time; the cursor is the number of those that are done."""

    def __init__(self, where: str, items: Any, key: Any, every: int) -> None:
        is_stable = isinstance(items, Iterable) and not isinstance(items, (set, frozenset))
        problem = f"takes a query, a model, or an iterable in a stable order, not {items!r:.100}: sort a set"
        _require(is_stable, where, problem)
        _require(key is None, where, "key is for queries: other items go by their place")
        self.where, self.items, self.every = where, items, every

    def behind(self, cursor: Any, keep: Callable[[int], None]) -> Iterator[Any]:
        done = 0 if cursor is None else cursor
        _require_fit(_is_int(done) and done >= 0, self.where, cursor)
        if isinstance(self.items, Sequence):
            _require_fit(done <= len(self.items), self.where, cursor)
            return self._each(map(self.items.__getitem__, range(done, len(self.items))), done, keep)
        rest = iter(self.items)
        _require_fit(sum(1 for _ in itertools.islice(rest, done)) == done, self.where, cursor)
        return self._each(rest, done, keep)

    def _each(self, rest: Iterator[Any], done: int, keep: Callable[[int], None]) -> Iterator[Any]:
        number = 0
        for number, item in enumerate(rest, 1):
            yield item
            if number % self.every == 0:
                keep(done + number)
        if number % self.every:
            keep(done + number)


class _Pages:
    """A query of a model, read page by page along a unique key; the cursor is the key of the last row that is done."""

    def __init__(self, where: str, query: Any, key: Any, every: int) -> None:
        self.where, self.query, self.every = where, query, every
        _require(isinstance(query, peewee.ModelSelect), where, "takes the select() of a model, no other kind of query")
        ordering = key if isinstance(key, peewee.Ordering) else peewee.Asc(key)
        self.key, self.is_descending = self._checked_key(ordering.node), ordering.direction == "DESC"
        _require(not ordering.collation, where, "key must be ordered as its column is: leave out collate()")
        self._check_query()
        self.key_of = self._way_to_key()

    def _checked_key(self, key: Any) -> Any:
        model = self.query.model
        if key is None:
            has_key = model._meta.primary_key and not model._meta.composite_key
            problem = f"{model.__name__} has no primary key of one column: name a unique field as key"
            _require(has_key, self.where, problem)
            key = getattr(model, model._meta.primary_key.name)
        is_own = isinstance(key, peewee.Field) and key.model is model
        _require(is_own, self.where, f"key must be a field of {model.__name__}, which is selected from, not {key!r}")
        is_unique = (key.primary_key or key.unique) and not key.null
        _require(is_unique, self.where, f"key must be unique and not null, as {key.name} is not: take the primary key")
        return key

    def _check_query(self) -> None:
        query = self.query
        is_plain = not query._order_by and query._limit is None and query._offset is None
        _require(is_plain, self.where, "the query must have no order_by, limit or offset: it is read along the key")
        is_grouped_by_key = not query._group_by or any(each is self.key for each in query._group_by)
        _require(is_grouped_by_key, self.where, "a query with group_by must group by the key")
        kinds = [kind for joins in query._joins.values() for *_, kind in joins]
        has_keyless = any("RIGHT" in kind or "FULL" in kind for kind in kinds)
        problem = "a right or full join makes rows without the key: select from the other model"
        _require(not has_keyless, self.where, problem)

    def _way_to_key(self) -> Callable[[Any], Any]:
        """How to find the key in a row; in a dict under a name of its own, as names of columns may be there twice."""
        kind, name = self.query._row_type or peewee.ROW.MODEL, self.key.name
        place = next((place for place, each in enumerate(self.query._returning) if each is self.key), None)
        _require(place is not None, self.where, f"the query must select the key, {name}, too")
        if kind in (peewee.ROW.TUPLE, peewee.ROW.NAMED_TUPLE):
            return lambda row: row[place]
        if kind == peewee.ROW.DICT:
            self.query = self.query.select_extend(self.key.alias(CURSOR_ALIAS))
            return lambda row: row.pop(CURSOR_ALIAS)
        _require(kind == peewee.ROW.MODEL, self.where, "rows must be models, dicts or tuples: leave out objects()")
        return lambda row: row.__data__[name]

    def behind(self, cursor: Any, keep: Callable[[Any], None]) -> Iterator[Any]:
        try:
            last = None if cursor is None else self._key_at(cursor)
        except Exception:  # of whatever class the field raises
            _require_fit(False, self.where, cursor)
        return self._rows(last, keep)

    def _rows(self, last: Any, keep: Callable[[Any], None]) -> Iterator[Any]:
        is_over = False
        while not is_over:
            rows, keys = self._page(last)
            is_over = len(rows) <= self.every
            del rows[self.every :]
            if rows:
                last = keys[len(rows) - 1]
                cursor = self._cursor_at(last)
                yield from rows
                keep(cursor)

    def _page(self, last: Any) -> tuple[list[Any], list[Any]]:
        """The rows behind the last key, with the first one of the next page, which must be another; and their keys."""
        page = self.query.order_by(self.key.desc() if self.is_descending else self.key.asc())
        if last is not None:
            page = page.where(self.key < last if self.is_descending else self.key > last)
        rows = list(page.limit(self.every + 1))  # all at once: on SQLite a write fails while a read is half done
        keys = [self.key_of(row) for row in rows]
        is_unique = len({*keys} - {None, last}) == len(keys)
        problem = f"the key {self.key.name} is there twice, or null: a join repeats rows: use distinct()"
        _require(is_unique, self.where, problem)
        return rows, keys

    def _cursor_at(self, key: Any) -> int | str:
        """The key as JSON; there and back, so that nothing is passed over where it is less exact as text."""
        cursor = key if _is_int(key) or isinstance(key, str) else str(key)
        try:
            is_kept = self._key_at(cursor) == key
        except Exception:  # a field of the application's own
            is_kept = False
        problem = f"the key {self.key.name} is lost as text: go by a key of int, text, UUID or time"
        _require(is_kept, self.where, problem)
        return cursor

    def _key_at(self, cursor: Any) -> Any:
        """The key that a cursor stands for; an error, of any class, if it cannot be one of the field's."""
        field = _referenced(self.key)
        is_binary = isinstance(field, peewee.BinaryUUIDField)
        key = uuid.UUID(cursor) if is_binary else field.python_value(cursor)
        # These take anything else as it is, and some databases compare that with what they have.
        is_time = isinstance(field, (peewee.DateTimeField, peewee.DateField, peewee.TimeField))
        if _is_int(cursor) != isinstance(field, peewee.IntegerField) or (is_time and isinstance(key, str)):
            raise ValueError(cursor)
        return key


def _require_fit(is_fit: bool, where: str, cursor: Any) -> None:
    problem = f"cannot go on at the cursor {cursor!r:.100}: the items were others when it was kept; start over with "
    _require(is_fit, where, f"{problem}resume_at(), or with reattempt(rewind=True)")


# ==== The drive: settings, and those who do the work ==================================================================


#: Each setting of the drive: its default, and a check with its description; without a check, it is a duration.
SETTINGS: dict[str, tuple[Any, Callable[[Any], Any] | None, str]] = {
    "delete_completed_workflows_after": (timedelta(days=30), None, "a timedelta, seconds, or None to keep all"),
    "stuck_in_progress_threshold": (timedelta(minutes=2), None, "a timedelta or seconds, more than 0"),
    "stuck_scheduled_threshold": (timedelta(minutes=1), None, "a timedelta or seconds, more than 0"),
    "stuck_recovery_action": ("reattempt", ("reattempt", "cancel").__contains__, '"reattempt" or "cancel"'),
    "max_recoveries": (5, lambda value: _is_int(value) and value >= 0, "an int, at least 0"),
    "housekeeping_batch_size": (1000, lambda value: _is_int(value) and value > 0, "a positive int"),
    "housekeeping_schedule": (crontab(), callable, "a Huey crontab"),
    "undefined_step_grace": (timedelta(minutes=10), None, "a timedelta or seconds; 0 turns it off"),
    "run_on": (timedelta(seconds=1), None, "a timedelta or seconds; 0 turns it off"),
    "clock": (_utcnow, lambda value: callable(value) and value().tzinfo, "a callable that returns an aware datetime"),
}

DEFAULT_QUEUE = "default"

_current_drive: GenevaDrive | None = None
_earlier_databases: weakref.WeakSet[Database] = weakref.WeakSet()  # of drives that were replaced


def _drive() -> GenevaDrive:
    if _current_drive is None:
        raise ConfigurationError("there is no drive yet: construct GenevaDrive(database) before workflows are used")
    return _current_drive


class GenevaDrive:
    """Binds the workflows to a database and to the queues that run them. One per process; the latest counts.

    :param database: a Peewee database, a pool, or a DatabaseProxy (which may be initialized later).
    :param huey: the default queue; None makes one of the drive's own, which gives out the executions in the tables.
    :param queues: further queues: a dict of names and Hueys, or a list of names for the drive's own.
    :raises ConfigurationError: if something is unknown or of the wrong type. Nothing is executed on the database.

    Settings, each an attribute too, with their defaults; durations are timedeltas or seconds:

    :param delete_completed_workflows_after: (30 d) how long finished and canceled workflows are kept; None keeps all.
    :param stuck_in_progress_threshold: (2 min) how long a step may be without a heartbeat before it is recovered.
    :param stuck_scheduled_threshold: (1 min) how long a step may be due, in a Huey of yours, before it is queued again.
    :param stuck_recovery_action: ("reattempt") what follows when a step's process died; or "cancel".
    :param max_recoveries: (5) when a step's process died more often than that, its workflow is paused.
    :param housekeeping_batch_size: (1000) how many rows are read at a time, to be deleted or recovered.
    :param housekeeping_schedule: (every minute) a Huey crontab.
    :param undefined_step_grace: (10 min) how long a step that no code here defines is put off; then it fails.
    :param run_on: (1 s) how long a task goes on with steps that follow at once; 0 turns it off.
    :param clock: (the host's) a callable that returns an aware datetime.
    """

    delete_completed_workflows_after: timedelta | None
    stuck_in_progress_threshold: timedelta
    stuck_scheduled_threshold: timedelta
    stuck_recovery_action: str
    max_recoveries: int
    housekeeping_batch_size: int
    housekeeping_schedule: Callable[[datetime], bool]
    undefined_step_grace: timedelta
    run_on: timedelta
    clock: Callable[[], datetime]
    database: Any
    queues: dict[str, Huey]

    def __init__(self, database: Any, huey: Huey | None = None, *, queues: _Queues = None, **settings: Any) -> None:
        if not isinstance(database, (Database, peewee.Proxy)):
            raise ConfigurationError(f"GenevaDrive() takes a Peewee database, not {database!r}")
        for prepare in (_check_class, _track_savepoints):
            prepare(_unproxied(database))
            if isinstance(database, peewee.Proxy):  # which may stand for another one later
                database.attach_callback(prepare)
        for name in settings.keys() - SETTINGS:
            raise ConfigurationError(f"unknown setting {name!r} of GenevaDrive: use {', '.join(SETTINGS)}")
        for name, (default, _, _) in SETTINGS.items():
            setattr(self, name, settings.get(name, default))
        self.database = database
        self._access = _Access(self)
        self.queues = _checked_queues(self, huey, queues)
        self._dispatch, self._recovery, self._reports = _Dispatch(self), _Recovery(self), _Reports(self)
        self._recurrence = _Recurrence(self)
        for model in (*MODELS, _SchemaVersion):
            model.bind(database, bind_refs=False, bind_backrefs=False)
        global _current_drive
        if _current_drive is not None and (earlier := _unproxied(_current_drive.database)) is not None:
            _earlier_databases.add(earlier)
        _current_drive = self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            _, check, description = SETTINGS[name]
            problem = f"the setting {name} must be {description}, not {_as_given(value)}"
            if check is not None and not check(value):
                raise ConfigurationError(problem)
            if check is None and not (value is None and name == "delete_completed_workflows_after"):
                try:
                    value = _duration(value, name)
                except ValueError:
                    raise ConfigurationError(problem) from None
                if not value and name.startswith("stuck_"):
                    raise ConfigurationError(problem)
        super().__setattr__(name, value)

    @property
    def huey(self) -> Huey:
        """The default queue, for `huey_consumer app.huey`."""
        return self.queues[DEFAULT_QUEUE]

    def create_tables(self, models: Iterable[type[Model]] = ()) -> None:
        """Create the tables, columns and indexes that are missing, and record the version of the schema.

        Safe to call at every start, by many processes at once and while others work, those with the code of an earlier
        or later version included: nothing is taken away or made narrower. A call that was cut off is completed by the
        next one.

        :param models: of the application's, whose tables are created too, as Peewee's `create_tables()` does, but by
            one process at a time: at once, several would fail on PostgreSQL.
        :raises ConfigurationError: if one of these is not a model of the drive's database; nothing is created.
        :raises UnsupportedDatabaseError: if the database cannot enforce the uniqueness that the library promises.
        :raises GenevaDriveError: inside a transaction on MySQL or MariaDB, whose DDL would commit it.
        """
        models = [models] if isinstance(models, peewee.ModelBase) else list(models)
        for model in models:
            if not isinstance(model, peewee.ModelBase) or _unproxied(model._meta.database) is not self._access.database:
                fix = "create what is on another one with that one's create_tables()"
                raise ConfigurationError(f"create_tables(): {model!r} is not a model of the drive's database: {fix}")
        _Schema(self).complete(peewee.sort_models(models))

    def run(
        self,
        workers: int = 1,
        queues: Iterable[str] | None = None,
        until: Callable[[], object] | None = None,
        shutdown_timeout: timedelta | float | None = None,
    ) -> None:
        """Run consumers in this process, until SIGINT, SIGTERM, or `until()` is true; then drain.

        Draining ends the steps under way; what is due next waits in the tables.

        :param workers: threads for each queue.
        :param queues: the names of the queues to serve; None serves all.
        :param until: called ten times a second or so.
        :param shutdown_timeout: how long draining may take, a timedelta or seconds; None waits for the steps, and a
            second signal ends the waiting. What is not over then is performed again, once this process has ended.
        :raises UnknownQueueError: if there is no such queue.
        :raises ConfigurationError: if another argument is wrong.
        """
        names = list(self.queues if queues is None else queues)
        for name in names:
            if name not in self.queues:
                raise UnknownQueueError("run()", name, self.queues)
        if not _is_int(workers) or workers < 1:
            raise ConfigurationError(f"run(): workers must be a positive int, not {workers!r}")
        if shutdown_timeout is not None:
            limit = _duration(shutdown_timeout, "run(): shutdown_timeout", ConfigurationError)
            shutdown_timeout = limit.total_seconds()
        self._dispatch.serve(names, workers, until, shutdown_timeout)

    def housekeeping(self) -> dict[str, int]:
        """Recover what died, queue again what is overdue, create what recurs, delete what ended long ago.

        Harmless at any time.

        :returns: how many: `workflows_cleaned_up`, `step_executions_cleaned_up`, `stuck_in_progress_recovered`,
            `stuck_scheduled_recovered`.
        """
        return self._recovery.sweep()

    def is_idle(self) -> bool:
        """Whether no workflow is ready or performing, for scripts: `drive.run(until=drive.is_idle)`.

        A wait counts as something to do, however long it is.
        Paused ones wait for a person, those that wait for a signal without a timeout for somebody else; of those that
        wait for children the children tell.
        """
        return self._access.repeat(self._reports.is_idle)

    def doctor(self) -> list[str]:
        """Check over the tables what must always hold, while others write. Reads all rows: not for every minute.

        :returns: the violations, a sentence each; empty when all is sound.
        """
        return self._access.repeat(self._reports.violations)

    def stats(self) -> list[Metric]:
        """The numbers to watch, as an exporter for Prometheus or statsd takes them: all are gauges. Reads all rows.

        :returns: sorted by name: how many workflows there are by type and state, and the share of the ongoing ones that
            are paused; how many steps are due and not begun, and since when the oldest; how many wait for which signal;
            how many attempts, of the workflows that are kept, ended with their process.
        """
        return self._access.repeat(self._reports.metrics)

    def paused_groups(self) -> list[PausedGroup]:
        """The paused workflows by class, step and what paused them: where to look first when much has failed.

        Reads the newest 10,000 of them, by an index.

        :returns: the largest group first.
        """
        return self._access.repeat(self._reports.paused_groups)

    def _now(self) -> datetime:
        return self.clock()

    def _announce(self, workflow: Workflow, old: str | None, new: str) -> None:
        """Tell of a transition once it is committed."""
        if old == new or not (workflow_transitioned._receiver_list or logger.isEnabledFor(logging.INFO)):
            return

        def tell() -> None:
            logger.info("%s: %s -> %s", workflow._label, old or "new", new)
            workflow_transitioned.send(workflow, old, new)

        self._access.after_commit(tell)

    def _perform(self, execution_id: int, queue: str = DEFAULT_QUEUE, attempt: _Attempt | None = None) -> None:
        """Run an execution that is due, and go on with the steps that follow at once.

        :param attempt: at it, where it is claimed already.
        """
        context = _own_context()
        if attempt is None:
            self._access.connect_worker()
            attempt = context.run(_Attempt.claim, self, execution_id, queue)
        deadline = time.monotonic() + self.run_on.total_seconds()
        is_draining = self._dispatch.draining(queue)

        def may_run_on() -> bool:
            return time.monotonic() < deadline and not is_draining()

        while attempt is not None:
            run = functools.partial(context.run, attempt.run, may_run_on, is_draining)
            attempt = self._dispatch.perform(attempt, run)
            if attempt is not None:
                context = _own_context()
                with contextlib.suppress(Exception):  # the next attempt is claimed, and beats: let it find out
                    self._access.connect_worker()
                if not attempt.is_run_on:
                    attempt = context.run(attempt.accepted, is_draining())


# ==== The queues: who is told of an execution, and who performs it ====================================================


def perform_step(execution_id: int, drive: GenevaDrive, queue: str, task: Any) -> None:
    """The Huey task behind every step; each queue has its own, which knows its drive and its name."""
    drive._perform(execution_id, queue, getattr(task, "attempt", None))


def housekeeping() -> None:
    """The periodic Huey task."""
    _drive().housekeeping()


def recurrence() -> None:
    """The periodic Huey task that creates what recurs, each minute, however often housekeeping runs."""
    _drive()._recurrence.look()


# Huey names tasks by module and function: on one side of a queue the module may be vendored, and called otherwise.
perform_step.__module__ = housekeeping.__module__ = recurrence.__module__ = "geneva_drive"


def _checked_queues(drive: GenevaDrive, huey: Any, queues: Any) -> dict[str, Huey]:
    """The Hueys by the names of their queues, the drive's own among them."""
    if huey is not None and not isinstance(huey, Huey):
        raise ConfigurationError(f"huey must be a Huey instance, not {huey!r}")
    if isinstance(queues, str) or not isinstance(queues or (), Iterable):
        raise ConfigurationError(f"queues must be a dict of names and Hueys or a list of names, not {queues!r}")
    found = {DEFAULT_QUEUE: _OwnHuey(DEFAULT_QUEUE, drive) if huey is None else huey}
    for name in queues or ():
        if not _is_name(name) or not name.isascii() or name == DEFAULT_QUEUE:
            raise ConfigurationError(f"queues: a name must be ASCII other than {DEFAULT_QUEUE!r}, not {name!r}")
        found[name] = queues[name] if isinstance(queues, Mapping) else _OwnHuey(name, drive)
        if not isinstance(found[name], Huey):
            raise ConfigurationError(f"queues: {name!r} must be a Huey instance, not {found[name]!r}")
    for name, each in found.items():
        if isinstance(each, _OwnHuey) and each.storage.drive is not drive:
            problem = f"the Huey of the queue {name!r} is one that another GenevaDrive made for itself"
            raise ConfigurationError(f"{problem}: leave it out, and this one makes its own")
    return found


class _Dispatch:
    """Tells the queues of executions, and minds the consumers that perform them."""

    def __init__(self, drive: GenevaDrive) -> None:
        self.drive = drive
        self.consumers: dict[str, Consumer] = {}
        self.handlers: dict[int, Any] = {}  # of signals, as they were before the consumers
        self.performing: set[_Attempt] = set()
        self.tasks = {name: self._register(name, each) for name, each in drive.queues.items()}

    # -- routes -----------------------------------------------------------------------------------------------------

    def route(self, workflow: Workflow, step_name: str | None) -> _Route:
        """The queue and priority of a step. A queue that a deploy took away gives way to the default one."""
        options = workflow._huey_options(workflow._find(step_name), workflow.options)
        queue = options.get("queue", DEFAULT_QUEUE)
        if queue not in self.drive.queues:
            logger.error("%s", UnknownQueueError(workflow._label, queue, self.drive.queues))
            queue = DEFAULT_QUEUE
        return queue, options.get("priority") or 0

    def check_route(self, where: str, options: Mapping[str, Any]) -> None:
        """Refuse options that ask for a queue or a priority that the drive does not have."""
        queue, queues = options.get("queue", DEFAULT_QUEUE), self.drive.queues
        if queue not in queues:
            raise UnknownQueueError(where, queue, queues)
        if options.get("priority") and not queues[queue].storage.priority:
            storage = type(queues[queue].storage).__name__
            raise ConfigurationError(
                f"{where} asks for a priority, which the queue {queue!r} ({storage}) does not know: use "
                "PriorityRedisHuey, or leave the priority out"
            )

    # -- telling ----------------------------------------------------------------------------------------------------

    def put_in_queue(self, workflow: Workflow, execution: StepExecution, **changes: Any) -> None:
        """Write changes of an execution that is not claimed, and its place in the queue. Needs the workflow's lock."""
        values = {**execution.__data__, **changes}
        place = _place_in_queue(workflow, values, workflow.state, self.drive._now())
        execution._write(**changes, **place)
        self.send([execution])

    def send(self, executions: list[StepExecution]) -> None:
        """Tell of executions in one queue, if they are in one, as soon as they are committed; or along with that."""
        queue = executions[0].queue
        huey = self.drive.queues.get(queue)
        if queue is None or huey is None:  # or it is one of another process's
            return
        tell = functools.partial(huey.tell if isinstance(huey, _OwnHuey) else self._send_messages, executions)
        if self.is_sent_along(queue):
            tell()
        else:
            self.drive._access.after_commit(tell)

    @functools.cached_property
    def has_shared(self) -> bool:
        """Whether there are queues whose messages may be a part of the drive's transactions."""
        return any(isinstance(each.storage, SqlStorage) for each in self.drive.queues.values())

    def is_sent_along(self, queue: str) -> bool:
        """Whether the messages of a queue are rows of the drive's own database, a part of its transactions."""
        huey = self.drive.queues[queue]
        is_sql = isinstance(huey.storage, SqlStorage) and not huey.immediate
        return is_sql and huey.storage.database is self.drive._access.database

    def _send_messages(self, executions: list[StepExecution]) -> None:
        huey = self.drive.queues[cast(str, executions[0].queue)]
        for each in executions:
            task = self.task(each)
            # Huey's enqueue would have a worker put it into the schedule; the direct way spares it that.
            (huey.enqueue if task.eta is None else huey.add_schedule)(task)

    def task(self, execution: StepExecution) -> Any:
        """The Huey task that performs an execution."""
        due = cast(datetime, execution.due_at)
        eta, priority = due if due > self.drive._now() else None, execution.priority or None
        make = self.tasks[cast(str, execution.queue)].s
        return make(execution.id, eta=eta, priority=priority, id=execution.job_id)

    # -- consumers --------------------------------------------------------------------------------------------------

    def _register(self, name: str, huey: Huey) -> Any:
        """Register the tasks on a Huey, in the place of an earlier drive's; returns the one that performs steps."""
        for task in getattr(huey, "_geneva_drive_tasks", ()):
            task.unregister()
        here = functools.partial(perform_step, drive=self.drive, queue=name)
        perform = huey.task(context=True)(functools.update_wrapper(here, perform_step))
        periodic = huey.periodic_task(lambda moment: self.drive.housekeeping_schedule(moment))(housekeeping)
        huey._geneva_drive_tasks = (perform, periodic, huey.periodic_task(crontab())(recurrence))
        huey.on_startup("geneva_drive")(functools.partial(self._begin_worker, name))
        huey.on_shutdown("geneva_drive")(self._end_worker)
        create_consumer = type(huey).create_consumer

        def remembering(**options: Any) -> Consumer:
            if not _heartbeat.workers:
                self.handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self.consumers[name] = consumer = create_consumer(huey, **options)
            consumer.start = functools.partial(self._start_consumer, consumer.start)  # Huey's hooks cannot stop it
            consumer._join_workers = lambda: _join([consumer], consumer.shutdown_timeout)
            consumer._interrupt_workers = functools.partial(self._interrupt, consumer, consumer._interrupt_workers)
            return consumer

        huey.create_consumer = remembering  # a task has no other way to its consumer's stop flag
        return perform

    def _start_consumer(self, start: Callable[[], None]) -> None:
        """Start a consumer, unless it would take messages only to fail with each: a GenevaDriveError says why."""
        access = self.drive._access
        was_closed = access.database.is_closed()
        try:
            if _is_in_memory(access.database):
                fix = "use a file; or perform the steps in this thread, by execute() or TestHelpers.perform_next_step()"
                name = access.database.database
                raise ConfigurationError(f"{name!r} is another database in each thread: {fix}")
            access.connect_worker()
            problem = _Schema(self.drive).problem()
        except peewee.PeeweeException as error:  # a consumer outlives that its database is away
            logger.warning("the version of the schema cannot be read: %s", error)
            problem = None
        finally:
            if was_closed:
                access.close_own()
        if problem:
            raise GenevaDriveError(problem)
        start()

    def _interrupt(self, consumer: Consumer, interrupt: Callable[[], None]) -> None:
        """End workers in mid-step. A process may hang in its driver, where it handles no signal."""
        interrupt()
        for each in _alive(consumer) if consumer.environment.forks else ():
            each.kill()
        _restore_signals(self.handlers)  # Huey's would ignore what comes while the process exits

    def _begin_worker(self, queue: str) -> None:
        _heartbeat.enter()
        consumer = self.consumers.get(queue)
        if consumer is not None and consumer.environment.forks:
            threading.Thread(target=_end_process, args=(consumer, os.getppid()), daemon=True).start()
        if not getattr(consumer, "_geneva_drive_swept", False):  # by the first worker of a consumer that starts
            if consumer is not None:
                consumer._geneva_drive_swept = True
            self.drive.housekeeping()

    def _end_worker(self) -> None:
        _heartbeat.exit()
        self.drive._access.close_own()

    def draining(self, queue: str) -> Callable[[], bool]:
        """What tells whether the consumer of a queue is about to stop; of what it performs, after its end too."""
        consumer = self.consumers.get(queue)
        return lambda: consumer is not None and consumer.stop_flag.is_set()

    def perform(self, attempt: _Attempt, run: Callable[[], _Attempt | None]) -> _Attempt | None:
        """Run an attempt for a worker, which nothing but the end of its process is to end."""
        self.performing.add(attempt)
        try:
            return run()
        except BaseException as error:
            if isinstance(error, (Exception, SystemExit)) or _ends_process(error):
                raise
            raise GenevaDriveError(f"{attempt.where} failed with {type(error).__name__}") from error
        finally:
            self.performing.discard(attempt)

    def serve(
        self, names: list[str], workers: int, until: Callable[[], object] | None, drain_seconds: float | None
    ) -> None:
        """Run consumers of the queues in this process; see `GenevaDrive.run()`."""
        quick = {"initial_delay": 0.02, "backoff": 1.2, "max_delay": 0.2, "scheduler_interval": 1}
        consumers = [self.drive.queues[name].create_consumer(workers=workers, **quick) for name in names]
        try:
            _serve(consumers, until, drain_seconds)
        finally:
            for name, consumer in zip(names, consumers):
                if self.consumers.get(name) is consumer:  # what is performed here from now on is none of its steps
                    del self.consumers[name]

    def after_fork(self, is_of_worker: bool) -> None:
        """Have a forked process begin without what its parent performs.

        :param is_of_worker: whether a consumer's workers run in the parent: then the fork is a step's.
        """
        self.performing = set()
        for huey in self.drive.queues.values():
            if isinstance(huey, _OwnHuey):
                huey.storage.begin()
        if is_of_worker:  # else Huey makes a worker
            self.consumers = {}
            _restore_signals(self.handlers)
            signal.set_wakeup_fd(-1)  # else what is sent to the child is told to the parent


# ==== The drive's own Huey: a row that is due is a message ============================================================


class _OwnHuey(Huey):
    """Gives out the executions in the tables: there are no other messages, and nothing to lose or double.

    Periodic tasks are performed by the consumer's scheduler; other tasks are refused.
    """

    def __init__(self, name: str, drive: GenevaDrive) -> None:
        super().__init__(name, results=False, storage_class=_OwnStorage, drive=drive)
        self._retries: list[Any] = []  # periodic tasks, for later

    @property
    def immediate(self) -> bool:
        """False: the drive's own queue is served by a consumer."""
        return False

    @immediate.setter
    def immediate(self, value: bool) -> None:
        if value:
            problem = "the drive's own queue has no immediate mode: perform steps by TestHelpers or execute(), or give"
            raise ConfigurationError(f"{problem} GenevaDrive(db, huey=...) a Huey that has one")

    def _is_periodic(self, task: Any) -> bool:
        """Whether a task is periodic; False for a step whose body asked Huey for a retry: what follows is decided.

        :raises ConfigurationError: for any other task.
        """
        if not isinstance(task, PeriodicTask) and not hasattr(task, "attempt"):
            problem = f"the drive's own Huey performs steps and periodic tasks alone, not {task}"
            fix = "put it on a Huey of yours; GenevaDrive(db, huey=...) has that perform both"
            raise ConfigurationError(f"{problem}: {fix}")
        return isinstance(task, PeriodicTask)

    def enqueue(self, task: Any) -> None:
        """Perform a periodic task here and now: the consumer's scheduler calls this."""
        if not self._is_periodic(task):
            return
        access = self.storage.drive._access
        was_closed = access.database.is_closed()
        try:
            self.execute(task)
        finally:
            if was_closed:
                access.close_own()

    def add_schedule(self, task: Any) -> None:
        """Keep a periodic task that failed, and has retries, for the moment of the next one."""
        if self._is_periodic(task):
            self._retries.append(task)

    def read_schedule(self, timestamp: Any = None) -> list[Any]:
        """The retries of periodic tasks that are due."""
        due = [task for task in self._retries if self.ready_to_run(task, timestamp)]
        self._retries = [task for task in self._retries if task not in due]
        return due

    def deserialize_task(self, data: Any) -> Any:
        """The task for an execution, or for an attempt at one, which the storage gives out in the place of messages."""
        if isinstance(data, StepExecution):
            return self.storage.drive._dispatch.task(data)
        task = self.storage.drive._dispatch.tasks[self.name].s(data.execution.id, id=data.execution.job_id)
        task.attempt, task.priority = data, data.execution.priority or None
        return task

    def execute(self, task: Any, timestamp: Any = None) -> Any:
        """As Huey has it; a step that a hook of its cancels is put back."""
        try:
            return super().execute(task, timestamp)
        finally:
            attempt = getattr(task, "attempt", None)
            if attempt and not attempt.is_begun:
                attempt.put_off("a hook of Huey's canceled its task")

    def is_revoked(self, task: Any, timestamp: Any = None, peek: bool = True) -> bool:
        """False: what is to be done is in the tables, and changed by calls of the workflow's."""
        return False

    def delete(self, key: str | None) -> bool:
        """False: nothing is kept beside the tables."""
        return False

    def to_take(self) -> _Places | None:
        """In a worker, the queue and the priorities to look for, if these are known and no hook is to see each task."""
        is_seen = self._pre_execute or self._post_execute or any(self._signal.receivers.values())
        if is_seen or threading.get_ident() not in _heartbeat.workers:
            return None
        return (self.name, self.storage._priorities) if time.monotonic() - self.storage._asked <= 1 else None

    def tell(self, executions: list[StepExecution]) -> None:
        """Executions are in the queue, committed: wake as many workers of this process, and tell Huey's receivers."""
        if executions[0].priority not in self.storage._priorities:
            self.storage._asked = -math.inf
        self.storage.idle.ring([cast(datetime, each.due_at) for each in executions])
        if any(self._signal.receivers.values()):
            for each in executions:
                task = self.storage.drive._dispatch.task(each)
                self._emit(SIGNAL_ENQUEUED if task.eta is None else SIGNAL_SCHEDULED, task)


class _OwnStorage(BaseStorage):
    """The executions of one queue, by their columns `queue`, `priority` and `due_at`."""

    blocking = True

    def __init__(self, name: str, drive: GenevaDrive) -> None:
        super().__init__(name)
        self.drive = drive
        self._priorities: tuple[int, ...] = (0,)
        self._asked = -math.inf
        self.begin()

    def begin(self) -> None:
        """Begin in a process, a forked one too: with locks that none of another's threads holds."""
        self.idle = _Idle(self)
        self.looking: set[int] = set()  # the threads that are about to claim something

    def close(self) -> None:
        """Close the connection of this thread, before Huey forks."""
        self.drive._access.close_own()

    def dequeue(self) -> _Attempt | None:
        """Claim the execution that is due first. A worker waits for one, until its consumer stops."""
        try:
            self.drive._access.connect_worker()
            was_empty = False
            while not self._drains():
                attempt = self._take(was_empty)
                if attempt:
                    self.idle.nap = SHORTEST_NAP
                if attempt or not self._wait(was_empty):
                    return attempt
                was_empty = True
            return None
        except (peewee.PeeweeException, GenevaDriveError):
            if not self.drive._access.database.in_transaction():
                with contextlib.suppress(peewee.PeeweeException):  # some drivers never tell that a connection is gone
                    self.drive._access.close_own()
            time.sleep(1)  # Huey logs a traceback each time, and polls often
            raise

    def _take(self, was_empty: bool) -> _Attempt | None:
        """Claim what is due first; where others have locked all of a priority, what is due of a lower one."""
        priorities = self.priorities()
        for place in range(len(priorities) if was_empty else 1):
            if attempt := _Attempt.take(self.drive, self.name, priorities[place:]):
                return attempt
        return None

    def _wait(self, was_empty: bool) -> bool:
        """In a worker, wait until something may be due; False elsewhere, and if the consumer stops, or is gone.

        :param was_empty: whether the worker has just waited, and then found nothing to claim.
        """
        if threading.get_ident() not in _heartbeat.workers:
            return False
        while not self._drains():
            is_due, was_empty = self.idle.wait(was_empty), False
            if self.name not in self.drive._dispatch.consumers:
                return False  # Huey asks the stop flag of this worker's own
            if is_due:
                return True
        return False

    def _drains(self) -> bool:
        """Whether this is a worker of a consumer that is about to stop."""
        return threading.get_ident() in _heartbeat.workers and self.drive._dispatch.draining(self.name)()

    def priorities(self) -> tuple[int, ...]:
        """The priorities that there are, or were lately, the highest first. There are few: each is asked for by itself.

        A new one of another process is seen within a second, one of this process at once.
        """
        if time.monotonic() - self._asked > 1:
            self._priorities, self._asked = self._ask_priorities(), time.monotonic()
        return self._priorities

    def _ask_priorities(self) -> tuple[int, ...]:
        # Not by `_Access.values()`: an idle consumer asks each second, and building its queries takes longer than this.
        found, highest = {0}, "select max(priority) from geneva_drive_step_executions where queue = {0}"
        priority = self._ask(highest, self.name)
        while priority is not None:
            found.add(priority)
            priority = self._ask(f"{highest} and priority < {{0}}", self.name, priority)
        known = found.union(self._priorities)  # what is urgent comes and goes, and is not to wait until it is known
        return tuple(sorted(known if len(known) <= MAX_KNOWN_PRIORITIES else found, reverse=True))

    def first_due(self) -> datetime | None:
        """When the first execution in the queue is due; None if there is none."""
        first = "select min(due_at) as due_at from geneva_drive_step_executions where queue = {{0}} and priority = {}"
        priorities = self.priorities()  # once: other threads may find that there are more
        firsts = " union all ".join(map(first.format, priorities))
        moment = self._ask(f"select min(due_at) from ({firsts}) t", *[self.name] * len(priorities))
        return cast("datetime | None", StepExecution.due_at.python_value(moment))

    def _ask(self, query: str, *parameters: Any) -> Any:
        """The one value that a query finds, with {0} for each parameter."""
        access, database = self.drive._access, self.drive._access.database
        sql = query.format(database.param)
        return access.repeat(lambda: access.dialect.execute(database, sql, [*parameters]).fetchone())[0]

    # -- what Huey asks ---------------------------------------------------------------------------------------------

    def _rows(self, is_due: bool) -> Any:
        now = self.drive._now()
        self.drive._access.connect_worker()
        moment = StepExecution.due_at <= now if is_due else StepExecution.due_at > now
        return StepExecution.select().where((StepExecution.queue == self.name) & moment)

    def queue_size(self) -> int:
        return cast(int, self._rows(True).count())

    def schedule_size(self) -> int:
        return cast(int, self._rows(False).count())

    def enqueued_items(self, limit: int | None = None) -> list[Any]:
        order = StepExecution.priority.desc(), StepExecution.due_at, StepExecution.id
        return list(self._rows(True).order_by(*order).limit(limit))

    def scheduled_items(self, limit: int | None = None) -> list[Any]:
        return list(self._rows(False).order_by(StepExecution.due_at, StepExecution.id).limit(limit))

    def flush_all(self) -> None:
        """Nothing: the steps are the workflows', which `cancel()` ends."""

    flush_queue = flush_schedule = flush_results = flush_counters = flush_all

    def result_items(self) -> dict[str, Any]:
        return {}

    def result_store_size(self) -> int:
        return 0

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        problem = (
            "the drive's own Huey keeps nothing beside the tables: no results, locks, rate limits or revoked tasks"
        )
        fix = "pause() or cancel() a workflow to hold its steps back; for the rest, use a Huey of yours"
        raise ConfigurationError(f"{problem}: {fix}, which GenevaDrive(db, huey=...) takes too")

    put_data = peek_data = pop_data = delete_data = has_data_for_key = put_if_empty = incr = delete_counter = _refuse


class _Idle:
    """Where the idle workers of a process wait: one of them watches the queue, the others wait to be told.

    A commit of executions that are due rings for as many workers. One of executions that are due later wakes the worker
    that watches, if they are due before what it knows of. After its watch, a worker looks into the queue and leaves the
    watch to the next one, which does the same: so as many workers wake as there are executions.
    """

    def __init__(self, storage: _OwnStorage) -> None:
        self.storage, self.changed = storage, threading.Condition()
        self.waiting, self.rings = 0, 0  # workers, and those of them that are to look
        self.is_watched = False
        self.first_due: datetime | None = None  # as the one who watches knows it
        self.news = 0  # grows when something comes that is due earlier
        self.nap = SHORTEST_NAP  # from one look to the next: it grows while nothing comes

    def ring(self, dues: Sequence[datetime]) -> None:
        """Executions that are due at these moments came into the queue."""
        with self.changed:
            if not self.waiting:
                return
            now = self.storage.drive._now()
            due = sum(moment <= now for moment in dues)
            self.rings = min(self.rings + due, self.waiting)
            self.changed.notify(due)
            later = [moment for moment in dues if moment > now]
            if later and not (self.first_due and now < self.first_due <= min(later)):
                self.news += 1
                self.changed.notify_all()

    def wait(self, was_empty: bool) -> bool:
        """Wait, for a moment at most; whether something may be due."""
        with self.changed:
            self.waiting += 1
        try:
            with self.changed:
                self.changed.wait_for(lambda: self.rings or not self.is_watched, STOP_SECONDS)
                if self.is_watched or self.rings:
                    return self._is_rung()
                self.is_watched = True
            return self._watch(was_empty)
        finally:
            with self.changed:
                self.waiting -= 1

    def _watch(self, was_empty: bool) -> bool:
        try:
            news = self.news
            due = self.storage.first_due()
            with self.changed:
                self.first_due = due
                left = (due - self.storage.drive._now()).total_seconds() if due else math.inf
                if was_empty and left <= 0:  # another's transaction holds what is due, for as long as it takes
                    left = self.nap
                nap, self.nap = min(left, self.nap), min(self.nap * 1.2, LONGEST_NAP)
                self.changed.wait_for(lambda: self.rings or self.news != news, max(0, nap))
                return self._is_rung() or (left <= nap and self.news == news)
        finally:
            with self.changed:
                self.is_watched = False
                self.changed.notify()  # another one is to watch, and to look in its turn: there may be more

    def _is_rung(self) -> bool:
        is_rung, self.rings = self.rings > 0, max(0, self.rings - 1)
        return is_rung


# ==== Consumers in this process =======================================================================================


def _serve(consumers: list[Consumer], until: Callable[[], object] | None, drain_seconds: float | None) -> None:
    """Run consumers until a signal or `until()` ends it, replacing workers that died; then drain those that started."""
    started: list[Consumer] = []
    with _stop_signals() as stop:
        try:
            for consumer in consumers:
                consumer._set_signal_handlers = lambda: None  # ours stop all of them
                consumer.start()
                started.append(consumer)
            checked = time.monotonic()
            while not stop.signals and not (until and until()):
                if time.monotonic() - checked > 10:
                    checked = time.monotonic()
                    for consumer in consumers:
                        consumer.check_worker_health()
                time.sleep(0.1 if until else STOP_SECONDS)
        finally:
            logger.info("draining: the steps under way are ended, the next ones wait in the tables")
            for consumer in started:
                consumer.stop_flag.set()
            if stop.signals < 2:
                _join(started, drain_seconds)


def _join(consumers: list[Consumer], seconds: float | None) -> bool:
    """Wait for workers to end, no longer than that, nor for those that hang without a step; whether all did."""
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    busy = time.monotonic()
    while alive := [each for consumer in consumers for each in _alive(consumer)]:
        now = time.monotonic()
        busy = now if any(map(_is_busy, consumers)) else busy
        if not all(each._graceful for each in consumers):
            raise KeyboardInterrupt  # Huey has got the other signal
        if now >= deadline:
            return False
        if now - busy > EXIT_TIME.total_seconds():
            logger.warning("draining: no step is under way; workers that wait for a database are left behind")
            return False
        alive[0].join(min(0.05, deadline - now))
    return True


def _end_process(consumer: Consumer, parent: int) -> None:
    """End this worker process, though it hangs: once its consumer stops or is gone, and no step is under way."""
    while not consumer.stop_flag.wait(1) and os.getppid() == parent:
        pass
    consumer.stop_flag.set()
    busy = time.monotonic()
    while time.monotonic() - busy <= EXIT_TIME.total_seconds():
        busy = time.monotonic() if _is_performing(consumer.huey) else busy
        time.sleep(0.1)
    os._exit(1)


def _is_busy(consumer: Consumer) -> bool:
    """Whether a consumer is to be waited for. Its worker processes know themselves, and end when they are not."""
    return _is_performing(consumer.huey) or (consumer.environment.forks and _alive(consumer) != [consumer.scheduler])


def _is_performing(huey: Any) -> bool:
    """Whether this process performs a step, or a task of the application's."""
    ours = tuple(task.task_class for task in huey._geneva_drive_tasks)
    performing = any(time.monotonic() < each.patience_ends for each in list(_drive()._dispatch.performing))
    return performing or any(not isinstance(task, ours) for task in list(huey._tasks_in_flight))


def _alive(consumer: Consumer) -> list[Any]:
    """The workers, and the scheduler, that have not ended: threads, processes or greenlets."""
    processes = [*(each for _, each in consumer.worker_threads), consumer.scheduler]
    return [each for each in processes if consumer.environment.is_alive(each)]


@contextlib.contextmanager
def _stop_signals() -> Iterator[Any]:
    """Count SIGINT and SIGTERM, the second one interrupting the block; in the main thread, where signals arrive."""
    stop = types.SimpleNamespace(signals=0)

    def handle(number: int, frame: Any) -> None:
        stop.signals += 1  # without a lock: what this interrupts may hold it
        if stop.signals > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers: dict[int, Any] = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_exit_if_stuck, args=(reader,), daemon=True).start()
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield stop
    except BaseException:  # what the second one interrupts may fail in its own way: a thread that starts, or a driver
        if stop.signals < 2:
            raise
    finally:
        signal.set_wakeup_fd(wakeup)
        writer.close()
        _restore_signals(handlers)


def _exit_if_stuck(signals: socket.socket) -> None:
    """End the process some seconds after the second signal: `until()` may hang in a driver, where no handler is called.

    :param signals: gives the number of each signal, and ends with the block that these are to end.
    """
    count = 0
    with signals, contextlib.suppress(TimeoutError):
        while numbers := signals.recv(64):
            count += sum(number in (signal.SIGINT, signal.SIGTERM) for number in numbers)
            signals.settimeout(EXIT_TIME.total_seconds() if count > 1 else None)
        return
    os._exit(1)


def _restore_signals(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)


# ==== The database: transactions, connections, statements =============================================================


class _Access:
    """Runs what the library does on the drive's database, again where it is to be, and minds the connections."""

    def __init__(self, drive: GenevaDrive) -> None:
        self.drive = drive
        self.turn = threading.RLock()  # of the threads that write, where one at a time can
        self._statements: dict[Any, _Built] = {}

    @property
    def database(self) -> Database:
        """The drive's; a ConfigurationError, if it is not the current drive's, or not initialized."""
        if self.drive is not _current_drive:
            ours, later = _place(self.drive.database), _place(_drive().database)
            problem = f"this GenevaDrive, on {ours}, was replaced by a later one, on {later}"
            raise ConfigurationError(f"{problem}: make one for each process, and keep it")
        database = _unproxied(self.drive.database)
        if database is None:
            raise ConfigurationError("the DatabaseProxy given to GenevaDrive is not initialized: call its initialize()")
        return database

    @property
    def dialect(self) -> _Dialect:
        """What is particular to it."""
        return _dialect(self.database)

    # -- transactions -----------------------------------------------------------------------------------------------

    def begin(self) -> Any:
        """A transaction, or a savepoint inside the caller's."""
        return self.dialect.begin(self.database, self.turn)

    def transact(self, work: Callable[[], T], insist_seconds: float | None = None, is_atomic: bool = False) -> T:
        """Run `work` in a transaction; see `repeat()`.

        :param is_atomic: that it is one statement, which needs none.
        """
        if is_atomic and not self.database.in_transaction():
            # If the connection is lost, it is repeated: had it been committed, the second try finds no row.
            return self.repeat(work, insist_seconds)
        is_done = False

        def transaction() -> T:
            nonlocal is_done
            is_done = False
            with self.begin():
                result = work()
                is_done = True  # what fails now is the commit, and may have succeeded all the same
            return result

        return self.repeat(transaction, insist_seconds, lambda: is_done)

    def move(self, move: _Move, insist_seconds: float | None = None) -> _Moved | None:
        """Have a workflow move.

        :returns: the id of the execution that begins by it, or is changed, and the one that is claimed along, if any;
            None, and nothing is written, if the fence does not hold.
        """
        dialect, database = self.dialect, self.database
        is_atomic = dialect.is_one_statement or (dialect.updates_two and move.begins is None)

        def carry_out() -> _Moved | None:
            parent = Workflow._lock(Workflow.id == move.parent) if move.parent else None
            moved = dialect.move(database, move)
            _count_children(self.drive, None if moved is None else parent, -1)
            return moved

        with contextlib.suppress(_ClaimLost):
            return self.transact(carry_out, insist_seconds, is_atomic and move.parent is None)
        return None

    def repeat(
        self, work: Callable[[], T], insist_seconds: float | None = None, is_done: Callable[[], bool] = lambda: False
    ) -> T:
        """Run `work`; again, if the connection was lost or others were in its way, unless a transaction is open.

        :param insist_seconds: try for so long, however often, and though the database is away: for work that nobody
            repeats soon if it is not done now.
        :param is_done: whether it is not to be repeated after a loss of the connection.
        :raises GenevaDriveError: if the tables are missing or too old.
        """
        started, tries, is_open = time.monotonic(), 0, not self.database.is_closed()
        patience = insist_seconds or PATIENCE_SECONDS
        while True:
            database = self.database
            self.drop_if_dead(database)
            tries += 1
            try:
                if is_open and database.is_closed():  # where autoconnect is off, nobody else opens another
                    contexts = database._state.ctx
                    database.connect(reuse_if_open=True)
                    database._state.ctx = contexts
                return work()
            except peewee.PeeweeException as error:
                is_gone = not is_done() and self.is_lost(error)
                may_be_repeated = (is_gone or self.is_transient(error)) and not self.database.in_transaction()
                limit = math.inf if insist_seconds else 2 if is_gone else TRANSACTION_TRIES
                if not may_be_repeated or tries >= limit or time.monotonic() - started > patience:
                    if problem := self.dialect.is_about_schema(error) and self._schema_problem():
                        raise GenevaDriveError(problem) from error
                    raise
                logger.debug("repeating what failed: %s", error)
                if is_gone:  # which a driver may not tell of its connection
                    self._close(self.database)
            _give_way(tries)

    def escaping(self, work: Callable[[str], T], text: Callable[[], str]) -> T:
        """Do work by which a text is written: not each connection and database takes each of its characters.

        :param work: is given the character set beyond which it is to escape.
        """
        try:
            return work("utf-8")
        except (UnicodeError, peewee.PeeweeException) as error:
            if self.is_transient(error) or self.is_lost(error) or text().isascii():
                raise
            return work("ascii")

    def _schema_problem(self) -> str | None:
        with contextlib.suppress(peewee.PeeweeException):  # in a transaction that PostgreSQL has given up
            return _Schema(self.drive).problem()
        return None

    def after_commit(self, work: Callable[[], object]) -> Callable[[], object]:
        """Do something once the outermost transaction is committed, unless it is rolled back to before this call.

        Its failure must not make the transaction look failed.
        """
        return cast("Callable[[], object]", self.database.after_commit(functools.partial(_do_after_commit, work)))

    # -- connections ------------------------------------------------------------------------------------------------

    def roll_back_to(self, depth: int) -> bool:
        """Roll back what a step's body left open above `depth` transactions; whether there was anything."""
        db, left_open = self.database, _depth(self.database) > depth
        is_gone = db.is_closed() or _is_dead(db.connection())
        while _depth(db) > depth:
            left = (_open_savepoints(db) or db._state.transactions).pop()
            # A transaction of the caller's around it is not ours to roll back, a lost one nobody's.
            is_ours = isinstance(left, _Savepoint) or not db.transaction_depth()
            if is_ours and not is_gone and hasattr(left, "rollback"):
                left.rollback(False)
        if not depth and not is_gone and _is_in_transaction(db.connection()):
            left_open = True
            db.rollback()
        return left_open and not is_gone

    def connect_worker(self) -> None:
        """For threads that are ours: nobody else opens connections for them where autoconnect is off."""
        for database in self.databases():
            self.drop_if_dead(database)
            if not database.autoconnect and database is not self.database:
                with contextlib.suppress(Exception):  # one that is away is met by the step whose hero is there
                    self.open(database)
        self.open()

    def open(self, database: Database | None = None) -> None:
        """Open the connection to the drive's database, or another one, where autoconnect is off: a body closed it."""
        database = database or self.database
        if not database.autoconnect and database.is_closed():
            database.connect()

    def databases(self) -> set[Database]:
        """The drive's, if it is initialized, and those of the heroes."""
        found = {_unproxied(each._meta.database) for each in list(_hero_models.values())}
        found.add(_unproxied(self.drive.database))
        found.discard(None)
        return found

    def drop_if_dead(self, database: Database, is_dead: Callable[[Any], bool] | None = None) -> None:
        """A connection that broke stays broken for its thread until it is closed; the next use opens another."""
        is_unused = database.is_closed() or database.in_transaction()
        if not is_unused and (is_dead or _is_dead)(database.connection()):
            self._close(database)

    def _close(self, database: Database) -> None:
        contexts = database._state.ctx  # the caller's connection_context(), which Peewee forgets, and fails to leave
        with contextlib.suppress(peewee.PeeweeException):
            database.close()
        database._state.ctx = contexts

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error came from the loss of the drive's connection, or from the failure to open one."""
        is_fitting = isinstance(error, (peewee.OperationalError, peewee.InterfaceError))
        # Peewee's own, without an original, says that a body has closed the connection.
        is_of_driver = is_fitting and _original(error) is not None
        return is_of_driver and (self.database.is_closed() or _is_gone(self.database.connection()))

    def is_transient(self, error: BaseException) -> bool:
        """Whether a transaction failed because of others at the same time, as by a deadlock, and may be repeated."""
        # A deadlock takes MySQL's savepoints along; what is raised in the end is that there is none to roll back to.
        before = error.__context__
        return self.dialect.is_transient(error) or (before is not None and self.is_transient(before))

    def run_beside(self, work: Callable[[], T], where: str) -> T:
        """Do something in a thread of its own, in a copy of this one's context, and on connections of its own."""

        def run() -> T:
            self.open()
            depth = _depth(self.database)  # not 0 where threads share a connection
            try:
                result = work()
            finally:
                left_open = self.roll_back_to(depth)
                for database in self.databases():
                    if not _is_private(database):
                        _close_for_good(database)
            if left_open:
                raise TransactionLeftOpenError(where)
            return result

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(contextvars.copy_context().run, run).result()

    def close_own(self) -> None:
        """A worker that ends takes its connection along, also that of a drive that was replaced meanwhile."""
        database = _unproxied(self.drive.database)
        if not _is_private(database):
            _close_for_good(database)

    def after_fork(self) -> None:
        """A forked process must not share its parent's connections, nor wait for threads that did not come along."""
        self.turn = threading.RLock()
        for database in self.databases():
            if not _is_private(database) and not database.in_transaction():
                # Kept for good: closing them here would close the parent's.
                _inherited_connections.append(None if database.is_closed() else database.connection())
                _inherited_connections.extend(getattr(database, name, None) for name in ("_connections", "_in_use"))
                # Another thread, which did not come along, may have held one of these as the process forked.
                database._lock = threading.Lock()
                if hasattr(database, "_pool_lock"):
                    database._pool_lock = threading.RLock()
                    database._pool_available = threading.Condition(database._pool_lock)
                database.dispose()

    # -- statements -------------------------------------------------------------------------------------------------

    def values(self, query: Any, column: Any, above: Any = None) -> Iterator[Any]:
        """The values of a column, of few, in the rows of a query; each is found by itself, along an index.

        :param above: for text, "": else MySQL reads all rows, with nulls too, for the first one.
        """
        lowest = query.select(peewee.fn.MIN(column))
        value = self.repeat((lowest if above is None else lowest.where(column > above)).scalar)
        while value is not None:
            yield value
            value = self.repeat(lowest.where(column > value).scalar)

    def statement(self, database: Any, key: Any, query: Callable[[], Any]) -> _Built:
        """The statement that a query makes on a database, made when it is first asked for."""
        if isinstance(database, peewee.Proxy):
            database = database.obj or self.database
        found = self._statements.get((database, key))
        if found is None:
            found = self._statements[database, key] = _Built(database, query())
        return found


# ==== Recovery: what died, what was lost on the way, what is over =====================================================


class _Recovery:
    """Housekeeping: deletes what ended long ago, recovers what died, queues again what is overdue."""

    def __init__(self, drive: GenevaDrive) -> None:
        self.drive, self.access = drive, drive._access

    def sweep(self) -> dict[str, int]:
        """See `GenevaDrive.housekeeping()`."""
        self.access.connect_worker()
        counts = {"workflows_cleaned_up": 0, "step_executions_cleaned_up": 0}
        counts.update(stuck_in_progress_recovered=0, stuck_scheduled_recovered=0)
        failures = []
        look = self.drive._recurrence.look
        for part in (self._recover_in_progress, self._recover_scheduled, self._recover_parents, look, self._clean_up):
            try:
                counts.update(part() or {})
            except Exception as error:  # it must not keep the other parts from being done
                logger.exception("housekeeping failed in part")
                failures.append(error)
        if any(counts.values()):
            logger.info("housekeeping: %s", ", ".join(f"{name} {count}" for name, count in counts.items() if count))
        if failures:
            raise failures[0]
        return counts

    def _recover_in_progress(self) -> dict[str, int]:
        """Recover the steps of processes whose heartbeats have stopped, or that are known to be gone."""
        in_progress = SQL(f"state = '{IN_PROGRESS}'")
        performers = StepExecution.select(StepExecution.performed_by).where(in_progress).distinct().tuples()
        gone = self.access.repeat(lambda: [name for (name,) in performers if _is_process_gone(name)])
        moment = self.drive._now() - self.drive.stuck_in_progress_threshold
        is_dead = StepExecution.performed_by.in_(gone)
        if _heartbeat.is_silence_fatal():
            is_dead = (StepExecution.heartbeat_at < moment) | is_dead
        dead = in_progress & is_dead
        recovered = 0
        found = StepExecution.select(StepExecution.id, StepExecution.workflow).where(dead)
        for executions in self._batches(found, StepExecution.heartbeat_at):
            for execution in executions:
                if _heartbeat.performs(execution.id):  # right here, whatever the clock says
                    continue
                try:
                    recovered += self.access.transact(functools.partial(self._recover, dead, execution))
                except Exception:  # it must not keep the others from being recovered
                    logger.exception("execution %s cannot be recovered", execution.id)
        return {"stuck_in_progress_recovered": recovered}

    def _recover(self, dead: Any, found: StepExecution) -> bool:
        workflow = _lock_behind_parent(found.workflow_id, _parent_id_of(found.workflow_id))
        is_it = (StepExecution.id == found.id) & (StepExecution.workflow == found.workflow_id)
        # Locked by a checkpoint in a body's transaction, it is not dead, or not for long.
        execution = StepExecution._lock(dead & is_it, skip_locked=True)
        if workflow is None or execution is None:
            return False  # it ended, or showed a sign of life, in between
        try:
            execution.__rel__["workflow"] = workflow
            _Attempt(self.drive, execution)._record(self.death(execution))
        except _ClaimLost:
            return False
        note = "recovered: its process was last heard of at %s", execution.heartbeat_at
        self.access.after_commit(lambda: workflow.logger.warning(*note))
        return True

    def death(self, execution: StepExecution) -> _Verdict:
        """What follows when the process that performs an execution goes away."""
        action = self.drive.stuck_recovery_action
        if action == "reattempt" and execution.recoveries >= self.drive.max_recoveries:
            action = "pause"
        times = f" {execution.recoveries + 1} times" if execution.recoveries else ""
        return _Verdict("death", action, reason=f"its process died{times}")

    def _recover_scheduled(self) -> dict[str, int]:
        """Queue again what is overdue in a queue whose messages may be lost, or that this drive does not have.

        What is in a queue of the drive's own is no message, and cannot be lost; it may be behind.
        """
        recovered = 0
        for queue, priority in self._places():
            if not isinstance(self.drive.queues.get(queue), _OwnHuey):
                recovered += self._recover_overdue(queue, priority)
        return {"stuck_scheduled_recovered": recovered}

    def _places(self) -> Iterator[_Route]:
        """The queues and priorities that executions have."""
        for queue in self.access.values(StepExecution.select(), StepExecution.queue, above=""):
            here = StepExecution.select().where(StepExecution.queue == queue)
            for priority in self.access.values(here, StepExecution.priority):
                yield queue, priority

    def _recover_overdue(self, queue: str, priority: int) -> int:
        """Queue again, once per threshold, what is overdue and was lost; not what a queue is behind with."""
        moment = self._progress(queue, priority) - self.drive.stuck_scheduled_threshold
        here = (StepExecution.queue == queue) & (StepExecution.priority == priority)
        lost = here & (StepExecution.due_at <= moment) & (StepExecution.enqueued_at <= moment)
        recovered = 0
        for executions in self._batches(StepExecution.select(StepExecution.id).where(lost), StepExecution.due_at):
            these = StepExecution.id.in_([each.id for each in executions])
            recovered += self.access.transact(functools.partial(self._requeue, lost & these))
        return recovered

    def _requeue(self, lost: Any) -> int:
        # The lock makes a second sweep wait, and then see that these are queued.
        executions = list(StepExecution._locking(StepExecution.select().where(lost)))
        for execution in executions:
            place: dict[str, Any] = {}
            if execution.queue not in self.drive.queues:
                queue, priority = self.drive._dispatch.route(execution.workflow, execution.step_name)
                place = {"queue": queue, "priority": priority}
            execution._write(**place, enqueued_at=self.drive._now(), job_id=_job_id(self.drive._now()))
            self.drive._dispatch.send([execution])
        return len(executions)

    def _recover_parents(self) -> dict[str, int]:
        """Have no parent count as ongoing, nor wait for, children that were deleted by others than the library."""
        miscounted = SQL(f"ongoing_children > 0 and {_has_no_ongoing('parent_id = t1.id')}")

        def recover(workflow_id: int) -> None:
            row = Workflow._lock(Workflow.id == workflow_id)
            # Asked behind the lock, by a statement that sees who was created before it.
            if row and Workflow.select().where((Workflow.id == workflow_id) & miscounted).exists():
                _count_children(self.drive, row, -row.ongoing_children)

        for row in self.access.repeat(functools.partial(list[Any], Workflow.select(Workflow.id).where(miscounted))):
            self.access.transact(functools.partial(recover, row.id))
        return {}

    def _progress(self, queue: str, priority: int) -> datetime:
        """How far a queue has come: what was put into it before this moment, with this priority, was taken out.

        That is the moment for which its first message of the priority was queued; now, if there is none. In a backlog
        of hours all is overdue, and queuing it again each minute would make it longer and longer.
        """
        reached = self.drive._now()
        if queue not in self.drive.queues:  # a deploy took it away
            return reached
        huey, ours = self.drive.queues[queue], self.drive._dispatch.tasks[queue].task_class
        try:
            pending = [task for task in self.access.repeat(lambda: huey.pending(limit=100)) if isinstance(task, ours)]
            first = next((task for task in pending if (task.priority or 0) <= priority), None)
            if first is None and len(pending) == 100:
                return EPOCH  # higher priorities are before it, and nobody knows what is behind those
            if first and (first.priority or 0) < priority:
                first = None
            later = self.access.repeat(lambda: huey.scheduled(limit=100))
            waiting = next((task for task in later if isinstance(task, ours)), None)
            for task in filter(None, (first, waiting)):
                due = task.eta and (task.eta.replace(tzinfo=timezone.utc) if huey.utc else task.eta.astimezone())
                reached = min(reached, max(_queued_at(task.id), due or _queued_at(task.id)))
        except Exception:  # its server is down, most likely: what is sent now fails too, is logged, and is sent again
            logger.exception("the queue %s cannot be read and is taken to be empty", queue)
            return self.drive._now()
        return reached

    def _clean_up(self) -> dict[str, int]:
        deleted = []
        for type_name, condition in self._types_over():
            retention = self._retention(type_name)
            if retention is None:
                continue
            is_old = Workflow.transitioned_at < self.drive._now() - retention
            is_free = SQL(_has_no_ongoing("id = t1.parent_id"))
            expired = SQL(condition) & (Workflow.type == type_name) & is_old & is_free
            for workflows in self._batches(Workflow.select(Workflow.id).where(expired), Workflow.transitioned_at):
                for some in peewee.chunked(workflows, MAX_LISTED):
                    began = time.monotonic()
                    deleted += self._delete([each.id for each in some], expired)
                    # Half of the time is the others': on SQLite, who waits for the lock looks for it now and then only.
                    time.sleep(min(1, time.monotonic() - began))
        return {
            "workflows_cleaned_up": sum(workflows for workflows, _ in deleted),
            "step_executions_cleaned_up": sum(executions for _, executions in deleted),
        }

    def _types_over(self) -> Iterator[tuple[str, str]]:
        """The types of workflows that are over, each with a condition for them."""
        for condition in self.access.dialect.over:
            for name in self.access.values(Workflow.select().where(SQL(condition)), Workflow.type, above=""):
                yield name, condition

    def _retention(self, type_name: str) -> timedelta | None:
        """For how long the workflows of a type are kept once they are over; None keeps them."""
        cls = _workflow_classes.get(type_name, Workflow)
        retention = getattr(cls, "delete_completed_after", self.drive.delete_completed_workflows_after)
        if retention is None:
            return None
        # The row of an occurrence is what tells that there was one.
        shortest = 2 * _catch_up(cls) if cls.recurs is not None else NO_WAIT
        return max(_duration(retention, f"{type_name}.delete_completed_after"), shortest)

    def _delete(self, ids: list[int], expired: Any) -> list[tuple[int, int]]:
        """Delete those of the workflows that are expired still; returns how many, and how many executions, in pairs."""

        def delete() -> tuple[int, int]:
            found = Workflow.select(Workflow.id, Workflow.ongoing_children).where(Workflow.id.in_(ids) & expired)
            locked = list(Workflow._locking(found))
            over = [each.id for each in locked]
            WorkflowSignal.delete().where(WorkflowSignal.workflow.in_(over)).execute()
            for orphans in _locked_children(Workflow.select(Workflow.id), _parents_among(locked)):
                Workflow.update(parent=None).where(Workflow.id.in_([each.id for each in orphans])).execute()
            executions = StepExecution.delete().where(StepExecution.workflow.in_(over)).execute()
            return Workflow.delete().where(Workflow.id.in_(over)).execute(), executions

        try:
            return [self.access.transact(delete)]
        except peewee.IntegrityError as error:  # rows of the application's refer to one of them
            if len(ids) > 1:
                return [pair for each in ids for pair in self._delete([each], expired)]
            logger.warning("workflow %s cannot be deleted: %s", ids[0], error)
            return []

    def _batches(self, query: Any, moment: Any) -> Iterator[list[Any]]:
        """The rows of a query, from the oldest on, in batches; each row once, whatever is done to it.

        :param moment: the column to go by; with the id, it is in an index over these rows.
        """
        key = moment.model.id
        query = query.select_extend(moment).order_by(moment, key).limit(self.drive.housekeeping_batch_size)
        page = query
        while rows := self.access.repeat(functools.partial(list[Any], page)):
            yield rows
            last_id, last = rows[-1].id, rows[-1].__data__[moment.name]
            page = query.where(self.access.dialect.is_behind(moment, key, last, last_id))


def _has_no_ongoing(relation: str) -> str:
    """Whether no ongoing workflow is in this relation to the one that is selected, as SQL."""
    # For `not exists`, MariaDB reads all ongoing workflows once, instead of looking into an index a few times.
    found = f"from geneva_drive_workflows beside where beside.{relation} and beside.state in {ONGOING}"
    return f"(select 1 {found} limit 1) is null"


# ==== Recurrence: workflows that are created by the clock =============================================================


class _Recurrence:
    """Creates the workflows of the classes that recur."""

    def __init__(self, drive: GenevaDrive) -> None:
        self.drive, self.access = drive, drive._access
        self.left_out: dict[str, datetime] = {}  # by type, the moment that the log tells of

    def look(self) -> None:
        """Create what is due of each class, unless it is there."""
        self.access.connect_worker()
        for cls in list(_workflow_classes.values()):
            if cls.recurs is not None and cls.steps:
                with _logged("%s recurs, and could not be looked at", cls.__name__):
                    if moment := _newest_moment(cls, self.drive._now()):
                        self._look_at(cls, moment)

    def _look_at(self, cls: type[Workflow], moment: datetime) -> None:
        for tries in range(TRANSACTION_TRIES):
            if not self.access.repeat(lambda: self._is_due(cls, moment)):
                return  # most checks end here, and lock nothing
            version = self.access.repeat(_Schema(self.drive).version)
            if self.access.transact(functools.partial(self._create, cls, moment, version)):
                return
            _give_way(tries)  # another one is at work; if it has stopped there, nobody waits for it until the next look

    def _create(self, cls: type[Workflow], moment: datetime, version: int) -> bool:
        """Create a workflow for the moment, if it is due still; False, if it is another process's turn.

        The index alone would let two processes, whose clocks differ, create two that overlap, a minute apart. The turn
        is the lock of the schema's row, which is there always.
        """
        if _SchemaVersion._lock(_SchemaVersion.version == version, skip_locked=True) is None:
            return False
        # A change, for REPEATABLE READ on PostgreSQL: a transaction with an older snapshot collides, and is repeated.
        _SchemaVersion._update_row({"version": version}, version=version)
        if self._is_due(cls, moment):
            start = _Start(cls, None)
            start.insert({**start.values(None, None), "occurs_at": moment})
        return True

    def _is_due(self, cls: type[Workflow], moment: datetime) -> bool:
        """Whether the class is to have a workflow for this moment, and has none yet."""
        of_class = Workflow.type == cls.workflow_type
        # At it, or later: the clock of a host may be ahead. One that is ahead by more does not count.
        at_or_after = Workflow.occurs_at.between(moment, moment + 2 * _catch_up(cls))
        if Workflow.select().where(of_class & at_or_after).exists():
            return False
        if cls.recurrences_overlap:
            return True
        # By the index of ongoing workflows: those that are over may be kept by the million.
        has_no_hero = Workflow.hero_type.is_null() & Workflow.hero_id.is_null()
        earlier = Workflow.select().where(of_class, ONGOING_ROWS, has_no_hero)
        ongoing = earlier.where(Workflow.occurs_at.is_null(False)).first()
        if ongoing and self.left_out.get(cls.workflow_type) != moment:
            self.left_out[cls.workflow_type] = moment
            fix = "it is created once that one is over, within recurrence_catch_up; recurrences_overlap = True has both"
            logger.warning("%s of %s is left out, as %r is ongoing: %s", cls.__name__, moment, ongoing, fix)
        return ongoing is None


def _catch_up(cls: type[Workflow]) -> timedelta:
    # From one look to the next it takes a minute, or a little more.
    return max(_duration(cls.recurrence_catch_up, f"{cls.__name__}.recurrence_catch_up"), 2 * A_MINUTE)


def _newest_moment(cls: Any, now: datetime) -> datetime | None:
    """The newest minute for which a class recurs, if it is within the catch-up.

    Of a local time that a change of the clock repeats, the first one counts. One that it skips is when the clock would
    have shown it unchanged: so each comes to pass once.
    """
    zone, minute = _zone(cls.recurrence_timezone), now.astimezone(timezone.utc).replace(second=0, microsecond=0)
    while minute > now - _catch_up(cls):
        # By the clock as it is, and as it was a day ago: no change takes longer than that.
        for offset in {each.astimezone(zone).utcoffset() for each in (minute, minute - A_DAY)}:
            local = (minute + cast(timedelta, offset)).replace(tzinfo=None)
            if local.replace(tzinfo=zone).astimezone(timezone.utc) == minute and cls.recurs(local):
                return minute
        minute -= A_MINUTE
    return None


# ==== Reports: whether all is sound, and how much there is of what ====================================================


class _Reports:
    """What is to be known of the tables."""

    def __init__(self, drive: GenevaDrive) -> None:
        self.drive, self.access = drive, drive._access

    def is_idle(self) -> bool:
        """See `GenevaDrive.is_idle()`."""
        # By way of executions that indexes hold: of a million finished or waiting workflows none is looked at. In one
        # statement, or between two of them a workflow might move from what is asked last to what was asked first.
        ((is_busy,),) = self.access.database.execute_sql(
            "select (select min(queue) from geneva_drive_step_executions where queue > '') is not null or exists ("
            "select 1 from geneva_drive_step_executions e join geneva_drive_workflows w on w.id = e.workflow_id"
            f" where e.state = '{IN_PROGRESS}' and w.state = '{PERFORMING}')"
        ).fetchall()
        return not is_busy

    def violations(self) -> list[str]:
        """See `GenevaDrive.doctor()`."""
        if problem := _Schema(self.drive).problem():
            return [problem]
        found = []
        for sentence, query in VIOLATIONS.items():
            rows = self.access.database.execute_sql(query.format(active=ACTIVE, ongoing=ONGOING)).fetchall()
            found += [sentence.format(*map(_as_text, row)) for row in rows]
        found += [each.problem for each in self._stranded_waits() if each.kind == "wait"]
        missing = [statement for part in _Schema(self.drive).parts() for statement in part()]
        return found + [f"the schema lacks: {statement}" for statement in missing]

    def stranded(self) -> Iterator[_Stranded]:
        """What ongoing workflows need and this code does not define; to be asked with new code, before its deploy."""
        for name, step_name, number in Workflow.undefined_steps_in_flight():
            removal = f"{step_name} = removed_step()" if step_name.isidentifier() else f"removed_step({step_name!r})"
            fix = f"keep the name, by @step(name={step_name!r}), or put {removal} in its place"
            kind, problem = "step", f"which the class does not define: {fix}"
            if name not in _workflow_classes:
                kind, fix = "class", "import it, or set workflow_type on its successor"
                problem = f"and no class defines that type: {fix}"
            yield _Stranded.of(kind, name, step_name, number, "stand", f"at the step {step_name!r}, {problem}")
        for name, hero_type, number in _count_ongoing(Workflow.select(), Workflow.type, Workflow.hero_type):
            if why := _hero_problem(hero_type):
                need = f"a hero of the type {hero_type!r}, but {why}"
                yield _Stranded.of("hero", name, hero_type, number, "need", need)
        yield from self._stranded_waits(of_defined_steps=True)
        pending = WorkflowSignal.select().join(Workflow).where(WorkflowSignal.consumed_at.is_null())
        for name, signal_name, number in _count_ongoing(pending, Workflow.type, WorkflowSignal.name):
            if name in _workflow_classes and signal_name not in _workflow_classes[name]._signal_names():
                fix = "keep such a step, or send them the signal by its new name and delete that of the old one"
                problem = f"the signal {signal_name!r}, which no step of the class waits for: {fix}"
                yield _Stranded.of("signal", name, signal_name, number, "keep", problem)

    def _stranded_waits(self, of_defined_steps: bool = False) -> Iterator[_Stranded]:
        """The executions that wait for a signal that their step, by now, does not wait for."""
        waiting = StepExecution.select().join(Workflow).where(StepExecution.state == SQL(f"'{WAITING}'"))
        columns = Workflow.type, StepExecution.step_name, StepExecution.waiting_for
        for name, step_name, signal_name, number in _count_ongoing(waiting, *columns):
            cls = _workflow_classes.get(name)
            definition = cls and cls._find(step_name)
            if cls is None or (definition.wait_for == signal_name if definition else of_defined_steps):
                continue
            kind, now = "wait", "no step of the class waits for"
            fix = "skip() the step for them, or pause() and resume() them after the deploy"
            if signal_name in cls._signal_names():
                kind, now = "changed wait", "that step does not wait for any more"
            if definition is None:
                fix = "pause() them, and resume_at() another step"
            fix = f"keep wait_for={signal_name!r}, or {fix}"
            problem = f"at the step {step_name!r} for the signal {signal_name!r}, which {now}: {fix}"
            yield _Stranded.of(kind, name, signal_name, number, "wait", problem)

    def metrics(self) -> list[Metric]:
        """See `GenevaDrive.stats()`."""
        now, count, kinds = self.drive._now(), peewee.fn.COUNT(SQL("*")), (Workflow.type, Workflow.state)
        late = SQL(f"t1.state = '{SCHEDULED}'") & (StepExecution.scheduled_for < now) & (Workflow.state == READY)
        first = peewee.fn.MIN(StepExecution.scheduled_for)
        ((overdue, oldest),) = StepExecution.select(count, first).join(Workflow).where(late).tuples()
        died = StepExecution.select(Workflow.type, count).join(Workflow).where(StepExecution.outcome == "recovered")
        recovered = dict(died.group_by(Workflow.type).tuples())
        waiting_for = Workflow.type, StepExecution.waiting_for
        waits = StepExecution.select(*waiting_for, count).join(Workflow).where(StepExecution.state == WAITING)
        states: dict[str, dict[str, int]] = {}
        for name, state, number in Workflow.select(*kinds, count).group_by(*kinds).tuples():
            states.setdefault(name, dict.fromkeys(WORKFLOW_STATES, 0))[state] = number
        metrics = []

        def add(name: str, value: float, **labels: str) -> None:
            metrics.append(Metric(f"geneva_drive_{name}", labels, value))

        for name, counts in sorted(states.items()):
            for state, number in counts.items():
                add("workflows", number, type=name, state=state)
            add("paused_ratio", counts[PAUSED] / (sum(counts[state] for state in ONGOING) or 1), type=name)
            add("recovered_steps", recovered.get(name, 0), type=name)
        for name, signal_name, number in sorted(waits.group_by(*waiting_for).tuples(), key=str):
            add("waiting_steps", number, type=name, signal=signal_name or "")  # that is, for children
        add("overdue_steps", overdue)
        add("oldest_overdue_seconds", (now - oldest).total_seconds() if oldest else 0)
        return sorted(metrics, key=lambda metric: metric.name)

    def paused_groups(self) -> list[PausedGroup]:
        """See `GenevaDrive.paused_groups()`."""
        kind = Workflow.type, Workflow.current_step_name, Workflow.reason
        columns = *kind, StepExecution.error_class_name, StepExecution.outcome, Workflow.id
        query = Workflow.select(*columns).join(StepExecution, on=IS_NEWEST)
        query = query.where(_is_in(PAUSED)).order_by(Workflow.id.desc()).limit(MAX_GROUPED)
        groups: dict[tuple[str, str, str], PausedGroup] = {}
        for name, step_name, reason, error, outcome, workflow_id in query.tuples():
            why = (error or "").rpartition(".")[2]
            if not why:
                # Of a reason, words with digits in them are left out: ids, amounts and dates would make many groups.
                beginning = re.sub(r"\S*\d\S*", "…", (reason or "")[: 5 * GROUPED_CHARS])[:GROUPED_CHARS]
                why = _why("" if outcome in FAILURES else A_PERSON, beginning)
            groups.setdefault((name, step_name, why), PausedGroup(name, step_name, why, [])).ids.append(workflow_id)
        return sorted(groups.values(), key=lambda each: (-len(each.ids), each))


#: What must not be: a sentence, and the one statement, which sees one state of the tables, for what goes into it.
VIOLATIONS = {
    "workflow {0} has {1} active executions": """
        select workflow_id, count(*) from geneva_drive_step_executions where state in {active}
        group by workflow_id having count(*) > 1""",
    "{1} {0} has {3} ongoing workflows of the type {2}": """
        select hero_id, hero_type, type, count(*) from geneva_drive_workflows
        where state in {ongoing} and not allow_multiple and hero_id is not null
        group by hero_id, hero_type, type having count(*) > 1""",
    "workflow {0} is {1}, but its execution {2} is {3}": """
        select w.id, w.state, e.id, e.state from geneva_drive_workflows w
        join geneva_drive_step_executions e on e.workflow_id = w.id where e.state in {active} and not (
            w.state = 'performing' and e.state = 'in_progress' or w.state = 'canceled' and e.state = 'in_progress'
            or w.state in ('ready', 'paused') and e.state in ('scheduled', 'waiting'))""",
    "workflow {0} is {1}, but no execution of it is active": """
        select w.id, w.state from geneva_drive_workflows w where w.state in ('ready', 'performing') and not exists (
            select 1 from geneva_drive_step_executions e where e.workflow_id = w.id and e.state in {active})""",
    "workflow {0} counts {1} executions, but its newest is number {2}": """
        select w.id, w.execution_count, max(e.number) from geneva_drive_workflows w
        left join geneva_drive_step_executions e on e.workflow_id = w.id
        group by w.id, w.execution_count having max(e.number) is null or max(e.number) <> w.execution_count""",
    "workflow {0} is {1}, but stands at the step {2}": """
        select id, state, current_step_name from geneva_drive_workflows
        where (state in {ongoing}) = (current_step_name is null)""",
    "execution {0} is {1}, but the outcome {2} and the end {3} do not fit": """
        select id, state, outcome, finished_at from geneva_drive_step_executions
        where (state in {active}) = (outcome is not null) or (state in {active}) = (finished_at is not null)""",
    "execution {0} is {1} in a workflow that is {2}, but in the queue {3}": """
        select e.id, e.state, w.state, e.queue from geneva_drive_step_executions e
        join geneva_drive_workflows w on w.id = e.workflow_id where e.queue is not null and not (
            w.state = 'ready' and (e.state = 'scheduled' or e.state = 'waiting' and e.times_out_at is not null))""",
    "execution {0} is {1} in a workflow that is ready, but in no queue": """
        select e.id, e.state from geneva_drive_step_executions e
        join geneva_drive_workflows w on w.id = e.workflow_id where w.state = 'ready' and (
            e.state = 'scheduled' or e.state = 'waiting' and e.times_out_at is not null) and e.queue is null""",
    "execution {0} is in the queue {1}, but has the priority {2} and is due at {3}": """
        select id, queue, priority, due_at from geneva_drive_step_executions
        where queue is not null and (priority is null or due_at is null)""",
    "execution {0} belongs to the workflow {1}, which is gone": """
        select e.id, e.workflow_id from geneva_drive_step_executions e
        where not exists (select 1 from geneva_drive_workflows w where w.id = e.workflow_id)""",
    "execution {0} waits for the signal {1}, which is there": """
        select e.id, e.waiting_for from geneva_drive_step_executions e
        join geneva_drive_workflows w on w.id = e.workflow_id and w.state = 'ready'
        where e.state = 'waiting' and exists (
            select 1 from geneva_drive_signals s where s.workflow_id = e.workflow_id and s.name = e.waiting_for
            and s.consumed_at is null and s.id > coalesce(e.signal_id, 0))""",
    "workflow {0} is {1}, but has a reason to stand still: {2}": """
        select id, state, reason from geneva_drive_workflows where reason is not null
        and state in ('ready', 'performing') and not pause_requested""",
    "execution {0} waits for a signal, but is to ask for its wait first": """
        select id from geneva_drive_step_executions where state = 'waiting' and asks_wait""",
    "execution {0} waits for no signal, and for no child": """
        select e.id from geneva_drive_step_executions e
        join geneva_drive_workflows w on w.id = e.workflow_id and w.state = 'ready'
        where e.state = 'waiting' and e.waiting_for is null and not exists (
            select 1 from geneva_drive_workflows c where c.parent_id = w.id and c.state in {ongoing})""",
    "workflow {0} counts {1} ongoing children, but has {2}": """
        select w.id, coalesce(w.ongoing_children, 0), count(*) from geneva_drive_workflows w
        join geneva_drive_workflows c on c.parent_id = w.id and c.state in {ongoing}
        group by w.id, w.ongoing_children having count(*) > coalesce(w.ongoing_children, 0)""",
    "signal {0} belongs to the workflow {1}, which is gone": """
        select s.id, s.workflow_id from geneva_drive_signals s
        where not exists (select 1 from geneva_drive_workflows w where w.id = s.workflow_id)""",
}


class _Stranded(NamedTuple):
    """What ongoing workflows of a type need, how many they are, and what is wrong: a sentence that says what to do."""

    kind: str  # "class", "step", "hero", "wait" (for a signal of no step), "changed wait" or "signal"
    type: str
    name: str
    workflows: int
    problem: str

    @classmethod
    def of(cls, kind: str, type_name: str, name: str, number: int, verb: str, problem: str) -> _Stranded:
        who = f"{number} ongoing workflow{'s' * (number > 1)} of {type_name} {verb}{'s' * (number == 1)}"
        return cls(kind, type_name, name, number, f"{who} {problem}")


class PausedGroup(NamedTuple):
    """Paused workflows that are alike; see `GenevaDrive.paused_groups()`."""

    type: str
    step_name: str
    #: The class of the error that paused them, without its module; else how the reason begins, behind "a person" where
    #: `Workflow.pause()` was called.
    why: str
    #: Theirs, the newest first.
    ids: list[int]


class Metric(NamedTuple):
    """A number of `GenevaDrive.stats()`, called as Prometheus has it."""

    name: str
    labels: dict[str, str]
    value: float


def _job_id(moment: datetime) -> str:
    """A unique id for a message; it begins with the time at which it was queued, in microseconds since 1970."""
    return f"{int(moment.timestamp() * 1_000_000)}-{os.urandom(16).hex()}"


def _queued_at(job_id: str) -> datetime:
    return datetime.fromtimestamp(int(job_id.partition("-")[0]) / 1_000_000, timezone.utc)


# ==== A room for each database ========================================================================================


class _Dialect:
    """What differs between databases. The base is what a server without peculiarities would do."""

    #: The sections of the schema file that are for it, besides those for every database.
    section = ""
    #: The types of columns, by the `kind` of the library's fields, where Peewee's own will not do.
    column_types: Mapping[str, str] = {}
    #: Stores text that is compared byte by byte.
    store_exact: Callable[[str | None], Any] = staticmethod(lambda text: text)
    #: What makes an insertion pass over rows that are there.
    ignore = "NOTHING"
    #: Conditions for the workflows that are over, each of which an index holds.
    over: Sequence[str] = (f"state in {OVER}",)
    #: Whether a move is one statement; whether it is, if no execution begins by it.
    is_one_statement, updates_two = False, False
    #: Joins executions with their workflows: by the ids of the latter, whatever the planner expects.
    in_order: Any = peewee.JOIN.INNER
    #: Whether a reference is added along with its column: SQLite has a trigger, and MySQL would lock all who write
    #: until it has copied the table.
    adds_references = False
    #: Whether a change of the schema commits the transaction around it.
    ddl_commits = False
    #: Before and after a change of the schema: for one process at a time, and for no one to be held up. A change waits
    #: until no transaction is open on its table, and everybody else waits behind it: so it is told to give up after a
    #: second, and is tried again. Else heartbeats would stop behind a transactional step that takes minutes.
    schema_lock: Sequence[str] = ()
    schema_unlock: Sequence[str] = ()
    #: Patterns of the SQLSTATEs or numbers of errors, or of what SQLite says instead: of transactions that failed
    #: because of others at the same time, and of tables or columns that are not there.
    transient = missing = "(?!)"

    def begin(self, database: Database, turn: Any) -> Any:
        """A transaction, or a savepoint inside the caller's."""
        return database.atomic()

    def execute(self, database: Database, sql: str, parameters: list[Any]) -> Any:
        """Execute a statement that is executed often."""
        return database.execute_sql(sql, parameters)

    def exactly(self, field: Any) -> Any:
        """A text column, to be compared byte by byte."""
        return field

    def locking(self, query: Any, database: Database, skip_locked: bool) -> Any:
        """A query that locks its rows, or passes over those that are locked."""
        return query.for_update("FOR UPDATE SKIP LOCKED" if skip_locked else True)

    def is_behind(self, first: Any, second: Any, one: Any, two: Any) -> Any:
        """A condition for what comes behind a place, in the order of two columns."""
        return peewee.Tuple(first, second) > (first.db_value(one), second.db_value(two))

    def is_transient(self, error: BaseException) -> bool:
        """Whether a transaction failed because of others at the same time, as by a deadlock, and may be repeated."""
        return self._means(error, self.transient)

    def is_about_schema(self, error: BaseException) -> bool:
        """Whether a statement names a table or a column that the database does not have."""
        return self._means(error, self.missing)

    def _means(self, error: BaseException, pattern: str) -> bool:
        return any(re.fullmatch(pattern, str(each), re.DOTALL) for each in _codes(error))

    # -- moves ------------------------------------------------------------------------------------------------------

    def create(self, database: Database, workflow: dict[str, Any], begins: dict[str, Any]) -> tuple[int, int]:
        """Insert a workflow and its first execution; returns their ids."""
        workflow_id = Workflow._insert_row(workflow)
        return workflow_id, StepExecution._insert_row({**begins, "workflow": workflow_id})

    def move(self, database: Database, move: _Move) -> _Moved | None:
        """Carry out a move; see `_Access.move()`."""
        if not Workflow._update_row(move.changes, **move.fence):
            return None
        if not StepExecution._update_row(move.columns, **move.execution):
            raise _ClaimLost  # which rolls back the other one
        return StepExecution._insert_row(move.begins) if move.begins else move.execution["id"], None

    def takes_along(self) -> bool:
        """Whether `move()` can claim what is due next with the end of a step; see `_Move.takes`."""
        return False

    def take(self, drive: GenevaDrive, queue: str, priorities: tuple[int, ...]) -> StepExecution | None:
        """Claim the execution that is due first in a queue; an empty look takes no lock.

        Of several threads that look at once, each begins with another one; who met a process at it looks further.

        :param priorities: those to look for, the highest first.
        """
        looking, me = drive.queues[queue].storage.looking, threading.get_ident()
        passed, met = len(looking), 0
        looking.add(me)
        try:
            for _ in range(TRANSACTION_TRIES):
                look = functools.partial(self._first_due, drive, (queue, priorities), passed, met)
                execution = drive._access.repeat(look)
                if execution is None and not passed:
                    return None
                if execution and self.is_free(drive, execution) and _claim(drive, execution, is_patient=False):
                    return execution
                passed, met = (passed + 1, met + 1) if execution else (0, met)
            return None
        finally:
            looking.discard(me)

    def is_free(self, drive: GenevaDrive, execution: StepExecution) -> bool:
        """Whether nobody has locked the execution's workflow; True where nobody can, or it cannot be told."""
        return True

    def _first_due(self, drive: GenevaDrive, places: _Places, passed: int, met: int) -> StepExecution | None:
        """The execution that is due first, but for so many that are passed, and its workflow.

        :param met: how many were found before that could not be claimed.
        """
        values = self._look(drive, places, passed)
        return StepExecution._from_joined(values) if values else None

    def _look(self, drive: GenevaDrive, places: _Places, passed: int, select: Any = lambda query: query) -> Any:
        """The columns of both, or what is selected in their place; None if there is none."""
        access, (queue, priorities) = drive._access, places
        built = access.statement(
            access.database,
            ("first due", select, priorities, passed),
            lambda: _due_now(select(StepExecution._joined()), priorities).offset(SQL(str(passed))),
        )
        return built.execute({}, {"queue": queue, "now": drive._now()}).fetchone()


def _due_now(query: Any, priorities: tuple[int, ...]) -> Any:
    """What is due first, of the highest priority of which anything is. Each priority is asked for by itself: so all is
    read in the order of an index, and of what is due later, or is in no queue, nothing.

    :param query: of executions and their workflows.
    """
    *higher, lowest = priorities
    priority = SQL(str(lowest))
    if higher:
        # Not whether anything is due: PostgreSQL takes that for likely where much is queued, and reads it in any order.
        cases = [(_is_first_due(SQL(str(each))), SQL(str(each))) for each in higher]
        priority = peewee.Case(None, cases, priority)
    is_sound = (Workflow.state == SQL(f"'{READY}'")) & (Workflow.execution_count == StepExecution.number)
    is_due = _is_here(StepExecution, priority) & (StepExecution.due_at <= _now_blank())
    query = query.where(is_due, is_sound)
    return query.order_by(StepExecution.due_at, StepExecution.id).limit(SQL("1"))


def _is_first_due(priority: Any) -> Any:
    """A condition, with blanks, that the first execution of this priority in a queue is due."""
    beside = StepExecution.alias("beside")
    first = beside.select(peewee.fn.MIN(beside.due_at)).where(_is_here(beside, priority))
    return peewee.Expression(first, "<=", _now_blank())


def _is_here(model: Any, priority: Any) -> Any:
    """A condition, with a blank, for what is in a queue, of this priority."""
    return (model.queue == _Blank.value(cast(Any, StepExecution.queue), "queue", 1)) & (model.priority == priority)


def _now_blank() -> Any:
    return _Blank.value(cast(Any, StepExecution.due_at), "now", 1)


class _Postgresql(_Dialect):
    section = "postgresql"
    column_types = {"moment": "TIMESTAMP"}
    is_one_statement, adds_references = True, True
    schema_lock = (
        "select pg_advisory_xact_lock(hashtext('geneva_drive_schema'))",
        "select set_config('geneva_drive.lock_timeout', current_setting('lock_timeout'), true)",
        "set local lock_timeout = '1s'",
    )
    schema_unlock = ("select set_config('lock_timeout', current_setting('geneva_drive.lock_timeout'), true)",)
    transient = "40001|40P01|55P03"  # serialization failure, deadlock detected, lock timeout
    missing = "42P01|42703"

    def __init__(self) -> None:
        #: The statements that a connection of psycopg2's has prepared; None once it turned out to lead to several.
        self.prepared: weakref.WeakKeyDictionary[Any, set[str] | None] = weakref.WeakKeyDictionary()

    def execute(self, database: Database, sql: str, parameters: list[Any]) -> Any:
        # Planning one of these takes longer than all the rest: psycopg 3 has them prepared by itself, psycopg2 has not.
        connection = database.connection()
        if database.in_transaction() or not type(connection).__module__.startswith("psycopg2") or "%%" in sql:
            return database.execute_sql(sql, parameters)
        known = self.prepared.setdefault(connection, set())
        if known is None:
            return database.execute_sql(sql, parameters)
        prepare, execute = _prepared(sql)
        try:
            if prepare not in known:
                database.execute_sql(prepare)
                known.add(prepare)
            return database.execute_sql(execute, parameters)
        except peewee.DatabaseError as error:
            # It is not known there; or it is, by another client's work; or a column is of another type by now.
            if _codes(error)[0] not in ("26000", "42P05", "0A000"):
                raise
            # Most likely a pooler is between, which gives each transaction another connection.
            self.prepared[connection] = None
        return database.execute_sql(sql, parameters)

    def takes_along(self) -> bool:
        return True

    # Each of the next three is one statement, whose parts each wait for what the one before returns.

    def create(self, database: Database, workflow: dict[str, Any], begins: dict[str, Any]) -> tuple[int, int]:
        # Each parameter costs the driver and the server: nulls are none, and one moment in many columns is one.
        as_created = [name for name, value in begins.items() if value == workflow["created_at"]]
        key = ("create", *_conditions(workflow), "then", *begins, "as created", *as_created)
        built = _drive()._access.statement(database, key, lambda: self._creating(workflow, begins, as_created))
        return cast("tuple[int, int]", built.execute(workflow, begins).fetchone())

    @staticmethod
    def _creating(workflow: dict[str, Any], begins: dict[str, Any], as_created: Iterable[str]) -> Any:
        new = _blanks(Workflow, workflow, 0)
        new |= {Workflow._meta.fields[name]: SQL("null") for name, value in workflow.items() if value is None}
        made = Workflow.insert(new).returning(Workflow.id, Workflow.created_at)
        first = _blanks(StepExecution, begins, 1) | {StepExecution.workflow: SQL("made.id")}
        first |= {StepExecution._meta.fields[name]: SQL("made.created_at") for name in as_created}
        begun = StepExecution.insert_from(peewee.Select([SQL("made")], [*first.values()]), [*first])
        returned = begun.returning(StepExecution.workflow, StepExecution.id)
        return _with({"made": made, "begun": returned}, "select * from begun")

    def move(self, database: Database, move: _Move) -> _Moved | None:
        found, begins = (_conditions(move.fence), _conditions(move.execution)), move.begins or {}
        fence, claim, drive = move.fence, dict[str, Any](), _drive()
        queue, priorities = move.takes or ("", ())
        if priorities:
            fence, claim = {**fence, "queue": queue, "now": drive._now()}, _claim_columns(drive._now())
        key = ("move", *move.changes, "where", *found[0], "then", *move.columns, "where", *found[1], "then", *begins)
        built = drive._access.statement(database, (*key, priorities), lambda: self._moving(move, claim))
        row = built.execute(move.changes, fence, move.columns, move.execution, begins, claim, TAKEN).fetchone()
        return row and (row[0], StepExecution._from_joined(row[1:]) if any(row[1:]) else None)

    def _moving(self, move: _Move, claim: dict[str, Any]) -> Any:
        fence = _found_by(Workflow, _conditions(move.fence), 1)
        found = Workflow.select(Workflow.id).where(*fence).for_update("FOR NO KEY UPDATE")
        ended = StepExecution.update(_blanks(StepExecution, move.columns, 2)).where(
            *_found_by(StepExecution, _conditions(move.execution), 3), SQL("exists (select 1 from found)")
        )
        ended = ended.returning(StepExecution.id, StepExecution.workflow)
        parts = {"found": found, "ended": ended}
        parts["moved"] = self._moved("ended", _blanks(Workflow, move.changes, 0), [Workflow.id])
        rest = "select ended.id from ended, moved"
        if move.begins:
            new = _blanks(StepExecution, move.begins, 4)
            begun = StepExecution.insert_from(peewee.Select([SQL("moved")], [*new.values()]), [*new])
            parts["begun"], rest = begun.returning(StepExecution.id), "select id from begun"
        if move.takes:
            parts.update(self._taking(move.takes[1], claim, 5, "exists (select 1 from moved)"))
            rest = f"select * from ({rest}) done left join taken on true left join owner on true"
        return _with(parts, rest)

    @staticmethod
    def _moved(ended: str, changes: dict[Any, Any], returned: Iterable[Any]) -> Any:
        is_ended = Workflow.id == SQL(f"(select workflow_id from {ended})")
        return Workflow.update(changes).where(is_ended).returning(*returned)

    def take(self, drive: GenevaDrive, queue: str, priorities: tuple[int, ...]) -> StepExecution | None:
        while row := drive._access.repeat(functools.partial(self._taken, drive, queue, priorities)):
            if row[0] is not None:
                return StepExecution._from_joined(row)
            # Another one got it between our look, which is at how things stood then, and the lock.
        return None

    def _taken(self, drive: GenevaDrive, queue: str, priorities: tuple[int, ...]) -> Any:
        """The rows that are claimed; nulls, if the first that was free is another's by now; None if nothing is due."""
        now, access = drive._now(), drive._access
        claim = _claim_columns(now)

        def query() -> Any:
            rest = "select taken.*, owner.* from due left join taken on true left join owner on true"
            return _with(self._taking(priorities, claim, 2, "true"), rest)

        built = access.statement(access.database, ("take", priorities), query)
        return built.execute({}, {"queue": queue, "now": now}, claim, TAKEN).fetchone()

    def _taking(self, priorities: tuple[int, ...], claim: dict[str, Any], place: int, condition: str) -> Any:
        """The parts of a statement that claim what is due first, of blanks for the claim at `place`."""
        query = StepExecution.select(StepExecution.id, StepExecution.workflow).join(Workflow).where(SQL(condition))
        due = _due_now(query, priorities).for_update("FOR NO KEY UPDATE OF t2 SKIP LOCKED")
        # As SQL by itself: else its tables would be called as in the parts before it.
        due = SQL(*_drive()._access.database.get_sql_context().sql(due).query())
        # Written so that of the indexes the primary key alone fits: without statistics, another one is taken.
        is_queued = peewee.fn.COALESCE(StepExecution.due_at, SQL("'infinity'")) <= _now_blank()
        is_queued &= peewee.fn.COALESCE(StepExecution.queue, "") != ""
        is_due = StepExecution.id == SQL("(select id from due)")
        taken = StepExecution.update(_blanks(StepExecution, claim, place)).where(is_due & is_queued)
        owner = self._moved("taken", _blanks(Workflow, TAKEN, place + 1), Workflow._meta.sorted_fields)
        return {"due": due, "taken": taken.returning(*StepExecution._meta.sorted_fields), "owner": owner}


def _with(parts: dict[str, Any], rest: str) -> Any:
    """One statement of several by their names, and what is selected from them."""
    named = [peewee.NodeList((SQL(f"{name} as ("), query, SQL(")"))) for name, query in parts.items()]
    return peewee.NodeList((SQL("with"), peewee.CommaNodeList(named), SQL(rest)))


@functools.cache
def _prepared(sql: str) -> tuple[str, str]:
    """What prepares a statement, and what executes it then."""
    # Behind a pooler, what others have prepared by this name is the same.
    name, numbers = f"geneva_drive_{hashlib.sha256(sql.encode()).hexdigest()[:24]}", itertools.count(1)
    prepare = f"prepare {name} as {re.sub('%s', lambda _: f'${next(numbers)}', sql)}"
    return prepare, f"execute {name} ({', '.join(['%s'] * sql.count('%s'))})"


class _Sqlite(_Dialect):
    section = "sqlite"
    transient = "database (table )?is locked.*"  # the second, of a shared cache
    missing = "no such (table|column).*|table .* has no column.*"

    def begin(self, database: Database, turn: Any) -> Any:
        # A transaction that reads before it writes fails at once if another one wrote in between.
        return _InTurn(database, turn)

    def takes_along(self) -> bool:
        return len(_heartbeat.beating) == 1  # of several workers, two that always end a step would do a third less

    def move(self, database: Database, move: _Move) -> _Moved | None:
        moved = super().move(database, move)
        return (moved[0], self._take_along(database, move.takes)) if moved and move.takes else moved

    def _take_along(self, database: Database, places: _Places) -> StepExecution | None:
        """Claim the execution that is due first in a queue, in the transaction under way: nobody else can write."""
        drive, execution = _drive(), None
        with contextlib.suppress(ValueError):  # a row that cannot be read is not to undo the end of the other step
            execution = self._first_due(drive, places, 0, 0)
        is_ours = execution and _claim(drive, execution, carry_out=functools.partial(self.move, database))
        return execution if is_ours else None

    def take(self, drive: GenevaDrive, queue: str, priorities: tuple[int, ...]) -> StepExecution | None:
        # Who would claim gives way to who ends a step, for 30 ms at most: else workers wait for each other's turns, and
        # two or four of them do a third less. With the turn, none looks at what another one is about to claim. To ask
        # each millisecond would keep the others from their work: four workers do a seventh less.
        turn, has_turn = drive._access.turn, False
        for _ in range(10):
            if has_turn := turn.acquire(blocking=False):
                break
            time.sleep(0.003)
        try:
            return super().take(drive, queue, priorities)
        finally:
            if has_turn:
                turn.release()

    def locking(self, query: Any, database: Database, skip_locked: bool) -> Any:
        return query  # a transaction holds the one write lock anyway


class _Mysql(_Dialect):
    """MySQL and MariaDB."""

    section = "mysql"
    column_types = {
        # The server's default character set may be latin1, and its collation ignores case.
        "name": f"VARCHAR({MAX_NAME_CHARS}) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
        "exact": f"VARBINARY({4 * MAX_NAME_CHARS})",  # every collation that the two share ignores trailing spaces
        "text": "LONGTEXT CHARACTER SET utf8mb4",  # TEXT ends at 64 KB
        "moment": "DATETIME(6)",
    }
    # As text, it would be kept in the connection's character set.
    store_exact = staticmethod(lambda text: text and text.encode())
    ignore = "IGNORE"
    over = tuple(f"state = '{state}'" for state in OVER)  # one index holds either, and would sort both together
    updates_two, ddl_commits = True, True
    in_order = "STRAIGHT_JOIN"  # where most workflows are due, MariaDB would read and sort all of them at each look
    schema_lock = (
        f"select get_lock('geneva_drive_schema', {SCHEMA_PATIENCE_SECONDS})",
        "set @geneva_drive_lock_wait_timeout = @@lock_wait_timeout, lock_wait_timeout = 1",
    )
    schema_unlock = (
        "commit",  # a version that is recorded is to be seen by the next one who gets the lock
        "set lock_wait_timeout = @geneva_drive_lock_wait_timeout",
        "select release_lock('geneva_drive_schema')",
    )
    # Lock wait timeout, deadlock; MariaDB, for a snapshot that is too old: the row, the table has changed since; MySQL,
    # for a look at the indexes of a table that another one changes: it was skipped.
    transient = "1205|1213|1020|1412|1684"
    missing = "1146|1054"

    def exactly(self, field: Any) -> Any:
        return field.cast("binary")

    def locking(self, query: Any, database: Database, skip_locked: bool) -> Any:
        return super().locking(query, database, skip_locked and self._skips_locked(database))

    @staticmethod
    def _skips_locked(database: Database) -> bool:
        version = database.server_version
        return version >= (8, 0, 1) and not (10,) <= version < (10, 6)

    def is_free(self, drive: GenevaDrive, execution: StepExecution) -> bool:
        # Else the claim would wait for who has locked it. MariaDB tells that of the claim itself.
        database = drive._access.database
        if not self._skips_locked(database) or self._is_mariadb(database):
            return True

        def probe() -> Any:
            found = Workflow.select(Workflow.id).where(Workflow.id == _Blank.value(cast(Any, Workflow.id), "id"))
            return self.locking(found, database, skip_locked=True)

        built = drive._access.statement(database, "probe", probe)
        return drive._access.repeat(lambda: built.execute({"id": execution.workflow_id}).fetchone()) is not None

    def _first_due(self, drive: GenevaDrive, places: _Places, passed: int, met: int) -> StepExecution | None:
        if met > 4 and self._skips_locked(drive._access.database):  # there may be any number; a few cost less passed
            values = self._look(drive, places, 0, _as_one_text_unless_locked)
        else:
            values = self._look(drive, places, passed, _as_one_text)
        if values and values[0] is None:  # it would be longer than max_allowed_packet
            return super()._first_due(drive, places, passed, met)
        return StepExecution._from_joined(_of_one_text(values[0])) if values else None

    @staticmethod
    def _is_mariadb(database: Database) -> bool:
        return database.server_version >= (10,)

    def is_behind(self, first: Any, second: Any, one: Any, two: Any) -> Any:
        return (first > one) | ((first == one) & (second > two))  # no index is used to compare pairs

    def move(self, database: Database, move: _Move) -> _Moved | None:
        # Both rows in one statement: a round trip takes longer than what it does.
        found = (_conditions(move.fence), _conditions(move.execution))
        hurries = not move.is_patient and not database.in_transaction() and self._is_mariadb(database)
        key = ("move", hurries, *move.changes, "where", *found[0], "and", *move.columns, "where", *found[1])
        built = _drive()._access.statement(database, key, lambda: self._moving(move, hurries))
        try:
            cursor = built.execute(move.changes, move.fence, move.columns, move.execution)
        except peewee.OperationalError as error:
            if hurries and _codes(error)[1] == 1205:  # another one has locked a row
                return None
            raise
        if not database.rows_affected(cursor):
            return None
        return StepExecution._insert_row(move.begins) if move.begins else move.execution["id"], None

    @staticmethod
    def _moving(move: _Move, hurries: bool) -> Any:
        assignments = []
        for alias, model, names, place in (("w", Workflow, move.changes, 0), ("e", StepExecution, move.columns, 2)):
            for column, blank in _blanks(model, names, place).items():
                assignments.append(peewee.NodeList((SQL(f"{alias}.{column.column_name} ="), blank)))
        conditions = _found_by(Workflow.alias("w"), _conditions(move.fence), 1)
        conditions += _found_by(StepExecution.alias("e"), _conditions(move.execution), 3)
        tables = "update geneva_drive_workflows w straight_join geneva_drive_step_executions e on e.workflow_id = w.id"
        where = functools.reduce(operator.and_, conditions)
        at_once = "set statement innodb_lock_wait_timeout = 0 for " if hurries else ""
        begin = SQL(f"{at_once}{tables} set")
        return peewee.NodeList((begin, peewee.CommaNodeList(assignments), SQL("where"), where))


def _as_one_text(query: Any) -> Any:
    """A query whose columns come as one JSON text: PyMySQL reads that in a third of the time."""
    # Bytes as such, MySQL makes base64 of, and MariaDB garbles the text beside them. As text, they would come in the
    # connection's character set, which may lack some of it.
    fn = peewee.fn
    columns = [fn.JSON_ARRAY(fn.HEX(each)) if isinstance(each, _ExactField) else each for each in query._returning]
    return query.select(fn.JSON_ARRAY(*columns))


def _as_one_text_unless_locked(query: Any) -> Any:
    return _as_one_text(query).for_update("FOR UPDATE SKIP LOCKED")


def _of_one_text(text: str) -> list[Any]:
    """The columns of a row of such a query."""
    return [each[0] and bytes.fromhex(each[0]) if isinstance(each, list) else each for each in json.loads(text)]


DIALECTS: dict[type[Database], _Dialect | None] = {
    CockroachDatabase: None,  # a PostgresqlDatabase by its class alone
    SqliteDatabase: _Sqlite(),
    PostgresqlDatabase: _Postgresql(),
    MySQLDatabase: _Mysql(),
}


def _dialect(database: Database) -> _Dialect:
    """What is particular to a database; an UnsupportedDatabaseError, if that is not known."""
    kind: Any = type(database)
    dialect = _dialect_of(kind)
    if dialect is None:
        raise UnsupportedDatabaseError(database)
    return dialect


@functools.cache
def _dialect_of(kind: type[Database]) -> _Dialect | None:
    return next((dialect for base, dialect in DIALECTS.items() if issubclass(kind, base)), None)


# ==== Drivers: what an error or a connection tells ====================================================================


def _original(error: Any) -> Any:
    """The driver's error under Peewee's; None under one that Peewee has raised itself."""
    while isinstance(error, peewee.PeeweeException):
        error = getattr(error, "orig", None)
    return error


def _codes(error: BaseException) -> tuple[Any, Any]:
    """What a driver tells of an error: its SQLSTATE, and the server's own number, or SQLite's text."""
    original: Any = _original(error)
    # PEP 249 names the base of a driver's errors so; an error of the application's may hold anything.
    if not any(each.__name__ == "Error" for each in type(original).__mro__):
        return None, None
    state = getattr(original, "pgcode", None) or getattr(original, "sqlstate", None)
    code = getattr(original, "errno", None) or next(iter(getattr(original, "args", ())), None)
    return state, code.rpartition("] ")[2] if isinstance(code, str) else code  # CySqlite puts the statement before it


def _give_way(tries: int) -> None:
    """Wait, so that those who collided do not meet again: at random, and longer with each try."""
    time.sleep(random.uniform(0, 0.005 * 2 ** min(tries, 7)))


def _check_class(database: Any) -> None:
    """Refuse, with a ConfigurationError, a database whose class tells that it cannot do what the library needs."""
    if any(each.__name__ == "SqliteQueueDatabase" for each in type(database).__mro__):
        raise ConfigurationError("SqliteQueueDatabase has no transactions: use SqliteDatabase, with a timeout")
    if getattr(database, "_server_side_cursors", False):
        fix = "leave it out, and wrap the queries that need them in playhouse.postgres_ext.ServerSide()"
        raise ConfigurationError(f"server_side_cursors=True lets rows be read while others are written: {fix}")


def _is_in_transaction(connection: Any) -> bool:
    """Whether a driver's connection is in a transaction, one that Peewee does not know of included."""
    status = getattr(getattr(connection, "info", None), "transaction_status", None)  # psycopg
    if status is not None:
        return bool(status)
    if hasattr(connection, "server_status"):  # PyMySQL; bit 1 of the protocol's status flags
        return bool(connection.server_status & 1)
    return bool(getattr(connection, "in_transaction", False))


def _is_dead(connection: Any) -> bool:
    """Whether a driver knows that its connection is gone; asks no server."""
    return bool(getattr(connection, "closed", False)) or getattr(connection, "open", True) is False


def _address(database: Any) -> tuple[Any, Any]:
    """What two Database objects for one database have in common."""
    return str(database.database), database.connect_params


def _place(database: Any) -> str:
    """How to call a database in a message."""
    actual = _unproxied(database)
    return f"the database {str(actual.database)!r}" if actual else "a database that is not initialized"


def _is_gone(connection: Any) -> bool:
    """Whether a connection is gone, as an error suggests; asks the server where the driver keeps no account of it."""
    return _is_dead(connection) or not getattr(connection, "is_connected", lambda: True)()  # mysql-connector


def _is_private(database: Database) -> bool:
    """Whether a connection of another thread would be another database, or this very connection."""
    return _is_in_memory(database) or not database.thread_safe


def _close_for_good(database: Database) -> None:
    """Close the connection of a thread that is ours: from a pool of SQLite's, no other thread could use it."""
    is_sqlite = isinstance(database, SqliteDatabase)
    (getattr(database, "manual_close", database.close) if is_sqlite else database.close)()


def _is_in_memory(database: Database) -> bool:
    """Whether a database of SQLite's is in memory, and not one that connections share."""
    name = str(database.database)
    in_memory = ":memory:" in name or "mode=memory" in name
    return isinstance(database, SqliteDatabase) and in_memory and "cache=shared" not in name


def _unproxied(database: Any) -> Any:
    """The database that a DatabaseProxy stands for, None while there is none; any other one as it is."""
    return database.obj if isinstance(database, peewee.Proxy) else database


class _InTurn:
    """A transaction of SQLite's that begins when no other thread of this process is in one.

    It would find the database locked, and look again after waits that grow to a tenth of a second: with two workers, a
    third of the time goes by so. A second of waiting for a turn is enough: then it is on with the database's own lock.

    A class, for contextlib's way writes to the error that it passes on, which a frozen dataclass does not take.
    """

    def __init__(self, database: Database, turn: Any) -> None:
        self.database, self.turn, self.has_turn = database, turn, False
        self.transaction = database.atomic("IMMEDIATE")

    def __enter__(self) -> Any:
        self.has_turn = not self.database.in_transaction() and self.turn.acquire(timeout=1)
        try:
            return self.transaction.__enter__()
        except BaseException:
            self._end()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self.transaction.__exit__(*error)
        finally:
            self._end()

    def _end(self) -> None:
        if self.has_turn:
            self.turn.release()


class _Savepoint(peewee._savepoint):
    """A savepoint that is known as long as it is open, and whose rollback takes along what was to be done after commit.

    Peewee's own are on no stack, and what was registered within them runs though it was rolled back.
    """

    def _begin(self) -> None:
        super()._begin()
        self.registered = len(self.db._state.commit_callbacks)

    def rollback(self, begin: bool = True) -> None:
        callbacks = self.db._state.commit_callbacks
        # The application's own are between it and Peewee.
        callbacks[self.registered :] = [
            each for each in callbacks[self.registered :] if getattr(each, "func", None) is not _do_after_commit
        ]
        super().rollback(begin)

    def __enter__(self) -> Any:
        entered, self.among = super().__enter__(), _open_savepoints(self.db)
        self.among.append(self)
        return entered

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            if self in self.among:  # with those in it: the database has ended them too
                del self.among[self.among.index(self) :]


def _do_after_commit(work: Callable[[], object]) -> None:
    with _logged("failed after a commit; housekeeping makes up for it"):
        work()


def _track_savepoints(database: Database | None) -> None:
    """Have a database's `atomic()` use savepoints that are known; not where it has a kind of its own."""
    if database is not None and type(database).savepoint is Database.savepoint:
        database.savepoint = functools.partial(_Savepoint, database)


def _open_savepoints(database: Database) -> list[Any]:
    """Those in the innermost transaction: they are kept with it, and are forgotten with it if the connection is."""
    transaction = database.top_transaction()
    return [] if transaction is None else transaction.__dict__.setdefault("_geneva_drive_savepoints", [])


def _depth(database: Database) -> int:
    """How many transactions and savepoints are open on this thread's connection."""
    transactions = database._state.transactions
    return sum(1 + len(getattr(each, "_geneva_drive_savepoints", ())) for each in transactions)


# ==== Processes, and the heartbeat of each ============================================================================

_inherited_connections: list[Any] = []
_forking = threading.local()


def _before_fork() -> None:
    # What reaches the child before it has handlers of its own has to wait: Python would drop it there.
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    global _heartbeat
    is_of_worker = bool(_heartbeat.workers)
    _heartbeat = _Heartbeat()  # its thread did not come along
    _this_process.cache_clear()
    _host.cache_clear()  # the parent may have given it a namespace of its own
    try:
        if _current_drive is not None:
            _current_drive._dispatch.after_fork(is_of_worker)
            _current_drive._access.after_fork()
    finally:
        _after_fork()  # a child that signals do not reach would be the worse


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


@functools.cache
def _host() -> str | None:
    """What sees process ids and their start ticks as this process does: a boot of a kernel, and namespaces in it.

    A container has process ids of its own, a time namespace a time of its own since the boot. None where these cannot
    be told apart, as they can on Linux.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        kinds = ["pid", *(["time"] if Path("/proc/self/ns/time").exists() else [])]  # since Linux 5.6
        namespaces = [str(Path(f"/proc/self/ns/{kind}").stat().st_ino) for kind in kinds]
        is_own_proc = Path("/proc/self").readlink().name == str(os.getpid())  # not that of another namespace
    except OSError:
        return None
    return "/".join([boot, *namespaces]) if is_own_proc else None


def _process_start(pid: int) -> str | None:
    """When a process of this host began, in ticks since the boot; None if it is over, though nobody waited for it."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    is_over = state in "ZX" and int(fields[16]) < 2  # the first of its threads may end before the others
    return None if is_over else fields[18]  # proc_pid_stat(5): the fields 3, 20 and 22


@functools.cache
def _this_process() -> str | None:
    """A name that no other process has or will have, or None where there is none."""
    host, pid = _host(), os.getpid()
    return host and f"{host}/{pid}/{_process_start(pid)}"


def _is_process_gone(name: str | None) -> bool:
    """Whether a process is known to be no more. Of those of other hosts, only their heartbeats tell."""
    host = _host()
    if not host or not name or not name.startswith(f"{host}/"):
        return False
    try:
        pid, start = name[len(host) + 1 :].split("/")
        os.kill(int(pid), 0)  # asks whether it is there; /proc may hide what belongs to others
        return _process_start(int(pid)) != start
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False


class _Heartbeat:
    """Renews the heartbeat of the executions that this process performs, from one background thread.

    The thread keeps a connection of its own as long as there are workers of a consumer, or an attempt that takes longer
    than most do: so the heartbeat goes on though others take all connections.
    """

    def __init__(self) -> None:
        #: Not their executions: one that waits on may be claimed by another thread before this one has turned away.
        self.beating: set[_Attempt] = set()
        self.workers: set[int] = set()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.hurry, self.nap = threading.Event(), 0.0
        self.database: Database | None = None  # that the thread is connected to
        self.beaten, self.connected = -math.inf, threading.Event()
        self.is_leaving, self.left = False, threading.Event()
        self.lead, self.ran_ahead = time.time() - time.monotonic(), -math.inf

    def add(self, attempt: _Attempt) -> None:
        """Renew the heartbeat of an attempt, until it is removed."""
        if attempt in self.beating:
            return
        self._see_to_thread()
        self.beating.add(attempt)  # what is in there without being performed would never be recovered
        silence = attempt.drive._now() - cast(datetime, attempt.execution.heartbeat_at)
        moment = self._moment()
        is_old = silence.total_seconds() > moment  # the claim has waited for others' locks
        if is_old:
            self.beaten = -math.inf
        if is_old or moment < self.nap:  # the thread sleeps for longer than it is to
            self.hurry.set()

    def remove(self, attempt: _Attempt) -> None:
        self.beating.discard(attempt)
        if self.database and not self.beating and not self.workers:
            self.hurry.set()  # to disconnect: a test may be about to drop the database

    def enter(self) -> None:
        """A worker of a consumer starts in this thread; the connection is opened before it takes the last one."""
        self.workers.add(threading.get_ident())
        self._see_to_thread()
        self.hurry.set()
        if self.thread:
            self.connected.wait(1)

    def exit(self) -> None:
        """A worker of a consumer ends in this thread."""
        self.workers.discard(threading.get_ident())
        self.hurry.set()

    def performs(self, execution_id: int) -> bool:
        """Whether this process performs an execution."""
        return any(each.execution.id == execution_id for each in list(self.beating))

    def is_silence_fatal(self) -> bool:
        """Whether an old heartbeat means that its process is dead: not just after the wall clock has jumped ahead.

        It does so when a host wakes from sleep, and the living need time to beat again. The monotonic clock, which
        stands still in a sleep, tells of the jump.
        """
        now, before = time.monotonic(), self.lead
        self.lead = time.time() - now
        if self.lead - before > self._interval():
            self.ran_ahead = now
        return now - self.ran_ahead > 2 * self._interval()

    def _see_to_thread(self) -> None:
        with self.lock:
            if self.thread is None and not _is_private(_drive()._access.database):
                self.thread = threading.Thread(target=self._run, name="geneva-drive-heartbeat", daemon=True)
                self.thread.start()

    def _interval(self) -> float:
        return (_drive().stuck_in_progress_threshold - self._ahead()).total_seconds() / 4

    def _moment(self) -> float:
        """After how many seconds an attempt is one of the long ones, and how often the thread looks for these."""
        return min(1, self._interval() / 4)

    def _ahead(self) -> timedelta:
        """By how much a process that exits dates its heartbeats back, so that its steps are recovered soon."""
        return max(NO_WAIT, _drive().stuck_in_progress_threshold - EXIT_TIME) if self.is_leaving else NO_WAIT

    def _run(self) -> None:
        failures = 0
        while True:
            self._sleep()
            if not self._is_connection_needed():
                self._disconnect()
            elif not self.database or time.monotonic() - self.beaten >= self._interval():
                done = self.left if self.is_leaving else self.connected
                try:
                    self._beat()
                    failures = 0
                    done.set()
                except Exception as error:
                    self.beaten = -math.inf
                    if not _drive()._access.is_transient(error):  # some drivers never tell that a connection is gone
                        self._disconnect()
                    level, failures = logging.DEBUG if failures else logging.WARNING, failures + 1
                    logger.log(level, "the heartbeat failed and is tried again each second: %s", error)

    def _is_connection_needed(self) -> bool:
        long_ago = time.monotonic() - self._moment()
        return bool(self.workers or self.is_leaving or any(each.claimed <= long_ago for each in list(self.beating)))

    def _sleep(self) -> None:
        self.nap = threading.TIMEOUT_MAX  # first: what is added from now on wakes it
        if self.beating or self.workers or self.database:
            self.nap = self._moment()
        self.hurry.wait(self.nap)
        self.hurry.clear()

    def _beat(self) -> None:
        drive = _drive()
        database = drive._access.database
        if not _is_private(database):
            if self.database is not database:  # there is another drive
                self._disconnect()
            database.connect(reuse_if_open=True)
            self.database = database
            self._renew(drive)
            self.beaten = time.monotonic()

    def _renew(self, drive: GenevaDrive) -> None:
        ids = [each.execution.id for each in list(self.beating)]
        if not ids:  # in time to open another connection, should this one be gone
            drive._access.database.execute_sql("select 1")
            return
        with drive._access.begin():
            mine = StepExecution.id.in_(ids) & (StepExecution.state == IN_PROGRESS)
            # What a checkpoint in a body's transaction has locked must not keep the others waiting.
            free = StepExecution._locking(StepExecution.select(StepExecution.id).where(mine), skip_locked=True)
            beating = [each.id for each in free]
            now = drive._now() - self._ahead()
            StepExecution.update(heartbeat_at=now).where(StepExecution.id.in_(beating)).execute()

    def _disconnect(self) -> None:
        database, self.database = self.database, None
        if database:
            with contextlib.suppress(peewee.PeeweeException):
                _close_for_good(database)

    def leave(self) -> None:
        """As the process exits with steps under way: let housekeeping on any host take them over soon.

        The thread goes on beating, for a body may go on until the interpreter is gone, which other hooks may delay.
        """
        if self.beating and self.thread:
            self.is_leaving, self.beaten = True, -math.inf
            self.hurry.set()
            self.left.wait(EXIT_TIME.total_seconds())  # the database may be away, and the exit is not to hang on it


_heartbeat = _Heartbeat()
atexit.register(lambda: _heartbeat.leave())


# ==== The schema ======================================================================================================

SCHEMA_FILE = Path(__file__).with_name("geneva_drive_schema.sql")

#: Raised by each release that changes the tables.
SCHEMA_VERSION = 1


class _SchemaVersion(_Record):
    """A row for each version of the schema that `create_tables()` has brought the database to; the highest counts."""

    version: peewee.Field[int] = peewee.IntegerField(primary_key=True)

    class Meta:
        table_name = "geneva_drive_schema"


class _Schema:
    """The tables of a drive, and what they lack."""

    def __init__(self, drive: GenevaDrive) -> None:
        self.drive, self.db, self.dialect = drive, drive._access.database, drive._access.dialect

    def complete(self, models: Sequence[Any]) -> None:
        """See `GenevaDrive.create_tables()`."""
        parts: list[Callable[[], list[Any]]] = [functools.partial(self._lacking_model, each) for each in models]
        parts += self.parts()
        # Always looked at, however new the version: an index may have been dropped. The first look takes no lock;
        # SQLite has its own, and many that open a new file at once lock each other out.
        if not self.drive._access.transact(lambda: any(part() for part in parts), PATIENCE_SECONDS):
            return
        if self.dialect.ddl_commits and self.db.in_transaction():
            problem = "create_tables() has tables to change, which commits the transaction around it"
            raise GenevaDriveError(f"{problem}: call it outside of transactions")
        for part in parts:  # each by itself: who locked two tables at once would deadlock with those at work
            self.drive._access.transact(functools.partial(self._add, part), SCHEMA_PATIENCE_SECONDS)

    def parts(self) -> Iterator[Callable[[], list[str]]]:
        """What the schema is made of, in the order of making it: each part returns the statements that it lacks."""
        for model in (*MODELS, _SchemaVersion):
            yield functools.partial(self._lacking_columns, model)
        for section in ("every database", self.dialect.section):
            for statement in _schema_statements(section):
                yield functools.partial(self._lacking_statement, statement)
        yield self._lacking_version

    def _add(self, part: Callable[[], list[Any]]) -> None:
        """Execute what a part lacks, one process at a time."""
        for statement in self.dialect.schema_lock:
            self.db.execute_sql(statement)
        try:
            for statement in part():
                statement() if callable(statement) else self.db.execute_sql(statement)
        finally:
            with contextlib.suppress(peewee.PeeweeException):  # after a failure, the rollback undoes the lock too
                for statement in self.dialect.schema_unlock:
                    self.db.execute_sql(statement)

    def _lacking_model(self, model: Any) -> list[Callable[[], None]]:
        """Of the application's: what Peewee would create anew is left alone, for its lock waits for who writes."""
        is_lacking = not model.table_exists()
        if not is_lacking and self.db.safe_create_index:
            # PostgreSQL cuts names at 63 characters, Peewee at 64.
            there = {each.name[:63] for each in self.db.get_indexes(model._meta.table_name, model._meta.schema)}
            indexes = [each for each in model._meta.fields_to_index() if isinstance(each, peewee.Index)]
            is_lacking = any(each._name[:63] not in there for each in indexes)
        return [model.create_table] * is_lacking

    def _lacking_columns(self, model: Any) -> list[str]:
        if not model.table_exists():
            return [model._schema._create_table().query()[0]]
        known = {column.name for column in self.db.get_columns(model._meta.table_name)}
        lacking = [each for each in model._meta.sorted_fields if each.column_name not in known]
        return [_add_column(model, each, self.dialect.adds_references) for each in lacking]

    def _lacking_version(self) -> list[str]:
        # A newer version stays: what it needs is there, and what this code needs is there too.
        is_older = self.version() < SCHEMA_VERSION
        return [f"insert into {_SchemaVersion._meta.table_name} (version) values ({SCHEMA_VERSION})"] * is_older

    def _lacking_statement(self, statement: str) -> list[str]:
        if made := re.match(r"create (?:unique )?index (?P<name>\w+) on (\w+)", statement):
            there = [each.name for each in self.db.get_indexes(made[2])]
        elif made := re.match(r"create trigger (?P<name>\w+)", statement):
            triggers = "select name from sqlite_master where type = 'trigger'"
            there = [name for (name,) in self.db.execute_sql(triggers).fetchall()]
        elif made := re.match(r"alter table (\w+) add column (?P<name>\w+)", statement):
            there = [each.name for each in self.db.get_columns(made[1])]
        else:
            problem = f"{SCHEMA_FILE.name} holds a statement that cannot be applied twice"
            raise GenevaDriveError(f"{problem}: {statement}")
        return [] if made["name"] in there else [statement]

    def version(self) -> int:
        """The version that the database is at; 0 where there are no tables, or not all of them."""
        newest = _SchemaVersion.select(peewee.fn.MAX(_SchemaVersion.version))
        return (_SchemaVersion.table_exists() and newest.scalar()) or 0

    def problem(self) -> str | None:
        """Why this code cannot work on the database, if it cannot: the tables are missing, or older than the code."""
        version, database = self.version(), _place(self.db)
        if not version:
            return f"{database} has no tables of GenevaDrive: call drive.create_tables() once, if it is the right one"
        if version < SCHEMA_VERSION:
            needed = f"this version of GenevaDrive needs version {SCHEMA_VERSION}"
            return f"the schema of {database} is at version {version}, {needed}: call drive.create_tables()"
        return None


def _schema_statements(section: str) -> list[str]:
    """The statements of one section of the schema file, comments removed."""
    try:
        text = SCHEMA_FILE.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise GenevaDriveError(f"{SCHEMA_FILE} is missing: the module needs it at its side") from error
    parts = re.split(r"^-- section: (.+)$", text, flags=re.MULTILINE)
    bodies = [body for names, body in zip(parts[1::2], parts[2::2]) if section in names.strip().split(", ")]
    statements = re.split(r";\s*$", re.sub(r"--.*", "", "".join(bodies)), flags=re.MULTILINE)
    return [" ".join(each.split()) for each in statements if each.strip()]


def _add_column(model: Any, column: peewee.Field, with_reference: bool) -> str:
    ctx = model._schema._create_context()
    ctx.literal("alter table ").sql(model).literal(" add column ").sql(column.ddl(ctx))
    if isinstance(column, peewee.ForeignKeyField) and with_reference:
        ctx.literal(", add ").sql(column.foreign_key_constraint())
    return cast(str, ctx.query()[0])


# ==== Words for people: logs, labels, charts ==========================================================================


class _WorkflowLogger(logging.LoggerAdapter):  # type: ignore[type-arg]
    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        about = cast("dict[str, Any]", self.extra)
        kwargs["extra"] = {**about, **(kwargs.get("extra") or {})}
        step_name = f" step {about['step_name']}" if about["step_name"] else ""
        execution = f" execution {about['execution_id']}" if about["execution_id"] else ""
        prefix = f"{about['workflow_type']} {about['workflow_id']} of {about['hero']}{step_name}{execution}"
        return f"[{prefix.replace('%', '%%')}] {msg}", kwargs


def _hero_label(hero_type: str | None, hero_id: str | None, **_: Any) -> str:
    return f"{hero_type} {hero_id}" if hero_id is not None else "no hero"


A_PERSON = "a person"  # whom a workflow waits for that `Workflow.pause()` has paused


def _why(cause: str, reason: str | None) -> str:
    return ": ".join(filter(None, (cause, reason)))


#: Of durations, the largest first, in milliseconds.
UNITS = {"d": 86_400_000, "h": 3_600_000, "min": 60_000, "s": 1000, "ms": 1}


def _span(duration: timedelta, parts: int | None = None) -> str:
    """A duration for people, "2 d 3 h"; its `parts` largest parts, or the nearest one."""
    left, words = abs(duration) // timedelta(milliseconds=1), []
    if parts == 1:  # two days that have just begun are not one
        size = next((size for size in UNITS.values() if left >= size), 1)
        left = round(left / size) * size
    for unit, size in UNITS.items():
        number, left = divmod(left, size)
        words += [f"{number} {unit}"] if number else []
    return " ".join(words[:parts]) or "0 ms"


def _name_of(function: Any) -> str:
    """How a condition or a handler is called; a lambda has no name to speak of."""
    name = function if isinstance(function, str) else getattr(function, "__name__", None)
    return (name or str(function)).replace("<lambda>", "…")


def _flowchart(cls: type[Workflow]) -> str:
    lines, last = ["flowchart TD", _mermaid_node("start", "([{}])", cls.__name__)], "start"
    for number, each in enumerate(cls.steps, 1):
        notes = [_waits_note(each)] if each._waits else []
        notes += [f"skip if {_name_of(each.skip_if)}"] if each.skip_if else []
        notes += ["transactional"] if each.transactional else []
        notes += ["resumable"] if each.resumable else []
        notes += map(_policy_note, each.policies)
        wait = f'|"{_mermaid_safe(_wait_note(each.wait))}"|' if each.wait else ""
        lines.append(_mermaid_node(f"{last} -->{wait} step{number}", "[{}]", each.name, *notes))
        last = f"step{number}"
    lines.append(_mermaid_node(f"{last} --> finished", "([{}])", "finished"))
    conditions, policies = cls._blueprint.cancel_ifs, cls._blueprint.policies
    if conditions:
        lines.append(_mermaid_node("conditions", "[{}]", "before each step: cancel if", *conditions))
        lines.append(_mermaid_node("conditions -.-> canceled", "([{}])", "canceled"))
    if policies:
        lines.append(_mermaid_node("policies", "[{}]", "in every step", *map(_policy_note, reversed(policies))))
    return "\n".join(lines)


def _wait_note(wait: Any) -> str:
    return _span(wait) if isinstance(wait, timedelta) else _name_of(wait).replace("…", "computed")


def _waits_note(definition: StepDefinition) -> str:
    limit = "" if definition.timeout is None else f", after {_span(definition.timeout)} {definition.on_timeout}"
    return f"wait for {definition.wait_for or 'children'}{limit}"


def _policy_note(policy: ExceptionPolicy) -> str:
    kinds = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in policy.matching or ()) or "error"
    if isinstance(policy, _HandlerPolicy):
        return f"on {kinds}: {_name_of(policy.handler)}"
    limit = "" if policy.max_reattempts is None else f" {policy.max_reattempts} times, then {policy.terminal_action}"
    return f"on {kinds}: {policy.action}{limit if policy.action == 'reattempt' else ''}"


def _mermaid_node(node: str, shape: str, *lines: str) -> str:
    return f"    {node}" + shape.format(f'"{"<br/>".join(map(_mermaid_safe, lines))}"')


def _mermaid_safe(line: str) -> str:
    # Names may hold anything printable: what could be Mermaid's, HTML's or Markdown's goes by its number.
    def by_number(found: re.Match[str]) -> str:
        return "".join(f"#{ord(each)};" for each in found[0])

    return re.sub(r"[^\w ,:…]|\b_+|_+\b", by_number, line)


# ==== Help for tests ==================================================================================================


class TestHelpers:
    """Runs workflows in a test, step by step, ignoring waits: a mixin for unittest.TestCase, or an object by itself.

    No consumer needs to run. All of it works inside a transaction that the test rolls back, and in an asynchronous
    test; of both at once, see `StepExecution.execute()`.
    """

    __test__ = False  # pytest: collect the classes that mix it in, not the mixin

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__test__ = True

    def speedrun_workflow(self, workflow: Workflow, max_iterations: int = 100, raise_errors: bool = True) -> None:
        """Run the steps until the workflow is finished, canceled or paused, or waits for a signal or children.

        :raises AssertionError: if it is none of that after `max_iterations` steps.
        :raises Exception: a step's error, if it paused or canceled the workflow and `raise_errors` is true.
        """
        self._refresh(workflow)
        for _ in range(max_iterations):
            if self._stands_still(workflow):
                return
            self.perform_next_step(workflow, raise_errors)
        self._assert(self._stands_still(workflow), workflow, f"it is not over after {max_iterations} steps")

    def perform_next_step(self, workflow: Workflow, raise_errors: bool = True) -> None:
        """Run the scheduled step, due or not.

        :raises AssertionError: if none is scheduled, or the workflow is not ready.
        """
        execution = workflow.execution_history.where(StepExecution.state == SCHEDULED).get_or_none()
        self._assert(execution is not None, workflow, f"no step is scheduled{self._waits_note(workflow)}")
        self._perform(workflow, execution, raise_errors)

    def perform_step_inline(self, workflow: Workflow, step_name: str, raise_errors: bool = True) -> None:
        """Run one step out of turn: what is scheduled is canceled, and the workflow goes on from there."""
        drive = _drive()

        def move() -> StepExecution:
            row, active = _lock_with_active(workflow.id)
            self._assert(row.state in (READY, PAUSED), workflow, "it is neither ready nor paused")
            return _moved(drive, row, active, None, step_name)

        self._perform(workflow, drive._access.transact(move), raise_errors)

    def travel(
        self, workflow: Workflow, duration: timedelta | float, max_iterations: int = 100, raise_errors: bool = True
    ) -> None:
        """Move `drive.clock` forward, and run what falls due of the workflow on the way, each step at its own time.

        The clock goes on from there; where a step's error is raised, it stands still at the time of that step. With
        unittest it is put back at the end of the test; elsewhere, make a drive or set `drive.clock` in each test.

        :param duration: a timedelta or seconds.
        :raises AssertionError: if a step is still due after `max_iterations` steps.
        :raises Exception: a step's error, if it paused or canceled the workflow and `raise_errors` is true.
        """
        drive, total = _drive(), _duration(duration, "travel(): duration")
        clock, moment = drive.clock, drive.clock()
        end = moment + total
        if hasattr(self, "addCleanup"):
            self.addCleanup(setattr, drive, "clock", clock)
        drive.clock = lambda: moment  # it stands still on the way: what is due at the very end is not to be late for it
        for left in range(max_iterations, -1, -1):
            self._refresh(workflow)
            execution = workflow.execution_history.where(StepExecution.state.in_(TO_CLAIM)).get_or_none()
            due = execution and execution._due
            if workflow.state != READY or due is None or due > end:
                drive.clock = lambda: clock() + total
                return
            moment = max(moment, due)
            self._assert(left, workflow, f"a step is due still after {max_iterations} steps")
            self._perform(workflow, execution, raise_errors, heeds_wait=True)

    def assert_workflow_state(self, workflow: Workflow, state: str) -> None:
        """:raises AssertionError: if the workflow is not in `state`."""
        self._refresh(workflow)
        self._assert(workflow.state == state, workflow, f"expected it to be {state}")

    def assert_step_executed(self, workflow: Workflow, step_name: str, state: str = COMPLETED) -> None:
        """:raises AssertionError: if no execution of the step ended in `state`."""
        found = workflow.execution_history.where(StepExecution.step_name == step_name, StepExecution.state == state)
        self._assert(found.count(), workflow, f"expected an execution of {step_name} that is {state}")

    def assert_waiting_for(self, workflow: Workflow, signal_name: str | None) -> None:
        """:raises AssertionError: if the workflow does not wait for that signal (None: for children), or is paused."""
        self._refresh(workflow)
        found = workflow.execution_history.where(StepExecution.state == WAITING).get_or_none()
        is_right = workflow.state == READY and found is not None and found.waiting_for == signal_name
        what = f"the signal {signal_name}" if signal_name else "children"
        self._assert(is_right, workflow, f"expected it to wait for {what}")

    def assert_next_step(
        self, workflow: Workflow, step_name: str, due: datetime | timedelta | float | None = None
    ) -> None:
        """Check which step is scheduled, or waits, and for when.

        :param due: an aware datetime, or a timedelta or seconds from now, within a second; of a step that waits for a
            signal, its time limit. None leaves the time open.
        :raises AssertionError: if it is another one, or another time.
        """
        self._refresh(workflow)
        found = workflow.execution_history.where(StepExecution.state.in_(TO_CLAIM)).get_or_none()
        what = f"expected {step_name} to be scheduled"
        self._assert(found is not None and found.step_name == step_name, workflow, what)
        if due is not None:
            moment, actual = _moment(due, _drive()._now(), "assert_next_step(): due"), found._due
            is_right = actual is not None and abs(actual - moment) <= timedelta(seconds=1)
            self._assert(is_right, workflow, f"{what} for {moment}, not for {actual}")

    def _perform(
        self, workflow: Workflow, execution: StepExecution, raise_errors: bool, heeds_wait: bool = False
    ) -> None:
        try:
            done = execution._execute(heeds_wait)
        except BaseException as error:
            if raise_errors or _ends_process(error):
                raise
        else:
            problem = f"its step {execution.step_name} could not be performed{self._waits_note(workflow)}"
            self._assert(done, workflow, problem)
        finally:
            self._refresh(workflow)

    def _stands_still(self, workflow: Workflow) -> bool:
        return workflow.state not in (READY, PERFORMING) or bool(self._waits_note(workflow))

    def _waits_note(self, workflow: Workflow) -> str:
        execution = workflow.execution_history.where(StepExecution.state == WAITING).get_or_none()
        if execution is None:
            return ""
        name = execution.waiting_for
        fix = f"call signal({name!r})" if name else "for its children: run those in workflow.children"
        return f": {execution.step_name} waits; {fix}, or travel() beyond its timeout"

    def _refresh(self, workflow: Workflow) -> None:
        workflow._take_over(Workflow.get_by_id(workflow.id))
        workflow.__dict__.pop("_hero", None)

    def _assert(self, condition: object, workflow: Workflow, message: str) -> None:
        if condition:
            return
        self._refresh(workflow)
        lines = [f"{workflow._label} is {workflow.state}: {message}. Its executions:"]
        for each in workflow.execution_history:
            why = f"{each.error_class_name}: {each.error_message}" if each.error_class_name else each.reason or ""
            lines.append(f"  {each.number:>3}  {each.step_name:<30} {each.state:<12} {each.outcome or '':<12}  {why}")
        raise AssertionError("\n".join(lines))


# ==== Command line ====================================================================================================


def _of_type(name: str) -> Any:
    if name not in _workflow_classes and Workflow.select().where(Workflow.type == name).exists():
        return Workflow.type == name  # of a class that is gone
    cls = _class_of(name)
    return Workflow.type.in_([each for each, other in _workflow_classes.items() if issubclass(other, cls)])


def _of_hero(hero: str) -> Any:
    hero_type, colon, hero_id = hero.partition(":")
    if not colon:
        raise ConfigurationError(f"--hero {hero}: it must be TYPE:ID, such as User:7")
    return (Workflow.hero_type == hero_type) & (Workflow.hero_id == hero_id)


def _of_error(text: str) -> Any:
    name = StepExecution.error_class_name
    named = peewee.fn.LOWER(name).contains(text.lower()) | name.contains(text)  # SQLite lowers ASCII alone
    shown = name.is_null(False) & Workflow.reason.contains(text)  # as WHY has it, `KeyError: 'cents'`
    return named | StepExecution.error_message.contains(text) | shown


def _of_wait(signal_name: str) -> Any:
    # Among the active ones: literals, or SQLite would not see that an index holds them.
    return SQL(f"t2.state in {ACTIVE} and t2.state = '{WAITING}'") & (StepExecution.waiting_for == signal_name)


def _of_age(age: timedelta) -> Any:
    begun = StepExecution.started_at, StepExecution.waits_since, StepExecution.created_at
    moment = Workflow.created_at.db_value(_drive()._now() - age)
    return peewee.fn.COALESCE(Workflow.transitioned_at, *begun) <= moment


def _duration_of(text: str) -> timedelta:
    if not re.fullmatch(r"(\s*\d+\s*(d|h|min|s|ms))+\s*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 2d, 90min or 1h30min")
    parts = re.findall(r"(\d+)\s*([a-z]+)", text)
    return _duration(sum(float(each) * UNITS[unit] for each, unit in parts) / 1000, "it", argparse.ArgumentTypeError)


def _moment_of(text: str) -> datetime:
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(re.sub("Z$", "+00:00", text))  # which Python 3.10 does not read
        if moment.tzinfo:
            return moment
    raise argparse.ArgumentTypeError(f"{text!r} is no moment such as 2026-03-01T12:00Z, or with +01:00 for Z")


def _class_of(name: str) -> type[Workflow]:
    if name not in _workflow_classes:
        raise ConfigurationError(f"no workflow class is called {name!r}: use {', '.join(_workflow_classes)}")
    return _workflow_classes[name]


# What selects workflows: arguments, and the condition, on a workflow and its newest execution, for a value of each.
_SELECTIONS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "--state": ({"choices": WORKFLOW_STATES, "help": "those in this state"}, _is_in),
    "--type": ({"metavar": "CLASS", "help": "those of this class and its subclasses"}, _of_type),
    "--hero": ({"metavar": "TYPE:ID", "help": "those of this hero, such as User:7"}, _of_hero),
    "--step": ({"metavar": "NAME", "help": "those at this step"}, lambda name: Workflow.current_step_name == name),
    "--error": ({"metavar": "TEXT", "help": "those that failed last with this in `Class: message`"}, _of_error),
    "--why": ({"metavar": "TEXT", "help": "those with this in their reason"}, Workflow.reason.contains),
    "--waiting-for": ({"metavar": "SIGNAL", "help": "those that wait for this signal"}, _of_wait),
    "--older-than": ({"type": _duration_of, "metavar": "2h", "help": "those that stand so for longer"}, _of_age),
    "--parent": ({"type": int, "metavar": "ID", "help": "its children"}, lambda parent: Workflow.parent == parent),
}
# What is asked of a newest execution.
_OF_NEWEST = ("id", "state", "outcome", "waiting_for", "scheduled_for", "times_out_at", "started_at", "reattempts")
# The calls on many workflows, each with the arguments that it alone takes.
_CALLS: dict[str, tuple[str, ...]] = {
    "resume": ("--at STEP", "--reason"),
    **dict.fromkeys(("skip", "pause", "cancel"), ("--reason",)),
    "reschedule": ("--in", "--at MOMENT", "--as-declared"),
}
_MANY = ("ids", *_SELECTIONS, "--dry-run", "--json")
_COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "worker": ("run steps until SIGTERM or SIGINT, then drain", ("--workers", "--queue", "--shutdown-timeout")),
    "list": ("list workflows, the newest first", (*_SELECTIONS, "--limit", "--json")),
    "show": ("show a workflow, its attempts over time with their errors, and what to do next", ("id", "--json")),
    **{call: (f"{call} workflows, by id or selected", (*_MANY, *own)) for call, own in _CALLS.items()},
    "signal": ("send a workflow a signal", ("id", "signal", "--payload", "--key", "--json")),
    "housekeeping": ("delete what is over, recover what died, queue again what is overdue", ("--json",)),
    "stats": ("count workflows by class and state, the paused ones by step and reason, and overdue steps", ("--json",)),
    "doctor": ("check over the tables what must always hold", ("--deploy", "--json")),
    "graph": ("print a class as a Mermaid flowchart", ("name",)),
}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "id": {"type": int, "metavar": "ID", "help": "the workflow's id"},
    "ids": {"type": int, "metavar": "ID", "nargs": "*", "help": "ids of workflows"},
    "name": {"metavar": "CLASS", "help": "a workflow class"},
    "signal": {"metavar": "NAME", "help": "the signal's name"},
    "--payload": {"metavar": "JSON", "default": "null", "help": "its payload, such as '{\"paid\": true}'"},
    "--key": {"metavar": "TEXT", "help": "its idempotency key: sent again, it changes nothing"},
    **{name: argument for name, (argument, _) in _SELECTIONS.items()},
    "--reason": {"metavar": "TEXT", "help": "why, for those who look at it later"},
    "--at STEP": {"metavar": "STEP", "help": "go on with this step, also where it is over"},
    "--in": {"type": _duration_of, "metavar": "2d", "help": "so long from now: 2d, 90min, 1h30min"},
    "--at MOMENT": {"type": _moment_of, "metavar": "MOMENT", "help": "then: 2026-03-01T12:00Z"},
    "--as-declared": {"action": "store_true", "help": "as its class has it by now"},
    "--limit": {"type": int, "default": 50, "metavar": "N", "help": "how many at most (default: 50)"},
    "--deploy": {"action": "store_true", "help": "check instead what this code would strand if it were deployed"},
    "--dry-run": {"action": "store_true", "help": "only say what would be done"},
    "--json": {"action": "store_true", "help": "print JSON, for programs"},
    "--workers": {"type": int, "default": 1, "metavar": "N", "help": "threads for each queue (default: 1)"},
    "--queue": {"action": "append", "metavar": "NAME", "help": "serve this one; may be repeated (default: all)"},
    "--shutdown-timeout": {"type": float, "metavar": "S", "help": "seconds that draining may take (default: no limit)"},
}
# The colours of states and of the marks of a timeline.
_COLORS = {"!": 31, "failed": 31, "recovered": 31, "paused": 33, "█": 32, "success": 32, "finished": 32, "ready": 36}
_COLORED = re.compile(rf"[!█]|\b(?:{'|'.join(filter(str.isalpha, _COLORS))})\b")


def main(argv: list[str] | None = None) -> int:
    """The command line, `APP COMMAND ...`; see the chapter Operating of the manual.

    :param argv: the arguments; None takes the process's.
    :returns: the exit code: 0, 1 (the operation failed) or 2 (usage).
    """
    prog = "geneva-drive" if Path(sys.argv[0]).stem == "geneva-drive" else f"python -m {__name__}"
    parser = argparse.ArgumentParser(prog, description="Look after the workflows of an application.")
    parser.add_argument("--version", action="version", version=f"GenevaDrive {__version__}")
    parser.add_argument("app", metavar="APP", help="module:attribute of its GenevaDrive; `module` means module:drive")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (description, arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        for argument in arguments:
            command.add_argument(argument.partition(" ")[0], **_ARGUMENTS[argument])
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names need not fit the terminal's encoding
    try:
        options = parser.parse_args(argv)
        status = _CommandLine(_load(options.app), options, f"{prog} {options.app}").run()
        sys.stdout.flush()
        return status
    except SystemExit as left:
        if isinstance(left.code, int):  # argparse has said why
            return left.code
        raise
    except BrokenPipeError:  # the reader has seen enough; what Python still flushes must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (peewee.PeeweeException, OverflowError) as error:
        problem, status = f"the database refused: {error}", 1
    except (GenevaDriveError, KeyboardInterrupt) as error:
        is_usage = isinstance(error, (ConfigurationError, UnknownQueueError))
        problem, status = str(error) or "interrupted", 1 + is_usage
    sys.stderr.write(f"{prog}: {_clean(problem)}\n")
    return status


def _load(app: str) -> GenevaDrive:
    """The drive that APP names. An error of the application's own, as it is imported, is raised as it is."""
    sys.path.insert(0, str(Path.cwd()))
    name, _, attribute = app.partition(":")
    try:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"no module named {name!r}")
    except (ImportError, ValueError) as error:
        fix = "call it in the application's folder with module:attribute, such as app:drive"
        raise ConfigurationError(f"{app!r}: {error}; {fix}") from None
    module = importlib.import_module(name)
    drive = getattr(module, attribute or "drive", None)
    if not isinstance(drive, GenevaDrive) or drive is not _current_drive:
        known = [f"{name}:{key}" for key, value in vars(module).items() if value is _current_drive is not None]
        problem = f"{app} is not the {__name__}.GenevaDrive in use, but {drive!r:.100}"
        if not hasattr(module, attribute or "drive"):
            problem = f"{name} has no attribute {attribute or 'drive'!r}"
        fix = f"did you mean {known[0]}?" if known else f"{name} has no drive: name the module that constructs it"
        raise ConfigurationError(f"{problem}; {fix}")
    return drive


def _clean(text: object) -> str:
    """What others wrote, for a terminal: it must not take that for commands."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def _cell(value: object, width: int) -> str:
    text = _clean(value)
    while _width(text) > width:
        text = f"{text[:-2]}…"
    space = " " * (width - _width(text))
    return space + text if isinstance(value, int) else text + space


class _CommandLine:
    """A command; each has its method, which returns a true value if something failed."""

    def __init__(self, drive: GenevaDrive, options: argparse.Namespace, call: str) -> None:
        self.drive, self.options, self.call, self.now = drive, options, call, drive._now()
        self.columns = shutil.get_terminal_size((0, 0)).columns  # 0 where there is no terminal

    def run(self) -> int:
        command, handler = self.options.command, logging.StreamHandler()
        plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s").format
        handler.format = lambda record: "\n".join(map(_clean, plain(record).split("\n")))  # type: ignore[method-assign]
        logging.basicConfig(level=logging.INFO if command == "worker" else logging.WARNING, handlers=[handler])
        logging.getLogger("huey").setLevel(logging.WARNING)  # it has several lines for each step
        if command != "graph":
            self.drive._access.connect_worker()
            if problem := _Schema(self.drive).problem():
                raise GenevaDriveError(problem)
        return int(bool(getattr(self, f"_{command}", self._control)()))

    def _worker(self) -> None:
        workers, queues = self.options.workers, self.options.queue
        logger.info("serving %s, workers for each: %s", ", ".join(queues or self.drive.queues), workers)
        self.drive.run(workers, queues, shutdown_timeout=self.options.shutdown_timeout)

    def _list(self) -> None:
        query, limit = self._selected, self.options.limit
        workflows, total = list(query.order_by(Workflow.id.desc()).limit(limit)), query.limit(MAX_COUNTED).count()
        since = self._relative if 0 < self.columns < 120 else self._moment
        rows: list[list[Any]] = [["ID", "TYPE", "HERO", "STATE", "STEP", "SINCE/DUE", "WHY"]]
        for each in workflows:
            hero, why = _hero_label(each.hero_type, each.hero_id), _why(self._waits_for(each), each.reason)
            step_name, moment = each.current_step_name or "", since(self._since(each))
            rows.append([each.id, each.type, hero, each.state, step_name, moment, why[: self.columns or None]])
        lines = self._table(rows) if total else ["no workflow matches"]
        if total > len(workflows):
            more = "+" * (total == MAX_COUNTED)
            lines.append(f"{len(workflows)} of {total}{more}: use --limit {total}, or select less (see list --help)")
        self._answer([each.__data__ | {"waits_for": self._waits_for(each)} for each in workflows], lines)

    def _show(self) -> None:
        workflow = self._find(self.options.id)
        history = list(workflow.execution_history)
        facts = {
            "created": self._moment(workflow.created_at),
            workflow.state: self._moment(self._since(workflow)),
            "reason": workflow.reason,
            "occurs at": workflow.occurs_at and self._moment(workflow.occurs_at),
            "waits for": self._waits_for(workflow),
            "ongoing children": (count := workflow.ongoing_children) and f"{count}, see list --parent {workflow.id}",
            "parent": workflow.parent_id,
            "context": workflow.context and json.dumps(workflow.context, ensure_ascii=False),
        }
        lines = [_clean(self._title(workflow))]
        lines += [line for key, text in facts.items() if text for line in self._wrapped(f"{key}: {text}")]
        lines += ["", *self._timeline(history), ""] if history else []
        lines += self._advice(workflow)
        more = {"waits_for": facts["waits for"], "executions": [each.__data__ for each in history]}
        self._answer(workflow.__data__ | more, lines)

    def _advice(self, workflow: Workflow) -> Iterator[str]:
        """Why the workflow cannot go on, if it cannot, and the calls that its state allows."""
        problem, state = workflow._undefined(), workflow.state
        calls = [call for call in _CALLS if state in ALLOWED_FROM[call] and call != "reschedule"]
        if not problem and calls and not workflow._find(workflow.current_step_name):
            problem = str(StepNotDefinedError(workflow, workflow.current_step_name))
            calls = ["resume --at STEP", "cancel"] if state == PAUSED else ["pause", "cancel"]
        yield from self._wrapped(problem or "", "")
        if calls:
            lead = "Mend the cause, then" if state == PAUSED and not self._waits_for(workflow) else "You may"
            yield f"{lead}: {self.call} {calls[0]} {workflow.id}  (or {', '.join(calls[1:])})"

    def _timeline(self, history: list[Any]) -> Iterator[str]:
        """A line for each attempt, its bar from when it was scheduled to its end, or to now; and its error."""
        start, is_wide = history[0].created_at, self.columns >= 120
        span = max(each.finished_at or self.now for each in history) - start
        room = max(24, (self.columns or 100) - 50 - 34 * is_wide)

        def place(moment: datetime) -> int:
            return min(int((moment - start) / (span or timedelta(1)) * room), room - 1)

        title = f"{start:%m-%d %H:%M:%SZ}".ljust(room - 10) + f"+ {_span(span, 1)}".rjust(10)
        rows: list[list[Any]] = [["#", "STEP", "OUTCOME", title, "TOOK, OR DUE", "STARTED, OR DUE"]]
        for each in history:
            begun, end, due = each.started_at, each.finished_at or self.now, each.started_at or each._due
            mark = "!" if each.error_class_name or each.outcome == "recovered" else "█" if begun else "·"
            bar = (" " * place(each.created_at)).ljust(place(begun or end), "·").ljust(place(end) + 1, mark)
            took = _span(end - begun, 2) if begun else self._relative(due) if due and not each.finished_at else ""
            started = self._moment(due) if due else ""
            rows.append([each.number, each.step_name, each.outcome or each.state, bar, took, started])
        title, *lines = self._table([row[: 5 + is_wide] for row in rows])
        yield title
        for each, line in zip(history, lines):
            yield line
            for text in filter(None, self._told(each)):
                yield from self._wrapped(text, "    ")
        yield "· waited   █ performed   ! failed or died"

    def _told(self, execution: Any) -> Iterator[str]:
        """Why an attempt began, and what ended it and by whom, where that is more than its outcome says."""
        yield execution.begun_reason and f"resumed: {execution.begun_reason}"
        error = execution.error_class_name and f"{execution.error_class_name}: {execution.error_message}"
        yield error
        whom = "" if error or execution.outcome in (None, "success", "recovered") else "by a call from outside"
        if whom and execution.started_at:
            whom = "by the workflow itself" if execution.cursor is None else "at a checkpoint"
        is_told = execution.reason and execution.reason in " ".join((error or "").split())
        yield _why(whom, "" if is_told else execution.reason)

    def _waits_for(self, workflow: Any) -> str:
        """What has to come for a workflow to go on; empty if it was an error that paused it, or it does not wait."""
        newest = workflow.newest
        if newest is None or workflow.state not in (READY, PAUSED):
            return ""
        if workflow.state == PAUSED:
            return "" if newest.outcome in FAILURES else A_PERSON
        if newest.state == WAITING:
            return f"the signal {newest.waiting_for}" if newest.waiting_for else "its children"
        again = f", to try again after {newest.reattempts} of its errors" if newest.reattempts else ""
        return f"{'its time' if newest.scheduled_for > self.now else 'a worker'}{again}"

    def _control(self) -> bool:
        reports, call = [], self._call()
        for workflow_id in self._chosen():
            reports.append(self._controlled(workflow_id, call))
            if not self.options.json:  # each at once, for there may be many
                self._say(_clean(reports[-1]["done"] or f"{workflow_id}: {reports[-1]['error']}"))
        done = sum(not report["error"] for report in reports)
        total = f"{done} of {len(reports)}" + "; the same without --dry-run does it" * self.options.dry_run
        self._answer(reports, [] if self.options.ids else [total if reports else "no workflow matches"])
        return done < len(reports)

    def _chosen(self) -> list[int]:
        """The ids that are given; or of what is selected those that allow the call, unless a state is selected too."""
        call, ids, query = self.options.command, self.options.ids, self._selected
        if bool(ids) == bool(query._where):
            raise ConfigurationError(f"{call}: give ids, or some of {', '.join(_SELECTIONS)}, and not both")
        if not self.options.state:
            query = query.where(_is_in(*ALLOWED_FROM[call]))
            if call == "reschedule":  # what an error paused has nothing that is scheduled
                query = query.where(StepExecution.state.in_(TO_CLAIM))
        return ids or [each.id for each in query.select(Workflow.id).order_by(Workflow.id)]

    def _call(self) -> Callable[[Workflow], object]:
        """The call that the arguments make of a workflow."""
        call, given = self.options.command, vars(self.options)
        if call == "reschedule":
            times = [each for each in (given["in"], given["at"]) if each is not None]
            if len(times) + given["as_declared"] != 1:
                raise ConfigurationError("reschedule: give one of --in, --at and --as-declared")
            return operator.methodcaller(call, *times)
        if step_name := given.get("at"):
            return operator.methodcaller("resume_at", step_name, reason=given["reason"])
        return operator.methodcaller(call, reason=given["reason"])

    def _controlled(self, workflow_id: int, make: Callable[[Workflow], object]) -> dict[str, Any]:
        call, report = self.options.command, {"id": workflow_id, "state": None, "done": None, "error": None}
        try:
            workflow = self._find(workflow_id)
            before, title = workflow.state, self._title(workflow)
            if not self.options.dry_run:
                make(workflow)
                return report | {"state": workflow.state, "done": f"{self._title(workflow)}, was {before}"}
            with self.drive._access.begin() as transaction:
                make(workflow)
                transaction.rollback()
            return report | {"state": before, "done": f"would {call} {title}"}
        except Exception as error:  # it must not keep the others from their turn
            return report | {"error": str(error) or repr(error)}

    def _signal(self) -> None:
        workflow, name = self._find(self.options.id), self.options.signal
        try:
            payload = json.loads(self.options.payload)
        except ValueError as error:
            raise ConfigurationError(f"--payload {self.options.payload}: it is not JSON ({error})") from None
        try:
            is_new = workflow.signal(name, payload, self.options.key)
        except (TypeError, ValueError) as error:
            raise GenevaDriveError(str(error)) from error
        done = f"{self._title(self._find(workflow.id))}: {name} was sent{'' if is_new else ' before, and is left out'}"
        self._answer({"id": workflow.id, "signal": name, "is_new": is_new}, [_clean(done)])

    def _housekeeping(self) -> None:
        counts = self.drive.housekeeping()
        self._answer(counts, self._table([[*item] for item in counts.items()]))

    def _stats(self) -> None:
        metrics = self.drive.stats()
        value = {(each.name.removeprefix("geneva_drive_"), *each.labels.values()): each.value for each in metrics}
        rows: list[list[Any]] = [["TYPE", *map(str.upper, WORKFLOW_STATES), "PAUSED %", "RECOVERED"]]
        for name in dict.fromkeys(each.labels["type"] for each in metrics if each.labels):
            states = [value["workflows", name, state] for state in WORKFLOW_STATES]
            rows.append([name, *states, round(100 * value["paused_ratio", name]), value["recovered_steps", name]])
        late, oldest = value["overdue_steps",], timedelta(seconds=value["oldest_overdue_seconds",])
        overdue = f"overdue steps: {late}" + (f", the oldest due {self._moment(self.now - oldest)}" if late else "")
        waiting = [(each.labels, each.value) for each in metrics if "signal" in each.labels]
        told = "{type}: {0} wait for the signal {signal}", "{type}: {0} wait for children"
        lines = [_clean(told[not on["signal"]].format(number, **on)) for on, number in waiting]
        if groups := self.drive.paused_groups():
            paused = [[len(each.ids), *each[:3]] for each in groups[:MAX_SHOWN]]
            more = f"{len(groups) - MAX_SHOWN} more: use --json; " * (len(groups) > MAX_SHOWN)
            look = f"{more}see {self.call} list --state paused --error TEXT (or --why TEXT)"
            lines = ["", *self._table([["PAUSED", "TYPE", "STEP", "WHY"], *paused]), look, "", *lines]
        found: list[Any] = [*metrics, *groups]
        self._answer([each._asdict() for each in found], [*self._table(rows), *lines, overdue])

    def _doctor(self) -> bool:
        if self.options.deploy:
            stranded = list(self.drive._reports.stranded())
            sound = "all that ongoing workflows need is defined: their classes, steps, heroes and signals"
            self._answer([each._asdict() for each in stranded], [_clean(each.problem) for each in stranded] or [sound])
            return bool(stranded)
        found = self.drive.doctor()
        self._answer(found, [*map(_clean, found), f"violations: {len(found)}" if found else "all is sound"])
        return bool(found)

    def _graph(self) -> None:
        self._say(_class_of(self.options.name).graph())

    @functools.cached_property
    def _selected(self) -> Any:
        """A query for the workflows that the arguments select; each with its newest execution, in part, as `newest`."""
        query = Workflow.select(*Workflow._meta.sorted_fields, *(getattr(StepExecution, name) for name in _OF_NEWEST))
        query = query.join(StepExecution, peewee.JOIN.LEFT_OUTER, on=IS_NEWEST, attr="newest")
        for name, (_, condition) in _SELECTIONS.items():
            value = getattr(self.options, name[2:].replace("-", "_"), None)
            if value == "":  # of a variable that is not set, most likely, and all that has an error would have it
                raise ConfigurationError(f"{name}: it must not be empty; leave it out to select whatever it is")
            if value is not None:
                query = query.where(condition(value))
        return query

    def _find(self, workflow_id: int) -> Workflow:
        workflow = self._selected.where(Workflow.id == workflow_id).get_or_none()
        if workflow is None:  # or it has changed since it was selected, and is to be left alone
            selected = " that is selected any more" if getattr(self.options, "ids", None) == [] else ""
            raise GenevaDriveError(f"there is no workflow {workflow_id}{selected}: see {self.call} list")
        return cast(Workflow, workflow)

    def _title(self, workflow: Workflow) -> str:
        hero, step_name = _hero_label(workflow.hero_type, workflow.hero_id), workflow.current_step_name
        suffix = ", to pause when this step ends" if workflow.pause_requested else ""
        return f"{workflow._label} of {hero}: {workflow.state}{f' at {step_name}' if step_name else ''}{suffix}"

    def _since(self, workflow: Any) -> datetime:
        """When it came to stand still or, where it goes on, since when it performs its step, or when that is due."""
        moment = (newest := workflow.newest) and (newest.started_at or newest._due or newest.scheduled_for)
        return cast(datetime, workflow.transitioned_at or moment or workflow.created_at)

    def _moment(self, moment: datetime) -> str:
        return f"{self._relative(moment)}, {moment:%Y-%m-%d %H:%M:%SZ}"

    def _relative(self, moment: datetime) -> str:
        span = _span(moment - self.now, 1)
        return f"in {span}" if moment > self.now else f"{span} ago"

    def _answer(self, value: object, lines: Iterable[str]) -> None:
        if self.options.json:
            lines = [json.dumps(value, indent=2, default=datetime.isoformat)]
        self._say(*lines)

    def _say(self, *lines: str) -> None:
        sys.stdout.write("".join(f"{line}\n" for line in lines))

    def _wrapped(self, text: str, indent: str = "  ") -> list[str]:
        limits = {"width": max(40, self.columns or 100), "max_lines": 4, "placeholder": " … (see --json)"}
        text = _clean(" ".join(text[:2000].split()))
        return textwrap.wrap(text, initial_indent=indent, subsequent_indent=indent, **limits)  # type: ignore[arg-type]

    def _table(self, rows: list[list[Any]]) -> list[str]:
        """Aligned columns, numbers to the right. Names are cut where the terminal is too narrow, WHY less."""
        widths = [max(_width(_clean(cell)) for cell in column) for column in zip(*rows)]
        names = [place for place, title in enumerate(rows[0]) if title in ("TYPE", "HERO", "STEP", "WHY")]
        room = (self.columns or math.inf) - 2 * (len(widths) - 1)
        while sum(widths) > room and names and max(widths[place] for place in names) > 6:
            widths[max(names, key=lambda place: widths[place] / (1 + (rows[0][place] == "WHY")))] -= 1
        lines = ["  ".join(map(_cell, row, widths)).rstrip() for row in rows]
        if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
            return lines
        return [_COLORED.sub(lambda found: f"\033[{_COLORS[found[0]]}m{found[0]}\033[0m", line) for line in lines]


if __name__ == "__main__":
    # As __main__, this is a second copy of the module: the application's drive is of the one that it imports.
    sys.exit(importlib.import_module(__spec__.name if __spec__ else Path(__file__).stem).main())
