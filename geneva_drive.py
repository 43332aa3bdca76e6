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
The queue is only the alarm clock: a message holds the number of an execution and nothing else, so that losing or
doubling one harms nothing. Whoever takes, ends or recovers an execution first updates the workflow's row on condition
that this execution is still its newest: one fence and one lock order for everything.
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
import importlib.util
import inspect
import itertools
import json
import logging
import math
import numbers
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
import unicodedata
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeAlias, TypedDict, TypeVar, cast, overload

import peewee
from huey import Huey, crontab
from huey.api import Task
from huey.constants import WORKER_THREAD
from huey.consumer import Consumer, Scheduler, ThreadEnvironment, Worker
from huey.contrib.sql_huey import SqlStorage
from huey.serializer import Serializer
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
    "AlreadyOngoingError", "ConfigurationError", "ExceptionPolicy", "FlowControlInTransactionError", "GenevaDrive",
    "GenevaDriveError", "InvalidStateError", "Metric", "SignalTimeoutError", "StepConfigurationError",
    "StepDefinition", "StepExecution", "StepNotDefinedError", "TestHelpers", "TransactionLeftOpenError",
    "UndefinedStep", "UnknownQueueError", "UnknownSignalError", "UnsupportedDatabaseError", "Workflow",
    "WorkflowNotDefinedError", "WorkflowSignal", "cancel_if", "on_exception", "removed_step", "step", "step_finished",
    "step_started", "workflow_transitioned",
]
# fmt: on

logger = logging.getLogger("geneva_drive")
logger.addHandler(logging.NullHandler())

T = TypeVar("T")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Receiver = TypeVar("_Receiver")
_Row = TypeVar("_Row", bound=Model)
_Route: TypeAlias = "tuple[str, int | None]"  # the name of a queue, and the priority in it
_Json: TypeAlias = "dict[str, Any] | None"
_Queues: TypeAlias = "Mapping[str, Huey] | Iterable[str] | None"

# ==== States, and what an outcome does to them ========================================================================

READY, PERFORMING, PAUSED, FINISHED, CANCELED = "ready", "performing", "paused", "finished", "canceled"
SCHEDULED, WAITING, IN_PROGRESS = "scheduled", "waiting", "in_progress"
COMPLETED, FAILED, SKIPPED = "completed", "failed", "skipped"

ONGOING, OVER = (READY, PERFORMING, PAUSED), (FINISHED, CANCELED)
WORKFLOW_STATES = (*ONGOING, *OVER)
TO_CLAIM = (SCHEDULED, WAITING)
ACTIVE = (*TO_CLAIM, IN_PROGRESS)

# Why an attempt ended and what was decided, against: the execution's state, its outcome, what the workflow does next.
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
    "resume_at": (PAUSED,),
    "reattempt": (),
    "finish": (),
    "signal": ONGOING,
}

