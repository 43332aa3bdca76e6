"""A workflow that waits for a human: it pauses, without occupying anything, until somebody decides.

    python examples/approval.py

Answer y or n. End the input (Ctrl-D) and start it again, next week if you like: what was not decided still waits.
"""

from peewee import BooleanField, CharField, IntegerField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

db = SqliteDatabase("approval.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


class Expense(Model):
    what = CharField()
    euros = IntegerField()
    approved = BooleanField(default=False)

    class Meta:
        database = db


class Reimbursement(Workflow):
    @step(skip_if=lambda self: self.hero.euros < 50)
    def get_approval(self):
        if not self.hero.approved:
            self.pause()  # resume() runs this step again

    @step
    def pay(self):
        print(f"paid {self.hero.euros} euros for {self.hero.what}")


def run():
    drive.run(until=drive.is_idle)


def decide(workflow):
    expense = workflow.hero
    answer = input(f"{expense.euros} euros for {expense.what}, approved? [y/n] ")
    if answer == "y":
        with db.atomic():  # both, or neither
            Expense.update(approved=True).where(Expense.id == expense.id).execute()
            workflow.resume()
    elif answer == "n":
        workflow.cancel()


if __name__ == "__main__":
    drive.create_tables([Expense])
    if not Expense.select().exists():
        for what, euros in {"a pencil": 2, "a chair": 300, "a yacht": 2_000_000}.items():
            Reimbursement.create(hero=Expense.create(what=what, euros=euros))
    run()
    try:
        for reimbursement in Reimbursement.paused():
            decide(reimbursement)
    except EOFError:
        print("later, then")
    run()
    for reimbursement in Reimbursement.select():
        print(f"{reimbursement.hero.what}: {reimbursement.state}")
