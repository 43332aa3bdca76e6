"""The unit tests of a workflow: no consumer, no waiting for waits, nothing left in the database.

python examples/test_trial.py        # or: pytest examples/test_trial.py
"""

import unittest
from datetime import datetime, timedelta, timezone

from peewee import BooleanField, CharField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, StepExecution, TestHelpers, Workflow, cancel_if, step

db = SqliteDatabase(":memory:")
drive = GenevaDrive(db)
outbox = []


class Customer(Model):
    email = CharField()
    has_paid = BooleanField(default=False)

    class Meta:
        database = db


class Trial(Workflow):
    @cancel_if
    def customer_has_paid(self):
        return self.hero.has_paid

    @step(on_exception="reattempt")
    def welcome(self):
        if "@" not in self.hero.email:
            raise ValueError(f"not an address: {self.hero.email}")
        outbox.append("welcome")

    @step(wait=timedelta(days=14))
    def ask_for_money(self):
        outbox.append("money, please")


class TrialTest(TestHelpers, unittest.TestCase):
    def setUp(self):
        drive.create_tables([Customer])
        db.session_start()  # a transaction around each test
        self.addCleanup(db.session_rollback)
        self.now = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
        drive.clock = lambda: self.now
        outbox.clear()
        self.customer = Customer.create(email="ada@example.com")
        self.trial = Trial.create(hero=self.customer)

    def test_a_trial_ends_with_a_request_for_money(self):
        self.speedrun_workflow(self.trial)
        self.assert_workflow_state(self.trial, "finished")
        self.assertEqual(outbox, ["welcome", "money, please"])

    def test_the_request_comes_after_two_weeks(self):
        self.perform_next_step(self.trial)
        request = self.trial.execution_history.where(StepExecution.state == "scheduled").get()
        self.assertEqual((request.step_name, request.scheduled_for), ("ask_for_money", self.now + timedelta(days=14)))

    def test_who_pays_is_not_asked(self):
        self.perform_next_step(self.trial)
        Customer.update(has_paid=True).execute()
        self.speedrun_workflow(self.trial)
        self.assert_workflow_state(self.trial, "canceled")
        self.assertEqual(outbox, ["welcome"])

    def test_a_welcome_that_fails_is_tried_again(self):
        Customer.update(email="oops").execute()
        self.perform_next_step(self.trial)
        self.assert_step_executed(self.trial, "welcome", state="failed")
        self.assertEqual((self.trial.state, self.trial.current_step_name), ("ready", "welcome"))


if __name__ == "__main__":
    unittest.main()
