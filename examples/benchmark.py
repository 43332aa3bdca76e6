"""How fast it is, beside what the database can commit and what Huey does alone.

    python examples/benchmark.py [URL] [--workflows 150] [--rounds 5] [--samples 25] [--json] [--plot FILE.png]

Steps and new workflows per second, how late steps start, what an idle consumer costs, memory. Machines are noisy: the
contenders take turns, in several rounds, and only the ratios within one run count. A ratio is the median over the
rounds of what a contender did to what the floor did in the same round:

- The driver alone, the floor: the statements of the engine, written by hand for sqlite3, psycopg2 or PyMySQL, in the
  same transactions. It claims the execution that is due first and reads the hero; at each step's end it updates the
  workflow, if it is still at this execution, updates the execution and inserts the next one, claimed. On PostgreSQL a
  claim, an end and a new workflow are one statement each; on SQLite a claim is a read and a short transaction of two
  updates, on MariaDB and MySQL a read and one update of both tables; an end is a transaction there, unless it is the
  last one on MariaDB and MySQL, and so is a new workflow.
- Bare Huey: a task for each step, in a SqlHuey on the same database. It promises nothing after a crash.
- GenevaDrive as it is, and with `run_on=0`, where each step goes through the queue.

Of new workflows, create_many() makes ten times as many as the others make one by one: it is for many.

Each is a process of its own, on new tables, with a backlog of workflows of three empty steps that was made before. The
clock runs from the start of its threads to the last step; CPU is that of the process, not of a server. What the server
does for an idle consumer is told apart, if it runs on this host and that is Linux. URL, or GENEVA_DRIVE_URL, is that of
an empty database, and it is empty again in the end. The default is a SQLite file that is removed.

With `--crowd 1000,1000000` something else is measured: what one operation takes beside so many workflows that wait, a
tenth of that paused at steps that are overdue, and, for the last ones, a backlog of another tenth that is due; and what
the others notice while a tenth is deleted. In brackets is the ratio to what it takes beside the first number, which is
measured before and after: claims, ends and looks should stay below 1.5.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

# Peewee, Huey and the library are imported where they are used: the memory of those that need none must not show them.

PATIENCE_SECONDS = 300  # with a contender
SETTLING_SECONDS = 3  # of a consumer, before it counts as idle
MONTH = timedelta(days=30)
QUEUES = ["near", "far", "waiting"]  # to sample latencies side by side; each has a consumer to itself

# ==== The driver alone ================================================================================================

FIRST_DUE = """from geneva_drive_step_executions e join geneva_drive_workflows w on w.id = e.workflow_id
    where e.queue = 'default' and e.priority = 0 and e.due_at <= %s and w.state = 'ready'
    and w.execution_count = e.number order by e.due_at, e.id limit 1"""
READ = f"""select e.id, e.workflow_id, e.number, e.step_name, e.job_id, w.hero_id, w.state, w.context, w.options
    {FIRST_DUE} offset %s"""
CLAIM = """update geneva_drive_workflows set state = 'performing'
    where id = %s and execution_count = %s and state = 'ready'"""
BEGIN_STEP = """update geneva_drive_step_executions
    set state = 'in_progress', queue = null, started_at = %s, heartbeat_at = %s, performed_by = %s where id = """
HERO = "select id, name from benchmark_heroes where id = %s"
ADVANCE = """update geneva_drive_workflows
    set state = %s, current_step_name = %s, execution_count = %s, transitioned_at = %s
    where id = %s and execution_count = %s and state = 'performing' and not pause_requested"""
END_STEP = """update geneva_drive_step_executions
    set state = 'completed', outcome = 'success', finished_at = %s, signal_id = null where id = %s"""
RUN_ON = """insert into geneva_drive_step_executions (workflow_id, number, step_name, state, scheduled_for, queue,
    started_at, heartbeat_at, performed_by, reattempts, recoveries, job_id, created_at)
    {} %s, %s, %s, 'in_progress', %s, null, %s, %s, %s, 0, 0, %s, %s {}"""
CREATE = """insert into geneva_drive_workflows (type, hero_type, hero_id, state, current_step_name, allow_multiple,
    context, options, execution_count, pause_requested, token, created_at, transitioned_at)
    values ('Empty', 'Hero', %s, 'ready', 'one', false, '{}', null, 1, false, %s, %s, null)"""
SCHEDULE = """insert into geneva_drive_step_executions (workflow_id, number, step_name, state, scheduled_for, queue,
    priority, due_at, enqueued_at, reattempts, recoveries, job_id, created_at)
    {}, 1, 'one', 'scheduled', %s, 'default', 0, %s, %s, 0, 0, %s, %s {}"""

VALUES = "values (", ")"

# On PostgreSQL the parts of a statement wait for each other.
TAKE = f"""with found as (select e.id, e.workflow_id {FIRST_DUE} for no key update of w skip locked),
    claimed as ({BEGIN_STEP} (select id from found) and coalesce(queue, '') != ''
        returning id, workflow_id, number, step_name, job_id),
    moved as (update geneva_drive_workflows set state = 'performing' where id = (select workflow_id from claimed)
        returning hero_id, state, context, options)
    select claimed.*, moved.* from found left join claimed on true left join moved on true"""
END = f"""with moved as ({ADVANCE} returning id),
    ended as ({END_STEP} and exists (select 1 from moved) returning id)"""
CREATE_ALL = f"with made as ({CREATE} returning id) {SCHEDULE.format('select made.id', 'from made returning id')}"

# On MariaDB and MySQL one statement changes rows of both tables.
BOTH = "update geneva_drive_workflows w straight_join geneva_drive_step_executions e on e.workflow_id = w.id set"
CLAIM_BOTH = f"""{BOTH} w.state = 'performing', e.state = 'in_progress', e.queue = null, e.started_at = %s,
    e.heartbeat_at = %s, e.performed_by = %s
    where e.id = %s and w.id = %s and w.execution_count = %s and w.state = 'ready'"""
END_BOTH = f"""{BOTH} w.state = %s, w.current_step_name = %s, w.execution_count = %s, w.transitioned_at = %s,
    e.state = 'completed', e.outcome = 'success', e.finished_at = %s, e.signal_id = null
    where w.id = %s and w.execution_count = %s and w.state = 'performing' and not w.pause_requested and e.id = %s"""

NEXT_STEP = {"one": "two", "two": "three", "three": None}


def atomic(work):
    """Have the statements of a method be a transaction; again, if it falls to a deadlock, as some of MySQL's do."""

    def transact(self, *arguments):
        while True:
            try:
                self.sql(self.begin)
                result = work(self, *arguments)
                self.sql("commit")
                return result
            except Exception as error:
                if error.args[0] != 1213:
                    raise

    return transact


