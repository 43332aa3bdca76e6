"""A report on all workflows: one HTML page that needs nothing else, to be opened in a browser, mailed or kept.

    python examples/report.py app:drive [-o report.html]    # `drive` in your app.py; its database is only read
    python examples/report.py                               # a demonstration, on a database that is made for it

How many workflows there are, of which class and in which state; what was done and what failed over time; the paused
ones with their errors; how the latest went, with their attempts and waits. What comes from the tables is escaped, and
the page is forbidden to load or run anything. The queries count in the database, and read no more than is shown.
"""

import argparse
import functools
import html
import importlib
import json
import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

from peewee import SQL, Case, CharField, DatabaseError, Model, SqliteDatabase, chunked, fn

from geneva_drive import ExceptionPolicy, GenevaDrive, StepExecution, Workflow, step

STATES = ("ready", "performing", "paused", "finished", "canceled")
MOMENT = "%Y-%m-%d %H:%M:%S"
UNITS = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}
MAX_PERIODS, MAX_ATTEMPTS, MAX_GROUPS, MAX_MESSAGE, MAX_TEXT = 60, 50, 50, 400, 8000  # the last two in characters

NEWEST = StepExecution.number == Workflow.execution_count
KIND = Case(None, [(StepExecution.state == "failed", "failed"), (StepExecution.outcome == "success", "done")], "other")
KINDS = {"wait thin": "waits", "done": "succeeded", "failed": "failed", "paused thin": "is paused"}
KINDS["other"] = "skipped, canceled, to run again, or under way"


def main():
    parser = argparse.ArgumentParser(description="Write a report on the workflows of an application, an HTML page.")
    parser.add_argument("app", nargs="?", help="module:attribute of the drive; without it, a demonstration")
    parser.add_argument("--demo", action="store_true", help="report on a demonstration")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    parser.add_argument("--limit", type=int, default=20, help="so many paused workflows are drawn, and so many others")
    args = parser.parse_args()
    name = "a demonstration" if args.demo or not args.app else args.app
    with tempfile.TemporaryDirectory() as folder:
        drive = find_drive(name, parser) if name == args.app else demonstration(folder)
        try:
            with drive.database.connection_context():
                page = report(drive.clock(), name, max(0, args.limit))
        except DatabaseError as error:
            sys.exit(f"report.py: {error}; if the tables are missing, drive.create_tables() makes them")
    args.output.write_text(page, encoding="utf-8")
    print(f"{args.output}: {len(page) // 1024} KB")


def find_drive(app, parser):
    module, _, attribute = app.partition(":")
    sys.path.insert(0, "")
    try:
        drive = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"{app}: {error}")
    return drive if isinstance(drive, GenevaDrive) else parser.error(f"{app} is no GenevaDrive, but {drive!r:.100}")


# ==== The page, from top to bottom ====================================================================================


def report(now, name, limit):
    paused = Workflow.select().where(Workflow.state == "paused").order_by(Workflow.transitioned_at.desc())
    others = Workflow.select().where(Workflow.state != "paused").order_by(Workflow.id.desc())
    due = StepExecution.select().join(Workflow).where(StepExecution.state == "scheduled", Workflow.state == "ready")
    overdue = due.where(StepExecution.scheduled_for < now - UNITS["minute"]).count()
    parts = [
        tag("h1", "Workflows of ", tag("bdi", name)),
        tag("p", "As of ", moment(now), f", with {overdue:,} overdue. All times are UTC.", class_="note"),
        counts(),
        *(tag("h2", "Over time"), over_time(now)),
        *(tag("h2", "Paused"), reasons(now), *drawn(paused.limit(limit), now)),
        *(tag("h2", "The latest others"), *drawn(others.limit(limit), now)),
    ]
    return PAGE.format(title=text(f"Workflows of {name}"), style=STYLE, body=tag("main", *parts))


def counts():
    of = defaultdict(Counter)
    query = Workflow.select(Workflow.type, Workflow.state, fn.COUNT(Workflow.id))
    for kind, state, count in query.group_by(Workflow.type, Workflow.state).tuples():
        of[kind][state] = count
    rows = sorted(of.items()) + [("all classes", sum(of.values(), Counter()))] * (len(of) > 1)
    cells = [[kind, *(each[state] for state in STATES), each.total()] for kind, each in rows]
    return table("Workflows by class and state", ["class", *STATES, "all"], cells)


