"""Several queues with priorities: mass mailings keep nobody waiting, an urgent letter goes before the ordinary ones.

    python examples/priorities.py

Each queue has workers of its own: here threads of one process, elsewhere consumers on hosts of their own, started with
`huey_consumer app.huey` and `huey_consumer app.bulk`, where `bulk = drive.queues["bulk"]`.
"""

import time

from peewee import CharField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

db = SqliteDatabase("priorities.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db, queues=["bulk"])  # beside the default one


class Letter(Model):
    text = CharField()

    class Meta:
        database = db


class Send(Workflow):
    @step
    def write(self):
        time.sleep(0.1)
        print(f"written: {self.hero.text}\n", end="", flush=True)  # in one piece, for two workers print

    @step(options={"priority": 100})  # what is written goes out before anything else is begun
    def post(self):
        print(f"posted: {self.hero.text}\n", end="", flush=True)


class Mailing(Send):
    step_options = {"queue": "bulk"}


if __name__ == "__main__":
    drive.create_tables([Letter])
    with db.atomic():
        Mailing.create_many([Letter.create(text=f"offer {number}") for number in range(20)])
        Send.create(hero=Letter.create(text="an ordinary letter"))
        Send.create(hero=Letter.create(text="another one"))
        Send.create(hero=Letter.create(text="an urgent letter"), options={"priority": 10})
    drive.run(workers=1, until=lambda: not Send.ongoing().exists())  # a worker for each queue; Mailing is a Send