class ByHand:
    """A thread's connection, and the statements that it issues: those for SQLite, and what is common to all."""

    begin, mark = "begin immediate", "?"

    def __init__(self, database, parameters):
        self.name = f"the benchmark's floor, in a process of this host/{os.getpid()}"
        self.connection = self.connect(database, **parameters)
        self.cursor, self.close = self.connection.cursor(), self.connection.close

    def connect(self, database):
        import sqlite3

        connection = sqlite3.connect(database, timeout=30, isolation_level=None)
        connection.execute("pragma synchronous = normal")
        return connection

    def sql(self, statement, *values):
        self.cursor.execute(statement.replace("%s", self.mark), values)
        return self.cursor

    def take(self):
        """Claim the execution that is due first, and return it; None if there is none."""
        tries = 0
        while found := self.sql(READ, moment(), random.randint(0, tries)).fetchone():
            if self.claim(*found[:3]):
                return found[:6]
            tries += 1  # another thread got it
        return None

    def perform(self, execution, workflow, number, step, job, hero):
        """A workflow from its first step to its last; yields the moment at which each is performed."""
        while step:
            assert self.sql(HERO, int(hero)).fetchone()
            yield time.perf_counter()
            now, step = moment(), NEXT_STEP[step]
            changes = ("performing", step, number + 1, None) if step else ("finished", None, number, now)
            begun = (workflow, number + 1, step, now, now, now, self.name, job, now) if step else None
            execution = self.end([*changes, workflow, number], now, execution, begun)
            number += 1

    @atomic
    def claim(self, execution, workflow, number):
        is_ours = self.sql(CLAIM, workflow, number).rowcount == 1
        return is_ours and self.sql(f"{BEGIN_STEP} %s", now := moment(), now, self.name, execution)

    @atomic
    def end(self, move, now, execution, begun):
        """Record a step, and begin with the next one, if there is one; returns the number of its execution."""
        assert self.sql(ADVANCE, *move).rowcount == 1
        self.sql(END_STEP, now, execution)
        return begun and self.sql(RUN_ON.format(*VALUES), *begun).lastrowid

    @atomic
    def create(self, hero, token, now, job):
        workflow = self.sql(CREATE, hero, token, now).lastrowid
        self.sql(SCHEDULE.format("values (%s", ")"), workflow, now, now, now, job, now)


