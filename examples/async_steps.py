"""Asynchronous steps: a body may be an `async def`, for many calls at once to the outside.

    python examples/async_steps.py

Three shops are asked for their price at the same time. One that is too slow has the step reattempted.
"""

import asyncio

from peewee import CharField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

SHOPS = {"Alder": (12, 0.3), "Birch": (9, 0.2), "Cedar": (11, 0.6)}  # their prices, and how long they take to tell

db = SqliteDatabase("async_steps.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


class Wish(Model):
    article = CharField()

    class Meta:
        database = db


async def ask(shop):
    price, seconds = SHOPS[shop]
    await asyncio.sleep(seconds)  # where an application would call the shop with httpx or aiohttp
    return price


class Purchase(Workflow):
    @step
    async def compare(self):
        patience = 0.4 * self.execution_history.count()  # more with each attempt
        try:
            prices = await asyncio.wait_for(asyncio.gather(*map(ask, SHOPS)), patience)
        except asyncio.TimeoutError:
            print(f"some shop takes more than {patience} s")
            self.reattempt()
        # Peewee's queries block the event loop: better in a step of their own, or when all calls are done.
        self.context["prices"] = dict(zip(SHOPS, prices))

    @step
    def buy(self):
        shop, price = min(self.context["prices"].items(), key=lambda offer: offer[1])
        print(f"bought {self.hero.article} from {shop} for {price}")


if __name__ == "__main__":
    drive.create_tables([Wish])
    Purchase.create(hero=Wish.create(article="a lamp"))
    drive.run(until=lambda: not Purchase.ongoing().exists())
