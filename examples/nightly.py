"""Work that recurs: each night the takings of the day before are counted, once, whatever happens to the consumers.

    python examples/nightly.py

The program sets the clock, so that nights pass in seconds; two consumers look at the same moment. What this avoids:

- A periodic task of Huey's or a line in each host's crontab: it runs once for each of them, and a night that nobody
  was there for is lost.
- `datetime.now()` in the body: a run that is repeated in the morning, or is late, would count another day.
- `crontab(hour="2")` without a minute: that is each minute from two to three.
- UTC where people mean the clock on their wall, and a wall clock that shows half past two twice, or never.
"""

from datetime import date, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

from huey import crontab
from peewee import DateField, IntegerField, Model, SqliteDatabase, fn

from geneva_drive import GenevaDrive, Workflow, step

db = SqliteDatabase("nightly.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


class Sale(Model):
    day = DateField()
    euros = IntegerField()

    class Meta:
        database = db


class CountTakings(Workflow):
    may_proceed_without_hero = True
    recurs = crontab(minute="30", hour="2")
    recurrence_timezone = "Europe/Berlin"
    recurrence_catch_up = timedelta(hours=6)  # a missed night is counted until half past eight
    delete_completed_after = timedelta(days=400)  # whatever the drive does with other workflows

    @step(on_exception="reattempt")
    def count(self):
        day = self.occurs_at.astimezone(ZoneInfo(self.recurrence_timezone)).date() - timedelta(days=1)
        euros = Sale.select(fn.SUM(Sale.euros)).where(Sale.day == day).scalar()
        self.context.update(day=str(day), euros=euros or 0)

    @step
    def tell(self):
        print(f"{self.context['day']}: {self.context['euros']} euros, counted for {self.occurs_at:%H:%M} UTC")


def pass_to(what, *moment):
    """Let it be a moment in UTC, at which two consumers look for what recurs, and one performs it."""
    now = datetime(*moment, tzinfo=timezone.utc)
    drive.clock = lambda: now
    print(f"-- {what}: {now:%Y-%m-%d %H:%M} UTC")
    for _ in range(2):
        drive.housekeeping()
    drive.run(until=drive.is_idle)


if __name__ == "__main__":
    drive.create_tables([Sale])
    if not Sale.select().exists():
        days = [date(2026, 3, day) for day in (27, 28, 29)] + [date(2026, 10, 24)]
        Sale.insert_many([{"day": day, "euros": 100 + number} for number, day in enumerate(days)]).execute()
    pass_to("half past two in Berlin", 2026, 3, 28, 1, 30)
    pass_to("half past two is left out in Berlin tonight", 2026, 3, 29, 1, 30)
    pass_to("nobody was there at half past two", 2026, 3, 30, 5, 0)
    pass_to("nobody was there until noon: too late", 2026, 3, 31, 10, 0)
    pass_to("half past two", 2026, 10, 25, 0, 30)
    pass_to("half past two again, an hour later", 2026, 10, 25, 1, 30)
    print(f"{CountTakings.finished().count()} nights were counted")
