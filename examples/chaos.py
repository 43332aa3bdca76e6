"""Processes are killed and the database is disturbed at random; then it is checked that every guarantee held.

    python examples/chaos.py [URL] [--workflows 5000] [--seconds 120] [--workers 4]

Consumers work on orders that a creator makes and a payer pays: by signals, in any order, some of them several times.
The creator, the payer, and all consumers but the first, get SIGKILL at random and are started again; connections are
dropped, or SQLite's file is locked; workflows are paused and resumed. In the end the consumer that was never killed
works off alone what is left. Exits 1 if a promise broke, 2 on wrong usage.

URL, or GENEVA_DRIVE_URL, is that of an empty database, such as postgresql://user:password@host/name. Its connections
are dropped, whoever's they are. The default is a SQLite file that is removed in the end.
"""

import argparse
import contextlib
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict

from peewee import (
    JOIN,
    CharField,
    DatabaseProxy,
    IntegerField,
    Model,
    PeeweeException,
    PostgresqlDatabase,
    SqliteDatabase,
)
from playhouse.db_url import connect

from geneva_drive import GenevaDrive, InvalidStateError, StepExecution, Workflow, WorkflowSignal, step

PATIENCE_SECONDS = 300  # with what is left when the killing is over

db = DatabaseProxy()
# Thresholds that suit a play of minutes; and no limit to recoveries, since it is not the steps that kill the processes.
drive = GenevaDrive(db, stuck_in_progress_threshold=5, stuck_scheduled_threshold=10, max_recoveries=1_000_000)


class Order(Model):
    number = IntegerField(unique=True)
    booked = IntegerField(default=0)

    class Meta:
        database = db
        table_name = "chaos_orders"


class Effect(Model):
    """A row for each time that a step did what it is there for."""

    workflow = IntegerField()
    step = CharField()

    class Meta:
        database = db
        table_name = "chaos_effects"


class Fulfilment(Workflow):
    @step
    def charge(self):
        self.leave_effect("charge")

    @step(transactional=True, wait_for="paid")
    def register(self):
        self.context["paid"] = self.signal_payload
        self.leave_effect("register")
        self.count_booking()

    @step(transactional=True)
    def book(self):
        self.leave_effect("book")
        self.count_booking()

    @step(wait=0.5, on_exception="reattempt", max_reattempts=None)
    def ship(self):
        time.sleep(random.uniform(0.005, 0.05))
        if random.random() < 0.02:
            raise RuntimeError("the carrier is closed")
        self.leave_effect("ship")
        time.sleep(random.uniform(0.005, 0.05))

    @step(transactional=True)
    def settle(self):
        self.count_booking()
        self.leave_effect("settle")

    def leave_effect(self, name):
        Effect.create(workflow=self.id, step=name)

    def count_booking(self):
        Order.update(booked=Order.booked + 1).where(Order.id == self.hero.id).execute()


STEPS = [definition.name for definition in Fulfilment.steps]
TRANSACTIONAL = [definition.name for definition in Fulfilment.steps if definition.transactional]

# ==== The processes that get killed ===================================================================================


def consume(args):
    parent = os.getppid()
    drive.run(workers=args.threads, until=lambda: os.getppid() != parent)


def create(args):
    """Make orders with their workflows, in one transaction each time, at a pace that takes most of the time."""
    parent, there = os.getppid(), Order.select().count()
    while there < args.workflows and os.getppid() == parent:
        numbers = range(there, min(there + random.choice([1, 1, 1, 20]), args.workflows))
        with db.atomic():
            Order.insert_many([{"number": number} for number in numbers]).execute()
            orders = list(Order.select().where(Order.number >= there))
            if len(orders) == 1:
                Fulfilment.create(hero=orders[0])
            else:
                Fulfilment.create_many(orders)
        there += len(orders)
        time.sleep(max(0, args.started + 0.8 * args.seconds * there / args.workflows - time.time()))


def pay(args):
    """Send each workflow its signal, as a provider does who calls again where it heard no answer."""
    parent, is_paid = os.getppid(), WorkflowSignal.name == "paid"
    unpaid = Fulfilment.select().join(WorkflowSignal, JOIN.LEFT_OUTER).where(WorkflowSignal.id.is_null())
    while WorkflowSignal.select().where(is_paid).count() < args.workflows and os.getppid() == parent:
        calls = list(unpaid.order_by(db.random()).limit(10)) + list(Fulfilment.select().order_by(db.random()).limit(2))
        for workflow in calls:
            order = workflow.hero
            Fulfilment.signal_hero(order, "paid", {"number": order.number}, idempotency_key=f"order {order.number}")
        time.sleep(0.02)


ROLES = {"consume": consume, "create": create, "pay": pay}

# ==== The chaos =======================================================================================================


OTHERS = ["create", "pay"]  # one process of each, behind the consumers


