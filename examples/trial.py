"""Trials that end at a date of the hero's, which is moved while they wait.

    python examples/trial.py

The library calls the step's wait when the workflow reaches the step, and again at the time that it returned. If the
trial was prolonged meanwhile, the step waits until the new end. If it was shortened, reschedule() tells the workflow.
Seconds stand for days here.
"""

import time
from datetime import datetime, timedelta, timezone

from peewee import CharField, DateTimeField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, cancel_if, step

db = SqliteDatabase("trial.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


def now():
    return datetime.now(timezone.utc).replace(tzinfo=None)  # as SQLite keeps it


class Customer(Model):
    name = CharField()
    trial_ends_at = DateTimeField(null=True)

    class Meta:
        database = db


class Trial(Workflow):
    @cancel_if
    def customer_has_left(self):  # asked before the wait, and again when it is over
        return self.hero.name.startswith("(left)")

    @step
    def welcome(self):
        print(f"{self.hero.name}: welcome")

    # Not `wait=timedelta(days=14)`, nor a date that is kept in the context: neither would follow the hero's.
    @step(wait="end_of_trial")
    def bill(self):
        late = (now() - self.hero.trial_ends_at).total_seconds()
        print(f"{self.hero.name}: billed {'at' if 0 <= late < 0.5 else f'{late:.1f} s after'} the end of the trial")

    def end_of_trial(self):
        if self.hero.trial_ends_at is None:
            # Not `return None`, which means no wait: the bill would be sent at once.
            self.pause(reason="nobody has said when the trial ends")
        # Not the naive datetime that the database gives, which is refused: it could be any time zone's.
        return self.hero.trial_ends_at.replace(tzinfo=timezone.utc)


def run(seconds):
    end = time.monotonic() + seconds
    drive.run(until=lambda: time.monotonic() > end or drive.is_idle())


if __name__ == "__main__":
    drive.create_tables([Customer])
    ends = {"Ada": 3, "Bob": 3, "Cleo": 900, "Dan": None, "Eve": 3}
    for name, days in ends.items():
        Customer.create(name=name, trial_ends_at=days and now() + timedelta(seconds=days))
    Trial.create_many(Customer.select())
    run(1.5)
    bob, cleo, dan, eve = (Customer.get(name=name) for name in ("Bob", "Cleo", "Dan", "Eve"))
    Customer.update(trial_ends_at=bob.trial_ends_at + timedelta(seconds=1)).where(Customer.id == bob.id).execute()
    Customer.update(name="(left) Eve").where(Customer.id == eve.id).execute()
    Customer.update(trial_ends_at=now()).where(Customer.id.in_([cleo.id, dan.id])).execute()
    Trial.for_hero(cleo).get().reschedule()  # earlier than it has said: it is to be asked anew
    Trial.for_hero(dan).get().resume(reason="it ends today")
    run(60)
    for trial in Trial.select().order_by(Trial.id):
        print(f"{trial.hero.name}: {trial.state}{f', {trial.reason}' if trial.reason else ''}")
