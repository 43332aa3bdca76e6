"""The queue in Redis, the workflows in the database: Redis may lose everything, and no workflow is lost with it.

    pip install redis
    REDIS_URL=redis://127.0.0.1:6379/0 python examples/redis_queue.py

Huey's messages are pickles. The signature keeps others, who can write to that Redis, from having their code run here.
"""

import os
import time

from huey import RedisHuey
from huey.serializer import SignedSerializer
from peewee import CharField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

db = SqliteDatabase("redis_queue.db", pragmas={"journal_mode": "wal"}, timeout=10)
huey = RedisHuey(
    "redis_queue",
    url=os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"),
    results=False,  # nobody asks for them; the tables have what came of each step
    serializer=SignedSerializer(secret=os.environ.get("QUEUE_SECRET", "only for this example")),
)
drive = GenevaDrive(db, huey, stuck_scheduled_threshold=1)  # a minute is the default


class Parcel(Model):
    address = CharField()

    class Meta:
        database = db


class Delivery(Workflow):
    @step
    def pack(self):
        print(f"{self.hero.address}: packed")

    @step(wait=1)
    def hand_over(self):
        print(f"{self.hero.address}: handed over")


if __name__ == "__main__":
    drive.create_tables([Parcel])
    with db.atomic():
        for address in ("Geneva", "Lausanne", "Bern"):
            Delivery.create(hero=Parcel.create(address=address))
        print(f"before the commit: {len(huey)} messages in Redis")
    print(f"after the commit: {len(huey)} messages")
    huey.flush()
    print(f"after an accident: {len(huey)} messages")
    time.sleep(1.1)
    # A consumer looks for lost messages as it starts, and every minute.
    drive.run(until=lambda: not Delivery.ongoing().exists())
    print(f"{Delivery.finished().count()} deliveries are finished")
