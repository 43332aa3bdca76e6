"""Polling another system: several steps from one body, with growing waits between them.

    python examples/polling.py

Three exports are ordered from a slow service and asked for until they are ready; the last one never is. To ask at even
intervals for as long as it takes, one step that calls `self.reattempt(wait=60)` will do.
"""

import time

from peewee import CharField, FloatField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

db = SqliteDatabase("polling.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


class Export(Model):
    what = CharField()
    seconds = FloatField()  # that the service takes for it
    ordered_at = FloatField(null=True)

    class Meta:
        database = db


class FetchExport(Workflow):
    @step
    def order(self):
        # Only where it was not ordered yet: an attempt that is repeated after a crash must not order a second time.
        Export.update(ordered_at=time.time()).where(Export.id == self.hero.id, Export.ordered_at.is_null()).execute()

    polling = [step("check"), *(step("check", wait=seconds) for seconds in (0.5, 1, 2))]

    def check(self):
        if time.time() < self.hero.ordered_at + self.hero.seconds:
            print(f"{self.current_step_name}: the {self.hero.what} is not ready")
            return
        print(f"{self.current_step_name}: the {self.hero.what} is here")
        self.finish()

    @step
    def give_up(self):
        print(f"{self.current_step_name}: the {self.hero.what} does not come")
        self.cancel()


if __name__ == "__main__":
    drive.create_tables([Export])
    for what, seconds in {"list of customers": 0, "balance sheet": 2, "last word": 1_000_000}.items():
        FetchExport.create(hero=Export.create(what=what, seconds=seconds))
    drive.run(until=lambda: not FetchExport.ongoing().exists())
    for fetch in FetchExport.select():
        print(f"{fetch.hero.what}: {fetch.state} after {fetch.execution_history.count()} steps")