ON_EXCEPTION_ACTIONS = ("pause", "cancel", "skip", "reattempt")
TERMINAL_ACTIONS = ("pause", "cancel", "skip")
ON_TIMEOUT_ACTIONS = ("pause", "skip", "cancel", "run")
REPORTS = ("terminal_only", "always", "never")

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
NO_WAIT = timedelta(0)
LONGEST_WAIT = timedelta(days=36500)  # further away, the calendar overflows
MAX_NAME_CHARS = 255
MAX_JSON_BYTES = 128 * 1024
MAX_ERROR_CHARS = 50_000
CURSOR_ALIAS = "geneva_drive_cursor"  # of the key of a row, in queries of the application's
TRANSACTION_TRIES = 16  # a deadlock or serialization failure on every one of them points at something else
PUT_OFF_FOR = timedelta(seconds=1), timedelta(seconds=30)  # at first, and at most, a step that is not defined here
EXIT_TIME = timedelta(seconds=5)  # what a process that leaves steps under way may take to be gone
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
PATIENCE_SECONDS = 10  # with locks; a step that is done waits longer to be recorded

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

    def __init__(self, workflow: Workflow, call: str) -> None:
        allowed = ", ".join(ALLOWED_FROM[call])
        state = "performing, and about to pause" if workflow.pause_requested else workflow.state
        fix = f"it is allowed when {allowed}" if allowed else "it can be called inside a step only"
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
    """A step waited for its signal in vain. It is recorded, not raised."""

    def __init__(self, workflow: Workflow, definition: StepDefinition) -> None:
        super().__init__(
            f"{workflow._label}: the step {definition.name} waited for the signal {definition.wait_for!r} in vain, for "
            f"{_span(definition.timeout or NO_WAIT)}"
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
    """Ends the body of a step. Not an Exception: a body's `except Exception` must not catch it."""

    def __init__(self, action: str, wait: timedelta = NO_WAIT, rewind: bool = False) -> None:
        super().__init__(action)
        self.action = action
        self.wait = wait
        self.rewind = rewind


def _flow_control_in(error: BaseException) -> _FlowControl | None:
    """The flow control that an error is, or that a group of errors (an asyncio.TaskGroup's) holds and nothing else."""
    if isinstance(error, _FlowControl):
        return error
    errors = getattr(error, "exceptions", None)  # Python 3.10 has no class for groups
    found = [_flow_control_in(each) for each in errors] if isinstance(errors, (list, tuple)) else []
    return found[-1] if found and all(found) else None


def _ends_process(error: BaseException) -> bool:
    """Whether an error ends this process or greenlet, and tells nothing about the code that it is raised in."""
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
    """The execution is no longer ours to record: it was recovered, or deleted with its workflow."""


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

    def send(self, instance: Any, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
        responses = []
        for name, receiver, sender in self._receiver_list:
            if sender is None or isinstance(instance, sender):
                with _logged("the receiver %s failed on an event of %s", name, instance._label):
                    result = receiver(type(instance), instance, *args, **kwargs)
                    responses.append((receiver, _finished(result, f"the receiver {name}")))
        return responses


step_started: _Event[_OnAttempt] = _Event(
    "`receiver(cls, workflow, execution=execution)`: an attempt at a step, a :class:`StepExecution`, begins."
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


def _duration(value: object, what: str) -> timedelta:
    """A timedelta or a number of seconds, never negative, as a timedelta; else a ValueError says what is wrong."""
    duration = value
    if _is_number(value):
        try:
            duration = timedelta(seconds=float(cast(float, value)))
        except OverflowError:
            duration = timedelta.max
    if not isinstance(duration, timedelta):
        raise ValueError(f"{what} must be a timedelta or a number of seconds, not {value!r}")
    if not NO_WAIT <= duration <= LONGEST_WAIT:
        raise ValueError(f"{what} must be neither negative nor over a hundred years, not {_as_given(value)}")
    return duration


def _as_given(value: Any) -> str:
    """A value for a message; Python shows a second less than nothing as a day less, and 86,399 seconds."""
    return f"-{-value!r}" if isinstance(value, timedelta) and value < NO_WAIT else repr(value)


def _require(condition: object, where: str, problem: str) -> None:
    if not condition:
        raise StepConfigurationError(f"{where}: {problem}")


def _require_duration(value: object, where: str, what: str) -> timedelta:
    try:
        return _duration(value, f"{where}: {what}")
    except ValueError as error:
        raise StepConfigurationError(str(error)) from None


def _require_plain(function: Any, where: str, what: str) -> None:
    _require(not inspect.iscoroutinefunction(function), where, f"{what} must not be async")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


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

    action: str
    matching: Any = None
    wait: timedelta | float = 1
    backoff: float = 2
    jitter: float = 0.1
    max_wait: timedelta | float = timedelta(minutes=10)
    max_reattempts: int | None = 100
    terminal_action: str = "pause"
    report: str = "terminal_only"

    def __post_init__(self) -> None:
        where, limit = f"ExceptionPolicy({self.action!r})", self.max_reattempts
        for choice, name, among in (
            (self.action, "the action", ON_EXCEPTION_ACTIONS),
            (self.terminal_action, "terminal_action", TERMINAL_ACTIONS),
            (self.report, "report", REPORTS),
        ):
            _require(choice in among, where, f"{name} must be one of {', '.join(among)}, not {choice!r}")
        _require(limit is None or (_is_int(limit) and limit >= 0), where, "max_reattempts must be an int or None")
        _require(_is_number(self.backoff) and self.backoff >= 1, where, "backoff must be a number, at least 1")
        _require(_is_number(self.jitter) and 0 <= self.jitter <= 1, where, "jitter must be a fraction from 0 to 1")
        object.__setattr__(self, "wait", _require_duration(self.wait, where, "wait"))
        object.__setattr__(self, "max_wait", _require_duration(self.max_wait, where, "max_wait"))
        if self.matching is not None:
            several = isinstance(self.matching, (tuple, list, set))
            object.__setattr__(self, "matching", tuple(self.matching if several else (self.matching,)))
        for kind in self.matching or ():
            is_matcher = isinstance(kind, str) or (isinstance(kind, type) and issubclass(kind, BaseException))
            _require(is_matcher, where, f"matching must name exception classes, not {kind!r}")

    def matches(self, error: BaseException) -> bool:
        """Whether the policy is meant for `error`."""
        return self.matching is None or any(_matches(kind, error) for kind in self.matching)

    def delay(self, reattempts: int) -> timedelta:
        """The wait before the next reattempt, after so many of them."""
        wait, longest = cast(timedelta, self.wait), cast(timedelta, self.max_wait)
        if not wait:
            return NO_WAIT
        try:
            seconds = wait.total_seconds() * self.backoff**reattempts
        except OverflowError:
            seconds = math.inf
        seconds = min(seconds, longest.total_seconds()) * random.uniform(1 - self.jitter, 1 + self.jitter)
        return min(timedelta(seconds=seconds), longest)

    def _decide(self, workflow: Workflow, error: BaseException, reattempts: int) -> _FlowControl:
        return _FlowControl(self.action, self.delay(reattempts))


@dataclass(frozen=True)
class _HandlerPolicy(ExceptionPolicy):
    """A policy whose action is the flow control method that a handler calls; without a call, it pauses."""

    handler: Any = None  # a method's name, or a callable of the workflow and the error

    def _decide(self, workflow: Workflow, error: BaseException, reattempts: int) -> _FlowControl:
        attempt = cast(_Attempt, workflow._attempt)
        try:
            if isinstance(self.handler, str):
                attempt.call(getattr(workflow, self.handler), error)
            else:
                attempt.call(self.handler, workflow, error)
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
    wait: timedelta = NO_WAIT
    skip_if: Any = None
    policy: ExceptionPolicy | None = None
    transactional: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    wait_for: str | None = None
    timeout: timedelta | None = None
    on_timeout: str = "pause"
    matching: Callable[[Any], object] | None = None
    resumable: bool = False
    removed: bool = False  # then it is skipped as by any true `skip_if`: the hero and the conditions come first


class UndefinedStep(NamedTuple):
    """A step that so many ongoing workflows of a type stand at, and that no class defines in this process."""

    type: str
    step_name: str
    workflows: int


# ==== The language in which steps are declared ========================================================================


class _StepOptions(TypedDict, total=False):
    wait: timedelta | float
    skip_if: Callable[[Any], object] | str | bool | None
    on_exception: Callable[[Any, Any], object] | ExceptionPolicy | str | None
    max_reattempts: int | None
    terminal_action: str
    before_step: str | None
    after_step: str | None
    transactional: bool
    resumable: bool
    options: Mapping[str, Any]
    name: str
    wait_for: str | None
    timeout: timedelta | float | None
    on_timeout: str
    matching: Callable[[Any], object] | None


STEP_OPTIONS = tuple(_StepOptions.__annotations__)


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

    :param wait: how long after the previous step it runs: a timedelta or seconds.
    :param skip_if: a callable of the workflow, a method's name or a bool: true skips the step.
    :param on_exception: "pause" (the default), "cancel", "skip", "reattempt", an :class:`ExceptionPolicy`, or a
        callable of the workflow and the error that calls a flow control method.
    :param max_reattempts: with "reattempt": how many; 100 by default, None never stops.
    :param terminal_action: with "reattempt": what follows the last one; "pause" by default, "cancel" or "skip".
    :param before_step: the name of the step to be placed before. `after_step`: the one to be placed behind.
    :param transactional: run the body in the transaction that records its outcome: its writes to the drive's database
        happen exactly once.
    :param resumable: let the body keep a cursor, by `resume_over()` or `checkpoint()`, from which the next attempt goes
        on.
    :param options: `{"queue": ..., "priority": ...}` for Huey.
    :param name: the step's name, if it is not the method's.
    :param wait_for: the name of a signal: the step runs once :meth:`Workflow.signal` sent it, and the body finds it in
        `self.signal_payload`. With `wait`, not before that.
    :param timeout: how long it waits for the signal, a timedelta or seconds; None waits for ever.
    :param on_timeout: what follows then: "pause" by default, "skip", "cancel", or "run", whose body finds None.
    :param matching: a callable of the payload: false leaves a signal to another step.
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
    options = {"name": name, "before_step": before_step, "after_step": after_step}
    return _Declaration({key: value for key, value in options.items() if value is not None}, is_removed=True)


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
    reserved: frozenset[str]
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
            where = f"{self.cls.__name__}.{key}"
            for name, body, options in _declared_steps(key, value):
                self._add_step(f"{self.cls.__name__}.{name}", key, name, body, options, declared)
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
                self._add_policies(where, value)
            if key == "step_options":
                self.step_options.update(_checked_options(value, where))

    def methods(self) -> set[str]:
        """The names of the methods that declarations rely on."""
        handlers = (getattr(policy, "handler", None) for policy in self.policies)
        bodies = (definition.body for definition in self.steps if not definition.removed)
        return {*bodies, *self.cancel_ifs, *(handler for handler in handlers if isinstance(handler, str))}

    def _add_step(
        self, where: str, key: str, name: str, body: str | None, options: dict[str, Any], declared: set[str]
    ) -> None:
        _require(_is_name(name), where, f"a step's name must be text of 1 to {MAX_NAME_CHARS} characters")
        _require(name not in declared, where, "the step is declared twice: rename one of them")
        declared.add(name)
        for each in (key, name) if body else (key,):  # the name of one that is gone may have become an attribute
            problem = f"a step must not be called {each!r}, an attribute of Workflow: rename it"
            _require(each not in self.reserved, where, problem)
        for option in options:
            _require(option in STEP_OPTIONS, where, f"unknown option {option!r}: use {', '.join(STEP_OPTIONS)}")
        place = options.get("before_step"), options.get("after_step")
        if body is None:
            self._place(where, StepDefinition(name, "", skip_if=True, removed=True), *place)
            return
        method = getattr(self.cls, body, None)
        is_method = callable(method) or (isinstance(method, _Declaration) and method.is_removed)  # by a child
        _require(is_method, where, f"its body {body!r} is not a method of the class")
        is_generator = inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method)
        _require(not is_generator, where, f"its body {body!r} is a generator, which nothing would run: do not yield")
        skip_if, transactional = options.get("skip_if"), options.get("transactional", False)
        is_condition = skip_if is None or isinstance(skip_if, (bool, str)) or callable(skip_if)
        _require(is_condition, where, f"skip_if must be a callable, a method's name or a bool, not {skip_if!r}")
        if isinstance(skip_if, str):
            _require(callable(getattr(self.cls, skip_if, None)), where, f"skip_if names no method: {skip_if!r}")
        _require_plain(getattr(self.cls, skip_if) if isinstance(skip_if, str) else skip_if, where, "skip_if")
        _require(isinstance(transactional, bool), where, "transactional must be a bool")
        resumable = options.get("resumable", False)
        _require(isinstance(resumable, bool), where, "resumable must be a bool")
        problem = "resumable and transactional exclude each other: what rolls back the body would take its cursor along"
        _require(not (resumable and transactional), where, problem)
        wait = _require_duration(options.get("wait", 0), where, "wait")
        huey_options = _checked_options(options.get("options", {}), f"{where}: options")
        policy, signal = _step_policy(where, options), _step_signal(where, options)
        definition = StepDefinition(
            name, body, wait, skip_if, policy, transactional, huey_options, resumable=resumable, **signal
        )
        self._place(where, definition, *place)

    def _place(self, where: str, definition: StepDefinition, before: Any, after: Any) -> None:
        _require(before is None or after is None, where, "before_step and after_step exclude each other")
        names = [each.name for each in self.steps]
        place = names.index(definition.name) if definition.name in names else len(names)
        if place < len(names):
            del self.steps[place], names[place]
        beside = after if before is None else before
        if beside is not None:
            known = ", ".join(names) or "none"
            _require(beside in names, where, f"there is no step {beside!r} yet to be placed beside: use {known}")
            place = names.index(beside) + (before is None)
        self.steps.insert(place, definition)

    def _add_policies(self, where: str, policies: Any) -> None:
        _require(isinstance(policies, (list, tuple)), where, "must be a list of ExceptionPolicy")
        for policy in policies:
            _require(isinstance(policy, ExceptionPolicy), where, f"must hold ExceptionPolicy objects, not {policy!r}")
            self.policies.append(policy)


def _declared_steps(key: str, value: Any) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """The name, body and options of each step that an attribute of a class declares; a removed one has no body."""
    if isinstance(value, (list, tuple)) and any(isinstance(each, _Declaration) for each in value):
        items = [(f"{key}_{number}", each) for number, each in enumerate(value, 1)]
    else:
        items = [(key, getattr(value, "_geneva_drive_step", value))]
    for name, declaration in items:
        if isinstance(declaration, _Declaration):
            body = None if declaration.is_removed else declaration.body or key
            yield declaration.options.get("name", name), body, declaration.options


def _is_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()


def _step_policy(where: str, options: dict[str, Any]) -> ExceptionPolicy | None:
    """The policy that `on_exception`, `max_reattempts` and `terminal_action` of a step make."""
    reaction = options.get("on_exception")
    limits = {key: options[key] for key in ("max_reattempts", "terminal_action") if key in options}
    for key in limits:
        _require(reaction == "reattempt", where, f'{key} goes with on_exception="reattempt" only')
    if reaction is None or isinstance(reaction, ExceptionPolicy):
        return reaction
    if callable(reaction) and not isinstance(reaction, type):
        _require_plain(reaction, where, "on_exception")
        return _HandlerPolicy("pause", handler=reaction)
    problem = f"on_exception must be {', '.join(ON_EXCEPTION_ACTIONS)}, an ExceptionPolicy or a callable"
    _require(isinstance(reaction, str) and reaction in ON_EXCEPTION_ACTIONS, where, f"{problem}, not {reaction!r}")
    try:
        return ExceptionPolicy(reaction, **limits)
    except StepConfigurationError as error:
        raise StepConfigurationError(f"{where}: {error}") from None


def _step_signal(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a step waits for, and how long: the options that are about signals, checked."""
    given: dict[str, Any] = {
        key: options[key] for key in ("wait_for", "timeout", "on_timeout", "matching") if key in options
    }
    name, timeout = given.get("wait_for"), given.get("timeout")
    _require(name is None or _is_name(name), where, f"wait_for must be a signal's name, not {name!r}")
    for key in given:
        _require(key == "wait_for" or name is not None, where, f"{key} goes with wait_for only")
    if timeout is not None:
        given["timeout"] = _require_duration(timeout, where, "timeout")
    if "on_timeout" in given:
        action, among = given["on_timeout"], ", ".join(ON_TIMEOUT_ACTIONS)
        _require(timeout is not None, where, "on_timeout goes with timeout only")
        _require(action in ON_TIMEOUT_ACTIONS, where, f"on_timeout must be one of {among}, not {action!r}")
    matching = given.get("matching")
    is_matcher = matching is None or callable(matching)
    _require(is_matcher, where, f"matching must be a callable of the signal's payload, not {matching!r}")
    _require_plain(matching, where, "matching")
    return given


def _checked_options(options: Any, where: str) -> dict[str, Any]:
    """Huey's options for steps, if they are sound; else a StepConfigurationError says what is wrong."""
    _require(isinstance(options, Mapping), where, f'must be a dict such as {{"queue": "premium"}}, not {options!r}')
    for key, value in options.items():
        _require(key in ("queue", "priority"), where, f"unknown option {key!r}: use queue or priority")
        _require(key != "queue" or _is_name(value), where, f"queue must be a queue's name, not {value!r}")
        _require(key != "priority" or _is_int(value), where, f"priority must be an int, not {value!r}")
    return dict(options)


# ==== Fields: one form of a value on every database ===================================================================


def _dialect(database: Database) -> str:
    dialect = _dialect_of(cast(Any, type(database)))
    if dialect is None:
        raise UnsupportedDatabaseError(database)
    return dialect


@functools.cache
def _dialect_of(kind: type[Database]) -> str | None:
    if issubclass(kind, CockroachDatabase):
        return None
    dialects = {SqliteDatabase: "sqlite", PostgresqlDatabase: "postgresql", MySQLDatabase: "mysql"}
    return next((dialect for base, dialect in dialects.items() if issubclass(kind, base)), None)


class _DialectField(peewee.Field):
    """A field whose column needs a type of its own on MySQL and MariaDB."""

    mysql_type = ""

    def ddl_datatype(self, ctx: Any) -> Any:
        if _dialect(self.model._meta.get_database_instance()) == "mysql":
            return SQL(self.mysql_type)
        return super().ddl_datatype(ctx)


class _NameField(_DialectField, peewee.CharField):
    """Short text of our own making. The server's default character set may be latin1, its collation ignores case."""

    mysql_type = f"VARCHAR({MAX_NAME_CHARS}) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"


class _ExactField(_DialectField, peewee.CharField):
    """Short text compared byte by byte: every collation that MySQL and MariaDB share ignores trailing spaces."""

    mysql_type = f"VARBINARY({4 * MAX_NAME_CHARS})"

    def python_value(self, value: Any) -> Any:
        return _as_text(value)


def _as_text(value: Any) -> Any:
    return value.decode() if isinstance(value, (bytes, bytearray)) else value


class _TypeField(_ExactField):
    """The name of a workflow's class; reading it gives the row that class."""

    class accessor_class(peewee.FieldAccessor):
        def __set__(self, instance: Workflow, value: str) -> None:
            super().__set__(instance, value)
            if type(instance).workflow_type != value:
                instance.__class__ = _workflow_classes.get(value, Workflow)


class _LongTextField(_DialectField, peewee.TextField):
    """Text of any length: TEXT on MySQL ends at 64 KB. Holds nothing that some database refuses."""

    mysql_type = "LONGTEXT CHARACTER SET utf8mb4"

    def db_value(self, value: str | None) -> str | None:
        return value and _storable(value)


def _storable(text: str, charset: str = "utf-8") -> str:
    """Text without what some database refuses, and what a character set does not have: that is escaped."""
    return text.replace("\0", "\\x00").encode(charset, "backslashreplace").decode()


class _JsonField(_DialectField, peewee.TextField):
    """A JSON value as text. A database's own JSON type would reorder its keys and refuse some of its strings."""

    mysql_type = _LongTextField.mysql_type

    def db_value(self, value: Any) -> str | None:
        return None if value is None else _dump_json(value, f"the {self.name}")

    def python_value(self, value: Any) -> Any:
        return None if value is None else json.loads(value)


class _JsonObjectField(_JsonField):
    def db_value(self, value: Any) -> str | None:
        return None if value is None else _dump_object(value)


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
        try:
            return _encode_json(self) != self.read
        except (TypeError, ValueError, RecursionError):
            return True

    def onto(self, text: str) -> tuple[_Context, list[str]]:
        """What another context becomes by the changes in this one; and the keys that cannot be kept, left as they were.

        These are not JSON, since something was put into their value later, or would make the whole too long.
        """
        read, merged, misfits, growth = json.loads(self.read), _Context(text), [], dict[str, int]()
        for key in read.keys() - self.keys():
            merged.pop(key, None)
        for key in self:
            try:
                if key not in read or _encode_json(self[key]) != _encode_json(read[key]):
                    growth[key] = self._size(key) - merged._size(key)
            except (TypeError, ValueError, RecursionError):
                misfits.append(key)
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


class _ReadText(str):
    """A context as a row holds it, to be compared with."""


class _ContextField(_JsonObjectField):
    __hash__ = peewee.Field.__hash__

    def __eq__(self, other: Any) -> Any:
        # It is compared with what was read: byte by byte, where a collation would take "Ada" for "ADA".
        is_mysql = _dialect(self.model._meta.get_database_instance()) == "mysql"
        return peewee.Expression(self.cast("binary") if is_mysql else self, peewee.OP.EQ, other)

    class accessor_class(peewee.FieldAccessor):
        def __set__(self, instance: Workflow, value: Any) -> None:
            old = instance.__data__.get(self.name)
            super().__set__(instance, old.replaced(value) if isinstance(old, _Context) and value is not old else value)

    def db_value(self, value: Any) -> str | None:
        return str(value) if isinstance(value, _ReadText) else super().db_value(value)

    def python_value(self, value: Any) -> Any:
        return None if value is None else _Context(value)


class _UtcField(_DialectField, peewee.DateTimeField):
    """A moment: stored as naive UTC with microseconds, read as an aware datetime. A naive one is taken for UTC."""

    mysql_type = "DATETIME(6)"

    def db_value(self, value: datetime | None) -> Any:
        return self.storing()(value)

    def storing(self) -> Callable[[datetime | None], Any]:
        """What stores a value in the database in use, for many of them."""
        is_text = _dialect(self.model._meta.get_database_instance()) == "sqlite"  # APSW takes no other
        return _as_utc_text if is_text else _as_utc

    def python_value(self, value: Any) -> datetime | None:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        return moment and moment.replace(tzinfo=timezone.utc)


def _as_utc(moment: datetime | None) -> datetime | None:
    return moment.astimezone(timezone.utc).replace(tzinfo=None) if moment and moment.tzinfo else moment


@functools.lru_cache(maxsize=32)  # one moment goes into several columns, and into many rows
def _as_utc_text(moment: datetime | None) -> str | None:
    return None if moment is None else str(_as_utc(moment))  # as sqlite3 would store it


def _dump_object(value: Any) -> str:
    """The context, a JSON object, as text; else a TypeError or a ValueError says what is wrong."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"the context must be a dict with text keys, a JSON object, not {value!r:.200}")
    return _dump_json(value, "the context")


_encode_json = json.JSONEncoder(allow_nan=False).encode


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
        try:
            _encode_json(part)
        except (TypeError, ValueError, RecursionError):
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
    return _finished(_drive()._run_beside(lambda: asyncio.run(wait()), where), where)


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _own_context() -> contextvars.Context:
    """A copy of the thread's context, for an attempt: what it sets must not reach the next one."""
    context = contextvars.copy_context()
    context.run(lambda: decimal.setcontext(decimal.getcontext().copy()))  # which is changed in place
    return context


# ==== Statements: SQL that is built once ==============================================================================


class _Blank:
    """The place of a value in SQL that is built before the value is known."""

    def __init__(self, field: peewee.Field[Any], name: str) -> None:
        stores = field.storing() if isinstance(field, _UtcField) else field.db_value
        self.convert, self.name = None if _is_plain(field) else stores, name

    @classmethod
    def value(cls, field: peewee.Field[Any], name: str) -> peewee.Value:
        return peewee.Value(cls(field, name), converter=False)


def _is_plain(field: peewee.Field[Any]) -> bool:
    """Whether what the library has for a field is what drivers take and return, and nothing is to be converted."""
    return issubclass(field.model, _Record) and isinstance(field, (_NameField, peewee.IntegerField))


class _Built:
    """A query of Peewee's as it is sent. Building its SQL takes longer than running it, and is done once.

    The plain form stays beside each use: the query, of blanks in the place of values.
    """

    def __init__(self, database: Database, query: Any) -> None:
        self.database, self.query = database, query
        self.sql, parameters = database.get_sql_context().sql(query).query()
        blanks = [each if isinstance(each, _Blank) else None for each in parameters]
        self.parameters: list[tuple[Any, Any, Any]] = [
            (each and each.name, each and each.convert, value) for each, value in zip(blanks, parameters)
        ]
        self.names = [name for name, _, _ in self.parameters]
        self.rows: Any = None

    def filled(self, values: Mapping[str, Any]) -> list[Any]:
        """The parameters, with these values in the blanks, each as its field stores it."""
        return [
            constant if name is None else values[name] if convert is None else convert(values[name])
            for name, convert, constant in self.parameters
        ]

    def execute(self, values: Mapping[str, Any]) -> Any:
        """Send it; returns the driver's cursor."""
        return self.database.execute_sql(self.sql, self.filled(values))

    def first(self, values: Mapping[str, Any]) -> Any:
        """Send it; returns the first row as Peewee would make it, or None."""
        cursor = self.execute(values)
        row = cursor.fetchone()
        if row is not None and self.rows is None:
            rows = self.query._get_model_cursor_wrapper(cursor)
            rows.initialize()  # which column is which field's: the same for each cursor
            rows.cursor, self.rows = None, rows
        cursor.close()  # there may be more rows: a statement that stays open lets its connection see old ones
        return row and self.rows.process_row(row)


def _updating(model: Any, new: Mapping[Any, Any], found: Iterable[Any]) -> Any:
    return model.update(new).where(*found)


def _inserting(model: Any, new: Mapping[Any, Any], _: Any) -> Any:
    return model.insert(new)


def _as_conditions(where: Mapping[str, Any]) -> dict[str, Any]:
    """The values of conditions by the names of their blanks, which differ from those of new values."""
    return {f"={name}": value for name, value in where.items()}


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
    if hero_type not in _hero_models:
        model = _find_hero_model(hero_type)
        if model is None:
            return None
        _hero_models[hero_type] = model
    return _hero_models[hero_type]


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
    built = _drive()._statement(database, read_from, lambda: model.select().where(field == _Blank.value(field, "key")))
    return cast("Model | None", built.first({"key": key}))


def _key_field(model: type[Model]) -> peewee.Field:
    field = model._meta.primary_key
    while isinstance(field, peewee.ForeignKeyField):
        field = field.rel_field
    return field


def _hero_key(hero: Any) -> tuple[str, str]:
    """The type and id under which a workflow knows its hero; else a TypeError or a ValueError says what is wrong."""
    if not isinstance(hero, Model):
        raise TypeError(f"a hero must be a saved instance of a Peewee model, not {hero!r}")
    model = type(hero)
    meta = model._meta
    if meta.primary_key is False or meta.composite_key:
        raise TypeError(f"{model.__name__} cannot be a hero: it has no primary key of one column; use a row that has")
    if hero._pk is None:
        raise ValueError(f"this {model.__name__} has no id yet: save it before it becomes a hero")
    # There and back, so that 7 and "7", or a UUID and its hex digits, are one hero.
    key, hero_id = _key_field(model), str(hero._pk)
    if isinstance(key, (peewee.UUIDField, peewee.BinaryUUIDField)):
        is_raw = isinstance(hero._pk, (bytes, memoryview))
        hero_id = str(uuid.UUID(bytes=bytes(hero._pk)) if is_raw else uuid.UUID(hero_id))
    else:
        stored = key.db_value(hero._pk)
        hero_id = str(key.python_value(stored))
        try:
            is_kept = key.db_value(hero_id) == stored
        except Exception:  # a field of the application's own
            is_kept = False
        if not is_kept:
            raise TypeError(f"{model.__name__} cannot be a hero: its key is lost as text; use int, UUID or text for it")
    if len(hero_id) > MAX_NAME_CHARS:
        raise ValueError(f"the id of this {model.__name__} has {len(hero_id)} characters, over {MAX_NAME_CHARS}")
    if "\0" in hero_id or any("\ud800" <= character <= "\udfff" for character in hero_id):
        raise ValueError(f"the id of this {model.__name__} holds a NUL or a lone surrogate: {hero_id!r}")
    database, ours = _unproxied(meta.database), _unproxied(_drive().database)
    is_earlier = database is not ours and database in _earlier_databases
    if is_earlier and _address(database) != _address(ours):
        problem = f"{model.__name__} is in {_place(database)}, whose GenevaDrive was replaced by one on {_place(ours)}"
        raise ConfigurationError(f"{problem}, which would keep the workflow: make one drive for each process")
    hero_type = _hero_type(model)
    if _hero_models.get(hero_type) is not model:
        _find_hero_model(hero_type)  # for the error, if there are others of the name
        _hero_models[hero_type] = model
    return hero_type, hero_id


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
        blueprint = _Blueprint(cls, frozenset(dir(Workflow)))
        for ancestor in reversed(cls.__mro__):
            if not issubclass(Workflow, ancestor):
                blueprint.add_class(ancestor)
        for method in blueprint.methods():
            problem = "it must stay a method: a step, a condition or a handler relies on it"
            _require(callable(getattr(cls, method)), f"{name}.{method}", problem)
        try:
            Workflow.__new__(Workflow).__class__ = cls  # as reading a row does
        except TypeError as error:
            problem = "its instances cannot be made from rows: name Workflow first among the bases, use no __slots__"
            raise StepConfigurationError(f"{name}: {problem} ({error})") from error
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
        built = cls._built("update", changes, where, _updating)
        return cast(int, built.database.rows_affected(built.execute({**changes, **_as_conditions(where)})))

    @classmethod
    def _insert_row(cls, values: Mapping[str, Any]) -> int:
        """Insert a row; returns its id."""
        built = cls._built("insert", values, (), _inserting)
        cursor = built.execute(values)
        returns = " RETURNING " in built.sql  # the drivers' ways of telling differ
        return cast(int, cursor.fetchone()[0] if returns else built.database._last_insert_rowid(cursor))

    @classmethod
    def _insert_rows(cls, rows: Sequence[Mapping[str, Any]], make: Any) -> None:
        """Insert rows that have the same columns, with one statement."""
        built = cls._built("insert many", rows[0], (), lambda model, new, _: make(model, new))
        head, row, tail = cast(Any, re.fullmatch(r"(.+ VALUES )(\([^()]+\))(.*)", built.sql)).groups()
        parameters = itertools.chain.from_iterable(map(built.filled, rows))
        built.database.execute_sql(f"{head}{', '.join([row] * len(rows))}{tail}", [*parameters])

    @classmethod
    def _row(cls, **where: Any) -> Any:
        """The row with these values, or None."""
        built = cls._built("select", (), where, lambda model, _, found: model.select().where(*found))
        values = built.execute(_as_conditions(where)).fetchone()
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
        model, fields = cls._meta.model, cls._meta.fields

        def query() -> Any:
            new = {fields[name]: _Blank.value(fields[name], name) for name in columns}
            found = [fields[name] == _Blank.value(fields[name], f"={name}") for name in where]
            return make(model, new, found)

        return _drive()._statement(cls._meta.database, (model, verb, *columns, "where", *where), query)

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
        return _drive()._repeat(cls._locking(cls._meta.model.select().where(*where), skip_locked).get_or_none)

    @classmethod
    def _locking(cls, query: Any, skip_locked: bool = False) -> Any:
        """A query that locks its rows: a plain one could be served from an old snapshot."""
        database = cls._meta.database
        # SQLite's transactions hold the one write lock anyway; outside of one there is neither snapshot nor lock.
        if not database.for_update or not database.in_transaction():
            return query
        return query.for_update(_drive()._skip_locked if skip_locked else True)


def _in_state(state: str, doc: str) -> _StateQuery:
    """A class method that selects by state."""

    def select(cls: type[Workflow]) -> Any:
        return cls.select().where(Workflow.state == state)

    select.__doc__ = f"{doc} A query, over this class and its subclasses."
    return cast("_StateQuery", classmethod(select))


class Workflow(_Record, metaclass=_WorkflowType):
    """A durable sequence of steps about a hero. Subclass it and declare the steps with :func:`step`.

    Class attributes to set: `may_proceed_without_hero`, `step_options`, `exception_policies`, `workflow_type`.
    Instances are rows; their state is changed by the methods below, never by assigning to a column.
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
    #: How many executions it has had: the number of the newest one, and the fence around every change.
    execution_count: peewee.Field[int] = peewee.IntegerField(default=1)
    pause_requested: peewee.Field[bool] = peewee.BooleanField(default=False)
    #: Tells apart workflows that get the same id, one after the other.
    token: peewee.Field[str] = _NameField()
    created_at: peewee.Field[datetime] = _UtcField()
    transitioned_at: peewee.Field[datetime | None] = _UtcField(null=True)

    class Meta:
        table_name = "geneva_drive_workflows"

    may_proceed_without_hero = False
    step_options: Mapping[str, Any] = {}
    exception_policies: Sequence[ExceptionPolicy] = []
    workflow_type = ""
    #: The steps in their order, own and inherited; those that were removed are left out.
    steps: tuple[StepDefinition, ...] = ()

    _blueprint: _Blueprint
    _attempt: _Attempt | None = None

    @classmethod
    def _from_columns(cls, values: Sequence[Any]) -> Any:
        row = super()._from_columns(values)
        row.__class__ = _workflow_classes.get(row.type, Workflow)
        return row

    # -- starting ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, hero: Model | None = None, allow_multiple: bool = False, context: _Json = None, options: _Json = None
    ) -> Self:
        """Start a workflow. It is durable once the transaction that surrounds the call, if any, is committed.

        :param hero: a saved instance of any model; None only where `may_proceed_without_hero`.
        :param allow_multiple: neither count nor be counted where one ongoing workflow per class and hero is allowed.
        :param context: a JSON object to be kept with the workflow.
        :param options: `{"queue": ..., "priority": ...}` for this workflow's steps.
        :returns: the workflow, an instance of this class.
        :raises AlreadyOngoingError: if the hero has an ongoing workflow of this class.
        :raises TypeError, ValueError: if the hero or the context is not acceptable; nothing is written.
        :raises StepConfigurationError: if the class has no steps or the options are wrong.
        :raises UnknownQueueError: if a step asks for a queue that the drive does not have.
        """
        drive = _drive()
        options = cls._checked_start(drive, allow_multiple, context, options)
        key = (None, None) if hero is None and cls.may_proceed_without_hero else _hero_key(hero)
        values = cls._new_values(drive, key, allow_multiple, context, options)
        for _ in range(TRANSACTION_TRIES):
            try:
                workflow = drive._transact(lambda: cls._insert(drive, values))
                break
            except peewee.IntegrityError as error:
                ongoing = cls._ongoing_id(values)
                if ongoing is not None:
                    raise AlreadyOngoingError(values, ongoing) from error
                collision = error  # it ended in between: try again
        else:
            raise collision
        if hero is not None:
            workflow._hero = hero
        return workflow

    @classmethod
    def get_or_create(cls, hero: Model | None = None, **kwargs: Any) -> tuple[Self, bool]:
        """The hero's ongoing workflow of this class, or a new one; safe when several processes ask at once.

        :param kwargs: as for :meth:`create`, for a new one.
        :returns: the workflow, and whether it was created.
        """
        key = {} if hero is None else dict(zip(("hero_type", "hero_id"), _hero_key(hero), strict=True))
        for _ in range(TRANSACTION_TRIES):
            ongoing = None if hero is None else cls._ongoing_id(key)
            if ongoing is None:
                try:
                    return cls.create(hero=hero, **kwargs), True
                except AlreadyOngoingError as error:
                    ongoing = error.workflow_id
            workflow = Workflow._lock(Workflow.id == ongoing)
            if workflow is not None:
                return workflow, False
        raise GenevaDriveError(f"{cls.workflow_type}.get_or_create(): workflows come and go too fast; try again")

    @classmethod
    def create_many(cls, heroes: Iterable[Model], on_conflict: str = "raise") -> int:
        """Start a workflow for each hero: all or nothing, and set-based, for tens of thousands of them.

        :param on_conflict: "raise", or "ignore" to leave out the heroes that have an ongoing workflow of this class.
        :returns: how many were created.
        :raises AlreadyOngoingError: if a hero has one, or is there twice, and conflicts are not ignored.
        """
        if on_conflict not in ("raise", "ignore"):
            raise ValueError(f'{cls.__name__}.create_many(): on_conflict must be "raise" or "ignore"')
        drive = _drive()
        cls._checked_start(drive, False, None, None)
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for hero in heroes:
            key = _hero_key(hero)
            if key not in rows:
                rows[key] = cls._new_values(drive, key, False, None, None)
            elif on_conflict == "raise":
                raise AlreadyOngoingError(rows[key], None)

        def insert() -> int:
            return sum(
                cls._insert_many(drive, list(batch), on_conflict) for batch in peewee.chunked(rows.values(), 1000)
            )

        return drive._transact(insert)

    @classmethod
    def _checked_start(cls, drive: GenevaDrive, allow_multiple: bool, context: _Json, options: _Json) -> _Json:
        """Check all of a start but the hero, before anything is written; returns the options."""
        where = f"{cls.__name__}.create()"
        _require(cls.steps, where, "the class has no steps; was a @step decorator forgotten?")
        if not isinstance(allow_multiple, bool):
            raise TypeError(f"{where}: allow_multiple must be a bool, not {allow_multiple!r}")
        if context is not None:
            _dump_object(context)
        if options is not None:
            options = _checked_options(options, f"{where}: options")
        for definition in cls.steps:
            drive._check_route(f"{cls.__name__}.{definition.name}", cls._huey_options(definition.name, options))
        return options

    @classmethod
    def _new_values(
        cls, drive: GenevaDrive, key: tuple[Any, Any], allow_multiple: bool, context: _Json, options: _Json
    ) -> dict[str, Any]:
        """The columns of a new workflow of the hero with this type and id."""
        return {
            **Workflow._meta.get_default_dict(),
            "type": cls.workflow_type,
            "hero_type": key[0],
            "hero_id": key[1],
            "current_step_name": cls.steps[0].name,
            "allow_multiple": allow_multiple,
            "context": _Context("{}" if context is None else _dump_object(context)),
            "options": options,
            "token": uuid.uuid4().hex,
            "created_at": drive._now(),
            "transitioned_at": None,
        }

    @classmethod
    def _insert(cls, drive: GenevaDrive, values: dict[str, Any]) -> Self:
        workflow = cls._made(values, Workflow._insert_row(values))
        drive._announce(workflow, None, READY)  # before its message wakes a worker, which announces what follows
        StepExecution._schedule(workflow, 1, cls.steps[0].name, values["created_at"] + cls.steps[0].wait)
        return workflow

    @classmethod
    def _insert_many(cls, drive: GenevaDrive, rows: list[dict[str, Any]], on_conflict: str) -> int:
        ignore = "IGNORE" if drive._dialect == "mysql" else "NOTHING"
        Workflow._insert_rows(rows, lambda model, new: model.insert(new).on_conflict(action=ignore))
        # Found through the index of ongoing workflows; the token tells ours from those that were there before.
        query = Workflow.select(Workflow.token, Workflow.id).where(
            (Workflow.type == cls.workflow_type)
            & Workflow.hero_type.in_({row["hero_type"] for row in rows})
            & Workflow.hero_id.in_([row["hero_id"] for row in rows])
            & _ongoing_rows()
        )
        ids = dict(query.tuples())
        created = [cls._made(row, ids[row["token"]]) for row in rows if row["token"] in ids]
        if len(created) < len(rows) and on_conflict == "raise":
            row = next(row for row in rows if row["token"] not in ids)
            raise AlreadyOngoingError(row, cls._ongoing_id(row))
        for workflow in created:
            drive._announce(workflow, None, READY)
        if created:
            StepExecution._schedule_first(created)
        return len(created)

    @classmethod
    def _ongoing_id(cls, values: Mapping[str, Any]) -> int | None:
        """The id of the ongoing workflow of this class and hero, if there is one, in spite of any old snapshot."""
        hero = (Workflow.hero_type == values["hero_type"]) & (Workflow.hero_id == values["hero_id"])
        workflow = Workflow._lock((Workflow.type == cls.workflow_type) & hero & _ongoing_rows())
        return workflow and workflow.id

    # -- flow control -----------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End the workflow for good. Inside a step this ends its body at once.

        From outside, a resumable step that is being performed ends at its next checkpoint, another one as it does.

        :raises InvalidStateError: from outside, if the workflow is over.
        :raises FlowControlInTransactionError: inside a step, within a transaction that the step has begun.
        """
        self._control("cancel", _canceled)

    def pause(self) -> None:
        """Halt the workflow until :meth:`resume`. Inside a step this ends its body at once, to run again then.

        From outside, a step that is being performed ends and is recorded first; a resumable one ends at its next
        checkpoint.

        :raises InvalidStateError: from outside, if the workflow is paused or over.
        :raises FlowControlInTransactionError: inside a step, within a transaction that the step has begun.
        """
        self._control("pause", _paused)

    def skip(self) -> None:
        """Go on with the next step. Inside a step this ends its body at once; from outside it also resumes.

        :raises InvalidStateError: from outside, if the workflow is performing or over.
        :raises FlowControlInTransactionError: inside a step, within a transaction that the step has begun.
        """
        self._control("skip", _skipped)

    def reattempt(self, wait: timedelta | float | None = None, rewind: bool = False) -> NoReturn:
        """Inside a step: end its body at once and run it again, after `wait` (a timedelta or seconds).

        :param rewind: let a resumable step begin at the start, not at its cursor.
        :raises InvalidStateError: from outside.
        :raises FlowControlInTransactionError: inside a step, within a transaction that the step has begun.
        """
        self._control("reattempt", None, _duration(wait or 0, "reattempt(): wait"), rewind)
        raise AssertionError("unreachable")

    def finish(self) -> NoReturn:
        """Inside a step: end its body at once, and the workflow with it, as finished.

        :raises InvalidStateError: from outside.
        :raises FlowControlInTransactionError: inside a step, within a transaction that the step has begun.
        """
        self._control("finish", None)
        raise AssertionError("unreachable")

    def resume(self) -> None:
        """Let a paused workflow go on: what was scheduled keeps its time, else the step it stands at runs now.

        A resumable step goes on at its cursor. The counts of reattempts and recoveries start anew.

        :raises InvalidStateError: if it is not paused.
        :raises StepNotDefinedError: if its class does not define that step.
        """
        self._control("resume", _resumed)

    def resume_at(self, step_name: str) -> None:
        """Let a paused workflow go on with another step, now, or begin the one that it stands at from the start.

        :raises InvalidStateError: if it is not paused.
        :raises StepNotDefinedError: if there is no such step, or no longer.
        """
        self._control("resume_at", functools.partial(_moved, step_name=step_name))

    def _control(self, call: str, change: Any, wait: timedelta = NO_WAIT, rewind: bool = False) -> None:
        """Inside an attempt, end its body; outside, make the change under the workflow's row lock."""
        if self._attempt is not None and ("step", call) in EFFECTS:
            self._attempt.leave(call, wait, rewind)
        drive = _drive()

        def locked_change() -> Workflow:
            row, active = Workflow._lock_with_active(self.id)
            if row is None:
                raise Workflow.DoesNotExist(f"{self._label} was deleted; {call}() came too late")
            if row.state not in ALLOWED_FROM[call] or (row.pause_requested and call == "pause"):
                raise InvalidStateError(row, call)
            before = row.state
            change(drive, row, active)
            drive._announce(row, before, row.state)
            return row

        self._take_over(drive._transact(locked_change))

    @classmethod
    def _lock_with_active(cls, workflow_id: int) -> tuple[Any, Any]:
        """The row and its active execution, each or None, in the order in which everything locks them."""
        row = Workflow._lock(Workflow.id == workflow_id)
        return row, StepExecution._lock((StepExecution.workflow == workflow_id) & StepExecution.state.in_(ACTIVE))

    # -- signals ----------------------------------------------------------------------------------------------------

    #: In the body of a step with `wait_for`: the payload of the signal that it was given; None after a timeout.
    signal_payload: Any = None

    def signal(self, name: str, payload: Any = None, idempotency_key: str | None = None) -> bool:
        """Tell the workflow that something happened outside. A step that waits for it runs now, one to come later.

        Durable once the transaction that surrounds the call, if any, is committed. The signal is kept until the step
        that it was given to has ended, so that each attempt at it finds it; a paused workflow keeps it for
        :meth:`resume`.

        :param payload: any JSON value of up to 128 KiB, for `self.signal_payload`.
        :param idempotency_key: text of 1 to 255 characters; a second signal of the name and key changes nothing.
        :returns: True; False if it was delivered before, to a workflow that is over by now, too.
        :raises InvalidStateError: if the workflow is finished or canceled.
        :raises UnknownSignalError: if no step of its class waits for such a signal.
        :raises TypeError, ValueError: if the payload or the key is not acceptable; nothing is written.
        """
        self._check_signal(name, payload, idempotency_key)
        values = {"workflow": self.id, "name": name, "payload": payload, "idempotency_key": idempotency_key}
        drive = _drive()
        try:
            return drive._transact(lambda: _received(drive, self, values))
        except peewee.IntegrityError:
            if idempotency_key is None:
                raise
            return False  # the caller's transaction began before the first delivery, and cannot see it

    @classmethod
    def signal_hero(cls, hero: Model, name: str, payload: Any = None, idempotency_key: str | None = None) -> bool:
        """Send a signal to the ongoing workflow of this class about a hero; see :meth:`signal`.

        :returns: True; False if a workflow of this class and hero had this name and key before.
        :raises InvalidStateError: if there is none ongoing, but one that is over.
        :raises Workflow.DoesNotExist: if there never was one.
        :raises ValueError: if there are several, as `allow_multiple` has it.
        """
        drive, query, key = _drive(), cls.for_hero(hero), WorkflowSignal.idempotency_key == idempotency_key
        if idempotency_key is not None:  # a key is one event's, whichever of the hero's workflows had it
            before = query.join(WorkflowSignal).where((WorkflowSignal.name == name) & key)
            if drive._repeat(before.exists):
                return False
        of_hero = cls._locking(query.where(Workflow.state.in_(ONGOING)).order_by(Workflow.id))
        ongoing = drive._repeat(functools.partial(list[Any], of_hero))
        about = f"{cls.__name__}.signal_hero({_hero_label(*_hero_key(hero))})"
        if len(ongoing) > 1:
            ids = ", ".join(str(each.id) for each in ongoing)
            raise ValueError(f"{about}: the workflows {ids} are ongoing; call signal() of the one that is meant")
        workflow = ongoing[0] if ongoing else drive._repeat(query.order_by(Workflow.id.desc()).first)
        if workflow is None:
            raise cls.DoesNotExist(f"{about}: there is no {cls.__name__} about it: create() one first")
        return workflow.signal(name, payload, idempotency_key)

    def _check_signal(self, name: Any, payload: Any, key: Any) -> None:
        if not _is_name(name):
            raise UnknownSignalError(self, name)
        _dump_json(payload, f"the payload of the signal {name!r}")
        if key is not None and not isinstance(key, str):
            raise TypeError(f"the idempotency_key of the signal {name!r} must be text, not {key!r}")
        if key is not None and not _is_name(key):
            raise ValueError(f"the idempotency_key of the signal {name!r} must have 1 to 255 printable characters")

    # -- resumable steps --------------------------------------------------------------------------------------------

    @property
    def cursor(self) -> Any:
        """In a resumable step: what :meth:`checkpoint` kept last, in this attempt or an earlier one; None at the start.

        Each reading is a query. From outside, :attr:`execution_history` has the cursor of each attempt.

        :raises StepConfigurationError: elsewhere.
        """
        return self._attempt_that_keeps("cursor").cursor()

    def checkpoint(self, value: Any) -> None:
        """In a resumable step: keep how far it came; the next attempt at it goes on there.

        Commits; or, within a transaction of the body's on the drive's database, is part of it: let it be the last
        statement there, for the next heartbeat waits for it. Ends the body at once, as flow control does, if the
        workflow was canceled or paused meanwhile, or its consumer drains: another one then goes on. A transaction that
        it is a part of is rolled back by that, and its part of the work done again.

        :param value: any JSON value, up to 128 KiB; it is the `cursor` from now on.
        :raises StepConfigurationError: elsewhere, and beside :meth:`resume_over`.
        :raises TypeError, ValueError: if the value is not acceptable.
        """
        self._attempt_that_keeps("checkpoint()").checkpoint(value)

    def resume_over(self, items: Iterable[T], key: Any = None, every: int = 100) -> Iterator[T]:
        """In a resumable step: go over items, with a :meth:`checkpoint` after each `every` of them and at the end.

        What was done since the last checkpoint is done again after a crash or an error: `every` items at most.

        :param items: a query of a model, or the model itself, read in pages of `every` rows along `key`; or any other
            iterable that has the same items in the same order each time.
        :param key: for a query: a unique field of its model that cannot be null, ascending or with `.desc()`; None
            takes the primary key. The rows that are there when their page is read are visited.
        :param every: how many items there are from one checkpoint to the next.
        :raises StepConfigurationError: if the items cannot be resumed, or were others when the cursor was kept; if the
            step is not resumable, or uses its cursor already.
        """
        return self._attempt_that_keeps("resume_over()").resume_over(items, key, every)

    def _attempt_that_keeps(self, call: str) -> _Attempt:
        """The attempt under way at a resumable step; else a StepConfigurationError."""
        attempt = self._attempt
        if attempt is None:
            raise StepConfigurationError(f"{self._label}: {call} is for the body of a step with @step(resumable=True)")
        name = attempt.execution.step_name
        is_resumable = self._definition(name).resumable
        _require(is_resumable, f"{self.type}.{name}", f"{call} needs a cursor: declare it with @step(resumable=True)")
        return attempt

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def hero(self) -> Any:
        """The row that the workflow is about, read once per instance; None if it is gone or there is none.

        It is read with its model's `select()`. Where that one adds a condition, let it add none in a worker, which has
        neither a request nor a tenant: a row that it leaves out is gone, and its workflow canceled. If it raises
        instead, that is the step's error. From outside, whoever may not see the row is told that it is gone.
        """
        if "_hero" not in self.__dict__:
            model = self.hero_type and _hero_model(self.hero_type)
            self._hero = None
            if model:
                is_binary = isinstance(_key_field(model), peewee.BinaryUUIDField)
                self._hero = _hero_row(model, uuid.UUID(self.hero_id) if is_binary else self.hero_id)
        return self._hero

    @property
    def execution_history(self) -> _Query[StepExecution]:
        """The executions in their order: a query of :class:`StepExecution`."""
        return StepExecution.select().where(StepExecution.workflow == self.id).order_by(StepExecution.number)

    @classmethod
    def graph(cls) -> str:
        """The class as a Mermaid flowchart: its steps, the waits between them, conditions and policies."""
        lines, last = ["flowchart TD", _mermaid_node("start", "([{}])", cls.__name__)], "start"
        for number, each in enumerate(cls.steps, 1):
            notes = [_signal_note(each)] if each.wait_for else []
            notes += [f"skip if {_name_of(each.skip_if)}"] if each.skip_if else []
            notes += ["transactional"] if each.transactional else []
            notes += ["resumable"] if each.resumable else []
            notes += [_policy_note(each.policy)] if each.policy else []
            wait = f'|"{_span(each.wait)}"|' if each.wait else ""
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

    def _is_awaited(self, execution: StepExecution, signal_name: str) -> bool:
        """Whether an execution waits for signals of the name, as it began to, or as its class has it by now."""
        definition = self._find(execution.step_name)
        return signal_name in (execution.waiting_for, definition and definition.wait_for)

    def _step_after(self, step_name: str) -> StepDefinition | None:
        steps = self._blueprint.steps
        place = steps.index(self._definition(step_name)) + 1
        return next((each for each in steps[place:] if not each.removed), None)

    @classmethod
    def _huey_options(cls, step_name: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Of the class, the instance and the step: the latter win."""
        definition = cls._find(step_name)
        own = definition.options if definition else {}
        return {**cls._blueprint.step_options, **(options or {}), **own}

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
    paused = _in_state(PAUSED, "The workflows that wait for :meth:`resume`.")
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
        """What a deploy would strand, over this class and its subclasses; to be asked with the new code, beforehand.

        A step that is declared as removed is defined; of a type that no class defines, none is. Reads all rows.

        :returns: the steps that ongoing workflows stand at and that are not defined in this process, sorted.
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
        may_be_undone = drive._db.in_transaction()

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

        merged = drive._transact(merge)
        if merged is not None and may_be_undone:  # then the changes are to be written again
            context.at_commit = drive._after_commit(functools.partial(setattr, context, "read", text))
        elif merged is not None:
            context.follow(merged)
        self._dirty.discard("context")
        return int(merged is not None)

    def _take_over(self, other: _Record) -> None:
        mine = self.context
        super()._take_over(other)
        if mine is not None and mine.at_commit in _drive()._db._state.commit_callbacks:
            mine.at_commit()  # what the transaction under way has saved is in the other one
        if mine is not None and mine.is_changed():  # and not saved: it must not get lost
            self.__data__["context"], _ = mine.onto(self.context.read)
            self.context.read = other.context.read


def _ongoing_rows() -> Any:
    """The rows that the unique index of ongoing workflows holds; literals, or SQLite would not see that it applies."""
    return SQL(f"state in {ONGOING} and not allow_multiple")


def _count_ongoing(query: Any, *columns: Any) -> list[Any]:
    """What columns hold in the rows about ongoing workflows, and of how many: sorted tuples, without nulls."""
    query = query.select(*columns, peewee.fn.COUNT(Workflow.id.distinct())).where(Workflow.state.in_(ONGOING))
    return sorted(query.where(*[each.is_null(False) for each in columns]).group_by(*columns).tuples())


Workflow._blueprint = _Blueprint(Workflow, frozenset())

#: What others may write to while a step is performed, and the next one is to see. The rest of the row is known.
OF_OTHERS: list[Any] = [Workflow.context, Workflow.options]

# ==== Calls from outside of a step ====================================================================================

# The workflow's row is locked; its active execution, if any, is `active`.


def _received(drive: GenevaDrive, workflow: Workflow, values: dict[str, Any]) -> bool:
    """Keep a signal, and wake the execution that waits for it. Whether it is a new one.

    A step begins to wait under the lock of the same row: whichever of the two comes first, the other one sees it.
    """
    row, active = Workflow._lock_with_active(workflow.id)
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
    if active and active.state == WAITING and row.state == READY and row._is_awaited(active, name):
        _wake(drive, row, active)
    return True


def _wake(drive: GenevaDrive, workflow: Workflow, execution: StepExecution) -> None:
    """Have an execution that waits run: not before its time, and to see for itself what signals there are."""
    due = max(execution.scheduled_for, drive._now())
    route = drive._route(workflow, execution.step_name)
    drive._enqueue_again(execution, route, state=SCHEDULED, scheduled_for=due)


def _must_wait(workflow: Workflow, definition: StepDefinition, execution: StepExecution | None = None) -> bool:
    """Whether there is no signal for a step that waits, but those that its execution looked at. Needs the lock."""
    if definition.wait_for is None:
        return False
    looked_at = execution.signal_id if execution else None
    return WorkflowSignal._lock(*WorkflowSignal._pending(workflow, definition, looked_at)) is None


def _beginning(workflow: Workflow, values: Mapping[str, Any]) -> dict[str, Any]:
    """How a new execution begins: scheduled, or waiting for a signal that has not come. Needs the workflow's lock.

    :param values: the execution's; with `times_out_at` where an earlier attempt has begun to wait.
    """
    definition = workflow._find(values["step_name"])
    if definition is None or definition.wait_for is None:
        return {"state": SCHEDULED}
    due, times_out_at = values["scheduled_for"], values.get("times_out_at")
    if times_out_at is None and definition.timeout is not None:
        times_out_at = due + definition.timeout
    is_late = times_out_at is not None and times_out_at <= due
    # Before the first execution, there were no signals.
    waits = not is_late and (values["number"] == 1 or _must_wait(workflow, definition))
    state = WAITING if waits else SCHEDULED
    return {"state": state, "waiting_for": definition.wait_for, "times_out_at": times_out_at}


def _canceled(drive: GenevaDrive, workflow: Workflow, active: StepExecution | None) -> None:
    _drop(drive, active)
    workflow._write(state=CANCELED, current_step_name=None, transitioned_at=drive._now(), pause_requested=False)


def _paused(drive: GenevaDrive, workflow: Workflow, active: StepExecution | None) -> None:
    if workflow.state == PERFORMING:
        workflow._write(pause_requested=True)  # obeyed by whoever records the running step
    else:
        workflow._write(state=PAUSED, transitioned_at=drive._now())


def _skipped(drive: GenevaDrive, workflow: Workflow, active: StepExecution | None) -> None:
    following, now = workflow._step_after(cast(str, workflow.current_step_name)), drive._now()
    ended = {"state": SKIPPED, "outcome": "skipped", "finished_at": now, "signal_id": None}
    WorkflowSignal._consume_given(workflow, workflow.current_step_name, now)
    if active:
        active._write(**ended)
    else:
        workflow._write(execution_count=workflow.execution_count + 1)
        StepExecution._insert(workflow, workflow.execution_count, workflow.current_step_name, now, **ended)
    if following:
        _enter(workflow, following.name, now + following.wait)
    else:
        workflow._write(state=FINISHED, current_step_name=None, transitioned_at=now)


def _resumed(drive: GenevaDrive, workflow: Workflow, active: StepExecution | None) -> None:
    definition = workflow._definition(workflow.current_step_name)
    if active:
        waits_for = definition.wait_for if active.state == WAITING else active.waiting_for  # it may have been renamed
        active._write(reattempts=0, recoveries=0, waiting_for=waits_for)
        if active.state == WAITING and not _must_wait(workflow, definition, active):
            _wake(drive, workflow, active)
        else:
            drive._enqueue_again(active, drive._route(workflow, definition.name))
        workflow._write(state=READY, transitioned_at=None)
    else:
        number = StepExecution.number == workflow.execution_count
        newest = StepExecution._lock(number & (StepExecution.workflow == workflow.id))
        has_begun = newest.cursor is not None and newest.step_name == definition.name
        # What goes on at its cursor does not wait for its signal anew.
        carried = {"cursor": newest.cursor, "times_out_at": newest.times_out_at} if has_begun else {}
        _enter(workflow, definition.name, drive._now(), **carried)


def _moved(drive: GenevaDrive, workflow: Workflow, active: StepExecution | None, step_name: str) -> StepExecution:
    if workflow._definition(step_name).removed:
        raise StepNotDefinedError(workflow, step_name)
    _drop(drive, active)
    return _enter(workflow, step_name, drive._now())


def _drop(drive: GenevaDrive, active: StepExecution | None) -> None:
    if active and active.state != IN_PROGRESS:  # which records by itself what came of it
        active._write(state=CANCELED, outcome="canceled", finished_at=drive._now(), signal_id=None)


def _enter(workflow: Workflow, step_name: str, due: datetime, **carried: Any) -> StepExecution:
    """Schedule a new execution and make the workflow stand at it."""
    number = workflow.execution_count + 1
    workflow._write(state=READY, current_step_name=step_name, execution_count=number, transitioned_at=None)
    return StepExecution._schedule(workflow, number, step_name, due, **carried)


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
    scheduled_for: peewee.Field[datetime] = _UtcField()
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
    #: The signal that it waits, or waited, for. Until when: after that, `on_timeout` says what follows.
    waiting_for: peewee.Field[str | None] = _NameField(null=True)
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
        """When it is to be performed; None if it waits for a signal without a limit."""
        return self.times_out_at if self.state == WAITING else self.scheduled_for

    def execute(self) -> bool:
        """Run this attempt in the calling process, whether it is due or not, and nothing after it.

        Where an event loop runs in the calling thread, what is asynchronous in it is run in a thread, on a connection
        of that thread's: it does not see what the caller's transaction has written, nor an in-memory database of
        SQLite, and on SQLite it cannot write as long as the caller's transaction does.

        :returns: True; or False, and nothing was done, if it is not scheduled any more, if it waits for a signal or its
            workflow is not ready.
        :raises BaseException: the step's error, once its outcome is committed, if it paused or canceled the workflow.
        """
        context = _own_context()
        attempt = context.run(_Attempt.claim, _drive(), self.id)
        if attempt is None:
            return False
        try:
            context.run(attempt.run)
        finally:
            self._take_over(attempt.execution)
        return True

    @classmethod
    def _with_workflow(cls, execution_id: int, as_json: bool = False) -> Any:
        """The row and its workflow's in one statement, or None; the statement may make one column of them."""

        def query() -> Any:
            columns: list[Any] = [*cls._meta.sorted_fields, *Workflow._meta.sorted_fields]
            if as_json:
                columns = [peewee.fn.json_array(*map(_as_bytes, columns))]
            return cls.select(*columns).join(Workflow).where(cls.id == _Blank.value(cast(Any, cls.id), "id"))

        found = _drive()._statement(cls._meta.database, ("claim", as_json), query).execute({"id": execution_id})
        values = found.fetchone()
        if as_json and values:
            values = values[0] and json.loads(values[0])  # nothing, where max_allowed_packet is too small for it
        if not values:
            return None
        width = len(cls._columns())
        execution = cls._from_columns(values[:width])
        execution.__rel__["workflow"] = Workflow._from_columns(values[width:])
        return execution

    @classmethod
    def _insert(cls, workflow: Workflow, number: int, step_name: str | None, due: datetime, **values: Any) -> Any:
        values = cls._new_values(workflow, number, step_name, due, **values)
        return cls._made(values, cls._insert_row(values))

    @classmethod
    def _new_values(
        cls, workflow: Workflow, number: int, step_name: str | None, due: datetime, **values: Any
    ) -> dict[str, Any]:
        """The columns of a new execution."""
        values.update(workflow=workflow.id, number=number, step_name=step_name, scheduled_for=due)
        return {**cls._meta.get_default_dict(), **values, "created_at": _drive()._now()}

    @classmethod
    def _schedule(cls, workflow: Workflow, number: int, step_name: str, due: datetime, **carried: Any) -> StepExecution:
        """Insert an execution: queued for its time, or waiting for a signal."""
        values = cls._new_values(workflow, number, step_name, due, **carried)
        values.update(_beginning(workflow, values))
        values.update(cls._queued(values))
        execution = cls._made(values, cls._insert_row(values))
        _drive()._enqueue([execution], _drive()._route(workflow, step_name))
        return execution

    @classmethod
    def _queued(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The columns for a message, if a new execution is to have one: not if it waits without a limit."""
        if values["state"] == WAITING and not values["times_out_at"]:
            return {}
        return {"enqueued_at": values["created_at"], "job_id": _job_id(values["created_at"])}

    @classmethod
    def _schedule_first(cls, workflows: list[Workflow]) -> None:
        """Insert and queue the first executions of new workflows of one class."""
        drive = _drive()
        first, now = workflows[0].steps[0], drive._now()
        same = cls._new_values(workflows[0], 1, first.name, now + first.wait)
        same.update(_beginning(workflows[0], same), enqueued_at=now)
        rows = [{**same, "workflow": workflow.id, "job_id": _job_id(now)} for workflow in workflows]
        cls._insert_rows(rows, lambda model, new: model.insert(new))
        query = cls.select(cls.workflow, cls.id).where(cls.workflow.in_([workflow.id for workflow in workflows]))
        ids = dict(query.tuples())
        executions = [cls._made(row, ids[row["workflow"]]) for row in rows]
        drive._enqueue(executions, drive._route(workflows[0], first.name))


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
    note: str = ""  # for the log, once it is committed
    rewind: bool = False  # whether the next attempt at a resumable step is to begin at the start


#: What was written: to the workflow, and to the execution; the attempt at the step that follows, if it is claimed.
_Recorded: TypeAlias = "tuple[dict[str, Any], dict[str, Any], _Attempt | None]"


class _Attempt:
    """An execution that this process has claimed."""

    def __init__(
        self,
        drive: GenevaDrive,
        workflow: Workflow,
        execution: StepExecution,
        is_run_on: bool = False,
        reserved_id: int | None = None,
    ):
        self.drive, self.workflow, self.execution, self.is_run_on = drive, workflow, execution, is_run_on
        self.signal: WorkflowSignal | None = None  # the one that the body is given
        self.has_looked = execution.signal_id is not None  # at signals that were not for it, before this attempt
        self.claimed, self.patience_ends = time.monotonic(), math.inf  # the patience to record the outcome
        self.is_draining: Callable[[], bool] = lambda: False
        self.around: dict[Database, tuple[Any, int]] = {}  # the transactions around the user code under way
        self.leaving: BaseException | None = None  # what that raised by calling a flow control method
        self.must_stay = False  # in this thread, on its connection
        self.has_loop, self.has_checkpoint = False, False
        self.charset = "utf-8"  # of the texts that it records
        # Of the execution that follows, for its message; on MariaDB, what stands there for it.
        self.reserved_id = STAND_IN if drive._dialect == "mysql" else reserved_id

    @classmethod
    def claim(cls, drive: GenevaDrive, execution_id: int, queue: str | None = None) -> _Attempt | None:
        """Claim a scheduled execution: of several who try, at the same time or later, one gets it.

        :param queue: the one whose message asks for it: what is not due yet, or not defined here, is queued again.
        :returns: None if it is not to be run, or not by us.
        """
        # The message is gone from the queue: without a claim, the execution waits until it is overdue.
        return drive._transact(
            lambda: cls._claim(drive, execution_id, queue),
            PATIENCE_SECONDS,
            lambda: cls._claim_at_once(drive, execution_id),
        )

    @classmethod
    def _claim(cls, drive: GenevaDrive, execution_id: int, queue: str | None) -> _Attempt | None:
        execution = StepExecution._with_workflow(execution_id)
        if execution is None or execution.state not in TO_CLAIM or execution.workflow.state != READY:
            return None
        workflow, due, now = execution.workflow, execution._due, drive._now()
        problem = workflow._undefined()
        if problem:
            logger.error("execution %s stays scheduled: %s", execution_id, problem)
            return None
        is_early = due is None or due > now
        if is_early and queue:
            drive._enqueue_again(execution, drive._route(workflow, execution.step_name))
        if is_early and (queue or execution.state == WAITING):
            return None
        if queue and drive._put_off(execution, queue):
            return None
        if not Workflow._update_row({"state": PERFORMING}, **_fence(workflow, execution, READY)):
            return None
        execution._write(**_claim_columns(now))
        return cls._begun(drive, workflow, execution)

    @classmethod
    def _claim_at_once(cls, drive: GenevaDrive, execution_id: int) -> _Attempt | None:
        """What `_claim()` does most of the time, in one statement besides the reading; None if it is another time."""
        execution, now = StepExecution._with_workflow(execution_id, drive._dialect in READ_AS_JSON), drive._now()
        if execution is None or execution.state != SCHEDULED or execution.scheduled_for > now:
            return None
        workflow, claim = execution.workflow, _claim_columns(now)
        if workflow._undefined() or workflow._find(execution.step_name) is None:
            return None
        moved = _Move({"state": PERFORMING}, _fence(workflow, execution, READY), claim, execution_id).at_once()
        if moved is None:
            return None
        execution.__data__.update(claim)
        return cls._begun(drive, workflow, execution, moved.reserved_id)

    @classmethod
    def _begun(
        cls, drive: GenevaDrive, workflow: Workflow, execution: StepExecution, reserved_id: int | None = None
    ) -> _Attempt:
        workflow.__data__["state"] = PERFORMING
        drive._announce(workflow, READY, PERFORMING)
        return cls(drive, workflow, execution, reserved_id=reserved_id)

    def run(
        self, may_run_on: Callable[[], bool] = lambda: False, is_draining: Callable[[], bool] = lambda: False
    ) -> _Attempt | None:
        """Perform the step and record what came of it.

        :param may_run_on: asked as the outcome is recorded, whether to claim the next step in the same commit.
        :param is_draining: asked at a checkpoint, whether to leave the rest to another consumer.
        :returns: the attempt at the next step, if it was claimed.
        :raises BaseException: the step's error, if it is to leave the task.
        """
        following, recorded = None, True
        self.workflow._attempt, self.is_draining = self, is_draining
        _heartbeat.add(self)
        try:
            verdict = self._overtaken()
            if verdict:
                self._record(verdict)
            else:
                step_started.send(self.workflow, execution=self.execution)
                verdict, following = self._perform_and_record(may_run_on)
                if following:
                    _heartbeat.add(following)  # it is claimed, and has to outlive the hooks below
        except _ClaimLost as lost:
            verdict, recorded = lost.args[0], False
            # Or the connection went as the outcome was committed, and the second try found the fence gone.
            self.workflow.logger.warning("the claim was lost to recovery; nothing more is recorded of this attempt")
        finally:
            self.workflow._attempt = self.leaving = None
            _heartbeat.remove(self)
        if recorded:
            self._tell_of_end(following)
        if verdict.error is not None and verdict.surfaces:
            step_name, state = self.execution.step_name, self.workflow.state
            with contextlib.suppress(Exception):  # Python 3.10 knows no notes, a frozen dataclass takes none
                note = f"in the step {step_name} of {self.workflow._label}, which is {state} now"
                cast(Any, verdict.error).add_note(note)  # error trackers show it with the traceback
            raise verdict.error
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
        has_hooks = type(self.workflow).after_step_execution is not Workflow.after_step_execution
        is_late = time.monotonic() - self.claimed > 1 or has_hooks or step_finished._receiver_list
        if not self.is_run_on or not is_late:
            return None
        row = self.drive._repeat(lambda: Workflow.get_or_none(Workflow.id == self.workflow.id))
        execution = self.drive._repeat(lambda: StepExecution.get_or_none(StepExecution.id == self.execution.id))
        if row is None or execution is None or execution.state != IN_PROGRESS:
            raise _ClaimLost(_Verdict("step", "return"))
        if row.state == CANCELED:
            return _Verdict("step", "cancel")
        return _Verdict("step", "pause") if row.pause_requested else None

    def _perform_and_record(self, may_run_on: Callable[[], bool]) -> tuple[_Verdict, _Attempt | None]:
        try:
            definition = self.workflow._definition(self.execution.step_name)
        except StepNotDefinedError as error:  # no policy has a say in this
            verdict = _Verdict("error", "pause", error=error, surfaces=True)
            return verdict, self._record(verdict)
        self.drive._open_connection()  # a receiver may have closed it
        is_ours = definition.transactional and not self.drive._db.in_transaction()
        for tries in range(1, TRANSACTION_TRIES + 1):
            try:
                if definition.transactional:
                    with self.drive._begin():
                        verdict = self._perform(definition)
                        return verdict, self._record(verdict, may_run_on)
                verdict = self._perform(definition)
            except _ClaimLost:
                raise
            except BaseException as error:
                if is_ours and tries < TRANSACTION_TRIES and _is_transient(error):
                    _give_way(tries)
                    self._start_over()
                    continue
                if definition.transactional:  # the context is rolled back with the body's other writes
                    self.workflow.__data__["context"] = _Context(self.workflow.context.read)
                verdict = self._judge(definition, error)
            break
        return verdict, self._record(verdict, may_run_on)

    def _start_over(self) -> None:
        """A transactional step fell to a deadlock and left no trace: perform it anew, with rows that are read anew."""
        self.workflow._attempt = self.signal = None
        self.workflow = self.drive._repeat(lambda: Workflow.get_by_id(self.workflow.id))
        self.workflow._attempt = self

    # -- performing -------------------------------------------------------------------------------------------------

    def _perform(self, definition: StepDefinition) -> _Verdict:
        """Run the step; raises whatever its body raised."""
        db = self.drive._db
        if not db.in_transaction():
            return self._perform_checked(definition)
        # In a transaction of the caller's, a test's most likely: an error of the database would doom all of it on
        # PostgreSQL. The savepoint is released after other errors: what the body wrote before them stays, as it does
        # where each statement commits by itself.
        failure: BaseException | None = None
        try:
            with db.atomic():
                try:
                    return self._perform_checked(definition)
                except BaseException as error:
                    failure = error
        except peewee.DatabaseError as error:
            failure = failure or error
        raise cast(BaseException, failure)

    def _perform_checked(self, definition: StepDefinition) -> _Verdict:
        self._begin_user_code(definition.transactional)
        depth = self._depth_around(self.drive._db)
        try:
            verdict = self._flow(definition)
        finally:
            left_open = self.drive._roll_back_to(depth)
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
                return _Verdict("step", "cancel", note="canceled: the hero is gone")
            for condition in workflow._blueprint.cancel_ifs:
                if self.call(getattr(workflow, condition)):
                    return _Verdict("step", "cancel", note=f"canceled by {condition}")
            if self._is_skipped(definition):
                return _Verdict("step", "skip")
            if definition.wait_for and not self._find_signal(definition):
                is_late = execution.times_out_at is not None and execution.times_out_at <= self.drive._now()
                if not is_late:
                    return _Verdict("step", "wait")
                if definition.on_timeout != "run":
                    note, error = f"no signal {definition.wait_for} came", SignalTimeoutError(workflow, definition)
                    return _Verdict("timeout", definition.on_timeout, error=error, note=note)
            self.call(workflow.before_step_execution, execution)
            with self.call(workflow.around_step_execution, execution):
                self.call(getattr(workflow, definition.body))
            self._leave_after_all()
        except BaseException as error:
            control = _flow_control_in(error)
            if control is None:
                raise
            return _Verdict("step", control.action, control.wait, rewind=control.rewind)
        return _Verdict("step", "return")

    def _begin_user_code(self, must_stay: bool = False) -> None:
        self.drive._open_connection()  # where autoconnect is off, what ran before may have closed it
        databases, self.must_stay = self.drive._databases(), must_stay
        self.leaving, self.around = None, {each: (each._state.transactions, _depth(each)) for each in databases}

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call user code: a condition, a hook, the body, a handler. Returns what it came to."""
        self._leave_after_all()  # what surrounds a body may have swallowed a call before it
        result = function(*arguments)
        if result is not None:
            result = _finished(result, f"{self._where}: {_name_of(function)}()", self.must_stay)
        self.drive._open_connection()
        self._leave_after_all()
        return result

    def leave(self, call: str, wait: timedelta, rewind: bool) -> NoReturn:
        """End the user code that calls a flow control method; one that was refused remains its error."""
        if not isinstance(self.leaving, FlowControlInTransactionError):
            self.leaving = _FlowControl(call, wait, rewind)
            if any(_depth(each) > self._depth_around(each) for each in self.drive._databases()):
                self.leaving = FlowControlInTransactionError(self.workflow, call, self.execution.step_name)
        raise self.leaving

    def _leave_after_all(self) -> None:
        """Obey a flow control method whose exception user code has swallowed, with a bare `except:` most likely."""
        if self.leaving is not None:
            problem = "%r was swallowed, and is obeyed all the same: let it through, by `except Exception:`"
            self.workflow.logger.warning(problem, self.leaving)
            raise self.leaving

    def _depth_around(self, database: Database) -> int:
        """The depth of transactions at which the user code began; another thread or connection began at none."""
        transactions, depth = self.around.get(database, (None, 0))
        return depth if transactions is database._state.transactions else 0

    def _find_signal(self, definition: StepDefinition) -> bool:
        """Give the workflow the first signal that is for the step, and tell whether there is one."""
        page = 1 if definition.matching is None else 100
        while True:
            pending = WorkflowSignal._pending(self.workflow, definition, self.execution.signal_id)
            query = WorkflowSignal.select().where(*pending).order_by(WorkflowSignal.id).limit(page)
            found = self.drive._repeat(functools.partial(list[Any], query))
            for each in found:
                if definition.matching is None or self.call(definition.matching, each.payload):
                    self.signal, self.workflow.signal_payload = each, each.payload
                    return True
                self.execution.signal_id = each.id
            if len(found) < page:
                return False

    def _is_skipped(self, definition: StepDefinition) -> Any:
        condition = definition.skip_if
        if isinstance(condition, str):
            return self.call(getattr(self.workflow, condition))
        return self.call(condition, self.workflow) if callable(condition) else condition

    def _judge(self, definition: StepDefinition, error: BaseException) -> _Verdict:
        """What an error that left the body leads to."""
        if _ends_process(error) or self.drive._is_connection_lost(error):  # which is the server's fault
            return replace(self.drive._death(self.execution), error=error, surfaces=True)
        self._begin_user_code()
        if isinstance(error, peewee.PeeweeException):
            for each in self.drive._databases():  # the hero's own among them, which the next attempt needs
                self.drive._drop_if_dead(each, _is_gone)
        reattempts = self.execution.reattempts
        policy = self._policy_for(definition, error)
        decision = policy._decide(self.workflow, error, reattempts)
        action = decision.action
        if action == "reattempt" and policy.max_reattempts is not None and reattempts >= policy.max_reattempts:
            action = policy.terminal_action
        note = f"{type(error).__name__}: {action} after {reattempts} reattempts"
        is_reported = policy.report == "always" or (policy.report == "terminal_only" and action in ("pause", "cancel"))
        surfaces = is_reported or isinstance(error, SystemExit)
        return _Verdict("error", action, decision.wait, error, surfaces, note, rewind=decision.rewind)

    def _policy_for(self, definition: StepDefinition, error: BaseException) -> ExceptionPolicy:
        if definition.policy and definition.policy.matches(error):
            return definition.policy
        latest_first = [each for each in reversed(self.workflow._blueprint.policies) if each.matches(error)]
        specific_first = sorted(latest_first, key=lambda policy: policy.matching is None)
        return specific_first[0] if specific_first else PAUSE

    # -- keeping a cursor -------------------------------------------------------------------------------------------

    def cursor(self) -> Any:
        """How far the step came. Read each time: a checkpoint may have been rolled back with the body's transaction."""
        self.drive._open_connection()
        return self.drive._repeat(
            StepExecution.select(StepExecution.cursor).where(StepExecution.id == self.execution.id).scalar
        )

    def checkpoint(self, value: Any) -> None:
        problem = "checkpoint() beside resume_over() would take its cursor away: make two steps of them"
        _require(not self.has_loop, self._where, problem)
        self._keep(value)

    def resume_over(self, items: Any, key: Any, every: Any) -> Iterator[Any]:
        where = f"{self._where}: resume_over()"
        problem = "the step's one cursor is in use, by checkpoint() or another resume_over(): make two steps of them"
        _require(not (self.has_loop or self.has_checkpoint), where, problem)
        _require(_is_int(every) and every > 0, where, f"every must be a positive int, not {every!r}")
        if isinstance(items, peewee.ModelBase):
            items = items.select()
        loop = (_Pages if isinstance(items, peewee.BaseQuery) else _Items)(where, items, key, every)
        rest = loop.behind(self.cursor(), self._keep_place)
        self.has_loop = True
        return rest

    @property
    def _where(self) -> str:
        return f"{self.workflow.type}.{self.execution.step_name}"

    def _keep_place(self, cursor: Any) -> None:
        problem = "resume_over() within a transaction would keep nothing before its end: begin transactions in the loop"
        _require(_depth(self.drive._db) <= self._depth_around(self.drive._db), self._where, problem)
        self._keep(cursor)

    def _keep(self, value: Any) -> None:
        cursor = json.loads(_dump_json(value, "the cursor"))  # as the next attempt will see it
        self.has_checkpoint = True
        self.drive._open_connection()
        end = self.drive._transact(lambda: self._kept(cursor))
        self.execution.__data__["cursor"] = cursor
        if end is None and self.is_draining():
            self.workflow.logger.info("handed on at a checkpoint, for the consumer drains")
            end = "reattempt"
        if end:
            raise _FlowControl(end)

    def _kept(self, cursor: Any) -> str | None:
        """Write the cursor, with a heartbeat; returns how the body is to end, if it is."""
        mine = (StepExecution.id == self.execution.id) & (StepExecution.state == IN_PROGRESS)
        changes = {"cursor": cursor, "heartbeat_at": self.drive._now()}
        kept = StepExecution._update_row(changes, id=self.execution.id, state=IN_PROGRESS)
        if not kept and StepExecution._lock(mine) is None:  # MySQL counts no row that is as it was
            return "cancel"  # recovered or deleted: whatever is said here, it will not be recorded
        row = Workflow._row(id=self.workflow.id)  # not locked: whoever locks the two does so in the other order
        if row is None or row.state == CANCELED:
            return "cancel"
        return "pause" if row.pause_requested else None

    # -- recording --------------------------------------------------------------------------------------------------

    def _record(self, verdict: _Verdict, may_run_on: Callable[[], bool] = lambda: False) -> _Attempt | None:
        """Commit the outcome and what follows it: the next execution, claimed already if it may run on.

        Raises _ClaimLost, and writes nothing, if the execution is not ours any more.
        """
        run_on = not verdict.surfaces and may_run_on()
        self.drive._open_connection()  # where autoconnect is off, the body may have closed it
        try:
            try:
                changes, outcome, following = self._commit(verdict, run_on)
            except (UnicodeError, peewee.PeeweeException) as error:
                # The text of an error, which may be anything: not each connection and database takes each character.
                is_of_text = not _is_transient(error) and not self.drive._is_connection_lost(error)
                if not is_of_text or "".join(_error_columns(verdict.error).values()).isascii():
                    raise
                self.charset = "ascii"
                changes, outcome, following = self._commit(verdict, run_on)
        except _ClaimLost:
            raise _ClaimLost(verdict) from None
        self.patience_ends = math.inf
        before = self.workflow.state
        self.workflow.__data__.update(changes)
        self.execution.__data__.update(outcome)
        self.drive._announce(self.workflow, before, self.workflow.state)
        if verdict.note:
            self.drive._after_commit(lambda: self.workflow.logger.info("%s", verdict.note))
        return following

    def _commit(self, verdict: _Verdict, run_on: bool) -> _Recorded:
        # As long as the claim is ours: then another process may perform the step, and this one's outcome is void.
        patience = max(PATIENCE_SECONDS, self.drive.stuck_in_progress_threshold.total_seconds())
        self.patience_ends = time.monotonic() + patience
        return self.drive._transact(
            lambda: self._conclude(verdict, run_on), patience, lambda: self._conclude_at_once(verdict, run_on)
        )

    def _conclude(self, verdict: _Verdict, run_on: bool) -> _Recorded:
        now = self.drive._now()
        if verdict.action == "wait":
            return *self._wait_on(now), None
        changes, ended, follows = self._decide(verdict, run_on, now)
        if not Workflow._update_row(changes, **self._own_fence(changes)):
            follows = self._interrupted(changes, follows, now)
        StepExecution._update_row(ended, id=self.execution.id)
        _, _, then = EFFECTS[verdict.cause, verdict.action]
        if then in ("advance", "finish") and (self.signal or self.execution.waiting_for):
            WorkflowSignal._consume_given(self.workflow, self.execution.step_name, now)
        return changes, ended, self._go_on(follows, changes, now) if follows else None

    def _conclude_at_once(self, verdict: _Verdict, run_on: bool) -> _Recorded | None:
        """What `_conclude()` does most of the time, with fewer statements; None if it is another time."""
        if verdict.action == "wait" or self.signal or self.execution.waiting_for:
            return None
        now = self.drive._now()
        changes, ended, follows = self._decide(verdict, run_on, now)
        if follows and self._waits(follows):  # whether its signal came is known under the lock alone
            return None
        begins, message = follows and self._next_values(follows, changes["state"], now), None
        if begins and begins["state"] == SCHEDULED:
            route = self.drive._route(self.workflow, begins["step_name"])
            huey = self.drive.queues[route[0]]
            if self.drive._commits_with(huey):
                if not self.reserved_id or not isinstance(huey, _EmbeddedHuey):
                    return None
                begins["id"] = self.reserved_id
                message = _Message(huey, self.drive._task(StepExecution._made(begins, self.reserved_id), route))
        moved = _Move(changes, self._own_fence(changes), ended, self.execution.id, begins, message).at_once()
        if moved is None:
            return None
        if message:
            message.sent(cast(int, moved.execution_id))
        return changes, ended, self._follow(changes, begins, moved) if begins and not message else None

    def _decide(self, verdict: _Verdict, run_on: bool, now: datetime) -> tuple[dict[str, Any], dict[str, Any], _Json]:
        """What is to be written: to the workflow, to the execution, and of the one that follows, if any."""
        state, outcome, then = EFFECTS[verdict.cause, verdict.action]
        ended = {"state": state, "outcome": outcome, "finished_at": now}
        ended.update(_error_columns(verdict.error, self.charset))
        ended["signal_id"] = self.signal and self.signal.id
        follows = self._what_follows(verdict, then, now)
        workflow_state = WORKFLOW_STATE_AFTER[then] if follows or then != "advance" else FINISHED
        if follows and run_on and self._runs_on(follows, now):
            workflow_state = PERFORMING
        changes = {
            "state": workflow_state,
            "current_step_name": follows["step_name"] if follows else None,
            "execution_count": self.execution.number + bool(follows),
            "transitioned_at": None if workflow_state in (READY, PERFORMING) else now,
        }
        if then == "pause":
            changes["current_step_name"] = self.execution.step_name
        if self.workflow.context.is_changed():
            changes["context"] = self._merged_context(self.workflow.context.read)
        return changes, ended, follows

    def _merged_context(self, text: str) -> _Context:
        """A context, by the changes that the attempt made in its own."""
        merged, misfits = self.workflow.context.onto(text)
        if misfits:
            self.workflow.logger.warning("of the context, what is not JSON or too long was not kept: %s", misfits)
        return merged

    def _own_fence(self, changes: dict[str, Any]) -> dict[str, Any]:
        """What finds the workflow's row, unless others said something about it, or wrote the context, meanwhile."""
        fence = {**_fence(self.workflow, self.execution, PERFORMING), "pause_requested": False}
        return {**fence, "context": _ReadText(self.workflow.context.read)} if "context" in changes else fence

    def _wait_on(self, now: datetime) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put the execution back: what signals there are were not for it. Others may have come meanwhile."""
        execution, route = self.execution, self.drive._route(self.workflow, self.execution.step_name)
        definition, limit = self.workflow._definition(execution.step_name), execution.times_out_at
        if limit is None and definition.timeout is not None:  # it began when the step did not wait yet
            limit = now + definition.timeout
        columns: dict[str, Any] = {"state": WAITING, "waiting_for": definition.wait_for, "times_out_at": limit}
        columns.update(signal_id=execution.signal_id, started_at=None, heartbeat_at=None, performed_by=None)
        changes: dict[str, Any] = {"state": READY}
        if not Workflow._update_row(changes, **self._own_fence(changes)):
            self._interrupted(changes, columns, now)
        if changes["state"] == CANCELED:
            columns = {"state": CANCELED, "outcome": "canceled", "finished_at": now, "signal_id": None}
        elif changes["state"] == READY and not _must_wait(self.workflow, definition, execution):
            columns["state"] = SCHEDULED
        # Where a signal was there at its beginning, nothing was queued for its timeout.
        is_limited = limit is not None and not (self.has_looked and limit == execution.times_out_at)
        is_queued = changes["state"] == READY and (columns["state"] == SCHEDULED or is_limited)
        columns["enqueued_at"] = now  # also of one that is not: for housekeeping, since when it waits
        if is_queued:
            columns["job_id"] = _job_id(now)
        StepExecution._update_row(columns, id=execution.id)
        if is_queued:
            self.drive._enqueue([StepExecution(**{**execution.__data__, **columns})], route)
        return changes, columns

    def _interrupted(
        self, changes: dict[str, Any], follows: dict[str, Any] | None, now: datetime
    ) -> dict[str, Any] | None:
        """Others paused or canceled the workflow, wrote its context or took the claim: amend `changes` to that."""
        row = Workflow._lock(Workflow.id == self.workflow.id)
        execution = StepExecution._lock(StepExecution.id == self.execution.id)
        newest = row is not None and row.execution_count == self.execution.number
        if not newest or execution is None or execution.state != IN_PROGRESS:
            raise _ClaimLost
        if row.state == CANCELED:
            self.workflow.__data__["state"] = CANCELED  # announced when it was canceled
            for column in ("state", "current_step_name", "execution_count", "transitioned_at"):
                changes[column] = row.__data__[column]
            follows = None
        elif row.pause_requested:
            changes["pause_requested"] = False
            if follows:
                changes.update(state=PAUSED, transitioned_at=now)
        if "context" in changes:
            changes["context"] = self._merged_context(row.context.read)
        row._write(**changes)
        return follows

    def _what_follows(self, verdict: _Verdict, then: str, now: datetime) -> dict[str, Any] | None:
        """The columns of the next execution that the decision makes, or None."""
        execution = self.execution
        if then == "advance":
            definition = self.workflow._step_after(execution.step_name)
            return {"step_name": definition.name, "due": now + definition.wait} if definition else None
        if then == "repeat":
            return {
                "step_name": execution.step_name,
                "due": now + verdict.wait,
                "reattempts": execution.reattempts + (verdict.cause == "error"),
                "recoveries": execution.recoveries + (verdict.cause == "death"),
                "times_out_at": execution.times_out_at,
                "cursor": None if verdict.rewind else self.cursor() if self.has_checkpoint else execution.cursor,
            }
        return None

    def _runs_on(self, follows: dict[str, Any], now: datetime) -> bool:
        """Whether the next execution is due now, on the queue and with the priority that we are on."""
        # Whether the signal that a step waits for is there is known under the lock only, after this was decided.
        if follows["due"] > now or self._waits(follows):
            return False
        route = functools.partial(self.drive._route, self.workflow)
        return route(follows["step_name"]) == route(self.execution.step_name)

    def _waits(self, follows: dict[str, Any]) -> bool:
        """Whether the step that follows is one that waits for a signal."""
        definition = self.workflow._find(follows["step_name"])
        return definition is not None and definition.wait_for is not None

    def _go_on(self, follows: dict[str, Any], changes: dict[str, Any], now: datetime) -> _Attempt | None:
        """Insert the next execution: claimed, scheduled and queued, or, in a paused workflow, scheduled alone."""
        state = changes["state"]
        begins = self._next_values(follows, state, now)
        next_id, fresh = StepExecution._insert_row(begins), ()
        if state == PERFORMING:
            built = Workflow._built(
                "fresh", (), ("id",), lambda model, _, found: model.select(*OF_OTHERS).where(*found)
            )
            fresh = built.execute({"=id": self.workflow.id}).fetchone()
        return self._follow(changes, begins, _Moved(next_id, fresh))

    def _next_values(self, follows: dict[str, Any], state: str, now: datetime) -> dict[str, Any]:
        """The columns of the next execution, in a workflow of this state."""
        values = StepExecution._new_values(self.workflow, self.execution.number + 1, **follows)
        if state == PERFORMING:
            values.update(_claim_columns(now), job_id=self.execution.job_id)
        else:
            values.update(_beginning(self.workflow, values))
        if state == READY:
            values.update(StepExecution._queued(values))
        return values

    def _follow(self, changes: dict[str, Any], begins: dict[str, Any], moved: _Moved) -> _Attempt | None:
        """Queue the next execution, which is inserted, or go on with it."""
        execution = StepExecution._made(begins, cast(int, moved.execution_id))
        if execution.state == IN_PROGRESS:
            fresh = {field.name: field.python_value(value) for field, value in zip(OF_OTHERS, moved.fresh)}
            row = {**self.workflow.__data__, **changes, **fresh}
            workflow = type(self.workflow)._made(row, self.workflow.id)
            return _Attempt(self.drive, workflow, execution, True, moved.reserved_id)
        if execution.job_id:  # in a paused workflow, resume() will queue it
            self.drive._enqueue([execution], self.drive._route(self.workflow, execution.step_name))
        return None


def _claim_columns(now: datetime) -> dict[str, Any]:
    return {"state": IN_PROGRESS, "started_at": now, "heartbeat_at": now, "performed_by": _this_process()}


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


def _shown(what: str, show: Callable[[], str]) -> str:
    """What the error's own code makes of it, if that does not fail in its turn."""
    try:
        return show()
    except BaseException as failure:
        return f"(its {what} cannot be shown: {type(failure).__name__})"


# ==== Fast paths: several statements as one, where a dialect has it ===================================================


class _Moved(NamedTuple):
    """What came of the move of a workflow to another execution, or of one to another state."""

    execution_id: int | None = None  # of the next one
    fresh: Sequence[Any] = ()  # what is in the workflow's columns that others write to, if the next one is claimed
    reserved_id: int | None = None  # for the one after that, on PostgreSQL


class _Move(NamedTuple):
    """A workflow's move: its changes, if the fence holds; its execution's; the columns of the next one; its message."""

    changes: dict[str, Any]
    fence: dict[str, Any]
    columns: dict[str, Any]
    execution_id: int
    begins: _Json = None
    message: _Message | None = None

    def at_once(self) -> _Moved | None:
        """Do what `_Attempt._claim()` and `_Attempt._conclude()` do with several statements.

        :returns: None, and nothing is written, if the fence does not hold. The execution must be there.
        """
        return AT_ONCE[_drive()._dialect](*self)


def _move_on_postgresql(
    changes: Any, fence: Any, columns: Any, execution_id: int, begins: Any, message: Any
) -> _Moved | None:
    # One statement. Each part waits for what the one before it returns: this is their order.
    is_moved, runs_on = SQL("exists (select 1 from moved)"), begins and begins["state"] == IN_PROGRESS
    returned = OF_OTHERS if runs_on else [Workflow.id]
    moved = Workflow._built(
        "move and return" if runs_on else "move",
        changes,
        fence,
        lambda model, new, found: model.update(new).where(*found).returning(*returned),
    )
    ended = StepExecution._built(
        "end", columns, ("id",), lambda model, new, found: model.update(new).where(*found, is_moved).returning(model.id)
    )
    sql = f"with moved as ({moved.sql}), ended as ({ended.sql})"
    parameters = moved.filled({**changes, **_as_conditions(fence)}) + ended.filled({**columns, "=id": execution_id})
    if begins:
        begun = StepExecution._built(
            "begin",
            begins,
            (),
            lambda model, new, _: model.insert_from(peewee.Select([SQL("ended")], [*new.values()]), [*new]),
        )
        sql += f", begun as ({begun.sql})"
        parameters += begun.filled(begins)
    if message:
        sql += f", sent as ({_insertion(message.table)} select %s, %s, %s from begun)"
        parameters += message.parameters
    reserved = _drive()._next_execution_id()
    if runs_on:
        sql += f" select moved.*, begun.id, {reserved} from moved, begun"
    else:
        sql += " select id from begun" if begins else f" select {reserved} from ended"
    row = _drive()._db.execute_sql(sql, parameters).fetchone()
    if row is None:
        return None
    return _Moved(row[-2], row[:-2], row[-1]) if runs_on else _Moved(row[0]) if begins else _Moved(reserved_id=row[0])


def _move_on_mariadb(
    changes: Any, fence: Any, columns: Any, execution_id: int, begins: Any, message: Any
) -> _Moved | None:
    # One block, the transaction of the plain form.
    moved = Workflow._built("update", changes, fence, _updating)
    ended = StepExecution._built("update", columns, ("id",), _updating)
    body, found = [ended.sql], "select null"
    parameters = moved.filled({**changes, **_as_conditions(fence)}) + ended.filled({**columns, "=id": execution_id})
    if begins:
        new = {name: value for name, value in begins.items() if name != "id"}
        begun = StepExecution._built("insert", new, (), _inserting)
        body += [begun.sql, "set next_id = last_insert_id()"]
        parameters, found = parameters + begun.filled(new), "select next_id"
    if message:
        (queue, data, kept), serializer = message.parameters, message.huey.serializer
        halves = data.split(STAND_IN_BYTES)
        # Into what the application has had signed or compressed, nothing can be put.
        if len(halves) != 2 or type(serializer) is not Serializer or serializer.comp:
            return None
        body += [f"{_insertion(message.table)} values (%s, concat(%s, {STAND_IN_SQL.format('next_id')}, %s), %s)"]
        parameters += [queue, *halves, kept]
    elif begins and begins["state"] == IN_PROGRESS:
        fresh = Workflow._built(
            "number and fresh",
            (),
            ("id",),
            lambda model, _, found: model.select(SQL("next_id"), *OF_OTHERS).where(*found),
        )
        found, parameters = fresh.sql, parameters + fresh.filled({"=id": fence["id"]})
    values = _drive()._execute_block(
        f"declare next_id bigint; start transaction; {moved.sql}; if row_count() = 0 then rollback; "
        f"select null limit 0; else {'; '.join(body)}; {found}; commit; end if;",
        parameters,
    )
    return values and _Moved(values[0], values[1:])


def _take_on_postgresql(drive: GenevaDrive, first: str, queue: str) -> bytes | None:
    taken = f"delete from {TASK_TABLE} where id = (select id {first} for update skip locked) returning data"
    row = drive._db.execute_sql(taken, (queue,)).fetchone()
    return row and bytes(row[0])


def _take_on_mariadb(drive: GenevaDrive, first: str, queue: str) -> bytes | None:
    row = drive._execute_block(
        "declare found_id bigint; declare found longblob; "
        f"repeat set found_id = null, found = null; select id, data into found_id, found {first}; "
        f"delete from {TASK_TABLE} where id = found_id; until found_id is null or row_count() end repeat; "
        "select found;",
        (queue,),
    )
    return cast("bytes | None", row[0])


#: By dialect: what makes a `_Move`, and what `_EmbeddedStorage.dequeue()` does. On MySQL itself it is the plain form.
AT_ONCE = {"postgresql": _move_on_postgresql, "mysql": _move_on_mariadb}
TAKE_AT_ONCE = {"postgresql": _take_on_postgresql, "mysql": _take_on_mariadb}

#: Where a claim reads two rows as one column: PyMySQL takes longer for each column than MariaDB for the rows.
READ_AS_JSON = ("mysql",)


def _as_bytes(column: Any) -> Any:
    """A column for MariaDB's JSON_ARRAY(), which garbles text that stands beside bytes."""
    return column.cast("binary") if isinstance(column, (peewee.CharField, peewee.TextField)) else column


# ==== Loops that can be resumed =======================================================================================


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
        kept = done
        for item in rest:
            yield item
            done += 1
            if done == kept + self.every:
                keep(done)
                kept = done
        if done > kept:
            keep(done)


class _Pages:
    """A query of a model, read page by page along a unique key; the cursor is the key of the last row that is done."""

    def __init__(self, where: str, query: Any, key: Any, every: int) -> None:
        self.where, self.query, self.every = where, query, every
        _require(isinstance(query, peewee.ModelSelect), where, "takes the select() of a model, no other kind of query")
        is_ordering = isinstance(key, peewee.Ordering)
        self.key = self._checked_key(key.node if is_ordering else key)
        self.is_descending = is_ordering and key.direction == "DESC"
        has_collation = is_ordering and key.collation
        _require(not has_collation, where, "key must be ordered as its column is: leave out collate()")
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
        if cursor is None:
            return self._rows(None, keep)
        try:
            key = self._key_at(cursor)
        except Exception:  # of whatever class the field raises
            _require_fit(False, self.where, cursor)
        return self._rows(key, keep)

    def _rows(self, last: Any, keep: Callable[[Any], None]) -> Iterator[Any]:
        is_over = False
        while not is_over:
            page = self.query
            if last is not None:
                page = page.where(self.key < last if self.is_descending else self.key > last)
            order = self.key.desc() if self.is_descending else self.key.asc()
            # All at once: on SQLite a write fails while a read is half done. With the next row, which must be another.
            rows = list(page.order_by(order).limit(self.every + 1))
            keys = [self.key_of(row) for row in rows]
            is_unique = len({last, *keys}) == len(keys) + 1 and None not in keys
            problem = f"the key {self.key.name} is there twice, or null: a join repeats rows: use distinct()"
            _require(is_unique, self.where, problem)
            is_over = len(rows) <= self.every
            del rows[self.every :]
            if rows:
                last = keys[len(rows) - 1]
                cursor = self._cursor_at(last)
                yield from rows
                keep(cursor)

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
        field = self.key
        while isinstance(field, peewee.ForeignKeyField):
            field = field.rel_field
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


# ==== The drive: database, queues, housekeeping =======================================================================


def perform_step(execution_id: int, drive: GenevaDrive, queue: str) -> None:
    """The Huey task behind every step; each queue has its own, which knows its drive and its name."""
    drive._perform(execution_id, queue)


def housekeeping() -> None:
    """The periodic Huey task."""
    _drive().housekeeping()


# Huey names tasks by module and function: on one side of a queue the module may be vendored, and called otherwise.
perform_step.__module__ = housekeeping.__module__ = "geneva_drive"


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

QUEUE_TABLE_PREFIX = "geneva_drive_huey_"
DEFAULT_QUEUE = "default"

_current_drive: GenevaDrive | None = None
_earlier_databases: weakref.WeakSet[Database] = weakref.WeakSet()  # of drives that were replaced


def _drive() -> GenevaDrive:
    if _current_drive is None:
        raise ConfigurationError("there is no drive yet: construct GenevaDrive(database) before workflows are used")
    return _current_drive


def _repeated(look: Callable[[GenevaDrive], T]) -> Callable[[GenevaDrive], T]:
    """Of a method that only reads: run by `_repeat()`."""
    return functools.wraps(look)(lambda drive: drive._repeat(lambda: look(drive)))


class GenevaDrive:
    """Binds the workflows to a database and to the queues that run them. One per process; the latest counts.

    :param database: a Peewee database, a pool, or a DatabaseProxy (which may be initialized later).
    :param huey: the default queue; None makes an embedded one, in tables of its own in the same database.
    :param queues: further queues: a dict of names and Hueys, or a list of names for embedded ones.
    :raises ConfigurationError: if something is unknown or of the wrong type. Nothing is executed on the database.

    Settings, each an attribute too, with their defaults; durations are timedeltas or seconds:

    :param delete_completed_workflows_after: (30 d) what is finished or canceled is kept for so long; None keeps all.
    :param stuck_in_progress_threshold: (2 min) a step without a heartbeat for so long is taken for dead.
    :param stuck_scheduled_threshold: (1 min) a step that has been due for so long is queued again.
    :param stuck_recovery_action: ("reattempt") what follows when a step's process died; or "cancel".
    :param max_recoveries: (5) after so many deaths of a step's processes, its workflow is paused.
    :param housekeeping_batch_size: (1000) how many rows are deleted or recovered at a time.
    :param housekeeping_schedule: (every minute) a Huey crontab.
    :param undefined_step_grace: (10 min) a step that no code here defines is put off for so long; then it fails.
    :param run_on: (1 s) for so long a task goes on with the steps that follow at once; 0 turns it off.
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
        self._consumers: dict[str, Consumer] = {}
        self._handlers: dict[int, Any] = {}  # of signals, as they were before the consumers
        self._performing: set[_Attempt] = set()  # for queues
        self._statements: dict[Any, _Built] = {}
        self._looked_at: dict[str, int] = {}
        self._turn = threading.RLock()
        self._answers: dict[tuple[Database, str], Any] = {}
        self.queues = self._checked_queues(huey, queues)
        self._tasks = {name: self._register(name, each) for name, each in self.queues.items()}
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
            if not isinstance(model, peewee.ModelBase) or _unproxied(model._meta.database) is not self._db:
                fix = "create what is on another one with that one's create_tables()"
                raise ConfigurationError(f"create_tables(): {model!r} is not a model of the drive's database: {fix}")
        _Schema(self).complete(peewee.sort_models(models))

    # -- the database -----------------------------------------------------------------------------------------------

    @property
    def _db(self) -> Database:
        if self is not _current_drive:
            problem = f"this GenevaDrive, on {_place(self.database)}, was replaced by a later one"
            raise ConfigurationError(
                f"{problem}, on {_place(_drive().database)}: make one for each process, and keep it"
            )
        database = self.database
        if isinstance(database, peewee.Proxy):
            database = database.obj
        if database is None:
            raise ConfigurationError("the DatabaseProxy given to GenevaDrive is not initialized: call its initialize()")
        return database

    @property
    def _dialect(self) -> str:
        return _dialect(self._db)

    def _now(self) -> datetime:
        return self.clock()

    def _begin(self) -> Any:
        """A transaction, or a savepoint inside the caller's."""
        # A transaction that reads before it writes fails at once on SQLite if another one wrote in between.
        return _InTurn(self._db, self._turn) if self._dialect == "sqlite" else self._db.atomic()

    def _transact(
        self,
        work: Callable[[], T],
        insist_seconds: float | None = None,
        at_once: Callable[[], T | None] = lambda: None,
    ) -> T:
        """Run `work` in a transaction; see `_repeat()`.

        :param at_once: the same in one statement, where the dialect has it; what returns None has done nothing.
        """
        is_done = False

        def transaction() -> T:
            nonlocal is_done
            is_done = False
            # Repeated after a loss of the connection that hides what it did, it finds that its fence is gone.
            result = at_once() if not self._db.in_transaction() and self._has_fast_paths() else None
            if result is None:
                with self._begin():
                    result = work()
                    is_done = True  # what fails now is the commit, and may have succeeded all the same
            return result

        return self._repeat(transaction, insist_seconds, lambda: is_done)

    def _repeat(
        self, work: Callable[[], T], insist_seconds: float | None = None, is_done: Callable[[], bool] = lambda: False
    ) -> T:
        """Run `work`; again, if that failed through no fault of its own and is ours to repeat.

        :param insist_seconds: for so long, whatever the number of tries and though the database itself is away: for
            work that nobody repeats soon if it is not done now.
        :param is_done: whether it is not to be repeated after a loss of the connection.
        :raises GenevaDriveError: if the tables are missing or too old.
        """
        started, tries, is_open = time.monotonic(), 0, not self._db.is_closed()
        patience = insist_seconds or PATIENCE_SECONDS
        while True:
            self._drop_if_dead(self._db)
            tries += 1
            try:
                if is_open and self._db.is_closed():  # where autoconnect is off, nobody else opens another
                    self._db.connect(reuse_if_open=True)
                return work()
            except peewee.PeeweeException as error:
                is_gone = not is_done() and self._is_connection_lost(error)
                may_be_repeated = (is_gone or _is_transient(error)) and not self._db.in_transaction()
                limit = math.inf if insist_seconds else 2 if is_gone else TRANSACTION_TRIES
                if not may_be_repeated or tries >= limit or time.monotonic() - started > patience:
                    if problem := _is_about_schema(error) and self._schema_problem():
                        raise GenevaDriveError(problem) from error
                    raise
                logger.debug("repeating what failed: %s", error)
                if is_gone:  # which a driver may not tell of its connection
                    self._close_dead(self._db)
            _give_way(tries)

    def _schema_problem(self) -> str | None:
        with contextlib.suppress(peewee.PeeweeException):  # in a transaction that PostgreSQL has given up
            return _Schema(self).problem()
        return None

    def _after_commit(self, work: Callable[[], object]) -> Callable[[], object]:
        """Do something once the outermost transaction is committed, unless it is rolled back to before this call.

        Its failure must not make the transaction look failed.
        """
        return cast("Callable[[], object]", self._db.after_commit(functools.partial(_do_after_commit, work)))

    def _announce(self, workflow: Workflow, old: str | None, new: str) -> None:
        """Tell of a transition once it is committed."""
        if old == new or not (workflow_transitioned._receiver_list or logger.isEnabledFor(logging.INFO)):
            return

        def tell() -> None:
            logger.info("%s: %s -> %s", workflow._label, old or "new", new)
            workflow_transitioned.send(workflow, old, new)

        self._after_commit(tell)

    # -- connections ------------------------------------------------------------------------------------------------

    def _roll_back_to(self, depth: int) -> bool:
        """Roll back what a step's body left open above `depth` transactions; whether there was anything."""
        db, left_open = self._db, _depth(self._db) > depth
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

    def _connect_worker(self) -> None:
        """For threads that are ours: nobody else opens connections for them where autoconnect is off."""
        for database in self._databases():
            self._drop_if_dead(database)
            if not database.autoconnect and database is not self._db:
                with contextlib.suppress(Exception):  # one that is away is met by the step whose hero is there
                    self._open_connection(database)
        self._open_connection()

    def _open_connection(self, database: Database | None = None) -> None:
        """Open the connection to the drive's database, or another one, where autoconnect is off: a body closed it."""
        database = database or self._db
        if not database.autoconnect and database.is_closed():
            database.connect()

    def _databases(self) -> set[Database]:
        """The drive's, if it is initialized, and those of the heroes."""
        found = {_unproxied(self.database), *[_unproxied(each._meta.database) for each in list(_hero_models.values())]}
        found.discard(None)
        return found

    def _drop_if_dead(self, database: Database, is_dead: Callable[[Any], bool] | None = None) -> None:
        """A connection that broke stays broken for its thread until it is closed; the next use opens another."""
        is_unused = database.is_closed() or database.in_transaction()
        if not is_unused and (is_dead or _is_dead)(database.connection()):
            self._close_dead(database)

    def _close_dead(self, database: Database) -> None:
        with contextlib.suppress(peewee.PeeweeException):
            database.close()

    def _is_connection_lost(self, error: BaseException) -> bool:
        """Whether an error came from the loss of the drive's connection, or from the failure to open one."""
        is_fitting = isinstance(error, (peewee.OperationalError, peewee.InterfaceError))
        # Peewee's own, without an original, says that a body has closed the connection.
        is_of_driver = is_fitting and _original(error) is not None
        return is_of_driver and (self._db.is_closed() or _is_gone(self._db.connection()))

    def _run_beside(self, work: Callable[[], T], where: str) -> T:
        """Do something in a thread of its own, in a copy of this one's context, and on connections of its own."""

        def run() -> T:
            self._open_connection()
            depth = _depth(self._db)  # not 0 where threads share a connection
            try:
                result = work()
            finally:
                left_open = self._roll_back_to(depth)
                for database in self._databases():
                    if not _is_private(database):
                        database.close()
            if left_open:
                raise TransactionLeftOpenError(where)
            return result

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(contextvars.copy_context().run, run).result()

    def _close_own_connection(self) -> None:
        """A worker that ends takes its connection along, also that of a drive that was replaced meanwhile."""
        database = _unproxied(self.database)
        if not _is_private(database):
            database.close()

    def _after_fork_in_child(self, is_of_worker: bool) -> None:
        """A forked process must not share its parent's connections, nor wait for threads that did not come along.

        :param is_of_worker: whether a consumer's workers run in the parent: then the fork is a step's.
        """
        self._turn = threading.RLock()
        self._performing = set()
        if is_of_worker:  # else Huey makes a worker
            self._consumers = {}
            _restore_signals(self._handlers)
            signal.set_wakeup_fd(-1)  # else what is sent to the child is told to the parent
        for database in self._databases():
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

    def _statement(self, database: Any, key: Any, query: Callable[[], Any]) -> _Built:
        """The statement that a query makes on a database, made when it is first asked for."""
        if isinstance(database, peewee.Proxy):
            database = database.obj or self._db
        found = self._statements.get((database, key))
        if found is None:
            found = self._statements[database, key] = _Built(database, query())
        return found

    def _next_execution_id(self) -> str:
        """PostgreSQL's expression for the next number of an execution; null if no sequence belongs to the column."""
        query = f"select pg_get_serial_sequence('{StepExecution._meta.table_name}', 'id')"
        ((name,),) = self._ask(query, lambda: self._db.execute_sql(query).fetchall())
        return f"nextval('{name}')" if name else "null::bigint"

    def _ask(self, question: str, ask: Callable[[], T]) -> T:
        """What is asked of each database once."""
        if (self._db, question) not in self._answers:
            self._answers[self._db, question] = ask()
        return cast(T, self._answers[self._db, question])

    @property
    def _skip_locked(self) -> str | None:
        """The clause that locks rows and passes over those that are locked; None where there are no such locks."""
        if not self._db.for_update:
            return None
        self._db.connection()  # only a connected database knows its server's version
        version = self._db.server_version
        if self._dialect == "mysql" and (version < (8, 0, 1) or (10,) <= version < (10, 6)):
            return "FOR UPDATE"
        return "FOR UPDATE SKIP LOCKED"

    def _has_fast_paths(self) -> bool:
        return self._dialect in AT_ONCE and (self._dialect != "mysql" or self._takes_blocks())

    def _takes_blocks(self) -> bool:
        """Whether the server executes a block of statements as one, as MariaDB does, and the driver can have that."""
        return self._ask("blocks", self._try_block)

    def _try_block(self) -> bool:
        try:
            return self._execute_block("select 1;", ()) == (1,)
        except Exception as error:  # of the server's, for its syntax, or of the driver's
            if isinstance(error, peewee.OperationalError) or self._is_connection_lost(error):
                raise
            logger.debug("there are no blocks of statements here: %s", error)
            return False

    def _execute_block(self, block: str, parameters: Sequence[Any]) -> Any:
        """Have MariaDB execute statements as one; returns the row that is selected last, or None."""
        row = None
        try:
            cursor = self._db.execute_sql(f"begin not atomic {block} end", parameters)
            with peewee.__exception_wrapper__:
                while True:  # what fails behind a row, a commit, is told by nextset()
                    if cursor.description:
                        row = cursor.fetchone()
                    if not cursor.nextset():
                        return row
        except BaseException:  # a transaction that the block has begun is left open
            with contextlib.suppress(peewee.PeeweeException):
                self._db.rollback()
            raise

    # -- the queues -------------------------------------------------------------------------------------------------

    _embedded_models = functools.cached_property(lambda self: _embedded_models(self.database))

    def _checked_queues(self, huey: Any, queues: Any) -> dict[str, Huey]:
        embedded = functools.partial(_EmbeddedHuey, results=False, storage_class=_EmbeddedStorage, drive=self)
        if huey is not None and not isinstance(huey, Huey):
            raise ConfigurationError(f"huey must be a Huey instance, not {huey!r}")
        if isinstance(queues, str) or not isinstance(queues or (), Iterable):
            raise ConfigurationError(f"queues must be a dict of names and Hueys or a list of names, not {queues!r}")
        found = {DEFAULT_QUEUE: embedded(DEFAULT_QUEUE) if huey is None else huey}
        for name in queues or ():
            if not _is_name(name) or not name.isascii() or name == DEFAULT_QUEUE:
                raise ConfigurationError(f"queues: a name must be ASCII other than {DEFAULT_QUEUE!r}, not {name!r}")
            found[name] = queues[name] if isinstance(queues, Mapping) else embedded(name)
            if not isinstance(found[name], Huey):
                raise ConfigurationError(f"queues: {name!r} must be a Huey instance, not {found[name]!r}")
        for name, each in found.items():
            if isinstance(each, _EmbeddedHuey) and each.storage.drive is not self:
                problem = f"the Huey of the queue {name!r} is one that another GenevaDrive made for itself"
                raise ConfigurationError(f"{problem}: leave it out, and this one makes its own")
        return found

    def _register(self, name: str, huey: Huey) -> Any:
        """Register the tasks on a Huey, in the place of an earlier drive's; returns the one that performs steps."""
        for task in getattr(huey, "_geneva_drive_tasks", ()):
            task.unregister()
        here = functools.partial(perform_step, drive=self, queue=name)
        kind = _EmbeddedTask if isinstance(huey, _EmbeddedHuey) else Task
        perform = huey.task(task_base=kind)(functools.update_wrapper(here, perform_step))
        periodic = huey.periodic_task(lambda moment: self.housekeeping_schedule(moment))(housekeeping)
        huey._geneva_drive_tasks = (perform, periodic)
        huey.on_startup("geneva_drive")(functools.partial(self._begin_worker, name))
        huey.on_shutdown("geneva_drive")(self._end_worker)
        create_consumer = type(huey).create_consumer

        def remembering(**options: Any) -> Consumer:
            if not _heartbeat.workers:
                self._handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self._consumers[name] = consumer = create_consumer(huey, **options)
            consumer.start = functools.partial(self._start_consumer, consumer.start)  # Huey's hooks cannot stop it
            consumer._join_workers = lambda: _join([consumer], consumer.shutdown_timeout)
            consumer._interrupt_workers = functools.partial(self._interrupt, consumer, consumer._interrupt_workers)
            return consumer

        huey.create_consumer = remembering  # a task has no other way to its consumer's stop flag
        return perform

    def _start_consumer(self, start: Callable[[], None]) -> None:
        """Start a consumer, unless it would take messages only to fail with each: a GenevaDriveError says why."""
        was_closed = self._db.is_closed()
        try:
            if _is_in_memory(self._db):
                fix = "use a file; or perform the steps in this thread, by execute() or TestHelpers.perform_next_step()"
                raise ConfigurationError(f"{self._db.database!r} is another database in each thread: {fix}")
            self._connect_worker()
            problem = _Schema(self).problem()
        except peewee.PeeweeException as error:  # a consumer outlives that its database is away
            logger.warning("the version of the schema cannot be read: %s", error)
            problem = None
        finally:
            if was_closed:
                self._close_own_connection()
        if problem:
            raise GenevaDriveError(problem)
        start()

    def _interrupt(self, consumer: Consumer, interrupt: Callable[[], None]) -> None:
        """End workers in mid-step. A process may hang in its driver, where it handles no signal."""
        interrupt()
        for each in _alive(consumer) if consumer.environment.forks else ():
            each.kill()
        _restore_signals(self._handlers)  # Huey's would ignore what comes while the process exits

    def _begin_worker(self, queue: str) -> None:
        _heartbeat.enter()
        consumer = self._consumers.get(queue)
        if consumer is not None and consumer.environment.forks:
            threading.Thread(target=_end_process, args=(consumer, os.getppid()), daemon=True).start()
        self._sweep_at_start(consumer)

    def _end_worker(self) -> None:
        _heartbeat.exit()
        self._close_own_connection()

    def _sweep_at_start(self, consumer: Consumer | None) -> None:
        """Housekeeping by the first worker of a consumer that starts."""
        if getattr(consumer, "_geneva_drive_swept", False):
            return
        if consumer is not None:
            consumer._geneva_drive_swept = True
        self.housekeeping()

    def _route(self, workflow: Workflow, step_name: str | None) -> _Route:
        """The queue and priority of a step. A queue that a deploy took away gives way to the default one."""
        options = workflow._huey_options(step_name, workflow.options)
        queue = options.get("queue", DEFAULT_QUEUE)
        if queue not in self.queues:
            logger.error("%s", UnknownQueueError(workflow._label, queue, self.queues))
            queue = DEFAULT_QUEUE
        return queue, options.get("priority")

    def _check_route(self, where: str, options: Mapping[str, Any]) -> None:
        queue = options.get("queue", DEFAULT_QUEUE)
        if queue not in self.queues:
            raise UnknownQueueError(where, queue, self.queues)
        if options.get("priority") and not self.queues[queue].storage.priority:
            storage = type(self.queues[queue].storage).__name__
            raise ConfigurationError(
                f"{where} asks for a priority, which the queue {queue!r} ({storage}) does not know: use "
                "PriorityRedisHuey, or leave the priority out"
            )

    def _put_off(self, execution: StepExecution, queue: str) -> bool:
        """Queue a step that is due and not defined here for a little later: other code runs beside ours in a deploy.

        :returns: False if that is not to be done: its class defines it, or has been asked for it in vain for too long.
        """
        workflow, due = execution.workflow, execution._due or execution.scheduled_for
        overdue, is_known = self._now() - due, workflow._find(execution.step_name) is not None
        # In immediate mode there is no other consumer of the queue, and what is scheduled never comes.
        if is_known or overdue >= self.undefined_step_grace or self.queues[queue].immediate:
            return False
        shortest, longest = PUT_OFF_FOR
        delay, problem = min(max(overdue, shortest), longest), StepNotDefinedError(workflow, execution.step_name)
        note = "execution %s is put off for %s: %s", execution.id, _span(delay), problem
        self._after_commit(lambda: logger.warning(*note))
        _, priority = self._route(workflow, execution.step_name)  # whoever defines it may know another queue
        self._enqueue_again(execution, (queue, priority), self._now() + delay)
        return True

    def _enqueue_again(
        self, execution: StepExecution, route: _Route, not_before: datetime = EPOCH, **changes: Any
    ) -> None:
        # Until it comes, a message for later is not overdue: housekeeping must not send another one beside it.
        execution._write(enqueued_at=max(self._now(), not_before), job_id=_job_id(self._now()), **changes)
        self._enqueue([execution], route, not_before)

    def _enqueue(self, executions: list[StepExecution], route: _Route, not_before: datetime = EPOCH) -> None:
        """Queue executions: with the transaction that surrounds the call, or once it is committed."""
        huey = self.queues[route[0]]

        def send() -> None:
            # Nobody knows when the signal of those without a time comes.
            tasks = [self._task(each, route, not_before) for each in executions if each._due is not None]
            if len(tasks) > 1 and isinstance(huey, _EmbeddedHuey) and not huey.immediate:
                huey.put_all(tasks)
                return
            for task in tasks:
                # Huey's enqueue would have a worker put it into the schedule; the direct way spares it that.
                (huey.enqueue if task.eta is None else huey.add_schedule)(task)

        if self._commits_with(huey):
            send()
        else:
            self._after_commit(send)

    def _task(self, execution: StepExecution, route: _Route, not_before: datetime = EPOCH) -> Any:
        """The Huey task that performs an execution."""
        (queue, priority), due = route, max(cast(datetime, execution._due), not_before)
        eta = due if due > self._now() else None
        return self._tasks[queue].s(execution.id, eta=eta, priority=priority, id=execution.job_id)

    def _commits_with(self, huey: Huey) -> bool:
        """Whether the messages of a queue are rows of the drive's own database, and part of its transactions."""
        return isinstance(huey.storage, SqlStorage) and huey.storage.database is self._db and not huey.immediate

    # -- performing -------------------------------------------------------------------------------------------------

    def _perform(self, execution_id: int, queue: str = DEFAULT_QUEUE) -> None:
        """Run an execution that is due, and go on with the steps that follow at once."""
        self._connect_worker()
        context = _own_context()
        attempt = context.run(_Attempt.claim, self, execution_id, queue)
        deadline = time.monotonic() + self.run_on.total_seconds()
        if attempt is None:
            return
        consumer = self._consumers.get(queue)

        def is_draining() -> bool:
            return consumer is not None and consumer.stop_flag.is_set()

        def may_run_on() -> bool:
            return time.monotonic() < deadline and not is_draining()

        while attempt is not None:
            attempt = self._run_attempt(attempt, functools.partial(context.run, attempt.run, may_run_on, is_draining))
            context = _own_context()
            with contextlib.suppress(Exception):  # the next attempt is claimed, and beats: let it find out for itself
                self._connect_worker()

    def _run_attempt(self, attempt: _Attempt, run: Callable[[], _Attempt | None]) -> _Attempt | None:
        """Run an attempt for a worker, which nothing but the end of its process is to end."""
        self._performing.add(attempt)
        try:
            return run()
        except BaseException as error:
            if isinstance(error, (Exception, SystemExit)) or _ends_process(error):
                raise
            raise GenevaDriveError(f"{attempt._where} failed with {type(error).__name__}") from error
        finally:
            self._performing.discard(attempt)

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
        what = "run(): shutdown_timeout"
        try:
            drain_seconds = None if shutdown_timeout is None else _duration(shutdown_timeout, what).total_seconds()
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        quick = {"initial_delay": 0.02, "backoff": 1.2, "max_delay": 0.2, "scheduler_interval": 1}
        consumers = [self.queues[name].create_consumer(workers=workers, **quick) for name in names]
        try:
            _serve(consumers, until, drain_seconds)
        finally:
            for name, consumer in zip(names, consumers):
                if self._consumers.get(name) is consumer:  # what is performed here from now on is none of its steps
                    del self._consumers[name]

    # -- housekeeping -----------------------------------------------------------------------------------------------

    def housekeeping(self) -> dict[str, int]:
        """Delete what is over long since, recover what died, queue again what is overdue. Harmless at any time.

        :returns: how many: `workflows_cleaned_up`, `step_executions_cleaned_up`, `stuck_in_progress_recovered`,
            `stuck_scheduled_recovered`.
        """
        self._connect_worker()
        counts = {"workflows_cleaned_up": 0, "step_executions_cleaned_up": 0}
        counts.update(stuck_in_progress_recovered=0, stuck_scheduled_recovered=0)
        failures = []
        for part in (self._recover_in_progress, self._recover_scheduled, self._clean_up):
            try:
                counts.update(part())
            except Exception as error:  # it must not keep the other parts from being done
                logger.exception("housekeeping failed in part")
                failures.append(error)
        if any(counts.values()):
            logger.info("housekeeping: %s", ", ".join(f"{name} {count}" for name, count in counts.items() if count))
        if failures:
            raise failures[0]
        return counts

    def _recover_in_progress(self) -> dict[str, int]:
        """Recover what a process performs that fell silent, or that is known to be gone."""
        in_progress = SQL(f"state = '{IN_PROGRESS}'")
        performers = StepExecution.select(StepExecution.performed_by).where(in_progress).distinct().tuples()
        gone = self._repeat(lambda: [name for (name,) in performers if _is_process_gone(name)])
        moment = self._now() - self.stuck_in_progress_threshold
        is_dead = StepExecution.performed_by.in_(gone)
        if _heartbeat.is_silence_death():
            is_dead = (StepExecution.heartbeat_at < moment) | is_dead
        dead = in_progress & is_dead
        recovered = 0
        for executions in self._batches(StepExecution.select(StepExecution.id).where(dead), StepExecution.heartbeat_at):
            for execution in executions:
                if _heartbeat.performs(execution.id):  # right here, whatever the clock says
                    continue
                try:
                    recovered += self._transact(functools.partial(self._recover, dead, execution.id))
                except Exception:  # it must not keep the others from being recovered
                    logger.exception("execution %s cannot be recovered", execution.id)
        return {"stuck_in_progress_recovered": recovered}

    def _recover(self, dead: Any, execution_id: int) -> bool:
        execution = StepExecution.get_or_none(StepExecution.id == execution_id)
        workflow = execution and Workflow._lock(Workflow.id == execution.workflow_id)
        # Locked by a checkpoint in a body's transaction, it is not dead, or not for long.
        execution = StepExecution._lock(dead & (StepExecution.id == execution_id), skip_locked=True)
        if workflow is None or execution is None:
            return False  # it ended, or showed a sign of life, in between
        try:
            _Attempt(self, workflow, execution)._record(self._death(execution))
        except _ClaimLost:
            return False
        note = "recovered: its process was last heard of at %s", execution.heartbeat_at
        self._after_commit(lambda: workflow.logger.warning(*note))
        return True

    def _death(self, execution: StepExecution) -> _Verdict:
        """What follows when the process that performs an execution goes away."""
        action = self.stuck_recovery_action
        if action == "reattempt" and execution.recoveries >= self.max_recoveries:
            action = "pause"
        return _Verdict("death", action)

    def _recover_scheduled(self) -> dict[str, int]:
        """Queue again what was lost on the way: steps that are due, timeouts that passed."""
        progress = functools.cache(self._progress)
        recovered = self._recover_overdue(SCHEDULED, StepExecution.scheduled_for, progress)
        recovered += self._recover_overdue(WAITING, StepExecution.times_out_at, progress)
        return {"stuck_scheduled_recovered": recovered + self._wake_needless()}

    def _recover_overdue(self, state: str, due: Any, progress: Callable[[_Route], datetime]) -> int:
        """Queue again, once per threshold, what is overdue and was lost; not what a queue is behind with."""
        moment = self._now() - self.stuck_scheduled_threshold
        overdue = (
            SQL(f"t1.state = '{state}'")
            & (due <= moment)
            & (StepExecution.enqueued_at.is_null() | (StepExecution.enqueued_at <= moment))
        )
        columns = [StepExecution.id, StepExecution.step_name, StepExecution.enqueued_at]
        about = [Workflow.id, Workflow.type, Workflow.options]
        query = StepExecution.select(*columns, *about).join(Workflow).where(overdue & (Workflow.state == READY))
        recovered = 0
        for executions in self._batches(query, due):
            lost: dict[_Route, list[int]] = {}
            for execution in executions:
                route = self._route(execution.workflow, execution.step_name)
                queued_for = max(execution.__data__[due.name], execution.enqueued_at or EPOCH)
                if queued_for <= progress(route) - self.stuck_scheduled_threshold:
                    lost.setdefault(route, []).append(execution.id)
            for route, ids in lost.items():
                these = StepExecution.select().where(overdue & StepExecution.id.in_(ids))
                recovered += self._transact(functools.partial(self._requeue, these, route))
        return recovered

    def _requeue(self, query: Any, route: _Route) -> int:
        # The lock makes a second sweep wait, and then see that these are queued.
        executions = list(StepExecution._locking(query))
        changes = {"enqueued_at": self._now(), "job_id": _job_id(self._now())}
        StepExecution.update(**changes).where(StepExecution.id.in_([each.id for each in executions])).execute()
        for execution in executions:
            execution.__data__.update(changes)
        self._enqueue(executions, route)
        return len(executions)

    def _progress(self, route: _Route) -> datetime:
        """How far a queue has come: what was put into it before this moment, with this priority, was taken out.

        That is the moment for which its first message of the priority was queued; now, if there is none. In a backlog
        of hours all is overdue, and queuing it again each minute would make it longer and longer.
        """
        huey, reached, priority = self.queues[route[0]], self._now(), route[1] or 0
        ours = self._tasks[route[0]].task_class
        try:
            pending = [task for task in self._repeat(lambda: huey.pending(limit=100)) if isinstance(task, ours)]
            first = next((task for task in pending if (task.priority or 0) <= priority), None)
            if first is None and len(pending) == 100:
                return EPOCH  # higher priorities are before it, and nobody knows what is behind those
            if first and (first.priority or 0) < priority:
                first = None
            later = self._repeat(lambda: huey.scheduled(limit=100))
            waiting = next((task for task in later if isinstance(task, ours)), None)
            for task in filter(None, (first, waiting)):
                due = task.eta and (task.eta.replace(tzinfo=timezone.utc) if huey.utc else task.eta.astimezone())
                reached = min(reached, max(_queued_at(task.id), due or _queued_at(task.id)))
        except Exception:  # its server is down, most likely: what is sent now fails too, is logged, and is sent again
            logger.exception("the queue %s cannot be read and is taken to be empty", route[0])
            return self._now()
        return reached

    def _wake_needless(self) -> int:
        """Wake what waits for a signal at a step that, since a deploy, does not wait any more.

        Where another class waits at a step of that name, a sweep looks at a batch of what waits there. Not what began
        to wait lately: where a deploy has just made the step wait, this may be the code before it.
        """
        since = peewee.fn.COALESCE(StepExecution.enqueued_at, StepExecution.created_at)
        began = since <= StepExecution.created_at.db_value(self._now() - self.undefined_step_grace)
        # Without a join: PostgreSQL thinks that there are many, and would read all workflows.
        columns = [StepExecution.id, StepExecution.step_name, StepExecution.workflow]
        query = StepExecution.select(*columns).where(SQL(f"t1.state = '{WAITING}'") & began)
        steps = [each for cls in list(_workflow_classes.values()) for each in cls._blueprint.steps]
        waiting, others = (
            {each.name for each in steps if (each.wait_for is None) is not waits} for waits in (True, False)
        )
        woken = 0
        for some in peewee.chunked(sorted(others - waiting), 500):
            for executions in self._batches(
                query.where(StepExecution.step_name.in_(some)), StepExecution.scheduled_for
            ):
                woken += self._wake_those_needless(executions)
        # The name of a step that waits in another class: of those there may be a million, and a sweep looks at a few.
        for name in waiting & others:
            last, batch = self._looked_at.get(name, 0), self.housekeeping_batch_size
            page = query.where((StepExecution.step_name == name) & (StepExecution.id > last))
            page = page.order_by(StepExecution.id).limit(batch)
            executions = self._repeat(functools.partial(list[Any], page))
            self._looked_at[name] = executions[-1].id if len(executions) == batch else 0
            woken += self._wake_those_needless(executions)
        return woken

    def _wake_those_needless(self, executions: Sequence[StepExecution]) -> int:
        ids, woken = [each.workflow_id for each in executions], 0
        rows = Workflow.select(Workflow.id, Workflow.type).where(Workflow.id.in_(ids) & (Workflow.state == READY))
        workflows = {each.id: each for each in (self._repeat(functools.partial(list[Any], rows)) if ids else ())}
        for each in executions:
            definition = each.workflow_id in workflows and workflows[each.workflow_id]._find(each.step_name)
            if definition and definition.wait_for is None:
                woken += self._transact(functools.partial(self._wake_if_waiting, each))
        return woken

    def _wake_if_waiting(self, execution: StepExecution) -> bool:
        row, active = Workflow._lock_with_active(execution.workflow_id)
        is_waiting = row is not None and row.state == READY and active is not None and active.state == WAITING
        if not is_waiting or active.id != execution.id:
            return False
        _wake(self, row, active)
        return True

    def _clean_up(self) -> dict[str, int]:
        if self.delete_completed_workflows_after is None:
            return {}
        moment, deleted = self._now() - self.delete_completed_workflows_after, []
        # MySQL has no index over both states, and would sort what is in them for each batch.
        each_state = [f"state = '{state}'" for state in OVER]
        for condition in each_state if self._dialect == "mysql" else [f"state in {OVER}"]:
            expired = SQL(condition) & (Workflow.transitioned_at < moment)
            for workflows in self._batches(Workflow.select(Workflow.id).where(expired), Workflow.transitioned_at):
                began = time.monotonic()
                deleted += self._delete([each.id for each in workflows], expired)
                # Half of the time is the others': on SQLite, who waits for the lock looks for it now and then only.
                time.sleep(min(1, time.monotonic() - began))
        return {
            "workflows_cleaned_up": sum(workflows for workflows, _ in deleted),
            "step_executions_cleaned_up": sum(executions for _, executions in deleted),
        }

    def _delete(self, ids: list[int], expired: Any) -> list[tuple[int, int]]:
        """Delete those of the workflows that are expired still; returns how many, and how many executions, in pairs."""

        def delete() -> tuple[int, int]:
            WorkflowSignal.delete().where(WorkflowSignal.workflow.in_(ids)).execute()
            executions = StepExecution.delete().where(StepExecution.workflow.in_(ids)).execute()
            return Workflow.delete().where(Workflow.id.in_(ids) & expired).execute(), executions

        try:
            return [self._transact(delete)]
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
        query = query.select_extend(moment).order_by(moment, key).limit(self.housekeeping_batch_size)
        page = query
        while rows := self._repeat(functools.partial(list[Any], page)):
            yield rows
            last_id, last = rows[-1].id, rows[-1].__data__[moment.name]
            if self._dialect == "mysql":  # which uses no index to compare pairs
                page = query.where((moment > last) | ((moment == last) & (key > last_id)))
            else:
                page = query.where(peewee.Tuple(moment, key) > (moment.db_value(last), last_id))

    # -- looking ----------------------------------------------------------------------------------------------------

    @_repeated
    def is_idle(self) -> bool:
        """Whether no workflow is ready or performing, for scripts: `drive.run(until=drive.is_idle)`.

        Paused ones wait for a person, those that wait for a signal without a timeout for somebody else.
        """
        # By way of executions that indexes hold: of a million finished or waiting workflows none is looked at. In one
        # statement, or between two of them a workflow might move from what is asked last to what was asked first.
        timed = f"state = '{WAITING}' and t1.times_out_at is not null"
        busy = (
            "exists (select 1 from geneva_drive_step_executions t1 join geneva_drive_workflows t2"
            f" on t2.id = t1.workflow_id where t1.{active} and t2.state in {(READY, PERFORMING)})"
            for active in (f"state = '{SCHEDULED}'", f"state = '{IN_PROGRESS}'", timed)
        )
        ((is_busy,),) = self._db.execute_sql(f"select {' or '.join(busy)}").fetchall()
        return not is_busy

    @_repeated
    def doctor(self) -> list[str]:
        """Check over the tables what must always hold, while others write. Reads all rows: not for every minute.

        :returns: the violations, a sentence each; empty when all is sound.
        """
        if problem := _Schema(self).problem():
            return [problem]
        found = []
        for sentence, query in VIOLATIONS.items():
            rows = self._db.execute_sql(query.format(active=ACTIVE, ongoing=ONGOING)).fetchall()
            found += [sentence.format(*map(_as_text, row)) for row in rows]
        found += [each.problem for each in self._stranded_waits() if each.kind == "wait"]
        missing = [statement for part in _Schema(self).parts(has_queue=False) for statement in part()]
        return found + [f"the schema lacks: {statement}" for statement in missing]

    def _stranded(self) -> Iterator[_Stranded]:
        """What ongoing workflows need and this code does not define; to be asked with new code, before its deploy."""
        for name, step_name, number in Workflow.undefined_steps_in_flight():
            removal = f"{step_name} = removed_step()" if step_name.isidentifier() else f"removed_step({step_name!r})"
            kind, problem = "step", f"which the class does not define: keep it, or put {removal} in its place"
            if name not in _workflow_classes:
                kind, fix = "class", "import it, or set workflow_type on its successor"
                problem = f"and no class defines that type: {fix}"
            yield _Stranded.of(kind, name, step_name, number, "stand", f"at the step {step_name!r}, {problem}")
        for name, hero_type, number in _count_ongoing(Workflow.select(), Workflow.type, Workflow.hero_type):
            if why := _hero_problem(hero_type):
                need = f"a hero of the type {hero_type!r}, but {why}"
                yield _Stranded.of("hero", name, hero_type, number, "need", need)
        yield from self._stranded_waits()
        pending = WorkflowSignal.select().join(Workflow).where(WorkflowSignal.consumed_at.is_null())
        for name, signal_name, number in _count_ongoing(pending, Workflow.type, WorkflowSignal.name):
            if name in _workflow_classes and signal_name not in _workflow_classes[name]._signal_names():
                fix = "keep such a step, or send them the signal by its new name and delete that of the old one"
                problem = f"the signal {signal_name!r}, which no step of the class waits for: {fix}"
                yield _Stranded.of("signal", name, signal_name, number, "keep", problem)

    def _stranded_waits(self) -> Iterator[_Stranded]:
        """The executions that wait for a signal that their step, by now, does not wait for."""
        waiting = StepExecution.select().join(Workflow).where(StepExecution.state == SQL(f"'{WAITING}'"))
        columns = Workflow.type, StepExecution.step_name, StepExecution.waiting_for
        for name, step_name, signal_name, number in _count_ongoing(waiting, *columns):
            cls = _workflow_classes.get(name)
            definition = cls and cls._find(step_name)
            if cls is None or (definition and (definition.removed or definition.wait_for == signal_name)):
                continue
            kind, now, fix = "wait", "no step of the class waits for", "pause() and resume() them with this code"
            if signal_name in cls._signal_names():
                kind, now = "changed wait", "that step does not wait for any more"
            if definition is None:
                fix = "pause() them, and resume_at() another step"
            elif definition.wait_for is None:
                fix = "let housekeeping have them go on without it"
            fix = f"keep wait_for={signal_name!r}, or {fix}"
            problem = f"at the step {step_name!r} for the signal {signal_name!r}, which {now}: {fix}"
            yield _Stranded.of(kind, name, signal_name, number, "wait", problem)

    @_repeated
    def stats(self) -> list[Metric]:
        """The numbers to watch, as an exporter for Prometheus or statsd takes them: all are gauges. Reads all rows.

        :returns: sorted by name: how many workflows there are by type and state, and what part of the ongoing ones is
            paused; how many steps are due and not begun, and since when the oldest; how many wait for which signal; how
            many attempts, of the workflows that are kept, ended with their process.
        """
        now, count, kinds = self._now(), peewee.fn.COUNT(SQL("*")), (Workflow.type, Workflow.state)
        late = SQL(f"t1.state = '{SCHEDULED}'") & (StepExecution.scheduled_for < now) & (Workflow.state == READY)
        first = peewee.fn.MIN(StepExecution.scheduled_for)
        ((overdue, oldest),) = StepExecution.select(count, first).join(Workflow).where(late).tuples()
        died = StepExecution.select(Workflow.type, count).join(Workflow).where(StepExecution.outcome == "recovered")
        recovered = dict(died.group_by(Workflow.type).tuples())
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
        for (name, signal_name), number in sorted(self._count_waiting().items()):
            add("waiting_steps", number, type=name, signal=signal_name)
        add("overdue_steps", overdue)
        add("oldest_overdue_seconds", (now - oldest).total_seconds() if oldest else 0)
        return sorted(metrics, key=lambda metric: metric.name)

    def _count_waiting(self) -> dict[tuple[str, str], int]:
        """How many executions wait, by the type of their workflow and the name of the signal."""
        kinds = (Workflow.type, StepExecution.waiting_for)
        query = StepExecution.select(*kinds, peewee.fn.COUNT(SQL("*"))).join(Workflow)
        rows = query.where(StepExecution.state == WAITING).group_by(*kinds).tuples()
        return {(name, signal_name): number for name, signal_name, number in rows}


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
    "execution {0} belongs to the workflow {1}, which is gone": """
        select e.id, e.workflow_id from geneva_drive_step_executions e
        where not exists (select 1 from geneva_drive_workflows w where w.id = e.workflow_id)""",
    "execution {0} waits for the signal {1}, which is there": """
        select e.id, e.waiting_for from geneva_drive_step_executions e
        join geneva_drive_workflows w on w.id = e.workflow_id and w.state = 'ready'
        where e.state = 'waiting' and exists (
            select 1 from geneva_drive_signals s where s.workflow_id = e.workflow_id and s.name = e.waiting_for
            and s.consumed_at is null and s.id > coalesce(e.signal_id, 0))""",
    "execution {0} waits for no signal": """
        select id from geneva_drive_step_executions where state = 'waiting' and waiting_for is null""",
    "signal {0} belongs to the workflow {1}, which is gone": """
        select s.id, s.workflow_id from geneva_drive_signals s
        where not exists (select 1 from geneva_drive_workflows w where w.id = s.workflow_id)""",
}


class _Stranded(NamedTuple):
    """What so many ongoing workflows of a type need, and what is wrong with it: a sentence that says what to do."""

    kind: str  # "class", "step", "hero", "wait" (for a signal of no step), "changed wait" or "signal"
    type: str
    name: str
    workflows: int
    problem: str

    @classmethod
    def of(cls, kind: str, type_name: str, name: str, number: int, verb: str, problem: str) -> _Stranded:
        who = f"{number} ongoing workflow{'s' * (number > 1)} of {type_name} {verb}{'s' * (number == 1)}"
        return cls(kind, type_name, name, number, f"{who} {problem}")


class Metric(NamedTuple):
    """A number of :meth:`GenevaDrive.stats`, called as Prometheus has it."""

    name: str
    labels: dict[str, str]
    value: float


def _job_id(moment: datetime) -> str:
    """A unique id for a message; it begins with the time at which it was queued, in microseconds since 1970."""
    return f"{int(moment.timestamp() * 1_000_000)}-{uuid.uuid4().hex}"


def _queued_at(job_id: str) -> datetime:
    return datetime.fromtimestamp(int(job_id.partition("-")[0]) / 1_000_000, timezone.utc)


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
                time.sleep(0.1)
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
    performing = any(time.monotonic() < each.patience_ends for each in list(_drive()._performing))
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


# ==== Drivers: what an error or a connection tells ====================================================================


def _original(error: Any) -> Any:
    """The driver's error under Peewee's; None under one that Peewee has raised itself."""
    while isinstance(error, peewee.PeeweeException):
        error = getattr(error, "orig", None)
    return error


def _codes(error: BaseException) -> tuple[Any, Any]:
    """What a driver tells of an error: its SQLSTATE, and the server's own number, or SQLite's text."""
    original = _original(error)
    state = getattr(original, "pgcode", None) or getattr(original, "sqlstate", None)
    code = getattr(original, "errno", None) or next(iter(getattr(original, "args", ())), None)
    return state, code.rpartition("] ")[2] if isinstance(code, str) else code  # CySqlite puts the statement before it


def _is_transient(error: BaseException) -> bool:
    """Whether a transaction fell to others that run beside it, and may be repeated as it is."""
    state, code = _codes(error)
    is_locked = isinstance(code, str) and re.match("database (table )?is locked", code)  # SQLite; its shared cache
    # PostgreSQL: serialization failure, deadlock detected, lock timeout; MySQL: lock wait timeout, deadlock; MariaDB,
    # for a snapshot that is too old: the row, the table has changed since.
    if state in ("40001", "40P01", "55P03") or code in (1205, 1213, 1020, 1412) or is_locked:
        return True
    # A deadlock takes MySQL's savepoints along; what is raised in the end is that there is none to roll back to.
    return error.__context__ is not None and _is_transient(error.__context__)


def _give_way(tries: int) -> None:
    """Wait, so that those who collided do not meet again: at random, and longer with each try."""
    time.sleep(random.uniform(0, 0.005 * 2 ** min(tries, 7)))


def _is_about_schema(error: BaseException) -> bool:
    """Whether a statement names a table or a column that the database does not have."""
    state, code = _codes(error)
    is_missing = isinstance(code, str) and re.match("no such (table|column)|table .* has no column", code)  # SQLite
    return state in ("42P01", "42703") or code in (1146, 1054) or bool(is_missing)


def _check_class(database: Any) -> None:
    """Refuse, with a ConfigurationError, a database whose class tells that it cannot do what the library needs."""
    if any(each.__name__ == "SqliteQueueDatabase" for each in type(database).__mro__):
        raise ConfigurationError("SqliteQueueDatabase has no transactions: use SqliteDatabase, with a timeout")
    if getattr(database, "_server_side_cursors", False):
        fix = "leave it out, and wrap the queries that need them in playhouse.postgres_ext.ServerSide()"
        raise ConfigurationError(f"server_side_cursors=True lets rows be read while others are written: {fix}")


def _is_in_transaction(connection: Any) -> bool:
    """Whether a driver's connection is in a transaction, one that Peewee does not know of included."""
    if hasattr(connection, "info") and hasattr(connection.info, "transaction_status"):  # psycopg
        return connection.info.transaction_status != 0
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
            _current_drive._after_fork_in_child(is_of_worker)
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
        """Keep an attempt alive, until it is removed."""
        self._see_to_thread()
        self.beating.add(attempt)  # what is in there without being performed would never be recovered
        self._wake()

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

    def is_silence_death(self) -> bool:
        """Whether all who live have had the time to beat since the wall clock ran ahead, as it does in a host's sleep.

        What it ran ahead by is told from the monotonic clock, which stands still in a sleep.
        """
        now, before = time.monotonic(), self.lead
        self.lead = time.time() - now
        if self.lead - before > self._interval():
            self.ran_ahead = now
        return now - self.ran_ahead > 2 * self._interval()

    def _see_to_thread(self) -> None:
        with self.lock:
            if self.thread is None and not _is_private(_drive()._db):
                self.thread = threading.Thread(target=self._run, name="geneva-drive-heartbeat", daemon=True)
                self.thread.start()

    def _wake(self) -> None:
        """Wake the thread, if it sleeps for longer than it is to."""
        if self._moment() < self.nap:
            self.hurry.set()

    def _interval(self) -> float:
        return (_drive().stuck_in_progress_threshold - self._ahead()).total_seconds() / 4

    def _moment(self) -> float:
        """After how many seconds an attempt is one of the long ones, and how often the thread looks for these."""
        return min(1, self._interval() / 4)

    def _ahead(self) -> timedelta:
        """How much silence is told of beforehand, in a process that exits."""
        return max(NO_WAIT, _drive().stuck_in_progress_threshold - EXIT_TIME) if self.is_leaving else NO_WAIT

    def _run(self) -> None:
        failures = 0
        while True:
            self._sleep()
            if not self._is_connection_needed():
                self._disconnect()
            elif not self.database or time.monotonic() - self.beaten >= self._interval():
                is_leaving, error = self.is_leaving, self._beat()
                if error:
                    level, failures = logging.DEBUG if failures else logging.WARNING, failures + 1
                    logger.log(level, "the heartbeat failed and is tried again each second: %s", error)
                else:
                    failures = 0
                    (self.left if is_leaving else self.connected).set()

    def _is_connection_needed(self) -> bool:
        long_ago = time.monotonic() - self._moment()
        return bool(self.workers or self.is_leaving or any(each.claimed <= long_ago for each in list(self.beating)))

    def _sleep(self) -> None:
        self.nap = threading.TIMEOUT_MAX  # first: what is added from now on wakes it
        if self.beating or self.workers or self.database:
            self.nap = self._moment()
        self.hurry.wait(self.nap)
        self.hurry.clear()

    def _beat(self) -> Exception | None:
        try:
            drive = _drive()
            if not _is_private(drive._db):
                self._connect(drive._db)
                self._renew(drive)
                self.beaten = time.monotonic()
        except Exception as error:
            self.beaten = -math.inf
            if not _is_transient(error):  # some drivers never tell that a connection is gone
                self._disconnect()
            return error
        return None

    def _renew(self, drive: GenevaDrive) -> None:
        ids = [each.execution.id for each in list(self.beating)]
        if not ids:
            drive._db.execute_sql("select 1")  # in time to open another connection, should this one be gone
            return
        with drive._begin():
            mine = StepExecution.id.in_(ids) & (StepExecution.state == IN_PROGRESS)
            # What a checkpoint in a body's transaction has locked must not keep the others waiting.
            free = StepExecution._locking(StepExecution.select(StepExecution.id).where(mine), skip_locked=True)
            beating = [each.id for each in free]
            now = drive._now() - self._ahead()
            StepExecution.update(heartbeat_at=now).where(StepExecution.id.in_(beating)).execute()

    def _connect(self, database: Database) -> None:
        if self.database is not database:  # there is another drive
            self._disconnect()
        database.connect(reuse_if_open=True)
        self.database = database

    def _disconnect(self) -> None:
        database, self.database = self.database, None
        if database:
            with contextlib.suppress(peewee.PeeweeException):
                database.close()

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


# ==== The embedded queue: Huey's SQL storage on the drive's own database ==============================================


def _embedded_models(database: Any) -> tuple[Any, ...]:
    """The four models of Huey's SqlStorage, bent to live in an application's database, for years."""
    models = SqlStorage.create_models(types.SimpleNamespace(database=database))
    for model in models:
        model._meta.set_table_name(QUEUE_TABLE_PREFIX + model._meta.table_name)
        if model._meta.auto_increment:
            model.id.field_type = peewee.BigAutoField.field_type  # 31 bits of messages are used up one day
    models[1].timestamp.utc = True  # or producers and consumers in different time zones disagree
    return models


def _embedded_model(place: int) -> Any:
    return property(lambda storage: storage.drive._embedded_models[place])


class _EmbeddedTask(Task):
    """A step that cannot be revoked in the queue: the tables say what is to be done. Spares six statements each."""

    revoke_id = property(lambda task: None, lambda task, value: None)


TASK_TABLE = f"{QUEUE_TABLE_PREFIX}task"
FIRST_MESSAGE = f"from {TASK_TABLE} where queue = {{}} order by priority desc, id limit 1"

#: In a message, the number of an execution that MariaDB is still to find; it takes as many bytes, in the order of
#: pickle's LONG1, as STAND_IN_SQL puts in their place: eight, for any BIGINT.
STAND_IN_BYTES = b"geneva!!"
STAND_IN = int.from_bytes(STAND_IN_BYTES, "little")
STAND_IN_SQL = "reverse(unhex(lpad(hex({}), 16, '0')))"

#: Of the tables of the queue: what is kept beside a message.
MESSAGE_COLUMNS = {"task": "priority", "schedule": "timestamp"}


def _insertion(table: str) -> str:
    return f"insert into {QUEUE_TABLE_PREFIX}{table} (queue, data, {MESSAGE_COLUMNS[table]})"


class _Message(NamedTuple):
    """A message for the embedded queue, and what Huey does besides putting it there."""

    huey: Any
    task: Any

    @property
    def table(self) -> str:
        return "task" if self.task.eta is None else "schedule"

    @property
    def parameters(self) -> list[Any]:
        """The columns of `_insertion()`."""
        storage, task = self.huey.storage, self.task
        data = storage.Task.data.db_value(self.huey.serialize_task(task))
        kept = (task.priority or 0) if task.eta is None else storage.Schedule.timestamp.db_value(task.eta)
        return [storage.name, data, kept]

    def sent(self, execution_id: int) -> None:
        """Do the rest, for a statement that has inserted the message and its execution."""
        self.task.args = (execution_id,)
        self.tell()
        self.huey.storage.ring(self.table, 1)

    def tell(self) -> None:
        self.huey._emit(SIGNAL_ENQUEUED if self.task.eta is None else SIGNAL_SCHEDULED, self.task)


class _EmbeddedHuey(Huey):
    def _emit(self, signal: str, task: Any, *arguments: Any, **options: Any) -> None:
        emit = functools.partial(super()._emit, signal, task, *arguments, **options)
        if signal in (SIGNAL_ENQUEUED, SIGNAL_SCHEDULED):  # in the transaction that may roll the message back
            self.storage.drive._after_commit(emit)
        else:
            emit()

    def is_revoked(self, task: Any, timestamp: Any = None, peek: bool = True) -> bool:
        return not isinstance(task, _EmbeddedTask) and super().is_revoked(task, timestamp, peek)

    def delete(self, key: str | None) -> bool:
        return key is not None and super().delete(key)

    def put_all(self, tasks: Sequence[Any]) -> None:
        """Put into the queue what is due, and into the schedule what has a time, with fewer statements than Huey."""
        messages = [_Message(self, task) for task in tasks]
        for table in MESSAGE_COLUMNS:
            self.storage.put(table, [each.parameters for each in messages if each.table == table])
        for each in messages:
            each.tell()

    def create_consumer(self, **options: Any) -> Consumer:
        return _EmbeddedConsumer(self, **options)


class _StopFlag:
    """Tells the threads of a consumer to stop, as an Event does, and those of its workers that wait of new messages."""

    def __init__(self) -> None:
        self.is_stopped, self.rings, lock = False, 0, threading.RLock()
        self.stopped, self.bell = threading.Condition(lock), threading.Condition(lock)

    def set(self) -> None:
        with self.stopped:
            self.is_stopped = True
            self.stopped.notify_all()
            self.bell.notify_all()

    def is_set(self) -> bool:
        return self.is_stopped

    def wait(self, timeout: float | None = None) -> bool:
        with self.stopped:
            return self.stopped.wait_for(self.is_set, timeout)

    def ring(self, messages: int, workers: int) -> None:
        """Have a worker look into the queue for each message, of so many workers that there are."""
        with self.bell:
            self.rings = min(self.rings + messages, workers)
            self.bell.notify(messages)

    def wait_for_ring(self, timeout: float) -> None:
        with self.bell:
            self.bell.wait_for(lambda: self.is_stopped or self.rings, timeout)
            self.rings = max(0, self.rings - 1)


class _ThreadEnvironment(ThreadEnvironment):
    def get_stop_flag(self) -> Any:
        return _StopFlag()


class _EmbeddedWorker(Worker):
    def sleep(self) -> None:
        """As long as Huey's worker sleeps, or until this process puts a message into the queue."""
        if isinstance(self.stop_flag, _StopFlag):
            self.delay: float = min(self.delay, self.max_delay)
            self.stop_flag.wait_for_ring(self.delay)
            self.delay *= self.backoff
        else:  # processes and greenlets have other ones
            super().sleep()


class _EmbeddedScheduler(Scheduler):
    def shutdown(self) -> None:
        self.huey.storage.drive._close_own_connection()  # Huey calls the hooks of a shutdown in workers alone


class _EmbeddedConsumer(Consumer):
    worker_class, scheduler_class = _EmbeddedWorker, _EmbeddedScheduler

    def get_environment(self, worker_type: str) -> Any:
        if worker_type == WORKER_THREAD:
            return _ThreadEnvironment(self._graceful_sig, self._interrupt_sig)
        return super().get_environment(worker_type)

    def ring(self, messages: int) -> None:
        """So many messages are there, committed."""
        if isinstance(self.stop_flag, _StopFlag):
            self.stop_flag.ring(messages, self.workers)


class _EmbeddedStorage(SqlStorage):
    """Enqueues in the transaction of whoever changes a workflow, and runs no SQL before it is used."""

    def __init__(self, name: str, drive: GenevaDrive) -> None:
        BaseStorage.__init__(self, name)  # SqlStorage's own wants a connected database
        self.drive = drive

    KV, Schedule, Task, Counter = map(_embedded_model, range(4))

    @property
    def database(self) -> Database:
        return self.drive._db

    def atomic(self) -> Any:
        if self.drive._dialect == "mysql" and not self.database.in_transaction():
            # Its default would lock the gaps that new messages go into.
            return self.database.atomic(isolation_level="READ COMMITTED")
        return self.drive._begin()

    @property
    def for_update(self) -> str | None:
        return self.drive._skip_locked

    # As SqlStorage has the next two, but for their SQL, which Peewee takes longer to build than a database to run.

    def enqueue(self, data: Any, priority: float | None = None) -> None:
        self.put("task", [(self.name, self.Task.data.db_value(data), priority or 0)])

    def add_to_schedule(self, data: Any, timestamp: datetime) -> None:
        moment = self.Schedule.timestamp.db_value(timestamp)
        self.put("schedule", [(self.name, self.Task.data.db_value(data), moment)])

    def put(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        """Insert messages."""
        self.check_conn()
        row = f"({', '.join([self.database.param] * 3)})"
        for start in range(0, len(rows), 1000):
            some = rows[start : start + 1000]
            sql = f"{_insertion(table)} values {', '.join([row] * len(some))}"
            send = functools.partial(self.database.execute_sql, sql, [*itertools.chain.from_iterable(some)])
            self.drive._repeat(send, is_done=lambda: True)  # a connection that is lost may have sent them
        self.ring(table, len(rows))

    def ring(self, table: str, messages: int) -> None:
        """Wake workers of this process, if any wait for such messages, once these are committed."""
        consumer = self.drive._consumers.get(self.name)
        if consumer and messages and table == "task":
            self.drive._after_commit(functools.partial(consumer.ring, messages))

    def dequeue(self) -> Any:
        try:
            return self.drive._repeat(self._dequeue)
        except (peewee.PeeweeException, GenevaDriveError):
            if not self.database.in_transaction():
                with contextlib.suppress(peewee.PeeweeException):  # some drivers never tell that a connection is gone
                    self.drive._close_own_connection()
            time.sleep(1)  # Huey logs a traceback each time, and polls often
            raise

    def _dequeue(self) -> Any:
        self.check_conn()
        if self.database.in_transaction():  # what it sees may be old: only locks tell what is there
            return super().dequeue()
        first = FIRST_MESSAGE.format(self.database.param)
        if self.drive._has_fast_paths():
            return TAKE_AT_ONCE[self.drive._dialect](self.drive, first, self.name)
        # With the data, for SQLite gives the id of a message that is gone to a new one.
        delete = f"delete from {TASK_TABLE} where id = {self.database.param} and data = {self.database.param}"
        while row := self.database.execute_sql(f"select id, data {first}", (self.name,)).fetchone():
            if self.database.rows_affected(self.database.execute_sql(delete, row)):
                return bytes(row[1])
        return None

    def read_schedule(self, timestamp: datetime) -> list[bytes]:
        """As SqlStorage has it, but for its locks, which MySQL has take in the first message of the next queue.

        At most 10,000 at a time, for they are all held in memory; the rest comes with the next reading.
        """
        self.check_conn()
        moment, param = self.Schedule.timestamp.db_value(timestamp), self.database.param
        due = f"select id from {QUEUE_TABLE_PREFIX}schedule where queue = {param} and timestamp <= {param}"
        due += " order by timestamp, id limit 10000"
        found = self.drive._repeat(lambda: self.database.execute_sql(due, (self.name, moment)).fetchall())
        messages: list[bytes] = []
        for ids in peewee.chunked([row[0] for row in found], 500):
            try:
                messages += self.drive._repeat(functools.partial(self._take_scheduled, ids, moment))
            except peewee.PeeweeException as error:
                if not messages:
                    raise
                # Those are gone from the table: this reader is the only one who has them.
                logger.warning("the rest of the schedule is left for the next reading: %s", error)
                break
        return messages

    def _take_scheduled(self, ids: list[int], moment: int) -> list[bytes]:
        Schedule = self.Schedule
        # Of an id that was used again since, for another message, all of it is to be asked again.
        is_due = Schedule.id.in_(ids) & (Schedule.queue == self.name) & (Schedule.timestamp <= moment)
        rows = Schedule.select(Schedule.id, Schedule.data).where(is_due).tuples()
        with self.atomic():
            found = dict(rows.for_update(self.for_update) if self.for_update else rows)
            Schedule.delete().where(Schedule.id.in_([*found])).execute()
        return [found[each] for each in ids if each in found]

    def check_conn(self) -> None:
        if not self.database.in_transaction():  # which a silent reconnect would tear in two
            self.drive._connect_worker()


# ==== The schema ======================================================================================================

SCHEMA_FILE = Path(__file__).with_name("geneva_drive_schema.sql")

#: Raised by each release that changes the tables. The first one, 1, did not record it yet.
SCHEMA_VERSION = 2

#: How long a change waits for a lull: for the ends of transactions that are open on its table.
SCHEMA_PATIENCE_SECONDS = 600

#: What is executed before and after a change of the schema: for one process at a time, and for no one to be held up. A
#: change waits until no transaction is open on its table, and everybody else waits behind it: so it is told to give up
#: after a second, and is tried again, lest heartbeats fall silent behind a transactional step that takes minutes.
SCHEMA_LOCKS: dict[str, tuple[list[str], list[str]]] = {
    "sqlite": ([], []),
    "postgresql": (
        [
            "select pg_advisory_xact_lock(hashtext('geneva_drive_schema'))",
            "select set_config('geneva_drive.lock_timeout', current_setting('lock_timeout'), true)",
            "set local lock_timeout = '1s'",
        ],
        ["select set_config('lock_timeout', current_setting('geneva_drive.lock_timeout'), true)"],
    ),
    "mysql": (
        [
            f"select get_lock('geneva_drive_schema', {SCHEMA_PATIENCE_SECONDS})",
            "set @geneva_drive_lock_wait_timeout = @@lock_wait_timeout, lock_wait_timeout = 1",
        ],
        [
            "commit",  # a version that is recorded is to be seen by the next one who gets the lock
            "set lock_wait_timeout = @geneva_drive_lock_wait_timeout",
            "select release_lock('geneva_drive_schema')",
        ],
    ),
}


class _SchemaVersion(Model):
    """A row for each version of the schema that `create_tables()` has brought the database to; the highest counts."""

    version: peewee.Field[int] = peewee.IntegerField(primary_key=True)

    class Meta:
        table_name = "geneva_drive_schema"


class _Schema:
    """The tables of a drive, and what they lack."""

    def __init__(self, drive: GenevaDrive) -> None:
        self.drive, self.db = drive, drive._db

    def complete(self, models: Sequence[Any]) -> None:
        """See :meth:`GenevaDrive.create_tables`."""
        has_queue = any(isinstance(huey.storage, _EmbeddedStorage) for huey in self.drive.queues.values())
        parts: list[Callable[[], list[Any]]] = [functools.partial(self._lacking_model, each) for each in models]
        parts += self.parts(has_queue)
        # Always looked at, however new the version: a queue may have come to the drive, or an index been dropped. The
        # first look takes no lock; SQLite has its own, and many that open a new file at once lock each other out.
        if not self.drive._transact(lambda: any(part() for part in parts), PATIENCE_SECONDS):
            return
        if self.drive._dialect == "mysql" and self.db.in_transaction():
            problem = "create_tables() has tables to change, which commits the transaction around it"
            raise GenevaDriveError(f"{problem}: call it outside of transactions")
        for part in parts:  # each by itself: who locked two tables at once would deadlock with those at work
            self.drive._transact(functools.partial(self._add, part), SCHEMA_PATIENCE_SECONDS)

    def parts(self, has_queue: bool) -> Iterator[Callable[[], list[str]]]:
        """What the schema is made of, in the order of making it: each part returns the statements that it lacks."""
        sections = ["every database", self.drive._dialect, *["embedded queue"] * has_queue]
        models: list[Any] = [*MODELS, _SchemaVersion, *(self.drive._embedded_models if has_queue else ())]
        for model in models:
            yield functools.partial(self._lacking_columns, model)
        for section in sections:
            for statement in _schema_statements(section):
                yield functools.partial(self._lacking_statement, statement)
        yield self._lacking_version

    def _add(self, part: Callable[[], list[Any]]) -> None:
        """Execute what a part lacks, one process at a time."""
        lock, unlock = SCHEMA_LOCKS[self.drive._dialect]
        for statement in lock:
            self.db.execute_sql(statement)
        try:
            for statement in part():
                statement() if callable(statement) else self.db.execute_sql(statement)
        finally:
            with contextlib.suppress(peewee.PeeweeException):  # after a failure, the rollback undoes the lock too
                for statement in unlock:
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
        return [_add_column(model, each) for each in model._meta.sorted_fields if each.column_name not in known]

    def _lacking_statement(self, statement: str) -> list[str]:
        return [] if self._is_applied(statement) else [statement]

    def _lacking_version(self) -> list[str]:
        # A newer version stays: what it needs is there, and what this code needs is there too.
        is_older = self.version() < SCHEMA_VERSION
        return [f"insert into {_SchemaVersion._meta.table_name} (version) values ({SCHEMA_VERSION})"] * is_older

    def _is_applied(self, statement: str) -> bool:
        index = re.match(r"create (?:unique )?index (\w+) on (\w+)", statement)
        if index:
            return any(each.name == index[1] for each in self.db.get_indexes(index[2]))
        trigger = re.match(r"create trigger (\w+)", statement)
        if trigger:
            query = "select 1 from sqlite_master where type = 'trigger' and name = ?"
            return self.db.execute_sql(query, (trigger[1],)).fetchone() is not None
        column = re.match(r"alter table (\w+) add column (\w+)", statement)
        if column:
            return any(each.name == column[2] for each in self.db.get_columns(column[1]))
        raise GenevaDriveError(f"{SCHEMA_FILE.name} holds a statement that cannot be applied twice: {statement}")

    def version(self) -> int:
        """The version that the database is at; 0 where there are no tables."""
        if not Workflow.table_exists():
            return 0
        newest = _SchemaVersion.select(peewee.fn.MAX(_SchemaVersion.version))
        return (_SchemaVersion.table_exists() and newest.scalar()) or 1  # the first release recorded none

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
    code = re.sub(r"--.*", "", "".join(bodies))
    return [
        " ".join(statement.split()) for statement in re.split(r";\s*$", code, flags=re.MULTILINE) if statement.strip()
    ]


def _add_column(model: Any, column: peewee.Field) -> str:
    ctx = model._schema._create_context()
    return cast(str, ctx.literal("alter table ").sql(model).literal(" add column ").sql(column.ddl(ctx)).query()[0])


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


#: Of durations, the largest first, in milliseconds.
UNITS = {"d": 86_400_000, "h": 3_600_000, "min": 60_000, "s": 1000, "ms": 1}


def _span(duration: timedelta, parts: int | None = None) -> str:
    """A duration for people, "2 d 3 h"; of it, the so many largest parts, or the nearest one."""
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
    name = function if isinstance(function, str) else getattr(function, "__name__", str(function))
    return name.replace("<lambda>", "…")


def _signal_note(definition: StepDefinition) -> str:
    limit = "" if definition.timeout is None else f", after {_span(definition.timeout)} {definition.on_timeout}"
    return f"wait for {definition.wait_for}{limit}"


def _policy_note(policy: ExceptionPolicy) -> str:
    kinds = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in policy.matching or ()) or "error"
    if isinstance(policy, _HandlerPolicy):
        return f"on {kinds}: {_name_of(policy.handler)}"
    limit = "" if policy.max_reattempts is None else f" {policy.max_reattempts} times, then {policy.terminal_action}"
    return f"on {kinds}: {policy.action}{limit if policy.action == 'reattempt' else ''}"


def _mermaid_node(node: str, shape: str, *lines: str) -> str:
    # Names may hold anything printable: what could be Mermaid's, HTML's or Markdown's goes by its number.
    def by_number(found: re.Match[str]) -> str:
        return "".join(f"#{ord(each)};" for each in found[0])

    safe = [re.sub(r"[^\w ,:…]|\b_+|_+\b", by_number, line) for line in lines]
    return f"    {node}" + shape.format(f'"{"<br/>".join(safe)}"')


# ==== Help for tests ==================================================================================================


def _shifted(clock: Callable[[], datetime], duration: timedelta) -> datetime:
    return clock() + duration


class TestHelpers:
    """Runs workflows in a test, step by step, ignoring waits: a mixin for unittest.TestCase, or an object by itself.

    No consumer needs to run. All of it works inside a transaction that the test rolls back, and in an asynchronous
    test; of both at once, see :meth:`StepExecution.execute`.
    """

    __test__ = False  # pytest: collect the classes that mix it in, not the mixin

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__test__ = True

    def speedrun_workflow(self, workflow: Workflow, max_iterations: int = 100, raise_errors: bool = True) -> None:
        """Run the steps until the workflow is finished, canceled or paused, or waits for a signal.

        :raises AssertionError: if it is not, after so many steps.
        :raises Exception: a step's error, if it paused or canceled the workflow and `raise_errors` is true.
        """
        for _ in range(max_iterations):
            self._refresh(workflow)
            if self._stands_still(workflow):
                return
            self.perform_next_step(workflow, raise_errors)
        self._refresh(workflow)
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
            row, active = Workflow._lock_with_active(workflow.id)
            self._assert(row.state in (READY, PAUSED), workflow, "it is neither ready nor paused")
            return _moved(drive, row, active, step_name)

        self._perform(workflow, drive._transact(move), raise_errors)

    def travel(
        self, workflow: Workflow, duration: timedelta | float, max_iterations: int = 100, raise_errors: bool = True
    ) -> None:
        """Move `drive.clock` forward, and run what falls due of the workflow on the way, each step at its own time.

        The clock goes on from there; where a step's error is raised, it stands still at the time of that step. With
        unittest it is put back at the end of the test; elsewhere, make a drive or set `drive.clock` in each test.

        :param duration: a timedelta or seconds.
        :raises AssertionError: if a step is due still after so many steps.
        :raises Exception: a step's error, if it paused or canceled the workflow and `raise_errors` is true.
        """
        drive, total = _drive(), _duration(duration, "travel(): duration")
        clock = drive.clock
        if hasattr(self, "addCleanup"):
            self.addCleanup(setattr, drive, "clock", clock)
        moment = start = clock()  # it stands still on the way: what is due at the very end is not to be late for it
        due = (StepExecution.state == SCHEDULED) & (StepExecution.scheduled_for <= start + total)
        due |= (StepExecution.state == WAITING) & (StepExecution.times_out_at <= start + total)
        for left in range(max_iterations, -1, -1):
            self._refresh(workflow)
            execution = workflow.execution_history.where(due).get_or_none() if workflow.state == READY else None
            if execution is None:
                drive.clock = functools.partial(_shifted, clock, total)
                return
            moment = max(moment, execution._due)
            drive.clock = functools.partial(_shifted, lambda: start, moment - start)
            self._assert(left, workflow, f"a step is due still after {max_iterations} steps")
            self._perform(workflow, execution, raise_errors)

    def assert_workflow_state(self, workflow: Workflow, state: str) -> None:
        """:raises AssertionError: if the workflow is not in `state`."""
        self._refresh(workflow)
        self._assert(workflow.state == state, workflow, f"expected it to be {state}")

    def assert_step_executed(self, workflow: Workflow, step_name: str, state: str = COMPLETED) -> None:
        """:raises AssertionError: if no execution of the step ended in `state`."""
        found = workflow.execution_history.where(
            (StepExecution.step_name == step_name) & (StepExecution.state == state)
        )
        self._assert(found.count(), workflow, f"expected an execution of {step_name} that is {state}")

    def _perform(self, workflow: Workflow, execution: StepExecution, raise_errors: bool) -> None:
        try:
            done = execution.execute()
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
        return f": {execution.step_name} waits; call signal({name!r}), or travel() beyond its timeout"

    def _refresh(self, workflow: Workflow) -> None:
        workflow._take_over(Workflow.get_by_id(workflow.id))
        workflow.__dict__.pop("_hero", None)

    def _assert(self, condition: object, workflow: Workflow, message: str) -> None:
        if condition:
            return
        self._refresh(workflow)
        lines = [f"{workflow._label} is {workflow.state}: {message}. Its executions:"]
        for each in workflow.execution_history:
            error = f"  {each.error_class_name}: {each.error_message}" if each.error_class_name else ""
            lines.append(f"  {each.number:>3}  {each.step_name:<30} {each.state:<12} {each.outcome or '':<12}{error}")
        raise AssertionError("\n".join(lines))


# ==== Command line ====================================================================================================

_SELECTION = ("--state", "--type", "--hero")
_CONTROLS = ("--dry-run", "--json")
_CALLS = ("resume", "skip", "pause", "cancel")
_COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "worker": ("run steps until SIGTERM or SIGINT, then drain", ("--workers", "--queue", "--shutdown-timeout")),
    "list": ("list workflows, the newest first", (*_SELECTION, "--limit", "--json")),
    "show": ("show a workflow, its attempts over time with their errors, and what to do next", ("id", "--json")),
    **{call: (f"{call} workflows, by id or selected", ("ids", *_SELECTION, *_CONTROLS)) for call in _CALLS},
    "resume": ("resume workflows, by id or selected", ("ids", *_SELECTION, "--at", *_CONTROLS)),
    "signal": ("send a workflow a signal", ("id", "signal", "--payload", "--key", "--json")),
    "housekeeping": ("delete what is over, recover what died, queue again what is overdue", ("--json",)),
    "stats": ("count workflows by class and state, and overdue steps", ("--json",)),
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
    "--state": {"choices": WORKFLOW_STATES, "help": "those in this state"},
    "--type": {"metavar": "CLASS", "help": "those of this class and its subclasses"},
    "--hero": {"metavar": "TYPE:ID", "help": "those of this hero, such as User:7"},
    "--at": {"metavar": "STEP", "help": "go on with this step"},
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
    """The command line, `APP COMMAND ...`; see the README.

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
            command.add_argument(argument, **_ARGUMENTS[argument])
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


class _CommandLine:
    """A command; each has its method, which returns the exit code."""

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
            self.drive._connect_worker()
            if problem := _Schema(self.drive).problem():
                raise GenevaDriveError(problem)
        return cast(int, getattr(self, f"_{command}", self._control)())

    def _worker(self) -> int:
        workers, queues = self.options.workers, self.options.queue
        logger.info("serving %s, workers for each: %s", ", ".join(queues or self.drive.queues), workers)
        self.drive.run(workers, queues, shutdown_timeout=self.options.shutdown_timeout)
        return 0

    def _list(self) -> int:
        query = self._selected()
        workflows, total = list(query.order_by(Workflow.id.desc()).limit(self.options.limit)), query.count()
        rows: list[list[Any]] = [["ID", "TYPE", "HERO", "STATE", "STEP", "SINCE, OR DUE"]]
        for each in workflows:
            hero, step_name = _hero_label(each.hero_type, each.hero_id), each.current_step_name or ""
            rows.append([each.id, each.type, hero, each.state, step_name, self._since(each)])
        lines = self._table(rows) if total else ["no workflow matches"]
        if total > len(workflows):
            lines.append(f"{len(workflows)} of {total}: use --limit {total}, or {', '.join(_SELECTION)}")
        return self._answer([each.__data__ for each in workflows], lines)

    def _show(self) -> int:
        workflow = self._find(self.options.id)
        history, state = list(workflow.execution_history), workflow.state
        facts = {"created": self._moment(workflow.created_at), state: self._since(workflow)}
        waiting = next((each for each in history if each.state == WAITING), None)
        facts |= {"waits for the signal": cast(str, waiting.waiting_for)} if waiting else {}
        facts |= {"context": json.dumps(workflow.context, ensure_ascii=False)} if workflow.context else {}
        lines = [
            _clean(self._title(workflow)),
            *(line for key, text in facts.items() for line in self._wrapped(f"{key}: {text}")),
        ]
        lines += ["", *self._timeline(history), ""] * bool(history)
        problem, calls = workflow._undefined(), [call for call in _CALLS if state in ALLOWED_FROM[call]]
        if not problem and calls and not workflow._find(workflow.current_step_name):
            problem = str(StepNotDefinedError(workflow, workflow.current_step_name))
            calls = ["resume --at STEP", "cancel"] if state == PAUSED else ["pause", "cancel"]
        lines += self._wrapped(problem or "", "")
        lead = "Mend the cause, then" if state == PAUSED else "You may"
        lines += [f"{lead}: {self.call} {calls[0]} {workflow.id}  (or {', '.join(calls[1:])})"] if calls else []
        return self._answer({**workflow.__data__, "executions": [each.__data__ for each in history]}, lines)

    def _timeline(self, history: list[Any]) -> Iterator[str]:
        """A line for each attempt, its bar from when it was scheduled to its end, or to now; and its error."""
        now, start, is_wide = self.now, history[0].created_at, self.columns >= 120
        span = max(each.finished_at or now for each in history) - start
        room = max(24, (self.columns or 100) - 50 - 34 * is_wide)

        def place(moment: datetime) -> int:
            return min(int((moment - start) / (span or timedelta(1)) * room), room - 1)

        title = f"{start:%m-%d %H:%M:%SZ}".ljust(room - 10) + f"+ {_span(span, 1)}".rjust(10)
        rows: list[list[Any]] = [["#", "STEP", "OUTCOME", title, "TOOK, OR DUE", *["STARTED, OR DUE"] * is_wide]]
        for each in history:
            begun, ended = each.started_at, each.finished_at
            mark = "!" if each.error_class_name or each.outcome == "recovered" else "█" if begun else "·"
            bar = (" " * place(each.created_at)).ljust(place(begun or ended or now), "·")
            bar = bar.ljust(place(ended or now) + 1, mark).ljust(room)
            due = begun or each._due
            took = _span((ended or now) - begun, 2) if begun else self._relative(due) if due and not ended else ""
            started = [self._moment(due) if due else ""] * is_wide
            rows.append([each.number, each.step_name, each.outcome or each.state, bar, took, *started])
        title, *lines = self._table(rows)
        yield title
        for each, line in zip(history, lines):
            yield line
            if each.error_class_name:
                yield from self._wrapped(f"{each.error_class_name}: {each.error_message}", "    ")
        yield "· waited   █ performed   ! failed or died"

    def _control(self) -> int:
        call, ids = self.options.command, self.options.ids
        if bool(ids) == bool(self.options.state or self.options.type or self.options.hero):
            raise ConfigurationError(f"{call}: give either ids or some of {', '.join(_SELECTION)}")
        if not ids:
            states = [self.options.state] if self.options.state else ALLOWED_FROM[call]
            ids = [each.id for each in self._selected().where(Workflow.state.in_(states)).order_by(Workflow.id)]
        reports = []
        for workflow_id in ids:
            reports.append(self._controlled(call, workflow_id))
            if not self.options.json:  # each at once, for there may be many
                self._say(_clean(reports[-1]["done"] or f"{workflow_id}: {reports[-1]['error']}"))
        self._answer(reports, [] if ids else ["no workflow matches"])
        return int(any(report["error"] for report in reports))

    def _controlled(self, call: str, workflow_id: int) -> dict[str, Any]:
        try:
            workflow = self._find(workflow_id)
            before, would = workflow.state, f"would {call} {self._title(workflow)}"
            step_name = getattr(self.options, "at", None)
            act = functools.partial(workflow.resume_at, step_name) if step_name else getattr(workflow, call)
            if not self.options.dry_run:
                act()
                done = f"{self._title(workflow)}, was {before}"
                return {"id": workflow_id, "state": workflow.state, "done": done, "error": None}
            with self.drive._begin() as transaction:
                act()
                transaction.rollback()
            return {"id": workflow_id, "state": before, "done": would, "error": None}
        except Exception as error:  # it must not keep the others from their turn
            return {"id": workflow_id, "state": None, "done": None, "error": str(error) or repr(error)}

    def _signal(self) -> int:
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
        return self._answer({"id": workflow.id, "signal": name, "is_new": is_new}, [_clean(done)])

    def _housekeeping(self) -> int:
        counts = self.drive.housekeeping()
        return self._answer(counts, self._table([[*item] for item in counts.items()]))

    def _stats(self) -> int:
        metrics = self.drive.stats()
        value = {(each.name.removeprefix("geneva_drive_"), *each.labels.values()): each.value for each in metrics}
        rows: list[list[Any]] = [["TYPE", *map(str.upper, WORKFLOW_STATES), "PAUSED %", "RECOVERED"]]
        for name in dict.fromkeys(each.labels["type"] for each in metrics if each.labels):
            states = [value["workflows", name, state] for state in WORKFLOW_STATES]
            rows.append([name, *states, round(100 * value["paused_ratio", name]), value["recovered_steps", name]])
        late, oldest = value["overdue_steps",], timedelta(seconds=value["oldest_overdue_seconds",])
        overdue = f"overdue steps: {late}" + (f", the oldest due {self._moment(self.now - oldest)}" if late else "")
        waiting = [(each.labels, each.value) for each in metrics if "signal" in each.labels]
        lines = [_clean(f"{on['type']}: {number} wait for the signal {on['signal']}") for on, number in waiting]
        return self._answer([each._asdict() for each in metrics], [*self._table(rows), *lines, overdue])

    def _doctor(self) -> int:
        if self.options.deploy:
            stranded = list(self.drive._stranded())
            sound = "all that ongoing workflows need is defined: their classes, steps, heroes and signals"
            self._answer([each._asdict() for each in stranded], [_clean(each.problem) for each in stranded] or [sound])
            return int(bool(stranded))
        found = self.drive.doctor()
        self._answer(found, [*map(_clean, found), f"violations: {len(found)}" if found else "all is sound"])
        return int(bool(found))

    def _graph(self) -> int:
        return self._say(self._class(self.options.name).graph())

    def _selected(self) -> Any:
        """A query for the workflows that --state, --type and --hero select."""
        name, hero = self.options.type, self.options.hero
        query = (_workflow_classes.get(name) or Workflow).select()
        if name and name not in _workflow_classes:  # rows may be left of a class that is gone
            query = query.where(Workflow.type == name)
            query.exists() or self._class(name)
        if self.options.state:
            query = query.where(Workflow.state == self.options.state)
        if hero:
            hero_type, colon, hero_id = hero.partition(":")
            if not colon:
                raise ConfigurationError(f"--hero {hero}: it must be TYPE:ID, such as User:7")
            query = query.where(Workflow.hero_type == hero_type, Workflow.hero_id == hero_id)
        return query

    def _class(self, name: str) -> type[Workflow]:
        if name not in _workflow_classes:
            raise ConfigurationError(f"no workflow class is called {name!r}: use {', '.join(_workflow_classes)}")
        return _workflow_classes[name]

    def _find(self, workflow_id: int) -> Workflow:
        workflow = Workflow.get_or_none(Workflow.id == workflow_id)
        if workflow is None:
            raise GenevaDriveError(f"there is no workflow {workflow_id}: see {self.call} list")
        return cast(Workflow, workflow)

    def _title(self, workflow: Workflow) -> str:
        hero, step_name = _hero_label(workflow.hero_type, workflow.hero_id), workflow.current_step_name
        suffix = ", to pause when this step ends" if workflow.pause_requested else ""
        return f"{workflow._label} of {hero}: {workflow.state}{f' at {step_name}' if step_name else ''}{suffix}"

    def _since(self, workflow: Workflow) -> str:
        """When it came to stand still or, where it goes on, since when it performs its step, or when that is due."""
        active = workflow.execution_history.where(StepExecution.state.in_(ACTIVE)).get_or_none()
        moment = workflow.transitioned_at or (active and (active.started_at or active._due or active.scheduled_for))
        return self._moment(moment or workflow.created_at)

    def _moment(self, moment: datetime) -> str:
        return f"{self._relative(moment)}, {moment:%Y-%m-%d %H:%M:%SZ}"

    def _relative(self, moment: datetime) -> str:
        span = _span(moment - self.now, 1)
        return f"in {span}" if moment > self.now else f"{span} ago"

    def _answer(self, value: object, lines: Iterable[str]) -> int:
        if self.options.json:
            lines = [json.dumps(value, indent=2, default=lambda moment: moment.isoformat())]
        return self._say(*lines)

    def _say(self, *lines: str) -> int:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        return 0

    def _wrapped(self, text: str, indent: str = "  ") -> list[str]:
        limits = {"width": max(40, self.columns or 100), "max_lines": 4, "placeholder": " … (see --json)"}
        text = _clean(" ".join(text[:2000].split()))
        return textwrap.wrap(text, initial_indent=indent, subsequent_indent=indent, **limits)  # type: ignore[arg-type]

    def _table(self, rows: list[list[Any]]) -> list[str]:
        """Aligned columns, numbers to the right. Names are cut where the terminal is too narrow."""
        cells = [[_clean(cell) for cell in row] for row in rows]
        widths = [max(map(_width, column)) for column in zip(*cells)]
        names = [place for place, title in enumerate(rows[0]) if title in ("TYPE", "HERO", "STEP")]
        room = (self.columns or math.inf) - 2 * (len(widths) - 1)
        while sum(widths) > room and names and max(widths[place] for place in names) > 6:
            widths[max(names, key=widths.__getitem__)] -= 1
        lines = []
        for row, texts in zip(rows, cells):
            for place, width in enumerate(widths):
                while _width(texts[place]) > width:
                    texts[place] = f"{texts[place][:-2]}…"
                space = " " * (width - _width(texts[place]))
                texts[place] = space + texts[place] if isinstance(row[place], int) else texts[place] + space
            lines.append("  ".join(texts).rstrip())
        if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
            return lines
        return [_COLORED.sub(lambda found: f"\033[{_COLORS[found[0]]}m{found[0]}\033[0m", line) for line in lines]


if __name__ == "__main__":
    # As __main__, this is a second copy of the module: the application's drive is of the one that it imports.
    sys.exit(importlib.import_module(__spec__.name if __spec__ else Path(__file__).stem).main())