class OnPostgresql(ByHand):
    mark = "%s"

    def connect(self, database, **parameters):
        import psycopg2

        connection = psycopg2.connect(dbname=database, **parameters)
        connection.autocommit = True
        return connection

    def take(self):
        while found := self.sql(TAKE, now := moment(), now, now, self.name).fetchone():
            if found[0] is not None:  # else another thread got it between the look and the lock
                return found[:6]
        return None

    def end(self, move, now, execution, begun):
        rest = RUN_ON.format("select", "from ended returning id") if begun else "select id from ended"
        return self.sql(f"{END} {rest}", *move, now, execution, *(begun or ())).fetchone()[0]

    def create(self, hero, token, now, job):
        self.sql(CREATE_ALL, hero, token, now, now, now, now, job, now)


class OnMysql(ByHand):
    begin, mark = "begin", "%s"

    def connect(self, database, **parameters):
        import pymysql

        return pymysql.connect(database=database, autocommit=True, **parameters)

    def claim(self, execution, workflow, number):
        return self.sql(CLAIM_BOTH, now := moment(), now, self.name, execution, workflow, number).rowcount

    def end(self, move, now, execution, begun):
        return (self.end_and_begin if begun else self.write_end)(move, now, execution, begun)

    def write_end(self, move, now, execution, begun):
        *changes, workflow, number = move
        assert self.sql(END_BOTH, *changes, now, workflow, number, execution).rowcount == 2
        return begun and self.sql(RUN_ON.format(*VALUES), *begun).lastrowid

    end_and_begin = atomic(write_end)


BY_HAND = {"sqlite": ByHand, "postgresql": OnPostgresql, "mysql": OnMysql}


def moment():
    return str(datetime.now(timezone.utc).replace(tzinfo=None))


def clocks():
    return time.perf_counter(), time.process_time()


def perform_by_hand(kind, driver, workers, **_):
    done = []

    def work():
        with contextlib.closing(BY_HAND[kind](**driver)) as own:
            while (attempt := own.take()) is not None:
                done.extend(own.perform(*attempt))

    threads = [threading.Thread(target=work) for _ in range(workers)]
    began = clocks()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return speed(began, done)


def create_by_hand(kind, driver, heroes, **_):
    own = BY_HAND[kind](**driver)
    began = clocks()
    for hero in range(1, heroes + 1):
        own.create(str(hero), uuid.uuid4().hex, moment(), f"{time.time_ns() // 1000}-{uuid.uuid4().hex}")
    return speed(began, [time.perf_counter()] * heroes)


def speed(began, done):
    """What was done, at these moments: how much of it each second, and the milliseconds of CPU for each."""
    return {"rate": len(done) / (max(done) - began[0]), "cpu_ms": 1000 * (clocks()[1] - began[1]) / len(done)}


# ==== Huey, and the library ===========================================================================================


def open_database(url):
    from playhouse.db_url import connect

    # synchronous=normal: what is committed survives any kill, though not a power cut.
    file_options = {"pragmas": {"journal_mode": "wal", "synchronous": "normal"}, "timeout": 30}
    return connect(url, **(file_options if url.startswith("sqlite") else {}))


def bare_huey(url):
    """A Huey with an empty task, and the list of the moments at which that was done."""
    from huey.contrib.sql_huey import SqlHuey

    done = []
    huey = SqlHuey("benchmark", database=open_database(url), results=False, create_tables=False)

    @huey.task(name="empty")
    def empty():
        done.append(time.perf_counter())

    return huey, empty, done


def application(url, queues=()):
    """The drive, a hero and the workflows, and the list of the moments at which an empty step was done."""
    from peewee import CharField, Model

    from geneva_drive import MODELS, GenevaDrive, StepExecution, Workflow, step

    done = []
    drive = GenevaDrive(open_database(url), queues=queues)

    class Hero(Model):
        name = CharField(default="ada")

        class Meta:
            database = drive.database
            table_name = "benchmark_heroes"

    class Noting(Workflow):
        def note(self):
            done.append(time.perf_counter())

    class Empty(Noting):
        one, two, three = (step("note") for _ in range(3))

    class Timed(Workflow):
        @step
        def begin(self):
            self.context["begun"] = time.time()

    class Waiting(Timed):
        @step(wait=1)
        def go_on(self):
            self.context["begun"] = time.time()

    class Later(Noting):
        one = step("note", wait=MONTH)

    class BeforeWait(Noting):
        one, two = step("note"), step("note", wait=MONTH)

    class Tomorrow(Noting):
        one, two, three = step("note", wait=timedelta(days=1)), step("note"), step("note")

    classes = (Workflow, StepExecution, Hero, Empty, Timed, Waiting, Later, BeforeWait, Tomorrow)
    by_name = {each.__name__: each for each in classes}
    return SimpleNamespace(drive=drive, done=done, claimed=[], models=[*MODELS, Hero], **by_name)


