"""A newsletter in parts: one child for each reader, and a step that waits until all of them are done.

    python examples/fan_out.py

What it avoids:
- A body that starts the children may run again, after a crash or an error: here it fails at its end. In a plain step,
  some readers would get a second letter: get_or_create() finds a child that is ongoing, not one that is over. In a
  transactional step all children are created in the commit that records the step, or none.
- A step that asks again and again whether all are done, or a last child that has to find out that it is the last: the
  end of the last one wakes the parent, in the same commit, whichever two end at once.
- A child that fails for good and holds up the rest for ever: the wait has a timeout, and what is late is canceled.
"""

from datetime import timedelta

from peewee import CharField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

db = SqliteDatabase("fan_out.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


class Issue(Model):
    title = CharField()

    class Meta:
        database = db


class Reader(Model):
    email = CharField()

    class Meta:
        database = db


failures = [ConnectionError("the mail server is away")]


class Letter(Workflow):
    @step
    def send(self):
        if "@" not in self.hero.email:
            self.pause()  # for somebody who knows the address
        print(f"{self.hero.email}: sent")


class Newsletter(Workflow):
    @step(transactional=True, on_exception="reattempt")
    def begin_the_letters(self):
        print(f"{self.hero.title}: {Letter.create_many(Reader.select(), parent=self)} letters")
        if failures:
            raise failures.pop()

    @step(wait_for_children=True, timeout=timedelta(seconds=4), on_timeout="run")
    def count_the_letters(self):
        sent, late = self.children.where(Workflow.state == "finished"), self.children.where(Workflow.state == "paused")
        print(f"{self.hero.title}: {sent.count()} sent, {late.count()} late")
        if late.exists():
            self.cancel(children=True)  # what is late; the others are over


if __name__ == "__main__":
    drive.create_tables([Issue, Reader])
    for email in ("ada@example.com", "bob@example.com", "cyd", "dan@example.com"):
        Reader.create(email=email)
    newsletter = Newsletter.create(hero=Issue.create(title="The first issue"))
    drive.run(until=drive.is_idle)
    for child in newsletter.children:
        print(f"letter to {child.hero.email}: {child.state}")
