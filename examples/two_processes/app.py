"""Orders that one process takes and another one handles; see README.md for the commands.

`python app.py` runs this file as `__main__`, `huey_consumer app.huey` imports it as `app`: the workflows are the same.
"""

import logging
import os
import sys
import time
from collections import Counter

from huey import RedisHuey
from peewee import CharField, IntegerField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

logging.getLogger("geneva_drive").addHandler(logging.StreamHandler())  # its warnings: what failed, what was healed

REDIS_URL = os.environ.get("REDIS_URL")

db = SqliteDatabase("orders.db", pragmas={"journal_mode": "wal"}, timeout=10)
# Without a Huey of its own, the drive keeps its queue in the database.
queue = RedisHuey("orders", url=REDIS_URL, results=False) if REDIS_URL else None
drive = GenevaDrive(db, queue, stuck_in_progress_threshold=10, stuck_scheduled_threshold=10)
huey = drive.huey


class Order(Model):
    article = CharField()
    charged_by = IntegerField(null=True)
    shipped_by = IntegerField(null=True)

    class Meta:
        database = db


class Fulfilment(Workflow):
    @step
    def charge(self):
        self.note("charged", charged_by=os.getpid())

    @step(wait=3)
    def ship(self):
        self.note("shipped", shipped_by=os.getpid())

    def note(self, done, **columns):
        Order.update(**columns).where(Order.id == self.hero.id).execute()
        print(f"process {os.getpid()} {done} {self.hero.article}", flush=True)


# Whichever process comes first makes the tables; any number of them may do it at once.
with db.connection_context():
    drive.create_tables([Order])


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with db.atomic():  # the orders and their workflows, or none of them
        for number in range(1, count + 1):
            Fulfilment.create(hero=Order.create(article=f"book {number}"))
    print(f"process {os.getpid()} took {count} orders; it works on none of them and only looks on")
    while Fulfilment.ongoing().exists():
        print(dict(Counter(workflow.state for workflow in Fulfilment.select())), flush=True)
        time.sleep(1)
    print("all orders are shipped")


if __name__ == "__main__":
    main()