class Chaos:
    """What is done to the processes: consumers, of which the first is never killed, the creator and the payer."""

    def __init__(self, args):
        self.args, self.counts, self.paused = args, Counter(), set()
        self.processes = [self.start(role) for role in ["consume"] * args.workers + OTHERS]
        self.next_disturbance, self.next_look = time.time() + args.disturb_every, time.time()

    def start(self, role):
        passed = ("workflows", "seconds", "threads", "started", "log")
        options = [f"--{name}={getattr(self.args, name)}" for name in passed]
        command = [sys.executable, __file__, self.args.url, *options, f"--role={role}"]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def rage(self):
        """Kill, disturb and pause, until the time is over."""
        while time.time() < self.args.started + self.args.seconds:
            time.sleep(random.uniform(0, 2 * self.args.kill_every))
            place = random.randrange(1, len(self.processes))
            self.kill(place)
            if time.time() > self.next_disturbance:
                self.next_disturbance = time.time() + random.uniform(0, 2 * self.args.disturb_every)
                self.counts["disturbances"] += disturb_database()
            if place < self.args.workers:
                self.processes[place] = self.start("consume")
            self.restart_others()
            self.pause_some()
            self.look_after()

    def calm_down(self):
        """Leave the rest to the consumer that was never killed; creator and payer may come to their end too."""
        for place in range(1, self.args.workers):
            self.kill(place)
        deadline = time.time() + PATIENCE_SECONDS
        while time.time() < deadline and (self.others_go_on() or Fulfilment.ongoing().exists()):
            self.restart_others()
            self.look_after()
            time.sleep(0.5)

    def kill(self, place):
        process = self.processes[place]
        if process.poll() is None:
            process.kill()
            process.wait()
            self.counts["kills"] += 1
        elif place < self.args.workers:
            self.counts["consumers that died by themselves"] += 1

    def others_go_on(self):
        return any(process.poll() != 0 for process in self.processes[self.args.workers :])

    def restart_others(self):
        for place, role in enumerate(OTHERS, self.args.workers):
            if self.processes[place].poll():  # it was killed, or died of a connection that was dropped; 0: it is done
                self.processes[place] = self.start(role)

    def pause_some(self):
        for workflow in Fulfilment.ongoing().order_by(db.random()).limit(2):
            with contextlib.suppress(InvalidStateError):
                workflow.pause()
                self.paused.add(workflow.id)
                self.counts["pauses"] += 1

    def look_after(self):
        """What a restless operator does, every other second."""
        if time.time() < self.next_look:
            return
        self.next_look = time.time() + 2
        drive.housekeeping()  # by itself it runs every minute
        for workflow in Fulfilment.paused():
            if workflow.id in self.paused:  # any other one paused by itself, and is to be found in the end
                workflow.resume()
        states = f"{Order.select().count()} created, {Fulfilment.finished().count()} finished"
        line = f"{time.time() - self.args.started:4.0f} s: {states}, {self.counts['kills']} kills"
        on_terminal = sys.stderr.isatty()
        print(f"\r\x1b[K{line}" if on_terminal else line, end="" if on_terminal else "\n", file=sys.stderr, flush=True)

    def drain(self):
        """End the consumer that was never killed; returns its exit code."""
        self.processes[0].terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.processes[0].wait(timeout=60)
        return self.processes[0].poll()

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()


def disturb_database():
    """Drop two connections; SQLite has none: hold its write lock for a while. Returns how many of these it was."""
    if isinstance(db.obj, SqliteDatabase):
        with db.atomic("IMMEDIATE"):
            time.sleep(random.uniform(0, 2))
        return 1
    if isinstance(db.obj, PostgresqlDatabase):
        others = "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        kill = "select pg_terminate_backend({})"
    else:
        others = "select id from information_schema.processlist where db = database() and id <> connection_id()"
        kill = "kill {}"
    victims = db.execute_sql(others).fetchall()
    dropped = 0
    for (victim,) in random.sample(victims, min(2, len(victims))):
        with contextlib.suppress(PeeweeException):  # it went by itself
            db.execute_sql(kill.format(victim))
            dropped += 1
    return dropped


# ==== The promises ====================================================================================================


def audit(expected):
    """Check a database at rest, where so many workflows are expected: the numbers, and the promises that broke."""
    done, deaths, order = Counter(), Counter(), defaultdict(list)
    history = StepExecution.select(StepExecution.workflow, StepExecution.step_name, StepExecution.outcome)
    for workflow, name, outcome in history.order_by(StepExecution.workflow, StepExecution.number).tuples():
        deaths[workflow, name] += outcome == "recovered"
        if outcome == "success":
            done[workflow, name] += 1
            order[workflow].append(name)
    effects = Counter(Effect.select(Effect.workflow, Effect.step).tuples())
    surplus = {key: effects[key] - done[key] for key in effects | done}
    plain = {key: count for key, count in surplus.items() if key[1] not in TRANSACTIONAL}
    wrong = sum(count != 0 for key, count in surplus.items() if key not in plain)
    wrong += Order.select().where(Order.booked != len(TRANSACTIONAL)).count()
    heroes = Counter(Fulfilment.finished().select(Workflow.hero_id).tuples())
    payloads = {order.id: {"number": order.number} for order in Order.select()}
    given = Counter(signal.workflow_id for signal in WorkflowSignal.select() if signal.consumed_at)
    numbers = {
        "workflows": expected,
        "finished": len(heroes),
        "lost": expected - len(heroes),
        "attempts at their steps": history.count(),
        "attempts that died and were recovered": sum(deaths.values()),
        "signals": WorkflowSignal.select().count(),
        "effects of plain steps repeated": sum(count for count in plain.values() if count > 0),
        "effects of transactional steps wrong": wrong,
    }
    promises = {
        "every workflow finishes, and once": heroes.total() == len(heroes) == expected,
        "its steps succeed in their order, once each": all(names == STEPS for names in order.values()),
        "what succeeded had its effect": min(surplus.values(), default=0) >= 0,
        "a plain step repeats its effect only where an attempt died": all(plain[key] <= deaths[key] for key in plain),
        "a transactional step has its effect exactly once": wrong == 0,
        "every signal is given to its step, and once": given == Counter(dict.fromkeys(given, 1))
        and len(given) == expected,
        "and with its payload": all(
            each.context.get("paid") == payloads[int(each.hero_id)] for each in Fulfilment if each.id in given
        ),
        "doctor() finds nothing": drive.doctor() == [],
    }
    return numbers, [promise for promise, is_kept in promises.items() if not is_kept]