def over_time(now):
    oldest = StepExecution.select(fn.MIN(StepExecution.finished_at)).scalar()
    if oldest is None:
        return NONE
    unit = next((unit for unit, length in UNITS.items() if now - oldest < length * (MAX_PERIODS - 1)), "day")
    length, midnight = UNITS[unit], now.replace(hour=0, minute=0, second=0, microsecond=0)
    newest = midnight + (now - midnight) // length * length
    shown = max(12, min(MAX_PERIODS, (newest - oldest) // length + 2))
    periods = [newest - length * ago for ago in reversed(range(shown))]

    def count(model, ended_at, kind, *kinds):
        query = model.select(kind.alias("kind"), ended_at.truncate(unit).alias("period"), fn.COUNT(model.id))
        series = {kind: Counter() for kind in kinds}
        for kind, period, n in query.where(ended_at >= periods[0]).group_by(SQL("kind"), SQL("period")).tuples():
            series.get(kind, {})[period.replace(tzinfo=timezone.utc)] = n
        return series

    attempts = count(StepExecution, StepExecution.finished_at, KIND, "failed", "done", "other")
    workflows = count(Workflow, Workflow.transitioned_at, Workflow.state, "canceled", "finished")
    charts = {"Attempts at steps that ended": attempts, "Workflows that ended": workflows}
    return tag("div", *(chart(f"{name}, by {unit}", periods, charts[name]) for name in charts), class_="charts")


def chart(title, periods, series):
    """Bars of several kinds one upon the other: failures stand at the bottom, where they are compared best."""
    sums = [sum(each[period] for each in series.values()) for period in periods]
    form = "%b %d" if periods[1] - periods[0] == UNITS["day"] else "%b %d %H:%M"
    bars, rows, labels = [], [], [f"{period:{form}}" for period in periods]
    for place, period in enumerate(periods):
        numbers, top = {kind: each[period] for kind, each in series.items()}, 100
        said = ", ".join(f"{n:,} {kind}" for kind, n in numbers.items())
        bar = [tag("title", f"{labels[place]}: {said}"), tag("rect", x=place, width=1, height=100)]
        for kind, n in numbers.items():
            height = n and max(1.5, 96 * n / max(sums))  # one among thousands is seen too
            top -= height
            bar.append(tag("rect", x=place + 0.1, y=f"{top:.1f}", width=0.8, height=f"{height:.1f}", class_=kind))
        bars.append(tag("g", *bar))
        rows += [[labels[place], *numbers.values()]] * (sums[place] > 0)
    return tag(
        "figure",
        tag("figcaption", tag("b", title), tag("span", f"at most {max(sums):,}")),
        tag("svg", *bars, viewBox=f"0 0 {len(bars)} 100", preserveAspectRatio="none", role="img", aria_label=title),
        tag("div", *(tag("span", each) for each in (labels[0], labels[len(bars) // 2], labels[-1])), class_="ends"),
        legend({kind: f"{each.total():,} {kind}" for kind, each in series.items()}),
        folded("In figures", table(title, ["from", *series], rows)),
    )


def reasons(now):
    """What the paused ones stand at, and why: groups of them."""
    group = (Workflow.type, Workflow.current_step_name, StepExecution.error_class_name)
    count, since = fn.COUNT(Workflow.id), fn.MIN(Workflow.transitioned_at)
    query = StepExecution.select(*group, count, since).join(Workflow).where(Workflow.state == "paused", NEWEST)
    query = query.group_by(*group).order_by(count.desc()).limit(MAX_GROUPS)
    rows = [(*names, error or "none", n, span(now - oldest)) for *names, error, n, oldest in query.tuples()]
    return table("Paused, by class, step and error", ["class", "step", "error", "count", "for up to"], rows)


def drawn(query, now):
    """Each workflow with its newest attempts; a hundred at a time, and of messages no more than is shown."""
    names = ["workflow", "number", "step_name", "state", "outcome", "created_at", "scheduled_for", "started_at"]
    columns = [getattr(StepExecution, name) for name in [*names, "finished_at", "error_class_name"]]
    columns += [KIND.alias("kind"), fn.SUBSTR(StepExecution.error_message, 1, MAX_MESSAGE).alias("message")]
    columns += [Case(None, [(NEWEST, StepExecution.error_backtrace)]).alias("backtrace")]
    yield legend(KINDS) if query.exists() else ""
    for workflows in chunked(query, 100):
        attempts = {workflow.id: [] for workflow in workflows}
        rows = StepExecution.select(*columns).join(Workflow).where(StepExecution.workflow.in_(list(attempts)))
        rows = rows.where(StepExecution.number > Workflow.execution_count - MAX_ATTEMPTS)
        for each in rows.order_by(StepExecution.number):
            attempts[each.workflow_id].append(each)
        # Without attempts, housekeeping has just deleted it.
        yield from (article(each, attempts[each.id], now) for each in workflows if attempts[each.id])


def article(workflow, attempts, now):
    last, at = attempts[-1], workflow.transitioned_at
    state = tag("span", workflow.state, class_=f"badge {workflow.state}")
    hero = f"{workflow.hero_type} {workflow.hero_id}" if workflow.hero_type else "no hero"
    stands = (" at ", tag("bdi", workflow.current_step_name)) if workflow.current_step_name else ()
    since = (", since " if at else ", created ", moment(at or workflow.created_at))
    listed = tag("ol", *(tag("li", *in_words(each), value=each.number) for each in attempts))
    omitted = f", the last {len(attempts)} of {attempts[-1].number:,}" * (attempts[0].number > 1)
    context = workflow.context and json.dumps(workflow.context, indent=2, ensure_ascii=False)
    return tag(
        "article",
        tag("h3", tag("bdi", workflow.type), f" {workflow.id} ", state),
        tag("p", tag("bdi", hero), *stands, *since, class_="note"),
        error(last),
        timeline(workflow, attempts, now),
        folded(f"In words{omitted}", listed),
        folded("Traceback", tag("pre", last.backtrace[-MAX_TEXT:], dir="auto")) if last.backtrace else "",
        folded("Context", tag("pre", context[:MAX_TEXT], dir="auto")) if context else "",
    )


def in_words(attempt):
    outcome = f", {attempt.outcome}" if attempt.outcome not in (None, "success", attempt.state) else ""
    yield from (tag("bdi", attempt.step_name), f": {attempt.state}{outcome}")
    if attempt.started_at:
        yield from ("; began ", moment(attempt.started_at))
        yield f", took {span(attempt.finished_at - attempt.started_at)}" if attempt.finished_at else ""
    elif not attempt.finished_at:
        yield from ("; due ", moment(attempt.scheduled_for))
    yield error(attempt)


def error(attempt):
    if not attempt.error_class_name:
        return ""
    cut = "…" * (len(attempt.message) == MAX_MESSAGE)
    return tag("p", f"{attempt.error_class_name}: {attempt.message}{cut}", class_="error", dir="auto")


def timeline(workflow, attempts, now):
    """A line for each step: how long it was waited for, when it was attempted, and since when it is paused."""
    spans = []
    for each in attempts:
        began = each.started_at or each.finished_at or max(now, each.scheduled_for)
        spans.append((each.step_name, "wait thin", "waits", each.created_at, began))
        if each.started_at:
            said = f"attempt {each.number}: {each.outcome or each.state}"
            spans.append((each.step_name, each.kind, said, each.started_at, each.finished_at or now))
    if workflow.state == "paused":
        spans.append((workflow.current_step_name, "paused thin", "paused", workflow.transitioned_at, now))
    first, last = min(begin for *_, begin, _ in spans), max(end for *_, end in spans)
    lanes, whole = defaultdict(list), max(last - first, timedelta(milliseconds=1))
    spans.sort(key=lambda each: "thin" not in each[1])  # attempts lie on top
    for name, kind, said, begin, end in spans:
        width = max(0.8, 100 * (end - begin) / whole)
        left = min(100 * (begin - first) / whole, 100 - width)
        title = tag("title", f"{said}, {span(end - begin)} from {begin:{MOMENT}}")
        lanes[name].append(tag("rect", title, x=f"{left:.2f}%", width=f"{width:.2f}%", class_=kind))
    made = Counter(each.step_name for each in attempts if each.started_at)
    failed = Counter(each.step_name for each in attempts if each.state == "failed")
    rows = []
    for name, rects in lanes.items():
        said = f"{made[name]} attempt{'s' * (made[name] > 1)}" if made[name] else "not attempted"
        said += f", {failed[name]} failed" * (failed[name] > 0)
        picture = tag("svg", *rects, role="img", aria_label=f"{name}: {said}")
        rows.append(tag("div", tag("bdi", name), picture, tag("span", said, class_="note"), class_="lane"))
    ends = tag("div", moment(first), tag("span", span(whole)), moment(last), class_="ends")
    return tag("div", *rows, tag("div", ends, class_="lane"))


def legend(kinds):
    return tag("p", *(tag("span", tag("b", said), " ", class_=f"key {kind}") for kind, said in kinds.items()))


def moment(at):
    return tag("time", f"{at:{MOMENT}}", datetime=at.isoformat())


def span(duration):
    seconds = duration.total_seconds()
    for unit, length in {"days": 86400, "h": 3600, "min": 60}.items():
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def folded(summary, content):
    return tag("details", tag("summary", summary), content)


def table(caption, heads, rows):
    """Of rows that begin with a name."""
    if not rows:
        return NONE
    sides = ["number" if isinstance(each, int) else "name" for each in rows[0]]
    head = tag("tr", *(tag("th", each, scope="col", class_=side) for each, side in zip(heads, sides)))
    body = []
    for name, *rest in rows:
        shown = zip(sides[1:], (f"{each:,}" if isinstance(each, int) else each for each in rest))
        cells = (tag("td", tag("bdi", each), class_=side) for side, each in shown)
        body.append(tag("tr", tag("th", tag("bdi", name), scope="row"), *cells))
    return tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))


# ==== HTML ============================================================================================================

# What is not seen, or rearranges what is: control characters, overrides of the direction, halves of pairs.
UNSEEN = "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"


class Html(str):
    """Markup; all else that is put into a tag is escaped."""


def text(value):
    return html.escape(re.sub(UNSEEN, lambda found: found[0].encode("unicode_escape").decode(), str(value)))


def tag(name, *content, **attributes):
    inside = "".join(each if isinstance(each, Html) else text(each) for each in content)
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(each)}"' for key, each in attributes.items())
    return Html(f"<{name}{written}>{inside}</{name}>")


NONE = tag("p", "None.", class_="note")

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>{body}</body>
</html>
"""

STYLE = """
:root { --page: #f4f5f7; --card: #fff; --text: #1b1f24; --note: #57606a; --line: #d5dae0; --wait: #8a95a1;
  --done: #1a7f4b; --failed: #c62828; --other: #6f5bb5; --paused: #955700; --going: #2f55d4 }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --card: #1b2026; --text: #e6e9ed; --note: #a3adb8;
  --line: #343b44; --wait: #76818d; --done: #45b981; --failed: #ff7b72; --other: #b29df2; --paused: #e3aa48;
  --going: #86a3ff } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.4 system-ui, sans-serif }
main { max-width: 72rem; margin: auto; padding: 1rem clamp(0.7rem, 3vw, 2rem) 4rem; overflow-wrap: anywhere }
h1, h2, h3, p, figure { margin: 0 0 0.5rem; line-height: 1.3 }
h2 { margin-top: 2rem } h3 { font-size: 1rem } p, ol { font-size: 0.9rem }
.note, caption, figcaption, thead th, .ends, summary { color: var(--note); font-size: 0.85rem; font-weight: normal }
time, .number { white-space: nowrap } .number { text-align: right }
.badge { border: 1px solid; border-radius: 1em; padding: 0 0.6em; font-size: 0.85rem; font-weight: normal }

table, figure, article { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
table { width: 100%; border-spacing: 0; margin: 0.8rem 0; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: 0.3rem }
th, td { padding: 0.35rem 0.7rem; vertical-align: top } th { text-align: left } th.number { text-align: right }
tbody th { min-width: 4rem } tbody th, tbody td { border-top: 1px solid var(--line) }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0.8rem }
figure, article { padding: 0.8rem 1rem; margin-bottom: 0.8rem; min-width: 0 }
figcaption, .ends { display: flex; justify-content: space-between; gap: 0.5rem; white-space: nowrap }
figcaption b { color: var(--text); white-space: normal } figure table { border: 0; margin: 0.3rem 0 0 }
figure svg { width: 100%; height: 9rem; border-bottom: 1px solid var(--wait); margin: 0.4rem 0 }

.lane { display: grid; grid-template-columns: 13rem 1fr 11rem; gap: 0 1rem; align-items: center; min-height: 1.7rem }
.lane svg { width: 100%; height: 18px } .lane .ends { grid-column: 2 }
.lane rect { height: 12px; y: 3px } .lane .failed { height: 18px; y: 0 } .lane .thin { height: 4px; y: 7px }
rect { fill: transparent } rect[class] { fill: currentcolor }
.done, .finished { color: var(--done) } .failed, .error { color: var(--failed) } .paused { color: var(--paused) }
.other, .canceled { color: var(--other) } .ready, .performing { color: var(--going) } .wait { color: var(--wait) }
.key { margin-right: 0.8rem; font-size: 0.85rem; display: inline-block }
.key b { font-weight: normal; color: var(--note) }
.key::before { content: ""; display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.4em;
  background: currentcolor }
.key.thin::before { height: 0.25em; vertical-align: 0.25em }

summary { cursor: pointer } article details:not([open]) { display: inline-block; margin-right: 1.2rem }
ol { padding-left: 2.5rem; margin: 0.3rem 0 } li p { margin: 0 }
pre { margin: 0.3rem 0; padding: 0.6rem; max-height: 24rem; overflow: auto; white-space: pre-wrap; font-size: 0.8rem;
  background: var(--page); border-radius: 6px }

@media (max-width: 40rem) {
  .lane { grid-template-columns: 1fr auto; margin-top: 0.3rem }
  .lane svg, .lane .ends { grid-column: 1 / -1; grid-row: 2 } .lane .ends { font-size: 0.72rem }
  th, td { padding: 0.3rem 0.25rem; font-size: 0.75rem } .name { min-width: 4rem }
  thead .number { writing-mode: vertical-rl }
}
"""

# ==== The demonstration ===============================================================================================


def demonstration(folder):
    """Ten days of a shop, played in a moment: its clock leaps to each step that is due."""
    random.seed(1)  # which the waits of the policies obey too
    database = SqliteDatabase(f"{folder}/shop.db", pragmas={"synchronous": 0})
    end = datetime.now(timezone.utc)
    now = end - timedelta(days=10)
    drive = GenevaDrive(database, clock=lambda: now)

    def work(seconds, failing, error):
        nonlocal now
        now += timedelta(seconds=random.expovariate(1 / seconds))
        if random.random() < failing:
            raise error

    class Customer(Model):
        name = CharField()

        class Meta:
            database = drive.database

    class Signup(Workflow):
        @step(on_exception="reattempt")
        def send_welcome(self):
            work(2, 0.2, ConnectionError("451 greylisted, try again later"))

        @step(wait=timedelta(days=2))
        def send_reminder(self):
            work(2, 0.2, ValueError(f"no such mailbox: <{self.hero.name}@example.com>"))

        @step(wait=timedelta(days=3), skip_if=lambda self: random.random() < 0.3)
        def send_farewell(self):
            work(2, 0, None)

    class Payment(Workflow):
        @step(on_exception="cancel")
        def authorize(self):
            self.context["amount"] = random.randrange(5, 200)
            work(20, 0.1, PermissionError("the card was refused: insufficient funds"))

        @step(on_exception=ExceptionPolicy("reattempt", wait=7200, max_wait=86400, max_reattempts=3))
        def capture(self):
            work(600, 0.6, TimeoutError("the gateway gave no answer within 30 s"))

        @step(wait=timedelta(hours=12))
        def send_receipt(self):
            work(1, 0, None)

    drive.create_tables([Customer])
    arrivals = sorted((end - timedelta(days=10 * random.random() ** 1.3) for _ in range(80)), reverse=True)
    due = StepExecution.select().join(Workflow).where(StepExecution.state == "scheduled", Workflow.state == "ready")
    due = due.order_by(StepExecution.scheduled_for)
    while now < end:
        execution = due.get_or_none()
        if arrivals and arrivals[-1] <= execution.scheduled_for if execution else arrivals:
            now = max(now, arrivals.pop())
            random.choice([Signup, Payment]).create(hero=Customer.create(name=random.choice(["ada", "grace", "mary"])))
            continue
        now = min(end, max(now, execution.scheduled_for) if execution else end)
        if now < end:
            with suppress(Exception):  # that a step raises is what the report is about
                execution.execute()
    return drive


if __name__ == "__main__":
    main()
