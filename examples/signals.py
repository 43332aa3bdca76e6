"""Orders that wait for the payment provider to call: the signal may come early, twice, or never.

python examples/signals.py
"""

from peewee import CharField, IntegerField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, InvalidStateError, Workflow, step

db = SqliteDatabase("signals.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


class Order(Model):
    what = CharField()
    euros = IntegerField()

    class Meta:
        database = db


class Delivery(Workflow):
    @step(wait_for="paid", matching=lambda payment: payment["euros"] > 0, timeout=1, on_timeout="cancel")
    def check_the_payment(self):
        missing = self.hero.euros - self.signal_payload["euros"]
        if missing > 0:
            print(f"{self.hero.what}: {missing} euros are missing")
            self.pause()  # resume() finds the same signal

    @step
    def send(self):
        print(f"{self.hero.what}: sent")


def webhook(event):
    """What a web application does when the provider calls; it answers with this."""
    try:
        order = Order.get_by_id(event["order"])
        is_new = Delivery.signal_hero(order, "paid", {"euros": event["euros"]}, idempotency_key=event["id"])
    except InvalidStateError:
        return f"{event['id']}: the order is closed, give the money back"
    return f"{event['id']}: {'thank you' if is_new else 'we know'}"


if __name__ == "__main__":
    drive.create_tables([Order])
    chair, desk, lamp = [
        Order.create(what=what, euros=euros) for what, euros in (("chair", 80), ("desk", 300), ("lamp", 40))
    ]
    Delivery.create_many([chair, desk, lamp])
    print(webhook({"id": "event 1", "order": chair.id, "euros": 80}))
    print(webhook({"id": "event 1", "order": chair.id, "euros": 80}))  # the provider did not hear the answer
    print(webhook({"id": "event 2", "order": desk.id, "euros": 0}))  # a test of theirs, which is for no step
    print(webhook({"id": "event 3", "order": desk.id, "euros": 200}))
    drive.run(until=drive.is_idle)
    print(webhook({"id": "event 4", "order": lamp.id, "euros": 40}))  # after its second had passed
    for delivery in Delivery.select().order_by(Workflow.id):
        print(f"{delivery.hero.what}: {delivery.state}")
