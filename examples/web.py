"""A web application that starts workflows and shows how they stand, and the consumer that runs them.

    pip install bottle
    cd examples
    huey_consumer web.huey -w 2                   # terminal 1
    python web.py                                 # terminal 2; `python web.py 8081` for another port
    curl -d email=ada@example.com http://127.0.0.1:8080/signups
    curl http://127.0.0.1:8080/signups/1

Signing up again while the first workflow is ongoing gives no second one: the answer is the first one's.
"""

import sys

import bottle
from peewee import CharField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

db = SqliteDatabase("web.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)
huey = drive.huey  # for the consumer
app = bottle.Bottle()


class User(Model):
    email = CharField(unique=True)

    class Meta:
        database = db


class Signup(Workflow):
    @step
    def send_welcome(self):
        print("welcome,", self.hero.email, flush=True)

    @step(wait=2)
    def send_reminder(self):
        print("still there,", self.hero.email, flush=True)


# Whichever process comes first makes the tables.
with db.connection_context():
    drive.create_tables([User])

app.add_hook("before_request", db.connect)  # a connection for each request, as Peewee advises
app.add_hook("after_request", db.close)


@app.post("/signups")
def sign_up():
    email = bottle.request.forms.email or bottle.abort(400, "there is no email in the form")
    with db.atomic("IMMEDIATE"):  # user and workflow, or neither; for the write lock, before it reads anything
        user, _ = User.get_or_create(email=email)
        signup, is_new = Signup.get_or_create(hero=user)
    bottle.response.status = 201 if is_new else 200
    return describe(signup)


@app.get("/signups/<signup_id:int>")
def show(signup_id):
    signup = Signup.get_or_none(Workflow.id == signup_id)
    return describe(signup) if signup else bottle.HTTPError(404, "there is no such sign-up")


def describe(signup):
    """Bottle makes JSON of it."""
    done = [each.step_name for each in signup.execution_history if each.outcome == "success"]
    return {"id": signup.id, "email": signup.hero.email, "state": signup.state, "done": done}


if __name__ == "__main__":
    app.run(host="127.0.0.1", port=int(sys.argv[1]) if sys.argv[1:] else 8080)