def consume(huey, workers, done, steps):
    """Run a consumer, with bare Huey's looks as often as those of `drive.run()`, until so many steps are done."""
    consumer = huey.create_consumer(workers=workers, initial_delay=0.02, backoff=1.2, max_delay=0.2)
    began = clocks()
    consumer.start()
    while len(done) < steps and time.perf_counter() < began[0] + PATIENCE_SECONDS:
        time.sleep(0.02)
    consumer.stop(graceful=True)
    assert len(done) == steps, f"{len(done)} steps were done, not {steps}"
    return speed(began, done)


def perform_tasks(url, workers, workflows, **_):
    huey, _, done = bare_huey(url)
    return consume(huey, workers, done, 3 * workflows)


def perform_workflows(url, workers, workflows, run_on=None, **_):
    app = application(url)
    if run_on is not None:
        app.drive.run_on = run_on
    return consume(app.drive.huey, workers, app.done, 3 * workflows)


def create_workflows(url, at_once, **_):
    app = application(url)
    heroes = list(app.Hero.select())
    began = clocks()
    if at_once:
        app.Empty.create_many(heroes)
    else:
        for hero in heroes:
            app.Empty.create(hero=hero)
    return speed(began, [time.perf_counter()] * len(heroes))


# ==== Latency =========================================================================================================


def serve(url, queue, parent, **_):
    """Run a consumer until SIGTERM; returns what part of a core it took once it had settled."""
    app, since = application(url, QUEUES), [clocks()]
    settled = threading.Timer(SETTLING_SECONDS, lambda: since.append(clocks()))
    settled.daemon = True
    settled.start()
    app.drive.run(queues=[queue], until=lambda: os.getppid() != parent)
    wall, cpu = (after - before for before, after in zip(since[-1], clocks()))
    return {"cpu_percent": 100 * cpu / wall}


def sample_latency(url, samples, **_):
    """Create workflows now and then, for the consumer in this process and for those in others.

    Returns how many milliseconds each waited for its step.
    """
    app, over = application(url, QUEUES), threading.Event()
    consumer = threading.Thread(target=app.drive.run, kwargs={"queues": ["near"], "until": over.is_set})
    consumer.start()
    try:
        hero = app.Hero.create()
        create_one_each(app, hero)  # these find consumers that are still about to start
        last_of_first_ones = wait_for_all(app)
        for _ in range(samples):
            time.sleep(random.uniform(1, 1.6))  # the less there is to do, the less often a consumer looks
            create_one_each(app, hero)
        wait_for_all(app)
    finally:
        over.set()
        consumer.join()
    return latencies(app, last_of_first_ones)


def create_one_each(app, hero):
    # The last one is for the consumer in this process, which has no more to do then than to wait for it.
    for queue, kind in {"far": app.Timed, "waiting": app.Waiting, "near": app.Timed}.items():
        context = {"queue": queue, "since": time.time()}
        kind.create(hero, allow_multiple=True, context=context, options={"queue": queue})


