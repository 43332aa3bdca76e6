"""Payments that take every turn a workflow can take: conditions, policies, flow control from inside and from outside.

    python examples/payment.py

An order's story is what happens to it: the gateway's answers, for the most part. The output tells how each story ends.
"""

from peewee import CharField, Model, SqliteDatabase

from geneva_drive import ExceptionPolicy, GenevaDrive, Workflow, cancel_if, on_exception, step

STORIES = ["paid", "pending, paid", "suspicious, paid", "stolen card", "voucher", "charged before"]
STORIES += ["unreachable, paid", "unreachable, unreachable, unreachable, paid", "rate limit, paid"]
STORIES += ["free", "withdrawn", "skipped by hand", "canceled by hand", "paused by hand"]

db = SqliteDatabase("payment.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


class Order(Model):
    story = CharField()

    class Meta:
        database = db


class Payment(Workflow):
    # A gateway that cannot be reached is asked twice again; then the workflow pauses, without an error in the log.
    exception_policies = [
        ExceptionPolicy("reattempt", matching=ConnectionError, wait=0.1, max_reattempts=2, report="never")
    ]

    @cancel_if
    def order_withdrawn(self):
        return self.hero.story == "withdrawn"

    @on_exception(TimeoutError)
    def wait_as_told(self, error):
        self.reattempt(wait=error.args[0])

    @step(skip_if=lambda self: self.hero.story == "free")
    def charge(self):
        answers = self.hero.story.split(", ")
        answer = answers[min(self.execution_history.count(), len(answers)) - 1]
        if answer == "unreachable":
            raise ConnectionError
        if answer == "rate limit":
            raise TimeoutError(0.1)
        turns = {  # each ends the body at once
            "pending": self.reattempt,  # or reattempt(wait=60), in a minute
            "suspicious": self.pause,  # until somebody has looked at it; then this step runs again
            "stolen card": self.cancel,
            "voucher": self.skip,  # nothing to charge, but the receipt is due
            "charged before": self.finish,  # nothing is due
        }
        if answer in turns:
            turns[answer]()

    @step(wait=0.1)
    def send_receipt(self):
        pass


if __name__ == "__main__":
    drive.create_tables([Order])
    payments = {story: Payment.create(hero=Order.create(story=story)) for story in STORIES}
    payments["skipped by hand"].skip()
    payments["canceled by hand"].cancel()
    payments["paused by hand"].pause()
    for moment in ("before", "after"):
        drive.run(workers=2, until=drive.is_idle)
        print(f"{moment} somebody looks at what is paused: {Payment.paused().count()} payments")
        for payment in Payment.paused():
            payment.resume()
    for payment in Payment.select():
        attempts = [f"{each.step_name} {each.outcome}" for each in payment.execution_history]
        print(f"{payment.hero.story}: {payment.state}; {', '.join(attempts)}")
