"""Error tracking, as Sentry and its like do it: who is told of which errors, and what there is to tell.

    python examples/error_tracking.py

An error that leads to another attempt is no news. One that pauses or cancels a workflow leaves the Huey task, and so
reaches whatever listens to Huey's SIGNAL_ERROR. A policy with `report="always"` or `report="never"` says otherwise.
"""

import logging

from huey.signals import SIGNAL_ERROR
from peewee import CharField, Model, SqliteDatabase

from geneva_drive import ExceptionPolicy, GenevaDrive, StepExecution, Workflow, step

logging.getLogger("huey").addHandler(logging.NullHandler())  # it would show the same errors once more

db = SqliteDatabase("error_tracking.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


class Customer(Model):
    name = CharField()

    class Meta:
        database = db


class Import(Workflow):
    @step(on_exception="reattempt")
    def fetch(self):
        if self.execution_history.count() == 1:
            raise ConnectionError("the server is busy")

    @step(on_exception=ExceptionPolicy("skip", report="always"))
    def guess_language(self):
        raise LookupError("no dictionary")

    @step(on_exception=ExceptionPolicy("cancel", matching=PermissionError, report="never"))
    def convert(self):
        if self.hero.name == "Bob":
            raise PermissionError("Bob has withdrawn his consent")
        return len(self.hero.name) / 0


@drive.huey.signal(SIGNAL_ERROR)
def capture(signal, task, error):
    """Here an application would call `sentry_sdk.capture_exception(error)`, within a scope that has these tags."""
    # One task may perform several steps in a row: the last of them is the one that failed.
    execution = (
        StepExecution.select().where(StepExecution.job_id == task.id).order_by(StepExecution.number.desc()).get()
    )
    workflow = execution.workflow
    tags = {"workflow": workflow.type, "id": workflow.id, "step": execution.step_name, "state": workflow.state}
    print(f"captured {error!r} {tags}", flush=True)


if __name__ == "__main__":
    drive.create_tables([Customer])
    for name in ("Ada", "Bob"):
        Import.create(hero=Customer.create(name=name))
    drive.run(until=drive.is_idle)
    print("The tables have them all:")
    for failed in StepExecution.select().where(StepExecution.error_message.is_null(False)):
        print(f"{failed.step_name}: {failed.outcome}, {failed.error_class_name}: {failed.error_message}")