def wait_for_all(app):
    """Wait until all workflows are finished; returns the id of the newest."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not app.drive.is_idle():
        assert time.monotonic() < deadline, "a workflow does not come to its end"
        time.sleep(0.1)
    return app.Workflow.finished().order_by(app.Workflow.id.desc()).first().id


def latencies(app, last_of_first_ones):
    found = {"near": [], "far": [], "waiting": []}
    newest = app.StepExecution.number == app.Workflow.execution_count
    query = app.StepExecution.select(app.StepExecution, app.Workflow).join(app.Workflow).where(newest)
    for execution in query.where(app.Workflow.id > last_of_first_ones):
        context, due = execution.workflow.context, execution.scheduled_for.timestamp()
        since = due if context["queue"] == "waiting" else context["since"]
        found[context["queue"]].append(1000 * (context["begun"] - since))
    return found


# ==== The contest =====================================================================================================

#: What the tables call the contenders, the floor first; what they run in a process of their own, and with what.
PERFORMING = {
    "the driver alone": (perform_by_hand, {}),
    "bare Huey": (perform_tasks, {}),
    "GenevaDrive": (perform_workflows, {}),
    "GenevaDrive, run_on=0": (perform_workflows, {"run_on": 0}),
}
CREATING = {
    "the driver alone, one by one": (create_by_hand, {}),
    "create()": (create_workflows, {"at_once": False}),
    "create_many()": (create_workflows, {"at_once": True, "times": 10}),
}
LATENCIES = {
    "create() to step, same process": "near",
    "create() to step, another process": "far",
    "due after a wait to step": "waiting",
}
#: The processes or threads of the server behind the connections of others.
CONNECTIONS = {
    "postgresql": "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()",
    "mysql": "select tid from information_schema.processlist where db = database() and id <> connection_id()",
}
JOBS = {job.__name__: job for job, _ in (PERFORMING | CREATING).values()}
JOBS |= {"serve": serve, "sample_latency": sample_latency}


def work():
    """What a child does: its order comes through stdin, for a URL may hold a password; the results go to stdout."""
    order = json.load(sys.stdin)
    results = JOBS[order["job"]](**order)
    json.dump({**results, "memory_mb": peak_memory_mb()}, sys.stdout)


def peak_memory_mb():
    """Of this process. What getrusage() tells includes, on Linux, that of the process which started it."""
    with contextlib.suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 ** (1 + (sys.platform == "darwin"))


def cpu_seconds(number):
    """Of a process or thread of a database server that runs here, on Linux; elsewhere an OSError."""
    if not re.search("postgres|mariadb|mysql", Path(f"/proc/{number}/cmdline").read_text()):
        raise FileNotFoundError(f"no server is {number}")
    *_, user, system = Path(f"/proc/{number}/task/{number}/stat").read_text().rpartition(")")[2].split()[:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Contest:
    """The contenders on one database, on tables that are new for each."""

    def __init__(self, url, kind, args):
        self.args, self.app = args, application(url)
        self.huey, self.task, _ = bare_huey(url)
        self.db, self.kind = self.app.drive.database, kind
        driver = {"database": self.db.database, "parameters": self.db.connect_params if kind != "sqlite" else {}}
        self.order = {"url": url, "kind": kind, "driver": driver}

    def run(self):
        steps = {workers: {name: [] for name in PERFORMING} for workers in self.args.workers}
        created = {name: [] for name in CREATING}
        for number in range(1, self.args.rounds + 1):
            for workers, results in steps.items():
                for name in PERFORMING:
                    show(f"round {number} of {self.args.rounds}: {name}, workers: {workers}")
                    results[name].append(self.perform(*PERFORMING[name], workers))
            for name in CREATING:
                show(f"round {number} of {self.args.rounds}: {name}")
                created[name].append(self.create(*CREATING[name]))
        show("latency")
        milliseconds = self.latency()
        show("an idle consumer")
        return {
            "steps": {workers: compared(results) for workers, results in steps.items()},
            "created": compared(created),
            "latency_ms": {name: spread(milliseconds[key]) for name, key in LATENCIES.items()},
            **self.idle(),
        }

    def perform(self, job, options, workers):
        self.prepare(self.args.workflows)
        if job is perform_tasks:
            with self.huey.storage.database.atomic():
                for _ in range(3 * self.args.workflows):
                    self.task()
        else:
            self.app.Empty.create_many(self.app.Hero.select())
        results = self.child(job, workers=workers, workflows=self.args.workflows, **options)
        if job is not perform_tasks:
            self.check("finished", self.args.workflows, 3)
        return results

    def create(self, job, options):
        number = options.get("times", 1) * self.args.creations
        self.prepare(number)
        results = self.child(job, heroes=number, **options)
        self.check("ready", number, 1)
        return results

    def latency(self):
        self.prepare(0)
        with self.start(serve, queue="far"), self.start(serve, queue="waiting"):
            return self.child(sample_latency, samples=self.args.samples)

    def idle(self):
        """What part of a core an idle consumer takes, and what its connections take at the server; None if unknown."""
        self.prepare(0)
        with self.start(serve, queue="default") as consumer:
            time.sleep(SETTLING_SECONDS)
            before, began = self.server_seconds(), time.perf_counter()
            time.sleep(max(2, self.args.samples))
            after, seconds = self.server_seconds(), time.perf_counter() - began
            consumer.terminate()
            own = result_of(consumer)["cpu_percent"]
        at_server = None if before is None or after is None else 100 * (after - before) / seconds
        return {"idle_cpu_percent": own, "idle_server_cpu_percent": at_server}

    def server_seconds(self):
        """The CPU time of others' connections at the server, if that can be had."""
        from peewee import PeeweeException

        with contextlib.suppress(OSError, PeeweeException, KeyError):  # SQLite's work is the process's own
            return sum(cpu_seconds(each) for (each,) in self.db.execute_sql(CONNECTIONS[self.kind]))
        return None

    def prepare(self, heroes):
        self.clear()
        self.app.drive.create_tables([self.app.Hero])
        self.huey.storage.create_tables()
        self.app.Hero.insert_many([{"name": "ada"}] * heroes).execute()

    def clear(self):
        self.db.drop_tables(self.app.models)
        self.db.execute_sql("drop table if exists geneva_drive_schema")
        self.huey.storage.drop_tables()

    def check(self, state, workflows, executions):
        """Whether all that was measured was done."""
        assert self.app.Workflow.select().where(self.app.Workflow.state == state).count() == workflows
        assert self.app.StepExecution.select().count() == executions * workflows
        assert self.app.drive.doctor() == []

    def child(self, job, **options):
        with self.start(job, **options) as process:
            return result_of(process)

    @contextlib.contextmanager
    def start(self, job, **options):
        order = {"job": job.__name__, "parent": os.getpid(), **self.order, **options}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, __file__, "--job"], **pipes)
        try:
            with process.stdin:
                json.dump(order, process.stdin)
            process.stdin = None
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def result_of(process):
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"benchmark.py: a contender failed with exit code {process.returncode}; what it said is above")
    return json.loads(output)


