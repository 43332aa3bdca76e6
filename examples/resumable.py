"""A step of a thousand parts that may be interrupted anywhere: it goes on where it was, not at the start.

    python examples/resumable.py

Letters go out to 1,000 readers, and their copies are booked in batches. The program is killed in the midst of each of
the two steps, and started again; press Ctrl+C, if you like, and start it again yourself.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from peewee import CharField, IntegerField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, StepExecution, Workflow, step

db = SqliteDatabase("resumable.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)
LETTERS = Path("letters.txt")


class Issue(Model):
    title = CharField()
    booked = IntegerField(default=0)

    class Meta:
        database = db


class Reader(Model):
    email = CharField()

    class Meta:
        database = db


class Mailing(Workflow):
    @step(resumable=True)
    def send(self):
        with LETTERS.open("a", buffering=1) as letters:
            # After every 50 readers the key of the last one is kept; a kill in between repeats fewer than 50 letters.
            for reader in self.resume_over(Reader.select(), key=Reader.id, every=50):
                letters.write(f"{reader.email}\n")
                if reader.id == int(os.environ.get("DIE_AT", 0)):
                    os.kill(os.getpid(), 9)

    @step(resumable=True)
    def book(self):
        # By hand: what is written and the cursor are one commit, so that no copy is booked twice.
        for booked in range(self.cursor or 0, 1000, 50):
            with db.atomic():
                Issue.update(booked=Issue.booked + 50).where(Issue.id == self.hero.id).execute()
                self.checkpoint(booked + 50)
            if booked == -int(os.environ.get("DIE_AT", 0)):
                os.kill(os.getpid(), 9)


if __name__ == "__main__":
    if "DIE_AT" not in os.environ:
        drive.create_tables([Issue, Reader])
        if not Issue.select().exists():
            Reader.insert_many([{"email": f"reader{number}@example.com"} for number in range(1000)]).execute()
            Mailing.create(hero=Issue.create(title="Spring"))
        for place in (333, 777, -500):
            subprocess.call([sys.executable, __file__], env={**os.environ, "DIE_AT": str(place)})
    drive.run(until=drive.is_idle)
    for attempt in StepExecution.select().order_by(StepExecution.id):
        print(f"{attempt.step_name}: {attempt.outcome} at {attempt.cursor}")
    times = Counter(Counter(LETTERS.read_text().split()).values())
    print(f"{times.total()} readers got a letter, {times[2]} of them two; {Issue.get().booked} copies are booked")