def slowest_recovery():
    """Seconds from the last heartbeat of an attempt that died until that was recorded, and until the next one began."""
    following = StepExecution.alias()
    same = (following.workflow == StepExecution.workflow) & (following.number == StepExecution.number + 1)
    moments = (StepExecution.heartbeat_at, StepExecution.finished_at, following.started_at)
    query = StepExecution.select(*moments).join(following, on=same).where(StepExecution.outcome == "recovered")
    rows = [row for row in query.tuples() if None not in row]
    found = max(((found - beat).total_seconds() for beat, found, _ in rows), default=0)
    begun = max(((begun - beat).total_seconds() for beat, _, begun in rows), default=0)
    return found, begun


# ==== The program =====================================================================================================


def parse_arguments():
    parser = argparse.ArgumentParser(description="Kill the processes of workflows at random and check every promise.")
    parser.add_argument("url", nargs="?", default=os.environ.get("GENEVA_DRIVE_URL"), help="of an empty database")
    parser.add_argument("--workflows", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=120, help="for which the killing goes on")
    parser.add_argument("--workers", type=int, default=4, help="processes; the first one is not killed")
    parser.add_argument("--threads", type=int, default=4, help="of each process")
    parser.add_argument("--kill-every", type=float, default=1, metavar="SECONDS", help="on average")
    parser.add_argument("--disturb-every", type=float, default=5, metavar="SECONDS", help="on average")
    parser.add_argument("--log", default=os.devnull, help="a file for the warnings of all processes")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.workflows, args.seconds, args.workers, args.threads, args.kill_every, args.disturb_every) <= 0:
        parser.error("the numbers must be more than 0")
    return parser, args


def open_database(url):
    # synchronous=normal: what is committed survives any kill, though not a power cut.
    file_options = {"pragmas": {"journal_mode": "wal", "synchronous": "normal"}, "timeout": 30}
    db.initialize(connect(url, **(file_options if url.startswith("sqlite") else {})))


def main():
    parser, args = parse_arguments()
    logging.basicConfig(filename=args.log, level=logging.WARNING, format="%(asctime)s %(process)d %(message)s")
    if args.role:
        open_database(args.url)
        try:
            return ROLES[args.role](args)
        except PeeweeException:  # the creator's or the payer's, who have no reason to be braver than this
            logging.getLogger(__name__).exception("the %s role failed and will be started again", args.role)
            return 1
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        args.url = args.url or f"sqlite:///{folder}/chaos.db"
        try:
            open_database(args.url)
            if db.get_tables():
                parser.error("the database is not empty, and what is in it would suffer: give this play one of its own")
        except (PeeweeException, RuntimeError) as error:
            parser.error(f"{args.url} cannot be opened: {error}")
        with db.connection_context():
            drive.create_tables([Order, Effect])
            return play(args)


def play(args):
    args.started = time.time()
    with contextlib.closing(Chaos(args)) as chaos:
        chaos.rage()
        chaos.calm_down()
        exit_code = chaos.drain()
    numbers, broken = audit(args.workflows)
    if exit_code != 0 or chaos.counts["consumers that died by themselves"]:
        broken.append("a consumer lives until it is killed or told to end")
    found, begun = slowest_recovery()
    disturbances = "times that the file was locked" if isinstance(db.obj, SqliteDatabase) else "connections dropped"
    numbers |= {
        "kills (SIGKILL)": chaos.counts["kills"],
        disturbances: chaos.counts["disturbances"],
        "pauses from outside": chaos.counts["pauses"],
        "slowest recovery, since the last heartbeat": f"{found:.1f} s",
        "... until the next attempt began": f"{begun:.1f} s",
        "all in all": f"{time.time() - args.started:.0f} s",
    }
    print("\n" * sys.stderr.isatty(), end="")
    for name, number in numbers.items():
        print(f"{name:<44}{number:>10}")
    for promise in broken:
        print(f"BROKEN: {promise}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