def compared(results):
    """Of what the contenders did, round by round: the medians, and those of the ratios to the first contender."""
    floor = next(iter(results.values()))
    return {
        name: {
            "per_second": statistics.median(each["rate"] for each in own),
            "to_floor": statistics.median(each["rate"] / below["rate"] for each, below in zip(own, floor)),
            "cpu_ms": statistics.median(each["cpu_ms"] for each in own),
            "memory_mb": max(each["memory_mb"] for each in own),
            "rounds": [each["rate"] for each in own],
        }
        for name, own in results.items()
    }


def spread(values):
    values = sorted(values)
    p95 = values[-(-95 * len(values) // 100) - 1]
    return {"median": statistics.median(values), "p95": p95, "worst": values[-1], "samples": len(values)}


# ==== In a crowd ======================================================================================================

FIRST = 1000  # those of a crowd that wait and are not copies
TEXT = {"sqlite": "text", "postgresql": "varchar", "mysql": "char"}
OPERATIONS = {
    "a look that finds nothing": lambda app, hero: app.drive.huey.dequeue(),
    "a look for what is due next": lambda app, hero: app.drive.huey.storage.first_due(),
    "housekeeping with nothing to do": lambda app, hero: app.drive.housekeeping(),
    "create()": lambda app, hero: app.BeforeWait.create(hero, allow_multiple=True),
    "a step before a wait": lambda app, hero: perform(app, 1),
}
IN_BACKLOG = {
    "a claim in a backlog": lambda app, hero: app.claimed.append(app.drive.huey.dequeue()),
    "what is claimed, to its end": lambda app, hero: app.drive.huey.execute(app.claimed.pop()),
    "a step that runs on": lambda app, hero: perform(app, 3),
}


def perform(app, steps):
    while (task := app.drive.huey.dequeue()) is None:  # on MariaDB, who deletes may have locked what is due
        pass
    app.drive.huey.execute(task)
    return steps


def crowd(contest, sizes, samples):
    """The milliseconds of each operation in crowds of these sizes; the first one again in the end, as noise is slow."""
    results, app = [], contest.app
    for size in (*sizes, sizes[0]):
        show(f"{size} workflows are made to wait")
        fill(contest, size)
        medians = {}
        for days, operations in enumerate((OPERATIONS, IN_BACKLOG)):
            app.drive.clock = lambda days=days: datetime.now(timezone.utc) + timedelta(days=days)
            for name, operation in operations.items():
                show(f"{size} workflows wait: {name}")
                app.drive.run_on = 1 if name == "a step that runs on" else 0
                medians[name] = statistics.median(milliseconds_of(operation, app) for _ in range(samples))
        app.drive.clock = lambda: datetime.now(timezone.utc)
        results.append({"waiting": size, "milliseconds": medians})
        if size == max(sizes):
            show(f"{size // 10} workflows are deleted")
            deletion = delete(contest, size // 10)
    before, *larger, after = results
    small = {name: (value + after["milliseconds"][name]) / 2 for name, value in before["milliseconds"].items()}
    for each in larger:
        each["ratios"] = {name: value / small[name] for name, value in each["milliseconds"].items()}
    return {"crowds": [before, *larger, after], "deletion": deletion}


def milliseconds_of(operation, app):
    hero = app.Hero(id=1)
    began = time.perf_counter()
    result = operation(app, hero)
    return 1000 * (time.perf_counter() - began) / (result if isinstance(result, int) else 1)


def fill(contest, size):
    """Make a crowd: of each dozen ten wait for a month, one is paused and one is due tomorrow. Most are copies."""
    app, db, kind, count, total = contest.app, contest.db, contest.kind, FIRST * 12 // 10, size * 12 // 10
    contest.prepare(count)
    heroes = list(app.Hero.select().order_by(app.Hero.id))
    for dozen in (heroes[first : first + 12] for first in range(0, count, 12)):
        app.Later.create_many(dozen[:10])
        app.Timed.create_many(dozen[10:11])
        app.Tomorrow.create_many(dozen[11:])
    for workflow in list(app.Timed.ready()):
        workflow.pause()
    shifted = {"id": "id + {0}", "workflow_id": "workflow_id + {0}", "hero_id": f"cast(id + {{0}} as {TEXT[kind]})"}
    models = [app.Hero, app.Workflow, app.StepExecution]
    while count < total:
        for model in models:
            table, names = model._meta.table_name, [each.column_name for each in model._meta.sorted_fields]
            values = ", ".join(shifted.get(each, each.join(db.quote)).format(count) for each in names)
            copied = f"select {values} from {table} where id <= {total - count}"
            db.execute_sql(f"insert into {table} ({', '.join(each.join(db.quote) for each in names)}) {copied}")
        count = min(2 * count, total)
    for model in models:
        table = model._meta.table_name
        if kind == "postgresql":
            db.execute_sql(f"select setval(pg_get_serial_sequence('{table}', 'id'), {total})")
            db.execute_sql(f"vacuum analyze {table}")
        elif kind == "mysql":
            db.execute_sql(f"analyze table {table}").fetchall()


def delete(contest, number):
    """Delete so many expired workflows, while steps are performed; what both take of each other."""
    app, drive = contest.app, contest.app.drive
    long_ago = datetime.now(timezone.utc) - timedelta(days=365)
    old = {"state": "finished", "current_step_name": None, "transitioned_at": long_ago}
    app.Workflow.update(**old).where(app.Workflow.id <= number).execute()
    ended = {"state": "completed", "outcome": "success", "finished_at": long_ago, "queue": None}
    app.StepExecution.update(**ended).where(app.StepExecution.workflow <= number).execute()
    drive.run_on, heroes, left = 0, list(app.Hero.select().limit(FIRST)), 0

    def step_milliseconds():
        nonlocal left
        if not left:
            app.Empty.delete().execute()
            left = 3 * app.Empty.create_many(heroes)
        left -= 1
        return milliseconds_of(lambda app, _: perform(app, 1), app)

    quiet = [step_milliseconds() for _ in range(100)]
    memory, pauses, counts = peak_memory_mb(), [], []
    sweep = threading.Thread(target=lambda: counts.append(drive.housekeeping()))
    began = time.perf_counter()
    sweep.start()
    while sweep.is_alive():
        pauses.append(step_milliseconds())
    sweep.join()
    seconds = time.perf_counter() - began
    assert counts[0]["workflows_cleaned_up"] >= number
    return {
        "workflows": number,
        "seconds": seconds,
        "memory_mb": peak_memory_mb() - memory,
        "step_ms": {"before": statistics.median(quiet), "meanwhile": spread(pauses)},
    }


# ==== The program =====================================================================================================


def main():
    parser, args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmark.py: stopped"))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        url = args.url or f"sqlite:///{folder}/benchmark.db"
        about = examine(url, parser)
        contest = Contest(url, about["database"], args)
        try:
            if args.crowd:
                results = {**about, **crowd(contest, args.crowd, args.samples)}
            else:
                results = {**about, "workflows": args.workflows, "rounds": args.rounds, **contest.run()}
        finally:
            contest.clear()
            show("")
    if args.plot:
        plot(results, args.plot)
    if args.json:
        print(json.dumps(results, indent=2))
    elif args.crowd:
        print_crowds(results)
    else:
        print_tables(results)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure GenevaDrive beside the database's driver and bare Huey.")
    parser.add_argument("url", nargs="?", default=os.environ.get("GENEVA_DRIVE_URL"), help="of an empty database")
    parser.add_argument("--workflows", type=int, default=150, help="of three empty steps, for each contender")
    parser.add_argument("--creations", type=int, default=500, help="workflows created in each round one by one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=integers, default=[1, 2, 4], metavar="1,2,4", help="threads of a contender")
    parser.add_argument("--samples", type=int, default=25, help="of each latency; and seconds of an idle consumer")
    parser.add_argument("--crowd", type=integers, metavar="1000,1000000", help="measure beside so many that wait")
    parser.add_argument("--json", action="store_true", help="print all numbers, for programs")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the steps per second; needs matplotlib")
    args = parser.parse_args()
    if min(args.workflows, args.creations, args.rounds, args.samples, *args.workers) < 1:
        parser.error("the numbers must be more than 0")
    if args.crowd and (min(args.crowd) < FIRST or args.plot):
        parser.error(f"--crowd takes numbers of at least {FIRST}, and is not drawn")
    if args.crowd and args.samples > FIRST // 20:
        parser.error(f"--crowd takes at most {FIRST // 20} samples")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave the option out")
    return parser, args


def integers(text):
    return [int(number) for number in text.split(",")]


def examine(url, parser):
    """What the benchmark is to run on; exits if it must not."""
    from peewee import PeeweeException

    import geneva_drive

    kind = next((kind for kind in ("sqlite", "postgresql", "mysql") if url.startswith(kind[:8])), None)
    if kind is None or ":memory:" in url:
        parser.error("the URL must be of a SQLite file, of PostgreSQL, or of MySQL or MariaDB")
    try:
        database = open_database(url)
        with database.connection_context():
            if database.get_tables():
                parser.error("the database is not empty: give the benchmark one of its own, to fill and to clear")
            function = "sqlite_version()" if kind == "sqlite" else "version()"
            ((version,),) = database.execute_sql(f"select {function}")
    except (PeeweeException, RuntimeError, ValueError) as error:
        parser.error(f"the database cannot be opened: {error}")
    about = {"geneva_drive": geneva_drive.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    return {**about, "database": kind, "version": version.partition(" on ")[0].split()[-1]}


def show(line):
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def print_tables(results):
    print("GenevaDrive {geneva_drive}, Python {python}, {database} {version}, {cores} cores".format(**results))
    print("{rounds} rounds, medians; in brackets, what it is to the driver alone".format(**results))
    for workers, contenders in results["steps"].items():
        print_rates(f"steps, {workers} worker{'s' * (workers > 1)}", contenders)
    print_rates("workflows created", results["created"])
    print(f"\n{'milliseconds':<36}{'median':>9}{'p95':>9}{'worst':>9}")
    for name, each in results["latency_ms"].items():
        print(f"{name:<36}{each['median']:9.1f}{each['p95']:9.1f}{each['worst']:9.1f}")
    print(f"\nan idle consumer{results['idle_cpu_percent']:29.1f} % of a core")
    if results["idle_server_cpu_percent"] is not None:
        print(f"its connections, at the server{results['idle_server_cpu_percent']:15.1f} % of a core")


def print_crowds(results):
    print("GenevaDrive {geneva_drive}, Python {python}, {database} {version}, {cores} cores".format(**results))
    crowds, deletion = results["crowds"], results["deletion"]
    print(f"\n{'milliseconds, while so many wait':<36}", *(f"{each['waiting']:>17,}" for each in crowds), sep="")
    for name in crowds[0]["milliseconds"]:
        print(f"{name:<36}", end="")
        for each in crowds:
            ratio = "({:.2f})".format(each["ratios"][name]) if "ratios" in each else ""
            print(f"{each['milliseconds'][name]:>9.2f}{ratio:>8}", end="")
        print()
    took, step = deletion["seconds"], deletion["step_ms"]
    print(f"\n{deletion['workflows']:,} of them are deleted in {took:.0f} s, with {deletion['memory_mb']:.0f} MB more")
    print("a step, run_on=0, before            {:9.2f} ms".format(step["before"]))
    print(
        "a step, run_on=0, meanwhile         {median:9.2f} ms, 95 % under {p95:.0f}, worst {worst:.0f}".format(
            **step["meanwhile"]
        )
    )


def print_rates(title, contenders):
    print(f"\n{title:<36}{'a second':>9}{'':>9}{'CPU each':>12}{'memory':>10}")
    for name, each in contenders.items():
        print(
            f"{name:<36}{each['per_second']:9.0f}{'({:.2f})'.format(each['to_floor']):>9}"
            f"{each['cpu_ms']:9.2f} ms{each['memory_mb']:7.0f} MB"
        )


def plot(results, path):
    import matplotlib

    matplotlib.use("agg")  # which needs no screen
    from matplotlib import pyplot

    workers = list(results["steps"])
    for name in PERFORMING:
        rates = [results["steps"][each][name]["per_second"] for each in workers]
        pyplot.plot(workers, rates, marker="o", label=name)
    pyplot.title("{database} {version}, {cores} cores".format(**results))
    pyplot.xlabel("worker threads")
    pyplot.ylabel("empty steps per second")
    pyplot.xticks(workers)
    pyplot.ylim(bottom=0)
    pyplot.legend()
    pyplot.savefig(path, dpi=120)


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--job"] else main()
