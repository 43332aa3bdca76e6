"""Sign-up mails for the people in a CSV file: a welcome, a reminder after two days, a farewell after seven.

    python examples/signup.py [people.csv] [--database signup.db] [--maildir signup.maildir] [--seconds-per-day 3]

Kill it at any moment, with SIGKILL too, and start it again: it goes on where it stopped, and nobody gets a mail twice.
Close an account while it runs: `sqlite3 signup.db "update person set status = 'closed' where id = 1"`.
"""

import argparse
import csv
import mailbox
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from datetime import datetime, timedelta
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import localtime
from pathlib import Path
from tempfile import NamedTemporaryFile

from peewee import CharField, DatabaseError, Model, SqliteDatabase, chunked, fn

from geneva_drive import GenevaDrive, StepExecution, Workflow, cancel_if, step

COLUMNS = {  # of the CSV file, each with the pattern of its values
    "name": r"\w[^\x00-\x1f\x7f\ud800-\udfff]*",
    "email": r"(?a)[\w+-]+(\.[\w+-]+)*@[\w-]+(\.[\w-]+)+",
    "plan": "free|pro|team",
    "status": "subscribed|unsubscribed|closed",
}

parser = argparse.ArgumentParser(description="Send sign-up mails to the people in a CSV file, into a maildir.")
parser.add_argument("people", nargs="?", type=Path, default=Path(__file__).with_name("people.csv"))
parser.add_argument("--database", default="signup.db")
parser.add_argument("--maildir", type=Path, default=Path("signup.maildir"))
parser.add_argument("--seconds-per-day", type=float, default=3.0)
args = parser.parse_args()
if not 0 <= args.seconds_per_day <= 86400:
    parser.error("--seconds-per-day must be from 0 to 86400")

db = SqliteDatabase(args.database, pragmas={"journal_mode": "wal"}, timeout=10)
# Short thresholds, for whoever kills this every few seconds; the defaults, of minutes, suit a real application.
drive = GenevaDrive(db, stuck_in_progress_threshold=3, stuck_scheduled_threshold=3, max_recoveries=100)


class Person(Model):
    name = CharField()
    email = CharField(unique=True)
    plan = CharField()
    status = CharField()

    class Meta:
        database = db


class GreylistedError(Exception):
    """The mail server wants to see a second attempt before it trusts a new sender."""


def days(count: int) -> timedelta:
    return timedelta(seconds=count * args.seconds_per_day)


class Signup(Workflow):
    @cancel_if
    def account_closed(self):
        return self.hero.status == "closed"

    @step(on_exception="reattempt", max_reattempts=5)
    def send_welcome(self):
        refused_before = self.execution_history.where(StepExecution.outcome == "reattempted").exists()
        if self.hero.email.endswith("@example.net") and not refused_before:
            raise GreylistedError(f"451 {self.hero.email}: try again later")
        self.send("Welcome", f"your {self.hero.plan} plan is ready.")

    @step(wait=days(2), skip_if=lambda self: self.hero.status == "unsubscribed")
    def send_reminder(self):
        self.send("Have you looked around?", "there is a tour of five minutes for you.")

    @step(wait=days(5))
    def send_farewell(self):
        self.send("All set", "this was the last mail of your first week.")

    def send(self, subject, text):
        message = EmailMessage()
        message["Message-ID"] = f"<{self.idempotency_key}@signup.example.com>"
        message["Date"] = localtime()
        message["From"] = "Sign-up <hello@example.com>"
        message["To"] = Address(self.hero.name, addr_spec=self.hero.email)
        message["Subject"] = subject
        message.set_content(f"Dear {self.hero.name},\n\n{text}\n")
        deliver(message, self.idempotency_key)


def deliver(message: EmailMessage, key: str) -> None:
    """Put a message into the maildir under its key, unless it is there.

    A process can die between a step's effect and its record; then the step runs again. Its idempotency key is the same
    in every attempt: that is what makes one mail of them.
    """
    if any(args.maildir.glob(f"cur/{key}*")):  # where mail programs move what was read
        return
    with NamedTemporaryFile(dir=args.maildir / "tmp") as draft, suppress(FileExistsError):
        draft.write(message.as_bytes())
        draft.flush()
        os.link(draft.name, args.maildir / "new" / key)  # fails if it exists, also where two deliver at once


def read_people(path: Path) -> list[dict[str, str]]:
    """Read the whole file; its first malformed row ends the program, naming file and line."""
    # surrogateescape: bytes that are not UTF-8 then fail the patterns, in the row where they stand.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            if rows.fieldnames != list(COLUMNS):
                raise ValueError(f"the first line must be {','.join(COLUMNS)}")
            return [checked(row) for row in rows]
        except (ValueError, csv.Error) as error:
            sys.exit(f"{path}:{rows.line_num or 1}: {error}")


def checked(row: dict[str, str]) -> dict[str, str]:
    """Return the row as it is to be stored.

    :raises ValueError: if it is malformed.
    """
    if None in row or None in row.values():
        raise ValueError(f"there must be {len(COLUMNS)} fields: {','.join(COLUMNS)}")
    for column, pattern in COLUMNS.items():
        if not re.fullmatch(pattern, row[column]):
            raise ValueError(f"{row[column]!r} is not a valid {column}: it must match {pattern}")
    return row | {"email": row["email"].lower()}


def start_workflows(people: list[dict[str, str]]) -> int:
    """Import who is new and start their workflows, in one transaction: a kill leaves both behind, or neither.

    Nothing is started for those who were there before: their workflows may be over.
    """
    with db.atomic("IMMEDIATE"):
        newest = Person.select(fn.max(Person.id)).scalar() or 0
        for batch in chunked(people, 1000):
            Person.insert_many(batch).on_conflict_ignore().execute()
        return Signup.create_many(Person.select().where(Person.id > newest))


def counts() -> str:
    query = Signup.select(Workflow.state, fn.count(Workflow.id)).group_by(Workflow.state).tuples()
    states = ", ".join(f"{count} {state}" for state, count in query)
    return f"{len(mailbox.Maildir(args.maildir))} mails, workflows: {states or 'none'}"


def progress() -> tuple[str, str, datetime | None]:
    """How far all is, which step comes next, and when that is due."""
    over, all_in_all = Signup.select().where(Workflow.state.in_(["finished", "canceled"])), Signup.select().count()
    following = StepExecution.select().where(StepExecution.state == "scheduled").order_by(StepExecution.scheduled_for)
    first = following.first()
    done = f"{len(mailbox.Maildir(args.maildir))} mails, {over.count()} of {all_in_all} workflows are over"
    return done, first.step_name if first else "the end", first and first.scheduled_for


def until(due: datetime | None) -> str:
    seconds = (due - drive.clock()).total_seconds() if due else 0
    return "now" if seconds < 1 else f"in {seconds:.0f} s" if seconds < 100 else f"in {timedelta(seconds=int(seconds))}"


def run() -> None:
    """Work until all is over, showing a line that is redrawn on a terminal, and elsewhere printed now and then."""
    on_terminal, started, next_look, next_line = sys.stdout.isatty(), time.monotonic(), 0.0, 0.0
    done = step_name = shown = ""
    due: datetime | None = None

    def look() -> bool:
        nonlocal next_look, next_line, done, step_name, due, shown
        now = time.monotonic()
        if now >= next_look:
            next_look = now + 1
            drive.housekeeping()  # by itself it runs at the start and every minute: too seldom for this play
            done, step_name, due = progress()
        line = f"{now - started:6.1f} s  {done}; next: {step_name} {until(due)}"
        if on_terminal:
            print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", flush=True)
        elif done != shown or now >= next_line:
            next_line, shown = now + 5, done
            print(line, flush=True)
        return drive.is_idle()

    drive.run(workers=4, until=look)
    if on_terminal:
        print()
    print(f"{time.monotonic() - started:6.1f} s  {counts()}")


def print_histories() -> None:
    """Show the executions of some workflows: of each outcome, the first one that had it."""
    some = StepExecution.select(fn.min(StepExecution.workflow)).group_by(StepExecution.outcome)
    line = "{:<22} {:<14} {:<11} {:<12} {:>7} {:>7}".format
    print("\n" + line("person", "step", "state", "outcome", "due", "begun"))
    for workflow in Signup.select().where(Workflow.id.in_(some)):
        for each in workflow.execution_history:
            moments = (each.scheduled_for, each.started_at)
            times = [at and f"{(at - workflow.created_at).total_seconds():.1f}" for at in moments]
            columns = [workflow.hero.name, each.step_name, each.state, each.outcome, *times]
            print(line(*(column or "" for column in columns)).rstrip())
            if each.error_message:
                print(f"    {each.error_message}")


def main() -> None:
    people = read_people(args.people)
    mailbox.Maildir(args.maildir)  # makes it
    drive.create_tables([Person])
    print(f"{args.people}: {len(people)} rows, {start_workflows(people)} new people", flush=True)
    if drive.is_idle():
        print(f"nothing left to do: {counts()}")
    else:
        run()
    print_histories()
    if not drive.is_idle():
        print("\nstopped before the end: start it again to go on")
    print(f"\nThe mails are in {args.maildir.resolve() / 'new'}, a file each.")


if __name__ == "__main__":
    try:
        main()
    except (OSError, DatabaseError, KeyboardInterrupt) as error:
        sys.exit(f"signup.py: {str(error) or 'interrupted'}")
